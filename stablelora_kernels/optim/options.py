"""A group's hyperparameters, and how state is kept: their types and checks, none of which changes
its argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from stablelora_kernels.optim import staging
from stablelora_kernels.utils.names import check_patterns
from stablelora_kernels.utils.validation import check_bool, check_choice, check_float, check_int

# A hyperparameter that a schedule may change: a number, or a 0-d tensor that its owner writes to.
Number = float | Tensor
LiveName = Literal["lr", "weight_decay", "shrink_ratio"]
# Hyperparameters that may be tensors. Schedulers change their numbers between replays of a CUDA
# graph, too.
LIVE: tuple[LiveName, ...] = ("lr", "weight_decay", "shrink_ratio")
# Computed in float32, and rounded at random or from a float32 master.
LOW_PRECISION = (torch.bfloat16, torch.float16)
STOP_CONDITIONS = ("norm", "never")


class Hyper(TypedDict):
    """The hyperparameters of a parameter group."""

    lr: Number
    betas: tuple[float, float]
    eps: float
    weight_decay: Number
    shrink_ratio: Number
    shrink_pattern: dict[str, float]
    stop_condition: str
    lr_ratio_B: float
    maximize: bool
    amsgrad: bool
    capturable: bool
    seed: int
    max_grad_norm: float | None


class Storage(NamedTuple):
    """How state is kept: the moments' dtype, and whether bfloat16 and float16 parameters have a
    float32 master.

    float64 parameters have float64 moments. torch.uint8 stands for 8 bits by blocks: codes in the
    parameter's shape, and float32 scales in a second tensor named with "_scale".
    """

    moments_dtype: torch.dtype = torch.float32
    master_weights: bool = False

    def moment_dtype(self, p: Tensor) -> torch.dtype:
        return torch.float64 if p.dtype is torch.float64 else self.moments_dtype

    def has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in LOW_PRECISION


def _check_number(name: str, value: object, high: float = math.inf) -> Number:
    """A number in [0, high), or a tensor of one element. Keep the tensor, since its value may
    change; do not read it on a GPU.
    """
    if not isinstance(value, Tensor):
        return check_float(name, value, low=0.0, high=high)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name} as a tensor must be a 0-d floating-point one, got {list(value.shape)} of {value.dtype}"
        )
    if value.device.type == "cpu":
        check_float(name, value.item(), low=0.0, high=high)
    # A view shares later writes to the tensor.
    return value.reshape(())


def _check_betas(name: str, value: object) -> tuple[float, ...]:
    """Two numbers in [0, 1) as floats; tensors on the CPU are read."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    betas = []
    for i, beta in enumerate(value):
        where = f"{name}[{i}]"
        if isinstance(beta, Tensor):
            if beta.numel() != 1 or not beta.is_floating_point() or beta.device.type != "cpu":
                raise ValueError(
                    f"{where} as a tensor must be a 0-d floating-point one on the CPU, got {list(beta.shape)} of "
                    f"{beta.dtype} on {beta.device}"
                )
            beta = beta.item()
        betas.append(check_float(where, beta, low=0.0, high=1.0))
    return tuple(betas)


def _check_shrink_pattern(name: str, value: object) -> dict[str, float]:
    """A dict of regular expressions and ratios in [0, 1); None gives an empty one."""
    patterns = check_patterns(name, value)
    return {
        key: check_float(f"{name}[{key!r}]", ratio, low=0.0, high=1.0)
        for key, ratio in patterns.items()
    }


def _check_seed(name: str, value: object) -> int:
    """An int in [0, 2**63)."""
    seed = check_int(name, value, minimum=0)
    if seed >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {seed}")
    return seed


def check_max_grad_norm(name: str, value: object) -> float | None:
    """``value`` as a positive float, infinity included, or None."""
    if value is None or (isinstance(value, float) and value == math.inf):
        return value
    return check_float(name, value, low=0.0, low_open=True)


# Every hyperparameter and its check, which returns the normalized value.
HYPER: dict[str, Callable[[str, object], object]] = {
    "lr": _check_number,
    "betas": _check_betas,
    "eps": partial(check_float, low=0.0),
    "weight_decay": _check_number,
    "shrink_ratio": partial(_check_number, high=1.0),
    "shrink_pattern": _check_shrink_pattern,
    "stop_condition": partial(check_choice, choices=STOP_CONDITIONS),
    "lr_ratio_B": partial(check_float, low=0.0, low_open=True),
    "maximize": check_bool,
    "amsgrad": check_bool,
    "capturable": check_bool,
    "seed": _check_seed,
    "max_grad_norm": check_max_grad_norm,
}


def check_hyper(hyper: Mapping[str, object], where: str) -> Hyper:
    """Validate and normalize ``hyper``. ``where`` prefixes names in errors."""
    checked = {name: check(f"{where}{name}", hyper[name]) for name, check in HYPER.items()}
    return cast("Hyper", checked)


def check_storage(moments_dtype: object, master_weights: object) -> Storage:
    """The two arguments as a :class:`Storage`."""
    allowed = (torch.float32, torch.bfloat16, torch.uint8)
    if not isinstance(moments_dtype, torch.dtype) or moments_dtype not in allowed:
        raise ValueError(
            f"moments_dtype must be torch.float32, torch.bfloat16 or torch.uint8 (8 bits by blocks), got {moments_dtype!r}"
        )
    return Storage(moments_dtype, check_bool("master_weights", master_weights))


def scheduled_ratio(schedule: Callable[[int], float], step: int) -> float:
    """The checked shrink ratio that ``schedule`` gives for ``step``. RuntimeError during a capture."""
    if staging.capturing():
        raise RuntimeError(
            "shrink_schedule is a function, which a CUDA graph would not call again: give shrink_ratio as a tensor, and "
            "write to it between replays"
        )
    return check_float(f"shrink_schedule({step})", schedule(step), low=0.0, high=1.0)
