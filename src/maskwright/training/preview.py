"""A sheet of what the network is fed in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskwright.data import make_loader
from maskwright.data.show import show_batch as draw_batch
from maskwright.errors import UsageError
from maskwright.systems import System
from maskwright.training import setup
from maskwright.training.recipe import Recipe, named_recipe


def show_batch(
    system: str | System,
    data: Any,
    out: str | Path = "batch.png",
    recipe: Recipe | str | None = None,
    *,
    number: int = 0,
    epoch: int = 0,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Draw a batch of `train` with the same arguments: images after augmentation, with masks, boxes and labels.

    The normalization is undone for drawing; padding is shown as the mean colour.

    Args:
        system: The name of a system or preset, a file of weights, or a `System`.
        data: A data set, or what `open_dataset` accepts; its split "train" is used.
        out: The image file.
        recipe: A `Recipe` or the name of a published one.
        number: Number of the batch in its epoch, from 0.
        epoch: Number of the epoch, from 0.
        weights: The weights that training would start from; they may have another preprocessing.
        options: Options of the constructor, if `system` is a name.
        **changes: Fields of the recipe to replace: augment, batch, short, seed, ...

    Returns:
        The path of the image file.

    Raises:
        UsageError: If an option is invalid, or there is no such batch.
    """
    plan = (named_recipe(recipe) if isinstance(recipe, str) else recipe or Recipe()).with_changes(changes)
    kind = setup.settle_kind(system, weights, options, None, None)
    train_set, _ = setup.open_sets(data, False, kind)
    stuff = train_set.stuff if kind.takes_stuff else ()
    network = setup.make_system(system, train_set.classes, weights, options, stuff)
    train_set = setup.fit_classes(train_set, network)
    setup.check_data(train_set, "training", network)
    setup.fit_sizes(network, plan)
    setup.fit_white(network, train_set)
    loader = make_loader(
        train_set,
        network.preprocess,
        batch_size=plan.batch,
        training=True,
        augment=setup.make_augment(plan),
        seed=plan.seed,
        balance=plan.balance,
    )
    if not 0 <= number < len(loader):
        raise UsageError(f"there is no batch {number}; an epoch has {len(loader)} batches, counted from 0")
    loader.set_epoch(epoch, number)
    batch = next(iter(loader))
    return draw_batch(batch, network.preprocess, out, network.classes)
