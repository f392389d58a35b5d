"""What a step finds in Python, what of it has changed since the last step, and copies of it for the
device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stablelora_kernels.dispatch.settings import get_backend
from stablelora_kernels.utils.validation import shown

# What engines are built from, or checked against as they are built. The seed keys the random
# rounding.
_BUILT = (
    "amsgrad",
    "stop_condition",
    "lr_ratio_B",
    "max_grad_norm",
    "moments_dtype",
    "master_weights",
    "seed",
)
# Hyperparameters that may be tensors. Schedulers change their numbers between replays of a CUDA
# graph, too.
LIVE = ("lr", "weight_decay", "shrink_ratio")
_NAMES = (*LIVE, *_BUILT, "betas", "eps", "maximize", "shrink_pattern", "capturable")
_values_of = itemgetter(*_NAMES)
_live, _built = slice(0, len(LIVE)), slice(len(LIVE), len(LIVE) + len(_BUILT))
_version = attrgetter("_version")
# Of a snapshot. A schedule changes the first, so that a comparison ends there.
_facts = attrgetter("groups", "tensors", "memory", "backend", "state")


class _NoTensorsAreEqual(TorchFunctionMode):
    """Answers ``==`` between tensors with False. Containers do not ask it about an element that
    both hold.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


_NO_TENSORS_ARE_EQUAL = _NoTensorsAreEqual()


def same_objects(found: Any, known: Any) -> bool:
    """Whether two lists or nested dicts hold the very same tensors in the same places.

    Every step asks this, so all of the work is Python's own comparison of containers: a tenth of a
    microsecond a tensor.
    """
    with _NO_TENSORS_ARE_EQUAL:
        return bool(found == known)


def difference(label: str, old: Any, new: Any) -> str | None:
    """Says in words that ``label`` has another value; None if it has not. An empty dict, left of
    hooks, is as good as None.
    """
    old, new = (None if isinstance(v, dict) and not v else v for v in (old, new))
    if old is new or same_objects([old], [new]):
        return None
    words = (
        f"a tensor of shape {list(v.shape)}" if isinstance(v, Tensor) else shown(repr(v))
        for v in (old, new)
    )
    return "{} was {} and is {}".format(label, *words)


def first_difference(known: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Says in words which value by its label was another in ``known``; None if all are the same."""
    for label in {**known, **found}:
        if words := difference(label, known.get(label, "absent"), found.get(label, "absent")):
            return words
    return None


class GradientLayout(NamedTuple):
    """How the gradients lie in memory. Equal from one step to the next if nothing was reallocated."""

    addresses: list[int]
    dtypes: list[torch.dtype]
    # Which parameters have a gradient; None: all.
    present: list[bool] | None = None


def layout_of(tensors: Sequence[Any]) -> GradientLayout | None:
    """The layout of the tensors that are not None; None if one is not contiguous or has no storage
    of its own.

    Passes over every tensor take most of a step's host time, so this makes as few as possible.
    """
    try:
        addresses = list(map(Tensor.data_ptr, tensors))
    except TypeError:
        found = layout_of([t for t in tensors if t is not None])
        return found and found._replace(present=[t is not None for t in tensors])
    except RuntimeError:
        return None
    return (
        GradientLayout(addresses, [t.dtype for t in tensors])
        if all(map(Tensor.is_contiguous, tensors))
        else None
    )


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

    def converted(self, like: Sequence[Tensor]) -> tuple[list[Tensor | None], bool]:
        """The gradients in the dtypes and strides of the dense tensors ``like``, and whether none
        is a copy.
        """
        made = [
            g if g is None else with_strides_of(t, g if g.dtype is t.dtype else g.to(t.dtype))
            for t, g in zip(like, self.tensors, strict=True)
        ]
        return made, all(map(is_, made, self.tensors))


def with_strides_of(p: Tensor, grad: Tensor) -> Tensor:
    """``grad`` with the strides of the dense ``p``, so that flat memory holds both in the same
    order.
    """
    if grad.stride() == p.stride():
        return grad
    return torch.empty_like(p, dtype=grad.dtype).copy_(grad)


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
    # Of each group, the values of _NAMES.
    groups: Any = None
    # Of tensors among the live hyperparameters their address, or their number if an engine
    # elsewhere reads it on the host.
    tensors: list[Any] | None = None
    # The optimizer's own; a snapshot that is kept has a copy.
    state: Any = None
    gradients: GradientLayout | None = None
    # Of the parameters that engines watch.
    versions: int | None = None

    @classmethod
    def take(
        cls,
        groups: Sequence[dict[str, Any]],
        params: Sequence[Tensor],
        state: Any,
        watched: Sequence[Tensor],
        on_cpu: bool,
    ) -> Snapshot:
        """What there is now, without gradients.

        Args:
            params: all parameters, or this process's shards.
            watched: those whose versions tell that someone else wrote to them.
            on_cpu: whether all engines are on the CPU.
        """
        rows = [_values_of(group) for group in groups]
        live = [value for row in rows for value in row[_live] if isinstance(value, Tensor)]
        tensors = [
            v.item() if v.device.type == "cpu" and not on_cpu else v.data_ptr() for v in live
        ]
        lists, memory = (
            [list(group["params"]) for group in groups],
            list(map(Tensor.data_ptr, params)),
        )
        return cls(
            lists, memory, get_backend(), rows, tensors, state, versions=versions_of(watched)
        )

    def kept(self) -> Snapshot:
        """This one with a copy of the state."""
        self.state = {p: dict(entry) for p, entry in self.state.items()}
        return self

    def since(self, last: Snapshot) -> Change:
        """What has changed since ``last``, of which the parameters are the same."""
        unchanged = same_objects(_facts(self), _facts(last))
        if not unchanged:
            found, known = (
                (each.memory, each.backend, [row[_built] for row in each.groups or ()], each.state)
                for each in (self, last)
            )
            if not same_objects(found, known):
                return Change()
        moved = self.gradients is None or self.gradients != last.gradients
        return Change(False, not unchanged, moved, self.versions != last.versions)

    def words(self, last: Snapshot, device: torch.device) -> str | None:
        """What has changed since ``last`` of all that a CUDA graph on ``device`` repeats, in words,
        or None.
        """
        if not same_objects(
            (self.params, self.memory, self.state), (last.params, last.memory, last.state)
        ):
            return "optimizer has other parameters or another state than before (add_param_group, load_state_dict, state)"
        for index, rows in enumerate(zip(self.groups, last.groups, strict=True)):
            for name, *both in zip(_NAMES, *rows, strict=True):
                if name in LIVE:
                    both = [
                        value if reads_from_memory(value, device) else "a number" for value in both
                    ]
                if words := difference(
                    f"optimizer.param_groups[{index}][{name!r}]", *reversed(both)
                ):
                    return words
        return None


def versions_of(params: Iterable[Tensor]) -> int:
    """The sum of the versions of ``params``, each of which only rises."""
    return sum(map(_version, params))


def reads_from_memory(value: Any, device: torch.device) -> bool:
    """Whether an engine on ``device`` reads a live hyperparameter from the tensor that its group
    holds.
    """
    return isinstance(value, Tensor) and value.device == device


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a new tensor on ``device``. A GPU copies from fresh pinned memory, so the host
    does not wait for it.
    """
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype, device="cpu")
    return (
        host.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else host.to(device, copy=True)
    )


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def keep_for_stream(tensors: Iterable[Tensor]) -> None:
    """Once a tensor is freed, let the allocator wait with its memory for what its device's current
    stream does until then.
    """
    for tensor in tensors:
        # Recording a stream is no part of a graph. The engine keeps what captured launches read.
        if tensor.device.type == "cuda" and not capturing():
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Staging:
    """Uploads tables; during a capture, from host memory reserved beforehand.

    A graph repeats its copies at each replay from the same host memory, so that memory may be
    neither freed nor rewritten. Pinned memory cannot be allocated during a capture. So some is
    reserved, and a capture keeps the part that it uses.
    """

    # A step uploads at most four tables, so this is enough for four captures without a step between
    # them.
    SPARES = 16

    def __init__(self, device: torch.device, size: int, capturable: bool) -> None:
        """``size``: the bytes of the largest table."""
        self.device, self.size = device, max(size, 1)
        self.wanted = self.SPARES if capturable else 0
        self.spares: list[Tensor] = []
        self.captured: list[Tensor] = []
        self.refill()

    def refill(self) -> None:
        """Replace the reserved memory that captures have used. Call it outside of a capture."""
        while len(self.spares) < self.wanted:
            pinned = self.device.type == "cuda"
            self.spares.append(
                torch.empty(self.size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            )

    def upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        """``values`` as a tensor on the device. RuntimeError during a capture, if no reserved
        memory is left.
        """
        if not capturing():
            return upload(values, dtype, self.device)
        if not self.spares:
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph: its gradients or hyperparameters differ from the last step's, and "
                "no memory is reserved for their table. "
                + (
                    "Run a step between captures"
                    if self.wanted
                    else "Pass capturable=True to the optimizer"
                )
            )
        table = (
            values
            if isinstance(values, Tensor)
            else torch.tensor(values, dtype=dtype, device="cpu")
        )
        host = self.spares.pop()
        self.captured.append(host)
        staged = host[: table.nbytes].view(dtype).view(table.shape).copy_(table)
        return torch.empty_like(staged, device=self.device).copy_(staged, non_blocking=True)
