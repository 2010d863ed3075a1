"""What was recorded, and which of it has been compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RAW = 2e-5  # a wrong batch-norm epsilon alone shows as 5e-5
LARGEST = 1e-4


class Ledger:
    """The arrays of one reference file. Each is taken as an input or compared; what is left over is a failure.

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
        self.seen.add(name)
        return torch.from_numpy(self.arrays[name])

    def peek(self, name: str) -> Tensor:
        """An answer, whole, to match ours with; it still has to be compared."""
        return torch.from_numpy(self.arrays[name])

    def length(self, name: str) -> int:
        """How many rows an answer has, whether it was kept whole or not."""
        return int(self.arrays[f"{name}__shape"][0]) if f"{name}__shape" in self.arrays else len(self.arrays[name])

    def untied(self, name: str, rows: Tensor, scores: Tensor, closeness: float = 1e-5) -> Tensor:
        """Our rows, best first, with neighbours swapped where their scores are equal but for rounding and swapping
        brings the kept places of `name` nearer: which of two such rows comes first is nobody's decision."""
        if f"{name}__sampled" not in self.arrays or tuple(self.arrays[f"{name}__shape"]) != tuple(rows.shape):
            return rows
        kept = self.arrays[f"{name}__sampled"]
        places = np.random.RandomState(0).randint(0, rows.numel(), len(kept))
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
    ) -> None:
        """Relative error ||ours - theirs|| / ||theirs|| of one array. Entries of ours that are NaN stand for values
        that the library does not keep (say which in `note`). A bound above RAW needs a reason. For sums that all but
        cancel, `scale` holds the sums of sizes, and the error is measured against those."""
        if bound > RAW and not reason:
            raise ValueError(f"{name}: a bound of {bound} needs a reason")
        bound = min(bound, LARGEST)
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
        bits = ours.detach().cpu().numpy().astype(bool)
        if f"{name}__packbits__sampled" in self.arrays:
            theirs = self.arrays[f"{name}__packbits__sampled"]
            packed = np.packbits(bits.reshape(-1))
            expected = tuple(self.arrays[f"{name}__shape"])
            total = int(self.arrays[f"{name}__packbits__shape"][0])
            self.seen |= {f"{name}__packbits__sampled", f"{name}__packbits__shape", f"{name}__shape"}
            if bits.shape != expected or len(packed) != total:
                return self._line(name, f"shape {bits.shape}, expected {expected}", False)
            mine = packed[np.random.RandomState(0).randint(0, total, len(theirs))]
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
        packed = np.packbits(ours.detach().cpu().numpy().astype(bool).reshape(len(ours), -1), axis=1)
        theirs, shape, chosen = self._answer(name)
        if packed.shape != tuple(shape):
            return self._line(name, f"shape {packed.shape}, expected {tuple(shape)}", False)
        mine = packed.reshape(-1) if chosen is None else packed.reshape(-1)[chosen]
        different, count = int(np.unpackbits(mine ^ theirs.reshape(-1)).sum()), 8 * len(mine)
        text = f"{different} of {count} bits differ (bound {share:g}: at the threshold)"
        self._line(name, text, different <= share * count)

    def equal(self, name: str, ours: Tensor) -> None:
        """Integers or flags: all equal."""
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
        self.seen.add(name)
        self._line(name, why, False)

    def finish(self) -> int:
        """Lines for what was never looked at; 1 if anything failed, else 0."""
        for name in sorted(set(self.arrays) - self.seen):
            self._line(name, "was not checked", False)
        return int(self.failed > 0)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _answer(self, name: str) -> tuple[np.ndarray, Any, np.ndarray | None]:
        if f"{name}__sampled" in self.arrays:
            values, shape = self.arrays[f"{name}__sampled"], self.arrays[f"{name}__shape"]
            self.seen |= {f"{name}__sampled", f"{name}__shape"}
            return values, shape, np.random.RandomState(0).randint(0, int(np.prod(shape)), len(values))
        self.seen.add(name)
        return self.arrays[name], self.arrays[name].shape, None

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
    text = str(about["input"])
    if "sizes" in about:
        images, sizes = inputs(about)
        return images, torch.tensor(sizes)
    found = re.search(r"RandomState\((\d+)\)[^(]*\(+\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\s*,?\)", text)
    if found is None:
        raise ValueError(f"cannot tell the input from {text!r}")
    seed, *shape = (int(v) for v in found.groups())
    images = torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype("float32"))
    canvas = re.search(r"(?:canvas|zeros)(?: of)? \(?(\d+)\s*[x,×]\s*(\d+)", text)
    if canvas is not None:
        room = (0, int(canvas[2]) - shape[3], 0, int(canvas[1]) - shape[2])
        images = torch.nn.functional.pad(images, room)
    return images, torch.tensor([shape[2:]] * shape[0])


def inputs(about: Mapping[str, Any]) -> tuple[Tensor, list[tuple[int, int]]]:
    """The images that the original was fed, as `about` tells: (B, C, H, W), and each image's valid size."""
    text = str(about.get("input", ""))
    found = re.search(r"RandomState\((\d+)\)", text)
    stream = np.random.RandomState(int(found[1]) if found else int(about.get("input_seed", 0)))
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
    elif "shape" in about:
        dims = (1, 3, *(int(n) for n in about["shape"][-2:]))
    else:
        raise ValueError(f"cannot tell the input from {text!r}")
    dims = dims if len(dims) == 4 else (1, *dims)
    images = stream.standard_normal(dims).astype("float32")
    return torch.from_numpy(images), [dims[2:]] * dims[0]  # pyright: ignore[reportReturnType]
