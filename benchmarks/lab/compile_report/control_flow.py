"""Walks over all paths that a program may take, for code of any kind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

State = TypeVar("State", bound=Hashable)


def walk(
    successors: Sequence[Sequence[int]],
    start: int,
    state: State,
    pass_over: Callable[[int, State], State | None],
) -> Iterator[tuple[int, State]]:
    """Every place that may run after ``start``, nearest first, with every state in which a path
    comes to it.

    ``successors`` has, for each place, those that may run next. ``pass_over`` returns the state
    behind a place, or None if the path ends there.
    """
    todo = deque((place, state) for place in successors[start])
    met = {*todo}
    while todo:
        place, state = todo.popleft()
        yield place, state
        state_behind = pass_over(place, state)
        if state_behind is None:
            continue
        for successor in successors[place]:
            if (successor, state_behind) not in met:
                met.add((successor, state_behind))
                todo.append((successor, state_behind))
