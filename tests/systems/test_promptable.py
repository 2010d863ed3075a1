"""Systems that segment what they are prompted for: prompts, embeddings, everything, training."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jaxtyping
import pytest
import torch
from torch.nn import functional

import maskwright as mw
from maskwright.errors import UsageError
from maskwright.inference import prepare
from maskwright.inference.predicting import predict
from maskwright.structures import Embedding, Masks, Prompts
from maskwright.systems import create
from maskwright.systems.edge_sam import stability
from maskwright.systems.kinds import everything, prompt_training
from maskwright.systems.kinds.prompt_training import Simulation, correction, first_prompts
from maskwright.systems.kinds.promptable import PromptableSystem
from tests.systems.tiny import SIZE, build, objects

NAMES = pytest.mark.parametrize("name", ["sam", "mobile-sam", "efficient-sam", "edge-sam"])
IMAGE = (60, 80)


@cache
def system(name: str = "sam") -> PromptableSystem:
    found = build(name).eval()
    assert isinstance(found, PromptableSystem)
    return found


@cache
def embeddings(name: str = "sam") -> list[Embedding]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in (IMAGE, (90, 50))]
    batch = system(name).preprocess.collate(images)
    return system(name).embed(batch.images, batch.placements)


def mixed(masks: bool = True) -> Prompts:
    """A point; three points; a box; a box of one pixel with a point; nothing; a mask."""
    parts = [
        Prompts.from_points(IMAGE, [(10, 20)]),
        Prompts.from_points(IMAGE, [(10, 20), (30, 40), (70, 5)], [1, 0, 1]),
        Prompts.from_boxes([[5.0, 6, 50, 40]], IMAGE),
        Prompts(IMAGE, torch.tensor([[[9.0, 9]]]), torch.tensor([[1]]), torch.tensor([[9.0, 9, 10, 10]])),
        Prompts.from_points(IMAGE, [[]]),
    ]
    mask = Masks.from_crops([torch.ones(20, 30, dtype=torch.bool)], torch.tensor([[10, 15]]), IMAGE)
    return Prompts.join([*parts, Prompts.from_masks(mask)] if masks else parts)


@NAMES
def test_each_object_has_the_answer_that_it_has_alone(name):
    embedding, prompts = embeddings(name)[0], mixed(system(name).reads_masks)
    together = system(name).segment(embedding, prompts, answers=4)
    assert together.logits.shape[:2] == (len(prompts), 4)
    for number in range(len(prompts)):
        alone = system(name).segment(embedding, prompts[number], answers=4)
        torch.testing.assert_close(alone.logits[0], together.logits[number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.scores[0], together.scores[number], rtol=1e-4, atol=1e-5)


def test_images_of_a_batch_have_the_embedding_that_they_have_alone():
    image = torch.randint(0, 256, (3, 90, 50), dtype=torch.uint8)
    both = system().preprocess.collate([torch.zeros(3, *IMAGE, dtype=torch.uint8), image])
    alone = system().preprocess.collate([image])
    first = system().embed(both.images, both.placements)[1]
    second = system().embed(alone.images, alone.placements)[0]
    torch.testing.assert_close(first.tensors["image"], second.tensors["image"], rtol=1e-4, atol=1e-4)
    assert first.image_size == (90, 50)


def test_answers_are_one_three_or_four_masks():
    embedding, prompts = embeddings()[0], mixed()
    four = system().segment(embedding, prompts, answers=4)
    three = system().segment(embedding, prompts, answers=3)
    one = system().segment(embedding, prompts, answers=1)
    torch.testing.assert_close(three.logits, four.logits[:, 1:])
    torch.testing.assert_close(one.logits, four.logits[:, :1])
    chosen = system().segment(embedding, prompts)
    best = 1 + four.scores[:, 1:].argmax(1)
    expected = torch.where(torch.tensor([True, False, False, False, True, False]), best, 0)
    torch.testing.assert_close(chosen.scores[:, 0], four.scores[torch.arange(6), expected])
    assert len(chosen.best()) == len(chosen.masks) == 6


def test_edge_sam_ranks_by_the_stability_of_logits():
    """As the original's `calculate_stability_score` on low-resolution logits; its generator always does."""
    plane = torch.zeros(2, 4, 4) - 5
    plane[0, :2, :2], plane[0, 2, 2] = 3.0, 0.5  # 4 cells above 1, 5 above -1
    torch.testing.assert_close(stability(plane), torch.tensor([0.8, 0.0]))
    embedding, prompts = embeddings("edge-sam")[0], mixed()
    by_iou, by_stability = system("edge-sam"), build("edge-sam", ranking="stability").eval()
    by_stability.load_state_dict(by_iou.state_dict())
    by_stability.pin_fingerprint(by_iou.fingerprint)
    four = by_stability.segment(embedding, prompts, answers=4)
    torch.testing.assert_close(four.logits, by_iou.segment(embedding, prompts, answers=4).logits)
    torch.testing.assert_close(four.scores, stability(four.logits))
    one = by_stability.segment(embedding, prompts[0])
    assert float(one.scores[0, 0]) == float(four.scores[0, 1:].max())
    features = by_iou.features(embedding)
    logits, scores, _ = by_iou.answers_to_points(
        features, embedding.placement, torch.tensor([[10.0, 20]]), by_iou.everything_options()
    )
    torch.testing.assert_close(scores, stability(logits))
    with pytest.raises(UsageError, match="ranking"):
        build("edge-sam", ranking="area")


def test_a_thousand_prompts_are_decoded_a_few_at_a_time():
    points = torch.rand(1000, 1, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([80.0, 60.0])
    prompts = Prompts.from_points(IMAGE, points)
    counts = []
    hook = system().mask_decoder.register_forward_hook(lambda _, __, out: counts.append(len(out.scores)))
    try:
        found = system().segment(embeddings()[0], prompts, budget=64 << 20)
    finally:
        hook.remove()
    assert sum(counts) == len(found) == 1000
    assert 1 < max(counts) < 1000
    torch.testing.assert_close(
        found.scores[700:703], system().segment(embeddings()[0], prompts[700:703]).scores, rtol=1e-4, atol=1e-5
    )


def test_without_prompts_there_is_no_mask():
    found = system().segment(embeddings()[0], Prompts.empty(IMAGE))
    assert found.logits.shape[:2] == (0, 1)
    assert len(found.masks) == len(found.best()) == 0


def test_threads_share_an_embedding():
    prompts = mixed()
    expected = [system().segment(embeddings()[0], prompts[n]).logits for n in range(6)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: system().segment(embeddings()[0], prompts[n % 6]).logits, range(24)))
    assert all(torch.equal(logits, expected[n % 6]) for n, logits in enumerate(found))


def test_an_embedding_from_a_file_answers_as_the_original(tmp_path):
    path = embeddings()[0].save(tmp_path / "e.safetensors")
    prompts = mixed()
    again = system().segment(Embedding.load(path), prompts)
    torch.testing.assert_close(again.logits, system().segment(embeddings()[0], prompts).logits)


def test_embeddings_of_other_weights_and_prompts_of_other_images_are_refused():
    other = build("sam")
    assert isinstance(other, PromptableSystem)
    with torch.no_grad():
        next(other.image_encoder.parameters()).add_(1)
    with pytest.raises(UsageError, match="embed the image with this system"):
        other.segment(embeddings()[0], mixed())
    with pytest.raises(UsageError, match="the prompts are for an image of"):
        system().segment(embeddings()[1], mixed())
    worded = Prompts(IMAGE, torch.zeros(1, 0, 2), torch.zeros(1, 0).long(), text=("a cat",))
    with pytest.raises(UsageError, match="sam does not read text"):
        system().segment(embeddings()[0], worded)
    images = torch.zeros(1, 3, 128, 128)
    with pytest.raises(UsageError, match=r"must be a batch .* and 2 placements"):
        system().embed(images, [embeddings()[0].placement] * 2)


def test_a_prepared_copy_reads_the_embeddings_of_the_original():
    ready = prepare(system("edge-sam"), "cpu", "bfloat16")
    assert isinstance(ready, PromptableSystem)
    prompts = mixed()
    low = ready.segment(embeddings("edge-sam")[0], prompts)
    high = system("edge-sam").segment(embeddings("edge-sam")[0], prompts)
    assert low.logits.dtype == torch.float32
    assert (low.logits - high.logits).norm() < 0.05 * high.logits.norm()
    assert copy.deepcopy(system("edge-sam")).fingerprint == system("edge-sam").fingerprint


def test_logits_of_an_answer_refine_it():
    embedding = embeddings()[0]
    first = system().segment(embedding, mixed()[:1], answers=1)
    with_mask = Prompts(IMAGE, mixed()[:1].points, mixed()[:1].point_labels, logits=first.logits[:, 0])
    assert not torch.allclose(system().segment(embedding, with_mask, answers=1).logits, first.logits)
    wrong = Prompts(IMAGE, mixed()[:1].points, mixed()[:1].point_labels, logits=first.logits[:, 0, ::2])
    with pytest.raises(UsageError, match="mask logits must be"):
        system().segment(embedding, wrong)
    with pytest.raises(UsageError, match="does not read masks"):
        system("efficient-sam").segment(embeddings("efficient-sam")[0], mixed())


def test_other_sizes_of_the_input_work_with_the_same_weights():
    small = system()
    large = create("sam", **{**small.options, "resize": {"canvas": [192, 192]}}).eval()
    large.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert large(torch.randn(1, 3, 192, 192)).image.shape[-2:] == (12, 12)
    with pytest.raises(UsageError, match=r"resize\.canvas must be a multiple of 16"):
        build("sam", resize={"canvas": [100, 100]})
    with pytest.raises(UsageError, match=r"resize\.canvas must be a square"):
        build("sam", resize={"canvas": [128, 96]})


# ---- everything ------------------------------------------------------------------------------------------------------


def test_crops_of_an_image_are_segmented_by_predict(monkeypatch):
    monkeypatch.setattr(everything, "EDGE", -1.0)  # masks of random weights fill the crops
    image = torch.randint(0, 256, (3, *IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    options = {"score_threshold": 0.0, "stability_score_thresh": 0.0, "points_per_side": 2, "nms_threshold": 1.0}
    whole = predict(system(), image, device="cpu", **options).found()
    crops = predict(system(), image, device="cpu", crop_n_layers=1, crop_nms_thresh=1.0, **options).found()
    assert len(whole) == 12
    assert len(crops) > len(whole)
    batch = system().preprocess.collate([image])
    with torch.no_grad():
        raw = system()(batch.images)
    with pytest.raises(UsageError, match="only predict has"):
        system().decode(raw, batch.placements, crop_n_layers=1)


def test_crops_of_images_with_fewer_pixels_than_crops():
    crops = everything.crop_boxes((2, 3), 2, 512 / 1500)
    assert len(crops) > 5
    assert all(x0 < x1 <= 3 and y0 < y1 <= 2 for _, (x0, y0, x1, y1) in crops)
    with pytest.raises(UsageError, match="points_per_side must be at most 1024"):
        system().everything_options(points_per_side=10**7)


@pytest.mark.parametrize("name", ["points_per_side", "points_per_batch"])
def test_grids_without_points_are_refused(name):
    with pytest.raises(UsageError, match=f"{name} must be at least 1"):
        predict(system(), torch.zeros(3, *IMAGE, dtype=torch.uint8), device="cpu", **{name: 0})


def test_masks_are_refined_by_themselves():
    image = torch.randint(0, 256, (3, *IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    batch = system().preprocess.collate([image])
    with torch.no_grad():
        features = system()(batch.images)
    points = torch.tensor([[10.0, 20], [40, 30]])
    first, _, owner = system().answers(features, batch.placements[0], points, 3, refine=False)
    logits, scores, again = system().answers(features, batch.placements[0], points, 3, refine=True)
    assert owner.tolist() == again.tolist() == [0, 0, 0, 1, 1, 1]
    own = Prompts(IMAGE, points[1:, None], torch.ones(1, 1).long(), logits=first[4:5])
    expected = system().segment(system().embeddings(features, batch.placements)[0], own, answers=1)
    torch.testing.assert_close(logits[4], expected.logits[0, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[4], expected.scores[0, 0], rtol=1e-4, atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------


def test_first_prompts_lie_on_the_object_and_noise_is_bounded():
    target = objects(40)
    with torch.no_grad():
        features = system()(torch.zeros(1, 3, *SIZE))
    examples = prompt_training.drawn(features, [target], 100)
    assert len(examples) == 40
    points, labels, boxed = first_prompts(examples, Simulation(boxes=0.5, most_noise=3.0), SIZE)
    assert 5 < int(boxed.sum()) < 35
    assert labels[boxed].tolist() == [[-2, 2, 3]] * int(boxed.sum())
    assert labels[~boxed].tolist() == [[1, -2, -2]] * int((~boxed).sum())
    x, y = points[:, 0].unbind(1)
    low, high = examples.boxes[:, :2] - 4, examples.boxes[:, 2:] + 4  # cells of four pixels
    assert bool(((x >= low[:, 0]) & (x <= high[:, 0]) & (y >= low[:, 1]) & (y <= high[:, 1])).all())
    assert float((points[:, 1] - examples.boxes[:, :2]).abs().max()) <= 3.0 + 1e-4


def test_corrections_are_points_where_the_answer_is_wrong():
    masks = torch.zeros(3, 8, 8)
    masks[:, 2:6, 2:6] = 1.0
    logits = torch.where(masks > 0, 1.0, -1.0)
    logits[0, 2, 2] = -1.0  # missed
    logits[1, 0, 7] = 1.0  # too much
    points, labels = correction(logits, masks, (32, 32))
    assert labels.tolist() == [1, 0, 1]
    assert (points[:2] / 4).floor().tolist() == [[2, 2], [7, 0]]
    assert bool(((points[2] >= 8) & (points[2] <= 24)).all())


def test_of_three_masks_the_best_is_learned_and_of_a_box_the_first():
    from maskwright.blocks.prompting import Decoded
    from maskwright.systems.kinds.prompt_training import Examples, round_losses

    masks = torch.zeros(2, 4, 4)
    masks[:, :2] = 1.0
    right, wrong = torch.where(masks[0] > 0, 9.0, -9.0), torch.where(masks[0] > 0, -9.0, 9.0)
    logits = torch.stack([torch.stack([wrong, wrong, right, wrong])] * 2).requires_grad_()
    scores = torch.zeros(2, 4)
    examples = Examples(masks, torch.zeros(2, 4), torch.zeros(2).long(), torch.ones(2))
    terms = round_losses(Decoded(logits, scores, scores[..., None]), examples, torch.tensor([True, False]))
    terms[0].backward()
    assert logits.grad is not None
    moved = logits.grad.abs().sum((2, 3)) > 1e-6
    assert moved.tolist() == [[False] * 4, [True, False, False, False]]  # of the point, the right one: no gradient
    assert float(terms[2].detach()) == pytest.approx(1 / 3)  # IoUs 0, 1, 0 for the point; 0 for the box


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_only_updates_of_low_rank_are_trained(name):
    tuned = build(name, lora=4)
    assert isinstance(tuned, PromptableSystem)
    trained = [n for n, p in tuned.image_encoder.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.startswith("lora.") for n in trained)
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    sum(tuned.losses(tuned(images), [objects(2)]).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_weights_load_with_updates_of_low_rank_which_change_nothing_at_first(name, tmp_path):
    mw.save(system(name), tmp_path / "plain.safetensors")
    tuned = mw.load(tmp_path / "plain.safetensors", lora=4).eval()
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(tuned(images).image, system(name)(images).image)
        for parameter in tuned.image_encoder.lora.parameters():  # pyright: ignore[reportAttributeAccessIssue]
            parameter.add_(0.1)
        mw.save(tuned, tmp_path / "tuned.safetensors")
        again = mw.load(tmp_path / "tuned.safetensors").eval()
        torch.testing.assert_close(again(images).image, tuned(images).image)
        assert not torch.allclose(again(images).image, system(name)(images).image)


def saved_bytes(name: str, count: int, *, frozen: bool = True, **simulation: Any) -> int:
    """Bytes that the graph of a training step holds, without the network's own tensors."""
    trained = build(name, simulation={"repeats": 0, **simulation})
    trained.image_encoder.requires_grad_(not frozen)
    own = {t.untyped_storage().data_ptr() for t in (*trained.parameters(), *trained.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        raw = trained(images)
        before = sum(size for size, _ in kept.values())
        assert (before == 0) is frozen
        losses = sum(trained.losses(raw, [objects(count)]).values())
    assert torch.isfinite(torch.as_tensor(losses))
    return sum(size for size, _ in kept.values()) - before


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_what_a_training_step_holds(name):
    """The rule that the documentation states: objects and rounds, unless rounds are computed again."""
    whole = {(n, p): saved_bytes(name, n, points=p, checkpoint=False) for n, p in ((1, 0), (2, 0), (2, 2))}
    assert whole[2, 0] == pytest.approx(2 * whole[1, 0], rel=0.1)  # objects
    assert whole[2, 2] == pytest.approx(3 * whole[2, 0], rel=0.1)  # rounds
    again = saved_bytes(name, 2, points=2, checkpoint=True)
    assert again < 0.1 * whole[2, 0]
    assert saved_bytes(name, 1, frozen=False, points=0, checkpoint=True) < 0.2 * whole[1, 0]


def test_rounds_that_are_computed_again_give_the_same_gradients():
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    grads = []
    for again in (False, True):
        one = build("sam", simulation={"checkpoint": again}, encoder={"checkpoint": again})
        torch.manual_seed(5)
        sum(one.losses(one(images), [objects(3)]).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        grads.append([p.grad for p in one.parameters()])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


# ---- beside transformers ---------------------------------------------------------------------------------------------


def test_sam_answers_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vision = transformers.SamVisionConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=160, window_size=4, patch_size=16,
        global_attn_indexes=[1], mlp_dim=192, output_channels=32, num_pos_feats=16,
    )  # fmt: skip
    prompt = transformers.SamPromptEncoderConfig(hidden_size=32, image_size=160, patch_size=16, image_embedding_size=10)
    decoder = transformers.SamMaskDecoderConfig(hidden_size=32, mlp_dim=64, iou_head_hidden_dim=24)
    torch.manual_seed(0)
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    theirs = transformers.SamModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = mw.load(tmp_path / "model.safetensors").eval()
    assert isinstance(ours, PromptableSystem)
    assert ours.preprocess.canvas == (160, 160)
    pixels = torch.randn(1, 3, 160, 160)
    points = torch.tensor([[[20.0, 30], [100, 90]], [[50.0, 60], [10, 10]]])
    labels = torch.tensor([[1, 0], [1, 1]])
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_points=points[None], input_labels=labels[None])
    placement = mw.structures.Placement.identity((160, 160))
    embedding = ours.embed(pixels, [placement])[0]
    found = ours.segment(embedding, Prompts.from_points((160, 160), points, labels), answers=3)
    torch.testing.assert_close(found.scores, expected.iou_scores[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, expected.pred_masks[0], rtol=1e-3, atol=1e-3)


def test_prompts_are_drawn_as_masks_and_kept_masks_are_not_drawn_over():
    from maskwright.blocks.prompting import draw_prompts

    points = torch.tensor([[[0.25, 0.25], [0.75, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[2, 3, 0], [1, -2, -1]])
    drawn = draw_prompts(points, labels, (16, 16))[:, 0]
    assert float(drawn[0, 5, 7]) == pytest.approx(3 * (1 - (1 / 8) ** 2 - (1 / 4) ** 2))  # the box is 4 ... 12, 4 ... 8
    assert float(drawn[0, 4, 7]) > 0 > float(drawn[0, 4, 4]), "outside of the ellipse"
    assert float(drawn[0, 0, 0]) == -6
    assert float(drawn[0, 8, 8]) == -8
    assert float(drawn[1, 8, 8]) == 8
    assert float(drawn[1, 0, 0]) == 0
    logits = torch.ones(2, 1, 16, 16)
    kept = draw_prompts(points, labels, (16, 16), logits, torch.tensor([True, False]))[:, 0]
    assert float(kept[0, 0, 0]) == 1
    assert float(kept[0, 8, 8]) == -8
    assert torch.equal(kept[1], drawn[1])


def test_a_decoder_that_refines_starts_from_the_drawn_prompt():
    from maskwright.blocks.prompting import MaskDecoder, PromptEncoder, draw_prompts

    decoder, encoder = MaskDecoder(32, 1, 2, 32, refine=1), PromptEncoder(32)
    for network in decoder.kernels:
        last = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)][-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    points, labels = torch.tensor([[[0.2, 0.2], [0.9, 0.7]]]), torch.tensor([[2, 3]])
    drawn = draw_prompts(points, labels, (16, 16))
    with torch.no_grad():
        decoded = decoder(torch.randn(1, 32, 4, 4), encoder(points, labels, (4, 4), drawn))
    torch.testing.assert_close(decoded.logits, drawn.expand(-1, 4, -1, -1))
    with pytest.raises(UsageError, match="drawn=True"):
        mw.create("sam-small", drawn=False)


def test_inputs_that_were_not_preprocessed_and_budgets_of_no_bytes_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which otherwise reports it first
    system = build("sam").eval()
    placement = mw.structures.Placement.identity((64, 64))
    with pytest.raises(UsageError, match=r"must be preprocessed, in floating point, got torch\.uint8"):
        system.embed(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [placement])
    with pytest.raises(UsageError, match="placement 0 puts the image on 64 x 64 pixels, but the input has 32 x 64"):
        system.embed(torch.zeros(1, 3, 32, 64), [placement])
    embedding = system.embed(torch.zeros(1, 3, 64, 64), [placement])[0]
    prompts = Prompts.from_points((64, 64), torch.tensor([[[5.0, 5.0]]]))
    for budget in (None, "x", 0):
        with pytest.raises(UsageError, match="budget must be a number of bytes"):
            system.segment(embedding, prompts, budget=budget)


def test_the_local_loss_is_the_mean_entropy_near_the_object_plus_that_elsewhere():
    from maskwright.systems.kinds.prompt_training import Examples, local_entropy

    masks = torch.zeros(1, 16, 16)
    masks[0, 4:8, 6:10] = 1
    examples = Examples(masks, torch.tensor([[24.0, 16.0, 40.0, 32.0]]), torch.zeros(1).long(), torch.ones(1))
    near = examples.near()
    assert near[0].nonzero().amin(0).tolist() == [2, 4]
    assert near[0].nonzero().amax(0).tolist() == [9, 11]
    logits = torch.randn(1, 3, 16, 16)
    entropy = functional.binary_cross_entropy_with_logits(logits, masks[:, None].expand_as(logits), reduction="none")
    expected = entropy[:, :, 2:10, 4:12].mean((2, 3)) + entropy[:, :, ~near[0]].mean(2)
    torch.testing.assert_close(local_entropy(logits, masks[:, None].expand_as(logits), near), expected)


def test_group_normalisation_makes_an_image_independent_of_its_batch():
    system = mw.create("sam-small").train()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(system(images).image[:1], system(images[:1]).image, rtol=1e-4, atol=1e-5)


def test_interpolation_by_cubic_weights_is_that_of_torch():
    from maskwright.ops.interpolation import cubic_weights

    values = torch.randn(1, 1, 7, 9)
    expected = functional.interpolate(values, (20, 33), mode="bicubic", align_corners=False)[0, 0]
    down = cubic_weights((torch.arange(20) + 0.5) * 7 / 20 - 0.5, 7)
    across = cubic_weights((torch.arange(33) + 0.5) * 9 / 33 - 0.5, 9)
    torch.testing.assert_close(down @ values[0, 0] @ across.T, expected, rtol=1e-4, atol=1e-5)
