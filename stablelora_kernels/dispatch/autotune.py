"""Autotuning, off by default: it measures strategies and tiles for a call of ``lora_linear`` once
and keeps the answer on disk.

Each candidate runs on the call's own tensors. That is safe: launches overwrite their result, and
the call runs the winner once more at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from stablelora_kernels._version import __version__
from stablelora_kernels.dispatch import backend, problem, rules
from stablelora_kernels.dispatch.problem import Call, Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.settings import get_kernel, tf32_allowed
from stablelora_kernels.dispatch.tiles import Tile

logger = logging.getLogger("stablelora_kernels")


def time_on_gpu(run: Callable[[], None]) -> float:
    """Median seconds of ``run`` on the current GPU, with a cold L2 cache, as between a model's
    layers.
    """
    import triton.testing

    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median") * 1e-3


# Tests replace it.
measure: Callable[[Callable[[], None]], float] = time_on_gpu

# A candidate must beat the table's choice by more than this. Less is noise, which would make
# answers differ from run to run.
TIE = 0.02


def _tiles(device: Device, call: Call) -> list[Tile]:
    """Tiles worth trying besides the table's."""
    size = call.dtype.itemsize
    if call.m <= problem.SMALL_M:
        # 8 to 32 KiB of W a stage: less leaves the memory idle, more leaves no room for stages. The
        # plan sets BLOCK_M.
        sizes = [
            (n, k) for n in (32, 64, 128) for k in (64, 128, 256) if 8 <= n * k * size / 1024 <= 32
        ]
        return [Tile(16, n, k, 4, 4) for n, k in sizes]
    if size == 4:
        return [Tile(32, 64, 32, 4, 3), Tile(128, 64, 32, 8, 3), Tile(128, 128, 32, 8, 3)]
    tiles = [
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 4),
        Tile(128, 64, 64, 4, 4),
    ]
    if 100 <= device.generation < 120:
        # The table has the wider one for descriptors. Through pointers none is proven: where tensor
        # memory is too small, the compiler returns an empty kernel.
        return tiles
    tiles.append(Tile(64, 256, 64, 8, 3))
    if device.nvidia:
        # Without descriptors, the registers and a small shared memory have room for shallow steps
        # only.
        tiles.append(Tile(128, 256, 64, 8, 3) if device.tma else Tile(128, 256, 32, 8, 4))
    return tiles


def candidates(device: Device, call: Call) -> dict[str, Choice]:
    """By name, the table's choice first, then every strategy that can do ``call``, with the table's
    tile and with others.
    """
    choices = [rules.choose(device, call)]
    for strategy in rules.possible_strategies(call):
        tiles = [] if strategy == "vendor" else _tiles(device, call)
        choices += [Choice(strategy, "", tile) for tile in (None, *tiles)]
    return {_name(choice): choice for choice in choices}


def _name(choice: Choice) -> str:
    """The strategy, and the tile if it is not the table's, in words."""
    if choice.tile is None:
        return choice.strategy
    tile = choice.tile
    sizes = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    return f"{choice.strategy}, {sizes}, {tile.num_warps} warps, {tile.num_stages} stages"


def call_key(call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> str:
    """The calls that share an answer, in words.

    M is rounded up to a power of two, so that batches of any size share few answers. The table's
    limits on M are powers of two as well. The key leaves out what hardly costs time: dropout's
    probability, the strides of A and B, and whether dA, dB and S are wanted. A checkpointed layer
    thus takes the same strategy when its forward runs again.
    """
    call = call._replace(m=1 << (call.m - 1).bit_length())
    tf32 = call.dtype == torch.float32 and tf32_allowed()
    # The launch that adds a bias has other code.
    return f"{call}, tf32={tf32}, bias={bias is not None}, x {_layout(x)}, w {_layout(w)}"


def _layout(t: Tensor) -> str:
    """A matrix's layout in words. It decides on wide loads and descriptors."""
    if 0 in t.stride() or 1 not in t.stride():
        return "strided"
    unaligned = (t.data_ptr() | max(t.stride()) * t.element_size()) % 16
    return f"by {'rows' if t.stride(1) == 1 else 'columns'}{', unaligned' if unaligned else ''}"


@cache
def _made_for(device: Device, torch_device: torch.device) -> str:
    """The GPU and the versions that an answer holds for, in words."""
    import triton

    on_gpu = torch_device.type == "cuda"
    name = (
        torch.cuda.get_device_name(torch_device)
        if on_gpu
        else f"interpreter on {torch_device.type}"
    )
    versions = (
        f"torch {torch.__version__}, triton {triton.__version__}, stablelora_kernels {__version__}"
    )
    return f"{name}, {device}, cuda {torch.version.cuda}, hip {torch.version.hip}, {versions}"


def _run(launches: list[Any], device: torch.device) -> None:
    """Run the launches one after another."""
    for launch in launches:
        launch.run(device)


def _signature(launches: list[Any]) -> str:
    """Equal for launches that would run the same code in the same grids."""
    names = ("variant", "grid", "constants", "options")
    return str([[getattr(launch, name, None) for name in names] for launch in launches])


def _measure_all(
    choices: dict[str, Choice], build: Callable[..., list[Any]], y: Tensor, key: str
) -> dict[str, Any] | None:
    """The answer: the fastest of ``choices``, all times, and why some failed. None if the first
    one, the table's, failed.
    """
    times: dict[str, float] = {}
    skipped: dict[str, str] = {}
    seen: set[str] = set()
    # Compare results on some rows: a compiler may emit an empty kernel without an error, which
    # would be the fastest.
    sample = y[:: max(1, y.shape[0] // 64)]
    expected: Tensor | None = None
    for name, choice in choices.items():
        try:
            launches = build(choice=choice)
            if _signature(launches) in seen:
                continue
            seen.add(_signature(launches))
            run = partial(_run, launches, y.device)
            y.fill_(float("nan"))
            run()
            if expected is None:
                expected, bound = sample.clone(), sample.nan_to_num().abs().max().item() / 16
            elif not torch.allclose(sample, expected, rtol=0, atol=bound, equal_nan=True):
                raise RuntimeError("its result is not the table's")
            times[name] = measure(run)
        # The compiler and the driver raise many kinds.
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {error}".split("\n")[0]
            logger.debug("%s: %s is skipped: %s", key, name, skipped[name])
            if not times:
                return None
    table, best = next(iter(times)), min(times, key=times.__getitem__)
    shown = {name: round(seconds * 1e6, 1) for name, seconds in times.items()}
    if times[best] < times[table] * (1 - TIE):
        reason = f"measured: {shown[best]} us against the table's {shown[table]} us"
    else:
        best = table
        reason = f"measured: the table's {shown[table]} us, of {len(times)} none is more than {TIE:.0%} faster"
    return {"choice": best, "reason": reason, "microseconds": shown, "skipped": skipped}


def cache_dir() -> Path:
    """The directory of answers: ``tuning`` in the environment's ``STABLELORA_CACHE``, or in
    ``~/.cache/stablelora-kernels``.
    """
    # Unlike Path's, this expanduser never raises.
    cache = os.path.expanduser(os.environ.get("STABLELORA_CACHE") or "~/.cache/stablelora-kernels")
    return Path(cache).absolute() / "tuning"


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _read(path: Path, key: str, choices: dict[str, Choice]) -> dict[str, Any] | None:
    """The answer in a file; None if the file is missing or unusable."""
    try:
        answer = json.loads(path.read_text())
        for name, known in (("key", [key]), ("choice", choices)):
            if answer[name] not in known:
                raise ValueError(f"{name} must be one of {[*known]}, got {answer[name]!r}")
        return answer | {"reason": str(answer["reason"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    # A damaged file may raise anything.
    except Exception as error:
        _warn_once(
            f"lora_linear is tuned again, because {path} can't be used: {type(error).__name__}: {error}"
        )
        return None


def _write(path: Path, key: str, answer: dict[str, Any]) -> None:
    """Keep the answer in a file, or warn once."""
    scratch = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_text(json.dumps({"key": key, **answer}, indent=2) + "\n")
            # Atomic: other processes may read or write it now.
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        _warn_once(f"measurements of lora_linear can't be kept in {path.parent}: {error.strerror}")


# This process's answers by key; None where the table's own choice can't be measured.
_answers: dict[str, Choice | None] = {}


def _capturing(y: Tensor) -> bool:
    """Whether a CUDA graph records the stream, so that nothing can be measured."""
    return y.is_cuda and torch.cuda.is_current_stream_capturing()


def choose(
    device: Device,
    call: Call,
    build: Callable[..., list[Any]],
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
) -> Choice | None:
    """The fastest choice for a call, with autotuning on, or None if the table decides.

    ``build(choice=...)`` returns launches that write all of ``y`` from ``x``, ``w`` and ``bias``.
    """
    off = get_kernel() != "auto" or torch.are_deterministic_algorithms_enabled()
    # Times of the interpreter say nothing about a GPU. On the meta device nothing can be measured.
    meaningless = y.is_meta or (measure is time_on_gpu and (backend.INTERPRETING or not y.is_cuda))
    if off or meaningless or not y.numel():
        return None
    key = f"{call_key(call, x, w, bias)}, on {_made_for(device, y.device)}"
    if key not in _answers:
        choices = candidates(device, call)
        # A file for each key: processes that write at the same time lose nothing, without a lock.
        path = cache_dir() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        answer = _read(path, key, choices)
        if answer is None:
            if _capturing(y):
                return None
            with torch.cuda.device_of(y):
                answer = _measure_all(choices, build, y, key)
            if answer is not None:
                _write(path, key, answer)
        choice = (
            None if answer is None else choices[answer["choice"]]._replace(reason=answer["reason"])
        )
        logger.info(
            "%s: %s",
            key,
            "the table's choice can't be measured" if choice is None else choice.reason,
        )
        _answers[key] = choice
    return _answers[key]
