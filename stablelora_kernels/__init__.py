"""Fused LoRA layers and the Stable-LoRA optimizer for PyTorch, in Triton."""

from typing import TYPE_CHECKING

from stablelora_kernels import functional, reference
from stablelora_kernels._version import __version__
from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.explanation import explain
from stablelora_kernels.integrations.comparison import compare
from stablelora_kernels.integrations.compressed_tensors import keep_in_4_bits
from stablelora_kernels.integrations.hf_trainer import (
    AccelerateCallback,
    StabilityCallback,
    StableLoRAAdamWFactory,
    StableLoRACallback,
)
from stablelora_kernels.integrations.memory_plan import memory_plan
from stablelora_kernels.integrations.merged_parameters import merged_parameters
from stablelora_kernels.integrations.packed_checkpoints import load_packed_experts
from stablelora_kernels.integrations.peft import accelerate_peft, restore_peft
from stablelora_kernels.integrations.peft.rows import adapters_of_rows, losses_of_rows
from stablelora_kernels.integrations.rows_trainer import RowsTrainer
from stablelora_kernels.model import (
    LoRAReport,
    apply_lora,
    disable_lora,
    load_adapter,
    save_adapter,
)
from stablelora_kernels.nn import LoRALinear
from stablelora_kernels.optim import PairStability, StabilityLogger, StableLoRAAdamW, StableShrink
from stablelora_kernels.pairs import LoRAPair, lora_pairs
from stablelora_kernels.status import status

__all__ = [
    "AccelerateCallback",
    "LoRALinear",
    "LoRAPair",
    "LoRAReport",
    "PairStability",
    "RowsTrainer",
    "StabilityCallback",
    "StabilityLogger",
    "StableLoRAAdamW",
    "StableLoRAAdamWFactory",
    "StableLoRACallback",
    "StableShrink",
    "__version__",
    "accelerate_peft",
    "adapters_of_rows",
    "apply_lora",
    "compare",
    "disable_lora",
    "explain",
    "functional",
    "keep_in_4_bits",
    "load_adapter",
    "load_packed_experts",
    "lora_pairs",
    "losses_of_rows",
    "memory_plan",
    "merged_parameters",
    "reference",
    "restore_peft",
    "save_adapter",
    "settings",
    "status",
]


# Type checkers would accept every name.
if not TYPE_CHECKING:

    def __getattr__(name):
        # PEFT writes LoraConfig.
        meant = next(
            (f"; did you mean {known!r}?" for known in __all__ if known.lower() == name.lower()), ""
        )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{meant}")
