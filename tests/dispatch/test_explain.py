"""explain(): it lists the launches that a call makes, with the reasons, and refuses what no call
could be.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import backend, rules
from stablelora_kernels.dispatch.problem import DEVICES, GPU_NAMES
from stablelora_kernels.ops import plans
from stablelora_kernels.quantized import WEIGHTS
from stablelora_kernels.testing.cases import BF16, DEVICE, FP32, Case
from tests.helpers.case_checks import launches, run_recorded, table

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")
another_gpu = pytest.mark.skipif(
    DEVICE == "cuda", reason="pretends a GPU: runs on machines without one"
)


def explained(case):
    """explain()'s answer for a call."""
    (m, k), n, quantized = case.shape, case.sizes, case.quantized[0]
    with slk.settings(strategy=case.strategy):
        return slk.explain(
            m, n if case.op == "group" else n[0], k, case.ranks[0], case.dtype, case.p, lora_dtype=case.lora_dtype,
            device=case.arch, branch_only=case.op == "branch", quantized=quantized and quantized.split()[0],
        )  # fmt: skip


# Rows, rank and dropout of each regime.
REGIMES = [
    (0, 16, 0.0),
    (8, 16, 0.0),
    (8, 48, 0.1),
    (64, 64, 0.0),
    (70, 16, 0.1),
    (70, 130, 0.0),
    (200, 16, 0.0),
]
LARGEST_RANK = {"auto": 130, "few_rows": 64, "one_launch": 128, "branch_first": 130}


def build(op, regime, arch, dtype, strategy):
    m, r, p = regime
    count = 3 if op == "group" else 1
    case = Case(
        "linear",
        (m, 64),
        (48, 40, 24)[:count],
        (r,) * count,
        dtype,
        FP32,
        p=p,
        strategy=strategy,
        arch=arch,
    )
    if r > LARGEST_RANK[strategy] or (strategy == "few_rows" and (m > 64 or p)):
        return None
    if op in WEIGHTS:
        return case.but(quantized=(op,)) if m else None
    return case.but(op=op)


CALLS = table(
    build, op=["linear", "branch", "group", *WEIGHTS], regime=REGIMES, arch=[*DEVICES], dtype=[BF16, FP32],
    strategy=[*LARGEST_RANK],
)  # fmt: skip


@another_gpu
@pytest.mark.parametrize("case", CALLS)
def test_the_listed_launches_are_made(case):
    """The launches of a real call, on each kind of GPU, in each regime; all that explain() knows of
    them is in its text.
    """
    found = explained(case)
    assert (found.backend, found.arch) == ("triton", case.arch)
    steps, made = (*found.forward, *found.backward), run_recorded(case)[0]
    assert [step.kernel for step in steps] == [
        name.removeprefix("_").removesuffix("_kernel") for name, *_ in made
    ]
    for step, (_, grid, _, _, options) in (
        (step, launch) for step, launch in zip(steps, made, strict=True) if step.grid
    ):
        assert (step.grid, step.num_warps, step.num_stages) == (
            grid,
            options["num_warps"],
            options["num_stages"],
        )
    text = str(found)
    assert (
        found.forward_reason in text
        and found.backward_reason in text
        and (case.quantized[0] or "") in text
    )
    assert all(f"{step.kernel} [{step.variant}]" in text and step.reason in text for step in steps)


@another_gpu
@pytest.mark.covering
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    "regime", [(33, 8, 0.0), (33, 100, 0.1), (70, 16, 0.2), (131, 128, 0.0)], ids=str
)
@pytest.mark.parametrize(
    "wanted", [None, ["lora_A0"], ["lora_B0"], ["x"], ["x", "lora_B0"]], ids=str
)
@pytest.mark.parametrize("op", ["linear", "branch"])
def test_a_call_is_one_launch_forward_and_one_backward(op, wanted, regime, arch):
    """The budget of launches: whatever the gradients that are wanted, the rows, the rank and the
    dropout.
    """
    m, r, p = regime
    forward, backward = launches(
        Case(op, (m, 24), (20,), (r,), BF16, FP32, p=p, arch=arch, wanted=wanted)
    )
    assert (forward.total(), backward.total()) == (1, 1)


# (out, in) of the linear layers in a block of Llama 3.1 8B.
LLAMA = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))


@pytest.mark.parametrize("arch", DEVICES)
def test_training_a_llama_is_one_launch_a_layer_and_direction(arch):
    for m, (n, k), p in product((2048, 4096, 8192, 16384), LLAMA, (0.0, 0.05)):
        found = slk.explain(m, n, k, 16, dropout_p=p, device=arch)
        assert (len(found.forward), len(found.backward)) == (1, 1), (m, n, k, p)
        assert (found.forward_strategy, found.backward_strategy) == ("one_launch", "one_launch")


def test_descriptors_are_used_where_they_can_be():
    """Rows of a multiple of 16 bytes, on GPUs that have descriptors."""
    for arch, k, descriptors in (("sm_90", 64, True), ("sm_90", 63, False), ("sm_80", 64, False)):
        found = slk.explain(70, 48, k, 16, device=arch)
        assert {step.kernel.endswith("_tma") for step in (*found.forward, *found.backward)} == {
            descriptors
        }


def test_explain_says_what_decided():
    with slk.settings(strategy="one_launch"):
        found = slk.explain(8, 64, 64, 8, device="sm_90")
    assert (found.forward_strategy, found.forward_reason) == ("one_launch", rules.FORCED)
    with slk.settings(backend="torch"):
        found = slk.explain(8, 16, 16, 4, device="cpu")
    assert (found.backend, found.forward, found.backward) == ("torch", (), ())
    assert "PyTorch's operators; device='sm_90' lists an H100's launches" in str(found)


WRONG = [
    ({"M": -1}, ValueError, "M must be at least 0, got -1"),
    ({"r": 0}, ValueError, "r must be at least 1, got 0"),
    ({"K": 2.5}, TypeError, "K must be an int, got 2.5"),
    ({"N": (16,)}, ValueError, r"N must be one size or 2 to 3, got \(16,\)"),
    ({"N": (16, 0)}, ValueError, "N must be .* 1, got 0"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a finite number in \[0, 1\), got 1.0"),
    ({"device": "sm_75"}, ValueError, r"by its kind, 'sm_80' \(A100\), .*; got 'sm_75'"),
    (
        {"device": "h100"},
        ValueError,
        r"device must be .* as 'cpu', or a GPU by its kind, .*'sm_90' \(H100, .*; got 'h100'",
    ),
    (
        {"device": "cuda:99"},
        ValueError,
        "device must be a device of this machine, .*; got 'cuda:99'",
    ),
    ({"dtype": torch.float64}, TypeError, "dtype must be .*got torch.float64"),
    (
        {"dtype": "bf16"},
        TypeError,
        "dtype must be torch.bfloat16, torch.float16 or torch.float32, .* got 'bf16'",
    ),
    (
        {"lora_dtype": torch.float16},
        TypeError,
        "lora_dtype must be float32 or dtype torch.bfloat16, got torch.float16",
    ),
    (
        {"quantized": "int8"},
        ValueError,
        "quantized must be 'nf4', 'fp8', 'nvfp4', 'mxfp4' or None, got 'int8'",
    ),
    (
        {"quantized": "nf4", "N": (16, 16)},
        ValueError,
        "quantized must be None for several N, got 'nf4'",
    ),
    (
        {"quantized": "nf4", "branch_only": True},
        ValueError,
        "None where branch_only is true, .* got 'nf4'",
    ),
]


def test_explain_checks_its_arguments():
    good = {"M": 8, "N": 16, "K": 16, "r": 4, "device": "sm_90"}
    for change, error, message in WRONG:
        with pytest.raises(error, match=message):
            slk.explain(**good | change)


def test_every_gpu_has_a_name_for_messages():
    assert GPU_NAMES.keys() == DEVICES.keys()


def test_a_named_gpu_needs_triton(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_PROBLEM", "Triton is not installed")
    with pytest.raises(
        RuntimeError,
        match=r"device='sm_90' asks for .* Triton kernels, but Triton is not installed",
    ):
        slk.explain(64, 64, 64, 8, device="sm_90")


def test_pretending_ends_with_its_block():
    """An unknown GPU is refused; after an error inside, no launch is prepared for the GPU that was
    pretended.
    """
    with (
        pytest.raises(ValueError, match=r"arch must be one of sm_80, .*, got 'h100'"),
        slk.testing.pretend_gpu("h100"),
    ):
        pass
    with pytest.raises(KeyError), slk.testing.pretend_gpu("sm_90"):
        plans.remember(("key",), "triton")
        raise KeyError
    assert plans.find(("key",)) is None
