/**
 * The objects and suggestions of the image that is shown, what is selected, and who wants to know of changes.
 * Nothing here costs more for 500 objects than for one, except looking through their rectangles.
 */

import { path } from "./contour";
import { type Bitmap, fromRuns, toRuns } from "./bitmap";
import { area, bounds, contains, decode, encode, type Rect, type Runs } from "./rle";
import { sprite } from "./sprite";
import type { How, ImageObjects, Made, ObjectData, Rle } from "./types";

/** Runs above which a mask is drawn as pixels: about twice as many corners take longer than a frame. */
const COMPLEX = 6000;

/** An object as the page holds it: what the server knows, and lazily what is needed for drawing and pointing. */
export class Shape {
  private runsMade?: Runs;
  private boundsMade?: Rect;
  private pathMade?: Path2D;
  private areaMade?: number;
  private spriteMade?: { key: string; canvas: HTMLCanvasElement };

  constructor(readonly data: ObjectData) {}

  static of(
    bitmap: Bitmap,
    rest: { id: string; label: number | null; made: Made[]; track?: number | undefined },
  ): Shape {
    const runs = toRuns(bitmap);
    const { track, ...needed } = rest;
    const shape = new Shape({ ...needed, ...(track === undefined ? {} : { track }), rle: encode(runs) });
    shape.runsMade = runs;
    return shape;
  }

  get id(): string {
    return this.data.id;
  }

  get label(): number | null {
    return this.data.label;
  }

  get runs(): Runs {
    return (this.runsMade ??= decodedOrEmpty(this.data.rle));
  }

  get bounds(): Rect {
    return (this.boundsMade ??= bounds(this.runs));
  }

  get area(): number {
    return (this.areaMade ??= area(this.runs));
  }

  get path(): Path2D {
    return (this.pathMade ??= path(this.bitmap()));
  }

  /** Whether the outline has so many corners that pixels are drawn instead. */
  get complex(): boolean {
    return this.runs.ends.length > COMPLEX;
  }

  /** The mask as pixels of a colour; the last one is kept. */
  sprite(color: string, fill: number): HTMLCanvasElement {
    const key = `${color} ${fill.toFixed(2)}`;
    if (this.spriteMade?.key !== key) this.spriteMade = { key, canvas: sprite(this.bitmap(), color, fill) };
    return this.spriteMade.canvas;
  }

  /** The mask as bits, to be changed; made anew at each call. */
  bitmap(): Bitmap {
    return fromRuns(this.runs, this.bounds);
  }

  contains(x: number, y: number): boolean {
    const { bounds: box } = this;
    return x >= box.x && y >= box.y && x < box.x + box.w && y < box.y + box.h && contains(this.runs, x, y);
  }

  /** The same mask with other data; what was computed is kept. */
  with(change: Partial<Omit<ObjectData, "rle">>): Shape {
    const shape = new Shape({ ...this.data, ...change });
    if (this.runsMade) shape.runsMade = this.runsMade;
    if (this.boundsMade) shape.boundsMade = this.boundsMade;
    if (this.pathMade) shape.pathMade = this.pathMade;
    if (this.spriteMade) shape.spriteMade = this.spriteMade;
    if (this.areaMade !== undefined) shape.areaMade = this.areaMade;
    return shape;
  }

  /** Whether mask and class are equal. */
  same(other: { label: number | null; rle: Rle }): boolean {
    return this.data.label === other.label && this.data.rle.counts === other.rle.counts;
  }
}

/** Id of a new object. `crypto.randomUUID` exists only where the address counts as safe, which a plain one in a network does not. */
export function newId(): string {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** `made` with one more action; a repeated one is counted. */
export function madeAlso(made: readonly Made[], by: string, how: How): Made[] {
  const last = made.at(-1);
  if (last && last.by === by && last.how === how) {
    return [...made.slice(0, -1), { ...last, clicks: last.clicks + 1 }];
  }
  return [...made, { by, how, clicks: 1 }];
}

export type Change =
  /** Another image, or everything read anew. */
  | { what: "all" }
  /** These objects or suggestions appeared, changed or went; `areas` are the rectangles to draw again. */
  | { what: "objects"; ids: string[]; areas: Rect[] }
  | { what: "selection"; areas: Rect[] }
  | { what: "done" };

export class Store {
  image = -1;
  width = 0;
  height = 0;
  version = 0;
  done = false;
  readonly objects = new Map<string, Shape>();
  readonly suggestions = new Map<string, Shape>();
  /** Selected objects, in the order of selection; the last is the one in work. */
  readonly selected = new Set<string>();

  private listeners: ((change: Change) => void)[] = [];

  listen(listener: (change: Change) => void): void {
    this.listeners.push(listener);
  }

  private tell(change: Change): void {
    for (const listener of this.listeners) listener(change);
  }

  /** Show an image that is not known yet. */
  clear(image: number): void {
    this.image = image;
    this.width = this.height = this.version = 0;
    this.done = false;
    this.objects.clear();
    this.suggestions.clear();
    this.selected.clear();
    this.tell({ what: "all" });
  }

  /** Take the server's state of the image. */
  load(data: ImageObjects): void {
    this.image = data.id;
    [this.height, this.width] = data.size;
    this.version = data.version;
    this.done = data.done;
    const before = new Map([...this.objects, ...this.suggestions]);
    this.objects.clear();
    this.suggestions.clear();
    const kept = (object: ObjectData): Shape => {
      const old = before.get(object.id);
      return old && old.same(object) ? old.with(object) : new Shape(object);
    };
    for (const object of data.objects) this.objects.set(object.id, kept(object));
    for (const object of data.suggestions) {
      if (!this.objects.has(object.id)) this.suggestions.set(object.id, kept(object));
    }
    for (const id of this.selected) if (!this.has(id)) this.selected.delete(id);
    this.tell({ what: "all" });
  }

  has(id: string): boolean {
    return this.objects.has(id) || this.suggestions.has(id);
  }

  get(id: string): Shape | undefined {
    return this.objects.get(id) ?? this.suggestions.get(id);
  }

  /** The object or suggestion in work: the one selected last. */
  get current(): Shape | undefined {
    const id = [...this.selected].at(-1);
    return id === undefined ? undefined : this.get(id);
  }

  /** What is drawn live above the cached layer: the selection, or of a large one the last. */
  get live(): string[] {
    const ids = [...this.selected];
    return ids.length > 4 ? ids.slice(-1) : ids;
  }

  /** Set (or with null remove) objects. */
  put(changes: Iterable<readonly [string, Shape | null]>): void {
    const ids: string[] = [];
    const areas: Rect[] = [];
    for (const [id, shape] of changes) {
      ids.push(id);
      const before = this.objects.get(id);
      if (before) areas.push(before.bounds);
      if (shape) {
        const suggestion = this.suggestions.get(id);
        if (suggestion) {
          areas.push(suggestion.bounds);
          this.suggestions.delete(id);
        }
        this.objects.set(id, shape);
        areas.push(shape.bounds);
      } else {
        this.objects.delete(id);
        this.selected.delete(id);
      }
    }
    if (ids.length) this.tell({ what: "objects", ids, areas });
  }

  /** Remember a revision; nothing is drawn. */
  revise(id: string, revision: number): void {
    const shape = this.objects.get(id);
    if (shape) this.objects.set(id, shape.with({ revision }));
  }

  putSuggestions(changes: Iterable<readonly [string, Shape | null]>): void {
    const ids: string[] = [];
    const areas: Rect[] = [];
    for (const [id, shape] of changes) {
      ids.push(id);
      const before = this.suggestions.get(id);
      if (before) areas.push(before.bounds);
      if (shape && !this.objects.has(id)) {
        this.suggestions.set(id, shape);
        areas.push(shape.bounds);
      } else {
        this.suggestions.delete(id);
        if (!this.objects.has(id)) this.selected.delete(id);
      }
    }
    if (ids.length) this.tell({ what: "objects", ids, areas });
  }

  /** Take the complete list of suggestions. */
  replaceSuggestions(objects: readonly ObjectData[]): void {
    const changes = new Map<string, Shape | null>();
    for (const id of this.suggestions.keys()) changes.set(id, null);
    for (const object of objects) if (!this.objects.has(object.id)) changes.set(object.id, new Shape(object));
    this.putSuggestions(changes);
  }

  setDone(done: boolean): void {
    if (done === this.done) return;
    this.done = done;
    this.tell({ what: "done" });
  }

  select(ids: Iterable<string>): void {
    const before = [...this.selected];
    this.selected.clear();
    for (const id of ids) if (this.has(id)) this.selected.add(id);
    const areas = [...new Set([...before, ...this.selected])]
      .map((id) => this.get(id)?.bounds)
      .filter((rect): rect is Rect => rect !== undefined);
    if (areas.length) this.tell({ what: "selection", areas });
  }

  /** The smallest object, or else the smallest suggestion, at a point. */
  at(x: number, y: number): Shape | undefined {
    return smallest(this.objects, x, y) ?? smallest(this.suggestions, x, y);
  }
}

/** A damaged mask is shown as an empty one, so that the others can be worked on. */
function decodedOrEmpty(rle: Rle): Runs {
  try {
    return decode(rle);
  } catch {
    const [height, width] = rle.size;
    return { width, height, ends: Uint32Array.of(width * height) };
  }
}

function smallest(shapes: ReadonlyMap<string, Shape>, x: number, y: number): Shape | undefined {
  let best: Shape | undefined;
  for (const shape of shapes.values()) {
    if (shape.contains(x, y) && (!best || shape.area < best.area)) best = shape;
  }
  return best;
}
