"""What has been annotated: the objects of every image, as existing annotations and the journal of edits give them.

Objects of an image are read from the journal when the image is opened; in memory is only where they are, and how many.
The first edit of an image writes all of its objects, later ones what they change. All methods may be called from any
thread.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from maskwright.data.findings import DataWarning
from maskwright.errors import DataError, UsageError
from maskwright.locks import FolderLock
from maskwright.text import printable
from maskwright.web.journal import Journal, Place, Reader, Record
from maskwright.web.objects import MAX_OBJECTS, Edit, Object, checked_class, colour, read_edits
from maskwright.web.sources import HIDDEN, Source
from maskwright.web.states import Conflict, Saved, State, Work, bury

HELD = 64  # images whose objects are kept in memory
COMPACT_ABOVE = 16 << 20  # bytes of records that later ones have replaced
DELTAS = 64  # edits of an image after which all of its objects are written, if that is shorter

Only = Literal["all", "todo", "done", "uncertain"]
Size = tuple[int, int]


class NotFoundError(UsageError):
    """There is no image of this number."""


@dataclass
class Entry:
    """What is known of an image that has been edited without reading its objects.

    Attributes:
        version: Number of edits.
        count: Number of objects.
        done: Whether it is complete.
        places: Its records since the last one with all objects.
    """

    version: int = 0
    count: int = 0
    done: bool = False
    places: list[Place] = field(default_factory=list[Place])


class Project:
    """Annotations of a source, kept in a folder.

    Args:
        source: The images.
        folder: Where the journal is; created if missing, and locked.
        classes: Classes in addition to those of the source and of earlier sessions.
        user: Who annotates, for records of who made what.

    Attributes:
        source: As given.
        folder: As given.
        user: As given.
        classes: Names of the classes.
        absent: Number of annotated images that the source no longer has; their annotations are kept.

    Raises:
        UsageError: If another process has the folder, or its annotations are of other images.
        DataError: If the folder cannot be written.
    """

    def __init__(self, source: Source, folder: str | Path, classes: Sequence[str] = (), user: str = "annotator"):
        self.source, self.folder, self.user = source, Path(folder), user
        self._lock = threading.RLock()
        self._guard = FolderLock(self.folder, "annotate", "another process annotates here", DataError)
        try:
            self._load(classes)
        except BaseException:
            self._guard.release()
            raise

    # ---- opening -----------------------------------------------------------------------------------------------------

    def _load(self, classes: Sequence[str]) -> None:
        path = self.folder / "journal.jsonl"
        self._journal = Journal(path, {"source": self.source.path.name, "kind": self.source.kind})
        self._positions = {self.source.key(index): index for index in range(len(self.source))}
        self._entries = dict[int, Entry]()
        self._absent = dict[str, Entry]()
        self._done, self._tracked = set[int](), set[int]()
        self._held = OrderedDict[int, State]()
        self._number = self._track = 0
        self._class_place: Place | None = None
        for record in self._journal.records():
            self._index(record)
        if self._journal.damaged:
            copy = path.with_name(f"{path.name}.damaged")
            shutil.copyfile(path, copy)
            what = f"{path}: {self._journal.damaged} records are damaged and were left out; a copy is {copy.name}"
            warnings.warn(what, DataWarning, stacklevel=4)
        self.absent = len(self._absent)
        if self._absent and not self._entries:
            example = printable(next(iter(self._absent)))
            raise UsageError(
                f"{self.folder}: has annotations of other images, such as {example!r}, which {self.source.path} does "
                "not have; give another folder (--out)"
            )
        self._find_classes(classes)
        if self._garbage() > max(COMPACT_ABOVE, self._live()):
            self._tidy()

    def _index(self, record: Record) -> None:
        """Note a record of the journal."""
        head = record.head
        if head.get("kind") == "classes":
            self._class_place = record.place
            return
        key = str(head["image"])
        index = self._positions.get(key)
        entry = self._absent.setdefault(key, Entry()) if index is None else self._entries.setdefault(index, Entry())
        entry.version, entry.count, entry.done = head["version"], head["count"], head["done"]
        entry.places = [record.place] if head["full"] else [*entry.places, record.place]
        self._number = max(self._number, head.get("number", 0))
        self._track = max(self._track, head.get("track", 0))
        if index is not None:
            (self._done.add if entry.done else self._done.discard)(index)

    def _find_classes(self, added: Sequence[str]) -> None:
        """The classes of earlier sessions, then new ones of the source, then those that are given."""
        names = cast("list[str]", self._journal.body(self._class_place)) if self._class_place is not None else []
        before = list(names)
        names += [name for name in self.source.classes if name not in names]
        for name in added:
            if name.strip() not in names:
                names.append(checked_class(name, names))
        self.classes: tuple[str, ...] = tuple(names)
        self._labels = [names.index(name) for name in self.source.classes]
        if names != before:
            self._write_classes()

    def _write_classes(self) -> None:
        self._class_place = self._journal.append({"kind": "classes", "at": now()}, list(self.classes))

    def close(self) -> None:
        """Close the journal and give the folder free."""
        with self._lock:
            self._journal.close()
            self._guard.release()

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- images ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def check(self, index: Any) -> int:
        """Return the position of an image.

        Raises:
            NotFoundError: If there is none of this number.
        """
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self):
            raise NotFoundError(f"there is no image {str(index)[:30]}; images are numbered from 0 to {len(self) - 1}")
        return index

    def position(self, key: str) -> int | None:
        """Return the position of an image by its key; None if the source does not have it."""
        return self._positions.get(key)

    def about(self, index: int) -> dict[str, Any]:
        """Return what lists of images show: name, size, number of objects, whether it is complete, and version."""
        with self._lock:
            entry = self._entries.get(index)
        size = self.source.known_size(index)
        return {
            "id": index,
            "name": self.source.name(index),
            "width": None if size is None else size[1],
            "height": None if size is None else size[0],
            "objects": self.source.count(index) if entry is None else entry.count,
            "done": entry is not None and entry.done,
            "version": 0 if entry is None else entry.version,
        }

    def listed(self, only: Only = "all", ranked: Sequence[int] = ()) -> Sequence[int]:
        """Return the images of a list.

        Args:
            only: "all"; "todo", those that are not complete; "done", those that are; "uncertain", those that are not
                complete, in the order of `ranked`, then the others.
            ranked: Positions of images.
        """
        with self._lock:
            done = set(self._done)
        if only == "all":
            return range(len(self))
        if only == "done":
            return sorted(done)
        first = [index for index in ranked if index not in done] if only == "uncertain" else []
        seen = done.union(first)
        return [*first, *(index for index in range(len(self)) if index not in seen)]

    def labelled(self) -> list[int]:
        """Return the images that are complete or have objects."""
        with self._lock:
            edited = {index: entry.done or entry.count > 0 for index, entry in self._entries.items()}
        count = self.source.count
        return [index for index in range(len(self)) if edited.get(index, count(index) != 0)]

    def is_done(self, index: int) -> bool:
        """Return whether an image is complete."""
        with self._lock:
            return index in self._done

    def state(self, index: int) -> State:
        """Return the objects of an image.

        Raises:
            ImageError: If the image cannot be read.
            DataError: If the image has another size than when it was annotated.
        """
        with self._lock:
            if index in self._held:
                self._held.move_to_end(index)
                return self._held[index]
            entry = self._entries.get(index)
            state = self._imported(index) if entry is None else self._read(entry, self._journal.body)
            size = self.source.size(index)
            if state.size != size:
                raise DataError(
                    f"{self.source.name(index)}: was annotated with {state.size[1]} x {state.size[0]} pixels, but has "
                    f"{size[1]} x {size[0]} now; restore the image that was annotated"
                )
            self._hold(index, state)
            return state

    def _hold(self, index: int, state: State) -> None:
        self._held[index] = state
        self._held.move_to_end(index)
        while len(self._held) > HELD:
            self._held.popitem(last=False)

    def _imported(self, index: int) -> State:
        """The existing annotations of an image."""
        objects = self.source.imported(index)
        labels = self._labels
        return State(
            self.source.size(index),
            0,
            {o.id: replace(o, label=None if o.label is None else labels[o.label]) for o in objects},
        )

    @staticmethod
    def _read(entry: Entry, body: Callable[[Place], Any]) -> State:
        """The objects of an image from its records."""
        objects: dict[str, Object] = {}
        buried: dict[str, Object] = {}
        size, dismissed = (0, 0), list[str]()
        for place in entry.places:
            value = body(place)
            size = (value["size"][0], value["size"][1])
            dismissed = value.get("dismissed", dismissed)
            buried |= {stored["id"]: Object.of_stored(stored) for stored in value.get("buried", ())}
            for id in value["gone"]:
                if (one := objects.pop(id, None)) is not None:
                    bury(buried, one)
            for stored in value["put"]:
                buried.pop(stored["id"], None)
                objects[stored["id"]] = Object.of_stored(stored)
        return State(size, entry.version, objects, entry.done, frozenset(dismissed), buried)

    # ---- edits -------------------------------------------------------------------------------------------------------

    def edit(self, index: int, edits: Any, by: str = "", what: str = "") -> Saved | Conflict:
        """Apply the edits of a message; all or none. They are on the disk when this returns.

        Args:
            index: The image.
            edits: What the page has sent, see `read_edits`.
            by: Who has sent it.
            what: What the person did, for the journal.

        Raises:
            UsageError: If the edits are invalid.
            DataError: If they cannot be written; nothing was applied.
        """
        with self._lock:
            state = self.state(index)
            return self.apply(index, read_edits(edits, state.size, len(self.classes)), by, what)

    def apply(self, index: int, edits: Sequence[Edit], by: str = "", what: str = "") -> Saved | Conflict:
        """Apply edits that have been checked, see `edit`."""
        with self._lock:
            state = self.state(index)
            work = Work(state, self._number)
            for edit in edits:
                work.apply(edit)
            if work.conflicts:
                there = [state.objects[id] for id in work.conflicts if id in state.objects]
                return Conflict(state, there, [id for id in work.conflicts if id not in state.objects])
            if len(work.objects) > max(MAX_OBJECTS, len(state.objects)):
                raise UsageError(f"an image can have at most {MAX_OBJECTS} objects")
            changed = [work.objects[id] for id in work.touched if id in work.objects]
            removed = [id for id in work.touched if id not in work.objects]
            if not work.written and (work.done, work.dismissed) == (state.done, state.dismissed):
                return Saved(state, changed, removed, again=True)
            after = State(state.size, work.version, work.objects, work.done, work.dismissed, work.buried)
            self._write(index, after, work.written, by, what, work.number, work.dismissed != state.dismissed)
            return Saved(after, changed, removed)

    def _write(
        self, index: int, state: State, changed: Sequence[str], by: str, what: str, number: int, dismissed: bool
    ) -> None:
        """Write what has changed of an image, or all of its objects."""
        entry = self._entries.get(index, Entry())
        track = max([self._track, *(o.track or 0 for id in changed if (o := state.objects.get(id)))])

        def append(full: bool) -> Place:
            ids = list(state.objects) if full else [id for id in changed if id in state.objects]
            body: dict[str, Any] = {
                "size": list(state.size),
                "put": [state.objects[id].stored() for id in ids],
                "gone": [] if full else [id for id in changed if id not in state.objects],
            }
            if dismissed or (full and state.dismissed):
                body["dismissed"] = sorted(state.dismissed)
            if full and state.buried:
                body["buried"] = [one.stored() for one in state.buried.values()]
            head = self._head(self.source.key(index), state, full, number)
            return self._journal.append(head | {"track": track, "at": now(), "by": by, "what": what[:60]}, body)

        full = not entry.places or (len(entry.places) >= DELTAS and self._is_long(entry))
        try:
            place = append(full)
        except DataError:
            if not full or not entry.places:
                raise
            place, full = append(False), False  # the disk may have room for what has changed
        self._number, self._track = number, track
        places = [place] if full else [*entry.places, place]
        self._entries[index] = Entry(state.version, len(state.objects), state.done, places)
        (self._done.add if state.done else self._done.discard)(index)
        self._hold(index, state)
        if self._journal.size > 8 * COMPACT_ABOVE and self._garbage() > 3 * max(COMPACT_ABOVE, self._live()):
            self._tidy()

    @staticmethod
    def _is_long(entry: Entry) -> bool:
        """Whether the edits since the last record with all objects are longer than that."""
        return sum(place.length for place in entry.places[1:]) > 2 * entry.places[0].length

    @staticmethod
    def _head(key: str, state: State, full: bool, number: int) -> dict[str, Any]:
        return {
            "image": key,
            "version": state.version,
            "count": len(state.objects),
            "done": state.done,
            "full": full,
            "number": number,
        }

    def new_track(self, index: int) -> int:
        """Return a number that no object of the clip of an image has as its `track`."""
        first, end = self.source.sequence(index)
        with self._lock:
            if first not in self._tracked:  # numbers of existing annotations, which are not in the journal
                found = (one.track or 0 for frame in range(first, end) for one in self.source.imported(frame))
                self._track = max([self._track, *found])
                self._tracked.add(first)
            self._track += 1
            return self._track

    def add_class(self, name: Any) -> tuple[str, ...]:
        """Add a class; returns all of them.

        Raises:
            UsageError: If the name is invalid or there is such a class.
            DataError: If it cannot be written.
        """
        with self._lock:
            before = self.classes
            self.classes = (*before, checked_class(name, before))
            try:
                self._write_classes()
            except BaseException:
                self.classes = before
                raise
            return self.classes

    def shown_classes(self) -> list[dict[str, str]]:
        """Return name and colour of each class."""
        return [{"name": printable(name), "color": colour(number)} for number, name in enumerate(self.classes)]

    # ---- the journal -------------------------------------------------------------------------------------------------

    def _live(self) -> int:
        return sum(place.length for entry in self._all_entries() for place in entry.places)

    def _garbage(self) -> int:
        return self._journal.size - self._live()

    def _all_entries(self) -> Iterator[Entry]:
        yield from self._entries.values()
        yield from self._absent.values()

    def _tidy(self) -> None:
        """Compact if it can be done; without, the journal is only longer."""
        with contextlib.suppress(DataError):
            self.compact()

    def compact(self) -> None:
        """Write the journal anew, with one record for each image; atomic."""
        with self._lock:
            named = [(self.source.key(index), entry) for index, entry in self._entries.items()]
            named += list(self._absent.items())

            def records() -> Iterator[tuple[Mapping[str, Any], Any]]:
                yield {"kind": "classes", "at": now()}, list(self.classes)
                for key, entry in named:
                    state = self._read(entry, self._journal.body)
                    put, buried = ([one.stored() for one in m.values()] for m in (state.objects, state.buried))
                    body = {"size": state.size, "put": put, "gone": [], "dismissed": sorted(state.dismissed)}
                    body["buried"] = buried
                    yield {**self._head(key, state, True, self._number), "track": self._track}, body

            first, *places = self._journal.rewrite(records())
            self._class_place = first
            for (_, entry), place in zip(named, places, strict=True):
                entry.places = [place]

    def snapshot(self) -> Snapshot:
        """Return the annotations of this moment, which later edits do not change; the caller closes it."""
        with self._lock:
            entries = {index: replace(entry, places=list(entry.places)) for index, entry in self._entries.items()}
            return Snapshot(self, self._journal.reader(), entries, self.classes)


class Snapshot:
    """The annotations of one moment.

    Attributes:
        project: The project.
        classes: Its classes.
    """

    def __init__(self, project: Project, reader: Reader, entries: dict[int, Entry], classes: tuple[str, ...]):
        self.project, self.classes = project, classes
        self._reader, self._entries = reader, entries

    def state(self, index: int) -> State:
        """Return the objects of an image."""
        entry = self._entries.get(index)
        if entry is None:
            return self.project._imported(index)  # pyright: ignore[reportPrivateUsage] - of the same module
        return self.project._read(entry, self._reader.body)  # pyright: ignore[reportPrivateUsage]

    def labels(self, index: int) -> list[int | None]:
        """Return the labels of the objects of an image."""
        return [one.label for one in self.state(index).objects.values()]

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


def default_folder(path: str | Path) -> Path:
    """Return where annotations of a source are kept: in its folder, or for a file beside it."""
    place = Path(path).expanduser()
    return place / HIDDEN if place.is_dir() else place.with_name(f"{place.name}{HIDDEN}")


def now() -> str:
    """Return the time, for records; nothing depends on it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
