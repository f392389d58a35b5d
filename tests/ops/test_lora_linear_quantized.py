"""``lora_linear`` with a quantized weight against the float64 oracle, bounded by eager PyTorch's error on the weight in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.dispatch import problem, rules, tiles
from stablelora_kernels.dispatch.problem import DEVICES, Call
from stablelora_kernels.dispatch.rules import QUANTIZED_RULES, QuantizedRule
from stablelora_kernels.dispatch.tiles import Tile, TileRule
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.launch.dry_run import quantized_launches
from stablelora_kernels.quantized import FP8Weight, NF4Weight
from stablelora_kernels.testing import fp8_weight, nf4_weight
from tests.helpers.inputs import BF16, DEVICE, DTYPES, FP16, FP32, SCALING, make_inputs
from tests.helpers.launches import count_launches
from tests.helpers.oracle import bytes_held, call, check, check_compiled, leaves, oracle, run, run_dropped

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

FORMATS = {
    "nf4": lambda n, k: nf4_weight(n, k, 64, nested=False),
    "nf4 nested": lambda n, k: nf4_weight(n, k, 64, nested=True),
    "nf4 128 nested": lambda n, k: nf4_weight(n, k, 128, nested=True),
    "fp8": fp8_weight,
}
# One of 4 bits with all its tensors and one of 8 bits; the others at night.
EACH_LAYOUT = [
    kind if kind in ("nf4 nested", "fp8") else pytest.param(kind, marks=pytest.mark.nightly) for kind in FORMATS
]
# x's shape, out_features, r: blocks and bytes within rows and across them, odd, single and empty.
SHAPES = [
    ((1, 1), 1, 1),
    ((5, 128), 53, 3),
    ((2, 3, 37), 17, 20),
    ((0, 64), 8, 4),
    ((70, 192), 40, 20),
    ((67, 100), 71, 3),
]


def inputs_for(weight: NF4Weight | FP8Weight, shape, r: int, dtype=BF16, lora_dtype=FP32) -> dict[str, Tensor | None]:
    inputs = make_inputs(shape, weight.shape[0], r, dtype=dtype, lora_dtype=lora_dtype, bias=r != 3)
    return inputs | {"weight": weight}


@pytest.fixture
def force(monkeypatch):
    """Makes dispatch choose one of the two ways for every call."""

    def choose(kernel: str) -> None:
        monkeypatch.setattr(rules, "QUANTIZED_RULES", (QuantizedRule(lambda d, c, bits: True, kernel, "a test"),))

    return choose


@pytest.mark.parametrize("kernel", ["in_loop", "dequantize"])
def test_nan_in_float8_stays_nan(kernel, force):
    """0x7F and 0xFF are float8's NaN. Read as one number more they would be 480 and -480."""
    force(kernel)
    weight = fp8_weight(24, 72)
    weight.data.view(torch.uint8)[[3, 9], [7, 40]] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    out = run(inputs_for(weight, (5, 72), 4), "triton")
    assert out["Y"].isnan().all(0).nonzero().flatten().tolist() == [3, 9]
    assert out["dX"].isnan().all(0).nonzero().flatten().tolist() == [7, 40]
    assert out["Y"].isnan().sum() == out["dX"].isnan().sum() == 2 * 5


@pytest.mark.covering
@pytest.mark.parametrize(("dtype", "lora_dtype"), DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "n", "r"), SHAPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_matches_the_oracle(kind, shape, n, r, dtype, lora_dtype, backend):
    inputs = inputs_for(FORMATS[kind](n, shape[-1]), shape, r, dtype, lora_dtype)
    check(inputs, run(inputs, backend))


@pytest.mark.covering
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", ["in_loop", "dequantize"])
@pytest.mark.parametrize(("rows", "k", "n"), [(3, 128, 96), (150, 192, 128), (20, 100, 53)])
@pytest.mark.parametrize("kind", FORMATS)
def test_both_ways_on_each_kind_of_gpu(kind, rows, k, n, kernel, arch, force, monkeypatch):
    monkeypatch.setattr(problem, "device_of", lambda device: DEVICES[arch])
    force(kernel)
    inputs = inputs_for(FORMATS[kind](n, k), (rows, k), 6)
    check(inputs, run(inputs, "triton"))


@pytest.mark.covering
@pytest.mark.parametrize("tile", [Tile(16, 32, 16, 4, 2), Tile(16, 128, 256, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_narrower_and_wider_than_tiles(kind, tile, dtype, force, monkeypatch):
    """With several blocks in a tile and several tiles in a block, in both directions, whose last tiles stand out."""
    monkeypatch.setattr(tiles, "QUANTIZED_TILES", (TileRule(lambda d, c: True, tile, "a test"),))
    force("in_loop")
    inputs = inputs_for(FORMATS[kind](40, 384), (20, 384), 20, dtype)
    check(inputs, run(inputs, "triton"))


@pytest.mark.parametrize("kind", EACH_LAYOUT)
def test_programs_that_share_a_sum(kind):
    """Few tiles and a long sum: the launcher gives a tile to two programs, forward and backward."""
    size = 17 * 64
    for launches in quantized_launches(DEVICES["sm_90"], 5, size, size, 6, BF16, FP32, 0.0, kind.split()[0]):
        assert [launch.grid for launch in launches if "quantized" in launch.kernel.__name__] == [(17 * 2,)]
    inputs = inputs_for(FORMATS[kind](size, size), (5, size), 6)
    first, second = run(inputs, "triton"), run(inputs, "triton")
    check(inputs, first)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.covering
@pytest.mark.parametrize("kernel", ["in_loop", "dequantize"])
@pytest.mark.parametrize(("shape", "n", "r"), [((5, 37), 53, 3), ((70, 128), 96, 20)])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_dropout_in_the_kernels_is_the_reference_mask(kind, shape, n, r, dtype, kernel, force):
    force(kernel)
    inputs = inputs_for(FORMATS[kind](n, shape[-1]), shape, r, dtype)
    check(inputs, *run_dropped(inputs, "triton", 0.3))


@pytest.mark.parametrize("rows", [5, 70])
def test_dropout_on_pytorch_uses_one_mask_in_both_directions(rows):
    inputs = inputs_for(nf4_weight(20, 64, 64, nested=True), (rows, 64), 6)
    check(inputs, *run_dropped(inputs, "torch", 0.3))


WANTED = {"x": ["x"], "A": ["lora_A"], "B": ["lora_B"], "bias": ["bias"], "xAB": ["x", "lora_A", "lora_B"]}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_only_requested_gradients(wanted, backend):
    inputs = inputs_for(nf4_weight(20, 64, 64, nested=False), (70, 64), 6, FP32)
    full = run(inputs, backend)
    every = {"x": full["dX"], "lora_A": full["dA"], "lora_B": full["dB"], "bias": inputs["grad"].sum(0)}
    given = leaves(inputs, wanted)
    grads = torch.autograd.grad(call(given), [given[name] for name in wanted], inputs["grad"])
    for name, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad, every[name])


@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.0), (300, 0.25)])
def test_the_graph_never_holds_the_weight_in_full(rows, p, backend):
    n, k, r = 96, 128, 4
    given = leaves(inputs_for(nf4_weight(n, k, 64, nested=True), (rows, k), r, FP32))
    arguments = [given[name] for name in ("x", "lora_A", "lora_B")]
    held = bytes_held(lambda: call(given, p), (*arguments, *given["weight"].stored.scales))
    mask = 0 if not p else 8 if backend == "triton" else rows * k
    assert held == rows * r * 4 + n * k // 2 + mask


@pytest.mark.covering
@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.3)])
@pytest.mark.parametrize("kind", ["nf4 nested", "fp8"])
def test_torch_compile_has_no_graph_break(kind, rows, p, backend):
    inputs = inputs_for(FORMATS[kind](20, 64), (rows, 64), 6, FP32)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, inputs["weight"], inputs["bias"], a, b, SCALING, p)

    check_compiled(function, [inputs[name] for name in ("x", "lora_A", "lora_B")], inputs["grad"])


@pytest.mark.parametrize("kind", EACH_LAYOUT)
def test_ops_pass_opcheck(kind):
    stored = FORMATS[kind](20, 64).stored
    inputs = inputs_for(FORMATS[kind](20, 64), (9, 64), 6, FP32)
    x, bias, a, b, grad = (inputs[n] for n in ("x", "bias", "lora_A", "lora_B", "grad"))
    seed, s = torch.tensor([3], device=DEVICE), torch.randn(9, 6, device=DEVICE)
    library = torch.ops.stablelora_kernels
    for p, random in ((0.0, None), (0.3, seed)):
        for save_s in (True, False):
            args = (x, *stored, bias, a, b, random, SCALING, p, save_s)
            torch.library.opcheck(library.lora_linear_quantized_fwd.default, args)
        for need in ((True, True), (True, False), (False, True), (False, False)):
            args = (x, grad, *stored, a, b, s, random, SCALING, p, *need)
            torch.library.opcheck(library.lora_linear_quantized_bwd.default, args)


def test_autocast_and_double_precision(backend):
    weight = nf4_weight(20, 64, 64, nested=True)
    inputs = inputs_for(weight, (70, 64), 6, FP32)
    with torch.autocast(DEVICE, BF16):
        y = call(inputs)
    assert torch.equal(y, call(inputs | {name: inputs[name].to(BF16) for name in ("x", "bias")}))
    double = make_inputs((70, 64), 20, 6, dtype=torch.float64) | {"weight": weight}
    if backend == "torch":
        ref = oracle(double)
        for name, value in run(double).items():
            torch.testing.assert_close(value, ref[name], rtol=1e-12, atol=1e-12)
    else:
        with pytest.raises(TypeError, match=r"x is torch\.float64"):
            run(double)


def test_errors_name_both_values():
    weight = fp8_weight(20, 64)
    inputs = inputs_for(weight, (5, 64), 6, FP32)
    args = [inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    with pytest.raises(ValueError, match=r"x must be \[..., 64\] to fit weight \[20, 64\], got \[5, 63\]"):
        lora_linear(args[0][:, :63], *args[1:], SCALING)
    with pytest.raises(TypeError, match=r"bias must have x's dtype torch\.float32, got torch\.bfloat16"):
        lora_linear(*args[:2], args[2].to(BF16), *args[3:], SCALING)
    meta = FP8Weight(weight.data.to("meta"), weight.scale.to("meta"))
    with pytest.raises(ValueError, match="weight must be on x's device cpu, got meta"):
        lora_linear(args[0], meta, *args[2:], SCALING)


# Which way.


@pytest.mark.parametrize(
    ("direction", "m", "bits", "dtype", "kernel"),
    [
        ("forward", 1, 4, BF16, "in_loop"),
        ("forward", 256, 4, BF16, "in_loop"),
        ("forward", 257, 8, FP16, "dequantize"),
        ("forward", 16, 4, FP32, "in_loop"),
        ("forward", 17, 4, FP32, "dequantize"),
        ("backward", 128, 4, BF16, "in_loop"),
        ("backward", 129, 4, BF16, "dequantize"),
        ("backward", 256, 8, BF16, "in_loop"),
        ("backward", 257, 8, BF16, "dequantize"),
    ],
)
def test_the_table(direction, m, bits, dtype, kernel):
    call = Call(direction, m, 4096, 4096, 16, dtype, FP32, False)
    choice = rules.choose_quantized(DEVICES["sm_90"], call, bits)
    assert choice.kernel == kernel
    assert choice.reason in [rule.reason for rule in QUANTIZED_RULES]
    with slk.use_kernel("split"):
        forced = rules.choose_quantized(DEVICES["sm_90"], call, bits)
    assert forced.kernel == "dequantize" and "'split' is forced" in forced.reason


@pytest.mark.parametrize(("weight", "kernel"), [
    (nf4_weight(8, 128, 64, nested=True), "in_loop"),
    (nf4_weight(8, 64, 128, nested=True), "dequantize"),
    (nf4_weight(8, 37, 64, nested=False), "dequantize"),
    (fp8_weight(8, 48), "in_loop"),
    (fp8_weight(8, 40), "dequantize"),
])  # fmt: skip
def test_rows_that_begin_anywhere_are_dequantized_first(weight, kernel):
    call = Call("forward", 1, *weight.shape, 4, BF16, FP32, False)
    layout = weight.stored.layout
    assert rules.choose_quantized(DEVICES["sm_90"], call, layout.bits, layout.aligned).kernel == kernel
    inputs = inputs_for(weight, (1, weight.shape[1]), 4)
    with count_launches() as made:
        check(inputs, run(inputs, "triton"))
    assert made["_dequantize_kernel"] == (2 if kernel == "dequantize" else 0)
