"""The interpreter as the tests have it, where it computes something in another way than Triton's."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.inputs import BF16, DEVICE, FP32

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import triton
import triton.language as tl


@triton.jit
def _to_float32_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index).to(tl.float32))


def test_every_bfloat16_becomes_its_float32():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16).to(DEVICE)
    out = torch.empty(2**16, dtype=FP32, device=DEVICE)
    _to_float32_kernel[(1,)](every, out, BLOCK=2**16)
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)
