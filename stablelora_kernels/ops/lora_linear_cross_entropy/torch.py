"""The losses of a chunk by PyTorch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from stablelora_kernels.ops.lora_linear_cross_entropy.call import Chunk, CrossEntropyCall, sum_dtype

# Elements of the float32 copies of logits.
FLOAT32_ELEMENTS = 1 << 20


def losses_torch(call: CrossEntropyCall, chunk: Chunk) -> Tensor:
    """The losses of a chunk. If gradients are needed, dZ takes the place of the logits."""
    logits, labels, row_scale = chunk
    rows = max(1, FLOAT32_ELEMENTS // call.vocabulary)
    losses = logits.new_empty(logits.shape[0], dtype=sum_dtype(logits.dtype))
    for start in range(0, logits.shape[0], rows):
        few = slice(start, start + rows)
        scale = None if row_scale is None else row_scale[few]
        losses[few] = _losses_of_few(call, Chunk(logits[few], labels[few], scale))
    return losses


def _losses_of_few(call: CrossEntropyCall, chunk: Chunk) -> Tensor:
    """:func:`losses_torch` of few tokens, whose logits are copied to float32."""
    logits, labels, row_scale = chunk
    settings = call.settings
    wide = logits.to(sum_dtype(logits.dtype), copy=True)
    if settings.logit_scale != 1.0:
        wide.mul_(settings.logit_scale)
    slope = None
    if settings.softcap:
        wide.div_(settings.softcap).tanh_()
        if settings.needs_gradient:
            slope = 1 - wide.square()
        wide.mul_(settings.softcap)
    ignored = labels == settings.ignore_index
    is_known = (labels >= 0) & (labels < call.vocabulary)
    index = torch.where(is_known, labels, 0).unsqueeze(1)
    wide -= wide.amax(1, keepdim=True)
    target = wide.gather(1, index).squeeze(1)
    sums = wide.exp_().sum(1)
    losses = sums.log() - target
    # A label outside of the vocabulary, which only a CPU refuses without waiting for the device.
    losses = torch.where(is_known, losses, torch.nan).masked_fill_(ignored, 0)
    if settings.needs_gradient:
        dz = wide.div_(sums.unsqueeze(1))
        dz.scatter_add_(1, index, dz.new_full((), -1.0).expand_as(index))
        factor = dz.new_full(labels.shape, call.unit * settings.logit_scale)
        factor.masked_fill_(~is_known, torch.nan)
        if row_scale is not None:
            factor = factor * row_scale
        dz.mul_(factor.unsqueeze(1))
        if slope is not None:
            dz.mul_(slope)
        logits.copy_(dz.masked_fill_(ignored.unsqueeze(1), 0))
    return losses
