/**
 * Masks as bits, for changing them. A bitmap covers only the rectangle around its object, so that a change costs the
 * size of the object, not of the image.
 */

import { RunsBuilder, around, bounds, type Rect, type Runs } from "./rle";
import type { Point } from "./types";

/** Bits (0 or 1), in row order, of the rectangle x, y, w, h of an image of `width` x `height`. */
export interface Bitmap extends Rect {
  width: number;
  height: number;
  bits: Uint8Array;
}

export function empty(width: number, height: number, rect: Rect = { x: 0, y: 0, w: 0, h: 0 }): Bitmap {
  return { ...rect, width, height, bits: new Uint8Array(rect.w * rect.h) };
}

export function fromRuns(runs: Runs, rect: Rect = bounds(runs)): Bitmap {
  const bitmap = empty(runs.width, runs.height, rect);
  const { bits, x, y, w, h } = bitmap;
  const { ends, height } = runs;
  for (let i = 1; i < ends.length; i += 2) {
    const end = ends[i]!;
    for (let start = ends[i - 1]!; start < end;) {
      const column = Math.floor(start / height);
      const stop = Math.min(end, (column + 1) * height);
      if (column >= x && column < x + w) {
        const first = Math.max(start - column * height, y);
        const last = Math.min(stop - column * height, y + h);
        for (let row = first, at = (first - y) * w + column - x; row < last; row++, at += w) bits[at] = 1;
      }
      start = stop;
    }
  }
  return bitmap;
}

export function toRuns(bitmap: Bitmap): Runs {
  const { bits, x, y, w, h, width, height } = bitmap;
  const builder = new RunsBuilder(width, height);
  for (let column = 0; column < w; column++) {
    const base = (x + column) * height + y;
    let start = -1;
    for (let row = 0, at = column; row < h; row++, at += w) {
      if (bits[at]) {
        if (start < 0) start = row;
      } else if (start >= 0) {
        builder.ones(base + start, base + row);
        start = -1;
      }
    }
    if (start >= 0) builder.ones(base + start, base + h);
  }
  return builder.finish();
}

/** A copy that covers `rect` (cut at the image's borders); bits outside are lost. */
export function crop(bitmap: Bitmap, rect: Rect): Bitmap {
  const x0 = Math.max(0, rect.x);
  const y0 = Math.max(0, rect.y);
  const w = Math.max(0, Math.min(bitmap.width, rect.x + rect.w) - x0);
  const h = Math.max(0, Math.min(bitmap.height, rect.y + rect.h) - y0);
  const result = empty(bitmap.width, bitmap.height, { x: x0, y: y0, w, h });
  const first = Math.max(x0, bitmap.x);
  const last = Math.min(x0 + w, bitmap.x + bitmap.w);
  if (first >= last) return result;
  for (let row = Math.max(y0, bitmap.y); row < Math.min(y0 + h, bitmap.y + bitmap.h); row++) {
    const from = (row - bitmap.y) * bitmap.w - bitmap.x;
    result.bits.set(bitmap.bits.subarray(from + first, from + last), (row - y0) * w + first - x0);
  }
  return result;
}

export function union(a: Bitmap, b: Bitmap): Bitmap {
  const result = crop(a, around(a, b));
  each(result, b, (at) => {
    result.bits[at] = 1;
  });
  return result;
}

/** Pixels of `a` that are not in `b`. */
export function subtract(a: Bitmap, b: Bitmap): Bitmap {
  const result: Bitmap = { ...a, bits: a.bits.slice() };
  each(result, b, (at) => {
    result.bits[at] = 0;
  });
  return result;
}

/** Calls `visit` with the index in `inside` of every pixel of `other` that lies in its rectangle. */
function each(inside: Bitmap, other: Bitmap, visit: (at: number) => void): void {
  const first = Math.max(inside.x, other.x);
  const last = Math.min(inside.x + inside.w, other.x + other.w);
  const bottom = Math.min(inside.y + inside.h, other.y + other.h);
  for (let row = Math.max(inside.y, other.y); row < bottom; row++) {
    const from = (row - other.y) * other.w - other.x;
    const to = (row - inside.y) * inside.w - inside.x;
    for (let column = first; column < last; column++) if (other.bits[from + column]) visit(to + column);
  }
}

export function isEmpty(bitmap: Bitmap): boolean {
  return !bitmap.bits.includes(1);
}

export function has(bitmap: Bitmap, x: number, y: number): boolean {
  const column = Math.floor(x) - bitmap.x;
  const row = Math.floor(y) - bitmap.y;
  return column >= 0 && row >= 0 && column < bitmap.w && row < bitmap.h && bitmap.bits[row * bitmap.w + column] === 1;
}

/**
 * Parts that are connected by sides or corners: an index per pixel of the rectangle (-1 outside) and the areas. Works on
 * the runs of rows, which are few: each joins those that it touches in the row above.
 */
function labelled(bitmap: Bitmap): { part: Int32Array; areas: number[] } {
  const { bits, w, h } = bitmap;
  const starts: number[] = []; // positions in `bits`, and one after the last
  const ends: number[] = [];
  const parent: number[] = [];
  const root = (run: number): number => {
    while (parent[run] !== run) run = parent[run] = parent[parent[run]!]!;
    return run;
  };
  let above = 0; // first run of the row above, and of this row
  let first = 0;
  for (let row = 0; row < h; row++) {
    const line = row * w;
    let candidate = above;
    for (let at = bits.indexOf(1, line); at >= 0 && at < line + w;) {
      let end = bits.indexOf(0, at);
      if (end < 0 || end > line + w) end = line + w;
      const run = starts.length;
      starts.push(at);
      ends.push(end);
      parent.push(run);
      // Runs above that end before this one begins touch no later one either, except by a corner.
      while (candidate < first && ends[candidate]! + w < at) candidate++;
      for (let other = candidate; other < first && starts[other]! + w <= end; other++) {
        const [a, b] = [root(run), root(other)];
        if (a < b) parent[b] = a;
        else parent[a] = b;
      }
      at = bits.indexOf(1, end);
    }
    above = first;
    first = starts.length;
  }
  const part = new Int32Array(bits.length).fill(-1);
  const areas: number[] = [];
  const index = new Map<number, number>();
  for (let run = 0; run < starts.length; run++) {
    const top = root(run);
    let number = index.get(top);
    if (number === undefined) {
      index.set(top, (number = areas.length));
      areas.push(0);
    }
    areas[number]! += ends[run]! - starts[run]!;
    part.fill(number, starts[run]!, ends[run]!);
  }
  return { part, areas };
}

/** The connected part (by sides or corners) that contains the point; empty if none does. */
export function partAt(bitmap: Bitmap, x: number, y: number): Bitmap {
  const result: Bitmap = { ...bitmap, bits: new Uint8Array(bitmap.bits.length) };
  if (!has(bitmap, x, y)) return result;
  const { part } = labelled(bitmap);
  const wanted = part[(Math.floor(y) - bitmap.y) * bitmap.w + Math.floor(x) - bitmap.x];
  for (let at = 0; at < part.length; at++) if (part[at] === wanted) result.bits[at] = 1;
  return result;
}

/** Connected parts, the largest first. */
export function parts(bitmap: Bitmap): Bitmap[] {
  const { part, areas } = labelled(bitmap);
  return separated(bitmap, part, areas);
}

function separated(bitmap: Bitmap, part: Int32Array, areas: number[]): Bitmap[] {
  const { w } = bitmap;
  const boxes = areas.map(() => ({ x0: Infinity, y0: Infinity, x1: -1, y1: -1 }));
  for (let row = 0, at = 0; row < bitmap.h; row++) {
    for (let column = 0; column < w; column++, at++) {
      const number = part[at]!;
      if (number < 0) continue;
      const box = boxes[number]!;
      if (column < box.x0) box.x0 = column;
      if (column > box.x1) box.x1 = column;
      if (row < box.y0) box.y0 = row;
      box.y1 = row;
    }
  }
  const results = boxes.map(({ x0, y0, x1, y1 }) =>
    empty(bitmap.width, bitmap.height, { x: bitmap.x + x0, y: bitmap.y + y0, w: x1 - x0 + 1, h: y1 - y0 + 1 }),
  );
  for (let row = 0, at = 0; row < bitmap.h; row++) {
    for (let column = 0; column < w; column++, at++) {
      const number = part[at]!;
      if (number < 0) continue;
      const result = results[number]!;
      result.bits[(bitmap.y + row - result.y) * result.w + bitmap.x + column - result.x] = 1;
    }
  }
  return areas
    .map((size, index) => ({ size, result: results[index]! }))
    .sort((a, b) => b.size - a.size)
    .map(({ result }) => result);
}

/**
 * Parts after a cut along `line`, the largest first; no pixel is lost: those under the line go to the part that reaches
 * them first. One part if the line does not separate the mask.
 */
export function cut(bitmap: Bitmap, line: readonly Point[]): Bitmap[] {
  const knife = stroke(bitmap.width, bitmap.height, line, 0.75);
  const rest = subtract(bitmap, knife);
  const { part, areas } = labelled(rest);
  if (areas.length < 2) return [bitmap];
  const { w, h } = bitmap;
  let front: number[] = [];
  for (let at = 0; at < part.length; at++) if (part[at]! >= 0) front.push(at);
  while (front.length) {
    const next: number[] = [];
    for (const at of front) {
      const column = at % w;
      const row = (at - column) / w;
      for (let r = Math.max(0, row - 1); r <= Math.min(h - 1, row + 1); r++) {
        for (let c = Math.max(0, column - 1); c <= Math.min(w - 1, column + 1); c++) {
          const to = r * w + c;
          if (bitmap.bits[to] && part[to]! < 0) {
            part[to] = part[at]!;
            areas[part[at]!]!++;
            next.push(to);
          }
        }
      }
    }
    front = next;
  }
  // Specks that lie under the line as a whole stay with the largest part.
  const largest = areas.indexOf(Math.max(...areas));
  for (let at = 0; at < part.length; at++) if (bitmap.bits[at] && part[at]! < 0) part[at] = largest;
  return separated(bitmap, part, areas);
}

/** Pixels whose centre lies within `radius` of the line; at least the pixel under every point. */
export function stroke(width: number, height: number, line: readonly Point[], radius: number): Bitmap {
  let x0 = Infinity;
  let y0 = Infinity;
  let x1 = -Infinity;
  let y1 = -Infinity;
  for (const [x, y] of line) {
    x0 = Math.min(x0, x);
    y0 = Math.min(y0, y);
    x1 = Math.max(x1, x);
    y1 = Math.max(y1, y);
  }
  const rect = clipped(x0 - radius, y0 - radius, x1 + radius, y1 + radius, width, height);
  const bitmap = empty(width, height, rect);
  const { bits, x, y, w } = bitmap;
  line.forEach(([px, py], i) => {
    const [qx, qy] = line[i + 1] ?? [px, py];
    const top = Math.max(y, Math.floor(Math.min(py, qy) - radius));
    const bottom = Math.min(y + bitmap.h - 1, Math.floor(Math.max(py, qy) + radius));
    for (let row = top; row <= bottom; row++) {
      const [from, to] = capsuleRow(px, py, qx, qy, radius, row + 0.5);
      const first = Math.max(0, Math.ceil(from - 0.5) - x);
      const last = Math.min(w - 1, Math.floor(to - 0.5) - x);
      if (first <= last) bits.fill(1, (row - y) * w + first, (row - y) * w + last + 1);
    }
    const column = Math.floor(px) - x;
    const row = Math.floor(py) - y;
    if (column >= 0 && row >= 0 && column < w && row < bitmap.h) bits[row * w + column] = 1;
  });
  return bitmap;
}

/** The interval of x at height `y` within `r` of the segment from p to q; from > to if there is none. */
function capsuleRow(px: number, py: number, qx: number, qy: number, r: number, y: number): [number, number] {
  let from = Infinity;
  let to = -Infinity;
  for (const [cx, cy] of [
    [px, py],
    [qx, qy],
  ] as const) {
    const reach = r * r - (y - cy) ** 2;
    if (reach < 0) continue;
    from = Math.min(from, cx - Math.sqrt(reach));
    to = Math.max(to, cx + Math.sqrt(reach));
  }
  const dx = qx - px;
  const dy = qy - py;
  const size = Math.hypot(dx, dy);
  if (!size) return [from, to];
  const nx = (-dy / size) * r;
  const ny = (dx / size) * r;
  const corners: Point[] = [
    [px + nx, py + ny],
    [qx + nx, qy + ny],
    [qx - nx, qy - ny],
    [px - nx, py - ny],
  ];
  corners.forEach(([ax, ay], i) => {
    const [bx, by] = corners[(i + 1) % 4]!;
    if (ay === by || y < Math.min(ay, by) || y > Math.max(ay, by)) return;
    const at = ax + ((y - ay) / (by - ay)) * (bx - ax);
    from = Math.min(from, at);
    to = Math.max(to, at);
  });
  return [from, to];
}

/** Pixels whose centre lies inside the closed polygon (even-odd rule). */
export function polygon(width: number, height: number, corners: readonly Point[]): Bitmap {
  const xs = corners.map(([x]) => x);
  const ys = corners.map(([, y]) => y);
  const rect = clipped(Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys), width, height);
  const bitmap = empty(width, height, rect);
  for (let row = 0; row < rect.h; row++) {
    const y = rect.y + row + 0.5;
    const crossings: number[] = [];
    corners.forEach(([ax, ay], i) => {
      const [bx, by] = corners[(i + 1) % corners.length]!;
      if (ay <= y === by <= y) return;
      crossings.push(ax + ((y - ay) / (by - ay)) * (bx - ax));
    });
    crossings.sort((a, b) => a - b);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const first = Math.max(0, Math.ceil(crossings[i]! - 0.5) - rect.x);
      const last = Math.min(rect.w - 1, Math.ceil(crossings[i + 1]! - 0.5) - 1 - rect.x);
      if (first <= last) bitmap.bits.fill(1, row * rect.w + first, row * rect.w + last + 1);
    }
  }
  return bitmap;
}

function clipped(x0: number, y0: number, x1: number, y1: number, width: number, height: number): Rect {
  const x = Math.max(0, Math.floor(x0));
  const y = Math.max(0, Math.floor(y0));
  return {
    x,
    y,
    w: Math.max(0, Math.min(width, Math.floor(x1) + 1) - x),
    h: Math.max(0, Math.min(height, Math.floor(y1) + 1) - y),
  };
}

/**
 * What a click makes of a mask that was also changed by hand: of the assistant's answer only the connected part under
 * the click is added or removed, so that brushed details and holes elsewhere stay.
 */
export function applyClick(base: Bitmap, answer: Bitmap, x: number, y: number, positive: boolean): Bitmap {
  return positive
    ? union(base, partAt(subtract(answer, base), x, y))
    : subtract(base, partAt(subtract(base, answer), x, y));
}
