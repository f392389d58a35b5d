"""Packed stacks of experts: their values against the libraries that store them, and
``lora_experts`` on them against the float64 reference of these values.
"""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from stablelora_kernels.formats import Layout
from stablelora_kernels.functional import (
    FP8Experts,
    MXFP4Experts,
    NF4Experts,
    PackedExperts,
    lora_experts,
)
from stablelora_kernels.ops.dropout import draw_keep
from stablelora_kernels.ops.lora_experts import autograd as op
from stablelora_kernels.ops.lora_experts import grouped
from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.reference import lora_experts_ref
from stablelora_kernels.testing import assert_no_worse
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64
from tests.helpers.operators import Operators
from tests.helpers.packed_stacks import FORMATS, fp8, functional, make_stack, nf4, parametrize

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
LEAVES = ("x", "lora_A", "lora_B")
E, N, K, R = 5, 96, 64, 3


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_its_librarys_to_the_bit(name, dtype):
    # Blocks of 128 that do not end with a matrix; nested ones that do not end with an expert.
    sizes = (E, 200, 320) if name == "fp8" else (E, N, K)
    packed, values = make_stack(name, *sizes)
    expected = values(dtype)
    assert packed.shape == sizes == tuple(expected.shape)
    assert packed.experts(0, E, dtype).equal(expected)
    assert packed.experts(1, 4, dtype).equal(expected[1:4])
    for place in range(E):
        expert = packed.expert(place, dtype)
        assert expert.dtype == dtype and expert.equal(expected[place])
    # float64 is not rounded.
    torch.testing.assert_close(packed.experts(0, E, FP64), values(FP32).double(), rtol=2e-7, atol=0)


def test_blocks_across_rows():
    """On a CPU bitsandbytes dequantizes these wrongly, if K is no multiple of the block."""
    torch.manual_seed(0)
    weight = torch.randn(3, 96, 48)
    data, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    flat = copy.copy(state)
    flat.shape = torch.Size((3 * 96 * 48 // 64, 64))
    expected = functional.dequantize_4bit(data, flat).view(3, 96, 48)
    assert NF4Experts.from_quant_state(data, state).experts(0, 3, FP32).equal(expected)
    assert (expected - weight).abs().max() < 0.5


class Call(NamedTuple):
    format: str
    dtype: torch.dtype = FP32
    lora_dtype: torch.dtype = FP32
    ends: tuple[int, ...] = (10, 10, 33, 40, 44)
    rows: int = 46
    p: float = 0.0
    transposed: bool = False
    bias: bool = False
    # Experts of a chunk of the product that runs on GPUs; 0 for the loop.
    chunk: int = 0
    wanted: tuple[str, ...] = LEAVES

    def __str__(self) -> str:
        values = self._asdict().items()
        return " ".join(f"{k}={v}" for k, v in values if v != self._field_defaults.get(k))


CALLS = [
    Call("nf4", FP64, FP64, bias=True),
    Call("nf4 nested", FP64, FP64, transposed=True, p=0.3),
    Call("fp4 nested", FP64, FP64, ends=(0, 0, 0, 0, 46)),
    Call("fp8", FP64, FP64, bias=True, p=0.3),
    Call("mxfp4", FP64, FP64, bias=True),
    Call("nf4 nested", bias=True, p=0.3),
    Call("nf4 nested", BF16, FP32, transposed=True),
    Call("fp4", FP16, FP16, p=0.3),
    Call("fp8", BF16, BF16, wanted=("x",)),
    Call("fp8", FP32, wanted=("lora_A", "lora_B"), transposed=True),
    Call("mxfp4", BF16, FP32, p=0.3, bias=True),
    Call("mxfp4", FP16, FP32, ends=(0, 0, 0, 0, 0)),
    Call("nf4", BF16, FP32, ends=(0, 0, 0, 0, 0), rows=0),
    *(
        Call(format, BF16, lora_dtype, chunk=chunk, **options)
        for format, lora_dtype, chunk, options in (
            ("nf4 nested", BF16, 5, {"bias": True}),
            ("nf4 nested", FP32, 2, {"transposed": True, "p": 0.3}),
            ("fp4", BF16, 1, {"ends": (10, 10, 10, 10, 44)}),
            ("fp8", BF16, 3, {"wanted": ("x",), "ends": (0, 0, 0, 20, 46)}),
            ("mxfp4", FP32, 2, {"bias": True, "ends": (10, 20, 20, 20, 20)}),
            ("mxfp4", FP32, 4, {"ends": (0, 0, 0, 0, 0)}),
        )
    ),
]


def operands(call: Call) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, dtype: torch.dtype = call.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=FP64).to(dtype)

    n, k = (K, N) if call.transposed else (N, K)
    made = {
        "x": draw(call.rows, k),
        "weight": make_stack(call.format, E, N, K).packed,
        "bias": draw(E, n) if call.bias else None,
        "lora_A": draw(E, R, k, dtype=call.lora_dtype),
        "lora_B": draw(E, n, R, dtype=call.lora_dtype),
        "grad": draw(call.rows, n),
        "offsets": torch.tensor(call.ends, dtype=torch.int32),
    }
    for name in call.wanted:
        made[name].requires_grad_()
    return made


def run(call: Call, made: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    arguments = [made[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    y = lora_experts(*arguments, 1.7, made["offsets"], transposed=call.transposed, dropout_p=call.p)
    y.backward(made["grad"])
    gradients = {f"d{name}": made[name].grad for name in call.wanted}
    return {"Y": y.detach()} | gradients


def expected(call: Call, made: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The results by the reference in ``dtype``, of the values in the call's dtype."""
    torch.manual_seed(5)
    keep, p = draw_keep(made["x"], call.p) if call.p else (None, 0.0)
    names = ("x", "bias", "lora_A", "lora_B", "grad")
    t = {n: made[n] if made[n] is None else made[n].detach().to(dtype) for n in names}
    for name in LEAVES:
        t[name].requires_grad_()
    weight = made["weight"].experts(0, E, call.dtype).to(dtype)
    weight = weight.transpose(1, 2) if call.transposed else weight
    y = lora_experts_ref(
        t["x"], weight, t["bias"], t["lora_A"], t["lora_B"], 1.7, made["offsets"], keep, p
    )
    gradients = torch.autograd.grad(
        y, [t[n] for n in LEAVES], t["grad"], allow_unused=True, materialize_grads=True
    )
    return {"Y": y.detach()} | {f"d{n}": g for n, g in zip(LEAVES, gradients, strict=True)}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_matches_the_oracle_of_the_dequantized_weights(call, monkeypatch):
    monkeypatch.setattr(op, "can_group", lambda x, stack: call.chunk > 0)
    monkeypatch.setattr(grouped, "CHUNK_BYTES", call.chunk * N * K * 2 + 100)
    made = operands(call)
    results = run(call, made)
    exact = expected(call, made, FP64)
    eager = expected(call, made, call.dtype)
    for name, value in results.items():
        assert value.dtype == (call.lora_dtype if "lora" in name else call.dtype), name
        if call.dtype == FP64:
            torch.testing.assert_close(value, exact[name], rtol=1e-13, atol=1e-12)
        else:
            assert_no_worse(value, exact[name], eager[name], dtype=call.dtype, name=name)
    unused = slice(call.ends[-1], None)
    assert not results["Y"][unused].any() and not results.get("dx", results["Y"])[unused].any()


def spy_on_experts(monkeypatch) -> list[tuple[int, int]]:
    """The ranges of experts that are dequantized."""
    ranges: list[tuple[int, int]] = []
    experts = NF4Experts.experts

    def noted(self, start, end, dtype):
        ranges.append((start, end))
        return experts(self, start, end, dtype)

    monkeypatch.setattr(NF4Experts, "experts", noted)
    return ranges


@pytest.mark.parametrize(
    ("wanted", "backward"), [(LEAVES, [0, 2, 3, 4]), (("lora_A", "lora_B"), [])], ids=str
)
def test_the_loop_dequantizes_one_expert_with_rows_at_a_time(wanted, backward, monkeypatch):
    call = Call("nf4 nested", wanted=wanted)
    made = operands(call)
    ranges = spy_on_experts(monkeypatch)
    run(call, made)
    assert ranges == [(place, place + 1) for place in [0, 2, 3, 4, *backward]]


@pytest.mark.parametrize(
    ("experts", "ends", "forward"),
    [
        (5, (10, 10, 33, 40, 44), [(0, 5)]),
        (2, (10, 10, 33, 40, 44), [(0, 2), (2, 4), (4, 5)]),
        (2, (0, 0, 33, 40, 40), [(2, 4)]),
        (1, (10, 10, 33, 40, 44), [(0, 1), (2, 3), (3, 4), (4, 5)]),
        # Less than one expert fits: one at a time still.
        (0, (0, 0, 0, 0, 46), [(4, 5)]),
    ],
)
def test_the_grouped_product_dequantizes_chunks(experts, ends, forward, monkeypatch):
    monkeypatch.setattr(op, "can_group", lambda x, stack: True)
    monkeypatch.setattr(grouped, "CHUNK_BYTES", experts * N * K * 2)
    call = Call("nf4", BF16, BF16, ends=ends)
    made = operands(call)
    ranges = spy_on_experts(monkeypatch)
    run(call, made)
    assert ranges == forward * 2


def test_what_pytorch_groups(monkeypatch):
    """Of a packed stack the sizes alone count: it is dequantized into memory of its own."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    x = SimpleNamespace(
        is_cuda=True, device="cuda", dtype=BF16, element_size=lambda: 2, stride=(64, 1).__getitem__,
        data_ptr=lambda: 0,
    )  # fmt: skip

    def stack_of(packed: PackedExperts) -> ExpertStack:
        count, n, k = packed.shape
        return ExpertStack(packed, None, torch.empty(count, R, k), torch.empty(count, n, R), 1.0)

    assert op.can_group(x, stack_of(nf4(2, 64, 64).packed))
    assert not op.can_group(x, stack_of(nf4(2, 64, 60, nested=False).packed))


def test_it_keeps_x_and_s_and_no_stack():
    call = Call("nf4 nested")
    made, kept = operands(call), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        arguments = [made[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
        lora_experts(*arguments, 1.7, made["offsets"])
    stored = [made["weight"].data, *made["weight"].scales]
    known = [*stored, *(made[name] for name in ("x", "lora_A", "lora_B", "offsets"))]
    addresses = {t.data_ptr() for t in known}
    assert [t.numel() for t in kept if t.data_ptr() not in addresses] == [46 * R]


def test_autocast_dequantizes_to_its_dtype():
    made = operands(Call("nf4 nested", bias=True))
    low = made | {n: made[n].detach().to(BF16).requires_grad_(n == "x") for n in ("x", "bias")}
    with torch.autocast("cpu", BF16):
        results = run(Call("nf4 nested", wanted=LEAVES), made | {"grad": made["grad"].to(BF16)})
    for name, value in run(Call("nf4 nested"), low | {"grad": made["grad"].to(BF16)}).items():
        if "lora" not in name:
            assert torch.equal(results[name].to(value.dtype), value), name


@pytest.mark.parametrize("name", ["nf4 nested", "fp8", "mxfp4"])
def test_opcheck_and_torch_compile_without_a_break(name):
    call = Call(name, bias=True)
    made = operands(call)
    with Operators() as operators:
        results = run(call, made)
    calls = [c for c in operators.calls if c[0].namespace == "stablelora_kernels"]
    assert [c[0]._opname for c in calls] == ["lora_experts_fwd", "lora_experts_bwd"]
    for operator, arguments, _ in calls:
        plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.library.opcheck(operator, plain)

    def function(x, lora_A, lora_B):
        packed, bias = made["weight"], made["bias"]
        return lora_experts(x, packed, bias, lora_A, lora_B, 1.7, made["offsets"])

    leaves = [made[leaf].detach().requires_grad_() for leaf in LEAVES]
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    y.backward(made["grad"])
    assert torch.equal(y, results["Y"])
    for leaf_name, leaf in zip(LEAVES, leaves, strict=True):
        assert torch.equal(leaf.grad, results[f"d{leaf_name}"]), leaf_name


def test_copies_and_pickles():
    packed, _ = make_stack("nf4 nested", E, N, K)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert type(copied) is NF4Experts and copied.layout == packed.layout
        assert copied.data.data_ptr() != packed.data.data_ptr()
        assert copied.experts(0, E, BF16).equal(packed.experts(0, E, BF16))


def quantized(shape=(4, 64, 64), **options):
    return functional.quantize_4bit(torch.randn(shape), blocksize=64, quant_type="nf4", **options)


def changed(**values):
    """A stack whose quant_state says something else."""
    data, state = quantized(compress_statistics="offset" in values)
    for name, value in values.items():
        setattr(state, name, value)
    return lambda: NF4Experts.from_quant_state(data, state)


def of_float8(shape=(2, 256, 128), dtype=torch.float8_e4m3fn, scales=(2, 2, 1), block=(128, 128)):
    scale_inv = torch.ones(scales)
    return lambda: FP8Experts.from_blocks(torch.zeros(shape).to(dtype), scale_inv, block)


def of_mxfp4(blocks=(2, 8, 2, 16), scales=(2, 8, 2), dtype=torch.uint8):
    return lambda: MXFP4Experts.from_blocks(
        torch.zeros(blocks, dtype=dtype), torch.zeros(scales, dtype=torch.uint8)
    )


def with_layout(**values):
    packed, _ = make_stack("nf4", 4, 64, 64)
    layout = packed.layout._replace(**values)
    return lambda: NF4Experts(packed.data, packed.scales, layout)


WRONG = [
    (
        lambda: NF4Experts.from_quant_state(*quantized((4, 6, 16))),
        ValueError,
        r"an expert must be whole blocks of 64 elements, got 6 x 16 = 96 elements",
    ),
    (changed(quant_type="int8"), ValueError, "quant_type must be 'nf4' or 'fp4', got 'int8'"),
    (changed(shape=torch.Size((256, 64))), ValueError, r"must be \[E, N, K\], got \[256, 64\]"),
    (changed(blocksize=48), ValueError, "blocksize must be a power of two, got 48"),
    (changed(absmax=torch.ones(3)), ValueError, r"absmax must be \[256\], got \[3\]"),
    (
        changed(absmax=torch.ones(256).half()),
        TypeError,
        "absmax must be torch.float32, got torch.f",
    ),
    (changed(code=torch.ones(8)), ValueError, r"code must be \[16\], got \[8\]"),
    (changed(offset=torch.ones(2)), ValueError, r"offset must be \[\], got \[2\]"),
    (changed(code=torch.ones(16, device="meta")), ValueError, "code must be on the device .* meta"),
    (
        with_layout(format=7),
        ValueError,
        r"layout.format of NF4Experts must be one of \[1, 2\], got 7",
    ),
    (with_layout(nested_blocksize=256), ValueError, "scales must be 5 tensors, got 2"),
    (with_layout(n=128), ValueError, r"data must be \[16384\], got \[8192\]"),
    (
        lambda: PackedExperts(torch.ones(4), (), Layout(3, 2, 2, 2)),
        ValueError,
        r"layout.format of PackedExperts must be one of \[\], got 3",
    ),
    (of_float8(dtype=torch.float8_e5m2), TypeError, "data must be torch.float8_e4m3fn, got .*e5m2"),
    (of_float8(scales=(2, 1, 1)), ValueError, r"scale_inv must be \[2, 2, 1\], got \[2, 1, 1\]"),
    (of_float8(block=None), ValueError, r"block_size must be \(rows, columns\), got None"),
    (of_float8(block=(0, 128)), ValueError, "block_size must be at least 1 x 1, got 0 x 128"),
    (of_float8(shape=(256, 128)), ValueError, r"data must be \[E, N, K\], got \[256, 128\]"),
    (of_mxfp4(blocks=(2, 8, 2, 8)), ValueError, r"blocks must be \[2, 8, 2, 16\], got .*, 8\]"),
    (of_mxfp4(blocks=(2, 8, 16)), ValueError, r"blocks must be \[E, N, K / 32, 16\], got"),
    (of_mxfp4(scales=(2, 8, 1)), ValueError, r"scales must be \[2, 8, 2\], got \[2, 8, 1\]"),
    (of_mxfp4(dtype=torch.int8), TypeError, "blocks must be torch.uint8, got torch.int8"),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG)
def test_stacks_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_parametrization_that_is_not_bitsandbytes_alone():
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(4, 64, 64))
    with pytest.raises(TypeError, match="weight must be computed by Bnb4bitParametrization alone"):
        NF4Experts.from_parametrization(module, "weight")
    parametrize.replace_parameter_4bit(module, "weight", compress_statistics=True)
    packed = NF4Experts.from_parametrization(module, "weight")
    assert packed.experts(0, 4, FP32).equal(module.weight)
    assert packed.data.data_ptr() == module.parametrizations.weight.original.data_ptr()
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    with pytest.raises(TypeError, match="got Bnb4bitParametrization and Identity"):
        NF4Experts.from_parametrization(module, "weight")


def test_the_module_of_transformers():
    config = SimpleNamespace(
        hidden_size=256, moe_intermediate_size=128, num_experts=2, hidden_act="silu"
    )
    module = fp8.FP8Experts(config, block_size=(128, 128))
    assert module.gate_up_proj.requires_grad
    packed = FP8Experts.from_module(module, "gate_up_proj")
    # A packed stack is frozen.
    assert packed.shape == (2, 256, 256) and not packed.scales[0].requires_grad
    per_tensor = fp8.FP8Experts(config, block_size=None)
    with pytest.raises(ValueError, match="block_size must be"):
        FP8Experts.from_module(per_tensor, "down_proj")
    fp4 = fp8.FP8Experts(config, block_size=(128, 128), expert_dtype="fp4")
    with pytest.raises(TypeError, match=r"data must be torch.float8_e4m3fn, got torch.int8"):
        FP8Experts.from_module(fp4, "down_proj")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": torch.ones(46, 63)},
            ValueError,
            r"x must be \[T, 64\] to fit weight \[5, 96, 64\], got \[46, 63\]",
        ),
        (
            {"lora_A": torch.ones(4, R, K)},
            ValueError,
            r"lora_A must be \[5, r, 64\] to fit weight \[5, 96, 64\], got \[4, 3, 64\]",
        ),
        ({"lora_B": torch.ones(E, N, 2)}, ValueError, r"lora_B must be \[5, 96, 3\] .* got"),
        ({"x": torch.ones(46, K, device="meta")}, ValueError, "weight must be on x's device meta"),
        (
            {"x": torch.ones(46, K).half(), "bias": torch.ones(E, N)},
            TypeError,
            "bias must have x's",
        ),
        ({"weight": [1]}, TypeError, "weight must be a Tensor or PackedExperts, got list"),
    ],
)
def test_calls_that_do_not_fit(changes, error, message):
    made = operands(Call("nf4 nested"))
    names = ("x", "weight", "bias", "lora_A", "lora_B", "offsets")
    good: dict[str, Any] = {name: made[name] for name in names} | {"scaling": 1.7}
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        lora_experts(**good | changes, dropout_p=0.3)
    assert torch.equal(state, torch.get_rng_state())
