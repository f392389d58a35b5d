"""The activations of a gated MLP, one record each: what PyTorch computes, and which calls a model's
forward is recognized by.

A new one also has a branch in ``kernels/lora/gated.py``, and its own formula in
``reference/lora.py``. Every list of cases is drawn from this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


class Activation(NamedTuple):
    """act of a gated MLP."""

    # As messages call it.
    title: str
    # act(G).
    forward: Callable[[Tensor], Tensor]
    # dG for dH ∘ U and G; it writes to ``grad_input``, if there is one.
    backward: Callable[..., Tensor]
    # PyTorch's function, and the arguments behind its input with which it computes act. The only
    # argument that is True is ``inplace``.
    function: Callable[..., Tensor]
    arguments: tuple[tuple[Any, ...], ...]


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation("SiLU", silu, torch.ops.aten.silu_backward, silu, ((False,), (True,))),
    "gelu": Activation("GELU", gelu, torch.ops.aten.gelu_backward, gelu, ((), ("none",))),
    "gelu_tanh": Activation(
        "tanh GELU",
        partial(gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
        gelu,
        (("tanh",),),
    ),
}
*_first, _last = [activation.title for activation in ACTIVATIONS.values()]
# All of them, in a message's words.
TITLES = f"{', '.join(_first)} and {_last}"
