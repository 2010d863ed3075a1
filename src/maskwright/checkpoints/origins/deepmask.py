"""DeepMask in the layouts of the released Torch 7 code and of its PyTorch port.

A Torch 7 file is a tree of containers; its tensors are named here by the field of the model, the 1-based positions in
the containers, and the tensor: "trunk.5.1.1.1.4.2.weight".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from maskwright.checkpoints.origins import Origin, Shapes, State

DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6): 50, (3, 4, 23): 101, (3, 8, 36): 152}
STRIDE = 16  # of the backbone in all known files, which is the first three stages of a ResNet

# The first entry of a block is (main branch, shortcut); in the main branch 1, 4, 7 are convolutions (4 with its padding
# before it) and 2, 5, 8 the norms after them.
TORCH7 = [
    (r"^trunk\.1\.2\.", "dense.window.backbone.stem.conv."),
    (r"^trunk\.2\.", "dense.window.backbone.stem.norm."),
    (r"^trunk\.([567])\.(\d+)\.", lambda m: f"dense.window.backbone.stages.{int(m[1]) - 5}.{int(m[2]) - 1}."),
    (r"(\.stages\.\d\.\d+)\.1\.1\.1\.", r"\1.conv1.conv."),
    (r"(\.stages\.\d\.\d+)\.1\.1\.2\.", r"\1.conv1.norm."),
    (r"(\.stages\.\d\.\d+)\.1\.1\.4\.2\.", r"\1.conv2.conv."),
    (r"(\.stages\.\d\.\d+)\.1\.1\.5\.", r"\1.conv2.norm."),
    (r"(\.stages\.\d\.\d+)\.1\.1\.7\.", r"\1.conv3.conv."),
    (r"(\.stages\.\d\.\d+)\.1\.1\.8\.", r"\1.conv3.norm."),
    (r"(\.stages\.\d\.\d+)\.1\.2\.1\.", r"\1.shortcut.conv."),
    (r"(\.stages\.\d\.\d+)\.1\.2\.2\.", r"\1.shortcut.norm."),
    (r"^trunk\.9\.", "dense.window.squeeze."),
    (r"^trunk\.12\.", "dense.window.feature."),
    (r"^maskBranch\.1\.1\.", "masks."),
    (r"^scoreBranch\.2\.", "dense.window.score_hidden."),
    (r"^scoreBranch\.5\.", "dense.window.score."),
]
PORT = [
    (r"^trunk\.0\.0\.1\.", "dense.window.backbone.stem.conv."),
    (r"^trunk\.0\.1\.", "dense.window.backbone.stem.norm."),
    (r"^trunk\.0\.([456])\.", lambda m: f"dense.window.backbone.stages.{int(m[1]) - 4}."),
    (r"\.conv2\.1\.", ".conv2."),
    (r"(\.stages\.\d\.\d+)\.conv(\d)\.", r"\1.conv\2.conv."),
    (r"(\.stages\.\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"(\.stages\.\d\.\d+)\.downsample\.0\.", r"\1.shortcut.conv."),
    (r"(\.stages\.\d\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
    (r"^trunk\.1\.0\.", "dense.window.squeeze."),
    (r"^trunk\.1\.2\.", "dense.window.feature."),
    (r"^maskBranch\.0\.0\.", "masks."),
    (r"^scoreBranch\.1\.", "dense.window.score_hidden."),
    (r"^scoreBranch\.4\.", "dense.window.score."),
]


def _torch7(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    return _options(
        shapes, r"trunk\.([567])\.(\d+)\.1\.1\.7\.weight", ("trunk.1.2", "trunk.9", "trunk.12"),
        ("maskBranch.1.1", "scoreBranch.2", "scoreBranch.5"),
        {"norm": "frozen", "norm_eps": 0.0}, "symmetric",
    )  # fmt: skip


def _port(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    return _options(
        shapes, r"trunk\.0\.([456])\.(\d+)\.conv3\.weight", ("trunk.0.0.1", "trunk.1.0", "trunk.1.2"),
        ("maskBranch.0.0", "scoreBranch.1", "scoreBranch.4"), {"norm": "batch"}, "reflect",
    )  # fmt: skip


def _options(
    shapes: Shapes, block: str, trunk: tuple[str, str, str], heads: tuple[str, str, str], norm: Mapping[str, Any],
    border: str,
) -> dict[str, Any] | None:  # fmt: skip
    """The options, from names: a block's last convolution, stem and neck, mask and score layers."""
    if any(f"{name}.weight" not in shapes for name in trunk + heads):
        return None
    stem, squeeze, feature = (shapes[f"{name}.weight"] for name in trunk)
    masks, hidden, _ = (shapes[f"{name}.weight"] for name in heads)
    found = [m for k in shapes if (m := re.fullmatch(block, k))]
    stages = sorted({m[1] for m in found})
    depth = DEPTHS.get(tuple(sum(m[1] == s for m in found) for s in stages))
    # The inputs of a linear layer are channels times locations; a convolution has separate axes.
    locations = feature[1] / squeeze[0] if len(feature) == 2 else feature[2] * feature[3]
    cells, side = round(locations**0.5), round(masks[0] ** 0.5)
    if depth is None or cells**2 != locations or side**2 != masks[0] or cells % 2:
        return None
    return {
        "classes": ("object",), "backbone": {"name": f"resnet{depth}", "width": stem[0], **norm}, "border": border,
        "in_channels": stem[1], "window": cells * STRIDE, "neck_width": squeeze[0], "feature_width": feature[0],
        "mask_side": side, "label_side": 2 * side, "score_width": hidden[0],
    }  # fmt: skip


def _from_torch7(state: State, options: Mapping[str, Any]) -> State:
    """Converts norms, which are a scale and a shift of shape (C) or (1, C, 1, 1), to frozen batch norms, and linear
    layers to convolutions. The bias of a convolution before a norm, if there is one, is added to the shift."""
    result = {}
    for key, value in state.items():
        if key.endswith(".norm.a"):
            own, conv = key[: -len(".norm.a")], key[: -len("norm.a")] + "conv.bias"
            scale = value.flatten()
            shift = state[f"{own}.norm.b"].flatten()
            result[f"{own}.norm.weight"] = scale
            result[f"{own}.norm.bias"] = shift + scale * state[conv].flatten() if conv in state else shift
            result[f"{own}.norm.running_mean"] = torch.zeros_like(scale)
            result[f"{own}.norm.running_var"] = torch.ones_like(scale)
        elif not key.endswith(".norm.b") and not re.search(r"\.backbone\..*conv\.bias$", key):
            result[key] = value
    return _convolutions(result, options)


def _convolutions(state: State, options: Mapping[str, Any]) -> State:
    """Gives the weights of linear layers the shape of convolutions."""
    result = dict(state)
    for name in ("dense.window.feature", "masks", "dense.window.score_hidden", "dense.window.score"):
        weight = result[f"{name}.weight"]
        if weight.ndim == 2:
            cells = options["window"] // STRIDE if name.endswith(".feature") else 1
            result[f"{name}.weight"] = weight.reshape(len(weight), -1, cells, cells)
    return result


ORIGINS = [
    Origin(
        name="deepmask",
        system="deepmask",
        rename=TORCH7,
        recognise=_torch7,
        finish=_from_torch7,
        ignore=(r"^(?!(trunk|maskBranch|scoreBranch)\.)",),
        code_licence="BSD-3-Clause with a patent grant",
    ),
    Origin(
        name="deepmask-pytorch",
        system="deepmask",
        rename=PORT,
        recognise=_port,
        finish=_convolutions,
        code_licence="none stated",
    ),
]
