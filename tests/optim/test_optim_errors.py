"""What StableLoRAAdamW refuses to be made of: each message names the argument and its value. At a
step: test_noticed.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import make_pairs
from tests.helpers.steps import take_step

pytestmark = pytest.mark.usefixtures("one_thread")


def lora(
    a: tuple[int, ...] = (2, 4), b: tuple[int, ...] = (4, 2)
) -> list[tuple[str, torch.Tensor]]:
    return [
        ("q.lora_A", torch.ones(a, requires_grad=True)),
        ("q.lora_B", torch.zeros(b, requires_grad=True)),
    ]


NUMBER = "must be a finite number in"
MOMENTS = "moments_dtype must be torch.float32, torch.bfloat16 or torch.uint8 (8 bits by blocks)"
BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": math.nan}, ValueError, f"lr {NUMBER} [0, inf), got nan"),
    ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3' of type str"),
    (
        {"lr": torch.zeros(2)},
        ValueError,
        "lr as a tensor must be a 0-d floating-point one, got [2] of torch.float32",
    ),
    ({"lr": torch.tensor(math.nan)}, ValueError, f"lr {NUMBER} [0, inf), got nan"),
    ({"betas": (0.9, 1.0)}, ValueError, f"betas[1] {NUMBER} [0, 1), got 1.0"),
    ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9"),
    (
        {"betas": (0.9, torch.zeros(2))},
        ValueError,
        "betas[1] as a tensor must be a 0-d floating-point one on the CPU",
    ),
    ({"eps": -1e-8}, ValueError, f"eps {NUMBER} [0, inf), got -1e-08"),
    ({"weight_decay": math.inf}, ValueError, f"weight_decay {NUMBER} [0, inf), got inf"),
    ({"shrink_ratio": 1.0}, ValueError, f"shrink_ratio {NUMBER} [0, 1), got 1.0"),
    ({"lr_ratio_B": 0.0}, ValueError, f"lr_ratio_B {NUMBER} (0, inf), got 0.0"),
    (
        {"stop_condition": "norms"},
        ValueError,
        "stop_condition must be one of 'norm', 'never', got 'norms'",
    ),
    ({"shrink_pattern": {"q9": 0.1}}, ValueError, "shrink_pattern 'q9' matches none of the 1 pair"),
    ({"shrink_pattern": {"q": 1.0}}, ValueError, f"shrink_pattern['q'] {NUMBER} [0, 1), got 1.0"),
    (
        {"shrink_pattern": {"(": 0.1}},
        ValueError,
        "shrink_pattern must be a regular expression, got '('",
    ),
    (
        {"shrink_pattern": [("q", 0.1)]},
        TypeError,
        "shrink_pattern must be a dict of name patterns, got [(",
    ),
    ({"maximize": 1}, TypeError, "maximize must be a bool, got 1 of type int"),
    ({"seed": 2**63}, ValueError, f"seed must be below 2**63, got {2**63}"),
]
# Of all groups together.
BAD_FOR_ALL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_grad_norm": 0.0}, ValueError, f"max_grad_norm {NUMBER} (0, inf), got 0.0"),
    ({"max_grad_norm": -math.inf}, ValueError, f"max_grad_norm {NUMBER} (0, inf), got -inf"),
    (
        {"amsgrad": True},
        TypeError,
        "StableLoRAAdamW has no argument 'amsgrad', which takes lr, betas",
    ),
    ({"lr_ratio": 2.0}, TypeError, "no argument 'lr_ratio'; did you mean 'lr_ratio_B'?"),
    ({"moments_dtype": torch.float16}, ValueError, f"{MOMENTS}, got torch.float16"),
]


# What a group more can be wrong in, beyond its hyperparameters.
BAD_GROUPS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"max_grad_norm": 2.0},
        ValueError,
        "max_grad_norm must be one value for all groups, got 1.0 and 2.0",
    ),
    (
        {"shrink_pattern": {"layer7": 0.1}},
        ValueError,
        "shrink_pattern 'layer7' matches none of the 1 pair",
    ),
    ({"params": lora()[:1]}, ValueError, "pair 'q' has lora_A [2, 4] but no lora_B"),
]


@pytest.mark.parametrize("change, error, message", BAD_OPTIONS + BAD_FOR_ALL)
def test_bad_options(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        StableLoRAAdamW(lora(), **change)


@pytest.mark.parametrize("change, error, message", BAD_OPTIONS[:1] + BAD_GROUPS)
def test_a_bad_group_is_not_added(change, error, message):
    pair = [(f"layer.{name}", p) for name, p in lora()]
    optimizer = StableLoRAAdamW(pair, max_grad_norm=1.0, shrink_pattern={"layer.q": 0.1})
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group(
            {"params": [("head", torch.ones(1, requires_grad=True))], **change}
        )
    assert len(optimizer.param_groups) == 1
    # The first group's pattern need not match in the second.
    optimizer.add_param_group({"params": lora()})
    take_step(0, optimizer)


def frozen(named: list[tuple[str, torch.Tensor]], *places: int) -> list[tuple[str, torch.Tensor]]:
    for place in places:
        named[place][1].requires_grad_(False)
    return named


NAMES = "StableLoRAAdamW.from_model(model)"
FROZEN_A = (
    "pair 'q': lora_B is trainable but lora_A is frozen (requires_grad=False), and Stable-LoRA needs both; "
    "set requires_grad=True, or train the other half alone, as LoRA-FA does, with torch.optim.AdamW"
)
SHARED = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    "params, error, message",
    [
        (torch.ones(2), TypeError, f"params must be named parameters, got a single tensor; .*{NAMES}"),
        ([torch.ones(2, requires_grad=True)], TypeError, f"a tensor of shape [2] without a name; .*{NAMES}"),
        ({"params": lora()}, TypeError, "got one dict"),
        (frozen(lora(), 0, 1), ValueError, "parameters (none); .* freezes an adapter unless is_trainable=True"),
        ([("w", SHARED)], ValueError, "among the 1 trainable parameters ('w'); without one this would be plain AdamW"),
        (frozen(lora(), 0), ValueError, FROZEN_A),
        ([*lora(), *lora()[:1]], ValueError, "two parameters are named 'q.lora_A'"),
        ([*lora(), ("v", SHARED), ("w", SHARED)], ValueError, "one tensor is given as 'v' and as 'w'"),
        ([*lora(), ("z", SHARED.to(torch.complex64))], TypeError, "'z' must be float32, float64, bfloat16 or float16, got"),
        ([*lora(), ("z", SHARED * 2)], ValueError, "parameter 'z' must be a leaf tensor"),
        ([*lora(), ("z", torch.ones(4)[::2].requires_grad_())], ValueError, "'z' must be dense in memory"),
        ([{"params": [SHARED], "param_names": ["a", "b"]}], ValueError, "a group has 1 params and 2 param_names"),
        ([{"params": lora(), "max_grad_norm": 1.0}, {"params": [("w", SHARED)]}], ValueError, "got 1.0 and None"),
        (
            [{"params": lora(), "moments_dtype": torch.uint8}, {"params": [("w", SHARED)]}],
            ValueError,
            "moments_dtype must be one value for all groups, got torch.uint8 and torch.float32",
        ),
    ],
)  # fmt: skip
def test_bad_parameters(params, error, message):
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(error, match=pattern):
        StableLoRAAdamW(params)


def test_from_model_wants_a_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        StableLoRAAdamW.from_model([])


def test_a_clip_is_checked_where_it_is_set():
    optimizer = StableLoRAAdamW(lora())
    with pytest.raises(ValueError, match="max_grad_norm must be a finite number"):
        optimizer.max_grad_norm = -1.0
    assert optimizer.max_grad_norm is None


def test_there_is_no_float64_step_on_triton():
    optimizer = StableLoRAAdamW(make_pairs(dtype=torch.float64))
    with settings(backend="triton"), pytest.raises(TypeError, match="no float64 optimizer step"):
        take_step(0, optimizer)
