"""GeoJSON: outlines that fill to the mask, holes and parts, and coordinates of geo-referenced images."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from maskwright.data.georeference import GeoReference, read_georeference
from maskwright.inference.geojson import GeoJsonStream
from maskwright.inference.seams import PlacedObjects
from maskwright.structures import Instances, Masks

pytestmark = pytest.mark.fast


def objects(*planes: list[str]) -> PlacedObjects:
    dense = torch.tensor([[[c == "#" for c in row] for row in plane] for plane in planes])
    masks = Masks.from_dense(dense).pack()
    count = len(planes)
    return PlacedObjects.of(
        Instances(masks.size, masks.boxes(), torch.zeros(count, dtype=torch.int64), masks, torch.full((count,), 0.5))
    )


def written(path: Path, found: PlacedObjects, georeference: GeoReference | None = None) -> dict:
    stream = GeoJsonStream(path / "x.geojson", ("cell",), georeference)
    stream.add(found)
    stream.close()
    return json.loads((path / "x.geojson").read_text())


def area(ring) -> float:
    x, y = np.array(ring, float).T
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2


RING = ["#####", "#...#", "#.#.#", "#...#", "#####"]
PINCH = ["##...", "#.#..", "###..", ".....", ".....", "....#"][:5]


def test_holes_parts_and_touching_corners(tmp_path):
    document = written(tmp_path, objects(RING, PINCH, ["....."] * 5, ["#...#", *["....."] * 3, "..#.."]))
    assert document["type"] == "FeatureCollection"
    assert "crs" not in document
    features = document["features"]
    assert [f["properties"]["number"] for f in features] == [1, 2, 4], "an empty mask has no outline"
    assert features[0]["properties"] == {
        "objectType": "detection",
        "number": 1,
        "classification": {"name": "cell", "color": [3, 144, 255]},
        "measurements": {"score": 0.5, "area": 17},
    }
    ring = features[0]["geometry"]
    assert ring["type"] == "MultiPolygon", "an island in a hole is a part of its own"
    assert [len(polygon) for polygon in ring["coordinates"]] == [2, 1]
    assert [area(r) for r in ring["coordinates"][0]] == [25, -9]
    assert area(ring["coordinates"][1][0]) == 1
    pinch = features[1]["geometry"]
    for polygon in [pinch["coordinates"]] if pinch["type"] == "Polygon" else pinch["coordinates"]:
        for closed in polygon:
            assert closed[0] == closed[-1]
            assert len({tuple(p) for p in closed[:-1]}) == len(closed) - 1, "no ring passes through a point twice"
    assert [len(p) for p in features[2]["geometry"]["coordinates"]] == [1, 1, 1]


def test_coordinates_of_the_reference_system(tmp_path):
    reference = GeoReference(np.array([[0.5, 0, 500_000], [0, -0.5, 5_400_000]]), 32633)
    document = written(tmp_path, objects(["....", ".##.", "...."]), reference)
    assert document["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    (ring,) = document["features"][0]["geometry"]["coordinates"]
    assert sorted(map(tuple, ring[:-1])) == [
        (500_000.5, 5_399_999.0),
        (500_000.5, 5_399_999.5),
        (500_001.5, 5_399_999.0),
        (500_001.5, 5_399_999.5),
    ]
    assert area(ring) > 0, "counterclockwise, as RFC 7946 requires, although the map is mirrored"


def test_boxes_without_masks(tmp_path):
    bare = Instances((9, 9), torch.tensor([[1.5, 2, 4, 5]]), torch.tensor([3]), scores=torch.tensor([0.25]))
    (feature,) = written(tmp_path, PlacedObjects.of(bare))["features"]
    assert feature["geometry"]["coordinates"] == [[[1.5, 2], [4, 2], [4, 5], [1.5, 5], [1.5, 2]]]
    assert feature["properties"]["classification"]["name"] == "3"
    assert feature["properties"]["measurements"] == {"score": 0.25}


def geotiff(path: Path, tags: dict[int, tuple[str, tuple]]) -> Path:
    """A TIFF file of 2 x 2 pixels with further tags."""
    entries: dict[int, tuple[str, tuple]] = {
        256: ("H", (2,)), 257: ("H", (2,)), 258: ("H", (8,)), 259: ("H", (1,)), 262: ("H", (1,)), 273: ("I", (8,)),
        277: ("H", (1,)), 278: ("H", (2,)), 279: ("I", (4,)), **tags,
    }  # fmt: skip
    start, extra, table = 12, b"", b""
    after = start + 2 + 12 * len(entries) + 4
    for tag, (code, values) in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}{code}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack("<I", after + len(extra)), extra + packed
        table += struct.pack("<HHI", tag, {"H": 3, "I": 4, "d": 12}[code], len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", start) + bytes(4) + struct.pack("<H", len(entries))
    path.write_bytes(head + table + bytes(4) + extra)
    return path


SCALE = {33550: ("d", (2.0, 3.0, 0.0)), 33922: ("d", (1.0, 1.0, 0.0, 100.0, 200.0, 0.0))}


def keys(*entries: tuple[int, int]) -> dict[int, tuple[str, tuple]]:
    flat = [value for key, value in entries for value in (key, 0, 1, value)]
    return {34735: ("H", (1, 1, 0, len(entries), *flat))}


def test_georeference_of_tags(tmp_path):
    plain = read_georeference(geotiff(tmp_path / "a.tif", {**SCALE, **keys((1025, 1), (3072, 25832))}))
    assert plain.epsg == 25832
    assert plain(np.array([[1, 1], [0, 0], [2, 2]])).tolist() == [[100, 200], [98, 203], [102, 197]]
    assert plain.mirrors
    point = read_georeference(geotiff(tmp_path / "b.tif", {**SCALE, **keys((1025, 2), (2048, 4326))}))
    assert point.epsg == 4326
    assert point(np.array([[1.5, 1.5]])).tolist() == [[100, 200]], "coordinates of pixel centres"
    rows = (0.0, 2.0, 0.0, 10.0, 2.0, 0.0, 0.0, 20.0, *[0.0] * 7, 1.0)
    turned = read_georeference(geotiff(tmp_path / "c.tif", {34264: ("d", rows), **keys((3072, 32767))}))
    assert turned(np.array([[1, 3]])).tolist() == [[16, 22]]
    assert turned.epsg is None, "user-defined"
    assert read_georeference(geotiff(tmp_path / "d.tif", {33550: SCALE[33550]})) is None
    assert read_georeference(geotiff(tmp_path / "e.tif", {34264: ("d", (0.0,) * 16)})) is None
    assert read_georeference(tmp_path / "nothing.tif") is None
