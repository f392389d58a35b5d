from __future__ import annotations

from collections.abc import Iterator

import pytest

from stablelora_kernels.dispatch.settings import use_backend


@pytest.fixture
def on_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield
