"""LoRA on stacks of experts by apply_lora and load_adapter: against PEFT, which refuses dropout,
and against the formulas.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.cli import main
from stablelora_kernels.integrations.peft_experts import AcceleratedExperts
from stablelora_kernels.nn import LoRAExperts
from stablelora_kernels.nn.experts import pairs_by_expert
from stablelora_kernels.ops.dropout import draw_keep
from stablelora_kernels.reference.lora import lora_experts_ref
from stablelora_kernels.testing.cases import BF16, FP32, FP64
from tests.helpers.distributed_training import gather
from tests.helpers.moe_models import (
    BY_DAY,
    FAMILIES,
    IDS,
    E,
    build,
    peft,
    results,
    routing,
    stacks,
    with_lora,
)
from tests.helpers.processes import needs_gloo, spawn

pytestmark = pytest.mark.filterwarnings("ignore")


def own(model: Any, **options: Any) -> Any:
    """LoRA of rank 3 on a model's experts, no branch of which is zero, in evaluation."""
    torch.manual_seed(1)
    given = {
        "r": 3,
        "lora_alpha": 6,
        "target_parameters": stacks(model),
        "init_lora_weights": False,
    }
    slk.apply_lora(model, slk.LoRAConfig(**given | options))
    return model.eval()


def experts_of(model: Any) -> LoRAExperts:
    (found,) = (m for m in model.modules() if isinstance(m, LoRAExperts))
    return found


def values(found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The logits, and the gradients in the order of the layers and of A and B, of PEFT's names or
    of ours.
    """
    return [
        found["Y"],
        *sorted((t for name, t in found.items() if name != "Y"), key=lambda t: t.shape),
    ]


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float
) -> None:
    assert len(found) == len(expected)
    for a, b in zip(values(found), values(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * b.abs().max().item())


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in BY_DAY else pytest.mark.nightly)
        for name in FAMILIES
        if name != "jetmoe"
    ],
)
def test_files_are_pefts_both_ways(family, tmp_path, capsys):
    theirs = with_lora(build(family), rank_pattern={"experts.down_proj": 6})
    ours = build(family).eval()
    expected, before = results(theirs), ours.state_dict()
    theirs.save_pretrained(tmp_path / "theirs")
    report = slk.load_adapter(ours, tmp_path / "theirs")
    assert {(row.name.rpartition(".")[2], row.r, row.experts) for row in report.replaced} == {
        ("up_proj" if family == "nemotron_h" else "gate_up_proj", 3, E), ("down_proj", 6, E),
    }  # fmt: skip
    # Nemotron's norms cast to float32.
    rtol = 1e-6 if family == "nemotron_h" else 1e-12
    assert_same(results(ours), expected, rtol)
    slk.save_adapter(ours, tmp_path / "ours")
    # The command line knows their ranks, of which A has a multiple: here down's is one of up's,
    # too.
    assert main(["inspect", "--json", str(tmp_path / "ours")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {(row["r"], row["scaling"]) for row in shown["pairs"]} == {
        (3, 2.0),
        (6, 1.0),
    } and not shown["problems"]
    back = peft.PeftModel.from_pretrained(
        build(family), tmp_path / "ours", is_trainable=True
    ).eval()
    found = results(back)
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in found)

    state, plain = ours.state_dict(), build(family).eval()(input_ids=IDS).logits
    merged = slk.merge_lora(ours)
    assert not merged.untied and all(
        ours.state_dict()[key].equal(value) for key, value in state.items()
    )
    for is_merged in (True, False):
        y = ours(input_ids=IDS).logits
        torch.testing.assert_close(y, expected["Y"], rtol=0, atol=rtol * y.abs().max().item())
        with slk.disable_lora(ours):
            assert ours(input_ids=IDS).logits.equal(plain)
        if is_merged:
            ours.train()
            with pytest.raises(
                RuntimeError, match="is merged, so lora_A and lora_B would get no gradient"
            ):
                ours(input_ids=IDS)
            slk.unmerge_lora(ours.eval())
    slk.remove_lora(ours)
    y = ours(input_ids=IDS).logits
    torch.testing.assert_close(y, expected["Y"], rtol=0, atol=rtol * y.abs().max().item())
    assert before.keys() == ours.state_dict().keys()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_dropout_against_the_formulas(family):
    module = experts_of(own(build(family), lora_dropout=0.25))
    base, p = module.base_layer, 0.25
    for name in ("gate_up_proj", "down_proj"):
        stack, weight = getattr(module, name).train(), getattr(base, name)
        w = weight.transpose(1, 2) if base.is_transposed else weight
        a, b = pairs_by_expert(stack.lora_A, stack.lora_B, E)
        x, offsets = torch.randn(23, w.shape[2], dtype=FP64), torch.tensor([4, 4, 17, 23])
        grad, bias = torch.randn(23, w.shape[1], dtype=FP64), getattr(base, f"{name}_bias", None)
        torch.manual_seed(5)
        found = stack(x.requires_grad_(), offsets)
        torch.manual_seed(5)
        keep, exact = draw_keep(x, p)
        assert 0.6 < keep.double().mean() < 0.9
        expected = lora_experts_ref(x, w, bias, a, b, stack.scaling, offsets, keep, exact)
        inputs = [x, stack.lora_A, stack.lora_B]
        for one, other in zip(
            (found, *torch.autograd.grad(found, inputs, grad)),
            (expected, *torch.autograd.grad(expected, inputs, grad)), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert stack.eval()(x, offsets).equal(stack(x, offsets)) and not stack(x, offsets).equal(
            found
        )


@pytest.mark.parametrize("adapted", ["by apply_lora", "by PEFT"])
@pytest.mark.parametrize("family", BY_DAY)
def test_no_tokens(family, adapted):
    """A process of several may get none: transformers' module returns [0, H]."""
    model = build(family)
    if adapted == "by PEFT":
        model = with_lora(model)
        assert not slk.accelerate_peft(model, strict=True).skipped
        module = next(m for m in model.modules() if isinstance(m, AcceleratedExperts))
    else:
        module = experts_of(own(model))
    x, index, weights = (t[:0].detach().requires_grad_(t.is_floating_point()) for t in routing())
    y = module(x) if family == "llama4_text" else module(x, index, weights)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    trained = [p for p in module.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_copied_checkpointed_and_compiled():
    module = experts_of(own(build("qwen3_moe"), lora_dropout=0.1))
    given = routing()

    def run(call: Any) -> list[torch.Tensor]:
        torch.manual_seed(2)
        y = call(*given)
        return [y, *torch.autograd.grad(y.square().sum(), [given[0], given[2]])]

    expected = run(module.train())
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    ways = [copied, lambda *args: checkpoint(copied, *args, use_reentrant=False)]
    for way in ways:
        for found, wanted in zip(run(way), expected, strict=True):
            assert found.equal(wanted)
    torch._dynamo.reset()
    compiled = torch.compile(copied.eval(), backend="aot_eager", fullgraph=True)
    for found, wanted in zip(run(compiled), run(copied), strict=True):
        torch.testing.assert_close(found, wanted)


def test_half_of_a_module_in_bfloat16_under_autocast_and_its_latches():
    model = own(build("qwen3_moe", "grouped_mm", BF16), target_parameters=["experts.down_proj"])
    module = experts_of(model)
    x, index, weights = (t.detach() for t in routing())
    with torch.autocast("cpu", BF16):
        y = module(x.float(), index, weights.float())
    y.sum().backward()
    assert y.dtype == FP32 and module.down_proj.lora_A.dtype == FP32
    assert all(
        p.grad is not None and p.grad.any()
        for p in (module.down_proj.lora_A, module.down_proj.lora_B)
    )
    (row,) = slk.StableLoRAAdamW.from_model(model).stability()
    assert row.name.endswith("mlp.experts.down_proj") and row.experts == E


def test_autocast_does_not_round_what_is_merged():
    model = own(build("qwen3_moe", dtype=FP32))
    twin = copy.deepcopy(model)
    slk.merge_lora(twin)
    with torch.autocast("cpu", BF16):
        slk.merge_lora(model)
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, expected)


def test_what_does_not_match_or_fit_is_named():
    model, called = build("qwen3_moe"), []
    for names, reason in (
        (["experts.gate"], "match a stack of experts"), (["gate.weight"], r"mlp.gate \(\w+Router is not a stack of experts"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            slk.apply_lora(model, slk.LoRAConfig(target_parameters=names))
    with pytest.raises(
        TypeError,
        match="target_parameters must be a list of names or None, got the string 'down_proj'",
    ):
        slk.LoRAConfig(target_parameters="down_proj")
    with pytest.raises(ValueError, match="JetMoeParallelExperts is not a stack of experts"):
        slk.apply_lora(build("jetmoe"), slk.LoRAConfig(target_parameters=["weight"]))
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *args: called.append(1))
    config = slk.LoRAConfig(
        target_modules="all-linear", target_parameters=["experts.down_proj", "down"]
    )
    with pytest.warns(UserWarning, match="target_parameters 'down' matches nothing"):
        report = slk.apply_lora(model, config)
    text = str(report)
    assert (
        "1 x down_proj: 4 experts of 48 -> 32, r 8" in text
        and "1 hook of 'model.layers.0.mlp.experts' moved" in text
    )
    # The other stack is named still.
    assert "it stacks matrices in gate_up_proj, as experts are stored" in text
    model(input_ids=IDS)
    assert called


def train_sharded(rank: int, world: int, directory: Any, library: str) -> dict[str, torch.Tensor]:
    model = own(build("qwen3_moe")) if library == "ours" else with_lora(build("qwen3_moe"))
    if library == "PEFT":
        slk.accelerate_peft(model)
    if world > 1:
        for layer in model.get_submodule(
            "model.layers" if library == "ours" else "base_model.model.model.layers"
        ):
            fully_shard(layer)
        fully_shard(model)
        # Sharded, it is accelerated still.
        assert library == "ours" or not slk.accelerate_peft(model).skipped
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = IDS.repeat(2, 1)[rank * 4 // world : (rank + 1) * 4 // world]
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: gather(p) for name, p in model.named_parameters() if p.requires_grad}


@needs_gloo
@pytest.mark.parametrize("library", ["ours", "PEFT"])
def test_fully_shard(library, tmp_path):
    alone = train_sharded(0, 1, tmp_path, library)
    for trained in spawn(train_sharded, 2, tmp_path, library):
        assert trained.keys() == alone.keys() and len(alone) == 4
        for name, value in trained.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)
