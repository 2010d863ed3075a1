"""Short codes of outlines, and outlines from codes: rays, Fourier, Chebyshev, vertices.

Polygons are (P, 2) points x, y in continuous coordinates: pixel (i, j) covers [j, j + 1) x [i, i + 1). Rays and Fourier
coefficients count pixels instead, see their section.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.ops.outlines import Contours, fill_contours, fill_holes, largest_parts, outer_contours
from maskwright.structures import Masks
from maskwright.structures.polygons import trace

# ---- Chebyshev (ESE-Seg) -----------------------------------------------------------------------------------------
#
# The distance from an inner centre to the outline at each integer degree (0 is right, 90 up, counter-clockwise on the
# screen), as a polynomial on [-1, 1].

DEGREES = 360
Reach = Literal["exact", "corner"]


def inner_centres(
    crops: Sequence[Bool[Tensor, "_h _w"]], corners: Int[Tensor, "n 2"]
) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """Chooses a point inside each mask (ESE-Seg, arXiv 1908.04067).

    It is the centre of the tightest box if the eight pixels around it belong to the mask too; else, of the pixels with
    such a neighbourhood, the one with the smallest sum of distances to all pixels of the border; if there is none, the
    best of all pixels.

    Args:
        crops: The masks, cropped to their tightest boxes.
        corners: x, y of the upper left corner of each crop.

    Returns:
        x, y of each centre (of a pixel, its upper left corner), and whether all its neighbours belong to the mask.
    """
    centres, inner = [], []
    for crop in crops:
        plane = np.pad(crop.cpu().numpy(), 1)
        height, width = crop.shape
        if not plane.any():
            centres.append((width / 2, height / 2))
            inner.append(False)
            continue
        well = _well_inside(plane)
        if well[height // 2 + 1, width // 2 + 1]:
            centres.append((width / 2, height / 2))
            inner.append(True)
            continue
        candidates = well if well.any() else plane
        sums = np.where(candidates, distance_sums(plane), np.inf)
        y, x = divmod(int(sums.argmin()), plane.shape[1])
        centres.append((x - 1.0, y - 1.0))
        inner.append(bool(well.any()))
    points = torch.tensor(centres, dtype=torch.float64).reshape(-1, 2) + corners
    return points.float(), torch.tensor(inner, dtype=torch.bool)


def distance_sums(plane: np.ndarray) -> np.ndarray:
    """Computes the sum of distances from each pixel of a bool plane to all pixels of the mask's border."""
    shape = (_fast_length(2 * plane.shape[0]), _fast_length(2 * plane.shape[1]))
    y, x = (np.fft.fftfreq(n, 1 / n) for n in shape)
    kernel = np.hypot(y[:, None], x[None])
    sums = np.fft.irfft2(np.fft.rfft2(_border(plane), shape) * np.fft.rfft2(kernel), shape)
    return sums[: plane.shape[0], : plane.shape[1]].round(6)  # so that the first of equal ones is chosen


def degree_radii(
    crops: Sequence[Bool[Tensor, "_h _w"]],
    corners: Int[Tensor, "n 2"],
    centres: Float[Tensor, "n 2"],
    *,
    reach: Reach = "exact",
) -> Float[Tensor, "n 360"]:
    """Measures the distance from each centre to its mask's border at every integer degree.

    A pixel of the border covers the degrees between the directions of its four corners. Of several pixels at a degree
    the farthest one counts, so that concave parts are filled as seen from the centre.

    Args:
        crops: The masks, cropped to their tightest boxes.
        corners: x, y of the upper left corner of each crop.
        centres: x, y of each centre.
        reach: Where a pixel ends: where the ray leaves it ("exact"), or at its upper left "corner" (ESE-Seg; a pixel
            too short to the right and below, for which filling the outline's pixels compensates).

    Returns:
        Radii in pixels; NaN at degrees that no pixel covers.
    """
    _check_word("reach", reach, Reach)
    owners, points = _border_pixels(crops, corners)
    result = np.full((len(crops), DEGREES), np.nan)
    if not len(points):
        return torch.from_numpy(result).float()
    offsets = points - centres.double().numpy()[owners]
    around = offsets[None] + np.array([[0, 0], [1, 1], [0, 1], [1, 0]], np.float64)[:, None]
    angles = _degrees(around[..., 0], around[..., 1])
    if reach == "corner":
        first, last = np.ceil(angles.min(0)).astype(np.int64), np.ceil(angles.max(0)).astype(np.int64)
        wide = np.ptp(angles, axis=0).astype(np.int64) > 100  # the pixel extends across degree 0
        starts, counts = np.where(wide, last, first), np.where(wide, DEGREES - last + first, last - first)
    else:
        middle = _degrees(offsets[:, 0] + 0.5, offsets[:, 1] + 0.5)
        apart = (angles - middle + 180) % 360 - 180
        apart = np.where((around == 0).all(-1), 0, apart)  # a corner at the centre has no direction
        around_it = ((offsets > -1) & (offsets < 0)).all(1)  # the centre lies in the pixel
        starts = np.ceil(middle + apart.min(0) - 1e-9).astype(np.int64)  # both ends are included
        lasts = np.floor(middle + apart.max(0) + 1e-9).astype(np.int64)
        counts = np.where(around_it, DEGREES, lasts - starts + 1)
    which = np.repeat(np.arange(len(counts)), counts)
    degrees = (starts[which] + np.arange(len(which)) - (counts.cumsum() - counts)[which]) % DEGREES
    if reach == "corner":
        away = np.hypot(offsets[:, 0], offsets[:, 1])[which]
    else:
        ray = np.stack([np.cos(np.deg2rad(degrees)), -np.sin(np.deg2rad(degrees))], 1)
        along = np.abs(ray) < 1e-12  # such a ray leaves by the other two sides
        away = np.where(along, np.inf, (offsets[which] + (ray > 0)) / np.where(along, 1, ray)).min(1)
    flat = np.full(result.size, -1.0)
    np.maximum.at(flat, owners[which] * DEGREES + degrees, away)
    result = np.where(flat < 0, np.nan, flat).reshape(result.shape)
    return torch.from_numpy(result).float()


def close_gaps(radii: Float[Tensor, "n 360"]) -> Float[Tensor, "n 360"]:
    """Replaces NaN by the value of the next degree that has one, with wrap-around; zeros if there is none.

    (ESE-Seg's code intends the same, but passes degree and radius to its helper in the wrong order.)
    """
    steps = torch.arange(2 * DEGREES, device=radii.device)
    known = ~radii.isnan().repeat(1, 2)
    following = torch.where(known, steps, 2 * DEGREES).flip(1).cummin(1).values.flip(1)[:, :DEGREES]
    return radii.nan_to_num(0).gather(1, following % DEGREES)


# With more than a hundred polynomials on 360 equidistant directions some of their linear combinations nearly vanish in
# all directions: least squares then gives huge coefficients that cancel each other, and float32 loses the shape.
# Singular values below this share of the largest are dropped; up to 105 polynomials there are none.
CUTOFF = 1e-5


@cache
@torch.inference_mode(False)  # the cached tensors are used in training too, which does not accept inference tensors
def _chebyshev_basis(count: int, degrees: int) -> tuple[Tensor, Tensor]:
    """(degrees, count) values of the polynomials at equidistant points from -1 to 1, and (count, degrees) their
    pseudo-inverse (see CUTOFF)."""
    basis = np.polynomial.chebyshev.chebvander(np.linspace(-1, 1, degrees), count - 1)
    return torch.from_numpy(basis), torch.from_numpy(np.linalg.pinv(basis, rcond=CUTOFF))


def chebyshev_fit(radii: Float[Tensor, "*n d"], count: int = 18) -> Float[Tensor, "*n {count}"]:
    """Fits a Chebyshev polynomial to each row of radii by least squares.

    Args:
        radii: Values at equidistant directions.
        count: Number of coefficients: the degree of the polynomial plus 1.
    """
    _check_least("count", count)
    return radii @ _chebyshev_basis(count, radii.shape[-1])[1].T.to(radii)


def chebyshev_radii(coefficients: Float[Tensor, "*n c"], count: int = DEGREES) -> Float[Tensor, "*n {count}"]:
    """Evaluates Chebyshev polynomials at `count` equidistant directions."""
    return coefficients @ _chebyshev_basis(coefficients.shape[-1], count)[0].T.to(coefficients)


def degree_points(
    radii: Float[Tensor, "*n 360"], centres: Float[Tensor, "*n 2"], *, turn: float = 0.0
) -> Float[Tensor, "*n 360 2"]:
    """Converts radii to outlines with one point x, y per degree.

    Args:
        radii: Distances from the centres.
        centres: x, y of each centre.
        turn: Degrees by which the shape is rotated counter-clockwise. ESE-Seg's decoder rotates it by 1.
    """
    angles = torch.arange(DEGREES, device=radii.device, dtype=torch.float64 if radii.device.type == "cpu" else None)
    angles = torch.deg2rad(angles + turn)
    directions = torch.stack([angles.cos(), -angles.sin()], -1).to(radii)
    return centres[..., None, :] + radii[..., None] * directions


def encode_chebyshev(
    masks: Masks, count: int = 18, *, boxes: Float[Tensor, "n 4"] | None = None, reach: Reach = "exact"
) -> tuple[Float[Tensor, "n {count}"], Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """Encodes masks as Chebyshev coefficients (ESE-Seg, arXiv 1908.04067). Holes are filled and parts
    bridged, see `solid`. Runs on the CPU.

    Args:
        masks: N masks.
        count: Number of coefficients, 1 to 360; 18 as published.
        boxes: Boxes whose diagonals are the unit of the radii; default those of the masks.
        reach: Where radii end, see `degree_radii`.

    Returns:
        Coefficients, inner centres x, y, and which masks are not empty.

    Raises:
        UsageError: If `count` is out of range.
    """
    if not 1 <= count <= DEGREES:
        raise UsageError(f"count must be between 1 and {DEGREES}, the number of radii, got {count}")
    _check_word("reach", reach, Reach)
    frames, crops = solid(masks).crops()
    centres, _ = inner_centres(crops, frames[:, :2])
    radii = close_gaps(degree_radii(crops, frames[:, :2], centres, reach=reach))
    sides = frames.float() if boxes is None else boxes.detach().cpu().float()
    diagonals = (sides[:, 2:] - sides[:, :2]).norm(dim=1).clamp(min=1e-6)
    present = frames[:, 2] > frames[:, 0]
    return chebyshev_fit(radii / diagonals[:, None], count), centres, present


def solid(masks: Masks) -> Masks:
    """Converts each mask to one region without holes: parts are bridged, and of what remains separate the largest is
    kept.

    The bridge is ESE-Seg's: of each part, the border pixels that are the first or last of the mask in their row or
    column are taken in the order of the border, starting after its longest gap; parts are ordered by angle around their
    centre; all these pixels are filled as one polygon. The published code orders more than four parts at random for a
    shorter path; here they keep their order.
    """
    filled, parts = fill_holes(masks)
    several = parts > 1
    if not several.any():
        return filled
    chosen = several.nonzero().flatten()
    frames, crops = filled[chosen].crops()
    bridged = [torch.from_numpy(_bridged(crop.numpy())) for crop in crops]
    one = largest_parts(fill_holes(Masks.from_crops(bridged, frames[:, :2], masks.size))[0])
    order = torch.arange(len(masks))
    order[chosen] = len(masks) + torch.arange(len(chosen))
    return Masks.join([filled, one])[order]


def _bridged(crop: np.ndarray) -> np.ndarray:
    """A mask of several parts without holes, with the polygon that bridges them."""
    height, width = crop.shape
    rings = [_pixels_along(ring) for ring in trace(crop, 0, 0, joined=True)]
    flat = np.concatenate(rings)
    low, high = np.full((2, max(crop.shape)), np.iinfo(np.int64).max), np.full((2, max(crop.shape)), -1)
    for axis in (0, 1):  # first and last row (column) of each column (row)
        np.minimum.at(low[axis], flat[:, axis], flat[:, 1 - axis])
        np.maximum.at(high[axis], flat[:, axis], flat[:, 1 - axis])
    groups = []
    for ring in rings:
        outer = [
            (ring[:, 1 - axis] == low[axis][ring[:, axis]]) | (ring[:, 1 - axis] == high[axis][ring[:, axis]])
            for axis in (0, 1)
        ]
        points = ring[outer[0] | outer[1]]
        if len(points):
            gap = np.hypot(*(np.roll(points, -1, 0) - points).T).argmax()
            groups.append(np.roll(points, -int(gap) - 1, 0))
    ends = np.concatenate([[g[0], g[-1]] for g in groups])
    away = np.array([g[0] for g in groups]) - ends.mean(0)
    order = np.argsort(-_degrees(away[:, 0], away[:, 1]), kind="stable")  # rings run clockwise
    way = np.concatenate([groups[i] for i in order])
    painted = fill_contours(torch.from_numpy(way).float()[None], (height, width)).dense()[0].numpy()
    return crop | painted


def _pixels_along(ring: np.ndarray) -> np.ndarray:
    """The pixels x, y along the inner side of a ring, each once, in order."""
    corners = ring.astype(np.int64)
    steps = np.roll(corners, -1, 0) - corners
    lengths = np.abs(steps).sum(1)
    unit = np.repeat(np.sign(steps), lengths, 0)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    starts = np.repeat(corners, lengths, 0) + unit * within[:, None]
    # To the right of the path: below a step to the right, to the left of a step down.
    pixels = starts - np.stack([(unit[:, 0] < 0) | (unit[:, 1] > 0), (unit < 0).any(1)], 1)
    _, first = np.unique(pixels, axis=0, return_index=True)
    return pixels[np.sort(first)]


def _degrees(across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Directions in degrees: 0 is right, 90 up."""
    angles = np.rad2deg(np.arctan2(across, down) - np.pi / 2)
    return np.where(angles < 0, angles + 360, angles)


def decode_chebyshev(
    coefficients: Float[Tensor, "*n c"],
    centres: Float[Tensor, "*n 2"],
    boxes: Float[Tensor, "*n 4"],
    *,
    turn: float = 0.0,
) -> Float[Tensor, "*n 360 2"]:
    """Converts Chebyshev coefficients to outlines.

    Args:
        coefficients: Of radii divided by the diagonal of the box.
        centres: x, y of each inner centre.
        boxes: x0, y0, x1, y1; outlines are clipped to them.
        turn: Degrees by which outlines are rotated, see `degree_points`.

    Returns:
        360 points x, y per outline.
    """
    low, high = boxes[..., None, :2], boxes[..., None, 2:]
    radii = chebyshev_radii(coefficients) * (boxes[..., 2:] - boxes[..., :2]).norm(dim=-1, keepdim=True)
    return degree_points(radii, centres, turn=turn).maximum(low).minimum(high)


def _fast_length(least: int) -> int:
    """The next integer with no prime factors above 5, for which Fourier transforms are fast."""
    while True:
        rest = least
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return least
        least += 1


def _well_inside(plane: np.ndarray) -> np.ndarray:
    """Pixels whose 3 x 3 neighbourhood belongs to the mask; the plane has an empty margin."""
    rows = plane & np.roll(plane, 1, 0) & np.roll(plane, -1, 0)
    return rows & np.roll(rows, 1, 1) & np.roll(rows, -1, 1)


def _border(plane: np.ndarray) -> np.ndarray:
    """Pixels of the mask with one outside to the left, right, above or below; the plane has an empty margin."""
    inside = np.roll(plane, 1, 0) & np.roll(plane, -1, 0) & np.roll(plane, 1, 1) & np.roll(plane, -1, 1)
    return plane & ~inside


def _border_pixels(crops: Sequence[Tensor], corners: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Owners, and x, y of the upper left corners, of the border pixels of all masks."""
    owners, points = [np.zeros(0, np.int64)], [np.zeros((0, 2))]
    for number, (crop, corner) in enumerate(zip(crops, corners.tolist(), strict=True)):
        y, x = np.nonzero(_border(np.pad(crop.cpu().numpy(), 1)))
        owners.append(np.full(len(x), number))
        points.append(np.stack([x - 1.0 + corner[0], y - 1.0 + corner[1]], 1))
    return np.concatenate(owners), np.concatenate(points)


# ---- vertices (Deep Snake) ----------------------------------------------------------------------------------------

Longest = Literal["count", "length"]


def resample(
    points: Float[Tensor, "n v 2"],
    count: int,
    lengths: Int[Tensor, " n"] | None = None,
    *,
    longest: Longest = "count",
) -> Float[Tensor, "n {count} 2"]:
    """Resamples closed outlines to `count` points, evenly spaced on each edge (Deep Snake, arXiv 2001.01629).

    Every edge gets the rounded number of points for its share of the length, and at least one; missing points are added
    to the longest edge, surplus ones removed from the longest edges. The first point of an edge is its first end, so
    that vertices are kept. Of an outline with more than `count` vertices, only those with the longest edges are kept.

    Args:
        points: Vertices x, y.
        count: Number of points of the result.
        lengths: Number of vertices of each outline; default all.
        longest: Which edge counts as longest: the first of those with the largest rounded "count" (Deep Snake's
            network), or the last of those with the largest "length" (its targets).
    """
    _check_word("longest", longest, Longest)
    _check_least("count", count)
    size = points.shape[1]
    steps = torch.arange(size, device=points.device)
    if lengths is None:
        lengths = torch.full((points.shape[0],), size, device=points.device)
    valid = steps < lengths[:, None]
    cut = lengths > count
    if size > count:
        points, valid = _longest(points, valid, lengths, count)
        lengths = lengths.clamp(max=count)
    following = points.gather(1, _next(valid.shape[1], lengths)[..., None].expand(-1, -1, 2))
    edges = (following - points).norm(dim=-1).masked_fill(~valid, 0)  # (N, V)
    totals = torch.full_like(lengths, count)
    counts = torch.where(cut[:, None], valid.long(), _points_per_edge(edges, valid, totals, longest))
    places = torch.arange(count, device=points.device).expand(points.shape[0], -1).contiguous()
    return _points_at(points, following, counts, places)


def resample_from(
    points: Float[Tensor, "n v 2"], count: int, lengths: Int[Tensor, " n"], start: Float[Tensor, "n 2"]
) -> Float[Tensor, "n {count} 2"]:
    """Resamples closed outlines to `count` points from the point nearest to `start` on (Deep Snake's targets).

    The result is as if the outline were resampled to `count` times its number of vertices V, of which every V-th point
    is kept, starting with the nearest one. Vertices are therefore not kept.

    Args:
        points: Vertices x, y, in float64.
        count: Number of points of the result.
        lengths: Number of vertices of each outline.
        start: x, y that the first point shall be close to.
    """
    _check_least("count", count)
    size = points.shape[1]
    valid = torch.arange(size, device=points.device) < lengths[:, None]
    following = points.gather(1, _next(size, lengths)[..., None].expand(-1, -1, 2))
    steps = following - points
    edges = steps.norm(dim=-1).masked_fill(~valid, 0)
    totals = lengths * count
    counts = _points_per_edge(edges, valid, totals, "length")
    # On each edge the point nearest to `start`, then the nearest of those; the first of equal ones.
    part = ((start[:, None] - points) * steps).sum(-1) / edges.square().clamp(min=1e-30)
    place = (part * counts).round().long().minimum(counts - 1).clamp(min=0)
    nearest = points + steps * (place / counts.clamp(min=1)).to(points)[..., None]
    away = (nearest - start[:, None]).square().sum(-1).masked_fill(~valid, torch.inf)
    edge = away.argmin(1, keepdim=True)
    first = (counts.cumsum(1) - counts + place).gather(1, edge)
    places = (first + lengths[:, None] * torch.arange(count, device=points.device)) % totals[:, None]
    return _points_at(points, following, counts, places)


def _points_per_edge(
    edges: Float[Tensor, "n v"], valid: Bool[Tensor, "n v"], totals: Int[Tensor, " n"], longest: str
) -> Int[Tensor, "n v"]:
    whole = edges.sum(1, keepdim=True)
    share = torch.where(whole > 0, edges * (totals[:, None] / whole.clamp(min=1e-30)), 0)
    counts = share.round().long().clamp(min=1).masked_fill(~valid, 0)
    excess = counts.sum(1, keepdim=True) - totals[:, None]
    if longest == "count":
        order = counts.argsort(dim=1, stable=True, descending=True)
    else:
        order = edges.masked_fill(~valid, -1).argsort(dim=1, stable=True).flip(1)
    spare = (counts - 1).clamp(min=0).gather(1, order)
    taken = (excess - (spare.cumsum(1) - spare)).clamp(min=0).minimum(spare)
    counts = counts.scatter_add(1, order, -taken)
    return counts.scatter_add(1, order[:, :1], (-excess).clamp(min=0))


def _points_at(points: Tensor, following: Tensor, counts: Tensor, places: Tensor) -> Float[Tensor, "n k 2"]:
    ends = counts.cumsum(1)  # (N, V)
    edge = torch.searchsorted(ends, places, right=True).clamp(max=counts.shape[1] - 1)
    within = places - (ends - counts).gather(1, edge)
    part = (within / counts.gather(1, edge).clamp(min=1)).to(points)[..., None]
    first, second = (v.gather(1, edge[..., None].expand(-1, -1, 2)) for v in (points, following))
    return first + (second - first) * part


def _next(size: int, lengths: Tensor) -> Int[Tensor, "n v"]:
    following = torch.arange(1, size + 1, device=lengths.device).expand(lengths.shape[0], -1)
    return torch.where(following >= lengths[:, None], 0, following)


def _longest(points: Tensor, valid: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
    following = points.gather(1, _next(points.shape[1], lengths)[..., None].expand(-1, -1, 2))
    edges = (following - points).norm(dim=-1).masked_fill(~valid, -1)
    kept = edges.argsort(dim=1, stable=True).flip(1)[:, :count]
    # In their original order; padding comes last.
    kept = torch.where(valid.gather(1, kept), kept, points.shape[1]).sort(1).values
    valid = kept < points.shape[1]
    return points.gather(1, kept.clamp(max=points.shape[1] - 1)[..., None].expand(-1, -1, 2)), valid


# ---- rays and Fourier (PolarMask, FourierNet) --------------------------------------------------------------------
#
# The distance from any point to the outline in R directions: 0 degrees is down, 90 right, 180 up. Coordinates count
# pixels from the centre of the first one: an outline runs through the centres of the border's pixels.

MISSING = 1e-6  # length of a ray that does not meet the border
Border = Literal["pixels", "outline"]
_BESIDE = (0, 1, -1, 2, -2, 3, -3)  # degrees, relative to a ray's own, at which it looks for the border, in this order


def rays_from(
    contours: Contours,
    owners: Int[Tensor, " p"],
    origins: Float[Tensor, "p 2"],
    count: int = 36,
    *,
    border: Border = "pixels",
    budget: int = 256 << 20,
) -> Float[Tensor, "p {count}"]:
    """Measures the distance from each origin to the border of its mask in `count` directions (PolarMask, arXiv
    1909.13226, section 3.2).

    The direction of a border pixel is truncated to an integer degree. A ray has the length of the farthest pixel at its
    degree, so that concave parts and holes are filled as seen from the origin. A ray without any has length 1e-6.

    Args:
        contours: Borders of the masks.
        owners: Index of the mask of each origin.
        origins: x, y in pixels.
        count: Number of rays, a divisor of 360.
        border: The length of a ray without a pixel at its own degree. "pixels" (published): that of the first of the
            three degrees on either side that has one, without wrap-around at 0. Seen from close origins the pixels of a
            border are more than that apart, so that most rays of small objects have none. "outline": the border is a
            closed line, and a ray has the length at the nearest degree within the largest gap that adjacent pixels at
            that distance can have.
        budget: Bytes of temporary memory: about 60 for each pair of an origin and a pixel of its border.

    Returns:
        Lengths in pixels, on the device of the origins.

    Raises:
        UsageError: If `count` is not a divisor of 360 or `border` is unknown.
    """
    _check_word("border", border, Border)
    if count < 1 or 360 % count:
        raise UsageError(f"count must be a divisor of 360, got {count}")
    device = origins.device
    contours = contours.to(device)
    lengths, starts = contours.counts[owners], contours.starts[owners]
    # Degree d is column d + 3; columns 0 ... 2 and 364 ... 366 stay empty. Directions slightly below 0 may be rounded
    # to 360.
    table = origins.new_full((len(origins), 367), -1.0)
    filled = lengths.cumsum(0)
    first = 0
    while first < len(origins):
        room = budget // 60 + (int(filled[first - 1]) if first else 0)
        last = max(first + 1, int(torch.searchsorted(filled, room, right=True)))
        rows = slice(first, last)
        table[rows] = _farthest(contours.points, starts[rows], lengths[rows], origins[rows], table[rows])
        first = last
    degrees = torch.arange(0, 360, 360 // count, device=device)
    if border == "outline":
        return _bridged_degrees(table)[:, degrees]
    rays = origins.new_full((len(origins), count), -1.0)
    for beside in _BESIDE:
        rays = torch.where(rays < 0, table[:, degrees + 3 + beside], rays)
    return torch.where(rays < 0, MISSING, rays)


def _farthest(points: Tensor, starts: Tensor, lengths: Tensor, origins: Tensor, table: Tensor) -> Tensor:
    """The largest distance of a pixel at each degree, for each origin."""
    which = torch.repeat_interleave(torch.arange(len(origins), device=origins.device), lengths)
    place = torch.arange(len(which), device=origins.device) + (starts - lengths.cumsum(0) + lengths)[which]
    x, y = (points[place] - origins[which]).unbind(1)
    degree = torch.atan2(x, y) * 180 / torch.pi
    degree = torch.where(degree < 0, degree + 360, degree)
    # At exact multiples of 45 degrees the result must not depend on rounding, which differs between devices.
    certain = (x == 0) | (y == 0) | (x.abs() == y.abs())
    degree = torch.where(certain, degree.round(), degree).to(torch.int64)
    cells = which * table.shape[1] + degree + 3
    return table.flatten().scatter_reduce(0, cells, (x.square() + y.square()).sqrt(), "amax").view_as(table)


def _bridged_degrees(table: Tensor) -> Float[Tensor, "p 360"]:
    """The distance at every degree; that of the nearest filled degree where adjacent pixels can leave such a gap."""
    around = torch.cat([torch.maximum(table[:, 3:4], table[:, 363:364]), table[:, 4:363]], 1)
    around = around.repeat(1, 3)  # three times, so that the degrees in the middle have neighbours on both sides
    places = torch.arange(around.shape[1], device=table.device)
    before = torch.where(around >= 0, places, -1).cummax(1).values
    after = torch.where(around >= 0, places, 3 * 360).flip(1).cummin(1).values.flip(1)
    sides = []
    for nearest in (before, after):
        gap = (nearest - places).abs()[:, 360:720]
        value = around.gather(1, nearest.clamp(0, around.shape[1] - 1))[:, 360:720]
        # Pixels that touch at a corner are at most sqrt(2) / distance radians apart; truncation adds a degree.
        near = (value >= 0) & (gap <= (1 + 81.1 / value.clamp(min=0.1)).clamp(min=3))
        sides.append((value, torch.where(near, gap, 3 * 360)))
    (first, gap), (second, other) = sides
    rays = torch.where(gap <= other, first, second)
    return torch.where(torch.minimum(gap, other) < 3 * 360, rays, MISSING)


def ray_points(origins: Float[Tensor, "*n 2"], rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n r 2"]:
    """Converts rays to outlines, counter-clockwise on the screen.

    Args:
        origins: x, y in pixels.
        rays: Lengths in pixels.

    Returns:
        x, y of the end of each ray.
    """
    count = rays.shape[-1]
    angles = torch.arange(count, device=rays.device, dtype=rays.dtype) * (360 / count) / 180 * torch.pi
    return origins[..., None, :] + rays[..., None] * torch.stack([angles.sin(), angles.cos()], -1)


def encode_rays(
    masks: Masks, count: int = 36, *, border: Border = "pixels"
) -> tuple[Float[Tensor, "n {count}"], Float[Tensor, "n 2"]]:
    """Encodes masks as rays from their centres of mass.

    Args:
        masks: N masks.
        count: Number of rays, a divisor of 360.
        border: See `rays_from`.

    Returns:
        Rays, and centres x, y truncated to integers; zeros for an empty mask.
    """
    contours = outer_contours(masks)
    centres = contours.centres.nan_to_num(0).trunc().float()
    rays = rays_from(contours, torch.arange(len(masks)), centres, count, border=border)
    return rays * (contours.counts > 0)[:, None], centres


def fourier_rays(
    coefficients: Float[Tensor, "*n k 2"], count: int, longest: float = 14.0
) -> Float[Tensor, "*n {count}"]:
    """Converts Fourier coefficients of the logarithm of rays to rays: inverse transform, then exponential (FourierNet,
    arXiv 2002.02709).

    The transform is real and orthonormal: it uses the bins 0 ... count / 2, of the first and last only the real part.
    Missing coefficients are 0; further ones have no effect and no gradient.

    Args:
        coefficients: Real and imaginary parts.
        count: Number of rays.
        longest: Upper bound of the logarithms, so that the lengths stay finite.
    """
    bins = count // 2 + 1
    values = coefficients[..., :bins, :].float()
    if not values.numel():  # not every FFT library accepts empty input
        return values.sum((-2, -1))[..., None].expand(*values.shape[:-2], count)
    real = torch.zeros(values.shape[-2], dtype=torch.bool, device=values.device)
    real[0] = True
    if count % 2 == 0 and values.shape[-2] == bins:
        real[-1] = True
    imaginary = values[..., 1].masked_fill(real, 0)  # which FFT libraries treat differently
    if torch.compiler.is_exporting():  # which has no transforms of complex numbers
        logs = _inverse_transform(values[..., 0], imaginary, count)
        return logs.clamp(max=longest).exp()
    logs = torch.fft.irfft(torch.complex(values[..., 0], imaginary), n=count, norm="ortho")
    return logs.clamp(max=longest).exp()


def _inverse_transform(
    real: Float[Tensor, "*n k"], imaginary: Float[Tensor, "*n k"], count: int
) -> Float[Tensor, "*n {count}"]:
    """The orthonormal inverse of the real Fourier transform, as products with cosines and sines."""
    bins = real.shape[-1]
    angles = torch.outer(torch.arange(bins), torch.arange(count)) % count * (2 * torch.pi / count)  # (k, n)
    single = torch.arange(bins) * 2 % count == 0  # the first bin, and the last one of an even number of rays
    weight = torch.where(single, 1.0, 2.0)[:, None] / count**0.5
    cosines, sines = (weight * values for values in (angles.cos(), angles.sin()))
    return real @ cosines.to(real) - imaginary @ sines.to(real)


def fourier_coefficients(rays: Float[Tensor, "*n r"], keep: int) -> Float[Tensor, "*n {keep} 2"]:
    """Computes the first Fourier coefficients of the logarithm of rays.

    Args:
        rays: Lengths in pixels; clamp missing rays to about a pixel before, as their logarithms would dominate.
        keep: Number of coefficients.

    Returns:
        Real and imaginary parts.
    """
    if not rays.numel():
        return rays.float().new_zeros(*rays.shape[:-1], keep, 2)
    return torch.view_as_real(torch.fft.fft(rays.float().log(), norm="ortho")[..., :keep].contiguous())


# ---- arguments ---------------------------------------------------------------------------------------------------


def _check_word(name: str, value: str, words: Any) -> None:
    """Raises a UsageError if `value` is not one of the values of a Literal."""
    if value not in get_args(words):
        raise UsageError(f"{name} must be {' or '.join(map(repr, get_args(words)))}, got {value!r}")


def _check_least(name: str, value: int) -> None:
    """Raises a UsageError if `value` is below 1."""
    if value < 1:
        raise UsageError(f"{name} must be at least 1, got {value}")
