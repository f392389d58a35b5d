"""``lora_linear_cross_entropy``: the cross-entropy of a head with LoRA, a chunk of tokens at a time.

    Z = X W^T + bias + s S B^T       U = cap(scale Z)       L_i = log Σ_v exp(U_iv) - U_i,label_i
    dZ = g (softmax(U) - onehot(label)) ∘ U'(Z)
    dX = dZ W        dS = s dZ B        dB = s dZ^T S        dbias = Σ_i dZ_i

X [T, H] are hidden states, W [V, H] the head. S = D(X) A^T [T, r] comes from PyTorch's operators
under autograd, which also give dA and the branch's part of dX.

dX and dS of a token do not depend on its incoming gradient g_i but by this factor: they are computed
in forward, while the logits are there, and backward multiplies rows. So a step takes two products
with W. dB and dbias sum over tokens. For a sum of losses g is one number, and forward computes them
too. For losses by token, backward needs the logits of each chunk again: a third product.

A chunk's logits Z are the only memory of V elements a token. Float32 copies have a few rows of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stablelora_kernels.dispatch.first_use import ONE_LAUNCH, OPERATORS
from stablelora_kernels.dispatch.tallies import tally_of
from stablelora_kernels.ops.autograd import Context, first_derivative
from stablelora_kernels.ops.cpu_products import (
    by_float32,
    db_product,
    ds_product,
    multiply_into,
    product,
    without_autocast,
)
from stablelora_kernels.ops.lora_linear_cross_entropy.proof import Cap, Chunk, kernel_fault
from stablelora_kernels.ops.plans import define_op
from stablelora_kernels.utils.tensors import cast

# Bytes of a chunk's logits: enough rows for the products to run at full speed.
CPU_LOGIT_BYTES = 32 << 20
GPU_LOGIT_BYTES = 256 << 20
# At least so many tokens a chunk, whatever the vocabulary.
LEAST_ROWS = 16
# Elements of the float32 copies of logits.
FLOAT32_ELEMENTS = 1 << 20
# Rows of the head in a block, where a block is cast or its results are summed in float32.
BLOCK = 8192
# A probability below 1 / V is subnormal in float16, which then holds few bits of it.
FLOAT16_UNIT = 256.0
# Rows of logits begin at multiples of so many elements, so that loads are 16 bytes wide.
ROW_ALIGNMENT = 16


class LossSettings(NamedTuple):
    """What of a call is no tensor, in the order of :class:`CrossEntropyCall`."""

    ignore_index: int
    scaling: float
    softcap: float
    logit_scale: float
    backend: str


class CrossEntropyCall(NamedTuple):
    """The arguments of ``lora_linear_cross_entropy``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    # None with lora_B None: no branch.
    s: Tensor | None
    lora_B: Tensor | None
    labels: Tensor
    # g by token; None: 1.
    row_scale: Tensor | None
    ignore_index: int
    scaling: float
    # 0 is no cap.
    softcap: float
    logit_scale: float
    backend: str
    need_hidden: bool
    need_s: bool
    need_b: bool
    need_bias: bool

    @property
    def settings(self) -> LossSettings:
        return LossSettings(
            self.ignore_index, self.scaling, self.softcap, self.logit_scale, self.backend
        )

    @property
    def needs_gradient(self) -> bool:
        return self.need_hidden or self.need_s or self.need_b or self.need_bias

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def unit(self) -> float:
        """The factor by which dX, dS, dB and dbias are returned too large."""
        is_float16 = self.hidden.dtype == torch.float16
        return FLOAT16_UNIT if is_float16 and self.row_scale is None else 1.0


class CrossEntropyResults(NamedTuple):
    """The losses [T], and dX [T, H], dS [T, r], dB [V, r] and dbias [V], each times ``unit``; those
    that are not needed are empty.
    """

    losses: Tensor
    dhidden: Tensor
    ds: Tensor
    db: Tensor
    dbias: Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and of sums over tokens."""
    return torch.promote_types(dtype, torch.float32)


def _results(call: CrossEntropyCall) -> CrossEntropyResults:
    """Zeros: the results of ignored tokens."""
    hidden = call.hidden
    sums = sum_dtype(hidden.dtype)
    rows = hidden.shape[0]
    rank = 0 if call.s is None else call.s.shape[1]
    return CrossEntropyResults(
        hidden.new_zeros(rows, dtype=sums),
        hidden.new_zeros(rows if call.need_hidden else 0, hidden.shape[1]),
        hidden.new_zeros(rows if call.need_s else 0, rank),
        hidden.new_zeros(call.vocabulary if call.need_b else 0, rank, dtype=sums),
        hidden.new_zeros(call.vocabulary if call.need_bias else 0, dtype=sums),
    )


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_results(CrossEntropyCall(*args)))


@define_op(
    "lora_linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? s, Tensor? lora_B, Tensor labels, Tensor? row_scale, "
    "int ignore_index, float scaling, float softcap, float logit_scale, str backend, bool need_hidden, bool need_s, "
    "bool need_b, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def lora_linear_cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    """:class:`CrossEntropyResults` for the arguments of :class:`CrossEntropyCall`."""
    call = CrossEntropyCall(*args)
    results = _results(call)
    with without_autocast(call.hidden):
        _compute(call, results)
    return tuple(results)


def _compute(call: CrossEntropyCall, results: CrossEntropyResults) -> None:
    """Fill the results, a chunk of tokens at a time."""
    head = Head(call)
    for tokens in _chunks(call):
        hidden = call.hidden[tokens].to(head.dtype)
        s = None if call.s is None else call.s[tokens].to(head.dtype)
        logits = head.logits(hidden, s)
        row_scale = None if call.row_scale is None else call.row_scale[tokens]
        results.losses[tokens] = _losses(call, logits, call.labels[tokens], row_scale)
        # From here on the logits are dZ.
        if call.need_hidden:
            results.dhidden[tokens] = head.hidden_gradient(logits).to(call.hidden.dtype)
        if call.need_s:
            assert head.lora_B is not None
            results.ds[tokens] = ds_product(logits, head.lora_B, call.scaling).to(call.hidden.dtype)
        if call.need_b:
            assert s is not None
            head.add_b_gradient(results.db, logits, s)
        if call.need_bias:
            results.dbias.add_(logits.sum(0, dtype=results.dbias.dtype))


def _rows_of_chunk(call: CrossEntropyCall) -> int:
    """How many tokens a chunk has."""
    limit = CPU_LOGIT_BYTES if call.hidden.device.type == "cpu" else GPU_LOGIT_BYTES
    itemsize = 4 if by_float32(call.hidden) else call.hidden.element_size()
    rows = limit // (call.vocabulary * itemsize)
    return max(LEAST_ROWS, rows // LEAST_ROWS * LEAST_ROWS)


def _chunks(call: CrossEntropyCall) -> Iterator[Tensor | slice]:
    """Tokens in chunks. PyTorch's operators on a CPU leave out ignored ones; on a GPU, to find them
    would wait for the device.
    """
    rows = _rows_of_chunk(call)
    count = call.labels.shape[0]
    if call.backend == "torch" and call.labels.device.type == "cpu":
        kept = call.labels.ne(call.ignore_index).nonzero().squeeze(1)
        # Slices copy nothing.
        if kept.shape[0] < count:
            yield from (tokens for tokens in kept.split(rows) if tokens.shape[0])
            return
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


class Head:
    """The products of a call with the head."""

    def __init__(self, call: CrossEntropyCall) -> None:
        self.dtype = torch.float32 if by_float32(call.hidden) else call.hidden.dtype
        self.weight = call.weight
        self.bias = None if call.bias is None else call.bias.to(self.dtype)
        self.lora_B = None if call.lora_B is None else call.lora_B.to(self.dtype)
        self.scaling = call.scaling
        vocabulary = call.vocabulary
        # Float16 holds no large sums.
        is_cut = self.dtype == torch.float16 or self.dtype != call.weight.dtype
        size = BLOCK if is_cut else vocabulary
        self._blocks = [
            slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)
        ]
        rows = min(_rows_of_chunk(call), call.labels.shape[0])
        width = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
        self._memory = call.hidden.new_empty(rows, width, dtype=self.dtype)[:, :vocabulary]

    def _rows(self, block: slice) -> Tensor:
        """A block of W in the dtype of the products."""
        return self.weight[block].to(self.dtype)

    def logits(self, hidden: Tensor, s: Tensor | None) -> Tensor:
        """Z, in the memory of the last chunk's."""
        z = self._memory[: hidden.shape[0]]
        for block in self._blocks:
            columns = z[:, block]
            bias = None if self.bias is None else self.bias[block]
            multiply_into(columns, hidden, self._rows(block).t(), bias)
            if s is None or self.lora_B is None:
                continue
            lora_B = self.lora_B[block].t()
            if self.scaling == 0:
                # With alpha 0, BLAS does not read S and B, whatever they hold.
                columns.add_(torch.mm(s, lora_B), alpha=self.scaling)
            else:
                columns.addmm_(s, lora_B, alpha=self.scaling)
        return z

    def hidden_gradient(self, dz: Tensor) -> Tensor:
        """dX = dZ W."""
        first, *others = self._blocks
        dx = product(dz[:, first], self._rows(first))
        if others:
            dx = dx.float()
        for block in others:
            dx += product(dz[:, block], self._rows(block))
        return dx

    def add_b_gradient(self, db: Tensor, dz: Tensor, s: Tensor) -> None:
        """Add s dZ^T S to dB."""
        for block in self._blocks:
            db[block] += db_product(dz[:, block], s, self.scaling, db.dtype)


def _losses(
    call: CrossEntropyCall, logits: Tensor, labels: Tensor, row_scale: Tensor | None
) -> Tensor:
    """The losses of a chunk. If gradients are needed, dZ takes the place of the logits."""
    if call.backend == "triton":
        # The kernel reads both with a stride of 1; a gradient of sum()'s is one number.
        row_scale = None if row_scale is None else row_scale.contiguous()
        chunk = Chunk(logits, labels.contiguous(), row_scale)
        options = f"gradient {call.needs_gradient}, softcap {call.softcap != 0}, scaled {row_scale is not None}"
        by_kernel = partial(_losses_by_kernel, call)
        by_operators = partial(_losses_by_operators, call)
        cap = Cap(call.softcap, call.logit_scale)
        fault = kernel_fault(chunk, options, call.ignore_index, cap, by_kernel, by_operators)
        if not fault:
            tally_of("lora_linear_cross_entropy", ONE_LAUNCH, "").calls += 1
            return by_kernel(chunk)
        tally_of("lora_linear_cross_entropy", OPERATORS, fault).calls += 1
    return _losses_by_operators(call, Chunk(logits, labels, row_scale))


def _losses_by_kernel(call: CrossEntropyCall, chunk: Chunk) -> Tensor:
    from stablelora_kernels.launch.lora_linear_cross_entropy import cross_entropy

    logits, labels, row_scale = chunk
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    cross_entropy(call, logits, labels, row_scale, losses).run(logits.device)
    return losses


def _losses_by_operators(call: CrossEntropyCall, chunk: Chunk) -> Tensor:
    logits, labels, row_scale = chunk
    rows = max(1, FLOAT32_ELEMENTS // call.vocabulary)
    losses = logits.new_empty(logits.shape[0], dtype=sum_dtype(logits.dtype))
    for start in range(0, logits.shape[0], rows):
        few = slice(start, start + rows)
        scale = None if row_scale is None else row_scale[few]
        losses[few] = _losses_of_few(call, logits[few], labels[few], scale)
    return losses


def _losses_of_few(
    call: CrossEntropyCall, logits: Tensor, labels: Tensor, row_scale: Tensor | None
) -> Tensor:
    """:func:`_losses` of few tokens, whose logits are copied to float32."""
    wide = logits.to(sum_dtype(logits.dtype), copy=True)
    if call.logit_scale != 1.0:
        wide.mul_(call.logit_scale)
    slope = None
    if call.softcap:
        wide.div_(call.softcap).tanh_()
        if call.needs_gradient:
            slope = 1 - wide.square()
        wide.mul_(call.softcap)
    ignored = labels == call.ignore_index
    is_known = (labels >= 0) & (labels < call.vocabulary)
    index = torch.where(is_known, labels, 0).unsqueeze(1)
    wide -= wide.amax(1, keepdim=True)
    target = wide.gather(1, index).squeeze(1)
    sums = wide.exp_().sum(1)
    losses = sums.log() - target
    # A label outside of the vocabulary, which only a CPU refuses without waiting for the device.
    losses = torch.where(is_known, losses, torch.nan).masked_fill_(ignored, 0)
    if call.needs_gradient:
        dz = wide.div_(sums.unsqueeze(1))
        dz.scatter_add_(1, index, dz.new_full((), -1.0).expand_as(index))
        factor = dz.new_full(labels.shape, call.unit * call.logit_scale)
        factor.masked_fill_(~is_known, torch.nan)
        if row_scale is not None:
            factor = factor * row_scale
        dz.mul_(factor.unsqueeze(1))
        if slope is not None:
            dz.mul_(slope)
        logits.copy_(dz.masked_fill_(ignored.unsqueeze(1), 0))
    return losses


# Autograd


# The tensors of a call, all but the gradient that comes in.
_OPERANDS = ("hidden", "weight", "bias", "s", "lora_B", "labels")


class _CrossEntropyContext(Context, Protocol):
    settings: LossSettings
    # Whether the losses are summed.
    summed: bool
    bias_dtype: torch.dtype
    b_dtype: torch.dtype


class _Saved(NamedTuple):
    """The tensors that autograd saves, in their order."""

    dhidden: Tensor
    ds: Tensor
    db: Tensor
    dbias: Tensor
    # The operands, if backward computes the logits again.
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    s: Tensor | None = None
    lora_B: Tensor | None = None
    labels: Tensor | None = None


class _CrossEntropy(torch.autograd.Function):
    """The losses by token, or their sum; with gradients of X, bias, S and B."""

    @staticmethod
    def forward(ctx: _CrossEntropyContext, summed: bool, *args: Any) -> Tensor:
        """The arguments behind ``summed`` are those of :class:`CrossEntropyCall`."""
        call = CrossEntropyCall(*args)
        needs = _needs(ctx)
        call = call._replace(
            need_hidden=needs.hidden,
            need_s=needs.s,
            need_b=needs.b and summed,
            need_bias=needs.bias and summed,
        )
        losses, *gradients = lora_linear_cross_entropy(*call)
        saved = _Saved(*gradients)
        if (needs.b or needs.bias) and not summed:
            saved = saved._replace(
                hidden=call.hidden,
                weight=call.weight,
                bias=call.bias,
                s=call.s,
                lora_B=call.lora_B,
                labels=call.labels,
            )
        ctx.save_for_backward(*saved)
        ctx.settings = call.settings
        ctx.summed = summed
        # Of those that want no gradient, any.
        ctx.bias_dtype = (call.hidden if call.bias is None else call.bias).dtype
        ctx.b_dtype = (call.hidden if call.lora_B is None else call.lora_B).dtype
        return losses.sum() if summed else losses

    @staticmethod
    def backward(ctx: _CrossEntropyContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Autograd would take a constant incoming gradient for a sign that there is none.
            raise RuntimeError(
                "lora_linear_cross_entropy can be differentiated once, got a backward with create_graph=True"
            )
        return _backward(ctx, grad)


@first_derivative
def _backward(ctx: _CrossEntropyContext, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of :class:`_CrossEntropy`'s arguments."""
    saved = _Saved(*ctx.saved_tensors)  # type: ignore[arg-type]
    needs = _needs(ctx)
    is_float16 = saved.dhidden.dtype == torch.float16
    factor = grad / (FLOAT16_UNIT if is_float16 else 1.0)
    if ctx.summed:
        row_factor = factor
        db = _times(saved.db, factor)
        dbias = _times(saved.dbias, factor)
    else:
        row_factor = factor.unsqueeze(1)
        db = saved.db
        dbias = saved.dbias
        if needs.b or needs.bias:
            sums = _sums_by_token(saved, grad, ctx.settings, needs)
            db = sums.db
            dbias = sums.dbias
    return (
        None,
        _times(saved.dhidden, row_factor) if needs.hidden else None,
        None,
        cast(dbias, ctx.bias_dtype) if needs.bias else None,
        _times(saved.ds, row_factor) if needs.s else None,
        cast(db, ctx.b_dtype) if needs.b else None,
        *[None] * 11,
    )


def _sums_by_token(
    saved: _Saved, grad: Tensor, settings: LossSettings, needs: _Needs
) -> CrossEntropyResults:
    """dB and dbias for a gradient of each token's loss, from the logits, which are computed again."""
    assert saved.hidden is not None and saved.weight is not None and saved.labels is not None
    call = CrossEntropyCall(
        saved.hidden,
        saved.weight,
        saved.bias,
        saved.s,
        saved.lora_B,
        saved.labels,
        grad,
        *settings,
        need_hidden=False,
        need_s=False,
        need_b=needs.b,
        need_bias=needs.bias,
    )
    return CrossEntropyResults(*lora_linear_cross_entropy(*call))


class _Needs(NamedTuple):
    hidden: bool
    bias: bool
    s: bool
    b: bool


def _needs(ctx: Context) -> _Needs:
    # ``summed`` stands before the call.
    needed = dict(zip(CrossEntropyCall._fields, ctx.needs_input_grad[1:], strict=True))
    return _Needs(needed["hidden"], needed["bias"], needed["s"], needed["lora_B"])


def _times(t: Tensor, factor: Tensor) -> Tensor:
    """``t`` times a factor in float32, in t's dtype and in memory of its own: backward may run
    again.
    """
    if torch.compiler.is_compiling():
        return (t * factor).to(t.dtype)
    return torch.mul(t, factor, out=torch.empty_like(t))


def cross_entropy_op(call: CrossEntropyCall, summed: bool) -> Tensor:
    """The losses by token, or their sum, for checked arguments."""
    inputs = (call.hidden, call.bias, call.s, call.lora_B)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        losses: Tensor = _CrossEntropy.apply(summed, *call)  # type: ignore[no-untyped-call]
        return losses
    losses = lora_linear_cross_entropy(*call)[0]
    return losses.sum() if summed else losses
