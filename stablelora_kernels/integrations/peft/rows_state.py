"""Which rows of a batch run which adapter of a model: the state that ``adapters_of_rows`` fills and
the model's layers read.

It belongs to the model, not to a thread: autograd runs checkpointed layers again in threads of its
own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stablelora_kernels.model.reports import list_some

# The name of rows that run the base model alone, as in PEFT's mixed batches.
BASE = "__base__"
# The attribute of a layer that holds its model's state. It is not part of state_dict.
ATTRIBUTE = "_stablelora_rows"
# So many changes of the state are remembered, for backward passes that come late.
_REMEMBERED = 1024


class RowRange(NamedTuple):
    """The rows of a batch that run one adapter, from ``start`` to before ``end``."""

    adapter: str
    start: int
    end: int


def ranges_of(names: Iterable[str]) -> tuple[RowRange, ...]:
    """The rows of each adapter, for the name of each row.

    Raises:
        TypeError: ``names`` are no strings.
        ValueError: there is no name, or the rows of an adapter do not lie together.
    """
    if isinstance(names, Iterable) and not isinstance(names, str):
        # A generator gives them once.
        names = tuple(names)
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be one string for each row of the batch, got {names!r}")
    if not names:
        raise ValueError("names must have one name for each row of the batch, got none")
    ranges: dict[str, RowRange] = {}
    start = 0
    for name, run in groupby(names):
        end = start + len(list(run))
        if name in ranges:
            before = ranges[name]
            raise ValueError(
                f"names must have the rows of one adapter together: {name!r} has row {before.end - 1}, "
                f"then {names[before.end]!r} has row {before.end}, and {name!r} has row {start} again"
            )
        ranges[name] = RowRange(name, start, end)
        start = end
    return tuple(ranges.values())


class Rows:
    """The rows of a batch in one open context."""

    def __init__(self, ranges: Sequence[RowRange], holders: Mapping[str, nn.ModuleDict]) -> None:
        self.ranges = tuple(ranges)
        self.count = ranges[-1].end
        # For each adapter, the lora_A of a layer that has it. The layer itself would keep alive the
        # model, whose layers hold this.
        self._holders = holders
        # How many tokens a row may have: as inputs have them that show it.
        self._tokens: set[int] = set()

    @torch._disable_dynamo
    def note_tokens(self, embedding: nn.Module, args: tuple[object, ...]) -> None:
        """A hook that an embedding runs before its forward: note how many tokens each row has."""
        for indices in args:
            if isinstance(indices, Tensor) and indices.dim() > 1 and len(indices) == self.count:
                self._tokens.add(indices.shape[1:].numel())

    def tokens_of(self, x: Tensor, layer: str) -> int:
        """How many rows of x, as a matrix, each row of the batch has.

        x is [rows, ..., K], or [rows · tokens, K] of a module that flattens its input [rows, tokens,
        K]. A matrix shows no tokens: that it can be divided by the rows does not make it a flattened
        batch of them. So an embedding or another layer must have shown how many tokens a row has.

        Raises:
            ValueError: x has another number of rows than the context has names.
        """
        if x.dim() > 1 and x.shape[0] == self.count:
            tokens = x.shape[1:-1].numel()
            if x.dim() > 2:
                self._tokens.add(tokens)
            return tokens
        if x.dim() == 2 and any(x.shape[0] == self.count * tokens for tokens in self._tokens):
            return x.shape[0] // self.count
        flat = [str(self.count * tokens) for tokens in sorted(self._tokens)] if x.dim() == 2 else []
        or_flat = f", or {list_some(flat)} of a flattened batch" if flat else ""
        raise ValueError(
            f"the batch must have {self.count} rows, one for each of the names of adapters_of_rows{or_flat}, but a "
            f"{layer} got an input of shape {list(x.shape)}{self._explanation(x)}"
        )

    def _explanation(self, x: Tensor) -> str:
        """What may explain an x whose rows are a multiple of those of the context."""
        times, rest = divmod(x.shape[0], self.count)
        if rest or times < 2:
            return ""
        if x.dim() == 2:
            if self._tokens:
                return ""
            return f": if it is a flattened batch, an embedding must get its [{self.count}, tokens] first, within the block"
        return f": where generate runs {times} beams or returns {times} sequences for each row, give each name {times} times"

    def check_not_deleted(self, adapter: str) -> None:
        """Raise ValueError if an adapter that a layer does not have was deleted from the model."""
        if adapter in self._holders and adapter not in self._holders[adapter]:
            raise ValueError(
                f"names must be adapters of the model, got {adapter!r}, which was deleted within adapters_of_rows"
            )


class _Change(NamedTuple):
    """From autograd's node of this number on, ``rows`` held."""

    number: int
    rows: Rows | None


class RowsState:
    """The rows in force in a model, None outside of a context; its layers share it.

    It remembers the numbers that autograd's nodes had at each change. So when backward runs a
    checkpointed layer again, the node that needs it tells which rows held in the forward. Autograd
    numbers the nodes of each thread by themselves.
    """

    def __init__(self) -> None:
        self.rows: Rows | None = None
        # Adapters that the user has been warned of.
        self.warned: set[str] = set()
        self._thread = 0
        # The changes of each thread that has called a layer.
        self._changes: dict[int, deque[_Change]] = {}
        self._of_thread = threading.local()

    def __deepcopy__(self, memo: dict[int, object]) -> RowsState:
        # A copy of a model is outside of the context.
        return RowsState()

    def __reduce__(self) -> tuple[type[RowsState], tuple[()]]:
        return RowsState, ()

    def check_free(self, action: str) -> None:
        """Raise RuntimeError if a context is open."""
        if self.rows is not None:
            raise RuntimeError(f"{action} within adapters_of_rows of this model: leave it before")

    def change(self, rows: Rows | None) -> Rows | None:
        """Put ``rows`` in force; return those before.

        Raises:
            RuntimeError: another thread has a context of this model open.
        """
        thread = threading.get_ident()
        if self.rows is not None and thread != self._thread:
            raise RuntimeError(
                f"adapters_of_rows of this model is open in thread {self._thread}, so thread {thread} cannot open another"
            )
        self._thread = thread
        before = self.rows
        self.rows = rows
        self._changes_of_thread().append(_Change(torch._C._autograd._get_sequence_nr(), rows))
        return before

    def _changes_of_thread(self) -> deque[_Change]:
        """The changes of the thread that asks."""
        changes: deque[_Change] | None = getattr(self._of_thread, "changes", None)
        if changes is None:
            changes = self._of_thread.changes = deque(maxlen=_REMEMBERED)
            # They replace those of a thread that has ended and had the same number.
            self._changes[threading.get_ident()] = changes
        return changes

    def current(self) -> Rows | None:
        """The rows for a layer that is called now.

        torch.compile guards the rows that it reads, and traces no backward.

        Raises:
            RuntimeError: another thread opened the context; or backward runs a layer again under
                other rows than its forward had.
        """
        if torch.compiler.is_compiling():
            return self.rows
        if torch._C._current_graph_task_id() != -1:
            return self._rows_in_backward()
        if self.rows is not None and threading.get_ident() != self._thread:
            raise RuntimeError(
                f"thread {threading.get_ident()} calls a model whose adapters_of_rows thread {self._thread} has opened"
            )
        self._changes_of_thread()
        return self.rows

    def _rows_in_backward(self) -> Rows | None:
        """:meth:`current` of a checkpointed layer, which backward runs again."""
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            # On a CPU, backward runs in the thread that calls it, usually that of the forward. A
            # thread that has called no layer, as autograd's own for a GPU, runs nodes of any thread.
            changes: deque[_Change] | None = getattr(self._of_thread, "changes", None)
            threads = [*self._changes.values()] if changes is None else [changes]
            if all(_rows_at(history, number) is not self.rows for history in threads):
                raise RuntimeError(
                    "backward runs a checkpointed layer again under other names than its forward had: call backward within "
                    "the adapters_of_rows of the forward, and each forward's own"
                )
        return self.rows


def _rows_at(changes: Sequence[_Change], number: int) -> Rows | None:
    """The rows that held when autograd made a thread's node of this number."""
    for change in reversed(changes):
        if change.number <= number:
            return change.rows
    return None
