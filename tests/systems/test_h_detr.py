"""H-DETR: its options, two groups of queries, losses of boxes, and published files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from maskwright.checkpoints import load, save
from maskwright.checkpoints.fitting import renamed
from maskwright.checkpoints.origins import origins
from maskwright.errors import UsageError
from maskwright.ops import query_boxes
from maskwright.ops.losses import focal_sum
from maskwright.ops.query_boxes import BoxTargets, box_costs, focal_classes, focal_costs, inverse_sigmoid
from maskwright.structures import Instances, Placement
from maskwright.systems import describe
from maskwright.systems.h_detr import HDETR, token_boxes
from tests.systems.tiny import objects, sized

build = sized(
    {
        "h-detr": {
            "backbone": {"name": "resnet18", "width": 16},
            "transformer": {
                "width": 96,
                "heads": 6,
                "hidden": 64,
                "levels": 3,
                "points": 2,
                "queries": 12,
                "encoder_layers": 2,
                "decoder_layers": 3,
            },
            "many_queries": 24,
            "repeats": 2,
        }
    }
)


LAYOUT = Path(__file__).parents[1] / "parity" / "layouts" / "mask-frozen-detr-hdetr_r50.json"
SMALL = (64, 96)
OPTIONS = {
    "Deformable DETR": {"many_queries": 0, "mixed_selection": False, "look_twice": False},
    "four levels, other weights": {"transformer": {"levels": 4, "dropout": 0.1}, "many_weight": 0.5},
}


def random_images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SMALL, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_predicts(options):
    system = build("h-detr", **options)
    assert (system.outputs, system.needs, system.tasks) == ({"boxes"}, frozenset(), {"instances"})
    assert list(system.networks()) == ["dense"]
    terms = system.losses(system(random_images()), [objects(n, size=SMALL) for n in (3, 0)])
    sum(terms.values(), torch.zeros(())).backward()
    assert all(torch.isfinite(v) for v in terms.values()), terms
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        found = system.eval().decode(system(random_images()), [Placement.identity(SMALL)] * 2)
    assert all(own.masks is None and len(own) == 24 for own in found)  # 12 queries, 2 classes


def test_the_second_group_of_queries_does_not_change_the_first():
    system = build("h-detr")
    with torch.no_grad():
        training, inference = system.train()(random_images()), system.eval()(random_images())
    assert training.logits.shape[2] == 36
    assert inference.logits.shape[2] == 12
    torch.testing.assert_close(training.logits[:, :, :12], inference.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(training.boxes[:, :, :12], inference.boxes, rtol=1e-4, atol=1e-5)


def test_objects_are_repeated_for_the_second_group_and_count_as_often():
    system = build("h-detr", repeats=3)
    raw, target = system(random_images(1)), objects(2, size=SMALL)
    terms = system.losses(raw, [target])
    counts: dict[str, int] = {}
    inner = system._terms

    def counted(logits, boxes, targets, count):
        counts[f"{logits.shape[2]}"] = int(count)
        return inner(logits, boxes, targets, count)

    system._terms = counted
    assert system.losses(raw, [target]).keys() == terms.keys()
    assert counts == {"12": 2, "24": 6, str(raw.memory.shape[1]): 2}


@pytest.mark.parametrize(("look_twice", "reached"), [(True, True), (False, False)])
def test_gradients_reach_the_box_of_the_previous_layer(look_twice, reached):
    dense = build("h-detr", look_twice=look_twice).dense
    for head in dense.box_heads:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.01)
    x = torch.randn(1, 5, 96)
    memory = torch.randn(1, 12, 96)
    ratios, padding = torch.ones(1, 3, 2), torch.zeros(1, 12, dtype=torch.bool)
    shapes = [(2, 3), (2, 2), (1, 2)]
    start = torch.full((1, 5, 4), 0.4)
    _, boxes, _ = dense._decode(x, x, start, memory, shapes, ratios, padding)
    bias = dense.box_heads[0].layers[-1].bias
    (gradient,) = torch.autograd.grad(boxes[1].sum(), bias, allow_unused=True)
    # The gradient through the reference points of the attention is cut in both cases.
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) == reached


@pytest.mark.fast
def test_tokens_start_from_a_box_around_their_own_cell():
    shapes = [(2, 4), (1, 2), (1, 1), (1, 1), (1, 1)]
    padding = torch.zeros(1, 13, dtype=torch.bool)
    padding[0, [2, 3, 6, 7]] = True  # half of the first level
    counts = torch.tensor([[[2, 2], [1, 1], [1, 1], [1, 1], [1, 1]]])
    boxes = token_boxes(shapes, counts, padding)[0].sigmoid()
    torch.testing.assert_close(boxes[0], torch.tensor([0.25, 0.25, 0.05, 0.05]))
    torch.testing.assert_close(boxes[5], torch.tensor([0.75, 0.75, 0.05, 0.05]))
    torch.testing.assert_close(boxes[8], torch.tensor([0.5, 0.5, 0.1, 0.1]))
    assert (boxes[[2, 3, 6, 7, 9]] == 1).all()  # padding, and a centre outside of the image
    torch.testing.assert_close(boxes[12], torch.tensor([0.5, 0.5, 0.8, 0.8]))


@pytest.mark.fast
def test_focal_losses_and_costs_agree_with_their_definition():
    logits = torch.randn(2, 1, 6, 3)
    own = BoxTargets(torch.tensor([2, 0]), torch.rand(2, 4), (8, 8))
    pairs = (torch.tensor([[1, 4], [0, 5]]), torch.tensor([[0, 1], [1, 0]]))
    goal = torch.zeros_like(logits)
    goal[0, 0, 1, 2] = goal[0, 0, 4, 0] = goal[1, 0, 0, 0] = goal[1, 0, 5, 2] = 1
    expected = torch.stack([focal_sum(logits[k], goal[k]) for k in (0, 1)])
    torch.testing.assert_close(focal_classes(logits, [own], [pairs]), expected)
    costs = focal_costs(logits[:, 0], own.labels)
    alone = logits[1, 0, 3, 2].reshape(1)
    torch.testing.assert_close(costs[1, 3, 0], focal_sum(alone, torch.ones(1)) - focal_sum(alone, torch.zeros(1)))


@pytest.mark.fast
def test_costs_do_not_depend_on_how_many_objects_are_processed_at_once(monkeypatch):
    predicted, true = torch.rand(2, 7, 4), torch.rand(5, 4)
    whole = box_costs(predicted, true, 5.0, 2.0)
    monkeypatch.setattr(query_boxes, "BUDGET", 100 * 14)
    torch.testing.assert_close(box_costs(predicted, true, 5.0, 2.0), whole)
    assert box_costs(predicted, true[:0], 5.0, 2.0).shape == (2, 7, 0)


@pytest.mark.fast
def test_inverse_sigmoid_stays_finite_at_the_borders():
    values = torch.tensor([-0.1, 0.0, 0.3, 1.0])
    torch.testing.assert_close(inverse_sigmoid(values).sigmoid(), torch.tensor([0.0, 0.0, 0.3, 1.0]), atol=2e-5, rtol=0)


def test_other_classes_keep_the_row_of_any_object(tmp_path):
    system = build("h-detr", classes=("a", "b"))
    with torch.no_grad():
        for number, head in enumerate(system.dense.class_heads):
            head.weight[:] = torch.tensor([[10.0], [20.0]]) + number
    save(system, tmp_path / "own.safetensors")
    other = load(tmp_path / "own.safetensors", classes=["x", "b", "a"])
    last = len(system.dense.class_heads) - 1
    assert other.dense.class_heads[0].weight[:, 0].tolist()[1:] == [20.0, 10.0]
    assert other.dense.class_heads[last].weight[:, 0].tolist() == [10.0 + last, 20.0 + last, 10.0 + last]


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": {"name": "swin-tiny", "width": 24, "depths": (1, 1, 1, 1), "heads": (1, 2, 3, 4)}},
        {"transformer": {"encoder_layers": 0}, "mixed_selection": False},
    ],
    ids=["Swin", "no encoder"],
)
def test_unused_parameters_have_a_gradient_of_zero(options):
    system = build("h-detr", **options).train()
    sum(system.losses(system(random_images(1)), [objects(2, size=SMALL)]).values()).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transformer": {"levels": 2}}, r"transformer.levels must be from 3 \(strides 8, 16, 32\) to 6, got 2"),
        ({"transformer": {"width": 66}}, r"transformer.width must be a multiple of 4 and of transformer.heads \(8\)"),
        ({"transformer": {"queries": 0}}, "transformer.queries must be at least 1, got 0"),
        ({"transformer": {"heads": 0}}, "h-detr: transformer.heads must be at least 1, got 0"),
        ({"transformer": {"dropout": 1.0}}, "transformer.dropout must be at least 0 and less than 1, got 1.0"),
        ({"many_queries": -1}, "many_queries must be at least 0, got -1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"cost": {"giou_weight": -1.0}}, "cost.giou_weight must be at least 0, got -1.0"),
        ({"loss": {"mask_weight": 1.0}}, "loss has no option 'mask_weight'"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        describe("h-detr", **options)


def test_options_and_parameters_of_earlier_versions_are_converted():
    old = {
        "backbone": "swin-tiny", "stem_width": 64, "norm": "group", "drop_path": 0.1, "width": 32, "heads": 4,
        "levels": 3, "points": 2, "many_queries": 0, "cost": [1.0, 2.0, 3.0], "weights": [4.0, 5.0, 6.0], "long": 96,
    }  # fmt: skip
    new = HDETR.upgraded(old)
    names = ("class_weight", "box_weight", "giou_weight")
    assert new == {
        "cost": dict(zip(names, (1.0, 2.0, 3.0), strict=True)), "loss": dict(zip(names, (4.0, 5.0, 6.0), strict=True)),
        "backbone": {"name": "swin-tiny", "width": None, "drop_path": 0.1}, "many_queries": 0, "resize": {"long": 96},
        "transformer": {"width": 32, "heads": 4, "levels": 3, "points": 2},
    }  # fmt: skip
    with torch.device("meta"):
        system = HDETR(**new)
    state = {key.removeprefix("dense."): value for key, value in system.state_dict().items()}
    assert "levels" in state
    assert renamed(state, system).keys() == system.state_dict().keys()


@pytest.mark.fast
def test_variants_without_a_published_file_are_recognised():
    tensors = {k: tuple(shape) for k, (shape, _) in json.loads(LAYOUT.read_text())["tensors"].items()}
    origin = next(o for o in origins() if o.system == "h-detr")
    tensors["query_embed.weight"] = (2400, 256)
    for key in list(tensors):
        if "class_embed" in key:
            tensors[key] = (7, *tensors[key][1:])
        if "decoder.layers.5." in key or "encoder.layers.4." in key or "encoder.layers.5." in key:
            del tensors[key]
    tensors = {k.replace("class_embed.6", "class_embed.5"): s for k, s in tensors.items()}
    (candidate,) = origin.candidates(tensors, {"container": {}})
    wanted = {"queries": 900, "decoder_layers": 5, "encoder_layers": 4, "levels": 4, "points": 4}
    assert {k: candidate.options["transformer"][k] for k in wanted} == wanted
    assert candidate.options["many_queries"] == 1500
    assert len(candidate.options["classes"]) == 7
    tensors["query_embed.weight"] = (300, 512)  # Deformable DETR of one stage
    assert not origin.candidates(tensors, {"container": {}})


@pytest.mark.fast
def test_targets_are_read_without_crowd_regions_and_without_masks():
    target = Instances((8, 8), torch.tensor([[0.0, 0, 4, 8], [1, 1, 2, 2]]), torch.tensor([1, 0]))
    target.crowd = torch.tensor([False, True])
    own = BoxTargets.from_instances(target, torch.device("cpu"))
    assert own.boxes.tolist() == [[0.25, 0.5, 0.5, 1.0]]
    assert own.repeated(3).labels.tolist() == [1, 1, 1]
    assert own.masks is None
    with pytest.raises(UsageError, match="targets have boxes but no masks"):
        own.required_masks()
