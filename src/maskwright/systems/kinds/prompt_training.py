"""Training a promptable system on masks: prompts are simulated, and answers corrected (arXiv 2304.02643, appendix A).

An object is first prompted by a random point of it or by its noisy box. Then follow points in the region where the
answer is wrong, each together with the logits of the answer before, and rounds with these logits alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType] - not typed

from maskwright.blocks.prompting import ABSENT, BACKGROUND, FIRST_CORNER, FOREGROUND, LAST_CORNER, NOTHING, Decoded
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.options import OptionGroup
from maskwright.structures import Instances

if TYPE_CHECKING:
    from maskwright.systems.kinds.promptable import Features, PromptableSystem


@dataclass(frozen=True)
class Simulation(OptionGroup):
    """How prompts are simulated in training, and the loss, as options of a system.

    Attributes:
        objects: Objects of an image that take part, drawn at random.
        points: Points in the region where the answer is wrong, after the first prompt.
        repeats: Rounds without a new point: one after the first of these points, the others at the end.
        boxes: Share of the objects that are first prompted by a box, the others by a point.
        noise: Standard deviation of the noise of a box's corners, as a share of its sides.
        most_noise: Limit of the noise, in pixels of the input.
        weights: Weights of the focal loss, the dice loss and the error of the predicted IoU.
        local: Whether the mask loss is, in place of the focal loss, the mean cross-entropy in the object's box at twice
            its size plus the mean outside of it (not published). Small objects then count as much as large ones.
        checkpoint: Compute each round again for the gradients, so that memory does not grow with the rounds.
    """

    label: ClassVar[str] = "simulation"

    objects: int = 16
    points: int = 8
    repeats: int = 2
    boxes: float = 0.5
    noise: float = 0.1
    most_noise: float = 20.0
    weights: Sequence[float] = (20.0, 1.0, 1.0)
    local: bool = False
    checkpoint: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "objects")
        self.check_at_least(0, "points", "repeats", "noise", "most_noise")
        if not 0 <= self.boxes <= 1:
            raise UsageError(f"simulation.boxes must be between 0 and 1, got {self.boxes}")
        if len(self.weights) != 3 or not all(0 <= v < float("inf") for v in self.weights):
            raise UsageError(
                f"simulation.weights must be 3 numbers of at least 0 (focal, dice, IoU), got {list(self.weights)}"
            )


@dataclass(frozen=True)
class Examples:
    """N objects of a batch to be segmented.

    Attributes:
        masks: The share of each cell of the low-resolution grid that an object covers.
        boxes: x0, y0, x1, y1 in pixels of the input.
        owner: The image of each object.
        weight: 1, or 0 for the stand-in of a batch without objects.
        cell: Width and height of a cell of the grid in pixels of the input.
    """

    masks: Float[Tensor, "n h w"]
    boxes: Float[Tensor, "n 4"]
    owner: Int[Tensor, " n"]
    weight: Float[Tensor, " n"]
    cell: Float[Tensor, 2] = field(default_factory=lambda: torch.full((2,), 4.0))

    def __len__(self) -> int:
        return len(self.owner)

    def near(self) -> Bool[Tensor, "n h w"]:
        """The cells whose centres lie in the box of each object at twice its size, and at least two cells around it."""
        _, height, width = self.masks.shape
        low, high = self.boxes[:, :2] / self.cell, self.boxes[:, 2:] / self.cell
        margin = ((high - low) / 2).clamp(min=2)
        (x0, y0), (x1, y1) = ((v[:, None] for v in corner.unbind(1)) for corner in (low - margin, high + margin))
        columns, rows = (torch.arange(n, device=self.boxes.device) + 0.5 for n in (width, height))
        across, down = (columns > x0) & (columns < x1), (rows > y0) & (rows < y1)
        return down[:, :, None] & across[:, None]


def losses(
    system: PromptableSystem, features: Features, targets: Sequence[Instances], rules: Simulation
) -> dict[str, Tensor]:
    """Computes the losses of all rounds.

    Args:
        system: The system.
        features: The features of the images.
        targets: Objects of each image in the frame of the input; crowd regions are ignored.
        rules: How prompts are simulated.

    Returns:
        `mask` (focal loss), `dice` and `iou` (squared error of the predicted IoU), each the mean over objects and
        rounds, times its weight. For the first prompt, if it is a point, only the best of the three masks counts.
    """
    examples = drawn(features, targets, rules.objects)
    own = features[examples.owner]
    size = features.size
    points, labels, boxed = first_prompts(examples, rules, size)
    logits = torch.zeros_like(examples.masks)
    known = torch.zeros(len(examples), dtype=torch.bool, device=logits.device)
    count = global_mean_count(examples.weight.sum()[None], minimum=1.0)[0]
    total = logits.new_zeros(3)
    rounds = schedule(rules)
    for number, kind in enumerate(rounds):
        if kind == "point":
            place, label = correction(logits, examples.masks, size)
            points = torch.cat([points, place[:, None]], 1)
            labels = torch.cat([labels, label[:, None]], 1)
        prompts, ambiguous = (points, labels, logits, known), ~boxed & (number == 0)
        terms, logits = _round(system, own, prompts, examples, ambiguous, rules)
        total, known = total + terms, torch.ones_like(known)
    terms = total / count / len(rounds) * total.new_tensor(rules.weights)
    idle = sum((level.float().sum() for level in (features.image, *features.finer)), total.new_zeros(())) * 0
    return {"mask": terms[0] + idle, "dice": terms[1], "iou": terms[2]}


def _round(
    system: PromptableSystem, features: Features, prompts: tuple[Tensor, ...], examples: Examples,
    ambiguous: Bool[Tensor, " n"], rules: Simulation,
) -> tuple[Float[Tensor, 3], Float[Tensor, "n h w"]]:  # fmt: skip
    """The losses of one round, see `round_losses`, and the logits that the next round corrects."""

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        decoded = answer(system, features, *inputs)
        scores = decoded.scores.detach()
        best = torch.where(ambiguous, 1 + scores[:, 1:].argmax(1), 0)  # the answer that a user would see
        rows = torch.arange(len(best), device=best.device)
        return round_losses(decoded, examples, ambiguous, local=rules.local), decoded.logits[
            rows, best
        ].detach().float()

    if rules.checkpoint and torch.is_grad_enabled():
        return checkpoint(run, *prompts, use_reentrant=False)
    return run(*prompts)


def schedule(rules: Simulation) -> list[str]:
    """What each round adds: "first", "point" or "nothing"."""
    points = ["point"] * rules.points
    if rules.repeats and points:
        points.insert(1, "nothing")
    return ["first", *points, *["nothing"] * (rules.repeats - 1 if rules.points else rules.repeats)]


def answer(
    system: PromptableSystem, features: Features, points: Tensor, labels: Tensor, logits: Tensor, known: Tensor
) -> Decoded:
    """Runs prompt encoder and mask decoder for one round.

    Args:
        system: The system.
        features: The features of the image of each object.
        points: (N, T, 2), pixels of the input.
        labels: (N, T), what each slot holds.
        logits: (N, h, w), logits of the answer before.
        known: (N,), whether there was one.
    """
    from maskwright.systems.kinds.promptable import Slots

    counts = ((labels == FOREGROUND) | (labels == BACKGROUND)).sum(1)
    fill = system.padding(counts, (labels == FIRST_CORNER).any(1))
    most = system.most_padding
    extra = torch.where(torch.arange(most, device=labels.device) < fill[:, None], NOTHING, ABSENT)
    labels = torch.cat([labels, extra], 1)
    height, width = features.size
    points = torch.cat([points, points.new_full((len(points), most, 2), -1.0)], 1)
    place = (points + 0.5) / points.new_tensor([width, height])
    return system.answer(features, Slots(place, labels, logits[:, None], known, ragged=True))


# ---- examples and prompts --------------------------------------------------------------------------------------------


def drawn(features: Features, targets: Sequence[Instances], most: int) -> Examples:
    """Draws at most `most` objects of each image. A batch without objects has one of weight 0."""
    device = features.image.device
    grid = (4 * features.image.shape[-2], 4 * features.image.shape[-1])
    cell = torch.tensor([features.size[1] / grid[1], features.size[0] / grid[0]], device=device)
    masks, boxes, owner = list[Tensor](), list[Tensor](), list[int]()
    for index, target in enumerate(targets):
        if target.crowd is not None:
            target = target[~target.crowd]
        if len(target) > most:
            target = target[torch.randperm(len(target))[:most]]
        if not len(target) or target.masks is None:
            continue
        planes = target.masks.dense(device).float()
        room = (0, features.size[1] - planes.shape[2], 0, features.size[0] - planes.shape[1])
        masks.append(functional.adaptive_avg_pool2d(functional.pad(planes, room)[:, None], grid)[:, 0])
        boxes.append(target.boxes.to(device))
        owner += [index] * len(target)
    if not owner:
        return Examples(
            torch.zeros(1, *grid, device=device), torch.zeros(1, 4, device=device),
            torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device), cell,
        )  # fmt: skip
    joined = torch.cat(masks)
    weight = (joined.flatten(1).amax(1) > 0).float()  # an object may lie outside of an augmented image
    return Examples(joined, torch.cat(boxes).float(), torch.tensor(owner, device=device), weight, cell)


def first_prompts(
    examples: Examples, rules: Simulation, size: tuple[int, int]
) -> tuple[Float[Tensor, "n 3 2"], Int[Tensor, "n 3"], Bool[Tensor, " n"]]:
    """Draws the first prompt of each object: a point of it, or its box with noise.

    Returns:
        Places and labels of three slots, a point and two corners, of which either is absent; and which objects have a
        box.
    """
    count, device = len(examples), examples.masks.device
    boxed = torch.rand(count, 1, device=device)[:, 0] < rules.boxes
    point = random_cell(_inside(examples.masks), size)
    sides = (examples.boxes[:, 2:] - examples.boxes[:, :2]).repeat(1, 2)
    noise = (_normal(count, device) * rules.noise * sides).clamp(-rules.most_noise, rules.most_noise)
    limit = sides.new_tensor([size[1], size[0]]).repeat(2)
    corners = (examples.boxes + noise).clamp(min=0).minimum(limit)
    low, high = torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])
    points = torch.stack([point, low, high], 1)
    kinds = torch.tensor([[FOREGROUND, ABSENT, ABSENT], [ABSENT, FIRST_CORNER, LAST_CORNER]], device=device)
    return points, kinds[boxed.long()], boxed


def _normal(count: int, device: torch.device) -> Float[Tensor, "{count} 4"]:
    """Normally distributed numbers, from uniform ones."""
    uniform = torch.rand(count, 4, device=device).clamp(1e-6, 1 - 1e-6)
    return torch.special.ndtri(uniform)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def correction(
    logits: Float[Tensor, "n h w"], masks: Float[Tensor, "n h w"], size: tuple[int, int]
) -> tuple[Float[Tensor, "n 2"], Int[Tensor, " n"]]:
    """Draws a point in the region where each answer is wrong; where none is, a point of the object.

    Args:
        logits: The answers.
        masks: The objects, as shares of cells.
        size: Height and width of the input.

    Returns:
        Places in pixels of the input, and labels.
    """
    inside = _inside(masks)
    wrong = (logits > 0) != inside
    region = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, inside)
    cells = _draw(region)
    label = torch.where(inside.flatten(1).gather(1, cells[:, None])[:, 0], FOREGROUND, BACKGROUND)
    return _spread(cells, (region.shape[1], region.shape[2]), size), label


def random_cell(region: Bool[Tensor, "n h w"], size: tuple[int, int]) -> Float[Tensor, "n 2"]:
    """Draws a point x, y, in pixels of the input of `size` (h, w), in a random cell of each region."""
    return _spread(_draw(region), (region.shape[1], region.shape[2]), size)


def _draw(region: Bool[Tensor, "n h w"]) -> Int[Tensor, " n"]:
    """The number of a random cell of each region; the first cell of all if it is empty."""
    flat = region.flatten(1)
    return (torch.rand(*flat.shape, device=flat.device).clamp(min=1e-9) * flat).argmax(1)


def _spread(cells: Int[Tensor, " n"], grid: tuple[int, int], size: tuple[int, int]) -> Float[Tensor, "n 2"]:
    """Random places in cells of a grid over an input of `size`."""
    corner = torch.stack([cells % grid[1], cells.div(grid[1], rounding_mode="floor")], 1)
    unit = torch.tensor([size[1] / grid[1], size[0] / grid[0]], device=cells.device)
    return (corner + torch.rand(len(cells), 2, device=cells.device)) * unit


def _inside(masks: Float[Tensor, "n h w"]) -> Bool[Tensor, "n h w"]:
    """The cells that belong to each object: at least half covered, or, for small objects, as much as any."""
    most = masks.flatten(1).amax(1)[:, None, None]
    return masks >= most.clamp(min=1e-6, max=0.5)


# ---- losses ----------------------------------------------------------------------------------------------------------


def round_losses(
    decoded: Decoded, examples: Examples, ambiguous: Bool[Tensor, " n"], *, local: bool = False
) -> Float[Tensor, 3]:
    """Mask loss, dice loss and error of the predicted IoU of one round, summed over objects.

    Args:
        decoded: The answers.
        examples: The objects.
        ambiguous: Objects of which the best of the answers after the first counts; of the others, the first does.
        local: See `Simulation`.
    """
    with torch.autocast(decoded.logits.device.type, enabled=False):
        logits, scores = decoded.logits.float(), decoded.scores.float()
        masks = examples.masks[:, None].expand_as(logits)
        focal = local_entropy(logits, masks, examples.near()) if local else soft_focal(logits, masks)
        dice = dice_loss(logits, masks)
        inside, found = _inside(examples.masks)[:, None], logits.detach() > 0
        both, either = (part.flatten(2).sum(2).float() for part in (inside & found, inside | found))
        error = (scores - both / either.clamp(min=1)).square()
        cost = ((1 if local else 20) * focal + dice).detach()
        best = 1 + cost[:, 1:].argmin(1) if logits.shape[1] > 1 else torch.zeros_like(examples.owner)
        chosen = torch.where(ambiguous, best, 0)
        rows = torch.arange(len(chosen), device=chosen.device)
        later = torch.arange(logits.shape[1], device=chosen.device) > 0
        judged = torch.where(ambiguous[:, None], later, ~later)  # (n, k): whose IoU is learned
        error = (error * judged).sum(1) / judged.sum(1)
        terms = torch.stack([focal[rows, chosen], dice[rows, chosen], error])
        # Every answer has a gradient, zero if it does not count.
        return (terms * examples.weight).sum(1) + 0 * (logits.sum() + scores.sum())


def soft_focal(
    logits: Float[Tensor, "n k h w"], target: Float[Tensor, "n k h w"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "n k"]:
    """Mean focal loss of each mask, for targets between 0 and 1: the mean of the losses for 1 and 0."""
    probability = logits.sigmoid()
    ones = alpha * (1 - probability).pow(gamma) * functional.softplus(-logits)
    zeros = (1 - alpha) * probability.pow(gamma) * functional.softplus(logits)
    return (target * ones + (1 - target) * zeros).flatten(2).mean(2)


def local_entropy(
    logits: Float[Tensor, "n k h w"], target: Float[Tensor, "n k h w"], near: Bool[Tensor, "n h w"]
) -> Float[Tensor, "n k"]:
    """Mean cross-entropy of each mask in a region, plus that outside of the region."""
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inside = near[:, None].float()
    parts = [(entropy * part).flatten(2).sum(2) / part.flatten(2).sum(2).clamp(min=1) for part in (inside, 1 - inside)]
    return parts[0] + parts[1]


def dice_loss(logits: Float[Tensor, "n k h w"], target: Float[Tensor, "n k h w"]) -> Float[Tensor, "n k"]:
    """1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) of each mask."""
    probability = logits.sigmoid().flatten(2)
    target = target.flatten(2)
    both = (probability * target).sum(2)
    return 1 - (2 * both + 1) / (probability.sum(2) + target.sum(2) + 1)
