"""``GraphedStep`` on a GPU: its calls have the bits of eager steps, and it refuses what a real capture cannot hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels import graphed_step
from tests.helpers.gpu_checks import BF16, DEVICE, FP32, SMALL, assert_equal_bits
from tests.helpers.recorded_graphs import RecordedGraphs

pytestmark = pytest.mark.gpu

IN, HIDDEN, OUT, ROWS = (40, 24, 16, 6) if SMALL else (512, 384, 256, 96)
STEPS, WARMUPS = (3, 1) if SMALL else (40, 3)
TARGETS = ["q_proj"] if SMALL else ["q_proj", "v_proj"]
by_dtype = pytest.mark.parametrize("dtype", (FP32,) if SMALL else (FP32, BF16), ids=str)


@pytest.fixture(autouse=True)
def graphs_of_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if SMALL:
        recorded = RecordedGraphs(monkeypatch)
        monkeypatch.setattr(graphed_step, "Graphs", lambda device: recorded)
    yield


def make(dtype: torch.dtype = FP32, dropout: float = 0.0, **options: Any) -> tuple[nn.Module, slk.StableLoRAAdamW]:
    torch.manual_seed(0)
    settings = {"r": 8, "lora_dropout": dropout, "dtype": dtype, "device": DEVICE}
    model = nn.Sequential(slk.LoRALinear(IN, HIDDEN, **settings), nn.GELU(), slk.LoRALinear(HIDDEN, OUT, **settings))
    options = {"lr": 1e-2, "shrink_ratio": 0.05, "seed": 3, "capturable": True, **options}
    return model, slk.StableLoRAAdamW.from_model(model, **options)


def mse(model: nn.Module, batch: Any) -> Tensor:
    x, goal = batch
    return (model(x) - goal).float().square().mean()


def batches(dtype: torch.dtype, count: int = STEPS, rows: int = ROWS) -> list[tuple[Tensor, Tensor]]:
    """On the host, as a loader gives them."""
    generator = torch.Generator().manual_seed(rows)
    return [tuple(torch.randn(rows, width, generator=generator).to(dtype) for width in (IN, OUT)) for _ in range(count)]


def eager(model: nn.Module, optimizer: slk.StableLoRAAdamW, batch: Any, loss_fn: Any = mse) -> Tensor:
    loss = loss_fn(model, tuple(t.to(DEVICE) for t in batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(
    twins: list[tuple[nn.Module, slk.StableLoRAAdamW]], order: list[Any], loss_fn: Any = mse, **options: Any
) -> slk.GraphedStep:
    """Step both, the first eagerly, and compare after each step. Their lr falls at each step."""
    (eager_model, eager_optimizer), (model, optimizer) = twins
    step = slk.GraphedStep(model, optimizer, loss_fn, num_warmup_iters=WARMUPS, **options)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i / 10)) for _, o in twins]
    for turn, batch in enumerate(order):
        losses = eager(eager_model, eager_optimizer, batch, loss_fn), step(batch)
        expected, found = (
            {f"{name} after step {turn + 1}": value.detach() for name, value in (("loss", loss), *m.named_parameters())}
            for loss, m in zip(losses, (eager_model, model), strict=True)
        )
        assert_equal_bits(expected, found)
        for schedule in schedules:
            schedule.step()
    assert [(pair.latched_at, pair.a_norm) for pair in eager_optimizer.stability()] == [
        (pair.latched_at, pair.a_norm) for pair in optimizer.stability()
    ]
    return step


@by_dtype
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_calls_are_eager_steps(dtype, max_grad_norm, record_property):
    twins = [make(dtype, max_grad_norm=max_grad_norm) for _ in range(2)]
    step = train(twins, batches(dtype))
    assert len(step.captured) == 1
    latched = [pair.latched_at for pair in twins[1][1].stability()]
    record_property("note", f"latches after {STEPS} steps: {latched}")
    assert SMALL or any(at is not None and at > WARMUPS for at in latched), "no pair latched during the replays"


def test_shapes_share_memory_and_take_turns():
    """Graphs in one pool must not overwrite what another graph still needs."""
    parts = (1, 2) if SMALL else (1, 2, 3)
    order = [
        batch for several in zip(*(batches(BF16, STEPS, ROWS // n) for n in parts), strict=True) for batch in several
    ]
    step = train([make(BF16) for _ in range(2)], order)
    assert len(step.captured) == len(parts)


def test_autocast_in_the_loss_function():
    """Its cache must not keep casts of A and B from one replay to the next."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(DEVICE.type, BF16):
            return mse(model, batch)

    train([make() for _ in range(2)], batches(FP32), loss_fn)


def test_a_grad_scaler_skips_and_grows_in_replays():
    model, optimizer = make()
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=3)
    step = slk.GraphedStep(model, optimizer, mse, num_warmup_iters=WARMUPS, grad_scaler=scaler)
    scales = []
    for turn, (x, goal) in enumerate(batches(FP32, WARMUPS + 6)):
        before = [p.detach().clone() for p in model.parameters()]
        overflows = turn == WARMUPS + 1
        step((x, goal * 1e38 if overflows else goal))
        scales.append(scaler.get_scale())
        changed = any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        assert changed != overflows
    assert scales[WARMUPS + 1] == scales[WARMUPS] / 2 and scales[WARMUPS + 4] == 2 * scales[WARMUPS + 1]


def test_each_replay_draws_its_own_masks():
    model, optimizer = make(dropout=0.5, lr=0.0, shrink_ratio=0.0)
    nn.init.ones_(model[2].lora_B)
    step = slk.GraphedStep(model, optimizer, mse, num_warmup_iters=WARMUPS)
    (batch,) = batches(FP32, 1)
    losses = [float(step(batch)) for _ in range(WARMUPS + 5)]
    assert len(set(losses)) == len(losses) and len(step.captured) == 1


def test_a_write_to_a_parameter_between_replays():
    twins = [make(BF16) for _ in range(2)]
    train(twins, batches(BF16, WARMUPS + 2))
    for model, _ in twins:
        with torch.no_grad():
            model[0].lora_B.mul_(100)
    train(twins, batches(BF16, WARMUPS + 2))


def test_on_the_default_stream():
    """A user has no other. The warm-up runs on a side stream, replays on this one: nothing may overtake batch or loss."""
    with nullcontext() if SMALL else torch.cuda.stream(torch.cuda.default_stream()):
        train([make() for _ in range(2)], batches(FP32))


def reads_the_loss(model: nn.Module, batch: Any) -> Tensor:
    loss = mse(model, batch)
    return loss if loss.item() < 1e9 else 2 * loss


def test_a_host_read_is_refused_and_training_goes_on():
    """A failed capture takes no step, and leaves the stream, the generator and the allocator usable."""
    model, optimizer = make(dropout=0.1)
    step = slk.GraphedStep(model, optimizer, reads_the_loss, num_warmup_iters=WARMUPS)
    order = batches(FP32, WARMUPS + 3)
    for batch in order[:WARMUPS]:
        step(batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a CUDA graph cannot hold this step: .* may not read from the GPU"):
            step(order[WARMUPS])
    assert_equal_bits(before, dict(model.named_parameters()))
    twin = copy.deepcopy((model, optimizer))
    eagerly = slk.GraphedStep(model, optimizer, mse, enabled=False)
    for batch in order[WARMUPS:]:
        # Both draw the same masks.
        torch.manual_seed(7)
        expected = eager(*twin, batch)
        torch.manual_seed(7)
        assert torch.equal(eagerly(batch), expected)
    other = slk.GraphedStep(*make(), mse, num_warmup_iters=WARMUPS)
    losses = [other(batch) for batch in order]
    assert len(other.captured) == 1 and all(bool(torch.isfinite(loss)) for loss in losses)


def add_a_hook(model: nn.Module) -> Callable[[], None]:
    return model[0].register_forward_hook(lambda *args: None).remove


def evaluate(model: nn.Module) -> Callable[[], Any]:
    model.eval()
    return model.train


def move(model: nn.Module) -> Callable[[], Any]:
    old = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data.clone()
    return lambda: [setattr(p, "data", data) for p, data in zip(model.parameters(), old, strict=True)]


@pytest.mark.parametrize("change", [add_a_hook, evaluate, move], ids=lambda change: change.__name__)
def test_a_change_after_the_capture_is_refused(change):
    model, optimizer = make()
    step = slk.GraphedStep(model, optimizer, mse, num_warmup_iters=WARMUPS)
    order = batches(FP32, WARMUPS + 2)
    for batch in order[:-1]:
        step(batch)
    undo = change(model)
    with pytest.raises(RuntimeError, match=r"which its CUDA graph does not know: put it back, or call reset\(\)"):
        step(order[-1])
    undo()
    step(order[-1])


def test_a_model_with_hooks_is_refused():
    model, optimizer = make()
    add_a_hook(model)
    with pytest.raises(ValueError, match="model must have no hooks"):
        slk.GraphedStep(model, optimizer, mse)


def llama(kind: str, attention: str) -> tuple[nn.Module, slk.StableLoRAAdamW]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1 if SMALL else 3, attn_implementation=attention)
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config).to(DEVICE, FP32 if SMALL else BF16)
    if kind == "ours":
        slk.apply_lora(model, slk.LoRAConfig(r=4, target_modules=TARGETS), fuse_projections=True)
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS))
        slk.accelerate_peft(model)
    return model, slk.StableLoRAAdamW.from_model(model, lr=1e-2, seed=3, capturable=True)


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_a_hugging_face_model(kind):
    """In "eager" attention, since the backward pass of SDPA's flash kernel adds in any order."""
    (model, optimizer), twin = (llama(kind, "eager") for _ in range(2))
    step = slk.GraphedStep(*twin, num_warmup_iters=WARMUPS)
    generator = torch.Generator().manual_seed(0)
    for turn in range(STEPS):
        ids = torch.randint(64, (2, 12), generator=generator)
        loss = eager(model, optimizer, (ids,), lambda model, rows: model(input_ids=rows[0], labels=rows[0]).loss)
        assert torch.equal(loss, step({"input_ids": ids, "labels": ids})), turn
    assert len(step.captured) == 1


def test_padding():
    """transformers reads the mask, to leave it out, unless a graph captures. It must not be left out in replays."""
    model, optimizer = llama("ours", "sdpa")
    optimizer.param_groups[0].update(lr=0.0, shrink_ratio=0.0)
    step = slk.GraphedStep(model, optimizer, num_warmup_iters=WARMUPS)
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    for length in (12, 12, 12, 12, 9, 5, 12):
        mask = torch.ones_like(ids)
        mask[1, length:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        with torch.no_grad():
            expected = model(**{name: value.to(DEVICE) for name, value in batch.items()}).loss
        assert torch.allclose(step(batch), expected, rtol=1e-2), length
    assert len(step.captured) == 1
