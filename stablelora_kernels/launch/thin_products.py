"""Launches of the thin products alone: S or dS, and dA and dB."""

from __future__ import annotations

from collections.abc import Sequence

from stablelora_kernels.dispatch import tiles
from stablelora_kernels.dispatch.problem import Call, Device
from stablelora_kernels.dispatch.tiles import Plan
from stablelora_kernels.kernels.lora.thin_products import (
    _lora_down_kernel,
    _lora_weight_grads_kernel,
)
from stablelora_kernels.launch.base import Arguments, Launch, flag_words, planned
from stablelora_kernels.launch.fill_jobs import (
    Gradient,
    Product,
    co_scheduled_db,
    da_job,
    db_job,
    rows,
    s_job,
    threshold,
    z_rows,
)


def lora_down(device: Device, members: Sequence[Product]) -> Launch:
    """S of ``members``, which share X; of a single one with dB, if wanted."""
    first = members[0]
    call = _largest(members)
    plan = tiles.down_plan(device, call, len(members))
    s = s_job(device, members, plan)
    db = Gradient()
    if len(members) == 1:
        db = co_scheduled_db(device, first, plan.tile.num_warps)
    arguments: Arguments = {
        "x": rows(first.x, call.k),
        "s": s.job,
        "db": db.job,
        "M": call.m,
        "S_SPLITS": plan.splits,
        "DB_PROGRAMS": db.programs,
        "DB_SPLITS": db.splits,
        "threshold": threshold(first),
    }
    constants: Arguments = {"S": s.tile, "DB": db.tile}
    flags = flag_words(dropout=call.dropout and not call.masked, dB=db.programs > 0)
    words = _thin_words(plan, len(members)) + flags
    programs = plan.programs + db.programs
    return planned(_lora_down_kernel, words, plan, programs, arguments, constants)


def weight_grads(device: Device, members: Sequence[Product]) -> Launch:
    """dA of ``members``, which share Z; or dA and dB of a single one, those that are wanted."""
    first = members[0]
    call = _largest(members)
    need_a = first.da is not None
    need_b = first.db is not None and len(members) == 1
    plans = tiles.weight_grads_plan(device, call, need_a, need_b, len(members))
    da = da_job(device, members, plans.da) if need_a else Gradient()
    db = db_job(device, first, plans.db) if need_b else Gradient()
    arguments: Arguments = {
        "z": z_rows(first),
        "da": da.job,
        "dy": rows(first.x, call.k),
        "db": db.job,
        "M": call.m,
        "DA_PROGRAMS": da.programs,
        "SPLITS": plans.both.splits,
    }
    constants: Arguments = {"DA": da.tile, "DB": db.tile}
    masked = call.dropout and need_a
    flags = flag_words(dropout=masked, **{first.activation: first.activation != ""})
    words = _thin_words(plans.both, len(members)) + flags
    programs = plans.both.programs
    return planned(_lora_weight_grads_kernel, words, plans.both, programs, arguments, constants)


def _thin_words(plan: Plan, members: int) -> str:
    """The tile of a thin product, in words."""
    tile = plan.tile
    several = f"{members} of " if members > 1 else ""
    return f"{several}r{plan.block_r} {tile.BLOCK_M}x{tile.BLOCK_K}"


def _largest(members: Sequence[Product]) -> Call:
    """The call of ``members``, with the largest rank."""
    return members[0].call._replace(r=max(p.call.r for p in members))
