"""Inputs of the layer's tests by name, as :func:`stablelora_kernels.testing.make_inputs` makes them.

The weight may be quantized. A ``base_out`` in place of it makes them the inputs of ``lora_branch``.
"""

from __future__ import annotations

from typing import Any

import torch

from stablelora_kernels import testing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SCALING = 1.7
# Of x and the weight, and of A and B.
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)]
# x's shape, out_features, r: odd, prime, single, empty, and above one tile or one block of ranks.
SHAPES = [
    ((1, 1), 1, 1),
    ((37,), 5, 3),
    ((1, 64), 48, 64),
    ((5, 37), 53, 3),
    ((2, 3, 31), 17, 20),
    ((0, 16), 8, 4),
    ((3, 0, 16), 8, 4),
    ((130, 67), 71, 8),
    ((67, 33), 40, 100),
]
Inputs = dict[str, Any]


def make_inputs(shape: tuple[int, ...], n: int, r: int, **options: Any) -> Inputs:
    return testing.make_inputs(shape, n, r, device=DEVICE, **options)


def make_branch_inputs(shape: tuple[int, ...], n: int, r: int, *dtypes: torch.dtype, **options: Any) -> Inputs:
    """Inputs of ``lora_branch``, with a base_out in place of weight and bias. ``dtypes``: of x, of A and B, of base_out."""
    dtype, lora_dtype, base_dtype = dtypes or (FP32, FP32, FP32)
    inputs = make_inputs(shape, n, r, dtype=dtype, lora_dtype=lora_dtype, bias=False, **options)
    base = torch.nn.functional.linear(inputs["x"].double(), inputs.pop("weight").double()).to(base_dtype)
    del inputs["bias"]
    return inputs | {"base_out": base, "grad": inputs["grad"].to(base_dtype)}
