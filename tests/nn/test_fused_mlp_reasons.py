"""What fuse_mlp leaves to the modules' own forwards and why: what the report says, and what each
call looks at.
"""

from __future__ import annotations

from functools import partial
from types import MethodType

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels import functional
from stablelora_kernels.activations import TITLES
from stablelora_kernels.testing import nf4_weight
from stablelora_kernels.utils.modules import is_hooked
from tests.helpers.gated_mlps import (
    INNER,
    MLP,
    TARGETS,
    WIDTH,
    Stacked,
    mlp_of,
    pair,
    reported_pair,
    rows,
    step,
)
from tests.helpers.quantized_weights import Linear4bit, torchao_int8

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*get_apply_tensor_subclass.*", "ignore:.*lora_bias.*"
)


def doubles(module, args, y):
    return y * 2


def base_layer(layer):
    return getattr(layer, "base_layer", layer)


def set_dropout(layer, p):
    if isinstance(layer.lora_dropout, float):
        layer.lora_dropout = p
    else:
        layer.lora_dropout["default"].p = p


def another_lora_dtype(mlp):
    mlp.to(BF16)
    for name in ("lora_A", "lora_B"):
        setattr(mlp.down_proj, name, nn.Parameter(getattr(mlp.down_proj, name).float()))


HOOKS = "has hooks, which would not run"
TRAINS = "that trains; the op would keep activations for its gradient"
REPLACED = "has a forward that was replaced (as accelerate's hooks do)"
FUSED = f"only {TITLES} are fused"
PEFTS_OWN = "runs PEFT's own forward: the"
# A change of a fused MLP, and the reason that the next report has. None: it finds it fused again.
CHANGES = {
    "merged": (lambda mlp: (mlp.eval(), mlp.up_proj.merge()), "'up_proj' is merged"),
    "a hook": (lambda mlp: mlp.down_proj.register_forward_hook(doubles), f"'down_proj' {HOOKS}"),
    "another dropout": (
        lambda mlp: set_dropout(mlp.up_proj, 0.4), "lora_dropout is 0.2 in 'gate_proj' and 0.4 in 'up_proj'",
    ),
    "a bias trains": (
        lambda mlp: base_layer(mlp.down_proj).bias.requires_grad_(True), f"'down_proj' has a bias {TRAINS}",
    ),
    "a weight trains": (
        lambda mlp: base_layer(mlp.gate_proj).weight.requires_grad_(True), f"'gate_proj' has a weight {TRAINS}",
    ),
    "the activation's hook": (
        lambda mlp: mlp.act_fn.register_full_backward_hook(lambda *args: None), f"'act_fn' {HOOKS}",
    ),
    "another forward": (lambda mlp: setattr(mlp.gate_proj, "forward", mlp.up_proj.forward), f"'gate_proj' {REPLACED}"),
    "another activation": (lambda mlp: setattr(mlp, "act_fn", nn.ReLU()), f"it calls 'act_fn', a ReLU; {FUSED}"),
    "another approximation": (lambda mlp: setattr(mlp.act_fn, "approximate", "tanh"), None),
    "another layer": (
        lambda mlp: setattr(mlp, "up_proj", nn.Sequential(mlp.up_proj)), f"it calls 'up_proj', a Sequential; {FUSED}",
    ),
}  # fmt: skip
OURS = {
    "one evaluates": (lambda mlp: mlp.up_proj.eval(), None),
    "another dtype of A and B": (
        another_lora_dtype, "the adapter's dtype is torch.bfloat16 in 'gate_proj' and torch.float32 in 'down_proj'",
    ),
}  # fmt: skip
PEFTS = {
    "disabled": (lambda mlp: mlp.up_proj.enable_adapters(False), "'up_proj' is disabled"),
    "the base layer's hook": (
        lambda mlp: mlp.down_proj.base_layer.register_forward_hook(doubles),
        "'down_proj' calls its base layer, a Linear, for its product",
    ),
    "the dropout's hook": (
        lambda mlp: mlp.down_proj.lora_dropout["default"].register_forward_hook(doubles),
        f"'down_proj' {PEFTS_OWN} dropout of adapter 'default' is a Dropout, or has hooks",
    ),
}
CASES = [("ours", name, *case) for name, case in (CHANGES | OURS).items()]
CASES += [("PEFT", name, *case) for name, case in (CHANGES | PEFTS).items()]


def reported(model):
    """The report's reason on an MLP that is fused, judged anew."""
    if hasattr(model, "get_base_model"):
        report = slk.accelerate_peft(model, fuse_mlp=True)
    else:
        # To the layers that are there it adds an adapter beside the MLP.
        model["more"] = nn.Linear(2, 2)
        report = slk.apply_lora(model, ["more"], fuse_mlp=True)
    (mlp,) = report.mlps
    assert mlp.reason is None or any(note.endswith(f"mlp: {mlp.reason}") for note in report.notes)
    return mlp.reason


@pytest.mark.parametrize(
    ("library", "name", "change", "reason"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_changes_turn_it_off_and_are_reported(library, name, change, reason, calls):
    """After it was fused: the next call is the module's own. Before: the report says why, and the
    calls are the same.
    """
    dtype = FP32 if change is another_lora_dtype else torch.float64
    models = [
        model.to(dtype) for model in pair(lambda: MLP(nn.GELU(), bias=True), library, dropout=0.2)
    ]
    step(models[0], rows(dtype))
    assert len(calls.mlps) == 1
    for model in models:
        change(mlp_of(model))
    dtype = BF16 if change is another_lora_dtype else dtype
    found, expected = (step(model, rows(dtype)) for model in models)
    assert len(calls.mlps) == 1
    assert found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in found
    )
    if library == "ours" and name.endswith("trains"):
        # The next apply_lora freezes it.
        return
    assert reported(models[0]) == reason
    if name != "one evaluates":
        step(models[0], rows(dtype))
        assert len(calls.mlps) == (2 if reason is None else 1)


def test_global_hooks_tracing_and_subclasses_see_every_module(calls):
    model, plain = pair(MLP)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append(type(module))
    )
    try:
        model(rows())
    finally:
        handle.remove()
    assert slk.LoRALinear in seen and nn.SiLU in seen

    class Subclass(torch.Tensor):
        pass

    for x in (rows().as_subclass(Subclass), nn.Parameter(rows())):
        torch.testing.assert_close(model(x), plain(x))
    assert calls.mlps == []


# Which layers.


def with_layer(name, layer, make=MLP):
    module = make()
    setattr(module, name, layer)
    return module


def four_bit(n, k, block):
    return Linear4bit(nf4_weight(n, k, block, nested=False), False, FP32)


def int8():
    return with_layer(
        "up_proj", torchao_int8(nn.Linear(WIDTH, INNER, False, dtype=BF16)), lambda: MLP().to(BF16)
    )


class Linear(nn.Linear):
    pass


DORA = "'gate_proj' computes adapter 'default', which is DoRA, by itself"
STACKED = "'gate_up_proj' holds gate and up stacked in a quantized weight, which is not cut in two"
GATE = {"targets": ["gate_proj"]}
NOT_READ = {
    "int8": ("ours", int8, {}, "'up_proj' calls its base layer, a Linear with a "),
    "stacked in 4 bits": (
        "ours", lambda: with_layer("gate_up_proj", four_bit(2 * INNER, WIDTH, 64), lambda: Stacked(bias=False)), {}, STACKED,
    ),
    "4 bits without an adapter": (
        "ours", lambda: with_layer("down_proj", four_bit(WIDTH, INNER, 8)), GATE,
        "'down_proj' has a quantized weight, and without Triton its Linear4bit computes the product",
    ),
    "a subclass in PEFT": (
        "PEFT", lambda: with_layer("down_proj", Linear(INNER, WIDTH, False)), GATE,
        "'down_proj' calls its base layer, a Linear, for its product",
    ),
    "DoRA": ("PEFT", MLP, {"use_dora": True}, DORA),
    "a bias in B": (
        "PEFT", MLP, {"lora_bias": True}, "'gate_proj' has a bias in lora_B of adapter 'default', which trains",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("library", "make", "options", "reason"), NOT_READ.values(), ids=NOT_READ)
def test_layers_that_are_not_read(library, make, options, reason, calls):
    (model, report), (plain, _) = reported_pair(make, library, **options)
    assert report.mlps[0].reason.startswith(reason)
    x = rows(BF16 if make is int8 else FP32)
    found, expected = step(model, x), step(plain, x)
    assert calls.mlps == [] and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_report_groups_and_lists():
    class Clamped(MLP):
        def forward(self, x):
            return super().forward(x.clamp(-1, 1))

    modules = MLP(), MLP(nn.GELU()), Clamped(), MLP(nn.ReLU()), Clamped(), MLP()
    report = slk.apply_lora(nn.Sequential(*modules), TARGETS, fuse_mlp=True)
    clamp = "it calls clamp"
    relu = f"it calls 'act_fn', a ReLU; {FUSED}"
    assert [(mlp.name, mlp.activation, mlp.reason) for mlp in report.mlps[2:4]] == [
        ("2", None, clamp),
        ("3", None, relu),
    ]
    assert report.notes[-3:] == (
        "computed in one op each: 2 x gated MLP (silu); 1 x gated MLP (gelu)",
        f"not in one op: 2, 4: {clamp}",
        f"not in one op: 3: {relu}",
    )
    report = slk.apply_lora(nn.Sequential(nn.Linear(2, 2)), ["0"], fuse_mlp=True)
    assert report.notes[-1] == "fuse_mlp found no gated MLP with LoRA" and report.mlps == ()


def test_a_call_of_the_op_itself_does_not_tell_that_a_module_fits(calls):
    """Not even a call of the same tensors, which has the same layouts."""
    mlp = mlp_of(pair(lambda: MLP(nn.GELU()))[0])
    mlp(rows())
    assert len(calls.mlps) == 1
    mlp.up_proj.weight.requires_grad_()
    gate, up, down = [
        functional.LoRAWeights(layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
        for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    ]
    functional.lora_mlp(rows(), gate, up, down, "gelu")
    mlp(rows())
    assert len(calls.mlps) == 1


@pytest.mark.parametrize("library", ["ours", "PEFT"])
def test_a_layer_that_is_merged_after_calls_of_the_same_layouts(library, calls):
    mlp = mlp_of(pair(lambda: MLP(nn.GELU()), library)[0]).eval()
    expected = mlp(rows())
    assert len(calls.mlps) == 1
    mlp.up_proj.merge()
    assert torch.allclose(mlp(rows()), expected) and len(calls.mlps) == 1
    mlp.up_proj.unmerge()
    assert torch.allclose(mlp(rows()), expected) and len(calls.mlps) == 2


# Forwards that the kernels library binds, as transformers 5.25 does for each model that it loads.


class Gelu(nn.Module):
    """A layer of a kernel that computes what nn.GELU does."""

    can_torch_compile = True

    def forward(self, x):
        return nn.functional.gelu(x)


class OfNoKernel(nn.Module):
    def forward(self, x):
        return nn.functional.gelu(x)


def gelu(self, x):
    return nn.functional.gelu(x)


def bound(forward):
    """The activation's forward replaced as the library does."""
    return lambda act: setattr(act, "forward", MethodType(forward, act))


KERNELS = {"its own": bound(nn.GELU.forward), "a layer's": bound(Gelu.forward)}
OTHERS = {
    "of a class of no kernel": bound(OfNoKernel.forward),
    "a function's": bound(gelu),
    "of another instance": lambda act: setattr(act, "forward", nn.GELU().forward),
    "not bound": lambda act: setattr(act, "forward", nn.functional.gelu),
    "no function's": bound(partial(gelu)),
}


@pytest.mark.parametrize("library", ["ours", "PEFT"])
@pytest.mark.parametrize("bind", KERNELS.values(), ids=KERNELS)
def test_an_activation_whose_forward_is_a_kernels_is_fused(bind, library, calls, monkeypatch):
    """Bound before or after the MLP was fused, in eager mode and compiled; and unbound again."""
    monkeypatch.setattr(nn.GELU, "kernel_layer_name", "GeLU", raising=False)
    models = [model.double() for model in pair(lambda: MLP(nn.GELU(), bias=True), library)]
    x = rows(torch.float64)
    expected = step(models[1], x)
    bind(mlp_of(models[0]).act_fn)
    assert reported(models[0]) is None
    found = step(models[0], x)
    assert len(calls.mlps) == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    # Compiled code fuses none but the class's own.
    compiled = torch.compile(models[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), models[1](x))
    del mlp_of(models[0]).act_fn.forward
    step(models[0], x)
    assert len(calls.mlps) > 1


@pytest.mark.parametrize("bind", OTHERS.values(), ids=OTHERS)
def test_an_activation_whose_forward_is_anothers_is_not_fused(bind, calls, monkeypatch):
    monkeypatch.setattr(nn.GELU, "kernel_layer_name", "GeLU", raising=False)
    model, plain = pair(lambda: MLP(nn.GELU()))
    for each in (model, plain):
        bind(mlp_of(each).act_fn)
    found, expected = step(model, rows()), step(plain, rows())
    assert calls.mlps == [] and all(torch.equal(found[name], expected[name]) for name in expected)
    assert reported(model) == f"'act_fn' {REPLACED}"


def test_a_kernels_layer_in_the_place_of_another_class_is_not_its(calls):
    """A class that does not name the layer that it computes."""
    model, _ = pair(lambda: MLP(nn.GELU()))
    bound(Gelu.forward)(mlp_of(model).act_fn)
    step(model, rows())
    assert calls.mlps == [] and reported(model) == f"'act_fn' {REPLACED}"


def test_a_layer_with_weights_keeps_its_kernel(monkeypatch):
    """A kernel may read them in another way, in 8 bits say."""
    monkeypatch.setattr(nn.Linear, "kernel_layer_name", "Linear", raising=False)
    model = nn.Sequential(nn.Linear(4, 4))
    bound(nn.Linear.forward)(model[0])
    assert not is_hooked(model[0])
    bound(Gelu.forward)(model[0])
    assert is_hooked(model[0])
    with pytest.raises(ValueError, match="forward was replaced"):
        slk.apply_lora(model, ["0"])


def test_the_kernels_library_leaves_mlps_fused(calls):
    """It binds each class's own forward where it has no kernel for the device."""
    # "kernels" alone is the folder of the kernels' tests.
    pytest.importorskip(
        "kernels.layer", reason="runs where the kernels library is: transformers 5.25 brings it"
    )
    import kernels

    @kernels.use_kernel_forward_from_hub("stablelora_kernels_test")
    class Named(nn.SiLU):
        pass

    model, plain = pair(lambda: MLP(Named()))
    kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    assert "forward" in mlp_of(model).act_fn.__dict__
    found, expected = step(model, rows()), step(plain, rows())
    assert len(calls.mlps) == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
