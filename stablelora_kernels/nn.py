"""``LoRALinear``: ``nn.Linear`` with a LoRA branch, computed by the fused op."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from stablelora_kernels._checks import check_float, check_int
from stablelora_kernels.functional import FLOAT_DTYPES, lora_linear, lora_linear_group
from stablelora_kernels.sharing import ATTRIBUTE

INITS = (True, False, "gaussian")


def _check_init(init_lora_weights: Any) -> None:
    # By identity: 0 and 1 equal False and True, and would not be treated as such.
    if not (isinstance(init_lora_weights, bool) or init_lora_weights == "gaussian"):
        raise ValueError(f"init_lora_weights must be one of {INITS}, got {init_lora_weights!r}")


def sizes_of(base: Any) -> tuple[int, int]:
    """Input and output features of an ``nn.Linear`` or a ``Conv1D``."""
    return (base.nx, base.nf) if hasattr(base, "nf") else (base.in_features, base.out_features)


# So many elements at a time are added, which bounds the float32 copies that merging takes beside the result.
_MERGE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class MergeError:
    """What a merged weight, as it is stored, lacks to ``W + scaling · B A``.

    Attributes:
        largest_error: the largest difference of an element.
        largest_delta: the largest element of ``scaling · B A``, by magnitude.
    """

    largest_error: float
    largest_delta: float

    @property
    def relative(self) -> float:
        """``largest_error / largest_delta``, which is 1 where the largest change was rounded away whole, 0 where nothing was."""
        if self.largest_delta == 0:
            return math.inf if self.largest_error else 0.0
        return self.largest_error / self.largest_delta

    def __str__(self) -> str:
        return f"largest error {self.largest_error:.3g}, {self.relative:.3g} of the largest change {self.largest_delta:.3g}"


class LoRALinear(nn.Module):
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
        use_rslora: rank-stabilised scaling.
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

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter

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
        :class:`~stablelora_kernels.nn_quantised.LoRAQuantisedLinear`; over transformers' ``Conv1D`` a
        :class:`~stablelora_kernels.nn_bases.LoRAConv1D`; over bitsandbytes' ``Linear8bitLt`` and weights of any other kind of
        tensor a :class:`~stablelora_kernels.nn_bases.LoRABranchLinear`, which has the layer compute its own product.

        Raises:
            TypeError: ``linear`` is none of these.
            ValueError: it gives its input no gradient.
            ValueError, TypeError: as the constructor's, before the layer is frozen.
        """
        from stablelora_kernels.nn_bases import class_for

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
        self.merged = False
        # While merged: the Parameter that merge() replaced. Not registered, so state_dict and parameters() do not list it.
        self.__dict__["_unmerged_weight"] = None
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

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling · B A`` [out_features, in_features] in float32 (float64 for a float64 layer)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    @torch.no_grad()
    def merge(self) -> MergeError:
        """Fold the branch into the weight: ``W + scaling · B A``, added in float32 and rounded once to the weight's dtype.

        The merged weight is a new Parameter, so that a module that shares the frozen one (a tied embedding) keeps that: the
        two are untied until :meth:`unmerge`, which gives the frozen one back bit for bit. Keeping it costs one weight's memory
        until then. ``state_dict`` holds the frozen one all the while, beside A and B.

        Returns:
            The error that rounding made, as :meth:`merge_error` gives it.

        Raises:
            RuntimeError: the layer is merged already.
            ValueError: the merged weight would not be finite; nothing is changed.
        """
        if self.merged:
            raise RuntimeError("this LoRALinear is merged already")
        merged, delta = torch.empty_like(self.weight), self._stored_delta()
        for out, weight, change in self._merge_rows(merged, self.weight, delta):
            out.copy_(weight.to(delta.dtype) + change)
        if not self._all_finite(merged):
            raise ValueError(
                "merging would give a weight that is not finite; check lora_A, lora_B and weight for nan or inf"
            )
        self.__dict__["_unmerged_weight"] = self.weight
        self.weight = nn.Parameter(merged, requires_grad=False)
        self.merged = True
        return self._merge_error(delta)

    def merge_error(self) -> MergeError:
        """How far the merged weight, as it is now, is from ``W + scaling · B A`` with W, A and B as they are now.

        The differences are against the exact sum of W and ``scaling · B A`` rounded to float32 (to float64 for a float64
        layer), so that a change too small for a float32 weight shows too.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if not self.merged:
            raise RuntimeError("this LoRALinear is not merged")
        return self._merge_error(self._stored_delta())

    def _all_finite(self, matrix: Tensor) -> bool:
        return bool(torch.isfinite(matrix).all())

    def _merge_error(self, delta: Tensor) -> MergeError:
        return MergeError(*(value.item() for value in self._merge_error_of(delta)))

    @torch.no_grad()
    def _merge_error_of(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The largest error and the largest change, as scalars on the device."""
        largest_error = delta.new_zeros(())
        for stored, weight, change in self._merge_rows(self.weight, self.frozen_weight, delta):
            stored, weight = stored.to(delta.dtype), weight.to(delta.dtype)
            # What the addition itself rounds away, exactly (Knuth's TwoSum).
            total = weight + change
            back = total - weight
            lost = (weight - (total - back)) + (change - back)
            largest_error = torch.maximum(largest_error, ((stored - total) - lost).abs().max())
        return largest_error, delta.abs().max()

    @property
    def frozen_weight(self) -> nn.Parameter:
        """The frozen W. It is ``weight``, and while the layer is merged the Parameter that :meth:`unmerge` will give back."""
        return self.__dict__["_unmerged_weight"] if self.merged else self.weight

    def _stored_delta(self) -> Tensor:
        """:meth:`delta_weight` in the layout that the weight is stored in."""
        return self.delta_weight()

    def _merge_rows(self, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Matrices of the weight's shape, some rows at a time."""
        rows = max(1, _MERGE_ELEMENTS // max(1, matrices[0].shape[1]))
        return zip(*(matrix.split(rows) for matrix in matrices), strict=True)

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

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        # .to(), .half() and their kin must move the weight that unmerge() will give back as well.
        super()._apply(fn, recurse)
        if self.merged:
            with torch.no_grad():
                self.frozen_weight.data = fn(self.frozen_weight.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # A merged weight beside A and B would apply the branch twice wherever it is loaded.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.frozen_weight if keep_vars else self.frozen_weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local: Any, strict: bool, missing: Any,
                              unexpected: Any, errors: list[str]) -> None:  # fmt: skip
        if self.merged:
            errors.append(f"{prefix.rstrip('.') or 'this LoRALinear'} is merged; unmerge() before loading into it")
            return
        super()._load_from_state_dict(state_dict, prefix, local, strict, missing, unexpected, errors)

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
