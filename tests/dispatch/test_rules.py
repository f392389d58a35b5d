"""Which kernel a call takes: the table, force, and explain()."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import mlp, rules, tiles
from stablelora_kernels.dispatch.problem import DEVICES, Call
from stablelora_kernels.dispatch.rules import choose
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.testing import make_inputs
from tests.helpers.launches import count_launches

BF16, FP32 = torch.bfloat16, torch.float32
H100 = DEVICES["sm_90"]


def call(direction="forward", m=4096, n=4096, k=4096, r=16, dtype=BF16, dropout=False) -> Call:
    return Call(direction, m, n, k, r, dtype, FP32, dropout)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_what_is_chosen_may_be_asked_for(device, direction, dtype):
    """At each size, also where a row's bounds are: a choice obeys the limits by which a forced kernel is refused."""
    sizes = itertools.product((1, 16, 17, 64, 65, 512, 513, 4096, 4097), (2048, 14336), (1000, 4096), (1, 33, 65, 129))
    for (m, n, k, r), dropout in itertools.product(sizes, (False, True)):
        given = call(direction, m, n, k, r, dtype, dropout)
        chosen = choose(device, given)
        with slk.use_kernel(chosen.kernel):
            assert choose(device, given).kernel == chosen.kernel, given


@pytest.mark.parametrize("kernel", ["fused", "chained", "split", "vendor"])
def test_force(kernel):
    with slk.use_kernel(kernel):
        assert choose(H100, call(r=8)).kernel == kernel
        with slk.use_kernel("auto"):
            assert choose(H100, call(m=1)).kernel == "fused"


def test_force_refuses_what_it_cannot_do():
    with slk.use_kernel("fused"):
        with pytest.raises(ValueError, match="'fused' was asked for, but it has no dropout"):
            choose(H100, call(dropout=True))
        with pytest.raises(ValueError, match="takes ranks up to 64, got 65"):
            choose(H100, call(r=65))
        choose(H100, call("backward", dropout=True))
    with slk.use_kernel("chained"):
        with pytest.raises(ValueError, match="'chained' was asked for, but it takes ranks up to 128, got 129"):
            choose(H100, call(r=129))
        choose(H100, call("backward", m=100_000, r=128, dropout=True))


def test_force_refuses_in_a_real_call_before_anything_ran():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    inputs = make_inputs((5, 24), 20, 6)
    args = [inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    fused = slk.use_kernel("fused")
    with count_launches() as made, slk.use_backend("triton"), fused, pytest.raises(ValueError, match="no dropout"):
        lora_linear(*args, 1.0, 0.5)
    assert not made


def test_reasons_use_a_users_names():
    """explain() prints them: x, W, A and B as in PyTorch, not the kernels' own S, X, Y and H."""
    tables = [value for module in (rules, tiles, mlp) for value in vars(module).values() if isinstance(value, tuple)]
    reasons = {row.reason for table in tables for row in table if hasattr(row, "reason")}
    assert len(reasons) > 40
    private = re.compile(r"\bd?[SXYH]\b|anew|whoever|nobody|spill|accumulator|main loop|_")
    assert [reason for reason in reasons if private.search(reason) or len(reason) > 200] == []
