"""Memory and traffic of a LoRA run over several machines, before anyone rents them. Nothing is measured.

    python -m benchmarks.lab.cost_model.cluster_plan [--model llama-70b] [--nodes 4] [--gpus 8] [--tokens 4096] [--r 16]
        [--checkpointing]

Parameters, and what a decoder layer saves for its backward, are counted on the model itself, in tensors without memory. Bytes
that processes exchange are arithmetic, which its tests hold against counted ones. Times are those bytes over the links'
rates and the operations over the matrix rate: no run is faster, how much slower it is only a run can tell.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common.memory import saved_for_backward
from benchmarks.common.tables import aligned
from benchmarks.lab.cost_model.gpu import Gpu, load_gpu

# From the models' published config.json.
MODELS: dict[str, dict[str, int]] = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "llama-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                  "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
}  # fmt: skip
# Bytes a second into one GPU: NVIDIA's data sheet for NVLink 4 (half of 900 GB/s), and one 400 Gb/s adapter for each GPU.
NVLINK, NETWORK = 450e9, 50e9
BF16, FP32 = 2, 4
# NF4: half a byte, and for 64 elements a byte of absmax and 4/256 for that one's.
NF4 = 0.5 + (1 + 4 / 256) / 64
# The logits in bfloat16 and float32, and the gradient of each.
LOGITS = 2 * (BF16 + FP32)
# Value, gradient and two moments of A and B.
ADAPTER = 4 * FP32


class Layer(NamedTuple):
    """One decoder layer's part on one GPU: elements, and bytes for each token."""

    frozen: int
    adapters: int
    # A of layers cut by columns and B of those cut by rows, whose gradients tensor parallelism sums.
    whole_adapters: int
    saved: float


class Model(NamedTuple):
    """Counts of a model that is cut in ``tensor`` parts."""

    hidden: int
    layers: int
    vocab: int
    layer: Layer
    # Embedding, last norm and head, which are not cut.
    rest: int
    # Of all processes together, and all layers.
    frozen: int
    adapters: int


class Plan(NamedTuple):
    """One GPU's memory in bytes by purpose, and a step's traffic."""

    memory: dict[str, float]
    # Bytes into one GPU over the machine's own links, and into a whole machine over the network.
    inside: float
    between: float


def count(config: dict[str, int], r: int, targets: Any, tensor: int = 1, tokens: int = 256) -> Model:
    """A Llama's parameters and saved activations on one of ``tensor`` GPUs that share its layers.

    Raises:
        ValueError: its heads or its MLP can't be shared by so many.
    """
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if config[key] % tensor:
            raise ValueError(f"tensor must divide the model's {key} {config[key]}, got {tensor}")
    mine, whole = _layer(config, r, targets, tensor, tokens), _layer(config, r, targets, 1, tokens)
    hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    rest = 2 * vocab * hidden + hidden
    return Model(hidden, layers, vocab, mine, rest, layers * whole.frozen + rest, layers * whole.adapters)


def _layer(config: dict[str, int], r: int, targets: Any, tensor: int, tokens: int) -> Layer:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    import stablelora_kernels as slk

    part = {key: config[key] // tensor for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
    llama = LlamaConfig(**{**config, **part, "num_hidden_layers": 1}, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            layer = LlamaDecoderLayer(llama, 0)
            frozen = sum(p.numel() for p in layer.parameters())
            slk.apply_lora(layer, slk.LoRAConfig(r=r, target_modules=targets))
            x = torch.empty(1, tokens, llama.hidden_size, requires_grad=True)
            positions = LlamaRotaryEmbedding(llama)(x, torch.arange(tokens)[None])
            saved = saved_for_backward(
                lambda: layer(x, position_embeddings=positions), [*layer.parameters(), *positions]
            )
            pairs = slk.lora_pairs(layer)
    finally:
        torch.set_default_dtype(before)
    # The PyTorch path also saves casts of A and B; Triton's kernels make them in registers.
    adapters = sum(p.numel() for pair in pairs for p in (pair.A, pair.B))
    rows = ("o_proj", "down_proj")
    summed = sum(pair.B.numel() if pair.name.endswith(rows) else pair.A.numel() for pair in pairs)
    return Layer(frozen, adapters, summed, (saved - BF16 * adapters) / tokens)


def activations(model: Model, tokens: int, checkpointing: bool) -> float:
    """Bytes saved for backward in all layers."""
    if not checkpointing:
        return model.layers * tokens * model.layer.saved
    return tokens * (model.layers * BF16 * model.hidden + model.layer.saved)


def _memory(
    model: Model, frozen: float, gathered: float, shards: int, tokens: int, checkpointing: bool
) -> dict[str, float]:
    return {
        "frozen weights": frozen,
        "gathered for two layers and the rest": gathered,
        "adapters, gradients, moments": ADAPTER * model.layers * model.layer.adapters / shards,
        "saved for backward": activations(model, tokens, checkpointing),
        "logits and their gradients": LOGITS * tokens * model.vocab,
    }


def gathers(model: Model) -> float:
    """Bytes that FSDP2 gathers in a step: each layer forward and backward, embedding and head once."""
    layer = BF16 * model.layer.frozen + FP32 * model.layer.adapters
    return 2 * model.layers * layer + BF16 * model.rest


def sums(model: Model, tokens: int, checkpointing: bool) -> float:
    """Bytes that tensor parallelism sums over its GPUs in a step.

    Each layer sums the outputs of attention and MLP forward, their input gradients backward (except the first layer's, which
    nobody needs), and the gradients of A and B that all GPUs hold. Checkpointing repeats the attention's output, but not the
    MLP's, which is the layer's last.
    """
    times = (4 + checkpointing) * model.layers - 1
    return times * BF16 * tokens * model.hidden + FP32 * model.layers * model.layer.whole_adapters


def sharded(model: Model, nodes: int, gpus: int, tokens: int, checkpointing: bool) -> Plan:
    """FSDP2 over all GPUs."""
    world = nodes * gpus
    gathered = 2 * (BF16 * model.layer.frozen + FP32 * model.layer.adapters) + BF16 * model.rest
    memory = _memory(model, BF16 * model.frozen / world, gathered, world, tokens, checkpointing)
    exchanged = gathers(model) + FP32 * model.layers * model.layer.adapters
    return Plan(memory, exchanged * (world - 1) / world, exchanged * (nodes - 1) / nodes)


def sharded_inside(model: Model, nodes: int, gpus: int, tokens: int, checkpointing: bool) -> Plan:
    """FSDP2 over a machine's GPUs, a copy on each machine (HSDP): only the adapters' gradients leave it."""
    memory = sharded(model, 1, gpus, tokens, checkpointing).memory
    inside = (gathers(model) + FP32 * model.layers * model.layer.adapters) * (gpus - 1) / gpus
    return Plan(memory, inside, 2 * FP32 * model.adapters * (nodes - 1) / nodes)


def tensor_inside(model: Model, nodes: int, gpus: int, tokens: int, checkpointing: bool) -> Plan:
    """Layers cut over a machine's GPUs, FSDP2 over machines; as many micro-steps as GPUs, which share each one's tokens."""
    layer = BF16 * model.layer.frozen + FP32 * model.layer.adapters
    gathered = 2 * layer + BF16 * model.rest
    # Embedding and head are sharded over machines only.
    frozen = BF16 * (model.layers * model.layer.frozen + model.rest) / nodes
    memory = _memory(model, frozen, gathered, nodes, tokens, checkpointing)
    inside = gpus * 2 * sums(model, tokens, checkpointing) * (gpus - 1) / gpus
    # Each GPU's part comes from its like on the other machines; gradients are exchanged after the last micro-step.
    exchanged = gpus * gathers(model) + FP32 * model.layers * model.layer.adapters
    return Plan(memory, inside, gpus * exchanged * (nodes - 1) / nodes)


def whole_in_4_bits(model: Model, nodes: int, gpus: int, tokens: int, checkpointing: bool) -> Plan:
    """The whole model in NF4 on every GPU, DDP over all of them."""
    frozen = NF4 * model.layers * model.layer.frozen + BF16 * model.rest
    memory = _memory(model, frozen, 0, 1, tokens, checkpointing)
    world = nodes * gpus
    return Plan(
        memory, 2 * FP32 * model.adapters * (world - 1) / world, 2 * FP32 * model.adapters * (nodes - 1) / nodes
    )


def operations(model: Model, config: dict[str, int], tokens: int, checkpointing: bool) -> float:
    """One GPU's share of a step: products with W forward and for dX, with A and B and their gradients, attention."""
    passes = 2 + checkpointing
    products = 2 * passes * (model.frozen - config["vocab_size"] * model.hidden) + 2 * (passes + 1) * model.adapters
    # Scores and values over half the tokens before, forward; two and a half times that backward.
    attention = 2 * tokens * config["num_attention_heads"] * config["head_dim"] * model.layers * (passes - 1 + 2.5)
    return tokens * (products + attention)


ARRANGEMENTS: dict[str, Callable[[Model, int, int, int, bool], Plan]] = {
    "FSDP2 over all": sharded,
    "FSDP2 in each machine": sharded_inside,
    "tensor parallel in each": tensor_inside,
    "NF4, whole on each GPU": whole_in_4_bits,
}


def table(config: dict[str, int], args: argparse.Namespace, gpu: Gpu) -> str:
    rows: list[dict[str, str]] = []
    tokens, checkpointing = args.tokens, args.checkpointing
    for name, plan_of in ARRANGEMENTS.items():
        cut = args.gpus if plan_of is tensor_inside else 1
        if config["num_key_value_heads"] % cut:
            continue
        model = count(config, args.r, args.target_modules, cut)
        plan = plan_of(model, args.nodes, args.gpus, tokens, checkpointing)
        compute = operations(model, config, tokens, checkpointing) / gpu.matrix_rate["bf16"]
        inside, between = plan.inside / args.nvlink, plan.between / (args.gpus * args.network)
        rows.append(
            {
                "": name,
                **{what: f"{size / 1e9:.1f}" for what, size in plan.memory.items()},
                "all of these": f"{sum(plan.memory.values()) / 1e9:.1f}",
                "a step's bytes into a GPU inside its machine": f"{plan.inside / 1e9:.1f}",
                "a step's bytes into a machine": f"{plan.between / 1e9:.1f}",
                "products, s at least": f"{compute:.2f}",
                "links inside, s at least": f"{inside:.2f}",
                "network, s at least": f"{between:.2f}",
                "network that hides behind products, Gb/s a GPU": f"{plan.between * 8e-9 / args.gpus / compute:.0f}",
            }
        )
    header = [row[""] for row in rows]
    cells = [["GB on a GPU, or as said", *header], *([what, *(row[what] for row in rows)] for what in rows[0] if what)]
    return "\n".join(aligned(cells))


def config_of(name: str) -> dict[str, int]:
    """A known model's sizes, or those in a local directory's config.json.

    Raises:
        ValueError: it is neither, or lacks a size.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"--model must be one of {', '.join(MODELS)} or a directory with a config.json, got {name!r}")
    given = json.loads(path.read_text())
    if "hidden_size" in given and "num_attention_heads" in given:
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
        given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
    if lacking := [key for key in MODELS["llama-8b"] if not isinstance(given.get(key), int)]:
        raise ValueError(f"--model must be laid out as Llama; {path} lacks {', '.join(lacking)}")
    return {key: given[key] for key in MODELS["llama-8b"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.cost_model.cluster_plan", description=__doc__.splitlines()[0]
    )  # type: ignore[union-attr]
    parser.add_argument("--model", default="llama-70b", help=f"{', '.join(MODELS)}, or a directory with a config.json")
    parser.add_argument("--nodes", type=int, default=4, help="machines")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a machine")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a step for each GPU, one sequence")
    parser.add_argument("--r", type=int, default=16, help="rank")
    parser.add_argument("--target-modules", default="all-linear", nargs="+", help="ends of names, or all-linear")
    parser.add_argument("--checkpointing", action="store_true", help="each layer's activations computed again backward")
    parser.add_argument("--gpu", default="h100", help="a name in benchmarks/lab/cost_model/gpus")
    parser.add_argument("--nvlink", type=float, default=NVLINK, help="bytes a second into a GPU inside the machine")
    parser.add_argument(
        "--network", type=float, default=NETWORK, help="bytes a second into a machine, for each of its GPUs"
    )
    args = parser.parse_args(argv)
    for name in ("nodes", "gpus", "tokens", "r", "nvlink", "network"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    if args.target_modules == ["all-linear"]:
        args.target_modules = "all-linear"
    try:
        config, gpu = config_of(args.model), load_gpu(args.gpu)
        text = table(config, args, gpu)
    except ValueError as error:
        parser.error(str(error))
    model = count(config, args.r, args.target_modules)
    print(
        f"{args.model}: {model.frozen / 1e9:.2f}e9 frozen parameters, {model.adapters / 1e6:.1f}e6 in adapters of rank {args.r}; "
        f"{args.nodes} x {args.gpus} {gpu.name}, {args.tokens} tokens a GPU and step, activations "
        f"{'checkpointed' if args.checkpointing else 'kept'}\n\n{text}\n\n"
        "Predicted, not measured. Memory is without CUDA's and NCCL's own and what the allocator cannot use."
    )


if __name__ == "__main__":
    main()
