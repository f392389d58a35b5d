"""A parameter's state: counters, moments in float32, bfloat16 or 8 bits by blocks, and float32 masters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from stablelora_kernels.optim.gradients import with_strides_of
from stablelora_kernels.optim.hyperparameters import Member, Setting
from stablelora_kernels.optim.sharding import Shard
from stablelora_kernels.optim.stochastic_rounding import LOW_PRECISION, mix_, stochastic_round
from stablelora_kernels.utils.dtensor import from_local, local

# Scalars of a parameter's state; its other tensors have the parameter's shape.
COUNTERS = ("step", "latched_at")
# Added to the word that rounds a parameter's element to get the word that rounds its moments.
MOMENT_WORD = 0x9E3779B9
# Elements, in memory order, that share a scale in 8-bit moments.
BLOCK = 256
# The noise with which stochastic rounding rounds to nearest.
_HALF = 0x80080000 - 2**32


class Pair(NamedTuple):
    """The indices of a pair's A and B in an engine's list of members."""

    a: int
    b: int


class Storage(NamedTuple):
    """How state is kept: the moments' dtype, and whether bfloat16 and float16 parameters have a float32 master.

    float64 parameters have float64 moments. torch.uint8 stands for 8 bits by blocks: codes in the parameter's shape, and
    float32 scales in a second tensor named with "_scale".
    """

    moments_dtype: torch.dtype = torch.float32
    master_weights: bool = False

    def moment_dtype(self, p: torch.Tensor) -> torch.dtype:
        return torch.float64 if p.dtype is torch.float64 else self.moments_dtype

    def has_master(self, p: torch.Tensor) -> bool:
        return self.master_weights and p.dtype in LOW_PRECISION


def work_dtype(p: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic on ``p``: float64 for float64, else float32."""
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def flat(t: torch.Tensor) -> torch.Tensor:
    """A 1-d view of a dense tensor's elements in memory order."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


class _NoTensorsAreEqual(TorchFunctionMode):
    """Answers ``==`` between tensors with False. Containers do not ask it about an element that both hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


_NO_TENSORS_ARE_EQUAL = _NoTensorsAreEqual()


def same_objects(found: Any, known: Any) -> bool:
    """Whether two lists or nested dicts hold the very same tensors in the same places.

    Every step asks this, so all of the work is Python's own comparison of containers: a tenth of a microsecond a tensor.
    """
    with _NO_TENSORS_ARE_EQUAL:
        return bool(found == known)


def check_entry(entry: dict[str, Any], name: str, member: Member, setting: Setting, storage: Storage) -> None:
    """Check state that may have replaced the engine's; missing tensors are made later.

    Tensors in other strides than the parameter's are replaced by copies in its strides.

    Raises:
        ValueError: a tensor has another shape, dtype or device than the parameter asks for.
    """
    p = member.param
    for counter in COUNTERS:
        value = entry.get(counter, 0)
        if not (isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.dim() == 0)):
            raise ValueError(f"the state of {name!r}: {counter!r} must be a number or a 0-d tensor, got {value!r}")
    expected = {moment: (storage.moment_dtype(p), p.shape) for moment in moment_names(setting)}
    if storage.has_master(p):
        expected["master"] = torch.float32, p.shape
    if storage.moment_dtype(p) is torch.uint8:
        scales = torch.float32, torch.Size([-(-p.numel() // BLOCK)])
        expected |= dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), scales)
    for key, (dtype, shape) in expected.items():
        if key not in entry:
            continue
        value = entry[key]
        fits = isinstance(value, torch.Tensor) and (value.dtype, value.shape, value.device) == (dtype, shape, p.device)
        if not fits:
            got = (
                f"{value.dtype} {list(value.shape)} on {value.device}"
                if isinstance(value, torch.Tensor)
                else repr(value)
            )
            raise ValueError(f"the state of {name!r}: {key!r} must be {dtype} {list(shape)} on {p.device}, got {got}")
        if shape == p.shape and value.stride() != p.stride():
            if dtype is torch.uint8:
                raise ValueError(
                    f"the state of {name!r}: {key!r} is in 8 bits, so it must have the parameter's strides {p.stride()}, got "
                    f"{value.stride()}"
                )
            entry[key] = with_strides_of(p, value)


def local_state(entry: dict[str, Any], member: Member) -> dict[str, Any]:
    """The state that an engine fills and changes: ``entry``, the parameter's own, or this process's shards of it."""
    return entry if member.param is member.owner else {key: local(value) for key, value in entry.items()}


def as_dtensors(entry: dict[str, Any], p: torch.Tensor) -> dict[str, Any]:
    """The state of this process's shard of ``p`` as the state of ``p``, over the same memory."""
    return {key: value if key in COUNTERS else from_local(value, p) for key, value in entry.items()}


def stack_counters(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The 0-d counters ``values`` as one new tensor [len(values)], None as zero; the host reads nothing."""
    if not values:
        return torch.zeros(0, dtype=dtype, device=device)
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.stack([zero if v is None else torch.as_tensor(v, dtype=dtype, device=device) for v in values])


def moment_names(group: Setting | dict[str, Any]) -> tuple[str, ...]:
    """The names of the moments that a parameter of ``group`` has in the optimizer's state."""
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))


def init_moments(
    state: dict[torch.Tensor, dict[str, Any]], members: Sequence[Member], settings: Sequence[Setting], storage: Storage
) -> None:
    """Give every member the moments that it lacks: zeros of its shape and strides."""
    for p, setting_index, *_ in members:
        dtype = storage.moment_dtype(p)
        for name in moment_names(settings[setting_index]):
            if name not in state[p]:
                state[p][name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                state[p].pop(f"{name}_scale", None)
            if dtype is torch.uint8 and f"{name}_scale" not in state[p]:
                state[p][f"{name}_scale"] = torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)


def convert_moment(entry: dict[str, Any], name: str, p: torch.Tensor, storage: Storage) -> dict[str, torch.Tensor]:
    """Copy the saved moment ``name`` of ``p`` in the dtype of ``storage``, rounded to nearest, with scales if it has any.

    Raises:
        ValueError: 8-bit codes without their scales, or in strides other than those of ``p``, which define the blocks.
    """
    saved, dtype, scale_name = entry[name], storage.moment_dtype(p), f"{name}_scale"
    scales = entry.get(scale_name)
    if saved.dtype is torch.uint8:
        expected = torch.Size([-(-p.numel() // BLOCK)])
        if not isinstance(scales, torch.Tensor) or scales.shape != expected or saved.stride() != p.stride():
            raise ValueError(
                f"state_dict's {name!r} is in 8 bits, so {scale_name!r} must be {list(expected)} and its strides {p.stride()}, "
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
    new_codes, scales = encode8(flat(value), noise, name == "exp_avg")
    flat(codes).copy_(new_codes)
    return {name: codes, scale_name: scales}


def load_moment(entry: dict[str, Any], name: str, dtype: torch.dtype) -> torch.Tensor:
    """The moment ``name`` of a parameter's state in ``dtype``, that of its arithmetic; the stored tensor if it has that."""
    if entry[name].dtype is torch.uint8:
        return decode8(entry[name], entry[f"{name}_scale"], name == "exp_avg")
    return entry[name].to(dtype)


def rounded_moments(
    entry: dict[str, Any],
    values: Sequence[torch.Tensor],
    shard: Shard,
    step: torch.Tensor,
    seed: torch.Tensor,
    found_inf: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Both moments of a parameter, rounded at random by the noise of ``reference.optimizer.moment_noise_ref``.

    Args:
        entry: the parameter's state; its moments are in bfloat16 or 8 bits, or in float64, which is not rounded.
        values: exp_avg and exp_avg_sq in float32, or float64, in the parameter's shape and strides.
        shard: gives the indices of the parameter's elements.
        step, seed: int32 scalars.
        found_inf: float32 scalar; nothing changes if it is not 0.

    Returns:
        Views of the tensors of ``entry`` and their new values.
    """
    names = ("exp_avg", "exp_avg_sq")
    if entry["exp_avg"].dtype is torch.float64:
        return [(entry[name], value) for name, value in zip(names, values, strict=True)]
    # Indices are modulo 2^32.
    indices = shard.element_indices(values[0].numel(), step.device).to(torch.int32)
    words = mix_(indices ^ mix_((step + seed).reshape(1)))
    words = mix_(words.add_(MOMENT_WORD - 2**32))
    in_8_bits = entry["exp_avg"].dtype is torch.uint8
    changes = []
    for name, value in zip(names, values, strict=True):
        kept = entry[name]
        if in_8_bits:
            targets = [flat(kept), entry[f"{name}_scale"]]
            rounded = list(encode8(flat(value), words, name == "exp_avg"))
            words = mix_(words.add_(MOMENT_WORD - 2**32))
        else:
            targets = [flat(kept)]
            rounded = [stochastic_round(flat(value), kept.dtype, words)]
            words = words >> 16
        for old, new in zip(targets, rounded, strict=True):
            if found_inf is not None:
                new = torch.where(found_inf.reshape(()) == 0, new, old)
            changes.append((old, new))
    return changes


def _format(signed: bool) -> tuple[int, float]:
    """The number that gives a code float32's exponent and leading bits when added, and the step of subnormal values."""
    return (896, 2.0**-17) if signed else (768, 2.0**-33)


def decode8(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
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


def encode8(x: torch.Tensor, noise: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
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


def init_masters(state: dict[torch.Tensor, dict[str, Any]], params: Sequence[torch.Tensor], storage: Storage) -> None:
    """Give every parameter that needs a float32 master one; drop masters that a loaded state left over."""
    for p in params:
        if not storage.has_master(p):
            state[p].pop("master", None)
        elif "master" not in state[p]:
            state[p]["master"] = p.detach().float()


def refresh_masters(masters: Sequence[torch.Tensor], params: Sequence[torch.Tensor]) -> None:
    """Set a master to its parameter wherever the parameter is not its rounding: someone else has written to it."""
    for master, p in zip(masters, params, strict=True):
        torch.where(master.to(p.dtype) == p, master, p.float(), out=master)
