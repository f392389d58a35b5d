"""The process-wide settings, by ``slk.settings`` and environment variables."""

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

SETTINGS = {
    "backend": ("torch", "triton", "'auto', 'triton', 'torch'"),
    "strategy": ("branch_first", "few_rows", "'auto', 'few_rows', 'one_launch', 'branch_first'"),
    "first_use": ("off", "tiles", "'auto', 'on', 'tiles', 'off'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_holds_for_good_or_for_a_block(name):
    value, other, known = SETTINGS[name]
    before = getattr(slk.settings, name)
    message = rf"{name} must be one of {known}, got 'cuda'"
    with pytest.raises(ValueError, match=message):
        setattr(slk.settings, name, "cuda")
    with pytest.raises(ValueError, match=message):
        # Refused where it is written, before the block.
        slk.settings(**{name: "cuda"})
    assert getattr(slk.settings, name) == before
    try:
        setattr(slk.settings, name, value)
        with pytest.raises(KeyError), slk.settings(**{name: other}):
            assert getattr(slk.settings, name) == other
            assert f"{name}={other!r}" in repr(slk.settings)
            raise KeyError
        assert getattr(slk.settings, name) == value
    finally:
        setattr(slk.settings, name, before)


def test_a_value_set_in_a_block_ends_with_it():
    before = slk.settings.strategy
    with slk.settings(strategy="one_launch"):
        slk.settings.strategy = "branch_first"
        with slk.settings(first_use="off"):
            # A block is about what it names.
            assert slk.settings.strategy == "branch_first"
    assert slk.settings.strategy == before


def test_a_block_may_set_several():
    before = repr(slk.settings)
    with slk.settings(backend="triton", strategy="one_launch", first_use="tiles"):
        inside = repr(slk.settings)
    assert inside == "settings(backend='triton', strategy='one_launch', first_use='tiles')"
    with (
        pytest.raises(ValueError, match="strategy must be"),
        slk.settings(backend="triton", strategy="fused"),
    ):
        pass
    assert repr(slk.settings) == before


def test_a_misspelled_setting_is_refused():
    with pytest.raises(AttributeError, match="stategy"):
        slk.settings.stategy = "one_launch"
    with pytest.raises(AttributeError, match="kernel"):
        _ = slk.settings.kernel
    with pytest.raises(TypeError, match="stategy"):
        slk.settings(stategy="one_launch")


PRINT = (
    "import stablelora_kernels as slk; s = slk.settings; print(s.backend, s.strategy, s.first_use)"
)


def test_environment_variables_set_the_start_values():
    known = {
        "STABLELORA_BACKEND": "torch",
        "STABLELORA_STRATEGY": "branch_first",
        "STABLELORA_FIRST_USE": "tiles",
    }
    # An empty one is not set.
    empty = dict.fromkeys(known, "")
    cases = (
        ({"STABLELORA_FIRST_USE": "0"}, "auto auto off"),
        (known, "torch branch_first tiles"),
        (empty, "auto auto auto"),
    )
    for given, expected in cases:
        assert printed(PRINT, **given) == expected


def test_a_wrong_environment_raises_at_first_use_and_not_before():
    code = """
import stablelora_kernels as slk
for name in ("backend", "strategy", "first_use"):
    for _ in range(2):
        try:
            getattr(slk.settings, name)
        except ValueError as error:
            print(error)
with slk.settings(backend="torch"):
    slk.LoRALinear(4, 3)
slk.settings.strategy = "one_launch"
print(slk.settings.strategy)
"""
    known = {
        "BACKEND": "'auto', 'triton', 'torch'",
        "STRATEGY": "'auto', 'few_rows', 'one_launch', 'branch_first'",
        "FIRST_USE": "'auto', 'on', 'tiles', 'off', '0', '1'",
    }
    expected = [
        f"the environment variable STABLELORA_{name} must be one of {values}, got 'best'"
        for name, values in known.items()
        for _ in range(2)
    ]
    found = printed(code, **{f"STABLELORA_{name}": "best" for name in known})
    assert found.splitlines() == [*expected, "one_launch"]


def test_compiled_code_reads_the_settings_without_compiling_again():
    code = """
import torch
import stablelora_kernels as slk
def inside(x):
    with slk.settings(backend="auto"):
        return x + 2 * (slk.settings.backend == "auto") + (slk.settings.backend == "torch")
compile = torch.compile(backend="aot_eager", fullgraph=True)
call, block = compile(lambda x: x + (slk.settings.backend == "torch")), compile(inside)
def compiled(): return torch._dynamo.utils.counters["stats"]["unique_graphs"]
zero = torch.zeros(())
print(call(zero).item(), call(zero).item(), slk.settings.backend, call(zero).item(), compiled())
with slk.settings(backend="auto"):
    print(call(zero).item())
print(call(zero).item(), compiled(), block(zero).item(), slk.settings.backend)
"""
    expected = "1.0 1.0 torch 1.0 1 0.0 1.0 2 2.0 torch"
    assert printed(code, STABLELORA_BACKEND="torch").split() == expected.split()


def test_overlapping_blocks_of_two_threads_leave_nothing_behind():
    """Each block begins before the other ends. Each holds for the whole process, until its own end."""
    before = slk.settings.backend
    first, second = slk.settings(backend="torch"), slk.settings(backend="triton")
    with ThreadPoolExecutor(1) as other:
        with first:
            other.submit(second.__enter__).result()
            assert slk.settings.backend == "triton"
        assert (
            other.submit(lambda: slk.settings.backend).result() == slk.settings.backend == "triton"
        )
        other.submit(second.__exit__, None, None, None).result()
    assert slk.settings.backend == before


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
