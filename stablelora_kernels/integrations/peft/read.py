"""One reading of a PEFT LoRA layer: what its base layer and adapters compute on this library's ops,
or why PEFT's own forward must compute them. This module imports peft.

:func:`read` serves every reader: a layer's forward, PEFT's mixed batches, ``adapters_of_rows``,
projection groups, gated MLPs, the loss and the report. Its record tells the kind of the adapters:
:class:`Branches` of plain LoRA, or :class:`Dora`. Both kinds have the same methods, so no reader
asks which one it has. A new kind is a class with these methods that :func:`read` returns.

This code runs at every call of every layer, so it avoids nn.Module's slow ``__getattr__``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.functional import (
    FLOAT_DTYPES,
    LoRAWeights,
    lora_branch,
    lora_linear,
    lora_linear_if,
)
from stablelora_kernels.integrations.peft.dora import norms_of_rows
from stablelora_kernels.nn.operands import (
    PLAIN,
    Base,
    Operand,
    are_plain,
    casts,
    frozen_operand,
    is_readable,
    read_base,
)
from stablelora_kernels.ops.cpu_products import without_autocast
from stablelora_kernels.ops.dora import scale_columns
from stablelora_kernels.quantized import is_packed_for_cpu, is_quantized, reason_unreadable
from stablelora_kernels.utils.modules import is_hooked, weight_and_bias
from stablelora_kernels.utils.refusal import Refusal
from stablelora_kernels.utils.tensors import autocast_dtype, is_sharded


class PeftLayer(Protocol):
    """What this library reads of PEFT's LoRA layers."""

    # With "base_layer", "lora_A", "lora_B" and "lora_dropout"; the latter three hold a module an
    # adapter.
    _modules: dict[str, Any]
    in_features: int
    out_features: int
    scaling: dict[str, float]
    lora_dropout: nn.ModuleDict
    # The kind of each adapter that is not plain LoRA.
    lora_variant: dict[str, object]
    lora_magnitude_vector: nn.ModuleDict
    ephemeral_gpu_offload: bool

    @property
    def active_adapters(self) -> list[str]: ...

    @property
    def merged(self) -> bool: ...

    @property
    def disable_adapters(self) -> bool: ...


class Branch(NamedTuple):
    """One plain adapter's part of the output: scaling · (D(x) A^T B^T + bias)."""

    name: str
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    # Of now: 0 in evaluation.
    dropout_p: float
    dropout_p_in_training: float

    def fits(self, x: Tensor, features: int | None = None) -> bool:
        """Whether the ops accept ``x`` with the adapter. Otherwise PEFT casts x to the adapter's
        dtype, or raises its own error.

        ``features`` are those of the layer's input if that is not ``x`` but a tensor like it.
        """
        lora_A = self.lora_A
        dtype = lora_A.dtype
        x_dtype = x.dtype
        if x_dtype not in FLOAT_DTYPES or x.device != lora_A.device:
            return False
        # Not part of the reading: in a sharded model, parameters have other shapes between calls.
        in_features = x.shape[-1:] if features is None else (features,)
        if in_features != lora_A.shape[1:] or lora_A.shape[:1] != self.lora_B.shape[1:]:
            return False
        if torch.float64 in (x_dtype, dtype):
            return x_dtype == dtype and resolve_backend(x.device) == "torch"
        return dtype in (torch.float32, x_dtype) or autocast_dtype(x.device.type) is not None

    def output(self, base: nn.Module, x: Tensor) -> Tensor:
        """The base layer's output and the branch, in one op if the base layer can be read."""
        operand = read_base(base, x)
        if isinstance(operand, Refusal):
            return self.add_to(base(x), x)
        result = self.with_base(operand, x)
        # Quantized base layers return x's dtype, even under autocast.
        return result if isinstance(operand.weight, Tensor) else result.to(x.dtype)

    def add_to(self, base_out: Tensor, x: Tensor) -> Tensor:
        """``base_out`` with the branch of ``x``, in a tensor of its own."""
        if self.bias is not None:
            base_out = base_out + (self.scaling * self.bias).to(base_out.dtype)
        return lora_branch(base_out, x, self.lora_A, self.lora_B, self.scaling, self.dropout_p)

    def with_base(self, base: Base, x: Tensor) -> Tensor:
        """The base product and the branch, in one op."""
        bias = self.bias_with(base)
        return lora_linear(
            x, base.weight, bias, self.lora_A, self.lora_B, self.scaling, self.dropout_p
        )

    def bias_with(self, base: Base) -> Tensor | None:
        """The biases of the base layer and of lora_B in one."""
        if self.bias is None:
            return base.bias
        bias = self.scaling * self.bias
        if base.bias is not None:
            bias = base.bias + bias
        return bias.to(base.dtype)


class Branches(NamedTuple):
    """A base layer with the branches of plain adapters: none, one, or several that add up."""

    base: nn.Module
    branches: tuple[Branch, ...]

    def output(self, x: Tensor) -> Tensor | Refusal:
        """The layer's output for ``x``, or why PEFT's own forward must compute it."""
        operand = self.usual_operand()
        if operand is not None:
            # Once calls of this kind are known to fit, the op's own key says so.
            def fits() -> bool:
                reading = self.operand(x)
                if isinstance(reading, Refusal) or reading.weights.lora_A is None:
                    return False
                return x.shape[-1:] == reading.weights.lora_A.shape[1:]

            y = lora_linear_if(fits, x, operand.weights, operand.dropout_p or 0.0)
            if y is not None:
                return y
        branches = self.to_add(x)
        if isinstance(branches, Refusal):
            return branches
        if not branches:
            return NO_ADAPTER
        first, *others = branches
        y = first.output(self.base, x)
        for branch in others:
            y = branch.add_to(y, x)
        return y

    def to_add(self, x: Tensor) -> tuple[Branch, ...] | Refusal:
        """The branches to add to a base product of ``x`` that is computed elsewhere, or why they
        cannot be added.
        """
        fit = all(branch.fits(x) for branch in self.branches)
        return self.branches if fit else _not_fitting(x)

    def usual_operand(self) -> Operand | None:
        """The operand of one adapter on a plain base layer, whatever its input; None otherwise."""
        if len(self.branches) != 1 or self.branches[0].bias is not None:
            return None
        tensors = plain_tensors(self.base)
        if tensors is None:
            return None
        weight, bias = tensors
        branch = self.branches[0]
        weights = LoRAWeights(weight, bias, branch.lora_A, branch.lora_B, branch.scaling)
        return Operand(weights, branch.dropout_p, None)

    def operand(self, x: Tensor | None) -> Operand | Refusal:
        """As :func:`~stablelora_kernels.nn.operands.read_layer`, of an enabled layer."""
        base = read_base(self.base, x)
        if isinstance(base, Refusal):
            return base
        if not self.branches:
            return frozen_operand(base, x)
        first, *others = self.branches
        bias = base.bias
        dropout_p = first.dropout_p_in_training
        if x is not None:
            if not all(branch.fits(x, base.weight.shape[-1]) for branch in self.branches):
                return Refusal("has an adapter that does not fit its input")
            dropout_p = first.dropout_p
            bias = first.bias_with(base)
        weights = LoRAWeights(base.weight, bias, first.lora_A, first.lora_B, first.scaling)
        return Operand(
            weights,
            dropout_p,
            base.dtype,
            tuple(others),
            self._reason_against_mlp(),
            casts(base, x),
        )

    def _reason_against_mlp(self) -> str | None:
        """Why a gated MLP does not take these branches, though a projection group does."""
        if len(self.branches) > 1:
            names = ", ".join(repr(branch.name) for branch in self.branches)
            return f"has {len(self.branches)} active adapters, {names}"
        if self.branches[0].bias is not None:
            return f"has a bias in lora_B of adapter {self.branches[0].name!r}, which trains"
        return None

    def reason_against_training(self) -> str | None:
        """Why PEFT's own forward must compute the adapter in training, or None."""
        return None


class Dora(NamedTuple):
    """A base layer with a DoRA adapter: its branch and its magnitude [N]."""

    base: nn.Module
    branch: Branch
    magnitude: Tensor

    def output(self, x: Tensor) -> Tensor | Refusal:
        """(m / n) (Z - bias) + bias in the dtype of the base layer's output, for that output and
        the branch, Z. A new adapter has B = 0 and, beside float32 weights, m = n: the output is
        then the base layer's.
        """
        branch = self.branch
        if branch.dropout_p:
            return Refusal(self._reason_against_dropout())
        if not branch.fits(x):
            return _not_fitting(x)
        operand = read_base(self.base, x)
        if isinstance(operand, Base):
            z = branch.with_base(operand, x)
            # Quantized base layers return x's dtype, even under autocast.
            dtype = z.dtype if isinstance(operand.weight, Tensor) else x.dtype
        else:
            base_out = self.base(x)
            z = branch.add_to(base_out, x)
            dtype = base_out.dtype
        # Norms need the digits of the weights, which autocast would take from them.
        with torch.no_grad(), without_autocast(x):
            norms = self.norms()
        return scale_columns(z, self.magnitude / norms, weight_and_bias(self.base)[1]).to(dtype)

    def norms(self) -> Tensor:
        """n [N]: the norms of the rows of W + s B A."""
        branch = self.branch
        return norms_of_rows(
            self.base, branch.lora_A, branch.lora_B, branch.scaling, self.magnitude
        )

    def to_add(self, x: Tensor) -> tuple[Branch, ...] | Refusal:
        """As :meth:`Branches.to_add`."""
        return Refusal("DoRA is in one op with the base layer alone")

    def usual_operand(self) -> Operand | None:
        """As :meth:`Branches.usual_operand`."""
        return None

    def operand(self, x: Tensor | None) -> Operand | Refusal:
        """As :meth:`Branches.operand`."""
        reason = self.reason_against_training()
        if reason is not None:
            return Refusal(f"runs PEFT's own forward: {reason}")
        return Refusal(f"computes adapter {self.branch.name!r}, which is DoRA, by itself")

    def reason_against_training(self) -> str | None:
        """As :meth:`Branches.reason_against_training`."""
        return self._reason_against_dropout() if self.branch.dropout_p_in_training else None

    def _reason_against_dropout(self) -> str:
        return (
            f"adapter {self.branch.name!r} is DoRA with dropout, which needs the base product of two inputs to train; "
            "evaluation runs on the ops"
        )


# Why PEFT's own forward computes a call.
OBSERVED = Refusal("its modules are observed")
NO_ADAPTER = Refusal("no adapter is active")


def _not_fitting(x: Tensor) -> Refusal:
    return Refusal(f"the adapter does not fit x of {x.dtype} on {x.device.type}")


def read(
    layer: PeftLayer, names: Iterable[str], between_calls: bool = False
) -> Branches | Dora | Refusal:
    """The base layer with those adapters of ``names`` that the layer has, with the dropout of now;
    or why PEFT's own forward must compute them.

    ``between_calls``: its tensors may be shards, for which ``fully_shard`` puts plain tensors
    during each forward.
    """
    modules = layer._modules
    held = modules["lora_A"]._modules
    branches: list[Branch] = []
    doras: list[Dora] = []
    for name in names:
        if name not in held:
            continue
        if name not in layer.lora_variant:
            branch = read_branch(layer, name, between_calls)
            if isinstance(branch, Refusal):
                return branch
            branches.append(branch)
            continue
        dora = read_dora(layer, name, between_calls)
        if isinstance(dora, Refusal):
            return dora
        doras.append(dora)
    if not doras:
        return Branches(modules["base_layer"], tuple(branches))
    if branches or len(doras) > 1:
        return Refusal(f"adapter {doras[0].branch.name!r} is DoRA beside another active adapter")
    return doras[0]


def read_branch(layer: PeftLayer, adapter: str, between_calls: bool = False) -> Branch | Refusal:
    """An adapter's branch, with the dropout of now, or why PEFT's own forward must compute it.

    ``between_calls`` as in :func:`read`.
    """
    modules = layer._modules
    tensors_of_A = plain_tensors(modules["lora_A"]._modules[adapter], between_calls)
    tensors_of_B = plain_tensors(modules["lora_B"]._modules[adapter], between_calls)
    if tensors_of_A is None or tensors_of_B is None:
        name = "lora_A" if tensors_of_A is None else "lora_B"
        return Refusal(f"{name} of adapter {adapter!r} is not a plain nn.Linear, or has hooks")
    lora_A, bias_of_A = tensors_of_A
    lora_B, bias = tensors_of_B
    if bias_of_A is not None or lora_A.dtype != lora_B.dtype:
        return Refusal(f"lora_A of adapter {adapter!r} has a bias, or another dtype than lora_B")
    dropout = modules["lora_dropout"]._modules[adapter]
    kind = type(dropout)
    if (kind is not nn.Identity and kind is not nn.Dropout) or is_hooked(dropout):
        return Refusal(f"the dropout of adapter {adapter!r} is a {kind.__name__}, or has hooks")
    if kind is nn.Dropout and dropout.p >= 1:
        return Refusal(f"the dropout of adapter {adapter!r} drops everything")
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, (int, float)):
        return Refusal(
            f"the scaling of adapter {adapter!r} is a {type(scaling).__name__}, not a number"
        )
    p = dropout.p if kind is nn.Dropout else 0.0
    dropout_p = p if dropout.training else 0.0
    return Branch(adapter, lora_A, lora_B, bias, scaling, dropout_p, p)


def is_dora(layer: PeftLayer, adapter: str) -> bool:
    """Whether an adapter is DoRA of a linear layer."""
    return type(layer.lora_variant.get(adapter)) is DoraLinearVariant


def read_dora(layer: PeftLayer, adapter: str, between_calls: bool = False) -> Dora | Refusal:
    """An adapter that is not plain, if it is DoRA; or why PEFT's own forward must compute it.

    ``between_calls`` as in :func:`read`.
    """
    if not is_dora(layer, adapter):
        kind = type(layer.lora_variant[adapter]).__name__
        return Refusal(f"adapter {adapter!r} is a variant of LoRA ({kind})")
    branch = read_branch(layer, adapter, between_calls)
    if isinstance(branch, Refusal):
        return branch
    magnitude = layer.lora_magnitude_vector[adapter]
    if (
        type(magnitude) is not DoraLinearLayer
        or is_hooked(magnitude)
        or layer.ephemeral_gpu_offload
    ):
        return Refusal(
            f"adapter {adapter!r} is DoRA with hooks, or with a weight on another device"
        )
    base = layer._modules["base_layer"]
    if not is_readable(base) or is_hooked(base):
        return Refusal(
            f"adapter {adapter!r} is DoRA on a {type(base).__name__}, or on a layer with hooks"
        )
    weight, bias = weight_and_bias(base)
    if is_quantized(weight):
        # Products alone read a weight that bitsandbytes has packed for a CPU.
        reason = None if is_packed_for_cpu(weight) else reason_unreadable(weight)
        if reason is not None:
            return Refusal(f"adapter {adapter!r} is DoRA, and {reason}")
    elif not is_sharded(weight) and not are_plain(weight, bias):
        return Refusal(f"adapter {adapter!r} is DoRA on a {type(weight).__name__}")
    return Dora(base, branch, magnitude.weight)


def plain_tensors(
    linear: nn.Module, between_calls: bool = False
) -> tuple[Tensor, Tensor | None] | None:
    """The weight and the bias of a plain ``nn.Linear`` that nothing watches; None for another
    module.

    ``between_calls``: they may be shards, for which ``fully_shard`` puts plain tensors during each
    forward.
    """
    # Not by is_hooked() and are_plain(): this runs three times in each call of a layer.
    if type(linear) is not nn.Linear:
        return None
    attributes = linear.__dict__
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    ):
        return None
    weight, bias = weight_and_bias(linear)
    if type(weight) in PLAIN and (bias is None or type(bias) in PLAIN):
        return weight, bias
    if between_calls and is_sharded(weight):
        return weight, bias
    return None


def is_observed(layer: object) -> bool:
    """Whether global hooks or tracing must see every module's call. PEFT can also be told not to
    cast the input.
    """
    return (
        _has_any_global_hook()
        or torch.jit.is_tracing()
        or not getattr(layer, "cast_input_dtype_enabled", True)
    )
