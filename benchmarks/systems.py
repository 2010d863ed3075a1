"""Every system's latency and memory at its paper's input size, beside Mask R-CNN's, in one run.

    python benchmarks/systems.py                               # the presets of PAPERS
    python benchmarks/systems.py yolact-r101 mask-rcnn-r101-fpn --dtype bfloat16

Weights are random: with frozen norms activations may grow until nothing is found, and decoding is then free. Look at
`objects` before comparing times with decoding. For each system the score threshold is chosen so that about 100 objects
come out of the first picture, if it gives so many. Timed is what follows the resizing of a picture: the network, and
decoding up to compact masks on the picture's own grid of 600 x 800. Each system runs in a process of its own; the
fastest of several rounds is shown, and the peak of memory above that of the process with the weights loaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch

from maskwright.data import Scenes
from maskwright.inference import prepare
from maskwright.inference.preparing import PRECISIONS, run_network
from maskwright.systems import create, presets

# preset: what its authors say, frames per second on which card
PAPERS = {
    "mask-rcnn-r50-fpn": "",
    "mask-rcnn-r101-fpn": "8.6 (Titan Xp, YOLACT's table)",
    "tensormask-r50": "2.6 with R101 (V100, third-party note)",
    "yolact-r101": "33.5 (Titan Xp)",
    "yolact-r50": "42.5 (Titan Xp)",
    "yolact-darknet53": "40.0 (Titan Xp)",
    "yolact-plus-r50": "33.5 (Titan Xp)",
    "yolact-plus-r101": "27.3 (Titan Xp)",
    "solo-r50": "12.1 (V100; 77 ms in its repository)",
    "decoupled-solo-r50": "85 ms in its repository",
    "solov2-r50": "54 ms in its repository",
    "solov2-light-448-r50": "24 ms in its repository",
    "embedmask-r50": "",
    "polarmask-r50": "17.2 (V100, paper); 23.9 in its repository",
    "ese-seg-darknet53": "38.5 (26 ms)",
    "fouriernet-r50": "",
    "deepsnake-sbd": "32.3 (1080 Ti)",
}


def measure(preset: str, dtype: str, device: str, rounds: int, compile: bool, pipe: Any) -> None:
    torch.manual_seed(0)
    system = prepare(create(preset, classes=tuple(f"class {i}" for i in range(80))), device, dtype, compile)
    place, kind = torch.device(device), PRECISIONS[dtype]
    batch = system.preprocess.collate([Scenes(1, size=(600, 800), seed=5)[0].picture])
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with torch.no_grad():
        threshold, count = reach_hundred(system, run_network(system, batch, place, kind), batch.placements)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for number in range(rounds + 1):
            begun = time.perf_counter()
            raw = run_network(system, batch, place, kind)
            if device == "cuda":
                torch.cuda.synchronize()
            between = time.perf_counter()
            system.decode(raw, batch.placements, score_threshold=threshold, detections=100)
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times.append((time.perf_counter() - begun, between - begun))
    total, network = min(times)
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - start
    )
    pipe.send(
        {
            "preset": preset,
            "input": "x".join(map(str, batch.images.shape[-2:])),
            "ms": round(1e3 * total, 1),
            "network ms": round(1e3 * network, 1),
            "frames per second": round(1 / total, 1),
            "peak MiB": round(peak),
            "objects": count,
            "parameters / 1e6": round(sum(p.numel() for p in system.parameters()) / 1e6, 1),
        }
    )


def reach_hundred(system: Any, raw: Any, placements: Any) -> tuple[float, int]:
    """A score threshold at which about 100 objects are found, and how many they are."""
    low, high, best = 0.0, 1.0, (1.0, 0)
    for _ in range(12):
        middle = (low + high) / 2
        count = len(system.decode(raw, placements, score_threshold=middle, detections=100)[0])
        if count >= 100:
            low, best = middle, (middle, count)
        else:
            high = middle
            best = max(best, (middle, count), key=lambda found: found[1])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help=f"default: {', '.join(PAPERS)}")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    known, rows = presets(), []
    context = multiprocessing.get_context("spawn")
    for preset in arguments.presets or [p for p in PAPERS if p in known]:
        here, there = context.Pipe()
        options = (preset, arguments.dtype, arguments.device, arguments.rounds, arguments.compile, there)
        process = context.Process(target=measure, args=options)
        process.start()
        there.close()
        try:
            row = here.recv()
        except EOFError:
            row = {"preset": preset, "failed": True}
        process.join()
        row["its authors"] = PAPERS.get(preset, "")
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
