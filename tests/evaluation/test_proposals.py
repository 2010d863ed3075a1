"""Average recall of proposals is pycocotools' without categories, whichever of the two engines counts."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskwright.data import OneClass, open_dataset
from maskwright.errors import UsageError
from maskwright.evaluation import Evaluator, Result, report
from maskwright.structures import Instances
from tests.evaluation.ellipses import data_set, predictions
from tests.evaluation.judge import annotation_file
from tests.evaluation.test_coco_ap import ENGINES, SHARED, assert_equal, measured


def judged(annotations, records, kind, folder, limits=(10, 100, 1000)):
    """{"segm/AR10": ..., "segm/AR10s": ...} by the book: useCats 0, maxDets 10, 100, 1000."""
    keep = ("image_id", "category_id", "score", {"segm": "segmentation", "bbox": "bbox"}[kind])
    results = folder / "judged.json"
    results.write_text(json.dumps([{k: v for k, v in record.items() if k in keep} for record in records]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        engine = COCOeval(truth, truth.loadRes(str(results)), kind)
        engine.params.useCats = 0
        engine.params.maxDets = list(limits)
        engine.evaluate()
        engine.accumulate()
    recall = engine.eval["recall"]  # (T, 1, A, M)
    answer = {}
    for m, limit in enumerate(limits):
        for a, size in enumerate(("", "s", "m", "l")):
            values = recall[:, :, a, m]
            values = values[values > -1]
            answer[f"{kind}/AR{limit}{size}"] = float(values.mean()) if values.size else -1.0
    return answer


def records_of(data, made):
    pairs = zip(data.image_ids(), made, strict=True)
    return [record for image_id, own in pairs for record in own.to_coco(image_id, data.category_ids)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_recall_of_generated_proposals_is_what_pycocotools_says(engine, kind, ties, tmp_path):
    data = data_set(15)
    made = predictions(data, ties=ties)
    expected = judged(annotation_file(data, tmp_path / "truth.json"), records_of(data, made), kind, tmp_path)
    assert 0.1 < expected[f"{kind}/AR100"] < 0.95
    result = measured(data, made, (kind,), task="proposals", backend=engine)
    assert set(result.summary) == set(expected)
    assert_equal(result, expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_recall_of_many_proposals_on_real_images_is_what_pycocotools_says(engine, kind, tmp_path):
    if not (SHARED / "coco-mini").is_dir():
        pytest.skip("the images are not here; MASKWRIGHT_SHARED names the folder that holds data/")
    data = open_dataset(SHARED / "coco-mini", "val")
    rng, made = np.random.default_rng(0), []
    for index in range(len(data)):
        target = data.targets(index)
        rows = torch.from_numpy(
            rng.integers(0, max(1, len(target)), (1200 if index == 3 else 12 * (index % 10)) if len(target) else 0)
        )
        own = target[rows]
        shift = torch.from_numpy(rng.normal(0, 8, (len(own), 1))).float()
        assert own.masks is not None
        made.append(
            Instances(
                target.image_size, own.boxes + shift, torch.from_numpy(rng.integers(0, 80, len(own))), own.masks,
                torch.from_numpy(rng.integers(0, 50, len(own)) / 50).float(),
            )
        )  # fmt: skip
    annotations = next((SHARED / "coco-mini" / "annotations").glob("instances_val*.json"))
    expected = judged(annotations, records_of(data, made), kind, tmp_path)
    assert_equal(measured(data, made, (kind,), task="proposals", backend=engine), expected)


def test_fewer_proposals_have_limits_of_their_own(tmp_path):
    data = data_set(8)
    made = predictions(data)
    result = measured(data, made, ("bbox",), task="proposals", max_detections=50)
    expected = judged(
        annotation_file(data, tmp_path / "truth.json"), records_of(data, made), "bbox", tmp_path, (10, 50)
    )
    assert set(result.summary) == set(expected)
    assert_equal(result, expected)


def test_labels_of_proposals_mean_nothing():
    data = data_set(8, classes=3)
    made = predictions(data)
    renamed = [Instances(o.image_size, o.boxes, o.labels + 40, o.masks, o.scores) for o in made]
    plain, other = (measured(data, m, task="proposals").summary for m in (made, renamed))
    assert plain == other


def test_a_result_of_proposals_reads_as_one(tmp_path):
    data = data_set(8)
    result = measured(data, predictions(data), task="proposals")
    first, segm, bbox, *_ = str(result).splitlines()
    assert first.split() == ["AR10", "AR100", "AR1000", "AR100s", "AR100m", "AR100l"]
    assert segm.split()[0] == "segm"
    assert len(bbox.split()) == 7
    assert "useCats 0" in str(result)
    again = Result.load(result.save(tmp_path / "result.json"))
    assert again.summary == result.summary
    page = report(again, tmp_path / "page.html").read_text("utf-8")
    assert "Mask AR1000" in page
    assert "By class" not in page


@pytest.mark.fast
def test_all_objects_of_a_set_may_be_called_the_same():
    data = data_set(5, classes=3)
    same = OneClass(data, "thing")
    assert same.classes == ("thing",)
    assert len(same) == len(data)
    for index in range(len(data)):
        before, after = data.targets(index), same.targets(index)
        assert after.labels.tolist() == [0] * len(before)
        order = before.labels.argsort(stable=True)
        assert torch.equal(after.boxes, before.boxes[order])


@pytest.mark.fast
def test_what_cannot_be_measured_of_proposals():
    with pytest.raises(UsageError, match="task must be 'instances' or 'proposals', got 'boxes'"):
        Evaluator(data_set(2), task="boxes")
    with pytest.raises(UsageError, match="for proposals, which have no keypoints"):
        Evaluator(data_set(2), ("keypoints",), task="proposals")
