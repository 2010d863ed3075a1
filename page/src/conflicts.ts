/** Objects that two people changed at the same time: theirs is shown, mine is kept until the person decides. */

import { byId, onClick } from "./dom";
import type { Editor } from "./editor";
import type { Conflict } from "./saver";
import type { Store } from "./store";
import { type Extra, outline, type View } from "./view";

const COLOR = "#ff3d8b";

export class Conflicts implements Extra {
  private open: Conflict[] = [];

  constructor(
    private readonly store: Store,
    private readonly editor: Editor,
    private readonly view: View,
    private readonly go: (image: number) => void,
    private readonly onCount: () => void,
  ) {
    onClick("conflict-theirs", () => this.settle("theirs"));
    onClick("conflict-mine", () => this.settle("mine"));
    onClick("conflict-both", () => this.settle("both"));
  }

  get count(): number {
    return this.open.length;
  }

  add(conflicts: Conflict[]): void {
    this.open.push(...conflicts);
    this.update();
    if (conflicts.length) byId("conflict-theirs").focus();
  }

  private settle(way: "mine" | "theirs" | "both"): void {
    const conflict = this.open[0];
    if (!conflict) return;
    if (conflict.image !== this.store.image) {
      this.go(conflict.image);
      return;
    }
    this.open.shift();
    if (way !== "theirs") this.editor.settle(conflict, way);
    this.update();
    byId(this.open.length ? "conflict-theirs" : "stage").focus();
  }

  /** Show the first conflict, or none; also called when another image is shown. */
  update(): void {
    const [conflict] = this.open;
    byId("conflicts").hidden = !conflict;
    if (conflict) {
      const here = conflict.image === this.store.image;
      const gone = here && !this.store.objects.has(conflict.id);
      const more = this.open.length > 1 ? ` (${this.open.length} objects)` : "";
      byId("conflict-text").textContent = !here
        ? `An object of another image was changed by someone else while you changed it${more}. Your version is kept.`
        : gone
          ? `Someone else deleted an object while you changed it${more}. Your version is kept, outlined in pink.`
          : `Someone else changed an object at the same time${more}. Theirs is shown, yours is outlined in pink.`;
      byId("conflict-theirs").textContent = !here ? "Show it" : gone ? "Leave it deleted" : "Keep theirs";
      byId("conflict-mine").hidden = !here;
      byId("conflict-mine").textContent = gone ? "Bring mine back" : "Use mine";
      byId("conflict-both").hidden = !here || gone;
      if (here) this.view.reveal(conflict.mine.bounds);
    }
    this.onCount();
    this.view.touch();
  }

  draw(context: CanvasRenderingContext2D, zoom: number): void {
    for (const { image, mine } of this.open)
      if (image === this.store.image) outline(mine, COLOR, 0.2, COLOR).draw(context, zoom);
  }
}
