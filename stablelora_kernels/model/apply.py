"""``apply_lora``: put LoRA on a whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.model.modules import CONFIG_ATTRIBUTE, HOOKS, lora_layers, replace_modules, untie
from stablelora_kernels.model.reports import LoRAReport, report_on
from stablelora_kernels.model.targets import Plan, plan_lora
from stablelora_kernels.nn.branch import LoRABranchLinear
from stablelora_kernels.nn.linear import LoRALinear, compute_projection_group, make_layer, projection_group_key
from stablelora_kernels.nn.projection_group import make_projection_groups
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear


def apply_lora(model: nn.Module, config: LoRAConfig, *, fuse_projections: bool = False) -> LoRAReport:
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

    Returns:
        The report.

    Raises:
        ValueError: no layer matches, none of ``modules_to_save`` matches, or one of them holds parameters that cannot be
            trained. Nothing is changed then.
        TypeError: ``model`` or ``config`` has another type.
    """
    return apply_plan(model, config, plan_lora(model, config), fuse_projections=fuse_projections)


def apply_plan(
    model: nn.Module,
    config: LoRAConfig,
    plan: Plan,
    lora_dtypes: Mapping[str, torch.dtype] | None = None,
    fuse_projections: bool = False,
) -> LoRAReport:
    """The second half of :func:`apply_lora`. ``lora_dtypes`` gives the dtype of A and B by layer name, float32 unless given."""
    was_trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        layers = {
            name: make_layer(
                target.layer_class,
                target.layer,
                r=config.rank_of(name),
                lora_alpha=config.alpha_of(name),
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
                lora_dtype=(lora_dtypes or {}).get(name, torch.float32),
            )
            for name, target in plan.targets.items()
        }
    except BaseException:
        # Most likely out of memory. The layers made so far have frozen parameters that they share with the model.
        for parameter, flag in was_trainable.items():
            parameter.requires_grad_(flag)
        raise

    notes = list(plan.notes)
    for name, target in plan.targets.items():
        if hooks := sum(len(getattr(target.layer, attribute)) for attribute in HOOKS):
            notes.append(f"{hooks} hook(s) of {name!r} were moved to the new layer")
    counts = replace_modules(model, {target.layer: layers[name] for name, target in plan.targets.items()})
    for name, target in plan.targets.items():
        if counts[target.layer] > 1:
            notes.append(f"{name!r} is registered in {counts[target.layer]} places and stays one layer")
    notes += _notes_on_kinds(layers.values())

    lora = {id(parameter) for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in lora:
            parameter.requires_grad_(config.bias == "all" and (name == "bias" or name.endswith(".bias")))
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
    setattr(model, CONFIG_ATTRIBUTE, config)
    return report_on(model, layers, plan.skipped, tuple(notes))


def _notes_on_kinds(layers: Iterable[LoRALinear]) -> list[str]:
    """Notes on layers that can't be merged."""
    notes = []
    quantized, branches = Counter[str](), Counter[str]()
    for layer in layers:
        if isinstance(layer, LoRAQuantizedLinear):
            quantized[type(layer.weight).__name__] += 1
        elif isinstance(layer, LoRABranchLinear):
            base = type(layer.base_layer)
            branches[base.__name__ if base is not nn.Linear else f"nn.Linear with {type(layer.weight).__name__}"] += 1
    if quantized:
        counts = ", ".join(f"{count} {kind}" for kind, count in quantized.items())
        notes.append(f"quantized weights ({counts}) stay as they are stored; these layers can't be merged")
    if branches:
        counts = ", ".join(f"{count} {kind}" for kind, count in branches.items())
        notes.append(f"{counts} compute their own product, with the branch on it; these layers can't be merged")
    return notes
