"""merged_parameters against the state_dict of PEFT's merge_and_unload, bit for bit."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.testing.cases import BF16, FP16, FP32
from stablelora_kernels.utils.memory import peak_over_start
from tests.helpers import moe_models
from tests.helpers.peft_models import config, make, peft
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.quantized_weights import bnb_4bit, bnb_8bit, torchao
from tests.helpers.small_models import Model, fill_b, gpt2, llama, lora_options

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lora_bias.*", "ignore:Model with `tie_word_embeddings", "ignore:Input and output embed",
    "ignore:.*get_apply_tensor_subclass.*",
)  # fmt: skip


def adapted(base, *more, active=None, **kwargs):
    """A PEFT model, all of whose trainable parameters have values that round."""
    model = peft.get_peft_model(base, config(**kwargs))
    for name, options in more:
        model.add_adapter(name, config(**options))
    if active:
        model.base_model.set_adapter(active)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "tokens_delta" in name:
                p.normal_(0, 0.1)
    return model


def check(model):
    """The merged parameters are PEFT's, and the model is as it was."""
    before = {name: (p.detach().clone(), p._version) for name, p in model.named_parameters()}
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    found = [(name, t.clone()) for name, t in slk.merged_parameters(model)]
    assert [name for name, _ in found] == list(expected)
    for name, t in found:
        assert t.dtype == expected[name].dtype and torch.equal(t, expected[name]), name
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p._version == before[name][1], name
    return dict(found)


OPTIONS: dict[str, Any] = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 5}},
    "DoRA": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings to save": {"modules_to_save": ["embed_tokens"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "head": {"target_modules": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_they_are_those_of_merge_and_unload(options, tied, dtype):
    torch.manual_seed(0)
    model = adapted(llama(tie_word_embeddings=tied, attention_bias=True).to(dtype), **options)
    of_peft = check(model)
    slk.accelerate_peft(model, fuse_projections=True, fuse_mlp=True, fuse_loss=True)
    found = dict(slk.merged_parameters(model))
    assert all(torch.equal(found[name], value) for name, value in of_peft.items())


MORE = ("more", {"r": 3, "use_dora": True})


@pytest.mark.parametrize("active", [["default"], ["default", "more"], ["more", "default"], []])
def test_the_active_adapters_count(active):
    model = adapted(llama().to(BF16), MORE)
    model.base_model.set_adapter(active)
    slk.accelerate_peft(model)
    of_active = check(model)
    model.base_model.set_adapter("default")
    with slk.disable_lora(model):
        of_first = check(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(of_first[name], of_active[name]) == (active == ["default"])


def test_merged_layers_come_as_they_are():
    model = adapted(llama().to(BF16), MORE)
    slk.accelerate_peft(model)
    expected = dict(slk.merged_parameters(model))
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dict(slk.merged_parameters(model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    name = "model.layers.0.self_attn.q_proj.weight"
    own = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight
    assert found[name].data_ptr() == own.data_ptr()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_stacks_of_experts(family):
    model = moe_models.with_lora(moe_models.build(family, dtype=BF16))
    check(model)
    slk.accelerate_peft(model, fuse_mlp=True)
    check(model)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv1d(6, 8, 3), nn.Conv2d(8, 5, 3, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("unsaved", torch.ones(2), persistent=False)


def test_convolutions_buffers_and_weights_that_are_stored_transposed():
    torch.manual_seed(0)
    found = check(adapted(Mixed().to(BF16), target_modules=["first", "conv"]))
    assert "norm.running_mean" in found and "unsaved" not in found
    check(adapted(gpt2().to(BF16), target_modules=["c_attn"], fan_in_fan_out=True))


def test_layers_that_peft_has_injected_and_wrappers():
    model = make(model=Model().to(BF16))
    expected = dict(slk.merged_parameters(model))
    injected = model.base_model.model
    for each in (injected, nn.DataParallel(model), torch.compile(model)):
        found = dict(slk.merged_parameters(each))
        assert [*found] == [*expected]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    injected.layers[0] = torch.compile(injected.layers[0])
    assert [name for name, _ in slk.merged_parameters(model)] == [*expected]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_layers_of_apply_lora(dtype):
    torch.manual_seed(0)
    model = Model(tied=True).to(dtype)
    names = [*model.state_dict()]
    slk.apply_lora(model, **lora_options())
    fill_b(model)
    before = copy.deepcopy(model.state_dict())
    found = dict(slk.merged_parameters(model))
    assert [*found] == names
    for layer in lora_layers(model).values():
        layer.merge()
    merged = {name: t for name, t in model.named_parameters(remove_duplicate=False)}
    assert all(torch.equal(found[name], merged[name]) for name in names)
    again = dict(slk.merged_parameters(model))
    assert all(torch.equal(again[name], found[name]) for name in names)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "quantize",
    [
        bnb_4bit,
        *(partial(torchao, config=f"{name}WeightOnlyConfig") for name in ("Float8", "NVFP4")),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_quantized_weights_come_dequantized_and_are_not_quantized_again(quantize, dora):
    torch.manual_seed(0)
    # bitsandbytes' layer quantizes from its own dtype.
    dtype = FP32 if quantize is bnb_4bit else BF16
    base = nn.Sequential(*(quantize(nn.Linear(128, 64, dtype=dtype)) for _ in range(2)))
    base.is_loaded_in_4bit = quantize is bnb_4bit
    model = adapted(base, target_modules=["0"], use_dora=dora)
    layer = model.base_model.model[0]
    found = dict(slk.merged_parameters(model))
    assert [*found] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(t.dtype == dtype for t in found.values())
    # PEFT's merge of the same weights, unquantized.
    plain = nn.Sequential(*(nn.Linear(128, 64, dtype=dtype) for _ in range(2)))
    for at, (name, linear) in enumerate(
        [("0", layer.base_layer), ("1", model.base_model.model[1])]
    ):
        weight = linear.weight
        values = (
            weight.dequantize() if not hasattr(weight, "quant_state")
            else slk.functional.NF4Weight.from_bitsandbytes(weight).dequantize(dtype)
        )  # fmt: skip
        plain[at].load_state_dict({"weight": values, "bias": linear.bias})
        assert at == 0 or torch.equal(found[f"{name}.weight"], values)
    same = peft.get_peft_model(plain, config(target_modules=["0"], use_dora=dora))
    same.load_state_dict(
        {name: t for name, t in model.state_dict().items() if "lora_" in name}, strict=False
    )
    assert torch.equal(found["0.weight"], same.merge_and_unload()[0].weight)
    slk.accelerate_peft(model)
    again = dict(slk.merged_parameters(model))
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("layers", [1, 6])
def test_the_peak_is_one_weight_and_pefts_product(dtype, layers):
    base = nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers))).to(dtype)
    model = adapted(base, target_modules=[str(i) for i in range(layers)])

    def sync():
        for _, t in slk.merged_parameters(model):
            del t

    sync()
    device, weight = torch.device("cpu"), 256 * 256 * dtype.itemsize
    peak = peak_over_start(sync, device)
    of_one = peak_over_start(copy.deepcopy(model).base_model.model[0].merge, device)
    assert weight < peak <= of_one + weight + 8192


def sharded(rank, world, directory):
    torch.manual_seed(0)
    model = adapted(llama(attention_bias=True).to(BF16), lora_bias=True)
    slk.accelerate_peft(model)
    expected = {name: t.clone() for name, t in slk.merged_parameters(model)}
    own = Model().to(BF16)
    slk.apply_lora(own, **lora_options())
    fill_b(own)
    of_own = {name: t.clone() for name, t in slk.merged_parameters(own)}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    for block in own.layers:
        fully_shard(block)
    fully_shard(own)
    fully_shard(model)
    for each, whole in ((model, expected), (own, of_own)):
        found = dict(slk.merged_parameters(each))
        assert [*found] == [*whole]
        for name, t in found.items():
            assert type(t) is torch.Tensor and torch.equal(t, whole[name]), name


@needs_gloo
def test_shards_are_gathered(tmp_path):
    spawn(sharded, 2, tmp_path)


def quantized_otherwise():
    model = nn.Sequential(bnb_8bit(nn.Linear(128, 64)))
    model.is_loaded_in_8bit = True
    return adapted(model, target_modules=["0"])


def offloaded():
    model = make()
    model.base_model.model.norm = nn.Linear(3, 3, device="meta")
    return model


REFUSED = {
    "model must have LoRALinear layers or PEFT's, got a Model": Model,
    "has a weight that is stored as Int8Params": quantized_otherwise,
    "'base_model.model.norm' has its weight on the meta device": offloaded,
    "is a Linear, not a LoRA layer": lambda: peft.get_peft_model(
        Model(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ),
    "adapts an nn.MultiheadAttention": lambda: adapted(
        nn.Sequential(nn.MultiheadAttention(8, 2)), target_modules=["0"]
    ),
    "a parametrization computes": lambda: (
        nn.utils.parametrizations.weight_norm((model := make()).base_model.model.lm_head),
        model,
    )[1],
}


@pytest.mark.parametrize(("message", "build"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_at_the_call(message, build):
    with pytest.raises(ValueError, match=message):
        slk.merged_parameters(build())


def test_no_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        slk.merged_parameters("model")
