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

import maskwright as mw
from maskwright.checkpoints import call_specs
from maskwright.data.scenes import Scenes
from maskwright.errors import CheckpointError, UsageError
from maskwright.inference.exporting import export_int8, prompted, quantising, writing
from maskwright.structures import Instances, Prompts
from tests.systems.tiny import build

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")
pytest.importorskip("onnxruntime", reason="the extra export is not installed")


def images(count: int) -> list[torch.Tensor]:
    scenes = Scenes(count, (96, 144), seed=3)
    return [scenes[index].image for index in range(count)]


CONVERTED: dict[str, Any] = {}  # models of the systems of fixtures, since converting takes seconds


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
    with pytest.MonkeyPatch.context() as patch:
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
    with pytest.raises(UsageError, match="computes on the CPU, not on 'cuda'"):
        mw.load(path, device="cuda")
    with pytest.raises(UsageError, match="not in bfloat16"):
        mw.predict(exported, images(1)[0], dtype="bfloat16", device="cpu")
    with pytest.raises(UsageError, match="compile does not apply to an exported system"):
        mw.predict(exported, images(1)[0], compile=True, device="cpu")
    with pytest.raises(UsageError, match=r"must end in \.onnx or \.xml"):
        mw.export(system, tmp_path / "model.pt")


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


@pytest.mark.runtime
def test_the_input_need_not_be_a_multiple_of_the_strides(tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(Scenes(1, (85, 107), seed=7)[0].image.permute(1, 2, 0).numpy()).save(photo)
    done = mw.export(build("mask-frozen-detr").eval(), tmp_path / "networks.onnx", image=photo)
    assert done.difference.objects > 0


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
