"""Accuracy of contour codes: the IoU of decode(encode(mask)) with the mask, for each code and length.

    python benchmarks/contour_codes.py DATA [DATA ...]      # folders in COCO layout, both parts; or "scenes:count=100"
    python benchmarks/contour_codes.py DATA --svg docs/images/contour-codes.svg --json codes.json
    python benchmarks/contour_codes.py DATA --scale 2       # encoded and compared on a grid twice as fine

No network is involved: this is the upper bound for a system that predicts the code. Crowd regions and empty masks are
left out; sizes are COCO's, by the number of pixels of the mask (32 x 32, 96 x 96).

Codes of radii ("rays", "Chebyshev", "Fourier") are relative to one centre. Under equal conditions all three encode the
same 360 exact radii of the same region (parts bridged, holes filled) from the same inner centre and are filled in the
same way; each is also measured as published, with its authors' centre, radii and filling rule.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwright.data import open_dataset
from maskwright.ops import contours, vertices
from maskwright.ops.outlines import fill_contours, fill_holes, largest_parts
from maskwright.structures import Masks

RAYS = (18, 36, 72, 90, 180, 360)
CHEBYSHEV = (8, 12, 18, 24, 36)
FOURIER = (8, 18, 36, 60, 90)  # real numbers: half as many coefficients
VERTICES = (8, 16, 32, 64, 128)
SIZES = ("all", "small", "medium", "large")
EXACT = ("rays", "Chebyshev", "Fourier", "vertices")


@dataclass(frozen=True)
class Row:
    """A code with one setting; `numbers` per shape, without those of a centre or box."""

    code: str
    setting: str
    numbers: float


def measured(masks: Masks) -> Iterator[tuple[Row, Masks]]:
    """Yields the reconstruction of an image's masks by every code."""
    size = masks.size
    bridged = contours.solid(masks)
    largest = largest_parts(masks)
    yield Row("ceiling", "holes filled", math.inf), fill_holes(masks)[0]
    yield Row("ceiling", "largest part, holes filled", math.inf), largest
    yield Row("ceiling", "parts bridged, holes filled", math.inf), bridged
    yield from radial_codes(bridged)
    yield from vertex_codes(masks, largest)

    boxes = masks.pack().boxes()
    x0, y0, x1, y1 = boxes.unbind(1)
    corners = torch.stack([torch.stack(p, 1) for p in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], 1)
    yield Row("box", "", 4), filled(corners, size)

    for count in RAYS:
        rays, centres = contours.encode_rays(masks, count)
        ends = contours.ray_points(centres, rays)
        yield Row("rays, PolarMask's", str(count), count), fill_contours(ends, size)
    rays, centres = contours.encode_rays(masks, 90)
    for count in FOURIER:
        code = contours.fourier_coefficients(rays.clamp(min=1), count // 2)
        ends = contours.ray_points(centres, contours.fourier_rays(code, 90))
        yield Row("Fourier, FourierNet's", str(count), count), fill_contours(ends, size)
    own = bridged.boxes()
    for count in CHEBYSHEV:
        code, centres, _ = contours.encode_chebyshev(masks, count, boxes=own, reach="corner")
        ends = contours.decode_chebyshev(code, centres, own, turn=1.0)
        yield Row("Chebyshev, ESE-Seg's", str(count), count), fill_contours(ends, size)


def radial_codes(bridged: Masks) -> Iterator[tuple[Row, Masks]]:
    """Codes of exact radii."""
    frames, crops = bridged.crops()
    centres, _ = contours.inner_centres(crops, frames[:, :2])
    radii = contours.close_gaps(contours.degree_radii(crops, frames[:, :2], centres))
    yield Row("ceiling", "seen from one centre", math.inf), filled(contours.degree_points(radii, centres), bridged.size)
    for count in RAYS:
        step = 360 // count
        ends = contours.degree_points(radii, centres)[:, ::step]
        yield Row("rays", str(count), count), filled(ends, bridged.size)
    for count in CHEBYSHEV:
        again = contours.chebyshev_radii(contours.chebyshev_fit(radii, count)).clamp(min=0)
        yield Row("Chebyshev", str(count), count), filled(contours.degree_points(again, centres), bridged.size)
    for count in FOURIER:
        code = contours.fourier_coefficients(radii.clamp(min=0.5), count // 2)
        again = contours.fourier_rays(code, 360)
        yield Row("Fourier", str(count), count), filled(contours.degree_points(again, centres), bridged.size)


def vertex_codes(masks: Masks, largest: Masks) -> Iterator[tuple[Row, Masks]]:
    """Codes of vertices: of the largest part, and of every part."""
    rings = [max(own, key=len) for own in largest.polygons()]
    points, lengths = padded(rings)
    for count in VERTICES:
        ends = contours.resample_from(points, count, lengths, points[:, 0])
        yield Row("vertices", str(count), 2 * count), filled(ends, masks.size)
    octagons = vertices.octagons(vertices.extreme_points(points, lengths).float())
    yield Row("octagon", "", 8), filled(octagons, masks.size)
    # Deep Snake: every part is an object of its own.
    parts, owners = vertices.outlines_of(fill_holes(masks)[0])
    points, lengths = padded(parts)
    share = len(parts) / max(1, len(masks))
    for count in VERTICES:
        ends = contours.resample_from(points, count, lengths, points[:, 0]).numpy()
        each = [[ends[i] for i in np.flatnonzero(owners == number)] for number in range(len(masks))]
        yield Row("vertices, every part", str(count), 2 * count * share), Masks.from_polygons(each, masks.size)


def padded(rings: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Outlines as one tensor, and their numbers of points."""
    lengths = torch.tensor([len(r) for r in rings])
    points = torch.zeros(len(rings), int(lengths.max()), 2, dtype=torch.float64)
    for row, ring in zip(points, rings, strict=True):
        row[: len(ring)] = torch.from_numpy(ring)
    return points, lengths


def filled(points: Tensor, size: tuple[int, int]) -> Masks:
    """Masks of outlines, filled as COCO fills polygons."""
    return Masks.from_polygons([[ring] for ring in points.numpy()], size)


def overlaps(a: Masks, b: Masks, at_once: int = 16) -> list[float]:
    """Computes the IoU of corresponding masks."""
    a, b = a.pack(), b.pack()
    result: list[float] = []
    for first in range(0, len(a), at_once):
        some = slice(first, first + at_once)
        result += a[some].iou(b[some]).diagonal().tolist()
    return result


def measure(
    source: str, limit: int | None, scale: float
) -> tuple[dict[tuple[str, str], list[float]], np.ndarray, dict]:
    """Measures one data set: IoUs by code and setting, areas of the objects, and counts."""
    found: dict[tuple[str, str], list[float]] = {}
    numbers: dict[tuple[str, str], list[tuple[float, int]]] = {}
    areas: list[int] = []
    images = 0
    for split in ("train", "val"):
        dataset = open_dataset(source, split)
        for index in range(len(dataset)):
            if limit is not None and images >= limit:
                break
            target = dataset.targets(index)
            masks = target.masks if target.crowd is None else target[~target.crowd].masks
            if masks is None or not len(masks):
                continue
            masks = masks.pack()
            masks = masks[masks.areas() > 0]
            if not len(masks):
                continue
            images += 1
            areas += masks.areas().tolist()
            if scale != 1:
                masks = masks.resize((round(masks.size[0] * scale), round(masks.size[1] * scale)))
            for row, again in measured(masks):
                key = (row.code, row.setting)
                found.setdefault(key, []).extend(overlaps(again, masks))
                numbers.setdefault(key, []).append((row.numbers, len(masks)))
    mean = {k: sum(n * c for n, c in v) / sum(c for _, c in v) for k, v in numbers.items()}
    return found, np.array(areas), {"images": images, "numbers": mean}


def table(found: dict[tuple[str, str], list[float]], areas: np.ndarray, numbers: dict) -> list[dict]:
    """Mean IoU in per cent of each code, over all objects and by size."""
    small, large = areas < 32**2, areas >= 96**2
    chosen = {"all": areas >= 0, "small": small, "medium": ~small & ~large, "large": large}
    rows = []
    for (code, setting), values in found.items():
        own = np.array(values)
        means = {
            name: round(100 * float(own[rows_].mean()), 1) if rows_.any() else None for name, rows_ in chosen.items()
        }
        rows.append({"code": code, "setting": setting, "numbers": numbers[code, setting], **means})
    return rows


def format_rows(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    lines = ["| code | setting | numbers | all | small | medium | large |", "|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        count = "" if math.isinf(row["numbers"]) else f"{row['numbers']:.4g}"
        values = " | ".join("" if row[s] is None else f"{row[s]:.1f}" for s in SIZES)
        lines.append(f"| {row['code']} | {row['setting']} | {count} | {values} |")
    return "\n".join(lines)


# ---- plot ------------------------------------------------------------------------------------------------------------

COLOURS = {"rays": "#1f77b4", "Chebyshev": "#d1495b", "Fourier": "#2a9d62", "vertices": "#8a5fbf"}


def plot(sets: dict[str, list[dict]]) -> str:
    """An SVG with one panel per data set: IoU over the numbers per shape, on a logarithmic axis."""
    width, height, left, top, gap = 380, 300, 46, 30, 24
    total = left + len(sets) * (width + gap)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height + 106}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    low, high = 50.0, 100.0
    first, last = math.log2(4), math.log2(400)
    for number, (name, rows) in enumerate(sets.items()):
        at = left + number * (width + gap)

        def across(value: float, at: int = at) -> float:
            return at + (math.log2(value) - first) / (last - first) * width

        def down(value: float) -> float:
            return top + (high - max(value, low)) / (high - low) * height

        parts.append(f'<text x="{at}" y="18" font-weight="bold">{name}</text>')
        for level in range(50, 101, 10):
            parts.append(f'<path d="M{at} {down(level):.1f}h{width}" stroke="#ddd"/>')
            if number == 0:
                parts.append(f'<text x="{at - 8}" y="{down(level) + 4:.1f}" text-anchor="end">{level}</text>')
        for value in (4, 8, 16, 32, 64, 128, 256):
            x = across(value)
            parts.append(f'<path d="M{x:.1f} {top + height}v5" stroke="#888"/>')
            parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{value}</text>')
        for row in rows:
            if row["code"] == "ceiling" and row["setting"] in ("seen from one centre", "parts bridged, holes filled"):
                y = down(row["all"])
                parts.append(f'<path d="M{at} {y:.1f}h{width}" stroke="#555" stroke-dasharray="2 3"/>')
                if number == 0:
                    parts.append(
                        f'<text x="{at + 4}" y="{y + 12:.1f}" fill="#555" font-size="10">{row["setting"]}</text>'
                    )
            elif row["code"] in ("box", "octagon"):
                x, y = across(row["numbers"]), down(row["all"])
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#555"/>')
                parts.append(f'<text x="{x + 7:.1f}" y="{y + 4:.1f}" fill="#555">{row["code"]}</text>')
        for code, colour in COLOURS.items():
            for dashed in (False, True):
                own = [r for r in rows if (r["code"].startswith(f"{code}, ") if dashed else r["code"] == code)]
                if not own or (dashed and code == "vertices"):
                    continue
                places = [(across(r["numbers"]), down(r["all"])) for r in own]
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
                extra = ' stroke-dasharray="5 4" opacity="0.75"' if dashed else ""
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{extra}/>')
                if not dashed:
                    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
    y = top + height + 40
    parts.append(f'<text x="{total - gap}" y="{y - 4}" text-anchor="end">numbers per shape</text>')
    x = left
    for code, colour in COLOURS.items():
        parts.append(f'<path d="M{x} {y + 20}h22" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 24}">{code}</text>')
        x += 110
    parts.append(f'<path d="M{x} {y + 20}h22" stroke="#555" stroke-width="2" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{x + 28}" y="{y + 24}">as published</text>')
    parts.append(f'<text x="{left}" y="{y - 4}">mean IoU (%)</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--limit", type=int, help="images of each set")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="resize masks first; the size classes are those of the original masks"
    )
    parser.add_argument("--svg", type=Path, help="write the plot there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--again", type=Path, help="plot the figures of a --json file without measuring")
    arguments = parser.parse_args()
    sets = json.loads(arguments.again.read_text()) if arguments.again else {}
    for source in arguments.data:
        found, areas, about = measure(source, arguments.limit, arguments.scale)
        name = f"{Path(source).name}: {len(areas)} objects, {about['images']} images"
        sets[name] = table(found, areas, about["numbers"])
        counts = ((areas < 32**2).sum(), ((areas >= 32**2) & (areas < 96**2)).sum(), (areas >= 96**2).sum())
        print(
            f"## {name} ({counts[0]} small, {counts[1]} medium, {counts[2]} large)\n\n{format_rows(sets[name])}\n",
            flush=True,
        )
    if arguments.svg:
        arguments.svg.parent.mkdir(parents=True, exist_ok=True)
        arguments.svg.write_text(plot(sets))
    if arguments.json:
        arguments.json.write_text(json.dumps(sets) + "\n")


if __name__ == "__main__":
    main()
