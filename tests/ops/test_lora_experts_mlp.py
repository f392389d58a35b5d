"""The op of ``fuse_mlp`` for modules of experts against its float64 reference: a block of experts
at a time, all together, and by PyTorch's grouped product, which here runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import silu

from stablelora_kernels.functional import NF4Experts
from stablelora_kernels.ops import cpu_products, dropout
from stablelora_kernels.ops.dropout import POSITIONS_FROM, draw_keep
from stablelora_kernels.ops.lora_experts import autograd as lora_experts
from stablelora_kernels.ops.lora_experts import loop
from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.ops.lora_experts_mlp import autograd as lora_experts_mlp
from stablelora_kernels.ops.lora_experts_mlp import blocks
from stablelora_kernels.ops.lora_experts_mlp.autograd import lora_experts_mlp_op
from stablelora_kernels.ops.lora_experts_mlp.call import Routing
from stablelora_kernels.reference.lora import lora_experts_mlp_ref
from stablelora_kernels.testing import assert_no_worse
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64
from tests.helpers.packed_stacks import nf4

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
LEAVES = ("x", "weights", "up_a", "up_b", "down_a", "down_b")
# Experts, widths in, inner and out, tokens, slots of a token, scalings.
E, H, I, N, T, TOP, S_UP, S_DOWN = 4, 16, 24, 32, 23, 3, 1.7, -0.6


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


GATES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "silu": (silu_gate, 2),
    "clamped": (clamped_gate, 2),
    "relu2": (relu2, 1),
}


class Case(NamedTuple):
    dtype: torch.dtype = FP32
    lora_dtype: torch.dtype = FP32
    weights_dtype: torch.dtype = FP32
    gate: str = "silu"
    # How many of the E experts are chosen; those behind are other processes'.
    chosen: int = E
    tokens: int = T
    # Ranks of up and down.
    ranks: tuple[int, int] = (3, 5)
    # Probabilities of up and down.
    ps: tuple[float, float] = (0.0, 0.0)
    transposed: bool = False
    # B as PEFT packs it, with the expert fastest.
    packed: bool = False
    bias: bool = False
    # "blocks": a block of experts at a time; "together"; "grouped": together, as on GPUs.
    way: str = "blocks"
    wanted: tuple[str, ...] = LEAVES

    def __str__(self) -> str:
        return " ".join(
            f"{name}={value}"
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
        )


DOUBLE = Case(FP64, FP64, FP64)
EXACT = [
    DOUBLE._replace(**options)  # type: ignore[arg-type]
    for options in (
        {"bias": True, "packed": True},
        {"gate": "clamped", "bias": True, "transposed": True},
        {"gate": "relu2", "chosen": E + 2},
        {"bias": True, "chosen": E + 2, "ps": (0.3, 0.0)},
        {"ps": (0.3, 0.5), "transposed": True, "packed": True},
        {"ranks": (0, 5), "ps": (0.3, 0.3)},
        {"ranks": (3, 0), "bias": True},
        {"chosen": 1},
        {"tokens": 0, "bias": True},
        *({"wanted": (name,), "bias": True, "ps": (0.2, 0.2)} for name in LEAVES),
        {"wanted": ("down_a", "down_b")},
        {"wanted": ("x", "up_a", "down_b")},
    )
]
LOW = [
    Case(**options)  # type: ignore[arg-type]
    for options in (
        {"bias": True, "packed": True},
        {"dtype": BF16, "lora_dtype": BF16, "weights_dtype": BF16, "packed": True, "bias": True},
        {"dtype": BF16, "bias": True, "gate": "clamped", "transposed": True, "chosen": E + 1},
        {"dtype": BF16, "gate": "relu2", "ps": (0.3, 0.3)},
        {"dtype": FP16, "lora_dtype": FP16, "weights_dtype": FP16},
        {"dtype": FP16, "bias": True},
    )
]
GROUPED = [
    Case(BF16, way="grouped", **options)  # type: ignore[arg-type]
    for options in (
        {"bias": True, "packed": True, "lora_dtype": BF16, "weights_dtype": BF16},
        {"bias": True, "chosen": E + 2, "gate": "clamped", "transposed": True},
        {"gate": "relu2", "ps": (0.3, 0.3)},
        {"ranks": (0, 5), "wanted": ("x", "weights", "down_a", "down_b")},
        {"chosen": 1, "bias": True},
    )
]
CASES = [*EXACT, *(case._replace(way="together") for case in EXACT), *LOW, *GROUPED]


class Made(NamedTuple):
    """The operands of a case. Leaves are those that it wants gradients of."""

    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    up_a: torch.Tensor
    up_b: torch.Tensor
    down_weight: torch.Tensor
    down_bias: torch.Tensor | None
    down_a: torch.Tensor
    down_b: torch.Tensor
    grad: torch.Tensor


def make(case: Case) -> Made:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = case.dtype, terms: int = 1) -> torch.Tensor:
        """``terms``: of the sums that its numbers are factors in, which stay near 1."""
        numbers = torch.randn(shape, generator=generator, dtype=FP64)
        return (numbers / max(terms, 1) ** 0.5).to(dtype)

    def stack(n: int, k: int) -> torch.Tensor:
        return draw(E, k, n, terms=k) if case.transposed else draw(E, n, k, terms=k)

    def lora_A(r: int, k: int) -> torch.Tensor:
        return draw(E, r, k, dtype=case.lora_dtype, terms=k)

    def lora_B(n: int, r: int) -> torch.Tensor:
        b = draw(n, r, E, dtype=case.lora_dtype, terms=r).permute(2, 0, 1)
        return b if case.packed else b.contiguous()

    up_r, down_r = case.ranks
    g = GATES[case.gate][1] * I
    choices = [
        torch.randperm(case.chosen, generator=generator)[:TOP]
        if case.chosen >= TOP
        else torch.zeros(TOP, dtype=torch.int64)
        for _ in range(case.tokens)
    ]
    weights = torch.rand(case.tokens, TOP, generator=generator, dtype=FP64) + 0.1
    made = Made(
        x=draw(case.tokens, H),
        index=torch.stack(choices) if choices else torch.zeros(0, TOP, dtype=torch.int64),
        weights=weights.to(case.weights_dtype),
        up_weight=stack(g, H),
        up_bias=draw(E, g) if case.bias else None,
        up_a=lora_A(up_r, H),
        up_b=lora_B(g, up_r),
        down_weight=stack(N, I),
        down_bias=draw(E, N) if case.bias else None,
        down_a=lora_A(down_r, I),
        down_b=lora_B(N, down_r),
        grad=draw(case.tokens, N),
    )
    for name in case.wanted:
        getattr(made, name).requires_grad_()
    return made


def routing_of(made: Made) -> Routing:
    expert_of_slot, order = torch.sort(made.index.reshape(-1), stable=True)
    offsets = torch.searchsorted(expert_of_slot, torch.arange(E), right=True, out_int32=True)
    return Routing(order, offsets, made.weights)


def call(case: Case, made: Made, gate: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    transposed = case.transposed
    up_operands = (made.up_weight, made.up_bias, made.up_a, made.up_b)
    down_operands = (made.down_weight, made.down_bias, made.down_a, made.down_b)
    return lora_experts_mlp_op(
        made.x,
        routing_of(made),
        gate or GATES[case.gate][0],
        ExpertStack(*up_operands, S_UP, transposed, case.ps[0]),
        ExpertStack(*down_operands, S_DOWN, transposed, case.ps[1]),
    )


def run(case: Case, made: Made) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    y = call(case, made)
    y.backward(made.grad)
    grads = {name: getattr(made, name).grad for name in case.wanted}
    return {"Y": y.detach()} | {f"d{name}": grad for name, grad in grads.items()}


def expected(case: Case, made: Made, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The results by the reference in ``dtype``, with the masks that a run draws."""
    torch.manual_seed(5)
    keeps: list[torch.Tensor | None] = []
    ps = []
    for p, r, width in zip(case.ps, case.ranks, (H, I), strict=True):
        keep, exact = draw_keep(torch.empty(case.tokens * TOP, width), p) if p and r else (None, 0)
        keeps.append(keep)
        ps.append(exact)
    t = {
        name: value if value is None or name == "index" else value.detach().to(dtype)
        for name, value in made._asdict().items()
    }
    for name in case.wanted:
        t[name].requires_grad_()

    def stack(name: str, scaling: float) -> tuple[Any, ...]:
        weight = t[f"{name}_weight"]
        weight = weight.transpose(1, 2) if case.transposed else weight
        return (weight, t[f"{name}_bias"], t[f"{name}_a"], t[f"{name}_b"], scaling)

    stacks = (stack("up", S_UP), stack("down", S_DOWN))
    gate = GATES[case.gate][0]
    y = lora_experts_mlp_ref(t["x"], t["index"], t["weights"], gate, stacks, keeps, ps)
    leaves = [t[name] for name in case.wanted]
    grads = torch.autograd.grad(y, leaves, t["grad"], allow_unused=True, materialize_grads=True)
    return {"Y": y.detach()} | {
        f"d{name}": grad for name, grad in zip(case.wanted, grads, strict=True)
    }


@pytest.fixture
def take(monkeypatch) -> Callable[[str], None]:
    """Take a way."""

    def choose(way: str) -> None:
        monkeypatch.setattr(lora_experts_mlp, "_is_by_blocks", lambda x: way == "blocks")
        monkeypatch.setattr(lora_experts, "can_group", lambda x, stack: way == "grouped")

    return choose


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, take):
    take(case.way)
    made = make(case)
    results = run(case, made)
    exact = expected(case, made, FP64)
    eager = expected(case, made, case.dtype)
    assert results.keys() == exact.keys()
    dtypes = {"Y": case.dtype, "dx": case.dtype, "dweights": case.weights_dtype}
    for name, value in results.items():
        assert value.dtype == dtypes.get(name, case.lora_dtype), name
        if case.dtype == FP64:
            torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12, msg=name)
        else:
            assert_no_worse(value, exact[name], eager[name], dtype=case.dtype, name=name)
    if "weights" in case.wanted and case.chosen > E:
        assert (made.index >= E).any() and not results["dweights"][made.index >= E].any()


@pytest.mark.parametrize("rows", [1, 20, 1000])
@pytest.mark.parametrize(
    "case", [EXACT[1], EXACT[3], EXACT[4], DOUBLE._replace(ps=(0.1, 0.1))], ids=str
)
def test_blocks_of_any_size_are_right(case, rows, monkeypatch):
    """Of one expert each, of a few, and of all. Masks at 0.1 are positions, also of few slots; a run
    of A and B is one expert.
    """
    monkeypatch.setattr(blocks, "_ROWS_OF_BLOCK", rows)
    monkeypatch.setattr(loop, "_BYTES_OF_A_RUN", 0)
    monkeypatch.setattr(dropout, "POSITIONS_FROM", 1)
    made = make(case)
    exact = expected(case, made, FP64)
    for name, value in run(case, made).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("wanted", [LEAVES, ("down_a", "down_b")])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_packed_stack_is_read_expert_by_expert(transposed, wanted, monkeypatch):
    case = DOUBLE._replace(bias=True, transposed=transposed, wanted=wanted)
    made = make(case)
    packed = in_4_bits(made)
    exact = expected(case, made._replace(**values_of(packed)), FP64)
    read: dict[int, list[int]] = {stack.data.data_ptr(): [] for stack in packed.values()}
    expert = NF4Experts.expert

    def noted(self: NF4Experts, place: int, dtype: torch.dtype) -> torch.Tensor:
        read[self.data.data_ptr()].append(place)
        return expert(self, place, dtype)

    monkeypatch.setattr(NF4Experts, "expert", noted)
    for name, value in run(case, made._replace(**packed)).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12, msg=name)
    # Forward, and backward if it needs them.
    passes = 2 if wanted == LEAVES else 1
    assert [*read.values()] == [[*range(E)] * passes] * 2


def in_4_bits(made: Made) -> dict[str, Any]:
    """Packed stacks of the sizes of those that were made."""
    names = ("up_weight", "down_weight")
    return {name: nf4(*getattr(made, name).shape, nested=True).packed for name in names}


def values_of(packed: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: stack.experts(0, E, FP64) for name, stack in packed.items()}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", ["blocks", "together"])
def test_stacks_in_4_bits(way, transposed, take):
    take(way)
    case = DOUBLE._replace(bias=True, transposed=transposed, ps=(0.3, 0.3))
    made = make(case)
    packed = in_4_bits(made)
    exact = expected(case, made._replace(**values_of(packed)), FP64)
    for name, value in run(case, made._replace(**packed)).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("way", ["blocks", "together"])
def test_a_token_may_choose_an_expert_twice(way, take):
    take(way)
    made = make(DOUBLE._replace(bias=True))
    made.index[:, 1] = made.index[:, 0]
    results, exact = run(DOUBLE, made), expected(DOUBLE._replace(bias=True), made, FP64)
    for name, value in results.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12)


def test_low_precision_that_the_processor_does_not_multiply(monkeypatch):
    monkeypatch.setattr(cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, False))
    case = Case(BF16, bias=True, ps=(0.3, 0.3))
    made = make(case)
    exact, eager = (expected(case, made, dtype) for dtype in (FP64, BF16))
    for name, value in run(case, made).items():
        assert_no_worse(value, exact[name], eager[name], dtype=BF16, name=name)


@pytest.mark.parametrize("way", ["blocks", "together", "grouped"])
def test_a_forward_without_gradients_is_the_same(way, take):
    take(way)
    case = Case(BF16, bias=True)
    made = make(case)
    y = call(case, made)
    with torch.no_grad():
        assert torch.equal(call(case, made), y)
    detached = Made(*(t if t is None else t.detach() for t in made))
    plain = call(case, detached)
    assert torch.equal(plain, y) and not plain.requires_grad


def saved_by(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result, and what autograd saves for it."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function()
    return y, saved


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("way", ["blocks", "together"])
def test_it_keeps_x_by_tokens_the_output_of_up_and_its_s(way, p, take):
    """T H + slots (2 I + r) elements, the indices, and dropout's recipes."""
    take(way)
    case = Case(BF16, BF16, BF16, tokens=3000, ps=(p, p))
    made = make(case)
    _, saved = saved_by(lambda: call(case, made))
    slots = case.tokens * TOP
    arguments = {
        t.data_ptr() for name, t in made._asdict().items() if t is not None and name != "x"
    }
    kept = [t for t in saved if t.data_ptr() not in arguments]
    elements = sum(t.numel() for t in kept if t.dtype == BF16)
    assert elements == case.tokens * H + slots * (2 * I + case.ranks[0])
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


def test_only_what_a_wanted_gradient_reads_is_kept():
    for wanted, is_x, is_s in (("up_a", True, False), ("up_b", False, True), ("x", False, False)):
        case = Case(BF16, BF16, BF16, wanted=(wanted,))
        made = make(case)
        _, saved = saved_by(lambda case=case, made=made: call(case, made))
        shapes = [tuple(t.shape) for t in saved]
        assert ((T, H) in shapes) == is_x, wanted
        assert ((T * TOP, case.ranks[0]) in shapes) == is_s, wanted
        assert (T * TOP, 2 * I) in shapes


@pytest.mark.parametrize("way", ["blocks", "together", "grouped"])
def test_results_repeat_to_the_bit(way, take):
    take(way)
    case = Case(BF16, BF16, tokens=200, bias=True, ps=(0.1, 0.1))
    first, second = (run(case, make(case)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", ["blocks", "together", "grouped"])
def test_sums_over_a_tokens_slots_are_in_float32(way, take):
    """Bfloat16 would round 1 + 2^-8 to 1, twice."""
    take(way)
    case = Case(BF16, BF16, BF16, gate="relu2", ranks=(0, 0), wanted=("x",))
    down_weight = torch.zeros(E, N, I, dtype=BF16)
    down_weight[..., 0] = 1
    made = make(case)._replace(
        x=torch.ones(T, H, dtype=BF16).requires_grad_(),
        index=torch.arange(TOP).expand(T, TOP),
        weights=torch.tensor([1.0, 2**-8, 2**-8], dtype=BF16).expand(T, TOP),
        up_weight=torch.full((E, I, H), 1 / H, dtype=BF16),
        down_weight=down_weight,
    )
    y = call(case, made)
    y.backward(torch.ones_like(y))
    assert made.x.grad is not None
    assert (y == 1 + 2**-7).all() and (made.x.grad == 2 * N / H * (1 + 2**-7)).all()


def test_together_reads_nothing_on_the_host(take, monkeypatch):
    take("grouped")
    case = Case(BF16, bias=True, chosen=E + 2, ps=(0.3, 0.3))
    made = make(case)

    def refuse(*args: object) -> None:
        raise AssertionError("the host read a tensor")

    for name in ("tolist", "item", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    call(case, made).backward(made.grad)


@pytest.mark.parametrize("name", ["down_b", "up_weight", "down_weight"])
def test_a_change_before_backward_is_noticed(name):
    """Of an operand; merging changes a weight in place."""
    case = Case()
    made = make(case)
    y = call(case, made)
    with torch.no_grad():
        getattr(made, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(made.grad)


def test_the_gate_runs_in_the_products_dtype_outside_autocast():
    dtypes = []

    def gate(g: torch.Tensor) -> torch.Tensor:
        dtypes.append((g.dtype, torch.is_autocast_enabled("cpu")))
        return silu_gate(g).float()

    case = Case(BF16)
    made = make(case)
    with torch.autocast("cpu", BF16):
        y = call(case, made, gate)
        y.backward(made.grad)
    assert set(dtypes) == {(BF16, False)} and y.dtype == BF16
    # 69 rows of 4 experts are two blocks.
    assert len(dtypes) == 2 * 2
