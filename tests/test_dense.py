"""The dense stage of pretraining: its targets, its losses, and the plain system that remains of it."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.dense import (
    CELL,
    CHANNELS,
    FREQUENCIES,
    Dense,
    Guided,
    Kept,
    anchored,
    anchors,
    dense_losses,
    dense_targets,
    prepared,
    regions,
    taken,
)
from maskwright.data import Scenes
from maskwright.data.views import OneClass
from maskwright.ops.query_losses import Objects
from maskwright.structures import Instances, Masks
from maskwright.systems.eomt import EoMT
from tests.systems.tiny import build

pytestmark = pytest.mark.fast


def two_squares() -> Instances:
    """A large square with a small one on it, in an image of 32 x 64."""
    masks = torch.zeros(2, 32, 64, dtype=torch.bool)
    masks[0, 0:32, 0:32] = True
    masks[1, 8:16, 8:16] = True
    boxes = torch.tensor([[0.0, 0, 32, 32], [8, 8, 16, 16]])
    return Instances((32, 64), boxes, torch.zeros(2, dtype=torch.int64), Masks.from_dense(masks))


def test_cells_of_an_object_have_the_code_of_its_centre():
    found = dense_targets(two_squares())
    assert found.shape == (CHANNELS, 32 // CELL, 64 // CELL)
    assert found[0].sum() == (32 // CELL) ** 2
    small = found[2:, 2:4, 2:4].flatten(1)  # where masks overlap, the smaller object
    assert torch.equal(small, small[:, :1].expand_as(small))
    centre = 12 / 64, 12 / 32
    code = [wave(math.pi * f * c) for f in FREQUENCIES for c in centre for wave in (math.sin, math.cos)]
    torch.testing.assert_close(small[1:, 0], torch.tensor(code))
    torch.testing.assert_close(small[0, 0], torch.tensor((math.log(64) - 5) / 3))
    assert not torch.allclose(found[3:, 0, 0], small[1:, 0])
    assert not found[2:, :, 8:].any()
    assert found[1, 0, 7] == 1
    assert found[1, 0, 8] == 1  # either side of the edge
    assert found[1, 6, 5] == 0


def test_an_image_without_objects_has_a_finite_loss_and_no_code():
    empty = dense_targets(two_squares()[torch.zeros(0, dtype=torch.int64)])
    assert not empty.any()
    terms = dense_losses(torch.randn(1, *empty.shape), empty[None])
    assert terms["code"] == 0
    assert all(term.isfinite() for term in terms.values())


def test_the_right_maps_have_no_loss():
    expected = dense_targets(two_squares())[None]
    maps = expected.clone()
    maps[:, :2] = 40 * expected[:, :2] - 20
    assert sum(dense_losses(maps, expected).values()) < 1e-6
    assert sum(dense_losses(-maps, expected).values()) > 10


def test_a_prepared_network_has_decorrelated_patches_and_learns():
    torch.manual_seed(0)
    images = Kept(Scenes(60, (64, 64), seed=0))
    assert images[3] is images[3]
    options = build("eomt", classes=("object",)).options
    options = {**options, "backbone": {**options["backbone"], "width": 24, "heads": 2}, "table": None}
    dense = Dense.made({**options, "resize": {"canvas": [64, 64]}})
    prepared(dense, images)
    body = dense.dense.backbone.body
    inputs = torch.stack([dense.preprocess.apply(images[number].image)[0] for number in range(60)])
    patches = body.patch_embed.proj(inputs).flatten(2).mT.flatten(0, 1).detach()
    correlation = torch.corrcoef(patches.mT).fill_diagonal_(0)
    assert correlation.abs().mean() < 0.1
    assert patches.std(0)[0] == pytest.approx(1, abs=0.2)
    targets = [images[number].target for number in range(8)]
    optimizer = torch.optim.AdamW(dense.parameters(), 3e-3)
    totals = []
    for _ in range(15):
        loss = torch.stack(list(dense.losses(dense(inputs[:8]), targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(float(loss.detach()))
    assert totals[-1] < 0.8 * totals[0]
    for kind in (Guided, EoMT):
        other = taken(kind, dense.options, dense.state_dict())
        assert torch.equal(other.dense.backbone.body.pos_embed, body.pos_embed)
    assert not any(name.startswith(("coarse", "fine")) for name in other.state_dict())


def test_an_object_belongs_to_the_query_whose_anchor_is_nearest():
    places = anchors(12)
    assert places.shape == (12, 3)
    assert bool(((places[:, :2] > 0) & (places[:, :2] < 1)).all())
    assert 0.05 <= float(places[:, 2].exp().min()) < float(places[:, 2].exp().max()) <= 0.9
    masks = torch.zeros(2, 100, 200, dtype=torch.bool)
    for mask, query in zip(masks, (7, 2), strict=True):
        x, y, half = float(places[query, 0]), float(places[query, 1]), float(places[query, 2].exp()) / 2
        rows = slice(round(max(0, 100 * (y - half))), round(100 * (y + half)))
        mask[rows, round(max(0, 200 * (x - half))) : round(200 * (x + half))] = True
    queries, which = anchored(Objects(torch.zeros(2, dtype=torch.int64), Masks.from_dense(masks)), 12)
    assert dict(zip(which[0].tolist(), queries[0].tolist(), strict=True)) == {0: 7, 1: 2}


def test_regions_lie_around_their_objects_and_are_never_empty():
    objects = Objects.from_instances(two_squares(), torch.device("cpu"))
    for seed in range(20):
        torch.manual_seed(seed)
        inside = regions(objects, torch.tensor([1, 0]), (2, 4), 16).view(2, 2, 4)
        assert inside[0, 0, 0]  # the small square lies in the first patch
        assert inside[0].sum() == 1
        assert 1 <= inside[1].sum() <= 6
        assert not inside[1, :, 3].any()


def test_guided_queries_learn():
    torch.manual_seed(0)
    images = Kept(OneClass(Scenes(8, (64, 64), seed=0)))
    system = build("eomt", classes=("object",), resize={"canvas": [64, 64]})
    guided = taken(Guided, system.options, system.state_dict())
    inputs = torch.stack([guided.preprocess.apply(images[number].image)[0] for number in range(8)])
    targets = [images[number].target for number in range(8)]
    optimizer = torch.optim.AdamW(guided.parameters(), 2e-3)
    totals = []
    for _ in range(12):
        terms = guided.losses(guided(inputs), targets)
        assert len(terms) == 3 * (1 + len(guided.dense.backbone) - guided.dense.first)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(float(loss.detach()))
    assert totals[-1] < 0.9 * totals[0]
