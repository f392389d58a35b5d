"""What a function returns in place of its answer if it has none: the reason."""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """No, because ``reason``: words for a report, or for the end of a sentence about a layer."""

    reason: str
