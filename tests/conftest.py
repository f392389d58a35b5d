"""The kernels' tests run on a GPU where there is one, and in Triton's interpreter elsewhere."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this as it is imported, so it must be set before any test module imports a kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Two processes of tests on two cores must not fight for them.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture
def poisoned_outputs():
    """Memory that an operator allocates and does not write holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
