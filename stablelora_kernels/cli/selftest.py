"""The checks of ``doctor``: every kernel family on small inputs against a float64 oracle, on one device.

``python -m stablelora_kernels.cli.selftest`` runs the Triton kernels on the CPU and prints one line of JSON per check. ``doctor
--interpret`` runs it in a subprocess, because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.settings import check_environment, use_autotune, use_backend, use_kernel
from stablelora_kernels.functional import FP8Weight, NF4Weight, lora_branch, lora_linear, lora_linear_group
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference import StableAdamWRef, dropout_keep_ref
from stablelora_kernels.testing import (
    eager,
    error_and_bound,
    fp8_weight,
    group_results,
    kept_for_backward,
    make_inputs,
    nf4_weight,
    oracle,
    run,
    seed_of,
)

BF16, FP32 = torch.bfloat16, torch.float32
SCALING = 1.7
# Exact in 16 bits: the PyTorch path on a CPU draws 16 bits per element and would round another probability.
DROPOUT = 0.125
Tensors = dict[str, Tensor]


class Measured(NamedTuple):
    """The largest error, the bound and the name of the result that comes nearest to its bound."""

    error: float
    bound: float
    of: str


class Result(NamedTuple):
    """The result of a check, with the Triton ``kernels`` that it launched. ``problem`` says why it failed, or is None."""

    family: str
    case: str
    error: float | None
    bound: float | None
    of: str
    kernels: tuple[str, ...]
    seconds: float
    problem: str | None

    @property
    def passed(self) -> bool:
        return self.problem is None


Check = Callable[[torch.device], Measured]


def checks() -> list[tuple[str, str, Check]]:
    """Every check by family and case. The sizes make dispatch choose the named kernel on Hopper and Blackwell."""
    nf4, fp8 = nf4_weight(72, 128, 64, nested=True), fp8_weight(72, 128)
    return [
        ("lora_linear", "few rows, bf16", partial(check_linear, 9, 72, 48, 8)),
        ("lora_linear", "many rows, bf16", partial(check_linear, 70, 136, 96, 16)),
        ("lora_linear", "odd sizes, bf16", partial(check_linear, 67, 71, 37, 3)),
        ("lora_linear", "many rows, fp32", partial(check_linear, 70, 72, 48, 8, dtype=FP32)),
        ("lora_linear", "dropout, bf16", partial(check_linear, 70, 72, 48, 8, p=DROPOUT)),
        ("dropout's mask", "forward and backward", check_mask),
        ("lora_linear_group", "3 projections, bf16", check_group),
        ("lora_linear_quantized", "NF4, nested scales", partial(check_linear, 37, 72, 128, 8, stored=nf4)),
        ("lora_linear_quantized", "float8", partial(check_linear, 37, 72, 128, 8, stored=fp8)),
        ("lora_branch", "bf16", check_branch),
        ("stable_adamw", "3 steps, fp32", partial(check_step, dtype=FP32)),
        ("stable_adamw", "3 steps, bf16", partial(check_step, dtype=BF16)),
    ]


def run_checks(device: torch.device) -> Iterator[Result]:
    """Yield each check's result, on the current backend. A forced kernel and autotuning are turned off meanwhile."""
    on_triton = backend.resolve_backend(device) == "triton"
    gpus = [device] if device.type == "cuda" else []
    for family, case, check in checks():
        begun, before, measured, problem = time.perf_counter(), _launched(on_triton), None, None
        try:
            # The same masks at each run. The caller's generators keep their states.
            with use_kernel("auto"), use_autotune(False), torch.random.fork_rng(gpus):
                torch.manual_seed(0)
                measured = check(device)
            if not measured.error <= measured.bound:
                problem = f"{measured.of} is off by {measured.error:.3g}, allowed {measured.bound:.3g}"
        except Exception as error:  # doctor reports any failure.
            problem = " ".join(f"{type(error).__name__}: {error}".split())
        kernels = tuple(sorted(name for name, n in _launched(on_triton).items() if n != before.get(name, 0)))
        if on_triton and not kernels and problem is None:
            problem = "no Triton kernel was launched"
        seconds = round(time.perf_counter() - begun, 3)
        off, bound, of = (None, None, "") if measured is None else measured
        yield Result(family, case, off, bound, of, kernels, seconds, problem)


def _launched(on_triton: bool) -> dict[str, int]:
    if not on_triton:
        return {}
    from stablelora_kernels.launch.base import launch_counts

    counts = {name.removeprefix("_").removesuffix("_kernel"): count for name, count in launch_counts.items()}
    # The counts include the vendor library's products.
    return {name: count for name, count in counts.items() if name != "vendor"}


def nearest_to_bound(out: Tensors, ref: Tensors, base: Tensors, dtype: torch.dtype) -> Measured:
    """The result whose error is the largest share of its bound. A non-finite value has an infinite error."""
    found = []
    for name, value in out.items():
        if value.shape != ref[name].shape:
            raise AssertionError(f"{name} must be {list(ref[name].shape)}, got {list(value.shape)}")
        error, bound = error_and_bound(value, ref[name], base[name], dtype)
        if not bool(torch.isfinite(value).all()):
            error = float("inf")
        found.append(Measured(error, bound, name))
    return max(found, key=lambda m: m.error / m.bound if m.bound else float(m.error > 0))


def keep_of(y: Tensor, x: Tensor, p: float) -> Tensor:
    """The dropout mask of ``y``: saved for backward on the PyTorch path, drawn by the reference from the saved seed on Triton."""
    if (mask := kept_for_backward(y, torch.bool)) is not None:
        return mask.view(x.shape)
    rows, columns = x.shape
    return dropout_keep_ref(rows, columns, p, int(seed_of(y))).to(x.device)


def check_linear(
    m: int, n: int, k: int, r: int, device: torch.device, *, p: float = 0.0, dtype: torch.dtype = BF16,
    stored: NF4Weight | FP8Weight | None = None,
) -> Measured:  # fmt: skip
    """``lora_linear`` forward and backward, with a plain weight or the ``stored`` one in 4 or 8 bits.

    The oracle's stored weight is dequantized in float64, eager's in ``dtype``.
    """
    inputs: dict[str, Any] = make_inputs((m, k), n, r, dtype=dtype, lora_dtype=FP32, device=device)
    if stored is not None:
        parts: dict[str, Any] = vars(stored)
        parts = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in parts.items()}
        inputs["weight"] = type(stored)(**parts)
    keep = None

    def call(given: dict[str, Any]) -> Tensor:
        nonlocal keep
        x, weight, bias, a, b = (given[name] for name in ("x", "weight", "bias", "lora_A", "lora_B"))
        y = lora_linear(x, weight, bias, a, b, SCALING, p)
        keep = keep_of(y, x, p) if p else None
        return y

    return nearest_to_bound(run(call, inputs), oracle(inputs, SCALING, keep, p), eager(inputs, SCALING, keep, p), dtype)


def check_mask(device: torch.device) -> Measured:
    """Compare the masks of forward, backward and the reference element by element.

    With a zero weight and identities as A and B, Y is the mask times a constant for X = 1, and so is dX for dY = 1.
    """
    m, k = 70, 64
    x = torch.ones(m, k, dtype=BF16, device=device).requires_grad_()
    eye = torch.eye(k, dtype=BF16, device=device).requires_grad_()
    y = lora_linear(x, torch.zeros(k, k, dtype=BF16, device=device), None, eye, eye, 1.0, DROPOUT)
    keep = keep_of(y, x, DROPOUT)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kept = int(keep.sum())
    # Five standard deviations of a binomial.
    if abs(kept - (1 - DROPOUT) * m * k) > 5 * (DROPOUT * (1 - DROPOUT) * m * k) ** 0.5:
        raise AssertionError(f"the mask must keep about {1 - DROPOUT:g} of {m * k} elements, got {kept}")
    wrong = int(((y != 0) != keep).sum() + ((dx != 0) != keep).sum())
    return Measured(wrong, 0, "elements")


def check_group(device: torch.device) -> Measured:
    """A projection group of three: an output, dA and dB for each projection, and one dX."""
    m, k, rank = 70, 96, (8, 4, 4)
    made: list[Any] = [
        make_inputs((m, k), n, r, dtype=BF16, lora_dtype=FP32, device=device, seed=i)
        for i, (n, r) in enumerate(zip((72, 24, 24), rank, strict=True))
    ]
    for inputs in made[1:]:
        inputs["x"] = made[0]["x"]
    x = made[0]["x"].detach().requires_grad_()
    pairs = [[inputs[name].detach().requires_grad_() for name in ("lora_A", "lora_B")] for inputs in made]
    weights, biases = ([inputs[name] for inputs in made] for name in ("weight", "bias"))
    ys = lora_linear_group(x, weights, biases, [a for a, _ in pairs], [b for _, b in pairs], [SCALING] * len(made))
    leaves = [x, *(half for pair in pairs for half in pair)]
    dx, *halves = torch.autograd.grad(ys, leaves, [inputs["grad"] for inputs in made])

    out = {f"Y{i}": y.detach() for i, y in enumerate(ys)} | {"dX": dx}
    out |= {f"d{'AB'[i % 2]}{i // 2}": half for i, half in enumerate(halves)}
    ref, base = (group_results([results(i, SCALING) for i in made]) for results in (oracle, eager))
    return nearest_to_bound(out, ref, base, BF16)


def check_branch(device: torch.device) -> Measured:
    """``lora_branch``: the branch alone, on the output of some other layer."""
    inputs: dict[str, Any] = make_inputs((70, 48), 72, 8, dtype=BF16, lora_dtype=FP32, device=device)
    inputs["base_out"] = torch.nn.functional.linear(inputs["x"], inputs.pop("weight"), inputs.pop("bias"))

    def call(given: dict[str, Any]) -> Tensor:
        base_out, x, a, b = (given[name] for name in ("base_out", "x", "lora_A", "lora_B"))
        return lora_branch(base_out, x, a, b, SCALING)

    # dY is base_out's gradient as it is.
    ref = oracle(inputs, SCALING) | {"dBASE": inputs["grad"]}
    return nearest_to_bound(run(call, inputs), ref, eager(inputs, SCALING), BF16)


def check_step(device: torch.device, *, dtype: torch.dtype) -> Measured:
    """Three steps over a shrinking pair, one that latches at once and a lone parameter; the latch steps must be the oracle's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(device, dtype)

    start = {
        "shrinks.lora_A": normal(8, 40), "shrinks.lora_B": normal(24, 8, std=0.0),
        "latches.lora_A": normal(3, 5, std=0.1), "latches.lora_B": normal(31, 3, std=9.0), "lone": normal(17),
    }  # fmt: skip
    grads = [{name: normal(*tensor.shape, std=1e-2) for name, tensor in start.items()} for _ in range(3)]
    settings: dict[str, Any] = {"lr": 1e-2, "shrink_ratio": 5e-3}

    ours = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimizer = StableLoRAAdamW(list(ours.items()), seed=1, **settings)
    for step in grads:
        for name, tensor in ours.items():
            tensor.grad = step[name]
        optimizer.step()

    def plain(kind: torch.dtype) -> tuple[Tensors, dict[str, int | None]]:
        """Algorithm 1 operator by operator in the dtype ``kind``: the parameters and the latch steps."""
        named = {name: tensor.to(kind, copy=True) for name, tensor in start.items()}
        pairs = [LoRAPair(p, named[f"{p}.lora_A"], named[f"{p}.lora_B"]) for p in ("shrinks", "latches")]
        reference = StableAdamWRef(pairs, [named["lone"]], **settings)
        for step in grads:
            reference.step({tensor: step[name].to(kind) for name, tensor in named.items()})
        return named, reference.latched_at

    ref, latched_at = plain(torch.float64)
    found = {pair.name: pair.latched_at for pair in optimizer.stability()}
    if found != latched_at or sorted(latched_at.values(), key=str) != [1, None]:
        raise AssertionError(f"the pairs must latch at steps {latched_at}, got {found}")
    return nearest_to_bound({name: tensor.detach() for name, tensor in ours.items()}, ref, plain(dtype)[0], dtype)


def main() -> None:
    check_environment()
    with use_backend("triton"):
        for result in run_checks(torch.device("cpu")):
            print(json.dumps(result._asdict()), flush=True)


if __name__ == "__main__":
    main()
