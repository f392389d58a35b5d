"""Fused LoRA layers and the Stable-LoRA optimizer for PyTorch, in Triton."""

from stablelora_kernels import functional, reference
from stablelora_kernels._version import __version__
from stablelora_kernels.backend import get_backend, set_backend, use_backend
from stablelora_kernels.nn import LoRALinear
from stablelora_kernels.pairs import LoRAPair, lora_pairs

__all__ = [
    "LoRALinear",
    "LoRAPair",
    "__version__",
    "functional",
    "get_backend",
    "lora_pairs",
    "reference",
    "set_backend",
    "use_backend",
]
