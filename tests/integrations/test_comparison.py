"""compare: what it measures, and that it leaves the model as it was."""

from __future__ import annotations

import math
import os
import random
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.integrations import comparison
from stablelora_kernels.utils.memory import (
    _without_kinetos_lines,
    peak_over_start,
)
from stablelora_kernels.utils.timing import median_interval
from tests.helpers.peft_models import make
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
    compared = slk.compare(model, batch(), rounds=6, fuse_projections=True)
    assert state_of(model) == before
    assert len(compared.report.replaced) == 4


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


class Scaled(nn.Module):
    """One layer, of whose step all is known; and whether its calls train."""

    modes: ClassVar[list[bool]] = []

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(64, 8))

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        self.modes.append(self.training)
        return SimpleNamespace(loss=(self.q_proj(x) * self.scale).sum())


# The seconds of PEFT's rounds and of ours; the verdict, and the median of the quotients.
VERDICTS = [
    ([2.0] * 6, [1.0] * 6, "FASTER", 2.0),
    ([1.0] * 6, [2.0] * 6, "SLOWER", 0.5),
    ([1.0, 2.0] * 3, [2.0, 1.0] * 3, "can't be told apart", 1.25),
]


@pytest.mark.parametrize(("of_peft", "of_ours", "verdict", "speed"), VERDICTS)
def test_a_step_of_known_cost(of_peft, of_ours, verdict, speed, monkeypatch):
    """Both arms train, whatever the model's mode, and keep S [64, 2], but neither the batch nor a
    buffer.
    """
    seconds = {comparison.PEFT: of_peft, comparison.ACCELERATED: of_ours}
    monkeypatch.setattr(comparison, "interleave", lambda steps, **_: seconds)
    monkeypatch.setattr(Scaled, "modes", [])
    model = make(model=Scaled(), target_modules=["q_proj"])
    found = slk.compare(model, {"x": torch.randn(64, 8)}, rounds=6)
    assert not model.training and Scaled.modes and all(Scaled.modes)
    assert found.peft.saved == found.accelerated.saved == 64 * 2 * 4
    assert found.peft.peak > found.peft.saved
    assert (found.peft.ms.median, found.speed.median) == (1e3 * sum(of_peft) / 6, speed)
    assert verdict in str(found).splitlines()[-1]


def test_a_model_that_was_accelerated_before_is_compared_with_pefts_forward():
    compared = slk.compare(llama("accelerated", dropout=0.2), batch(), rounds=6)
    other = slk.compare(llama("peft", dropout=0.2), batch(), rounds=6)
    assert compared.peft.saved == other.peft.saved > compared.accelerated.saved


def test_the_fusions_of_an_accelerated_model_are_compared_too():
    """As accelerate_peft leaves them that are not given."""
    model = llama("peft", dropout=0.2)
    slk.accelerate_peft(model, fuse_loss=True, fuse_projections=True)
    fusions = [note for note in slk.accelerate_peft(model).notes if "fused" in note]
    before = state_of(model)
    compared = slk.compare(model, batch(), rounds=6, fuse_projections=False)
    assert len(fusions) == 1 and state_of(model) == before
    left = slk.accelerate_peft(model, fuse_projections=False).notes
    assert compared.report.notes == left and left


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
