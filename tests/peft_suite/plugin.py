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
from pathlib import Path
from typing import Any

OUTCOMES, ACCELERATE = "STABLELORA_SUITE_OUTCOMES", "STABLELORA_SUITE_ACCELERATE"
_outcomes: dict[str, str] = {}
_counts: Counter[str] = Counter()


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
    """Call ``accelerate_peft`` on every model into which PEFT has put an adapter."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner

    import stablelora_kernels as slk
    from stablelora_kernels.integrations import peft_experts, peft_layers, peft_operands

    inject_adapter = BaseTuner.inject_adapter

    @functools.wraps(inject_adapter)
    def injected_and_accelerated(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject_adapter(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            _counts["accelerated rows of reports"] += len(slk.accelerate_peft(model).replaced)
        return result

    BaseTuner.inject_adapter = injected_and_accelerated
    places = {
        peft_layers: ("lora_linear_if",),
        peft_operands: ("lora_linear", "lora_branch"),
        peft_experts: ("lora_experts",),
    }
    for module, names in places.items():
        for name in names:
            setattr(module, name, _counted(name, getattr(module, name)))


def _counted(name: str, op: Any) -> Any:
    # Keep its name: tests pickle these models.
    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = op(*args, **kwargs)
        if result is not None:
            _counts[f"calls of {name.removesuffix('_if')}"] += 1
        return result

    return call


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
    content = {"outcomes": _outcomes, "counts": _counts}
    Path(os.environ[OUTCOMES]).write_text(json.dumps(content), encoding="utf-8")
