import type { Point } from "../types";
import { type At, type Context, drawLine, Highlight, Tool } from "./tool";

/** Select by clicking; dragging moves the image. */
export class SelectTool extends Tool {
  readonly name = "select";
  readonly label = "Select";
  override readonly drags = false;
  override readonly cursor = "default";
  private readonly highlight: Highlight;

  constructor(context: Context) {
    super(context);
    this.highlight = new Highlight(context);
  }

  hint(): string {
    const { store } = this.context;
    if (store.selected.size > 1) return "M: merge · Delete: remove · number keys: class";
    if (store.selected.size) return "J: split into parts · K: split by a line · Delete: remove · number keys: class";
    return "Click an object; Shift+click selects several; Enter accepts a selected suggestion";
  }

  override hover(at: At | null): void {
    this.highlight.show(at ? this.context.store.at(at.x, at.y) : undefined);
  }

  override draw(context: CanvasRenderingContext2D, zoom: number): void {
    this.highlight.draw(context, zoom);
  }

  override up(at: At): void {
    const { store } = this.context;
    const shape = store.at(at.x, at.y);
    if (!at.shift) store.select(shape ? [shape.id] : []);
    else if (shape) {
      const ids = new Set(store.selected);
      if (!ids.delete(shape.id)) ids.add(shape.id);
      store.select(ids);
    }
  }
}

/** Split the selected object by a drawn line. */
export class SplitTool extends Tool {
  readonly name = "split";
  readonly label = "Split by line";
  private line: Point[] = [];

  hint(): string {
    return this.context.store.current ? "Draw a line across the selected object" : "Draw a line across an object";
  }

  override down(at: At): void {
    this.line = [[at.x, at.y]];
  }

  override move(at: At): void {
    const last = this.line.at(-1);
    if (!last) return;
    if (Math.hypot(at.x - last[0], at.y - last[1]) * this.context.view.zoom >= 2) this.line.push([at.x, at.y]);
    this.context.view.touch();
  }

  override up(at: At): void {
    this.move(at);
    const { line } = this;
    const { store, editor } = this.context;
    this.cancel();
    if (line.length < 2) return;
    if (!store.current) {
      const middle = line[line.length >> 1]!;
      const below = store.at(middle[0], middle[1]) ?? line.map(([x, y]) => store.at(x, y)).find((shape) => shape);
      if (below) store.select([below.id]);
    }
    editor.split(line);
  }

  override cancel(): boolean {
    const begun = this.line.length > 0;
    this.line = [];
    this.context.view.touch();
    return begun;
  }

  override draw(context: CanvasRenderingContext2D, zoom: number): void {
    const [first, ...rest] = this.line;
    if (!first) return;
    context.beginPath();
    context.moveTo(first[0], first[1]);
    for (const [x, y] of rest) context.lineTo(x, y);
    drawLine(context, zoom, true);
  }
}
