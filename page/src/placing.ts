/**
 * From mask logits of the network's low-resolution grid to a mask of the image, as the server does it
 * (`ops.planes.place_planes`): separable weights of the cells for each row and column of the image, and only the
 * pixels that logits above 0 reach.
 */

import { type Runs, RunsBuilder } from "./rle";

/** How the image was placed in the network's input: `input = image * scale + offset`, x first in `scale` and `offset`. */
export interface Placement {
  image_size: [height: number, width: number];
  size: [height: number, width: number];
  scale: [x: number, y: number];
  offset: [x: number, y: number];
  mirrored: boolean;
}

export interface Resizing {
  /** 2: to the grid of the input and from there to the image; 1: at once. */
  steps: number;
  cubic: boolean;
}

/** A grid of numbers, row by row. */
export interface Grid {
  height: number;
  width: number;
  values: Float32Array;
}

/** Weights of at most `TAPS` cells for each pixel of one axis of the image. */
interface Axis {
  cells: Int32Array;
  weights: Float32Array;
}

const TAPS = 4;

/** A point of the image in pixels of the input. */
export function toInput({ image_size, scale, offset, mirrored }: Placement, x: number, y: number): [number, number] {
  return [(mirrored ? image_size[1] - x : x) * scale[0] + offset[0], y * scale[1] + offset[1]];
}

/** The pixels of the image whose interpolated logit is above 0. */
export function placeMask(
  logits: Grid,
  placement: Placement,
  inputSize: readonly [number, number],
  resizing: Resizing,
): Runs {
  const [height, width] = placement.image_size;
  const rows = axis(logits.height, inputSize[0], placement, 0, resizing);
  const columns = axis(logits.width, inputSize[1], placement, 1, resizing);
  const [solidRows, solidColumns] = solid(logits, resizing.cubic);
  const [top, bottom] = reached(rows, solidRows);
  const [left, right] = reached(columns, solidColumns);
  const runs = new RunsBuilder(width, height);
  const line = new Float32Array(logits.height);
  const { values } = logits;
  let [upper, lower] = [logits.height, 0]; // the cells that rows top ... bottom read
  for (let at = top * TAPS; at < bottom * TAPS; at++) {
    if (!rows.weights[at]) continue;
    upper = Math.min(upper, rows.cells[at]!);
    lower = Math.max(lower, rows.cells[at]! + 1);
  }
  for (let x = left; x < right; x++) {
    const [i0, i1, i2, i3] = columns.cells.subarray(x * TAPS) as unknown as [number, number, number, number];
    const [w0, w1, w2, w3] = columns.weights.subarray(x * TAPS) as unknown as [number, number, number, number];
    for (let row = upper; row < lower; row++) {
      const start = row * logits.width;
      line[row] =
        w0 * values[start + i0]! + w1 * values[start + i1]! + w2 * values[start + i2]! + w3 * values[start + i3]!;
    }
    let begun = -1;
    for (let y = top, at = top * TAPS; y < bottom; y++, at += TAPS) {
      const value =
        rows.weights[at]! * line[rows.cells[at]!]! +
        rows.weights[at + 1]! * line[rows.cells[at + 1]!]! +
        rows.weights[at + 2]! * line[rows.cells[at + 2]!]! +
        rows.weights[at + 3]! * line[rows.cells[at + 3]!]!;
      if (value > 0) {
        if (begun < 0) begun = y;
      } else if (begun >= 0) {
        runs.ones(x * height + begun, x * height + y);
        begun = -1;
      }
    }
    if (begun >= 0) runs.ones(x * height + begun, x * height + bottom);
  }
  return runs.finish();
}

/** Which rows and columns of cells have a logit above 0. Cubic interpolation can exceed its neighbours: all have. */
function solid({ height, width, values }: Grid, all: boolean): [Uint8Array, Uint8Array] {
  const rows = new Uint8Array(height).fill(all ? 1 : 0);
  const columns = new Uint8Array(width).fill(all ? 1 : 0);
  if (all) return [rows, columns];
  for (let row = 0, at = 0; row < height; row++) {
    for (let column = 0; column < width; column++, at++) {
      if (values[at]! > 0) rows[row] = columns[column] = 1;
    }
  }
  return [rows, columns];
}

/** The range of pixels, end excluded, that read a solid cell. */
function reached({ cells, weights }: Axis, solid: Uint8Array): [number, number] {
  let [first, last] = [0, 0];
  for (let at = 0; at < cells.length; at++) {
    if (!weights[at] || !solid[cells[at]!]) continue;
    const pixel = (at / TAPS) | 0;
    if (!last) first = pixel;
    last = pixel + 1;
  }
  return [first, last];
}

/** Weights along an axis: 0 for rows, 1 for columns. Pixels outside of the input have none. */
function axis(cells: number, padded: number, placement: Placement, along: 0 | 1, { steps, cubic }: Resizing): Axis {
  const pixels = placement.image_size[along];
  const valid = placement.size[along];
  const scale = placement.scale[1 - along]!;
  const offset = placement.offset[1 - along]!;
  const mirrored = placement.mirrored && along === 1;
  const result: Axis = { cells: new Int32Array(pixels * TAPS), weights: new Float32Array(pixels * TAPS) };
  const ratio = cells / padded;
  for (let pixel = 0; pixel < pixels; pixel++) {
    const place = (mirrored ? pixels - pixel - 0.5 : pixel + 0.5) * scale + offset - 0.5;
    if (!(place > -0.5 && place < valid - 0.5)) continue;
    const tap = (number: number, cell: number, weight: number): void => {
      result.cells[pixel * TAPS + number] = Math.min(Math.max(cell, 0), cells - 1);
      result.weights[pixel * TAPS + number] = weight;
    };
    const linear = (number: number, position: number, share: number): void => {
      const inside = Math.min(Math.max(position, 0), cells - 1);
      const first = Math.floor(inside);
      tap(number, first, share * (1 - (inside - first)));
      tap(number + 1, first + 1, share * (inside - first));
    };
    if (cubic) {
      const position = (place + 0.5) * ratio - 0.5;
      const first = Math.floor(position);
      for (let number = 0; number < TAPS; number++)
        tap(number, first + number - 1, kernel(Math.abs(position - first - number + 1)));
    } else if (steps === 1) {
      linear(0, (place + 0.5) * ratio - 0.5, 1);
    } else {
      const inside = Math.min(Math.max(place, 0), valid - 1);
      const first = Math.floor(inside);
      const second = Math.min(first + 1, valid - 1);
      linear(0, (first + 0.5) * ratio - 0.5, 1 - (inside - first));
      linear(2, (second + 0.5) * ratio - 0.5, inside - first);
    }
  }
  return result;
}

/** Cubic convolution with a = -0.75. */
function kernel(apart: number): number {
  if (apart <= 1) return (1.25 * apart - 2.25) * apart * apart + 1;
  return apart < 2 ? ((-0.75 * apart + 3.75) * apart - 6) * apart + 3 : 0;
}
