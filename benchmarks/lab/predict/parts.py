"""A layer's forward and backward taken apart: each job as a launch of its own, and together.

``benchmarks.lab.gpu`` times them beside the predictions made here, so that a difference names the
estimate that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.lab.predict.ceilings import Gpu, Range, points, range_over
from benchmarks.lab.predict.launch_time import facts
from benchmarks.lab.predict.rivals import BF16, Shape
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.fill_jobs import Product, backward_product, forward_product
from stablelora_kernels.launch.lora_linear import linear, product_launches
from stablelora_kernels.launch.thin_products import lora_down, weight_grads
from stablelora_kernels.projection import Projection

SHAPES = [
    Shape(m, 4096, 4096, 16, p, wide_adapters=False)
    for m, p in product((2048, 4096, 8192), (True, False))
]
VENDOR = "vendor's product"
# Differences of two of the parts.
DIFFERENCES = {
    "the branch onto Y": ("Y from S", "product"),
    "S beside Y": ("S and Y in one", "Y from S"),
    "the mask's stores": ("S", "S, its mask not stored"),
    "dB beside dS": ("dS and dB", "dS"),
    "dA's tail": ("dX and dA", "dX"),
    "dS and dB beside dX and dA": ("all of backward in one", "dX and dA"),
}


class Calls(NamedTuple):
    """A layer's products: Y, Y without a branch, and dX with the gradients of A and B."""

    forward: Product
    bare: Product
    backward: Product


def calls(s: Shape, make: Callable[..., Tensor]) -> Calls:
    """``make`` takes sizes and ``dtype`` and returns a tensor of random values, or of zeros if it is
    of integers.
    """
    x, y, dy, dx = (make(s.m, columns, dtype=BF16) for columns in (s.k, s.n, s.n, s.k))
    (a, b, da, db) = (make(*size, dtype=s.lora_dtype) for size in ((s.r, s.k), (s.n, s.r)) * 2)
    w = make(s.n, s.k, dtype=BF16)
    low, ds = (make(s.m, s.r, dtype=BF16) for _ in "12")
    seed = make(1, dtype=torch.int64) if s.dropout else None
    mask = make(s.m, cdiv(s.k, 32), dtype=torch.int32) if s.dropout else None
    projection, bare = Projection(w, None, a, b, 1.0), Projection(w, None, a[:0], b[:, :0], 1.0)
    forward = forward_product(x, projection, y, s=low, seed=seed, mask=mask, dropout_p=s.p)
    backward = backward_product(
        x, dy, projection, s=low, mask=mask, dropout_p=s.p, dx=dx, da=da, db=db, ds=ds
    )
    of_product = forward_product(x, bare, y, s=None, seed=None, mask=None, dropout_p=0.0)
    return Calls(forward, of_product, backward)


def launches(device: Device, s: Shape, make: Callable[..., Tensor]) -> dict[str, Any]:
    """By name, of operands of their own, see :func:`calls`."""
    return launches_of(device, calls(s, make))


def launches_of(device: Device, of: Calls) -> dict[str, Any]:
    """By name: the launches of a layer's products."""
    forward, of_product, backward = of
    without_db = backward._replace(db=None)
    found = {
        "product": linear(device, of_product, None, load_s=True),
        VENDOR: product_launches(device, of_product, Choice("vendor", ""))[0],
        "S": lora_down(device, [forward]),
        "Y from S": linear(device, forward, None, load_s=True),
        "S and Y in one": linear(device, forward, None, load_s=True, chained=True),
        "dS": lora_down(device, [without_db]),
        "dS and dB": lora_down(device, [backward]),
        "dX": linear(device, without_db._replace(da=None), None, load_s=True),
        "dX and dA": linear(device, without_db, None, load_s=True),
        "dA": weight_grads(device, [without_db]),
        "all of backward in one": linear(device, backward, None, load_s=True, chained=True),
    }
    return found | (
        {"S, its mask not stored": lora_down(device, [forward._replace(mask=None)])}
        if forward.seed is not None
        else {}
    )


def on_meta(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def predicted(gpu: Gpu, s: Shape) -> dict[str, Range]:
    """Microseconds of parts and of their differences."""
    at_points: dict[str, tuple[float, ...]] = {}
    for name, launch in launches(gpu.device, s, on_meta).items():
        known = facts(launch, gpu.arch, gpu.narrow_columns)
        at_points[name] = tuple(1e6 * known.seconds(point) for point in points(gpu))
    at_points |= differences(at_points)
    return {name: range_over(times) for name, times in at_points.items()}


def differences(times: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Of ``DIFFERENCES``, those whose two parts are in ``times``."""
    return {
        name: tuple(x - y for x, y in zip(times[more], times[less], strict=True))
        for name, (more, less) in DIFFERENCES.items()
        if more in times and less in times
    }
