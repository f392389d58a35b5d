"""LoRA on a whole model: ``apply_lora`` and its report, merging, and taking LoRA off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.model.modules import CONFIG_ATTRIBUTE, HOOKS, _swap, _untie, lora_layers
from stablelora_kernels.model.reports import LoRAReport, report_on
from stablelora_kernels.model.targets import Plan, plan_lora
from stablelora_kernels.nn import projection_group
from stablelora_kernels.nn.branch import LoRABranchLinear
from stablelora_kernels.nn.linear import LoRALinear, alike, compute_together
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear


def apply_lora(model: nn.Module, config: LoRAConfig, *, fuse_projections: bool = False) -> LoRAReport:
    """Give every linear layer that ``config`` matches a LoRA branch, in place, and freeze every other parameter.

    The new layers share the old ones' weight, bias and hooks, are on their device and in their training mode; A and B
    are float32 (float64 beside a float64 weight). A layer registered in two places is matched by its first name and
    stays one layer in both. Trainable afterwards are A and B, the biases that ``config.bias`` asks for and the modules
    of ``config.modules_to_save``; one of these whose weight is tied to a module outside gets a copy, as in PEFT.

    Replaced are ``nn.Linear``, transformers' ``Conv1D`` and bitsandbytes' ``Linear4bit`` and ``Linear8bitLt``. Where a weight is
    neither plain nor in 4 bits or torchao's float8, the layer goes on computing its own product, with the branch on it.
    Anything else that matches (other subclasses, other layer types, layers that have LoRA already, layers that give their
    input no gradient, the output head under "all-linear", ...) is left as it was and named in the report.

    With ``fuse_projections`` layers that share their input by their names (q, k and v of an attention; gate and up of an MLP)
    are computed together, at the first one's call, from one read of it, with the results of separate layers up to rounding.
    It is checked at each call that they are called with one tensor; where they are not, they are computed one by one, and a
    warning says so. The report's notes say which were found.

    Returns:
        The report.

    Raises:
        ValueError: no layer matches, or none of ``modules_to_save`` does, or one of these holds parameters that cannot
            be trained. Nothing is changed.
        TypeError: ``model`` or ``config`` is something else.
    """
    return commit(model, config, plan_lora(model, config), fuse_projections=fuse_projections)


def commit(
    model: nn.Module,
    config: LoRAConfig,
    plan: Plan,
    lora_dtypes: Mapping[str, torch.dtype] | None = None,
    fuse_projections: bool = False,
) -> LoRAReport:
    """The second half of :func:`apply_lora`. ``lora_dtypes`` gives A and B of the layers it names another dtype."""
    was_trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        layers = {
            name: LoRALinear.from_linear(
                linear,
                r=config.rank_of(name),
                lora_alpha=config.alpha_of(name),
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
                lora_dtype=(lora_dtypes or {}).get(name, torch.float32),
            )
            for name, linear in plan.linears.items()
        }
    except BaseException:
        # Out of memory, most likely. The layers made so far have frozen what they share with the model.
        for parameter, flag in was_trainable.items():
            parameter.requires_grad_(flag)
        raise

    notes = list(plan.notes)
    for name, linear in plan.linears.items():
        if hooks := sum(len(getattr(linear, attribute)) for attribute in HOOKS):
            notes.append(f"{hooks} hook(s) of {name!r} were moved to the new layer")
    places = _swap(model, {linear: layers[name] for name, linear in plan.linears.items()})
    notes += [
        f"{n!r} is registered in {places[m]} places and stays one layer"
        for n, m in plan.linears.items()
        if places[m] > 1
    ]

    if kinds := Counter(
        type(layer.weight).__name__ for layer in layers.values() if isinstance(layer, LoRAQuantizedLinear)
    ):
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        notes.append(f"quantized weights ({counts}) stay as they are stored; these layers can't be merged")
    if kinds := Counter(_kind_of(layer.base_layer) for layer in layers.values() if isinstance(layer, LoRABranchLinear)):
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        notes.append(f"{counts} compute their own product, with the branch on it; these layers can't be merged")

    lora = {id(parameter) for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in lora:
            parameter.requires_grad_(config.bias == "all" and (name == "bias" or name.endswith(".bias")))
    for layer in lora_layers(model).values():
        if config.bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)
    for name, module in plan.saved.items():
        notes += [
            f"{key!r} was tied to a module outside modules_to_save and is a copy now"
            for key in _untie(model, name, module)
        ]
        module.requires_grad_(True)
    if fuse_projections:
        plain = {name: layer for name, layer in layers.items() if type(layer) is LoRALinear}
        notes.append(projection_group.fuse(model, plain, alike, compute_together))
    setattr(model, CONFIG_ATTRIBUTE, config)
    return report_on(model, layers, plan.skipped, tuple(notes))


def _kind_of(base: nn.Linear) -> str:
    return type(base).__name__ if type(base) is not nn.Linear else f"nn.Linear with {type(base.weight).__name__}"
