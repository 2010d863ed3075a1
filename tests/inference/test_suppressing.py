"""Matrix NMS on the objects of any system."""

from __future__ import annotations

import pytest
import torch

from maskwright.cli import main
from maskwright.errors import UsageError
from maskwright.inference import evaluate, predict
from maskwright.inference.suppressing import checked_suppression
from maskwright.ops.suppression import matrix_nms
from tests.inference.painted import Painted, blocks, save
from tests.inference.test_evaluate import Gallery
from tests.systems.tiny import build

pytestmark = pytest.mark.fast


@pytest.mark.thorough
def test_scores_of_mask_rcnn_decay_and_are_sorted_again():
    system = build("mask-rcnn", resize={"short": 96, "long": 128}).eval()
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {"score_threshold": 0.0, "nms_threshold": 1.0, "detections": 30, "device": "cpu"}
    plain = predict(system, image, **options).found()
    decayed = predict(system, image, suppression="matrix", **options).found()
    expected = matrix_nms(plain.masks.iou(plain.masks), plain.scores, plain.labels)
    assert len(decayed) == len(plain) > 2
    torch.testing.assert_close(decayed.scores, expected.sort(descending=True).values)
    assert decayed.scores[0] == plain.scores[0]
    assert decayed.scores.sum() < 0.99 * plain.scores.sum()
    first = expected.argsort(descending=True, stable=True)[:5]
    assert torch.equal(decayed.boxes[:5], plain.boxes[first])
    # What has fallen below the threshold is gone.
    threshold = float(decayed.scores[len(decayed) // 2])
    fewer = predict(system, image, suppression="matrix", **{**options, "score_threshold": threshold}).found()
    assert (fewer.scores >= threshold).all()
    assert len(fewer) < len(plain)


@pytest.mark.thorough
def test_objects_apart_stay_as_they_are():
    system, image = Painted().eval(), blocks(5)
    plain, decayed = (predict(system, image, suppression=kind).found() for kind in (None, "matrix"))
    assert torch.equal(plain.scores, decayed.scores)
    own, decayed = (evaluate(system, Gallery(), suppression=kind) for kind in (None, "matrix"))
    assert decayed["segm/AP"] == pytest.approx(1)
    assert dict(own.protocol.facts())["suppression"] == "the system's own"
    assert "Matrix NMS" in dict(decayed.protocol.facts())["suppression"]


def test_a_system_without_masks_or_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match="compares masks, but this system does not predict masks"):
        predict(Painted(masks=False).eval(), blocks(2), suppression="matrix")
    with pytest.raises(UsageError, match="`suppression` must be 'matrix' or None, got 'soft'"):
        checked_suppression("soft")


def test_the_command_line_has_it(tmp_path, capsys):
    save(blocks(2), tmp_path / "a.png")
    # The option is accepted; only the weights are missing.
    assert main(["predict", str(tmp_path / "a.png"), "--suppression", "matrix", "-w", "none.pth"]) != 0
    assert "none.pth" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "a.png"), "--suppression", "soft", "-w", "none.pth"]) != 0
    assert "invalid choice 'soft' for argument '--suppression'" in capsys.readouterr().err
