"""The kernels' tests run on a GPU where there is one, and in Triton's interpreter elsewhere."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.threads import ONE_THREAD

# Before NumPy, which PyTorch imports, starts OpenBLAS's threads. Test runs side by side, the
# workers of pytest -n and the processes that tests start would fight for the cores. The user's own
# setting has precedence.
os.environ.update(ONE_THREAD | os.environ)

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.helpers.covering import leave_the_rest_to_the_night
from tests.helpers.interpreter import speed_up_interpreter
from tests.helpers.largest_shares import pytest_terminal_summary  # noqa: F401

# Triton reads this as it is imported, so it must be set before any test module imports a kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    speed_up_interpreter()
# Tests judge the kernels themselves: on a GPU first use would give PyTorch's result in place of a
# wrong one. Its own tests turn it on.
os.environ.setdefault("STABLELORA_FIRST_USE", "off")
# PyTorch's own operators are tested with two threads where this process is alone, and with one each
# where it is not.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

# What -m smoke runs, in a minute or two: the rules of imports, every choice, errors, the oracle of
# the optimizer and of single kernels, the pages' code.
SMOKE = (
    "tests/dispatch/",
    "tests/docs/test_docs.py",
    "tests/kernels/test_lora_linear_kernels.py",
    "tests/kernels/test_stable_adamw_kernel.py",
    "tests/model/test_apply.py",
    "tests/mutants/test_planted.py",
    "tests/nn/test_linear.py",
    "tests/ops/test_errors.py",
    "tests/optim/test_latch.py",
    "tests/optim/test_optim_errors.py",
    "tests/optim/test_reference.py",
    "tests/test_import_rules.py",
    "tests/test_testing.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what the smoke job runs. Leave out what runs at night, whatever else -m asks for."""
    for item in items:
        if item.nodeid.startswith(SMOKE):
            item.add_marker(pytest.mark.smoke)
    if not torch.cuda.is_available():
        leave_the_rest_to_the_night(items)
    if "nightly" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("nightly")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture(autouse=True, scope="module")
def imports_are_frozen() -> None:
    """Leave what is imported by now out of garbage collection. Each Trainer collects at its start,
    which would take half a second.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else nanobind, under Triton, reports all that is alive at the end as leaked


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """Each test's calls are first calls: a test may have changed what launches depend on, such as a
    table of tiles.
    """
    from stablelora_kernels.ops import plans

    plans.clear()


@pytest.fixture
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty disk and an empty process, with first use on."""
    from stablelora_kernels.dispatch import first_use
    from stablelora_kernels.dispatch.settings import settings
    from stablelora_kernels.ops import plans

    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path / "cache"))
    first_use.forget()
    plans.clear()
    with settings(first_use="on"):
        yield
    first_use.forget()
    plans.clear()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head's loss: chunks of 16 tokens, float32 copies of two or three, blocks of 24 rows of the
    head and 32 columns a step of the kernel.
    """
    from stablelora_kernels.dispatch import tiles
    from stablelora_kernels.ops.lora_linear_cross_entropy import chunks
    from stablelora_kernels.ops.lora_linear_cross_entropy import torch as loss_torch

    monkeypatch.setattr(chunks, "CPU_LOGIT_BYTES", 0)
    monkeypatch.setattr(loss_torch, "FLOAT32_ELEMENTS", 256)
    monkeypatch.setattr(chunks, "BLOCK", 24)
    (rule,) = tiles.CROSS_ENTROPY_TILES
    small = rule._replace(choice=rule.choice._replace(BLOCK_N=32))
    monkeypatch.setattr(tiles, "CROSS_ENTROPY_TILES", (small,))


@pytest.fixture
def poisoned_outputs():
    """Memory that an operator allocates and does not write holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch's operators start their threads for small tensors too, and wait for a busy machine to
    run them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["few", "many"])
def rows(request: pytest.FixtureRequest, backend: str) -> int:
    """Rows on both sides of the limit from which a backend computes in another way."""
    from tests.helpers.cases import FEW, MANY

    return FEW if request.param == "few" else MANY[backend]


@pytest.fixture(params=["one row", "few", "many", "many in two dimensions", "no rows"])
def leading(request: pytest.FixtureRequest, backend: str) -> tuple[int, ...]:
    """The leading sizes of x: without a row index, on both sides of the limit, and empty."""
    from tests.helpers.cases import FEW, MANY

    many = MANY[backend]
    sizes = {
        "one row": (),
        "few": (FEW,),
        "many": (many,),
        "many in two dimensions": (2, many // 2),
        "no rows": (0,),
    }
    return sizes[request.param]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both backends in turn, each in force during the test."""
    from stablelora_kernels.dispatch.settings import settings

    with settings(backend=request.param):
        yield request.param
