"""The compiled loops over lists of tensors, against the same in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton's cache keeps the compiled loops")

from stablelora_kernels.optim import tensor_lists
from stablelora_kernels.optim.tensor_lists import KnownEntries, KnownMemory, Layout, layout_of
from tests.helpers.optimizers import DEVICE


@pytest.fixture(params=["compiled", "python"], autouse=True)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    found = tensor_lists._compiled() if request.param == "compiled" else None
    if request.param == "compiled" and found is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(tensor_lists, "_loops", found)
    return request.param


def matrices() -> list[torch.Tensor]:
    return [torch.zeros(4, 4, device=DEVICE), torch.nn.Parameter(torch.zeros(3, 8, device=DEVICE))]


class Subclass(torch.Tensor):
    pass


def test_layouts_tell_addresses_and_forms_apart(loops: str) -> None:
    x, y = matrices()
    whole = layout_of([x, y])
    assert isinstance(whole, Layout) and whole == layout_of([x.detach(), y.detach()])
    assert whole.addresses == b"".join(t.data_ptr().to_bytes(8, "little") for t in (x, y))
    moved = layout_of([x.clone(), y])
    assert moved.forms == whole.forms and moved.addresses != whole.addresses
    assert layout_of([x.view(torch.int32), y]).forms != whole.forms
    assert layout_of([x.to(torch.bfloat16), y]).forms != whole.forms
    # Python answers for contiguous tensors alone.
    transposed = layout_of([x.t(), y])
    assert transposed is None if loops == "python" else transposed.forms != whole.forms
    if loops == "compiled":
        assert layout_of([x.view(2, 8), y]).forms != whole.forms
        assert layout_of([x.view(16), y]).forms != whole.forms
        assert layout_of([torch.zeros(4, 4, device="meta"), y]).forms != whole.forms
        # Two lists whose numbers are the same in a row.
        a, b = torch.zeros(1, device=DEVICE), torch.zeros((), device=DEVICE)
        assert layout_of([a, b]).forms != layout_of([b, a]).forms


def test_layouts_of_many_dimensions_and_of_none(loops: str) -> None:
    deep = [torch.zeros([1] * n, device=DEVICE) for n in (0, 1, 12, 40)]
    assert len(layout_of(deep).addresses) == 32
    assert layout_of([torch.zeros(0, 3, device=DEVICE)]).addresses == bytes(8)
    assert layout_of([]).addresses == b""


def test_what_has_no_layout(loops: str) -> None:
    x, y = matrices()
    assert layout_of([x, None]) is None
    assert layout_of([x, y.detach().to_sparse()]) is None
    # Left to Python, which asks the tensor itself.
    assert layout_of([x, x.as_subclass(Subclass)]).forms == [torch.float32] * 2


def test_gradients_are_read_from_their_parameters(loops: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(2, 3, device=DEVICE)) for _ in range(3)]
    assert tensor_lists.grad_layout_of(params) is None
    for p in params:
        p.grad = torch.ones_like(p)
    expected = layout_of([p.grad for p in params]) if loops == "compiled" else None
    assert tensor_lists.grad_layout_of(params) == expected
    params[1].grad = None
    assert tensor_lists.grad_layout_of(params) is None


def test_versions() -> None:
    tensors = matrices()
    before = tensor_lists.version_sum(tensors)
    assert before == sum(t._version for t in tensors)
    tensors[0].add_(1)
    tensors[1].detach().add_(1)
    assert tensor_lists.version_sum(tensors) == before + 2
    tensor_lists.increment_versions(tensors)
    assert tensor_lists.version_sum(tensors) == before + 4
    y = (tensors[1] * tensors[1]).sum()
    tensor_lists.increment_versions([tensors[1]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_tensors_have_no_versions() -> None:
    with torch.inference_mode():
        tensors = [torch.zeros(2, device=DEVICE)]
    with pytest.raises(RuntimeError, match="tensors do not track version"):
        tensor_lists.version_sum(tensors)


def test_known_memory() -> None:
    x, y = matrices()
    known = KnownMemory([x, y])
    assert known.is_that_of([x, y]) and known.is_that_of([x.detach(), y])
    assert not known.is_that_of([y, x]) and not known.is_that_of([x]) and not KnownMemory([]).is_that_of([x])
    y.data = y.data.clone()
    assert not known.is_that_of([x, y])


def test_memory_known_before_the_loops_were_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that stepped before another one had them compiled keeps its engines."""
    x, y = matrices()
    entries = {x: {"step": y}}
    with monkeypatch.context() as patch:
        patch.setattr(tensor_lists, "_loops", None)
        known, known_entries = KnownMemory([x, y]), KnownEntries(entries)
    assert known.is_that_of([x, y]) and known_entries.are_all_of(entries)
    assert not known.is_that_of([y, x]) and not known_entries.are_all_of({})


def test_known_entries() -> None:
    x, y = matrices()
    state = {x: {"step": y, "latched_at": 3}, y: {"step": x}}
    known = KnownEntries(state)
    assert known.are_all_of(state)
    # Equal, if in another order.
    assert known.are_all_of({y: {"step": x}, x: {"latched_at": 3, "step": y}})
    for other in (
        {},
        {x: state[x]},
        {**state, "more": {}},
        {x: {"step": y.clone(), "latched_at": 3}, y: {"step": x}},
        {x: {"step": y, "latched_at": 4}, y: {"step": x}},
        {x: {"step": y, "latched": 3}, y: {"step": x}},
        {x: {"step": y}, y: {"step": x}},
        {x: {"step": y, "latched_at": 3}, y: {"step": x, "more": None}},
        {x: state[x], y: x},
        [state],
    ):
        assert not known.are_all_of(other)


def test_the_module_is_compiled_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loops: str) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if loops == "python":
        monkeypatch.setenv("CXX", "/nowhere/c++")
        assert tensor_lists._compiled.__wrapped__() is None
        return
    first = tensor_lists._build()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert tensor_lists._build() == first and Path(first).is_relative_to(tmp_path)
