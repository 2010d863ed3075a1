"""The benchmark of what weights that ship are worth: its table, and the compute of the control."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from maskwright.data import Scenes
from maskwright.errors import MaskwrightError
from tests.systems.tiny import build, tiny_options

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def transfer():
    spec = importlib.util.spec_from_file_location("transfer", ROOT / "benchmarks/transfer.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["transfer"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_table_has_means_standard_errors_and_differences_of_pairs(transfer, tmp_path):
    rows = [("scenes", 0, 30.0), ("scenes", 1, 32.0), ("random", 0, 20.0), ("random", 1, 24.0), ("total", 1, 31.0)]
    for arm, seed, ap in rows:
        row = {"data": "nuclei", "arm": arm, "steps": 300, "seed": seed, "segm/AP": ap}
        (tmp_path / f"nuclei-{arm}-300-{seed}.json").write_text(json.dumps(row))
    for arm, steps, ap in [("scenes", 300, 3.0), ("scenes", 1200, 5.0), ("total", 1200, 8.0)]:  # one total for both
        row = {"data": "balloons", "arm": arm, "steps": steps, "seed": 0, "segm/AP": ap}
        (tmp_path / f"balloons-{arm}-{steps}-0.json").write_text(json.dumps(row))
    head, rule, *body = transfer.table(tmp_path).splitlines()
    assert head == "| data | steps | scenes | random | total | scenes - random | scenes - total |"
    assert body == [
        "| balloons | 300 | 3.0 |  | 8.0 |  | -5.0 |",
        "| balloons | 1200 | 5.0 |  | 8.0 |  | -3.0 |",
        "| nuclei | 300 | 31.0 ± 1.0 | 22.0 ± 2.0 | 31.0 | +9.0 ± 1.0 | +1.0 |",
    ]
    assert rule.count("--:") == 6


def test_the_control_has_the_input_pixels_of_the_pretraining(transfer):
    about = {"source": {"command": "benchmarks/pretraining.py mask-rcnn --steps 100 --seed 0"}}
    recipe = transfer.RECIPES["mask-rcnn"]
    assert transfer._pixels(about) == 100 * recipe.changes["batch"] * 224 * 224  # its input while learning
    about["source"]["command"] = "python benchmarks/pretraining.py mask-rcnn --out weights"
    assert transfer._pixels(about) == recipe.steps * recipe.changes["batch"] * 224 * 224
    sam, mask2former = (transfer.RECIPES[name] for name in ("sam", "mask2former"))
    about["source"]["command"] = f"benchmarks/pretraining.py sam --steps {sam.steps // 2}"
    assert sam.then is not None
    assert transfer._pixels(about) == sam.steps // 2 * 4 * 256 * 256 + sam.then[1] // 2 * 2 * 512 * 512
    about["source"]["command"] = "benchmarks/pretraining.py mask2former"
    assert mask2former.then is not None
    own = (mask2former.steps + mask2former.then[1]) * 8 * 160 * 160
    start = transfer.Start.read(mask2former.start).pixels
    assert transfer._pixels(about) == own + start > own
    eomt = transfer.RECIPES["eomt"]
    about["source"]["command"] = f"benchmarks/pretraining.py eomt --steps {eomt.steps // 2}"
    assert eomt.then is not None
    both = eomt.before[0][0] // 2 * 16 + eomt.before[1][0] // 2 * 8 + eomt.steps // 2 * 8
    assert transfer._pixels(about) == both * 160 * 160 + eomt.then[1] // 2 * 4 * 320 * 320
    assert transfer._pixels({**about, "source": {"command": "by hand"}}) is None
    assert transfer._pixels({**about, "source": {}}) is None


def test_a_condensed_detector_has_fewer_classes_and_the_mean_of_their_boxes_and_masks(transfer):
    from benchmarks.pretraining import condensed

    system = build("mask-rcnn", classes=[f"contour-{n}" for n in range(6)]).eval()
    smaller = condensed(system, 3)
    assert smaller.classes == ("contour-0", "contour-2", "contour-4")
    features = torch.randn(2, *system.boxes.deltas.weight.shape[1:])
    torch.testing.assert_close(
        smaller.boxes.deltas(features), system.boxes.deltas(features).view(2, 6, 4).mean(1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(smaller.boxes.classes(features), system.boxes.classes(features)[:, [0, 2, 4, 6]])
    maps = torch.randn(2, system.masks.logits.weight.shape[1], 3, 3)
    torch.testing.assert_close(
        smaller.masks.logits(maps), system.masks.logits(maps).mean(1, keepdim=True), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_pretraining_takes_at_least_one_step(steps, transfer, tmp_path, monkeypatch, capsys):
    from benchmarks import pretraining

    monkeypatch.setattr(pretraining.mw, "train", lambda *_, **__: pytest.fail("trains"))
    monkeypatch.setattr(sys, "argv", ["pretraining.py", "sam", "--out", str(tmp_path), "--steps", steps])
    with pytest.raises(SystemExit):
        pretraining.main()
    assert "--steps must be at least 1" in capsys.readouterr().err


def test_a_second_stage_starts_alike_whether_or_not_the_first_ended_in_another_process(transfer, tmp_path, monkeypatch):
    from benchmarks import pretraining

    options = tiny_options("solov2")
    recipe = pretraining.Recipe("solov2-small", options, 64, 1, {"batch": 1}, then=({}, 1, {"batch": 1}))
    ends = [tmp_path / f"{stage}.safetensors" for stage in (1, 2)]
    pretraining.save(build("solov2", classes=["contour-000"]), ends[0])
    started = []

    def train(start, *_, **__):
        if isinstance(start, str):
            return ends[0]
        started.append({name: value.clone() for name, value in start.state_dict().items()})
        pretraining.save(start, ends[1])
        return ends[1]

    monkeypatch.setitem(pretraining.RECIPES, "solov2", recipe)
    monkeypatch.setattr(pretraining.mw, "train", train)
    monkeypatch.setattr(sys, "argv", ["pretraining.py", "solov2", "--out", str(tmp_path / "out")])
    for state in (1, 2):
        torch.manual_seed(state)
        pretraining.main()
    assert [name for name, value in started[0].items() if not torch.equal(value, started[1][name])] == []


def test_a_folder_is_continued_with_the_same_options_only(transfer, tmp_path, monkeypatch):
    from benchmarks import pretraining

    monkeypatch.setattr(pretraining.mw, "train", lambda *_, **__: pytest.fail("trains"))
    options = {"steps": 2, "seed": 0, "amp": "no", "nuclei": None}
    pretraining.keep_to(options, tmp_path / "sam.json")
    pretraining.keep_to(options, tmp_path / "sam.json")
    line = ["pretraining.py", "sam", "--out", str(tmp_path), "--steps", "3", "--amp", "no", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit, match=r"sam\.json: was begun with steps 2, not 3, seed 0, not 1; give another"):
        pretraining.main()
    monkeypatch.setattr(transfer, "sets", lambda folder, name: None)
    monkeypatch.setattr(transfer, "train", lambda run, *_: {"data": run.data})
    line = ["transfer.py", str(tmp_path), "--out", str(tmp_path / "out"), "--data", "nuclei", "--arms", "random"]
    for more in ([], ["--steps", "300", "--seeds", "4"]):
        monkeypatch.setattr(sys, "argv", [*line, *more])
        transfer.main()
    monkeypatch.setattr(sys, "argv", [*line, "--weights", "sam-small-scenes", "--lr", "1e-3"])
    with pytest.raises(
        SystemExit, match=r"begun with weights mask-rcnn-scenes.safetensors, not sam-small.*, lr 0.0005"
    ):
        transfer.main()


def test_data_sets_are_opened_before_the_first_run(transfer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "train", lambda *_: pytest.fail("trains"))
    line = ["transfer.py", str(tmp_path), "--out", str(tmp_path / "out"), "--arms", "random"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit):
        transfer.main()
    assert "no folder in it is a data set" in capsys.readouterr().err
    Scenes(1, (32, 32)).write(tmp_path / "both", "train")
    Scenes(1, (32, 32)).write(tmp_path / "both", "val")
    Scenes(1, (32, 32)).write(tmp_path / "one", "train")
    monkeypatch.setattr(sys, "argv", [*line, "--data", "both", "one"])
    with pytest.raises(MaskwrightError, match="one"):
        transfer.main()


def test_without_names_the_data_sets_of_the_benchmarks_are_taken_or_else_all_in_the_folder(
    transfer, tmp_path, monkeypatch, capsys
):
    (tmp_path / "notes").mkdir()
    monkeypatch.setattr(sys, "argv", ["transfer.py", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        transfer.main()
    assert "no folder in it is a data set in COCO layout" in capsys.readouterr().err
    for name in ("shop", "garden"):
        (tmp_path / name / "annotations").mkdir(parents=True)
    assert transfer.default_sets(tmp_path) == ["garden", "shop"]
    (tmp_path / "nuclei/annotations").mkdir(parents=True)
    assert transfer.default_sets(tmp_path) == ["nuclei"]


@pytest.mark.parametrize(("given", "data", "short"), [([], "nuclei", 224), ([], "shop", 160), (["96"], "nuclei", 96)])
def test_a_short_side_that_is_given_applies_to_all_data_sets(transfer, tmp_path, monkeypatch, given, data, short):
    seen = []

    def stop(*_, **settings):
        seen.append((settings["short"], settings["long"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "sets", lambda *_: (None, None))
    monkeypatch.setattr(transfer.mw, "train", stop)
    options = ["--short", *given] if given else []
    line = ["transfer.py", str(tmp_path), "--out", str(tmp_path), "--data", data, "--arms", "scenes", *options]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(KeyboardInterrupt):
        transfer.main()
    assert seen == [((short,), 2 * short)]
