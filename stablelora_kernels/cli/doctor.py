"""Says which backend runs on this machine and why, lists versions, and tests every kernel family on
small inputs. The error against a float64 computation must be at most twice the error of plain
PyTorch, or what rounding allows (the bound).

On a GPU it tests the Triton kernels, on a CPU the PyTorch path. With --interpret it also tests the
Triton kernels on the CPU, in Triton's interpreter. It lists the kernels that first use has found
wrong on this machine, whichever process found them; with --report it tests nothing, and prints what
an issue about them needs.

Exit status: 0 all tests passed; 1 a test failed, first use has found a kernel wrong, or the chosen
backend can't run here; 2 a bad argument."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stablelora_kernels._version import __version__
from stablelora_kernels.cli.common import CommandError, Report, device_of
from stablelora_kernels.cli.self_test import (
    Result,
    result_of,
    run_checks,
    run_checks_in_processes,
)
from stablelora_kernels.dispatch import backend, first_use
from stablelora_kernels.dispatch.problem import DEVICES, arch_of
from stablelora_kernels.dispatch.settings import check_environment, settings
from stablelora_kernels.utils.threads import ONE_THREAD
from stablelora_kernels.utils.timing import version_of
from stablelora_kernels.utils.validation import counted

HELP = "which backend runs here and why, versions, and a self-test of every kernel family"
# Optional packages and the features that need them.
OPTIONAL = {
    "safetensors": "save_adapter, load_adapter",
    "numpy": "save_adapter, doctor --interpret",
    "peft": "accelerate_peft",
    "transformers": "its Trainer takes StableLoRAAdamW",
    "bitsandbytes": "frozen weights in 4 and 8 bits",
    "torchao": "frozen weights in float8, int8 and int4",
}
VARIABLES = (
    "STABLELORA_BACKEND",
    "STABLELORA_STRATEGY",
    "STABLELORA_FIRST_USE",
    "STABLELORA_CACHE",
    "TRITON_INTERPRET",
)
# Each has a context of its own on the GPU, of some hundred MiB.
PROCESSES = min(4, os.cpu_count() or 1)
# Compiled for an H100 without a GPU: 93 kernels took 134 s of one core.
COMPILES = (
    "The first self-test on a GPU compiles about 90 kernels: two to three minutes of one core, "
    f"which {PROCESSES} process{'es' if PROCESSES > 1 else ''} share here. Triton keeps the kernels, "
    "so that later self-tests take seconds."
)
IN_INTERPRETER = "the Triton kernels in Triton's interpreter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="also run the Triton kernels in Triton's interpreter",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="test nothing; print the machine and what first use has found wrong, to paste into an issue",
    )
    parser.add_argument(
        "--device", help="a torch device (default: the GPU if there is one, else the CPU)"
    )


def run(args: argparse.Namespace, report: Report) -> int:
    """Print what is installed, which backend runs and why, and what the checks measured."""
    device = device_of(args)
    if args.interpret and (problem := backend.TRITON_PROBLEM or backend.interpreter_problem()):
        raise CommandError(f"--interpret runs the kernels in Triton's interpreter, but {problem}")
    name = _report_findings(device, report)
    wrong = _report_first_use(device, report)
    if args.report:
        report.data["ok"] = name is not None and not wrong
        return 0 if report.data["ok"] else 1
    interpreting = name == "triton" and backend.INTERPRETING
    compiling = name == "triton" and not interpreting
    # The results of each self-test, which come as its checks run.
    self_tests: dict[str, Iterator[Result]] = {}
    if name is not None:
        subject = "PyTorch's operators" if name == "torch" else "the Triton kernels"
        running = run_checks_in_processes(device, PROCESSES) if compiling else run_checks(device)
        self_tests[IN_INTERPRETER if interpreting else f"{subject} on {device}"] = running
    if args.interpret and not interpreting:
        self_tests[IN_INTERPRETER] = _interpreted()
    report.data["self_tests"] = []
    if compiling:
        report.text("", COMPILES)
    for title, running in self_tests.items():
        results: list[Result] = []
        for result in running:
            results.append(result)
            report.progress(f"  {counted(len(results), 'check')} done")
        report.progress("")
        report.data["self_tests"].append({"on": title, "checks": results})
        _report_results(title, results, report)
    passed = [result["passed"] for test in report.data["self_tests"] for result in test["checks"]]
    report.data["ok"] = ok = name is not None and bool(passed) and all(passed) and not wrong
    if name is None:
        verdict = (
            f"The backend {settings.backend!r} can't run here, so calls of this library will raise."
        )
    elif all(passed):
        verdict = f"All {len(passed)} checks passed."
        if wrong:
            verdict += (
                f" First use has found {counted(len(wrong), 'kernel')} wrong here, see above."
            )
    else:
        verdict = f"{passed.count(False)} of {counted(len(passed), 'check')} FAILED."
    report.text("", verdict)
    return 0 if ok else 1


def _report_findings(device: torch.device, report: Report) -> str | None:
    """Report on the machine. Return the backend's name, or None if the chosen one can't run."""
    name: str | None = None
    try:
        answer = backend.explain_backend(device)
        name, reason = answer.backend, answer.reason
    except RuntimeError as error:
        reason = str(error)
    environment = {
        variable: os.environ[variable] for variable in VARIABLES if variable in os.environ
    }
    versions, optional = _versions(), {package: version_of(package) for package in OPTIONAL}
    chosen = {"device": str(device), "set": settings.backend, "name": name, "reason": reason}
    report.data = {"version": __version__, "backend": chosen, "environment": environment}
    report.data |= {"versions": versions, "optional": optional}
    report.text(f"Backend on {device}: {name or 'none'}, since {reason}")
    report.text(
        *(f"  {variable}={value}" for variable, value in environment.items()), "", "Versions"
    )
    report.pairs(versions)
    report.text("", "Optional packages")
    column = max(len(version or "missing") for version in optional.values())
    report.pairs(
        {
            package: f"{optional[package] or 'missing':{column}}  {use}"
            for package, use in OPTIONAL.items()
        }
    )
    return name


def _report_first_use(device: torch.device, report: Report) -> list[first_use.Retired]:
    """Report what first use has found wrong on this machine, and return it."""
    wrong: list[first_use.Retired] = []
    if backend.TRITON_PROBLEM is None:
        wrong = first_use.retired_on_disk(device)
    report.data["first_use"] = [retired._asdict() for retired in wrong]
    if not wrong:
        return wrong
    report.text(
        "",
        "First use has found these wrong on this machine, and no call takes them. Please report them:",
        *(f"  {retired.op} by {retired.strategy!r}: {retired.fault}" for retired in wrong),
        f"  {first_use.made_for(device)}",
        f"  (files in {first_use.cache_dir()}; without them they are looked at again)",
        hang=4,
    )
    return wrong


def _versions() -> dict[str, str]:
    """What is installed, and which GPUs there are, by their names in the report."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = {
        "stablelora-kernels": __version__,
        "installed in": str(Path(__file__).parents[2]),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": backend.TRITON_PROBLEM or version_of("triton") or "built from source",
        "CUDA": torch.version.cuda or "not in this torch",
        "ROCm": torch.version.hip or "not in this torch",
    }
    for index in range(gpus):
        facts["GPU" if gpus == 1 else f"GPU {index}"] = _gpu(index)
    built_for = torch.version.cuda or torch.version.hip
    return (
        facts
        if gpus
        else facts | {"GPU": f"no GPU that this torch {'sees' if built_for else 'could use'}"}
    )


def _gpu(index: int) -> str:
    """A GPU in words, with its row of the backend's table, or what is missing there."""
    properties = torch.cuda.get_device_properties(index)
    name = f"{properties.name}, {arch_of(properties)}"
    if torch.version.hip:
        return (
            name
            if arch_of(properties) in DEVICES
            else f"{name}, for which the dispatch tables were not made"
        )
    row, verdict = backend.row_of((properties.major, properties.minor)), backend.verdict_of(index)
    notes = [verdict.problem, verdict.taken_as, row.requirement]
    return "; ".join([name, *filter(None, notes)])


def _report_results(title: str, results: list[Result], report: Report) -> None:
    report.text(
        "", f"Self-test of {title}, against float64, {sum(r['seconds'] for r in results):.1f} s"
    )
    rows = []
    for r in results:
        figures = (
            ("-", "-", "-")
            if r["error"] is None
            else (f"{r['error']:.2g}", f"{r['bound']:.2g}", r["of"])
        )
        rows.append((r["family"], r["case"], "ok" if r["passed"] else "FAILED", *figures))
    report.table(("kernel family", "case", "", "error", "bound", "of"), rows, left=(0, 1, 2, 5))
    report.text(
        *(
            f"  FAILED {r['family']}, {r['case']}: {r['problem']}"
            for r in results
            if not r["passed"]
        ),
        hang=4,
    )
    if launched := sorted({kernel for r in results for kernel in r["kernels"]}):
        were = "was" if len(launched) == 1 else "were"
        report.text(
            f"  {counted(len(launched), 'kernel')} {were} launched: {', '.join(launched)}", hang=4
        )


# The self-test.


def _interpreted() -> Iterator[Result]:
    """The results of a process with Triton's interpreter on, since Triton reads TRITON_INTERPRET
    when it is imported.
    """
    command = [sys.executable, "-c", f"from {__name__} import print_checks; print_checks()"]
    # The interpreter's arrays are so small that more threads make it slower. The user's own setting
    # has precedence.
    environment = ONE_THREAD | os.environ | {"TRITON_INTERPRET": "1"}
    options: dict[str, Any] = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stderr=errors, **options) as process,
    ):
        try:
            yield from map(json.loads, process.stdout or ())
            if process.wait():
                errors.seek(0)
                last = (
                    errors.read().strip().splitlines() or [f"exit status {process.returncode}"]
                )[-1]
                yield result_of("the interpreter's process", "", f"it ended early: {last}")
        finally:
            process.kill()


def print_checks() -> None:
    """Run the Triton kernels on the CPU and print one line of JSON per check."""
    check_environment()
    with settings(backend="triton"):
        for result in run_checks(torch.device("cpu")):
            print(json.dumps(result), flush=True)
