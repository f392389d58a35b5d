"""A layer's forward and backward taken apart: each job as a launch of its own, and together.

``times`` times them, and the summary has the times and their differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.lab.gpu.device import Run
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.base import VendorProduct
from stablelora_kernels.launch.fill_jobs import Product, backward_product, forward_product
from stablelora_kernels.launch.lora_linear import linear, product_launches
from stablelora_kernels.launch.thin_products import lora_down, weight_grads
from stablelora_kernels.projection import Projection

BF16 = torch.bfloat16
VENDOR, FIRST, FIRST_BACKWARD = "vendor's product", "branch first", "branch first, backward"
ONE_LAUNCH, ONE_LAUNCH_BACKWARD = "S and Y in one", "all of backward in one"
# Differences of two of the parts.
DIFFERENCES = {
    "our product, less the vendor's": ("product", VENDOR),
    "the branch onto Y": ("Y from S", "product"),
    "S beside Y": (ONE_LAUNCH, "Y from S"),
    "the mask's stores": ("S", "S, its mask not stored"),
    "dB beside dS": ("dS and dB", "dS"),
    "dA's tail": ("dX and dA", "dX"),
    "dS and dB beside dX and dA": (ONE_LAUNCH_BACKWARD, "dX and dA"),
    "one launch, less branch first": (ONE_LAUNCH, FIRST),
    "one launch, less branch first, backward": (ONE_LAUNCH_BACKWARD, FIRST_BACKWARD),
}


class Shape(NamedTuple):
    """A layer in bfloat16: [m, k] to [m, n] at rank r, with dropout of probability p."""

    m: int
    n: int
    k: int
    r: int
    p: float


SHAPES = [Shape(m, 4096, 4096, 16, p) for m, p in product((2048, 4096, 8192), (0.1, 0.0))]


class UnavailableError(Exception):
    """This version of the package has no such launch. The message says why."""


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
    (a, b, da, db) = (make(*size, dtype=BF16) for size in ((s.r, s.k), (s.n, s.r)) * 2)
    w = make(s.n, s.k, dtype=BF16)
    low, ds = (make(s.m, s.r, dtype=BF16) for _ in "12")
    seed = make(1, dtype=torch.int64) if s.p else None
    mask = make(s.m, cdiv(s.k, 32), dtype=torch.int32) if s.p else None
    projection, bare = Projection(w, None, a, b, 1.0), Projection(w, None, a[:0], b[:, :0], 1.0)
    forward = forward_product(x, projection, y, s=low, seed=seed, mask=mask, dropout_p=s.p)
    backward = backward_product(
        x, dy, projection, s=low, mask=mask, dropout_p=s.p, dx=dx, da=da, db=db, ds=ds
    )
    of_product = forward_product(x, bare, y, s=None, seed=None, mask=None, dropout_p=0.0)
    return Calls(forward, of_product, backward)


def launches(device: Device, of: Calls) -> dict[str, Any]:
    """The single launches of a layer's products, by name."""
    forward, of_product, backward = of
    without_db = backward._replace(db=None)
    by_name = {
        "product": linear(device, of_product, None),
        VENDOR: product_launches(device, of_product, Choice("branch_first", ""))[0],
        "S": lora_down(device, [forward]),
        "Y from S": linear(device, forward, None),
        ONE_LAUNCH: linear(device, forward, None, chained=True),
        "dS": lora_down(device, [without_db]),
        "dS and dB": lora_down(device, [backward]),
        "dX": linear(device, without_db._replace(da=None), None),
        "dX and dA": linear(device, without_db, None),
        "dA": weight_grads(device, [without_db]),
        ONE_LAUNCH_BACKWARD: linear(device, backward, None, chained=True),
    }
    if forward.seed is not None:
        by_name["S, its mask not stored"] = lora_down(device, [forward._replace(mask=None)])
    return by_name


def branch_first(device: Device, p: Product) -> list[Any]:
    """The launches of the strategy "branch_first", in which the product, the last, adds to the branch.

    Raises:
        UnavailableError: this version adds the branch to the product instead.
    """
    ordered = product_launches(device, p, Choice("branch_first", ""))
    last = ordered[-1]
    if not (isinstance(last, VendorProduct) and last.add):
        raise UnavailableError("this version has no strategy in which the branch comes first")
    return ordered


def run_all(ordered: Sequence[Any], on: torch.device) -> None:
    for launch in ordered:
        launch.run(on)


def runs(
    device: Device, on: torch.device, s: Shape, make: Callable[..., Tensor]
) -> dict[str, Callable[[], Run]]:
    """How to build each part's run, by name; building may raise UnavailableError."""
    of = calls(s, make)

    def first(p: Product) -> Run:
        return partial(run_all, branch_first(device, p), on)

    by_name: dict[str, Callable[[], Run]] = {
        # The launch holds its operands.
        name: partial(partial, launch.run, on)
        for name, launch in launches(device, of).items()
    }
    return by_name | {
        FIRST: partial(first, of.forward),
        FIRST_BACKWARD: partial(first, of.backward),
    }
