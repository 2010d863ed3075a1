import { polygon } from "../bitmap";
import type { Point } from "../types";
import { modeOf } from "./box";
import { type At, drawDot, drawLine, Tool } from "./tool";

/** Corners by clicks, or a free outline by dragging. */
export class PolygonTool extends Tool {
  readonly name = "polygon";
  readonly label = "Polygon";
  override readonly drags = false;
  private corners: Point[] = [];
  private pressed: At | null = null;
  private free = false;
  private pointer: Point | null = null;
  private first: At | null = null;

  hint(): string {
    return this.corners.length
      ? "Click the first corner, double-click or press Enter to close · Backspace: one corner back"
      : "Click corners, or drag an outline · Shift: add to the selected object · Alt: take away";
  }

  override get begun(): boolean {
    return this.corners.length > 0;
  }

  private near(at: At, [x, y]: Point, pixels: number): boolean {
    return Math.hypot(at.x - x, at.y - y) * this.context.view.zoom <= pixels;
  }

  override down(at: At): void {
    this.pressed = at;
    this.free = false;
  }

  override move(at: At): void {
    const { pressed } = this;
    this.pointer = [at.x, at.y];
    if (!pressed) return;
    if (!this.free && !this.near(at, [pressed.x, pressed.y], 6)) {
      this.free = true;
      this.first ??= pressed;
      this.corners.push([pressed.x, pressed.y]);
    }
    const last = this.corners.at(-1);
    if (this.free && last && !this.near(at, last, 3)) this.corners.push([at.x, at.y]);
    this.context.view.touch();
  }

  override up(at: At): void {
    if (!this.pressed) return;
    this.pressed = null;
    const start = this.corners[0];
    if (this.free) {
      // A free outline that returns to its start is closed; otherwise it goes on by clicks.
      this.free = false;
      if (start && this.corners.length > 2 && this.near(at, start, 12)) this.finish();
    } else if (start && this.corners.length > 2 && this.near(at, start, 9)) {
      this.finish();
    } else {
      this.first ??= at;
      const last = this.corners.at(-1);
      if (!last || !this.near(at, last, 1)) this.corners.push([at.x, at.y]);
    }
    this.context.changed();
    this.context.view.touch();
  }

  override hover(at: At | null): void {
    this.pointer = at ? [at.x, at.y] : null;
    if (this.corners.length) this.context.view.touch();
  }

  override cancel(): boolean {
    const begun = this.corners.length > 0 || this.pressed !== null;
    this.corners = [];
    this.pressed = this.first = null;
    this.free = false;
    this.context.changed();
    this.context.view.touch();
    return begun;
  }

  override finish(): boolean {
    const { corners, first } = this;
    const { store, editor, voice, options } = this.context;
    if (!corners.length) return false;
    this.cancel();
    if (corners.length < 3) voice.say("A polygon needs three corners");
    else editor.region(polygon(store.width, store.height, corners), "polygon", modeOf(first!, options.background));
    return true;
  }

  override stepBack(): boolean {
    if (!this.corners.length) return false;
    this.corners.pop();
    if (!this.corners.length) this.first = null;
    this.context.changed();
    this.context.view.touch();
    return true;
  }

  override draw(context: CanvasRenderingContext2D, zoom: number): void {
    const { corners, pointer } = this;
    const [start, ...rest] = corners;
    if (!start) return;
    context.beginPath();
    context.moveTo(start[0], start[1]);
    for (const [x, y] of rest) context.lineTo(x, y);
    if (pointer && !this.free) context.lineTo(pointer[0], pointer[1]);
    drawLine(context, zoom);
    if (!this.free) for (const [x, y] of rest) drawDot(context, zoom, x, y, "#0b57d0", 3);
    drawDot(context, zoom, start[0], start[1], "#0b57d0", 5);
  }
}
