"""Drawing objects over an image.

Masks are blended one by one within their bounding windows, so that many objects on a large image need little more
memory than the image. Sizes of lines, text and keypoints scale with the image.
"""

# Tensor.tolist has no type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.structures.instances import Instances
from maskwright.structures.masks import Masks

if TYPE_CHECKING:
    from PIL.Image import Image

# sRGB. Each colour has the largest possible distance from all before it in OKLab, for normal, protanopic and
# deuteranopic vision. The first eight are distinguishable for all three, most of them also by lightness.
PALETTE = (
    "#0390ff", "#cbee0a", "#d52707", "#fcbbfb", "#14b884", "#9751a8", "#db8b11", "#20f5b2", "#cc8bc9", "#258659",
    "#e7c56e", "#6159eb", "#81affc", "#fa8177", "#ca5680", "#ca5ad5", "#4fd2c9", "#82d602", "#d56106", "#ec4ca9",
    "#c61883", "#90a754", "#3888c4", "#d6e782",
)  # fmt: skip
GREY = (150, 150, 150)

MOST_PIXELS = 1 << 29  # pixels in the windows of the masks that are drawn on one image ...
MOST_LAYERS = 64  # ... or this many times the pixels of the image, if that is more
MOST_NEIGHBOURS = 256  # a label is omitted where more boxes than this are near
AT_ONCE = 1 << 20  # pixels of masks that are decoded at once

# Pairs of COCO's 17 keypoints that are connected by a line.
LIMBS = (
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13),
    (13, 15), (12, 14), (14, 16),
)  # fmt: skip


def draw(
    image: Tensor | npt.NDArray[np.uint8] | Image,
    instances: Instances,
    classes: Sequence[str] | None = None,
    *,
    alpha: float = 0.5,
    boxes: bool = True,
    labels: bool = True,
    contours: bool = True,
    scores: bool = True,
    keypoints: bool = True,
    colour_by: Literal["object", "class", "id"] = "object",
    line_width: int | None = None,
    text_height: int | None = None,
    keypoint_threshold: float = 0.05,
    things: Tensor | None = None,
) -> Image:
    """Draw objects over an image, large ones first, so that small ones stay visible.

    Crowd regions are grey and hatched. The time is bounded for any number of objects: masks beyond a budget of pixels,
    `MOST_PIXELS` or `MOST_LAYERS` times those of the image, are not drawn; their boxes are.

    Args:
        image: uint8: a tensor (3, H, W) or (1, H, W), an array (H, W, 3) or (H, W), or a PIL image of any mode.
        instances: Objects in the frame of the image. Parts they do not have, such as masks, are not drawn.
        classes: Class names; None: labels are drawn as numbers.
        alpha: Opacity of masks, 0 ... 1; contours are opaque.
        boxes: Draw boxes.
        labels: Draw class names. A label is omitted if it would cover other labels, or objects of at most its size.
        contours: Draw contours of masks.
        scores: Add scores to the labels.
        keypoints: Draw keypoints: predicted ones with scores above `keypoint_threshold`, annotated ones if labelled.
        colour_by: Colour by object, by class, or by id: a tracked object has the same colour in all frames, and its
            label contains the id.
        line_width: In pixels; None: scales with the image.
        text_height: In pixels; None: scales with the image.
        keypoint_threshold: Smallest score of predicted keypoints.
        things: (N,) bool, False for regions, which have no box, a darker colour of their class, and their label
            inside; None: all are objects.

    Returns:
        A new RGB image.

    Raises:
        UsageError: If the image has another size than the objects or an unsupported type, or an option is invalid.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw

    pixels = _rgb(image)
    height, width = pixels.shape[:2]
    if (height, width) != tuple(instances.image_size):
        raise UsageError(
            f"the image is {height} x {width}, but the objects belong to an image of "
            f"{instances.image_size[0]} x {instances.image_size[1]} (height x width)"
        )
    if colour_by not in ("object", "class", "id"):
        raise UsageError(f"`colour_by` must be 'object', 'class' or 'id', got {colour_by!r}")
    if colour_by == "id" and instances.ids is None:
        raise UsageError("`colour_by` is 'id', but the objects have no ids; track them, or colour by 'object'")
    if not 0 <= alpha <= 1:
        raise UsageError(f"`alpha` must be in [0, 1], got {alpha}")
    instances = instances.to("cpu")
    count = len(instances)
    line = line_width or max(1, round(math.sqrt(height * width) / 350))
    ids: list[int] | None = instances.ids.tolist() if colour_by == "id" and instances.ids is not None else None
    keys: list[int] = instances.labels.tolist() if colour_by == "class" else ids or list(range(count))
    crowd: list[bool] = [False] * count if instances.crowd is None else instances.crowd.tolist()
    regions: list[bool] = [False] * count if things is None else (~things.cpu()).tolist()
    colours = [GREY if crowded else colour(key) for key, crowded in zip(keys, crowd, strict=True)]
    for number in (n for n in range(count) if regions[n] and not crowd[n]):
        colours[number] = colour(int(instances.labels[number]) % len(PALETTE) + 2 * len(PALETTE))
    frames = instances.boxes.detach().double()
    finite = torch.isfinite(frames).all(1)
    frames = torch.where(finite[:, None], frames, 0).clamp(min=0)
    frames = frames.minimum(frames.new_tensor([width, height, width, height]))
    sizes = (frames[:, 2] - frames[:, 0]) * (frames[:, 3] - frames[:, 1])
    order: list[int] = torch.argsort(sizes, descending=True, stable=True).tolist()

    canvas = pillow.fromarray(pixels)
    if instances.masks is not None:
        areas = _window_areas(instances.masks)
        chosen = _affordable(areas, height * width)
        ordered = [n for n in sorted(order, key=lambda n: not crowd[n]) if n in chosen]  # crowd regions at the bottom
        for number, corner, crop in _crops(instances.masks, areas, ordered):
            _blend(canvas, crop, corner, colours[number], alpha, line if contours else 0, crowd[number])
    pen = ImageDraw.Draw(canvas)
    if boxes:
        for number in order:
            if not crowd[number] and not regions[number] and sizes[number] > 0:
                x0, y0, x1, y1 = (round(float(v)) for v in frames[number])
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
        texts = _texts(instances, classes, scores, crowd, ids)
        size = text_height or max(11, round(math.sqrt(height * width) / 48))
        centers = {n: _center(instances, n) for n in range(count) if regions[n]}
        _write_labels(pen, texts, frames.tolist(), colours, size, (height, width), centers)
    return canvas


def colour(number: int) -> tuple[int, int, int]:
    """Return the RGB colour of an object or class; from the 25th on, colours repeat in lighter and darker versions."""
    text = PALETTE[number % len(PALETTE)]
    red, green, blue = int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
    turn = number // len(PALETTE) % 3
    if turn == 1:
        return (red + 255) // 2, (green + 255) // 2, (blue + 255) // 2
    if turn == 2:
        return red * 3 // 5, green * 3 // 5, blue * 3 // 5
    return red, green, blue


def _rgb(image: Any) -> npt.NDArray[np.uint8]:
    """A contiguous copy of the image as (H, W, 3) uint8."""
    if isinstance(image, Tensor):
        if image.ndim == 2:
            image = image[None]
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise UsageError(f"an image tensor must be (3, H, W) or (1, H, W), got {tuple(image.shape)}")
        array: npt.NDArray[Any] = image.detach().cpu().permute(1, 2, 0).numpy()
    elif isinstance(image, np.ndarray):
        array = cast(npt.NDArray[Any], image)
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
            raise UsageError(f"an image array must be (H, W, 3) or (H, W), got {array.shape}")
    elif hasattr(image, "convert"):
        array = np.asarray(image.convert("RGB"))
    else:
        raise UsageError(f"an image must be a tensor, an array or a PIL image, got {type(image).__name__}")
    if array.dtype != np.uint8:
        raise UsageError(f"an image to draw on must be uint8, 0 ... 255, got {array.dtype}")
    array = array[..., None] if array.ndim == 2 else array[..., :3]
    height, width = array.shape[:2]
    copy = np.empty((height, width, 3), np.uint8)
    copy[...] = array  # repeats a single channel
    return copy


# ---- masks ---------------------------------------------------------------------------------------------------------


def _window_areas(masks: Masks) -> list[float]:
    """Numbers of pixels in the windows of masks."""
    areas: list[float] = []
    for start in range(0, len(masks), 32):  # a few at a time to bound memory
        frames = masks[start : start + 32].boxes().double()
        areas += (frames[:, 2:] - frames[:, :2]).prod(1).tolist()
    return areas


def _affordable(areas: list[float], pixels: int) -> set[int]:
    """Numbers of the masks to draw: as many of the first ones as fit into the budget of pixels."""
    count = int((np.cumsum(areas) <= max(MOST_PIXELS, MOST_LAYERS * pixels)).sum())
    return set(range(max(count, 1)))


def _crops(
    masks: Masks, areas: list[float], order: list[int]
) -> Iterator[tuple[int, tuple[int, int], npt.NDArray[np.bool_]]]:
    """Number, upper left corner and crop of masks; many are decoded at once, which is faster than one by one."""
    start = 0
    while start < len(order):
        end, pixels = start, 0.0
        while end < len(order) and end - start < 1024 and (end == start or pixels + areas[order[end]] <= AT_ONCE):
            pixels += areas[order[end]]
            end += 1
        group = order[start:end]
        corners, crops = masks[torch.tensor(group)].crops()
        for number, (x, y, _, _), crop in zip(group, corners.tolist(), crops, strict=True):
            yield number, (x, y), crop.numpy()
        start = end


def _blend(
    canvas: Image,
    crop: npt.NDArray[np.bool_],
    corner: tuple[int, int],
    paint: tuple[int, int, int],
    alpha: float,
    line: int,
    crowd: bool,
) -> None:
    """Blend one mask into the image in place: with a soft edge and, inside, an opaque border of width `line`.

    Needs five bytes of memory for each pixel of the crop.
    """
    from PIL import Image as pillow
    from PIL import ImageFilter

    if not crop.size:
        return
    height, width = crop.shape
    padded = np.zeros((height + 4, width + 4), np.uint8)
    np.multiply(crop, np.uint8(255), out=padded[2:-2, 2:-2])
    plane = pillow.fromarray(padded)
    edge = np.asarray(plane.filter(ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1), 16)))
    blurred = np.asarray(plane.filter(ImageFilter.GaussianBlur(line))) if line else edge
    core, inside = _tables(line, alpha)
    if crowd:
        x, y = np.meshgrid(np.arange(plane.width) + corner[0], np.arange(plane.height) + corner[1])
        period = max(6, 5 * line)
        kept = np.where((x + y) % period * 2 < period, 1 - alpha, 1 - alpha / 4)
        inner = (core[blurred] * kept).astype(np.uint8)
    else:
        inner = inside[blurred]
    opacity = edge - np.minimum(edge, inner)
    canvas.paste(paint, (corner[0] - 2, corner[1] - 2), pillow.fromarray(opacity))


@functools.lru_cache(16)
def _tables(line: int, alpha: float) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """For each value of a blurred mask, whether it is inside the border, 0 ... 255, and what is subtracted there."""
    values = np.arange(256) / 255
    if line:
        # A straight edge blurred by a Gaussian of `line` pixels has the value 0.841 at this depth and the slope
        # 0.242 / line: a ramp of one pixel around this value is the soft inner edge of the border.
        values = ((values - 0.841) * line / 0.242 + 0.5).clip(0, 1)
    core = (values * 255).round().astype(np.uint8)
    return core, (core * (1 - alpha)).round().astype(np.uint8)


# ---- keypoints -----------------------------------------------------------------------------------------------------


def _draw_keypoints(
    canvas: Image, points: npt.NDArray[np.float64], paint: tuple[int, int, int], line: int, threshold: float
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
    # Oversampled for smooth lines; large figures need less.
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
    for number in np.flatnonzero(seen).tolist():
        x, y = xy[number]
        pen.ellipse((x - outer, y - outer, x + outer, y + outer), fill=255)
        discs_pen.ellipse((x - rim, y - rim, x + rim, y + rim), fill=255)
        hollow_pen.ellipse((x - centre, y - centre, x + centre, y + centre), fill=255)
    for mask, tone in ((discs, (20, 20, 20)), (limbs, paint), (hollow, (255, 255, 255))):
        canvas.paste(tone, (int(x0), int(y0)), mask.resize((width, height), pillow.Resampling.BOX))


# ---- text ----------------------------------------------------------------------------------------------------------


def _texts(
    instances: Instances, classes: Sequence[str] | None, scores: bool, crowd: list[bool], ids: list[int] | None
) -> list[str]:
    values: list[float] | None = instances.scores.tolist() if scores and instances.scores is not None else None
    texts: list[str] = []
    names: list[int] = instances.labels.tolist()
    for number, label in enumerate(names):
        text = str(classes[label]) if classes is not None and 0 <= label < len(classes) else str(label)
        text = "".join(c if c.isprintable() else " " for c in text)
        if ids is not None:
            text += f" {ids[number]}"
        if crowd[number]:
            text += " (crowd)"
        elif values is not None:
            text += f" {values[number]:.2f}"
        texts.append(text)
    return texts


def _center(instances: Instances, number: int) -> tuple[float, float]:
    """The point x, y of a region that is farthest from its border, on a coarse grid; without masks, that of its box."""
    from PIL import Image as pillow
    from PIL import ImageFilter

    if instances.masks is None:
        x0, y0, x1, y1 = (float(v) for v in instances.boxes[number])
        return (x0 + x1) / 2, (y0 + y1) / 2
    corners, crops = instances.masks[number].crops()
    x0, y0, x1, y1 = (int(v) for v in corners[0])
    if x1 <= x0:
        return 0.0, 0.0
    width, height = (max(1, min(64, side)) for side in (x1 - x0, y1 - y0))
    plane = pillow.fromarray(crops[0].numpy().astype(np.uint8) * np.uint8(255))
    coarse = plane.resize((width, height), pillow.Resampling.BOX)
    left = pillow.new("L", (width + 2, height + 2))
    left.paste(coarse, (1, 1))
    depth = np.zeros((height, width), np.int32)
    values = np.asarray(left)[1:-1, 1:-1]
    while values.any():  # at most 32 times, since the border moves inwards by one cell each time
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
    centers: dict[int, tuple[float, float]],
) -> None:
    """Write each label above, inside or below its box, where it covers least, or around the center of a region.

    Objects with higher scores come first.
    """
    boxes = np.array(frames).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    pad = max(1, size // 5)
    # Labels only compete with what is near: boxes and placed labels are looked up in a grid.
    grid = _Grid(8 * size)
    for number in np.flatnonzero(areas < 128 * size * size).tolist():
        if number not in centers:
            grid.add(boxes[number], number, float(areas[number]))
    for number, (text, (x0, y0, x1, y1), paint) in enumerate(zip(texts, frames, colours, strict=True)):
        font = _font(size, text.isascii())
        ascent, descent = font.getmetrics()
        width, height = math.ceil(font.getlength(text)) + 2 * pad, ascent + descent + pad
        right = max(0, image[1] - width)
        places = [(x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x0, y1), (x0, y1 - height), (x1 - width, y1)]
        if number in centers:
            x, y = centers[number][0] - width / 2, centers[number][1] - height / 2
            places = [(x, y), (x, y - height), (x, y + height), (x - width, y), (x + width, y)]
        fitting = [(min(max(0, x), right), y) for x, y in places if 0 <= y <= image[0] - height]
        fitting = np.array(fitting or [(min(max(0, x0), right), max(0.0, min(y0, image[0] - height)))])
        rows = np.hstack([fitting, fitting + np.array([width, height])]).round().astype(np.float64)
        hidden = grid.near(rows, number, 2 * width * height)
        if hidden is None:
            continue
        low = np.maximum(rows[:, None, :2], hidden[None, :, :2])
        high = np.minimum(rows[:, None, 2:], hidden[None, :, 2:])
        covered = np.clip(high - low, 0, None).prod(-1).sum(1)
        best = int(covered.argmin())
        if covered[best] > 0.25 * width * height:
            continue
        left, top, end, bottom = (int(v) for v in rows[best])
        grid.add(rows[best], -1, 0.0)
        pen.rectangle((left, top, end - 1, bottom - 1), fill=paint)
        pen.text((left + pad, top + pad // 2), text, fill=_ink(paint), font=font)


class _Grid:
    """Boxes by the cells of a coarse grid that they intersect."""

    def __init__(self, cell: int):
        self.cell = cell
        self.cells: dict[tuple[int, int], list[tuple[int, float, npt.NDArray[np.float64]]]] = {}

    def add(self, box: npt.NDArray[np.float64], number: int, area: float) -> None:
        """Add a box x0, y0, x1, y1 with its number and area."""
        for key in self._keys(box):
            self.cells.setdefault(key, []).append((number, area, box))

    def near(self, rows: npt.NDArray[np.float64], number: int, area: float) -> npt.NDArray[np.float64] | None:
        """Boxes near `rows` that are smaller than `area`, without that of `number`; None if there are too many."""
        found: dict[int, npt.NDArray[np.float64]] = {}
        for key in {key for row in rows for key in self._keys(row)}:
            entries = self.cells.get(key, ())
            if len(entries) > MOST_NEIGHBOURS:
                return None
            found.update({id(box): box for other, size, box in entries if other != number and size < area})
        return np.array(list(found.values())).reshape(-1, 4)

    def _keys(self, box: npt.NDArray[np.float64]) -> Iterator[tuple[int, int]]:
        x0, y0, x1, y1 = (int(value // self.cell) for value in box)
        return ((x, y) for x in range(x0, x1 + 1) for y in range(y0, y1 + 1))


def _ink(paint: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever contrasts more with `paint` (WCAG's relative luminance)."""
    linear = [(v / 255 / 12.92) if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in paint]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


@functools.lru_cache(16)
def _font(size: int, ascii_only: bool) -> Any:
    """Pillow's default font; for other than ASCII text a system font with many scripts, if one is found."""
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
