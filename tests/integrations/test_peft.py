"""accelerate_peft on real PEFT models: every feature of theirs, against PEFT's own forward, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.testing import EPS
from tests.helpers.inputs import BF16, DTYPES, FP16, FP32
from tests.helpers.oracle import check_all, layer_oracle, run_layer
from tests.helpers.peft_models import assert_equal_to_pefts, calls, config, grads, make, make_base, one_layer, peft
from tests.helpers.small_models import IDS, llama, output

lora = peft.tuners.lora


ADAPTERS = {
    "plain": {},
    "rank 1": {"r": 1},
    "rank 3": {"r": 3},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"layers.1.q_proj": 5}, "alpha_pattern": {"v_proj": 1.5}},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)
def test_output_and_gradients_are_pefts(kwargs, backend, monkeypatch):
    model = make(**kwargs)
    layers = sum(isinstance(m, lora.Linear) for m in model.modules())
    assert_equal_to_pefts(model)
    count = calls(monkeypatch)
    output(model)
    assert count == {"lora_linear": layers} and layers >= 4


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_lora_bias(backend, monkeypatch):
    """q_proj has a bias of its own, v_proj has none."""
    model = make(lora_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
    assert_equal_to_pefts(model)
    model.add_adapter("more", config(lora_bias=True))
    model.base_model.set_adapter(["default", "more"])
    assert_equal_to_pefts(model)
    count = calls(monkeypatch)
    output(model)
    assert count == {"lora_linear": 4, "lora_branch": 4}


def test_several_adapters_and_switching(backend, monkeypatch):
    model = make(("more", {"r": 3, "lora_alpha": 2}), ("q", {"target_modules": ["q_proj"]}))
    slk.accelerate_peft(model)
    outputs = []
    for active in ("default", "more", "q", ["default", "more"], ["q", "default", "more"]):
        model.base_model.set_adapter(active)
        assert_equal_to_pefts(model)
        outputs.append(output(model))
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(outputs) for b in outputs[:i])
    count = calls(monkeypatch)
    output(model)
    assert count == {"lora_linear": 4, "lora_branch": 6}


def test_disabled_and_merged_are_pefts_own_bits(backend, monkeypatch):
    model = make()
    slk.accelerate_peft(model)
    count = calls(monkeypatch)
    plain = output(make_base())
    with model.disable_adapter():
        assert torch.equal(output(model), plain)
    active = output(model)
    assert count["lora_linear"] == 4 and not torch.allclose(active, plain, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(output(model), active)
    # Disabling unmerges, in PEFT's own forward.
    with model.disable_adapter():
        torch.testing.assert_close(output(model), plain)
    assert not any(m.merged for m in model.modules() if isinstance(m, lora.Linear))
    model.merge_adapter()
    model.unmerge_adapter()
    assert count["lora_linear"] == 4
    torch.testing.assert_close(output(model), active)
    assert count["lora_linear"] == 8


def test_mixed_batches(backend, monkeypatch):
    model = make(("more", {"r": 3}), ("q", {"target_modules": ["q_proj"]}))
    ids = torch.arange(30).view(6, 5) % 11
    names = ["more", "__base__", "default", "more", "q", "__base__"]
    with torch.no_grad():
        expected = model(ids, adapter_names=names)
        slk.accelerate_peft(model)
        count = calls(monkeypatch)
        found = model(ids, adapter_names=names)
    torch.testing.assert_close(found, expected)
    # Two adapters on each of four layers, and one on two of them.
    assert count == {"lora_branch": 10}
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(ids, adapter_names=["nobody"] * 6)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(ids, adapter_names=["more"])


@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dropout_in_training_only(p, backend):
    model = make(lora_dropout=p)
    expected = output(model)
    slk.accelerate_peft(model)
    still = output(model)
    torch.testing.assert_close(still, expected)
    torch.manual_seed(1)
    first = output(model.train())
    torch.manual_seed(1)
    assert torch.equal(output(model), first) and not torch.allclose(first, still, atol=1e-3)
    assert torch.equal(output(model.eval()), still)


def test_dropout_has_the_right_mean():
    """One layer, many draws: the branch's mean is the branch, and the base product is never dropped."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 4)), config(target_modules=["0"], lora_dropout=0.5))
    x = torch.randn(1, 64)
    base, still = model.base_model.model[0].base_layer(x), model.eval()(x)
    slk.accelerate_peft(model.train())
    with torch.no_grad():
        draws = model(x.expand(4000, 64))
    error = (draws.mean(0) - still[0]).abs() / (draws.std(0) / 4000**0.5)
    assert (error < 5).all() and draws.std(0).min() > 0
    model.base_model.model[0].lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(model(x), base)


def test_scaling_is_read_at_each_call(backend):
    model = make()
    slk.accelerate_peft(model)
    layers = [m for m in model.modules() if isinstance(m, lora.Linear)]
    before = output(model)
    for change in (
        lambda m: m.scale_layer(1.5),
        lambda m: m.unscale_layer(),
        lambda m: m.set_scale("default", 0.5),
    ):
        for layer in layers:
            change(layer)
        assert_equal_to_pefts(model)
    assert not torch.allclose(output(model), before, atol=1e-3)
    for layer in layers:
        layer.scaling["default"] = 0
    torch.testing.assert_close(output(model), output(make_base()))


def test_generate(backend, monkeypatch):
    model = make(("more", {}), model=llama(pad_token_id=0))
    ids = torch.tensor([[1, 5, 7], [1, 9, 3]])
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    modes = ({}, {"num_beams": 2}, {"adapter_names": ["more", "__base__"]})
    expected = [model.generate(**options, **mode) for mode in modes]
    slk.accelerate_peft(model)
    count = calls(monkeypatch)
    for mode, tokens in zip(modes, expected, strict=True):
        assert torch.equal(model.generate(**options, **mode), tokens)
    assert count["lora_linear"] and count["lora_branch"]


def test_inputs_of_any_shape_and_those_that_do_not_fit(backend):
    model, x = one_layer(FP32)
    for shape in ((0, 80), (80,), (2, 3, 80), (2, 0, 80)):
        given = torch.randn(shape)
        slk.restore_peft(model)
        expected = model(given)
        slk.accelerate_peft(model)
        torch.testing.assert_close(model(given), expected, rtol=1e-5, atol=8 * EPS[FP32])
    # What does not fit is PEFT's own error.
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :7])
    model.base_model.model[0].lora_B["default"].weight = nn.Parameter(torch.randn(80, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x)


@pytest.mark.covering(1)
@pytest.mark.parametrize("several", [False, True])
def test_torch_compile_has_no_graph_break(several, backend):
    model = make(("more", {}))
    model.base_model.set_adapter(["default", "more"] if several else "default")
    slk.accelerate_peft(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    expected = grads(model)
    for name, grad in grads(model, compiled(IDS)).items():
        torch.testing.assert_close(grad, expected[name])


# In low precision: no worse than PEFT's own against float64.


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts float32 tensors of at least so many elements that an operator makes."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dtype == FP32 and out.numel() >= self.elements:
            self.count += 1
        return out


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_float32_adapters_without_a_float32_copy_of_the_activations(dtype, backend):
    model, x = one_layer(dtype)
    with Copies(x.numel()) as pefts:
        model(x)
    slk.accelerate_peft(model)
    with Copies(x.numel()) as ours:
        y = model(x)
    assert y.dtype == dtype
    # In the interpreter, some of what the kernels do runs on PyTorch's operators.
    assert pefts.count > 0 and ours.count == 0
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert model.base_model.model[0].lora_A["default"].weight.grad.dtype == FP32


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("dtypes", "autocast"),
    [(dtypes, on) for dtypes in DTYPES for on in (False, True) if not on or dtypes[0] != FP16],
    ids=str,
)
def test_error_against_float64_is_pefts(dtypes, autocast, backend):
    """Of PEFT's own forward in the dtype of the products: where PEFT computes the branch in float32, that is autocast."""
    model, x = one_layer(*dtypes)
    low = BF16 if autocast else dtypes[0]
    layer = model.base_model.model[0]
    pair, base = (layer.lora_A["default"].weight, layer.lora_B["default"].weight), layer.base_layer
    grad = torch.randn(x.shape).to(low)
    lower = low != FP32 and dtypes[1] == FP32
    eager = run_layer(torch.autocast("cpu", low, enabled=autocast or lower)(model), x, pair, grad)
    slk.accelerate_peft(model)
    found = run_layer(torch.autocast("cpu", low, enabled=autocast)(model), x, pair, grad)
    ref = layer_oracle(x, base.weight, base.bias, pair, grad, layer.scaling["default"])
    check_all(found, ref, eager, low)
    assert found["Y"].dtype == (low if autocast else dtypes[0])


def test_adapters_that_do_not_fit_are_pefts_own(monkeypatch):
    """bfloat16 adapters beside float32 activations: PEFT casts the activations."""
    model, x = one_layer(FP32, BF16)
    expected = model(x)
    slk.accelerate_peft(model)
    count = calls(monkeypatch)
    assert torch.equal(model(x), expected) and not count
    with torch.autocast("cpu", BF16):
        assert model(x).dtype == BF16
    assert count == {"lora_linear": 1}
