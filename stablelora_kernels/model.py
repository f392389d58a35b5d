"""LoRA on a whole model: ``apply_lora`` and its report, merging, and taking LoRA off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.nn import LoRALinear
from stablelora_kernels.plan import Plan, SkippedModule, list_some, plan_lora

# The attribute of a model that remembers the config its layers were made from; save_adapter writes it.
CONFIG_ATTRIBUTE = "_stablelora_config"

# What nn.Module.__call__ looks up.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True)
class ReplacedModule:
    """One layer that has a LoRA branch now. ``name`` is its first dotted name in the model."""

    name: str
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    scaling: float
    # PEFT's layers hold several, by name, and have a row for each.
    adapter: str | None = None


@dataclass(frozen=True)
class LoRAReport:
    """What was done to a model: every replaced module, every skipped match with its reason, and parameter counts.

    ``notes`` holds what else one might not expect, such as a pattern that matched nothing. ``print(report)`` sums up.
    """

    replaced: tuple[ReplacedModule, ...]
    skipped: tuple[SkippedModule, ...]
    trainable: int
    total: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.trainable / self.total if self.total else 0.0
        modules = len({module.name for module in self.replaced})
        lines = [f"LoRA on {modules} modules; {self.trainable:,} of {self.total:,} parameters train ({share:.2%})"]
        kinds = Counter(
            (m.name.rpartition(".")[2], m.in_features, m.out_features, m.r, m.lora_alpha, m.scaling, m.adapter)
            for m in self.replaced
        )
        for (name, k, n, r, alpha, scaling, adapter), count in kinds.items():
            named = "" if adapter is None else f", adapter {adapter!r}"
            lines.append(f"  {count} x {name}: {k} -> {n}, r {r}, alpha {alpha:g}, scaling {scaling:g}{named}")
        reasons: dict[str, list[str]] = {}
        for module in self.skipped:
            reasons.setdefault(module.reason, []).append(module.name)
        lines += [f"  skipped {list_some(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def apply_lora(model: nn.Module, config: LoRAConfig) -> LoRAReport:
    """Give every ``nn.Linear`` that ``config`` matches a LoRA branch, in place, and freeze every other parameter.

    The new layers share the old ones' weight, bias and hooks, are on their device and in their training mode; A and B
    are float32 (float64 beside a float64 weight). A layer registered in two places is matched by its first name and
    stays one layer in both. Trainable afterwards are A and B, the biases that ``config.bias`` asks for and the modules
    of ``config.modules_to_save``; one of these whose weight is tied to a module outside gets a copy, as in PEFT.

    Only plain ``nn.Linear`` layers are replaced. Anything else that matches (subclasses, quantised or sharded weights,
    other layer types, layers that have LoRA already, the output head under "all-linear", ...) is left as it was and
    named in the report.

    Returns:
        The report.

    Raises:
        ValueError: no layer matches, or none of ``modules_to_save`` does, or one of these holds parameters that cannot
            be trained. Nothing is changed.
        TypeError: ``model`` or ``config`` is something else.
    """
    return commit(model, config, plan_lora(model, config))


def commit(
    model: nn.Module, config: LoRAConfig, plan: Plan, lora_dtypes: Mapping[str, torch.dtype] | None = None
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
    setattr(model, CONFIG_ATTRIBUTE, config)
    return report_on(model, layers, plan.skipped, tuple(notes))


def report_on(
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    skipped: tuple[SkippedModule, ...] = (),
    notes: tuple[str, ...] = (),
) -> LoRAReport:
    """The report on a model whose ``layers`` have LoRA now."""
    replaced = tuple(
        ReplacedModule(name, layer.in_features, layer.out_features, layer.r, layer.lora_alpha, layer.scaling)
        for name, layer in layers.items()
    )
    return LoRAReport(replaced, skipped, *count_parameters(model), notes)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers train, and how many there are."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in parameters)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by their first dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(model: nn.Module) -> None:
    """Fold every LoRA branch into its layer's weight, in float32, for inference. Layers merged already stay so.

    The frozen weights are kept, so that :func:`unmerge_lora` is exact; that takes their memory once more.

    Raises:
        ValueError: the model has no LoRA layers, or a merged weight would not be finite. Nothing is changed.
    """
    done: list[LoRALinear] = []
    for name, layer in _some_lora_layers(model).items():
        if layer.merged:
            continue
        try:
            layer.merge()
        except BaseException as error:
            for merged in done:
                merged.unmerge()
            if isinstance(error, ValueError):
                raise ValueError(f"{name!r}: {error}") from None
            raise
        done.append(layer)


def unmerge_lora(model: nn.Module) -> None:
    """Undo :func:`merge_lora`, bit for bit. Layers that are not merged stay so.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    for layer in _some_lora_layers(model).values():
        if layer.merged:
            layer.unmerge()


def remove_lora(model: nn.Module, merge: bool = True) -> None:
    """Turn every LoRALinear of ``model`` back into an ``nn.Linear``, in place.

    With ``merge`` it holds the merged weight; without, the very Parameter that ``from_linear`` was given. Hooks and
    training mode go with it. Parameters stay frozen or trainable as they are.

    Raises:
        ValueError: the model has no LoRA layers or is itself one, or a merged weight would not be finite. Nothing is
            changed.
    """
    layers = _some_lora_layers(model)
    if "" in layers:
        raise ValueError(
            "model must be a module that contains LoRALinear layers, got a LoRALinear, which can't replace itself"
        )
    (merge_lora if merge else unmerge_lora)(model)
    plain: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = layer.weight
        linear.register_parameter("bias", layer.bias)
        plain[layer] = linear.train(layer.training)
    _swap(model, plain)
    if hasattr(model, CONFIG_ATTRIBUTE):
        delattr(model, CONFIG_ATTRIBUTE)


def _some_lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    if layers := lora_layers(model):
        return layers
    raise ValueError(
        f"model must have LoRALinear layers (apply_lora makes them), got a {type(model).__name__} without any"
    )


def _swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> Counter[nn.Module]:
    """Put ``new``'s values where its keys are, wherever these are registered, with their hooks. Counts the places."""
    places = [
        (parent, key, old) for parent in model.modules() for key, old in parent._modules.items() if old and old in new
    ]
    for old, module in new.items():
        # The dicts themselves, not copies: the handles that remove hooks hold on to them.
        for attribute in (*HOOKS, *_HOOK_FLAGS, "_is_full_backward_hook"):
            setattr(module, attribute, getattr(old, attribute))
    for parent, key, old in places:
        parent.register_module(key, new[old])
    return Counter(old for _, _, old in places)


def _untie(model: nn.Module, name: str, module: nn.Module) -> list[str]:
    """Give ``module`` its own copy of the parameters that modules outside it hold too; the names of these.

    Training a tied weight would train the frozen module it is tied to; and PEFT trains, saves and loads a copy.
    """
    inside = set(module.modules())
    outside = {
        id(p) for other in model.modules() if other not in inside for p in other._parameters.values() if p is not None
    }
    copies: dict[int, nn.Parameter] = {}
    untied = []
    for prefix, owner in module.named_modules(prefix=name):
        for key, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) in outside:
                copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))
                setattr(owner, key, copies[id(parameter)])
                untied.append(f"{prefix}.{key}")
    return untied
