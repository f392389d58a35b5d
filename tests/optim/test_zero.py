"""StableShrink under DeepSpeed's ZeRO, on two processes: what DistributedDataParallel trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers import zero_runs
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.zero_runs import SHRINK_RATIO, STEPS, needs_deepspeed

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


def _train(rank: int, world: int, directory: Path) -> dict[str, zero_runs.Found]:
    """The training of every case, and without DeepSpeed."""
    # Such as that the loaded state has no counters.
    warnings.filterwarnings("error", module="stablelora_kernels|tests")
    found = {
        "float32": zero_runs.train_under_ddp(),
        "bfloat16": zero_runs.train_under_ddp(torch.bfloat16),
        "masters": zero_runs.train_under_ddp(torch.bfloat16, torch.bfloat16),
    }
    for name, (stage, changes) in CASES.items():
        engine = zero_runs.engine(stage, **changes)
        found[name] = zero_runs.train(engine, shrink_of(engine))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, zero_runs.Found]]:
    return spawn(_train, 2, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("case", CASES)
def test_trains_as_under_ddp(case: str, trained: list[dict[str, zero_runs.Found]]) -> None:
    kind = next((kind for kind in ("masters", "bfloat16") if kind in case), "float32")
    expected = trained[0][kind]
    latches = [pair.latched_at for pair in expected.stability[-1]]
    assert len({*latches}) > 2 and None in latches
    for found in trained:
        got = found[case]
        compare(got, expected)
        # One all-reduce in a step, and one in each call of stability().
        assert got.collectives == 2 * STEPS


def compare(got: zero_runs.Found, expected: zero_runs.Found) -> None:
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


def _resume(rank: int, world: int, directory: Path) -> dict[str, list[zero_runs.Found]]:
    """By case: the last steps without a break, and in fresh engines from a checkpoint that is loaded
    before StableShrink is made, and behind it.
    """
    warnings.filterwarnings("error", module="stablelora_kernels|tests")
    found: dict[str, list[zero_runs.Found]] = {}
    rest = range(4, STEPS)
    for number, name in enumerate(RESUMED):
        stage, changes = CASES[name]
        place = str(directory / str(number))
        engine = zero_runs.engine(stage, **changes)
        shrink = shrink_of(engine)
        zero_runs.train(engine, shrink, range(rest.start))
        engine.save_checkpoint(place)
        found[name] = [zero_runs.train(engine, shrink, rest)]
        engine = zero_runs.engine(stage, **changes)
        engine.load_checkpoint(place)
        found[name].append(zero_runs.train(engine, shrink_of(engine), rest))
        engine = zero_runs.engine(stage, **changes)
        shrink = shrink_of(engine)
        engine.load_checkpoint(place)
        found[name].append(zero_runs.train(engine, shrink, rest))
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
        return lambda params: zero_runs.adamw([group | values for group in params])

    found: dict[str, str] = {}
    engine = zero_runs.engine(2)
    found["another model"] = error_of(lambda: slk.StableShrink(engine.optimizer, zero_runs.model()))
    found["inside"] = error_of(lambda: slk.StableShrink(engine.optimizer.optimizer, engine.module))
    shrink = shrink_of(engine)
    found["a second one"] = error_of(lambda: shrink_of(engine))
    shrink.remove()
    found["removed"] = error_of(lambda: shrink_of(engine))
    engine = zero_runs.engine(3)
    found["another model, 3"] = error_of(
        lambda: slk.StableShrink(engine.optimizer, zero_runs.model())
    )
    # As offload_optimizer does with the device nvme, for which DeepSpeed compiles an extension.
    engine.optimizer.fp32_partitioned_groups_flat[0].data = torch.empty(0)
    found["nvme"] = error_of(lambda: shrink_of(engine))
    engine = zero_runs.engine(1, optimizer=changed(train_mode=True))
    found["schedule-free"] = error_of(lambda: shrink_of(engine))
    engine = zero_runs.engine(1, optimizer=changed(shrink_ratio=0.1))
    found["two ratios"] = error_of(lambda: shrink_of(engine))
    engine = zero_runs.engine(1, zero_optimization={"elastic_checkpoint": True})
    found["elastic"] = error_of(lambda: shrink_of(engine))
    engine = zero_runs.engine(0, **BFLOAT16)
    found["stage 0 in bfloat16"] = error_of(lambda: shrink_of(engine))
    found["StableLoRAAdamW, 2"] = error_of(lambda: _step_of_stable_adamw(2))
    found["StableLoRAAdamW, 3"] = error_of(lambda: _step_of_stable_adamw(3))
    return found


def _step_of_stable_adamw(stage: int) -> None:
    module = zero_runs.model()
    optimizer = slk.StableLoRAAdamW.from_model(module)
    engine, *_ = zero_runs.import_deepspeed().initialize(
        model=module,
        optimizer=optimizer,
        config=zero_runs.config(stage, zero_allow_untested_optimizer=True),
    )
    x, target = zero_runs.batches(0)[0]
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
