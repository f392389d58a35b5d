"""``lora_linear_cross_entropy`` without autograd: the op, which computes a chunk of tokens at a time.

A chunk's logits Z are the only memory of V elements a token. Float32 copies have a few rows of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.ops.cpu_products import (
    by_float32,
    db_product,
    ds_product,
    multiply_into,
    product,
    without_autocast,
)
from stablelora_kernels.ops.lora_linear_cross_entropy.call import (
    Chunk,
    CrossEntropyCall,
    CrossEntropyResults,
    CrossEntropySettings,
    sum_dtype,
)
from stablelora_kernels.ops.lora_linear_cross_entropy.torch import losses_torch
from stablelora_kernels.ops.lora_linear_cross_entropy.triton import losses_triton
from stablelora_kernels.ops.plans import define_op

# What turns a chunk's logits into losses and, if gradients are needed, into dZ.
_BACKENDS = {"torch": losses_torch, "triton": losses_triton}

# Bytes of a chunk's logits: enough rows for the products to run at full speed.
CPU_LOGIT_BYTES = 32 << 20
GPU_LOGIT_BYTES = 256 << 20
# At least so many tokens a chunk, whatever the vocabulary.
LEAST_ROWS = 16
# Rows of the head in a block, where a block is cast or its results are summed in float32.
BLOCK = 8192
# Rows of logits begin at multiples of so many elements, so that loads are 16 bytes wide.
ROW_ALIGNMENT = 16


def _call_of(args: tuple[Any, ...]) -> CrossEntropyCall:
    """The op's call, of its arguments in its schema's order."""
    tensors = len(CrossEntropyCall._fields) - 1
    return CrossEntropyCall.of(args[:tensors], CrossEntropySettings(*args[tensors:]))


def _results(call: CrossEntropyCall) -> CrossEntropyResults:
    """Zeros: the results of ignored tokens."""
    hidden = call.hidden
    settings = call.settings
    sums = sum_dtype(hidden.dtype)
    rows = hidden.shape[0]
    rank = 0 if call.s is None else call.s.shape[1]
    return CrossEntropyResults(
        hidden.new_zeros(rows, dtype=sums),
        hidden.new_zeros(rows if settings.need_entropy else 0, dtype=sums),
        hidden.new_zeros(rows if settings.need_hidden else 0, hidden.shape[1]),
        hidden.new_zeros(rows if settings.need_s else 0, rank),
        hidden.new_zeros(call.vocabulary if settings.need_b else 0, rank, dtype=sums),
        hidden.new_zeros(call.vocabulary if settings.need_bias else 0, dtype=sums),
    )


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_results(_call_of(args)))


@define_op(
    "lora_linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? s, Tensor? lora_B, Tensor labels, Tensor? row_scale, "
    "Tensor? entropy_scale, int ignore_index, float scaling, float softcap, float logit_scale, str backend, bool need_hidden, "
    "bool need_s, bool need_b, bool need_bias, bool need_entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def lora_linear_cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    """:class:`CrossEntropyResults` for the tensors of :class:`CrossEntropyCall` and its settings."""
    call = _call_of(args)
    results = _results(call)
    with without_autocast(call.hidden):
        _compute(call, results)
    return tuple(results)


def _compute(call: CrossEntropyCall, results: CrossEntropyResults) -> None:
    """Fill the results, a chunk of tokens at a time."""
    settings = call.settings
    losses_of = _BACKENDS[settings.backend]
    head = Head(call)
    for tokens in _chunks(call):
        hidden = call.hidden[tokens].to(head.dtype)
        s = None if call.s is None else call.s[tokens].to(head.dtype)
        logits = head.logits(hidden, s)
        scales = [
            None if scale is None else scale[tokens]
            for scale in (call.row_scale, call.entropy_scale)
        ]
        losses, entropies = losses_of(call, Chunk(logits, call.labels[tokens], *scales))
        results.losses[tokens] = losses
        if settings.need_entropy:
            results.entropies[tokens] = entropies
        # From here on the logits are dZ.
        if settings.need_hidden:
            results.dhidden[tokens] = head.hidden_gradient(logits).to(call.hidden.dtype)
        if settings.need_s:
            assert head.lora_B is not None
            results.ds[tokens] = ds_product(logits, head.lora_B, settings.scaling).to(
                call.hidden.dtype
            )
        if settings.need_b:
            assert s is not None
            head.add_b_gradient(results.db, logits, s)
        if settings.need_bias:
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
    if call.settings.backend == "torch" and call.labels.device.type == "cpu":
        kept = call.labels.ne(call.settings.ignore_index).nonzero().squeeze(1)
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
        self.scaling = call.settings.scaling
        vocabulary = call.vocabulary
        # Float16 holds no large sums.
        is_cut = self.dtype == torch.float16 or self.dtype != call.weight.dtype
        size = BLOCK if is_cut else vocabulary
        self._blocks = [
            slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)
        ]
        rows = min(_rows_of_chunk(call), call.labels.shape[0])
        width = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
        memory = call.hidden.new_empty(rows, width, dtype=self.dtype)
        if memory.device.type == "cpu":
            # oneDNN's bfloat16 products on AMX multiply what lies behind a row by 0, which NaN
            # survives (oneDNN's issue 5717).
            memory[:, vocabulary:] = 0
        self._memory = memory[:, :vocabulary]

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
