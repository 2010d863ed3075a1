"""Batches of images of equal padded size.

A padded image differs from the same image alone: normalization layers that use statistics of the image see the padding,
and convolutions at its border see zeros further out. Images that are batched with others of their own size give the
same result as alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def equal_batches(keys: Sequence[Hashable], size: int) -> list[list[int]]:
    """Return positions in batches of up to `size` positions with equal keys, ordered by their first position."""
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    batches = [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]
    return sorted(batches)


def streamed_batches(
    items: Iterable[T], key: Callable[[T], Hashable | None], size: int, window: int
) -> Iterator[list[tuple[int, T]]]:
    """Group a stream into batches of items with equal keys.

    Args:
        items: The items.
        key: Key of an item; an item with the key None is a batch of its own.
        size: Items per batch; fewer if the stream ends or `window` is full.
        window: Largest number of items that wait for others; then the batch of the oldest one is returned.

    Yields:
        Batches of numbered items.
    """
    waiting: dict[Hashable, list[tuple[int, T]]] = {}
    count = 0
    for number, item in enumerate(items):
        own = key(item)
        if own is None:
            yield [(number, item)]
            continue
        group = waiting.setdefault(own, [])
        group.append((number, item))
        count += 1
        if len(group) < size and count >= window:
            own = _oldest(waiting)
        if len(waiting[own]) == size or count >= window:
            batch = waiting.pop(own)
            count -= len(batch)
            yield batch
    while waiting:
        yield waiting.pop(_oldest(waiting))


def in_order(batches: Iterable[Sequence[tuple[int, T]]]) -> Iterator[T]:
    """Return the items of numbered batches in the order of their numbers, each as soon as all before it are there."""
    ready: dict[int, T] = {}
    following = 0
    for batch in batches:
        ready.update(batch)
        while following in ready:
            yield ready.pop(following)
            following += 1


def _oldest(waiting: dict[Hashable, list[tuple[int, T]]]) -> Hashable:
    return min(waiting, key=lambda own: waiting[own][0][0])
