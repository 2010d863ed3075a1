"""Windows of slides and TIFF files of many kinds are those of the whole image."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data.images import Reading, read_image, reading
from maskwright.data.slides import SeriesImage, SlideImage, is_slide, open_windows, read_in_windows
from maskwright.data.windows import WindowedImage
from maskwright.errors import ImageError

tifffile = pytest.importorskip("tifffile", reason="the extra slides is not installed")
pytestmark = pytest.mark.fast

RGB = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
DEEP = RGB.astype(np.uint16) * 257


def windows(path) -> torch.Tensor:
    image = open_windows(path)
    height, width = image.size
    rows = [
        torch.cat([image.window(x, y, min(40, width - x), min(30, height - y)) for x in range(0, width, 40)], 2)
        for y in range(0, height, 30)
    ]
    return torch.cat(rows, 1)


def same(image: torch.Tensor, array: np.ndarray) -> bool:
    return torch.equal(image, torch.from_numpy(array).permute(2, 0, 1))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_tiff_of_every_layout(tmp_path, big, planar, compression, tile):
    for name, values in (("8", RGB), ("16", DEEP)):
        data = values if planar == "contig" else np.ascontiguousarray(np.moveaxis(values, 2, 0))
        path = tmp_path / f"{name}.tif"
        layout = {"tile": tile} if tile else {"rowsperstrip": 16}
        tifffile.imwrite(
            path, data, photometric="rgb", planarconfig=planar, compression=compression, bigtiff=big, **layout
        )
        assert isinstance(open_windows(path), WindowedImage), "without a further library"
        assert same(windows(path), RGB)


def test_lzw_needs_no_further_library(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    assert same(windows(tmp_path / "lzw.tif"), RGB)


def test_bands_in_separate_images_of_an_ome_pyramid(tmp_path):
    path = tmp_path / "x.ome.tif"
    bands = np.ascontiguousarray(np.moveaxis(RGB, 2, 0))
    options = {"photometric": "minisblack", "tile": (32, 32), "compression": "zlib"}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(bands, metadata={"axes": "CYX"}, subifds=1, **options)
        file.write(bands[:, ::2, ::2], subfiletype=1, **options)
    image = open_windows(path)
    assert isinstance(image, SeriesImage)
    assert image.size == (70, 90), "the highest resolution"
    with reading(Reading(None, (3, 1, 2))):
        assert same(windows(path), RGB[:, :, [2, 0, 1]])
    with pytest.warns(UserWarning, match="has 3 bands; the first is read"):
        first = windows(path)
    assert torch.equal(first, read_image(path))


def test_missing_codecs_and_libraries_are_named(tmp_path, monkeypatch):
    path = tmp_path / "j.tif"
    tifffile.imwrite(path, RGB, photometric="rgb")
    data = bytearray(path.read_bytes())
    at = data.index((259).to_bytes(2, "little") + b"\x03\0")
    data[at + 8 : at + 10] = (33005).to_bytes(2, "little")
    path.write_bytes(data)
    if importlib.util.find_spec("imagecodecs") is None:
        with pytest.raises(ImageError, match=r"j\.tif: decoding APERIO_JP2000_RGB requires imagecodecs; run: pip"):
            open_windows(path)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImageError, match=r"are read by tifffile; run: pip install 'maskwright\[slides\]'"):
        open_windows(path)
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "x.svs").write_bytes(b"")
    with pytest.raises(ImageError, match=r"read by OpenSlide; run: pip install 'maskwright\[slides\]'"):
        open_windows(tmp_path / "x.svs")


def test_whole_slide_images(tmp_path):
    pytest.importorskip("openslide", reason="the extra slides is not installed")
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", tile=(32, 32))
    slide = tmp_path / "x.svs"
    shutil.copy(path, slide)
    assert is_slide(slide)
    assert read_in_windows(slide)
    assert not read_in_windows(path), "small images are decoded whole"
    image = open_windows(slide)
    assert isinstance(image, SlideImage)
    assert image.size == (70, 90)
    assert same(windows(slide), RGB)
    assert image.overview(100).shape == (3, 9, 12)
    (tmp_path / "broken.svs").write_bytes(b"nothing")
    with pytest.raises(ImageError, match="is not a whole-slide image that OpenSlide supports"):
        open_windows(tmp_path / "broken.svs")
    with pytest.raises(ImageError, match="no such file"):
        open_windows(tmp_path / "absent.svs")
