"""LoRA-RITE (Yen et al., arXiv 2410.20625), written from the paper's algorithm as a rival in
accuracy and time.

Two factorizations of one product, Z = B A = (B R^-1) (R A), train alike: each factor's step is
taken in an orthonormal basis of the *other* factor's span, and that basis does not depend on R.

The paper writes its sums without forgetting. As in Adam, and as its authors do in practice, beta2
forgets second moment and escaped mass, beta1 the steps; decays are corrected for the zero start,
and the second moment is a mean over rows, so that a learning rate means what it means to Adam.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.pairs import LoRAPair


class LoRARITE(torch.optim.Optimizer):
    """LoRA-RITE over float32 or float64 pairs of A [r, n] and B [m, r], one pair after the other."""

    def __init__(
        self,
        pairs: Iterable[LoRAPair],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0):
            raise ValueError(
                f"lr, eps and weight_decay must be at least 0, got {lr}, {eps} and {weight_decay}"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([half for pair in pairs for half in (pair.A, pair.B)], defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for a, b in zip(group["params"][::2], group["params"][1::2], strict=True):
                # Compute both steps from the values before either.
                steps = [
                    self._step_of(a, a.t(), b, False, group),
                    self._step_of(b, b, a.t(), True, group),
                ]
                for half, step in zip((a, b), steps, strict=True):
                    if step is not None:
                        half.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                            step, alpha=group["lr"]
                        )

    def _step_of(
        self, parameter: Tensor, tall: Tensor, other: Tensor, is_b: bool, group: dict[str, Any]
    ) -> Tensor | None:
        """``parameter``'s step before the factor lr; its tall view is X [rows, r], and ``other`` is
        Y [columns, r].
        """
        if parameter.grad is None:
            return None
        state = self.state[parameter]
        if not state:
            r = tall.shape[1]
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["basis"] = torch.zeros_like(other, memory_format=torch.contiguous_format)
            state["momentum"] = torch.zeros_like(tall, memory_format=torch.contiguous_format)
            state["second"] = tall.new_zeros(r, r)
            state["escaped"] = tall.new_zeros(())
        state["step"] += 1
        t = state["step"].item()
        beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in group["betas"])

        # Y = basis core. pinv: X has no direction to step along if Y is zero or rank-deficient, as
        # B is at the start.
        basis, core = torch.linalg.qr(other)
        unmagnify = torch.linalg.pinv(core)
        grad = (parameter.grad if is_b else parameter.grad.t()) @ unmagnify

        # What is remembered moves into the new basis. Where that turned away from the old one,
        # curvature is lost ("escapes"); rho makes up for it, so that no step grows for want of it.
        turn = basis.t() @ state["basis"]
        moved = turn @ state["second"] @ turn.t()
        moved = (moved + moved.t()) / 2
        before, after = torch.linalg.eigvalsh(torch.stack((state["second"], moved)))
        escaped = beta2 * (state["escaped"] + (before - after).abs().max())
        second = beta2 * moved + (1 - beta2) / grad.shape[0] * (grad.t() @ grad)

        sizes, directions = torch.linalg.eigh(second)
        inverse_root = 1 / ((sizes.clamp(min=0) + escaped).sqrt() + group["eps"])
        direction = grad @ (directions * inverse_root) @ directions.t()
        momentum = beta1 * (state["momentum"] @ turn.t()) + (1 - beta1) * direction

        state.update(basis=basis, momentum=momentum, second=second, escaped=escaped)
        step = momentum @ unmagnify.t()
        return step if is_b else step.t()
