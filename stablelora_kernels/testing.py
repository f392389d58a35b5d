"""Helpers for tests and benchmarks: inputs that hurt, and a bound that comes from the baseline's own error."""

from __future__ import annotations

import torch

from stablelora_kernels.quantized import FP8Weight, NF4Weight

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
