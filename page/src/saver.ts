/**
 * Changes on their way to the disk. An action is shown at once and sent in order, one at a time; it counts as saved when
 * the server has answered. What a broken connection leaves unanswered is sent again. A change of an object that someone
 * else has changed meanwhile is not sent over theirs: it is put aside as a conflict for the person to decide.
 */

import { api } from "./api";
import { type Live, Unanswered } from "./live";
import type { Shape, Store } from "./store";
import type { Edit, ImageObjects, ObjectData } from "./types";

/** How one object changes; null means that it does not exist. */
export interface Delta {
  id: string;
  before: Shape | null;
  after: Shape | null;
  /** The suggestion that an accepted object comes from. */
  suggestion?: Shape;
}

export interface Action {
  image: number;
  /** For people, as in "Undo: brush". */
  what: string;
  deltas: Delta[];
  done?: { before: boolean; after: boolean };
  /** Suggestions removed (or with value false brought back). */
  dismissed?: { shapes: Shape[]; value: boolean };
}

/** What one person wanted (`mine`) of an object that another has changed to `theirs`. */
export interface Conflict {
  image: number;
  id: string;
  mine: Shape;
  theirs: Shape | null;
}

interface Pending {
  action: Action;
  request: number;
  /** Revisions that the changes start from; completed when earlier changes are saved. */
  was: Map<string, number>;
  /** Sent, and the connection broke before the answer. */
  uncertain: boolean;
}

export function inverse(action: Action): Action {
  return {
    image: action.image,
    what: action.what,
    deltas: action.deltas.map(({ before, after, ...rest }) => ({ ...rest, before: after, after: before })),
    ...(action.done ? { done: { before: action.done.after, after: action.done.before } } : {}),
    ...(action.dismissed ? { dismissed: { ...action.dismissed, value: !action.dismissed.value } } : {}),
  };
}

export class Saver {
  onStatus: () => void = () => {};
  /** Actions that the server refused, with those that build on them; `why` is its sentence, or null for a conflict. */
  onRefused: (actions: Action[], why: string | null) => void = () => {};
  onConflict: (conflicts: Conflict[]) => void = () => {};
  /** Whether numbers still mean the same images after a reconnection; the server may have been started anew. */
  isSame: (images: number[]) => Promise<boolean> = async () => true;
  /** The server has other images now: nothing is sent any more, because it could reach the wrong ones. */
  stopped = false;

  private queue: Pending[] = [];
  private busy = false;
  private recovering = false;
  private versions = new Map<number, number>();

  constructor(
    private readonly live: Live,
    private readonly store: Store,
  ) {}

  /** Number of actions that are not on the disk yet. */
  get unsaved(): number {
    return this.queue.length;
  }

  /** Resolves when everything is on the disk, so that the server can be asked about it. */
  async settled(): Promise<void> {
    while (this.queue.length) {
      if (this.live.connection !== "online" || this.stopped) throw new Unanswered("offline");
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  /** Show an action and save it. */
  submit(action: Action): void {
    const was = new Map<string, number>();
    for (const { id, before } of action.deltas) {
      // What is shown has the newest revision; a shape from the history has the one of its time.
      const revision =
        (action.image === this.store.image && this.store.objects.get(id)?.data.revision) || before?.data.revision;
      if (before && !this.waits(action.image, id)) was.set(id, revision ?? 0);
    }
    this.show(action);
    this.queue.push({ action, request: this.live.number(), was, uncertain: false });
    this.onStatus();
    void this.pump();
  }

  /** Whether a change of the object is not saved yet. */
  waits(image: number, id: string): boolean {
    return this.queue.some(({ action }) => action.image === image && action.deltas.some((delta) => delta.id === id));
  }

  /** Read the image that is shown and add what is not saved yet. */
  async load(image: number): Promise<void> {
    const data = await api.objects(image);
    if (this.store.image === image) this.enter(data);
  }

  /** The connection is there: read again what was missed, and send again what was not answered. */
  async recover(): Promise<void> {
    if (this.recovering || this.stopped) return;
    this.recovering = true;
    try {
      const images = new Set(this.queue.map(({ action }) => action.image));
      if (this.store.image >= 0) images.add(this.store.image);
      if (!(await this.isSame([...images]))) {
        this.stopped = true;
        this.onStatus();
        return;
      }
      const head = this.queue[0];
      if (head?.uncertain) {
        const data = await api.objects(head.action.image);
        if (applied(head.action, data)) this.saved(head, data.objects, data.version);
        else head.uncertain = false;
      }
      if (this.store.image >= 0) await this.load(this.store.image);
    } catch {
      // Without an answer over HTTP the next try follows soon; edits are kept.
      if (this.live.connection === "online") setTimeout(() => void this.recover(), 1000);
      return;
    } finally {
      this.recovering = false;
    }
    void this.pump();
  }

  /** Take changes of other people, except of objects whose own change is on its way: its answer will tell. */
  changed(image: number, version: number, objects: ObjectData[], removed: string[], make: (data: ObjectData) => Shape) {
    this.versions.set(image, version);
    if (image !== this.store.image) return;
    this.store.version = version;
    const changes = new Map<string, Shape | null>();
    for (const id of removed) if (!this.waits(image, id)) changes.set(id, null);
    for (const object of objects) if (!this.waits(image, object.id)) changes.set(object.id, make(object));
    this.store.put(changes);
  }

  private show(action: Action): void {
    const { store } = this;
    if (action.image !== store.image) return;
    if (action.done) store.setDone(action.done.after);
    if (action.deltas.length) {
      const changes = action.deltas.map(({ id, before, after }) => {
        // The newest revision is kept, whichever the shape had when it was made.
        const revision = (store.objects.get(id) ?? before)?.data.revision;
        return [id, after && revision !== undefined ? after.with({ revision }) : after] as const;
      });
      store.put(changes);
      const back = action.deltas.filter(({ after, suggestion }) => !after && suggestion);
      if (back.length) store.putSuggestions(back.map(({ id, suggestion }) => [id, suggestion!]));
    }
    if (action.dismissed) {
      const { shapes, value } = action.dismissed;
      store.putSuggestions(shapes.map((shape) => [shape.id, value ? null : shape]));
    }
  }

  /** Show the server's state of an image, with what is not saved yet on top. */
  enter(data: ImageObjects): void {
    this.versions.set(data.id, data.version);
    this.store.load(data);
    for (const { action } of this.queue) this.show(action);
  }

  private async pump(): Promise<void> {
    if (this.busy || this.stopped) return;
    this.busy = true;
    try {
      while (this.queue.length && this.live.connection === "online" && !this.recovering) {
        const pending = this.queue[0]!;
        if (pending.uncertain) break;
        await this.send(pending);
      }
    } finally {
      this.busy = false;
    }
    this.onStatus();
  }

  private async send(pending: Pending): Promise<void> {
    const { action, request, was } = pending;
    const message = {
      op: "edit",
      image: action.image,
      base: this.versions.get(action.image) ?? 0,
      edits: editsOf(action, was),
      what: action.what.slice(0, 60),
    };
    try {
      const event = await this.live.ask(message, { request });
      if (event.event === "saved") this.saved(pending, event.objects, event.version);
      else if (event.event === "conflict") await this.conflict(pending);
      else this.refuse(pending, "unexpected answer of the server");
    } catch (error) {
      if (error instanceof Unanswered) pending.uncertain = true;
      else this.refuse(pending, error instanceof Error ? error.message : String(error));
    }
  }

  private saved(pending: Pending, objects: ObjectData[], version: number): void {
    const { image, deltas } = pending.action;
    this.queue = this.queue.filter((other) => other !== pending);
    this.versions.set(image, version);
    const revisions = new Map(objects.map(({ id, revision }) => [id, revision ?? 0]));
    for (const { id } of deltas) {
      const revision = revisions.get(id);
      if (revision === undefined) continue;
      for (const later of this.queue) {
        if (later.action.image === image && later.action.deltas.some((delta) => delta.id === id && delta.before)) {
          later.was.set(id, revision);
          break;
        }
      }
      if (image === this.store.image) this.store.revise(id, revision);
    }
    if (image === this.store.image) this.store.version = version;
    this.onStatus();
  }

  /** Take an action out of the queue, with all later ones that build on it. */
  private takeOut(pending: Pending): Action[] {
    const { image } = pending.action;
    const touched = new Set(pending.action.deltas.map(({ id }) => id));
    const gone = new Set([pending]);
    for (const later of this.queue) {
      if (later.action.image !== image || !later.action.deltas.some(({ id }) => touched.has(id))) continue;
      gone.add(later);
      for (const { id } of later.action.deltas) touched.add(id);
    }
    this.queue = this.queue.filter((other) => !gone.has(other));
    return [...gone].map(({ action }) => action);
  }

  private async conflict(pending: Pending): Promise<void> {
    const actions = this.takeOut(pending);
    const { image } = pending.action;
    const wanted = new Map<string, Shape>();
    for (const action of actions) {
      for (const { id, after } of action.deltas) {
        if (after) wanted.set(id, after);
        else wanted.delete(id);
      }
    }
    this.onRefused(actions, null);
    let data: ImageObjects;
    try {
      data = await api.objects(image);
    } catch {
      data = { id: image, version: 0, size: [0, 0], done: false, objects: [], suggestions: [] };
    }
    if (data.version && this.store.image === image) this.enter(data);
    const now = new Map(data.objects.map((object) => [object.id, object]));
    const conflicts: Conflict[] = [];
    for (const [id, mine] of wanted) {
      const theirs = now.get(id);
      if (theirs && mine.same(theirs)) continue;
      const shown = this.store.image === image ? this.store.objects.get(id) : undefined;
      conflicts.push({ image, id, mine, theirs: shown ?? null });
    }
    this.onConflict(conflicts);
  }

  private refuse(pending: Pending, why: string): void {
    const actions = this.takeOut(pending);
    this.onRefused(actions, why);
    if (this.store.image === pending.action.image) void this.load(this.store.image).catch(() => {});
    this.onStatus();
  }
}

function editsOf(action: Action, was: Map<string, number>): Edit[] {
  const edits: Edit[] = action.deltas.map(({ id, before, after }): Edit => {
    if (!after) return { do: "remove", id, was: was.get(id) ?? 0 };
    const { label, rle, made, track } = after.data;
    const object = { id, label, rle, made, ...(track === undefined ? {} : { track }) };
    return before ? { do: "replace", id, object, was: was.get(id) ?? 0 } : { do: "add", object };
  });
  if (action.done) edits.push({ do: "done", value: action.done.after });
  if (action.dismissed) {
    const { shapes, value } = action.dismissed;
    edits.push({ do: "dismiss", ids: shapes.map(({ id }) => id), value });
  }
  return edits;
}

/** Whether the server's state is already what the action makes of it. */
function applied(action: Action, data: ImageObjects): boolean {
  const now = new Map(data.objects.map((object) => [object.id, object]));
  if (action.done && data.done !== action.done.after) return false;
  if (action.dismissed) return false; // harmless to repeat
  return action.deltas.every(({ id, after }) => {
    const object = now.get(id);
    return after ? object !== undefined && after.same(object) : object === undefined;
  });
}
