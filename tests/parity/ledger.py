"""What was recorded, and which of it has been compared."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

RAW = 2e-5  # a wrong batch-norm epsilon alone shows as 5e-5
LARGEST = 1e-4  # of float32; values that were rounded to bfloat16 in between state their own


INPUTS = (
    r"gt_(boxes|classes|labels|ids|centers|coefs|polygons|(bit)?masks|mask_bits|keypoints|sem_seg|basis_sem|poly_\w+)"
    r"|given_(boxe?s?|classes|attn|embed|margin|threshold|extremes|points|rays|center)|(out|final)_size|score_target"
    r"|target_(boxes|labels|masks)|patch_target_pm1|lovasz_(prob|target)|image(_\d+|\d+_(boxes|labels|masks))|targets\d"
    r"|masks\d|maps_k\d+|x_(v\d+|lam[\d.]+)|swap_gradseed_.*|grad_(weight|keys)|(no_grad_)?names|train_(points|gt_masks)"
    r"|proposal_(label|bbox_(target|weight))|coder_(src|dst|deltas)|kp|kp_maps|match_iou|level_boxes|rois|feature"
    r"|paste_(boxes|masks|size)|target_(bitmask_full|polygon_\d[ab]?)|enc_[a-z0-9]+_(mask_)?bits|enc_\w+_origins|feature_sizes"
    r"|priors|conf|coef|loc|proto_low|mask_logits|labels|scores|cells|decoupled_[xy]_profiles|f64_given_coef"
)  # what the originals were given

P = ParamSpec("P")
T = TypeVar("T")


class NotRecorded(LookupError):
    """An array that a comparison needs as an input is not in the recording, or only in part."""


def part(check: Callable[P, T]) -> Callable[P, T | None]:
    """A part of a check that ends early, with None, where the recording does not have an input that it needs."""

    @functools.wraps(check)
    def run(*args: P.args, **keywords: P.kwargs) -> T | None:
        owners = [own for a in args for own in (a, getattr(a, "ledger", None)) if isinstance(own, Ledger)]
        try:
            return check(*args, **keywords)
        except NotRecorded as missing:
            owners[0].missing.append(str(missing))
            return None

    return run


class Ledger:
    """The arrays of one reference file. Each is taken as an input or compared; what is left over is a failure, unless
    an input that its comparison needs was not recorded. What was not recorded is not compared.

    An array X too large to keep is stored as X__shape and X__sampled (its values at a fixed random choice of places);
    a boolean one as X__packbits and X__shape.
    """

    def __init__(self, path: Path):
        with np.load(path) as file:
            self.arrays = {k: file[k] for k in file.files}
        self.about: dict[str, Any] = json.loads(str(self.arrays.pop("meta"))) if "meta" in self.arrays else {}
        self.path = path
        self.name = path.stem
        self.seen: set[str] = set()
        self.lines: list[str] = []
        self.failed = 0
        self.missing: list[str] = []  # inputs without which a part of the check ended early
        self.skipped = 0

    # ---- inputs --------------------------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return any(
            f"{name}{suffix}" in self.arrays for suffix in ("", "__packbits", "__sampled", "__packbits__sampled")
        )

    def names(self, pattern: str) -> list[str]:
        """Names (without storage suffixes) that match, in the file's order."""
        plain = dict.fromkeys(re.sub(r"(__packbits)?(__shape|__sampled)?$", "", k) for k in self.arrays)
        return [n for n in plain if re.fullmatch(pattern, n)]

    def given(self, name: str) -> Tensor:
        """An array that the original was given, not one that it answered."""
        if f"{name}__packbits" in self.arrays:
            shape = self.arrays[f"{name}__shape"]
            self.seen |= {f"{name}__packbits", f"{name}__shape"}
            return torch.from_numpy(_unpacked(self.arrays[f"{name}__packbits"], shape))
        values = torch.from_numpy(self._whole(name))
        self.seen.add(name)
        return values

    def given_in_part(self, name: str) -> Tensor:
        """As `given`, in float64, with NaN at the places whose values were not kept."""
        if f"{name}__sampled" not in self.arrays:
            return self.given(name).double()
        values, shape, chosen = self._answer(name)
        result = np.full(int(np.prod(shape)), np.nan)
        result[chosen] = values
        return torch.from_numpy(result.reshape(tuple(shape)))

    def peek(self, name: str) -> Tensor:
        """An answer, whole, to match ours with; it still has to be compared."""
        return torch.from_numpy(self._whole(name))

    def _whole(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise NotRecorded(f"{name} as a whole" if name in self else name)
        return self.arrays[name]

    def texts(self, name: str) -> list[str]:
        """Words that were recorded, without empty ones."""
        words = [str(n) for n in self._whole(name) if str(n)]
        self.seen.add(name)
        return words

    def length(self, name: str) -> int:
        """How many rows an answer has, whether it was kept whole or not; 0 if it was not recorded."""
        return self.shape(name)[0] if name in self else 0

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an answer, whether it was kept whole or not; () if it was not recorded."""
        shape = self.arrays[f"{name}__shape"] if f"{name}__shape" in self.arrays else np.shape(self.arrays.get(name, 0))
        return tuple(int(n) for n in shape)

    def pair(
        self, boxes: tuple[str, Tensor], labels: tuple[str, Tensor] | None = None,
        scores: tuple[str, Tensor] | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Our rows in the original's order, by what was recorded of boxes, labels and scores (each a name and our
        values). None, after a line that tells so, if the numbers of objects differ."""
        ours = len(boxes[1])
        for name, _ in filter(None, (boxes, labels, scores)):
            if name in self and self.length(name) != ours:
                return self.fail(name, f"{ours} objects instead of {self.length(name)}")
        kinds = None
        if labels is not None and labels[0] in self.arrays:
            kinds = (self.peek(labels[0]), labels[1])
        for name, values in filter(None, (boxes, scores)):
            if name in self.arrays:
                return matching(_rows(self.peek(name)), _rows(values), kinds)
        return torch.arange(ours)

    def untied(self, name: str, rows: Tensor, scores: Tensor, closeness: float = 1e-5) -> Tensor:
        """Our rows, best first, with neighbours swapped where their scores are equal but for rounding and swapping
        brings the kept places of `name` nearer: which of two such rows comes first is nobody's decision."""
        if f"{name}__sampled" not in self.arrays or tuple(self.arrays[f"{name}__shape"]) != tuple(rows.shape):
            return rows
        kept = self.arrays[f"{name}__sampled"]
        places = np.random.RandomState(0).randint(0, max(1, rows.numel()), len(kept))
        theirs = torch.full(rows.shape, torch.nan, dtype=torch.float64).reshape(-1)
        theirs[torch.from_numpy(places)] = torch.from_numpy(kept.astype("float64"))
        theirs = theirs.reshape(rows.shape)
        result, limit = rows.clone(), closeness * float(scores.abs().max())
        for first in (scores.diff().abs() <= limit).nonzero().flatten().tolist():
            pair = result[first : first + 2].double()
            wanted = theirs[first : first + 2]
            as_is, swapped = ((p - wanted).abs().nan_to_num(0).sum() for p in (pair, pair.flip(0)))
            if swapped < as_is:
                result[first : first + 2] = result[first : first + 2].flip(0)
        return result

    # ---- answers -------------------------------------------------------------------------------------------------

    def compare(
        self,
        name: str,
        ours: Tensor | float,
        bound: float = RAW,
        reason: str = "",
        note: str = "",
        scale: Tensor | None = None,
        largest: float = LARGEST,
    ) -> None:
        """Relative error ||ours - theirs|| / ||theirs|| of one array. Entries of ours that are NaN stand for values
        that the library does not keep (say which in `note`). A bound above RAW needs a reason. For sums that all but
        cancel, `scale` holds the sums of sizes, and the error is measured against those."""
        if bound > RAW and not reason:
            raise ValueError(f"{name}: a bound of {bound} needs a reason")
        if name not in self:
            return None
        bound = min(bound, largest)
        error = self.error(name, ours, scale)
        if isinstance(error, str):
            return self._line(name, error, False)
        extra = " ".join(
            t for t in (f"[{note}]" if note else "", f"(bound {bound:g}: {reason})" if reason else "") if t
        )
        self._line(name, f"{error:.2e} {extra}".rstrip(), bool(error <= bound))

    def error(self, name: str, ours: Tensor | float, scale: Tensor | None = None) -> float | str:
        """What `compare` measures, or why it cannot."""
        values = torch.as_tensor(ours).detach().double().cpu().numpy()
        theirs, shape, chosen = self._answer(name)
        if values.shape != tuple(shape):
            return f"shape {values.shape}, expected {tuple(shape)}"
        flat = values.reshape(-1)[chosen] if chosen is not None else values.reshape(-1)
        theirs = theirs.reshape(-1).astype("float64")
        kept = ~np.isnan(flat)
        flat, theirs = flat[kept], theirs[kept]
        if not len(flat) and values.size:
            return "nothing of it could be compared"
        size = np.linalg.norm(theirs) if scale is None else float(scale.double().norm())
        return float(np.linalg.norm(flat - theirs) / size) if size > 0 else float(np.abs(flat).max(initial=0.0))

    def compare_bits(self, name: str, ours: Tensor, share: float = 1e-4) -> None:
        """Share of pixels that differ in a boolean array: those within rounding of the threshold may."""
        if name not in self:
            return None
        bits = ours.detach().cpu().numpy().astype(bool)
        if f"{name}__packbits__sampled" in self.arrays:
            theirs = self.arrays[f"{name}__packbits__sampled"]
            packed = np.packbits(bits.reshape(-1))
            expected = tuple(self.arrays[f"{name}__shape"])
            total = int(self.arrays[f"{name}__packbits__shape"][0])
            self.seen |= {f"{name}__packbits__sampled", f"{name}__packbits__shape", f"{name}__shape"}
            if bits.shape != expected or len(packed) != total:
                return self._line(name, f"shape {bits.shape}, expected {expected}", False)
            mine = packed[np.random.RandomState(0).randint(0, total, len(theirs))] if total else packed
            different, count = int(np.unpackbits(mine ^ theirs).sum()), 8 * len(theirs)
        elif f"{name}__sampled" in self.arrays:
            theirs, shape, chosen = self._answer(name)
            if bits.shape != tuple(shape):
                return self._line(name, f"shape {bits.shape}, expected {tuple(shape)}", False)
            different, count = int((bits.reshape(-1)[chosen] != theirs.astype(bool)).sum()), len(theirs)
        else:
            if f"{name}__packbits" in self.arrays:
                whole = _unpacked(self.arrays[f"{name}__packbits"], self.arrays[f"{name}__shape"])
                self.seen |= {f"{name}__packbits", f"{name}__shape"}
            else:
                whole = self.arrays[name].astype(bool)
                self.seen.add(name)
            if bits.shape != whole.shape:
                return self._line(name, f"shape {bits.shape}, expected {whole.shape}", False)
            different, count = int((bits != whole).sum()), whole.size
        self._line(
            name, f"{different} of {count} bits differ (bound {share:g}: at the threshold)", different <= share * count
        )

    def compare_packed_rows(self, name: str, ours: Tensor, share: float = 1e-4) -> None:
        """As `compare_bits`, for planes that the reference itself packed one by one, as rows of bytes."""
        if name not in self:
            return None
        bits = ours.detach().cpu().numpy().astype(bool)
        packed = np.packbits(bits.reshape(len(ours), int(np.prod(bits.shape[1:]))), axis=1)
        theirs, shape, chosen = self._answer(name)
        if packed.shape != tuple(shape):
            return self._line(name, f"shape {packed.shape}, expected {tuple(shape)}", False)
        mine = packed.reshape(-1) if chosen is None else packed.reshape(-1)[chosen]
        different, count = int(np.unpackbits(mine ^ theirs.reshape(-1)).sum()), 8 * len(mine)
        text = f"{different} of {count} bits differ (bound {share:g}: at the threshold)"
        self._line(name, text, different <= share * count)

    def equal(self, name: str, ours: Tensor) -> None:
        """Integers or flags: all equal."""
        if name not in self:
            return
        values, shape, chosen = self._answer(name)
        theirs = torch.from_numpy(values)
        same = tuple(ours.shape) == tuple(shape)
        if same:
            ours = ours if chosen is None else ours.flatten()[torch.from_numpy(chosen)]
            same = bool((ours.long() == theirs.long()).all())
        self._line(
            name,
            "equal"
            if same
            else f"differs: {ours.flatten()[:8].tolist()} ... instead of {theirs.flatten()[:8].tolist()} ...",
            same,
        )

    def fail(self, name: str, why: str) -> None:
        if name not in self:
            name = name.removesuffix("__shape")
        self.seen |= {k for k in self.arrays if k == name or k.startswith(f"{name}__")}
        self._line(name, why, False)

    def finish(self) -> int:
        """Lines for what was never looked at; 1 if anything failed, else 0."""
        for name in sorted(set(self.arrays) - self.seen):
            if re.fullmatch(INPUTS, re.sub(r"(__?packbits)?(__?shape|__sampled)?$", "", name)):
                self.skipped += 1
                self.lines.append(f"skip {name}: an input of arrays that were not recorded")
            elif self.missing:
                self.skipped += 1
                needs = ", ".join(dict.fromkeys(self.missing))
                self.lines.append(f"skip {name}: not compared, because the recording lacks {needs}")
            else:
                self._line(name, "was not checked", False)
        return int(self.failed > 0)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _answer(self, name: str) -> tuple[np.ndarray, Any, np.ndarray | None]:
        if f"{name}__sampled" in self.arrays:
            values, shape = self.arrays[f"{name}__sampled"], self.arrays[f"{name}__shape"]
            self.seen |= {f"{name}__sampled", f"{name}__shape"}
            total = int(np.prod(shape))
            places = np.random.RandomState(0).randint(0, total, len(values)) if total else np.zeros(0, int)
            return values, shape, places
        values = self._whole(name)
        self.seen.add(name)
        return values, values.shape, None

    def _line(self, name: str, text: str, good: bool) -> None:
        self.failed += not good
        self.lines.append(f"{'ok  ' if good else 'FAIL'} {name}: {text}")


def _unpacked(packed: np.ndarray, shape: Any) -> np.ndarray:
    return np.unpackbits(packed)[: int(np.prod(shape))].reshape(tuple(shape)).astype(bool)


def matching(theirs: Tensor, ours: Tensor, labels: tuple[Tensor, Tensor] | None = None) -> Tensor | None:
    """For each box of theirs the row of ours that is nearest (of the same label), each used once; None if it cannot be.

    Two implementations may order objects of equal score differently; what they found must still be the same."""
    if len(theirs) != len(ours):
        return None
    if not len(theirs):
        return torch.zeros(0, dtype=torch.int64)
    distance = torch.cdist(theirs.double(), ours.double(), p=1)
    if labels is not None:
        distance = distance + 1e6 * (labels[0].long()[:, None] != labels[1].long()[None])
    distance = distance + 1e-7 * (torch.arange(len(theirs))[:, None] - torch.arange(len(ours))[None]).abs()
    return _nearest_each(distance)


def matching_areas(theirs: tuple[Tensor, Tensor, Tensor], ours: tuple[Tensor, Tensor, Tensor]) -> Tensor | None:
    """As `matching`, for objects of which scores, areas and labels were recorded: where scores are equal but for
    rounding the area tells which is which."""
    (scores, areas, labels), (own_scores, own_areas, own_labels) = theirs, ours
    if len(scores) != len(own_scores):
        return None
    apart = (scores.double()[:, None] - own_scores.double()[None]).abs()
    distance = 1e9 * (apart - 1e-5 * scores.double().abs()[:, None]).clamp(min=0)
    distance = distance + (areas.double()[:, None] - own_areas.double()[None]).abs()
    return _nearest_each(distance + 1e12 * (labels.long()[:, None] != own_labels.long()[None]))


def _nearest_each(distance: Tensor) -> Tensor:
    rows = torch.full((len(distance),), -1)
    taken = torch.zeros(distance.shape[1], dtype=torch.bool)
    for index in range(len(distance)):  # greedy: true partners are nearer than anything else by orders of magnitude
        row = int(torch.where(taken, torch.inf, distance[index]).argmin())
        rows[index], taken[row] = row, True
    return rows


def input_seed(ledger: Ledger, name: str, ask: Callable[[int], Tensor]) -> int:
    """The seed that the input was drawn with. Outputs that name one seed alone do not say whether it is the weights' or
    both's, or the input's is 0; then the recorded `name` settles it, which `ask` answers for a seed."""
    if "input_seed" in ledger.about:
        return int(ledger.about["input_seed"])
    seeds = dict.fromkeys([int(ledger.about.get("seed") or 0), 0])
    errors = {s: ledger.error(name, ask(s)) if len(seeds) > 1 and name in ledger else 0.0 for s in seeds}
    return min(seeds, key=lambda s: e if isinstance(e := errors[s], float) else np.inf)


def placed(about: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) on a canvas of zeros, as `about` tells, and the height and width that each fills (B, 2)."""
    text = str(about.get("input", ""))
    found = re.search(r"RandomState\((\d+)\)[^(]*\(+\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\s*,?\)", text)
    if "sizes" in about or found is None:
        images, sizes = inputs(about)
        return images, torch.tensor(sizes)
    seed, *shape = (int(v) for v in found.groups())
    images = torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype("float32"))
    canvas = re.search(r"(?:canvas|zeros)(?: of)? \(?(\d+)\s*[x,×]\s*(\d+)", text)
    if canvas is not None:
        room = (0, int(canvas[2]) - shape[3], 0, int(canvas[1]) - shape[2])
        images = torch.nn.functional.pad(images, room)
    return images, torch.tensor([shape[2:]] * shape[0])


def bare_shape(about: Mapping[str, Any], name: str = "input") -> tuple[int, int, int, int] | None:
    """The input's shape (B, C, H, W) if `about` gives nothing else of it, as numbers or in words: of one image if
    there are three numbers, in three channels if there are two."""
    given = about.get(name)
    if isinstance(given, str):
        numbers = given.strip(" ()[]").replace("x", ",").replace("×", ",").rstrip(", ").split(",")
        if not all(n.strip().isdigit() for n in numbers):
            return None
        given = numbers
    if not isinstance(given, list | tuple) or not 2 <= len(given) <= 4:
        return None
    shape = [1, 3, 0, 0]
    shape[4 - len(given) :] = [int(n) for n in given]
    return (shape[0], shape[1], shape[2], shape[3])


def seed_of(about: Mapping[str, Any]) -> int:
    """The seed of an input that is given as a shape alone: `input_seed`, or else that of the weights."""
    seeds = (about.get(n) for n in ("input_seed", "seed", "weights_seed"))
    return int(next((s for s in seeds if s is not None), 0))


def inputs(about: Mapping[str, Any]) -> tuple[Tensor, list[tuple[int, int]]]:
    """The images that the original was fed, as `about` tells: (B, C, H, W), and each image's valid size."""
    text = str(about.get("input", ""))
    found = re.search(r"RandomState\((\d+)\)", text)
    stream = np.random.RandomState(int(found[1]) if found else seed_of(about))
    if "sizes" in about:
        sizes = [(int(h), int(w)) for h, w in about["sizes"]]
        canvas = re.search(r"zeros of (\d+)\s*[x,×]\s*(\d+)", text)
        if canvas is None:
            raise ValueError(f"cannot tell the padded size from {text!r}")
        images = np.zeros((len(sizes), 3, int(canvas[1]), int(canvas[2])), "float32")
        for image, (height, width) in zip(images, sizes, strict=True):
            image[:, :height, :width] = stream.standard_normal((3, height, width))
        return torch.from_numpy(images), sizes
    shape = re.search(r"standard_normal\(\(\s*(\d+(?:\s*,\s*\d+)*)\s*,?\)\)", text)
    if shape is not None:
        dims = tuple(int(n) for n in shape[1].split(","))
    else:
        dims = bare_shape(about) or bare_shape({"shape": list(about.get("shape", ()))[-2:]}, "shape")
    if dims is None:
        raise ValueError(f"cannot tell the input from {text!r}")
    dims = dims if len(dims) == 4 else (1, *dims)
    images = stream.standard_normal(dims).astype("float32")
    return torch.from_numpy(images), [dims[2:]] * dims[0]  # pyright: ignore[reportReturnType]


def _rows(values: torch.Tensor) -> torch.Tensor:
    """The values with everything after the first dimension in one, also for no rows at all."""
    return values.flatten(1) if values.ndim > 1 else values[:, None]
