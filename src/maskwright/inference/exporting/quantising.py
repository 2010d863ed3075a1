"""int8 by NNCF: calibrated on the user's images, measured on them, refused if it costs too much."""

# Neither openvino nor nncf has complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from maskwright.checkpoints.exported import Part, load_exported, parts_of, runtime_of
from maskwright.checkpoints.runtimes import (
    BIN_CRC,
    CRC,
    OnnxRuntime,
    OpenVino,
    Runtime,
    import_nncf,
    import_openvino,
    weights_crc,
)
from maskwright.data import evenly_spaced, has_split, open_dataset
from maskwright.data.images import reading
from maskwright.errors import CheckpointError, ImageError, UsageError
from maskwright.evaluation import Result
from maskwright.inference.evaluating import evaluate
from maskwright.inference.exporting.checking import timed
from maskwright.inference.exporting.networks import joined
from maskwright.inference.exporting.quantising_onnx import in_int8, quantised_part
from maskwright.inference.exporting.stages import report
from maskwright.inference.exporting.writing import (
    checked_target,
    export,
    loaded_for_export,
    publish,
    save_openvino,
    staged,
    write_model,
)
from maskwright.inference.predicting import predict
from maskwright.systems import System

MOST_ROWS = 64  # boxes of an image that a network of boxes is calibrated on
IMAGES_TIMED = 8
# What is tried until the loss is small enough: everything; everything but the outputs of each network; of this only the
# first network, that of the image; its backbone alone. Layers of outputs may be a third of the arithmetic.
LADDER = ("every", "all", "image", "backbone")
LADDER_WORDS = {
    "every": "all layers",
    "all": "all networks but their output layers",
    "image": "the network of the image but its output layers",
    "backbone": "the backbone",
}


@dataclass(frozen=True)
class Figures:
    """A system before or after quantisation.

    Attributes:
        metric: Name of the measured figure, "segm/AP" for most systems.
        value: The figure in points, 0 ... 100; negative if it is undefined.
        milliseconds: Median time of an image, preprocessing and decoding included.
        cpu_milliseconds: Processor time, likewise.
        size: Bytes of the file.
    """

    metric: str
    value: float
    milliseconds: float
    cpu_milliseconds: float
    size: int

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.value:.2f}, {self.milliseconds:.0f} ms per image ({self.cpu_milliseconds:.0f} ms of "
            f"the processor), {self.size / 1e6:.1f} MB"
        )


@dataclass(frozen=True)
class Quantised:
    """An exported int8 file, and what it costs.

    Attributes:
        path: The file.
        before: The figures in float32, in the same runtime.
        after: The figures in int8.
        layers: What is quantised, in words.
        images: Number of images that were measured.
    """

    path: Path
    before: Figures
    after: Figures
    layers: str
    images: int

    @property
    def drop(self) -> float:
        """Points lost."""
        return self.before.value - self.after.value

    def __str__(self) -> str:
        return (
            f"{self.path}: int8 in {self.layers}; on {self.images} images {self.drop:+.2f} points lost\n"
            f"  float32: {self.before}\n  int8:    {self.after}"
        )


def export_int8(
    system: System | str | Path,
    out: str | Path,
    data: Any,
    *,
    split: str = "val",
    calibration_split: str = "train",
    calibration: int = 32,
    max_drop: float = 0.5,
    limit: int | None = None,
    image: str | Path | None = None,
) -> Quantised:
    """Exports a system with int8 weights and activations, to OpenVINO or ONNX Runtime.

    Activations are calibrated on images of the data set. Then the float32 and the int8 system are evaluated on it. If
    more is lost than `max_drop`, less is quantised: the output layers of each network remain in float32, then all
    networks but that of the image, then all but its backbone.

    Args:
        system: The system, or a checkpoint as for `load`.
        out: The new file, .xml (OpenVINO) or .onnx (ONNX Runtime).
        data: A data set with annotations, as for `evaluate`.
        split: The part of it to measure on.
        calibration_split: The part to calibrate on; `split` if there is none of this name.
        calibration: Number of images to calibrate on.
        max_drop: Largest loss in points of AP (0 ... 100) that is accepted.
        limit: Number of images to measure on; None: all.
        image: Image that the float32 file is compared with PyTorch on.

    Returns:
        The file, and the figures before and after.

    Raises:
        UsageError: If an argument is invalid, or the measured images have no annotated objects.
        CheckpointError: If more is lost than `max_drop`; there is no file then.
    """
    target = checked_target(out)
    if calibration < 1 or not max_drop >= 0:
        raise UsageError(f"calibration must be at least 1 and max_drop at least 0, got {calibration} and {max_drop}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, got {limit}")
    import_nncf()
    original = loaded_for_export(system)
    examples = _calibration_images(data, calibration_split, split)
    examples = evenly_spaced(examples, min(calibration, len(examples)))
    measured = open_dataset(data, split) if isinstance(data, str | Path) else data
    if limit is not None:
        measured = evenly_spaced(measured, min(limit, len(measured)))
    with staged(target) as folder:
        # Each file in a folder of its own: OpenVINO reads weights from the file while a system of it exists.
        folders = {name: folder / name for name in ("float32", *LADDER)}
        for own in folders.values():
            own.mkdir()
        exported = export(original, folders["float32"] / target.name, image=image)
        plain = load_exported(exported.path)
        report(f"{target.name}: measuring the float32 system on {len(measured)} images")
        before = _figures(plain, measured, exported.size)
        if before.value < 0:
            raise UsageError(
                f"{before.metric} is undefined on the {len(measured)} images to measure on, which have no annotated "
                "objects of the system's classes, so that the loss cannot be measured; give a split with annotations"
            )
        feeds = folder / "feeds"
        report(f"{target.name}: calibrating on {len(examples)} images")
        record(plain, examples, feeds)
        lost: list[str] = []
        for level in LADDER:
            path = folders[level] / target.name
            report(f"{target.name}: quantising {LADDER_WORDS[level]}")
            if not quantise(plain, feeds, level, path):
                continue
            size = sum(file.stat().st_size for file in (path, path.with_suffix(".bin")) if file.is_file())
            report(f"{target.name}: measuring the int8 system")
            after = _figures(load_exported(path), measured, size)
            result = Quantised(target, before, after, LADDER_WORDS[level], len(measured))
            if result.drop <= max_drop:
                publish(path, target)
                return result
            lost.append(f"{result.drop:.2f} with {LADDER_WORDS[level]} in int8")
    raise CheckpointError(
        f"{target}: more than max_drop={max_drop:g} points of {before.metric} are lost ({'; '.join(lost)}); not "
        "written. Measure and calibrate on more images, or export in float32 and predict in bfloat16"
    )


def _figures(system: System, data: Any, size: int) -> Figures:
    """Measures a system on a data set."""
    task = "instances" if "instances" in system.tasks else next(iter(sorted(system.tasks)))
    result: Result = evaluate(system, data, task=task, device="cpu", examples=0)  # pyright: ignore[reportArgumentType]
    summary = result.summary
    metric = next((name for name in ("segm/AP", "keypoints/AP", "bbox/AP") if name in summary), next(iter(summary)))
    wall, processor = list[float](), list[float]()
    for image in itertools.islice(_readable(data, system), IMAGES_TIMED):
        _, seconds, own = timed(lambda image=image: predict(system, image, device="cpu"))
        wall.append(seconds)
        processor.append(own)
    return Figures(
        metric, 100 * float(summary[metric]), 1000 * float(np.median(wall)), 1000 * float(np.median(processor)), size
    )


def _readable(data: Any, system: System) -> Iterator[Any]:
    """The images of a data set that can be read, as the system reads them; `evaluate` mentions the others."""
    for index in range(len(data)):
        try:
            with reading(system.preprocess):
                image = data[index].image
        except ImageError:
            continue
        yield image


def _calibration_images(data: Any, calibration_split: str, split: str) -> Any:
    """The data set to calibrate on: that of `calibration_split`, or of `split` if there is no such part."""
    if not isinstance(data, str | Path):
        return data
    try:
        return open_dataset(data, calibration_split)
    except UsageError:
        if has_split(data, calibration_split):  # there is one, but which one is not certain
            raise
        return open_dataset(data, split)


# ---- calibration -----------------------------------------------------------------------------------------------------


def record(system: System, images: Any, folder: Path) -> None:
    """Predicts images and keeps what each part of the file receives.

    Raises:
        UsageError: If there is no image.
    """
    runtime = runtime_of(system)
    assert runtime is not None
    run = runtime.run
    varying = {
        part.name: [leaf["t"] for leaf in _leaves(part.inputs) if leaf["shape"] and isinstance(leaf["shape"][0], str)]
        for part in parts_of(system)
    }
    first = parts_of(system)[0].name
    numbers: dict[str, int] = {}

    def recording(part: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        kept = dict(inputs)
        if part != first and varying[part]:
            rows = len(inputs[varying[part][0]])
            chosen = np.linspace(0, rows - 1, min(rows, MOST_ROWS)).astype(np.int64)
            for name in varying[part]:
                if len(inputs[name]) == rows:
                    kept[name] = inputs[name][chosen]
        number = numbers[part] = numbers.get(part, -1) + 1
        target = folder / part
        target.mkdir(parents=True, exist_ok=True)
        np.savez(target / f"{number:06d}.npz", **cast(Any, kept))
        return run(part, inputs, outputs)

    runtime.run = recording
    try:
        for image in _readable(images, system):
            predict(system, image, device="cpu")
    finally:
        runtime.run = run
    if not numbers:
        raise UsageError("there is no image to calibrate on that can be read")


def _leaves(spec: Any) -> list[Any]:
    from maskwright.checkpoints.call_specs import tensors_of

    return tensors_of(spec)


class _Feeds:
    """The recorded inputs of one part, read one at a time."""

    def __init__(self, folder: Path, part: str):
        self.files, self.part = sorted((folder / part).glob("*.npz")), part

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for file in self.files:
            with np.load(file) as values:
                yield {f"{self.part}/{name}": values[name] for name in values.files}

    def __len__(self) -> int:
        return len(self.files)


# ---- quantisation ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The block without NNCF's progress bars and messages."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            yield
    finally:
        logger.setLevel(level)


def quantise(system: System, feeds: Path, level: str, path: Path) -> bool:
    """Writes the file with the parts quantised that a level of the ladder names.

    Returns:
        Whether there is one: not if the level has no layers, as in a system without a backbone of that name.
    """
    runtime = runtime_of(system)
    if isinstance(runtime, OnnxRuntime):
        return _quantise_onnx(runtime, parts_of(system), feeds, level, path)
    ov = import_openvino()
    assert isinstance(runtime, OpenVino)
    outputs, inputs, some = list[Any](), list[Any](), False
    whole = parts_of(system)
    for number, part in enumerate(whole):
        model = runtime.part(part.name).clone()
        examples = _Feeds(feeds, part.name)
        if len(examples) and (level in ("every", "all") or number == 0):
            operations = model.get_ordered_ops()
            attention = any(op.get_type_name() == "Softmax" for op in operations)
            kept = list[str]()
            if level != "every":
                kept = _outside_of_backbone(model) if level == "backbone" else _output_layers(model)
            if len(kept) < sum(op.get_type_name() in _WEIGHTED for op in operations):
                some = True
                with _quiet():
                    model = in_int8(model, examples, kept, attention)
        outputs += list(model.get_results())
        inputs += list(model.get_parameters())
    if some:
        save_openvino(ov.Model(outputs, inputs, "networks"), _metadata(runtime, level), path)
    return some


def _quantise_onnx(runtime: OnnxRuntime, parts: Sequence[Part], feeds: Path, level: str, path: Path) -> bool:
    models, some = list[Any](), False
    for number, part in enumerate(parts):
        model, examples = runtime.part(part.name), _Feeds(feeds, part.name)
        if len(examples) and (level in ("every", "all") or number == 0):
            with _quiet():
                found = quantised_part(model, part.name, examples, level)
            some, model = some or found is not None, model if found is None else found
        models.append(model)
    if some:
        merged = joined(models)
        write_model(merged, _metadata(runtime, level) | {CRC: weights_crc(merged)}, path)
    return some


def _metadata(runtime: Runtime, level: str) -> dict[str, str]:
    known = {name: value for name, value in runtime.metadata.items() if name not in (CRC, BIN_CRC)}
    return known | {"precision": json.dumps({"int8": level})}


_WEIGHTED = (
    "Convolution",
    "GroupConvolution",
    "MatMul",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "Einsum",
)


def _output_layers(model: Any) -> list[str]:
    """The last layers with weights before each output, from which classes, boxes and masks are read.

    Not those that other layers with weights read as well: such outputs are feature maps for other networks, and their
    layers, for example the last ones of a feature pyramid, may be the most expensive ones.
    """
    found: list[str] = []
    for result in model.get_results():
        waiting, seen = [result.input_value(0).get_node()], set[str]()
        while waiting:
            node = waiting.pop()
            name = node.get_friendly_name()
            if name in seen:
                continue
            seen.add(name)
            if node.get_type_name() in _WEIGHTED:
                found += [] if _is_read(node) else [name]
                continue
            waiting += [value.get_node() for value in node.input_values()]
    return sorted(set(found))


def _is_read(layer: Any) -> bool:
    """Whether another layer with weights uses what a layer computes."""
    waiting, seen = [layer], set[str]()
    while waiting:
        node = waiting.pop()
        for reader in (port.get_node() for value in node.outputs() for port in value.get_target_inputs()):
            name, kind = reader.get_friendly_name(), reader.get_type_name()
            if kind in _WEIGHTED:
                return True
            if name not in seen and kind != "ShapeOf":
                seen.add(name)
                waiting.append(reader)
    return False


def _outside_of_backbone(model: Any) -> list[str]:
    """The layers whose weights are not those of a backbone."""
    return [
        node.get_friendly_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() in _WEIGHTED and not _reads_backbone(node)
    ]


def _reads_backbone(node: Any) -> bool:
    value = node.input_value(1).get_node()
    for _ in range(4):  # through reshapes and conversions of the weights
        if ".backbone." in value.get_friendly_name():
            return True
        if not value.input_values():
            return False
        value = value.input_value(0).get_node()
    return False
