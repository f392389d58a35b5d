"""What fuse_mlp leaves to the modules' own forwards and why: what the report says, and what each call looks at."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

import stablelora_kernels as slk
from stablelora_kernels import tensor_parallel as slk_tp
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.fused_mlp import ATTRIBUTE, GatedMLP, fuse_mlps
from stablelora_kernels.nn.mlp_operands import OWN_LAYERS
from stablelora_kernels.testing import nf4_weight
from tests.helpers.gated_mlps import (
    INNER,
    MLP,
    TARGETS,
    WIDTH,
    Stacked,
    assert_same,
    count_calls,
    pair,
    rows,
    step,
    with_lora,
)
from tests.helpers.quantized_weights import Linear4bit, torchao_int8

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


# What stands in a report, and whether the same call still gives what the unfused MLP gives.


def merges(model):
    lora_layers(model)["mlp.up_proj"].merge()


def hooks_down(model):
    model["mlp"].down_proj.register_forward_hook(lambda module, args, y: y * 2)


def hooks_act(model):
    model["mlp"].act_fn.register_full_backward_hook(lambda *args: None)


def replaces_forward(model):
    layer = model["mlp"].gate_proj
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 3


def replaces_activations_forward(model):
    model["mlp"].act_fn.forward = torch.tanh


def another_activation(model):
    model["mlp"].act_fn = nn.ReLU()


def a_function(model):
    del model["mlp"].act_fn
    model["mlp"].act_fn = torch.relu


def another_approximation(model):
    model["mlp"].act_fn.approximate = "tanh"


def another_dropout(model):
    model["mlp"].up_proj.lora_dropout = 0.4


def evaluates_one(model):
    model["mlp"].up_proj.eval()


def trains_bias(model):
    model["mlp"].down_proj.bias.requires_grad_(True)


def trains_weight(model):
    model["mlp"].gate_proj.weight.requires_grad_(True)


def another_lora_dtype(model):
    for name in ("lora_A", "lora_B"):
        setattr(model["mlp"].down_proj, name, nn.Parameter(getattr(model["mlp"].down_proj, name).float()))


def replaces_layer(model):
    model["mlp"].up_proj = nn.Sequential(model["mlp"].up_proj)


CHANGES = {
    merges: "'up_proj' is merged",
    hooks_down: "'down_proj' has hooks, which would not run",
    hooks_act: "'act_fn' has hooks, which would not run",
    replaces_forward: "'gate_proj' has a forward that was replaced (as accelerate's hooks do)",
    replaces_activations_forward: "'act_fn' has a forward that was replaced (as accelerate's hooks do)",
    another_activation: "it calls 'act_fn', a ReLU; only SiLU and GELU (exact or tanh) are fused",
    a_function: "it calls relu",
    another_approximation: None,
    another_dropout: "lora_dropout is 0.2 in 'gate_proj' and 0.4 in 'up_proj'",
    evaluates_one: None,
    trains_bias: "'down_proj' has a bias that trains; the op would keep activations for its gradient",
    trains_weight: "'gate_proj' has a weight that trains; the op would keep activations for its gradient",
    another_lora_dtype: "the adapter's dtype is torch.float64 in 'gate_proj' and torch.float32 in 'down_proj'",
    replaces_layer: "it calls 'up_proj', a Sequential; only SiLU and GELU (exact or tanh) are fused",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_turn_it_off_and_are_reported(change, calls):
    """After it was fused: the next call is the module's own. Before: the report says why, and the calls are the same."""
    dtype = FP32 if change is another_lora_dtype else torch.float64
    model, plain = (m.to(dtype) for m in pair(lambda: MLP(nn.GELU(), bias=True), dropout=0.2))
    if change is merges:
        model.eval(), plain.eval()
    step(model, rows(dtype))
    assert len(calls) == 1
    if dtype == FP32:
        model, plain = model.to(BF16), plain.to(BF16)
        dtype = BF16
    for each in (model, plain):
        change(each)
    if change is evaluates_one:
        # Without dropout in one of three.
        assert model["mlp"].down_proj.training
    found, expected = step(model, rows(dtype)), step(plain, rows(dtype))
    assert len(calls) == 1
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    found = again(model)
    reason = CHANGES[change]
    if reason is not None and change is another_lora_dtype:
        reason = reason.replace("float64", "bfloat16")
    assert found.reason == reason
    if change is not evaluates_one:
        step(model, rows(dtype))
        assert len(calls) == (2 if reason is None else 1)


def again(model):
    """The report on an MLP that is fused, judged anew."""
    (mlp,) = fuse_mlps(model, OWN_LAYERS)
    return mlp


def test_what_was_off_comes_back(calls):
    model, plain = pair(MLP)
    mlp = model["mlp"]
    handle = mlp.gate_proj.register_forward_hook(lambda *args: None)
    step(model)
    assert calls == []
    handle.remove()
    with slk.disable_lora(model), torch.no_grad():
        disabled = mlp(rows())
    with slk.disable_lora(plain):
        assert torch.equal(disabled, plain["mlp"](rows()))
    slk.merge_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(mlp(rows()), plain["mlp"](rows()))
    assert calls == []
    slk.unmerge_lora(model)
    assert_same(step(model), step(plain))
    assert calls == ["silu"]


def test_global_hooks_and_tracing_see_every_module(calls):
    model, _ = pair(MLP)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        model["mlp"](rows())
    finally:
        handle.remove()
    assert slk.LoRALinear in seen and nn.SiLU in seen and calls == []
    model["mlp"](rows())
    assert calls == ["silu"]


def test_inputs_that_do_not_fit_are_the_layers_own_errors(calls):
    model, _ = pair(MLP)
    model = model.float()
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch.bfloat16, got torch.float32"):
        model["mlp"](rows(BF16))
    with pytest.raises(ValueError, match=r"x must be \[..., 16\] to fit weight \[24, 16\], got \[70, 15\]"):
        model["mlp"](torch.randn(70, 15))
    with pytest.raises(ValueError, match=r"device"):
        model["mlp"](rows(FP32).to("meta"))
    assert calls == []


class Subclass(torch.Tensor):
    pass


def test_subclasses_of_tensors_are_left_to_the_module(calls):
    model, plain = pair(MLP)
    torch.testing.assert_close(model["mlp"](rows().as_subclass(Subclass)), plain["mlp"](rows().as_subclass(Subclass)))
    assert calls == []


def test_layers_cut_by_tensor_parallelism_compute_by_themselves(mesh, calls):
    model, plain = pair(MLP)
    columns, sums = slk_tp.LoRAColwiseParallel, slk_tp.LoRARowwiseParallel
    parallelize_module(model["mlp"], mesh, {"gate_proj": columns(), "up_proj": columns(), "down_proj": sums()})
    torch.testing.assert_close(model["mlp"](rows()), plain["mlp"](rows()))
    assert calls == [] and again(model).reason.startswith("'gate_proj' has hooks")


# Which layers.


def test_layers_that_are_not_read(calls):
    """int8 layers call their base; a quantized projection cannot be cut in two; an unknown layer may do anything."""
    module = MLP().to(BF16)
    module.up_proj = torchao_int8(module.up_proj)
    model, report = with_lora(module)
    assert report.mlps[0].reason.startswith("'up_proj' calls its base layer, a Linear with a ")
    model["mlp"](rows(BF16))

    module = Stacked(bias=False)
    module.gate_up_proj = Linear4bit(nf4_weight(2 * INNER, WIDTH, 64, nested=False), False, FP32)
    model, report = with_lora(module)
    expected = "'gate_up_proj' holds gate and up stacked in a quantized weight, which is not cut in two"
    assert report.mlps[0].reason == expected
    model["mlp"](rows(FP32))

    class Other(slk.LoRALinear):
        pass

    model, _ = with_lora(MLP())
    model["mlp"].up_proj.__class__ = Other
    assert again(model).reason == "'up_proj' is a Other, which computes more than one product"
    model["mlp"](rows(FP32))

    module = MLP()
    module.down_proj = Linear4bit(nf4_weight(WIDTH, INNER, 8, nested=False), False, FP32)
    model, report = with_lora(module, targets=["gate_proj"])
    assert report.mlps[0].reason == "'down_proj' is a Linear4bit without an adapter whose weight is not plain"
    model["mlp"](rows(FP32))
    assert calls == []


def test_the_report_groups_and_lists():
    class Clamped(MLP):
        def forward(self, x):
            return super().forward(x.clamp(-1, 1))

    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            return self.o_proj(self.q_proj(x) + self.v_proj(x))

    model = nn.Sequential(MLP(), MLP(nn.GELU()), Clamped(), MLP(nn.ReLU()), Clamped(), Unlike(), MLP())
    report = slk.apply_lora(model, slk.LoRAConfig(target_modules=TARGETS), fuse_mlp=True)
    clamp, relu = (
        "it calls clamp",
        "it calls 'act_fn', a ReLU; only SiLU and GELU (exact or tanh) are fused",
    )
    assert report.mlps == (
        GatedMLP("0", "silu"), GatedMLP("1", "gelu"), GatedMLP("2", None, clamp), GatedMLP("3", None, relu),
        GatedMLP("4", None, clamp), GatedMLP("6", "silu"),
    )  # fmt: skip
    assert report.notes[-3:] == (
        "computed in one op each: 2 x gated MLP (silu); 1 x gated MLP (gelu)",
        f"not in one op: 2, 4: {clamp}",
        f"not in one op: 3: {relu}",
    )
    report = slk.apply_lora(nn.Sequential(nn.Linear(2, 2)), slk.LoRAConfig(target_modules=["0"]), fuse_mlp=True)
    assert report.notes[-1] == "fuse_mlp found no gated MLP with LoRA" and report.mlps == ()


def test_a_class_that_cannot_have_a_subclass():
    class Final(MLP):
        def __init_subclass__(cls, **kwargs):
            raise TypeError("Final is final")

    module = Final()
    _, report = with_lora(module)
    assert report.mlps[0].reason == "its class Final can't have a subclass (Final is final)"
    assert type(module) is Final and ATTRIBUTE not in module.__dict__
