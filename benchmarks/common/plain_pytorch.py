"""The yardstick: what anyone can write in plain PyTorch over PEFT's layers, without this library.

It keeps for backward about what the library keeps: no float32 copies of activations, one byte for
each element of dropout's masks, and of a gated MLP its input and the outputs of gate and up. It is
no product: a model has one adapter, on all three layers of an MLP or on none, plain weights, no bias
in B and no variant such as DoRA.
"""

from __future__ import annotations

from collections import namedtuple
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear


class Layer(namedtuple("Layer", "weight, bias, lora_A, lora_B, scaling, dropout_p")):
    """A projection with LoRA."""

    @staticmethod
    def of(module: Any) -> Layer:
        (name,) = module.active_adapters
        dropout_p = getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0
        adapters = module.lora_A[name].weight, module.lora_B[name].weight
        return Layer(module.weight, module.bias, *adapters, module.scaling[name], dropout_p)

    def dropped(self, x: Tensor, keep: Tensor | None) -> Tensor:
        return x if keep is None else x * keep / (1 - self.dropout_p)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output, S = A x, and which elements of x dropout keeps."""
        keep = torch.empty_like(x).bernoulli_(1 - self.dropout_p).bool() if self.dropout_p else None
        s = linear(self.dropped(x, keep), self.lora_A.to(x.dtype))
        y = linear(x, self.weight, self.bias).flatten(0, -2)
        y.addmm_(s.flatten(0, -2), self.lora_B.t().to(x.dtype), alpha=self.scaling)
        return y.view(*x.shape[:-1], -1), s, keep

    def backward(self, dy: Tensor, x: Tensor, s: Tensor, keep: Tensor | None) -> list[Tensor]:
        """dX, dA and dB."""
        grad, rows = dy.flatten(0, -2), self.dropped(x, keep).flatten(0, -2)
        ds = (grad @ self.lora_B.to(dy.dtype)).mul_(self.scaling)
        da = (ds.t() @ rows).to(self.lora_A.dtype)
        db = (grad.t() @ s.flatten(0, -2)).mul_(self.scaling).to(self.lora_B.dtype)
        of_branch = (ds @ self.lora_A.to(dy.dtype)).view(x.shape)
        dx = (grad @ self.weight).view(x.shape).add_(self.dropped(of_branch, keep))
        return [dx, da, db]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: list[Layer], act: Any, x: Tensor, *adapters: Tensor) -> Tensor:
        (ctx.layer,) = layers
        y, *saved = ctx.layer.forward(x)
        ctx.save_for_backward(x, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.layer.backward(dy, *ctx.saved_tensors))


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: list[Layer], act: Any, x: Tensor, *adapters: Tensor) -> Tensor:
        ctx.layers, ctx.act = layers, act
        (g, *of_gate), (u, *of_up) = [layer.forward(x) for layer in layers[:2]]
        y, *of_down = layers[2].forward(act(g) * u)
        ctx.save_for_backward(x, g, u, *of_gate, *of_up, *of_down)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, down = ctx.layers
        x, g, u, *rest = ctx.saved_tensors
        g, u = g.detach().requires_grad_(), u.detach().requires_grad_()
        with torch.enable_grad():
            h = ctx.act(g) * u
        dh, *of_down = down.backward(dy, h.detach(), *rest[4:])
        dg, du = torch.autograd.grad(h, (g, u), dh)
        dx, *of_gate = gate.backward(dg, x, *rest[:2])
        dx_of_up, *of_up = up.backward(du, x, *rest[2:4])
        return (None, None, dx.add_(dx_of_up), *of_gate, *of_up, *of_down)


def _call(function: Any, modules: list[Any], act: Any, x: Tensor) -> Any:
    layers = [Layer.of(module) for module in modules]
    adapters = [t for layer in layers for t in (layer.lora_A, layer.lora_B)]
    return function.apply(layers, act, x, *adapters)


def use_plain_pytorch(model: nn.Module) -> None:
    """Replace the forwards of a PEFT model's linear layers and gated MLPs."""
    for module in model.modules():
        if isinstance(module, lora.Linear):
            module.forward = partial(_call, _Linear, [module], None)
        elif isinstance(getattr(module, "gate_proj", None), lora.Linear):
            parts = [module.gate_proj, module.up_proj, module.down_proj]
            module.forward = partial(_call, _MLP, parts, module.act_fn)
