"""fuse_projections on models: ours and PEFT's, against the same models without it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk

pytest.importorskip("peft", reason="peft is not installed")

import peft

from stablelora_kernels.nn.projection_group import ATTRIBUTE
from tests.helpers.projection_groups import (
    IDS,
    TARGETS,
    assert_same,
    count_groups,
    make_llama,
    ours,
    step,
    theirs,
)
from tests.helpers.small_models import Model, fill_b, lora_config, trainable

# No group gives up unless a test expects the warning.
pytestmark = pytest.mark.filterwarnings("error:fuse_projections")


@pytest.fixture
def calls(monkeypatch):
    return count_groups(monkeypatch)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("make", [ours, theirs])
def test_a_model_trains_as_without(make, dropout, backend, calls):
    model, report = make(True, dropout)
    expected = step(make(False, dropout)[0])
    assert calls == []
    assert_same(step(model), expected)
    assert calls == [3, 2] * 2
    assert "2 x (q_proj, k_proj, v_proj); 2 x (gate_proj, up_proj)" in report.notes[-1]
    # Once more, and what is left in no layer.
    assert_same(step(model), expected)
    assert all(layer.__dict__[ATTRIBUTE]._pending is None for layer in model.modules() if ATTRIBUTE in layer.__dict__)


@pytest.mark.parametrize("make", [ours, theirs])
def test_copies_and_pickles_have_groups_of_their_own(make, calls):
    model, plain = make(True)[0], make(False)[0]
    assert model.state_dict().keys() == plain.state_dict().keys() and trainable(model) == trainable(plain)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [pair.name for pair in slk.lora_pairs(model)] == [pair.name for pair in slk.lora_pairs(plain)]
    expected = step(plain)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert_same(step(other), expected)
        assert calls == [3, 2] * 2
        # Its group computes with its own layers: changes to the model it came from do not show.
        for layer in other.modules():
            if (group := layer.__dict__.get(ATTRIBUTE)) is not None:
                assert any(member is layer for member in group.layers)
    # In the middle of a round, whose tensors can't be copied.
    attention = next(module for module in model.modules() if hasattr(module, "q_proj"))
    attention.q_proj(torch.randn(70, 32, requires_grad=True))
    copy.deepcopy(model)


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("make", [ours, theirs])
def test_gradient_checkpointing(make, kind, calls):
    expected = step(make(False, 0.2)[0])
    model = make(True, 0.2)[0]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
    model.enable_input_require_grads()
    for _ in range(3):
        assert_same(step(model), expected)
    # Forward, and again in backward.
    assert set(calls) == {2, 3} and len(calls) == 3 * 2 * 4


def test_a_checkpoint_that_stops_early_wastes_a_round_and_no_more():
    """Recomputation may end behind the first projection, since the op has saved all that backward wants."""
    model = ours(True)[0]
    attention, x = model.model.layers[0].self_attn, torch.randn(70, 32, requires_grad=True)

    def project(x):
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)

    for _ in range(4):
        outputs = checkpoint(project, x * 1, use_reentrant=False)
        sum(y.sum() for y in outputs).backward()
    assert attention.q_proj.__dict__[ATTRIBUTE].on


@pytest.mark.parametrize("make", [ours, theirs])
def test_autocast_and_generate(make):
    model, plain = make(True)[0], make(False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert step(model)[0] == pytest.approx(step(plain)[0], rel=1e-2)
    model.eval(), plain.eval()
    outputs = [m.generate(input_ids=IDS, max_new_tokens=5, do_sample=False) for m in (model, plain)]
    assert torch.equal(*outputs)


@pytest.mark.nightly
def test_torch_compile_has_no_graph_break():
    model = ours(True)[0]
    expected = step(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = step(compiled)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for grad, other in zip(found[1].values(), expected[1].values(), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


def test_merged_layers_compute_by_themselves(calls):
    model = ours(True)[0].eval()
    with torch.no_grad():
        before = model(IDS).logits
        slk.merge_lora(model)
        calls.clear()
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
        assert calls == []
        slk.unmerge_lora(model)
        assert torch.equal(model(IDS).logits, before) and calls == [3, 2] * 2
    slk.remove_lora(model, merge=False)
    assert not any(ATTRIBUTE in module.__dict__ for module in model.modules())


def test_several_adapters_disabling_and_restoring(calls):
    def with_two(fused):
        model = theirs(fused)[0]
        torch.manual_seed(9)
        model.add_adapter("other", peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
        return model

    model, plain = with_two(True), with_two(False)
    assert_same(step(model), step(plain))
    assert calls == [3, 2] * 2
    for each in (model, plain):
        each.set_adapter("other")
    calls.clear()
    assert_same(step(model), step(plain))
    # k, gate and up have no adapter of that name: every layer for itself.
    assert calls == []
    for each in (model, plain):
        each.set_adapter("default")
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert calls == []
    assert_same(step(model), step(plain))
    assert calls == [3, 2] * 2
    # Asked for anew without, and given back.
    slk.accelerate_peft(model)
    assert not any(ATTRIBUTE in module.__dict__ for module in model.modules())
    slk.accelerate_peft(model, fuse_projections=True)
    slk.restore_peft(model)
    assert not any(ATTRIBUTE in module.__dict__ for module in model.modules())


def test_load_adapter_fuses_too(tmp_path, calls):
    model = ours(False)[0]
    slk.save_adapter(model, tmp_path)
    other = make_llama()
    report = slk.load_adapter(other, tmp_path, fuse_projections=True)
    assert "2 x (q_proj, k_proj, v_proj)" in report.notes[-1]
    assert_same(step(other.train()), step(model))
    assert calls == [3, 2] * 2


def test_siblings_that_are_not_called_with_one_tensor_go_apart(calls):
    """Block's v_proj is called with what its q_proj gives: right from the first call on, and said."""
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    for each, fused in ((model, True), (plain, False)):
        torch.manual_seed(0)
        slk.apply_lora(each, lora_config(), fuse_projections=fused)
        torch.manual_seed(1)
        fill_b(each)
    ids = torch.arange(90).view(2, 45) % 11
    with pytest.warns(
        RuntimeWarning, match=r"'layers.\d.v_proj' was called with another tensor .*'layers.\d.q_proj'"
    ) as seen:
        found = model(ids)
    assert len(seen) == 2
    assert torch.equal(found, plain(ids))
    calls.clear()
    assert torch.equal(model(ids), plain(ids)) and calls == []


@pytest.mark.parametrize("make", [ours, theirs])
def test_the_hook_goes_with_the_group(make):
    model = make(True)[0]
    plain = make(False)[0]

    def hooks(model):
        return [len(module._forward_hooks) for module in model.modules()]

    copied = copy.deepcopy(model)
    assert sum(hooks(model)) == sum(hooks(copied)) == sum(hooks(plain)) + 4
    for each in (model, copied):
        if make is ours:
            slk.remove_lora(each)
        else:
            slk.restore_peft(each)
        assert sum(hooks(each)) == sum(hooks(plain))


def test_a_failed_apply_leaves_no_hook(monkeypatch):
    model = make_llama()

    def fails(*_args):
        raise RuntimeError("no memory")

    monkeypatch.setattr("stablelora_kernels.model.apply.fuse_mlps", fails)
    config = slk.LoRAConfig(r=4, target_modules=TARGETS)
    with pytest.raises(RuntimeError, match="no memory"):
        slk.apply_lora(model, config, fuse_projections=True, fuse_mlp=True)
    assert not any(module._forward_hooks for module in model.modules())


def test_siblings_of_two_dropouts_keep_their_own(backend):
    model, plain = theirs(True, 0.2)[0], theirs(False, 0.2)[0]
    for name, module in (*model.named_modules(), *plain.named_modules()):
        if name.endswith("k_proj.lora_dropout"):
            module["default"].p = 0.6
    assert_same(step(model), step(plain))
