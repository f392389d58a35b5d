"""LoRA on a whole model: ``apply_lora`` and its report, merging, and taking LoRA off again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from stablelora_kernels import sharing
from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.nn import LoRALinear, alike, compute_together
from stablelora_kernels.nn_bases import LoRABranchLinear
from stablelora_kernels.nn_merge import MergeError
from stablelora_kernels.nn_quantised import LoRAQuantisedLinear
from stablelora_kernels.plan import Plan, SkippedModule, list_some, plan_lora

# The attribute of a model that remembers the config its layers were made from; save_adapter writes it.
CONFIG_ATTRIBUTE = "_stablelora_config"

# What nn.Module.__call__ looks up.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True)
class ReplacedModule:
    """One layer that has a LoRA branch now.

    Attributes:
        name: its first dotted name in the model.
        in_features: K.
        out_features: N.
        r: the branch's rank.
        lora_alpha: the numerator of the scaling.
        scaling: what the branch is multiplied by.
        adapter: the adapter's name in a PEFT layer, which may hold several and has a row for each; None in this library's.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    scaling: float
    adapter: str | None = None


@dataclass(frozen=True)
class LoRAReport:
    """What was done to a model. ``print(report)`` sums up.

    Attributes:
        replaced: every layer that has a branch now.
        skipped: every match that was left as it was, with the reason.
        trainable: how many numbers train.
        total: how many numbers the model's parameters hold.
        notes: what else one might not expect, such as a pattern that matched nothing.
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


@dataclass(frozen=True)
class MergeReport:
    """What merging a model's layers rounded away, and which modules no longer share a layer's weight. ``print(report)`` sums up.

    Attributes:
        errors: the rounding error by the layer's name.
        untied: by the layer's name, the names of the parameters that were its weight before and are the frozen one still.
    """

    errors: Mapping[str, MergeError]
    untied: Mapping[str, tuple[str, ...]]

    @property
    def worst(self) -> str | None:
        """The name of the layer that lost the largest share of its change, or None where no layer was merged."""
        return max(self.errors, key=lambda name: self.errors[name].relative, default=None)

    def __str__(self) -> str:
        lines = [f"{len(self.errors)} modules merged"]
        if self.worst is not None:
            lines.append(f"  worst {self.worst}: {self.errors[self.worst]}")
        lines += [f"  {name}.weight is no longer tied to {list_some([*names])}" for name, names in self.untied.items()]
        return "\n".join(lines)


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
        type(layer.weight).__name__ for layer in layers.values() if isinstance(layer, LoRAQuantisedLinear)
    ):
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        notes.append(f"quantised weights ({counts}) stay as they are stored; these layers can't be merged")
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
        notes.append(sharing.fuse(model, plain, alike, compute_together))
    setattr(model, CONFIG_ATTRIBUTE, config)
    return report_on(model, layers, plan.skipped, tuple(notes))


def _kind_of(base: nn.Linear) -> str:
    return type(base).__name__ if type(base) is not nn.Linear else f"nn.Linear with {type(base.weight).__name__}"


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
    # Of 4 bits, elements and not the bytes that hold them.
    shapes = [getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape) for parameter in parameters]
    return trainable, sum(math.prod(shape) for shape in shapes)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by their first dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(model: nn.Module) -> MergeReport:
    """Fold every LoRA branch into its layer's weight, in float32, for inference. Layers merged already stay so.

    The frozen weights are kept, so that :func:`unmerge_lora` is exact; that takes their memory once more. A weight that other
    modules hold too (a tied embedding's, another layer's) is untied: they keep the frozen one.

    Returns:
        The rounding errors by layer, those merged before included, and what was untied.

    Raises:
        ValueError: the model has no LoRA layers, or a merged weight would not be finite. Nothing is changed.
    """
    layers = _some_lora_layers(model)
    untied = _shared_weights(model, layers)
    done: list[LoRALinear] = []
    errors: dict[str, MergeError] = {}
    for name, layer in layers.items():
        if layer.merged:
            errors[name] = layer.merge_error()
            continue
        try:
            errors[name] = layer.merge()
        except BaseException as error:
            for merged in done:
                merged.unmerge()
            if isinstance(error, ValueError):
                raise ValueError(f"{name!r}: {error}") from None
            raise
        done.append(layer)
    return MergeReport(errors, untied)


def unmerge_lora(model: nn.Module) -> None:
    """Undo :func:`merge_lora`, bit for bit. Layers that are not merged stay so.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    for layer in _some_lora_layers(model).values():
        if layer.merged:
            layer.unmerge()


def remove_lora(model: nn.Module, merge: bool = True) -> MergeReport:
    """Turn every LoRALinear of ``model`` back into a layer of the kind that it was made of, in place.

    With ``merge`` it holds the merged weight; without, the very Parameter that ``from_linear`` was given. Hooks and
    training mode go with it. Parameters stay frozen or trainable as they are.

    Returns:
        What :func:`merge_lora` returns; empty without ``merge``.

    Raises:
        ValueError: the model has no LoRA layers or is itself one, or a merged weight would not be finite. Nothing is
            changed.
    """
    layers = _some_lora_layers(model)
    if "" in layers:
        raise ValueError(
            "model must be a module that contains LoRALinear layers, got a LoRALinear, which can't replace itself"
        )
    report = MergeReport({}, {})
    if merge:
        report = merge_lora(model)
    else:
        unmerge_lora(model)
    plain: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        plain[layer] = layer.to_linear()
    _swap(model, plain)
    if hasattr(model, CONFIG_ATTRIBUTE):
        delattr(model, CONFIG_ATTRIBUTE)
    return report


def _shared_weights(model: nn.Module, layers: Mapping[str, LoRALinear]) -> dict[str, tuple[str, ...]]:
    """By the name of a layer whose frozen weight is registered elsewhere too, the names of the other parameters."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        parameters = module._parameters | ({"weight": module.frozen_weight} if isinstance(module, LoRALinear) else {})
        for key, parameter in parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, f"{prefix}.{key}" if prefix else key))
    shared = {
        name: tuple(path for module, path in holders[id(layer.frozen_weight)] if module is not layer)
        for name, layer in layers.items()
    }
    return {name: others for name, others in shared.items() if others}


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
        # The dicts themselves, not copies: the handles that remove hooks hold on to them. The old module may be called yet,
        # by the one around it.
        for attribute in (*HOOKS, *_HOOK_FLAGS, "_is_full_backward_hook"):
            hooks = getattr(old, attribute)
            setattr(module, attribute, hooks)
            setattr(old, attribute, None if attribute == "_is_full_backward_hook" else type(hooks)())
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
