"""One call of any op as a :class:`Case`: its operands, its results by the op, by separate calls, by hand and by the reference.

A call is a list of projections, numbered from 0, and how they combine. Operands have names: "x", "base_out" (of ``lora_branch``)
and, for each projection, "weight0", "bias0", "lora_A0", "lora_B0" and "grad0", the gradient of its output. A gated MLP has gate,
up and down as projections 0, 1 and 2, and one output. Results are the outputs "Y0", ... and gradients by their operands' names.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels import testing
from stablelora_kernels.dispatch import tiles
from stablelora_kernels.dispatch.problem import Rule
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.functional import LoRAWeights, lora_branch, lora_linear, lora_linear_group, lora_mlp
from stablelora_kernels.reference import lora_branch_ref, lora_linear_ref
from stablelora_kernels.reference.lora import lora_mlp_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Of x and the weights, and of A and B.
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)]
SHORT = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16"}
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
}
LAYOUTS = ("contiguous", "transposed", "wider", "every second", "shifted", "expanded", "negated")
QUANTIZED: dict[str, Callable[[int, int], Any]] = {
    "nf4": lambda n, k: testing.nf4_weight(n, k, 64, nested=False),
    "nf4 nested": lambda n, k: testing.nf4_weight(n, k, 64, nested=True),
    "nf4 128 nested": lambda n, k: testing.nf4_weight(n, k, 128, nested=True),
    "fp8": testing.fp8_weight,
}
# Linux's; Python names it from 3.13 on.
MAP_NORESERVE = 0x4000
# Many tiles, ragged edges and several blocks of ranks at small sizes. Masks are read by words of 32 columns.
TINY = Tile(32, 32, 16, 4, 2)
Operands = dict[str, Any]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A call. What a tuple has of each projection, a group has in any number from 1 to 3."""

    # "linear", "branch", "group" or "mlp".
    op: str = "linear"
    # Of x.
    shape: tuple[int, ...] = (70, 24)
    # Columns of each projection's output, and its rank; None is a projection without a branch.
    sizes: tuple[int, ...] = (20,)
    ranks: tuple[int | None, ...] = (6,)
    dtype: torch.dtype = FP32
    lora_dtype: torch.dtype = FP32
    # Of base_out, if it is not x's.
    base_dtype: torch.dtype | None = None
    p: float = 0.0
    training: bool = True
    backend: str = "triton"
    kernel: str = "auto"
    # Of backward, if it is another.
    backward_kernel: str | None = None
    # The GPU that the interpreter stands in for.
    arch: str | None = None
    processors: int | None = None
    # Every kernel's tile, in place of its table's.
    tile: Tile | None = None
    # Names of QUANTIZED.
    quantized: tuple[str | None, ...] = (None, None, None)
    bias: tuple[bool, ...] = (True, False, True)
    scalings: tuple[float, ...] = (1.7, -0.75, 0.5)
    activation: str = "silu"
    # Gate's A is up's too.
    shared: bool = False
    # By kinds of operands, such as "lora_A" or "grad": see :func:`laid_out`.
    layouts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    # The operands, or kinds of them, whose gradients are computed; None: x, A's, B's and base_out.
    wanted: Iterable[str] | None = None
    autocast: bool = False
    backward_in_autocast: bool = False
    # The output is added to in place before backward.
    in_place: bool = False
    # The operand whose first element is ``value``.
    broken: str | None = None
    value: float = torch.nan
    seed: int = 0

    def __str__(self) -> str:
        """Sizes and dtypes, and each option that is not the default: a test's id."""
        shape, sizes, ranks = ("x".join(map(str, each)) for each in (self.shape, self.sizes, self.ranks))
        words = [self.op, f"{shape}-{sizes}", f"r{ranks}", f"{SHORT[self.dtype]}/{SHORT[self.lora_dtype]}"]
        for option in fields(self)[6:]:
            value = getattr(self, option.name)
            if value not in (option.default, {}) and (self.broken or option.name != "value"):
                words.append(short(value) if isinstance(value, str) else f"{option.name}={short(value)}")
        return " ".join(words)

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def wanted_names(self) -> list[str]:
        """The operands whose gradients are computed, in their order."""
        names = ["base_out"] if self.op == "branch" else []
        names += ["x", *self.of_branches("lora_A"), *self.of_branches("lora_B")]
        if self.wanted is None:
            return names
        others = [f"{kind}{i}" for kind in ("weight", "bias") for i in range(self.count)]
        return [name for name in (*names, *others) if {name, name[:-1]} & set(self.wanted)]

    def of_branches(self, kind: str) -> list[str]:
        """The names of all A's, or of all B's. A shared A is one."""
        there = [
            i for i, r in enumerate(self.ranks) if r is not None and not (self.shared and (kind, i) == ("lora_A", 1))
        ]
        return [f"{kind}{i}" for i in there]

    def outputs(self) -> list[int]:
        """The projections whose outputs the call returns."""
        return [2] if self.op == "mlp" else list(range(self.count))


def short(value: Any) -> str:
    """``value`` in a few words. Of several equal ones it has one."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, Tile):
        return "tiny" if value == TINY else "x".join(map(str, value))
    if isinstance(value, (tuple, set, frozenset)):
        return "-".join(dict.fromkeys(short(each) for each in value))
    if isinstance(value, float):
        return f"{value:g}"
    return SHORT[value] if isinstance(value, torch.dtype) else str(value)


def small(op: str, rows: int | tuple[int, ...] = 70, **changes: Any) -> Case:
    """A small call of one of OPS, with x of ``rows`` rows, or of these leading sizes."""
    leading = (rows,) if isinstance(rows, int) else rows
    found = {
        "linear": Case("linear", (*leading, 24)),
        "branch": Case("branch", (*leading, 24)),
        "group": Case("group", (*leading, 24), (20, 12, 12), (6, 3, 3)),
        "nf4": Case("linear", (*leading, 64), quantized=("nf4 nested",)),
        "fp8": Case("linear", (*leading, 64), quantized=("fp8",)),
        "mlp": Case("mlp", (*leading, 24), (40, 40, 20), (6, 3, 4), scalings=(0.5, 1.5, -0.75)),
    }[op]
    return found.but(**changes)


#: Rows on both sides of each backend's limits. PyTorch's operators run under ordinary autograd with fewer than 64 rows, and
#: without dropout with fewer than 512; from there on they have an autograd function of their own.
FEW, MANY = 5, {"torch": 520, "triton": 70}
#: The kinds of calls that :func:`small` makes.
OPS = ("linear", "branch", "group", "nf4", "mlp")


# Operands.


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` with other strides, and NaN in the gaps. "expanded" repeats its first row, or element, with stride 0.

    "negated": a view whose memory holds the values times -1, as that of a conjugate's imaginary part does.
    """
    if layout == "negated":
        return torch._neg_view(-t)
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t
    if layout == "contiguous":
        return t.contiguous()
    if layout == "transposed":
        return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 1 else t
    if layout == "shifted":
        flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype, device=t.device)
        return flat[1:].view(t.shape).copy_(t)
    step = 2 if layout == "every second" else 1
    gaps = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan, dtype=t.dtype, device=t.device)
    return gaps[..., 1 : 1 + step * t.shape[-1] : step].copy_(t)


def far(t: Tensor, pitch: int) -> Tensor:
    """``t`` with rows ``pitch`` elements apart, on pages of which few are ever touched."""
    size = ((t.shape[0] - 1) * pitch + t.shape[1]) * t.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    whole = torch.frombuffer(memory, dtype=t.dtype, count=size // t.element_size())
    return whole.as_strided(t.shape, (pitch, 1)).copy_(t)


def make(case: Case) -> Operands:
    """The operands by name, laid out; absent are those that the call does not have."""
    given: Operands = {}
    for i, (n, r) in enumerate(zip(case.sizes, case.ranks, strict=True)):
        *leading, k = (*case.shape[:-1], case.sizes[0]) if case.op == "mlp" and i == 2 else case.shape
        made: Operands = testing.make_inputs(
            (*leading, max(k, 1)), n, r or 1, dtype=case.dtype, lora_dtype=case.lora_dtype, bias=case.bias[i % len(case.bias)],
            device=DEVICE, seed=case.seed + i,
        )  # fmt: skip
        made |= {name: made[name][..., :k] for name in ("x", "weight", "lora_A")}
        if r is None:
            del made["lora_A"], made["lora_B"]
        if i:
            del made["x"]
        if i not in case.outputs():
            del made["grad"]
        if case.op == "branch":
            base = torch.nn.functional.linear(made["x"].double(), made.pop("weight").double())
            dtype = case.base_dtype or case.dtype
            made |= {"base_out": base.to(dtype), "grad": made["grad"].to(dtype), "bias": None}
        if (kind := case.quantized[i % len(case.quantized)]) is not None:
            made["weight"] = on_device(QUANTIZED[kind](n, k))
        for name, t in made.items():
            layout = case.layouts.get(name, "contiguous")
            key = name if name in ("x", "base_out") else f"{name}{i}"
            given[key] = laid_out(t, layout) if isinstance(t, Tensor) else t
    if case.shared:
        del given["lora_A1"]
    target = given.get(case.broken or "")
    if isinstance(target, Tensor) and target.numel():
        target[(0,) * target.dim()] = case.value
    return given


def on_device(weight: Any) -> Any:
    """A quantized weight where the tests run."""
    parts = {part.name: getattr(weight, part.name) for part in fields(weight)}
    return type(weight)(**{name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in parts.items()})


def leaves(case: Case, given: Operands) -> Operands:
    """``given``, of which those that the case wants require gradients, with the strides they came in."""
    wanted = set(case.wanted_names)
    return {
        name: t.detach().requires_grad_(name in wanted) if isinstance(t, Tensor) and not name.startswith("grad") else t
        for name, t in given.items()
    }


def projection(given: Operands, i: int, scaling: float) -> LoRAWeights:
    """Projection ``i`` of ``given``. A shared A is found under the number of gate."""
    b = given.get(f"lora_B{i}")
    a = None if b is None else given.get(f"lora_A{i}", given.get("lora_A0"))
    return LoRAWeights(given.get(f"weight{i}"), given.get(f"bias{i}"), a, b, scaling)


def projections(case: Case, given: Operands) -> list[LoRAWeights]:
    return [projection(given, i, case.scalings[i % len(case.scalings)]) for i in range(case.count)]


# The same call four times: by the op, by separate calls, by hand, and by the reference.


def ours(case: Case, given: Operands) -> tuple[Tensor, ...]:
    """The outputs of one call of the op."""
    parts, x, dropout = projections(case, given), given["x"], (case.p, case.training)
    if case.op == "branch":
        return (lora_branch(given["base_out"], x, *parts[0][2:], *dropout),)
    if case.op == "group":
        return lora_linear_group(x, *(list(each) for each in zip(*parts, strict=True)), *dropout)
    if case.op == "mlp":
        return (lora_mlp(x, *parts, case.activation, *dropout),)
    return (lora_linear(x, *parts[0], *dropout),)


def combined(case: Case, layer: Callable[[Tensor, int], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of a call whose projection ``i`` of an input is ``layer(input, i)``."""
    if case.op == "mlp":
        return (layer(ACTIVATIONS[case.activation](layer(x, 0)) * layer(x, 1), 2),)
    return tuple(layer(x, i) for i in range(case.count))


def separately(case: Case, given: Operands) -> tuple[Tensor, ...]:
    """The outputs of separate calls of ``lora_linear``."""
    parts = projections(case, given)

    def layer(x: Tensor, i: int) -> Tensor:
        if parts[i].lora_A is None:
            return torch.nn.functional.linear(x, parts[i].weight, parts[i].bias)
        return lora_linear(x, *parts[i], case.p)

    return combined(case, layer, given["x"])


def plain(weight: Any, dtype: torch.dtype) -> Tensor:
    """A weight in full."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    return testing.dequantized_ref(weight).to(DEVICE) if dtype == FP64 else weight.dequantize(dtype)


def by_hand(case: Case, given: Operands, keeps: Sequence[Tensor | None], p: float) -> tuple[Tensor, ...]:
    """The outputs as a user computes them, operator by operator in x's dtype."""
    parts = projections(case, given)

    def layer(x: Tensor, i: int) -> Tensor:
        weight, bias, a, b, scaling = parts[i]
        base = given["base_out"] if case.op == "branch" else torch.nn.functional.linear(x, plain(weight, x.dtype), bias)
        if a is None:
            return base
        dropped = x if keeps[i] is None else x * keeps[i].to(x.dtype) / (1 - p)
        return (base + dropped @ a.to(x.dtype).T @ b.to(x.dtype).T * scaling).to(base.dtype)

    return combined(case, layer, given["x"])


def by_reference(case: Case, given: Operands, keeps: Sequence[Tensor | None], p: float) -> tuple[Tensor, ...]:
    """The outputs of ``stablelora_kernels.reference``, for operands in float64."""
    parts, x = projections(case, given), given["x"]
    pairs = []
    for weight, bias, a, b, _ in parts:
        none = (x.new_zeros(0, weight.shape[1]), x.new_zeros(weight.shape[0], 0)) if a is None else (a, b)
        pairs.append((weight, bias, *none))
    if case.op == "branch":
        return (lora_branch_ref(given["base_out"], x, *parts[0][2:], keeps[0], p),)
    if case.op == "mlp":
        return (lora_mlp_ref(x, pairs, [part.scaling for part in parts], case.activation, keeps, p),)
    each = zip(pairs, parts, keeps, strict=True)
    return tuple(lora_linear_ref(x, *pair, part.scaling, keep, p) for pair, part, keep in each)


@contextmanager
def forced(case: Case) -> Iterator[None]:
    """The backend, the kernel, the GPU and the tile that the case names."""
    with ExitStack() as stack:
        stack.enter_context(slk.use_backend(case.backend))
        stack.enter_context(slk.use_kernel(case.kernel))
        if case.arch is not None:
            stack.enter_context(testing.pretend_gpu(case.arch, case.processors))
        if case.tile is not None:
            for name in (name for name in dir(tiles) if name.endswith("_TILES")):
                rule = (Rule(lambda d, c: True, case.tile, "a test"),)
                stack.enter_context(mock.patch.object(tiles, name, rule))
        yield


def run(
    case: Case, given: Operands | None = None, call: Callable[[Case, Operands], Sequence[Tensor]] = ours
) -> Results:
    """The outputs of ``call``, and the gradients that the case wants."""
    given = make(case) if given is None else given
    leaf = leaves(case, given)
    with forced(case):
        torch.manual_seed(case.seed)
        with torch.autocast(DEVICE, BF16, enabled=case.autocast):
            ys = call(case, leaf)
        return results(case, ys, leaf)


def results(case: Case, ys: Sequence[Tensor], leaf: Operands) -> Results:
    """The outputs and the gradients behind them by name."""
    found = {f"Y{i}": y.detach().clone() for i, y in enumerate(ys)}
    used = [(y, leaf[f"grad{i}"].to(y.dtype)) for i, y in zip(case.outputs(), ys, strict=True) if y.requires_grad]
    names = [name for name in case.wanted_names if isinstance(leaf.get(name), Tensor)]
    if not used:
        return found
    outputs, grads = zip(*used, strict=True)
    # The gradient of what an in-place operator makes of an output is that of the output before.
    outputs = [y.add_(1) if case.in_place else y for y in outputs]
    backward = slk.use_kernel(case.backward_kernel) if case.backward_kernel else nullcontext()
    with backward, torch.autocast(DEVICE, BF16, enabled=case.backward_in_autocast):
        torch.autograd.backward(outputs, grads)
    return found | {name: leaf[name].grad for name in names}
