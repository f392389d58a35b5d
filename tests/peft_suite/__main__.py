"""PEFT's own test suite as the judge of ``accelerate_peft``: its LoRA tests without acceleration
and with it.

    python -m tests.peft_suite            every file below; writes benchmarks/results/peft_suite.csv
    python -m tests.peft_suite --quick    layers, a Llama, experts and DoRA, in two minutes; writes nothing
    python -m tests.peft_suite --dry      say what would be run

The tests come from the installed PEFT's source distribution on PyPI, which is downloaded once,
checked against its SHA-256 and unpacked into a temporary directory. Both runs go on side by side,
one thread each. In the second, the harness (``plugin.py``) calls ``accelerate_peft`` on every model
that PEFT has put an adapter into; the tests do not know. A test that asks the hub for a tiny model
gets one of the same architecture (``hub.py``); nothing is downloaded. Tests that need more
(tokenizers, data, trained adapters) fail in both runs and are counted. The exit status is 1 if a
test's outcome differs between them. It takes the ``peft-suite`` extra.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.assets import Asset, AssetError, fetch
from benchmarks.common.tables import write_text
from stablelora_kernels.utils.threads import ONE_THREAD
from tests.peft_suite import hub
from tests.peft_suite.plugin import ACCELERATE, OUTCOMES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peft_suite.csv"
SHA256 = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}
NEEDED = ("datasets", "diffusers", "parameterized", "scipy", "attr", "transformers", "pytest")
# Leave out other methods with LoRA in their names.
LORA = "lora and not (adalora or vblora or randlora or gralora or tinylora or delora or unilora or xlora)"
QUICK = (
    "test_custom_models", "test_low_level_api", "test_lora_variants", "test_mixed", "test_decoder_models",
    "test_target_parameters", "test_initialization",
)  # fmt: skip
# Of these files: layers, a Llama, experts, DoRA, and the low-level API.
QUICK_TESTS = (
    "test_low_level_api or test_lora_variants or test_mixed or (test_initialization and dora) or (test_custom_models and ("
    "TestMultipleActiveAdapters or test_training_custom_models or test_disable_adapters_with_merging or test_safe_merge or "
    "test_forward_bfloat16_no_autocast)) or ((test_target_parameters or LlamaForCausalLM) and (test_training_decoders or "
    "test_merge_layers or test_disable_adapter or test_mixed_adapter_batches or test_load_multiple_adapters))"
)
FILES = (
    *QUICK, "test_encoder_decoder_models", "test_feature_extraction_models", "test_seq_classifier",
    "test_lora_conversion", "test_lora_ga", "test_lora_intruders",
    "test_lorafa", "test_loraplus",
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
    return [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "-k",
        keyword,
        *(f"tests/{name}.py" for name in files),
    ]


def environment(outcomes: Path, cache: Path, accelerate: bool, backend: str) -> dict[str, str]:
    more = {
        OUTCOMES: str(outcomes),
        ACCELERATE: str(int(accelerate)),
        # PEFT's package of tests has the name of this repository's.
        "PYTHONPATH": os.pathsep.join(
            (str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", ""))
        ),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "STABLELORA_BACKEND": backend,
    }
    return (
        ONE_THREAD | os.environ | more | ({"TRITON_INTERPRET": "1"} if backend == "triton" else {})
    )


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
            (
                subprocess.Popen(
                    command(files, keyword), cwd=source, env=env, stdout=log, stderr=log
                ),
                outcomes,
            )
        )
    for process, outcomes in running:
        # 0: all passed; 1: some failed. Otherwise some test could not even be collected.
        if process.wait() not in (0, 1) or not outcomes.exists():
            log = outcomes.with_suffix(".txt").read_text(encoding="utf-8")
            raise RuntimeError(
                f"PEFT's tests did not run (pytest's exit status {process.returncode}):\n{log[-4000:]}"
            )
    off, on = (json.loads(outcomes.read_text(encoding="utf-8")) for _, outcomes in running)
    return off, on


KINDS = ["passed", "failed", "error", "skipped", "xfailed", "xskipped", "xpassed"]


def compare(off: dict[str, str], on: dict[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tests whose outcomes differ; and of each file the count of every outcome as off/on, and
    of tests that differ.
    """
    tests = pd.DataFrame({"off": off, "on": on}, index=list(dict.fromkeys([*off, *on]))).fillna(
        "not run"
    )
    files = tests.index.map(lambda test: Path(test.partition("::")[0]).stem).rename("file")
    without, accelerated = (
        pd.crosstab(files, tests[side]).reindex(columns=KINDS, fill_value=0).astype(str)
        for side in ("off", "on")
    )
    differ = tests["off"] != tests["on"]
    counts = (without + "/" + accelerated).assign(different=differ.groupby(files).sum())
    return tests[differ], counts.reindex(files.unique()).reset_index()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.peft_suite", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="only a share of the tests, see QUICK_TESTS")
    add("--files", nargs="+", choices=FILES, metavar="FILE", help="only these")
    add("-k", dest="keyword", default=LORA, help="pytest's -k (%(default)s)")
    add(
        "--backend",
        choices=("torch", "triton"),
        default="torch",
        help="triton on a CPU is its interpreter, and slow",
    )
    add("--keep", type=Path, metavar="DIRECTORY", help="unpack and run there, and leave the logs")
    add("--dry", action="store_true", help="say what would be run, and stop")
    args = parser.parse_args(argv)
    files = args.files or (QUICK if args.quick else FILES)
    keyword = f"({args.keyword}) and ({QUICK_TESTS})" if args.quick else args.keyword
    if args.dry:
        print(shlex.join(command(files, keyword)))
        return 0
    version = metadata.version("peft")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"PEFT's tests import {', '.join(missing)}: pip install -e '.[peft-suite]'")
    if version not in SHA256:
        parser.error(
            f"peft {version} is installed, but the hash of its tests is known for {', '.join(SHA256)}"
        )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as scratch:
        directory = args.keep or Path(scratch)
        try:
            unpack(fetch(Asset("peft", version, 1, SHA256[version], sdist=True))[0], directory)
            off, on = run_both(directory, files, keyword, args.backend)
        except (AssetError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 2
    different, counts = compare(off["outcomes"], on["outcomes"])
    print(
        f"PEFT {version}, backend {args.backend}, {time.perf_counter() - started:.0f} s; without/with acceleration"
    )
    print(counts.to_string(index=False))
    print(
        "with acceleration: " + ", ".join(f"{count} {name}" for name, count in on["counts"].items())
    )
    print(
        f"{len(different)} tests differ" + (f"\n{different.to_string()}" if len(different) else "")
    )
    if not (args.quick or args.files or args.keyword != LORA or args.backend != "torch"):
        write_text(RESULTS, counts.to_csv(index=False, lineterminator="\n"))
    return 1 if len(different) else 0


if __name__ == "__main__":
    sys.exit(main())
