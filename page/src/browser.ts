/** The list of images on the left, or the strip of frames below. */

import { api } from "./api";
import { byId, element, printable, setText } from "./dom";
import type { Voice } from "./editor";
import type { Images } from "./images";
import { VirtualList } from "./list";
import type { Filter } from "./types";

/** Milliseconds that a row stays in sight before its small picture is asked for. */
const REST_MS = 120;
/** Rows by which the list jumps in one frame if it is flung, and milliseconds until its images are then asked for. */
const FAR = 30;
const PASSING_MS = 60;

export class Browser {
  private readonly list: VirtualList;
  private shown = -1;
  private timer = 0;
  private needed = 0;
  /** The first row that was in sight. */
  private seen = 0;
  /** Images whose small picture could not be loaded; they are not asked for again in this visit. */
  private readonly broken = new Set<string>();

  constructor(
    private readonly images: Images,
    private readonly clip: boolean,
    private readonly open: (image: number) => void,
    private readonly voice: Voice,
  ) {
    this.list = new VirtualList({
      host: byId(clip ? "strip" : "images"),
      axis: clip ? "horizontal" : "vertical",
      pitch: clip ? 92 : 48,
      prefix: "image",
      render: (row, index) => this.render(row, index),
      onRange: (start, end) => {
        // Where the list is only passed by, nothing is asked for: a fling would ask for all images.
        const passing = Math.abs(start - this.seen) > FAR;
        this.seen = start;
        clearTimeout(this.needed);
        const need = (): void => void images.need(start, end).catch((error: Error) => voice.warn(error.message));
        if (passing) this.needed = window.setTimeout(need, PASSING_MS);
        else need();
        clearTimeout(this.timer);
        this.timer = window.setTimeout(() => this.loadPictures(), REST_MS);
      },
      onChoose: (index) => {
        const item = images.at(index);
        if (item) open(item.id);
      },
      follow: clip,
    });
    images.onChange = () => this.refresh();
    byId("filter").addEventListener("change", (event) => {
      const filter = (event.target as HTMLSelectElement).value as Filter;
      void this.choose(filter);
    });
  }

  private async choose(filter: Filter): Promise<void> {
    try {
      await this.images.choose(filter);
      const first = this.images.at(0);
      const place = this.images.placeOf(this.shown);
      if (place === undefined && first) this.open(first.id);
      this.list.reveal(place ?? 0);
      this.voice.say(`${this.images.total.toLocaleString()} images`);
    } catch (error) {
      this.voice.warn((error as Error).message);
    }
  }

  /** Mark the image that is shown. */
  show(image: number): void {
    this.shown = image;
    const place = this.images.placeOf(image);
    if (place !== undefined) this.list.reveal(place);
    this.refresh();
  }

  /** The image `by` places further in the list; undefined at its ends. With `again`, a filtered list is read anew there. */
  async neighbour(by: number, again: boolean): Promise<number | undefined> {
    const { images } = this;
    const place = images.placeOf(this.shown) ?? -1;
    const to = place + by;
    if (to < 0) return undefined;
    await images.need(to, to + 1);
    const item = images.at(to);
    if (item || images.filter === "all" || by < 0 || !again) return item?.id;
    // A filtered list has become shorter: read it again and go on with what is left.
    await images.choose(images.filter);
    return images.at(0)?.id === this.shown ? images.at(1)?.id : images.at(0)?.id;
  }

  refresh(): void {
    const { images } = this;
    setText("image-count", images.total.toLocaleString());
    this.list.set(images.total, (index) => images.at(index)?.id === this.shown);
  }

  private render(row: HTMLElement, index: number): void {
    if (!row.firstChild) {
      const picture = element("img");
      picture.alt = "";
      picture.decoding = "async";
      picture.addEventListener("error", () => {
        if (row.dataset["image"]) this.broken.add(row.dataset["image"]);
        picture.removeAttribute("src");
        row.classList.add("broken");
      });
      row.append(picture, element("bdi"), element("small"), element("span", { className: "spoken" }));
    }
    const [picture, name, note, unit] = row.children as unknown as [
      HTMLImageElement,
      HTMLElement,
      HTMLElement,
      HTMLElement,
    ];
    const item = this.images.at(index);
    const id = item ? String(item.id) : "";
    if (row.dataset["image"] !== id) {
      row.dataset["image"] = id;
      picture.removeAttribute("src");
    }
    row.classList.toggle("done", item?.done ?? false);
    row.classList.toggle("broken", this.broken.has(id));
    if (!item) {
      name.textContent = "";
      note.textContent = "…";
      unit.textContent = "";
      return;
    }
    name.textContent = this.clip ? String(item.id + 1) : item.name;
    row.title = printable(item.name, 400);
    note.textContent = item.done ? "done" : item.objects ? String(item.objects) : "";
    unit.textContent = !item.done && item.objects ? (item.objects === 1 ? " object" : " objects") : "";
  }

  private loadPictures(): void {
    for (const row of document.querySelectorAll<HTMLElement>("[data-image]:not([hidden])")) {
      const picture = row.querySelector("img");
      const id = row.dataset["image"];
      if (picture && id && !picture.hasAttribute("src") && !this.broken.has(id)) picture.src = api.pixels(Number(id), 96);
    }
  }
}
