"""A call of ``lora_mlp``: its operands, and its results by our op, by separate calls, by plain PyTorch and in float64.

Results are Y, dX, and "gate.dA" or "down.dB" by name.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels.dispatch.settings import get_backend
from stablelora_kernels.functional import LoRAWeights, lora_linear, lora_mlp
from stablelora_kernels.ops.torch_path import draw_keep
from stablelora_kernels.reference import dropout_keep_ref
from stablelora_kernels.reference.mlp import lora_mlp_grads_ref, lora_mlp_ref
from tests.helpers.inputs import DEVICE, FP32, make_inputs
from tests.helpers.launches import count_launches
from tests.helpers.oracle import Results, check_all

PROJECTIONS = ("gate", "up", "down")
# Roundings that lie one behind another: of G, H, S, dH, dG and a result, of which one is half an EPS of its sum.
ROUNDINGS = 4
# Attributes that hold a list with a tensor for each projection.
LISTS = ("weights", "biases", "lora_As", "lora_Bs")
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
}
Call = Callable[..., Tensor]


class MLP:
    """``ranks`` of gate, up and down; None is a projection without a branch. ``shared``: up has gate's A."""

    def __init__(
        self,
        shape: Sequence[int],
        f: int,
        n: int,
        ranks: Sequence[int | None],
        dtype: torch.dtype = FP32,
        lora_dtype: torch.dtype | None = None,
        activation: str = "silu",
        biases: Sequence[bool] = (True, False, True),
        shared: bool = False,
        seed: int = 0,
    ) -> None:
        sizes = zip([tuple(shape)] * 2 + [(*shape[:-1], f)], (f, f, n), ranks, biases, strict=True)
        parts = [
            make_inputs(of_x, out, r or 1, dtype=dtype, lora_dtype=lora_dtype, bias=bias, seed=seed + i)
            for i, (of_x, out, r, bias) in enumerate(sizes)
        ]
        self.x, self.grad, self.activation, self.shared = parts[0]["x"], parts[2]["grad"], activation, shared
        self.weights: list[Any] = [part["weight"] for part in parts]
        self.biases = [part["bias"] for part in parts]
        self.lora_As, self.lora_Bs = (
            [part[name] if r else None for part, r in zip(parts, ranks, strict=True)] for name in ("lora_A", "lora_B")
        )
        if shared:
            self.lora_As[1] = self.lora_As[0]
        self.scalings = [0.5, 1.5, -0.75]

    @property
    def wanted(self) -> list[str]:
        """The names of all gradients. A shared A has one, gate's."""
        names = ["dX"]
        for kind, tensors in (("dA", self.lora_As), ("dB", self.lora_Bs)):
            for i, (name, t) in enumerate(zip(PROJECTIONS, tensors, strict=True)):
                if t is not None and not (self.shared and (kind, i) == ("dA", 1)):
                    names.append(f"{name}.{kind}")
        return names

    def tensors(self) -> list[Tensor]:
        """The tensors whose gradients :attr:`wanted` names."""
        as_ = [a for i, a in enumerate(self.lora_As) if a is not None and not (self.shared and i == 1)]
        return [self.x, *as_, *(b for b in self.lora_Bs if b is not None)]

    def leaves(self, wanted: Iterable[str] | None = None) -> list[Tensor]:
        """Copies of :meth:`tensors` with their strides, of which those whose gradients are ``wanted`` require them."""
        pairs = zip(self.wanted, self.tensors(), strict=True)
        return [t.detach().requires_grad_(wanted is None or name in wanted) for name, t in pairs]

    def projections(self, leaves: Sequence[Tensor]) -> list[LoRAWeights]:
        """Gate, up and down with the ``leaves`` behind x for their A's and B's."""
        named = dict(zip(self.wanted, [None, *leaves], strict=True))
        if self.shared:
            named["up.dA"] = named["gate.dA"]
        return [
            LoRAWeights(weight, bias, named.get(f"{name}.dA"), named.get(f"{name}.dB"), scaling)
            for name, weight, bias, scaling in zip(PROJECTIONS, self.weights, self.biases, self.scalings, strict=True)
        ]

    def call(self, x: Tensor, *leaves: Tensor, p: float = 0.0) -> Tensor:
        return lora_mlp(x, *self.projections(leaves), self.activation, p)

    def call_apart(self, x: Tensor, *leaves: Tensor, p: float = 0.0) -> Tensor:
        """By separate layers."""
        gate, up, down = self.projections(leaves)

        def layer(x: Tensor, projection: LoRAWeights) -> Tensor:
            if projection.lora_A is None:
                return torch.nn.functional.linear(x, *projection[:2])
            return lora_linear(x, *projection, p)

        g, u = layer(x, gate), layer(x, up)
        return layer(ACTIVATIONS[self.activation](g) * u, down)

    def run(
        self, call: Call | None = None, p: float = 0.0, seed: int = 3, wanted: Iterable[str] | None = None
    ) -> Results:
        """Y and the gradients that are ``wanted``."""
        leaves = self.leaves(wanted)
        torch.manual_seed(seed)
        return self.results((call or self.call)(*leaves, p=p), leaves)

    def results(self, y: Tensor, leaves: Sequence[Tensor]) -> Results:
        named = {name: leaf for name, leaf in zip(self.wanted, leaves, strict=True) if leaf.requires_grad}
        grads = torch.autograd.grad(y, list(named.values()), self.grad.to(y.dtype))
        return {"Y": y.detach(), **dict(zip(named, grads, strict=True))}

    def masks(self, p: float, seed: int = 3) -> tuple[list[Tensor | None], float]:
        """The masks that a call must draw, in the order of gate, up and down, and the probability that they are drawn with."""
        leading = self.x.shape[:-1]
        keeps: list[Tensor | None] = []
        torch.manual_seed(seed)
        real = p
        for i, (name, a) in enumerate(zip(PROJECTIONS, self.lora_As, strict=True)):
            width = self.weights[0].shape[0] if name == "down" else self.x.shape[-1]
            if a is None or not p:
                keeps.append(None)
            elif i == 1 and self.shared:
                keeps.append(keeps[0])
            elif get_backend() == "triton":
                number = int(torch.randint(2**63 - 1, (1,), device=DEVICE))
                keeps.append(dropout_keep_ref(leading.numel(), width, p, number).to(DEVICE).view(*leading, width))
            else:
                keep, real = draw_keep(torch.empty(leading.numel(), width, device=DEVICE), p)
                keeps.append(keep.view(*leading, width))
        return keeps, real

    def plain(self, weight: Any, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, Tensor):
            return weight.to(dtype)
        if dtype == torch.float64:
            return testing.dequantized_ref(weight).to(DEVICE)
        return weight.dequantize(dtype)

    def eager(self, keeps: Sequence[Tensor | None] = (None, None, None), p: float = 0.0) -> Results:
        """As a user writes it by hand, operator by operator in x's dtype."""

        def call(x: Tensor, *leaves: Tensor, **_: Any) -> Tensor:
            def layer(x: Tensor, i: int) -> Tensor:
                projection, keep = projections[i], keeps[i]
                base = torch.nn.functional.linear(x, self.plain(projection.weight, x.dtype), projection.bias)
                if projection.lora_A is None:
                    return base
                dropped = x if keep is None else x * keep.to(x.dtype) / (1 - p)
                branch = dropped @ projection.lora_A.to(x.dtype).T @ projection.lora_B.to(x.dtype).T
                return base + branch * projection.scaling

            projections = self.projections(leaves)
            return layer(ACTIVATIONS[self.activation](layer(x, 0)) * layer(x, 1), 2)

        return self.run(call)

    def oracle(self, keeps: Sequence[Tensor | None] = (None, None, None), p: float = 0.0) -> Results:
        """By the reference in float64."""
        parts = []
        for weight, bias, a, b in zip(self.weights, self.biases, self.lora_As, self.lora_Bs, strict=True):
            w = self.plain(weight, torch.float64)
            pair = [w.new_zeros(0, w.shape[1]), w.new_zeros(w.shape[0], 0)] if a is None else [a.double(), b.double()]
            parts.append((w, None if bias is None else bias.double(), *pair))
        rest = (parts, self.scalings, self.activation, keeps, p)
        y = lora_mlp_ref(self.x.double(), *rest)
        grads = lora_mlp_grads_ref(self.grad.double(), self.x.double(), *rest)
        if self.shared:
            grads["gate.dA"] = grads["gate.dA"] + grads["up.dA"]
        return {"Y": y} | {name: grads[name] for name in self.wanted}


def check(mlp: MLP, found: Results, p: float = 0.0, seed: int = 3) -> None:
    """No result is worse than eager PyTorch's, with the masks that a call behind ``seed`` must draw; each has its dtype."""
    keeps, real = mlp.masks(p, seed)
    like = dict(zip(mlp.wanted, mlp.tensors(), strict=True)) | {"Y": mlp.x}
    for name, value in found.items():
        assert value.dtype == like[name].dtype, name
    check_all(found, mlp.oracle(keeps, real), mlp.eager(keeps, real), mlp.x.dtype)


def assert_close(found: Results, expected: Results, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, out in found.items():
        torch.testing.assert_close(
            out, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def launched(made: Counter[str]) -> dict[str, int]:
    """Counted launches by short names."""
    return {name.removeprefix("_").removesuffix("_kernel"): n for name, n in made.items()}


def backward_launches(mlp: MLP, wanted: Iterable[str], p: float = 0.0) -> dict[str, int]:
    """What a backward that wants these gradients launches."""
    leaves = mlp.leaves(wanted)
    y = mlp.call(*leaves, p=p)
    with count_launches() as made:
        y.backward(mlp.grad)
    return launched(made)


def changed(mlp: MLP, change: Any) -> MLP:
    """``mlp`` with ``change(name, t)`` for each of its tensors but quantized weights."""
    other = copy.copy(mlp)
    for name in LISTS:
        setattr(other, name, [change(name, t) if isinstance(t, Tensor) else t for t in getattr(other, name)])
    other.x, other.grad = change("x", mlp.x), change("grad", mlp.grad)
    if mlp.shared:
        other.lora_As[1] = other.lora_As[0]
    return other


def absolute_values(mlp: MLP) -> MLP:
    """Their results are sums whose roundings bound those of ``mlp``'s."""
    other = copy.copy(mlp)
    other.weights, other.scalings = [mlp.plain(w, torch.float64) for w in mlp.weights], [abs(s) for s in mlp.scalings]
    return changed(other, lambda name, t: t.double().abs())
