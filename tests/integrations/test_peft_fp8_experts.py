"""Experts of transformers' module ``FP8Experts`` under PEFT, against what they stand for. PEFT
alone rounds the branch away.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.integrations.peft import experts as peft_experts
from stablelora_kernels.testing.cases import FP32
from tests.helpers.moe_models import IDS, E, build, results, stacks, with_lora
from tests.helpers.packed_stacks import fp8, in_float8

pytestmark = pytest.mark.filterwarnings("ignore")
# Whole blocks of 128 x 128.
WIDTH = 128
KERNEL = "fp8_linear"


@pytest.fixture
def transformers_product(monkeypatch):
    """transformers' own product needs a kernel for GPUs. This is its function on exact inputs."""

    def product(x, weight, scale_inv, block_size=None, *args, **kwargs):
        return x @ fp8._dequantize_fp8_weight(weight, scale_inv, block_size, x.dtype).t()

    monkeypatch.setattr(fp8, KERNEL, product)


def pair(family: str = "qwen3_moe") -> tuple[Any, Any]:
    """A PEFT model in float8, and one of what that stands for."""
    model = build(family, dtype=FP32, width=WIDTH)
    targets = {"target_parameters": stacks(model)}
    model, plain = (with_lora(each, **targets) for each in in_float8(model))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in plain.named_parameters():
        assert p.requires_grad == (name in trained)
        if p.requires_grad:
            p.data.copy_(trained[name])
    return model, plain


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) == 5
    for name, value in found.items():
        atol = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fuse_mlp", [False, True])
def test_all_gradients(family, checkpointing, fuse_mlp, transformers_product):
    """``fuse_mlp``: in one op, against plain stacks in two."""
    model, plain = pair(family)
    report = slk.accelerate_peft(model, strict=True, fuse_mlp=fuse_mlp)
    assert {(row.r, row.experts) for row in report.replaced} == {(3, E)}
    notes = (f"computed in one op each: 1 x MLP of {E} experts",) if fuse_mlp else ()
    assert report.notes == notes and not report.skipped
    slk.accelerate_peft(plain, strict=True)
    if checkpointing:
        for each in (model, plain):
            each.gradient_checkpointing_enable({"use_reentrant": False})
            each.enable_input_require_grads()
            each.train()
    found = results(model)
    assert_close(found, results(plain))
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    # The branch changes the output.
    assert (found["Y"] - base).abs().max() > 0.1
    expected, _ = in_float8(build(family, dtype=FP32, width=WIDTH))
    assert base.equal(expected(input_ids=IDS).logits)


def test_merging_is_refused():
    model, _ = pair()
    slk.accelerate_peft(model)
    with pytest.raises(ValueError, match="down_proj is a stack in float8, which would have to be"):
        model.merge_adapter()


def test_what_does_not_fit_is_refused_where_peft_would_train_nothing(transformers_product):
    model, _ = pair()
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    (experts,) = (m for m in model.modules() if isinstance(m, fp8.FP8Experts))
    experts.block_size = None
    fault = "PEFT rounds down_proj with its branch to torch.float8_e4m3fn, without a scale, so its"
    with pytest.raises(
        ValueError,
        match=rf"its gate_up_proj does not fit lora_experts: block_size must be \(rows, columns\), got None, and {fault}",
    ):
        slk.accelerate_peft(model)
    experts.block_size = (128, 128)
    slk.accelerate_peft(model)
    # Without an active adapter PEFT's path is right.
    model.base_model.set_adapter([])
    assert model(input_ids=IDS).logits.equal(base)
    model.add_adapter("late", model.peft_config["default"])
    model.base_model.set_adapter(["default", "late"])
    (wrapper,) = (m for m in model.modules() if isinstance(m, peft_experts.AcceleratedExperts))
    with pytest.raises(RuntimeError, match=f"its gate_up_proj has 2 active adapters, and {fault}"):
        model(input_ids=IDS)
    assert wrapper.get_base_layer() is experts


def test_experts_without_an_adapter_are_told_without_their_scales():
    model, _ = in_float8(build("qwen3_moe", dtype=FP32, width=WIDTH))
    model = with_lora(model, target_modules=["q_proj"], target_parameters=None)
    (note,) = slk.accelerate_peft(model).notes
    assert note.startswith(
        "base_model.model.model.layers.0.mlp.experts: it stacks matrices in gate_up_proj, down_proj, as experts"
    )
