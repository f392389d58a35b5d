"""``LoRALinear``: ``nn.Linear`` with a LoRA branch, computed by the fused op; the same over
``Conv1D``, and over any layer.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from stablelora_kernels.config import check_init
from stablelora_kernels.functional import FLOAT_DTYPES, lora_branch, lora_linear
from stablelora_kernels.nn.factory import BaseLayer, class_for
from stablelora_kernels.nn.merging import Mergeable
from stablelora_kernels.nn.projection_group import ATTRIBUTE, ProjectionGroup
from stablelora_kernels.utils.validation import check_float, check_int


def sizes_of(base: Any) -> tuple[int, int]:
    """The input and output features of an ``nn.Linear`` or a ``Conv1D``."""
    if hasattr(base, "nf"):
        return base.nx, base.nf
    return base.in_features, base.out_features


class LoRALinear(Mergeable):
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
        weight: [out_features, in_features], frozen.
        bias: [out_features], frozen, or None.
        lora_A: [r, in_features], trainable.
        lora_B: [out_features, r], trainable.
        scaling: s, a float.
        merged: whether the weight contains the branch.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the message names
            it and its value.
    """

    bias: nn.Parameter | None
    # True if the layer calls its base layer for the product; False if it reads the weight.
    calls_base: ClassVar[bool] = False
    # True if to_linear() returns the original layer; False if it builds an nn.Linear around the
    # weight.
    keeps_base: ClassVar[bool] = False
    # How many experts' A's and B's are stacked.
    num_experts: int = 1

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
        """Put a LoRA branch on an existing layer. The new layer shares and freezes its weight and
        bias; nothing is copied.

        The class depends on the layer:

        - :class:`~stablelora_kernels.nn.quantized.LoRAQuantizedLinear` for bitsandbytes' 4-bit
          layers and torchao's float8 weights with one scale a row;
        - :class:`~stablelora_kernels.nn.LoRAConv1D` for transformers' ``Conv1D``;
        - :class:`~stablelora_kernels.nn.sharded.LoRAShardedLinear` for a DTensor weight;
        - :class:`~stablelora_kernels.nn.LoRABranchLinear`, which calls the layer for its product,
          for bitsandbytes' ``Linear8bitLt`` and weights of any other tensor type;
        - :class:`LoRALinear` for a plain ``nn.Linear``.

        Raises:
            TypeError: ``linear`` is none of these.
            ValueError: ``linear`` gives its input no gradient.
            ValueError, TypeError: as the constructor. The layer is not frozen then.
        """
        return make_layer(
            class_for(linear),
            cast(BaseLayer, linear),
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights,
            lora_dtype,
        )

    def _setup(
        self,
        base: BaseLayer,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        lora_dtype: torch.dtype,
    ) -> None:
        """The constructor's work, over a frozen layer that is there already."""
        check_int("r", r, minimum=1)
        check_float("lora_alpha", lora_alpha)
        check_float("lora_dropout", lora_dropout, low=0.0, high=1.0)
        check_init(init_lora_weights)
        dtype = self._compute_dtype(base)
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
        self.in_features, self.out_features = sizes_of(base)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = float(lora_dropout)
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self._start_unmerged()
        self._disabled = False
        for frozen in base.parameters():
            frozen.requires_grad_(False)
        self._attach(base)  # type: ignore[arg-type]
        factory: dict[str, Any] = {"device": base.weight.device, "dtype": lora_dtype}
        self.lora_A = nn.Parameter(torch.empty(r * self.num_experts, self.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r * self.num_experts, **factory))
        self.reset_lora_parameters(init_lora_weights)

    @staticmethod
    def check_base(base: BaseLayer) -> None:
        """Raise ValueError or TypeError if this class cannot use the weight of ``base``."""

    @staticmethod
    def _compute_dtype(base: BaseLayer) -> torch.dtype:
        """The dtype that ``base`` computes in."""
        return base.weight.dtype

    def _attach(self, base: nn.Linear) -> None:
        """Share the frozen parameters of ``base``."""
        self.weight = cast(nn.Parameter, base.weight)
        self.register_parameter("bias", base.bias)
        if self.keeps_base:
            # Not registered as a submodule, so its weight does not follow moves to another device.
            self.__dict__["_base"] = base

    def to_linear(self) -> nn.Module:
        """A layer without the branch that shares the weight, merged or not, and the bias."""
        base: Any = self.__dict__.get("_base")
        if base is None:
            base = nn.Linear(
                self.in_features, self.out_features, self.bias is not None, device="meta"
            )
        base.weight = self.weight
        base.register_parameter("bias", self.bias)
        return base.train(self.training)

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Initialize A and B again; ``init_lora_weights`` is as in the constructor."""
        check_init(init_lora_weights)
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
            self._check_trains()
            return nn.functional.linear(x, self._matrix(), self.bias)
        bias, lora_A, lora_B = trained_and_bias(self)
        weight = self._matrix()
        return lora_linear(
            x, weight, bias, lora_A, lora_B, self.scaling, self.lora_dropout, self.training
        )

    def _check_trains(self) -> None:
        """Raise RuntimeError if training would silently do without the gradients of a merged layer."""
        if self.training and torch.is_grad_enabled() and self.lora_A.requires_grad:
            raise RuntimeError(
                "this LoRALinear is merged, so lora_A and lora_B would get no gradient; unmerge() first"
            )

    def _base_output(self, x: Tensor) -> Tensor:
        """The output of the frozen layer, merged or not: that of ``forward`` in ``disable_lora``."""
        return nn.functional.linear(x, self.frozen_weight, self.bias)

    def _matrix(self) -> Tensor:
        """The weight as [out_features, in_features]."""
        weight = self._parameters.get("weight")
        return self.weight if weight is None else weight

    def __setstate__(self, state: dict[str, object]) -> None:
        # A copy is not in the block of disable_lora that its original is in.
        super().__setstate__({**state, "_disabled": False})

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, r={self.r}"
        text += f", scaling={self.scaling:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        return text + (", merged" if self.merged else "")


class LoRAConv1D(LoRALinear):
    """A :class:`~stablelora_kernels.LoRALinear` over transformers' ``Conv1D``, whose ``weight`` is
    [in_features, out_features].

    The kernels read the weight through its strides. Merging adds ``(scaling · B A)^T``.
    """

    keeps_base = True

    def _base_output(self, x: Tensor) -> Tensor:
        # Conv1D's own operator, whose rounding differs from that of nn.functional.linear.
        y = torch.addmm(
            cast(Tensor, self.bias), x.reshape(-1, self.in_features), self.frozen_weight
        )
        return y.view(*x.shape[:-1], self.out_features)

    def _matrix(self) -> Tensor:
        return self.weight.t()

    def _stored_delta(self) -> Tensor:
        # A Conv1D's weight is [in_features, out_features].
        return self.delta_weight().t()


class LoRABranchLinear(LoRALinear):
    """LoRA on a frozen layer that computes its own product: ``y = base_layer(x) + scaling · D(x)
    A^T B^T``.

    ``LoRALinear.from_linear`` makes it over bitsandbytes' ``Linear8bitLt`` and over an
    ``nn.Linear`` whose weight is a tensor subclass, such as torchao's. ``base_layer`` is the
    original layer, a submodule as in PEFT; ``weight`` and ``bias`` are its own.
    :func:`~stablelora_kernels.functional.lora_branch` adds the branch in one launch (two above
    4,096 rows or rank 128).

    It can't be merged. ``remove_lora(model, merge=False)`` returns the original layer.
    """

    base_layer: nn.Linear
    calls_base = True

    def _attach(self, base: nn.Linear) -> None:
        self.base_layer = base

    @staticmethod
    def _compute_dtype(base: BaseLayer) -> torch.dtype:
        return base.weight.dtype if base.weight.dtype in FLOAT_DTYPES else torch.float32

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return cast(nn.Parameter, self.base_layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.base_layer.bias

    def to_linear(self) -> nn.Module:
        """The original layer."""
        return self.base_layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in_features] to [..., out_features], in the dtype that the base layer
        returns.

        Raises:
            RuntimeError: ``x`` requires a gradient, but the base layer's result does not.
        """
        if self._disabled:
            return self.base_layer(x)
        base_out = self.base_layer(x)
        if torch.is_grad_enabled() and x.requires_grad and not base_out.requires_grad:
            raise RuntimeError(
                f"base_layer must give its input a gradient, got a result without one from a {type(self.base_layer).__name__} "
                f"with a {type(self.weight).__name__}; the layers before it would train on the branch's gradient alone"
            )
        return lora_branch(
            base_out, x, self.lora_A, self.lora_B, self.scaling, self.lora_dropout, self.training
        )

    def merge(self) -> NoReturn:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the weight is a {type(self.weight).__name__} that only its {type(self.base_layer).__name__} can read, so nothing "
            "can be added to it; keep the branch, or remove_lora(model, merge=False)"
        )


def make_layer(
    layer_class: type[LoRALinear],
    base: BaseLayer,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    use_rslora: bool,
    init_lora_weights: bool | str,
    lora_dtype: torch.dtype,
) -> LoRALinear:
    """A layer of the class that the factory chose for ``base``. The other arguments are those of
    ``from_linear``.
    """
    layer = layer_class.__new__(layer_class)
    layer._setup(base, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_dtype)
    return layer.train(base.training)


def has_plain_parameters(base: nn.Linear) -> bool:
    """Whether ``base`` computes its product from plain parameters, so :class:`LoRALinear` can read
    them.
    """
    if type(base).__name__ == "Linear8bitLt" or type(base.weight) is not nn.Parameter:
        return False
    return base.bias is None or type(base.bias) is nn.Parameter


def trained_and_bias(layer: LoRALinear) -> tuple[Tensor | None, Tensor, Tensor]:
    """The bias, A and B of a layer."""
    parameters = layer._parameters
    try:
        # nn.Module's __getattr__ takes longer than the rest of a call's Python.
        return parameters["bias"], parameters["lora_A"], parameters["lora_B"]  # type: ignore[return-value]
    except KeyError:
        # FSDP and parametrizations replace them by plain attributes.
        return layer.bias, layer.lora_A, layer.lora_B


def weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of an ``nn.Linear``; as :func:`trained_and_bias`."""
    parameters = linear._parameters
    try:
        return parameters["weight"], parameters["bias"]  # type: ignore[return-value]
    except KeyError:
        return linear.weight, linear.bias  # type: ignore[return-value]


class GroupKey(NamedTuple):
    """Layers can form a projection group if their keys are equal."""

    in_features: int
    dtype: torch.dtype
    lora_dtype: torch.dtype
    dropout_p: float


def projection_group_key(layer: LoRALinear) -> GroupKey:
    """Layers of one key can form a projection group."""
    return GroupKey(layer.in_features, layer.weight.dtype, layer.lora_A.dtype, layer.lora_dropout)
