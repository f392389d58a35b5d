"""A pytest plugin for runs of PEFT's own tests: it accelerates every model and records outcomes.

``tests.peft_suite`` loads it with ``-p peft_suite.plugin`` and configures it through the
environment.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.helpers.op_calls import Calls

OUTCOMES, ACCELERATE = "STABLELORA_SUITE_OUTCOMES", "STABLELORA_SUITE_ACCELERATE"
_outcomes: dict[str, str] = {}
_counts: Counter[str] = Counter()
# Stays open until the process ends.
_stack = ExitStack()
_calls: list[Calls] = []


class _Always(dict[str, int]):
    """Replaces PEFT's record of downloaded models; it contains every model, so no test contacts the
    hub.
    """

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def pytest_configure() -> None:
    if os.environ.get(ACCELERATE) == "1":
        _accelerate_every_model()


def _accelerate_every_model() -> None:
    """Call ``accelerate_peft``, as the README's first example does, on every model into which PEFT
    has put an adapter, and count the ops that run.
    """
    # Not as tests.helpers: PEFT's package of tests has that name.
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from helpers.op_calls import counted_ops
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner

    import stablelora_kernels as slk
    from stablelora_kernels.nn import fused_experts

    inject_adapter = BaseTuner.inject_adapter
    experts_mlp_op = fused_experts.lora_experts_mlp_op

    @functools.wraps(inject_adapter)
    def injected_and_accelerated(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject_adapter(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            report = slk.accelerate_peft(model, fuse_mlp=True)
            _counts["accelerated rows of reports"] += len(report.replaced)
        return result

    @functools.wraps(experts_mlp_op)
    def counted_experts_mlp(*args: Any) -> Any:
        _counts["calls of lora_experts_mlp"] += 1
        return experts_mlp_op(*args)

    BaseTuner.inject_adapter = injected_and_accelerated
    fused_experts.lora_experts_mlp_op = counted_experts_mlp
    _calls.append(_stack.enter_context(counted_ops()))


def pytest_collection_finish() -> None:
    if (utilities := sys.modules.get("tests.testing_utils")) is not None:
        utilities._HUB_MODEL_ACCESSES = _Always()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcome = (
            report.outcome if report.when == "call" or report.outcome == "skipped" else "error"
        )
        if hasattr(report, "wasxfail"):
            outcome = f"x{outcome}"
        _outcomes[report.nodeid] = outcome


def pytest_sessionfinish() -> None:
    for calls in _calls:
        _counts.update({f"calls of {op}": count for op, count in calls.layers.items()})
        _counts.update({"calls of lora_mlp": len(calls.mlps)} if calls.mlps else {})
    content = {"outcomes": _outcomes, "counts": _counts}
    Path(os.environ[OUTCOMES]).write_text(json.dumps(content), encoding="utf-8")
