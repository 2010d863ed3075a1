/**
 * What people do with masks: every tool ends here. All of them change one and the same mask, the one of the object in
 * work, and every change is an action that is saved and can be undone.
 */

import * as bits from "./bitmap";
import type { Bitmap } from "./bitmap";
import type { Answer, Decoder } from "./decoder";
import { History } from "./history";
import { Unanswered } from "./live";
import { decode } from "./rle";
import { type Action, type Conflict, type Delta, inverse, type Saver } from "./saver";
import { madeAlso, newId, Shape, type Store } from "./store";
import type { How, Point, PromptPoint } from "./types";

/** Whether a box, a polygon or a stroke makes a new object, or changes the one in work. */
export type Mode = "new" | "add" | "subtract";

/** Clicks that led to a mask, so that the next click refines it instead of starting again. */
interface Session {
  points: PromptPoint[];
  box: [number, number, number, number] | null;
  /** The mask was also changed by hand; answers are applied around the click only. */
  byHand: boolean;
}

/** The mask that a click at a point would take. */
export interface Preview {
  x: number;
  y: number;
  /** The mask that the click would change, as its RLE; null for a new object. */
  from: string | null;
  bitmap: Bitmap;
}

export interface Voice {
  /** For the status line and screen readers. */
  say(sentence: string): void;
  /** Shown until read: something was refused or went wrong. */
  warn(sentence: string): void;
}

export class Editor {
  user = "";
  /** Class of new objects. */
  label: number | null = null;
  onHistory: () => void = () => {};
  /** The mask that is drawn as a preview, or null. */
  onPreview: (preview: Preview | null) => void = () => {};
  preview: Preview | null = null;
  /** Clicks whose mask is computed now. */
  waiting: PromptPoint[] = [];

  private histories = new Map<number, History<Action>>();
  private sessions = new Map<string, Map<string, Session>>();
  private queue: Promise<void> = Promise.resolve();
  /** Clicks and boxes that are computed now. */
  private tasks = 0;
  private hovering = false;
  private nextHover: [x: number, y: number, fresh: boolean] | null = null;
  private hoverRound = 0;

  constructor(
    readonly store: Store,
    private readonly saver: Saver,
    private readonly decoder: Decoder,
    private readonly voice: Voice,
  ) {}

  // --- actions and their history ---------------------------------------------------------------------------------

  get history(): History<Action> {
    let history = this.histories.get(this.store.image);
    if (!history) this.histories.set(this.store.image, (history = new History()));
    return history;
  }

  private act(what: string, deltas: Delta[], rest: Partial<Action> = {}): void {
    const action: Action = { image: this.store.image, what, deltas, ...rest };
    this.history.push(action);
    this.saver.submit(action);
    this.onHistory();
  }

  /** Actions that the server refused are not to be undone. */
  forget(actions: Action[]): void {
    const gone = new Set(actions);
    for (const history of this.histories.values()) history.drop((entry) => gone.has(entry));
    this.onHistory();
  }

  undo(): void {
    this.again("undo");
  }

  redo(): void {
    this.again("redo");
  }

  private again(way: "undo" | "redo"): void {
    const { history } = this;
    const entry = way === "undo" ? history.undoable : history.redoable;
    if (!entry) {
      this.voice.say(`Nothing to ${way} in this image`);
      return;
    }
    const action = way === "undo" ? inverse(entry) : entry;
    const foreign = action.deltas.some(({ id, before }) => {
      const now = this.store.objects.get(id) ?? null;
      return before ? !now || !before.same(now.data) : now !== null;
    });
    if (foreign) {
      history.drop((other) => other === entry);
      this.voice.warn(`Cannot ${way} "${entry.what}": someone else has changed the object since`);
    } else {
      history[way]();
      this.clearPreview();
      // A copy, so that a refusal of this sending can be told from the first.
      const sent = { ...action, what: `${way}: ${entry.what}` };
      this.saver.submit(sent);
      this.store.select(action.deltas.filter(({ after }) => after).map(({ id }) => id));
      this.voice.say(`${way === "undo" ? "Undone" : "Redone"}: ${entry.what}`);
    }
    this.onHistory();
  }

  // --- one mask ----------------------------------------------------------------------------------------------------

  /** Give the object in work a new mask; without one a new object appears. An empty mask removes the object. */
  commit(bitmap: Bitmap, how: How, what: string, fresh = false): Shape | null {
    const { store } = this;
    const before = fresh ? undefined : store.current;
    if (bits.isEmpty(bitmap)) {
      if (before) this.remove([before.id]);
      return null;
    }
    const shape = Shape.of(bits.crop(bitmap, bitmap), {
      id: before?.id ?? newId(),
      label: before ? before.label : this.label,
      made: madeAlso(before?.data.made ?? [], this.user, how),
      track: before?.data.track,
    });
    if (before?.same(shape.data)) return before;
    const suggestion = before && store.suggestions.get(before.id);
    this.act(what, [
      {
        id: shape.id,
        before: suggestion ? null : (before ?? null),
        after: shape,
        ...(suggestion ? { suggestion } : {}),
      },
    ]);
    store.select([shape.id]);
    return store.current ?? shape;
  }

  private session(shape: Shape | undefined): Session {
    if (!shape) return { points: [], box: null, byHand: false };
    const known = this.sessions.get(shape.id)?.get(shape.data.rle.counts);
    if (known) return known;
    if (shape.data.box_only) {
      const { x, y, w, h } = shape.bounds;
      return { points: [], box: [x, y, x + w, y + h], byHand: false };
    }
    return { points: [], box: null, byHand: true };
  }

  private remember(shape: Shape, session: Session): void {
    let sessions = this.sessions.get(shape.id);
    if (!sessions) this.sessions.set(shape.id, (sessions = new Map()));
    sessions.set(shape.data.rle.counts, session);
  }

  /** A brush stroke, a polygon, or another region, put into or taken out of the object in work. */
  region(region: Bitmap, how: How, mode: Mode): void {
    const current = mode === "new" ? undefined : this.store.current;
    this.clearPreview();
    if (!current) {
      if (mode === "subtract") {
        this.voice.say("Select an object first");
        return;
      }
      if (bits.isEmpty(region)) this.voice.say("Nothing was drawn");
      else this.tell(this.commit(region, how, how, true));
      return;
    }
    const before = current.bitmap();
    const after = mode === "add" ? bits.union(before, region) : bits.subtract(before, region);
    this.tell(this.commit(after, how, how));
  }

  private tell(shape: Shape | null): void {
    if (shape) this.voice.say(`Mask of ${shape.area.toLocaleString()} pixels`);
  }

  // --- the assistant -----------------------------------------------------------------------------------------------

  /**
   * A click for or against the object in work, or with `fresh` on a new one. Clicks wait for one another. A mask shown
   * for a place at most `within` image pixels away is taken as it is.
   */
  click(x: number, y: number, positive: boolean, within: number, fresh = false): Promise<void> {
    const { store } = this;
    const { preview } = this;
    const image = store.image;
    const point: PromptPoint = [x, y, positive ? 1 : 0];
    if (fresh) store.select([]);
    if (!positive && !store.current && !this.waiting.length) {
      this.voice.say("Click on an object first; background clicks take away from it");
      return Promise.resolve();
    }
    const shown =
      positive && preview && Math.hypot(preview.x - x, preview.y - y) <= within && !this.waiting.length
        ? preview
        : null;
    this.stopHover();
    if (shown && shown.from === (store.current?.data.rle.counts ?? null)) {
      // The mask that was seen is the mask that is taken.
      this.take([preview!.x, preview!.y, 1], shown.bitmap);
      return Promise.resolve();
    }
    this.waiting = [...this.waiting, point];
    this.onPreview(null);
    return this.inTurn(async () => {
      try {
        if (store.image !== image) return;
        if (fresh) store.select([]);
        for (let tries = 0; tries < 3; tries++) {
          const current = store.current;
          const asked = performance.now();
          const answer = await this.decoder.mask(this.prompt(current, point), false);
          const { ms, stages } = answer;
          performance.measure("click-answer", { start: asked, detail: { ms, stages } });
          if (store.image !== image) return;
          // What was asked about must still be there; someone else, or an undo, may have changed it meanwhile.
          if (store.current?.data.rle.counts !== current?.data.rle.counts) continue;
          this.take(point, this.combined(current, answer, point));
          performance.mark("click-taken");
          return;
        }
        this.voice.say("The object changed meanwhile; click again");
      } finally {
        this.waiting = this.waiting.filter((other) => other !== point);
        this.onPreview(this.preview);
      }
    });
  }

  private prompt(current: Shape | undefined, point: PromptPoint) {
    const { points, box } = this.session(current);
    // A box that stands for a mask that nobody has drawn is a prompt, but no mask to improve.
    const rle = current && !current.data.box_only ? current.data.rle : null;
    return { image: this.store.image, points: [...points, point], box, rle };
  }

  private combined(current: Shape | undefined, answer: Answer, [x, y, positive]: PromptPoint): Bitmap {
    const mask = bits.fromRuns(decode(answer.rle));
    if (!current || !this.session(current).byHand) return mask;
    return bits.applyClick(current.bitmap(), mask, x, y, positive === 1);
  }

  private take(point: PromptPoint, bitmap: Bitmap): void {
    const current = this.store.current;
    const session = this.session(current);
    if (bits.isEmpty(bitmap) && !current) {
      this.voice.say("No object was found there");
      return;
    }
    const shape = this.commit(bitmap, "click", "click");
    if (!shape) return;
    if (current && shape.data.rle.counts === current.data.rle.counts) {
      this.voice.say("The click changes nothing; brush and eraser change every pixel");
      return;
    }
    this.remember(shape, { ...session, points: [...session.points, point] });
    this.tell(shape);
  }

  /** The object in a box; without an assistant the box itself. */
  box(x0: number, y0: number, x1: number, y1: number, mode: Mode, assisted: boolean): Promise<void> {
    const { store } = this;
    const image = store.image;
    const box: [number, number, number, number] = [
      Math.min(x0, x1),
      Math.min(y0, y1),
      Math.max(x0, x1),
      Math.max(y0, y1),
    ];
    const corners: Point[] = [
      [box[0], box[1]],
      [box[2], box[1]],
      [box[2], box[3]],
      [box[0], box[3]],
    ];
    this.stopHover();
    if (!assisted) {
      this.region(bits.polygon(store.width, store.height, corners), "box", mode);
      return Promise.resolve();
    }
    return this.inTurn(async () => {
      const answer = await this.decoder.mask({ image, points: [], box, rle: null }, false);
      if (store.image !== image) return;
      const mask = bits.fromRuns(decode(answer.rle));
      if (mode !== "new" && store.current) {
        this.region(mask, "box", mode);
      } else if (bits.isEmpty(mask)) {
        this.voice.say("No object was found in the box");
      } else {
        const shape = this.commit(mask, "box", "box", true);
        if (shape) this.remember(shape, { points: [], box, byHand: false });
        this.tell(shape);
      }
    });
  }

  /** Select nothing, so that the next click starts a new object; after the clicks that are computed now. */
  deselect(): void {
    if (this.tasks) void this.inTurn(async () => this.store.select([]));
    else this.store.select([]);
  }

  private inTurn(work: () => Promise<void>): Promise<void> {
    this.tasks++;
    this.queue = this.queue
      .then(work)
      .catch((error: unknown) => {
        if (error instanceof Unanswered)
          this.voice.warn("The server is not connected; the brush and the polygon still work");
        else this.voice.warn(error instanceof Error ? error.message : String(error));
      })
      .finally(() => this.tasks--);
    return this.queue;
  }

  /** Ask for the mask that a click at a point would take, and show it. One question at a time, the newest next. */
  hover(x: number, y: number, fresh = false): void {
    this.nextHover = [x, y, fresh];
    if (!this.hovering) void this.hoverNow();
  }

  private async hoverNow(): Promise<void> {
    const { store } = this;
    this.hovering = true;
    try {
      while (this.nextHover) {
        const [x, y, fresh] = this.nextHover;
        this.nextHover = null;
        const round = this.hoverRound;
        const { image } = store;
        const shown = store.current?.data.rle.counts;
        const current = fresh ? undefined : store.current;
        const point: PromptPoint = [x, y, 1];
        const answer = await this.decoder.mask(this.prompt(current, point), true);
        if (round !== this.hoverRound || image !== store.image || store.current?.data.rle.counts !== shown) continue;
        this.preview = { x, y, from: current?.data.rle.counts ?? null, bitmap: this.combined(current, answer, point) };
        this.onPreview(this.preview);
      }
    } catch {
      // The click itself will say what is wrong.
      this.clearPreview();
    } finally {
      this.hovering = false;
    }
  }

  private stopHover(): void {
    this.nextHover = null;
    this.hoverRound++;
    this.clearPreview();
  }

  clearPreview(): void {
    this.hoverRound++;
    this.nextHover = null;
    if (!this.preview) return;
    this.preview = null;
    this.onPreview(null);
  }

  // --- whole objects -----------------------------------------------------------------------------------------------

  private chosen(): Shape[] {
    return [...this.store.selected]
      .map((id) => this.store.get(id))
      .filter((shape): shape is Shape => shape !== undefined);
  }

  private count(n: number): string {
    return n === 1 ? "object" : `${n} objects`;
  }

  /** Delete objects; dismiss suggestions. */
  remove(ids: Iterable<string> = [...this.store.selected]): void {
    const deltas: Delta[] = [];
    const dismissed: Shape[] = [];
    for (const id of ids) {
      const object = this.store.objects.get(id);
      const suggestion = this.store.suggestions.get(id);
      if (object) deltas.push({ id, before: object, after: null });
      else if (suggestion) dismissed.push(suggestion);
    }
    if (!deltas.length && !dismissed.length) {
      this.voice.say("Nothing is selected");
      return;
    }
    this.clearPreview();
    const what = deltas.length
      ? `delete ${this.count(deltas.length)}`
      : `dismiss ${dismissed.length === 1 ? "suggestion" : `${dismissed.length} suggestions`}`;
    this.act(what, deltas, dismissed.length ? { dismissed: { shapes: dismissed, value: true } } : {});
    this.voice.say(`Done: ${what}`);
  }

  /** Give the selected objects a class; without a selection it is the class of the next object. */
  classify(label: number | null, name: string): void {
    this.label = label;
    const shapes = this.chosen().filter((shape) => shape.label !== label);
    if (!this.store.selected.size) {
      this.voice.say(`New objects are ${name}`);
      return;
    }
    if (shapes.length) {
      this.act(
        `class ${name}`,
        shapes.map((shape): Delta => {
          const suggestion = this.store.suggestions.get(shape.id);
          const after = shape.with({
            label,
            ...(suggestion ? { made: madeAlso(shape.data.made, this.user, "suggestion") } : {}),
          });
          return suggestion
            ? { id: shape.id, before: null, after, suggestion }
            : { id: shape.id, before: shape, after };
        }),
      );
    }
    this.voice.say(`Class of ${this.count(this.store.selected.size)}: ${name}`);
  }

  /** Accept the selected suggestions, or all of them. */
  accept(all: boolean): boolean {
    const { suggestions, selected } = this.store;
    const shapes = [...suggestions.values()].filter((shape) => all || selected.has(shape.id));
    if (!shapes.length) {
      if (all) this.voice.say("There are no suggestions");
      return false;
    }
    this.clearPreview();
    this.act(
      shapes.length === 1 ? "accept suggestion" : `accept ${shapes.length} suggestions`,
      shapes.map((shape): Delta => {
        const made = madeAlso(shape.data.made, this.user, "suggestion");
        return {
          id: shape.id,
          before: null,
          after: shape.with({ made, label: shape.label ?? this.label }),
          suggestion: shape,
        };
      }),
    );
    this.voice.say(shapes.length === 1 ? "Suggestion accepted" : `${shapes.length} suggestions accepted`);
    return true;
  }

  dismissAll(): void {
    this.remove([...this.store.suggestions.keys()]);
  }

  /** Make one object of the selected ones; the first keeps its name and class. */
  merge(): void {
    const shapes = this.chosen();
    const [first, ...others] = shapes;
    if (!first || !others.length) {
      this.voice.say("Select two or more objects to merge (Shift+click)");
      return;
    }
    const bitmap = others.reduce((mask, shape) => bits.union(mask, shape.bitmap()), first.bitmap());
    const made = madeAlso(first.data.made, this.user, "merge");
    const after = Shape.of(bitmap, { id: first.id, label: first.label, made, track: first.data.track });
    const dismissed = others.filter(({ id }) => this.store.suggestions.has(id));
    const suggestion = this.store.suggestions.get(first.id);
    this.act(
      `merge ${shapes.length} objects`,
      [
        { id: first.id, before: suggestion ? null : first, after, ...(suggestion ? { suggestion } : {}) },
        ...others
          .filter(({ id }) => this.store.objects.has(id))
          .map((shape): Delta => ({ id: shape.id, before: shape, after: null })),
      ],
      dismissed.length ? { dismissed: { shapes: dismissed, value: true } } : {},
    );
    this.store.select([first.id]);
    this.voice.say(`${shapes.length} objects merged`);
  }

  /** Make an object of every connected part, or of the parts on both sides of a line. */
  split(line?: readonly Point[]): void {
    const current = this.store.current;
    if (!current) {
      this.voice.say("Select the object to split");
      return;
    }
    const bitmap = current.bitmap();
    const pieces = line ? bits.cut(bitmap, line) : bits.parts(bitmap);
    const [largest, ...rest] = pieces;
    if (!largest || !rest.length) {
      this.voice.say(
        line ? "The line does not cut the object in two" : "The object has only one part; draw a line to split it",
      );
      return;
    }
    const made = madeAlso(current.data.made, this.user, "split");
    const suggestion = this.store.suggestions.get(current.id);
    const deltas: Delta[] = [
      {
        id: current.id,
        before: suggestion ? null : current,
        after: Shape.of(largest, { id: current.id, label: current.label, made, track: current.data.track }),
        ...(suggestion ? { suggestion } : {}),
      },
      ...rest.map((piece): Delta => {
        const id = newId();
        return { id, before: null, after: Shape.of(piece, { id, label: current.label, made }) };
      }),
    ];
    this.act(`split into ${pieces.length}`, deltas);
    this.store.select(deltas.map(({ id }) => id));
    this.voice.say(`Split into ${pieces.length} objects`);
  }

  setDone(value: boolean): void {
    if (value === this.store.done) return;
    this.act(value ? "mark as done" : "mark as not done", [], { done: { before: this.store.done, after: value } });
    this.voice.say(value ? "Marked as done" : "Marked as not done");
  }

  /** Decide a conflict: my mask over theirs, or as another object. Theirs alone needs nothing. */
  settle(conflict: Conflict, way: "mine" | "both"): void {
    const now = this.store.objects.get(conflict.id) ?? null;
    const id = way === "mine" ? conflict.id : newId();
    const { revision: _, ...data } = conflict.mine.data;
    const after = new Shape({ ...data, id });
    this.act(way === "mine" ? "use my version" : "keep both versions", [
      { id, before: way === "mine" ? now : null, after },
    ]);
    this.store.select([id]);
  }
}
