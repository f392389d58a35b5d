"""What holds for every row of the options' table: resuming, copies, foreign state, skipped steps;
and states that do not fit.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.optim.options import LIVE, STORAGE
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import load_moment
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.launches import count_launches
from tests.helpers.optimizers import (
    DEVICE,
    SHAPES,
    all_equal,
    halves,
    make_pairs,
    params_of,
    set_grads,
    snapshot,
)
from tests.helpers.small_models import Model, lora_options
from tests.helpers.steps import latches, saved_and_loaded, take_step
from tests.optim.options import FP32, OPTIONS, STORED, Row

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=OPTIONS)
def option(request: pytest.FixtureRequest) -> Row:
    return OPTIONS[request.param]


@pytest.fixture(params=STORED)
def row(request: pytest.FixtureRequest) -> Row:
    return OPTIONS[request.param]


def storage_of(optimizer: StableLoRAAdamW) -> dict[str, Any]:
    return {name: optimizer.param_groups[0][name] for name in STORAGE}


def tensors_in(state: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


@pytest.mark.covering(1)
def test_resumed_and_copied_it_goes_on_to_the_bit(backend, option):
    """All options are in the state but storage."""
    straight, cut = option.optimizer(), option.optimizer()
    for step in range(4):
        take_step(step, straight, cut)
    kept = {key: value for key, value in option.options.items() if key in STORAGE}
    pairs = option.pairs(seed=9)
    state, values = saved_and_loaded([cut.state_dict(), [p.detach() for p in params_of(cut)]])
    with torch.no_grad():
        for p, value in zip(halves(pairs), values, strict=True):
            p.copy_(value)
    resumed = StableLoRAAdamW(pairs, lr=1.0, shrink_ratio=0.5, seed=6, **kept)
    untouched = copy.deepcopy(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(state)
    others = [resumed, copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))]
    for other in others:
        assert other.max_grad_norm == straight.max_grad_norm
        assert storage_of(other) == storage_of(straight)
        assert other.state.keys().isdisjoint(cut.state)
    for step in range(4, 6):
        take_step(step, straight, *others)
    for other in others:
        assert all_equal(snapshot(straight), snapshot(other)) and latches(straight) == latches(
            other
        )
    # The state that it was given is the caller's still.
    assert all(map(torch.equal, tensors_in(state), tensors_in(untouched)))


@pytest.mark.covering
@pytest.mark.parametrize("found_inf", [1.0, 2.0])
def test_found_inf_changes_nothing(backend, row, found_inf):
    """GradScaler adds up the verdicts of several devices, so it may be more than 1."""
    optimizer = row.optimizer()
    for step in range(2):
        take_step(step, optimizer)
    before = snapshot(optimizer)
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)
    twin = copy.deepcopy(optimizer)
    set_grads(params_of(optimizer), 2)
    params_of(optimizer)[0].grad.view(-1)[0] = math.inf
    optimizer.step()
    assert all_equal(snapshot(optimizer), before) and optimizer.nonfinite_steps == 0
    # The step after it is the one that would have come. The scale is a power of two.
    optimizer.found_inf.zero_()
    take_step(7, optimizer, scale=4e-2)
    take_step(7, twin)
    assert all_equal(snapshot(optimizer), snapshot(twin))


def test_a_step_on_triton_is_one_launch(option):
    """Two if it clips, or if the parameters' norms have to be measured."""
    step, sums = {"_stable_adamw_kernel": 1}, {"_square_sums_kernel": 1}
    optimizer, found = option.optimizer(), []
    with settings(backend="triton"):
        for seed in range(3):
            if seed == 2:
                optimizer.refresh()
            with count_launches() as made:
                take_step(seed, optimizer)
            found.append(dict(made))
    clipped = option.options.get("max_grad_norm") is not None
    assert found == [step | sums, step | sums if clipped else step, step | sums]


def test_a_step_on_triton_reads_nothing_from_its_device(monkeypatch):
    """A read would raise on the meta device, and make the host wait for a GPU."""
    seen = []
    monkeypatch.setattr("stablelora_kernels.optim.step.resolve_backend", lambda device: "triton")
    monkeypatch.setattr(
        "stablelora_kernels.launch.base.Launch.run",
        lambda launch, device: seen.append(launch.kernel.__name__),
    )
    pairs = [
        LoRAPair(pair.name, *(t.detach().to("meta").requires_grad_() for t in (pair.A, pair.B)))
        for pair in make_pairs()
    ]
    on_device = {name: torch.zeros((), device="meta") for name in LIVE}
    optimizer = StableLoRAAdamW(pairs, **on_device, max_grad_norm=1.0)
    optimizer.grad_scale = torch.ones((), device="meta")
    optimizer.found_inf = torch.zeros((), device="meta")
    for _ in range(3):
        for p in halves(pairs):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert seen == ["_square_sums_kernel", "_stable_adamw_kernel"] * 3


@pytest.mark.covering(1)
@pytest.mark.parametrize("change", ["float64", "float16", "meta"])
def test_torchs_defaults_do_not_matter(backend, change, row):
    """Not in a step, nor where a copy and a loaded state with counters that are numbers go on."""
    optimizer, other = row.optimizer(), row.optimizer()
    kept = torch.get_default_dtype()
    for step in range(3):
        take_step(step, other)
        set_grads(params_of(optimizer), step)
        try:
            if change == "meta":
                torch.set_default_device("meta")
            else:
                torch.set_default_dtype(getattr(torch, change))
            optimizer.step()
            if step == 1:
                assert optimizer.stability()[0].a_norm > 0 and optimizer.nonfinite_steps == 0
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                first = optimizer.state[params_of(optimizer)[0]]
                first.update(step=int(first["step"]), latched_at=int(first["latched_at"]))
                optimizer = copy.deepcopy(optimizer)
        finally:
            torch.set_default_dtype(kept)
            torch.set_default_device(None)
    assert all_equal(snapshot(optimizer), snapshot(other))


STORAGES = ("tensors", "masters", "bf16-moments", "8-bit-moments", "masters-8-bit-moments-clipped")


@pytest.mark.covering
@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("source", [*STORAGES, "AdamW", "AdamW with amsgrad", "Adam", "no step"])
def test_a_state_is_converted(backend, name, source):
    """The optimizer keeps its own storage and says so, and its own options where AdamW has none."""
    row = OPTIONS[name]
    if adamw := source.startswith("Adam"):
        # Adam without decay is AdamW.
        theirs = {"lr": 3e-2, "betas": (0.8, 0.9), "eps": 1e-6, "amsgrad": "amsgrad" in source}
        kind, decay = (torch.optim.Adam, 0.0) if source == "Adam" else (torch.optim.AdamW, 0.1)
        given = kind(halves(row.pairs()), weight_decay=decay, **theirs)
    else:
        given = OPTIONS.get(source, Row()).optimizer()
    steps = 0 if source == "no step" else 1
    if steps:
        set_grads(params_of(given), 0)
        given.step()
    optimizer = row.optimizer(max_grad_norm=None, shrink_ratio=0.3)
    storage = storage_of(optimizer)
    if source == "AdamW with amsgrad":
        with pytest.raises(ValueError, match="group 0: amsgrad must be False, got True"):
            optimizer.load_state_dict(given.state_dict())
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.load_state_dict(given.state_dict())
    was = storage if adamw else storage_of(given)
    dtype, old_dtype = (params_of(each)[0].dtype for each in (optimizer, given))
    # AdamW's state has no dtypes of parameters.
    of_dtypes = [] if adamw or dtype == old_dtype else ["the loaded state is that of parameters"]
    assert [re.split(", since| of another dtype", str(w.message))[0] for w in told] == of_dtypes + [
        f"the loaded state was saved with {name}={old}; it was converted"
        for name in STORAGE
        if (old := was[name]) != storage[name]
    ]
    assert storage_of(optimizer) == storage
    (own,), (other,) = optimizer.param_groups, given.param_groups
    assert all(own[key] == other[key] for key in ("lr", "betas", "eps", "weight_decay"))
    assert isinstance(own["lr"], float) or own["lr"].data_ptr() != other["lr"].data_ptr()
    assert own["shrink_ratio"] == other.get("shrink_ratio", 0.3) and not {
        "amsgrad",
        "foreach",
        "fused",
        "differentiable",
    } & {*own}
    for p, q in zip(params_of(optimizer), params_of(given), strict=True):
        for key in [key for key in ("exp_avg", "exp_avg_sq") if key in given.state[q]]:
            found = load_moment(optimizer.state[p], key, FP32)
            expected = load_moment(given.state[q], key, FP32)
            if row.moments is torch.uint8:
                # A step of the last fraction bit, rounded to nearest: half of an eighth.
                assert (
                    (expected - found).abs() <= found.abs() / 16 + 2e-5 * found.abs().max()
                ).all()
            else:
                assert torch.equal(found, expected.to(row.moments).float())
    take_step(1, optimizer)
    assert all(state["step"].item() == steps + 1 for state in optimizer.state.values())
    assert all(("master" in state) == row.masters for state in optimizer.state.values())


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(
    ("was", "now"), [(torch.bfloat16, FP32), (FP32, torch.bfloat16), (FP32, FP32)], ids=str
)
def test_parameters_of_another_dtype_are_named(was, now, masters):
    """As PEFT's load_adapter makes them, which a resumed Trainer calls."""
    given = StableLoRAAdamW(make_pairs(dtype=was), master_weights=masters)
    take_step(0, given)
    optimizer = StableLoRAAdamW(make_pairs(dtype=now), master_weights=masters)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        # As it comes back from a file.
        optimizer.load_state_dict(saved_and_loaded(given.state_dict()))
    message = f"'layer0.lora_A' was {was} and is {now} now, as are 7 other parameters"
    assert len(told) == (was != now)
    assert all(message in str(w.message) and w.filename == __file__ for w in told)
    assert "param_dtypes" not in optimizer.param_groups[0]
    earlier = given.state_dict()
    del earlier["param_groups"][0]["param_dtypes"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(earlier)


# States of other optimizers, models and versions


def state(changed: Any = None, pairs: Any = None, **options: Any) -> dict[str, Any]:
    """The state of an optimizer after a step, with a change."""
    optimizer = StableLoRAAdamW(make_pairs() if pairs is None else pairs, **options)
    take_step(0, optimizer)
    found = optimizer.state_dict()
    if changed is not None:
        changed(found)
    return found


def torchs(kind: str, *groups: slice, **options: Any) -> dict[str, Any]:
    params = halves(make_pairs())
    return getattr(torch.optim, kind)(
        [{"params": params[part]} for part in groups or (slice(8),)], **options
    ).state_dict()


RENAMED = [LoRAPair(f"other{i}", pair.A, pair.B) for i, pair in enumerate(make_pairs())]
WIDER = make_pairs([(8, 24, 41), *SHAPES[1:]])
TRANSPOSED = make_pairs()
TRANSPOSED[0].A.data = TRANSPOSED[0].A.data.t().contiguous().t()
# By name a state, and the message.
UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "SGD": (lambda: torchs("SGD"), "not StableLoRAAdamW's: its group 0 has no 'betas'"),
    "Adam": (
        lambda: torchs("Adam", weight_decay=0.1),
        "the weight decay of its group 0, 0.1, is not decoupled",
    ),
    "AdamW of two groups": (
        lambda: torchs("AdamW", slice(4), slice(4, 8)),
        "torch.optim.AdamW's with 2 parameter groups, this optimizer has 1. Hugging Face's Trainer makes two",
    ),
    "AdamW of half": (lambda: torchs("AdamW", slice(4)), "has 4 parameters, the optimizer's 8"),
    "other names": (
        lambda: state(pairs=RENAMED),
        "has 'other0.lora_A' where the optimizer has 'layer0.lora_A'",
    ),
    "wider": (
        lambda: state(pairs=WIDER),
        "'exp_avg' of 'layer0.lora_A' must be [8, 40], got [8, 41]",
    ),
    "no latch": (
        lambda: state(lambda s: s["state"][0].pop("latched_at")),
        "has no 'latched_at' tensor for 'layer0.lora_A'",
    ),
    "no scales": (
        lambda: state(lambda s: s["state"][0].pop("exp_avg_scale"), moments_dtype=torch.uint8),
        "'exp_avg' is in 8 bits, so 'exp_avg_scale' must be [2]",
    ),
    "a lr that is NaN": (
        lambda: state(lambda s: s["param_groups"][0].update(lr=math.nan)),
        "state_dict's group 0: lr must be a finite number in [0, inf), got nan",
    ),
    "8 bits in other strides": (
        lambda: state(pairs=TRANSPOSED, moments_dtype=torch.uint8),
        "state_dict's 'exp_avg' is in 8 bits, so 'exp_avg_scale' must be [2] and its strides (40, 1), got [2] and (1, 8)",
    ),
    "nothing": (dict, "must be a dict with 'state' and 'param_groups'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_state_that_does_not_fit_changes_nothing(name):
    make, message = UNFIT[name]
    optimizer = StableLoRAAdamW(make_pairs())
    take_step(1, optimizer)
    before = snapshot(optimizer)
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    given = make()
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(given)
    assert (
        all_equal(snapshot(optimizer), before) and optimizer.state_dict()["param_groups"] == groups
    )


def test_wrappers_around_a_model_do_not_matter():
    """A state saved with one wrapper around the model loads with another, and without; pairs have
    one name in all.
    """
    model = Model()
    apply_lora(model, **lora_options())
    plain = StableLoRAAdamW.from_model(model, lr=0.25)
    take_step(0, plain)
    wrapped = torch.nn.DataParallel(torch.compile(model, backend="eager"))
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert "module._orig_mod.layers.0._orig_mod.q_proj.lora_A" in dict(wrapped.named_parameters())
    by_model = StableLoRAAdamW.from_model(wrapped)
    by_name = StableLoRAAdamW(wrapped.named_parameters())
    assert [pair.name for pair in by_model.pairs] == [pair.name for pair in plain.pairs]
    for given, optimizer in ((plain, by_model), (plain, by_name), (by_name, plain)):
        optimizer.param_groups[0]["lr"] = 0.5
        names = [*optimizer.param_groups[0]["param_names"]]
        optimizer.load_state_dict(given.state_dict())
        assert optimizer.param_groups[0]["param_names"] == names
        assert (
            all_equal(snapshot(optimizer), snapshot(plain))
            and optimizer.param_groups[0]["lr"] == 0.25
        )
    # Printed, it has no name of a parameter.
    first, *groups = repr(plain).split("\n")
    assert first == "StableLoRAAdamW (4 LoRA pairs)" and len(groups) == len(plain.param_groups)
    assert "parameters): betas: (0.9, 0.999)" in groups[0] and "lora_A" not in groups[0]


def test_a_state_from_before_these_options_keeps_the_optimizers_own():
    options = {
        "lr_ratio_B": 2.0,
        "shrink_pattern": {"layer0": 0.1},
        "stop_condition": "never",
        "max_grad_norm": 1.0,
    }
    old = state()
    for key in options:
        del old["param_groups"][0][key]
    optimizer = StableLoRAAdamW(make_pairs(), **options)
    optimizer.load_state_dict(old)
    assert options.items() <= optimizer.param_groups[0].items() and optimizer.max_grad_norm == 1.0


@pytest.mark.parametrize("saved", [None, 2.0])
def test_a_clip_that_a_state_replaces_is_told(saved):
    optimizer = StableLoRAAdamW(make_pairs(), max_grad_norm=1.0)
    with pytest.warns(UserWarning, match=f"max_grad_norm was 1.0 and is {saved} now"):
        optimizer.load_state_dict(state(max_grad_norm=saved))
    assert optimizer.max_grad_norm == saved
    # A new group takes the norm that all groups have now.
    optimizer.add_param_group({"params": [("head", torch.ones(1, requires_grad=True))]})
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [saved, saved]
    optimizer.max_grad_norm = 0.5
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [0.5, 0.5]
