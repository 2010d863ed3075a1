"""Opening a data set: which of several is read, and the messages if none fits or several do."""

from __future__ import annotations

import ast
import shutil
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import maskwright.data
from maskwright.data import Scenes, check, has_split, open_dataset, register_format
from maskwright.data.formats import CERTAIN, FORMATS, Match, Request, load_format
from maskwright.data.opening import find_matches
from maskwright.errors import DataError, UsageError
from tests.data.making import content, write

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with instances (2 images), keypoints (3) and panoptic (4) annotations of split "train"."""
    folder = tmp_path_factory.mktemp("set")
    Scenes(4, (32, 32), stuff=True).write(folder)
    (folder / "annotations/person_keypoints_train.json").unlink(missing_ok=True)
    Scenes(3, (32, 32), keypoints=True).write(folder)
    (folder / "annotations/instances_train.json").unlink()
    Scenes(2, (32, 32)).write(folder)
    return folder


@pytest.mark.parametrize(
    ("wanted", "removed", "count"),
    [
        ({}, "", 2),
        ({"keypoints": False, "panoptic": False}, "", 2),
        ({"keypoints": True}, "", 3),
        ({"panoptic": True}, "", 4),
        ({}, "instances", 4),
        ({"panoptic": False}, "instances", 4),
        ({}, "instances panoptic", 3),
        ({"keypoints": False}, "instances panoptic", 3),
    ],
)
def test_which_annotations_are_read(folder: Path, tmp_path: Path, wanted: dict, removed: str, count: int):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for kind in removed.split():
        (copy / f"annotations/{kind}_train.json").unlink()
    dataset = open_dataset(copy, strict=True, **wanted)
    assert len(dataset) == count
    assert bool(dataset.stuff) == (count == 4 and wanted.get("panoptic") is not False)
    assert (dataset.keypoint_names is not None) == (count == 3 and wanted.get("keypoints") is not False)
    kind = {2: "instances", 3: "person_keypoints", 4: "panoptic"}[count]
    assert dataset.origin == f"annotations/{kind}_train.json (COCO{' panoptic' if count == 4 else ''})"


def test_a_folder_a_file_and_scenes_can_be_opened(tmp_path: Path):
    write(tmp_path, content(2))
    write(tmp_path, content(1), "val")
    assert [len(open_dataset(tmp_path, split)) for split in ("train", "val")] == [2, 1]
    assert len(open_dataset(tmp_path / "annotations" / "instances_val.json")) == 1
    assert open_dataset(tmp_path).name == f"{tmp_path.name}/train"
    scenes = open_dataset("scenes:count=8,size=32", "val")
    assert len(scenes) == 2
    assert scenes.origin == "scenes:count=8,size=32 (generated scenes)"
    assert open_dataset("scenes:count=1,size=32,keypoints=1").keypoint_names
    assert open_dataset("scenes:count=1,size=32,keypoints=1", keypoints=False).keypoint_names is None
    assert open_dataset("scenes:count=1,size=32,stuff=1", panoptic=False).stuff == ()


def test_splits(tmp_path: Path):
    path = write(tmp_path, content(1))
    assert has_split(tmp_path, "train")
    assert not has_split(tmp_path, "val")
    assert not has_split(tmp_path, "train", panoptic=True)
    assert not has_split(path, "train"), "a file serves as any split, but has none"
    assert not has_split(tmp_path / "nowhere", "train")
    assert has_split("scenes", "val")


@pytest.mark.parametrize("kind", ["train", "val"])
@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("{}/_annotations.coco.json", {"train": "train", "val": "valid"}),
        ("annotations/instances_{}.json", {"train": "train2017", "val": "val2017"}),
        ("annotations/instances_{}.json", {"train": "training", "val": "validation"}),
        ("annotations/{}.json", {"train": "train", "val": "val"}),
        ("lvis_v1_{}.json", {"train": "train", "val": "val"}),
        ("{}.json", {"train": "train_v2", "val": "valid"}),
    ],
)
def test_layouts_of_other_tools(tmp_path: Path, layout: str, names: dict[str, str], kind: str):
    for number, (_, name) in enumerate(names.items(), 1):
        path = write(tmp_path / "images-of", content(number), name)
        target = tmp_path / "set" / layout.format(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        (tmp_path / "images-of" / name).rename(tmp_path / "set" / name) if layout[0] != "{" or "/" not in layout else [
            p.rename(target.parent / p.name) for p in (tmp_path / "images-of" / name).iterdir()
        ]
    count = 1 if kind == "train" else 2
    assert len(open_dataset(tmp_path / "set", kind, strict=True)) == count
    assert len(open_dataset(tmp_path / "set", names[kind], strict=True)) == count
    assert has_split(tmp_path / "set", kind)
    assert not has_split(tmp_path / "set", "test")
    assert check(tmp_path / "set").ok


def test_a_split_of_several_names_is_ambiguous(tmp_path: Path):
    write(tmp_path, content(1), "train2014")
    write(tmp_path, content(2), "train2017")
    words = (
        r"split 'train' can be train2014 \(annotations/instances_train2014\.json\) or train2017 .*--split train2014\)"
    )
    with pytest.raises(UsageError, match=words):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, "train2017")) == 2
    assert not check(tmp_path).ok
    assert check(tmp_path, split="train2017").ok


def test_a_single_file_under_any_name_serves_as_any_split(tmp_path: Path):
    path = write(tmp_path, content(2))
    path.rename(tmp_path / "result.json")
    (tmp_path / "annotations").rmdir()
    (tmp_path / "train").rename(tmp_path / "images")
    (tmp_path / "package.json").write_text("{}")
    assert len(open_dataset(tmp_path, "train", strict=True)) == len(open_dataset(tmp_path, "val", strict=True)) == 2
    assert not has_split(tmp_path, "val")
    for before, after in (("result", "instances_default"), ("instances_default", "instances_cells")):
        (tmp_path / f"{before}.json").rename(tmp_path / f"{after}.json")
        assert len(open_dataset(tmp_path, "train", strict=True)) == 2
        assert check(tmp_path).ok
    (tmp_path / "instances_cells.json").rename(tmp_path / "instances_val.json")
    assert not check(tmp_path).ok


def test_sources_that_cannot_be_opened(tmp_path: Path):
    write(tmp_path, content())
    with pytest.raises(
        UsageError, match=r"of split 'test'; found annotations/instances_train\.json; name the split \(--split train\)$"
    ):
        open_dataset(tmp_path, "test")
    with pytest.raises(UsageError, match=r"split 'train', panoptic; found annotations/instances_train\.json$"):
        open_dataset(tmp_path, panoptic=True)
    with pytest.raises(
        UsageError, match=r"split 'train'; expected one of annotations/instances_train\.json \(COCO\), annotations/pan"
    ):
        open_dataset(tmp_path / "train")
    with pytest.raises(UsageError, match="nowhere: no such file or folder; give the folder of a data set"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"1\.png: not an annotation file of a supported format \(COCO, COCO panoptic"):
        open_dataset(tmp_path / "train/1.png")
    with pytest.raises(UsageError, match="unknown data set format 'yola'; expected one of coco, coco-panoptic"):
        open_dataset(tmp_path, format="yola")
    with pytest.raises(DataError, match="no category lists keypoints"):
        open_dataset(tmp_path, keypoints=True)
    with pytest.raises(DataError, match=r"instances_train\.json: has no stuff classes"):
        open_dataset(tmp_path / "annotations/instances_train.json", panoptic=True)


@pytest.fixture
def other_format():
    """A format that fits every folder as well as COCO does."""
    module = ModuleType("tests_other_format")
    module.NAME, module.LAYOUT = "Other", "other.{split}"  # pyright: ignore[reportAttributeAccessIssue]

    def sniff(source: str, request: Request) -> list[Match]:
        return [Match(source, CERTAIN, "a folder", request.split)] if Path(source).is_dir() else []

    def read(match: Match, request: Request) -> Scenes:
        return Scenes(7, (32, 32))

    module.sniff, module.read = sniff, read  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules[module.__name__] = module
    register_format("other", module.__name__)
    yield
    del FORMATS["other"], sys.modules[module.__name__]


def test_another_format_is_added_by_one_line(tmp_path: Path, other_format: None):
    write(tmp_path, content(1))
    words = (
        r"2 formats fit equally well: coco \(annotations/instances_train\.json\), other \(a folder\); name the "
        "annotation file instead of the folder, or give format='coco'"
    )
    with pytest.raises(UsageError, match=words):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, format="other")) == 7
    assert len(open_dataset(tmp_path, format="coco")) == 1
    assert len(open_dataset(tmp_path, "val")) == 7, "only one format has this split"
    register_format("other", "tests_other_format")
    with pytest.raises(UsageError, match="format 'coco' is registered already"):
        register_format("coco", "tests_other_format")


@pytest.mark.parametrize("name", FORMATS)
def test_formats_match_nothing_where_there_is_nothing(name: str, tmp_path: Path):
    module = load_format(name)
    assert module.NAME
    assert module.LAYOUT.format(split="train")
    (tmp_path / "notes.txt").write_text("annotations")
    for source in (tmp_path, tmp_path / "notes.txt", tmp_path / "absent"):
        for split in ("train", None):
            assert list(module.sniff(str(source), Request(split))) == []


def test_json_files_are_recognized_by_their_start(tmp_path: Path):
    for name, text, confidence in (("a", '{"images": []}', 0.75), ("b", "[1]", 0.5), ("instances_x", "", 1.0)):
        (tmp_path / f"{name}.json").write_text(text)
        matches = find_matches(str(tmp_path / f"{name}.json"), Request())
        assert [(format_name, match.confidence) for format_name, match in matches] == [("coco", confidence)]


@pytest.mark.thorough
def test_modules_of_the_package_do_not_import_each_other_in_circles():
    folder = Path(maskwright.data.__file__).parent
    imports: dict[str, set[str]] = {}
    for path in folder.glob("[!_]*.py"):
        found = imports.setdefault(path.stem, set())
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maskwright.data"):
                module = (node.module or "").removeprefix("maskwright.data").removeprefix(".")
                found |= {module} if module else {alias.name for alias in node.names}
    assert imports["opening"] >= {"formats", "table_datasets"}
    TopologicalSorter(imports).prepare()  # raises CycleError
