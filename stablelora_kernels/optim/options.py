"""The optimizer's options: one table of all that a parameter group may set. No check changes its
argument.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from stablelora_kernels.utils.names import check_patterns
from stablelora_kernels.utils.validation import (
    check_bool,
    check_choice,
    check_float,
    check_int,
    no_argument,
)

Class = TypeVar("Class")
# A hyperparameter that a schedule may change: a number, or a 0-d tensor that its owner writes to.
Number = float | Tensor
# Computed in float32, and rounded at random or from a float32 master.
LOW_PRECISION = (torch.bfloat16, torch.float16)
STOP_CONDITIONS = ("norm", "never")
DEFAULT_LR = 1e-4


class LiveValues(NamedTuple):
    """The hyperparameters that may be tensors. Schedulers change their numbers between replays of a
    CUDA graph, too.
    """

    lr: Number
    weight_decay: Number
    shrink_ratio: Number


LIVE = LiveValues._fields


class Options(TypedDict, total=False):
    """The types of ``OPTIONS``, checked, but for that of ``lr``, which the constructor takes by position."""

    betas: tuple[float, float]
    eps: float
    weight_decay: Number
    shrink_ratio: Number
    shrink_pattern: Mapping[str, float]
    stop_condition: str
    lr_ratio_B: float
    maximize: bool
    capturable: bool
    max_grad_norm: float | None
    seed: int
    master_weights: bool
    moments_dtype: torch.dtype


class Option(NamedTuple):
    """One option of a parameter group."""

    default: object
    # Returns the normalized value; its arguments are a name for errors, and the value.
    check: Callable[[str, object], object]
    # For the optimizer's docstring.
    words: str
    # Whether engines are built anew once it has changed. A change of another is uploaded.
    builds: bool = False


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
    """An int in [0, 2**63); None gives PyTorch's initial seed."""
    if value is None:
        return torch.initial_seed() % 2**63
    seed = check_int(name, value, minimum=0)
    if seed >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {seed}")
    return seed


def check_max_grad_norm(name: str, value: object) -> float | None:
    """``value`` as a positive float, infinity included, or None."""
    if value is None or (isinstance(value, float) and value == math.inf):
        return value
    return check_float(name, value, low=0.0, low_open=True)


def _check_moments_dtype(name: str, value: object) -> torch.dtype:
    """float32, bfloat16 or uint8."""
    allowed = (torch.float32, torch.bfloat16, torch.uint8)
    if not isinstance(value, torch.dtype) or value not in allowed:
        raise ValueError(
            f"{name} must be torch.float32, torch.bfloat16 or torch.uint8 (8 bits by blocks), got {value!r}"
        )
    return value


# What the constructor takes, groups hold, checkpoints save and steps compare, by name. The kernels'
# tables name the flags and the columns of those that a kernel reads.
OPTIONS: dict[str, Option] = {
    "lr": Option(
        DEFAULT_LR,
        _check_number,
        "the learning rate, a number or a 0-d tensor, which on Triton the host never reads from a GPU.",
    ),
    "betas": Option(
        (0.9, 0.999),
        _check_betas,
        "decay rates of the two moments, in [0, 1). CPU tensors are read once, at construction.",
    ),
    "eps": Option(
        1e-8, partial(check_float, low=0.0), "added to the square root of the second moment."
    ),
    "weight_decay": Option(
        1e-2,
        _check_number,
        "decoupled weight decay, multiplied by ``lr``; a number or a 0-d tensor, as ``lr``.",
    ),
    "shrink_ratio": Option(
        5e-4,
        partial(_check_number, high=1.0),
        "lambda, in [0, 1); 0 gives plain AdamW. A number or a 0-d tensor, as ``lr``.",
    ),
    "shrink_pattern": Option(
        None,
        _check_shrink_pattern,
        "shrink ratios of some pairs. A key is a regular expression for the pair's dotted name, with "
        "or without PEFT's adapter, or for its end after a dot, as in PEFT's ``rank_pattern``. The "
        "first key that matches counts. Patterns are applied when the optimizer is built, loaded or "
        "given a group.",
    ),
    "stop_condition": Option(
        "norm",
        partial(check_choice, choices=STOP_CONDITIONS),
        '"norm" is Algorithm 1. "never" shrinks at every step and latches no pair, for comparison; a '
        "latched pair stays latched.",
        builds=True,
    ),
    "lr_ratio_B": Option(
        1.0,
        partial(check_float, low=0.0, low_open=True),
        "B's learning rate is this multiple of ``lr``, as in LoRA+ (arXiv 2402.12354).",
        builds=True,
    ),
    "maximize": Option(False, check_bool, "climb instead of descend."),
    "capturable": Option(
        False,
        check_bool,
        "allow capturing :meth:`step` in a CUDA graph, alone or with the backward pass, after one "
        "step outside of it; only on Triton. Capture again after ``load_state_dict`` and after a "
        "group has changed. Values that change between replays, such as ``lr``, must be tensors on "
        "the GPU. A replay does not notice writes to parameters between replays.",
    ),
    "max_grad_norm": Option(
        None,
        check_max_grad_norm,
        "clip the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_``, with one "
        "more launch. The step may leave clipped gradients in ``.grad``. A step whose norm is not "
        "finite changes nothing; it is counted in ``nonfinite_steps``, and :meth:`stability` and "
        ":meth:`state_dict` warn of it. ``math.inf`` never clips but still skips such steps.",
        builds=True,
    ),
    "seed": Option(
        None,
        _check_seed,
        "seed of the random rounding. Default: PyTorch's initial seed, which ``torch.manual_seed`` "
        "sets.",
        builds=True,
    ),
    "master_weights": Option(
        False,
        check_bool,
        'keep a float32 master of every bfloat16 or float16 parameter in ``state[p]["master"]``. '
        "The launch that updates it writes its nearest rounding to the parameter; nothing is rounded "
        "at random. Elements that someone else writes to the parameter replace their master; after an "
        "in-place write to ``p.data`` call :meth:`refresh`, or the write is lost.",
        builds=True,
    ),
    "moments_dtype": Option(
        torch.float32,
        _check_moments_dtype,
        "torch.float32; torch.bfloat16, which saves 4 bytes a parameter; or torch.uint8, which saves "
        "6: 8-bit floating-point codes with a float32 scale for each block of 256, not for DTensors. "
        "The latter two are rounded at random. A loaded state is converted. During a step the PyTorch "
        "path, but not Triton's, holds the new moments and a float32 copy of all parameters, one "
        "group's moments in float32, and a copy of gradients that are scaled or clipped.",
        builds=True,
    ),
}
# How state is kept. A loaded state is converted and leaves these options alone.
STORAGE = ("moments_dtype", "master_weights")
# The options that all groups share. max_grad_norm clips the norm of all gradients together.
SHARED = ("max_grad_norm", *STORAGE)
# The options whose change builds engines anew, and those whose change is uploaded.
BUILT = tuple(name for name, option in OPTIONS.items() if option.builds)
UPLOADED = tuple(name for name, option in OPTIONS.items() if not option.builds)


def check_options(values: Mapping[str, object], where: str = "") -> dict[str, object]:
    """All of ``OPTIONS``, checked and normalized, from ``values`` that may have other keys. ``where``
    prefixes names in errors.
    """
    return {name: check_option(name, values[name], where) for name in OPTIONS}


def check_option(name: str, value: object, where: str = "") -> object:
    """``value``, checked and normalized, of one of ``OPTIONS``; ``where`` as above."""
    return OPTIONS[name].check(f"{where}{name}", value)


def with_defaults(options: Mapping[str, object]) -> dict[str, object]:
    """``options``, and the defaults of those that it lacks. TypeError for a name that is no option's."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(no_argument("StableLoRAAdamW", name, [*OPTIONS]))
    return {name: option.default for name, option in OPTIONS.items()} | {**options}


def shows_options(cls: type[Class]) -> type[Class]:
    """Decorate a class whose constructor ends in ``**options``: its signature then has each option
    with its default, and its docstring the options' words in place of ``{options}``.
    """
    signature = inspect.signature(cls)
    shown = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    described: list[str] = []
    for name, option in OPTIONS.items():
        if name not in signature.parameters:
            kind = inspect.Parameter.KEYWORD_ONLY
            # Strings, in most versions of Python as references.
            annotation = Options.__annotations__[name]
            annotation = getattr(annotation, "__forward_arg__", annotation)
            shown.append(
                inspect.Parameter(name, kind, default=option.default, annotation=annotation)
            )
        described += textwrap.wrap(f"{name}: {option.words}", 100 - 8, subsequent_indent=" " * 4)
    # A class keeps its signature in an attribute that only inspect knows.
    setattr(cls, "__signature__", signature.replace(parameters=shown))  # noqa: B010
    if cls.__doc__:
        cls.__doc__ = cls.__doc__.replace("{options}", "\n        ".join(described))
    return cls
