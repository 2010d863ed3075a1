"""The objects of an annotated image as the page, the journal and the data sets have them, and edits of them."""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from maskwright.errors import MaskCodeError, UsageError
from maskwright.structures import Masks
from maskwright.text import printable

HOW = frozenset(
    ("click", "box", "brush", "eraser", "polygon", "suggestion", "model", "merge", "split", "import", "propagated")
)
LONGEST = 7  # characters of a run
MAX_EDITS = 5_000  # of a message
MAX_OBJECTS = 20_000  # of an image
MAX_STEPS = 256  # entries of `made`; the oldest ones after the first are dropped
MAX_CLASSES = 10_000
MAX_NAME = 200  # characters of the name of a class or a person
_ID = re.compile(r"[A-Za-z0-9_.:#-]{1,64}")
_KEPT = ("number", "serial", "crowd", "keypoints", "box_only", "source")
_SHOWN = ("crowd", "box_only")

Size = tuple[int, int]


@dataclass(frozen=True)
class Object:
    """One object of an image.

    Attributes:
        id: Its id, unique in the image.
        label: Position of its class; None: none yet.
        counts: Its mask, a compressed run-length string.
        made: Who or what made it, in order: mappings with `by`, `how` and `clicks`.
        revision: Version of the image with which it was last changed.
        score: Of suggestions.
        track: Number of the object throughout a clip.
        kept: What only the server knows: `number` (the id of an imported annotation), `serial` (the number of a new
            object), `crowd`, `keypoints`, `box_only` (an imported box without a mask), `source` (whether it is as
            it was imported).
    """

    id: str
    label: int | None
    counts: str
    made: tuple[Mapping[str, Any], ...] = ()
    revision: int = 0
    score: float | None = None
    track: int | None = None
    kept: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def equals(self, other: Object) -> bool:
        """Return whether `other`, which a page has sent, would change nothing."""
        same = (self.label, self.counts, self.made) == (other.label, other.counts, other.made)
        return same and other.track in (None, self.track)

    def public(self, size: Size) -> dict[str, Any]:
        """Return what the page gets."""
        value = {**self._common(), "rle": {"size": list(size), "counts": self.counts}, "revision": self.revision}
        return value | {name: self.kept[name] for name in _SHOWN if self.kept.get(name)}

    def stored(self) -> dict[str, Any]:
        """Return what the journal gets."""
        return {**self._common(), "counts": self.counts, "revision": self.revision, **self.kept}

    def _common(self) -> dict[str, Any]:
        value: dict[str, Any] = {"id": self.id, "label": self.label, "made": [dict(step) for step in self.made]}
        if self.score is not None:
            value["score"] = self.score
        if self.track is not None:
            value["track"] = self.track
        return value

    @classmethod
    def of_stored(cls, value: Mapping[str, Any]) -> Object:
        """Return the object of a record of the journal."""
        kept = {name: value[name] for name in _KEPT if name in value}
        return cls(
            value["id"], value["label"], value["counts"], tuple(value["made"]), value["revision"], value.get("score"),
            value.get("track"), kept,
        )  # fmt: skip


def masks_of(objects: Sequence[Object], size: Size) -> Masks:
    """Return the masks of objects."""
    return Masks("rle", [one.counts.encode("ascii") for one in objects], size)


# ---- edits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One change of an image.

    Attributes:
        do: What is changed.
        id: The object.
        object: What it becomes.
        was: The revision that the person has seen.
        value: Of "done" and "dismiss".
        ids: Suggestions that are dismissed, or not any more.
    """

    do: Literal["add", "replace", "remove", "done", "dismiss"]
    id: str = ""
    object: Object | None = None
    was: int | None = None
    value: bool = False
    ids: tuple[str, ...] = ()


def read_edits(values: Any, size: Size, classes: int) -> list[Edit]:
    """Check the edits of a message.

    Args:
        values: What the page has sent.
        size: H, W of the image.
        classes: Number of classes.

    Raises:
        UsageError: If they do not have the form of edits, or a mask does not fit the image.
    """
    if not isinstance(values, list) or not 1 <= len(cast("list[Any]", values)) <= MAX_EDITS:
        raise UsageError(f"edits must be a list of 1 to {MAX_EDITS} edits")
    return [_edit(value, size, classes) for value in cast("list[Any]", values)]


def _edit(value: Any, size: Size, classes: int) -> Edit:
    if not isinstance(value, dict):
        raise UsageError(f"an edit must be an object, got {shown(value)}")
    given = cast("dict[str, Any]", value)
    do = given.get("do")
    if do in ("done", "dismiss"):
        if not isinstance(given.get("value"), bool):
            raise UsageError(f"value must be true or false, got {shown(given.get('value'))}")
        return Edit(do, value=given["value"], ids=_ids(given.get("ids")) if do == "dismiss" else ())
    if do not in ("add", "replace", "remove"):
        raise UsageError(f"do must be add, replace, remove, dismiss or done, got {shown(do)}")
    if do == "add":
        return Edit("add", *_added(given, size, classes))
    id, was = given.get("id"), given.get("was")
    if not isinstance(id, str):
        raise UsageError(f"id must be a text, got {shown(id)}")
    if not is_integer(was):
        raise UsageError(f"was must be the revision of the object, an integer, got {shown(was)}")
    if do == "remove":
        return Edit("remove", id, None, was)
    object = read_object(given.get("object"), size, classes)
    if object.id != id:
        raise UsageError(f"the object has the id {shown(object.id)}, but {shown(id)} is to be replaced")
    return Edit("replace", id, object, was)


def _ids(values: Any) -> tuple[str, ...]:
    given = cast("list[Any]", values) if isinstance(values, list) else []
    if not 1 <= len(given) <= MAX_EDITS or not all(isinstance(id, str) for id in given):
        raise UsageError(f"ids must be a list of ids of suggestions, got {shown(values)}")
    return tuple(new_id(id) for id in cast("list[str]", given))


def _added(given: Mapping[str, Any], size: Size, classes: int) -> tuple[str, Object]:
    object = read_object(given.get("object"), size, classes)
    return object.id, object


def read_object(value: Any, size: Size, classes: int) -> Object:
    """Check an object that the page has sent.

    Args:
        value: What was sent.
        size: H, W of the image.
        classes: Number of classes.

    Raises:
        UsageError: If it has another form, or its mask is empty or does not fit the image.
    """
    if not isinstance(value, dict):
        raise UsageError(f"object must be an object, got {shown(value)}")
    given = cast("dict[str, Any]", value)
    id, label, score, track = (given.get(name) for name in ("id", "label", "score", "track"))
    if not isinstance(id, str) or not 1 <= len(id) <= 256:
        raise UsageError(f"id must be a text of 1 to 64 letters, digits and _.:#-, got {shown(id)}")
    if label is not None and (not is_integer(label) or not 0 <= label < classes):
        raise UsageError(f"label must be null or an integer below {classes}, the number of classes, got {shown(label)}")
    if score is not None and not is_number(score):
        raise UsageError(f"score must be a number, got {shown(score)}")
    if track is not None and (not is_integer(track) or not 1 <= track < 1 << 31):
        raise UsageError(f"track must be a positive integer, got {shown(track)}")
    return Object(
        id,
        label,
        read_mask(given.get("rle"), size),
        read_made(given.get("made")),
        0,
        None if score is None else float(score),
        track,
    )


def new_id(id: str) -> str:
    """Return the id of a new object, if it is one that may be used.

    Raises:
        UsageError: If it has other characters than letters, digits and ``_.:#-``, or more than 64.
    """
    if not _ID.fullmatch(id):
        raise UsageError(f"id must be a text of 1 to 64 letters, digits and _.:#-, got {shown(id)}")
    return id


def read_mask(value: Any, size: Size) -> str:
    """Return the compressed string of a mask that the page has sent.

    Raises:
        UsageError: If it is no mask of an image of `size`, or has no pixels.
    """
    counts = read_any_mask(value, size)
    if counts is None:
        raise UsageError("the mask has no pixels; remove the object instead")
    return counts


def read_any_mask(value: Any, size: Size) -> str | None:
    """Return the compressed string of a mask that the page has sent; None if it has no pixels.

    Raises:
        UsageError: If it is no mask of an image of `size`.
    """
    given = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if not isinstance(given.get("counts"), str):
        raise UsageError(f"rle must be an object with size and counts (a compressed string), got {shown(value)}")
    if len(given["counts"]) > LONGEST * (size[0] * size[1] + 2):  # decoding it would take memory for nothing
        raise UsageError("the mask is not a valid run-length code: it has more runs than the image has pixels")
    try:
        masks = Masks.from_rle([given], size)
    except MaskCodeError as error:
        raise UsageError(str(error)) from None
    return cast(str, given["counts"]) if int(masks.areas()[0]) else None


def read_made(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Check who or what made an object.

    Raises:
        UsageError: If it has another form.
    """
    if not isinstance(value, list) or not value:
        raise UsageError(f"made must be a list of at least one entry, got {shown(value)}")
    steps = [_step(step) for step in cast("list[Any]", value)]
    return tuple(steps if len(steps) <= MAX_STEPS else [steps[0], *steps[-MAX_STEPS + 1 :]])


def _step(value: Any) -> Mapping[str, Any]:
    given = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    by, how, clicks = given.get("by"), given.get("how"), given.get("clicks", 0)
    if not isinstance(by, str) or len(by) > MAX_NAME or how not in HOW:
        raise UsageError(
            f"an entry of made must have by (a text) and how ({', '.join(sorted(HOW))}), got {shown(value)}"
        )
    if not is_integer(clicks) or not 0 <= clicks < 1 << 31:
        raise UsageError(f"clicks must be a count, got {shown(clicks)}")
    return {"by": printable(by), "how": how, "clicks": clicks}


def step(by: str, how: str, clicks: int = 0) -> Mapping[str, Any]:
    """Return an entry of `made`."""
    return {"by": printable(by)[:MAX_NAME], "how": how, "clicks": clicks}


def carried(new: Object, old: Object, revision: int) -> Object:
    """Return the object that replaces an old one: what only the server knows is kept."""
    kept = {name: value for name, value in old.kept.items() if name not in ("box_only", "source")}
    if "box_only" in old.kept and new.counts == old.counts:
        kept["box_only"] = True
    return replace(new, kept=kept, revision=revision, track=new.track if new.track is not None else old.track)


# ---- classes ---------------------------------------------------------------------------------------------------------


def checked_class(name: Any, known: Sequence[str]) -> str:
    """Return the name of a new class.

    Raises:
        UsageError: If it is empty, too long, known already or has control characters.
    """
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"the name of a class must be a text, got {shown(name)}")
    name = name.strip()
    if len(name) > MAX_NAME or printable(name) != name:
        raise UsageError(
            f"the name of a class must have at most {MAX_NAME} characters and no control characters, got {shown(name)}"
        )
    if name in known:
        raise UsageError(f"there is a class {shown(name)} already")
    if len(known) >= MAX_CLASSES:
        raise UsageError(f"there are {MAX_CLASSES} classes already, the most that are supported")
    return name


def colour(number: int) -> str:
    """Return the colour of a class, "#rrggbb"; those of consecutive classes differ much."""
    hue = (number * 0.381966 + 0.58) % 1.0  # the golden angle
    value = 0.92 if number // 8 % 2 == 0 else 0.7
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, value))
    return f"#{red:02x}{green:02x}{blue:02x}"


# ---- values ----------------------------------------------------------------------------------------------------------


def is_integer(value: Any) -> bool:
    """Return whether a JSON value is an integer that JavaScript represents exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
