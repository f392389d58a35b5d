"""PEFT's own tests, run with and without acceleration, and the comparison of the two."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.peft_suite import hub
from tests.peft_suite.plugin import ACCELERATE, OUTCOMES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peft_suite.csv"
SHA256 = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}
NEEDED = ("datasets", "diffusers", "parameterized", "scipy", "attr", "transformers", "pytest")
# Leave out other methods with LoRA in their names.
LORA = "lora and not (adalora or vblora or randlora or gralora or tinylora or delora or unilora or xlora)"
QUICK = ("test_custom_models", "test_low_level_api", "test_lora_variants", "test_mixed")
FILES = (
    *QUICK, "test_decoder_models", "test_encoder_decoder_models", "test_feature_extraction_models", "test_seq_classifier",
    "test_initialization", "test_lora_conversion", "test_lora_ga", "test_lora_intruders", "test_lorafa", "test_loraplus",
    "test_bdlora", "test_velora", "test_riemannian_lora", "test_trainable_tokens", "test_tuners_utils", "test_helpers",
    "test_other",
)  # fmt: skip


def unpack(archive: Path, directory: Path) -> Path:
    """The source distribution's own directory under ``directory``."""
    with tarfile.open(archive) as file:
        file.extractall(directory, filter="data")
    (source,) = directory.iterdir()
    # Its modules import each other as a package, but the distribution lacks its __init__.
    (source / "tests" / "__init__.py").touch()
    return source


def command(files: Sequence[str], keyword: str) -> list[str]:
    options = [
        "-q",
        "-p",
        "peft_suite.plugin",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-W",
        "ignore",
    ]
    return [sys.executable, "-m", "pytest", *options, "-k", keyword, *(f"tests/{name}.py" for name in files)]


def environment(outcomes: Path, cache: Path, accelerate: bool, backend: str) -> dict[str, str]:
    more = {
        OUTCOMES: str(outcomes),
        ACCELERATE: str(int(accelerate)),
        # PEFT's package of tests has the name of this repository's.
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT))),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "STABLELORA_BACKEND": backend,
    }
    return os.environ | more | ({"TRITON_INTERPRET": "1"} if backend == "triton" else {})


def run_both(
    directory: Path, files: Sequence[str], keyword: str, backend: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outcomes and counts without and with acceleration, as the plugin records them."""
    cache = directory / "hub"
    hub.build(cache)
    source = next(path for path in directory.iterdir() if path.name.startswith("peft-"))
    running = []
    for name in ("off", "on"):
        outcomes = directory / f"{name}.json"
        log = (directory / f"{name}.txt").open("w", encoding="utf-8")
        env = environment(outcomes, cache, name == "on", backend)
        running.append(
            (subprocess.Popen(command(files, keyword), cwd=source, env=env, stdout=log, stderr=log), outcomes)
        )
    for process, outcomes in running:
        process.wait()
        if not outcomes.exists():
            log = outcomes.with_suffix(".txt").read_text(encoding="utf-8")
            raise RuntimeError(f"PEFT's tests did not run (pytest's exit status {process.returncode}):\n{log[-4000:]}")
    off, on = (json.loads(outcomes.read_text(encoding="utf-8")) for _, outcomes in running)
    return off, on


def differences(off: dict[str, str], on: dict[str, str]) -> list[tuple[str, str, str]]:
    """(test, outcome off, outcome on) wherever they differ."""
    tests = dict.fromkeys([*off, *on])
    return [(t, off.get(t, "not run"), on.get(t, "not run")) for t in tests if off.get(t) != on.get(t)]


def by_file(outcomes: dict[str, str]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for test, outcome in outcomes.items():
        counts.setdefault(Path(test.partition("::")[0]).stem, Counter())[outcome] += 1
    return counts


KINDS = ("passed", "failed", "error", "skipped", "xfailed", "xskipped", "xpassed")


def rows(off: dict[str, str], on: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each file, with the count of every outcome as off/on and of the tests that differ."""
    differing = by_file({test: "differs" for test, _, _ in differences(off, on)})
    without, accelerated = by_file(off), by_file(on)
    table = []
    for name in dict.fromkeys([*without, *accelerated]):
        pair = without.get(name, Counter()), accelerated.get(name, Counter())
        counts = {kind: f"{pair[0][kind]}/{pair[1][kind]}" for kind in KINDS}
        table.append({"file": name, **counts, "different": differing.get(name, Counter())["differs"]})
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.peft_suite", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    add("--files", nargs="+", choices=FILES, metavar="FILE", help="only these")
    add("-k", dest="keyword", default=LORA, help="pytest's -k (%(default)s)")
    add("--backend", choices=("torch", "triton"), default="torch", help="triton on a CPU is its interpreter, and slow")
    add("--keep", type=Path, metavar="DIRECTORY", help="unpack and run there, and leave the logs")
    add("--dry", action="store_true", help="say what would be run, and stop")
    return parser.parse_args(argv)
