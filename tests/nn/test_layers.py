"""The life of a LoRA layer of each kind: made over a base, computed, copied, moved, merged,
disabled, hooked, saved, removed.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_branch, lora_linear
from stablelora_kernels.nn.linear import LoRABranchLinear, LoRAConv1D, LoRALinear
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.nn.sharded import LoRAShardedLinear
from stablelora_kernels.quantized import read
from stablelora_kernels.testing import EPS, fp8_weight, nf4_weight
from tests.helpers.oracle import run_layer
from tests.helpers.quantized_weights import (
    K,
    Linear4bit,
    N,
    bnb_4bit,
    bnb_8bit,
    conv1d,
    fp8_linear,
    scaled,
    torchao,
    torchao_fp8_a_tensor,
    torchao_int8,
)
from tests.helpers.small_models import fill_b

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*get_apply_tensor_subclass.*", "ignore:.*4-bit linear.*"
)


PLAIN = {
    "linear": lambda: nn.Linear(K, N),
    "bfloat16": lambda: nn.Linear(K, N, bias=False, dtype=BF16),
    "float64": lambda: nn.Linear(K, N, dtype=torch.float64),
    "sharded": lambda: nn.Linear(K, N),
    "PEFT": lambda: nn.Linear(K, N),
}
CONV1D = {"Conv1D": conv1d, "square Conv1D": lambda: conv1d(K, K, BF16)}
QUANTIZED = {
    "nf4": lambda: Linear4bit(nf4_weight(N, K, 64, nested=True), True, BF16),
    "nf4 in x's dtype": lambda: Linear4bit(nf4_weight(N, K, 64, nested=False), False, None),
    "fp8": lambda: fp8_linear(fp8_weight(N, K), BF16),
    "bitsandbytes 4-bit": lambda: bnb_4bit(nn.Linear(K, N), BF16),
    "torchao float8": lambda: torchao(nn.Linear(K, N), "Float8WeightOnlyConfig"),
}
OWN_PRODUCT = {
    "tensor of its own": lambda: scaled(nn.Linear(K, N)),
    "bitsandbytes 8-bit": lambda: bnb_8bit(nn.Linear(K, N)),
    "torchao int8": lambda: torchao_int8(nn.Linear(K, N)),
    "float8 scaled as a whole": lambda: torchao_fp8_a_tensor(nn.Linear(K, N)),
}
KINDS = PLAIN | CONV1D | QUANTIZED | OWN_PRODUCT
DTYPES = {"bfloat16": BF16, "float64": torch.float64, "square Conv1D": BF16, "fp8": BF16}
OURS = [kind for kind in KINDS if kind != "PEFT"]
# Whose base can be called with a plain tensor.
ALONE = [kind for kind in OURS if kind != "sharded"]
# bitsandbytes' own forward finds the state that its pickled 4-bit weight has lost; ours does not.
PICKLED = ["linear", "bfloat16", "float64", "PEFT", *CONV1D, "bitsandbytes 8-bit"]
# Of each class, some kinds go through a life by day, and all at night.
NIGHTLY = {"float64", "nf4", "torchao float8", "torchao int8", "float8 scaled as a whole"}


def night(kind: str, *more: str) -> Any:
    return pytest.param(kind, *more, marks=pytest.mark.nightly if kind in NIGHTLY else ())


each_kind = pytest.mark.parametrize("kind", [*map(night, KINDS)])
each_alone = pytest.mark.parametrize("kind", [*map(night, ALONE)])
ANEW = r"a weight in .* would have to be quantized anew to be merged"
OWN = r"the weight is a \w+ that only its \w+ can read"


def class_of(kind: str) -> type[LoRALinear]:
    if kind == "sharded":
        return LoRAShardedLinear
    classes = ((PLAIN, LoRALinear), (CONV1D, LoRAConv1D), (QUANTIZED, LoRAQuantizedLinear))
    return next((made for kinds, made in classes if kind in kinds), LoRABranchLinear)


class Holder(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.q_proj = base

    def forward(self, x):
        return torch.tanh(self.q_proj(x))


class Life(NamedTuple):
    model: nn.Module
    base: nn.Module
    x: Tensor
    # The output before there was a branch.
    plain: Tensor
    keys: set[str]
    report: Any

    @property
    def layer(self) -> Any:
        return getattr(self.model, "base_model", self).model.q_proj

    def merge(self) -> None:
        self.model.merge_adapter() if hasattr(self.model, "merge_adapter") else slk.merge_lora(
            self.model
        )

    def unmerge(self) -> None:
        self.model.unmerge_adapter() if hasattr(
            self.model, "unmerge_adapter"
        ) else slk.unmerge_lora(self.model)

    def remove(self) -> nn.Module:
        if hasattr(self.model, "unload"):
            return self.model.unload()
        slk.remove_lora(self.model, merge=False)
        return self.model


@pytest.fixture
def live(request) -> Callable[..., Life]:
    """Makes a model with one layer of a kind, whose branch is not zero."""

    def make(
        kind: str, prepare: Callable[[nn.Module], Any] = lambda base: None, **config: Any
    ) -> Life:
        torch.manual_seed(0)
        base = KINDS[kind]()
        model, x = Holder(base), torch.randn(2, 5, K, dtype=DTYPES.get(kind, FP32))
        prepare(base)
        if kind == "sharded":
            parallelize_module(
                model, request.getfixturevalue("mesh"), {"q_proj": ColwiseParallel()}
            )
        plain, keys = None if kind == "fp8" else model(x).detach(), set(model.state_dict())
        config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]} | config
        if kind == "PEFT":
            peft = pytest.importorskip(
                "peft", reason="runs where peft is installed: pip install .[test]"
            )
            model = peft.get_peft_model(model, peft.LoraConfig(**config, init_lora_weights=False))
            report = slk.accelerate_peft(model, strict=True)
        else:
            report = slk.apply_lora(model, slk.LoRAConfig(**config))
            # With B = 0 it starts at its base.
            if plain is not None:
                torch.testing.assert_close(model(x), plain)
            fill_b(model)
        return Life(model, base, x, plain, keys, report)

    return make


@pytest.mark.parametrize("kind", [*map(night, OURS)])
def test_it_holds_its_base_and_trains_the_pair_alone(kind, live):
    life = live(kind)
    assert type(life.layer) is class_of(kind)
    assert life.layer.weight is life.base.weight and life.layer.bias is life.base.bias
    assert {name for name, p in life.model.named_parameters() if p.requires_grad} == {
        "q_proj.lora_A",
        "q_proj.lora_B",
    }
    assert life.layer.lora_A.dtype == (torch.float64 if kind == "float64" else FP32)
    assert "r=3" in repr(life.layer) and life.layer.training
    assert kind not in QUANTIZED or type(life.base.weight).__name__ in repr(life.layer)
    inner = "q_proj.base_layer." if kind in OWN_PRODUCT else "q_proj."
    keys = {key.replace("q_proj.", inner) for key in life.keys}
    if kind.startswith("nf4"):
        # As bitsandbytes' own layer does it.
        keys |= {"q_proj.weight.absmax", "q_proj.weight.quant_map"}
    assert set(life.model.state_dict()) == keys | {"q_proj.lora_A", "q_proj.lora_B"}
    # bitsandbytes packs a weight for evaluation on a CPU.
    if "bitsandbytes" not in kind:
        assert not live(kind, prepare=nn.Module.eval).layer.training


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", [kind for kind in ALONE if kind != "float64"])
def test_forward_and_gradients_are_the_functions(kind, live, backend):
    layer, base = live(kind).layer, live(kind).base
    dtype, pair = DTYPES.get(kind, FP32), (layer.lora_A, layer.lora_B)
    compute = BF16 if kind in ("nf4", "bitsandbytes 4-bit") else dtype

    def function(x):
        if type(layer) is LoRABranchLinear:
            return lora_branch(base(x), x, *pair, layer.scaling)
        quantized = type(layer) is LoRAQuantizedLinear
        weight = (
            read(layer.weight)
            if quantized
            else layer.weight.t()
            if "Conv1D" in kind
            else layer.weight
        )
        bias = None if layer.bias is None else layer.bias.to(compute)
        return lora_linear(x.to(compute), weight, bias, *pair, layer.scaling).to(dtype)

    x = torch.randn(70, K, dtype=dtype, requires_grad=True)
    grad = torch.randn(70, layer.out_features, dtype=dtype)
    found, expected = run_layer(layer, x, pair, grad), run_layer(function, x, pair, grad)
    assert all(torch.equal(value, expected[name]) and value.any() for name, value in found.items())
    assert found["Y0"].dtype == dtype and layer(x[:0]).shape == (0, layer.out_features)
    with torch.autocast("cpu", BF16):
        assert layer(x).dtype == (base(x).dtype if type(layer) is LoRABranchLinear else BF16)


def close(found: Tensor, expected: Tensor) -> None:
    """Up to rounding of the largest element, in the dtype of ``expected``."""
    atol = 16 * EPS[expected.dtype] * expected.abs().max().item()
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=0, atol=atol)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize(
    ("kind", "way"),
    [night(k, way) for k in KINDS for way in WAYS if k in PICKLED or way == "deepcopy"],
)
def test_copies_stand_alone(kind, way, live):
    life = live(kind)
    expected = life.model(life.x)
    twin = life._replace(model=WAYS[way](life.model))
    assert torch.equal(twin.model(life.x), expected) and type(twin.layer) is type(life.layer)
    assert twin.layer.weight is not life.layer.weight
    with torch.no_grad():
        for name, parameter in twin.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(life.model(life.x), expected) and not torch.equal(
        twin.model(life.x), expected
    )


@each_kind
def test_merged_and_back_or_refused(kind, live):
    life = live(kind)
    life.model.eval()
    apart, weight = life.model(life.x), life.layer.weight
    if kind in QUANTIZED or kind in OWN_PRODUCT:
        reason = ANEW if kind in QUANTIZED else OWN
        with pytest.raises(ValueError, match=f"'q_proj': {reason}"):
            slk.merge_lora(life.model)
        with pytest.raises(ValueError, match=r"remove_lora\(model, merge=False\)"):
            slk.remove_lora(life.model)
        assert life.layer.weight is weight and not life.layer.merged
        assert torch.equal(life.model(life.x), apart)
        return
    # Twice is once.
    life.merge(), life.merge()
    assert life.layer.merged
    close(life.model(life.x), apart)
    removed = [] if kind in ("PEFT", "sharded") else [copy.deepcopy(life.model) for _ in range(2)]
    life.unmerge(), life.unmerge()
    assert not life.layer.merged
    close(life.model(life.x), apart)
    for model, expected in zip(removed, (apart, life.plain), strict=False):
        slk.remove_lora(model, merge=expected is apart)
        assert type(model.q_proj) is type(life.base) and set(model.state_dict()) == life.keys
        close(model(life.x), expected)
    assert kind == "PEFT" or (
        life.layer.weight is weight and torch.equal(life.model(life.x), apart)
    )


@pytest.mark.parametrize("kind", [night(kind) for kind in KINDS if kind != "fp8"])
def test_disabled_it_is_its_base_to_the_bit(kind, live):
    life = live(kind, lora_dropout=0.3)
    active = life.model.eval()(life.x)
    life.model.train()
    x = life.x.clone().requires_grad_()
    with slk.disable_lora(life.model):
        y = life.model(x)
        assert torch.equal(y, life.plain) and y.dtype == life.plain.dtype
        y.float().square().sum().backward()
    # x's gradient is the frozen layer's, and A and B get none.
    assert all(p.grad is None for name, p in life.model.named_parameters() if "lora_" in name)
    if kind != "sharded":
        found, x.grad = x.grad, None
        Holder(life.base)(x).float().square().sum().backward()
        assert torch.equal(found, x.grad)
        if kind != "float64":
            with torch.autocast("cpu", BF16):
                expected = Holder(life.base)(x)
                with slk.disable_lora(life.model):
                    assert (
                        torch.equal(life.model(x), expected)
                        and life.model(x).dtype == expected.dtype
                    )
    assert torch.equal(life.model.eval()(life.x), active) and not torch.equal(active, life.plain)
    if kind in QUANTIZED or kind in OWN_PRODUCT or kind == "PEFT":
        return
    life.merge()
    with slk.disable_lora(life.model):
        assert torch.equal(life.model(life.x), life.plain)
        life.unmerge()
        assert torch.equal(life.model(life.x), life.plain)
    assert torch.equal(life.model(life.x), active)


@each_alone
def test_hooks_move_and_removing_gives_the_base_back(kind, live):
    seen: list[tuple[str, nn.Module]] = []
    handles = []

    def hook(base: nn.Module) -> None:
        handles.append(
            base.register_forward_pre_hook(lambda module, args: seen.append(("pre", module)))
        )
        handles.append(
            base.register_full_backward_hook(
                lambda module, *grads: seen.append(("backward", module))
            )
        )
        forward = lambda module, args, kwargs, out: seen.append(("forward", module))  # noqa: E731
        handles.append(base.register_forward_hook(forward, with_kwargs=True))

    life = live(kind, prepare=hook)
    seen.clear()
    assert "3 hooks of 'q_proj' moved to the new layer" in life.report.notes
    layer = life.layer
    life.model(life.x.clone().requires_grad_()).float().sum().backward()
    assert seen == [("pre", layer), ("forward", layer), ("backward", layer)]
    handles.pop(0).remove(), handles.pop(0).remove()
    life.model.eval()
    model = life.remove()
    assert type(model.q_proj) is type(life.base) and set(model.state_dict()) == life.keys
    assert model.q_proj.weight is life.base.weight and model.q_proj.bias is life.base.bias
    assert type(layer) is LoRALinear or model.q_proj is life.base
    assert not model.q_proj.training
    model.train(), seen.clear()
    if kind != "fp8":
        assert torch.equal(model(life.x), life.plain) and seen == [("forward", model.q_proj)]
        handles[0].remove()
        model(life.x)
        assert len(seen) == 1


@each_alone
def test_its_adapter_is_saved_and_loaded(kind, live, tmp_path):
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="runs where safetensors is installed: pip install .[test]"
    )
    bias = "none" if kind in ("bfloat16", "nf4 in x's dtype") else "lora_only"
    life = live(kind, bias=bias)
    assert bias == "none" or life.layer.bias.requires_grad
    expected, prefix = life.model(life.x), "base_model.model.q_proj."
    slk.save_adapter(life.model, tmp_path)
    biases = set() if bias == "none" else {f"{prefix}base_layer.bias"}
    found = set(safetensors.load_file(tmp_path / "adapter_model.safetensors"))
    assert found == {f"{prefix}lora_A.weight", f"{prefix}lora_B.weight"} | biases
    other = Holder(copy.deepcopy(life.base))
    slk.load_adapter(other, tmp_path)
    assert type(other.q_proj) is class_of(kind) and torch.equal(other(life.x), expected)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "nf4"])
def test_torch_compile_has_no_graph_break(kind, live, backend):
    life = live(kind)
    torch._dynamo.reset()
    compiled = torch.compile(life.model, backend="aot_eager", fullgraph=True)
    # A compiled graph does not ask whether oneDNN is off, where other calls multiply bfloat16 in
    # float32.
    with torch.backends.mkldnn.flags(enabled=True):
        torch.testing.assert_close(compiled(life.x), life.model(life.x))


@each_kind
def test_it_trains_with_dropout_in_training_only(kind, live):
    life = live(kind, lora_dropout=0.3)
    before = life.model.eval()(life.x)
    assert torch.equal(life.model(life.x), before)
    optimizer = slk.StableLoRAAdamW.from_model(life.model, lr=0.1)
    life.model.train()(life.x).float().square().mean().backward()
    optimizer.step()
    assert not torch.equal(life.model(life.x), life.model(life.x))
    assert not torch.equal(life.model.eval()(life.x), before)
