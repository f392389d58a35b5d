"""``lora_linear_cross_entropy``: the cross-entropy of a head with LoRA, a chunk of tokens at a time
(``chunks.py``).

    Z = X W^T + bias + s S B^T       U = cap(scale Z)       L_i = log Σ_v exp(U_iv) - U_i,label_i
    dZ = g (softmax(U) - onehot(label)) ∘ U'(Z)
    dX = dZ W        dS = s dZ B        dB = s dZ^T S        dbias = Σ_i dZ_i

X [T, H] are hidden states, W [V, H] the head. S = D(X) A^T [T, r] comes from PyTorch's operators
under autograd, which also give dA and the branch's part of dX.

dX and dS of a token do not depend on its incoming gradient g_i but by this factor: they are computed
in forward, while the logits are there, and backward multiplies rows. So a step takes two products
with W. dB and dbias sum over tokens. For a sum of losses g is one number, and forward computes them
too. For losses by token, backward needs the logits of each chunk again: a third product.

``lora_linear_log_probs`` has -L_i by token, and with it the entropy of the softmax:

    H_i = -Σ_v p_v log p_v        dZ += -h p (log p + H) ∘ U'(Z)

The gradient h of H_i does not scale the gradients of L_i. So with entropies forward computes no
gradient, and backward computes the logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import Context, first_derivative
from stablelora_kernels.ops.lora_linear_cross_entropy.call import (
    FLOAT16_UNIT,
    CrossEntropyCall,
    CrossEntropyResults,
    CrossEntropySettings,
    OfTokens,
)
from stablelora_kernels.ops.lora_linear_cross_entropy.chunks import lora_linear_cross_entropy
from stablelora_kernels.utils.tensors import cast


class _CrossEntropyContext(Context, Protocol):
    # Those of the gradients that are wanted, whatever forward has computed.
    settings: CrossEntropySettings
    # Whether the losses are summed.
    summed: bool
    bias_dtype: torch.dtype
    b_dtype: torch.dtype


class _EntropyContext(Context, Protocol):
    settings: CrossEntropySettings


class _CrossEntropy(torch.autograd.Function):
    """The losses by token, or their sum; with gradients of X, bias, S and B."""

    @staticmethod
    def forward(
        ctx: _CrossEntropyContext,
        summed: bool,
        settings: CrossEntropySettings,
        *tensors: Tensor | None,
    ) -> Tensor:
        """The tensors are those of :class:`CrossEntropyCall`."""
        needed = dict(zip(CrossEntropyCall._fields, ctx.needs_input_grad[2:], strict=False))
        settings = settings._replace(
            need_hidden=needed["hidden"],
            need_s=needed["s"],
            need_b=needed["lora_B"],
            need_bias=needed["bias"],
        )
        computed = settings
        if not summed:
            computed = settings._replace(need_b=False, need_bias=False)
        losses, _, *gradients = lora_linear_cross_entropy(*tensors, *computed)
        # Without a sum, backward computes the logits again for dB and dbias.
        ctx.save_for_backward(*gradients, *(tensors if computed != settings else ()))
        ctx.settings = settings
        ctx.summed = summed
        call = CrossEntropyCall.of(tensors, settings)
        # Of those that want no gradient, any.
        ctx.bias_dtype = (call.hidden if call.bias is None else call.bias).dtype
        ctx.b_dtype = (call.hidden if call.lora_B is None else call.lora_B).dtype
        return losses.sum() if summed else losses

    @staticmethod
    def backward(ctx: _CrossEntropyContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative("lora_linear_cross_entropy")
        return _backward(ctx, grad)


def _refuse_second_derivative(name: str) -> None:
    """Raise RuntimeError in a backward with create_graph=True: autograd would take a constant incoming
    gradient for a sign that there is none.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} can be differentiated once, got a backward with create_graph=True"
        )


@first_derivative
def _backward(ctx: _CrossEntropyContext, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of :class:`_CrossEntropy`'s arguments."""
    dhidden, ds, db, dbias, *tensors = ctx.saved_tensors
    assert dhidden is not None and ds is not None and db is not None and dbias is not None
    settings = ctx.settings
    is_float16 = dhidden.dtype == torch.float16
    factor = grad / (FLOAT16_UNIT if is_float16 else 1.0)
    if ctx.summed:
        row_factor = factor
        db = _times(db, factor)
        dbias = _times(dbias, factor)
    else:
        row_factor = factor.unsqueeze(1)
        if tensors:
            sums = _sums_by_token(tensors, grad, settings)
            db = sums.db
            dbias = sums.dbias
    return (
        None,
        None,
        _times(dhidden, row_factor) if settings.need_hidden else None,
        None,
        cast(dbias, ctx.bias_dtype) if settings.need_bias else None,
        _times(ds, row_factor) if settings.need_s else None,
        cast(db, ctx.b_dtype) if settings.need_b else None,
        None,
        None,
        None,
    )


def _sums_by_token(
    tensors: Sequence[Tensor | None], grad: Tensor, settings: CrossEntropySettings
) -> CrossEntropyResults:
    """dB and dbias for a gradient of each token's loss, from the logits, which are computed again."""
    call = CrossEntropyCall.of(tensors, settings)
    call = call._replace(
        row_scale=grad, settings=settings._replace(need_hidden=False, need_s=False)
    )
    return _computed(call)


class _WithEntropies(torch.autograd.Function):
    """The losses and the entropies by token, with gradients of X, bias, S and B."""

    @staticmethod
    def forward(
        ctx: _EntropyContext, settings: CrossEntropySettings, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The tensors are those of :class:`CrossEntropyCall`."""
        needed = dict(zip(CrossEntropyCall._fields, ctx.needs_input_grad[1:], strict=False))
        ctx.save_for_backward(*tensors)
        ctx.settings = settings._replace(
            need_hidden=needed["hidden"],
            need_s=needed["s"],
            need_b=needed["lora_B"],
            need_bias=needed["bias"],
        )
        results = _computed(CrossEntropyCall.of(tensors, settings._replace(need_entropy=True)))
        return results.losses, results.entropies

    @staticmethod
    def backward(ctx: _EntropyContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative("lora_linear_log_probs")
        return _backward_with_entropies(ctx, *grads)


@first_derivative
def _backward_with_entropies(
    ctx: _EntropyContext, grad: Tensor, entropy_grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of :class:`_WithEntropies`' arguments."""
    settings = ctx.settings
    call = CrossEntropyCall.of(ctx.saved_tensors, settings)
    results = _computed(call._replace(row_scale=grad, entropy_scale=entropy_grad))
    bias, lora_B = call.bias, call.lora_B
    return (
        None,
        results.dhidden if settings.need_hidden else None,
        None,
        results.dbias.to(bias.dtype) if bias is not None and settings.need_bias else None,
        results.ds if settings.need_s else None,
        results.db.to(lora_B.dtype) if lora_B is not None and settings.need_b else None,
        None,
        None,
        None,
    )


def _computed(call: CrossEntropyCall) -> CrossEntropyResults:
    return CrossEntropyResults(*lora_linear_cross_entropy(*call[:-1], *call.settings))


def _times(t: Tensor, factor: Tensor) -> Tensor:
    """``t`` times a factor in float32, in t's dtype and in memory of its own: backward may run
    again.
    """
    if torch.compiler.is_compiling():
        return (t * factor).to(t.dtype)
    return torch.mul(t, factor, out=torch.empty_like(t))


def cross_entropy_op(call: CrossEntropyCall, summed: bool) -> Tensor:
    """The losses by token, or their sum, for checked arguments."""
    tensors = call[:-1]
    if _wants_gradient(call):
        losses: Tensor = _CrossEntropy.apply(summed, call.settings, *tensors)  # type: ignore[no-untyped-call]
        return losses
    losses = lora_linear_cross_entropy(*tensors, *call.settings)[0]
    return losses.sum() if summed else losses


def with_entropies(call: CrossEntropyCall) -> OfTokens:
    """The losses and the entropies by token, for checked arguments."""
    if _wants_gradient(call):
        return OfTokens(*_WithEntropies.apply(call.settings, *call[:-1]))  # type: ignore[no-untyped-call]
    results = _computed(call._replace(settings=call.settings._replace(need_entropy=True)))
    return OfTokens(results.losses, results.entropies)


def _wants_gradient(call: CrossEntropyCall) -> bool:
    inputs = (call.hidden, call.bias, call.s, call.lora_B)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
