"""The catalogue: addresses, hashes, licences and terms of the published checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from maskwright.checkpoints import download as fetching
from maskwright.checkpoints import list_checkpoints, load
from maskwright.checkpoints.catalogue import allows_commercial, entry_of_file, find, parse_catalogue
from maskwright.checkpoints.names import COCO, COCO_IDS, class_names
from maskwright.errors import CheckpointError
from maskwright.systems import names

pytestmark = pytest.mark.fast

CLOSED = """
[lab]
base = "https://example.org/"
code = "https://example.org/code"
code_licence = "MIT"
weights_licence = "CC-BY-NC-4.0"
commercial = "no"
[lab.files]
mask-rcnn-lab = { path = "weights.pth" }
"""


def test_every_entry_is_complete_and_named_once() -> None:
    entries = list_checkpoints()
    assert len([e for e in entries if "rcnn" in e.system]) == 118
    assert len({e.name for e in entries}) == len({e.url for e in entries}) == len(entries)
    for entry in entries:
        assert entry.url.startswith("https://")
        assert entry.system in names()
        assert entry.commercial in ("yes", "attribution", "no")
        assert entry.weights_licence
        assert entry.code_licence
        if "rcnn" in entry.system:  # other publishers do not all state a hash
            assert re.fullmatch("[0-9a-f]{8}", entry.sha256) or re.fullmatch("[0-9a-f]{6}", entry.md5)
        assert entry.sha256 + entry.md5 in entry.file
        assert all(0 < s.value < 100 and s.protocol and s.source for s in entry.published)


def test_the_terms_say_licence_use_scores_and_check() -> None:
    entry = find("mask-rcnn-r50-fpn-3x")
    assert entry is not None
    terms = entry.terms()
    for words in (
        "weights CC-BY-SA-3.0",
        "code Apache-2.0",
        "commercial use allowed on conditions",
        "share what you make of the weights under the same licence",
        "box AP 41, mask AP 37.2",
        "first 6 digits of the md5",
    ):
        assert words in terms
    other = find("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth")
    assert other is not None
    assert other.name == "mask-rcnn-r50-fpn-torchvision"
    assert "about 178 MB" in other.terms()
    assert "first 8 digits of the sha256" in other.terms()
    assert find("nothing") is None
    assert entry_of_file(Path("folder") / other.file) == other


def test_weights_without_commercial_use_are_filtered_and_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (closed,) = parse_catalogue(CLOSED)
    assert closed.verified == "unverified: no hash is published"
    assert "commercial use NOT allowed" in closed.terms()
    monkeypatch.setattr("maskwright.checkpoints.catalogue.catalogue", lambda: (closed, *parse_catalogue(CLOSED)))
    assert list_checkpoints(commercial_ok=True) == []
    assert len(list_checkpoints()) == 2
    assert list_checkpoints(system="keypoint-rcnn") == []

    def never(*_: Any, **__: Any) -> Path:
        raise AssertionError("fetched")

    monkeypatch.setattr(fetching, "download", never)
    with pytest.raises(
        CheckpointError, match=r"mask-rcnn-lab: the weights are licensed CC-BY-NC-4\.0, .* nothing was downloaded"
    ):
        fetching.fetch(closed, commercial_ok=True, folder=tmp_path)
    # Otherwise the terms are printed before the download.
    with pytest.raises(AssertionError, match="fetched"):
        fetching.fetch(closed, folder=tmp_path)
    assert "CC-BY-NC-4.0" in capsys.readouterr().err


def test_licences_that_forbid_commercial_use_are_known_by_name() -> None:
    assert not any(allows_commercial(x) for x in ("CC BY-NC 4.0", "non-commercial", "Academic use only", "AGPL-3.0"))
    assert all(allows_commercial(x) for x in ("CC-BY-SA-3.0", "Apache-2.0", "MIT", "BSD-3-Clause", ""))


def test_class_names_of_published_heads() -> None:
    assert len(COCO) == len(COCO_IDS) == len(set(COCO)) == 80
    assert COCO_IDS[COCO.index("person")] == 1
    assert COCO_IDS[COCO.index("stop sign")] == 13
    assert COCO_IDS[COCO.index("backpack")] == 27
    assert COCO_IDS[COCO.index("toothbrush")] == 90
    assert class_names(1) == ("class 0",)  # only the file can say that it is a person
    assert class_names(8)[1] == "rider"
    assert class_names(2) == ("class 0", "class 1")


def test_checkpoints_that_need_a_browser_are_refused_with_instructions():
    by_hand = [entry for entry in list_checkpoints() if entry.by_hand]
    assert by_hand
    for entry in by_hand:
        with pytest.raises(CheckpointError, match=f"{entry.name}: this checkpoint can only be downloaded in a browser"):
            load(entry.name)
