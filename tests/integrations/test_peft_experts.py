"""accelerate_peft on stacks of experts, against PEFT's own forward."""

from __future__ import annotations

import copy
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from benchmarks.common.memory import saved_for_backward
from stablelora_kernels.integrations.peft import experts as peft_experts
from stablelora_kernels.integrations.peft import faults as peft_faults
from stablelora_kernels.nn import experts, fused_experts
from stablelora_kernels.nn.take_over import give_back, take_over
from stablelora_kernels.testing.cases import BF16, FP32
from stablelora_kernels.utils.refusal import Refusal
from tests.helpers.moe_models import (
    BY_DAY,
    FAMILIES,
    IDS,
    E,
    H,
    assert_copies_and_compiles,
    build,
    peft,
    results,
    routing,
    transformers,
    with_lora,
)
from tests.helpers.packed_stacks import in_4_bits
from tests.helpers.peft_models import make
from tests.helpers.quantized_weights import compressed_tensors
from tests.helpers.small_models import unpickled

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[int]]:
    """The number of rows of each call of lora_experts."""
    rows: list[int] = []

    def counted(x, *args, **kwargs):
        rows.append(len(x))
        return op(x, *args, **kwargs)

    op = experts.lora_experts
    monkeypatch.setattr(experts, "lora_experts", counted)
    return rows


@pytest.fixture
def nodes(monkeypatch) -> Iterator[list[int]]:
    """The number of slots of each call of fuse_mlp's op."""
    slots: list[int] = []

    def counted(x, routing, *args):
        slots.append(routing.slots)
        return op(x, routing, *args)

    op = fused_experts.lora_experts_mlp_op
    monkeypatch.setattr(fused_experts, "lora_experts_mlp_op", counted)
    return slots


def assert_close(found, expected, rtol=1e-12):
    assert found.keys() == expected.keys() and len(found) > 1
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        atol = rtol * expected[name].abs().max().item()
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in BY_DAY else pytest.mark.nightly)
        for name in FAMILIES
        if name != "jetmoe"
    ],
)
def test_output_and_gradients_are_pefts(family, calls):
    model = with_lora(build(family), rank_pattern={"experts.down_proj": 6})
    expected = results(model)
    assert not calls
    report = slk.accelerate_peft(model, strict=True)
    rows = {
        (row.name.rpartition(".")[2], row.r, row.experts, row.adapter) for row in report.replaced
    }
    up = "up_proj" if family == "nemotron_h" else "gate_up_proj"
    assert rows == {(up, 3, E, "default"), ("down_proj", 6, E, "default")}
    # Nemotron's norms cast to float32.
    assert_close(results(model), expected, 1e-6 if family == "nemotron_h" else 1e-12)
    count = IDS.numel() * {"llama4_text": E}.get(family, 2)
    assert calls == [count] * 2
    slk.restore_peft(model)
    assert {type(m) for m in model.modules() if isinstance(m, peft_experts.ParamWrapper)} == {
        peft_experts.ParamWrapper
    }
    assert_close(results(model), expected, 0)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in BY_DAY else pytest.mark.nightly)
        for name in FAMILIES
        if name != "jetmoe"
    ],
)
def test_fused_output_and_gradients_are_pefts(family, calls, nodes):
    model = with_lora(build(family), rank_pattern={"experts.down_proj": 6})
    for name, parameter in model.named_parameters():
        if name.endswith(("router.weight", "gate.weight", "router.layer.weight")):
            parameter.requires_grad_()
    expected = results(model)
    assert len(expected) > 5 or family == "hunyuan_v1_moe"
    # Of Llama 4's experts strict refuses fuse_mlp, which computes nothing in one op.
    report = slk.accelerate_peft(model, strict=family != "llama4_text", fuse_mlp=True)
    (mlp,) = (mlp for mlp in report.mlps if mlp.experts)
    assert not report.skipped and mlp.experts == E and mlp.name.endswith("experts")
    # Nemotron's norms cast to float32.
    assert_close(results(model), expected, 1e-6 if family == "nemotron_h" else 1e-12)
    if family == "llama4_text":
        assert mlp.reason == "Llama4TextExperts is called without routing weights"
        assert (len(calls), nodes) == (2, [])
        return
    assert mlp.reason is None and (calls, nodes) == ([], [IDS.numel() * 2])
    report = slk.accelerate_peft(model, tile_mlp=5)
    assert any(f"MLP of {E} experts in tiles" in note for note in report.notes)
    assert_close(results(model), expected, 1e-6 if family == "nemotron_h" else 1e-12)
    assert (calls, nodes.pop()) == ([], IDS.numel() * 2)
    slk.accelerate_peft(model, fuse_mlp=False)
    assert_close(results(model), expected, 1e-6 if family == "nemotron_h" else 1e-12)
    assert (len(calls), len(nodes)) == (2, 1)
    slk.accelerate_peft(model, fuse_mlp=True)
    slk.restore_peft(model)
    assert_close(results(model), expected, 0)
    plain = {*vars(with_lora(build(family)))}
    assert {*vars(model)} == plain and (len(calls), len(nodes)) == (2, 1)


def of_module(module, x, index, weights):
    """The output of a module of experts, and the gradients of all that trains."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    weights = weights.detach().clone().requires_grad_()
    y = module(x, index, weights)
    (y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    named = module.named_parameters()
    trained = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return {"Y": y.detach(), "dx": x.grad, "dw": weights.grad} | trained


def test_fused_relu2_without_a_gate_in_float64(nodes):
    """Nemotron's experts without its norms."""
    module = experts_of("nemotron_h")
    expected = of_module(module, *routing())
    module.fuse_experts(tiled=False)
    assert_close(of_module(module, *routing()), expected, 1e-12)
    assert nodes == [18] and len(expected) == 7


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_further_from_float64_than_peft(implementation, dtype, calls):
    model = with_lora(build("qwen3_moe", implementation, dtype)).model.model.layers[0].mlp.experts
    exact = copy.deepcopy(model).double()
    exact.get_base_layer().config._experts_implementation = "eager"
    x = torch.randn(20, H, dtype=dtype)
    index, weights = torch.arange(40).view(20, 2) % 3, torch.rand(20, 2).to(dtype)

    def run(module, x, weights):
        module.zero_grad()
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = module(x, index, weights)
        y.backward(torch.ones_like(y))
        named = module.named_parameters()
        return {"Y": y, "dx": x.grad, "dw": weights.grad} | {
            n: p.grad for n, p in named if p.grad is not None
        }

    wanted, own = run(exact, x.double(), weights.double()), run(model, x, weights)
    take_over(model, peft_experts.AcceleratedExperts)
    found = run(model, x, weights)
    assert calls == [40, 40] and found.keys() == own.keys() == wanted.keys()
    for name, value in found.items():
        ref = wanted[name]
        error, allowed = ((t.double() - ref).abs().max().item() for t in (value, own[name]))
        unit = torch.finfo(value.dtype).eps * ref.abs().max().item()
        assert value.dtype == own[name].dtype and error <= 2 * allowed + 2 * unit, name


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_fused_no_further_from_float64_than_peft(dtype, nodes):
    """By the root of the mean square of twelve draws. The routing weight rounds a gradient of I
    elements, which PEFT rounds as one of H.
    """
    module = with_lora(build("qwen3_moe", "grouped_mm", dtype)).model.model.layers[0].mlp.experts
    exact = copy.deepcopy(module).double()
    exact.get_base_layer().config._experts_implementation = "eager"
    take_over(module, peft_experts.AcceleratedExperts)
    squares: dict[str, list[float]] = {}
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20, H, generator=generator).to(dtype)
        index = torch.arange(40).view(20, 2) % 3
        weights = torch.rand(20, 2, generator=generator).to(dtype)
        wanted = of_module(exact, x.double(), index, weights.double())
        module.unfuse_experts()
        give_back(module, peft_experts.AcceleratedExperts)
        pefts = of_module(module, x, index, weights)
        take_over(module, peft_experts.AcceleratedExperts)
        module.fuse_experts(tiled=False)
        fused = of_module(module, x, index, weights)
        assert fused.keys() == pefts.keys() == wanted.keys()
        for name, value in fused.items():
            errors = (value.double() - wanted[name], pefts[name].double() - wanted[name])
            assert value.dtype == pefts[name].dtype
            known = squares.setdefault(name, [0.0, 0.0])
            known[:] = [a + e.square().sum().item() for a, e in zip(known, errors, strict=True)]
    assert len(nodes) == 12 and len(squares) == 7
    for name, (ours, theirs) in squares.items():
        assert ours <= 1.3**2 * theirs, (name, (ours / theirs) ** 0.5)


def story(model: Any, place: Any) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """What PEFT does with a model and its adapters: each result, and whether this library's op
    computes it.
    """
    yield results(model), True
    with model.disable_adapter():
        yield results(model), False
    model.merge_adapter()
    yield results(model), False
    model.unmerge_adapter()
    yield results(model), True
    torch.manual_seed(1)
    first = model.peft_config["default"]
    model.add_adapter(
        "late", peft.LoraConfig(r=5, target_modules=[], target_parameters=first.target_parameters)
    )
    model.set_adapter("late")
    yield results(model), True
    model.save_pretrained(place)
    model.delete_adapter("late")
    model.set_adapter("default")
    yield results(model), True
    model.load_adapter(place / "late", "back")
    model.set_adapter("back")
    yield results(model), True
    model.base_model.set_adapter(["back", "default"])
    yield results(model), False
    model.set_adapter("default")
    yield results(copy.deepcopy(model)), True
    yield results(unpickled(model)), True
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    yield results(model), True
    model.gradient_checkpointing_disable()
    yield results(model.merge_and_unload()), False


@pytest.mark.parametrize("fuse", [{}, {"fuse_mlp": True}, {"tile_mlp": 5}], ids=str)
def test_switched_disabled_merged_copied_and_unloaded(fuse, calls, nodes, tmp_path):
    plain, fast = (with_lora(build("qwen3_moe")) for _ in range(2))
    slk.accelerate_peft(fast, strict=True, **fuse)
    told = story(fast, tmp_path / "fast")
    for expected, _ in story(plain, tmp_path / "plain"):
        calls.clear()
        nodes.clear()
        found, is_ours = next(told)
        assert bool(nodes if fuse else calls) == is_ours and not (calls if fuse else nodes)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(
                value, expected[name], rtol=0, atol=1e-12 * expected[name].abs().max().item()
            )
    for path in tmp_path.glob("plain/**/*.safetensors"):
        assert (
            tmp_path / "fast" / path.relative_to(tmp_path / "plain")
        ).read_bytes() == path.read_bytes()


def experts_of(family: str = "qwen3_moe", fuse: bool = False, **options: Any) -> Any:
    """An accelerated stack of experts alone."""
    model = with_lora(build(family), **options)
    slk.accelerate_peft(model, fuse_mlp=fuse)
    (found,) = (m for m in model.modules() if isinstance(m, peft_experts.AcceleratedExperts))
    return found


@pytest.mark.parametrize("fuse", [False, True])
def test_one_parameter_alone_and_slots_of_other_processes(fuse, calls, nodes):
    for parameter in ("gate_up_proj", "down_proj"):
        experts = experts_of(fuse=fuse, target_parameters=[f"mlp.experts.{parameter}"])
        x, index, weights = routing()
        # Under expert parallelism, experts of other processes have the number behind the last one,
        # and a weight of zero.
        index[::3, 1], weights = E, weights * (index < E)
        base = experts.get_base_layer()
        base._is_expert_parallel = True
        y = experts(x, index, weights)
        found = torch.autograd.grad(y.square().sum(), [x, weights])
        assert (calls, nodes) == (([], [18]) if fuse else ([18, 18], []))
        calls.clear()
        nodes.clear()
        expected = peft_experts.ParamWrapper.forward(experts, x, index, weights)
        grads = torch.autograd.grad(expected.square().sum(), [x, weights])
        assert not calls
        for a, b in zip((y, *found), (expected, *grads), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("family", BY_DAY)
def test_no_tokens(family, fuse):
    """A process of several may get none: transformers' module returns [0, H]."""
    module = experts_of(family, fuse)
    x, index, weights = (t[:0].detach().requires_grad_(t.is_floating_point()) for t in routing())
    y = module(x) if family == "llama4_text" else module(x, index, weights)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    trained = [p for p in module.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


ALONE = {
    "its gate_up_proj is disabled": lambda wrapper: wrapper.base_layer.enable_adapters(False),
    "its down_proj is disabled": lambda wrapper: wrapper.enable_adapters(False),
    "its gate_up_proj is merged": lambda wrapper: wrapper.base_layer.merge(),
    "its down_proj is merged": lambda wrapper: wrapper.merge(),
    "its down_proj has 0 active adapters": lambda wrapper: setattr(
        wrapper, "_active_adapter", ["another"]
    ),
}


@pytest.mark.parametrize(("reason", "change"), ALONE.items())
def test_a_call_with_one_adapter_of_two_is_pefts(reason, change, calls, nodes):
    fast, plain = experts_of(fuse=True), copy.deepcopy(experts_of())
    give_back(plain, peft_experts.AcceleratedExperts)
    for each in (fast, plain):
        change(each)
    assert peft_experts.read_stacks(fast, routing()[0]) == Refusal(reason)
    assert_close(of_module(fast, *routing()), of_module(plain, *routing()), 0)
    assert (calls, nodes) == ([], [])


@pytest.mark.parametrize("fuse", [False, True])
def test_float32_experts_under_autocast_are_pefts(fuse, calls, nodes):
    """Their copy in bfloat16 is one that PEFT makes anyway."""
    model = with_lora(build("qwen3_moe", dtype=FP32))
    slk.accelerate_peft(model, fuse_mlp=fuse)
    (experts,) = (m for m in model.modules() if isinstance(m, peft_experts.AcceleratedExperts))
    x, index, weights = (t.detach() for t in routing())
    with torch.autocast("cpu", BF16):
        y = experts(x.float(), index, weights.float())
    assert y.dtype == FP32 and (calls, nodes) == ([], [])


@pytest.mark.parametrize("fuse", [False, True])
def test_hooks_that_come_late_run(fuse, calls, nodes):
    experts = experts_of(fuse=fuse)
    wrappers = peft_experts.wrapped_parameters(experts)
    lora_A = wrappers["down_proj"].lora_A["default"]
    called: list[str] = []
    handles = [
        wrappers["gate_up_proj"].register_forward_hook(lambda *args: called.append("inner")),
        experts.get_base_layer().register_forward_hook(lambda *args: called.append("experts")),
    ]
    experts(*routing())
    assert called == ["experts", "inner"] and (calls, nodes) == ([], [])
    for handle in handles:
        handle.remove()
    handle = lora_A.register_forward_hook(nothing)
    experts(*routing())
    assert (calls, nodes) == ([], [])
    handle.remove()
    experts(*routing())
    assert (calls, nodes) == (([], [18]) if fuse else ([18, 18], []))


def test_fused_keeps_less_than_the_frozen_experts(nodes):
    """At 512 rows an expert, with A and B in float32: x and indices by tokens and slots, G and S."""
    tokens, wide, inner, count, top_k = 1024, 128, 64, 8, 4
    sizes = {"hidden_size": wide, "moe_intermediate_size": inner}
    config = transformers.Qwen3MoeConfig(num_experts=count, **sizes)
    config._experts_implementation = "grouped_mm"
    kind = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    block = nn.ModuleDict({"experts": kind.Qwen3MoeExperts(config).to(BF16)})
    for p in block.parameters():
        p.data.normal_(0, 0.1)
        p.requires_grad_(False)
    index = torch.arange(tokens * top_k).view(tokens, top_k) % count
    x = torch.randn(tokens, wide).to(BF16).requires_grad_()
    given = (x, index, torch.rand(tokens, top_k).to(BF16).requires_grad_())

    def kept() -> int:
        """The bytes of what autograd keeps and that is no parameter's."""
        module = block["experts"]
        return saved_for_backward(lambda: module(*given), [*module.parameters()])

    frozen = kept()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    block = with_lora(block, r=4, target_parameters=names).base_model.model
    for name, p in block.named_parameters():
        p.data = p.data.float() if "lora_" in name else p.data
    slk.accelerate_peft(block, strict=True, fuse_mlp=False)
    two_ops = kept()
    slk.accelerate_peft(block, strict=True, fuse_mlp=True)
    fused = kept()
    slots = top_k * tokens
    indices = 8 * slots + 4 * count
    routing_weights = 2 * slots
    of_tensors = 2 * (tokens * wide + slots * (2 * inner + 4))
    assert fused == of_tensors + indices + routing_weights
    assert fused <= 0.6 * frozen < two_ops and len(nodes) == 1


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=len)
def test_autocast(names, fuse, calls, nodes):
    """As transformers does, the experts cast their input to their weights' dtype; float32 adapters
    are cast on the fly.
    """
    targets = [f"mlp.experts.{name}" for name in names]
    model = with_lora(build("qwen3_moe", "grouped_mm", BF16), target_parameters=targets)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    slk.accelerate_peft(model, fuse_mlp=fuse)
    (experts,) = (m for m in model.modules() if isinstance(m, peft_experts.AcceleratedExperts))
    x, index, weights = (t.detach() for t in routing())
    with torch.autocast("cpu", BF16):
        y = experts(x.float(), index, weights.float())
    assert y.dtype == FP32 and (calls, nodes) == (([], [18]) if fuse else ([18, 18], []))
    y.sum().backward()
    grads = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    assert (
        {p.dtype for p in grads.values()} == {FP32}
        and len(grads) == 2 * len(names)
        and all(g.any() for g in grads.values())
    )


@pytest.mark.parametrize("fuse", [False, True])
def test_copied_and_compiled_without_a_graph_break(fuse):
    """A compiled graph takes two ops, fused or not."""
    assert_copies_and_compiles(experts_of(fuse=fuse), routing())


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant, fuse, calls, nodes):
    model = with_lora(build("qwen3_moe"))
    slk.accelerate_peft(model, fuse_mlp=fuse)
    model.enable_input_require_grads()
    model.train()
    expected = results(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_close(results(model), expected, 0)
    assert (len(calls), len(nodes)) == ((0, 3) if fuse else (6, 0))


class Scaled(nn.Module):
    """An activation with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x * self.scale)


def hook_activation(base):
    base.act_fn.register_forward_hook(nothing)


def train_activation(base):
    base.act_fn = Scaled()


def add_norm(base):
    base.has_post_expert_norm = True
    base.post_expert_norm = nn.LayerNorm(H, dtype=torch.float64).requires_grad_(False)


UNFUSED = {
    "its 'act_fn' has hooks, which would run once more": hook_activation,
    "its 'act_fn' has parameters that train": train_activation,
    "a norm comes between its experts and their routing weights": add_norm,
}


@pytest.mark.parametrize(("reason", "change"), UNFUSED.items())
def test_what_is_not_fused_is_named_and_takes_two_ops(reason, change, calls, nodes):
    model = with_lora(build("qwen3_moe", "batched_mm"))
    (path,) = (name for name, _ in model.named_modules() if name.endswith("mlp.experts"))
    wrapper = model.get_submodule(path)
    slk.accelerate_peft(model, fuse_mlp=True)
    # A call looks again.
    change(wrapper.get_base_layer())
    late = results(model)
    assert (len(calls), nodes) == (2, [])
    refused = re.escape(f"strict=True, but fuse_mlp computes no MLP in one op: {path}: {reason}")
    with pytest.raises(ValueError, match=refused):
        slk.accelerate_peft(model, strict=True, fuse_mlp=True)
    report = slk.accelerate_peft(model, fuse_mlp=True)
    (mlp,) = report.mlps
    assert not report.skipped and mlp.name == path
    assert (mlp.reason, mlp.experts, mlp.activation) == (reason, E, None)
    assert f"not in one op: {mlp.name}: {reason}" in report.notes
    found = results(model)
    assert (len(calls), nodes) == (4, [])
    slk.restore_peft(model)
    expected = results(model)
    assert_close(found, expected)
    assert_close(late, expected)
    if change is train_activation:
        assert any("act_fn" in name for name in expected)


def test_an_activation_whose_forward_the_kernels_library_bound_is_fused(calls, nodes):
    """As transformers 5.25 does for each model that it loads, where it has no other kernel."""
    model = with_lora(build("qwen3_moe", "batched_mm"))
    expected = results(model)
    (act_fn,) = (module for name, module in model.named_modules() if name.endswith("act_fn"))
    act_fn.forward = MethodType(type(act_fn).forward, act_fn)
    assert all(mlp.reason is None for mlp in slk.accelerate_peft(model, fuse_mlp=True).mlps)
    assert_close(results(model), expected)
    assert (len(calls), len(nodes)) == (0, 1)


def test_the_report_says_what_is_fused():
    model = with_lora(build("qwen2_moe"), target_modules="all-linear")
    notes = slk.accelerate_peft(model, fuse_mlp=True).notes
    assert "computed in one op each: 1 x MLP of 4 experts; 1 x gated MLP (silu)" in notes
    assert slk.accelerate_peft(model, fuse_mlp=False).mlps == ()


def test_global_hooks_and_an_x_of_another_type_take_two_ops(calls, nodes):
    experts = experts_of(fuse=True)
    given = routing()
    handle = nn.modules.module.register_module_forward_hook(nothing)
    try:
        experts(*given)
    finally:
        handle.remove()
    # PEFT computes it, since global hooks must see every module.
    assert (calls, nodes) == ([], [])
    experts(nn.Parameter(given[0].detach()), *given[1:])
    assert (calls, nodes) == ([18, 18], [])


def test_fused_experts_name_the_argument_that_does_not_fit():
    experts = experts_of(fuse=True)
    x, index, weights = routing()
    with pytest.raises(ValueError, match=r"x must be \[T, 32\] to fit weight .* got \[9, 31\]"):
        experts(x[:, 1:], index, weights)


def with_implementation(name):
    return lambda wrapper: setattr(wrapper.get_base_layer().config, "_experts_implementation", name)


def train_weight(wrapper):
    wrapper.get_base_layer().down_proj.requires_grad_()


def to_float8(wrapper):
    base = wrapper.get_base_layer()
    base.down_proj = nn.Parameter(base.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)


def nothing(*args):
    pass


def hook_lora_A(wrapper):
    peft_experts.wrapped_parameters(wrapper)["down_proj"].lora_A["default"].register_forward_hook(
        nothing
    )


CHANGES = [
    ("its experts are computed by 'sonicmoe'", with_implementation("sonicmoe")),
    ("its down_proj trains", train_weight),
    # On the wrapper of the other parameter, and on the experts themselves.
    ("it holds a module with hooks", lambda w: w.base_layer.register_forward_hook(nothing)),
    ("it holds a module with hooks", lambda w: w.get_base_layer().register_forward_hook(nothing)),
    ("its forward was replaced", lambda w: setattr(w, "forward", w.forward)),
    ("adapter 'default' of its down_proj is not of plain nn.Linears, or has hooks", hook_lora_A),
    ("its down_proj is of one expert", lambda w: setattr(w, "num_experts", 1)),
]


@pytest.mark.parametrize(("reason", "change"), CHANGES)
def test_what_is_not_understood_is_named_and_stays_pefts(reason, change, calls):
    model = with_lora(build("qwen3_moe"))
    (wrapper,) = (m for name, m in model.named_modules() if name.endswith("mlp.experts"))
    change(wrapper)
    report = slk.accelerate_peft(model)
    assert [(row.name, row.reason) for row in report.skipped] == [
        ("base_model.model.model.layers.0.mlp.experts", reason)
    ]
    assert not report.replaced
    assert type(wrapper).forward is peft_experts.ParamWrapper.forward
    with pytest.raises(
        ValueError, match=f"strict=True, but PEFT's own forward would go on computing .*{reason}"
    ):
        slk.accelerate_peft(model, strict=True)


def test_other_modules_are_named():
    report = slk.accelerate_peft(with_lora(build("jetmoe")))
    assert {row.reason for row in report.skipped} == {
        "JetMoeParallelExperts is not a stack of experts that lora_experts is known to fit"
    }
    # A bias is no stack of matrices.
    model = with_lora(
        build("gpt_oss"),
        target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj_bias"],
    )
    assert [row.reason for row in slk.accelerate_peft(model).skipped] == [
        "PEFT adapts its gate_up_proj_bias"
    ]
    # By PEFT's own rule, all linear layers include the experts, and the router as a parameter.
    model = build("qwen3_moe")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    report = slk.accelerate_peft(model)
    assert {row.name.rpartition(".")[2] for row in report.skipped} == {"gate"}
    with pytest.raises(ValueError, match=r'TopKRouter is not .*; "all-linear" adapts routers too'):
        slk.accelerate_peft(model, strict=True)
    assert (
        "  1 x down_proj: 4 experts of 48 -> 32, r 8, alpha 8, scaling 1, adapter 'default'"
        in str(report)
    )


def test_threads_may_share_a_model():
    """PEFT's own forward puts the adapters into the weights for the time of a call, so its threads
    break each other.
    """
    model = with_lora(build("qwen3_moe"))
    slk.accelerate_peft(model, strict=True)
    batches = [torch.randint(3, 17, (2, 7)) for _ in range(4)]

    def logits(batch):
        with torch.no_grad():
            return model(input_ids=batch).logits

    alone = [logits(batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            for found in [pool.submit(lambda: [*map(logits, batches)]) for _ in range(12)]:
                assert all(map(torch.equal, found.result(), alone))
    finally:
        sys.setswitchinterval(interval)


def quantized_q_proj(input_activations: bool) -> Any:
    """A small PEFT model whose first q_proj compressed-tensors has quantized."""
    model = make()
    compressed_tensors(model.base_model.model.layers[0].q_proj.base_layer, input_activations)
    return model


INTO_FLOAT8 = (
    "PEFT rounds down_proj with its branch to torch.float8_e4m3fn, without a scale, so its adapter trains nothing: "
    "base_model.model.model.layers.0.mlp.experts"
)


def test_what_peft_trains_wrongly_is_told():
    model = with_lora(build("qwen3_moe"))
    to_float8(next(m for m in model.modules() if isinstance(m, peft_experts.ParamWrapper)))
    wrong = "compressed-tensors quantizes the input without a gradient, .* wrong gradients: base_model.model.layers.0.q_proj$"
    for faulty, text in ((model, INTO_FLOAT8), (quantized_q_proj(True), wrong)):
        with pytest.raises(ValueError, match=f"strict=True, but {text}"):
            slk.accelerate_peft(faulty, strict=True)
        with pytest.warns(UserWarning, match=text):
            report = slk.accelerate_peft(faulty)
        assert len([note for note in report.notes if re.search(text, note)]) == 1
    assert [row.reason for row in slk.accelerate_peft(model).skipped] == [
        "its down_proj is a Parameter of torch.float8_e4m3fn"
    ]
    # Weights alone: all is well.
    for good in (quantized_q_proj(False), make(), with_lora(build("qwen3_moe"))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert slk.accelerate_peft(good, strict=True).notes == ()


@pytest.mark.parametrize(("family", "is_adapted"), [("gpt_oss", False), ("qwen3_moe", True)])
def test_experts_without_an_adapter_are_told(family, is_adapted):
    """PEFT's "all-linear" reaches those of some families alone."""
    model = peft.get_peft_model(build(family), peft.LoraConfig(target_modules="all-linear"))
    told = slk.accelerate_peft(model).notes
    if is_adapted:
        assert told == () and slk.accelerate_peft(with_lora(build(family))).notes == ()
        return
    (note,) = told
    sizes = {True: 0, False: 0}
    for name, p in model.named_parameters():
        sizes[name.endswith(("experts.gate_up_proj", "experts.down_proj"))] += p.numel()
    share = sizes[True] / sum(sizes.values())
    assert note == (
        "base_model.model.model.layers.0.mlp.experts: it stacks matrices in gate_up_proj, down_proj, as experts are stored, and "
        f"has no linear layers for them: {share:.1%} of the model's weights are in such parameters and get no adapter unless "
        "target_parameters names them"
    )
    # One of the two has an adapter.
    half = with_lora(build(family), target_parameters=["mlp.experts.down_proj"])
    (note,) = slk.accelerate_peft(half).notes
    assert note.startswith(
        "base_model.model.model.layers.0.mlp.experts: it stacks matrices in gate_up_proj, as experts"
    )


# By the adapted parameters: those whose adapter is lost, and whether PEFT nests them in another
# order than plain ones.
IN_4_BITS = {("gate_up_proj", "down_proj"): (("down_proj",), True), ("down_proj",): ((), False)}


@pytest.mark.parametrize(
    ("names", "lost", "reorders"), [(names, *rest) for names, rest in IN_4_BITS.items()], ids=str
)
# bitsandbytes would compile what dequantizes on a CPU, in seconds.
@torch.compiler.set_stance("force_eager")
def test_what_peft_does_wrong_with_experts_in_4_bits_is_told(names, lost, reorders):
    """If this fails with a new PEFT, that trains them right: the texts here, in experts.md and in
    errors.md say otherwise.
    """
    # The matrices are not whole blocks.
    model, plain = in_4_bits(build("qwen3_moe", dtype=FP32), blocksize=2048)
    # PEFT matches such parameters by their whole names alone.
    options = {"target_parameters": [f"model.layers.0.mlp.experts.{name}" for name in names]}
    model, plain = with_lora(model, **options), with_lora(plain, **options)
    expected = peft_faults.ParametrizedFaults(lost, repeats=True, remains=True, reorders=reorders)
    assert peft_faults.faults_of_parametrized(names, frozenset(names)) == expected
    before = model.state_dict()
    text = (
        r"^base_model.model.model.layers.0.mlp.experts: its \w+_proj does not fit lora_experts: an expert must be whole "
        r"blocks of 2048 elements, got \d+ x \d+ = \d+ elements, and PEFT [\d.]+ trains experts wrongly whose weights "
        rf"another parametrization computes: {expected}$"
    )
    for strict in (False, True):
        with pytest.raises(ValueError, match=text):
            slk.accelerate_peft(model, strict=strict)
    assert model.state_dict().keys() == before.keys()
    assert not any(isinstance(m, peft_experts.AcceleratedExperts) for m in model.modules())

    # That is what PEFT does with the model.
    adapters = [m for m in model.modules() if isinstance(m, peft_experts.ParamWrapper)]
    others = [m for m in plain.modules() if isinstance(m, peft_experts.ParamWrapper)]
    assert reorders == ([m.parameter_name for m in adapters] != [m.parameter_name for m in others])
    for name in names:
        one, other = (
            next(m for m in some if m.parameter_name == name) for some in (adapters, others)
        )
        other.load_state_dict(
            {key: p for key, p in one.state_dict().items() if key.startswith("lora_")}, strict=False
        )
    assert set(results(model)) - {"Y"} == {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and get_wrapper(model, name).parameter_name not in lost
    }
    with torch.no_grad():
        right = plain(input_ids=IDS).logits
        errors = [(model(input_ids=IDS).logits - right).abs().max().item() for _ in range(3)]
        assert 1e-3 < errors[1] < errors[2]
        with model.disable_adapter(), plain.disable_adapter():
            off = (model(input_ids=IDS).logits - plain(input_ids=IDS).logits).abs().max().item()
    assert off > 1e-3


def test_each_fault_but_another_order_is_wrong_training():
    faults = ({"lost": ("down_proj",)}, {"repeats": True}, {"remains": True}, {"reorders": True})
    wrong = [peft_faults.ParametrizedFaults(**fault).trains_wrongly for fault in faults]
    assert wrong == [True, True, True, False]


def test_nested_wrappers_are_told_of_once():
    names = ("gate_up_proj", "down_proj")
    outer = peft_faults._adapted(names, frozenset(names))
    wrappers = [("experts", outer), ("experts.base_layer", outer.base_layer)]
    (sentence,) = peft_faults.faults_of_wrappers(wrappers)
    assert "experts.base_layer" not in sentence


def test_experts_of_an_unknown_parametrization_are_warned_of():
    model = build("qwen3_moe", dtype=FP32)
    (experts,) = (m for m in model.modules() if hasattr(m, "gate_up_proj"))
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    model = with_lora(model, target_parameters=["model.layers.0.mlp.experts.down_proj"])
    text = "experts wrongly whose weights another parametrization computes: .*; accelerate_peft computes experts right in"
    with pytest.warns(UserWarning, match=text):
        report = slk.accelerate_peft(model)
    (skipped,) = report.skipped
    assert skipped.reason == "another parametrization changes its weights"
    with pytest.raises(ValueError, match=f"strict=True, but PEFT .* trains {text}"):
        slk.accelerate_peft(model, strict=True)


def get_wrapper(model, name):
    return model.get_submodule(name.partition(".lora_")[0])


def test_the_trial_of_experts_leaves_no_trace():
    peft_faults.faults_of_parametrized.cache_clear()
    before, names = torch.get_rng_state(), ("up_proj", "down_proj")
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", BF16):
        faults = peft_faults.faults_of_parametrized(names, frozenset(names))
    assert torch.equal(torch.get_rng_state(), before) and faults.lost == ("down_proj",)
    assert (
        peft_faults.faults_of_parametrized(names, frozenset()) == peft_faults.ParametrizedFaults()
    )


def test_one_latch_for_a_stack_is_told():
    model = with_lora(build("qwen3_moe"))
    optimizer = slk.StableLoRAAdamW.from_model(model)
    figures = optimizer.stability()
    assert copy.deepcopy(optimizer).stability() == figures
    assert [(pair.name.rpartition("mlp.")[2], pair.experts) for pair in figures] == [
        ("experts.base_layer.default", E), ("experts.default", E),
    ]  # fmt: skip
    assert [pair.experts for pair in slk.StableLoRAAdamW.from_model(make()).stability()] == [1] * 4
