"""What PEFT's ``merge_and_unload`` would leave of a model, weight by weight. This module imports peft.

PEFT's own ``merge`` runs on a copy of each layer, whose base layer is a copy too; only what it writes
to has memory of its own.
"""

from __future__ import annotations

from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners import lora
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from stablelora_kernels.integrations.peft.merging import merge_copy, merges_some
from stablelora_kernels.nn.weights import plain_values
from stablelora_kernels.quantized import is_quantized
from stablelora_kernels.utils.tensors import is_sharded, local, whole


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers, or has PEFT's copies of another."""
    return isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))


def reason_against(module: nn.Module) -> str | None:
    """Why the merged weights of one of PEFT's modules cannot be told, or None."""
    if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
        return "learns a prompt, which is in no weight"
    if not isinstance(module, BaseTunerLayer):
        return None
    kind = type(module).__name__
    if not isinstance(module, (lora.LoraLayer, TrainableTokensLayer)):
        return f"is a {kind}, not a LoRA layer"
    if isinstance(module.get_base_layer(), nn.MultiheadAttention):
        return "adapts an nn.MultiheadAttention; use merge_and_unload() of a copy"
    return None


def base_of(module: nn.Module) -> nn.Module:
    """What stands in the place of one of PEFT's modules once it is unloaded; another module itself."""
    while True:
        if isinstance(module, (PeftModel, PeftMixedModel)):
            module = module.base_model
        elif isinstance(module, BaseTuner):
            module = module.model
        elif isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        elif isinstance(module, ModulesToSaveWrapper):
            active = module.active_adapters
            module = module.modules_to_save[active[0]] if active else module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


class Adapters:
    """The layers of a PEFT model whose active adapters ``merge_and_unload`` would merge."""

    def __init__(self, model: nn.Module) -> None:
        # By the parameter that they are merged into. Layers of tied weights share one.
        self._weights: dict[Tensor, list[Any]] = {}
        self._biases: dict[Tensor, Any] = {}
        for module in model.modules():
            if isinstance(module, BaseTuner):
                # It raises where PEFT merges nothing, and warns of tied weights.
                module._check_merge_allowed()
            if isinstance(module, BaseTunerLayer) and merges_some(module):
                base: Any = module.get_base_layer()
                weight = getattr(base, getattr(module, "parameter_name", "weight"))
                self._weights.setdefault(weight, []).append(module)
                if any(getattr(module, "lora_bias", {}).values()) and base.bias is not None:
                    self._biases[base.bias] = module

    def merge_into(self, parameter: nn.Parameter) -> bool:
        """Whether adapters are merged into ``parameter``."""
        return parameter in self._weights or parameter in self._biases

    def merged(self, module: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
        """``parameter``, which a module has by ``name``, with the adapters merged into it."""
        if parameter in self._biases:
            return _merged_bias(self._biases[parameter], parameter)
        value = _own_memory(parameter)
        for layer in self._weights[parameter]:
            value = _merged_weight(layer, value)
        return value


def _merged_weight(layer: Any, value: Tensor) -> Tensor:
    """``value`` of the weight of a layer's base layer, to which PEFT's merge adds in place."""
    name = getattr(layer, "parameter_name", "weight")
    base: Any = layer.get_base_layer()
    quantized = is_quantized(base._parameters[name])
    bias = base._parameters.get("bias")
    base_copy = nn.Linear(1, 1, bias=False, device="meta") if quantized else _copy(base)
    base_copy._parameters[name] = nn.Parameter(value, requires_grad=False)
    if bias is not None:
        base_copy._parameters["bias"] = nn.Parameter(_own_memory(bias), requires_grad=False)
    # The tensors that the merge reads and writes: none is a shard.
    copied = _gathered(layer)
    if quantized:
        # PEFT's own class would quantize the sum again.
        copied.__class__ = lora.Linear
    copied._modules["base_layer"] = base_copy
    copied.merged_adapters = [*layer.merged_adapters]
    if "_caches" in layer.__dict__:
        copied._caches = {**layer._caches}
    merge_copy(copied)
    merged: Any = base_copy._parameters[name]
    return merged.data  # type: ignore[no-any-return]


def _merged_bias(layer: Any, bias: nn.Parameter) -> Tensor:
    """The bias of a layer's base layer with those of lora_B, as PEFT adds them."""
    value = _own_memory(bias)
    for name in layer.active_adapters:
        if name in layer.lora_B and name not in layer.merged_adapters and layer.lora_bias[name]:
            value += whole(layer.lora_B[name].bias) * layer.scaling[name]
    return value


def _own_memory(parameter: Tensor) -> Tensor:
    """The values of ``parameter`` in a tensor that may be written to."""
    value = plain_values(parameter)
    if is_quantized(parameter):
        return value
    if is_sharded(parameter):
        # Gathered over one rank, it may be that rank's shard.
        return value.clone() if value.data_ptr() == local(parameter).data_ptr() else value
    return value.clone()


def _copy(module: nn.Module) -> Any:
    """A module with the same tensors and children, in dicts of its own."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    for key in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[key] = {**module.__dict__[key]}
    return copied


def _gathered(module: nn.Module) -> Any:
    """As :func:`_copy`, with full tensors in place of shards, but those of its base layer."""
    copied = _copy(module)
    for name, parameter in module._parameters.items():
        if is_sharded(parameter):
            copied._parameters[name] = nn.Parameter(whole(parameter), requires_grad=False)
    for name, child in module._modules.items():
        if child is not None and name != "base_layer":
            copied._modules[name] = _gathered(child)
    return copied
