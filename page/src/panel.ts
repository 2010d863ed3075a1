/** The right side: classes, suggestions, the objects of the image, and what can be done with the selected ones. */

import { api } from "./api";
import { classColor, shapeColor } from "./colors";
import { byId, element, onClick, perFrame, printable, setText } from "./dom";
import type { Editor, Voice } from "./editor";
import { VirtualList } from "./list";
import type { Shape, Store } from "./store";
import type { ClassData } from "./types";
import type { View } from "./view";

/** Height of a row, as in app.css: fingers need more. */
const PITCH = matchMedia("(pointer: coarse)").matches ? 40 : 30;

const HOW: Record<string, string> = {
  click: "clicks",
  box: "box",
  brush: "brush",
  eraser: "eraser",
  polygon: "polygon",
  suggestion: "accepted",
  model: "model",
  merge: "merge",
  split: "split",
  import: "imported",
  propagated: "propagated",
};

export class Panel {
  classes: ClassData[] = [];
  onClasses: () => void = () => {};

  private readonly classList: VirtualList;
  private readonly objectList: VirtualList;
  private found: number[] = [];
  private order: Shape[] = [];
  private orderStale = true;
  private anchor = 0;

  /** Show what is selected and what there is, at the next frame. */
  readonly update = perFrame(() => this.refresh());

  constructor(
    private readonly store: Store,
    private readonly editor: Editor,
    private readonly view: View,
    private readonly voice: Voice,
  ) {
    this.classList = new VirtualList({
      host: byId("classes"),
      axis: "vertical",
      pitch: PITCH,
      prefix: "class",
      render: (row, index) => this.renderClass(row, index),
      onChoose: (index) => this.chooseClass(this.found[index]),
    });
    this.objectList = new VirtualList({
      host: byId("objects"),
      axis: "vertical",
      pitch: PITCH,
      prefix: "object",
      render: (row, index) => this.renderObject(row, index),
      onChoose: (index, event) => this.chooseObject(index, event),
    });
    const search = byId<HTMLInputElement>("class-search");
    search.addEventListener("input", () => this.search());
    search.addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        event.preventDefault();
        if (this.found.length && !event.ctrlKey) this.chooseClass(this.found[0]);
        else void this.add();
        this.leave();
      } else if (event.key === "Escape") this.leave();
      else if (event.key === "ArrowDown") byId("classes").focus();
      else return;
      event.stopPropagation();
    });
    onClick("class-add", () => void this.add());
    onClick("accept-all", () => editor.accept(true));
    onClick("dismiss-all", () => editor.dismissAll());
    onClick("merge", () => editor.merge());
    onClick("parts", () => editor.split());
    onClick("delete", () => editor.remove());
    store.listen((change) => {
      if (change.what === "all" || change.what === "objects") this.orderStale = true;
      this.update();
    });
  }

  // --- classes -----------------------------------------------------------------------------------------------------

  setClasses(classes: ClassData[]): void {
    this.classes = classes;
    if (this.editor.label === null && classes.length) this.editor.label = 0;
    this.search();
    this.onClasses();
    this.view.redraw();
    this.objectList.soon();
  }

  /** Name of a class, for messages. */
  nameOf(label: number | null): string {
    return label === null ? "without a class" : printable(this.classes[label]?.name ?? `class ${label}`);
  }

  /** Put the cursor into the search field. */
  find(): void {
    byId("class-search").focus();
  }

  chooseClass(label: number | null | undefined): void {
    if (label === undefined || (label !== null && label >= this.classes.length)) return;
    this.editor.classify(label, this.nameOf(label));
    this.update();
  }

  private leave(): void {
    const search = byId<HTMLInputElement>("class-search");
    search.value = "";
    this.search();
    byId("stage").focus();
  }

  private search(): void {
    const wanted = byId<HTMLInputElement>("class-search").value.trim();
    const lower = wanted.toLowerCase();
    this.found = this.classes.map((_, i) => i).filter((i) => this.classes[i]!.name.toLowerCase().includes(lower));
    // A name that begins as typed comes first.
    if (lower) {
      const begins = (i: number): number => Number(!this.classes[i]!.name.toLowerCase().startsWith(lower));
      this.found.sort((a, b) => begins(a) - begins(b) || a - b);
    }
    const add = byId("class-add");
    add.hidden = !wanted || this.classes.some(({ name }) => name === wanted);
    add.querySelector("span")!.textContent = `Add "${printable(wanted, 30)}"`;
    byId("classes").style.height = `${Math.max(1, Math.min(this.found.length, 10)) * PITCH}px`;
    this.classList.set(this.found.length, (index) => this.found[index] === this.shownLabel());
  }

  private async add(): Promise<void> {
    const search = byId<HTMLInputElement>("class-search");
    const name = search.value.trim();
    if (!name) return;
    try {
      this.setClasses(await api.addClass(name));
      search.value = "";
      this.search();
      this.chooseClass(this.classes.findIndex((item) => item.name === name));
    } catch (error) {
      this.voice.warn((error as Error).message);
    }
  }

  /** Class of the selection, or of the next object. */
  private shownLabel(): number | null {
    return this.store.current ? this.store.current.label : this.editor.label;
  }

  private renderClass(row: HTMLElement, index: number): void {
    const label = this.found[index];
    const item = label === undefined ? undefined : this.classes[label];
    if (label === undefined || !item) return;
    if (!row.firstChild) row.append(element("i"), element("bdi"), element("kbd"));
    const [swatch, name, key] = row.children as unknown as [HTMLElement, HTMLElement, HTMLElement];
    swatch.style.backgroundColor = classColor(item, label);
    name.textContent = item.name;
    row.title = printable(item.name, 400);
    key.textContent = label < 10 ? String((label + 1) % 10) : "";
    key.hidden = label >= 10;
  }

  // --- objects -----------------------------------------------------------------------------------------------------

  private chooseObject(index: number, event: MouseEvent | KeyboardEvent): void {
    const shape = this.ordered()[index];
    if (!shape) return;
    const ids = new Set(event.ctrlKey || event.metaKey ? this.store.selected : []);
    if (event.shiftKey) {
      const [from, to] = [Math.min(this.anchor, index), Math.max(this.anchor, index)];
      for (const other of this.ordered().slice(from, to + 1)) ids.add(other.id);
    } else {
      this.anchor = index;
      if (!ids.delete(shape.id)) ids.add(shape.id);
    }
    this.store.select(ids);
    this.view.reveal(shape.bounds);
  }

  private ordered(): Shape[] {
    if (this.orderStale) {
      this.order = [...this.store.objects.values(), ...this.store.suggestions.values()];
      this.orderStale = false;
    }
    return this.order;
  }

  /** Select the next or previous object. */
  step(by: 1 | -1): void {
    const order = this.ordered();
    if (!order.length) {
      this.voice.say("There are no objects in this image");
      return;
    }
    const { current } = this.store;
    const place = current ? order.findIndex(({ id }) => id === current.id) : by === 1 ? -1 : 0;
    const index = (place + by + order.length) % order.length;
    const shape = order[index]!;
    this.store.select([shape.id]);
    this.view.reveal(shape.bounds);
    this.objectList.reveal(index);
    this.voice.say(`${this.title(shape, index)}, ${shape.area.toLocaleString()} pixels`);
  }

  private title(shape: Shape, index: number): string {
    const kind = this.store.suggestions.has(shape.id) ? "Suggestion" : "Object";
    return `${kind} ${index + 1} of ${this.ordered().length}: ${this.nameOf(shape.label)}`;
  }

  private renderObject(row: HTMLElement, index: number): void {
    const shape = this.ordered()[index];
    if (!shape) return;
    if (!row.firstChild)
      row.append(element("i"), element("span", { className: "spoken" }), element("bdi"), element("small"));
    const [swatch, kind, name, note] = row.children as unknown as [HTMLElement, HTMLElement, HTMLElement, HTMLElement];
    const suggestion = this.store.suggestions.has(shape.id);
    swatch.style.backgroundColor = shapeColor(shape, this.classes);
    row.classList.toggle("suggested", suggestion);
    name.textContent = shape.label === null ? "no class" : (this.classes[shape.label]?.name ?? `class ${shape.label}`);
    const score = suggestion && shape.data.score !== undefined ? shape.data.score.toFixed(2) : "";
    note.textContent = score || (shape.data.track === undefined ? `${index + 1}` : `track ${shape.data.track}`);
    kind.textContent = suggestion ? "Suggestion: " : "";
  }

  private refresh(): void {
    const { store } = this;
    this.objectList.set(store.objects.size + store.suggestions.size, (index) => {
      const shape = this.ordered()[index];
      return shape !== undefined && store.selected.has(shape.id);
    });
    this.classList.set(this.found.length, (index) => this.found[index] === this.shownLabel());
    setText("object-count", String(store.objects.size));
    const suggested = store.suggestions.size;
    byId("suggestions").hidden = !suggested && byId("everything").hidden;
    byId("suggestion-buttons").hidden = !suggested;
    setText(
      "suggestions-title",
      !suggested ? "Suggestions" : suggested === 1 ? "1 suggestion" : `${suggested} suggestions`,
    );
    const n = store.selected.size;
    byId<HTMLButtonElement>("merge").disabled = n < 2;
    byId<HTMLButtonElement>("parts").disabled = n !== 1;
    byId<HTMLButtonElement>("similar").disabled = n !== 1;
    byId<HTMLButtonElement>("delete").disabled = n < 1;
    setText("about", n > 1 ? `${n} selected` : store.current ? this.about(store.current) : "");
  }

  /** How an object came about: pixels, and who did what. */
  private about(shape: Shape): string {
    const steps = shape.data.made.map(({ by, how, clicks }) => {
      const what = HOW[how] ?? printable(how, 20);
      return `${clicks > 1 ? `${clicks} ` : ""}${what}${by && by !== this.editor.user ? ` (${printable(by, 24)})` : ""}`;
    });
    const kinds = [
      ...(shape.data.crowd ? ["crowd region"] : []),
      ...(shape.data.box_only ? ["box without a mask"] : []),
    ];
    return [`${shape.area.toLocaleString()} px`, ...kinds, ...steps].join(" · ");
  }
}
