"""LoRA on packed experts by apply_lora and load_adapter, against what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.nn import LoRAExperts
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
)
from tests.helpers.packed_stacks import in_4_bits

pytestmark = pytest.mark.filterwarnings("ignore")
# bitsandbytes' own dequantization is right on a CPU where rows are whole blocks.
WIDTH = 64


def pair(family: str = "qwen3_moe", dtype: torch.dtype = FP32, **options: Any) -> tuple[Any, Any]:
    """A model with LoRA on its experts in 4 bits, and its like with what these stand for."""
    model = build(family, dtype=dtype, width=WIDTH)
    names = stacks(model)
    model, plain = in_4_bits(model, compress_statistics=True)
    config = {"r": 3, "lora_alpha": 6, "target_parameters": names, "init_lora_weights": False}
    for each in (model, plain):
        torch.manual_seed(1)
        slk.apply_lora(each, slk.LoRAConfig(**config | options))
        each.eval()
    return model, plain


def experts_of(model: Any) -> LoRAExperts:
    (module,) = (m for m in model.modules() if isinstance(m, LoRAExperts))
    return module


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) == 5
    for name, value in found.items():
        atol = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_fused_packed_experts(family):
    """As two ops compute plain ones: trained, and with one of the two adapters disabled."""
    model, plain = pair(family)
    module = experts_of(model)
    assert module.fuse_experts() is None
    assert_close(results(model), results(plain))
    with slk.disable_lora(module.down_proj), slk.disable_lora(experts_of(plain).down_proj):
        y = model(input_ids=IDS).logits
        torch.testing.assert_close(y, plain(input_ids=IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_files_are_those_of_plain_experts(family, tmp_path):
    model, plain = pair(family)
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.equal(plain.get_parameter(name))
    assert_close(results(model), results(plain))
    slk.save_adapter(model, tmp_path / "packed")
    slk.save_adapter(plain, tmp_path / "plain")
    name = "adapter_model.safetensors"
    assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    config = "adapter_config.json"
    assert (tmp_path / "packed" / config).read_text() == (tmp_path / "plain" / config).read_text()
    # Onto plain weights, by PEFT; and onto 4 bits.
    base = build(family, dtype=FP32, width=WIDTH)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "packed")
    assert len(theirs.peft_config["default"].target_parameters) == 2
    fresh, _ = in_4_bits(build(family, dtype=FP32, width=WIDTH), compress_statistics=True)
    report = slk.load_adapter(fresh, tmp_path / "packed")
    assert {(row.r, row.experts) for row in report.replaced} == {(3, E)}
    with torch.no_grad():
        assert fresh.eval()(input_ids=IDS).logits.equal(model(input_ids=IDS).logits)


def test_the_report_and_what_matches():
    model, _ = in_4_bits(build("qwen3_moe", dtype=FP32, width=WIDTH))
    config = slk.LoRAConfig(target_parameters=["experts.down_proj", "experts.dawn_proj"])
    with pytest.warns(UserWarning, match="target_parameters 'experts.dawn_proj' matches nothing"):
        report = slk.apply_lora(model, config)
    text = str(report)
    assert "1 x down_proj: 4 experts of 64 -> 64, r 8" in text
    assert "1 stack of experts in bitsandbytes' 4 bits stay as they are stored; these can't" in text
    # The other stack is told of, by "all-linear", too.
    model, _ = in_4_bits(build("qwen3_moe", dtype=FP32, width=WIDTH))
    report = slk.apply_lora(model, slk.LoRAConfig(target_modules="all-linear"))
    (skipped,) = (row for row in report.skipped if row.name == "model.layers.0.mlp.experts")
    assert skipped.reason.startswith("it stacks matrices in gate_up_proj, down_proj, as experts")


def test_disabled_it_is_the_base_and_merging_is_refused():
    base, _ = in_4_bits(build("qwen3_moe", dtype=FP32, width=WIDTH), compress_statistics=True)
    expected = base(input_ids=IDS).logits
    state = base.state_dict()
    hooks = [len(m._forward_hooks) for m in base.modules()]
    model, _ = pair()
    with slk.disable_lora(model):
        assert model(input_ids=IDS).logits.equal(expected)
    with_lora = model(input_ids=IDS).logits
    text = "'model.layers.0.mlp.experts.gate_up_proj': gate_up_proj is a stack in bitsandbytes' 4 bits, which"
    for merge in (slk.merge_lora, slk.remove_lora):
        with pytest.raises(ValueError, match=text):
            merge(model)
    assert model(input_ids=IDS).logits.equal(with_lora)
    slk.remove_lora(model, merge=False)
    assert model(input_ids=IDS).logits.equal(expected)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(after[key].equal(state[key]) for key in state)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_one_disabled_layer_of_two_is_dequantized_expert_by_expert():
    model, plain = pair()
    for each in (model, plain):
        experts_of(each).down_proj._disabled = True
    found, expected = (each(input_ids=IDS).logits for each in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_dropout_is_that_of_plain_experts(reentrant):
    model, plain = pair(lora_dropout=0.25)
    x, index, weights = routing(width=WIDTH)
    found = []
    for each in (model, plain):
        module = experts_of(each).train()
        leaves = [t.detach().float().requires_grad_() for t in (x, weights)]
        torch.manual_seed(2)
        if reentrant is None:
            y = module(leaves[0], index, leaves[1])
        else:
            y = checkpoint(module, leaves[0], index, leaves[1], use_reentrant=reentrant)
        module.zero_grad()
        y.square().sum().backward()
        trained = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
        found.append({"Y": y.detach()} | trained)
        assert len(trained) == 4 and not module.eval()(leaves[0], index, leaves[1]).equal(y)
    assert_close(*found)


def test_autocast():
    model, plain = pair(dtype=BF16)
    x, index, weights = (t.detach() for t in routing(width=WIDTH))
    found = []
    for each in (model, plain):
        module = experts_of(each)
        with torch.autocast("cpu", BF16):
            y = module(x.float(), index, weights.float())
        y.sum().backward()
        assert y.dtype == FP32 and module.down_proj.lora_A.dtype == FP32
        found.append([y, *(p.grad for p in module.parameters() if p.requires_grad)])
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_a_bfloat16_file_gives_float32_adapters(tmp_path):
    """As for quantized layers."""
    model, _ = pair(dtype=BF16)
    for stack in (experts_of(model).gate_up_proj, experts_of(model).down_proj):
        stack.lora_A.data = stack.lora_A.data.to(BF16)
        stack.lora_B.data = stack.lora_B.data.to(BF16)
    slk.save_adapter(model, tmp_path)
    fresh, _ = in_4_bits(build("qwen3_moe", dtype=BF16, width=WIDTH), compress_statistics=True)
    slk.load_adapter(fresh, tmp_path)
    assert experts_of(fresh).down_proj.lora_A.dtype == FP32
    with torch.no_grad():
        assert fresh.eval()(input_ids=IDS).logits.equal(model(input_ids=IDS).logits)


def test_copied_and_compiled():
    model, _ = pair()
    module = experts_of(model)
    x, index, weights = (t.detach() for t in routing(width=WIDTH))
    given = (x.float().requires_grad_(), index, weights.float())
    assert_copies_and_compiles(module, given)


def test_a_stack_of_no_whole_blocks_is_skipped_with_the_reason():
    model, _ = in_4_bits(build("qwen3_moe", dtype=FP32), blocksize=2048)
    before = [*model.named_parameters()]
    config = slk.LoRAConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    text = (
        "its down_proj does not fit lora_experts: an expert must be whole blocks of 2048 elements, "
        "got 32 x 48 = 1536 elements"
    )
    with pytest.raises(ValueError, match=text):
        slk.apply_lora(model, config)
    assert all(p is q for (_, p), (_, q) in zip(before, model.named_parameters(), strict=True))
