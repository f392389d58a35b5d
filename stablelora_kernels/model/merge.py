"""Disable, merge, unmerge and remove the LoRA layers of a model, and save a merged one by
transformers' ``save_pretrained``.

That writes the merged weights, as if LoRA had been removed. It saves ``state_dict()``, which holds
a merged layer's frozen weight beside A and B. A directory of those would load as the model without
LoRA, since transformers ignores A and B. A model with LoRA therefore gets a ``save_pretrained`` of
its own, which looks whether layers are merged when it is called.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from stablelora_kernels.model.modules import (
    CONFIG_ATTRIBUTE,
    lora_layers,
    parameter_owners,
    plain_modules,
    registrations,
    replace_modules,
    require_lora_layers,
    unchanged_on_error,
)
from stablelora_kernels.model.reports import MergeReport, list_some
from stablelora_kernels.nn.fused_loss import unfuse_losses
from stablelora_kernels.nn.fused_mlp import unfuse_mlps
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.merging import MergeError
from stablelora_kernels.nn.projection_group import remove_projection_groups
from stablelora_kernels.utils.modules import check_module

_METHOD = "save_pretrained"
# The number of open blocks of each module that they have disabled.
_blocks: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
# The attributes that disable a layer of this library, and one of PEFT's or its wrapper around
# modules_to_save.
_OURS, _PEFTS = "_disabled", "_disable_adapters"


def merge_lora(model: nn.Module) -> MergeReport:
    """Merge every LoRA branch into its layer's weight, in float32, for inference. Merged layers
    stay merged.

    The frozen weights are kept, so :func:`unmerge_lora` is exact; they take their memory a second
    time. A weight that other modules share, such as a tied embedding's, is untied: the other
    modules keep the frozen one. ``state_dict()`` holds the frozen weights beside A and B.
    ``save_pretrained`` of ``model``, a transformers model, and of its parts writes the merged
    weights alone; that of a model around it does not know of them.

    Returns:
        The rounding error of every merged layer, and the weights that were untied.

    Raises:
        ValueError: the model has no LoRA layers, or a merged weight would not be finite. Nothing is
            changed then.
    """
    layers = require_lora_layers(model, of_peft="model.merge_adapter()")
    owners = parameter_owners(model)
    shared = {
        name: tuple(
            path
            for owner, path in owners[layer.frozen_weight]
            if owner not in (layer, layer.holder)
        )
        for name, layer in layers.items()
    }
    errors: dict[str, MergeError] = {}
    with unchanged_on_error(model):
        for name, layer in layers.items():
            try:
                errors[name] = layer.merge_error() if layer.merged else layer.merge()
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
    save_merged_layers_plain(model)
    return MergeReport(errors, {name: others for name, others in shared.items() if others})


def unmerge_lora(model: nn.Module) -> None:
    """Undo :func:`merge_lora` bit for bit. Unmerged layers stay unmerged.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    for layer in require_lora_layers(model, of_peft="model.unmerge_adapter()").values():
        if layer.merged:
            layer.unmerge()


def remove_lora(model: nn.Module, merge: bool = True) -> MergeReport:
    """Turn every LoRALinear of ``model`` back into a layer of its original kind, in place.

    With ``merge`` the layer holds the merged weight; without, the Parameter that ``from_linear``
    was given. Hooks and training mode are kept, and fused MLPs and models with a fused loss get their class back. Parameters
    stay frozen or trainable as they are. If the merged output head is no longer tied to the
    embedding, a transformers model's config says so from then on.

    Returns:
        The report of :func:`merge_lora`; an empty one without ``merge``.

    Raises:
        ValueError: the model has no LoRA layers or is itself one, or a merged weight would not be
            finite. Nothing is changed then.
    """
    of_peft = "model.merge_and_unload(), or model.unload() to drop the adapter,"
    layers = require_lora_layers(model, not_alone="can't replace itself", of_peft=of_peft)
    report = MergeReport({}, {})
    if merge:
        report = merge_lora(model)
    else:
        unmerge_lora(model)
    unfuse_mlps(model.modules())
    unfuse_losses(model.modules())
    remove_projection_groups(layers.values())
    replace_modules(model, plain_modules(model))
    save_as_before(model)
    if report.untied:
        for module in model.modules():
            untie_in_config(module)
    if hasattr(model, CONFIG_ATTRIBUTE):
        delattr(model, CONFIG_ATTRIBUTE)
    return report


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Compute without LoRA in the body of a ``with`` statement: the model gives its base model's
    output.

    A reference model for DPO or GRPO then needs no second copy of the weights::

        policy = model(**batch).logits
        with torch.no_grad(), slk.disable_lora(model):
            reference = model(**batch).logits

    Each of this library's layers computes its frozen layer's product, to the bit, merged or not; A
    and B get no gradient. In a PEFT model, accelerated or not, all adapters of all layers are off
    and ``modules_to_save`` are their originals, as in PEFT's ``disable_adapter``. Unlike there,
    parameters keep their ``requires_grad``. PEFT unmerges a merged layer at its first call.

    Blocks may be nested, may overlap, and may be opened on a part of the model. The model is as
    before when the last one ends, by an exception too, also in the ``requires_grad`` of PEFT's
    parameters. A block is in force in all threads that call the model, but not in copies of this
    library's layers; copies of PEFT's layers made in a block stay disabled. A compiled model is
    compiled once more, for the block; a block inside compiled code breaks its graph.

    Call ``backward`` of a checkpointed forward on the same side of the block as the forward, since
    it computes the forward again. Otherwise non-reentrant checkpointing mostly raises
    ``CheckpointError``, but reentrant checkpointing silently computes the other forward: with LoRA
    after the block, or, for a forward before the block, without gradients of A and B. Under
    ``torch.no_grad()`` nothing is recomputed.

    Args:
        model: any module with this library's LoRA layers or PEFT's, in any wrapper; or one such
            layer.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no LoRA layers; or ``apply_lora`` was told to train
            ``modules_to_save`` or biases, or PEFT to train biases, whose base values are not kept.
            A part of the model is checked by its own layers' biases alone.
    """
    switches = _switches(model)
    trainable = {p: p.requires_grad for m, key in switches if key != _OURS for p in m.parameters()}
    with _lock:
        opened = [
            (module, key)
            for module, key in switches
            if module in _blocks or not module.__dict__.get(key)
        ]
        for module, key in opened:
            _blocks[module] = _blocks.get(module, 0) + 1
            module.__dict__[key] = True
    try:
        yield
    finally:
        with _lock:
            for module, key in opened:
                _blocks[module] -= 1
                if not _blocks[module]:
                    del _blocks[module]
                    module.__dict__[key] = False
        # PEFT's disable_adapter in the body may have left them frozen.
        for parameter, flag in trainable.items():
            parameter.requires_grad = flag


def _switches(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of ``model`` to disable, each with the attribute that does it."""
    check_module(model)
    switches: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            switches.append((module, _OURS))
        elif _PEFTS in vars(module) or hasattr(type(module), _PEFTS):
            switches.append((module, _PEFTS))
        if lost := _trained_in_place(module):
            raise ValueError(
                f"model must keep what its base model computes, got {lost}, which is trained in place: disable_lora could not "
                "give the base model's output. Use a copy of the base model as the reference"
            )
    if not switches:
        raise ValueError(
            f"model must have LoRALinear layers or PEFT's, got a {type(model).__name__} without any"
        )
    return switches


def _trained_in_place(module: nn.Module) -> str | None:
    """The setting, such as "bias='all'", by which a model trains more than A and B and keeps no
    original of it.
    """
    if isinstance(module, LoRALinear) and module.bias is not None and module.bias.requires_grad:
        return "a bias that trains"
    config: Any = module.__dict__.get(CONFIG_ATTRIBUTE)
    if config is not None and config.modules_to_save:
        return f"modules_to_save={config.modules_to_save}"
    pefts = module.__dict__.get("peft_config")
    for item in (config, *(pefts.values() if isinstance(pefts, dict) else ())):
        if (bias := getattr(item, "bias", "none")) not in (None, "none"):
            return f"bias={bias!r}"
    return None


class _SaveMerged:
    """``save_pretrained`` of one module, which it does not keep alive. Copies and pickles of the
    module save the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        method = getattr(type(module), _METHOD)
        self.__doc__ = method.__doc__
        # Others look it up: diffusers' pipelines pass a part only the options that its method has.
        signature = inspect.signature(method)
        without_self = list(signature.parameters.values())[1:]
        self.__signature__ = signature.replace(parameters=without_self)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        module: Any = self.module()
        if module is None:
            raise ReferenceError(
                f"the model that this {_METHOD} saves is gone; call the method of a model that is there"
            )
        save = getattr(type(module), _METHOD)
        layers = lora_layers(module)
        merged = [name for name, layer in layers.items() if layer.merged]
        if not merged:
            return save(module, *args, **kwargs)
        if unmerged := [name for name in layers if name not in merged]:
            raise ValueError(
                f"model must be merged whole or not at all to be saved, got {list_some(merged)} merged and "
                f"{list_some(unmerged)} not merged; merge_lora or unmerge_lora it"
            )
        call = inspect.signature(save).bind(module, *args, **kwargs)
        # A caller such as the Trainer passes the model's state_dict(), whose frozen weights are not
        # to be written.
        call.arguments.pop("state_dict", None)
        plain = plain_modules(module)
        places = registrations(module, plain)
        untied = []
        try:
            for parent, key, layer in places:
                parent._modules[key] = plain[layer]
            untied = untie_in_config(module)
            return save(*call.args, **call.kwargs)
        finally:
            for parent, key, layer in places:
                parent._modules[key] = layer
            for layer, base in plain.items():
                if isinstance(layer, LoRALinear):
                    # It may be the layer's own base layer.
                    base.weight = layer.frozen_weight
            for config in untied:
                config.tie_word_embeddings = True

    def __deepcopy__(self, memo: dict[int, Any]) -> _SaveMerged:
        module: Any = self.module()
        return _SaveMerged(memo.get(id(module), module))

    def __reduce__(self) -> Any:
        return _SaveMerged, (self.module(),)


def save_merged_layers_plain(model: nn.Module) -> None:
    """Make ``save_pretrained`` of ``model`` and its parts write merged layers as plain ones."""
    for module in model.modules():
        if callable(getattr(type(module), _METHOD, None)) and _METHOD not in module.__dict__:
            module.__dict__[_METHOD] = _SaveMerged(module)


def save_as_before(model: nn.Module) -> None:
    """Undo :func:`save_merged_layers_plain`."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_METHOD), _SaveMerged):
            del module.__dict__[_METHOD]


def untie_in_config(model: Any) -> list[Any]:
    """Say in a transformers model's config that its head is not tied to its embeddings any more, if
    so.

    Otherwise loading would tie them again and lose what LoRA changed. Return the configs that were
    changed.
    """
    if not callable(getattr(model, "get_input_embeddings", None)) or not hasattr(model, "config"):
        return []
    try:
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    weight = getattr(head, "weight", None)
    if weight is None or weight is getattr(embeddings, "weight", None):
        return []
    find = getattr(model.config, "get_text_config", None)
    configs = {
        id(config): config for config in (model.config, find() if callable(find) else model.config)
    }
    changed = [
        config for config in configs.values() if getattr(config, "tie_word_embeddings", False)
    ]
    for config in changed:
        config.tie_word_embeddings = False
    return changed
