"""StableShrink under DeepSpeed's ZeRO, on two processes: what DistributedDataParallel trains."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

import stablelora_kernels as slk
from tests.helpers.processes import needs_gloo, spawn

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="runs where deepspeed is installed: pip install .[test]",
)
STEPS, ROWS = 10, 8
# At these rates some pairs latch on the way, at different steps, and some do not.
SHRINK_RATIO, LEARNING_RATES = 0.1, (0.2, 0.1)


class Branch(nn.Module):
    """A frozen linear layer with LoRA."""

    def __init__(self, n: int, m: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n) / n**0.5, requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(r, n))
        self.lora_B = nn.Parameter(torch.zeros(m, r))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t() + x @ self.lora_A.t() @ self.lora_B.t()


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """No two ranks can share its parameters evenly, and one has fewer elements than there are ranks."""
    torch.manual_seed(0)
    sizes = [(13, 7, 3), (7, 5, 1), (5, 1, 1), (1, 9, 3)]
    layers = [layer for n, m, r in sizes for layer in (Branch(n, m, r), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups, which have one half each of some pairs."""
    trained = [p for p in module.parameters() if p.requires_grad]
    parts = trained[:3], trained[3:]
    return [{"params": part, "lr": lr} for part, lr in zip(parts, LEARNING_RATES, strict=True)]


def adamw(params: Any) -> torch.optim.AdamW:
    # Small gradients differ by rounding; by this eps their updates do not differ by much more.
    return torch.optim.AdamW(params, eps=1e-3, weight_decay=0.02)


def batches(rank: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, ...]]:
    """This rank's half of every batch."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(STEPS, ROWS, 13, generator=generator)
    targets = torch.randn(STEPS, ROWS, 9, generator=generator)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    return [(x[mine].to(dtype), t[mine].to(dtype)) for x, t in zip(inputs, targets, strict=True)]


class Found(NamedTuple):
    """What a training has left on a rank."""

    parameters: dict[str, torch.Tensor]
    # After every step.
    stability: list[list[slk.PairStability]]
    # All-reduces of the library.
    collectives: int


def import_deepspeed() -> Any:
    """DeepSpeed for CPUs, without the communication of its own that it would compile for a minute."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    import deepspeed

    # An attribute of deepspeed.comm by this name is PyTorch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


def config(stage: int, **changes: Any) -> dict[str, Any]:
    """DeepSpeed's. Changes of "zero_optimization" are added to it."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    zero |= changes.pop("zero_optimization", {})
    return {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        **changes,
    }


def make_engine(stage: int, **changes: Any) -> Any:
    """A fresh model in DeepSpeed's engine."""
    dtype = torch.bfloat16 if "bf16" in changes else torch.float32
    module = model(dtype)
    optimizer = changes.pop("optimizer", adamw)(groups(module))
    deepspeed = import_deepspeed()
    made, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config(stage, **changes)
    )
    if stage == 3:
        _fill_padding(made.optimizer)
    return made


def _fill_padding(zero: Any) -> None:
    """Put large values where stage 3 leaves memory uninitialized: behind the last element of a
    parameter, in the last rank's partition.
    """
    for partition, parameters in zip(
        zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True
    ):
        pieces = partition.detach().split([p.partition_numel() for p in parameters])
        for piece, p in zip(pieces, parameters, strict=True):
            piece[max(0, p.ds_numel - dist.get_rank() * len(piece)) :] = 1e4


def train(engine: Any, shrink: slk.StableShrink, steps: range = range(STEPS)) -> Found:
    """Train under ZeRO."""
    seen: list[list[slk.PairStability]] = []
    handle = shrink.register_step_post_hook(lambda *_: seen.append(shrink.stability()))
    dtype = next(engine.module.parameters()).dtype
    mine = batches(dist.get_rank(), dtype)
    with _Collectives() as counted:
        for x, target in [mine[step] for step in steps]:
            engine.backward(nn.functional.mse_loss(engine(x), target))
            engine.step()
    handle.remove()
    return Found(full_parameters(engine), seen, counted.calls)


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    """The float32 values of A and B: the model's, or those that the ranks own together."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: p.detach().clone()
        if p.numel() and p.dtype == torch.float32
        else safe_get_full_fp32_param(p).detach().clone()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def train_under_ddp(
    dtype: torch.dtype = torch.float32, master_dtype: torch.dtype = torch.float32
) -> Found:
    """The same training without DeepSpeed. AdamW updates copies in ``master_dtype``, as ZeRO."""
    module = model(dtype)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    masters = {
        name: nn.Parameter(p.detach().to(master_dtype, copy=True)) for name, p in trained.items()
    }
    numbers = {p: i for i, p in enumerate(trained.values())}
    by_number = list(masters.values())
    own = [
        group | {"params": [by_number[numbers[p]] for p in group["params"]]}
        for group in groups(module)
    ]
    optimizer = adamw(own)
    shrink = slk.StableShrink(optimizer, slk.lora_pairs(masters.items()), shrink_ratio=SHRINK_RATIO)
    wrapped = nn.parallel.DistributedDataParallel(module)
    seen = []
    for x, target in batches(dist.get_rank(), dtype):
        nn.functional.mse_loss(wrapped(x), target).backward()
        for name, p in trained.items():
            masters[name].grad = p.grad.to(master_dtype)
            p.grad = None
        optimizer.step()
        seen.append(shrink.stability())
        for name, p in trained.items():
            p.data.copy_(masters[name].data)
    return Found({name: p.detach().float() for name, p in masters.items()}, seen, 0)


class _Collectives:
    """Counts the all-reduces that this library makes, and not DeepSpeed's."""

    calls = 0

    def __enter__(self) -> _Collectives:
        self.original = dist.all_reduce
        dist.all_reduce = self
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += sys._getframe(1).f_globals["__name__"].startswith("stablelora_kernels")
        return self.original(*args, **kwargs)

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.original


pytestmark = [needs_gloo, needs_deepspeed]

OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
BFLOAT16 = {"bf16": {"enabled": True}}
# Partitions in bfloat16, which are rounded at random.
MASTERS = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
}
# Stage, and changes of DeepSpeed's config.
CASES: Mapping[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    # DeepSpeed's own mapping from parameters to partitions is wrong here.
    "2, round robin": (2, {"zero_optimization": {"round_robin_gradients": True}}),
    "2, aligned": (2, {"zero_optimization": {"parameter_alignment": True}}),
    "2, offloaded": (2, {"zero_optimization": OFFLOADED}),
    # Several partitions for a group of parameters.
    "3, parts": (3, {"zero_optimization": {"sub_group_size": 20}}),
    "3, offloaded": (3, {"zero_optimization": OFFLOADED}),
    "1, bfloat16": (1, BFLOAT16),
    # Another class of DeepSpeed's optimizers.
    "1, bfloat16 and float32 gradients": (
        1,
        {**BFLOAT16, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "3, bfloat16": (3, BFLOAT16),
    "2, masters in bfloat16": (2, MASTERS),
}
RESUMED = ("2", "3, parts", "1, bfloat16 and float32 gradients")


def shrink_of(engine: Any) -> slk.StableShrink:
    return slk.StableShrink(engine.optimizer, engine.module, shrink_ratio=SHRINK_RATIO)


def _train(rank: int, world: int, directory: Path) -> dict[str, Found]:
    """The training of every case, and without DeepSpeed."""
    # Such as that the loaded state has no counters.
    warnings.filterwarnings("error", module="stablelora_kernels|tests")
    found = {
        "float32": train_under_ddp(),
        "bfloat16": train_under_ddp(torch.bfloat16),
        "masters": train_under_ddp(torch.bfloat16, torch.bfloat16),
    }
    for name, (stage, changes) in CASES.items():
        engine = make_engine(stage, **changes)
        found[name] = train(engine, shrink_of(engine))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    return spawn(_train, 2, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("case", CASES)
def test_trains_as_under_ddp(case: str, trained: list[dict[str, Found]]) -> None:
    kind = next((kind for kind in ("masters", "bfloat16") if kind in case), "float32")
    expected = trained[0][kind]
    latches = [pair.latched_at for pair in expected.stability[-1]]
    assert len({*latches}) > 2 and None in latches
    for found in trained:
        got = found[case]
        compare(got, expected)
        # One all-reduce in a step, and one in each call of stability().
        assert got.collectives == 2 * STEPS


def compare(got: Found, expected: Found) -> None:
    """Both have the same latches after every step, and equal values up to float32's rounding."""
    assert got.parameters.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        torch.testing.assert_close(got.parameters[name], value, rtol=1e-5, atol=1e-6)
    assert len(got.stability) == len(expected.stability)
    for pairs, others in zip(got.stability, expected.stability, strict=True):
        for pair, other in zip(pairs, others, strict=True):
            assert (pair.name, pair.latched_at) == (other.name, other.latched_at)
            assert pair.a_norm == pytest.approx(other.a_norm, rel=1e-5)
            assert pair.b_norm == pytest.approx(other.b_norm, rel=1e-5, abs=1e-9)


def _resume(rank: int, world: int, directory: Path) -> dict[str, list[Found]]:
    """By case: the last steps without a break, and in fresh engines from a checkpoint that is loaded
    before StableShrink is made, and behind it.
    """
    warnings.filterwarnings("error", module="stablelora_kernels|tests")
    found: dict[str, list[Found]] = {}
    rest = range(4, STEPS)
    for number, name in enumerate(RESUMED):
        stage, changes = CASES[name]
        place = str(directory / str(number))
        engine = make_engine(stage, **changes)
        shrink = shrink_of(engine)
        train(engine, shrink, range(rest.start))
        engine.save_checkpoint(place)
        found[name] = [train(engine, shrink, rest)]
        engine = make_engine(stage, **changes)
        engine.load_checkpoint(place)
        found[name].append(train(engine, shrink_of(engine), rest))
        engine = make_engine(stage, **changes)
        shrink = shrink_of(engine)
        engine.load_checkpoint(place)
        found[name].append(train(engine, shrink, rest))
    return found


@pytest.mark.nightly
def test_resumes_exactly(tmp_path: Path) -> None:
    for found in spawn(_resume, 2, tmp_path):
        for whole, *resumed in found.values():
            latches = [pair.latched_at for pair in whole.stability[-1]]
            assert any(step and step <= 4 for step in latches), "none latched before the save"
            assert any(step and step > 4 for step in latches), "none latched behind it"
            for got in resumed:
                assert got.stability == whole.stability
                assert all(
                    torch.equal(got.parameters[name], p) for name, p in whole.parameters.items()
                )


def _raise(rank: int, world: int, directory: Path) -> dict[str, str]:
    """What errors say."""

    def error_of(action: Callable[[], object]) -> str:
        try:
            action()
        except (ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def changed(**values: Any) -> Callable[[Any], torch.optim.Optimizer]:
        """Makes the optimizer with these values in each of its groups."""
        return lambda params: adamw([group | values for group in params])

    found: dict[str, str] = {}
    engine = make_engine(2)
    found["another model"] = error_of(lambda: slk.StableShrink(engine.optimizer, model()))
    found["inside"] = error_of(lambda: slk.StableShrink(engine.optimizer.optimizer, engine.module))
    shrink = shrink_of(engine)
    found["a second one"] = error_of(lambda: shrink_of(engine))
    shrink.remove()
    found["removed"] = error_of(lambda: shrink_of(engine))
    engine = make_engine(3)
    found["another model, 3"] = error_of(lambda: slk.StableShrink(engine.optimizer, model()))
    # As offload_optimizer does with the device nvme, for which DeepSpeed compiles an extension.
    engine.optimizer.fp32_partitioned_groups_flat[0].data = torch.empty(0)
    found["nvme"] = error_of(lambda: shrink_of(engine))
    engine = make_engine(1, optimizer=changed(train_mode=True))
    found["schedule-free"] = error_of(lambda: shrink_of(engine))
    engine = make_engine(1, optimizer=changed(shrink_ratio=0.1))
    found["two ratios"] = error_of(lambda: shrink_of(engine))
    engine = make_engine(1, zero_optimization={"elastic_checkpoint": True})
    found["elastic"] = error_of(lambda: shrink_of(engine))
    engine = make_engine(0, **BFLOAT16)
    found["stage 0 in bfloat16"] = error_of(lambda: shrink_of(engine))
    found["StableLoRAAdamW, 2"] = error_of(lambda: _step_of_stable_adamw(2))
    found["StableLoRAAdamW, 3"] = error_of(lambda: _step_of_stable_adamw(3))
    return found


def _step_of_stable_adamw(stage: int) -> None:
    module = model()
    optimizer = slk.StableLoRAAdamW.from_model(module)
    engine, *_ = import_deepspeed().initialize(
        model=module,
        optimizer=optimizer,
        config=config(stage, zero_allow_untested_optimizer=True),
    )
    x, target = batches(0)[0]
    engine.backward(torch.nn.functional.mse_loss(engine(x), target))
    engine.step()


def test_errors_name_a_way_out(tmp_path: Path) -> None:
    found, other = spawn(_raise, 2, tmp_path)
    assert found == other
    for case, parts in {
        "another model": [
            "'0': A [3, 13]",
            "DeepSpeed's optimizer",
            "deepspeed.initialize was given",
        ],
        "another model, 3": ["'0': A [3, 13]", "DeepSpeed's optimizer"],
        "inside": ["parameters are flat", "the optimizer that deepspeed.initialize returns"],
        "a second one": ["'0': the optimizer has a StableShrink of its A already"],
        "removed": ["no error"],
        "nvme": ["moved a partition out of memory", "'cpu', not to 'nvme'"],
        "schedule-free": ["no schedule-free optimizer under DeepSpeed's ZeRO, got AdamW"],
        "two ratios": ["the shrink_ratio of group 0", "group 1 has one too"],
        "elastic": ["elastic_checkpoint saves no parameter groups"],
        "stage 0 in bfloat16": ["FP16_UnfusedOptimizer", "ZeRO's stage 1, 2 or 3"],
        "StableLoRAAdamW, 2": ["ValueError", "StableShrink", "StableLoRACallback"],
        "StableLoRAAdamW, 3": ["ValueError", "StableShrink", "StableLoRACallback"],
    }.items():
        assert all(part in found[case] for part in parts), f"{case}: {found[case]}"
