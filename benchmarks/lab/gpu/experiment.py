"""The experiment that a GPU decides: the specialized product beside the vendor's and today's
kernels, and the branch ahead of the vendor's product.

pytest runs ``test_specialized_numbers``; ``times`` times the runs, and ``verdicts`` says what they
decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from benchmarks.lab.gpu.device import Run
from benchmarks.lab.predict import parts
from benchmarks.lab.predict.rivals import Shape
from benchmarks.lab.specialized import support
from benchmarks.lab.specialized.support import UnavailableError
from stablelora_kernels.dispatch.problem import cdiv, device_of
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.base import VendorProduct
from stablelora_kernels.launch.fill_jobs import Product
from stablelora_kernels.launch.lora_linear import product_launches

if TYPE_CHECKING:
    from benchmarks.lab.specialized.cases import Case
    from benchmarks.lab.specialized.launches import Operands

# Arms. Those of today's kernels have the names of ``parts``.
VENDOR, TODAY, Y_FROM_S, DX = parts.VENDOR, "product", "Y from S", "dX"
S, CHAINED, CHAINED_BACKWARD = "S", "S and Y in one", "all of backward in one"
SPECIALIZED, SPECIALIZED_Y, SPECIALIZED_DX = (
    f"specialized {name}" for name in (TODAY, Y_FROM_S, DX)
)
FIRST, FIRST_BACKWARD = "branch first", "branch first, backward"
TAKEN = (VENDOR, TODAY, Y_FROM_S, DX, S, CHAINED, CHAINED_BACKWARD)
# By arm, and by the product of ``parts.Calls`` that it computes.
OURS = {SPECIALIZED: "bare", SPECIALIZED_Y: "forward", SPECIALIZED_DX: "backward"}
BRANCH_FIRST = {FIRST: "forward", FIRST_BACKWARD: "backward"}


def in_pairs(arm: str) -> str:
    """The name of a specialized arm by pairs of CTAs."""
    return f"{arm}, pairs"


def check_available(device: torch.device, pairs: bool) -> None:
    """Raise UnavailableError if the specialized product cannot run on ``device``."""
    reason = support.reason_against(pairs)
    if not reason:
        reason = support.reason_against_gpu(torch.cuda.get_device_capability(device))
    if reason:
        raise UnavailableError(reason)


def operands_of(p: Product) -> Operands:
    """The specialized product's operands, of which all of S is there."""
    from benchmarks.lab.specialized.launches import Operands

    assert isinstance(p.w, Tensor)
    trans_w = p.w.stride(1) != 1
    operands = Operands(p.x, p.w.t() if trans_w else p.w, p.y, trans_w, bias=p.bias)
    if p.s is None:
        return operands
    flags = torch.ones(cdiv(p.x.shape[0], 128), dtype=torch.int32, device=p.x.device)
    mask = p.mask if p.call.masked else None
    return operands._replace(s=p.s, up=p.up, mask=mask, flags=flags)


def specialized_run(p: Product, device: torch.device, pairs: bool) -> Run:
    """A launch of the specialized product.

    Raises:
        UnavailableError: it cannot run here.
    """
    check_available(device, pairs)
    from benchmarks.lab.specialized.launches import launch_product

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    launch = launch_product(operands_of(p), processors // (2 if pairs else 1), pairs)
    return partial(launch.run, device)


def branch_first(p: Product, device: torch.device) -> list[Any]:
    """The launches of "branch_first", in which the product, the last, adds to the branch.

    Raises:
        UnavailableError: this version adds the branch to the product instead.
    """
    launches = product_launches(device_of(device), p, Choice("branch_first", ""))
    last = launches[-1]
    if not (isinstance(last, VendorProduct) and last.add):
        raise UnavailableError("this version has no strategy in which the branch comes first")
    return launches


def run_of(launches: Sequence[Any], device: torch.device) -> Run:
    """One run of all ``launches``."""

    def run() -> None:
        for launch in launches:
            launch.run(device)

    return run


def branch_first_run(p: Product, device: torch.device) -> Run:
    """The branch, and the vendor's product onto it.

    Raises:
        UnavailableError: as :func:`branch_first`.
    """
    return run_of(branch_first(p, device), device)


def branch_alone_run(p: Product, device: torch.device) -> Run:
    """All launches of :func:`branch_first` but the vendor's product.

    Raises:
        UnavailableError: as :func:`branch_first`.
    """
    return run_of(branch_first(p, device)[:-1], device)


def runs(
    device: torch.device, shape: Shape, make: Callable[..., Tensor]
) -> dict[str, Callable[[], Run]]:
    """By arm: how to build its run, which may raise UnavailableError."""
    calls = parts.calls(shape, make)
    known = parts.launches_of(device_of(device), calls)
    found: dict[str, Callable[[], Run]] = {}
    for name in TAKEN:
        # Built once; the launch holds its operands.
        found[name] = partial(partial, known[name].run, device)
    for name, which in OURS.items():
        p: Product = getattr(calls, which)
        found[name] = partial(specialized_run, p, device, False)
        found[in_pairs(name)] = partial(specialized_run, p, device, True)
    for name, which in BRANCH_FIRST.items():
        found[name] = partial(branch_first_run, getattr(calls, which), device)
    return found


def cases() -> list[Any]:
    """The emulator's cases, and a layer's sizes; none where Gluon cannot be imported."""
    if support.reason_against():
        return [pytest.param(None, id="all")]
    from benchmarks.lab.specialized.cases import CASES, PAIRS, Case

    layer = Case(5000, 4096, 4096, r=16, bias=True)
    masked = Case(5000, 4096, 4096, r=16, masked=True, trans_w=True)
    large = [layer, masked, layer._replace(pairs=True, programs=66)]
    return [pytest.param(case, id=case.name) for case in (*CASES, *PAIRS, *large)]


@pytest.mark.parametrize("case", cases())
def test_specialized_numbers(case: Case | None) -> None:
    """Each case against its oracle; skipped, with the reason, where the product cannot run."""
    if reason := support.reason_against(pairs=case is not None and case.pairs):
        pytest.skip(reason)
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := support.reason_against_gpu(torch.cuda.get_device_capability(device)):
        pytest.skip(reason)
    from benchmarks.lab.specialized.cases import make, share
    from benchmarks.lab.specialized.launches import launch_product

    assert case is not None
    made = make(case, device)
    launch_product(made.operands, case.programs, case.pairs).run(device)
    torch.cuda.synchronize(device)
    assert share(made) <= 1
