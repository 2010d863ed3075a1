import { BoxTool } from "./box";
import { type At, type Context, drawDot, Highlight, Tool } from "./tool";

/** Pixels of the screen by which a click may miss the place of the mask that is shown. */
const SLACK = 4;
/** Pixels of the screen after which a press is no click but draws a box. */
const DRAG = 10;

/** Clicks for and against an object; dragging gives the assistant a box. */
export class ClickTool extends Tool {
  readonly name = "click";
  readonly label = "Click";
  override readonly drags = false;
  private last: At | null = null;
  private pressed: At | null = null;
  private dragging = false;
  private readonly box: BoxTool;
  private readonly highlight: Highlight;

  constructor(context: Context) {
    super(context);
    this.box = new BoxTool(context);
    this.highlight = new Highlight(context);
  }

  hint(): string {
    const { store, options } = this.context;
    if (!this.context.assisted()) return "No assistant for this image: use polygon, brush or box";
    if (!store.current || options.single)
      return "Click on an object, or drag around it · Ctrl+click: new object inside another";
    return "Click: add · Alt+click or right button: take away · Enter: next object";
  }

  /** The click starts a new object, whatever is selected. */
  private fresh(at: At): boolean {
    return (this.context.options.single || at.ctrl) && !at.shift;
  }

  override hover(at: At | null): void {
    const { editor, store, view, options } = this.context;
    if (!at) {
      this.last = null;
      this.highlight.show(undefined);
      editor.clearPreview();
      return;
    }
    const moved = this.last ? Math.hypot(at.x - this.last.x, at.y - this.last.y) * view.zoom : Infinity;
    if (moved < 2) return;
    this.last = at;
    const negative = at.alt || options.background;
    const current = this.fresh(at) ? undefined : store.current;
    const met = !current && !at.ctrl && !negative ? store.at(at.x, at.y) : undefined;
    this.highlight.show(met);
    const outside = at.x < 0 || at.y < 0 || at.x >= store.width || at.y >= store.height;
    if (negative || !options.hover || outside || met || editor.waiting.length || !this.context.assisted())
      editor.clearPreview();
    else editor.hover(at.x, at.y, this.fresh(at));
  }

  override down(at: At): void {
    this.pressed = at;
    this.dragging = false;
  }

  override move(at: At): void {
    const { pressed } = this;
    if (!pressed || !this.context.assisted()) return;
    if (!this.dragging && Math.hypot(at.x - pressed.x, at.y - pressed.y) * this.context.view.zoom > DRAG) {
      this.dragging = true;
      this.context.editor.clearPreview();
      this.box.down(pressed);
    }
    if (this.dragging) this.box.move(at);
  }

  override up(at: At): void {
    const { dragging, pressed } = this;
    this.pressed = null;
    this.dragging = false;
    if (dragging) this.box.up(at);
    else if (pressed) this.click({ ...at, x: pressed.x, y: pressed.y });
  }

  private click(at: At): void {
    const { editor, store, options, voice, view } = this.context;
    if (at.x < 0 || at.y < 0 || at.x >= store.width || at.y >= store.height) return;
    this.highlight.show(undefined);
    const positive = !(at.alt || options.background);
    const fresh = positive && this.fresh(at);
    if (fresh && !editor.waiting.length) store.select([]);
    if (positive && !at.ctrl && !store.current && !editor.waiting.length && this.context.pick(at)) return;
    if (!this.context.assisted()) {
      voice.warn("There is no assistant for this image; use the polygon, the brush or the box");
      return;
    }
    void editor.click(at.x, at.y, positive, SLACK / view.zoom, fresh);
  }

  override cancel(): boolean {
    const begun = this.dragging;
    this.pressed = null;
    this.dragging = false;
    this.box.cancel();
    return begun;
  }

  override draw(context: CanvasRenderingContext2D, zoom: number): void {
    this.highlight.draw(context, zoom);
    this.box.draw(context, zoom);
    for (const [x, y, positive] of this.context.editor.waiting) {
      drawDot(context, zoom, x, y, positive ? "#1b9e4b" : "#c62828");
    }
  }
}
