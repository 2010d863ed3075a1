"""Export to ONNX and OpenVINO, checked on an image before the file appears."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from maskwright.errors import UsageError
from maskwright.inference.exporting.checking import Difference
from maskwright.inference.exporting.stages import reported
from maskwright.inference.exporting.writing import Exported
from maskwright.inference.exporting.writing import export as export_networks
from maskwright.systems import System

__all__ = ["Difference", "Exported", "export", "export_graph", "export_int8", "export_networks", "reported"]


def export(
    system: System | str | Path,
    out: str | Path,
    *,
    form: Literal["networks", "graph"] = "networks",
    image: str | Path | None = None,
    **options: Any,
) -> Exported:
    """Exports a system to ONNX (.onnx) or OpenVINO (.xml with .bin), and compares it with PyTorch on an image.

    Args:
        system: The system, or a checkpoint as for `load`.
        out: The new file.
        form: "networks": a file that `load` reads, see `exporting.writing.export`. "graph": one graph from an image to
            boxes, scores, labels and masks, for other programs, see `exporting.graphs.export_graph`.
        image: Image of the check; None: a generated scene.
        **options: Of the form.

    Returns:
        The file, and what differs from PyTorch on the image.

    Raises:
        UsageError: If an argument is invalid, or the system cannot be exported in this form.
        MissingExtraError: If onnx, onnxruntime or openvino is not installed.
        CheckpointError: If the exported system differs by more than rounding; there is no file then.
    """
    if form not in ("networks", "graph"):
        raise UsageError(f"form must be 'networks' or 'graph', got {form!r}")
    function: Any = export_graph if form == "graph" else export_networks
    try:
        return function(system, out, image=image, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UsageError(f"form={form!r} has no option {str(error).split('argument ')[-1]}") from None


def export_graph(system: System | str | Path, out: str | Path, **options: Any) -> Exported:
    """See `exporting.graphs.export_graph`."""
    from maskwright.inference.exporting.graphs import export_graph as run

    return run(system, out, **options)


def export_int8(system: System | str | Path, out: str | Path, data: Any, **options: Any) -> Any:
    """See `exporting.quantising.export_int8`."""
    from maskwright.inference.exporting.quantising import export_int8 as run

    return run(system, out, data, **options)
