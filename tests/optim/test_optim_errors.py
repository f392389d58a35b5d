"""What StableLoRAAdamW refuses: each message names the argument and its value, and nothing has been changed."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import DEVICE, all_equal, make_pairs, set_grads

pytestmark = pytest.mark.usefixtures("one_thread")


def lora(a: tuple[int, ...] = (2, 4), b: tuple[int, ...] = (4, 2)) -> list[tuple[str, torch.Tensor]]:
    return [("q.lora_A", torch.ones(a, requires_grad=True)), ("q.lora_B", torch.zeros(b, requires_grad=True))]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"lr": math.nan}, ValueError, "lr must be a finite number in [0, inf), got nan"),
        ({"lr": -1e-3}, ValueError, "lr must be a finite number in [0, inf), got -0.001"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3' of type str"),
        ({"lr": torch.zeros(2)}, ValueError, "lr as a tensor must be a 0-d floating-point one, got [2] of torch.float32"),
        ({"lr": torch.tensor(math.nan)}, ValueError, "lr must be a finite number in [0, inf), got nan"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must be a finite number in [0, 1), got 1.0"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9"),
        ({"eps": -1e-8}, ValueError, "eps must be a finite number in [0, inf), got -1e-08"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be a finite number in [0, inf), got inf"),
        ({"shrink_ratio": 1.0}, ValueError, "shrink_ratio must be a finite number in [0, 1), got 1.0"),
        ({"shrink_ratio": True}, TypeError, "shrink_ratio must be a number, got True of type bool"),
        ({"maximize": 1}, TypeError, "maximize must be a bool, got 1 of type int"),
        ({"capturable": None}, TypeError, "capturable must be a bool, got None of type NoneType"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be a finite number in (0, inf), got 0.0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, ValueError, f"seed must be below 2**63, got {2**63}"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5 of type float"),
    ],
)  # fmt: skip
def test_bad_hyper_parameters(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        StableLoRAAdamW(lora(), **change)
    if "max_grad_norm" not in change:
        with pytest.raises(error, match=re.escape(message)):
            StableLoRAAdamW([{"params": lora(), **change}])
        optimizer = StableLoRAAdamW(lora())
        with pytest.raises(error, match=re.escape(message)):
            optimizer.add_param_group({"params": [("head", torch.ones(1, requires_grad=True))], **change})
        assert len(optimizer.param_groups) == 1


def frozen(named: list[tuple[str, torch.Tensor]], place: int) -> list[tuple[str, torch.Tensor]]:
    named[place][1].requires_grad_(False)
    return named


NAMES = "StableLoRAAdamW.from_model(model)"
SHARED = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    "params, error, message",
    [
        (torch.ones(2), TypeError, f"params must be named parameters, got a single tensor; .*{NAMES}"),
        ([torch.ones(2, requires_grad=True)], TypeError, f"a tensor of shape [2] without a name; .*{NAMES}"),
        ([{"params": [torch.ones(2, requires_grad=True)]}], TypeError, "a tensor of shape [2] without a name"),
        ({"params": lora()}, TypeError, "got one dict"),
        ([7], TypeError, "params holds a int"),
        ([{"lr": 1e-3}], ValueError, "a parameter group must have 'params', got the keys ['lr']"),
        ([{"params": lora()}, 7], TypeError, "a parameter group must be a dict, got int"),
        ([], ValueError, "no LoRA pair (lora_A with lora_B) among the 0 trainable parameters (none)"),
        (frozen(frozen(lora(), 0), 1), ValueError, "parameters (none); .* freezes an adapter unless is_trainable=True"),
        ([("w", SHARED)], ValueError, "among the 1 trainable parameters ('w'); without one this would be plain AdamW"),
        (lora()[:1], ValueError, "pair 'q' has lora_A [2, 4] but no lora_B"),
        (lora()[1:], ValueError, "pair 'q' has lora_B [4, 2] but no lora_A"),
        (frozen(lora(), 0), ValueError, "pair 'q': lora_B is trainable but lora_A is frozen (requires_grad=False)"),
        (lora(b=(4, 3)), ValueError, "pair 'q': A must be [r, in] and B [out, r] with one r, got A [2, 4] and B [4, 3]"),
        ([*lora(), *lora()[:1]], ValueError, "two parameters are named 'q.lora_A'"),
        ([*lora(), ("v", SHARED), ("w", SHARED)], ValueError, "one tensor is given as 'v' and as 'w'"),
        (
            [*lora(), ("z", SHARED.to(torch.complex64))],
            TypeError,
            "'z' must be float32, float64, bfloat16 or float16, got torch.complex64",
        ),
        ([*lora(), ("z", SHARED * 2)], ValueError, "parameter 'z' must be a leaf tensor"),
        ([*lora(), ("z", torch.ones(4)[::2].requires_grad_())], ValueError, "'z' must be dense in memory"),
        ([{"params": [SHARED], "param_names": ["a", "b"]}], ValueError, "a group has 1 params and 2 param_names"),
    ],
)  # fmt: skip
def test_bad_parameters(params: object, error: type[Exception], message: str) -> None:
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(error, match=pattern):
        StableLoRAAdamW(params)


def test_from_model_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        StableLoRAAdamW.from_model([])


def test_a_sparse_gradient_is_refused_before_anything_changes(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    lone = torch.ones(3, 2, device=DEVICE, requires_grad=True)
    optimizer = StableLoRAAdamW([pair, ("embedding", lone)])
    set_grads([pair.A, pair.B], 0)
    before = [p.detach().clone() for p in (pair.A, pair.B, lone)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lone.grad = torch.sparse_coo_tensor([[0]], [[1.0, 1.0]], (3, 2), device=DEVICE)
    with pytest.raises(RuntimeError, match=r"gradients must be dense tensors, got torch\.sparse_coo"):
        optimizer.step()
    assert all_equal(before, [p.detach() for p in (pair.A, pair.B, lone)])


def test_a_parameter_removed_from_a_group_without_its_name() -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    bias = torch.ones(3, device=DEVICE, requires_grad=True)
    optimizer = StableLoRAAdamW([pair, ("bias", bias)])
    set_grads([pair.A, pair.B, bias], 0)
    optimizer.step()
    before = [p.detach().clone() for p in (pair.A, pair.B)]
    group = optimizer.param_groups[0]
    group["params"].pop()
    with pytest.raises(
        ValueError, match="group 0 has 2 params and 3 param_names: what is added to or removed from one"
    ):
        optimizer.step()
    assert all_equal(before, [p.detach() for p in (pair.A, pair.B)])
    group["param_names"].pop()
    optimizer.step()
    assert not all_equal(before, [p.detach() for p in (pair.A, pair.B)])
