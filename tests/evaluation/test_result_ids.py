"""Results files whose ids are written otherwise than in the annotation file, or that belong to another data set."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from maskwright.data import DataWarning, Scenes, read_coco, read_panoptic
from maskwright.errors import AnnotationError
from maskwright.evaluation import Evaluator, PanopticEvaluator, SemanticEvaluator
from maskwright.evaluation.tasks import task_called
from maskwright.inference.own_ids import DatasetIds, find_ids, opened_data
from maskwright.inference.writer import PredictionWriter

pytestmark = pytest.mark.fast

CLASSES = ("disc", "ring", "star")
IDS = (2, 3, 7)  # with gaps, as COCO's


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of 12 images whose ids are in another order than its file names, and perfect predictions."""
    root = tmp_path_factory.mktemp("set")
    path = Scenes(12, (64, 64), seed=1, classes=CLASSES, difficulty=0.1, empty=0).write(root, "val")
    document = json.loads(path.read_text())
    numbers = [*range(101, 113)]
    random.Random(3).shuffle(numbers)
    image_of = {entry["id"]: number for entry, number in zip(document["images"], numbers, strict=True)}
    category_of = {entry["id"]: number for entry, number in zip(document["categories"], IDS, strict=True)}
    for entry in document["images"]:
        entry["id"] = image_of[entry["id"]]
    for entry in document["categories"]:
        entry["id"] = category_of[entry["id"]]
    for entry in document["annotations"]:
        entry["image_id"], entry["category_id"] = image_of[entry["image_id"]], category_of[entry["category_id"]]
    path.write_text(json.dumps(document))
    dataset = read_coco(path)
    records = [r for i in range(len(dataset)) for r in perfect(dataset, i).to_coco(dataset.image_ids()[i], IDS)]
    return dataset, records


def perfect(dataset, index):
    objects = dataset.targets(index)
    objects.scores = torch.ones(len(objects))
    objects.crowd = objects.ids = None
    return objects


def ap(dataset, path, kinds=("segm", "bbox"), **options):
    evaluator = Evaluator(dataset, kinds, **options)
    evaluator.read(path)
    return evaluator.result(examples=0).summary[f"{kinds[0]}/AP"]


@pytest.fixture
def written(made, tmp_path):
    """Writes the records after a change and returns the file."""

    def write(change, name="results.json"):
        path = tmp_path / name
        path.write_text(json.dumps([{**record, **change(record)} for record in made[1]]))
        return path

    return write


def stem_of(dataset):
    return dict(zip(dataset.image_ids(), (Path(file).stem for file in dataset.files), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: {},
        lambda r: {"image_id": str(r["image_id"]), "category_id": str(r["category_id"])},
        lambda r: {"image_id": float(r["image_id"]), "category_id": float(r["category_id"])},
        lambda r: {"image_id": f"{r['image_id']:012d}", "category_id": f"{r['category_id']:02d}"},
        lambda r: {"category_id": CLASSES[IDS.index(r["category_id"])]},
        lambda r: {"score": "0.5"},
        lambda r: {"image_id": f"{r['image_id']}.0"},
    ],
    ids=["as they are", "text", "floats", "zero-padded", "class names", "score as text", "floats as text"],
)
def test_ids_are_accepted_as_annotations_may_have_them(made, written, change):
    assert ap(made[0], written(change)) == 1.0


def test_zero_padded_ids_of_annotations_are_matched_with_integers(made, tmp_path):
    dataset, records = made
    document = json.loads(dataset.path.read_text())
    for entry in [*document["images"], *document["annotations"]]:
        key = "image_id" if "image_id" in entry else "id"
        entry[key] = f"{entry[key]:06d}"
    (tmp_path / "padded.json").write_text(json.dumps(document))
    (tmp_path / "results.json").write_text(json.dumps(records))
    assert ap(read_coco(tmp_path / "padded.json", dataset.folder), tmp_path / "results.json") == 1.0


@pytest.mark.parametrize("form", ["{}", "{}.jpg", "val/{}.jpg", "/elsewhere/val/{}.jpg", "C:\\set\\val\\{}.jpg"])
def test_file_names_as_image_ids_are_matched_by_name(made, written, form):
    names = stem_of(made[0])
    suffix = Path(made[0].files[0]).suffix
    path = written(lambda r: {"image_id": form.format(names[r["image_id"]]).replace(".jpg", suffix)})
    if form == "{}":  # numeric names, as ultralytics writes them
        path = written(lambda r: {"image_id": int("".join(c for c in names[r["image_id"]] if c.isdigit()))})
    with pytest.warns(DataWarning, match="image ids are names of files"):
        assert ap(made[0], path) == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: {"image_id": None}, "record 0 has image_id null; expected the id of an image"),
        (lambda r: {"image_id": [1]}, r"record 0 has image_id \[1\]; expected the id of an image"),
        (lambda r: {"category_id": 1.5}, "record 0 has category_id 1.5; expected the id of a category"),
        (lambda r: {"category_id": True}, "record 0 has category_id true"),
        (lambda r: {"score": None}, "record 0: score must be 1 finite numbers, got None"),
        (lambda r: {"image_id": r["image_id"] + 900}, r"12 of 12 image ids are unknown .* probably of another split"),
        (lambda r: {"image_id": r["image_id"] - 1}, r"1 of 12 image ids are unknown .* known after adding 1"),
        (lambda r: {"image_id": f"cat{r['image_id']}.png"}, r"12 of 12 image ids .* appear to be names of files"),
        (lambda r: {"category_id": IDS.index(r["category_id"])}, r"appear to be labels \(0 ... 2\) instead"),
        (lambda r: {"category_id": IDS.index(r["category_id"]) + 1}, r"appear to be labels \+ 1 \(1 ... 3\)"),
        (lambda r: {"category_id": r["category_id"] - 1}, r"category ids are unknown .* known after adding 1"),
        (lambda r: {"category_id": r["category_id"] + 50}, "probably of another data set"),
    ],
)
def test_ids_that_stand_for_nothing_are_refused_with_the_cause(made, written, change, words):
    with pytest.raises(AnnotationError, match=words):
        ap(made[0], written(change))


def renumbered(dataset, tmp_path, images, categories):
    """A copy of the annotations with other ids, and perfect predictions with the ids of `images` and `categories`."""
    document = json.loads(dataset.path.read_text())
    for entry in document["images"]:
        entry["id"] = images[entry["id"]]
    for entry in document["categories"]:
        entry["id"] = categories[entry["id"]]
    for entry in document["annotations"]:
        entry["image_id"] = images[entry["image_id"]]
        entry["category_id"] = categories[entry["category_id"]]
    path = tmp_path / "renumbered.json"
    path.write_text(json.dumps(document))
    return read_coco(path, dataset.folder)


@pytest.mark.thorough
def test_known_ids_that_stand_for_other_images_or_classes_are_refused(made, tmp_path):
    dataset, records = made
    ids = dataset.image_ids()
    path = tmp_path / "results.json"

    counted = renumbered(dataset, tmp_path, {i: k for k, i in enumerate(sorted(ids), 1)}, {c: c for c in IDS})
    by_name = {i: k for k, i in enumerate(ids, 1)}
    path.write_text(json.dumps([{**r, "image_id": by_name[r["image_id"]]} for r in records]))
    with pytest.raises(AnnotationError, match=r"lie on objects if image ids count in the order of .* from 1, but only"):
        ap(counted, path)

    path.write_text(json.dumps([{**r, "category_id": {2: 3, 3: 7, 7: 2}[r["category_id"]]} for r in records]))
    with pytest.raises(AnnotationError, match=r"consistently stand for other classes .* \(2 for 'star', 3 for 'disc'"):
        ap(dataset, path)

    other = read_coco(Scenes(12, (64, 64), seed=9, classes=CLASSES, empty=0).write(tmp_path / "other", "train"))
    records_of_other = [r for i in range(12) for r in perfect(other, i).to_coco(ids[i], IDS)]
    path.write_text(json.dumps(records_of_other))
    with pytest.raises(AnnotationError, match=r"no more than on the objects of other images; .* another split"):
        ap(dataset, path)

    mixed = [{**r, "category_id": random.Random(n).choice(IDS)} for n, r in enumerate(records)]
    path.write_text(json.dumps(mixed))
    assert 0 < ap(dataset, path) < 0.6, "a poor result is no reason to refuse"


@pytest.mark.thorough
def test_predictions_on_nothing_are_refused_unless_they_score_low(made, written):
    path = written(lambda r: {"bbox": [60.0, 60.0, 2.0, 2.0], "segmentation": None})
    with pytest.raises(AnnotationError, match=r"only \d of \d\d predictions lie on an object .* of another split"):
        ap(made[0], path, ("bbox",))
    path = written(lambda r: {"bbox": [60.0, 60.0, 2.0, 2.0], "segmentation": None, "score": 0.06})
    with pytest.warns(DataWarning, match=r"only \d of \d\d predictions .* or of a system that has learned nothing"):
        assert ap(made[0], path, ("bbox",)) < 0.1


@pytest.mark.thorough
def test_null_masks_and_keypoints_alone(made, written, tmp_path):
    assert ap(made[0], written(lambda r: {"segmentation": None}), ("bbox",)) == 1.0
    assert ap(made[0], written(lambda r: {"segmentation": []}), ("bbox",)) == 1.0
    assert ap(made[0], written(lambda r: {"bbox": None})) == 1.0
    people = read_coco(Scenes(3, (64, 64), seed=2, keypoints=True).write(tmp_path / "people", "val"))
    records = [r for i in range(3) for r in perfect(people, i).to_coco(people.image_ids()[i], people.category_ids)]
    path = tmp_path / "keypoints.json"
    keys = ("image_id", "category_id", "keypoints", "score")  # as COCO's keypoint results are
    path.write_text(json.dumps([{key: r[key] for key in keys} for r in records]))
    assert ap(people, path, ("keypoints",)) > 0.99


# ---- predict, and what it writes -------------------------------------------------------------------------------------


def predicted(dataset, folder, *, images=None, ids=None, classes=CLASSES):
    """The folder that `predict` writes, with perfect predictions; images are numbered by file name."""
    writer = PredictionWriter(folder, ("coco",), classes, [images or dataset.folder], ids=ids)
    for file, index in sorted((file, index) for index, file in enumerate(dataset.files)):
        writer.add((images or dataset.folder) / file, perfect(dataset, index))
    writer.close()
    return folder / "results.json"


@pytest.mark.thorough
def test_results_of_predict_are_matched_by_name_or_have_own_ids(made, tmp_path):
    dataset, records = made
    path = predicted(dataset, tmp_path / "found")
    assert ap(dataset, path) == 1.0
    moved = tmp_path / "moved"
    shutil.copytree(dataset.folder, moved)
    assert ap(dataset, predicted(dataset, tmp_path / "copy", images=moved)) == 1.0

    ids = find_ids([dataset.folder], CLASSES)
    assert ids is not None
    own = predicted(dataset, tmp_path / "own", ids=ids)
    (own.parent / "pictures.json").unlink()  # no translation is needed
    assert ap(dataset, own) == 1.0
    key = lambda r: (r["image_id"], r["category_id"], r["bbox"])  # noqa: E731
    assert sorted(map(key, json.loads(own.read_text()))) == sorted(map(key, records))
    assert opened_data(dataset.folder.parent, None, [dataset.folder]).files == dataset.files
    assert find_ids([moved], CLASSES) is None
    assert find_ids([dataset.folder], ("cat",)) is None


@pytest.mark.thorough
def test_pictures_of_another_split_are_refused(made, tmp_path):
    dataset, _ = made
    other = read_coco(Scenes(12, (64, 64), seed=9, classes=CLASSES, empty=0).write(tmp_path / "other", "train"))
    with pytest.raises(AnnotationError, match="though it has its name; they are probably of another split"):
        ap(dataset, predicted(other, tmp_path / "found"))
    for file in other.folder.iterdir():
        file.rename(file.with_name(f"x{file.name}"))
    about = tmp_path / "found" / "pictures.json"
    about.write_text(about.read_text().replace("/train/", "/train/x"))
    with pytest.raises(AnnotationError, match=r"12 of 12 images, such as '.*' .*, are not in the data set"):
        ap(dataset, tmp_path / "found" / "results.json")


@pytest.mark.thorough
def test_pictures_that_do_not_list_the_ids_belong_to_another_file(made, written):
    path = written(lambda r: {})
    (path.parent / "pictures.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 2, "name": "ring"}]})
    )
    assert ap(made[0], path) == 1.0
    (path.parent / "pictures.json").write_text("{")
    assert ap(made[0], path) == 1.0


def test_classes_that_the_data_set_lacks_get_unused_ids_and_are_left_out(made, tmp_path):
    dataset, _ = made
    classes = ("ring", "disc", "cat", "star")  # labels 0, 1, 2 of the predictions below stand for ring, disc, cat
    ids = DatasetIds(dataset, classes)
    assert ids.category_ids == [3, 2, 10, 7]
    assert ids.unknown_classes == ["cat"]
    path = predicted(dataset, tmp_path / "found", ids=ids, classes=classes)
    evaluator = Evaluator(dataset)
    with pytest.warns(DataWarning, match="1 classes are not in the data set and are left out: 'cat'"):
        evaluator.read(path)
    assert {int(label) for record in evaluator.partial().values() for label in record.labels} == {0, 1}


@pytest.mark.thorough
def test_panoptic_results_are_read_with_their_own_lists(tmp_path):
    path = Scenes(4, (48, 48), seed=4, stuff=True).write(tmp_path / "set", "val")
    dataset = read_panoptic(path)
    writer = PredictionWriter(
        tmp_path / "out", ("coco",), dataset.classes, [dataset.folder], dataset.stuff, task_called("panoptic")
    )
    for index in reversed(range(len(dataset))):
        writer.add(dataset.folder / dataset.files[index], dataset.panoptic(index))
    writer.close()
    for evaluator, name in ((PanopticEvaluator(dataset), "panoptic/PQ"), (SemanticEvaluator(dataset), "semantic/mIoU")):
        evaluator.read(tmp_path / "out/panoptic.json")
        assert evaluator.result().summary[name] == 1.0
    with pytest.raises(AnnotationError, match=r"got panoptic segments, which PanopticEvaluator\.read"):
        Evaluator(dataset).read(tmp_path / "out/panoptic.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(AnnotationError, match=r"for COCO results of objects use Evaluator\.read"):
        PanopticEvaluator(dataset).read(tmp_path / "list.json")


def test_reading_warns_of_nothing_that_is_right(made, written):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ap(made[0], written(lambda r: {})) == 1.0
