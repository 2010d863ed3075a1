"""The whole workflow on the command line, from a data set to a report, at a tiny size."""

from __future__ import annotations

import json
import shutil

import pytest

from maskwright import cli, demo
from maskwright.checkpoints import load, shipping
from maskwright.data import Scenes
from maskwright.evaluation import Result
from tests.shipping import Distribution, mask_rcnn

pytestmark = pytest.mark.slow

TINY = [
    "backbone=resnet18", "backbone.width=8", "backbone.norm=group", "neck_width=16",
    "proposals.anchor_sizes=[16,32,48,64,96]", "proposals.before=[60,40]", "proposals.after=[20,20]", "boxes.width=32",
    "masks.convs=1", "masks.width=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A data set and a run of two epochs on it."""
    folder = tmp_path_factory.mktemp("journey")
    for split, seed in (("train", 0), ("val", 1)):
        Scenes(8, (96, 96), seed=seed, classes=("disc", "box"), difficulty=0.1, empty=0).write(folder / "data", split)
    line = ["train", "mask-rcnn", "--data", str(folder / "data"), "--out", str(folder / "run"), "--epochs", "2"]
    line += ["--option", *TINY, "--short", "96", "--batch", "4", "--workers", "0", "--device", "cpu"]
    assert cli.main(line) == 0
    return folder


def test_a_run_folder_is_there(house):
    run = house / "run"
    assert {"best.safetensors", "last.safetensors", "last.ckpt", "recipe.json", "log.csv"} <= {
        p.name for p in run.iterdir()
    }
    assert json.loads((run / "recipe.json").read_text())["epochs"] == 2


def test_check_passes_a_good_set_and_fails_a_bad_one(house, tmp_path, capsys):
    assert cli.main(["check", str(house / "data")]) == 0
    bad = tmp_path / "bad"
    shutil.copytree(house / "data", bad)
    (bad / "train" / "000003.png").unlink()
    capsys.readouterr()
    assert cli.main(["check", str(bad)]) == 1
    assert "000003.png" in capsys.readouterr().out
    assert cli.main(["check", str(bad), "--fix", str(tmp_path / "good")]) == 0
    assert cli.main(["check", str(tmp_path / "good")]) == 0


def test_a_data_set_that_cannot_be_repaired_fails(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("[]")
    assert cli.main(["check", str(tmp_path / "broken.json"), "--fix", str(tmp_path / "copy")]) == 1
    said = capsys.readouterr().out
    assert "nothing could be repaired" in said
    assert "repaired copy" not in said


def test_evaluate_and_report(house, capsys):
    weights = str(house / "run/best.safetensors")
    line = ["evaluate", weights, "--data", str(house / "data"), "--out", str(house / "run"), "--device", "cpu"]
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    assert "AP50" in shown
    assert "segm" in shown
    assert Result.load(house / "run/result.json").classes == ("disc", "box")
    assert cli.main(["report", str(house / "run"), "-o", str(house / "page.html")]) == 0
    page = (house / "page.html").read_text("utf-8")
    assert "disc" in page
    assert "http://" not in page.replace("http://www.w3.org", ""), "the page needs no network"


def test_predict_skips_and_reports_a_bad_image(house, tmp_path, capsys):
    source = tmp_path / "images"
    shutil.copytree(house / "data/val", source)
    whole = (source / "000002.png").read_bytes()
    (source / "000002.png").write_bytes(whole[: len(whole) // 3])
    (source / "000005.png").write_bytes(b"no image at all")
    line = ["predict", str(source), "--weights", str(house / "run/best.safetensors"), "-o", str(tmp_path / "found")]
    line += ["--format", "drawn", "coco", "masks", "--score-threshold", "0.05", "--device", "cpu"]
    assert cli.main(line) == 1
    complaint = capsys.readouterr().err
    assert "000002.png" in complaint
    assert "000005.png" in complaint
    assert "Traceback" not in complaint
    kept = {f"{n:06d}" for n in (1, 3, 4, 6, 7, 8)}
    assert {p.stem for p in (tmp_path / "found/drawn").iterdir()} == kept
    assert {p.stem for p in (tmp_path / "found/masks").iterdir()} == kept
    about = json.loads((tmp_path / "found/pictures.json").read_text())
    assert len(about["images"]) == 6
    ids = {image["id"] for image in about["images"]}
    assert {record["image_id"] for record in json.loads((tmp_path / "found/results.json").read_text())} <= ids
    assert "did not write" not in complaint
    # A second run into the folder names what it leaves of the first one.
    assert cli.main([line[0], str(source / "000001.png"), *line[2:]]) == 0
    complaint = capsys.readouterr().err
    assert (
        f"note: {tmp_path / 'found'} also has 10 files that this run did not write, such as drawn/000003.jpg"
        in complaint
    )


def test_results_have_the_ids_of_the_annotations(house, tmp_path, capsys):
    best, data = str(house / "run/best.safetensors"), house / "data"
    known = {entry["id"] for entry in json.loads((data / "annotations/instances_val.json").read_text())["images"]}
    common = ["--format", "coco", "--score-threshold", "0.05", "--device", "cpu"]
    for images in ([], [str(data / "val")]):
        for chosen in (["--data", str(data)], ["--data", str(data), "--split", "val"], []):
            if not images and not chosen:
                continue
            out = tmp_path / f"{len(images)}{len(chosen)}"
            assert cli.main(["predict", *images, *chosen, "-w", best, "-o", str(out), *common]) == 0
            assert "image and category ids are those of data/val" in capsys.readouterr().out
            about = json.loads((out / "pictures.json").read_text())
            assert {entry["id"] for entry in about["images"]} == known
    assert cli.main(["predict", "-w", best]) == 2
    assert "predict requires IMAGES" in capsys.readouterr().err
    line = ["predict", str(data / "val"), "--data", str(data), "--split", "test", "-w", best, "-o", str(tmp_path)]
    assert cli.main(line) == 2
    assert "no annotations of split 'test'" in capsys.readouterr().err


def test_data_in_another_format_is_used_by_every_command(house, tmp_path, capsys):
    data, best = house / "data", str(house / "run/best.safetensors")
    assert cli.main(["convert-data", str(data), str(tmp_path / "yolo"), "--to", "yolo", "--allow-loss"]) == 0
    assert cli.main(["check", str(tmp_path / "yolo")]) == 0
    assert cli.main(["evaluate", best, "--data", str(tmp_path / "yolo"), "--device", "cpu"]) == 0
    capsys.readouterr()
    images, found = str(tmp_path / "yolo/images/val"), tmp_path / "found"
    line = ["predict", images, "-w", best, "-o", str(found), "--score-threshold", "0.05", "--device", "cpu"]
    assert cli.main([*line, "--to", "labelme"]) == 0
    assert "8 images, " in capsys.readouterr().out
    shapes = [s for p in (found / "labelme").glob("*.json") for s in json.loads(p.read_text())["shapes"]]
    assert len(shapes) >= len(json.loads((found / "results.json").read_text())) > 0
    assert all(0.05 <= shape["score"] <= 1 for shape in shapes)
    assert cli.main([*line, "--to", "labelme"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_share_of_the_images_is_held_out(house):
    from maskwright.training.setup import open_sets, settle_kind

    kind = settle_kind("mask-rcnn", None, None, None, None)
    train, val = open_sets(str(house / "data"), "0.25", kind, seed=3)
    assert (len(train), len(val)) == (6, 2)
    again = open_sets(str(house / "data"), 0.25, kind, seed=3)[1]
    assert again.image_ids() == val.image_ids()


def test_bad_images_only_give_no_traceback(house, tmp_path, capsys):
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    line = ["predict", str(tmp_path / "x.jpg"), "-w", str(house / "run/best.safetensors"), "-o", str(tmp_path / "o")]
    assert cli.main([*line, "--device", "cpu"]) in (1, 2)
    shown = capsys.readouterr()
    assert "x.jpg" in shown.err
    assert "Traceback" not in shown.err


def test_convert_and_continue_from_weights(house, tmp_path, capsys):
    best = str(house / "run/best.safetensors")
    assert cli.main(["convert", best, "-o", str(tmp_path / "copy.safetensors")]) == 0
    assert (tmp_path / "copy.safetensors").exists()
    line = ["train", "mask-rcnn", "--data", str(house / "data"), "--out", str(tmp_path / "more"), "--epochs", "1"]
    line += ["--weights", str(tmp_path / "copy.safetensors"), "--short", "96", "--workers", "0", "--device", "cpu"]
    assert cli.main(line) == 0
    assert (tmp_path / "more/best.safetensors").exists()


def test_systems_lists_the_options(capsys):
    assert cli.main(["systems"]) == 0
    assert "mask-rcnn" in capsys.readouterr().out
    assert cli.main(["systems", "mask-rcnn"]) == 0
    shown = capsys.readouterr().out
    assert "1703.06870" in shown
    assert 'backbone.name="resnet50"' in shown


def test_the_demo_writes_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shipping, "first_with", lambda role: None)
    out = tmp_path / "demo"
    page = demo.run(out, epochs=1, images=8, unseen=3)
    shown = capsys.readouterr().out
    assert page == out / "report.html"
    assert "maskwright demo" in page.read_text("utf-8")
    assert len(list((out / "found/drawn").glob("*.jpg"))) == 3
    assert (out / "run/best.safetensors").exists()
    assert page.absolute().as_uri() in shown
    assert f"predict IMAGES --weights {out / 'run/best.safetensors'}" in shown
    assert "5/5  done" in shown
    assert not (out / "first").exists()
    demo._make_room(out)  # another demonstration replaces it
    assert not (out / "run").exists()


def test_the_demo_starts_from_installed_weights(tmp_path, capsys, monkeypatch):
    distribution = Distribution(tmp_path / "site", "demo-weights")
    distribution.add("demo-scenes", mask_rcnn(resize={"short": 96, "long": 96}))
    find = shipping.entry_points
    monkeypatch.setattr(
        shipping, "entry_points", lambda group: [p for p in find(group=group) if p.name == "demo-weights"]
    )
    monkeypatch.setattr(shipping, "_own_folder", lambda: tmp_path / "nowhere")
    distribution.install(monkeypatch)
    out = tmp_path / "demo"
    demo.run(out, epochs=1, images=8, unseen=3)
    shown = capsys.readouterr().out
    assert "2/6  first results, by demo-scenes as installed" in shown
    assert "objects, labelled 'object'," in shown
    assert len(list((out / "first/drawn").glob("*.jpg"))) == 3
    assert "3/6  training from demo-scenes" in shown
    trained = load(out / "run/best.safetensors")
    assert trained.classes == demo.CLASSES
    assert trained.options["boxes"]["width"] == mask_rcnn().options["boxes"]["width"], "its options"
    assert trained.preprocess.short == demo.SIDE
    assert "6/6  done" in shown


def test_the_demo_clears_only_its_own(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.main(["demo", "-o", str(tmp_path)]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "report.html").write_text("old")
    demo._make_room(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["run", "found", "scenes"])
def test_the_demo_keeps_results_of_others_with_the_names_of_its_own(name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    (tmp_path / name / "best.safetensors").write_text("days of training")
    assert cli.main(["demo", "-o", str(tmp_path)]) == 2
    assert f"contains '{name}', which may not be a demo's" in capsys.readouterr().err
    assert (tmp_path / name / "best.safetensors").exists()
    (tmp_path / demo.MARK).write_text("")
    demo._make_room(tmp_path)
    assert not (tmp_path / name).exists()


def test_the_demo_does_not_write_through_links(tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/scenes").symlink_to(elsewhere, target_is_directory=True)
    assert cli.main(["demo", "-o", str(tmp_path / "demo")]) == 2
    assert "scenes: is a link; remove it" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []
