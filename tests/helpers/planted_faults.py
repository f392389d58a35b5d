"""Synchronization faults, planted in the kernels' sources, and the cases whose schedules must find them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest

from stablelora_kernels.kernels.common import arrives_last, stores_done
from stablelora_kernels.kernels.lora import chain
from stablelora_kernels.kernels.lora.linear import product_program, wait_for_s
from stablelora_kernels.kernels.lora.thin_products import shrink
from stablelora_kernels.kernels.stable_adamw.step import _stable_adamw_kernel
from tests.helpers.interleaving import Interleaving, Mutation
from tests.helpers.interleaving_cases import CASES, Launched, new_memory_is_poisoned, shrink_sizes

# Schedules of each case in every test run.
SCHEDULES = 200


class Fault(NamedTuple):
    what: str
    mutation: Mutation
    # The names of the cases that must find the fault.
    cases: tuple[str, ...]
    # Text that the failure must contain.
    looks_like: str = "differ"


# An MLP's launches share sums by the functions that the others call.
_MLP = tuple(name for name in CASES if "gate" in name)
# The chained forward with descriptors has tiles of S too deep to share.
_SHARED_SUMS = tuple(
    name
    for name in CASES
    if name not in ("optimizer, two clipped steps", "chained descriptors, S and Y, two layers", *_MLP)
)
_CHAINED = tuple(name for name in CASES if name.startswith("chained") and name not in _MLP)
_CHAINED_GATED = tuple(name for name in _MLP if name.startswith("chained"))
_CHAINED_DA = tuple(name for name in _CHAINED if name.endswith("all gradients"))
_STORE_S = "tl.store(s_ptrs, cast(member.scaling * total, member.s.dtype.element_ty), mask=s_mask)\n            "
_RAISE = "if TILE.FLAG_M:\n                raise_flag(chain, row0 // TILE.FLAG_M)\n"
_RAISE_EARLY = _RAISE + "            " + _STORE_S
_DRAW = 'tl.atomic_add(chain_ptr, 1, sem="relaxed", scope="gpu")'
_BY_ID = Mutation(chain.draw_ticket, _DRAW, "tl.program_id(0)")

FAULTS = (
    Fault("shared sum: no release", Mutation(arrives_last, '"acq_rel"', '"acquire"'), _SHARED_SUMS),
    Fault("shared sum: no acquire", Mutation(arrives_last, '"acq_rel"', '"release"'), _SHARED_SUMS),
    Fault("shared sum: release to its own program alone", Mutation(arrives_last, '"gpu"', '"cta"'), _SHARED_SUMS),
    Fault("shared sum: no barrier before the release", Mutation(stores_done, "tl.debug_barrier()", "pass"), _SHARED_SUMS),
    Fault("shared sum: counter not reset", Mutation(arrives_last, "tl.store(counter_ptr, 0)", "pass"), _SHARED_SUMS, ""),
    Fault("shared sum: the last but one adds up", Mutation(arrives_last, "n - 1", "n - 2"), _SHARED_SUMS),
    Fault(
        "optimizer: one half of the sums for both steps",
        Mutation(_stable_adamw_kernel, "squares_ptr + (1 - turn)", "squares_ptr + turn"),
        ("optimizer, two clipped steps",),
    ),
    Fault("chained: no release", Mutation(chain.raise_flag, '"release"', '"relaxed"'), _CHAINED),
    Fault("chained: no barrier before the release", Mutation(chain.raise_flag, "stores_done(flag)", "pass"), _CHAINED),
    Fault("chained: no acquire", Mutation(chain.wait_for_flag, '"acquire"', '"relaxed"'), _CHAINED),
    Fault("chained: wait left out", Mutation(wait_for_s, "if S is not None", "if False"), _CHAINED + _CHAINED_GATED),
    Fault(
        "chained: wait of dA left out",
        Mutation(product_program, "wait_for_flag(chain, flag, M, da.members[0].R, S)", "pass"),
        _CHAINED_DA + _CHAINED_GATED,
    ),
    Fault("chained: flag raised before the store", Mutation(shrink, _STORE_S + _RAISE, _RAISE_EARLY), _CHAINED),
    Fault("chained: flags not reset", Mutation(chain.leave, "tl.store(chain_ptr + FLAGS + flag, 0)", "pass"), _CHAINED),
    Fault("chained: ticket not reset", Mutation(chain.leave, "tl.store(chain_ptr, 0)", "pass"), _CHAINED, ""),
    Fault("chained: the program's id for its ticket", _BY_ID, _CHAINED, "deadlock"),
)  # fmt: skip


@cache
def interleaving(name: str) -> tuple[Interleaving, Launched]:
    """The case ``name`` at tiny sizes. Its programs have run in order once."""
    with pytest.MonkeyPatch.context() as patch, new_memory_is_poisoned():
        shrink_sizes(patch)
        case = CASES[name](patch)
    return Interleaving(case.launches, case.others), case
