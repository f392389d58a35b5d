"""The seeds of masks on Triton. Dropout's masks on the PyTorch path that are positions: their
statistics, and what the ops make of them. ``tests/ops/test_ops_oracle.py`` has the statistics of
the other kind.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from stablelora_kernels import settings
from stablelora_kernels.functional import (
    LoRAWeights,
    lora_branch,
    lora_experts,
    lora_linear,
    lora_linear_group,
    lora_mlp,
)
from stablelora_kernels.ops import dropout
from stablelora_kernels.ops.dropout import draw_keep, draw_seeds, mask_of_rows
from stablelora_kernels.ops.lora_rows.autograd import RowsBranch, lora_rows
from stablelora_kernels.ops.plans import key_of
from stablelora_kernels.reference import lora_experts_ref
from stablelora_kernels.testing import kept_for_backward
from stablelora_kernels.testing.cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    FP64,
    forced,
    leaves,
    make,
    ours,
    run,
)
from tests.helpers.case_checks import assert_close, check
from tests.helpers.cases import small
from tests.helpers.operators import Operators

every_op = pytest.mark.parametrize("op", ["linear", "branch", "group", "nf4", "mlp"])


# Seeds.


def test_seeds_of_one_draw_are_different_and_lie_alike():
    """Keys of plans and Triton's specialization tell addresses apart by their last four bits."""
    dropout_ps = [0.5, 0.0, 0.1, 0.2, 0.5]
    draws = [draw_seeds(torch.device(DEVICE), dropout_ps) for _ in range(3)]
    for seeds in draws:
        assert [seed is None for seed in seeds] == [p == 0 for p in dropout_ps]
        assert all(seed.data_ptr() % 16 == 0 for seed in seeds if seed is not None)
    words = {int(seed[0]) for seeds in draws for seed in seeds if seed is not None}
    assert len(words) == 12 and min(words) >= 0
    keys = {key_of("an op", seeds) for seeds in draws}
    assert len(keys) == 1 and None not in keys
    # One seed is no view, and lies as the others do.
    (alone,) = draw_seeds(torch.device(DEVICE), [0.5])
    assert key_of("an op", [alone]) == key_of("an op", draws[0][:1])


# Some go by separate ops.
DRAWING = {
    "a linear": small("linear"),
    "a lone branch": small("branch"),
    "a group": small("group"),
    "a group, one A trains": small("group", wanted=["lora_A0"]),
    "an MLP": small("mlp"),
    "an MLP, no branch at up": small("mlp", ranks=(6, None, 4)),
    "an MLP, one A for gate and up": small("mlp", ranks=(6, 6, 4), shared=True),
    "an MLP, a weight trains": small("mlp", wanted=["weight0"]),
    "an MLP, quantized": small("mlp", quantized=("nf4",) * 3, shape=(70, 64), sizes=(64, 64, 64)),
}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", DRAWING)
def test_a_call_draws_its_seeds_at_once(name, trains):
    """By one launch, by whatever ops it is computed."""
    case = DRAWING[name].but(p=0.4)
    leaf = leaves(case, make(case))
    with forced(case), torch.set_grad_enabled(trains), Operators() as operators:
        ours(case, leaf)
    names = [func.name() for func, _, _ in operators.calls]
    assert names.count("aten::randint") == 1
    assert not any("bernoulli" in one or "random_" in one for one in names)


def test_rows_draw_their_seeds_at_once():
    branches = [
        RowsBranch(start, start + 20, torch.randn(r, 24), torch.randn(16, r), 1.0, p)
        for start, r, p in ((0, 3, 0.4), (20, 1, 0.0), (40, 6, 0.2))
    ]
    with settings(backend="triton"), Operators() as operators:
        lora_rows(torch.randn(70, 24), torch.randn(16, 24), None, None, branches)
    assert [func.name() for func, _, _ in operators.calls].count("aten::randint") == 1


@pytest.fixture
def positions(monkeypatch):
    """Masks of any size are positions."""
    monkeypatch.setattr(dropout, "POSITIONS_FROM", 1)


SIDE = 4096


@pytest.fixture(scope="module", params=[1 / 32, 0.15])
def drawn(request) -> tuple[torch.Tensor, float]:
    """Which elements a mask of many drops, in float32, and with which probability each."""
    torch.manual_seed(0)
    keep, p = draw_keep(torch.empty(SIDE, SIDE), request.param)
    return (~keep).float(), p


def test_share_and_variance(drawn):
    """The numbers of dropped elements in blocks of 128 are binomial: a variance 2 % off is seen."""
    dropped, p = drawn
    counts = dropped.view(-1, 128).sum(1).double()
    variance = 128 * p * (1 - p)
    blocks = len(counts)
    assert abs(counts.mean() - 128 * p) < 5 * math.sqrt(variance / blocks)
    # The variance of a variance, with the binomial's fourth moment.
    fourth = variance * (1 + (3 - 6 / 128) * variance)
    error = 5 * math.sqrt((fourth - variance**2) / blocks) / variance
    assert error < 0.021 and abs(counts.var() / variance - 1) < error


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_and_columns(drawn, dim):
    dropped, p = drawn
    shares = dropped.mean(dim).double()
    deviation = math.sqrt(p * (1 - p) / SIDE)
    assert (shares - p).abs().max() < 6 * deviation
    assert abs(shares.std() / deviation - 1) < 5 / math.sqrt(2 * SIDE)


@pytest.mark.parametrize("distance", [1, 2, 3, 31, SIDE - 1, SIDE, SIDE + 1])
def test_neighbours_are_independent(drawn, distance):
    dropped, p = drawn
    flat = dropped.flatten() - p
    products = (flat[:-distance] * flat[distance:]).double()
    assert abs(products.mean()) < 5 * p * (1 - p) / math.sqrt(len(products))


@pytest.mark.parametrize("p", [1e-6, 2.0**-15, 1e-3, 0.2, 0.3, 0.99999])
def test_the_share_of_any_probability(p):
    torch.manual_seed(0)
    size = 1 << 21
    keep, share = draw_keep(torch.empty(size), p)
    # Both kinds drop with a multiple of 1/32768, which the scale uses.
    assert abs(share - p) <= 2**-15
    assert abs((~keep).double().mean() - share) <= 5 * math.sqrt(share * (1 - share) / size)


def uniform_of(monkeypatch, change):
    """Uniform numbers on which ``change`` is done in place."""
    original = torch.Tensor.uniform_

    def uniform_(self, *args, **kwargs):
        change(original(self, *args, **kwargs))
        return self

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)


def test_no_mask_ends_early(monkeypatch):
    """A uniform number of 0 has no logarithm."""
    uniform_of(monkeypatch, lambda t: t[::10].zero_())
    torch.manual_seed(0)
    size, p = 1 << 20, 0.2
    positions = dropout._draw_positions(size, p, None)
    # At every tenth of the distances, which have a mean of 1 / p otherwise, it is the longest.
    longest = math.ceil(math.log(2.0**-25) / math.log1p(-p))
    expected = size / (0.9 / p + 0.1 * longest)
    assert abs(len(positions.unique()) - expected) < 0.05 * expected
    assert positions[-1] > size - 3 * longest


def test_more_positions_than_a_draw_has(monkeypatch):
    uniform_of(monkeypatch, lambda t: t.fill_(1 - 2.0**-24))
    positions = dropout._draw_positions(5000, 0.1, None)
    assert torch.equal(positions.unique(), torch.arange(5000).int())


def test_masks_of_one_size_fit_each_other():
    """The last position fills a mask up, which changes no element."""
    size, p = 1 << 15, 0.1
    torch.manual_seed(0)
    masks = [dropout._draw_positions(size, p, None) for _ in range(20)]
    assert len({mask.shape for mask in masks}) == 1
    assert len({len(mask.unique()) for mask in masks}) > 10
    for mask in masks:
        assert torch.equal(mask.sort().values, mask) and mask[0] >= 0 and mask[-1] < size


def test_a_mask_without_a_dropped_element(monkeypatch):
    """Where no position is, none is repeated."""
    uniform_of(monkeypatch, lambda t: t.zero_())
    positions = dropout._draw_positions(100, 0.1, None)
    x = torch.ones(10, 10)
    assert torch.equal(dropout.masked(x, positions), x)
    assert torch.equal(dropout.mask_(x.clone(), positions.long()), x)


@every_op
@pytest.mark.parametrize("dtypes", [(FP64, FP64), (FP32, FP32), (BF16, FP32), (FP16, FP32)])
@pytest.mark.parametrize("few", [False, True])
def test_matches_the_oracle(op, dtypes, few, positions):
    dtype, lora_dtype = dtypes
    rows = 5 if few else 70
    case = small(op, rows, p=0.1, backend="torch", dtype=dtype, lora_dtype=lora_dtype)
    check(case, run(case))


@every_op
@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded", "negated"])
def test_any_strides_match_the_oracle(op, layout, positions):
    case = small(op, p=0.1, backend="torch", layouts={"x": layout, "grad": layout})
    check(case, run(case))


@every_op
def test_autocast_matches_the_oracle(op, positions):
    case = small(op, p=0.1, backend="torch", autocast=True)
    check(case, run(case))


@every_op
def test_evaluation_draws_nothing(op, positions):
    case = small(op, p=0.1, backend="torch", training=False)
    assert_close(run(case), run(case.but(p=0.0)))


def test_a_dropped_position_holds_zero(positions):
    """Whatever x has there, as on Triton: a mask of bools would multiply."""
    torch.manual_seed(0)
    x = torch.randn(70, 24)
    torch.manual_seed(1)
    keep, _ = draw_keep(x, 0.1)
    x[~keep] = torch.nan
    pair = torch.randn(4, 24).requires_grad_(), torch.randn(8, 4).requires_grad_()
    torch.manual_seed(1)
    y = lora_branch(torch.zeros(70, 8), x, *pair, 1.0, 0.1)
    y.sum().backward()
    assert y.isfinite().all() and pair[0].grad.isfinite().all()


def test_large_masks_are_positions():
    """Up to the probability from which they pay, and from so many elements on."""
    for shape, p in itertools.product([(64, 511), (64, 512)], [0.15, 0.16]):
        x = torch.randn(shape)
        pair = torch.randn(4, shape[1]).requires_grad_(), torch.randn(8, 4).requires_grad_()
        y = lora_linear(x, torch.randn(8, shape[1]), None, *pair, 1.0, p)
        kept = kept_for_backward(y, torch.int32)
        assert (kept is not None) == (shape == (64, 512) and p == 0.15)
        assert kept is None or kept.dim() == 1


def test_positions_are_int32_and_those_of_values():
    cpu = torch.device("cpu")
    least = dropout.POSITIONS_FROM
    sizes = (least - 1, least, 2**31 - 1, 2**31)
    drawn = [dropout._are_positions_drawn(size, cpu, 0.1) for size in sizes]
    assert drawn == [False, True, True, False]
    with FakeTensorMode():
        assert dropout.draw_to_keep(torch.empty(256, 256), 0.1).mask.dtype == torch.bool


def test_a_large_mlp_keeps_positions():
    """It draws them once, and others again in backward."""
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    sizes = ((512, 256), (512, 256), (256, 512))
    layers = [
        LoRAWeights(
            torch.randn(n, k),
            None,
            torch.randn(4, k).requires_grad_(),
            torch.randn(n, 4).requires_grad_(),
            1.0,
        )
        for n, k in sizes
    ]
    for p in (0.1, 0.4):
        y = lora_mlp(x, *layers, "silu", p)
        positions = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.int32]
        assert [t.dim() for t in positions] == ([1, 1, 1] if p == 0.1 else [])


@every_op
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_see_the_same_masks(op, reentrant, positions):
    case = small(op, p=0.1, backend="torch")

    def call(case, leaf):
        names = [name for name, t in leaf.items() if isinstance(t, torch.Tensor)]

        def layer(*tensors):
            return ours(case, leaf | dict(zip(names, tensors, strict=True)))

        return checkpoint(layer, *(leaf[name] for name in names), use_reentrant=reentrant)

    assert_close(run(case, call=call), run(case))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_may_drop_the_generators_state(reentrant):
    """Backward then draws another mask, and computes the gradients of that one, as with nn.Dropout."""
    torch.manual_seed(0)
    x = torch.randn(128, 256, dtype=FP64, requires_grad=True)
    weight, lora_A, lora_B = (
        torch.randn(n, k, dtype=FP64) for n, k in ((8, 256), (4, 256), (8, 4))
    )
    drawn = []

    def layer(x):
        drawn.append(torch.get_rng_state())
        return lora_linear(x, weight, None, lora_A, lora_B, 1.7, 0.1)

    settings = {"use_reentrant": reentrant, "preserve_rng_state": False}
    checkpoint(layer, x, **settings).sum().backward()
    assert len(drawn) == 2 and not torch.equal(*drawn)
    torch.set_rng_state(drawn[1])
    keep, share = draw_keep(x, 0.1)
    of_branch = torch.ones(128, 8, dtype=FP64) @ lora_B @ lora_A * keep * (1.7 / (1 - share))
    torch.testing.assert_close(x.grad, torch.ones(128, 8, dtype=FP64) @ weight + of_branch)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("p", [0.1, 0.4])
def test_torch_jit_trace_draws_the_other_kind(p):
    """A mask anew at each call, although a trace holds no view in another dtype."""
    torch.manual_seed(0)
    weight, lora_A, lora_B = torch.randn(8, 512), torch.randn(4, 512), torch.randn(8, 4)
    x = torch.randn(64, 512)
    traced = torch.jit.trace(
        lambda x: lora_linear(x, weight, None, lora_A, lora_B, 1.0, p), (x,), check_trace=False
    )
    for seed in (1, 2):
        torch.manual_seed(seed)
        y = traced(x)
        torch.manual_seed(seed)
        share = dropout.drop_share(p)
        keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - share)
        exact = [t.double() for t in (x, weight, lora_A, lora_B)]
        expected = exact[0] @ exact[1].T + exact[0] * keep @ exact[2].T @ exact[3].T / (1 - share)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)


def test_a_group_has_the_masks_of_its_projections():
    torch.manual_seed(3)
    x = torch.randn(300, 256)
    weights, lora_As, lora_Bs = zip(
        *[(torch.randn(8, 256), torch.randn(4, 256), torch.randn(8, 4)) for _ in range(3)],
        strict=True,
    )
    for t in (*lora_As, *lora_Bs):
        t.requires_grad_()
    torch.manual_seed(4)
    together = lora_linear_group(x, weights, [None] * 3, lora_As, lora_Bs, [1.0] * 3, 0.1)
    torch.manual_seed(4)
    for y, weight, lora_A, lora_B in zip(together, weights, lora_As, lora_Bs, strict=True):
        torch.testing.assert_close(lora_linear(x, weight, None, lora_A, lora_B, 1.0, 0.1), y)


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_experts_match_the_reference(p, positions):
    torch.manual_seed(0)
    rows, k, n, r = 60, 24, 20, 4
    ends = torch.tensor([23, 23, 50])
    operands = [
        torch.randn(shape, dtype=FP64).requires_grad_()
        for shape in ((rows, k), (3, r, k), (3, n, r))
    ]
    x, lora_A, lora_B = operands
    weight = torch.randn(3, n, k, dtype=FP64)
    grad = torch.randn(rows, n, dtype=FP64)
    torch.manual_seed(5)
    y = lora_experts(x, weight, None, lora_A, lora_B, 1.7, ends, dropout_p=p)
    torch.manual_seed(5)
    keep, share = draw_keep(x, p)
    exact = lora_experts_ref(x, weight, None, lora_A, lora_B, 1.7, ends, keep, share)
    torch.testing.assert_close(y, exact, rtol=1e-13, atol=1e-13)
    for ours_, theirs in zip(
        torch.autograd.grad(y, operands, grad),
        torch.autograd.grad(exact, operands, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours_, theirs, rtol=1e-13, atol=1e-13)


def test_masks_of_rows():
    torch.manual_seed(0)
    mask = dropout._draw_positions(40 * 24, 0.1, None)
    keep = dropout.masked(torch.ones(40, 24, dtype=torch.bool), mask)
    for rows in (slice(0, 40), slice(0, 0), slice(7, 19), slice(39, 40)):
        part = mask_of_rows(mask, rows, 24)
        ones = torch.ones(rows.stop - rows.start, 24, dtype=torch.bool)
        assert torch.equal(dropout.masked(ones, part), keep[rows])


def test_compiled_code_draws_the_other_kind():
    """Under one seed it has the masks of eager code where that draws no positions."""
    x = torch.randn(128, 256)
    weight, pair = torch.randn(8, 256), (torch.randn(4, 256), torch.randn(8, 4))

    def layer(p):
        torch.manual_seed(6)
        return lora_linear(x, weight, None, *pair, 1.0, p)

    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(0.4), layer(0.4))
    assert not torch.allclose(compiled(0.1), layer(0.1))


def test_any_processor_draws_the_same_mask():
    """Float64's logarithm may be a unit off in its last place, but no distance depends on it."""
    numbers = torch.arange(1 << 24, dtype=torch.float32).div_(1 << 24).double().add_(2.0**-25)
    for p in (0.05, 0.1, 0.2):
        distances = numbers.log().div_(math.log1p(-p))
        assert (distances - distances.round()).abs().min() > 1e-12 * distances.max()
