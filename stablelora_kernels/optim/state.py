"""How parameters and moments are kept in few bits: float32 masters, and moments in bfloat16 or in 8 bits by blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stablelora_kernels.optim.hyperparameters import Member, Setting
from stablelora_kernels.optim.sharding import Place
from stablelora_kernels.optim.stochastic_rounding import LOW_PRECISION, mix_, stochastic_round

# What is added to the word that rounds an element of a parameter to get the word that rounds its moments.
MOMENT_WORD = 0x9E3779B9
# Elements, in the order of memory, that share a scale where moments are kept in 8 bits.
BLOCK = 256
# Rounds to nearest.
_HALF = 0x80080000 - 2**32


class Storage(NamedTuple):
    """The dtype of moments, where the parameter is not float64, and whether low-precision parameters have a master.

    torch.uint8 stands for 8 bits by blocks: codes in the parameter's shape, and float32 scales under the name with "_scale".
    """

    moments_dtype: torch.dtype = torch.float32
    master_weights: bool = False

    def moment_dtype(self, p: torch.Tensor) -> torch.dtype:
        return torch.float64 if p.dtype is torch.float64 else self.moments_dtype

    def has_master(self, p: torch.Tensor) -> bool:
        return self.master_weights and p.dtype in LOW_PRECISION


def new_moment(entry: dict[str, Any], name: str, p: torch.Tensor, storage: Storage) -> None:
    """Put a moment of zeros of the shape and strides of ``p`` into its state."""
    dtype = storage.moment_dtype(p)
    entry[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    if dtype is torch.uint8:
        entry[f"{name}_scale"] = torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)


def converted_moment(entry: dict[str, Any], name: str, p: torch.Tensor, storage: Storage) -> dict[str, torch.Tensor]:
    """A saved moment as ``storage`` keeps it, for ``p``, under its name, with its scales where it has any; rounded to nearest.

    Raises:
        ValueError: 8-bit codes without their scales, or in other strides than those of ``p``, of which blocks are made.
    """
    saved, dtype, scale_name = entry[name], storage.moment_dtype(p), f"{name}_scale"
    scales = entry.get(scale_name)
    if saved.dtype is torch.uint8:
        wanted = torch.Size([-(-p.numel() // BLOCK)])
        if not isinstance(scales, torch.Tensor) or scales.shape != wanted or saved.stride() != p.stride():
            raise ValueError(
                f"state_dict's {name!r} is in 8 bits, so {scale_name!r} must be {list(wanted)} and its strides {p.stride()}, "
                f"got {'none' if scales is None else list(scales.shape)} and {saved.stride()}"
            )
        codes, scales = saved.detach().to(p.device, copy=True), scales.detach().to(p.device, torch.float32, copy=True)
        if dtype is torch.uint8:
            return {name: codes, scale_name: scales}
        saved = decode8(codes, scales, name == "exp_avg")
    if dtype is not torch.uint8:
        return {name: torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(saved)}
    value = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(saved)
    noise = torch.full((p.numel(),), _HALF, dtype=torch.int32, device=p.device)
    codes = torch.empty_like(p, dtype=torch.uint8, requires_grad=False)
    written, scales = encode8(flat(value), noise, name == "exp_avg")
    flat(codes).copy_(written)
    return {name: codes, scale_name: scales}


def _format(signed: bool) -> tuple[int, float]:
    """What is added to a code to have float32's exponent and leading bits, and the step of the smallest values."""
    return (896, 2.0**-17) if signed else (768, 2.0**-33)


def decode8(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """float32 values of 8-bit codes, in their shape and strides; :func:`~stablelora_kernels.reference.optimizer.moment8_ref`."""
    shift, step = _format(signed)
    whole = flat(codes).int()
    magnitude = whole & 127 if signed else whole
    x = torch.where(magnitude >= 8, ((magnitude + shift) << 20).view(torch.float32), magnitude.float() * step)
    if signed:
        x = torch.where(whole >= 128, -x, x)
    value = torch.empty_like(codes, dtype=torch.float32)
    flat(value).copy_(x * scales.repeat_interleave(BLOCK)[: x.numel()])
    return value


def encode8(x: torch.Tensor, noise: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat float32 ``x`` as codes and their blocks' scales, rounded at random by int32 words of ``noise``."""
    shift, step = _format(signed)
    rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    # The sum is 0, or NaN where a value is not finite, which makes its block NaN.
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


def make_masters(state: dict[torch.Tensor, dict[str, Any]], params: Sequence[torch.Tensor], storage: Storage) -> None:
    """Give every parameter that needs one its float32 master, and take away those that are left from elsewhere."""
    for p in params:
        if not storage.has_master(p):
            state[p].pop("master", None)
        elif "master" not in state[p]:
            state[p]["master"] = p.detach().float()


def follow_parameters(masters: Sequence[torch.Tensor], params: Sequence[torch.Tensor]) -> None:
    """Where a parameter is not its master's rounding, someone else has written to it: the master becomes the parameter."""
    for master, p in zip(masters, params, strict=True):
        torch.where(master.to(p.dtype) == p, master, p.float(), out=master)


def flat(t: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of memory, as a view."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


def keep_moments(
    entry: dict[str, Any],
    values: Sequence[torch.Tensor],
    place: Place,
    step: torch.Tensor,
    seed: torch.Tensor,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Round the two moments ``values``, float32, at random into a parameter's state; ``step`` and ``seed`` are int32.

    ``place`` tells the numbers of the parameter's elements. Elementwise by
    :func:`~stablelora_kernels.reference.optimizer.moment_noise_ref`. Nothing changes where ``found_inf`` is not 0.
    """
    # Indices are taken modulo 2^32.
    index = place.numbers(values[0].numel(), step.device).to(torch.int32)
    words = mix_(index ^ mix_((step + seed).reshape(1)))
    words = mix_(words.add_(MOMENT_WORD - 2**32))
    first = entry["exp_avg"].dtype
    for name, value in zip(("exp_avg", "exp_avg_sq"), values, strict=True):
        kept = entry[name]
        if first is torch.uint8:
            new = list(encode8(flat(value), words, name == "exp_avg"))
            words = mix_(words.add_(MOMENT_WORD - 2**32))
        else:
            new = [stochastic_round(flat(value), kept.dtype, words)]
            words = words >> 16
        targets = [flat(kept), *([entry[f"{name}_scale"]] if len(new) > 1 else [])]
        for old, fresh in zip(targets, new, strict=True):
            if found_inf is not None:
                fresh = torch.where(found_inf.reshape(()) == 0, fresh, old)
            old.copy_(fresh)


class Pair(NamedTuple):
    """The places of a pair's A and B in an engine's list of members."""

    a: int
    b: int


def work_dtype(p: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic on ``p`` and of its moments: float32, or float64 for float64."""
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def take_counters(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The state's 0-d counters, None being zero, as one new tensor; nothing is read on the host."""
    if not values:
        return torch.zeros(0, dtype=dtype, device=device)
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.stack([zero if v is None else torch.as_tensor(v).to(device, dtype) for v in values])


def init_moments(
    state: dict[torch.Tensor, dict[str, Any]], members: Sequence[Member], groups: Sequence[Setting], storage: Storage
) -> None:
    """Give every member the moments of its group, zeros of its shape and strides, where it has none yet."""
    for p, group, *_ in members:
        for key in moment_names(groups[group]):
            if key not in state[p]:
                new_moment(state[p], key, p, storage)


def moment_names(group: Setting | dict[str, Any]) -> tuple[str, ...]:
    """What a parameter of ``group`` has in the optimizer's state besides its counters."""
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
