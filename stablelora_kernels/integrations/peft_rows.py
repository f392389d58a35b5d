"""A PEFT layer's output where ``adapters_of_rows`` is open: the base product for all rows, and each
adapter's branch for its own. This module imports peft.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from stablelora_kernels.integrations.peft_operands import (
    Branch,
    PeftLayer,
    read_branch,
)
from stablelora_kernels.integrations.rows_state import Rows
from stablelora_kernels.nn.operands import read_base
from stablelora_kernels.ops.lora_rows.autograd import RowsBranch, lora_rows

# Why projection groups and gated MLPs leave a layer to itself.
BY_ROWS = "computes each adapter's rows within adapters_of_rows"


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


def read_rows_branch(layer: PeftLayer, adapter: str) -> Branch | str:
    """An adapter's branch, or why it does not run on rows of its own."""
    if adapter in layer.lora_variant:
        return _reason_against_variant(layer, adapter)
    branch = read_branch(layer, adapter)
    if not isinstance(branch, str) and branch.bias is not None:
        return f"adapter {adapter!r} has a bias in lora_B, which trains"
    return branch


def _reason_against_variant(layer: PeftLayer, adapter: str) -> str:
    kind = type(layer.lora_variant[adapter]).__name__
    return f"adapter {adapter!r} is a variant of LoRA ({kind})"


@torch._disable_dynamo
def output_by_rows(
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
        branch = read_rows_branch(layer, name)
        if isinstance(branch, str):
            raise ValueError(f"adapters_of_rows: {branch}")
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
    if isinstance(operand, str) or not isinstance(operand.weight, Tensor):
        return lora_rows(x, None, None, base(x), branches)
    return lora_rows(x, operand.weight, operand.bias, None, branches)


def _check_base_is_frozen(base: nn.Module) -> None:
    """Raise ValueError if a base layer trains: all adapters' rows would train it together."""
    for name, p in base._parameters.items():
        if p is not None and p.requires_grad:
            raise ValueError(
                f"adapters_of_rows: the base layer's {name} must be frozen, got one that requires a gradient"
            )
