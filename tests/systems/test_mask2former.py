"""What is Mask2Former's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskwright.checkpoints.origins import origins
from maskwright.errors import UsageError
from maskwright.ops import query_losses as learning
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import create
from maskwright.systems.mask2former import Mask2Former, Raw
from tests.systems.tiny import SIZE, build, objects

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
SMALL = (64, 96)
SWIN = {"backbone": "swin-tiny", "swin_width": 12, "swin_heads": (1, 2, 3, 4), "swin_depths": (1, 1, 2, 1), "window": 4}
OPTIONS = {
    "looking everywhere": {"masked": False, "fine_levels": False},
    "DETR's order, empty queries": {"cross_first": False, "learnt_content": False, "dropout": 0.1},
    "a Swin trunk": {**SWIN, "drop_path": 0.2},
    "uniform points": {"important": 0.0, "candidates": 1.0},
    "levels that nothing mixes": {**SWIN, "encoder_layers": 0, "fine_levels": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_finds(options):
    system = build("mask2former", **options)
    images = torch.randn(2, 3, *SMALL)
    for counts in ((3, 1), (0, 0)):
        system.zero_grad()
        terms = system.losses(system(images), [objects(n, size=SMALL) for n in counts])
        assert len(terms) == 3 * 4
        sum(terms.values(), torch.zeros(())).backward()
        assert all(torch.isfinite(v) for v in terms.values()), terms
        assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        found = system.eval().decode(system(images), [Placement.identity(SMALL)] * 2, detections=5)
    assert all(0 < len(own) <= 5 and len(own.masks) == len(own) for own in found)


def painted(system, *rectangles, sure=6.0) -> Raw:
    """What is said where query k names rectangle k (label, rows, columns, at stride 4), and the others nothing."""
    queries = system.options["queries"]
    classes = torch.full((1, 1, queries, len(system.classes) + 1), -9.0)
    classes[..., -1] = 0.0
    features = torch.full((1, queries, SIZE[0] // 4, SIZE[1] // 4), -1.0)
    for k, (label, logit, rows, columns) in enumerate(rectangles):
        classes[0, 0, k, label], classes[0, 0, k, -1] = logit, -9.0
        features[0, k, rows, columns] = 1.0
    return Raw(classes, sure * torch.eye(queries)[None, None], features, SIZE)


def test_scores_are_of_the_class_times_how_sure_the_mask_is():
    system = build("mask2former")
    raw = painted(system, (1, 2.0, slice(6, 14), slice(8, 20)), (0, 1.0, slice(14, 20), slice(2, 6)))
    found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.05)[0]
    assert found.labels.tolist() == [1, 0]
    torch.testing.assert_close(found.boxes, torch.tensor([[32.0, 24, 80, 56], [8.0, 56, 24, 80]]), atol=1, rtol=0)
    assert found.masks.areas().tolist() == pytest.approx([48 * 32, 16 * 24], rel=0.05)
    classes = raw.classes[0, 0, :2].softmax(-1)
    ratio = found.scores / classes[[0, 1], [1, 0]]
    assert ((ratio > 0.9) & (ratio < torch.tensor(6.0).sigmoid())).all()  # less at the border
    # On an image of its own, mirrored.
    place = Placement.resize((200, 300), SIZE).then_mirror()
    mirrored = system.decode(raw, [place], score_threshold=0.05)[0]
    expected = place.boxes_to_image(torch.tensor([[32.0, 24, 80, 56]]))
    torch.testing.assert_close(mirrored.boxes[:1], expected, atol=2, rtol=0)


def test_duplicates_can_be_left_out_in_three_ways():
    system = build("mask2former")
    twice = ((1, 3.0, slice(6, 14), slice(8, 20)), (1, 2.0, slice(6, 14), slice(8, 19)))
    raw, place = painted(system, *twice, (0, 1.0, slice(6, 14), slice(8, 20))), [Placement.identity(SIZE)]
    raw.classes[0, 0, 2, 1] = 0.5  # torn between two classes
    assert system.decode(raw, place, score_threshold=0.1)[0].labels.tolist() == [1, 1, 0, 1]
    assert system.decode(raw, place, score_threshold=0.1, best_class=True)[0].labels.tolist() == [1, 1, 0]
    assert system.decode(raw, place, score_threshold=0.1, nms_threshold=0.5)[0].labels.tolist() == [1, 0]
    assert system.decode(raw, place, score_threshold=0.1, max_overlap=0.5)[0].labels.tolist() == [1]
    assert system.decode(raw, place, score_threshold=0.1, nms_threshold=0.5, max_overlap=0.5)[0].labels.tolist() == [1]
    assert len(system.decode(raw, place, score_threshold=0.1, nms_threshold=0.5, max_overlap=1.0)[0]) == 2


def test_every_way_to_leave_duplicates_out_is_an_option_of_predict():
    system = build("mask2former", short=64, long=96).eval()
    image = torch.randint(0, 255, (3, *SMALL), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = system.predict(image).instances
    few = system.predict(image, max_overlap=0.5, nms_threshold=0.5, best_class=True).instances
    assert 0 < len(few) < len(whole)


def test_pixels_go_to_the_surest_segment_and_regions_are_joined():
    system = build("mask2former", classes=("a", "b", "grass"), stuff=("grass",))
    raw = painted(
        system, (2, 9.0, slice(0, 12), slice(0, 32)), (0, 9.0, slice(4, 10), slice(4, 12)),
        (2, 9.0, slice(12, 24), slice(0, 30)), (1, 0.0, slice(0, 8), slice(20, 28)),
    )  # fmt: skip
    with torch.no_grad():
        raw.classes[0, 0, [0, 2], -1] = 6.5  # less sure than the object on it
        raw.classes[0, 0, 3, -1] = 0.0  # not sure enough
    found = system.decode_panoptic(raw, [Placement.identity(SIZE)])[0]
    assert found.segments.labels.tolist() == [2, 0]
    assert found.things.tolist() == [False, True]
    plane = found.map()
    assert plane[28, 32] == 2
    assert plane[60, 60] == plane[4, 4] == 1
    assert plane[80, 125] == 0
    assert system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.1)[0].labels.tolist() == [0, 1]
    labels = system.decode_semantic(raw, [Placement.identity(SIZE)])[0]
    assert labels[28, 32] == 0
    assert labels[60, 60] == 2
    first = create("mask2former", **{**system.options, "classes_first": True}).decode_semantic
    assert (first(raw, [Placement.identity(SIZE)])[0] == labels).float().mean() > 0.97
    assert len(system.decode_panoptic(raw, [Placement.identity(SIZE)], score_threshold=1.0)[0]) == 0


def test_an_empty_mask_sees_everything():
    embeddings, coarse = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[[1.0, 2.0, 3.0]]])
    assert Mask2Former.allowed(embeddings, coarse).tolist() == [[[[True] * 3, [True] * 3]]]
    assert Mask2Former.allowed(embeddings, coarse, rescue=False).tolist() == [[[[True] * 3, [False] * 3]]]


def test_losses_are_the_same_however_little_memory_they_may_take(monkeypatch):
    system = build("mask2former").eval()
    images, targets = torch.randn(2, 3, *SIZE), [objects(40, side=(20, 30)), objects(2)]
    results = []
    for budget in (1 << 28, 1 << 16):
        monkeypatch.setattr(learning, "BUDGET", budget)
        system.zero_grad()
        torch.manual_seed(1)
        terms = system.losses(system(images), targets)
        sum(terms.values(), torch.zeros(())).backward()
        gradients = [p.grad.clone() for p in system.parameters()]
        results.append((torch.stack(list(terms.values())).detach(), torch.cat([g.flatten() for g in gradients])))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


def test_objects_without_masks_are_refused():
    system = build("mask2former")
    with pytest.raises(UsageError, match="boxes but no masks"):
        system.losses(system(torch.randn(1, 3, *SIZE)), [replace(objects(2), masks=None)])


def test_more_objects_than_queries_are_matched_as_far_as_they_reach():
    system = build("mask2former").eval()
    own = learning.Objects.of(objects(30, side=(8, 8)), torch.device("cpu"))
    raw = system(torch.randn(1, 3, *SIZE))
    queries, which = learning_pairs(system, raw, own)
    assert queries.shape == which.shape == (4, 12)
    crowded = objects(3)
    crowded.crowd = torch.tensor([True, False, False])
    assert len(learning.Objects.of(crowded, torch.device("cpu"))) == 2


def learning_pairs(system, raw, own):
    from maskwright.ops.assignment import assign

    return assign(system.costs(raw, [own]))[0]


def test_wrong_options_are_refused_in_words():
    with pytest.raises(UsageError, match="width is 100; expected a multiple of 4 x heads, which is 32"):
        create("mask2former", width=100)
    with pytest.raises(UsageError, match="queries is 0; expected at least 1"):
        create("mask2former", queries=0)
    for option, value in (("layers", 0), ("short", 0), ("heads", 0), ("points", 0), ("no_object", -1.0)):
        with pytest.raises(UsageError, match=f"{option} is {value}; expected at least"):
            create("mask2former", **{option: value})
    with pytest.raises(UsageError, match="important is 2"):
        create("mask2former", important=2.0)
    with pytest.raises(UsageError, match=r"stuff names 'sky', which is not among the 1 classes"):
        create("mask2former", stuff=("sky",))


@pytest.mark.parametrize("layout", ["r50-coco-panoptic", "swin_tiny-coco-instance", "swin_tiny-coco-instance-hf"])
def test_variants_of_the_layout_that_were_never_published_are_recognised(layout):
    """Fewer queries, other classes, a narrower decoder's feed-forward, a deeper trunk, names of other times."""
    tensors = json.loads((LAYOUTS / f"mask2former-{layout}.json").read_text())["tensors"]
    shapes = {k: tuple(shape) for k, (shape, _) in tensors.items()}
    changed = {}
    for key, shape in shapes.items():
        key = key.replace("static_query", "query_feat").replace(
            "sem_seg_head.pixel_decoder.mask_", "sem_seg_head.mask_"
        )
        if "class_embed" in key or "class_predictor" in key:
            shape = (4, *shape[1:])
        if key.endswith(
            (".query_feat.weight", ".query_embed.weight", "queries_features.weight", "queries_embedder.weight")
        ):
            shape = (7, shape[1])
        changed[key] = shape
    deeper = {"r50": (r"res4.5.", "res4."), "swi": ("layers.2.blocks.5.", "layers.2.blocks.")}[layout[:3]]
    last = {"r50": 22, "swi": 17}[layout[:3]]
    for key, shape in list(changed.items()):
        if deeper[0] in key:
            for number in range(6, last + 1):
                changed[key.replace(deeper[0], f"{deeper[1]}{number}.")] = shape
    found = [(o, c.options) for o in origins() for c in o.candidates(changed, {})]
    assert [o.system for o, _ in found] == ["mask2former"]
    origin, options = found[0]
    assert (options["queries"], len(options["classes"])) == (7, 3)
    assert options["backbone"] == {"r50": "resnet101", "swi": "swin-small"}[layout[:3]]
    with torch.device("meta"):
        system = create("mask2former", **options)
    ours = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    state = origin.translate({k: torch.empty(v, device="meta") for k, v in changed.items()}, options)
    assert {k: tuple(v.shape) for k, v in state.items()} == ours


def inside(key: str) -> str:
    """What the networks of transformers 5 call a tensor of Mask2Former's or MaskFormer's published files."""
    if ".transformer_module.decoder.layers." in key and ".cross_attn." not in key:
        key = key.replace(".out_proj.", ".o_proj.")
    if key.startswith("model.transformer_module.decoder.layers."):
        return key
    key = key.replace("encoder.embeddings.", "encoder.swin.embeddings.")
    key = key.replace("level_module.encoder.encoder.", "level_module.encoder.swin.encoder.")
    for theirs, newer in (
        ("attention.self.relative_position_", "attention.relative_position_bias.relative_position_"),
        ("attention.self.query.", "attention.q_proj."), ("attention.self.key.", "attention.k_proj."),
        ("attention.self.value.", "attention.v_proj."), ("attention.output.dense.", "attention.o_proj."),
        ("intermediate.dense.", "mlp.fc1."), (".output.dense.", ".mlp.fc2."),
    ):  # fmt: skip
        key = key.replace(theirs, newer)
    return key


def test_names_inside_transformers_5_are_recognised():
    """And the norm behind Swin that its files hold and nothing reads, where save_pretrained of version 5 puts it."""
    tensors = json.loads((LAYOUTS / "mask2former-swin_tiny-coco-instance-hf.json").read_text())["tensors"]
    before = {k: tuple(shape) for k, (shape, _) in tensors.items() if "relative_position_index" not in k}
    unread = "model.pixel_level_module.encoder.swin.layernorm.weight"
    answers = []
    for shapes in (before, {unread: (768,), **before}, {unread: (768,), **{inside(k): v for k, v in before.items()}}):
        found = [(o, c.options) for o in origins() for c in o.candidates(shapes, {})]
        assert [o.system for o, _ in found] == ["mask2former"]
        origin, options = found[0]
        state = origin.translate({k: torch.empty(v, device="meta") for k, v in shapes.items()}, options)
        answers.append((options, {k: tuple(v.shape) for k, v in state.items()}))
    assert answers[0] == answers[1] == answers[2]


def test_masks_that_do_not_fit_are_padded_with_background():
    """Targets end where the image does; the input goes on, and what lies there is no mask."""
    system = build("mask2former").eval()
    raw = system(torch.randn(1, 3, *SIZE))
    small = Masks.from_dense(torch.ones(1, 50, 60, dtype=torch.bool)).pack()
    whole = torch.zeros(1, *SIZE, dtype=torch.bool)
    whole[:, :50, :60] = True
    losses = []
    for size, masks in (((50, 60), small), (SIZE, Masks.from_dense(whole).pack())):
        torch.manual_seed(0)
        target = Instances(size, masks.boxes(), torch.zeros(1, dtype=torch.int64), masks)
        losses.append(torch.stack(list(system.losses(raw, [target]).values())))
    torch.testing.assert_close(*losses)
