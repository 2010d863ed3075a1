"""Every system of the registry as one graph: decoding with a fixed number of rows is that of the system."""

from __future__ import annotations

import copy
import errno
import inspect
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import maskwright as mw
from maskwright.data.scenes import Scenes
from maskwright.errors import CheckpointError, MissingExtraError, UsageError
from maskwright.inference.exporting import checking, filling, graphs, panoptic
from maskwright.inference.exporting.decoders import DECODERS, SEGMENTERS
from maskwright.inference.exporting.networks import Convertible
from maskwright.inference.exporting.placing import Grid, placed_in
from maskwright.inference.exporting.two_stage import keypoint_peaks
from maskwright.ops import keypoints as keypoint_ops
from maskwright.ops.contours import _inverse_transform, fourier_rays
from maskwright.ops.outlines import fill_contours
from maskwright.ops.pooling import _covered, _means_by_sums, position_sensitive_pool
from maskwright.ops.window_tensors import MaskTensor, _read_windows, _taps, swap_windows
from maskwright.structures import Masks, Panoptic, Placement, Preprocess
from maskwright.systems import names, system_class
from maskwright.systems.kinds.promptable import PromptableSystem
from tests.systems.tiny import build

SYSTEMS = [name for name in names() if not issubclass(system_class(name), PromptableSystem)]
ROWS = 30
# Scores of untrained networks are low, and those of a few are equal.
THRESHOLDS = {"htc": 0.001, "decoupled-solo": 0.3}

# With which there are objects; a mask of two factors needs both.
SEEDS = {
    "embedmask": 3, "deepsnake": 4, "panoptic-centermask": 7, "panoptic-blendmask": 2, "detr": 2,
    "mask-frozen-detr": 4, "decoupled-solo": 7,
}  # fmt: skip
FLOORS = {"decoupled-solo": 1.5}


def lively(name: str) -> mw.System:
    """A tiny system whose outputs vary, with a class of stuff where there can be one."""
    mixed = "stuff" in inspect.signature(system_class(name)).parameters
    system = build(name, **({"classes": ("a", "b", "c"), "stuff": ("b",)} if mixed else {})).eval()
    generator = torch.Generator().manual_seed(SEEDS.get(name, 1))
    with torch.no_grad():
        for key, parameter in system.named_parameters():
            if key.endswith("bias"):  # those of low initial probabilities too
                parameter.clamp_(min=FLOORS.get(name, -0.5)).add_(
                    0.3 * torch.randn(parameter.shape, generator=generator)
                )
    return system


def graph_of(
    name: str, masks: str, image: torch.Tensor, task: str = "instances", make: Callable[[str], mw.System] = lively
) -> graphs.Graph:
    ready = graphs.prepare(make(name), "cpu")
    canvas = ready.preprocess.padded_size(*image.shape[1:])
    limits = graphs.limits_of(ready, ROWS, THRESHOLDS.get(name, 0.0))
    return graphs.Graph(ready, canvas, limits, masks, task)


@torch.no_grad()
def difference_of(module: graphs.Graph, image: torch.Tensor) -> checking.Difference:
    """What differs between the module of a graph, computed by PyTorch, and the system."""
    outputs = dict(zip(module.outputs, (v.numpy() for v in module(image.permute(1, 2, 0).contiguous())), strict=True))
    own, placement = graphs._reference(module.system, image, module)
    return checking.compare(own, graphs._answer(outputs, placement, own, module))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_graph_finds_the_objects_that_decode_finds(name):
    assert name in DECODERS, f"{name} needs a decoder in exporting/decoders.py"
    image = Scenes(1, (117, 150), seed=7)[0].image
    own = difference_of(graph_of(name, "image", image), image)
    assert own.exceeds() is None, str(own)
    assert own.unmatched <= 1  # a vote may be a tie
    assert own.objects > 0


@pytest.mark.parametrize(
    "name", ["mask-rcnn", "fcis", "solov2", "yolact", "deepsnake", "polarmask", "embedmask", "eomt"]
)
def test_masks_in_the_pixels_of_the_input(name):
    image = Scenes(1, (80, 150), seed=7)[0].image
    own = difference_of(graph_of(name, "network", image), image)
    assert own.exceeds() is None, str(own)
    assert own.objects > 0


@pytest.mark.parametrize("size", [(64, 64), (160, 192)])
@pytest.mark.parametrize("name", ["mask-rcnn", "yolact", "deepsnake", "eomt"])
def test_an_input_of_another_size(name, size):
    image = Scenes(1, (80, 150), seed=7)[0].image  # larger than the one input, smaller than the other
    module = graph_of(name, "image", image)
    canvas = graphs.input_of(module.system, image, size)
    assert all(side >= asked for side, asked in zip(canvas, size, strict=True))
    own = difference_of(graphs.Graph(module.system, canvas, module.limits, "image", "instances"), image)
    assert own.exceeds() is None, str(own)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels):
    image = checking.check_image(None, (80, 120), channels)
    ready = graphs.prepare(build("fcos", in_channels=channels).eval(), "cpu")
    image = ready.preprocess.match_channels(image)
    limits = graphs.limits_of(ready, ROWS, 0.0)
    own = difference_of(graphs.Graph(ready, ready.preprocess.padded_size(80, 120), limits, "image", "instances"), image)
    assert own.exceeds() is None, str(own)
    assert own.objects > 0


@pytest.mark.parametrize("name", ["fcos", "mask-rcnn"])
def test_an_input_smaller_than_the_system_would_take_is_compared_on_the_smaller_image(name):
    image = Scenes(1, (117, 150), seed=7)[0].image
    ready = graphs.prepare(lively(name), "cpu")
    assert max(ready.preprocess.size(117, 150)) > 96
    module = graphs.Graph(ready, (64, 96), graphs.limits_of(ready, ROWS, 0.0), "image", "instances")
    assert graphs.input_difference(image, module)[1] <= graphs.MOST_MEAN_LEVELS
    own = difference_of(module, image)
    assert own.exceeds() is None, str(own)


# ---- panoptic --------------------------------------------------------------------------------------------------------


def confident(name: str) -> mw.System:
    """A system whose objects score enough to become segments, and whose regions may be small."""
    system = lively(name)
    if hasattr(system, "branch"):
        system.branch = replace(system.branch, smallest_area=20)
    with torch.no_grad():
        for key, parameter in system.named_parameters():
            if key.endswith(("class_head.weight", "dense.classes.weight")):
                parameter *= 30
            if key.endswith(("boxes.classes.bias", "class_logits.bias")) or (
                ".classes.bias" in key and "stages" in key
            ):
                parameter[0] += 4
            if key.startswith("masks.") and key.endswith("bias"):
                parameter += 0.5
    return system


@pytest.mark.parametrize("name", sorted(SEGMENTERS))
def test_a_graph_divides_an_image_as_the_system_does(name, monkeypatch):
    image = Scenes(1, (117, 150), seed=7)[0].image
    module = graph_of(name, "image", image, "panoptic", confident)
    with torch.no_grad():
        outputs = module(image.permute(1, 2, 0).contiguous())
        own, placement = graphs._reference(module.system, image, module)
    found = dict(zip(module.outputs, (v.numpy() for v in outputs), strict=True))
    other = graphs._answer(found, placement, own, module)
    assert isinstance(own, Panoptic)
    assert isinstance(other, Panoptic)
    assert len(own.segments) == len(other.segments) > 0
    assert float((own.semantic() != other.semantic()).float().mean()) < 0.002
    assert sorted(own.segments.scores.tolist()) == pytest.approx(sorted(other.segments.scores.tolist()), abs=1e-4)


def test_a_graph_divides_an_image_as_decode_panoptic_does():
    from maskwright.inference.exporting import graphs

    ready = graphs.prepare(build("mask2former", stuff=("b",)).eval(), "cpu")
    image = Scenes(1, (120, 160), seed=7)[0].image
    canvas = ready.preprocess.padded_size(*image.shape[1:])
    raw = ready(torch.randn(1, 3, *canvas, generator=torch.Generator().manual_seed(0)))
    classes = 30 * torch.randn(raw.classes.shape, generator=torch.Generator().manual_seed(1))
    classes[..., -1] = -100.0  # every query is confident that it is an object
    classes[-1, 0, 3, -1] = 100.0  # but this one
    embeddings, features = torch.zeros_like(raw.embeddings), torch.full_like(raw.features, -10.0)
    for query in range(12):  # each has a stripe, the last one that of the first
        embeddings[..., query, query] = 1.0
        features[:, query, :, 3 * (query % 11) : 3 * (query % 11) + 2] = 10.0 if query < 11 else 5.0
    raw = replace(raw, classes=classes, embeddings=embeddings, features=features)
    own = ready.decode_panoptic(raw, [Placement.identity(canvas)])[0]
    segments, scores, labels = panoptic.queries(ready, raw, Grid(canvas, None, torch.tensor(canvas).float(), canvas))
    assert len(own.segments) > 3
    numbers = segments.unique()
    assert len(numbers[numbers > 0]) == len(own.segments)
    table = torch.cat([torch.tensor([-1]), labels])
    assert (table[segments.long()] == own.semantic()).float().mean() > 0.999
    assert sorted(scores[numbers[numbers > 0] - 1].tolist()) == pytest.approx(sorted(own.segments.scores.tolist()))


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_a_graph_for_images_of_one_size_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "convert", lambda *_: (None, [[True, False, False]]))
    with pytest.raises(UsageError, match=r"yolact as one graph would take images of \d+ x \d+ alone"):
        graphs.export_graph(build("yolact").eval(), tmp_path / "fixed.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_filled_outlines_are_those_of_the_rasterisers():
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate(((40, 60), (61, 33), (17, 90), (40, 60))):
        points = torch.rand(5, (3, 7, 36, 90)[number], 2, generator=generator)
        points = points * torch.tensor([size[1] - 1.0, size[0] - 1.0])
        assert torch.equal(filling.fill_pixels(points, size, max(size)), fill_contours(points, size).dense())
        points = points * 1.4 - 8  # beyond the image too
        own = Masks.from_polygons([[ring] for ring in points.double().numpy()], size).dense()
        assert int((filling.fill_coco(points, size, max(size)) ^ own).sum()) <= 1


@pytest.mark.fast
def test_peaks_of_keypoints_are_those_of_whole_maps():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(6, 5, 14, 14, generator=generator)
    maps = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bicubic")
    for side in (4.3, 30.7, 119.0):
        boxes = 10 * torch.rand(6, 4, generator=generator)
        boxes[:, 2:] = boxes[:, :2] + side * (0.5 + 0.5 * torch.rand(6, 2, generator=generator))
        for scoring in ("probability", "logit"):
            own = keypoint_ops.decode(maps, boxes, scoring)
            torch.testing.assert_close(keypoint_peaks(maps, boxes, scoring, 128), own, rtol=1e-4, atol=1e-3)


@pytest.mark.fast
def test_transforms_and_pooling_of_graphs_compute_the_same():
    generator = torch.Generator().manual_seed(0)
    for count, kept in ((36, 12), (90, 46), (9, 5)):
        values = torch.randn(4, kept, 2, generator=generator)
        imaginary = values[..., 1].clone()
        imaginary[:, 0] = 0
        if count % 2 == 0 and kept == count // 2 + 1:
            imaginary[:, -1] = 0
        own = _inverse_transform(values[..., 0], imaginary, count)
        torch.testing.assert_close(own.exp(), fourier_rays(values, count), rtol=1e-4, atol=1e-5)
    maps, side = torch.randn(2, 3 * 49, 9, 13, generator=generator), 21
    boxes = torch.tensor([[0, 0.0, 0.0, 150.0, 90.0], [1, 20.0, 30.0, 22.0, 31.0], [1, -9.0, 60.0, 240.0, 160.0]])
    left, columns = _covered(boxes[:, 1] / 16, (boxes[:, 3] + 1) / 16, side, 13)
    top, rows = _covered(boxes[:, 2] / 16, (boxes[:, 4] + 1) / 16, side, 9)
    own = _means_by_sums(maps.unflatten(1, (3, 49)), boxes[:, 0].long(), (top, rows), (left, columns), 7)
    whole = position_sensitive_pool(maps, boxes, 7, side, 1 / 16)
    torch.testing.assert_close(own.float(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.fast
def test_windows_are_read_in_a_graph_as_elsewhere():
    generator = torch.Generator().manual_seed(0)
    tensor = MaskTensor(torch.randn(2, 5, 5, 9, 13, generator=generator), True, 4.0, 8.0)
    windows = torch.stack([torch.randint(0, n, (20,), generator=generator) for n in (2, 4, 6)], 1)
    for mode in ("bilinear", "nearest", "floor"):
        rows = _taps(5, 9, 2, 2, tensor.alpha / 2, mode, "cpu")
        columns = _taps(5, 13, 2, 2, tensor.alpha / 2, mode, "cpu")
        own = _read_windows(tensor.values, windows, rows, columns, -6.0)
        torch.testing.assert_close(own, swap_windows(tensor, 2, windows, mode=mode), rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_booleans_are_chosen_without_where():
    with Convertible():
        choice = torch.tensor([True, True, False, False])
        first, second = torch.tensor([True, False, True, False]), torch.tensor([False, False, True, True])
        assert torch.where(choice, first, second).tolist() == [True, False, True, True]
        assert torch.where(choice, 1.0, 2.0).tolist() == [1, 1, 2, 2]
        assert [rows.tolist() for rows in torch.where(choice)] == [[0, 1]]


@pytest.mark.fast
def test_images_are_resized_in_a_graph_to_the_size_of_the_preprocessing():
    generator = torch.Generator().manual_seed(0)
    rules = [
        Preprocess(short=short, long=long, sizes=sizes, resample="pillow", multiple=1)
        for short, long in ((96, 160), (800, 1333))
        for sizes in ("floored", "benchmark", "rounded")
    ]
    for rule in [*rules, Preprocess(fit="letterbox", canvas=(512, 384)), Preprocess(fit="own"), Preprocess(fit="pad")]:
        for height, width in torch.randint(1, 900, (40, 2), generator=generator).tolist():
            canvas = rule.padded_size(height, width)
            placed = placed_in(torch.tensor(float(height)), torch.tensor(float(width)), rule, canvas)
            assert placed.filled.tolist() == list(rule.size(height, width)), (rule.sizes, rule.fit, height, width)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted() -> Any:
    """A system and its graph before it is written; converting takes seconds."""
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    system, models, convert = lively("rfcn"), list[Any](), graphs.convert

    def keeping(*arguments: Any, **keywords: Any) -> Any:
        models.append(convert(*arguments, **keywords))
        return models[-1]

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(graphs, "convert", keeping)
        graphs.export_graph(system, Path(folder) / "graph.onnx", detections=ROWS, score_threshold=0.0)
    return system, models[0]


def nothing(model: Any) -> None:
    """No damage."""


def weights(model: Any) -> None:
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = np.frombuffer(largest.raw_data, np.float32)
    largest.raw_data = (values[::-1] * 1.5).astype(np.float32).tobytes()


def operator(model: Any) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Abs"


def unknown(model: Any) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Rulu"


def missing(model: Any) -> None:
    del model.graph.initializer[0]


@pytest.mark.parametrize("damage", [nothing, weights, operator, unknown, missing])
def test_a_damaged_graph_is_not_written(converted, damage, tmp_path, monkeypatch):
    system, (model, varying) = converted
    own = copy.deepcopy(model)
    damage(own)
    monkeypatch.setattr(graphs, "convert", lambda *a, **k: (own, varying))
    options = {"detections": ROWS, "score_threshold": 0.0}
    if damage is nothing:
        done = graphs.export_graph(system, tmp_path / "graph.onnx", **options)
        assert done.difference.objects > 10
        assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]
        return
    before = tmp_path / "graph.onnx"
    before.write_bytes(b"an earlier file")
    with pytest.raises(CheckpointError, match=r"differs from PyTorch|cannot compute the graph"):
        graphs.export_graph(system, before, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]
    assert before.read_bytes() == b"an earlier file"


def test_a_missing_runtime_is_named_before_anything_is_converted(tmp_path, monkeypatch):
    from maskwright.inference.exporting import networks, running

    monkeypatch.setattr(graphs, "convert", lambda *a, **k: pytest.fail("converted"))
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime.*\[export\]"):
        graphs.export_graph("model.safetensors", tmp_path / "graph.onnx")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match="onnxscript"):
        networks.import_onnx()


def test_a_full_disk_leaves_nothing(converted, tmp_path, monkeypatch):
    system, (model, varying) = converted
    monkeypatch.setattr(graphs, "convert", lambda *a, **k: (copy.deepcopy(model), varying))

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        graphs.export_graph(system, tmp_path / "graph.onnx", detections=ROWS)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_takes_images_of_any_size(converted, tmp_path, monkeypatch):
    """One pixel, a column, a row, black, and without objects: always the same rows, finite, on the image."""
    system, (model, varying) = converted
    monkeypatch.setattr(graphs, "convert", lambda *a, **k: (copy.deepcopy(model), varying))
    path = graphs.export_graph(system, tmp_path / "graph.onnx", detections=ROWS, score_threshold=0.0).path
    run = graphs.open_graph(path)
    generator = np.random.default_rng(0)
    for size in ((1, 1), (400, 2), (1, 300), (96, 128), (333, 77)):
        for image in (generator.integers(0, 256, (*size, 3), np.uint8), np.zeros((*size, 3), np.uint8)):
            found = run(image)
            assert found["boxes"].shape == (ROWS, 4)
            assert all(np.isfinite(values).all() for values in found.values())
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"] <= [size[1], size[0], size[1], size[0]]).all()
            real = found["scores"] > 0
            assert (found["boxes"][real, 2:] > found["boxes"][real, :2]).all()
            assert (found["boxes"][~real] == 0).all()


# Converting takes about ten seconds each: these always, the others with `-m runtime`.
ALWAYS = [("solov2", "instances"), ("detr", "panoptic")]
EVERY = [*((name, "instances") for name in SYSTEMS), *((name, "panoptic") for name in sorted(SEGMENTERS))]


@pytest.mark.parametrize(
    ("name", "task"),
    [pytest.param(*one, marks=pytest.mark.slow if one in ALWAYS else pytest.mark.runtime) for one in EVERY],
)
def test_every_graph_agrees_in_its_runtime(name, task, tmp_path):
    """The public function: conversion, ONNX Runtime, and the comparison with PyTorch."""
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    photo = tmp_path / "photo.png"
    Image.fromarray(Scenes(1, (96, 128), seed=7)[0].image.permute(1, 2, 0).numpy()).save(photo)
    system = (lively if task == "instances" else confident)(name)
    threshold = THRESHOLDS.get(name, 0.0)
    done = mw.export(
        system, tmp_path / "graph.onnx", form="graph", image=photo, detections=ROWS, task=task,
        score_threshold=threshold,
    )  # fmt: skip
    assert done.difference.objects > 0
