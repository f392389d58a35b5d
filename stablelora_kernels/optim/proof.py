"""The kernel of the optimizer's step, proven at its first use: two steps of stand-ins for a sample of
the parameters, against the step on PyTorch's operators.

Not proven are the launches that only some steps have: under a GradScaler, and of sharded parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch.first_use import Kind, fault_at_first_use
from stablelora_kernels.optim.engine import Member, Setting
from stablelora_kernels.optim.groups import ParamGroup
from stablelora_kernels.optim.options import LIVE, Storage
from stablelora_kernels.optim.sharding import Shard
from stablelora_kernels.optim.snapshot import Change, Gradients
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
        tensors = [name for name in LIVE if isinstance(group[name], Tensor)]
        options = [
            str(p.dtype)[6:],
            self.role,
            "aligned" if aligned else "unaligned",
            group["stop_condition"],
            f"amsgrad {group['amsgrad']}",
            f"clipped {group['max_grad_norm'] is not None}",
            f"tensors {tensors}",
        ]
        return ", ".join(options)


def step_fault(members: Sequence[Member], pairs: Sequence[LoRAPair], storage: Storage) -> str:
    """Why the kernel must not take the step of these members of a device, or ""."""
    sampled = _sample(members, pairs)
    device = members[0].param.device
    words = sorted({one.words for one in sampled})
    kind = Kind("stable_adamw", f"{storage}: {'; '.join(words)}")
    return fault_at_first_use(kind, device, lambda: _find_fault(sampled, storage))


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


def _find_fault(sampled: Sequence[_Sampled], storage: Storage) -> str:
    """What is wrong with the kernel's steps, in words, or ""."""
    by_kernel, again = [_run(TritonStep, sampled, storage) for _ in range(2)]
    by_operators = _run(TorchStep, sampled, storage)
    for name, expected in by_operators.items():
        fault = _difference(by_kernel[name], expected)
        if fault:
            return f"{name} {fault}"
    for name, value in by_kernel.items():
        if not torch.equal(value, again[name]):
            return f"two runs on the same operands differ in {name}"
    return ""


def _run(
    engine_class: type[TorchStep] | type[TritonStep], sampled: Sequence[_Sampled], storage: Storage
) -> dict[str, Tensor]:
    """Parameters and state behind two steps of stand-ins, by name."""
    device = sampled[0].member.param.device
    generator = torch.Generator(device).manual_seed(0)
    settings: dict[int, Setting] = {}
    members: list[Member] = []
    base = 0
    for position, (role, pair, member) in enumerate(sampled):
        # A large A and a small B, so that the pair shrinks.
        size = 0.01 if role == "B" else 1.0
        values = torch.empty_like(member.param).normal_(0.0, size, generator=generator)
        setting = settings.setdefault(id(member.setting), _stand_in(member.setting, device))
        name = f"{role} of pair {pair}" if pair >= 0 else f"parameter {position}"
        stood_in = Member(values, values, name, position, setting, Shard(base), {})
        members.append(stood_in)
        base += values.numel()
    halves = {(one.role, one.pair): m.param for one, m in zip(sampled, members, strict=True)}
    pairs = [
        LoRAPair(f"pair {pair}", p, halves[("B", pair)])
        for (role, pair), p in halves.items()
        if role == "A"
    ]
    skipped = torch.zeros((), dtype=torch.int32, device=device)
    engine = engine_class(members, pairs, storage, skipped)
    for _ in range(2):
        grads = [torch.empty_like(m.param).normal_(0.0, 0.1, generator=generator) for m in members]
        engine.step(Gradients.of([*grads]), Change(), None, None)
    results: dict[str, Tensor] = {}
    for member in members:
        results[member.name] = member.param
        results |= {f"{key} of {member.name}": value for key, value in member.entry.items()}
    return results


def _stand_in(setting: Setting, device: torch.device) -> Setting:
    """A setting with live hyperparameters that show, tensors where the user's are."""
    group: ParamGroup = setting.group.copy()
    for name in LIVE:
        is_tensor = isinstance(group[name], Tensor)
        value = _LIVE[name]
        group[name] = torch.tensor(value, device=device) if is_tensor else value
    group["capturable"] = False
    ratio = None if setting.pattern_ratio is None else _LIVE["shrink_ratio"]
    return Setting(group, setting.lr_ratio, ratio)


def _difference(value: Tensor, expected: Tensor) -> str:
    """How a result differs from the one on PyTorch's operators by more than it may, or ""."""
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
        if bool((error > allowed).any()):
            return f"is off by {error.max().item():.3g}, allowed {allowed.min().item():.3g} to {allowed.max().item():.3g}"
        return ""
    unit = torch.finfo(value.dtype).eps * torch.maximum(size, value.double().abs())
    return _rounded_otherwise(error, error > unit + of_parts)


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
