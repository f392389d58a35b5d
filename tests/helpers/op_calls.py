"""The ops that layers call, counted wherever in the package they are called from."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import pytest
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels import functional

OPS = (
    "lora_linear",
    "lora_linear_if",
    "lora_branch",
    "lora_linear_group",
    "lora_linear_group_if",
    "lora_mlp",
    "lora_mlp_if",
    "lora_experts",
)


class Calls:
    """``layers`` counts lora_linear, lora_branch and lora_experts. ``before`` runs before each
    call, and may raise.
    """

    def __init__(self) -> None:
        self.before: Callable[[], Any] = lambda: None
        self.clear()

    def clear(self) -> None:
        self.layers: Counter[str] = Counter()
        # The number of projections of each group, and the activation of each MLP.
        self.groups: list[int] = []
        self.mlps: list[str] = []

    @property
    def fused(self) -> list[Any]:
        return self.groups + self.mlps

    def add(self, op: str, args: Any) -> None:
        if op == "lora_linear_group":
            self.groups.append(len(args[1]))
        elif op == "lora_linear_group_if":
            self.groups.append(len(args[2]))
        elif op == "lora_mlp":
            self.mlps.append(args[4])
        elif op == "lora_mlp_if":
            self.mlps.append(args[3])
        else:
            self.layers[op.removesuffix("_if")] += 1


@contextmanager
def counted_ops() -> Iterator[Calls]:
    calls = Calls()

    def counting(name: str, op: Any) -> Any:
        @functools.wraps(op)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.before()
            result: Any = True
            try:
                result = op(*args, **kwargs)
            finally:
                if result is not None:
                    calls.add(name, args)
            return result

        return counted

    with suppress(ImportError):
        # Imports what is imported for PEFT alone.
        slk.restore_peft(nn.Identity())
    with ExitStack() as stack:
        for name in OPS:
            op = getattr(functional, name)
            for module in list(sys.modules.values()):
                is_caller = (
                    module.__name__.startswith("stablelora_kernels.") and module is not functional
                )
                if is_caller and vars(module).get(name) is op:
                    stack.enter_context(mock.patch.object(module, name, counting(name, op)))
        yield calls


@pytest.fixture
def calls() -> Iterator[Calls]:
    with counted_ops() as made:
        yield made
