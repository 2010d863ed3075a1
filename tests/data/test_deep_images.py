"""Images with more than 8 bits, with other bands than RGB, and with separate planes."""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import subprocess
import sys
import warnings
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data import DataWarning, read_image, read_size
from maskwright.data.images import common_white, probe, reading
from maskwright.data.pixel_values import range_end, to_8_bits
from maskwright.errors import ImageError
from maskwright.structures import Preprocess
from tests.data.tiffs import write_tiff

pytestmark = pytest.mark.fast
RNG = np.random.default_rng(0)


def values(bits: int, count: int = 1, size: tuple[int, int] = (20, 33)) -> np.ndarray:
    image = RNG.integers(0, 1 << bits, (*size, count)).astype(np.uint16)
    image[0, 0] = (1 << bits) - 1
    return image


def scaled(image: np.ndarray, white: int) -> np.ndarray:
    """(H, W, 3), the expected pixels."""
    grey = np.floor(image.astype(np.float64) * 255 / white + 0.5)
    return np.repeat(grey, 3, 2) if image.shape[2] < 3 else grey[..., :3]


def pixels(path: Path, **options) -> np.ndarray:
    return read_image(path, **options).permute(1, 2, 0).numpy()


def png(path: Path, image: np.ndarray, colour: int, significant: int | None = None) -> None:
    height, width, count = image.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    declared = b"" if significant is None else chunk(b"sBIT", bytes([significant] * count))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + declared + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


# ---- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_fewer_bits_in_16_bit_files_keep_all_their_levels(tmp_path: Path, bits: int, suffix: str):
    image = values(bits)
    Image.fromarray(image[..., 0]).save(tmp_path / f"a.{suffix}")
    with pytest.warns(DataWarning, match=f"uint16 values are scaled to 8 bits: {(1 << bits) - 1} becomes 255"):
        found = pixels(tmp_path / f"a.{suffix}")
    assert (found == scaled(image, (1 << bits) - 1)).all()


@pytest.mark.parametrize(("colour", "count"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_16_bit_png_of_every_colour_type(tmp_path: Path, colour: int, count: int):
    image = values(12, count)
    png(tmp_path / "a.png", image, colour)
    image = image[..., : 3 if count > 2 else 1]
    assert (pixels(tmp_path / "a.png", warn=False) == scaled(image, 4095)).all()
    png(tmp_path / "b.png", values(12, count), colour, significant=12)
    assert pixels(tmp_path / "b.png").max() == 255, "declared: no warning"


def test_declared_significant_bits_may_be_the_upper_or_the_lower_ones(tmp_path: Path):
    dark = values(12) // 8  # at most 511
    png(tmp_path / "lower.png", dark, 0, significant=12)
    png(tmp_path / "upper.png", dark << 4 | dark >> 8, 0, significant=12)
    lower, upper = pixels(tmp_path / "lower.png"), pixels(tmp_path / "upper.png")
    assert (lower == scaled(dark, 4095)).all()
    assert np.abs(lower.astype(int) - upper).max() <= 1


def test_the_range_of_a_set_is_that_of_all_its_files(tmp_path: Path):
    dark, bright = values(12) // 8, values(12)
    for name, image in (("dark", dark), ("bright", bright)):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{name}.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "usual.png")
    paths = [tmp_path / f"{name}.png" for name in ("usual", "dark", "bright", "missing")]
    assert common_white(paths) == 4095
    assert common_white(paths[:1]) is None
    assert (pixels(paths[1], white=common_white(paths)) == scaled(dark, 4095)).all()
    with reading(Preprocess(white=16383)):  # of the system; takes precedence
        assert (pixels(paths[1], white=4095) == scaled(dark, 16383)).all()


@pytest.mark.parametrize("declared", [4095, 3500])
def test_tiff_declares_its_largest_value(tmp_path: Path, declared: int):
    image = values(12) // 2
    write_tiff(tmp_path / "a.tif", image, extra={281: [declared]})
    assert (pixels(tmp_path / "a.tif") == scaled(image, 4095)).all()
    write_tiff(tmp_path / "b.tif", values(14), extra={281: [declared]})  # wrongly
    assert (pixels(tmp_path / "b.tif", warn=False).max()) == 255


@pytest.mark.parametrize("maximum", [1000, 4095, 65535])
@pytest.mark.parametrize(("kind", "count"), [("P5", 1), ("P6", 3)])
def test_netpbm_of_16_bits(tmp_path: Path, maximum: int, kind: str, count: int):
    image = np.minimum(values(12, count), maximum)
    (tmp_path / "a.ppm").write_bytes(f"{kind} 33 20 {maximum}\n".encode() + image.astype(">u2").tobytes())
    white = 4095 if maximum == 65535 else maximum
    assert (pixels(tmp_path / "a.ppm", warn=False) == scaled(image, white)).all()
    (tmp_path / "b.ppm").write_bytes((tmp_path / "a.ppm").read_bytes()[:-9])
    with pytest.raises(ImageError, match="truncated"):
        read_image(tmp_path / "b.ppm")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([0.0, 0.5, 1.0]), [0, 128, 255]),
        (np.array([0.0, 0.5, 1.0], np.float16), [0, 128, 255]),
        (np.array([0.0, 100.4, 255.0]), [0, 100, 255]),
        (np.array([False, True]), [0, 255]),
        (np.array([0, 7, 255], np.int64), [0, 7, 255]),
        (np.array([0, 65535], ">u2"), [0, 255]),
        (np.array([0, 4095], np.int32), [0, 255]),
        (np.array([0, 1023], ">u4"), [0, 255]),
    ],
)
def test_values_of_every_type(given: np.ndarray, expected: list[int]):
    assert to_8_bits(given, "x", warn=False).tolist() == expected


@pytest.mark.parametrize("given", [[-1], [70000], [-0.1], [256.0], [np.nan], [np.inf], [1j]])
def test_values_of_unknown_range_are_refused(given: list):
    with pytest.raises(ImageError, match=r"^x: "):
        to_8_bits(np.array(given), "x")


def test_values_above_white_are_cut_off_with_a_warning():
    with pytest.warns(DataWarning, match="above 1023, the value of white, are cut off"):
        assert to_8_bits(np.array([1023, 2000], np.uint16), "x", white=1023).tolist() == [255, 255]


def test_ranges():
    assert [range_end(v) for v in (0, 255, 256, 1023, 1024, 4095, 4096, 16383, 16384, 65535)] == [
        255, 255, 1023, 1023, 4095, 4095, 16383, 16383, 65535, 65535
    ]  # fmt: skip


# ---- TIFF ------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "f2", "f4", "f8"])
def test_tiff_of_every_layout(tmp_path: Path, kind: str, count: int):
    dtype, path = np.dtype(kind), tmp_path / "a.tif"
    white = 1 if dtype.kind == "f" else 255 if dtype.itemsize == 1 else 4095
    image = (RNG.random((37, 41, count)) * white).astype(dtype)
    image[0, 0] = white
    for planar, deflate, order, tile in product((False, True), (False, True), "<>", (0, 16)):
        for predictor in ((1, 3) if dtype.kind == "f" else (1, 2)) if deflate else (1,):
            write_tiff(path, image, planar=planar, deflate=deflate, order=order, tile=tile, predictor=predictor)
            assert (pixels(path, warn=False) == scaled(image, white)).all(), (planar, deflate, order, tile, predictor)
            assert read_size(path) == (37, 41)
            assert probe(path) == ((37, 41), (37, 41))


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_tiff_of_packed_bits_declares_its_range(tmp_path: Path, bits: int):
    for count, planar in ((1, False), (3, False), (3, True)):
        image = values(bits, count) // 2
        write_tiff(tmp_path / "a.tif", image, bits=bits, planar=planar)
        assert (pixels(tmp_path / "a.tif") == scaled(image, (1 << bits) - 1)).all()


def test_lzw_compressed_tiff(tmp_path: Path):
    image = values(12)
    Image.fromarray(image[..., 0]).save(tmp_path / "a.tif", compression="tiff_lzw")
    assert (pixels(tmp_path / "a.tif", warn=False) == scaled(image, 4095)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_orientation_for_8_and_16_bits(tmp_path: Path, orientation: int):
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(grey).save(tmp_path / "a.png", exif=_exif(orientation))
    expected = read_image(tmp_path / "a.png")
    for name, image in (("8.tif", grey), ("16.tif", grey.astype(np.uint16))):
        Image.fromarray(image).save(tmp_path / name, tiffinfo={0x0112: orientation})
        assert torch.equal(read_image(tmp_path / name, warn=False), expected)
        assert read_size(tmp_path / name) == tuple(expected.shape[1:])


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_zero_is_white_and_cmyk(tmp_path: Path):
    write_tiff(tmp_path / "a.tif", np.array([[[0], [65535]]], np.uint16), photometric=0)
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == [255, 0]
    write_tiff(tmp_path / "b.tif", np.array([[[0, 0, 0, 0], [0, 65535, 65535, 0]]], np.uint16), photometric=5)
    assert pixels(tmp_path / "b.tif")[0].tolist() == [[255, 255, 255], [255, 0, 0]]


@pytest.mark.parametrize(("count", "kind"), [(8, "u2"), (8, "u1"), (5, "u1"), (4, "u2")])
@pytest.mark.parametrize("planar", [False, True])
def test_other_bands_than_rgb_are_named_and_can_be_chosen(tmp_path: Path, count: int, kind: str, planar: bool):
    image = (values(8, count) if kind == "u1" else values(16, count)).astype(kind)
    write_tiff(tmp_path / "a.tif", image, photometric=1, planar=planar)
    with pytest.raises(ImageError, match=f"a.tif: has {count} bands of {8 if kind == 'u1' else 16}-bit .*resize.bands"):
        read_image(tmp_path / "a.tif")
    found = pixels(tmp_path / "a.tif", bands=(4, 3, 1))
    assert (found == scaled(image[..., [3, 2, 0]], 255 if kind == "u1" else 65535)).all()
    with reading(Preprocess(bands=(2,))):
        assert pixels(tmp_path / "a.tif").shape == (20, 33, 1)
    with pytest.raises(ImageError, match=f"has {count} bands, but band 9 is to be read"):
        read_image(tmp_path / "a.tif", bands=(9, 1, 1))


def test_three_bands_without_declared_colours_are_rgb(tmp_path: Path):
    for image in (values(8, 3).astype(np.uint8), values(16, 3)):
        write_tiff(tmp_path / "a.tif", image, photometric=1)
        assert (pixels(tmp_path / "a.tif") == scaled(image, np.iinfo(image.dtype).max)).all()


def test_unsupported_tiff_is_named_for_what_it_is(tmp_path: Path):
    write_tiff(tmp_path / "a.tif", values(10), bits=10, extra={266: [2]})
    with pytest.raises(ImageError, match="contains 10-bit unsigned integer values with reversed bits, which is not"):
        read_image(tmp_path / "a.tif")
    write_tiff(tmp_path / "b.tif", np.array([[[-3]]], np.int16))
    with pytest.raises(ImageError, match="int16 values from -3 to -3, whose range is unknown"):
        read_image(tmp_path / "b.tif")


def test_damaged_tiff_gives_an_image_or_an_error(tmp_path: Path):
    for planar, deflate in product((False, True), repeat=2):
        write_tiff(tmp_path / "whole.tif", values(12, 3), planar=planar, deflate=deflate, tile=16)
        whole = (tmp_path / "whole.tif").read_bytes()
        for number in range(25):
            rotten = bytearray(whole)
            for at in RNG.integers(len(whole) - 300, len(whole), 3):
                rotten[at] = RNG.integers(256)
            (tmp_path / "bad.tif").write_bytes(rotten[: len(rotten) - number * 9])
            with contextlib.suppress(ImageError):
                assert read_image(tmp_path / "bad.tif", 1 << 20, warn=False).shape[0] == 3


def test_libraries_print_nothing(tmp_path: Path):
    Image.fromarray(values(8, 3).astype(np.uint8)).save(tmp_path / "a.tif", compression="tiff_lzw")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[40:60] = b"\xff" * 20
    (tmp_path / "a.tif").write_bytes(data)
    write_tiff(tmp_path / "b.tif", values(8, 8).astype(np.uint8), photometric=1)
    script = (
        "import sys\nfrom maskwright.data import read_image\nfrom maskwright.errors import ImageError\n"
        "for path in sys.argv[1:]:\n    try: read_image(path)\n    except ImageError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.tif", tmp_path / "b.tif"], capture_output=True, text=True
    )
    assert run.stderr == ""
    assert "has 8 bands" in run.stdout
    assert logging.getLogger("PIL").handlers


def test_metadata_after_the_pixels_of_a_png(tmp_path: Path):
    file = io.BytesIO()
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(file, "PNG", exif=_exif(6))
    data = file.getvalue()
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + struct.unpack(">I", data[at : at + 4])[0]]
    end = data.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(data[:at] + data[at + len(chunk) : end] + chunk + data[end:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_size(tmp_path / "a.png") == (3, 2) == tuple(read_image(tmp_path / "a.png").shape[1:])
