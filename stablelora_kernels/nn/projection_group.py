"""``fuse_projections``: layers that are called with one tensor, one after another, computed together at the first call.

An attention calls its q, k and v by name, each for itself; so the first of them computes all three in one op and keeps the
others' outputs until they are asked for. That they are called with one tensor is told from their names and checked at every
call: an output is handed out for that very tensor only, unchanged since, and where it never is the layers go back to being
computed one by one, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Names that children of one module have which are called with one tensor, in the order in which they are called.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# What modules are called, by models in transformers and diffusers, whose queries come from elsewhere than keys and values.
CROSS = ("cross", "encdec", "encoder_attn", "encoder_decoder")
# Where a layer keeps its group, in its __dict__: it is no part of state_dict.
ATTRIBUTE = "_stablelora_group"


class _Round(NamedTuple):
    """What was computed at one call: for this tensor, in this state, the outputs that are still to be asked for."""

    x: Tensor
    state: tuple[Any, ...]
    outputs: dict[int, Any]


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must not change between the calls of a round."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # Tensors of inference mode have no version, and neither have those that torch.compile traces with.
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    return (version, torch.is_grad_enabled(), autocast)


class ProjectionGroup:
    """Layers with one input. ``compute(layers, x)`` gives the output of each, or None where each must compute its own.

    Each layer asks :meth:`output`, and computes by itself where it gets None.
    """

    def __init__(
        self, names: Sequence[str], layers: Sequence[nn.Module], compute: Callable[[Sequence[Any], Tensor], Any]
    ):
        self.names, self.layers, self.compute = tuple(names), list(layers), compute
        self.on = True
        # How many rounds on end have left outputs that nobody asked for.
        self._wasted = 0
        self._round: _Round | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles have no part in a round that is not over.
        return self.__dict__ | {"_round": None}

    def output(self, layer: nn.Module, x: Tensor) -> Any:
        """The layer's output for ``x``, computed with the others', or None."""
        # By identity; a replica of a layer (DataParallel's) is none of them.
        number = next((i for i, other in enumerate(self.layers) if other is layer), None)
        if number is None or not self.on:
            return None
        state, current = _state(x), self._round
        if current is not None:
            if current.x is x and current.state == state:
                if number in current.outputs:
                    # Read and removed at once: another thread may have begun a round of its own.
                    output = current.outputs.pop(number, None)
                    if not current.outputs:
                        self._round, self._wasted = None, 0
                    return output
            elif number in current.outputs and current.x is not x:
                return self._give_up(f"{self.names[number]!r} was called with another tensor than those before it")
            self._wasted += 1
            if self._wasted > 1:
                return self._give_up("not all of them are called")
        outputs = self.compute(self.layers, x)
        if outputs is None:
            self._round = None
            return None
        waiting = dict(enumerate(outputs))
        output = waiting.pop(number)
        self._round = _Round(x, state, waiting)
        return output

    def _give_up(self, reason: str) -> None:
        self.on, self._round = False, None
        warnings.warn(
            f"fuse_projections: {reason}, so {', '.join(map(repr, self.names))} are computed one by one from here on.",
            RuntimeWarning,
            stacklevel=5,
        )


def find_siblings(
    model: nn.Module, layers: Mapping[str, Any], alike: Callable[[Any], tuple[Any, ...]]
) -> list[tuple[str, ...]]:
    """Groups of names of ``layers`` that one parent calls with one tensor, two or three, of layers that are ``alike``."""
    parents: dict[str, set[str]] = {}
    for name in layers:
        parent, _, child = name.rpartition(".")
        parents.setdefault(parent, set()).add(child)
    found = []
    for parent, children in parents.items():
        for siblings in SIBLINGS:
            last = parent.rpartition(".")[2].lower()
            kind = type(model.get_submodule(parent)).__name__.lower()
            crossed = len(siblings) > 2 and any(word in text for word in CROSS for text in (last, kind))
            names = [f"{parent}.{child}".lstrip(".") for child in siblings[crossed:] if child in children]
            if len(names) > 1 and len({alike(layers[name]) for name in names}) == 1:
                found.append(tuple(names))
    return found


def fuse(
    model: nn.Module,
    layers: Mapping[str, Any],
    alike: Callable[[Any], tuple[Any, ...]],
    compute: Callable[[Sequence[Any], Tensor], Any],
) -> str:
    """Put those of ``layers`` that share an input into groups; what was done, in words. Groups that were there are replaced."""
    groups = find_siblings(model, layers, alike)
    unfuse(layers.values())
    kinds: dict[str, int] = {}
    for names in groups:
        group = ProjectionGroup(names, [layers[name] for name in names], compute)
        for layer in group.layers:
            layer.__dict__[ATTRIBUTE] = group
        kind = ", ".join(name.rpartition(".")[2] for name in names)
        kinds[kind] = kinds.get(kind, 0) + 1
    if not kinds:
        return "fuse_projections found no layers that share an input"
    return "computed together from one read of their input: " + "; ".join(
        f"{count} x ({kind})" for kind, count in kinds.items()
    )


def unfuse(layers: Iterable[Any]) -> None:
    """Take layers out of their groups."""
    for layer in layers:
        layer.__dict__.pop(ATTRIBUTE, None)
