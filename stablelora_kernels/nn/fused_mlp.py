"""``fuse_mlp``: compute a gated MLP, ``down(act(gate(x)) * up(x))``, in one op.

A fused MLP gets a subclass of its class whose forward calls the op. Each call reads the projections
again and looks at all that may have changed since: adapters, merging, hooks, training mode, dtypes.
If the op does not fit a call, the module's own forward computes it. The instance stores one
attribute of names and functions, no other module. So copies, pickles and replicas compute with
their own projections.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.functional import LoRAWeights, lora_linear_group, lora_mlp
from stablelora_kernels.nn.factory import is_conv1d
from stablelora_kernels.nn.linear import LoRAConv1D, LoRALinear, trained_and_bias, weight_and_bias
from stablelora_kernels.nn.mlp_form import Form, form_of, reason_to_skip
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.quantized import is_quantized
from stablelora_kernels.quantized import read as read_stored
from stablelora_kernels.utils.tensors import autocast_dtype, is_sharded

# The key of a module's __dict__ that holds its State. state_dict does not have it.
ATTRIBUTE = "_stablelora_mlp"
# Projections' names in models, which tell that a module is meant to be a gated MLP. The others are
# ignored without a word.
_NAMES = (
    {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}, {"w1", "w2", "w3"}, {"wi_0", "wi_1", "wo"},
)  # fmt: skip


@dataclass(frozen=True)
class GatedMLP:
    """One gated MLP that ``fuse_mlp`` found.

    Attributes:
        name: its first dotted name in the model.
        activation: "silu", "gelu" (exact) or "gelu_tanh"; None if it is none of them or could not
            be told.
        reason: why its own forward computes it, or None if one op does. What can pass, such as a
            merged layer or a hook, is looked at again in each call.
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


# A layer's operand for an input of the dtype and device of x, or why the layer must compute by
# itself. Without an x: for any that the layer may get in training, once its parameters are on their
# devices.
Read = Callable[[Any, Tensor | None], Operand | str]


class LayerKind(NamedTuple):
    """How to handle one library's layers; ``adapted`` is the class of those with adapters."""

    adapted: type[Any]
    read: Read

    def is_projection(self, module: Any) -> bool:
        """Whether ``module`` computes a projection, with adapters or without."""
        return isinstance(module, (nn.Linear, self.adapted)) or is_conv1d(module)


# How a fused MLP computes: its form, how to read its layers, and the function of a forward that was
# bound to the instance. A GraphedStep sees no change in a module that is fused again, for its state
# is equal.
State = tuple[Form, Read, Callable[..., Any] | None]


class FusedMLP:
    """A mixin in front of an MLP's class. Calls that the op does not fit run that class's forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: State | None = self.__dict__.get(ATTRIBUTE)
        if state is not None:
            form, read, own_forward = state
            if len(args) + len(kwargs) == 1:
                x = args[0] if args else kwargs.get(form.argument)
                if (y := _output(self, form, read, x)) is not None:
                    return y
            # Unbound, since a replica of the module has the attribute of its original.
            if own_forward is not None:
                return own_forward(self, *args, **kwargs)
        if not isinstance(self, FusedMLP):
            # Who wrapped this method (as accelerate's hooks do) calls it after the module got its
            # class back.
            return type(self).forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __setattr__(self: Any, name: str, value: Any) -> None:
        old = self.__dict__.get("_modules", {}).get(name)
        super().__setattr__(name, value)
        # PEFT's unload and merge_and_unload put plain layers into the places of its own, which have
        # this method.
        if hasattr(old, "get_base_layer") and not any(
            hasattr(x, "get_base_layer") for x in self._modules.values()
        ):
            unfuse_mlps([self])

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Pickles name the original class, since this one has no name in a module.
        made: Any = super().__reduce_ex__(max(protocol, 2))
        if is_fused(self) and made[0] is getattr(copyreg, "__newobj__", None):
            return (_new_instance, (type(self)._stablelora_original,), *made[2:])
        return made


def _output(module: Any, form: Form, read: Read, x: Any) -> Tensor | None:
    """The output from one op, or None if the module's own forward must compute it or raise."""
    # Global hooks and tracing must see every module's call. Tensor subclasses may override matmul.
    if type(x) is not Tensor or _has_any_global_hook() or torch.jit.is_tracing():
        return None
    if reason_to_skip(module, form) or isinstance(
        operands := _operands(module, form, read, x), str
    ):
        return None
    gate, up, down = (operands[child.name].weights for child in form[:3])
    if form.gate.half is not None and form.up.half is not None:
        if gate.weight.shape[0] % 2:  # type: ignore[union-attr]
            return None
        halves = _halves(gate)
        gate, up = halves[form.gate.half], halves[form.up.half]
    (n, k), up_shape, (_, inner) = (p.weight.shape for p in (gate, up, down))  # type: ignore[union-attr]
    if x.shape[-1:] != (k,) or up_shape != (n, k) or inner != n:
        return None
    dropout_p = next(
        (each.dropout_p for each in operands.values() if each.dropout_p is not None), None
    )
    # lora_mlp draws one mask for the halves of one layer, which have one A. Layers that share their
    # A draw two.
    shares_A = form.gate.half is None and gate.lora_A is up.lora_A is not None
    if dropout_p is None or (shares_A and dropout_p > 0):
        return None
    # dropout_p is that of now: 0 in evaluation.
    return lora_mlp(x, gate, up, down, form.activation, dropout_p, True)


def _operands(
    module: nn.Module, form: Form, read: Read, x: Tensor | None
) -> dict[str, Operand] | str:
    """What ``read`` finds in each layer for ``x``, by name; or why the module's own forward must
    compute it.
    """
    operands: dict[str, Operand] = {}
    for name, half in form[:3]:
        if name in operands:
            continue
        operand = read(module._modules[name], x)
        if isinstance(operand, str):
            return f"{name!r} {operand}"
        weight, bias, *_ = operand.weights
        for part, t in (("weight", weight), ("bias", bias)):
            if isinstance(t, Tensor) and t.requires_grad:
                return f"{name!r} has a {part} that trains; the op would keep activations for its gradient"
        if half is not None and (is_quantized(weight) or not isinstance(weight, Tensor)):
            return (
                f"{name!r} holds gate and up stacked in a quantized weight, which is not cut in two"
            )
        operands[name] = operand
    each = operands.values()
    if all(o.dropout_p is None for o in each):
        return "no projection has an active adapter"
    for what, values in (
        ("lora_dropout", [o.dropout_p for o in each]),
        ("the adapter's dtype", [None if o.weights.lora_A is None else o.weights.lora_A.dtype for o in each]),
        # In a call, the layers have compared their dtypes with that of x.
        ("the weight's dtype", [o.dtype for o in each] if x is None else []),
    ):  # fmt: skip
        given = [
            (value, name)
            for value, name in zip(values, operands, strict=False)
            if value is not None
        ]
        for value, name in given[1:]:
            if value != given[0][0]:
                return f"{what} is {given[0][0]} in {given[0][1]!r} and {value} in {name!r}"
    return operands


def _halves(stacked: LoRAWeights) -> list[LoRAWeights]:
    """Both halves of a stacked projection."""
    weight, bias, lora_A, lora_B, scaling = stacked
    cut: tuple[Any, ...] = (weight, bias, lora_B)
    # Not by slices, whose gradients would be padded with zeros and added.
    parts = [(None, None) if t is None else t.chunk(2) for t in cut]
    return [LoRAWeights(w, b, lora_A, half_B, scaling) for w, b, half_B in zip(*parts, strict=True)]


def fuse_mlps(model: nn.Module, kind: LayerKind) -> tuple[GatedMLP, ...]:
    """Fuse the gated MLPs of ``model`` that have an adapter in a projection. Fused ones are checked
    again.
    """
    found = []
    for name, module in list(model.named_modules()):
        children = [child for child in module._modules.values() if child is not None]
        is_named = any(names <= module._modules.keys() for names in _NAMES)
        has_projections = sum(map(kind.is_projection, children)) in (2, 3)
        if not (is_named or has_projections) or not any(
            isinstance(child, kind.adapted) for child in children
        ):
            continue
        unfuse_mlps([module])
        form = form_of(module, kind.is_projection)
        if not isinstance(form, str):
            reason = _fuse(module, form, kind.read) or reason_to_skip(module, form)
            operands = _operands(module, form, kind.read, None)
            found.append(
                GatedMLP(
                    name,
                    form.activation,
                    reason or (operands if isinstance(operands, str) else None),
                )
            )
        elif is_named:
            found.append(GatedMLP(name, None, form))
    return tuple(found)


def _fuse(module: nn.Module, form: Form, read: Read) -> str | None:
    """Change the class of ``module``, or return why it cannot be changed."""
    try:
        module.__class__ = _fused_class(type(module))
    except Exception as error:
        return f"its class {type(module).__name__} can't have a subclass ({error})"
    own = module.__dict__.pop("forward", None)
    module.__dict__[ATTRIBUTE] = (form, read, None if own is None else own.__func__)
    return None


def unfuse_mlps(modules: Iterable[nn.Module]) -> None:
    """Give fused MLPs their class and their forward back."""
    for module in modules:
        *_, forward = module.__dict__.pop(ATTRIBUTE, (None,))
        if is_fused(module):
            module.__class__ = type(module)._stablelora_original  # type: ignore[attr-defined]
        if forward is not None:
            module.__dict__["forward"] = forward.__get__(module)


def is_fused(module: Any) -> bool:
    """Whether the class of ``module`` is that of a fused MLP."""
    return "_stablelora_original" in vars(type(module))


# It keeps no class alive that nothing else refers to.
_classes: WeakValueDictionary[type, Any] = WeakValueDictionary()


def _fused_class(original: type) -> Any:
    """The subclass of ``original`` whose forward calls the op: one for each class, with its name."""
    if (fused := _classes.get(original)) is None:
        own = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        metaclass: Any = type(original)
        fused = metaclass(
            original.__name__, (FusedMLP, original), own | {"_stablelora_original": original}
        )
        _classes[original] = fused
    return fused


def _new_instance(original: type) -> Any:
    """An empty fused instance, for copies and pickles."""
    fused = _fused_class(original)
    return fused.__new__(fused)


def read_operand(layer: Any, x: Tensor | None) -> Operand | str:
    """:data:`Read` of this library's layers, and of frozen ones beside them."""
    kind = type(layer)
    lora_A = lora_B = dropout_p = None
    scaling, is_stored = 1.0, kind is LoRAQuantizedLinear
    weight: Any
    if kind is nn.Linear:
        weight, bias = weight_and_bias(layer)
    elif is_stored or kind is LoRALinear or kind is LoRAConv1D:
        if layer.merged:
            return "is merged"
        if layer._disabled:
            return "is disabled"
        bias, lora_A, lora_B = trained_and_bias(layer)
        scaling, dropout_p = (
            layer.scaling,
            layer.lora_dropout if layer.training or x is None else 0.0,
        )
        weight = layer.weight if is_stored else layer._matrix()
    elif not isinstance(layer, LoRALinear):
        return f"is a {kind.__name__} without an adapter whose weight is not plain"
    elif layer.calls_base:
        base = layer.to_linear()
        text = (
            type(base).__name__
            if type(base) is not nn.Linear
            else f"Linear with a {type(layer.weight).__name__}"
        )
        return f"calls its base layer, a {text}, for its product"
    else:
        return f"is a {kind.__name__}, which computes more than one product"
    if is_stored:
        # A 4-bit layer would cast x to the dtype that it was told, and its result back.
        weight, dtype = read_stored(weight), getattr(layer.__dict__["_base"], "compute_dtype", None)
    else:
        dtype = weight.dtype
    for t in (weight.stored.data if is_stored else weight, bias, lora_A, lora_B):
        # FSDP's parameters are DTensors until FSDP gathers them.
        if t is None or (x is None and is_sharded(t)):
            continue
        if type(t) is not nn.Parameter and type(t) is not Tensor:
            return f"is a {kind.__name__} with a {type(t).__name__}"
        if x is not None and t.device != x.device:
            return f"is on {t.device}"
    if x is not None:
        if dtype not in (None, x.dtype) and autocast_dtype(x.device.type) is None:
            return f"computes in {dtype}"
        bias = bias.to(x.dtype) if is_stored and bias is not None else bias
    return Operand(LoRAWeights(weight, bias, lora_A, lora_B, scaling), dropout_p, dtype)


OWN_LAYERS = LayerKind(LoRALinear, read_operand)


def compute_projection_group(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...] | None:
    """The outputs of layers that share the input ``x``, from one op; None if each layer must
    compute or raise by itself.
    """
    operands: list[Any] = [read_operand(layer, x) for layer in layers]
    if any(
        isinstance(each, str) or each.weights.weight.shape[1:] != x.shape[-1:] for each in operands
    ):
        return None
    projections, dropouts, _ = zip(*operands, strict=True)
    if len({*dropouts}) > 1:
        return None
    weights, biases, lora_As, lora_Bs, scalings = zip(*projections, strict=True)
    return lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings, dropouts[0])
