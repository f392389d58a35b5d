"""``fuse_mlp`` and ``tile_mlp``: compute a gated MLP, ``down(act(gate(x)) * up(x))``, in one op.

:class:`FusedMLP` takes the forward of an MLP over (``nn/take_over.py``). Each call reads the
projections again and looks at all that may have changed since: adapters, merging, hooks, training mode, dtypes.
If the op does not fit a call, the module's own forward computes it. The instance stores one
attribute of names and functions, no other module. So copies, pickles and replicas compute with
their own projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.functional import LoRAWeights, lora_mlp, lora_mlp_if
from stablelora_kernels.nn.fused_experts import FusableExperts
from stablelora_kernels.nn.mlp_form import Child, Form, form_of, reason_form_changed
from stablelora_kernels.nn.operands import (
    Operand,
    is_adapted,
    is_projection,
    read_layer,
    read_usual_layer,
)
from stablelora_kernels.nn.take_over import TakesOver, give_back, take_over
from stablelora_kernels.quantized import is_quantized
from stablelora_kernels.utils.refusal import Refusal

# The key of a module's __dict__ that holds its State. state_dict does not have it.
ATTRIBUTE = "_stablelora_mlp"
# Projections' names in models, which tell that a module is meant to be a gated MLP. The others are
# ignored without a word.
_NAMES = (
    {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}, {"w1", "w2", "w3"}, {"wi_0", "wi_1", "wo"},
)  # fmt: skip


@dataclass(frozen=True)
class GatedMLP:
    """One gated MLP that ``fuse_mlp`` found, or one module of experts.

    Attributes:
        name: its first dotted name in the model.
        activation: "silu", "gelu" (exact) or "gelu_tanh"; None if it is none of them or could not
            be told, and of experts, whose own gate is called.
        reason: why its own forward computes it, or None if one op does. Without that op, experts
            are computed by one op for each projection. What can pass, such as a merged layer or a
            hook, is looked at again in each call.
        experts: how many experts it has; None for a single MLP.
        tiled: whether the op keeps its input alone, as ``tile_mlp`` asked; a number is how many rows
            a tile has.
    """

    name: str
    activation: str | None
    reason: str | None = None
    experts: int | None = None
    tiled: bool | int = False


class State(NamedTuple):
    """How a fused MLP computes."""

    form: Form
    # The function of a forward that was bound to the instance.
    own_forward: Callable[..., Any] | None
    # As :func:`~stablelora_kernels.functional.lora_mlp` takes it.
    tiled: bool | int


class FusedMLP(TakesOver):
    """A mixin in front of an MLP's class. Calls that the op does not fit run that class's forward."""

    def forward(self: Any, *args: object, **kwargs: object) -> Any:
        """The op's output; of a call that it does not fit, that of the module's own forward."""
        state: State | None = self.__dict__.get(ATTRIBUTE)
        if state is not None:
            if len(args) + len(kwargs) == 1:
                x = args[0] if args else kwargs.get(state.form.argument)
                if (y := _output(self, state, x)) is not None:
                    return y
            # Unbound, since a replica of the module has the attribute of its original.
            if state.own_forward is not None:
                return state.own_forward(self, *args, **kwargs)
        if not isinstance(self, FusedMLP):
            # Who wrapped this method (as accelerate's hooks do) calls it after the module got its
            # class back.
            return type(self).forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __setattr__(self: Any, name: str, value: object) -> None:
        replaced = self.__dict__.get("_modules", {}).get(name)
        super().__setattr__(name, value)
        # PEFT's unload and merge_and_unload put plain layers into the places of its own, which have
        # this method.
        if hasattr(replaced, "get_base_layer") and not any(
            hasattr(child, "get_base_layer") for child in self._modules.values()
        ):
            unfuse_mlps([self])


def _output(module: nn.Module, state: State, x: object) -> Tensor | None:
    """The output from one op, or None if the module's own forward must compute it or raise."""
    # Global hooks and tracing must see every module's call. Tensor subclasses may override matmul.
    if type(x) is not Tensor or _has_any_global_hook() or torch.jit.is_tracing():
        return None
    if reason_form_changed(module, state.form):
        return None
    usual = _usual_call(module, state)
    if usual is not None:
        # Once calls of this kind are known to fit, the op's own key says so.
        def fits() -> bool:
            return _call_for(module, state, x) is not None

        how = (usual.activation, usual.dropout_p, state.tiled)
        return lora_mlp_if(fits, x, usual.projections, *how)
    call = _call_for(module, state, x)
    if call is None:
        return None
    y = lora_mlp(x, *call.projections, call.activation, call.dropout_p, True, state.tiled)
    return y.to(x.dtype) if call.casts else y


class _Call(NamedTuple):
    """What the op takes besides x."""

    # Gate, up and down.
    projections: tuple[LoRAWeights, LoRAWeights, LoRAWeights]
    activation: str
    # That of now: 0 in evaluation. All projections with an adapter have the same.
    dropout_p: float
    # Whether the module returns its input's dtype under autocast.
    casts: bool = False


def _usual_call(module: nn.Module, state: State) -> _Call | None:
    """What :func:`_call_for` returns of a module whose layers are of the usual kind, if it fits x;
    None of any other module.
    """
    form = state.form
    modules = module._modules
    gate = read_usual_layer(modules[form.gate.name])  # type: ignore[arg-type]
    up = read_usual_layer(modules[form.up.name])  # type: ignore[arg-type]
    down = read_usual_layer(modules[form.down.name])  # type: ignore[arg-type]
    if gate is None or up is None or down is None or form.gate.half is not None:
        return None
    dropout_p = gate.dropout_p
    if dropout_p is None or up.dropout_p != dropout_p or down.dropout_p != dropout_p:
        return None
    return _Call((gate.weights, up.weights, down.weights), form.activation, dropout_p)


def _call_for(module: nn.Module, state: State, x: Tensor) -> _Call | None:
    """What the op takes besides x, or None if the module's own forward must compute it or raise."""
    form = state.form
    operands = _operands(module, form, x)
    if isinstance(operands, Refusal):
        return None
    gate = operands[form.gate.name].weights
    up = operands[form.up.name].weights
    down = operands[form.down.name].weights
    if form.gate.half is not None and form.up.half is not None:
        if _shape(gate)[0] % 2:
            return None
        halves = _halves(gate)
        gate = halves[form.gate.half]
        up = halves[form.up.half]
    inner_features, in_features = _shape(gate)
    if x.shape[-1:] != (in_features,):
        return None
    if _shape(up) != (inner_features, in_features) or _shape(down)[1] != inner_features:
        return None
    dropouts = (operand.dropout_p for operand in operands.values())
    dropout_p = next((p for p in dropouts if p is not None), None)
    # lora_mlp draws one mask for the halves of one layer, which have one A. Layers that share their
    # A draw two.
    shares_A = form.gate.half is None and gate.lora_A is up.lora_A is not None
    if dropout_p is None or (shares_A and dropout_p > 0):
        return None
    # Down gets the dtype that gate and up return.
    inner_casts = operands[form.gate.name].casts or operands[form.up.name].casts
    casts = inner_casts and operands[form.down.name].casts
    return _Call((gate, up, down), form.activation, dropout_p, casts)


def _shape(projection: LoRAWeights) -> tuple[int, ...]:
    """(N, K) of a projection's weight."""
    return projection.weight.shape  # type: ignore[union-attr]


def _operands(module: nn.Module, form: Form, x: Tensor | None) -> dict[str, Operand] | Refusal:
    """What is read of each layer for ``x``, by name; or why the module's own forward must
    compute it.
    """
    operands: dict[str, Operand] = {}
    for child in (form.gate, form.up, form.down):
        if child.name in operands:
            continue
        operand = read_layer(module._modules[child.name], x)  # type: ignore[arg-type]
        if isinstance(operand, Refusal):
            return Refusal(f"{child.name!r} {operand.reason}")
        reason = _reason_against(operand, child)
        if reason is not None:
            return Refusal(f"{child.name!r} {reason}")
        operands[child.name] = operand
    if all(operand.dropout_p is None for operand in operands.values()):
        return Refusal("no projection has an active adapter")
    reason = _disagreement(operands, compare_dtypes=x is None)
    return operands if reason is None else Refusal(reason)


def _reason_against(operand: Operand, child: Child) -> str | None:
    """Why the op cannot take what was read of a projection, or None."""
    if operand.reason_against_mlp is not None:
        return operand.reason_against_mlp
    weight = operand.weights.weight
    for name, tensor in (("weight", weight), ("bias", operand.weights.bias)):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            return f"has a {name} that trains; the op would keep activations for its gradient"
    if child.half is not None and (is_quantized(weight) or not isinstance(weight, Tensor)):
        return "holds gate and up stacked in a quantized weight, which is not cut in two"
    return None


def _disagreement(operands: Mapping[str, Operand], compare_dtypes: bool) -> str | None:
    """In which setting two projections differ that must be one for the op, or None.

    ``compare_dtypes``: also those of the weights. In a call, the layers have compared them with
    that of x.
    """
    dropouts: dict[str, object] = {}
    adapter_dtypes: dict[str, object] = {}
    weight_dtypes: dict[str, object] = {}
    for name, operand in operands.items():
        dropouts[name] = operand.dropout_p
        lora_A = operand.weights.lora_A
        adapter_dtypes[name] = None if lora_A is None else lora_A.dtype
        weight_dtypes[name] = operand.dtype if compare_dtypes else None
    return (
        _difference("lora_dropout", dropouts)
        or _difference("the adapter's dtype", adapter_dtypes)
        or _difference("the weight's dtype", weight_dtypes)
    )


def _difference(setting: str, values: Mapping[str, object]) -> str | None:
    """The first two layers with different values of a ``setting``, or None. None is no value."""
    first_name = None
    for name, value in values.items():
        if value is None:
            continue
        if first_name is None:
            first_name = name
        elif value != values[first_name]:
            return f"{setting} is {values[first_name]} in {first_name!r} and {value} in {name!r}"
    return None


def _halves(stacked: LoRAWeights) -> list[LoRAWeights]:
    """Both halves of a stacked projection."""
    # Not by slices, whose gradients would be padded with zeros and added.
    weights = stacked.weight.chunk(2)  # type: ignore[union-attr]
    biases = (None, None) if stacked.bias is None else stacked.bias.chunk(2)
    lora_Bs = (None, None) if stacked.lora_B is None else stacked.lora_B.chunk(2)
    return [
        LoRAWeights(weights[half], biases[half], stacked.lora_A, lora_Bs[half], stacked.scaling)
        for half in range(2)
    ]


def fuse_mlps(model: nn.Module, tiled: bool | int) -> tuple[GatedMLP, ...]:
    """Fuse the gated MLPs and the modules of experts of ``model`` that have an adapter in a
    projection, ``tiled`` or not. Fused ones are checked again.
    """
    mlps = []
    for name, module in list(model.named_modules()):
        if isinstance(module, FusableExperts):
            reason = module.fuse_experts(tiled)
            count = module.module_of_experts().num_experts
            mlps.append(GatedMLP(name, None, reason, count, tiled))
            continue
        children = [child for child in module._modules.values() if child is not None]
        if not any(is_adapted(child) for child in children):
            continue
        is_named = any(names <= module._modules.keys() for names in _NAMES)
        projections = sum(is_projection(child) for child in children)
        if not is_named and projections not in (2, 3):
            continue
        unfuse_mlps([module])
        form = form_of(module, is_projection)
        if not isinstance(form, Refusal):
            reason = _fuse(module, form, tiled) or reason_form_changed(module, form)
            if reason is None:
                operands = _operands(module, form, None)
                reason = operands.reason if isinstance(operands, Refusal) else None
            mlps.append(GatedMLP(name, form.activation, reason, tiled=tiled))
        elif is_named:
            mlps.append(GatedMLP(name, None, form.reason))
    return tuple(mlps)


def _fuse(module: nn.Module, form: Form, tiled: bool | int) -> str | None:
    """Take the forward of ``module`` over, or return why it cannot be."""
    reason = take_over(module, FusedMLP)
    if reason is not None:
        return reason
    bound = module.__dict__.pop("forward", None)
    own_forward = None if bound is None else bound.__func__
    module.__dict__[ATTRIBUTE] = State(form, own_forward, tiled)
    return None


def unfuse_mlps(modules: Iterable[nn.Module]) -> None:
    """Give fused MLPs their class and their forward back, and compute experts by two ops."""
    for module in modules:
        if isinstance(module, FusableExperts):
            module.unfuse_experts()
        state: State | None = module.__dict__.pop(ATTRIBUTE, None)
        give_back(module, FusedMLP)
        if state is not None and state.own_forward is not None:
            module.__dict__["forward"] = MethodType(state.own_forward, module)
