"""MaskFormer: options, decoding, losses, and layouts of checkpoints."""

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
from maskwright.systems.maskformer import MaskFormer
from tests.systems.test_mask2former import SWIN, painted
from tests.systems.tiny import SIZE, build, objects

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
SMALL = (64, 96)


@pytest.mark.parametrize(
    "options", [{"encoder_layers": 2}, {"backbone": SWIN, "decoder": {"dropout": 0.1}}], ids=["encoder", "Swin"]
)
def test_each_option_trains_and_decodes(options):
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


@pytest.mark.fast
def test_a_segment_is_all_that_its_query_wins():
    """In Mask2Former only the part inside the query's own mask."""
    for name, expected in (("maskformer", SIZE[0] * SIZE[1]), ("mask2former", 32 * 48)):
        system = build(name)
        found = system.decode_panoptic(
            painted(system, (1, 9.0, slice(4, 12), slice(4, 16))), [Placement.identity(SIZE)], overlap_threshold=0.0
        )[0]
        assert found.segments.masks.areas().tolist() == pytest.approx([expected], rel=0.1), name


def test_matching_samples_targets_at_the_nearest_pixel():
    system = build("maskformer").eval()
    raw, target = system(torch.randn(1, 3, *SIZE)), objects(2)
    own = learning.Objects.from_instances(target, torch.device("cpu"))
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


def test_losses_do_not_depend_on_the_memory_bound(monkeypatch):
    system = build("maskformer").eval()
    images, targets = torch.randn(2, 3, *SMALL), [objects(8, SMALL, (20, 30)), objects(2, SMALL)]
    results = []
    for budget in (1 << 28, 1 << 18):
        monkeypatch.setattr(learning, "BUDGET", budget)
        system.zero_grad()
        terms = system.losses(system(images), targets)
        sum(terms.values(), torch.zeros(())).backward()
        results.append((torch.stack(list(terms.values())).detach(), system.dense.queries.weight.grad.clone()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.fast
def test_invalid_options_are_refused():
    for group, option in (("decoder", "queries"), ("decoder", "hidden"), ("resize", "multiple")):
        with pytest.raises(UsageError, match=f"maskformer: {group}.{option} must be at least 1, got 0"):
            create("maskformer", **{group: {option: 0}})
    with pytest.raises(UsageError, match="maskformer: encoder_layers must be at least 0, got -1"):
        create("maskformer", encoder_layers=-1)
    with pytest.raises(UsageError, match="loss has no option 'points'"):
        create("maskformer", loss={"points": 9})


@pytest.mark.fast
def test_options_of_earlier_versions_are_converted():
    old = {"backbone": "resnet18", "stem_width": 16, "queries": 7, "mask_weight": 20.0, "multiple": 1, "short": 320}
    assert MaskFormer.upgraded(old) == {
        "backbone": {"name": "resnet18", "width": 16}, "decoder": {"queries": 7}, "loss": {"mask_weight": 20.0},
        "resize": {"multiple": 1, "short": 320},
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["r50-coco-panoptic", "swin_tiny-coco-panoptic-hf"])
def test_unpublished_variants_of_a_layout_are_recognised(layout):
    """Fewer queries, other classes, half of the decoder, current names; and for ResNets no encoder, as on ADE20K."""
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
    decoder = options["decoder"]
    assert (decoder["queries"], len(options["classes"]), decoder["layers"]) == (7, 3, 3)
    assert options["encoder_layers"] == 0
    with torch.device("meta"):
        system = create("maskformer", **options)
    ours = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    state = origin.translate({k: torch.empty(v, device="meta") for k, v in changed.items()}, options)
    assert {k: tuple(v.shape) for k, v in state.items()} == ours


def test_resnets_and_names_of_transformers_5_are_recognised():
    """With a ResNet of transformers, the layout differs in the backbone and in the layers that read its levels."""
    swin = json.loads((LAYOUTS / "maskformer-swin_tiny-coco-panoptic-hf.json").read_text())["tensors"]
    resnet = json.loads((LAYOUTS / "maskformer-r50-coco-panoptic.json").read_text())["tensors"]
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
    for key, (shape, _) in resnet.items():
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
    assert (options["backbone"], options["encoder_layers"]) == ({"name": "resnet50", "width": 64, "norm": "frozen"}, 0)
    with torch.device("meta"):
        system = create("maskformer", **options)
    ours = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    state = origin.translate({k: torch.empty(v, device="meta") for k, v in shapes.items()}, options)
    assert {k: tuple(v.shape) for k, v in state.items()} == ours
