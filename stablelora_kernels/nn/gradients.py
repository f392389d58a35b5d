"""Frozen layers that give their input no gradient. LoRA on the layers before them would train on a
part of the gradient alone.

Such layers quantize their input, as some of torchao's and compressed-tensors' do. A call with a few
rows tells them from layers that quantize their weight alone, whatever the library, its version or
the format.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stablelora_kernels.utils.tensors import is_sharded

# Attributes by which libraries say that a weight's product quantizes its input. They decide where a
# call is not possible.
_ATTRIBUTES = ("act_quant_kwargs", "activation_quantization")
# Products of integers on a GPU need more than 16 rows.
_ROWS = 32
# Whether layers of a kind give their input a gradient.
_tried: dict[Hashable, bool] = {}


def reason_input_gets_no_gradient(layer: nn.Module) -> str | None:
    """Why LoRA on the layers before ``layer`` would train wrongly, or None."""
    if not isinstance(layer, nn.Linear):
        return None
    if _scheme_of_inputs(layer) is not None:
        if _gives_gradient(layer):
            return None
        return "compressed-tensors quantizes the input without a gradient"
    # Subclasses have products of their own, and a parametrized one computes its weight at each
    # access.
    # compressed-tensors' layers have no weight before the model's first forward.
    weight = getattr(layer, "weight", None)
    if type(layer) is not nn.Linear or weight is None or not _is_of_a_library(weight):
        return None
    if _gives_gradient(layer):
        return None
    return f"its {type(layer.weight).__name__}'s product has no gradient for the input"


def layers_without_gradient(model: nn.Module) -> dict[str, str]:
    """The layers of ``model`` that give their input no gradient, by name, with the reason."""
    reasons = {}
    for name, module in model.named_modules():
        reason = reason_input_gets_no_gradient(module)
        if reason is not None:
            reasons[name.removesuffix(".base_layer")] = reason
    return reasons


def _is_of_a_library(weight: Tensor) -> bool:
    """Whether a weight's type has a product of its own."""
    return (
        type(weight) not in (Tensor, nn.Parameter)
        and not is_lazy(weight)
        and not is_sharded(weight)
    )


def _scheme_of_inputs(layer: nn.Linear) -> object:
    """What compressed-tensors has stored of how it quantizes the layer's input, or None."""
    return getattr(getattr(layer, "quantization_scheme", None), "input_activations", None)


def _gives_gradient(layer: nn.Linear) -> bool:
    """Whether ``layer`` gives its input a gradient: one call is tried for all layers of its kind."""
    kind = _kind(layer)
    if kind not in _tried:
        try:
            _tried[kind] = _call_gives_gradient(layer)
        except Exception:
            # The weight has no values yet, or the library has no product for this device.
            says_so = any(getattr(layer.weight, name, None) is not None for name in _ATTRIBUTES)
            return not says_so and _scheme_of_inputs(layer) is None
    return _tried[kind]


def _kind(layer: nn.Linear) -> Hashable:
    """What layers have in common that compute alike: the type of the weight and its settings."""
    weight = layer.weight
    settings = {
        name: repr(value) for name, value in vars(weight).items() if not isinstance(value, Tensor)
    }
    scheme = repr(_scheme_of_inputs(layer))
    return (
        type(weight),
        str(weight.device),
        weight.dtype,
        tuple(weight.shape),
        scheme,
        *sorted(settings.items()),
    )


def _call_gives_gradient(layer: nn.Linear) -> bool:
    """The answer of a forward and backward, without the layer's hooks."""
    dtype = (
        layer.weight.dtype if layer.weight.dtype.is_floating_point else torch.get_default_dtype()
    )
    # It turns gradients on, too.
    with torch.inference_mode(False):
        x = torch.ones(
            _ROWS, layer.in_features, dtype=dtype, device=layer.weight.device, requires_grad=True
        )
        y = layer.forward(x)
        if not y.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    return gradient is not None
