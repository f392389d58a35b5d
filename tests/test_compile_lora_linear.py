"""The kernels compile for GPUs that are not here, into matrix instructions and wide loads, within registers and shared memory."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from tests.compiling import ARCHITECTURES, SHARED_LIMITS, run_module


@pytest.mark.parametrize("where", ARCHITECTURES)
def test_compiles_well(where):
    rows = run_module("compile_lora_linear", where)
    assert {row["kernel"] for row in rows} == {"lora_linear", "lora_shrink", "lora_linear_grads"}
    for row in rows:
        label = f"{where} {row['kernel']} {row['case']} {row['config']}"
        assert row["shared"] <= SHARED_LIMITS[where], label
        # Exact float32 products have no matrix instruction on NVIDIA's GPUs. An empty list elsewhere also tells of a kernel
        # that the compiler gave up on without a word, as it does when accumulators outgrow Blackwell's tensor memory.
        exact = "float32 float32" in row["case"] and where.startswith("cuda")
        assert bool(row["mma"]) != exact, label
        if where.startswith("cuda"):
            assert row["widest_load"] == 16, label
            # A few bytes around the epilogue are harmless; a spill inside the main loop is hundreds.
            assert row["spilled"] <= (0 if where == "cuda:90" else 64), f"{label}: {row['spilled']} bytes spilled"
        if where == "cuda:90" and not exact and row["config"][0] >= 64 and row["kernel"] != "lora_shrink":
            assert any(name.startswith("HGMMA") for name in row["mma"]), label
