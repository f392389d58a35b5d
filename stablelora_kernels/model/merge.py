"""Merge, unmerge and remove the LoRA layers of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from stablelora_kernels.model.modules import CONFIG_ATTRIBUTE, _some_lora_layers, _swap
from stablelora_kernels.model.reports import MergeReport
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.merging import MergeError


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
