"""``save_pretrained`` of a merged model, as of transformers: it writes the merged weights, as if LoRA had been removed.

It saves ``state_dict()``, which holds a merged layer's frozen weight beside A and B. A directory of those would load as the
model without LoRA, since transformers ignores A and B. A model with LoRA therefore gets a ``save_pretrained`` of its own, which
looks whether layers are merged when it is called.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.model.reports import list_some
from stablelora_kernels.nn.linear import LoRALinear

_METHOD = "save_pretrained"


class _SaveMerged:
    """``save_pretrained`` of one module, which it does not keep alive. Copies and pickles of the module save the copy."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        method = getattr(type(module), _METHOD)
        self.__doc__ = method.__doc__
        # Others look it up: diffusers' pipelines pass a part only the options that its method has.
        own = inspect.signature(method)
        self.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (module := self.module()) is None:
            raise ReferenceError(
                f"the model that this {_METHOD} saves is gone; call the method of a model that is there"
            )
        return _save_pretrained(module, *args, **kwargs)

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
    """Say in a transformers model's config that its head is not tied to its embeddings any more, if so.

    Otherwise loading would tie them again and lose what LoRA changed. Return the configs that were changed.
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
    configs = {id(config): config for config in (model.config, _text_config(model.config))}
    changed = [config for config in configs.values() if getattr(config, "tie_word_embeddings", False)]
    for config in changed:
        config.tie_word_embeddings = False
    return changed


def _text_config(config: Any) -> Any:
    find = getattr(config, "get_text_config", None)
    return find() if callable(find) else config


def _save_pretrained(module: Any, *args: Any, **kwargs: Any) -> Any:
    layers = lora_layers(module)
    merged = [name for name, layer in layers.items() if layer.merged]
    if not merged:
        return getattr(type(module), _METHOD)(module, *args, **kwargs)
    if unmerged := [name for name in layers if name not in merged]:
        raise ValueError(
            f"model must be merged whole or not at all to be saved, got {list_some(merged)} merged and {list_some(unmerged)} "
            "not merged; merge_lora or unmerge_lora it"
        )
    given = inspect.signature(getattr(type(module), _METHOD)).bind(module, *args, **kwargs)
    # A caller such as the Trainer passes the model's state_dict(), whose frozen weights are not to be written.
    given.arguments.pop("state_dict", None)
    args, kwargs = given.args[1:], given.kwargs
    with _plain_layers(module):
        untied = untie_in_config(module)
        try:
            return getattr(type(module), _METHOD)(module, *args, **kwargs)
        finally:
            for config in untied:
                config.tie_word_embeddings = True


@contextmanager
def _plain_layers(model: nn.Module) -> Iterator[None]:
    """Put plain layers in the places of merged ones during the body."""
    merged = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if isinstance(child, LoRALinear) and child.merged
    ]
    plain: dict[LoRALinear, Any] = {}
    try:
        for parent, key, layer in merged:
            if layer not in plain:
                plain[layer] = layer.to_linear()
            parent._modules[key] = plain[layer]
        yield
    finally:
        for parent, key, layer in merged:
            parent._modules[key] = layer
        for layer, base in plain.items():
            # It may be the layer's own base layer.
            base.weight = layer.frozen_weight
