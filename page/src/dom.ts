/** Elements of index.html by their id, and new ones. Text is always set as text, never parsed. */

export function byId<E extends HTMLElement = HTMLElement>(id: string): E {
  const element = document.getElementById(id);
  if (!element) throw new Error(`index.html has no element "${id}"`);
  return element as E;
}

export function element<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  properties: { className?: string; text?: string; title?: string } = {},
  children: (Node | string)[] = [],
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  if (properties.className) made.className = properties.className;
  if (properties.title) made.title = properties.title;
  if (properties.text !== undefined) made.textContent = properties.text;
  made.append(...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name: string): SVGSVGElement {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Set a text, without work for the browser if it is the same. */
export function setText(id: string, text: string): void {
  const place = byId(id);
  if (place.textContent !== text) place.textContent = text;
}

/** Calls of the result within a frame become one call of `run`, in the next. */
export function perFrame(run: () => void): () => void {
  let frame = 0;
  return () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      run();
    });
  };
}

export function onClick(id: string, run: () => void): void {
  byId(id).addEventListener("click", run);
}

export function setPressed(button: HTMLElement, pressed: boolean, attribute = "aria-pressed"): void {
  button.setAttribute(attribute, String(pressed));
}

/** A name from a file, for messages: without control and direction characters, and not endless. */
export function printable(name: string, longest = 80): string {
  const clean = name.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]+/gu, "\u00b7");
  return clean.length > longest ? `${clean.slice(0, longest - 1)}\u2026` : clean;
}
