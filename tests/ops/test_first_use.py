"""First use: a proof of each kind of call, the times of its strategies, and what is kept of both."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.dispatch import first_use as kept
from stablelora_kernels.dispatch.first_use import OPERATORS, Finding, Kind
from stablelora_kernels.dispatch.tallies import tallies
from stablelora_kernels.functional import lora_linear_cross_entropy
from stablelora_kernels.launch import workspace
from stablelora_kernels.ops import first_use, meta_calls, plans, proofs
from stablelora_kernels.ops.lora_linear.proof import FORWARD
from stablelora_kernels.ops.lora_linear.triton import lora_linear_fwd
from stablelora_kernels.ops.lora_linear_cross_entropy import triton as cross_entropy
from stablelora_kernels.ops.lora_rows.autograd import RowsBranch, lora_rows
from stablelora_kernels.optim import proof
from stablelora_kernels.testing import cases
from stablelora_kernels.testing.cases import BF16, DEVICE, FP16, FP32, Case
from stablelora_kernels.testing.expectations import expectations
from stablelora_kernels.testing.ops.lora_mlp import MLP
from tests.helpers.optimizers import make_pairs
from tests.helpers.processes import printed
from tests.helpers.steps import take_step

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")
pytestmark = pytest.mark.usefixtures("one_thread", "nothing_known")

LINEAR = Case("linear", (70, 64), (48,), (6,), BF16, FP32, p=0.3)
RIGHT = [
    LINEAR,
    LINEAR.but(shape=(1, 64), p=0.0),
    LINEAR.but(shape=(5, 64), dtype=FP32, p=0.0),
    LINEAR.but(dtype=FP16, ranks=(150,)),
    LINEAR.but(dtype=FP32, lora_dtype=FP32),
    LINEAR.but(quantized=("nf4 nested",)),
    LINEAR.but(quantized=("fp8",), shape=(140, 64)),
    LINEAR.but(layouts={"grad": "expanded", "x": "transposed"}),
    Case("branch", (70, 64), (48,), (6,), BF16, FP32, p=0.1, base_dtype=FP32),
    Case("group", (70, 64), (48, 25, 8), (6, 3, 20), FP16, FP32, p=0.1),
    Case("mlp", (70, 64), (48, 48, 24), (6, 3, 20), BF16, FP32, p=0.1, activation="gelu"),
    Case("mlp", (70, 64), (48, 48, 24), (None, 3, None), BF16, BF16, quantized=("nf4",) * 3),
    # Its forward is once without G and U, and once without Y.
    Case(MLP(tile_rows=40), (70, 64), (48, 48, 24), (6, 3, 20), BF16, FP32, p=0.1),
]


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of NumPy before 2, by the interpreter of Triton 3.6.
        warnings.filterwarnings("ignore", message="Conversion of an array with ndim > 0")
        yield


def files() -> list[Path]:
    return sorted(kept.cache_dir().glob("*.json"))


def answers() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in files()]


def proven() -> dict[Kind, Finding]:
    """What is known of kinds but their times."""
    findings = kept.findings_on(torch.device(DEVICE))
    return {kind: f for kind, f in findings.items() if not kind.op.endswith("timed")}


def faults() -> dict[str, dict[str, str]]:
    return {kind.op: finding.faults for kind, finding in proven().items()}


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_right_kernels_pass_and_leave_the_call_as_it_was(case: Case) -> None:
    with slk.settings(first_use="off"):
        expected = cases.run(case)
    plans.clear()
    state = torch.get_rng_state()
    with silent():
        results = cases.run(case)
    assert {name: torch.equal(t, expected[name]) for name, t in results.items()} == dict.fromkeys(
        expected, True
    )
    # Stand-ins have a generator of their own; what the call has drawn is the same.
    torch.set_rng_state(state)
    found = faults()
    assert len(found) == 2 and all(not any(of_op.values()) for of_op in found.values())


def spoiled(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Any], None],
    ops: Sequence[str] = ("fwd", "bwd"),
) -> None:
    """Every launch list of these ops' kernels spoils the results behind it."""
    run = first_use._run_poisoned

    def run_spoiled(subject: Any, device: Any, call: Any, choice: Any) -> Any:
        results = run(subject, device, call, choice)
        if subject.name.endswith(tuple(ops)):
            spoil(results)
        return results

    monkeypatch.setattr(first_use, "_run_poisoned", run_spoiled)


def first_tensor(results: Any) -> Tensor:
    return next(t for t in first_use._tensors_in(results) if t.is_floating_point() and t.numel())


def by_one_element(results: Any) -> None:
    t = first_tensor(results)
    t.view(-1)[-1] += 1


def by_scale(results: Any) -> None:
    first_tensor(results).mul_(1.03)


def by_nan(results: Any) -> None:
    first_tensor(results).view(-1)[0] = torch.nan


@pytest.mark.covering
@pytest.mark.parametrize("spoil", [by_one_element, by_scale, by_nan])
@pytest.mark.parametrize("ops", [("fwd",), ("bwd",)])
@pytest.mark.parametrize(
    "case", [LINEAR, RIGHT[8], RIGHT[9], RIGHT[10]], ids=["linear", "branch", "group", "mlp"]
)
def test_a_wrong_kernel_is_retired_and_the_step_is_right(case, ops, spoil, monkeypatch) -> None:
    spoiled(monkeypatch, spoil, ops)
    operands = cases.make(case)
    with pytest.warns(RuntimeWarning, match="is wrong on this machine"):
        results = cases.run(case, operands)
    for name, expected in expectations(case, operands).items():
        expected.check(results[name], name)
    (retired,) = kept.retired_on(torch.device(DEVICE))
    assert retired.op.endswith(ops) and retired.strategy == "one_launch"
    # Here every other strategy is as wrong. Then PyTorch's operators take all calls, without a word.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases.run(case, operands)
    # Without dropout, whose masks the PyTorch path draws by itself.
    plain = case.but(p=0.0)
    with silent():
        again = cases.run(plain, operands)
    for name, expected in expectations(plain, operands).items():
        expected.check(again[name], name)


def test_two_runs_that_differ_are_a_fault(monkeypatch) -> None:
    calls: list[int] = []

    def race(results: Any) -> None:
        calls.append(1)
        if len(calls) % 2 == 0:
            # By one rounding, which the comparison allows.
            t = first_tensor(results)
            t.view(-1)[0] *= 1 + torch.finfo(t.dtype).eps

    spoiled(monkeypatch, race, ("fwd",))
    with pytest.warns(RuntimeWarning, match="two runs on the same operands differ"):
        cases.run(LINEAR)


def test_a_wrong_mask_is_a_fault(monkeypatch) -> None:
    def spoil(results: Any) -> None:
        results.masks[0][-1, 0] ^= 1

    spoiled(monkeypatch, spoil, ("fwd",))
    with pytest.warns(RuntimeWarning, match="not the one that its seed draws"):
        cases.run(LINEAR)


def test_a_kernel_that_cannot_be_compiled_is_a_fault(monkeypatch) -> None:
    def raises(results: Any) -> None:
        raise ValueError("out of\n resources")

    spoiled(monkeypatch, raises, ("fwd",))
    with pytest.warns(RuntimeWarning, match="ValueError: out of resources"):
        cases.run(LINEAR)


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What first use logs. Not by caplog: a library that another test imports may have set up logging
    by its own mind.
    """
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            kept.logger,
            level,
            lambda text, *args, level=level: lines.append(f"{level}: {text % args}"),
        )
    return lines


def test_a_full_memory_proves_nothing_and_the_call_runs(monkeypatch, told) -> None:
    def full(results: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    spoiled(monkeypatch, full)
    with silent():
        cases.run(LINEAR)
    assert all(finding == {} for finding in faults().values())
    wanted = "warning: lora_linear_fwd by one_launch is not proven: the GPU's memory is full"
    assert wanted in told, (told, proven(), kept.cache_dir(), slk.settings.first_use)


def test_a_weight_with_nan_proves_nothing() -> None:
    with silent():
        cases.run(LINEAR.but(broken="weight0"))
    assert all(finding == {} for finding in faults().values())


def test_a_first_call_with_a_b_of_zeros_shows_a_wrong_branch(monkeypatch) -> None:
    """The user's own B starts at zero, so that the call itself could not tell."""
    monkeypatch.setattr(first_use, "_run_poisoned", _without_branch(first_use._run_poisoned))
    layer = slk.LoRALinear(64, 48, r=6, dtype=BF16, device=DEVICE)
    x = torch.randn(70, 64, dtype=BF16, device=DEVICE)
    with slk.settings(backend="triton"), pytest.warns(RuntimeWarning, match="Y0 is off"):
        y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias))


def _without_branch(run: Callable[..., Any]) -> Callable[..., Any]:
    def run_without(subject: Any, device: Any, call: Any, choice: Any) -> Any:
        results = run(subject, device, call, choice)
        if subject.name == "lora_linear_fwd":
            weight, bias = call.operands[:2]
            results.ys[0].copy_(torch.nn.functional.linear(call.x, weight, bias))
        return results

    return run_without


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_pytorchs_operators_give_what_the_op_must(case, monkeypatch) -> None:
    """What a failed proof falls back to, on the op's own records."""
    spoiled(monkeypatch, by_nan)
    operands = cases.make(case)
    with pytest.warns(RuntimeWarning, match="is wrong on this machine"):
        results = cases.run(case, operands)
    for name, expected in expectations(case, operands).items():
        expected.check(results[name], name)


# Kinds and files


def test_a_kind_is_proven_once_and_kept_on_disk(monkeypatch) -> None:
    proofs_run: list[str] = []
    monkeypatch.setattr(
        first_use, "_fault_of", lambda subject, *rest: proofs_run.append(subject.name) or ""
    )
    for rows in (65, 70, 127):
        cases.run(LINEAR.but(shape=(rows, 64)))
    assert proofs_run == ["lora_linear_fwd", "lora_linear_bwd"] and len(files()) == 2
    # Kernels are compiled for multiples of 16 as well, and other rows have other tiles.
    for rows in (80, 129):
        cases.run(LINEAR.but(shape=(rows, 64)))
    assert len(proofs_run) == 6
    # Another process finds the answers.
    kept.forget()
    plans.clear()
    cases.run(LINEAR)
    assert len(proofs_run) == 6


def test_other_dtypes_layouts_and_options_are_other_kinds() -> None:
    kinds: set[Kind] = set()
    variants = [
        LINEAR,
        LINEAR.but(dtype=FP16),
        LINEAR.but(lora_dtype=BF16),
        LINEAR.but(p=0.0),
        LINEAR.but(ranks=(7,)),
        LINEAR.but(sizes=(47,)),
        LINEAR.but(bias=(False,)),
        LINEAR.but(layouts={"x": "shifted"}),
        LINEAR.but(layouts={"weight": "transposed"}),
        LINEAR.but(wanted=("x",)),
    ]
    for number, case in enumerate(variants, 1):
        cases.run(case)
        kinds |= {
            kind for kind in kept.findings_on(torch.device(DEVICE)) if kind.op == "lora_linear_fwd"
        }
        assert len(kinds) == number, case
    # A scaling and a probability are none.
    cases.run(LINEAR.but(scalings=(0.3,)))
    cases.run(LINEAR.but(p=0.2))
    assert len(
        [k for k in kept.findings_on(torch.device(DEVICE)) if k.op == "lora_linear_fwd"]
    ) == len(kinds)


DAMAGED = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "another key": lambda text: text.replace('"key": "', '"key": "other '),
    "faults of another type": lambda text: text.replace('"faults": {', '"faults": 3, "x": {'),
    "a fastest that was not timed": lambda text: text.replace(
        '"fastest": null', '"fastest": "best"'
    ),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_found_out_again(damage) -> None:
    cases.run(LINEAR)
    before = answers()
    for path in files():
        path.write_text(damage(path.read_text()))
    kept.forget()
    kept._warn_once.cache_clear()
    plans.clear()
    with pytest.warns(RuntimeWarning, match="can't be used"):
        cases.run(LINEAR)
    assert [a for a in answers() if "faults" in a] == [a for a in before if "faults" in a]


def test_a_disk_that_cannot_be_written_to_costs_a_warning(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path / "file"))
    kept._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="can't be kept in"):
        cases.run(LINEAR)
    with silent():
        cases.run(LINEAR)


def test_another_version_finds_out_again(monkeypatch) -> None:
    cases.run(LINEAR)
    count = len(files())
    kept.forget()
    plans.clear()
    kept.made_for.cache_clear()
    try:
        monkeypatch.setattr(kept, "__version__", "9.9")
        cases.run(LINEAR)
    finally:
        kept.made_for.cache_clear()
    assert len(files()) == 2 * count


def test_retired_strategies_stay_so_in_other_processes(monkeypatch) -> None:
    spoiled(monkeypatch, by_nan, ("fwd",))
    with pytest.warns(RuntimeWarning, match="'one_launch' is wrong"):
        cases.run(LINEAR)
    code = """
import torch
import stablelora_kernels as slk
from stablelora_kernels.dispatch.tallies import tallies
with slk.settings(backend="triton", first_use="on"):
    slk.LoRALinear(64, 40, r=6, dtype=torch.bfloat16)(torch.ones(300, 64, dtype=torch.bfloat16))
print([(t.op, t.strategy, t.reason) for t in tallies()])
"""
    out = printed(code, TRITON_INTERPRET="1", STABLELORA_CACHE=str(kept.cache_dir().parent))
    assert "'lora_linear_fwd', 'branch_first'" in out and "is retired on this machine" in out


def test_two_processes_may_find_out_at_once() -> None:
    code = """
import torch
import stablelora_kernels as slk
from stablelora_kernels.dispatch import first_use
with slk.settings(backend="triton", first_use="on"):
    slk.LoRALinear(64, 48, r=6, dtype=torch.bfloat16)(torch.ones(70, 64, dtype=torch.bfloat16))
print(sorted(f.faults["one_launch"] for f in first_use.findings_on(torch.device("cpu")).values()))
"""
    cache = str(kept.cache_dir().parent)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(printed, code, TRITON_INTERPRET="1", STABLELORA_CACHE=cache)
            for _ in range(2)
        ]
        assert [run.result() for run in runs] == ["['']", "['']"]
    assert len([a for a in answers() if "faults" in a]) == 1 and not [
        *kept.cache_dir().glob("*.tmp")
    ]


def test_threads_may_find_out_at_once(monkeypatch) -> None:
    """The interpreter runs one kernel at a time, so the proof is another."""
    started = Barrier(4, timeout=60)
    monkeypatch.setattr(first_use, "_fault_of", lambda *args: started.wait() * "")
    call = meta_calls.linear_calls(70, 48, 64, 6, (BF16, FP32), 0.0).forward
    with silent(), ThreadPoolExecutor(4) as pool:
        decided = [
            *pool.map(
                lambda _: first_use.decide(lora_linear_fwd.subject, torch.device(DEVICE), call),
                range(4),
            )
        ]
    assert {decision.strategy for decision in decided} == {"one_launch"} and len(files()) == 1


# Times


class Clock:
    """In place of the GPU's clock: seconds by strategy, in the order in which they are timed."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.timed = 0

    def __call__(self, runs: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
        self.timed += 1
        for run in runs:
            run()
        # The table's strategy, the other one if there is one, PyTorch's operators.
        names = ["table", *["other"] * (len(runs) - 2), "torch"]
        return [self.seconds.get(name, 10e-6) for name in names]


def strategies_run() -> dict[str, str]:
    """The strategy that each op has taken last."""
    return {t.op: t.strategy for t in tallies() if t.op.startswith("lora_")}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    def made(**seconds: float) -> Clock:
        clock = Clock(**seconds)
        monkeypatch.setattr(first_use, "measure", clock)
        return clock

    monkeypatch.setattr("stablelora_kernels.dispatch.tallies._tallies", {})
    return made


@pytest.mark.parametrize(
    ("seconds", "strategy", "reason"),
    [
        ({}, "one_launch", "measured: 10.0 us, and no other is more than 2% faster"),
        ({"other": 9.9e-6}, "one_launch", "measured: 10.0 us, and no other is more than 2% faster"),
        ({"other": 4.12e-6}, "branch_first", "measured: 4.1 us, 'one_launch' 10.0 us"),
        ({"table": 3e-6, "other": 4.12e-6}, "one_launch", "measured: 3.0 us, and no other is more than 2% faster"),
    ],
)  # fmt: skip
def test_the_fastest_strategy_is_taken_and_a_tie_keeps_the_tables(
    clock, seconds, strategy, reason
) -> None:
    timer = clock(**seconds)
    operands = cases.make(LINEAR)
    results = cases.run(LINEAR, operands)
    for name, expected in expectations(LINEAR, operands).items():
        expected.check(results[name], name)
    assert strategies_run() == {"lora_linear_fwd": strategy, "lora_linear_bwd": strategy}
    assert {t.reason for t in tallies()} == {reason} and timer.timed == 2
    # Prepared launches take it too, and are counted.
    for _ in range(3):
        cases.run(LINEAR, operands)
    assert timer.timed == 2 and {t.calls for t in tallies()} == {4}
    explained = slk.explain(70, 48, 64, 6, BF16, 0.3, device=DEVICE) if DEVICE != "cpu" else None
    assert explained is None or explained.forward_strategy == strategy


def test_explain_has_the_times_once_they_are_known(clock) -> None:
    clock(other=4.12e-6)
    with slk.settings(backend="triton"):
        before = slk.explain(70, 48, 64, 6, BF16, 0.3, device=DEVICE)
        cases.run(LINEAR)
        after = slk.explain(70, 48, 64, 6, BF16, 0.3, device=DEVICE)
        other = slk.explain(70, 48, 64, 6, BF16, 0.0, device=DEVICE)
    assert before.forward_strategy == other.forward_strategy == "one_launch"
    assert after.forward_strategy == after.backward_strategy == "branch_first"
    assert after.forward_reason == "measured: 4.1 us, 'one_launch' 10.0 us"
    assert [step.kernel for step in after.forward] == ["lora_linear", "vendor"]


def test_explain_names_a_retired_strategy(clock) -> None:
    device = torch.device(DEVICE)
    with slk.settings(backend="triton"):
        with pytest.warns(RuntimeWarning, match="'one_launch' is wrong"):
            kept.retire("lora_linear_fwd", "one_launch", device, "Y is off by 1")
        one = slk.explain(70, 48, 64, 6, BF16, 0.3, device=DEVICE)
        with pytest.warns(RuntimeWarning, match="'branch_first' is wrong"):
            kept.retire("lora_linear_fwd", "branch_first", device, "Y is off by 2")
        both = slk.explain(70, 48, 64, 6, BF16, 0.3, device=DEVICE)
    reason = "'one_launch' is retired on this machine: Y is off by 1"
    assert (one.forward_strategy, one.forward_reason) == ("branch_first", reason)
    assert (both.forward_strategy, both.forward_reason) == ("torch", reason)
    assert one.backward_strategy == both.backward_strategy == "one_launch" and not both.forward


@pytest.mark.parametrize("op", ["linear", "group", "mlp"])
def test_pytorchs_operators_take_a_call_that_they_compute_faster(clock, op) -> None:
    sizes, ranks = ((48,), (6,)) if op == "linear" else ((48, 48, 24), (6, 3, 20))
    case = Case(op, (70, 64), sizes, ranks, BF16, FP32)
    clock(torch=1e-6)
    operands = cases.make(case)
    for _ in range(3):
        results = cases.run(case, operands)
        for name, expected in expectations(case, operands).items():
            expected.check(results[name], name)
    name = "lora_mlp" if op == "mlp" else "lora_linear"
    # In this process inside the op, in the next one on the PyTorch path, forward and backward.
    assert {(t.op, t.strategy): t.calls for t in tallies()} == {
        (f"{name}_fwd", OPERATORS): 3,
        (f"{name}_bwd", OPERATORS): 3,
    }
    kept.forget()
    plans.clear()
    for _ in range(2):
        results = cases.run(case, operands)
        for result, expected in expectations(case, operands).items():
            expected.check(results[result], result)
    assert {t.op: t.calls for t in tallies()}[name] == 2


def test_with_dropout_this_process_stays_on_the_kernels(clock) -> None:
    """In the op PyTorch's operators would draw the bits that its seeds stand for, which takes long.
    The next process takes the PyTorch path.
    """
    clock(torch=1e-6)
    cases.run(LINEAR)
    cases.run(LINEAR)
    assert {t.op: (t.strategy, t.calls) for t in tallies()}["lora_linear_fwd"] == ("one_launch", 2)
    kept.forget()
    plans.clear()
    cases.run(LINEAR)
    assert {t.op: t.calls for t in tallies()}["lora_linear"] == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("found", ["torch is faster", "a fault", "branch_first is faster"])
def test_a_checkpoint_that_is_open_while_it_is_found_out_is_right(
    found, use_reentrant, clock, monkeypatch
) -> None:
    """The forward that backward runs again has the masks and the saved tensors of the first."""
    seconds = {"torch": 1e-6} if found == "torch is faster" else {"other": 1e-6}
    clock(**seconds)
    if found == "a fault":
        spoiled(monkeypatch, by_nan, ("fwd",))
    layer = slk.LoRALinear(64, 48, r=6, lora_dropout=0.3, dtype=BF16, device=DEVICE)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(70, 64, dtype=BF16, device=DEVICE)
    gradients = []
    with warnings.catch_warnings(), slk.settings(backend="triton"):
        warnings.simplefilter("ignore")
        for is_checkpointed in (True, False):
            leaf = x.clone().requires_grad_()
            layer.zero_grad()
            torch.manual_seed(5)
            run = partial(checkpoint, layer, use_reentrant=use_reentrant)
            y = (run if is_checkpointed else layer)(leaf)
            y.sum().backward()
            gradients.append([leaf.grad, layer.lora_A.grad, layer.lora_B.grad])
    for with_checkpoint, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_checkpoint, without, rtol=0.05, atol=0.05)


NOT_TIMED = {
    "deterministic": lambda: _deterministic(),
    "a forced strategy": lambda: slk.settings(strategy="branch_first"),
    "off": lambda: slk.settings(first_use="off"),
}


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("why", NOT_TIMED)
def test_nothing_is_timed_where_a_clock_must_not_decide(clock, why) -> None:
    timer = clock(other=1e-6)
    case = LINEAR.but(strategy="branch_first") if "forced" in why else LINEAR
    with NOT_TIMED[why]():
        cases.run(case)
    assert not timer.timed
    expected = "branch_first" if "forced" in why else "one_launch"
    assert strategies_run() == dict.fromkeys(("lora_linear_fwd", "lora_linear_bwd"), expected)
    assert len(kept.findings_on(torch.device(DEVICE))) == (0 if why == "off" else 2)


def test_what_a_clock_has_decided_does_not_count_in_deterministic_mode(clock) -> None:
    clock(other=1e-6)
    cases.run(LINEAR)
    with _deterministic():
        cases.run(LINEAR)
    assert {(t.strategy, t.calls) for t in tallies()} == {("branch_first", 1), ("one_launch", 1)}


def test_a_capture_runs_no_proof(monkeypatch) -> None:
    monkeypatch.setattr(kept, "may_run", lambda device: False)
    cases.run(LINEAR)
    assert not files()


def test_a_strategy_that_is_wrong_is_not_timed(clock, monkeypatch) -> None:
    timer = clock(other=1e-6)
    run = first_use._run_poisoned

    def spoil_branch_first(subject: Any, device: Any, call: Any, choice: Any) -> Any:
        results = run(subject, device, call, choice)
        if choice is not None and choice.strategy == "branch_first":
            by_nan(results)
        return results

    monkeypatch.setattr(first_use, "_run_poisoned", spoil_branch_first)
    with pytest.warns(RuntimeWarning, match="by 'branch_first' is wrong"):
        cases.run(LINEAR)
    assert timer.timed == 2
    assert strategies_run() == dict.fromkeys(("lora_linear_fwd", "lora_linear_bwd"), "one_launch")


def test_tiles_are_timed_if_they_are_asked_for(monkeypatch, clock) -> None:
    seen: list[int] = []

    def measure(runs: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
        seen.append(len(runs))
        # The table's, its tiles, the other strategy, PyTorch's operators: the second tile wins.
        return [1e-6 if place == 2 else 10e-6 for place in range(len(runs))]

    monkeypatch.setattr(first_use, "measure", measure)
    case = LINEAR.but(shape=(70, 64), p=0.0)
    operands = cases.make(case)
    with slk.settings(first_use="tiles"), silent():
        for _ in range(3):
            results = cases.run(case, operands)
        for name, expected in expectations(case, operands).items():
            expected.check(results[name], name)
    assert len(seen) == 2 and min(seen) > 4
    (times,) = [
        f
        for kind, f in kept.findings_on(torch.device(DEVICE)).items()
        if kind.op == "lora_linear_fwd, timed"
    ]
    assert times.fastest in times.tiles and proven_forward().faults[times.fastest] == ""


def proven_forward() -> Finding:
    (finding,) = [f for kind, f in proven().items() if kind.op == "lora_linear_fwd"]
    return finding


def test_a_checkpointed_forward_runs_again_by_the_same_strategy(clock) -> None:
    """The first run saves nothing, the second one what backward reads. No clock is asked twice."""
    timer = clock(other=1e-6)
    layer = slk.LoRALinear(64, 48, r=6, dtype=BF16, device=DEVICE)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(70, 64, dtype=BF16, device=DEVICE, requires_grad=True)
    with slk.settings(backend="triton"):
        y = checkpoint(layer, x, use_reentrant=True)
        timer.seconds = {"table": 1e-6}
        y.sum().backward()
    calls = {(t.op, t.strategy): t.calls for t in tallies()}
    assert calls[("lora_linear_fwd", "branch_first")] == 2 and timer.timed == 2
    # Both kinds of forward are proven by it.
    forwards = [f.faults for kind, f in proven().items() if kind.op == "lora_linear_fwd"]
    assert len(forwards) == 2 and all(f["branch_first"] == "" for f in forwards)


def test_a_clock_that_fails_costs_the_call_nothing(monkeypatch, told) -> None:
    def full(runs: Any, device: Any) -> list[float]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(first_use, "measure", full)
    operands = cases.make(LINEAR)
    with silent():
        results = cases.run(LINEAR, operands)
    for name, expected in expectations(LINEAR, operands).items():
        expected.check(results[name], name)
    assert "is not timed: OutOfMemoryError: no memory" in "\n".join(told)


def test_what_is_not_proven_is_not_timed(clock) -> None:
    timer = clock(torch=1e-6)
    with silent():
        cases.run(LINEAR.but(broken="weight0"))
    assert not timer.timed and strategies_run()["lora_linear_fwd"] == "one_launch"


def test_an_op_that_writes_to_its_operands_is_proven_and_not_timed(clock) -> None:
    timer = clock(torch=1e-6)
    layer, x, expected = rows_layer()
    with slk.settings(backend="triton"), silent():
        y = lora_rows(x, layer, None, None, branches_of(layer))
    torch.testing.assert_close(y, expected)
    assert not timer.timed and faults()["lora_rows_fwd"] == {"one_launch": ""}


def test_a_wrong_kernel_of_rows_gets_pytorchs_result(monkeypatch) -> None:
    layer, x, expected = rows_layer()
    run = first_use._run_poisoned

    def spoil(subject: Any, device: Any, call: Any, choice: Any) -> Any:
        results = run(subject, device, call, choice)
        call.y[0, 0] += 1
        return results

    monkeypatch.setattr(first_use, "_run_poisoned", spoil)
    with slk.settings(backend="triton"), pytest.warns(RuntimeWarning, match="Y of branch 0 is off"):
        y = lora_rows(x, layer, None, None, branches_of(layer))
    torch.testing.assert_close(y, expected)


def rows_layer() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, x, and what two branches of BRANCHES give."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator).to(DEVICE)
    x = torch.randn(40, 32, generator=generator).to(DEVICE)
    y = x @ weight.T
    for branch in branches_of(weight):
        rows = slice(branch.start, branch.end)
        y[rows] += branch.scaling * (x[rows] @ branch.lora_A.T @ branch.lora_B.T)
    return weight, x, y


def branches_of(weight: Tensor) -> list[RowsBranch]:
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (torch.randn(r, 32, generator=generator), torch.randn(24, r, generator=generator))
        for r in (4, 1)
    ]
    (a, b), (c, d) = [(p.to(weight.device), q.to(weight.device)) for p, q in pairs]
    return [RowsBranch(0, 17, a, b, 0.5, 0.0), RowsBranch(20, 40, c, d, 2.0, 0.0)]


# The loss and the optimizer


def loss_of_hidden(hidden: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(53, 16, generator=generator).to(DEVICE)
    labels = torch.randint(53, (hidden.shape[0],), generator=generator).to(DEVICE)
    return lora_linear_cross_entropy(
        hidden, weight, labels, bias=None, lora_A=None, lora_B=None, scaling=1.0
    )


@pytest.mark.parametrize("spoil", ["the loss", "dZ"])
def test_a_wrong_loss_kernel_gets_pytorchs_result(spoil, monkeypatch) -> None:
    hidden = torch.randn(20, 16, device=DEVICE, requires_grad=True)
    with slk.settings(backend="torch"):
        expected = loss_of_hidden(hidden)
        (gradient,) = torch.autograd.grad(expected, hidden)
    by_kernel = cross_entropy._losses_by_kernel

    def spoiled_kernel(call: Any, chunk: Any) -> Any:
        of_tokens = by_kernel(call, chunk)
        target = of_tokens.losses if spoil == "the loss" else chunk.logits
        target[(0,) * target.dim()] += 0.01
        return of_tokens

    monkeypatch.setattr(cross_entropy, "_losses_by_kernel", spoiled_kernel)
    with slk.settings(backend="triton"), pytest.warns(RuntimeWarning, match=f"{spoil} is off"):
        loss = loss_of_hidden(hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], gradient)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.5},
        {"moments_dtype": BF16},
        {"moments_dtype": torch.uint8},
        {"moments_dtype": torch.uint8, "lr_ratio_B": 16.0},
        {"master_weights": True},
        {"stop_condition": "never"},
        {"lr": torch.tensor(1e-2)},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_right_optimizer_step_passes_and_a_wrong_one_is_pytorchs(
    options, dtype, monkeypatch
) -> None:
    def stepped() -> list[Tensor]:
        optimizer = slk.StableLoRAAdamW(
            make_pairs([(3, 31, 45), (4, 9, 600)], dtype), **{"lr": 1e-2, **options}
        )
        take_step(0, optimizer)
        return [p.detach() for group in optimizer.param_groups for p in group["params"]]

    with slk.settings(backend="torch"):
        expected = stepped()
    with slk.settings(backend="triton"):
        with silent_but_for_the_interpreter():
            right = stepped()
        step = proof.TritonStep.step

        def wrong(self: Any, *args: Any) -> None:
            step(self, *args)
            self.params[0].view(-1)[-1] += 0.1

        kept.forget()
        shutil.rmtree(kept.cache_dir())
        monkeypatch.setattr(proof.TritonStep, "step", wrong)
        with pytest.warns(RuntimeWarning, match="stable_adamw by 'one_launch' is wrong"):
            fallen_back = stepped()
    for of_kernel, of_torch, fallen in zip(right, expected, fallen_back, strict=True):
        assert torch.equal(fallen, of_torch)
        torch.testing.assert_close(of_kernel, of_torch, rtol=0.02, atol=1e-3)


@contextmanager
def silent_but_for_the_interpreter() -> Iterator[None]:
    """NumPy warns of casts that the kernel masks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="stablelora_kernels")
        yield


# What the proofs compare


def test_a_sample_has_a_row_of_each_sixteen_at_every_place() -> None:
    for count in (1, 16, 64):
        assert proofs.sample_of(count, torch.device("cpu")).tolist() == [*range(count)]
    for count in (65, 100, 4096, 4097):
        rows = proofs.sample_of(count, torch.device("cpu"))
        assert {row // 16 for row in rows.tolist()} == {*range(-(-count // 16))}
        assert int(rows[-1]) == count - 1
    assert {row % 16 for row in rows.tolist()} == {*range(16)}


def test_masks_are_packed_as_kernels_store_them() -> None:
    keep = torch.rand(5, 77, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = proofs.packed(keep)
    assert packed.shape == (5, 3) and torch.equal(slk.reference.unpack_mask(packed, 77), keep)
    # Of a branch without dropout.
    assert proofs.packed(keep[:0]).shape == (0, 3)


def test_findings_of_this_process_can_be_read_back() -> None:
    kind, device = Kind("lora_linear_fwd", "x"), torch.device(DEVICE)
    finding = Finding({"one_launch": ""}, {"one_launch": 3.5}, "one_launch", "why", {"a": [1] * 5})
    kept.keep(kind, device, finding)
    kept.forget()
    assert kept.finding_of(kind, device) == finding and FORWARD.strategies


def test_stand_ins_are_surrounded_by_nan() -> None:
    draw = proofs.StandIns(torch.device("cpu"))
    rows = torch.empty(4, 10)[:, 1:6]
    for t in (rows, rows.t(), rows[:1].expand(4, 5), torch.empty(7)[::2]):
        stand_in = draw.normal(t)
        assert stand_in.stride() == t.stride() and stand_in.isfinite().all()
        memory = torch.empty(0).set_(stand_in.untyped_storage())
        assert stand_in.data_ptr() % 16 == t.data_ptr() % 16
        # Written are the elements of the view alone.
        assert memory.isfinite().sum() == len({*stand_in.flatten().tolist()})
        margin = proofs.MARGIN // 4
        assert memory[:margin].isnan().all() and memory[-margin:].isnan().all()


def test_gradients_have_rows_on_both_sides_of_a_seam() -> None:
    for count in (1, 64, 65, 96, 1000):
        rows = {*proofs.sample_of_sums(count, torch.device("cpu")).tolist()}
        assert rows >= {*proofs.sample_of(count, torch.device("cpu")).tolist()}
        assert rows >= {row + side for row in range(16, count, 16) for side in (-1, 0)}
        assert max(rows) == count - 1


def test_counters_that_are_left_are_a_fault_and_spoil_no_other_kernel(monkeypatch) -> None:
    counters = workspace.all_counters(torch.device(DEVICE))
    assert not counters.any()
    run = first_use._run

    def run_and_leave(launches: Any, device: Any) -> None:
        run(launches, device)
        counters[5:6].fill_(1)

    monkeypatch.setattr(first_use, "_run", run_and_leave)
    with pytest.warns(RuntimeWarning, match="its counters are not 0 behind its launches"):
        cases.run(LINEAR)
    assert not counters.any()


def test_scratch_is_nan_before_a_proof(monkeypatch) -> None:
    """What a kernel reads before it is written shows, whatever the allocator has left there."""
    taken: list[Tensor] = []
    scratch = workspace.scratch

    def noting(*args: Any, **options: Any) -> Tensor:
        taken.append(scratch(*args, **options))
        return taken[-1]

    monkeypatch.setattr("stablelora_kernels.launch.lora_linear.scratch", noting)
    run = first_use._run
    before: list[bool] = []

    def run_noting(launches: Any, device: Any) -> None:
        before.extend(bool(t.isnan().all()) for t in taken if t.is_floating_point() and t.numel())
        taken.clear()
        run(launches, device)

    monkeypatch.setattr(first_use, "_run", run_noting)
    with silent():
        cases.run(LINEAR.but(op="group", sizes=(48, 40), ranks=(6, 6)))
    assert before and all(before)


def loss_of(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator).to(DEVICE)
    weight = torch.randn(50, 16, generator=generator).to(DEVICE)
    labels = torch.arange(rows, device=DEVICE)
    with slk.settings(backend="triton"):
        return lora_linear_cross_entropy(
            hidden.requires_grad_(),
            weight,
            labels,
            bias=None,
            lora_A=None,
            lora_B=None,
            scaling=1.0,
        )


@pytest.mark.parametrize("change", ["doubled", "label"])
def test_a_wrong_loss_shows_in_a_call_of_one_row(change, monkeypatch) -> None:
    """Stand-ins have rows of their own: one that is ignored would be all that the call has."""
    expected = loss_of(1)
    kept.forget()
    (path,) = [path for path in files() if "cross_entropy" in path.read_text()]
    path.unlink()
    by_kernel = cross_entropy._losses_by_kernel

    def wrong(call: Any, chunk: Any) -> Any:
        of_tokens = by_kernel(call, chunk)
        losses = of_tokens.losses
        losses = losses * 2 if change == "doubled" else losses.nan_to_num(nan=1.0)
        return of_tokens._replace(losses=losses)

    monkeypatch.setattr(cross_entropy, "_losses_by_kernel", wrong)
    match = "the loss is" if change == "doubled" else "outside of the vocabulary is a number"
    with pytest.warns(RuntimeWarning, match=match):
        loss = loss_of(1)
    torch.testing.assert_close(loss, expected)


def test_a_kernel_that_writes_beyond_its_results_is_a_fault(monkeypatch) -> None:
    run = first_use._run
    written: list[Tensor] = []

    def noting(t: Tensor) -> tuple[Tensor, Tensor]:
        memory, view = proofs.like(t)
        written.append(memory)
        return memory, view

    def run_beyond(launches: Any, device: Any) -> None:
        run(launches, device)
        written[-1][-1] = 0

    monkeypatch.setattr(first_use, "like", noting)
    monkeypatch.setattr(first_use, "_run", run_beyond)
    with pytest.warns(
        RuntimeWarning, match="a kernel has written beyond its results or its scratch"
    ):
        cases.run(LINEAR)
