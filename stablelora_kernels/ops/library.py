"""The namespace of the torch.library ops."""

from __future__ import annotations

NAMESPACE = "stablelora_kernels"
