"""NumPy's OpenBLAS has one thread in tests and in the processes that they start, and as many as the
user sets.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys

import pytest
import torch

from tests.helpers.processes import answer_of, printed
from tests.helpers.threads import ONE_THREAD, openblas_threads

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not openblas_threads(),
    reason="runs on Linux where NumPy brings OpenBLAS: PyPI's wheels do",
)
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
METHODS = [
    method
    for method in multiprocessing.get_all_start_methods()
    if method != "fork" or not torch.cuda.is_available()
]


def test_here() -> None:
    expected = min(int(os.environ["OPENBLAS_NUM_THREADS"]), CPUS)
    hint = "tests/conftest.py sets the threads too late where a plugin of pytest imports NumPy before it"
    assert openblas_threads() == [expected] * len(openblas_threads()), hint
    # PyTorch's operators keep the threads that tests/conftest.py gives them, whatever OpenMP's
    # setting is.
    assert torch.get_num_threads() == (
        1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
    )


@pytest.mark.parametrize("method", METHODS)
def test_in_a_process_of_a_test(method: str) -> None:
    answer, signal = answer_of(openblas_threads, method)
    assert signal == 0 and answer and set(answer) == set(openblas_threads())


FRESH = """
import json, os
from tests.helpers.threads import ONE_THREAD, openblas_threads
for name in ONE_THREAD:
    os.environ.pop(name, None)
os.environ.update({own})
import {module}
print(json.dumps([openblas_threads(), {{name: os.environ[name] for name in ONE_THREAD}}]))
"""


@pytest.mark.parametrize(
    ("module", "own"),
    [
        ("tests.conftest", {}),
        ("tests.conftest", {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"}),
        ("tests.ptx_emulator.__main__", {}),
    ],
    ids=str,
)
def test_the_users_own_setting_has_precedence(module: str, own: dict[str, str]) -> None:
    counts, environment = json.loads(printed(FRESH.format(module=module, own=own)))
    expected = min(int(own.get("OPENBLAS_NUM_THREADS", "1")), CPUS)
    assert counts == [expected] * len(counts) and counts
    assert environment == ONE_THREAD | own
