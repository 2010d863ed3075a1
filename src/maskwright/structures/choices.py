"""What a promptable system answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.structures.instances import Instances
from maskwright.structures.masks import Masks


@dataclass(frozen=True, eq=False)
class Choices:
    """M answers to each of N prompts.

    `masks` and `best` resize logits to the image when they are called, so that answers that are not looked at cost
    nothing.

    Attributes:
        image_size: H, W of the image.
        logits: (N, M, h, w), mask logits on the network's low-resolution grid. They can be given back as
            `Prompts.logits` to refine an answer.
        scores: (N, M), the predicted quality of each answer: its IoU with the object, which may exceed 1.
        place: Converts logits (K, h, w) to masks on the image's grid.
        present: (N,), logits of the prediction that there is an object; None for systems that do not predict it.
        tokens: (N, M, C), the decoder's output token of each answer; None for systems that do not use them.
    """

    image_size: tuple[int, int]
    logits: Float[Tensor, "n m h w"]
    scores: Float[Tensor, "n m"]
    place: Callable[[Tensor], Masks] = field(repr=False)
    present: Float[Tensor, " n"] | None = None
    tokens: Float[Tensor, "n m c"] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """Return a line with shapes in place of logits."""
        height, width = self.image_size
        scores = "" if self.scores.numel() > 12 else f", scores {self._rounded()}"
        return (
            f"Choices({len(self)} prompts, {self.scores.shape[1]} answers each, logits {tuple(self.logits.shape[2:])}, "
            f"image {height} x {width}{scores})"
        )

    def _rounded(self) -> list[list[float]]:
        """The scores as lists."""
        values = cast("list[list[float]]", self.scores.detach().float().cpu().tolist())  # pyright: ignore[reportUnknownMemberType] - not typed
        return [[round(value, 3) for value in row] for row in values]

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.scores)

    @cached_property
    def masks(self) -> Masks:
        """The N * M masks on the image's grid: answer m to prompt n is mask n * M + m."""
        return self.place(self.logits.flatten(0, 1))

    def choose(self, index: Int[Tensor, " n"]) -> Choices:
        """Return one answer to each prompt.

        Args:
            index: The answer to take for each prompt, 0 ... M - 1.

        Returns:
            Choices with M = 1.
        """
        rows = torch.arange(len(self), device=self.scores.device)
        index = index.to(self.scores.device)
        return replace(
            self,
            logits=self.logits[rows, index][:, None],
            scores=self.scores[rows, index][:, None],
            tokens=None if self.tokens is None else self.tokens[rows, index][:, None],
        )

    def best(self) -> Instances:
        """Return the answer with the best score to each prompt, on the host.

        Returns:
            N objects in the order of the prompts, all with label 0. Boxes are the tightest of the masks; an empty mask
            has the box 0, 0, 0, 0.
        """
        one = self if self.scores.shape[1] == 1 else self.choose(self.scores.argmax(1))
        masks = one.masks.pack()
        count = len(one)
        return Instances(
            self.image_size, masks.boxes(), torch.zeros(count, dtype=torch.int64), masks, one.scores[:, 0].float().cpu()
        )
