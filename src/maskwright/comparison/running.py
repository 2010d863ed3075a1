"""The comparison: train candidates with equal budgets, measure them alike, write one page."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from maskwright.checkpoints.budget import shown
from maskwright.comparison.agreement import agreement, weaknesses
from maskwright.comparison.division import divided
from maskwright.comparison.footprint import measure_footprint
from maskwright.comparison.intervals import bootstrap, calibration, interval
from maskwright.comparison.page import Shown, write_page, write_tables
from maskwright.comparison.profile import DataProfile, choose_systems
from maskwright.comparison.state import NAME, TASKS, Candidate, Comparison
from maskwright.data import Dataset, OneClass, things_only
from maskwright.data.views import one_class
from maskwright.errors import DataError, MaskwrightError, MissingExtraError, UsageError, interruption
from maskwright.evaluation import Evaluator
from maskwright.evaluation.coco import Detections, Kind, Truth
from maskwright.evaluation.confusion import hits
from maskwright.evaluation.records import read_results
from maskwright.evaluation.result import Result
from maskwright.inference.outputs import write_image
from maskwright.locks import FolderLock
from maskwright.ops.precision import has_bfloat16
from maskwright.systems import System
from maskwright.terminal import print_line
from maskwright.training.recipe import Recipe

FINALISTS = 3  # candidates that receive the whole budget
_PILOT = 6  # steps that measure the speed of training
_OVERHEAD = 0.25  # fraction of the time that evaluation and the page take, and at least
_MEASURING = 45.0  # seconds that latency and memory of a system take, with its exports
_RESERVED = ("images", "index.html", "table.csv", "table.md", "comparison.json")  # names in the output folder


def compare(
    systems: Sequence[str] | str,
    data: str | Path | Dataset,
    *,
    out: str | Path,
    hours: float | None = None,
    steps: int | None = None,
    split: str = "train",
    val: Any = None,
    val_split: str = "val",
    count: int = 6,
    seed: int = 0,
    batch: int = 4,
    short: int | None = None,
    device: str = "auto",
    pretrained: str | None = "scenes",
    ray: str | None = None,
    footprint: bool = True,
    **changes: Any,
) -> Comparison:
    """Compare systems on a data set, with an answer whenever the comparison is stopped.

    Candidates are trained with equal budgets on the same images in the same order, and measured on the same images.
    With more than three, the better half goes on after each round with twice the budget (successive halving, Jamieson
    and Talwalkar, AISTATS 2016, arXiv 1502.07943). The folder can be given again after an interruption: what is
    finished is not repeated. Systems that failed are tried again, with the budget of the others.

    Written to `out`: index.html, table.csv and table.md, comparison.json, and a folder per candidate with its weights,
    result and predictions.

    Args:
        systems: Presets, systems and files of weights (which are measured as they are), or "auto", for presets that
            suit the data.
        data: A data set, or what `open_dataset` takes.
        out: The output folder.
        hours: Time for everything.
        steps: Training steps of a candidate that stays to the end; instead of `hours`.
        split: The split to train on.
        val: A data set to measure on, or its source; default: the split `val_split` of `data`, or a fifth of the images
            if there is none.
        val_split: The split to measure on.
        count: Number of candidates for "auto".
        seed: Seed of initial weights, order and augmentation, and of the division of the data.
        batch: Images per step.
        short: Short side of the images in training and measuring; None: on a CPU as small as the objects permit,
            otherwise the presets' own.
        device: Where to train; "auto" takes a GPU if there is one.
        pretrained: "scenes": start from installed weights that were trained on generated images, where they fit, see
            `train`; None: from random weights.
        ray: "local" or the address of a Ray cluster that trains the candidates of a round at the same time; the output
            folder and the data must be on a file system that all its machines share.
        footprint: Measure latency and memory, in processes of their own.
        **changes: Fields of the recipe.

    Returns:
        The comparison.

    Raises:
        UsageError: If an option is invalid, there is nothing to measure on, another process compares in the folder, or
            the folder holds another comparison.
        DataError: If a file cannot be written.
        KeyboardInterrupt: After Ctrl-C; the page shows what is known, and the same call continues.
    """
    if (hours is None) == (steps is None):
        raise UsageError("compare needs either hours (for everything) or steps (of a candidate that stays to the end)")
    if (hours is not None and not hours > 0) or (steps is not None and steps < 1) or count < 1:
        raise UsageError(f"hours, steps and count must be positive, got {hours}, {steps} and {count}")
    begun, folder = time.monotonic(), Path(out)
    source = str(data) if isinstance(data, (str, Path)) else "DIR"
    if ray is not None and isinstance(data, (str, Path)) and Path(data).exists():
        data = Path(data).absolute()  # the machines of a cluster have other working directories
    train_set, val_set, notes = divided(data, split, val, val_split, seed)
    profile = DataProfile.create(things_only(train_set))
    chosen = _candidates(systems, profile, count)
    request = {
        "systems": [c.name for c in chosen], "data": train_set.name, "measured on": val_set.name, "hours": hours,
        "steps": steps, "seed": seed, "batch": batch, "short": short, "pretrained": pretrained,
        "changes": _json(changes), "images": [len(train_set), len(val_set)],
    }  # fmt: skip
    here = _on_cpu(device)
    recipe: dict[str, Any] = {"lr": 5e-4, "tensorboard": False, "workers": 0, "log_every": 10}
    if here and has_bfloat16(torch.device("cpu")):  # half the time of a step, on processors with instructions for it
        recipe["amp"] = "bf16"
    recipe |= changes
    side = short if short is not None or not here else _side(profile)
    if side is not None:
        recipe |= {"short": (side,), "long": 2 * side}
    with FolderLock(folder, "compare", "another comparison writes to this folder", DataError):
        state = _found(folder, request, profile)
        if state is None:
            if pretrained is not None:
                notes = notes + _started(chosen, pretrained, train_set.classes)
            if recipe.get("amp") == "bf16":
                notes = [*notes, "trained in bfloat16 (mixed precision)"]
            state = Comparison(train_set.name, request, profile.to_dict(), chosen, notes=notes)
        _try_again(state, folder)
        run = _Comparing(
            state, folder, train_set, val_set, recipe, {"seed": seed, "batch": batch, "device": device}, hours, steps,
            begun, ray, footprint, source, _continuing(split, val, val_split, batch, recipe),
        )  # fmt: skip
        run.all_rounds()
    return state


class _Comparing:
    """A comparison while it runs."""

    def __init__(
        self, state: Comparison, folder: Path, train_set: Dataset, val_set: Dataset, recipe: dict[str, Any],
        common: dict[str, Any], hours: float | None, steps: int | None, begun: float, ray: str | None, footprint: bool,
        source: str, continuing: Sequence[str],
    ):  # fmt: skip
        self.state, self.folder, self.train_set, self.val_set = state, folder, train_set, val_set
        self.recipe, self.common, self.hours, self.steps, self.begun = recipe, common, hours, steps, begun
        self.ray, self.footprint, self.source, self.continuing = ray, footprint, source, continuing
        self.before = state.spent + _unsaved(state, folder)
        trained = sum(c.trained for c in state.candidates)
        self.sizes = _rounds(trained)
        state.rounds = len(self.sizes)

    def all_rounds(self) -> None:
        state = self.state
        print_line(f"comparing on {self.train_set.name}: {as_words(state)}")
        self._save()
        try:
            for number in range(state.rounds):
                self._round(number)
                self._eliminate(number)
                self._write(final=False)
            self._finish()
        except KeyboardInterrupt as stop:
            self._write(final=False)
            page = self.folder / "index.html"
            message = f"stopped; {page} has what is known so far, and the same command continues the comparison"
            raise interruption(message, getattr(stop, "exit_code", 130) - 128) from stop

    # ---- rounds ------------------------------------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        waiting = [c for c in self.state.active(number) if c.trained and _missing(c, number)]
        self._plan(waiting, number)
        specs = [self._spec(c, number) for c in waiting]
        if self.ray is not None and waiting:
            for place, done in _over_ray(self.ray, specs):
                self._trained(waiting[place], number, done)
        for candidate, spec in zip(waiting, specs, strict=True) if self.ray is None else ():
            print_line(f"round {number + 1} of {self.state.rounds}: {candidate.label}, {spec['steps']} steps")
            self._trained(candidate, number, _train(spec))
        for candidate in self.state.active(number):
            if not candidate.trained and number < self.state.rounds - 1:
                continue
            self._measure(candidate, number)

    def _plan(self, waiting: Sequence[Candidate], number: int) -> None:
        """Decides the training steps of a round's candidates at once; with `hours` all of them get the same time."""
        new = [c for c in waiting if len(c.rounds) <= number]
        if not new:
            return
        planned = dict[str, int]()
        if self.steps is not None:
            share = max(1, round(self.steps * 2**number / (2**self.state.rounds - 1)))
            planned = {c.label: share for c in new}
        else:
            self._time([c for c in new if "seconds per step" not in c.measured], number)
            others = [c for c in self.state.active(number) if c.trained and c not in new]
            used = [c.rounds[number]["steps"] * c.measured["seconds per step"] for c in others]
            # A system that is tried again gets the time that the others of its round had.
            seconds = max(used) if used else self._seconds(len(waiting), number)
            planned = {c.label: max(10, int(seconds / c.measured["seconds per step"])) for c in new}
        for candidate in new:
            candidate.rounds.append({"steps": planned[candidate.label]})
        self._save()

    def _time(self, candidates: Sequence[Candidate], number: int) -> None:
        """Measures the speed of training where the candidates will be trained."""
        specs = [self._spec(c, number) for c in candidates]
        if self.ray is None or not specs:
            pairs: Iterable[tuple[int, Any]] = ((place, _pilot(spec)) for place, spec in enumerate(specs))
        else:
            pairs = _over_ray(self.ray, specs, _pilot)
        for place, done in pairs:
            # A process that has ended says nothing about the speed; the training itself reports it.
            candidates[place].measured["seconds per step"] = done if isinstance(done, float) else 1.0
            self._save()

    def _seconds(self, waiting: int, number: int) -> float:
        """Training time of each candidate in a round that has not begun for `waiting` of them."""
        assert self.hours is not None
        places = 1 if self.ray is None else _places(self.ray, self.common["device"])
        share = 2**number
        # What is trained at the same time takes the time of one.
        waiting = math.ceil(waiting / places)
        later = sum(math.ceil(size / places) * 2 ** (number + 1 + k) for k, size in enumerate(self.sizes[number + 1 :]))
        left = 3600 * self.hours - self._spent()
        others = sum("ms" not in c.measured for c in self.state.candidates) if self.footprint else 0
        remaining = left - max(_OVERHEAD * left, min(_MEASURING * others, 0.6 * left))
        return max(5.0, remaining * share / (waiting * share + later))

    def _spent(self) -> float:
        """Seconds since the comparison began, without those between an interruption and its continuation."""
        return self.before + time.monotonic() - self.begun

    def _save(self) -> None:
        self.state.spent = round(self._spent(), 1)
        self.state.save(self.folder)

    def _spec(self, candidate: Candidate, number: int) -> dict[str, Any]:
        """What `_train` needs; plain values only, so that it can be sent to another machine."""
        folder = self._folder(candidate, number)
        spec: dict[str, Any] = {
            "system": candidate.name, "weights": candidate.weights, "pretrained": candidate.start or None,
            "folder": str(folder), "train": self.train_set,
            "recipe": self.recipe, **self.common, "seed": self.common["seed"] + 1000 * number,
        }  # fmt: skip
        return spec | ({"steps": candidate.rounds[number]["steps"]} if len(candidate.rounds) > number else {})

    def _trained(self, candidate: Candidate, number: int, done: Mapping[str, Any]) -> None:
        if "error" in done:
            self._failed(candidate, done["error"])
            return
        candidate.rounds[number] |= done
        self._save()
        # Only now: with the checkpoint, training that ended just before the process was killed is not repeated.
        for name in ("last.ckpt", "last.safetensors"):
            (self._folder(candidate, number) / name).unlink(missing_ok=True)

    def _failed(self, candidate: Candidate, why: str) -> None:
        candidate.failed = why
        print_line(f"{candidate.label} failed: {why}")
        self._save()

    def _folder(self, candidate: Candidate, number: int) -> Path:
        return self.folder / candidate.label / f"round-{number + 1}"

    def _measure(self, candidate: Candidate, number: int) -> None:
        if not candidate.trained and not candidate.rounds:
            candidate.rounds = [{"steps": 0, "weights": candidate.name} for _ in range(number + 1)]
        entry = candidate.rounds[number]
        if candidate.failed or not entry.get("weights") or entry.get("AP") is not None:
            return
        try:
            system, result = self._evaluated(candidate, entry["weights"], number)
        except Exception as error:
            self._failed(candidate, _reason(error))
            return
        result.save(self.folder / candidate.label / "result.json")
        entry["AP"] = result.summary[f"{result.kinds[0]}/AP"]
        task = "masks" if result.kinds[0] == "segm" else "boxes"
        if "proposals" in system.tasks and len(self.val_set.classes) > 1:
            task += " of any class"
        licence = shown((system.source or {}).get("weights_licence") or "", 120)
        if candidate.trained:
            licence = "yours: trained here" + (f", from weights under {licence}" if licence else "")
        candidate.measured |= _figures(result) | {"licence": licence or "not stated", "task": task}
        self._save()
        print_line(f"{candidate.label}: AP {100 * entry['AP']:.1f}")

    def _evaluated(self, candidate: Candidate, weights: str, number: int) -> tuple[System, Result]:
        from maskwright.checkpoints import load
        from maskwright.inference import evaluate

        system = load(weights)
        place = None if self.common["device"] == "auto" else self.common["device"]
        last = number == self.state.rounds - 1
        result = evaluate(
            system, self.val_set, boundary=last and "masks" in system.outputs, examples=4 if last else 0, device=place,
            out=self.folder / candidate.label, title=candidate.label,
        )  # fmt: skip
        return system, result

    def _eliminate(self, number: int) -> None:
        """Leave out the worse candidates after a round that is not the last."""
        if number + 1 >= self.state.rounds:
            return
        active = [c for c in self.state.active(number) if c.trained and (c.out is None or c.out > number)]
        active.sort(key=lambda c: (TASKS.index(c.task), -c.rounds[number].get("AP", -1.0)))
        for candidate in active[self.sizes[number + 1] :]:
            if len(candidate.rounds) == number + 1:  # those that went on before another one was tried again stay
                candidate.out = number
        self._save()

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self.footprint:
            images = _examples(self.val_set, self.folder / "images")
            for candidate in self.state.ranking():
                if "ms" not in candidate.measured and candidate.weights is not None and not candidate.failed:
                    done = measure_footprint(candidate.weights, images)
                    candidate.measured |= {"footprint": done} | {k: done[k] for k in ("ms", "MB", "form") if k in done}
                    self._save()
        self.state.finished = True
        self._write(final=True)

    def _columns(self, candidate: Candidate) -> tuple[Truth, Detections, Kind]:
        kind: Kind = "segm" if candidate.task.startswith("masks") else "bbox"
        merged = _of_any_class(candidate)
        judge = Evaluator(OneClass(self.val_set) if merged else self.val_set, (kind,))
        for image_id, objects in self._predictions(candidate).items():
            judge.add(image_id, one_class(objects) if merged else objects)
        return *judge.columns(), kind

    def _predictions(self, candidate: Candidate) -> Mapping[Any, Any]:
        """The stored predictions by image id. That they belong to these images is known, however bad they are."""
        sizes = dict(zip(self.val_set.image_ids(), self.val_set.sizes(), strict=True))
        path = self.folder / candidate.label / "results.json"
        return read_results(path, sizes, self.val_set.category_ids, classes=self.val_set.classes)

    def _write(self, final: bool) -> None:
        """The page and the tables of what is known."""
        ranked = self.state.ranking()
        results = {c.label: Result.load(self.folder / c.label / "result.json") for c in ranked}
        columns = {c.label: self._columns(c) for c in ranked}
        finalists = self.state.finalists()
        self.state.intervals = {}
        if finalists:
            truth, _, kind = columns[finalists[0].label]
            drawn = bootstrap(
                truth, {c.label: columns[c.label][1] for c in finalists}, kind, samples=400 if final else 40,
                seconds=45 if final else 5,
            )  # fmt: skip
            best = finalists[0].label
            if len(drawn[best]):
                self.state.intervals = {
                    "AP": {label: interval(values) for label, values in drawn.items()},
                    "leads": {label: interval(drawn[best] - v) for label, v in drawn.items() if label != best},
                    "draws": len(drawn[best]),
                    "images": len(np.unique(truth.owner[~truth.crowd])),
                }
        for c in ranked:
            truth, found, kind = columns[c.label]
            right = hits(truth, found, by="bbox" if kind == "bbox" else "segm")
            error = calibration(found, right)
            c.measured["calibration"] = None if math.isnan(error) else error
            peers = [results[o.label] for o in ranked if o is not c and _of_any_class(o) == _of_any_class(c)]
            c.measured["weaknesses"] = weaknesses(results[c.label], peers)
        shown: list[Shown] = []
        if len(finalists) > 1:
            truth = columns[finalists[0].label][0]
            agreed = agreement(truth, {c.label: columns[c.label][1] for c in finalists})
            shown = self._disagreements(agreed, finalists, 6 if final else 2)
        self._save()
        write_tables(self.state, self.folder)
        write_page(self.state, self.folder, results, shown, self.source, self.continuing)

    def _disagreements(self, agreed: Any, finalists: Sequence[Candidate], count: int) -> list[Shown]:
        """The images about which the finalists agree least, with the objects of each."""
        judges = {c.label: self._predictions(c) for c in finalists}
        ids = sorted(self.val_set.image_ids(), key=lambda i: (isinstance(i, str), i))
        positions = {image_id: place for place, image_id in enumerate(self.val_set.image_ids())}
        shown: list[Shown] = []
        order: list[int] = np.argsort(agreed, kind="stable")[:count].tolist()
        for row in order:
            if agreed[row] >= 0.999:
                break
            image_id = ids[row]
            sample = self.val_set[positions[image_id]]
            answers = {label: _confident(found.get(image_id)) for label, found in judges.items()}
            shown.append(Shown(str(image_id), float(agreed[row]), sample.image, sample.target, answers))
        return shown


# ---- parts -----------------------------------------------------------------------------------------------------------


def _continuing(split: str, val: Any, val_split: str, batch: int, recipe: Mapping[str, Any]) -> list[str]:
    """Arguments of `maskwright train` under which the best system is trained as here."""
    options = ["--split", split] if split != "train" else []
    options += ["--val", str(val)] if isinstance(val, (str, Path)) else []
    options += ["--val-split", val_split] if val_split != "val" else []
    options += ["--batch", str(batch)] if batch != Recipe.batch else []
    if "short" in recipe:
        options += ["--short", str(recipe["short"][0]), "--long", str(recipe["long"])]
    return options + (["--amp", "bf16"] if recipe.get("amp") == "bf16" else [])


def _found(folder: Path, request: Mapping[str, Any], profile: DataProfile) -> Comparison | None:
    """The comparison to continue, None if there is none; UsageError if it is another one."""
    found = Comparison.load(folder)
    if found is None:
        return None
    if {**request, **found.request} != request:
        raise UsageError(
            f"{folder} holds a comparison with other systems, data or options; continue it with the same ones, or give "
            "another folder"
        )
    now = profile.to_dict()
    if any(found.profile.get(name, now[name]) != now[name] for name in ("images", "classes", "objects", "densest")):
        raise UsageError(
            f"the images or annotations have changed since the comparison in {folder} began; give another folder"
        )
    return found


def _try_again(state: Comparison, folder: Path) -> None:
    """Failed systems take part again, from where they failed."""
    failed = [c for c in state.candidates if c.failed is not None]
    for candidate in failed:
        candidate.failed, state.finished = None, False
        number = len(candidate.rounds) - 1
        begun = (folder / candidate.label / f"round-{number + 1}" / "last.ckpt").exists()
        if candidate.trained and candidate.rounds and _missing(candidate, number) and not begun:
            candidate.rounds.pop()
            if not candidate.rounds:  # the measured speed may be part of the failure
                candidate.measured.pop("seconds per step", None)
    if failed:
        print_line(f"trying again what failed: {', '.join(c.label for c in failed)}")


def _unsaved(state: Comparison, folder: Path) -> float:
    """Seconds that a run which was killed had trained since it saved the state, as the files of the training tell."""
    begun = [c for c in state.candidates if c.trained and c.rounds and _missing(c, len(c.rounds) - 1)]
    places = [folder / c.label / f"round-{len(c.rounds)}" for c in begun]
    files = [place / name for place in places for name in ("last.ckpt", "log.csv")]
    times = [path.stat().st_mtime for path in files if path.exists()]
    stored = folder / NAME
    return max(0.0, max(times) - stored.stat().st_mtime) if times and stored.exists() else 0.0


def _of_any_class(candidate: Candidate) -> bool:
    """Whether its AP is that of objects regardless of their class."""
    return candidate.task.endswith("any class")


def _candidates(systems: Sequence[str] | str, profile: DataProfile, count: int) -> list[Candidate]:
    from maskwright.systems import REGISTRY, presets, suggestion

    names = [systems] if isinstance(systems, str) else list(systems)
    chosen: list[tuple[str, str]] = []
    for name in names:
        chosen += choose_systems(profile, count) if name == "auto" else [(name, "")]
    candidates: list[Candidate] = []
    labels: set[str] = set()
    for name, why in dict(reversed(chosen)).items():
        trained = name in presets() or name in REGISTRY
        if not trained and not Path(name).exists():
            raise UsageError(f"{name!r} is neither a system or preset nor a file of weights; {suggestion(name)}")
        stem = name if trained else Path(name).parent.name + "-" + Path(name).stem
        label = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem).strip("-.") or "weights"
        while label.casefold() in labels or label.casefold() in _RESERVED:
            label += "-2"
        labels.add(label.casefold())
        candidates.append(Candidate(name, label, why, trained))
    if not candidates:
        raise UsageError("compare needs at least one system")
    return candidates[::-1]


def _started(candidates: Iterable[Candidate], pretrained: str, classes: Sequence[str]) -> list[str]:
    """Chooses what each candidate's training starts from, and says it."""
    from maskwright.systems import create
    from maskwright.training.pretrained import fitting_weights

    starts: dict[str, list[str]] = {}
    for candidate in candidates:
        if candidate.trained:
            try:
                candidate.start = fitting_weights(create(candidate.name, classes=classes), pretrained) or ""
            except Exception as error:
                _reason(error)  # errors of construction are recorded when the system is trained
            starts.setdefault(candidate.start, []).append(candidate.label)
    given = [f"{', '.join(labels)} from the installed weights {name}" for name, labels in starts.items() if name]
    if not given:
        return []
    others = f", {', '.join(starts[''])} from random weights" if "" in starts else ""
    return [f"training starts: {'; '.join(given)}{others}"]


def _reason(error: Exception) -> str:
    """Why a system failed, while the others go on; mistakes of the library are raised again with MASKWRIGHT_DEBUG."""
    if isinstance(error, MaskwrightError):
        return str(error)
    if os.environ.get("MASKWRIGHT_DEBUG"):
        raise error
    return f"{type(error).__name__}: {shown(error, 200)}"


def _rounds(candidates: int) -> list[int]:
    """Number of trained candidates in each round."""
    sizes = [candidates]
    while sizes[-1] > FINALISTS:
        sizes.append(max(FINALISTS, math.ceil(sizes[-1] / 2)))
    return sizes


def _missing(candidate: Candidate, number: int) -> bool:
    return len(candidate.rounds) <= number or not candidate.rounds[number].get("weights")


def _train(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train one candidate for one round; continues an interrupted run."""
    from maskwright.training import train

    folder, steps = Path(spec["folder"]), int(spec["steps"])
    start = time.monotonic()
    recipe: dict[str, Any] = dict(spec["recipe"])
    recipe.setdefault("warmup", max(1, min(100, steps // 10)))
    recipe.setdefault("ema", 0.99 if steps < 2000 else 0.998)
    try:
        best = train(
            spec["system"], spec["train"], val=False, out=folder, weights=spec["weights"], steps=steps,
            pretrained=None if spec["weights"] else spec.get("pretrained"),
            resume=(folder / "last.ckpt").exists(), seed=spec["seed"], batch=spec["batch"], device=spec["device"],
            **recipe,
        )  # fmt: skip
    except Exception as error:
        return {"error": _reason(error)}
    return {"weights": str(best), "seconds": round(time.monotonic() - start, 1)}


def _pilot(spec: Mapping[str, Any]) -> float:
    """Seconds per training step, measured over a few steps."""
    times: list[float] = []

    class Clock:
        def log(self, step: int, values: dict[str, float]) -> None:
            times.append(time.monotonic())

    from maskwright.training import train

    folder = Path(spec["folder"]).with_name("pilot")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        recipe: dict[str, Any] = {**spec["recipe"], "log_every": 1}
        train(
            spec["system"], spec["train"], val=False, out=folder, steps=_PILOT, seed=spec["seed"], batch=spec["batch"],
            device=spec["device"], logger=Clock(), **recipe,
        )  # fmt: skip
    except Exception as error:
        _reason(error)
        return 1.0  # the training itself reports it
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    steps = sorted(set(times))
    gaps = [b - a for a, b in pairwise(steps) if b - a > 1e-4]
    return statistics.median(gaps) if gaps else 1.0


def _cluster(address: str) -> Any:
    """Ray, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        library: Any = importlib.import_module("ray")
    except ImportError:
        raise MissingExtraError("Ray", "ray") from None
    if not library.is_initialized():
        own = address == "local"
        library.init(None if own else address, include_dashboard=False, log_to_driver=False)
    return library


def _on_gpus(library: Any, device: str) -> bool:
    return device != "cpu" and bool(library.cluster_resources().get("GPU"))


def _places(address: str, device: str) -> int:
    """How many candidates a Ray cluster trains at the same time: each takes a GPU, or a core where there is none."""
    library = _cluster(address)
    resources = library.cluster_resources()
    return max(1, int(resources.get("GPU" if _on_gpus(library, device) else "CPU", 1)))


def _over_ray(
    address: str, specs: Sequence[dict[str, Any]], function: Callable[[Mapping[str, Any]], Any] | None = None
) -> Iterator[tuple[int, Any]]:
    """Train candidates at the same time on a Ray cluster: the position and outcome of each, as they finish.

    Args:
        address: "local" or the address.
        specs: What the function takes.
        function: What is computed; None: `_train`.
    """
    library = _cluster(address)
    # Ray hides GPUs from tasks that do not ask for one.
    needs = {"num_gpus": 1} if _on_gpus(library, specs[0]["device"]) else {}
    task = library.remote(max_retries=2, **needs)(function or _train)
    running = {task.remote(_anywhere(spec)): place for place, spec in enumerate(specs)}
    while running:
        finished, _ = library.wait(list(running), num_returns=1)
        for each in finished:
            place = running.pop(each)
            try:
                yield place, library.get(each)
            except library.exceptions.RayError as error:  # the process or its machine has ended
                yield place, {"error": _reason(error)}


def _anywhere(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec whose paths do not depend on the working directory."""
    paths = {name: str(Path(spec[name]).absolute()) for name in ("folder", "weights") if spec[name] is not None}
    return {**spec, **paths}


def _figures(result: Result) -> dict[str, Any]:
    kind = result.kinds[0]
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    figures: dict[str, Any] = {name: result.summary.get(f"{kind}/{name}", -1.0) for name in names}
    figures["boundary AP"] = result.summary.get("boundary/AP", -1.0)
    figures["parameters"] = result.speed.parameters
    return figures


def _examples(dataset: Dataset, folder: Path, count: int = 6) -> list[Path]:
    """Some images of a data set as files."""
    from PIL import Image

    chosen = [i * len(dataset) // count for i in range(count)] if len(dataset) > count else list(range(len(dataset)))
    paths: list[Path] = []
    for number, index in enumerate(chosen):
        image = dataset[index].image
        pixels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        path = folder / f"{number}.png"
        write_image(path, Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), sync=False)
        paths.append(path)
    return paths


def _confident(found: Any) -> Any:
    if found is None or found.scores is None:
        return None
    return found[found.scores >= 0.5]


def _on_cpu(device: str) -> bool:
    import torch

    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def _side(profile: DataProfile) -> int:
    """The smallest short side, from 160 to 320, at which the median object has 24 pixels."""
    return int(min(320, max(160, 32 * round(24 / max(profile.size, 1e-6) / 32))))


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(cast(tuple[Any, ...], v)) if isinstance(v, tuple) else v for name, v in values.items()}


def as_words(state: Comparison) -> str:
    """The candidates of a comparison in a line."""
    return ", ".join(c.label for c in state.candidates)


def describe_choice(candidates: Iterable[Candidate]) -> list[str]:
    """Why each candidate was chosen, a line each."""
    return [f"{c.label}: {c.why}" for c in candidates if c.why]
