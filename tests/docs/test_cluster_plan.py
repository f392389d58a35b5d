"""``examples.cluster_plan``: its bytes are those that processes exchange, its memory what a layer keeps."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from benchmarks.common.memory import saved_for_backward
from examples import cluster_plan
from stablelora_kernels.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel
from tests.helpers.processes import spawn

transformers = pytest.importorskip("transformers", reason="the bench extra brings it")
distributed = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo on Linux"
)
CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 32,
}  # fmt: skip
R, TOKENS = 4, 24
ARRANGEMENTS = ("FSDP2 over all", "FSDP2 in each machine", "tensor parallel in each", "NF4, whole on each GPU")
ATTENTION = {"hidden_states": Replicate()}
PLAN = {
    "self_attn": lambda: PrepareModuleInput(
        input_kwarg_layouts=ATTENTION, desired_input_kwarg_layouts=ATTENTION, use_local_output=False
    ),
    "mlp": lambda: PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),), use_local_output=False
    ),
    **dict.fromkeys([f"self_attn.{name}_proj" for name in "qkv"], LoRAColwiseParallel),
    **dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], LoRAColwiseParallel),
    **dict.fromkeys(["self_attn.o_proj", "mlp.down_proj"], LoRARowwiseParallel),
}


class Exchanged(TorchDispatchMode):
    """Bytes of the whole that collectives gather, scatter or sum, by the collective and the number of processes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__.strip("_")
            # What is whole: what a gather gives, and what is summed.
            if name in ("allgather_base", "all_gather_into_tensor"):
                self.bytes["gather"] += _bytes(args[0] if name == "allgather_base" else out)
            elif name in ("reduce_scatter_base", "reduce_scatter_tensor"):
                self.bytes["scatter"] += _bytes(args[1] if name == "reduce_scatter_base" else args[0])
            elif name in ("allreduce", "all_reduce"):
                self.bytes["sum"] += _bytes(args[0])
            elif name.startswith("broadcast"):
                # DDP's buffers, which are on nobody's bill: of a Llama the rotation's few numbers.
                assert _bytes(args[0]) < 1024
            elif not name.startswith(("wait", "wrap_tensor")):
                raise AssertionError(f"an exchange that is not counted: {func}")
        return out


def _bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in (tensors if isinstance(tensors, (list, tuple)) else [tensors]))


def llama(checkpointing: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, attn_implementation="sdpa", tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    slk.apply_lora(model, slk.LoRAConfig(r=R, target_modules="all-linear"))
    if checkpointing:
        for layer in model.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def exchanged(model: Any) -> dict[str, int]:
    ids = torch.randint(CONFIG["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with Exchanged() as counter:
        model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    return dict(counter.bytes)


def shard(model: Any, mesh: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def two(rank: int, world: int, place: Path) -> None:
    found = {}
    for checkpointing in (False, True):
        model = llama(checkpointing)
        shard(model, init_device_mesh("cpu", (2,)))
        found["sharded", checkpointing] = exchanged(model)
        model = llama(checkpointing)
        for layer in model.model.layers:
            for name in ("self_attn", "mlp"):
                getattr(layer, name).config = model.config
            parallelize_module(layer, init_device_mesh("cpu", (2,)), {name: style() for name, style in PLAN.items()})
        found["tensor", checkpointing] = exchanged(model)
    model = torch.nn.parallel.DistributedDataParallel(llama(False))
    found["whole", False] = exchanged(model)
    torch.save(found, place / f"{rank}.pt")


def four(rank: int, world: int, place: Path) -> None:
    model = llama(False)
    shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    torch.save(exchanged(model), place / f"{rank}.pt")


@pytest.mark.nightly
@distributed
def test_bytes_between_two_processes(tmp_path: Path) -> None:
    spawn(two, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    model = cluster_plan.count(CONFIG, R, "all-linear")
    adapters = cluster_plan.FP32 * model.layers * model.layer.adapters
    for checkpointing in (False, True):
        assert first["sharded", checkpointing] == {"gather": cluster_plan.gathers(model), "scatter": adapters}
        cut = cluster_plan.count(CONFIG, R, "all-linear", 2)
        assert first["tensor", checkpointing] == {"sum": cluster_plan.sums(cut, TOKENS, checkpointing)}
    assert first["whole", False] == {"sum": adapters}


@pytest.mark.nightly
@distributed
def test_bytes_between_four_processes(tmp_path: Path) -> None:
    """Two copies of two shards: each shard's gradients are summed with its like."""
    spawn(four, 4, tmp_path)
    model = cluster_plan.count(CONFIG, R, "all-linear")
    adapters = cluster_plan.FP32 * model.layers * model.layer.adapters
    for rank in range(4):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found == {"gather": cluster_plan.gathers(model), "scatter": adapters, "sum": adapters / 2}


def test_memory_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(False)
    plan = cluster_plan.count(CONFIG, R, "all-linear")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (plan.frozen, plan.adapters) == (frozen, sum(p.numel() for p in model.parameters() if p.requires_grad))
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    known = [*model.parameters(), *model.buffers(), *model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), ids)]

    def hidden() -> torch.Tensor:
        embedded = model.model.embed_tokens(ids).requires_grad_()
        positions = model.model.rotary_emb(embedded, torch.arange(TOKENS)[None])
        known.extend([*positions])
        for layer in model.model.layers:
            embedded = layer(embedded, position_embeddings=positions)
        return embedded

    kept = saved_for_backward(hidden, known)
    # The casts of A and B, which the PyTorch path keeps; the rotation's table may be counted once or not.
    counted = cluster_plan.activations(plan, TOKENS, checkpointing=False) + cluster_plan.BF16 * plan.adapters
    assert kept == pytest.approx(counted, rel=0.02)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cluster_plan.main(["--nodes", "2", "--checkpointing", "--tokens", "512"])
    text = capsys.readouterr().out
    assert text.startswith("llama-70b: 70.55e9 frozen parameters, 207.1e6 in adapters of rank 16; 2 x 8 GPUs")
    assert "nan" not in text and all(name in text for name in ARRANGEMENTS)
    for argv, match in (
        (
            ["--model", str(tmp_path)],
            "--model must be one of llama-8b, qwen3-14b, llama-70b or a directory with a config.json, got",
        ),
        (["--nodes", "0"], "--nodes must be above 0, got 0"),
        (["--tokens", "many"], "invalid int value: 'many'"),
    ):
        with pytest.raises(SystemExit):
            cluster_plan.main(argv)
        assert match in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(ValueError, match="lacks intermediate_size"):
        cluster_plan.config_of(str(tmp_path))
    with pytest.raises(ValueError, match="tensor must divide the model's num_key_value_heads 2, got 4"):
        cluster_plan.count(CONFIG, R, "all-linear", 4)
