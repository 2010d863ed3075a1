"""The training loop.

Lightning Fabric moves tensors to the device, casts, averages gradients over devices and clips them. Everything else
that happens in a step is in `Run.step`, everything around it in `Run.fit`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskwright.checkpoints.building import check_values, compare_with_meta
from maskwright.checkpoints.fitting import renamed
from maskwright.data import Dataset, evenly_spaced
from maskwright.data.workers import explained, stop_if_imported
from maskwright.errors import TrainingError, UsageError
from maskwright.files import remove_stale_parts, write_errors_as, write_text
from maskwright.options import plain
from maskwright.structures import Batch, Instances
from maskwright.systems import System, names, presets, system_class
from maskwright.training import setup
from maskwright.training.guards import Stop, keep_batch, memory_advice, not_finite, waited_for
from maskwright.training.logs import Display, Logger, Logs
from maskwright.training.optimizer import (
    Average,
    build_optimizer,
    freeze,
    load_optimizer_state,
    optimizer_state,
    set_rate,
)
from maskwright.training.recipe import Recipe, named_recipe
from maskwright.training.state import LAST, Progress, entries_of, load_state, save_state, seed_step
from maskwright.training.validation import score, term_name, validate


def train(
    system: str | System,
    data: Any,
    *,
    out: str | Path,
    recipe: Recipe | str | None = None,
    resume: bool = False,
    classes: Sequence[str] | None = None,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    pretrained: str | None = None,
    val: Any = None,
    split: str = "train",
    val_split: str = "val",
    logger: Logger | None = None,
    options: Mapping[str, Any] | None = None,
    keypoints: bool | None = None,
    panoptic: bool | None = None,
    **changes: Any,
) -> Path:
    """Trains a system.

    "Best" is by PQ for panoptic data, otherwise by keypoint AP, mask AP or box AP, whichever the system predicts first;
    by the validation loss if no AP can be measured; and the last weights if there is no validation set.

    Args:
        system: The name of a system or preset ("mask-rcnn"), a file of weights to continue from, or a `System` (trained
            in place).
        data: A data set, or what `open_dataset` takes.
        out: The run folder: recipe.json, log.csv, tensorboard/, last.ckpt, last.safetensors, best.safetensors.
        recipe: A `Recipe` or the name of a published one.
        resume: Continue from out/last.ckpt as if there had been no interruption; options that differ are applied and
            reported. Progress is a share of the run: with another batch size, `accumulate` or size of the data set, the
            epochs that are left are trained, and the learning rate continues where it was.
        classes: The names to learn; default: the data set's.
        weights: Start from this file (or catalogue name, or name of installed weights) instead of random weights.
            "shipped" stands for the installed weights of the system.
        backbone_weights: Start with the backbone of this file, of any system, and random weights for the rest.
        pretrained: "scenes": start with what fits of the installed weights that were trained on generated images: all
            parts of the same system's, otherwise the backbone of another's. Or the name of some, see `shipped`.
        val: A validation set or its source; a share of `data` (0.2), divided by class with the seed of the recipe;
            default: the split `val_split` of `data` if there is one; False for none.
        split: The split of `data` to train on. "train" also stands for train2017 and the like.
        val_split: The split of `val`, or of `data`, to validate on. "val" also stands for valid, val2017 and the like.
        logger: Receives every figure too.
        options: Arguments of the constructor, if `system` is a name.
        keypoints: Whether annotations with keypoints are read; default: if the system needs them.
        panoptic: Whether images segmented into things and stuff are read; default: if the preset is a panoptic one, or
            there is nothing else. Systems that support instance segmentation only learn from the things of such a set.
        **changes: Fields of the recipe to replace.

    Returns:
        The path of the best checkpoint, `out/best.safetensors`.

    Raises:
        UsageError: If an option is invalid or contradicts another, or another process trains in the run folder.
        TrainingError: If there is nothing to learn from, a loss is not finite, or a file cannot be written.
        CheckpointError: If out/last.ckpt is damaged.
        KeyboardInterrupt: After Ctrl-C, SIGTERM or SIGHUP, when the state is saved.
    """
    stop_if_imported()
    out = Path(out)
    state = _saved_run(out, resume)
    recipe, said = _settle(recipe, changes, out if resume else None, state)
    fabric = setup.launch(recipe)
    said += setup.emulated(recipe, fabric.device)
    with waited_for(), setup.locked(fabric, out):
        if (out / LAST).exists() and state is None:
            raise UsageError(f"another process has trained in {out} meanwhile; resume its run or give another folder")
        kind = setup.settle_kind(system, weights, options, keypoints, panoptic)
        train_set, val_set = setup.open_sets(data, val, kind, split, val_split, recipe.seed)
        seed_step(recipe.seed)
        if state is None:
            if backbone_weights is not None and weights is not None:
                raise UsageError("weights include a backbone; give weights or backbone_weights, not both")
            if backbone_weights is not None and pretrained is not None:
                raise UsageError("pretrained includes a backbone; give pretrained or backbone_weights, not both")
            stuff = train_set.stuff if kind.takes_stuff else ()
            system = setup.make_system(system, classes or train_set.classes, weights, options, stuff, said, pretrained)
            if backbone_weights is not None:
                setup.take_backbone(system, backbone_weights)
        else:
            system = _same_system(system, state, options, out / LAST)
        train_set = setup.fit_classes(train_set, system, said)
        if val_set is not None:
            said += setup.unknown_objects(val_set, "validation", system)
        setup.check_data(train_set, "training", system)
        setup.fit_sizes(system, recipe)
        setup.fit_white(system, train_set)
        run = Run(fabric, system, train_set, val_set, out, recipe, state, logger)
        for line in [*said, *run.said]:
            run.display.say(line)
        try:
            with explained(lambda: run.loader.iterator):
                return run.fit()
        finally:
            run.loader.close()
            run.logs.close()


class Objective(nn.Module):
    """What is differentiated: from images and targets to loss terms, in float32.

    This module is wrapped for several devices, so that the hooks that average gradients see the parameters of all
    networks, also of those that only `losses` calls.
    """

    def __init__(self, system: System):
        super().__init__()
        self.system = system

    def forward(self, images: Tensor, targets: Sequence[Instances]) -> dict[str, Tensor]:
        raw = self.system(*self.system.inputs(images, [target.image_size for target in targets]))
        return {name: value.float() for name, value in self.system.losses(raw, targets).items()}


class Run:
    """A training run: system, data, optimizer, logs and progress."""

    def __init__(
        self,
        fabric: Any,
        system: System,
        train_set: Dataset,
        val_set: Dataset | None,
        out: Path,
        recipe: Recipe,
        state: dict[str, Any] | None,
        logger: Logger | None,
    ):
        from maskwright.data import make_loader

        self.fabric, self.system, self.recipe, self.out = fabric, system, recipe, out
        self.leads = fabric.global_rank == 0
        self.val_set = None if val_set is None else evenly_spaced(val_set, recipe.val_max_images)
        self.loader = make_loader(
            train_set,
            system.preprocess,
            batch_size=recipe.batch // fabric.world_size,
            training=True,
            augment=setup.make_augment(recipe),
            seed=recipe.seed,
            workers=recipe.workers,
            rank=fabric.global_rank,
            world=fabric.world_size,
            pin=fabric.device.type == "cuda",
            balance=recipe.balance,
        )
        self.passes = len(self.loader)  # per epoch
        if not self.passes:
            raise TrainingError(f"{len(train_set)} images do not fill a batch of {recipe.batch}; use a smaller batch")
        self.images = self.loader.plan.length  # in an epoch
        self.total = recipe.steps or recipe.epochs * math.ceil(self.passes / recipe.accumulate)

        # The order matters: weights before the optimizer, the device before the mean is copied, compilation last.
        self.still = freeze(system, recipe.freeze)
        if recipe.sync_norm and fabric.world_size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(system)  # pyright: ignore[reportUnknownMemberType] - no types in torch
        if recipe.channels_last:
            system.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - missing in the overloads
        if state is not None:
            with entries_of(out / LAST):
                system.load_state_dict(state["model"])
        self.optimizer = build_optimizer(system, recipe)
        self.objective, self.stepper = fabric.setup(Objective(system), self.optimizer)
        self.average = None if recipe.ema is None else Average(system, recipe.ema)
        self.progress = Progress()
        self.said: list[str] = []
        if state is not None:
            with entries_of(out / LAST):
                self._restore(state)
        self.progress.images = self.images
        self.end = self.total - self.progress.shift
        if recipe.compile:
            for network in system.networks().values():
                network.compile()  # pyright: ignore[reportUnknownMemberType] - no types in torch

        if self.leads:
            with write_errors_as(TrainingError, out):
                out.mkdir(parents=True, exist_ok=True)
            remove_stale_parts(out)
            write_text(out / "recipe.json", recipe.to_json(), TrainingError)
        self.logs = Logs(
            out,
            active=self.leads,
            tensorboard=recipe.tensorboard,
            jsonl=recipe.jsonl,
            logger=logger,
            kept=state["logs"] if state is not None else None,
            step=self.progress.step,
        )
        self.display = Display(self.end, start=self.progress.step, active=self.leads)

    @property
    def chosen(self) -> System:
        """The weights that are evaluated and saved: the running mean if there is one."""
        return self.system if self.average is None else self.average.system

    # ---- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Trains to the end, or until patience runs out; returns the path of the best checkpoint."""
        here, recipe = self.progress, self.recipe
        self.saved = time.monotonic()
        with self.display, Stop(self.display.say) as self.stop:
            if here.step:
                self.display.say(f"resuming from step {here.step} of {self.end}")
            while (here.step < self.end or here.validated != here.step) and not self._out_of_patience():
                self._learn()
                for batches, size in self._groups():
                    self._timed_step(batches, size)
                    if self._asked_to_stop():
                        self._save()
                        raise self._interruption()
                    if self.leads and time.monotonic() - self.saved >= 60 * recipe.save_minutes:
                        self._save()
                ended = here.seen >= self.passes * recipe.batch
                if here.step >= self.end or (ended and (here.epoch + 1) % recipe.val_every == 0):
                    self._save()  # validation may take long and be interrupted
                    self._validate()
                if ended:
                    here.epoch, here.seen = here.epoch + 1, 0
                self._save()
                if here.step < self.end and not self._out_of_patience() and self._asked_to_stop():
                    raise self._interruption()
        best = f"{here.measure} {abs(here.best):.4f} at step {here.best_step}" if here.best is not None else "the last"
        steps = "step" if here.step == 1 else "steps"
        self.display.say(f"finished after {here.step} {steps}; best: {best}, in {self.out / 'best.safetensors'}")
        self.fabric.barrier()
        return self.out / "best.safetensors"

    def step(self, batches: Iterator[Batch], size: int) -> dict[str, float]:
        """One update of the weights from the mean gradient of `size` batches; returns the means of the loss terms."""
        recipe, here = self.recipe, self.progress
        place_in_run = here.step + here.shift
        rate = recipe.learning_rate * recipe.factor(place_in_run, self.total, here.step + here.warm_shift)
        set_rate(self.optimizer, rate)
        self.system.on_progress(place_in_run / self.total)
        means: dict[str, float] = {}
        for number, batch in enumerate(batches):
            place = (recipe.seed, here.step, number, self.fabric.global_rank)
            last = number + 1 == size
            batch = batch.to(self.fabric.device, non_blocking=True)
            if recipe.channels_last:
                batch.images = batch.images.contiguous(memory_format=torch.channels_last)
            seed_step(*place)
            with self.fabric.no_backward_sync(self.objective, enabled=not last):
                terms: dict[str, Tensor] = self.objective(batch.images, batch.targets)
                total = torch.stack(list(terms.values())).sum()
                self.fabric.backward(total / size)
            norm = self._clip() if last else total.new_zeros(())
            # The only wait for the device in a step, when everything has been queued.
            every = torch.stack([total.detach(), norm, *(t.detach() for t in terms.values())])
            values = cast("list[float]", every.tolist())  # pyright: ignore[reportUnknownMemberType] - no types in torch
            self._check(batch, terms, values, place)
            for name, value in zip(("loss", "gradient", *map(term_name, terms)), values, strict=True):
                means[name] = means.get(name, 0.0) + (value if name == "gradient" else value / size)
        self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.system)
        here.step += 1
        here.seen += size * recipe.batch
        return {**means, "lr": rate}

    def _timed_step(self, batches: Iterator[Batch], size: int) -> None:
        here, recipe = self.progress, self.recipe
        began = time.perf_counter()
        with memory_advice(recipe.batch // self.fabric.world_size, lambda: here.step):
            means = self.step(batches, size)
        means["time"] = time.perf_counter() - began
        for name, value in means.items():
            here.sums[name] = here.sums.get(name, 0.0) + value
        here.terms += 1
        if here.step % recipe.log_every == 0 or here.step == self.end:
            self._log(means["lr"])
        self.display.update(here.step, here.epoch, means["loss"], means["lr"])

    def _groups(self) -> Iterator[tuple[Iterator[Batch], int]]:
        """The rest of this epoch in groups of `accumulate` batches, with their sizes; the last may be smaller."""
        here, recipe = self.progress, self.recipe
        position = min(self.passes, math.ceil(here.seen / recipe.batch))
        here.seen = position * recipe.batch
        if here.step >= self.end or position >= self.passes:
            return
        self.loader.set_epoch(here.epoch, start=position)
        batches = iter(self.loader)
        while here.step < self.end and here.seen < self.passes * recipe.batch:
            size = min(recipe.accumulate, self.passes - here.seen // recipe.batch)
            yield islice(batches, size), size

    def _learn(self) -> None:
        """Sets training mode, except for frozen modules."""
        self.objective.train()
        for module in self.still:
            module.eval()

    def _clip(self) -> Tensor:
        """Clips the gradient to `recipe.clip`; returns its norm before."""
        if self.recipe.clip is None:
            gradients = [p.grad for p in self.system.parameters() if p.grad is not None]
            return torch.nn.utils.get_total_norm(gradients)
        return self.fabric.clip_gradients(
            self.objective, self.stepper, max_norm=self.recipe.clip, error_if_nonfinite=False
        )

    def _check(self, batch: Batch, terms: dict[str, Tensor], values: list[float], place: tuple[int, ...]) -> None:
        """Stops all processes, before the weights change, if a loss or the gradient is not finite."""
        bad = not all(map(math.isfinite, values))
        anywhere = bad
        if self.fabric.world_size > 1:
            flag = torch.tensor(float(bad), device=self.fabric.device)
            anywhere = bool(self.fabric.all_reduce(flag, reduce_op="sum") > 0)
        if not anywhere:
            return
        path = self.out / ("batch.pt" if self.leads else f"batch-{self.fabric.global_rank}.pt")
        if bad:
            keep_batch(path, self.system, batch, terms, place, amp=self.recipe.amp == "bf16")
            raise not_finite(path, self.progress.step, terms, batch.names)
        raise TrainingError(f"step {self.progress.step}: a loss on another process is not finite")

    def _asked_to_stop(self) -> bool:
        """Whether any process received a signal; all stop after the same step."""
        if self.fabric.world_size == 1:
            return self.stop.asked
        flag = torch.tensor(float(self.stop.asked), device=self.fabric.device)
        return bool(self.fabric.all_reduce(flag, reduce_op="sum") > 0)

    def _interruption(self) -> KeyboardInterrupt:
        return self.stop.interruption(
            f"stopped after step {self.progress.step}; resume the run in {self.out} with resume=True (--resume)"
        )

    def _stop_in_validation(self) -> None:
        """Ends a validation that a signal has interrupted; the state was saved before it began."""
        if self.fabric.world_size == 1 and self.stop.asked:
            raise self._interruption()

    def _out_of_patience(self) -> bool:
        return self.recipe.patience is not None and self.progress.stale >= self.recipe.patience

    # ---- numbers -------------------------------------------------------------------------------------------------

    def _log(self, rate: float) -> None:
        here = self.progress
        means = {name: value / here.terms for name, value in here.sums.items()}
        if self.fabric.world_size > 1:
            together = torch.tensor(list(means.values()), dtype=torch.float64, device=self.fabric.device)
            means = dict(zip(means, self.fabric.all_reduce(together).tolist(), strict=True))
        values = {f"train/{name}": value for name, value in means.items() if name not in ("lr", "time")}
        values |= {"lr": rate, "time/step": means["time"]}
        if self.fabric.device.type == "cuda":
            values["memory/GiB"] = torch.cuda.max_memory_allocated(self.fabric.device) / 2**30
        self.logs.write(here.step, here.epoch, values)
        here.sums, here.terms = {}, 0

    def _validate(self) -> None:
        """Evaluates the chosen weights and saves them as the last, and as the best if they are."""
        here, recipe = self.progress, self.recipe
        values: dict[str, float] = {}
        if self.val_set is not None:
            began = time.perf_counter()
            with memory_advice(recipe.batch // self.fabric.world_size, lambda: here.step):
                values = validate(
                    self.fabric,
                    self.chosen,
                    self.val_set,
                    batch=max(1, recipe.batch // self.fabric.world_size),
                    workers=recipe.workers,
                    seed=recipe.seed,
                    between=self._stop_in_validation,
                )
            self.logs.write(here.step, here.epoch, {**values, "time/validation": time.perf_counter() - began})
            better = here.improve(*score(values), values.get("val/loss", math.nan))
            self.display.say(f"step {here.step}: {_sentence(values)}{'  (best)' if better else ''}")
        else:
            better = True
        here.validated = here.step
        self._keep("last", values)
        if better:
            self._keep("best", values)

    # ---- files ---------------------------------------------------------------------------------------------------

    def _keep(self, name: str, values: dict[str, float]) -> None:
        from maskwright.checkpoints import save

        if self.leads:
            path = self.out / f"{name}.safetensors"
            extra = {"step": self.progress.step, "epoch": self.progress.epoch, "measured": values}
            save(self.chosen, path, extra=extra)

    def _save(self) -> None:
        """Writes last.ckpt: everything that an uninterrupted run has in memory, and the lengths of the logs."""
        self.saved = time.monotonic()
        if not self.leads:
            return
        average = self.average
        state = {
            "format": "maskwright-run",
            "system": self.system.name,
            "options": self.system.options,
            "preprocess": self.system.preprocess.to_dict(),
            "source": self.system.source,
            "recipe": self.recipe.to_dict(),
            "progress": asdict(self.progress),
            "model": self.system.state_dict(),
            "optimizer": {"kind": self.recipe.optimizer, "state": optimizer_state(self.optimizer)},
            "average": None if average is None else {"updates": average.updates, "model": average.system.state_dict()},
            "logs": self.logs.lengths(),
        }
        save_state(self.out / LAST, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.progress = Progress.from_dict(state["progress"])
        before = Recipe.from_dict(state["recipe"])
        images = self.progress.images
        self.progress.continue_with(before, self.recipe, self.images)
        if images not in (0, self.images):
            self.said.append(f"changed since the run began: images in an epoch: {images} -> {self.images}")
        if state["optimizer"]["kind"] == self.recipe.optimizer:
            load_optimizer_state(self.optimizer, state["optimizer"]["state"])
        if self.average is not None and state["average"] is not None:
            self.average.system.load_state_dict(state["average"]["model"])
            self.average.updates = state["average"]["updates"]


def _saved_run(out: Path, resume: bool) -> dict[str, Any] | None:
    """The state to resume from, or None for a new run."""
    path = out / LAST
    if not path.exists():
        return None
    if not resume:
        raise UsageError(f"{out} already holds a run; resume it (resume=True, --resume) or give another folder")
    state = load_state(path)
    with entries_of(path):
        return _upgraded(state, path)


def _upgraded(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A state that an earlier version may have written, with today's option and parameter names."""
    if state["system"] not in names():  # a system of the user's
        return state
    kind = system_class(state["system"])
    options = kind.upgraded(state["options"])
    if plain(options) == plain(state["options"]):
        return state
    check_values(options, str(path))
    with torch.device("meta"):
        system = kind.rebuild(options)
    state |= {"options": system.options, "model": renamed(state["model"], system)}
    state["optimizer"] |= {"state": renamed(state["optimizer"]["state"], system)}
    if state["average"] is not None:
        state["average"] |= {"model": renamed(state["average"]["model"], system)}
    return state


def _settle(
    recipe: Recipe | str | None, changes: Mapping[str, Any], folder: Path | None, state: dict[str, Any] | None
) -> tuple[Recipe, list[str]]:
    """The recipe to use, and how it differs from the one that the run started with."""
    before = None if state is None else Recipe.from_dict(state["recipe"])
    if isinstance(recipe, str):
        recipe = named_recipe(recipe)
    if recipe is None:
        recipe = before or Recipe()
        # A run that was killed before its first checkpoint has only its recipe.
        if before is None and folder is not None and (folder / "recipe.json").exists():
            recipe = Recipe.load(folder / "recipe.json")
    recipe = recipe.with_changes(changes)
    changed = [] if before is None else before.differences(recipe)
    return recipe, [f"changed since the run began: {line}" for line in changed]


def _same_system(system: str | System, state: dict[str, Any], options: Mapping[str, Any] | None, path: Path) -> System:
    """The system of the interrupted run in `path`; UsageError if the caller's arguments contradict it."""
    if isinstance(system, System):
        if (system.name, system.options) != (state["system"], state["options"]):
            raise UsageError(f"the run trains {state['system']} with other options; resume it with the same system")
    else:
        asked = system if system in names() else presets().get(system)
        if asked not in (None, state["system"]):
            raise UsageError(f"the run trains {state['system']}, not {system}; resume it with the same system")
        with entries_of(path):
            kind = system_class(state["system"])
            kind.with_options(state["options"], {})
            compare_with_meta(kind, state["options"], state["model"], str(path))
        wanted = kind.with_options(state["options"], plain(dict(options or {})))
        other = [name for name, value in wanted.items() if state["options"].get(name) != value]
        if other:
            raise UsageError(f"the network of a run cannot change when it is resumed: {', '.join(other)}")
        with entries_of(path):
            system = kind.rebuild(state["options"])
    with entries_of(path):
        system.preprocess = type(system.preprocess).from_dict(state["preprocess"])
        system.source = state["source"]
    return system


def _sentence(values: dict[str, float]) -> str:
    shown = [
        n for n in ("val/panoptic/PQ", "val/segm/AP", "val/keypoints/AP", "val/bbox/AP", "val/loss") if n in values
    ]
    return ", ".join(f"{name.removeprefix('val/')} {values[name]:.4f}" for name in shown)
