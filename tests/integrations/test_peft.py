"""accelerate_peft on real PEFT models: every feature of theirs, against PEFT's own forward, on both
backends.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.testing import EPS
from stablelora_kernels.testing.cases import BF16, FP16, FP32
from tests.helpers.cases import DTYPES
from tests.helpers.oracle import check_layer, run_layer
from tests.helpers.peft_models import assert_equal_to_pefts, config, make, one_layer, peft, results
from tests.helpers.small_models import IDS, llama, output

lora = peft.tuners.lora
pytestmark = pytest.mark.filterwarnings("ignore:.*lora_bias.*")


class Adapters(NamedTuple):
    first: dict[str, Any]
    more: dict[str, dict[str, Any]] | None = None
    active: Any = "default"
    # Calls of lora_linear and of lora_branch.
    linear: int = 4
    branch: int = 0

    def make(self) -> Any:
        model = make(*(self.more or {}).items(), **self.first)
        model.base_model.set_adapter(self.active)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and name.endswith("bias"):
                    parameter.normal_()
        return model


PATTERNS = {"rank_pattern": {"layers.1.q_proj": 5}, "alpha_pattern": {"v_proj": 1.5}}
MORE, ON_Q = {"r": 3, "lora_alpha": 2}, {"target_modules": ["q_proj"]}
ADAPTERS = {
    "plain": Adapters({}),
    "patterns": Adapters(PATTERNS),
    "bias lora_only": Adapters({"bias": "lora_only"}),
    "all-linear": Adapters({"target_modules": "all-linear"}, linear=5),
    # q_proj has a bias of its own, v_proj has none.
    "lora_bias": Adapters({"lora_bias": True}),
    "lora_bias twice": Adapters(
        {"lora_bias": True}, {"more": {"lora_bias": True}}, ["default", "more"], branch=4
    ),
    "the second of two": Adapters({}, {"more": MORE}, "more"),
    "on q alone": Adapters({}, {"q": ON_Q}, "q", 2),
    "both of two": Adapters({}, {"more": MORE}, ["default", "more"], branch=4),
    "all of three": Adapters({}, {"more": MORE, "q": ON_Q}, ["q", "default", "more"], branch=6),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_output_and_gradients_are_pefts(adapters, backend, calls):
    model = adapters.make()
    assert_equal_to_pefts(model)
    calls.clear()
    output(model)
    expected = {"lora_linear": adapters.linear, "lora_branch": adapters.branch}
    assert calls.layers == {op: count for op, count in expected.items() if count}


def story(model, run, place):
    """What PEFT does with a model and its adapters, step by step: each result, and whether this
    library's ops may compute it.
    """

    def with_adapters(*names):
        model.base_model.set_adapter([*names])
        return run(model), True

    active = model.active_adapters
    yield with_adapters(*active)
    with model.disable_adapter():
        yield run(model), False
    model.merge_adapter()
    yield run(model), False
    # Disabling unmerges, in PEFT's own forward.
    with model.disable_adapter():
        yield run(model), False
    yield run(model), True
    torch.manual_seed(1)
    model.add_adapter(
        "late", config(r=3, target_modules=model.peft_config["default"].target_modules)
    )
    yield with_adapters("late")
    model.save_pretrained(place)
    model.delete_adapter("late")
    yield with_adapters(*active)
    model.load_adapter(place / "late", "back")
    yield with_adapters("back")
    # Of biases, PEFT initializes new ones.
    torch.manual_seed(2)
    model.add_weighted_adapter(["default", "back"], [0.7, 0.3], "both", combination_type="cat")
    yield with_adapters("both")
    yield with_adapters("back", *active)
    layers = [module for module in model.modules() if isinstance(module, lora.LoraLayer)]
    for scale in (
        lambda m: m.scale_layer(1.5),
        lambda m: m.unscale_layer(),
        lambda m: m.set_scale("default", 0.5),
    ):
        for layer in layers:
            scale(layer)
        yield run(model), True
    scalings = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update(dict.fromkeys(layer.scaling, 0))
    yield run(model), True
    for layer, before in zip(layers, scalings, strict=True):
        layer.scaling.update(before)
    # PEFT cannot merge biases safely into 4 bits.
    is_safe = not model.peft_config["default"].lora_bias
    for unloaded in (copy.deepcopy(model).unload(), model.merge_and_unload(safe_merge=is_safe)):
        assert not any(isinstance(module, lora.LoraLayer) for module in unloaded.modules())
        yield run(unloaded), False


def check_story(make_model, run, place, calls):
    """An accelerated model and PEFT's own: the same results, and the same files."""
    plain, fast = make_model(), make_model()
    slk.accelerate_peft(fast, strict=True)
    told = story(fast, run, place / "fast")
    for expected, _ in story(plain, run, place / "plain"):
        calls.clear()
        found, is_ours = next(told)
        assert bool(calls.layers) == is_ours and found.keys() == expected.keys()
        for name, value in found.items():
            atol = 32 * EPS[FP32] * expected[name].abs().max().item()
            torch.testing.assert_close(
                value,
                expected[name],
                rtol=0,
                atol=atol,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    for path in place.glob("plain/**/*.safetensors"):
        assert (
            place / "fast" / path.relative_to(place / "plain")
        ).read_bytes() == path.read_bytes()


def run_small(model):
    out = model(IDS)
    return results(model, out) if out.requires_grad else {"Y": out}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["patterns", "on q alone", "both of two"])
def test_switched_scaled_disabled_merged_and_unloaded(name, backend, calls, tmp_path):
    check_story(ADAPTERS[name].make, run_small, tmp_path, calls)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "adapters", [ADAPTERS["plain"], ADAPTERS["both of two"]], ids=["one", "two"]
)
def test_torch_compile_has_no_graph_break(adapters, backend):
    model = adapters.make()
    slk.accelerate_peft(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for (name, value), expected in zip(
        results(model, compiled(IDS)).items(), results(model).values(), strict=True
    ):
        torch.testing.assert_close(value, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_mixed_batches(backend, calls):
    model = make(("more", MORE), ("q", ON_Q))
    ids = torch.arange(30).view(6, 5) % 11
    names = ["more", "__base__", "default", "more", "q", "__base__"]
    with torch.no_grad():
        expected = model(ids, adapter_names=names)
        slk.accelerate_peft(model)
        found = model(ids, adapter_names=names)
    torch.testing.assert_close(found, expected)
    # Two adapters on each of four layers, and one on two of them.
    assert calls.layers == {"lora_branch": 10}


def test_dropout_is_the_ops_in_training_only(backend):
    """Of the layer's own probability, on the branch alone."""
    model, x = one_layer(FP32)
    layer = model.train().base_model.model[0]
    layer.lora_dropout["default"] = nn.Dropout(0.6)
    pair, base = (layer.lora_A["default"].weight, layer.lora_B["default"].weight), layer.base_layer
    slk.accelerate_peft(model)
    for trains in (True, False):
        torch.manual_seed(1)
        found = model.train(trains)(x)
        torch.manual_seed(1)
        p = 0.6 if trains else 0.0
        assert torch.equal(
            found, lora_linear(x, base.weight, base.bias, *pair, layer.scaling["default"], p)
        )


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


# In low precision: no worse than PEFT's own against float64.


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("dtypes", "autocast"),
    [(dtypes, on) for dtypes in DTYPES for on in (False, True) if not on or dtypes[0] != FP16],
    ids=str,
)
def test_error_against_float64_is_pefts(dtypes, autocast, backend, calls):
    """Of PEFT's own forward in the dtype of the products: where PEFT computes the branch in
    float32, that is autocast.
    """
    model, x = one_layer(*dtypes)
    low = BF16 if autocast else dtypes[0]
    layer = model.base_model.model[0]
    pair, base = (layer.lora_A["default"].weight, layer.lora_B["default"].weight), layer.base_layer
    grad = torch.randn(x.shape).to(low)
    lower = low != FP32 and dtypes[1] == FP32
    eager = run_layer(torch.autocast("cpu", low, enabled=autocast or lower)(model), x, pair, grad)
    slk.accelerate_peft(model)
    found = run_layer(torch.autocast("cpu", low, enabled=autocast)(model), x, pair, grad)
    assert calls.layers == {"lora_linear": 1}
    scaling = layer.scaling["default"]
    check_layer(found, eager, x, base.weight, base.bias, pair, grad, scaling, low)
    assert found["Y0"].dtype == (low if autocast else dtypes[0])
    assert found["lora_A0"].dtype == dtypes[1]


def test_generate_gives_pefts_tokens(backend, calls):
    model = make(model=llama(pad_token_id=0), task_type="CAUSAL_LM", target_modules="all-linear")
    ids = torch.tensor([[1, 5, 7], [1, 9, 3]])
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    pefts = model.generate(input_ids=ids, **settings)
    slk.accelerate_peft(model, strict=True)
    ours = model.generate(input_ids=ids, **settings)
    assert torch.equal(ours.sequences, pefts.sequences)
    for logits, of_peft in zip(ours.logits, pefts.logits, strict=True):
        torch.testing.assert_close(logits, of_peft)
    # The prompt, and each token but the last.
    assert calls.layers == {"lora_linear": 14 * 6}


def test_adapters_that_do_not_fit_are_pefts_own(calls):
    """bfloat16 adapters beside float32 activations: PEFT casts the activations."""
    model, x = one_layer(FP32, BF16)
    expected = model(x)
    slk.accelerate_peft(model)
    assert torch.equal(model(x), expected) and not calls.layers
    with torch.autocast("cpu", BF16):
        assert model(x).dtype == BF16
    # Outside autocast they fit no more than before.
    assert torch.equal(model(x), expected)
    assert calls.layers == {"lora_linear": 1}
    with torch.autocast("cpu", BF16):
        # Autocast would cast these to the same dtype. PEFT casts the activations to float64 first.
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.double()
        model(x)
    assert calls.layers == {"lora_linear": 1}


def test_adapters_that_are_still_on_meta(calls):
    """As ``PeftModel.from_pretrained(low_cpu_mem_usage=True)`` makes them, before it loads their values.
    The weight of trainable tokens is computed from them.
    """
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    of_peft = make(model=llama(), **options)
    model = peft.get_peft_model(llama(), config(**options), low_cpu_mem_usage=True)
    slk.accelerate_peft(model)
    model.load_state_dict(of_peft.state_dict(), assign=True)
    torch.testing.assert_close(output(model.eval()), output(of_peft))
    assert calls.layers == {"lora_linear": 2}
