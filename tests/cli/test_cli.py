"""The command line itself, and ``doctor``: what it tells, and that a wrong kernel, backend or
argument is told of.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.cli import COMMANDS, doctor, main, self_test
from stablelora_kernels.dispatch import backend, first_use
from stablelora_kernels.dispatch.settings import check_environment
from stablelora_kernels.testing.ops import (
    dora,
    lora_experts,
    lora_experts_mlp,
    lora_linear,
    lora_mlp,
)
from stablelora_kernels.utils.threads import ONE_THREAD

pytestmark = pytest.mark.usefixtures("one_thread")


def fails(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 2) -> str:
    """The one line that a command which can't be carried out says on stderr; stdout stays empty."""
    assert main(argv) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (out, err)
    return err


@pytest.mark.parametrize(
    ("argv", "status", "told"),
    [
        (["--version"], 0, f"stablelora-kernels {slk.__version__}\n"),
        (["--help"], 0, "doctor"),
        *(([command, "--help"], 0, "Exit status") for command in COMMANDS),
        ([], 2, "required: COMMAND"),
        (["cure"], 2, "invalid choice: 'cure'"),
    ],
    ids=str,
)
def test_version_help_and_usage(argv, status, told, capsys):
    assert main(argv) == status
    assert told in capsys.readouterr()[status > 0]


def test_a_process_with_a_wrong_variable_and_a_reader_that_leaves():
    """Each is told in a line, or not at all."""
    code = (
        "import os, sys\n"
        "from stablelora_kernels import cli\n"
        "assert cli.main(['doctor']) == 2\n"
        "del os.environ['STABLELORA_BACKEND']\n"
        "cli.COMMANDS['doctor'].run = lambda args, report: print('x' * 10_000_000) or 0\n"
        "sys.exit(cli.main(['doctor']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"STABLELORA_BACKEND": "gpu"},
    )  # fmt: skip
    with process:
        assert process.stdout.read(10) == "xxxxxxxxxx"
        process.stdout.close()
        wanted = "the environment variable STABLELORA_BACKEND must be one of 'auto', 'triton', 'torch', got 'gpu'"
        assert process.stderr.read() == f"stablelora-kernels: error: {wanted}\n"
    assert process.returncode == 0


def doctor_json(capsys, *argv: str, status: int = 0):
    assert main(["doctor", "--device", "cpu", "--json", *argv]) == status
    return json.loads(capsys.readouterr().out)


FAMILIES = {
    "lora_linear", "dropout's mask", "lora_linear_group", "lora_linear_quantized", "lora_branch", "lora_mlp", "lora_experts",
    "lora_experts_mlp", "lora_linear_cross_entropy", "DoRA", "stable_adamw", "stable_shrink",
}  # fmt: skip
# Those that PyTorch's operators compute on every backend.
WITHOUT_KERNELS = {"lora_experts", "lora_experts_mlp"}
ON = {"torch": "PyTorch's operators on cpu", "triton": "the Triton kernels in Triton's interpreter"}


def every_kernel() -> set[str]:
    """The kernels of the package by the names that explain() has for them."""
    sources = (Path(slk.__file__).parent / "kernels").rglob("*.py")
    return {
        name
        for source in sources
        for name in re.findall(r"^def _(\w+)_kernel\(", source.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("name", ON)
def test_doctor_tests_every_kernel_family(name, capsys):
    with slk.settings(backend="auto" if name == "torch" else name):
        report = doctor_json(capsys)
    assert report["ok"] is True and report["backend"]["name"] == name
    assert name == "triton" or "'auto' takes PyTorch's operators" in report["backend"]["reason"]
    (tested,) = report["self_tests"]
    assert tested["on"] == ON[name]
    assert {check["family"] for check in tested["checks"]} == FAMILIES
    for check in tested["checks"]:
        assert check["passed"] and check["error"] <= check["bound"]
        assert bool(check["kernels"]) == (
            name == "triton" and check["family"] not in WITHOUT_KERNELS
        )
        # An exact result would mean that nothing was compared.
        assert check["family"] == "dropout's mask" or check["error"] > 0
    launched = {kernel for check in tested["checks"] for kernel in check["kernels"]}
    assert launched == (every_kernel() if name == "triton" else set())


@pytest.mark.nightly
def test_doctor_interprets_in_a_process_of_its_own(capsys):
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    with slk.settings(backend="torch"):
        assert main(["doctor", "--device", "cpu", "--interpret"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(f"Self-test of {place}" in out for place in ON.values())
    assert f"All {2 * len(self_test.checks())} checks passed." in out


@pytest.mark.parametrize("interpreting", [False, True])
def test_on_a_gpu_doctor_says_how_long_compiling_takes_and_compiles_in_processes(
    interpreting, capsys, monkeypatch
):
    def run_checks(device, *processes):
        print(f"The first check begins: {processes}.")
        yield self_test.result_of("a kernel", "a case", None)

    monkeypatch.setattr(doctor, "_report_findings", lambda device, report: "triton")
    monkeypatch.setattr(doctor, "run_checks", run_checks)
    monkeypatch.setattr(doctor, "run_checks_in_processes", run_checks)
    monkeypatch.setattr(doctor.backend, "INTERPRETING", interpreting)
    assert main(["doctor", "--device", "cpu"]) == 0
    before, _, after = capsys.readouterr().out.partition("The first check begins: ")
    assert ("two to three minutes of one core" in " ".join(before.split())) == (not interpreting)
    assert after.startswith("()." if interpreting else f"({doctor.PROCESSES},).")


@pytest.mark.nightly
def test_processes_give_the_results_of_one():
    with slk.settings(backend="torch"):
        alone = [*self_test.run_checks(torch.device("cpu"))]
        shared = [*self_test.run_checks_in_processes(torch.device("cpu"), 2)]
    for one, other in zip(alone, shared, strict=True):
        assert other | {"seconds": 0} == one | {"seconds": 0} and other["passed"]


def test_a_process_that_a_kernel_ends_fails_the_checks_that_are_left(monkeypatch):
    class Pool:
        def __init__(self, *_): ...

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def map(self, function, numbers, *_):
            yield self_test.result_of("first", "case", None)
            raise BrokenProcessPool("it was terminated abruptly")

    monkeypatch.setattr(self_test, "ProcessPoolExecutor", Pool)
    results = [*self_test.run_checks_in_processes(torch.device("cpu"), 2)]
    assert len(results) == len(self_test.checks())
    assert [result["passed"] for result in results] == [True] + [False] * (len(results) - 1)
    assert "ended early: it was terminated abruptly" in results[1]["problem"]


def test_an_interpreter_that_cannot_start_fails_the_self_test(capsys, monkeypatch):
    # This process has read its environment, a new one has not.
    check_environment()
    monkeypatch.setenv("STABLELORA_STRATEGY", "best")
    monkeypatch.setattr(doctor, "run_checks", lambda device: iter(()))
    report = doctor_json(capsys, "--interpret", status=1)
    (check,) = report["self_tests"][1]["checks"]
    assert "STABLELORA_STRATEGY must be one of" in check["problem"] and not check["passed"]
    assert not doctor_json(capsys, status=1)["ok"]


def test_an_interpreter_that_a_signal_ends_fails_the_self_test(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    (check,) = doctor._interpreted()
    assert "it ended early: exit status -9" in check["problem"] and not check["passed"]


def test_the_interpreter_has_one_thread_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport json, os\nprint(json.dumps(dict(os.environ)))")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    for name in ONE_THREAD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (environment,) = doctor._interpreted()
    assert environment["TRITON_INTERPRET"] == "1"
    assert {name: environment[name] for name in ONE_THREAD} == ONE_THREAD | {"OMP_NUM_THREADS": "3"}


def raising(*args):
    raise RuntimeError("out of\nmemory")


def never_latching(right, *args, **options):
    optimizer = right(*args, **options)
    found = [slk.PairStability(pair.name, 1.0, 0.0, False, None) for pair in optimizer.pairs]
    optimizer.stability = lambda: found
    return optimizer


def launching_nothing(right, base, x, a, b, scaling, *dropout):
    return base + scaling * (x.to(a.dtype) @ a.T @ b.T).to(base.dtype)


def with_other_offsets(right, *args, **options):
    return right(*args[:-1], args[-1] - 1, **options)


LINEAR = {"lora_linear", "lora_linear_quantized", "DoRA"}
# A name in a module that the self-test calls, what is done in its place, the only families that
# fail then, and why.
FAULTS = {
    "a wrong result": (lora_linear, "lora_branch", lambda right, *args: right(*args) * 1.5, {"lora_branch"}, "off by"),
    "a wrong MLP": (lora_mlp, "lora_mlp", lambda right, *args: right(*args) * 1.05, {"lora_mlp"}, "off by"),
    "NaN": (lora_linear, "lora_linear", lambda right, *args: right(*args) + float("nan"), LINEAR, "off by inf"),
    "an exception": (lora_linear, "lora_linear_group", raising, {"lora_linear_group"}, "RuntimeError: out of memory"),
    "another mask": (
        self_test, "lora_linear", lambda right, *args: right(*args) + 1e-3 * (args[-1] == self_test.DROPOUT), {"dropout's mask"},
        "off by",
    ),
    "another expert": (lora_experts, "lora_experts", with_other_offsets, {"lora_experts"}, "off by"),
    "a slot's weight is another's": (
        lora_experts_mlp, "Routing", lambda right, *args: right(*args[:2], args[2].flip(1)), {"lora_experts_mlp"}, "off by",
    ),
    "norms of W alone": (dora, "row_norms", lambda right, sums, *args: sums.sqrt(), {"DoRA"}, "off by"),
    "no latch": (self_test, "StableLoRAAdamW", never_latching, {"stable_adamw"}, "the pairs must latch at steps"),
    "no kernel": (lora_linear, "lora_branch", launching_nothing, {"lora_branch"}, "no Triton kernel was launched"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail_the_self_test(capsys, monkeypatch, fault):
    module, name, wrong, families, problem = FAULTS[fault]
    first_of = {check.family: check for check in reversed(self_test.checks())}
    monkeypatch.setattr(self_test, "checks", lambda: [*first_of.values()])
    monkeypatch.setattr(module, name, partial(wrong, getattr(module, name)))
    with slk.settings(backend="triton" if fault == "no kernel" else "torch"):
        report = doctor_json(capsys, status=1)
    failed = [check for check in report["self_tests"][0]["checks"] if not check["passed"]]
    assert {check["family"] for check in failed} == families and not report["ok"]
    assert any(problem in check["problem"] for check in failed)


def test_failures_missing_packages_and_set_variables_are_printed(capsys, monkeypatch):
    monkeypatch.setattr(lora_linear, "lora_branch", raising)
    monkeypatch.setattr(doctor, "version_of", lambda package: None if package == "peft" else "1.0")
    # Read before, so that no other test runs with it.
    check_environment()
    monkeypatch.setenv("STABLELORA_STRATEGY", "branch_first")
    with slk.settings(backend="torch"):
        assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert (
        "FAILED lora_branch, bf16: " in out
        and f"1 of {len(self_test.checks())} checks FAILED." in out
    )
    assert (
        "  STABLELORA_STRATEGY=branch_first\n" in out
        and "  peft          missing  accelerate_peft\n" in out
    )


def test_what_first_use_has_found_wrong_is_listed(capsys, monkeypatch, tmp_path):
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path))
    with slk.settings(backend="torch"):
        assert main(["doctor", "--device", "cpu", "--report"]) == 0
        assert "First use" not in capsys.readouterr().out
        first_use.forget()
        with pytest.warns(RuntimeWarning, match="doctor --report"):
            first_use.retire("lora_mlp_fwd", "one_launch", torch.device("cpu"), "Y is off by 1")
        first_use.forget()
        (tmp_path / "first_use" / "damaged.json").write_text("{")
        assert main(["doctor", "--device", "cpu", "--report"]) == 1
        out = capsys.readouterr().out
        assert "lora_mlp_fwd by 'one_launch': Y is off by 1" in out
        # What an issue needs: versions too, and no test was run.
        assert f"torch {torch.__version__}, triton" in out and "Self-test" not in out
        first_of = self_test.checks()[:1]
        monkeypatch.setattr(self_test, "checks", lambda: first_of)
        report = doctor_json(capsys, status=1)
    assert not report["ok"] and report["self_tests"][0]["checks"][0]["passed"]
    (wrong,) = report["first_use"]
    assert wrong == {"op": "lora_mlp_fwd", "strategy": "one_launch", "fault": "Y is off by 1"}


def test_a_backend_that_cannot_run_is_told_of(capsys, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with slk.settings(backend="triton"):
        report = doctor_json(capsys, status=1)
        assert main(["doctor", "--device", "cpu"]) == 1
    assert report["backend"]["name"] is None and "TRITON_INTERPRET=1" in report["backend"]["reason"]
    assert report["self_tests"] == [] and report["ok"] is False
    assert "The backend 'triton' can't run here" in capsys.readouterr().out


# Arguments, what the machine is taken to be, and the line.
REFUSED = [
    ("doctor --device gpu", {}, "--device must be a torch device, got 'gpu'"),
    ("doctor --device cuda:99", {}, "got 'cuda:99' where PyTorch sees"),
    ("doctor --interpret", {"TRITON_PROBLEM": "Triton is not installed"}, "interpreter, but Triton is not installed"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "machine", "message"), REFUSED, ids=str)
def test_what_is_refused_at_once(argv, machine, message, capsys, monkeypatch):
    for name, value in machine.items():
        monkeypatch.setattr(backend, name, value)
    assert message in fails(capsys, *argv.split())
