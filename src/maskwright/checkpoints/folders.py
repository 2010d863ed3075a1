"""What a Hugging Face folder says beside its weights that no shape tells: heads (config.json), and how images are
prepared (preprocessor_config.json)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskwright.errors import CheckpointError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# What transformers' image processors take where their file says nothing.
MEAN, STD, RESCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255
# What does not change an image, or is what every system here does: bilinear is 2.
USUAL = {"do_resize": True, "resample": 2, "do_center_crop": False, "do_split_image": False}


class CheckpointWarning(UserWarning):
    """A folder asks for something that a system has no option for; its weights are used without it."""


# ---- config.json -----------------------------------------------------------------------------------------------------


def heads(about: Mapping[str, Any], width: int, *names: str, inside: str = "") -> int | None:
    """How many heads the folder's config.json says that attention has, under any of these names (of the table `inside`
    it); None where it says nothing. CheckpointError where that cannot be so in layers of this width."""
    config = about.get("config", {})
    if inside:
        config = config.get(inside)
        if config is None:
            return None
        if not isinstance(config, Mapping):
            raise _wrong(about, CONFIG, inside, config, "an object")
    found = {name: count for name in names if (count := whole(about, CONFIG, name, config.get(name))) is not None}
    if len(set(found.values())) > 1:
        told = " and ".join(f"{name} {count}" for name, count in found.items())
        raise CheckpointError(f"{_file(about, CONFIG)}: it says {told}; such a network is not read here")
    for name, count in found.items():
        if width % count:
            raise CheckpointError(
                f"{_file(about, CONFIG)}: {name} is {count}, which layers {width} wide, as the weights beside it are, "
                "cannot be shared by; put the config.json there that belongs to the weights"
            )
        return count
    return None


def side(about: Mapping[str, Any]) -> int | None:
    """`image_size` of config.json, of square images; None where it says nothing."""
    value = about.get("config", {}).get("image_size")
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return whole(about, CONFIG, "image_size", value)


def number(about: Mapping[str, Any], name: str) -> float | None:
    """A number above zero in config.json; None where it says nothing."""
    value = about.get("config", {}).get(name)
    return None if value is None else _number(about, CONFIG, name, value)


def whole(about: Mapping[str, Any], file: str, name: str, value: Any) -> int | None:
    """The value where it is a whole number of at least 1, None where there is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise _wrong(about, file, name, value, "a whole number of at least 1")
    return value


# ---- preprocessor_config.json ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """How the folder says that images are prepared; None where that is as ImageNet's, or not said.

    short, long  sides that images are resized to
    mean, std    of values from 0 to 1
    asked        what no system here has an option for
    """

    short: int | None
    long: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    asked: Mapping[str, Any]


def prepared(about: Mapping[str, Any], channels: int, **usual: Any) -> Prepared:
    """What preprocessor_config.json says; `usual` are values of further keys that ask for nothing special."""
    said: Mapping[str, Any] = about.get("preprocessor", {})
    asked = {k: said[k] for k, own in (USUAL | usual).items() if said.get(k) is not None and said[k] != own}
    for key in asked:
        wanted, value = (USUAL | usual)[key], asked[key]
        if isinstance(wanted, bool) != isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(about, PREPROCESSOR, key, value, "true or false" if isinstance(wanted, bool) else "a number")
    short, long = (None, None) if "do_resize" in asked else _size(about, said, asked)
    mean, std = _colours(about, said, channels)
    return Prepared(short, long, mean, std, asked)


def images(about: Mapping[str, Any], system: str, channels: int, divide: float = 255.0) -> dict[str, Any]:
    """Options `short`, `long`, `mean` and `std` as preprocessor_config.json has them; none that is as published. What
    there is no option for is told in a `CheckpointWarning`. `divide`: what the system divides images by first."""
    found = prepared(about, channels)
    warn(about, system, found.asked)
    options: dict[str, Any] = {"short": found.short, "long": found.long}
    for name, row in (("mean", found.mean), ("std", found.std)):
        options[name] = None if row is None else [value * 255 / divide for value in row]
    return {name: value for name, value in options.items() if value is not None}


def warn(about: Mapping[str, Any], system: str, asked: Mapping[str, Any]) -> None:
    """A `CheckpointWarning` that names what the folder asks for, where it asks for anything."""
    if asked:
        told = ", ".join(f"{name} {json.dumps(value)}" for name, value in asked.items())
        warnings.warn(
            f"{_file(about, PREPROCESSOR)}: {system} has no option for {told}; images are prepared without, and its "
            "answers may differ from those of transformers",
            CheckpointWarning,
            stacklevel=2,
        )


def _size(about: Mapping[str, Any], said: Mapping[str, Any], asked: dict[str, Any]) -> tuple[int | None, int | None]:
    """Short and long side. Sizes of another kind than these are put into `asked`."""
    size = said.get("size")
    if size is None:
        return None, None
    if not isinstance(size, Mapping):  # as older files have it
        longest = said.get("max_size")
        return whole(about, PREPROCESSOR, "size", size), whole(about, PREPROCESSOR, "max_size", longest)
    sides = {name: whole(about, PREPROCESSOR, f"size.{name}", value) for name, value in size.items()}
    short = sides.get("shortest_edge")
    if short is None:
        asked["size"] = size
        return None, None
    return short, sides.get("longest_edge")


def _colours(
    about: Mapping[str, Any], said: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std of values from 0 to 1, whatever the file's own are of; None for ImageNet's."""
    for key in ("do_rescale", "do_normalize"):
        if not isinstance(said.get(key, True), bool | None):
            raise _wrong(about, PREPROCESSOR, key, said[key], "true or false")
    factor = said.get("rescale_factor")
    factor = RESCALE if factor is None else _number(about, PREPROCESSOR, "rescale_factor", factor)
    factor = factor if said.get("do_rescale") is not False else 1.0
    rows = []
    for name, usual, plain in (("image_mean", MEAN, 0.0), ("image_std", STD, 1.0)):
        row = said.get(name)
        if said.get("do_normalize") is False:
            row = [plain] * channels
        row = list(usual) if row is None else row if isinstance(row, list) else [row] * channels
        row = [_number(about, PREPROCESSOR, name, value, above=name == "image_std") for value in row]
        # Further channels may follow an image's three.
        if len(row) != channels and not len(row) == 3 < channels:
            if said.get(name) is not None:
                raise _wrong(about, PREPROCESSOR, name, row, f"one for each of the {channels} channels of the weights")
            rows.append(None)
            continue
        row = tuple(value / (factor * 255) for value in row)
        # Files hold ImageNet's in the float32 of some, and 1 / 255 in few digits.
        same = len(row) == 3 and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(row, usual, strict=True))
        rows.append(None if same else row)
    return rows[0], rows[1]


def _number(about: Mapping[str, Any], file: str, name: str, value: Any, *, above: bool = True) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:  # which NaN is not
        raise _wrong(about, file, name, value, "a number")
    if above and value <= 0:
        raise _wrong(about, file, name, value, "a number above 0")
    return float(value)


def _file(about: Mapping[str, Any], file: str) -> str:
    return f"{about.get('path', 'the folder')}/{file}"


def _wrong(about: Mapping[str, Any], file: str, name: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{_file(about, file)}: {name} is {json.dumps(value)[:80]}; expected {expected}; mend the file or fetch it "
        "again"
    )
