/** Zoom, pan and drawing. Two canvases: the image with the cached layer below, what is in work above. */

import { Layer, draw, type Drawn, type Style } from "./layer";
import { overlap, type Rect } from "./rle";
import type { Shape, Store } from "./store";
import type { Point } from "./types";

const LARGEST_ZOOM = 64;
/** Milliseconds without zooming after which the layer is drawn sharply. */
const REST_MS = 90;
/** Milliseconds of a frame for the sharp drawing of the layer. */
const SLICE_MS = 8;
const SLICE_MOVING_MS = 3;

/** What a tool or the hovering adds above the objects. */
export interface Extra {
  /** `zoom` is CSS pixels per image pixel; the context is in image pixels. */
  draw(context: CanvasRenderingContext2D, zoom: number): void;
}

/** A brush stroke on its way: shown without changing the bitmap. */
export interface StrokePreview {
  line: Point[];
  radius: number;
  erase: boolean;
}

export class View {
  zoom = 1;
  /** Masks are drawn at all. */
  visible = true;
  opacity = 0.4;
  extras: Extra[] = [];
  strokePreview: StrokePreview | null = null;
  /** Colour of a shape, as CSS. */
  colorOf: (shape: Shape) => string = () => "#e69f00";
  onView: () => void = () => {};
  /** Called after what is in work was drawn. */
  onDrawn: () => void = () => {};

  private offsetX = 0;
  private offsetY = 0;
  private pixels: ImageBitmap | null = null;
  private readonly base: CanvasRenderingContext2D;
  private readonly top: CanvasRenderingContext2D;
  private readonly scratch = document.createElement("canvas");
  private readonly layer: Layer;
  private frame = 0;
  /** What of the lower canvas is to be drawn again: image rectangles, or everything. */
  private stale: Rect[] | "all" = "all";
  private topStale = true;
  private movedAt = 0;
  /** When the drawing of this frame began. */
  began = 0;
  private ratio = 1;
  private liveBefore = new Set<string>();

  constructor(
    private readonly host: HTMLElement,
    baseCanvas: HTMLCanvasElement,
    topCanvas: HTMLCanvasElement,
    private readonly store: Store,
  ) {
    this.base = baseCanvas.getContext("2d", { alpha: false })!;
    this.top = topCanvas.getContext("2d")!;
    this.layer = new Layer(
      (rect) => this.near(rect),
      () => this.ratio,
    );
    new ResizeObserver(() => this.resize()).observe(host);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    store.listen((change) => {
      if (change.what === "all") this.redraw();
      else if (change.what === "objects") this.patch(change.areas);
      else if (change.what === "selection") this.patch(change.areas);
    });
    this.resize();
  }

  // --- coordinates -------------------------------------------------------------------------------------------------

  /** Image pixels of a place in the window. */
  toImage(clientX: number, clientY: number): Point {
    const box = this.host.getBoundingClientRect();
    return [(clientX - box.left - this.offsetX) / this.zoom, (clientY - box.top - this.offsetY) / this.zoom];
  }

  /** Place in the window of image pixels. */
  toClient(x: number, y: number): Point {
    const box = this.host.getBoundingClientRect();
    return [box.left + x * this.zoom + this.offsetX, box.top + y * this.zoom + this.offsetY];
  }

  /** The rectangle of the image that is seen. */
  get seen(): Rect {
    const { width, height } = this.store;
    const x = Math.max(0, -this.offsetX / this.zoom);
    const y = Math.max(0, -this.offsetY / this.zoom);
    return {
      x,
      y,
      w: Math.max(0, Math.min(width, (this.host.clientWidth - this.offsetX) / this.zoom) - x),
      h: Math.max(0, Math.min(height, (this.host.clientHeight - this.offsetY) / this.zoom) - y),
    };
  }

  fit(): void {
    const { width, height } = this.store;
    if (!width || !height) return;
    this.zoom = this.fitting();
    this.offsetX = (this.host.clientWidth - width * this.zoom) / 2;
    this.offsetY = (this.host.clientHeight - height * this.zoom) / 2;
    this.moved();
  }

  private fitting(): number {
    const { width, height } = this.store;
    const margin = 16;
    const { clientWidth, clientHeight } = this.host;
    return Math.max(0.01, Math.min(16, (clientWidth - margin) / width, (clientHeight - margin) / height));
  }

  /** Zoom so that the image point under a place in the window stays there. */
  zoomAt(factor: number, clientX?: number, clientY?: number): void {
    const box = this.host.getBoundingClientRect();
    const px = clientX === undefined ? box.width / 2 : clientX - box.left;
    const py = clientY === undefined ? box.height / 2 : clientY - box.top;
    const zoom = Math.min(LARGEST_ZOOM, Math.max(Math.min(1, this.fitting()) / 4, this.zoom * factor));
    this.offsetX = px - ((px - this.offsetX) / this.zoom) * zoom;
    this.offsetY = py - ((py - this.offsetY) / this.zoom) * zoom;
    this.zoom = zoom;
    this.moved();
  }

  pan(dx: number, dy: number): void {
    this.offsetX += dx;
    this.offsetY += dy;
    this.moved();
  }

  /** Move so that a rectangle is seen, and zoom out if it is larger than the window. */
  reveal(rect: Rect): void {
    const { seen } = this;
    const fits =
      rect.x >= seen.x && rect.y >= seen.y && rect.x + rect.w <= seen.x + seen.w && rect.y + rect.h <= seen.y + seen.h;
    if (fits || !rect.w) return;
    const { clientWidth, clientHeight } = this.host;
    this.zoom = Math.min(this.zoom, (0.8 * clientWidth) / rect.w, (0.8 * clientHeight) / rect.h);
    this.offsetX = clientWidth / 2 - (rect.x + rect.w / 2) * this.zoom;
    this.offsetY = clientHeight / 2 - (rect.y + rect.h / 2) * this.zoom;
    this.moved();
  }

  private moved(): void {
    // At least 40 CSS pixels of the image stay in the window.
    const keep = 40;
    const { width, height } = this.store;
    const { clientWidth, clientHeight } = this.host;
    this.offsetX = Math.min(clientWidth - keep, Math.max(keep - width * this.zoom, this.offsetX));
    this.offsetY = Math.min(clientHeight - keep, Math.max(keep - height * this.zoom, this.offsetY));
    this.movedAt = performance.now();
    this.stale = "all";
    this.topStale = true;
    // Where the image is, for tests and other tools that look at the page.
    Object.assign(this.host.dataset, { zoom: this.zoom, left: this.offsetX, top: this.offsetY });
    this.request();
    this.onView();
  }

  // --- what is drawn -----------------------------------------------------------------------------------------------

  /** The image's pixels, of any resolution; null while they are loaded. */
  show(pixels: ImageBitmap | null): void {
    this.pixels = pixels;
    this.stale = "all";
    this.request();
  }

  /** Device pixels per image pixel: which resolution of the image is worth loading. */
  get density(): number {
    return this.zoom * this.ratio;
  }

  /** Another image, other colours, another opacity: draw everything again. */
  redraw(clear = false): void {
    if (clear) this.layer.clear();
    else this.layer.restart();
    this.liveBefore = new Set(this.store.live);
    this.stale = "all";
    this.topStale = true;
    this.request();
  }

  /** Draw what is in work again. */
  touch(): void {
    this.topStale = true;
    this.request();
  }

  private patch(areas: Rect[]): void {
    const live = new Set(this.store.live);
    const moved = [...live, ...this.liveBefore].filter((id) => live.has(id) !== this.liveBefore.has(id));
    this.liveBefore = live;
    const also = moved.map((id) => this.store.get(id)?.bounds).filter((rect): rect is Rect => rect !== undefined);
    const dirty = [...areas, ...also];
    const added = moved.filter((id) => !live.has(id)).flatMap((id) => this.drawn(id));
    this.layer.patch(dirty, added);
    if (this.stale !== "all") this.stale.push(...dirty);
    this.topStale = true;
    this.request();
  }

  private near(rect: Rect): Drawn[] {
    const { store } = this;
    const live = new Set(store.live);
    const shapes = (from: ReadonlyMap<string, Shape>): Shape[] =>
      [...from.values()]
        .filter((shape) => !live.has(shape.id) && overlap(shape.bounds, rect))
        .sort((a, b) => b.area - a.area);
    return [
      ...shapes(store.objects).map((shape) => ({ shape, style: this.style(shape, false) })),
      ...shapes(store.suggestions).map((shape) => ({ shape, style: this.style(shape, true) })),
    ];
  }

  private drawn(id: string): Drawn[] {
    const shape = this.store.get(id);
    return shape ? [{ shape, style: this.style(shape, this.store.suggestions.has(id)) }] : [];
  }

  private style(shape: Shape, suggestion: boolean): Style {
    const chosen = this.store.selected.has(shape.id);
    return {
      color: this.colorOf(shape),
      fill: (suggestion || shape.data.box_only ? 0.3 : 1) * this.opacity * (chosen ? 1.4 : 1),
      line: chosen ? 2.5 : 1.5,
      dashed: suggestion,
    };
  }

  private resize(): void {
    const { clientWidth, clientHeight } = this.host;
    this.ratio = Math.min(3, devicePixelRatio || 1);
    for (const { canvas } of [this.base, this.top]) {
      canvas.width = Math.max(1, Math.round(clientWidth * this.ratio));
      canvas.height = Math.max(1, Math.round(clientHeight * this.ratio));
    }
    this.moved();
  }

  private request(): void {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.render();
    });
  }

  private render(): void {
    this.began = performance.now();
    const moving = this.began - this.movedAt < REST_MS;
    if (this.layer.step(moving ? SLICE_MOVING_MS : SLICE_MS)) this.stale = "all";
    if (this.stale.length) this.renderBase(this.stale);
    if (this.topStale) this.renderTop();
    if (this.store.width && this.visible) {
      const { seen } = this;
      if (seen.w && seen.h && !this.layer.covers(seen, this.density)) {
        // While zooming, pixels of another size do; drawing them anew in every frame would cost the sixty per second.
        if (!moving || !(this.layer.working || this.layer.covers(seen, this.density, 2))) {
          const whole = { x: 0, y: 0, w: this.store.width, h: this.store.height };
          this.layer.start(seen, whole, this.density);
        }
        this.request();
      } else if (this.layer.working) this.request();
    }
  }

  private place(context: CanvasRenderingContext2D): void {
    const scale = this.density;
    context.setTransform(scale, 0, 0, scale, this.offsetX * this.ratio, this.offsetY * this.ratio);
  }

  private renderBase(stale: Rect[] | "all"): void {
    this.stale = [];
    const context = this.base;
    const { width, height } = this.store;
    context.save();
    if (stale !== "all") {
      // A click changes little: only that is drawn, and the rest keeps its pixels.
      // Whole device pixels, because a soft edge of the clip would leave its trace.
      const [scale, pad] = [this.density, 4 * this.ratio];
      const [left, top] = [this.offsetX * this.ratio, this.offsetY * this.ratio];
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.beginPath();
      for (const { x, y, w, h } of stale) {
        if (!w) continue;
        const [x0, y0] = [Math.floor(x * scale + left - pad), Math.floor(y * scale + top - pad)];
        context.rect(x0, y0, Math.ceil((x + w) * scale + left + pad) - x0, Math.ceil((y + h) * scale + top + pad) - y0);
      }
      context.clip();
    }
    this.renderPixels(context, width, height);
    context.restore();
  }

  private renderPixels(context: CanvasRenderingContext2D, width: number, height: number): void {
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = getComputedStyle(this.host).backgroundColor;
    context.fillRect(0, 0, context.canvas.width, context.canvas.height);
    if (!width) return;
    this.place(context);
    if (this.pixels) {
      context.imageSmoothingEnabled = this.density * (width / this.pixels.width) < 3;
      const { seen } = this;
      const perX = this.pixels.width / width;
      const perY = this.pixels.height / height;
      if (seen.w && seen.h) {
        // Whole pixels of the image, so that its borders do not shimmer while panning.
        const x0 = Math.floor(seen.x * perX);
        const y0 = Math.floor(seen.y * perY);
        const x1 = Math.min(this.pixels.width, Math.ceil((seen.x + seen.w) * perX));
        const y1 = Math.min(this.pixels.height, Math.ceil((seen.y + seen.h) * perY));
        context.drawImage(
          this.pixels,
          x0,
          y0,
          x1 - x0,
          y1 - y0,
          x0 / perX,
          y0 / perY,
          (x1 - x0) / perX,
          (y1 - y0) / perY,
        );
      }
    }
    if (this.visible) {
      context.imageSmoothingEnabled = true;
      this.layer.paint(context);
    }
  }

  private renderTop(): void {
    this.topStale = false;
    const context = this.top;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    if (!this.store.width) return;
    this.place(context);
    if (this.visible) {
      for (const id of this.store.live) {
        const shape = this.store.get(id);
        if (!shape) continue;
        if (this.strokePreview && shape === this.store.current) continue;
        this.drawLive(context, shape, this.store.suggestions.has(id));
      }
    }
    if (this.strokePreview) this.drawStroke(context, this.strokePreview);
    for (const extra of this.extras) {
      context.save();
      extra.draw(context, this.zoom);
      context.restore();
    }
    this.onDrawn();
  }

  private drawLive(context: CanvasRenderingContext2D, shape: Shape, suggestion: boolean): void {
    if (!shape.complex) {
      // A light and a dark line together are seen on every image.
      context.lineWidth = 4 / this.zoom;
      context.strokeStyle = "rgb(255 255 255 / 0.85)";
      context.stroke(shape.path);
    }
    const style = { color: this.colorOf(shape), fill: this.opacity * 1.1, line: 2, dashed: suggestion };
    draw(context, { shape, style }, this.zoom);
  }

  /** The mask with the stroke, painted solid beside the picture and put onto it translucent: no double darkness. */
  private drawStroke(context: CanvasRenderingContext2D, { line, radius, erase }: StrokePreview): void {
    const { scratch } = this;
    if (scratch.width !== context.canvas.width || scratch.height !== context.canvas.height) {
      scratch.width = context.canvas.width;
      scratch.height = context.canvas.height;
    }
    const paint = scratch.getContext("2d")!;
    paint.setTransform(1, 0, 0, 1, 0, 0);
    paint.globalCompositeOperation = "source-over";
    paint.clearRect(0, 0, scratch.width, scratch.height);
    this.place(paint);
    const shape = this.store.current;
    const color = shape ? this.colorOf(shape) : "#ffffff";
    paint.fillStyle = paint.strokeStyle = color;
    if (shape?.complex) paint.drawImage(shape.sprite(color, 1), shape.bounds.x, shape.bounds.y);
    else if (shape) paint.fill(shape.path, "evenodd");
    paint.globalCompositeOperation = erase ? "destination-out" : "source-over";
    paint.lineCap = paint.lineJoin = "round";
    paint.lineWidth = 2 * radius;
    paint.beginPath();
    const [first, ...rest] = line;
    if (first) paint.moveTo(first[0], first[1]);
    for (const [x, y] of rest) paint.lineTo(x, y);
    if (first && !rest.length) paint.lineTo(first[0], first[1] + 1e-3);
    paint.stroke();
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.globalAlpha = Math.min(1, this.opacity * 1.4);
    context.drawImage(scratch, 0, 0);
    context.restore();
  }
}

/** A mask above everything, outlined by dashes. */
export function outline(shape: Shape, color: string, fill = 0.25, line = "#fff"): Extra {
  return {
    draw(context, zoom) {
      if (shape.complex) {
        draw(context, { shape, style: { color, fill, line: 2, dashed: true } }, zoom);
        return;
      }
      const { path } = shape;
      context.fillStyle = color;
      context.globalAlpha = fill;
      context.fill(path, "evenodd");
      context.globalAlpha = 1;
      context.lineWidth = 3.5 / zoom;
      context.strokeStyle = "rgb(0 0 0 / 0.55)";
      context.stroke(path);
      context.lineWidth = 1.75 / zoom;
      context.strokeStyle = line;
      context.setLineDash([6 / zoom, 4 / zoom]);
      context.stroke(path);
    },
  };
}
