/**
 * The cached drawing of all objects that nobody works on, in screen resolution, somewhat larger than what is seen.
 *
 * Moving or zooming draws the cached pixels elsewhere; a sharp drawing is made beside it, a few milliseconds per frame,
 * and takes its place when complete. A changed object is drawn again within its rectangle alone, so that neither a frame
 * nor a click depends on the number of objects.
 */

import { overlap, type Rect } from "./rle";
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
const SLICE_MS = 6;

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

  /** Whether the front shows `visible` at `scale` sharply. */
  covers(visible: Rect, scale: number): boolean {
    return this.front !== null && this.front.scale === scale && inside(visible, this.front.rect);
  }

  /** Start a new drawing for a view, unless one for it is under way. */
  start(visible: Rect, bounds: Rect, scale: number): void {
    if (this.back && this.back.sheet.scale === scale && inside(visible, this.back.sheet.rect)) return;
    const marginX = visible.w / 4;
    const marginY = visible.h / 4;
    const x = Math.max(bounds.x, visible.x - marginX);
    const y = Math.max(bounds.y, visible.y - marginY);
    const w = Math.min(Math.max(LARGEST_SIDE / scale, visible.x + visible.w - x), Math.min(bounds.x + bounds.w, visible.x + visible.w + marginX) - x);
    const h = Math.min(Math.max(LARGEST_SIDE / scale, visible.y + visible.h - y), Math.min(bounds.y + bounds.h, visible.y + visible.h + marginY) - y);
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

  /** Go on for a few milliseconds; true if the new drawing is complete and shown from now on. */
  step(): boolean {
    const { back } = this;
    if (!back) return false;
    const context = this.prepared(back.sheet);
    const until = performance.now() + SLICE_MS;
    while (back.next < back.items.length) {
      const item = back.items[back.next++]!;
      draw(context, item, back.sheet.scale / this.ratio());
      if (performance.now() > until) return false;
    }
    this.front = back.sheet;
    this.back = null;
    return true;
  }

  /** Draw some rectangles of the front again. */
  patch(areas: readonly Rect[]): void {
    if (this.back) this.restart();
    const { front } = this;
    if (!front) return;
    const context = this.prepared(front);
    const pad = (3 * this.ratio()) / front.scale;
    for (const area of areas) {
      if (!area.w) continue;
      const rect = { x: area.x - pad, y: area.y - pad, w: area.w + 2 * pad, h: area.h + 2 * pad };
      if (!overlap(rect, front.rect)) continue;
      context.save();
      context.beginPath();
      context.rect(rect.x, rect.y, rect.w, rect.h);
      context.clip();
      context.clearRect(rect.x, rect.y, rect.w, rect.h);
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
    const context = sheet.canvas.getContext("2d")!;
    const { scale, rect } = sheet;
    context.setTransform(scale, 0, 0, scale, -rect.x * scale, -rect.y * scale);
    return context;
  }
}

function inside(a: Rect, b: Rect): boolean {
  const slack = 1e-6;
  return (
    a.x >= b.x - slack &&
    a.y >= b.y - slack &&
    a.x + a.w <= b.x + b.w + slack &&
    a.y + a.h <= b.y + b.h + slack
  );
}

/** Draw one shape; `zoom` is CSS pixels per image pixel. */
export function draw(context: CanvasRenderingContext2D, { shape, style }: Drawn, zoom: number): void {
  const { path } = shape;
  context.fillStyle = context.strokeStyle = style.color;
  if (style.fill) {
    context.globalAlpha = style.fill;
    context.fill(path, "evenodd");
  }
  context.globalAlpha = style.dashed ? 0.95 : 0.9;
  context.lineWidth = style.line / zoom;
  context.setLineDash(style.dashed ? [5 / zoom, 4 / zoom] : []);
  context.stroke(path);
  context.setLineDash([]);
  context.globalAlpha = 1;
}
