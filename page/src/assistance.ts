/** What the assistant says of the image that is shown, and what it is asked for beyond clicks and boxes. */

import { byId, onClick, printable, setText } from "./dom";
import type { Voice } from "./editor";
import { type Live, Unanswered } from "./live";
import type { Saver } from "./saver";
import type { Store } from "./store";
import type { ProjectData, ServerEvent } from "./types";

export class Assistance {
  onChange: () => void = () => {};

  private image = -1;
  /** Null as long as the assistant works on the image. */
  private says: { ready: boolean; text: string } | null = null;
  /** What it is asked for now, with the number of the request. */
  private asked: { what: string; request: number } | null = null;

  constructor(
    private readonly project: ProjectData,
    private readonly live: Live,
    private readonly store: Store,
    private readonly saver: Saver,
    private readonly voice: Voice,
  ) {
    byId("everything").hidden = !project.assist;
    byId("similar").hidden = !(project.can_similar ?? project.assist !== null);
    byId("assist").title = project.assist ? printable(project.assist.system) : "";
    onClick("everything", () => {
      if (this.asked) live.tell({ op: "stop", request: this.asked.request });
      else void this.suggest("everything");
    });
    onClick("similar", () => void this.suggest("similar"));
  }

  /** Clicks and boxes are answered for this image, as far as is known. */
  get ready(): boolean {
    return this.project.assist !== null && this.says?.ready !== false;
  }

  /** Another image is shown. */
  open(image: number): void {
    this.image = image;
    this.says = null;
    this.show();
  }

  told(event: Extract<ServerEvent, { event: "embedded" | "no-assist" }>): void {
    if (event.image !== this.image) return;
    if (event.event === "embedded") this.says = { ready: true, text: "assistant ready" };
    else this.says = { ready: false, text: printable(event.why, 120) };
    this.show();
  }

  private text(): string {
    if (!this.project.assist) return "no assistant";
    if (this.live.connection === "offline") return "";
    return this.asked ? `${this.asked.what}…` : (this.says?.text ?? "reading the image…");
  }

  show(): void {
    setText("assist", this.text());
    byId<HTMLButtonElement>("everything").disabled = !this.ready;
    setText("everything-text", this.asked ? "Stop" : "Everything");
    this.onChange();
  }

  /** Suggestions for the whole image, or objects like the selected one. */
  async suggest(op: "everything" | "similar"): Promise<void> {
    const { store, voice } = this;
    const { image, current } = store;
    if (!this.ready) return voice.say("There is no assistant for this image");
    if (this.asked) return;
    if (op === "similar" && !current) return voice.say("Select the object that others should resemble");
    if (op === "similar" && store.suggestions.has(current!.id)) return voice.say("Accept the suggestion first");
    const request = this.live.number();
    this.asked = { what: op === "similar" ? "finding similar objects" : "finding all objects", request };
    this.show();
    try {
      await this.saver.settled();
      const message = { op, image, ...(op === "similar" ? { id: current!.id } : {}) };
      const event = await this.live.ask(message, { request });
      if (event.event === "suggestions" && event.image === store.image) {
        store.replaceSuggestions(event.objects);
        const n = store.suggestions.size;
        const found = n === 1 ? "1 suggestion" : `${n} suggestions`;
        voice.say(n ? `${found}: Enter accepts one, A accepts all` : "Nothing was found");
      }
    } catch (error) {
      voice.warn(error instanceof Unanswered ? "The server is not connected" : (error as Error).message);
    } finally {
      this.asked = null;
      this.show();
    }
  }
}
