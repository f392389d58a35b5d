"""A model's ``LoRALinear`` layers."""

from __future__ import annotations

from torch import nn

from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.utils.modules import clean


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's layers by their first dotted names, without those of wrappers."""
    return {
        clean(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }


def require_lora_layers(model: nn.Module, of_peft: str) -> dict[str, LoRALinear]:
    """As :func:`lora_layers`; raises ValueError if there are none. ``of_peft``: the method of PEFT's
    that a PEFT model has for this.
    """
    layers = lora_layers(model)
    if not layers:
        check_not_pefts(model, of_peft)
        raise ValueError(
            f"model must have LoRALinear layers (apply_lora makes them), got a {type(model).__name__} without any"
        )
    return layers


def check_not_pefts(model: nn.Module, method: str) -> None:
    """Raise ValueError if PEFT's layers hold the model's LoRA. ``method`` says which of PEFT's
    methods do the same.
    """
    if any(
        hasattr(module, "base_layer")
        and any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
        for module in model.modules()
    ):
        raise ValueError(
            f"the LoRA layers of this {type(model).__name__} are PEFT's: call {method} instead"
        )
