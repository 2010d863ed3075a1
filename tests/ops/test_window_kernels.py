"""The Triton kernel of swap_align2nat agrees with PyTorch: in Triton's interpreter, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.ops.window_tensors import MaskTensor, swap_align2nat

INTERPRETED = """
import torch
from maskwright.ops.window_tensors import MaskTensor, swap_align2nat

torch.manual_seed(0)
cases = [  # shape, factor, step, mode, pad, kind
    ((2, 2, 3, 5, 6), 2, 1.0, "bilinear", -6.0, torch.float32),
    ((1, 2, 2, 5, 3), 1.5, 1.0, "nearest", 0.0, torch.float32),
    ((1, 2, 3, 2, 140), 1, 1.5, "bilinear", -6.0, torch.bfloat16),
    ((1, 3, 3, 9, 17), 4, 1.0, "bilinear", 0.0, torch.float32),
    ((1, 2, 2, 3, 8200), 1, 1.0, "bilinear", -6.0, torch.float32),  # too wide for the kernel
]
for shape, factor, step, mode, pad, kind in cases:
    values = [torch.randn(shape).to(kind).requires_grad_() for _ in range(2)]
    values[1].data.copy_(values[0].data)
    plain, fused = (
        swap_align2nat(MaskTensor(v, True, 1.0, step), factor, pad, mode, fused=f).values
        for v, f in zip(values, (False, True))
    )
    close = dict(rtol=1e-5, atol=1e-5) if kind == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    assert plain.dtype == fused.dtype and plain.shape == fused.shape
    torch.testing.assert_close(fused, plain, **close)
    weight = torch.randn(plain.shape).to(kind)
    for result in (plain, fused):
        (result * weight).sum().backward()
    torch.testing.assert_close(values[1].grad, values[0].grad, **close)
empty = swap_align2nat(MaskTensor(torch.randn(0, 3, 3, 4, 4), True), 2, fused=True).values
assert empty.shape == (0, 6, 6, 2, 2)
print("agreed")
"""


def test_the_kernel_agrees_forward_and_backward():
    if find_spec("triton") is None:
        pytest.skip("Triton, which is part of torch's CUDA builds, is not installed")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "agreed", done.stderr[-3000:]


@pytest.mark.fast
def test_triton_is_not_used_by_default_and_reported_if_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "maskwright.ops.window_kernels", raising=False)
    tensor = MaskTensor(torch.randn(1, 3, 3, 4, 4), True)
    assert swap_align2nat(tensor, 2).values.shape == (1, 6, 6, 2, 2)
    with pytest.raises(UsageError, match="fused=True requires Triton"):
        swap_align2nat(tensor, 2, fused=True)


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from maskwright.ops import window_kernels as kernels

kernel = kernels._lines
for taps, width in ((4, 8192), (7, 256)):
    fixed = {"ROWS": taps, "COLUMNS": taps, "READ": width, "WRITTEN": width}
    kinds = {"values": "*bf16", "result": "*bf16", "pad": "fp32"}
    signature = {}
    for name in kernel.arg_names:
        known = "constexpr" if name in fixed else kinds.get(name)
        signature[name] = known or ("*i32" if "index" in name else "*fp32" if "weight" in name else "i32")
    assert triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 80, 32)).asm["cubin"]
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu():
    if find_spec("triton") is None:
        pytest.skip("Triton, which is part of torch's CUDA builds, is not installed")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
