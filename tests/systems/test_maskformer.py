"""What is MaskFormer's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from maskwright.checkpoints.origins import origins
from maskwright.errors import UsageError
from maskwright.ops import query_losses as learning
from maskwright.structures import Placement
from maskwright.systems import create
from tests.systems.test_mask2former import SWIN, painted
from tests.systems.tiny import SIZE, build, objects

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
SMALL = (64, 96)


@pytest.mark.parametrize(
    "options", [{"encoder_layers": 2}, {**SWIN, "drop_path": 0.2, "dropout": 0.1}], ids=["an encoder", "a Swin trunk"]
)
def test_each_option_trains_and_finds(options):
    system = build("maskformer", **options)
    images = torch.randn(2, 3, *SMALL)
    for counts in ((3, 1), (0, 0)):
        system.zero_grad()
        terms = system.losses(system(images), [objects(n, size=SMALL) for n in counts])
        assert len(terms) == 3 * 2
        sum(terms.values(), torch.zeros(())).backward()
        assert all(torch.isfinite(v) for v in terms.values()), terms
        assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        found = system.eval().decode(system(images), [Placement.identity(SMALL)] * 2, detections=5)
    assert all(0 < len(own) <= 5 and len(own.masks) == len(own) for own in found)


def test_a_segment_is_all_that_it_wins():
    """Unlike in Mask2Former also where its own mask is not likely."""
    for name, expected in (("maskformer", SIZE[0] * SIZE[1]), ("mask2former", 32 * 48)):
        system = build(name)
        found = system.decode_panoptic(
            painted(system, (1, 9.0, slice(4, 12), slice(4, 16))), [Placement.identity(SIZE)], overlap_threshold=0.0
        )[0]
        assert found.segments.masks.areas().tolist() == pytest.approx([expected], rel=0.1), name


def test_matching_reads_targets_at_the_nearest_pixel_and_losses_at_every_one():
    system = build("maskformer").eval()
    raw, target = system(torch.randn(1, 3, *SIZE)), objects(2)
    own = learning.Objects.of(target, torch.device("cpu"))
    planes = target.masks.dense().float()
    small = functional.interpolate(planes[None], raw.features.shape[2:], mode="nearest")[0].flatten(1)
    logits, probabilities = raw.masks()[0].flatten(1), raw.classes[-1, 0].softmax(-1)
    cost = system.costs(raw, [own])[0][-1]
    for query, which in ((0, 0), (5, 1), (11, 0)):
        x, t, p = logits[query], small[which], logits[query].sigmoid()
        cross = functional.binary_cross_entropy_with_logits(x, t, reduction="none")
        focal = (torch.where(t > 0, 0.25, 0.75) * torch.where(t > 0, 1 - p, p) ** 2 * cross).mean()
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        expected = 20 * focal + dice - probabilities[query, target.labels[which]]
        torch.testing.assert_close(cost[query, which], expected)


def test_losses_are_the_same_however_little_memory_they_may_take(monkeypatch):
    system = build("maskformer").eval()
    images, targets = torch.randn(2, 3, *SIZE), [objects(15, side=(20, 30)), objects(2)]
    results = []
    for budget in (1 << 28, 1 << 18):
        monkeypatch.setattr(learning, "BUDGET", budget)
        system.zero_grad()
        terms = system.losses(system(images), targets)
        sum(terms.values(), torch.zeros(())).backward()
        results.append((torch.stack(list(terms.values())).detach(), system.queries.weight.grad.clone()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


def test_wrong_options_are_refused_in_words():
    with pytest.raises(UsageError, match="width is 100; expected a multiple of 4 x heads, which is 32"):
        create("maskformer", width=100)
    for option in ("queries", "layers", "heads", "multiple", "short"):
        with pytest.raises(UsageError, match=f"maskformer: {option} is 0; expected at least 1"):
            create("maskformer", **{option: 0})


@pytest.mark.parametrize("layout", ["r50-coco-panoptic", "swin_tiny-coco-panoptic-hf"])
def test_variants_of_the_layout_that_were_never_published_are_recognised(layout):
    """Fewer queries, other classes, half the decoder, today's names; and for ResNets no encoder, as on ADE20K."""
    tensors = json.loads((LAYOUTS / f"maskformer-{layout}.json").read_text())["tensors"]
    changed = {}
    for key, (shape, _) in tensors.items():
        if ".decoder.layers.3." in key or ".decoder.layers.4." in key or ".decoder.layers.5." in key:
            continue
        if "sem_seg_head.transformer" in key or "sem_seg_head.input_proj" in key:
            continue
        if "class_embed" in key or "class_predictor" in key:
            shape = [4, *shape[1:]]
        if "query_embed" in key or "queries_embedder" in key:
            shape = [7, shape[1]]
        if key == "sem_seg_head.layer_4.weight":
            shape = [256, 2048, 3, 3]
        key = key.replace("sem_seg_head.mask_features", "sem_seg_head.pixel_decoder.mask_features")
        changed[key] = tuple(shape)
    if layout.startswith("r50"):
        changed |= {
            "sem_seg_head.predictor.input_proj.weight": (256, 2048, 1, 1),
            "sem_seg_head.predictor.input_proj.bias": (256,),
        }
    found = [(o, c.options) for o in origins() for c in o.candidates(changed, {})]
    assert [o.system for o, _ in found] == ["maskformer"]
    origin, options = found[0]
    assert (options["queries"], len(options["classes"]), options["layers"]) == (7, 3, 3)
    assert options["encoder_layers"] == 0
    with torch.device("meta"):
        system = create("maskformer", **options)
    ours = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    state = origin.translate({k: torch.empty(v, device="meta") for k, v in changed.items()}, options)
    assert {k: tuple(v.shape) for k, v in state.items()} == ours


def test_names_inside_transformers_5_and_its_resnets_are_recognised():
    """transformers' MaskFormer on its own ResNet: its layout is Swin's but for the trunk and what reads the trunk."""
    swin = json.loads((LAYOUTS / "maskformer-swin_tiny-coco-panoptic-hf.json").read_text())["tensors"]
    trunk = json.loads((LAYOUTS / "maskformer-r50-coco-panoptic.json").read_text())["tensors"]
    wider = {768: 2048, 384: 1024, 192: 512, 96: 256}
    shapes = {}
    for key, (shape, _) in swin.items():
        if ".encoder." in key:
            continue
        if ".fpn." in key or "input_projection" in key:
            shape = [shape[0], *(wider.get(n, n) for n in shape[1:])]
        key = re.sub(r"(decoder\.layers\.\d+\.\w+_attn\.)out_proj\.", r"\1o_proj.", key)
        key = re.sub(r"(decoder\.layers\.\d+\.)(fc\d)\.", r"\1mlp.\2.", key)
        shapes[key] = tuple(shape)
    for key, (shape, _) in trunk.items():
        if not key.startswith("backbone."):
            continue
        key = re.sub(r"\.(weight)$", r".convolution.\1", key) if ".norm." not in key else key
        key = key.replace(".norm.", ".normalization.")
        key = re.sub(r"^backbone\.stem\.conv1\.", "embedder.embedder.", key)
        key = re.sub(r"^backbone\.res(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 2}.layers.{m[2]}.", key)
        key = re.sub(r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.", key)
        shapes[f"model.pixel_level_module.encoder.{key}"] = tuple(shape)
    shapes["model.pixel_level_module.encoder.embedder.embedder.normalization.num_batches_tracked"] = ()
    found = [(o, c.options) for o in origins() for c in o.candidates(shapes, {})]
    assert [(o.system, o.name) for o, _ in found] == [("maskformer", "transformers")]
    origin, options = found[0]
    assert (options["backbone"], options["norm"], options["encoder_layers"]) == ("resnet50", "frozen", 0)
    with torch.device("meta"):
        system = create("maskformer", **options)
    ours = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    state = origin.translate({k: torch.empty(v, device="meta") for k, v in shapes.items()}, options)
    assert {k: tuple(v.shape) for k, v in state.items()} == ours
