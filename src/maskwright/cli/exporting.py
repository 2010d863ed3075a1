"""The command that exports systems for other runtimes: `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from maskwright.terminal import print_line


def export(
    weights: Annotated[str, arg(metavar="WEIGHTS")],
    /,
    *,
    out: Annotated[Path, arg(aliases=("-o",), metavar="FILE")],
    image: Annotated[Path | None, arg(metavar="IMAGE")] = None,
    variant: Annotated[str | None, arg(metavar="NAME")] = None,
    commercial_ok: bool = False,
) -> int:
    """Export a system to ONNX (.onnx) or OpenVINO (.xml and .bin), checked against PyTorch on an image.

    The file is a checkpoint for `predict` and `evaluate`, whose networks ONNX Runtime or OpenVINO computes: all options
    of decoding, tiles and data sets work as with the original. If its objects differ from PyTorch's by more than
    rounding, no file is written, and the exit code is 2.

    Examples:
      maskwright export runs/first/best.safetensors -o model.onnx
      maskwright export runs/first/best.safetensors -o model.xml --image street.jpg
      maskwright predict photo.jpg -w model.onnx

    Args:
        weights: A checkpoint of maskwright, an official file, or a name of the catalogue (`maskwright checkpoints`).
        out: The new file; its suffix decides the runtime.
        image: Image that the file is checked on; default: a generated scene.
        variant: The published variant, if an official file's keys fit more than one.
        commercial_ok: Use only catalogue weights whose licence allows commercial use.
    """
    from maskwright.checkpoints import load
    from maskwright.inference import export as run

    system = load(weights, commercial_ok=commercial_ok, variant=variant)
    print_line(str(run(system, out, image=image)))
    return 0
