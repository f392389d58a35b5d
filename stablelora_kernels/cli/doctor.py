"""``doctor``: report the backend and why it runs, list versions, and test every kernel family."""

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
from stablelora_kernels.cli.arguments import device_of
from stablelora_kernels.cli.output import CommandError, print_json, print_pairs, print_table, wrapped
from stablelora_kernels.cli.selftest import Result, run_checks
from stablelora_kernels.dispatch import backend, settings
from stablelora_kernels.dispatch.problem import DEVICES, arch_of
from stablelora_kernels.utils.timing import version_of
from stablelora_kernels.utils.validation import counted

HELP = "which backend runs here and why, versions, and a self-test of every kernel family"
DESCRIPTION = """\
Says which backend runs on this machine and why, lists versions, and tests every kernel family on small inputs. The error
against a float64 computation must be at most twice the error of plain PyTorch (the bound).

On a GPU it tests the Triton kernels, on a CPU the PyTorch path. With --interpret it also tests the Triton kernels on the CPU,
in Triton's interpreter.

Exit status: 0 all tests passed; 1 a test failed, or the chosen backend can't run here; 2 a bad argument."""

# Optional packages and the features that need them.
OPTIONAL = {
    "safetensors": "save_adapter, load_adapter, inspect, merge",
    "numpy": "save_adapter, plot_stability, doctor --interpret",
    "matplotlib": "plot_stability",
    "peft": "accelerate_peft",
    "transformers": "merge; its Trainer takes StableLoRAAdamW",
    "huggingface_hub": "adapters and models by a hub id",
    "bitsandbytes": "frozen weights in 4 and 8 bits",
    "torchao": "frozen weights in float8, int8 and int4",
}
VARIABLES = ("STABLELORA_BACKEND", "STABLELORA_KERNEL", "STABLELORA_AUTOTUNE", "STABLELORA_CACHE", "TRITON_INTERPRET")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interpret", action="store_true", help="also run the Triton kernels in Triton's interpreter")
    parser.add_argument("--device", help="a torch device (default: the GPU if there is one, else the CPU)")


def run(args: argparse.Namespace) -> int:
    device = device_of(args.device)
    if args.interpret and (problem := backend.TRITON_PROBLEM or backend.interpreter_problem()):
        raise CommandError(f"--interpret runs the kernels in Triton's interpreter, but {problem}")
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    report: dict[str, Any] = {"version": __version__, "backend": _backend(device), "environment": environment}
    report |= {"versions": _versions(), "optional": {name: version_of(name) for name in OPTIONAL}, "self_tests": []}
    if not args.json:
        _print_findings(report)
    for title, results in _self_tests(device, report["backend"]["name"], args.interpret):
        rows = []
        for result in results:
            rows.append(result)
            if not args.json and sys.stderr.isatty():
                print(f"\r\033[K  {counted(len(rows), 'check')} done", end="", file=sys.stderr, flush=True)
        if not args.json and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        report["self_tests"].append({"on": title, "checks": [r._asdict() | {"passed": r.passed} for r in rows]})
        if not args.json:
            _print_results(title, rows)
    checks = [check for test in report["self_tests"] for check in test["checks"]]
    failed = sum(not check["passed"] for check in checks)
    report["ok"] = report["backend"]["name"] is not None and bool(checks) and failed == 0
    if args.json:
        print_json(report)
    else:
        print(f"\n{_verdict(report, len(checks), failed)}")
    return 0 if report["ok"] else 1


def _backend(device: torch.device) -> dict[str, Any]:
    """The backend and its reason. Its name is None if the chosen backend can't run."""
    try:
        name, reason = backend.explain_backend(device)
    except RuntimeError as error:
        return {"device": str(device), "set": settings.get_backend(), "name": None, "reason": str(error)}
    return {"device": str(device), "set": settings.get_backend(), "name": name, "reason": reason}


def _versions() -> dict[str, str]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {
        "stablelora-kernels": __version__,
        "installed in": str(Path(__file__).parents[2]),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": backend.TRITON_PROBLEM or version_of("triton") or "built from source",
        "CUDA": torch.version.cuda or "not in this torch",
        "ROCm": torch.version.hip or "not in this torch",
    }
    for index in range(gpus):
        properties = torch.cuda.get_device_properties(index)
        arch = arch_of(properties)
        known = "" if arch in DEVICES else ", for which the dispatch tables were not made"
        found["GPU" if gpus == 1 else f"GPU {index}"] = f"{properties.name}, {arch}{known}"
    built_for = torch.version.cuda or torch.version.hip
    return found if gpus else found | {"GPU": f"no GPU that this torch {'sees' if built_for else 'could use'}"}


def _self_tests(device: torch.device, name: str | None, interpret: bool) -> Iterator[tuple[str, Iterator[Result]]]:
    """The title and the results of each self-test; results come as the checks run."""
    if name is not None:
        subject = "PyTorch's operators" if name == "torch" else "the Triton kernels"
        place = "in Triton's interpreter" if name == "triton" and backend.INTERPRETING else f"on {device}"
        yield f"{subject} {place}", run_checks(device)
    if interpret and not (name == "triton" and backend.INTERPRETING):
        yield "the Triton kernels in Triton's interpreter", _interpreted()


def _interpreted() -> Iterator[Result]:
    """The results of a subprocess that runs the checks with Triton's interpreter on."""
    command = [sys.executable, "-m", "stablelora_kernels.cli.selftest"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                row = json.loads(line)
                yield Result(**row | {"kernels": tuple(row["kernels"])})
            if process.wait():
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
                yield Result("the interpreter's process", "", None, None, "", (), 0.0, f"it ended early: {last}")
        finally:
            process.kill()
            process.wait()


def _print_findings(report: dict[str, Any]) -> None:
    chosen = report["backend"]
    name = chosen["name"] or "none"
    print(wrapped(f"Backend on {chosen['device']}: {name}, since {chosen['reason']}"))
    for variable, value in report["environment"].items():
        print(f"  {variable}={value}")
    print("\nVersions")
    print_pairs(report["versions"])
    print("\nOptional packages")
    optional = report["optional"]
    column = max(len(version or "missing") for version in optional.values())
    print_pairs({name: f"{version or 'missing':{column}}  {OPTIONAL[name]}" for name, version in optional.items()})


def _print_results(title: str, results: list[Result]) -> None:
    print("\n" + wrapped(f"Self-test of {title}, against float64, {sum(r.seconds for r in results):.1f} s"))
    rows = []
    for r in results:
        figures = ("-", "-", "-")
        if r.error is not None and r.bound is not None:
            figures = (f"{r.error:.2g}", f"{r.bound:.2g}", r.of)
        rows.append((r.family, r.case, "ok" if r.passed else "FAILED", *figures))
    print_table(("kernel family", "case", "", "error", "bound", "of"), rows, left=(0, 1, 2, 5))
    for r in results:
        if not r.passed:
            print(wrapped(f"  FAILED {r.family}, {r.case}: {r.problem}", 4))
    if launched := sorted({kernel for r in results for kernel in r.kernels}):
        were = "was" if len(launched) == 1 else "were"
        print(wrapped(f"  {counted(len(launched), 'kernel')} {were} launched: {', '.join(launched)}", 4))


def _verdict(report: dict[str, Any], checks: int, failed: int) -> str:
    if report["backend"]["name"] is None:
        return wrapped(f"The backend {report['backend']['set']!r} can't run here, so calls of this library will raise.")
    return f"{failed} of {counted(checks, 'check')} FAILED." if failed else f"All {checks} checks passed."
