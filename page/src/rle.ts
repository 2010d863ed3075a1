/**
 * COCO's run-length encoding, and questions that are answered from the runs alone.
 *
 * Runs go down the columns, the first run counts zeros. Inside the page a mask is kept as the positions at which runs
 * end: a point is looked up by bisection, and 500 masks of a large image take kilobytes instead of gigabytes.
 */

import type { Rle } from "./types";

/** A mask of an image of `width` x `height`; `ends[i]` is the position, in column order, after run i. */
export interface Runs {
  width: number;
  height: number;
  ends: Uint32Array;
}

/** A rectangle of whole pixels; empty if `w` or `h` is 0. */
export interface Rect {
  x: number;
  y: number;
  w: number;
  h: number;
}

/** Runs of a compressed RLE. Throws an Error if the string is damaged or does not fill the image. */
export function decode(rle: Rle): Runs {
  const [height, width] = rle.size;
  const { counts } = rle;
  const ends: number[] = [];
  const lengths: number[] = [];
  let position = 0;
  for (let i = 0; i < counts.length;) {
    let value = 0;
    let shift = 0;
    let code: number;
    do {
      code = counts.charCodeAt(i++) - 48;
      if (!(code >= 0 && code < 64) || shift > 30) throw new Error("damaged run-length encoding");
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16 && shift < 32) value |= -1 << shift;
    const n = lengths.length;
    if (n > 2) value += lengths[n - 2]!;
    if (value < 0) throw new Error("damaged run-length encoding");
    lengths.push(value);
    position += value;
    ends.push(position);
  }
  if (position > width * height) throw new Error("run-length encoding longer than the image");
  if (position < width * height) {
    if (ends.length % 2) ends[ends.length - 1] = width * height;
    else ends.push(width * height);
  }
  return { width, height, ends: Uint32Array.from(ends) };
}

/** Compressed RLE of runs. */
export function encode(runs: Runs): Rle {
  const { ends } = runs;
  const pieces: string[] = [];
  for (let i = 0; i < ends.length; i++) {
    let value = length(ends, i);
    if (i > 2) value -= length(ends, i - 2);
    for (;;) {
      let code = value & 31;
      value >>= 5;
      const more = code & 16 ? value !== -1 : value !== 0;
      if (more) code |= 32;
      pieces.push(String.fromCharCode(code + 48));
      if (!more) break;
    }
  }
  return { size: [runs.height, runs.width], counts: pieces.join("") };
}

function length(ends: Uint32Array, i: number): number {
  return ends[i]! - (i ? ends[i - 1]! : 0);
}

/** Collects stretches of ones in column order into runs; touching stretches become one. */
export class RunsBuilder {
  private ends: number[] = [];

  constructor(
    readonly width: number,
    readonly height: number,
  ) {}

  /** Ones from position `start` up to `end`; not before the end of the last stretch. */
  ones(start: number, end: number): void {
    if (start >= end) return;
    const { ends } = this;
    if (ends.length && ends[ends.length - 1] === start) ends[ends.length - 1] = end;
    else ends.push(start, end);
  }

  finish(): Runs {
    const { ends, width, height } = this;
    if (!ends.length || ends[ends.length - 1]! < width * height) ends.push(width * height);
    return { width, height, ends: Uint32Array.from(ends) };
  }
}

/** Number of pixels. */
export function area(runs: Runs): number {
  let sum = 0;
  for (let i = 1; i < runs.ends.length; i += 2) sum += length(runs.ends, i);
  return sum;
}

/** Smallest rectangle around the pixels; empty at 0, 0 for an empty mask. */
export function bounds(runs: Runs): Rect {
  const { ends, height } = runs;
  let x0 = Infinity;
  let x1 = -1;
  let y0 = height;
  let y1 = -1;
  for (let i = 1; i < ends.length; i += 2) {
    const start = ends[i - 1]!;
    const last = ends[i]! - 1;
    if (last < start) continue;
    const firstColumn = Math.floor(start / height);
    const lastColumn = Math.floor(last / height);
    x0 = Math.min(x0, firstColumn);
    x1 = Math.max(x1, lastColumn);
    if (firstColumn === lastColumn) {
      y0 = Math.min(y0, start - firstColumn * height);
      y1 = Math.max(y1, last - lastColumn * height);
    } else {
      y0 = 0;
      y1 = height - 1;
    }
  }
  return x1 < 0 ? { x: 0, y: 0, w: 0, h: 0 } : { x: x0, y: y0, w: x1 - x0 + 1, h: y1 - y0 + 1 };
}

/** Whether the pixel that contains the point belongs to the mask. */
export function contains(runs: Runs, x: number, y: number): boolean {
  const column = Math.floor(x);
  const row = Math.floor(y);
  const { ends, width, height } = runs;
  if (column < 0 || row < 0 || column >= width || row >= height) return false;
  const position = column * height + row;
  let low = 0;
  let high = ends.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle]! > position) high = middle;
    else low = middle + 1;
  }
  return low % 2 === 1;
}

export function overlap(a: Rect, b: Rect): boolean {
  return a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
}

/** Smallest rectangle around both; an empty one is ignored. */
export function around(a: Rect, b: Rect): Rect {
  if (!a.w || !a.h) return b;
  if (!b.w || !b.h) return a;
  const x = Math.min(a.x, b.x);
  const y = Math.min(a.y, b.y);
  return { x, y, w: Math.max(a.x + a.w, b.x + b.w) - x, h: Math.max(a.y + a.h, b.y + b.h) - y };
}
