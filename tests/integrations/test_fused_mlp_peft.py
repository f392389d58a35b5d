"""fuse_mlp on accelerated PEFT layers: against the same models without it and PEFT's own, and what turns it off."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import stablelora_kernels as slk
from stablelora_kernels.nn.fused_mlp import ATTRIBUTE, GatedMLP, is_fused
from stablelora_kernels.nn.projection_group import ATTRIBUTE as GROUP
from tests.helpers.gated_mlps import (
    FAMILIES,
    IDS,
    MLP,
    TARGETS,
    Stacked,
    assert_same,
    count_calls,
    family,
    replica,
    rows,
    step,
)

peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass.*", "ignore:.*4-bit linear.*")


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


class Wrapper(nn.ModuleDict):
    """What PEFT wraps: a module with a forward."""

    def forward(self, x):
        return self["mlp"](x)


def wrap(model, fuse=True, dtype=torch.float64, report=None, **kwargs):
    """A PEFT model with an adapter in float64, accelerated. PEFT leaves adapters of float64 models in float32."""
    torch.manual_seed(1)
    settings = {"r": 3, "target_modules": TARGETS, "lora_dropout": 0.2, "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings | kwargs))
    into_dtype(model, dtype)
    return model.train(), slk.accelerate_peft(model, fuse_mlp=fuse)


def into_dtype(model, dtype):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def pair(make=MLP, **kwargs):
    """The same MLP, as model.base_model.model.mlp, fused and not."""
    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        models.append(wrap(Wrapper({"mlp": make().double()}), fuse, **kwargs)[0])
    return models


def run(model, x=None):
    """As step, of a PEFT model around one MLP."""
    model.zero_grad()
    torch.manual_seed(5)
    x = rows() if x is None else x
    y = model(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def mlp_of(model):
    return model.base_model.model["mlp"]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "qwen2_moe"])
def test_families_train_as_without(model_type, calls):
    model, report = wrap(family(model_type))
    count = FAMILIES[model_type]
    assert len(report.mlps) == count and all(mlp.reason is None for mlp in report.mlps), report
    found = step(model)
    assert len(calls) == count
    assert report.notes[-1] == f"computed in one op each: {count} x gated MLP ({calls[0]})"
    plain, other = wrap(family(model_type), fuse=False)
    assert other.mlps == ()
    assert_same(found, step(plain))
    # Without dropout, whose masks differ, PEFT's own.
    for each in (model, plain):
        each.eval()
    slk.restore_peft(plain)
    assert_same(step(model), step(plain))
    assert len(calls) == 2 * count


@pytest.mark.parametrize("make", [lambda: MLP(bias=True), Stacked], ids=["biases", "stacked"])
def test_on_both_backends(make, backend, calls):
    dtype = FP32 if backend == "triton" else torch.float64
    model, plain = (each.to(dtype) for each in pair(make))
    found = run(model, rows(dtype))
    assert len(calls) == 1
    assert_same(found, run(plain, rows(dtype)), 1e-4 if backend == "triton" else 1e-10)


@pytest.mark.parametrize("targets", [["gate_proj"], ["up_proj", "down_proj"], ["down_proj"]])
def test_a_projection_without_an_adapter_loses_its_branch_only(targets, calls):
    model, plain = pair(target_modules=targets)
    assert_same(run(model), run(plain))
    assert calls == ["silu"]


def two_adapters(model):
    torch.manual_seed(7)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    into_dtype(model, torch.float64)
    model.base_model.set_adapter(["default", "other"])


def merges(model):
    mlp_of(model).up_proj.merge()


def disables(model):
    mlp_of(model).up_proj.enable_adapters(False)


def hooks(model):
    mlp_of(model).down_proj.register_forward_hook(lambda module, args, y: y * 2)


def hooks_base(model):
    mlp_of(model).down_proj.base_layer.register_forward_hook(lambda module, args, y: y * 2)


def hooks_dropout(model):
    mlp_of(model).down_proj.lora_dropout["default"].register_forward_hook(lambda module, args, y: y * 2)


def another_dropout(model):
    mlp_of(model).down_proj.lora_dropout["default"].p = 0.4


def no_dropout(model):
    mlp_of(model).down_proj.lora_dropout["default"] = nn.Identity()


def trains_bias(model):
    mlp_of(model).gate_proj.base_layer.bias.requires_grad_(True)


def a_scaling_that_is_no_number(model):
    mlp_of(model).gate_proj.scaling["default"] = torch.tensor(2.0)


REASONS = {
    two_adapters: "'up_proj' has 2 active adapters, 'default', 'other'",
    merges: "'up_proj' is merged",
    disables: "'up_proj' is disabled",
    hooks: "'down_proj' has hooks, which would not run",
    hooks_base: "'down_proj' calls its base layer, a Linear, for its product",
    hooks_dropout: "'down_proj' runs PEFT's own forward: the dropout of adapter 'default' is a Dropout, or has hooks",
    another_dropout: "lora_dropout is 0.2 in 'gate_proj' and 0.4 in 'down_proj'",
    no_dropout: "lora_dropout is 0.2 in 'gate_proj' and 0.0 in 'down_proj'",
    trains_bias: "'gate_proj' has a bias that trains; the op would keep activations for its gradient",
    a_scaling_that_is_no_number: (
        "'gate_proj' runs PEFT's own forward: the scaling of adapter 'default' is a Tensor, not a number"
    ),
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_changes_turn_it_off_and_are_reported(change, calls):
    model, plain = pair(lambda: MLP(bias=True))
    run(model)
    assert len(calls) == 1
    for each in (model, plain):
        change(each)
    found, expected = run(model), run(plain)
    assert len(calls) == 1
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    report = slk.accelerate_peft(model, fuse_mlp=True)
    assert report.mlps[0].reason == REASONS[change], report
    assert f"not in one op: base_model.model.mlp: {REASONS[change]}" in report.notes
    run(model)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize(("kwargs", "reason"), [
    ({"use_dora": True}, "'gate_proj' runs PEFT's own forward: adapter 'default' is a variant of LoRA (DoraLinearVariant)"),
    ({"lora_bias": True}, "'gate_proj' has a bias in lora_B of adapter 'default', which trains"),
    ({"bias": "all"}, "'gate_proj' has a bias that trains; the op would keep activations for its gradient"),
])  # fmt: skip
def test_adapters_that_are_not_fused(kwargs, reason, calls):
    model, plain = pair(lambda: MLP(bias=True), **kwargs)
    assert_same(run(model), run(plain))
    assert calls == []
    assert slk.accelerate_peft(model, fuse_mlp=True).mlps == (GatedMLP("base_model.model.mlp", "silu", reason),)


def test_adapters_may_be_switched_scaled_disabled_and_merged(calls):
    model, plain = pair()
    for each in (model, plain):
        two_adapters(each)
    for active, fused in (("default", 1), ("other", 1), (["default", "other"], 0), ("default", 1)):
        for each in (model, plain):
            each.base_model.set_adapter(active)
        calls.clear()
        assert_same(run(model), run(plain))
        assert len(calls) == fused, active
    for each in (model, plain):
        mlp_of(each).down_proj.scale_layer(1.5)
    assert_same(run(model), run(plain))
    calls.clear()
    with torch.no_grad():
        for each in (model, plain):
            each.eval()
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
    assert len(calls) == 2
    # Deleted: no adapter is left in gate and down.
    for each in (model, plain):
        each.base_model.set_adapter("other")
        each.delete_adapter("default")
    assert_same(run(model.train()), run(plain.train()))
    assert len(calls) == 3


def test_restore_gives_the_model_back(calls):
    model = family("llama")
    original = type(model.model.layers[0].mlp)
    model, _ = wrap(model)
    layers = model.base_model.model.model.layers
    before = {name: type(module) for name, module in model.named_modules()}
    assert is_fused(layers[0].mlp) and type(layers[0].mlp).__name__ == "LlamaMLP"
    # Again, with and without; the last call decides.
    slk.accelerate_peft(model)
    assert type(layers[0].mlp) is original and not any(ATTRIBUTE in m.__dict__ for m in model.modules())
    slk.accelerate_peft(model, fuse_mlp=True)
    slk.accelerate_peft(model, fuse_mlp=True)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert type(layers[0].mlp).__mro__[2] is original
    slk.restore_peft(model)
    assert type(layers[0].mlp) is original and not any(ATTRIBUTE in m.__dict__ for m in model.modules())
    slk.accelerate_peft(model, fuse_mlp=True)
    # PEFT takes its layers away: the class goes on with frozen layers, until restore_peft gives the original's back.
    base = model.unload()
    calls.clear()
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, family("llama")(IDS).logits) and calls == []
    slk.restore_peft(base)
    assert type(base.model.layers[0].mlp) is original


def test_copies_and_pickles_compute_with_their_own_layers(calls):
    model, plain = pair()
    expected = run(plain)
    others = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in others:
        calls.clear()
        assert_same(run(other), expected)
        assert calls == ["silu"]
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloading_unfuses_and_pickles_need_no_library(method):
    """The class comes back with the last adapter that leaves, and the model's pickle names nothing of this library."""
    model, plain = pair()
    mlp = mlp_of(model)
    mlp.up_proj = mlp.up_proj.get_base_layer()
    assert is_fused(mlp), "gate and down still have adapters"
    model, plain = pair()
    base, expected = getattr(model, method)(), getattr(plain, method)()
    assert type(base.mlp) is MLP and ATTRIBUTE not in vars(base.mlp)
    torch.testing.assert_close(base(rows()), expected(rows()))
    assert b"stablelora_kernels" not in pickle.dumps(base)


def test_replicas_and_fsdp2(mesh, calls):
    model, plain = pair()
    expected = run(plain)
    torch.manual_seed(5)
    torch.testing.assert_close(replica(model)(rows()), expected["y"])
    assert calls == ["silu"]
    fully_shard(mlp_of(model), mesh=mesh)
    found = run(model)
    assert calls == ["silu"] * 2
    found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    assert_same(found, expected)


def test_fuse_projections_serves_where_the_mlp_falls_back(calls):
    model, plain = pair()
    report = slk.accelerate_peft(model, fuse_projections=True, fuse_mlp=True)
    assert [note.partition(":")[0] for note in report.notes] == [
        "fused projections", "computed in one op each",
    ]  # fmt: skip
    group = mlp_of(model).gate_proj.__dict__[GROUP]
    served = []
    group.compute = lambda layers, x, compute=group.compute: served.append(len(layers)) or compute(layers, x)
    assert_same(run(model), run(plain))
    assert calls == ["silu"] and served == []
    mlp_of(model).down_proj.register_forward_hook(lambda *args: None)
    assert_same(run(model), run(plain))
    assert calls == ["silu"] and served == [2]


def test_checkpointing_and_compiling(calls):
    model, plain = wrap(family("llama"))[0], wrap(family("llama"), False)[0]
    expected = step(plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(step(model), expected)
    assert len(calls) == 4
    model, plain = pair(lora_dropout=0.0)
    torch._dynamo.reset()
    mlp_of(model).compile(backend="aot_eager", fullgraph=True)
    assert_same(run(model), run(plain))


def test_layers_that_are_not_accelerated(calls):
    """IA3's, and frozen layers of other classes, are told to be projections that cannot be read."""

    class Linear(nn.Linear):
        pass

    module = MLP().double()
    module.down_proj.__class__ = Linear
    model, report = wrap(Wrapper({"mlp": module}), target_modules=["gate_proj"])
    assert report.mlps[0].reason == "'down_proj' calls its base layer, a Linear, for its product"
    run(model)
    module = MLP().double()
    model = peft.get_peft_model(
        Wrapper({"mlp": module}), peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[])
    )
    model = peft.get_peft_model(model.base_model.model, peft.LoraConfig(target_modules=["gate_proj"]))
    report = slk.accelerate_peft(model, fuse_mlp=True)
    assert [mlp.reason for mlp in report.mlps] == ["'up_proj' runs PEFT's own forward: it is a Linear"]
    assert calls == []
