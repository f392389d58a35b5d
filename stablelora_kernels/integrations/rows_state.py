"""Which rows of a batch run which adapter of a model: the state that ``adapters_of_rows`` fills and
the model's layers read.

It belongs to the model, not to a thread: autograd runs checkpointed layers again in threads of its
own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

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


def ranges_of(names: Sequence[str]) -> tuple[RowRange, ...]:
    """The rows of each adapter, for the name of each row.

    Raises:
        TypeError: ``names`` is no sequence of strings.
        ValueError: there is no name, or the rows of an adapter do not lie together.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
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

    def __init__(self, ranges: Sequence[RowRange]) -> None:
        self.ranges = tuple(ranges)
        self.count = ranges[-1].end
        # The tokens of a row, by the latest input that has them in a dimension of their own.
        self._tokens = 1

    def tokens_of(self, x: Tensor, layer: str) -> int:
        """How many rows of x, as a matrix, each row of the batch has.

        x is [rows, ..., K], or [rows · tokens, K] of a module that flattens its input [rows, tokens,
        K].

        Raises:
            ValueError: x has another number of rows than the context has names.
        """
        if x.dim() > 2 and x.shape[0] == self.count:
            self._tokens = x.shape[1:-1].numel()
            return self._tokens
        if x.dim() == 2 and x.shape[0] == self.count * self._tokens:
            return self._tokens
        flat = f", or {self.count * self._tokens} of a flattened batch" if x.dim() == 2 else ""
        raise ValueError(
            f"the batch must have {self.count} rows, one for each of the names of adapters_of_rows{flat}, but a "
            f"{layer} got an input of shape {list(x.shape)}"
        )


class _Change(NamedTuple):
    """From autograd's node of this number on, ``rows`` held."""

    number: int
    rows: Rows | None


class RowsState:
    """The rows in force in a model, None outside of a context; its layers share it.

    It remembers the numbers that autograd's nodes had at each change. So when backward runs a
    checkpointed layer again, the node that needs it tells which rows held in the forward.
    """

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self._thread = 0
        self._changes: deque[_Change] = deque(maxlen=_REMEMBERED)

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
        if thread != self._thread:
            # Each thread has numbers of its own.
            self._changes.clear()
            self._thread = thread
        before = self.rows
        self.rows = rows
        self._changes.append(_Change(torch._C._autograd._get_sequence_nr(), rows))
        return before

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
        return self.rows

    def _rows_in_backward(self) -> Rows | None:
        """:meth:`current` of a checkpointed layer, which backward runs again."""
        node = torch._C._current_autograd_node()
        if node is not None and self._rows_at(node._sequence_nr()) is not self.rows:
            raise RuntimeError(
                "backward runs a checkpointed layer again under other names than its forward had: call backward within the "
                "adapters_of_rows of the forward, and each forward's own"
            )
        return self.rows

    def _rows_at(self, number: int) -> Rows | None:
        """The rows that held when autograd made its node of this number."""
        for change in reversed(self._changes):
            if change.number <= number:
                return change.rows
        return None


class RunsRows:
    """A base class of layers that may have a state."""

    # A default of the class: torch.compile guards that no instance has another, but it would not
    # guard that a key is missing in __dict__.
    _stablelora_rows: RowsState | None = None


def rows_of(layer: RunsRows) -> Rows | None:
    """The rows in force for a layer that is called now; None outside of ``adapters_of_rows``.

    Raises:
        RuntimeError: as :meth:`RowsState.current`.
    """
    state = layer._stablelora_rows
    return None if state is None else state.current()
