"""Processes of tests: several that talk over gloo, one that is this test's alone, and fresh ones
that run Python code.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers.interpreter import speed_up_interpreter

ROOT = Path(__file__).resolve().parents[2]
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux",
    reason="runs on Linux where PyTorch has gloo",
)
# What most targets import. Forked processes share it; where it is missing, the server goes on without.
_IN_CHILDREN = ("peft", "transformers.models.llama.modeling_llama", "transformers.trainer")


def spawn(target: Callable[..., Any], world: int, directory: Path, *args: Any) -> list[Any]:
    """What ``target(rank, world, directory, *args)`` returns in each of ``world`` processes.

    They are forked from one that has imported much and run nothing.
    """
    multiprocessing.set_forkserver_preload(
        [__name__, "torch.distributed.fsdp", "stablelora_kernels", *_IN_CHILDREN]
    )
    mp.start_processes(
        _one_rank, (target, world, str(directory), args), nprocs=world, start_method="forkserver"
    )
    return [
        torch.load(directory / f"result{rank}of{world}.pt", weights_only=False)
        for rank in range(world)
    ]


def _one_rank(
    rank: int, target: Callable[..., Any], world: int, directory: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    speed_up_interpreter()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meet{world}{target.__name__}",
        rank=rank,
        world_size=world,
    )
    result = target(rank, world, Path(directory), *args)
    torch.save(result, Path(directory) / f"result{rank}of{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def answer_of(action: Callable[[], Any], method: str, timeout: float = 600) -> tuple[Any, int]:
    """What ``action``, which can be pickled, returns in a process that is started by ``method``,
    and the signal that killed it.

    What the action raises fails the test.
    """
    context = multiprocessing.get_context(method)
    reading, writing = context.Pipe(duplex=False)
    # Bytes: multiprocessing would send tensors through shared memory, and the child would change
    # the ones here.
    child = context.Process(target=_answer, args=(pickle.dumps(action), writing))
    child.start()
    writing.close()
    try:
        assert reading.poll(timeout), f"a process started by {method} hangs"
        error, answer = reading.recv()
        assert error is None, error
    except EOFError:
        answer = None
    except BaseException:
        child.kill()
        raise
    finally:
        child.join()
    return answer, -(child.exitcode or 0)


def _answer(pickled: bytes, writing: Any) -> None:
    try:
        torch.set_num_threads(1)
        writing.send((None, pickle.loads(pickled)()))
    except BaseException:
        writing.send((traceback.format_exc(), None))


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a fresh process, which gets none of this one's settings but ``env``."""
    settings = (
        "STABLELORA_BACKEND",
        "STABLELORA_STRATEGY",
        "STABLELORA_FIRST_USE",
        "TRITON_INTERPRET",
    )
    environment = {name: value for name, value in os.environ.items() if name not in settings} | env
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def printed(code: str, **env: str) -> str:
    """What ``code`` prints in a fresh process, or why it failed."""
    done = python(code, **env)
    return done.stdout.strip() if done.returncode == 0 else done.stderr
