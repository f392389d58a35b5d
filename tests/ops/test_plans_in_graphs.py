"""Compiled graphs call the ops without this library's Python before them; the ops find prepared launches all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels import functional
from stablelora_kernels.ops import plans
from tests.helpers.inputs import BF16, DEVICE
from tests.helpers.launches import count_launches, without_plans

pytest.importorskip("triton", reason="Triton is not installed on this platform")


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with slk.use_backend("triton"):
        yield
    torch._dynamo.reset()


def everything() -> tuple[nn.ModuleDict, Any]:
    """A model with each op, and the function that runs it forward and backward on an x."""
    torch.manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj", "down_proj")
    model = nn.ModuleDict({name: nn.Linear(64, 64, device=DEVICE, dtype=BF16) for name in names})
    slk.apply_lora(model, slk.LoRAConfig(r=8, lora_dropout=0.1, target_modules=[*names]), fuse_projections=True)
    for layer in model.values():
        nn.init.normal_(layer.lora_B)
    weights = [functional.LoRAWeights(m.weight, m.bias, m.lora_A, m.lora_B, m.scaling) for m in model.values()]

    def forward(x: Tensor) -> Tensor:
        x = x + sum(model[name](x) for name in names[:3])
        x = functional.lora_branch(2 * x, x, *weights[3][2:])
        x = model["down_proj"](x)
        return functional.lora_mlp(x, *weights[:3], "silu")

    return model, forward


def run(forward: Any, model: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    y = forward(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def test_a_compiled_model_plans_each_launch_twice() -> None:
    """Once to run and once to prepare, and the results stay the same to the bit."""
    x, (model, forward) = torch.randn(70, 64, device=DEVICE, dtype=BF16), everything()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    with without_plans(), count_launches() as launches:
        expected = run(compiled, model, x)
    for _ in range(2):
        run(compiled, model, x)
    ops = [
        f"{op}_{way}"
        for op in ("lora_linear_group", "lora_linear", "lora_branch", "lora_mlp")
        for way in ("fwd", "bwd")
    ]
    prepared = {key[0] for key, entry in plans._table.young.items() if entry.prepared}
    assert prepared >= {f"stablelora_kernels::{op}" for op in ops}
    with (
        mock.patch.object(plans.PlannedOp, "_prepare", side_effect=AssertionError("planned again")),
        count_launches() as again,
    ):
        found = run(compiled, model, x)
    assert again == launches
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_the_op_called_by_itself_is_prepared_in_its_second_call() -> None:
    x, layer = torch.randn(70, 64, device=DEVICE, dtype=BF16), slk.LoRALinear(64, 48, r=8, device=DEVICE, dtype=BF16)
    args = (x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, None, 1.0, 0.0, True)
    results = []
    for prepared in (False, True, True):
        results.append(torch.ops.stablelora_kernels.lora_linear_fwd(*args))
        (entry,) = plans._table.young.values()
        assert bool(entry.prepared) == prepared
    for y, s in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(s, results[0][1])
    # A call of another layout is planned anew.
    assert torch.ops.stablelora_kernels.lora_linear_fwd(x[1:], *args[1:])[0].shape == (69, 48)
    assert len(plans._table.young) == 2
