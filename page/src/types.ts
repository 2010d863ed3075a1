/** What travels between the page and the server. Coordinates are image pixels; pixel j covers [j, j + 1). */

/** COCO's compressed run-length encoding; `size` is height, width. */
export interface Rle {
  size: [number, number];
  counts: string;
}

export type How =
  | "click"
  | "box"
  | "brush"
  | "eraser"
  | "polygon"
  | "suggestion"
  | "model"
  | "merge"
  | "split"
  | "import"
  | "propagated";

/** One step in the making of a mask: who, by which means, with how many actions. */
export interface Made {
  by: string;
  how: How;
  clicks: number;
}

export interface ObjectData {
  id: string;
  label: number | null;
  rle: Rle;
  made: Made[];
  score?: number;
  track?: number;
  revision?: number;
  /** An imported box without a mask; `rle` is the filled box. */
  box_only?: boolean;
  /** A region of many objects. */
  crowd?: boolean;
}

export interface ClassData {
  name: string;
  color: string;
}

export interface ProjectData {
  name: string;
  kind: "images" | "clip";
  count: number;
  classes: ClassData[];
  /** `page`: whether the page can decode by itself; `why`: why not. */
  assist: { system: string; ready: boolean; where: string; page?: boolean; why?: string | null } | null;
  suggest: { system: string } | null;
  formats: string[];
  user: string;
  can_train: boolean;
  can_propagate?: boolean;
  can_similar?: boolean;
  version: number;
}

export interface ImageItem {
  id: number;
  name: string;
  width: number | null;
  height: number | null;
  objects: number;
  done: boolean;
  version: number;
}

export interface ImageObjects {
  id: number;
  version: number;
  size: [number, number];
  done: boolean;
  objects: ObjectData[];
  suggestions: ObjectData[];
}

export interface TrainState {
  state: "idle" | "running" | "done" | "failed";
  step: number;
  steps: number;
  ap?: number;
  message?: string;
}

export interface Exported {
  path: string;
  images: number;
  objects: number;
  losses: string[];
}

export type Point = readonly [x: number, y: number];

/** A click for the assistant: x, y and 1 for the object or 0 for the background. */
export type PromptPoint = [x: number, y: number, positive: 1 | 0];

export type Filter = "all" | "todo" | "done" | "uncertain";

/** One step of an `edit` message. */
export type Edit =
  | { do: "add"; object: ObjectData }
  | { do: "replace"; id: string; object: ObjectData; was: number }
  | { do: "remove"; id: string; was: number }
  | { do: "dismiss"; ids: string[]; value: boolean }
  | { do: "done"; value: boolean };

/** Messages of the server over the WebSocket. */
export type ServerEvent =
  | { event: "embedded"; image: number; ms: number }
  | { event: "no-assist"; image: number; why: string; request?: number }
  | { event: "mask"; request: number; image: number; rle: Rle; score: number; ms: number; stages?: number[] }
  | { event: "dropped"; request: number }
  | { event: "suggestions"; request?: number; image: number; objects: ObjectData[] }
  | { event: "propagated"; request: number; image: number; version: number; objects: ObjectData[]; removed?: string[] }
  | { event: "finished"; request: number }
  | { event: "saved"; request: number; image: number; version: number; objects: ObjectData[] }
  | {
      event: "conflict";
      request: number;
      image: number;
      version: number;
      objects: ObjectData[];
      removed: string[];
    }
  | { event: "error"; request?: number; error: string }
  | {
      event: "changed";
      image: number;
      version: number;
      objects: ObjectData[];
      removed: string[];
      done?: boolean;
      by: string;
    }
  | { event: "classes"; classes: ClassData[] }
  | ({ event: "train" } & TrainState)
  | { event: "here"; users: number };
