"""``GraphedStep``: forward, backward, clipping and the optimizer's step as one CUDA graph for each
shape of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stablelora_kernels.graph_watch import Watch, check_capturable, host_generators, params_of
from stablelora_kernels.optim.options import LIVE, LiveName, reads_from_memory
from stablelora_kernels.optim.snapshot import Snapshot
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.utils.modules import check_module
from stablelora_kernels.utils.validation import check_bool, check_int

Batch = Tensor | Sequence[Tensor] | Mapping[Hashable, Tensor]
# A batch's tensors by their key or index.
Leaves = dict[Hashable, Tensor]


class LeafShape(NamedTuple):
    """One tensor of a batch: its key or index, its shape and its dtype."""

    key: Hashable
    size: torch.Size
    dtype: torch.dtype


class Shape(NamedTuple):
    """What batches of one graph have in common. ``kind``: their container; Tensor for none."""

    kind: type
    leaves: tuple[LeafShape, ...]


class _Cell(NamedTuple):
    """A hyperparameter in the memory that graphs read, and the number in it."""

    memory: Tensor
    number: float


class Graphs:
    """The streams and the memory of one GPU's graphs. Tests replace it by one that records and
    repeats calls on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"model must be on a GPU to be captured, got it on {device}; enabled=False runs every step eagerly"
            )
        self.device = device
        # As in torch.cuda.make_graphed_callables, warm-up and capture have a stream each.
        self.side_stream, self.capture_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        # The allocator takes no more captures into a pool whose graphs are all gone.
        self.captured: list[torch.cuda.CUDAGraph] = []

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Call ``function`` on the side stream."""
        current = torch.cuda.current_stream(self.device)
        self.side_stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.side_stream):
                return function()
        finally:
            current.wait_stream(self.side_stream)

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture ``function``. Return the replay, and the tensor in which each replay leaves what
        ``function`` returns.
        """
        graph = torch.cuda.CUDAGraph()
        # "thread_local": a thread that loads data may allocate pinned memory meanwhile.
        graphed = torch.cuda.graph(
            graph, self.pool, self.capture_stream, capture_error_mode="thread_local"
        )
        # torch.cuda.graph does not put the current stream back if the capture fails.
        with torch.cuda.stream(torch.cuda.current_stream(self.device)), graphed:
            output = function()
        self.captured.append(graph)
        return graph.replay, output


class _Bucket:
    """One shape: the tensors that its steps read their batch from, and its graph."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.kind = shape.kind
        self.tensors = {
            leaf.key: torch.empty(leaf.size, dtype=leaf.dtype, device=device)
            for leaf in shape.leaves
        }
        # Eager steps since the last change.
        self.warmups = 0
        # How the last eager step or the capture left model and optimizer.
        self.watch: Watch | None = None
        # The replay, and the loss that it leaves.
        self.graph: tuple[Callable[[], None], Tensor] | None = None

    @torch.no_grad()
    def fill(self, leaves: Leaves) -> None:
        """Copy a batch to where the steps read it."""
        for key, tensor in leaves.items():
            self.tensors[key].copy_(tensor, non_blocking=True)

    def batch(self) -> Batch:
        """The batch that was filled in, in its container."""
        if self.kind is dict:
            return dict(self.tensors)
        tensors = list(self.tensors.values())
        if self.kind is Tensor:
            return tensors[0]
        return tensors if self.kind is list else tuple(tensors)


class GraphedStep:
    """A training step in a CUDA graph: each call takes one step on a batch and returns its loss.

    ::

        step = slk.GraphedStep(model, optimizer, loss_fn)
        for batch in batches:
            loss = step(batch)
            scheduler.step()

    A call is ``loss_fn(model, batch).backward()``, ``optimizer.step()`` and
    ``optimizer.zero_grad()``. The first ``num_warmup_iters`` calls of a shape run eagerly, the next
    one captures, and all others replay. Every call is one real step, with the bits of an eager one.
    Replays draw new dropout masks, and pairs latch in them. Learning rates, weight decays and
    shrink ratios may be numbers that a scheduler changes: they are copied to the GPU when they
    differ.

    A graph repeats what the GPU did; Python does not run again. So every call compares the model's
    modules, parameters and attributes, the optimizer's settings and this library's settings with
    those of the capture, and raises if one differs. If someone wrote to A or B, that call runs
    eagerly, so that the latch goes by the new norms. Not watched are ``loss_fn`` itself and values
    inside of objects that a module holds, such as ``model.config``: change none of them.

    Args:
        model: any module whose parameters and buffers are on one GPU: with this library's layers or
            PEFT's, accelerated or not.
        optimizer: a :class:`StableLoRAAdamW` with ``capturable=True``. Its ``max_grad_norm`` clips
            in the graph.
        loss_fn: a function of the model and the batch that returns the loss, a 0-d tensor. Autocast
            belongs inside of it. Default: ``model(**batch).loss``, as Hugging Face's models return
            it.
        sample_batches: batches of the only shapes to be taken; their values are not read. Default:
            capture up to ``max_graphs`` shapes as they come.
        grad_scaler: a ``torch.amp.GradScaler``, whose scaling, step and update go into the graph.
        max_graphs: the most shapes to capture. They share their memory.
        num_warmup_iters: eager steps of a shape before its capture, at least 1, in which kernels
            compile.
        enabled: False takes plain steps, on any device: gradients that are there before are added
            to, also those of parameters that another optimizer has, and autocast may be around the
            call.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or the model or the
            optimizer cannot be captured: hooks, data parallelism, sharded parameters, several
            devices or none that is a GPU, ``shrink_schedule``, trainable parameters of the model
            that the optimizer does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: StableLoRAAdamW,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        sample_batches: Iterable[Batch] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        max_graphs: int = 8,
        num_warmup_iters: int = 3,
        enabled: bool = True,
    ) -> None:
        check_module(model)
        if not isinstance(optimizer, StableLoRAAdamW):
            raise TypeError(f"optimizer must be a StableLoRAAdamW, got {type(optimizer).__name__}")
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of the model and a batch, got {loss_fn!r}")
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise TypeError(
                f"grad_scaler must be a torch.amp.GradScaler, got {type(grad_scaler).__name__}"
            )
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.grad_scaler = grad_scaler
        self.max_graphs = check_int("max_graphs", max_graphs, minimum=1)
        self.num_warmup_iters = check_int("num_warmup_iters", num_warmup_iters, minimum=1)
        self.enabled = check_bool("enabled", enabled)
        self._shapes: list[Shape] | None = None
        if sample_batches is not None:
            self._shapes = [
                shape_of(*self._read("sample_batches", batch)) for batch in sample_batches
            ]
            if not 0 < len(self._shapes) <= max_graphs:
                raise ValueError(
                    f"sample_batches must be 1 to max_graphs={max_graphs} batches, got {len(self._shapes)}"
                )
        self._device = next(params_of(optimizer)).device
        self.reset()
        if enabled:
            check_capturable(model, optimizer)

    def reset(self) -> None:
        """Drop all graphs. The next calls warm up and capture again, with the model and the
        optimizer as they then are.
        """
        self._buckets: dict[Shape, _Bucket] = {}
        if self.enabled:
            self._graphs = Graphs(self._device)
        # By group and name, where graphs read the hyperparameters that are numbers.
        self._cells: dict[tuple[int, LiveName], _Cell] = {}

    @property
    def captured(self) -> list[str]:
        """The shapes that have a graph, in words."""
        return [
            in_words(shape) for shape, bucket in self._buckets.items() if bucket.graph is not None
        ]

    def __call__(self, batch: Batch) -> Tensor:
        """Take one step and return its loss, a new 0-d tensor without a gradient. Nothing is read
        from the GPU.

        Args:
            batch: a tensor, or a tuple, list or dict of tensors, on any device. ``loss_fn`` gets
                the same on the GPU.

        Raises:
            TypeError, ValueError: the batch holds something else, or has a shape that is not to be
                captured.
            RuntimeError: gradients or autocast come from outside; the step cannot be captured; or
                something has changed since the capture. No step was taken then.
        """
        kind, leaves = self._read("batch", batch)
        shape = shape_of(kind, leaves)
        if not self.enabled:
            bucket = _Bucket(shape, self._device)
            bucket.fill(leaves)
            return self._train(bucket)
        self._check_call()
        bucket = self._bucket(shape)
        now = self.optimizer._snapshot()
        self._check_unchanged(bucket, now)
        bucket.fill(leaves)
        self._copy_numbers()
        # A shape's first calls run eagerly, the next one captures, the others replay. After a write
        # to a parameter the optimizer measures norms again, which a graph would do in every replay.
        written = now.versions != self.optimizer._last.versions
        if bucket.watch is None or bucket.warmups < self.num_warmup_iters or written:
            return self._run_eagerly(bucket)
        if bucket.graph is None:
            bucket.graph = self._capture(bucket)
            bucket.watch = Watch(self.model, self.optimizer, self.grad_scaler)
        else:
            # The capture has counted the first replay's write.
            self.optimizer._count_write()
        replay, loss = bucket.graph
        replay()
        return loss.clone()

    def _read(self, argument: str, batch: object) -> tuple[type, Leaves]:
        """The container of a batch, and its tensors."""
        if self.loss_fn is None and not isinstance(batch, Mapping):
            raise TypeError(
                f"{argument} must be a dict unless loss_fn is given, got {type(batch).__name__}"
            )
        return leaves_of(argument, batch)

    def _check_unchanged(self, bucket: _Bucket, now: Snapshot) -> None:
        """Raise RuntimeError if something has changed that the bucket's graph does not know.
        Without a graph, the warm-up begins anew.
        """
        change = None if bucket.watch is None else bucket.watch.change(now)
        if change is None:
            return
        if bucket.graph is not None:
            raise RuntimeError(
                f"{change}, which its CUDA graph does not know: put it back, or call reset()"
            )
        bucket.warmups = 0

    def _check_call(self) -> None:
        """Raise unless the step may run: autocast is off around it, and there are no gradients."""
        if torch.is_autocast_enabled(self._device.type):
            raise RuntimeError(
                "autocast must be inside of loss_fn, since it is for the forward alone, got it around the step"
            )
        if any(p.grad is not None for p in params_of(self.optimizer)):
            raise RuntimeError(
                "gradients must be None before a step, which would drop them, got some: one call is a whole step, without "
                "accumulation. Call optimizer.zero_grad() first"
            )

    def _bucket(self, shape: Shape) -> _Bucket:
        if shape not in self._buckets:
            known = list(self._buckets) if self._shapes is None else self._shapes
            if shape not in known and (self._shapes is not None or len(known) == self.max_graphs):
                raise ValueError(
                    f"batch must have one of the {len(known)} shapes that may have a graph, got {in_words(shape)} instead of "
                    f"{'; '.join(map(in_words, known))}. Pad the batch, or allow more (max_graphs, sample_batches)"
                )
            self._buckets[shape] = _Bucket(shape, self._device)
        return self._buckets[shape]

    def _copy_numbers(self) -> None:
        """Bring the numbers among the live hyperparameters to where graphs read them."""
        for index, group in enumerate(self.optimizer.param_groups):
            for name in LIVE:
                key = (index, name)
                if reads_from_memory(group[name], self._device):
                    self._cells.pop(key, None)
                    continue
                number = float(group[name])
                cell = self._cells.get(key)
                if cell is None:
                    memory = torch.empty((), dtype=torch.float32, device=self._device)
                    self._cells[key] = _Cell(memory.fill_(number), number)
                elif cell.number != number:
                    self._cells[key] = _Cell(cell.memory.fill_(number), number)

    @contextmanager
    def _numbers_in_memory(self) -> Iterator[None]:
        """Let the optimizer read the live hyperparameters from the memory that replays read."""
        groups = self.optimizer.param_groups
        numbers = {(index, name): groups[index][name] for index, name in self._cells}
        try:
            for (index, name), cell in self._cells.items():
                groups[index][name] = cell.memory
            yield
        finally:
            for (index, name), number in numbers.items():
                groups[index][name] = number

    def _run_eagerly(self, bucket: _Bucket) -> Tensor:
        loss = self._graphs.run(partial(self._train, bucket))
        bucket.warmups += 1
        bucket.watch = Watch(self.model, self.optimizer, self.grad_scaler)
        return loss

    def _capture(self, bucket: _Bucket) -> tuple[Callable[[], None], Tensor]:
        """Capture a step of ``bucket`` in a graph."""
        check_capturable(self.model, self.optimizer)
        drawn = host_generators()
        try:
            graph = self._graphs.capture(partial(self._train, bucket))
        except RuntimeError as error:
            # Ending a capture that failed raises another error on top of the reason.
            reason = error.__context__ or error
            raise RuntimeError(
                f"a CUDA graph cannot hold this step: {reason}. The model and loss_fn may not read from the GPU (.item(), "
                ".cpu(), a branch on a value); enabled=False runs every step eagerly"
            ) from error
        if drawn != host_generators():
            raise RuntimeError(
                "a CUDA graph cannot hold this step: the model or loss_fn draws random numbers on the host, which each replay "
                "would repeat; enabled=False runs every step eagerly"
            )
        return graph

    def _train(self, bucket: _Bucket) -> Tensor:
        """One eager step."""
        is_done = False
        try:
            loss = self._backward(bucket.batch())
            with self._numbers_in_memory():
                if self.grad_scaler is None:
                    self.optimizer.step()
                else:
                    self.grad_scaler.step(self.optimizer)
                    self.grad_scaler.update()
            is_done = True
        finally:
            # Gradients of a capture lie in the graph's memory, so also a failed one leaves none.
            if is_done or self.enabled:
                for p in params_of(self.optimizer):
                    p.grad = None
        return loss.detach()

    @torch.enable_grad()
    def _backward(self, batch: Batch) -> Tensor:
        """The loss of ``batch``, after the backward pass."""
        loss: object
        if self.loss_fn is not None:
            loss = self.loss_fn(self.model, batch)
        else:
            assert isinstance(batch, dict)
            loss = self.model(**batch).loss
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn must return a 0-d tensor with a gradient, got {type(loss).__name__}"
            )
        if loss.dim() or not loss.requires_grad:
            raise TypeError(
                f"loss_fn must return a 0-d tensor with a gradient, got one of shape {list(loss.shape)}"
            )
        scaled = loss if self.grad_scaler is None else self.grad_scaler.scale(loss)
        scaled.backward()
        return loss


def leaves_of(argument: str, batch: object) -> tuple[type, Leaves]:
    """The container of a batch, and its tensors."""
    kind: type
    values: dict[Hashable, object]
    if isinstance(batch, Mapping):
        kind = dict
        values = dict(batch)
    elif isinstance(batch, (tuple, list)):
        kind = list if isinstance(batch, list) else tuple
        values = dict(enumerate(batch))
    else:
        kind = Tensor
        values = {0: batch}
    leaves: Leaves = {}
    for key, value in values.items():
        where = argument if kind is Tensor else f"{argument}[{key!r}]"
        if type(value) is not Tensor or value.layout is not torch.strided:
            got = f"layout {value.layout}" if type(value) is Tensor else type(value).__name__
            raise TypeError(
                f"{where} must be a dense tensor, got {got}; a batch is a tensor, or a tuple, list or dict of them"
            )
        if value.requires_grad:
            raise ValueError(f"{where} must need no gradient, got requires_grad=True")
        leaves[key] = value
    return kind, leaves


def shape_of(kind: type, leaves: Leaves) -> Shape:
    """The shape of a batch."""
    return Shape(kind, tuple(LeafShape(key, t.shape, t.dtype) for key, t in leaves.items()))


def in_words(shape: Shape) -> str:
    """The tensors of a shape, as an error or ``captured`` names them."""
    texts = []
    for leaf in shape.leaves:
        text = f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.size)}"
        texts.append(f"{leaf.key} {text}" if shape.kind is dict else text)
    return f"({', '.join(texts)})"
