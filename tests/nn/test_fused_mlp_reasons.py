"""What fuse_mlp leaves to the modules' own forwards and why: what the report says, and what each call looks at."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

import stablelora_kernels as slk
from stablelora_kernels import tensor_parallel as slk_tp
from stablelora_kernels.nn.fused_mlp import fuse_mlps
from stablelora_kernels.nn.mlp_operands import OWN_LAYERS
from tests.helpers.gated_mlps import (
    LIBRARIES,
    MLP,
    assert_same,
    count_calls,
    into_dtype,
    mlp_of,
    pair,
    rows,
    step,
)

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass.*", "ignore:.*lora_bias.*")


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


# What stands in a report, and whether the same call still gives what the unfused MLP gives.


def doubled(module, args, y):
    return y * 2


def merges(model):
    model.eval()
    mlp_of(model).up_proj.merge()


def disables(model):
    mlp_of(model).up_proj.enable_adapters(False)


def hooks(model):
    mlp_of(model).down_proj.register_forward_hook(doubled)


def hooks_act(model):
    mlp_of(model).act_fn.register_full_backward_hook(lambda *args: None)


def hooks_base(model):
    mlp_of(model).down_proj.base_layer.register_forward_hook(doubled)


def hooks_dropout(model):
    mlp_of(model).down_proj.lora_dropout["default"].register_forward_hook(doubled)


def replaces_forward(model):
    layer = mlp_of(model).gate_proj
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 3


def replaces_activations_forward(model):
    mlp_of(model).act_fn.forward = torch.tanh


def another_activation(model):
    mlp_of(model).act_fn = nn.ReLU()


def a_function(model):
    del mlp_of(model).act_fn
    mlp_of(model).act_fn = torch.relu


def another_approximation(model):
    mlp_of(model).act_fn.approximate = "tanh"


def another_dropout(model):
    layer = mlp_of(model).up_proj
    if isinstance(layer.lora_dropout, float):
        layer.lora_dropout = 0.4
    else:
        layer.lora_dropout["default"].p = 0.4


def no_dropout(model):
    mlp_of(model).down_proj.lora_dropout["default"] = nn.Identity()


def evaluates_one(model):
    mlp_of(model).up_proj.eval()


def trains_bias(model):
    layer = mlp_of(model).down_proj
    getattr(layer, "base_layer", layer).bias.requires_grad_(True)


def trains_weight(model):
    layer = mlp_of(model).gate_proj
    getattr(layer, "base_layer", layer).weight.requires_grad_(True)


def another_lora_dtype(model):
    model.to(BF16)
    for name in ("lora_A", "lora_B"):
        setattr(mlp_of(model).down_proj, name, nn.Parameter(getattr(mlp_of(model).down_proj, name).float()))


def replaces_layer(model):
    mlp_of(model).up_proj = nn.Sequential(mlp_of(model).up_proj)


def two_adapters(model):
    import peft

    torch.manual_seed(7)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    into_dtype(model, torch.float64)
    model.base_model.set_adapter(["default", "other"])


def a_scaling_that_is_no_number(model):
    mlp_of(model).gate_proj.scaling["default"] = torch.tensor(2.0)


HOOKS, TRAINS = "has hooks, which would not run", "that trains; the op would keep activations for its gradient"
FORWARD = "has a forward that was replaced (as accelerate's hooks do)"
FUSED = "only SiLU and GELU (exact or tanh) are fused"
PEFTS_OWN = "runs PEFT's own forward: the"
# None: the next report finds it fused again.
BOTH = [
    (merges, "'up_proj' is merged"),
    (hooks, f"'down_proj' {HOOKS}"),
    (another_dropout, "lora_dropout is 0.2 in 'gate_proj' and 0.4 in 'up_proj'"),
    (trains_bias, f"'down_proj' has a bias {TRAINS}"),
    (trains_weight, f"'gate_proj' has a weight {TRAINS}"),
]
CHANGES = [(library, *case) for library in LIBRARIES for case in BOTH] + [
    ("ours", hooks_act, f"'act_fn' {HOOKS}"),
    ("ours", replaces_forward, f"'gate_proj' {FORWARD}"),
    ("ours", replaces_activations_forward, f"'act_fn' {FORWARD}"),
    ("ours", another_activation, f"it calls 'act_fn', a ReLU; {FUSED}"),
    ("ours", a_function, "it calls relu"),
    ("ours", another_approximation, None),
    ("ours", evaluates_one, None),
    ("ours", another_lora_dtype, "the adapter's dtype is torch.bfloat16 in 'gate_proj' and torch.float32 in 'down_proj'"),
    ("ours", replaces_layer, f"it calls 'up_proj', a Sequential; {FUSED}"),
    ("PEFT", two_adapters, "'up_proj' has 2 active adapters, 'default', 'other'"),
    ("PEFT", disables, "'up_proj' is disabled"),
    ("PEFT", hooks_base, "'down_proj' calls its base layer, a Linear, for its product"),
    ("PEFT", hooks_dropout, f"'down_proj' {PEFTS_OWN} dropout of adapter 'default' is a Dropout, or has hooks"),
    ("PEFT", no_dropout, "lora_dropout is 0.2 in 'gate_proj' and 0.0 in 'down_proj'"),
    ("PEFT", a_scaling_that_is_no_number,
     f"'gate_proj' {PEFTS_OWN} scaling of adapter 'default' is a Tensor, not a number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("library", "change", "reason"), CHANGES, ids=[f"{case[0]}-{case[1].__name__}" for case in CHANGES]
)
def test_changes_turn_it_off_and_are_reported(library, change, reason, calls):
    """After it was fused: the next call is the module's own. Before: the report says why, and the calls are the same."""
    dtype = FP32 if change is another_lora_dtype else torch.float64
    models = pair(lambda: MLP(nn.GELU(), bias=True), library, dropout=0.2)
    for model in models:
        model.to(dtype)
    step(models[0], rows(dtype))
    assert len(calls) == 1
    for model in models:
        change(model)
    dtype = BF16 if change is another_lora_dtype else dtype
    found, expected = (step(model, rows(dtype)) for model in models)
    assert len(calls) == 1
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert again(models[0]).reason == reason
    if change is not evaluates_one:
        step(models[0], rows(dtype))
        assert len(calls) == (2 if reason is None else 1)


def again(model):
    """The report on an MLP that is fused, judged anew."""
    if hasattr(model, "get_base_model"):
        report = slk.accelerate_peft(model, fuse_mlp=True)
        (mlp,) = report.mlps
        assert mlp.reason is None or f"not in one op: base_model.model.mlp: {mlp.reason}" in report.notes
    else:
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


def test_pefts_adapters_may_be_switched_scaled_disabled_merged_and_deleted(calls):
    models = model, plain = pair(MLP, "PEFT", dropout=0.2)

    def same(count):
        calls.clear()
        assert_same(step(model), step(plain))
        assert len(calls) == count

    for each in models:
        two_adapters(each)
    for active, count in (("default", 1), ("other", 1), (["default", "other"], 0), ("default", 1)):
        for each in models:
            each.base_model.set_adapter(active)
        same(count)
    for each in models:
        mlp_of(each).down_proj.scale_layer(1.5)
    same(1)
    calls.clear()
    with torch.no_grad():
        model.eval(), plain.eval()
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(rows()), plain(rows()))
        with slk.disable_lora(model), plain.disable_adapter():
            assert torch.equal(model(rows()), plain(rows()))
        active = model(rows())
        assert len(calls) == 1
        model.merge_adapter()
        torch.testing.assert_close(model(rows()), active)
        model.unmerge_adapter()
        assert len(calls) == 1
        torch.testing.assert_close(model(rows()), active)
    # Deleted: no adapter is left in gate and down.
    for each in models:
        each.base_model.set_adapter("other")
        each.delete_adapter("default")
        each.train()
    same(1)


def test_global_hooks_tracing_and_subclasses_see_every_module(calls):
    model, plain = pair(MLP)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        model["mlp"](rows())
    finally:
        handle.remove()
    assert slk.LoRALinear in seen and nn.SiLU in seen

    class Subclass(torch.Tensor):
        pass

    for x in (rows().as_subclass(Subclass), nn.Parameter(rows())):
        torch.testing.assert_close(model["mlp"](x), plain["mlp"](x))
    assert calls == []
    model["mlp"](rows())
    assert calls == ["silu"]


def test_inputs_that_do_not_fit_are_the_layers_own_errors(calls):
    model = pair(MLP)[0].float()
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch.bfloat16, got torch.float32"):
        model["mlp"](rows(BF16))
    with pytest.raises(ValueError, match=r"x must be \[..., 16\] to fit weight \[24, 16\], got \[70, 15\]"):
        model["mlp"](torch.randn(70, 15))
    with pytest.raises(ValueError, match=r"device"):
        model["mlp"](rows(FP32).to("meta"))
    assert calls == []


def test_layers_cut_by_tensor_parallelism_compute_by_themselves(mesh, calls):
    model, plain = pair(MLP)
    columns, sums = slk_tp.LoRAColwiseParallel, slk_tp.LoRARowwiseParallel
    parallelize_module(model["mlp"], mesh, {"gate_proj": columns(), "up_proj": columns(), "down_proj": sums()})
    torch.testing.assert_close(model["mlp"](rows()), plain["mlp"](rows()))
    assert calls == [] and again(model).reason.startswith("'gate_proj' has hooks")
