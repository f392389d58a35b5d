"""Autotuning, off by default: it measures kernels and tiles for a call of ``lora_linear`` once and keeps the answer on disk.

Each candidate runs on the call's own tensors. That is safe: launches overwrite their result, and the call runs the winner
once more at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels._version import __version__
from stablelora_kernels.dispatch import backend, problem, rules
from stablelora_kernels.dispatch.problem import Call, Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.settings import KERNELS, get_autotune, get_kernel, tf32_allowed
from stablelora_kernels.dispatch.tiles import Tile

logger = logging.getLogger("stablelora_kernels")


def time_on_gpu(run: Callable[[], None]) -> float:
    """Median seconds of ``run`` on the current GPU, with a cold L2 cache, as between a model's layers."""
    import triton.testing

    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median") * 1e-3


# Tests replace it.
measure: Callable[[Callable[[], None]], float] = time_on_gpu

# A candidate must beat the table's choice by more than this. Less is noise, which would make answers differ from run to run.
TIE = 0.02


def _tiles(device: Device, call: Call) -> list[Tile]:
    """Tiles worth trying besides the table's."""
    size = call.dtype.itemsize
    if call.m <= problem.SMALL_M:
        # 8 to 32 KiB of W a stage: less leaves the memory idle, more leaves no room for stages. The plan sets BLOCK_M.
        sizes = [(n, k) for n in (32, 64, 128) for k in (64, 128, 256) if 8 <= n * k * size / 1024 <= 32]
        return [Tile(16, n, k, 4, 4) for n, k in sizes]
    if size == 4:
        return [Tile(32, 64, 32, 4, 3), Tile(128, 64, 32, 8, 3), Tile(128, 128, 32, 8, 3)]
    tiles = [Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4), Tile(128, 64, 64, 4, 4)]
    if 100 <= device.generation < 120:
        # Wider ones outgrow tensor memory.
        return tiles
    tiles.append(Tile(64, 256, 64, 8, 3))
    # Without descriptors, this tile is too wide for the registers.
    return [*tiles, Tile(128, 256, 64, 8, 3)] if device.tma else tiles


def candidates(device: Device, call: Call) -> list[Choice]:
    """The table's choice, then every kernel that can do ``call``, with the table's tile and with others."""
    found = [rules.choose(device, call)]
    for kernel in rules.possible_kernels(call):
        tiles = [] if kernel == "vendor" else _tiles(device, call)
        found += [Choice(kernel, "", tile) for tile in (None, *tiles)]
    return found


def _name(choice: Choice) -> str:
    t = choice.tile
    if choice.kernel == "vendor":
        return "vendor"
    if t is None:
        return f"{choice.kernel}, the table's tile"
    return f"{choice.kernel}, {t.BLOCK_M}x{t.BLOCK_N}x{t.BLOCK_K}, {t.num_warps} warps, {t.num_stages} stages"


def _layout(t: Tensor) -> str:
    """A matrix's layout in words, "" for the usual one. It decides on wide loads and descriptors."""
    if 0 in t.stride() or 1 not in t.stride():
        return "strided"
    unaligned = (t.data_ptr() | max(t.stride()) * t.element_size()) % 16
    return " ".join(word for word, on in (("transposed", t.stride(1) != 1), ("unaligned", unaligned)) if on)


def entry_key(call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> str:
    """The calls that share an answer, in words.

    M is rounded up to a power of two, so that batches of any size share few answers. The table's limits on M are powers of two
    as well. The key leaves out what hardly costs time: dropout's probability, the strides of A and B, and whether dA, dB and S
    are wanted. A checkpointed layer thus takes the same kernel when its forward runs again.
    """
    m = 1 << (call.m - 1).bit_length()
    words = [f"{call.direction} m<={m} n={call.n} k={call.k} r={call.r}", str(call.dtype), f"lora {call.lora_dtype}"]
    if call.dtype == torch.float32 and tf32_allowed():
        words.append("tf32")
    # Dropout draws random numbers; a bias takes the vendor's other entry point.
    words += [word for word, on in (("dropout", call.dropout), ("bias", bias is not None)) if on]
    words += [f"{name} {layout}" for name, layout in (("x", _layout(x)), ("w", _layout(w))) if layout]
    return ", ".join(words).replace("torch.", "")


def _run(launches: list[Any], device: torch.device) -> None:
    for launch in launches:
        launch.run(device)


def _signature(launches: list[Any]) -> str:
    names = ("variant", "grid", "constants", "options")
    return str([[getattr(launch, name, None) for name in names] for launch in launches])


def _close(out: Tensor, expected: Tensor) -> bool:
    scale = expected.nan_to_num().abs().max().item()
    return torch.allclose(out, expected, rtol=0, atol=scale / 16, equal_nan=True)


def _measure_all(
    device: Device, call: Call, build: Callable[..., list[Any]], y: Tensor, key: str
) -> dict[str, Any] | None:
    """The entry for ``key``: the fastest choice, all times, and why candidates failed. None if the table's choice failed."""
    times: dict[str, float] = {}
    skipped: dict[str, str] = {}
    chosen: dict[str, Choice] = {}
    seen: set[str] = set()
    # Compare results on some rows: a compiler may emit an empty kernel without an error, which would be the fastest.
    sample = y[:: max(1, call.m // 64)]
    expected: Tensor | None = None
    for choice in candidates(device, call):
        name = _name(choice)
        try:
            launches = build(choice=choice)
            if _signature(launches) in seen:
                continue
            seen.add(_signature(launches))
            run = partial(_run, launches, y.device)
            y.fill_(float("nan"))
            run()
            if expected is None:
                expected = sample.clone()
            elif not _close(sample, expected):
                raise RuntimeError("its result is not the table's")
            times[name], chosen[name] = measure(run), choice
        # The compiler and the driver raise many kinds.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            logger.debug("%s: %s is skipped: %s", key, name, reason)
            skipped[name] = reason
            if not times:
                return None
    table, best = next(iter(times)), min(times, key=times.__getitem__)
    shown = {name: round(seconds * 1e6, 1) for name, seconds in times.items()}
    if times[best] < times[table] * (1 - TIE):
        reason = f"measured: {shown[best]} us against the table's {shown[table]} us"
    else:
        best = table
        reason = f"measured: the table's {shown[table]} us, of {len(times)} none is more than {TIE:.0%} faster"
    tile = chosen[best].tile
    return {
        "kernel": chosen[best].kernel,
        "tile": None if tile is None else tile._asdict(),
        "reason": reason,
        "microseconds": shown,
        "skipped": skipped,
    }


# The cache has one file for each GPU and set of versions.

SCHEMA = 1
_warned: set[tuple[str, Path]] = set()


def cache_dir() -> Path:
    """The directory of answers: ``tuning`` in the environment's ``STABLELORA_CACHE``, or in ``~/.cache/stablelora-kernels``."""
    # Unlike Path's, this expanduser never raises.
    cache = os.path.expanduser(os.environ.get("STABLELORA_CACHE") or "~/.cache/stablelora-kernels")
    return Path(cache).absolute() / "tuning"


@cache
def _made_for(device: Device, torch_device: torch.device) -> tuple[str, dict[str, Any]]:
    """The cache file's name for this GPU and these versions, and the GPU and versions themselves."""
    import triton

    name = (
        torch.cuda.get_device_name(torch_device)
        if torch_device.type == "cuda"
        else f"interpreter on {torch_device.type}"
    )
    made_for = {
        "device": name,
        "arch": device.arch,
        "processors": device.processors,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "stablelora_kernels": __version__,
    }
    digest = hashlib.sha256(json.dumps(made_for).encode()).hexdigest()[:12]
    return f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{digest}.json", made_for


def _warn_once(message: str, path: Path, error: Exception) -> None:
    if (message, path) not in _warned:
        _warned.add((message, path))
        warnings.warn(f"{message} {path}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)


def _to_choice(entry: dict[str, Any]) -> Choice:
    kernel, tile = entry["kernel"], entry["tile"]
    if kernel not in KERNELS[1:]:
        raise ValueError(f"there is no kernel {kernel!r}")
    sizes = None if tile is None else {name: int(size) for name, size in tile.items()}
    return Choice(kernel, entry["reason"], None if sizes is None else Tile(**sizes))


def _read(path: Path, made_for: dict[str, Any]) -> dict[str, Any]:
    """The entries of a file; none if it is missing or unusable."""
    try:
        content = json.loads(path.read_text())
        for name, wanted in (("schema", SCHEMA), ("made_for", made_for)):
            if content[name] != wanted:
                raise ValueError(f"{name} is {content[name]!r}, expected {wanted!r}")
        for entry in content["entries"].values():
            _to_choice(entry)
        return content["entries"]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        _warn_once("lora_linear is tuned again, because this file can't be used:", path, error)
        return {}


def _write(path: Path, made_for: dict[str, Any], key: str, entry: dict[str, Any]) -> None:
    """Add an entry to a file, and keep the entries that other processes have written in the meantime."""
    # A dependency of PyTorch.
    from filelock import FileLock

    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=10):
            entries = _read(path, made_for) | {key: entry}
            content = {"schema": SCHEMA, "made_for": made_for, "entries": entries}
            try:
                scratch.write_text(json.dumps(content, indent=2) + "\n")
                # Atomic, because other processes read without the lock.
                os.replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)
    # File systems without locks raise NotImplementedError.
    except (OSError, NotImplementedError) as error:
        _warn_once("measurements of lora_linear can't be kept in", path, error)


# This process's answers; None where the table's own choice can't be measured.
_answers: dict[tuple[str, str], Choice | None] = {}


def _capturing(y: Tensor) -> bool:
    return y.is_cuda and torch.cuda.is_current_stream_capturing()


def choose(
    device: Device, call: Call, build: Callable[..., list[Any]], y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None
) -> Choice | None:
    """The fastest choice for a call, or None if the table decides.

    ``build(choice=...)`` returns launches that write all of ``y`` from ``x``, ``w`` and ``bias``.
    """
    if not get_autotune() or get_kernel() != "auto":
        return None
    if not y.numel() or torch.are_deterministic_algorithms_enabled():
        return None
    # Times of the interpreter say nothing about a GPU.
    if measure is time_on_gpu and (backend.INTERPRETING or not y.is_cuda):
        return None
    name, made_for = _made_for(device, y.device)
    key = entry_key(call, x, w, bias)
    if (name, key) not in _answers:
        path = cache_dir() / name
        entry = _read(path, made_for).get(key)
        if entry is None:
            if _capturing(y):
                return None
            with torch.cuda.device_of(y):
                entry = _measure_all(device, call, build, y, key)
            if entry is not None:
                _write(path, made_for, key, entry)
        _answers[name, key] = None if entry is None else _to_choice(entry)
        logger.info("%s: %s", key, "the table's choice can't be measured" if entry is None else entry["reason"])
    return _answers[name, key]
