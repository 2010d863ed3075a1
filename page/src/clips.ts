/** Propagation of objects through the frames of a clip. */

import { byId, onClick } from "./dom";
import type { Voice } from "./editor";
import type { Images } from "./images";
import { type Live, Unanswered } from "./live";
import type { Saver } from "./saver";
import { Shape, type Store } from "./store";

export class Propagation {
  private request: number | null = null;

  constructor(
    private readonly live: Live,
    private readonly store: Store,
    private readonly saver: Saver,
    private readonly images: Images,
    private readonly frames: number,
    private readonly voice: Voice,
  ) {
    onClick("propagate-forward", () => void this.run(1));
    onClick("propagate-backward", () => void this.run(-1));
    onClick("propagate-stop", () => this.stop());
  }

  stop(): void {
    if (this.request !== null) this.live.tell({ op: "stop", request: this.request });
  }

  async run(direction: 1 | -1): Promise<void> {
    const { store, voice } = this;
    if (this.request !== null) return;
    const ids = [...store.selected].filter((id) => store.objects.has(id));
    if (!ids.length) {
      voice.say("Select the objects to propagate");
      return;
    }
    const from = store.image;
    const wanted = Math.max(1, Math.floor(Number(byId<HTMLInputElement>("propagate-count").value)) || 1);
    const until = Math.min(this.frames - 1, Math.max(0, from + direction * wanted));
    const length = Math.abs(until - from);
    if (!length) {
      voice.say(direction > 0 ? "This is the last frame" : "This is the first frame");
      return;
    }
    const request = this.live.number();
    this.request = request;
    this.show(0, length);
    let reached = 0;
    try {
      await this.saver.settled();
      await this.live.ask(
        { op: "propagate", image: from, ids, until },
        {
          request,
          progress: (event) => {
            if (event.event !== "propagated") return;
            reached = Math.abs(event.image - from);
            this.show(reached, length);
            const removed = event.removed ?? [];
            this.saver.changed(event.image, event.version, event.objects, removed, (data) => new Shape(data));
            const known = this.images.item(event.image);
            if (known && event.image !== from) {
              this.images.note(event.image, { objects: Math.max(known.objects, event.objects.length) });
            }
          },
        },
      );
      voice.say(`Propagated through ${reached} of ${length} frames`);
    } catch (error) {
      voice.warn(
        error instanceof Unanswered
          ? "The connection broke; frames that were reached are kept"
          : (error as Error).message,
      );
    } finally {
      this.request = null;
      this.show(null, length);
    }
  }

  private show(reached: number | null, length: number): void {
    const running = reached !== null;
    byId("propagate-running").hidden = !running;
    byId<HTMLButtonElement>("propagate-forward").disabled = byId<HTMLButtonElement>("propagate-backward").disabled =
      running;
    const progress = byId<HTMLProgressElement>("propagate-progress");
    progress.max = length;
    progress.value = reached ?? 0;
  }
}
