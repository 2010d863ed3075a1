"""Shapes as short codes of their outline, and back: rays, Fourier, Chebyshev, vertices.

Polygons are (P, 2) points x, y in continuous coordinates: pixel (i, j) covers [j, j + 1) x [i, i + 1).
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
# The distance to the outline, seen from an inner centre, at each whole degree (0 is right, 90 up, counter-clockwise on
# the screen), as a polynomial over -1 ... 1.

DEGREES = 360
Reach = Literal["exact", "corner"]


def inner_centres(
    crops: Sequence[Bool[Tensor, "_h _w"]], corners: Int[Tensor, "n 2"]
) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """A point x, y inside each mask, and whether it lies well inside, with the eight pixels around it.

    The middle of the tightest box if that lies well inside; else the pixel (its upper left corner) that does and has
    the smallest sum of distances to all pixels of the border. Where none lies well inside, the best of all pixels. The
    masks are crops, tight, with their upper left corners (x, y) at `corners`.
    """
    centres, found = [], []
    for crop in crops:
        plane = np.pad(crop.cpu().numpy(), 1)
        height, width = crop.shape
        if not plane.any():
            centres.append((width / 2, height / 2))
            found.append(False)
            continue
        well = _well_inside(plane)
        if well[height // 2 + 1, width // 2 + 1]:
            centres.append((width / 2, height / 2))
            found.append(True)
            continue
        candidates = well if well.any() else plane
        sums = np.where(candidates, distance_sums(plane), np.inf)
        y, x = divmod(int(sums.argmin()), plane.shape[1])
        centres.append((x - 1.0, y - 1.0))
        found.append(bool(well.any()))
    points = torch.tensor(centres, dtype=torch.float64).reshape(-1, 2) + corners
    return points.float(), torch.tensor(found, dtype=torch.bool)


def distance_sums(plane: np.ndarray) -> np.ndarray:
    """At each pixel of a bool plane the sum of the distances to all pixels of the mask's border."""
    shape = (_fast_length(2 * plane.shape[0]), _fast_length(2 * plane.shape[1]))
    y, x = (np.fft.fftfreq(n, 1 / n) for n in shape)
    kernel = np.hypot(y[:, None], x[None])
    sums = np.fft.irfft2(np.fft.rfft2(_border(plane), shape) * np.fft.rfft2(kernel), shape)
    return sums[: plane.shape[0], : plane.shape[1]].round(6)  # so that of equal ones the first is taken


def degree_radii(
    crops: Sequence[Bool[Tensor, "_h _w"]],
    corners: Int[Tensor, "n 2"],
    centres: Float[Tensor, "n 2"],
    *,
    reach: Reach = "exact",
) -> Float[Tensor, "n 360"]:
    """The distance from each centre to its mask's border at every whole degree; NaN where no pixel covers a degree.

    A pixel of the border covers the degrees between the directions of its four corners; of several pixels the farthest
    counts, so that concave parts are filled as seen from the centre.

    reach  how far away a pixel is: where the ray leaves it ("exact"), or its upper left "corner" whatever the direction
           (ESE-Seg; too near by a pixel to the right and below, which painting the outline's pixels makes good)
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
        wide = np.ptp(angles, axis=0).astype(np.int64) > 100  # it lies across degree 0
        starts, counts = np.where(wide, last, first), np.where(wide, DEGREES - last + first, last - first)
    else:
        middle = _degrees(offsets[:, 0] + 0.5, offsets[:, 1] + 0.5)
        apart = (angles - middle + 180) % 360 - 180
        apart = np.where((around == 0).all(-1), 0, apart)  # a corner at the centre has no direction
        around_it = ((offsets > -1) & (offsets < 0)).all(1)  # the centre lies in the pixel
        starts = np.ceil(middle + apart.min(0) - 1e-9).astype(np.int64)  # both ends belong to it
        lasts = np.floor(middle + apart.max(0) + 1e-9).astype(np.int64)
        counts = np.where(around_it, DEGREES, lasts - starts + 1)
    which = np.repeat(np.arange(len(counts)), counts)
    degrees = (starts[which] + np.arange(len(which)) - (counts.cumsum() - counts)[which]) % DEGREES
    if reach == "corner":
        away = np.hypot(offsets[:, 0], offsets[:, 1])[which]
    else:
        ray = np.stack([np.cos(np.deg2rad(degrees)), -np.sin(np.deg2rad(degrees))], 1)
        along = np.abs(ray) < 1e-12  # it leaves by the other sides; a pixel beside it touches it with one of its own
        away = np.where(along, np.inf, (offsets[which] + (ray > 0)) / np.where(along, 1, ray)).min(1)
    flat = np.full(result.size, -1.0)
    np.maximum.at(flat, owners[which] * DEGREES + degrees, away)
    result = np.where(flat < 0, np.nan, flat).reshape(result.shape)
    return torch.from_numpy(result).float()


def close_gaps(radii: Float[Tensor, "n 360"]) -> Float[Tensor, "n 360"]:
    """NaNs replaced by the value of the next degree that has one, going round; zeros where there is none at all.

    (ESE-Seg's code means the same, but hands its helper degree and radius in the wrong order.)
    """
    steps = torch.arange(2 * DEGREES, device=radii.device)
    there = ~radii.isnan().repeat(1, 2)
    following = torch.where(there, steps, 2 * DEGREES).flip(1).cummin(1).values.flip(1)[:, :DEGREES]
    return radii.nan_to_num(0).gather(1, following % DEGREES)


# Beyond a hundred polynomials over 360 directions, equally far apart, some of their sums all but vanish in every one of
# these: least squares then asks for huge coefficients that cancel each other, and float32 keeps nothing of the shape.
# Sums that are so much fainter than the strongest one are left out; up to 105 polynomials there are none.
FAINTEST = 1e-5


@cache
@torch.inference_mode(False)  # what is kept serves training too, which takes no tensor of inference mode
def _chebyshev_basis(count: int, degrees: int) -> tuple[Tensor, Tensor]:
    """(degrees, count) values of the polynomials, -1 and 1 included, and (count, degrees) their inverse, the shortest
    coefficients where several fit as well (see FAINTEST)."""
    basis = np.polynomial.chebyshev.chebvander(np.linspace(-1, 1, degrees), count - 1)
    return torch.from_numpy(basis), torch.from_numpy(np.linalg.pinv(basis, rcond=FAINTEST))


def chebyshev_fit(radii: Float[Tensor, "*n d"], count: int = 18) -> Float[Tensor, "*n {count}"]:
    """The `count` coefficients of the polynomial nearest to each row, by least squares over its directions."""
    _check_least("count", count, "a code has at least 1 coefficient")
    return radii @ _chebyshev_basis(count, radii.shape[-1])[1].T.to(radii)


def chebyshev_radii(coefficients: Float[Tensor, "*n c"], count: int = DEGREES) -> Float[Tensor, "*n {count}"]:
    """The polynomial in `count` directions."""
    return coefficients @ _chebyshev_basis(coefficients.shape[-1], count)[0].T.to(coefficients)


def degree_points(
    radii: Float[Tensor, "*n 360"], centres: Float[Tensor, "*n 2"], *, turn: float = 0.0
) -> Float[Tensor, "*n 360 2"]:
    """The outline that lies so far from each centre, one point at each degree.

    turn  degrees by which the shape is turned counter-clockwise: ESE-Seg's decoder turns it by 1
    """
    angles = torch.arange(DEGREES, device=radii.device, dtype=torch.float64 if radii.device.type == "cpu" else None)
    angles = torch.deg2rad(angles + turn)
    directions = torch.stack([angles.cos(), -angles.sin()], -1).to(radii)
    return centres[..., None, :] + radii[..., None] * directions


def encode_chebyshev(
    masks: Masks, count: int = 18, *, boxes: Float[Tensor, "n 4"] | None = None, reach: Reach = "exact"
) -> tuple[Float[Tensor, "n {count}"], Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """Coefficients of radii over the diagonal of the boxes (the masks' own, if none are given), the inner centres, and
    which masks have any pixel at all. Holes vanish and parts are bridged: see `solid`. On the host.

    count  1 ... 360, 18 as published
    """
    if not 1 <= count <= DEGREES:
        raise UsageError(f"count is {count}; expected 1 ... {DEGREES} coefficients for {DEGREES} radii")
    _check_word("reach", reach, Reach)
    frames, crops = solid(masks).crops()
    centres, _ = inner_centres(crops, frames[:, :2])
    radii = close_gaps(degree_radii(crops, frames[:, :2], centres, reach=reach))
    sides = frames.float() if boxes is None else boxes.detach().cpu().float()
    diagonals = (sides[:, 2:] - sides[:, :2]).norm(dim=1).clamp(min=1e-6)
    there = frames[:, 2] > frames[:, 0]
    return chebyshev_fit(radii / diagonals[:, None], count), centres, there


def solid(masks: Masks) -> Masks:
    """Each mask as one region without holes: parts are bridged, and of what is then still apart the largest stays.

    The bridge (ESE-Seg's): of each part those border pixels that are the first or last of the mask in their row or
    column, in the order of the border and cut where it leaves the outline for longest; parts follow each other around
    their middle; all that is filled as one polygon. Theirs shuffles more than four parts to make the way shorter, by
    chance; here they stay in order.
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
    """A mask of several parts without holes, and the polygon around them."""
    height, width = crop.shape
    rings = [_pixels_along(ring) for ring in trace(crop, 0, 0, joined=True)]
    flat = np.concatenate(rings)
    low, high = np.full((2, max(crop.shape)), np.iinfo(np.int64).max), np.full((2, max(crop.shape)), -1)
    for axis in (0, 1):  # of each column (row) the first and last row (column)
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
    """The pixels (x, y) on the inner side of a ring along their borders, each once, in order."""
    corners = ring.astype(np.int64)
    steps = np.roll(corners, -1, 0) - corners
    lengths = np.abs(steps).sum(1)
    unit = np.repeat(np.sign(steps), lengths, 0)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    starts = np.repeat(corners, lengths, 0) + unit * within[:, None]
    # To the right of the way: below one that goes right, left of one that goes down.
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
    """Outlines, clipped to the boxes, whose diagonals are the coefficients' unit."""
    low, high = boxes[..., None, :2], boxes[..., None, 2:]
    radii = chebyshev_radii(coefficients) * (boxes[..., 2:] - boxes[..., :2]).norm(dim=-1, keepdim=True)
    return degree_points(radii, centres, turn=turn).maximum(low).minimum(high)


def _fast_length(least: int) -> int:
    """The next number that is a product of twos, threes and fives, which Fourier transforms are quick for."""
    while True:
        rest = least
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return least
        least += 1


def _well_inside(plane: np.ndarray) -> np.ndarray:
    """Pixels all of whose 3 x 3 neighbourhood belongs to the mask; the plane has an empty margin."""
    rows = plane & np.roll(plane, 1, 0) & np.roll(plane, -1, 0)
    return rows & np.roll(rows, 1, 1) & np.roll(rows, -1, 1)


def _border(plane: np.ndarray) -> np.ndarray:
    """Pixels of the mask with one outside to the left, right, above or below; the plane has an empty margin."""
    inside = np.roll(plane, 1, 0) & np.roll(plane, -1, 0) & np.roll(plane, 1, 1) & np.roll(plane, -1, 1)
    return plane & ~inside


def _border_pixels(crops: Sequence[Tensor], corners: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Whose they are, and x, y (upper left corners) of the border pixels of all masks."""
    owners, points = [np.zeros(0, np.int64)], [np.zeros((0, 2))]
    for number, (crop, corner) in enumerate(zip(crops, corners.tolist(), strict=True)):
        y, x = np.nonzero(_border(np.pad(crop.cpu().numpy(), 1)))
        owners.append(np.full(len(x), number))
        points.append(np.stack([x - 1.0 + corner[0], y - 1.0 + corner[1]], 1))
    return np.concatenate(owners), np.concatenate(points)


# ---- vertices (DeepSnake) ----------------------------------------------------------------------------------------

Longest = Literal["count", "length"]


def resample(
    points: Float[Tensor, "n v 2"],
    count: int,
    lengths: Int[Tensor, " n"] | None = None,
    *,
    longest: Longest = "count",
) -> Float[Tensor, "n {count} 2"]:
    """Closed outlines with `count` points each, spread evenly along them, from V points or the first `lengths` of V.

    Every edge gets as many points as its share of the length says, rounded, and at least one; what is then missing goes
    to the longest edge, what is too much is taken from the longest ones. Points start at the edge's first end, which is
    therefore kept. Of outlines with more than `count` points those stay whose edges are longest, and nothing else.

    longest  which edge that is: the first of those with the largest rounded "count" (DeepSnake's network), or the
             largest "length", the last of equal ones (DeepSnake's targets)
    """
    _check_word("longest", longest, Longest)
    _check_least("count", count, "an outline has at least 1 point")
    size = points.shape[1]
    steps = torch.arange(size, device=points.device)
    if lengths is None:
        lengths = torch.full((len(points),), size, device=points.device)
    there = steps < lengths[:, None]
    cut = lengths > count
    if size > count:
        points, there = _longest(points, there, lengths, count)
        lengths = lengths.clamp(max=count)
    following = points.gather(1, _next(there.shape[1], lengths)[..., None].expand(-1, -1, 2))
    edges = (following - points).norm(dim=-1).masked_fill(~there, 0)  # (N, V)
    totals = torch.full_like(lengths, count)
    counts = torch.where(cut[:, None], there.long(), _points_per_edge(edges, there, totals, longest))
    places = torch.arange(count, device=points.device).expand(len(points), -1).contiguous()
    return _points_at(points, following, counts, places)


def resample_from(
    points: Float[Tensor, "n v 2"], count: int, lengths: Int[Tensor, " n"], near: Float[Tensor, "n 2"]
) -> Float[Tensor, "n {count} 2"]:
    """The same, for outlines of any number of points, beginning at the place nearest to `near` (DeepSnake's targets).

    The outline is first cut into `count` times as many points as it has; of those the nearest is the first, and every
    so many-th is kept. None but those are ever made. Corners of the outline are thus not kept. Give float64.
    """
    _check_least("count", count, "an outline has at least 1 point")
    size = points.shape[1]
    there = torch.arange(size, device=points.device) < lengths[:, None]
    following = points.gather(1, _next(size, lengths)[..., None].expand(-1, -1, 2))
    steps = following - points
    edges = steps.norm(dim=-1).masked_fill(~there, 0)
    totals = lengths * count
    counts = _points_per_edge(edges, there, totals, "length")
    # On each edge the place nearest to `near`, then the nearest of those; the first of equal ones.
    part = ((near[:, None] - points) * steps).sum(-1) / edges.square().clamp(min=1e-30)
    place = (part * counts).round().long().minimum(counts - 1).clamp(min=0)
    found = points + steps * (place / counts.clamp(min=1)).to(points)[..., None]
    away = (found - near[:, None]).square().sum(-1).masked_fill(~there, torch.inf)
    edge = away.argmin(1, keepdim=True)
    start = (counts.cumsum(1) - counts + place).gather(1, edge)
    places = (start + lengths[:, None] * torch.arange(count, device=points.device)) % totals[:, None]
    return _points_at(points, following, counts, places)


def _points_per_edge(
    edges: Float[Tensor, "n v"], there: Bool[Tensor, "n v"], totals: Int[Tensor, " n"], longest: str
) -> Int[Tensor, "n v"]:
    whole = edges.sum(1, keepdim=True)
    share = torch.where(whole > 0, edges * (totals[:, None] / whole.clamp(min=1e-30)), 0)
    counts = share.round().long().clamp(min=1).masked_fill(~there, 0)
    excess = counts.sum(1, keepdim=True) - totals[:, None]
    if longest == "count":
        order = counts.argsort(dim=1, stable=True, descending=True)
    else:
        order = edges.masked_fill(~there, -1).argsort(dim=1, stable=True).flip(1)
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
    following = torch.arange(1, size + 1, device=lengths.device).expand(len(lengths), -1)
    return torch.where(following >= lengths[:, None], 0, following)


def _longest(points: Tensor, there: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
    following = points.gather(1, _next(points.shape[1], lengths)[..., None].expand(-1, -1, 2))
    edges = (following - points).norm(dim=-1).masked_fill(~there, -1)
    kept = edges.argsort(dim=1, stable=True).flip(1)[:, :count]
    # Back in their own order; rows with fewer points have their padding last.
    kept = torch.where(there.gather(1, kept), kept, points.shape[1]).sort(1).values
    there = kept < points.shape[1]
    return points.gather(1, kept.clamp(max=points.shape[1] - 1)[..., None].expand(-1, -1, 2)), there


# ---- rays and Fourier (PolarMask, FourierNet) --------------------------------------------------------------------
#
# The distance to the outline, seen from any place, in R directions: 0 degrees is straight down, 90 right, 180 up. Here
# coordinates count pixels, from the centre of the first: an outline runs through the centres of the border's pixels.

MISSING = 1e-6  # the length of a ray that meets nothing
Border = Literal["pixels", "outline"]
_BESIDE = (0, 1, -1, 2, -2, 3, -3)  # degrees beside a ray's own where the border is looked for, in this order


def rays_from(
    contours: Contours,
    owners: Int[Tensor, " p"],
    origins: Float[Tensor, "p 2"],
    count: int = 36,
    *,
    border: Border = "pixels",
    budget: int = 256 << 20,
) -> Float[Tensor, "p {count}"]:
    """The distance from each origin to the border of its mask `owners` in `count` directions, on the origins' device.

    A border pixel lies in the whole degree below its direction. A ray takes the farthest pixel of its own degree, so
    that concave parts and rings are filled, as seen from the origin. A ray that meets nothing has length 1e-6.

    border  what a ray does whose own degree is empty. "pixels" (published): it takes the first of the three degrees
            beside it that is not. Near origins see a border pixel every four degrees or more, and most rays of a small
            object then meet nothing. There is no going round either: beside 0 lies nothing. "outline": the border is a
            closed line, and a ray takes the nearest degree, as far away as neighbouring pixels can be at that distance
    budget  bytes of scratch: about 60 for each pair of an origin and a pixel of its border
    """
    _check_word("border", border, Border)
    if count < 1 or 360 % count:
        raise UsageError(f"count is {count}; rays must share 360 degrees evenly, so give a divisor of 360, at least 1")
    device = origins.device
    contours = contours.to(device)
    lengths, starts = contours.counts[owners], contours.starts[owners]
    # Pixels in degree d lie in column d + 3; columns that no direction has stay empty. 360 is what rounding makes of
    # directions a hair below 0.
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
    """For each origin the farthest of its pixels in each degree."""
    which = torch.repeat_interleave(torch.arange(len(origins), device=origins.device), lengths)
    place = torch.arange(len(which), device=origins.device) + (starts - lengths.cumsum(0) + lengths)[which]
    x, y = (points[place] - origins[which]).unbind(1)
    degree = torch.atan2(x, y) * 180 / torch.pi
    degree = torch.where(degree < 0, degree + 360, degree)
    # Right on a multiple of 45 degrees rounding must not decide, which differs from device to device.
    certain = (x == 0) | (y == 0) | (x.abs() == y.abs())
    degree = torch.where(certain, degree.round(), degree).to(torch.int64)
    cells = which * table.shape[1] + degree + 3
    return table.flatten().scatter_reduce(0, cells, (x.square() + y.square()).sqrt(), "amax").view_as(table)


def _bridged_degrees(table: Tensor) -> Float[Tensor, "p 360"]:
    """Every degree's distance, empty ones taken from the nearest filled one if pixels side by side leave such a gap."""
    around = torch.cat([torch.maximum(table[:, 3:4], table[:, 363:364]), table[:, 4:363]], 1)
    around = around.repeat(1, 3)  # the degrees three times, so that the middle ones have neighbours on both sides
    places = torch.arange(around.shape[1], device=table.device)
    before = torch.where(around >= 0, places, -1).cummax(1).values
    after = torch.where(around >= 0, places, 3 * 360).flip(1).cummin(1).values.flip(1)
    sides = []
    for nearest in (before, after):
        gap = (nearest - places).abs()[:, 360:720]
        value = around.gather(1, nearest.clamp(0, around.shape[1] - 1))[:, 360:720]
        # Two pixels that touch at a corner are seen at most sqrt(2) / distance apart; a degree is lost to cutting.
        near = (value >= 0) & (gap <= (1 + 81.1 / value.clamp(min=0.1)).clamp(min=3))
        sides.append((value, torch.where(near, gap, 3 * 360)))
    (first, gap), (second, other) = sides
    rays = torch.where(gap <= other, first, second)
    return torch.where(torch.minimum(gap, other) < 3 * 360, rays, MISSING)


def ray_points(origins: Float[Tensor, "*n 2"], rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n r 2"]:
    """The ends x, y of rays of these lengths: the outline as a polygon, counter-clockwise on the screen."""
    count = rays.shape[-1]
    angles = torch.arange(count, device=rays.device, dtype=rays.dtype) * (360 / count) / 180 * torch.pi
    return origins[..., None, :] + rays[..., None] * torch.stack([angles.sin(), angles.cos()], -1)


def encode_rays(
    masks: Masks, count: int = 36, *, border: Border = "pixels"
) -> tuple[Float[Tensor, "n {count}"], Float[Tensor, "n 2"]]:
    """The rays of each mask from its mass centre (cut to whole pixels), and that centre; zeros for an empty mask."""
    contours = outer_contours(masks)
    centres = contours.centres.nan_to_num(0).trunc().float()
    rays = rays_from(contours, torch.arange(len(masks)), centres, count, border=border)
    return rays * (contours.counts > 0)[:, None], centres


def fourier_rays(
    coefficients: Float[Tensor, "*n k 2"], count: int, longest: float = 14.0
) -> Float[Tensor, "*n {count}"]:
    """Rays from the Fourier coefficients (real, imaginary) of their LOG length: inverse transform, then exp. A log is
    cut at `longest`, so that a wild guess stays finite.

    The transform is real and orthonormal: it reads the bins 0 ... count / 2, of the first and last only the real part.
    Fewer coefficients stand for zeros in the others; of more, those beyond say nothing and get no gradient.
    """
    bins = count // 2 + 1
    values = coefficients[..., :bins, :].float()
    if not values.numel():  # not every library transforms nothing
        return values.sum((-2, -1))[..., None].expand(*values.shape[:-2], count)
    real = torch.zeros(values.shape[-2], dtype=torch.bool, device=values.device)
    real[0] = True
    if count % 2 == 0 and values.shape[-2] == bins:
        real[-1] = True
    imaginary = values[..., 1].masked_fill(real, 0)  # libraries differ in what they make of these
    logs = torch.fft.irfft(torch.complex(values[..., 0], imaginary), n=count, norm="ortho")
    return logs.clamp(max=longest).exp()


def fourier_coefficients(rays: Float[Tensor, "*n r"], keep: int) -> Float[Tensor, "*n {keep} 2"]:
    """The first `keep` coefficients (real, imaginary) of the log of these rays. Missing rays are deep notches in the
    log: raise them to a pixel or so before."""
    if not rays.numel():
        return rays.float().new_zeros(*rays.shape[:-1], keep, 2)
    return torch.view_as_real(torch.fft.fft(rays.float().log(), norm="ortho")[..., :keep].contiguous())


# ---- arguments ---------------------------------------------------------------------------------------------------


def _check_word(name: str, value: str, words: Any) -> None:
    """UsageError for a word that is none of a Literal's."""
    if value not in get_args(words):
        raise UsageError(f"{name} is {value!r}; expected {' or '.join(get_args(words))}")


def _check_least(name: str, value: int, why: str) -> None:
    if value < 1:
        raise UsageError(f"{name} is {value}; {why}")
