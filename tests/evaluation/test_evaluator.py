"""Collecting predictions, telling what went wrong, keeping and reading results."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskwright.errors import AnnotationError, UsageError
from maskwright.evaluation import Evaluator, Protocol, Result, Speed, match_classes
from maskwright.evaluation.confusion import match
from maskwright.structures import Instances, Masks
from tests.evaluation.ellipses import Ellipses, data_set, predictions

pytestmark = pytest.mark.fast
SIZE = (40, 60)


def squares(*corners, labels=None, scores=None, crowd=None):
    """Squares of 10 pixels at these (x, y)."""
    count = len(corners)
    crops = [torch.ones(10, 10, dtype=torch.bool)] * count
    masks = Masks.from_crops(crops, torch.tensor(corners, dtype=torch.int64).reshape(-1, 2), SIZE)
    return Instances(
        SIZE,
        masks.boxes(),
        torch.tensor(labels or [0] * count, dtype=torch.int64),
        masks,
        None if scores is None else torch.tensor(scores, dtype=torch.float32),
        crowd=torch.tensor(crowd or [False] * count, dtype=torch.bool),
    )


def filled(data, made, **options):
    evaluator = Evaluator(data, **options)
    for image_id, instances in zip(data.image_ids(), made, strict=True):
        evaluator.add(image_id, instances)
    return evaluator


# ---- adding ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_added():
    data = Ellipses([squares((0, 0)), squares()], [5, "b"])
    good = squares((0, 0), scores=[0.5])
    evaluator = Evaluator(data)
    with pytest.raises(UsageError, match=r"the data set has no image 0; its ids are 5, b \(use add_at for positions\)"):
        evaluator.add(0, good)
    with pytest.raises(UsageError, match=r"image 5 are on a grid of \(20, 20\), the image is \(40, 60\)"):
        evaluator.add(5, Instances.empty((20, 20)))
    with pytest.raises(UsageError, match="image 5 have no scores, which AP needs"):
        evaluator.add(5, squares((0, 0)))
    with pytest.raises(UsageError, match="has label 3, the data set has 3 classes; map labels with match_classes"):
        evaluator.add(5, squares((0, 0), labels=[3], scores=[0.5]))
    with pytest.raises(UsageError, match="have a score or box that is not finite"):
        evaluator.add(5, squares((0, 0), scores=[float("nan")]))
    boxes = Instances(SIZE, good.boxes, good.labels, None, good.scores)
    with pytest.raises(UsageError, match=r"have no masks; evaluate kinds=\('bbox',\)"):
        evaluator.add(5, boxes)
    with pytest.raises(UsageError, match="have no keypoints; leave 'keypoints' out of kinds"):
        Evaluator(data, ("keypoints",)).add(5, good)
    assert len(evaluator) == 0
    evaluator.add_at(0, good)
    with pytest.raises(UsageError, match=r"image 5 was added twice; call reset\(\)"):
        evaluator.add(5, good)
    evaluator.reset()
    evaluator.add(5, good)
    assert len(evaluator) == 1
    with pytest.raises(UsageError, match="1 images of the data set have the id of another"):
        Evaluator(Ellipses([squares(), squares()], [1, 1]))


def test_objects_of_classes_the_data_set_lacks_are_left_out():
    data = Ellipses([squares((0, 0), (20, 0))], [1])
    found = squares((0, 0), (20, 0), labels=[0, -1], scores=[0.9, 0.8])
    result = filled(data, [found]).result(0)
    assert result.per_class[0]["found"] == 1
    assert result.confusion.counts.sum() == 2


@pytest.mark.thorough
def test_images_that_were_not_added_count_as_empty_and_are_told():
    data = data_set(6)
    made = predictions(data)
    evaluator = Evaluator(data)
    evaluator.add(data.ids[0], made[0])
    result = evaluator.result(0)
    assert result.missing == 5
    assert "5 images had no predictions; they count as images without objects." in str(result)
    only = filled(data, [made[0], *(Instances.empty(s) for s in data.sizes()[1:])]).result(0)
    assert only.missing == 0
    assert only.summary == result.summary


def test_predictions_are_held_small():
    size = (3000, 4000)
    yy, xx = np.mgrid[:600, :600]
    disc = torch.from_numpy((yy - 300) ** 2 + (xx - 300) ** 2 < 300**2)
    masks = Masks.from_crops([disc] * 100, torch.randint(0, 2400, (100, 2)), size)
    found = Instances(size, masks.boxes(), torch.zeros(100, dtype=torch.int64), masks, torch.rand(100))
    evaluator = Evaluator(Ellipses([found], [1]))
    evaluator.add(1, found)
    assert len(pickle.dumps(evaluator.partial())) < 500_000


# ---- several processes, files ----------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_partials_merge_to_the_same_result():
    data = data_set(9)
    made = predictions(data)
    whole = filled(data, made).result(0)
    ranks = [Evaluator(data), Evaluator(data)]
    for position in [*range(9), 0]:  # a sampler repeats the first image to give both ranks equally many
        rank = ranks[1 if len(ranks[0]) > len(ranks[1]) else 0]
        if data.ids[position] not in rank.partial():
            rank.add_at(position, made[position])
    partials = [pickle.loads(pickle.dumps(rank.partial())) for rank in ranks]
    assert sum(map(len, partials)) == 10
    head = Evaluator(data)
    head.merge(partials)
    assert head.result(0).summary == whole.summary
    assert head.result(0).missing == 0
    with pytest.raises(UsageError, match="a partial result has image 999, which the data set does not have"):
        head.merge([{999: partials[0][data.ids[0]]}])


@pytest.mark.thorough
def test_results_are_written_and_read_back(tmp_path):
    data = data_set(9, keypoints=17)
    made = predictions(data)
    kinds = ("segm", "bbox", "keypoints")
    first = filled(data, made, kinds=kinds)
    path = first.write(tmp_path / "results.json")
    assert {r["category_id"] for r in json.loads(path.read_text())} <= set(data.category_ids)
    second = Evaluator(data, kinds)
    second.read(path)
    assert second.result(0).summary == pytest.approx(first.result(0).summary, abs=1e-9)


def test_results_of_others_may_lack_boxes_or_hold_polygons(tmp_path):
    data = Ellipses([squares((0, 0), (20, 10))], [1], ("disc",), (7,))
    ring = [20, 10, 30, 10, 30, 20, 20, 20]
    runs = {"size": [40, 60], "counts": [0, *[10, 30] * 9, 10, 30 + 50 * 40]}
    records = [
        {"image_id": 1, "category_id": 7, "score": 1, "segmentation": [ring]},
        {"image_id": 1, "category_id": 7, "score": 0.5, "segmentation": runs},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(records))
    evaluator = Evaluator(data)
    evaluator.read(path)
    assert evaluator.result(0).summary["segm/AP"] == pytest.approx(1)
    assert evaluator.result(0).summary["bbox/AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "is not JSON"),
        ('{"images": []}', "expected a COCO results file, which is a list of records, got a data set"),
        ("3", "which is a list of records, got int"),
        ("[5]", "record 0 is int; expected an object"),
        ('[{"image_id": 1, "category_id": 3}]', "record 0 has no 'score'"),
        ('[{"image_id": 9, "category_id": 3, "score": 1, "bbox": [0,0,1,1]}]', "record 0 is of image 9, which"),
        ('[{"image_id": 1, "category_id": 9, "score": 1, "bbox": [0,0,1,1]}]', "record 0 has category 9, which"),
        ('[{"image_id": 1, "category_id": 3, "score": 1}]', 'neither "segmentation" nor "bbox"'),
        ('[{"image_id": 1, "category_id": 3, "score": 1, "bbox": [0,0,1]}]', "bbox must be 4 finite numbers, got"),
        ('[{"image_id": 1, "category_id": 3, "score": NaN, "bbox": [0,0,1,1]}]', "score must be 1 finite numbers, got"),
        (
            '[{"image_id": 1, "category_id": 3, "score": 1, "segmentation": {"size": [9, 9], "counts": "0i0"}}]',
            r"image 1, from number 0 on, cannot be read: mask 0 is 9 x 9, expected 40 x 60",
        ),
        (
            '[{"image_id": 1, "category_id": 3, "score": 1, "segmentation": {"size": [40, 60], "counts": "0i0"}}]',
            "the runs of mask 0 cover 25 pixels, but its image has 2400",
        ),
        (
            '[{"image_id": 1, "category_id": 3, "score": 1, "bbox": [0,0,1,1], "keypoints": [1, 2]}]',
            "keypoints has 2 numbers; expected x, y and score",
        ),
    ],
)
def test_a_broken_results_file_is_named_with_its_record(tmp_path, content, words):
    path = tmp_path / "results.json"
    path.write_text(content)
    evaluator = Evaluator(Ellipses([squares((0, 0))], [1]))
    with pytest.raises(AnnotationError, match=words) as told:
        evaluator.read(path)
    assert str(path) in str(told.value)
    with pytest.raises(AnnotationError, match=r"absent\.json: cannot be read"):
        evaluator.read(tmp_path / "absent.json")


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_name():
    table = match_classes(("Person", "traffic_light", "dog", "kite"), ("kite", "traffic light", "person", "person"))
    assert table.tolist() == [2, 1, -1, 0]
    assert match_classes(("a", "A"), ("A", "a")).tolist() == [1, 0]  # as they are, before anything looser
    assert match_classes((), ("a",)).tolist() == []
    with pytest.raises(UsageError, match=r"no class of the system \(cat\) is a class of the data set \(nucleus\)"):
        match_classes(("cat",), ("nucleus",))


# ---- confusion -------------------------------------------------------------------------------------------------------


def test_every_kind_of_mistake_lands_in_its_cell():
    truth = squares((0, 0), (15, 0), (30, 0), (45, 0), (0, 20), labels=[0, 0, 1, 1, 2], crowd=[False] * 4 + [True])
    found = squares(
        *((0, 0), (1, 0), (15, 1), (30, 0), (45, 25), (0, 20), (45, 0)),
        labels=[0, 1, 1, 1, 0, 2, 1],
        scores=[0.9, 0.95, 0.9, 0.8, 0.7, 0.9, 0.3],
    )
    result = filled(Ellipses([truth], [8]), [found]).result(0)
    confusion = result.confusion
    assert confusion.counts.tolist() == [
        [1, 1, 0, 0],  # found; taken for an egg
        [0, 1, 0, 1],  # found; missed, since 0.3 is under the threshold
        [0, 0, 0, 0],  # the crowd asks for nothing
        [1, 1, 0, 0],  # out of nothing; the second, wrong guess at an object that was also found
    ]
    assert confusion.images[0, 1] == [8]
    assert (2, 2) not in confusion.images
    score = result.images[0]
    assert (score.objects, score.found, score.right, score.confused, score.missed, score.spurious) == (4, 5, 2, 1, 1, 2)
    assert score.quality == pytest.approx(2 / (2 + 1 + 1 / 2 + 2 / 2))


def test_images_are_ranked_by_quality_and_empty_ones_left_out():
    data = Ellipses([squares((0, 0)), squares((0, 0)), squares(), squares()], ["a", "b", "c", "d"])
    made = [
        squares((0, 0), scores=[0.9]),
        squares((2, 0), scores=[0.9]),
        squares(scores=[]),
        squares((0, 0), scores=[1.0]),
    ]
    result = filled(data, made).result()
    assert [p.id for p in result.worst()] == ["d", "b", "a"]
    assert [e.score.id for e in result.examples if e.rank == "worst"] == ["d", "b"]
    assert [e.score.id for e in result.examples if e.rank == "best"] == ["a"]


@pytest.mark.thorough
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 10_000), st.sampled_from([3, 1000]))
def test_rounds_of_mutual_bests_pair_as_going_one_by_one_does(rows, columns, seed, levels):
    rng = np.random.default_rng(seed)
    overlaps = rng.integers(0, levels + 1, (rows, columns)) / levels
    same = rng.random((rows, columns)) < 0.5
    found = match(overlaps, same, 0.5)
    worth = np.where(overlaps >= 0.5, overlaps + same, -1)
    assert len(set(found[0])) == len(found[0])
    assert len(set(found[1])) == len(found[1])
    free = [sorted(set(range(n)) - set(f.tolist())) for n, f in zip((rows, columns), found, strict=True)]
    assert not any(
        worth[row, column] > 0 for row in free[0] for column in free[1]
    )  # nothing that could be paired is left
    if levels == 1000 and len(np.unique(worth[worth > 0])) == (worth > 0).sum():  # without ties there is one answer
        expected, left = set(), worth.copy()
        while left.size and left.max() > 0:
            row, column = np.unravel_index(left.argmax(), left.shape)
            expected.add((int(row), int(column)))
            left[row], left[:, column] = -1, -1
        assert set(zip(*(f.tolist() for f in found), strict=True)) == expected


# ---- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_result_survives_its_file(tmp_path):
    data = data_set(9, keypoints=17)
    result = filled(data, predictions(data), kinds=("segm", "keypoints"), boundary=True).result(title="Ovals")
    result.protocol.device, result.protocol.decoding_timed = "CPU", False
    result.speed = Speed(12.5, stages={"forward": 10.0}, peak_memory=1 << 30, parameters=44_000_000)
    again = Result.load(result.save(tmp_path / "a" / "result.json"))
    assert again.to_dict() == result.to_dict()
    assert again.summary == result.summary
    pairs = [(a, b) for a, b in zip(again.examples, result.examples, strict=True) if len(b.found)]
    assert pairs
    assert all(a.found.masks.rle() == b.found.masks.rle() for a, b in pairs)
    assert again.confusion.images == result.confusion.images
    assert str(again) == str(result)


def test_the_protocol_is_printed_with_the_number():
    data = data_set(6)
    result = filled(data, predictions(data), max_detections=50).result(0)
    text = str(result)
    assert f"{100 * result['segm/AP']:.1f}" in text
    for fact in ("ellipses, 6 images", "maxDets: 50", "device: not stated", "full-size decoding: not stated"):
        assert fact in text
    assert len(Protocol().facts()) == 10
    assert "full-size decoding: inside the timer" in str(Protocol(decoding_timed=True))
    assert result.speed.rows() == []


def test_each_class_has_its_row_and_its_best_threshold():
    truth = squares((0, 0), (15, 0), (30, 0), labels=[0, 0, 1])
    found = squares((0, 0), (15, 0), (45, 20), (30, 20), labels=[0, 0, 0, 1], scores=[0.9, 0.6, 0.4, 0.9])
    rows = filled(Ellipses([truth], [1]), [found]).result(0).per_class
    assert [(r["class"], r["category_id"], r["objects"], r["images"], r["found"]) for r in rows] == [
        ("disc", 3, 2, 1, 3),
        ("egg", 90, 1, 1, 1),
        ("pebble", 1000, 0, 0, 0),
    ]
    assert rows[0]["segm/AP"] == pytest.approx(1)
    assert rows[0]["threshold"] == pytest.approx(0.6)
    assert rows[0]["F1"] == pytest.approx(1)
    assert (rows[1]["segm/AP"], rows[1]["threshold"], rows[1]["F1"]) == (0, None, 0)
    assert (rows[2]["segm/AP"], rows[2]["threshold"], rows[2]["F1"]) == (-1, None, None)


def test_sizes_are_those_of_the_file_where_it_tells_them():
    target = squares((0, 0), (20, 0))
    plain = filled(Ellipses([target], [1]), [squares((0, 0), (20, 0), scores=[1.0, 1.0])]).result(0)
    assert plain.objects == {"all": 2, "s": 2, "m": 0, "l": 0, "crowd": 0}
    assert "sizes of objects are the areas of their masks" in plain.protocol.note
    told = Ellipses([target], [1], given_areas=[np.array([100.0, 5000.0])])
    result = filled(told, [squares((0, 0), (20, 0), scores=[1.0, 1.0])]).result(0)
    assert result.objects == {"all": 2, "s": 1, "m": 1, "l": 0, "crowd": 0}
    assert result.protocol.note == ""
