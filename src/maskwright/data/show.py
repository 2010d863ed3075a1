"""What the network is fed, to be looked at."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from maskwright.errors import DataError
from maskwright.structures import Batch, Preprocess


def show_batch(
    batch: Batch,
    preprocess: Preprocess,
    path: str | Path,
    classes: Sequence[str] | None = None,
    columns: int | None = None,
) -> Path:
    """Draws the images of a batch with their targets, as the network gets them, into one image file.

    Normalising is undone; padding shows in the mean colour. The format is that of the file's name. Written beside and
    renamed.
    """
    from PIL import Image

    path = Path(path)
    height, width = batch.images.shape[-2:]
    across = columns or math.ceil(math.sqrt(len(batch)))
    sheet = Image.new("RGB", (across * (width + 4) - 4, math.ceil(len(batch) / across) * (height + 4) - 4), "white")
    for number, values in enumerate(batch.images.cpu()):
        image = restored(values, preprocess)
        placement = batch.placements[number]
        tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        if batch.targets is not None:
            valid = image[:, : placement.size[0], : placement.size[1]]
            tile.paste(batch.targets[number].to("cpu").draw(valid, classes), (0, 0))
        sheet.paste(tile, (number % across * (width + 4), number // across * (height + 4)))
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            sheet.save(file, Image.registered_extensions().get(path.suffix.lower(), "PNG"))
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def restored(image: Float[Tensor, "c h w"], preprocess: Preprocess) -> UInt8[Tensor, "3 h w"]:
    """A normalised image back as RGB, 0 ... 255; further channels are left out."""
    mean, std = (image.new_tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    values = ((image.float() * std + mean) * preprocess.divide)[:3]
    if preprocess.channels == "BGR":
        values = values.flip(0)
    return values.round().clamp(0, 255).to(torch.uint8)
