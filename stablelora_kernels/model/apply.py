"""``apply_lora``: put LoRA on a whole model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.model.merged_saving import save_merged_layers_plain
from stablelora_kernels.model.modules import (
    CONFIG_ATTRIBUTE,
    lora_layers,
    replace_modules,
    unchanged_on_error,
    untie,
)
from stablelora_kernels.model.peft_format import config_from_peft
from stablelora_kernels.model.reports import LoRAReport, notes_on_mlps, report_on
from stablelora_kernels.model.targets import LoRAPlan, plan_lora
from stablelora_kernels.nn.branch import LoRABranchLinear
from stablelora_kernels.nn.fused_mlp import OWN_LAYERS, GatedMLP, compute_projection_group, fuse_mlps
from stablelora_kernels.nn.linear import LoRALinear, make_layer, projection_group_key
from stablelora_kernels.nn.projection_group import make_projection_groups
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.utils.hooks import HOOKS
from stablelora_kernels.utils.text import counted


def apply_lora(
    model: nn.Module, config: LoRAConfig | Any, *, fuse_projections: bool = False, fuse_mlp: bool = False
) -> LoRAReport:
    """Give every linear layer that ``config`` matches a LoRA branch, in place, and freeze every other parameter.

    A new layer shares the old layer's weight, bias and hooks, its device and its training mode. A and B are float32, or
    float64 with a float64 weight. A layer that is registered in two places is matched by its first name and stays one layer in
    both. Trainable afterwards are A and B, the biases that ``config.bias`` selects and the modules of
    ``config.modules_to_save``. As in PEFT, such a module gets a copy of a weight that is tied to a module outside.

    Replaced are ``nn.Linear``, transformers' ``Conv1D`` and bitsandbytes' ``Linear4bit`` and ``Linear8bitLt``. If the kernels
    cannot read a weight (it is neither plain, nor 4-bit, nor torchao's float8), the original layer computes the base product
    and the branch is added to it. All other matches stay as they are, and the report names them with the reason: other
    subclasses and layer types, layers that already have LoRA, layers that give their input no gradient, the output head under
    "all-linear", and so on.

    With ``fuse_projections``, layers whose names say that they share an input (q, k and v of an attention; gate and up of an
    MLP) are computed together. The first layer's call computes the whole projection group from one read of the input; results
    are those of separate layers up to rounding. Each call checks that the layers really get the same tensor. If they do not,
    they are computed one by one and a warning says so. The report's notes list the groups.

    With ``fuse_mlp``, a gated MLP, ``down(act(gate(x)) * up(x))``, is computed in one op that keeps less for backward
    (:func:`~stablelora_kernels.functional.lora_mlp`). Its class must be known by what its forward computes; the activation is
    SiLU or GELU, and at least one of its projections has LoRA. The report's ``mlps`` lists each MLP, fused or with the reason
    why not. A call that the op does not fit runs the module's own forward. Where both apply, ``fuse_mlp`` goes before
    ``fuse_projections``.

    Args:
        model: any module.
        config: a :class:`LoRAConfig`, or a ``LoraConfig`` of the ``peft`` package that asks for plain LoRA.
        fuse_projections: compute layers that share an input together.
        fuse_mlp: compute each gated MLP in one op.

    Returns:
        The report. Names of ``target_modules`` that match nothing, as a typo does, are in its notes and in a warning.

    Raises:
        ValueError: no layer matches, none of ``modules_to_save`` matches, or one of them holds parameters that cannot be
            trained; or a PEFT config asks for more than plain LoRA.
        TypeError: ``model`` or ``config`` has another type.

    Whatever it raises, running out of memory included, the model is as it was.
    """
    if not isinstance(config, LoRAConfig) and getattr(config, "peft_type", None) is not None:
        config = config_from_peft(config)
    plan = plan_lora(model, config)
    with unchanged_on_error(model):
        report = apply_plan(model, config, plan, {}, fuse_projections, fuse_mlp)
    save_merged_layers_plain(model)
    if plan.unmatched:
        matched = counted(len(report.replaced), "module")
        warnings.warn(f"{plan.unmatched}, while other names match {matched}", stacklevel=2)
    return report


def apply_plan(
    model: nn.Module,
    config: LoRAConfig,
    plan: LoRAPlan,
    lora_dtypes: Mapping[str, torch.dtype],
    fuse_projections: bool,
    fuse_mlp: bool,
) -> LoRAReport:
    """The second half of :func:`apply_lora`. ``lora_dtypes`` gives the dtype of A and B by layer name, float32 unless given.

    Whoever calls it puts the model back if it raises.
    """
    layers = {
        name: make_layer(
            target.layer_class,
            target.layer,
            r=config.rank_of(name),
            lora_alpha=config.alpha_of(name),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights,
            lora_dtype=lora_dtypes.get(name, torch.float32),
        )
        for name, target in plan.targets.items()
    }
    notes = list(plan.notes)
    for name, target in plan.targets.items():
        if hooks := sum(len(getattr(target.layer, attribute)) for attribute in HOOKS):
            notes.append(f"{counted(hooks, 'hook')} of {name!r} moved to the new layer")
    counts = replace_modules(model, {target.layer: layers[name] for name, target in plan.targets.items()})
    for name, target in plan.targets.items():
        if counts[target.layer] > 1:
            notes.append(f"{name!r} is registered in {counts[target.layer]} places and stays one layer")
    notes += _notes_on_kinds(layers.values())

    lora = {id(parameter) for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in lora:
            # An assignment, not requires_grad_(), which a lazy module's parameters do not have.
            parameter.requires_grad = config.bias == "all" and (name == "bias" or name.endswith(".bias"))
    for layer in lora_layers(model).values():
        if config.bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)
    for name, module in plan.modules_to_save.items():
        for key in untie(model, name, module):
            notes.append(f"{key!r} was tied to a module outside modules_to_save and is a copy now")
        module.requires_grad_(True)
    if fuse_projections:
        plain = {name: layer for name, layer in layers.items() if type(layer) is LoRALinear}
        notes.append(make_projection_groups(model, plain, projection_group_key, compute_projection_group))
    mlps: tuple[GatedMLP, ...] = ()
    if fuse_mlp:
        mlps = fuse_mlps(model, OWN_LAYERS)
        notes += notes_on_mlps(mlps)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return report_on(model, layers, plan.skipped, tuple(notes), mlps)


def _notes_on_kinds(layers: Iterable[LoRALinear]) -> list[str]:
    """Notes on layers that can't be merged."""
    quantized, branches = Counter[str](), Counter[str]()
    for layer in layers:
        if isinstance(layer, LoRAQuantizedLinear):
            quantized[type(layer.weight).__name__] += 1
        elif isinstance(layer, LoRABranchLinear):
            base = type(layer.base_layer)
            branches[base.__name__ if base is not nn.Linear else f"nn.Linear with {type(layer.weight).__name__}"] += 1
    texts = "quantized weights ({}) stay as they are stored", "{} compute their own product, with the branch on it"
    return [
        text.format(", ".join(f"{count} {kind}" for kind, count in kinds.items())) + "; these layers can't be merged"
        for text, kinds in zip(texts, (quantized, branches), strict=True)
        if kinds
    ]
