"""Run a command of this repository under another release of Triton, which stands in the cache
directory and is not installed.

torch pins one Triton each, so users have releases that this environment does not have.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.common.assets import cache_dir

# The releases that the CUDA builds of torch 2.11 to 2.15 pin. A new one is added once its kernels
# are proven: CONTRIBUTING.md.
PINNED = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")


class TritonError(RuntimeError):
    """A release of Triton could not be fetched."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--triton``, which :func:`run_again` acts on."""
    parser.add_argument(
        "--triton", metavar="VERSION", help="use this release of Triton; pip fetches it once"
    )


def directory_of(version: str) -> Path:
    """The directory with this release of Triton. pip downloads it if the cache directory lacks it.

    Raises:
        TritonError: pip could not fetch it.
    """
    directory = cache_dir() / f"triton-{version}"
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that the directory appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".partial-") as scratch:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        unpacked = Path(scratch) / "triton"
        done = subprocess.run(
            [*install, "--target", unpacked, f"triton=={version}"], capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise TritonError(f"Triton {version} could not be fetched: {last}")
        if not directory.is_dir():
            unpacked.rename(directory)
    return directory


def run_again(module: str, version: str | None, arguments: Sequence[str] | None) -> None:
    """Replace this process by ``python -m module arguments`` under Triton ``version``. Return if
    this is that Triton.

    Args:
        module: what ``python -m`` runs.
        version: a full release, as "3.8.0"; None asks for the environment's.
        arguments: the command line without the program's name; None takes this process's.

    Raises:
        TritonError: pip could not fetch the release, or Python still imports another one.
    """
    if version is None or version == (here := metadata.version("triton")):
        return
    directory = str(directory_of(version))
    if directory in sys.path:
        raise TritonError(f"Triton {version} is in {directory}, but Python imports Triton {here}")
    path = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (directory, path)))}
    sys.stdout.flush()
    command = [sys.executable, "-m", module, *(sys.argv[1:] if arguments is None else arguments)]
    os.execve(sys.executable, command, environment)
