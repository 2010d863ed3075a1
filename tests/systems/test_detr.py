"""DETR: padding, the mask head, panoptic segmentation, and published files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import maskwright as mw
from maskwright.checkpoints.fitting import renamed
from maskwright.checkpoints.origins.detr import OFFICIAL, TRANSFORMERS, names
from maskwright.errors import CheckpointError, UsageError
from maskwright.ops.query_boxes import BoxTargets
from maskwright.structures import Batch, Panoptic, Placement
from maskwright.systems import describe
from maskwright.systems.detr import DETR, Raw
from tests.systems.tiny import SIZE, objects, sized

build = sized(
    {
        "detr": {
            "backbone": {"name": "resnet18", "width": 16},
            "transformer": {
                "width": 128,
                "hidden": 128,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "queries": 12,
                "dropout": 0.0,
            },
        }
    }
)


IMAGE = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


SIZES = {"width": 32, "heads": 4, "hidden": 32}
FROZEN = {"norm": "frozen", "frozen": 2}


def tiny(transformer: dict | None = None, **options) -> DETR:
    return build("detr", transformer={**SIZES, **(transformer or {})}, **options).eval()  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def system() -> DETR:
    """A system that tests do not change."""
    return tiny()


class Constant(torch.nn.Module):
    """A backbone with fixed feature maps."""

    def __init__(self, levels: list[torch.Tensor]):
        super().__init__()
        self.levels = levels

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.levels


def test_the_content_of_padding_changes_nothing():
    system = tiny()
    valid = torch.tensor([[96, 128]])
    levels = [torch.randn(1, c, 160 // s, 192 // s) for c, s in ((16, 4), (32, 8), (64, 16), (128, 32))]
    other = [level.clone() for level in levels]
    other[3][..., 3:, :] = other[3][..., 4:] = 5.0
    answers = []
    for own in (levels, other):
        system.dense.backbone = Constant(own)
        with torch.no_grad():
            answers.append((system(torch.zeros(1, 3, 160, 192), valid), system(torch.zeros(1, 3, 160, 192))))
    (masked, plain), (masked_other, plain_other) = answers
    assert masked.padding[0].tolist() == [[False] * 4 + [True] * 2] * 3 + [[True] * 6] * 2
    assert torch.equal(masked.boxes, masked_other.boxes)
    assert torch.equal(masked.logits, masked_other.logits)
    assert not torch.allclose(plain.boxes, plain_other.boxes)
    assert system.masks_of(masked, 0, torch.arange(3)).shape == (3, 40, 48)
    assert system.masks is not None
    weights = system.masks.attention(masked.queries[0], masked.memory[0], masked.padding[0])
    assert weights[:, :, masked.padding[0]].eq(0).all()
    assert weights.sum((1, 2, 3)).sub(1).abs().max() < 1e-5, "over all heads and cells together"


def test_an_image_that_fills_the_input_has_no_padding(system: DETR):
    with torch.no_grad():
        whole, plain = system(IMAGE, torch.tensor([list(SIZE)])), system(IMAGE)
    torch.testing.assert_close(whole.boxes, plain.boxes)


def test_training_and_prediction_pass_the_sizes_of_images(monkeypatch):
    system = tiny(resize={"short": 96, "long": 200})
    seen = []
    forward = DETR.forward
    monkeypatch.setattr(
        DETR, "forward", lambda self, images, valid=None: (seen.append(valid), forward(self, images, valid))[1]
    )
    from maskwright.training.loop import Objective

    large, small = objects(2), objects(1, (64, 96))
    images = torch.randn(2, 3, *SIZE)
    Objective(system)(images, [large, small])
    assert seen[-1].tolist() == [list(SIZE), [64, 96]]
    images = [torch.randint(0, 255, (3, *size), dtype=torch.uint8) for size in ((96, 128), (96, 128), (96, 80))]
    list(mw.predict(system, images, batch=2, score_threshold=0.9))
    assert [sizes.tolist() for sizes in seen[-2:]] == [[[96, 128], [96, 128]], [[115, 96]]]  # by equal sizes


def test_boxes_are_fractions_of_the_image_without_padding(system: DETR):
    targets = [objects(2, (64, 96))]
    own = BoxTargets.from_instances(targets[0], torch.device("cpu"))
    x, y, w, h = own.boxes[0].tolist()
    x0, y0, x1, y1 = targets[0].boxes[0].tolist()
    assert (x, y, w, h) == pytest.approx(((x0 + x1) / 192, (y0 + y1) / 128, (x1 - x0) / 96, (y1 - y0) / 64))
    losses = system.losses(system(IMAGE, torch.tensor([[64, 96]])), targets)
    assert set(losses) == {"class", "box", "giou", "mask", "dice", "class_0", "box_0", "giou_0"}


def test_what_it_predicts_and_needs_depends_on_masks(system: DETR):
    assert system.outputs == {"boxes", "masks"}
    assert system.needs == {"masks"}
    assert system.tasks == {"instances", "panoptic", "semantic"}
    assert list(system.networks()) == ["dense", "masks"]
    boxes = describe("detr", masks="none")
    assert boxes.outputs == {"boxes"}
    assert boxes.needs == frozenset()
    assert boxes.tasks == {"instances"}
    assert list(boxes.networks()) == ["dense"]


def test_a_box_model_is_trained_evaluated_and_drawn(tmp_path):
    from maskwright.data import Scenes
    from maskwright.inference import evaluate

    scenes = Scenes(2, (64, 96), stuff=True)
    system = tiny(masks="none", classes=scenes.classes, stuff=scenes.stuff, resize={"short": 64, "long": 96})
    losses = system.losses(system(IMAGE), [replace(objects(3), masks=None)])
    assert set(losses) == {"class", "box", "giou", "class_0", "box_0", "giou_0"}
    result = evaluate(system, scenes)
    assert result.kinds == ("bbox",)
    prediction = mw.predict(system, scenes[0].image)
    assert prediction.instances.masks is None
    prediction.save(tmp_path / "drawn.png")
    prediction.save(tmp_path / "objects.json")
    assert len(json.loads((tmp_path / "objects.json").read_text())["annotations"]) == len(prediction.instances)
    with pytest.raises(UsageError, match="panoptic"):
        mw.predict(system, scenes[0].image, task="panoptic")
    with pytest.raises(UsageError, match="detr: masks='none' predicts boxes only"):
        system.masks_of(system(IMAGE), 0, torch.arange(2))


def test_a_mask_head_can_be_added_to_a_box_model(tmp_path: Path):
    boxes = tiny(masks="none")
    mw.save(boxes, tmp_path / "boxes.safetensors")
    both = mw.load(tmp_path / "boxes.safetensors", masks="frozen")
    assert both.options["masks"] == "frozen"
    assert torch.equal(both.dense.class_head.weight, boxes.dense.class_head.weight)
    assert both.masks is not None
    # A file with a part of the mask head is a broken one.
    mw.save(tiny(), tmp_path / "whole.safetensors")
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        kept = {k: file.get_tensor(k) for k in file.keys() if not k.startswith("masks.output")}  # noqa: SIM118
        save_file(kept, tmp_path / "partial.safetensors", file.metadata())
    with pytest.raises(CheckpointError, match=r"masks\.output"):
        mw.load(tmp_path / "partial.safetensors", masks="joint")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transformer": {"heads": 0}}, "detr: transformer.heads must be at least 1, got 0"),
        ({"transformer": {"heads": 5}}, r"transformer.width must be a multiple of 4 and of transformer.heads \(5\)"),
        ({"transformer": {"width": 40}}, "transformer.width must be a multiple of 16, got 40"),
        ({"transformer": {"queries": -1}}, "transformer.queries must be at least 1, got -1"),
        ({"transformer": {"decoder_layers": 0}}, "transformer.decoder_layers must be at least 1, got 0"),
        ({"loss": {"dice_weight": -1.0}}, "loss.dice_weight must be at least 0, got -1.0"),
        ({"cost": {"giou_weight": float("nan")}}, "cost.giou_weight must be at least 0, got nan"),
        ({"cost": (1.0, 5.0, 2.0)}, "detr: cost must be a mapping or a BoxCost, got"),
        ({"masks": "maybe"}, "masks must be one of 'none', 'frozen', 'joint', got 'maybe'"),
        ({"stuff": ("lava",)}, "stuff has 'lava', not among the 2 classes"),
        ({"backbone": {"name": "darknet-tiny"}}, "a backbone with levels of strides 4, 8, 16 is needed"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        describe("detr", **{"classes": ("a", "b"), **options})


def test_options_and_parameters_of_earlier_versions_are_converted():
    old = {
        "classes": ["a"], "backbone": "resnet18", "stem_width": 16, "norm": "frozen", "norm_eps": 1e-5, "frozen": 2,
        "width": 32, "heads": 4, "no_object": 0.2, "cost": [1.0, 2.0, 3.0], "weights": [1.0, 2.0, 3.0, 4.0, 5.0],
        "short": 64, "mean": None, "masks": "joint",
    }  # fmt: skip
    new = DETR.upgraded(old)
    assert new == {
        "cost": {"class_weight": 1.0, "box_weight": 2.0, "giou_weight": 3.0},
        "loss": {"class_weight": 1.0, "box_weight": 2.0, "giou_weight": 3.0, "mask_weight": 4.0, "dice_weight": 5.0,
                 "no_object": 0.2},
        "classes": ["a"],
        "backbone": {"name": "resnet18", "width": 16, "norm": "frozen", "norm_eps": 1e-5, "frozen": 2},
        "transformer": {"width": 32, "heads": 4}, "resize": {"short": 64, "mean": None}, "masks": "joint",
    }  # fmt: skip
    system = DETR(**new)
    inverse = {today: before for before, today in DETR.renamed_parameters.items()}
    prefixes = sorted(inverse, key=len, reverse=True)
    state = {
        next(inverse[p] + key[len(p) :] for p in prefixes if key.startswith(p)): value
        for key, value in system.state_dict().items()
    }
    assert "mask_head.query.weight" in state
    assert renamed(state, system).keys() == system.state_dict().keys()


@pytest.mark.parametrize("masks", ["none", "joint"])
def test_norms_of_unused_feature_maps_have_a_gradient_of_zero(masks: str):
    swin = {"name": "swin-tiny", "width": 24, "depths": (1, 1, 1, 1), "heads": (1, 2, 3, 4)}
    system = tiny(backbone=swin, masks=masks).train()
    sum(system.losses(system(IMAGE), [objects(0)]).values()).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]


def test_a_mask_head_on_a_random_box_model_gives_a_warning(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"detr: the detector is frozen and its weights are random.*masks='joint'"):
        tiny(masks="frozen").on_progress(0.0)
    mw.save(tiny(masks="none"), tmp_path / "boxes.safetensors")
    for system in (tiny(), mw.load(tmp_path / "boxes.safetensors", masks="frozen")):
        system.on_progress(0.0)  # a warning is an error here
    tiny(masks="frozen").on_progress(0.5)


def test_a_frozen_box_model_is_not_trained():
    system = tiny(masks="frozen").train()
    trained = [n for n, p in system.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.startswith("masks.") for n in trained)
    sum(system.losses(system(IMAGE), [objects(2)]).values()).backward()
    assert all(p.grad is not None for p in system.parameters() if p.requires_grad)


def test_masks_of_many_objects_are_computed_again_for_the_backward_pass(monkeypatch):
    from maskwright.systems import detr

    system = tiny()
    answers = []
    for budget in (detr.BUDGET, 2 * 40 * SIZE[0] * SIZE[1]):  # two masks at a time
        monkeypatch.setattr(detr, "BUDGET", budget)
        system.zero_grad()
        losses = system.losses(system(IMAGE), [objects(5)])
        sum(losses.values()).backward()
        answers.append((losses["dice"].detach(), system.masks.output.weight.grad.clone()))
    torch.testing.assert_close(answers[0], answers[1])


def hand_made(
    logits: torch.Tensor, labels: list[int], scores: list[float], size: tuple[int, int], rows: int = 4
) -> Raw:
    """The raw output of a network with `rows` classes whose queries have these classes and scores."""
    logits = torch.full((1, 1, len(labels), rows + 1), 0.0)
    for query, (label, score) in enumerate(zip(labels, scores, strict=True)):
        rest = (1 - score) / rows
        logits[0, 0, query] = torch.tensor(rest).log()
        logits[0, 0, query, label] = torch.tensor(score).log()
    nothing = torch.zeros(1, 1, 1, 1)
    return Raw(logits, torch.full((1, 1, len(labels), 4), 0.5), torch.zeros(1, len(labels), 1), nothing, nothing, (),
               nothing[:, 0] > 0, size)  # fmt: skip


def segmented(planes: torch.Tensor, labels: list[int], scores: list[float], **options) -> Panoptic:
    system = tiny(classes=("cat", "dog", "sky", "sea"), stuff=("sky", "sea"))
    system.masks_of = lambda raw, image, rows: planes[rows]  # type: ignore[method-assign]
    size = (planes.shape[1], planes.shape[2])
    raw = hand_made(planes, labels, scores, size)
    return system.decode_panoptic(raw, [Placement.identity(size)], **options)[0]


def test_every_pixel_belongs_to_a_query_and_regions_of_a_class_are_merged():
    planes = torch.full((4, 12, 16), -9.0)
    planes[0, :, :8], planes[1, :, 8:], planes[2, 4:8, 4:12], planes[3] = -1.0, -2.0, 3.0, 5.0
    panoptic = segmented(planes, [2, 2, 0, 1], [0.9, 0.95, 0.9, 0.5])
    assert panoptic.segments.labels.tolist() == [2, 0], "the query below the threshold is ignored"
    assert panoptic.things.tolist() == [False, True]
    assert panoptic.segments.masks.areas().tolist() == [12 * 16 - 32, 32]
    assert bool((panoptic.map() > 0).all())
    all_four = segmented(planes, [2, 2, 0, 1], [0.9, 0.95, 0.9, 0.5], score_threshold=0.4)
    assert all_four.segments.labels.tolist() == [1], "segments without pixels are removed"


def test_pixels_of_small_segments_are_assigned_again():
    planes = torch.full((2, 12, 16), -1.0)
    planes[1] = -9.0
    planes[1, 2:4, 2:4] = 9.0
    assert segmented(planes, [2, 0], [0.9, 0.9]).segments.labels.tolist() == [2]
    assert segmented(planes, [2, 0], [0.9, 0.9], smallest=3).segments.labels.tolist() == [2, 0]
    assert len(segmented(planes, [2, 0], [0.3, 0.3])) == 0


def test_decode_returns_things_only():
    system = tiny(classes=("cat", "dog", "sky", "sea"), stuff=("sky", "sea"))
    planes = torch.full((3, 12, 16), 1.0)
    system.masks_of = lambda raw, image, rows: planes[rows]  # type: ignore[method-assign]
    found = system.decode(hand_made(planes, [2, 0, 1], [0.9, 0.6, 0.7], (12, 16)), [Placement.identity((12, 16))])[0]
    assert found.labels.tolist() == [1, 0]
    assert found.masks.areas().tolist() == [192, 192]


def test_masks_are_resized_as_torch_takes_the_nearest():
    from maskwright.ops.planes import place_bits

    planes = torch.rand(5, 9, 11) > 0.6
    planes[4] = False
    for image in ((9, 11), (20, 31), (5, 4), (13, 11)):
        ours = place_bits(planes, Placement.resize(image, (9, 11))).dense()
        theirs = torch.nn.functional.interpolate(planes[None].float(), size=image, mode="nearest")[0] > 0
        assert torch.equal(ours, theirs), image
    crop = Placement.resize((18, 22), (9, 11)).then_crop(3, 2, (5, 6))
    assert place_bits(planes[:, :5, :6], crop).size == (18, 22)
    mirrored = place_bits(planes, Placement.identity((9, 11)).then_mirror()).dense()
    assert torch.equal(mirrored, planes.flip(2))


# ---- files -----------------------------------------------------------------------------------------------------------


def published(system: DETR, table) -> dict[str, torch.Tensor]:
    """The weights under the names of a code base: the inverse of its table."""
    blocks = {n: len(stage) for n, stage in enumerate(system.dense.backbone.stages)}  # pyright: ignore[reportArgumentType]
    official = table is OFFICIAL
    own = {key.removeprefix("dense."): value for key, value in system.state_dict().items()}
    head = "detr." if system.masks is not None else ""
    model = head if official else f"{head}model."
    backbone = f"{model}backbone.0.body." if official else f"{model}backbone.conv_encoder.model."
    theirs: dict[str, torch.Tensor] = {}

    def put(their: str, ours: str) -> None:
        for kind in ("weight", "bias", "running_mean", "running_var"):
            if f"{ours}.{kind}" in own:
                theirs[f"{their}.{kind}"] = own[f"{ours}.{kind}"]

    put(f"{backbone}conv1", "backbone.stem.conv")
    put(f"{backbone}bn1", "backbone.stem.norm")
    for stage, count in blocks.items():
        for block in range(count):
            their, ours = f"{backbone}layer{stage + 1}.{block}", f"backbone.stages.{stage}.{block}"
            for conv in (1, 2, 3):
                put(
                    f"{backbone}layer{stage + 1}.{block}.conv{conv}", f"backbone.stages.{stage}.{block}.conv{conv}.conv"
                )
                put(f"{backbone}layer{stage + 1}.{block}.bn{conv}", f"backbone.stages.{stage}.{block}.conv{conv}.norm")
            put(f"{backbone}layer{stage + 1}.{block}.downsample.0", f"backbone.stages.{stage}.{block}.shortcut.conv")
            put(f"{backbone}layer{stage + 1}.{block}.downsample.1", f"backbone.stages.{stage}.{block}.shortcut.norm")
    layers = f"{model}transformer." if official else model
    for side, count in (("encoder", len(system.dense.encoder)), ("decoder", len(system.dense.decoder))):
        for number in range(count):
            their, ours = f"{layers}{side}.layers.{number}", f"{side}.{number}"
            parts = [("self_attn", "self_attention")]
            if side == "decoder":
                parts.append(("multihead_attn" if official else "encoder_attn", "cross_attention"))
            for attention, name in parts:
                whole = f"{ours}.{name}.attention"
                if official:
                    for kind in ("weight", "bias"):
                        joined = torch.cat([own[f"{whole}.{p}.{kind}"] for p in ("query", "key", "value")])
                        theirs[f"{their}.{attention}.in_proj_{kind}"] = joined
                else:
                    for letter, part in zip("qkv", ("query", "key", "value"), strict=True):
                        put(f"{their}.{attention}.{letter}_proj", f"{whole}.{part}")
                put(f"{their}.{attention}.out_proj", f"{whole}.output")
            put(f"{their}.{'linear1' if official else 'fc1'}", f"{ours}.feed_forward.expand")
            put(f"{their}.{'linear2' if official else 'fc2'}", f"{ours}.feed_forward.reduce")
            norms = [f"{name}.norm" for _, name in parts] + ["feed_forward.norm"]
            words = ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]
            words = words if side == "decoder" else [words[0], words[2]]
            for number_of, (norm, word) in enumerate(zip(norms, words, strict=True), 1):
                put(f"{their}.{f'norm{number_of}' if official else word}", f"{ours}.{norm}")
    put(f"{layers}decoder.{'norm' if official else 'layernorm'}", "decoder_norm")
    put(f"{model}{'input_proj' if official else 'input_projection'}", "project")
    put(f"{model}{'query_embed' if official else 'query_position_embeddings'}", "queries")
    put(f"{head}{'class_embed' if official else 'class_labels_classifier'}", "class_head")
    for number in range(3):
        put(f"{head}{'bbox_embed' if official else 'bbox_predictor'}.layers.{number}", f"box_head.layers.{number}")
    if head:
        put("bbox_attention.q_linear", "masks.attention.query")
        put("bbox_attention.k_linear", "masks.attention.key")
        for number in range(5):
            put(f"mask_head.lay{number + 1}", f"masks.convs.{number}")
            put(f"mask_head.gn{number + 1}", f"masks.norms.{number}")
        for number in range(3):
            put(f"mask_head.adapter{number + 1}", f"masks.adapters.{number}")
        put("mask_head.out_lay", "masks.output")
    assert len({id(v) for v in theirs.values()}) == len(theirs)
    return theirs


@pytest.mark.parametrize("table", [OFFICIAL, TRANSFORMERS], ids=["official", "transformers"])
@pytest.mark.parametrize(("count", "masks"), [(91, "none"), (250, "joint"), (3, "joint")])
def test_files_of_both_code_bases_are_read(tmp_path: Path, table, count: int, masks: str):
    classes, stuff = names(count)
    # The number of heads is not in the files of box models; all published ones have eight.
    system = tiny({"heads": 8, "encoder_layers": 2}, classes=classes, stuff=stuff, masks=masks, backbone=FROZEN)
    for buffer in system.buffers():
        buffer.data.uniform_(0.5, 1.5)
    path = tmp_path / "file.pth"
    state = published(system, table)
    torch.save({"model": state} if table is OFFICIAL else state, path)
    kind = "-panoptic" if count == 250 else ""
    with pytest.raises(CheckpointError, match=f"detr-r18{kind}, detr-r18-dc5{kind}; choose one, for example variant"):
        mw.load(path)
    again = mw.load(path, variant=f"detr-r18{kind}")
    assert again.classes == classes
    assert again.stuff == stuff
    with torch.no_grad():
        assert torch.equal(again(IMAGE).boxes, system(IMAGE).boxes)
        assert torch.equal(again(IMAGE).memory, system(IMAGE).memory)
        if masks != "none":
            rows = torch.arange(4)
            assert torch.equal(again.masks_of(again(IMAGE), 0, rows), system.masks_of(system(IMAGE), 0, rows))
        dilated = mw.load(path, variant=f"detr-r18-dc5{kind}")
        assert dilated(IMAGE).memory.shape[2:] == (6, 8)


def test_config_json_contains_whether_a_model_is_dilated(tmp_path: Path):
    system = tiny({"heads": 8}, backbone=FROZEN)
    save_file({k: v.contiguous() for k, v in published(system, TRANSFORMERS).items()}, tmp_path / "model.safetensors")
    for dilated in (False, True):
        backbone = {"model_type": "timm_backbone", "output_stride": 16 if dilated else None}
        for entry in ({"dilation": dilated}, {"backbone_config": backbone}):
            (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr", **entry}))
            assert mw.load(tmp_path).options["dilated"] is dilated


def inside(key: str, own_resnet: bool) -> str:
    """The name of a parameter in the modules of transformers 5, with their own ResNet or timm's."""
    head = {
        "lay1": "conv1.conv", "gn1": "conv1.norm", "lay2": "conv2.conv", "gn2": "conv2.norm", "out_lay": "output_conv",
        **{f"lay{n}": f"fpn_stages.{n - 3}.refine.conv" for n in (3, 4, 5)},
        **{f"gn{n}": f"fpn_stages.{n - 3}.refine.norm" for n in (3, 4, 5)},
        **{f"adapter{n}": f"fpn_stages.{n - 1}.fpn_adapter" for n in (1, 2, 3)},
    }  # fmt: skip
    if key.startswith("mask_head."):
        _, part, kind = key.split(".")
        return f"mask_head.{head[part]}.{kind}"
    key = key.replace("_linear.", "_proj.").replace("out_proj.", "o_proj.").replace(".fc", ".mlp.fc")
    before, split, rest = key.partition("backbone.conv_encoder.model.")
    if not split:
        return key
    if own_resnet:
        rest = rest.removeprefix("conv1.") if rest.startswith("conv1.") else rest
        rest = re.sub(r"^weight$", "embedder.embedder.convolution.weight", rest)
        rest = re.sub(r"^bn1\.", "embedder.embedder.normalization.", rest)
        rest = re.sub(r"^layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.", rest)
        rest = re.sub(r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution.", rest)
        rest = re.sub(r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization.", rest)
        rest = rest.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
    return f"{before}backbone.model.{rest}"


@pytest.mark.parametrize("own_resnet", [False, True], ids=["timm", "own"])
@pytest.mark.parametrize("masks", ["none", "joint"])
def test_names_of_modules_of_transformers_5_are_read(tmp_path: Path, masks: str, own_resnet: bool):
    system = tiny({"heads": 8, "encoder_layers": 2}, classes=("a", "b", "c"), masks=masks, backbone=FROZEN)
    for buffer in system.buffers():
        buffer.data.uniform_(0.5, 1.5)
    state = published(system, TRANSFORMERS)
    theirs = {inside(key, own_resnet): value for key, value in state.items()}
    assert len(theirs) == len(state)
    assert not any(".conv_encoder." in key for key in theirs)
    torch.save(theirs, tmp_path / "file.pth")
    again = mw.load(tmp_path / "file.pth", variant="detr-r18")
    with torch.no_grad():
        raw, ours = again(IMAGE), system(IMAGE)
        assert torch.equal(raw.boxes, ours.boxes)
        if masks != "none":
            rows = torch.arange(4)
            assert torch.equal(again.masks_of(raw, 0, rows), system.masks_of(ours, 0, rows))


@pytest.mark.fast
def test_rows_of_published_heads_are_category_ids_of_coco():
    classes, stuff = names(250)
    assert (classes[1], classes[90], classes[92], classes[200]) == ("person", "toothbrush", "banner", "rug-merged")
    assert classes[12] == "N/A"
    things = [name not in stuff for name in classes]
    assert things == [i <= 90 for i in range(250)]
    assert names(91)[0][1] == "person"
    assert names(91)[1] == ()


def test_the_first_block_of_a_dilated_stage_is_not_dilated():
    system = describe("detr", dilated=True)
    stage = system.dense.backbone.stages[3]  # pyright: ignore[reportIndexIssue]
    assert [block.conv2.conv.dilation[0] for block in stage] == [1, 2, 2]
    assert all(block.conv2.conv.stride == (1, 1) for block in stage)


def test_images_are_padded_to_the_largest_only(system: DETR):
    assert system.preprocess.multiple == 1
    batch = Batch.collate(
        [torch.zeros(3, 61, 83), torch.zeros(3, 70, 50)], [Placement.identity((61, 83))] * 2, multiple=1
    )
    with torch.no_grad():
        raw = system(*system.inputs(batch.images, [(61, 83), (70, 50)]))
    assert raw.size == (70, 83)
    found = system.decode(raw, [Placement.identity((61, 83)), Placement.identity((70, 50))])
    assert [f.image_size for f in found] == [(61, 83), (70, 50)]
