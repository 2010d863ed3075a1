"""Options from the JSON files of a Hugging Face folder that its weights do not determine: the number of attention heads
(config.json), and how images are prepared (preprocessor_config.json)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from maskwright.errors import CheckpointError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# Defaults of the image processors of transformers.
MEAN, STD, RESCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255
# Values that do not change an image, or that every system here has; resample 2 is bilinear.
USUAL = {"do_resize": True, "resample": 2, "do_center_crop": False, "do_split_image": False}


class CheckpointWarning(UserWarning):
    """A folder contains a setting for which the system has no option; the setting is ignored."""


# ---- config.json -----------------------------------------------------------------------------------------------------


def heads(about: Mapping[str, Any], width: int, *names: str, inside: str = "") -> int | None:
    """The number of attention heads in config.json.

    Args:
        about: What `read_state` returned about the folder.
        width: Channels of the attention layers.
        names: Keys under which the number may be found.
        inside: The table of the file that has these keys; "": the file itself.

    Returns:
        The number; None if the file has none.

    Raises:
        CheckpointError: If the values contradict each other, or layers of this width cannot have so many heads.
    """
    config: Mapping[str, Any] = about.get("config", {})
    if inside:
        table: Any = config.get(inside)
        if table is None:
            return None
        if not isinstance(table, Mapping):
            raise _wrong(about, CONFIG, inside, table, "an object")
        config = cast(Mapping[str, Any], table)
    found = {name: count for name in names if (count := integer(about, CONFIG, name, config.get(name))) is not None}
    if len(set(found.values())) > 1:
        values = " and ".join(f"{name} {count}" for name, count in found.items())
        raise CheckpointError(f"{_file(about, CONFIG)}: networks with {values} are not supported")
    for name, count in found.items():
        if width % count:
            raise CheckpointError(
                f"{_file(about, CONFIG)}: {name} is {count}, which does not divide the width of the weights, {width}; "
                "use the config.json that belongs to the weights"
            )
        return count
    return None


def side(about: Mapping[str, Any]) -> int | None:
    """`image_size` of config.json, for square images; None if the file has none."""
    value: Any = about.get("config", {}).get("image_size")
    pair = cast(list[Any], value) if isinstance(value, list) else []
    if len(pair) == 2 and pair[0] == pair[1]:
        value = pair[0]
    return integer(about, CONFIG, "image_size", value)


def number(about: Mapping[str, Any], name: str) -> float | None:
    """A positive number of config.json; None if the file has none."""
    value = about.get("config", {}).get(name)
    return None if value is None else _number(about, CONFIG, name, value)


def integer(about: Mapping[str, Any], file: str, name: str, value: Any) -> int | None:
    """`value` if it is an integer of at least 1, None if it is None; a CheckpointError otherwise."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise _wrong(about, file, name, value, "an integer of at least 1")
    return value


# ---- preprocessor_config.json ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """How a folder prepares images. None: as for ImageNet, or not stated.

    Attributes:
        short: Short side that images are resized to, in pixels.
        long: Upper bound of the long side, in pixels.
        mean: Mean per channel, of values in [0, 1].
        std: Standard deviation per channel, likewise.
        asked: Entries for which no system has an option.
    """

    short: int | None
    long: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    asked: Mapping[str, Any]


def prepared(about: Mapping[str, Any], channels: int, **usual: Any) -> Prepared:
    """Reads preprocessor_config.json.

    Args:
        about: What `read_state` returned about the folder.
        channels: Channels of the images.
        usual: Further entries with the value that needs no option.

    Raises:
        CheckpointError: If a value has the wrong type.
    """
    said: Mapping[str, Any] = about.get("preprocessor", {})
    asked = {k: said[k] for k, own in (USUAL | usual).items() if said.get(k) is not None and said[k] != own}
    for key in asked:
        wanted, value = (USUAL | usual)[key], asked[key]
        if isinstance(wanted, bool) != isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(about, PREPROCESSOR, key, value, "true or false" if isinstance(wanted, bool) else "a number")
    short, long = (None, None) if "do_resize" in asked else _size(about, said, asked)
    mean, std = _normalization(about, said, channels)
    return Prepared(short, long, mean, std, asked)


def images(about: Mapping[str, Any], system: str, channels: int, divide: float = 255.0) -> dict[str, Any]:
    """Reads preprocessor_config.json as fields of the option `resize`. A `CheckpointWarning` names what has no option.

    Args:
        about: What `read_state` returned about the folder.
        system: Name of the system, for the warning.
        channels: Channels of the images.
        divide: What the system divides images by before it normalises them.

    Returns:
        `short` and `long` if the file has them; `mean` and `std` if they differ from ImageNet's.
    """
    found = prepared(about, channels)
    warn(about, system, found.asked)
    fields: dict[str, Any] = {"short": found.short, "long": found.long, **normalization(found, divide)}
    return {name: value for name, value in fields.items() if value is not None}


def normalization(found: Prepared, divide: float = 255.0) -> dict[str, list[float]]:
    """`mean` and `std` as fields of the option `resize`, those that differ from ImageNet's.

    Args:
        found: What `prepared` returned.
        divide: What the system divides images by before it normalises them.
    """
    rows = {"mean": found.mean, "std": found.std}
    return {name: [value * 255 / divide for value in row] for name, row in rows.items() if row is not None}


def warn(about: Mapping[str, Any], system: str, asked: Mapping[str, Any]) -> None:
    """Warns of the entries `asked` of preprocessor_config.json that a system has no option for, if there are any."""
    if asked:
        entries = ", ".join(f"{name} {json.dumps(value)}" for name, value in asked.items())
        warnings.warn(
            f"{_file(about, PREPROCESSOR)}: {system} has no option for {entries}; images are prepared without it, and "
            "predictions may differ from those of transformers",
            CheckpointWarning,
            stacklevel=2,
        )


def _size(about: Mapping[str, Any], said: Mapping[str, Any], asked: dict[str, Any]) -> tuple[int | None, int | None]:
    """Short and long side. Sizes of another kind are added to `asked`."""
    size = said.get("size")
    if size is None:
        return None, None
    if not isinstance(size, Mapping):  # older files
        longest = said.get("max_size")
        return integer(about, PREPROCESSOR, "size", size), integer(about, PREPROCESSOR, "max_size", longest)
    given = cast(Mapping[str, Any], size)
    sides = {name: integer(about, PREPROCESSOR, f"size.{name}", value) for name, value in given.items()}
    short = sides.get("shortest_edge")
    if short is None:
        asked["size"] = size
        return None, None
    return short, sides.get("longest_edge")


def _normalization(
    about: Mapping[str, Any], said: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std of values in [0, 1], whatever range the file's are of; None for those of ImageNet."""
    for key in ("do_rescale", "do_normalize"):
        if not isinstance(said.get(key, True), bool | None):
            raise _wrong(about, PREPROCESSOR, key, said[key], "true or false")
    factor = said.get("rescale_factor")
    factor = RESCALE if factor is None else _number(about, PREPROCESSOR, "rescale_factor", factor)
    factor = factor if said.get("do_rescale") is not False else 1.0
    rows: list[tuple[float, ...] | None] = []
    for name, usual, neutral in (("image_mean", MEAN, 0.0), ("image_std", STD, 1.0)):
        given: Any = said.get(name)
        if said.get("do_normalize") is False:
            given = [neutral] * channels
        values = (
            list(usual) if given is None else cast(list[Any], given) if isinstance(given, list) else [given] * channels
        )
        row = [_number(about, PREPROCESSOR, name, value, positive=name == "image_std") for value in values]
        # The three channels of an image may be followed by others.
        if len(row) != channels and not len(row) == 3 < channels:
            if said.get(name) is not None:
                raise _wrong(about, PREPROCESSOR, name, row, f"one number for each of the {channels} input channels")
            rows.append(None)
            continue
        scaled = tuple(value / (factor * 255) for value in row)
        # Some files hold ImageNet's values rounded to float32, and 1 / 255 with few digits.
        same = len(scaled) == 3 and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(scaled, usual, strict=True))
        rows.append(None if same else scaled)
    return rows[0], rows[1]


def _number(about: Mapping[str, Any], file: str, name: str, value: Any, *, positive: bool = True) -> float:
    """`value` as a float; a CheckpointError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:  # false for NaN
        raise _wrong(about, file, name, value, "a number")
    if positive and value <= 0:
        raise _wrong(about, file, name, value, "a number above 0")
    return float(value)


def _file(about: Mapping[str, Any], file: str) -> str:
    return f"{about.get('path', 'the folder')}/{file}"


def _wrong(about: Mapping[str, Any], file: str, name: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{_file(about, file)}: {name} must be {expected}, got {json.dumps(value)[:80]}; correct the file or download "
        "it again"
    )
