"""Where the pixels of a geo-referenced TIFF file are on the Earth (GeoTIFF 1.1)."""

# Pillow's tags have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskwright.data.deep_images import tiff_layout

_SCALE, _TIEPOINT, _TRANSFORMATION, _KEYS = 33550, 33922, 34264, 34735
_RASTER_TYPE, _GEOGRAPHIC, _PROJECTED = 1025, 2048, 3072
_POINT = 2  # the raster type in which coordinates refer to pixel centres
_USER_DEFINED = 32767


@dataclass(frozen=True)
class GeoReference:
    """An affine map from pixels to coordinates.

    Attributes:
        matrix: (2, 3): X and Y are this matrix times (x, y, 1), with (0, 0) the upper left corner of the image.
        epsg: EPSG code of the coordinate reference system; None if the file does not declare one.
    """

    matrix: npt.NDArray[np.float64]
    epsg: int | None = None

    def __call__(self, points: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Map points (P, 2), x and y in pixels, to coordinates (P, 2)."""
        return points @ self.matrix[:, :2].T + self.matrix[:, 2]

    @property
    def mirrors(self) -> bool:
        """Whether the map reverses the orientation of rings, as maps with north at the top do."""
        return bool(np.linalg.det(self.matrix[:, :2]) < 0)

    @property
    def name(self) -> str | None:
        """The reference system as a URN; None if it is not known."""
        return None if self.epsg is None else f"urn:ogc:def:crs:EPSG::{self.epsg}"


def read_georeference(path: str | Path) -> GeoReference | None:
    """Read the geo-reference of an image file.

    Args:
        path: The file.

    Returns:
        The reference; None if the file has none: it is no TIFF file, its tags are incomplete or damaged, or it has
        ground control points instead of an affine map.
    """
    try:
        with Path(path).open("rb") as file:
            layout = tiff_layout(file)
        if layout is None or layout.orientation != 1:
            return None
        matrix = _matrix(layout.tags)
        keys = _keys(layout.tags)
    except (OSError, ValueError, TypeError, IndexError):
        return None
    if matrix is None or not np.isfinite(matrix).all() or not np.linalg.det(matrix[:, :2]):
        return None
    if keys.get(_RASTER_TYPE) == _POINT:
        matrix[:, 2] -= matrix[:, :2] @ (0.5, 0.5)
    code = keys.get(_PROJECTED, keys.get(_GEOGRAPHIC))
    return GeoReference(matrix, code if code is not None and 1024 <= code < _USER_DEFINED else None)


def _matrix(tags: Any) -> npt.NDArray[np.float64] | None:
    """The map of the tags; None if they have none."""
    if _TRANSFORMATION in tags:
        whole = np.array(tags[_TRANSFORMATION], np.float64).reshape(4, 4)
        return whole[:2][:, [0, 1, 3]].copy()
    if _SCALE not in tags or _TIEPOINT not in tags:
        return None
    scale, tie = (np.array(tags[tag], np.float64) for tag in (_SCALE, _TIEPOINT))
    if len(scale) < 2 or len(tie) < 6:
        return None
    column, row, _, x, y, _ = tie[:6]
    return np.array([[scale[0], 0, x - column * scale[0]], [0, -scale[1], y + row * scale[1]]])


def _keys(tags: Any) -> dict[int, int]:
    """The GeoKeys whose values are short integers."""
    values = [int(v) for v in tags.get(_KEYS, ())]
    entries = (values[at : at + 4] for at in range(4, len(values) - 3, 4))
    return {key: value for key, location, count, value in entries if location == 0 and count == 1}
