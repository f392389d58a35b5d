"""PEFT's LoRA layers with their forward on this library's ops. It imports peft, so ``peft.py`` imports it when it is needed.

An instance is accelerated by its ``__class__``, which becomes one that derives from the PEFT class it had and overrides the
forward. Nothing is stored in it, but for its group where ``fuse_projections`` was asked for. So all that is done to it goes
on as before: copies, pickles and replicas are accelerated too, and adapters are added, switched, merged, deleted, saved and
loaded by PEFT's own code. Everything is looked up when it is called: adapters, scaling, dropout's probability and mode, merged
or disabled or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as _layer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.functional import FLOAT_DTYPES, lora_branch, lora_linear, lora_linear_group
from stablelora_kernels.model.modules import HOOKS
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from stablelora_kernels.quantized import FP8Weight, NF4Weight, is_quantized, read

# What PEFT's layers take out of the arguments for themselves; the rest is the base layer's.
_OWN_ARGUMENTS = ("adapter_names", *getattr(_layer, "VARIANT_KWARG_KEYS", ()))


class Base(NamedTuple):
    """What ``lora_linear`` takes of a base layer, whose product it is to compute in ``dtype``."""

    weight: Tensor | NF4Weight | FP8Weight
    bias: Tensor | None
    dtype: torch.dtype


class Branch(NamedTuple):
    """What one adapter adds: scaling · (D(x) A^T B^T + bias)."""

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float

    def onto(self, base_out: Tensor, x: Tensor) -> Tensor:
        if self.bias is not None:
            base_out = base_out + (self.scaling * self.bias).to(base_out.dtype)
        return lora_branch(base_out, x, self.lora_A, self.lora_B, self.scaling, self.dropout_p)

    def with_base(self, base: Base, x: Tensor) -> Tensor:
        """The base product and the branch, in one op."""
        return lora_linear(x, *self.tensors_with(base), self.scaling, self.dropout_p)

    def tensors_with(self, base: Base) -> tuple[Any, Tensor | None, Tensor, Tensor]:
        """The weight, the bias, A and B of the two."""
        bias = base.bias
        if self.bias is not None:
            bias = self.scaling * self.bias if bias is None else bias + self.scaling * self.bias
            bias = bias.to(base.dtype)
        return base.weight, bias, self.lora_A, self.lora_B


def reason_against(layer: Any, adapter: str) -> str | None:
    """Why PEFT's own forward has to compute an adapter of a layer, or None."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is a variant of LoRA ({type(layer.lora_variant[adapter]).__name__})"
    a, b, dropout = _parts_of(layer, adapter)
    for name, module in (("lora_A", a), ("lora_B", b)):
        if not _is_plain_linear(module):
            return f"{name} of adapter {adapter!r} is not a plain nn.Linear, or has hooks"
    (a_weight, a_bias), (b_weight, _) = _tensors_of(a), _tensors_of(b)
    if a_bias is not None or a_weight.dtype != b_weight.dtype:
        return f"lora_A of adapter {adapter!r} has a bias, or another dtype than lora_B"
    if type(dropout) not in (nn.Identity, nn.Dropout) or _is_hooked(dropout):
        return f"the dropout of adapter {adapter!r} is a {type(dropout).__name__}, or has hooks"
    if type(dropout) is nn.Dropout and dropout.p >= 1:
        return f"the dropout of adapter {adapter!r} drops everything"
    if not isinstance(layer.scaling[adapter], (int, float)):
        return f"the scaling of adapter {adapter!r} is a {type(layer.scaling[adapter]).__name__}, not a number"
    return None


# All of this happens at every call of every layer, so it goes around nn.Module's __getattr__, which is slow.


def _parts_of(layer: Any, adapter: str) -> tuple[Any, Any, Any]:
    """lora_A, lora_B and the dropout of an adapter."""
    modules = layer._modules
    a, b, dropout = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    return a[adapter], b[adapter], dropout[adapter]


def _tensors_of(linear: Any) -> tuple[Any, Any]:
    """The weight and the bias of an ``nn.Linear``."""
    own = linear._parameters
    try:
        return own["weight"], own["bias"]
    except KeyError:
        # FSDP has plain attributes instead, for a forward.
        return linear.weight, linear.bias


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` may do more than its class's forward."""
    own = module.__dict__
    for name in HOOKS:
        if own[name]:
            return True
    return "forward" in own


def _is_plain(weight: Tensor, bias: Tensor | None) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and (bias is None or type(bias) in (nn.Parameter, Tensor))


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that may be computed from its weight without calling it."""
    return type(module) is nn.Linear and not _is_hooked(module) and _is_plain(*_tensors_of(module))


def _branches(layer: Any, adapters: Iterable[str], x: Tensor) -> list[Branch] | None:
    """The branches of those adapters that the layer has, or None where PEFT's own forward has to compute them."""
    # Someone watches every module, or the input is not cast to the adapter's dtype on purpose.
    if _has_any_global_hook() or torch.jit.is_tracing() or not getattr(layer, "cast_input_dtype_enabled", True):
        return None
    found = []
    for adapter in adapters:
        if adapter not in layer._modules["lora_A"]._modules:
            continue
        if reason_against(layer, adapter) is not None:
            return None
        a, b, dropout = _parts_of(layer, adapter)
        (lora_A, _), (lora_B, bias) = _tensors_of(a), _tensors_of(b)
        if not _fits(x, lora_A, lora_B):
            return None
        p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        found.append(Branch(lora_A, lora_B, bias, layer.scaling[adapter], p))
    return found


def _fits(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether the ops take ``x`` beside the adapter: PEFT casts x to its dtype, and where sizes differ the error is PEFT's."""
    if x.dtype not in FLOAT_DTYPES or x.device != lora_A.device:
        return False
    # Not among the reasons above: as long as a model is sharded, its parameters have other shapes.
    if x.shape[-1:] != lora_A.shape[1:] or lora_A.shape[:1] != lora_B.shape[1:]:
        return False
    if torch.float64 in (x.dtype, lora_A.dtype):
        return x.dtype == lora_A.dtype and resolve_backend(x.device) == "torch"
    return lora_A.dtype in (torch.float32, x.dtype) or torch.is_autocast_enabled(x.device.type)


def _one_op(base: nn.Module, x: Tensor) -> Base | None:
    """The base layer as an operand, where its product and a branch may be one op, or None."""
    if type(base) not in _READ or _is_hooked(base):
        return None
    weight, bias = _tensors_of(base)
    # A quantized or sharded weight is of another type. FSDP puts plain tensors in the parameters' places for a forward.
    if type(base) is not nn.Linear or not _is_plain(weight, bias):
        return _quantized(base, weight, bias, x) if is_quantized(weight) else None
    other = weight if bias is None else bias
    if weight.device != x.device or other.device != x.device:
        return None
    if weight.dtype == other.dtype == x.dtype:
        return Base(weight, bias, x.dtype)
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return Base(weight, bias, weight.dtype)
    return None


def _quantized(base: Any, weight: Any, bias: Tensor | None, x: Tensor) -> Base | None:
    """As :func:`_one_op`, of a base layer in 4 or 8 bits: where the kernels compute its product as it does itself.

    PyTorch's backend would dequantize the weight in Python, which the layer does better.
    """
    if resolve_backend(x.device) != "triton":
        return None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if type(base) is nn.Linear:
        fits = weight.dtype == x.dtype == dtype
    else:
        # bitsandbytes casts x, autocast or not. In its first call it may choose in what it computes, and it casts the bias
        # for good.
        fits = base.compute_type_is_set and base.compute_dtype == dtype
    if not fits or (bias is not None and (bias.dtype != dtype or bias.device != x.device)):
        return None
    try:
        stored = read(weight)
    except (TypeError, ValueError):
        return None
    # bitsandbytes' weights may be quantized as [K, N].
    if stored.shape != (base.out_features, base.in_features) or stored.stored.data.device != x.device:
        return None
    return Base(stored, bias, dtype)


class Accelerated:
    """Put before a PEFT class. What it does not understand it leaves to that class."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward: base_layer(x) and the active adapters' branches, in the base layer's dtype."""
        plain = not self.disable_adapters and not self.merged and kwargs.get("adapter_names") is None
        group = self.__dict__.get(ATTRIBUTE)
        if group is not None and plain and not args and not kwargs and (y := group.output(self, x)) is not None:
            return y
        branches = _branches(self, self.active_adapters, x) if plain else None
        if not branches:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        kwargs = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
        base = self._modules["base_layer"]
        operand = None if args or kwargs else _one_op(base, x)
        if operand is not None:
            result = branches.pop(0).with_base(operand, x)
            if not isinstance(operand.weight, Tensor):
                # Under autocast too, these layers return x's dtype.
                result = result.to(x.dtype)
        else:
            result = base(x, *args, **kwargs)
        for branch in branches:
            result = branch.onto(result, x)
        return result

    def _mixed_batch_forward(self: Any, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Each row with the branch of the adapter that is named for it; PEFT's forward has checked the names."""
        branches = {name: _branches(self, [name], x) for name in dict.fromkeys(adapter_names)}
        if None in branches.values():
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)  # type: ignore[misc]
        kwargs = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
        result = self.base_layer(x, *args, **kwargs)
        for name, found in branches.items():
            # None for "__base__", nor for an adapter that this layer does not have.
            for branch in found or ():
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                result[rows] = branch.onto(result[rows], x[rows])
        return result

    def _get_name(self) -> str:
        # What a model prints stays as it was.
        return ORIGINAL[type(self)].__name__


def compute_projection_group(layers: Sequence[Any], x: Tensor) -> list[Tensor] | None:
    """The outputs of layers with one input, in one op; None where each has to compute its own."""
    firsts, rests = [], []
    tensors: list[tuple[Any, ...]] = []
    for layer in layers:
        plain = not layer.disable_adapters and not layer.merged
        branches = _branches(layer, layer.active_adapters, x) if plain else None
        operand = _one_op(layer._modules["base_layer"], x) if branches else None
        if not branches or operand is None or not isinstance(operand.weight, Tensor):
            return None
        first, *rest = branches
        firsts.append(first)
        rests.append(rest)
        tensors.append(first.tensors_with(operand))
    if len({(first.dropout_p, first.lora_A.dtype) for first in firsts}) > 1:
        return None
    scalings = [first.scaling for first in firsts]
    weights, biases, lora_As, lora_Bs = zip(*tensors, strict=True)
    outputs = lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings, firsts[0].dropout_p)
    results = []
    for result, rest in zip(outputs, rests, strict=True):
        for branch in rest:
            result = branch.onto(result, x)
        results.append(result)
    return results


def projection_group_key(layer: Any) -> tuple[Any, ...]:
    """What layers must have in common to be computed together; the rest is looked at in each call."""
    base = layer.base_layer
    # One that is no plain layer is like no other.
    return (layer.in_features, base.weight.dtype) if type(base) is nn.Linear else (id(layer),)


class AcceleratedLinear(Accelerated, lora.Linear):
    """``peft.tuners.lora.Linear``: on nn.Linear and its subclasses, and transformers' Conv1D."""


class AcceleratedTorchaoLoraLinear(Accelerated, TorchaoLoraLinear):
    """torchao's quantized weights."""


# Base layers whose weight may be read instead of calling them.
_READ: tuple[type, ...] = (nn.Linear,)
KNOWN: dict[type, type] = {lora.Linear: AcceleratedLinear, TorchaoLoraLinear: AcceleratedTorchaoLoraLinear}

if hasattr(lora, "Linear8bitLt"):

    class AcceleratedLinear8bitLt(Accelerated, lora.Linear8bitLt):
        """bitsandbytes' 8-bit layers."""

    KNOWN[lora.Linear8bitLt] = AcceleratedLinear8bitLt

if hasattr(lora, "Linear4bit"):
    from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4

    class AcceleratedLinear4bit(Accelerated, lora.Linear4bit):
        """bitsandbytes' 4-bit layers."""

    KNOWN[lora.Linear4bit] = AcceleratedLinear4bit
    _READ = (nn.Linear, Linear4bit, LinearNF4, LinearFP4)

ORIGINAL = {accelerated: original for original, accelerated in KNOWN.items()}
