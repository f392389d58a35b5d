"""Sharded parameters in one process: what is refused, exchanged parameters, gradients and states of other placements."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

import stablelora_kernels as slk
from tests.helpers.processes import needs_gloo

pytestmark = needs_gloo
Named = list[tuple[str, torch.Tensor]]


def pair_on(mesh: DeviceMesh, a_way: Placement | None = None) -> Named:
    a, b = torch.randn(4, 6), torch.zeros(5, 4)
    return [
        ("q.lora_A", DTensor.from_local(a, mesh, [a_way or Shard(0)], run_check=False).requires_grad_()),
        ("q.lora_B", DTensor.from_local(b, mesh, [Shard(0)], run_check=False).requires_grad_()),
    ]


def whole(named: Named) -> Named:
    return [(name, p.detach().full_tensor().clone().requires_grad_()) for name, p in named]


def optimizers(mesh: DeviceMesh) -> list[slk.StableLoRAAdamW]:
    """Of sharded parameters, and of whole ones of the same values."""
    named = pair_on(mesh)
    return [slk.StableLoRAAdamW(each, lr=0.1) for each in (named, whole(named))]


def params(optimizer: slk.StableLoRAAdamW) -> list[torch.Tensor]:
    return optimizer.param_groups[0]["params"]


def step(mesh: DeviceMesh, sharded: slk.StableLoRAAdamW, plain: slk.StableLoRAAdamW, way: Placement) -> None:
    for p, q in zip(params(sharded), params(plain), strict=True):
        q.grad = torch.randn(q.shape)
        p.grad = DTensor.from_local(q.grad.clone(), mesh, [way], run_check=False)
    for optimizer in (sharded, plain):
        optimizer.step()


def test_what_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(
        TypeError, match=r"parameter 'q.lora_A' must be sharded or replicated, got the placements \(Part"
    ):
        slk.StableLoRAAdamW(pair_on(mesh, Partial()))
    with pytest.raises(ValueError, match=r"parameter 'q.lora_A' is a DTensor, whose moments cannot be in 8 bits"):
        slk.StableLoRAAdamW(pair_on(mesh), moments_dtype=torch.uint8)
    strided = DTensor.from_local(torch.randn(6, 4).t(), mesh, [Shard(0)], run_check=False).requires_grad_()
    with pytest.raises(ValueError, match=r"'q.lora_A' is sharded, so its shards must be contiguous, got the strides"):
        slk.StableLoRAAdamW([("q.lora_A", strided), pair_on(mesh)[1]])


def test_a_gradient_of_other_placements_is_brought_to_the_parameters(mesh: DeviceMesh) -> None:
    sharded, plain = optimizers(mesh)
    step(mesh, sharded, plain, Partial())
    assert all(torch.equal(p.full_tensor(), q) for p, q in zip(params(sharded), params(plain), strict=True))


def test_parameters_that_a_trainer_exchanges_are_found(mesh: DeviceMesh) -> None:
    """As accelerate does when it shards a model after the optimizer was made."""
    named = pair_on(mesh)
    optimizer = slk.StableLoRAAdamW(whole(named), lr=0.1, shrink_ratio=0.5, weight_decay=0.0)
    optimizer.param_groups[0]["params"] = [p for _, p in named]
    for _, p in named:
        p.grad = torch.zeros_like(p)
    before = named[0][1].full_tensor().clone()
    optimizer.step()
    assert torch.equal(named[0][1].full_tensor(), 0.5 * before) and optimizer.pairs[0].A is named[0][1]


def test_a_whole_state_loads_into_parts_and_back(mesh: DeviceMesh) -> None:
    sharded, plain = optimizers(mesh)
    step(mesh, sharded, plain, Shard(0))
    other = slk.StableLoRAAdamW(pair_on(mesh), lr=0.2)
    other.load_state_dict(plain.state_dict())
    back = slk.StableLoRAAdamW(whole(pair_on(mesh)), lr=0.3)
    back.load_state_dict(other.state_dict())
    for p, q, r in zip(params(other), params(plain), params(back), strict=True):
        found, expected = other.state[p]["exp_avg"], plain.state[q]["exp_avg"]
        assert isinstance(found, DTensor) and torch.equal(found.full_tensor(), expected)
        assert torch.equal(back.state[r]["exp_avg"], expected)


def test_a_replaced_state_of_parts_is_noticed(mesh: DeviceMesh, backend: str) -> None:
    sharded, plain = optimizers(mesh)
    step(mesh, sharded, plain, Shard(0))
    for optimizer in (sharded, plain):
        optimizer.state.clear()
    step(mesh, sharded, plain, Shard(0))
    for optimizer in (sharded, plain):
        for p in params(optimizer):
            assert optimizer.state[p]["step"].item() == 1
            optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.5).detach()
    step(mesh, sharded, plain, Shard(0))
    for p, q in zip(params(sharded), params(plain), strict=True):
        assert torch.equal(sharded.state[p]["exp_avg"].full_tensor(), plain.state[q]["exp_avg"])
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-7)
    sharded.state[params(sharded)[0]]["exp_avg"] = torch.zeros(4, 7)
    message = r"the state of 'q.lora_A': 'exp_avg' must be .* \[4, 6\] on cpu, got .* \[4, 7\]"
    with pytest.raises(ValueError, match=message):
        step(mesh, sharded, plain, Shard(0))
