"""A fused MLP's life: copies, replicas, checkpoints, compiling and sharding, and giving the model back."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.nn.fused_mlp import ATTRIBUTE, GatedMLP, is_fused
from stablelora_kernels.nn.projection_group import ATTRIBUTE as GROUP
from tests.helpers.gated_mlps import (
    IDS,
    LIBRARIES,
    MLP,
    TARGETS,
    Stacked,
    assert_same,
    base_of,
    count_calls,
    family,
    mlp_of,
    pair,
    replica,
    rows,
    step,
    with_lora,
    with_peft,
)
from tests.helpers.small_models import refused, through_a_file

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass.*", "ignore:.*4-bit linear.*")
by_library = pytest.mark.parametrize("library", LIBRARIES)


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


def everything(model):
    """The modules' classes, and the attributes of MLPs."""
    return {
        name: (type(m), {k: id(v) for k, v in m.__dict__.items()} if name.endswith("mlp") else None)
        for name, m in model.named_modules()
    }


def test_remove_gives_the_model_back():
    model = family("llama")
    before, state = everything(model), copy.deepcopy(model.state_dict())
    slk.apply_lora(model, slk.LoRAConfig(r=2, target_modules=TARGETS), fuse_mlp=True)
    mlp = model.model.layers[0].mlp
    assert is_fused(mlp) and isinstance(mlp, type(family("llama").model.layers[0].mlp))
    assert type(mlp).__name__ == type(mlp).__qualname__ == "LlamaMLP" and repr(mlp).startswith("LlamaMLP(")
    slk.remove_lora(model, merge=False)
    assert everything(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_restore_gives_the_model_back(calls):
    model = family("llama")
    original = type(model.model.layers[0].mlp)
    model, _ = with_peft(model)
    layers, before = base_of(model).model.layers, {name: type(m) for name, m in model.named_modules()}
    assert is_fused(layers[0].mlp) and type(layers[0].mlp).__mro__[2] is original

    def is_back():
        return type(layers[0].mlp) is original and not any(ATTRIBUTE in m.__dict__ for m in model.modules())

    # Again, with and without; the last call decides.
    slk.accelerate_peft(model)
    assert is_back()
    for _ in range(2):
        slk.accelerate_peft(model, fuse_mlp=True)
        assert {name: type(module) for name, module in model.named_modules()} == before
    slk.restore_peft(model)
    assert is_back()
    # PEFT takes its layers away, and the class comes back with the last one.
    slk.accelerate_peft(model, fuse_mlp=True)
    base = model.unload()
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, family("llama")(IDS).logits) and calls == []
    assert type(base.model.layers[0].mlp) is original


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloading_unfuses_and_pickles_need_no_library(method):
    """The class comes back with the last adapter that leaves, and the model's pickle names nothing of this library."""
    model, _ = pair(MLP, "PEFT")
    mlp = mlp_of(model)
    mlp.up_proj = mlp.up_proj.get_base_layer()
    assert is_fused(mlp), "gate and down still have adapters"
    model, plain = pair(MLP, "PEFT")
    base, expected = getattr(model, method)(), getattr(plain, method)()
    assert type(base["mlp"]) is MLP and ATTRIBUTE not in vars(base["mlp"])
    torch.testing.assert_close(base(rows()), expected(rows()))
    assert b"stablelora_kernels" not in pickle.dumps(base)


def test_a_bound_forward_is_given_back(calls):
    """Liger's way to patch a model that exists."""

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    module = MLP(nn.ReLU())
    module.forward = types.MethodType(forward, module)
    expected = module.__dict__["forward"]
    model, report = with_lora(module)
    assert report.mlps == (GatedMLP("mlp", "silu"),)
    x = rows(FP32)
    y = model["mlp"](x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied["mlp"](x), y) and calls == ["silu"] * 2
    copied["mlp"].gate_proj.register_forward_pre_hook(lambda *args: None)
    torch.testing.assert_close(copied["mlp"](x), y, rtol=1e-4, atol=1e-3)
    assert len(calls) == 2
    slk.remove_lora(model, merge=False)
    assert type(module) is MLP and module.__dict__["forward"] == expected


def test_hooks_like_accelerates_outlive_it(calls):
    """They keep the method that they wrap, and go on calling it after the module got its class back."""
    model, plain = pair(MLP)
    mlp = model["mlp"]
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) * 2
    expected = step(plain)["y"] * 2
    torch.testing.assert_close(mlp(rows()), expected)
    assert calls == ["silu"]
    slk.remove_lora(model, merge=True)
    torch.testing.assert_close(mlp(rows()), expected)
    assert type(mlp) is MLP and calls == ["silu"]


def test_load_adapter_and_its_failure(tmp_path, monkeypatch, calls):
    plain, _ = with_lora(family("llama"), False)
    slk.save_adapter(plain, tmp_path)
    model = family("llama")

    def fails(*args, **kwargs):
        assert is_fused(model.model.layers[0].mlp)
        raise MemoryError("no memory")

    before = everything(model)
    with monkeypatch.context() as patch:
        patch.setattr("stablelora_kernels.model.save_load._copy_all", fails)
        with refused(model, MemoryError, "no memory"):
            slk.load_adapter(model, tmp_path, fuse_mlp=True)
    assert {name: kind for name, (kind, _) in everything(model).items()} == {n: k for n, (k, _) in before.items()}
    assert not any(ATTRIBUTE in module.__dict__ for module in model.modules())
    report = slk.load_adapter(model, tmp_path, fuse_mlp=True)
    assert [mlp.name for mlp in report.mlps] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert str(report).endswith("note: computed in one op each: 2 x gated MLP (silu)")
    assert_same(step(model.train()), step(plain))
    assert len(calls) == 2
    slk.save_adapter(model, tmp_path / "other")
    name = "adapter_model.safetensors"
    assert (tmp_path / "other" / name).read_bytes() == (tmp_path / name).read_bytes()


@by_library
def test_copies_and_pickles_compute_with_their_own_layers(library, calls):
    model, plain = pair(MLP, library, dropout=0.2)
    expected = step(plain)
    pickles = [pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)]
    others = [copy.deepcopy(model), *pickles, through_a_file(model)]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert_same(step(copy.copy(model)), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in others:
        calls.clear()
        assert type(mlp_of(other)) is type(mlp_of(model))
        assert_same(step(other), expected)
        assert calls == ["silu"]
    model.load_state_dict(plain.state_dict())
    assert_same(step(model), expected)


@by_library
def test_replicas_compute_with_their_own_tensors(library, calls):
    model, plain = pair(MLP, library)
    expected, other = step(plain), replica(model)
    with torch.no_grad():
        next(model.parameters()).mul_(3)
    assert_same(step(model, call=other), expected)
    assert calls == ["silu"]


@pytest.mark.parametrize("reentrant", [True, False])
@by_library
def test_checkpointing(library, reentrant, calls):
    model, plain = pair(MLP, library, dropout=0.3)
    assert_same(step(model, call=lambda x: checkpoint(model, x, use_reentrant=reentrant)), step(plain))
    assert calls == ["silu"] * 2


@pytest.mark.covering(1)
@pytest.mark.parametrize("make", [MLP, Stacked])
@by_library
def test_torch_compile_has_no_graph_break(library, make, calls):
    model, plain = pair(make, library)
    expected = step(plain)
    torch._dynamo.reset()
    mlp_of(model).compile(backend="aot_eager", fullgraph=True)
    assert_same(step(model), expected)
    # Another mode, which the compiled code must notice.
    mlp_of(model).down_proj.merge()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(rows()), expected["y"])


@pytest.mark.parametrize("around", [False, True])
@by_library
def test_fsdp2(library, around, mesh, calls):
    """Parameters are DTensors until a forward gathers them: of the MLP, or of the model around it."""
    model, plain = pair(MLP, library)
    expected = step(plain)
    fully_shard(base_of(model) if around else mlp_of(model), mesh=mesh)
    found = step(model)
    assert calls == ["silu"]
    found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    assert_same(found, expected)


@by_library
def test_fuse_projections_serves_where_the_mlp_falls_back(library, calls):
    model, plain = pair(MLP, library, fuse_projections=True)
    group = mlp_of(model).gate_proj.__dict__[GROUP]
    served = []
    group.compute = lambda layers, x, compute=group.compute: served.append(len(layers)) or compute(layers, x)
    assert_same(step(model), step(plain))
    assert calls == ["silu"] and served == [] and group._pending is None
    handle = mlp_of(model).down_proj.register_forward_hook(lambda *args: None)
    assert_same(step(model), step(plain))
    assert calls == ["silu"] and served == [2]
    handle.remove()
    step(model)
    assert len(calls) == 2 and served == [2]


def test_a_model_that_is_an_mlp_itself(calls):
    model = MLP()
    report = slk.apply_lora(model, slk.LoRAConfig(target_modules=TARGETS), fuse_mlp=True)
    model(rows(FP32))
    assert report.mlps == (GatedMLP("", "silu"),) and calls == ["silu"]
    slk.remove_lora(model)
    assert type(model) is MLP


def test_generate(calls):
    model, plain = (with_lora(family("llama", FP32), fuse)[0].eval() for fuse in (True, False))
    outputs = [m.generate(input_ids=IDS[:, :8], max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*outputs) and calls


def test_layers_that_share_their_A_draw_two_masks(calls):
    """The halves of a stacked projection draw one."""
    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        model = with_lora(MLP().double(), fuse, dropout=0.5)[0]
        model["mlp"].up_proj.lora_A = model["mlp"].gate_proj.lora_A
        models.append(model)
    model, plain = models
    assert_same(step(model), step(plain), 0.0)
    assert calls == []
    assert_same(step(model.eval()), step(plain.eval()))
    assert calls == ["silu"]


def test_classes_are_not_kept():
    def once():
        class Local(MLP):
            pass

        class LocalAct(nn.SiLU):
            pass

        model, report = with_lora(Local(LocalAct()))
        assert report.mlps[0].reason is None
        slk.remove_lora(model)
        return weakref.ref(Local), weakref.ref(LocalAct)

    classes = [kind for _ in range(3) for kind in once()]
    # The first collection ends the fused classes, which hold these.
    gc.collect(), gc.collect()
    assert [kind() for kind in classes] == [None] * 6


def test_pickles_know_what_was_read(calls):
    model = pickle.loads(pickle.dumps(with_lora(MLP(nn.GELU("tanh")))[0]))
    model["mlp"](rows(torch.float32))
    model["mlp"].act_fn.approximate = "none"
    model["mlp"](rows(torch.float32))
    assert calls == ["gelu_tanh"]
