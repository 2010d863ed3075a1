/** Colours of classes, and of single objects where one class is all there is. */

import type { Shape } from "./store";
import type { ClassData } from "./types";

/** Okabe and Ito's colours, told apart with all kinds of colour vision, and lighter relatives of them. */
const PALETTE = [
  "#e69f00",
  "#56b4e9",
  "#009e73",
  "#f0e442",
  "#3f8fd8",
  "#d55e00",
  "#cc79a7",
  "#7ad151",
  "#b58df1",
  "#ff8fa3",
];
const NONE = "#b0b8b8";

export function classColor(item: ClassData | undefined, index: number): string {
  return item && /^#[0-9a-f]{6}$/i.test(item.color) ? item.color : PALETTE[index % PALETTE.length]!;
}

export function shapeColor(shape: Shape, classes: readonly ClassData[]): string {
  if (classes.length > 1) return shape.label === null ? NONE : classColor(classes[shape.label], shape.label);
  // One class: neighbours are told apart by the object.
  let hash = 0;
  for (let i = 0; i < shape.id.length; i++) hash = (hash * 31 + shape.id.charCodeAt(i)) | 0;
  return PALETTE[Math.abs(hash) % PALETTE.length]!;
}
