"""The arms that benchmarks compare: a frozen model, PEFT's adapters, the same under a few lines of
plain PyTorch and under ``accelerate_peft``, and our layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import stablelora_kernels as slk

FROZEN, PEFT, ACCELERATED, OURS = "frozen", "PEFT", "accelerated PEFT", "ours"
# The yardstick, by the lines of code of ``benchmarks/common/plain_pytorch.py``.
PLAIN = "72 lines of PyTorch"
# What follows the name of an arm that computes several layers in one op.
MLP_FUSED, MLP_TILED, PROJECTIONS_FUSED = ", MLP fused", ", MLP in tiles", ", projections fused"


def adapt(
    model: nn.Module,
    arm: str,
    targets: Sequence[str],
    *,
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    float32: bool = True,
    every_mlp: bool = True,
) -> nn.Module:
    """``model`` with an arm's adapters, as a user would put them in: on the linear layers whose
    names end with ``targets``.

    It changes ``model``. ``arm`` is one of the names above, ``ACCELERATED`` and ``OURS`` also with
    ``MLP_FUSED``, ``MLP_TILED`` or ``PROJECTIONS_FUSED``. ``alpha`` is 2 r unless given. Adapters are float32,
    PEFT's default and ours, or with ``float32=False`` in the dtype of ``model``. With
    ``every_mlp=False`` an MLP that can't be fused stays as it is.

    Raises:
        ValueError: there is no such arm, or it would leave a layer to PEFT or, with ``every_mlp``,
            an MLP to its own forward.
    """
    layers, comma, fused = arm.partition(", ")
    fusions = {"fuse_mlp": MLP_FUSED, "tile_mlp": MLP_TILED, "fuse_projections": PROJECTIONS_FUSED}
    fuse = {name: True for name, words in fusions.items() if comma + fused == words}
    every_arm = (FROZEN, PEFT, PLAIN, ACCELERATED, OURS)
    if layers not in every_arm or (bool(fused) != bool(fuse)):
        raise ValueError(
            f"arm must be {', '.join(every_arm[:-1])} or {OURS}, perhaps fused, got {arm!r}"
        )
    options: dict[str, Any] = {"r": r, "lora_alpha": alpha or 2 * r, "lora_dropout": dropout}
    options["target_modules"] = list(targets)
    report: Any = None
    if layers == FROZEN:
        let_gradients_reach(model, targets)
    elif layers == OURS:
        dtype = next(model.parameters()).dtype
        report = slk.apply_lora(model, **options, **fuse)
        for pair in () if float32 else slk.lora_pairs(model):
            pair.A.data, pair.B.data = pair.A.data.to(dtype), pair.B.data.to(dtype)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=float32)
        if layers == PLAIN:
            from benchmarks.common.plain_pytorch import use_plain_pytorch

            use_plain_pytorch(model)
        if layers == ACCELERATED:
            # strict would refuse a fuse_mlp that finds no MLP.
            report = slk.accelerate_peft(model, strict=every_mlp, **fuse)
            if report.skipped:
                raise ValueError(
                    f"every layer must run on the ops for {arm!r}, got {report.skipped}"
                )
    if (
        every_mlp
        and fuse.keys() & {"fuse_mlp", "tile_mlp"}
        and (not report.mlps or any(mlp.reason for mlp in report.mlps))
    ):
        raise ValueError(f"every MLP must be fused for {arm!r}, got {report.mlps}")
    return model


def let_gradients_reach(model: nn.Module, targets: Sequence[str]) -> None:
    """Make the frozen model's backward pass as deep as LoRA's, so that the difference is LoRA's own
    cost.

    LoRA needs the gradient of every adapted layer's output; the frozen model alone would not
    compute the first one's.
    """

    def ask(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            module.register_forward_hook(ask)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give the adapters of all arms equal numbers. With a zero B, gradients of A would be zero."""
    generator = torch.Generator().manual_seed(0)
    for pair in slk.lora_pairs(model):
        for half in (pair.A, pair.B):
            half.copy_(torch.randn(half.shape, generator=generator) * 0.02)
