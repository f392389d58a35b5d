"""fuse_mlp on our layers and PEFT's: results against the same models without it, and which layers it reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.nn.fused_mlp import ATTRIBUTE, GatedMLP, fuse_mlps
from stablelora_kernels.nn.mlp_operands import OWN_LAYERS
from stablelora_kernels.testing import EPS, fp8_weight, nf4_weight
from tests.helpers.gated_mlps import (
    FAMILIES,
    INNER,
    LIBRARIES,
    MLP,
    TARGETS,
    WIDTH,
    Stacked,
    Wrapper,
    assert_same,
    count_calls,
    family,
    pair,
    rows,
    step,
    with_lora,
    with_peft,
)
from tests.helpers.oracle import bytes_held
from tests.helpers.quantized_weights import Linear4bit, bnb_4bit, conv1d, fp8_linear, torchao_int8

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*get_apply_tensor_subclass.*", "ignore:.*4-bit linear.*", "ignore:.*lora_bias.*"
)
by_library = pytest.mark.parametrize("library", LIBRARIES)


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


SOME = ["llama", "gemma2", "phi3", "qwen2_moe"]


@pytest.mark.parametrize(
    ("library", "model_type"),
    [(library, name) for library in LIBRARIES for name in SOME]
    + [pytest.param("ours", name, marks=pytest.mark.nightly) for name in FAMILIES if name not in SOME],
)
def test_families_train_as_without(library, model_type, calls):
    model, report = LIBRARIES[library](family(model_type), dropout=0.2)
    count, activation = FAMILIES[model_type], "gelu_tanh" if model_type.startswith("gemma") else "silu"
    assert len(report.mlps) == count and all(mlp.reason is None for mlp in report.mlps), report
    assert f"computed in one op each: {count} x gated MLP ({activation})" in report.notes
    found = step(model)
    assert calls == [activation] * count
    plain, other = LIBRARIES[library](family(model_type), False, 0.2)
    assert other.mlps == () and not any("one op" in note for note in other.notes)
    assert_same(found, step(plain))
    assert len(calls) == count
    if library == "PEFT":
        # Without dropout, whose masks differ, PEFT's own.
        model.eval(), plain.eval()
        slk.restore_peft(plain)
        assert_same(step(model), step(plain))


def of_conv1d():
    """GPT-2's layers, which hold W transposed."""
    module = MLP()
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(module, name)
        setattr(module, name, conv1d(linear.out_features, linear.in_features))
    return module


MAKERS = {
    "as in Llama": MLP,
    "biases": lambda: MLP(bias=True),
    "exact GELU": lambda: MLP(nn.GELU()),
    "Conv1D": of_conv1d,
    "stacked": Stacked,
    "stacked, up first": lambda: Stacked(up_first=True),
}
# PEFT's layers call a Conv1D for its product.
MADE = [("ours", name) for name in MAKERS] + [("PEFT", name) for name in MAKERS if name != "Conv1D"]


@pytest.mark.covering(1)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("library", "make"), MADE)
def test_on_both_backends(library, make, dropout, backend, calls):
    dtype, tolerance = (FP32, 1e-4) if backend == "triton" else (FP64, 1e-10)
    model, plain = (each.to(dtype) for each in pair(MAKERS[make], library, dropout=dropout))
    # In a first layer whose attention has no adapter, x needs no gradient.
    for x in (rows(dtype), rows(dtype).detach()):
        calls.clear()
        found = step(model, x)
        assert len(calls) == 1 and ("x" in found) == x.requires_grad
        assert_same(found, step(plain, x), tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_x_gate_and_up(dropout):
    """And S of rank 3, and the state of torch's generator: less than half of what separate layers keep."""
    x, kept = torch.randn(200, 64, requires_grad=True), {}
    for fuse in (True, False):
        model, _ = with_lora(MLP(width=64, inner=160), fuse, dropout)
        kept[fuse] = bytes_held(lambda model=model: model["mlp"](x), model.parameters())
    needed, state = 4 * 200 * (64 + 2 * 160 + 3 * 3), torch.get_rng_state().nbytes
    assert kept[True] <= needed + (3 * state if dropout else 0) < 0.8 * kept[False]


@by_library
@pytest.mark.parametrize("targets", [["gate_proj"], ["up_proj", "down_proj"], ["down_proj"], ["gate_proj", "up_proj"]])
def test_a_projection_without_an_adapter_loses_its_branch_only(targets, library, calls):
    model, plain = pair(MLP, library, dropout=0.2, targets=targets)
    assert_same(step(model), step(plain))
    assert calls == ["silu"]


def test_other_arguments(calls):
    """By keyword; no rows, one row; and what the forward does not take is its own error."""
    model, plain = pair(MLP)
    mlp, own = model["mlp"], plain["mlp"]
    for x in (rows(), rows()[:0], rows()[0], rows()[0, 0], rows()[:, :1].expand(2, 40, WIDTH)):
        torch.testing.assert_close(mlp(x=x), own(x))
    assert len(calls) == 5
    for bad in ({"y": rows()}, {"x": rows(), "y": 1}, {}):
        with pytest.raises(TypeError, match="argument"):
            mlp(**bad)
    assert len(calls) == 5


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BASES = {
    "nf4": lambda linear: Linear4bit(nf4_weight(64, 64, 64, nested=True), True, None),
    "nf4 computing in bfloat16": lambda linear: Linear4bit(nf4_weight(64, 64, 64, nested=True), True, BF16),
    "fp8": lambda linear: fp8_linear(fp8_weight(64, 64), BF16),
    "bitsandbytes": bnb_4bit,
}


@pytest.mark.parametrize(
    ("library", "kind"), [("ours", kind) for kind in (*BASES, "nf4 and plain")] + [("PEFT", "bitsandbytes")]
)
def test_quantized_weights(library, kind, backend, calls):
    """PEFT's layers are read by Triton's kernels alone; on PyTorch's operators the base layer computes its product."""
    dtype = BF16 if kind in ("fp8", "nf4 and plain") else FP32
    models, x = [], torch.randn(70, 64).to(dtype)
    for fuse in (True, False):
        torch.manual_seed(0)
        module = MLP(width=64, inner=64).to(dtype)
        for name in PROJECTIONS[: 2 if kind == "nf4 and plain" else 3]:
            setattr(module, name, BASES[kind.partition(" and")[0]](getattr(module, name)))
        module.is_loaded_in_4bit = kind == "bitsandbytes"
        options = {"dtype": FP32} if library == "PEFT" else {}
        model, report = LIBRARIES[library](module, fuse, **options)
        read = library == "ours" or backend == "triton"
        if fuse and not read:
            reason = "'gate_proj' has a quantized weight, and without Triton its Linear4bit computes the product"
            assert report.mlps[0].reason == reason
        # Its first call may choose how it computes.
        with torch.no_grad():
            model(x)
        models.append(model)
    calls.clear()
    found, expected = (step(model, x.clone().requires_grad_()) for model in models)
    # A layer that computes in another dtype than its input's casts twice, which one op does not.
    assert calls == (["silu"] if read and kind != "nf4 computing in bfloat16" else [])
    assert_same(found, expected, 16 * EPS[dtype])


@pytest.mark.parametrize(
    ("library", "dtype", "autocast", "lora_dtype"),
    [("ours", *case) for case in ((FP32, True, FP32), (BF16, True, BF16), (BF16, False, FP32), (BF16, False, BF16))]
    + [("PEFT", FP32, True, FP32), ("PEFT", BF16, False, FP32)],
)
def test_autocast_and_low_precision(library, dtype, autocast, lora_dtype, calls):
    results = []
    for fuse in (True, False):
        torch.manual_seed(0)
        model, _ = LIBRARIES[library](MLP(bias=True).to(dtype), fuse, 0.2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(lora_dtype)
        with torch.autocast("cpu", BF16, enabled=autocast):
            results.append(step(model, rows(dtype)))
    assert results[0]["y"].dtype == BF16 and calls == ["silu"]
    assert_same(*results, 8 * EPS[BF16])


# Which layers.


def four_bit(n, k, block):
    return Linear4bit(nf4_weight(n, k, block, nested=False), False, FP32)


def with_layer(name, layer, make=MLP):
    module = make()
    setattr(module, name, layer)
    return module


def int8(make=MLP):
    module = make().to(BF16)
    module.up_proj = torchao_int8(module.up_proj)
    return module


class Linear(nn.Linear):
    pass


DORA = "'gate_proj' runs PEFT's own forward: adapter 'default' is a variant of LoRA (DoraLinearVariant)"
NOT_READ = {
    "int8": ("ours", int8, {}, "'up_proj' calls its base layer, a Linear with a "),
    "int8 in PEFT": ("PEFT", int8, {"dtype": FP32}, "'up_proj' calls its base layer, a Linear with a "),
    "stacked in 4 bits": (
        "ours", lambda: with_layer("gate_up_proj", four_bit(2 * INNER, WIDTH, 64), lambda: Stacked(bias=False)), {},
        "'gate_up_proj' holds gate and up stacked in a quantized weight, which is not cut in two",
    ),
    "4 bits without an adapter": (
        "ours", lambda: with_layer("down_proj", four_bit(WIDTH, INNER, 8)), {"targets": ["gate_proj"]},
        "'down_proj' is a Linear4bit without an adapter whose weight is not plain",
    ),
    "a subclass in PEFT": (
        "PEFT", lambda: with_layer("down_proj", Linear(INNER, WIDTH, False)), {"targets": ["gate_proj"], "dtype": FP32},
        "'down_proj' calls its base layer, a Linear, for its product",
    ),
    "DoRA": ("PEFT", MLP, {"use_dora": True, "dtype": FP32}, DORA),
    "a bias in B": (
        "PEFT", MLP, {"lora_bias": True, "dtype": FP32}, "'gate_proj' has a bias in lora_B of adapter 'default', which trains",
    ),
    "biases that train": (
        "PEFT", lambda: MLP(bias=True), {"bias": "all", "dtype": FP32}, "'gate_proj' has a bias that trains; the op would keep",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("library", "make", "options", "reason"), NOT_READ.values(), ids=NOT_READ)
def test_layers_that_are_not_read(library, make, options, reason, calls):
    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        models.append(LIBRARIES[library](make(), fuse, **options))
    (model, report), (plain, _) = models
    assert report.mlps[0].reason.startswith(reason)
    x = rows(BF16 if make is int8 else FP32)
    found, expected = step(model, x), step(plain, x)
    assert calls == [] and all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_of_other_classes(calls):
    """An unknown layer may do anything; IA3's are told to be projections that cannot be read."""

    class Other(slk.LoRALinear):
        pass

    model, _ = with_lora(MLP())
    model["mlp"].up_proj.__class__ = Other
    (mlp,) = fuse_mlps(model, OWN_LAYERS)
    assert mlp.reason == "'up_proj' is a Other, which computes more than one product"
    model["mlp"](rows(FP32))
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    ia3 = peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[])
    model = peft.get_peft_model(Wrapper({"mlp": MLP()}), ia3)
    _, report = with_peft(model.base_model.model, targets=["gate_proj"], dtype=FP32)
    assert [mlp.reason for mlp in report.mlps] == ["'up_proj' runs PEFT's own forward: it is a Linear"]
    assert calls == []


def test_the_report_groups_and_lists():
    class Clamped(MLP):
        def forward(self, x):
            return super().forward(x.clamp(-1, 1))

    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            return self.o_proj(self.q_proj(x) + self.v_proj(x))

    model = nn.Sequential(MLP(), MLP(nn.GELU()), Clamped(), MLP(nn.ReLU()), Clamped(), Unlike(), MLP())
    report = slk.apply_lora(model, slk.LoRAConfig(target_modules=TARGETS), fuse_mlp=True)
    clamp, relu = "it calls clamp", "it calls 'act_fn', a ReLU; only SiLU and GELU (exact or tanh) are fused"
    assert report.mlps == (
        GatedMLP("0", "silu"), GatedMLP("1", "gelu"), GatedMLP("2", None, clamp), GatedMLP("3", None, relu),
        GatedMLP("4", None, clamp), GatedMLP("6", "silu"),
    )  # fmt: skip
    assert report.notes[-3:] == (
        "computed in one op each: 2 x gated MLP (silu); 1 x gated MLP (gelu)",
        f"not in one op: 2, 4: {clamp}",
        f"not in one op: 3: {relu}",
    )
    report = slk.apply_lora(nn.Sequential(nn.Linear(2, 2)), slk.LoRAConfig(target_modules=["0"]), fuse_mlp=True)
    assert report.notes[-1] == "fuse_mlp found no gated MLP with LoRA" and report.mlps == ()


def test_a_class_that_cannot_have_a_subclass():
    class Final(MLP):
        def __init_subclass__(cls, **kwargs):
            raise TypeError("Final is final")

    module = Final()
    _, report = with_lora(module)
    assert report.mlps[0].reason == "its class Final can't have a subclass (Final is final)"
    assert type(module) is Final and ATTRIBUTE not in module.__dict__
