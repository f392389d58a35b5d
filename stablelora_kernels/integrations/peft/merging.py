"""PEFT's ``merge`` and ``unmerge``, with the base weights given back to the bit.

PEFT adds a product to the weight and subtracts it later, and each of the two rounds. Here a layer
keeps a copy of what the first merge changes, in the host's memory. ``unmerge`` runs PEFT's and then
writes the copy back, unless another has written to the weight meanwhile. Merged weights are PEFT's
own. Importing needs no peft.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from stablelora_kernels.nn.take_over import TakesOver, give_back, own_class, take_over

# The keys of a layer's __dict__: what it keeps while it is merged, by the name of the base layer's
# parameter; and, while its merge runs, that it does.
_KEPT, _IS_MERGING = "_stablelora_kept", "_stablelora_is_merging"
# By the bytes of an element.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORD = 8


@dataclass(eq=False)
class KeptWeight:
    """The bits of a base layer's parameter from before the first merge.

    Layers that share a parameter share this, too.
    """

    before: Tensor
    # Of the merged parameter, as PEFT has left it.
    sums: tuple[Tensor, ...] = ()
    # How many layers are merged into the parameter.
    layers: int = 0
    # Whether another has written to the merged parameter.
    is_lost: bool = False

    def is_intact(self, parameter: Tensor | None) -> bool:
        """Whether ``parameter`` is as the last merge left it."""
        if self.is_lost or parameter is None:
            return False
        sums = _sums(parameter)
        return all(map(torch.equal, sums, self.sums))

    def write_to(self, parameter: Tensor) -> None:
        """Give ``parameter`` its bits back, in place as PEFT's unmerge does."""
        if (parameter.dtype, parameter.shape) == (self.before.dtype, self.before.shape):
            parameter.data.copy_(self.before)
        else:
            parameter.data = self.before.to(parameter.device)


# What parameters are kept, for layers that share one. The layers own it.
_kept_of = WeakTensorKeyDictionary()


class KeepsBase(TakesOver):
    """A mixin in front of a PEFT class whose ``unmerge`` gives the base layer back to the bit."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, of which :meth:`unmerge` leaves nothing.

        If it raises, no adapter that it has not merged is left in the weights.
        """
        if _IS_MERGING in self.__dict__ or not merges_some(self, adapter_names):
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        _keep(self)
        # A variant of LoRA takes merged adapters out and in again to read the unmerged weight. This
        # must round as PEFT does, or the merged weights would not be PEFT's.
        self.__dict__[_IS_MERGING] = True
        try:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        finally:
            del self.__dict__[_IS_MERGING]
            _note_merged(self)

    def unmerge(self: Any) -> None:
        """PEFT's, and then the bits from before the merge.

        It warns where another has written to the weight since the merge: PEFT's subtraction stands.
        """
        kept: dict[str, KeptWeight] | None = self.__dict__.get(_KEPT)
        if kept is None or _IS_MERGING in self.__dict__:
            super().unmerge()  # type: ignore[misc]
            return
        parameters = _parameters_merged_into(self)
        intact = {name for name in kept if kept[name].is_intact(parameters.get(name))}
        super().unmerge()  # type: ignore[misc]
        del self.__dict__[_KEPT]
        for name, weight in kept.items():
            weight.layers -= 1
            if name not in intact:
                weight.is_lost = True
                warnings.warn(
                    f"the {name} of a merged {type(self).__name__} was written to after merge(), so unmerge() subtracts the "
                    "adapters as PEFT does, with rounding errors",
                    UserWarning,
                    stacklevel=2,
                )
            elif weight.layers:
                weight.sums = _sums(parameters[name])
            else:
                weight.write_to(parameters[name])

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(), .half() and the like must also convert what unmerge() will give back.
        kept: dict[str, KeptWeight] = self.__dict__.get(_KEPT, {})
        parameters = _parameters_merged_into(self) if kept else {}
        intact = {name for name in kept if kept[name].is_intact(parameters.get(name))}
        super()._apply(fn, recurse)  # type: ignore[misc]
        parameters = _parameters_merged_into(self) if kept else {}
        for name in intact & parameters.keys():
            kept[name].before = fn(kept[name].before).cpu()
            kept[name].sums = _sums(parameters[name])
        return self


class KeepsBaseOnce(KeepsBase):
    """As :class:`KeepsBase`, until the layer is unmerged: of layers that ``restore_peft`` finds
    merged.
    """

    def unmerge(self: Any) -> None:
        super().unmerge()
        if not self.merged:
            give_back(self, KeepsBaseOnce)


def keep_base(layer: nn.Module) -> None:
    """Let a layer that PEFT's own forward computes give its base layer back to the bit."""
    if own_class(layer) is type(layer):
        take_over(layer, KeepsBase)


def let_go(layer: nn.Module) -> None:
    """Undo :func:`keep_base`, and what :func:`keep_until_unmerged` has left."""
    give_back(layer, KeepsBase)
    give_back(layer, KeepsBaseOnce)


def keep_until_unmerged(layer: nn.Module) -> None:
    """Let a layer with its own class give back what it keeps, if it is merged."""
    if _KEPT in layer.__dict__:
        take_over(layer, KeepsBaseOnce)


def merge_copy(layer: Any) -> None:
    """Merge the active adapters into the base layer of a PEFT layer's copy, which nothing unmerges:
    nothing is kept.
    """
    layer.__dict__[_IS_MERGING] = True
    layer.merge()


def merges_some(layer: Any, names: list[str] | None = None) -> bool:
    """Whether ``merge`` of a layer would merge an adapter."""
    held = {name for key in layer.adapter_layer_names for name in getattr(layer, key)}
    asked = layer.active_adapters if names is None else names
    return any(name in held and name not in layer.merged_adapters for name in asked)


def _parameters_merged_into(layer: Any) -> dict[str, nn.Parameter]:
    """The plain parameters of a layer's base layer that adapters are merged into, by name.

    Quantized and sharded ones are none: PEFT puts others in their places, or adds to shards.
    """
    base = layer.get_base_layer()
    # A wrapper of experts adapts one parameter.
    adapted = getattr(layer, "parameter_name", None)
    names = ("weight", "bias") if adapted is None else (adapted,)
    parameters = {name: base._parameters.get(name) for name in names}
    return {name: p for name, p in parameters.items() if type(p) is nn.Parameter and not p.is_meta}


def _keep(layer: Any) -> None:
    """Copy what a merge is going to change, if no adapter is merged yet."""
    parameters = _parameters_merged_into(layer)
    kept: dict[str, KeptWeight] | None = layer.__dict__.get(_KEPT)
    if kept is not None:
        for name, weight in kept.items():
            weight.is_lost = not weight.is_intact(parameters.get(name))
        return
    if layer.merged:
        # PEFT has merged it before it was accelerated.
        return
    kept = {}
    for name, parameter in parameters.items():
        reference: ref[KeptWeight] | None = _kept_of.get(parameter)
        shared = None if reference is None else reference()
        if shared is None or not shared.layers or not shared.is_intact(parameter):
            shared = KeptWeight(parameter.detach().to("cpu", copy=True))
            _kept_of[parameter] = ref(shared)
        shared.layers += 1
        kept[name] = shared
    layer.__dict__[_KEPT] = kept


def _note_merged(layer: Any) -> None:
    """Note how PEFT's merge has left the parameters; if it merged nothing, undo it."""
    kept: dict[str, KeptWeight] = layer.__dict__.get(_KEPT, {})
    parameters = _parameters_merged_into(layer)
    for name, weight in kept.items():
        weight.layers -= not layer.merged
        if weight.layers:
            weight.sums = _sums(parameters[name])
        else:
            weight.write_to(parameters[name])
    if not layer.merged:
        layer.__dict__.pop(_KEPT, None)


@torch.no_grad()
def _sums(parameter: Tensor) -> tuple[Tensor, ...]:
    """The sums of a tensor's bits as integers, by column and by row: a write to any element changes
    them. They are in the host's memory.
    """
    rows = parameter.detach().reshape(len(parameter), -1).contiguous()
    words = rows.shape[1] * rows.itemsize % _WORD == 0 and rows.data_ptr() % _WORD == 0
    # Words are summed without a copy in int64, modulo 2^64.
    integers = rows.view(torch.int64 if words else _INTEGERS[rows.itemsize])
    return tuple(integers.sum(dim, dtype=torch.int64).cpu() for dim in (0, 1))
