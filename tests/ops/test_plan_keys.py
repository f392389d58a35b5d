"""The keys of prepared launches: each part is needed, and an unusual call has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stablelora_kernels as slk
from stablelora_kernels import functional
from stablelora_kernels.dispatch import autotune, settings
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.ops import plans
from tests.helpers.autotuning import Timer, forget
from tests.helpers.inputs import BF16, DEVICE, FP16, FP32, make_inputs
from tests.helpers.launches import recorded_launches, without_plans
from tests.helpers.precision import switched

pytest.importorskip("triton", reason="Triton is not installed on this platform")

OPERANDS = ("x", "weight", "bias", "lora_A", "lora_B")


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "measure", timer := Timer())
    timer.fast["vendor"] = 1e-6
    forget()
    with slk.use_backend("triton"):
        yield
    forget()


class Call(NamedTuple):
    """One forward and backward of ``lora_linear``."""

    rows: int = 130
    dtype: torch.dtype = BF16
    scaling: float = 1.7
    dropout_p: float = 0.0
    training: bool = True
    # Makes another tensor of an operand or of "grad".
    laid_out: dict[str, Callable[[Tensor], Tensor]] = {}  # noqa: RUF012
    wanted: tuple[str, ...] = ("x", "lora_A", "lora_B")
    # Entered around the call.
    within: Callable[[], Any] = nullcontext

    def run(self) -> tuple[list[Any], list[Any]]:
        """The launches, as the kernels were told them, and the results."""
        inputs = make_inputs((self.rows, 64), 96, 8, dtype=self.dtype, lora_dtype=FP32)
        for name, change in self.laid_out.items():
            inputs[name] = change(inputs[name])
        leaves = [inputs[name].detach().requires_grad_(name in self.wanted) for name in OPERANDS]
        given = {t.data_ptr(): name for name, t in zip(OPERANDS, leaves, strict=True)}
        torch.manual_seed(0)
        with self.within(), recorded_launches(given) as launches:
            y = lora_linear(*leaves, self.scaling, self.dropout_p, self.training)
            if y.requires_grad:
                y.backward(inputs["grad"])
        return launches, [y.detach(), *(leaf.grad for leaf in leaves)]


def shifted(t: Tensor) -> Tensor:
    """``t`` at an address that is no multiple of 16."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


@contextmanager
def tuned_deterministically() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    with slk.use_autotune(True):
        yield
    torch.use_deterministic_algorithms(False)


class Part(NamedTuple):
    """A part of a key, and two calls that differ in nothing else."""

    what: str
    first: Call
    other: Call
    # Takes the part out of a key.
    without: Callable[[list[Any]], list[Any]]


def _of_tensors(index: int) -> Callable[[list[Any]], list[Any]]:
    """Take one of the six facts about a tensor out of a key."""

    def without(key: list[Any]) -> list[Any]:
        return [
            part[:index] + part[index + 1 :] if isinstance(part, tuple) and len(part) == 6 else part for part in key
        ]

    return without


def _numbers(key: list[Any]) -> list[Any]:
    return [None if type(part) is float else part for part in key]


def _flags(key: list[Any]) -> list[Any]:
    return [None if type(part) is bool else part for part in key]


def _setting(index: int) -> Callable[[list[Any]], list[Any]]:
    return lambda key: [key[0], (*key[1][:index], None, *key[1][index + 1 :]), *key[2:]]


tuned = lambda: slk.use_autotune(True)  # noqa: E731
PARTS = [
    Part("shape", Call(), Call(rows=140), _of_tensors(0)),
    Part("strides of an operand", Call(), Call(laid_out={"lora_A": transposed}), _of_tensors(1)),
    Part("strides of a gradient", Call(), Call(laid_out={"grad": transposed}), _of_tensors(1)),
    Part("dtype", Call(), Call(dtype=FP16), _of_tensors(2)),
    Part("alignment of an operand", Call(), Call(laid_out={"x": shifted}), _of_tensors(4)),
    Part("alignment of a gradient", Call(), Call(laid_out={"grad": shifted}), _of_tensors(4)),
    Part("requires_grad", Call(wanted=("x", "lora_A")), Call(), _of_tensors(5)),
    Part("wanted gradients", Call(), Call(wanted=("x", "lora_B")), lambda key: _of_tensors(5)(_flags(key))),
    Part("scaling", Call(), Call(scaling=2.5), _numbers),
    Part("dropout", Call(dropout_p=0.2), Call(dropout_p=0.3), _numbers),
    Part("training", Call(dropout_p=0.2), Call(dropout_p=0.2, training=False), _flags),
    Part("grad mode", Call(within=torch.no_grad), Call(), _flags),
    Part("backend", Call(), Call(within=lambda: slk.use_backend("torch")), _setting(0)),
    Part("kernel", Call(), Call(within=lambda: slk.use_kernel("split")), _setting(1)),
    Part("autotune", Call(), Call(within=tuned), _setting(2)),
    Part("determinism", Call(within=tuned), Call(within=tuned_deterministically), lambda key: key[:-1]),
    *(
        Part(name, Call(dtype=FP32), Call(dtype=FP32, within=partial(switched, name)), _setting(3))
        for name in ("set_float32_matmul_precision('high')", "backends.fp32_precision = 'tf32'")
    ),
]


def run_with_keys(call: Call) -> tuple[tuple[list[Any], list[Any]], list[list[Any]]]:
    """The call's launches and results, and the keys that it was looked up by."""
    keys: list[list[Any]] = []
    whole = plans.key_of

    def key_of(kind: str, args: Any) -> Any:
        key = whole(kind, args)
        keys.append([*(key or ())])
        return key

    with mock.patch.object(plans, "key_of", key_of), mock.patch.object(functional, "key_of", key_of):
        return call.run(), keys


@pytest.mark.parametrize("part", PARTS, ids=[part.what for part in PARTS])
def test_each_part_of_a_key_is_needed(part: Part) -> None:
    """Two calls whose launches differ have keys that differ in this part alone."""
    with without_plans():
        # Twice: autotuning launches more in the first call.
        _, first, _, (launches, results) = (call.run() for call in (part.first, part.first, part.other, part.other))
    assert first[0] != launches
    _, keys = run_with_keys(part.first)
    for _ in range(2):
        part.first.run()
    (found, values), other_keys = run_with_keys(part.other)
    assert found == launches
    for mine, theirs in zip(values, results, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    # A call that is found looks up fewer of them.
    by_kind = {key[0]: key for key in other_keys if key}
    pairs = [(mine, by_kind[mine[0]]) for mine in keys if mine and mine[0] in by_kind]
    assert any(part.without(mine) == part.without(theirs) for mine, theirs in pairs if mine != theirs)


def test_a_key_has_six_facts_of_a_tensor() -> None:
    """The order on which the test above relies. The device is that of a second GPU: tests/gpu."""
    x = torch.ones(3, 5, dtype=BF16, device=DEVICE)
    key = plans.key_of("kind", (x,))
    assert key is not None
    assert key[2] == (x.shape, x.stride(), x.dtype, x.get_device(), 0, False)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


UNUSUAL = {
    "dispatch mode": lambda x: (_Dispatch(), (x,)),
    "function mode": lambda x: (_Function(), (x,)),
    "forward-mode gradients": lambda x: (torch.autograd.forward_ad.dual_level(), (x,)),
    "subclass": lambda x: (nullcontext(), (x.as_subclass(_Subclass),)),
    "negated view": lambda x: (nullcontext(), (torch._neg_view(x),)),
    "sparse": lambda x: (nullcontext(), (x.to_sparse(),)),
    "nested": lambda x: (nullcontext(), (torch.nested.nested_tensor([x, x]),)),
    "empty": lambda x: (nullcontext(), (x[:0],)),
    "meta": lambda x: (nullcontext(), (x.to("meta"),)),
    "negative zero": lambda x: (nullcontext(), (x, -0.0)),
    "a tensor for a number": lambda x: (nullcontext(), (x, [object()])),
    "no tensor": lambda x: (nullcontext(), (1.0, None)),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_call_has_no_key(what: str) -> None:
    x = torch.ones(3, 5, device=DEVICE)
    assert plans.key_of("kind", (x, 0.0)) is not None
    within, args = UNUSUAL[what](x)
    with within:
        assert plans.key_of("kind", args) is None


def test_transformed_and_traced_calls_have_no_key() -> None:
    keys: list[Any] = []

    def look(x: Tensor) -> Tensor:
        keys.append(plans.key_of("kind", (x,)))
        return x * 2

    x = torch.ones(3, device=DEVICE)
    torch.func.vmap(look)(x[None])
    torch.func.jacrev(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    torch.compile(look, backend="eager", fullgraph=True)(x)
    assert len(keys) >= 4 and not any(keys)


def test_settings_in_force_tell_settings_apart() -> None:
    seen = {settings.in_force()}
    precision = switched("backends.cuda.matmul.fp32_precision = 'tf32'")
    for block in (slk.use_backend("torch"), slk.use_kernel("split"), slk.use_autotune(True), precision):
        with block:
            seen.add(settings.in_force())
    assert len(seen) == 5
