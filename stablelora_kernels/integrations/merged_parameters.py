"""``merged_parameters``: the weights of a model with its LoRA merged, one at a time, for a server such
as vLLM. Importing needs no peft.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.stacks import computed_parameters
from stablelora_kernels.nn.weights import plain_values, reason_against_reading
from stablelora_kernels.utils.modules import innermost, unwrap
from stablelora_kernels.utils.tensors import whole


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of ``model`` with its active LoRA merged, one at a time, without touching the
    model: for the sync of a policy's weights to a server in online RL::

        for name, weight in slk.merged_parameters(model):
            server.load_weights([(name, weight)])

    Names, order and values are those of ``state_dict()`` of the model that PEFT's
    ``merge_and_unload()`` would give, to the bit; of ``apply_lora``'s layers, those of
    :meth:`LoRALinear.merge`. So there is no "base_model.model." and no "base_layer", and
    ``modules_to_save`` are their active copies. Tied weights come once by each of their names, and
    so do persistent buffers. Adapters count that are active, also where they are disabled; layers
    that are merged already come as they are.

    A weight with an adapter is a new tensor; drop it before the next one, and the peak is one weight
    and its product ``B A``. The others are the model's own, detached: copy what you keep.

    Quantized weights (bitsandbytes' NF4 and FP4, torchao's float8 with a scale a row and NVFP4) come
    dequantized, with the adapter added and not quantized again, in the dtype that they were
    quantized from. ``fully_shard``'s come gathered: call this on all ranks.

    Args:
        model: a PEFT model, accelerated or not; a model after :func:`apply_lora`; or a wrapper of
            one. Do not train or change it between two weights.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no LoRA layer; or one of its weights is quantized otherwise, packs
            experts, is on the meta device, or is partitioned by ZeRO-3 or FSDP1; or its adapters are
            no LoRA. The message names the module.
    """
    inner = unwrap(model)
    pefts = _pefts()
    if not any(
        isinstance(module, LoRALinear) or (pefts is not None and pefts.is_adapted(module))
        for module in inner.modules()
    ):
        raise ValueError(
            f"model must have LoRALinear layers or PEFT's, got a {type(model).__name__} without any"
        )
    for name, module in inner.named_modules():
        reason = _reason_against(module)
        if reason is None and pefts is not None:
            reason = pefts.reason_against(module)
        if reason is not None:
            raise ValueError(f"model must have weights that can be merged, but {name!r} {reason}")
    return _Walk(inner, pefts).entries(inner, "")


def _reason_against(module: nn.Module) -> str | None:
    """Why the weights of a module cannot be read, in words behind its name, or None."""
    if computed_parameters(module):
        return "has a parameter that a parametrization computes, such as packed experts"
    reasons = (
        reason_against_reading(name, parameter)
        for name, parameter in module._parameters.items()
        if parameter is not None
    )
    return next((reason for reason in reasons if reason is not None), None)


class _Walk:
    """A walk over the modules of the base model of ``model``, by the names that they have there."""

    def __init__(self, model: nn.Module, pefts: ModuleType | None) -> None:
        self._pefts = pefts
        self._adapters = None if pefts is None else pefts.Adapters(model)

    def entries(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        module = innermost(module)
        if self._pefts is not None:
            module = self._pefts.base_of(module)
        own = ("lora_A", "lora_B") if isinstance(module, LoRALinear) else ()
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in own:
                yield f"{prefix}{name}", self._merged(module, name, parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}{name}", whole(buffer)
        for name, child in module._modules.items():
            if child is not None:
                yield from self.entries(child, f"{prefix}{name}.")

    @torch.no_grad()
    def _merged(self, module: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
        if self._adapters is not None and self._adapters.merge_into(parameter):
            return self._adapters.merged(module, name, parameter)  # type: ignore[no-any-return]
        weight = plain_values(parameter)
        if isinstance(module, LoRALinear) and name == "weight" and not module.merged:
            return whole(module.delta_weight()).add_(weight).to(weight.dtype)
        return weight


def _pefts() -> ModuleType | None:
    """``peft/merged.py``, or None where no layer can be PEFT's."""
    if "peft" not in sys.modules:
        return None
    from stablelora_kernels.integrations.peft import merged

    return merged
