/** What turns clicks and boxes into masks: the server, or the page itself (`choosing.ts`). */

import type { Live } from "./live";
import type { PromptPoint, Rle } from "./types";

export interface Prompt {
  image: number;
  points: PromptPoint[];
  box: [number, number, number, number] | null;
  /** The mask to improve. */
  rle: Rle | null;
}

export interface Answer {
  rle: Rle;
  score: number;
  /** Milliseconds that the server needed for it. */
  ms?: number;
  /** Of these, in the queue, in the networks, and making the mask from their logits. */
  stages?: number[];
}

export interface Decoder {
  /** Get ready for an image that is shown now. */
  open(image: number): void;
  /** Mask of a prompt. A hover may be rejected with `Unanswered`, when a newer one takes its place. */
  mask(prompt: Prompt, hover: boolean): Promise<Answer>;
}

export class ServerDecoder implements Decoder {
  constructor(private readonly live: Live) {}

  open(image: number): void {
    this.live.tell({ op: "open", image });
  }

  async mask(prompt: Prompt, hover: boolean): Promise<Answer> {
    const event = await this.live.ask({ op: "prompt", ...prompt, hover });
    if (event.event !== "mask") throw new Error("unexpected answer of the server");
    return { rle: event.rle, score: event.score, ms: event.ms, ...(event.stages ? { stages: event.stages } : {}) };
  }
}
