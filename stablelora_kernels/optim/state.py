"""A parameter's state: counters, moments in float32, bfloat16 or 8 bits by blocks, masters. How it
is completed, and loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.config import lookup_pattern
from stablelora_kernels.optim.options import (
    Storage,
    check_parameter,
    check_shared,
    is_adamws,
    names_for_patterns,
)
from stablelora_kernels.optim.sharding import Shard, ShardSums, shard_of
from stablelora_kernels.optim.snapshot import LIVE, upload, with_strides_of
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.tensors import from_local, is_sharded, local, local_like

# Scalars of a parameter's state; its other tensors have the parameter's shape.
COUNTERS = ("step", "latched_at")
# Added to the word that rounds a parameter's element to get the word that rounds its moments.
MOMENT_WORD = 0x9E3779B9
# Elements, in memory order, that share a scale in 8-bit moments.
BLOCK = 256
# The noise with which stochastic rounding rounds to nearest.
_HALF = 0x80080000 - 2**32


def flat(t: Tensor) -> Tensor:
    """A 1-d view of a dense tensor's elements in memory order."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


class Setting(NamedTuple):
    """The hyperparameters that some members share: those of their group, but for two of their own."""

    group: dict[str, Any]
    # The factor of the learning rate.
    lr_ratio: float
    # From a ``shrink_pattern``, or None.
    own_shrink_ratio: float | None

    def live(self) -> list[float | Tensor]:
        """The values of ``LIVE``: learning rate, weight decay and shrink ratio."""
        values = [self.group[name] for name in LIVE]
        return values if self.own_shrink_ratio is None else [*values[:2], self.own_shrink_ratio]


class Member(NamedTuple):
    """One trainable parameter as an engine sees it."""

    # This process's part of ``owner``, or ``owner`` itself if it is no DTensor.
    param: Tensor
    owner: Tensor
    name: str
    # Its index among the parameters of all devices.
    place: int
    setting: Setting
    shard: Shard
    # The state of ``param``.
    entry: dict[str, Any]


def _wanted(member: Member, storage: Storage) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """The dtypes and shapes of the tensors in the state of ``member``, counters aside."""
    p, dtype = member.param, storage.moment_dtype(member.param)
    wanted = {name: (dtype, p.shape) for name in moment_names(member.setting.group["amsgrad"])}
    if dtype is torch.uint8:
        wanted |= {f"{name}_scale": (torch.float32, scales_shape(p)) for name in wanted}
    return wanted | ({"master": (torch.float32, p.shape)} if storage.has_master(p) else {})


def _check_entry(member: Member, wanted: dict[str, Any]) -> None:
    """Check the state of ``member``, which may be someone else's. Missing tensors are made later."""
    entry, name, p = member.entry, member.name, member.param
    for counter in COUNTERS:
        value = entry.get(counter, 0)
        if not (
            isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)
        ):
            raise ValueError(
                f"the state of {name!r}: {counter!r} must be a number or a 0-d tensor, got {value!r}"
            )
    for key, (dtype, shape) in wanted.items():
        if key not in entry:
            continue
        value = entry[key]
        is_tensor = isinstance(value, Tensor)
        if not (is_tensor and (value.dtype, value.shape, value.device) == (dtype, shape, p.device)):
            got = (
                f"{value.dtype} {list(value.shape)} on {value.device}" if is_tensor else repr(value)
            )
            raise ValueError(
                f"the state of {name!r}: {key!r} must be {dtype} {list(shape)} on {p.device}, got {got}"
            )
        if dtype is torch.uint8 and value.stride() != p.stride():
            raise ValueError(
                f"the state of {name!r}: {key!r} is in 8 bits, so it must have the parameter's strides {p.stride()}, got "
                f"{value.stride()}"
            )


def _complete(member: Member, wanted: dict[str, Any]) -> None:
    """Make what the state of ``member`` lacks: zeros in its strides, and its master. Drop a master
    that it should not have.
    """
    entry, p = member.entry, member.param
    for key, (dtype, shape) in wanted.items():
        if key == "master" and key not in entry:
            entry[key] = p.detach().float()
        elif key not in entry:
            entry[key] = (
                torch.zeros_like(p, dtype=dtype)
                if shape == p.shape
                else p.new_zeros(shape, dtype=dtype)
            )
            # Zeros have no scale.
            entry.pop(f"{key}_scale", None)
        elif shape == p.shape:
            entry[key] = with_strides_of(p, entry[key])
    if "master" not in wanted:
        entry.pop("master", None)


def members_of(
    groups: Sequence[dict[str, Any]],
    pairs: Sequence[LoRAPair],
    state: dict[Tensor, dict[str, Any]],
    storage: Storage,
) -> dict[torch.device, list[Member]]:
    """The members on each device, which the halves of a pair must share. Raises ValueError if the
    state does not fit them.
    """
    check_shared(groups, storage)
    bs, pair_of_a = {id(pair.B) for pair in pairs}, {id(pair.A): pair for pair in pairs}
    settings: dict[tuple[int, float, float | None], Setting] = {}
    found: dict[torch.device, list[Member]] = {}
    base = place = 0
    for group_index, group in enumerate(groups):
        for name, p in zip(group["param_names"], group["params"], strict=True):
            check_parameter(f"parameter {name!r}", p)
            lr_ratio = group["lr_ratio_B"] if id(p) in bs else 1.0
            pair, patterns = pair_of_a.get(id(p)), group["shrink_pattern"]
            ratio = (
                None
                if pair is None
                else lookup_pattern(patterns, names_for_patterns(pair, name), None)
            )
            setting = settings.setdefault(
                (group_index, lr_ratio, ratio), Setting(group, lr_ratio, ratio)
            )
            part, entry = local(p), state.get(p, {})
            if part is not p:
                entry = {key: local(value) for key, value in entry.items()}
            member = Member(
                part, p, name, place, setting, shard_of(f"parameter {name!r}", p, base), entry
            )
            _check_entry(member, _wanted(member, storage))
            found.setdefault(part.device, []).append(member)
            base, place = base + p.numel(), place + 1
    if len(found) > 1 and groups[0]["max_grad_norm"] is not None:
        raise ValueError(
            f"max_grad_norm needs all parameters on one device, got {', '.join(map(str, found))}; "
            "clip with torch.nn.utils.clip_grad_norm_ instead"
        )
    for pair in pairs:
        if pair.A.device != pair.B.device:
            raise ValueError(
                f"pair {pair.name!r}: A is on {pair.A.device} and B on {pair.B.device}; they must share one"
            )
    return found


class Engine:
    """What the step of all parameters on one device needs on any backend.

    Counters of one kind share a tensor; the optimizer's state holds 0-d views of it.

    Args:
        members: the parameters. Their state is completed, and their counters become views.
        pairs: the pairs of all devices.
        storage: how state is kept.
        counts: how many equal counters each member has.
    """

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[LoRAPair],
        storage: Storage,
        counts: Sequence[int],
    ) -> None:
        self.members, self.params = members, [member.param for member in members]
        self.device, self.max_grad_norm = (
            self.params[0].device,
            members[0].setting.group["max_grad_norm"],
        )
        for member in members:
            _complete(member, _wanted(member, storage))
        places = {id(member.owner): i for i, member in enumerate(members)}
        # The places of each pair's A and B among the members.
        self.pairs = [
            (places[id(pair.A)], places[id(pair.B)]) for pair in pairs if id(pair.A) in places
        ]
        # All A's, then all B's.
        self.halves = [i for half in zip(*self.pairs, strict=True) for i in half]
        # Of members with a master, whose versions tell that someone else wrote to the parameter.
        self.watched = [i for i, member in enumerate(members) if "master" in member.entry]
        self.masters = [members[i].entry["master"] for i in self.watched]
        # By another tensor, so that the copies of a step leave the parameters' versions alone.
        self.mastered = [self.params[i].data for i in self.watched]
        # What the arithmetic goes by.
        self.work = [member.entry.get("master", member.param) for member in members]
        self.pair_sums = ShardSums([members[i].owner for i in self.halves])
        self.grad_sums = ShardSums([member.owner for member in members])
        # Whether the step reads all gradients without a copy.
        self.direct = False
        self.firsts = list(accumulate(counts, initial=0))[:-1]
        self.steps = self._counters("step", torch.float32, counts, range(len(members)))
        self.latched = self._counters("latched_at", torch.int32, counts, [a for a, _ in self.pairs])

    def _counters(
        self, name: str, dtype: torch.dtype, counts: Sequence[int], owners: Iterable[int]
    ) -> Tensor:
        """The counters of all members as one new tensor, zero where there is none; the host reads
        nothing.

        The entries of the members at ``owners`` become views of their first.
        """
        zero = torch.zeros((), dtype=dtype, device=self.device)
        values = [member.entry.get(name) for member in self.members]
        each = torch.stack(
            [
                zero if v is None else torch.as_tensor(v, dtype=dtype, device=self.device)
                for v in values
            ]
        )
        repeats = upload(counts, torch.int64, self.device)
        counters = torch.repeat_interleave(each, repeats, output_size=sum(counts))
        for i in owners:
            self.members[i].entry[name] = counters[self.firsts[i]]
        return counters

    def refresh_masters(self) -> None:
        """Set a master to its parameter wherever the parameter is not its rounding: someone else
        has written to it.
        """
        for master, p in zip(self.masters, self.mastered, strict=True):
            torch.where(master.to(p.dtype) == p, master, p.float(), out=master)


def as_owned(entry: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """The state of ``p``, over the memory of that of this process's part of ``p``."""
    if not is_sharded(p):
        return entry
    return {key: value if key in COUNTERS else from_local(value, p) for key, value in entry.items()}


def moment_names(amsgrad: bool) -> tuple[str, ...]:
    """The names of a parameter's moments in the optimizer's state."""
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")


def scales_shape(p: Tensor) -> torch.Size:
    """The shape of the scales of an 8-bit moment of ``p``."""
    return torch.Size([-(-p.numel() // BLOCK)])


def convert_moment(
    entry: dict[str, Any], name: str, p: Tensor, storage: Storage
) -> dict[str, Tensor]:
    """Copy the saved moment ``name`` of ``p`` in the dtype of ``storage``, rounded to nearest, with
    scales if it has any.
    """
    saved, dtype, scale_name = entry[name], storage.moment_dtype(p), f"{name}_scale"
    scales = entry.get(scale_name)
    if saved.dtype is torch.uint8:
        expected = scales_shape(p)
        # The strides define the blocks.
        if (
            not isinstance(scales, Tensor)
            or scales.shape != expected
            or saved.stride() != p.stride()
        ):
            raise ValueError(
                f"state_dict's {name!r} is in 8 bits, so {scale_name!r} must be {list(expected)} and its strides {p.stride()}, "
                f"got {'none' if scales is None else list(scales.shape)} and {saved.stride()}"
            )
        codes, scales = (
            saved.detach().to(p.device, copy=True),
            scales.detach().to(p.device, torch.float32, copy=True),
        )
        if dtype is torch.uint8:
            return {name: codes, scale_name: scales}
        saved = decode8(codes, scales, name == "exp_avg")
    if dtype is not torch.uint8:
        return {name: torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(saved)}
    value = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(saved)
    noise = torch.full((p.numel(),), _HALF, dtype=torch.int32, device=p.device)
    codes, scales = encode8(flat(value), noise, name == "exp_avg")
    return {name: codes.as_strided(value.shape, value.stride()), scale_name: scales}


def load_moment(entry: dict[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    """A copy of the moment ``name`` of a parameter's state in ``dtype``, that of its arithmetic."""
    if entry[name].dtype is torch.uint8:
        return decode8(entry[name], entry[f"{name}_scale"], name == "exp_avg")
    return entry[name].to(dtype, copy=True)


def _format(signed: bool) -> tuple[int, float]:
    """The number that gives a code float32's exponent and leading bits when added, and the step of
    subnormal values.
    """
    return (896, 2.0**-17) if signed else (768, 2.0**-33)


def decode8(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """float32 values of uint8 ``codes``, in their shape and strides; ``scales`` is float32, one a
    block.

    Source of the format: :func:`~stablelora_kernels.reference.optimizer.moment8_ref`.
    """
    shift, step = _format(signed)
    whole = flat(codes).int()
    magnitude = whole & 127 if signed else whole
    x = torch.where(
        magnitude >= 8, ((magnitude + shift) << 20).view(torch.float32), magnitude.float() * step
    )
    if signed:
        x = torch.where(whole >= 128, -x, x)
    value = x * scales.repeat_interleave(BLOCK)[: x.numel()]
    return value.as_strided(codes.shape, codes.stride())


def encode8(x: Tensor, noise: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """uint8 codes [n] and float32 scales [ceil(n / BLOCK)] of float32 ``x`` [n], rounded at random
    by int32 ``noise`` [n].
    """
    shift, step = _format(signed)
    rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    # rows * 0 sums to 0, or to NaN where a value is not finite: the whole block then becomes NaN.
    scales = (rows.abs().amax(1) + (rows * 0.0).sum(1)) / 1.875
    y = (
        (rows / torch.where(scales > 0, scales, 1.0)[:, None])
        .clamp_(-1.875, 1.875)
        .flatten()[: x.numel()]
    )
    size = y.abs()
    normal = ((size.view(torch.int32) + (noise & 0xFFFFF)) >> 20) - shift
    scaled = size / step
    whole = scaled.floor()
    up = scaled - whole > ((noise >> 8) & 0xFFFFFF).float() * 2.0**-24
    codes = torch.where(size < 8 * step, (whole + up).int(), normal)
    if signed:
        codes |= torch.where(y < 0, 128, 0).int()
    return (codes & 255).to(torch.uint8), scales


def mix_(x: Tensor) -> Tensor:
    """Mix every int32 word of ``x`` in place: a bijection in which each bit flips about half the
    bits of the result.

    Multiply-xorshift with the constants of Chris Wellons' "lowbias32" (public domain,
    https://nullprogram.com/blog/2018/07/31/). ``reference.optimizer.mix32`` is an independent copy,
    as an oracle should be.
    """
    # Shifts of int32 are arithmetic: the mask makes them logical.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def seed_word(seed: int) -> int:
    """The seed's part of the rounding key, as an int32."""
    low, high = (
        torch.tensor([seed, seed >> 32], dtype=torch.int64, device="cpu").to(torch.int32).split(1)
    )
    return int(mix_(mix_(low) ^ high))


# Checkpoints


def is_state_init_step(
    groups: Sequence[dict[str, Any]], params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> bool:
    """Whether zero gradients and lr=0 ask for a state alone, as torch.distributed.checkpoint does:
    nothing else may change.
    """
    rates = [group["lr"] for group in groups]
    if any((isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0 for lr in rates):
        return False
    device = params[0].device
    nonzero = torch.stack([g.any().to(device) for g in grads if g is not None]).any()
    sums = ShardSums(params)
    return not bool(sums.all_reduce_max_(nonzero.int()) if sums else nonzero)


def load_state(
    state_dict: dict[str, Any],
    saved_groups: Sequence[dict[str, Any]],
    groups: Sequence[dict[str, Any]],
    pairs: Sequence[LoRAPair],
    storage: Storage,
) -> dict[Tensor, dict[str, Any]]:
    """Copies of the saved state by parameter: on its device, in its strides and placements, in the
    dtypes of ``storage``.
    """
    owners, adamw = {id(pair.A) for pair in pairs}, is_adamws(state_dict["param_groups"])
    result: dict[Tensor, dict[str, Any]] = {}
    for saved, group in zip(saved_groups, groups, strict=True):
        for key, name, p in zip(
            saved["params"], group["param_names"], group["params"], strict=True
        ):
            if key not in state_dict["state"]:
                continue
            entry = dict(state_dict["state"][key])
            if adamw and "step" in entry:
                # Its step may be a number, and no pair has latched.
                entry["step"] = torch.as_tensor(entry["step"], device="cpu")
                entry["latched_at"] = torch.zeros((), dtype=torch.int32, device="cpu")
            moments = moment_names(saved["amsgrad"])
            masters = ("master",) if storage.has_master(p) and "master" in entry else ()
            counters = {"step": torch.float32} | (
                {"latched_at": torch.int32} if id(p) in owners else {}
            )
            for field in (*counters, *moments, *masters):
                shape = torch.Size([]) if field in counters else p.shape
                value = entry.get(field)
                if not isinstance(value, Tensor):
                    raise ValueError(f"state_dict has no {field!r} tensor for {name!r}")
                if value.shape != shape:
                    raise ValueError(
                        f"state_dict's {field!r} of {name!r} must be {list(shape)}, got {list(value.shape)}"
                    )
            shard = local(p.detach())
            entry |= {field: local_like(entry[field], p) for field in (*moments, *masters)}
            copied = {
                field: entry[field].detach().to(p.device, dtype, copy=True)
                for field, dtype in counters.items()
            }
            for field in moments:
                copied |= convert_moment(entry, field, shard, storage)
            for field in masters:
                copied[field] = torch.empty_like(shard, dtype=torch.float32).copy_(entry[field])
            result[p] = as_owned(copied, p)
    return result
