"""Images of every kind become 8-bit RGB; damaged ones are errors that name the file and the problem."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data import DataWarning, read_image, read_size
from maskwright.data.images import probe
from maskwright.errors import ImageError
from tests.data.making import pixels

pytestmark = pytest.mark.fast


def array(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_rgb_is_unchanged(tmp_path: Path):
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    assert (array(tmp_path / "a.png") == pixels()).all()
    assert read_size(tmp_path / "a.png") == (40, 60)


@pytest.mark.parametrize(("name", "format_name"), [("a.jpg", "PNG"), ("a.png", "JPEG"), ("no_extension", "PNG")])
def test_the_format_is_detected_from_the_content(tmp_path: Path, name: str, format_name: str):
    Image.fromarray(pixels()).save(tmp_path / name, format_name)
    assert np.abs(array(tmp_path / name).astype(int) - pixels()).mean() < 3


def test_16_bit_grey_is_scaled_over_its_full_range(tmp_path: Path):
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = array(tmp_path / "a.png")
    assert (found[..., 0] == np.round(values / 257)).all()
    assert (found[..., 0] == found[..., 2]).all()


def test_1_bit_becomes_black_and_white(tmp_path: Path):
    Image.fromarray(pixels()).convert("1").save(tmp_path / "a.png")
    assert set(np.unique(array(tmp_path / "a.png"))) == {0, 255}


def test_grey_becomes_three_equal_channels(tmp_path: Path):
    Image.fromarray(pixels()[..., 0]).save(tmp_path / "a.png")
    assert (array(tmp_path / "a.png") == pixels()[..., :1]).all()


def test_alpha_is_dropped_and_the_stored_colour_is_kept(tmp_path: Path):
    alpha = np.full((40, 60, 1), 255, np.uint8)
    alpha[:, :20] = 0
    Image.fromarray(np.concatenate([pixels(), alpha], 2)).save(tmp_path / "a.png")
    assert (array(tmp_path / "a.png") == pixels()).all()


def test_a_palette_with_a_transparent_entry(tmp_path: Path):
    image = Image.fromarray(pixels()).quantize(16)
    image.save(tmp_path / "a.png", transparency=3)
    assert (array(tmp_path / "a.png") == np.asarray(image.convert("RGB"))).all()


def test_cmyk_keeps_its_colours(tmp_path: Path):
    Image.fromarray(pixels()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(array(tmp_path / "a.jpg").astype(int) - pixels()).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_image_and_size(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels()).save(tmp_path / "a.png", exif=exif)
    wanted = {
        1: pixels(),
        2: pixels()[:, ::-1],
        3: pixels()[::-1, ::-1],
        4: pixels()[::-1],
        5: pixels().transpose(1, 0, 2),
        6: np.rot90(pixels(), -1),
        7: pixels()[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels()),
    }[orientation]
    assert (array(tmp_path / "a.png") == wanted).all()
    assert read_size(tmp_path / "a.png") == wanted.shape[:2]


def test_an_animation_is_read_as_its_first_frame_with_a_warning(tmp_path: Path):
    frames = [Image.fromarray(pixels(seed=n)).quantize(32) for n in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(DataWarning, match=r"a\.gif: is animated; the first frame is used"):
        found = array(tmp_path / "a.gif")
    assert (found == np.asarray(frames[0].convert("RGB"))).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_extreme_shapes(tmp_path: Path, size: tuple[int, int]):
    Image.fromarray(pixels(*size)).save(tmp_path / "a.png")
    assert array(tmp_path / "a.png").shape[:2] == size


def test_an_oversized_header_is_an_error(tmp_path: Path):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )
    for read in (read_image, read_size, probe):
        with pytest.raises(ImageError, match=r"bomb\.png: the header declares 60000 x 60000 pixels"):
            read(tmp_path / "bomb.png")


@pytest.mark.thorough
@pytest.mark.parametrize("size", [(6000, 16000), (14000, 14000)])
def test_large_images_below_the_limit_cause_no_warning(tmp_path: Path, size: tuple[int, int]):
    Image.new("1", size[::-1]).save(tmp_path / "a.png")  # Pillow's own open would warn or refuse
    assert read_size(tmp_path / "a.png") == size


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", r"the file is empty \(0 bytes\)"),
        (lambda data: b"<!DOCTYPE html><title>404</title>", "not a supported image .it starts with '<!DOCTYPE ht'"),
        (lambda data: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a supported image"),
        (lambda data: data[: len(data) * 55 // 100], "truncated .*copy it again or remove it"),
        (lambda data: data[:20], "damaged"),
        (lambda data: data[:3], "damaged|truncated"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, damage, words: str):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "bad.jpg").write_bytes(damage((tmp_path / "whole.jpg").read_bytes()))
    for read in (read_image, probe):
        with pytest.raises(ImageError, match=f"bad.jpg: .*({words})"):
            read(tmp_path / "bad.jpg")


def test_random_byte_errors_give_an_image_or_an_error(tmp_path: Path):
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "gif", "bmp", "tiff", "webp"):
        Image.fromarray(pixels(64, 64)).save(tmp_path / f"whole.{suffix}")
        whole = np.frombuffer((tmp_path / f"whole.{suffix}").read_bytes(), np.uint8)
        for _ in range(12):
            rotten = whole.copy()
            rotten[rng.integers(len(whole), size=8)] = rng.integers(256, size=8)
            (tmp_path / f"bad.{suffix}").write_bytes(rotten.tobytes())
            with contextlib.suppress(ImageError):
                assert read_image(tmp_path / f"bad.{suffix}", max_pixels=1 << 20).shape[0] == 3


def test_trailing_bytes_are_ignored(tmp_path: Path):
    Image.fromarray(pixels()).save(tmp_path / "a.jpg")
    whole = array(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"junk" * 99)
    assert (array(tmp_path / "a.jpg") == whole).all()
    assert probe(tmp_path / "a.jpg") == ((40, 60), (40, 60))


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="is a folder, expected an image file"):
        read_image(tmp_path)


def test_float_images_are_scaled_or_an_error(tmp_path: Path):
    grey = pixels()[..., 0].astype(np.float32)
    for values, words in ((grey, "taken as 0 ... 255"), (grey / 255, "0 ... 1 becomes 0 ... 255")):
        Image.fromarray(values).save(tmp_path / "a.tiff")
        with pytest.warns(DataWarning, match=words):
            assert (array(tmp_path / "a.tiff")[..., 0] == grey).all()
    Image.fromarray(grey * 30).save(tmp_path / "a.tiff")
    with pytest.raises(ImageError, match=r"float values of unknown range, up to .*; convert it to 8 or 16 bits"):
        read_image(tmp_path / "a.tiff")
