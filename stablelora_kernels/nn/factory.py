"""Decides which LoRA layer goes over a layer, or why none can.

``nn/__init__.py`` registers the LoRA layers, so this module imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.nn.gradients import reason_input_gets_no_gradient
from stablelora_kernels.quantized import is_quantized


class BaseLayer(Protocol):
    """What a LoRA layer reads of the frozen layer that it goes over."""

    training: bool

    @property
    def weight(self) -> Tensor: ...

    def parameters(self) -> Iterable[nn.Parameter]: ...


_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Loads a class of LoRA layers, a subclass of LoRALinear.
Load = Callable[[], type[Any]]
_registry: list[tuple[Callable[[Any], bool], Load]] = []


def register(fits: Callable[[nn.Linear], bool], load: Load) -> None:
    """Use the class that ``load()`` returns for every layer that ``fits`` accepts. The first
    registration that fits wins.
    """
    _registry.append((fits, load))


def class_for(base: nn.Module) -> type[Any]:
    """The class of the LoRA layer over ``base``.

    Raises:
        TypeError: ``base`` is neither an ``nn.Linear`` nor a ``Conv1D``.
        ValueError: ``base`` gives its input no gradient, or its weight cannot be read or is sharded
            in an unsupported way.
    """
    if not isinstance(base, nn.Linear) and not is_conv1d(base):
        raise TypeError(
            f"linear must be an nn.Linear or transformers' Conv1D, got {type(base).__name__}"
        )
    _check_gradient(base)
    layer_class = next(load() for fits, load in _registry if fits(base))
    layer_class.check_base(base)
    return layer_class


def _check_gradient(base: nn.Module) -> None:
    """Raise ValueError if LoRA on the layers before ``base`` would get no gradient through it."""
    reason = reason_input_gets_no_gradient(base)
    if reason is not None:
        raise ValueError(f"linear must give its input a gradient, but {reason}")


def replacement_class(module: Any) -> type[Any]:
    """The class of the LoRA layer that can stand in a model in place of ``module``.

    Stricter than :func:`class_for`: the model may rely on everything that ``module`` has beyond a
    weight and a bias.

    Raises:
        ValueError, TypeError: ``module`` must stay as it is; the message is the reason.
    """
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        is_bitsandbytes = kind == "Linear8bitLt" or (
            kind == "Linear4bit" and is_quantized(module.weight)
        )
        if type(module) is not nn.Linear and not is_bitsandbytes:
            raise TypeError(
                f"{kind} is a subclass of nn.Linear that a model may use without calling it"
            )
    elif not is_conv1d(module):
        raise TypeError(f"{kind} is not an nn.Linear")
    # Before the other reasons: this one concerns the layers before it, too.
    _check_gradient(module)
    if "forward" in module.__dict__:
        raise ValueError("its forward was replaced (as accelerate's hooks do)")
    if set(module._parameters) != {"weight", "bias"} or module._modules:
        raise ValueError("it holds other parameters or modules than weight and bias")
    layer_class = class_for(module)
    if not layer_class.calls_base:
        for tensor in (None if is_quantized(module.weight) else module.weight, module.bias):
            if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"it holds a {type(tensor).__name__} of {tensor.dtype}, not a plain floating-point Parameter"
                )
        if any(getattr(module, attribute, None) for attribute in _STATE_DICT_HOOKS):
            raise ValueError("it has state_dict hooks")
    if 0 in module.weight.shape:
        raise ValueError(f"its weight is empty, {list(module.weight.shape)}")
    return layer_class


def is_conv1d(module: object) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``. The check needs no transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"
