"""The oracle of ``benchmarks.lab.gpu``'s checks: ``lora_linear`` against float64, on whatever device the inputs are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.rules import check_possible
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.reference import lora_linear_grads_ref, lora_linear_ref, philox_ref
from stablelora_kernels.testing import assert_no_worse, error_and_bound, make_inputs, seed_of

SCALING = 1.7
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
Inputs = dict[str, Tensor]
# Larger inputs are drawn on the device: make_inputs draws in float64 on the host.
HOST_ELEMENTS = 2**21


class Case:
    """A call: rows, sizes, rank, dropout and dtypes."""

    def __init__(
        self, m: int, n: int, k: int, r: int, p: float = 0.0, dtype: torch.dtype = BF16, lora_dtype: torch.dtype = FP32
    ) -> None:
        self.m, self.n, self.k, self.r, self.p, self.dtype, self.lora_dtype = m, n, k, r, p, dtype, lora_dtype

    @property
    def dtypes(self) -> str:
        return "/".join(dict.fromkeys((SHORT[self.dtype], SHORT[self.lora_dtype])))

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} r{self.r} p{self.p:g} {self.dtypes}"

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Arguments and an incoming gradient, in make_inputs' scales."""
        m, n, k, r = self.m, self.n, self.k, self.r
        if m * k + n * k + m * n <= HOST_ELEMENTS:
            made = make_inputs(
                (m, k), n, r, dtype=self.dtype, lora_dtype=self.lora_dtype, device=device, seed=seed, bias=r % 3 != 0
            )
            return {name: value for name, value in made.items() if value is not None}
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(rows: int, columns: int, std: float, dtype: torch.dtype) -> Tensor:
            return (torch.randn(rows, columns, generator=generator, device=device) * std).to(dtype)

        return {
            "x": normal(m, k, 1.0, self.dtype),
            "weight": normal(n, k, k**-0.5, self.dtype),
            "bias": normal(1, n, 1.0, self.dtype)[0],
            "lora_A": normal(r, k, k**-0.5, self.lora_dtype),
            "lora_B": normal(n, r, r**-0.5, self.lora_dtype),
            "grad": normal(m, n, 1.0, self.dtype),
        }


def directions(case: Case, kernel: str) -> list[str]:
    """Which of forward and backward ``kernel`` can do."""
    found = []
    for direction, sizes in (("forward", (case.n, case.k)), ("backward", (case.k, case.n))):
        try:
            check_possible(Call(direction, case.m, *sizes, case.r, case.dtype, case.lora_dtype, case.p > 0), kernel)
            found.append(direction)
        except ValueError:
            pass
    return found


def leaves(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x, a, b = (inputs[name].detach().requires_grad_() for name in ("x", "lora_A", "lora_B"))
    return x, a, b


def call(inputs: Inputs, x: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    return lora_linear(x, inputs["weight"], inputs.get("bias"), a, b, SCALING, p)


def run(inputs: Inputs, p: float) -> tuple[dict[str, Tensor], int | None]:
    """Y, dX, dA and dB of the library, and dropout's seed."""
    x, a, b = leaves(inputs)
    y = call(inputs, x, a, b, p)
    seed = int(seed_of(y)) if p else None
    grads = torch.autograd.grad(y, (x, a, b), inputs["grad"])
    return {"Y": y.detach(), **dict(zip(("dX", "dA", "dB"), grads, strict=True))}, seed


def eager(inputs: Inputs, keep: Tensor | None, p: float) -> dict[str, Tensor]:
    """What a user writes by hand: operator by operator in x's dtype, gradients by autograd."""
    x, a, b = leaves(inputs)
    dropped = x if keep is None else x * keep.to(x.dtype) / (1 - p)
    base = torch.nn.functional.linear(x, inputs["weight"], inputs.get("bias"))
    y = base + (dropped @ a.to(x.dtype).T @ b.to(x.dtype).T) * SCALING
    grads = torch.autograd.grad(y, (x, a, b), inputs["grad"])
    return {"Y": y.detach(), **dict(zip(("dX", "dA", "dB"), grads, strict=True))}


def oracle(inputs: Inputs, keep: Tensor | None, p: float) -> dict[str, Tensor]:
    d = {name: t.detach().double() for name, t in inputs.items()}
    y = lora_linear_ref(d["x"], d["weight"], d.get("bias"), d["lora_A"], d["lora_B"], SCALING, keep, p)
    grads = lora_linear_grads_ref(d["grad"], d["x"], d["weight"], d["lora_A"], d["lora_B"], SCALING, keep, p)
    return {"Y": y, "dX": grads["dX"], "dA": grads["dA"], "dB": grads["dB"]}


def keep_rows(rows: Tensor, columns: int, p: float, seed: int) -> Tensor:
    """``reference.dropout_keep_ref`` for some rows only, int64 [n], on their device: bool [n, columns]."""
    groups = -(-columns // 4)
    counters = rows[:, None] * groups + torch.arange(groups, device=rows.device)
    words = philox_ref(seed, counters).reshape(len(rows), groups * 4)[:, :columns]
    return (words >> 1) >= round(p * 2**31)


def compare(inputs: Inputs, out: dict[str, Tensor], keep: Tensor | None, p: float) -> tuple[float, str]:
    """The largest error of any result as a share of the library's bound for it, and which result that is.

    Raises:
        AssertionError: a result is beyond its bound, not finite, or of the wrong dtype.
    """
    ref, base = oracle(inputs, keep, p), eager(inputs, keep, p)
    worst, which = 0.0, ""
    dtype = inputs["x"].dtype
    for name, value in out.items():
        assert_no_worse(value, ref[name], base[name], dtype=dtype, name=name)
        wanted = dtype if name in ("Y", "dX") else inputs["lora_A"].dtype
        assert value.dtype == wanted, f"{name} is {value.dtype}, expected {wanted}"
        error, bound = error_and_bound(value, ref[name], base[name], dtype)
        share = error / bound if bound else 0.0
        if share >= worst:
            worst, which = share, name
    return worst, which


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that an operator allocates and does not write holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def equal_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """
    Raises:
        AssertionError: a result differs, NaN from NaN included.
    """
    for name, value in one.items():
        if not torch.equal(value, other[name]):
            off = (value.double() - other[name].double()).abs()
            raise AssertionError(
                f"{name} differs in {int((value != other[name]).sum())} places, by {off.max():.3e} at most"
            )
