"""The optimizer step in plain PyTorch, written for reading: Algorithm 1, decoupled AdamW,
stochastic rounding.

Everything computes in the dtype of its arguments; in float64 it is the oracle of the tests. Nothing
is fast, and the host may read every value. Sources: Stable-LoRA, arXiv 2603.05204, Algorithm 1;
AdamW, arXiv 1711.05101.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from stablelora_kernels.pairs import LoRAPair

_WORD = 0xFFFFFFFF


def shrink_ref(
    A: torch.Tensor,
    B: torch.Tensor,
    latched: bool,
    shrink_ratio: float,
    stop_condition: str = "norm",
) -> tuple[torch.Tensor, bool]:
    """Algorithm 1 on one pair A [r, n], B [m, r], before its update: ``(A, latched)``.

    A becomes (1 - shrink_ratio) A while ``||A||_F / n > ||B||_F / m``. The first time the test
    fails the pair latches, and A never shrinks again. With a norm that is not finite the pair
    neither shrinks nor latches. With ``stop_condition`` "never" A shrinks at any finite norms.
    """
    a_norm = A.norm().item() / max(A.shape[1], 1)
    b_norm = B.norm().item() / max(B.shape[0], 1)
    if latched or not (math.isfinite(a_norm) and math.isfinite(b_norm)):
        return A, latched
    if a_norm > b_norm or stop_condition == "never":
        return A * (1 - shrink_ratio), False
    return A, True


@dataclass
class AdamWState:
    """The moments of one parameter, in its shape, and the number of steps it has taken."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int = 0


def adamw_ref(
    p: torch.Tensor,
    grad: torch.Tensor,
    state: AdamWState,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> torch.Tensor:
    """The value of ``p`` after one step of AdamW; ``state`` advances in place.

    ::

        p <- (1 - lr wd) p
        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
        p <- p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    """
    beta1, beta2 = betas
    g = -grad if maximize else grad
    state.step += 1
    state.exp_avg = beta1 * state.exp_avg + (1 - beta1) * g
    state.exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * g * g
    m = state.exp_avg / (1 - beta1**state.step)
    v = state.exp_avg_sq / (1 - beta2**state.step)
    return (1 - lr * weight_decay) * p - lr * m / (v.sqrt() + eps)


def clip_coefficient_ref(grads: list[torch.Tensor], max_grad_norm: float | None) -> float | None:
    """The factor by which ``torch.nn.utils.clip_grad_norm_`` multiplies gradients; None if their
    norm is not finite.
    """
    if max_grad_norm is None:
        return 1.0
    total = math.sqrt(sum(g.square().sum().item() for g in grads))
    if not math.isfinite(total):
        return None
    return min(max_grad_norm / (total + 1e-6), 1.0)


@dataclass
class StableAdamWRef:
    """The whole optimizer over pairs and lone parameters of one group.

    ``step`` changes the tensors in place. A pair whose A has no gradient neither shrinks nor
    latches; its B still takes AdamW's step.
    """

    pairs: list[LoRAPair]
    lone: list[torch.Tensor] = field(default_factory=list)
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    shrink_ratio: float = 5e-4
    # Ratios of single pairs, by pair name.
    shrink_ratios: dict[str, float] = field(default_factory=dict)
    stop_condition: str = "norm"
    # B's learning rate is this multiple of lr.
    lr_ratio_B: float = 1.0
    maximize: bool = False
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        self.params = [p for pair in self.pairs for p in (pair.A, pair.B)] + self.lone
        self.state = {p: AdamWState(torch.zeros_like(p), torch.zeros_like(p)) for p in self.params}
        # By pair name: the step of A, counted from one, at which the pair latched.
        self.latched_at: dict[str, int | None] = {pair.name: None for pair in self.pairs}

    @torch.no_grad()
    def step(self, grads: dict[torch.Tensor, torch.Tensor]) -> None:
        """One step; ``grads`` holds the gradient of each tensor that has one."""
        coefficient = clip_coefficient_ref(list(grads.values()), self.max_grad_norm)
        # Skip a step whose gradients have a norm that is not finite.
        if coefficient is None:
            return
        for pair in self.pairs:
            if pair.A in grads:
                before = self.latched_at[pair.name] is not None
                shrunk, latched = shrink_ref(
                    pair.A,
                    pair.B,
                    before,
                    self.shrink_ratios.get(pair.name, self.shrink_ratio),
                    self.stop_condition,
                )
                pair.A.copy_(shrunk)
                if latched and not before:
                    self.latched_at[pair.name] = self.state[pair.A].step + 1
        bs = {pair.B for pair in self.pairs}
        for p in self.params:
            if p in grads:
                new = adamw_ref(
                    p,
                    grads[p] * coefficient,
                    self.state[p],
                    lr=self.lr * (self.lr_ratio_B if p in bs else 1.0),
                    betas=self.betas,
                    eps=self.eps,
                    weight_decay=self.weight_decay,
                    maximize=self.maximize,
                )
                p.copy_(new)


def mix32(x: int) -> int:
    """A bijection of 32-bit words: each bit of the argument flips about half the bits of the
    result.

    A multiply-xorshift finalizer with the constants that Chris Wellons found by search (public
    domain, "lowbias32", https://nullprogram.com/blog/2018/07/31/).
    """
    x &= _WORD
    x ^= x >> 16
    x = x * 0x7FEB352D & _WORD
    x ^= x >> 15
    x = x * 0x846CA68B & _WORD
    return x ^ x >> 16


def rounding_key_ref(seed: int, step: int) -> int:
    """The rounding key of one parameter at its ``step``: both halves of the 63-bit seed and the
    step, mixed.
    """
    return mix32(step + mix32(mix32(seed) ^ (seed >> 32)))


def rounding_noise_ref(seed: int, step: int, index: int) -> int:
    """The 32 random bits that round element ``index`` of the concatenation of all parameters at
    ``step``.
    """
    return mix32(index ^ rounding_key_ref(seed, step))


def moment_noise_ref(seed: int, step: int, index: int) -> tuple[int, int]:
    """The random bits, 16 each, that round an element's two bfloat16 moments."""
    word = mix32(rounding_noise_ref(seed, step, index) + 0x9E3779B9)
    return word & 0xFFFF, word >> 16


def stochastic_round_ref(x: float, dtype: torch.dtype, noise: int) -> float:
    """The float32 value ``x`` rounded up or down at random to bfloat16 or float16, so that the mean
    is ``x``.

    Let q be the distance of the two values of ``dtype`` around ``x``. The magnitude becomes ``q
    floor(abs(x) / q)``, or one q more with the probability of the fraction lost.
    """
    if not math.isfinite(x) or x == 0:
        return x
    digits, smallest = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}[dtype]
    exponent = math.frexp(x)[1] - digits
    quantum = 2.0 ** max(exponent, smallest)
    whole = math.floor(abs(x) / quantum)
    lost = abs(x) / quantum - whole
    # As many random bits as float32's significand has beyond the result's, but 24 if float16 is
    # subnormal.
    bits = 24 if dtype is torch.float16 and exponent < smallest else 24 - digits
    up = lost * 2**bits + noise % 2**bits >= 2**bits
    return math.copysign((whole + up) * quantum, x)


def moment8_ref(values: list[float], noises: list[int], signed: bool) -> tuple[list[float], float]:
    """A block of a moment rounded to 8 bits: the decoded values, multiplied by the scale, and the
    scale.

    The scale makes the largest magnitude 1.875. Values are rounded at random to a sign bit, 4
    exponent bits and 3 fraction bits. Without a sign (the second moment) there are 5 exponent bits.
    From 2^-14 (unsigned: 2^-30) on, steps are an eighth of the value's power of two; below they are
    2^-17 (2^-33).
    """
    scale = max(map(abs, values)) / 1.875
    smallest = -14 if signed else -30
    result = []
    for x, noise in zip(values, noises, strict=True):
        y = abs(x) / scale if scale else 0.0
        normal = y >= 2.0**smallest
        quantum = 2.0 ** ((math.frexp(y)[1] - 1 if normal else smallest) - 3)
        whole = math.floor(y / quantum)
        lost = y / quantum - whole
        # The lower 20 bits of noise, or the upper 24.
        up = lost * 2**20 + noise % 2**20 >= 2**20 if normal else lost > (noise >> 8) / 2**24
        result.append(math.copysign((whole + up) * quantum * scale, x))
    return result, scale
