"""What is DETR's own: padding, the mask head, division among things and stuff, its files."""

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
from maskwright.checkpoints.origins.detr import OFFICIAL, TRANSFORMERS, names
from maskwright.errors import CheckpointError, UsageError
from maskwright.structures import Batch, Instances, Masks, Panoptic, Placement
from maskwright.systems.detr import DETR, Raw
from tests.systems.tiny import SIZE, build, objects

IMAGE = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def tiny(**options) -> DETR:
    return build("detr", **{"width": 32, "heads": 4, "hidden": 32, **options}).eval()  # pyright: ignore[reportReturnType]


class Trunk(torch.nn.Module):
    """Gives levels that were made beforehand."""

    def __init__(self, levels: list[torch.Tensor]):
        super().__init__()
        self.levels = levels

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.levels


def test_what_lies_in_the_padding_changes_nothing():
    system = tiny()
    valid = torch.tensor([[96, 128]])
    levels = [torch.randn(1, c, 160 // s, 192 // s) for c, s in ((16, 4), (32, 8), (64, 16), (128, 32))]
    other = [level.clone() for level in levels]
    other[3][..., 3:, :] = other[3][..., 4:] = 5.0
    answers = []
    for own in (levels, other):
        system.backbone = Trunk(own)
        with torch.no_grad():
            answers.append((system(torch.zeros(1, 3, 160, 192), valid), system(torch.zeros(1, 3, 160, 192))))
    (told, blind), (told_other, blind_other) = answers
    assert told.padding[0].tolist() == [[False] * 4 + [True] * 2] * 3 + [[True] * 6] * 2
    assert torch.equal(told.boxes, told_other.boxes)
    assert torch.equal(told.logits, told_other.logits)
    assert not torch.allclose(blind.boxes, blind_other.boxes)
    assert system.masks_of(told, 0, torch.arange(3)).shape == (3, 40, 48)
    weights = system.mask_head.attention(told.queries[0], told.memory[0], told.padding[0])
    assert weights[:, :, told.padding[0]].eq(0).all()
    assert weights.sum((1, 2, 3)).sub(1).abs().max() < 1e-5, "all heads and places together"


def test_a_image_that_fills_its_canvas_has_no_padding():
    system = tiny()
    with torch.no_grad():
        whole, plain = system(IMAGE, torch.tensor([list(SIZE)])), system(IMAGE)
    torch.testing.assert_close(whole.boxes, plain.boxes)


def test_training_and_predicting_tell_of_padding(monkeypatch):
    system = tiny(short=96, long=200)
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
    images = [torch.randint(0, 255, (3, *size), dtype=torch.uint8) for size in ((96, 128), (96, 80))]
    list(mw.predict(system, images, batch=2, score_threshold=0.9))
    assert seen[-1].tolist() == [[96, 128], [115, 96]]


def test_boxes_are_shares_of_the_image_without_padding():
    system = tiny()
    targets = [objects(2, (64, 96))]
    own = system._objects(targets[0], torch.device("cpu"))
    x, y, w, h = own.boxes[0].tolist()
    x0, y0, x1, y1 = targets[0].boxes[0].tolist()
    assert (x, y, w, h) == pytest.approx(((x0 + x1) / 192, (y0 + y1) / 128, (x1 - x0) / 96, (y1 - y0) / 64))
    losses = system.losses(system(IMAGE, torch.tensor([[64, 96]])), targets)
    assert set(losses) == {"class", "box", "giou", "mask", "dice", "class_0", "box_0", "giou_0"}


def test_a_model_of_boxes_alone_is_trained_measured_and_drawn(tmp_path):
    from maskwright.data import Scenes
    from maskwright.inference import evaluate

    scenes = Scenes(2, (64, 96), stuff=True)
    system = tiny(masks="none", classes=scenes.classes, stuff=scenes.stuff, short=64, long=96)
    losses = system.losses(system(IMAGE), [replace(objects(3), masks=None)])
    assert set(losses) == {"class", "box", "giou", "class_0", "box_0", "giou_0"}
    result = evaluate(system, scenes)
    assert result.kinds == ("bbox",)
    prediction = mw.predict(system, scenes[0].image)
    assert prediction.instances.masks is None
    prediction.save(tmp_path / "drawn.png")
    prediction.save(tmp_path / "objects.json")
    assert len(json.loads((tmp_path / "objects.json").read_text())["annotations"]) == len(prediction.instances)
    with pytest.raises(UsageError, match="finds objects alone"):
        mw.predict(system, scenes[0].image, task="panoptic")
    with pytest.raises(UsageError, match="boxes alone"):
        system.decode_panoptic(system(IMAGE), [Placement.identity(SIZE)])
    with pytest.raises(UsageError, match="no masks"):
        tiny().losses(tiny()(IMAGE), [replace(objects(3), masks=None)])


def test_a_mask_head_may_be_put_on_a_box_model(tmp_path: Path):
    boxes = tiny(masks="none")
    mw.save(boxes, tmp_path / "boxes.safetensors")
    both = mw.load(tmp_path / "boxes.safetensors", masks="frozen")
    assert both.options["masks"] == "frozen"
    assert torch.equal(both.class_head.weight, boxes.class_head.weight)
    assert both.mask_head is not None
    # A file that has a part of the head alone is a broken one.
    mw.save(tiny(), tmp_path / "whole.safetensors")
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        kept = {k: file.get_tensor(k) for k in file.keys() if not k.startswith("mask_head.output")}  # noqa: SIM118
        save_file(kept, tmp_path / "partial.safetensors", file.metadata())
    with pytest.raises(CheckpointError, match="mask_head"):
        mw.load(tmp_path / "partial.safetensors", masks="keypoint")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 0}, "detr: heads is 0; expected at least 1"),
        ({"heads": 5}, "width is 32; expected a multiple of 16 and of the 5 heads"),
        ({"queries": -1}, "queries is -1; expected at least 1"),
        ({"decoder_layers": 0}, "decoder_layers is 0; expected at least 1"),
        (
            {"weights": (1.0, 5.0, 2.0)},
            "weights is .*; expected 5 numbers, none below 0: of class, box, giou, mask",
        ),
        ({"cost": (1.0, 5.0)}, "cost is .*; expected 3 numbers, none below 0: of class, box, giou"),
    ],
)
def test_wrong_options_are_refused_in_words(options, words):
    with pytest.raises(UsageError, match=words):
        tiny(**options)


@pytest.mark.parametrize("masks", ["none", "keypoint"])
def test_norms_of_levels_that_nothing_reads_have_a_gradient_of_zero(masks: str):
    system = tiny(backbone="swin-tiny", masks=masks).train()
    sum(system.losses(system(IMAGE), [objects(0)]).values()).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]


def test_masks_that_would_learn_on_a_random_detector_are_told(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"detr: the detector is frozen and its weights are random.*masks='keypoint'"):
        tiny(masks="frozen").on_progress(0.0)
    mw.save(tiny(masks="none"), tmp_path / "boxes.safetensors")
    for system in (tiny(masks="keypoint"), mw.load(tmp_path / "boxes.safetensors", masks="frozen")):
        system.on_progress(0.0)  # a warning is an error here
    tiny(masks="frozen").on_progress(0.5)


def test_a_frozen_box_model_does_not_learn():
    system = build("detr", masks="frozen").train()
    learning = [n for n, p in system.named_parameters() if p.requires_grad]
    assert learning
    assert all(n.startswith("mask_head.") for n in learning)
    sum(system.losses(system(IMAGE), [objects(2)]).values()).backward()
    assert all(p.grad is not None for p in system.parameters() if p.requires_grad)


def test_masks_of_many_objects_are_made_again_for_the_backward_pass(monkeypatch):
    from maskwright.systems import detr

    system = tiny(queries=20)
    answers = []
    for budget in (detr.BUDGET, 40 * SIZE[0] * SIZE[1]):
        monkeypatch.setattr(detr, "BUDGET", budget)
        system.zero_grad()
        losses = system.losses(system(IMAGE), [objects(30)])
        sum(losses.values()).backward()
        answers.append((losses["dice"].detach(), system.mask_head.output.weight.grad.clone()))
    torch.testing.assert_close(answers[0], answers[1])


def hand_made(
    logits: torch.Tensor, labels: list[int], scores: list[float], size: tuple[int, int], rows: int = 4
) -> Raw:
    """Answers of a network with `rows` classes whose queries have these classes, scores and masks."""
    said = torch.full((1, 1, len(labels), rows + 1), 0.0)
    for query, (label, score) in enumerate(zip(labels, scores, strict=True)):
        rest = (1 - score) / rows
        said[0, 0, query] = torch.tensor(rest).log()
        said[0, 0, query, label] = torch.tensor(score).log()
    nothing = torch.zeros(1, 1, 1, 1)
    return Raw(said, torch.full((1, 1, len(labels), 4), 0.5), torch.zeros(1, len(labels), 1), nothing, nothing, (),
               nothing[:, 0] > 0, size)  # fmt: skip


def divided(planes: torch.Tensor, labels: list[int], scores: list[float], **options) -> Panoptic:
    system = tiny(classes=("cat", "dog", "sky", "sea"), stuff=("sky", "sea"))
    system.masks_of = lambda raw, image, rows: planes[rows]  # type: ignore[method-assign]
    size = (planes.shape[1], planes.shape[2])
    raw = hand_made(planes, labels, scores, size)
    return system.decode_panoptic(raw, [Placement.identity(size)], **options)[0]


def test_queries_share_out_all_pixels_and_regions_of_a_class_are_joined():
    planes = torch.full((4, 12, 16), -9.0)
    planes[0, :, :8], planes[1, :, 8:], planes[2, 4:8, 4:12], planes[3] = -1.0, -2.0, 3.0, 5.0
    panoptic = divided(planes, [2, 2, 0, 1], [0.9, 0.95, 0.9, 0.5])
    assert panoptic.segments.labels.tolist() == [2, 0], "the query that is not sure takes no part"
    assert panoptic.things.tolist() == [False, True]
    assert panoptic.segments.masks.areas().tolist() == [12 * 16 - 32, 32]
    assert bool((panoptic.map() > 0).all())
    all_four = divided(planes, [2, 2, 0, 1], [0.9, 0.95, 0.9, 0.5], score_threshold=0.4)
    assert all_four.segments.labels.tolist() == [1], "what lost all pixels is left out"


def test_segments_of_a_few_pixels_are_shared_out_again():
    planes = torch.full((2, 12, 16), -1.0)
    planes[1] = -9.0
    planes[1, 2:4, 2:4] = 9.0
    assert divided(planes, [2, 0], [0.9, 0.9]).segments.labels.tolist() == [2]
    assert divided(planes, [2, 0], [0.9, 0.9], smallest=3).segments.labels.tolist() == [2, 0]
    assert len(divided(planes, [2, 0], [0.3, 0.3])) == 0


def test_decode_gives_things_alone():
    system = tiny(classes=("cat", "dog", "sky", "sea"), stuff=("sky", "sea"))
    planes = torch.full((3, 12, 16), 1.0)
    system.masks_of = lambda raw, image, rows: planes[rows]  # type: ignore[method-assign]
    found = system.decode(hand_made(planes, [2, 0, 1], [0.9, 0.6, 0.7], (12, 16)), [Placement.identity((12, 16))])[0]
    assert found.labels.tolist() == [1, 0]
    assert found.masks.areas().tolist() == [192, 192]


def test_masks_are_put_onto_the_image_as_torch_takes_the_nearest():
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
    """The system's weights under the names of a code base: each of the table's rules undone for the keys of our own."""

    blocks = {n: len(stage) for n, stage in enumerate(system.backbone.stages)}  # pyright: ignore[reportArgumentType]
    official = table is OFFICIAL
    own = system.state_dict()
    head = "detr." if system.mask_head is not None else ""
    model = head if official else f"{head}model."
    trunk = f"{model}backbone.0.body." if official else f"{model}backbone.conv_encoder.model."
    theirs: dict[str, torch.Tensor] = {}

    def put(their: str, ours: str) -> None:
        for kind in ("weight", "bias", "running_mean", "running_var"):
            if f"{ours}.{kind}" in own:
                theirs[f"{their}.{kind}"] = own[f"{ours}.{kind}"]

    put(f"{trunk}conv1", "backbone.stem.conv")
    put(f"{trunk}bn1", "backbone.stem.norm")
    for stage, count in blocks.items():
        for block in range(count):
            for conv in (1, 2, 3):
                put(f"{trunk}layer{stage + 1}.{block}.conv{conv}", f"backbone.stages.{stage}.{block}.conv{conv}.conv")
                put(f"{trunk}layer{stage + 1}.{block}.bn{conv}", f"backbone.stages.{stage}.{block}.conv{conv}.norm")
            put(f"{trunk}layer{stage + 1}.{block}.downsample.0", f"backbone.stages.{stage}.{block}.shortcut.conv")
            put(f"{trunk}layer{stage + 1}.{block}.downsample.1", f"backbone.stages.{stage}.{block}.shortcut.norm")
    layers = f"{model}transformer." if official else model
    for side, count in (("encoder", len(system.encoder)), ("decoder", len(system.decoder))):
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
        put("bbox_attention.q_linear", "mask_head.query")
        put("bbox_attention.k_linear", "mask_head.key")
        for number in range(5):
            put(f"mask_head.lay{number + 1}", f"mask_head.convs.{number}")
            put(f"mask_head.gn{number + 1}", f"mask_head.norms.{number}")
        for number in range(3):
            put(f"mask_head.adapter{number + 1}", f"mask_head.adapters.{number}")
        put("mask_head.out_lay", "mask_head.output")
    assert len({id(v) for v in theirs.values()}) == len(theirs)
    return theirs


@pytest.mark.parametrize("table", [OFFICIAL, TRANSFORMERS], ids=["official", "transformers"])
@pytest.mark.parametrize(("count", "masks"), [(91, "none"), (250, "keypoint"), (3, "keypoint")])
def test_files_of_both_code_bases_are_read(tmp_path: Path, table, count: int, masks: str):
    classes, stuff = names(count)
    # Files of boxes alone do not say how many heads there are; all published ones have eight.
    options = {"heads": 8, "masks": masks, "norm": "frozen", "frozen": 2, "encoder_layers": 2}
    system = tiny(classes=classes, stuff=stuff, **options)
    for buffer in system.buffers():
        buffer.data.uniform_(0.5, 1.5)
    path = tmp_path / "file.pth"
    state = published(system, table)
    torch.save({"model": state} if table is OFFICIAL else state, path)
    kind = "-panoptic" if count == 250 else ""
    with pytest.raises(CheckpointError, match=f"detr-r18{kind}, detr-r18-dc5{kind}; say which with variant"):
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


def test_a_folder_of_transformers_says_whether_it_is_dilated(tmp_path: Path):
    system = tiny(heads=8, norm="frozen", frozen=2, classes=("a", "b"))
    save_file({k: v.contiguous() for k, v in published(system, TRANSFORMERS).items()}, tmp_path / "model.safetensors")
    for dilated in (False, True):
        trunk = {"model_type": "timm_backbone", "output_stride": 16 if dilated else None}
        for said in ({"dilation": dilated}, {"backbone_config": trunk}):
            (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr", **said}))
            assert mw.load(tmp_path).options["dilated"] is dilated


def inside(key: str, trunk: bool) -> str:
    """What the networks of transformers 5 call it; with `trunk` in their own ResNet, else in timm's."""
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
    if trunk:
        rest = rest.removeprefix("conv1.") if rest.startswith("conv1.") else rest
        rest = re.sub(r"^weight$", "embedder.embedder.convolution.weight", rest)
        rest = re.sub(r"^bn1\.", "embedder.embedder.normalization.", rest)
        rest = re.sub(r"^layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.", rest)
        rest = re.sub(r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution.", rest)
        rest = re.sub(r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization.", rest)
        rest = rest.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
    return f"{before}backbone.model.{rest}"


@pytest.mark.parametrize("trunk", [False, True], ids=["timm", "own"])
@pytest.mark.parametrize("masks", ["none", "keypoint"])
def test_names_inside_transformers_5_are_read(tmp_path: Path, masks: str, trunk: bool):
    options = {"heads": 8, "masks": masks, "norm": "frozen", "frozen": 2, "encoder_layers": 2}
    system = tiny(classes=("a", "b", "c"), **options)
    for buffer in system.buffers():
        buffer.data.uniform_(0.5, 1.5)
    state = published(system, TRANSFORMERS)
    renamed = {inside(key, trunk): value for key, value in state.items()}
    assert len(renamed) == len(state)
    assert not any(".conv_encoder." in key for key in renamed)
    torch.save(renamed, tmp_path / "file.pth")
    again = mw.load(tmp_path / "file.pth", variant="detr-r18")
    with torch.no_grad():
        raw, ours = again(IMAGE), system(IMAGE)
        assert torch.equal(raw.boxes, ours.boxes)
        if masks != "none":
            rows = torch.arange(4)
            assert torch.equal(again.masks_of(raw, 0, rows), system.masks_of(ours, 0, rows))


def test_rows_of_published_heads_are_cocos_own_ids():
    classes, stuff = names(250)
    assert (classes[1], classes[90], classes[92], classes[200]) == ("person", "toothbrush", "banner", "rug-merged")
    assert classes[12] == "N/A"
    things = [name not in stuff for name in classes]
    assert things == [i <= 90 for i in range(250)]
    assert names(91)[0][1] == "person"
    assert names(91)[1] == ()


def test_a_dilated_trunk_keeps_its_first_block_as_it_was():
    system = tiny(backbone="resnet50", stem_width=8, dilated=True)
    stage = system.backbone.stages[3]  # pyright: ignore[reportIndexIssue]
    assert [block.conv2.conv.dilation[0] for block in stage] == [1, 2, 2]
    assert all(block.conv2.conv.stride == (1, 1) for block in stage)


def test_options_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="masks is 'maybe'; expected none, frozen or keypoint"):
        DETR(masks="maybe")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="width is 100"):
        tiny(width=100)
    with pytest.raises(UsageError, match="stuff names 'lava'"):
        tiny(stuff=("lava",))


def test_batches_of_its_own_sizes():
    """Images are padded to the largest alone, to no multiple."""
    system = tiny()
    assert system.preprocess.multiple == 1
    batch = Batch.collate(
        [torch.zeros(3, 61, 83), torch.zeros(3, 70, 50)], [Placement.identity((61, 83))] * 2, multiple=1
    )
    with torch.no_grad():
        raw = system(*system.inputs(batch.images, [(61, 83), (70, 50)]))
    assert raw.size == (70, 83)
    found = system.decode(raw, [Placement.identity((61, 83)), Placement.identity((70, 50))])
    assert [f.image_size for f in found] == [(61, 83), (70, 50)]
    empty = Instances.empty((61, 83))
    assert isinstance(empty.masks, Masks)
