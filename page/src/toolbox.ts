/** The tools, which of them is used, and its options. */

import { byId, element, icon, onClick, setPressed } from "./dom";
import { Input } from "./input";
import { BoxTool } from "./tools/box";
import { BrushTool, EraserTool } from "./tools/brush";
import { ClickTool } from "./tools/click";
import { PolygonTool } from "./tools/polygon";
import { SelectTool, SplitTool } from "./tools/select";
import type { Context, Options, Tool } from "./tools/tool";

const KEYS: Record<string, string> = {
  click: "C",
  box: "X",
  polygon: "P",
  brush: "B",
  eraser: "E",
  select: "V",
  split: "K",
};

/** Names of the two effects of a tool; for others "Add" and "Take away". */
const EFFECTS: Record<string, [string, string]> = {
  click: ["Object", "Background"],
  brush: ["Paint", "Erase"],
  eraser: ["Erase", "Paint"],
};

export class Toolbox {
  readonly options: Options = { radius: 8, background: false, single: false, hover: true };
  readonly input: Input;
  /** Another tool, or another option: hints and drawing follow. */
  onChange: () => void = () => {};

  private readonly tools: Tool[];
  private readonly context: Context;

  constructor(context: Omit<Context, "options" | "changed">) {
    this.context = { ...context, options: this.options, changed: () => this.onChange() };
    this.tools = [ClickTool, BoxTool, PolygonTool, BrushTool, EraserTool, SelectTool, SplitTool].map(
      (Kind) => new Kind(this.context),
    );
    this.input = new Input(byId("stage"), context.view, context.store, this.tools[0]!);
  }

  get tool(): Tool {
    return this.input.tool;
  }

  /** Make the buttons and connect the controls. */
  show(): void {
    const bar = byId("tools");
    for (const tool of this.tools) {
      const button = element("button", { title: `${tool.label} (${KEYS[tool.name]})` }, [
        icon(tool.name),
        element("kbd", { text: KEYS[tool.name]! }),
      ]);
      button.id = `tool-${tool.name}`;
      button.setAttribute("aria-label", tool.label);
      button.setAttribute("aria-keyshortcuts", KEYS[tool.name]!);
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
    this.connect();
    this.setRadius(this.options.radius);
    this.use(this.context.assisted() ? "click" : "polygon");
  }

  private connect(): void {
    const { options } = this;
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
        this.context.editor.clearPreview();
        this.onChange();
      });
    }
    byId<HTMLInputElement>("radius").addEventListener("input", (event) => {
      this.setRadius(0.5 + 150 * (Number((event.target as HTMLInputElement).value) / 100) ** 2);
    });
  }

  use(name: string): void {
    const tool = this.tools.find((other) => other.name === name)!;
    this.context.editor.clearPreview();
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
    const [plus, minus] = EFFECTS[name] ?? ["Add", "Take away"];
    byId("effect-add").lastElementChild!.textContent = plus;
    byId("effect-subtract").lastElementChild!.textContent = minus;
    this.setBackground(false);
    this.onChange();
  }

  setBackground(background: boolean): void {
    this.options.background = background;
    for (const [id, on] of [
      ["effect-add", !background],
      ["effect-subtract", background],
    ] as const) {
      setPressed(byId(id), on, "aria-checked");
      byId(id).tabIndex = on ? 0 : -1;
    }
  }

  setRadius(radius: number): void {
    this.options.radius = Math.min(300, Math.max(0.5, radius));
    // The slider is quadratic: small brushes need fine steps.
    byId<HTMLInputElement>("radius").value = String(100 * Math.sqrt((this.options.radius - 0.5) / 150));
    byId("radius-value").textContent = `${Math.round(2 * this.options.radius)} px`;
    this.context.view.touch();
  }
}
