"""What a fused MLP reads of PEFT's layers, and of frozen ones beside them. This module imports peft, as ``peft_layers`` does."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from stablelora_kernels.functional import LoRAWeights
from stablelora_kernels.integrations import peft_layers
from stablelora_kernels.integrations.peft_layers import Branch, base_operand
from stablelora_kernels.nn.fused_mlp import LayerKind, Operand


def read_operand(layer: Any, x: Tensor | None) -> Operand | str:
    """A layer's operand for an input like ``x``, or for any, or why the layer must compute by itself."""
    base, branch, modules = layer, None, layer._modules
    if isinstance(layer, BaseTunerLayer):
        base, branch = modules["base_layer"], _active_branch(layer, x)
    if isinstance(branch, str):
        return branch
    operand = base_operand(base, x)
    if isinstance(operand, str):
        return operand
    weight, bias, dtype = operand
    if x is not None and not isinstance(weight, Tensor) and dtype != x.dtype:
        return f"would cast its result from {dtype} to {x.dtype}"
    if branch is None:
        return Operand(LoRAWeights(weight, bias, None, None, 1.0), None, dtype)
    if x is not None and not peft_layers.fits(x, branch.lora_A, branch.lora_B, weight.shape[1]):
        return "has an adapter that does not fit its input"
    return Operand(LoRAWeights(weight, bias, branch.lora_A, branch.lora_B, branch.scaling), branch.dropout_p, dtype)


def _active_branch(layer: Any, x: Tensor | None) -> Branch | str | None:
    """The branch of a PEFT layer's only active adapter, None without one, or why its own forward must compute it."""
    if type(layer) not in peft_layers.ORIGINAL:
        adapters = getattr(layer, "lora_A", ())
        reasons = [peft_layers.reason_against(layer, name) for name in adapters if type(layer) in peft_layers.KNOWN]
        return f"runs PEFT's own forward: {next(filter(None, reasons), f'it is a {type(layer).__name__}')}"
    if layer.merged:
        return "is merged"
    if layer.disable_adapters:
        return "is disabled"
    if x is not None and peft_layers.is_observed(layer):
        return "is watched"
    active = [name for name in layer.active_adapters if name in layer._modules["lora_A"]._modules]
    if len(active) > 1:
        return f"has {len(active)} active adapters, {', '.join(map(repr, active))}"
    if not active:
        return None
    branch = peft_layers.read_branch(layer, active[0])
    if isinstance(branch, str):
        return f"runs PEFT's own forward: {branch}"
    if branch.bias is not None:
        return f"has a bias in lora_B of adapter {active[0]!r}, which trains"
    if x is None:
        # That of training.
        branch = branch._replace(dropout_p=getattr(layer.lora_dropout[active[0]], "p", 0.0))
    return branch


PEFT_LAYERS = LayerKind(BaseTunerLayer, read_operand)
