"""LoRA: low-rank updates of frozen linear layers (Hu et al., ICLR 2022, arXiv 2106.09685)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LowRank(nn.Module):
    """A linear map of low rank, zero at first.

    Args:
        before: Input channels.
        after: Output channels.
        rank: Its rank. The map is multiplied by 1 / rank.
    """

    def __init__(self, before: int, after: int, rank: int):
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(before, rank, bias=False)
        self.up = nn.Linear(rank, after, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n d"]:
        """Returns the update."""
        return self.up(self.down(x)) / self.rank


class AdaptedLinear(nn.Linear):
    """A linear layer with an update that belongs to another module, so that the names of its parameters stay the same.

    Args:
        layer: The layer; its parameters are used.
        update: The update.
    """

    def __init__(self, layer: nn.Linear, update: LowRank):
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.__dict__["update"] = update  # not a submodule: it is registered where its parameters are

    def forward(self, input: Float[Tensor, "*n c"]) -> Float[Tensor, "*n d"]:
        """Returns the output of the layer with its update added."""
        return super().forward(input) + self.__dict__["update"](input)


def adapt(network: nn.Module, rank: int, name: str = "qkv") -> None:
    """Freezes a network and gives each of its linear layers called `name` an update of low rank, in place.

    Args:
        network: The network. Its new submodule `lora` has the updates, the only parameters that are trained.
        rank: Rank of the updates.
        name: Name of the layers.
    """
    network.requires_grad_(False)
    updates = list[LowRank]()
    for module in list(network.modules()):
        layer = getattr(module, name, None)
        if isinstance(layer, nn.Linear):
            updates.append(LowRank(layer.in_features, layer.out_features, rank))
            setattr(module, name, AdaptedLinear(layer, updates[-1]))
    network.lora = nn.ModuleList(updates)
