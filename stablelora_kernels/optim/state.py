"""A parameter's state: counters, moments in float32, bfloat16 or 8 bits by blocks, float32 masters; and how a saved one loads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.optim.options import HYPER, LATER, STORAGE, Member, Setting, Storage, check_hyper
from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.optim.snapshot import with_strides_of
from stablelora_kernels.pairs import LoRAPair, split_lora_name
from stablelora_kernels.utils.modules import same_anywhere
from stablelora_kernels.utils.tensors import from_local, is_sharded, local, local_like
from stablelora_kernels.utils.validation import counted

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


def completed(
    state: dict[Tensor, dict[str, Any]],
    members: Sequence[Member],
    names: Sequence[str],
    settings: Sequence[Setting],
    storage: Storage,
) -> list[dict[str, Any]]:
    """The state of each member's ``param``: its entry in ``state``, or this process's shards of it, checked and completed.

    Tensors in other strides than the parameter's are replaced by copies in its strides.
    """
    entries, wanted = [], []
    for member, name in zip(members, names, strict=True):
        entry = state.get(member.owner, {})
        if member.param is not member.owner:
            entry = {key: local(value) for key, value in entry.items()}
        wanted.append(_wanted(member.param, settings[member.setting_index]["amsgrad"], storage))
        _check_entry(entry, name, member.param, wanted[-1])
        entries.append(entry)
    for entry, member, tensors in zip(entries, members, wanted, strict=True):
        _complete(entry, member.param, tensors)
    return entries


def _wanted(p: Tensor, amsgrad: bool, storage: Storage) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """The dtypes and shapes of the tensors in the state of ``p``, counters aside."""
    dtype = storage.moment_dtype(p)
    wanted = {name: (dtype, p.shape) for name in moment_names(amsgrad)}
    if dtype is torch.uint8:
        wanted |= {f"{name}_scale": (torch.float32, scales_shape(p)) for name in wanted}
    return wanted | ({"master": (torch.float32, p.shape)} if storage.has_master(p) else {})


def _check_entry(entry: dict[str, Any], name: str, p: Tensor, wanted: dict[str, Any]) -> None:
    """Check the state of ``p``, which may be someone else's. Missing tensors are made later."""
    for counter in COUNTERS:
        value = entry.get(counter, 0)
        if not (isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)):
            raise ValueError(f"the state of {name!r}: {counter!r} must be a number or a 0-d tensor, got {value!r}")
    for key, (dtype, shape) in wanted.items():
        if key not in entry:
            continue
        value = entry[key]
        is_tensor = isinstance(value, Tensor)
        if not (is_tensor and (value.dtype, value.shape, value.device) == (dtype, shape, p.device)):
            got = f"{value.dtype} {list(value.shape)} on {value.device}" if is_tensor else repr(value)
            raise ValueError(f"the state of {name!r}: {key!r} must be {dtype} {list(shape)} on {p.device}, got {got}")
        if dtype is torch.uint8 and value.stride() != p.stride():
            raise ValueError(
                f"the state of {name!r}: {key!r} is in 8 bits, so it must have the parameter's strides {p.stride()}, got "
                f"{value.stride()}"
            )


def _complete(entry: dict[str, Any], p: Tensor, wanted: dict[str, Any]) -> None:
    """Make what the state of ``p`` lacks: zeros in its strides, and its master. Drop a master that it should not have."""
    for key, (dtype, shape) in wanted.items():
        if key == "master" and key not in entry:
            entry[key] = p.detach().float()
        elif key not in entry:
            entry[key] = torch.zeros_like(p, dtype=dtype) if shape == p.shape else p.new_zeros(shape, dtype=dtype)
            # Zeros have no scale.
            entry.pop(f"{key}_scale", None)
        elif shape == p.shape:
            entry[key] = with_strides_of(p, entry[key])
    if "master" not in wanted:
        entry.pop("master", None)


def refresh_masters(masters: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Set a master to its parameter wherever the parameter is not its rounding: someone else has written to it."""
    for master, p in zip(masters, params, strict=True):
        torch.where(master.to(p.dtype) == p, master, p.float(), out=master)


def as_owned(entry: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """The state of ``p``, over the memory of that of this process's part of ``p``."""
    if not is_sharded(p):
        return entry
    return {key: value if key in COUNTERS else from_local(value, p) for key, value in entry.items()}


def stack_counters(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 0-d counters ``values`` as one new tensor [len(values)], None as zero; the host reads nothing."""
    if not values:
        return torch.zeros(0, dtype=dtype, device=device)
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.stack([zero if v is None else torch.as_tensor(v, dtype=dtype, device=device) for v in values])


def moment_names(amsgrad: bool) -> tuple[str, ...]:
    """The names of a parameter's moments in the optimizer's state."""
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")


def scales_shape(p: Tensor) -> torch.Size:
    """The shape of the scales of an 8-bit moment of ``p``."""
    return torch.Size([-(-p.numel() // BLOCK)])


def convert_moment(entry: dict[str, Any], name: str, p: Tensor, storage: Storage) -> dict[str, Tensor]:
    """Copy the saved moment ``name`` of ``p`` in the dtype of ``storage``, rounded to nearest, with scales if it has any."""
    saved, dtype, scale_name = entry[name], storage.moment_dtype(p), f"{name}_scale"
    scales = entry.get(scale_name)
    if saved.dtype is torch.uint8:
        expected = scales_shape(p)
        # The strides define the blocks.
        if not isinstance(scales, Tensor) or scales.shape != expected or saved.stride() != p.stride():
            raise ValueError(
                f"state_dict's {name!r} is in 8 bits, so {scale_name!r} must be {list(expected)} and its strides {p.stride()}, "
                f"got {'none' if scales is None else list(scales.shape)} and {saved.stride()}"
            )
        codes, scales = saved.detach().to(p.device, copy=True), scales.detach().to(p.device, torch.float32, copy=True)
        if dtype is torch.uint8:
            return {name: codes, scale_name: scales}
        saved = decode8(codes, scales, name == "exp_avg")
    in_8_bits = dtype is torch.uint8
    value = torch.empty_like(p, dtype=torch.float32 if in_8_bits else dtype, requires_grad=False).copy_(saved)
    if not in_8_bits:
        return {name: value}
    noise = torch.full((p.numel(),), _HALF, dtype=torch.int32, device=p.device)
    flat_codes, scales = encode8(flat(value), noise, name == "exp_avg")
    codes = torch.empty_like(value, dtype=dtype)
    flat(codes).copy_(flat_codes)
    return {name: codes, scale_name: scales}


def load_moment(entry: dict[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    """A copy of the moment ``name`` of a parameter's state in ``dtype``, that of its arithmetic."""
    if entry[name].dtype is torch.uint8:
        return decode8(entry[name], entry[f"{name}_scale"], name == "exp_avg")
    return entry[name].to(dtype, copy=True)


def _format(signed: bool) -> tuple[int, float]:
    """The number that gives a code float32's exponent and leading bits when added, and the step of subnormal values."""
    return (896, 2.0**-17) if signed else (768, 2.0**-33)


def decode8(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """float32 values of uint8 ``codes``, in their shape and strides; ``scales`` is float32, one a block.

    Source of the format: :func:`~stablelora_kernels.reference.optimizer.moment8_ref`.
    """
    shift, step = _format(signed)
    whole = flat(codes).int()
    magnitude = whole & 127 if signed else whole
    x = torch.where(magnitude >= 8, ((magnitude + shift) << 20).view(torch.float32), magnitude.float() * step)
    if signed:
        x = torch.where(whole >= 128, -x, x)
    value = torch.empty_like(codes, dtype=torch.float32)
    flat(value).copy_(x * scales.repeat_interleave(BLOCK)[: x.numel()])
    return value


def encode8(x: Tensor, noise: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """uint8 codes [n] and float32 scales [ceil(n / BLOCK)] of float32 ``x`` [n], rounded at random by int32 ``noise`` [n]."""
    shift, step = _format(signed)
    rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    # rows * 0 sums to 0, or to NaN where a value is not finite: the whole block then becomes NaN.
    scales = (rows.abs().amax(1) + (rows * 0.0).sum(1)) / 1.875
    y = (rows / torch.where(scales > 0, scales, 1.0)[:, None]).clamp_(-1.875, 1.875).flatten()[: x.numel()]
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
    """Mix every int32 word of ``x`` in place: a bijection in which each bit flips about half the bits of the result.

    Multiply-xorshift with the constants of Chris Wellons' "lowbias32" (public domain,
    https://nullprogram.com/blog/2018/07/31/). ``reference.optimizer.mix32`` is an independent copy, as an oracle should be.
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
    low, high = torch.tensor([seed, seed >> 32], dtype=torch.int64, device="cpu").to(torch.int32).split(1)
    return int(mix_(mix_(low) ^ high))


# Checkpoints


def is_state_init_step(
    groups: Sequence[dict[str, Any]], params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> bool:
    """Whether zero gradients and lr=0 ask for a state alone, as torch.distributed.checkpoint does: nothing else may change."""
    for group in groups:
        lr = group["lr"]
        if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
            return False
    device = params[0].device
    nonzero = torch.stack([g.any().to(device) for g in grads if g is not None]).any()
    sums = ShardSums(params)
    return not bool(sums.all_reduce_max_(nonzero.int()) if sums else nonzero)


def _identity(name: str) -> Any:
    """What identifies a parameter in a checkpoint, whatever wraps the model: its pair and role, else its name."""
    name = same_anywhere(name)
    return split_lora_name(name) or name


# What torch.optim.AdamW saves of a group. The latter choose among implementations, and mean nothing here.
_ADAMW, _UNUSED = (
    {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable"},
    {"foreach", "differentiable", "fused"},
)


def from_adamw(state_dict: Any, groups: Sequence[dict[str, Any]]) -> Any:
    """``state_dict``; one of ``torch.optim.AdamW`` with what StableLoRAAdamW's has beyond it, from ``groups``."""
    saved = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    if not (isinstance(saved, list) and saved and all(isinstance(group, dict) for group in saved)):
        return state_dict
    if any("shrink_ratio" in group or (_ADAMW | _UNUSED) - set(group) for group in saved):
        return state_dict
    if len(saved) != len(groups):
        raise ValueError(
            f"state_dict is torch.optim.AdamW's with {counted(len(saved), 'parameter group')}, this optimizer has {len(groups)}. "
            "Hugging Face's Trainer makes two, with weight decay and without: an optimizer by StableLoRAAdamWFactory.from_args "
            "has the same two and goes on with these moments. To begin with fresh ones, remove optimizer.pt from the checkpoint"
        )
    completed = []
    for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        if not theirs.get("decoupled_weight_decay", True) and theirs["weight_decay"] != 0:
            raise ValueError(
                f"state_dict is torch.optim.Adam's: the weight decay of its group {i}, {theirs['weight_decay']}, is not "
                "decoupled, and StableLoRAAdamW's is"
            )
        kept = {key: value for key, value in theirs.items() if key not in _UNUSED | {"decoupled_weight_decay"}}
        completed.append({key: ours[key] for key in HYPER} | kept)
    entries = state_dict.get("state", {})
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("state_dict must have a dict 'state' with a dict for each parameter, got something else")
    zero, state = torch.zeros((), dtype=torch.int32, device="cpu"), dict(entries)
    for key, entry in entries.items():
        if "step" in entry:
            state[key] = {**entry, "step": torch.as_tensor(entry["step"], device="cpu"), "latched_at": zero}
    return {**state_dict, "state": state, "param_groups": completed}


def check_state_groups(state_dict: Any, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of ``state_dict``, checked, with defaults for hyperparameters that an earlier version did not save."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("state_dict must be a dict with 'state' and 'param_groups'")
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"state_dict has {counted(len(saved), 'parameter group')}, the optimizer {len(groups)}")
    checked = []
    for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        if not isinstance(theirs, dict) or "params" not in theirs:
            got = f"the keys {sorted(theirs)}" if isinstance(theirs, dict) else repr(theirs)
            raise ValueError(f"group {i} of state_dict must be a dict with 'params', got {got}")
        if missing := [key for key in HYPER if key not in theirs and key not in LATER]:
            raise ValueError(
                f"state_dict is not StableLoRAAdamW's: its group {i} has no {', '.join(map(repr, missing))}"
            )
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"group {i} of state_dict has {len(theirs['params'])} parameters, the optimizer's {len(ours['params'])}"
            )
        their_names = theirs.get("param_names", ours["param_names"])
        for their_name, our_name in zip(their_names, ours["param_names"], strict=True):
            if _identity(their_name) != _identity(our_name):
                raise ValueError(f"group {i} of state_dict has {their_name!r} where the optimizer has {our_name!r}")
        complete = {**{key: ours[key] for key in LATER}, **theirs}
        checked.append({**complete, **check_hyper(complete, f"state_dict's group {i}: ")})
    return checked


def warn_of_differences(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Warn if loading a state with the group ``saved`` changes what the optimizer with the group ``own`` was asked to do."""
    asked, found = own["max_grad_norm"], saved["max_grad_norm"]
    if asked is not None and asked != found:
        warnings.warn(
            f"max_grad_norm was {asked} and is {found} now, as the other hyperparameters of the loaded state; set "
            "optimizer.max_grad_norm after loading to change it",
            UserWarning,
            stacklevel=6,
        )
    for name in STORAGE:
        if saved.get(name, own[name]) != own[name]:
            warnings.warn(
                f"the loaded state was saved with {name}={saved[name]}; it was converted, since this optimizer has "
                f"{name}={own[name]}",
                UserWarning,
                stacklevel=6,
            )


def restore_groups(saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Write copies of the saved hyperparameters into ``groups``; tensors stay on the device of those that they replace."""
    for saved, group in zip(saved_groups, groups, strict=True):
        for key, value in saved.items():
            if key not in ("params", "param_names", *STORAGE):
                old, new = group.get(key), deepcopy(value)
                if isinstance(old, Tensor) and isinstance(new, Tensor):
                    new = new.to(old.device)
                group[key] = new


def load_state(
    state_dict: dict[str, Any],
    saved_groups: Sequence[dict[str, Any]],
    groups: Sequence[dict[str, Any]],
    pairs: Sequence[LoRAPair],
    storage: Storage,
) -> dict[Tensor, dict[str, Any]]:
    """Copies of the saved state by parameter: on its device, in its strides and placements, in the dtypes of ``storage``."""
    owners = {id(pair.A) for pair in pairs}
    result: dict[Tensor, dict[str, Any]] = {}
    for saved, group in zip(saved_groups, groups, strict=True):
        for key, name, p in zip(saved["params"], group["param_names"], group["params"], strict=True):
            if key not in state_dict["state"]:
                continue
            entry = state_dict["state"][key]
            moments = moment_names(saved["amsgrad"])
            masters = ("master",) if storage.has_master(p) and "master" in entry else ()
            counters = {"step": torch.float32} | ({"latched_at": torch.int32} if id(p) in owners else {})
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
            entry = {**entry, **{field: local_like(entry[field], p) for field in (*moments, *masters)}}
            copied = {field: entry[field].detach().to(p.device, dtype, copy=True) for field, dtype in counters.items()}
            for field in moments:
                copied |= convert_moment(entry, field, shard, storage)
            for field in masters:
                copied[field] = torch.empty_like(shard, dtype=torch.float32).copy_(entry[field])
            result[p] = as_owned(copied, p)
    return result
