"""Windows of an image file have the pixels of the whole image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data import DataWarning, read_image
from maskwright.data.images import Reading, reading
from maskwright.data.windows import WindowedImage, is_huge
from maskwright.errors import ImageError
from tests.data.tiffs import write_tiff

pytestmark = pytest.mark.fast

SIZE = (61, 47)  # width, height


def picture(mode: str) -> Image.Image:
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.integers(-3, 4, (SIZE[1], SIZE[0], 4)), 1) * 5 + 128
    base = Image.fromarray(smooth.clip(0, 255).astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    if mode == "CMYK":
        return base.convert("RGB").convert("CMYK")
    return base.convert("RGB").quantize(20) if mode == "P" else base.convert(mode)


def check(path):
    whole = read_image(path)
    image = WindowedImage(path)
    assert image.size == tuple(whole.shape[1:])
    height, width = image.size
    windows = [
        (x, y, min(20, width - x), min(16, height - y)) for y in range(0, height, 11) for x in range(0, width, 13)
    ]
    for x, y, w, h in sorted(windows, key=lambda window: image.order(*window)):
        assert torch.equal(image.window(x, y, w, h), whole[:, y : y + h, x : x + w]), (x, y, w, h)
    assert torch.equal(image.window(3, 2, 9, 8), whole[:, 2:10, 3:12]), "back to the start"
    assert torch.equal(image.overview(height * width), whole)
    assert torch.equal(image.overview(height * width // 4 + 9), whole[:, ::2, ::2])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_png(mode, tmp_path):
    picture(mode).save(tmp_path / "a.png")
    check(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff(mode, compression, tmp_path):
    options = {"tiffinfo": {278: 10}} if compression is None else {"strip_size": 700}
    picture(mode).save(tmp_path / "a.tif", compression=compression, **({} if compression is None else options))
    check(tmp_path / "a.tif")


def test_tiff_with_a_predictor_or_jpeg(tmp_path):
    picture("RGB").save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo={317: 2})
    check(tmp_path / "a.tif")
    picture("L").save(tmp_path / "b.tif", compression="jpeg", quality=90)
    check(tmp_path / "b.tif")


@pytest.mark.parametrize("name", ["a.bmp", "a.ppm", "a.pgm"])
def test_rows(name, tmp_path):
    picture("L" if name == "a.pgm" else "RGB").save(tmp_path / name)
    check(tmp_path / name)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_orientations(orientation, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture("RGB").save(tmp_path / name, exif=exif)
    check(tmp_path / name)


@pytest.mark.filterwarnings("ignore::maskwright.data.DataWarning")
@pytest.mark.parametrize("largest", [900, 4095, 16000, 65535])
def test_deep_values_have_one_range_in_all_windows(largest, tmp_path):
    """The largest value lies in one corner only."""
    values = np.random.default_rng(0).integers(0, largest // 3, (SIZE[1], SIZE[0]), np.uint16)
    values[-1, -1] = largest
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    write_tiff(tmp_path / "b.tif", np.stack([values, values // 2, values // 3], 2), tile=16, deflate=True, order=">")
    for name in ("a.png", "a.tif", "b.tif"):
        check(tmp_path / name)
        assert read_image(tmp_path / name).max() > 200
    with reading(Reading(white=4095)):
        check(tmp_path / "a.png")
        check(tmp_path / "b.tif")


def test_packed_and_float_values(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (SIZE[1], SIZE[0], 1), np.uint16)
    write_tiff(tmp_path / "a.tif", values, bits=12)
    check(tmp_path / "a.tif")
    write_tiff(tmp_path / "b.tif", values.astype(np.float32) / 4095, tile=16)
    with pytest.warns(DataWarning, match="float values"):
        check(tmp_path / "b.tif")
    values[:20] = 0
    write_tiff(tmp_path / "c.tif", values.astype(np.float32) / 50, tile=16)
    with pytest.raises(ImageError, match=r"c\.tif: contains float values in other ranges"):
        WindowedImage(tmp_path / "c.tif").window(0, 0, 16, 16)


def test_bands(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 1024, (SIZE[1], SIZE[0], 6), np.uint16)
    values[0, 0] = 1000
    write_tiff(tmp_path / "a.tif", values)
    write_tiff(tmp_path / "b.tif", values.astype(np.uint8), tile=16)
    for name in ("a.tif", "b.tif"):
        with pytest.raises(ImageError, match="6 bands of"):
            WindowedImage(tmp_path / name).window(0, 0, 9, 9)
        with reading(Reading(white=1023, bands=(6, 2, 1, 5))):
            check(tmp_path / name)
        assert not is_huge(tmp_path / name)
    monkeypatch.setattr("maskwright.data.windows.MAX_PIXELS", 1000)
    assert is_huge(tmp_path / "a.tif")
    assert is_huge(tmp_path / "b.tif")
    write_tiff(tmp_path / "c.tif", values, planar=True)
    monkeypatch.undo()
    with reading(Reading(white=1023, bands=(6, 2, 1, 5))):
        check(tmp_path / "c.tif")


def test_other_formats_are_refused_with_advice(tmp_path):
    picture("RGB").save(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="windows of JPEG files cannot be read; convert it to a tiled TIFF"):
        WindowedImage(tmp_path / "a.jpg")


def test_truncated_files(tmp_path):
    for name in ("a.png", "a.tif", "a.bmp"):
        picture("RGB").save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        short = data[: len(data) * 2 // 3] if name != "a.tif" else data[:-1500]
        (tmp_path / name).write_bytes(short)
        with pytest.raises(ImageError, match=name):
            WindowedImage(tmp_path / name).window(0, 0, *SIZE)
