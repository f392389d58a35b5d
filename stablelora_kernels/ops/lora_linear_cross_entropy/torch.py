"""The losses of a chunk by PyTorch's operators."""

from __future__ import annotations

import torch

from stablelora_kernels.ops.lora_linear_cross_entropy.call import (
    Chunk,
    CrossEntropyCall,
    OfTokens,
    sum_dtype,
)

# Elements of the float32 copies of logits.
FLOAT32_ELEMENTS = 1 << 20


def losses_torch(call: CrossEntropyCall, chunk: Chunk) -> OfTokens:
    """The losses and, if needed, the entropies of a chunk. If gradients are needed, dZ takes the place
    of the logits.
    """
    logits, labels, row_scale, entropy_scale = chunk
    rows = max(1, FLOAT32_ELEMENTS // call.vocabulary)
    losses = logits.new_empty(logits.shape[0], dtype=sum_dtype(logits.dtype))
    needs_entropy = call.settings.need_entropy
    entropies = losses.new_empty(losses.shape[0] if needs_entropy else 0)
    for start in range(0, logits.shape[0], rows):
        few = slice(start, start + rows)
        scales = [None if scale is None else scale[few] for scale in (row_scale, entropy_scale)]
        of_few = _losses_of_few(call, Chunk(logits[few], labels[few], *scales))
        losses[few] = of_few.losses
        if needs_entropy:
            entropies[few] = of_few.entropies
    return OfTokens(losses, entropies)


def _losses_of_few(call: CrossEntropyCall, chunk: Chunk) -> OfTokens:
    """:func:`losses_torch` of few tokens, whose logits are copied to float32."""
    logits, labels, row_scale, entropy_scale = chunk
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
    # Logits less the largest, of which the probabilities are the exponentials.
    shifted = None
    if settings.need_entropy or entropy_scale is not None:
        shifted = wide.clone()
    sums = wide.exp_().sum(1)
    losses = sums.log() - target
    entropies = losses[:0]
    if shifted is not None:
        # No logit is above 0, so nothing cancels. The product of 0 and -inf is no part of the sum.
        parts = torch.where(wide > 0, wide * shifted, 0.0)
        entropies = sums.log() - parts.sum(1) / sums
        entropies = torch.where(is_known, entropies, torch.nan).masked_fill_(ignored, 0)
    # A label outside of the vocabulary, which only a CPU refuses without waiting for the device.
    losses = torch.where(is_known, losses, torch.nan).masked_fill_(ignored, 0)
    if settings.needs_gradient:
        factor = wide.new_full(labels.shape, call.unit * settings.logit_scale)
        factor.masked_fill_(~is_known, torch.nan)
        dz = wide.div_(sums.unsqueeze(1))
        of_entropy = None
        if shifted is not None and entropy_scale is not None:
            # dH/dU = -p (log p + H), which is 0 where p is.
            log_p = shifted.sub_(sums.log().unsqueeze(1))
            parts = torch.where(dz > 0, dz * (log_p + entropies.unsqueeze(1)), 0.0)
            of_entropy = parts.mul_((-factor * entropy_scale).unsqueeze(1))
        dz.scatter_add_(1, index, dz.new_full((), -1.0).expand_as(index))
        if row_scale is not None:
            factor = factor * row_scale
        dz.mul_(factor.unsqueeze(1))
        if of_entropy is not None:
            dz.add_(of_entropy)
        if slope is not None:
            dz.mul_(slope)
        logits.copy_(dz.masked_fill_(ignored.unsqueeze(1), 0))
    return OfTokens(losses, entropies)
