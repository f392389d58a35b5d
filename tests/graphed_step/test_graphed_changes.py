"""What has changed since a capture is noticed before the replay."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import stablelora_kernels as slk

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from tests.helpers.graphed_steps import (
    DEVICE,
    GOAL,
    X,
    batches,
    captured,
    eager,
    graphed,
    llama_with,
    make,
    use_graphs,
)
from tests.helpers.optimizers import all_equal, snapshot
from tests.helpers.precision import switched


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, old)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    slk.merge_lora(model)
    yield
    slk.unmerge_lora(model)


def update(values: Any, key: Any, value: Any) -> Any:
    return mock.patch.dict(values, {key: value})


def nothing(*args: Any) -> None:
    pass


TF32 = "backends.cuda.matmul.fp32_precision = 'tf32'"
# By its words in the message, a change after the capture, until its context ends.
CHANGES: dict[str, Callable[[Any, slk.StableLoRAAdamW], AbstractContextManager[Any]]] = {
    r"model.training was True and is False": lambda m, o: changed(m, "training", False),
    r"model.0.merged was False and is True": lambda m, o: merged(m),
    r"model.0.scaling was 8.0 and is 1.0": lambda m, o: changed(m[0], "scaling", 1.0),
    r"model._modules.1 was Tanh() and is ReLU()": lambda m, o: changed(m, "1", nn.ReLU()),
    r"_parameters.lora_A was a tensor of": lambda m, o: changed(m[0], "lora_A", nn.Parameter(m[0].lora_A.detach())),
    r"model.0._forward_hooks.": lambda m, o: m[0].register_forward_hook(nothing),
    r"model.0.lora_B._backward_hooks was None and is": lambda m, o: m[0].lora_B.register_hook(nothing),
    r"model.0.lora_A.requires_grad was True and is False": lambda m, o: changed(m[0].lora_A, "requires_grad", False),
    r"model.0.weight has other memory than before": lambda m, o: changed(m[0].weight, "data", m[0].weight.data.clone()),
    r"backend was 'triton' and is 'torch'": lambda m, o: slk.use_backend("torch"),
    r"kernel was 'auto' and is 'split'": lambda m, o: slk.use_kernel("split"),
    r"TensorFloat-32 in float32 products was False and is True": lambda m, o: switched(TF32),
    r"global module hooks was False": lambda m, o: nn.modules.module.register_module_forward_pre_hook(nothing),
    r"optimizer's step hooks was [] and is [": lambda m, o: o.register_step_pre_hook(nothing),
    r"optimizer.shrink_schedule was None and is": lambda m, o: changed(o, "shrink_schedule", float),
    r"optimizer.param_groups[0]['eps'] was 1e-08 and is 0.1": lambda m, o: update(o.param_groups[0], "eps", 0.1),
    r"optimizer.param_groups[0]['max_grad_norm'] was None and is 1.0": lambda m, o: changed(o, "max_grad_norm", 1.0),
    r"optimizer has other parameters or another state": lambda m, o: update(o.state, m[0].lora_A, {}),
    r"optimizer has other parameters or": lambda m, o: update(o.param_groups[0], "params", [m[0].lora_A]),
}


@pytest.fixture(scope="module")
def shared() -> Any:
    """One captured step for all changes, each of which is taken back."""
    with slk.use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        graphs = use_graphs(patch)
        yield captured(), graphs


@pytest.mark.parametrize("words", CHANGES)
def test_a_change_after_the_capture_is_noticed(words, shared):
    (step, model, optimizer), graphs = shared
    before, replays = [p.detach().clone() for p in model.parameters()], graphs.replays
    message = re.escape(words) + ".*which its CUDA graph does not know: put it back, or call"
    with CHANGES[words](model, optimizer), pytest.raises(RuntimeError, match=message):
        step((X, GOAL))
    assert all_equal(before, [p.detach() for p in model.parameters()]) and graphs.replays == replays
    step((X, GOAL))
    assert graphs.replays == replays + 1


RESETS: dict[str, tuple[Callable[[slk.StableLoRAAdamW], Any], str]] = {
    "a state loaded": (
        lambda o: o.load_state_dict(o.state_dict()),
        r"optimizer has other parameters or another state .*load_state_dict, state\), which",
    ),
    "a tensor as lr": (
        lambda o: o.param_groups[0].update(lr=torch.tensor(0.1, device=DEVICE)),
        r"param_groups\[0\]\['lr'\] was 'a number' and is a tensor of shape \[\], which",
    ),
}


@pytest.mark.parametrize("change", RESETS)
def test_a_change_that_stays_needs_a_reset(change, graphs):
    step, model, optimizer = captured()
    RESETS[change][0](optimizer)
    with pytest.raises(RuntimeError, match=RESETS[change][1]):
        step((X, GOAL))
    twin = copy.deepcopy((model, optimizer))
    step.reset()
    losses = [[take(batch) for batch in batches(4)] for take in (step, eager(*twin))]
    assert all_equal(*losses) and all_equal(snapshot(optimizer), snapshot(twin[1])) and graphs.captures == 2


def test_a_change_while_it_warms_up_begins_anew(graphs):
    model, optimizer = make()
    step = graphed(model, optimizer)
    step((X, GOAL))
    model.eval()
    step((X, GOAL))
    step((X, GOAL))
    assert graphs.captures == 0
    step((X, GOAL))
    assert graphs.captures == 1


def test_a_change_of_a_peft_model_is_noticed():
    model, optimizer = llama_with("PEFT's layers")
    step = graphed(model, optimizer, None)
    batch = {name: torch.ones(2, 5, dtype=torch.int64) for name in ("input_ids", "labels")}
    for _ in range(3):
        step(batch)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.set_scale("default", 3.0)
    with pytest.raises(RuntimeError, match=r"q_proj\.scaling\.default was 4\.0 and is 12\.0"):
        step(batch)
    layer.set_scale("default", 1.0)
    slk.restore_peft(model)
    with pytest.raises(RuntimeError, match=r"q_proj was 'AcceleratedLinear' and is 'Linear'"):
        step(batch)
    slk.accelerate_peft(model)
    step(batch)
