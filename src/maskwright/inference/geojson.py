"""Objects as GeoJSON (RFC 7946), as QuPath and geographic information systems read it.

Every object is a feature whose geometry is the exact outline of its mask along pixel borders: a Polygon with holes, or
a MultiPolygon if the mask has several parts. Coordinates are pixels, with (0, 0) the upper left corner of the image, or
those of the reference system of a geo-referenced image.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from maskwright.data.georeference import GeoReference
from maskwright.errors import DataError
from maskwright.files import AtomicFile
from maskwright.inference.seams import PlacedObjects
from maskwright.structures import runs
from maskwright.structures.drawing import PALETTE
from maskwright.structures.rle import Ints

ObjectType = Literal["detection", "annotation"]
Array = npt.NDArray[Any]


class GeoJsonStream:
    """A GeoJSON file that is written object by object and appears under its name when it is closed.

    Properties of a feature are those that QuPath reads: `objectType`, `classification` (name and colour) and
    `measurements` (score, area in pixels); and `number`, the value of the object in the label image.

    Args:
        path: The file. Missing folders are created.
        classes: Class names.
        georeference: Where the image is on the Earth; None for pixel coordinates.
        kind: What the objects are in QuPath.

    Attributes:
        path: The file.
        count: Number of objects so far.

    Raises:
        DataError: By all methods, if the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[str],
        georeference: GeoReference | None = None,
        kind: ObjectType = "detection",
    ):
        self.path, self.classes, self.kind = Path(path), tuple(classes), kind
        self.georeference = georeference
        self.count = 0
        self._started = False
        self._file = AtomicFile(self.path, DataError)
        crs = ""
        if georeference is not None and georeference.name is not None:
            crs = f'"crs":{{"type":"name","properties":{{"name":"{georeference.name}"}}}},\n'
        self._file.write(f'{{"type":"FeatureCollection",\n{crs}"features":['.encode())

    def add(self, objects: PlacedObjects) -> None:
        """Append objects, numbered from `count` + 1. Objects with empty masks are numbered, but not written."""
        texts: list[str] = []
        shapes = _geometries(objects, self.georeference)
        for row, shape in enumerate(shapes):
            self.count += 1
            if shape is None:
                continue
            label = int(objects.labels[row])
            measurements: dict[str, float] = {}
            if objects.scores is not None:
                measurements["score"] = round(float(objects.scores[row]), 6)
            if objects.masks is not None:
                starts, ends = objects.masks[row]
                measurements["area"] = int((ends - starts).sum())
            name = self.classes[label] if label < len(self.classes) else str(label)
            properties = {
                "objectType": self.kind,
                "number": self.count,
                "classification": {"name": name, "color": _colour(label)},
                "measurements": measurements,
            }
            texts.append(f'{{"type":"Feature","geometry":{shape},"properties":{json.dumps(properties)}}}')
        if texts:
            start = ",\n" if self._started else "\n"
            self._started = True
            self._file.write((start + ",\n".join(texts)).encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Complete the file."""
        self._file.write(b"\n]}\n")
        self._file.commit()

    def abandon(self) -> None:
        """Remove what was written, unless the file has been completed."""
        self._file.discard()


def _colour(label: int) -> list[int]:
    text = PALETTE[label % len(PALETTE)]
    return [int(text[at : at + 2], 16) for at in (1, 3, 5)]


def _geometries(objects: PlacedObjects, georeference: GeoReference | None) -> list[str | None]:
    """The geometry of each object as JSON; None for an empty one."""
    if objects.masks is None:
        return [_rectangle(box, georeference) for box in objects.boxes.astype(float)]
    lengths = [len(starts) for starts, _ in objects.masks]
    owner: Ints = np.repeat(np.arange(len(lengths)), lengths)
    nothing: Ints = np.zeros(0, np.int64)
    starts = np.concatenate([nothing, *(s for s, _ in objects.masks)])
    ends = np.concatenate([nothing, *(e for _, e in objects.masks)])
    return [
        _geometry(rings, georeference) for rings in runs.outlines(starts, ends, owner, len(lengths), objects.size[0])
    ]


def _rectangle(box: Array, georeference: GeoReference | None) -> str | None:
    x0, y0, x1, y1 = box
    return _geometry([np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])], georeference)


def _geometry(rings: Sequence[Array], georeference: GeoReference | None) -> str | None:
    """Rings as a Polygon or MultiPolygon."""
    simple = [part for ring in rings for part in _simple(ring)]
    areas = [_area(ring) for ring in simple]
    outer = [ring for ring, area in zip(simple, areas, strict=True) if area > 0]
    holes = [ring for ring, area in zip(simple, areas, strict=True) if area < 0]
    if not outer:
        return None
    texts = [[_coordinates(ring, georeference)] for ring in outer]
    for hole in holes:
        texts[_surrounding(hole, outer)].append(_coordinates(hole, georeference))
    polygons = [f"[{','.join(own)}]" for own in texts]
    if len(polygons) == 1:
        return f'{{"type":"Polygon","coordinates":{polygons[0]}}}'
    return f'{{"type":"MultiPolygon","coordinates":[{",".join(polygons)}]}}'


def _simple(ring: Array) -> list[Array]:
    """A ring that passes through a point twice, divided there: GIS libraries require rings without such points."""
    points: list[tuple[float, float]] = [(x, y) for x, y in ring.tolist()]
    if len(set(points)) == len(points):
        return [ring]
    parts: list[Array] = []
    open_points: list[tuple[float, float]] = []
    places: dict[tuple[float, float], int] = {}
    for point in points:
        if point in places:
            start = places[point]
            parts.append(np.array(open_points[start:]))
            for closed in open_points[start + 1 :]:
                del places[closed]
            del open_points[start + 1 :]
        else:
            places[point] = len(open_points)
            open_points.append(point)
    parts.append(np.array(open_points))
    return parts


def _area(ring: Array) -> float:
    """Twice the signed area: positive for rings that are clockwise on the screen."""
    x, y = ring[:, 0], ring[:, 1]
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def _surrounding(hole: Array, outer: Sequence[Array]) -> int:
    """The outer ring that a hole is in: the smallest one, if several surround it."""
    if len(outer) == 1:
        return 0
    # The centre of the uppermost pixel in the hole's first column.
    first = hole[np.lexsort((hole[:, 1], hole[:, 0]))[0]]
    x, y = float(first[0]) + 0.5, float(first[1]) + 0.5
    best, smallest = 0, np.inf
    for number, ring in enumerate(outer):
        one, other = ring, np.roll(ring, -1, 0)
        upright = (one[:, 0] == other[:, 0]) & (one[:, 0] > x)
        crossing = upright & ((one[:, 1] > y) != (other[:, 1] > y))
        area = _area(ring)
        if int(crossing.sum()) % 2 and area < smallest:
            best, smallest = number, area
    return best


def _coordinates(ring: Array, georeference: GeoReference | None) -> str:
    """A closed ring as JSON, counterclockwise where y points upwards, holes clockwise (RFC 7946, section 3.1.6)."""
    closed = np.concatenate([ring, ring[:1]])
    if georeference is None:
        return json.dumps(closed.tolist(), separators=(",", ":"))
    placed = georeference(closed)
    if georeference.mirrors:
        placed = placed[::-1]
    return "[" + ",".join(f"[{x:.12g},{y:.12g}]" for x, y in placed.tolist()) + "]"
