"""The two files of an adapter, as one unit: find, read and write them.

A saver puts both new files into the directory ``PENDING`` first, and removes the old config next.
From then on the adapter is what ``PENDING`` still holds, and the rest of the directory: a reader
always finds the old pair or the new one. PEFT, which does not look into ``PENDING``, finds the old
pair, no config, or the new pair. Both files carry a stamp, which a reader compares: it tells a
config from weights that were saved with another one, even if something else has mixed them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from stablelora_kernels.model.reports import list_some
from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.hub import from_hub, is_hub_id
from stablelora_kernels.utils.lock import locked

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PENDING = ".adapter_save"
# The key of the stamp in the metadata of the weights, and in the config's auto_mapping: of an
# unknown field, PEFT would warn.
STAMP = "stablelora_kernels"
PICKLES = (".bin", ".pt", ".pth", ".pkl")
# A reader begins again if a saver replaces the files meanwhile.
_ATTEMPTS = 100

T = TypeVar("T")


class Adapter(NamedTuple):
    """An adapter that was read: its files, the config's object and a value for each tensor."""

    config_file: Path
    weights_file: Path
    # None if the weights are alone.
    config: dict[str, Any] | None
    tensors: dict[str, Any]


def import_safetensors() -> Any:
    return import_extra("safetensors.torch", "adapters", "an adapter's file")


def adapter_directory(
    path: str | os.PathLike[str], revision: str | None = None, subfolder: str | None = None
) -> str | os.PathLike[str]:
    """The directory of an adapter: ``path``, or a download if nothing is there and ``path`` is a
    hub id. See ``load_adapter``.
    """
    for name, value in (("revision", revision), ("subfolder", subfolder)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be a string or None, got {type(value).__name__}")
    if subfolder is not None and (
        PurePosixPath(subfolder).is_absolute() or ".." in PurePosixPath(subfolder).parts
    ):
        raise ValueError(f"subfolder must be a relative path inside of path, got {subfolder!r}")
    if isinstance(path, str) and is_hub_id(path) and not Path(path).exists():
        names = (CONFIG_NAME, WEIGHTS_NAME)
        wanted = [str(PurePosixPath(subfolder or "", name)) for name in names]
        repository, path = path, from_hub("path", path, wanted, revision)
        if missing := [name for name in wanted if not Path(path, name).is_file()]:
            raise ValueError(
                f"path must name a hub repository with safetensors, got {repository!r} without {', '.join(missing)}"
            )
    elif revision is not None:
        where = "a path on this machine" if Path(path).exists() else "which is none"
        raise ValueError(f"revision is for hub ids, got {revision!r} with {str(path)!r}, {where}")
    return path if subfolder is None else Path(path, subfolder)


def find_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The config and the weights file in the directory ``path``; raises ValueError if one is
    missing.
    """
    directory = Path(path)
    if not directory.is_dir():
        what = "a file" if directory.exists() else "nothing there"
        raise ValueError(
            f"path must be a directory on this machine with {CONFIG_NAME}, got {str(path)!r} ({what})"
        )
    config = directory / CONFIG_NAME
    weights = directory / WEIGHTS_NAME
    pending = directory / PENDING
    if not config.is_file():
        if _is_save(pending):
            config = pending / CONFIG_NAME
        # A saver may have moved it meanwhile.
        elif not config.is_file():
            raise ValueError(f"path must hold {CONFIG_NAME}, got {str(path)!r} without it")
    if config.parent == pending and (pending / WEIGHTS_NAME).is_file():
        # A save that was committed and is not finished. Its saver may move them before they are
        # read.
        return config, pending / WEIGHTS_NAME
    if not weights.is_file():
        if pickles := [file.name for file in sorted(directory.iterdir()) if file.suffix in PICKLES]:
            raise ValueError(
                f"path must hold {WEIGHTS_NAME}, got {str(path)!r} with {list_some(pickles)}: a pickle can run code, so it is "
                "refused"
            )
        raise ValueError(f"path must hold {WEIGHTS_NAME}, got {str(path)!r} without it")
    return config, weights


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON, got text that is not: {error}") from None
    except RecursionError:
        raise ValueError(
            f"{file} must be JSON of a few levels, got it nested too deep to read"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}")
    return content


def read_adapter(path: str | os.PathLike[str], convert: Callable[[Tensor], T]) -> Adapter:
    """Read both files in the directory ``path``, of one save. ``convert`` gets one tensor at a
    time.

    It raises ValueError if a file is missing or damaged or the two are of different saves, OSError
    if one cannot be read.
    """
    missing: OSError | None = None
    for _ in range(_ATTEMPTS):
        config_file, weights_file = find_files(path)
        before = _identity(config_file)
        damaged: ValueError | None = None
        try:
            adapter = read_pair(config_file, weights_file, convert)
        except FileNotFoundError as error:
            # A saver has moved it.
            missing = error
            continue
        except ValueError as error:
            damaged = error
        if before is not None and _identity(config_file) == before:
            if damaged is not None:
                raise damaged
            return adapter
    raise missing or ValueError(
        f"{str(path)!r} must stay one adapter while it is read, got saves to it all the time"
    )


def read_pair(config_file: Path, weights_file: Path, convert: Callable[[Tensor], T]) -> Adapter:
    """Read these two files. The config may be missing. Raises ValueError if both have a stamp, and
    not the same.
    """
    config = read_json(config_file) if config_file.is_file() else None
    tensors, stamp = _read_tensors(weights_file, convert)
    mapping = (config or {}).get("auto_mapping")
    # A config that was edited keeps its stamp.
    config_stamp = mapping.get(STAMP) if isinstance(mapping, dict) else None
    if config_stamp is not None and stamp is not None and config_stamp != stamp:
        raise ValueError(
            f"{config_file} and {weights_file} must be of one save, got a config of {config_stamp!r} and weights of "
            f"{stamp!r}; save the adapter again, or, if they do belong together, remove {STAMP!r} from auto_mapping in the config"
        )
    return Adapter(config_file, weights_file, config, tensors)


def _read_tensors(file: Path, convert: Callable[[Tensor], T]) -> tuple[dict[str, T], str | None]:
    """What ``convert`` makes of each tensor in a safetensors file, and the file's stamp."""
    safe_open = import_safetensors().safe_open
    # For the error: safetensors says "No such file" of whatever it cannot open.
    with open(file, "rb"):
        pass
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            keys = opened.keys()
            tensors = {key: convert(opened.get_tensor(key)) for key in keys}
            return tensors, metadata.get(STAMP)
    except FileNotFoundError:
        raise
    except Exception as error:  # SafetensorError, which derives from Exception, and what PyTorch makes of its dtypes.
        raise ValueError(
            f"{file} must be a safetensors file, got one that cannot be read: {error}"
        ) from None


def _identity(file: Path) -> tuple[int, ...] | None:
    """Numbers that change when the file is replaced, or None if it is gone."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


def write_adapter(
    directory: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> None:
    """Write both files to ``directory``; see the module's docstring. One process writes at a time,
    the others wait.
    """
    with locked(directory / f"{PENDING}.lock") as alone:
        _finish(directory)
        temporary = directory / f"{PENDING}.{'tmp' if alone else uuid.uuid4().hex}"
        # A dead process has left it: a living one would hold the lock.
        _remove(temporary)
        try:
            # Without locks, another process that fails may have removed the directory.
            temporary.mkdir(parents=True)
            _write_files(temporary, config, tensors)
            old = directory / CONFIG_NAME
            if old.is_file() and old.read_bytes() == (temporary / CONFIG_NAME).read_bytes():
                # One file is one unit.
                os.replace(temporary / WEIGHTS_NAME, directory / WEIGHTS_NAME)
            else:
                os.replace(temporary, directory / PENDING)
                old.unlink(missing_ok=True)
        finally:
            _remove(temporary)
            _finish(directory)


def _write_files(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's two files, with one stamp, to ``directory``."""
    # The same for the same adapter, another for another scaling.
    stamp = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    content = dict(config) | {
        "auto_mapping": dict(config.get("auto_mapping") or {}) | {STAMP: stamp}
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    weights = directory / WEIGHTS_NAME
    safetensors = import_safetensors()
    metadata = {"format": "pt", STAMP: stamp}
    try:
        safetensors.save_file(tensors, weights, metadata=metadata)
    except KeyError as error:
        # Its table of dtypes.
        names = [name for name, tensor in tensors.items() if str(tensor.dtype) in str(error)]
        raise ValueError(
            f"{list_some(names)} must be of a dtype that safetensors can hold, got {error}"
        ) from None
    except Exception as error:
        # It reports a full disk so, too.
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"{weights} could not be written: {error}") from None
    _order_metadata(weights, metadata)
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
    # safetensors gives only the owner permission to read its file.
    shutil.copymode(directory / CONFIG_NAME, weights)


def _order_metadata(weights: Path, metadata: Mapping[str, str]) -> None:
    """Give the metadata in the header its order. safetensors writes it in a random one; the same
    adapter gives the same bytes.
    """
    ordered = f'{{"__metadata__":{json.dumps(metadata, separators=(",", ":"))}'.encode()
    with open(weights, "r+b") as file:
        # The header's length comes first.
        file.seek(8)
        if sorted(file.read(len(ordered))) == sorted(ordered):
            file.seek(8)
            file.write(ordered)


def _finish(directory: Path) -> None:
    """Finish a save that was committed, and drop one that was not."""
    pending = directory / PENDING
    if not (directory / CONFIG_NAME).exists() and _is_save(pending):
        with contextlib.suppress(FileNotFoundError):
            os.replace(pending / WEIGHTS_NAME, directory / WEIGHTS_NAME)
        os.replace(pending / CONFIG_NAME, directory / CONFIG_NAME)
    _remove(pending)


def _is_save(pending: Path) -> bool:
    """Whether a saver has committed ``pending``. No saver makes a link: what a link names belongs
    to someone else.
    """
    return not pending.is_symlink() and (pending / CONFIG_NAME).is_file()


def _remove(path: Path) -> None:
    """Remove a directory, a file or a link if it is there and can be removed, but nothing that a
    link names.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
