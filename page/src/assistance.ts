/** What the assistant says of the image that is shown, and what it is asked for beyond clicks and boxes. */

import { type ChoosingDecoder, type Place, PLACES } from "./choosing";
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
    private readonly decoder: ChoosingDecoder,
    private readonly voice: Voice,
  ) {
    byId("everything").hidden = !project.assist;
    byId("similar").hidden = !(project.can_similar ?? project.assist !== null);
    byId<HTMLButtonElement>("assist").disabled = !project.assist;
    setText("assist-system", project.assist ? printable(project.assist.system) : "");
    onClick("assist", () => byId<HTMLDialogElement>("assist-dialog").showModal());
    for (const place of PLACES) {
      const choice = byId<HTMLInputElement>(`decode-${place}`);
      choice.checked = place === decoder.place;
      choice.addEventListener("change", () => decoder.choose(place));
    }
    decoder.onChange = () => this.show();
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
    if (event.event === "embedded") this.says = { ready: true, text: "" };
    else this.says = { ready: false, text: printable(event.why, 120) };
    this.show();
  }

  private text(): string {
    if (!this.project.assist) return "no assistant";
    if (this.live.connection === "offline") return "";
    if (this.asked) return `${this.asked.what}…`;
    if (!this.says) return "reading the image…";
    if (!this.says.ready) return this.says.text;
    return this.decoder.used === "page" ? "ready in the page" : "assistant ready";
  }

  /** Where clicks are answered, and why. */
  private placeText(): string {
    const { decoder } = this;
    const { server, page } = decoder.took;
    const sentences: string[] = [];
    if (server !== null) sentences.push(`An answer of the server takes ${Math.round(server)} ms.`);
    if (page !== null) sentences.push(`One of the page takes ${Math.round(page)} ms.`);
    if (decoder.loading) sentences.push("The page loads its decoder…");
    else if (decoder.trouble) sentences.push(`${printable(sentence(decoder.trouble), 300)}`);
    sentences.push(decoder.used === "page" ? "Clicks are answered by the page." : "Clicks are answered by the server.");
    return sentences.join(" ");
  }

  show(): void {
    setText("assist", this.text());
    byId("assist").dataset["place"] = this.decoder.used;
    setText("decode-state", this.placeText());
    byId<HTMLInputElement>("decode-page" satisfies `decode-${Place}`).disabled = this.decoder.trouble !== null;
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

function sentence(text: string): string {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}
