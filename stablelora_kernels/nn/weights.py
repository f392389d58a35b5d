"""The values of a model's weights, however they are stored."""

from __future__ import annotations

from torch import Tensor

from stablelora_kernels.quantized import is_quantized, read, reason_unreadable
from stablelora_kernels.utils.tensors import whole


def plain_values(parameter: Tensor) -> Tensor:
    """The values of a parameter: gathered or dequantized, or in its own memory.

    A 4-bit weight is dequantized to the dtype that it was quantized from.
    """
    if not is_quantized(parameter):
        return whole(parameter)
    state = getattr(parameter, "quant_state", None)
    return read(parameter).dequantize(parameter.dtype if state is None else state.dtype)


def reason_against_reading(name: str, parameter: Tensor) -> str | None:
    """Why :func:`plain_values` cannot give a module's parameter ``name``, in words behind the
    module's name, or None.
    """
    kind = type(parameter)
    if is_quantized(parameter):
        reason = reason_unreadable(parameter)
        if reason is not None:
            return f"has a {name} that cannot be dequantized: {reason}"
    elif kind.__name__ == "Int8Params" or kind.dequantize is not Tensor.dequantize:
        return f"has a {name} that is stored as {kind.__name__}"
    if parameter.is_meta:
        return f"has its {name} on the meta device, as offloaded weights are"
    if getattr(parameter, "ds_shape", parameter.shape) != parameter.shape:
        return f"has a {name} that ZeRO-3 has partitioned; use deepspeed.zero.GatheredParameters"
    return None
