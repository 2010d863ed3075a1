"""A prepared system predicts the same as the original, faster; the original is unchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maskwright
from maskwright.blocks.layers import ConvNorm, DeformConvNorm, FrozenBatchNorm
from maskwright.errors import UsageError
from maskwright.inference import predict, prepare
from maskwright.inference.preparing import fold
from maskwright.systems import System
from maskwright.systems.mask_rcnn import MaskRCNN

SMALL = {
    "classes": ("cat", "dog"), "backbone": {"name": "resnet18", "width": 8}, "resize": {"short": 96, "long": 128},
    "neck_width": 16, "boxes": {"width": 32}, "masks": {"width": 16},
    "proposals": {"before": (100, 50), "after": (50, 20)},
}  # fmt: skip


def lively(module: nn.Module) -> nn.Module:
    """Norms with random parameters and statistics, as after training."""
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, FrozenBatchNorm)):
            with torch.no_grad():
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.3)
    return module.eval()


def small(**options) -> System:
    system = maskwright.create("mask-rcnn", **MaskRCNN.with_options(SMALL, options))
    lively(system)
    return system


def distance(a, b) -> float:
    """The largest relative error over all raw maps."""
    pairs = zip((*a.features, *a.objectness, *a.deltas), (*b.features, *b.objectness, *b.deltas), strict=True)
    return max(float((x.double() - y.double()).norm() / x.double().norm()) for x, y in pairs)


# ---- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("norm", ["frozen", "still", "batch", "group", "none"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 4}, {"kernel": 1, "relu": True}, {"dilation": 2}])
def test_a_block_with_its_norm_folded(norm, options):
    block = lively(ConvNorm(8, 16, norm=norm, **options))
    x = torch.randn(2, 8, 9, 11)
    folded = copy.deepcopy(block)
    assert fold(folded) == (norm in ("frozen", "still", "batch"))
    assert isinstance(folded.norm, nn.Identity) == (norm != "group")
    torch.testing.assert_close(folded(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("norm", ["frozen", "still", "batch"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_deformable_block_keeps_the_shift_as_its_bias(norm, bias):
    block = lively(DeformConvNorm(4, 6, norm=norm, bias=bias))
    nn.init.normal_(block.offset.weight)
    x = torch.randn(1, 4, 8, 8)
    folded = copy.deepcopy(block)
    assert fold(folded) == 1
    assert isinstance(folded.norm, nn.Identity)
    assert folded.bias is not None
    torch.testing.assert_close(folded(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_neighbours_in_a_sequence_and_what_only_looks_like_them():
    class Louder(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    net = lively(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), Louder(4)
        )
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    folded = copy.deepcopy(net)
    assert fold(folded) == 1, "the one that follows its convolution and does nothing else"
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_a_norm_without_an_affine_part():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 8, 8)
    folded = copy.deepcopy(net)
    assert fold(folded) == 1
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)


# ---- whole systems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "backbone": {"norm": "batch"},
            "neck_norm": "batch",
            "boxes": {"convs": 2, "fcs": 1, "norm": "batch"},
            "masks": {"norm": "batch"},
        },
        {"backbone": {"norm": "group"}, "neck_norm": "group"},
        {"backbone": {"name": "resnet50", "deform_stages": (2, 3)}},
        {"neck": "c4", "backbone": {"name": "resnet50"}, "proposals": {"anchor_sizes": (32, 64)}},
    ],
    ids=["frozen", "batch", "group", "deformable", "c4"],
)
def test_a_system_answers_the_same(options):
    system = small(**options)
    before = {name: value.clone() for name, value in system.state_dict().items()}
    ready = prepare(system, "cpu")
    batch = system.preprocess.collate([torch.randint(0, 256, (3, 80, 110), dtype=torch.uint8)])
    with torch.no_grad():
        # In float64, so that only the folding is seen and not the rounding of fifty random layers.
        exact, folded = copy.deepcopy(system).double(), copy.deepcopy(system).double()
        fold(folded)
        assert distance(exact(batch.images.double()), folded(batch.images.double())) < 1e-10
        plain, quick = system(batch.images), ready(batch.images.to(memory_format=torch.channels_last))
        assert distance(plain, quick) < 1e-3
        thresholds = {"score_threshold": 0.0, "detections": 10}
        a, b = (s.decode(r, batch.placements, **thresholds)[0] for s, r in ((system, plain), (ready, quick)))
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=1e-4)
    norms = [m for m in ready.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm))]
    assert not norms, "all folded"
    for name, value in system.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the original"
    assert not any(p.requires_grad for p in ready.parameters())
    assert any(p.requires_grad for p in system.parameters())


def test_sixteen_bits_are_close():
    system = small(backbone={"norm": "batch"})
    ready = prepare(system, "cpu", "bfloat16")
    assert {p.dtype for p in ready.parameters()} == {torch.bfloat16}
    shapes = dict(ready.anchors.named_buffers())
    assert {b.dtype for b in shapes.values()} == {torch.float32}, "pixels are not counted in 8 bits"
    batch = system.preprocess.collate([torch.randint(0, 256, (3, 80, 110), dtype=torch.uint8)])
    with torch.no_grad():
        plain, quick = system(batch.images), ready(batch.images.bfloat16())
        assert distance(plain, quick) < 0.05
        found = ready.decode(quick, batch.placements, score_threshold=0.0)[0]
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert torch.isfinite(found.boxes).all()
    prediction = predict(system, torch.randint(0, 256, (3, 80, 110), dtype=torch.uint8), dtype="bfloat16")
    assert prediction.size == (80, 110)


@pytest.mark.fast
def test_a_prepared_system_is_taken_as_it_is():
    system = small()
    ready = prepare(system, "cpu")
    assert ready is not system
    assert prepare(ready, "cpu") is ready
    other = prepare(ready, "cpu", "bfloat16")
    assert other is not ready
    assert next(ready.parameters()).dtype == torch.float32
    assert ready.classes == system.classes
    assert ready.options == system.options


@pytest.mark.fast
def test_invalid_choices_are_refused():
    system = small()
    for options, says in [
        ({"dtype": "double"}, "dtype must be one of 'float32', 'bfloat16', 'float16', got 'double'"),
        ({"device": "nonsense"}, "there is no device 'nonsense'"),
        ({"device": "cuda:99"}, "'cuda:99' is not available"),
    ]:
        with pytest.raises(UsageError, match=says):
            prepare(system, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_predictions_are_the_same():
    import shutil

    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    system = small()
    plain, quick = prepare(system, "cpu"), prepare(system, "cpu", compile=True)
    images = torch.randn(1, 3, 96, 128).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert distance(plain(images), quick(images)) < 1e-4
