"""LoRA on layers that hold no plain [out, in] weight: ``LoRAConv1D``, ``LoRABranchLinear``, and which class a layer takes."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import FLOAT_DTYPES, lora_branch
from stablelora_kernels.nn import LoRALinear
from stablelora_kernels.quantised import is_quantised, read
from stablelora_kernels.wrappers import is_sharded


def is_conv1d(module: Any) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``, which needs no transformers to find out."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def class_for(base: Any) -> type[LoRALinear]:
    """The class of the LoRA layer over ``base``.

    Raises:
        TypeError: there is none.
        ValueError: ``base`` gives its input no gradient, or is sharded in a way that none can follow.
    """
    if is_conv1d(base):
        return LoRAConv1D
    if not isinstance(base, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear or transformers' Conv1D, got {type(base).__name__}")
    # As torchao's weights for products in 8 bits have it.
    if (kwargs := getattr(base.weight, "act_quant_kwargs", None)) is not None:
        raise ValueError(
            f"linear must give its input a gradient, which a layer that quantises it does not, got act_quant_kwargs {kwargs}"
        )
    if is_sharded(base.weight):
        from stablelora_kernels.nn_sharded import LoRAShardedLinear, check_shards

        check_shards(base.weight)
        return LoRAShardedLinear
    if is_quantised(base.weight) and not _has_other_scales(base.weight):
        from stablelora_kernels.nn_quantised import LoRAQuantisedLinear

        return LoRAQuantisedLinear
    parts = [part for part in (base.weight, base.bias) if part is not None]
    plain = all(type(part) is nn.Parameter for part in parts) and type(base).__name__ != "Linear8bitLt"
    return LoRALinear if plain else LoRABranchLinear


def _has_other_scales(weight: Any) -> bool:
    """Whether ``weight`` is torchao's float8 with other scales than one a row."""
    if type(weight).__name__ != "Float8Tensor":
        return False
    try:
        read(weight)
    except ValueError:
        return True
    return False


class LoRAConv1D(LoRALinear):
    """A :class:`~stablelora_kernels.LoRALinear` over transformers' ``Conv1D``, whose ``weight`` is [in_features, out_features].

    The kernels read it as it lies. Merging adds ``(scaling · B A)^T``.
    """

    def _hold(self, base: Any) -> None:
        super()._hold(base)
        # Unregistered; it is for to_linear() alone.
        self.__dict__["_base"] = base

    def to_linear(self) -> nn.Module:
        """The very ``Conv1D`` that the layer was made of, with the weight, merged or not, and the bias."""
        base: nn.Module = self.__dict__["_base"]
        base.weight = self.weight
        base.register_parameter("bias", self.bias)
        return base.train(self.training)

    def _matrix(self) -> Tensor:
        return self.weight.t()

    def _stored_delta(self) -> Tensor:
        return self.delta_weight().t()


class LoRABranchLinear(LoRALinear):
    """LoRA on a frozen layer that computes its own product: ``y = base_layer(x) + scaling · D(x) A^T B^T``.

    ``LoRALinear.from_linear`` makes it, over bitsandbytes' ``Linear8bitLt`` and an ``nn.Linear`` whose weight is a tensor of its
    own kind, as torchao's are. ``base_layer`` is that very layer, a submodule, as in PEFT; ``weight`` and ``bias`` are its own.
    The branch is one launch on the product (two above rank 64), :func:`~stablelora_kernels.functional.lora_branch`.

    It can't be merged. ``remove_lora(model, merge=False)`` gives the layer back.
    """

    base_layer: nn.Linear

    def _hold(self, base: Any) -> None:
        self.base_layer = base

    @staticmethod
    def _dtype_of(base: Any) -> torch.dtype:
        return base.weight.dtype if base.weight.dtype in FLOAT_DTYPES else torch.float32

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return cast(nn.Parameter, self.base_layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.base_layer.bias

    def to_linear(self) -> nn.Module:
        """The very layer that this one was made of."""
        return self.base_layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] to [..., out_features], in the dtype that the base layer returns.

        Raises:
            RuntimeError: ``x`` requires a gradient, and the base layer's result gives it none.
        """
        base_out = self.base_layer(x)
        if torch.is_grad_enabled() and x.requires_grad and not base_out.requires_grad:
            raise RuntimeError(
                f"base_layer must give its input a gradient, got a result without one from a {type(self.base_layer).__name__} "
                f"with a {type(self.weight).__name__}; the layers before it would train on the branch's gradient alone"
            )
        return lora_branch(base_out, x, self.lora_A, self.lora_B, self.scaling, self.lora_dropout, self.training)

    def merge(self) -> NoReturn:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the weight is a {type(self.weight).__name__} that only its {type(self.base_layer).__name__} can read, so nothing "
            "can be added to it; keep the branch, or remove_lora(model, merge=False)"
        )
