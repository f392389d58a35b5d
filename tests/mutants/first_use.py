"""Plant faults of kernels and launches in a copy of the package, and see that first use alone catches
each: with a warning, and with right results.

    python -m tests.mutants.first_use [--unplanted] [ID or part of an ID ...]

A fault's trials run in one process, each with an empty cache. Whether results are right is checked
against float64 afterwards; first use does not know of that. ``first_use.txt`` has what must come out.
Exit status 1: something else did.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tqdm import tqdm

from tests.mutants.__main__ import PLANTED, ROOT, Fault, planted, read

OUTCOMES = Path(__file__).with_name("first_use.txt")
# Names of the optimizer's options.
STEPS = (
    "plain", "clipped", "8-bit-moments", "bf16-moments", "masters-clipped", "all", "tensors",
    "masters-8-bit-moments-clipped",
)  # fmt: skip
CAUGHT = "caught"
NO_EFFECT = "no effect here"
MISSED = "MISSED"
ENDLESS = "never ends"
SECONDS = 300
# Of which files faults change kernels or their launches, and the trials that show them, the likeliest
# first.
TRIALS_OF = {
    "kernels/lora/cross_entropy.py": ("loss", "entropy"),
    "kernels/lora/gated.py": ("gated", "mlp"),
    "kernels/lora/gate_up.py": ("gated", "mlp"),
    "kernels/lora/chain.py": ("chain", "sums", "gated"),
    "kernels/lora/tickets.py": ("chain", "sums"),
    "kernels/lora/linear_quantized.py": ("forms",),
    "kernels/lora/linear_split_k.py": ("sums", "chain", "forms"),
    "kernels/lora/": ("chain", "sums", "forms", "gated", "long"),
    "kernels/stable_adamw/shrink.py": ("shrink",),
    "kernels/stable_adamw/": ("step",),
    "kernels/common.py": ("chain", "sums", "gated", "long"),
    "launch/lora_linear_cross_entropy.py": ("loss",),
    "launch/stable_adamw.py": ("step",),
    "launch/stable_shrink.py": ("shrink",),
    "launch/lora_mlp.py": ("gated", "mlp"),
    "launch/fill_jobs.py": ("forms", "chain", "sums", "gated"),
    "launch/lora_linear.py": ("chain", "forms", "gated", "mlp", "rows"),
    "launch/": ("chain", "sums"),
    "dispatch/rules.py": ("chain", "forms", "sums"),
    "dispatch/": ("chain", "sums"),
    "ops/plans.py": ("chain",),
    "ops/lora_linear/triton.py": ("forms",),
    "ops/lora_mlp/triton.py": ("gated", "mlp"),
    "ops/lora_rows/triton.py": ("rows",),
    "optim/triton_step.py": ("step",),
}


class Trial(NamedTuple):
    """A call that first use sees for the first time."""

    name: str
    # Raises AssertionError if a result is wrong.
    run: Callable[[], None]


class Outcome(NamedTuple):
    """What became of a fault."""

    id: str
    outcome: str
    # The trial, and the fault's words; or why nothing shows.
    words: str

    def __str__(self) -> str:
        return f"{self.id:8} | {self.outcome:14} | {self.words}"


def faults() -> list[Fault]:
    """The faults that change kernels or launches."""
    return [fault for fault in read(PLANTED.read_text(encoding="utf-8")) if groups_of(fault)]


def recorded() -> list[Outcome]:
    """What must come out, by ``first_use.txt``."""
    lines = OUTCOMES.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line and not line.startswith("#")]
    return [Outcome(*(cell.strip() for cell in row.split("|", 2))) for row in rows]


def groups_of(fault: Fault) -> Sequence[str]:
    """The groups of trials that may show a fault; none if it is not of kernels or launches."""
    if fault.file == "dispatch/settings.py":
        return ()
    return next((groups for start, groups in TRIALS_OF.items() if fault.file.startswith(start)), ())


# In the child.


def _trials() -> dict[str, list[Trial]]:
    """The trials by group."""
    from stablelora_kernels.dispatch import tiles
    from stablelora_kernels.dispatch.settings import settings
    from stablelora_kernels.testing.cases import BF16, FP16, FP32, TINY, Case
    from stablelora_kernels.testing.ops.lora_mlp import MLP
    from tests.kernels.test_tickets import TILES
    from tests.ops import test_lora_linear_cross_entropy as losses
    from tests.ops import test_lora_linear_log_probs as log_probs
    from tests.ops import test_lora_rows as rows
    from tests.optim import test_reference as steps
    from tests.optim import test_stable_shrink as shrinks

    small = Case("linear", (70, 64), (48,), (6,), BF16, FP32)
    in_turn = dict.fromkeys(("x", "weight", "lora_A", "lora_B", "grad"), "transposed")
    gaps = dict.fromkeys(("bias", "grad", "base_out"), "every second") | {"lora_B": "wider"}
    chain = [
        # Several blocks of K.
        small.but(p=0.3, arch="sm_80", shape=(70, 136)),
        small.but(p=0.3, arch="sm_90"),
        small.but(ranks=(100,), strategy="one_launch", arch="gfx942"),
        TILES.but(p=0.2),
        small.but(
            ranks=(16,), sizes=(80,), p=0.2, strategy="branch_first", backward_strategy="one_launch"
        ),
        Case("linear", (50, 64), (48,), (16,), BF16, FP32, strategy="few_rows", arch="sm_90"),
    ]
    sums = [
        Case("linear", (5, 700), (72,), (3,), BF16, FP32),
        Case("linear", (5, 72), (700,), (40,), BF16, FP32, p=0.3),
        Case("linear", (50, 1040), (136,), (40,), BF16, FP32, strategy="few_rows"),
        Case("linear", (550, 20), (24,), (3,), BF16, FP32, p=0.3),
        Case("linear", (550, 20), (24,), (80,), BF16, FP32, strategy="branch_first"),
    ]
    forms = [
        small.but(strategy="branch_first", p=0.2),
        small.but(dtype=FP16, scalings=(64.0,)),
        small.but(dtype=FP16, scalings=(64.0,), shape=(5, 64)),
        small.but(dtype=FP16, scalings=(64.0,), strategy="branch_first"),
        small.but(layouts=in_turn, ranks=(1,)),
        small.but(layouts=gaps, ranks=(65,)),
        Case("linear", (20, 384), (40,), (20,), BF16, FP32, quantized=("nf4 nested",)),
        Case("linear", (20, 384), (40,), (20,), FP16, FP32, quantized=("fp8",)),
        Case("linear", (67, 100), (71,), (3,), BF16, FP32, quantized=("nf4",)),
        Case("linear", (20, 352), (140,), (20,), BF16, FP32, quantized=("nvfp4 swizzled",)),
        Case("linear", (67, 96), (71,), (3,), BF16, FP32, quantized=("mxfp4",)),
        Case("branch", (70, 40), (48,), (6,), BF16, FP32, p=0.1, arch="sm_90", layouts=gaps),
        Case("branch", (70, 40), (48,), (20,), FP16, FP32, base_dtype=FP32),
        Case("group", (70, 40), (48, 25), (6, 20), BF16, FP32, layouts=in_turn, p=0.1),
        Case("group", (70, 40), (48, 25), (6, 20), BF16, FP32, strategy="branch_first", layouts=in_turn),
        small.but(dtype=FP32),
        small.but(dtype=FP32, shape=(1, 64)),
        TILES.but(op="group", sizes=(104, 40), ranks=(16, 4), dtype=FP16, lora_dtype=FP16),
    ]  # fmt: skip
    long = [
        TILES.but(arch="sm_80", ranks=(40,)),
        Case("linear", (200, 96), (800,), (16,), BF16, FP32, strategy="one_launch", arch="sm_90", processors=9),
        Case("linear", (200, 800), (96,), (16,), BF16, FP32, p=0.3, strategy="one_launch", arch="sm_80", processors=9),
        Case("linear", (150, 72), (520,), (40,), BF16, FP32, p=0.3, strategy="one_launch"),
        Case("linear", (64, 2048), (24,), (3,), BF16, FP32, p=0.3),
    ]  # fmt: skip
    gated = Case("mlp", (70, 40), (48, 48, 24), (8, 3, 5), BF16, FP32, scalings=(0.5, 1.5, -0.75))
    mlp = [
        gated.but(arch="sm_80"),
        gated.but(activation="gelu_tanh", p=0.3, arch="sm_90"),
        # The vendor's product adds an up without a branch.
        gated.but(ranks=(8, None, 5)),
        gated.but(activation="gelu", dtype=FP16, p=0.4, strategy="one_launch", arch="sm_90", processors=1),
        gated.but(strategy="branch_first", p=0.2),
        gated.but(shape=(140, 48), sizes=(104, 104, 48), strategy="one_launch", arch="sm_90", processors=2, tile=TINY),
        gated.but(shape=(5, 136), sizes=(72, 72, 16), ranks=(8, 20, 3), p=0.2, arch="sm_90"),
        gated.but(ranks=(None, 8, 5), strategy="one_launch", arch="sm_80"),
        gated.but(shape=(9, 64), ranks=(6, 6, 3), shared=True, p=0.3),
        gated.but(shape=(70, 64), quantized=("nf4", "fp8", None), arch="sm_90"),
        # Its forward is once without G and U, and once without Y.
        gated.but(op=MLP(tile_rows=40), p=0.3, arch="sm_90"),
    ]  # fmt: skip

    def narrow() -> AbstractContextManager[object]:
        """As those tests' fixture has them: several blocks of columns."""
        (rule,) = tiles.CROSS_ENTROPY_TILES
        few = (rule._replace(choice=rule.choice._replace(BLOCK_N=32)),)
        return mock.patch.object(tiles, "CROSS_ENTROPY_TILES", few)

    def of_loss(case: Case) -> Trial:
        def run() -> None:
            with narrow():
                losses.test_matches_the_oracle(case, "triton")

        return Trial(f"loss {case}", run)

    def of_entropy(name: str) -> Trial:
        def run() -> None:
            with narrow(), settings(backend="triton"):
                log_probs.test_as_log_softmax(name, "triton")

        return Trial(f"entropy {name}", run)

    def of_step(name: str, dtype: Any) -> Trial:
        def run() -> None:
            # Pairs of the plain one must latch meanwhile.
            count = steps.STEPS if name == "plain" else 3
            with mock.patch.object(steps, "STEPS", count):
                steps.test_steps_are_the_references("triton", name, dtype)

        return Trial(f"step {name} {str(dtype)[6:]}", run)

    def of_shrink(dtype: Any) -> Trial:
        def run() -> None:
            with settings(backend="triton"):
                shrinks.test_a_shrinks_as_the_reference_until_its_pair_latches("triton", dtype)
                shrinks.test_what_is_beside_a_shrinks_with_it("triton")

        return Trial(f"shrink {str(dtype)[6:]}", run)

    adapters = (BF16, FP32)
    return {
        "chain": [*map(_of_case, chain)],
        "sums": [*map(_of_case, sums)],
        "forms": [*map(_of_case, forms), _of_case(small.but(p=0.3), _in_other_layouts)],
        "long": [*map(_of_case, long)],
        "gated": [*map(_of_case, mlp[:3])],
        "mlp": [*map(_of_case, mlp[3:]), _of_case(gated.but(p=0.3), _in_other_layouts)],
        "rows": [
            _of_case(rows.of_rows("sequences", adapters, True, "transposed")),
            _of_case(rows.of_rows("primes")),
            _of_case(rows.of_rows("many rows", adapters)),
        ],
        "loss": [of_loss(case) for case in losses.CASES],
        "entropy": [*map(of_entropy, ("plain", "cap", "bf16", "fp16"))],
        "step": [
            *(of_step(name, steps.OPTIONS[name].dtypes[0]) for name in STEPS),
            of_step("masters-clipped", FP16),
        ],
        "shrink": [*map(of_shrink, (FP32, BF16, FP16))],
    }  # fmt: skip


def _in_other_layouts() -> AbstractContextManager[Any]:
    """What is saved for backward comes back by columns, as from a hook that keeps it elsewhere."""
    import torch

    return torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t
    )


def _of_case(case: Any, block: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Trial:
    """A call of a case, and a second one that finds what the first has left."""
    from stablelora_kernels.dispatch import first_use
    from stablelora_kernels.testing import cases
    from stablelora_kernels.testing.expectations import expectations

    def run() -> None:
        operands = cases.make(case)
        expected = expectations(case, operands)
        with block():
            for _ in range(2):
                results = cases.run(case, operands)
                for name, value in results.items():
                    if name != "base_out":
                        expected[name].check(value, name)
                if first_use.retired_on(results["Y0"].device):
                    # Others take the next call, which draw other masks.
                    break

    suffix = "" if block is nullcontext else ", saved in other layouts"
    return Trial(f"{case}{suffix}", run)


class _Seen(NamedTuple):
    """What a trial has shown."""

    # What first use has said.
    warned: str
    # What is wrong with results, or what was raised.
    wrong: str


def _see(trial: Trial) -> _Seen:
    from stablelora_kernels.dispatch import first_use
    from stablelora_kernels.launch import workspace
    from stablelora_kernels.ops import plans

    shutil.rmtree(first_use.cache_dir(), ignore_errors=True)
    first_use.forget()
    plans.clear()
    # Counters that the trial before has left.
    workspace._in_use.clear()
    wrong = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trial.run()
        except AssertionError as error:
            wrong = " ".join(str(error).split())[:200] or "a result is wrong"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"[:200]
    words = [str(warning.message) for warning in caught]
    found = [text for text in words if "is wrong on this machine" in text]
    return _Seen(_short(found[0]) if found else "", wrong)


def _short(warning: str) -> str:
    """The op, the strategy and the fault of a warning."""
    op, _, rest = warning.removeprefix("stablelora_kernels: ").partition(
        " is wrong on this machine ("
    )
    return f"{op}: {rest.partition('): ')[2].partition(chr(46) + ' PyTorch')[0]}"


def _outcome_in(
    tree: Path, id: str, groups: Sequence[str], likely: str, connection: Connection
) -> None:
    """Run the trials of ``groups`` in this process until one shows the fault, and send what became of
    it. The ``likely`` one comes first.
    """
    sys.path.insert(0, str(tree))
    cache = tempfile.TemporaryDirectory()
    os.environ["STABLELORA_CACHE"] = cache.name
    import stablelora_kernels as slk

    assert Path(str(slk.__file__)).is_relative_to(tree), "the copy must be imported"
    slk.settings.first_use = "on"
    by_group = _trials()
    trials = [trial for group in groups for trial in by_group[group]]
    outcome = Outcome(id, NO_EFFECT, f"{len(trials)} trials")
    for trial in sorted(trials, key=lambda trial: trial.name != likely):
        seen = _see(trial)
        if seen.wrong:
            outcome = Outcome(id, MISSED, f"{trial.name}: {seen.wrong} [{seen.warned}]")
            break
        if seen.warned:
            outcome = Outcome(id, CAUGHT, f"{trial.name}; {seen.warned}")
            break
    connection.send(outcome)
    cache.cleanup()


# In the parent, which imports PyTorch and Triton for all children.


def outcome_of(tree: Path, fault: Fault, likely: str) -> Outcome:
    """What becomes of a fault that is planted in ``tree``. ``likely``: a trial's name, or ""."""
    path = tree / "stablelora_kernels" / fault.file
    source = path.read_text(encoding="utf-8")
    path.write_text(planted(source, fault), encoding="utf-8")
    try:
        return outcome_in(tree, fault.id, groups_of(fault), likely)
    finally:
        path.write_text(source, encoding="utf-8")


def outcome_in(tree: Path, id: str, groups: Sequence[str], likely: str = "") -> Outcome:
    """What becomes of the trials of ``groups``, in a child."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_outcome_in, args=(tree, id, groups, likely, sender))
    try:
        child.start()
        sender.close()
        if not receiver.poll(SECONDS):
            child.kill()
            return Outcome(id, ENDLESS, f"within {SECONDS} seconds")
        return Outcome(*receiver.recv())
    except EOFError:
        return Outcome(id, MISSED, "the process ended")
    finally:
        child.join()


def prepare() -> None:
    """What every child needs, and none may import again: Triton for its interpreter."""
    if "stablelora_kernels" in sys.modules:
        raise RuntimeError(
            "children must import the package from their copy: run this in a new process"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    sys.dont_write_bytecode = True
    import torch

    from tests.helpers.interpreter import speed_up_interpreter

    speed_up_interpreter()
    torch.set_num_threads(1)


def copied(folder: Path) -> Path:
    """A copy of the package to plant faults in. Tests come from this tree."""
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "stablelora_kernels", folder / "stablelora_kernels", ignore=skipped)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants.first_use", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("ids", nargs="*", metavar="ID")
    parser.add_argument(
        "--unplanted",
        action="store_true",
        help="run all trials without a fault: first use is silent",
    )
    args = parser.parse_args(argv)
    every = {fault.id: fault for fault in faults()}
    if unknown := {*args.ids} - {*every}:
        parser.error(f"ID must be one of a kernel's or a launch's fault, got {', '.join(unknown)}")
    prepare()
    expected = {outcome.id: outcome for outcome in recorded()}
    others = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        if args.unplanted:
            groups = dict.fromkeys(group for groups in TRIALS_OF.values() for group in groups)
            runs = [(lambda group=group: outcome_in(tree, group, (group,))) for group in groups]
        else:
            runs = [
                (lambda fault=every[id]: outcome_of(tree, fault, likely_trial(expected, fault.id)))
                for id in args.ids or every
            ]
        for run in tqdm(runs):
            outcome = run()
            tqdm.write(str(outcome), file=sys.stdout)
            must = NO_EFFECT
            if not args.unplanted and outcome.id in expected:
                must = expected[outcome.id].outcome
            others += outcome.outcome != must
    print(f"{len(runs)} outcomes, {others} of them other than recorded")
    return bool(others)


def likely_trial(expected: dict[str, Outcome], id: str) -> str:
    """The trial that has shown a fault before, or ""."""
    is_caught = id in expected and expected[id].outcome == CAUGHT
    return expected[id].words.partition("; ")[0] if is_caught else ""


if __name__ == "__main__":
    sys.exit(main())
