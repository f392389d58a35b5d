"""PEFT's LoRA layers with a forward on this library's ops. This module imports peft, so
``accelerate.py`` imports it lazily.

:class:`Accelerated` takes a layer's forward over, as ``nn/take_over.py`` says: only the instance's
class changes. Nothing is stored in the instance except its projection group, if
``fuse_projections`` is set, the rows' state of ``adapters_of_rows``, and what unmerging needs
(``merging.py``). So copies, pickles and replicas are accelerated too, and PEFT's own code adds,
switches, merges, deletes, saves and loads adapters as before. Each call reads the current adapters,
scaling, dropout, training mode, and whether the layer is merged or disabled (``read.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as _layer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from stablelora_kernels.dispatch.tallies import note_fallback
from stablelora_kernels.integrations.peft.merging import KeepsBase
from stablelora_kernels.integrations.peft.read import (
    NO_ADAPTER,
    OBSERVED,
    Branch,
    PeftLayer,
    is_dora,
    is_observed,
    read,
    read_branch,
)
from stablelora_kernels.integrations.peft.rows_state import Rows, RowsState
from stablelora_kernels.nn.operands import Operand, read_base
from stablelora_kernels.nn.projection_group import ATTRIBUTE, ProjectionGroup
from stablelora_kernels.ops.lora_rows.autograd import RowsBranch, lora_rows
from stablelora_kernels.utils.refusal import Refusal

# PEFT's layers that the ops are known to fit: over nn.Linear, its subclasses and transformers'
# Conv1D, over torchao's quantized weights, and over bitsandbytes' layers if that is installed.
KNOWN: tuple[type, ...] = (
    lora.Linear,
    TorchaoLoraLinear,
    *(getattr(lora, name) for name in ("Linear8bitLt", "Linear4bit") if hasattr(lora, name)),
)

# The keyword arguments that PEFT's layers consume. The base layer gets the others.
_OWN_ARGUMENTS = ("adapter_names", *getattr(_layer, "VARIANT_KWARG_KEYS", ()))

# Why projection groups and gated MLPs leave a layer to itself.
BY_ROWS = Refusal("computes each adapter's rows within adapters_of_rows")


class Accelerated(KeepsBase):
    """A mixin in front of a PEFT class. Calls that it does not support run that class's forward."""

    # A default of the class: torch.compile guards that no instance has another, but it would not
    # guard that a key is missing in __dict__.
    _stablelora_rows: RowsState | None = None

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
        y = _output(self, x, args, kwargs)
        if not isinstance(y, Refusal):
            return y
        _note_fallback(self, y)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]

    def _mixed_batch_forward(
        self: Any, x: Tensor, *args: object, adapter_names: list[str], **kwargs: object
    ) -> Tensor:
        """Apply to each row the branch of its adapter. PEFT's forward has checked the names."""
        branches: list[Branch] = []
        for name in dict.fromkeys(adapter_names):
            # Empty for "__base__", and for an adapter that this layer does not have.
            branches_of_name = _branches_to_add(self, [name], x)
            if isinstance(branches_of_name, Refusal):
                _note_fallback(self, branches_of_name)
                return super()._mixed_batch_forward(  # type: ignore[misc,no-any-return]
                    x, *args, adapter_names=adapter_names, **kwargs
                )
            branches += branches_of_name
        result = self.base_layer(x, *args, **_for_base(kwargs))
        for branch in branches:
            rows = [row for row, name in enumerate(adapter_names) if name == branch.name]
            index = torch.tensor(rows, device=x.device)
            result[index] = branch.add_to(result[index], x[index])
        return result  # type: ignore[no-any-return]

    def read_operand(self: Any, x: Tensor | None) -> Operand | Refusal:
        """What ops over several layers read of it; see ``nn/operands.py``."""
        if self.merged:
            return Refusal("is merged")
        if self.disable_adapters:
            return Refusal("is disabled")
        if rows_of(self) is not None:
            return BY_ROWS
        if x is not None and is_observed(self):
            return Refusal("is watched")
        reading = read(self, self.active_adapters, between_calls=x is None)
        if isinstance(reading, Refusal):
            return Refusal(f"runs PEFT's own forward: {reading.reason}")
        return reading.operand(x)

    def read_usual_operand(self: Any) -> Operand | None:
        """What they read of a usual layer, whatever its input."""
        if self.merged or self.disable_adapters or is_observed(self) or rows_of(self) is not None:
            return None
        reading = read(self, self.active_adapters)
        return None if isinstance(reading, Refusal) else reading.usual_operand()


def _output(
    layer: Any, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
) -> Tensor | Refusal:
    """An accelerated layer's output, or why PEFT's own forward must compute it."""
    if layer.disable_adapters:
        return Refusal("its adapters are disabled")
    if layer.merged:
        return Refusal("its adapters are merged")
    base_kwargs = _for_base(kwargs) if kwargs else kwargs
    if args or base_kwargs:
        return _output_with_arguments(layer, x, args, base_kwargs)
    group: ProjectionGroup | None = layer.__dict__.get(ATTRIBUTE)
    y = None if group is None else group.output(layer, x)
    if y is not None:
        return y
    reading = OBSERVED if is_observed(layer) else read(layer, layer.active_adapters)
    return reading if isinstance(reading, Refusal) else reading.output(x)


def _output_with_arguments(
    layer: PeftLayer, x: Tensor, args: tuple[object, ...], base_kwargs: dict[str, object]
) -> Tensor | Refusal:
    """As :func:`_output` for a call with more arguments, which the base layer takes."""
    branches = _branches_to_add(layer, layer.active_adapters, x)
    if isinstance(branches, Refusal):
        return branches
    if not branches:
        return NO_ADAPTER
    result: Tensor = layer._modules["base_layer"](x, *args, **base_kwargs)
    for branch in branches:
        result = branch.add_to(result, x)
    return result


def _branches_to_add(
    layer: PeftLayer, names: Collection[str], x: Tensor
) -> tuple[Branch, ...] | Refusal:
    """The branches, of those adapters of ``names`` that a layer has, to add to its base product of
    ``x``; or why PEFT's own forward must compute them.
    """
    reading = OBSERVED if is_observed(layer) else read(layer, names)
    return reading if isinstance(reading, Refusal) else reading.to_add(x)


def _for_base(kwargs: dict[str, object]) -> dict[str, object]:
    """Those keyword arguments that PEFT's layers hand to their base layer."""
    return {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}


def _note_fallback(layer: PeftLayer, refusal: Refusal) -> None:
    # A traced call is none that runs.
    if not torch.compiler.is_compiling():
        note_fallback(layer, refusal.reason)


def is_dora_beside(layer: PeftLayer) -> bool:
    """Whether DoRA is active beside another adapter, so that PEFT's own forward computes both."""
    held = layer._modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in held]
    return len(active) > 1 and any(is_dora(layer, name) for name in active)


# Within adapters_of_rows


def rows_of(layer: Accelerated) -> Rows | None:
    """The rows in force for a layer that is called now; None outside of ``adapters_of_rows``.

    Raises:
        RuntimeError: as :meth:`RowsState.current`.
    """
    state = layer._stablelora_rows
    return None if state is None else state.current()


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
    return _branches_by_rows(layer, rows, x, args, _for_base(kwargs))


def _read_rows_branch(layer: PeftLayer, adapter: str) -> Branch | Refusal:
    """An adapter's branch, or why it does not run on rows of its own."""
    if adapter in layer.lora_variant:
        return Refusal(_reason_against_variant(layer, adapter))
    branch = read_branch(layer, adapter)
    if isinstance(branch, Branch) and branch.bias is not None:
        return Refusal(f"adapter {adapter!r} has a bias in lora_B, which trains")
    return branch


def _reason_against_variant(layer: PeftLayer, adapter: str) -> str:
    kind = type(layer.lora_variant[adapter]).__name__
    return f"adapter {adapter!r} is a variant of LoRA ({kind})"


@torch._disable_dynamo
def _branches_by_rows(
    layer: PeftLayer,
    rows: Rows,
    x: Tensor,
    args: tuple[object, ...],
    base_kwargs: dict[str, object],
) -> Tensor:
    """The output of an accelerated layer whose adapters are not disabled.

    torch.compile leaves it out of its graph, which would hold the names.

    Raises:
        ValueError: the layer cannot run one of the adapters, its base layer trains, or x has another
            number of rows.
        TypeError: x does not fit an adapter.
    """
    base = layer._modules["base_layer"]
    tokens = rows.tokens_of(x, type(base).__name__)
    branches = []
    for name, start, end in rows.ranges:
        if name not in layer._modules["lora_A"]._modules:
            rows.check_not_deleted(name)
            continue
        branch = _read_rows_branch(layer, name)
        if isinstance(branch, Refusal):
            raise ValueError(f"adapters_of_rows: {branch.reason}")
        if not branch.fits(x):
            raise TypeError(
                f"adapter {name!r} has a lora_A of shape {list(branch.lora_A.shape)}, {branch.lora_A.dtype} on "
                f"{branch.lora_A.device}, which does not fit an input of shape {list(x.shape)}, {x.dtype} on {x.device}"
            )
        of_rows = (branch.lora_A, branch.lora_B, branch.scaling, branch.dropout_p)
        branches.append(RowsBranch(start * tokens, end * tokens, *of_rows))
    _check_base_is_frozen(base)
    if not branches or args or base_kwargs:
        result: Tensor = base(x, *args, **base_kwargs)
        return lora_rows(x, None, None, result, branches) if branches else result
    operand = read_base(base, x)
    if isinstance(operand, Refusal) or not isinstance(operand.weight, Tensor):
        return lora_rows(x, None, None, base(x), branches)
    return lora_rows(x, operand.weight, operand.bias, None, branches)


def _check_base_is_frozen(base: nn.Module) -> None:
    """Raise ValueError if a base layer trains: all adapters' rows would train it together."""
    for name, p in base._parameters.items():
        if p is not None and p.requires_grad:
            raise ValueError(
                f"adapters_of_rows: the base layer's {name} must be frozen, got one that requires a gradient"
            )


def adapters_held(module: nn.Module) -> Collection[str]:
    """The names of a PEFT module's adapters: of a layer, or of a copy in modules_to_save; none of
    other modules.
    """
    if isinstance(module, AuxiliaryTrainingWrapper):
        return set(module._adapters)
    if isinstance(module, BaseTunerLayer):
        return {name for held in module.adapter_layer_names for name in getattr(module, held)}
    return ()


def modules_outside_adapters(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model`` by their dotted names, without those that adapters consist of: as many,
    however many adapters it has.
    """
    yield name, model
    children = model._modules
    if isinstance(model, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        children = {child: children[child] for child in ("base_layer",) if child in children}
    for child_name, child in children.items():
        if child is not None:
            child_name = f"{name}.{child_name}" if name else child_name
            yield from modules_outside_adapters(child, child_name)


def reason_against_rows(module: Any, adapters: Collection[str], is_accelerated: bool) -> str | None:
    """Why a PEFT module cannot run ``adapters``, each on rows of its own, or None."""
    held = adapters_held(module)
    if is_accelerated:
        if module.merged:
            return f"adapter {module.merged_adapters[0]!r} is merged; call unmerge_adapter first"
        # The layer's forward reads all else.
        variants = module.lora_variant.keys() & adapters
        return _reason_against_variant(module, variants.pop()) if variants else None
    for name in held:
        if name in adapters or name in module.active_adapters:
            kind = type(module).__name__
            return f"PEFT's {kind}, which is not accelerated, runs adapter {name!r} on all rows or on none"
    return None
