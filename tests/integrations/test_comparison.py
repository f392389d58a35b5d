"""compare: what it measures, and that it leaves the model as it was."""

from __future__ import annotations

import math
import os
import random

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.utils.memory import (
    _without_kinetos_lines,
    peak_over_start,
    saved_for_backward,
)
from stablelora_kernels.utils.timing import median_interval
from tests.helpers.trainer_runs import llama, rows

MIB = 1 << 20


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows()[:4]])
    return {"input_ids": ids, "labels": ids}


def state_of(model: torch.nn.Module) -> dict[str, object]:
    """Everything that compare must leave alone."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "tensors": [(name, id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()],
        "gradients": [id(p.grad) for p in model.parameters()],
        "generator": torch.get_rng_state().tolist(),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["peft", "accelerated", "in evaluation", "with gradients"])
def test_the_model_stays_as_it_was(kind):
    model = llama("accelerated" if kind == "accelerated" else "peft", dropout=0.2)
    if kind == "in evaluation":
        model.eval()
    if kind == "with gradients":
        model(**batch()).loss.backward()
    before = state_of(model)
    comparison = slk.compare(model, batch(), rounds=6, fuse_projections=True)
    assert state_of(model) == before
    assert len(comparison.report.replaced) == 4


def test_optimizers_in_hooks_of_parameters_do_not_step():
    model = llama("peft")
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        optimizer = torch.optim.SGD([p], lr=0.1)
        p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
    before = [p.detach().clone() for p in trained]
    slk.compare(model, batch(), rounds=6)
    assert all(p.equal(q) for p, q in zip(trained, before, strict=True))
    # They are still there.
    model(**batch()).loss.backward()
    assert not all(p.equal(q) for p, q in zip(trained, before, strict=True))


class Normalized(torch.nn.Module):
    """A model with statistics and packed weights in buffers. It notes their addresses in SEEN."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.norm = torch.nn.BatchNorm1d(7)
        self.register_buffer("table", torch.zeros(MIB))
        self.register_buffer("qweight", torch.ones(MIB, dtype=torch.int32))

    def forward(self, input_ids, **kwargs):
        SEEN.append({name: buffer.data_ptr() for name, buffer in self.named_buffers()})
        self.norm(input_ids.float())
        self.table += 1
        return self.inner(input_ids=input_ids, **kwargs)


SEEN: list[dict[str, int]] = []


def test_buffers_of_packed_weights_are_shared_and_others_copied_once():
    model = Normalized(llama("peft"))
    before = state_of(model)
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    SEEN.clear()
    slk.compare(model, batch(), rounds=6)
    assert state_of(model) == before
    assert all(buffer.equal(values[name]) for name, buffer in model.named_buffers())
    assert len(SEEN) == 2 * (3 + 6 + 2)
    for name, buffer in model.named_buffers():
        (address,) = {seen[name] for seen in SEEN}
        assert (address == buffer.data_ptr()) == (name == "qweight"), name


def test_a_frozen_adapter_is_refused():
    model = llama("peft").requires_grad_(False)
    before = state_of(model)
    with pytest.raises(ValueError, match="model must have parameters that require gradients, got"):
        slk.compare(model, batch(), rounds=6)
    assert state_of(model) == before


def test_the_profiler_logs_nothing_and_swallows_nothing(capfd):
    slk.compare(llama("peft"), batch(), rounds=6)
    assert "profiler_st" not in capfd.readouterr().err
    with _without_kinetos_lines():
        os.write(2, b"USDT: a line of Kineto's\nanother line\n")
    assert capfd.readouterr().err == "another line\n"


def test_an_error_leaves_it_as_it_was_too():
    model = llama("peft")
    before = state_of(model)
    with pytest.raises(ValueError, match="got the keys input_ids: add 'labels'"):
        slk.compare(model, {"input_ids": batch()["input_ids"]}, rounds=6)
    assert state_of(model) == before


def test_it_counts_what_each_arm_keeps():
    """One more way to count: the storages that hooks see, with the arms made by hand."""
    model = llama("peft", dropout=0.2)
    comparison = slk.compare(model, batch(), rounds=6)

    def saved(arm: torch.nn.Module) -> int:
        inputs = batch()
        present = [*arm.parameters(), *arm.buffers(), *inputs.values()]
        return saved_for_backward(lambda: arm(**inputs).loss, present)

    model.train()
    assert comparison.peft.saved == saved(model)
    slk.accelerate_peft(model)
    assert comparison.accelerated.saved == saved(model)
    assert comparison.accelerated.saved < comparison.peft.saved
    assert comparison.peft.peak > comparison.peft.saved // 2


def test_a_model_that_was_accelerated_before_is_compared_with_pefts_forward():
    comparison = slk.compare(llama("accelerated", dropout=0.2), batch(), rounds=6)
    other = slk.compare(llama("peft", dropout=0.2), batch(), rounds=6)
    assert comparison.peft.saved == other.peft.saved > comparison.accelerated.saved


def test_the_verdict_follows_from_the_interval():
    model = llama("peft")
    comparison = slk.compare(model, batch(), rounds=6)
    text = str(comparison)
    assert "6 rounds of both arms in turns" in text and "times PEFT's speed" in text
    low, median, high = comparison.speed.low, comparison.speed.median, comparison.speed.high
    assert 0 < low <= median <= high
    verdict = text.splitlines()[-1]
    expected = "FASTER" if low > 1 else "SLOWER" if high < 1 else "can't be told apart"
    assert expected in verdict


def test_what_pefts_forward_computes_is_told():
    model = llama("peft", dropout=0.2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(lambda *args: None)
    text = str(slk.compare(model, batch(), rounds=6))
    assert text.splitlines()[-1].startswith("PEFT's own forward computes 1 adapter in both arms")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fuse_mpl": True}, TypeError, "compare has no argument 'fuse_mpl'; did you mean 'fuse_mlp'"),
        ({"rounds": 5}, ValueError, "rounds must be at least 6, got 5"),
        ({"model": 3}, TypeError, "model must be an nn.Module, got int"),
        ({"batch": [1]}, TypeError, "batch must map .* got list"),
        ({"strict": True, "model": "hooked"}, ValueError, "strict=True, but PEFT's own forward"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    arguments = {"model": llama("peft"), "batch": batch(), "rounds": 6} | change
    if arguments["model"] == "hooked":
        model = llama("peft")
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_A["default"].register_forward_hook(lambda *args: None)
        arguments["model"] = model
    with pytest.raises(error, match=message):
        slk.compare(arguments.pop("model"), arguments.pop("batch"), **arguments)


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="model must have PEFT LoRA layers"):
        slk.compare(llama("ours"), batch(), rounds=6)


def test_the_peak_counts_what_is_alive_at_once():
    def run() -> None:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(MIB, dtype=torch.uint8)
        del second, third

    assert peak_over_start(run, torch.device("cpu")) == 5 * MIB
    assert peak_over_start(run, torch.device("meta")) is None


@pytest.mark.parametrize("count", [6, 9, 20, 51])
def test_the_interval_has_the_median_in_95_of_100_draws(count):
    """By the binomial distribution: the order statistics at the ends miss the median with at most
    5 %, and those one further in would miss it with more.
    """
    interval = median_interval(range(count))
    outside = int(interval.low)
    assert interval.high == count - 1 - outside

    def missed(left_out: int) -> float:
        return 2 * sum(math.comb(count, k) for k in range(left_out + 1)) / 2**count

    assert missed(outside) <= 0.05 < missed(outside + 1)
    shuffled = list(range(count))
    random.Random(0).shuffle(shuffled)
    assert median_interval(shuffled) == interval


def test_too_few_samples_have_no_interval():
    with pytest.raises(ValueError, match="samples must be at least 6, got 5"):
        median_interval([1.0] * 5)
