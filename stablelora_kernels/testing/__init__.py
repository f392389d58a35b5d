"""Helpers for tests and benchmarks: inputs, the bound on errors, calls with their oracle, and
baselines to time.
"""

from __future__ import annotations

from stablelora_kernels.testing.arms import EagerLoRA, layer_arms
from stablelora_kernels.testing.bounds import (
    DEVIATIONS,
    EPS,
    MLP_SLOPES,
    SLOPES,
    Deviation,
    assert_no_worse,
    deviations,
    farthest_element,
    scale_of,
)
from stablelora_kernels.testing.cases import Case, make
from stablelora_kernels.testing.devices import pretend_gpu, torch_device
from stablelora_kernels.testing.expectations import Expected, expectations
from stablelora_kernels.testing.inputs import (
    DTYPES,
    dequantized_ref,
    fp8_weight,
    make_inputs,
    make_pairs,
    nf4_weight,
)
from stablelora_kernels.testing.layers import (
    as_rows,
    keep_of,
    kept_for_backward,
    rounded_operand,
)

__all__ = [
    "DEVIATIONS",
    "DTYPES",
    "EPS",
    "MLP_SLOPES",
    "SLOPES",
    "Case",
    "Deviation",
    "EagerLoRA",
    "Expected",
    "as_rows",
    "assert_no_worse",
    "dequantized_ref",
    "deviations",
    "expectations",
    "farthest_element",
    "fp8_weight",
    "keep_of",
    "kept_for_backward",
    "layer_arms",
    "make",
    "make_inputs",
    "make_pairs",
    "nf4_weight",
    "pretend_gpu",
    "rounded_operand",
    "scale_of",
    "torch_device",
]
