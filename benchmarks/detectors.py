"""Faster R-CNN, RetinaNet and FCOS, of this library and of torchvision, with the same random weights and images.

    python benchmarks/detectors.py                              # R50, short side 800
    python benchmarks/detectors.py retinanet --short 400 --rounds 3
    python benchmarks/detectors.py --backbone resnet18 --short 160 --size 120x160 --rounds 1   # to see that it works

The time is from an 8-bit image to boxes on the image's grid, preprocessing included; torchvision's is that of
`model(images)`. The score threshold is torchvision's default for faster-rcnn, with which its 100 detections are full,
and for the others the one given by `--score`. Rounds alternate between the two; the fastest round of each is shown, and
how the detected boxes differ. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mask_rcnn import fastest, images

import maskwright as mw
from maskwright.inference import prepare
from maskwright.structures import Instances

NAMES = ("faster-rcnn", "retinanet", "fcos")


def theirs(name: str, short: int, backbone: str, score: float) -> Any:
    """torchvision's network in the configuration of its COCO weights: frozen norms, all classes."""
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import feature_pyramid_network as pyramid
    from torchvision.ops.misc import FrozenBatchNorm2d

    torch.manual_seed(0)
    dense: dict[str, Any] = {}
    if name != "faster-rcnn":
        channels = 256 if name == "fcos" else 2048 if int(backbone.removeprefix("resnet")) >= 50 else 512
        dense = {"returned_layers": [2, 3, 4], "extra_blocks": pyramid.LastLevelP6P7(channels, 256)}
    body = resnet_fpn_backbone(
        backbone_name=backbone, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3, **dense
    )
    for key, scale in body.named_buffers():
        if key.endswith(("bn3.weight", "bn2.weight")[int(backbone in ("resnet18", "resnet34"))]):
            scale.fill_(0.5)  # otherwise activations of random weights overflow with depth
    size = {"min_size": short, "max_size": short * 5 // 3}
    if name == "faster-rcnn":
        return detection.FasterRCNN(body, 91, box_score_thresh=score, **size).eval()
    if name == "fcos":
        network = detection.FCOS(body, 91, score_thresh=score, detections_per_img=100, **size)
    else:
        module = importlib.import_module("torchvision.models.detection.retinanet")
        anchors = module._default_anchorgen()
        network = detection.RetinaNet(
            body, 91, score_thresh=score, detections_per_img=100, anchor_generator=anchors, **size
        )
    # Otherwise no score of random weights is above the threshold, and boxes of FCOS are empty.
    logits = network.head.classification_head.cls_logits
    torch.nn.init.normal_(logits.weight, std=0.3)
    torch.nn.init.constant_(logits.bias, -2.0)
    if name == "fcos":
        torch.nn.init.constant_(network.head.regression_head.bbox_reg.bias, 2.0)
    return network.eval()


def ours(network: Any, short: int) -> mw.System:
    """The same weights through the public checkpoint path."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder) / "theirs.pth")
        resize = {"short": short, "long": short * 5 // 3}
        return mw.load(Path(folder) / "theirs.pth", backbone={"norm_eps": 1e-5}, resize=resize)


def find(system: mw.System, shots: Sequence[torch.Tensor], score: float, device: str) -> list[Instances]:
    batch = system.preprocess.collate(shots)
    inputs = batch.images.to(device, memory_format=torch.channels_last)
    with torch.inference_mode():
        return system.decode(system(inputs), batch.placements, score_threshold=score, detections=100)


def agreement(them: list[dict[str, torch.Tensor]], us: list[Instances]) -> str:
    """Numbers of boxes, and how many of theirs have none of ours within half a pixel."""
    total, missing = 0, 0
    for a, b in zip(them, us, strict=True):
        distance = torch.cdist(a["boxes"].cpu(), b.boxes.cpu(), p=float("inf"))
        total += len(distance)
        missing += int((distance.amin(1) > 0.5).sum()) if distance.shape[1] else len(distance)
    return f"{total} boxes, ours {sum(map(len, us))}; {missing} of them unmatched"


def row(name: str, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    score = 0.0 if name == "faster-rcnn" else arguments.score
    network = theirs(name, arguments.short, arguments.backbone, score).to(device)
    system = prepare(ours(network, arguments.short), device, "float32")
    height, width = (int(n) for n in arguments.size.split("x"))
    shots = images(arguments.batch, (height, width))
    floats = [(s.float() / 255).to(device) for s in shots]

    def run_theirs() -> Any:
        with torch.inference_mode():
            return network(floats)

    runs = {"torchvision": run_theirs, "ours": lambda: find(system, shots, score, device)}
    times = fastest(runs, arguments.rounds)
    return {
        "system": name,
        "short": arguments.short,
        "batch": arguments.batch,
        **{f"{k} float32": round(v, 3) for k, v in times.items()},
        "ratio": round(times["ours"] / times["torchvision"], 3),
        "agreement": agreement(run_theirs(), runs["ours"]()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--short", type=int, default=800)
    parser.add_argument("--size", default="600x800", help="height and width of the images")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--score", type=float, default=0.05, help="score threshold of retinanet and fcos")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.systems if name not in NAMES]
    if unknown:
        parser.error(f"unknown system {unknown[0]!r}; choose from {', '.join(NAMES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in arguments.systems or NAMES:
        print(json.dumps(row(name, arguments, device)), flush=True)


if __name__ == "__main__":
    main()
