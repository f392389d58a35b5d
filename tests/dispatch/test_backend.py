"""Which backend a call takes, and what is said where it can't be had."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import backend
from tests.helpers.processes import printed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_PROBLEM", None)
    with slk.use_backend("auto"):
        assert backend.resolve_backend(CPU) == "torch"
        assert backend.resolve_backend(CUDA) == "triton"
    with slk.use_backend("torch"):
        assert backend.resolve_backend(CUDA) == "torch"


def test_a_gpu_without_a_usable_triton_is_warned_of(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_PROBLEM", "Triton is not installed")
    monkeypatch.setattr(backend, "_warned", False)
    with slk.use_backend("auto"), pytest.warns(RuntimeWarning, match="Triton is not installed, so"):
        assert backend.resolve_backend(CUDA) == "torch"
    with slk.use_backend("triton"), pytest.raises(RuntimeError, match="can't run: Triton is not installed"):
        backend.resolve_backend(CUDA)


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("3.2.0", "Triton 3.2.0 is installed, but the kernels need 3.6 or newer"),
        ("3.6.0+git1234", None),
        ("3.10.1", None),
        ("4.0", None),
    ],
)
def test_triton_versions(monkeypatch, version, problem):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend.metadata, "version", lambda name: version)
    assert backend._triton_problem() == problem


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_PROBLEM", None)
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with slk.use_backend("triton"), pytest.raises(RuntimeError, match=r"on a tensor on cpu.*TRITON_INTERPRET=1"):
        backend.resolve_backend(CPU)
    monkeypatch.setattr(backend, "INTERPRETING", True)
    with slk.use_backend("triton"):
        assert backend.resolve_backend(CPU) == "triton"


def test_names():
    before = slk.get_backend()
    for call in (slk.set_backend, lambda name: slk.use_backend(name).__enter__()):
        with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'torch', got 'cuda'"):
            call("cuda")
    try:
        slk.set_backend("torch")
        assert slk.get_backend() == "torch"
        with slk.use_backend("triton"):
            assert slk.get_backend() == "triton"
        assert slk.get_backend() == "torch"
    finally:
        slk.set_backend(before)


def test_environment_variable_sets_the_start_value():
    code = "import stablelora_kernels as slk; print(slk.get_backend())"
    assert printed(code) == "auto"
    assert printed(code, STABLELORA_BACKEND="torch") == "torch"
    assert "STABLELORA_BACKEND must be one of 'auto', 'triton', 'torch', got 'gpu'" in printed(
        code, STABLELORA_BACKEND="gpu"
    )


def test_a_wrong_environment_raises_at_first_use_and_not_before():
    code = """
import stablelora_kernels as slk
for use in (slk.get_backend, slk.get_kernel, slk.get_autotune):
    for _ in range(2):
        try:
            use()
        except ValueError as error:
            print(error)
with slk.use_backend("torch"):
    slk.LoRALinear(4, 3)
slk.set_kernel("split")
print(slk.get_kernel())
"""
    wrong = {f"STABLELORA_{name}": "best" for name in ("BACKEND", "KERNEL", "AUTOTUNE")}
    found = printed(code, **wrong).splitlines()
    assert found[-1] == "split"
    expected = [name for name in wrong for _ in range(2)]
    assert [line.split()[3] for line in found[:-1]] == expected
    assert all(line.endswith("got 'best'") for line in found[:-1])


def test_compiled_code_reads_the_settings_without_compiling_again():
    code = """
import torch
import stablelora_kernels as slk
call = torch.compile(lambda x: x + (slk.get_backend() == "torch"), backend="aot_eager", fullgraph=True)
def compiled(): return torch._dynamo.utils.counters["stats"]["unique_graphs"]
zero = torch.zeros(())
print(call(zero).item(), call(zero).item(), slk.get_backend(), call(zero).item(), compiled())
with slk.use_backend("auto"):
    print(call(zero).item())
print(call(zero).item(), compiled())
"""
    assert printed(code, STABLELORA_BACKEND="torch").split() == ["1.0", "1.0", "torch", "1.0", "1", "0.0", "1.0", "2"]


def test_import_needs_no_triton_and_probes_no_device():
    code = """
import sys, time
import torch
for name in ("triton", "safetensors", "peft", "transformers"):
    sys.modules[name] = None  # as if it were not installed
start = time.perf_counter()
import stablelora_kernels as slk
seconds = time.perf_counter() - start
assert not torch.cuda.is_initialized()
layer = slk.LoRALinear(4, 3)
layer(torch.ones(2, 4)).sum().backward()
assert layer.lora_B.grad.abs().sum() > 0
print(seconds)
"""
    # A generous bound: the design's half second on a loaded machine.
    assert float(printed(code)) < 0.5
