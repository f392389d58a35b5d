"""What a fused MLP reads of PEFT's layers, and of frozen ones beside them. This module imports peft, as ``peft_layers`` does."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.functional import LoRAWeights
from stablelora_kernels.integrations import peft_layers
from stablelora_kernels.integrations.peft_layers import Branch, base_operand, branches_of
from stablelora_kernels.nn.fused_mlp import Facts, LayerKind, Operand
from stablelora_kernels.quantized import is_quantized
from stablelora_kernels.utils.dtensor import is_sharded
from stablelora_kernels.utils.hooks import is_hooked


def read_operand(layer: Any, x: Tensor, dtype: torch.dtype | None) -> Operand | None:
    """A layer's operand for an input like ``x``, or None if the layer must compute by itself."""
    base = layer
    if adapted := type(layer) in peft_layers.ORIGINAL:
        if layer.disable_adapters or layer.merged:
            return None
        base = layer._modules["base_layer"]
    if (operand := base_operand(base, x)) is None:
        return None
    weight, bias, computed = operand
    # A quantized layer would cast its result back from another dtype.
    if not isinstance(weight, Tensor) and computed != x.dtype:
        return None
    branches = branches_of(layer, layer.active_adapters, x, weight.shape[1]) if adapted else []
    if not branches:
        return None if branches is None else Operand(LoRAWeights(weight, bias, None, None, 1.0), None)
    lora_A, lora_B, lora_bias, scaling, dropout_p = branches[0]
    if lora_bias is not None or len(branches) > 1:
        return None
    return Operand(LoRAWeights(weight, bias, lora_A, lora_B, scaling), dropout_p)


def facts_of(layer: Any) -> Facts | str:
    """What must fit between a layer and the others of its MLP, or why it must compute by itself."""
    base, branch = layer, None
    if isinstance(layer, BaseTunerLayer):
        found = _active_branch(layer)
        if isinstance(found, str):
            return found
        base, branch = layer.get_base_layer(), found
    if type(base) not in peft_layers.READABLE or is_hooked(base):
        return f"calls its base layer, a {type(base).__name__}, for its product"
    weight = base.weight
    quantized = is_quantized(weight)
    # FSDP's parameters are DTensors until a forward gathers them.
    if not quantized and type(weight) is not nn.Parameter and not is_sharded(weight):
        return f"calls its base layer, a {type(base).__name__} with a {type(weight).__name__}, for its product"
    if quantized and resolve_backend(weight.device) != "triton":
        return f"has a quantized weight, and without Triton its {type(base).__name__} computes the product"
    dtype = getattr(base, "compute_dtype", None) if quantized and type(base) is not nn.Linear else weight.dtype
    if branch is None:
        return Facts(None, None, dtype, base, quantized)
    return Facts(branch.dropout_p, branch.lora_A.dtype, dtype, base, quantized)


def _active_branch(layer: Any) -> Branch | str | None:
    """The branch of a PEFT layer's only active adapter in training, None without one, or why its own forward must compute it."""
    if type(layer) not in peft_layers.ORIGINAL:
        adapters = getattr(layer, "lora_A", ())
        reasons = [peft_layers.reason_against(layer, name) for name in adapters if type(layer) in peft_layers.KNOWN]
        return f"runs PEFT's own forward: {next(filter(None, reasons), f'it is a {type(layer).__name__}')}"
    if layer.merged:
        return "is merged"
    if layer.disable_adapters:
        return "is disabled"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) > 1:
        return f"has {len(active)} active adapters, {', '.join(map(repr, active))}"
    if not active:
        return None
    branch = peft_layers.read_branch(layer, active[0])
    if isinstance(branch, str):
        return f"runs PEFT's own forward: {branch}"
    if branch.bias is not None:
        return f"has a bias in lora_B of adapter {active[0]!r}, which trains"
    return branch._replace(dropout_p=getattr(layer.lora_dropout[active[0]], "p", 0.0))


PEFT_LAYERS = LayerKind(BaseTunerLayer, read_operand, facts_of)
