"""Prompts, embeddings and choices."""

from __future__ import annotations

import pytest
import torch

import maskwright as mw
from maskwright.errors import DataError, UnknownLayoutError, UsageError
from maskwright.structures import Choices, Embedding, Instances, Masks, Placement, Prompts

pytestmark = pytest.mark.fast
SIZE = (60, 80)


def square(x0: int, y0: int, side: int) -> Masks:
    return Masks.from_crops([torch.ones(side, side, dtype=torch.bool)], torch.tensor([[x0, y0]]), SIZE)


def test_a_list_of_points_is_one_object_and_a_list_of_lists_several():
    one = Prompts.from_points(SIZE, [(1, 2), (3, 4)], [1, 0])
    assert one.points.tolist() == [[[1, 2], [3, 4]]]
    assert one.point_labels.tolist() == [[1, 0]]
    several = Prompts.from_points(SIZE, [[(1, 2)], [(3, 4), (5, 6)]])
    assert several.point_labels.tolist() == [[1, -1], [1, 1]]
    assert several.ignored.tolist() == [[False, True], [False, False]]
    assert several.point_counts.tolist() == [1, 2]


def test_objects_without_points_and_no_objects_are_allowed():
    assert Prompts.from_points(SIZE, [[], [(1, 2)]]).point_counts.tolist() == [0, 1]
    for empty in (Prompts.empty(SIZE), Prompts.from_points(SIZE, []), Prompts.from_boxes([], SIZE)):
        assert len(empty) == 0


def test_boxes_are_clipped_to_the_image():
    prompts = Prompts.from_boxes([[-3.0, 5, 90, 20]], SIZE)
    assert prompts.boxes is not None
    assert prompts.boxes.tolist() == [[0, 5, 80, 20]]
    objects = Instances(SIZE, torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0]))
    assert len(Prompts.from_boxes(objects)) == 1


def refined(value: float) -> Prompts:
    return Prompts(SIZE, torch.zeros(1, 0, 2), torch.zeros(1, 0).long(), logits=torch.full((1, 8, 8), value))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Prompts.from_points(SIZE, [(81, 2)]), "a point of object 0 is outside of the image: 81, 2"),
        (lambda: Prompts.from_points(SIZE, [[(1, 2)], [(1, float("nan"))]]), "a point of object 1 is outside"),
        (lambda: Prompts.from_boxes([[90.0, 0, 99, 9]], SIZE), "a box of object 0 is outside of the image"),
        (lambda: Prompts.from_boxes([[9.0, 0, 5, 9]], SIZE), "the box of object 0 ends before it begins"),
        (lambda: Prompts.from_boxes([[9.0, 0, 5]], SIZE), "boxes must have shape"),
        (lambda: Prompts.from_boxes([[1.0, 2, 3, 4]]), "`image_size`"),
        (lambda: Prompts.from_points(SIZE, [(1, 2)], [2]), "point_labels must be 1"),
        (lambda: Prompts.from_points(SIZE, [(1, 2)], [1, 0]), "labels must have one entry for each point"),
        (lambda: Prompts.from_points(SIZE, "no"), "points must be lists"),
        (lambda: Prompts.from_masks(Instances.empty(SIZE, masks=False)), "no masks"),
        (lambda: Prompts.join([Prompts.empty(SIZE), Prompts.empty((1, 1))]), "different sizes"),
        (lambda: Prompts.join([]), "at least one part"),
        (lambda: Prompts.empty((0, 4)), "image_size must be"),
        (lambda: Prompts.from_points(SIZE, [(1, 2)], [0.5]), "point_labels must be integers, got 0.5"),
        (lambda: Prompts.from_points(SIZE, [(1, 2)], [float("nan")]), "point_labels must be integers, got nan"),
        (lambda: Prompts.from_points(SIZE, [(1, 2)], ["on"]), r"labels must be lists of 1 and 0, got \['on'\]"),
        (lambda: Prompts.from_boxes([[1, 2, 3], [1, 2, 3, 4]], SIZE), "boxes must be lists of x0, y0, x1, y1"),
        (lambda: Prompts.from_boxes("x", SIZE), "boxes must be lists of x0, y0, x1, y1, got 'x'"),
        (lambda: Prompts.from_boxes([[float("nan")] * 4], SIZE), "a box of object 0 is outside of the image: nan"),
        (lambda: Prompts.from_boxes([[1, 2, float("inf"), 4]], SIZE), "a box of object 0 is outside of the image: 1"),
        (lambda: refined(float("inf")), "logits must be finite numbers"),
    ],
)
def test_what_does_not_fit_is_an_error_in_words(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_joined_parts_keep_what_each_object_has():
    logits = torch.randn(1, 8, 8)
    parts = [
        Prompts.from_points(SIZE, [[(1, 2), (3, 4)]]),
        Prompts.from_boxes([[1.0, 2, 3, 4]], SIZE),
        Prompts.from_masks(square(5, 5, 10)),
        Prompts(SIZE, torch.zeros(1, 0, 2), torch.zeros(1, 0).long(), logits=logits),
    ]
    joined = Prompts.join(parts)
    assert joined.has_box.tolist() == [False, True, False, False]
    assert joined.has_mask.tolist() == [False, False, True, True]
    assert joined.point_counts.tolist() == [2, 0, 0, 0]
    chosen = joined[torch.tensor([3, 0])]
    assert chosen.logits is not None
    assert torch.equal(chosen.logits[0], logits[0])
    assert chosen.point_counts.tolist() == [0, 2]


def test_prompts_are_placed_like_objects():
    placement = Placement.resize(SIZE, (120, 160)).then_mirror()
    prompts = Prompts.join([Prompts.from_points(SIZE, [(10, 20)]), Prompts.from_boxes([[0.0, 0, 10, 20]], SIZE)])
    placed = prompts.place(placement)
    assert placed.image_size == (120, 160)
    assert placed.points[0].tolist() == [[140, 40]]
    assert placed.boxes is not None
    assert placed.boxes[1].tolist() == [140, 0, 160, 40]
    assert placed.ignored.tolist() == [[False], [True]]


def test_an_embedding_is_read_as_it_was_written(tmp_path):
    placement = Placement.resize(SIZE, (120, 160))
    embedding = Embedding({"image": torch.randn(4, 2, 3)}, placement, (160, 160), "sam-0")
    path = embedding.save(tmp_path / "a.safetensors")
    again = Embedding.load(path)
    assert torch.equal(again.tensors["image"], embedding.tensors["image"])
    assert (again.placement, again.input_size, again.system) == (placement, (160, 160), "sam-0")
    assert again.to(dtype=torch.bfloat16).tensors["image"].dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"must be a floating point type, got torch\.int32"):
        again.to(dtype=torch.int32)
    with pytest.raises(UsageError, match="the embedding cannot be moved to xpu:7"):
        again.to("xpu:7")
    with pytest.raises(UnknownLayoutError, match="is the embedding of an image, not weights; read it with Embedding"):
        mw.load(path)
    assert repr(again) == "Embedding(image: (4, 2, 3); image 60 x 80; sam-0)"
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        embedding.save(tmp_path / "a.pt")


def test_files_that_are_no_embedding_are_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text.safetensors").write_text("no")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    whole = Embedding({"image": torch.randn(4, 2, 3)}, Placement.identity(SIZE), (160, 160), "s").save(
        tmp_path / "whole.safetensors"
    )
    (tmp_path / "short.safetensors").write_bytes(whole.read_bytes()[:-8])
    for name in ("text", "other", "short", "missing"):
        with pytest.raises(DataError, match=name):
            Embedding.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("names", "about", "words"),
    [
        (("picture",), {}, r"must have the tensors image, finer\.0, \.\.\., got picture; save it again"),
        (("image", "finer.1"), {}, "got finer.1, image"),
        (("image",), {"input_size": "[0, 0]"}, "its input_size is invalid"),
        (("image",), {"placement": "{}"}, "cannot be read as an embedding"),
    ],
)
def test_embeddings_whose_parts_do_not_fit_are_refused(tmp_path, names, about, words):
    from safetensors import safe_open
    from safetensors.torch import save_file

    whole = Embedding({"image": torch.randn(4, 2, 3)}, Placement.identity(SIZE), (160, 160), "s")
    with safe_open(whole.save(tmp_path / "whole.safetensors"), "pt") as file:
        metadata = {**file.metadata(), **about}
    path = tmp_path / "changed.safetensors"
    save_file({name: torch.zeros(4, 2, 3) for name in names}, path, metadata=metadata)
    with pytest.raises(DataError, match=words):
        Embedding.load(path)


def test_the_best_choice_is_that_with_the_highest_score():
    logits = torch.full((2, 3, 6, 8), -1.0)
    logits[0, 1, 2:4, 1:3] = 1.0
    scores = torch.tensor([[0.1, 0.9, 0.3], [0.2, 0.1, 0.0]])
    choices = Choices((6, 8), logits, scores, lambda planes: Masks.from_dense(planes > 0))
    best = choices.best()
    assert best.boxes.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
    assert best.scores is not None
    assert best.scores.tolist() == pytest.approx([0.9, 0.2])
    assert len(choices.masks) == 6
    assert choices.masks.areas().tolist() == [0, 4, 0, 0, 0, 0]
    assert repr(choices) == (
        "Choices(2 prompts, 3 answers each, logits (6, 8), image 6 x 8, scores [[0.1, 0.9, 0.3], [0.2, 0.1, 0.0]])"
    )
