import type { Mode } from "../editor";
import { type At, drawLine, Tool } from "./tool";

/** Add with Shift, take away with Alt, otherwise a new object. */
export function modeOf(at: At, background: boolean): Mode {
  if (at.alt || background) return "subtract";
  return at.shift ? "add" : "new";
}

export class BoxTool extends Tool {
  readonly name = "box";
  readonly label = "Box";
  private from: At | null = null;
  private to: At | null = null;

  hint(): string {
    const what = this.context.assisted() ? "Drag around an object" : "Drag a rectangle (no assistant for this image)";
    return `${what} · Shift: add to the selected object · Alt: take away`;
  }

  override down(at: At): void {
    this.from = this.to = at;
  }

  override move(at: At): void {
    if (!this.from) return;
    this.to = at;
    this.context.view.touch();
  }

  override up(at: At): void {
    const { from } = this;
    const { editor, store, view, options } = this.context;
    this.cancel();
    if (!from) return;
    const clampX = (x: number): number => Math.min(store.width, Math.max(0, x));
    const clampY = (y: number): number => Math.min(store.height, Math.max(0, y));
    const [x0, y0, x1, y1] = [clampX(from.x), clampY(from.y), clampX(at.x), clampY(at.y)];
    if (Math.abs(x1 - x0) * view.zoom < 3 || Math.abs(y1 - y0) * view.zoom < 3) return;
    const mode = modeOf({ ...at, alt: at.alt || from.alt, shift: at.shift || from.shift }, options.background);
    void editor.box(x0, y0, x1, y1, mode, this.context.assisted());
  }

  override cancel(): boolean {
    const begun = this.from !== null;
    this.from = this.to = null;
    this.context.view.touch();
    return begun;
  }

  override draw(context: CanvasRenderingContext2D, zoom: number): void {
    const { from, to } = this;
    if (!from || !to) return;
    context.beginPath();
    context.rect(from.x, from.y, to.x - from.x, to.y - from.y);
    drawLine(context, zoom);
  }
}
