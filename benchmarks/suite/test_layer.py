"""One layer, projections that share x, and a gated MLP: forward, backward and both, over shapes,
ranks and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from benchmarks.suite.host import PRECISIONS, HostLayerCase
from benchmarks.suite.layers import STORED, LayerCase, MLPCase, ProjectionsCase
from benchmarks.suite.rivals import Case

# Rows, in_features, out_features, rank. The first two are our targets.
QUICK = [(1024, 1024, 1024, 8), (512, 2048, 2048, 16), (16, 2048, 2048, 16)]
FULL = [
    *QUICK, (2048, 576, 576, 8), (1024, 576, 192, 8), (128, 2048, 2048, 16), (1024, 1024, 1024, 64), (1, 2048, 2048, 16),
]  # fmt: skip
# q, k, v and gate, up of SmolLM2-135M, and of a wider model.
PROJECTIONS = [
    (2048, 576, (576, 192, 192), 8),
    (2048, 576, (1536, 1536), 8),
    (512, 2048, (2048, 512, 512), 16),
    (128, 2048, (2048, 512, 512), 16),
    (8, 2048, (2048, 512, 512), 16),
]
# Tokens, width, the activation's width and rank: SmolLM2-135M's MLP, and a wider one.
MLPS = [(2048, 576, 1536, 16), (512, 1024, 2816, 16)]
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HOST_ROWS = (1, 16, 512, 4096)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


def cases(suite: str, device: torch.device) -> list[Case]:
    if suite == "tiny":
        return [
            LayerCase(8, 16, 24, 2, "fp32", device),
            ProjectionsCase(8, 16, (24, 8), 2, "fp32", device),
            HostLayerCase(device, 8),
            MLPCase(96, 16, 24, 2, "fp32", device, 0.1),
            *(
                LayerCase(8, width, width, 2, "fp32", device, axis="width")
                for width in (16, 32, 64)
            ),
        ]
    found: list[Case] = [
        LayerCase(*shape, dtype, device)
        for shape, dtype in product(QUICK if suite == "quick" else FULL, STORED)
    ]
    found += [HostLayerCase(device, rows, dropout=p) for rows, p in product(HOST_ROWS, (0.0, 0.1))]
    found += [
        HostLayerCase(device, rows, precision=how)
        for rows, how in product((16, 512), [*PRECISIONS][1:])
    ]
    found += [
        HostLayerCase(device, rows, kind)
        for rows, kind in product((16, 512, 4096), ("group", "branch", "mlp"))
    ]
    found += [
        HostLayerCase(device, rows, "96 layers", p) for rows, p in product((16, 512), (0.0, 0.1))
    ]
    found += [MLPCase(*shape, "fp32", device, p) for shape, p in product(MLPS, (0.0, 0.1))]
    found += [MLPCase(256, *MLPS[0][1:], "bf16", device, p) for p in (0.0, 0.1)]
    found += [LayerCase(512, width, width, 16, "fp32", device, axis="width") for width in WIDTHS]
    found += [LayerCase(512, 2048, 2048, r, "fp32", device, axis="rank") for r in RANKS]
    found += [LayerCase(rows, 1024, 1024, 16, "fp32", device, axis="tokens") for rows in TOKENS]
    if suite == "full":
        found += [LayerCase(*shape, dtype, device, 0.1) for shape, dtype in product(FULL, STORED)]
        found += [
            ProjectionsCase(*shape, dtype, device)
            for shape, dtype in product(PROJECTIONS, ("fp32", "bf16"))
        ]
    return found


def test_layer(compare: Callable[[], None]) -> None:
    compare()
