/** The decoder in the page, as the page sees it: questions to the worker that computes. */

import type { Answer, Prompt } from "./decoder";
import type { Rle } from "./types";

/** What the worker is asked. */
export type Asked =
  | { id: number; do: "start" }
  | { id: number; do: "embed"; image: number }
  | { id: number; do: "mask"; prompt: Prompt };

/** What it tells. */
export type Told =
  | { id: number; error: string }
  | { id: number; threads: number }
  | { id: number; rle: null }
  | { id: number; rle: Rle; score: number }
  | { id: number };

const SCRIPT = "/decoder.js";

type Policies = {
  createPolicy(name: string, rules: { createScriptURL(url: string): string }): { createScriptURL(url: string): string };
};

/** The address of the worker, as a value that a strict policy accepts. */
function script(): string {
  const policies = (globalThis as { trustedTypes?: Policies }).trustedTypes;
  return policies
    ? policies.createPolicy("maskwright-decoder", { createScriptURL: () => SCRIPT }).createScriptURL(SCRIPT)
    : SCRIPT;
}

export class LocalDecoder {
  /** Threads that it computes with. */
  threads = 0;

  private readonly worker = new Worker(script(), { type: "module", name: "decoder" });
  private readonly waiting = new Map<number, { resolve: (told: Told) => void; reject: (error: Error) => void }>();
  private readonly embedded = new Set<number>();
  private next = 1;

  constructor() {
    this.worker.onmessage = ({ data }: MessageEvent<Told>) => {
      const waiting = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if ("error" in data) waiting?.reject(new Error(data.error));
      else waiting?.resolve(data);
    };
    this.worker.onerror = (event) => {
      event.preventDefault();
      this.stop(event.message || "the worker could not be loaded");
    };
  }

  /** Load the runtime and the decoder. */
  async start(): Promise<void> {
    const told = await this.ask({ do: "start" });
    if ("threads" in told) this.threads = told.threads;
  }

  /** Load the embedding of an image. */
  async embed(image: number): Promise<void> {
    if (this.embedded.has(image)) return;
    await this.ask({ do: "embed", image });
    this.embedded.add(image);
  }

  /** Whether prompts of an image need nothing of the server, as far as is known. */
  has(image: number): boolean {
    return this.embedded.has(image);
  }

  /** The mask of a prompt; null if it improves a mask whose logits are not known here. */
  async mask(prompt: Prompt): Promise<Answer | null> {
    const told = await this.ask({ do: "mask", prompt });
    return "rle" in told && told.rle ? { rle: told.rle, score: told.score } : null;
  }

  stop(why: string): void {
    this.worker.terminate();
    for (const { reject } of this.waiting.values()) reject(new Error(why));
    this.waiting.clear();
  }

  private ask(question: { do: "start" } | { do: "embed"; image: number } | { do: "mask"; prompt: Prompt }) {
    const id = this.next++;
    return new Promise<Told>((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, ...question });
    });
  }
}
