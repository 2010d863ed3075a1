/** Training and export. */

import { api, Losses } from "./api";
import { byId, element, onClick, printable } from "./dom";
import type { Voice } from "./editor";
import type { TrainState } from "./types";

export class TrainDialog {
  private state: TrainState = { state: "idle", step: 0, steps: 0 };

  constructor(private readonly voice: Voice) {
    onClick("train", () => void this.open());
    onClick("train-start", () => {
      const steps = Number(byId<HTMLInputElement>("train-steps").value);
      void this.run(api.startTraining(Number.isInteger(steps) && steps > 0 ? steps : undefined));
    });
    onClick("train-stop", () => void this.run(api.stopTraining()));
  }

  private async open(): Promise<void> {
    byId<HTMLDialogElement>("train-dialog").showModal();
    await this.run(api.train());
  }

  private async run(request: Promise<TrainState>): Promise<void> {
    try {
      this.take(await request);
    } catch (error) {
      byId("train-state").textContent = (error as Error).message;
    }
  }

  /** Show a state, from an answer or from an event. */
  take(state: TrainState): void {
    const before = this.state.state;
    this.state = state;
    const running = state.state === "running";
    const progress = byId<HTMLProgressElement>("train-progress");
    progress.hidden = !running;
    if (state.step) {
      progress.max = state.steps;
      progress.value = state.step;
    } else progress.removeAttribute("value");
    byId("train-start").hidden = running;
    byId("train-stop").hidden = !running;
    byId<HTMLInputElement>("train-steps").disabled = running;
    const text = this.text(state);
    byId("train-state").textContent = text;
    const label = running && state.steps ? `Training ${Math.floor((100 * state.step) / state.steps)} %` : "Train";
    byId("train").querySelector("span")!.textContent = label;
    byId("train").setAttribute("aria-label", label); // the text is hidden in narrow windows
    if (before === "running" && state.state === "done") this.voice.say(text);
    if (before === "running" && state.state === "failed") this.voice.warn(text);
  }

  private text({ state, step, steps, ap, message }: TrainState): string {
    const said = message ? ` ${printable(message, 300)}` : "";
    if (state === "running" && !step) return `Starting…${said}`;
    if (state === "running") return `${step.toLocaleString()} of ${steps ? steps.toLocaleString() : "…"} steps.${said}`;
    const score = ap === undefined ? "" : ` Mask AP ${(100 * ap).toFixed(1)}.`;
    if (state === "done")
      return `Trained for ${step.toLocaleString()} steps.${score} Suggestions come from the new weights.${said}`;
    if (state === "failed") return `Training failed.${said}`;
    return said.trim();
  }
}

export class ExportDialog {
  constructor(private readonly unsaved: () => number) {
    onClick("export", () => byId<HTMLDialogElement>("export-dialog").showModal());
    onClick("export-start", () => void this.run(false));
    onClick("export-anyway", () => void this.run(true));
    byId("export-format").addEventListener("change", () => this.reset());
    byId("export-dialog").addEventListener("close", () => this.reset());
  }

  setFormats(formats: readonly string[]): void {
    byId("export-format").replaceChildren(
      ...formats.map((format) => {
        const option = element("option", { text: format });
        option.value = format;
        return option;
      }),
    );
    byId<HTMLButtonElement>("export").disabled = !formats.length;
  }

  private reset(): void {
    byId("export-losses").hidden = byId("export-anyway").hidden = true;
    byId("export-start").hidden = false;
    byId("export-state").textContent = "";
  }

  private async run(allowLoss: boolean): Promise<void> {
    const state = byId("export-state");
    const buttons = ["export-start", "export-anyway", "export-format"].map((id) => byId<HTMLButtonElement>(id));
    this.reset();
    const unsaved = this.unsaved();
    if (unsaved) {
      state.textContent = `${unsaved} changes are not saved yet; export when the server is connected`;
      return;
    }
    state.textContent = "Writing…";
    for (const button of buttons) button.disabled = true;
    try {
      const format = byId<HTMLSelectElement>("export-format").value;
      const { path, images, objects, losses } = await api.export(format, allowLoss);
      const lost = losses.length ? ` Left out: ${losses.map((line) => printable(line, 200)).join("; ")}` : "";
      state.textContent = `Wrote ${objects.toLocaleString()} objects of ${images.toLocaleString()} images to ${printable(path, 300)}.${lost}`;
    } catch (error) {
      if (error instanceof Losses) {
        byId("export-losses").hidden = byId("export-anyway").hidden = false;
        byId("export-start").hidden = true;
        byId("export-losses")
          .querySelector("ul")!
          .replaceChildren(...error.losses.map((line) => element("li", { text: printable(line, 300) })));
        state.textContent = "";
        byId("export-anyway").focus();
      } else state.textContent = (error as Error).message;
    } finally {
      for (const button of buttons) button.disabled = false;
    }
  }
}
