/**
 * A list of any length of which only the rows in sight exist. Rows have one height (or width, for a strip); the list is
 * one stop of the Tab key, arrow keys move within it.
 */

export interface ListOptions {
  host: HTMLElement;
  axis: "vertical" | "horizontal";
  /** Height (or width) of a row in CSS pixels. */
  pitch: number;
  /** Prefix of the rows' DOM ids. */
  prefix: string;
  /** Fill a row; it may have shown another item before. `near` is false while the list is scrolled quickly. */
  render: (row: HTMLElement, index: number) => void;
  /** Rows from `start` to before `end` are in sight. */
  onRange?: (start: number, end: number) => void;
  /** The row was chosen by click or by Enter. */
  onChoose: (index: number, event: MouseEvent | KeyboardEvent) => void;
  /** Keys other than those of moving and choosing; true if used. */
  onKey?: (event: KeyboardEvent, index: number) => boolean;
  /** Arrow keys choose at once. */
  follow?: boolean;
}

const OVERSCAN = 4;

export class VirtualList {
  private count = 0;
  private active = -1;
  private chosen: (index: number) => boolean = () => false;
  private rows = new Map<number, HTMLElement>();
  private spare: HTMLElement[] = [];
  private readonly spacer = document.createElement("div");
  private frame = 0;

  constructor(private readonly options: ListOptions) {
    const { host } = options;
    host.tabIndex = 0;
    host.setAttribute("role", "listbox");
    host.setAttribute("aria-orientation", options.axis);
    this.spacer.className = "spacer";
    this.spacer.setAttribute("role", "presentation");
    host.append(this.spacer);
    host.addEventListener("scroll", () => this.soon(), { passive: true });
    new ResizeObserver(() => this.soon()).observe(host);
    host.addEventListener("click", (event) => {
      const row = (event.target as Element).closest<HTMLElement>("[data-index]");
      if (!row) return;
      this.active = Number(row.dataset["index"]);
      options.onChoose(this.active, event);
      this.update();
    });
    host.addEventListener("keydown", (event) => this.key(event));
  }

  /** Set the number of rows and which are chosen, and draw the rows in sight again. */
  set(count: number, chosen: (index: number) => boolean): void {
    this.chosen = chosen;
    if (count !== this.count) {
      this.count = count;
      const size = `${count * this.options.pitch}px`;
      if (this.options.axis === "vertical") this.spacer.style.height = size;
      else this.spacer.style.width = size;
    }
    if (this.active >= count) this.active = count - 1;
    this.soon();
  }

  /** Draw the rows in sight again, at the next frame. */
  soon(): void {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.update();
    });
  }

  /** Make a row the active one and scroll it into sight. */
  reveal(index: number): void {
    const { host, pitch, axis } = this.options;
    this.active = index;
    const start = index * pitch;
    if (axis === "vertical") {
      if (start < host.scrollTop) host.scrollTop = start;
      else if (start + pitch > host.scrollTop + host.clientHeight) host.scrollTop = start + pitch - host.clientHeight;
    } else {
      // The frames around the one that is shown stay in sight.
      host.scrollLeft = start - (host.clientWidth - pitch) / 2;
    }
    this.soon();
  }

  private range(): [number, number] {
    const { host, pitch, axis } = this.options;
    const from = axis === "vertical" ? host.scrollTop : host.scrollLeft;
    const size = axis === "vertical" ? host.clientHeight : host.clientWidth;
    return [
      Math.max(0, Math.floor(from / pitch) - OVERSCAN),
      Math.min(this.count, Math.ceil((from + size) / pitch) + OVERSCAN),
    ];
  }

  private update(): void {
    const { options } = this;
    const [start, end] = this.range();
    for (const [index, row] of this.rows) {
      if (index >= start && index < end) continue;
      this.rows.delete(index);
      row.hidden = true;
      this.spare.push(row);
    }
    for (let index = start; index < end; index++) {
      let row = this.rows.get(index);
      if (!row) {
        row = this.spare.pop() ?? this.make();
        row.hidden = false;
        row.dataset["index"] = String(index);
        row.id = `${options.prefix}-${index}`;
        row.style.transform =
          options.axis === "vertical"
            ? `translateY(${index * options.pitch}px)`
            : `translateX(${index * options.pitch}px)`;
        row.setAttribute("aria-posinset", String(index + 1));
        this.rows.set(index, row);
      }
      row.setAttribute("aria-setsize", String(this.count));
      row.setAttribute("aria-selected", String(this.chosen(index)));
      row.classList.toggle("active", index === this.active);
      options.render(row, index);
    }
    if (this.rows.has(this.active))
      options.host.setAttribute("aria-activedescendant", `${options.prefix}-${this.active}`);
    else options.host.removeAttribute("aria-activedescendant");
    if (end > start) options.onRange?.(start, end);
  }

  private make(): HTMLElement {
    const row = document.createElement("div");
    row.className = "row";
    row.setAttribute("role", "option");
    this.spacer.append(row);
    return row;
  }

  private key(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { options, count } = this;
    const page = Math.max(1, Math.floor(options.host.clientHeight / options.pitch) - 1);
    const moves: Record<string, number> = {
      ArrowDown: this.active + 1,
      ArrowUp: this.active - 1,
      ArrowRight: this.active + 1,
      ArrowLeft: this.active - 1,
      PageDown: this.active + page,
      PageUp: this.active - page,
      Home: 0,
      End: count - 1,
    };
    const to = moves[event.key];
    if (to !== undefined && count) {
      this.reveal(Math.min(count - 1, Math.max(0, to)));
      if (options.follow) options.onChoose(this.active, event);
    } else if (event.key === "Enter" && this.active >= 0) {
      options.onChoose(this.active, event);
    } else if (!options.onKey?.(event, this.active)) {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }
}
