"""Exported systems predict what the checkpoint does; files that are damaged, foreign or hostile are refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.exc import UserError, UserErrorType

import maskwright as mw
from maskwright import cli
from maskwright.blocks import solo_grid
from maskwright.checkpoints import call_specs, runtimes
from maskwright.data.scenes import Scenes
from maskwright.errors import CheckpointError, DataError, ImageError, UsageError
from maskwright.inference import exporting
from maskwright.inference.exporting import (
    checking,
    export_int8,
    graphs,
    prompted,
    quantising,
    quantising_onnx,
    reported,
    stages,
    writing,
)
from maskwright.inference.journal import digest
from maskwright.structures import Instances, Preprocess, Prompts
from maskwright.web.assistant import Assistant, Prompt
from tests.systems.tiny import build

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")
pytest.importorskip("onnxruntime", reason="the extra export is not installed")


def images(count: int) -> list[torch.Tensor]:
    scenes = Scenes(count, (96, 144), seed=3)
    return [scenes[index].image for index in range(count)]


CONVERTED: dict[str, Any] = {}  # models of the systems of fixtures, since converting takes seconds


STAGES: list[str] = []  # what the export of the fixture `two_stage` reports


class Kept:
    """A function whose results are kept, as they were returned."""

    def __init__(self, function: Any):
        self.function, self.results = function, list[Any]()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        result = self.function(*arguments, **keywords)
        self.results.append(copy.deepcopy(result))
        return result


@pytest.fixture(scope="module")
def two_stage(tmp_path_factory) -> tuple[mw.System, Path]:
    """Mask R-CNN, whose three networks are called with varying numbers of boxes, and its file."""
    system = build("mask-rcnn", classes=("disc", "ring")).eval()
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch, reported(STAGES.append):
        patch.setattr(writing, "_exported", kept := Kept(writing._exported))
        mw.export(system, path)
    CONVERTED["mask-rcnn"] = kept.results[0]
    return system, path


def assert_same(own: Instances, other: Instances) -> None:
    assert len(own) == len(other)
    torch.testing.assert_close(other.scores, own.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.boxes, own.boxes, rtol=1e-4, atol=1e-2)
    assert torch.equal(own.labels, other.labels)
    assert own.masks is not None
    assert other.masks is not None
    different = (own.masks.dense() ^ other.masks.dense()).flatten(1).sum(1)
    assert (different <= 0.02 * own.masks.areas().clamp(min=50)).all()


def test_an_exported_system_predicts_what_the_checkpoint_does(two_stage):
    system, path = two_stage
    exported = mw.load(path)
    assert exported.source is not None
    assert exported.source["runtime"] == "ONNX Runtime"
    assert exported.classes == system.classes
    assert exported.preprocess == system.preprocess
    options = {"score_threshold": 0.3, "device": "cpu"}
    pairs = zip(
        mw.predict(system, images(3), batch=2, **options), mw.predict(exported, images(3), batch=2, **options),
        strict=True,
    )  # fmt: skip
    counts = []
    for own, other in pairs:
        assert_same(own.found(), other.found())
        counts.append(len(own.found()))
    assert min(counts) > 0


def test_each_stage_is_reported(two_stage, tmp_path, monkeypatch, capsys):
    expected = [f"mask-rcnn: {part}: {stage}" for part in ("dense", "boxes", "masks")
                for stage in ("tracing", "converting", "optimising")]  # fmt: skip
    assert [*expected, "model.onnx: checking"] == STAGES

    def export(*values: Any, **options: Any) -> str:
        stages.report("mask-rcnn: dense: tracing")
        return "the file"

    monkeypatch.setattr(exporting, "export", export)
    monkeypatch.setattr("maskwright.checkpoints.load", lambda *values, **options: two_stage[0])
    assert cli.main(["export", "x.safetensors", "-o", str(tmp_path / "x.onnx")]) == 0
    assert capsys.readouterr() == ("the file\n", "mask-rcnn: dense: tracing\n")
    stages.report("nothing is reported outside of the block")
    assert capsys.readouterr() == ("", "")


def test_an_error_of_what_is_told_the_stages_is_not_one_of_the_export(tmp_path):
    def broken(_: str) -> None:
        raise BrokenPipeError("nobody listens")

    with reported(broken), pytest.raises(BrokenPipeError, match="nobody listens"):
        mw.export(build("fcos").eval(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError(
            "The inequality, 768*(x//8) - 768 >= 0, cannot be solved using solve_univariate_inequality."
        ),
        UserError(UserErrorType.CONSTRAINT_VIOLATION, "Constraints violated (x0_2)! x0_2 was specialized to 96."),
    ],
)
def test_a_network_that_cannot_be_traced_with_varying_sizes_takes_one(error, tmp_path, monkeypatch):
    """As those with the backbone Hiera, which take minutes until torch gives up."""
    trace = torch.export.export

    def refusing(module, arguments, *, dynamic_shapes, **options):
        if any(axis for each in dynamic_shapes[0] for axis in each):
            raise error
        return trace(module, arguments, dynamic_shapes=dynamic_shapes, **options)

    monkeypatch.setattr(torch.export, "export", refusing)
    system = build("fcos").eval()
    photo = tmp_path / "photo.png"
    Image.fromarray(images(1)[0].permute(1, 2, 0).numpy()).save(photo)
    done = mw.export(system, tmp_path / "model.onnx", image=photo)
    assert done.fixed == {"dense": "any x 3 x 96 x 160"}
    assert "fixed: dense takes any x 3 x 96 x 160" in str(done)
    exported = mw.load(done.path)
    assert (exported.preprocess.fit, exported.preprocess.canvas) == ("letterbox", (96, 144))
    assert mw.predict(exported, Scenes(1, (80, 60), seed=3)[0].image, score_threshold=0.0, device="cpu").found()


def test_copies_and_threads_share_the_sessions(two_stage):
    exported = copy.deepcopy(mw.load(two_stage[1]))
    image = images(1)[0]
    alone = mw.predict(exported, image, score_threshold=0.3, device="cpu").found()
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: mw.predict(exported, image, score_threshold=0.3, device="cpu").found(), range(8))
        )
    assert all(torch.equal(each.boxes, alone.boxes) for each in found)


def test_tiles_and_other_sizes_and_no_objects(two_stage):
    system, path = two_stage
    exported = mw.load(path)
    image = Scenes(1, (150, 200), seed=4)[0].image
    own, other = (mw.predict(s, image, tile=96, score_threshold=0.3, device="cpu").found() for s in (system, exported))
    assert len(own) == len(other) > 0
    assert len(mw.predict(exported, image, score_threshold=1.0, device="cpu").found()) == 0


def test_an_exported_system_has_a_digest(two_stage, tmp_path):
    def other(model):
        entry(model, "source").value = '{"note": "another"}'

    own, again = (digest(mw.load(two_stage[1])) for _ in range(2))
    assert own == again
    assert digest(mw.load(changed(two_stage[1], tmp_path / "model.onnx", other))) != own


def test_evaluation_gives_the_same_figures(two_stage):
    system, path = two_stage
    data = Scenes(3, (96, 144), seed=3, classes=("disc", "ring"))
    own, other = (mw.evaluate(s, data, device="cpu").summary for s in (system, mw.load(path)))
    assert own.keys() == other.keys()
    assert other["segm/AP"] == pytest.approx(own["segm/AP"], abs=1e-3)


def test_what_an_exported_system_cannot_do_is_stated(two_stage, tmp_path):
    system, path = two_stage
    exported = mw.load(path)
    with pytest.raises(UsageError, match="cannot be trained; train the checkpoint"):
        exported.losses(None, [])
    with pytest.raises(UsageError, match="has no weights to save"):
        mw.save(exported, tmp_path / "again.safetensors")
    with pytest.raises(UsageError, match="cannot be exported again"):
        mw.export(exported, tmp_path / "again.onnx")
    with pytest.raises(UsageError, match=r"resize cannot be changed in an exported file"):
        mw.load(path, resize={"short": 200})
    for device in ("cuda", "cuda:1", "unknown"):
        with pytest.raises(UsageError, match=f"computes on the CPU, not on '{device}'"):
            mw.load(path, device=device)
    with pytest.raises(UsageError, match="computes on the CPU, not on 'cuda'"):
        mw.predict(exported, images(1)[0], device="cuda")
    with pytest.raises(UsageError, match="classes cannot be changed in an exported file"):
        mw.load(path, classes=())
    with pytest.raises(UsageError, match="not in bfloat16"):
        mw.predict(exported, images(1)[0], dtype="bfloat16", device="cpu")
    with pytest.raises(UsageError, match="compile does not apply to an exported system"):
        mw.predict(exported, images(1)[0], compile=True, device="cpu")
    with pytest.raises(UsageError, match=r"must end in \.onnx or \.xml"):
        mw.export(system, tmp_path / "model.pt")


def test_exported_systems_compute_on_the_cpu_in_what_their_runtime_has(two_stage, monkeypatch):
    """Where there is a GPU, and a processor with bfloat16, nothing needs to be chosen."""
    from maskwright.inference import preparing

    exported, image = mw.load(two_stage[1]), images(1)[0]
    alone = mw.predict(exported, image, score_threshold=0.3, device="cpu").found()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(preparing, "has_bfloat16", lambda device: True)
    for options in ({}, {"device": "auto"}, {"dtype": "auto"}):
        found = mw.predict(exported, image, score_threshold=0.3, **options).found()
        assert torch.equal(found.boxes, alone.boxes)
    data = Scenes(1, (96, 144), seed=3, classes=("disc", "ring"))
    assert mw.evaluate(exported, data, dtype="auto").protocol.precision == "float32"


def test_where_a_file_cannot_be_written_is_found_before_anything_is_converted(tmp_path, monkeypatch):
    for module in (writing, graphs, prompted, quantising):
        monkeypatch.setattr(module, "loaded_for_export", lambda system: pytest.fail("loaded"))
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "model.bin").mkdir()
    (tmp_path / "sam.decoder.onnx").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for out, words in (
        ("folder.onnx", "is a folder"),
        ("file/model.onnx", "not a folder"),
        ("model.xml", "model.bin.*is a folder"),
    ):
        for form in ("networks", "graph"):
            with pytest.raises(CheckpointError, match=words):
                mw.export("model.safetensors", tmp_path / out, form=form)
        with pytest.raises(CheckpointError, match=words):
            export_int8("model.safetensors", tmp_path / out, "scenes")
    with pytest.raises(CheckpointError, match=r"sam\.decoder\.onnx.*is a folder"):
        prompted.export_prompted(build("sam"), tmp_path / "sam.onnx")
    monkeypatch.setattr(writing.os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="permission denied"):
        mw.export("model.safetensors", tmp_path / "new" / "model.onnx")
    assert not (tmp_path / "new").exists()


def test_a_file_that_differs_is_not_written(two_stage, tmp_path, monkeypatch):
    system, _ = two_stage
    from maskwright.inference.exporting import checking, writing

    forms = writing.forms_of(writing.prepare(system, "cpu"))
    monkeypatch.setattr(writing, "forms_of", lambda ready: forms[:1])  # converting all three takes seconds
    monkeypatch.setattr(writing, "load_exported", lambda path: system)
    monkeypatch.setattr(writing, "compare", lambda a, b: checking.Difference(10, 0, box=3.0))
    with pytest.raises(CheckpointError, match="boxes differ by 3 pixels"):
        mw.export(system, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def largest_weights(model) -> None:
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32)[::-1] * 1.5).tobytes()


def activation(model) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Abs"


def unknown_operator(model) -> None:
    model.graph.node[3].op_type = "Rulu"


@pytest.mark.parametrize("damage", [largest_weights, activation, unknown_operator])
@pytest.mark.parametrize("part", [0, 1])
def test_damaged_networks_are_not_written(two_stage, damage, part, tmp_path, monkeypatch):
    models, parts = copy.deepcopy(CONVERTED["mask-rcnn"])
    damage(models[part][1])
    monkeypatch.setattr(writing, "_exported", lambda ready: (models, parts))
    with pytest.raises(CheckpointError, match=r"differs from PyTorch|cannot load"):
        mw.export(two_stage[0], tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_options_of_forms_are_checked(two_stage, tmp_path):
    system, _ = two_stage
    with pytest.raises(UsageError, match="has no option 'canvas'"):
        mw.export(system, tmp_path / "x.onnx", form="graph", canvas=(2, 2))
    with pytest.raises(UsageError, match=r"task='panoptic'; these can: .*detr"):
        mw.export(system, tmp_path / "x.onnx", form="graph", task="panoptic")
    with pytest.raises(UsageError, match="detections and the sides of size must be at least 1"):
        mw.export(system, tmp_path / "x.onnx", form="graph", detections=0)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompts_for(size: tuple[int, int]) -> Prompts:
    """A point; three points; a box; a box with a point beside it."""
    height, width = size
    absent, none = [math.nan] * 2, [math.nan] * 4
    middle, corner, box = [width / 2, height / 2], [1.5, 2.5], [width / 4, height / 4, width / 2, height / 2]
    points = [[middle, absent, absent], [middle, corner, [5.0, 5.0]], [absent] * 3, [corner, absent, absent]]
    labels = [[1, -1, -1], [1, 0, 1], [-1] * 3, [0, -1, -1]]
    return Prompts(size, torch.tensor(points), torch.tensor(labels), torch.tensor([none, none, box, box]))


def test_an_exported_promptable_system_answers_prompts_as_the_checkpoint(tmp_path):
    system = build("sam").eval()
    path = mw.export(system, tmp_path / "sam.onnx").path
    exported = mw.load(path)
    pixels = images(1)[0]
    batch = system.preprocess.collate([pixels])
    placement = batch.placements[0]
    own, other = (s.embed(batch.images, [placement])[0] for s in (system, exported))
    # Group normalisation in ONNX Runtime differs from the result in double precision by 2e-5, in PyTorch by 2e-6.
    torch.testing.assert_close(other.tensors["image"], own.tensors["image"], rtol=1e-4, atol=5e-5)
    for given in (prompts_for((96, 144)), prompts_for((96, 144))[:1], prompts_for((96, 144))[2:3]):
        wanted = system.segment(own, given, answers=4)
        found = exported.segment(own, given, answers=4)  # the embedding of the checkpoint is valid for its export
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)
        again = replace(given, logits=wanted.logits[:, 1])
        refined = [s.segment(own, again).logits for s in (system, exported)]
        torch.testing.assert_close(refined[1], refined[0], rtol=1e-4, atol=1e-4)
    options = {"points_per_side": 3, "score_threshold": 0.0, "stability_score_thresh": 0.0}
    assert_same(system.predict(pixels, **options).instances, exported.predict(pixels, **options).instances)
    source: Any = SimpleNamespace(
        content=lambda index: 32 * "0", read=lambda index: pixels, size=lambda index: (96, 144)
    )
    answers = []
    for each in (system, exported, exported):  # with the embedding of the first, and with that on the disk
        assistant = Assistant(source, each, tmp_path / "embeddings")
        answers.append(assistant.answer(0, Prompt(((72.0, 48.0, 1),))).counts)
    assert answers[1] == answers[2]
    assert assistant.page_decoder is None
    with pytest.raises(UsageError, match="was computed by sam-"):
        exported.segment(build("sam", points_per_side=7).eval().embed(batch.images, [placement])[0], given)


@pytest.mark.parametrize("name", ["sam2", pytest.param("efficient-sam", marks=pytest.mark.runtime)])
def test_the_graphs_of_a_promptable_system_need_nothing_of_this_library(name, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    system = build(name).eval()
    monkeypatch.setattr(prompted, "convert", kept := Kept(prompted.convert))
    done = mw.export(system, tmp_path / "model.onnx", form="graph")
    for part in (0, 1):  # damaged, neither of the two is written
        models = copy.deepcopy(kept.results)
        largest_weights(models[part][0])
        damaged = iter(models)
        monkeypatch.setattr(prompted, "convert", lambda *a, damaged=damaged, **k: next(damaged))
        (tmp_path / "damaged").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match="differ from PyTorch"):
            mw.export(system, tmp_path / "damaged" / "model.onnx", form="graph")
        assert list((tmp_path / "damaged").iterdir()) == []
    (tmp_path / "damaged").rmdir()
    assert done.difference.mask < 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.decoder.onnx", "model.encoder.onnx"]
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / f"model.{part}.onnx") for part in ("encoder", "decoder")
    )
    pixels = images(1)[0][:, :60, :83]  # another size than that of the check, and another number of prompts
    image = pixels.permute(1, 2, 0).numpy()
    maps = dict(zip([o.name for o in encoder.get_outputs()], encoder.run(None, {"image": image}), strict=True))
    points = np.array([[[40.0, 30.0], [3.0, 4.0]], [[10.0, 8.0], [60.0, 50.0]]], np.float32)
    feeds = {**maps, "image_size": np.array([60, 83]), "points": points, "labels": np.array([[1, 0], [2, 3]])}
    if system.reads_masks:
        grid = 4 * maps["embedding"].shape[-1]
        feeds |= {"logits": np.zeros((2, 1, grid, grid), np.float32), "has_logits": np.zeros(2, bool)}
    found = dict(zip([o.name for o in decoder.get_outputs()], decoder.run(None, feeds), strict=True))
    batch = system.preprocess.collate([pixels])
    embedding = system.embed(batch.images, batch.placements)[0]
    box = torch.tensor([[math.nan] * 4, [10.0, 8.0, 60.0, 50.0]])
    absent = torch.full((1, 2, 2), math.nan)
    given = Prompts((60, 83), torch.cat([torch.from_numpy(points[:1]), absent]), torch.tensor([[1, 0], [-1, -1]]), box)
    own = system.segment(embedding, given, answers=4)
    torch.testing.assert_close(torch.from_numpy(found["mask_logits"]), own.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(found["scores"]), own.scores, rtol=1e-3, atol=1e-4)
    masks = torch.from_numpy(found["masks"]).flatten(0, 1).bool()
    assert masks.shape[1:] == (60, 83)
    assert ((masks ^ own.masks.dense()).flatten(1).float().mean(1) < 0.002).all()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_truncated_foreign_and_damaged_files_are_refused_in_a_sentence(two_stage, tmp_path):
    _, path = two_stage
    data = path.read_bytes()
    wrong = tmp_path / "wrong.onnx"
    for part in (data[: len(data) // 2], data[:100], b"", b"GIF89a" * 50):
        wrong.write_bytes(part)
        with pytest.raises(CheckpointError, match=r"not an ONNX file|not exported by maskwright"):
            mw.load(wrong)
    weights = data.find(onnx.load(path).graph.initializer[5].raw_data)
    wrong.write_bytes(data[:weights] + bytes(8) + data[weights + 8 :])
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        mw.load(wrong)


def changed(path: Path, target: Path, change) -> Path:
    model = onnx.load(path)
    change(model)
    target.write_bytes(model.SerializeToString())
    return target


def entry(model, key):
    return next(each for each in model.metadata_props if each.key == key)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../b", "C:\\x", ""])
def test_weights_outside_of_the_folder_are_refused(two_stage, tmp_path, location):
    def outside(model):
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        tensor.external_data.add(key="location", value=location)

    with pytest.raises(CheckpointError, match="outside of the folder"):
        mw.load(changed(two_stage[1], tmp_path / "model.onnx", outside))


def test_weights_in_a_link_out_of_the_folder_are_refused(two_stage, tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    (tmp_path / "inside" / "weights.bin").symlink_to(tmp_path / "secret.bin")

    def linked(model):
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")

    with pytest.raises(CheckpointError, match="outside of the folder"):
        mw.load(changed(two_stage[1], tmp_path / "inside" / "model.onnx", linked))


def test_hostile_descriptions_are_refused(two_stage, tmp_path):
    path, target = two_stage[1], tmp_path / "model.onnx"

    def operators(model):
        model.graph.node[3].domain = "com.evil"

    def huge(model):
        options = entry(model, "options")
        options.value = options.value.replace('"neck_width": 32', '"neck_width": 60000')

    def classes(model):
        networks = entry(model, "networks")
        networks.value = networks.value.replace(
            "maskwright.systems.families.two_stage:Raw", "maskwright.files:AtomicFile"
        )

    def renamed_field(model):
        networks = entry(model, "networks")
        networks.value = networks.value.replace('"objectness"', '"objects"')

    def nothing(model):
        entry(model, "networks").value = "[[[["

    def other(model):
        entry(model, "format").value = "maskwright-graph"

    def more_classes(model):
        entry(model, "classes").value = '["disc", "ring", "square"]'

    def loop(model):
        model.graph.node.add(op_type="Loop", name="dense/loop")

    def doubled(model):
        """Functions each of which calls the next one twice: 2 ** 40 nodes."""
        for number in range(40):
            function = model.functions.add(name=f"f{number}", domain="own")
            function.node.add(op_type=f"f{number + 1}", domain="own")
            function.node.add(op_type=f"f{number + 1}", domain="own")
        model.functions.add(name="f40", domain="own")
        model.graph.node.add(op_type="f0", domain="own", name="dense/f")

    def itself(model):
        model.functions.add(name="f", domain="own").node.add(op_type="f", domain="own")
        model.graph.node.add(op_type="f", domain="own", name="dense/f")

    def chain(model):
        for number in range(5000):
            model.functions.add(name=f"f{number}", domain="own").node.add(op_type=f"f{number + 1}", domain="own")
        model.functions.add(name="f5000", domain="own")
        model.graph.node.add(op_type="f0", domain="own", name="dense/f")

    def hidden(model):
        function = model.functions.add(name="f", domain="own")
        tensor = function.node.add(op_type="Constant").attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret.bin")

    for change, words in (
        (chain, "far too often"), (hidden, "outside of the folder"),
        (more_classes, r"is \(.*\), but has the shape .* with the options and classes"),
        (loop, "the operator 'Loop', which may never end"), (doubled, "far too often"), (itself, "far too often"),
        (operators, "has the operator"), (huge, "the weights do not match the options"), (classes, "does not have"),
        (renamed_field, "description of the networks is invalid"),
        (nothing, "description of the networks is missing"), (other, "form='networks'"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            mw.load(changed(path, target, change))


@pytest.mark.fast
def test_values_and_specs_correspond():
    value = ([torch.ones(2, 3)], (torch.zeros(4), 5, None), 1.5)
    tensors: list[torch.Tensor] = []
    spec = call_specs.describe(value, "x", tensors)
    names = [leaf["t"] for leaf in call_specs.tensors_of(spec)]
    again = call_specs.rebuild(call_specs.check(spec, "file"), dict(zip(names, tensors, strict=True)), {})
    assert again[0][0] is value[0][0]
    assert again[1][0] is value[1][0]
    assert again[1][1:] == (5, None)
    assert again[2] == 1.5
    with pytest.raises(TypeError, match="cannot be exported"):
        call_specs.describe({"a": 1}, "x", [])


@pytest.mark.fast
@pytest.mark.parametrize(
    "spec",
    [None, {}, {"t": 1}, {"l": {}}, {"i": []}, {"t": "x", "dtype": "object", "shape": []}, {"c": "os:path", "f": {}}],
)
def test_invalid_specs_are_refused(spec):
    with pytest.raises(CheckpointError):
        call_specs.check(spec, "file")


@pytest.mark.fast
def test_descriptions_of_calls_fit_together():
    raw = "maskwright.systems.families.sliding:Windows"
    with pytest.raises(CheckpointError, match="is invalid"):
        call_specs.check({"c": raw, "f": {"boxes": {"i": 1}}}, "file")
    size = {"d": "n1", "scale": [1, 4]}
    inputs = {"l": [{"t": "x0", "dtype": "float32", "shape": ["n0", 3, "n1", "n2"]}]}
    call_specs.check_sizes(inputs, {"u": [size]}, "file")
    with pytest.raises(CheckpointError, match="is invalid"):
        call_specs.check_sizes({"l": []}, {"u": [size]}, "file")


def test_weights_of_an_openvino_file_have_a_checksum(tmp_path):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("the extra openvino is not installed")
    ov = runtimes.import_openvino()
    for name, factor in (("a", 2.0), ("b", 3.0)):
        x = ov.opset13.parameter([1, 64], np.float32, name="dense/x0")
        y = ov.opset13.multiply(x, ov.opset13.constant(np.full((1, 64), factor, np.float32)))
        writing.save_openvino(ov.Model([y], [x], name), {"format": "maskwright-networks"}, tmp_path / f"{name}.xml")
    assert runtimes.open_runtime(tmp_path / "a.xml").metadata["format"] == "maskwright-networks"
    other, own = (tmp_path / "b.bin").read_bytes(), (tmp_path / "a.bin").read_bytes()
    for weights in (other, own[:40] + b"\x01" + own[41:]):
        (tmp_path / "a.bin").write_bytes(weights)
        with pytest.raises(CheckpointError, match=r"weights in a\.bin do not match their checksum"):
            runtimes.open_runtime(tmp_path / "a.xml")


@pytest.mark.fast
def test_a_map_of_one_cell_has_its_coordinates_in_exported_networks_too(monkeypatch):
    maps = [torch.zeros(1, 4, *size) for size in ((1, 9), (5, 1), (1, 1), (4, 3))]
    own = [solo_grid.coordinates(each) for each in maps]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for each, wanted in zip(maps, own, strict=True):
        torch.testing.assert_close(solo_grid.coordinates(each), wanted)


# In a process of its own: nncf changes functions of torch when it is imported.
INT8 = """
import json, sys, torch
import maskwright as mw
from maskwright.checkpoints.call_specs import flatten
from maskwright.data.scenes import Scenes
from maskwright.inference.exporting import export_int8, prompted, quantising, writing
from tests.systems.tiny import build

system = build("mask-rcnn", classes=("disc", "ring")).eval()
scenes = Scenes(2, (96, 144), classes=("disc", "ring"), seed=3)
done = export_int8(system, sys.argv[1], scenes, calibration=2)
exported = mw.load(done.path)
batch = system.preprocess.collate([scenes[0].image])
with torch.no_grad():
    raws = [flatten(each(batch.images), []) for each in (system, exported)]
alike = [float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in zip(*raws)]
same = any(torch.equal(a, b) for a, b in zip(*raws))
print(json.dumps([done.layers, done.drop, done.before.size, done.after.size, min(alike), same]))
"""


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.runtime), ".xml"])
def test_int8_files_are_smaller_and_predict_nearly_the_same(suffix, tmp_path):
    for name in ("openvino", "nncf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("the extra openvino is not installed")
    line = [sys.executable, "-c", INT8, str(tmp_path / f"int8{suffix}")]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    layers, drop, before, after, alike, same = json.loads(done.stdout.splitlines()[-1])
    assert layers == "all layers"
    assert drop <= 0.5
    assert after < 0.5 * before
    assert alike > 0.95  # eight bits of random weights with few channels
    assert not same


@pytest.mark.fast
def test_the_image_of_the_check_is_read_as_the_system_reads_images(tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((4, 5), 300, np.uint16)).save(photo)
    pixels = checking.check_pixels(photo, Preprocess(white=1500))
    assert pixels.shape == (3, 4, 5)
    assert pixels.unique().tolist() == [51]


@pytest.mark.runtime
def test_the_input_need_not_be_a_multiple_of_the_strides(tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(Scenes(1, (85, 107), seed=7)[0].image.permute(1, 2, 0).numpy()).save(photo)
    done = mw.export(build("mask-frozen-detr").eval(), tmp_path / "networks.onnx", image=photo)
    assert done.difference.objects > 0


@pytest.mark.runtime
def test_the_input_may_be_narrower_than_a_stride(tmp_path):
    """R-FCN has at least one row of anchors, where the division of the side by the stride is rounded down to none."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(7).integers(0, 256, (2, 100, 3), np.uint8)).save(photo)
    done = mw.export(build("rfcn").eval(), tmp_path / "networks.onnx", image=photo)
    assert done.difference.raw < 0.01


def test_the_file_of_an_int8_system_must_be_of_a_runtime(two_stage, tmp_path):
    with pytest.raises(UsageError, match=r"must end in \.onnx or \.xml"):
        export_int8(two_stage[0], tmp_path / "int8.bin", Scenes(2, (96, 144), seed=3))


def test_int8_that_loses_too_much_is_not_written(tmp_path, monkeypatch):
    figures = iter([60.0, 58.8, 58.9, 59.2, 59.4])

    def exported(system, path, image=None):
        path.write_bytes(b"float")
        return SimpleNamespace(path=path, size=5)

    monkeypatch.setattr(quantising, "import_nncf", lambda: None)
    monkeypatch.setattr(quantising, "export", exported)
    monkeypatch.setattr(quantising, "load_exported", lambda path: path)
    monkeypatch.setattr(quantising, "record", lambda *arguments: None)
    monkeypatch.setattr(quantising, "quantise", lambda system, feeds, level, path: path.write_bytes(b"int8"))
    monkeypatch.setattr(quantising, "_figures", lambda *a: quantising.Figures("segm/AP", next(figures), 1.0, 1.0, 4))
    system, scenes = build("yolact"), Scenes(2, (96, 144), seed=3)
    with pytest.raises(
        CheckpointError, match=r"1\.20 with all layers .*1\.10 with all networks .*0\.80 with .*0\.60 with the backbone"
    ):
        export_int8(system, tmp_path / "int8.onnx", scenes)
    assert list(tmp_path.iterdir()) == []
    figures = iter([60.0, 58.8, 58.9, 59.6])
    done = export_int8(system, tmp_path / "int8.onnx", scenes)
    assert done.layers == "the network of the image but its output layers"
    assert done.drop == pytest.approx(0.4)
    assert (tmp_path / "int8.onnx").read_bytes() == b"int8"


@pytest.fixture
def measured(monkeypatch) -> dict[str, Any]:
    """`export_int8` without conversion and measurement: the AP that each file has, and what was read and written."""
    seen: dict[str, Any] = {"figures": [60.0, 60.0], "files": [], "levels": quantising.LADDER}
    figures = iter(range(9))

    def exported(system, path, image=None):
        seen["files"].append(path)
        path.write_bytes(b"float")
        return SimpleNamespace(path=path, size=5)

    def quantised(system, feeds, level, path):
        seen["files"].append(path)
        if level not in seen["levels"]:
            return False
        path.write_bytes(b"int8")
        return True

    def measure(system, data, size):
        return quantising.Figures("segm/AP", seen["figures"][next(figures)], 1.0, 1.0, size)

    monkeypatch.setattr(quantising, "import_nncf", lambda: None)
    monkeypatch.setattr(quantising, "export", exported)
    monkeypatch.setattr(quantising, "load_exported", lambda path: path)
    monkeypatch.setattr(quantising, "record", lambda system, images, folder: seen.update(images=images))
    monkeypatch.setattr(quantising, "quantise", quantised)
    monkeypatch.setattr(quantising, "_figures", measure)
    return seen


def write_part(folder: Path, split: str, count: int) -> None:
    """A part of a data set in COCO's format, with an object in each image."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number in range(count):
        Image.new("RGB", (32, 32), (50 * number, 90, 90)).save(folder / split / f"{number}.png")
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 32, "width": 32} for n in range(count)],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [4, 4, 8, 8], "area": 64, "iscrowd": 0,
             "segmentation": [[4, 4, 12, 4, 12, 12, 4, 12]]}
            for n in range(count)
        ],
        "categories": [{"id": 1, "name": "a"}],
    }  # fmt: skip
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def test_int8_is_calibrated_on_the_part_train_if_there_is_one(measured, tmp_path):
    data = tmp_path / "data"
    for split, count in (("val", 2), ("train", 3)):
        write_part(data, split, count)
        export_int8(build("yolact"), tmp_path / "int8.onnx", data)
        measured["figures"] *= 2
        assert len(measured["images"]) == count
    (data / "annotations" / "instances_train.json").write_text("{")
    with pytest.raises(DataError, match="instances_train"):  # a damaged part is not replaced by another
        export_int8(build("yolact"), tmp_path / "int8.onnx", data)


def test_int8_whose_loss_cannot_be_measured_is_not_written(measured, tmp_path):
    measured["figures"] = [-100.0, -100.0]
    with pytest.raises(UsageError, match="segm/AP is undefined on the 2 images"):
        export_int8(build("yolact"), tmp_path / "int8.onnx", Scenes(2, (96, 144), seed=3))
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_a_quantised_layer_is_no_int8_file(measured, tmp_path):
    """Of a system whose networks have no backbone, that level would be the float32 file."""
    measured["figures"], measured["levels"] = [60.0, 40.0, 41.0, 60.0], ("every", "all")
    with pytest.raises(CheckpointError, match=r"20\.00 with all layers in int8; 19\.00 with all networks .* in int8\)"):
        export_int8(build("yolact"), tmp_path / "int8.onnx", Scenes(2, (96, 144), seed=3))
    assert list(tmp_path.iterdir()) == []


def test_parts_without_layers_of_a_backbone_are_not_quantised_at_its_level(two_stage, monkeypatch):
    monkeypatch.setattr(quantising_onnx, "import_nncf", lambda: None)
    model = mw.load(two_stage[1]).__dict__["_runtime"].part("boxes")
    assert quantising_onnx.quantised_part(model, "boxes", [], "backbone") is None


@pytest.mark.parametrize("name", ["float.xml", "float32.xml", "every.onnx"])
def test_int8_does_not_overwrite_the_file_that_it_is_made_from(measured, name, tmp_path):
    export_int8(build("yolact"), tmp_path / name, Scenes(2, (96, 144), seed=3))
    first, second = measured["files"]
    assert first != second
    assert (tmp_path / name).read_bytes() == b"int8"


def test_figures_of_int8_are_points_of_ap(monkeypatch):
    for value in (0.005, 0.5, 1.0, 1.0000000002):
        summary = {"bbox/AP": 0.1, "segm/AP": value}
        monkeypatch.setattr(quantising, "evaluate", lambda *a, summary=summary, **k: SimpleNamespace(summary=summary))
        monkeypatch.setattr(quantising, "predict", lambda *a, **k: None)
        found = quantising._figures(build("yolact"), Scenes(1, (32, 32)), 5)
        assert found.value == pytest.approx(100 * value)


def test_images_that_cannot_be_read_do_not_calibrate(two_stage, tmp_path):
    class Damaged(Scenes):
        def __getitem__(self, index):
            if index == 0:
                raise ImageError("0.png: damaged")
            return super().__getitem__(index)

    exported = mw.load(two_stage[1])
    quantising.record(exported, Damaged(2, (96, 144), seed=3), tmp_path)
    assert len(list((tmp_path / "dense").iterdir())) == 1
    with pytest.raises(UsageError, match="no image to calibrate on"):
        quantising.record(exported, Damaged(1, (96, 144), seed=3), tmp_path)


def test_the_events_of_onnx_runtime_are_turned_off(two_stage, monkeypatch):
    import onnxruntime

    calls = []
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: calls.append("off"))
    mw.load(two_stage[1])
    assert calls == ["off"]


def test_openvino_and_nncf_report_nothing(tmp_path):
    """Importing both in a new process opens no connection and writes nothing into the home directory."""
    for name in ("openvino", "nncf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("the extra openvino is not installed")
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from maskwright.checkpoints.runtimes import import_nncf, import_openvino\n"
        "ov = import_openvino()\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "ov.Core().available_devices\n"
        "import_nncf()\n"
        "assert not [n for n in sys.modules if n.startswith('openvino_telemetry.')]\n"
        "print('nothing')"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "GITHUB_ACTIONS", "TF_BUILD", "JENKINS_URL")}
    environment |= {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config"), "USERPROFILE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.strip() == "nothing", done.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file() and "cache" not in str(p)] == []
