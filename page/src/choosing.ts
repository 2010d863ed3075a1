/**
 * Where clicks are answered: on the server or in the page. Automatically, the first five answers of the server are
 * timed; only if they are slow because it is far away, or runs on another machine that is busy, the page loads its own
 * decoder, times the same prompts, and uses what is faster. A busy machine on which both run would only get slower.
 */

import type { Answer, Decoder, Prompt } from "./decoder";
import { Unanswered } from "./live";
import { LocalDecoder } from "./local";
import type { ProjectData } from "./types";

export const PLACES = ["auto", "server", "page"] as const;
export type Place = (typeof PLACES)[number];

const MEASURED = 5;
/** Milliseconds that nobody notices: a server that answers within them is not compared with anything. */
const QUICK = 60;
/** Milliseconds on the way, beside the server's own, from which on it is far away, also through a tunnel. */
const FAR = 25;
const LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\])$/;
/** The page must be faster by this factor, because it also loads and holds embeddings. */
const GAIN = 0.8;
const KEY = "maskwright-decoder";

export class ChoosingDecoder implements Decoder {
  onChange: () => void = () => {};
  /** What a person has chosen. */
  place: Place = "auto";
  /** Median milliseconds of an answer, once they are measured. */
  readonly took: { server: number | null; page: number | null } = { server: null, page: null };
  /** Why the page cannot decode; null if it can, as far as is known. */
  trouble: string | null;
  loading = false;

  private decided: "server" | "page" = "server";
  private local: LocalDecoder | null = null;
  private started: Promise<LocalDecoder> | null = null;
  private image = -1;
  private readonly embedded = new Set<number>();
  private times: number[] = [];
  private ways: number[] = [];
  private prompts: Prompt[] = [];
  /** The last position of the pointer that the page has answered. */
  private hovered: { key: string; answer: Promise<Answer | null> } | null = null;

  constructor(
    private readonly server: Decoder,
    assist: ProjectData["assist"],
    private readonly make: () => LocalDecoder = () => new LocalDecoder(),
  ) {
    this.trouble = assist?.page ? null : (assist?.why ?? "there is no assistant");
    const kept = remembered();
    if (PLACES.includes(kept as Place)) this.place = kept as Place;
  }

  /** Where the next click is answered. */
  get used(): "server" | "page" {
    const wanted = this.place === "auto" ? this.decided : this.place;
    return wanted === "page" && this.local?.has(this.image) ? "page" : "server";
  }

  choose(place: Place): void {
    this.place = place;
    try {
      localStorage.setItem(KEY, place);
    } catch {
      // Chosen for this visit only.
    }
    this.prepare();
    this.onChange();
  }

  open(image: number): void {
    this.image = image;
    this.server.open(image);
    this.prepare();
  }

  /** The server has encoded an image. */
  ready(image: number): void {
    this.embedded.add(image);
    this.prepare();
  }

  async mask(prompt: Prompt, hover: boolean): Promise<Answer> {
    if (this.used === "page") {
      const answer = await this.locally(prompt, hover);
      if (answer) return answer;
    }
    const known = this.embedded.has(prompt.image);
    const begin = performance.now();
    try {
      const answer = await this.server.mask(prompt, hover);
      if (known) this.measured(prompt, performance.now() - begin, answer.ms ?? 0);
      return answer;
    } catch (error) {
      // Without a connection the page goes on by itself, if it can.
      const offline = error instanceof Unanswered && !hover && this.local?.has(prompt.image);
      const answer = offline ? await this.locally(prompt) : null;
      if (answer) return answer;
      throw error;
    }
  }

  private async locally(prompt: Prompt, hover = false): Promise<Answer | null> {
    // A click on the place whose mask is being computed takes that answer, and does not wait for a second one.
    const key = JSON.stringify(prompt);
    const answer = this.hovered?.key === key ? this.hovered.answer : this.local?.mask(prompt);
    if (hover && answer) this.hovered = { key, answer };
    try {
      return (await answer) ?? null;
    } catch (error) {
      this.failed(error as Error);
      return null;
    }
  }

  /** Load what the page needs to decode the image that is shown, if it is to. */
  private prepare(): void {
    const wanted = this.place === "page" || (this.place === "auto" && this.decided === "page");
    if (!wanted || this.trouble || !this.embedded.has(this.image)) return;
    void this.load(this.image).catch(() => {}); // the server answers instead
  }

  private async load(image: number): Promise<LocalDecoder> {
    if (!this.started) {
      this.loading = true;
      this.onChange();
      this.started = (async () => {
        this.local = this.make();
        await this.local.start();
        return this.local;
      })().catch((error: Error) => {
        this.failed(error);
        throw error;
      });
    }
    try {
      const local = await this.started;
      await local.embed(image);
      return local;
    } finally {
      this.loading = false;
      this.onChange();
    }
  }

  private failed(error: Error): void {
    this.trouble = error.message;
    this.decided = "server";
    this.local?.stop(error.message);
    this.local = this.hovered = null;
    this.onChange();
  }

  // --- measuring -----------------------------------------------------------------------------------------------------

  private measured(prompt: Prompt, milliseconds: number, ofServer: number): void {
    if (this.took.server !== null) return;
    this.times.push(milliseconds);
    this.ways.push(milliseconds - ofServer);
    if (!prompt.rle) this.prompts.push(prompt);
    if (this.times.length < MEASURED) return;
    this.took.server = median(this.times);
    this.onChange();
    const far = Math.min(...this.ways) > FAR || !LOOPBACK.test(location.hostname);
    if (this.place === "auto" && far && this.took.server > QUICK && !this.trouble)
      void this.compare().catch(() => {});
  }

  private async compare(): Promise<void> {
    const prompts = this.prompts.filter(({ image }) => image === this.image);
    if (!prompts.length) return;
    const local = await this.load(this.image);
    const times: number[] = [];
    await local.mask(prompts[0]!); // the first one also plans memory
    for (let i = 0; i < MEASURED; i++) {
      const begin = performance.now();
      await local.mask(prompts[i % prompts.length]!);
      times.push(performance.now() - begin);
    }
    this.took.page = median(times);
    if (this.took.page < GAIN * this.took.server!) this.decided = "page";
    this.prepare();
    this.onChange();
  }
}

function median(values: number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1]!;
}

function remembered(): string | null {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}
