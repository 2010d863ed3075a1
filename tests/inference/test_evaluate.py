"""A perfect system scores 1 for every batch size, number of processes and order of classes."""

from __future__ import annotations

import json

import pytest
import torch

from maskwright.data import DataWarning, Sample
from maskwright.errors import ImageError, UsageError
from maskwright.evaluation import Evaluator, Result
from maskwright.inference import evaluate
from maskwright.structures import Instances
from tests.inference.painted import Painted, blocks, seen

pytestmark = pytest.mark.fast


class Gallery:
    """Painted images with their objects; image k has k % 4 of them."""

    name = "gallery val"
    keypoints = None
    strict = False

    def __init__(self, count: int = 7, classes=("cat", "dog"), broken=()):
        self.classes, self.category_ids = tuple(classes), tuple(range(10, 10 + len(classes)))
        self.count, self.broken = count, set(broken)
        self.turn = [self.classes.index(name) for name in ("cat", "dog")]

    def __len__(self):
        return self.count

    def image(self, index: int) -> torch.Tensor:
        return blocks(index % 4, (40 + index, 60))

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise ImageError(f"image-{index}.jpg: is cut off")
        return Sample(self.image(index), self.targets(index), self.image_ids()[index])

    def targets(self, index: int) -> Instances:
        found = seen(self.image(index))
        labels = torch.tensor(self.turn)[found.labels]
        count = len(found)
        return Instances(
            found.image_size,
            found.boxes,
            labels,
            found.masks,
            None,
            None,
            torch.zeros(count).bool(),
            torch.arange(count),
        )

    def image_ids(self):
        return [100 + 3 * k for k in range(self.count)]

    def sizes(self):
        return [(40 + k, 60) for k in range(self.count)]


@pytest.fixture
def system() -> Painted:
    return Painted().eval()


@pytest.mark.thorough
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_who_sees_everything_scores_one(system, batch):
    result = evaluate(system, Gallery(), batch=batch, device="cpu", examples=2)
    assert result["segm/AP"] == pytest.approx(1)
    assert result["bbox/AP"] == pytest.approx(1)
    assert result.kinds == ("segm", "bbox")
    assert result.missing == 0
    facts = dict(result.protocol.facts())
    assert facts["batch"] == str(batch)
    assert facts["precision"] == "float32"
    assert facts["score threshold"] == "0.05", "the system's own"
    assert facts["maxDets"] == "100"
    assert facts["device"].startswith("CPU")
    assert facts["full-size decoding"] == "inside the timer"
    assert "not stated" not in facts.values()
    speed = result.speed
    assert set(speed.stages) == {"dense", "arithmetic"}
    assert 0 < speed.milliseconds <= speed.milliseconds_p90
    assert speed.images_per_second > 0
    assert speed.peak_memory > 1 << 20
    assert speed.parameters == 1


@pytest.mark.thorough
@pytest.mark.parametrize("batch", [1, 4])
def test_perfect_predictions_score_one_in_tiles_too(system, batch):
    result = evaluate(system, Gallery(4), tile=32, overlap=0.5, batch=batch, device="cpu", examples=2)
    assert result["segm/AP"] == pytest.approx(1), "objects that a seam cuts are joined"
    facts = dict(result.protocol.facts())
    assert facts["input size"].startswith("tiles of 32 pixels, overlapping by 50 %, each: ")
    assert facts["batch"] == str(batch)
    assert set(result.speed.stages) == {"dense", "arithmetic"}
    assert 0 < result.speed.milliseconds <= result.speed.milliseconds_p90


@pytest.mark.thorough
def test_a_broken_image_among_tiled_ones(system):
    with pytest.warns(DataWarning, match=r"image-2\.jpg: is cut off \(counted as an image without predictions"):
        result = evaluate(system, Gallery(4, broken=(2,)), tile=32, examples=0)
    assert result.missing == 1
    gallery = Gallery(4, broken=(2,))
    gallery.strict = True
    with pytest.raises(ImageError, match=r"image-2\.jpg"):
        evaluate(system, gallery, tile=32)


@pytest.mark.thorough
def test_thresholds_and_limits_reduce_the_detections(system):
    assert evaluate(system, Gallery(), detections=1)["segm/AP"] < 0.9
    assert evaluate(system, Gallery(), score_threshold=0.999)["segm/AP"] < 0.9
    small = evaluate(system, Gallery(), limit=3)
    assert small.protocol.images == "gallery val, 3 images"
    assert small["segm/AP"] == pytest.approx(1)
    assert dict(evaluate(system, Gallery(), score_threshold=0.3).protocol.facts())["score threshold"] == "0.3"


@pytest.mark.thorough
def test_classes_are_matched_by_name(system):
    assert evaluate(system, Gallery(classes=("bird", "dog", "cat")))["segm/AP"] == pytest.approx(1)
    stranger = Painted(("Cat", "unicorn")).eval()
    with pytest.warns(DataWarning, match=r"1 of 2 classes of the data set are not classes of the system: 'dog'"):
        result = evaluate(stranger, Gallery())
    rows = {row["class"]: row["segm/AP"] for row in result.per_class}
    assert rows["cat"] == pytest.approx(1)
    assert rows["dog"] == 0
    with pytest.raises(UsageError, match="no class of the system"):
        evaluate(Painted(("car",)), Gallery())


@pytest.mark.thorough
def test_boxes_alone():
    result = evaluate(Painted(masks=False).eval(), Gallery(), boundary=True)
    assert result.kinds == ("bbox",)
    assert result["bbox/AP"] == pytest.approx(1)
    with pytest.raises(UsageError, match="kinds has 'segm', which painted does not predict; it predicts bbox"):
        evaluate(Painted(masks=False).eval(), Gallery(), kinds=("segm",))


@pytest.mark.thorough
def test_only_the_requested_kinds_are_measured(system):
    assert evaluate(system, Gallery(), kinds=("bbox",)).kinds == ("bbox",)
    assert "boundary" in evaluate(system, Gallery(), boundary=True).kinds


@pytest.mark.thorough
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("broken", [(2,), (6,), (0, 5, 6)])
def test_a_broken_image_counts_as_one_without_predictions(system, batch, broken):
    says = r"image-\d\.jpg: is cut off \(counted as an image without predictions"
    with pytest.warns(DataWarning, match=says):
        result = evaluate(system, Gallery(broken=broken), batch=batch, examples=0)
    assert result.missing == len(broken)
    assert result["segm/AP"] <= 1


@pytest.mark.parametrize("limit", [None, 6])
def test_a_strict_set_stops_at_a_broken_image(system, limit):
    gallery = Gallery(broken=(0,))
    gallery.strict = True
    with pytest.raises(ImageError, match=r"image-0\.jpg"):
        evaluate(system, gallery, limit=limit)


def test_invalid_arguments_are_refused(system):
    for options, says in [
        ({"batch": 0}, "must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"tile": 8}, "got tile=8"),
        ({"tile": 32, "overlap": 0.95}, "overlap=0.95"),
        ({"iou": 0.5}, "no option 'iou'"),
    ]:
        with pytest.raises(UsageError, match=says):
            evaluate(system, Gallery(), **options)
    with pytest.raises(UsageError, match="the data set has no images"):
        evaluate(system, Gallery(0))


def test_a_data_set_by_its_name():
    system = Painted(("disc", "ring", "star", "box", "crescent", "cross")).eval()
    result = evaluate(system, "scenes:count=3,size=64", score_threshold=1.0, examples=0)
    assert isinstance(result, Result)
    assert result["segm/AP"] == 0, "nothing passes such a threshold"
    assert result.objects["all"] > 0


@pytest.mark.thorough
def test_predictions_are_written_with_the_ids_of_the_annotations(system, tmp_path):
    data = Gallery(classes=("dog", "cat"))
    first = evaluate(system, data, device="cpu", examples=0, out=tmp_path)
    records = json.loads((tmp_path / "results.json").read_text())
    assert {r["image_id"] for r in records} <= set(data.image_ids())
    assert {r["category_id"] for r in records} == set(data.category_ids)
    second = Evaluator(data)
    second.read(tmp_path / "results.json")
    assert second.result(0).summary["segm/AP"] == pytest.approx(first.summary["segm/AP"])
    evaluate(system, data, device="cpu", task="proposals", examples=0, out=tmp_path)
    recall = Evaluator(data, task="proposals")
    recall.read(tmp_path / "results.json")
    assert recall.result(0).summary["segm/AR100"] == 1.0
