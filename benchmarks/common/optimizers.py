"""Every optimizer for LoRA pairs, by name, for benchmarks of speed and of accuracy.

    optimizer = build("LoRA+ (PEFT), AdamW fused", pairs, lr=1e-4)

Rivals run as their authors ship them. LoRA-RITE is this repository's own reading of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.common.lora_rite import LoRARITE
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
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
LORA_PLUS, RIEMANNIAN, RITE = "LoRA+ (PEFT), AdamW fused", "Riemannian (PEFT), AdamW fused", "LoRA-RITE"
TORCHAO, BITSANDBYTES = "AdamW 8-bit (torchao)", "AdamW 8-bit (bitsandbytes)"
OURS = "StableLoRAAdamW"


class Unavailable(RuntimeError):
    """An arm can't run here, for the given reason. Benchmarks report it as skipped."""


class NaiveStableAdamW(torch.optim.AdamW):
    """Algorithm 1 in its simplest form: two norms, a comparison on the host and a product for each pair."""

    def __init__(
        self, pairs: Sequence[LoRAPair], lr: float, *, shrink_ratio: float = SHRINK_RATIO, **kwargs: Any
    ) -> None:
        self.pairs, self.shrink_ratio = list(pairs), shrink_ratio
        self.stable = [False] * len(self.pairs)
        super().__init__(_halves(pairs), lr=lr, **kwargs)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for i, pair in enumerate(self.pairs):
            if not self.stable[i]:
                if pair.A.norm() / pair.A.shape[1] > pair.B.norm() / pair.B.shape[0]:
                    pair.A.mul_(1 - self.shrink_ratio)
                else:
                    self.stable[i] = True
        super().step()


def build(name: str, pairs: Sequence[LoRAPair], *, lr: float, weight_decay: float = 1e-2, **options: Any) -> Any:
    """The optimizer ``name`` over A and B of ``pairs``; ``options`` may be betas, eps and what the arm itself takes.

    Raises:
        ValueError: there is no such arm.
        Unavailable: it can't run here, with the reason.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(map(repr, _BUILDERS))}, got {name!r}")
    return _BUILDERS[name](list(pairs), lr=lr, weight_decay=weight_decay, **options)


def _halves(pairs: Sequence[LoRAPair]) -> list[torch.Tensor]:
    return [half for pair in pairs for half in (pair.A, pair.B)]


def _adamw(**how: bool) -> Callable[..., torch.optim.Optimizer]:
    return lambda pairs, **options: torch.optim.AdamW(_halves(pairs), **how, **options)


def _naive(**how: bool) -> Callable[..., torch.optim.Optimizer]:
    return lambda pairs, **options: NaiveStableAdamW(pairs, **how, **options)


def _rite(pairs: Sequence[LoRAPair], **options: Any) -> LoRARITE:
    dtypes = {half.dtype for half in _halves(pairs)}
    if not dtypes <= {torch.float32, torch.float64}:
        raise Unavailable(f"LoRA-RITE here decomposes float32 and float64 matrices only, got {_list(dtypes)}")
    return LoRARITE(pairs, **options)


def _lora_plus(pairs: Sequence[LoRAPair], *, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    create = _peft("create_loraplus_optimizer")
    options = {"loraplus_lr_ratio": LORA_PLUS_RATIO, "loraplus_weight_decay": weight_decay, "fused": True} | options
    return create(_as_peft_model(pairs), torch.optim.AdamW, **options)


def _riemannian(pairs: Sequence[LoRAPair], **options: Any) -> torch.optim.Optimizer:
    """Its step multiplies the gradients in place, so every step needs new ones."""
    create = _peft("create_riemannian_optimizer")
    return create(_as_peft_model(pairs), torch.optim.AdamW, **({"fused": True} | options))


def _eight_bits(package: str, module: str) -> Callable[..., torch.optim.Optimizer]:
    def create(pairs: Sequence[LoRAPair], **options: Any) -> torch.optim.Optimizer:
        try:
            optimizer = import_module(module).AdamW8bit
        except ImportError as error:
            raise Unavailable(f"{package} can't be imported: {_line(error)}") from error
        _rehearse(package, optimizer, pairs[0], options)
        return optimizer(_halves(pairs), **options)

    return create


def _rehearse(package: str, optimizer: Any, pair: LoRAPair, options: dict[str, Any]) -> None:
    """Take a step with copies: only that shows whether 8 bits run on this device."""
    halves = [nn.Parameter(half.detach().clone()) for half in (pair.A, pair.B)]
    for half in halves:
        half.grad = torch.zeros_like(half)
    try:
        optimizer(halves, **options).step()
    except Exception as error:
        # Each package fails in its own way: a missing kernel, a missing compiler, an unknown device.
        raise Unavailable(f"{package} can't step on {pair.A.device}: {_line(error)}") from error


def _peft(name: str) -> Any:
    try:
        return getattr(import_module("peft.optimizers"), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"peft has no optimizers.{name}: {_line(error)}") from error


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


def _list(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


_BUILDERS: dict[str, Callable[..., Any]] = {
    ADAMW_FUSED: _adamw(fused=True),
    ADAMW_FOREACH: _adamw(foreach=True),
    # Without an argument AdamW takes foreach on a GPU.
    ADAMW_LOOP: _adamw(foreach=False),
    NAIVE: _naive(foreach=False),
    NAIVE_FOREACH: _naive(foreach=True),
    LORA_PLUS: _lora_plus,
    RIEMANNIAN: _riemannian,
    RITE: _rite,
    TORCHAO: _eight_bits("torchao", "torchao.optim"),
    BITSANDBYTES: _eight_bits("bitsandbytes", "bitsandbytes.optim"),
    OURS: lambda pairs, **options: StableLoRAAdamW(pairs, **({"shrink_ratio": SHRINK_RATIO} | options)),
}
ARMS = tuple(_BUILDERS)
