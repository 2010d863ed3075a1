/**
 * The cached drawing of all objects that nobody works on, in screen resolution, somewhat larger than what is seen.
 *
 * Moving or zooming draws the cached pixels elsewhere; a sharp drawing is made beside it, a few milliseconds per frame,
 * and takes its place when complete. A changed object is drawn again within its rectangle alone, so that neither a frame
 * nor a click depends on the number of objects.
 */

import { around, overlap, type Rect } from "./rle";
import type { Shape } from "./store";

export interface Style {
  color: string;
  fill: number;
  line: number;
  dashed: boolean;
}

/** One shape in the layer, with its style. */
export interface Drawn {
  shape: Shape;
  style: Style;
}

/** Pixels that cover `rect` (in image pixels) with `scale` device pixels per image pixel. */
interface Sheet {
  canvas: HTMLCanvasElement;
  rect: Rect;
  scale: number;
}

const LARGEST_SIDE = 4096;
/** Changed rectangles above which everything is drawn again, a few milliseconds per frame. */
const MANY = 40;
/** Runs of the shapes in a rectangle above which it is not drawn at once. */
const MOST_RUNS = 20_000;
/** Shapes that are drawn between two looks at the clock. */
const BATCH = 6;

export class Layer {
  private front: Sheet | null = null;
  private back: { sheet: Sheet; items: Drawn[]; next: number } | null = null;

  /**
   * @param near Shapes that may touch a rectangle, in drawing order.
   * @param ratio Device pixels per CSS pixel.
   */
  constructor(
    private readonly near: (rect: Rect) => Drawn[],
    private readonly ratio: () => number,
  ) {}

  /** Forget everything: another image. */
  clear(): void {
    this.front = this.back = null;
  }

  /** Whether the front shows `visible` at `scale` sharply; with a `factor`, at most so much larger or smaller. */
  covers(visible: Rect, scale: number, factor = 1): boolean {
    const { front } = this;
    if (!front || !inside(visible, front.rect)) return false;
    return front.scale <= scale * factor && scale <= front.scale * factor;
  }

  /** Start a new drawing for a view, unless one for it is under way. */
  start(visible: Rect, bounds: Rect, scale: number): void {
    if (this.back && this.back.sheet.scale === scale && inside(visible, this.back.sheet.rect)) return;
    const marginX = visible.w / 4;
    const marginY = visible.h / 4;
    const x = Math.max(bounds.x, visible.x - marginX);
    const y = Math.max(bounds.y, visible.y - marginY);
    const w = Math.min(
      Math.max(LARGEST_SIDE / scale, visible.x + visible.w - x),
      Math.min(bounds.x + bounds.w, visible.x + visible.w + marginX) - x,
    );
    const h = Math.min(
      Math.max(LARGEST_SIDE / scale, visible.y + visible.h - y),
      Math.min(bounds.y + bounds.h, visible.y + visible.h + marginY) - y,
    );
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.ceil(w * scale));
    canvas.height = Math.max(1, Math.ceil(h * scale));
    const rect = { x, y, w: canvas.width / scale, h: canvas.height / scale };
    const sheet = { canvas, rect, scale };
    this.back = { sheet, items: this.near(rect), next: 0 };
  }

  /** Begin the drawing again with the same view: colours or many objects have changed. */
  restart(): void {
    const sheet = this.back?.sheet ?? this.front;
    if (!sheet) return;
    const canvas = document.createElement("canvas");
    canvas.width = sheet.canvas.width;
    canvas.height = sheet.canvas.height;
    this.back = { sheet: { ...sheet, canvas }, items: this.near(sheet.rect), next: 0 };
  }

  get working(): boolean {
    return this.back !== null;
  }

  /** Go on for some milliseconds; true if the new drawing is complete and shown from now on. */
  step(milliseconds: number): boolean {
    const { back } = this;
    if (!back) return false;
    const context = this.prepared(back.sheet);
    const until = performance.now() + milliseconds;
    while (back.next < back.items.length) {
      draw(context, back.items[back.next++]!, back.sheet.scale / this.ratio());
      const late = performance.now() > until;
      if (!late && back.next % BATCH && back.next < back.items.length) continue;
      // Drawing is only recorded until somebody reads: without this, the slices would be paid in one frame at the end.
      context.getImageData(0, 0, 1, 1);
      if (performance.now() > until && back.next < back.items.length) return false;
    }
    this.front = back.sheet;
    this.back = null;
    return true;
  }

  /**
   * Draw some rectangles of the front again. Where that would take long, everything is drawn anew over some frames, and
   * until then `added` lie above the old drawing.
   */
  patch(areas: readonly Rect[], added: readonly Drawn[]): void {
    const rect = areas.reduce(around, { x: 0, y: 0, w: 0, h: 0 });
    const cost = this.near(rect).reduce((sum, { shape }) => sum + (shape.complex ? 500 : shape.runs.ends.length), 0);
    const late = areas.length > MANY || cost > MOST_RUNS;
    if (this.back || late) this.restart();
    const { front } = this;
    if (!front) return;
    if (late) {
      const context = this.prepared(front);
      for (const item of added) draw(context, item, front.scale / this.ratio());
      return;
    }
    const context = this.prepared(front);
    const pad = 3 * this.ratio();
    const { scale } = front;
    for (const area of areas) {
      if (!area.w) continue;
      // Whole pixels of the sheet, because a soft edge of the clip would leave its trace.
      const x0 = Math.floor((area.x - front.rect.x) * scale - pad);
      const y0 = Math.floor((area.y - front.rect.y) * scale - pad);
      const x1 = Math.ceil((area.x + area.w - front.rect.x) * scale + pad);
      const y1 = Math.ceil((area.y + area.h - front.rect.y) * scale + pad);
      const rect = {
        x: x0 / scale + front.rect.x,
        y: y0 / scale + front.rect.y,
        w: (x1 - x0) / scale,
        h: (y1 - y0) / scale,
      };
      if (!overlap(rect, front.rect)) continue;
      context.save();
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.beginPath();
      context.rect(x0, y0, x1 - x0, y1 - y0);
      context.clip();
      context.clearRect(x0, y0, x1 - x0, y1 - y0);
      this.prepared(front);
      for (const item of this.near(rect)) draw(context, item, front.scale / this.ratio());
      context.restore();
    }
  }

  /** Put the pixels onto a canvas whose transformation maps image pixels to device pixels. */
  paint(context: CanvasRenderingContext2D): void {
    const { front } = this;
    if (front) context.drawImage(front.canvas, front.rect.x, front.rect.y, front.rect.w, front.rect.h);
  }

  private prepared(sheet: Sheet): CanvasRenderingContext2D {
    const context = sheet.canvas.getContext("2d", { willReadFrequently: true })!;
    const { scale, rect } = sheet;
    context.setTransform(scale, 0, 0, scale, -rect.x * scale, -rect.y * scale);
    return context;
  }
}

function inside(a: Rect, b: Rect): boolean {
  const slack = 1e-6;
  return a.x >= b.x - slack && a.y >= b.y - slack && a.x + a.w <= b.x + b.w + slack && a.y + a.h <= b.y + b.h + slack;
}

/** Draw one shape; `zoom` is CSS pixels per image pixel. */
export function draw(context: CanvasRenderingContext2D, { shape, style }: Drawn, zoom: number): void {
  if (shape.complex) {
    const { x, y, w, h } = shape.bounds;
    context.imageSmoothingEnabled = zoom < 2;
    context.drawImage(shape.sprite(style.color, style.fill), x, y, w, h);
    return;
  }
  const { path } = shape;
  context.fillStyle = context.strokeStyle = style.color;
  if (style.fill) {
    context.globalAlpha = style.fill;
    context.fill(path, "evenodd");
  }
  if (style.dashed) {
    // A dark line under the dashes, so that they are seen on objects of their own colour.
    context.globalAlpha = 0.5;
    context.lineWidth = (style.line + 1.2) / zoom;
    context.strokeStyle = "#000";
    context.stroke(path);
    context.strokeStyle = style.color;
  }
  context.globalAlpha = style.dashed ? 1 : 0.9;
  context.lineWidth = style.line / zoom;
  context.setLineDash(style.dashed ? [5 / zoom, 4 / zoom] : []);
  context.stroke(path);
  context.setLineDash([]);
  context.globalAlpha = 1;
}
