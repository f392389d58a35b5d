"""The checks of ``doctor``: every kernel family on small inputs against a float64 oracle, on one device.

``python -m stablelora_kernels.cli.selftest`` prints one line of JSON per check. ``doctor --interpret`` runs it in a subprocess,
because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.settings import BACKENDS, check_environment, use_autotune, use_backend, use_kernel
from stablelora_kernels.functional import FP8Weight, NF4Weight, lora_branch, lora_linear, lora_linear_group
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference import (
    StableAdamWRef,
    dropout_keep_ref,
    fp8_ref,
    lora_branch_grads_ref,
    lora_branch_ref,
    lora_linear_grads_ref,
    lora_linear_ref,
    nf4_ref,
)
from stablelora_kernels.testing import error_and_bound, fp8_weight, kept_for_backward, make_inputs, nf4_weight, seed_of

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
    return [
        ("lora_linear", "few rows, bf16", partial(check_linear, 9, 72, 48, 8)),
        ("lora_linear", "many rows, bf16", partial(check_linear, 70, 136, 96, 16)),
        ("lora_linear", "odd sizes, bf16", partial(check_linear, 67, 71, 37, 3)),
        ("lora_linear", "many rows, fp32", partial(check_linear, 70, 72, 48, 8, dtype=FP32)),
        ("lora_linear", "dropout, bf16", partial(check_linear, 70, 72, 48, 8, p=DROPOUT)),
        ("dropout's mask", "forward and backward", check_mask),
        ("lora_linear_group", "3 projections, bf16", check_group),
        ("lora_linear_quantized", "NF4, nested scales", partial(check_quantized, nf4_weight(72, 128, 64, nested=True))),
        ("lora_linear_quantized", "float8", partial(check_quantized, fp8_weight(72, 128))),
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


def leaves_of(inputs: Tensors, names: tuple[str, ...]) -> list[Tensor]:
    return [inputs[name].detach().requires_grad_() for name in names]


def with_grads(y: Tensor, leaves: list[Tensor], grad: Tensor) -> Tensors:
    grads = torch.autograd.grad(y, leaves, grad)
    return {"Y": y.detach(), **dict(zip(("dX", "dA", "dB"), grads, strict=True))}


def eager_linear(inputs: Tensors, keep: Tensor | None = None, p: float = 0.0) -> Tensors:
    """LoRA written with PyTorch's operators in x's dtype. Its error sets the bound."""
    x, a, b = leaves = leaves_of(inputs, ("x", "lora_A", "lora_B"))
    dropped = x if keep is None else x * keep.to(x.dtype) / (1 - p)
    y = torch.nn.functional.linear(x, inputs["weight"], inputs["bias"])
    return with_grads(y + (dropped @ a.to(x.dtype).T @ b.to(x.dtype).T) * SCALING, leaves, inputs["grad"])


def linear_oracle(inputs: Tensors, keep: Tensor | None = None, p: float = 0.0) -> Tensors:
    d = {name: tensor.double() for name, tensor in inputs.items()}
    y = lora_linear_ref(d["x"], d["weight"], d["bias"], d["lora_A"], d["lora_B"], SCALING, keep, p)
    grads = lora_linear_grads_ref(d["grad"], d["x"], d["weight"], d["lora_A"], d["lora_B"], SCALING, keep, p)
    return {"Y": y} | {name: grads[name] for name in ("dX", "dA", "dB")}


def keep_of(y: Tensor, x: Tensor, p: float) -> Tensor:
    """The dropout mask of ``y``: saved for backward on the PyTorch path, drawn by the reference from the saved seed on Triton."""
    if (mask := kept_for_backward(y, torch.bool)) is not None:
        return mask.view(x.shape)
    rows, columns = x.shape
    return dropout_keep_ref(rows, columns, p, int(seed_of(y))).to(x.device)


def check_linear(
    m: int, n: int, k: int, r: int, device: torch.device, *, p: float = 0.0, dtype: torch.dtype = BF16
) -> Measured:
    """``lora_linear`` forward and backward."""
    inputs: Any = make_inputs((m, k), n, r, dtype=dtype, lora_dtype=FP32, device=device)
    x, a, b = leaves = leaves_of(inputs, ("x", "lora_A", "lora_B"))
    y = lora_linear(x, inputs["weight"], inputs["bias"], a, b, SCALING, p)
    keep = keep_of(y, x, p) if p else None
    out = with_grads(y, leaves, inputs["grad"])
    return nearest_to_bound(out, linear_oracle(inputs, keep, p), eager_linear(inputs, keep, p), dtype)


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
    pairs = [leaves_of(inputs, ("lora_A", "lora_B")) for inputs in made]
    weights, biases = ([inputs[name] for inputs in made] for name in ("weight", "bias"))
    ys = lora_linear_group(x, weights, biases, [a for a, _ in pairs], [b for _, b in pairs], [SCALING] * len(made))
    leaves = [x, *(half for pair in pairs for half in pair)]
    dx, *halves = torch.autograd.grad(ys, leaves, [inputs["grad"] for inputs in made])

    def combine(parts: list[Tensors]) -> Tensors:
        """Number the results by projection, and add up dX."""
        named = {f"{name}{i}": part[name] for i, part in enumerate(parts) for name in ("Y", "dA", "dB")}
        named["dX"] = sum((part["dX"] for part in parts[1:]), start=parts[0]["dX"])
        return named

    out = {f"Y{i}": y.detach() for i, y in enumerate(ys)} | {"dX": dx}
    out |= {f"d{'AB'[i % 2]}{i // 2}": half for i, half in enumerate(halves)}
    ref, base = combine([linear_oracle(i) for i in made]), combine([eager_linear(i) for i in made])
    return nearest_to_bound(out, ref, base, BF16)


def check_quantized(weight: NF4Weight | FP8Weight, device: torch.device) -> Measured:
    """``lora_linear`` on a 4-bit or float8 weight. The oracle dequantizes it in float64, eager LoRA in bfloat16."""
    (n, k), parts = weight.shape, vars(weight)
    full = fp8_ref(**parts) if isinstance(weight, FP8Weight) else nf4_ref(**parts)
    moved: dict[str, Any] = {
        name: part.to(device) if isinstance(part, Tensor) else part for name, part in parts.items()
    }
    weight = type(weight)(**moved)
    inputs: Any = make_inputs((37, k), n, 8, dtype=BF16, lora_dtype=FP32, device=device)
    x, a, b = leaves = leaves_of(inputs, ("x", "lora_A", "lora_B"))
    out = with_grads(lora_linear(x, weight, inputs["bias"], a, b, SCALING), leaves, inputs["grad"])
    ref = linear_oracle(inputs | {"weight": full.to(device)})
    return nearest_to_bound(out, ref, eager_linear(inputs | {"weight": weight.dequantize(BF16)}), BF16)


def check_branch(device: torch.device) -> Measured:
    """``lora_branch`` on the output of another layer."""
    inputs: Any = make_inputs((70, 48), 72, 8, dtype=BF16, lora_dtype=FP32, device=device)
    base_out = torch.nn.functional.linear(inputs["x"], inputs["weight"])
    x, a, b = leaves = leaves_of(inputs, ("x", "lora_A", "lora_B"))
    out = with_grads(lora_branch(base_out, x, a, b, SCALING), leaves, inputs["grad"])
    x, a, b = leaves = leaves_of(inputs, ("x", "lora_A", "lora_B"))
    eager = with_grads(base_out + (x @ a.to(BF16).T @ b.to(BF16).T) * SCALING, leaves, inputs["grad"])
    d = {name: tensor.double() for name, tensor in inputs.items()}
    ref = lora_branch_grads_ref(d["grad"], d["x"], d["lora_A"], d["lora_B"], SCALING)
    ref["Y"] = lora_branch_ref(base_out.double(), d["x"], d["lora_A"], d["lora_B"], SCALING)
    return nearest_to_bound(out, ref, eager, BF16)


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
    parser = argparse.ArgumentParser(prog="python -m stablelora_kernels.cli.selftest", description=__doc__)
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    args = parser.parse_args()
    check_environment()
    with use_backend(args.backend):
        for result in run_checks(torch.device(args.device)):
            print(json.dumps(result._asdict()), flush=True)


if __name__ == "__main__":
    main()
