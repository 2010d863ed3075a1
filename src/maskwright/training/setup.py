"""Preparation of a training run: devices, data, system."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from maskwright.data import Augment, Dataset, OneClass, Renamed, as_dataset, has_split, open_dataset, things_only
from maskwright.data.splitting import divided, share_or_source, warn_about_duplicates
from maskwright.errors import MaskwrightError, MissingExtraError, TrainingError, UsageError
from maskwright.locks import FolderLock
from maskwright.ops.precision import has_bfloat16
from maskwright.options import parameters_of, plain
from maskwright.systems import ProposalSystem, System, create, describe, find, names, presets, stuff_of
from maskwright.training.pretrained import take_pretrained
from maskwright.training.recipe import Recipe


def launch(recipe: Recipe) -> Any:
    """Starts Lightning Fabric on the recipe's devices; with several, the other processes exist when this returns.

    Under torchrun, its numbers of devices and nodes apply. Otherwise the running script is started once more for each
    further device.

    Raises:
        UsageError: If the batch cannot be divided among the devices, or there are fewer devices.
    """
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise MissingExtraError("lightning-fabric", "train") from None
    devices, nodes = recipe.devices, recipe.nodes
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    if recipe.batch % (devices * nodes):
        raise UsageError(f"batch must be a multiple of the number of devices, {devices * nodes}, got {recipe.batch}")
    kind = device_kind(recipe.device)
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(f"devices is {devices}, but this machine has {torch.cuda.device_count()}")
    fabric = Fabric(
        accelerator=kind,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        precision="bf16-mixed" if recipe.amp == "bf16" else "32-true",
    )
    fabric.launch()
    if recipe.sync_norm and fabric.world_size > 1 and kind != "cuda":
        raise UsageError("sync_norm needs GPUs; torch has no synchronised batch normalisation for this device")
    return fabric


@contextmanager
def locked(fabric: Any, out: Path) -> Generator[None, None, None]:
    """The block in which this process and those that train with it are the only ones that write the run folder.

    Raises:
        UsageError: By all of them, if another process trains in it.
    """
    lock, refusal = None, None
    if fabric.global_rank == 0:
        try:
            lock = FolderLock(out, "train", "another process trains in this folder", TrainingError)
        except MaskwrightError as error:
            refusal = error
    if fabric.world_size > 1:
        refusal = fabric.broadcast(refusal, src=0)
    if refusal is not None:
        raise refusal
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def device_kind(wish: str) -> str:
    """The kind of device that `wish` stands for on this machine: "cuda", "mps" or "cpu"; "auto" takes the fastest."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wish == "auto":
        return next(kind for kind, is_there in there.items() if is_there)
    if not there[wish]:
        raise UsageError(
            f"device {wish!r} is not available; this machine has {', '.join(k for k, t in there.items() if t)}"
        )
    return wish


def emulated(recipe: Recipe, device: torch.device) -> list[str]:
    """A line if the precision of the recipe is slower on this processor than float32; none otherwise."""
    if recipe.amp != "bf16" or device.type != "cpu" or has_bfloat16(device):
        return []
    return ["amp is 'bf16', but this processor has no instructions for bfloat16 and emulates it; amp 'no' is faster"]


@dataclass(frozen=True)
class Kind:
    """What kind of data a run reads, settled once before anything is opened.

    Attributes:
        keypoints: Whether annotations with keypoints are read; None: whatever the data set holds.
        panoptic: Whether images segmented into things and stuff are read; None: whatever the data set holds.
        regions: Whether the system learns regions; otherwise it learns from the things of such a set.
        takes_stuff: Whether the constructor takes the names of regions.
    """

    keypoints: bool | None
    panoptic: bool | None
    regions: bool
    takes_stuff: bool


def _check_spelling(name: str) -> None:
    """Raises an UnknownSystemError for what is neither a file nor in the catalogue and resembles a system's name."""
    from maskwright.checkpoints.catalogue import catalogue
    from maskwright.checkpoints.shipping import SHIPPED, elsewhere, shipped

    systems, entries = {*names(), *presets()}, {entry.name for entry in (*catalogue(), *shipped())}
    entries |= {SHIPPED, *elsewhere()}
    similar = get_close_matches(name, systems | entries, 1)
    if name not in entries and systems.intersection(similar) and not Path(name).exists():
        find(name)


def settle_kind(
    system: str | System, weights: str | Path | None, options: Mapping[str, Any] | None, keypoints: bool | None,
    panoptic: bool | None,
) -> Kind:  # fmt: skip
    """What kind of data the system learns from; `keypoints` and `panoptic` are the caller's wishes."""
    named = isinstance(system, str) and (system in names() or system in presets())
    if isinstance(system, System):
        described, wants_panoptic = system, bool(stuff_of(system))
    elif named:
        kind, _ = find(system)
        changes = {k: v for k, v in (options or {}).items() if k != "variant"}
        described = describe(system, **changes)
        wants_panoptic = system in kind.presets and kind.presets[system].task in ("panoptic", "semantic")
    else:
        from maskwright.checkpoints import load

        if weights is None:
            _check_spelling(system)
        described = load(system if weights is None else weights)
        wants_panoptic = bool(stuff_of(described))
    takes_stuff = "stuff" in parameters_of(type(described).__init__)
    regions = "panoptic" in described.tasks and (not isinstance(system, System) or bool(stuff_of(system)))
    return Kind(
        keypoints=True if keypoints is None and "keypoints" in described.needs else keypoints,
        panoptic=True if panoptic is None and wants_panoptic else panoptic,
        regions=regions,
        takes_stuff=takes_stuff,
    )


def open_sets(
    data: Any, val: Any, kind: Kind, split: str = "train", val_split: str = "val", seed: int = 0
) -> tuple[Dataset, Dataset | None]:
    """Opens the training set and the validation set.

    Args:
        data: A data set, or a source.
        val: A data set, a source, a share of `data` (0.2 or "0.2"), None for the split `val_split` of `data` if it has
            one, or False for no validation.
        kind: What kind of data is read.
        split: The split of `data`.
        val_split: The split of `val`.
        seed: Seed of the division, if `val` is a share.

    Returns:
        The training set and the validation set, None if there is none.
    """
    if isinstance(data, (str, Path)):
        train_set: Any = open_dataset(data, split, keypoints=kind.keypoints, panoptic=kind.panoptic)
        if val is None and has_split(data, val_split, keypoints=kind.keypoints, panoptic=kind.panoptic):
            val = data
    else:
        train_set = data
    train_set = as_dataset(train_set)
    val = share_or_source(val) if isinstance(val, str) else val
    if isinstance(val, (int, float)) and not isinstance(val, bool):
        train_set, val = divided(train_set, float(val), seed)
    elif isinstance(val, (str, Path)):
        elsewhere = not isinstance(data, (str, Path)) or str(val) != str(data)
        val = open_dataset(val, val_split, keypoints=kind.keypoints, panoptic=kind.panoptic)
        if elsewhere:
            warn_about_duplicates(train_set, val, 2_000)
    if train_set.stuff and not kind.regions:
        train_set = things_only(train_set)
    return train_set, None if val is None or val is False else as_dataset(val)


def make_system(
    system: str | System,
    classes: Sequence[str],
    weights: str | Path | None,
    options: Mapping[str, Any] | None,
    stuff: Sequence[str] = (),
    said: list[str] | None = None,
    pretrained: str | None = None,
) -> System:
    """The system to train: a given one, one by name with random weights, or one that starts from `weights`.

    Args:
        system: A system, the name of a system or preset, or a file of weights.
        classes: The classes to learn. Weights for other classes keep the rows of the head whose class names match;
            proposal systems have a single class and keep it.
        weights: Weights to start from.
        options: Options of the constructor.
        stuff: Those of `classes` that are regions.
        said: Receives a line about the rows of the head that start new.
        pretrained: Installed weights that a system with random ones takes what fits of, see `take_pretrained`.
    """
    if pretrained is not None:
        if weights is not None:
            raise UsageError("weights and pretrained both give the weights to start from; give one of them")
        if not isinstance(system, System) and system not in names() and system not in presets():
            raise UsageError(f"pretrained applies to a system's name, and {system} names weights itself; omit it")
        if not isinstance(system, System):
            options = _without_download(system, options)
        made = make_system(system, classes, None, options, stuff)
        taken = take_pretrained(made, pretrained)
        if said is not None:
            said += taken
        return made
    if isinstance(system, System):
        if weights is not None or options:
            raise UsageError("weights and options apply to a system's name, not to a constructed system")
        return system
    options = dict(options or {})
    if stuff:
        options = {"stuff": [name for name in stuff if name in classes], **options}
    named = system in names() or system in presets()
    if weights is None and named:
        kind, _ = find(system)
        return create(system, **options if issubclass(kind, ProposalSystem) else {**options, "classes": tuple(classes)})
    from maskwright.checkpoints.loading import load_silently
    from maskwright.checkpoints.shipping import SHIPPED, of_system

    if weights is not None and str(weights) == SHIPPED and named and not Path(SHIPPED).exists():
        weights = of_system(system).name
    source = system if weights is None else weights
    wanted = find(system)[0] if named else None
    if weights is not None and wanted is not None and _adopts(wanted):
        return _adopted(system, wanted, weights, options)
    loaded = load_silently(source, classes=tuple(classes), **options)
    if weights is not None and loaded.name != (wanted.name if wanted else system):
        raise UsageError(f"{weights} holds the weights of {loaded.name}, not of {wanted.name if wanted else system}")
    if said is not None:
        said += _new_rows(source, loaded)
        if weights is not None and str(system) in presets() and not {"backbone", "encoder"} & options.keys():
            said += _another_size(source, loaded, str(system))
    return loaded


def _another_size(source: str | Path, loaded: System, preset: str) -> list[str]:
    """A line if the weights are of a network of another size than that of the preset that was named; none otherwise."""
    counts = [sum(p.numel() for p in each.parameters()) / 1e6 for each in (loaded, describe(preset))]
    if abs(counts[0] - counts[1]) <= 0.1 * max(counts):
        return []
    return [
        f"{source}: the network of the weights is trained, of {counts[0]:.1f} million parameters, and not that of "
        f"{preset}, of {counts[1]:.1f} million"
    ]


def _without_download(name: str, options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Options with which no published backbone is downloaded, because other weights take its place."""
    kind, preset = find(name)
    final = plain(kind.with_options(preset, options or {}).get("backbone"))
    if not isinstance(final, Mapping) or not cast("Mapping[str, Any]", final).get("pretrained"):
        return options or {}
    return kind.with_options(options or {}, {"backbone": {"pretrained": False}})


def _new_rows(source: str | Path, system: System) -> list[str]:
    """A line about which class-specific rows of the heads were not in the weights; none if all were."""
    from maskwright.checkpoints.loading import new_rows

    kept = (system.source or {}).get("classes_kept")
    if kept is None:
        return []
    return [f"{source}: {new_rows(system) or f'the rows of all {len(kept)} classes are kept'}"]


def take_backbone(system: System, source: str | Path) -> None:
    """Copies the backbone of another system's weights into `system`, with the image normalisation it was trained with.

    A system that takes long to train from random weights (one with queries above all) can start from the backbone of
    one that does not, trained on the same images.

    Args:
        system: The system; changed in place.
        source: A file of any system, or a name in the catalogue.

    Raises:
        UsageError: If the two backbones are not the same network; the message names what differs.
    """
    from maskwright.checkpoints import load

    giver = load(source)
    own, theirs = (torch.nn.ModuleList(each.groups()["backbone"]) for each in (system, giver))
    wanted, given = ({k: tuple(v.shape) for k, v in part.state_dict().items()} for part in (own, theirs))
    for name in wanted | given:
        if wanted.get(name) != given.get(name) and not name.endswith("num_batches_tracked"):
            raise UsageError(
                f"{source}: the backbone of this {giver.name} differs from that of the {system.name} to be trained: "
                f"{name} is {given.get(name, 'missing')} there and {wanted.get(name, 'missing')} here; use the same "
                "backbone options (name, norm, width) and in_channels"
            )
    own.load_state_dict(theirs.state_dict(), strict=False)
    there = giver.preprocess
    system.preprocess = replace(
        system.preprocess, mean=there.mean, std=there.std, divide=there.divide, channels=there.channels
    )


def _adopts(kind: type[System]) -> bool:
    """Whether a system can be built on one of another kind."""
    return kind.adopt.__func__ is not System.adopt.__func__  # pyright: ignore[reportFunctionMemberAccess]


def _adopted(system: str, kind: type[System], weights: str | Path, options: dict[str, Any]) -> System:
    """A system built on what `weights` hold, or continued from them if they are its own. It keeps their classes: frozen
    parts cannot learn others."""
    from maskwright.checkpoints import load

    variant = {"variant": options.pop("variant")} if "variant" in options else {}
    loaded = load(weights, **variant)
    if loaded.name == kind.name:
        return load(weights, **variant, **options) if options else loaded
    try:
        return kind.adopt(loaded, find(system)[1], **options)
    except UsageError as error:
        raise UsageError(f"{weights}: {error}") from None


def fit_sizes(system: System, recipe: Recipe) -> None:
    """Sets the recipe's image sizes for evaluation too, so that the system is evaluated and saved as it was trained."""
    if recipe.short or recipe.long:
        system.preprocess = system.preprocess.at(max(recipe.short) if recipe.short else None, recipe.long)


def fit_white(system: System, dataset: Dataset) -> None:
    """Stores which value is white in the images of the training set, so that all later images are scaled alike.

    An explicit `resize.white` is kept, and so is that of the weights if no image has more than 8 bits.
    """
    explicit = system.options.get("resize")
    if isinstance(explicit, Mapping):
        kept: Any = cast("Mapping[str, Any]", explicit).get("white")
    else:
        kept = getattr(explicit, "white", None)
    if kept is not None:
        return
    white = dataset.white()
    if white is not None:
        system.preprocess = replace(system.preprocess, white=white)


def make_augment(recipe: Recipe) -> Augment:
    """The augmentation of a recipe. What the recipe does not name is not done.

    Raises:
        UsageError: If an augmentation does not exist or has an invalid value.
    """
    options: dict[str, Any] = {"flip": 0.0, **recipe.augment}
    if recipe.short:
        options.setdefault("short", recipe.short)
    if recipe.long:
        options.setdefault("long", recipe.long)
    known = [f.name for f in fields(Augment)]
    for name in options:
        if name not in known:
            raise UsageError(f"there is no augmentation {name!r}; known are {', '.join(known)}")
    try:
        return Augment(**options)
    except TypeError as error:  # comparison with a value of another type
        raise UsageError(f"an augmentation has a value of the wrong type: {error}") from None


def fit_classes(dataset: Dataset, system: System, said: list[str] | None = None) -> Dataset:
    """The data set with the labels of the system; objects of other classes are left out.

    Args:
        dataset: The data set.
        system: The system.
        said: Receives a line about what is left out.

    Raises:
        UsageError: If the two have no class in common.
    """
    if not stuff_of(system):
        dataset = things_only(dataset)
    if tuple(dataset.classes) == tuple(system.classes):
        return dataset
    if "proposals" in system.tasks:
        return OneClass(dataset, system.classes[0])
    if not set(dataset.classes) & set(system.classes):
        raise UsageError(
            f"the system has the classes {_few(system.classes)}, the data {_few(dataset.classes)}: none in common; "
            "give classes= the names to learn"
        )
    if said is not None:
        said += unknown_objects(dataset, "training", system)
    return Renamed(dataset, system.classes)


def unknown_objects(dataset: Dataset, split: str, system: System) -> list[str]:
    """A line about the objects of classes that the system does not have, with their numbers; none if there are none."""
    if "proposals" in system.tasks:
        return []
    if not stuff_of(system):
        dataset = things_only(dataset)
    unknown = [number for number, name in enumerate(dataset.classes) if name not in system.classes]
    if not unknown:
        return []
    counts = np.zeros(len(dataset.classes), np.int64)
    for index in range(len(dataset)):
        target = dataset.targets(index)
        labels = target.labels if target.crowd is None else target.labels[~target.crowd]
        counts += np.bincount(labels.numpy(), minlength=len(counts))[: len(counts)]
    there = [f"{counts[number]} of {dataset.classes[number]!r}" for number in unknown if counts[number]]
    if not there:
        return []
    shown = ", ".join(there[:8]) + (f" and of {len(there) - 8} more classes" if len(there) > 8 else "")
    total = int(counts[unknown].sum())
    what = "they are left out" if split == "training" else "none of them can be predicted, which lowers the averages"
    objects = f"{total} object{'s' if total > 1 else ''}"
    return [
        f"the {split} set {dataset.name} has {objects} of classes that the system does not have ({shown}); {what}. "
        f"The system has {_few(system.classes)}"
    ]


def check_data(dataset: Dataset, split: str, system: System) -> None:
    """Checks that a data set has objects, with what the system needs of them. Images are not read.

    Raises:
        TrainingError: If there is nothing to learn from, or the objects lack masks or keypoints that the system needs.
    """
    total = len(dataset)
    if not total:
        raise TrainingError(f"the {split} set {dataset.name} has no images")
    for index in range(total):
        target = dataset.targets(index)
        if bool((~target.crowd).any()) if target.crowd is not None else len(target) > 0:
            break
    else:
        raise TrainingError(
            f"the {split} set {dataset.name} has {total} images and no objects of the classes "
            f"{_few(dataset.classes)}; `maskwright check` reports what its annotations hold"
        )
    for need in sorted(system.needs):
        if (target.masks if need == "masks" else target.keypoints) is None:
            has = [n for n, v in (("boxes", target.boxes), ("masks", target.masks), ("keypoints", target.keypoints))
                   if v is not None]  # fmt: skip
            raise TrainingError(
                f"the {split} set {dataset.name} has {' and '.join(has)} but no {need}, which {system.name} needs; "
                f"annotate {need}, or train a system that needs none (`maskwright systems` lists what each needs)"
            )


def _few(classes: Sequence[str]) -> str:
    return ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
