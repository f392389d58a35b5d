"""PEFT's LoRA layers with a forward on this library's ops. This module imports peft, so ``peft.py``
imports it lazily.

Accelerating an instance changes only its ``__class__``, to a subclass of its PEFT class that
overrides the forward. It stores nothing in the instance except its projection group, if
``fuse_projections`` is set. So copies, pickles and replicas are accelerated too, and PEFT's own
code adds, switches, merges, deletes, saves and loads adapters as before. Each call reads the
current adapters, scaling, dropout, training mode, and whether the layer is merged or disabled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as _layer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stablelora_kernels.functional import LoRAWeights, lora_linear_group, lora_linear_if
from stablelora_kernels.integrations.peft_dora import dora_output, is_dora, read_dora
from stablelora_kernels.integrations.peft_operands import (
    Base,
    Branch,
    base_operand,
    fits,
    is_observed,
    plain_tensors,
    read_branch,
)
from stablelora_kernels.nn.fused_mlp import LayerKind, Operand
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from stablelora_kernels.quantized import is_quantized

# The keyword arguments that PEFT's layers consume. The base layer gets the others.
_OWN_ARGUMENTS = ("adapter_names", *getattr(_layer, "VARIANT_KWARG_KEYS", ()))

# Why the ops do not train such an adapter.
DORA_WITH_DROPOUT = "is DoRA with dropout, which needs the base product of two inputs to train; evaluation runs on the ops"


def reason_against(layer: Any, adapter: str) -> str | None:
    """Why PEFT's own forward must compute an adapter of a layer, at least in training, or None."""
    found = read_dora(layer, adapter) if is_dora(layer, adapter) else read_branch(layer, adapter)
    if isinstance(found, str):
        return found
    return (
        f"adapter {adapter!r} {DORA_WITH_DROPOUT}"
        if _is_dora_with_dropout(layer, adapter)
        else None
    )


def is_only_evaluated(layer: Any, adapter: str) -> bool:
    """Whether the ops compute an adapter in evaluation, but not in training."""
    return _is_dora_with_dropout(layer, adapter) and not isinstance(read_dora(layer, adapter), str)


def _is_dora_with_dropout(layer: Any, adapter: str) -> bool:
    return is_dora(layer, adapter) and type(layer.lora_dropout[adapter]) is nn.Dropout


def _usual_output(layer: Any, x: Tensor) -> Tensor | None:
    """The output with one adapter on a plain base layer, or None if it is no such call. It does not
    look at merging.
    """
    adapters = layer.active_adapters
    if (
        len(adapters) != 1
        or adapters[0] not in layer._modules["lora_A"]._modules
        or is_observed(layer)
    ):
        return None
    branch, base = read_branch(layer, adapters[0]), layer._modules["base_layer"]
    weight, bias = plain_tensors(base)
    if isinstance(branch, str) or branch.bias is not None or weight is None:
        return None

    # Once calls of this kind are known to fit, the op's own key says so.
    def is_readable() -> bool:
        return fits(x, branch.lora_A, branch.lora_B) and isinstance(base_operand(base, x), Base)

    return lora_linear_if(
        is_readable, x, weight, bias, branch.lora_A, branch.lora_B, branch.scaling, branch.dropout_p
    )


def branches_of(layer: Any, adapters: Iterable[str], x: Tensor) -> list[Branch] | None:
    """The layer's branches for ``adapters``, or None if PEFT's own forward must compute them."""
    if is_observed(layer):
        return None
    found = []
    for adapter in adapters:
        if adapter not in layer._modules["lora_A"]._modules:
            continue
        branch = read_branch(layer, adapter)
        if isinstance(branch, str) or not fits(x, branch.lora_A, branch.lora_B):
            return None
        found.append(branch)
    return found


class Accelerated:
    """A mixin in front of a PEFT class. Calls that it does not support run that class's forward."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward: base_layer(x) plus the active adapters' branches, in the base layer's
        dtype.
        """
        plain = (
            not self.disable_adapters and not self.merged and kwargs.get("adapter_names") is None
        )
        if plain and not args and not kwargs:
            group = self.__dict__.get(ATTRIBUTE)
            if group is not None and (y := group.output(self, x)) is not None:
                return y
            if (y := _usual_output(self, x)) is not None or (y := dora_output(self, x)) is not None:
                return y
        branches = branches_of(self, self.active_adapters, x) if plain else None
        if not branches:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        kwargs = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
        base = self._modules["base_layer"]
        operand = None if args or kwargs else base_operand(base, x)
        if isinstance(operand, Base):
            result = branches.pop(0).with_base(operand, x)
            if not isinstance(operand.weight, Tensor):
                # Quantized base layers return x's dtype, even under autocast.
                result = result.to(x.dtype)
        else:
            result = base(x, *args, **kwargs)
        for branch in branches:
            result = branch.add_to(result, x)
        return result

    def _mixed_batch_forward(
        self: Any, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> Tensor:
        """Apply to each row the branch of its adapter. PEFT's forward has checked the names."""
        branches = {name: branches_of(self, [name], x) for name in dict.fromkeys(adapter_names)}
        if None in branches.values():
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)  # type: ignore[misc]
        kwargs = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
        result = self.base_layer(x, *args, **kwargs)
        for name, found in branches.items():
            # There is no branch for "__base__", nor for an adapter that this layer does not have.
            for branch in found or ():
                rows = torch.tensor(
                    [i for i, other in enumerate(adapter_names) if other == name], device=x.device
                )
                result[rows] = branch.add_to(result[rows], x[rows])
        return result

    def _get_name(self) -> str:
        # A printed model must look the same.
        return ORIGINAL[type(self)].__name__


def compute_projection_group(layers: Sequence[Any], x: Tensor) -> list[Tensor] | None:
    """The outputs of layers that share the input ``x``, from one op; None if each layer must
    compute its own.
    """
    firsts, rests = [], []
    tensors: list[tuple[Any, ...]] = []
    for layer in layers:
        plain = not layer.disable_adapters and not layer.merged
        branches = branches_of(layer, layer.active_adapters, x) if plain else None
        operand = base_operand(layer._modules["base_layer"], x) if branches else None
        if not branches or not isinstance(operand, Base) or not isinstance(operand.weight, Tensor):
            return None
        first, *rest = branches
        firsts.append(first)
        rests.append(rest)
        tensors.append(first.tensors_with(operand))
    if len({(first.dropout_p, first.lora_A.dtype) for first in firsts}) > 1:
        return None
    scalings = [first.scaling for first in firsts]
    weights, biases, lora_As, lora_Bs = zip(*tensors, strict=True)
    outputs = lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings, firsts[0].dropout_p)
    results = []
    for result, rest in zip(outputs, rests, strict=True):
        for branch in rest:
            result = branch.add_to(result, x)
        results.append(result)
    return results


def projection_group_key(layer: Any) -> tuple[Any, ...]:
    """Layers can form a projection group if their keys are equal. :func:`compute_projection_group`
    checks the rest.
    """
    base = layer.base_layer
    # A layer of another type gets a key of its own.
    return (layer.in_features, base.weight.dtype) if type(base) is nn.Linear else (id(layer),)


def reason_to_compute_alone(layer: Any) -> str | None:
    """Why :func:`compute_projection_group` leaves a layer and its group to themselves as the layer
    is now, or None.
    """
    if (reason := _state_against(layer)) is not None:
        return reason
    active = _active_adapters(layer)
    if not active:
        return "has no active adapter"
    for adapter in active:
        if isinstance(branch := read_branch(layer, adapter), str):
            return _who_computes(layer, adapter, branch)
    operand = base_operand(layer._modules["base_layer"], None)
    if isinstance(operand, str):
        return operand
    return "has a quantized weight" if is_quantized(operand.weight) else None


def _state_against(layer: Any) -> str | None:
    """Why an accelerated layer computes no branch in its present state, or None."""
    if layer.merged:
        return "is merged"
    return "is disabled" if layer.disable_adapters else None


def _active_adapters(layer: Any) -> list[str]:
    """The active adapters that an accelerated layer has."""
    return [name for name in layer.active_adapters if name in layer._modules["lora_A"]._modules]


def is_dora_beside(layer: Any) -> bool:
    """Whether DoRA is active beside another adapter, so that PEFT's own forward computes both."""
    active = _active_adapters(layer)
    return len(active) > 1 and any(is_dora(layer, adapter) for adapter in active)


def _who_computes(layer: Any, adapter: str, reason: str) -> str:
    """Where an accelerated layer's active adapter runs in training that :func:`read_branch` refuses
    for ``reason``.
    """
    if is_dora(layer, adapter):
        of_dora = reason_against(layer, adapter)
        if of_dora is None and not is_dora_beside(layer):
            return f"computes adapter {adapter!r}, which is DoRA, by itself"
        reason = of_dora or f"adapter {adapter!r} is DoRA beside another active adapter"
    return f"runs PEFT's own forward: {reason}"


def read_operand(layer: Any, x: Tensor | None) -> Operand | str:
    """What a fused MLP reads of a PEFT layer or of a frozen one beside it, or why that must compute
    by itself.

    For an input like ``x``, or for any.
    """
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
    if x is not None and not fits(x, branch.lora_A, branch.lora_B, weight.shape[1]):
        return "has an adapter that does not fit its input"
    return Operand(
        LoRAWeights(weight, bias, branch.lora_A, branch.lora_B, branch.scaling),
        branch.dropout_p,
        dtype,
    )


def _active_branch(layer: Any, x: Tensor | None) -> Branch | str | None:
    """The branch of a PEFT layer's only active adapter, None without one, or why its own forward
    must compute it.
    """
    if type(layer) not in ORIGINAL:
        adapters = getattr(layer, "lora_A", ())
        reasons = [reason_against(layer, name) for name in adapters if type(layer) in KNOWN]
        return f"runs PEFT's own forward: {next(filter(None, reasons), f'it is a {type(layer).__name__}')}"
    if (reason := _state_against(layer)) is not None:
        return reason
    if x is not None and is_observed(layer):
        return "is watched"
    active = _active_adapters(layer)
    if len(active) > 1:
        return f"has {len(active)} active adapters, {', '.join(map(repr, active))}"
    if not active:
        return None
    branch = read_branch(layer, active[0])
    if isinstance(branch, str):
        return _who_computes(layer, active[0], branch)
    if branch.bias is not None:
        return f"has a bias in lora_B of adapter {active[0]!r}, which trains"
    # Without an x, the dropout of training.
    return (
        branch
        if x is not None
        else branch._replace(dropout_p=getattr(layer.lora_dropout[active[0]], "p", 0.0))
    )


PEFT_LAYERS = LayerKind(BaseTunerLayer, read_operand)


class AcceleratedLinear(Accelerated, lora.Linear):
    """``peft.tuners.lora.Linear``, over nn.Linear, its subclasses and transformers' Conv1D."""


class AcceleratedTorchaoLoraLinear(Accelerated, TorchaoLoraLinear):
    """``TorchaoLoraLinear``, over torchao's quantized weights."""


KNOWN: dict[type, type] = {
    lora.Linear: AcceleratedLinear,
    TorchaoLoraLinear: AcceleratedTorchaoLoraLinear,
}

if hasattr(lora, "Linear8bitLt"):

    class AcceleratedLinear8bitLt(Accelerated, lora.Linear8bitLt):
        """``peft.tuners.lora.Linear8bitLt``, over bitsandbytes' 8-bit layers."""

    KNOWN[lora.Linear8bitLt] = AcceleratedLinear8bitLt

if hasattr(lora, "Linear4bit"):

    class AcceleratedLinear4bit(Accelerated, lora.Linear4bit):
        """``peft.tuners.lora.Linear4bit``, over bitsandbytes' 4-bit layers."""

    KNOWN[lora.Linear4bit] = AcceleratedLinear4bit

ORIGINAL = {accelerated: original for original, accelerated in KNOWN.items()}
