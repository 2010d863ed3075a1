"""Measures swap_align2nat on a GPU: the PyTorch implementation, the Triton kernel, and a copy as the lower bound.

    python benchmarks/windows.py                   # TensorMask's own sizes, forwards and backwards, in bfloat16
    python benchmarks/windows.py --dtype float32 --height 800 --width 1344 --batch 2

The result has as many values as the input, so that copying it (the last column) is a lower bound. Prints one line of
JSON for each level of the pyramid, with medians in milliseconds, after both implementations have been compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch

from maskwright.ops.window_tensors import MaskTensor, swap_align2nat


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()  # pyright: ignore[reportCallIssue]
        work()
        end.record()  # pyright: ignore[reportCallIssue]
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--height", type=int, default=800, help="of the input, in pixels")
    parser.add_argument("--width", type=int, default=1344)
    parser.add_argument("--side", type=int, default=15, help="cells of a mask, V and U, at the finest level")
    parser.add_argument("--levels", type=int, default=6, help="swapped by 1, 2, 4, ... on a grid of stride 4")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device found; nothing was measured", file=sys.stderr)
        return 2
    kind = getattr(torch, arguments.dtype)
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": arguments.dtype}))
    height, width, side = arguments.height // 4, arguments.width // 4, arguments.side
    for level in range(arguments.levels):
        factor = 2**level
        values = torch.randn(arguments.batch, side, side, height, width, device="cuda", dtype=kind)
        leaf = values.clone().requires_grad_()
        row: dict[str, object] = {"factor": factor, "megabytes": round(values.nbytes / 1e6, 1)}
        answers = [swap_align2nat(MaskTensor(values, True), factor, fused=fused).values for fused in (False, True)]
        row["largest difference"] = float((answers[0].float() - answers[1].float()).abs().max())
        weight, copy = torch.randn_like(answers[0]), torch.empty_like(values)
        del answers
        for name, fused in (("PyTorch", False), ("fused", True)):

            def forward(fused: bool = fused) -> torch.Tensor:
                with torch.no_grad():
                    return swap_align2nat(MaskTensor(values, True), factor, fused=fused).values  # noqa: B023

            def both(fused: bool = fused) -> None:
                leaf.grad = None  # noqa: B023
                swap_align2nat(MaskTensor(leaf, True), factor, fused=fused).values.backward(weight)  # noqa: B023

            row[f"{name}, forward"] = milliseconds(forward, arguments.repeats)
            row[f"{name}, forward and backward"] = milliseconds(both, arguments.repeats)
        row["copy"] = milliseconds(lambda: copy.copy_(values), arguments.repeats)  # noqa: B023
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
