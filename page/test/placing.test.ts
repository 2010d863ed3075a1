// Masks from logits against those that `maskwright.ops.planes.place_planes` computed for the same numbers, and points
// and halves against known values.
import assert from "node:assert/strict";
import { test } from "node:test";
import { type Placement, placeMask, toInput } from "../src/placing";
import { decode, encode } from "../src/rle";
import { fromHalf, read } from "../src/safetensors";
import cases from "./placing.json";

test("masks are those of the server", () => {
  for (const [number, one] of cases.entries()) {
    const grid = { height: one.height, width: one.width, values: Float32Array.from(one.logits) };
    const placement = one.placement as unknown as Placement;
    const runs = placeMask(grid, placement, one.input_size as [number, number], one);
    assert.equal(encode(runs).counts, one.counts, `case ${number}`);
    assert.ok(decode({ size: placement.image_size, counts: one.counts }).ends.length > 0);
  }
});

test("no logit above 0 is an empty mask", () => {
  const grid = { height: 8, width: 8, values: new Float32Array(64).fill(-1) };
  const placement: Placement = { image_size: [30, 40], size: [24, 32], scale: [0.8, 0.8], offset: [0, 0], mirrored: false };
  const { ends } = placeMask(grid, placement, [32, 32], { steps: 2, cubic: false });
  assert.deepEqual([...ends], [1200]);
});

test("points are mapped to the input", () => {
  const placement: Placement = { image_size: [30, 40], size: [24, 32], scale: [0.8, 0.5], offset: [1, 2], mirrored: true };
  assert.deepEqual(toInput(placement, 10, 20), [25, 12]);
});

test("numbers of 16 bits", () => {
  const halves = Uint16Array.of(0, 0x8000, 0x3c00, 0xc000, 0x7bff, 0x0001, 0x7c00, 0x3555);
  assert.deepEqual([...fromHalf(halves)], [0, -0, 1, -2, 65504, 2 ** -24, Infinity, Math.fround(0.333251953125)]);
  assert.ok(Number.isNaN(fromHalf(Uint16Array.of(0x7e00))[0]));
});

test("a safetensors file", () => {
  const header = JSON.stringify({ __metadata__: { a: "b" }, x: { dtype: "F16", shape: [1, 2], data_offsets: [0, 4] } });
  const file = new Uint8Array(8 + header.length + 4);
  new DataView(file.buffer).setBigUint64(0, BigInt(header.length), true);
  file.set(new TextEncoder().encode(header), 8);
  file.set([0, 0x3c, 0, 0xc0], 8 + header.length);
  const { about, tensors } = read(file.buffer);
  assert.deepEqual(about, { a: "b" });
  assert.deepEqual([...tensors.get("x")!.values], [1, -2]);
  assert.deepEqual(tensors.get("x")!.shape, [1, 2]);
});
