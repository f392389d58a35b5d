"""``fuse_mlp``: compute a gated MLP, ``down(act(gate(x)) * up(x))``, in one op.

A fused MLP gets a subclass of its class whose forward calls the op. Each call reads the projections again and looks at all that
may have changed since: adapters, merging, hooks, training mode, dtypes. If the op does not fit a call, the module's own forward
computes it. The instance stores one attribute of names and functions, no other module. So copies, pickles and replicas compute
with their own projections.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.functional import LoRAWeights, lora_mlp
from stablelora_kernels.nn.factory import is_conv1d
from stablelora_kernels.nn.mlp_form import Form, form_of, is_unchanged
from stablelora_kernels.quantized import is_quantized
from stablelora_kernels.utils.modules import HOOKS, is_hooked

# The keys of a module's __dict__ that hold its MLPState, and a forward that was bound to the instance. state_dict has neither.
ATTRIBUTE, _OWN_FORWARD = "_stablelora_mlp", "_stablelora_mlp_forward"
# Projections' names in models, which tell that a module is meant to be a gated MLP. The others are ignored without a word.
_NAMES = (
    {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}, {"w1", "w2", "w3"}, {"wi_0", "wi_1", "wo"},
)  # fmt: skip


@dataclass(frozen=True)
class GatedMLP:
    """One gated MLP that ``fuse_mlp`` found.

    Attributes:
        name: its first dotted name in the model.
        activation: "silu", "gelu" (exact) or "gelu_tanh"; None if it is none of them or could not be told.
        reason: why its own forward computes it, or None if one op does. What can pass, such as a merged layer or a hook, is
            looked at again in each call.
    """

    name: str
    activation: str | None
    reason: str | None = None


class Operand(NamedTuple):
    """What the op reads of a projection."""

    weights: LoRAWeights
    # None without an adapter. In a call, 0 in evaluation.
    dropout_p: float | None
    # The product's; None if it is that of any x.
    dtype: torch.dtype | None


# A layer's operand for an input of the dtype and device of x, or why the layer must compute by itself. Without an x: for any
# that the layer may get in training, once its parameters are on their devices.
Read = Callable[[Any, Tensor | None], Operand | str]


class LayerKind(NamedTuple):
    """How to handle one library's layers; ``adapted`` is the class of those with adapters."""

    adapted: type[Any]
    read: Read

    def is_projection(self, module: Any) -> bool:
        """Whether ``module`` computes a projection, with adapters or without."""
        return isinstance(module, (nn.Linear, self.adapted)) or is_conv1d(module)


@dataclass(frozen=True)
class MLPState:
    """How a fused MLP computes."""

    form: Form
    read: Read


class FusedMLP:
    """A mixin in front of an MLP's class. Calls that the op does not fit run that class's forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        state = own.get(ATTRIBUTE)
        if state is not None and len(args) + len(kwargs) == 1:
            x = args[0] if args else kwargs.get(state.form.argument)
            if (y := _output(self, state, x)) is not None:
                return y
        # Unbound, since a replica of the module has the attribute of its original.
        if (forward := own.get(_OWN_FORWARD)) is not None:
            return forward(self, *args, **kwargs)
        if not isinstance(self, FusedMLP):
            # Who wrapped this method (as accelerate's hooks do) calls it after the module got its class back.
            return type(self).forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __setattr__(self: Any, name: str, value: Any) -> None:
        old = self.__dict__.get("_modules", {}).get(name)
        super().__setattr__(name, value)
        # PEFT's unload and merge_and_unload put plain layers into the places of its own, which have this method.
        if hasattr(old, "get_base_layer") and not any(hasattr(x, "get_base_layer") for x in self._modules.values()):
            unfuse_mlps([self])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickles name the original class, since this one has no name in a module.
        made: Any = super().__reduce_ex__(max(protocol, 2))
        if is_fused(self) and made[0] is getattr(copyreg, "__newobj__", None):
            return (_new_instance, (_original_of(self),), *made[2:])
        return made


def _output(module: Any, state: MLPState, x: Any) -> Tensor | None:
    """The output from one op, or None if the module's own forward must compute it or raise."""
    # Global hooks and tracing must see every module's call. Tensor subclasses may override matmul.
    if type(x) is not Tensor or _has_any_global_hook() or torch.jit.is_tracing():
        return None
    form = state.form
    if not is_unchanged(module, form) or isinstance(operands := _operands(module, form, state.read, x), str):
        return None
    gate, up, down = operands
    if form.gate.half is not None:
        if (halves := _halves(gate, form.gate.half)) is None:
            return None
        gate, up = halves
    (n, k), up_shape, (_, inner) = (each.weights.weight.shape for each in (gate, up, down))  # type: ignore[union-attr]
    if x.shape[-1:] != (k,) or up_shape != (n, k) or inner != n:
        return None
    dropout_p = next((each.dropout_p for each in (gate, up, down) if each.dropout_p is not None), None)
    # lora_mlp draws one mask for the halves of one layer, which have one A. Layers that share their A draw two.
    shares_A = form.gate.half is None and gate.weights.lora_A is up.weights.lora_A is not None
    if dropout_p is None or (shares_A and dropout_p > 0):
        return None
    # dropout_p is that of now: 0 in evaluation.
    return lora_mlp(x, gate.weights, up.weights, down.weights, form.activation, dropout_p, True)


def _operands(module: nn.Module, form: Form, read: Read, x: Tensor | None) -> list[Operand] | str:
    """Gate's, up's and down's, for ``read``'s ``x``; or why the module's own forward must compute it. Halves are still one."""
    operands: list[Operand] = []
    for name, half in form[:3]:
        if half is not None and operands:
            operands *= 2
            continue
        operand = read(module._modules[name], x)
        if isinstance(operand, str):
            return f"{name!r} {operand}"
        weight, bias, *_ = operand.weights
        for part, t in (("weight", weight), ("bias", bias)):
            if isinstance(t, Tensor) and t.requires_grad:
                return f"{name!r} has a {part} that trains; the op would keep activations for its gradient"
        if half is not None and (is_quantized(weight) or not isinstance(weight, Tensor)):
            return f"{name!r} holds gate and up stacked in a quantized weight, which is not cut in two"
        operands.append(operand)
    for what, values in (
        ("lora_dropout", [each.dropout_p for each in operands]),
        ("the adapter's dtype", [None if each.weights.lora_A is None else each.weights.lora_A.dtype for each in operands]),
        # In a call, the layers have compared their dtypes with that of x.
        ("the weight's dtype", [each.dtype for each in operands] if x is None else []),
    ):  # fmt: skip
        given = [(value, name) for value, (name, _) in zip(values, form[:3], strict=False) if value is not None]
        for value, name in given[1:]:
            if value != given[0][0]:
                return f"{what} is {given[0][0]} in {given[0][1]!r} and {value} in {name!r}"
    return operands


def _halves(operand: Operand, first: int) -> tuple[Operand, Operand] | None:
    """Gate and up of a stacked projection, of which gate is the half ``first``."""
    weight, bias, lora_A, lora_B, scaling = operand.weights
    assert isinstance(weight, Tensor)
    if weight.shape[0] % 2:
        return None
    # Not by slices, whose gradients would be padded with zeros and added.
    biases: Any = (None, None) if bias is None else bias.chunk(2)
    lora_Bs: Any = (None, None) if lora_B is None else lora_B.chunk(2)
    halves = [
        operand._replace(weights=LoRAWeights(half, biases[i], lora_A, lora_Bs[i], scaling))
        for i, half in enumerate(weight.chunk(2))
    ]
    return halves[first], halves[1 - first]


def fuse_mlps(model: nn.Module, kind: LayerKind) -> tuple[GatedMLP, ...]:
    """Fuse the gated MLPs of ``model`` that have an adapter in a projection. Fused ones are checked again."""
    found = []
    for name, module in list(model.named_modules()):
        children = [child for child in module._modules.values() if child is not None]
        is_named = any(names <= module._modules.keys() for names in _NAMES)
        has_projections = sum(map(kind.is_projection, children)) in (2, 3)
        if not (is_named or has_projections) or not any(isinstance(child, kind.adapted) for child in children):
            continue
        unfuse_mlps([module])
        form = form_of(module, kind.is_projection)
        if isinstance(form, str):
            if is_named:
                found.append(GatedMLP(name, None, form))
            continue
        reason = _fuse(module, form, kind)
        found.append(GatedMLP(name, form.activation, reason or _reason_against(module, form, kind)))
    return tuple(found)


def _fuse(module: nn.Module, form: Form, kind: LayerKind) -> str | None:
    """Change the class of ``module``, or return why it cannot be changed."""
    own = module.__dict__.pop("forward", None)
    try:
        module.__class__ = _fused_class(type(module))
    except Exception as error:
        if own is not None:
            module.__dict__["forward"] = own
        return f"its class {type(module).__name__} can't have a subclass ({error})"
    if own is not None:
        module.__dict__[_OWN_FORWARD] = own.__func__
    # One object for equal states, so that a GraphedStep sees no change in a module that is fused again.
    module.__dict__[ATTRIBUTE] = _states.setdefault((form, kind.read), MLPState(form, kind.read))
    return None


def unfuse_mlps(modules: Iterable[nn.Module]) -> None:
    """Give fused MLPs their class and their forward back."""
    for module in modules:
        own = module.__dict__
        own.pop(ATTRIBUTE, None)
        if is_fused(module):
            module.__class__ = _original_of(module)
        if (forward := own.pop(_OWN_FORWARD, None)) is not None:
            own["forward"] = forward.__get__(module)


def is_fused(module: Any) -> bool:
    """Whether the class of ``module`` is that of a fused MLP."""
    return "_stablelora_original" in vars(type(module))


def _original_of(module: Any) -> type[nn.Module]:
    return type(module)._stablelora_original


# Neither keeps a class alive that nothing else refers to.
_classes: WeakValueDictionary[type, Any] = WeakValueDictionary()
_states: WeakValueDictionary[tuple[Form, Read], MLPState] = WeakValueDictionary()


def _fused_class(original: type) -> Any:
    """The subclass of ``original`` whose forward calls the op: one for each class, with its name."""
    if (fused := _classes.get(original)) is None:
        own = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        metaclass: Any = type(original)
        fused = metaclass(original.__name__, (FusedMLP, original), own | {"_stablelora_original": original})
        _classes[original] = fused
    return fused


def _new_instance(original: type) -> Any:
    """An empty fused instance, for copies and pickles."""
    fused = _fused_class(original)
    return fused.__new__(fused)


def _reason_against(module: nn.Module, form: Form, kind: LayerKind) -> str | None:
    """Why the module's own forward computes it at present, or None."""
    for name, child in module._modules.items():
        if child is None or (name,) not in dict(form.reads):
            continue
        if any(child.__dict__[attribute] for attribute in HOOKS):
            return f"{name!r} has hooks, which would not run"
        if is_hooked(child):
            return f"{name!r} has a forward that was replaced (as accelerate's hooks do)"
    operands = _operands(module, form, kind.read, None)
    return operands if isinstance(operands, str) else None
