"""Says which backend runs on this machine and why, lists versions, and tests every kernel family on small inputs. The error
against a float64 computation must be at most twice the error of plain PyTorch, or what rounding allows (the bound).

On a GPU it tests the Triton kernels, on a CPU the PyTorch path. With --interpret it also tests the Triton kernels on the CPU,
in Triton's interpreter.

Exit status: 0 all tests passed; 1 a test failed, or the chosen backend can't run here; 2 a bad argument."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels._version import __version__
from stablelora_kernels.cli.common import CommandError, Report, device_of
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.problem import DEVICES, arch_of
from stablelora_kernels.dispatch.settings import check_environment, get_backend, use_autotune, use_backend, use_kernel
from stablelora_kernels.functional import FP8Weight, NF4Weight, lora_branch, lora_linear, lora_linear_group
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import lora_pairs
from stablelora_kernels.reference import StableAdamWRef, dropout_keep_ref
from stablelora_kernels.reference.rounding import Rounded
from stablelora_kernels.testing import Deviation
from stablelora_kernels.utils.threads import ONE_THREAD
from stablelora_kernels.utils.timing import version_of
from stablelora_kernels.utils.validation import counted

HELP = "which backend runs here and why, versions, and a self-test of every kernel family"
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
IN_INTERPRETER = "the Triton kernels in Triton's interpreter"
BF16, FP32 = torch.bfloat16, torch.float32
SCALING = 1.7
# Exact in 16 bits: the PyTorch path on a CPU draws 16 bits per element and would round another probability.
DROPOUT = 0.125
Result = dict[str, Any]
Tensors = dict[str, Tensor]
# An error, its bound and what has them.
Measured = tuple[float, float, str]
Check = Callable[[torch.device], Measured]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interpret", action="store_true", help="also run the Triton kernels in Triton's interpreter")
    parser.add_argument("--device", help="a torch device (default: the GPU if there is one, else the CPU)")


def run(args: argparse.Namespace, report: Report) -> int:
    device = device_of(args)
    if args.interpret and (problem := backend.TRITON_PROBLEM or backend.interpreter_problem()):
        raise CommandError(f"--interpret runs the kernels in Triton's interpreter, but {problem}")
    name = _report_findings(device, report)
    interpreting = name == "triton" and backend.INTERPRETING
    # The results of each self-test, which come as its checks run.
    self_tests: dict[str, Iterator[Result]] = {}
    if name is not None:
        subject = "PyTorch's operators" if name == "torch" else "the Triton kernels"
        self_tests[IN_INTERPRETER if interpreting else f"{subject} on {device}"] = run_checks(device)
    if args.interpret and not interpreting:
        self_tests[IN_INTERPRETER] = _interpreted()
    report.data["self_tests"] = []
    for title, running in self_tests.items():
        results: list[Result] = []
        for result in running:
            results.append(result)
            report.progress(f"  {counted(len(results), 'check')} done")
        report.progress("")
        report.data["self_tests"].append({"on": title, "checks": results})
        _report_results(title, results, report)
    passed = [result["passed"] for test in report.data["self_tests"] for result in test["checks"]]
    report.data["ok"] = ok = name is not None and bool(passed) and all(passed)
    if name is None:
        verdict = f"The backend {get_backend()!r} can't run here, so calls of this library will raise."
    elif all(passed):
        verdict = f"All {len(passed)} checks passed."
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
    environment = {variable: os.environ[variable] for variable in VARIABLES if variable in os.environ}
    versions, optional = _versions(), {package: version_of(package) for package in OPTIONAL}
    chosen = {"device": str(device), "set": get_backend(), "name": name, "reason": reason}
    report.data = {"version": __version__, "backend": chosen, "environment": environment}
    report.data |= {"versions": versions, "optional": optional}
    report.text(f"Backend on {device}: {name or 'none'}, since {reason}")
    report.text(*(f"  {variable}={value}" for variable, value in environment.items()), "", "Versions")
    report.pairs(versions)
    report.text("", "Optional packages")
    column = max(len(version or "missing") for version in optional.values())
    report.pairs({package: f"{optional[package] or 'missing':{column}}  {use}" for package, use in OPTIONAL.items()})
    return name


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
        found["GPU" if gpus == 1 else f"GPU {index}"] = _gpu(index)
    built_for = torch.version.cuda or torch.version.hip
    return found if gpus else found | {"GPU": f"no GPU that this torch {'sees' if built_for else 'could use'}"}


def _gpu(index: int) -> str:
    """A GPU in words, with its row of the backend's table, or what is missing there."""
    properties = torch.cuda.get_device_properties(index)
    name = f"{properties.name}, {arch_of(properties)}"
    if torch.version.hip:
        return name if arch_of(properties) in DEVICES else f"{name}, for which the dispatch tables were not made"
    row, verdict = backend.row_of((properties.major, properties.minor)), backend.verdict_of(index)
    notes = [verdict.problem, verdict.taken_as, row.requirement]
    return "; ".join([name, *filter(None, notes)])


def _report_results(title: str, results: list[Result], report: Report) -> None:
    report.text("", f"Self-test of {title}, against float64, {sum(r['seconds'] for r in results):.1f} s")
    rows = []
    for r in results:
        figures = ("-", "-", "-") if r["error"] is None else (f"{r['error']:.2g}", f"{r['bound']:.2g}", r["of"])
        rows.append((r["family"], r["case"], "ok" if r["passed"] else "FAILED", *figures))
    report.table(("kernel family", "case", "", "error", "bound", "of"), rows, left=(0, 1, 2, 5))
    report.text(*(f"  FAILED {r['family']}, {r['case']}: {r['problem']}" for r in results if not r["passed"]), hang=4)
    if launched := sorted({kernel for r in results for kernel in r["kernels"]}):
        were = "was" if len(launched) == 1 else "were"
        report.text(f"  {counted(len(launched), 'kernel')} {were} launched: {', '.join(launched)}", hang=4)


# The self-test.


def _interpreted() -> Iterator[Result]:
    """The results of a process with Triton's interpreter on, since Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-c", f"from {__name__} import print_checks; print_checks()"]
    # The interpreter's arrays are so small that more threads make it slower. The user's own setting has precedence.
    environment = ONE_THREAD | os.environ | {"TRITON_INTERPRET": "1"}
    options: dict[str, Any] = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stderr=errors, **options) as process:
        try:
            yield from map(json.loads, process.stdout or ())
            if process.wait():
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
                yield _result("the interpreter's process", "", f"it ended early: {last}")
        finally:
            process.kill()


def print_checks() -> None:
    """Run the Triton kernels on the CPU and print one line of JSON per check."""
    check_environment()
    with use_backend("triton"):
        for result in run_checks(torch.device("cpu")):
            print(json.dumps(result), flush=True)


def checks() -> list[tuple[str, str, Check]]:
    """Every check by family and case. The sizes make dispatch choose the named kernel on Hopper and Blackwell."""
    nf4, fp8 = testing.nf4_weight(72, 128, 64, nested=True), testing.fp8_weight(72, 128)
    return [
        ("lora_linear", "few rows, bf16", partial(check_layer, 9, 48, [(72, 8)])),
        ("lora_linear", "many rows, bf16", partial(check_layer, 70, 96, [(136, 16)])),
        ("lora_linear", "odd sizes, bf16", partial(check_layer, 67, 37, [(71, 3)])),
        ("lora_linear", "many rows, fp32", partial(check_layer, 70, 48, [(72, 8)], dtype=FP32)),
        ("lora_linear", "dropout, bf16", partial(check_layer, 70, 48, [(72, 8)], p=DROPOUT)),
        ("dropout's mask", "forward and backward", check_mask),
        ("lora_linear_group", "3 projections, bf16", partial(check_layer, 70, 96, [(72, 8), (24, 4), (24, 4)])),
        ("lora_linear_quantized", "NF4, nested scales", partial(check_layer, 37, 128, [(72, 8)], stored=nf4)),
        ("lora_linear_quantized", "float8", partial(check_layer, 37, 128, [(72, 8)], stored=fp8)),
        ("lora_branch", "bf16", partial(check_layer, 70, 48, [(72, 8)], branch=True)),
        ("stable_adamw", "3 steps, fp32", partial(check_step, dtype=FP32)),
        ("stable_adamw", "3 steps, bf16", partial(check_step, dtype=BF16)),
    ]


def run_checks(device: torch.device) -> Iterator[Result]:
    """Yield each check's result, on the current backend. A forced kernel and autotuning are turned off meanwhile."""
    counts: Counter[str] = Counter()
    if on_triton := backend.resolve_backend(device) == "triton":
        from stablelora_kernels.launch.base import launch_counts as counts
    for family, case, check in checks():
        begun, before, figures, problem = time.perf_counter(), counts.copy(), {}, None
        try:
            # The same masks at each run. The caller's generators keep their states.
            with (
                use_kernel("auto"),
                use_autotune(False),
                torch.random.fork_rng([device] if device.type == "cuda" else []),
            ):
                torch.manual_seed(0)
                error, bound, of = check(device)
            figures = {"error": error, "bound": bound, "of": of}
            if not error <= bound:
                problem = f"{of} is off by {error:.3g}, allowed {bound:.3g}"
        except Exception as raised:  # doctor reports any failure.
            problem = " ".join(f"{type(raised).__name__}: {raised}".split())
        # The counts include the vendor library's products.
        kernels = sorted(name.removeprefix("_").removesuffix("_kernel") for name in counts - before if name != "vendor")
        if on_triton and not kernels and problem is None:
            problem = "no Triton kernel was launched"
        seconds = round(time.perf_counter() - begun, 3)
        yield _result(family, case, problem, **figures, kernels=kernels, seconds=seconds)


def _result(family: str, case: str, problem: str | None, **found: Any) -> Result:
    """A check's result, with the Triton ``kernels`` that it launched. ``problem`` says why it failed, or is None."""
    unknown: Result = {"error": None, "bound": None, "of": "", "kernels": [], "seconds": 0.0}
    return {"family": family, "case": case, **unknown, **found, "problem": problem, "passed": problem is None}


def nearest_to_bound(
    out: Tensors, ref: Tensors, base: Tensors, dtype: torch.dtype, roundings: dict[str, Rounded] | None = None
) -> Measured:
    """The result whose error, of an element or of its scale, is the largest share of its bound."""
    measured: list[Deviation] = []
    for name, value in out.items():
        if value.shape != ref[name].shape:
            raise AssertionError(f"{name} must be {list(ref[name].shape)}, got {list(value.shape)}")
        rounding = roundings[name] if roundings else None
        measured += testing.deviations(value, ref[name], base[name], dtype=dtype, rounding=rounding, name=name)
    return max(measured, key=lambda deviation: deviation.share)


def check_layer(
    m: int, k: int, sizes: Sequence[tuple[int, int]], device: torch.device, *, p: float = 0.0, dtype: torch.dtype = BF16,
    stored: NF4Weight | FP8Weight | None = None, branch: bool = False,
) -> Measured:  # fmt: skip
    """A projection of [m, k] rows to n features with rank r, forward and backward; for several (n, r), a projection group.

    ``stored``: its weight in 4 or 8 bits, which the oracle dequantizes in float64, eager in ``dtype``. ``branch``: A and B alone.
    """
    options: dict[str, Any] = {"dtype": dtype, "lora_dtype": FP32, "device": device}
    parts: list[Any] = [testing.make_inputs((m, k), n, r, seed=i, **options) for i, (n, r) in enumerate(sizes)]
    parts = [part | {"x": parts[0]["x"]} for part in parts]
    first, x = parts[0], parts[0]["x"]
    if stored is not None:
        fields: dict[str, Any] = vars(stored)
        fields = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()}
        first["weight"] = type(stored)(**fields)
    if branch:
        first["base_out"] = torch.nn.functional.linear(x, first.pop("weight"), first.pop("bias"))
    leaves = {"dBASE": first["base_out"], "dX": x} if branch else {"dX": x}
    numbers = [str(i) if len(parts) > 1 else "" for i in range(len(parts))]
    for i, part in zip(numbers, parts, strict=True):
        leaves |= {f"dA{i}": part["lora_A"], f"dB{i}": part["lora_B"]}
    for leaf in leaves.values():
        leaf.requires_grad_()

    weights, biases, a, b = ([part.get(name) for part in parts] for name in ("weight", "bias", "lora_A", "lora_B"))
    ys: tuple[Tensor, ...]
    if branch:
        ys = (lora_branch(first["base_out"], x, a[0], b[0], SCALING),)
    elif len(parts) == 1:
        ys = (lora_linear(x, weights[0], biases[0], a[0], b[0], SCALING, p),)
    else:
        ys = lora_linear_group(x, weights, biases, a, b, [SCALING] * len(parts))
    keep = testing.keep_of(ys[0], x) if p else None
    gradients = torch.autograd.grad(ys, list(leaves.values()), [part["grad"] for part in parts])

    out = {f"Y{i}": y for i, y in zip(numbers, ys, strict=True)} | dict(zip(leaves, gradients, strict=True))
    expected = ([results(part, SCALING, keep, p) for part in parts] for results in (testing.oracle, testing.eager))
    ref, base = (each[0] if len(parts) == 1 else testing.group_results(each) for each in expected)
    by_part = [testing.roundings(part, SCALING, keep, p) for part in parts]
    roundings = by_part[0] if len(parts) == 1 else testing.group_roundings(by_part, dtype)
    return nearest_to_bound(out, ref, base, dtype, roundings)


def check_mask(device: torch.device) -> Measured:
    """Compare the masks of forward, backward and the reference element by element.

    With a zero weight and identities as A and B, Y is the mask times a constant for X = 1, and so is dX for dY = 1.
    """
    m, k = 70, 64
    x = torch.ones(m, k, dtype=BF16, device=device).requires_grad_()
    eye = torch.eye(k, dtype=BF16, device=device).requires_grad_()
    torch.manual_seed(0)
    y = lora_linear(x, torch.zeros_like(eye), None, eye, eye, 1.0, DROPOUT)
    keep = testing.keep_of(y, x)
    if testing.kept_for_backward(y, torch.int32) is not None:
        torch.manual_seed(0)
        seed = int(torch.randint(2**63 - 1, (1,), device=device))
        keep = dropout_keep_ref(m, k, DROPOUT, seed).to(device)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kept = int(keep.sum())
    # Five standard deviations of a binomial.
    if abs(kept - (1 - DROPOUT) * m * k) > 5 * (DROPOUT * (1 - DROPOUT) * m * k) ** 0.5:
        raise AssertionError(f"the mask must keep about {1 - DROPOUT:g} of {m * k} elements, got {kept}")
    return int(((y != 0) != keep).sum() + ((dx != 0) != keep).sum()), 0, "elements"


def check_step(device: torch.device, *, dtype: torch.dtype) -> Measured:
    """Three steps over a shrinking pair, one that latches at once and a lone parameter; the latch steps must be the oracle's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(device, dtype)

    start = {
        "shrinks.lora_A": normal(8, 40), "shrinks.lora_B": normal(24, 8, std=0.0),
        "latches.lora_A": normal(3, 5, std=0.1), "latches.lora_B": normal(31, 3, std=9.0), "lone": normal(17),
    }  # fmt: skip
    grads = [{name: normal(*tensor.shape, std=1e-2) for name, tensor in start.items()} for _ in range(3)]
    settings: dict[str, Any] = {"lr": 1e-2, "shrink_ratio": 5e-3}

    ours = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimizer = StableLoRAAdamW(list(ours.items()), seed=1, **settings)
    for step in grads:
        for name, tensor in ours.items():
            tensor.grad = step[name]
        optimizer.step()

    def plain(kind: torch.dtype) -> tuple[Tensors, dict[str, int | None]]:
        """Algorithm 1 operator by operator in the dtype ``kind``: the parameters and the latch steps."""
        named = {name: tensor.to(kind, copy=True) for name, tensor in start.items()}
        reference = StableAdamWRef(lora_pairs(named.items()), [named["lone"]], **settings)
        for step in grads:
            reference.step({tensor: step[name].to(kind) for name, tensor in named.items()})
        return named, reference.latched_at

    ref, latched_at = plain(torch.float64)
    found = {pair.name: pair.latched_at for pair in optimizer.stability()}
    if found != latched_at or sorted(latched_at.values(), key=str) != [1, None]:
        raise AssertionError(f"the pairs must latch at steps {latched_at}, got {found}")
    return nearest_to_bound({name: tensor.detach() for name, tensor in ours.items()}, ref, plain(dtype)[0], dtype)
