"""fuse_mlp on our own layers: results against the same models without it, copies, and giving the model back."""

from __future__ import annotations

import copy
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.nn.fused_mlp import ATTRIBUTE, GatedMLP, is_fused
from stablelora_kernels.nn.projection_group import ATTRIBUTE as GROUP
from stablelora_kernels.testing import EPS, fp8_weight, nf4_weight
from tests.helpers.architectures import transformers
from tests.helpers.gated_mlps import (
    FAMILIES,
    IDS,
    INNER,
    MLP,
    TARGETS,
    WIDTH,
    Stacked,
    assert_same,
    count_calls,
    family,
    pair,
    replica,
    rows,
    step,
    with_lora,
)
from tests.helpers.oracle import bytes_held
from tests.helpers.quantized_weights import Linear4bit, fp8_linear
from tests.helpers.small_models import fill_b, refused

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


def adapted(model_type, fuse, dropout, dtype=torch.float64, **more):
    model = family(model_type, dtype)
    config = slk.LoRAConfig(r=3, target_modules=TARGETS, lora_dropout=dropout)
    torch.manual_seed(1)
    report = slk.apply_lora(model, config, fuse_mlp=fuse, **more)
    fill_b(model)
    return model.train(), report


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_train_as_without(model_type, calls):
    model, report = adapted(model_type, True, 0.2)
    count = FAMILIES[model_type]
    assert len(report.mlps) == count and all(mlp.reason is None for mlp in report.mlps), report
    found = step(model)
    activation = "gelu_tanh" if model_type.startswith("gemma") else "silu"
    assert calls == [activation] * count
    assert f"computed in one op each: {count} x gated MLP ({activation})" in report.notes
    plain, other = adapted(model_type, False, 0.2)
    assert other.mlps == () and not any("one op" in note for note in other.notes)
    assert_same(found, step(plain))
    assert len(calls) == count


def conv1d(module):
    """GPT-2's layers, which hold W transposed."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(module, name)
        setattr(module, name, transformers.pytorch_utils.Conv1D(linear.out_features, linear.in_features))
    return module


MAKERS = {
    "as in Llama": MLP,
    "biases": lambda: MLP(bias=True),
    "exact GELU": lambda: MLP(nn.GELU()),
    "Conv1D": lambda: conv1d(MLP()),
    "stacked": Stacked,
    "stacked, up first": lambda: Stacked(up_first=True),
}


@pytest.mark.covering
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_on_both_backends(make, dropout, backend, calls):
    model, plain = pair(make, dropout=dropout)
    if backend == "triton":
        model, plain = model.float(), plain.float()
    dtype = FP32 if backend == "triton" else torch.float64
    found = step(model, rows(dtype))
    assert len(calls) == 1
    assert_same(found, step(plain, rows(dtype)), 1e-4 if backend == "triton" else 1e-10)


def test_an_input_without_a_gradient(backend, calls):
    """As in a first layer whose attention has no adapter."""
    model, plain = (each.float() for each in pair(MLP))
    x = rows(FP32).detach()
    found, expected = step(model, x), step(plain, x)
    assert "x" not in found and calls == ["silu"]
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_x_gate_and_up(dropout):
    """And S of rank 3, and the state of torch's generator: less than half of what separate layers keep."""
    x, kept = torch.randn(200, 64, requires_grad=True), {}
    for fuse in (True, False):
        model, _ = with_lora(MLP(width=64, inner=160), fuse, dropout)
        kept[fuse] = bytes_held(lambda model=model: model["mlp"](x), model.parameters())
    needed, state = 4 * 200 * (64 + 2 * 160 + 3 * 3), torch.get_rng_state().nbytes
    assert kept[True] <= needed + (3 * state if dropout else 0) < 0.8 * kept[False]


@pytest.mark.parametrize("targets", [["gate_proj"], ["up_proj", "down_proj"], ["down_proj"], ["gate_proj", "up_proj"]])
def test_a_projection_without_an_adapter_loses_its_branch_only(targets, calls):
    model, plain = pair(MLP, dropout=0.2, targets=targets)
    found = step(model)
    assert calls == ["silu"]
    assert_same(found, step(plain))


def test_other_arguments(calls):
    """By keyword; no rows, one row; and what the forward does not take is its own error."""
    model, plain = pair(MLP)
    mlp, own = model["mlp"], plain["mlp"]
    for x in (rows(), rows()[:0], rows()[0], rows()[0, 0], rows()[:, :1].expand(2, 40, WIDTH)):
        torch.testing.assert_close(mlp(x=x), own(x))
    assert len(calls) == 5
    for bad in ({"y": rows()}, {"x": rows(), "y": 1}, {}):
        with pytest.raises(TypeError, match="argument"):
            mlp(**bad)
    assert len(calls) == 5


@pytest.mark.parametrize("kind", ["nf4", "fp8", "nf4 computing in bfloat16", "mixed"])
def test_quantized_weights(kind, backend, calls):
    dtype = BF16 if kind in ("fp8", "mixed") else FP32

    def make():
        torch.manual_seed(0)
        module = MLP(width=64, inner=64).to(dtype)
        for name in ("gate_proj", "up_proj", "down_proj")[: 2 if kind == "mixed" else 3]:
            if kind == "fp8":
                layer = fp8_linear(fp8_weight(64, 64), BF16)
            else:
                compute = BF16 if kind == "nf4 computing in bfloat16" else None
                layer = Linear4bit(nf4_weight(64, 64, 64, nested=True), True, compute)
            setattr(module, name, layer)
        return module

    x = torch.randn(70, 64).to(dtype)
    found, expected = (step(with_lora(make(), fuse)[0], x.clone().requires_grad_()) for fuse in (True, False))
    # A layer that computes in another dtype than its input's casts twice, which one op does not.
    assert calls == ([] if kind == "nf4 computing in bfloat16" else ["silu"])
    assert_same(found, expected, 16 * EPS[dtype])


# The model is given back, and copies stand alone.


def everything(model):
    """The modules' classes, and the attributes of MLPs."""
    return {
        name: (type(m), {k: id(v) for k, v in m.__dict__.items()} if name.endswith("mlp") else None)
        for name, m in model.named_modules()
    }


def test_remove_gives_the_model_back(tmp_path):
    model = family("llama")
    before, state = everything(model), copy.deepcopy(model.state_dict())
    slk.apply_lora(model, slk.LoRAConfig(r=2, target_modules=TARGETS), fuse_mlp=True)
    mlp = model.model.layers[0].mlp
    assert is_fused(mlp) and isinstance(mlp, type(family("llama").model.layers[0].mlp))
    assert type(mlp).__name__ == type(mlp).__qualname__ == "LlamaMLP" and repr(mlp).startswith("LlamaMLP(")
    slk.remove_lora(model, merge=False)
    assert everything(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


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


def test_ligers_classes(calls):
    """The op replaces Liger's kernels, which no CPU can run."""
    swiglu = pytest.importorskip("liger_kernel.transformers.swiglu", reason="liger-kernel is not installed")
    config = transformers.LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=2)
    torch.manual_seed(0)
    liger = swiglu.LigerSwiGLUMLP(config)
    plain = MLP()
    plain.load_state_dict(liger.state_dict())
    model, report = with_lora(liger.double())
    assert report.mlps == (GatedMLP("mlp", "silu"),)
    assert_same(step(model), step(with_lora(plain.double(), fuse=False)[0]))
    assert calls == ["silu"]


def test_an_error_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model, plain = family("llama"), family("llama")
    slk.apply_lora(plain, slk.LoRAConfig(r=2, target_modules=TARGETS))
    slk.save_adapter(plain, tmp_path)

    def fails(*args, **kwargs):
        assert is_fused(model.model.layers[0].mlp)
        raise MemoryError("no memory")

    monkeypatch.setattr("stablelora_kernels.model.save_load._copy_all", fails)
    before = everything(model)
    with refused(model, MemoryError, "no memory"):
        slk.load_adapter(model, tmp_path, fuse_mlp=True)
    assert {name: kind for name, (kind, _) in everything(model).items()} == {n: k for n, (k, _) in before.items()}
    assert not any(ATTRIBUTE in module.__dict__ for module in model.modules())


def test_load_adapter(tmp_path, calls):
    plain, _ = adapted("llama", False, 0.0)
    slk.save_adapter(plain, tmp_path)
    model = family("llama")
    report = slk.load_adapter(model, tmp_path, fuse_mlp=True)
    assert [mlp.name for mlp in report.mlps] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert str(report).endswith("note: computed in one op each: 2 x gated MLP (silu)")
    assert_same(step(model.train()), step(plain))
    assert len(calls) == 2
    # The files are the same.
    other = tmp_path / "other"
    slk.save_adapter(model, other)
    assert (other / "adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()


def test_copies_and_pickles_compute_with_their_own_layers(calls):
    model, plain = pair(MLP, dropout=0.2)
    expected = step(plain)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(model),
        copy.copy(model),
        *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)),
        torch.load(buffer, weights_only=False),
    ]
    with torch.no_grad():
        for parameter in [*model.parameters()][1:]:
            if parameter.requires_grad and not any(parameter is p for p in others[1].parameters()):
                parameter.zero_()
    del others[1]
    for other in others:
        calls.clear()
        assert type(other["mlp"]) is type(model["mlp"])
        assert_same(step(other), expected)
        assert calls == ["silu"]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    model.load_state_dict(plain.state_dict())
    assert_same(step(model), expected)


def test_replicas_compute_with_their_own_tensors(calls):
    model, plain = pair(MLP)
    expected = step(plain)
    other = replica(model["mlp"])
    with torch.no_grad():
        model["mlp"].gate_proj.weight.mul_(3)
    assert_same(step(model, call=other), expected)
    assert calls == ["silu"]


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing(kind, calls):
    model, plain = pair(MLP, dropout=0.3)
    expected = step(plain)
    found = step(model, call=lambda x: checkpoint(model["mlp"], x, use_reentrant=kind))
    assert_same(found, expected)
    assert calls == ["silu"] * 2


@pytest.mark.parametrize("make", [MLP, Stacked])
def test_torch_compile_has_no_graph_break(make, calls):
    model, plain = pair(make)
    expected = step(plain)
    torch._dynamo.reset()
    model["mlp"].compile(backend="aot_eager", fullgraph=True)
    assert_same(step(model), expected)
    # Another mode, which the compiled code must notice.
    model["mlp"].down_proj.merge()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()["mlp"](rows()), expected["y"])


@pytest.mark.parametrize("lora_dtype", [FP32, BF16])
def test_autocast_and_low_precision(lora_dtype, calls):
    for dtype, autocast in ((FP32, True), (BF16, True), (BF16, False)):
        found, expected = ({}, {})
        for fuse, into in ((True, found), (False, expected)):
            torch.manual_seed(0)
            model, _ = with_lora(MLP(bias=True).to(dtype), fuse, dropout=0.2)
            for name, parameter in model.named_parameters():
                if "lora_" in name and dtype == BF16:
                    parameter.data = parameter.data.to(lora_dtype)
            with torch.autocast("cpu", BF16, enabled=autocast):
                into.update(step(model, rows(dtype)))
        assert found["y"].dtype == BF16
        assert_same(found, expected, 8 * EPS[BF16])
    assert len(calls) == 3


def test_fsdp2(mesh, calls):
    """Parameters are DTensors until a forward gathers them: of the MLP, or of the model around it."""
    expected = step(pair(MLP)[1])
    for around in (False, True):
        model, _ = pair(MLP)
        outer = nn.Sequential(model["mlp"]) if around else model["mlp"]
        fully_shard(outer, mesh=mesh)
        calls.clear()
        found = step(model, call=outer)
        assert calls == ["silu"]
        found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
        assert_same(found, expected)


# Together with what else there is.


def test_fuse_projections_serves_where_the_mlp_falls_back(calls):
    model, plain = pair(MLP, fuse_projections=True)
    group = model["mlp"].gate_proj.__dict__[GROUP]
    assert_same(step(model), step(plain))
    assert calls == ["silu"] and group._pending is None
    handle = model["mlp"].down_proj.register_forward_hook(lambda *args: None)
    served = []
    group.compute = lambda layers, x, compute=group.compute: served.append(len(layers)) or compute(layers, x)
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
    model, plain = (adapted("llama", fuse, 0.0, FP32)[0].eval() for fuse in (True, False))
    outputs = [m.generate(input_ids=IDS[:, :8], max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*outputs) and calls
