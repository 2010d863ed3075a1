/** The images of the project, read 200 at a time where the list is looked at: 60,000 cost no more than 200. */

import { api } from "./api";
import type { Filter, ImageItem } from "./types";

const CHUNK = 200;

export class Images {
  total = 0;
  filter: Filter = "all";
  onChange: () => void = () => {};

  private chunks = new Map<number, ImageItem[] | null>();
  private places = new Map<number, number>();
  private round = 0;

  /** The image in a place of the list, if it was read already. */
  at(index: number): ImageItem | undefined {
    return this.chunks.get(Math.floor(index / CHUNK))?.[index % CHUNK];
  }

  /** Place of an image in the list, if it was read already. */
  placeOf(id: number): number | undefined {
    return this.places.get(id) ?? (this.filter === "all" ? id : undefined);
  }

  item(id: number): ImageItem | undefined {
    const place = this.placeOf(id);
    const item = place === undefined ? undefined : this.at(place);
    return item?.id === id ? item : undefined;
  }

  /** Read the places from `start` to before `end`. */
  async need(start: number, end: number): Promise<void> {
    const wanted: number[] = [];
    for (let chunk = Math.floor(start / CHUNK); chunk * CHUNK < end; chunk++) {
      if (!this.chunks.has(chunk)) wanted.push(chunk);
    }
    await Promise.all(wanted.map((chunk) => this.read(chunk)));
  }

  /** Show another choice of images. Images that were finished meanwhile are left out only now. */
  async choose(filter: Filter): Promise<void> {
    this.filter = filter;
    this.round++;
    this.chunks.clear();
    this.places.clear();
    await this.read(0);
  }

  private async read(chunk: number): Promise<void> {
    const { round } = this;
    this.chunks.set(chunk, null);
    try {
      const { total, items } = await api.images(chunk * CHUNK, CHUNK, this.filter);
      if (round !== this.round) return;
      // In a filtered list the total shrinks while the list is open; what is shown keeps its place.
      this.total = this.filter === "all" ? total : Math.max(total, this.total * Number(chunk > 0));
      this.chunks.set(chunk, items);
      items.forEach((item, i) => this.places.set(item.id, chunk * CHUNK + i));
      this.onChange();
    } catch (error) {
      if (round === this.round) this.chunks.delete(chunk);
      throw error;
    }
  }

  /** Take what is known better now. */
  note(id: number, change: Partial<ImageItem>): void {
    const item = this.item(id);
    if (!item) return;
    Object.assign(item, change);
    this.onChange();
  }
}
