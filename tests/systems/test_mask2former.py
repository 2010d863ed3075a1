"""Mask2Former: options, decoding, losses, and layouts of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import maskwright as mw
from maskwright.checkpoints.origins import origins
from maskwright.errors import UsageError
from maskwright.ops import query_losses as learning
from maskwright.ops.assignment import assign
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import create
from maskwright.systems.mask2former import Mask2Former, Mask2FormerNetwork, Raw
from tests.systems.tiny import SIZE, objects, sized

build = sized(
    {
        "mask2former": {
            "backbone": {"name": "resnet18", "width": 16},
            "decoder": {"width": 64, "heads": 4, "queries": 12, "hidden": 64, "layers": 3},
            "encoder_layers": 1,
            "encoder_hidden": 64,
            "loss": {"points": 256},
        }
    }
)


LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
SMALL = (64, 96)
SWIN = {"name": "swin-tiny", "width": 12, "heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1), "window": 4, "drop_path": 0.2}
OPTIONS = {
    "attention everywhere": {"masked": False, "fine_levels": False},
    "self-attention first, no content": {
        "cross_first": False, "learned_content": False, "decoder": {"dropout": 0.1},
    },
    "Swin": {"backbone": SWIN},
    "uniform points": {"loss": {"important": 0.0, "candidates": 1.0}},
    "no encoder": {"backbone": SWIN, "encoder_layers": 0, "fine_levels": False},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_decodes(options):
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
    """A raw output in which query k predicts rectangle k: label, logit, rows and columns at stride 4."""
    queries = system.options.get("decoder", system.options)["queries"]
    classes = torch.full((1, 1, queries, len(system.classes) + 1), -9.0)
    classes[..., -1] = 0.0
    features = torch.full((1, queries, SIZE[0] // 4, SIZE[1] // 4), -1.0)
    for k, (label, logit, rows, columns) in enumerate(rectangles):
        classes[0, 0, k, label], classes[0, 0, k, -1] = logit, -9.0
        features[0, k, rows, columns] = 1.0
    return Raw(classes, sure * torch.eye(queries)[None, None], features, SIZE)


def test_scores_are_class_times_mean_mask_probability():
    system = build("mask2former")
    raw = painted(system, (1, 2.0, slice(6, 14), slice(8, 20)), (0, 1.0, slice(14, 20), slice(2, 6)))
    found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.05)[0]
    assert found.labels.tolist() == [1, 0]
    torch.testing.assert_close(found.boxes, torch.tensor([[32.0, 24, 80, 56], [8.0, 56, 24, 80]]), atol=1, rtol=0)
    assert found.masks.areas().tolist() == pytest.approx([48 * 32, 16 * 24], rel=0.05)
    classes = raw.classes[0, 0, :2].softmax(-1)
    ratio = found.scores / classes[[0, 1], [1, 0]]
    assert ((ratio > 0.9) & (ratio < torch.tensor(6.0).sigmoid())).all()  # less at the border
    # On an image of another size, mirrored.
    place = Placement.resize((200, 300), SIZE).then_mirror()
    mirrored = system.decode(raw, [place], score_threshold=0.05)[0]
    expected = place.boxes_to_image(torch.tensor([[32.0, 24, 80, 56]]))
    torch.testing.assert_close(mirrored.boxes[:1], expected, atol=2, rtol=0)


@pytest.mark.fast
def test_duplicates_can_be_removed_in_three_ways():
    system = build("mask2former")
    twice = ((1, 3.0, slice(6, 14), slice(8, 20)), (1, 2.0, slice(6, 14), slice(8, 19)))
    raw, place = painted(system, *twice, (0, 1.0, slice(6, 14), slice(8, 20))), [Placement.identity(SIZE)]
    raw.classes[0, 0, 2, 1] = 0.5  # two likely classes
    assert system.decode(raw, place, score_threshold=0.1)[0].labels.tolist() == [1, 1, 0, 1]
    assert system.decode(raw, place, score_threshold=0.1, best_class=True)[0].labels.tolist() == [1, 1, 0]
    assert system.decode(raw, place, score_threshold=0.1, nms_threshold=0.5)[0].labels.tolist() == [1, 0]
    assert system.decode(raw, place, score_threshold=0.1, max_overlap=0.5)[0].labels.tolist() == [1]
    assert system.decode(raw, place, score_threshold=0.1, nms_threshold=0.5, max_overlap=0.5)[0].labels.tolist() == [1]
    assert len(system.decode(raw, place, score_threshold=0.1, nms_threshold=0.5, max_overlap=1.0)[0]) == 2


def test_options_of_decode_are_options_of_predict():
    system = build("mask2former", resize={"short": 64, "long": 96}).eval()
    image = torch.randint(0, 255, (3, *SMALL), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = system.predict(image).instances
    few = system.predict(image, max_overlap=0.5, nms_threshold=0.5, best_class=True).instances
    assert 0 < len(few) < len(whole)


@pytest.mark.fast
def test_pixels_belong_to_the_best_segment_and_stuff_is_joined():
    system = build("mask2former", classes=("a", "b", "grass"), stuff=("grass",))
    raw = painted(
        system, (2, 9.0, slice(0, 12), slice(0, 32)), (0, 9.0, slice(4, 10), slice(4, 12)),
        (2, 9.0, slice(12, 24), slice(0, 30)), (1, 0.0, slice(0, 8), slice(20, 28)),
    )  # fmt: skip
    with torch.no_grad():
        raw.classes[0, 0, [0, 2], -1] = 6.5  # a lower score than the object inside it
        raw.classes[0, 0, 3, -1] = 0.0  # below the threshold
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


@pytest.mark.fast
def test_a_query_with_an_empty_mask_attends_to_all_cells():
    embeddings, coarse = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[[1.0, 2.0, 3.0]]])
    allowed = Mask2FormerNetwork.allowed
    assert allowed(embeddings, coarse).tolist() == [[[[True] * 3, [True] * 3]]]
    assert allowed(embeddings, coarse, rescue=False).tolist() == [[[[True] * 3, [False] * 3]]]


def test_losses_do_not_depend_on_the_memory_bound(monkeypatch):
    system = build("mask2former").eval()
    images, targets = torch.randn(2, 3, *SMALL), [objects(20, SMALL, (20, 30)), objects(2, SMALL)]
    results = []
    for budget in (1 << 28, 1 << 17):
        monkeypatch.setattr(learning, "BUDGET", budget)
        system.zero_grad()
        torch.manual_seed(1)
        terms = system.losses(system(images), targets)
        sum(terms.values(), torch.zeros(())).backward()
        gradients = [p.grad.clone() for p in system.parameters()]
        results.append((torch.stack(list(terms.values())).detach(), torch.cat([g.flatten() for g in gradients])))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.fast
def test_targets_have_masks_and_no_crowd():
    target = objects(3)
    target.crowd = torch.tensor([True, False, False])
    assert len(learning.Objects.from_instances(target, torch.device("cpu"))) == 2
    target.masks = None
    with pytest.raises(UsageError, match="targets have boxes but no masks"):
        learning.Objects.from_instances(target, torch.device("cpu"))


def test_at_most_as_many_objects_as_queries_are_matched():
    system = build("mask2former").eval()
    own = learning.Objects.from_instances(objects(30, side=(8, 8)), torch.device("cpu"))
    queries, which = assign(system.costs(system(torch.randn(1, 3, *SIZE)), [own]))[0]
    assert queries.shape == which.shape == (4, 12)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decoder": {"width": 100}},
            r"decoder.width must be a multiple of 4 \* decoder.heads, that is of 32, got 100",
        ),
        ({"decoder": {"queries": 0}}, "decoder.queries must be at least 1, got 0"),
        ({"decoder": {"layers": 0}}, "decoder.layers must be at least 1, got 0"),
        ({"decoder": {"heads": 0}}, "decoder.heads must be at least 1, got 0"),
        ({"decoder": {"dropout": 1.0}}, "decoder.dropout must be at least 0 and less than 1, got 1.0"),
        ({"resize": {"short": 0}}, "resize.short must be at least 1, got 0"),
        ({"encoder_points": 0}, "mask2former: encoder_points must be at least 1, got 0"),
        ({"loss": {"points": 0}}, "loss.points must be at least 1, got 0"),
        ({"loss": {"no_object": -1.0}}, "loss.no_object must be at least 0, got -1.0"),
        ({"loss": {"important": 2.0}}, r"loss.important must be in \[0, 1\], got 2.0"),
        ({"loss": {"point": 5}}, "loss has no option 'point'; did you mean 'points'"),
        ({"stuff": ("sky",)}, "stuff has 'sky', not among the 1 classes"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create("mask2former", **options)


@pytest.mark.fast
def test_options_of_earlier_versions_are_converted():
    old = {
        "classes": ["a"], "stuff": [], "backbone": "swin-tiny", "pretrained": False, "stem_width": 64, "norm": "group",
        "norm_eps": 1e-5, "swin_width": 12, "window": None, "drop_path": 0.3, "width": 64, "heads": 4, "queries": 7,
        "sampled": 2, "learnt_content": False, "points": 9, "short": 320, "long": 512, "mean": None, "std": [1, 1, 1],
    }  # fmt: skip
    assert Mask2Former.upgraded(old) == {
        "classes": ["a"], "stuff": [], "backbone": {"name": "swin-tiny", "width": 12, "window": None, "drop_path": 0.3},
        "decoder": {"width": 64, "heads": 4, "queries": 7}, "encoder_points": 2, "learned_content": False,
        "loss": {"points": 9}, "resize": {"short": 320, "long": 512, "mean": None, "std": [1, 1, 1]},
    }  # fmt: skip


def rewritten(path: Path, keys: dict[str, str], options: dict[str, object]) -> Path:
    """The file with other prefixes of keys, and other options (None: left out)."""
    with safe_open(path, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "crc32"}  # of the tensors' names too
        state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for new, old in keys.items():
        state = {old + k.removeprefix(new): v for k, v in state.items()}
    merged = {k: v for k, v in {**json.loads(metadata["options"]), **options}.items() if v is not None}
    save_file(state, path.with_name("old.safetensors"), {**metadata, "options": json.dumps(merged)})
    return path.with_name("old.safetensors")


def test_weights_of_earlier_versions_are_renamed(tmp_path):
    system = build("mask2former").eval()
    mw.save(system, tmp_path / "today.safetensors")
    path = rewritten(tmp_path / "today.safetensors", {"dense.": ""}, {"decoder": None, "queries": 12, "width": 64,
                     "heads": 4, "hidden": 64, "layers": 3})  # fmt: skip
    again = mw.load(path)
    assert again.options == system.options
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in system.state_dict().items())


@pytest.mark.parametrize("layout", ["r50-coco-panoptic", "swin_tiny-coco-instance", "swin_tiny-coco-instance-hf"])
def test_unpublished_variants_of_a_layout_are_recognised(layout):
    """Fewer queries, other classes, a deeper backbone, names of other versions."""
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
    assert (options["decoder"]["queries"], len(options["classes"])) == (7, 3)
    assert options["backbone"]["name"] == {"r50": "resnet101", "swi": "swin-small"}[layout[:3]]
    with torch.device("meta"):
        system = create("mask2former", **options)
    ours = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    state = origin.translate({k: torch.empty(v, device="meta") for k, v in changed.items()}, options)
    assert {k: tuple(v.shape) for k, v in state.items()} == ours


def inside(key: str) -> str:
    """The name in transformers 5 of a tensor of the published files of Mask2Former or MaskFormer."""
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


def test_names_of_transformers_5_are_recognised():
    """And the norm after Swin, which is not used, where save_pretrained of version 5 writes it."""
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


def test_masks_are_padded_with_background():
    """Targets have the size of the image, which may be smaller than the input."""
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
