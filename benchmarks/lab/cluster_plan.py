"""Memory and traffic of a LoRA run over several machines, before anyone rents them. Nothing is
measured, and no time is forecast.

python -m benchmarks.lab.cluster_plan --checkpointing                      Llama 70B, four machines of eight GPUs
python -m benchmarks.lab.cluster_plan --model DIRECTORY --nodes 2          a Llama of your own, by its config.json

Parameters, and what a decoder layer saves for its backward, are counted on the model itself, in
tensors without memory. Bytes that processes exchange are arithmetic, which its tests hold against
counted ones. Times are those bytes over the links' rates and the operations over the matrix rate:
no run is faster, how much slower it is only a run can tell.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import stablelora_kernels as slk
from benchmarks.common.memory import saved_for_backward
from stablelora_kernels.integrations.step_memory import ADAPTER, BF16, FP32, NF4

# From the models' published config.json; Qwen3's norms of queries and keys are left out.
MODELS: dict[str, dict[str, int]] = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "qwen3-14b": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
                  "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "llama-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                  "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
}  # fmt: skip
# The logits in bfloat16 and float32, and the gradient of each.
LOGITS = 2 * (BF16 + FP32)


class Layer(NamedTuple):
    """One decoder layer's part on one GPU: elements, and bytes for each token."""

    frozen: int
    adapters: int
    # A of layers cut by columns and B of those cut by rows, whose gradients tensor parallelism
    # sums.
    whole_adapters: int
    saved: float

    @property
    def gathered(self) -> int:
        """Bytes of a layer that FSDP2 has gathered."""
        return BF16 * self.frozen + FP32 * self.adapters


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


def count(
    config: dict[str, int], r: int, targets: Any, tensor: int = 1, tokens: int = 256
) -> Model:
    """A Llama's parameters and saved activations on one of ``tensor`` GPUs that share its layers.

    Raises:
        ValueError: its heads or its MLP can't be shared by so many.
    """
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if config[key] % tensor:
            raise ValueError(f"tensor must divide the model's {key} {config[key]}, got {tensor}")
    mine, whole = (count_layer(config, r, targets, parts, tokens) for parts in (tensor, 1))
    hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    rest = 2 * vocab * hidden + hidden
    return Model(
        hidden, layers, vocab, mine, rest, layers * whole.frozen + rest, layers * whole.adapters
    )


def count_layer(config: dict[str, int], r: int, targets: Any, tensor: int, tokens: int) -> Layer:
    part = {
        key: config[key] // tensor
        for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    llama = LlamaConfig(**{**config, **part, "num_hidden_layers": 1}, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            layer = LlamaDecoderLayer(llama, 0)
        frozen = sum(p.numel() for p in layer.parameters())
        slk.apply_lora(layer, targets, r=r)
        with FakeTensorMode(allow_non_fake_inputs=True):
            # Counted as a CPU computes: on the meta device, attention would keep its scores.
            layer.to_empty(device="cpu")
            x = torch.empty(1, tokens, llama.hidden_size, requires_grad=True)
            positions = LlamaRotaryEmbedding(llama)(x, torch.arange(tokens)[None])
            saved = saved_for_backward(
                lambda: layer(x, position_embeddings=positions), [*layer.parameters(), *positions]
            )
            pairs = slk.lora_pairs(layer)
    finally:
        torch.set_default_dtype(before)
    adapters = sum(p.numel() for pair in pairs for p in (pair.A, pair.B))
    rows = ("o_proj", "down_proj")
    summed = sum(pair.B.numel() if pair.name.endswith(rows) else pair.A.numel() for pair in pairs)
    return Layer(frozen, adapters, summed, saved / tokens)


def activations(model: Model, tokens: int, checkpointing: bool) -> float:
    """Bytes saved for backward in all layers."""
    if not checkpointing:
        return model.layers * tokens * model.layer.saved
    return tokens * (model.layers * BF16 * model.hidden + model.layer.saved)


def gathers(model: Model) -> float:
    """Bytes that FSDP2 gathers in a step: each layer forward and backward, embedding and head once."""
    return 2 * model.layers * model.layer.gathered + BF16 * model.rest


def sums(model: Model, tokens: int, checkpointing: bool) -> float:
    """Bytes that tensor parallelism sums over its GPUs in a step.

    Each layer sums the outputs of attention and MLP forward, their input gradients backward (except
    the first layer's, which nobody needs), and the gradients of A and B that all GPUs hold.
    Checkpointing repeats the attention's output, but not the MLP's, which is the layer's last.
    """
    times = (4 + checkpointing) * model.layers - 1
    return times * BF16 * tokens * model.hidden + FP32 * model.layers * model.layer.whole_adapters


def plans(
    whole: Model, cut: Model | None, nodes: int, gpus: int, tokens: int, checkpointing: bool
) -> dict[str, Plan]:
    """Each arrangement's plan. ``cut`` is the model in as many parts as a machine has GPUs, or None
    if it can't be cut.
    """

    def others(count: int) -> float:
        """The share of a ring's bytes that come from the other members."""
        return (count - 1) / count

    def memory(model: Model, frozen: float, gathered: float, shards: int) -> dict[str, float]:
        return {
            "frozen weights": frozen,
            "gathered for two layers and the rest": gathered,
            "adapters, gradients, moments": ADAPTER * model.layers * model.layer.adapters / shards,
            "saved for backward": activations(model, tokens, checkpointing),
            "logits and their gradients": LOGITS * tokens * model.vocab,
        }

    def gathered(model: Model) -> float:
        return 2 * model.layer.gathered + BF16 * model.rest

    def gradients(model: Model) -> float:
        return FP32 * model.layers * model.layer.adapters

    world, copies = nodes * gpus, 2 * FP32 * whole.adapters
    exchanged = gathers(whole) + gradients(whole)
    over_all, in_each = (
        memory(whole, BF16 * whole.frozen / n, gathered(whole), n) for n in (world, gpus)
    )
    found = {
        "FSDP2 over all": Plan(over_all, exchanged * others(world), exchanged * others(nodes)),
        # A copy on each machine (HSDP): only the adapters' gradients leave it.
        "FSDP2 in each machine": Plan(in_each, exchanged * others(gpus), copies * others(nodes)),
    }
    if cut is not None:
        # Layers cut over a machine's GPUs, FSDP2 over machines; as many micro-steps as GPUs, which
        # share each one's tokens. Embedding and head are sharded over machines only.
        frozen = BF16 * (cut.layers * cut.layer.frozen + cut.rest) / nodes
        # Each GPU's part comes from its like on the other machines; gradients are exchanged after
        # the last micro-step.
        between = gpus * (gpus * gathers(cut) + gradients(cut)) * others(nodes)
        inside = gpus * 2 * sums(cut, tokens, checkpointing) * others(gpus)
        found["tensor parallel in each"] = Plan(
            memory(cut, frozen, gathered(cut), nodes), inside, between
        )
    # DDP over all GPUs.
    nf4 = memory(whole, NF4 * whole.layers * whole.layer.frozen + BF16 * whole.rest, 0, 1)
    found["NF4, whole on each GPU"] = Plan(nf4, copies * others(world), copies * others(nodes))
    return found


def operations(model: Model, config: dict[str, int], tokens: int, checkpointing: bool) -> float:
    """One GPU's share of a step: products with W forward and for dX, with A and B and their
    gradients, attention.
    """
    passes = 2 + checkpointing
    products = (
        2 * passes * (model.frozen - config["vocab_size"] * model.hidden)
        + 2 * (passes + 1) * model.adapters
    )
    # Scores and values over half the tokens before, forward; two and a half times that backward.
    attention = (
        2
        * tokens
        * config["num_attention_heads"]
        * config["head_dim"]
        * model.layers
        * (passes - 1 + 2.5)
    )
    return tokens * (products + attention)


def table(found: dict[str, Plan], compute: float, args: argparse.Namespace) -> str:
    """``compute``: the seconds of a step's products."""
    columns = {
        name: {
            **{what: f"{size / 1e9:.1f}" for what, size in plan.memory.items()},
            "all of these": f"{sum(plan.memory.values()) / 1e9:.1f}",
            "a step's bytes into a GPU inside its machine": f"{plan.inside / 1e9:.1f}",
            "a step's bytes into a machine": f"{plan.between / 1e9:.1f}",
            "products, s at least": f"{compute:.2f}",
            "links inside, s at least": f"{plan.inside / args.nvlink:.2f}",
            "network, s at least": f"{plan.between / (args.gpus * args.network):.2f}",
            "network that hides behind products, Gb/s a GPU": f"{plan.between * 8e-9 / args.gpus / compute:.0f}",
        }
        for name, plan in found.items()
    }
    return pd.DataFrame(columns).rename_axis("GB on a GPU, or as said", axis="columns").to_string()


def config_of(name: str) -> dict[str, int]:
    """A known model's sizes, or those in a local directory's config.json.

    Raises:
        ValueError: it is neither, or lacks a size.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--model must be one of {', '.join(MODELS)} or a directory with a config.json, got {name!r}"
        )
    given = json.loads(path.read_text())
    if "hidden_size" in given and "num_attention_heads" in given:
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
        given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
    if lacking := [key for key in MODELS["llama-8b"] if not isinstance(given.get(key), int)]:
        raise ValueError(f"--model must be laid out as Llama; {path} lacks {', '.join(lacking)}")
    return {key: given[key] for key in MODELS["llama-8b"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "cluster_plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        default="llama-70b",
        help=f"{', '.join(MODELS)}, or a directory with a config.json",
    )
    add("--nodes", type=int, default=4, help="machines")
    add("--gpus", type=int, default=8, help="GPUs of a machine")
    add("--tokens", type=int, default=4096, help="tokens in a step for each GPU, one sequence")
    add("--r", type=int, default=16, help="rank")
    add("--target-modules", default=["all-linear"], nargs="+", help="ends of names, or all-linear")
    add(
        "--checkpointing",
        action="store_true",
        help="each layer's activations computed again backward",
    )
    # NVIDIA's data sheet for NVLink 4 (half of 900 GB/s), and one 400 Gb/s adapter for each GPU.
    add("--nvlink", type=float, default=450e9, help="bytes a second into a GPU inside the machine")
    add(
        "--network",
        type=float,
        default=50e9,
        help="bytes a second into a machine, for each of its GPUs",
    )
    add(
        "--matrix-rate",
        type=float,
        default=989e12,
        help="bfloat16 operations a second of a GPU: by the data sheet of an H100 SXM",
    )
    args = parser.parse_args(argv)
    for name in ("nodes", "gpus", "tokens", "r", "nvlink", "network", "matrix_rate"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    targets = "all-linear" if args.target_modules == ["all-linear"] else args.target_modules
    try:
        config = config_of(args.model)
        whole = count(config, args.r, targets)
        cut = (
            None
            if config["num_key_value_heads"] % args.gpus
            else count(config, args.r, targets, args.gpus)
        )
    except ValueError as error:
        parser.error(str(error))
    found = plans(whole, cut, args.nodes, args.gpus, args.tokens, args.checkpointing)
    compute = operations(whole, config, args.tokens, args.checkpointing) / args.matrix_rate
    print(
        f"{args.model}: {whole.frozen / 1e9:.2f}e9 frozen parameters, {whole.adapters / 1e6:.1f}e6 in adapters of rank {args.r}; "
        f"{args.nodes} x {args.gpus} GPUs, {args.tokens} tokens a GPU and step, activations "
        f"{'checkpointed' if args.checkpointing else 'kept'}\n\n{table(found, compute, args)}\n\n"
        "Counted, not measured. Memory is without CUDA's and NCCL's own and what the allocator cannot use."
    )


if __name__ == "__main__":
    main()
