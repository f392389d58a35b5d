"""What a step finds in Python, and what of it has changed since the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.optim.groups import ParamGroup
from stablelora_kernels.optim.options import LIVE, Number
from stablelora_kernels.optim.state import Entry, with_strides_of

# Options that engines are built from, or checked against as they are built. The seed keys the
# random rounding.
_BUILT = (
    "amsgrad",
    "stop_condition",
    "lr_ratio_B",
    "max_grad_norm",
    "moments_dtype",
    "master_weights",
    "seed",
)
# Hyperparameters that a step uploads once they have changed.
_UPLOADED = (*LIVE, "betas", "eps", "maximize", "shrink_pattern", "capturable")
_live_values = itemgetter(*LIVE)
_built_values = itemgetter(*_BUILT)
_uploaded_values = itemgetter(*_UPLOADED)
# Of a snapshot: what engines stand for, and what they have uploaded.
_engine_inputs = attrgetter("memory", "backend", "built", "state")
_hyperparameters = attrgetter("uploaded", "tensors")
_version = attrgetter("_version")


class _NoTensorsAreEqual(TorchFunctionMode):
    """Answers ``==`` between tensors with False. Containers do not ask it about an element that
    both hold.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: object = (),
        kwargs: object = None,
    ) -> bool:
        return False


_NO_TENSORS_ARE_EQUAL = _NoTensorsAreEqual()


def same_objects(now: object, before: object) -> bool:
    """Whether two lists or nested dicts hold the very same tensors in the same places.

    Every step asks this, so all of the work is Python's own comparison of containers: a tenth of a
    microsecond a tensor.
    """
    with _NO_TENSORS_ARE_EQUAL:
        return now == before


class GradientLayout(NamedTuple):
    """How the gradients lie in memory. Equal from one step to the next if nothing was reallocated."""

    addresses: list[int]
    dtypes: list[torch.dtype]
    # Which parameters have a gradient; None: all.
    present: list[bool] | None = None


def layout_of(tensors: Sequence[Tensor | None]) -> GradientLayout | None:
    """The layout of the tensors that are not None; None if one is not contiguous or has no storage
    of its own.

    Passes over every tensor take most of a step's host time, so this makes as few as possible.
    """
    all_present: Sequence[Any] = tensors
    try:
        addresses = list(map(Tensor.data_ptr, all_present))
    except TypeError:
        # One is None.
        layout = layout_of([t for t in tensors if t is not None])
        return layout and layout._replace(present=[t is not None for t in tensors])
    except RuntimeError:
        return None
    if not all(map(Tensor.is_contiguous, all_present)):
        return None
    return GradientLayout(addresses, [t.dtype for t in all_present])


class Gradients(NamedTuple):
    """One gradient a parameter, None for none, and their layout."""

    tensors: list[Tensor | None]
    layout: GradientLayout | None

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> Gradients:
        return cls(tensors, layout_of(tensors))

    def owners(self, params: list[Tensor]) -> list[Tensor]:
        """Those of ``params`` that have a gradient; ``params`` itself if all have one."""
        if self.layout is not None and self.layout.present is None:
            return params
        return [p for p, g in zip(params, self.tensors, strict=True) if g is not None]

    def any(self) -> bool:
        """Whether there is a gradient. RuntimeError if one is not dense."""
        if self.layout is not None:
            return bool(self.layout.addresses)
        for g in self.tensors:
            if g is not None and g.layout is not torch.strided:
                raise RuntimeError(f"gradients must be dense tensors, got {g.layout}")
        return True

    def converted(self, like: Sequence[Tensor]) -> Converted:
        """The gradients in the dtypes and strides of the dense tensors ``like``."""
        tensors: list[Tensor | None] = []
        for t, g in zip(like, self.tensors, strict=True):
            if g is None:
                tensors.append(None)
            else:
                tensors.append(with_strides_of(t, g if g.dtype is t.dtype else g.to(t.dtype)))
        return Converted(tensors, direct=all(map(is_, tensors, self.tensors)))


class Converted(NamedTuple):
    """Gradients as an engine reads them. ``direct``: none of them is a copy."""

    tensors: list[Tensor | None]
    direct: bool


class Change(NamedTuple):
    """What has changed since the last step."""

    # Parameters, their memory, the state or what engines are built from: build engines. Everything
    # else has changed then.
    build: bool = True
    # A hyperparameter.
    hyper: bool = True
    # Where gradients lie, or which there are.
    gradients: bool = True
    # Someone else wrote to a parameter that an engine watches.
    written: bool = True


@dataclass(slots=True, eq=False)
class Snapshot:
    """What a step finds in Python. The fields of one that stands for no step are None."""

    # The parameters of each group, and the addresses of all.
    params: list[list[Tensor]]
    memory: list[int] | None = None
    backend: str = ""
    # Of each group, the values of _BUILT and those of _UPLOADED.
    built: list[tuple[object, ...]] | None = None
    uploaded: list[tuple[object, ...]] | None = None
    # Of tensors among the live hyperparameters their address, or their number if an engine
    # elsewhere reads it on the host.
    tensors: list[float] | None = None
    # The optimizer's own; a snapshot that is kept has a copy.
    state: Mapping[Tensor, Entry] | None = None
    gradients: GradientLayout | None = None
    # Of the parameters that engines watch.
    versions: int | None = None

    @classmethod
    def take(
        cls,
        groups: Sequence[ParamGroup],
        params: Sequence[Tensor],
        state: Mapping[Tensor, Entry],
        watched: Sequence[Tensor],
        on_cpu: bool,
    ) -> Snapshot:
        """What there is now, without gradients.

        Args:
            params: all parameters, or this process's shards.
            watched: those whose versions tell that someone else wrote to them.
            on_cpu: whether all engines are on the CPU.
        """
        return cls(
            params=[list(group["params"]) for group in groups],
            memory=list(map(Tensor.data_ptr, params)),
            backend=settings.backend,
            built=list(map(_built_values, groups)),
            uploaded=list(map(_uploaded_values, groups)),
            tensors=_live_tensors(groups, on_cpu),
            state=state,
            versions=versions_of(watched),
        )

    def kept(self) -> Snapshot:
        """This one with a copy of the state."""
        assert self.state is not None
        self.state = {p: dict(entry) for p, entry in self.state.items()}
        return self

    def since(self, last: Snapshot) -> Change:
        """What has changed since ``last``, of which the parameters are the same."""
        # Twice what same_objects does, in one block: every step comes here.
        with _NO_TENSORS_ARE_EQUAL:
            other_engines = _engine_inputs(self) != _engine_inputs(last)
            other_hyper = _hyperparameters(self) != _hyperparameters(last)
        if other_engines:
            # New engines know nothing of the last step: all has changed.
            return Change()
        return Change(
            build=False,
            hyper=other_hyper,
            gradients=self.gradients is None or self.gradients != last.gradients,
            written=self.versions != last.versions,
        )


def _live_tensors(groups: Sequence[ParamGroup], on_cpu: bool) -> list[float]:
    """Of every tensor among the live hyperparameters its address, or its number if an engine on a
    GPU reads it on the host.
    """
    values: list[Number] = []
    for group in groups:
        values += _live_values(group)
    return [
        value.item() if value.device.type == "cpu" and not on_cpu else value.data_ptr()
        for value in values
        if isinstance(value, Tensor)
    ]


def versions_of(params: Iterable[Tensor]) -> int:
    """The sum of the versions of ``params``, each of which only rises."""
    return sum(map(_version, params))
