"""The op of ``fuse_mlp`` for modules of experts against its float64 reference: a block of experts
at a time, all together, and by PyTorch's grouped product, which here runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from stablelora_kernels.functional import NF4Experts
from stablelora_kernels.ops import cpu_products, dropout
from stablelora_kernels.ops.dropout import POSITIONS_FROM
from stablelora_kernels.ops.lora_experts import autograd as lora_experts
from stablelora_kernels.ops.lora_experts import loop
from stablelora_kernels.ops.lora_experts_mlp import autograd as lora_experts_mlp
from stablelora_kernels.ops.lora_experts_mlp import blocks
from stablelora_kernels.testing.cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    Case,
    Operands,
    Results,
    leaves,
    make,
    ours,
    run,
)
from stablelora_kernels.testing.expectations import masks, oracle
from stablelora_kernels.testing.ops.lora_experts_mlp import ExpertsMLP, interleaved_gate
from tests.helpers.case_checks import assert_close, check
from tests.helpers.packed_stacks import nf4

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
# Experts, widths in, inner and out, tokens, slots of a token.
E, H, I, N, T, TOP = 4, 16, 24, 32, 23, 3
LEAVES = {"x", "weights", "lora_A0", "lora_B0", "lora_A1", "lora_B1"}
# Some chosen experts are other processes'.
OTHERS = tuple(range(E + 2))


def silu_gate(g: torch.Tensor) -> torch.Tensor:
    gate, up = g.chunk(2, -1)
    return silu(gate) * up


def clamped_gate(g: torch.Tensor) -> torch.Tensor:
    """gpt-oss's: interleaved, with a limit."""
    gate = g[..., ::2].clamp(max=1.5)
    up = g[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def relu2(g: torch.Tensor) -> torch.Tensor:
    return torch.relu(g).square()


def experts(
    dtype: torch.dtype = FP32,
    lora_dtype: torch.dtype = FP32,
    weights_dtype: torch.dtype = FP32,
    gate: Callable[[torch.Tensor], torch.Tensor] = silu_gate,
    tokens: int = T,
    ranks: tuple[int, int] = (3, 5),
    bias: bool = False,
    p: float = 0.0,
    wanted: tuple[str, ...] | None = None,
    **options: Any,
) -> Case:
    """A call; ``options`` are those of :class:`ExpertsMLP`."""
    described = {"experts": E, "chosen": tuple(range(E)), "slots": TOP} | options
    return Case(
        ExpertsMLP(gate, weights_dtype=weights_dtype, **described),
        (tokens, H),
        (I if gate is relu2 else 2 * I, N),
        ranks,
        dtype,
        lora_dtype,
        p=p,
        bias=(bias, bias),
        wanted=wanted,
        backend="torch",
        device="cpu",
    )


def double(**options: Any) -> Case:
    return experts(FP64, FP64, FP64, **options)


def in_tiles(case: Case, tiled: bool | int) -> Case:
    return case.but(op=replace(case.op, tiled=tiled))


EXACT = [
    double(bias=True, packed=True),
    double(gate=clamped_gate, bias=True, transposed=True),
    double(gate=relu2, chosen=OTHERS),
    double(bias=True, chosen=OTHERS, p=0.3, down_p=0.0),
    double(p=0.3, down_p=0.5, transposed=True, packed=True),
    double(ranks=(0, 5), p=0.3),
    double(ranks=(3, 0), bias=True),
    double(chosen=(0,)),
    double(tokens=0, bias=True),
    *(double(wanted=(name,), bias=True, p=0.2) for name in sorted(LEAVES)),
    double(wanted=("lora_A1", "lora_B1")),
    double(wanted=("x", "lora_A0", "lora_B1")),
]
# A rounding to bfloat16 decides on which side of clamped_gate's limits a value is.
LOW = [
    experts(bias=True, packed=True),
    experts(BF16, BF16, BF16, packed=True, bias=True),
    experts(BF16, bias=True, gate=interleaved_gate, transposed=True, chosen=OTHERS[: E + 1]),
    experts(BF16, gate=relu2, p=0.3),
    experts(FP16, FP16, FP16),
    experts(FP16, bias=True),
]
# As on GPUs.
GROUPED = [
    experts(BF16, BF16, BF16, bias=True, packed=True),
    experts(BF16, bias=True, chosen=OTHERS, gate=interleaved_gate, transposed=True),
    experts(BF16, gate=relu2, p=0.3),
    experts(BF16, ranks=(0, 5), wanted=("x", "weights", "lora_A1", "lora_B1")),
    experts(BF16, chosen=(0,), bias=True),
]
# "blocks": a block of experts at a time; "together"; "grouped": together, by PyTorch's product.
WAYS = ("blocks", "together", "grouped")
CASES = [
    *(("blocks", case) for case in EXACT),
    *(("together", case) for case in EXACT),
    *(("blocks", case) for case in LOW),
    *(("grouped", case) for case in GROUPED),
    # In tiles of 5 of the 23 tokens, and in one.
    *(("blocks", in_tiles(case, 5)) for case in [*EXACT, *LOW]),
    *(("together", in_tiles(case, 5)) for case in EXACT),
    # Seed 1: of 40 seeds, two exceed twice eager's error, with tiles (0 among them) and without.
    *(("grouped", in_tiles(case.but(seed=1), 5)) for case in GROUPED),
    *((way, in_tiles(case, True)) for way in ("blocks", "together") for case in EXACT[:6]),
]


def check_all(case: Case, found: Results, given: Operands) -> None:
    """Each result is as near to float64 as it must be."""
    if case.dtype == FP64:
        assert_close(found, oracle(case, given, masks(case, given)), 1e-12)
    else:
        check(case, found, given)


@pytest.fixture
def take(monkeypatch) -> Callable[[str], None]:
    """Take a way."""

    def choose(way: str) -> None:
        monkeypatch.setattr(lora_experts_mlp, "_is_by_blocks", lambda x: way == "blocks")
        monkeypatch.setattr(lora_experts, "can_group", lambda x, stack: way == "grouped")

    return choose


@pytest.mark.parametrize(
    ("way", "case"), [pytest.param(way, case, id=f"{way} {case}") for way, case in CASES]
)
def test_matches_the_oracle(way, case, take):
    take(way)
    given = make(case)
    results = run(case, given)
    assert results.keys() == {"Y0", *(case.wanted or LEAVES)}
    check_all(case, results, given)
    if "weights" in results and max(case.op.chosen) >= E:
        others = given["index"] >= E
        assert others.any() and not results["weights"][others].any()


@pytest.mark.parametrize("rows", [1, 20, 1000])
@pytest.mark.parametrize("case", [EXACT[1], EXACT[3], EXACT[4], double(p=0.1)], ids=str)
def test_blocks_of_any_size_are_right(case, rows, monkeypatch):
    """Of one expert each, of a few, and of all. Masks at 0.1 are positions, also of few slots; a run
    of A and B is one expert.
    """
    monkeypatch.setattr(blocks, "_ROWS_OF_BLOCK", rows)
    monkeypatch.setattr(loop, "_BYTES_OF_A_RUN", 0)
    monkeypatch.setattr(dropout, "POSITIONS_FROM", 1)
    given = make(case)
    check_all(case, run(case, given), given)


@pytest.mark.parametrize("wanted", [None, ("lora_A1", "lora_B1")])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_packed_stack_is_read_expert_by_expert(transposed, wanted, monkeypatch):
    case = double(bias=True, transposed=transposed, wanted=wanted)
    given = make(case)
    packed = in_4_bits(given)
    read: dict[int, list[int]] = {stack.data.data_ptr(): [] for stack in packed.values()}
    expert = NF4Experts.expert

    def noted(self: NF4Experts, place: int, dtype: torch.dtype) -> torch.Tensor:
        read[self.data.data_ptr()].append(place)
        return expert(self, place, dtype)

    monkeypatch.setattr(NF4Experts, "expert", noted)
    check_all(case, run(case, given | packed), given | values_of(packed))
    # Forward, and backward if it needs them.
    passes = 1 if wanted else 2
    assert [*read.values()] == [[*range(E)] * passes] * 2


def in_4_bits(given: Operands) -> Operands:
    """Packed stacks of the sizes of those that were made."""
    names = ("weight0", "weight1")
    return {name: nf4(*given[name].shape, nested=True).packed for name in names}


def values_of(packed: Operands) -> Operands:
    return {name: stack.experts(0, E, FP64) for name, stack in packed.items()}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", ["blocks", "together"])
def test_stacks_in_4_bits(way, transposed, take):
    take(way)
    case = double(bias=True, transposed=transposed, p=0.3)
    given = make(case)
    packed = in_4_bits(given)
    check_all(case, run(case, given | packed), given | values_of(packed))


@pytest.mark.parametrize("way", ["blocks", "together"])
def test_a_token_may_choose_an_expert_twice(way, take):
    take(way)
    case = double(bias=True)
    given = make(case)
    given["index"][:, 1] = given["index"][:, 0]
    check_all(case, run(case, given), given)


def test_low_precision_that_the_processor_does_not_multiply(monkeypatch):
    monkeypatch.setattr(cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, False))
    case = experts(BF16, bias=True, p=0.3)
    given = make(case)
    check_all(case, run(case, given), given)


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_without_gradients_is_the_same(way, take):
    take(way)
    case = experts(BF16, bias=True)
    given = make(case)
    leaf = leaves(case, given)
    (y,) = ours(case, leaf)
    with torch.no_grad():
        assert torch.equal(ours(case, leaf)[0], y)
    (plain,) = ours(case, given)
    assert torch.equal(plain, y) and not plain.requires_grad


def saved_by(case: Case, leaf: Operands) -> list[torch.Tensor]:
    """What autograd saves for a call."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(case, leaf)
    return saved


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("way", ["blocks", "together"])
def test_it_keeps_x_by_tokens_the_output_of_up_and_its_s(way, p, take):
    """T H + slots (2 I + r) elements, the indices, and dropout's recipes."""
    take(way)
    tokens, r = 3000, 3
    case = experts(BF16, BF16, BF16, tokens=tokens, ranks=(r, 5), p=p)
    leaf = leaves(case, make(case))
    slots = tokens * TOP
    arguments = {t.data_ptr() for name, t in leaf.items() if t is not None and name != "x"}
    kept = [t for t in saved_by(case, leaf) if t.data_ptr() not in arguments]
    elements = sum(t.numel() for t in kept if t.dtype == BF16)
    assert elements == tokens * H + slots * (2 * I + r)
    assert sum(t.numel() for t in kept if t.dtype == torch.int64) == slots
    others = [t for t in kept if t.dtype not in (BF16, torch.int64)]
    recipes = [t for t in others if t.numel() != E]
    assert len(recipes) == (2 if p else 0) and len(others) == len(recipes) + 1
    assert slots * H >= POSITIONS_FROM
    for recipe, width in zip(recipes, (H, I), strict=bool(p)):
        if p == 0.1:
            share = recipe.numel() / (slots * width)
            assert recipe.dtype == torch.int32 and 0.09 < share < 0.11
        else:
            assert recipe.dtype == torch.uint8 and recipe.numel() < 1e4


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("way", ["blocks", "together"])
def test_tiles_keep_x_and_the_routing_alone(way, p, take):
    """And a seed for each tile and stack."""
    take(way)
    case = in_tiles(experts(BF16, BF16, BF16, tokens=3000, p=p), 1000)
    leaf = leaves(case, make(case))
    arguments = {t.data_ptr() for name, t in leaf.items() if t is not None and name != "x"}
    kept = [t for t in saved_by(case, leaf) if t.data_ptr() not in arguments]
    assert sum(t.numel() for t in kept if t.dtype == BF16) == 3000 * H
    others = {t.numel() for t in kept if t.dtype != BF16}
    assert others == {3000 * TOP, E, *([3 * 2 * 2] if p else [])}


def test_a_checkpoint_computes_no_forward_of_tiles_again():
    """It stops at the node in front, if nothing behind the experts saves their output."""
    case = in_tiles(double(bias=True), 5)
    given, forwards = make(case), []
    own = lora_experts_mlp._tiled_forward

    def call(case: Case, leaf: Operands) -> tuple[torch.Tensor, ...]:
        def layer(x: torch.Tensor) -> torch.Tensor:
            return ours(case, leaf | {"x": x.sin()})[0] + 1.0

        return (checkpoint(layer, leaf["x"], use_reentrant=False),)

    with mock.patch.object(
        lora_experts_mlp, "_tiled_forward", lambda *args: forwards.append(1) or own(*args)
    ):
        run(case, given, call)
    assert len(forwards) == 1


def test_only_what_a_wanted_gradient_reads_is_kept():
    for wanted, is_x, is_s in (
        ("lora_A0", True, False),
        ("lora_B0", False, True),
        ("x", False, False),
    ):
        case = experts(BF16, BF16, BF16, ranks=(3, 5), wanted=(wanted,))
        shapes = [tuple(t.shape) for t in saved_by(case, leaves(case, make(case)))]
        assert ((T, H) in shapes) == is_x, wanted
        assert ((T * TOP, 3) in shapes) == is_s, wanted
        assert (T * TOP, 2 * I) in shapes


@pytest.mark.parametrize("way", WAYS)
def test_results_repeat_to_the_bit(way, take):
    take(way)
    case = experts(BF16, BF16, tokens=200, bias=True, p=0.1)
    assert_close(run(case), run(case))


@pytest.mark.parametrize("way", WAYS)
def test_sums_over_a_tokens_slots_are_in_float32(way, take):
    """Bfloat16 would round 1 + 2^-8 to 1, twice."""
    take(way)
    case = experts(BF16, BF16, BF16, gate=relu2, ranks=(0, 0), wanted=("x",))
    down_weight = torch.zeros(E, N, I, dtype=BF16)
    down_weight[..., 0] = 1
    found = run(
        case,
        make(case)
        | {
            "x": torch.ones(T, H, dtype=BF16),
            "index": torch.arange(TOP).expand(T, TOP),
            "weights": torch.tensor([1.0, 2**-8, 2**-8], dtype=BF16).expand(T, TOP),
            "weight0": torch.full((E, I, H), 1 / H, dtype=BF16),
            "weight1": down_weight,
            "grad1": torch.ones(T, N, dtype=BF16),
        },
    )
    assert (found["Y0"] == 1 + 2**-7).all() and (found["x"] == 2 * N / H * (1 + 2**-7)).all()


def test_together_reads_nothing_on_the_host(take, monkeypatch):
    take("grouped")
    case = experts(BF16, bias=True, chosen=OTHERS, p=0.3)
    leaf = leaves(case, make(case))

    def refuse(*args: object) -> None:
        raise AssertionError("the host read a tensor")

    for name in ("tolist", "item", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    (y,) = ours(case, leaf)
    y.backward(leaf["grad1"])


@pytest.mark.parametrize("name", ["lora_B1", "weight0", "weight1"])
def test_a_change_before_backward_is_noticed(name):
    """Of an operand; merging changes a weight in place."""
    case = experts()
    leaf = leaves(case, make(case))
    (y,) = ours(case, leaf)
    with torch.no_grad():
        leaf[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(leaf["grad1"])


def test_the_gate_runs_in_the_products_dtype_outside_autocast():
    dtypes = []

    def gate(g: torch.Tensor) -> torch.Tensor:
        dtypes.append((g.dtype, torch.is_autocast_enabled("cpu")))
        return silu_gate(g).float()

    case = experts(BF16)
    leaf = leaves(case, make(case))
    with torch.autocast("cpu", BF16):
        (y,) = ours(case.but(op=replace(case.op, gate=gate)), leaf)
        y.backward(leaf["grad1"])
    assert set(dtypes) == {(BF16, False)} and y.dtype == BF16
    # 69 rows of 4 experts are two blocks.
    assert len(dtypes) == 2 * 2
