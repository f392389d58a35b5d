"""PEFT's LoRA layers with a forward on this library's ops. This module imports peft, so ``peft.py`` imports it lazily.

Accelerating an instance changes only its ``__class__``, to a subclass of its PEFT class that overrides the forward. It stores
nothing in the instance except its projection group, if ``fuse_projections`` is set. So copies, pickles and replicas are
accelerated too, and PEFT's own code adds, switches, merges, deletes, saves and loads adapters as before. Each call reads the
current adapters, scaling, dropout, training mode, and whether the layer is merged or disabled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as _layer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakTensorKeyDictionary

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.functional import FLOAT_DTYPES, lora_branch, lora_linear, lora_linear_group, lora_linear_if
from stablelora_kernels.nn.linear import weight_and_bias
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from stablelora_kernels.ops.dora import row_norms, scale_columns, square_sums
from stablelora_kernels.quantized import FP8Weight, NF4Weight, is_quantized, read
from stablelora_kernels.utils.autocast import autocast_dtype
from stablelora_kernels.utils.dtensor import is_sharded
from stablelora_kernels.utils.hooks import is_hooked

# The keyword arguments that PEFT's layers consume. The base layer gets the others.
_OWN_ARGUMENTS = ("adapter_names", *getattr(_layer, "VARIANT_KWARG_KEYS", ()))


class Base(NamedTuple):
    """The base layer's operands of ``lora_linear``, which computes the base product in ``dtype``."""

    weight: Tensor | NF4Weight | FP8Weight
    bias: Tensor | None
    dtype: torch.dtype


class Branch(NamedTuple):
    """One adapter's part of the output: scaling · (D(x) A^T B^T + bias)."""

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float

    def add_to(self, base_out: Tensor, x: Tensor) -> Tensor:
        if self.bias is not None:
            base_out = base_out + (self.scaling * self.bias).to(base_out.dtype)
        return lora_branch(base_out, x, self.lora_A, self.lora_B, self.scaling, self.dropout_p)

    def with_base(self, base: Base, x: Tensor) -> Tensor:
        """The base product and the branch, in one op."""
        return lora_linear(x, *self.tensors_with(base), self.scaling, self.dropout_p)

    def tensors_with(self, base: Base) -> tuple[Any, Tensor | None, Tensor, Tensor]:
        """Weight, combined bias, A and B."""
        bias = base.bias
        if self.bias is not None:
            bias = self.scaling * self.bias if bias is None else bias + self.scaling * self.bias
            bias = bias.to(base.dtype)
        return base.weight, bias, self.lora_A, self.lora_B


def reason_against(layer: Any, adapter: str) -> str | None:
    """Why PEFT's own forward must compute an adapter of a layer, at least in training, or None."""
    found = _read_dora(layer, adapter) if _is_dora(layer, adapter) else read_branch(layer, adapter)
    if isinstance(found, Dora) and type(layer.lora_dropout[adapter]) is nn.Dropout:
        return f"adapter {adapter!r} is DoRA with dropout, which needs the base product of two inputs"
    return found if isinstance(found, str) else None


# The following code runs at every call of every layer, so it avoids nn.Module's slow __getattr__.


def _is_plain(weight: Tensor, bias: Tensor | None) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and (bias is None or type(bias) in (nn.Parameter, Tensor))


def _plain_tensors(linear: Any) -> tuple[Any, Any]:
    """The weight and the bias of an ``nn.Linear`` that nothing watches; Nones for another module."""
    if type(linear) is nn.Linear and not is_hooked(linear):
        weight, bias = weight_and_bias(linear)
        if _is_plain(weight, bias):
            return weight, bias
    return None, None


def read_branch(layer: Any, adapter: str) -> Branch | str:
    """An adapter's branch, with the dropout of now, or why PEFT's own forward must compute it."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is a variant of LoRA ({type(layer.lora_variant[adapter]).__name__})"
    return _read_matrices(layer, adapter)


def _read_matrices(layer: Any, adapter: str) -> Branch | str:
    """:func:`read_branch` for a variant too."""
    modules = layer._modules
    a, b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    dropout, scaling = modules["lora_dropout"]._modules[adapter], layer.scaling[adapter]
    a_weight, a_bias = _plain_tensors(a)
    b_weight, b_bias = _plain_tensors(b)
    if a_weight is None or b_weight is None:
        name = "lora_A" if a_weight is None else "lora_B"
        return f"{name} of adapter {adapter!r} is not a plain nn.Linear, or has hooks"
    if a_bias is not None or a_weight.dtype != b_weight.dtype:
        return f"lora_A of adapter {adapter!r} has a bias, or another dtype than lora_B"
    kind = type(dropout)
    if (kind is not nn.Identity and kind is not nn.Dropout) or is_hooked(dropout):
        return f"the dropout of adapter {adapter!r} is a {kind.__name__}, or has hooks"
    if kind is nn.Dropout and dropout.p >= 1:
        return f"the dropout of adapter {adapter!r} drops everything"
    if not isinstance(scaling, (int, float)):
        return f"the scaling of adapter {adapter!r} is a {type(scaling).__name__}, not a number"
    return Branch(a_weight, b_weight, b_bias, scaling, dropout.p if kind is nn.Dropout and dropout.training else 0.0)


class Dora(NamedTuple):
    """A DoRA adapter: its branch and its magnitude [N], and the base layer's weight and bias."""

    branch: Branch
    magnitude: Tensor
    weight: Any
    bias: Tensor | None

    def output(self, base: Any, x: Tensor) -> Tensor:
        """(m / n) Z + bias, for the product Z of the base layer and the branch without a bias."""
        operand = base_operand(base, x)
        if isinstance(operand, Base):
            z = self.branch.with_base(operand._replace(bias=None), x)
        else:
            z = self.branch.add_to(self.product(base, x), x)
        with torch.no_grad():
            norms = _row_norms(self, base)
        return scale_columns(z, self.magnitude / norms, self.bias)

    def product(self, base: Any, x: Tensor) -> Tensor:
        """X W^T, as the base layer computes it."""
        y = base(x)
        return y if self.bias is None else y - self.bias


# |W_n|^2 of quantized weights.
_square_sums = WeakTensorKeyDictionary()


def _row_norms(dora: Dora, base: Any) -> Tensor:
    (lora_A, lora_B, _, scaling, _), weight = dora.branch, dora.weight
    if is_quantized(weight):
        # Its values do not change, and dequantizing it takes a while.
        if (sums := _square_sums.get(weight)) is None:
            sums = _square_sums[weight] = square_sums(read(weight).dequantize(torch.float32))
        products = dora.product(base, lora_A.to(getattr(base, "compute_dtype", None) or weight.dtype))
    else:
        sums = square_sums(weight)
        with torch.autocast(weight.device.type, enabled=False):
            products = nn.functional.linear(lora_A.to(weight.dtype), weight)
    return row_norms(sums, products, lora_A, lora_B, scaling)


def _is_dora(layer: Any, adapter: str) -> bool:
    return type(layer.lora_variant.get(adapter)) is DoraLinearVariant


def _read_dora(layer: Any, adapter: str) -> Dora | str:
    """A DoRA adapter, or why PEFT's own forward must compute it."""
    branch, base = _read_matrices(layer, adapter), layer._modules["base_layer"]
    if isinstance(branch, str):
        return branch
    magnitude = layer.lora_magnitude_vector[adapter]
    if type(magnitude) is not DoraLinearLayer or is_hooked(magnitude) or layer.ephemeral_gpu_offload:
        return f"adapter {adapter!r} is DoRA with hooks, or with a weight on another device"
    if type(base) not in READABLE or is_hooked(base):
        return f"adapter {adapter!r} is DoRA on a {type(base).__name__}, or on a layer with hooks"
    weight, bias = weight_and_bias(base)
    if not is_quantized(weight) and not is_sharded(weight) and not _is_plain(weight, bias):
        return f"adapter {adapter!r} is DoRA on a {type(weight).__name__}"
    return Dora(branch, magnitude.weight, weight, bias)


def _dora_output(layer: Any, x: Tensor) -> Tensor | None:
    """The output with a single adapter, if that is DoRA and drops nothing; None if PEFT's own forward must compute it."""
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer._modules["lora_A"]._modules]
    if len(adapters) != 1 or not _is_dora(layer, adapters[0]) or is_observed(layer):
        return None
    dora = _read_dora(layer, adapters[0])
    if isinstance(dora, str) or dora.branch.dropout_p or not fits(x, dora.branch.lora_A, dora.branch.lora_B):
        return None
    return dora.output(layer._modules["base_layer"], x)


def is_observed(layer: Any) -> bool:
    """Whether global hooks or tracing must see every module's call. PEFT can also be told not to cast the input."""
    return _has_any_global_hook() or torch.jit.is_tracing() or not getattr(layer, "cast_input_dtype_enabled", True)


def _usual_output(layer: Any, x: Tensor) -> Tensor | None:
    """The output with one adapter on a plain base layer, or None if it is no such call. It does not look at merging."""
    adapters = layer.active_adapters
    if len(adapters) != 1 or adapters[0] not in layer._modules["lora_A"]._modules or is_observed(layer):
        return None
    branch, base = read_branch(layer, adapters[0]), layer._modules["base_layer"]
    weight, bias = _plain_tensors(base)
    if isinstance(branch, str) or branch.bias is not None or weight is None:
        return None

    # Once calls of this kind are known to fit, the op's own key says so.
    def is_readable() -> bool:
        return fits(x, branch.lora_A, branch.lora_B) and isinstance(base_operand(base, x), Base)

    return lora_linear_if(is_readable, x, weight, bias, branch.lora_A, branch.lora_B, branch.scaling, branch.dropout_p)


def branches_of(layer: Any, adapters: Iterable[str], x: Tensor) -> list[Branch] | None:
    """The layer's branches for ``adapters``, or None if PEFT's own forward must compute them."""
    if is_observed(layer):
        return None
    found = []
    for adapter in adapters:
        if adapter not in layer._modules["lora_A"]._modules:
            continue
        branch = read_branch(layer, adapter)
        if isinstance(branch, str) or not fits(x, branch.lora_A, branch.lora_B):
            return None
        found.append(branch)
    return found


def fits(x: Tensor, lora_A: Tensor, lora_B: Tensor, features: int | None = None) -> bool:
    """Whether the ops accept ``x`` with the adapter. Otherwise PEFT casts x to the adapter's dtype, or raises its own error.

    ``features`` are those of the layer's input if that is not ``x`` but a tensor like it.
    """
    if x.dtype not in FLOAT_DTYPES or x.device != lora_A.device:
        return False
    # Not part of reason_against: in a sharded model, parameters have other shapes between calls.
    if (x.shape[-1:] if features is None else (features,)) != lora_A.shape[1:] or lora_A.shape[:1] != lora_B.shape[1:]:
        return False
    if torch.float64 in (x.dtype, lora_A.dtype):
        return x.dtype == lora_A.dtype and resolve_backend(x.device) == "torch"
    return lora_A.dtype in (torch.float32, x.dtype) or autocast_dtype(x.device.type) is not None


def _calls(base: Any, weight: str = "") -> str:
    return f"calls its base layer, a {type(base).__name__}{weight}, for its product"


def base_operand(base: Any, x: Tensor | None) -> Base | str:
    """The base layer's operands, or why its product cannot be in one op with a branch.

    For an input like ``x``; without one, for any that the layer may get once its parameters are on their devices.
    """
    if type(base) not in READABLE or is_hooked(base):
        return _calls(base)
    weight, bias = weight_and_bias(base)
    # Quantized and sharded weights have other types. During a forward, FSDP replaces parameters by plain tensors.
    if is_quantized(weight):
        return _quantized_operand(base, weight, bias, x) or _calls(base)
    if x is None and is_sharded(weight):
        return Base(weight, bias, weight.dtype)
    if type(base) is not nn.Linear or not _is_plain(weight, bias):
        return _calls(base, f" with a {type(weight).__name__}")
    other = weight if bias is None else bias
    if x is None:
        return Base(weight, bias, weight.dtype)
    if weight.device != x.device or other.device != x.device:
        return _calls(base)
    if weight.dtype == other.dtype == x.dtype:
        return Base(weight, bias, x.dtype)
    if x.dtype != torch.float64 and autocast_dtype(x.device.type) is not None:
        return Base(weight, bias, weight.dtype)
    return _calls(base)


def _quantized_operand(base: Any, weight: Any, bias: Tensor | None, x: Tensor | None) -> Base | str | None:
    """As :func:`base_operand` for a 4-bit or float8 base layer, if the kernels compute the same product as the layer."""
    # The PyTorch backend would dequantize the weight in Python; the layer's own product is faster.
    if resolve_backend((weight if x is None else x).device) != "triton":
        return f"has a quantized weight, and without Triton its {type(base).__name__} computes the product"
    # bitsandbytes casts x with or without autocast. Its first call may choose the compute dtype and cast the bias in place.
    casts, computed = type(base) is not nn.Linear, getattr(base, "compute_dtype", weight.dtype)
    if x is None:
        return Base(weight, bias, computed)
    dtype = autocast_dtype(x.device.type) or x.dtype
    if computed != dtype or not (base.compute_type_is_set if casts else x.dtype == dtype):
        return None
    if bias is not None and (bias.dtype != dtype or bias.device != x.device):
        return None
    try:
        stored = read(weight)
    except (TypeError, ValueError):
        return None
    # bitsandbytes may have quantized the weight as [K, N].
    if stored.shape != (base.out_features, base.in_features) or stored.stored.data.device != x.device:
        return None
    return Base(stored, bias, dtype)


class Accelerated:
    """A mixin in front of a PEFT class. Calls that it does not support run that class's forward."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward: base_layer(x) plus the active adapters' branches, in the base layer's dtype."""
        plain = not self.disable_adapters and not self.merged and kwargs.get("adapter_names") is None
        if plain and not args and not kwargs:
            group = self.__dict__.get(ATTRIBUTE)
            if group is not None and (y := group.output(self, x)) is not None:
                return y
            if (y := _usual_output(self, x)) is not None or (y := _dora_output(self, x)) is not None:
                return y
        branches = branches_of(self, self.active_adapters, x) if plain else None
        if not branches:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        kwargs = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
        base = self._modules["base_layer"]
        operand = None if args or kwargs else base_operand(base, x)
        if isinstance(operand, Base):
            result = branches.pop(0).with_base(operand, x)
            if not isinstance(operand.weight, Tensor):
                # Quantized base layers return x's dtype, even under autocast.
                result = result.to(x.dtype)
        else:
            result = base(x, *args, **kwargs)
        for branch in branches:
            result = branch.add_to(result, x)
        return result

    def _mixed_batch_forward(self: Any, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Apply to each row the branch of its adapter. PEFT's forward has checked the names."""
        branches = {name: branches_of(self, [name], x) for name in dict.fromkeys(adapter_names)}
        if None in branches.values():
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)  # type: ignore[misc]
        kwargs = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
        result = self.base_layer(x, *args, **kwargs)
        for name, found in branches.items():
            # There is no branch for "__base__", nor for an adapter that this layer does not have.
            for branch in found or ():
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                result[rows] = branch.add_to(result[rows], x[rows])
        return result

    def _get_name(self) -> str:
        # A printed model must look the same.
        return ORIGINAL[type(self)].__name__


def compute_projection_group(layers: Sequence[Any], x: Tensor) -> list[Tensor] | None:
    """The outputs of layers that share the input ``x``, from one op; None if each layer must compute its own."""
    firsts, rests = [], []
    tensors: list[tuple[Any, ...]] = []
    for layer in layers:
        plain = not layer.disable_adapters and not layer.merged
        branches = branches_of(layer, layer.active_adapters, x) if plain else None
        operand = base_operand(layer._modules["base_layer"], x) if branches else None
        if not branches or not isinstance(operand, Base) or not isinstance(operand.weight, Tensor):
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
            result = branch.add_to(result, x)
        results.append(result)
    return results


def projection_group_key(layer: Any) -> tuple[Any, ...]:
    """Layers can form a projection group if their keys are equal. :func:`compute_projection_group` checks the rest."""
    base = layer.base_layer
    # A layer of another type gets a key of its own.
    return (layer.in_features, base.weight.dtype) if type(base) is nn.Linear else (id(layer),)


class AcceleratedLinear(Accelerated, lora.Linear):
    """``peft.tuners.lora.Linear``, over nn.Linear, its subclasses and transformers' Conv1D."""


class AcceleratedTorchaoLoraLinear(Accelerated, TorchaoLoraLinear):
    """``TorchaoLoraLinear``, over torchao's quantized weights."""


# Base layers that can be computed from their weight without calling them.
READABLE: tuple[type, ...] = (nn.Linear,)
KNOWN: dict[type, type] = {lora.Linear: AcceleratedLinear, TorchaoLoraLinear: AcceleratedTorchaoLoraLinear}

if hasattr(lora, "Linear8bitLt"):

    class AcceleratedLinear8bitLt(Accelerated, lora.Linear8bitLt):
        """``peft.tuners.lora.Linear8bitLt``, over bitsandbytes' 8-bit layers."""

    KNOWN[lora.Linear8bitLt] = AcceleratedLinear8bitLt

if hasattr(lora, "Linear4bit"):
    from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4

    class AcceleratedLinear4bit(Accelerated, lora.Linear4bit):
        """``peft.tuners.lora.Linear4bit``, over bitsandbytes' 4-bit layers."""

    KNOWN[lora.Linear4bit] = AcceleratedLinear4bit
    READABLE = (nn.Linear, Linear4bit, LinearNF4, LinearFP4)

ORIGINAL = {accelerated: original for original, accelerated in KNOWN.items()}
