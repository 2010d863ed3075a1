from __future__ import annotations

import copy

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.training.optimizer import (
    Average,
    build_optimizer,
    freeze,
    load_optimizer_state,
    optimizer_state,
    set_rate,
)
from maskwright.training.recipe import Recipe
from tests.training.tiny_system import Tiny

pytestmark = pytest.mark.fast


def decays(system: Tiny, recipe: Recipe) -> dict[str, float]:
    groups = build_optimizer(system, recipe).param_groups
    return {name: group["weight_decay"] for group in groups for name in group["names"]}


def test_weight_decay_leaves_norms_and_biases_alone_unless_asked():
    system = Tiny(("a", "b"))
    assert {n for n, d in decays(system, Recipe(weight_decay=0.1)).items() if d} == {
        "backbone.0.weight",
        "head.weight",
        "second.weight",
    }
    with_biases = decays(system, Recipe(weight_decay=0.1, decay_biases=True))
    assert with_biases["head.bias"] == 0.1
    assert with_biases["backbone.1.bias"] == with_biases["backbone.1.weight"] == 0
    assert set(decays(system, Recipe(weight_decay=0.1, decay_biases=True, decay_norms=True)).values()) == {0.1}


def test_parts_have_their_own_rates():
    system = Tiny(("a", "b"))
    optimizer = build_optimizer(system, Recipe(rates={"backbone": 0.1, "*.bias": 2.0}))
    set_rate(optimizer, 1.0)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["backbone.0.weight"] == pytest.approx(0.1)
    assert rates["backbone.0.bias"] == pytest.approx(2.0)  # later rules win
    assert rates["head.weight"] == pytest.approx(1.0)
    assert len(rates) == len(list(system.parameters()))


def test_freezing_a_part_also_stills_its_batch_normalisation():
    system = Tiny(("a", "b"))
    still = freeze(system, ("backbone", "head.b*"))
    assert still == [system.backbone[1]]
    assert {n for n, p in system.named_parameters() if p.requires_grad} == {
        "head.weight",
        "second.weight",
        "second.bias",
    }
    assert set(decays(system, Recipe())) == {"head.weight", "second.weight", "second.bias"}


def test_what_was_built_frozen_is_still_too():
    system = Tiny(("a", "b"))
    assert freeze(system, ()) == []
    system.backbone.requires_grad_(False)
    assert freeze(system, ()) == [system.backbone[1]]


def test_what_names_nothing_is_an_error():
    with pytest.raises(UsageError, match=r"freeze: 'neck' is neither a part of tiny \(backbone, head, second\)"):
        freeze(Tiny(("a",)), ("neck",))
    with pytest.raises(UsageError, match="rates: 'bone' is neither"):
        build_optimizer(Tiny(("a",)), Recipe(rates={"bone": 0.1}))
    with pytest.raises(UsageError, match=r"freeze=\* leaves nothing to train"):
        freeze(Tiny(("a",)), ("*",))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizers_memory_goes_by_name(kind: str):
    system = Tiny(("a", "b"))
    recipe = Recipe().with_changes({"optimizer": kind})
    optimizer = build_optimizer(system, recipe)
    for parameter in system.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved = optimizer_state(optimizer)
    other = build_optimizer(copy.deepcopy(system), recipe.with_changes({"rates": {"backbone": 0.5}}))
    load_optimizer_state(other, saved)
    again = optimizer_state(other)
    assert again.keys() == saved.keys() == dict(system.named_parameters()).keys()
    for name, memory in saved.items():
        for key, value in memory.items():
            torch.testing.assert_close(again[name][key], value, rtol=0, atol=0)


def test_the_running_mean_begins_near_and_ends_slow():
    system = Tiny(("a",))
    average = Average(system, 0.9)
    before = system.head.weight.detach().clone()
    with torch.no_grad():
        system.head.weight.add_(1)
        system.backbone[1].running_mean.fill_(3)
    average.update(system)
    # The first decay is 1 / 10: nine tenths of the way at once.
    torch.testing.assert_close(average.system.head.weight, before + 0.9)
    assert average.system.backbone[1].running_mean.eq(3).all()
    average.updates = 10_000
    average.update(system)
    torch.testing.assert_close(average.system.head.weight, before + 0.9 + 0.1 * 0.1)
    assert not average.system.training
    assert not any(p.requires_grad for p in average.system.parameters())
