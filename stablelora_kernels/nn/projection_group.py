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
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stablelora_kernels.nn.operands import (
    compute_group,
    group_key,
    has_plain_weight,
    reason_against_group,
)
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


# The state that must be the same in all calls of a round: the version of x, whether gradients are
# enabled, and autocast's dtype. It is compared as a whole.
_CallState = tuple[int, bool, torch.dtype | None]


class _Pending(NamedTuple):
    """The outputs for ``x``, by the layer's index, that their layers have not asked for yet."""

    x: Tensor
    state: _CallState
    outputs: dict[int, Tensor]


class ProjectionGroup:
    """Layers that share an input.

    A layer's forward calls :meth:`output` and computes by itself if that returns None.
    """

    def __init__(self, names: Sequence[str], layers: Sequence[nn.Module]) -> None:
        self.names = tuple(names)
        self.layers = list(layers)
        self.on = True
        self.hook: RemovableHandle | None = None
        # The number of consecutive rounds with outputs that no layer asked for.
        self._wasted = 0
        self._pending: _Pending | None = None

    def after_forward(self, parent: nn.Module, args: object, output: object) -> None:
        """A forward hook of the module that calls the layers. A forward that raised has no output,
        and wasted nothing.
        """
        if output is None:
            self._pending = None

    def __getstate__(self) -> dict[str, object]:
        # Copies and pickles must not hold pending outputs.
        return self.__dict__ | {"_pending": None}

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output for ``x``, computed together with the other layers', or None."""
        # By identity: a replica of a layer (DataParallel makes them) is not in the group.
        index = None
        for place, member in enumerate(self.layers):
            if member is layer:
                index = place
        if index is None or not self.on:
            return None
        state = _call_state(x)
        pending = self._pending
        if pending is not None:
            if pending.x is x and pending.state == state:
                if index in pending.outputs:
                    # One pop reads and removes it: another thread may have replaced the pending
                    # outputs.
                    output = pending.outputs.pop(index, None)
                    if not pending.outputs:
                        self._pending = None
                        self._wasted = 0
                    return output
            elif index in pending.outputs and pending.x is not x:
                self._turn_off(
                    f"{self.names[index]!r} was called with another tensor than those before it"
                )
                return None
            self._wasted += 1
            if self._wasted > 1:
                self._turn_off("not all of them are called")
                return None
        # Before the next ones need their memory.
        self._pending = pending = None
        outputs = compute_group(self.layers, x)
        if outputs is None:
            return None
        pending_outputs = dict(enumerate(outputs))
        output = pending_outputs.pop(index)
        self._pending = _Pending(x, state, pending_outputs)
        return output

    def _turn_off(self, reason: str) -> None:
        """Compute the layers one by one from here on, and warn why."""
        self.on = False
        self._pending = None
        warnings.warn(
            f"fuse_projections: {reason}, so {', '.join(map(repr, self.names))} are computed one by one from here on.",
            RuntimeWarning,
            stacklevel=5,
        )


def make_projection_groups(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Put those of ``layers`` that share an input into groups, replace existing groups, and return
    notes for the report.
    """
    groups = _find_projection_groups(model, layers)
    remove_projection_groups(layers.values())
    for names in groups:
        if not all(has_plain_weight(layers[name]) for name in names):
            continue
        group = ProjectionGroup(names, [layers[name] for name in names])
        parent = model.get_submodule(names[0].rpartition(".")[0])
        group.hook = parent.register_forward_hook(group.after_forward, always_call=True)
        for layer in group.layers:
            layer.__dict__[ATTRIBUTE] = group
    if not groups:
        return ["fuse_projections found no layers that share an input"]
    # Groups of the same children, counted by the reason why they are not fused.
    counts_by_reason: dict[str | None, Counter[str]] = {}
    for names in groups:
        children = {name.rpartition(".")[2]: layers[name] for name in names}
        reason = _first_reason(children)
        counts_by_reason.setdefault(reason, Counter())[", ".join(children)] += 1
    return [_note(counts, reason) for reason, counts in counts_by_reason.items()]


def _first_reason(children: Mapping[str, nn.Module]) -> str | None:
    """Why the first of a group's layers that must compute alone does so, or None."""
    for name, layer in children.items():
        reason = reason_against_group(layer)
        if reason is not None:
            return f"{name!r} {reason}"
    return None


def _note(counts: Counter[str], reason: str | None) -> str:
    """A note on groups of one outcome, by their layers' names."""
    listed = "; ".join(f"{count} x ({names})" for names, count in counts.items())
    if reason is None:
        return f"fused projections: {listed}"
    return f"projections that are not fused: {listed}: {reason}"


def remove_projection_groups(layers: Iterable[nn.Module]) -> None:
    """Take layers out of their groups."""
    for layer in layers:
        group: ProjectionGroup | None = layer.__dict__.pop(ATTRIBUTE, None)
        if group is not None and group.hook is not None:
            group.hook.remove()


def _find_projection_groups(
    model: nn.Module, layers: Mapping[str, nn.Module]
) -> list[tuple[str, ...]]:
    """Find two or three names of ``layers`` under one parent that share an input and whose layers
    have equal keys.
    """
    parents: dict[str, set[str]] = {}
    for name in layers:
        path = name.split(".")
        parents.setdefault(".".join(path[:-1]), set()).add(path[-1])
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
            if len(names) > 1 and len({group_key(layers[name]) for name in names}) == 1:
                groups.append(tuple(names))
    return groups


def _call_state(x: Tensor) -> _CallState:
    # Tensors of inference mode and of torch.compile's tracing have no version.
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    return version, torch.is_grad_enabled(), autocast_dtype(x.device.type)
