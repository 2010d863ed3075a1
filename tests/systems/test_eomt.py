"""EoMT: queries among the tokens of a ViT, annealed masked attention, and layouts of checkpoints."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import maskwright as mw
from maskwright.blocks.vit import ViT
from maskwright.checkpoints.origins.eomt import ORIGINS
from maskwright.errors import UsageError
from maskwright.structures import Placement
from maskwright.systems import create
from maskwright.systems.eomt import EoMT
from tests.systems.test_mask2former import rewritten
from tests.systems.tiny import SIZE, sized

SIZES = {
    "backbone": {"name": "vit_tiny_patch16_224", "width": 32, "depth": 3, "heads": 2},
    "resize": {"canvas": (128, 128)},
    "queries": 30,
    "last_blocks": 2,
    "loss": {"points": 256},
}

build = sized({"eomt": SIZES})


def random_images(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.fast
def test_a_query_attends_only_to_the_inside_of_its_mask():
    net = build("eomt").dense
    embeddings, features = torch.randn(2, 30, 32), torch.randn(2, 32, 24, 32)
    allowed = net.allowed(embeddings, features, (6, 8), torch.tensor(1.0))
    before = 30 + net.backbone.prefix
    assert allowed.shape == (2, 1, before + 48, before + 48)
    assert allowed[:, :, :, :before].all(), "all tokens attend to queries and class token"
    assert allowed[:, :, 30:].all(), "other tokens attend to all"
    small = torch.nn.functional.interpolate(features, (6, 8), mode="bilinear", align_corners=False).flatten(2)
    assert torch.equal(allowed[:, 0, :30, before:], embeddings @ small > 0)
    assert net.allowed(embeddings, features, (6, 8), torch.tensor(0.0)).float().mean() > 0.99


@pytest.mark.fast
def test_masked_attention_is_annealed_block_by_block():
    system = build("eomt")
    assert system.dense.mask_probability.tolist() == [1, 1]
    found = []
    for done in (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0):
        system.on_progress(done)
        found.append([round(p, 3) for p in system.dense.mask_probability.tolist()])
    half = round(0.5**0.9, 3)
    assert found == [[1, 1], [1, 1], [half, 1], [0, 1], [0, half], [0, 0], [0, 0]]


def test_there_are_earlier_predictions_only_in_training():
    system = build("eomt")
    assert len(system.train()(random_images()).classes) == 3
    assert len(system.eval()(random_images()).classes) == 1
    assert len(build("eomt", masked=False).train()(random_images()).classes) == 1


def test_training_anneals_the_attention(tmp_path):
    from maskwright.data import Scenes

    small = {**SIZES, "resize": {"canvas": (64, 64)}, "loss": {"points": 64}}
    mw.train(
        "eomt",
        Scenes(2, size=(64, 64), seed=0),
        val=False,
        out=tmp_path / "run",
        steps=2,
        batch=1,
        workers=0,
        ema=None,
        tensorboard=False,
        device="cpu",
        options=small,
    )
    kept = mw.load(tmp_path / "run" / "last.safetensors")
    system = create("eomt", **small)
    system.on_progress(0.5)  # as in the last step, which began after half of the run
    assert torch.equal(kept.dense.mask_probability, system.dense.mask_probability)


def test_rotary_positions_do_not_apply_to_queries():
    backbone = {"name": "vit_small_patch16_dinov3_qkvb", "width": 48, "depth": 2, "heads": 2}
    system = create("eomt", backbone=backbone, resize={"canvas": (64, 64)}, queries=5, last_blocks=1)
    counts = [block.attn.num_prefix_tokens for block in system.dense.backbone.body.blocks]
    assert counts == [5, 10], "class token and four registers, then the queries too"
    with torch.no_grad():
        raw = system.eval()(torch.randn(1, 3, 64, 96))
    assert raw.features.shape == (1, 1, 48, 16, 24)


def test_inputs_may_have_another_size():
    system = build("eomt").eval()
    with torch.no_grad():
        found = system.decode(system(torch.randn(1, 3, 160, 64)), [Placement.identity((160, 64))])[0]
    assert found.image_size == (160, 64)


def test_positions_are_interpolated_for_a_grid_of_another_shape():
    vit = ViT("vit_tiny_patch16_224", patch=8, size=64, own={"embed_dim": 48, "depth": 1, "num_heads": 3}).eval()
    images = torch.zeros(1, 3, 32, 128)  # 4 x 16 patches, as many as the 8 x 8 of the table
    with torch.no_grad():
        vit.body.pos_embed[:, 1:].copy_(torch.arange(8.0).repeat(8)[None, :, None])  # the value is the column
        tokens, grid, _ = vit.begin(images)
        found = tokens[0, 1:] - vit.body.patch_embed.proj(images).flatten(2).mT[0]
    assert grid == (4, 16)
    columns = found[:, 0].unflatten(0, grid)
    assert (columns.diff(dim=1) > -0.1).all()
    torch.testing.assert_close(columns[0], columns[3], atol=0.1, rtol=0)


@pytest.mark.fast
def test_images_are_placed_at_the_upper_left_on_black():
    system = build("eomt")
    batch = system.preprocess.collate([torch.full((3, 50, 100), 255, dtype=torch.uint8)])
    assert batch.images.shape == (1, 3, 128, 128)
    black = (0 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(batch.images[0, :, -1, -1], black)
    assert (batch.images[0, :, 0, 0] > 2).all()


def test_panoptic_and_semantic_output():
    system = build("eomt", stuff=("b",)).eval()
    with torch.no_grad():
        raw = system(random_images())
    segmented = system.decode_panoptic(raw, [Placement.identity(SIZE)], score_threshold=0.0, overlap_threshold=0.0)[0]
    assert segmented.image_size == SIZE
    assert system.decode_semantic(raw, [Placement.identity(SIZE)])[0].shape == SIZE
    found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.0)[0]
    assert (found.labels == 0).all(), "instances are things"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_blocks": 9}, r"eomt: last_blocks must be in \[1, 3\], the number of blocks of vit_tiny_\w+, got 9"),
        ({"patch": 0}, "eomt: patch must be at least 1, got 0"),
        ({"queries": 0}, "eomt: queries must be at least 1, got 0"),
        ({"table": 0}, "eomt: table must be at least 1, got 0"),
        ({"loss": {"points": 0}}, "loss.points must be at least 1, got 0"),
        ({"backbone": {"width": 0}}, "backbone.width must be at least 1, got 0"),
        ({"backbone": {"heads": 0}}, "backbone.heads must be at least 1, got 0"),
        ({"backbone": {"depth": 0}}, "backbone.depth must be at least 1, got 0"),
        ({"backbone": "resnet18"}, r"eomt: backbone must be a plain vision transformer \(vit_...\), got 'resnet18'"),
        ({"backbone": "vit_nothing"}, "there is no model 'vit_nothing' in timm's registry"),
        ({"resize": {"canvas": (8, 128)}}, r"resize.canvas must hold at least one patch of 16 pixels, got \[8, 128\]"),
        ({"resize": {"multiple": 8}}, "resize.multiple must be a multiple of patch, that is of 16, got 8"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        build("eomt", **options)


@pytest.mark.fast
def test_options_of_earlier_versions_are_converted():
    old = {
        "backbone": "vit_tiny_patch16_224", "pretrained": False, "width": 32, "depth": None, "heads": 2,
        "norm_eps": None, "size": 96, "table": 4, "queries": 7, "points": 64, "no_object": 0.2,
    }  # fmt: skip
    backbone = {"width": 32, "depth": None, "heads": 2, "norm_eps": None, "pretrained": False}
    assert EoMT.upgraded(old) == {
        "backbone": {"name": "vit_tiny_patch16_224", **backbone}, "resize": {"canvas": [96, 96]}, "table": 4,
        "queries": 7, "loss": {"points": 64, "no_object": 0.2},
    }  # fmt: skip


def test_weights_of_earlier_versions_are_renamed(tmp_path):
    system = build("eomt").eval()
    system.on_progress(0.4)
    mw.save(system, tmp_path / "today.safetensors")
    old = {"width": 32, "depth": 3, "heads": 2, "backbone": "vit_tiny_patch16_224", "resize": None, "size": 128}
    again = mw.load(rewritten(tmp_path / "today.safetensors", {"dense.": ""}, old))
    assert again.preprocess == system.preprocess
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in system.state_dict().items())


@pytest.mark.fast
def test_tensors_of_transformers_are_renamed():
    """Each tensor holds its own number, by which it is found again."""
    tensors = {
        "query.weight": (5, 8),
        "class_predictor.weight": (3, 8),
        "attn_mask_probs": (1,),
        "embeddings.position_embeddings.weight": (16, 8),
        "mask_head.fc3.bias": (8,),
        "upscale_block.block.1.layernorm2d.weight": (8,),
        "layers.0.layer_scale2.lambda1": (8,),
        **{
            f"layers.0.attention.{p}_proj.{k}": (8, 8) if k == "weight" else (8,)
            for p in "qkv"
            for k in ("weight", "bias")
        },
        "layers.0.attention.out_proj.weight": (8, 8),
        "layernorm.bias": (8,),
    }
    state = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(tensors.items())}
    origin = next(o for o in ORIGINS if o.name == "transformers")
    ours = origin.translate(state, {"backbone": {"name": "vit_small_patch14_reg4_dinov2"}})
    number = {name: float(i) for i, name in enumerate(tensors)}
    assert ours["dense.backbone.body.pos_embed"].shape == (1, 16, 8)
    assert ours["dense.backbone.body.blocks.0.attn.qkv.weight"][::8, 0].tolist() == [
        number[f"layers.0.attention.{p}_proj.weight"] for p in "qkv"
    ]
    for mine, theirs in (
        ("dense.queries", "query.weight"),
        ("dense.mask_head.4.bias", "mask_head.fc3.bias"),
        ("dense.upscale.1.norm.weight", "upscale_block.block.1.layernorm2d.weight"),
        ("dense.mask_probability", "attn_mask_probs"),
        ("dense.backbone.body.blocks.0.ls2.gamma", "layers.0.layer_scale2.lambda1"),
        ("dense.backbone.body.norm.bias", "layernorm.bias"),
        ("dense.backbone.body.blocks.0.attn.proj.weight", "layers.0.attention.out_proj.weight"),
    ):
        assert float(ours[mine].flatten()[0]) == number[theirs]


def test_folders_of_transformers_with_dinov3_are_loaded(tmp_path):
    """Query, key and value are separate, keys have no bias; config.json holds the size and the epsilon of the norms."""
    backbone = {"name": "vit_small_patch16_dinov3_qkvb", "depth": 2, "norm_eps": 1e-6}
    resize = {"canvas": (64, 64)}
    system = create("eomt", classes=("a", "b", "c"), backbone=backbone, resize=resize, last_blocks=1, queries=5).eval()
    own = system.state_dict()
    state = {}
    for key, value in own.items():
        key = key.removeprefix("dense.").replace("backbone.body.", "").replace("blocks.", "layers.")
        if key.endswith("attn.qkv.weight"):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[key.replace("attn.qkv", f"attention.{part}_proj")] = rows.clone()
            continue
        for ours, theirs in (
            ("attn.proj.", "attention.o_proj."), ("attn.q_bias", "attention.q_proj.bias"),
            ("attn.v_bias", "attention.v_proj.bias"), ("mlp.fc1.", "mlp.up_proj."), ("mlp.fc2.", "mlp.down_proj."),
            ("patch_embed.proj.", "embeddings.patch_embeddings."), ("cls_token", "embeddings.cls_token"),
            ("reg_token", "embeddings.register_tokens"), ("mask_probability", "attn_mask_probs"),
            ("class_head.", "class_predictor."), ("mask_head.0.", "mask_head.fc1."), ("mask_head.2.", "mask_head.fc2."),
            ("mask_head.4.", "mask_head.fc3."),
        ):  # fmt: skip
            key = key.replace(ours, theirs)
        key = re.sub(r"\.gamma_(\d)$", r".layer_scale\1.lambda1", key)
        key = re.sub(r"^queries$", "query.weight", key)
        key = re.sub(r"^norm\.", "layernorm.", key)
        key = re.sub(r"^upscale\.(\d)\.up\.", r"upscale_block.block.\1.conv1.", key)
        key = re.sub(r"^upscale\.(\d)\.depthwise\.", r"upscale_block.block.\1.conv2.", key)
        key = re.sub(r"^upscale\.(\d)\.norm\.", r"upscale_block.block.\1.layernorm2d.", key)
        state[key] = value
    state["criterion.empty_weight"] = torch.ones(4)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"image_size": 64, "layer_norm_eps": 1e-6, "id2label": {"0": "cell", "1": "dust", "2": "hair"}})
    )
    again = mw.load(tmp_path)
    assert again.classes == ("cell", "dust", "hair")
    assert again.source is not None
    assert again.source["origin"] == "transformers-dinov3"
    assert again.preprocess.canvas == (64, 64)
    assert again.dense.backbone.body.norm.eps == 1e-6
    images = random_images()[..., :64, :64]
    with torch.no_grad():
        assert torch.equal(again(images).classes, system(images).classes)
        assert torch.equal(again(images).masks(), system(images).masks())


def test_a_file_that_may_hold_differences_needs_a_variant(tmp_path):
    """Keys and shapes do not tell sums from differences to DINOv3."""
    from maskwright.errors import CheckpointError
    from tests.parity.weights import write_checkpoint

    names = {
        "network.q.weight": [5, 384],
        "network.class_head.weight": [3, 384],
        "network.class_head.bias": [3],
        "network.attn_mask_probs": [1],
        "network.encoder.backbone.patch_embed.patch_embeddings.weight": [384, 3, 16, 16],
        "network.encoder.backbone.blocks.0.norm1.weight": [384],
    }
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps({"tensors": {k: [v, "float32"] for k, v in names.items()}}))
    with pytest.raises(CheckpointError, match="difference to DINOv3"):
        mw.load(write_checkpoint(layout, tmp_path))


def test_duplicates_can_be_removed():
    system = build("eomt").eval()
    with torch.no_grad():
        raw = system(random_images())
    placements = [Placement.identity(SIZE)]
    plain = system.decode(raw, placements)[0]
    assert len(system.decode(raw, placements, nms_threshold=0.5)[0]) <= len(plain)
    assert len(system.decode(raw, placements, best_class=True)[0]) <= 30
