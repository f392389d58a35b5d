"""Fused LoRA layers and the Stable-LoRA optimizer for PyTorch, in Triton."""

from typing import TYPE_CHECKING

from stablelora_kernels import functional, reference
from stablelora_kernels._version import __version__
from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.explanation import Explanation, explain
from stablelora_kernels.integrations.adapter_rows import adapters_of_rows, losses_of_rows
from stablelora_kernels.integrations.comparison import Comparison, compare
from stablelora_kernels.integrations.hf_trainer import (
    AccelerateCallback,
    StabilityCallback,
    StableLoRAAdamWFactory,
)
from stablelora_kernels.integrations.peft import accelerate_peft, restore_peft
from stablelora_kernels.model import (
    LoRAReport,
    MergeReport,
    apply_lora,
    count_parameters,
    disable_lora,
    load_adapter,
    load_packed_experts,
    merge_lora,
    print_trainable_parameters,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from stablelora_kernels.nn import LoRALinear, MergeError
from stablelora_kernels.optim import PairStability, StabilityLogger, StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair, lora_pairs
from stablelora_kernels.status import Status, status

__all__ = [
    "AccelerateCallback",
    "Comparison",
    "Explanation",
    "LoRAConfig",
    "LoRALinear",
    "LoRAPair",
    "LoRAReport",
    "MergeError",
    "MergeReport",
    "PairStability",
    "StabilityCallback",
    "StabilityLogger",
    "StableLoRAAdamW",
    "StableLoRAAdamWFactory",
    "Status",
    "__version__",
    "accelerate_peft",
    "adapters_of_rows",
    "apply_lora",
    "compare",
    "count_parameters",
    "disable_lora",
    "explain",
    "functional",
    "load_adapter",
    "load_packed_experts",
    "lora_pairs",
    "losses_of_rows",
    "merge_lora",
    "print_trainable_parameters",
    "reference",
    "remove_lora",
    "restore_peft",
    "save_adapter",
    "settings",
    "status",
    "unmerge_lora",
]


# Type checkers would accept every name.
if not TYPE_CHECKING:

    def __getattr__(name):
        # PEFT writes LoraConfig.
        meant = next(
            (f"; did you mean {known!r}?" for known in __all__ if known.lower() == name.lower()), ""
        )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{meant}")
