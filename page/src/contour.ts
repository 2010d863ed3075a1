/** Outlines of masks: the pixel edges between inside and outside, as closed paths in image coordinates. */

import type { Bitmap } from "./bitmap";

const STEP_X = [1, 0, -1, 0] as const;
const STEP_Y = [0, 1, 0, -1] as const;

/**
 * All outlines, of holes too, as flat lists x, y, x, y of corners. The inside is on the right; pixels that touch at a
 * corner only are outlined separately. Filled by the even-odd rule they give the mask exactly.
 */
export function trace(bitmap: Bitmap): Float64Array[] {
  const { bits, w, h, x, y } = bitmap;
  const inside = (column: number, row: number): boolean =>
    column >= 0 && row >= 0 && column < w && row < h && bits[row * w + column] === 1;
  // Every outline passes above some pixel from left to right: starting at such edges finds each exactly once.
  const seen = new Uint8Array(bits.length);
  const outlines: Float64Array[] = [];
  for (let at = 0; at < bits.length; at++) {
    if (!bits[at] || seen[at] || (at >= w && bits[at - w])) continue;
    const startColumn = at % w;
    const startRow = (at - startColumn) / w;
    const corners: number[] = [];
    let column = startColumn;
    let row = startRow;
    let heading = 0;
    do {
      if (heading === 0) seen[row * w + column] = 1;
      column += STEP_X[heading]!;
      row += STEP_Y[heading]!;
      // The two pixels ahead of the vertex, on the right and on the left of the way.
      const rightColumn = column + (heading === 0 || heading === 3 ? 0 : -1);
      const rightRow = row + (heading === 0 || heading === 1 ? 0 : -1);
      const leftColumn = column + (heading === 0 || heading === 1 ? 0 : -1);
      const leftRow = row + (heading === 1 || heading === 2 ? 0 : -1);
      const before = heading;
      if (!inside(rightColumn, rightRow)) heading = (heading + 1) % 4;
      else if (inside(leftColumn, leftRow)) heading = (heading + 3) % 4;
      if (heading !== before) corners.push(x + column, y + row);
    } while (column !== startColumn || row !== startRow || heading !== 0);
    outlines.push(Float64Array.from(corners));
  }
  return outlines;
}

/** The outlines as one path; to be filled with "evenodd". */
export function path(bitmap: Bitmap): Path2D {
  const result = new Path2D();
  for (const corners of trace(bitmap)) {
    result.moveTo(corners[0]!, corners[1]!);
    for (let i = 2; i < corners.length; i += 2) result.lineTo(corners[i]!, corners[i + 1]!);
    result.closePath();
  }
  return result;
}
