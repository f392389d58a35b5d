"""The process-wide settings, by functions and environment variables."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import permutations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.dispatch.settings import tf32_allowed
from tests.helpers.precision import SWITCHES, switched
from tests.helpers.processes import printed


@pytest.mark.parametrize(
    ("name", "value", "other", "wrong", "error", "message"),
    [
        ("backend", "torch", "triton", "cuda", ValueError, "must be one of 'auto', 'triton', 'torch', got 'cuda'"),
        ("kernel", "split", "fused", "cuda", ValueError, "must be one of 'auto', 'fused', 'chained', .* got 'cuda'"),
        ("autotune", True, False, "0", TypeError, "must be a bool, got '0'"),
    ],
)  # fmt: skip
def test_a_setting_holds_for_good_or_for_a_block(name, value, other, wrong, error, message):
    get, set_, use = (getattr(slk, f"{verb}_{name}") for verb in ("get", "set", "use"))
    before = get()
    for call in (set_, lambda given: use(given).__enter__()):
        with pytest.raises(error, match=f"{name} {message}"):
            call(wrong)
    assert get() == before
    try:
        set_(value)
        with pytest.raises(KeyError), use(other):
            assert get() == other
            raise KeyError
        assert get() == value
    finally:
        set_(before)


def test_environment_variables_set_the_start_values():
    code = "import stablelora_kernels as slk; print(slk.get_backend(), slk.get_kernel(), slk.get_autotune())"
    known = {
        "STABLELORA_BACKEND": "torch",
        "STABLELORA_KERNEL": "split",
        "STABLELORA_AUTOTUNE": "1",
    }
    # An empty one is not set.
    empty = dict.fromkeys(known, "")
    cases = (
        ({"STABLELORA_AUTOTUNE": "0"}, "auto auto False"),
        (known, "torch split True"),
        (empty, "auto auto False"),
    )
    for given, expected in cases:
        assert printed(code, **given) == expected


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
    known = {
        "BACKEND": "'auto', 'triton', 'torch'",
        "KERNEL": "'auto', 'fused', 'chained', 'split', 'vendor'",
        "AUTOTUNE": "'0', '1'",
    }
    expected = [
        f"the environment variable STABLELORA_{name} must be one of {values}, got 'best'"
        for name, values in known.items()
        for _ in range(2)
    ]
    found = printed(code, **{f"STABLELORA_{name}": "best" for name in known})
    assert found.splitlines() == [*expected, "split"]


def test_compiled_code_reads_the_settings_without_compiling_again():
    code = """
import torch
import stablelora_kernels as slk
def inside(x):
    with slk.use_backend("auto"):
        return x + 2 * (slk.get_backend() == "auto") + (slk.get_backend() == "torch")
compile = torch.compile(backend="aot_eager", fullgraph=True)
call, block = compile(lambda x: x + (slk.get_backend() == "torch")), compile(inside)
def compiled(): return torch._dynamo.utils.counters["stats"]["unique_graphs"]
zero = torch.zeros(())
print(call(zero).item(), call(zero).item(), slk.get_backend(), call(zero).item(), compiled())
with slk.use_backend("auto"):
    print(call(zero).item())
print(call(zero).item(), compiled(), block(zero).item(), slk.get_backend())
"""
    expected = "1.0 1.0 torch 1.0 1 0.0 1.0 2 2.0 torch"
    assert printed(code, STABLELORA_BACKEND="torch").split() == expected.split()


def test_overlapping_blocks_of_two_threads_leave_nothing_behind():
    """Each block begins before the other ends. Each holds for the whole process, until its own end."""
    before, first, second = slk.get_backend(), slk.use_backend("torch"), slk.use_backend("triton")
    with ThreadPoolExecutor(1) as other:
        with first:
            other.submit(second.__enter__).result()
            assert slk.get_backend() == "triton"
        assert other.submit(slk.get_backend).result() == slk.get_backend() == "triton"
        other.submit(second.__exit__, None, None, None).result()
    assert slk.get_backend() == before


MIXTURES = [(), *((name,) for name in SWITCHES), *permutations(SWITCHES, 2)]


def test_float32_calls_follow_any_mixture_of_pytorchs_switches():
    """PyTorch's own getter of the old switch raises under many of them."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(16, 16), torch.randn(70, 16)
    layer = slk.LoRALinear.from_linear(linear, r=2)
    seen = set()
    for names in MIXTURES:
        with switched(*names):
            allowed = tf32_allowed()
            layer(x).sum().backward()
            torch.testing.assert_close(layer(x), linear(x), rtol=2e-2, atol=2e-2)
            assert allowed == (input_precision(DEVICES["sm_90"], torch.float32) == "tf32")
            assert allowed == (torch.backends.cuda.matmul.fp32_precision == "tf32"), names
            with suppress(RuntimeError):
                assert names[1:] or allowed == (
                    torch.get_float32_matmul_precision() != "highest"
                ), names
        seen.add(allowed)
    assert seen == {False, True} and not tf32_allowed()


def test_import_needs_no_extra_and_probes_no_device():
    code = """
import sys
import torch
for name in ("triton", "safetensors", "peft", "transformers"):
    sys.modules[name] = None  # as if it were not installed
before = {*sys.modules}
import stablelora_kernels as slk
# What else is imported would take time at every start: torch._dynamo alone a second. Which modules
# of the standard library torch imports differs by release; ours are small.
new = {name.partition(".")[0] for name in {*sys.modules} - before}
assert new - {*sys.stdlib_module_names} == {"stablelora_kernels"}
assert not torch.cuda.is_initialized()
layer = slk.LoRALinear(4, 3)
layer(torch.ones(2, 4)).sum().backward()
print(layer.lora_B.grad.abs().sum() > 0)
"""
    assert printed(code) == "tensor(True)"
