"""No setting is lost silently: in repr, in copies, and by the trainer's factory. In states: test_contract, test_checkpoint."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import make_pairs
from tests.helpers.small_models import Model, lora_config
from tests.helpers.steps import take_step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_reprs_are_short() -> None:
    """Of the optimizer, a pair and a report, as a notebook shows them; print(report) has all."""
    model = torch.nn.ModuleDict({f"layer{i}": torch.nn.Linear(40, 24) for i in range(30)})
    report = slk.apply_lora(model, slk.LoRAConfig(target_modules="all-linear"))
    optimizer = StableLoRAAdamW.from_model(model, lr=3e-4, master_weights=True)
    first, second = repr(optimizer).splitlines()
    assert first == "StableLoRAAdamW (30 LoRA pairs)" and len(second) < 500
    assert second.startswith("Parameter Group 0 (60 parameters): amsgrad: False, betas: ")
    assert repr(optimizer.pairs[0]) == "LoRAPair('layer0', A [8, 40], B [24, 8], torch.float32, cpu)"
    first = "LoRA on 30 modules; 15,360 of 44,880 parameters train (34.22%)"
    assert repr(report) == f"<LoRAReport: {first}>" and str(report).startswith(f"{first}\n  1 x layer0: 40 -> 24")
    assert repr(slk.merge_lora(model)) == "<MergeReport: 30 modules merged>"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_count_of_steps_that_were_not_taken(path: str, copied) -> None:
    """And which of them were told of."""
    optimizer = StableLoRAAdamW(make_pairs(), max_grad_norm=1.0)
    take_step(0, optimizer)
    take_step(1, optimizer, scale=math.inf)
    other = copied(optimizer)
    with pytest.warns(RuntimeWarning, match="1 step was skipped because the norm of its gradients was not finite"):
        other.stability()
    take_step(2, other, scale=math.nan)
    assert (optimizer.nonfinite_steps, other.nonfinite_steps, other.max_grad_norm) == (1, 2, 1.0)
    with pytest.warns(RuntimeWarning, match="1 step was skipped"):
        copied(other).stability()


def test_the_factory_tells_which_of_the_trainers_arguments_it_was_not_given() -> None:
    model = Model()
    slk.apply_lora(model, lora_config())
    told = "uses lr=0.0001, betas=(0.9, 0.999), eps=1e-08, the optimizer's defaults"
    with pytest.warns(UserWarning, match=re.escape(told)) as caught:
        optimizer = slk.StableLoRAAdamWFactory()(model, shrink_ratio=0.1, weight_decay=0.3)
    assert caught[0].filename == __file__ and "StableLoRAAdamWFactory.from_args(args" in str(caught[0].message)
    assert optimizer.param_groups[0]["lr"] == 1e-4
    given = {"lr": 3e-4, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-7}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (group,) = slk.StableLoRAAdamWFactory()(model, **given).param_groups
    assert given.items() <= group.items()


def test_the_learning_rate_by_position() -> None:
    assert StableLoRAAdamW(make_pairs(), 0.25).param_groups[0]["lr"] == 0.25
