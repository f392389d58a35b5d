"""The losses of a chunk by one launch of a kernel, which its first use proves."""

from __future__ import annotations

from functools import partial

import torch

from stablelora_kernels.dispatch.first_use import ONE_LAUNCH, OPERATORS
from stablelora_kernels.dispatch.tallies import tally_of
from stablelora_kernels.ops.lora_linear_cross_entropy.call import (
    Chunk,
    CrossEntropyCall,
    OfTokens,
)
from stablelora_kernels.ops.lora_linear_cross_entropy.proof import Cap, kernel_fault
from stablelora_kernels.ops.lora_linear_cross_entropy.torch import losses_torch


def losses_triton(call: CrossEntropyCall, chunk: Chunk) -> OfTokens:
    """The losses and, if needed, the entropies of a chunk. If gradients are needed, dZ takes the place
    of the logits.
    """
    settings = call.settings
    # The kernel reads these with a stride of 1; a gradient of sum()'s is one number.
    scales = [
        None if scale is None else scale.contiguous()
        for scale in (chunk.row_scale, chunk.entropy_scale)
    ]
    chunk = Chunk(chunk.logits, chunk.labels.contiguous(), *scales)
    options = (
        f"gradient {settings.needs_gradient}, softcap {settings.softcap != 0}, scaled {scales[0] is not None}, "
        f"entropy {settings.need_entropy}, its gradient {scales[1] is not None}"
    )
    by_kernel = partial(_losses_by_kernel, call)
    by_operators = partial(losses_torch, call)
    cap = Cap(settings.softcap, settings.logit_scale)
    fault = kernel_fault(chunk, options, settings.ignore_index, cap, by_kernel, by_operators)
    if not fault:
        tally_of("lora_linear_cross_entropy", ONE_LAUNCH, "").calls += 1
        return by_kernel(chunk)
    tally_of("lora_linear_cross_entropy", OPERATORS, fault).calls += 1
    return by_operators(chunk)


def _losses_by_kernel(call: CrossEntropyCall, chunk: Chunk) -> OfTokens:
    from stablelora_kernels.launch.lora_linear_cross_entropy import cross_entropy

    logits = chunk.logits
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    entropies = losses.new_empty(logits.shape[0] if call.settings.need_entropy else 0)
    cross_entropy(call, chunk, losses, entropies).run(logits.device)
    return OfTokens(losses, entropies)
