"""The recipe of the page *Long context*: tile_mlp and fuse_loss under activation checkpoints of each
kind, in a Trainer, sharded, and on parts of a sequence. As the same model of PEFT's trains.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import stablelora_kernels as slk
from stablelora_kernels.ops.lora_mlp.backends import BACKENDS
from stablelora_kernels.utils.tensors import whole
from tests.helpers.processes import ROOT, needs_gloo, spawn
from tests.helpers.small_models import llama
from tests.helpers.trainer_runs import make_trainer, peft, trained, transformers

modeling = transformers.modeling_utils
ENABLE = transformers.PreTrainedModel.__dict__.get("activation_checkpointing_enable")
needs_offload = pytest.mark.skipif(
    ENABLE is None or "offload" not in inspect.signature(ENABLE).parameters,
    reason="runs where transformers is 5.23 or newer",
)
# Each process of two has 64 rows, below which projections are computed one by one.
TOKENS = 128
IDS = torch.randint(3, 32, (1, TOKENS), generator=torch.Generator().manual_seed(1))
# Four tiles of a part's rows.
TILE_ROWS = 16
RECIPE: dict[str, Any] = {"tile_mlp": TILE_ROWS, "fuse_loss": True}
FORWARD_OP = torch.ops.stablelora_kernels.lora_mlp_tiled_fwd.default
# A gemma has a norm behind the MLP.
KINDS = ("llama", "gemma")


def make(kind: str = "llama", **changes: Any) -> Any:
    """A model of two layers with adapters that are not zero on all linear layers."""
    torch.manual_seed(0)
    if kind == "gemma":
        config = llama().config.to_dict()
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads")  # fmt: skip
        settings = {name: config[name] for name in sizes} | {"head_dim": 8, "pad_token_id": 0}
        base = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings))
    else:
        base = llama(pad_token_id=0, **changes)
    lora = peft.LoraConfig(
        r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, lora).train()


def gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Of the loss, which is there too."""
    model.zero_grad()
    loss = model(**{"input_ids": IDS, "labels": IDS} | inputs).loss
    loss.backward()
    parameters = model.named_parameters()
    found = {name: whole(p.grad).clone() for name, p in parameters if p.grad is not None}
    return {"loss": loss.detach()} | found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], way: str = "") -> None:
    """Up to rounding in float32."""
    assert found.keys() == expected.keys(), way
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=2e-5 * scale, msg=f"{way} {name}"
        )


class Moved:
    """transformers' context that moves tensors to the host, without pinned memory, which takes a GPU.
    It keeps their sizes.
    """

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pin_memory: bool, device_type: str) -> Any:
        assert pin_memory

        def pack(t: Tensor) -> Tensor:
            self.shapes.append(tuple(t.shape))
            return t.clone()

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)


def keep_outputs_of_mlps(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """The page's policy."""
    if op is FORWARD_OP:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, keep_outputs_of_mlps)
# By name: what activation_checkpointing_enable takes.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": SELECTIVE},
}


PRODUCT_OPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Products(TorchDispatchMode):
    """Counts the rows that are multiplied by a weight of an MLP."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        weights = [
            p for name, p in model.named_parameters() if "mlp" in name and "lora" not in name
        ]
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in args if isinstance(t, Tensor)]
        read = [t for t in tensors if t.untyped_storage().data_ptr() in self._weights]
        if read and func not in (torch.ops.aten.t.default, torch.ops.aten.detach.default):
            # All else that reads a weight must be a product.
            assert func.overloadpacket in PRODUCT_OPS, func
            self.rows += tensors[-2].shape[0]
        return func(*args, **(kwargs or {}))


def products_of_step(model: Any) -> float:
    """How many times a step multiplies all rows by a weight of an MLP, in a layer."""
    products = Products(model)

    def counted(run: Any) -> Any:
        # Modes do not see what is inside an op, so this one begins there.
        def call(*args: Any) -> Any:
            with products:
                return run(*args)

        return call

    torch_path = BACKENDS["torch"]
    opened = dataclasses.replace(
        torch_path, forward=counted(torch_path.forward), backward=counted(torch_path.backward)
    )
    with mock.patch.dict(BACKENDS, torch=opened):
        gradients(model)
    return products.rows / TOKENS / model.config.num_hidden_layers


@needs_offload
@pytest.mark.covering
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("every_n_layers", [1, 2])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_train_to_the_same_gradients(
    kind, checkpoint, every_n_layers, offload, monkeypatch
):
    moved = Moved()
    monkeypatch.setattr(modeling, "save_on_cpu", moved)
    model = make(kind)
    expected = gradients(model)
    report = slk.accelerate_peft(model, **RECIPE)
    assert all(mlp.tiled == TILE_ROWS and mlp.reason is None for mlp in report.mlps)
    model.get_base_model().activation_checkpointing_enable(
        CHECKPOINTS[checkpoint], every_n_layers=every_n_layers, offload=offload
    )
    assert_close(gradients(model), expected)
    # The input of each checkpointed layer goes to the host, and nothing else of a layer's width.
    width = model.config.hidden_size
    layers = model.config.num_hidden_layers // every_n_layers if offload else 0
    assert [shape for shape in moved.shapes if shape[-1:] == (width,)] == layers * [
        (1, TOKENS, width)
    ]


# Forward 3, G and U again 2, gradients 3. A checkpoint that does not stop in front of the MLP runs its
# forward once more.
PRODUCTS = {
    ("llama", "fuse_mlp"): {"none": 6, "reentrant": 9, "non-reentrant": 9, "selective": 9},
    ("llama", "tile_mlp"): {"none": 8, "reentrant": 11, "non-reentrant": 8, "selective": 8},
    ("gemma", "fuse_mlp"): {"none": 6, "reentrant": 9, "non-reentrant": 9, "selective": 9},
    ("gemma", "tile_mlp"): {"none": 8, "reentrant": 11, "non-reentrant": 11, "selective": 8},
}


def test_the_page_has_these_products():
    page = (ROOT / "docs" / "guides" / "long-context.md").read_text(encoding="utf-8")
    for words, checkpoint in (
        ("none", "none"),
        ('`"use_reentrant": False`', "non-reentrant"),
        ('`"use_reentrant": True`', "reentrant"),
        ("selective, below", "selective"),
    ):
        fused, tiled, other_fused, before_norm = (
            PRODUCTS[kind, fusion][checkpoint]
            for kind in KINDS
            for fusion in ("fuse_mlp", "tile_mlp")
        )
        assert fused == other_fused
        assert f"| {words} | {fused} | {tiled} | {before_norm} |" in page


@needs_offload
@pytest.mark.parametrize("kind, fusion", PRODUCTS)
def test_how_often_a_checkpointed_mlp_multiplies_by_a_weight(kind, fusion):
    model = make(kind)
    slk.accelerate_peft(model, **{fusion: TILE_ROWS if fusion == "tile_mlp" else True})
    base = model.get_base_model()
    found = {"none": products_of_step(model)}
    for name, options in CHECKPOINTS.items():
        base.activation_checkpointing_enable(options)
        found[name] = products_of_step(model)
        base.activation_checkpointing_disable()
    assert found == PRODUCTS[kind, fusion]


@needs_offload
@pytest.mark.parametrize("checkpoint", ["non-reentrant", "selective"])
def test_a_trainer_with_the_recipe_has_pefts_losses(tmp_path, monkeypatch, checkpoint):
    """By arguments of a Trainer alone, as the page gives them."""
    moved = Moved()
    monkeypatch.setattr(modeling, "save_on_cpu", moved)
    rows = [{"input_ids": row, "labels": row} for row in IDS.view(4, 32).tolist()]
    losses, adapters = [], []
    for recipe in (False, True):
        changes: dict[str, Any] = {}
        if recipe:
            changes = {
                "callbacks": [slk.AccelerateCallback(**RECIPE)],
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": CHECKPOINTS[checkpoint] | {"offload": True},
            }
        model = make()
        trainer = make_trainer(
            model, tmp_path / str(recipe), settings=None, max_steps=3, logging_steps=1,
            gradient_accumulation_steps=1, learning_rate=0.01, **changes,
        )  # fmt: skip
        trainer.train_dataset = rows
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        adapters.append(trained(model))
    # A batch of two sequences of 32 tokens.
    width = model.config.hidden_size
    assert [shape for shape in moved.shapes if shape[-1:] == (width,)] == 6 * [(2, 32, width)]
    assert len(losses[0]) == 3 and losses[0][0] != losses[0][2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


# Two processes.


class _Gather(torch.autograd.Function):
    """The parts of all processes, one after another in dimension 2."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), 2)[dist.get_rank()]


def attention_to_all_parts(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention of this process's queries to the keys and values of all processes."""
    rows = q.shape[2]
    k, v = _Gather.apply(k), _Gather.apply(v)
    places = torch.arange(k.shape[2])
    mine = places[dist.get_rank() * rows :][:rows]
    is_seen = mine[:, None] >= places[None]
    y = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=is_seen, scale=scaling, enable_gqa=True
    )
    return y.transpose(1, 2), None


def part_of_sequence(rank: int, world: int) -> dict[str, Any]:
    """A model's inputs for the tokens of one process. The labels are shifted before they are cut."""
    size = TOKENS // world
    mine = slice(rank * size, (rank + 1) * size)
    labels = nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)[:, mine]
    return {
        "input_ids": IDS[:, mine],
        "position_ids": torch.arange(TOKENS)[None, mine],
        "labels": labels,
        "shift_labels": labels,
        "num_items_in_batch": torch.tensor(TOKENS - 1),
    }


def batch(rank: int) -> dict[str, Any]:
    """A sequence of each process's own."""
    ids = IDS.roll(5 * rank, 1)
    return {"input_ids": ids, "labels": ids}


def two(rank: int, world: int, place: Path) -> dict[str, dict[str, Tensor]]:
    """The gradients by parts of a sequence, and sharded."""
    transformers.AttentionInterface.register("to all parts", attention_to_all_parts)
    found = {}
    for checkpoint in ("non-reentrant", "selective"):
        model = make(attn_implementation="to all parts")
        slk.accelerate_peft(model, strict=True, **RECIPE)
        with mock.patch.object(modeling, "save_on_cpu", Moved()):
            model.get_base_model().activation_checkpointing_enable(
                CHECKPOINTS[checkpoint], offload=True
            )
            part = gradients(model, **part_of_sequence(rank, world))
        for t in part.values():
            dist.all_reduce(t)
        found[f"parts, {checkpoint}"] = part
    for checkpoint in ("non-reentrant", "reentrant"):
        model = make()
        model.get_base_model().activation_checkpointing_enable(CHECKPOINTS[checkpoint])
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        slk.accelerate_peft(model, **RECIPE)
        found[f"sharded, {checkpoint}"] = gradients(model)
    for checkpoint in ("non-reentrant", "selective"):
        model = make()
        model.get_base_model().activation_checkpointing_enable(CHECKPOINTS[checkpoint])
        slk.accelerate_peft(model, **RECIPE)
        of_all = gradients(DistributedDataParallel(model), **batch(rank))
        # The loss is that of this process alone.
        del of_all["loss"]
        found[f"DDP, {checkpoint}"] = {
            name.removeprefix("module."): t for name, t in of_all.items()
        }
    return found


@needs_offload
@needs_gloo
def test_two_processes(tmp_path):
    """PyTorch's ``context_parallel`` has no attention on a CPU, so here keys and values are gathered:
    this shows that the ops compute a part of a sequence as they compute all of it.
    """
    expected = gradients(make())
    of_batches = [gradients(make(), **batch(rank)) for rank in range(2)]
    mean = {name: (of_batches[0][name] + of_batches[1][name]) / 2 for name in expected}
    del mean["loss"]
    for of_process in spawn(two, 2, tmp_path):
        for way, found in of_process.items():
            assert_close(found, mean if way.startswith("DDP") else expected, way)
