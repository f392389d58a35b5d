"""Matrices that reach further than 32 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture
def spacious(tmp_path: Path):
    """Turns a small matrix into an equal view with rows 2^26 elements apart, on a file of holes, of which few pages are real."""
    made = []

    def spread(matrix: Tensor, stride: int = 2**26) -> Tensor:
        rows, cols = matrix.shape
        elements = (rows - 1) * stride + cols
        bits = {2: np.uint16, 4: np.uint32}[matrix.element_size()]
        path = tmp_path / f"{len(made)}.bin"
        holes = np.memmap(path, dtype=bits, mode="w+", shape=(elements,))
        view = torch.from_numpy(holes).view(matrix.dtype).as_strided((rows, cols), (stride, 1))
        view.copy_(matrix)
        made.append(path)
        return view

    yield spread
    # A few pages a row, not the gigabytes that the sizes say.
    assert all(path.stat().st_blocks * 512 < 2**24 < path.stat().st_size for path in made)
