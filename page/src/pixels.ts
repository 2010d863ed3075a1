/** The pixels of images: a small version first, the full one when it is looked at closely, the neighbours ahead. */

import { api } from "./api";

/** Longest sides that are asked for. */
const STEPS = [2048, 16384];
const KEPT = 5;

export class Pixels {
  private kept = new Map<string, Promise<ImageBitmap>>();

  /** Longest side worth loading for an image of `longest` pixels, shown with `density` device pixels per pixel. */
  static step(longest: number, density: number): number {
    const seen = longest * density;
    return STEPS.find((step) => step >= Math.min(seen * 0.8, longest)) ?? STEPS.at(-1)!;
  }

  load(image: number, step: number): Promise<ImageBitmap> {
    const key = `${image}/${step}`;
    let pixels = this.kept.get(key);
    if (pixels) this.kept.delete(key);
    else {
      pixels = api.blob(api.pixels(image, step)).then((blob) =>
        createImageBitmap(blob).catch(() => {
          throw new Error("The image cannot be shown; its file may be damaged");
        }),
      );
      pixels.catch(() => this.kept.delete(key));
    }
    this.kept.set(key, pixels);
    if (step > STEPS[0]!) {
      // Of full sizes, hundreds of megabytes each, only the last is kept.
      for (const old of this.kept.keys()) if (old !== key && !old.endsWith(`/${STEPS[0]}`)) this.kept.delete(old);
    }
    for (const old of this.kept.keys()) {
      if (this.kept.size <= KEPT) break;
      // Not closed: it may still be on the screen. The browser frees it when nothing refers to it.
      this.kept.delete(old);
    }
    return pixels;
  }

  /** Load a neighbour, so that it appears at once when it is opened. */
  ahead(image: number): void {
    this.load(image, STEPS[0]!).catch(() => {});
  }
}
