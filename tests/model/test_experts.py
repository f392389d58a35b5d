"""LoRA on stacks of experts by apply_lora and load_adapter: against PEFT, which refuses dropout,
and against the formulas.
"""

from __future__ import annotations

import copy
import importlib
import json
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from benchmarks.common.memory import saved_for_backward
from stablelora_kernels.cli import main
from stablelora_kernels.integrations.peft_experts import AcceleratedExperts
from stablelora_kernels.nn import LoRAExperts, fused_experts
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
    transformers,
    with_lora,
)
from tests.helpers.processes import needs_gloo, spawn

pytestmark = pytest.mark.filterwarnings("ignore")


def own(model: Any, fuse: bool = False, **options: Any) -> Any:
    """LoRA of rank 3 on a model's experts, no branch of which is zero, in evaluation."""
    torch.manual_seed(1)
    given = {
        "r": 3,
        "lora_alpha": 6,
        "target_parameters": stacks(model),
        "init_lora_weights": False,
    }
    slk.apply_lora(model, slk.LoRAConfig(**given | options), fuse_mlp=fuse)
    return model.eval()


def experts_of(model: Any) -> LoRAExperts:
    (found,) = (m for m in model.modules() if isinstance(m, LoRAExperts))
    return found


@pytest.fixture
def nodes(monkeypatch) -> list[int]:
    """The number of slots of each call of fuse_mlp's op."""
    slots: list[int] = []

    def counted(x: torch.Tensor, routing: Any, *args: Any) -> torch.Tensor:
        slots.append(routing.slots)
        return op(x, routing, *args)

    op = fused_experts.lora_experts_mlp_op
    monkeypatch.setattr(fused_experts, "lora_experts_mlp_op", counted)
    return slots


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


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("by", ["apply_lora", "PEFT"])
@pytest.mark.parametrize("family", BY_DAY)
def test_no_tokens(family, by, fuse):
    """A process of several may get none: transformers' module returns [0, H]."""
    model = build(family)
    if by == "PEFT":
        model = with_lora(model)
        assert not slk.accelerate_peft(model, fuse_mlp=fuse).skipped
        module = next(m for m in model.modules() if isinstance(m, AcceleratedExperts))
    else:
        module = experts_of(own(model, fuse, lora_dropout=0.1).train())
    x, index, weights = (t[:0].detach().requires_grad_(t.is_floating_point()) for t in routing())
    y = module(x) if family == "llama4_text" else module(x, index, weights)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    trained = [p for p in module.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def same_draws(module: LoRAExperts, given: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """A training step's results, by one seed."""
    torch.manual_seed(2)
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    y = module.train()(*given)
    wanted = [given[0], given[2], *leaves.values()]
    grads = torch.autograd.grad(y.square().sum(), wanted)
    return {"Y": y.detach()} | dict(zip(("dx", "dw", *leaves), grads, strict=True))


@pytest.mark.parametrize("tokens", [9, 1200])
@pytest.mark.parametrize("p", [0.1, 0.4])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_fused_draws_the_masks_of_two_ops(family, p, tokens, nodes):
    """Few tokens and many, whose masks at 0.1 are positions."""
    module = experts_of(own(build(family), lora_dropout=p))
    given = routing(tokens)
    expected = same_draws(module, given)
    assert not nodes and module.fuse_experts() is None
    results = same_draws(module, given)
    assert nodes == [tokens * 2] and len(results) == 7
    for name, value in results.items():
        atol = 1e-12 * expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)
    # In evaluation nothing is dropped.
    state = torch.get_rng_state()
    y = module.eval()(*given)
    assert torch.equal(state, torch.get_rng_state())
    module.unfuse_experts()
    torch.testing.assert_close(module(*given), y, rtol=0, atol=1e-12)


def test_fused_merged_disabled_saved_and_removed(nodes, tmp_path):
    plain, fast = (own(build("qwen3_moe"), fuse) for fuse in (False, True))
    module, state = experts_of(fast), plain.state_dict()
    assert fast.state_dict().keys() == state.keys()
    assert all(value.equal(state[key]) for key, value in fast.state_dict().items())
    for model, name in ((plain, "plain"), (fast, "fast")):
        slk.save_adapter(model, tmp_path / name)
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "fast" / path.name).read_bytes() == path.read_bytes()
    loaded = build("qwen3_moe").eval()
    report = slk.load_adapter(loaded, tmp_path / "fast", fuse_mlp=True)
    assert [(mlp.reason, mlp.experts) for mlp in report.mlps] == [(None, E)]

    expected = results(plain)
    for way in (fast, loaded, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        nodes.clear()
        assert_same(results(way), expected, 1e-12)
        assert len(nodes) == 1
    nodes.clear()
    base = build("qwen3_moe").eval()(input_ids=IDS).logits
    with slk.disable_lora(fast):
        assert fast(input_ids=IDS).logits.equal(base)
    # One of the two merged: the other has a branch still.
    module.down_proj.merge()
    assert not nodes
    y = fast(input_ids=IDS).logits
    torch.testing.assert_close(y, expected["Y"], rtol=0, atol=1e-12)
    with slk.disable_lora(module.down_proj):
        y = fast(input_ids=IDS).logits
    with slk.disable_lora(experts_of(plain).down_proj):
        torch.testing.assert_close(y, plain(input_ids=IDS).logits, rtol=0, atol=1e-12)
    assert len(nodes) == 2
    module.train()
    with pytest.raises(RuntimeError, match="is merged, so lora_A and lora_B would get no gradient"):
        module(*routing())
    module.eval()
    slk.merge_lora(fast)
    torch.testing.assert_close(fast(input_ids=IDS).logits, expected["Y"], rtol=0, atol=1e-12)
    slk.unmerge_lora(fast)
    slk.remove_lora(fast, merge=False)
    assert fast(input_ids=IDS).logits.equal(base) and len(nodes) == 2
    assert not any("stablelora" in key for m in fast.modules() for key in vars(m))


def test_fused_keeps_less_than_the_frozen_experts(nodes):
    """At 512 rows an expert, with A and B in float32: x and indices by tokens and slots, G and S."""
    tokens, wide, inner, count, top_k = 1024, 128, 64, 8, 4
    sizes = {"hidden_size": wide, "moe_intermediate_size": inner}
    config = transformers.Qwen3MoeConfig(num_experts=count, **sizes)
    config._experts_implementation = "grouped_mm"
    kind = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    block = torch.nn.ModuleDict({"experts": kind.Qwen3MoeExperts(config).to(BF16)})
    for p in block.parameters():
        p.data.normal_(0, 0.1)
        p.requires_grad_(False)
    index = torch.arange(tokens * top_k).view(tokens, top_k) % count
    x = torch.randn(tokens, wide).to(BF16).requires_grad_()
    given = (x, index, torch.rand(tokens, top_k).to(BF16).requires_grad_())
    frozen = saved_bytes(block["experts"], given)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    slk.apply_lora(block, slk.LoRAConfig(r=4, target_parameters=names))
    two_ops = saved_bytes(block["experts"], given)
    assert block["experts"].fuse_experts() is None
    fused = saved_bytes(block["experts"], given)
    slots = top_k * tokens
    indices = 8 * slots + 4 * count
    routing_weights = 2 * slots
    of_tensors = 2 * (tokens * wide + slots * (2 * inner + 4))
    assert fused == of_tensors + indices + routing_weights
    assert fused <= 0.6 * frozen < two_ops and len(nodes) == 1


def saved_bytes(module: Any, given: tuple[torch.Tensor, ...]) -> int:
    """Of the storages that autograd keeps and that are no parameter's."""
    return saved_for_backward(lambda: module(*given), [*module.parameters()])


def test_fused_casts_expert_by_expert_under_autocast(nodes):
    """A float32 model in bfloat16: nothing of the stack's size is made or kept."""
    module = experts_of(own(build("qwen3_moe", dtype=FP32), True))
    x, index, weights = (t.detach() for t in routing())
    given = (x.float().requires_grad_(), index, weights.float())
    with torch.autocast("cpu", BF16):
        y = module(*given)
        expected = module.base_layer(*given)
    assert y.dtype == FP32 and nodes == [18]
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)
    with torch.autocast("cpu", BF16), slk.disable_lora(module.gate_up_proj):
        with slk.disable_lora(module.down_proj):
            assert module(*given).equal(expected)
        largest = max(
            t.numel() for t in saved_tensors(lambda: module(*given), [*module.parameters()])
        )
    assert largest < module.base_layer.down_proj.numel()


def saved_tensors(function: Any, known: list[torch.Tensor]) -> list[torch.Tensor]:
    """What autograd saves that is no view of ``known``."""
    storages = {t.untyped_storage().data_ptr() for t in known}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = function()
    assert y.requires_grad
    return [t for t in saved if t.untyped_storage().data_ptr() not in storages]


def test_hooks_of_a_fused_stack_run():
    module, called = experts_of(own(build("qwen3_moe"), True)), []
    module.down_proj.register_forward_hook(lambda *args: called.append(1))
    module(*routing())
    assert called == [1]
    assert module.fuse_experts() == "'down_proj' has hooks, which would not run"


@pytest.mark.parametrize("fuse", [False, True])
def test_copied_checkpointed_and_compiled(fuse):
    module = experts_of(own(build("qwen3_moe"), fuse, lora_dropout=0.1))
    given = routing()

    def run(call: Any) -> list[torch.Tensor]:
        torch.manual_seed(2)
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in given]
        y = call(*leaves)
        # Not autograd.grad, which reentrant checkpointing refuses.
        y.square().sum().backward()
        return [y, leaves[0].grad, leaves[2].grad]  # type: ignore[list-item]

    expected = run(module.train())
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    ways = [
        copied,
        lambda *args: checkpoint(copied, *args, use_reentrant=False),
        lambda *args: checkpoint(copied, *args, use_reentrant=True),
    ]
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


def adapted(library: str, fuse: bool) -> Any:
    """A model with LoRA on its experts, and a router that trains."""
    if library == "ours":
        model = own(build("qwen3_moe"), fuse)
    else:
        model = with_lora(build("qwen3_moe"))
        slk.accelerate_peft(model, fuse_mlp=fuse)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.requires_grad_()
    return model


def train_sharded(
    rank: int, world: int, directory: Any, library: str, fuse: bool
) -> dict[str, torch.Tensor]:
    model = adapted(library, fuse)
    if world > 1:
        for layer in model.get_submodule(
            "model.layers" if library == "ours" else "base_model.model.model.layers"
        ):
            fully_shard(layer)
        fully_shard(model)
        # Sharded, it is accelerated still.
        assert library == "ours" or not slk.accelerate_peft(model, fuse_mlp=fuse).skipped
    trained = train(model, rank, world, fuse)
    return {name: gather(p) for name, p in trained.items()}


def train(model: Any, rank: int, world: int, fuse: bool) -> dict[str, torch.Tensor]:
    """What trains, after two steps on this process's rows."""
    calls = []
    op = fused_experts.lora_experts_mlp_op
    fused_experts.lora_experts_mlp_op = lambda *args: calls.append(1) or op(*args)  # type: ignore[func-returns-value]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = IDS.repeat(2, 1)[rank * 4 // world : (rank + 1) * 4 // world]
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    fused_experts.lora_experts_mlp_op = op
    assert len(calls) == 2 * fuse
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@needs_gloo
@pytest.mark.covering(1)
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("library", ["ours", "PEFT"])
def test_fully_shard(library, fuse, tmp_path):
    alone = train_sharded(0, 1, tmp_path, library, fuse)
    for trained in spawn(train_sharded, 2, tmp_path, library, fuse):
        assert trained.keys() == alone.keys() and len(alone) == 5
        for name, value in trained.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)


def train_in_ddp(
    rank: int, world: int, directory: Any, library: str, fuse: bool
) -> dict[str, torch.Tensor]:
    model = adapted(library, fuse)
    if world > 1:
        model = DistributedDataParallel(model)
    trained = train(model, rank, world, fuse)
    return {name.removeprefix("module."): p.detach() for name, p in trained.items()}


@needs_gloo
@pytest.mark.parametrize("library", ["ours", "PEFT"])
def test_fused_in_ddp(library, tmp_path):
    alone = train_in_ddp(0, 1, tmp_path, library, True)
    for trained in spawn(train_in_ddp, 2, tmp_path, library, True):
        assert trained.keys() == alone.keys() and len(alone) == 5
        for name, value in trained.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)
