"""The objects of an image at one time, and what edits make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from maskwright.web.objects import Edit, Object, carried, new_id

Size = tuple[int, int]


@dataclass(frozen=True)
class State:
    """The objects of an image at one time; never changed.

    Attributes:
        size: H, W of the image.
        version: Number of edits of the image.
        objects: Its objects by their ids, in the order in which they were made.
        done: Whether a person has declared the image as complete.
        dismissed: Ids of suggestions that a person does not want.
        buried: Existing annotations that have been removed, which are as before if that is undone.
    """

    size: Size
    version: int
    objects: Mapping[str, Object]
    done: bool = False
    dismissed: frozenset[str] = frozenset()
    buried: Mapping[str, Object] = field(default_factory=dict[str, Object])


@dataclass(frozen=True)
class Saved:
    """An edit that has been made.

    Attributes:
        state: The objects afterwards.
        changed: Those that were added or replaced.
        removed: Ids of those that were removed.
        again: Whether everything was so already, and nothing was written.
    """

    state: State
    changed: list[Object]
    removed: list[str]
    again: bool = False


@dataclass(frozen=True)
class Conflict:
    """An edit of objects that have been changed otherwise; nothing was done.

    Attributes:
        state: The objects as they are.
        objects: Those of the edit that are there.
        removed: Ids of those that are not.
    """

    state: State
    objects: list[Object]
    removed: list[str]


class Work:
    """The edits of one message while they are applied.

    Attributes:
        objects: The objects afterwards.
        touched: Ids of all objects that edits are about.
        written: Ids of those that have changed.
        conflicts: Ids of those that another person has changed.
        done: Whether the image is complete afterwards.
        dismissed: Ids of suggestions that are dismissed afterwards.
        buried: Existing annotations that are removed afterwards.
        number: Number of objects that have been added to all images, this edit included.
    """

    def __init__(self, state: State, number: int):
        self.before, self.version, self.number = state, state.version + 1, number
        self.objects, self.done, self.dismissed = dict(state.objects), state.done, state.dismissed
        self.buried = dict(state.buried)
        self.touched = dict[str, None]()
        self.written = list[str]()
        self.conflicts = list[str]()

    def apply(self, edit: Edit) -> None:
        """Apply one edit."""
        if edit.do == "done":
            self.done = edit.value
            return
        if edit.do == "dismiss":
            self.dismissed = self.dismissed.union(edit.ids) if edit.value else self.dismissed.difference(edit.ids)
            return
        there = self.objects.get(edit.id)
        known = edit.id in self.touched  # by an earlier edit of this message, whose revision is not published yet
        self.touched[edit.id] = None
        if edit.do == "remove":
            if there is None:
                return
            if not known and there.revision != edit.was:
                self.conflicts.append(edit.id)
                return
            del self.objects[edit.id]
            bury(self.buried, there)
            self.written.append(edit.id)
            return
        assert edit.object is not None
        if there is not None and there.equals(edit.object):
            return
        if edit.do == "add" and there is None:
            self.objects[edit.id] = self._added(edit.id, edit.object)
        elif edit.do == "replace" and there is not None and (known or there.revision == edit.was):
            self.objects[edit.id] = carried(edit.object, there, self.version)
        else:
            self.conflicts.append(edit.id)
            return
        self.written.append(edit.id)

    def _added(self, id: str, object: Object) -> Object:
        """An object that is added, or an existing annotation whose removal is undone."""
        before = self.buried.pop(id, None)
        if before is None:
            self.number += 1
            return replace(object, id=new_id(id), kept={"serial": self.number}, revision=self.version)
        if before.equals(object):
            return replace(object, kept=before.kept, track=before.track, revision=self.version)
        return carried(object, before, self.version)


def bury(buried: dict[str, Object], one: Object) -> None:
    """Remember an object that is removed, if it is an existing annotation."""
    if "number" in one.kept:
        buried[one.id] = one
