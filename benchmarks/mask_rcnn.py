"""Mask R-CNN with a pyramid, of this library and of torchvision, in one run with the same weights and images.

    python benchmarks/mask_rcnn.py                      # R50: latency and a training step
    python benchmarks/mask_rcnn.py --short 400 --rounds 2 --skip-training
    python benchmarks/mask_rcnn.py --backbone resnet101 --short 800 --batch 1 --skip-training

Weights are random, so every image is decoded to the full 100 objects (score threshold 0), the most expensive case. The
time is from an 8-bit image to masks on the image's grid, preprocessing included; torchvision's is that of
`model(images)`, which returns float planes, where ours returns run-length codes. Rounds alternate between the two; the
fastest round of each is shown, and the differences of the detected boxes and masks. On two idle cores the whole takes
about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import maskwright as mw
from maskwright.data import Scenes
from maskwright.inference import prepare
from maskwright.structures import Batch, Instances


def theirs(short: int, backbone: str) -> Any:
    """torchvision's network in the configuration of its COCO weights: frozen norms, all classes."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d

    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    for name, scale in body.named_buffers():
        if name.endswith("bn3.weight"):
            scale.fill_(0.5)  # otherwise activations of random weights overflow with depth
    return MaskRCNN(body, 91, min_size=short, max_size=short * 5 // 3, box_score_thresh=0.0).eval()


def ours(network: Any, short: int) -> mw.System:
    """The same weights through the public checkpoint path."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder) / "theirs.pth")
        return mw.load(
            Path(folder) / "theirs.pth", backbone={"norm_eps": 1e-5}, resize={"short": short, "long": short * 5 // 3}
        )


def images(count: int, size: tuple[int, int] = (600, 800)) -> list[torch.Tensor]:
    return [Scenes(count, size=size, seed=5)[i].image for i in range(count)]


def fastest(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest round of each, rounds alternating, after one warm-up round."""
    best = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def find(system: mw.System, shots: list[torch.Tensor], dtype: torch.dtype, device: str) -> list[Instances]:
    batch = system.preprocess.collate(shots)
    images = batch.images.to(device, dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        return system.decode(system(images), batch.placements, score_threshold=0.0)


def latency(short: int, count: int, rounds: int, device: str, backbone: str) -> dict[str, Any]:
    network = theirs(short, backbone).to(device)
    single = ours(network, short)
    halved = prepare(single, device, "bfloat16")
    folded = prepare(single, device, "float32")
    shots = images(count)
    floats = [(s.float() / 255).to(device) for s in shots]

    def run_theirs(half: bool) -> Any:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            return network(floats)

    times = fastest(
        {
            "torchvision float32": lambda: run_theirs(False),
            "ours float32": lambda: find(folded, shots, torch.float32, device),
            "torchvision bf16 autocast": lambda: run_theirs(True),
            "ours bf16": lambda: find(halved, shots, torch.bfloat16, device),
        },
        rounds,
    )
    peer = min(times["torchvision float32"], times["torchvision bf16 autocast"])
    return {
        "short": short,
        "batch": count,
        **{k: round(v, 3) for k, v in times.items()},
        "float32 ratio": round(times["ours float32"] / times["torchvision float32"], 3),
        "bf16 ratio": round(times["ours bf16"] / peer, 3),
        "agreement": agreement(run_theirs(False), find(folded, shots, torch.float32, device)),
    }


def agreement(them: list[dict[str, torch.Tensor]], us: list[Instances]) -> str:
    """Largest difference of matched boxes, and the share of mask pixels that differ."""
    far, wrong, total, missing = 0.0, 0, 0, 0
    for a, b in zip(them, us, strict=True):
        distance = torch.cdist(a["boxes"].cpu(), b.boxes.cpu(), p=float("inf")) + 1e3 * (
            a["labels"].cpu()[:, None] != b.labels.cpu() + 1
        )
        near, partner = distance.min(1)
        good = near < 0.5
        missing += int((~good).sum())
        far = max(far, float(near[good].max()) if good.any() else 0.0)
        planes = (a["masks"][:, 0].cpu() >= 0.5)[good]
        own = b.masks[partner[good]].dense() if b.masks is not None else planes
        wrong += int((planes != own).sum())
        total += planes.numel()
    return f"{missing} unmatched, boxes within {far:.3f} px, {wrong / max(1, total):.1e} of mask pixels differ"


def share_in_convolutions(short: int, device: str, backbone: str) -> dict[str, float]:
    """Shares of operators in our float32 time."""
    system = prepare(ours(theirs(short, backbone), short), device, "float32")
    shots = images(1)
    find(system, shots, torch.float32, device)
    with torch.profiler.profile() as profile:
        find(system, shots, torch.float32, device)
    rows = {e.key: e.self_cpu_time_total for e in profile.key_averages()}
    total = sum(rows.values())
    convolutions = sum(v for k, v in rows.items() if "conv" in k)
    products = sum(v for k, v in rows.items() if k in ("aten::addmm", "aten::mm", "aten::bmm"))
    others = sorted(((v, k) for k, v in rows.items() if "conv" not in k), reverse=True)[:6]
    return {
        "convolutions": round(convolutions / total, 3),
        "matrix products": round(products / total, 3),
        **{k: round(v / total, 3) for v, k in others},
    }


def training_step(
    side: str, short: int, count: int, rounds: int, device: str, half: bool, backbone: str, pipe: Any
) -> None:
    """Sends the seconds of the fastest step and the peak memory above the start in MiB; runs in its own process."""
    network = theirs(short, backbone).to(device)
    system = ours(network, short).to(device).train()
    scenes = Scenes(count, size=(600, 800), seed=7)
    samples = [scenes[i] for i in range(count)]
    if side == "torchvision":
        network.train()
        floats = [(s.image.float() / 255).to(device) for s in samples]
        goals = [
            {"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks.dense(torch.device(device)).byte()}
            for t in (s.target.to(device) for s in samples)
            if t.masks is not None
        ]
        parameters = [p for p in network.parameters() if p.requires_grad]

        def losses() -> torch.Tensor:
            return sum(network(floats, goals).values(), torch.zeros((), device=device))
    else:
        system = system.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        laid = [system.preprocess.apply(s.image) for s in samples]
        targets = [s.target.place(p) for s, (_, p) in zip(samples, laid, strict=True)]
        batch = Batch.collate([v for v, _ in laid], [p for _, p in laid], targets).to(device)
        parameters = [p for p in system.parameters() if p.requires_grad]

        def losses() -> torch.Tensor:
            images = batch.images.to(memory_format=torch.channels_last)
            return sum(system.losses(system(images), batch.targets).values(), torch.zeros((), device=device))

    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)
    start = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else held()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            total = losses()
        total.backward()
        optimizer.step()

    seconds = fastest({"step": step}, rounds)["step"]
    highest = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    pipe.send((seconds, (highest or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024) - start))


def held() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def training(short: int, count: int, rounds: int, device: str, half: bool, backbone: str) -> dict[str, Any]:
    result: dict[str, Any] = {"short": short, "batch": count, "precision": "bf16 autocast" if half else "float32"}
    context = multiprocessing.get_context("spawn")
    for side in ("torchvision", "ours"):
        here, there = context.Pipe()
        process = context.Process(
            target=training_step, args=(side, short, count, rounds, device, half, backbone, there)
        )
        process.start()
        seconds, memory = here.recv()
        process.join()
        result |= {f"{side} seconds": round(seconds, 3), f"{side} MiB": round(memory)}
    result["ratio"] = round(result["ours seconds"] / result["torchvision seconds"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, nargs="*", default=[400, 800], help="short sides")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4], help="images at once")
    parser.add_argument("--backbone", default="resnet50", help="name in torchvision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.processor() or platform.machine(),
        "latency": [],
    }
    print(json.dumps({k: v for k, v in figures.items() if k != "latency"}))
    for short in arguments.short:
        for count in arguments.batch:
            row = latency(short, count, arguments.rounds, arguments.device, arguments.backbone)
            figures["latency"].append(row)
            print(json.dumps(row), flush=True)
        figures[f"shares at {short}"] = share_in_convolutions(short, arguments.device, arguments.backbone)
        print(f"shares at {short}:", json.dumps(figures[f"shares at {short}"]), flush=True)
    if not arguments.skip_training:
        cases = [(max(arguments.short), half) for half in (False, True)]
        cases = cases if arguments.device == "cuda" else [(min(arguments.short), False)]
        figures["training"] = [
            training(s, 2, arguments.rounds, arguments.device, half, arguments.backbone) for s, half in cases
        ]
        for row in figures["training"]:
            print("training step:", json.dumps(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
