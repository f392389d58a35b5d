"""Hypothesis profiles: "ci", the default, runs the same few cases each time, "nightly" 20,000 new
ones.

``SLK_FUZZ=nightly python -m pytest -m fuzz`` runs the latter.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The interpreter takes its time, and a busy machine more: no case is too slow.
_SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile(
    "ci", derandomize=True, max_examples=30, stateful_step_count=10, database=None, **_SLOW
)
settings.register_profile(
    "nightly", max_examples=20_000, stateful_step_count=20, print_blob=True, **_SLOW
)
settings.load_profile(os.environ.get("SLK_FUZZ", "ci"))
