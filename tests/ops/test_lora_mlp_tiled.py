"""``lora_mlp(tiled=True)``: what it keeps, its products under checkpoints, its peak, and its tiles.
Its numbers are in test_ops_oracle.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.functional import LoRAWeights, lora_mlp
from stablelora_kernels.ops import formulas
from stablelora_kernels.ops.lora_mlp.call import TILE_ALIGNMENT, TILE_BYTES, rows_of_tile
from stablelora_kernels.ops.matrices import row_tiles
from stablelora_kernels.testing.cases import BF16, FP32, FP64, forced, leaves, make, ours, run
from stablelora_kernels.testing.ops.lora_mlp import MLP
from stablelora_kernels.utils.memory import peak_over_start
from tests.helpers.case_checks import assert_close, held_by
from tests.helpers.cases import small

MIB = 1 << 20
# Rows of x and of a tile; there are five tiles.
ROWS, TILE = 150, 32


def tiled(**changes):
    return small("tiled mlp", ROWS, **changes)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_x_alone_is_kept(dtype, p, backend):
    """And of dropout a seed for each tile and projection."""
    case = tiled(dtype=dtype, lora_dtype=dtype, p=p, backend=backend)
    x = ROWS * case.shape[-1] * dtype.itemsize
    seeds = 5 * 3 * 2 * 8 if p else 0
    assert held_by(case) == seeds
    assert held_by(case.but(op="mlp")) >= 2 * ROWS * case.sizes[0] * dtype.itemsize > x


@pytest.fixture
def wide(monkeypatch):
    """The rows of each product with a weight."""
    rows = []
    for name in ("wide_product", "add_wide_product"):
        own = getattr(formulas, name)

        def counted(*args, own=own):
            # The first argument of both has the rows of the product.
            rows.append(args[0].shape[0])
            return own(*args)

        monkeypatch.setattr(formulas, name, counted)
    return rows


# Forward 3; G and U again 2, or a layer's forward again 3; gradients 3.
PRODUCTS = {
    ("tiled mlp", None): 3 + 2 + 3,
    ("tiled mlp", False): 3 + 2 + 3,
    ("tiled mlp", True): 3 + 3 + 2 + 3,
    ("mlp", None): 3 + 3,
    ("mlp", False): 3 + 3 + 3,
    ("mlp", True): 3 + 3 + 3,
}


@pytest.mark.parametrize(("op", "reentrant"), PRODUCTS)
def test_wide_products(op, reentrant, wide):
    """``reentrant``: the kind of checkpoint; None is no checkpoint. Behind the MLP nothing saves its
    output, as where a layer adds it to its residual.
    """
    case = small(op, ROWS, dtype=FP64, lora_dtype=FP64, p=0.0, backend="torch")
    given = make(case)

    def layer(x, leaf):
        return ours(case, leaf | {"x": x.sin()})[0] + 1.0

    def call(case, leaf):
        if reentrant is None:
            return (layer(leaf["x"], leaf),)
        return (checkpoint(layer, leaf["x"], leaf, use_reentrant=reentrant),)

    run(case, given, call)
    assert sum(wide) == PRODUCTS[op, reentrant] * ROWS


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_x_without_a_gradient(p, backend):
    """There is no node in front that could save it."""
    case = tiled(p=p, backend=backend)
    found = run(case)
    del found["x"]
    assert_close(run(case.but(wanted=["lora_A", "lora_B"])), found)


def test_sums_over_tiles_are_rounded_once():
    """dA and dB of bfloat16 are the nearest to those of float32 A and B of the same values."""
    case = tiled(dtype=BF16, lora_dtype=BF16, backend="torch").but(op=MLP(tile_rows=8))
    given = make(case)
    wide = {name: t.float() if name.startswith("lora_") else t for name, t in given.items()}
    found = run(case, given)
    expected = run(case.but(lora_dtype=FP32), wide)
    for name in case.wanted_names:
        if name.startswith("lora_"):
            assert torch.equal(found[name], expected[name].to(BF16)), name


def test_a_forward_without_gradients_draws_the_same_masks(backend):
    case = tiled(p=0.4, backend=backend)
    given = make(case)
    with torch.no_grad(), forced(case):
        torch.manual_seed(case.seed)
        (y,) = ours(case, given)
    assert torch.equal(y, run(case, given)["Y0"])


def test_a_second_backward_and_one_of_a_part_alone(backend):
    """Though A's gradient alone does not reach the node that has saved x."""
    case = tiled(p=0.3, backend=backend)
    leaf = leaves(case, make(case))
    with forced(case):
        (y,) = ours(case, leaf)
        every = torch.autograd.grad(
            y, [leaf[name] for name in case.wanted_names], leaf["grad2"], retain_graph=True
        )
        (alone,) = torch.autograd.grad(y, leaf["lora_A0"], leaf["grad2"])
    assert torch.equal(alone, every[case.wanted_names.index("lora_A0")])


def weights(k, f, n, r=16):
    generator = torch.Generator().manual_seed(0)

    def projection(out, inn):
        w, a, b = (
            torch.randn(size, generator=generator) / inn**0.5
            for size in ((out, inn), (r, inn), (out, r))
        )
        return LoRAWeights(w, None, a.requires_grad_(), b.requires_grad_(), 0.5)

    return [projection(f, k), projection(f, k), projection(n, f)]


def test_the_peak_of_a_layer():
    """Of a checkpointed layer of 512 x 1792 with 8,192 tokens in float32: norm, MLP, residual."""
    k, f, rows = 512, 1792, 8192
    parts = weights(k, f, k)
    x = torch.randn(rows, k, requires_grad=True)
    grad = torch.randn(rows, k)
    norm = torch.nn.LayerNorm(k)

    def peak(tiles):
        def layer(x):
            return x + lora_mlp(norm(x), *parts, "silu", tiled=tiles)

        def step():
            checkpoint(layer, x, use_reentrant=False).backward(grad)
            x.grad = None

        step()
        return peak_over_start(step, torch.device("cpu")) / MIB

    with slk.settings(backend="torch"):
        assert peak(True) <= 77
        # One of the wide tensors has 56 MiB.
        assert peak(False) >= 5 * 56


def test_how_many_rows_a_tile_has():
    x = torch.empty(3, 0, 64, dtype=BF16)
    for device, allowed in TILE_BYTES.items():
        rows = rows_of_tile(x.to("meta") if device == "cuda" else x, 4096, True)
        assert rows % TILE_ALIGNMENT == 0
        assert 5 * 4096 * 2 * rows <= allowed < 5 * 4096 * 2 * (rows + TILE_ALIGNMENT)
    assert rows_of_tile(x, 1 << 40, True) == TILE_ALIGNMENT
    assert rows_of_tile(x, 4096, 7) == 7
    assert [tile.rows for tile in row_tiles(7, 3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [*row_tiles(0, 3)] == []
    assert [tile.rows for tile in row_tiles(2, 3)] == [slice(0, 2)]


def test_true_is_not_one_row(wide):
    """Though they are equal, and so would be the keys of two calls."""
    parts, x = weights(24, 40, 24, 4), torch.randn(70, 24)
    with slk.settings(backend="torch"):
        for tiles, calls in ((True, 1), (1, 70), (True, 1)):
            wide.clear()
            lora_mlp(x, *parts, "silu", tiled=tiles)
            assert len(wide) == 3 * calls


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "tiled must be at least 1, got 0"),
        ("yes", TypeError, "tiled must be a bool or a tile's rows, got 'yes' of type str"),
    ],
)
def test_bad_tiles(value, error, message):
    with pytest.raises(error, match=message):
        lora_mlp(torch.randn(70, 24), *weights(24, 40, 24, 4), "silu", tiled=value)
