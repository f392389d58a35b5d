"""The state of one parameter: which tensors it has, in which dtypes and shapes; how an entry of the
optimizer's state is checked, completed and converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.optim.options import Storage
from stablelora_kernels.optim.rounding import NEAREST, decode8, encode8, flat, scales_shape
from stablelora_kernels.utils.tensors import from_local, is_sharded

# A parameter's state by name. Counters that a user has put in may be numbers until an engine is
# built.
Entry = dict[str, Tensor]
# Scalars of a parameter's state; its other tensors have the parameter's shape.
COUNTERS = ("step", "latched_at")


class Layout(NamedTuple):
    """The dtype and the shape of one tensor of a parameter's state."""

    dtype: torch.dtype
    shape: torch.Size


def moment_names(amsgrad: bool) -> tuple[str, ...]:
    """The names of a parameter's moments in the optimizer's state."""
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")


def layouts_of(p: Tensor, amsgrad: bool, storage: Storage) -> dict[str, Layout]:
    """The tensors that the state of ``p`` must have, counters aside."""
    dtype = storage.moment_dtype(p)
    layouts = {name: Layout(dtype, p.shape) for name in moment_names(amsgrad)}
    if dtype is torch.uint8:
        layouts |= {f"{name}_scale": Layout(torch.float32, scales_shape(p)) for name in layouts}
    if storage.has_master(p):
        layouts["master"] = Layout(torch.float32, p.shape)
    return layouts


def check_entry(
    entry: Mapping[str, object], name: str, p: Tensor, layouts: Mapping[str, Layout]
) -> None:
    """Check the state of the parameter ``name``, which may be someone else's. Missing tensors are
    made later.
    """
    for counter in COUNTERS:
        value = entry.get(counter, 0)
        is_scalar = isinstance(value, Tensor) and value.dim() == 0
        if not (is_scalar or isinstance(value, (int, float))):
            raise ValueError(
                f"the state of {name!r}: {counter!r} must be a number or a 0-d tensor, got {value!r}"
            )
    for key, (dtype, shape) in layouts.items():
        if key not in entry:
            continue
        value = entry[key]
        must_be = f"the state of {name!r}: {key!r} must be {dtype} {list(shape)} on {p.device}"
        if not isinstance(value, Tensor):
            raise ValueError(f"{must_be}, got {value!r}")
        if (value.dtype, value.shape, value.device) != (dtype, shape, p.device):
            raise ValueError(f"{must_be}, got {value.dtype} {list(value.shape)} on {value.device}")
        if dtype is torch.uint8 and value.stride() != p.stride():
            raise ValueError(
                f"the state of {name!r}: {key!r} is in 8 bits, so it must have the parameter's strides {p.stride()}, got "
                f"{value.stride()}"
            )


def complete(entry: Entry, p: Tensor, layouts: Mapping[str, Layout]) -> None:
    """Make what the state of ``p`` lacks: zeros in its strides, and its master. Drop a master that
    it should not have.
    """
    for key, (dtype, shape) in layouts.items():
        if key in entry:
            if shape == p.shape:
                entry[key] = with_strides_of(p, entry[key])
        elif key == "master":
            entry[key] = p.detach().float()
        else:
            is_whole = shape == p.shape
            entry[key] = (
                torch.zeros_like(p, dtype=dtype) if is_whole else p.new_zeros(shape, dtype=dtype)
            )
            # Zeros have no scale.
            entry.pop(f"{key}_scale", None)
    if "master" not in layouts:
        entry.pop("master", None)


def with_strides_of(p: Tensor, value: Tensor) -> Tensor:
    """``value`` with the strides of the dense ``p``, so that flat memory holds both in the same
    order.
    """
    if value.stride() == p.stride():
        return value
    return torch.empty_like(p, dtype=value.dtype).copy_(value)


def as_owned(entry: Entry, p: Tensor) -> Entry:
    """The state of ``p``, over the memory of that of this process's shard of ``p``."""
    if not is_sharded(p):
        return entry
    return {key: value if key in COUNTERS else from_local(value, p) for key, value in entry.items()}


def load_moment(entry: Entry, name: str, dtype: torch.dtype) -> Tensor:
    """A copy of the moment ``name`` of a parameter's state in ``dtype``, that of its arithmetic."""
    if entry[name].dtype is torch.uint8:
        return decode8(entry[name], entry[f"{name}_scale"], name == "exp_avg")
    return entry[name].to(dtype, copy=True)


def convert_moment(entry: Entry, name: str, p: Tensor, storage: Storage) -> Entry:
    """Copy the saved moment ``name`` of ``p`` in the dtype of ``storage``, rounded to nearest, with
    scales if it has any.
    """
    moment = entry[name]
    signed = name == "exp_avg"
    scale_name = f"{name}_scale"
    dtype = storage.moment_dtype(p)
    if moment.dtype is torch.uint8:
        _check_codes(moment, entry.get(scale_name), name, p)
        codes = moment.detach().to(p.device, copy=True)
        scales = entry[scale_name].detach().to(p.device, torch.float32, copy=True)
        if dtype is torch.uint8:
            # Without a second rounding.
            return {name: codes, scale_name: scales}
        moment = decode8(codes, scales, signed)
    if dtype is not torch.uint8:
        return {name: torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(moment)}
    value = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(moment)
    noise = torch.full((p.numel(),), NEAREST, dtype=torch.int32, device=p.device)
    codes, scales = encode8(flat(value), noise, signed)
    return {name: codes.as_strided(value.shape, value.stride()), scale_name: scales}


def _check_codes(codes: Tensor, scales: object, name: str, p: Tensor) -> None:
    """Raise ValueError unless the 8-bit moment ``name`` has the blocks of ``p``, which the strides
    define, and a scale for each.
    """
    expected = scales_shape(p)
    has_scales = isinstance(scales, Tensor) and scales.shape == expected
    if not has_scales or codes.stride() != p.stride():
        raise ValueError(
            f"state_dict's {name!r} is in 8 bits, so '{name}_scale' must be {list(expected)} and its strides {p.stride()}, "
            f"got {list(scales.shape) if isinstance(scales, Tensor) else 'none'} and {codes.stride()}"
        )
