"""Tests over several processes, which talk over gloo."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers.interpreter import patch_language_once_a_launch


def spawn(target: Callable[..., None], world: int, place: Path, *args: Any) -> None:
    """``target(rank, world, place, *args)`` in ``world`` processes, forked from one that has imported much and run nothing."""
    multiprocessing.set_forkserver_preload([__name__, "torch.distributed.fsdp", "stablelora_kernels"])
    mp.start_processes(_one_rank, (target, world, str(place), args), nprocs=world, start_method="forkserver")


def _one_rank(rank: int, target: Callable[..., None], world: int, place: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    patch_language_once_a_launch()
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/meet{world}{target.__name__}", rank=rank, world_size=world
    )
    target(rank, world, Path(place), *args)
    dist.barrier()
    dist.destroy_process_group()
