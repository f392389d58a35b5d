"""accelerate_peft on experts in 4 and 8 bits, against PEFT on what these stand for."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

import stablelora_kernels as slk
from stablelora_kernels.integrations.peft import experts as peft_experts
from stablelora_kernels.integrations.peft import faults as peft_faults
from stablelora_kernels.integrations.peft.wrappers import wrapped_parameters
from stablelora_kernels.nn import experts
from stablelora_kernels.testing.cases import BF16, FP32
from tests.helpers.moe_models import (
    IDS,
    E,
    assert_copies_and_compiles,
    build,
    peft,
    results,
    routing,
    stacks,
    with_lora,
)
from tests.helpers.packed_stacks import in_4_bits, nf4

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What each call of lora_experts gets as its stack."""
    kinds: list[str] = []

    def noted(x, weight, *args, **kwargs):
        kinds.append(type(weight).__name__)
        return op(x, weight, *args, **kwargs)

    op = experts.lora_experts
    monkeypatch.setattr(experts, "lora_experts", noted)
    return kinds


def whole_names(model: Any) -> list[str]:
    """PEFT matches parametrized parameters by their whole names alone."""
    ends = stacks(model)
    return [name for name, _ in model.named_parameters() if name.endswith(tuple(ends))]


# bitsandbytes' own dequantization is right on a CPU where rows are whole blocks.
WIDTH = 64


def wide(family: str, dtype: torch.dtype = FP32) -> Any:
    return build(family, dtype=dtype, width=WIDTH)


def pair(family: str, dtype: torch.dtype = FP32, **options: Any) -> tuple[Any, Any]:
    """A PEFT model with its experts in 4 bits, and its like with what these stand for."""
    model = wide(family, dtype)
    targets = {"target_parameters": whole_names(model)}
    model, plain = in_4_bits(model, **{"compress_statistics": True} | options)
    model, plain = with_lora(model, **targets), with_lora(plain, **targets)
    copy_adapters(model, plain)
    return model, plain


def adapters_of(model: Any) -> dict[tuple[str, str], Any]:
    return {
        (name.replace(".base_layer", ""), wrapper.parameter_name): wrapper
        for name, wrapper in model.named_modules()
        if isinstance(wrapper, peft_experts.ParamWrapper)
    }


def copy_adapters(source: Any, target: Any) -> None:
    for key, wrapper in adapters_of(source).items():
        other = adapters_of(target)[key]
        for role in ("lora_A", "lora_B"):
            weight = getattr(wrapper, role)["default"].weight
            getattr(other, role)["default"].weight.data.copy_(weight)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol) -> None:
    assert found.keys() == expected.keys() and len(found) > 1
    for name, value in found.items():
        atol = rtol * expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)


def test_names_that_are_not_whole_match_nothing_and_the_report_says_so():
    """PEFT finds packed parameters by their whole names alone."""
    model, plain = in_4_bits(wide("qwen3_moe"))
    names = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": names}
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        model = with_lora(model, **options)
    note = (
        "target_parameters 'experts.down_proj', 'experts.gate_up_proj' match nothing (adapter 'default'): PEFT finds "
        "experts in 4 bits by their full names alone"
    )
    assert note in slk.accelerate_peft(model).notes
    assert slk.accelerate_peft(with_lora(plain, **options)).notes == ()


def test_a_refusal_of_strict_changes_nothing():
    """What fuses is known only once it is tried, when the wrappers are nested as plain ones."""
    model, _ = pair("qwen3_moe")
    model.get_base_model().lm_head.register_forward_hook(lambda *args: None)

    def facts():
        slots = [{*module.__dict__} for module in model.modules()]
        return [*model.named_parameters()], [type(module) for module in model.modules()], slots

    before = facts()
    refused = pytest.raises(
        ValueError,
        match=r"strict=True, but fuse_loss: .* keeps its own loss: 'lm_head' has hooks",
    )
    with refused:
        slk.accelerate_peft(model, strict=True, fuse_mlp=True, fuse_loss=True)
    assert facts() == before
    # An accelerated model stays as it is.
    assert slk.accelerate_peft(model, strict=True, fuse_mlp=True).mlps
    accelerated = facts()
    with refused:
        slk.accelerate_peft(model, strict=True, fuse_mlp=False, fuse_loss=True)
    assert facts() == accelerated and slk.accelerate_peft(model).mlps
    slk.restore_peft(model)
    assert facts() == before


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in FAMILIES[:5] else pytest.mark.nightly) for f in FAMILIES],
)
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"], ids=str)
def test_gradients_are_those_of_what_the_stacks_stand_for(family, checkpointing, calls):
    model, plain = pair(family)
    report = slk.accelerate_peft(model, strict=True)
    assert not report.skipped and not report.notes
    assert {(row.r, row.experts) for row in report.replaced} == {(3, E)}
    slk.accelerate_peft(plain, strict=True)
    # The names are those of plain experts.
    of_plain = {n: p.shape for n, p in plain.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in model.named_parameters() if p.requires_grad} == of_plain
    if checkpointing is not None:
        options = {"use_reentrant": checkpointing == "reentrant"}
        for each in (model, plain):
            each.gradient_checkpointing_enable(options)
            each.enable_input_require_grads()
            # Checkpoints work in training alone; the routers of these families draw no noise.
            each.train()
    calls.clear()
    for _ in range(2):
        assert_close(results(model), results(plain), 1e-5)
    repeats = 2 if checkpointing else 1
    assert calls == (["NF4Experts"] * 2 * repeats + ["Parameter"] * 2 * repeats) * 2


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_fused_gradients_are_those_of_what_the_stacks_stand_for(family, checkpointing, calls):
    model, plain = pair(family)
    report = slk.accelerate_peft(model, strict=True, fuse_mlp=True)
    (mlp,) = (mlp for mlp in report.mlps if mlp.experts)
    assert mlp.reason is None and not report.skipped
    slk.accelerate_peft(plain, strict=True)
    if checkpointing is not None:
        options = {"use_reentrant": checkpointing == "reentrant"}
        for each in (model, plain):
            each.gradient_checkpointing_enable(options)
            each.enable_input_require_grads()
            each.train()
    for _ in range(2):
        assert_close(results(model), results(plain), 1e-5)
    assert set(calls) == {"Parameter"}
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        y = model(input_ids=IDS).logits
        torch.testing.assert_close(y, plain(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_four_calls_are_right_and_disabled_ones_are_the_base(calls):
    """Each of which PEFT 0.21 gets wrong."""
    base, _ = in_4_bits(wide("qwen3_moe"), compress_statistics=True)
    frozen = base(input_ids=IDS).logits
    model, plain = pair("qwen3_moe")
    slk.accelerate_peft(model, strict=True)
    right = plain(input_ids=IDS).logits
    assert (right - frozen).abs().max() > 0.1
    with torch.no_grad():
        without = [model(input_ids=IDS).logits for _ in range(4)]
    assert calls == ["NF4Experts"] * 8
    for logits in [*without, *(model(input_ids=IDS).logits for _ in range(4))]:
        torch.testing.assert_close(logits, right, rtol=1e-5, atol=1e-5)
    calls.clear()
    with model.disable_adapter():
        assert model(input_ids=IDS).logits.equal(frozen)
    with slk.disable_lora(model):
        assert model(input_ids=IDS).logits.equal(frozen)
    assert not calls
    (module,) = (m for m in model.modules() if hasattr(m, "parametrizations"))
    assert [len(steps) for steps in module.parametrizations.values()] == [1, 1]
    assert not parametrize._cache_enabled and not parametrize._cache


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_autocast(quant_type, nested, calls):
    model, plain = pair("qwen3_moe", BF16, quant_type=quant_type, compress_statistics=nested)
    for each in (model, plain):
        for name, p in each.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
        slk.accelerate_peft(each, strict=True)
    x, index, weights = (t.detach() for t in routing(width=WIDTH))
    found = []
    for each in (model, plain):
        (wrapper,) = (m for m in each.modules() if isinstance(m, peft_experts.AcceleratedExperts))
        with torch.autocast("cpu", BF16):
            y = wrapper(x.float(), index, weights.float())
        y.sum().backward()
        gradients = {n: p.grad for n, p in wrapper.named_parameters() if p.grad is not None}
        assert y.dtype == FP32 and {g.dtype for g in gradients.values()} == {FP32}
        found.append({"Y": y.detach()} | gradients)
    assert calls == ["NF4Experts"] * 2 + ["Parameter"] * 2
    # Both multiply the same bfloat16 values.
    assert_close(found[0], found[1], 0)


def test_the_file_loads_on_plain_weights_and_back(tmp_path):
    model, plain = pair("qwen3_moe")
    slk.accelerate_peft(model)
    model.save_pretrained(tmp_path / "packed")
    plain.save_pretrained(tmp_path / "plain")
    name = "adapter_model.safetensors"
    saved, expected = (load_file(tmp_path / d / name) for d in ("packed", "plain"))
    assert saved.keys() == expected.keys()
    assert all(saved[key].equal(expected[key]) for key in saved)
    back = peft.PeftModel.from_pretrained(wide("qwen3_moe"), tmp_path / "packed")
    assert len(slk.accelerate_peft(back).replaced) == 2
    # Onto 4 bits, once these have the names of plain ones. PEFT's own names do not fit.
    packed, _ = in_4_bits(wide("qwen3_moe"), compress_statistics=True)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for .*experts.*lora_[AB].default.weight"
    ):
        peft.PeftModel.from_pretrained(packed, tmp_path / "packed")
    config = peft.LoraConfig.from_pretrained(tmp_path / "packed")
    packed, _ = in_4_bits(wide("qwen3_moe"), compress_statistics=True)
    fresh = peft.get_peft_model(packed, config)
    slk.accelerate_peft(fresh)
    fresh.load_adapter(tmp_path / "packed", "default")
    with torch.no_grad():
        assert fresh.eval()(input_ids=IDS).logits.equal(model(input_ids=IDS).logits)


def shapes(model: Any) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def test_restored_it_has_pefts_names_hooks_and_state():
    model, _ = pair("qwen3_moe")
    names = shapes(model)
    (module,) = (m for m in model.modules() if hasattr(m, "parametrizations"))
    before, hooks = module.state_dict(), [*module._forward_hooks, *module._forward_pre_hooks]
    assert any(".quant_state." in key for key in before)
    outermost = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    called: list[str] = []
    handle = outermost.register_forward_hook(lambda *args: called.append("hook"))
    slk.accelerate_peft(model, strict=True)
    assert shapes(model) != names
    new = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    assert isinstance(new, peft_experts.AcceleratedExperts) and new is not outermost
    assert [*wrapped_parameters(new)] == ["down_proj", "gate_up_proj"]
    # A hook stays at its place.
    model(input_ids=IDS)
    assert called == ["hook"]
    handle.remove()
    slk.accelerate_peft(model, strict=True)
    model(input_ids=IDS)
    assert called == ["hook"]
    after = module.state_dict()
    assert after.keys() == before.keys() and all(after[k].equal(before[k]) for k in before)
    assert [*module._forward_hooks, *module._forward_pre_hooks] == hooks
    slk.restore_peft(model)
    assert shapes(model) == names
    assert model.get_submodule("base_model.model.model.layers.0.mlp.experts") is outermost
    assert not any(isinstance(m, peft_experts.AcceleratedExperts) for m in model.modules())


def test_merging_is_refused_before_anything_changes():
    model, _ = pair("qwen3_moe")
    slk.accelerate_peft(model)
    before = model(input_ids=IDS).logits
    text = "down_proj is a stack in bitsandbytes' 4 bits, which would have to be quantized anew to be merged"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=text):
            merge()
    assert model(input_ids=IDS).logits.equal(before)
    base = model.unload()
    (module,) = (m for m in base.modules() if hasattr(m, "parametrizations"))
    assert [len(steps) for steps in module.parametrizations.values()] == [1, 1]


def test_a_call_that_only_pefts_wrong_path_could_compute_raises():
    model, _ = pair("qwen3_moe")
    slk.accelerate_peft(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    names = ("gate_up_proj", "down_proj")
    fault = str(peft_faults.faults_of_parametrized(names, frozenset(names)))
    text = f"its call is observed, .*, and PEFT .* trains experts wrongly .*: {re.escape(fault)}"
    try:
        with pytest.raises(RuntimeError, match=text):
            model(input_ids=IDS)
        # The base is PEFT's and right.
        with model.disable_adapter():
            model(input_ids=IDS)
    finally:
        handle.remove()
    # So is one adapter of two, whichever is nested in the other.
    for name, wrapper in adapters_of(model).items():
        wrapper.enable_adapters(False)
        with pytest.raises(RuntimeError, match=f"its {name[1]} is disabled, and PEFT"):
            model(input_ids=IDS)
        wrapper.enable_adapters(True)
    with torch.no_grad():
        model(input_ids=IDS)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_of_two_stacks_in_4_bits(name, calls):
    model = wide("qwen3_moe")
    targets = {"target_parameters": whole_names(model)}
    plain = copy.deepcopy(model)
    (module,) = (m for m in model.modules() if hasattr(m, "gate_up_proj"))
    (other,) = (m for m in plain.modules() if hasattr(m, "gate_up_proj"))
    from tests.helpers.packed_stacks import parametrize as bnb

    bnb.replace_parameter_4bit(module, name)
    getattr(other, name).data.copy_(getattr(module, name))
    model, plain = with_lora(model, **targets), with_lora(plain, **targets)
    copy_adapters(model, plain)
    slk.accelerate_peft(model, strict=True)
    slk.accelerate_peft(plain, strict=True)
    assert_close(results(model), results(plain), 1e-5)
    assert sorted(calls) == ["NF4Experts"] + ["Parameter"] * 3
    # One is enough for PEFT's path to be wrong.
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(RuntimeError, match=r"its call is observed, .* trains experts wrongly"):
            model(input_ids=IDS)
    finally:
        handle.remove()


def test_frozen_stacks_in_4_bits_beside_an_adapter(calls):
    """Only down has one: up is dequantized expert by expert all the same."""
    model = wide("qwen3_moe")
    targets = {"target_parameters": [n for n in whole_names(model) if n.endswith("down_proj")]}
    model, plain = in_4_bits(model)
    model, plain = with_lora(model, **targets), with_lora(plain, **targets)
    (note,) = slk.accelerate_peft(model, strict=True).notes
    assert "it stacks matrices in gate_up_proj, as experts are stored" in note
    assert_close(results(model), results(plain), 1e-5)
    assert calls == ["NF4Experts"] * 2


def test_copied_and_compiled():
    model, _ = pair("qwen3_moe")
    slk.accelerate_peft(model)
    (wrapper,) = (m for m in model.modules() if isinstance(m, peft_experts.AcceleratedExperts))
    given = [t.detach().float() if t.is_floating_point() else t for t in routing(width=WIDTH)]
    given[0].requires_grad_()
    assert_copies_and_compiles(wrapper, given)


def test_no_token():
    model, _ = pair("qwen3_moe")
    slk.accelerate_peft(model)
    (wrapper,) = (m for m in model.modules() if isinstance(m, peft_experts.AcceleratedExperts))
    index = torch.zeros(0, 2, dtype=torch.int64)
    y = wrapper(torch.zeros(0, WIDTH, requires_grad=True), index, torch.zeros(0, 2))
    y.sum().backward()
    assert y.shape == (0, WIDTH)


def test_a_stack_of_scales_on_another_device_is_named():
    packed = nf4(2, 8, 64).packed
    assert packed.device == torch.device("cpu")
    model, _ = pair("qwen3_moe")
    (module,) = (m for m in model.modules() if hasattr(m, "parametrizations"))
    state = module.parametrizations.down_proj[0].quant_state
    state.absmax = state.absmax.to("meta")
    with pytest.raises(
        ValueError, match="absmax must be on the device of the others, cpu, got meta"
    ):
        slk.accelerate_peft(model)
