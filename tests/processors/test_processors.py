"""By day, a sample of the oracle's cases as two other processors; and the command that runs all
tests as each kind.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stablelora_kernels.ops import cpu_products
from tests.processors import __main__ as command
from tests.processors.kinds import KINDS, SSE41, Kind, differences, set_up
from tests.processors.plugin import OUTCOMES, spread

SAMPLE = 40
# PyTorch's operators, which compute with the processor's instructions. In float64 no processor
# computes in another precision.
ORACLE = (
    "tests/ops/test_ops_oracle.py",
    "--",
    "-v",
    "-k",
    "test_matches_the_oracle and torch and not fp64",
)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="runs on x86-64, whose processors have these kinds",
)
@pytest.mark.parametrize(
    ("kind", "capability"),
    [pytest.param("avx2", "AVX2", marks=pytest.mark.nightly), ("sse41", "DEFAULT")],
)
def test_a_sample_of_the_oracles_cases_as_another_processor(
    kind: str, capability: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status = command.main(["--kind", kind, "--sample", str(SAMPLE), *ORACLE])
    printed = capfd.readouterr().out
    assert status == 0, printed
    lines = printed.splitlines()
    assert lines[-1].partition(",")[0].split() == [kind, str(SAMPLE), "passed"]
    assert [line.split()[-1] for line in lines if "ATen's capability" in line] == [capability]
    cases = [line for line in lines if "test_matches_the_oracle[" in line]
    assert len(cases) == SAMPLE
    for words in (
        "fp32/fp32",
        "bf16/fp32",
        "bf16/bf16",
        "fp16/fp32",
        "fp16/fp16",
        "linear",
        "branch",
        "group",
        "mlp",
        " p=",
        "nf4",
    ):
        assert any(words in case for case in cases), words


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process gets its own kind back."""
    for name in ("IS_AMD", "ONEDNN_HELPS"):
        monkeypatch.setattr(cpu_products, name, getattr(cpu_products, name))
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    yield
    torch.set_num_threads(threads)
    # Not by torch.backends.mkldnn.enabled, which torch.testing._internal locks.
    torch._C._set_mkldnn_enabled(onednn)


@pytest.mark.parametrize(
    "name", ["native", "no-onednn", "one-thread", "two-threads", "amd", "intel"]
)
def test_a_process_becomes_what_needs_no_instructions(name: str, settings: None) -> None:
    set_up(KINDS[name])
    assert not [*differences(KINDS[name])]
    if name == "amd":
        assert cpu_products.onednn_helps(
            True
        ) == cpu_products.ONEDNN_HELPS and not cpu_products.onednn_helps(False)


def test_a_process_of_another_kind_is_noticed() -> None:
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    low_precision = any(cpu_products.MULTIPLIED.values())
    for kind, difference in (
        (
            Kind("", "", capability="AVX1024"),
            f"ATen's capability: {torch.backends.cpu.get_cpu_capability()}, not AVX1024",
        ),
        (
            Kind("", "", multiplies_low_precision=not low_precision),
            f"float16: {low_precision}, not {not low_precision}",
        ),
        (Kind("", "", onednn=not onednn), f"oneDNN is on: {onednn}, not {not onednn}"),
        (
            Kind("", "", is_amd=not cpu_products.IS_AMD),
            f"AMD: {cpu_products.IS_AMD}, not {not cpu_products.IS_AMD}",
        ),
        (Kind("", "", threads=threads + 1), f"PyTorch's threads: {threads}, not {threads + 1}"),
    ):
        (message,) = differences(kind)
        assert message.endswith(difference)


def test_a_kind_that_fails_or_runs_nothing_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pytest's exit statuses: 0 all passed, 1 some failed, 5 none was collected; and a signal,
    which leaves no counts.
    """
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    statuses = {"native": 0, "sse41": 1, "no-onednn": 5, "two-threads": -11}
    runs = []

    def pretend(
        words: list[str], cwd: Path, env: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        kind, outcomes = (
            words[words.index(option) + 1] for option in ("--processor", "--outcomes")
        )
        runs.append((words, env))
        if statuses[kind] >= 0:
            counts = dict.fromkeys(OUTCOMES, 0) | {"failed": statuses[kind] % 5}
            Path(outcomes).write_text(json.dumps(counts), encoding="utf-8")
        return subprocess.CompletedProcess(words, statuses[kind])

    monkeypatch.setattr(command.subprocess, "run", pretend)
    kinds = [word for kind in statuses for word in ("--kind", kind)]
    assert command.main([*kinds, "--sample", "3", "--", "-x"]) == 1
    last = [line.rpartition(", 0 s") for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [(before.split(maxsplit=1), after) for before, _, after in last] == [
        (["native", "0 passed, 0 failed, 0 error, 0 skipped"], ""),
        (["sse41", "0 passed, 1 failed, 0 error, 0 skipped"], "; exit status 1"),
        (["no-onednn", "0 passed, 0 failed, 0 error, 0 skipped"], "; exit status 5"),
        (["two-threads", "no result"], "; exit status -11"),
    ]
    assert all(words[-6:] == [*command.TESTS, "--sample", "3", "-x"] for words, _ in runs)
    native, sse41, _, two_threads = (env for _, env in runs)
    assert not {"ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS"} & {*native}
    assert SSE41.items() <= sse41.items()
    assert two_threads["OMP_NUM_THREADS"] == two_threads["OPENBLAS_NUM_THREADS"] == "2"
    assert len({env["TORCHINDUCTOR_CACHE_DIR"] for _, env in runs}) == len(runs)
    assert command.main(["--kind", "native"]) == 0


def test_the_kinds_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*KINDS]


def test_a_sample_is_spread_evenly() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 4) == [0, 1, 2]
    assert spread(0, 4) == []
