/** Puts the page together: which image is shown, which tool is used, what the server tells. */

import { api, NoAnswer } from "./api";
import { Browser } from "./browser";
import { Propagation } from "./clips";
import { shapeColor } from "./colors";
import { Conflicts } from "./conflicts";
import { ServerDecoder } from "./decoder";
import { ExportDialog, TrainDialog } from "./dialogs";
import { byId, element, icon, onClick, printable, setPressed, setText } from "./dom";
import { Editor, type Voice } from "./editor";
import { Images } from "./images";
import { Input } from "./input";
import { type Command, describe, listen } from "./keys";
import { Live, Unanswered } from "./live";
import { Panel } from "./panel";
import { Pixels } from "./pixels";
import { Saver } from "./saver";
import { Shape, Store } from "./store";
import { BoxTool } from "./tools/box";
import { BrushTool, EraserTool } from "./tools/brush";
import { ClickTool } from "./tools/click";
import { PolygonTool } from "./tools/polygon";
import { SelectTool, SplitTool } from "./tools/select";
import type { At, Context, Options, Tool } from "./tools/tool";
import type { ProjectData, ServerEvent } from "./types";
import { outline, View } from "./view";

const WARNING_MS = 12_000;

const voice: Voice = {
  say(sentence) {
    byId("say").textContent = sentence;
  },
  warn(sentence) {
    const close = element("button", { className: "icon" }, [icon("close")]);
    close.setAttribute("aria-label", "Close the message");
    const warning = element("div", { className: "warning" }, [
      element("span", { text: printable(sentence, 400) }),
      close,
    ]);
    const gone = (): void => warning.remove();
    close.addEventListener("click", gone);
    setTimeout(gone, WARNING_MS);
    const warnings = byId("warnings");
    warnings.append(warning);
    while (warnings.children.length > 3) warnings.firstChild!.remove();
  },
};

async function start(): Promise<void> {
  let project: ProjectData;
  try {
    project = await api.project();
  } catch (error) {
    empty(`${(error as Error).message}. Start the server and load this page again.`);
    return;
  }
  new Page(project).run();
}

function empty(sentence: string): void {
  const place = byId("empty");
  place.hidden = false;
  place.textContent = sentence;
}

class Page {
  private readonly live = new Live(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/live`);
  private readonly store = new Store();
  private readonly saver = new Saver(this.live, this.store);
  private readonly decoder = new ServerDecoder(this.live);
  private readonly editor = new Editor(this.store, this.saver, this.decoder, voice);
  private readonly view = new View(
    byId("stage"),
    byId<HTMLCanvasElement>("base"),
    byId<HTMLCanvasElement>("top"),
    this.store,
  );
  private readonly options: Options = { radius: 8, background: false, single: false, hover: true };
  private readonly images = new Images();
  private readonly pixels = new Pixels();
  private readonly panel = new Panel(this.store, this.editor, this.view, voice);
  private readonly browser: Browser;
  private readonly conflicts: Conflicts;
  private readonly training = new TrainDialog(voice);
  private readonly exporting = new ExportDialog(() => this.saver.unsaved);
  private readonly input: Input;
  private readonly tools: Tool[];
  private readonly clip: boolean;

  /** The image that is shown or about to be. */
  private target = -1;
  private targetStale = false;
  private pixelsShown = "";
  private pictureTimer = 0;
  /** What the assistant said of the image; null as long as it works on it. */
  private assistSays: { ready: boolean; text: string } | null = null;
  private askingFor: string | null = null;
  private asking = 0;
  private wasOnline = false;
  private names = new Map<number, string>();
  private diagnosis = 0;
  private recounted = new Set<number>();
  private recounting = 0;
  private clickedAt = 0;

  constructor(private readonly project: ProjectData) {
    this.clip = project.kind === "clip";
    this.editor.user = project.user;
    this.browser = new Browser(this.images, this.clip, (image) => void this.open(image), voice);
    this.conflicts = new Conflicts(
      this.store,
      this.editor,
      this.view,
      (image) => void this.open(image),
      () => this.showStatus(),
    );
    const context: Context = {
      store: this.store,
      view: this.view,
      editor: this.editor,
      voice,
      options: this.options,
      assisted: () => this.assisted,
      pick: (at) => this.pick(at),
      changed: () => this.showHint(),
    };
    this.tools = [
      new ClickTool(context),
      new BoxTool(context),
      new PolygonTool(context),
      new BrushTool(context),
      new EraserTool(context),
      new SelectTool(context),
      new SplitTool(context),
    ];
    this.input = new Input(byId("stage"), this.view, this.store, this.tools[0]!);
  }

  run(): void {
    const { project, live, saver, editor, view, store } = this;
    document.title = `${printable(project.name)} – maskwright`;
    byId("project-name").textContent = project.name;
    byId("project-name").title = printable(project.name, 400);
    byId("images-panel").hidden = byId("toggle-images").hidden = this.clip;
    byId("strip").hidden = !this.clip;
    document.body.classList.toggle("clip", this.clip);
    const canPropagate = project.can_propagate ?? (this.clip && project.assist !== null);
    byId("clip").hidden = !canPropagate;
    if (canPropagate) new Propagation(live, store, saver, this.images, project.count, voice);
    byId("everything").hidden = !project.assist;
    byId("assist").title = project.assist ? printable(project.assist.system) : "";
    byId("similar").hidden = !(project.can_similar ?? project.assist !== null);
    byId("train").hidden = !project.can_train;
    this.showSuggester(project);
    this.exporting.setFormats(project.formats);

    view.colorOf = (shape) => shapeColor(shape, this.panel.classes);
    view.onView = () => this.viewed();
    view.onDrawn = () => this.drawn();
    editor.onHistory = () => this.showHistory();
    editor.onPreview = () => this.showExtras();
    saver.onStatus = () => this.showStatus();
    saver.onRefused = (actions, why) => {
      editor.forget(actions);
      if (why !== null) voice.warn(`Not saved: ${why}`);
    };
    saver.onConflict = (conflicts) => {
      if (conflicts.length) this.conflicts.add(conflicts);
      else voice.say("Someone else changed the object; it is shown as it is now");
    };
    saver.isSame = (images) => this.isSame(images);
    live.onConnection = () => this.connected();
    live.onEvent = (event) => this.told(event);
    store.listen((change) => {
      if (change.what !== "selection") this.images.note(store.image, { objects: store.objects.size, done: store.done });
      if (change.what !== "objects") setPressed(byId("done"), store.done);
      this.showHint();
    });
    this.input.onPointer = (at) => {
      const inside = at && at[0] >= 0 && at[1] >= 0 && at[0] < store.width && at[1] < store.height;
      setText("cursor", inside ? `${Math.floor(at[0])}, ${Math.floor(at[1])}` : "");
    };
    this.panel.setClasses(project.classes);
    this.makeTools();
    this.makeControls();
    const commands = this.commands();
    listen(commands);
    describe(commands, POINTER_HELP);
    byId("stage").addEventListener("pointerup", () => (this.clickedAt = performance.now()), { capture: true });
    addEventListener("beforeunload", (event) => {
      if (saver.unsaved || this.conflicts.count) event.preventDefault();
    });
    addEventListener("hashchange", () => {
      const wanted = this.hashed();
      if (wanted !== undefined && wanted !== this.target) void this.open(wanted);
    });
    live.connect();
    this.images.need(0, 1).then(
      () => {
        if (!project.count) empty("There are no images in this folder.");
        else void this.open(this.hashed() ?? 0);
      },
      (error: Error) => empty(error.message),
    );
    byId("stage").focus();
  }

  /** Least certain images first: only where a system suggests, which there may be only after training. */
  private showSuggester(project: ProjectData): void {
    byId("filter").querySelector<HTMLOptionElement>('option[value="uncertain"]')!.hidden = !project.suggest;
  }

  private hashed(): number | undefined {
    const match = /^#image=(\d{1,9})$/.exec(location.hash);
    const image = match ? Number(match[1]) : undefined;
    return image !== undefined && image < this.project.count ? image : undefined;
  }

  // --- the image ---------------------------------------------------------------------------------------------------

  private async open(image: number): Promise<void> {
    if (image === this.target) return;
    this.input.drop();
    this.editor.clearPreview();
    this.target = image;
    this.targetStale = false;
    this.assistSays = null;
    byId("busy").hidden = false;
    this.browser.show(image);
    this.decoder.open(image);
    this.showAssist();
    try {
      const [data, pixels] = await Promise.all([
        api.objects(image),
        // Shown together if the pixels come soon, so that nothing flickers; otherwise the objects first.
        soon(this.pixels.load(image, 2048), 250),
      ]);
      if (this.target !== image) return;
      const sameSize = data.size[0] === this.store.height && data.size[1] === this.store.width;
      this.store.select([]);
      this.pixelsShown = "";
      this.view.show(pixels);
      this.saver.enter(data);
      if (this.targetStale) await this.saver.load(image);
      this.view.redraw(true);
      if (!(this.clip && sameSize)) this.view.fit();
      history.replaceState(null, "", `#image=${image}`);
      this.showImage();
      this.loadPixels();
      void this.loadAhead(image);
    } catch (error) {
      if (this.target !== image) return;
      this.target = this.store.image;
      byId("busy").hidden = true;
      voice.warn((error as Error).message);
      if (this.store.image < 0) empty((error as Error).message);
    }
  }

  /** Load the neighbours in the list, so that they appear at once. */
  private async loadAhead(image: number): Promise<void> {
    for (const by of [1, -1]) {
      const near = await this.browser.neighbour(by, false).catch(() => undefined);
      if (near !== undefined && this.target === image) this.pixels.ahead(near);
    }
  }

  /** The pixels in the resolution that is looked at. */
  private loadPixels(): void {
    const { image, width, height } = this.store;
    if (image < 0 || !width) return;
    const step = Pixels.step(Math.max(width, height), this.view.density);
    const key = `${image}/${step}`;
    if (key === this.pixelsShown) return;
    const [shownImage, shownStep] = this.pixelsShown.split("/");
    if (Number(shownImage) === image && Number(shownStep) > step) return;
    this.pixels.load(image, step).then(
      (pixels) => {
        if (this.store.image !== image) return;
        this.pixelsShown = key;
        this.view.show(pixels);
        byId("busy").hidden = this.target === image;
      },
      (error: Error) => {
        if (this.store.image !== image) return;
        byId("busy").hidden = true;
        voice.warn(error.message);
      },
    );
  }

  private viewed(): void {
    setText("zoom", `${Math.round(this.view.zoom * 100)} %`);
    clearTimeout(this.pictureTimer);
    this.pictureTimer = window.setTimeout(() => this.loadPixels(), 150);
  }

  private showImage(): void {
    const item = this.images.item(this.store.image);
    const name = item?.name ?? `image ${this.store.image + 1}`;
    if (item) this.names.set(item.id, item.name);
    byId("image-name").textContent = name;
    byId("image-name").title = printable(name, 400);
    const place = (this.images.placeOf(this.store.image) ?? this.store.image) + 1;
    byId("image-place").textContent = `${place.toLocaleString()} / ${this.images.total.toLocaleString()}`;
    const { width, height } = this.store;
    byId("stage").setAttribute(
      "aria-label",
      `Image ${printable(name)}, ${width} by ${height} pixels, ${this.store.objects.size} objects`,
    );
    this.conflicts.update();
    this.showHistory();
    this.showHint();
  }

  private async go(by: number): Promise<void> {
    try {
      const image = await this.browser.neighbour(by, true);
      if (image === undefined) voice.say(by > 0 ? "This is the last image" : "This is the first image");
      else await this.open(image);
    } catch (error) {
      voice.warn((error as Error).message);
    }
  }

  // --- the server --------------------------------------------------------------------------------------------------

  private connected(): void {
    const online = this.live.connection === "online";
    if (online) {
      void this.saver.recover();
      if (this.target >= 0) this.decoder.open(this.target);
      if (this.wasOnline) {
        this.readProject();
      }
      this.wasOnline = true;
      clearTimeout(this.diagnosis);
      if (this.project.can_train)
        void api.train().then(
          (state) => this.training.take(state),
          () => {},
        );
    }
    if (this.live.connection === "offline") {
      clearTimeout(this.diagnosis);
      this.diagnosis = window.setTimeout(() => void this.diagnose(), 4000);
    }
    this.showStatus();
  }

  /** Whether images still have the names under which they were opened. */
  private async isSame(images: number[]): Promise<boolean> {
    for (const image of images) {
      const before = this.names.get(image);
      if (before === undefined) continue;
      const { items } = await api.images(image, 1, "all");
      if (items[0]?.name !== before) {
        voice.warn(
          "The server was started with other images. Load this page again; changes that are not saved are lost then.",
        );
        return false;
      }
    }
    return true;
  }

  /** Someone else has changed an image of the list: read its numbers again, many changes at once. */
  private recount(image: number): void {
    if (!this.images.item(image)) return;
    this.recounted.add(image);
    clearTimeout(this.recounting);
    this.recounting = window.setTimeout(async () => {
      for (const one of this.recounted) {
        this.recounted.delete(one);
        const { items } = await api.images(one, 1, "all").catch(() => ({ items: [] }));
        if (items[0]?.id === one) this.images.note(one, items[0]);
      }
    }, 600);
  }

  /** Why is there no connection? A server that answers otherwise, for example wants a token, says it. */
  private async diagnose(): Promise<void> {
    try {
      await api.project();
    } catch (error) {
      if (!(error instanceof NoAnswer)) voice.warn((error as Error).message);
    }
  }

  /** Read again what may have changed: classes, and whether a system suggests. */
  private readProject(): void {
    api.project().then(
      (project) => {
        this.panel.setClasses(project.classes);
        this.showSuggester(project);
      },
      () => {},
    );
  }

  private told(event: ServerEvent): void {
    const { store } = this;
    switch (event.event) {
      case "embedded":
        if (event.image === this.target) this.assistSays = { ready: true, text: "assistant ready" };
        this.showAssist();
        break;
      case "no-assist":
        if (event.image === this.target) this.assistSays = { ready: false, text: printable(event.why, 120) };
        this.showAssist();
        break;
      case "suggestions":
        if (event.image === store.image) store.replaceSuggestions(event.objects);
        break;
      case "changed":
        if (event.image !== store.image) this.recount(event.image);
        if (event.image === this.target && store.image !== event.image) this.targetStale = true;
        this.saver.changed(event.image, event.version, event.objects, event.removed, (data) => new Shape(data));
        if (event.image === store.image) {
          if (event.done !== undefined) store.setDone(event.done);
          const n = event.objects.length + event.removed.length;
          if (n)
            voice.say(`${printable(event.by, 40) || "Someone else"} changed ${n === 1 ? "an object" : `${n} objects`}`);
        }
        break;
      case "classes":
        this.panel.setClasses(event.classes);
        break;
      case "train":
        this.training.take(event);
        // The new weights are loaded a moment later.
        if (event.state === "done") setTimeout(() => this.readProject(), 4000);
        break;
      case "here": {
        const others = event.users - 1;
        byId("people").hidden = others < 1;
        byId("people").lastElementChild!.textContent = String(event.users);
        byId("people").title =
          others === 1 ? "One other page is open on this project" : `${others} other pages are open on this project`;
        break;
      }
      case "error":
        voice.warn(event.error);
        break;
      default:
        break;
    }
  }

  private get assisted(): boolean {
    return this.project.assist !== null && this.assistSays?.ready !== false;
  }

  private assistText(): string {
    if (!this.project.assist) return "no assistant";
    if (this.live.connection === "offline") return "";
    if (this.askingFor) return `${this.askingFor}…`;
    return this.assistSays?.text ?? "reading the image…";
  }

  private showAssist(): void {
    setText("assist", this.assistText());
    byId<HTMLButtonElement>("everything").disabled = !this.assisted;
    const text = this.askingFor === null ? "Everything" : "Stop";
    if (byId("everything").lastElementChild!.textContent !== text)
      byId("everything").lastElementChild!.textContent = text;
    this.showHint();
  }

  private showStatus(): void {
    const { unsaved } = this.saver;
    const { connection } = this.live;
    const conflicts = this.conflicts.count;
    const changes = unsaved === 1 ? "1 change" : `${unsaved} changes`;
    const [state, text] = this.saver.stopped
      ? ["offline", `Other images · ${changes} not saved`]
      : connection === "offline"
        ? ["offline", unsaved ? `Offline · ${changes} not saved` : "Offline"]
        : conflicts
          ? ["conflict", conflicts === 1 ? "1 conflict" : `${conflicts} conflicts`]
          : unsaved
            ? ["saving", "Saving…"]
            : connection === "connecting"
              ? ["connecting", "Connecting…"]
              : ["saved", "All saved"];
    const status = byId("status");
    if (status.dataset["state"] === state && status.lastElementChild!.textContent === text) return;
    status.dataset["state"] = state;
    status.lastElementChild!.textContent = text!;
    this.showAssist();
  }

  /** Suggestions for the whole image, or objects like the selected one. */
  private async suggest(op: "everything" | "similar"): Promise<void> {
    const { store } = this;
    const image = store.image;
    const current = store.current;
    if (!this.assisted) return voice.say("There is no assistant for this image");
    if (this.askingFor !== null) return;
    if (op === "similar" && !current) return voice.say("Select the object that others should resemble");
    if (op === "similar" && store.suggestions.has(current!.id)) return voice.say("Accept the suggestion first");
    this.askingFor = op === "similar" ? "finding similar objects" : "finding all objects";
    this.asking = this.live.number();
    this.showAssist();
    try {
      await this.saver.settled();
      const message = { op, image, ...(op === "similar" ? { id: current!.id } : {}) };
      const event = await this.live.ask(message, { request: this.asking });
      if (event.event === "suggestions" && event.image === store.image) {
        store.replaceSuggestions(event.objects);
        const n = store.suggestions.size;
        voice.say(
          n
            ? `${n === 1 ? "1 suggestion" : `${n} suggestions`}: Enter accepts one, A accepts all`
            : "Nothing was found",
        );
      }
    } catch (error) {
      voice.warn(error instanceof Unanswered ? "The server is not connected" : (error as Error).message);
    } finally {
      this.askingFor = null;
      this.showAssist();
    }
  }

  // --- tools and controls ------------------------------------------------------------------------------------------

  /** A click that meets a suggestion accepts it, one that meets an object selects it. */
  private pick(at: At): boolean {
    const shape = this.store.at(at.x, at.y);
    if (!shape) return false;
    this.store.select([shape.id]);
    if (this.store.suggestions.has(shape.id)) this.editor.accept(false);
    else voice.say(`Selected: ${this.panel.nameOf(shape.label)}, ${shape.area.toLocaleString()} pixels`);
    return true;
  }

  private showExtras(): void {
    const { preview } = this.editor;
    const extras = [this.conflicts, this.input.tool, this.input];
    if (preview) {
      const shape = Shape.of(preview.bitmap, { id: "", label: this.editor.label, made: [] });
      const color = this.view.colorOf(this.store.current ?? shape);
      this.view.extras = [outline(shape, color, 0.3), ...extras];
    } else this.view.extras = extras;
    this.view.touch();
  }

  private makeTools(): void {
    const bar = byId("tools");
    const keys: Record<string, string> = {
      click: "C",
      box: "X",
      polygon: "P",
      brush: "B",
      eraser: "E",
      select: "V",
      split: "K",
    };
    for (const tool of this.tools) {
      const button = element("button", { title: `${tool.label} (${keys[tool.name]})` }, [
        icon(tool.name),
        element("kbd", { text: keys[tool.name]! }),
      ]);
      button.id = `tool-${tool.name}`;
      button.setAttribute("aria-label", tool.label);
      button.setAttribute("aria-keyshortcuts", keys[tool.name]!);
      button.addEventListener("click", () => this.use(tool.name));
      bar.append(button);
    }
    bar.addEventListener("keydown", (event) => {
      const by = { ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      event.stopPropagation();
      const place = this.tools.indexOf(this.input.tool);
      const tool = this.tools[(place + by + this.tools.length) % this.tools.length]!;
      this.use(tool.name);
      byId(`tool-${tool.name}`).focus();
    });
    this.use("click");
  }

  private use(name: string): void {
    const tool = this.tools.find((other) => other.name === name)!;
    this.editor.clearPreview();
    this.input.use(tool);
    for (const other of this.tools) {
      const button = byId(`tool-${other.name}`);
      setPressed(button, other === tool);
      button.tabIndex = other === tool ? 0 : -1;
    }
    for (const option of document.querySelectorAll<HTMLElement>("#options [data-for]")) {
      option.hidden = !option.dataset["for"]!.split(" ").includes(name);
    }
    byId("effect").hidden = ["select", "split"].includes(name);
    const words: Record<string, [string, string]> = {
      click: ["Object", "Background"],
      brush: ["Paint", "Erase"],
      eraser: ["Erase", "Paint"],
    };
    const [plus, minus] = words[name] ?? ["Add", "Take away"];
    byId("effect-add").lastElementChild!.textContent = plus;
    byId("effect-subtract").lastElementChild!.textContent = minus;
    this.setBackground(false);
    this.showExtras();
    this.showHint();
  }

  private setBackground(background: boolean): void {
    this.options.background = background;
    for (const [id, on] of [
      ["effect-add", !background],
      ["effect-subtract", background],
    ] as const) {
      setPressed(byId(id), on, "aria-checked");
      byId(id).tabIndex = on ? 0 : -1;
    }
  }

  private showHint(): void {
    const idle = !this.store.selected.size && !this.input.tool.begun;
    byId<HTMLButtonElement>("finish").disabled = byId<HTMLButtonElement>("drop").disabled = idle;
    setText("hint", this.input.tool.hint());
  }

  private showHistory(): void {
    const { undoable, redoable } = this.editor.history;
    byId<HTMLButtonElement>("undo").disabled = !undoable;
    byId<HTMLButtonElement>("redo").disabled = !redoable;
    byId("undo").title = undoable ? `Undo: ${printable(undoable.what)} (Ctrl+Z)` : "Undo (Ctrl+Z)";
    byId("redo").title = redoable ? `Redo: ${printable(redoable.what)} (Ctrl+Shift+Z)` : "Redo (Ctrl+Shift+Z)";
  }

  /** Time from a click to the picture with its mask, for benchmarks and the curious. */
  private drawn(): void {
    if (!this.clickedAt || this.editor.waiting.length) return;
    const took = performance.now() - this.clickedAt;
    performance.measure("click-to-visible", { start: this.clickedAt });
    this.clickedAt = 0;
    byId("stage").dataset["took"] = took.toFixed(1);
  }

  private setRadius(radius: number): void {
    this.options.radius = Math.min(300, Math.max(0.5, radius));
    // The slider is quadratic: small brushes need fine steps.
    byId<HTMLInputElement>("radius").value = String(100 * Math.sqrt((this.options.radius - 0.5) / 150));
    byId("radius-value").textContent = `${Math.round(2 * this.options.radius)} px`;
    this.view.touch();
  }

  private makeControls(): void {
    const { view, options } = this;
    onClick("previous", () => void this.go(-1));
    onClick("next", () => void this.go(1));
    onClick("done", () => this.editor.setDone(!this.store.done));
    onClick("undo", () => this.undo());
    onClick("redo", () => this.editor.redo());
    onClick("help", () => byId<HTMLDialogElement>("help-dialog").showModal());
    onClick("finish", () => this.enter());
    onClick("drop", () => this.escape());
    onClick("everything", () => {
      if (this.askingFor === null) void this.suggest("everything");
      else this.live.tell({ op: "stop", request: this.asking });
    });
    onClick("similar", () => void this.suggest("similar"));
    onClick("zoom-in", () => view.zoomAt(1.4));
    onClick("zoom-out", () => view.zoomAt(1 / 1.4));
    onClick("fit", () => view.fit());
    onClick("visible", () => this.toggleMasks());
    onClick("effect-add", () => this.setBackground(false));
    onClick("effect-subtract", () => this.setBackground(true));
    byId("effect").addEventListener("keydown", (event) => {
      if (!event.key.startsWith("Arrow")) return;
      event.preventDefault();
      event.stopPropagation();
      this.setBackground(!options.background);
      byId(options.background ? "effect-subtract" : "effect-add").focus();
    });
    for (const name of ["single", "hover"] as const) {
      byId<HTMLInputElement>(name).addEventListener("change", (event) => {
        options[name] = (event.target as HTMLInputElement).checked;
        this.editor.clearPreview();
        this.showHint();
      });
    }
    byId<HTMLInputElement>("radius").addEventListener("input", (event) => {
      this.setRadius(0.5 + 150 * (Number((event.target as HTMLInputElement).value) / 100) ** 2);
    });
    byId<HTMLInputElement>("opacity").addEventListener("input", (event) => {
      view.opacity = Number((event.target as HTMLInputElement).value) / 100;
      view.redraw();
    });
    this.setRadius(options.radius);
    this.drawer("toggle-images", "images-panel", "no-images", 1100);
    this.drawer("toggle-panel", "panel", "no-panel", 860);
    for (const dialog of document.querySelectorAll("dialog")) {
      // A click beside the dialog closes it.
      dialog.addEventListener("click", (event) => {
        if (event.target === dialog) dialog.close();
      });
    }
  }

  /** A side that is closed at first in a window narrower than `width`. */
  private drawer(button: string, side: string, closed: string, width: number): void {
    const set = (open: boolean): void => {
      document.body.classList.toggle(closed, !open);
      byId(side).inert = !open;
      byId(button).setAttribute("aria-expanded", String(open));
    };
    set(innerWidth >= width);
    onClick(button, () => set(document.body.classList.contains(closed)));
  }

  private toggleMasks(): void {
    this.view.visible = !this.view.visible;
    setPressed(byId("visible"), this.view.visible);
    this.view.redraw();
    voice.say(this.view.visible ? "Masks are shown" : "Masks are hidden");
  }

  private undo(): void {
    if (!this.input.tool.stepBack()) this.editor.undo();
  }

  private escape(): void {
    if (this.input.drop()) return;
    this.editor.clearPreview();
    this.editor.deselect();
  }

  private enter(): void {
    if (this.input.tool.finish()) return;
    this.editor.accept(false);
    this.editor.deselect();
    voice.say("Ready for the next object");
  }

  private commands(): Command[] {
    const { view, editor, panel, input } = this;
    const tool = (key: string, name: string, title: string): Command => ({
      keys: [key],
      shown: [key.toUpperCase()],
      group: "Tools",
      title,
      run: () => this.use(name),
    });
    return [
      tool("c", "click", "Click: the assistant finds the object"),
      tool("x", "box", "Box around an object"),
      tool("p", "polygon", "Polygon, or a free outline"),
      tool("b", "brush", "Brush"),
      tool("e", "eraser", "Eraser"),
      tool("v", "select", "Select"),
      tool("k", "split", "Split by a line"),
      {
        keys: ["[", "BracketLeft"],
        shown: ["["],
        group: "Tools",
        title: "Smaller brush",
        run: () => this.setRadius(this.options.radius / 1.25),
      },
      {
        keys: ["]", "BracketRight"],
        shown: ["]"],
        group: "Tools",
        title: "Larger brush",
        run: () => this.setRadius(this.options.radius * 1.25),
      },
      {
        keys: ["i"],
        shown: ["I"],
        group: "Tools",
        title: "Background instead of object, and back",
        run: () => this.setBackground(!this.options.background),
      },
      {
        keys: ["u"],
        shown: ["U"],
        group: "Tools",
        title: "One click per object, on or off",
        run: () => byId("single").click(),
      },
      {
        keys: ["Enter"],
        group: "Object",
        title: "Close the polygon; accept the suggestion; go on to the next object",
        run: () => this.enter(),
      },
      { keys: ["Escape"], group: "Object", title: "Drop what is begun; select nothing", run: () => this.escape() },
      { keys: ["w"], shown: ["W"], group: "Object", title: "Select the next object", run: () => panel.step(1) },
      { keys: ["q"], shown: ["Q"], group: "Object", title: "Select the previous object", run: () => panel.step(-1) },
      {
        keys: ["Delete", "Backspace"],
        group: "Object",
        title: "Delete; dismiss a suggestion",
        run: (event) => {
          if (event.key === "Backspace" && input.tool.stepBack()) return;
          editor.remove();
        },
      },
      { keys: ["m"], shown: ["M"], group: "Object", title: "Merge the selected objects", run: () => editor.merge() },
      { keys: ["j"], shown: ["J"], group: "Object", title: "Split into connected parts", run: () => editor.split() },
      {
        keys: ["Digit1", "Digit2", "Digit3", "Digit4", "Digit5", "Digit6", "Digit7", "Digit8", "Digit9", "Digit0"],
        shown: ["1 to 0"],
        group: "Object",
        title: "Class 1 to 10 for the selection and for new objects",
        run: (event) => panel.chooseClass((Number(event.code.slice(-1)) + 9) % 10),
      },
      { keys: ["/", "Shift+/"], shown: ["/"], group: "Object", title: "Find or add a class", run: () => panel.find() },
      {
        keys: ["Control+a"],
        shown: ["Ctrl+A"],
        group: "Object",
        title: "Select all objects",
        run: () => this.store.select(this.store.objects.keys()),
      },
      { keys: ["Control+z"], shown: ["Ctrl+Z"], group: "Object", title: "Undo", run: () => this.undo() },
      {
        keys: ["Control+Shift+z", "Control+y"],
        shown: ["Ctrl+Shift+Z", "Ctrl+Y"],
        group: "Object",
        title: "Redo",
        run: () => editor.redo(),
      },
      {
        keys: ["a"],
        shown: ["A"],
        group: "Suggestions",
        title: "Accept all suggestions",
        run: () => editor.accept(true),
      },
      {
        keys: ["g"],
        shown: ["G"],
        group: "Suggestions",
        title: "Everything: suggest all objects",
        run: () => void this.suggest("everything"),
      },
      {
        keys: ["l"],
        shown: ["L"],
        group: "Suggestions",
        title: "Suggest objects like the selected one",
        run: () => void this.suggest("similar"),
      },
      { keys: [",", "PageUp"], shown: [","], group: "Image", title: "Previous image", run: () => void this.go(-1) },
      { keys: [".", "PageDown"], shown: ["."], group: "Image", title: "Next image", run: () => void this.go(1) },
      {
        keys: ["Shift+Enter"],
        group: "Image",
        title: "Done with this image, go to the next",
        run: () => {
          input.tool.finish();
          editor.setDone(true);
          void this.go(1);
        },
      },
      { keys: ["+", "="], shown: ["+"], group: "Image", title: "Zoom in", run: () => view.zoomAt(1.4) },
      { keys: ["-"], group: "Image", title: "Zoom out", run: () => view.zoomAt(1 / 1.4) },
      { keys: ["f"], shown: ["F"], group: "Image", title: "Fit to window", run: () => view.fit() },
      { keys: ["h"], shown: ["H"], group: "Image", title: "Show or hide masks", run: () => this.toggleMasks() },
      {
        keys: ["Control+s"],
        shown: ["Ctrl+S"],
        group: "Image",
        title: "Everything is saved by itself; says whether it is",
        run: () => voice.say(byId("status").textContent!.trim()),
      },
      {
        keys: ["?"],
        group: "Image",
        title: "This sheet",
        run: () => byId<HTMLDialogElement>("help-dialog").showModal(),
      },
    ];
  }
}

const POINTER_HELP = [
  { group: "Mouse, pen and fingers", shown: ["Wheel", "Pinch"], title: "Zoom" },
  { group: "Mouse, pen and fingers", shown: ["Space+drag", "Middle button", "Two fingers"], title: "Move the image" },
  {
    group: "Mouse, pen and fingers",
    shown: ["Alt+click", "Right button"],
    title: "Background click; erase; take away",
  },
  {
    group: "Mouse, pen and fingers",
    shown: ["Shift+click"],
    title: "Select several (Select); refine (One click per object)",
  },
  { group: "Mouse, pen and fingers", shown: ["Ctrl+click"], title: "New object inside another" },
  { group: "Keyboard on the image", shown: ["Arrow keys"], title: "Move the cross; with Shift finely, with Ctrl far" },
  { group: "Keyboard on the image", shown: ["Space"], title: "Click, or begin and end a stroke, at the cross" },
  { group: "Keyboard on the image", shown: ["Shift+Space"], title: "Background click at the cross" },
];

/** The value if it comes within some milliseconds, otherwise null. Failures are left to the next who asks. */
function soon<T>(promise: Promise<T>, milliseconds: number): Promise<T | null> {
  return Promise.race([
    promise.catch(() => null),
    new Promise<null>((resolve) => setTimeout(() => resolve(null), milliseconds)),
  ]);
}

void start();
