"""The result of an evaluation: figures, the protocol, and the images behind them."""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch

from maskwright._version import __version__
from maskwright.errors import DataError, MaskwrightError
from maskwright.evaluation.confusion import Confusion, ImageScore
from maskwright.files import remove_stale_parts, write_json
from maskwright.structures import Instances

FORMAT = "maskwright-result"


@dataclass
class Protocol:
    """The conditions of a measurement; None means not stated.

    The evaluator sets the first three; the caller that ran the system sets the others.

    Attributes:
        images: Data set and number of images: "pedestrians val, 50 images".
        evaluator: "vernier 0.5.4 (strict parity)".
        max_detections: Limit of detections per image and class.
        threshold: Score below which the system gave no objects.
        input_size: "short side 800, long side at most 1333".
        precision: "float32", "bfloat16".
        device: "NVIDIA ...", "CPU, 2 threads".
        batch: Images per forward pass.
        decoding_timed: Whether the time includes full-size masks.
        suppression: "the system's own, then Matrix NMS on the finished masks".
        classes: Classes of the data set that the system does not have, and the reverse, with numbers of objects.
        note: Anything else.
    """

    images: str | None = None
    evaluator: str | None = None
    max_detections: int | None = None
    threshold: float | None = None
    input_size: str | None = None
    precision: str | None = None
    device: str | None = None
    batch: int | None = None
    decoding_timed: bool | None = None
    suppression: str | None = None
    classes: str | None = None
    note: str = ""

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of each condition, "not stated" for None."""

        def shown(value: Any) -> str:
            if value is None:
                return "not stated"
            return (
                {True: "inside the timer", False: "outside the timer"}[value] if isinstance(value, bool) else str(value)
            )

        rows = [(_FACTS[f.name], shown(getattr(self, f.name))) for f in fields(self) if f.name in _FACTS]
        rows += [("classes", self.classes)] if self.classes else []
        return rows + ([("note", self.note)] if self.note else [])

    def __str__(self) -> str:
        return "; ".join(f"{name}: {value}" for name, value in self.facts())


_FACTS = {
    "images": "images",
    "evaluator": "evaluator",
    "max_detections": "maxDets",
    "threshold": "score threshold",
    "input_size": "input size",
    "precision": "precision",
    "device": "device",
    "batch": "batch",
    "decoding_timed": "full-size decoding",
    "suppression": "suppression",
}


@dataclass
class Speed:
    """Speed and size of a system; None means not measured.

    Attributes:
        milliseconds: Median time per image.
        milliseconds_p90: 90th percentile of the time per image.
        images_per_second: Throughput, reading included.
        stages: Milliseconds per image of each network ("dense", "boxes", "masks", ...) and of the "arithmetic" between
            and after them.
        peak_memory: Bytes, of the device named in the protocol.
        parameters: Number of parameters.
    """

    milliseconds: float | None = None
    milliseconds_p90: float | None = None
    images_per_second: float | None = None
    stages: dict[str, float] = field(default_factory=dict[str, float])
    peak_memory: int | None = None
    parameters: int | None = None

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each measured figure."""
        rows: list[tuple[str, str]] = []
        if self.milliseconds is not None:
            rows.append(("median per image", f"{self.milliseconds:.1f} ms"))
        if self.milliseconds_p90 is not None:
            rows.append(("90 % of images under", f"{self.milliseconds_p90:.1f} ms"))
        if self.images_per_second is not None:
            rows.append(("throughput", f"{self.images_per_second:.1f} images/s"))
        rows += [(name, f"{value:.1f} ms") for name, value in self.stages.items()]
        if self.peak_memory is not None:
            rows.append(("peak memory", f"{self.peak_memory / 2**20:,.0f} MiB"))
        if self.parameters is not None:
            rows.append(("parameters", f"{self.parameters / 1e6:.1f} M"))
        return rows


@dataclass
class Example:
    """An image reduced in size, with its annotations and predictions on the reduced grid.

    Attributes:
        rank: "worst" or "best".
        score: The outcome for the image.
        image: JPEG data.
        size: Height and width of the JPEG.
        truth: Annotated objects.
        found: Predictions that score at least the threshold of the confusion matrix.
        name: File name, if there is a file.
    """

    rank: str
    score: ImageScore
    image: bytes
    size: tuple[int, int]
    truth: Instances
    found: Instances
    name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The example as JSON values."""
        return {
            "rank": self.rank,
            "name": self.name,
            "score": asdict(self.score),
            "size": list(self.size),
            "image": b64encode(self.image).decode("ascii"),
            "truth": self.truth.to_coco(self.score.id),
            "crowd": [] if self.truth.crowd is None else [bool(each) for each in self.truth.crowd],
            "found": self.found.to_coco(self.score.id),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Example:
        """The example from `to_dict`."""
        from maskwright.evaluation.records import instances_from_records

        size = (int(values["size"][0]), int(values["size"][1]))
        truth, found = (instances_from_records(values[name], size, lambda c: int(c) - 1) for name in ("truth", "found"))
        truth.crowd = torch.tensor(values["crowd"], dtype=torch.bool) if values["crowd"] else None
        score = ImageScore(**values["score"])
        return cls(
            values["rank"],
            score,
            b64decode(values["image"]),
            size,
            truth,
            found,
            values["name"],
        )


@dataclass
class Result:
    """The result of an evaluation.

    Attributes:
        summary: "segm/AP", "segm/AP50", "segm/APs", "segm/AR100", "bbox/AP", "keypoints/AP", "boundary/AP", ... as 0
            ... 1 (for proposals recall only: "segm/AR10", "segm/AR100s", ...); -1 if there are no objects (the
            convention of pycocotools).
        classes: Class names.
        protocol: The conditions of the measurement.
        per_class: One row per class (none for proposals) with the same keys and "class", "category_id", "objects",
            "images", "found", "threshold" (the score at which F1 at overlap 0.5 is best) and "F1" (None if undefined).
        objects: Number of annotated objects: "all", "s", "m", "l", "crowd".
        curves: "segm/50", "segm/55", ...: precision at the recalls 0, 0.01, ... 1, for each overlap; the mean is the AP
            at that overlap.
        confusion: The confusion matrix.
        images: The outcome for each image.
        examples: Images for the report page.
        missing: Images without predictions handed in; they count as images without objects found.
        speed: Speed and size of the system.
        title: Title of the report page.
    """

    summary: dict[str, float]
    classes: tuple[str, ...]
    protocol: Protocol = field(default_factory=Protocol)
    per_class: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    objects: dict[str, int] = field(default_factory=dict[str, int])
    curves: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    confusion: Confusion | None = None
    images: list[ImageScore] = field(default_factory=list[ImageScore])
    examples: list[Example] = field(default_factory=list[Example])
    missing: int = 0
    speed: Speed = field(default_factory=Speed)
    title: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was measured: "segm", "bbox", ..."""
        return tuple(dict.fromkeys(name.split("/")[0] for name in self.summary))

    def __getitem__(self, name: str) -> float:
        return self.summary[name]

    def worst(self, count: int = 10) -> list[ImageScore]:
        """Images by ascending quality, without those that have neither objects nor predictions."""
        return sorted((p for p in self.images if p.quality is not None), key=lambda p: p.quality or 0.0)[:count]

    def __str__(self) -> str:
        """The table of averages in percent, and the protocol."""
        if self.kinds and self.kinds[0] in ("panoptic", "semantic"):
            return self._divided()
        if self.kinds and f"{self.kinds[0]}/AP" not in self.summary:
            return "\n".join([*self._recalls(), *self._missing(), str(self.protocol)])
        columns = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        lines = [" " * 10 + "".join(f"{c:>8}" for c in columns) + f"{'AR':>8}"]
        for kind in self.kinds:
            last = [v for k, v in self.summary.items() if k.startswith(f"{kind}/AR") and k[len(kind) + 3 :].isdigit()]
            recall = self.summary.get(f"{kind}/AR", last[-1] if last else -1)
            values = [self.summary.get(f"{kind}/{c}", -1) for c in columns]
            lines.append(f"{kind:10}" + "".join(f"{percent(v):>8}" for v in (*values, recall)))
        return "\n".join([*lines, *self._missing(), str(self.protocol)])

    def _recalls(self) -> list[str]:
        """For proposals: recall by limit, and by size at the limit 100 (or the largest below it)."""
        first = f"{self.kinds[0]}/"
        names = [k.removeprefix(first) for k in self.summary if k.startswith(first)]
        whole = [n for n in names if n[2:].isdigit()]
        middle = max((n for n in whole if int(n[2:]) <= 100), key=lambda n: int(n[2:]), default=whole[0])
        columns = [*whole, *(n for n in names if n[:-1] == middle and not n[-1].isdigit())]
        lines = [" " * 10 + "".join(f"{c:>8}" for c in columns)]
        for kind in self.kinds:
            lines.append(f"{kind:10}" + "".join(f"{percent(self.summary.get(f'{kind}/{c}', -1)):>8}" for c in columns))
        return lines

    def _missing(self) -> list[str]:
        return (
            [f"{self.missing} images had no predictions; they count as images without objects."] if self.missing else []
        )

    def _divided(self) -> str:
        """The table for segments or pixel labels."""
        if self.kinds[0] == "semantic":
            lines = [f"{name.split('/')[1]:10}{percent(value):>8}" for name, value in self.summary.items()]
        else:
            lines = [" " * 10 + "".join(f"{c:>8}" for c in ("PQ", "SQ", "RQ"))]
            for part, name in (("", "all"), ("th", "things"), ("st", "stuff")):
                values = [self.summary.get(f"panoptic/{c}{part}", -1) for c in ("PQ", "SQ", "RQ")]
                lines.append(f"{name:10}" + "".join(f"{percent(v):>8}" for v in values))
        return "\n".join([*lines, *self._missing(), str(self.protocol)])

    # ---- files -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "format": FORMAT,
            "maskwright": __version__,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name in _PLAIN},
            "classes": list(self.classes),
            "protocol": asdict(self.protocol),
            "speed": asdict(self.speed),
            "confusion": self.confusion.to_dict() if self.confusion else None,
            "images": [asdict(p) for p in self.images],
            "examples": [e.to_dict() for e in self.examples],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """The result from `to_dict`, also of earlier versions.

        Raises:
            ValueError: If a value is missing or of another type.
        """
        from maskwright.evaluation.stored import check_result

        values = _with_new_names(values)
        check_result(values, Protocol, Speed)
        return cls(
            **{name: values[name] for name in _PLAIN},
            classes=tuple(values["classes"]),
            protocol=Protocol(**values["protocol"]),
            speed=Speed(**values["speed"]),
            confusion=None if values.get("confusion") is None else Confusion.from_dict(values["confusion"]),
            images=[ImageScore(**p) for p in values["images"]],
            examples=[Example.from_dict(e) for e in values["examples"]],
        )

    def save(self, path: str | Path) -> Path:
        """Writes the result as JSON, atomically; returns the path."""
        remove_stale_parts(Path(path).parent)
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Reads a result that `save` wrote; DataError if the file is not one."""
        path = Path(path)
        try:
            loaded: Any = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); expected a result saved by evaluate") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}); expected a result saved by evaluate") from None
        values = cast(dict[str, Any], loaded) if isinstance(loaded, dict) else {}
        if values.get("format") != FORMAT:
            raise DataError(f'{path}: has no "format": "{FORMAT}"; expected a result saved by evaluate')
        try:
            return cls.from_dict(values)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise _not_readable(path, values, error) from None
        except MaskwrightError as error:
            raise _not_readable(path, values, error) from None


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """A saved result with the names of today: earlier versions called images pictures."""
    values = dict(values)
    if "images" not in values and "pictures" in values:
        values["images"] = values["pictures"]
    for name in ("protocol", "speed", "confusion"):
        if isinstance(values.get(name), dict):
            values[name] = {key.replace("pictures", "images"): value for key, value in values[name].items()}
    for name, old, new in (("examples", "picture", "image"), ("per_class", "pictures", "images")):
        if isinstance(values.get(name), list):
            values[name] = [
                {new if key == old else key: value for key, value in cast(dict[str, Any], row).items()}
                if isinstance(row, dict)
                else row
                for row in cast(list[Any], values[name])
            ]
    return values


def _not_readable(path: Path, values: dict[str, Any], error: Exception) -> DataError:
    version = str(values.get("maskwright", "an unknown version"))[:40]
    return DataError(
        f"{path}: written by maskwright {version} and not readable by {__version__} ({error}); it is damaged, or of "
        "another version; evaluate again"
    )


_PLAIN = ("summary", "per_class", "objects", "curves", "missing", "title")


def percent(value: float | None, digits: int = 1) -> str:
    """0.3456 as "34.6"; a dash for no value (None, NaN, -1)."""
    return "–" if value is None or math.isnan(value) or value < 0 else f"{100 * value:.{digits}f}"
