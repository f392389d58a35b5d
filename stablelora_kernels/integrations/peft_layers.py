"""PEFT's LoRA layers with a forward on this library's ops. This module imports peft, so ``peft.py``
imports it lazily.

Accelerating an instance changes only its ``__class__``, to a subclass of its PEFT class that
overrides the forward. It stores nothing in the instance except its projection group, if
``fuse_projections`` is set. So copies, pickles and replicas are accelerated too, and PEFT's own
code adds, switches, merges, deletes, saves and loads adapters as before. Each call reads the
current adapters, scaling, dropout, training mode, and whether the layer is merged or disabled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as _layer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from stablelora_kernels.dispatch.tallies import note_fallback
from stablelora_kernels.functional import LoRAWeights, lora_linear_if
from stablelora_kernels.integrations.peft_dora import Dora, is_dora, read_dora
from stablelora_kernels.integrations.peft_operands import (
    Branch,
    PeftLayer,
    is_observed,
    read_branch,
)
from stablelora_kernels.integrations.peft_rows import BY_ROWS, output_by_rows
from stablelora_kernels.integrations.rows_state import Rows, RunsRows, rows_of
from stablelora_kernels.nn.operands import (
    Operand,
    frozen_operand,
    plain_tensors,
    read_base,
    reason_to_cast,
)
from stablelora_kernels.nn.projection_group import ATTRIBUTE, ProjectionGroup

# The keyword arguments that PEFT's layers consume. The base layer gets the others.
_OWN_ARGUMENTS = ("adapter_names", *getattr(_layer, "VARIANT_KWARG_KEYS", ()))

# Why the ops do not train such an adapter.
DORA_WITH_DROPOUT = "is DoRA with dropout, which needs the base product of two inputs to train; evaluation runs on the ops"


def read_branch_or_dora(
    layer: PeftLayer, adapter: str, between_calls: bool = False
) -> Branch | Dora | str:
    """An adapter, with the dropout of now, or why PEFT's own forward must compute it.

    ``between_calls``: its tensors may be shards, for which ``fully_shard`` puts plain tensors
    during each forward.
    """
    variant = layer.lora_variant.get(adapter)
    if variant is None:
        return read_branch(layer, adapter, between_calls)
    if is_dora(layer, adapter):
        return read_dora(layer, adapter, between_calls)
    return f"adapter {adapter!r} is a variant of LoRA ({type(variant).__name__})"


def read_adapters(
    layer: PeftLayer, names: Iterable[str], between_calls: bool = False
) -> dict[str, Branch] | Dora | str:
    """Those adapters of ``names`` that a layer has: branches by name, or a DoRA adapter that is
    alone; or why PEFT's own forward must compute them. ``between_calls`` as in
    :func:`read_branch_or_dora`.
    """
    held = layer._modules["lora_A"]._modules
    branches: dict[str, Branch] = {}
    doras: list[Dora] = []
    for name in names:
        if name not in held:
            continue
        adapter = read_branch_or_dora(layer, name, between_calls)
        if isinstance(adapter, str):
            return adapter
        if isinstance(adapter, Branch):
            branches[name] = adapter
        else:
            doras.append(adapter)
    if not doras:
        return branches
    if branches or len(doras) > 1:
        return f"adapter {doras[0].name!r} is DoRA beside another active adapter"
    return doras[0]


def reason_adapter_stays_pefts(
    layer: PeftLayer, adapter: str, is_gathered_in_calls: bool = False
) -> str | None:
    """Why PEFT's own forward must compute an adapter of a layer, at least in training, or None.

    ``is_gathered_in_calls``: ``fully_shard`` has sharded the layer.
    """
    reading = read_branch_or_dora(layer, adapter, between_calls=is_gathered_in_calls)
    if isinstance(reading, str):
        return reading
    if _is_dora_with_dropout(layer, adapter):
        return f"adapter {adapter!r} {DORA_WITH_DROPOUT}"
    return None


def is_only_evaluated(layer: PeftLayer, adapter: str) -> bool:
    """Whether the ops compute an adapter in evaluation, but not in training."""
    if not _is_dora_with_dropout(layer, adapter):
        return False
    return not isinstance(read_dora(layer, adapter), str)


def _is_dora_with_dropout(layer: PeftLayer, adapter: str) -> bool:
    return is_dora(layer, adapter) and type(layer.lora_dropout[adapter]) is nn.Dropout


def is_dora_beside(layer: PeftLayer) -> bool:
    """Whether DoRA is active beside another adapter, so that PEFT's own forward computes both."""
    held = layer._modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in held]
    return len(active) > 1 and any(is_dora(layer, name) for name in active)


# Why PEFT's own forward computes a call.
_OBSERVED = "its modules are observed"
_NO_ADAPTER = "no adapter is active"


def _not_fitting(x: Tensor) -> str:
    return f"the adapter does not fit x of {x.dtype} on {x.device.type}"


def output_of(layer: PeftLayer, x: Tensor) -> Tensor | str:
    """An accelerated layer's output for ``x``, or why PEFT's own forward must compute it."""
    if is_observed(layer):
        return _OBSERVED
    y = _output_in_one_op(layer, x)
    if y is not None:
        return y
    adapters = read_adapters(layer, layer.active_adapters)
    if isinstance(adapters, str):
        return adapters
    if not adapters:
        return _NO_ADAPTER
    base = layer._modules["base_layer"]
    if isinstance(adapters, Dora):
        return adapters.output(base, x) if adapters.fits(x) else _not_fitting(x)
    first, *others = adapters.values()
    if not all(branch.fits(x) for branch in adapters.values()):
        return _not_fitting(x)
    y = first.output(base, x)
    for branch in others:
        y = branch.add_to(y, x)
    return y


def _output_in_one_op(layer: PeftLayer, x: Tensor) -> Tensor | None:
    """:func:`output_of` with one adapter on a plain base layer; None if it is no such call."""
    operand = _read_one_adapter(layer)
    if operand is None:
        return None

    # Once calls of this kind are known to fit, the op's own key says so.
    def fits() -> bool:
        reading = _read(layer, x)
        if isinstance(reading, str) or reading.weights.lora_A is None:
            return False
        return x.shape[-1:] == reading.weights.lora_A.shape[1:]

    return lora_linear_if(fits, x, operand.weights, operand.dropout_p or 0.0)


def output_with_arguments(
    layer: PeftLayer, x: Tensor, args: tuple[object, ...], base_kwargs: dict[str, object]
) -> Tensor | str:
    """As :func:`output_of` for a call with more arguments, which the base layer takes."""
    branches = _branches_for(layer, layer.active_adapters, x)
    if isinstance(branches, str):
        return branches
    if not branches:
        return _NO_ADAPTER
    result = layer._modules["base_layer"](x, *args, **base_kwargs)
    for branch in branches.values():
        result = branch.add_to(result, x)
    return result  # type: ignore[no-any-return]


def _branches_for(layer: PeftLayer, names: Iterable[str], x: Tensor) -> dict[str, Branch] | str:
    """Those adapters of ``names`` that a layer has, or why PEFT's own forward must compute them for
    ``x``, as it does DoRA that is not in one op with the base layer.
    """
    adapters = _OBSERVED if is_observed(layer) else read_adapters(layer, names)
    if isinstance(adapters, str):
        return adapters
    if isinstance(adapters, Dora):
        return "DoRA is in one op with the base layer alone"
    return adapters if all(branch.fits(x) for branch in adapters.values()) else _not_fitting(x)


def _for_base(kwargs: dict[str, object]) -> dict[str, object]:
    """Those keyword arguments that PEFT's layers hand to their base layer."""
    return {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}


def _output_by_rows(
    layer: PeftLayer, rows: Rows, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
) -> Tensor:
    """The output of a layer within ``adapters_of_rows``, whatever its active adapters."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"adapter_names is {kwargs['adapter_names']}, but adapters_of_rows is open with names of its own: give one of the two"
        )
    if layer.merged:
        raise ValueError("adapters_of_rows: an adapter is merged; call unmerge_adapter first")
    return output_by_rows(layer, rows, x, args, _for_base(kwargs))


def _output_or_reason(
    layer: Any, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
) -> Tensor | str:
    """An accelerated layer's output, or why PEFT's own forward must compute it."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    base_kwargs = _for_base(kwargs) if kwargs else kwargs
    if args or base_kwargs:
        return output_with_arguments(layer, x, args, base_kwargs)
    group: ProjectionGroup | None = layer.__dict__.get(ATTRIBUTE)
    y = None if group is None else group.output(layer, x)
    return output_of(layer, x) if y is None else y


def _note_fallback(layer: PeftLayer, reason: str) -> None:
    # A traced call is none that runs.
    if not torch.compiler.is_compiling():
        note_fallback(layer, reason)


class Accelerated(RunsRows):
    """A mixin in front of a PEFT class. Calls that it does not support run that class's forward."""

    def forward(self: Any, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """PEFT's forward: base_layer(x) plus the active adapters' branches, in the base layer's
        dtype.
        """
        rows = rows_of(self)
        if rows is not None and not self.disable_adapters:
            return _output_by_rows(self, rows, x, args, kwargs)
        if kwargs.get("adapter_names") is not None and not self.disable_adapters:
            # It checks the names, and calls _mixed_batch_forward.
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        y = _output_or_reason(self, x, args, kwargs)
        if not isinstance(y, str):
            return y
        _note_fallback(self, y)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]

    def _mixed_batch_forward(
        self: Any, x: Tensor, *args: object, adapter_names: list[str], **kwargs: object
    ) -> Tensor:
        """Apply to each row the branch of its adapter. PEFT's forward has checked the names."""
        branches: dict[str, Branch] = {}
        for name in dict.fromkeys(adapter_names):
            # Empty for "__base__", and for an adapter that this layer does not have.
            branches_of_name = _branches_for(self, [name], x)
            if isinstance(branches_of_name, str):
                _note_fallback(self, branches_of_name)
                return super()._mixed_batch_forward(  # type: ignore[misc]
                    x, *args, adapter_names=adapter_names, **kwargs
                )
            branches |= branches_of_name
        result = self.base_layer(x, *args, **_for_base(kwargs))
        for name, branch in branches.items():
            rows = [row for row, row_name in enumerate(adapter_names) if row_name == name]
            index = torch.tensor(rows, device=x.device)
            result[index] = branch.add_to(result[index], x[index])
        return result

    def read_operand(self: Any, x: Tensor | None) -> Operand | str:
        """What ops over several layers read of it; see ``nn/operands.py``."""
        return _read(self, x)

    def read_usual_operand(self: Any) -> Operand | None:
        """What they read of a usual layer, whatever its input."""
        if self.merged or self.disable_adapters or is_observed(self) or rows_of(self) is not None:
            return None
        return _read_one_adapter(self)

    def _get_name(self) -> str:
        # A printed model must look the same.
        return ORIGINAL[type(self)].__name__


def _read(layer: Any, x: Tensor | None) -> Operand | str:
    """:func:`~stablelora_kernels.nn.operands.read_layer` of an accelerated layer."""
    if layer.merged:
        return "is merged"
    if layer.disable_adapters:
        return "is disabled"
    if rows_of(layer) is not None:
        return BY_ROWS
    if x is not None and is_observed(layer):
        return "is watched"
    adapters = read_adapters(layer, layer.active_adapters, between_calls=x is None)
    if isinstance(adapters, str):
        return f"runs PEFT's own forward: {adapters}"
    if isinstance(adapters, Dora):
        reason = reason_adapter_stays_pefts(layer, adapters.name)
        if reason is not None:
            return f"runs PEFT's own forward: {reason}"
        return f"computes adapter {adapters.name!r}, which is DoRA, by itself"
    base = read_base(layer._modules["base_layer"], x)
    if isinstance(base, str):
        return base
    if not isinstance(base.weight, Tensor) and (reason := reason_to_cast(base, x)) is not None:
        return reason
    if not adapters:
        return frozen_operand(base)
    first, *others = adapters.values()
    against_mlp = None
    if others or first.bias is not None:
        against_mlp = _reason_against_mlp(adapters)
    bias = base.bias
    if x is None:
        dropout_p = _dropout_in_training(layer, next(iter(adapters)))
    else:
        for branch in adapters.values():
            if not branch.fits(x, base.weight.shape[-1]):
                return "has an adapter that does not fit its input"
        dropout_p = first.dropout_p
        bias = first.bias_with(base)
    weights = LoRAWeights(base.weight, bias, first.lora_A, first.lora_B, first.scaling)
    return Operand(weights, dropout_p, base.dtype, tuple(others), against_mlp)


def _read_one_adapter(layer: PeftLayer) -> Operand | None:
    """The operand of a layer with one plain adapter on a plain base layer, whatever its input;
    None of any other layer.
    """
    active = layer.active_adapters
    modules = layer._modules
    if len(active) != 1 or active[0] in layer.lora_variant:
        return None
    if active[0] not in modules["lora_A"]._modules:
        return None
    tensors = plain_tensors(modules["base_layer"])
    branch = read_branch(layer, active[0])
    if tensors is None or isinstance(branch, str) or branch.bias is not None:
        return None
    weight, bias = tensors
    weights = LoRAWeights(weight, bias, branch.lora_A, branch.lora_B, branch.scaling)
    return Operand(weights, branch.dropout_p, None)


def _reason_against_mlp(branches: dict[str, Branch]) -> str:
    """Why a gated MLP does not take these active adapters of a layer."""
    if len(branches) > 1:
        return f"has {len(branches)} active adapters, {', '.join(map(repr, branches))}"
    return f"has a bias in lora_B of adapter {next(iter(branches))!r}, which trains"


def _dropout_in_training(layer: PeftLayer, adapter: str) -> float:
    """The probability of an adapter's dropout, in whatever mode the layer is; 0 without one."""
    return getattr(layer.lora_dropout[adapter], "p", 0.0)


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
