"""Assignment of objects to cells, and suppression of candidates."""

from __future__ import annotations

import pytest
import torch

from maskwright.ops.suppression import mask_nms, matrix_nms
from maskwright.structures import Instances, Masks
from maskwright.systems.families import solo_grid as grid_ops
from maskwright.systems.families.solo_grid import Cells

pytestmark = pytest.mark.fast

SIZE = (128, 160)


def target(*boxes: tuple[int, int, int, int], labels: tuple[int, ...] = (), size: tuple[int, int] = SIZE) -> Instances:
    """Objects that fill their boxes."""
    crops = [torch.ones(y1 - y0, x1 - x0, dtype=torch.bool) for x0, y0, x1, y1 in boxes]
    corners = torch.tensor([box[:2] for box in boxes]).reshape(-1, 2)
    kinds = torch.tensor(labels or (0,) * len(boxes), dtype=torch.int64)
    return Instances(size, torch.tensor(boxes).float().reshape(-1, 4), kinds, Masks.from_crops(crops, corners, size))


def read(own: Instances, inclusive: bool = False, **options) -> grid_ops.Objects:
    return grid_ops.read_objects(own, SIZE, (4, 8), torch.device("cpu"), inclusive=inclusive, **options)


def assign(objects: grid_ops.Objects) -> list[grid_ops.Positives]:
    return grid_ops.assign(objects, SIZE, Cells())


def test_the_cells_around_an_objects_centre_are_positive_on_every_level_of_its_size():
    # 60 x 60 pixels: levels 1 ... 96 and 48 ... 192. Its centre of mass, in indices of pixels, is 69.5, 59.5.
    assigned = assign(read(target((40, 30, 100, 90))))
    assert [len(c.cells) for c in assigned] == [12 - 3, 9, 0, 0, 0]
    # 40 columns on 160 pixels: 69.5 -+ 6 are columns 15 ... 18; at most one away from the centre's, 17, counts.
    columns, rows = assigned[0].cells % 40, assigned[0].cells // 40
    assert columns.unique().tolist() == [16, 17, 18]
    assert rows.unique().tolist() == [17, 18, 19]
    assert assigned[0].cells.tolist() == sorted(assigned[0].cells.tolist())


def test_ranges_are_inclusive_and_boxes_may_include_their_last_pixel():
    own = target((0, 0, 96, 96))
    assert [len(c.cells) > 0 for c in assign(read(own))] == [True, True, True, False, False]
    assert [len(c.cells) > 0 for c in assign(read(own, inclusive=True))] == [True, True] + [False] * 3
    one = target((5, 5, 6, 6))  # one pixel: size 0 if boxes include their last pixel, below every range
    assert sum(len(c.cells) for c in assign(read(one, inclusive=True))) == 0
    assert sum(len(c.cells) for c in assign(read(one))) == 1


def test_a_cell_of_two_objects_belongs_to_the_later_one():
    objects = read(target((20, 20, 60, 60), (22, 22, 62, 62), labels=(4, 7)))
    positives = assign(objects)[0]
    latest = positives.owner_of_cells(1600)
    once = positives.unique(1600)
    assert len(once.cells) < len(positives.cells)
    assert (latest >= 0).sum() == len(once.cells)
    shared = positives.cells[positives.owners == 0][
        torch.isin(positives.cells[positives.owners == 0], positives.cells[positives.owners == 1])
    ]
    assert (latest[shared] == 1).all()
    labels = grid_ops.class_labels([objects], [assign(objects)], Cells().grids)
    assert labels.shape == (1, sum(g * g for g in Cells().grids))
    assert (labels[0, shared] == 7).all()
    assert set(labels.unique().tolist()) == {-1, 4, 7}


def test_masks_are_reduced_by_the_centre_of_blocks_and_empty_ones_are_not_assigned():
    planes = torch.zeros(3, *SIZE, dtype=torch.bool)
    planes[0, :2, :8] = True  # the upper half of the first block, with two of its central pixels
    planes[1, 0, :] = True  # only the first row: no central pixel
    own = Instances(SIZE, torch.tensor([[0, 0, 30, 30.0]] * 3), torch.zeros(3).long(), Masks.from_dense(planes))
    objects = read(own, budget=1)  # one at a time
    assert objects.planes[4][0, 0, :3].tolist() == [True, True, False]
    assert not objects.planes[4][1].any()
    assert objects.solid.tolist() == [True, True, False]
    assert objects.centres[0].tolist() == [3.5, 0.5]
    assert {int(o) for c in assign(objects) for o in c.owners} == {0, 1}


def test_mask_losses_in_parts_equal_those_in_one():
    torch.manual_seed(0)
    maps = torch.randn(30, 6, 8, requires_grad=True)
    positives = grid_ops.Positives(torch.arange(30), torch.arange(30) % 3)
    planes = torch.rand(3, 6, 8) > 0.5
    results = []
    for budget in (1 << 20, 4 * 48 * 7):
        maps.grad = None
        for kind in ("dice", "focal", "bce"):
            total = grid_ops.mask_loss_sum(lambda c: maps[c].sigmoid(), positives, planes, kind, budget)
            total.backward()
            results.append(total.detach())
        results.append(maps.grad)
    for a, b in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(a, b)


def test_point_nms_compares_with_the_left_and_upper_neighbours():
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.4, 0.2, 0.2], [0.4, 0.1, 0.5]])[None, None]
    # One-sided: 0.3 is kept although 0.4 lies below it to the left; of equal neighbours both are kept.
    kept = grid_ops.point_nms(scores)[0, 0]
    assert (kept > 0).tolist() == [[True, True, False], [True, False, False], [True, False, True]]
    assert torch.equal(kept[kept > 0], scores[0, 0][kept > 0])


def rectangles() -> torch.Tensor:
    """Three masks: two that nearly coincide and a third."""
    maps = torch.zeros(3, 16, 20)
    maps[0, 2:10, 2:10] = 0.9
    maps[1, 2:10, 2:11] = 0.8
    maps[2, 3:12, 14:19] = 0.7
    return maps


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_duplicates_decay_or_are_removed(budget):
    maps, scores = rectangles(), torch.zeros(5, 2)
    scores[0, 0], scores[1, 0], scores[2, 0], scores[2, 1], scores[3, 1] = 0.9, 0.8, 0.7, 0.05, 0.6
    maps = torch.cat([maps, torch.full((2, 16, 20), 0.9) * (torch.arange(20) < 0)])
    computed = []

    def masks_of(cells):
        computed.extend(cells.tolist())
        return maps[cells]

    smallest = torch.tensor([8.0, 8, 8, 8, 8])
    masks, values, labels = grid_ops.select_objects(scores, smallest, masks_of, grid_ops.Suppression(), 320, budget)
    assert 4 not in computed  # below the threshold of candidates: its mask is not computed
    assert labels.tolist() == [0, 0, 0]  # cell 3 has an empty mask
    torch.testing.assert_close(values[0], torch.tensor(0.9 * 0.9))
    torch.testing.assert_close(values[1], torch.tensor(0.7 * 0.7))
    torch.testing.assert_close(values[2], 0.64 * torch.tensor(-2 * (64 / 72) ** 2).exp())
    assert torch.equal(masks, maps[[0, 2, 1]])
    plain = grid_ops.Suppression(nms_threshold=0.5)
    masks, values, _ = grid_ops.select_objects(scores, smallest, masks_of, plain, 320, budget)
    assert torch.equal(masks, maps[[0, 2]])
    none, values, _ = grid_ops.select_objects(scores * 0, smallest, masks_of, plain, 320, budget)
    assert none.shape == (0, 16, 20)


def test_mask_nms_goes_from_the_best_to_the_worst():
    iou = torch.tensor([[1, 0.6, 0.1], [0.6, 1, 0.6], [0.1, 0.6, 1]])
    assert mask_nms(iou, torch.zeros(3).long()).tolist() == [True, False, True]  # a removed object removes no other
    assert mask_nms(iou, torch.tensor([0, 1, 1])).tolist() == [True, True, False]
    assert mask_nms(iou[:0, :0], torch.zeros(0).long()).shape == (0,)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_matrix_nms_of_equal_masks_is_finite(kernel):
    values = matrix_nms(torch.ones(3, 3), torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64), kernel)
    assert values[0] == torch.tensor(0.9)
    assert (values[1:] < 0.2).all(), "a NaN is not below"
    assert (values[1:] == 0).all() == (kernel == "linear")
