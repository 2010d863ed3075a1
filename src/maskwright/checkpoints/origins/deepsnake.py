"""Deep Snake in the layout of its authors' code: a file {"net", "optim", "scheduler", "recorder", "epoch"}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import COCO, VOC, class_names
from maskwright.checkpoints.origins import Origin, Shapes

# In the order of the categories' ids in the training code.
CITYSCAPES = ("car", "person", "rider", "motorcycle", "bicycle", "truck", "bus", "train")
KINS = ("cyclist", "pedestrian", "car", "tram", "truck", "van", "misc")

# Layers of the trees of DLA, also in other code bases.
TREES = [
    (r"\.tree1(?=\.)", ".first"),
    (r"\.tree2(?=\.)", ".second"),
    (r"\.project\.0\.", ".shortcut.conv."),
    (r"\.project\.1\.", ".shortcut.norm."),
    (r"^((?:dense\.)?backbone\.levels\..*)\.conv(\d)\.", r"\1.conv\2.conv."),
    (r"^((?:dense\.)?backbone\.levels\..*)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"\.root\.bn\.", ".root.norm."),
]
RENAME = [
    (r"^(?:module\.)?(?:net\.)?(?=(?:dla|gcn|cp)\.)", ""),
    (r"^dla\.base\.base_layer\.0\.", "dense.backbone.stem.conv."),
    (r"^dla\.base\.base_layer\.1\.", "dense.backbone.stem.norm."),
    (r"^dla\.base\.level([01])\.(\d+)\.", lambda m: _plain(int(m[1]), int(m[2]))),
    (r"^dla\.base\.level(\d)\.", r"dense.backbone.levels.\1."),
    *TREES,
    (r"^dla\.dla_up\.ida_(\d)\.", r"dense.neck.ladders.\1."),
    (r"^dla\.ida_up\.", "dense.neck.last."),
    (r"\.proj_(\d)\.", lambda m: f".project.{int(m[1]) - 1}."),
    (r"\.up_(\d)\.", lambda m: f".enlarge.{int(m[1]) - 1}."),
    (r"\.node_(\d)\.", lambda m: f".merge.{int(m[1]) - 1}."),
    (r"\.actf\.0\.", ".norm."),
    (r"\.conv\.conv_offset_mask\.", ".offset."),
    (r"^(dense\.neck\..*\.(?:project|merge)\.\d)\.conv\.", r"\1."),
    (r"^dla\.(?:ct_hm|act_hm)\.", "dense.centres."),
    (r"^dla\.a?wh\.", "dense.sizes."),
    (r"^cp\.fusion\.", "components.convs."),
    (r"^cp\.cp_hm\.", "components.centres."),
    (r"^cp\.cp_wh\.", "components.sizes."),
    (r"^gcn\.fuse\.", "contours.fuse."),
    (r"^gcn\.init_gcn\.", "contours.start."),
    (r"^gcn\.evolve_gcn(\d*)\.", lambda m: f"contours.steps.{int(m[1]) + 1 if m[1] else 0}."),
    (r"^(contours\..*)\.head\.", r"\1.first."),
    (r"^(contours\..*)\.res(\d)\.", r"\1.blocks.\2."),
    (r"^(contours\..*)\.conv\.fc\.", r"\1.conv."),
    (r"^(contours\..*)\.fusion\.", r"\1.fuse."),
    (r"^(contours\..*)\.prediction\.", r"\1.predict."),
]
# The classifier of ImageNet; COCO's offsets, which neither decoding nor losses use; and the shortcuts of trees whose
# first half is a tree with a shortcut of its own, which are computed and not used.
IGNORE = [
    r"^(?:module\.)?(?:net\.)?dla\.base\.fc\.",
    r"^(?:module\.)?(?:net\.)?dla\.reg\.",
    r"^(?:module\.)?(?:net\.)?dla\.base\.level[34]\.project\.",
]


def _plain(level: int, index: int) -> str:
    """Convolution, norm and ReLU are consecutive in one list."""
    return f"dense.backbone.levels.{level}.{index // 3}.{'norm' if index % 3 else 'conv'}."


def recognise(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of the constructor, if these are the keys of the authors' code."""
    own = {re.sub(r"^(?:module\.)?(?:net\.)?(?=(?:dla|gcn|cp)\.)", "", k): v for k, v in shapes.items()}
    heat = own.get("dla.act_hm.2.weight", own.get("dla.ct_hm.2.weight"))
    head = own.get("gcn.evolve_gcn.head.conv.fc.weight")
    stem, coarsest = own.get("dla.base.base_layer.0.weight"), own.get("dla.dla_up.ida_0.proj_1.conv.weight")
    if heat is None or head is None or stem is None or coarsest is None:
        return None
    if not all(k.startswith(("dla.", "gcn.", "cp.")) for k in own) or "gcn.init_gcn.head.conv.fc.weight" not in own:
        return None
    components = "cp.cp_hm.0.weight" in own
    count = heat[0]
    contours = {
        "norm": "batch", "width": head[0],
        "iterations": len({m[1] for k in own if (m := re.match(r"gcn\.evolve_gcn(\d*)\.", k))}),
    }  # fmt: skip
    options: dict[str, Any] = {
        "backbone": {"name": "dla34", "width": stem[0], "norm": "batch"}, "in_channels": stem[1], "contours": contours,
        "start": "box", "deformable": "dla.dla_up.ida_0.proj_1.conv.conv_offset_mask.weight" in own,
        "head_width": heat[1], "components": components,
    }  # fmt: skip
    classes = KINS if count == len(KINS) else class_names(count)
    if components:
        options |= {"component_width": own["cp.fusion.0.weight"][0]}
        if count == len(CITYSCAPES):
            classes = CITYSCAPES
            options |= {"whole_classes": ("person", "rider"), "resize": {"canvas": (1216, 2432)}}
    elif "dla.reg.2.weight" in own or count == len(COCO):
        options |= {"resize": {"fit": "pad"}, "start": "centre"}
    elif count != len(VOC):
        options |= {"resize": {"fit": "pad"}}
    return options | {"classes": classes}


ORIGINS = [
    Origin(
        name="snake",
        system="deepsnake",
        rename=RENAME,
        recognise=recognise,
        ignore=IGNORE,
        code_licence="non-commercial research and education only",
    )
]
