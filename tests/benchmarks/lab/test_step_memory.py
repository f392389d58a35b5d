"""The count of a training step's memory, against the measured peaks of whole models on a CPU and
against the sources of the GPU kernels that it stands in for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.launches import needs_triton

pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[bench]"
)
pytest.importorskip("peft", reason="runs where peft is installed: pip install .[bench]")
pytest.importorskip("matplotlib", reason="runs where matplotlib is installed: pip install .[bench]")

from transformers import AttentionInterface, AutoModelForCausalLM

import stablelora_kernels as slk
from benchmarks.common.arms import ACCELERATED, FROZEN, MLP_FUSED, MLP_TILED, PEFT, PLAIN, adapt
from benchmarks.lab import memory, stand_ins, step_memory
from benchmarks.lab.step_memory import (
    CPU,
    FAMILIES,
    FROM_LOGITS,
    LAST_LAYER,
    LINEAR,
    WITHOUT_LOGITS,
    Shape,
    Step,
)
from stablelora_kernels.integrations import step_memory as counts
from stablelora_kernels.integrations.step_memory import LiveBytes
from stablelora_kernels.ops.lora_mlp import call as lora_mlp_call
from stablelora_kernels.utils.memory import peak_over_start

pytestmark = pytest.mark.usefixtures("one_thread")
FUSED = ACCELERATED + MLP_FUSED
TILED = ACCELERATED + MLP_TILED
SMALL = Shape(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=384,
)
# Beyond the rows up to which separate operators compute an MLP.
TOKENS = 640
# Of weights and of adapters.
FLOAT32 = (torch.float32, True)
MIXED = (torch.bfloat16, True)
BFLOAT16 = (torch.bfloat16, False)


def measured_peak(step: Step) -> int | None:
    """The most bytes that PyTorch's allocator has handed out in a step of a whole model."""
    config = step.shape.config(use_cache=False)
    base = AutoModelForCausalLM.from_config(config).to(step.dtype).requires_grad_(False)
    model = adapt(base, step.arm, LINEAR, r=step.r, dropout=step.dropout, float32=step.float32)
    model.train()
    base.enable_input_require_grads()
    if step.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(step.shape.vocab_size, (1, TOKENS))
    is_ours = step.arm.startswith(ACCELERATED)
    if is_ours and step.loss == WITHOUT_LOGITS:
        # The MLP stays as the arm has it.
        slk.accelerate_peft(model, fuse_loss=True)
    options: Any = {"bias": None, "lora_A": None, "lora_B": None, "scaling": 1.0}

    def run() -> None:
        if is_ours or step.loss == FROM_LOGITS:
            loss = model(input_ids=ids, labels=ids).loss
        else:
            # No name keeps the hidden states.
            loss = slk.functional.lora_linear_cross_entropy(
                base.model(ids).last_hidden_state, base.lm_head.weight, ids, **options
            )
        loss.backward()

    # The first step makes what later ones find.
    run()
    model.zero_grad(set_to_none=True)
    return peak_over_start(run, torch.device(CPU))


@pytest.mark.covering
@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.25])
@pytest.mark.parametrize("dtypes", [FLOAT32, MIXED, BFLOAT16], ids=["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", [FROM_LOGITS, WITHOUT_LOGITS])
@pytest.mark.parametrize("arm", [FROZEN, PEFT, PLAIN, ACCELERATED, FUSED, TILED])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_the_measured_peak_of_a_whole_model(
    family, arm, loss, checkpointing, dtypes, dropout, monkeypatch
):
    """Within 3 %, and a copy of a product's operand that oneDNN makes on CPUs that multiply bfloat16.
    Masks of positions are of random sizes.
    """
    # A small model's rows would be one tile.
    monkeypatch.setattr(lora_mlp_call, "rows_of_tile", lambda x, inner, tiled: TOKENS // 2)
    torch.manual_seed(0)
    dtype, float32 = dtypes
    shape = SMALL._replace(model_type=family)
    step = Step(shape, arm, loss, checkpointing, dropout, float32, dtype=dtype, where=CPU, r=4)
    measured = measured_peak(step)
    assert measured is not None
    copies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    largest = TOKENS * SMALL.intermediate_size * dtype.itemsize
    counted = step_memory.peak(step, TOKENS)
    most = counted + largest * (copies and dtype == torch.bfloat16)
    assert counted / 1.03 <= measured <= most * 1.03


@needs_triton
@pytest.mark.parametrize("arm", [FROZEN, PEFT, PLAIN])
def test_a_gpu_differs_from_a_cpu_by_attention_alone(arm, monkeypatch):
    """Where no kernel of this library runs, tensors without memory count what real ones do."""
    # A CPU's own attention takes other memory.
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", counts.counted_attention)
    gpu = Step(SMALL, arm, float32=True, dtype=torch.float32, r=4)
    cpu = gpu._replace(where=CPU)
    # Counts of other tests have the CPU's attention.
    count = step_memory.count_layer.__wrapped__
    on_gpu, on_cpu = (count(step, TOKENS) for step in (gpu, cpu))
    assert (on_gpu.kept, on_gpu.peak) == (on_cpu.kept, on_cpu.peak)
    assert step_memory.count_head(gpu, TOKENS).peak == step_memory.count_head(cpu, TOKENS).peak


@needs_triton
def test_the_peak_of_fuse_mlp_has_dg_and_du():
    """On a GPU they are scratch of the kernels' launch plans, beside G and U."""
    tokens = memory.TOKENS
    shape = memory.SHAPES["Llama 3.1 8B"]
    terms = step_memory.moments(Step(shape, FUSED, WITHOUT_LOGITS, True), tokens)[LAST_LAYER]
    two = 2 * 2 * tokens * shape.intermediate_size
    width = "tensors of the MLP's width, made by"
    assert terms[f"{width} forward"] == two
    # dB of gate and up.
    assert two <= terms[f"{width} backward"] < 1.01 * two
    inputs = 31 * 2 * tokens * shape.hidden_size
    assert terms["inputs of checkpointed layers"] == pytest.approx(inputs, rel=1e-6)


@needs_triton
@pytest.mark.parametrize("given", [memory.DEFAULT, memory.BEST, memory.OURS])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_most_tokens_fit_and_no_more(given, checkpointing):
    """The table goes by two counts and a line; here that many tokens are counted themselves."""
    run = memory.Run("Llama 3.1 8B", "NF4", checkpointing, given)
    tokens = run.most_tokens(24)
    room = counts.USABLE * 24
    assert run.gib(int(0.995 * tokens)) <= room < run.gib(int(1.005 * tokens))


class Nothing:
    """A Triton kernel that is launched and does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


def bytes_of(run: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[int, int]:
    """What forward keeps for backward, and the peak of both."""
    inputs = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    with LiveBytes([*inputs, WEIGHT, HEAD, ANGLES, LABELS]) as live:
        # Kernels work in the memory of what they get, which leaves must not lend.
        outputs = run(*[x * 1 for x in inputs])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        kept = live.live
        total = sum(out.float().sum() for out in outputs if isinstance(out, torch.Tensor))
        del outputs
        total.backward()
    return kept, live.peak


WEIGHT = torch.zeros(48, dtype=torch.bfloat16)
HEAD = torch.zeros(200, 48, dtype=torch.bfloat16)
ANGLES = torch.zeros(1, 64, 32, dtype=torch.bfloat16)
LABELS = torch.zeros(128, dtype=torch.int64)


# By module of liger_kernel.ops: the function, what it gets behind the tensors, our stand-in, and the
# tensors' shapes.
LIGER_CASES: dict[str, tuple[str, tuple[Any, ...], Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": ("LigerRMSNormFunction", (WEIGHT, 1e-6), lambda x: stand_ins._RMSNorm.apply(x, WEIGHT), [(2, 64, 48)]),
    "swiglu": ("LigerSiLUMulFunction", (), stand_ins._SiLUMul.apply, [(2, 64, 96)] * 2),
    "rope": ("LigerRopeFunction", (ANGLES, ANGLES), lambda q, k: stand_ins.liger_rotate(q, k, ANGLES, ANGLES),
             [(1, 4, 64, 32), (1, 1, 64, 32)]),
    "fused_linear_cross_entropy": ("LigerFusedLinearCrossEntropyFunction", (HEAD, LABELS),
                                   lambda x: stand_ins._Loss.apply(x, HEAD), [(128, 48)]),
}  # fmt: skip


@pytest.mark.parametrize("name", LIGER_CASES)
def test_stand_ins_allocate_what_ligers_functions_do(name, monkeypatch):
    """Liger-Kernel's own functions, whose kernels do nothing here."""
    for package in ("triton", "liger_kernel.ops"):
        pytest.importorskip(package, reason="runs where it is installed: pip install .[test]")
    import triton

    module = importlib.import_module(f"liger_kernel.ops.{name}")
    for attribute, value in [*vars(module).items()]:
        if isinstance(value, triton.runtime.KernelInterface):
            monkeypatch.setattr(module, attribute, Nothing())
    function, others, stand_in, shapes = LIGER_CASES[name]
    theirs = bytes_of(lambda *xs: getattr(module, function).apply(*xs, *others), *shapes)
    assert bytes_of(stand_in, *shapes) == pytest.approx(theirs, rel=0.03)
