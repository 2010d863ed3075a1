"""The originals' recorded answers, and that the runner says no when they are not met."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import maskwright
from maskwright.systems import System, detr
from tests.parity import checkers, ties
from tests.parity import run as runner
from tests.parity.ledger import Ledger, NotRecorded, input_seed, inputs, placed
from tests.parity.weights import write_checkpoint

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("MASKWRIGHT_SHARED", HERE.parents[1] / "../shared")) / "reference"
LONG = ("x101", "dc5", "eomt", "sam2-hiera", "sam2.1-hiera", "sam-vit", "mobile-sam", "efficient-sam")
# Minutes of large networks, whose code other recordings or tests run through: ViT-B in sam-amg, DC5 in C4, X101 in R50,
# answers of recordings with gradients.
FULL = {
    "sam-vit_b", "eomt-s-coco-panoptic-640", "keypoint-rcnn-torchvision-r50-fpn",
    "keypoint-rcnn-detectron2-r50-fpn", "cascade-mask-rcnn-detectron2-r50-fpn", "mask-rcnn-torchvision-r50-fpn-v2",
    "mask-rcnn-detectron2-r50-c4", "mask-rcnn-detectron2-r50-c4-batch", "mask-rcnn-detectron2-r50-dc5",
    "mask-rcnn-detectron2-x101-32x8d-fpn", "mask-rcnn-detectron2-r50-fpn-lsj", "mask-rcnn-detectron2-r50-fpn-gn",
    "mask-rcnn-detectron2-r50-fpn-syncbn",
}  # fmt: skip


def layout_of(layouts: Path, outputs: str) -> Path:
    """The layout whose name begins that of the outputs: the longest of several."""
    fitting = [p for p in layouts.glob("*.json") if f"{outputs}-".startswith(f"{p.stem}-")]
    return max(fitting, key=lambda p: len(p.stem), default=layouts / f"{outputs}.json")


def pairs(folder: Path, layouts: Path) -> list[str]:
    """Names of the recorded outputs, those of one layout side by side."""
    names = [p.stem for p in folder.glob("*.npz") if checkers.mine(p.stem)]
    return sorted(names, key=lambda n: (layout_of(layouts, n).stem, n))


def frozen_of(system: System) -> int | None:
    return system.options.get("backbone", {}).get("frozen")


class Loaded:
    """The last system that was loaded: outputs of one layout and seed share it."""

    def __init__(self) -> None:
        self.key: object = None
        self.system: System | None = None

    def __call__(self, layout: Path, outputs: Path, folder: Path) -> System:
        ledger = Ledger(outputs)
        stated = runner.stated(ledger)
        frozen = stated.get("backbone", {}).pop("frozen", None)  # only where gradients were taken; no number changes
        key = (
            layout,
            ledger.about.get("seed", ledger.about.get("weights_seed")),
            json.dumps(ledger.about.get("overrides")),
            str(stated),
        )
        if self.system is None or key != self.key or frozen not in (None, frozen_of(self.system)):
            self.system = None  # so that two are never held
            self.key, self.system = key, runner.load(layout, ledger, folder)
        return self.system


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded()


def check(layouts: Path, outputs: Path, loaded: Loaded, folder: Path) -> None:
    if checkers.needs_weights(Ledger(outputs)):
        layout = layout_of(layouts, outputs.stem)
        system = loaded(layout, outputs, folder)
        for path in folder.iterdir():
            path.unlink()  # hundreds of megabytes
        ledger = runner.run(layout, outputs, system)
    else:
        ledger = runner.run(None, outputs)
    assert ledger.lines, "nothing was compared"
    assert ledger.failed == 0, "\n".join(line for line in ledger.lines if line.startswith("FAIL"))


def test_every_recording_kept_here_is_checked():
    names = [p.stem for p in (HERE / "thin").glob("*.npz")]
    assert sorted(names) == sorted(pairs(HERE / "thin", HERE / "layouts"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.full] * (n in FULL) or [pytest.mark.slow] * any(w in n for w in LONG))
        for n in pairs(HERE / "thin", HERE / "layouts")
    ],
)
def test_answers_as_the_original(name: str, loaded: Loaded, tmp_path: Path):
    check(HERE / "layouts", HERE / "thin" / f"{name}.npz", loaded, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", pairs(SHARED / "outputs", SHARED / "layouts") or ["none"])
def test_answers_as_the_original_in_full(name: str, loaded: Loaded, tmp_path: Path):
    if not (SHARED / "outputs").is_dir():
        pytest.skip("the full recordings are not here; MASKWRIGHT_SHARED names the folder that holds reference/")
    check(SHARED / "layouts", SHARED / "outputs" / f"{name}.npz", loaded, tmp_path)


# ---- the runner -----------------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, layout: object, outputs: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", str(layout), str(outputs)])
    return runner.main()


def changed(target: Path, **arrays: np.ndarray) -> Path:
    with np.load(HERE / "thin" / "roi-pooling.npz") as file:
        np.savez(target, **{**{k: file[k] for k in file.files}, **arrays})
    return target


@pytest.mark.fast
@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([], 0), ([""], 0), (["backbone.bottom_up.stem.conv1.weight", "backbone.bottom_up.res2.0.conv1.weight"], 2),
        (["backbone.stem.conv1.weight"], 1), (["backbone.body.conv1.weight", "backbone.body.layer1.0.conv1.weight",
        "backbone.body.layer2.0.conv1.weight"], 3), (["backbone.res3.0.conv1.weight"], None),
        (["transformer.level_embed"], None),
    ],
)  # fmt: skip
def test_what_had_no_gradient_tells_how_much_was_frozen(names: list[str], parts: int | None):
    assert runner.frozen_parts(names) == parts


@pytest.mark.fast
@pytest.mark.parametrize("drawn", [0, 5])
def test_the_recording_settles_which_seed_drew_the_input(drawn: int, tmp_path: Path):
    def ask(seed: int) -> torch.Tensor:
        return torch.from_numpy(np.random.RandomState(seed).standard_normal(4))

    np.savez(tmp_path / "x.npz", meta=json.dumps({"seed": 5}), x=ask(drawn).numpy())
    assert input_seed(Ledger(tmp_path / "x.npz"), "x", ask) == drawn


@pytest.mark.fast
def test_runner_answers_0_when_all_agrees(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    assert call(monkeypatch, "-", HERE / "thin" / "roi-pooling.npz") == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert last == f"roi-pooling: {len(lines)} of {len(lines)} within bounds"


@pytest.mark.fast
def test_runner_answers_1_for_a_value_beside_the_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
):
    with np.load(HERE / "thin" / "roi-pooling.npz") as file:
        name = next(k for k in file.files if re.fullmatch(r"roi_align_\d+_aligned1_ratio\d+", k))
        wrong = changed(tmp_path / "wrong.npz", **{name: file[name] * (1 + 3e-5)})
    assert call(monkeypatch, "-", wrong) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed == [f"FAIL {name}: 3.00e-05"]


@pytest.mark.fast
def test_runner_answers_1_for_an_array_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
):
    assert call(monkeypatch, "-", changed(tmp_path / "more.npz", something_else=np.zeros(3))) == 1
    assert "FAIL something_else: was not checked" in capsys.readouterr().out


@pytest.mark.fast
@pytest.mark.parametrize(
    ("layout", "outputs", "words"),
    [
        ("-", "no such.npz", "No such file"),
        ("-", HERE / "thin" / "mask-rcnn-torchvision-r18-fpn.npz", "without weights"),
        ("no such.json", HERE / "thin" / "mask-rcnn-torchvision-r18-fpn.npz", "No such file"),
    ],
)
def test_runner_answers_2_when_the_pair_cannot_be_run(
    layout: str, outputs: Path, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert call(monkeypatch, layout, outputs) == 2  # pyright: ignore[reportArgumentType]
    assert words in capsys.readouterr().err


@pytest.mark.fast
def test_runner_answers_2_for_weights_of_no_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
):
    (tmp_path / "other.json").write_text(json.dumps({"tensors": {"some.weight": [[2, 2], "float32"]}}))
    assert call(monkeypatch, tmp_path / "other.json", HERE / "thin" / "mask-rcnn-torchvision-r18-fpn.npz") == 2
    assert "match no supported system" in capsys.readouterr().err


@pytest.mark.fast
@pytest.mark.parametrize(
    ("second", "theirs", "good"),
    [(1.0, [[0, 1], [0, 1]], True), (1.0 + 1e-7, [[2, 1], [0, 1]], True), (1.001, [[2, 1], [0, 1]], False),
     (1.0 + 1e-7, [[0, 2], [0, 0]], False)],
)  # fmt: skip
def test_a_choice_between_queries_of_equal_cost_is_no_disagreement(
    second: float, theirs: list[list[int]], good: bool, tmp_path: Path
):
    np.savez(tmp_path / "match.npz", match=np.array([theirs]))
    ledger = Ledger(tmp_path / "match.npz")
    cost = torch.tensor([[[1.0, 5.0], [5.0, 1.0], [second, 5.0]]])
    ours = torch.tensor([[[0, 1], [0, 1]]])
    choices = ties.compare_choice(ledger, "match", cost, ours, ledger.peek("match"))
    assert (ledger.failed == 0) is good
    if good:
        with ties.choosing(detr, choices):
            ((queries, objects),) = detr.assign([cost])
        assert torch.equal(torch.stack([queries, objects], 1)[0, :, objects[0]], ledger.peek("match")[0])


@pytest.mark.fast
def test_queries_that_would_do_as_well_are_found():
    cost = torch.tensor([[[1.0, 5.0], [5.0, 1.0], [1.0 + 1e-7, 1.5]]])
    assert ties.alternatives(cost, torch.tensor([[[0, 1]], [[0, 1]]])) == [(0, 2, 0)]


# ---- files as they were published -----------------------------------------------------------------------------------


def test_what_old_detectron2_files_hold_besides_is_ignored(tmp_path: Path):
    """Anchors of each level, and the colours, in the file of 2019."""
    path = write_checkpoint(HERE / "layouts" / "mask-rcnn-detectron2-r50-c4.json", tmp_path, 3)
    content = pickle.loads(path.read_bytes())
    content["model"]["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((15, 4), "float32")
    content["model"]["pixel_mean"] = np.full((3, 1, 1), 9, "float32")
    content["model"]["pixel_std"] = np.full((3, 1, 1), 9, "float32")
    plain = maskwright.load(path)
    path.write_bytes(pickle.dumps(content))
    system = maskwright.load(path)
    assert system.preprocess == plain.preprocess
    assert system.preprocess.std == (1.0, 1.0, 1.0)
    ours, theirs = system.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("kind", ["mask-rcnn", "keypoint-rcnn"])
def test_old_and_present_names_of_torchvision_are_one_network(kind: str, tmp_path: Path):
    """Each tensor comes to the same place from both layouts: told apart by a value of its own in each."""
    layouts = [HERE / "layouts" / f"{kind}-torchvision-r50-fpn{old}.json" for old in ("", "-published")]
    places = []
    for layout in layouts:
        tensors = json.loads(layout.read_text())["tensors"]
        state = {k: torch.full(shape, float(i)) for i, (k, (shape, _)) in enumerate(tensors.items())}
        torch.save(state, tmp_path / "weights.pth")
        system = maskwright.load(tmp_path / "weights.pth")
        assert system.options["backbone"]["norm_eps"] == 0.0
        places.append({k: float(v.flatten()[0]) for k, v in system.state_dict().items()})
    assert places[0] == places[1]
    assert len(set(places[0].values())) == len(places[0])


# ---- recordings that have only some of an original's arrays ---------------------------------------------------------


def cut(target: Path, keep: str, name: str, meta: dict[str, object] | None = None) -> Path:
    """A copy of a recording with the arrays whose names match `keep`, and some words of `meta` replaced."""
    with np.load(HERE / "thin" / f"{name}.npz") as file:
        about = {**json.loads(str(file["meta"])), **(meta or {})}
        arrays = {k: file[k] for k in file.files if re.match(keep, k)}
    path = target / f"{name}.npz"
    np.savez(path, meta=json.dumps(about), **arrays)  # pyright: ignore[reportArgumentType]
    return path


RETINANET = "retinanet-detectron2-r50-fpn"


@pytest.mark.parametrize(
    ("keep", "count"),
    [(r"logits_p7|det_", 4), (r"det_(scores|classes)", 2), (r"det_boxes", 1), (r"train_loss_cls|gt_", 1), (r"fpn_", 3)],
)
def test_part_of_a_recording_is_compared(keep: str, count: int, loaded: Loaded, tmp_path: Path):
    system = loaded(HERE / "layouts" / f"{RETINANET}.json", HERE / "thin" / f"{RETINANET}.npz", tmp_path)
    ledger = runner.run(HERE / "layouts" / f"{RETINANET}.json", cut(tmp_path, keep, RETINANET), system)
    assert (len(ledger.lines), ledger.failed, ledger.skipped) == (count, 0, 0), ledger.lines


def test_loss_without_its_target_is_listed_and_not_counted(loaded: Loaded, tmp_path: Path):
    layout = HERE / "layouts" / f"{RETINANET}.json"
    system = loaded(layout, HERE / "thin" / f"{RETINANET}.npz", tmp_path)
    ledger = runner.run(layout, cut(tmp_path, r"logits_p7|train_loss_cls|gt_classes", RETINANET), system)
    assert [line.split(":")[0] for line in ledger.lines] == ["ok   logits_p7", "skip gt_classes", "skip train_loss_cls"]
    assert "the recording lacks gt_boxes" in ledger.lines[2]
    assert runner.outputs_line(ledger).endswith("1 of 1 within bounds, 2 without their inputs")
    with pytest.raises(LookupError, match="it needs gt_boxes"):
        runner.run(layout, cut(tmp_path, r"train_loss_cls|gt_classes", RETINANET), system)


def test_empty_result_keeps_its_dimensions(loaded: Loaded, tmp_path: Path):
    """No object above the threshold: arrays of no rows, of which one was kept in part."""
    layout = HERE / "layouts" / f"{RETINANET}.json"
    system = loaded(layout, HERE / "thin" / f"{RETINANET}.npz", tmp_path)
    path = cut(tmp_path, "fpn_p7", RETINANET, {"score_threshold": 0.9999})
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files}
    none = {
        "det_boxes": np.zeros((0, 4), "float32"), "det_classes": np.zeros(0, "int64"),
        "det_scores__shape": np.array([0]), "det_scores__sampled": np.zeros(0, "float32"),
    }  # fmt: skip
    np.savez(path, **arrays, **none)  # pyright: ignore[reportArgumentType]
    ledger = runner.run(layout, path, system)
    assert (len(ledger.lines), ledger.failed) == (4, 0), ledger.lines
    np.savez(path, **arrays, **{**none, "det_boxes": np.ones((1, 4), "float32")})  # pyright: ignore[reportArgumentType]
    assert runner.run(layout, path, system).failed > 0


@pytest.mark.fast
@pytest.mark.parametrize(
    ("about", "seed", "shape"),
    [
        ({"input": [2, 3, 4, 6], "seed": 5}, 5, (2, 3, 4, 6)),
        ({"input": [1, 3, 4, 6], "seed": 5, "input_seed": 7}, 7, (1, 3, 4, 6)),
        ({"input": "(1, 3, 4, 6)", "seed": 0, "input_seed": 0}, 0, (1, 3, 4, 6)),
        ({"input": "1x3x4x6", "seed": 2}, 2, (1, 3, 4, 6)),
        ({"input": [3, 4, 6], "weights_seed": 3}, 3, (1, 3, 4, 6)),
        ({"shape": [4, 6], "seed": 4}, 4, (1, 3, 4, 6)),
        ({"input": "RandomState(9).standard_normal((1,3,4,6)) float32", "seed": 1}, 9, (1, 3, 4, 6)),
    ],
)
def test_input_that_is_given_as_a_shape_is_drawn_from_its_seed(about: dict[str, object], seed: int, shape: tuple):
    images, sizes = inputs(about)
    assert np.array_equal(images.numpy(), np.random.RandomState(seed).standard_normal(shape).astype("float32"))
    assert sizes == [shape[2:]] * shape[0]
    again, valid = placed(about)
    assert torch.equal(images, again)
    assert valid.tolist() == [list(s) for s in sizes]


@pytest.mark.fast
def test_values_of_an_input_that_was_kept_in_part(tmp_path: Path):
    places = np.random.RandomState(0).randint(0, 6, 3)
    np.savez(tmp_path / "x.npz", x__shape=np.array([2, 3]), x__sampled=np.arange(6.0)[places])
    ledger = Ledger(tmp_path / "x.npz")
    values = ledger.given_in_part("x").flatten()
    assert set(values[~values.isnan()].int().tolist()) == set(places.tolist())
    with pytest.raises(NotRecorded, match="x as a whole"):
        ledger.given("x")
