"""Writing of exported systems: conversion, metadata, the check, and the file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch

from maskwright.checkpoints.call_specs import flatten, tensors_of
from maskwright.checkpoints.exported import FORMAT, Part, is_exported, load_exported
from maskwright.checkpoints.ours import metadata_of
from maskwright.checkpoints.runtimes import BIN_CRC, CRC, KEY, SUFFIXES, file_crc, import_openvino, weights_crc
from maskwright.errors import CheckpointError, UsageError
from maskwright.evaluation.measuring import run_network
from maskwright.files import atomic_path
from maskwright.inference.exporting.capturing import forms_of
from maskwright.inference.exporting.checking import (
    Difference,
    check_image,
    check_pixels,
    compare,
    relative_error,
    timed,
)
from maskwright.inference.exporting.networks import OPSET, VaryingSizesError, export_form, merge
from maskwright.inference.exporting.running import require_runtime
from maskwright.inference.exporting.stages import report
from maskwright.inference.predicting import Prediction, predict
from maskwright.inference.preparing import prepare
from maskwright.structures import Placement, Prompts
from maskwright.systems import System
from maskwright.systems.kinds.promptable import PromptableSystem

FileForm = Literal["networks", "graph"]


@dataclass(frozen=True)
class Exported:
    """An exported file, and how it was checked.

    Attributes:
        path: The file.
        system: Name of the system.
        form: "networks" or "graph".
        opset: Version of ONNX's operators.
        size: Bytes, of all files.
        difference: What differs from PyTorch on the image of the check.
        fixed: What is fixed in the file: sizes of inputs that may not vary, by network.
    """

    path: Path
    system: str
    form: FileForm
    opset: int
    size: int
    difference: Difference
    fixed: Mapping[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.system}, ONNX opset {self.opset}, {self.size / 1e6:.1f} MB",
            f"  {self.difference}",
        ]
        lines += [f"  fixed: {name} takes {words}" for name, words in self.fixed.items()]
        return "\n".join(lines)


def export(
    system: System | str | Path,
    out: str | Path,
    *,
    image: str | Path | None = None,
    check: bool = True,
) -> Exported:
    """Exports the networks of a system to a file that `load` reads: .onnx for ONNX Runtime, .xml for OpenVINO.

    The loaded system predicts as the checkpoint does, with all options of decoding; its networks are computed by the
    runtime. The file holds everything that is needed: weights, system, options, classes and preprocessing. At the end
    the file is loaded and compared with PyTorch on an image.

    Args:
        system: The system, or a checkpoint as for `load`.
        out: The new file. Beside an .xml file a .bin file of the same name has the weights.
        image: Image of the check; None: a generated scene.
        check: Whether the file is compared with PyTorch.

    Returns:
        The file, and what the check measured.

    Raises:
        UsageError: If an argument is invalid, or a network cannot be exported.
        MissingExtraError: If onnx, onnxruntime or openvino is not installed.
        CheckpointError: If the exported system differs by more than rounding; there is no file then.
    """
    target = checked_target(out)
    require_runtime(target)
    original = loaded_for_export(system)
    channels = len(original.preprocess.mean)
    pixels = check_image(image, channels=channels) if check else None
    ready = prepare(original, "cpu")
    about = dict[str, str]()
    if isinstance(ready, PromptableSystem):
        ready.uniform = True
        about["fingerprint"] = ready.fingerprint
    resizable = ready.preprocess.fit in ("short", "own", "pad")
    try:
        made = _exported(ready)
    except VaryingSizesError:
        if not resizable:
            raise
        made = None
    if made is None or (resizable and _fixed(made[1])):
        # The network does not allow other sizes: images are resized into one, that of the image of the check.
        pixels = check_image(image, channels=channels) if pixels is None else pixels
        height, width = check_pixels(pixels, ready.preprocess).shape[1:]
        canvas = ready.preprocess.size(height, width)
        ready.preprocess = replace(ready.preprocess, fit="letterbox", canvas=canvas, corner=True)
        report(f"{ready.name}: the network takes one size, {canvas[0]} x {canvas[1]}, into which images are resized")
        made = _exported(ready)
    models, parts = made
    model = merge(models)
    metadata = (
        metadata_of(ready, target)
        | about
        | {
            "format": FORMAT,
            "networks": json.dumps([part.to_json() for part in parts]),
            "torch": torch.__version__,
            CRC: weights_crc(model),
        }
    )
    with staged(target) as folder:
        written = write_model(model, metadata, folder / target.name)
        difference = Difference(0)
        if check:
            report(f"{target.name}: checking")
            difference = compare_systems(ready, load_exported(written), pixels, target)
        size = publish(written, target)
    return Exported(target, original.name, "networks", OPSET, size, difference, _fixed(parts))


def checked_target(out: str | Path, parts: Sequence[str] = ()) -> Path:
    """The path of a new file, whose folder can be written to, before anything is computed.

    Args:
        out: The path.
        parts: The names of the files that are written in its place, see `part_path`; none: itself.

    Raises:
        UsageError: If its suffix is not that of a runtime.
        CheckpointError: If no file can be written there.
    """
    target = Path(out)
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{target}: the file name of an exported system must end in {' or '.join(SUFFIXES)}")
    files = [part_path(target, part) for part in parts] or [target]
    try:
        for path in (*files, *(path.with_suffix(".bin") for path in files if path.suffix.lower() == ".xml")):
            if path.is_dir():
                raise CheckpointError(f"{path}: cannot be written: it is a folder; choose another path")
        folder = next(folder for folder in target.absolute().parents if folder.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            reason = "permission denied" if folder.is_dir() else "not a folder"
            raise CheckpointError(f"{target}: cannot be written ({folder}: {reason}); choose another path")
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def part_path(target: Path, part: str) -> Path:
    """The file of a part: NAME.onnx is NAME.encoder.onnx."""
    return target.with_name(f"{target.stem}.{part}{target.suffix}")


def _exported(ready: System) -> tuple[list[tuple[str, Any]], list[Part]]:
    """Every form of every network: name and model, and what the file says about it."""
    models, parts = list[tuple[str, Any]](), list[Part]()
    for form in forms_of(ready):
        count = sum(part.network == form.network for part in parts)
        name = form.network if not count else f"{form.network}.{count + 1}"
        models.append((name, export_form(ready, form)))
        parts.append(Part(name, form.network, form.inputs, form.output))
    return models, parts


def loaded_for_export(system: System | str | Path) -> System:
    """A system with its weights on the CPU, in eval mode.

    Raises:
        UsageError: If it is an exported one.
    """
    from maskwright.checkpoints import load

    original = system if isinstance(system, System) else load(system)
    if is_exported(original):
        raise UsageError("an exported system cannot be exported again; export the checkpoint it was made from")
    return original


@contextlib.contextmanager
def staged(target: Path) -> Generator[Path]:
    """A temporary folder beside the target, in which files have their final names."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from None
    with folder as name:
        yield Path(name)


def write_model(model: Any, metadata: Mapping[str, str], path: Path) -> Path:
    """Writes an ONNX model with metadata as .onnx, or converted to OpenVINO's files as .xml."""
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    data = model.SerializeToString()
    try:
        if path.suffix.lower() == ".onnx":
            path.write_bytes(data)
        else:
            save_openvino(import_openvino().Core().read_model(data), metadata, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def save_openvino(model: Any, metadata: Mapping[str, str], path: Path) -> None:
    """Writes a model of OpenVINO with our metadata, and its weights as they are."""
    save = import_openvino().save_model
    for key, value in metadata.items():
        model.set_rt_info(value, [KEY, key])
    save(model, path, compress_to_fp16=False)
    model.set_rt_info(file_crc(path.with_suffix(".bin")), [KEY, BIN_CRC])
    save(model, path, compress_to_fp16=False)


def publish(written: Path, target: Path) -> int:
    """Moves the files of an export to their final names, weights first; returns their size in bytes."""
    size = 0
    for suffix in (".bin", target.suffix):
        source, final = written.with_suffix(suffix), target.with_suffix(suffix)
        if source.is_file():
            size += source.stat().st_size
            with atomic_path(final, CheckpointError) as part:
                source.replace(part)
    return size


def compare_systems(ready: System, exported: System, image: Any, target: Path, bound: bool = True) -> Difference:
    """Predicts an image with both systems and compares.

    Raises:
        CheckpointError: If they differ by more than rounding, unless `bound` is False.
    """
    options: dict[str, Any] = {}

    def answer(system: System, **more: Any) -> Prediction:
        return cast(Prediction, predict(system, image, device="cpu", **options, **more))

    if isinstance(ready, PromptableSystem):
        options |= {"points_per_side": min(8, ready.points_per_side), "detections": 50}
    answer(exported)  # the first call of a runtime also plans memory
    if not len(answer(ready).found()):  # nothing above the threshold, as of a system that is not trained
        options["score_threshold"] = 0.0
        if isinstance(ready, PromptableSystem):
            options["stability_score_thresh"] = 0.0
    own, wall, processor = timed(partial(answer, ready))
    other, own_wall, own_processor = timed(partial(answer, exported))
    difference = compare(own.found(), other.found())
    if "panoptic" in ready.tasks:
        options.clear()
        first, second = (answer(system, task="panoptic").panoptic for system in (ready, exported))
        assert first is not None
        assert second is not None
        difference = replace(difference, mask=max(difference.mask, compare(first, second).mask))
    difference = replace(
        difference,
        raw=_raw_error(ready, exported, image),
        seconds=own_wall,
        torch_seconds=wall,
        cpu_seconds=own_processor,
        torch_cpu_seconds=processor,
    )
    problem = difference.exceeds() if bound else None
    if problem is not None:
        raise CheckpointError(
            f"{target}: the exported system differs from PyTorch: {problem}; not written. Report this with the command"
        )
    return difference


def _raw_error(ready: System, exported: System, image: Any) -> float:
    """The relative error of what `forward` returns for an image."""
    pixels = check_pixels(image, ready.preprocess)
    batch = ready.preprocess.collate([pixels])
    with torch.no_grad():
        raws = [run_network(system, batch, torch.device("cpu"), torch.float32) for system in (ready, exported)]
        if isinstance(ready, PromptableSystem):
            pairs = zip((ready, exported), raws, strict=True)
            raws = [[raw, _answers(system, raw, batch.placements[0])] for system, raw in pairs]
    return relative_error(*(flatten(raw, []) for raw in raws))


def _answers(system: System, raw: Any, placement: Placement) -> Any:
    """What a promptable system decodes for a point, two points, a box, and a box with a point beside it."""
    assert isinstance(system, PromptableSystem)
    height, width = placement.image_size
    middle = [width / 2, height / 2]
    corner, absent, nothing = [1.0, 1.0], [math.nan] * 2, [math.nan] * 4
    points = torch.tensor([[middle, absent], [middle, corner], [absent, absent], [corner, absent]])
    labels = torch.tensor([[1, -1], [1, 0], [-1, -1], [0, -1]])
    box = [width / 4, height / 4, width / 2, height / 2]
    prompts = Prompts(placement.image_size, points, labels, boxes=torch.tensor([nothing, nothing, box, box]))
    return system.answer(raw, system.slots(prompts, placement, raw))


def _fixed(parts: list[Part]) -> dict[str, str]:
    """The size of the input of the first network, if it has one that may not vary."""
    shape = tensors_of(parts[0].inputs)[0]["shape"]
    if all(isinstance(size, str) for size in (shape[0], *shape[2:])):
        return {}
    return {parts[0].name: " x ".join("any" if isinstance(size, str) else str(size) for size in shape)}
