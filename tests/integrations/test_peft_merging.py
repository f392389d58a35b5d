"""merge_adapter and unmerge_adapter under accelerate_peft: PEFT's merged weights, and the base
weights to the bit afterwards.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.testing.cases import BF16, FP16, FP32
from tests.helpers import moe_models
from tests.helpers.peft_models import config, make, peft
from tests.helpers.quantized_weights import bnb_4bit, bnb_8bit
from tests.helpers.small_models import IDS, Model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lora_bias.*", "ignore:Model with `tie_word_embeddings", "ignore:Already"
)
WRITTEN = "was written to after merge"
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "embedding and head": {"target_modules": ["embed", "lm_head"]},
}


def bits(model):
    """What a model's base layers hold."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def changed(model, before):
    now = bits(model)
    assert now.keys() == before.keys()
    return [name for name, value in now.items() if not torch.equal(value, before[name])]


@contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def fill(model):
    """Values that round, in every parameter that trains."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1) if "magnitude" not in name else p.mul_(1.1)
    return model


def accelerated(dtype=BF16, tied=False, more=(), **kwargs):
    model = fill(make(*more, model=Model(tied=tied).to(dtype), **kwargs))
    slk.accelerate_peft(model)
    return model


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_weights_are_pefts_and_unmerging_leaves_no_bit_of_them(dtype, kind, safe_merge):
    model = accelerated(dtype, **kind)
    plain = copy.deepcopy(model)
    slk.restore_peft(plain)
    before = bits(model)
    plain.merge_adapter(safe_merge=safe_merge)
    merged = bits(plain)
    for _ in range(3):
        model.merge_adapter(safe_merge=safe_merge)
        assert changed(model, before) and not changed(model, merged)
        with no_warning():
            model.unmerge_adapter()
        assert not changed(model, before)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_thousand_cycles_change_no_bit_where_pefts_do(dtype):
    def cycles(layer, times):
        for _ in range(times):
            layer.merge()
            layer.unmerge()

    model = accelerated(dtype)
    layer = model.base_model.model.layers[0].q_proj
    before = bits(model)
    cycles(layer, 1000)
    assert not changed(model, before)
    slk.restore_peft(model)
    cycles(layer, 10)
    assert changed(model, before)


MORE = (("more", {"r": 3, "lora_alpha": 2}),)
DORA = (("more", {"r": 3, "use_dora": True}),)


@pytest.mark.parametrize("more", [MORE, DORA], ids=["plain", "DoRA"])
@pytest.mark.parametrize("together", [True, False])
def test_several_adapters(more, together):
    model = accelerated(more=more)
    plain = copy.deepcopy(model)
    slk.restore_peft(plain)
    before = bits(model)
    for m in (model, plain):
        for names in [["default", "more"]] if together else [["more"], ["default"]]:
            m.merge_adapter(names)
    assert not changed(model, bits(plain)) and changed(model, before)
    model.unmerge_adapter()
    assert not changed(model, before)
    assert not any(getattr(m, "merged", False) for m in model.modules())


def test_layers_of_a_tied_weight_share_what_they_keep():
    model = accelerated(tied=True, target_modules=["embed", "lm_head", "q_proj"])
    before = bits(model)
    for _ in range(3):
        model.merge_adapter()
        with no_warning():
            model.unmerge_adapter()
        assert not changed(model, before)
    # A copy shares it as well.
    model.merge_adapter()
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    assert not changed(copied, before) and changed(model, before)


def by_forward(model):
    with model.disable_adapter():
        model(IDS)


def moved(model):
    model.double().to(BF16)
    model.unmerge_adapter()


def merged_and_restored(model):
    slk.restore_peft(model)
    model.unmerge_adapter()
    layer = model.base_model.model.layers[0].q_proj
    assert type(layer) is peft.tuners.lora.Linear


def restored_and_accelerated(model):
    slk.restore_peft(model)
    slk.accelerate_peft(model)
    model.unmerge_adapter()


def loaded(model):
    """A merged state that a merged model loads is the same one."""
    model.load_state_dict(model.state_dict())
    model.unmerge_adapter()


def trained(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(1)
    model.unmerge_adapter()


def merged_again(model):
    model.merge_adapter()
    model.unmerge_adapter()


def with_another_active(model):
    model.add_adapter("late", config(r=2))
    model.base_model.set_adapter("late")


def refuses_to_delete(model):
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()


@pytest.mark.parametrize(
    "act",
    [
        by_forward,
        moved,
        merged_and_restored,
        restored_and_accelerated,
        loaded,
        trained,
        merged_again,
        with_another_active,
        refuses_to_delete,
    ],
)
def test_unmerging_is_exact_whatever_happens_meanwhile(act):
    model = accelerated()
    before = bits(model)
    model.merge_adapter()
    assert changed(model, before)
    act(model)
    now = {name: p for name, p in bits(model).items() if name in before}
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_a_merge_within_disable_lora_and_one_on_one_layer():
    model = accelerated()
    before = bits(model)
    with slk.disable_lora(model):
        model.merge_adapter()
        assert changed(model, before)
        model.unmerge_adapter()
        assert not changed(model, before)
    layer = model.base_model.model.layers[0].q_proj
    layer.merge()
    layer.float().unmerge()
    name = "base_model.model.layers.0.q_proj.base_layer.weight"
    assert torch.equal(layer.base_layer.weight, before[name].float())


def test_pickles_and_copies_of_merged_models():
    model = accelerated()
    before = bits(model)
    model.merge_adapter()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not changed(other, bits(model))
        other.unmerge_adapter()
        assert not changed(other, before)
    assert not any("kept" in name for name in model.state_dict())
    merged = bits(model)
    unloaded = model.merge_and_unload()
    assert torch.equal(
        unloaded.layers[0].q_proj.weight,
        merged["base_model.model.layers.0.q_proj.base_layer.weight"],
    )
    assert type(unloaded.layers[0].q_proj) is nn.Linear


@pytest.mark.parametrize("again", [False, True])
def test_a_weight_that_another_has_written_to_is_subtracted_from(again):
    model = accelerated(FP32, more=MORE)
    layer = model.base_model.model.layers[0].q_proj
    expected = copy.deepcopy(layer)
    slk.restore_peft(expected)
    for each in (layer, expected):
        each.merge(adapter_names=["default"])
        each.base_layer.weight.data[3, 2] += 1
        if again:
            # A later merge into it does not make it the layer's own.
            each.merge(adapter_names=["more"])
    with pytest.warns(UserWarning, match=f"the weight of a merged Linear {WRITTEN}"):
        layer.unmerge()
    expected.unmerge()
    assert torch.equal(layer.base_layer.weight, expected.base_layer.weight)
    # The next cycle is exact again.
    before = layer.base_layer.weight.clone()
    layer.merge()
    with no_warning():
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_that_raises_leaves_nothing(safe_merge):
    # v_proj has no bias, which PEFT notices after the weight is changed.
    model = accelerated(lora_bias=True, target_modules=["v_proj"])
    before = bits(model)
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        model.merge_adapter(safe_merge=safe_merge)
    assert not changed(model, before)
    assert not any(getattr(m, "merged", False) for m in model.modules())


def test_merged_before_it_is_accelerated_it_is_pefts():
    model = accelerated()
    slk.restore_peft(model)
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each.merge_adapter()
    slk.accelerate_peft(model)
    for each in (model, plain):
        each.unmerge_adapter()
    assert not changed(model, bits(plain))


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(6, 8, 3), nn.Conv2d(8, 5, 3, bias=False)
        self.turned = peft.tuners.lora.layer.Conv1D(7, 9)


def test_convolutions_and_weights_that_are_stored_transposed():
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Convolved().to(BF16),
        config(target_modules=["conv1", "conv2", "turned"], fan_in_fan_out=True),
    )
    fill(model)
    slk.accelerate_peft(model)
    before = bits(model)
    model.merge_adapter()
    assert len(changed(model, before)) == 3
    model.unmerge_adapter()
    assert not changed(model, before)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_stacks_of_experts(family):
    model = fill(moe_models.with_lora(moe_models.build(family, dtype=BF16)))
    slk.accelerate_peft(model)
    before = bits(model)
    for _ in range(2):
        model.merge_adapter()
        assert len(changed(model, before)) == 2
        with no_warning():
            model.unmerge_adapter()
        assert not changed(model, before)


@pytest.mark.parametrize("quantize", [bnb_4bit, bnb_8bit])
@pytest.mark.filterwarnings("ignore:.*bit linear.*")
def test_quantized_weights_are_merged_as_peft_does(quantize):
    torch.manual_seed(0)
    model = nn.Sequential(quantize(nn.Linear(128, 64)))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantize is bnb_4bit, quantize is bnb_8bit
    model = fill(peft.get_peft_model(model, config(target_modules=["0"])))
    plain = copy.deepcopy(model)
    slk.accelerate_peft(model)
    for each in (model, plain):
        each.merge_adapter()
        each.unmerge_adapter()
    assert not changed(model, bits(plain))


def test_the_copy_is_in_the_hosts_memory_and_goes_with_the_merge():
    model = accelerated()
    layer = model.base_model.model.layers[0].q_proj
    kept = set(layer.__dict__)
    layer.merge()
    (key,) = set(layer.__dict__) - kept
    assert sum(weight.before.nbytes for weight in layer.__dict__[key].values()) == sum(
        p.nbytes for p in layer.base_layer.parameters()
    )
    layer.unmerge()
    assert set(layer.__dict__) == kept
