"""Which strategy, kernel and tiles a call takes on each GPU."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import chained, problem, rules, tiles
from stablelora_kernels.dispatch.problem import DEVICES, Call
from stablelora_kernels.dispatch.rules import STRATEGIES, choose, choose_kernel
from tests.helpers.processes import ROOT

BF16, FP32 = torch.bfloat16, torch.float32
H100 = DEVICES["sm_90"]
on_every_gpu = pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))


def call(direction="forward", m=4096, n=4096, k=4096, r=16, dtype=BF16, dropout=False) -> Call:
    return Call(direction, m, n, k, r, dtype, FP32, dropout)


def test_what_is_chosen_may_be_asked_for():
    """At each size, also where a row's bounds are: a choice obeys the limits by which a forced
    strategy is refused.
    """
    sizes = itertools.product(
        (1, 16, 17, 64, 65, 512, 513, 4096, 4097), (2048, 14336), (1000, 4096), (1, 33, 65, 129)
    )
    kinds = itertools.product(("forward", "backward"), (BF16, FP32), (False, True))
    for (m, n, k, r), (direction, dtype, dropout) in itertools.product(sizes, kinds):
        given = call(direction, m, n, k, r, dtype, dropout)
        chosen = choose(given)
        assert chosen.strategy in rules.possible_strategies(given), given
        with slk.settings(strategy=chosen.strategy):
            assert choose(given).strategy == chosen.strategy, given
    # Any that can do a call may be forced on it; what it cannot do is refused:
    # tests/ops/test_errors.py.
    few = call(m=1, r=8)
    assert rules.possible_strategies(few) == [*STRATEGIES[1:]]
    for strategy in STRATEGIES[1:]:
        with slk.settings(strategy=strategy):
            assert choose(few) == rules.Choice(strategy, rules.FORCED)
            # Backward has two of the three.
            behind = choose(few._replace(direction="backward")).strategy
            assert behind == ("one_launch" if strategy == "few_rows" else strategy)
            with slk.settings(strategy="auto"):
                assert choose(few).strategy == "few_rows"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_single_launch_is_the_default_up_to_its_limits(direction):
    """And no figure of a GPU is among them."""

    def strategy(**changes):
        return choose(call(direction)._replace(**changes)).strategy

    for m, n, k, r, dropout in itertools.product(
        (65, 513, 4097, 100_000), (1024, 14336), (4096, 14336), (1, 16, 128), (False, True)
    ):
        assert strategy(m=m, n=n, k=k, r=r, dropout=dropout) == "one_launch"
    assert strategy(m=tiles.MAX_CHAINED_M) == "one_launch"
    assert strategy(m=tiles.MAX_CHAINED_M + 1) == "branch_first"
    assert strategy(r=129) == "branch_first"
    assert strategy(m=16, r=129) == "branch_first"
    assert strategy(r=0) == "branch_first"
    assert strategy(m=17, dtype=FP32) == "branch_first"
    # A gated MLP's gradients need all of dH at once, also without a branch.
    assert strategy(gated=True, r=0) == "one_launch"
    few = "few_rows" if direction == "forward" else "one_launch"
    assert strategy(m=16, dtype=FP32) == few
    assert strategy(m=64, r=64) == few
    for beyond in ({"m": 65, "r": 64}, {"m": 64, "r": 65}, {"m": 64, "dropout": True}):
        assert strategy(**beyond) == "one_launch"


@on_every_gpu
def test_forms(device):
    for described in (False, True):
        assert choose_kernel(device, call(m=64), described)[0] == "split_k"
    assert choose_kernel(device, call(), described=False)[0] == "pointers"
    assert choose_kernel(device, call(), described=True)[0] == ("tma" if device.tma else "pointers")
    assert choose_kernel(device, call(dtype=FP32), described=True)[0] == "pointers"


def test_weights_whose_rows_are_not_aligned_are_dequantized():
    """In the loop they would be loaded byte by byte, with a scale an element, for which no GPU has
    the shared memory.
    """
    for bits, direction in itertools.product((4, 8), ("forward", "backward")):
        few = call(direction, m=8, n=96, k=70, r=8)
        chosen = [rules.choose_quantized(few, bits, aligned).strategy for aligned in (True, False)]
        assert chosen == ["in_loop", "dequantize"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_65_to_400_rows_fill_the_gpu(arch, direction):
    """At 4096 x 4096: programs share sums, or tiles of 128 x 128 fill as much as any tiles that
    read no more.
    """
    device = DEVICES[arch]
    for m in range(65, 401):
        given = call(direction, m)
        if choose_kernel(device, given, described=True)[0] == "split_k":
            plan = tiles.linear_split_k_plan(device, given)
            assert plan.splits > 1 and tiles.filled(device, plan.tiles * plan.splits) >= 0.7
        elif device.tma:
            assert tiles.linear_tma_plan(device, given).tiles >= 0.7 * device.processors
        else:
            assert tiles.filled(device, tiles.linear_plan(device, given).tiles) >= 0.7
    if arch == "sm_90":
        # As many programs as powers of two allow.
        for m in (65, 128, 129, 256):
            plan = tiles.linear_split_k_plan(device, call(direction, m))
            assert plan.tiles * plan.splits == 128


@on_every_gpu
def test_the_widest_tile_is_taken_where_it_spills_nothing_in_half_the_rounds(device):
    def taken(given, has_w=True):
        return tiles.linear_plan(device, given, has_w=has_w).tile[:3] == (128, 256, 32)

    wide = device.arch in ("sm_80", "sm_86", "sm_89", "sm_120")
    for direction in ("forward", "backward"):
        given = call(direction, 32_768)
        assert taken(given) == wide
        assert taken(given._replace(r=128)) == (device.arch == "sm_80")
        assert taken(given._replace(dropout=True)) == (wide and direction == "forward")
        # A processor each; one more would take a round of its own.
        one_more = given._replace(m=128 * device.processors // 2, n=512)
        assert taken(one_more) == wide and not taken(one_more._replace(m=one_more.m + 1))
        others = {"dtype": FP32}, {"gated": True}, {"n": 4104}, {"k": 4097}, {"n": 128}
        assert not any(taken(given._replace(**other)) for other in others)
        assert not taken(given, has_w=False)
    plan = tiles.linear_plan(device, call(m=32_768, r=128))
    assert plan.block_r == (32 if device.arch == "sm_80" else 64)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_b200_takes_the_widest_tile(direction):
    """A tile of 128 x 256 and its branch fill tensor memory exactly."""
    b200 = DEVICES["sm_100"]
    large, smaller = call(direction, 1024), call(direction, 1023)
    for given in (large, smaller, smaller._replace(dropout=True)):
        rows = [rule.choice for rule in tiles.TMA_TILES if rule.applies(b200, given)]
        assert rows[0][:3] == (128, 256, 64)


def test_programs_for_a_tile_are_the_fewest_that_keep_the_gpu_busy():
    assert [tiles.fill_split_k(H100, count, 64) for count in (16, 32, 64, 96, 128, 132)] == [
        6,
        3,
        2,
        1,
        1,
        1,
    ]
    # A part has at least 4 steps, and none is empty.
    assert tiles.fill_split_k(H100, 8, 8) == 2 and tiles.fill_split_k(H100, 8, 3) == 1
    assert tiles.fill_split_k(H100, tiles.MAX_SHARED_SUMS + 1, 64) == 1


@pytest.mark.parametrize(
    ("direction", "dropout", "spare", "programs", "splits"),
    [
        ("forward", False, 8, 8, 1), ("forward", False, 4, 4, 1), ("backward", True, 8, 8, 1), ("backward", False, 12, 12, 1),
        # It would take longer than a tile, for lack of processors or to draw: all processors
        # compute S first, and dB.
        ("forward", False, 3, 128, 8), ("forward", True, 24, 128, 8), ("backward", False, 7, 256, 8),
        ("forward", False, 0, 128, 8),
        # Enough for all, in fewer parts.
        ("forward", True, 68, 64, 4), ("backward", False, 68, 68, 4),
    ],
)  # fmt: skip
def test_s_takes_the_idle_processors_of_a_last_round(direction, dropout, spare, programs, splits):
    """16 tiles of 128 rows of S, in backward 32 of dB, beside a product's of 256 columns."""
    given = call(direction, 2048, 4096, 4096, 16, dropout=dropout)
    s, db, found = chained.chained_plans(
        H100, given, tiles.Tile(128, 256, 64, 8, 3), direction == "backward", spare
    )
    of_b = 32 if direction == "backward" else None
    assert (found, s.splits, s.tiles, db and db.tiles) == (programs, splits, 16, of_b)
    # Nine programs would share 64 steps by eight each, and the last one would have none.
    few, _, _ = chained.chained_plans(
        H100, given._replace(m=1024), tiles.Tile(128, 256, 64, 8, 3), False, spare=72
    )
    assert (few.tiles, few.splits) == (8, 8)


def test_a_group_shares_one_read_of_x_if_each_s_fits_in_registers():
    def is_shared(*changes):
        return rules.choose_group([call()._replace(**change) for change in changes]).shared

    most, few = problem.MAX_BLOCK_R, {"m": problem.SMALL_M}
    assert is_shared({}, {"r": most}) and is_shared({"r": most}, {})
    for other in ({"r": 0}, {"r": most + 1}):
        assert not is_shared({}, other) and not is_shared(other, {})
    assert not is_shared(few, few)


def test_a_forced_strategy_says_whether_gate_and_up_are_together():
    """Whatever the table would take for so few rows, or for so many."""
    for m, together in ((16, False), (4096, True)):
        assert (rules.choose_gate_up(H100, call(m=m), True).kernel != rules.SEPARATE) == together
        for strategy in STRATEGIES[1:]:
            with slk.settings(strategy=strategy):
                forced = rules.choose_gate_up(H100, call(m=m), True)
            assert forced == rules.choose_gate_up(H100, call(m=m), True, strategy)
            assert (forced.kernel != rules.SEPARATE) == (strategy == "one_launch")


def test_reasons_use_a_users_names():
    """explain() prints them: x, W, A and B as in PyTorch, not the kernels' own S, X, Y and H."""
    tables = [
        value
        for module in (rules, tiles)
        for value in vars(module).values()
        if isinstance(value, tuple)
    ]
    reasons = {row.reason for table in tables for row in table if hasattr(row, "reason")}
    assert len(reasons) > 40
    private = re.compile(r"\bd?[SXYH]\b|anew|whoever|nobody|spill|accumulator|main loop|_")
    assert [reason for reason in reasons if private.search(reason) or len(reason) > 200] == []


def test_a_branch_alone_is_one_launch_up_to_its_limits():
    def strategy(**changes):
        return rules.choose_branch(call()._replace(**changes)).strategy

    for direction in ("forward", "backward"):
        most = {"direction": direction, "m": tiles.MAX_CHAINED_M, "r": 128}
        assert strategy(**most) == "one_launch"
        assert strategy(**most | {"m": tiles.MAX_CHAINED_M + 1}) == "two_launches"
        assert strategy(**most | {"r": 129}) == "two_launches"


def test_every_page_has_the_limit_of_dequantizing_in_the_loop():
    places = {
        "guides/quantized.md": "up to {} rows of x",
        "guides/long-context.md": "up to {} rows with quantized weights",
        "guides/will-it-fit.md": "above {} rows a launch dequantizes it",
    }
    for name, words in places.items():
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert words.format(problem.IN_LOOP_M) in text, name
    documented = " ".join((slk.functional.lora_mlp.__doc__ or "").split())
    assert f"up to {problem.IN_LOOP_M} rows with quantized weights" in documented
