"""Helpers for tests and benchmarks: inputs that hurt, and a bound that comes from the baseline's own error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from stablelora_kernels.quantized import FP8Weight, NF4Weight
from stablelora_kernels.reference import (
    fp8_ref,
    lora_branch_grads_ref,
    lora_branch_ref,
    lora_linear_grads_ref,
    lora_linear_ref,
    nf4_ref,
)

#: The inputs that get gradients, and the gradients' names.
GRADIENTS = {"base_out": "dBASE", "x": "dX", "lora_A": "dA", "lora_B": "dB"}

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


def nf4_weight(n: int, k: int, blocksize: int, nested: bool) -> NF4Weight:
    """A random weight in 4 bits, on the CPU: any bits are one. Elements make a product with it of order one."""
    generator = torch.Generator().manual_seed(n * k)

    def integers(size: int) -> torch.Tensor:
        return torch.randint(256, (size,), dtype=torch.uint8, generator=generator)

    def positive(size: int) -> torch.Tensor:
        return (torch.rand(size, generator=generator) + 0.5) * k**-0.5

    blocks = -(-n * k // blocksize)
    code = torch.linspace(-1.7, 1.7, 16) ** 3
    packed = integers(-(-n * k // 2))
    if not nested:
        return NF4Weight(packed, positive(blocks), code, (n, k), blocksize)
    offset, nested_code = torch.tensor(k**-0.5), torch.linspace(-0.9, 1, 256)
    return NF4Weight(
        packed, integers(blocks), code, (n, k), blocksize, positive(-(-blocks // 256)), nested_code, offset, 256
    )


def fp8_weight(n: int, k: int) -> FP8Weight:
    """A random weight in float8 with a scale a row, on the CPU."""
    generator = torch.Generator().manual_seed(n * k)
    # Small ones are subnormal numbers in eight bits.
    values = torch.randn(n, k, generator=generator) * torch.logspace(-3, 1, k)
    return FP8Weight(values.to(torch.float8_e4m3fn), (torch.rand(n, generator=generator) + 0.5) * k**-0.5)


def dequantized_ref(weight: NF4Weight | FP8Weight) -> torch.Tensor:
    """A quantized weight in float64, by the oracle."""
    parts = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    return fp8_ref(**parts) if isinstance(weight, FP8Weight) else nf4_ref(**parts)


def run(call: Callable[[dict[str, Any]], torch.Tensor], inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Y and the gradients dX, dA and dB of ``call(inputs)``, whose ``grad`` comes in; dBASE too if there is a ``base_out``."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in GRADIENTS if name in inputs}
    y = call(inputs | leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["grad"])
    return {"Y": y.detach(), **dict(zip((GRADIENTS[name] for name in leaves), grads, strict=True))}


def eager(
    inputs: dict[str, Any], scaling: float, keep: torch.Tensor | None = None, p: float = 0.0
) -> dict[str, torch.Tensor]:
    """The baseline: what a user writes by hand, operator by operator in x's dtype. A ``base_out`` replaces the product."""

    def call(given: dict[str, Any]) -> torch.Tensor:
        x, base = given["x"], given.get("base_out")
        dropped = x if keep is None else x * keep.to(x.dtype) / (1 - p)
        branch = dropped @ given["lora_A"].to(x.dtype).T @ given["lora_B"].to(x.dtype).T
        if base is None:
            weight = given["weight"]
            weight = weight if isinstance(weight, torch.Tensor) else weight.dequantize(x.dtype)
            base = torch.nn.functional.linear(x, weight, given["bias"])
        return (base + branch * scaling).to(base.dtype)

    return run(call, inputs)


def oracle(
    inputs: dict[str, Any], scaling: float, keep: torch.Tensor | None = None, p: float = 0.0
) -> dict[str, torch.Tensor]:
    """The same results by the reference in float64, from the values of ``inputs``."""
    if isinstance(inputs.get("weight"), (FP8Weight, NF4Weight)):
        inputs = inputs | {"weight": dequantized_ref(inputs["weight"]).to(inputs["x"].device)}
    d: dict[str, Any] = {name: t if t is None else t.detach().double() for name, t in inputs.items()}
    pair: tuple[Any, ...] = (d["lora_A"], d["lora_B"], scaling, keep, p)
    if "base_out" in d:
        return {"Y": lora_branch_ref(d["base_out"], d["x"], *pair), **lora_branch_grads_ref(d["grad"], d["x"], *pair)}
    y = lora_linear_ref(d["x"], d["weight"], d["bias"], *pair)
    return {"Y": y, **lora_linear_grads_ref(d["grad"], d["x"], d["weight"], *pair)}


def group_results(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The results of projections of one x: each projection's have its number, and the gradients of x add up to dX."""
    named = {f"{name}{i}": part[name] for i, part in enumerate(parts) for name in ("Y", "dA", "dB")}
    return named | {"dX": sum((part["dX"] for part in parts[1:]), start=parts[0]["dX"])}


def kept_for_backward(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The first tensor of ``dtype`` that the node which made ``y`` keeps: dropout's seed is int64, its stored mask is bool."""
    node = y.grad_fn
    while node is not None:
        for saved in getattr(node, "saved_tensors", ()):
            if saved is not None and saved.dtype == dtype:
                return saved
        # Past the views that autograd put around it.
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def seed_of(y: torch.Tensor) -> torch.Tensor:
    """Dropout's seed, an int64 tensor of one element, from what the layer keeps for its backward pass on Triton."""
    seed = kept_for_backward(y, torch.int64)
    if seed is None:
        raise LookupError("no seed among the tensors that the layer keeps for backward")
    return seed


def error_and_bound(
    out: torch.Tensor, ref: torch.Tensor, baseline: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """``max|out - ref|``, and what is allowed: ``2 max|baseline - ref| + atol``, as :func:`assert_no_worse` says."""
    if not out.numel():
        return 0.0, 0.0
    ref = ref.double()
    atol = EPS[dtype or out.dtype] * ref.abs().max().item()
    error = (out.double() - ref).abs().max().item()
    return error, 2 * (baseline.double() - ref).abs().max().item() + atol


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
    error, bound = error_and_bound(out, ref, baseline, dtype)
    assert error <= bound, f"{name} is off by {error:.3e}, allowed {bound:.3e}"
