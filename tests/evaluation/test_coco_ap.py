"""Our AP is pycocotools' AP, whichever of the two engines counts."""

from __future__ import annotations

import json
import os
from collections import Counter
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from maskwright.errors import MissingExtraError, UsageError
from maskwright.evaluation import Evaluator
from maskwright.evaluation import coco as coco_module
from maskwright.evaluation.boundary import boundary
from maskwright.structures import Instances, Masks, rle
from tests.evaluation.ellipses import Ellipses, data_set, disturbed, planes_of, predictions, truth
from tests.evaluation.judge import verdict, verdict_of_files

SHARED = Path(os.environ.get("MASKWRIGHT_SHARED", Path(__file__).parents[3] / "shared")) / "data"
ENGINES = [
    pytest.param("vernier", marks=pytest.mark.skipif(util.find_spec("vernier") is None, reason="vernier is an extra")),
    "pycocotools",
]


def measured(data, made, kinds=("segm", "bbox"), **options):
    evaluator = Evaluator(data, kinds, **options)
    for image_id, instances in zip(data.image_ids(), made, strict=True):
        evaluator.add(image_id, instances)
    return evaluator.result(examples=0)


def assert_equal(result, judged):
    for name, value in judged.items():
        assert abs(result.summary[name] - value) <= 1e-6, f"{name}: {result.summary[name]} instead of {value}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["segm", "bbox", "keypoints"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_generated_results_score_as_pycocotools_says(engine, kind, ties, tmp_path):
    data = data_set(15, keypoints=17)
    made = predictions(data, ties=ties)
    judged = verdict(data, made, kind, tmp_path)
    assert 0.01 < judged[f"{kind}/AP"] < 0.9  # neither trivial nor hopeless
    assert_equal(measured(data, made, (kind,), backend=engine), judged)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_order_of_ids_decides_ties_and_not_the_order_of_the_file(engine, tmp_path):
    ids = [int(i) for i in np.random.default_rng(5).permutation(10_000)[:15]]
    data = data_set(15, ids=ids, classes=1)
    made = predictions(data, ties=True)
    assert_equal(measured(data, made, ("segm",), backend=engine), verdict(data, made, "segm", tmp_path))


@pytest.mark.parametrize("engine", ENGINES)
def test_ids_may_be_huge_or_names(engine):
    plain = data_set(10)
    made = predictions(plain)
    huge = Ellipses(plain.images, [2**63 + i for i in range(10)])
    named = Ellipses(plain.images, [f"image {i:02}.png" for i in range(10)])
    expected = measured(plain, made, backend=engine).summary
    assert measured(huge, made, backend=engine).summary == expected
    assert measured(named, made, backend=engine).summary == expected


@pytest.mark.fast
@pytest.mark.parametrize("engine", ENGINES)
def test_the_limit_on_detections_is_an_argument(engine):
    rng = np.random.default_rng(2)
    target = truth(rng, 40, (200, 200), classes=1, crowd=0)
    data = Ellipses([target], [1])
    perfect = Instances(target.image_size, target.boxes, target.labels, target.masks, torch.rand(len(target)))
    few, many = (measured(data, [perfect], max_detections=n, backend=engine) for n in (5, 300))
    assert few.summary["segm/AR5"] == pytest.approx(5 / len(target), abs=0.011)
    assert many.summary["segm/AR300"] == 1
    assert many.protocol.max_detections == 300
    with pytest.raises(UsageError, match="max_detections must be at least 1, got 0"):
        Evaluator(data, max_detections=0)


@pytest.mark.fast
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kinds", [("segm", "bbox"), ("keypoints",)])
def test_nothing_predicted_is_zero_and_nothing_to_find_is_minus_one(engine, kinds):
    data = data_set(4, keypoints=17)
    none = [Instances.empty(s) for s in data.sizes()]
    assert measured(data, none, kinds, backend=engine).summary[f"{kinds[0]}/AP"] == 0
    empty = Ellipses([t[:0] for t in data.images], data.ids)
    made = predictions(data)
    assert measured(empty, made, kinds, backend=engine).summary[f"{kinds[0]}/AP"] == -1
    assert measured(empty, none, kinds, backend=engine).summary[f"{kinds[0]}/AP"] == -1
    no_images = Ellipses([], [])
    assert measured(no_images, [], kinds, backend=engine).summary[f"{kinds[0]}/AP"] == -1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_perfect_prediction_scores_one_everywhere(engine):
    data = data_set(8, keypoints=17, crowd=0)
    made = [Instances(t.image_size, t.boxes, t.labels, t.masks, torch.ones(len(t)), t.keypoints) for t in data.images]
    result = measured(data, made, boundary=True, backend=engine)
    assert [result.summary[f"{k}/AP"] for k in ("segm", "bbox", "boundary")] == pytest.approx([1, 1, 1])
    assert result.kinds == ("segm", "bbox", "boundary")


# ---- boundary --------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("size", [(96, 128), (37, 41), (200, 30)])
@pytest.mark.parametrize("width", [0.02, 0.1])
def test_a_boundary_is_what_repeated_erosion_takes_away(size, width):
    planes = torch.from_numpy(np.random.default_rng(1).random((3, *size)) > 0.05)
    steps = max(1, round(width * float(np.hypot(*size))))
    eroded = planes.float()
    for _ in range(steps):
        padded = torch.nn.functional.pad(eroded, (1, 1, 1, 1))
        eroded = -torch.nn.functional.max_pool2d(-padded[None], 3, 1)[0]
    texts = [code["counts"] for code in Masks.from_dense(planes).rle()]
    found = planes_of(Masks.from_rle([boundary(t, size, width) for t in texts], size))
    assert np.array_equal(found, (planes & (eroded == 0)).numpy())


@pytest.mark.fast
def test_an_empty_mask_has_an_empty_boundary():
    assert rle.area(boundary(rle.from_crop(np.zeros((0, 0), bool), 0, 0, (20, 30)), (20, 30), 0.02)) == 0


@pytest.mark.skipif(util.find_spec("vernier") is None, reason="vernier is an extra")
@pytest.mark.parametrize("crowd", [0.0, 0.3])
def test_boundary_ap_without_vernier_is_the_same_as_with_it(crowd):
    data = data_set(15, crowd=crowd)
    made = predictions(data)
    with_it, without = (measured(data, made, ("segm",), boundary=True, backend=b) for b in ("vernier", "pycocotools"))
    names = [name for name in with_it.summary if name.startswith("boundary/")]
    assert {n: with_it[n] for n in names} == pytest.approx({n: without[n] for n in names}, abs=1e-9)
    assert 0 < with_it["boundary/AP"] < with_it["segm/AP"]


# ---- asking for what cannot be ---------------------------------------------------------------------------------------


def test_without_vernier_pycocotools_counts(monkeypatch):
    monkeypatch.setattr(coco_module.util, "find_spec", lambda name: None)
    data = data_set(3)
    assert measured(data, predictions(data)).protocol.evaluator.startswith("pycocotools 2")
    with pytest.raises(MissingExtraError, match=r"vernier is not installed; run: pip install 'maskwright\[eval\]'"):
        Evaluator(data, backend="vernier")


def test_other_numbers_of_keypoints_are_measured_and_the_protocol_says_how():
    data = data_set(10, keypoints=4)
    result = measured(data, predictions(data), ("keypoints",))
    assert result["keypoints/AP"] > 0
    assert "OKS with sigma 0.05 for each of 4 keypoints" in result.protocol.note


@pytest.mark.fast
def test_keypoints_must_agree():
    data, other = data_set(4, keypoints=4), data_set(4, keypoints=5)
    with pytest.raises(UsageError, match="the predictions have 5 keypoints each, the annotations 4"):
        measured(data, predictions(other), ("keypoints",))


def test_annotations_without_masks_are_no_truth_for_masks():
    data = data_set(4)
    boxes_only = Ellipses([Instances(t.image_size, t.boxes, t.labels) for t in data.images], data.ids)
    with pytest.raises(UsageError, match="the annotations have no masks; leave 'segm' out"):
        measured(boxes_only, predictions(data))
    assert measured(boxes_only, predictions(data), ("bbox",))["bbox/AP"] > 0


@pytest.mark.fast
def test_a_kind_that_is_not_there():
    with pytest.raises(UsageError, match=r"kinds must be one or more of segm, bbox, keypoints"):
        Evaluator(data_set(2), ("panoptic",))


# ---- real annotations ------------------------------------------------------------------------------------------------


def real(name, split, keypoints=False, most=40):
    """A COCO file's fullest images as they are: boxes and areas of the file, masks rasterised by pycocotools."""
    kind = "person_keypoints" if keypoints else "instances"
    path = SHARED / name / "annotations" / f"{kind}_{split}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    raw = json.loads(path.read_text())
    order = sorted(raw["categories"], key=lambda c: c["id"])
    label_of = {c["id"]: label for label, c in enumerate(order)}
    fullness = Counter(a["image_id"] for a in raw["annotations"])
    images = sorted(raw["images"], key=lambda image: -fullness[image["id"]])
    images = images[: most - 2] + images[-2:]  # the last two may be empty
    by_image = {image["id"]: [] for image in images}
    for annotation in raw["annotations"]:
        if annotation["image_id"] in by_image:
            by_image[annotation["image_id"]].append(annotation)
    targets, areas = [], []
    for image in images:
        size, mine = (image["height"], image["width"]), by_image[image["id"]]
        codes = [_code(a["segmentation"], size) for a in mine]
        corners = torch.tensor([a["bbox"] for a in mine], dtype=torch.float64).reshape(-1, 4)
        points = torch.tensor([a["keypoints"] for a in mine]).reshape(-1, 17, 3).float() if keypoints else None
        targets.append(
            Instances(
                size,
                torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1).float(),
                torch.tensor([label_of[a["category_id"]] for a in mine], dtype=torch.int64),
                Masks.from_rle(codes, size),
                keypoints=points,
                crowd=torch.tensor([bool(a["iscrowd"]) for a in mine], dtype=torch.bool),
            )
        )
        areas.append(np.array([a["area"] for a in mine], float))
    names = tuple(c["name"] for c in order)
    ids = [image["id"] for image in images]
    return Ellipses(targets, ids, names, tuple(c["id"] for c in order), name, areas)


def _code(segmentation, size):
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    uncompressed = isinstance(segmentation["counts"], list)
    return coco_mask.frPyObjects(segmentation, *size) if uncompressed else segmentation


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "split", "kinds"),
    [
        ("coco-mini", "val", ("segm", "bbox")),
        ("coco-mini", "val", ("keypoints",)),
        ("nuclei", "val", ("segm", "bbox")),
    ],
)
def test_disturbed_real_annotations_score_as_pycocotools_says(engine, name, split, kinds, tmp_path):
    data = real(name, split, keypoints="keypoints" in kinds, most=10 if name == "nuclei" else 40)
    rng = np.random.default_rng(0)
    made = [disturbed(t, rng, len(data.classes), extra=2, ties=i % 2 == 0) for i, t in enumerate(data.images)]
    made = [m[:0] if i % 9 == 8 else m for i, m in enumerate(made)]
    if name == "nuclei":
        assert max(map(len, made)) > 250  # far more than are counted
    result = measured(data, made, kinds, backend=engine)
    for kind in kinds:
        judged = verdict(data, made, kind, tmp_path)
        assert judged[f"{kind}/AP"] > 0.02
        assert_equal(result, judged)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco-mini", "pedestrians"])
def test_from_file_to_file_the_numbers_are_those_of_pycocotools(name, tmp_path):
    from maskwright.data import open_dataset

    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    data = open_dataset(SHARED / name, "val")
    rng = np.random.default_rng(0)
    evaluator = Evaluator(data)
    for i in range(len(data)):
        evaluator.add_at(i, disturbed(data.targets(i), rng, len(data.classes), extra=1, ties=i % 2 == 0))
    result = evaluator.result(examples=0)
    records = json.loads(evaluator.write(tmp_path / "results.json").read_text())
    annotations = SHARED / name / "annotations" / "instances_val.json"
    for kind in ("segm", "bbox"):
        assert_equal(result, verdict_of_files(annotations, records, kind, tmp_path))


def test_overlap_thresholds_and_size_ranges_are_arguments(tmp_path):
    data = data_set(12)
    made = predictions(data)
    usual = measured(data, made, ("segm",), backend="pycocotools").summary
    chosen = measured(
        data, made, ("segm",), overlaps=(0.5, 0.75), sizes={"": (0, 1e10), "t": (0, 400), "b": (400, 1e10)}
    )
    assert chosen.summary["segm/AP"] == pytest.approx((usual["segm/AP50"] + usual["segm/AP75"]) / 2)
    assert chosen.summary["segm/AP50"] == pytest.approx(usual["segm/AP50"])
    assert {"segm/APt", "segm/APb"} <= set(chosen.summary)
    assert not {"segm/APs", "segm/APl"} & set(chosen.summary)
    assert chosen.objects["t"] + chosen.objects["b"] >= chosen.objects["all"]
    assert "overlap thresholds 0.5, 0.75" in chosen.protocol.note
    assert chosen.protocol.evaluator.startswith("pycocotools")
    single = measured(data, made, ("segm",), overlaps=(0.6,)).summary
    assert single["segm/AP60"] == pytest.approx(single["segm/AP"])
    for options, words in [
        ({"overlaps": (0.9, 0.5)}, "overlaps must be ascending"),
        ({"overlaps": ()}, "overlaps must be ascending"),
        ({"sizes": {"s": (0, 10)}}, "the first size range must be named ''"),
        ({"sizes": {"": (0, 1e10), "s": (10, 5)}}, "size range 's' must be two areas"),
    ]:
        with pytest.raises(UsageError, match=words):
            Evaluator(data, **options)
