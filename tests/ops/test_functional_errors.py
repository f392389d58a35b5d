"""Every refusal of ``functional.lora_linear``, by the words a user would read."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.testing import make_inputs


def call(dropout_p: float = 0.0, **changes):
    inputs = make_inputs((5, 6), 4, 2)
    inputs.update(changes)
    args = [inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    return lora_linear(*args, 2.0, dropout_p)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight must be \[N, K\], got \[4\]"),
        ({"x": torch.zeros(5, 7)}, r"x must be \[..., 6\] to fit weight \[4, 6\], got \[5, 7\]"),
        ({"x": torch.zeros(())}, r"x must be \[..., 6\] to fit weight \[4, 6\], got \[\]"),
        ({"lora_A": torch.zeros(2, 5)}, r"lora_A must be \[r, 6\] with r >= 1 to fit weight \[4, 6\], got \[2, 5\]"),
        ({"lora_A": torch.zeros(0, 6)}, r"lora_A must be \[r, 6\] with r >= 1 .* got \[0, 6\]"),
        ({"lora_B": torch.zeros(4, 3)}, r"lora_B must be \[4, 2\] to fit weight \[4, 6\] and lora_A \[2, 6\], got \[4, 3\]"),
        ({"lora_B": torch.zeros(5, 2)}, r"lora_B must be \[4, 2\] .* got \[5, 2\]"),
        ({"bias": torch.zeros(5)}, r"bias must be \[4\] to fit weight \[4, 6\], got \[5\]"),
        ({"bias": torch.zeros(1, 4)}, r"bias must be \[4\] .* got \[1, 4\]"),
        ({"weight": torch.zeros(4, 6, device="meta")}, r"weight must be on x's device cpu, got meta"),
        ({"dropout_p": 1.0}, r"dropout_p must be a finite number in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"dropout_p must be a finite number in \[0, 1\), got -0.1"),
        ({"dropout_p": float("nan")}, r"dropout_p must be a finite number in \[0, 1\), got nan"),
    ],
)  # fmt: skip
def test_value_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(5, 6, dtype=torch.int64)}, r"x must be bfloat16, float16, float32 or float64, got torch.int64"),
        ({"weight": torch.zeros(4, 6).half()}, r"weight must have x's dtype torch.float32, got torch.float16"),
        ({"bias": torch.zeros(4).half()}, r"bias must have x's dtype torch.float32, got torch.float16"),
        ({"lora_A": torch.zeros(2, 6).half()}, r"lora_A and lora_B must have one dtype, got torch.float16 and torch.float32"),
        (
            {"lora_A": torch.zeros(2, 6).half(), "lora_B": torch.zeros(4, 2).half()},
            r"lora_A and lora_B must be float32 or of x's dtype torch.float32, got torch.float16",
        ),
        (
            {"x": torch.zeros(5, 6).double(), "weight": torch.zeros(4, 6).double(), "bias": None},
            r"lora_A and lora_B must be float32 or of x's dtype torch.float64, got torch.float32",
        ),
        ({"dropout_p": "0.1"}, r"dropout_p must be a number, got '0.1' of type str"),
    ],
)  # fmt: skip
def test_type_errors(changes, message):
    with pytest.raises(TypeError, match=message):
        call(**changes)


def test_float64_does_not_fall_back_silently():
    inputs = {name: None if t is None else t.double() for name, t in make_inputs((5, 6), 4, 2).items()}
    inputs.pop("grad")
    with slk.use_backend("triton"), pytest.raises(TypeError, match=r"float64.*use_backend\('torch'\)"):
        call(**inputs)
    with slk.use_backend("torch"):
        assert call(**inputs).dtype == torch.float64
