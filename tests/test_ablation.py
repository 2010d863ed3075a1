"""Rerunning a table of a paper: every variant is trained once, stored, and listed next to the published result."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from maskwright.ablation import Row, _kept, _write, ablate, chart
from maskwright.cli import main
from maskwright.errors import UsageError
from maskwright.systems import Ablation, names, system_class
from maskwright.systems.mask_rcnn import MaskRCNN

TINY = Ablation(
    "two ways to make a mask",
    {"softmax": {"masks": {"loss": "softmax"}}, "sigmoid": {}},
    {"sigmoid": {"AP": 30.3}},
    "somewhere",
    {
        "backbone": {"name": "resnet18", "width": 8}, "resize": {"short": 64, "long": 64}, "neck_width": 16,
        "boxes": {"width": 16}, "masks": {"width": 16, "convs": 1},
        "proposals": {"before": (50, 50), "after": (20, 20)},
    },
    {"size": (64, 64), "classes": ("disc",)},
    {"batch": 2},
)  # fmt: skip


def test_every_variant_is_trained_once_and_listed_beside_the_published_one(tmp_path, monkeypatch):
    monkeypatch.setattr(MaskRCNN, "ablations", {"9z": TINY})
    budget = ["--steps", "2", "--images", "4", "--unseen", "2", "--batch", "2", "--device", "cpu"]
    code = main(["ablate", "mask-rcnn", "9z", "--seeds", "3", "1", "3", *budget, "--out", str(tmp_path)])
    assert code == 0
    table = (tmp_path / "table-9z.md").read_text()
    assert "two ways to make a mask" in table
    assert "2 seeds" in table
    assert "-100" not in table, "a size that no object has is left out"
    assert "| published AP |" in table
    assert table.rstrip().endswith("| 30.3 |")
    assert (tmp_path / "table-9z.svg").read_text().startswith("<svg")
    cells = [line.split(",")[:2] for line in (tmp_path / "table-9z.csv").read_text().splitlines()]
    assert cells == [["variant", "seed"], *([v, s] for v in ("softmax", "sigmoid") for s in ("3", "1"))]
    kept = {
        (d["variant"], d["promise"]["seed"]): f
        for f in tmp_path.glob("runs/*/measured.json")
        if (d := json.loads(f.read_text()))
    }
    assert len(kept) == 4
    assert not list(tmp_path.glob("runs/*/*.safetensors")), "weights are not what it is for"

    # Another time nothing is trained again, unless the budget changed or the file is damaged.
    kept["softmax", 1].write_text("{")
    record = json.loads(kept["sigmoid", 1].read_text())
    record["measured"]["AP"] = 77.0
    kept["sigmoid", 1].write_text(json.dumps(record))
    again = ablate("mask-rcnn", "9z", out=tmp_path, seeds=(1,), steps=2, images=4, unseen=2, batch=2, device="cpu")
    assert again[1].mean("AP") == 77
    assert len(json.loads(kept["softmax", 1].read_text())["measured"]) == 6

    # Nor for a row that another table has too, however it is written there.
    same = replace(TINY, variants={"plain": {"masks": {"loss": "sigmoid"}}}, published={})
    monkeypatch.setattr(MaskRCNN, "ablations", {"9y": same})
    shared = ablate("mask-rcnn", "9y", out=tmp_path, seeds=(1,), steps=2, images=4, unseen=2, batch=2, device="cpu")
    assert shared[0].mean("AP") == 77


def test_every_table_is_of_known_options_and_rows():
    import inspect

    for name in names():
        kind = system_class(name)
        known = set(inspect.signature(kind.__init__).parameters)
        for table, plan in kind.ablations.items():
            assert set(plan.published) <= set(plan.variants), (name, table)
            for variant, options in plan.variants.items():
                assert set(options) | set(plan.base) <= known, (name, table, variant)
                kind(**kind.with_options(plan.base, {**options, "classes": ("a",)}))


def test_an_unknown_table_is_named(tmp_path):
    with pytest.raises(UsageError, match="unknown table of tensormask '2f'; expected one of 2a, 2b, 2c, 2d"):
        ablate("tensormask", "2f", out=tmp_path)
    with pytest.raises(UsageError, match="keypoint-rcnn has no tables"):
        ablate("keypoint-rcnn", "1", out=tmp_path)


def test_the_chart_draws_spread_and_what_was_published():
    rows = [Row("a < b", {"AP": [10.0, 20.0]}, {"AP": 30.0}), Row("c", {"AP": [5.0]}, {})]
    drawn = chart(rows)
    assert "a &lt; b" in drawn
    assert drawn.count("<rect") == 4
    assert rows[0].mean("AP") == 15
    assert rows[0].spread("AP") == pytest.approx(7.071, abs=1e-3)
    assert rows[1].spread("AP") == 0


def test_the_chart_has_room_for_long_names_and_wide_spreads_and_omits_nan():
    name = "a variant whose name says in many words what it is"
    rows = [
        Row(name, {"AP": [0.0, 100.0]}, {}), Row("none", {"AP": [math.nan]}, {"AP": 30.0}),
        Row("one of two", {"AP": [math.nan, 40.0]}, {}),
    ]  # fmt: skip
    drawn = chart(rows)
    assert "nan" not in drawn
    assert ">–</text>" in drawn
    assert rows[2].mean("AP") == 40
    width = float(re.search(r'viewBox="0 0 (\d+)', drawn)[1])
    ends = [float(x) for x in re.findall(r'x2="([\d.]+)"', drawn)]
    assert len(ends) == 2
    assert max(ends) < width - 50
    assert float(re.search(r'x="(\d+)" y="43" text-anchor="end"', drawn)[1]) > 6.5 * len(name)
    assert "nan" not in chart([rows[1]])


def test_missing_values_are_dashes(tmp_path):
    measured = {m: [math.nan] for m in ("AP50", "AP75", "S", "M", "L")}
    rows = [Row("a", {"AP": [math.nan], **measured}, {}, [7]), Row("b", {"AP": [2.0], **measured}, {}, [7])]
    _write(tmp_path, "mask-rcnn", "9z", TINY, rows, {})
    table = (tmp_path / "table-9z.md").read_text()
    assert "| a | – |" in table
    assert "| b | 2.0 ± 0.0 |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--images", "0"], "images must be at least 1, got 0"),
        (["--unseen=-1"], "unseen must be at least 1, got -1"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--seeds"], "pass at least one"),
        (["--seeds=-1"], "seeds must be integers of at least 0, got -1"),
    ],
)
def test_an_invalid_budget_is_refused_at_the_start(tmp_path, capsys, arguments, message):
    assert main(["ablate", "tensormask", "2a", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"measured": {"AP": 1}}', '{"measured": null}'])
def test_a_damaged_run_is_repeated(tmp_path, capsys, text):
    path = tmp_path / "measured.json"
    path.write_text(text)
    assert _kept(path, MaskRCNN.ablations["2b"]) is None
    assert f"{path} is damaged; the run is repeated" in capsys.readouterr().err


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    sizes = (8, 16, 32, 48, 64)
    two = replace(TINY, variants={"sigmoid": {"proposals": {"anchor_sizes": sizes}}}, published={})
    monkeypatch.setattr(MaskRCNN, "ablations", {"9z": two})
    arguments = {
        "out": tmp_path, "seeds": (0,), "steps": 2, "images": 4, "unseen": 2, "batch": 2, "device": "cpu",
        "save_minutes": 0.0,
    }  # fmt: skip

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("maskwright.inference.evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            ablate("mask-rcnn", "9z", **arguments)
    assert list(tmp_path.glob("runs/*/last.ckpt"))
    assert ablate("mask-rcnn", "9z", **arguments)[0].measured["AP"]


def test_rows_that_differ_in_decoding_share_one_training(tmp_path, monkeypatch):
    import maskwright.training as training

    runs = []
    real = training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: runs.append(k["out"]) or real(*a, **k))
    rows = ablate("cascade-mask-rcnn", "stages", out=tmp_path, seeds=(0,), steps=1, images=2, unseen=2, batch=2)
    assert len(runs) == 1
    assert [row.variant for row in rows] == ["1", "2", "1 to 2", "3", "1 to 3"]
    assert list(rows[0].measured) == ["box AP", "AP50", "AP60", "AP70", "AP80", "AP90"]
    text = (tmp_path / "table-stages.md").read_text()
    assert "| variant | box AP | AP50 | AP60 | AP70 | AP80 | AP90 |" in text
    again = ablate("cascade-mask-rcnn", "stages", out=tmp_path, seeds=(0,), steps=1, images=2, unseen=2, batch=2)
    assert len(runs) == 1
    assert again == rows
