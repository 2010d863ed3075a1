"""The content of a saved result, checked before it is used: result.json may be damaged or edited."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, cast, get_type_hints

from maskwright.evaluation.confusion import ImageScore
from maskwright.options import check_option

KINDS = ("segm", "bbox", "keypoints", "boundary")
WHOLE = ("panoptic", "semantic")  # measured on whole images; a result has one of them, or some of `KINDS`
POINTS = 101  # of a precision-recall curve
LARGEST = 1e15  # of any number, far above what is measured

Check = Callable[[Any, str], None]


def check_result(values: Mapping[str, Any], protocol: type, speed: type) -> None:
    """Checks every value of a saved result that is read.

    Args:
        values: The JSON object, with today's names.
        protocol: The dataclass that "protocol" is converted to.
        speed: The dataclass that "speed" is converted to.

    Raises:
        ValueError: Naming the entry, what was expected and what was found.
    """
    for name in ("summary", "classes", "per_class", "objects", "curves", "missing", "title", "images", "examples",
                 "protocol", "speed"):  # fmt: skip
        if name not in values:
            raise ValueError(f"{name} is missing")
    _each(values["classes"], "classes", _text)
    kinds = _summary(values["summary"])
    _text(values["title"], "title")
    _count(values["missing"], "missing")
    _mapping(values["objects"], "objects", _count)
    if values["objects"] and "all" not in values["objects"]:
        raise ValueError("objects.all is missing")
    _mapping(values["curves"], "curves", _curve)
    _each(values["per_class"], "per_class", lambda row, where: _row(row, where, kinds))
    _fields(values["protocol"], "protocol", protocol)
    _fields(values["speed"], "speed", speed)
    _mapping(values["speed"].get("stages", {}), "speed.stages", _number)
    _each(values["images"], "images", _score)
    if values.get("confusion") is not None:
        _confusion(values["confusion"], "confusion")
    total = len(values["classes"])
    _each(values["examples"], "examples", lambda example, where: _example(example, where, total))


def _summary(summary: Any) -> list[str]:
    """Checks the averages; returns what was measured."""
    _mapping(summary, "summary", _number)
    for name in summary:
        if not re.fullmatch(r"[a-z]+/[A-Za-z0-9_]{2,32}", name, re.ASCII):
            raise ValueError(f"summary.{name} is not the name of a measure, such as 'segm/AP50'")
    kinds = list(dict.fromkeys(name.split("/")[0] for name in summary))
    if not all(kind in KINDS for kind in kinds) and not (len(kinds) == 1 and kinds[0] in WHOLE):
        raise ValueError(f"summary has measures of {', '.join(kinds)}; expected {', '.join(KINDS)}, or one of {WHOLE}")
    for kind in kinds[:1]:
        limits = any(re.fullmatch(rf"{kind}/AR\d+", name, re.ASCII) for name in summary)
        if kind in KINDS and f"{kind}/AP" not in summary and not limits:
            raise ValueError(f"summary has neither {kind}/AP nor a recall such as {kind}/AR100")
    return kinds


def _row(row: Any, where: str, kinds: list[str]) -> None:
    """The figures of a class."""
    _mapping(row, where, _plain)
    needed: dict[str, Check] = {"class": _text, "objects": _count, "found": _count}
    if not kinds:
        raise ValueError(f"{where}: there are no averages that it could belong to")
    if kinds[0] in WHOLE:
        needed["stuff"] = _flag
        measures = ("IoU",) if kinds[0] == "semantic" else ("PQ", "SQ", "RQ")
        needed |= {f"{kinds[0]}/{measure}": _number for measure in measures}
    else:
        needed |= {"images": _count, "threshold": _optional(_number), "F1": _optional(_number)}
        for kind in kinds:
            if kind != "boundary":
                needed |= {f"{kind}/AP": _number, f"{kind}/AP50": _number}
    _entries(row, where, needed)


def _curve(values: Any, where: str) -> None:
    _each(values, where, _number)
    if len(values) != POINTS:
        raise ValueError(f"{where} must have {POINTS} values, got {len(values)}")


def _score(values: Any, where: str) -> None:
    _mapping(values, where)
    needed: dict[str, Check] = {f.name: _count for f in fields(ImageScore)}
    needed |= {"id": _id, "quality": _optional(_number)}
    unknown = [name for name in values if name not in needed]
    if unknown:
        raise ValueError(f"{where} has an unknown entry {unknown[0]!r}")
    _entries(values, where, needed)


def _confusion(values: Any, where: str) -> None:
    _mapping(values, where)
    needed: dict[str, Check] = {
        "classes": lambda value, place: _each(value, place, _text),
        "by": _text,
        "overlap": _number,
        "score_threshold": _number,
        "counts": lambda value, place: _each(value, place, lambda row, at: _each(row, at, _count)),
        "images": lambda value, place: _each(value, place, _cell),
    }
    unknown = [name for name in values if name not in needed]
    if unknown:
        raise ValueError(f"{where} has an unknown entry {unknown[0]!r}")
    _entries(values, where, needed)
    side = len(values["classes"]) + 1
    if [len(row) for row in values["counts"]] != [side] * side:
        raise ValueError(f"{where}.counts must be a matrix of {side} x {side}, a row for each class and the background")
    for number, (row, column, _) in enumerate(values["images"]):
        if row >= side or column >= side:
            raise ValueError(f"{where}.images[{number}] is the cell {row}, {column} of a matrix of {side} x {side}")


def _cell(values: Any, where: str) -> None:
    _list(values, where)
    if len(values) != 3:
        raise ValueError(f"{where} must be [row, column, image ids], got {_short(values)}")
    _count(values[0], f"{where}[0]")
    _count(values[1], f"{where}[1]")
    _each(values[2], f"{where}[2]", _id)


def _example(values: Any, where: str, classes: int) -> None:
    from PIL import Image

    _mapping(values, where)
    records: Check = lambda value, place: _each(value, place, lambda r, at: _record(r, at, classes))  # noqa: E731
    needed: dict[str, Check] = {
        "rank": _text,
        "name": _text,
        "score": _score,
        "size": lambda value, place: _each(value, place, _count),
        "image": _text,
        "crowd": lambda value, place: _each(value, place, _flag),
        "truth": records,
        "found": records,
    }
    _entries(values, where, needed)
    size = values["size"]
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{where}.size must be [height, width], got {_short(size)}")
    try:
        with Image.open(io.BytesIO(b64decode(values["image"], validate=True)), formats=("JPEG", "PNG")) as image:
            own = [image.height, image.width]
            if own == size:
                image.load()
    except Exception as error:  # readers of images raise many kinds for damaged data
        raise ValueError(f"{where}.image is not an image in base64 ({error})") from None
    if own != size:
        raise ValueError(f"{where}.image has {own[0]} x {own[1]} pixels, its size is {_short(size)}")
    if values["crowd"] and len(values["crowd"]) != len(values["truth"]):
        raise ValueError(f"{where}.crowd has {len(values['crowd'])} entries for {len(values['truth'])} objects")


def _record(values: Any, where: str, classes: int) -> None:
    """An object of an example, as `Instances.to_coco` writes it."""
    _mapping(values, where, _plain)
    if "category_id" not in values:
        raise ValueError(f"{where}.category_id is missing")
    number = values["category_id"]
    _count(number, f"{where}.category_id")
    if not 1 <= number <= classes:
        raise ValueError(f"{where}.category_id must be 1 ... {classes}, got {number}")


# ---- single values ---------------------------------------------------------------------------------------------------


def _fields(values: Any, where: str, kind: type) -> None:
    """The fields of a dataclass, by their annotations."""
    _mapping(values, where)
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{where} has an unknown entry {name!r}")
        check_option(f"{where}.{name}", value, hints[name])
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _number(value, f"{where}.{name}")


def _entries(values: Mapping[str, Any], where: str, needed: Mapping[str, Check]) -> None:
    for name, check in needed.items():
        if name not in values:
            raise ValueError(f"{where}.{name} is missing")
        check(values[name], f"{where}.{name}")


def _mapping(value: Any, where: str, check: Check | None = None) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_short(value)}")
    if check is not None:
        for name, own in cast("dict[str, Any]", value).items():
            check(own, f"{where}.{name}")


def _each(value: Any, where: str, check: Check) -> None:
    for number, own in enumerate(_list(value, where)):
        check(own, f"{where}[{number}]")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, got {_short(value)}")
    return cast("list[Any]", value)


def _number(value: Any, where: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= LARGEST:
        raise ValueError(f"{where} must be a finite number, got {_short(value)}")


def _count(value: Any, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise ValueError(f"{where} must be an integer of 0 or more, got {_short(value)}")


def _plain(value: Any, where: str) -> None:
    """Any value whose numbers are finite."""
    if isinstance(value, dict):
        _mapping(value, where, _plain)
    elif isinstance(value, list):
        _each(value, where, _plain)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _number(value, where)


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {_short(value)}")


def _flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, got {_short(value)}")


def _id(value: Any, where: str) -> None:
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        raise ValueError(f"{where} must be an integer or a string, got {_short(value)}")


def _optional(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _short(value: Any) -> str:
    """A value for a message; long ones are cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
