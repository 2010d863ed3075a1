"""Backbones by name: what the registry promises of every one of them, and what is particular to some."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

import maskwright
from maskwright.blocks import backbones
from maskwright.blocks.backbones import (
    Backbone,
    Family,
    Levels,
    Use,
    family_of,
    first_weight,
    freeze,
    levels_of,
    options_of,
)
from maskwright.blocks.layers import ConvNorm
from maskwright.blocks.swin import Swin
from maskwright.errors import UsageError
from maskwright.systems import create, describe
from tests.systems.tiny import SIZE, objects

# One narrow backbone of each kind. A new family adds a line.
NARROW = {
    name: Backbone.read({"name": name, **options})
    for name, options in {
        "resnet18": {"width": 8},
        "resnet50": {"width": 8, "deform_stages": (2,)},
        "swin-tiny": {"width": 12, "depths": (1, 1, 2, 1), "heads": (1, 1, 2, 2)},
        "hiera-tiny": {"width": 8, "depths": (1, 1, 3, 1)},
        "vgg11": {"width": 4},
        "darknet53": {"width": 4},
        "darknet-tiny": {"width": 2},
        "dla34": {"width": 4},
        "vovnet19-slim": {"width": 8, "deform_stages": (2,)},
        "vovnet19-slim-dw": {"width": 8},
        "mobilenet-v2": {"width": 8},
        "timm:resnet18": {},
        "timm:mobilenetv3_small_050": {},
        "vit_tiny_patch16_224": {"width": 24, "depth": 2, "heads": 2},
    }.items()
}
CONVOLUTIONAL = [name for name in NARROW if not name.startswith("vit_")]
EVERY = pytest.mark.parametrize("name", NARROW)


def uses(name: str) -> list[Use]:
    family = family_of(name)
    return [Use(deepest=d) for d in family.deepest] + [Use(dilated=True, dilate_first=f) for f in (True, False)] * (
        family.dilates
    )


def whole(name: str) -> Use:
    """The use of all levels."""
    return Use(deepest=max(family_of(name).deepest))


def on_meta(spec: Backbone, use: Use | None = None) -> nn.Module:
    with torch.device("meta"):
        return spec.build(use=use or whole(spec.name))


# ---- every family ----------------------------------------------------------------------------------------------------


def test_every_family_is_tested():
    assert {family_of(name).names for name in NARROW} == {family.names for family in backbones.families()}
    assert len(set(backbones.names())) == len(backbones.names())


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_levels_are_what_the_network_returns(name):
    spec = NARROW[name]
    if name == "resnet50":
        spec = replace(spec, deform_stages=())
    for use in uses(name):
        levels, network = spec.levels(use), on_meta(spec, use)
        assert levels == levels_of(network)
        deepest = use.deepest // 2 if use.dilated else use.deepest
        assert levels.strides[-1] == max(levels.strides) == deepest
        images = torch.empty(2, 3, 128, 160, device="meta")
        shapes = [(2, c, 128 // s, 160 // s) for c, s in zip(*levels, strict=True)]
        assert [tuple(level.shape) for level in network(images)] == shapes


def test_levels_of_a_plain_vision_transformer_are_its_patches():
    spec = NARROW["vit_tiny_patch16_224"]
    for use in (Use(), Use(patch=8, size=64)):
        vit = on_meta(spec, use)
        assert spec.levels(use) == levels_of(vit) == ((24,), (use.patch or 16,))
    assert Backbone("vit_tiny_patch16_224").levels() == ((192,), (16,))
    with pytest.raises(UsageError, match="levels of strides 8, 16, 32 is needed; this one has 16"):
        describe("yolact", backbone="vit_tiny_patch16_224")


CHANGES = {
    "width": 20, "depth": 1, "depths": (2, 1, 1, 1), "heads": (2, 2, 2, 2), "window": 3, "drop_path": 0.5,
    "norm": "frozen", "norm_eps": 1e-3, "frozen": 2, "groups": 2, "group_width": 32, "stride_in": "1x1",
    "deform_stages": (1,), "deform_modulated": True, "deform_every": 2, "deform_groups": 2,
}  # fmt: skip


def fingerprint(network: nn.Module) -> list[object]:
    """Everything about a network but its values."""
    plain = (bool, int, float, str, tuple)
    modules = [
        (name, type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for name, module in network.named_modules()
    ]
    return [*modules, *((name, value.shape, value.requires_grad) for name, value in network.named_parameters())]


@EVERY
def test_every_field_takes_effect_or_is_refused(name):
    spec = NARROW[name]
    before = fingerprint(on_meta(spec))
    for field, value in CHANGES.items():
        if field == "heads" and name.startswith(("vit_", "hiera-")):
            value = 3 if name.startswith("vit_") else 2
        if field in options_of(name):
            changed = spec.changed({field: value})
            assert changed == replace(spec, **{field: value})
            assert fingerprint(on_meta(changed)) != before, field
            assert spec.to_options()[field] != changed.to_options()[field]
        else:
            for refused in (
                lambda f=field, v=value: replace(spec, **{f: v}),
                lambda f=field, v=value: spec.changed({f: v}),
            ):
                with pytest.raises(UsageError, match=f"backbone '{name}' has no option '{field}'; its options are "):
                    refused()
            assert field not in spec.to_options()


@pytest.mark.parametrize("name", [name for name in NARROW if "pretrained" in options_of(name)])
def test_published_weights_are_those_of_timm(name, monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is an extra")
    asked, create = [], timm.create_model

    def listen(*given, pretrained=False, **options):
        asked.append(pretrained)
        return create(*given, **options)

    monkeypatch.setattr(timm, "create_model", listen)
    on_meta(replace(NARROW[name], pretrained=True))
    assert asked[-1] is True
    with pytest.raises(UsageError, match="backbone 'resnet18' has no option 'pretrained'"):
        Backbone("resnet18", pretrained=True)


@EVERY
def test_it_reads_images_of_any_number_of_channels(name):
    with torch.device("meta"):
        network = NARROW[name].build(5, whole(name))
    weight = first_weight(network)
    assert weight is not None
    assert network.get_parameter(weight).shape[1] == 5


@pytest.mark.parametrize("name", [name for name in NARROW if "frozen" in options_of(name)])
def test_frozen_parts_do_not_change_in_training(name):
    spec = NARROW[name]
    changes = {"norm": "batch"} if "norm" in options_of(name) else {}
    changes["frozen"] = 1 if name == "darknet-tiny" else 2
    network = replace(spec, **changes).build(use=whole(name)).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    sum(level.square().mean() for level in network(torch.randn(2, 3, 32, 32))).backward()
    with torch.no_grad():
        for value in network.parameters():
            if value.requires_grad and value.grad is not None:
                value.sub_(value.grad.sign())
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    fixed = [key for key, value in network.named_parameters() if not value.requires_grad]
    assert fixed
    # Buffers of a module whose parameters are fixed are fixed too.
    homes = {key.rpartition(".")[0] for key in fixed}
    assert not [key for key in changed if key in fixed or key.rpartition(".")[0] in homes]
    assert changed


@pytest.mark.parametrize("name", [name for name in NARROW if "frozen" in options_of(name)])
def test_no_more_parts_are_frozen_than_there_are(name):
    with pytest.raises(UsageError, match=r"backbone.frozen must be at most \d+, the number of its parts, got 99"):
        on_meta(replace(NARROW[name], frozen=99))


# ---- strings, mappings and values ------------------------------------------------------------------------------------

DEFAULT = Backbone("resnet50", norm="frozen", frozen=2, width=32, stride_in="1x1", deform_stages=(3,))


@pytest.mark.fast
def test_a_backbone_is_a_name_a_mapping_or_a_value():
    assert Backbone.read("resnet101") == Backbone.read({"name": "resnet101"}) == Backbone("resnet101")
    assert Backbone.read({"width": 16}, DEFAULT) == replace(DEFAULT, width=16)
    assert Backbone.read("resnet101", DEFAULT) == replace(DEFAULT, name="resnet101")
    value = Backbone("vgg16")
    assert Backbone.read(value, DEFAULT) is value
    assert Backbone.read(DEFAULT.to_options()) == DEFAULT
    with pytest.raises(UsageError, match="backbone must be a name, a mapping or a Backbone, got 50"):
        Backbone.read(50)
    with pytest.raises(UsageError, match="backbone has no option 'nrom'; did you mean 'norm'"):
        Backbone.read({"nrom": "frozen"})


@pytest.mark.fast
def test_another_name_resets_what_the_new_backbone_does_not_have():
    assert Backbone.read("resnet18", DEFAULT) == Backbone("resnet18", norm="frozen", frozen=2, width=32)
    assert Backbone.read("vgg16", DEFAULT) == Backbone("vgg16", norm="frozen", frozen=2)
    assert Backbone.read({"name": "vgg16", "width": 8}, DEFAULT) == Backbone("vgg16", norm="frozen", frozen=2, width=8)
    assert Backbone.read("swin-tiny", DEFAULT) == Backbone("swin-tiny", frozen=2)
    assert Backbone.read("timm:resnet18", DEFAULT) == Backbone("timm:resnet18", frozen=2)
    assert Backbone.read("vit_tiny_patch16_224", DEFAULT) == Backbone("vit_tiny_patch16_224")
    assert DEFAULT.changed({"name": "resnet50", "frozen": 1}) == replace(DEFAULT, frozen=1)
    with pytest.raises(UsageError, match="backbone 'vgg16' has no option 'groups'"):
        Backbone.read({"name": "vgg16", "groups": 4}, DEFAULT)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("before", "changes", "after"),
    [
        ({"name": "resnet50", "width": 8, "norm": "frozen"}, {"name": "vgg16"}, {"name": "vgg16", "norm": "frozen"}),
        ({"name": "resnet50", "width": 8, "groups": 4}, {"name": "resnet18"}, {"name": "resnet18", "width": 8}),
        ({"norm": "frozen", "frozen": 2}, {"name": "swin-tiny"}, {"name": "swin-tiny", "frozen": 2}),
        ({"norm": "frozen"}, {"frozen": 2}, {"norm": "frozen", "frozen": 2}),
        ({"name": "resnet50"}, {"name": "vgg16", "groups": 4}, {"name": "vgg16", "groups": 4}),  # refused when read
    ],
)
def test_merging_options_resets_likewise(before, changes, after):
    assert Backbone.merged(before, changes) == after


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet51"}, r"no backbone 'resnet51'; did you mean 'resnet\d+'\?; known are resnet18, .*, vit_NAME"),
        ({"name": "swin-huge"}, "no backbone 'swin-huge'"),
        ({"name": "timm:"}, "no backbone 'timm:'.*; known are .*timm:NAME"),
        ({"name": 50}, "backbone.name must be a string, got 50"),
        ({"name": "resnet18", "groups": 2}, "'resnet18' has no option 'groups'; its options are width, norm"),
        ({"name": "resnet18", "deform_stages": (3,)}, "'resnet18' has no option 'deform_stages'"),
        ({"norm": "frosen"}, "backbone.norm must be one of .*; did you mean 'frozen'"),
        ({"width": 0}, "backbone.width must be at least 1, got 0"),
        ({"frozen": -1}, "backbone.frozen must be at least 0, got -1"),
        ({"norm_eps": -1e-5}, "backbone.norm_eps must be at least 0, got -1e-05"),
        ({"deform_stages": (1, 4)}, "backbone.deform_stages must be between 0 and 3, got 4"),
        ({"deform_every": 0}, "backbone.deform_every must be at least 1, got 0"),
        ({"name": "swin-tiny", "depths": (2, 0, 2, 2)}, "backbone.depths must be at least 1, got 0"),
        ({"name": "swin-tiny", "drop_path": 1.0}, "backbone.drop_path must be at least 0 and below 1, got 1.0"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Backbone.read(options)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("spec", "use", "words"),
    [
        (Backbone("swin-tiny"), Use(deepest=16), "'swin-tiny' ends at stride 32; one that ends at stride 16 is needed"),
        (Backbone("vgg16"), Use(), "'vgg16' ends at stride 8 or 16; one that ends at stride 32 is needed"),
        (Backbone("darknet53"), Use(dilated=True), "'darknet53' has no dilated stages; a dilated backbone is needed"),
    ],
)
def test_a_use_that_a_backbone_does_not_offer_is_refused(spec, use, words):
    for attempt in (spec.levels, lambda use: spec.build(use=use)):
        with pytest.raises(UsageError, match=words):
            attempt(use)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("spec", "use", "words"),
    [
        (Backbone(deform_stages=(3,)), Use(deepest=16), "deform_stages has 3; only stages 0 ... 2 are used here"),
        (Backbone(deform_stages=(3,), deform_groups=7), Use(), "offset_groups must divide the 512 input channels"),
        (Backbone(norm="batch", norm_eps=0.0), Use(), "norm_eps must be above 0 with norm='batch'"),
        (Backbone("swin-tiny", heads=4), Use(), "heads of a Swin Transformer must be a list"),
        (Backbone("hiera-tiny", heads=(1, 2)), Use(), "heads of Hiera must be an integer"),
        (Backbone("hiera-tiny", heads=5), Use(), r"width must be a multiple of backbone.heads \(5\), got 96"),
        (Backbone("hiera-tiny", depths=(1, 2)), Use(), r"depths of Hiera must be 4 integers, got \[1, 2\]"),
    ],
)
def test_options_that_contradict_each_other_are_refused(spec, use, words):
    with pytest.raises(UsageError, match=words):
        on_meta(spec, use)


@pytest.mark.fast
def test_levels_are_chosen_by_their_strides():
    levels = Backbone("darknet53").levels()
    assert levels.indices((8, 16, 32)) == [2, 3, 4]
    with pytest.raises(UsageError, match="levels of strides 8, 16, 32 is needed; this one has 16, 32"):
        Backbone("darknet-tiny").levels().indices((8, 16, 32))


# ---- a new family ----------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Levels of strides 4 to 32: everything that a system asks of a backbone."""

    def __init__(self, width: int, in_channels: int, frozen: int):
        super().__init__()
        self.channels, self.strides = [width] * 4, [4, 8, 16, 32]
        self.stem = nn.Conv2d(in_channels, width, 4, 4)
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 2, 2) for _ in range(3))
        freeze([self.stem, *self.stages], frozen)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = [self.stem(x).relu()]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]).relu())
        return outputs


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """The family of Toy, added as one module and one entry of the list."""
    module = ModuleType("maskwright.blocks.toy")
    vars(module)["FAMILY"] = Family(
        names=("toy",),
        options=frozenset(("width", "frozen")),
        levels=lambda spec, use: Levels((spec.width or 16,) * 4, (4, 8, 16, 32)),
        build=lambda spec, in_channels, use: Toy(spec.width or 16, in_channels, spec.frozen),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backbones, "FAMILIES", (*backbones.FAMILIES, "toy"))
    return "toy"


def test_a_new_family_is_one_module_and_one_entry(toy):
    spec = Backbone.read({"name": toy, "width": 8}, DEFAULT)
    assert spec == Backbone("toy", width=8, frozen=2)
    assert spec.to_options() == {"name": "toy", "width": 8, "frozen": 2}
    assert levels_of(spec.build()) == spec.levels() == Levels((8,) * 4, (4, 8, 16, 32))
    with pytest.raises(UsageError, match="backbone 'toy' has no option 'norm'; its options are width, frozen"):
        Backbone(toy, norm="batch")
    with pytest.raises(UsageError, match="no backbone 'tyo'; did you mean 'toy'"):
        Backbone("tyo")


def test_a_system_is_trained_saved_and_loaded_on_a_new_family(toy, tmp_path):
    options = {"classes": ("a", "b"), "neck_width": 16, "prototypes": 4}
    system = create("yolact", backbone={"name": toy, "width": 8}, **options)
    assert system.input_weight() == "dense.backbone.stem.weight"
    terms = system.losses(system(torch.randn(1, 3, *SIZE)), [objects(2)])
    sum(terms.values(), torch.zeros(())).backward()
    assert all(value.grad is not None for value in system.dense.backbone.parameters())
    maskwright.save(system, tmp_path / "toy.safetensors")
    again = maskwright.load(tmp_path / "toy.safetensors", backbone={"frozen": 4})
    assert again.options["backbone"] == {"name": "toy", "width": 8, "frozen": 4}
    assert not any(value.requires_grad for value in again.dense.backbone.parameters())


# ---- ResNet ----------------------------------------------------------------------------------------------------------


def test_a_dilated_stage_keeps_its_size_and_reaches_as_far():
    first, all_blocks = (on_meta(NARROW["resnet50"], Use(dilated=True, dilate_first=f)) for f in (False, True))
    dilations = [
        [m.dilation for m in network.stages[3].modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        for network in (first, all_blocks)
    ]
    assert dilations == [[(1, 1), (2, 2), (2, 2)], [(2, 2)] * 3]
    assert levels_of(first).strides == (4, 8, 16, 16)


def test_every_third_block_is_deformable_from_the_first_on():
    spec = Backbone("resnet101", width=8, deform_stages=(1, 2), deform_every=3)
    network = on_meta(spec, Use(deform_bias=True))
    blocks = [[not isinstance(block.conv2, ConvNorm) for block in stage] for stage in network.stages]
    assert [[i for i, deformed in enumerate(stage) if deformed] for stage in blocks] == [
        [], [0, 3], list(range(0, 23, 3)), [],
    ]  # fmt: skip
    assert network.stages[1][0].conv2.bias is not None


# ---- Swin Transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (20, 20)])
def test_swin_gives_levels_of_any_size(size):
    network = Swin(16, (2, 2, 2, 1), (1, 2, 2, 4), 4, drop_path=0.2).eval()
    levels = network(torch.randn(2, 3, *size))
    h, w = (-(-s // 4) for s in size)
    for level, channels in zip(levels, network.channels, strict=True):
        assert level.shape == (2, channels, h, w)
        h, w = -(-h // 2), -(-w // 2)


def test_shifted_windows_see_neighbours_but_not_the_other_border():
    network = Swin(16, (2,), (2,), 4).eval()
    image = torch.randn(1, 3, 48, 48, requires_grad=True)
    network(image)[0][0, :, 0, 0].square().sum().backward()
    seen = (image.grad.abs().sum((0, 1)) > 1e-12).nonzero()
    assert int(seen.amax()) < 4 * 8  # its window and the adjacent one, not those at the other border


def test_frozen_parts_of_a_swin_transformer():
    network = replace(NARROW["swin-tiny"], frozen=2).build()
    fixed = {n.rpartition(".")[0] for n, p in network.named_parameters() if not p.requires_grad}
    assert {n.split(".")[0] for n in fixed} == {"stem", "stem_norm", "stages"}
    assert not [n for n in fixed if n.startswith(("stages.1", "merges"))]


# ---- timm ------------------------------------------------------------------------------------------------------------


def test_layers_of_timm_that_come_after_the_last_level_are_left_out():
    pytest.importorskip("timm", reason="timm is an extra")
    for name in ("timm:mobilenetv3_small_050", "timm:resnet18"):
        network = Backbone(name).build(use=Use(deepest=8)).train()
        sum(level.sum() for level in network(torch.randn(2, 3, 64, 64))).backward()
        assert not [key for key, value in network.named_parameters() if value.grad is None]


def test_models_of_timm_that_do_not_fit_are_refused():
    pytest.importorskip("timm", reason="timm is an extra")
    for name, words in (
        ("timm:resnet7", "there is no model 'resnet7' in timm's registry"),
        ("timm:levit_128", r"'levit_128' has levels of strides \(16, 32, 64\); strides 4, 8, 16 and 32 are needed"),
    ):
        with pytest.raises(UsageError, match=words):
            Backbone(name).levels()
        with pytest.raises(UsageError, match=words):
            Backbone(name).build()


def test_levels_of_timm_are_channels_first():
    pytest.importorskip("timm", reason="timm is an extra")
    spec = Backbone("timm:swin_tiny_patch4_window7_224")
    levels = on_meta(spec)(torch.empty(1, 3, 224, 224, device="meta"))
    assert [tuple(level.shape[1:]) for level in levels] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
