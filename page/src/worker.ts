/**
 * The decoder in the page: ONNX Runtime Web in a worker of its own, so that the page never waits for it. Built into
 * decoder.js, which is loaded only where the page decodes.
 */

import * as ort from "onnxruntime-web/wasm";
import type { Answer } from "./decoder";
import type { Asked, Told } from "./local";
import { type Placement, placeMask, type Resizing, toInput } from "./placing";
import { encode } from "./rle";
import { read, type Tensor } from "./safetensors";

interface Embedding {
  maps: [name: string, tensor: Tensor][];
  placement: Placement;
  inputSize: [number, number];
  resizing: Resizing;
  readsMasks: boolean;
}

const HELD = 4; // embeddings
const REMEMBERED = 64; // answers whose logits can be refined

const held = new Map<number, Promise<Embedding>>();
const logitsOf = new Map<string, Float32Array>();
let session: ort.InferenceSession | undefined;
let threads = 1;

type Policies = { createPolicy(name: string, rules: { createScriptURL(url: string): string }): unknown };

// The threads of the runtime are workers, whose addresses the page's policy has checked: its own files only.
(globalThis as { trustedTypes?: Policies }).trustedTypes?.createPolicy("default", {
  createScriptURL(url) {
    if (new URL(url, location.href).origin !== location.origin) throw new TypeError(`${url} is not of this server`);
    return url;
  },
});

async function bytes(path: string): Promise<ArrayBuffer> {
  const response = await fetch(path, { credentials: "same-origin" });
  if (response.ok) return response.arrayBuffer();
  const body = (await response.json().catch(() => ({}))) as { error?: unknown };
  throw new Error(typeof body.error === "string" ? body.error : `the server refused ${path} (${response.status})`);
}

async function start(): Promise<void> {
  ort.env.wasm.wasmPaths = { mjs: "/ort-wasm-simd-threaded.mjs", wasm: "/ort-wasm-simd-threaded.wasm" };
  // Threads need cross-origin isolation, which browsers grant to localhost and HTTPS only.
  threads = self.crossOriginIsolated ? Math.max(1, Math.min(4, navigator.hardwareConcurrency >> 1)) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  session = await ort.InferenceSession.create(await bytes("/api/decoder"), { executionProviders: ["wasm"] });
}

async function fetched(image: number): Promise<Embedding> {
  const { about, tensors } = read(await bytes(`/api/images/${image}/embedding`));
  const parsed = <T>(name: string): T => JSON.parse(about[name]!) as T;
  return {
    maps: [...tensors],
    placement: parsed("placement"),
    inputSize: parsed("input_size"),
    resizing: parsed("resizing"),
    readsMasks: parsed("reads_masks"),
  };
}

function embedding(image: number): Promise<Embedding> {
  let found = held.get(image);
  if (found) held.delete(image);
  else {
    found = fetched(image);
    found.catch(() => held.delete(image));
  }
  held.set(image, found); // as the last used
  for (const old of held.keys()) {
    if (held.size <= HELD) break;
    held.delete(old);
  }
  return found;
}

async function mask({ prompt }: Extract<Asked, { do: "mask" }>): Promise<{ rle: null } | Answer> {
  const { image, points, box, rle } = prompt;
  const { maps, placement, inputSize, resizing, readsMasks } = await embedding(image);
  const before = rle && readsMasks ? logitsOf.get(`${image}:${rle.counts}`) : undefined;
  if (rle && readsMasks && !before) return { rle: null };
  const corners: [number, number, number][] = box ? [[box[0], box[1], 2], [box[2], box[3], 3]] : [];
  const all = [...points, ...corners];
  if (!all.length) return { rle: null };
  const places = Float32Array.from(all.flatMap(([x, y]) => toInput(placement, x, y)));
  if (placement.mirrored && box) {
    const left = 2 * points.length;
    [places[left], places[left + 2]] = [places[left + 2]!, places[left]!];
  }
  const feeds: Record<string, ort.Tensor> = {
    points: new ort.Tensor("float32", places, [1, all.length, 2]),
    labels: new ort.Tensor("int64", BigInt64Array.from(all, ([, , label]) => BigInt(label)), [1, all.length]),
  };
  for (const [name, { shape, values }] of maps) feeds[name] = new ort.Tensor("float32", values, [1, ...shape]);
  if (readsMasks) {
    const [height, width] = maps.find(([name]) => name === "image")![1].shape.slice(-2) as [number, number];
    const size = [1, 1, 4 * height, 4 * width];
    feeds["logits"] = new ort.Tensor("float32", before ?? new Float32Array(16 * height * width), size);
    feeds["has_logits"] = new ort.Tensor("bool", Uint8Array.of(before ? 1 : 0), [1]);
  }
  const found = await session!.run(feeds);
  const logits = found["mask_logits"]!;
  const values = (logits.data as Float32Array).slice();
  const score = Number((found["score"]!.data as Float32Array)[0]);
  for (const tensor of Object.values(found)) tensor.dispose();
  const [, height, width] = logits.dims as [number, number, number];
  const answer = encode(placeMask({ height, width, values }, placement, inputSize, resizing));
  logitsOf.set(`${image}:${answer.counts}`, values);
  if (logitsOf.size > REMEMBERED) logitsOf.delete(logitsOf.keys().next().value!);
  return { rle: answer, score: Number.isFinite(score) ? score : 0 };
}

let turn: Promise<unknown> = Promise.resolve();

async function answer(asked: Asked): Promise<Told> {
  const { id } = asked;
  if (asked.do === "start") {
    await start();
    return { id, threads };
  }
  if (asked.do === "embed") {
    await embedding(asked.image);
    return { id };
  }
  const own = turn.then(() => mask(asked));
  turn = own.catch(() => {});
  return { id, ...(await own) };
}

self.onmessage = (event: MessageEvent<Asked>) => {
  answer(event.data).then(
    (told) => self.postMessage(told),
    (error: unknown) => self.postMessage({ id: event.data.id, error: (error as Error).message ?? String(error) }),
  );
};
