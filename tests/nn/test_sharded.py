"""LoRA on weights that tensor parallelism cuts, before it or after it: over gloo on two processes,
equal to one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.sharded import LoRAShardedLinear
from stablelora_kernels.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel
from stablelora_kernels.testing import fp8_weight
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.quantized_weights import fp8_linear

pytestmark = needs_gloo
WIDTH, HIDDEN, STEPS, ROWS, LENGTH = 12, 20, 6, 4, 6
NAMES, ALL = ["up", "down"], slice(None)


class Block(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias), nn.Linear(HIDDEN, WIDTH, bias)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def near(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(
        got, expected, rtol=1e-5, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


PLAN = {"up": LoRAColwiseParallel(), "down": LoRARowwiseParallel()}
WITHOUT_LORA = {"up": ColwiseParallel(), "down": RowwiseParallel()}
# Sequence parallelism: between the layers each process has some of the tokens.
SEQUENCE = {
    "up": LoRAColwiseParallel(input_layouts=Shard(1)),
    "down": LoRARowwiseParallel(output_layouts=Shard(1)),
}


def cut_in_two(model: nn.Module, plan: dict[str, Any] = PLAN) -> None:
    for block in model.children():
        parallelize_module(block, init_device_mesh("cpu", (2,)), plan)


def cut_without_lora(model: nn.Module) -> None:
    cut_in_two(model, WITHOUT_LORA)


def cut_tokens(model: nn.Module) -> None:
    cut_in_two(model, SEQUENCE)


Cut = Callable[[nn.Module], None]


def lora_model(
    r: int = 3,
    bias: bool = True,
    dropout: float = 0.0,
    before: Cut | None = None,
    after: Cut | None = None,
) -> nn.Sequential:
    """The same in every process: cut before it gets LoRA or after that, or whole."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(bias), Block(bias))
    if before is not None:
        before(model)
    config = slk.LoRAConfig(r=r, target_modules=NAMES, lora_dropout=dropout, bias="lora_only")
    report = slk.apply_lora(model, config)
    assert [(m.in_features, m.out_features) for m in report.replaced] == 2 * [
        (WIDTH, HIDDEN),
        (HIDDEN, WIDTH),
    ]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for p in (layer.lora_A, layer.lora_B):
                value = torch.randn(p.shape, generator=generator) * 0.3
                p.copy_(
                    distribute_tensor(value, p.device_mesh, p.placements)
                    if before is not None
                    else value
                )
    if after is not None:
        after(model)
    is_cut = before is not None or after in (cut_in_two, cut_tokens)
    assert (
        all(type(layer) is LoRAShardedLinear for layer in lora_layers(model).values()) or not is_cut
    )
    return model


def part_of(whole: int, parts: int, part: int) -> slice:
    return slice(part * whole // parts, (part + 1) * whole // parts)


def train(
    model: nn.Module, backend: str, rows: slice = ALL, tokens: slice = ALL, parts: int = 1
) -> dict[str, Any]:
    """Outputs, gradients and adapters of a model that sees ``rows`` and ``tokens`` of each batch,
    or one of ``parts``.
    """
    # Sums are in another order on several processes: with PyTorch's eps AdamW would make up to a
    # whole step of that where a gradient is next to nothing, and steps much longer than these make
    # the model amplify it.
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=0.01, eps=1e-2, shrink_ratio=0.1, seed=7)
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {}
    with slk.settings(backend=backend):
        for step in range(STEPS):
            x, grad = (
                torch.randn(ROWS, LENGTH, WIDTH, generator=generator)[rows, tokens]
                for _ in range(2)
            )
            x.requires_grad_()
            y = model(x)
            # A mean over processes, as FSDP2 takes it.
            (y * grad).sum().mul(parts).backward()
            if not step:
                found |= {"y": y.detach().clone(), "dx": x.grad / parts}
                found |= {
                    f"d{name}": whole(p.grad)
                    for name, p in model.named_parameters()
                    if p.grad is not None
                }
            optimizer.step()
            optimizer.zero_grad()
    found |= {name: whole(p) for name, p in model.named_parameters()}
    found["latches"] = [pair.latched_at for pair in optimizer.stability()]
    return found


def trains_as_alone(
    case: str,
    backend: str,
    options: dict[str, Any],
    rows: slice = ALL,
    tokens: slice = ALL,
    parts: int = 1,
) -> None:
    """Equal to one process; sums are in another order."""
    alone = train(
        lora_model(**{name: options[name] for name in ("r", "bias") if name in options}), backend
    )
    assert any(alone["latches"]) or "rank" in case
    alone |= {name: alone[name][rows, tokens] for name in ("y", "dx")}
    got = train(lora_model(**options), backend, rows, tokens, parts)
    assert got.keys() == alone.keys() and got["latches"] == alone["latches"], case
    for key in alone.keys() - {"latches"}:
        near(f"{case}: {key}", got[key], alone[key])


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cut first, torch": ("torch", {"before": cut_without_lora}),
    "cut first, triton": ("triton", {"before": cut_without_lora}),
    "cut first, no bias, rank 20": ("triton", {"before": cut_without_lora, "r": 20, "bias": False}),
    "LoRA first, torch": ("torch", {"after": cut_in_two}),
    "LoRA first, triton": ("triton", {"after": cut_in_two}),
    "LoRA first, cut tokens": ("torch", {"after": cut_tokens}),
}


def of_all(value: Any) -> list[Any]:
    """The ``value`` of each process."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def masks(rank: int, backend: str) -> None:
    """With dropout, of processes that were seeded alike: what each layer made of one input, and
    what came next.
    """
    model, plain = lora_model(dropout=0.5, after=cut_in_two), lora_model(dropout=0.5)
    with slk.settings(backend=backend):
        torch.manual_seed(5)
        expected = plain[0].up(torch.ones(64, WIDTH)).detach()
        torch.manual_seed(5)
        up, down = model[0].up, model[0].down
        # Cut rows: one mask in all processes, the one that one process draws.
        near("up", torch.cat(of_all(up(torch.ones(64, WIDTH)).detach()), -1), expected)
        # Cut columns: each process has drawn its own, and goes on alike. Ones for A and no base
        # product show the sums of what was kept: each process shows its own columns, in its own
        # output column before the sum.
        with torch.no_grad():
            for p in (down.weight, down.bias, down.lora_A, down.lora_B):
                p.zero_()
            down.lora_A.to_local()[rank].fill_(1.0)
            down.lora_B.to_local()[0, 0] = down.lora_B.to_local()[1, 1] = 1.0
        kept = down(torch.ones(64, down.in_features // 2)).detach()[:, :2].clone()
    first, second = of_all((kept, torch.rand(3)))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    a, b = kept.unbind(-1)
    assert a.std() > 0 and b.std() > 0 and not torch.equal(a, b)


def merging(rank: int) -> None:
    model, plain = (lora_model().eval() for _ in range(2))
    frozen = {name: layer.weight.detach().clone() for name, layer in lora_layers(model).items()}
    cut_in_two(model)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4))
    before = model(x).detach().clone()
    report = slk.merge_lora(model)
    expected = slk.merge_lora(plain)
    near("merged", model(x).detach(), before)
    assert report.errors.keys() == expected.errors.keys()
    for name, error in report.errors.items():
        assert error.largest_delta == pytest.approx(expected.errors[name].largest_delta, rel=1e-5)
        assert 0 < error.largest_error < 1e-6
    slk.unmerge_lora(model)
    assert all(
        torch.equal(whole(layer.weight), frozen[name]) for name, layer in lora_layers(model).items()
    )
    # One process's part is not finite: none merges.
    layer = model[0].up
    with torch.no_grad():
        layer.lora_B.to_local()[-1 if rank else slice(0)] = float("nan")
    with pytest.raises(ValueError, match="would give a weight that is not finite"):
        layer.merge()
    assert not layer.merged


def save_and_load(rank: int, place: Path) -> None:
    """Of a model that is cut, into one that is cut and one that is not."""
    torch.manual_seed(rank)
    models = [nn.Sequential(Block()) for _ in range(2)]
    for model in models:
        for p in model.parameters():
            dist.broadcast(p.detach(), 0)
        cut_without_lora(model)
    config = slk.LoRAConfig(r=3, target_modules=NAMES, init_lora_weights=False, bias="lora_only")
    slk.apply_lora(models[0], config)
    slk.save_adapter(models[0], place / "adapter")
    dist.barrier()
    models.append(nn.Sequential(Block()))
    for model in models[1:]:
        slk.load_adapter(model, place / "adapter")
    saved, cut, plain = (lora_layers(model) for model in models)
    for name in saved:
        for half in ("lora_A", "lora_B", "bias"):
            first, *others = (whole(getattr(found[name], half)) for found in (saved, cut, plain))
            assert all(torch.equal(first, other) for other in others)
    assert type(cut["0.up"]) is LoRAShardedLinear and type(plain["0.up"]) is slk.LoRALinear


def cut(mesh: DeviceMesh, *placements: Any) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, HIDDEN, bias=False)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, placements))
    return linear


def any_placement(placement: Any, given: Any) -> None:
    """Of the weight and of x."""
    mesh = init_device_mesh("cpu", (2,))
    layer = slk.LoRALinear.from_linear(cut(mesh, placement), r=3, init_lora_weights=False)
    assert type(layer) is LoRAShardedLinear and layer.lora_A.placements[0].is_shard() == (
        placement == Shard(1)
    )
    plain = slk.LoRALinear(WIDTH, HIDDEN, bias=False, r=3)
    for name in ("weight", "lora_A", "lora_B"):
        getattr(plain, name).data = whole(getattr(layer, name))
    x, grad = torch.randn(5, WIDTH), torch.randn(5, HIDDEN)
    y, expected = layer(distribute_tensor(x, mesh, [given])), plain(x)
    expected.backward(grad)
    y.backward(distribute_tensor(grad, mesh, [Replicate()]))
    near(f"{placement}, {given}", whole(y), expected.detach())
    for name in ("lora_A", "lora_B"):
        near(
            f"{placement}, {given}: {name}",
            whole(getattr(layer, name).grad),
            getattr(plain, name).grad,
        )


def two(rank: int, world: int, place: Path) -> None:
    save_and_load(rank, place)
    for case, (backend, options) in CASES.items():
        trains_as_alone(
            case, backend, options, tokens=part_of(LENGTH, 2, rank) if "tokens" in case else ALL
        )
    for backend in ("torch", "triton"):
        masks(rank, backend)
    merging(rank)
    for placements in itertools.product((Replicate(), Shard(0), Shard(1)), repeat=2):
        any_placement(*placements)


def four(rank: int, world: int, place: Path) -> None:
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def cut(model: nn.Module) -> None:
        for block in model.children():
            parallelize_module(block, both["tensor"], PLAN)
            fully_shard(block, mesh=both["data"])
        fully_shard(model, mesh=both["data"])

    def copies_of_shards(model: nn.Module) -> None:
        for block in model.children():
            fully_shard(block, mesh=both)
        fully_shard(model, mesh=both)

    # With copies of shards, every process has its own part of the batch.
    for after, parts, part in ((cut, 2, both.get_local_rank("data")), (copies_of_shards, 4, rank)):
        rows = part_of(ROWS, parts, part)
        trains_as_alone(after.__name__, "torch", {"after": after}, rows, parts=parts)


@pytest.mark.parametrize("target", [two, pytest.param(four, marks=pytest.mark.nightly)])
def test_processes(target: Callable[..., None], tmp_path: Path) -> None:
    spawn(target, 2 if target is two else 4, tmp_path)


def test_other_modules_and_hooks(mesh: DeviceMesh) -> None:
    """What torch's own styles do for a module without LoRA; and the layer's hooks stay."""
    model = lora_model()
    plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    parallelize_module(plain, mesh, {"0": LoRAColwiseParallel(), "1": LoRARowwiseParallel()})
    assert plain[0].weight.placements == (Shard(0),) and plain[1].weight.placements == (Shard(1),)

    up, seen = model[0].up, []
    up.register_forward_hook(lambda module, args, output: seen.append(type(output).__name__))
    up.lora_A.requires_grad_(False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    parallelize_module(model[0], mesh, PLAN)
    assert model[0].up is up and type(up) is LoRAShardedLinear
    assert (
        not up.lora_A.requires_grad
        and up.lora_A.placements == (Replicate(),)
        and up.lora_B.placements == (Shard(0),)
    )
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model(torch.randn(2, WIDTH))
    assert seen == ["DTensor"]


def test_projections_that_were_computed_together(mesh: DeviceMesh) -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")})
    slk.apply_lora(model, slk.LoRAConfig(target_modules="all-linear"), fuse_projections=True)
    with pytest.warns(
        RuntimeWarning,
        match="fuse_projections does not reach layers that tensor parallelism has cut",
    ):
        parallelize_module(model, mesh, {"q_proj": LoRAColwiseParallel()})
    x = torch.randn(5, 8)
    assert model["q_proj"](x).shape == model["v_proj"](x).shape == (5, 8)


@pytest.mark.parametrize("style", PLAN.values(), ids=lambda style: type(style).__name__)
def test_layers_that_are_not_cut(style, mesh):
    merged = slk.LoRALinear(8, 8, r=2)
    merged.merge()
    sharded = slk.LoRALinear.from_linear(cut(mesh, Shard(0)), r=2)
    quantized = slk.LoRALinear.from_linear(fp8_linear(fp8_weight(8, 64), torch.bfloat16), r=2)
    name = type(style).__name__
    with pytest.raises(
        ValueError, match=f"{name} cuts a LoRALinear that is not merged, got a merged one"
    ):
        parallelize_module(merged, mesh, style)
    for layer in (sharded, quantized):
        message = f"{name} cuts a LoRALinear over a plain weight, got a {type(layer).__name__}"
        with pytest.raises(NotImplementedError, match=message):
            parallelize_module(layer, mesh, style)


def test_start_and_errors(mesh):
    linear = cut(mesh, Shard(0))
    layer = slk.LoRALinear.from_linear(linear, r=3)
    assert bool(whole(layer.lora_A).any()) and not bool(whole(layer.lora_B).any())
    with pytest.raises(
        TypeError, match="x must be a DTensor beside a sharded weight, got a Tensor"
    ):
        layer(torch.randn(5, WIDTH))
    two = init_device_mesh("cpu", (1, 1))
    with pytest.raises(
        ValueError, match=r"linear's weight must be replicated or cut .* on 2 dimensions"
    ):
        slk.LoRALinear.from_linear(cut(two, Shard(0), Replicate()))
