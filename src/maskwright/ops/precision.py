"""What devices compute fast."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16; without, computing in it is slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    flags = torch.cpu.get_capabilities()
    return any(flags.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
