/** Masks as pixels, for those whose outline has too many corners to be drawn in every frame. */

import type { Bitmap } from "./bitmap";

/** The mask in a colour, its border opaque, with `fill` (0 to 1) inside; one pixel for each of the image. */
export function sprite(bitmap: Bitmap, color: string, fill: number): HTMLCanvasElement {
  const { bits, w, h } = bitmap;
  const canvas = document.createElement("canvas");
  canvas.width = w;
  canvas.height = h;
  const context = canvas.getContext("2d", { willReadFrequently: true })!;
  context.fillStyle = color;
  context.fillRect(0, 0, 1, 1);
  const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
  // One number per pixel, in the byte order of the machine.
  const number = (alpha: number): number => new Uint32Array(Uint8Array.of(red!, green!, blue!, alpha).buffer)[0]!;
  const [inside, border] = [number(Math.round(255 * fill)), number(230)];
  const pixels = new Uint32Array(w * h);
  for (let row = 0, at = 0; row < h; row++) {
    for (let column = 0; column < w; column++, at++) {
      if (!bits[at]) continue;
      const within =
        column > 0 &&
        row > 0 &&
        column < w - 1 &&
        row < h - 1 &&
        bits[at - 1] &&
        bits[at + 1] &&
        bits[at - w] &&
        bits[at + w];
      pixels[at] = within ? inside : border;
    }
  }
  context.putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), w, h), 0, 0);
  return canvas;
}
