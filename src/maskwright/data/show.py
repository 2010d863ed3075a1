"""Drawing a batch as the network receives it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from maskwright.errors import DataError
from maskwright.files import write_bytes
from maskwright.structures import Batch, Preprocess


def show_batch(
    batch: Batch,
    preprocess: Preprocess,
    path: str | Path,
    classes: Sequence[str] | None = None,
    columns: int | None = None,
) -> Path:
    """Draw the images of a batch with their targets into one image file.

    Args:
        batch: The batch.
        preprocess: The preprocessing of the batch, whose normalization is undone; padding has the mean colour.
        path: The file; its suffix selects the format.
        classes: Class names; None: labels are drawn as numbers.
        columns: Images per row; None: about as many as rows.

    Returns:
        The path.

    Raises:
        DataError: If the file cannot be written.
    """
    from PIL import Image

    path = Path(path)
    height, width = batch.images.shape[-2:]
    across = columns or math.ceil(math.sqrt(len(batch)))
    sheet = Image.new("RGB", (across * (width + 4) - 4, math.ceil(len(batch) / across) * (height + 4) - 4), "white")
    for number, values in enumerate(batch.images.cpu()):
        image = denormalized(values, preprocess)
        placement = batch.placements[number]
        tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        if batch.targets is not None:
            valid = image[:, : placement.size[0], : placement.size[1]]
            tile.paste(batch.targets[number].to("cpu").draw(valid, classes), (0, 0))
        sheet.paste(tile, (number % across * (width + 4), number // across * (height + 4)))
    data = io.BytesIO()
    sheet.save(data, Image.registered_extensions().get(path.suffix.lower(), "PNG"))
    return write_bytes(path, data.getvalue(), DataError)


def denormalized(image: Float[Tensor, "c h w"], preprocess: Preprocess) -> UInt8[Tensor, "3 h w"]:
    """Return a normalized image as RGB, 0 ... 255, without further channels."""
    mean, std = (image.new_tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    values = ((image.float() * std + mean) * preprocess.divide)[:3]
    if preprocess.channels == "BGR":
        values = values.flip(0)
    return values.round().clamp(0, 255).to(torch.uint8)
