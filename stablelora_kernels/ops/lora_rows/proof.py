"""What ``lora_rows``' kernels are proven against at their first use: as ``lora_linear_proof``, each
branch on its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stablelora_kernels.dispatch import rules
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.ops.formulas import Wanted, gradients_of, project, to_multiply
from stablelora_kernels.ops.lora_linear.proof import (
    db_of,
    rounded_grad_b,
    rounded_grad_s,
    rounded_grad_x,
    rounded_output,
    rounded_s,
    saved_s,
)
from stablelora_kernels.ops.lora_rows.call import (
    RowsBackwardCall,
    RowsBackwardResults,
    RowsForwardCall,
    RowsForwardResults,
    branches_of,
    mask_of,
)
from stablelora_kernels.ops.matrices import with_own_memory
from stablelora_kernels.ops.proofs import (
    Compared,
    Oracle,
    StandIns,
    arithmetic_of,
    branch_like,
    drawn_mask,
    is_expanded,
    kept_rows,
    packed,
    sample_of,
    sample_of_sums,
)
from stablelora_kernels.projection import s_unit
from stablelora_kernels.reference import unpack_mask
from stablelora_kernels.reference.rounding import RoundedLayer, operand


def _samples(call: RowsForwardCall | RowsBackwardCall, like: Tensor) -> list[Tensor]:
    """The numbers of the rows that are compared of each branch, within its own rows."""
    counts = [rows.stop - rows.start for rows in call.settings.rows]
    if is_expanded(like):
        return [torch.arange(count, device=like.device) for count in counts]
    sample = sample_of if isinstance(call, RowsForwardCall) else sample_of_sums
    return [sample(count, like.device) for count in counts]


def _stand_in_branches(
    draw: StandIns, call: RowsForwardCall | RowsBackwardCall
) -> tuple[list[Tensor], list[Tensor]]:
    """Each A and each B of the call, others of the same layouts."""
    lora_As, lora_Bs = [], []
    for p in branches_of(call):
        branch = branch_like(draw, p, 1.0)
        assert branch.lora_A is not None and branch.lora_B is not None
        lora_As.append(branch.lora_A)
        lora_Bs.append(branch.lora_B)
    return lora_As, lora_Bs


def forward_stand_ins(call: RowsForwardCall) -> RowsForwardCall:
    """``call`` on stand-ins of its own layouts."""
    draw = StandIns(call.x.device)
    lora_As, lora_Bs = _stand_in_branches(draw, call)
    return call._replace(
        x=draw.normal(call.x),
        y=draw.normal(call.y),
        lora_As=lora_As,
        lora_Bs=lora_Bs,
    )


def compare_forward(
    call: RowsForwardCall, results: RowsForwardResults, written: Sequence[Tensor]
) -> Iterator[Compared | str]:
    """A sample of each branch's rows of Y, S and mask, and faults in words."""
    settings = call.settings
    dtype = call.x.dtype
    arithmetic = arithmetic_of(dtype)
    samples = _samples(call, call.x)
    for i, (p, rows) in enumerate(zip(branches_of(call), settings.rows, strict=True)):
        sample = samples[i]
        x = operand(call.x[rows][sample], dtype)
        keep = None
        seed = call.seeds[i]
        dropout_p = settings.dropout_ps[i]
        if dropout_p and seed is not None:
            mask = mask_of(results.masks, i)
            kept = kept_rows(mask, seed, sample, call.x.shape[1], dropout_p)
            keep = kept.keep
            yield kept.fault
        base = operand(call.y[rows][sample], call.y.dtype)
        expected = rounded_output(arithmetic, x, p, keep, base, call.y.dtype)
        yield Compared(f"Y of branch {i}", written[0][rows][sample], expected, arithmetic)
        if settings.need_ab:
            yield Compared(
                f"S of branch {i}",
                results.s[i][sample],
                rounded_s(arithmetic, x, p, keep),
                arithmetic,
            )


def forward_by_operators(call: RowsForwardCall) -> RowsForwardResults:
    """The results by PyTorch's operators, which add each branch to its rows of Y."""
    settings = call.settings
    every_s: list[Tensor] = []
    masks: list[Tensor | None] = []
    for i, (p, rows) in enumerate(zip(branches_of(call), settings.rows, strict=True)):
        x = call.x[rows]
        keep = drawn_mask(x, call.seeds[i], settings.dropout_ps[i])
        y, s = project(x, to_multiply(p, x.dtype), keep, call.y[rows])
        call.y[rows] = y
        every_s.append(saved_s(s if settings.need_ab else s[:0], p.scaling))
        is_kept = keep is not None and (settings.need_x or settings.need_ab)
        nothing = torch.ones(0, x.shape[1], dtype=torch.bool, device=x.device)
        masks.append(packed(keep if is_kept and keep is not None else nothing))
    return RowsForwardResults(every_s, masks)


def backward_stand_ins(call: RowsBackwardCall) -> RowsBackwardCall:
    """``call`` on stand-ins of its own layouts; all but the sampled rows of dY are zero."""
    draw = StandIns(call.grad.device)
    samples = zip(_samples(call, call.grad), call.settings.starts, strict=True)
    rows = torch.cat([sample + start for sample, start in samples])
    lora_As, lora_Bs = _stand_in_branches(draw, call)
    return call._replace(
        grad=draw.sampled(call.grad, rows),
        x=draw.of(call.x),
        dx=draw.of(call.dx),
        lora_As=lora_As,
        lora_Bs=lora_Bs,
        s=[draw.of(s) for s in call.s],
    )


def compare_backward(
    call: RowsBackwardCall, results: RowsBackwardResults, written: Sequence[Tensor]
) -> Iterator[Compared | str]:
    """A sample of each branch's rows of dX, and each dA and dB whole."""
    dtype = call.grad.dtype
    arithmetic = arithmetic_of(dtype)
    samples = _samples(call, call.grad)
    for i, (p, rows) in enumerate(zip(branches_of(call), call.settings.rows, strict=True)):
        assert p.lora_A is not None
        sample = samples[i]
        grad = operand(call.grad[rows][sample], dtype)
        mask = mask_of(call.masks, i)
        keep = None if mask is None else unpack_mask(mask[sample], p.lora_A.shape[1])
        ds = rounded_grad_s(arithmetic, grad, p)
        if call.dx is not None:
            before = operand(call.dx[rows][sample], call.dx.dtype)
            branch = rounded_grad_x(arithmetic, grad, ds, p, keep)
            after = written[0][rows][sample]
            yield Compared(
                f"dX of branch {i}", after, (before + branch).stored(call.dx.dtype), arithmetic
            )
        if call.settings.need_ab:
            assert call.x is not None
            x = operand(call.x[rows][sample], dtype)
            dropped = x if keep is None else x * keep.double()
            da = RoundedLayer(arithmetic, None, None, None, None, p.scaling).grad_a(
                ds, dropped, p.lora_A.dtype
            )
            yield Compared(f"dA of branch {i}", results.das[i], da, arithmetic)
            s = call.s[i]
            assert s is not None
            db = rounded_grad_b(arithmetic, grad, s[sample], p)
            yield Compared(f"dB of branch {i}", results.dbs[i], db, arithmetic)


def backward_by_operators(call: RowsBackwardCall) -> RowsBackwardResults:
    """The results by PyTorch's operators, which add each branch's gradient to its rows of dX."""
    need_ab = call.settings.need_ab
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    for i, (p, rows) in enumerate(zip(branches_of(call), call.settings.rows, strict=True)):
        assert p.lora_A is not None and p.lora_B is not None
        grad = with_own_memory(call.grad[rows])
        mask = mask_of(call.masks, i)
        keep = None if mask is None else unpack_mask(mask, p.lora_A.shape[1])
        multiply = to_multiply(p, grad.dtype)
        wanted = Wanted(call.dx is not None, need_ab, b=False)
        x = None if call.x is None else call.x[rows]
        dx, da, _ = gradients_of(x, grad, multiply, None, keep, p.lora_A.dtype, wanted)
        if call.dx is not None and dx is not None:
            call.dx[rows] += dx
        if need_ab:
            s = call.s[i]
            assert da is not None and s is not None
            das.append(da.contiguous())
            dbs.append(db_of(grad, s, s_unit(grad.dtype, p.scaling), p.lora_B.dtype))
    return RowsBackwardResults(das, dbs)


def _strategies(call: RowsForwardCall | RowsBackwardCall) -> list[str]:
    """That of the branch with the highest rank and of the one with the most rows."""
    rank = max(lora_A.shape[0] for lora_A in call.lora_As)
    rows = max(rows.stop - rows.start for rows in call.settings.rows)
    first = call.lora_As[0]
    largest = Call("forward", rows, 1, 1, rank, first.dtype, first.dtype, dropout=False)
    return [rules.choose_branch(largest).strategy]


FORWARD = Oracle(
    stand_ins=forward_stand_ins,
    compare=compare_forward,
    by_operators=forward_by_operators,
    strategies=_strategies,
    written=lambda call: [call.y],
)
BACKWARD = Oracle(
    stand_ins=backward_stand_ins,
    compare=compare_backward,
    by_operators=backward_by_operators,
    strategies=_strategies,
    written=lambda call: [] if call.dx is None else [call.dx],
)
