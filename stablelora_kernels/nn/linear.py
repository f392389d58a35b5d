"""``LoRALinear``: ``nn.Linear`` with a LoRA branch, computed by the fused op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import FLOAT_DTYPES, lora_linear, lora_linear_group
from stablelora_kernels.nn.merging import Mergeable
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from stablelora_kernels.utils.validation import check_float, check_int

INITS = (True, False, "gaussian")


def _check_init(init_lora_weights: Any) -> None:
    # By identity: 0 and 1 equal False and True, and would not be treated as such.
    if not (isinstance(init_lora_weights, bool) or init_lora_weights == "gaussian"):
        raise ValueError(f"init_lora_weights must be one of {INITS}, got {init_lora_weights!r}")


def sizes_of(base: Any) -> tuple[int, int]:
    """Input and output features of an ``nn.Linear`` or a ``Conv1D``."""
    return (base.nx, base.nf) if hasattr(base, "nf") else (base.in_features, base.out_features)


class LoRALinear(Mergeable):
    """A frozen linear layer with a trainable low-rank branch: ``y = x W^T + bias + scaling · D(x) A^T B^T``.

    ``D`` is inverted dropout, on the branch only and in training mode only. ``scaling`` is ``lora_alpha / r``, or
    ``lora_alpha / sqrt(r)`` with ``use_rslora``.

    Args:
        in_features: K, as in ``nn.Linear``.
        out_features: N, as in ``nn.Linear``.
        bias: whether there is a bias, which is frozen too.
        r: rank of the branch, at least 1.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an element of the branch's input, in [0, 1).
        use_rslora: rank-stabilized scaling.
        init_lora_weights: True for kaiming-uniform A and zero B; "gaussian" for A normal with standard deviation 1/r and
            zero B; False for both kaiming-uniform, so that the branch is not zero at the start (PEFT's meanings).
        lora_dtype: dtype of A and B: float32, or the same as the weight's. A float32 A and B beside a bfloat16 or float16
            weight are cast as they are used; no float32 copy of the activations is made.
        device: of all parameters.
        dtype: of the frozen weight and bias. Beside float64 A and B are float64 too.

    Attributes:
        weight: [out_features, in_features], frozen.
        bias: [out_features], frozen, or None.
        lora_A: [r, in_features], trainable.
        lora_B: [out_features, r], trainable.
        scaling: s, a float.
        merged: whether the weight holds the branch.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind, naming it and its value.
    """

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
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._setup(base, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype = torch.float32,
    ) -> LoRALinear:
        """A LoRALinear over an existing layer. It shares the layer's weight and bias, which it freezes; nothing is copied.

        Over a layer of bitsandbytes in 4 bits, or one whose weight torchao keeps in float8 with a scale a row, it is a
        :class:`~stablelora_kernels.nn.quantized.LoRAQuantizedLinear`; over transformers' ``Conv1D`` a
        :class:`~stablelora_kernels.nn.conv1d.LoRAConv1D`; over bitsandbytes' ``Linear8bitLt`` and weights of any other kind of
        tensor a :class:`~stablelora_kernels.nn.branch.LoRABranchLinear`, which has the layer compute its own product.

        Raises:
            TypeError: ``linear`` is none of these.
            ValueError: it gives its input no gradient.
            ValueError, TypeError: as the constructor's, before the layer is frozen.
        """
        from stablelora_kernels.nn.factory import class_for

        cls = class_for(linear)
        self = cls.__new__(cls)
        self._setup(linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_dtype)
        self.train(linear.training)
        return self

    def _setup(
        self,
        base: Any,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        lora_dtype: torch.dtype,
    ) -> None:
        check_int("r", r, minimum=1)
        check_float("lora_alpha", lora_alpha)
        check_float("lora_dropout", lora_dropout, low=0.0, high=1.0)
        _check_init(init_lora_weights)
        dtype = self._dtype_of(base)
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"weight must be of a floating-point dtype, got {dtype}")
        if lora_dtype not in (torch.float32, dtype):
            raise TypeError(f"lora_dtype must be torch.float32 or the weight's {dtype}, got {lora_dtype}")
        if dtype == torch.float64:
            # A float32 branch would throw away what someone chose float64 for.
            lora_dtype = torch.float64
        super().__init__()
        self.in_features, self.out_features = sizes_of(base)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, float(lora_dropout)
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self._start_unmerged()
        for frozen in base.parameters():
            frozen.requires_grad_(False)
        self._hold(base)
        factory: dict[str, Any] = {"device": base.weight.device, "dtype": lora_dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **factory))
        self.reset_lora_parameters(init_lora_weights)

    def _hold(self, base: Any) -> None:
        self.weight = cast(nn.Parameter, base.weight)
        self.register_parameter("bias", base.bias)

    @staticmethod
    def _dtype_of(base: Any) -> torch.dtype:
        """The dtype that a layer computes in."""
        return base.weight.dtype

    def to_linear(self) -> nn.Module:
        """A layer without the branch that holds the weight, merged or not, and the bias; they are shared."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Draw A and B anew; ``init_lora_weights`` as in the constructor."""
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
        """``x`` [..., in_features] to [..., out_features], in x's dtype (autocast's where that is on).

        Raises:
            RuntimeError: the layer is merged, in training mode with gradients on, where A and B would get none.
            ValueError, TypeError, RuntimeError: as :func:`~stablelora_kernels.functional.lora_linear`.
        """
        if (group := self.__dict__.get(ATTRIBUTE)) is not None and (y := group.output(self, x)) is not None:
            return y
        if self.merged:
            if self.training and torch.is_grad_enabled() and self.lora_A.requires_grad:
                raise RuntimeError(
                    "this LoRALinear is merged, so lora_A and lora_B would get no gradient; unmerge() first"
                )
            return nn.functional.linear(x, self._matrix(), self.bias)
        return lora_linear(
            x, self._matrix(), self.bias, self.lora_A, self.lora_B, self.scaling, self.lora_dropout, self.training
        )

    def _matrix(self) -> Tensor:
        """The weight as [out_features, in_features]."""
        return self.weight

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, r={self.r}"
        text += f", scaling={self.scaling:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        return text + (", merged" if self.merged else "")


def compute_together(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...] | None:
    """The outputs of layers with one input, in one op; None where each has to compute, or to complain, by itself."""
    autocast = torch.is_autocast_enabled(x.device.type)
    first = layers[0]
    for layer in layers:
        tensors = (layer.weight, layer.lora_A, layer.lora_B, *(() if layer.bias is None else (layer.bias,)))
        # As long as FSDP has not gathered them, they are DTensors.
        if any(type(t) not in (nn.Parameter, Tensor) or t.device != x.device for t in tensors):
            return None
        if layer.merged or layer.training != first.training or layer.lora_dropout != first.lora_dropout:
            return None
        if x.shape[-1:] != layer.weight.shape[1:] or not (autocast or x.dtype == layer.weight.dtype):
            return None
    return lora_linear_group(
        x,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
        [layer.lora_A for layer in layers],
        [layer.lora_B for layer in layers],
        [layer.scaling for layer in layers],
        first.lora_dropout,
        first.training,
    )


def alike(layer: LoRALinear) -> tuple[Any, ...]:
    """What layers must have in common to be computed together."""
    return (layer.in_features, layer.weight.dtype, layer.lora_A.dtype, layer.lora_dropout)
