"""The kernels of the optimizer's step and of the shrinkage alone, proven at their first use: a few
steps of stand-ins for a sample of the parameters, against the step on PyTorch's operators.

Not proven are the launches that only some steps have: under a GradScaler, and of sharded parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from stablelora_kernels.dispatch.first_use import Kind, fault_at_first_use
from stablelora_kernels.optim.engine import Change, Gradients, Member, Setting
from stablelora_kernels.optim.groups import ParamGroup
from stablelora_kernels.optim.latch import Widths
from stablelora_kernels.optim.options import LIVE, OPTIONS
from stablelora_kernels.optim.sharding import Shard, ShardSums
from stablelora_kernels.optim.shrink import (
    Counters,
    Parts,
    ShrinkMember,
    ShrinkStep,
    TorchShrink,
    TritonShrink,
)
from stablelora_kernels.optim.torch_step import TorchStep
from stablelora_kernels.optim.triton_step import TritonStep
from stablelora_kernels.pairs import LoRAPair

# By how much float32 results may differ, as a share of the root mean square and of the element: a
# hundred roundings.
_SHARE = 1e-5
# What is rounded at random, in the same direction by both, goes another way where float32 results
# differ: by one unit, in so many elements.
_OTHERWISE = 0.01
# Live hyperparameters: each has an effect that a difference would show.
_LIVE = {"lr": 1e-2, "weight_decay": 0.1, "shrink_ratio": 0.05}
# lr_ratio_B, if it is not 1.
_LR_RATIO = 2.0
# Then so many elements of a float32 parameter are off by a part of their updates. An update of
# AdamW is about the learning rate: five one way and five the other way end ten of it apart.
_ASTRAY = 10 * _LIVE["lr"] * _LR_RATIO


class _Step(NamedTuple):
    """A step of the proof."""

    change: Change
    # The gradients' norm as a share of the one that clips them, if one does.
    norm: float
    # Whether an A has a gradient. Its sum of squares then waits for the next step.
    of_a: bool = True
    is_finite: bool = True


# What the first step leaves: later ones measure no parameter anew.
_GOES_ON = Change(build=False, hyper=False, gradients=True, written=False)
_STEPS = (
    _Step(Change(), 2.0),
    _Step(_GOES_ON, 0.5),
    _Step(_GOES_ON, 2.0, of_a=False),
    _Step(_GOES_ON, 0.5),
)
# Where a norm clips the gradients, one that is not finite skips the step.
_SKIPPED = _Step(_GOES_ON, 1.0, is_finite=False)
# Orders of magnitude between the gradients' elements.
_ORDERS = 6.0
# Of each kind of pair, one that shrinks and one that latches: the sizes of A and B.
_SIZES = ({"A": 1.0, "B": 0.01}, {"A": 0.01, "B": 1.0})


class _Sampled(NamedTuple):
    """A member that stands for those of its kind."""

    # "A", "B" or "alone".
    role: str
    # Its pair among those sampled, or -1.
    pair: int
    member: Member

    @property
    def words(self) -> str:
        p = self.member.param
        group = self.member.setting.group
        aligned = p.data_ptr() % 16 == 0 and p.numel() % 16 == 0
        tensors = [name for name in LIVE if isinstance(self.member.setting.option(name), Tensor)]
        words = [
            str(p.dtype)[6:],
            self.role,
            "aligned" if aligned else "unaligned",
            f"clipped {group['max_grad_norm'] is not None}",
            f"tensors {tensors}",
        ]
        # Numbers choose no other code.
        for name, option in OPTIONS.items():
            if option.builds and isinstance(option.default, (bool, str, torch.dtype)):
                words.append(f"{name} {self.member.setting.option(name)}")
        return ", ".join(words)


def step_fault(members: Sequence[Member], pairs: Sequence[LoRAPair]) -> str:
    """Why the kernel must not take the step of these members of a device, or ""."""
    sampled = _sample(members, pairs)
    device = members[0].param.device
    words = sorted({one.words for one in sampled})
    kind = Kind("stable_adamw", "; ".join(words))
    return fault_at_first_use(kind, device, lambda: _find_fault(sampled))


def _sample(members: Sequence[Member], pairs: Sequence[LoRAPair]) -> list[_Sampled]:
    """A pair of each kind, and another parameter of each kind."""
    by_owner = {id(member.owner): member for member in members}
    sampled: list[_Sampled] = []
    seen: set[tuple[str, ...]] = set()
    in_pairs: set[int] = set()
    count = 0
    for pair in pairs:
        if id(pair.A) not in by_owner:
            continue
        in_pairs |= {id(pair.A), id(pair.B)}
        halves = [
            _Sampled("A", count, by_owner[id(pair.A)]),
            _Sampled("B", count, by_owner[id(pair.B)]),
        ]
        kind = tuple([half.words for half in halves])
        if kind not in seen:
            seen.add(kind)
            sampled += halves
            count += 1
    for member in members:
        alone = _Sampled("alone", -1, member)
        if id(member.owner) not in in_pairs and (alone.words,) not in seen:
            seen.add((alone.words,))
            sampled.append(alone)
    return sampled


def _find_fault(sampled: Sequence[_Sampled]) -> str:
    """What is wrong with the kernel's steps, in words, or ""."""
    moments_dtype = sampled[0].member.setting.group["moments_dtype"]
    astray = 0.0 if moments_dtype is torch.float32 else _ASTRAY
    return _first_fault(lambda: _run(TritonStep, sampled), lambda: _run(TorchStep, sampled), astray)


# Results behind the steps of stand-ins, by name.
_Results = Callable[[], dict[str, Tensor]]


def _first_fault(by_kernel: _Results, by_operators: _Results, astray: float) -> str:
    """How the kernel's results differ from those on PyTorch's operators, or a second time from the
    first, in words, or "". ``astray`` as of :func:`_difference`.
    """
    found = by_kernel()
    again = by_kernel()
    for name, expected in by_operators().items():
        fault = _difference(found[name], expected, astray)
        if fault:
            return f"{name} {fault}"
    for name, value in found.items():
        if not torch.equal(value, again[name]):
            return f"two runs on the same operands differ in {name}"
    return ""


def _run(
    engine_class: type[TorchStep] | type[TritonStep], sampled: Sequence[_Sampled]
) -> dict[str, Tensor]:
    """Parameters and state behind the steps of stand-ins, by name."""
    device = sampled[0].member.param.device
    generator = torch.Generator(device).manual_seed(0)
    settings: dict[int, Setting] = {}
    members: list[Member] = []
    # By the pair's name.
    halves: dict[str, dict[str, Tensor]] = {}
    base = 0
    for sizes in _SIZES:
        for role, pair, member in sampled:
            values = torch.empty_like(member.param)
            values.normal_(0.0, sizes.get(role, 1.0), generator=generator)
            setting = settings.setdefault(id(member.setting), _stand_in(member.setting, device))
            name = f"parameter {len(members)}"
            if pair >= 0:
                of_pair = f"pair {pair} with an A of {sizes['A']}"
                name = f"{role} of {of_pair}"
                halves.setdefault(of_pair, {})[role] = values
            members.append(Member(values, values, name, len(members), setting, Shard(base), {}))
            base += values.numel()
    pairs = [LoRAPair(name, of_pair["A"], of_pair["B"]) for name, of_pair in halves.items()]
    skipped = torch.zeros((), dtype=torch.int32, device=device)
    engine = engine_class(members, pairs, skipped)
    clips = members[0].setting.group["max_grad_norm"]
    ids_of_a = {id(pair.A) for pair in pairs}
    # Elements of any size, as the formats of moments have them.
    sizes_of = {
        id(m.param): 10.0 ** -torch.empty_like(m.param).uniform_(0, _ORDERS, generator=generator)
        for m in members
    }
    for step in _STEPS if clips is None else (*_STEPS[:2], _SKIPPED, *_STEPS[2:]):
        grads: list[Tensor | None] = []
        for member in members:
            p = member.param
            grad = torch.empty_like(p).normal_(0.0, 0.1, generator=generator).mul_(sizes_of[id(p)])
            grads.append(grad if step.of_a or id(p) not in ids_of_a else None)
        if clips is not None:
            _scale(grads, step.norm * clips)
        if not step.is_finite:
            for t in grads:
                if t is not None:
                    t.fill_(torch.nan)
        engine.step(Gradients.of(grads), step.change, None, None)
    results: dict[str, Tensor] = {"the count of skipped steps": skipped}
    for member in members:
        results[member.name] = member.param
        results |= {f"{key} of {member.name}": value for key, value in member.entry.items()}
    return results


def shrink_fault(members: Sequence[ShrinkMember], parts: Sequence[Parts]) -> str:
    """Why the kernel must not shrink these pairs of a device, or ""."""
    by_words: dict[str, Parts] = {}
    for member, of_pair in zip(members, parts, strict=True):
        words = [
            f"{str(t.dtype)[6:]} {'aligned' if (t.data_ptr() | t.numel()) % 16 == 0 else 'unaligned'}"
            for t in of_pair[:2]
        ]
        cut = "a cut A" if member.shard.columns else "a whole A"
        by_words.setdefault(", ".join([*words, cut]), of_pair)
    kind = Kind("stable_shrink", "; ".join(sorted(by_words)))

    def find_fault() -> str:
        return _first_fault(
            lambda: _run_shrink(TritonShrink, by_words),
            lambda: _run_shrink(TorchShrink, by_words),
            astray=0.0,
        )

    return fault_at_first_use(kind, parts[0].a.device, find_fault)


def _run_shrink(
    engine_class: type[TorchShrink] | type[TritonShrink], by_words: Mapping[str, Parts]
) -> dict[str, Tensor]:
    """Stand-ins for pairs and their counters behind a few shrinkages, by name."""
    members: list[ShrinkMember] = []
    stand_ins: list[Parts] = []
    results: dict[str, Tensor] = {}
    device = next(iter(by_words.values())).a.device
    generator = torch.Generator(device).manual_seed(0)
    base = 0
    for sizes in _SIZES:
        for words, of_pair in by_words.items():
            a, b = (
                torch.empty_like(t).normal_(0.0, size, generator=generator)
                for t, size in zip(of_pair[:2], sizes.values(), strict=True)
            )
            # What is beside A shrinks as A does.
            stand_in = Parts(a, b, a.clone())
            stand_ins.append(stand_in)
            # Columns that cut a row between any two elements.
            shard = Shard(base, 3, 7) if "cut" in words else Shard(base)
            members.append(ShrinkMember(Widths(n=1, m=1), shard))
            base += a.numel()
            for part, value in stand_in._asdict().items():
                results[f"{part} of a pair with {words}, A of {sizes['A']}"] = value
    counters = Counters(*torch.zeros(2, len(members), dtype=torch.int32, device=device))
    results |= counters._asdict()
    engine = engine_class(members, counters, ShardSums([]))
    for present in (True, False, True):
        step = ShrinkStep(
            parts=lambda: stand_ins,
            present=[present] * len(members),
            ratios=[_LIVE["shrink_ratio"]] * len(members),
            seeds=[k + 1 for k in range(len(members))],
            found_inf=None,
        )
        engine.step(step)
    return results


def _scale(grads: Sequence[Tensor | None], norm: float) -> None:
    """Give all gradients together this norm, if it is one."""
    there = [grad for grad in grads if grad is not None]
    before = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in there])
    ).item()
    if before and math.isfinite(norm):
        for grad in there:
            grad.mul_(norm / before)


def _stand_in(setting: Setting, device: torch.device) -> Setting:
    """A setting with live hyperparameters that show, tensors where the user's are."""
    live = {
        name: torch.tensor(value, device=device)
        if isinstance(setting.option(name), Tensor)
        else value
        for name, value in _LIVE.items()
    }
    group = cast("ParamGroup", {**setting.group, **live, "capturable": False})
    ratio = None if setting.pattern_ratio is None else _LIVE["shrink_ratio"]
    return Setting(group, 1.0 if setting.lr_ratio == 1 else _LR_RATIO, ratio)


def _difference(value: Tensor, expected: Tensor, astray: float) -> str:
    """How a result differs from the one on PyTorch's operators by more than it may, or "".
    ``astray``: by how much some elements may differ where moments are rounded at random.
    """
    if not value.is_floating_point():
        # Counters are equal; codes of 8 bits may be one apart, as what is rounded at random.
        off = (value.int() - expected.int()).abs()
        return _rounded_otherwise(off, off > (1 if value.dtype == torch.uint8 else 0))
    error = (value.double() - expected.double()).abs().nan_to_num(nan=math.inf)
    size = expected.double().abs()
    # What cancels keeps the roundings of its parts.
    of_parts = _SHARE * size.square().mean().sqrt()
    if value.dtype == torch.float32:
        allowed = _SHARE * size + of_parts
        if astray:
            return _rounded_otherwise(error.where(error > allowed, 0.0), error > astray)
        if bool((error > allowed).any()):
            return f"is off by {error.max().item():.3g}, allowed {allowed.min().item():.3g} to {allowed.max().item():.3g}"
        return ""
    unit = torch.finfo(value.dtype).eps * torch.maximum(size, value.double().abs())
    # Each of the steps may round otherwise by a unit.
    return _rounded_otherwise(error, error > len(_STEPS) * unit + of_parts + astray)


def _rounded_otherwise(error: Tensor, too_far: Tensor) -> str:
    """What is wrong with results that are rounded at random: one is off by more than a unit, or more
    of them by one than float32 differs.
    """
    if bool(too_far.any()):
        return f"is off by {error.max().item():.3g}, more than a unit in the last place"
    count = int((error > 0).sum())
    allowed = 4 + int(_OTHERWISE * error.numel())
    if count > allowed:
        return f"has {count} elements that are rounded otherwise, allowed {allowed}"
    return ""
