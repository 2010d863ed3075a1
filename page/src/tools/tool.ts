/** What every tool has in common. */

import type { Editor, Voice } from "../editor";
import type { Shape, Store } from "../store";
import { type Extra, outline, type View } from "../view";

/** Where the pointer (mouse, pen, finger, or the keyboard's cross) is, in image pixels, with the keys that are held. */
export interface At {
  x: number;
  y: number;
  /** Background, or erase: Alt, the right button, or the switch on the page. */
  alt: boolean;
  shift: boolean;
  ctrl: boolean;
}

export interface Options {
  /** Radius of brush and eraser, in image pixels. */
  radius: number;
  /** Background clicks, or taking away, without holding a key: for touch. */
  background: boolean;
  /** Every click starts a new object. */
  single: boolean;
  /** Show what a click would take while the pointer moves. */
  hover: boolean;
}

export interface Context {
  store: Store;
  view: View;
  editor: Editor;
  voice: Voice;
  options: Options;
  /** The assistant answers for this image. */
  assisted: () => boolean;
  /** Accept or select what a click without a selection meets. */
  pick: (at: At) => boolean;
  /** What the tool has begun is another now: hints and buttons follow. */
  changed: () => void;
}

export abstract class Tool implements Extra {
  abstract readonly name: string;
  abstract readonly label: string;
  /** One line about use, shown at the bottom. */
  abstract hint(): string;
  /** A press with the keyboard is down and up at once (a click), or down first and up at the next press (a drag). */
  readonly drags: boolean = true;
  readonly cursor: string = "crosshair";

  constructor(protected readonly context: Context) {}

  down(_at: At): void {}
  move(_at: At): void {}
  up(_at: At): void {}
  /** The pointer moves with nothing pressed; null when it leaves. */
  hover(_at: At | null): void {}
  /** Something is begun that Enter completes, such as a polygon. */
  get begun(): boolean {
    return false;
  }
  /** Drop what is begun; true if there was something. */
  cancel(): boolean {
    return false;
  }
  /** Complete what is begun (Enter, double click); true if there was something. */
  finish(): boolean {
    return false;
  }
  /** Take back the last step of what is begun (Backspace, undo); true if there was something. */
  stepBack(): boolean {
    return false;
  }
  draw(_context: CanvasRenderingContext2D, _zoom: number): void {}
}

/** The object under the pointer, outlined: what a click would select. */
export class Highlight {
  private shape: Shape | undefined;

  constructor(private readonly context: Context) {}

  show(shape: Shape | undefined): void {
    if (shape === this.shape) return;
    this.shape = shape;
    this.context.view.touch();
  }

  draw(context: CanvasRenderingContext2D, zoom: number): void {
    const { shape } = this;
    if (!shape || this.context.store.get(shape.id) !== shape || this.context.store.selected.has(shape.id)) return;
    outline(shape, this.context.view.colorOf(shape), 0.12).draw(context, zoom);
  }
}

/** Line widths and dots in CSS pixels, readable on any image. */
export function drawLine(context: CanvasRenderingContext2D, zoom: number, dashed = false): void {
  context.lineJoin = context.lineCap = "round";
  context.lineWidth = 3.5 / zoom;
  context.strokeStyle = "rgb(0 0 0 / 0.6)";
  context.stroke();
  context.lineWidth = 1.5 / zoom;
  context.strokeStyle = "#fff";
  context.setLineDash(dashed ? [5 / zoom, 4 / zoom] : []);
  context.stroke();
  context.setLineDash([]);
}

export function drawDot(
  context: CanvasRenderingContext2D,
  zoom: number,
  x: number,
  y: number,
  color: string,
  size = 5,
): void {
  context.beginPath();
  context.arc(x, y, size / zoom, 0, 2 * Math.PI);
  context.fillStyle = color;
  context.fill();
  context.lineWidth = 1.5 / zoom;
  context.strokeStyle = "#fff";
  context.stroke();
}
