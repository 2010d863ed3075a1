/** All keys in one table, from which the help sheet is made too. */

import { byId, element } from "./dom";

export interface Command {
  /** Combinations such as "Control+z", "Shift+Enter", "v", "Digit1"; letters and names as `KeyboardEvent.key`. */
  keys: string[];
  group: string;
  title: string;
  run: (event: KeyboardEvent) => void;
  /** How the keys are written in the help sheet, if not as they are. */
  shown?: string[];
}

function combinations(event: KeyboardEvent): string[] {
  const prefix = `${event.ctrlKey || event.metaKey ? "Control+" : ""}${event.altKey ? "Alt+" : ""}`;
  const shift = event.shiftKey ? "Shift+" : "";
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  // The physical key is asked too: digits and brackets need Shift or AltGr on many keyboards.
  const physical = event.code.replace("Numpad", "Digit");
  const result = [`${prefix}${shift}${key}`];
  if (key.length === 1 && !/[a-z0-9]/.test(key)) result.push(`${prefix}${key}`);
  if (/^Digit\d$/.test(physical) || physical.startsWith("Bracket")) result.push(`${prefix}${physical}`);
  return result;
}

/** Whether the keys belong to the element: it is typed into. */
function typing(target: EventTarget | null): boolean {
  if (target instanceof HTMLInputElement) return !["checkbox", "range", "radio"].includes(target.type);
  return target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement;
}

export function listen(commands: readonly Command[]): void {
  const table = new Map<string, Command>();
  for (const command of commands) for (const key of command.keys) table.set(key, command);
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    if (typing(event.target)) return;
    const button = event.target instanceof Element && event.target.closest("button, a, input");
    if (button && (event.key === "Enter" || event.key === " ")) return;
    if (event.target instanceof HTMLInputElement && event.key.startsWith("Arrow")) return;
    for (const combination of combinations(event)) {
      const command = table.get(combination);
      if (!command) continue;
      event.preventDefault();
      command.run(event);
      return;
    }
  });
}

/** Fill the help sheet. */
export function describe(
  commands: readonly Command[],
  more: readonly { group: string; shown: string[]; title: string }[],
): void {
  const groups = new Map<string, HTMLElement>();
  for (const entry of [...more, ...commands.map((command) => ({ ...command, shown: command.shown ?? command.keys }))]) {
    let list = groups.get(entry.group);
    if (!list) {
      list = element("dl");
      groups.set(entry.group, list);
      byId("help-keys").append(element("section", {}, [element("h2", { text: entry.group }), list]));
    }
    const keys = entry.shown.flatMap((key, i) => [
      ...(i ? [" or "] : []),
      ...(key === "+" ? [key] : key.split("+")).flatMap((part, j) => [
        ...(j ? ["+"] : []),
        element("kbd", { text: part }),
      ]),
    ]);
    list.append(element("dt", {}, keys), element("dd", { text: entry.title }));
  }
}
