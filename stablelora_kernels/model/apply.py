"""``apply_lora``: put LoRA on a whole model. A plan comes first: which layers are replaced, which
are skipped, and why.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from stablelora_kernels.config import LoRAConfig, unmatched_names, unmatched_patterns
from stablelora_kernels.model.merge import save_merged_layers_plain
from stablelora_kernels.model.modules import (
    CONFIG_ATTRIBUTE,
    lora_layers,
    replace_modules,
    saved_modules,
    unchanged_on_error,
    untie,
)
from stablelora_kernels.model.peft_format import config_from_peft
from stablelora_kernels.model.reports import (
    LoRAReport,
    SkippedModule,
    count_parameters,
    list_some,
    notes_on_gradients,
    notes_on_heads,
    notes_on_mlps,
    rows_of,
    stacks_without_adapter,
)
from stablelora_kernels.nn.experts import (
    LoRAExperts,
    LoRAStack,
    StackedWeight,
    reason_parameter_gets_no_lora,
)
from stablelora_kernels.nn.factory import is_conv1d, replacement_class
from stablelora_kernels.nn.fused_mlp import GatedMLP, fuse_mlps
from stablelora_kernels.nn.linear import LoRABranchLinear, LoRALinear, make_layer
from stablelora_kernels.nn.operands import OWN_LAYERS
from stablelora_kernels.nn.projection_group import make_projection_groups
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.utils.modules import HOOKS, check_module, check_not_in_ddp, clean
from stablelora_kernels.utils.tensors import is_sharded
from stablelora_kernels.utils.validation import counted


def apply_lora(
    model: nn.Module,
    config: LoRAConfig | Any,
    *,
    fuse_projections: bool = False,
    fuse_mlp: bool = False,
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
            ``fuse_mlp`` goes before ``fuse_projections``.

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
        report = apply_plan(model, plan, {}, fuse_projections, fuse_mlp)
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
) -> LoRAReport:
    """The second half of :func:`apply_lora`. ``lora_dtypes`` gives the dtype of A and B by layer
    name, float32 unless given.

    Whoever calls it puts the model back if it raises.
    """
    config, layers, notes = plan.config, {}, list(plan.notes)
    settings = config.lora_dropout, config.use_rslora, config.init_lora_weights
    new: dict[nn.Module, nn.Module] = {}
    for name, (base, layer_class) in plan.targets.items():
        dtype = lora_dtypes.get(name, torch.float32)
        layer = make_layer(
            layer_class, base, config.rank_of(name), config.alpha_of(name), *settings, dtype
        )
        layers[name] = layer
        if isinstance(base, StackedWeight):
            new.setdefault(base.experts, LoRAExperts(base.experts)).register_module(
                base.name, layer
            )
        else:
            new[base] = layer
    names = {base: name for name, base in model.named_modules() if base in new}
    for base, name in names.items():
        if hooks := sum(len(getattr(base, attribute)) for attribute in HOOKS):
            notes.append(f"{counted(hooks, 'hook')} of {name!r} moved to the new layer")
    for base, count in replace_modules(model, new).items():
        if count > 1:
            notes.append(f"{names[base]!r} is registered in {count} places and stays one layer")
    notes += _notes_on_kinds(layers.values())

    adapted = lora_layers(model).values()
    lora = {parameter for layer in adapted for parameter in (layer.lora_A, layer.lora_B)}
    biases = {layer.bias for layer in adapted} if config.bias == "lora_only" else set()
    for name, parameter in model.named_parameters():
        if parameter not in lora:
            is_bias = config.bias == "all" and name.rpartition(".")[2] == "bias"
            # An assignment, not requires_grad_(), which a lazy module's parameters do not have.
            parameter.requires_grad = is_bias or parameter in biases
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
    notes += notes_on_gradients(model) + notes_on_heads(model)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return LoRAReport(rows_of(layers), plan.skipped, *count_parameters(model), tuple(notes), mlps)


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
    quantized, branches = Counter[str](), Counter[str]()
    for layer in layers:
        if isinstance(layer, LoRAQuantizedLinear):
            quantized[type(layer.weight).__name__] += 1
        elif isinstance(layer, LoRABranchLinear):
            base = type(layer.base_layer)
            branches[
                base.__name__
                if base is not nn.Linear
                else f"nn.Linear with {type(layer.weight).__name__}"
            ] += 1
    texts = (
        "quantized weights ({}) stay as they are stored",
        "{} compute their own product, with the branch on it",
    )
    return [
        text.format(", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        + "; these layers can't be merged"
        for text, kinds in zip(texts, (quantized, branches), strict=True)
        if kinds
    ]


class LoRAPlan(NamedTuple):
    """The changes that :func:`~stablelora_kernels.apply_lora` will make, by dotted name."""

    config: LoRAConfig
    # A layer to replace, or a stack of experts, and the class of the new layer.
    targets: dict[str, tuple[Any, type[LoRALinear]]]
    skipped: tuple[SkippedModule, ...]
    modules_to_save: dict[str, nn.Module]
    notes: tuple[str, ...]
    # A message on names of target_modules and target_parameters that match nothing, or an empty
    # one.
    unmatched: str = ""


def plan_lora(model: nn.Module, config: LoRAConfig) -> LoRAPlan:
    """The first half of :func:`~stablelora_kernels.apply_lora`: match and check everything, change
    nothing.
    """
    check_module(model)
    if not isinstance(config, LoRAConfig):
        raise TypeError(
            f"config must be a LoRAConfig, got {type(config).__name__}; PEFT's LoraConfig will do, too"
        )
    check_not_in_ddp(model)
    targets: dict[str, tuple[Any, type[LoRALinear]]] = {}
    skipped: list[SkippedModule] = []
    names: dict[nn.Module, str] = {}
    heads = _output_heads(model) if config.all_linear else {}
    named = list(model.named_modules(remove_duplicate=False))
    for name, module in named:
        first = names.setdefault(module, name)
        if (
            not name
            or not config.targets(name)
            or (config.all_linear and not _looks_linear(module))
        ):
            continue
        if first != name:
            if not config.targets(first):
                skipped.append(
                    SkippedModule(name, f"it is the same module as {first!r}, which is not matched")
                )
            continue
        reason = (
            config.reason_to_exclude(name)
            or heads.get(module)
            or _reason_by_position(model, name, module)
        )
        if reason is not None:
            skipped.append(SkippedModule(name, reason))
            continue
        try:
            targets[name] = module, replacement_class(module)
        except (TypeError, ValueError) as error:
            skipped.append(SkippedModule(name, str(error)))
    _add_stacks(model, config, targets, skipped)
    if config.all_linear:
        adapted = {
            target.weight for target, _ in targets.values() if isinstance(target, StackedWeight)
        }
        skipped += [
            SkippedModule(name, config.reason_to_exclude(name) or reason)
            for name, reason in stacks_without_adapter(model, adapted).items()
        ]
    if not targets:
        raise ValueError(_nothing_matched(named, config, skipped))

    saved = saved_modules(model, config)
    asked = [end for end in config.modules_to_save or () if end not in config.heads_of_task]
    if asked and not saved:
        raise ValueError(
            f"modules_to_save must name modules of the model, got {config.modules_to_save}, which match nothing"
        )
    for name, module in saved.items():
        for key, parameter in module.named_parameters(prefix=name):
            if is_lazy(parameter):
                raise ValueError(
                    f"modules_to_save names {name!r}, but {key!r} has no shape before its first forward"
                )
            if not parameter.is_floating_point():
                raise ValueError(
                    f"modules_to_save names {name!r}, but {key!r} holds {parameter.dtype}, which cannot be trained"
                )

    missed = [end for end in asked if not any(name.endswith(end) for name in saved)]
    every_unmatched = [
        unmatched_names(config.target_modules, (name for name, _ in named)),
        unmatched_names(
            config.target_parameters,
            (name for name, _ in model.named_parameters()),
            "target_parameters",
        ),
    ]
    unmatched = ", and ".join(filter(None, every_unmatched))
    notes = [unmatched] if unmatched else []
    notes += [f"modules_to_save {end!r} matches nothing" for end in missed]
    if heads_of_task := [name for name in saved if name.endswith(config.heads_of_task)]:
        notes.append(
            f"{list_some(heads_of_task)} trained whole, as PEFT does for task_type {config.task_type!r}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        notes += [
            f"{field} {key!r} matches nothing"
            for key in unmatched_patterns(getattr(config, field), targets)
        ]
    if config.exclude_modules and not any(
        module.reason.startswith("exclude_modules") for module in skipped
    ):
        notes.append(
            f"exclude_modules {config.exclude_modules!r} matches nothing that target_modules does"
        )
    transposed = [name for name, (layer, _) in targets.items() if is_conv1d(layer)]
    others = [
        name
        for name, (_, kind) in targets.items()
        if name not in transposed and kind is not LoRAStack
    ]
    if config.fan_in_fan_out and others:
        notes.append(
            f"fan_in_fan_out is True, but {list_some(others)} hold [out, in], and are taken so"
        )
    if not config.fan_in_fan_out and transposed:
        notes.append(
            f"fan_in_fan_out is False, but {list_some(transposed)} hold [in, out], and are taken so"
        )
    return LoRAPlan(config, targets, tuple(skipped), saved, tuple(notes), unmatched)


def _add_stacks(
    model: nn.Module,
    config: LoRAConfig,
    targets: dict[str, tuple[Any, type[LoRALinear]]],
    skipped: list[SkippedModule],
) -> None:
    """Add the stacks of experts that ``target_parameters`` matches."""
    for prefix, module in model.named_modules():
        # PEFT nests its modules in the order of the parameters.
        names = [
            name
            for name in module._parameters
            if prefix and config.targets_parameter(f"{prefix}.{name}")
        ]
        for depth, name in zip(reversed(range(len(names))), names, strict=True):
            reason = config.reason_to_train_whole(prefix)
            reason = reason or reason_parameter_gets_no_lora(module, name)
            if reason is None:
                targets[f"{prefix}.{name}"] = StackedWeight(module, name, depth), LoRAStack
            else:
                skipped.append(SkippedModule(prefix, reason))


def _looks_linear(module: nn.Module) -> bool:
    """Whether "all-linear" must either replace a module or report why not."""
    kind = type(module).__name__
    return isinstance(module, (nn.Linear, LoRALinear)) or (
        hasattr(module, "weight") and ("Linear" in kind or kind == "Conv1D")
    )


def _output_heads(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that "all-linear" leaves out, with their reasons."""
    heads: dict[nn.Module, str] = {}
    embeddings = {
        m.weight: name for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    for module in model.modules():
        if type(module) is nn.Linear and module.weight in embeddings:
            heads[module] = (
                f'its weight is tied to {embeddings[module.weight]!r}, so "all-linear" leaves it out'
            )
        # transformers' models have this method. The model may contain one.
        if callable(find := getattr(module, "get_output_embeddings", None)):
            try:
                head = find()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(head, nn.Module):
                heads[head] = 'it is the output head, which "all-linear" leaves out'
    return heads


def _reason_by_position(model: nn.Module, name: str, module: Any) -> str | None:
    """Why a matched module cannot be replaced in this model, or None. The factory knows the reasons
    in the module itself.
    """
    if isinstance(module, LoRALinear):
        return "it is a LoRALinear already"
    path = name.split(".")
    parents = [model.get_submodule(".".join(path[:i])) for i in range(len(path))]
    if isinstance(parents[-1], LoRALinear):
        return "it is the base layer of a LoRALinear"
    if any("base_layer" in parent._modules for parent in [*parents, module]):
        return _OF_PEFT
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return None
    if isinstance(parents[-1], nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight instead of calling it in inference"
    if is_sharded(module.weight) and any(map(_is_fully_sharded, parents)):
        return "fully_shard has cut its weight, and would not cut A and B; apply LoRA before it"
    return None


def _is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) has sharded ``module``."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


_OF_PEFT = "it is part of a PEFT layer; accelerate_peft runs those"


def _nothing_matched(
    named: list[tuple[str, nn.Module]], config: LoRAConfig, skipped: list[SkippedModule]
) -> str:
    if any(module.reason == _OF_PEFT for module in skipped):
        # A list of the skipped layers and of the model's linear layers would bury that.
        return (
            f"target_modules {config.target_modules!r} matches no layer but PEFT's, which have LoRA already: "
            "slk.accelerate_peft(model) runs them on these kernels"
        )
    text = f"target_modules must match an nn.Linear of the model, got {config.target_modules!r}, which matches none"
    if config.target_parameters:
        text += (
            f"; nor does target_parameters {config.target_parameters!r} match a stack of experts"
        )
    if skipped:
        text += f"; skipped {list_some([f'{module.name} ({module.reason})' for module in skipped])}"
    elif isinstance(config.target_modules, str):
        text += "; a string is a regular expression for the whole dotted name, a list holds ends of names"
    candidates = [
        repr(name)
        for name, module in named
        if name and (type(module) is nn.Linear or is_conv1d(module))
    ]
    return text + f". Its linear layers: {list_some(candidates) or 'none'}"
