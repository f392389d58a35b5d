"""Merge, unmerge and remove the LoRA layers of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from stablelora_kernels.model.merged_saving import save_as_before, save_merged_layers_plain, untie_in_config
from stablelora_kernels.model.modules import CONFIG_ATTRIBUTE, replace_modules, require_lora_layers
from stablelora_kernels.model.reports import MergeReport
from stablelora_kernels.nn.fused_mlp import unfuse_mlps
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.merging import MergeError
from stablelora_kernels.nn.projection_group import remove_projection_groups


def merge_lora(model: nn.Module) -> MergeReport:
    """Merge every LoRA branch into its layer's weight, in float32, for inference. Merged layers stay merged.

    The frozen weights are kept, so :func:`unmerge_lora` is exact; they take their memory a second time. A weight that other
    modules share, such as a tied embedding's, is untied: the other modules keep the frozen one. ``state_dict()`` holds the
    frozen weights beside A and B. ``save_pretrained`` of ``model``, a transformers model, and of its parts writes the merged
    weights alone; that of a model around it does not know of them.

    Returns:
        The rounding error of every merged layer, and the weights that were untied.

    Raises:
        ValueError: the model has no LoRA layers, or a merged weight would not be finite. Nothing is changed then.
    """
    layers = require_lora_layers(model)
    untied = _shared_weights(model, layers)
    merged: list[LoRALinear] = []
    errors: dict[str, MergeError] = {}
    name = ""
    try:
        for name, layer in layers.items():
            if layer.merged:
                errors[name] = layer.merge_error()
            else:
                merged.append(layer)
                errors[name] = layer.merge()
    except BaseException as error:
        for layer in merged:
            # The last one is merged if its rounding error could not be measured.
            if layer.merged:
                layer.unmerge()
        if isinstance(error, ValueError):
            raise ValueError(f"{name!r}: {error}") from None
        raise
    save_merged_layers_plain(model)
    return MergeReport(errors, untied)


def unmerge_lora(model: nn.Module) -> None:
    """Undo :func:`merge_lora` bit for bit. Unmerged layers stay unmerged.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    for layer in require_lora_layers(model).values():
        if layer.merged:
            layer.unmerge()


def remove_lora(model: nn.Module, merge: bool = True) -> MergeReport:
    """Turn every LoRALinear of ``model`` back into a layer of its original kind, in place.

    With ``merge`` the layer holds the merged weight; without, the Parameter that ``from_linear`` was given. Hooks and training
    mode are kept, and fused MLPs get their class back. Parameters stay frozen or trainable as they are. If the merged output
    head is no longer tied to the embedding, a transformers model's config says so from then on.

    Returns:
        The report of :func:`merge_lora`; an empty one without ``merge``.

    Raises:
        ValueError: the model has no LoRA layers or is itself one, or a merged weight would not be finite. Nothing is changed
            then.
    """
    layers = require_lora_layers(model)
    if "" in layers:
        raise ValueError(
            "model must be a module that contains LoRALinear layers, got a LoRALinear, which can't replace itself"
        )
    report = MergeReport({}, {})
    if merge:
        report = merge_lora(model)
    else:
        unmerge_lora(model)
    unfuse_mlps(model.modules())
    remove_projection_groups(layers.values())
    replace_modules(model, {layer: layer.to_linear() for layer in layers.values()})
    save_as_before(model)
    if report.untied:
        for module in model.modules():
            untie_in_config(module)
    if hasattr(model, CONFIG_ATTRIBUTE):
        delattr(model, CONFIG_ATTRIBUTE)
    return report


def _shared_weights(model: nn.Module, layers: Mapping[str, LoRALinear]) -> dict[str, tuple[str, ...]]:
    """For each layer that shares its frozen weight, by its name, the other names of that parameter."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        parameters = module._parameters | ({"weight": module.frozen_weight} if isinstance(module, LoRALinear) else {})
        for key, parameter in parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, f"{prefix}.{key}" if prefix else key))
    shared = {
        name: tuple(path for owner, path in owners[id(layer.frozen_weight)] if owner is not layer)
        for name, layer in layers.items()
    }
    return {name: others for name, others in shared.items() if others}
