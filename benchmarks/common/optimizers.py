"""Every optimizer for LoRA pairs, by name, for benchmarks of speed and of accuracy.

    optimizer = build("LoRA+ (PEFT), AdamW fused", pairs, lr=1e-4)

Rivals run as their authors ship them. LoRA-RITE is this repository's own reading of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.common.lora_rite import LoRARITE
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.stable_shrink import StableShrink, shrinks_of
from stablelora_kernels.pairs import LoRAPair

# The paper's ratios. The smallest is the library's default.
SHRINK_RATIOS = (5e-4, 1e-3, 2e-3, 5e-3)
SHRINK_RATIO = SHRINK_RATIOS[0]
# Small enough that no pair latches during a measurement.
LR = 1e-6
# The ratio of learning rates that LoRA+'s authors recommend (arXiv 2402.12354).
LORA_PLUS_RATIO = 16.0

ADAMW_LOOP, ADAMW_FOREACH, ADAMW_FUSED = "AdamW loop", "AdamW foreach", "AdamW fused"
NAIVE, NAIVE_FOREACH = "Algorithm 1 by hand, AdamW loop", "Algorithm 1 by hand, AdamW foreach"
LORA_PLUS = "LoRA+ (PEFT), AdamW fused"
RIEMANNIAN = "Riemannian (PEFT), AdamW fused"
RITE = "LoRA-RITE"
TORCHAO, BITSANDBYTES = "AdamW 8-bit (torchao)", "AdamW 8-bit (bitsandbytes)"
OURS, SHRINK = "StableLoRAAdamW", "AdamW fused, StableShrink"


class Unavailable(RuntimeError):
    """An arm can't run here, for the given reason. Benchmarks report it as skipped."""


class NaiveStableAdamW(torch.optim.AdamW):
    """Algorithm 1 in its simplest form: two norms, a comparison on the host and a product for each
    pair.
    """

    def __init__(
        self, pairs: Sequence[LoRAPair], *, shrink_ratio: float = SHRINK_RATIO, **options: Any
    ) -> None:
        self.pairs, self.shrink_ratio = list(pairs), shrink_ratio
        self.latched = [False] * len(self.pairs)
        super().__init__(_halves(pairs), **options)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for i, pair in enumerate(self.pairs):
            if not self.latched[i]:
                if pair.A.norm() / pair.A.shape[1] > pair.B.norm() / pair.B.shape[0]:
                    pair.A.mul_(1 - self.shrink_ratio)
                else:
                    self.latched[i] = True
        super().step()


def build(
    name: str, pairs: Sequence[LoRAPair], *, lr: float, weight_decay: float = 1e-2, **options: Any
) -> Any:
    """The optimizer ``name`` over A and B of ``pairs``; ``options`` may be betas, eps and what the
    arm itself takes.

    Raises:
        ValueError: there is no such arm.
        Unavailable: it can't run here, with the reason.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(map(repr, _BUILDERS))}, got {name!r}")
    return _BUILDERS[name](list(pairs), lr=lr, weight_decay=weight_decay, **options)


def state_bytes(optimizer: Any) -> int:
    """Bytes of its tensors but for counters."""
    # PEFT's optimizers wrap torch's own.
    tensors = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    return sum(value.nbytes for value in tensors if value.dim())


def _halves(pairs: Sequence[LoRAPair]) -> list[torch.Tensor]:
    return [half for pair in pairs for half in (pair.A, pair.B)]


def _adamw(pairs: Sequence[LoRAPair], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_halves(pairs), **options)


def _shrunk(pairs: Sequence[LoRAPair], **options: Any) -> torch.optim.Optimizer:
    optimizer = _adamw(pairs, fused=True, **options)
    StableShrink(optimizer, pairs, shrink_ratio=SHRINK_RATIO)
    return optimizer


def latches_of(name: str, optimizer: Any) -> list[bool] | None:
    """Of the arm ``name``: whether each pair has latched. None if the arm has no Algorithm 1."""
    if name in (OURS, SHRINK):
        source = optimizer if name == OURS else shrinks_of(optimizer)[0]
        return [pair.latched for pair in source.stability()]
    return optimizer.latched if name in (NAIVE, NAIVE_FOREACH) else None


def _rite(pairs: Sequence[LoRAPair], **options: Any) -> LoRARITE:
    # Its state has the parameters' dtype, and is decomposed.
    if others := {half.dtype for half in _halves(pairs)} - {torch.float32, torch.float64}:
        raise Unavailable(
            f"LoRA-RITE here decomposes float32 and float64 matrices alone, got {others}"
        )
    return LoRARITE(pairs, **options)


def _lora_plus(
    pairs: Sequence[LoRAPair], *, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    create = optional("peft.optimizers", "create_loraplus_optimizer")
    options = {
        "loraplus_lr_ratio": LORA_PLUS_RATIO,
        "loraplus_weight_decay": weight_decay,
    } | options
    return create(_as_peft_model(pairs), torch.optim.AdamW, **options)


def _riemannian(pairs: Sequence[LoRAPair], **options: Any) -> torch.optim.Optimizer:
    """Its step multiplies the gradients in place, so every step needs new ones."""
    create = optional("peft.optimizers", "create_riemannian_optimizer")
    return create(_as_peft_model(pairs), torch.optim.AdamW, **options)


def _eight_bits(module: str, pairs: Sequence[LoRAPair], **options: Any) -> torch.optim.Optimizer:
    optimizer = optional(module, "AdamW8bit")
    # Step with copies: only that shows whether 8 bits run on this device.
    halves = [nn.Parameter(half.detach().clone()) for half in (pairs[0].A, pairs[0].B)]
    for half in halves:
        half.grad = torch.zeros_like(half)
    try:
        optimizer(halves, **options).step()
    except Exception as error:
        # Each package fails in its own way: a missing kernel, a missing compiler, an unknown
        # device.
        raise Unavailable(f"{module} can't step on {halves[0].device}: {_line(error)}") from error
    return optimizer(_halves(pairs), **options)


def optional(module: str, name: str) -> Any:
    """``name`` of ``module``; raises :class:`Unavailable` if a rival's package lacks it."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{module}.{name} can't be imported: {_line(error)}") from error


def _as_peft_model(pairs: Sequence[LoRAPair]) -> nn.Module:
    """A model with nothing but adapters, under the names that PEFT's optimizers look for."""
    layers = []
    for pair in pairs:
        if not all(isinstance(half, nn.Parameter) for half in (pair.A, pair.B)):
            raise TypeError(
                f"{pair.name} must consist of nn.Parameters, got {type(pair.A).__name__} and {type(pair.B).__name__}"
            )
        layer = nn.Module()
        for key, half in (("lora_A", pair.A), ("lora_B", pair.B)):
            linear = nn.Linear(half.shape[1], half.shape[0], bias=False, device="meta")
            linear.weight = half  # type: ignore[assignment]
            layer.add_module(key, nn.ModuleDict({"default": linear}))
        layers.append(layer)
    return nn.ModuleList(layers)


def _line(error: BaseException) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"


# Without an argument AdamW takes foreach on a GPU.
_BUILDERS: dict[str, Callable[..., Any]] = {
    ADAMW_FUSED: partial(_adamw, fused=True),
    ADAMW_FOREACH: partial(_adamw, foreach=True),
    ADAMW_LOOP: partial(_adamw, foreach=False),
    NAIVE: partial(NaiveStableAdamW, foreach=False),
    NAIVE_FOREACH: partial(NaiveStableAdamW, foreach=True),
    LORA_PLUS: partial(_lora_plus, fused=True),
    RIEMANNIAN: partial(_riemannian, fused=True),
    RITE: _rite,
    TORCHAO: partial(_eight_bits, "torchao.optim"),
    BITSANDBYTES: partial(_eight_bits, "bitsandbytes.optim"),
    SHRINK: _shrunk,
    OURS: partial(StableLoRAAdamW, shrink_ratio=SHRINK_RATIO),
}
ARMS = tuple(_BUILDERS)
