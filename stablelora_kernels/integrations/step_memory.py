"""The memory of a training step of a decoder with LoRA at its peak, counted on one layer and one head.

Graphs of layers add up in forward, and go one after another in backward. So the peak is one of these
moments:

    the loss                   the graphs of all layers, and what the last norm, the head and the loss
                               take
    the backward of a layer    the graphs of the layers in front of it, and what this layer takes
                               forward or backward

A checkpointed layer's graph is its input alone until backward computes the layer again. Weights,
gradients of A and B, and the optimizer's state are not counted here.

The layer and the head are the model's own modules. Their operators run on tensors without memory for
a GPU, and on real ones for a CPU, under :class:`LiveBytes`. On a GPU two things are not PyTorch's
operators, and each is counted by what its source allocates: this library's kernels by the launch
plans of the GPU (what a plan takes as scratch is alive with the op's operands and results), and flash
attention. Importing needs neither transformers nor Triton.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.ops import plans
from stablelora_kernels.ops.lora_linear_cross_entropy import chunks
from stablelora_kernels.ops.lora_mlp import tiled
from stablelora_kernels.ops.lora_mlp import torch as lora_mlp_torch
from stablelora_kernels.ops.matrices import row_tiles
from stablelora_kernels.utils.extras import import_extra

CPU = "cpu"
FORWARD, BACKWARD = "forward", "backward"
# transformers' name of the attention that keeps what a flash attention kernel keeps.
COUNTED_ATTENTION = "counted"
BF16, FP32 = 2, 4
# NF4: half a byte, and for 64 elements a byte of absmax and 4/256 for that one's.
NF4 = 0.5 + (1 + 4 / 256) / 64
# Value, gradient and two moments of A and B in float32.
ADAPTER = 4 * FP32
GIB = 1 << 30
# The rest of a card is for what is not counted: CUDA's own memory and the allocator's gaps.
USABLE = 0.9
# A line through the counts at these lengths says about how many tokens fit.
LENGTHS = (2048, 8192)


class Block(NamedTuple):
    """A tensor's memory."""

    # The phase of :class:`LiveBytes` in which it was made.
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class LiveBytes(TorchDispatchMode):
    """Counts the memory that PyTorch's operators allocate in the block, as long as it is alive.

    Tensors may be on the meta device. What an operator allocates and frees inside itself is not
    seen, except in this library's own. ``exclude``: tensors that were there before.
    """

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        super().__init__()
        # The storages themselves, so that no other one gets their address.
        self._excluded = {
            storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in exclude)
        }
        self._alive: dict[int, Block] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._phase = ""
        self.live = 0
        self.peak = 0
        # What was alive at the peak.
        self.at_peak: tuple[Block, ...] = ()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what is made in the block."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == plans.NAMESPACE:
            # What the op does on a CPU is Python, whose operators come here.
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        copies = _copies_of_operands(func, args, result)
        now = self.live + sum(copy.nbytes for copy in copies)
        if now > self.peak:
            self.peak = now
            self.at_peak = (*self._alive.values(), *copies)
        return result

    def _watch(self, tensor: Tensor) -> None:
        """Count the memory of ``tensor`` until its storage goes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._excluded or key in self._alive:
            return
        block = Block(self._phase, tuple(tensor.shape), tensor.dtype, storage.nbytes())
        self._alive[key] = block
        self.live += block.nbytes

        def forget(_: object) -> None:
            del self._alive[key], self._watched[key]
            self.live -= block.nbytes

        self._watched[key] = weakref.ref(storage, forget)


def _copies_of_operands(func: Any, args: Sequence[Any], result: Any) -> list[Block]:
    """What a pointwise operator on a CPU makes for itself: a copy of each operand of another dtype.
    On a GPU it converts elements in registers.
    """
    if not isinstance(result, Tensor) or result.device.type != "cpu":
        return []
    if torch.Tag.pointwise not in func.tags or func is torch.ops.aten._to_copy.default:
        return []
    return [
        Block("an operator", tuple(t.shape), result.dtype, t.numel() * result.itemsize)
        for t in args
        if isinstance(t, Tensor) and t.dim() and t.is_floating_point() and t.dtype != result.dtype
    ]


class FlashAttention(torch.autograd.Function):
    """flash-attention 2 of a causal sequence (csrc/flash_attn/flash_api.cpp), which computes nothing.

    Forward keeps q, k, v, its output and a float32 number for each row. Backward takes dQ a second
    time in float32, the float32 sum of each row's dO ∘ O, and, for fewer heads of k and v than of
    q, dK and dV by head of q.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _out, row_sums = ctx.saved_tensors
        gradients = [torch.empty_like(t) for t in (query, key, value)]
        scratch = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(row_sums)]
        if key.shape[1] != query.shape[1]:
            scratch += [torch.empty_like(query), torch.empty_like(query)]
        del scratch
        return tuple(gradients)


def counted_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: object, **_: object
) -> tuple[Tensor, None]:
    """transformers' attention function that keeps what a flash attention kernel keeps."""
    return FlashAttention.apply(q, k, v).transpose(1, 2), None  # type: ignore[no-untyped-call]


class Counted(NamedTuple):
    """Bytes of one layer, or of the head."""

    # Alive between forward and backward.
    kept: int
    peak: int
    at_peak: tuple[Block, ...]


def device_of(where: str) -> str:
    """The device of the tensors that are counted as on ``where``."""
    return CPU if where == CPU else "meta"


def count(
    run: Callable[[Tensor], Tensor],
    x_shape: tuple[int, ...],
    dtype: torch.dtype,
    where: str,
    exclude: Sequence[Tensor],
    checkpointing: bool = False,
) -> Counted:
    """Run forward and backward on an x that lives as long as ``run`` keeps it.

    ``where``: a GPU of ``dispatch.problem.DEVICES``, or "cpu". ``exclude``: tensors that were there
    before.
    """
    device = device_of(where)
    with torch.device(device):
        seed = torch.zeros(1, dtype=dtype, requires_grad=True)
    with _counted_on(where), LiveBytes([*exclude, seed]) as live:

        def forward(x: Tensor) -> Tensor:
            with live.phase(FORWARD):
                return run(x)

        with live.phase(FORWARD):
            x = _Before.apply(seed, x_shape)  # type: ignore[no-untyped-call]
        if checkpointing:
            # The meta device has no generator whose state could be kept.
            keeps_state = device != "meta"
            y = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=keeps_state)
        else:
            y = forward(x)
        with live.phase(FORWARD):
            total = _After.apply(y)  # type: ignore[no-untyped-call]
        del y
        del x
        kept = live.live
        with live.phase(BACKWARD):
            total.backward()
    return Counted(kept, live.peak, live.at_peak)


class _Before(torch.autograd.Function):
    """Makes x, and takes its gradient."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.seed = seed
        return seed.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.seed.detach(), None


class _After(torch.autograd.Function):
    """Takes y, and makes its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape = y.shape
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_ones(ctx.shape)


def register_attention() -> None:
    """Let transformers' models take :data:`COUNTED_ATTENTION`."""
    transformers = import_extra("transformers", "peft", "the count of a step's memory")
    transformers.AttentionInterface.register(COUNTED_ATTENTION, counted_attention)


@contextmanager
def _counted_on(where: str) -> Iterator[None]:
    """In the block, this library's ops are those of ``where``, and compute as they do without a
    dispatch mode. No other thread may train meanwhile.
    """
    chunks_of = chunks._chunks
    patches: list[tuple[Any, str, Any]] = [
        (lora_mlp_torch, "_activation_backward", _activation_backward),
        # The first tile's gradients are alive when the second one begins; the others take no more.
        (tiled, "row_tiles", lambda rows, most: islice(row_tiles(rows, most), 2)),
        (chunks, "_chunks", lambda call: islice(chunks_of(call), 2)),
    ]
    if where != CPU:
        # Launch plans need Triton, which is optional.
        from stablelora_kernels.launch.base import Launch

        device = DEVICES[where]
        answer = backend.Answer("triton", "counted as on a GPU")

        def plan(op: Any, entry: object, tensors: Any, settings: Any) -> Any:
            # The launches hold their scratch.
            results, launches = op.plan(device, op._types.call_of(tensors, settings))
            del launches
            return results

        patches += [
            (backend, "explain_backend", lambda given: answer),
            (plans.PlannedOp, "__call__", plan),
            (Launch, "run", lambda launch, given: None),
        ]
    with patched(patches):
        yield


@contextmanager
def patched(patches: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """In the block, an object's attribute of that name has that value, for each of ``patches``."""
    with ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def _activation_backward(activation: Any, dh: Tensor, g: Tensor) -> Tensor:
    """The op's own way without a dispatch mode, in the memory of dH."""
    return activation.backward(dh, g, grad_input=dh)  # type: ignore[no-any-return]


def positions_bytes(tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """The cosines and sines of the rotary embedding, and the index of each token."""
    angles = 2 * dtype.itemsize * head_dim
    return tokens * (angles + torch.int64.itemsize)


def moments(layers: Sequence[Counted], head: Counted) -> list[int]:
    """Bytes at the backward of each layer, from the first to the last, and at the loss."""
    kept = 0
    found = []
    for layer in layers:
        found.append(kept + layer.peak)
        kept += layer.kept
    return [*found, kept + head.peak]


def most_tokens(moments_at: Callable[[int], Sequence[float]], room: float) -> int:
    """How many tokens take at most ``room`` bytes at every moment of ``moments_at(tokens)``.

    Moments grow nearly in proportion to tokens. Tiles and the kernels' scratch grow in steps, so
    the line is corrected where it ends, until that changes less than a hundredth.
    """
    few, many = map(moments_at, LENGTHS)
    rates = [(b - a) / (LENGTHS[1] - LENGTHS[0]) for a, b in zip(few, many, strict=True)]

    def further(at: Sequence[float]) -> int:
        return min(int((room - size) / rate) for size, rate in zip(at, rates, strict=True))

    tokens = LENGTHS[0] + further(few)
    correction = tokens
    while tokens > LENGTHS[1] and abs(correction) > tokens / 100:
        correction = further(moments_at(tokens))
        tokens += correction
    return max(0, tokens)
