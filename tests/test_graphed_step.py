"""``GraphedStep`` without a GPU: its captures are recorded, its replays run what was recorded. On a GPU: tests/gpu."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from stablelora_kernels import graphed_step
from tests.helpers.optimizers import all_equal, snapshot
from tests.helpers.recorded_graphs import RecordedGraphs
from tests.helpers.small_models import llama
from tests.helpers.steps import latches

pytestmark = [
    pytest.mark.usefixtures("one_thread", "on_triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has real graphs: tests/gpu/test_graphed_step.py"),
]
STEPS = 9
Step = Callable[[Any], Tensor]


@pytest.fixture
def on_triton():
    with slk.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordedGraphs:
    recorded = RecordedGraphs(monkeypatch)
    monkeypatch.setattr(graphed_step, "make_graphs", lambda device: recorded)
    return recorded


def make(dropout: float = 0.0, **options: Any) -> tuple[nn.Module, slk.StableLoRAAdamW]:
    """A model of two LoRA layers, and its optimizer. The second latches at once, the first during the replays."""
    torch.manual_seed(0)
    layers = [slk.LoRALinear(n, k, r=2, lora_dropout=dropout) for n, k in ((64, 8), (8, 5))]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    nn.init.ones_(model[2].lora_B)
    settings = {"lr": 2e-2, "shrink_ratio": 0.05, "seed": 3, "capturable": True, **options}
    return model, slk.StableLoRAAdamW.from_model(model, **settings)


def mse(model: nn.Module, batch: Any) -> Tensor:
    x, goal = batch
    return (model(x) - goal).square().mean()


def batches(count: int = STEPS, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    return [
        (torch.randn(rows, 64, generator=generator), torch.randn(rows, 5, generator=generator)) for _ in range(count)
    ]


def eager(model: nn.Module, optimizer: slk.StableLoRAAdamW, loss_fn: Any = mse, scaler: Any = None) -> Step:
    """What a call stands for."""

    def step(batch: Any) -> Tensor:
        loss = loss_fn(model, batch)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def graphed(model: nn.Module, optimizer: slk.StableLoRAAdamW, loss_fn: Any = mse, **options: Any) -> slk.GraphedStep:
    return slk.GraphedStep(model, optimizer, loss_fn, **{"num_warmup_iters": 2} | options)


def captured(**options: Any) -> tuple[slk.GraphedStep, nn.Module, slk.StableLoRAAdamW]:
    """A step whose graph has been replayed."""
    model, optimizer = make()
    step = graphed(model, optimizer, **options)
    for batch in batches(4):
        step(batch)
    assert len(step.captured) == 1
    return step, model, optimizer


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "clipped": {"max_grad_norm": 0.05},
    "8 bits": {"moments_dtype": torch.uint8},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_calls_are_eager_steps(name: str, graphs: RecordedGraphs) -> None:
    """Losses, parameters, moments and latches have the bits of eager steps. The lr is a number that changes at each step."""
    twins = [make(**OPTIONS[name]) for _ in range(2)]
    losses = []
    for (model, optimizer), make_step in zip(twins, (eager, graphed), strict=True):
        step = make_step(model, optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i / 4))
        torch.manual_seed(5)
        found = []
        for batch in batches():
            found.append(step(batch))
            schedule.step()
        losses.append(found)
    assert (graphs.captures, graphs.replays) == (1, STEPS - 2)
    assert len({float(loss) for loss in losses[1]}) == STEPS
    assert all_equal(*losses)
    assert all_equal(*(snapshot(optimizer) for _, optimizer in twins))
    eager_latches, graphed_latches = (latches(optimizer) for _, optimizer in twins)
    assert eager_latches == graphed_latches
    assert graphed_latches["2"] == 1 and 2 < graphed_latches["0"] <= STEPS
    assert type(twins[1][1].param_groups[0]["lr"]) is float


def test_each_replay_draws_its_own_masks() -> None:
    model, optimizer = make(dropout=0.5, lr=0.0, shrink_ratio=0.0)
    step = graphed(model, optimizer)
    (batch,) = batches(1)
    losses = [float(step(batch)) for _ in range(6)]
    assert len(set(losses)) == 6 and len(step.captured) == 1


def test_numbers_and_tensors_change_between_replays() -> None:
    """lr is a tensor that its owner writes to; the others are numbers that he replaces."""
    results = []
    for make_step in (eager, graphed):
        model, optimizer = make(lr=torch.tensor(2e-2))
        lr = optimizer.param_groups[0]["lr"]
        step = make_step(model, optimizer)
        for turn, batch in enumerate(batches(6)):
            if turn == 4:
                lr.fill_(0.1)
                optimizer.param_groups[0].update(weight_decay=0.5, shrink_ratio=0.25)
            step(batch)
        results.append(snapshot(optimizer))
        assert optimizer.param_groups[0]["lr"] is lr
    assert all_equal(*results)


def test_a_replaced_lr_tensor_is_noticed_and_after_reset_used(graphs: RecordedGraphs) -> None:
    step, _, optimizer = captured()
    optimizer.param_groups[0]["lr"] = lr = torch.tensor(0.0)
    with pytest.raises(
        RuntimeError, match=r"param_groups\[0\]\['lr'\] was 'a number' and is a tensor of shape \[\], which"
    ):
        step(batches(1)[0])
    optimizer.param_groups[0].update(weight_decay=0.0, shrink_ratio=0.0)
    step.reset()
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for batch in batches(3):
        step(batch)
    assert graphs.captures == 2 and optimizer.param_groups[0]["lr"] is lr
    assert all_equal(before, [p.detach() for p in optimizer.param_groups[0]["params"]])


def test_an_lr_tensor_that_comes_while_it_warms_up_is_used() -> None:
    results = []
    for make_step in (eager, graphed):
        model, optimizer = make()
        step = make_step(model, optimizer)
        for turn, batch in enumerate(batches(6)):
            if turn == 1:
                optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
            step(batch)
        results.append(snapshot(optimizer))
    assert all_equal(*results)


def test_a_grad_scaler_is_part_of_the_graph(graphs: RecordedGraphs) -> None:
    """The sixth batch overflows: its step is skipped and the scale halves, in a replay. Later the scale grows."""
    results = []
    for make_step in (eager, graphed):
        model, optimizer = make()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        step = make_step(model, optimizer, **{"scaler" if make_step is eager else "grad_scaler": scaler})
        scales = []
        for turn, (x, goal) in enumerate(batches()):
            step((x, goal * 1e38 if turn == 5 else goal))
            scales.append(scaler.get_scale())
        results.append([*snapshot(optimizer), torch.tensor(scales)])
    assert all_equal(*results) and graphs.replays == STEPS - 2
    assert scales[5] == scales[4] / 2 and scales[8] == scales[5] * 2


def test_two_shapes_take_turns(graphs: RecordedGraphs) -> None:
    results = []
    for make_step in (eager, graphed):
        model, optimizer = make()
        step = make_step(model, optimizer)
        order = [batch for pair in zip(batches(5), batches(5, rows=3), strict=True) for batch in pair]
        losses = torch.stack([step(batch) for batch in order])
        results.append([losses, *snapshot(optimizer)])
    assert all_equal(*results)
    assert (graphs.captures, graphs.replays) == (2, 6)
    assert step.captured == ["(float32 [6, 64], float32 [6, 5])", "(float32 [3, 64], float32 [3, 5])"]


@pytest.mark.parametrize("options", [{"max_graphs": 1}, {"sample_batches": [batches(1)[0]]}])
def test_a_further_shape_is_refused(options: dict[str, Any]) -> None:
    step, _, optimizer = captured(**options)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"one of the 1 shapes .* got \(float32 \[3, 64\], .* instead of \(float32 \[6, 64\]"
    ):
        step(batches(1, rows=3)[0])
    assert all_equal(before, snapshot(optimizer))
    step(batches(1)[0])


def write(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    with torch.no_grad():
        model[0].lora_B.mul_(100)


def write_unseen(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    model[0].lora_B.data.mul_(100)
    optimizer.refresh()


@pytest.mark.parametrize("change", [write, write_unseen])
@pytest.mark.parametrize("turn", [2, 4], ids=["before the capture", "between replays"])
def test_after_a_write_to_a_parameter_one_step_is_eager(change: Any, turn: int, graphs: RecordedGraphs) -> None:
    """The write makes B large enough to latch, which a replay, with the norms of the step before it, would not see."""
    results = []
    for make_step in (eager, graphed):
        model, optimizer = make(lr=1e-3)
        step = make_step(model, optimizer)
        for i, batch in enumerate(batches(6)):
            if i == turn:
                change(model, optimizer)
            step(batch)
        results.append(snapshot(optimizer))
        assert latches(optimizer)["0"] == turn + 1
    assert all_equal(*results) and graphs.replays == 3


def test_a_backward_pass_through_what_a_replay_overwrote_is_refused() -> None:
    step, model, _ = captured()
    x, goal = batches(1)[0]
    loss = mse(model, (x, goal))
    step((x, goal))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def with_pre_hook(model: nn.Module, optimizer: Any) -> None:
    model[0].register_forward_pre_hook(lambda module, args: None)


def with_backward_hook(model: nn.Module, optimizer: Any) -> None:
    model[2].register_full_backward_hook(lambda module, grads, outputs: None)


def with_accumulate_hook(model: nn.Module, optimizer: Any) -> None:
    model[2].lora_A.register_post_accumulate_grad_hook(lambda p: None)


def with_step_hook(model: nn.Module, optimizer: Any) -> None:
    optimizer.register_step_post_hook(print)


def with_schedule(model: nn.Module, optimizer: Any) -> None:
    optimizer.shrink_schedule = float


def with_buffer_elsewhere(model: nn.Module, optimizer: Any) -> None:
    model.register_buffer("elsewhere", torch.zeros(1, device="meta"))


def not_capturable(model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[0]["capturable"] = False


REFUSED = {
    with_pre_hook: r"model must have no hooks, .* got hooks on '0'",
    with_backward_hook: r"model must have no hooks, .* got hooks on '2'",
    with_accumulate_hook: r"model must have no hooks, .* got hooks on '2.lora_A'",
    with_step_hook: "optimizer must have no step hooks, .* got <built-in function print>",
    with_schedule: "optimizer must have no shrink_schedule, .* got <class 'float'>: write its value",
    with_buffer_elsewhere: "model and optimizer must be on one GPU, got tensors on cpu, meta",
    not_capturable: "optimizer must be built with capturable=True, got capturable=False",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_cannot_be_captured_is_refused(change: Callable[..., None]) -> None:
    model, optimizer = make()
    change(model, optimizer)
    with pytest.raises(ValueError, match=REFUSED[change]):
        graphed(model, optimizer)


@pytest.mark.parametrize("change", [with_pre_hook, with_step_hook], ids=lambda change: change.__name__)
def test_it_is_refused_also_if_it_comes_after_the_construction(change: Callable[..., None]) -> None:
    model, optimizer = make()
    step = graphed(model, optimizer)
    change(model, optimizer)
    step(batches(1)[0])
    step(batches(1)[0])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=REFUSED[change]):
        step(batches(1)[0])
    assert all_equal(before, snapshot(optimizer))


def test_data_parallelism_is_refused(mesh: Any) -> None:
    model, optimizer = make()
    for wrapper in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        with pytest.raises(ValueError, match=f"model must not be in {wrapper.__name__}, .* got it in one"):
            graphed(wrapper(model), optimizer)


def test_shards_are_refused(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model, _ = make()
    fully_shard(model, mesh=mesh)
    optimizer = slk.StableLoRAAdamW.from_model(model, capturable=True)
    with pytest.raises(ValueError, match=r"model must be whole on one GPU, got the DTensor '0\.weight'"):
        graphed(model, optimizer)


def test_global_hooks_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(ValueError, match=r"model must have no hooks, .* got global module hooks"):
            graphed(*make())
    finally:
        handle.remove()


def test_an_optimizer_on_pytorch_operators_is_refused() -> None:
    with slk.use_backend("torch"), pytest.raises(ValueError, match=r"must step on Triton's kernels .* backend 'torch'"):
        graphed(*make())


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model must be on a GPU to be captured, got it on cpu; enabled=False runs"):
        graphed(*make())


WRONG = {
    "model": (TypeError, "model must be a torch.nn.Module, got int"),
    "optimizer": (TypeError, "optimizer must be a StableLoRAAdamW, got int"),
    "loss_fn": (TypeError, "loss_fn must be a function of the model and a batch, got 1"),
    "grad_scaler": (TypeError, "grad_scaler must be a torch.amp.GradScaler, got int"),
    "max_graphs": (ValueError, "max_graphs must be at least 1, got 0"),
    "num_warmup_iters": (ValueError, "num_warmup_iters must be at least 1, got 0"),
    "enabled": (TypeError, "enabled must be a bool, got 1"),
    "sample_batches": (ValueError, "sample_batches must be 1 to max_graphs=8 batches, got 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    model, optimizer = make()
    value = {"max_graphs": 0, "num_warmup_iters": 0, "sample_batches": []}.get(name, 1)
    error, match = WRONG[name]
    with pytest.raises(error, match=match):
        slk.GraphedStep(**{"model": model, "optimizer": optimizer, "loss_fn": mse, name: value})


X, GOAL = batches(1)[0]
WRONG_BATCHES = {
    "a number": (3, TypeError, "batch must be a dense tensor, got int; a batch is a tensor, or"),
    "a number in a tuple": ((X, 3), TypeError, r"batch\[1\] must be a dense tensor, got int"),
    "a list in a dict": ({"x": [X]}, TypeError, r"batch\['x'\] must be a dense tensor, got list"),
    "a sparse tensor": (X.to_sparse(), TypeError, "batch must be a dense tensor, got layout torch.sparse_coo"),
    "a parameter": (nn.Parameter(X), TypeError, "batch must be a dense tensor, got Parameter"),
    "with a gradient": ((X, GOAL.clone().requires_grad_()), ValueError, r"batch\[1\] must need no gradient, got"),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_wrong_batches(name: str) -> None:
    step = graphed(*make())
    batch, error, match = WRONG_BATCHES[name]
    with pytest.raises(error, match=match):
        step(batch)


def test_without_a_loss_function_a_batch_is_a_dict() -> None:
    with pytest.raises(TypeError, match="batch must be a dict unless loss_fn is given, got tuple"):
        graphed(*make(), loss_fn=None)((X, GOAL))


@pytest.mark.parametrize("batch", [X, [X, GOAL], (X, GOAL), {"x": X, "goal": GOAL}], ids=lambda b: type(b).__name__)
def test_loss_fn_gets_the_batch_as_it_came(batch: Any) -> None:
    kinds = []

    def loss_fn(model: nn.Module, given: Any) -> Tensor:
        kinds.append(type(given))
        x = given if isinstance(given, Tensor) else next(iter(given.values() if isinstance(given, dict) else given))
        return model(x).square().mean()

    graphed(*make(), loss_fn=loss_fn)(batch)
    assert kinds == [type(batch)]


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "a number": (lambda model, batch: 1.0, "got float"),
    "a vector": (lambda model, batch: model(batch[0]).sum(0), r"got one of shape \[5\]"),
    "no gradient": (lambda model, batch: model(batch[0]).sum().detach(), r"got one of shape \[\]"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_losses(name: str) -> None:
    loss_fn, got = LOSSES[name]
    with pytest.raises(TypeError, match=f"loss_fn must return a 0-d tensor with a gradient, {got}"):
        graphed(*make(), loss_fn=loss_fn)((X, GOAL))


def reads_the_loss(model: nn.Module, batch: Any) -> Tensor:
    loss = mse(model, batch)
    return loss if loss.item() < 1e9 else 2 * loss


def draws_on_the_host(model: nn.Module, batch: Any) -> Tensor:
    return mse(model, batch) * random.random()


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (reads_the_loss, r"a CUDA graph cannot hold this step: operation not permitted .* may not read from the GPU"),
        (
            draws_on_the_host,
            "a CUDA graph cannot hold this step: the model or loss_fn draws random numbers on the host",
        ),
    ],
)
def test_a_step_that_a_graph_cannot_hold_is_refused(loss_fn: Any, match: str, graphs: RecordedGraphs) -> None:
    """It is not taken, now or at the next call, and eager steps go on from where they were."""
    model, optimizer = make()
    step = graphed(model, optimizer, loss_fn)
    step((X, GOAL))
    step((X, GOAL))
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            step((X, GOAL))
    assert all_equal(before, snapshot(optimizer)) and graphs.replays == 0 and step.captured == []
    assert all(p.grad is None for p in model.parameters()) and optimizer.param_groups[0]["lr"] == 2e-2
    twin = copy.deepcopy((model, optimizer))
    losses = [eager(*twin)((X, GOAL)), graphed(model, optimizer, enabled=False)((X, GOAL))]
    assert torch.equal(*losses) and all_equal(snapshot(twin[1]), snapshot(optimizer))


def test_gradients_from_outside_are_refused() -> None:
    step, model, optimizer = captured()
    mse(model, (X, GOAL)).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"gradients must be None before a step, .* got some: .*zero_grad\(\) first"):
        step((X, GOAL))
    assert all_equal(before, snapshot(optimizer)) and model[0].lora_A.grad is not None
    optimizer.zero_grad()
    step((X, GOAL))


def test_autocast_around_the_step_is_refused() -> None:
    step, *_ = captured()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast must be inside of loss_fn"):
        step((X, GOAL))


def test_an_exception_of_the_model_leaves_no_gradient() -> None:
    def fails(model: nn.Module, batch: Any) -> Tensor:
        mse(model, batch).backward()
        raise KeyError("mine")

    model, optimizer = make()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError, match="mine"):
        graphed(model, optimizer, fails)((X, GOAL))
    assert all_equal(before, [p.detach() for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters()) and optimizer.param_groups[0]["lr"] == 2e-2


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_not_enabled_every_step_is_eager(backend: str, graphs: RecordedGraphs) -> None:
    results = []
    with slk.use_backend(backend):
        for make_step in (eager, lambda *args: graphed(*args, enabled=False)):
            model, optimizer = make(capturable=False, shrink_schedule=lambda step: 0.1 / step)
            step = make_step(model, optimizer)
            losses = torch.stack([step(batch) for batch in batches(4)])
            results.append([losses, *snapshot(optimizer)])
    assert all_equal(*results) and graphs.captures == 0


def replace_parameter(model: nn.Module) -> Callable[[], None]:
    old, model[0].lora_A = model[0].lora_A, nn.Parameter(model[0].lora_A.detach().clone())
    return lambda: setattr(model[0], "lora_A", old)


def move(p: Tensor) -> Callable[[], None]:
    old, p.data = p.data, p.data.clone()
    return lambda: setattr(p, "data", old)


def assign(owner: Any, name: str, value: Any) -> Callable[[], None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old)


def update(values: Any, key: Any, value: Any) -> Callable[[], None]:
    old, values[key] = values[key], value
    return lambda: values.__setitem__(key, old)


def enter(block: Any) -> Callable[[], None]:
    block.__enter__()
    return lambda: block.__exit__(None, None, None)


def hook(handle: Any) -> Callable[[], None]:
    return handle.remove


def merge(model: nn.Module) -> Callable[[], Any]:
    slk.merge_lora(model)
    return lambda: slk.unmerge_lora(model)


def deterministic() -> Callable[[], None]:
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(False)


def nothing(*args: Any) -> None:
    pass


# By its words in the message, a change after the capture. It returns what takes the change back.
CHANGES: dict[str, Callable[[nn.Module, slk.StableLoRAAdamW], Callable[[], Any]]] = {
    r"model.training was True and is False": lambda m, o: m.eval() and m.train,
    r"model.2.training was True and is False": lambda m, o: m[2].eval() and m[2].train,
    r"model.0.merged was False and is True": lambda m, o: merge(m),
    r"model.0._disabled was False and is True": lambda m, o: enter(slk.disable_lora(m)),
    r"model.0.scaling was 8.0 and is 1.0": lambda m, o: assign(m[0], "scaling", 1.0),
    r"model.0.lora_dropout was 0.0 and is 0.5": lambda m, o: assign(m[0], "lora_dropout", 0.5),
    r"model._modules.1 was Tanh() and is ReLU()": lambda m, o: assign(m, "1", nn.ReLU()),
    r"model.0._parameters.lora_A was a tensor of shape [2, 64] and is a": lambda m, o: replace_parameter(m),
    r"model.0._forward_hooks.": lambda m, o: hook(m[0].register_forward_hook(nothing)),
    r"model.2._backward_hooks.": lambda m, o: hook(m[2].register_full_backward_hook(nothing)),
    r"model.0.lora_B._backward_hooks was None and is": lambda m, o: hook(m[0].lora_B.register_hook(lambda g: None)),
    r"model.0.lora_A.requires_grad was True and is False": lambda m, o: assign(m[0].lora_A, "requires_grad", False),
    r"model.0.weight has other memory than before": lambda m, o: move(m[0].weight),
    r"model.2.lora_B has other memory than before": lambda m, o: move(m[2].lora_B),
    r"backend was 'triton' and is 'torch'": lambda m, o: enter(slk.use_backend("torch")),
    r"kernel was 'auto' and is 'split'": lambda m, o: enter(slk.use_kernel("split")),
    r"autotune was False and is True": lambda m, o: enter(slk.use_autotune(True)),
    r"deterministic algorithms was False and is True": lambda m, o: deterministic(),
    r"global module hooks was False": lambda m, o: hook(nn.modules.module.register_module_forward_pre_hook(nothing)),
    r"optimizer's step hooks was [] and is [": lambda m, o: hook(o.register_step_pre_hook(nothing)),
    r"optimizer.shrink_schedule was None and is": lambda m, o: assign(o, "shrink_schedule", float),
    r"optimizer.param_groups[0]['eps'] was 1e-08 and is 0.1": lambda m, o: update(o.param_groups[0], "eps", 0.1),
    r"optimizer.param_groups[0]['betas'] was (0.9": lambda m, o: update(o.param_groups[0], "betas", (0.5, 0.5)),
    r"optimizer.param_groups[0]['max_grad_norm'] was None and is 1.0": lambda m, o: assign(o, "max_grad_norm", 1.0),
    r"optimizer has other parameters or another state": lambda m, o: update(o.state, m[0].lora_A, {}),
}


@pytest.fixture(scope="module")
def shared() -> Any:
    """One captured step for all changes, each of which is taken back."""
    with slk.use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        recorded = RecordedGraphs(patch)
        patch.setattr(graphed_step, "make_graphs", lambda device: recorded)
        yield captured(), recorded


@pytest.mark.parametrize("words", CHANGES)
def test_a_change_after_the_capture_is_noticed(words: str, shared: Any) -> None:
    (step, model, optimizer), recorded = shared
    before, replays = [p.detach().clone() for p in model.parameters()], recorded.replays
    undo = CHANGES[words](model, optimizer)
    try:
        with pytest.raises(
            RuntimeError, match=re.escape(words) + ".*which its CUDA graph does not know: put it back, or call"
        ):
            step((X, GOAL))
    finally:
        undo()
    assert all_equal(before, [p.detach() for p in model.parameters()]) and recorded.replays == replays
    step((X, GOAL))
    assert recorded.replays == replays + 1


@pytest.mark.parametrize("change", ["load", "group"])
def test_an_optimizer_that_was_built_anew_needs_a_reset(change: str, graphs: RecordedGraphs) -> None:
    step, model, optimizer = captured()
    if change == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer.add_param_group({"params": [("head", nn.Parameter(torch.ones(3)))], "capturable": True})
    with pytest.raises(
        RuntimeError, match=r"optimizer has other parameters or another state .*load_state_dict, state\), which"
    ):
        step((X, GOAL))
    twin = copy.deepcopy((model, optimizer))
    step.reset()
    losses = [[take(batch) for batch in batches(4)] for take in (step, eager(*twin))]
    assert all_equal(*losses) and all_equal(snapshot(optimizer), snapshot(twin[1])) and graphs.captures == 2


def test_a_change_while_it_warms_up_begins_anew(graphs: RecordedGraphs) -> None:
    model, optimizer = make()
    step = graphed(model, optimizer)
    step((X, GOAL))
    model.eval()
    step((X, GOAL))
    step((X, GOAL))
    assert graphs.captures == 0
    step((X, GOAL))
    assert graphs.captures == 1


def llama_with(kind: str) -> tuple[nn.Module, slk.StableLoRAAdamW]:
    torch.manual_seed(0)
    model: Any = llama()
    if kind == "PEFT's layers":
        peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
        slk.accelerate_peft(model)
    else:
        slk.apply_lora(
            model, slk.LoRAConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]), fuse_projections=True
        )
    return model, slk.StableLoRAAdamW.from_model(model, lr=1e-2, seed=3, capturable=True)


@pytest.mark.parametrize("kind", ["PEFT's layers", "our layers"])
def test_a_hugging_face_model_takes_its_batch_as_a_dict(kind: str, graphs: RecordedGraphs) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(32, (2, 5), generator=generator) for _ in range(5)]
    results = []
    for make_step in (eager, graphed):
        model, optimizer = llama_with(kind)
        step = make_step(model, optimizer, None if make_step is graphed else lambda model, batch: model(**batch).loss)
        torch.manual_seed(1)
        losses = torch.stack([step({"input_ids": ids, "labels": ids}) for ids in rows])
        results.append([losses, *snapshot(optimizer)])
    assert all_equal(*results) and (graphs.captures, graphs.replays) == (1, 3)
    assert step.captured == ["(input_ids int64 [2, 5], labels int64 [2, 5])"]


def test_a_change_of_a_peft_model_is_noticed() -> None:
    model, optimizer = llama_with("PEFT's layers")
    step = graphed(model, optimizer, None)
    batch = {name: torch.ones(2, 5, dtype=torch.int64) for name in ("input_ids", "labels")}
    for _ in range(3):
        step(batch)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(RuntimeError, match=r"model\._adapters_disabled was False and is True"), model.disable_adapter():
        step(batch)
    layer.set_scale("default", 3.0)
    with pytest.raises(RuntimeError, match=r"q_proj\.scaling\.default was 4\.0 and is 12\.0"):
        step(batch)
    layer.set_scale("default", 1.0)
    layer.merged_adapters.append("default")
    with pytest.raises(RuntimeError, match=r"q_proj\.merged_adapters\.0 was 'absent' and is 'default'"):
        step(batch)
    layer.merged_adapters.clear()
    slk.restore_peft(model)
    with pytest.raises(RuntimeError, match=r"q_proj was 'AcceleratedLinear' and is 'Linear'"):
        step(batch)
    slk.accelerate_peft(model)
    step(batch)
