"""Kinds of PEFT layers times the ways in which they are called: accelerate_peft's results against
PEFT's own in float64.

An element may be off by twice the error of PEFT's own forward in the same dtypes, and one unit in
the last place more. Each case also says what computes it: one op, or PEFT's own forward, whose
results are then equal to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels import quantized
from stablelora_kernels.testing import MLP_SLOPES, SLOPES, assert_no_worse
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64
from stablelora_kernels.testing.expectations import next_keep
from tests.helpers import gated_mlps, moe_models
from tests.helpers.cases import MANY
from tests.helpers.largest_shares import PROPERTY
from tests.helpers.op_calls import Calls, counted_ops
from tests.helpers.peft_models import config, own_forwards, peft
from tests.helpers.quantized_weights import bnb_4bit, torchao

# Products are so small that two threads would mostly wait for each other.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
K, N, P = 32, 24, 0.3
Results = dict[str, Tensor]


class Attention(nn.Module):
    """Three projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, N), nn.Linear(K, 8), nn.Linear(K, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


class Experts(nn.Module):
    """A stack of transformers' experts, to which tokens are routed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = moe_models.build("qwen3_moe", dtype=FP32).model.layers[0].mlp.experts

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        index = torch.arange(2 * tokens).view(tokens, 2) % moe_models.E
        weights = torch.linspace(0.2, 1, 2 * tokens).view(tokens, 2).to(x.dtype)
        return self.experts(x, index, weights)


def to_nf4(base: nn.Module, dtype: torch.dtype) -> None:
    base[0] = bnb_4bit(base[0], dtype)
    # Where the processor has instructions for it, bitsandbytes would pack the weight in evaluation.
    base[0].support_avx512bf16_for_cpu = False


def to_float8(base: nn.Module, dtype: torch.dtype) -> None:
    torchao(base, "Float8WeightOnlyConfig")


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(64, N))


class Kind(NamedTuple):
    """What PEFT adapts and how, and which fusion is asked for."""

    make: Callable[[], nn.Module]
    targets: dict[str, Any]
    quantize: Callable[[nn.Module, torch.dtype], None] = lambda base, dtype: None
    fusion: dict[str, bool] = {}  # noqa: RUF012
    width: int = K


FIRST, DORA = {"target_modules": ["0"]}, {"target_modules": ["0"], "use_dora": True}
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KINDS = {
    "LoRA": Kind(linear, FIRST, width=64),
    "DoRA": Kind(linear, DORA, width=64),
    "experts": Kind(Experts, EXPERTS, width=moe_models.H),
    "NF4": Kind(linear, FIRST, to_nf4, width=64),
    "float8": Kind(linear, FIRST, to_float8, width=64),
    "DoRA on NF4": Kind(linear, DORA, to_nf4, width=64),
    "DoRA on float8": Kind(linear, DORA, to_float8, width=64),
    "group": Kind(Attention, {"target_modules": ["q_proj", "k_proj", "v_proj"]}, fusion={"fuse_projections": True}),
    "MLP": Kind(
        lambda: gated_mlps.MLP(width=K, inner=N), {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
        fusion={"fuse_mlp": True},
    ),
}  # fmt: skip
AUTOCAST = {"no autocast": None, "autocast bf16": BF16, "autocast fp16": FP16}
ADAPTERS = {"fp32 adapters": FP32, "bf16 adapters": BF16}
CALLS = ("training", "reentrant checkpoint", "checkpoint", "no_grad", "inference_mode")


def is_left_out(kind: str, dropout: float) -> bool:
    """PEFT refuses dropout on a parameter. Without a backward, a checkpoint has nothing to do:
    CALLS has none in evaluation.
    """
    return kind == "experts" and dropout > 0


CASES = [
    case for case in product(KINDS, AUTOCAST, ("fp32 base", "low base"), ADAPTERS, (0.0, P), CALLS)
    if not is_left_out(case[0], case[4])
]  # fmt: skip


class Case(NamedTuple):
    """One case. Under autocast x is float32, as transformers' norms leave it."""

    kind: str
    autocast: torch.dtype | None
    base: torch.dtype
    adapters: torch.dtype
    dropout: float
    call: str
    backend: str
    rows: int

    @property
    def trains(self) -> bool:
        return self.call not in ("no_grad", "inference_mode")

    @property
    def x_dtype(self) -> torch.dtype:
        return FP32 if self.autocast else self.base

    @property
    def low(self) -> torch.dtype:
        """The dtype of the products."""
        return self.autocast or self.base

    @property
    def is_pefts(self) -> bool:
        """Whether PEFT's own forward computes it."""
        if self.kind == "experts":
            # The op takes a stack in the dtype of the products.
            return self.base != self.low or self.adapters not in (FP32, self.base)
        if "DoRA" in self.kind and self.dropout and self.trains:
            return True
        # PEFT casts x to adapters in a lower precision.
        return self.autocast is None and self.adapters not in (FP32, self.x_dtype)

    @property
    def op(self) -> str:
        """The op of a layer that computes by itself."""
        reads_stored = self.backend == "triton" and self.x_dtype == self.low
        if "NF4" in self.kind:
            # bitsandbytes' layers cast x themselves.
            return "lora_linear" if self.backend == "triton" else "lora_branch"
        if "float8" in self.kind:
            return "lora_linear" if reads_stored else "lora_branch"
        return "lora_linear"

    def expected_calls(self) -> tuple[dict[str, int], list[Any]]:
        """The ops that layers call, and those of groups and MLPs. A checkpoint computes its layers
        again in backward.
        """
        times = 2 if "checkpoint" in self.call else 1
        if self.is_pefts:
            return {}, []
        if self.kind in ("group", "MLP"):
            return {}, [3 if self.kind == "group" else "silu"] * times
        if self.kind == "experts":
            return {"lora_experts": 2 * times}, []
        return {self.op: times}, []

    def model(self) -> Any:
        """PEFT's model. No branch is zero, and no magnitude is its norm."""
        kind = KINDS[self.kind]
        torch.manual_seed(0)
        base = kind.make().to(self.base)
        kind.quantize(base, self.low)
        base.is_loaded_in_4bit = "NF4" in self.kind
        model = adapted(base, kind, self.dropout)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(self.adapters)
        return model.train(self.trains)

    def run(self, model: Any, x: Tensor, autocast: torch.dtype | None) -> Results:
        """The output and, in training, the gradients of x and of all that trains."""
        torch.manual_seed(7)
        model.zero_grad()
        x = x.clone().requires_grad_(self.trains)
        mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(
            self.call, nullcontext
        )
        with mode(), torch.autocast("cpu", autocast, enabled=autocast is not None):
            is_checkpoint, is_reentrant = "checkpoint" in self.call, "reentrant" in self.call
            y = checkpoint(model, x, use_reentrant=is_reentrant) if is_checkpoint else model(x)
        if not self.trains:
            return {"Y": y}
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=FP64).view(y.shape).to(y.dtype))
        grads = {
            name: p.grad
            for name, p in model.named_parameters()
            if p.requires_grad and p.grad is not None
        }
        return {"Y": y.detach(), "dX": x.grad} | grads

    def lower(self) -> torch.dtype | None:
        """The autocast under which PEFT multiplies in the ops' dtype: beside a base of 16 bits it
        casts x to float32.
        """
        lifts = (
            self.autocast is None
            and self.base != FP32
            and self.adapters == FP32
            and self.kind != "experts"
        )
        return self.base if lifts else self.autocast


def adapted(base: nn.Module, kind: Kind, dropout: float) -> Any:
    model = peft.get_peft_model(base, config(r=3, lora_dropout=dropout, **kind.targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.5, 2, parameter.numel()))
    return model


def in_float64(model: Any, case: Case) -> Any:
    """The same model by PEFT, with every value in float64 and no quantized weight."""
    exact = adapted(KINDS[case.kind].make(), KINDS[case.kind], case.dropout).double()
    values = dict(model.named_parameters())
    for name, parameter in exact.named_parameters():
        value = values[name]
        is_stored = quantized.is_quantized(value)
        parameter.data = (
            quantized.read(value).dequantize(FP64) if is_stored else value.detach().double()
        )
    return exact.train(case.trains)


class DropsAlike(nn.Module):
    """Dropout by the mask that the ops draw next."""

    def __init__(self, p: float, backend: str) -> None:
        super().__init__()
        self.p, self.backend = p, backend

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep, p = next_keep(x.shape[:-1].numel(), x.shape[-1], self.p, self.backend, str(x.device))
        return x * keep.view(x.shape).to(x.dtype) / (1 - p)


def dropping_alike(model: Any, case: Case) -> Any:
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", {})
        for adapter, dropout in dropouts.items():
            if isinstance(dropout, nn.Dropout):
                dropouts[adapter] = DropsAlike(dropout.p, case.backend).train(case.trains)
    return model


@pytest.mark.covering
@pytest.mark.parametrize(("kind", "autocast", "base", "adapters", "dropout", "call"), CASES)
def test_cross_product(kind, autocast, base, adapters, dropout, call, backend, record_property):
    low = AUTOCAST[autocast] or BF16
    base_dtype = FP32 if base == "fp32 base" else low
    # Experts' op has one way for any number of rows.
    rows = 20 if kind == "experts" else MANY[backend]
    case = Case(
        kind, AUTOCAST[autocast], base_dtype, ADAPTERS[adapters], dropout, call, backend, rows
    )
    model = case.model()
    x = torch.randn(case.rows, KINDS[kind].width, generator=torch.Generator().manual_seed(3)).to(
        case.x_dtype
    )
    # It also makes a bitsandbytes layer cast its bias, in place.
    of_peft = case.run(model, x, case.autocast)
    baseline = reference = {}
    if not case.is_pefts:
        own, exact = (
            dropping_alike(m, case) for m in (copy.deepcopy(model), in_float64(model, case))
        )
        baseline, reference = case.run(own, x, case.lower()), case.run(exact, x.double(), None)

    slk.accelerate_peft(model, **KINDS[kind].fusion)
    with counted_ops() as calls, own_forwards() as layers:
        found = case.run(model, x, case.autocast)
    check_calls(case, calls, layers)
    assert found.keys() == of_peft.keys()
    shares = [(0.0, "")]
    for name, value in found.items():
        assert value.dtype == of_peft[name].dtype, name
        if case.is_pefts:
            assert torch.equal(value, of_peft[name]), name
            continue
        # Experts are gated MLPs too.
        slopes = MLP_SLOPES if kind in ("MLP", "experts") else SLOPES
        slope = slopes[case.low] if name == "Y" else None
        compared = assert_no_worse(
            value, reference[name], baseline[name], dtype=case.low, slope=slope, name=name
        )
        shares += [(one.share, f"{one.of} of {case}") for one in compared]
    record_property(PROPERTY, max(shares))


def check_calls(case: Case, calls: Calls, layers: list[Any]) -> None:
    of_layers, fused = case.expected_calls()
    assert dict(calls.layers) == of_layers and calls.fused == fused
    assert bool(layers) == case.is_pefts


def test_peft_refuses_dropout_on_parameters():
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        adapted(Experts(), KINDS["experts"], P)
