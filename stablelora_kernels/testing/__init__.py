"""Helpers for tests and benchmarks: inputs, the bound on errors, calls with their oracle, and
baselines to time.
"""

from __future__ import annotations

from stablelora_kernels.testing.arms import EagerLoRA, forward_backward, layer_arms
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
from stablelora_kernels.testing.devices import pretend_gpu, torch_device
from stablelora_kernels.testing.inputs import (
    DTYPES,
    dequantized_ref,
    fp8_weight,
    make_inputs,
    make_pairs,
    nf4_weight,
)
from stablelora_kernels.testing.layers import (
    GRADIENTS,
    as_rows,
    eager,
    keep_of,
    kept_for_backward,
    oracle,
    rounded_operand,
    roundings,
    run,
)

__all__ = [
    "DEVIATIONS",
    "DTYPES",
    "EPS",
    "GRADIENTS",
    "MLP_SLOPES",
    "SLOPES",
    "Deviation",
    "EagerLoRA",
    "as_rows",
    "assert_no_worse",
    "dequantized_ref",
    "deviations",
    "eager",
    "farthest_element",
    "forward_backward",
    "fp8_weight",
    "keep_of",
    "kept_for_backward",
    "layer_arms",
    "make_inputs",
    "make_pairs",
    "nf4_weight",
    "oracle",
    "pretend_gpu",
    "rounded_operand",
    "roundings",
    "run",
    "scale_of",
    "torch_device",
]
