"""BlendMask in the layout of AdelaiDet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.fcos import ADELAIDET, ADELAIDET_IGNORE, adelaidet_options, numbered_towers

RENAME = [
    (r"^top_layer\.", "dense.head.top."),
    (r"^basis_module\.refine\.(\d)\.0\.", r"bases.refine.\1.conv."),
    (r"^basis_module\.refine\.(\d)\.1\.", r"bases.refine.\1.norm."),
    # The tower keeps the original's numbers until `finish`: convolutions, upsampling, convolution, output.
    (r"^basis_module\.tower\.", "bases.tower."),
    (r"^basis_module\.seg_head\.6\.", "semantic.2."),
    (
        r"^basis_module\.seg_head\.(\d)\.",
        lambda m: f"semantic.{int(m[1]) // 3}.{'norm' if int(m[1]) % 3 else 'conv'}.",
    ),
    *ADELAIDET,
]


def recognise(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of the constructor, if these are the keys of the original."""
    top, own = (
        shapes.get("top_layer.weight"),
        re.compile(r"^(backbone|proposal_generator|basis_module|top_layer|pixel)"),
    )
    if top is None or "basis_module.refine.0.0.weight" not in shapes or not all(own.match(key) for key in shapes):
        return None
    options = adelaidet_options(shapes)
    last = max(int(m[1]) for k in shapes if (m := re.match(r"^basis_module\.tower\.(\d)\.", k)))
    bases = shapes[f"basis_module.tower.{last}.weight"][0]
    side = math.isqrt(top[0] // bases)
    if options is None or bases * side * side != top[0]:
        return None
    options.pop("rules")
    blend: dict[str, Any] = {
        "bases": bases, "attention": side, "convs": last - 2, "width": shapes["basis_module.refine.0.0.weight"][0],
    }  # fmt: skip
    if "basis_module.seg_head.6.weight" not in shapes:
        blend["semantic_weight"] = 0.0
    return {**options, "blend": blend}


def finish(state: State, options: Mapping[str, Any]) -> State:
    """Resolves numbers of layers that count norms and activations too."""
    convs, result = options["blend"]["convs"], {}
    for key, value in numbered_towers(state, options).items():
        found = re.match(r"^bases\.tower\.(\d)\.(.*)$", key)
        if found:
            number, rest = int(found[1]), found[2]
            rest = re.sub(r"^1\.", "norm.", re.sub(r"^0\.", "conv.", rest))
            part = f"before.{number}" if number < convs else "after" if number == convs + 1 else "bases"
            key = f"bases.{part}.{rest}"
        result[key] = value
    return result


ORIGINS = [
    Origin(
        name="adelaidet",
        system="blendmask",
        rename=RENAME,
        recognise=recognise,
        finish=finish,
        ignore=ADELAIDET_IGNORE,
        code_licence="non-commercial",
        weights_licence="non-commercial",
    )
]
