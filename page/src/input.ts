/** Mouse, pen, fingers and keyboard on the image, turned into what tools understand. */

import type { Store } from "./store";
import { drawLine, type At, type Tool } from "./tools/tool";
import type { Point } from "./types";
import type { Extra, View } from "./view";

/** CSS pixels by which a press may move and still be a click. */
const STILL = 5;
const TOUCH_STILL = 9;

type Gesture =
  | { kind: "tool"; pointer: number; alt: boolean }
  | { kind: "pan"; pointer: number; x: number; y: number }
  /** A press of the select tool, which becomes a pan when it moves. */
  | { kind: "press"; pointer: number; x: number; y: number; alt: boolean }
  /** One finger, of which it is not known yet whether a second follows. */
  | { kind: "touch"; pointer: number; x: number; y: number; at: At }
  | { kind: "pinch" };

export class Input implements Extra {
  tool: Tool;
  onPointer: (at: Point | null) => void = () => {};

  private gesture: Gesture | null = null;
  private fingers = new Map<number, Point>();
  /** Who draws with a pen moves the image with one finger, and the hand that rests draws nothing. */
  private pen = false;
  private space = false;
  private spaceUsed = false;
  private cross: Point | null = null;
  private crossDown = false;

  constructor(
    private readonly stage: HTMLElement,
    private readonly view: View,
    private readonly store: Store,
    tool: Tool,
  ) {
    this.tool = tool;
    stage.addEventListener("pointerdown", (event) => this.down(event));
    stage.addEventListener("pointermove", (event) => this.move(event));
    stage.addEventListener("pointerup", (event) => this.up(event));
    stage.addEventListener("pointercancel", (event) => this.lost(event));
    stage.addEventListener("pointerleave", () => {
      if (this.gesture) return;
      this.tool.hover(null);
      this.onPointer(null);
    });
    stage.addEventListener("contextmenu", (event) => event.preventDefault());
    stage.addEventListener("dblclick", () => this.tool.finish());
    stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    stage.addEventListener("keydown", (event) => this.key(event));
    stage.addEventListener("keyup", (event) => this.keyUp(event));
    stage.addEventListener("blur", () => {
      this.space = false;
      this.hideCross();
    });
  }

  /** Take another tool; what was begun is dropped. */
  use(tool: Tool): void {
    this.drop();
    this.tool.hover(null);
    this.tool = tool;
    this.stage.style.cursor = tool.cursor;
    if (this.cross) this.hoverCross();
    this.view.touch();
  }

  /** Drop what is begun; true if there was something. */
  drop(): boolean {
    this.gesture = null;
    this.crossDown = false;
    return this.tool.cancel();
  }

  private at(event: MouseEvent, alt = event.altKey): At {
    const [x, y] = this.view.toImage(event.clientX, event.clientY);
    return { x, y, alt, shift: event.shiftKey, ctrl: event.ctrlKey || event.metaKey };
  }

  private down(event: PointerEvent): void {
    if (!this.store.width) return;
    this.stage.focus({ preventScroll: true });
    this.stage.setPointerCapture(event.pointerId);
    this.hideCross();
    const { pointerId: pointer, clientX: x, clientY: y } = event;
    if (event.pointerType === "pen") this.pen = true;
    if (event.pointerType === "touch") {
      if (this.gesture && !this.fingers.size) return;
      this.fingers.set(pointer, [x, y]);
      if (this.fingers.size === 1 && this.pen) this.gesture = { kind: "pan", pointer, x, y };
      else if (this.fingers.size === 1) this.gesture = { kind: "touch", pointer, x, y, at: this.at(event) };
      else if (this.fingers.size === 2) {
        if (this.gesture?.kind === "tool") this.tool.cancel();
        this.gesture = { kind: "pinch" };
      }
      return;
    }
    if (this.gesture) return;
    if (event.button === 1 || (this.space && event.button === 0)) {
      this.spaceUsed = true;
      this.gesture = { kind: "pan", pointer, x, y };
      this.stage.style.cursor = "grabbing";
      event.preventDefault();
      return;
    }
    // Button 5 is the rubber end of a pen.
    const alt = event.altKey || event.button === 2 || event.button === 5;
    if (this.tool.name === "select") this.gesture = { kind: "press", pointer, x, y, alt };
    else {
      this.gesture = { kind: "tool", pointer, alt };
      this.tool.down(this.at(event, alt));
    }
  }

  private move(event: PointerEvent): void {
    const { gesture } = this;
    const { pointerId: pointer, clientX: x, clientY: y } = event;
    this.onPointer(this.view.toImage(x, y));
    if (this.fingers.has(pointer)) {
      const before = [...this.fingers.values()];
      this.fingers.set(pointer, [x, y]);
      if (gesture?.kind === "pinch") {
        this.pinch(before, [...this.fingers.values()]);
        return;
      }
    }
    if (!gesture) {
      if (event.pointerType !== "touch") this.tool.hover(this.at(event));
      return;
    }
    if (gesture.kind === "pinch" || gesture.pointer !== pointer) return;
    if (gesture.kind === "touch" || gesture.kind === "press") {
      const still = gesture.kind === "touch" ? TOUCH_STILL : STILL;
      if (Math.hypot(x - gesture.x, y - gesture.y) < still) return;
      if (this.tool.name === "select") this.gesture = { kind: "pan", pointer, x: gesture.x, y: gesture.y };
      else if (gesture.kind === "touch") {
        this.tool.down(gesture.at);
        this.gesture = { kind: "tool", pointer, alt: gesture.at.alt };
      }
      this.move(event);
      return;
    }
    if (gesture.kind === "pan") {
      this.view.pan(x - gesture.x, y - gesture.y);
      [gesture.x, gesture.y] = [x, y];
      return;
    }
    // All positions since the last frame: quick strokes stay round.
    const events = event.getCoalescedEvents?.() ?? [];
    for (const part of events.length ? events : [event]) this.tool.move(this.at(part, gesture.alt || event.altKey));
  }

  private up(event: PointerEvent): void {
    const { gesture } = this;
    this.fingers.delete(event.pointerId);
    if (!gesture) return;
    if (gesture.kind === "pinch") {
      if (!this.fingers.size) this.gesture = null;
      return;
    }
    if (gesture.pointer !== event.pointerId) return;
    this.gesture = null;
    this.stage.style.cursor = this.tool.cursor;
    if (gesture.kind === "pan") return;
    if (gesture.kind === "touch") {
      this.tool.down(gesture.at);
      this.tool.up(gesture.at);
    } else {
      this.tool.up(this.at(event, gesture.alt || event.altKey));
    }
    if (event.pointerType === "touch") this.tool.hover(null);
  }

  private lost(event: PointerEvent): void {
    this.fingers.delete(event.pointerId);
    if (!this.fingers.size) this.drop();
  }

  private pinch(before: Point[], after: Point[]): void {
    const [a, b] = before;
    const [c, d] = after;
    if (!a || !b || !c || !d) return;
    const middle = (p: Point, q: Point): Point => [(p[0] + q[0]) / 2, (p[1] + q[1]) / 2];
    const [fromX, fromY] = middle(a, b);
    const [toX, toY] = middle(c, d);
    this.view.pan(toX - fromX, toY - fromY);
    const apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (apart > 0) this.view.zoomAt(Math.hypot(c[0] - d[0], c[1] - d[1]) / apart, toX, toY);
  }

  private wheel(event: WheelEvent): void {
    event.preventDefault();
    const unit = event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 200 : 1;
    if (event.shiftKey) {
      this.view.pan(-(event.deltaX || event.deltaY) * unit, 0);
      return;
    }
    // A pinch on a touch pad arrives as Ctrl+wheel with small steps.
    const speed = event.ctrlKey ? 0.01 : 0.0018;
    this.view.zoomAt(Math.exp(-event.deltaY * unit * speed), event.clientX, event.clientY);
    if (event.deltaX && !event.ctrlKey) this.view.pan(-event.deltaX * unit, 0);
  }

  // --- the keyboard's cross ----------------------------------------------------------------------------------------

  private key(event: KeyboardEvent): void {
    if (event.key === "Alt") event.preventDefault(); // would open the browser's menu
    if (event.key === " ") {
      event.preventDefault();
      if (event.repeat) return;
      this.space = true;
      this.spaceUsed = false;
      return;
    }
    const way: Record<string, Point> = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = way[event.key];
    if (!step || event.altKey || !this.store.width) return;
    event.preventDefault();
    event.stopPropagation();
    if (!this.cross) {
      const { seen } = this.view;
      this.cross = [seen.x + seen.w / 2, seen.y + seen.h / 2];
    } else {
      const size = (event.shiftKey ? 1 : event.ctrlKey || event.metaKey ? 80 : 12) / this.view.zoom;
      const x = Math.min(this.store.width - 0.01, Math.max(0, this.cross[0] + step[0] * size));
      const y = Math.min(this.store.height - 0.01, Math.max(0, this.cross[1] + step[1] * size));
      this.cross = [x, y];
    }
    this.view.reveal({ x: this.cross[0], y: this.cross[1], w: 1e-3, h: 1e-3 });
    this.hoverCross();
  }

  private crossAt(event?: KeyboardEvent): At {
    const [x, y] = this.cross!;
    return { x, y, alt: event?.shiftKey ?? false, shift: false, ctrl: event?.ctrlKey ?? false };
  }

  private hoverCross(): void {
    this.onPointer(this.cross);
    if (this.crossDown) this.tool.move(this.crossAt());
    else this.tool.hover(this.crossAt());
    this.view.touch();
  }

  private keyUp(event: KeyboardEvent): void {
    if (event.key !== " ") return;
    event.preventDefault();
    this.space = false;
    if (this.spaceUsed || !this.cross) return;
    const at = this.crossAt(event);
    if (!this.tool.drags) {
      this.tool.down(at);
      this.tool.up(at);
    } else if (!this.crossDown) {
      this.crossDown = true;
      this.tool.down(at);
    } else {
      this.crossDown = false;
      this.tool.up(at);
    }
    this.view.touch();
  }

  private hideCross(): void {
    if (!this.cross) return;
    this.cross = null;
    this.crossDown = false;
    this.view.touch();
  }

  draw(context: CanvasRenderingContext2D, zoom: number): void {
    if (!this.cross) return;
    const [x, y] = this.cross;
    const arm = 14 / zoom;
    const gap = 3 / zoom;
    context.beginPath();
    for (const [dx, dy] of [
      [1, 0],
      [-1, 0],
      [0, 1],
      [0, -1],
    ] as const) {
      context.moveTo(x + dx * gap, y + dy * gap);
      context.lineTo(x + dx * arm, y + dy * arm);
    }
    drawLine(context, zoom);
  }
}
