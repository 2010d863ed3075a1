"""What fine-tuning of promptable systems holds in memory: the tensors that are kept for the gradients.

    python benchmarks/finetuning.py                                  # SAM, SAM 2 and their relatives, at 1024 x 1024
    python benchmarks/finetuning.py sam-vit-b --size 512 --lora 4

Nothing is computed: the networks run on tensors without values, whose storages are counted when autograd saves them.
Printed are, in GB, what the image encoder keeps for each image (trained as a whole, by updates of low rank, and with
blocks computed again), and in MB what a round of prompts keeps for each object, all in float32. A training step also
needs the weights (4 bytes for each parameter), gradients and AdamW (12 for each trained one), and temporary tensors,
about a fifth of what is kept.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from maskwright.errors import UsageError
from maskwright.systems import describe
from maskwright.systems.kinds.prompt_training import Examples, answer, round_losses
from maskwright.systems.kinds.promptable import Features, PromptableSystem
from maskwright.systems.sam2 import SAM2, answer_losses

PRESETS = (
    "sam-vit-b", "sam-vit-l", "sam-vit-h", "mobile-sam-vit-t", "efficient-sam-vit-t", "efficient-sam-vit-s",
    "edge-sam-m1", "sam2.1-hiera-tiny", "sam2.1-hiera-small", "sam2.1-hiera-base-plus", "sam2.1-hiera-large",
)  # fmt: skip


def built(preset: str, size: int, **options: Any) -> PromptableSystem | None:
    """A system whose tensors have no values; None if it does not have the options."""
    try:
        system = describe(preset, resize={"canvas": [size, size]}, **options)
    except UsageError:
        return None
    assert isinstance(system, PromptableSystem)
    for module in system.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(value.shape), value.requires_grad))
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype))
    return system.train()


@contextlib.contextmanager
def kept(system: PromptableSystem) -> Generator[dict[int, int]]:
    """Bytes of each storage that autograd saves, apart from the system's own."""
    own = {t.untyped_storage()._cdata for t in (*system.parameters(), *system.buffers())}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def of_encoder(preset: str, size: int, **options: Any) -> str:
    """GB that the image encoder keeps for an image."""
    with FakeTensorMode():
        system = built(preset, size, **options)
        if system is None:
            return "-"
        with kept(system) as found:
            system.image_encoder(torch.empty(1, 3, size, size))
    return f"{sum(found.values()) / 1e9:.2f}"


def of_round(preset: str, size: int) -> str:
    """MB that a round of prompts keeps for an object."""
    with FakeTensorMode():
        system = built(preset, size)
        assert system is not None
        with torch.no_grad():
            raw = system(torch.empty(1, 3, size, size))
        features = Features(raw.image.requires_grad_(), tuple(v.requires_grad_() for v in raw.finer), raw.size)
        height, width = (4 * side for side in raw.image.shape[-2:])
        points, labels = torch.rand(1, 8, 2), torch.ones(1, 8, dtype=torch.int64)
        ambiguous = torch.zeros(1, dtype=torch.bool)
        with kept(system) as found:
            decoded = answer(system, features, points, labels, torch.zeros(1, height, width), ~ambiguous)
            if isinstance(system, SAM2):
                wide = functional.interpolate(decoded.logits, size=(size, size), mode="bilinear")
                planes = torch.empty(1, size, size)
                answer_losses(wide, decoded.scores, decoded.present, planes, ambiguous, system.loss)
            else:
                masks = torch.empty(1, height, width)
                examples = Examples(masks, torch.empty(1, 4), torch.zeros(1, dtype=torch.int64), torch.ones(1))
                round_losses(decoded, examples, ambiguous)
    return f"{sum(found.values()) / 1e6:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help=f"default: {' '.join(PRESETS)}")
    parser.add_argument("--size", type=int, default=1024, help="side of the input")
    parser.add_argument("--lora", type=int, default=8, help="rank of the updates")
    arguments = parser.parse_args()
    size, again = arguments.size, {"checkpoint": True}
    print(f"{'':22} {'everything':>10} {'LoRA':>8} {'again':>8} {'LoRA, again':>12} {'round':>8}")
    for preset in arguments.presets or PRESETS:
        columns = (
            of_encoder(preset, size), of_encoder(preset, size, lora=arguments.lora),
            of_encoder(preset, size, encoder=again), of_encoder(preset, size, lora=arguments.lora, encoder=again),
            of_round(preset, size),
        )  # fmt: skip
        print(
            f"{preset:22} {columns[0]:>10} {columns[1]:>8} {columns[2]:>8} {columns[3]:>12} {columns[4]:>8}", flush=True
        )


if __name__ == "__main__":
    main()
