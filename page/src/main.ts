/** Puts the page together: which image is shown, which tool is used, what the server tells. */

import { api, NoAnswer } from "./api";
import { Assistance } from "./assistance";
import { Browser } from "./browser";
import { Propagation } from "./clips";
import { shapeColor } from "./colors";
import { type Actions, commandsOf, POINTER_HELP } from "./commands";
import { Conflicts } from "./conflicts";
import { ChoosingDecoder } from "./choosing";
import { ServerDecoder } from "./decoder";
import { ExportDialog, TrainDialog } from "./dialogs";
import { byId, element, icon, onClick, printable, setPressed, setText } from "./dom";
import { Editor, type Voice } from "./editor";
import { Images } from "./images";
import { describe, listen } from "./keys";
import { Live } from "./live";
import { Panel } from "./panel";
import { Pixels } from "./pixels";
import { Saver } from "./saver";
import { Shape, Store } from "./store";
import type { At } from "./tools/tool";
import { Toolbox } from "./toolbox";
import type { ProjectData, ServerEvent } from "./types";
import { outline, View } from "./view";

const WARNING_MS = 12_000;

const voice: Voice = {
  say(sentence) {
    byId("say").textContent = sentence;
  },
  warn(sentence) {
    const text = printable(sentence, 400);
    const warnings = byId("warnings");
    for (const same of [...warnings.children]) if (same.firstChild?.textContent === text) same.remove();
    const close = element("button", { className: "icon" }, [icon("close")]);
    close.setAttribute("aria-label", "Close the message");
    const warning = element("div", { className: "warning" }, [
      element("span", { text }),
      close,
    ]);
    const gone = (): void => warning.remove();
    close.addEventListener("click", gone);
    setTimeout(gone, WARNING_MS);
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

class Page implements Actions {
  private readonly live = new Live(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/live`);
  readonly store = new Store();
  private readonly saver = new Saver(this.live, this.store);
  private readonly decoder: ChoosingDecoder;
  readonly editor: Editor;
  readonly view = new View(byId("stage"), byId<HTMLCanvasElement>("base"), byId<HTMLCanvasElement>("top"), this.store);
  readonly voice = voice;
  private readonly images = new Images();
  private readonly pixels = new Pixels();
  readonly panel: Panel;
  private readonly browser: Browser;
  private readonly conflicts: Conflicts;
  private readonly training = new TrainDialog(voice);
  private readonly exporting = new ExportDialog(() => this.saver.unsaved);
  readonly toolbox: Toolbox;
  readonly assistance: Assistance;
  private readonly clip: boolean;

  /** The image that is shown or about to be. */
  private target = -1;
  private targetStale = false;
  private pixelsShown = "";
  private pictureTimer = 0;
  private wasOnline = false;
  private names = new Map<number, string>();
  private diagnosis = 0;
  private recounted = new Set<number>();
  private recounting = 0;
  private clickedAt = 0;

  constructor(private readonly project: ProjectData) {
    this.clip = project.kind === "clip";
    this.decoder = new ChoosingDecoder(new ServerDecoder(this.live), project.assist);
    this.editor = new Editor(this.store, this.saver, this.decoder, voice);
    this.panel = new Panel(this.store, this.editor, this.view, voice);
    this.editor.user = project.user;
    this.browser = new Browser(this.images, this.clip, (image) => void this.open(image), voice);
    this.conflicts = new Conflicts(
      this.store,
      this.editor,
      this.view,
      (image) => void this.open(image),
      () => this.showStatus(),
    );
    this.assistance = new Assistance(project, this.live, this.store, this.saver, this.decoder, voice);
    this.toolbox = new Toolbox({
      store: this.store,
      view: this.view,
      editor: this.editor,
      voice,
      assisted: () => this.assistance.ready,
      pick: (at) => this.pick(at),
    });
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
    this.toolbox.input.onPointer = (at) => {
      const inside = at && at[0] >= 0 && at[1] >= 0 && at[0] < store.width && at[1] < store.height;
      setText("cursor", inside ? `${Math.floor(at[0])}, ${Math.floor(at[1])}` : "");
    };
    this.panel.setClasses(project.classes);
    this.assistance.onChange = () => this.showHint();
    this.toolbox.onChange = () => {
      this.showExtras();
      this.showHint();
    };
    this.toolbox.show();
    this.makeControls();
    const commands = commandsOf(this);
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
    if (image === this.target) {
      this.browser.show(image); // after an image that could not be opened
      return;
    }
    this.toolbox.input.drop();
    this.editor.clearPreview();
    this.target = image;
    performance.clearMeasures();
    performance.clearMarks();
    this.targetStale = false;
    byId("busy").hidden = false;
    this.browser.show(image);
    this.decoder.open(image);
    this.assistance.open(image);
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

  async go(by: number): Promise<void> {
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
      case "no-assist":
        this.assistance.told(event);
        if (event.event === "embedded") this.decoder.ready(event.image);
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
    this.assistance.show();
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
    const extras = [this.conflicts, this.toolbox.tool, this.toolbox.input];
    if (preview) {
      const shape = Shape.of(preview.bitmap, { id: "", label: this.editor.label, made: [] });
      const color = this.view.colorOf(this.store.current ?? shape);
      this.view.extras = [outline(shape, color, 0.3), ...extras];
    } else this.view.extras = extras;
    this.view.touch();
  }

  private showHint(): void {
    const idle = !this.store.selected.size && !this.toolbox.tool.begun;
    byId<HTMLButtonElement>("finish").disabled = byId<HTMLButtonElement>("drop").disabled = idle;
    setText("hint", this.toolbox.tool.hint());
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
    performance.measure("click-to-visible", { start: this.clickedAt, detail: { drawing: this.view.began } });
    this.clickedAt = 0;
    byId("stage").dataset["took"] = took.toFixed(1);
  }

  private makeControls(): void {
    const { view } = this;
    onClick("previous", () => void this.go(-1));
    onClick("next", () => void this.go(1));
    onClick("done", () => this.editor.setDone(!this.store.done));
    onClick("undo", () => this.undo());
    onClick("redo", () => this.editor.redo());
    onClick("help", () => byId<HTMLDialogElement>("help-dialog").showModal());
    onClick("finish", () => this.enter());
    onClick("drop", () => this.escape());
    onClick("zoom-in", () => view.zoomAt(1.4));
    onClick("zoom-out", () => view.zoomAt(1 / 1.4));
    onClick("fit", () => view.fit());
    onClick("visible", () => this.toggleMasks());
    byId<HTMLInputElement>("opacity").addEventListener("input", (event) => {
      view.opacity = Number((event.target as HTMLInputElement).value) / 100;
      view.redraw();
    });
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

  toggleMasks(): void {
    this.view.visible = !this.view.visible;
    setPressed(byId("visible"), this.view.visible);
    this.view.redraw();
    voice.say(this.view.visible ? "Masks are shown" : "Masks are hidden");
  }

  undo(): void {
    if (!this.toolbox.tool.stepBack()) this.editor.undo();
  }

  escape(): void {
    if (this.toolbox.input.drop()) return;
    this.editor.clearPreview();
    this.editor.deselect();
  }

  enter(): void {
    if (this.toolbox.tool.finish()) return;
    this.editor.accept(false);
    this.editor.deselect();
    voice.say("Ready for the next object");
  }
}

/** The value if it comes within some milliseconds, otherwise null. Failures are left to the next who asks. */
function soon<T>(promise: Promise<T>, milliseconds: number): Promise<T | null> {
  return Promise.race([
    promise.catch(() => null),
    new Promise<null>((resolve) => setTimeout(() => resolve(null), milliseconds)),
  ]);
}

void start();
