"""The byte counter: kernels counted by hand, and the interpreter as it was afterwards."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import triton
import triton.language as tl

from benchmarks.lab.predict import counter as t
from benchmarks.lab.predict.rivals import BF16
from stablelora_kernels.dispatch import backend
from stablelora_kernels.launch.lora_common import VendorProduct

pytestmark = [
    pytest.mark.skipif(not backend.INTERPRETING, reason="bytes are counted in the interpreter only"),
    pytest.mark.usefixtures("one_thread"),
]


@triton.jit
def _tiny_kernel(x_ptr, y_ptr, table_ptr, counter_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * 4 + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    hidden = tl.load(table_ptr).to(tl.pointer_type(tl.float16))
    x += tl.load(hidden + tl.arange(0, BLOCK)).to(tl.float32)
    tl.atomic_add(counter_ptr, 1)
    tl.store(y_ptr + at, x.to(tl.bfloat16), mask=at < N)


def run_tiny(kernel=_tiny_kernel):
    x, y, hidden = torch.zeros(11), torch.zeros(11, dtype=BF16), torch.zeros(8, dtype=torch.float16)
    table, counter = torch.tensor([hidden.data_ptr()]), torch.zeros(1, dtype=torch.int32)
    kernel[(2,)](x, y, table, counter, 11, BLOCK=8)
    return hidden


def test_a_kernel_counted_by_hand():
    """Two programs over 0-7 and 4-10 (11 is masked off): 15 elements of which 11 are distinct."""
    with t.counted() as found:
        run_tiny()
        run_tiny()
    expected = {
        "x": (15 * 4, 0, 11 * 4, 0),
        "table": (2 * 8, 0, 8, 0),
        "elsewhere": (2 * 16, 0, 16, 0),
        "counter": (8, 8, 4, 4),
        "y": (0, 15 * 2, 0, 11 * 2),
    }
    assert [seen.kernel for seen in found] == ["_tiny_kernel"] * 2
    for seen in found:
        assert seen.tensors == expected
        assert seen.traffic == (60 + 16 + 32 + 8, 30 + 8, 44 + 8 + 16 + 4, 22 + 4)
        assert (seen.traffic.issued, seen.traffic.unique, seen.ideal) == (154, 98, False)


def test_addresses_from_tables_have_the_names_they_are_given():
    x, y, hidden = torch.zeros(11), torch.zeros(11, dtype=BF16), torch.zeros(8, dtype=torch.float16)
    with t.counted(hidden=[hidden]) as found:
        _tiny_kernel[(1,)](x, y, torch.tensor([hidden.data_ptr()]), torch.zeros(1, dtype=torch.int32), 11, BLOCK=8)
    assert found[0].tensors["hidden"] == (16, 0, 16, 0)
    assert "elsewhere" not in found[0].tensors


@triton.jit
def _broken_kernel(x_ptr, y_ptr, table_ptr, counter_ptr, N, BLOCK: tl.constexpr):
    tl.load(x_ptr)
    tl.load(N)


def test_everything_is_restored_also_after_an_error():
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    wrapped = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")

    def state() -> tuple[object, ...]:
        return (dict(vars(interpreter_builder)).keys() & set(wrapped), GridExecutor.__call__, VendorProduct.run)

    before = state()
    with t.counted() as found:
        assert state() != before
        with pytest.raises(Exception, match="ptr"):
            run_tiny(_broken_kernel)
        # Not in the list, and what comes after it is counted afresh.
        assert found == []
        run_tiny()
        with t.counted() as inner:
            run_tiny()
        assert inner == found[1:] == found[:1]
    assert state() == before
    with pytest.raises(KeyError), t.counted():
        raise KeyError
    assert state() == before
    run_tiny()
    assert len(found) == 2


def test_counting_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), t.counted():
        pass
