"""What a hundred predicted objects on an image of 4000 x 3000 pixels cost in memory.

Two ways are measured, each in a process of its own so that nothing else is counted: `paste_masks` on the 28 x 28 masks
of a Mask R-CNN, and `Masks.from_crops` for systems that make masks of their own size. The peak is the growth of the
process' largest resident size while the masks are made and drawn; what is held is the size of the finished objects.

Promise: under 300 MB more at the peak, under 10 MB held. Whole planes would be 1200 MB as bool, 4800 MB as float32.
Exits with 1 where the promise is broken.

Run: python benchmarks/memory.py [--objects 100] [--height 3000] [--width 4000]
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

PEAK, HELD = 300.0, 10.0  # MB


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory of many objects on a large image.")
    parser.add_argument("--objects", type=int, default=100)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(measure(chosen.child, chosen.objects, (chosen.height, chosen.width))))
        return 0
    size = chosen.height, chosen.width
    planes = chosen.objects * size[0] * size[1] / 1e6
    print(f"{chosen.objects} objects on {size[1]} x {size[0]}; planes would be {planes:.0f} MB")
    print(f"{'':12}{'peak':>10}{'drawing':>10}{'held':>10}{'masks':>10}{'seconds':>10}")
    kept = True
    for way in WAYS:
        command = [sys.executable, __file__, "--child", way, "--objects", str(chosen.objects)]
        command += ["--height", str(size[0]), "--width", str(size[1])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        r = json.loads(done.stdout)
        columns = "".join(f"{r[name]:>7.2f} MB" for name in ("peak", "drawn", "held", "masks"))
        print(f"{way:12}{columns}{r['seconds']:>10.2f}")
        kept &= r["peak"] < PEAK and r["drawn"] < PEAK and r["held"] < HELD
    print(f"promise (peak under {PEAK:.0f} MB, held under {HELD:.0f} MB): {'kept' if kept else 'BROKEN'}")
    return 0 if kept else 1


def measure(way: str, count: int, size: tuple[int, int]) -> dict[str, float]:
    """All in MB: growth of the peak while masks are made, while they are drawn; what is held; bytes of the masks."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = WAYS[way]
    make(2, (64, 64)).draw(torch.zeros(3, 64, 64, dtype=torch.uint8), ["thing"])  # imports and buffers of the libraries
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image += 1  # pages that are really there
    reset_peak()
    before = resident("VmHWM")
    begun = time.perf_counter()
    objects = make(count, size)
    seconds = time.perf_counter() - begun
    peak = resident("VmHWM") - before
    held = len(pickle.dumps(objects)) / 1e6
    reset_peak()
    before = resident("VmRSS")
    drawn = objects.draw(image, ["thing"])
    more = resident("VmHWM") - before
    assert drawn.size == (size[1], size[0])
    assert objects.masks is not None
    return {"peak": peak, "drawn": more, "held": held, "masks": objects.masks.nbytes / 1e6, "seconds": seconds}


def pasted(count: int, size: tuple[int, int]):
    """What the mask head of a Mask R-CNN gives, on the image."""
    import torch

    from maskwright.ops.paste import paste_masks
    from maskwright.structures import Instances

    boxes, y, x = (
        boxes_on(count, size),
        *torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij"),
    )
    grids = ((1.2 - x**2 - y**2)[None] + 0.2 * torch.rand(count, 28, 28)).clamp(0, 1)
    masks = paste_masks(grids, boxes, size)
    return Instances(size, boxes, torch.zeros(count, dtype=torch.int64), masks, torch.linspace(1, 0.1, count))


def cropped(count: int, size: tuple[int, int]):
    """Masks made box by box, each let go as soon as it is coded."""
    import torch

    from maskwright.structures import Instances, Masks

    boxes = boxes_on(count, size)

    def discs():
        for width, height in (boxes[:, 2:] - boxes[:, :2]).long().tolist():
            y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
            yield Masks.from_crops([x**2 + y**2 < 1], torch.zeros(1, 2, dtype=torch.int64), (height, width))

    corners = boxes[:, :2].long()
    parts = [
        Masks.from_crops(m.crops()[1], m.crops()[0][:, :2] + c, size) for m, c in zip(discs(), corners, strict=True)
    ]
    masks = Masks.join(parts)
    return Instances(size, boxes, torch.zeros(count, dtype=torch.int64), masks, torch.linspace(1, 0.1, count))


def boxes_on(count: int, size: tuple[int, int]):
    """Boxes from a twentieth of the image up to the whole of it; the first one is the whole image."""
    import torch

    height, width = size
    share = torch.cat([torch.ones(1), torch.rand(count - 1) * 0.4 + 0.05])
    x0, y0 = torch.rand(count) * (1 - share) * width, torch.rand(count) * (1 - share) * height
    return torch.stack([x0, y0, x0 + share * width, y0 + share * height], 1)


WAYS = {"paste_masks": pasted, "from_crops": cropped}


def resident(name: str) -> float:
    """This process' resident size now (VmRSS) or at its largest (VmHWM), MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1e3
    raise OSError(f"{name} is not told by this system; run this benchmark on Linux")


def reset_peak() -> None:
    """From here on the peak counts anew, where the kernel allows that; without, an earlier higher peak hides growth."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("note: the peak cannot be reset here; growth below an earlier peak is not seen", file=sys.stderr)


if __name__ == "__main__":
    if not Path("/proc/self/status").exists():
        sys.exit(f"benchmarks/memory.py reads /proc, which {os.uname().sysname} does not have; run it on Linux")
    sys.exit(main())
