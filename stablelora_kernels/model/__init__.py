"""LoRA for a whole model without PEFT: put on, disable, save, load."""

from stablelora_kernels.model.adapters import load_adapter, save_adapter
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.disable import disable_lora
from stablelora_kernels.model.reports import GatedMLP, LoRAReport, ReplacedModule, SkippedModule

__all__ = [
    "GatedMLP",
    "LoRAReport",
    "ReplacedModule",
    "SkippedModule",
    "apply_lora",
    "disable_lora",
    "load_adapter",
    "save_adapter",
]
