"""Helpers for tests and benchmarks: inputs that hurt, and a bound that comes from the baseline's own error."""

from __future__ import annotations

import torch

#: By dtype, one unit in the last place of 1.0.
EPS = {d: torch.finfo(d).eps for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def make_inputs(
    shape: tuple[int, ...],
    out_features: int,
    r: int,
    *,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Random arguments of :func:`stablelora_kernels.functional.lora_linear`, by name, with an incoming gradient ``grad``.

    ``shape`` is x's, its last size being in_features. Values are scaled so that the base product and the LoRA branch are
    both of order one; B is not zero, since a zero B would make every gradient of A vanish.
    """
    generator = torch.Generator().manual_seed(seed)
    k, n = shape[-1], out_features

    def normal(*size: int, std: float = 1.0, to: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * std).to(device=device, dtype=to)

    lora = lora_dtype or dtype
    return {
        "x": normal(*shape),
        "weight": normal(n, k, std=k**-0.5),
        "bias": normal(n) if bias else None,
        "lora_A": normal(r, k, std=k**-0.5, to=lora),
        "lora_B": normal(n, r, std=r**-0.5, to=lora),
        "grad": normal(*shape[:-1], n),
    }


def assert_no_worse(
    out: torch.Tensor,
    ref: torch.Tensor,
    baseline: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """Raise AssertionError unless ``|out - ref| <= 2 max|baseline - ref| + atol`` everywhere, and ``out`` is finite.

    ``ref`` is the float64 oracle and ``baseline`` what plain PyTorch computes, so that the bound is the error a user already
    has. ``atol``, for where that happens to be nothing, is one unit in the last place of ref's largest element in ``dtype``,
    the dtype of the arithmetic: out's unless given.
    """
    assert out.shape == ref.shape, f"{name} has shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if not out.numel():
        return
    assert bool(torch.isfinite(out).all()), f"{name} holds values that are not finite"
    ref = ref.double()
    atol = EPS[dtype or out.dtype] * ref.abs().max().item()
    error = (out.double() - ref).abs().max().item()
    bound = 2 * (baseline.double() - ref).abs().max().item() + atol
    assert error <= bound, f"{name} is off by {error:.3e}, allowed {bound:.3e}"
