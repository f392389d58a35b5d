"""explain(): it lists the launches that a call makes, with the reasons, and refuses what no call could be."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import backend, rules
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.rules import QUANTIZED_RULES
from tests.helpers.case_checks import table
from tests.helpers.cases import BF16, DEVICE, FP32, Case, forced, leaves, make, ours, run
from tests.helpers.launches import count_launches

pytest.importorskip("triton", reason="Triton is not installed on this platform")
another_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="another GPU than this machine's is pretended")


def launched(explanation):
    """The launches that an explanation lists, as they are counted."""
    steps = (*explanation.forward, *explanation.backward)
    names = [step.kernel if step.kernel == "vendor" else f"_{step.kernel}_kernel" for step in steps]
    return {name: names.count(name) for name in names}


def explained(case):
    """explain()'s answer for a call."""
    (m, k), n, quantized = case.shape, case.sizes, case.quantized[0]
    with slk.use_kernel(case.kernel):
        return slk.explain(
            m, n if case.op == "group" else n[0], k, case.ranks[0], case.dtype, case.p, lora_dtype=case.lora_dtype,
            device=case.arch, branch_only=case.op == "branch", quantized=quantized and quantized.split()[0],
        )  # fmt: skip


# Rows, rank and dropout of each regime.
REGIMES = [
    (0, 16, 0.0), (8, 16, 0.0), (8, 48, 0.1), (64, 64, 0.0), (70, 16, 0.1), (70, 32, 0.0), (70, 128, 0.1), (70, 130, 0.0),
]  # fmt: skip


def build(op, regime, arch, dtype, kernel):
    m, r, p = regime
    count = 3 if op == "group" else 1
    case = Case("linear", (m, 64), (48, 40, 24)[:count], (r,) * count, dtype, FP32, p=p, kernel=kernel, arch=arch)
    if kernel == "chained" and r > 128:
        return None
    if op in ("nf4", "fp8"):
        return case.but(quantized=(op,)) if m else None
    return case.but(op=op)


CALLS = table(
    build, op=["linear", "branch", "group", "nf4", "fp8"], regime=REGIMES, arch=[*DEVICES], dtype=[BF16, FP32],
    kernel=["auto", "chained", "split", "vendor"],
)  # fmt: skip


@another_gpu
@pytest.mark.parametrize("case", CALLS)
def test_the_listed_launches_are_made(case):
    """The launches of a real call, on each kind of GPU, in each regime."""
    with count_launches() as made:
        run(case)
    found = explained(case)
    assert (found.backend, found.arch) == ("triton", case.arch)
    assert made == launched(found)
    assert found.forward_reason in str(found) and found.backward_reason in str(found)


@another_gpu
@pytest.mark.covering
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("regime", [(33, 8, 0.0), (33, 100, 0.1), (70, 16, 0.2), (131, 128, 0.0)], ids=str)
@pytest.mark.parametrize(
    "wanted", [None, ["lora_A0", "lora_B0"], ["lora_A0"], ["lora_B0"], ["x"], ["x", "lora_B0"]], ids=str
)
@pytest.mark.parametrize("op", ["linear", "branch"])
def test_a_chained_call_is_one_launch_forward_and_one_backward(op, wanted, regime, arch):
    """The budget of launches: whatever the gradients that are wanted, the rows, the rank and the dropout."""
    m, r, p = regime
    case = Case(op, (m, 24), (20,), (r,), BF16, FP32, p=p, arch=arch, wanted=wanted)
    leaf = leaves(case, make(case))
    with forced(case):
        with count_launches() as forward:
            (y,) = ours(case, leaf)
        with count_launches() as backward:
            y.backward(leaf["grad0"])
    # Above rank 64, or where several programs share the columns under dropout, a lone branch reads S from a launch before.
    assert forward.total() == (2 if op == "branch" and r > 64 else 1)
    assert backward.total() == 1


def test_explain_reads_well():
    few = slk.explain(4096, 4096, 4096, 16, dropout_p=0.1, device="sm_90")
    for (step,) in (few.forward, few.backward):
        assert step.kernel == "lora_linear_tma" and "chained" in step.variant.split()
    assert "forward: chained (up to 4096 rows and rank 128: one launch" in str(few)
    found = slk.explain(8192, 4096, 4096, 16, dropout_p=0.1, device="sm_90")
    assert (found.forward_kernel, found.backward_kernel) == ("split", "split")
    for steps in (found.forward, found.backward):
        assert [step.kernel for step in steps] == ["lora_shrink", "lora_linear_tma"]
    for step, beside in zip(found.backward, ("dB", "dA"), strict=True):
        assert beside in step.variant.split()
    text = str(found)
    assert text.startswith("backend triton on sm_90\nforward: split (many rows or a high rank: ")
    for step in (*found.forward, *found.backward):
        assert f"{step.kernel} [{step.variant}], grid {step.grid}" in text and step.reason in text
    with slk.use_kernel("vendor"):
        forced = slk.explain(8192, 4096, 4096, 16, device="sm_90")
    assert [step.kernel for step in forced.forward] == ["vendor", "lora_expand"]
    assert forced.forward_reason == rules.FORCED


def test_explain_says_when_a_measurement_may_replace_the_table():
    assert "autotuning" not in str(slk.explain(8, 64, 64, 8, device="sm_90"))
    with slk.use_autotune(True):
        assert slk.explain(8, 64, 64, 8, device="sm_90").forward_reason.endswith("may replace this by what it measures")
        with slk.use_kernel("split"):
            assert slk.explain(8, 64, 64, 8, device="sm_90").forward_reason == rules.FORCED


def test_explain_says_when_pytorch_runs():
    with slk.use_backend("torch"):
        found = slk.explain(8, 16, 16, 4, device="cpu")
    assert (found.backend, found.forward, found.backward) == ("torch", (), ())
    assert "PyTorch's operators; device='sm_90' lists an H100's launches" in str(found)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"M": -1}, ValueError, "M must be at least 0, got -1"),
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"K": 2.5}, TypeError, "K must be an int, got 2.5"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a finite number in \[0, 1\), got 1.0"),
        ({"device": "sm_75"}, ValueError, "one of sm_80, .*, got 'sm_75'"),
        ({"device": "h100"}, ValueError, "device must be a device of this machine, as 'cpu', or one of sm_80, .*, got 'h100'"),
        ({"device": "cuda:99"}, ValueError, "device must be a device of this machine, .*, got 'cuda:99'"),
        ({"dtype": torch.float64}, TypeError, "dtype must be .*got torch.float64"),
        ({"lora_dtype": torch.float16}, TypeError, "lora_dtype must be float32 or dtype torch.bfloat16, got torch.float16"),
    ],
)  # fmt: skip
def test_explain_checks_its_arguments(change, error, message):
    good = {"M": 8, "N": 16, "K": 16, "r": 4, "device": "sm_90"}
    with pytest.raises(error, match=message):
        slk.explain(**good | change)


def test_explain_lists_what_is_launched():
    found = slk.explain(4096, (4096, 1024, 1024), 4096, 16, device="sm_90")
    assert [step.kernel for step in found.forward] == ["lora_shrink_group"] + ["lora_linear_tma"] * 3
    assert [step.kernel for step in found.backward] == ["lora_linear_tma"] * 3 + ["lora_weight_grads_group"]
    assert found.forward_kernel == "together: chained, chained, chained" and "one read of x" in found.forward_reason
    assert sum("add" in step.variant for step in found.backward) == 2
    many = slk.explain(8192, (4096, 1024, 1024), 4096, 16, device="sm_90")
    assert many.forward_kernel == "together: split, vendor, vendor"
    assert [step.kernel for step in many.backward][:2] == ["lora_shrink", "lora_linear_tma"]
    few = slk.explain(8, [4096, 1024], 4096, 16, device="sm_90")
    assert few.forward_kernel == "apart: fused, fused" and "saves a launch" in few.forward_reason
    with pytest.raises(ValueError, match=r"N must be one size or 2 to 3, got \(4096,\)"):
        slk.explain(8, (4096,), 4096, 16, device="sm_90")
    with pytest.raises(ValueError, match=r"N must be .* 1, got 0"):
        slk.explain(8, (4096, 0), 4096, 16, device="sm_90")
    with pytest.raises(ValueError, match=r"quantized must be None for several N, got 'nf4'"):
        slk.explain(8, (4096, 4096), 4096, 16, device="sm_90", quantized="nf4")


def test_explaining_the_branch_alone():
    few, high = (slk.explain(8, 4096, 4096, r, branch_only=True, device="sm_90") for r in (16, 256))
    assert [step.kernel for step in few.forward] == ["lora_expand"]
    assert [step.kernel for step in high.backward] == ["lora_shrink", "lora_linear"]
    assert "rank above 64" in high.forward_reason and "dy @ B and dB" in high.backward_reason
    dropped = slk.explain(8, 4096, 4096, 16, dropout_p=0.1, branch_only=True, device="sm_90")
    assert [step.kernel for step in dropped.forward] == ["lora_shrink", "lora_expand"]
    assert "each mask is drawn once" in dropped.forward_reason
    # Nothing is measured, and no kernel can be forced.
    with slk.use_kernel("vendor"):
        assert slk.explain(8, 4096, 4096, 16, branch_only=True, device="sm_90") == few
    none = slk.explain(0, 64, 64, 4, branch_only=True, device="sm_90")
    assert none.forward == () and [step.kernel for step in none.backward] == ["lora_weight_grads"]
    with slk.use_backend("torch"):
        assert slk.explain(8, 64, 64, 4, branch_only=True, device="cpu").backend == "torch"
    with pytest.raises(ValueError, match=r"quantized must be None where branch_only is true, .* got 'nf4'"):
        slk.explain(8, 64, 64, 4, branch_only=True, quantized="nf4", device="sm_90")


@pytest.mark.parametrize("quantized", ["nf4", "fp8"])
def test_explain_tells_what_runs(quantized):
    few = slk.explain(8, 4096, 4096, 16, quantized=quantized, device="sm_90")
    assert (few.forward_kernel, few.backward_kernel) == ("in_loop", "in_loop")
    assert [step.kernel for step in few.forward] == ["lora_shrink", "lora_linear_quantized"]
    assert [step.kernel for step in few.backward] == ["lora_shrink", "lora_linear_quantized", "lora_weight_grads"]
    assert QUANTIZED_RULES[-1].reason in str(few)
    many = slk.explain(4096, 4096, 4096, 16, quantized=quantized, device="sm_90")
    assert (many.forward_kernel, many.backward_kernel) == ("dequantize, chained", "dequantize, chained")
    assert [step.kernel for step in many.forward] == ["dequantize", "lora_linear_tma"]
    assert [step.kernel for step in many.backward] == ["dequantize", "lora_linear_tma"]
    assert QUANTIZED_RULES[1].reason in str(many)


def test_explain_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="quantized must be 'nf4', 'fp8' or None, got 'int8'"):
        slk.explain(8, 64, 64, 16, quantized="int8", device="sm_90")


def test_a_named_gpu_needs_triton(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_PROBLEM", "Triton is not installed")
    with pytest.raises(RuntimeError, match=r"device='sm_90' asks for .* Triton kernels, but Triton is not installed"):
        slk.explain(64, 64, 64, 8, device="sm_90")
