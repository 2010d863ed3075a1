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
from maskwright.structures import Batch, Placement, Preprocess

_SMALL = 384  # pixels; smaller images are enlarged by a whole factor
_GAP, _CAPTION = 4, 16


def show_batch(
    batch: Batch,
    preprocess: Preprocess,
    path: str | Path,
    classes: Sequence[str] | None = None,
    columns: int | None = None,
) -> Path:
    """Draw the images of a batch with their targets into one image file.

    Small images are enlarged, so that labels can be read; below each image is its name.

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
    from PIL import Image, ImageDraw

    path = Path(path)
    scale = max(1, _SMALL // max(batch.images.shape[-2:]))
    height, width = (scale * side for side in batch.images.shape[-2:])
    across = columns or math.ceil(math.sqrt(len(batch)))
    step_x, step_y = width + _GAP, height + _CAPTION
    sheet = Image.new("RGB", (across * step_x - _GAP, math.ceil(len(batch) / across) * step_y), "white")
    for number, values in enumerate(batch.images.cpu()):
        image = denormalized(values, preprocess).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        placement = batch.placements[number]
        tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        if batch.targets is not None:
            target = batch.targets[number].to("cpu")
            size = (scale * placement.size[0], scale * placement.size[1])
            target = target.place(Placement.resize(placement.size, size), None) if scale > 1 else target
            tile.paste(target.draw(image[:, : size[0], : size[1]], classes), (0, 0))
        x, y = number % across * step_x, number // across * step_y
        sheet.paste(tile, (x, y))
        if batch.names is not None:
            what = f"{Path(batch.names[number]).name}, {placement.size[1]} x {placement.size[0]}"
            ImageDraw.Draw(sheet).text((x + 2, y + height + 1), what[: width // 6], fill="black")
    data = io.BytesIO()
    sheet.save(data, Image.registered_extensions().get(path.suffix.lower(), "PNG"))
    return write_bytes(path, data.getvalue(), DataError)


def denormalized(image: Float[Tensor, "c h w"], preprocess: Preprocess) -> UInt8[Tensor, "3 h w"]:
    """Return a normalized image as RGB, 0 ... 255, without further channels."""
    mean, std = (image.new_tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    values = ((image.float() * std + mean) * preprocess.divide)[:3]
    if len(values) < 3:
        values = values[:1].expand(3, -1, -1)
    elif preprocess.channels == "BGR":
        values = values.flip(0)
    return values.round().clamp(0, 255).to(torch.uint8)
