"""LoRA for a whole model: put on, merge, remove, save, load."""

from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.load_packed import load_packed_experts
from stablelora_kernels.model.merge import disable_lora, merge_lora, remove_lora, unmerge_lora
from stablelora_kernels.model.reports import (
    GatedMLP,
    LoRAReport,
    MergeReport,
    ReplacedModule,
    SkippedModule,
    count_parameters,
    print_trainable_parameters,
)
from stablelora_kernels.model.save_load import load_adapter, save_adapter

__all__ = [
    "GatedMLP",
    "LoRAReport",
    "MergeReport",
    "ReplacedModule",
    "SkippedModule",
    "apply_lora",
    "count_parameters",
    "disable_lora",
    "load_adapter",
    "load_packed_experts",
    "merge_lora",
    "print_trainable_parameters",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
]
