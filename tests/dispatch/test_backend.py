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


# What is installed: Triton for any device, and NumPy for its interpreter.
INSTALLED = [
    ({"triton": "3.2.0"}, "Triton 3.2.0 is installed, but the kernels need 3.6 or newer"),
    *(({"triton": version}, None) for version in ("3.6.0+git1234", "3.10.1", "4.0")),
    ({"triton": "3.6.0", "numpy": "2.3.5"}, None),
    ({"triton": "3.6.0", "numpy": "2.4.0"}, "the interpreter of Triton 3.6.0 does not run with NumPy 2.4.0: pip"),
    ({"triton": "3.7.1", "numpy": "2.4.6"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("versions", "problem"), INSTALLED)
def test_versions_that_do_not_run(monkeypatch, versions, problem):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend.metadata, "version", versions.__getitem__)
    found = (backend.interpreter_problem if "numpy" in versions else backend._triton_problem)()
    assert found is None if problem is None else found.startswith(problem)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_PROBLEM", None)
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with slk.use_backend("triton"), pytest.raises(RuntimeError, match=r"on a tensor on cpu.*TRITON_INTERPRET=1"):
        backend.resolve_backend(CPU)
    monkeypatch.setattr(backend, "INTERPRETING", True)
    with slk.use_backend("triton"):
        assert backend.resolve_backend(CPU) == "triton"


def test_import_needs_no_extra_and_probes_no_device():
    code = """
import sys
import torch
for name in ("triton", "safetensors", "peft", "transformers"):
    sys.modules[name] = None  # as if it were not installed
import stablelora_kernels as slk
assert not torch.cuda.is_initialized()
layer = slk.LoRALinear(4, 3)
layer(torch.ones(2, 4)).sum().backward()
print(layer.lora_B.grad.abs().sum() > 0)
"""
    assert printed(code) == "tensor(True)"
