"""What has to be there before the first step: the devices, the data, the system."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from maskwright.data import OneClass, Renamed, things_only
from maskwright.errors import MissingExtraError, TrainingError, UsageError
from maskwright.systems import PanopticSystem, ProposalSystem, System, create, names, presets, system_class
from maskwright.training.recipe import Recipe


def launch(recipe: Recipe) -> Any:
    """Lightning Fabric on the recipe's devices; with several, the other processes exist when this returns.

    Started by torchrun, its numbers of devices and nodes hold. Otherwise the running script is started once more per
    further device.
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
        raise UsageError(
            f"batch is {recipe.batch} images over all devices; it must be a multiple of the {devices * nodes} devices"
        )
    kind = device_kind(recipe.device)
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(f"devices is {devices}, this machine has {torch.cuda.device_count()}")
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


def device_kind(wish: str) -> str:
    """ "cuda", "mps" or "cpu": what `wish` ("auto" takes the fastest) means on this machine."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wish == "auto":
        return next(kind for kind, is_there in there.items() if is_there)
    if not there[wish]:
        raise UsageError(
            f"device {wish!r} is not there; this machine has {', '.join(k for k, t in there.items() if t)}"
        )
    return wish


def open_sets(data: Any, val: Any, keypoints: bool, panoptic: bool = False) -> tuple[Any, Any | None]:
    """The set to learn from and the one to validate on, None where there is none.

    `val` may be a data set, a source of its own (its split "val"), None for the "val" split of `data` where it has
    one, or False for none.
    """
    from maskwright.data import as_dataset, has_split, open_dataset

    points, stuff = keypoints or None, panoptic or None  # what is not needed is not dropped either
    if isinstance(data, (str, Path)):
        train_set = open_dataset(data, "train", keypoints=points, panoptic=stuff)
        if val is None and has_split(data, "val", keypoints=points, panoptic=stuff):
            val = data
    else:
        train_set = as_dataset(data)
    if val is None or val is False:
        return train_set, None
    if not isinstance(val, (str, Path)):
        return train_set, as_dataset(val)
    return train_set, open_dataset(val, "val", keypoints=points, panoptic=stuff)


def make_system(
    system: str | System,
    classes: Sequence[str],
    weights: str | Path | None,
    options: Mapping[str, Any] | None,
    stuff: Sequence[str] = (),
) -> System:
    """The system to train: one given, one by name with random weights, or one that starts from `weights`.

    Weights of other classes keep the rows of the head whose class names match; a system of proposals has no classes.
    `stuff` are the classes that are regions: a system that can divides images among both then.
    """
    if isinstance(system, System):
        if weights is not None or options:
            raise UsageError("weights and options go with a system's name; here a finished system was given")
        return system
    options = dict(options or {})
    if stuff:
        options = {"stuff": [name for name in stuff if name in classes], **options}
    if weights is None and (system in names() or system in presets()):
        if issubclass(system_class(presets().get(system, system)), ProposalSystem):
            return create(system, **options)
        return create(system, **{**options, "classes": tuple(classes)})
    from maskwright.checkpoints import load

    source = system if weights is None else weights
    wanted = presets().get(system, system)
    if weights is not None and wanted in names() and _adopts(wanted):
        return _adopted(system, wanted, weights, options)
    loaded = load(source, classes=tuple(classes), **options)
    if weights is not None and loaded.name != wanted:
        raise UsageError(f"{weights} holds a {loaded.name}, not a {wanted}")
    return loaded


def take_trunk(system: System, source: str | Path) -> None:
    """Put the trunk of another system into `system`, in place, with the normalisation of images that it knows.

    A system that needs long to learn from random weights (one with queries, above all) begins with the trunk of one
    that does not, trained on the same images. `source` is a file of any system, or a name of the catalogue.
    UsageError names what differs where the two trunks are not the same network.
    """
    from maskwright.checkpoints import load

    giver = load(source)
    own, theirs = (torch.nn.ModuleList(each.groups()["backbone"]) for each in (system, giver))
    wanted, given = ({k: tuple(v.shape) for k, v in trunk.state_dict().items()} for trunk in (own, theirs))
    for name in wanted | given:
        if wanted.get(name) != given.get(name) and not name.endswith("num_batches_tracked"):
            raise UsageError(
                f"{source}: the trunk of this {giver.name} is another than that of the {system.name} to be trained: "
                f"{name} is {given.get(name, 'missing')} there and {wanted.get(name, 'missing')} here; give the "
                "options that its trunk was made with (backbone, norm, stem_width, in_channels)"
            )
    own.load_state_dict(theirs.state_dict(), strict=False)
    there = giver.preprocess
    system.preprocess = replace(
        system.preprocess, mean=there.mean, std=there.std, divide=there.divide, channels=there.channels
    )


def _adopts(name: str) -> bool:
    """Whether a system can stand on one of another kind."""
    return system_class(name).adopt.__func__ is not System.adopt.__func__  # pyright: ignore[reportFunctionMemberAccess]


def _adopted(system: str, wanted: str, weights: str | Path, options: dict[str, Any]) -> System:
    """A system that stands on what `weights` hold, or goes on from them where they are its own. It keeps their classes:
    what is frozen learns no others."""
    from maskwright.checkpoints import load

    variant = {"variant": options.pop("variant")} if "variant" in options else {}
    loaded = load(weights, **variant)
    if loaded.name == wanted:
        return load(weights, **variant, **options) if options else loaded
    kind = system_class(wanted)
    chosen = kind.presets[system].options if system in kind.presets else {}
    try:
        return kind.adopt(loaded, **{**chosen, **options})
    except UsageError as error:
        raise UsageError(f"{weights}: {error}") from None


def fit_sizes(system: System, recipe: Recipe) -> None:
    """Give the system the recipe's sizes for test time, so that what is trained is what is evaluated and saved."""
    if recipe.short or recipe.long:
        system.preprocess = system.preprocess.at(max(recipe.short) if recipe.short else None, recipe.long)


def make_augment(recipe: Recipe) -> Any:
    """The recipe's augmentation, an `Augment` of the data room. What it does not name does not happen."""
    from maskwright.data import Augment

    options = {"flip": 0.0, **recipe.augment}
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
    except TypeError as error:  # a comparison with a value of another kind
        raise UsageError(f"an augmentation has a value of the wrong kind: {error}") from None


def fit_classes(dataset: Any, system: System) -> Any:
    """The data set with labels as the system counts them; objects of classes the system does not know are left out."""
    if not getattr(system, "stuff", ()):
        dataset = things_only(dataset)
    if tuple(dataset.classes) == tuple(system.classes):
        return dataset
    if isinstance(system, ProposalSystem):
        return OneClass(dataset, system.classes[0])
    if not set(dataset.classes) & set(system.classes):
        raise UsageError(
            f"the system knows {_few(system.classes)}, the data {_few(dataset.classes)}: no class in common; "
            "give classes= the names to learn"
        )
    return Renamed(dataset, system.classes)


def check_data(dataset: Any, split: str) -> None:
    """TrainingError where there is nothing to learn from. Stops at the first object; images are not read."""
    total = len(dataset)
    if not total:
        raise TrainingError(f"the {split} set {dataset.name} has no images")
    for index in range(total):
        target = dataset.targets(index)
        if bool((~target.crowd).any()) if target.crowd is not None else len(target) > 0:
            return
    raise TrainingError(
        f"the {split} set {dataset.name} has {total} images and not one object of the classes "
        f"{_few(dataset.classes)} to learn from; `maskwright check` says what its annotations hold"
    )


def divides(system: str | System, weights: str | Path | None) -> bool:
    """Whether the system can divide images among things and stuff: whose sets may keep their regions."""
    if isinstance(system, System):
        return bool(getattr(system, "stuff", ()))
    if system in names() or system in presets():
        return issubclass(system_class(presets().get(system, system)), PanopticSystem)
    from maskwright.checkpoints import load

    return isinstance(load(system if weights is None else weights), PanopticSystem)


def _few(classes: Sequence[str]) -> str:
    return ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
