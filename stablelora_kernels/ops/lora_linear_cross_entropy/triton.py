"""The losses of a chunk by one launch of a kernel, which its first use proves."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from stablelora_kernels.dispatch.first_use import ONE_LAUNCH, OPERATORS
from stablelora_kernels.dispatch.tallies import tally_of
from stablelora_kernels.ops.lora_linear_cross_entropy.call import Chunk, CrossEntropyCall
from stablelora_kernels.ops.lora_linear_cross_entropy.proof import Cap, kernel_fault
from stablelora_kernels.ops.lora_linear_cross_entropy.torch import losses_torch


def losses_triton(call: CrossEntropyCall, chunk: Chunk) -> Tensor:
    """The losses of a chunk. If gradients are needed, dZ takes the place of the logits."""
    settings = call.settings
    row_scale = chunk.row_scale
    # The kernel reads both with a stride of 1; a gradient of sum()'s is one number.
    row_scale = None if row_scale is None else row_scale.contiguous()
    chunk = Chunk(chunk.logits, chunk.labels.contiguous(), row_scale)
    options = f"gradient {settings.needs_gradient}, softcap {settings.softcap != 0}, scaled {row_scale is not None}"
    by_kernel = partial(_losses_by_kernel, call)
    by_operators = partial(losses_torch, call)
    cap = Cap(settings.softcap, settings.logit_scale)
    fault = kernel_fault(chunk, options, settings.ignore_index, cap, by_kernel, by_operators)
    if not fault:
        tally_of("lora_linear_cross_entropy", ONE_LAUNCH, "").calls += 1
        return by_kernel(chunk)
    tally_of("lora_linear_cross_entropy", OPERATORS, fault).calls += 1
    return by_operators(chunk)


def _losses_by_kernel(call: CrossEntropyCall, chunk: Chunk) -> Tensor:
    from stablelora_kernels.launch.lora_linear_cross_entropy import cross_entropy

    logits = chunk.logits
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    cross_entropy(call, chunk, losses).run(logits.device)
    return losses
