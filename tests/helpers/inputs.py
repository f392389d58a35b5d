"""Inputs of ``lora_linear`` and ``lora_branch`` by name. New tests describe calls as :class:`tests.helpers.cases.Case`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from stablelora_kernels import testing
from tests.helpers.cases import BF16, DEVICE, DTYPES, FP16, FP32

__all__ = ["BF16", "DEVICE", "DTYPES", "FP16", "FP32", "SCALING", "Inputs", "make_branch_inputs", "make_inputs"]
SCALING = 1.7
Inputs = dict[str, Any]
make_inputs = partial(testing.make_inputs, device=DEVICE)


def make_branch_inputs(shape: tuple[int, ...], n: int, r: int, *dtypes: torch.dtype, **options: Any) -> Inputs:
    """``dtypes``: of x, of A and B, of base_out."""
    dtype, lora_dtype, base_dtype = dtypes or (FP32, FP32, FP32)
    inputs = make_inputs(shape, n, r, dtype=dtype, lora_dtype=lora_dtype, bias=False, **options)
    base = torch.nn.functional.linear(inputs["x"].double(), inputs.pop("weight").double()).to(base_dtype)
    del inputs["bias"]
    return inputs | {"base_out": base, "grad": inputs["grad"].to(base_dtype)}
