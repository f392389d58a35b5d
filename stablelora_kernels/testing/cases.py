"""One call of any op as a :class:`Case`: its operands, and its results by the op.

A call is a list of projections, numbered from 0, and how they combine. Operands have names: "x",
"base_out" (of ``lora_branch``) and, for each projection, "weight0", "bias0", "lora_A0", "lora_B0"
and "grad0", the gradient of its output. A gated MLP has gate, up and down as projections 0, 1 and
2, and one output. Results are the outputs "Y0", ... and gradients by their operands' names.

An :class:`Op` is all that differs from op to op: ``testing/ops`` has a class for each.
``expectations`` compares with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from stablelora_kernels.dispatch import tiles
from stablelora_kernels.dispatch.problem import Rule
from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.functional import LoRAWeights
from stablelora_kernels.reference.rounding import Rounded
from stablelora_kernels.testing.bounds import SLOPES
from stablelora_kernels.testing.devices import pretend_gpu

BF16 = torch.bfloat16
FP16 = torch.float16
FP32 = torch.float32
FP64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16"}
LAYOUTS = ("contiguous", "transposed", "wider", "every second", "shifted", "expanded", "negated")
# Many tiles, ragged edges and several blocks of ranks at small sizes. Masks are read by words of 32
# columns.
TINY = Tile(32, 32, 16, 4, 2)
Operands = dict[str, Any]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A call. A tuple has an entry for each projection."""

    # A name in OPS; or a record of one of their classes, for an op with options of its own.
    op: str | Op = "linear"
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
    strategy: str = "auto"
    # Of backward, if it is another.
    backward_strategy: str | None = None
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
    # Of torch.
    device: str = DEVICE

    def __str__(self) -> str:
        """Sizes and dtypes, and each option that is not the default: a test's id."""
        shape, sizes, ranks = (
            "x".join(map(str, each)) for each in (self.shape, self.sizes, self.ranks)
        )
        words = [
            str(self.op),
            f"{shape}-{sizes}",
            f"r{ranks}",
            f"{SHORT[self.dtype]}/{SHORT[self.lora_dtype]}",
        ]
        for option in fields(self)[6:]:
            value = getattr(self, option.name)
            if value not in (option.default, {}) and (self.broken or option.name != "value"):
                words.append(
                    short(value) if isinstance(value, str) else f"{option.name}={short(value)}"
                )
        return " ".join(words)

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def description(self) -> Op:
        return OPS[self.op] if isinstance(self.op, str) else self.op

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype that the products of a call are stored in."""
        # Below some rows autograd calls plain operators, which a backward inside autocast runs in
        # bfloat16.
        lowered = self.autocast or (self.backward_in_autocast and self.dtype != FP64)
        return BF16 if lowered else self.dtype

    @property
    def wanted_names(self) -> list[str]:
        """The operands whose gradients are computed, in their order."""
        names = self.description.differentiable(self)
        if self.wanted is None:
            return names
        others = [f"{kind}{i}" for kind in ("weight", "bias") for i in range(self.count)]
        return [name for name in (*names, *others) if {name, name[:-1]} & set(self.wanted)]

    def of_branches(self, kind: str) -> list[str]:
        """The names of all A's, or of all B's. A shared A is one."""
        there = [
            i
            for i, r in enumerate(self.ranks)
            if r is not None and not (self.shared and (kind, i) == ("lora_A", 1))
        ]
        return [f"{kind}{i}" for i in there]

    def outputs(self) -> list[int]:
        """The projections whose outputs the call returns."""
        return self.description.outputs(self)


class Mask(NamedTuple):
    """A dropout mask, or None, and the probability that it is drawn with."""

    keep: Tensor | None = None
    p: float = 0.0


class Dropout(NamedTuple):
    """A mask that a call draws; none if p is 0."""

    shape: tuple[int, ...]
    p: float


@dataclass(frozen=True)
class Op:
    """The calls of one op: operands, the op's results, and what they must be.

    An option that no other op has is a field of its class. OPS has one record of each class.
    """

    # Whether it launches Triton kernels where Triton is the backend.
    has_kernels: ClassVar[bool] = True
    # By which share a result may be too large or too small as a whole; None: any.
    slopes: ClassVar[Mapping[torch.dtype, float] | None] = SLOPES

    def __str__(self) -> str:
        """The class, and each option that is not the default."""
        options = ((option, getattr(self, option.name)) for option in fields(self))
        changed = [f"{o.name}={short(value)}" for o, value in options if value != o.default]
        return " ".join([type(self).__name__, *changed])

    def outputs(self, case: Case) -> list[int]:
        """The projections whose outputs the call returns."""
        return list(range(case.count))

    def differentiable(self, case: Case) -> list[str]:
        """The operands whose gradients a case wants unless it says so."""
        return ["x", *case.of_branches("lora_A"), *case.of_branches("lora_B")]

    def make(self, case: Case) -> Operands:
        """The operands by name."""
        raise NotImplementedError

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        """The outputs of one call of the op."""
        raise NotImplementedError

    def dropouts(self, case: Case, operands: Operands) -> list[Dropout]:
        """The masks that a call draws, in their order."""
        return []

    def mask_tiles(self, case: Case, operands: Operands) -> list[int]:
        """Of how many rows a mask is drawn from a seed of its own, and of how many the next one;
        nothing: all rows at once.
        """
        return []

    def by_hand(self, case: Case, operands: Operands, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        """The outputs as a user computes them, operator by operator in x's dtype."""
        raise NotImplementedError

    def by_reference(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> tuple[Tensor, ...]:
        """The outputs of ``stablelora_kernels.reference``, for operands in float64."""
        raise NotImplementedError

    def roundings(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> dict[str, Rounded]:
        """How far rounding may move each part of the results, on any processor, as far as it is
        analyzed.
        """
        return {}

    def parts(self, case: Case, name: str, value: Tensor) -> Results:
        """The parts of a result that have a bound of their own, by their names."""
        return {name: value}

    def dtype_of(self, case: Case, name: str, value: Tensor) -> torch.dtype:
        """The dtype of the arithmetic of a result, of which eager PyTorch gives ``value``."""
        # Gradients are products in x's dtype; the output is rounded to base_out's.
        return value.dtype if name.startswith("Y") else case.arithmetic


#: The ops by their names in a :class:`Case`. ``testing/ops`` enters them.
OPS: dict[str, Op] = {}


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
    if isinstance(value, torch.dtype):
        return SHORT.get(value, str(value))
    return getattr(value, "__name__", str(value))


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` with other strides, and NaN in the gaps. "expanded" repeats its first row, or element,
    with stride 0.

    "negated": a view whose memory holds the values times -1, as that of a conjugate's imaginary
    part does.
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
    gaps = torch.full(
        (*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan, dtype=t.dtype, device=t.device
    )
    return gaps[..., 1 : 1 + step * t.shape[-1] : step].copy_(t)


def make(case: Case) -> Operands:
    """The operands by name, laid out; absent are those that the call does not have."""
    operands: Operands = {}
    for name, t in case.description.make(case).items():
        layout = case.layouts.get(name.rstrip("0123456789"), "contiguous")
        operands[name] = laid_out(t, layout) if isinstance(t, Tensor) else t
    target = operands.get(case.broken or "")
    if isinstance(target, Tensor) and target.numel():
        target[(0,) * target.dim()] = case.value
    return operands


def leaves(case: Case, operands: Operands) -> Operands:
    """``operands``, of which those that the case wants require gradients, with the strides they
    came in.
    """
    wanted = set(case.wanted_names)
    return {
        name: t.detach().requires_grad_(name in wanted)
        if isinstance(t, Tensor) and not name.startswith("grad")
        else t
        for name, t in operands.items()
    }


def projection(operands: Operands, i: int, scaling: float) -> LoRAWeights:
    """Projection ``i`` of ``operands``. A shared A is found under the number of gate."""
    b = operands.get(f"lora_B{i}")
    a = None if b is None else operands.get(f"lora_A{i}", operands.get("lora_A0"))
    return LoRAWeights(operands.get(f"weight{i}"), operands.get(f"bias{i}"), a, b, scaling)


def projections(case: Case, operands: Operands) -> list[LoRAWeights]:
    """The call's projections, as the ops take them."""
    return [
        projection(operands, i, case.scalings[i % len(case.scalings)]) for i in range(case.count)
    ]


def ours(case: Case, operands: Operands) -> tuple[Tensor, ...]:
    """The outputs of one call of the op."""
    return case.description.call(case, operands)


@contextmanager
def forced(case: Case) -> Iterator[None]:
    """The backend, the strategy, the GPU and the tile that the case names."""
    with ExitStack() as stack:
        stack.enter_context(settings(backend=case.backend))
        stack.enter_context(settings(strategy=case.strategy))
        if case.arch is not None:
            stack.enter_context(pretend_gpu(case.arch, case.processors))
        if case.tile is not None:
            for name in (name for name in dir(tiles) if name.endswith("_TILES")):
                rule = (Rule(lambda d, c: True, case.tile, "a test"),)
                stack.enter_context(mock.patch.object(tiles, name, rule))
        yield


def run(
    case: Case,
    operands: Operands | None = None,
    call: Callable[[Case, Operands], Sequence[Tensor]] = ours,
) -> Results:
    """The outputs of ``call``, and the gradients that the case wants."""
    operands = make(case) if operands is None else operands
    leaf = leaves(case, operands)
    with forced(case):
        torch.manual_seed(case.seed)
        with torch.autocast(case.device_type, BF16, enabled=case.autocast):
            ys = call(case, leaf)
        return results(case, ys, leaf)


def results(case: Case, ys: Sequence[Tensor], leaf: Operands) -> Results:
    """The outputs and the gradients behind them by name."""
    values = {f"Y{i}": y.detach().clone() for i, y in enumerate(ys)}
    used = [(i, y) for i, y in zip(case.outputs(), ys, strict=True) if y.requires_grad]
    if not used:
        return values
    grads = [leaf[f"grad{i}"].to(y.dtype) for i, y in used]
    # The gradient of what an in-place operator makes of an output is that of the output before.
    outputs = [y.add_(1) if case.in_place else y for _, y in used]
    backward = (
        settings(strategy=case.backward_strategy) if case.backward_strategy else nullcontext()
    )
    with backward, torch.autocast(case.device_type, BF16, enabled=case.backward_in_autocast):
        torch.autograd.backward(outputs, grads)
    names = [name for name in case.wanted_names if isinstance(leaf.get(name), Tensor)]
    return values | {name: leaf[name].grad for name in names}
