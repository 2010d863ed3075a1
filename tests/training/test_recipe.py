from __future__ import annotations

import json

import pytest

from maskwright.errors import UsageError
from maskwright.training import RECIPES, Recipe, named_recipe
from maskwright.training.setup import make_augment

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_json(name: str):
    recipe = RECIPES[name]
    again = Recipe.from_json(recipe.to_json())
    assert again.to_dict() == recipe.to_dict()
    assert not recipe.differences(again)
    assert isinstance(again.short, tuple)
    assert isinstance(again.milestones, tuple)


def test_the_default_is_the_small_recipe():
    assert Recipe() == RECIPES["small"]


def test_detectron2s_1x_drops_at_60k_and_80k_of_90k():
    recipe = named_recipe("detectron2-1x")
    rates = {step: 0.02 * recipe.factor(step, 90_000) for step in (0, 500, 1000, 59_999, 60_000, 79_999, 80_000)}
    expected = {0: 2e-5, 500: 0.01001, 1000: 0.02, 59_999: 0.02, 60_000: 0.002, 79_999: 0.002, 80_000: 0.0002}
    assert rates == pytest.approx(expected)


def test_detectron2s_3x_drops_at_210k_and_250k_of_270k():
    recipe = named_recipe("detectron2-3x")
    assert [recipe.factor(s, 270_000) for s in (209_999, 210_000, 249_999, 250_000)] == pytest.approx(
        [1, 0.1, 0.1, 0.01]
    )


def test_torchvisions_drops_after_16_and_22_of_26_epochs():
    recipe = named_recipe("torchvision")
    per_epoch = 7330
    for epoch, factor in ((16, 0.1), (22, 0.01)):
        assert recipe.factor(epoch * per_epoch - 1, 26 * per_epoch) == pytest.approx(10 * factor)
        assert recipe.factor(epoch * per_epoch, 26 * per_epoch) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1, 1), ("cosine", 0.505, 0.01), ("poly", 0.5**0.9, 0.01**0.9)]
)
def test_schedules(schedule: str, middle: float, end: float):
    recipe = Recipe().with_changes({"schedule": schedule, "warmup": 0})
    assert recipe.factor(0, 100) == 1
    assert recipe.factor(50, 100) == pytest.approx(middle)
    assert recipe.factor(99, 100) == pytest.approx(end, abs=3e-4)


def test_the_warm_up_is_linear_and_takes_a_quarter_of_a_short_run_at_most():
    recipe = Recipe(schedule="constant", warmup=100, warmup_from=0.2)
    assert [recipe.factor(s, 1000) for s in (0, 50, 100)] == pytest.approx([0.2, 0.6, 1.0])
    assert [recipe.factor(s, 20) for s in (0, 4, 5)] == pytest.approx([0.2, 0.84, 1.0])


def test_the_linear_scaling_rule_counts_the_images_of_a_step():
    assert Recipe(lr=1.0).learning_rate == 1.0
    assert Recipe(lr=1.0, lr_per_image=0.00125, batch=8, accumulate=2).learning_rate == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": 3}, "no training option 'epoch'; did you mean 'epochs'?"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"optimizer": "adam"}, "optimizer must be one of 'sgd', 'adamw', got 'adam'"),
        ({"milestones": (60_000, 80_000)}, "milestones must be fractions of the run"),
        ({"lr": float("nan")}, "lr must be finite and below 2 \\*\\* 53, got nan"),
        ({"ema": 1.5}, "ema must be between 0 and 1, got 1.5"),
        ({"batch": "many"}, "batch must be an integer, got 'many'"),
    ],
)
def test_what_cannot_be_is_said(changes: dict, words: str):
    with pytest.raises(UsageError, match=words):
        Recipe().with_changes(changes)


def test_bad_texts_and_names():
    with pytest.raises(UsageError, match="JSON object"):
        Recipe.from_json("epochs: 3")
    with pytest.raises(UsageError, match="JSON object, got list"):
        Recipe.from_json("[1]")
    with pytest.raises(UsageError, match="no recipe 'detectron2'; known are small, detectron2-1x"):
        named_recipe("detectron2")
    assert json.loads(Recipe().to_json())["betas"] == [0.9, 0.999]


def test_differences_are_told_by_name():
    assert Recipe().differences(Recipe(lr=1.0, freeze=("backbone",))) == [
        "lr: 0.0002 -> 1.0",
        "freeze: [] -> ['backbone']",
    ]


@pytest.mark.parametrize("augment", [{"flip": "often"}, {"jitter": 3.0}])
def test_an_augmentation_of_the_wrong_kind_is_told(augment):
    with pytest.raises(UsageError, match="an augmentation has a value of the wrong type"):
        make_augment(Recipe(augment=augment))
