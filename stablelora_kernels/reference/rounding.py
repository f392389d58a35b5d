"""How far rounding may move each result of the formulas in ``lora``, on any processor: an error
analysis that runs beside them.

Each matrix carries its exact values and a standard deviation per element. The model is that of N.
J. Higham and T. Mary, "A New Approach to Probabilistic Rounding Error Analysis" (SIAM J. Sci.
Comput. 41, 2019): roundings are independent and have mean zero. A rounding moves a number between
2^e and 2^(e+1) by at most u 2^e, where u is the unit roundoff; evenly distributed, that is a
standard deviation of u 2^e / √3. Independent deviations add as squares, so they pass through a
product of matrices like this::

    C = A B:   var(C) = var(A) (B ∘ B) + (A ∘ A) var(B) + var(sums)
               var(sums) = (u |A| |B| / 2)² + (u √n |A B| / 4)²

The last line is the rounding of sums over n terms, in any order.

- Terms that cancel: a sum stays within a constant times u of the sum of absolute values, whatever n is (Higham and Mary,
  "Sharper Probabilistic Backward Error Analysis for Basic Linear Algebra Kernels with Random Data", SIAM J. Sci. Comput. 42,
  2020). The sum of the first i products has the variance i σ². A rounding of it has 0.54 u² i σ² / 3: the mean of 4^e over the
  squares of the numbers between 2^e and 2^(e+1) is 0.54. All roundings together have 0.09 u² n² σ². For normal numbers
  |A| |B| is n σ 2/π, of which the root is 0.47.
- Terms that agree: the first i of them are i/n of the sum. All roundings together have 0.54 u² n (A
  B)² / 9, of which the root is 0.24 u √n |A B|.

Blocked sums, which processors compute in several parts, round less than either.

A product of n terms is often added to a number that is there, in one sum that begins with it: the
branch to the base product. Each of the n partial sums is then rounded at about that number's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.reference.lora import activation_ref

# The shares of |A| |B| and of √n |A B| in the standard deviation of a sum, in units of u.
CANCELING, AGREEING = 1 / 2, 1 / 4
# Operations that round an activation function, its derivative, an exponential or a logarithm.
OF_ACTIVATION = 4
# code · absmax + offset, times code, in float32.
OF_DEQUANTIZING = 3


def unit_roundoff(dtype: torch.dtype) -> float:
    """What rounding to nearest moves a number by at most, as a share of the number."""
    return torch.finfo(dtype).eps / 2


def deviation_of_rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The standard deviation of one rounding to ``dtype``, per element."""
    exponent = torch.frexp(value.abs()).exponent
    # frexp's fraction begins at one half. Below the smallest normal number the spacing stays.
    power = torch.exp2(exponent.double() - 1).clamp(min=torch.finfo(dtype).tiny)
    return torch.where(value == 0, 0.0, power * (unit_roundoff(dtype) / math.sqrt(3)))


@dataclass(frozen=True)
class Rounded:
    """A float64 matrix, and the standard deviation of each element of what a processor computes in
    its place.
    """

    # Exact, and differentiable by the errors.
    value: Tensor
    deviation: Tensor
    # A zero for each number that was rounded on the way, in units of its rounding's deviation.
    errors: frozenset[Tensor] = frozenset()
    # How many distinct numbers there are, and which of them each element is, once that is known.
    distinct: tuple[int, Tensor] | None = None

    @property
    def exact(self) -> Tensor:
        return self.value.detach()

    @property
    def T(self) -> Rounded:
        return Rounded(self.value.T, self.deviation.T, self.errors)

    def __add__(self, addend: Rounded) -> Rounded:
        deviation = torch.hypot(self.deviation, addend.deviation)
        return Rounded(self.value + addend.value, deviation, self.errors | addend.errors)

    def __mul__(self, factor: Rounded | Tensor | float) -> Rounded:
        """The product element by element, before it is rounded."""
        if not isinstance(factor, Rounded):
            size = factor.abs() if isinstance(factor, Tensor) else abs(factor)
            return Rounded(self.value * factor, self.deviation * size, self.errors)
        deviation = torch.hypot(self.deviation * factor.exact, self.exact * factor.deviation)
        return Rounded(self.value * factor.value, deviation, self.errors | factor.errors)

    def rounded(self, amount: Tensor) -> Rounded:
        """The same after one more rounding, with a standard deviation of ``amount`` per element.

        Without autograd the errors are not noted, and only the deviation is known.
        """
        if not torch.is_grad_enabled():
            return Rounded(self.value, torch.hypot(self.deviation, amount))
        # Equal numbers are rounded alike, such as those in all rows behind an expanded x.
        if (distinct := self.distinct) is None:
            numbers, place = self.exact.float().unique(return_inverse=True)
            distinct = numbers.numel(), place
        count, place = distinct
        error = torch.zeros(count, dtype=torch.float64, device=place.device, requires_grad=True)
        value = self.value + amount * error[place]
        deviation = torch.hypot(self.deviation, amount)
        return Rounded(value, deviation, self.errors | {error}, distinct)

    def stored(self, dtype: torch.dtype, times: int = 1) -> Rounded:
        """The same after ``times`` roundings to ``dtype``."""
        return self.rounded(deviation_of_rounding(self.exact, dtype) * math.sqrt(times))

    def projected(self, direction: Tensor) -> float:
        """The standard deviation of the inner product with ``direction``, to the first order in the
        errors.
        """
        errors = list(self.errors)
        inner = (self.value * direction.reshape(self.value.shape)).sum()
        if not errors:
            return 0.0
        slopes = torch.autograd.grad(inner, errors, retain_graph=True)
        return math.sqrt(sum(slope.square().sum().item() for slope in slopes))


def operand(t: Tensor, dtype: torch.dtype) -> Rounded:
    """An operand that is rounded to ``dtype`` as it is used, unless it has no more digits than
    that.
    """
    exact = Rounded(t.double(), torch.zeros_like(t, dtype=torch.float64))
    return exact if torch.finfo(t.dtype).eps >= torch.finfo(dtype).eps else exact.stored(dtype)


def dequantized(weight: Tensor, dtype: torch.dtype) -> Rounded:
    """A quantized weight, given in float64, that is computed with the digits of sums and rounded to
    ``dtype``.
    """
    exact = Rounded(weight, torch.zeros_like(weight))
    return exact.stored(Arithmetic(dtype).sums, OF_DEQUANTIZING).stored(dtype)


def repeats(rows: Tensor) -> float:
    """How often a row occurs on average. Equal rows are rounded alike, and their deviations do not
    cancel in a sum.
    """
    return rows.shape[0] / max(rows.float().unique(dim=0).shape[0], 1)


def variance_of_product(a: Rounded, b: Tensor) -> Tensor:
    """The variance of ``a b`` that a's deviations make."""
    if not a.deviation.any():
        return b.new_zeros(a.exact.shape[0], b.shape[1])
    # (d Σ b)² is at most n d² Σ b².
    return repeats(a.exact.T) * (a.deviation.square() @ b.square())


@dataclass(frozen=True)
class Arithmetic:
    """Sums have the digits of ``sums``; operands and intermediate results are stored as
    ``storage``. The relative error of each factor of a product has the standard deviation
    ``of_factors``: TensorFloat-32 drops digits.
    """

    storage: torch.dtype
    of_factors: float = 0.0

    @property
    def sums(self) -> torch.dtype:
        return torch.float64 if self.storage == torch.float64 else torch.float32

    def product(self, a: Rounded, b: Rounded) -> Rounded:
        """``a b``, summed but not stored."""
        variance = variance_of_product(a, b.exact) + variance_of_product(b.T, a.exact.T).T
        if self.of_factors:
            squares = a.exact.square() @ b.exact.square()
            variance = variance + 2 * self.of_factors**2 * squares
        product = Rounded(a.value @ b.value, variance.sqrt(), a.errors | b.errors)
        canceling = CANCELING * (a.exact.abs() @ b.exact.abs())
        agreeing = AGREEING * math.sqrt(a.exact.shape[-1]) * product.exact.abs()
        return product.rounded(unit_roundoff(self.sums) * torch.hypot(canceling, agreeing))

    def onto(self, start: Rounded, product: Rounded, count: int) -> Rounded:
        """``start + product``, not stored, as one sum: it begins with ``start``, and the product's
        ``count`` terms follow.
        """
        return start.stored(self.sums, times=count) + product

    def total(self, products: Sequence[Rounded], counts: Sequence[int]) -> Rounded:
        """The sum of ``products``, of so many terms each, stored after each of them."""
        running = products[0]
        for product, count in zip(products[1:], counts[1:], strict=True):
            running = self.onto(running, product, count).stored(self.storage)
        return running


class RoundedLayer:
    """A layer with its LoRA branch, forward and backward. It remembers what backward reads, as an
    autograd function does.

    ``lora_A`` and ``lora_B`` are None for a projection without a branch, ``weight`` for a branch
    alone. ``keep`` [..., K] is the mask of a dropout of probability ``dropout_p``.
    """

    def __init__(
        self,
        arithmetic: Arithmetic,
        weight: Rounded | None,
        bias: Rounded | None,
        lora_A: Rounded | None,
        lora_B: Rounded | None,
        scaling: float,
        keep: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        self.arithmetic, self.scaling = arithmetic, scaling
        self.weight, self.bias = weight, bias
        self.lora_A, self.lora_B = lora_A, lora_B
        self.share = (
            None if keep is None else keep.reshape(-1, keep.shape[-1]).double() / (1 - dropout_p)
        )

    def masked(self, t: Rounded) -> Rounded:
        return t if self.share is None else t * self.share

    def forward(
        self, x: Rounded, base: Rounded | None = None, dtype: torch.dtype | None = None
    ) -> Rounded:
        """Y [M, N] of x [M, K], stored as ``dtype`` or as intermediate results are. ``base``
        replaces the product.

        A bias is added to the product, or to the branch if that comes first: the sum that rounds
        more counts.
        """
        storage, product = self.arithmetic.storage, self.arithmetic.product
        self.x = x
        biased = base is None and self.bias is not None
        if base is None:
            assert self.weight is not None
            base = product(x, self.weight.T)
            base = base if self.bias is None else base + self.bias
            if self.lora_A is None or not biased:
                base = base.stored(storage)
        if self.lora_A is None or self.lora_B is None:
            return base
        self.dropped = self.masked(x)
        self.s = product(self.dropped, self.lora_A.T).stored(storage)
        branch = product(self.s, self.lora_B.T) * self.scaling
        if biased:
            assert self.bias is not None
            amounts = [
                deviation_of_rounding(sums.exact, storage) for sums in (base, branch + self.bias)
            ]
            base = base.rounded(torch.maximum(*amounts))
        y = self.arithmetic.onto(base, branch.stored(storage), self.lora_A.exact.shape[0])
        return y.stored(dtype or storage)

    def backward(self, grad: Rounded) -> dict[str, Rounded]:
        """The gradients by their operands' names, of x [M, K] too, for an incoming gradient [M, N]."""
        storage, product = self.arithmetic.storage, self.arithmetic.product
        gradients: dict[str, Rounded] = {}
        if self.weight is not None:
            gradients["x"] = product(grad, self.weight).stored(storage)
            gradients["weight"] = product(grad.T, self.x).stored(storage)
        if self.bias is not None:
            ones = torch.ones_like(grad.exact[:, :1])
            gradients["bias"] = product(grad.T, Rounded(ones, torch.zeros_like(ones))).stored(
                storage
            )
        if self.lora_A is None or self.lora_B is None:
            return gradients
        ds = self.grad_s(grad)
        gradients["x"] = self._with_branch(gradients.get("x"), ds)
        gradients["lora_A"] = self.grad_a(ds, self.dropped)
        gradients["lora_B"] = (product(grad.T, self.s) * self.scaling).stored(storage, times=2)
        return gradients

    def grad_s(self, grad: Rounded) -> Rounded:
        """dS [M, r] of a layer with a branch."""
        assert self.lora_B is not None
        product = self.arithmetic.product(grad, self.lora_B)
        # It is rounded, and rounded again as it is scaled.
        return (product * self.scaling).stored(self.arithmetic.storage, times=2)

    def grad_x(self, grad: Rounded, ds: Rounded) -> Rounded:
        """dX [M, K] of a layer with a branch."""
        base = None
        if self.weight is not None:
            base = self.arithmetic.product(grad, self.weight).stored(self.arithmetic.storage)
        return self._with_branch(base, ds)

    def _with_branch(self, base: Rounded | None, ds: Rounded) -> Rounded:
        assert self.lora_A is not None
        storage = self.arithmetic.storage
        branch = self.masked(self.arithmetic.product(ds, self.lora_A).stored(storage))
        if base is None:
            return branch
        return self.arithmetic.onto(base, branch, self.lora_A.exact.shape[0]).stored(storage)

    def grad_a(self, ds: Rounded, dropped: Rounded, dtype: torch.dtype | None = None) -> Rounded:
        """dA [r, K] for the X that the branch has read, masked; stored as ``dtype`` or as
        intermediate results are.
        """
        return self.arithmetic.product(ds.T, dropped).stored(dtype or self.arithmetic.storage)


class RoundedMLP:
    """A gated MLP: Y = down(act(gate(X)) ∘ up(X))."""

    def __init__(
        self, gate: RoundedLayer, up: RoundedLayer, down: RoundedLayer, activation: str
    ) -> None:
        self.gate, self.up, self.down = gate, up, down
        self.activation = activation
        self.arithmetic = gate.arithmetic

    def forward(self, x: Rounded) -> Rounded:
        self.g, self.u = self.gate.forward(x), self.up.forward(x)
        self.act, self.slope = activated(self.g, self.activation, self.arithmetic)
        return self.down.forward((self.act * self.u).stored(self.arithmetic.storage))

    def backward(self, grad: Rounded) -> list[dict[str, Rounded]]:
        """The gradients of gate, of up and of down by their operands' names. That of x is gate's,
        and of both.
        """
        storage = self.arithmetic.storage
        of_down = self.down.backward(grad)
        dh = of_down["x"]
        of_up = self.up.backward((dh * self.act).stored(storage))
        of_gate = self.gate.backward(((dh * self.u).stored(storage) * self.slope).stored(storage))
        width = of_down["x"].exact.shape[1]
        of_gate["x"] = self.arithmetic.total([of_gate["x"], of_up["x"]], [width, width])
        return [of_gate, of_up, of_down]


class Activated(NamedTuple):
    act: Rounded
    slope: Rounded


def activated(g: Rounded, activation: str, arithmetic: Arithmetic) -> Activated:
    """act(G), and its derivative."""
    act, slope, curvature = derivatives(g.exact, activation)
    sums = arithmetic.sums
    # An argument's size bounds act's, and 1 is about the largest slope.
    of_act = deviation_of_rounding(g.exact, sums) * math.sqrt(OF_ACTIVATION)
    of_slope = deviation_of_rounding(torch.ones_like(act), sums) * math.sqrt(OF_ACTIVATION)
    # The errors of G pass on by the derivatives.
    error = g.value - g.exact
    acts = Rounded(act + slope * error, g.deviation * slope.abs(), g.errors).rounded(of_act)
    slopes = Rounded(slope + curvature * error, g.deviation * curvature.abs(), g.errors).rounded(
        of_slope
    )
    return Activated(acts.stored(arithmetic.storage), slopes)


class RoundedDoRA:
    """DoRA: Y = f (Z - bias) + bias, f = m / n, for a layer's Z, which has the bias, with the
    magnitudes m and the norms n of the rows of W + s B A.

    The rounding of n is left out: a norm of K numbers has 1/√K of the relative error of one of
    them.
    """

    def __init__(self, layer: RoundedLayer, magnitude: Tensor, norms: Tensor) -> None:
        self.layer = layer
        self.norms, self.factor = norms, magnitude / norms
        self.arithmetic = layer.arithmetic

    def forward(self, x: Rounded) -> Rounded:
        storage = self.arithmetic.storage
        self.z = self.layer.forward(x)
        # The factor is rounded as well.
        y = (self.z * self.factor).stored(storage, times=2)
        if self.layer.bias is None:
            return y
        rest = (self.layer.bias * (1 - self.factor)).stored(self.arithmetic.sums, times=2)
        return (y + rest).stored(storage)

    def backward(self, grad: Rounded) -> dict[str, Rounded]:
        """The gradients of the layer by their operands' names, and that of the magnitudes [N]."""
        storage = self.arithmetic.storage
        gradients = self.layer.backward((grad * self.factor).stored(storage, times=2))
        ones = torch.ones_like(self.z.exact[:, :1])
        scaled = self.z if self.layer.bias is None else self.z + self.layer.bias * -1.0
        sums = self.arithmetic.product(
            (grad * scaled).stored(storage).T, Rounded(ones, torch.zeros_like(ones))
        )
        gradients["magnitude"] = (sums.stored(storage) * (1 / self.norms)[:, None]).stored(storage)
        return gradients


class RoundedLoss:
    """Cross-entropy of logits Z [M, V] for labels [M]: L = log Σ exp U - U[label] of each row, with U
    = softcap · tanh(logit_scale · Z / softcap).
    """

    def __init__(
        self,
        arithmetic: Arithmetic,
        z: Rounded,
        labels: Tensor,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self.arithmetic = arithmetic
        sums = arithmetic.sums
        self.scale, self.slope = logit_scale, None
        u = z if logit_scale == 1.0 else (z * logit_scale).stored(sums)
        if softcap is not None:
            tanh = torch.tanh(u.value / softcap)
            slope, t = 1 - tanh.square(), tanh.detach()
            self.slope = Rounded(
                slope, u.deviation * (2 * t * slope.detach() / softcap).abs(), u.errors
            ).rounded(deviation_of_rounding(torch.ones_like(t), sums) * math.sqrt(OF_ACTIVATION))
            # The quotient and the product are rounded too.
            u = Rounded(softcap * tanh, u.deviation * slope.detach(), u.errors).stored(
                sums, times=OF_ACTIVATION + 2
            )
        largest = u.exact.amax(1, keepdim=True)
        # The difference is rounded, and again as it is multiplied for a power of two.
        self.shifted = Rounded(u.value - largest, u.deviation, u.errors).stored(sums, times=2)
        e = self.shifted.exact.exp()
        powers = Rounded(
            self.shifted.value.exp(), e * self.shifted.deviation, self.shifted.errors
        ).stored(sums, times=OF_ACTIVATION)
        ones = torch.ones_like(e.T[:, :1])
        # Its own rounding. Those of the powers are in what is computed from both.
        self.total = arithmetic.product(
            Rounded(powers.value, torch.zeros_like(e), powers.errors),
            Rounded(ones, torch.zeros_like(ones)),
        )
        self.p = e / e.sum(1, keepdim=True)
        self.labels = torch.nn.functional.one_hot(labels, e.shape[1]).double()
        self.q = self.p - self.labels
        # Of U and of the power together, relative to the power.
        self.relative = torch.where(e > 0, powers.deviation / e, 0.0)
        self.powers = powers

    def losses(self) -> Rounded:
        """L [M, 1], not stored."""
        variance = (self.q * self.relative).square().sum(1, keepdim=True)
        total = self.total.exact
        deviation = torch.hypot(variance.sqrt(), self.total.deviation / total)
        target = (self.shifted.value * self.labels).sum(1, keepdim=True)
        logarithm = deviation_of_rounding(total.log(), self.arithmetic.sums)
        loss = Rounded(self.total.value.log() - target, deviation, self.total.errors)
        return loss.rounded(logarithm * math.sqrt(OF_ACTIVATION))

    def backward(self, grad: Tensor) -> Rounded:
        """dZ [M, V] for an exact gradient of L [M]."""
        sums, storage = self.arithmetic.sums, self.arithmetic.storage
        # An error d of U makes one of p (d - Σ p d) in p.
        square = self.relative.square()
        variance = (1 - 2 * self.p) * square + (self.p.square() * square).sum(1, keepdim=True)
        own = self.p * (self.total.deviation / self.total.exact)
        deviation = torch.hypot(self.p * variance.clamp(min=0).sqrt(), own)
        p = Rounded(self.powers.value / self.total.value, deviation, self.total.errors).stored(sums)
        q = Rounded(p.value - self.labels, p.deviation, p.errors).stored(sums)
        dz = (q * (grad * self.scale)[:, None]).stored(sums)
        dz = (dz if self.slope is None else dz * self.slope).stored(storage, times=2)
        # The product and the branch that read it have the same errors: (a + b)² is at most 2 (a² +
        # b²).
        return Rounded(dz.value, math.sqrt(2) * dz.deviation, dz.errors)


def derivatives(g: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """act(g), act'(g) and act''(g)."""
    with torch.enable_grad():
        g = g.detach().requires_grad_()
        act = activation_ref(g, activation)
        (slope,) = torch.autograd.grad(act.sum(), g, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), g)
    return act.detach(), slope.detach(), curvature
