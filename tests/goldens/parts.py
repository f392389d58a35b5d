"""The parts of ``tests.goldens``: each is a dictionary of what there is now, in values that JSON keeps."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Random calls of all ops, and steps of each optimizer.
CALLS, STEPS = 400, 20
PUBLIC = ("", ".functional", ".testing", ".reference", ".integrations", ".model", ".nn", ".optim", ".quantized")


def api() -> dict[str, object]:
    found: dict[str, object] = {}
    for part in PUBLIC:
        module = import_module(f"stablelora_kernels{part}")
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            members = vars(value) if inspect.isclass(value) else {}
            public = {n: m for n, m in members.items() if not n.startswith("_") or n == "__init__"}
            for label, each in {"": value, **{f".{n}": m for n, m in public.items()}}.items():
                found[f"{module.__name__}.{name}{label}"] = str(inspect.signature(each)) if callable(each) else ""
    package = Path(import_module("stablelora_kernels").__file__ or "").parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            warns = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("warn", "Error", "Warning"))
            if warns and (text := "".join(template(arg) for arg in node.args)):
                found[f"message: {text}"] = True
    return found


def template(node: ast.AST) -> str:
    """A message with {} for what it says about a call; "" of what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return ""


def launches() -> dict[str, object]:
    from benchmarks.lab.compile_report.report import jobs
    from stablelora_kernels.dispatch.problem import DEVICES

    found: dict[str, object] = {}
    for arch in DEVICES:
        for label, launch in jobs(arch).items():
            told = sorted(map(described, leaves(launch.args)))
            # Equal values of pointers and sizes may be told more than once, for several jobs of one launch.
            found[" | ".join(label)] = [str(launch.grid), str(sorted(launch.options.items())), *told]
    return found


def leaves(value: Any) -> Iterable[Any]:
    """The run-time arguments, also those in tuples; None takes no place at run time."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)
    elif value is not None:
        yield value


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)} {value.stride()}"
    if hasattr(value, "block_shape"):
        return f"descriptor {value.base.dtype} {[*value.shape]} {[*value.strides]} {[*value.block_shape]}"
    return f"{type(value).__name__} {value}"


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        found.update(t.detach().cpu().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def ops() -> dict[str, object]:
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.helpers.case_checks import calls
    from tests.helpers.cases import run

    found: dict[str, object] = {}

    @settings(
        max_examples=CALLS, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    @given(calls())
    def each(case: Any) -> None:
        made = run(case)
        found[f"{len(found)}: {case}"] = digest(made[name] for name in sorted(made))

    _quick_interpreter()
    each()
    return found


def optimizer() -> dict[str, object]:
    from stablelora_kernels.dispatch.settings import use_backend
    from tests.helpers.optimizers import params_of, set_grads, snapshot
    from tests.optim.options import OPTIONS

    _quick_interpreter()
    found: dict[str, object] = {}
    for name, row in OPTIONS.items():
        for dtype in row.dtypes:
            for backend in ("torch", "triton") if dtype != torch.float64 else ("torch",):
                with use_backend(backend):
                    optimizer = row.optimizer(row.pairs(dtype))
                    for step in range(STEPS):
                        set_grads(params_of(optimizer), step)
                        optimizer.step()
                        found[f"{name}, {dtype}, {backend}, step {step}"] = digest(snapshot(optimizer))
    return found


def _quick_interpreter() -> None:
    from tests.helpers.interpreter import speed_up_interpreter

    torch.set_num_threads(1)
    speed_up_interpreter()
