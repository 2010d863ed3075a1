/** Undo and redo without limit: entries that were done, and entries that were taken back. */
export class History<T> {
  private past: T[] = [];
  private future: T[] = [];

  /** Record what was done; what had been taken back before is forgotten. */
  push(entry: T): void {
    this.past.push(entry);
    this.future = [];
  }

  get undoable(): T | undefined {
    return this.past.at(-1);
  }

  get redoable(): T | undefined {
    return this.future.at(-1);
  }

  /** The last entry, which is now taken back. */
  undo(): T | undefined {
    const entry = this.past.pop();
    if (entry !== undefined) this.future.push(entry);
    return entry;
  }

  /** The entry that was taken back last, which is now done again. */
  redo(): T | undefined {
    const entry = this.future.pop();
    if (entry !== undefined) this.past.push(entry);
    return entry;
  }

  /** Forget the entries of which `gone` is true, because the server refused them. */
  drop(gone: (entry: T) => boolean): void {
    this.past = this.past.filter((entry) => !gone(entry));
    this.future = this.future.filter((entry) => !gone(entry));
  }
}
