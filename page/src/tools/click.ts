import { type At, drawDot, Tool } from "./tool";

/** Pixels of the screen by which a click may miss the place of the mask that is shown. */
const SLACK = 4;

export class ClickTool extends Tool {
  readonly name = "click";
  readonly label = "Click";
  override readonly drags = false;
  private last: At | null = null;

  hint(): string {
    const { store, options } = this.context;
    if (!this.context.assisted()) return "No assistant for this image: use polygon, brush or box";
    if (!store.current || options.single) return "Click on an object. Ctrl+click inside another object starts a new one";
    return "Click: add · Alt+click or right button: take away · Enter or Escape: next object";
  }

  override hover(at: At | null): void {
    const { editor, store, view, options } = this.context;
    if (!at) {
      this.last = null;
      editor.clearPreview();
      return;
    }
    const negative = at.alt || options.background;
    const moved = this.last ? Math.hypot(at.x - this.last.x, at.y - this.last.y) * view.zoom : Infinity;
    if (editor.preview && moved > SLACK && !negative && !options.hover) editor.clearPreview();
    if (moved < 2) return;
    this.last = at;
    const current = options.single && !at.shift ? undefined : store.current;
    const meets = !current && !at.ctrl && store.at(at.x, at.y);
    const outside = at.x < 0 || at.y < 0 || at.x >= store.width || at.y >= store.height;
    if (negative || !options.hover || outside || meets || editor.waiting.length || !this.context.assisted()) editor.clearPreview();
    else editor.hover(at.x, at.y, (options.single || at.ctrl) && !at.shift);
  }

  override up(at: At): void {
    const { editor, store, options, voice, view } = this.context;
    if (at.x < 0 || at.y < 0 || at.x >= store.width || at.y >= store.height) return;
    const positive = !(at.alt || options.background);
    const fresh = positive && (options.single || at.ctrl) && !at.shift;
    if (fresh && !editor.waiting.length) store.select([]);
    if (positive && !at.ctrl && !store.current && !editor.waiting.length && this.context.pick(at)) return;
    if (!this.context.assisted()) {
      voice.warn("There is no assistant for this image; use the polygon, the brush or the box");
      return;
    }
    void editor.click(at.x, at.y, positive, SLACK / view.zoom, fresh);
  }

  override draw(context: CanvasRenderingContext2D, zoom: number): void {
    for (const [x, y, positive] of this.context.editor.waiting) {
      drawDot(context, zoom, x, y, positive ? "#1b9e4b" : "#c62828");
    }
  }
}
