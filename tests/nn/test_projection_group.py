"""fuse_projections on models: ours and PEFT's, against the same models without it, and what happens where names mislead."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.nn import projection_group
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from tests.helpers.oracle import bytes_held
from tests.helpers.small_models import Model, fill_b, llama, lora_config, trainable

peft = pytest.importorskip("peft", reason="peft is not installed")

# Above 64 tokens, below which projections are computed one by one.
IDS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_llama():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    model = llama(**sizes, attn_implementation="eager")
    torch.manual_seed(1)
    return model


def ours(fused, dropout=0.0):
    model = make_llama()
    config = slk.LoRAConfig(r=4, target_modules=TARGETS, lora_dropout=dropout)
    report = slk.apply_lora(model, config, fuse_projections=fused)
    torch.manual_seed(2)
    fill_b(model)
    return model.train(), report


def theirs(fused, dropout=0.0):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=dropout, init_lora_weights=False)
    model = peft.get_peft_model(make_llama(), config)
    return model.train(), slk.accelerate_peft(model, fuse_projections=fused)


def step(model, seed=5, ids=IDS):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, grad in found[1].items():
        other = expected[1][name]
        assert (grad - other).abs().max() <= 1e-4 * other.abs().max(), name


@pytest.fixture
def calls(monkeypatch):
    """How many projections each call of the group's op computed."""
    from stablelora_kernels.integrations import peft_layers
    from stablelora_kernels.nn import mlp_operands as ours_module

    counts: list[int] = []
    original = ours_module.lora_linear_group

    def counting(x, weights, *rest):
        counts.append(len(weights))
        return original(x, weights, *rest)

    monkeypatch.setattr(ours_module, "lora_linear_group", counting)
    monkeypatch.setattr(peft_layers, "lora_linear_group", counting)
    return counts


@pytest.fixture(autouse=True)
def no_warnings():
    """None of these gives up unless a test expects the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fuse_projections")
        yield


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
def test_names_parameters_and_files_stay(make, tmp_path):
    model, plain = make(True)[0], make(False)[0]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert trainable(model) == trainable(plain)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [pair.name for pair in slk.lora_pairs(model)] == [pair.name for pair in slk.lora_pairs(plain)]


@pytest.mark.parametrize("make", [ours, theirs])
def test_copies_and_pickles_have_groups_of_their_own(make, calls):
    model = make(True)[0]
    expected = step(make(False)[0])
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
def test_generate(make):
    model, plain = make(True)[0].eval(), make(False)[0].eval()
    outputs = [m.generate(input_ids=IDS, max_new_tokens=5, do_sample=False) for m in (model, plain)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("make", [ours, theirs])
def test_autocast(make):
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = step(make(True)[0]), step(make(False)[0])
    assert found[0] == pytest.approx(expected[0], rel=1e-2)


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


class Attention(nn.Module):
    """q, k and v of which a test calls those it wants."""

    def __init__(self, k_features=16) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 24), nn.Linear(k_features, 8)
        self.v_proj = nn.Linear(16, 8)

    def norm_of_queries(self, queries):
        return queries

    def forward(self, x, keys=None, only_queries=False):
        keys, queries = x if keys is None else keys, self.norm_of_queries(self.q_proj(x))
        return (queries,) if only_queries else (queries, self.k_proj(keys), self.v_proj(keys))


def attention(name="self_attn", **kwargs):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: Attention(**kwargs)})
    report = slk.apply_lora(
        model, slk.LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]), fuse_projections=True
    )
    fill_b(model)
    return model[name], report


def test_a_projection_that_is_never_called_ends_it():
    layer, _ = attention()
    x = torch.randn(70, 16)
    # Once may be an exception's doing.
    layer(x, only_queries=True)
    layer(x, only_queries=True)
    with pytest.warns(
        RuntimeWarning, match=r"not all of them are called, so 'self_attn.q_proj', .* one by one from here on"
    ):
        layer(x, only_queries=True)
    assert not layer.q_proj.__dict__[ATTRIBUTE].on


class Mishap(Exception):
    pass


def fails(*args):
    raise Mishap


def breaks_the_op(layer, patch):
    patch.setattr(layer.q_proj.__dict__[ATTRIBUTE], "compute", fails)


def breaks_a_sibling(layer, patch):
    patch.setattr(layer.k_proj, "forward", fails)


def breaks_what_is_between(layer, patch):
    patch.setattr(layer, "norm_of_queries", fails)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("breaks", [breaks_the_op, breaks_a_sibling, breaks_what_is_between])
def test_an_exception_leaves_nothing_and_counts_for_nothing(breaks, trains, monkeypatch, calls):
    """Out of memory in a row of smaller and smaller batches: it kept the batch that did not fit, and then gave up for good."""
    layer, _ = attention()
    group = layer.q_proj.__dict__[ATTRIBUTE]
    with torch.set_grad_enabled(trains):
        for _ in range(4):
            x = torch.randn(70, 16) * 1
            alive = weakref.ref(x)
            with monkeypatch.context() as patch:
                breaks(layer, patch)
                try:
                    layer(x)
                except Mishap:
                    pass
                else:
                    raise AssertionError("no exception")
            del x
            assert alive() is None and group._pending is None
        assert group.on and group._wasted == 0
        # Layers that are really never called still end it, after as many rounds as ever.
        layer(torch.randn(70, 16), only_queries=True)
        layer(torch.randn(70, 16), only_queries=True)
        with pytest.warns(RuntimeWarning, match="not all of them are called"):
            layer(torch.randn(70, 16), only_queries=True)


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
    monkeypatch.setattr("stablelora_kernels.model.apply.fuse_mlps", fails)
    config = slk.LoRAConfig(r=4, target_modules=TARGETS)
    with pytest.raises(Mishap):
        slk.apply_lora(model, config, fuse_projections=True, fuse_mlp=True)
    assert not any(module._forward_hooks for module in model.modules())


def test_cross_attention_shares_between_keys_and_values_only(calls):
    for name in ("cross_attn", "EncDecAttention", "encoder_attn"):
        layer, report = attention(name)
        assert "1 x (k_proj, v_proj)" in report.notes[-1]
        x, keys = torch.randn(70, 16), torch.randn(80, 16)
        calls.clear()
        for _ in range(2):
            layer(x, keys)
        assert calls == [2, 2]


def test_layers_of_different_inputs_are_not_siblings():
    model = nn.ModuleDict({"self_attn": Attention(k_features=12)})
    report = slk.apply_lora(model, slk.LoRAConfig(r=2, target_modules="all-linear"), fuse_projections=True)
    assert report.notes[-1] == "fuse_projections found no layers that share an input"


def test_an_input_changed_between_two_calls_is_another():
    layer, _ = attention()
    x = torch.randn(70, 16)
    with torch.no_grad():
        layer.q_proj(x)
        x.mul_(2)
        sharing_off, _ = attention()
        for part in (sharing_off.q_proj, sharing_off.k_proj, sharing_off.v_proj):
            part.__dict__.pop(ATTRIBUTE)
        torch.testing.assert_close(layer.k_proj(x), sharing_off.k_proj(x))


def test_grad_mode_is_part_of_a_round():
    """Keys that were computed without a graph are not handed to a call that wants one."""
    layer, _ = attention()
    x = torch.randn(70, 16)
    with torch.no_grad():
        layer.q_proj(x)
    assert layer.k_proj(x).requires_grad


def test_inference_mode():
    layer, _ = attention()
    with torch.inference_mode():
        x = torch.randn(70, 16)
        assert all(y.is_inference() for y in layer(x))


def test_threads_get_their_own_outputs():
    """A round that another thread has replaced is not used: slower at worst, never another's output."""
    layer, _ = attention()
    inputs = [torch.randn(70, 16) for _ in range(4)]
    plain = copy.deepcopy(layer)
    projection_group.remove_projection_groups(plain.modules())
    wrong = []

    def work(x):
        with torch.no_grad():
            expected = plain(x)
            for _ in range(50):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = layer(x)
                if not all(torch.allclose(y, e, atol=1e-5) for y, e in zip(found, expected, strict=True)):
                    wrong.append(x)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_errors_are_the_layers_own():
    layer, _ = attention()
    with pytest.raises(ValueError, match=r"x must be \[..., 16\] to fit weight \[24, 16\], got \[70, 15\]"):
        layer(torch.randn(70, 15))
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch.bfloat16, got torch.float32"):
        layer(torch.randn(70, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_no_more_is_saved_for_backward(dropout, backend):
    """The bytes that autograd keeps, by storage: X once, each S, seeds or masks; as without."""

    def kept(fused):
        torch.manual_seed(0)
        model = nn.ModuleDict({"self_attn": Attention()})
        config = slk.LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=dropout)
        slk.apply_lora(model, config, fuse_projections=fused)
        x = torch.randn(70, 16, requires_grad=True)
        return bytes_held(lambda: model.train()["self_attn"](x), model.parameters())

    assert kept(True) == kept(False)
    if backend == "triton":
        # X and three S in float32, and a seed for each mask.
        assert kept(True) == 4 * 70 * (16 + 3 * 2) + (3 * 8 if dropout else 0)


def test_outputs_that_nobody_fetched_are_freed_before_the_next_are_computed():
    """After an error between q and k, such as out of memory, the group holds k's and v's outputs and their graph."""
    held = []

    def compute(layers, x):
        held.append(group._pending is not None)
        return [x.clone() for _ in layers]

    layers = [nn.Identity(), nn.Identity()]
    group = projection_group.ProjectionGroup(("q_proj", "k_proj"), layers, compute)
    group.output(layers[0], torch.ones(2))
    group.output(layers[0], torch.ones(2))
    assert held == [False, False]


def test_siblings_of_two_dropouts_keep_their_own(backend):
    model, plain = theirs(True, 0.2)[0], theirs(False, 0.2)[0]
    for name, module in (*model.named_modules(), *plain.named_modules()):
        if name.endswith("k_proj.lora_dropout"):
            module["default"].p = 0.6
    assert_same(step(model), step(plain))
