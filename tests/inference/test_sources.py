"""Images of every kind, in files and in memory, become one image."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data import DataWarning
from maskwright.errors import ImageError, UsageError
from maskwright.inference.sources import Item, is_single, items, read, reading_of
from maskwright.structures import Preprocess
from tests.data.tiffs import write_tiff

pytestmark = pytest.mark.fast

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
GREY = np.arange(600, dtype=np.uint8).reshape(20, 30)


def image_of(source, **preprocess) -> torch.Tensor:
    assert is_single(source)
    (item,) = items(source, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return read(item, Preprocess(**preprocess))


class Pipe:
    """A file object that can be neither searched nor read twice."""

    def __init__(self, data: bytes):
        self.data = data

    def read(self) -> bytes:
        data, self.data = self.data, b""
        return data


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_one_image_from_every_source(tmp_path: Path):
    data = encoded(Image.fromarray(RGB))
    unloaded = Image.open(io.BytesIO(data))
    (tmp_path / "a.png").write_bytes(data)
    chw = torch.from_numpy(RGB).permute(2, 0, 1)
    with (tmp_path / "a.png").open("rb") as file:
        at_end = io.BytesIO(data)
        at_end.seek(0, io.SEEK_END)
        for source in [
            tmp_path / "a.png", str(tmp_path / "a.png"), unloaded, Image.fromarray(RGB), data,
            bytearray(data), memoryview(data), io.BytesIO(data), file, Pipe(data), at_end,
            RGB, np.asfortranarray(RGB), RGB[::-1, ::-1][::-1, ::-1], np.dstack([RGB, GREY]), RGB / 255,
            RGB.astype(np.float32), RGB.astype(np.int64), RGB.astype(np.uint16) * np.uint16(257),
            (RGB.astype(np.uint16) * 257).astype(">u2"), chw, chw / 255, chw.float(), chw.int(),
            (chw / 255).double().requires_grad_(), chw.half() / 255,
            Image.fromarray(RGB).convert("RGBA"), Image.fromarray(RGB).convert("RGBX"),
        ]:  # fmt: skip
            image = image_of(source)
            assert image.dtype == torch.uint8
            assert torch.equal(image, chw), type(source)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "PA", "La", "RGBa"]
)
def test_a_pil_image_of_every_mode_equals_its_colours(mode: str):
    image = Image.fromarray(GREY).convert("L")
    if mode in ("I;16", "I"):
        image = Image.fromarray(GREY.astype(np.uint16 if mode == "I;16" else np.int32) * (257 if mode == "I" else 1))
    elif mode == "F":
        image = Image.fromarray(GREY.astype(np.float32) / 255)
    elif mode in ("La", "RGBa"):
        image = image.convert("LA" if mode == "La" else "RGBA").convert(mode)
    elif mode != "L":
        image = Image.fromarray(RGB).convert(mode) if mode in ("P", "CMYK", "YCbCr", "1") else image.convert(mode)
    assert image.mode == mode
    expected = np.asarray(image.convert("RGB")) if mode in ("P", "CMYK", "YCbCr", "1") else np.dstack([GREY] * 3)
    assert np.abs(image_of(image).permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    if mode == "P":
        image.info["transparency"] = 3
        assert (image_of(image).permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tif", "pil", "unloaded", "array", "tensor", "I", "float"])
def test_deep_images_from_every_source(tmp_path: Path, bits: int, kind: str):
    white = (1 << bits) - 1
    deep = np.round(np.linspace(0, 1, 600) * white).astype(np.uint16).reshape(20, 30)
    path = tmp_path / f"a.{'png' if kind == 'unloaded' else kind}"
    image = Image.fromarray(deep)
    if kind in ("png", "tif", "unloaded"):
        image.save(path)
    source = {
        "png": path, "tif": path, "pil": image, "array": deep, "tensor": torch.from_numpy(deep),
        "I": Image.fromarray(deep.astype(np.int32)), "float": deep / white,
    }.get(kind) if kind != "unloaded" else Image.open(io.BytesIO(path.read_bytes()))  # fmt: skip
    expected = np.floor(deep / white * 255 + 0.5)
    found = image_of(source)
    assert (found[0].numpy() == expected).all()
    assert torch.equal(found[0], found[2])
    silent = kind in ("png", "tif") and bits == 16  # the usual range of 16-bit files
    with warnings.catch_warnings() if silent else pytest.warns(DataWarning):
        read(items(source, False)[0], Preprocess())


def test_the_systems_range_applies_to_every_source(tmp_path: Path):
    deep = np.full((4, 4), 1000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", deep, Image.fromarray(deep), torch.from_numpy(deep), deep.astype(float)):
        (item,) = items(source, False)
        preprocess = Preprocess(white=4095)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            item = Item(item.path, item.given, reading_of([item], preprocess))
            assert set(read(item, preprocess).unique().tolist()) == {62}


def test_files_of_a_folder_have_one_range(tmp_path: Path):
    for number, value in enumerate((200, 4000)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"{number}.png")
    found = items(tmp_path, False)
    with pytest.warns(DataWarning, match="hold 12-bit values: 4095 becomes 255"):
        rules = reading_of(found, Preprocess())
    assert rules.white == 4095
    assert [int(read(Item(i.path, None, rules), Preprocess()).max()) for i in found] == [12, 249]


def test_a_16_bit_colour_tiff_that_pil_has_not_decoded(tmp_path: Path):
    write_tiff(tmp_path / "a.tif", np.full((4, 4, 3), 300, np.uint16))
    assert int(image_of(tmp_path / "a.tif").max()) == 75, "as 10 bits"
    assert int(image_of(Image.open(io.BytesIO((tmp_path / "a.tif").read_bytes()))).max()) == 75


def test_the_orientation_of_a_pil_image_is_left_to_the_caller(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert image_of(tmp_path / "a.png").shape == (3, 30, 20)
    assert image_of((tmp_path / "a.png").read_bytes()).shape == (3, 30, 20)
    loaded = Image.open(io.BytesIO((tmp_path / "a.png").read_bytes()))
    loaded.load()
    for image in (Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())), loaded):
        with pytest.warns(DataWarning, match="EXIF orientation of a PIL image is not applied"):
            assert read(items(image, False)[0], Preprocess()).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (17, "got int"),
        (None, "got NoneType"),
        ({"a.jpg": 1}, "got dict"),
        (lambda: 1, "got function"),
        ([RGB, 5], "got int"),
        ([RGB, [None]], "got NoneType"),
        ([[1, 2], [3, 4]], "got int"),
    ],
)
def test_wrong_kinds_are_refused_at_once(source, says):
    with pytest.raises(UsageError, match=f"images must be a path.*{says}"):
        items(source, False)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.zeros(8), r"shape \(H, W, C\)"),
        (np.zeros((2, 2), complex), "real numbers"),
        (np.array([[object()]]), "real numbers"),
        (np.zeros((3, 20, 30), np.uint8), "channels last"),
        (torch.zeros(20, 30, 3), "channels first"),
        (torch.zeros(4), r"shape \(C, H, W\)"),
    ],
)
def test_arrays_that_cannot_be_images_are_refused_at_once(source, says):
    for given in (source, [RGB, source]):
        with pytest.raises(ImageError, match=says):
            items(given, False)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"", "empty"),
        (b"GIF87a no image", "damaged|truncated"),
        (io.StringIO("text"), "text mode"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.full((4, 4), -1), "range is unknown"),
        (np.full((4, 4), 1 << 20), "range is unknown"),
        (torch.full((3, 4, 4), 300.0), "unknown range"),
    ],
)
def test_values_that_cannot_be_read_are_an_error(source, says):
    with pytest.raises(ImageError, match=says):
        image_of(source)


def test_columns_of_paths_are_lists(tmp_path: Path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    names = np.array([str(tmp_path / "a.png")] * 2)
    assert not is_single(names)
    assert [item.path for item in items(names, False)] == [tmp_path / "a.png"] * 2
    assert len(list(items((n for n in names), False))) == 2
