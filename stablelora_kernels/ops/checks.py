"""Checks of the arguments of the functional API. An error names the argument and both values."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from stablelora_kernels.formats import Stored
from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.packed_experts import PackedExperts
from stablelora_kernels.projection import Projection
from stablelora_kernels.utils.tensors import is_sharded

#: The dtypes of x. Only the PyTorch backend computes in float64.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(x: Tensor, projections: Sequence[Projection], base: Tensor | None, is_mlp: bool) -> None:
    """Check the operands of projections of x, of gate, up and down of an MLP, or of a lone branch
    onto ``base``.
    """
    if is_mlp:
        _check_mlp(x, *projections)
        return
    for p in projections:
        _check_projection(x, p, base=base)
        dtype, first = cast(Tensor, p.lora_A).dtype, cast(Tensor, projections[0].lora_A).dtype
        if dtype != first:
            raise TypeError(f"lora_As must have one dtype, got {first} and {dtype}")


def _check_projection(
    x: Tensor, p: Projection, of: str = "", base: Tensor | None = None, name_of_x: str = "x"
) -> None:
    """``of``: the projection's name before those of its operands, such as ``"gate."``. ``base``:
    that of a lone branch. ``name_of_x``: for messages.
    """
    weight = p.weight
    bias = p.bias
    lora_A = p.lora_A
    lora_B = p.lora_B
    _check_scaling(f"{of}scaling", p.scaling)
    if base is not None:
        if not isinstance(base, Tensor):
            raise TypeError(f"base_out must be a Tensor, got {type(base).__name__}")
        if base.dim() < 1 or x.dim() < 1 or base.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"base_out must be [..., N] with x's leading sizes to fit x {list(x.shape)}, got {list(base.shape)}"
            )
        n, k, other = base.shape[-1], x.shape[-1], f"base_out {list(base.shape)}"
    else:
        assert weight is not None
        if len(weight.shape) != 2:
            raise ValueError(f"{of}weight must be [N, K], got {list(weight.shape)}")
        (n, k), other = weight.shape, f"{of}weight {list(weight.shape)}"
        if x.dim() < 1 or x.shape[-1] != k:
            raise ValueError(f"{name_of_x} must be [..., {k}] to fit {other}, got {list(x.shape)}")
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"{of}bias must be {[n]} to fit {other}, got {list(bias.shape)}")
    if lora_A is not None and lora_B is not None:
        if lora_A.dim() != 2 or lora_A.shape[1] != k or lora_A.shape[0] < 1:
            raise ValueError(
                f"{of}lora_A must be [r, {k}] with r >= 1 to fit {other}, got {list(lora_A.shape)}"
            )
        if lora_B.dim() != 2 or lora_B.shape[0] != n or lora_B.shape[1] != lora_A.shape[0]:
            raise ValueError(
                f"{of}lora_B must be {[n, lora_A.shape[0]]} to fit {other} and {of}lora_A {list(lora_A.shape)}, "
                f"got {list(lora_B.shape)}"
            )
    elif lora_A is not lora_B:
        missing, given = ("lora_A", "lora_B") if lora_A is None else ("lora_B", "lora_A")
        raise ValueError(
            f"{of}{missing} must be given with {of}{given}, or both must be None, got None"
        )
    _check_dtypes(x, lora_A, lora_B, of, name_of_x)
    if base is not None:
        _check_float("base_out", base)
    data = weight.data if isinstance(weight, Stored) else weight
    for name, t in (("weight", weight), ("bias", bias)):
        if isinstance(t, Tensor) and t.dtype != x.dtype:
            raise TypeError(f"{of}{name} must have {name_of_x}'s dtype {x.dtype}, got {t.dtype}")
    operands = {"weight": data, "bias": bias, "lora_A": lora_A, "lora_B": lora_B}
    named = {f"{of}{name}": t for name, t in operands.items()}
    _check_devices(x, name_of_x, base_out=base, **named)


def _check_dtypes(
    x: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    of: str = "",
    name_of_x: str = "x",
) -> None:
    """Raise TypeError unless the dtypes of the operands fit each other."""
    _check_float(name_of_x, x)
    if lora_A is None or lora_B is None:
        return
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(
            f"{of}lora_A and lora_B must have one dtype, got {lora_A.dtype} and {lora_B.dtype}"
        )
    if lora_A.dtype != x.dtype and (lora_A.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(
            f"{of}lora_A and lora_B must be float32 or of {name_of_x}'s dtype {x.dtype}, got {lora_A.dtype}"
        )


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got a {type(value).__name__}")


def _check_scaling(name: str, scaling: Any) -> None:
    # A tensor would get no gradient, and its value of the first call would be remembered.
    _check_number(name, scaling)


def _check_float(name: str, t: Tensor) -> None:
    if t.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {t.dtype}")


def _check_devices(x: Tensor, name_of_x: str = "x", /, **tensors: Any) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} must be on {name_of_x}'s device {x.device}, got {tensor.device}"
            )


def check_cross_entropy(
    hidden: Tensor, head: Projection, labels: Tensor, ignore_index: int, softcap: float | None, logit_scale: float,
) -> None:  # fmt: skip
    """Check the operands of ``lora_linear_cross_entropy``."""
    operands = {
        "hidden": hidden,
        "weight": head.weight,
        "bias": head.bias,
        "lora_A": head.lora_A,
        "lora_B": head.lora_B,
        "labels": labels,
    }
    for name, operand in operands.items():
        if operand is not None and not isinstance(operand, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(operand).__name__}")
        if is_sharded(operand):
            raise TypeError(f"{name} must be a plain tensor, got a DTensor: gather the head first")
    weight = head.weight
    assert isinstance(weight, Tensor)
    _check_projection(hidden, head, name_of_x="hidden")
    if not weight.shape[0]:
        raise ValueError(f"weight must have at least one row, got {list(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight must be frozen, got one that requires a gradient")
    _check_number("logit_scale", logit_scale)
    if softcap is not None:
        _check_number("softcap", softcap)
        if not softcap > 0:
            raise ValueError(f"softcap must be positive or None, got {softcap}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must be {list(hidden.shape[:-1])} to fit hidden {list(hidden.shape)}, got {list(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    _check_devices(hidden, "hidden", labels=labels)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        # Elsewhere, reading them would wait for the device.
        _check_labels(labels, weight.shape[0], ignore_index)


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ValueError for a label that is neither in the vocabulary nor ``ignore_index``."""
    is_wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if is_wrong.any():
        label = int(labels[is_wrong][0])
        raise ValueError(
            f"labels must be in [0, {vocabulary}) or ignore_index {ignore_index}, got {label}"
        )


def _check_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> None:
    """Raise ValueError unless gate, up and down fit each other."""
    _check_projection(x, gate, "gate.")
    wanted, up_shape, down_shape = (list(p.weight.shape) for p in (gate, up, down))  # type: ignore[union-attr]
    if up_shape != wanted:
        raise ValueError(f"up.weight must be {wanted} to fit gate.weight, got {up_shape}")
    _check_projection(x, up, "up.")
    if len(down_shape) != 2 or down_shape[1] != wanted[0]:
        raise ValueError(
            f"down.weight must be [N, {wanted[0]}] to fit gate.weight {wanted}, got {down_shape}"
        )
    _check_projection(x.new_empty(0, wanted[0]), down, "down.")
    named = {"gate.lora_A": gate.lora_A, "up.lora_A": up.lora_A, "down.lora_A": down.lora_A}
    dtypes = {name: lora_A.dtype for name, lora_A in named.items() if lora_A is not None}
    if len({*dtypes.values()}) > 1:
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"the projections' lora_A must have one dtype, got {given}")


def check_experts(x: Tensor, stack: ExpertStack, offsets: Tensor) -> None:
    """Check the operands of ``lora_experts``."""
    check_stack(x, stack)
    _check_offsets(x, offsets, stack.lora_A.shape[0])


def check_stack(x: Tensor, stack: ExpertStack, casts: bool = False) -> None:
    """Check a projection of all experts for rows ``x``. ``casts``: autocast casts weights and
    biases to x's dtype.
    """
    weight = stack.weight
    bias = stack.bias
    lora_A = stack.lora_A
    lora_B = stack.lora_B
    transposed = stack.transposed
    _check_scaling("scaling", stack.scaling)
    if not isinstance(weight, (Tensor, PackedExperts)):
        raise TypeError(f"weight must be a Tensor or PackedExperts, got {type(weight).__name__}")
    if len(weight.shape) != 3:
        raise ValueError(
            f"weight must be {'[E, K, N]' if transposed else '[E, N, K]'}, got {list(weight.shape)}"
        )
    count, n, k = weight.shape
    if transposed:
        n, k = k, n
    shaped = f"{'transposed ' if transposed else ''}weight {list(weight.shape)}"
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"x must be [T, {k}] to fit {shaped}, got {list(x.shape)}")
    if bias is not None and bias.shape != (count, n):
        raise ValueError(f"bias must be {[count, n]} to fit {shaped}, got {list(bias.shape)}")
    if lora_A.dim() != 3 or lora_A.shape[0] != count or lora_A.shape[2] != k:
        raise ValueError(
            f"lora_A must be [{count}, r, {k}] to fit {shaped}, got {list(lora_A.shape)}"
        )
    if lora_B.shape != (wanted := (count, n, lora_A.shape[1])):
        raise ValueError(
            f"lora_B must be {list(wanted)} to fit {shaped} and lora_A {list(lora_A.shape)}, got {list(lora_B.shape)}"
        )
    _check_dtypes(x, lora_A, lora_B)
    _check_devices(x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B)
    for name, t in (("weight", weight), ("bias", bias)):
        if not isinstance(t, Tensor):
            continue
        if t.dtype != x.dtype and not casts:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
        if t.requires_grad:
            raise ValueError(f"{name} must be frozen, got one that requires a gradient")


def _check_offsets(x: Tensor, offsets: Tensor, count: int) -> None:
    """Raise unless the offsets are those of E experts and, on a CPU, ascend to at most T."""
    rows = x.shape[0]
    _check_devices(x, offsets=offsets)
    if offsets.shape != (count,):
        raise ValueError(f"offsets must be {[count]}, each expert's end, got {list(offsets.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}")
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        # Reading them would wait for the device.
        return
    ends = offsets.tolist()
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end < start:
            raise ValueError(
                f"offsets must not descend from 0 on, got {end} of expert {e} behind {start}"
            )
    if ends and ends[-1] > rows:
        raise ValueError(f"offsets must end within the {rows} rows of x, got {ends[-1]}")
