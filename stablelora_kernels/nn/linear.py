"""``LoRALinear``: a frozen linear layer with a trainable LoRA branch, computed by the fused op.

What it calls: :func:`~stablelora_kernels.functional.lora_linear`, whose autograd function is in
``ops/lora_linear/autograd.py``, and with ``fuse_projections`` the group in ``nn/projection_group.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import FLOAT_DTYPES, LoRAWeights, lora_linear
from stablelora_kernels.nn.operands import Operand, are_plain, reason_against_tensors
from stablelora_kernels.nn.projection_group import ATTRIBUTE, ProjectionGroup
from stablelora_kernels.quantized import QuantizedWeight, is_quantized, read
from stablelora_kernels.utils.refusal import Refusal
from stablelora_kernels.utils.tensors import autocast_dtype, is_sharded
from stablelora_kernels.utils.validation import check_bool, check_float, check_int


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank branch: ``y = x W^T + bias + scaling · D(x)
    A^T B^T``.

    ``D`` is inverted dropout, on the branch only and in training mode only. ``scaling`` is
    ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.

    Args:
        in_features: K, as in ``nn.Linear``.
        out_features: N, as in ``nn.Linear``.
        bias: whether to add a bias, which is frozen too.
        r: rank of the branch, at least 1.
        lora_alpha: numerator of the scaling; PEFT's default is 8.
        lora_dropout: probability of dropping an element of the branch's input, in [0, 1).
        use_rslora: rank-stabilized scaling.
        init_lora_weights: how to initialize A and B, as in PEFT. True: A kaiming-uniform, B zero.
            "gaussian": A normal with standard deviation 1/r, B zero. False: both kaiming-uniform,
            so the branch starts non-zero.
        lora_dtype: dtype of A and B: float32 or the weight's. With a bfloat16 or float16 weight,
            the kernels cast float32 A and B on the fly; no float32 copy of the activations is made.
        device: device of all parameters.
        dtype: dtype of the frozen weight and bias. If it is float64, A and B are float64 too.

    Attributes:
        weight: [out_features, in_features], frozen; of a quantized layer, bitsandbytes' or
            torchao's parameter.
        bias: [out_features], frozen, or None.
        lora_A: [r, in_features], trainable.
        lora_B: [out_features, r], trainable.
        scaling: s, a float.
        merged: whether the weight contains the branch.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the message names
            it and its value.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("in_features", in_features, minimum=1)
        check_int("out_features", out_features, minimum=1)
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._put_on(linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype = torch.float32,
    ) -> LoRALinear:
        """Put a LoRA branch on an existing layer. The new layer shares and freezes its weight and
        bias; nothing is copied.

        ``linear`` is an ``nn.Linear`` with a plain weight, torchao's float8 weight with one scale a
        row, or its NVFP4 or MXFP4; or bitsandbytes' ``Linear4bit`` in NF4 or FP4. The layer over
        ``Linear4bit`` computes in its ``compute_dtype``, or in its input's dtype if that is not set.
        For any other layer, such as transformers' ``Conv1D`` or 8-bit ones, use PEFT and
        :func:`~stablelora_kernels.accelerate_peft`.

        Raises:
            TypeError: ``linear`` is none of these; the message says why.
            ValueError, TypeError: as the constructor. The layer is not frozen then.
        """
        reason = reason_against_lora(linear)
        if reason is not None:
            raise TypeError(f"linear must be one that LoRALinear can read, but it {reason}")
        layer = cls.__new__(cls)
        layer._put_on(
            linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_dtype
        )
        return layer.train(linear.training)

    def _put_on(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        lora_dtype: torch.dtype,
    ) -> None:
        """Initialize this layer over ``linear``."""
        check_int("r", r, minimum=1)
        check_float("lora_alpha", lora_alpha)
        check_float("lora_dropout", lora_dropout, low=0.0, high=1.0)
        check_bool("use_rslora", use_rslora)
        _check_init(init_lora_weights)
        # That of bitsandbytes' layers; None stands for the input's dtype.
        compute_dtype: torch.dtype | None = getattr(linear, "compute_dtype", None)
        dtype = linear.weight.dtype
        if hasattr(linear, "compute_dtype"):
            dtype = compute_dtype or torch.float32
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"weight must be of a floating-point dtype, got {dtype}")
        if lora_dtype not in (torch.float32, dtype):
            raise TypeError(
                f"lora_dtype must be torch.float32 or the weight's {dtype}, got {lora_dtype}"
            )
        if dtype == torch.float64:
            # A float32 branch would lose the precision that float64 was chosen for.
            lora_dtype = torch.float64
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = float(lora_dropout)
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.compute_dtype = compute_dtype
        self.merged = False
        # While merged, the Parameter that merge() replaced. It is not registered: state_dict() and
        # parameters() must not list it.
        self.__dict__["_unmerged_weight"] = None
        # Whether a block of disable_lora is open.
        self._disabled = False
        self.weight = cast(nn.Parameter, linear.weight)
        self.register_parameter("bias", linear.bias)
        factory: dict[str, Any] = {"device": linear.weight.device, "dtype": lora_dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **factory))
        self.reset_lora_parameters(init_lora_weights)
        for frozen in linear.parameters():
            frozen.requires_grad_(False)

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Initialize A and B again; ``init_lora_weights`` is as in the constructor."""
        _check_init(init_lora_weights)
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in_features] to [..., out_features], in x's dtype or, under autocast, in
        autocast's.

        Raises:
            RuntimeError: the layer is merged and in training mode with gradients enabled, so A and
                B would get no gradient.
            ValueError, TypeError, RuntimeError: as
                :func:`~stablelora_kernels.functional.lora_linear`.
        """
        if self._disabled:
            return self._base_output(x)
        group: ProjectionGroup | None = self.__dict__.get(ATTRIBUTE)
        if group is not None and (y := group.output(self, x)) is not None:
            return y
        if self.merged:
            if self.training and torch.is_grad_enabled() and self.lora_A.requires_grad:
                raise RuntimeError(
                    "this LoRALinear is merged, so lora_A and lora_B would get no gradient; unmerge() first"
                )
            return nn.functional.linear(x, self.weight, self.bias)
        weight, bias, lora_A, lora_B = parameters_of(self)
        if not is_quantized(weight):
            return lora_linear(
                x, weight, bias, lora_A, lora_B, self.scaling, self.lora_dropout, self.training
            )
        dtype = self._product_dtype(x)
        y = lora_linear(
            x.to(dtype),
            read(weight),
            None if bias is None else bias.to(dtype),
            lora_A,
            lora_B,
            self.scaling,
            self.lora_dropout,
            self.training,
        )
        return y if autocast_dtype(x.device.type) is not None else y.to(x.dtype)

    def _base_output(self, x: Tensor) -> Tensor:
        """The output of the frozen layer, merged or not: that of ``forward`` in ``disable_lora``."""
        weight = self.frozen_weight
        if not hasattr(weight, "quant_state"):
            # torchao's weights have a product of their own.
            return nn.functional.linear(x, weight, self.bias)
        dtype = self._product_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = nn.functional.linear(x.to(dtype), read(weight).dequantize(dtype), bias)
        return y.to(x.dtype)

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which a quantized layer computes ``x``."""
        return autocast_dtype(x.device.type) or self.compute_dtype or x.dtype

    # For ops over several layers

    def read_operand(self, x: Tensor | None) -> Operand | Refusal:
        """What :func:`~stablelora_kernels.nn.operands.read_layer` finds."""
        if self.merged:
            return Refusal("is merged")
        if self._disabled:
            return Refusal("is disabled")
        weight, bias, lora_A, lora_B = parameters_of(self)
        dropout_p = self.lora_dropout if self.training or x is None else 0.0
        if is_quantized(weight):
            stored = read(weight)
            # A 4-bit layer would cast x to the dtype that it was told, and its result back.
            dtype = self.compute_dtype
            tensors = (stored.stored.data, bias, lora_A, lora_B)
            if x is not None and bias is not None:
                bias = bias.to(x.dtype)
            weights = LoRAWeights(stored, bias, lora_A, lora_B, self.scaling)
        else:
            dtype = weight.dtype
            tensors = (weight, bias, lora_A, lora_B)
            weights = LoRAWeights(weight, bias, lora_A, lora_B, self.scaling)
        reason = reason_against_tensors(self, tensors, dtype, x)
        return Operand(weights, dropout_p, dtype) if reason is None else Refusal(reason)

    def read_usual_operand(self) -> Operand | None:
        """What :func:`~stablelora_kernels.nn.operands.read_usual_layer` finds."""
        if self.merged or self._disabled:
            return None
        weight, bias, lora_A, lora_B = parameters_of(self)
        if not (are_plain(weight, bias) and are_plain(lora_A, lora_B)):
            return None
        weights = LoRAWeights(weight, bias, lora_A, lora_B, self.scaling)
        return Operand(weights, self.lora_dropout if self.training else 0.0, None)

    # Merging

    @property
    def frozen_weight(self) -> nn.Parameter:
        """``weight``; while the layer is merged, the Parameter that :meth:`unmerge` will restore."""
        return self.__dict__["_unmerged_weight"] if self.merged else self.weight

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling · B A`` [out_features, in_features] in float32 (float64 for a float64 layer)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Add the branch to the weight: ``W + scaling · B A``, in float32, rounded once to the
        weight's dtype.

        The merged weight is a new Parameter. A module that shares the frozen one, such as a tied
        embedding, keeps it; the two are untied until :meth:`unmerge` restores the frozen one bit
        for bit. Keeping it takes one weight's memory until then. ``state_dict`` holds the frozen
        weight, A and B all the time.

        Raises:
            RuntimeError: the layer is already merged.
            ValueError: the weight is quantized, where the sum would have to be quantized anew, or
                sharded, or the merged weight would not be finite. Nothing is changed then.
        """
        if self.merged:
            raise RuntimeError("this LoRALinear is merged already")
        weight = self.weight
        if is_quantized(weight) or is_sharded(weight):
            raise ValueError(
                f"weight must be a plain one to be merged, got a {type(weight).__name__}"
            )
        delta = self.delta_weight()
        merged = delta.add_(weight).to(weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(
                "merging would give a weight that is not finite; check lora_A, lora_B and weight for nan or inf"
            )
        self.__dict__["_unmerged_weight"] = weight
        self.weight = nn.Parameter(merged, requires_grad=False)
        self.merged = True

    def unmerge(self) -> None:
        """Undo :meth:`merge` exactly.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if not self.merged:
            raise RuntimeError("this LoRALinear is not merged")
        self.weight = self.frozen_weight
        self.__dict__["_unmerged_weight"] = None
        self.merged = False

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` that shares the weight, merged or not, and the bias: to save a merged
        model without LoRA.

        Raises:
            ValueError: the weight is quantized.
        """
        if is_quantized(self.weight):
            raise ValueError(
                f"weight must be a plain one for an nn.Linear, got a {type(self.weight).__name__}"
            )
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    # nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        # .to(), .half() and the like must also move the weight that unmerge() will restore.
        super()._apply(fn, recurse)
        if self.merged:
            with torch.no_grad():
                self.frozen_weight.data = fn(self.frozen_weight.data)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.frozen_weight
        if self.merged:
            # Loading a merged weight together with A and B would apply the branch twice.
            destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()
        quant_state = getattr(weight, "quant_state", None)
        if quant_state is not None:
            # Linear4bit saves its quant_state the same way.
            for key, value in quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            name = prefix.rstrip(".") or "this LoRALinear"
            error_msgs.append(f"{name} is merged; unmerge() before loading into it")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is not in the block of disable_lora that its original is in.
        super().__setstate__({**state, "_disabled": False})

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, r={self.r}"
        text += f", scaling={self.scaling:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        if is_quantized(self.weight):
            text += f", {type(self.weight).__name__}"
        return text + (", merged" if self.merged else "")


def parameters_of(layer: LoRALinear) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Weight, bias, A and B of a layer, at each call of it."""
    parameters = layer._parameters
    try:
        # nn.Module's __getattr__ takes longer than the rest of a call's Python.
        return parameters["weight"], parameters["bias"], parameters["lora_A"], parameters["lora_B"]  # type: ignore[return-value]
    except KeyError:
        # FSDP and parametrizations replace them by plain attributes.
        return layer.weight, layer.bias, layer.lora_A, layer.lora_B


def reason_against_lora(linear: object) -> str | None:
    """Why :class:`LoRALinear` cannot stand for a layer, in words behind "it", or None."""
    kind = type(linear).__name__
    if not isinstance(linear, nn.Linear):
        return f"is a {kind}, not an nn.Linear; use PEFT and accelerate_peft"
    weight = getattr(linear, "weight", None)
    if weight is None:
        return "has no weight, as compressed-tensors' layers before the model's first forward; see keep_in_4_bits"
    if kind == "Linear8bitLt" or (type(linear) is not nn.Linear and not is_quantized(weight)):
        return (
            f"is a {kind}, which may compute more than a linear layer; use PEFT and accelerate_peft"
        )
    if is_quantized(weight):
        try:
            stored: QuantizedWeight = read(weight)
        except (TypeError, ValueError) as error:
            return f"has a weight that the kernels cannot read: {error}"
        if stored.shape != (linear.out_features, linear.in_features):
            return f"has a weight that is stored as {list(stored.shape)}, not [out_features, in_features]"
        return None
    if is_sharded(weight):
        return "has a weight that is sharded; put LoRA on before fully_shard"
    for name, tensor in (("weight", weight), ("bias", linear.bias)):
        if tensor is not None and type(tensor) is not nn.Parameter:
            return f"has a {name} that is a {type(tensor).__name__}; use PEFT and accelerate_peft"
    return None


def _check_init(init_lora_weights: Any) -> None:
    """Raise ValueError unless it is True, False or "gaussian"."""
    # isinstance, since 0 and 1 equal False and True.
    if not isinstance(init_lora_weights, bool) and init_lora_weights != "gaussian":
        raise ValueError(
            f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}"
        )
