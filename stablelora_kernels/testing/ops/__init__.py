"""The ops that a :class:`Case` calls, a class each: its operands, its call, and what the results must
be. A file has the name of its op.
"""

from stablelora_kernels.testing.cases import OPS
from stablelora_kernels.testing.ops.dora import DoRA
from stablelora_kernels.testing.ops.lora_experts import Experts
from stablelora_kernels.testing.ops.lora_experts_mlp import ExpertsMLP
from stablelora_kernels.testing.ops.lora_linear import Branch, Group, Linear
from stablelora_kernels.testing.ops.lora_linear_cross_entropy import CrossEntropy
from stablelora_kernels.testing.ops.lora_mlp import MLP
from stablelora_kernels.testing.ops.lora_rows import Rows

OPS |= {
    "linear": Linear(),
    "branch": Branch(),
    "group": Group(),
    "mlp": MLP(),
    "rows": Rows(),
    "experts": Experts(),
    "experts mlp": ExpertsMLP(),
    "cross entropy": CrossEntropy(),
    "DoRA": DoRA(),
}

__all__ = [
    "MLP",
    "Branch",
    "CrossEntropy",
    "DoRA",
    "Experts",
    "ExpertsMLP",
    "Group",
    "Linear",
    "Rows",
]
