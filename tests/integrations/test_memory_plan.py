"""``memory_plan``: its count against the measured peaks of whole small models on a CPU, and what it
makes of the count.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.helpers.launches import needs_triton

pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[peft]"
)
pytest.importorskip("peft", reason="runs where peft is installed: pip install .[peft]")

from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig

import stablelora_kernels as slk
from stablelora_kernels.integrations.memory_plan import MODEL_TYPES, Decoder, MemoryPlan
from stablelora_kernels.integrations.step_memory import CPU, GIB, USABLE
from stablelora_kernels.ops.lora_mlp import call
from stablelora_kernels.utils.memory import peak_over_start

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 384,
    "use_cache": False,
}
# Beyond the rows up to which separate operators compute an MLP.
TOKENS = 640
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
FUSED = ("fuse_loss", "fuse_mlp")
TILED = ("fuse_loss", "tile_mlp")
NONE, ALL, EVERY_SECOND = (False,) * 4, (True,) * 4, (True, False) * 2
# PEFT's default for Llama.
OF_ATTENTION = ("q_proj", "v_proj")


def config_of(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **SMALL, pad_token_id=0)


def to_host(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A checkpoint whose inputs wait outside of PyTorch's memory, as transformers' ``offload=True``
    has them outside of the GPU's.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().numpy().copy(), lambda a: torch.from_numpy(a).clone()
    )
    with hooks:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)


def measured_peak(
    config: Any, fusions: Any, are_checkpointed: Any, offload: bool, targets: Any = "all-linear"
) -> int | None:
    """The most bytes that PyTorch's allocator has handed out in a step of a whole model."""
    base = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    slk.accelerate_peft(model, strict=True, **dict.fromkeys(fusions, True))
    model.train()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    for layer, is_checkpointed in zip(base.model.layers, are_checkpointed, strict=True):
        layer.gradient_checkpointing = is_checkpointed
        if offload:
            layer._gradient_checkpointing_func = to_host
    ids = torch.randint(config.vocab_size, (1, TOKENS))

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    # The first step makes what later ones find.
    run()
    model.zero_grad(set_to_none=True)
    return peak_over_start(run, torch.device(CPU))


def counted_peak(
    config: Any, fusions: Any, are_checkpointed: Any, offload: bool, targets: Any = "all-linear"
) -> float:
    decoder = Decoder(config, 4, targets, "bf16", torch.float32, CPU)
    return max(decoder.moments(TOKENS, fusions, are_checkpointed, offload))


@pytest.mark.parametrize(
    ("fusions", "are_checkpointed", "offload"),
    [
        ((), NONE, False),
        (("fuse_mlp",), NONE, False),
        (FUSED, ALL, False),
        (FUSED, EVERY_SECOND, False),
        (TILED, NONE, False),
        (TILED, ALL, False),
        (TILED, ALL, True),
        (FUSED, EVERY_SECOND, True),
    ],
    ids=str,
)
def test_the_count_is_the_measured_peak_of_a_whole_model(
    fusions, are_checkpointed, offload, monkeypatch
):
    # Five tiles.
    monkeypatch.setitem(call.TILE_BYTES, "cpu", 1 << 20)
    step = (config_of("llama"), fusions, are_checkpointed, offload)
    measured = measured_peak(*step)
    assert counted_peak(*step) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("fusions", "are_checkpointed", "offload"),
    [((), NONE, False), (("fuse_loss",), ALL, False), (("fuse_loss",), EVERY_SECOND, True)],
    ids=str,
)
def test_the_count_with_lora_on_attention_alone(fusions, are_checkpointed, offload):
    step = (config_of("llama"), fusions, are_checkpointed, offload, OF_ATTENTION)
    measured = measured_peak(*step)
    assert counted_peak(*step) == pytest.approx(measured, rel=0.03)


@needs_triton
def test_a_plan_with_lora_on_attention_alone_fuses_no_mlp():
    plan = slk.memory_plan(LLAMA_8B, gpu_gib=24, weights="nf4", target_modules=OF_ATTENTION)
    rows = [(step.fusions, step.checkpoints, step.offload) for step in plan.steps]
    fused = ("fuse_loss",)
    assert rows == [((), 0, False), (fused, 0, False), (fused, 32, False), (fused, 32, True)]
    # With LoRA on one projection of an MLP there is something to fuse.
    targets = (*OF_ATTENTION, "down_proj")
    plan = slk.memory_plan(LLAMA_8B, gpu_gib=24, weights="nf4", target_modules=targets)
    assert [step.fusions for step in plan.steps][2:] == [FUSED, FUSED, TILED, TILED]


@pytest.mark.nightly
@pytest.mark.parametrize("are_checkpointed", [NONE, ALL])
@pytest.mark.parametrize("fusions", [(), FUSED, TILED], ids=", ".join)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_count_of_every_architecture(model_type, fusions, are_checkpointed):
    step = (config_of(model_type), fusions, are_checkpointed, False)
    measured = measured_peak(*step)
    assert counted_peak(*step) == pytest.approx(measured, rel=0.03)


@pytest.fixture(scope="module")
def most() -> MemoryPlan:
    return slk.memory_plan(LLAMA_8B, gpu_gib=80, weights="nf4")


@needs_triton
def test_the_most_tokens_fit_and_no_more(most):
    """Each row, planned again for its tokens, and for a hundredth more."""
    assert [step.fits for step in most.steps] == [True] * 6
    for step in most.steps:
        assert step.gib <= USABLE * 80
        more = slk.memory_plan(LLAMA_8B, gpu_gib=80, weights="nf4", tokens=step.tokens * 101 // 100)
        row = more.steps[most.steps.index(step)]
        assert not row.fits and USABLE * 80 < row.gib < 1.02 * USABLE * 80
    assert [step.tokens for step in most.steps] == sorted(step.tokens for step in most.steps)
    assert most.best == most.steps[-1]
    # All inputs, in bfloat16.
    assert most.best.host_gib == 32 * most.best.tokens * 4096 * 2 / GIB


@needs_triton
def test_a_plan_has_as_few_checkpoints_as_fit():
    plan = slk.memory_plan(LLAMA_8B, gpu_gib=24, weights="nf4", tokens=8192)
    best = plan.best
    assert best is plan.steps[3] and best.fusions == FUSED and 0 < best.checkpoints < plan.layers
    decoder = Decoder(LLAMA_8B, 16, "all-linear", "nf4", torch.bfloat16, "sm_90")

    def gib(checkpoints: int) -> float:
        are_checkpointed = [i < checkpoints for i in range(plan.layers)]
        return (decoder.start() + max(decoder.moments(8192, FUSED, are_checkpointed))) / GIB

    assert gib(best.checkpoints) == best.gib <= USABLE * 24 < gib(best.checkpoints - 1)


@needs_triton
def test_a_step_takes_more_for_more_tokens_and_less_with_more_options():
    plans = [
        slk.memory_plan(LLAMA_8B, gpu_gib=80, tokens=tokens) for tokens in (1, 700, 5000, 9000)
    ]
    for fewer, more in itertools.pairwise(plans):
        for a, b in zip(fewer.steps, more.steps, strict=True):
            # More checkpoints take less.
            assert a.gib < b.gib or a.checkpoints < b.checkpoints
    assert plans[0].best == plans[0].steps[0]
    sizes = [step.gib for step in plans[-1].steps[:3]]
    assert sizes == sorted(sizes, reverse=True)


@needs_triton
def test_weights_that_do_not_fit():
    plan = slk.memory_plan(LLAMA_8B, gpu_gib=12)
    assert plan.best is None and plan.start_gib > 12
    assert {(step.tokens, step.gib, step.fits) for step in plan.steps} == {
        (0, plan.start_gib, False)
    }


@needs_triton
def test_a_plan_reads_the_config_alone():
    config = config_of("qwen3")
    of_config = slk.memory_plan(config, gpu_gib=1, tokens=2048, r=4)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    assert slk.memory_plan(base, gpu_gib=1, tokens=2048, r=4) == of_config
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"]))
    assert slk.memory_plan(model, gpu_gib=1, tokens=2048, r=4) == of_config
    assert config.num_hidden_layers == 4
    # Weights in bfloat16, and A and B in float32 with gradients and moments.
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear")
    )
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert of_config.start_gib == (2 * frozen + 16 * adapters) / GIB


@needs_triton
def test_a_plan_is_a_table(most):
    lines = str(most).splitlines()
    assert lines[0].startswith("llama, 32 layers, nf4, LoRA of rank 16: 5.9 GiB")
    assert "80 GiB, of which 90%" in lines[1]
    assert len({len(line.rstrip("yesno")) for line in lines[3:]}) == 1
    assert [line[0] for line in lines[3:]] == [" "] * 5 + ["*"]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"gpu_gib": 0}, ValueError, r"gpu_gib must be a finite number in \(0, 1024\), got 0"),
        ({"gpu_gib": 81920}, ValueError, r"gpu_gib must be .* got 81920"),
        ({"gpu_gib": "24"}, TypeError, "gpu_gib must be a number, got '24'"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        ({"tokens": 2048.0}, TypeError, r"tokens must be an int, got 2048\.0"),
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"weights": "int8"}, ValueError, "weights must be one of 'bf16', 'nf4', got 'int8'"),
        (
            {"model": MixtralConfig()},
            ValueError,
            "of type llama, .* got MixtralConfig: .* no experts",
        ),
        ({"model": torch.nn.Linear(2, 2)}, ValueError, "or its config, got Linear"),
        ({"target_modules": ["lm_head"]}, ValueError, r"leave the head frozen, got \['lm_head'\]"),
        ({"target_modules": ["wrong"]}, ValueError, "wrong"),
    ],
)
def test_errors(keywords, error, message):
    arguments = {"model": config_of("llama"), "gpu_gib": 24} | keywords
    with pytest.raises(error, match=message):
        slk.memory_plan(arguments.pop("model"), **arguments)
