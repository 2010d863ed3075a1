import { stroke } from "../bitmap";
import type { Point } from "../types";
import { type At, Tool } from "./tool";

export class BrushTool extends Tool {
  readonly name: string = "brush";
  readonly label: string = "Brush";
  override readonly cursor = "none";
  protected readonly erases: boolean = false;
  private line: Point[] = [];
  private erase = false;
  private pointer: Point | null = null;

  hint(): string {
    return "Paint the selected object, or a new one · Alt or right button: erase · [ and ]: size";
  }

  override down(at: At): void {
    const { store, voice, options } = this.context;
    this.erase = this.erases !== (at.alt || options.background);
    if (this.erase && !store.current) {
      const below = store.at(at.x, at.y);
      if (!below) {
        voice.say("There is no object to erase from");
        return;
      }
      store.select([below.id]);
    }
    this.line = [[at.x, at.y]];
    this.move(at);
  }

  override move(at: At): void {
    const { view, options } = this.context;
    this.pointer = [at.x, at.y];
    const last = this.line.at(-1);
    if (last) {
      if (Math.hypot(at.x - last[0], at.y - last[1]) * view.zoom >= 1) this.line.push([at.x, at.y]);
      view.strokePreview = { line: this.line, radius: options.radius, erase: this.erase };
    }
    view.touch();
  }

  override up(at: At): void {
    if (!this.line.length) return;
    this.move(at);
    const { line, erase } = this;
    const { store, editor, options } = this.context;
    this.cancel();
    const region = stroke(store.width, store.height, line, options.radius);
    editor.region(region, erase ? "eraser" : "brush", erase ? "subtract" : "add");
  }

  override cancel(): boolean {
    const begun = this.line.length > 0;
    this.line = [];
    this.context.view.strokePreview = null;
    this.context.view.touch();
    return begun;
  }

  override hover(at: At | null): void {
    this.pointer = at ? [at.x, at.y] : null;
    this.context.view.touch();
  }

  override draw(context: CanvasRenderingContext2D, zoom: number): void {
    if (!this.pointer) return;
    const [x, y] = this.pointer;
    context.beginPath();
    context.arc(x, y, Math.max(this.context.options.radius, 1 / zoom), 0, 2 * Math.PI);
    context.lineWidth = 3 / zoom;
    context.strokeStyle = "rgb(0 0 0 / 0.6)";
    context.stroke();
    context.lineWidth = 1.25 / zoom;
    context.strokeStyle = "#fff";
    context.stroke();
  }
}

export class EraserTool extends BrushTool {
  override readonly name = "eraser";
  override readonly label = "Eraser";
  protected override readonly erases = true;

  override hint(): string {
    return "Erase from the selected object, or from the one you begin on · Alt or right button: paint · [ and ]: size";
  }
}
