"""``apply_lora``: put LoRA on a whole model. A plan comes first: which layers are replaced, which
are skipped, and why.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.model.merge import save_merged_layers_plain
from stablelora_kernels.model.modules import (
    CONFIG_ATTRIBUTE,
    lora_layers,
    replace_modules,
    unchanged_on_error,
    untie,
)
from stablelora_kernels.model.peft_format import config_from_peft
from stablelora_kernels.model.plan import LoRAPlan, plan_lora
from stablelora_kernels.model.reports import (
    LoRAReport,
    count_parameters,
    notes_on_gradients,
    notes_on_heads,
    notes_on_mlps,
    rows_of,
)
from stablelora_kernels.nn.experts import (
    LoRAExperts,
    LoRAStack,
    StackedWeight,
)
from stablelora_kernels.nn.fused_loss import fuse_losses, notes_on_losses
from stablelora_kernels.nn.fused_mlp import GatedMLP, fuse_mlps
from stablelora_kernels.nn.linear import LoRABranchLinear, LoRALinear, make_layer
from stablelora_kernels.nn.operands import OWN_LAYERS
from stablelora_kernels.nn.projection_group import make_projection_groups
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.utils.modules import HOOKS, clean
from stablelora_kernels.utils.validation import counted


def apply_lora(
    model: nn.Module,
    config: LoRAConfig | Any,
    *,
    fuse_projections: bool = False,
    fuse_mlp: bool = False,
    fuse_loss: bool = False,
) -> LoRAReport:
    """Give every linear layer that ``config`` matches a LoRA branch, in place, and freeze every
    other parameter.

    A new layer shares the old layer's weight, bias and hooks, its device and its training mode. A
    and B are float32, or float64 with a float64 weight. A layer that is registered in two places is
    matched by its first name and stays one layer in both. Trainable afterwards are A and B, the
    biases that ``config.bias`` selects, the modules of ``config.modules_to_save`` and the new head
    of ``config.task_type``. As in PEFT, such a module gets a copy of a weight that is tied to a
    module outside.

    Replaced are ``nn.Linear``, transformers' ``Conv1D`` and bitsandbytes' ``Linear4bit`` and
    ``Linear8bitLt``. If the kernels cannot read a weight (it is neither plain, nor 4-bit, nor
    torchao's float8), the original layer computes the base product and the branch is added to it.
    All other matches stay as they are, and the report names them with the reason: other subclasses
    and layer types, layers that already have LoRA, layers that give their input no gradient, the
    output head under "all-linear", and so on.

    Args:
        model: any module.
        config: a :class:`LoRAConfig`, or a ``LoraConfig`` of the ``peft`` package that asks for
            plain LoRA.
        fuse_projections: compute layers together whose names say that they share an input (q, k and
            v of an attention; gate and up of an MLP). The first layer's call computes the whole
            projection group from one read of the input; results are those of separate layers up to
            rounding. Each call checks that the layers really get the same tensor. If they do not,
            they are computed one by one and a warning says so. The report's notes list the groups.
        fuse_mlp: compute each gated MLP, ``down(act(gate(x)) * up(x))``, in one op that keeps less
            for backward (:func:`~stablelora_kernels.functional.lora_mlp`). Its class must be known
            by what its forward computes; the activation is SiLU or GELU, and at least one of its
            projections has LoRA. The report's ``mlps`` lists each MLP, fused or with the reason why
            not. A call that the op does not fit runs the module's own forward. Where both apply,
            ``fuse_mlp`` goes before ``fuse_projections``. A module of experts is computed in one
            op, too, whatever its gate.
        fuse_loss: compute the loss of a causal language model of transformers without its logits
            (:func:`~stablelora_kernels.functional.lora_linear_cross_entropy`). In training with
            labels, the output's ``logits`` are then None. In evaluation, and without labels, the
            model's own forward runs. The model's class must be known by what its forward computes
            between head and loss. The head may have LoRA or be frozen. A note says which model is
            computed so, or why it is not; a call that the op does not fit computes logits.

    Returns:
        The report. Names of ``target_modules`` that match nothing, as a typo does, are in its notes
        and in a warning. So is a head for classification or the like that stays frozen, and a
        frozen layer that gives its input no gradient.

    Raises:
        ValueError: no layer matches, none of ``modules_to_save`` matches, or one of them holds
            parameters that cannot be trained; or a PEFT config asks for more than plain LoRA.
        TypeError: ``model`` or ``config`` has another type.

    Whatever it raises, running out of memory included, the model is as it was.
    """
    if not isinstance(config, LoRAConfig) and getattr(config, "peft_type", None) is not None:
        config = config_from_peft(config)
    plan = plan_lora(model, _with_heads_of_task(model, config))
    with unchanged_on_error(model):
        report = apply_plan(model, plan, {}, fuse_projections, fuse_mlp, fuse_loss)
    save_merged_layers_plain(model)
    for note in notes_on_gradients(model) + notes_on_heads(model):
        warnings.warn(note, stacklevel=2)
    if plan.unmatched:
        matched = counted(len(report.replaced), "module")
        warnings.warn(f"{plan.unmatched}, while other names match {matched}", stacklevel=2)
    return report


def apply_plan(
    model: nn.Module,
    plan: LoRAPlan,
    lora_dtypes: Mapping[str, torch.dtype],
    fuse_projections: bool,
    fuse_mlp: bool,
    fuse_loss: bool,
) -> LoRAReport:
    """The second half of :func:`apply_lora`. ``lora_dtypes`` gives the dtype of A and B by layer
    name, float32 unless given.

    Whoever calls it puts the model back if it raises.
    """
    config = plan.config
    layers = _make_layers(plan, lora_dtypes)
    notes = list(plan.notes)
    notes += _put_in(model, plan, layers)
    notes += _notes_on_kinds(layers.values())
    _choose_trainable(model, config)
    for module in plan.modules_to_save.values():
        for key in untie(model, module):
            notes.append(f"{key!r} was tied to a module outside modules_to_save and is a copy now")
        module.requires_grad_(True)
    if fuse_projections:
        plain = {name: layer for name, layer in layers.items() if type(layer) is LoRALinear}
        notes += make_projection_groups(model, plain, OWN_LAYERS)
    mlps: tuple[GatedMLP, ...] = ()
    if fuse_mlp:
        mlps = fuse_mlps(model, OWN_LAYERS)
        notes += notes_on_mlps(mlps)
    if fuse_loss:
        notes += notes_on_losses(fuse_losses(model, OWN_LAYERS))
    notes += notes_on_gradients(model) + notes_on_heads(model)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return LoRAReport(rows_of(layers), plan.skipped, *count_parameters(model), tuple(notes), mlps)


def _make_layers(plan: LoRAPlan, lora_dtypes: Mapping[str, torch.dtype]) -> dict[str, LoRALinear]:
    """The new layers by name. They are not in the model yet."""
    config = plan.config
    layers = {}
    for name, target in plan.targets.items():
        layers[name] = make_layer(
            target.layer_class,
            target.base,
            config.rank_of(name),
            config.alpha_of(name),
            config.lora_dropout,
            config.use_rslora,
            config.init_lora_weights,
            lora_dtypes.get(name, torch.float32),
        )
    return layers


def _put_in(model: nn.Module, plan: LoRAPlan, layers: Mapping[str, LoRALinear]) -> list[str]:
    """Put the new layers into the places of the old ones, with their hooks, and return notes."""
    new: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        base = plan.targets[name].base
        if isinstance(base, StackedWeight):
            experts = new.setdefault(base.experts, LoRAExperts(base.experts))
            experts.register_module(base.name, layer)
        else:
            new[base] = layer
    notes = []
    names = {module: name for name, module in model.named_modules() if module in new}
    for module, name in names.items():
        hooks = sum(len(getattr(module, attribute)) for attribute in HOOKS)
        if hooks:
            notes.append(f"{counted(hooks, 'hook')} of {name!r} moved to the new layer")
    for module, count in replace_modules(model, new).items():
        if count > 1:
            notes.append(f"{names[module]!r} is registered in {count} places and stays one layer")
    return notes


def _choose_trainable(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze every parameter but A and B, and the biases that ``config.bias`` selects."""
    adapted = lora_layers(model).values()
    lora = {parameter for layer in adapted for parameter in (layer.lora_A, layer.lora_B)}
    biases = {layer.bias for layer in adapted} if config.bias == "lora_only" else set()
    for name, parameter in model.named_parameters():
        if parameter not in lora:
            is_bias = config.bias == "all" and name.rpartition(".")[2] == "bias"
            # An assignment, not requires_grad_(), which a lazy module's parameters do not have.
            parameter.requires_grad = is_bias or parameter in biases


def _with_heads_of_task(model: nn.Module, config: Any) -> Any:
    """``config`` with those heads of its task in ``modules_to_save`` that ``model`` has."""
    if not isinstance(config, LoRAConfig) or not isinstance(model, nn.Module):
        return config
    names = [clean(path) for path, _ in model.named_modules()]
    heads = [head for head in config.heads_of_task if any(name.endswith(head) for name in names)]
    new = [head for head in heads if head not in (config.modules_to_save or ())]
    return (
        replace(config, modules_to_save=[*(config.modules_to_save or ()), *new]) if new else config
    )


def _notes_on_kinds(layers: Iterable[LoRALinear]) -> list[str]:
    """Notes on layers that can't be merged."""
    quantized = Counter[str]()
    branches = Counter[str]()
    stacks = Counter[str]()
    for layer in layers:
        weight_kind = type(layer.weight).__name__
        if isinstance(layer, LoRAStack):
            packed_format = layer.packed_format
            if packed_format is not None:
                stacks[packed_format] += 1
        elif isinstance(layer, LoRAQuantizedLinear):
            quantized[weight_kind] += 1
        elif isinstance(layer, LoRABranchLinear):
            base = type(layer.base_layer)
            is_linear = base is nn.Linear
            branches[f"nn.Linear with {weight_kind}" if is_linear else base.__name__] += 1
    notes = []
    if quantized:
        notes.append(
            f"quantized weights ({_listed(quantized)}) stay as they are stored; these layers can't be merged"
        )
    if branches:
        notes.append(
            f"{_listed(branches)} compute their own product, with the branch on it; these layers can't be merged"
        )
    for packed_format, count in stacks.items():
        notes.append(
            f"{counted(count, 'stack')} of experts in {packed_format} stay as they are stored; these can't be merged"
        )
    return notes


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
