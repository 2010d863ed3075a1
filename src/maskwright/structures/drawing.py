"""Objects drawn over their image.

Masks are blended one by one on the pixels of their own frame, so that a hundred objects on a large image need little
more memory than the image itself. Every measure (line, text, keypoint) grows with the image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.structures.instances import Instances

if TYPE_CHECKING:
    from PIL.Image import Image

# Chosen one after the other, each as far as possible from all before it in OKLab, as seen by normal, protan and deutan
# eyes: the first eight are told apart by anyone, most by lightness too. sRGB.
PALETTE = (
    "#0390ff", "#cbee0a", "#d52707", "#fcbbfb", "#14b884", "#9751a8", "#db8b11", "#20f5b2", "#cc8bc9", "#258659",
    "#e7c56e", "#6159eb", "#81affc", "#fa8177", "#ca5680", "#ca5ad5", "#4fd2c9", "#82d602", "#d56106", "#ec4ca9",
    "#c61883", "#90a754", "#3888c4", "#d6e782",
)  # fmt: skip
GREY = (150, 150, 150)

# COCO's 17 keypoints: which are joined by a limb.
LIMBS = (
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13),
    (13, 15), (12, 14), (14, 16),
)  # fmt: skip


def draw(
    image: Tensor | np.ndarray | Image,
    instances: Instances,
    classes: Sequence[str] | None = None,
    *,
    alpha: float = 0.5,
    boxes: bool = True,
    labels: bool = True,
    contours: bool = True,
    scores: bool = True,
    keypoints: bool = True,
    colour_by: Literal["object", "class"] = "object",
    line_width: int | None = None,
    text_height: int | None = None,
    keypoint_threshold: float = 0.05,
    things: Tensor | None = None,
) -> Image:
    """The image (a new one, RGB) with the objects over it: large ones first, so that small ones stay visible.

    image       uint8: a (3, H, W) or (1, H, W) tensor, an (H, W, 3) or (H, W) array, or a PIL image of any mode
    classes     names; without them a label is drawn as its number
    alpha       how much of a mask's colour covers the image, 0 ... 1; the contour is always opaque
    labels      class names; `scores` adds the score. A label that would have to cover other ones, or other objects of
                its own size and less, is left out
    keypoints      of predictions those that score above `keypoint_threshold`, of annotations the labelled ones
    things      (N,) bool where some objects are regions (False): these get no box, the darker tone of their class, and
                their label in their middle
    line_width, text_height  in pixels; by default they follow the image's size

    Crowd regions are grey and hatched.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw

    pixels = _rgb(image)
    height, width = pixels.shape[:2]
    if (height, width) != tuple(instances.image_size):
        raise UsageError(
            f"the image is {height} x {width}, the objects are on a grid of "
            f"{instances.image_size[0]} x {instances.image_size[1]} (height x width); draw them on their own image"
        )
    if colour_by not in ("object", "class"):
        raise UsageError(f"colour_by is {colour_by!r}; expected 'object' or 'class'")
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha is {alpha}; expected 0 (clear) ... 1 (opaque)")
    instances = instances.to("cpu")
    count = len(instances)
    line = line_width or max(1, round(math.sqrt(height * width) / 350))
    keys = instances.labels.tolist() if colour_by == "class" else list(range(count))
    crowd = [False] * count if instances.crowd is None else instances.crowd.tolist()
    regions = [False] * count if things is None else (~things.cpu()).tolist()
    colours = [GREY if crowded else colour(key) for key, crowded in zip(keys, crowd, strict=True)]
    for number in (n for n in range(count) if regions[n] and not crowd[n]):
        colours[number] = colour(int(instances.labels[number]) % len(PALETTE) + 2 * len(PALETTE))
    frames = instances.boxes.detach().double()
    whole = torch.isfinite(frames).all(1)
    frames = torch.where(whole[:, None], frames, 0).clamp(min=0)
    frames = frames.minimum(frames.new_tensor([width, height, width, height]))
    sizes = (frames[:, 2] - frames[:, 0]) * (frames[:, 3] - frames[:, 1])
    order = torch.argsort(sizes, descending=True, stable=True).tolist()

    canvas = pillow.fromarray(pixels)
    if instances.masks is not None:
        for number in sorted(order, key=lambda n: not crowd[n]):  # crowds lie below everything
            corners, crops = instances.masks[number].crops()
            x, y = corners[0, :2].tolist()
            _blend(canvas, crops[0].numpy(), (x, y), colours[number], alpha, line if contours else 0, crowd[number])
    pen = ImageDraw.Draw(canvas)
    if boxes:
        for number in order:
            if not crowd[number] and not regions[number] and sizes[number] > 0:
                x0, y0, x1, y1 = (round(v) for v in frames[number].tolist())
                pen.rectangle(
                    (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colours[number], width=max(1, line * 2 // 3)
                )
    if keypoints and instances.keypoints is not None:
        threshold = 0.0 if instances.scores is None else keypoint_threshold
        for number in order:
            _draw_keypoints(
                canvas, instances.keypoints[number].detach().double().numpy(), colours[number], line, threshold
            )
    if labels:
        texts = _texts(instances, classes, scores, crowd)
        size = text_height or max(11, round(math.sqrt(height * width) / 48))
        middles = {n: _middle(instances, n) for n in range(count) if regions[n]}
        _write_labels(pen, texts, frames.tolist(), colours, size, (height, width), middles)
    return canvas


def colour(number: int) -> tuple[int, int, int]:
    """The palette's colour of an object or class; from the 25th on the same ones again, a little lighter or darker."""
    text = PALETTE[number % len(PALETTE)]
    red, green, blue = int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
    turn = number // len(PALETTE) % 3
    if turn == 1:
        return (red + 255) // 2, (green + 255) // 2, (blue + 255) // 2
    if turn == 2:
        return red * 3 // 5, green * 3 // 5, blue * 3 // 5
    return red, green, blue


def _rgb(image: Any) -> np.ndarray:
    """A copy of the image as (H, W, 3) uint8, in one piece."""
    if isinstance(image, Tensor):
        if image.ndim == 2:
            image = image[None]
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise UsageError(f"an image tensor is (3, H, W) or (1, H, W); this one is {tuple(image.shape)}")
        array = image.detach().cpu().permute(1, 2, 0).numpy()
    elif isinstance(image, np.ndarray):
        array = image
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
            raise UsageError(f"an image array is (H, W, 3) or (H, W); this one is {array.shape}")
    elif hasattr(image, "convert"):
        array = np.asarray(image.convert("RGB"))
    else:
        raise UsageError(f"an image is a tensor, an array or a PIL image; this is a {type(image).__name__}")
    if array.dtype != np.uint8:
        raise UsageError(f"an image to draw on is uint8, 0 ... 255; this one is {array.dtype}")
    array = array[..., None] if array.ndim == 2 else array[..., :3]
    height, width = array.shape[:2]
    copy = np.empty((height, width, 3), np.uint8)
    copy[...] = array  # a single channel becomes three
    return copy


# ---- masks -----------------------------------------------------------------------------------------------------------


def _blend(
    canvas: Image,
    crop: np.ndarray,
    corner: tuple[int, int],
    paint: tuple[int, int, int],
    alpha: float,
    line: int,
    crowd: bool,
) -> None:
    """Puts one mask into the image, in place: a soft edge, an opaque border `line` wide on its inside, and `alpha`
    of its colour within. Scratch: five bytes per pixel of the crop."""
    from PIL import Image as pillow
    from PIL import ImageChops, ImageFilter

    if not crop.size:
        return
    plane = pillow.fromarray(np.pad(crop.astype(np.uint8) * np.uint8(255), 2))
    edge = plane.filter(ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1), 16))
    core = edge
    if line:
        # A straight edge blurred by a Gaussian of `line` pixels has risen to 0.841 at that depth, by 0.242 / line per
        # pixel: a ramp one pixel wide around this value is the soft inner side of the border.
        values = (np.arange(256) / 255 - 0.841) * line / 0.242 + 0.5
        core = plane.filter(ImageFilter.GaussianBlur(line)).point(
            (values.clip(0, 1) * 255).round().astype(int).tolist()
        )
    if crowd:
        x, y = np.meshgrid(np.arange(plane.width) + corner[0], np.arange(plane.height) + corner[1])
        period = max(6, 5 * line)
        kept = np.where((x + y) % period * 2 < period, 1 - alpha, 1 - alpha / 4)
        inside = ImageChops.multiply(core, pillow.fromarray((kept * 255).astype(np.uint8)))
    else:
        inside = core.point([round(v * (1 - alpha)) for v in range(256)])
    canvas.paste(paint, (corner[0] - 2, corner[1] - 2), ImageChops.subtract(edge, inside))


# ---- keypoints -------------------------------------------------------------------------------------------------------


def _draw_keypoints(
    canvas: Image, points: np.ndarray, paint: tuple[int, int, int], line: int, threshold: float
) -> None:
    from PIL import Image as pillow
    from PIL import ImageDraw

    seen = (points[:, 2] > threshold) & np.isfinite(points).all(1)
    seen &= (points[:, :2] >= 0).all(1) & (points[:, :2] <= canvas.size).all(1)
    if not seen.any():
        return
    radius = 1.2 * line + 1
    margin = math.ceil(radius + 2)
    x0, y0 = np.maximum(0, np.floor(points[seen, :2].min(0)).astype(int) - margin)
    x1, y1 = np.minimum(canvas.size, np.ceil(points[seen, :2].max(0)).astype(int) + margin)
    width, height = int(x1 - x0), int(y1 - y0)
    # Drawn larger and shrunk, so that slanted lines are smooth; large figures are smooth enough by themselves.
    fine = 4 if width * height < 1 << 18 else 2 if width * height < 1 << 21 else 1
    xy = (points[:, :2] - (x0, y0)) * fine

    limbs, discs, hollow = (pillow.new("L", (width * fine, height * fine)) for _ in range(3))
    pen = ImageDraw.Draw(limbs)
    if len(points) == 17:
        for a, b in LIMBS:
            if seen[a] and seen[b]:
                pen.line((*xy[a], *xy[b]), fill=255, width=max(1, round(1.3 * line * fine)))
    outer, rim, centre = radius * fine, (radius + max(1.0, line * 0.5)) * fine, radius * 0.45 * fine
    discs_pen, hollow_pen = ImageDraw.Draw(discs), ImageDraw.Draw(hollow)
    for number in np.flatnonzero(seen):
        x, y = xy[number]
        pen.ellipse((x - outer, y - outer, x + outer, y + outer), fill=255)
        discs_pen.ellipse((x - rim, y - rim, x + rim, y + rim), fill=255)
        hollow_pen.ellipse((x - centre, y - centre, x + centre, y + centre), fill=255)
    for mask, tone in ((discs, (20, 20, 20)), (limbs, paint), (hollow, (255, 255, 255))):
        canvas.paste(tone, (int(x0), int(y0)), mask.resize((width, height), pillow.Resampling.BOX))


# ---- text ------------------------------------------------------------------------------------------------------------


def _texts(instances: Instances, classes: Sequence[str] | None, scores: bool, crowd: list[bool]) -> list[str]:
    values = instances.scores.tolist() if scores and instances.scores is not None else None
    texts = []
    for number, label in enumerate(instances.labels.tolist()):
        text = str(classes[label]) if classes is not None and 0 <= label < len(classes) else str(label)
        text = "".join(c if c.isprintable() else " " for c in text)
        if crowd[number]:
            text += " (crowd)"
        elif values is not None:
            text += f" {values[number]:.2f}"
        texts.append(text)
    return texts


def _middle(instances: Instances, number: int) -> tuple[float, float]:
    """The point x, y of a region that lies deepest inside it, on a coarse grid."""
    from PIL import Image as pillow
    from PIL import ImageFilter

    assert instances.masks is not None
    corners, crops = instances.masks[number].crops()
    x0, y0, x1, y1 = corners[0].tolist()
    if x1 <= x0:
        return 0.0, 0.0
    width, height = (max(1, min(64, side)) for side in (x1 - x0, y1 - y0))
    plane = pillow.fromarray(crops[0].numpy().astype(np.uint8) * np.uint8(255))
    coarse = plane.resize((width, height), pillow.Resampling.BOX)
    left = pillow.new("L", (width + 2, height + 2))
    left.paste(coarse, (1, 1))
    depth = np.zeros((height, width), np.int32)
    values = np.asarray(left)[1:-1, 1:-1]
    while values.any():  # at most 32 times: the border moves inwards by a cell each time
        depth += values
        left = left.filter(ImageFilter.MinFilter(3))
        left.paste(0, (0, 0, width + 2, 1))
        left.paste(0, (0, 0, 1, height + 2))
        left.paste(0, (0, height + 1, width + 2, height + 2))
        left.paste(0, (width + 1, 0, width + 2, height + 2))
        values = np.asarray(left)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return x0 + (float(x) + 0.5) * (x1 - x0) / width, y0 + (float(y) + 0.5) * (y1 - y0) / height


def _write_labels(
    pen: Any,
    texts: list[str],
    frames: list[list[float]],
    colours: list[tuple[int, int, int]],
    size: int,
    image: tuple[int, int],
    middles: dict[int, tuple[float, float]],
) -> None:
    """Each label above its box, else inside or below it, wherever it covers least; best objects choose first. Those of
    regions around the point that `middles` gives."""
    placed = np.zeros((0, 4))
    boxes = np.array(frames).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    pad = max(1, size // 5)
    for number, (text, (x0, y0, x1, y1), paint) in enumerate(zip(texts, frames, colours, strict=True)):
        font = _font(size, text.isascii())
        ascent, descent = font.getmetrics()
        width, height = math.ceil(font.getlength(text)) + 2 * pad, ascent + descent + pad
        right = max(0, image[1] - width)
        places = [(x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x0, y1), (x0, y1 - height), (x1 - width, y1)]
        if number in middles:
            x, y = middles[number][0] - width / 2, middles[number][1] - height / 2
            places = [(x, y), (x, y - height), (x, y + height), (x - width, y), (x + width, y)]
        fitting = [(min(max(0, x), right), y) for x, y in places if 0 <= y <= image[0] - height]
        fitting = np.array(fitting or [(min(max(0, x0), right), max(0.0, min(y0, image[0] - height)))])
        rows = np.hstack([fitting, fitting + np.array([width, height])]).round()
        small = areas < 2 * width * height
        small[number] = False
        small[list(middles)] = False
        hidden = np.concatenate([placed, boxes[small]])
        low = np.maximum(rows[:, None, :2], hidden[None, :, :2])
        high = np.minimum(rows[:, None, 2:], hidden[None, :, 2:])
        covered = np.clip(high - low, 0, None).prod(-1).sum(1)
        best = int(covered.argmin())
        if covered[best] > 0.25 * width * height:
            continue
        left, top, end, bottom = (int(v) for v in rows[best])
        placed = np.concatenate([placed, rows[best : best + 1]])
        pen.rectangle((left, top, end - 1, bottom - 1), fill=paint)
        pen.text((left + pad, top + pad // 2), text, fill=_ink(paint), font=font)


def _ink(paint: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever contrasts more with `paint` (WCAG's relative luminance)."""
    linear = [(v / 255 / 12.92) if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in paint]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


@functools.lru_cache(16)
def _font(size: int, ascii_only: bool) -> Any:
    """Pillow's own font; for other scripts one of the system's that knows many, if there is one."""
    from PIL import ImageFont

    if not ascii_only:
        for name in (
            "NotoSansCJK-Regular.ttc",
            "NotoSans-Regular.ttf",
            "Arial Unicode.ttf",
            "arialuni.ttf",
            "DejaVuSans.ttf",
        ):
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)
