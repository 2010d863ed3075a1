"""Mask2Former compared with that of transformers: inference of the network, and deformable attention with and without
gradients.

    PYTHONPATH=folder-with-transformers python benchmarks/queries.py --height 320 --width 480

transformers is not a dependency: install it elsewhere (`pip install --no-deps --target FOLDER transformers tokenizers
huggingface_hub ...`). Both have the same random weights and the same input; the relative difference of their outputs is
printed too. Times are the best of `--runs`, measured alternately: CPU seconds on the CPU, wall-clock seconds elsewhere.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from maskwright.blocks.deformable_attention import cell_centres, deformable_sample
from maskwright.checkpoints.origins import origins
from maskwright.systems import create


def best_of(runs: int, device: str, *functions: Callable[[], Any]) -> list[float]:
    """Seconds of each function, the best of several runs; the functions take turns."""
    best, clock = [float("inf")] * len(functions), time.process_time if device == "cpu" else time.perf_counter
    for _ in range(runs + 1):  # the first run is a warm-up
        for index, function in enumerate(functions):
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            best[index] = min(best[index], clock() - start)
    return best


def network(height: int, width: int, runs: int, device: str) -> dict[str, Any]:
    """Mask2Former with Swin-T, in inference."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=80, use_auxiliary_loss=True)
    theirs = Mask2FormerForUniversalSegmentation(config).eval().to(device)
    state = theirs.state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    origin, candidate = next((o, o.candidates(shapes, {})[0]) for o in origins() if o.candidates(shapes, {}))
    ours = create(origin.system, **candidate.options).eval().to(device)
    ours.load_state_dict(origin.translate(dict(state), candidate.options))
    images = torch.randn(1, 3, height, width, device=device)
    with torch.no_grad():
        mine, other = ours(images), theirs(images)
        apart = (mine.classes[-1] - other.class_queries_logits).norm() / other.class_queries_logits.norm()

        def with_masks() -> None:
            ours(images).masks()

        seconds = best_of(runs, device, with_masks, lambda: theirs(images))
    return {
        "what": "Swin-T, inference", "input": [height, width], "ours s": round(seconds[0], 4),
        "transformers s": round(seconds[1], 4), "times as fast": round(seconds[1] / seconds[0], 2),
        "apart": f"{float(apart):.1e}",
    }  # fmt: skip


def attention(height: int, width: int, runs: int, device: str, gradient: bool) -> dict[str, Any]:
    """Deformable attention alone, of three levels."""
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    shapes = [(-(-height // s), -(-width // s)) for s in (32, 16, 8)]
    tokens, heads, points = sum(h * w for h, w in shapes), 8, 4
    values = torch.randn(1, tokens, heads, 32, device=device, requires_grad=gradient)
    offsets = torch.randn(1, tokens, heads, len(shapes), points, 2, device=device) * 3  # in cells
    size = torch.tensor([[w, h] for h, w in shapes], device=device)[:, None]
    locations = (cell_centres(shapes, device)[None, :, None, None, None] + offsets / size).requires_grad_(gradient)
    weights = torch.rand(1, tokens, heads, len(shapes), points, device=device).flatten(3).softmax(-1)
    weights = weights.view(1, tokens, heads, len(shapes), points).requires_grad_(gradient)
    theirs_shapes = torch.tensor(shapes, device=device) if device == "cuda" else shapes

    def ours() -> torch.Tensor:
        return deformable_sample(values, shapes, locations, weights)

    def theirs() -> torch.Tensor:
        return multi_scale_deformable_attention(values, theirs_shapes, locations, weights)

    apart = (ours() - theirs()).detach().norm() / theirs().detach().norm()
    functions = [(lambda f=f: f().sum().backward() if gradient else f()) for f in (ours, theirs)]
    seconds = best_of(runs, device, *functions)
    return {
        "what": "deformable attention, " + ("with gradients" if gradient else "forward"), "tokens": tokens,
        "ours s": round(seconds[0], 4), "transformers s": round(seconds[1], 4),
        "times as fast": round(seconds[1] / seconds[0], 2), "apart": f"{float(apart):.1e}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    size = (arguments.height, arguments.width, arguments.runs, arguments.device)
    for row in (attention(*size, False), attention(*size, True), network(*size)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
