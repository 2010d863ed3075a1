// Masks against slow and simple computations, on many small random images.
import assert from "node:assert/strict";
import { test } from "node:test";
import * as bits from "../src/bitmap";
import { trace } from "../src/contour";
import { History } from "../src/history";
import * as rle from "../src/rle";

type Line = (readonly [number, number])[];

let seed = 7;
const random = (): number => (seed = (seed * 1103515245 + 12345) & 0x7fffffff) / 0x7fffffff;
const below = (n: number): number => Math.floor(random() * n);

function randomMask(): bits.Bitmap {
  const [w, h, share] = [1 + below(14), 1 + below(14), random()];
  const mask = bits.empty(w, h, { x: 0, y: 0, w, h });
  for (let at = 0; at < w * h; at++) mask.bits[at] = random() < share ? 1 : 0;
  return mask;
}

const count = (mask: bits.Bitmap): number => mask.bits.reduce((sum, bit) => sum + bit, 0);
const line = (corners: number): Line =>
  Array.from({ length: corners }, () => [random() * 30 - 8, random() * 30 - 8] as const);

/** Calls `check` with every pixel of the image, and whether the mask has it. */
function everyPixel(mask: bits.Bitmap, check: (x: number, y: number, has: boolean) => void): void {
  for (let y = 0; y < mask.height; y++) for (let x = 0; x < mask.width; x++) check(x, y, bits.has(mask, x, y));
}

/** Sizes of connected parts, by flooding. */
function flood(mask: bits.Bitmap): number[] {
  const left = new Set<string>();
  everyPixel(mask, (x, y, has) => has && left.add(`${x} ${y}`));
  const sizes: number[] = [];
  for (const start of left) {
    const front = [start];
    left.delete(start);
    let size = 0;
    while (front.length) {
      const [x, y] = front.pop()!.split(" ").map(Number) as [number, number];
      size++;
      for (let i = 0; i < 9; i++) {
        const next = `${x - 1 + (i % 3)} ${y - 1 + Math.floor(i / 3)}`;
        if (left.delete(next)) front.push(next);
      }
    }
    sizes.push(size);
  }
  return sizes.sort((a, b) => b - a);
}

function repeat(check: () => void): void {
  for (let i = 0; i < 500; i++) check();
}

test("runs and bits hold the same mask", () =>
  repeat(() => {
    const mask = randomMask();
    const runs = rle.decode(rle.encode(bits.toRuns(mask)));
    assert.equal(rle.area(runs), count(mask));
    assert.deepEqual(bits.crop(bits.fromRuns(runs), mask).bits, mask.bits);
    everyPixel(mask, (x, y, has) => assert.equal(rle.contains(runs, x + random() * 0.99, y + random() * 0.99), has));
  }));

test("COCO's strings are read and written", () => {
  // pycocotools.mask.encode of a 3 x 4 (height x width) image with rows 0110, 0100, 0001.
  const code = { size: [3, 4] as [number, number], counts: "321O30" };
  const mask = bits.crop(bits.fromRuns(rle.decode(code)), { x: 0, y: 0, w: 4, h: 3 });
  assert.deepEqual([...mask.bits], [0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
  assert.deepEqual(rle.encode(bits.toRuns(mask)), code);
  assert.throws(() => rle.decode({ size: [3, 4], counts: "~~" }));
  assert.throws(() => rle.decode({ size: [3, 4], counts: "9999" }));
});

test("parts are those of a flood, and a cut loses no pixel", () =>
  repeat(() => {
    const mask = randomMask();
    assert.deepEqual(bits.parts(mask).map(count), flood(mask));
    const pieces = bits.cut(mask, line(2));
    assert.equal(
      pieces.reduce((sum, piece) => sum + count(piece), 0),
      count(mask),
    );
  }));

test("outlines enclose as many pixels as the mask has", () =>
  repeat(() => {
    const mask = randomMask();
    let twice = 0;
    for (const corners of trace(mask)) {
      for (let i = 0; i < corners.length; i += 2) {
        const next = (i + 2) % corners.length;
        twice += corners[i]! * corners[next + 1]! - corners[next]! * corners[i + 1]!;
      }
    }
    assert.equal(Math.abs(twice) / 2, count(mask));
  }));

test("polygons have the pixels whose centre is inside", () =>
  repeat(() => {
    const corners = line(3 + below(5));
    everyPixel(bits.polygon(12, 9, corners), (x, y, has) => {
      let inside = false;
      corners.forEach(([ax, ay], i) => {
        const [bx, by] = corners[(i + 1) % corners.length]!;
        if (ay > y + 0.5 !== by > y + 0.5 && x + 0.5 < ((bx - ax) * (y + 0.5 - ay)) / (by - ay) + ax) inside = !inside;
      });
      assert.equal(has, inside);
    });
  }));

test("strokes have the pixels within their radius, and those under their points", () =>
  repeat(() => {
    const [radius, points] = [random() * 4, line(1 + below(4))];
    everyPixel(bits.stroke(12, 9, points, radius), (x, y, has) => {
      let distance = Infinity;
      points.forEach(([ax, ay], i) => {
        const [bx, by] = points[i + 1] ?? [ax, ay];
        const size = (bx - ax) ** 2 + (by - ay) ** 2;
        const along = size ? ((x + 0.5 - ax) * (bx - ax) + (y + 0.5 - ay) * (by - ay)) / size : 0;
        const at = Math.min(1, Math.max(0, along));
        distance = Math.min(distance, Math.hypot(x + 0.5 - ax - at * (bx - ax), y + 0.5 - ay - at * (by - ay)));
      });
      const under = points.some(([px, py]) => Math.floor(px) === x && Math.floor(py) === y);
      if (Math.abs(distance - radius) > 1e-9) assert.equal(has, distance <= radius || under);
    });
  }));

test("a click after work by hand changes only the part around it", () => {
  const square = (x: number, y: number, size: number): bits.Bitmap =>
    bits.polygon(40, 20, [
      [x, y],
      [x + size, y],
      [x + size, y + size],
      [x, y + size],
    ]);
  const base = bits.subtract(square(2, 2, 10), square(5, 5, 3)); // with a hole
  const answer = bits.union(square(2, 2, 10), square(20, 2, 6)); // without it, and with something more
  const added = bits.applyClick(base, answer, 22, 4, true);
  assert.equal(count(added), count(base) + 36);
  assert.ok(!bits.has(added, 6, 6));
  const removed = bits.applyClick(added, base, 22, 4, false);
  assert.equal(count(removed), count(base));
});

test("undo and redo", () => {
  const history = new History<number>();
  for (const entry of [1, 2, 3]) history.push(entry);
  assert.equal(history.undo(), 3);
  assert.equal(history.undo(), 2);
  assert.equal(history.redoable, 2);
  assert.equal(history.redo(), 2);
  history.push(4);
  assert.equal(history.redo(), undefined);
  history.drop((entry) => entry === 2);
  assert.deepEqual([history.undo(), history.undo(), history.undo()], [4, 1, undefined]);
});
