"""RoIAlign on the CPU, compared with torchvision's kernel: forward, and forward with backward.

    python benchmarks/pooling.py
    python benchmarks/pooling.py --boxes 500 --rounds 5 --json pooling.json

Boxes of many sizes on one map of the size of a pyramid's finest level; the fastest round of each, in one run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import roi_align as theirs

from maskwright.ops.pooling import roi_align as ours

SIDE, STRIDE = 7, 4


def inputs(boxes: int, channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, channels, *size, generator=generator).to(memory_format=torch.channels_last)
    room = torch.tensor([size[1], size[0]]) * float(STRIDE)
    sides = 2 ** (4 + 4 * torch.rand(boxes, 2, generator=generator))  # 16 to 256 pixels
    corner = torch.rand(boxes, 2, generator=generator) * (room - sides).clamp(min=0)
    rois = torch.cat([torch.zeros(boxes, 1), corner, torch.minimum(corner + sides, room)], 1)
    return values, rois


def milliseconds(function: Callable[[], object], rounds: int) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(1e3 * min(times), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, default=1000)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--map", type=int, nargs=2, default=(100, 152), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    chosen = parser.parse_args()
    values, rois = inputs(chosen.boxes, chosen.channels, (chosen.map[0], chosen.map[1]))
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}))
    rows = []
    for samples in (0, 2):
        arguments = {"output_size": SIDE, "spatial_scale": 1 / STRIDE, "sampling_ratio": samples, "aligned": True}
        sides = {
            "torchvision": lambda v, a=arguments: theirs(v, rois, **a),
            "ours": lambda v, s=samples: ours(v, rois, SIDE, 1 / STRIDE, s, True),
        }
        row: dict[str, object] = {"samples": samples or "adaptive"}
        with torch.no_grad():
            row["largest difference"] = float((sides["ours"](values) - sides["torchvision"](values)).abs().max())
            for name, side in sides.items():
                row[f"{name} forward ms"] = milliseconds(lambda s=side: s(values), chosen.rounds)
        for name, side in sides.items():

            def step(side: Callable[[Tensor], Tensor] = side) -> None:
                leaf = values.detach().requires_grad_()
                side(leaf).sum().backward()

            row[f"{name} both ms"] = milliseconds(step, chosen.rounds)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
