"""The first tests that a GPU runs. Each takes one step beyond those before it, so the first that
fails says where to look.
"""

from __future__ import annotations

BRING_UP = "tests/gpu/test_bring_up.py"
PREPARED = "tests/gpu/test_prepared_launches.py"
GRAPHS = "tests/gpu/test_cuda_graphs.py"
CAPTURED_STEP = "tests/gpu/test_captured_step_in_graphs.py"
COMPETING = "tests/gpu/test_competing_stream.py"

DOCTOR = (f"{BRING_UP}::test_doctor",)
# A layer without dropout and with it, and the optimizer: enough to time the headline.
SMOKE = tuple(
    f"{BRING_UP}::test_doctor[{check}]"
    for check in ("lora_linear, many rows, bf16", "lora_linear, dropout, bf16", "stable_adamw, 3 steps, fp32")
)  # fmt: skip
# S; a branch onto the vendor's product; few rows; one launch by pointers, by TMA and by split-K;
# groups, MLPs, quantized weights.
KERNELS = (
    f"{BRING_UP}::test_down",
    f"{BRING_UP}::test_linear",
    f"{BRING_UP}::test_other_ops",
    f"{BRING_UP}::test_loss_without_logits",
)
OPTIMIZER = f"{BRING_UP}::test_optimizer"
THIRD_CALL = f"{PREPARED}::test_the_third_call_is_prepared"
STREAMS = f"{PREPARED}::test_streams_share_a_plan_and_not_its_counters"
SECOND_GPU = f"{PREPARED}::test_a_second_gpu_has_launches_of_its_own"
# The ways of launching.
LAUNCHES = (THIRD_CALL, GRAPHS, CAPTURED_STEP, OPTIMIZER, STREAMS, COMPETING, SECOND_GPU)
