"""Helpers for tests and benchmarks: inputs, the bound on errors, and baselines to time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from stablelora_kernels.dispatch import problem
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.ops import plans
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.quantized import FP8Weight, NF4Weight
from stablelora_kernels.reference import (
    fp8_ref,
    lora_branch_grads_ref,
    lora_branch_ref,
    lora_linear_grads_ref,
    lora_linear_ref,
    nf4_ref,
    unpack_mask,
)
from stablelora_kernels.reference.rounding import Arithmetic, Rounded, RoundedLayer, dequantized, operand, total
from stablelora_kernels.utils.tensors import drop_share

#: The inputs that get gradients, and the gradients' names.
GRADIENTS = {"base_out": "dBASE", "x": "dX", "lora_A": "dA", "lora_B": "dB"}

#: The dtypes of a layer by their short names.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: One unit in the last place of 1.0, by dtype.
EPS = {d: torch.finfo(d).eps for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
#: How many standard deviations of its rounding a result may be off by. A normal deviate is farther off six times in 10⁷ draws.
DEVIATIONS = 5.0
#: By which share of itself a result of a linear layer may be too large or too small as a whole, by dtype.
SLOPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
#: The same for a gated MLP, where errors of G and U multiply.
MLP_SLOPES = {dtype: 5 * slope for dtype, slope in SLOPES.items()}


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
) -> dict[str, Tensor | None]:
    """Random arguments of :func:`stablelora_kernels.functional.lora_linear` by name, and an incoming gradient ``grad``.

    ``shape`` is x's; its last size is in_features. The values are scaled so that the base product and the LoRA branch are both
    of order one. B is not zero: with a zero B, every gradient of A would vanish.
    """
    generator = torch.Generator().manual_seed(seed)
    k, n = shape[-1], out_features

    def normal(*size: int, std: float = 1.0, to: torch.dtype = dtype) -> Tensor:
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
    """A random 4-bit weight on the CPU, scaled so that its products are of order one."""
    generator = torch.Generator().manual_seed(n * k)

    def integers(size: int) -> Tensor:
        return torch.randint(256, (size,), dtype=torch.uint8, generator=generator)

    def positive(size: int) -> Tensor:
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
    """A random float8 weight with one scale a row, on the CPU."""
    generator = torch.Generator().manual_seed(n * k)
    # The small values are subnormal in float8.
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
    """The baseline: what a user writes by hand, operator by operator in x's dtype. A ``base_out`` replaces the product.

    ``keep``: the mask of a dropout of probability p, which is rounded as ``utils.tensors.drop_share`` does.
    """
    kept = 1 - drop_share(p)

    def call(given: dict[str, Any]) -> torch.Tensor:
        x, base = given["x"], given.get("base_out")
        x_kept = x if keep is None else x * keep.to(x.dtype) / kept
        branch = x_kept @ given["lora_A"].to(x.dtype).T @ given["lora_B"].to(x.dtype).T
        if base is None:
            weight = given["weight"]
            weight = weight if isinstance(weight, torch.Tensor) else weight.dequantize(x.dtype)
            base = torch.nn.functional.linear(x, weight, given.get("bias"))
        return (base + branch * scaling).to(base.dtype)

    return run(call, inputs)


def oracle(
    inputs: dict[str, Any], scaling: float, keep: torch.Tensor | None = None, p: float = 0.0
) -> dict[str, torch.Tensor]:
    """The same results by the reference in float64, from the values of ``inputs``."""
    if isinstance(inputs.get("weight"), (FP8Weight, NF4Weight)):
        inputs = inputs | {"weight": dequantized_ref(inputs["weight"]).to(inputs["x"].device)}
    d: dict[str, Any] = {name: t if t is None else t.detach().double() for name, t in inputs.items()}
    pair: tuple[Any, ...] = (d["lora_A"], d["lora_B"], scaling, keep, drop_share(p))
    if "base_out" in d:
        # dY is base_out's gradient as it is.
        y, base = lora_branch_ref(d["base_out"], d["x"], *pair), {"dBASE": d["grad"]}
        return {"Y": y, **base, **lora_branch_grads_ref(d["grad"], d["x"], *pair)}
    y = lora_linear_ref(d["x"], d["weight"], d.get("bias"), *pair)
    return {"Y": y, **lora_linear_grads_ref(d["grad"], d["x"], d["weight"], *pair)}


def rounded_operand(t: Tensor | NF4Weight | FP8Weight | None, dtype: torch.dtype) -> Rounded | None:
    """An operand in float64, with the rounding that it takes to be used in ``dtype``."""
    if t is None:
        return None
    return operand(t.detach(), dtype) if isinstance(t, Tensor) else dequantized(dequantized_ref(t), dtype)


def roundings(
    inputs: dict[str, Any],
    scaling: float,
    keep: torch.Tensor | None = None,
    p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> dict[str, Rounded]:
    """How far rounding may move Y, dX, dA and dB (of a branch alone also dBASE) on any processor, by these names.

    ``dtype``: that in which a call multiplies and stores, which is x's unless given.
    """
    storage = dtype or inputs["x"].dtype
    names = ("weight", "bias", "lora_A", "lora_B")
    operands = {name: rounded_operand(inputs.get(name), storage) for name in names}
    layer = RoundedLayer(Arithmetic(storage), **operands, scaling=scaling, keep=keep, dropout_p=drop_share(p))
    x, grad = (as_rows(inputs[name], storage) for name in ("x", "grad"))
    results = {}
    base = inputs.get("base_out")
    if base is None:
        results["Y"] = layer.forward(x)
    else:
        results["Y"] = layer.forward(x, as_rows(base, base.dtype), base.dtype)
        # The gradient itself.
        results["dBASE"] = as_rows(inputs["grad"], inputs["grad"].dtype)
    gradients = layer.backward(grad)
    return results | {GRADIENTS[name]: gradients[name] for name in ("x", "lora_A", "lora_B")}


def as_rows(t: Tensor, dtype: torch.dtype) -> Rounded:
    """An operand of any leading sizes as a matrix, with the rounding that it takes to be used in ``dtype``."""
    return operand(t.detach().reshape(t.shape[:-1].numel(), t.shape[-1]), dtype)


def group_roundings(parts: list[dict[str, Rounded]], dtype: torch.dtype) -> dict[str, Rounded]:
    """The roundings of :func:`group_results`, whose sum of dX is rounded to ``dtype`` after each addition."""
    named = {f"{name}{i}": part[name] for i, part in enumerate(parts) for name in ("Y", "dA", "dB")}
    return named | {"dX": total([part["dX"] for part in parts], dtype)}


def group_results(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The results of projections of one x: each projection's have its number, and the gradients of x add up to dX."""
    named = {f"{name}{i}": part[name] for i, part in enumerate(parts) for name in ("Y", "dA", "dB")}
    return named | {"dX": sum((part["dX"] for part in parts[1:]), start=parts[0]["dX"])}


def kept_for_backward(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The first tensor of ``dtype`` that the node which made ``y`` keeps: dropout's mask is int32 on Triton, else bool."""
    node = y.grad_fn
    while node is not None:
        for saved in getattr(node, "saved_tensors", ()):
            if saved is not None and saved.dtype == dtype:
                return saved
        # Skip the views that autograd recorded after the op.
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def keep_of(y: Tensor, x: Tensor) -> Tensor:
    """The dropout mask that the op of ``y`` saved for backward, bool in x's shape."""
    mask = kept_for_backward(y, torch.bool)
    if mask is None and (words := kept_for_backward(y, torch.int32)) is not None:
        mask = unpack_mask(words, x.shape[-1])
    if mask is None:
        raise LookupError("the op saved no mask for backward")
    return mask.view(x.shape)


class Deviation(NamedTuple):
    """How far a result is off and how far it may be, by its elements or by its scale."""

    error: float
    bound: float
    of: str

    @property
    def share(self) -> float:
        """The error as a share of the bound; infinite if a result that must be exact is not."""
        if self.bound:
            return self.error / self.bound
        return math.inf if self.error else 0.0


def farthest_element(
    out: Tensor,
    ref: Tensor,
    baseline: Tensor,
    dtype: torch.dtype,
    rounding: Rounded | None = None,
    name: str = "result",
) -> Deviation:
    """The element of ``out`` whose error is the largest share of its bound; see :func:`assert_no_worse`."""
    if not out.numel():
        return Deviation(0.0, 0.0, name)
    ref = ref.double()
    errors = (out.double() - ref).abs().nan_to_num(nan=math.inf)
    atol = EPS[dtype] * ref.abs().max().item()
    bounds = torch.full_like(errors, 2 * (baseline.double() - ref).abs().max().item() + atol)
    if rounding is not None:
        # In float64 the oracle rounds as much, independently.
        oracles = math.sqrt(2) if dtype == torch.float64 else 1.0
        bounds = bounds.maximum(DEVIATIONS * oracles * rounding.deviation.view(ref.shape))
    # Where both are zero, the share is NaN.
    place = (errors / bounds).nan_to_num(nan=0.0, posinf=math.inf).argmax()
    return Deviation(errors.flatten()[place].item(), bounds.flatten()[place].item(), name)


def scale_of(
    out: Tensor, ref: Tensor, slope: float, rounding: Rounded | None = None, name: str = "result"
) -> Deviation:
    """The share by which ``out`` as a whole is too large or too small: how far ``<out, ref> / <ref, ref>`` is from 1.

    It may be ``slope``. Where few numbers are rounded on the way, chance may make it larger: DEVIATIONS standard deviations of
    all roundings together are allowed. They fall with the root of how many numbers are rounded.
    """
    of, ref = f"the scale of {name}", ref.double()
    square = ref.square().sum().item()
    if not square:
        return Deviation(0.0, slope, of)
    error = abs((out.double() * ref).sum().item() / square - 1)
    chance = 0.0 if rounding is None else DEVIATIONS * rounding.projected(ref) / square
    return Deviation(math.inf if math.isnan(error) else error, max(slope, chance), of)


def deviations(
    out: Tensor,
    ref: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounded | None = None,
    slope: float | None = None,
    name: str = "result",
) -> list[Deviation]:
    """What :func:`assert_no_worse` compares: the farthest element, and the scale if ``rounding`` or ``slope`` is given."""
    dtype = dtype or out.dtype
    measured = [farthest_element(out, ref, baseline, dtype, rounding, name)]
    if slope is None and rounding is not None:
        slope = SLOPES[dtype]
    if slope is not None and out.numel():
        measured.append(scale_of(out, ref, slope, rounding, name))
    return measured


def assert_no_worse(
    out: Tensor,
    ref: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounded | None = None,
    slope: float | None = None,
    name: str = "result",
) -> list[Deviation]:
    """Raise AssertionError unless ``out`` is finite and as near to ``ref`` as plain PyTorch's result, or as rounding allows.

    ``ref`` is the float64 oracle and ``baseline`` is plain PyTorch's result. Each element may be off by
    ``2 max|baseline - ref| + atol``, twice the error that a user already has. ``atol`` covers a baseline that happens to be
    exact: one unit in the last place of ref's largest element in ``dtype``, the dtype of the arithmetic, which is out's unless
    given.

    ``rounding`` is this result's of :func:`roundings`. With it an element may instead be off by DEVIATIONS standard deviations
    of its rounding, if that is more. With ``rounding`` or ``slope``, the scale of all elements together is bounded too: by
    ``slope``, which is that of SLOPES unless given, or by DEVIATIONS standard deviations. Return what was compared.
    """
    assert out.shape == ref.shape, f"{name} has shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if not out.numel():
        return []
    assert bool(torch.isfinite(out).all()), f"{name} holds values that are not finite"
    compared = deviations(out, ref, baseline, dtype=dtype, rounding=rounding, slope=slope, name=name)
    for error, bound, of in compared:
        assert error <= bound, f"{of} is off by {error:.3e}, allowed {bound:.3e}"
    return compared


@contextmanager
def pretend_gpu(arch: str, processors: int | None = None) -> Iterator[None]:
    """Choose kernels and tiles in the block as on a GPU of ``arch``, such as ``"sm_90"``, for which the interpreter stands in.

    ``processors``: its number of processors, if it is not that of the model that :func:`stablelora_kernels.explain` knows.

    Raises:
        ValueError: ``arch`` is none that :func:`stablelora_kernels.explain` knows.
    """
    if arch not in problem.DEVICES:
        raise ValueError(f"arch must be one of {', '.join(problem.DEVICES)}, got {arch!r}")
    device = problem.DEVICES[arch]
    device = device._replace(processors=processors or device.processors)
    # Prepared launches are those of the GPU before.
    plans.clear()
    try:
        with mock.patch.object(problem, "device_of", lambda _: device):
            yield
    finally:
        plans.clear()


def torch_device(name: str | None) -> torch.device:
    """The device ``name``; if None, the GPU if there is one, else the CPU.

    Raises:
        ValueError: the device is neither the CPU nor an available GPU.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device, got {name!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be of type cpu or cuda, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device must be available, got {name!r} where PyTorch sees {count} GPUs")
    return device


class EagerLoRA(nn.Module):
    """LoRA written by hand: every product and sum is an operator of its own."""

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, nn.Dropout(dropout)
        self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.lora_A.t() @ self.lora_B.t() * self.scaling


def layer_arms(
    k: int, n: int, r: int, dropout: float, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Linear, EagerLoRA, LoRALinear]:
    """The frozen layer, eager LoRA and our layer over one frozen weight, with equal A and non-zero B, all in ``dtype``."""
    torch.manual_seed(0)
    frozen = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    ours = LoRALinear.from_linear(frozen, r=r, lora_alpha=2 * r, lora_dropout=dropout, lora_dtype=dtype)
    with torch.no_grad():
        ours.lora_B.normal_(std=0.02)
    eager = EagerLoRA(frozen, ours.lora_A.detach(), ours.lora_B.detach(), ours.scaling, dropout)
    return frozen, eager, ours


def forward_backward(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """A function that runs forward and backward once. It first drops the gradients of the last run."""
    parameters = [p for p in module.parameters() if p.requires_grad]

    def run() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        module(x).backward(grad)

    return run


def make_pairs(
    count: int, r: int, n: int, device: torch.device | str, latched: bool, m: int | None = None
) -> list[LoRAPair]:
    """Pairs of A [r, n] and B [m, r] with gradients; m is n unless given.

    With ``latched``, B is so large that every pair latches at the first step. Otherwise B is zero, so A keeps shrinking.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(count):
        a = torch.randn(r, n, generator=generator) / n**0.5
        b = torch.full((m or n, r), 1.0 if latched else 0.0)
        pair = LoRAPair(f"layer{i}", *(nn.Parameter(x.to(device)) for x in (a, b)))
        for p in (pair.A, pair.B):
            p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).to(device)
        pairs.append(pair)
    return pairs
