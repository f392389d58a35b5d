"""``fuse_projections``: compute layers that share an input, such as q, k and v, in one op.

An attention module calls its q, k and v one after another. The first call computes the outputs of
the whole projection group; the group keeps the other outputs until their layers are called. Layers
are grouped by their names. Each call checks that the input really is the same tensor, unchanged. If
it is not, the group turns itself off with a warning and each layer computes its own output. A hook
of the attention module drops what the group keeps if its forward raises.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stablelora_kernels.utils.tensors import autocast_dtype

# Names of projections that a module calls with one tensor, in the order of the calls.
PROJECTION_NAMES = (
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
# Words in the names of cross-attention modules in transformers and diffusers, whose queries have
# another input.
CROSS_ATTENTION_WORDS = ("cross", "encdec", "encoder_attn", "encoder_decoder")
# The key of a layer's __dict__ that holds its group. It is not part of state_dict.
ATTRIBUTE = "_stablelora_group"


class _Pending(NamedTuple):
    """The outputs for ``x``, by the layer's index, that their layers have not asked for yet."""

    x: Tensor
    state: tuple[Any, ...]
    outputs: dict[int, Any]


class ProjectionGroup:
    """Layers that share an input.

    ``compute(layers, x)`` returns the output of each layer, or None if each layer must compute its
    own. A layer's forward calls :meth:`output` and computes by itself if that returns None.
    """

    def __init__(
        self,
        names: Sequence[str],
        layers: Sequence[nn.Module],
        compute: Callable[[Sequence[Any], Tensor], Any],
    ):
        self.names, self.layers, self.compute = tuple(names), list(layers), compute
        self.on = True
        self.hook: Any = None
        # The number of consecutive rounds with outputs that no layer asked for.
        self._wasted = 0
        self._pending: _Pending | None = None

    def after_forward(self, parent: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the module that calls the layers. A forward that raised has no output,
        and wasted nothing.
        """
        if output is None:
            self._pending = None

    # So a CUDA graph need not call it again.
    after_forward.only_after_errors = True  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles must not hold pending outputs.
        return self.__dict__ | {"_pending": None}

    def output(self, layer: nn.Module, x: Tensor) -> Any:
        """The layer's output for ``x``, computed together with the other layers', or None."""
        # By identity: a replica of a layer (DataParallel makes them) is not in the group.
        index = next((i for i, other in enumerate(self.layers) if other is layer), None)
        if index is None or not self.on:
            return None
        state, pending = _call_state(x), self._pending
        if pending is not None:
            if pending.x is x and pending.state == state:
                if index in pending.outputs:
                    # One pop reads and removes it: another thread may have replaced the pending
                    # outputs.
                    output = pending.outputs.pop(index, None)
                    if not pending.outputs:
                        self._pending, self._wasted = None, 0
                    return output
            elif index in pending.outputs and pending.x is not x:
                return self._turn_off(
                    f"{self.names[index]!r} was called with another tensor than those before it"
                )
            self._wasted += 1
            if self._wasted > 1:
                return self._turn_off("not all of them are called")
        # Before the next ones need their memory.
        self._pending = pending = None
        outputs = self.compute(self.layers, x)
        if outputs is None:
            return None
        others = dict(enumerate(outputs))
        output = others.pop(index)
        self._pending = _Pending(x, state, others)
        return output

    def _turn_off(self, reason: str) -> None:
        self.on, self._pending = False, None
        warnings.warn(
            f"fuse_projections: {reason}, so {', '.join(map(repr, self.names))} are computed one by one from here on.",
            RuntimeWarning,
            stacklevel=5,
        )


def make_projection_groups(
    model: nn.Module,
    layers: Mapping[str, Any],
    key: Callable[[Any], tuple[Any, ...]],
    compute: Callable[[Sequence[Any], Tensor], Any],
    reason_to_compute_alone: Callable[[Any], str | None] = lambda layer: None,
) -> list[str]:
    """Put those of ``layers`` that share an input into groups, replace existing groups, and return
    notes for the report.

    ``reason_to_compute_alone(layer)``: why ``compute`` leaves a layer and its group to themselves
    as the layer is now, or None.
    """
    groups = _find_projection_groups(model, layers, key)
    remove_projection_groups(layers.values())
    for names in groups:
        group = ProjectionGroup(names, [layers[name] for name in names], compute)
        parent = model.get_submodule(names[0].rpartition(".")[0])
        group.hook = parent.register_forward_hook(group.after_forward, always_call=True)
        for layer in group.layers:
            layer.__dict__[ATTRIBUTE] = group
    if not groups:
        return ["fuse_projections found no layers that share an input"]
    kinds: dict[str | None, Counter[str]] = {}
    for names in groups:
        children = [name.rpartition(".")[2] for name in names]
        reasons = {
            child: reason_to_compute_alone(layers[name])
            for child, name in zip(children, names, strict=True)
        }
        first = next(
            (f"{child!r} {reason}" for child, reason in reasons.items() if reason is not None), None
        )
        kinds.setdefault(first, Counter())[", ".join(children)] += 1
    return [_note(counts, reason) for reason, counts in kinds.items()]


def _note(counts: Counter[str], reason: str | None) -> str:
    """A note on groups of one outcome, by their layers' names."""
    listed = "; ".join(f"{count} x ({names})" for names, count in counts.items())
    return (
        f"fused projections: {listed}"
        if reason is None
        else f"projections that are not fused: {listed}: {reason}"
    )


def remove_projection_groups(layers: Iterable[Any]) -> None:
    """Take layers out of their groups."""
    for layer in layers:
        if (group := layer.__dict__.pop(ATTRIBUTE, None)) is not None:
            group.hook.remove()


def _find_projection_groups(
    model: nn.Module, layers: Mapping[str, Any], key: Callable[[Any], tuple[Any, ...]]
) -> list[tuple[str, ...]]:
    """Find two or three names of ``layers`` under one parent that share an input and whose layers
    have equal keys.
    """
    parents: dict[str, set[str]] = {}
    for name in layers:
        parent, _, child = name.rpartition(".")
        parents.setdefault(parent, set()).add(child)
    groups = []
    for parent, children in parents.items():
        parent_name = parent.rpartition(".")[2].lower()
        parent_type = type(model.get_submodule(parent)).__name__.lower()
        is_cross = any(
            word in text for word in CROSS_ATTENTION_WORDS for text in (parent_name, parent_type)
        )
        for projections in PROJECTION_NAMES:
            # Cross-attention: the query has another input than key and value.
            candidates = projections[1:] if is_cross and len(projections) > 2 else projections
            names = [f"{parent}.{child}".lstrip(".") for child in candidates if child in children]
            if len(names) > 1 and len({key(layers[name]) for name in names}) == 1:
                groups.append(tuple(names))
    return groups


def _call_state(x: Tensor) -> tuple[Any, ...]:
    """The state that must be the same in all calls of a round."""
    # Tensors of inference mode and of torch.compile's tracing have no version.
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    return (version, torch.is_grad_enabled(), autocast_dtype(x.device.type))
