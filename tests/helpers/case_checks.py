"""Checks of a :class:`Case`: its error within its bound, torch.compile, saved bytes; tables of
cases and random ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.quantized import WEIGHTS
from stablelora_kernels.reference.rounding import Rounded
from stablelora_kernels.testing.cases import (
    BF16,
    DEVICE,
    FP64,
    LAYOUTS,
    Case,
    Operands,
    Results,
    forced,
    leaves,
    make,
    ours,
    run,
)
from stablelora_kernels.testing.expectations import (
    Expected,
    as_computed,
    expectations,
)
from stablelora_kernels.testing.inputs import ROW_UNITS
from tests.helpers.cases import DTYPES, kinds_of
from tests.helpers.covering import covering
from tests.helpers.launches import count_launches, recorded_launches


def check(
    case: Case,
    found: Results,
    given: Operands | None = None,
    keep: Tensor | None = None,
    where_eager_is_finite: bool = False,
) -> tuple[float, str]:
    """Each result has its operand's dtype and is as near to float64 as
    :func:`stablelora_kernels.testing.assert_no_worse` asks.

    Return the largest error as a share of its bound, and of which result. ``keep``: the dropout
    mask, if it is not that of a run of the case. ``where_eager_is_finite``: operands may hold NaN
    and infinity, and only finite elements are compared.
    """
    given = make(case) if given is None else given
    # oneDNN's AMX instructions read the gaps between bfloat16 rows, so a baseline that has to be
    # finite has none.
    wanted = expectations(case, given, keep, contiguous=where_eager_is_finite)
    assert found.keys() == wanted.keys()
    outputs = dict.fromkeys(
        (f"Y{i}" for i in range(3)), given.get("base_out", as_computed(case, given)["x"])
    )
    like = given | outputs
    broken = any(isinstance(t, Tensor) and not t.isfinite().all() for t in given.values())
    largest = 0.0, ""
    for name, value in found.items():
        assert value.dtype == like[name].dtype, name
        if name == "base_out":
            # It is only added to.
            assert torch.equal(value, given["grad0"]) or broken
            continue
        expected = wanted[name]
        finite = value.isfinite() & expected.ref.isfinite() & expected.baseline.isfinite()
        if where_eager_is_finite and not finite.all():
            check_finite_part(name, value, expected, broken)
            continue
        compared = expected.check(value, name)
        largest = max([largest, *((one.share, one.of) for one in compared)])
    return largest


def check_finite_part(name: str, value: Tensor, expected: Expected, broken: bool) -> None:
    """A result is finite where eager PyTorch's is, and there each element has the usual bound."""
    ref, eager, dtype, rounding, _ = expected
    assert value.shape == ref.shape, (name, value.shape, ref.shape)
    if broken:
        # Which of NaN and infinity comes out depends on the order of a sum.
        assert torch.equal(value.isfinite(), eager.isfinite()), (
            f"{name} is finite elsewhere than eager's"
        )
    # Eager PyTorch isn't finite either where oneDNN's AMX instructions read the gaps between
    # bfloat16 rows of odd length.
    finite = ref.isfinite() & eager.isfinite()
    assert broken or bool(value.isfinite()[finite].all()), f"{name} is not finite"
    finite &= value.isfinite()
    if rounding is not None:
        values, deviation = (
            t.view(ref.shape)[finite] for t in (rounding.exact, rounding.deviation)
        )
        rounding = Rounded(values, deviation)
    farthest = testing.farthest_element(
        value[finite], ref[finite], eager[finite], dtype, rounding, name
    )
    assert farthest.error <= farthest.bound, (
        f"{name} is off by {farthest.error:.3e}, allowed {farthest.bound:.3e}"
    )


def assert_close(found: Results, other: Results, tolerance: float = 0.0) -> None:
    """The same results to ``tolerance``, relative and absolute; to the bit if it is 0."""
    assert found.keys() == other.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value,
            other[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_compiled(function: Callable[..., Any], tensors: Sequence[Tensor], grads: Any) -> None:
    """torch.compile takes ``function`` whole; its outputs and gradients are those without it."""
    torch._dynamo.reset()
    found_by = []
    for each in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        given = [tensor.detach().requires_grad_() for tensor in tensors]
        torch.manual_seed(7)
        outputs = each(*given)
        found = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        found_by.append((*found, *torch.autograd.grad(outputs, given, grads)))
    for one, other in zip(*found_by, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def launches(case: Case) -> tuple[Counter[str], Counter[str]]:
    """How often a call launches each kernel, forward and backward, by the names that explain() has
    for them.
    """
    leaf, counts = leaves(case, make(case)), []
    with forced(case):
        with count_launches() as made:
            ys = ours(case, leaf)
        counts.append(made)
        with count_launches() as made:
            torch.autograd.backward(ys, [leaf[f"grad{i}"] for i in case.outputs()])
        counts.append(made)
    forward, backward = (
        Counter({name.removeprefix("_").removesuffix("_kernel"): n for name, n in made.items()})
        for made in counts
    )
    return forward, backward


def run_recorded(case: Case) -> tuple[list[Any], Results]:
    """The launches of a call, as the kernels were told them, and its results."""
    given = make(case)
    named = {
        t.data_ptr(): name
        for name, t in given.items()
        if isinstance(t, Tensor) and t.numel() and not name.startswith("grad")
    }
    with recorded_launches(named) as launches:
        return launches, run(case, given)


def bytes_held(made: Callable[[], Any], given: Iterable[Tensor]) -> int:
    """Bytes that the graph of ``made()`` holds for backward, other than of the tensors ``given``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = made()
    assert all(
        y.requires_grad for y in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))
    )
    return sum(held.values())


def held_by(case: Case, besides: Iterable[str] = ()) -> int:
    """Bytes that a call holds for backward, other than of its operands; those of ``besides`` count."""
    leaf = leaves(case, make(case))
    known = []
    for operand in (t for name, t in leaf.items() if name not in besides and t is not None):
        known += (
            [operand]
            if isinstance(operand, Tensor)
            else [operand.stored.data, *operand.stored.scales]
        )
    with forced(case):
        return bytes_held(lambda: ours(case, leaf), known)


# Tables and random cases.


def table(
    build: Callable[..., Case | None], drawn: int = 200, by_day: int = 2, **axes: Sequence[Any]
) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: cases that ``build`` makes of random values of
    the axes.

    ``build`` returns None for a call that cannot be. Every pair of two axes' values that can be is
    there at night and on a GPU, in at least ``drawn`` cases; by day every ``by_day`` values.
    """
    numbers, rows, cases = random.Random(0), [], []

    def draw(**fixed: int) -> None:
        for _ in range(30):
            row = {
                name: fixed.get(name, numbers.randrange(len(values)))
                for name, values in axes.items()
            }
            case = (
                None
                if row in rows
                else build(**{name: axes[name][place] for name, place in row.items()})
            )
            if case is not None:
                rows.append(row)
                cases.append(case)
                return

    for _ in range(drawn):
        draw()
    seen = {pair for row in rows for pair in combinations(row.items(), 2)}
    for (one, ones), (other, others) in combinations(axes.items(), 2):
        for pair in product(range(len(ones)), range(len(others))):
            if ((one, pair[0]), (other, pair[1])) not in seen:
                draw(**{one: pair[0], other: pair[1]})
    kept = {*covering(rows, by_day)} if DEVICE == "cpu" else {*range(len(rows))}
    return [
        pytest.param(case, id=str(case), marks=() if i in kept else pytest.mark.nightly)
        for i, case in enumerate(cases)
    ]


SIZES = [1, 2, 3, 8, 16, 17, 24, 31, 40, 64]
RANKS = [1, 2, 3, 4, 8, 16, 17, 20, 33, 70]
# Up to the rows below which the PyTorch path calls plain operators, and above a tile.
LEADING = [
    (),
    *[(rows,) for rows in (0, 1, 2, 5, 17, 63, 64, 65, 130)],
    (3, 5),
    (2, 1, 33),
    (2, 0, 3),
]
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "grad", "base_out")


def widened(k: int, kinds: Sequence[str | None]) -> int:
    """The next width from k on that rows of every kind can have."""
    return k + -k % max(1 if kind is None else ROW_UNITS[kind] for kind in kinds)


@st.composite
def calls(draw: st.DrawFn, backends: Sequence[str] = ("torch", "triton")) -> Case:
    """A call of any op, in sizes that shrink to the smallest."""

    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    def several(*values: Any) -> tuple[Any, ...]:
        return tuple(pick(*values) for _ in range(count))

    backend = pick(*backends)
    dtype, lora_dtype = pick(*DTYPES, (FP64, FP64)) if backend == "torch" else pick(*DTYPES)
    op = pick("linear", "branch", "group", *WEIGHTS, "mlp")
    count = 3 if op == "mlp" else pick(1, 2, 3) if op == "group" else 1
    k = pick(*SIZES)
    sizes = several(*SIZES)
    ranks = several(*RANKS)
    shared = False
    quantized = (None,)
    if op == "mlp":
        shared, quantized = pick(False, False, True), several(None, None, None, *WEIGHTS)
        k, inner = widened(k, quantized[:2]), widened(sizes[0], quantized[2:])
        sizes = (inner, inner, sizes[2])
        ranks = (
            (ranks[0], ranks[0], ranks[2]) if shared else tuple(pick(*[r] * 6, None) for r in ranks)
        )
    elif op in WEIGHTS:
        k = widened(k, (op,))
        op, quantized = "linear", (pick(*kinds_of(op)),)
    names = ["x", *(f"{kind}{i}" for kind in NAMES[1:5] for i in range(count))]
    wanted = draw(st.sets(st.sampled_from(["base_out", *names])))
    # Separate layers draw the mask of a shared A by PyTorch's operators, on Triton too.
    trained = any(name.startswith(("weight", "bias")) for name in wanted)
    apart = (
        shared and backend == "triton" and (trained or len(wanted & {"lora_B0", "lora_B1"}) == 1)
    )
    p, autocast = 0.0 if apart else pick(0.0, 0.0, 0.3), pick(False, True) and dtype != FP64
    layouts = {name: pick(*LAYOUTS) for name in NAMES}
    if backend == "torch" and (dtype == BF16 or autocast):
        # oneDNN's AMX instructions read the gaps between bfloat16 rows.
        layouts = {
            name: "shifted" if layout == "wider" else layout for name, layout in layouts.items()
        }
    broken = pick(None, pick(*names, "grad0", "grad2"))
    # An expanded tensor has one element for many.
    if p or layouts[(broken or "x").rstrip("012")] == "expanded":
        broken = None
    return Case(
        op,
        (*pick(*LEADING), k),
        sizes,
        ranks,
        dtype,
        lora_dtype,
        p=p,
        backend=backend,
        strategy=pick("auto", "one_launch", "branch_first"),
        quantized=quantized,
        bias=several(False, True),
        scalings=several(1.0, 1.7, -0.3, 0.0, 64.0 if op != "mlp" else 1.0),
        activation=pick(*ACTIVATIONS),
        shared=shared,
        layouts=layouts,
        wanted=frozenset(wanted),
        autocast=autocast,
        backward_in_autocast=pick(False, True),
        in_place=pick(False, True),
        broken=broken,
        value=pick(torch.nan, torch.inf, -torch.inf),
        seed=draw(st.integers(0, 99)),
    )
