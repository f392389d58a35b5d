"""Calls of the library's ops in every form that dispatch can take, each compared with its reference
in float64.

An error is a share of the library's own bound, that of
:func:`stablelora_kernels.testing.assert_no_worse`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from stablelora_kernels import StableLoRAAdamW, StableShrink, settings, testing
from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.dispatch import rules
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.functional import lora_linear_cross_entropy, lora_linear_log_probs
from stablelora_kernels.launch import workspace
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.ops.dropout import draw_seeds
from stablelora_kernels.ops.lora_rows.autograd import RowsBranch, lora_rows
from stablelora_kernels.optim import staging
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference import dropout_keep_ref
from stablelora_kernels.testing import cases as calls
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64
from stablelora_kernels.testing.expectations import expectations
from stablelora_kernels.testing.inputs import QUANTIZED, can_hold
from tests.helpers.cases import far
from tests.helpers.optimizers import SHAPES, make_pairs, params_of, set_grads
from tests.ptx_emulator import library, runner
from tests.ptx_emulator.library import Log, emulated
from tests.ptx_emulator.machine import Schedule
from tests.ptx_emulator.memory import EmulationError, Faults

# By name: the error and its bound.
Errors = dict[str, tuple[float, float]]
Results = dict[str, Tensor]
# A GPU cuts operands off after the ten bits of TensorFloat-32. That makes a number smaller by at
# most 2^-11 of it on average, and a branch's two products have four operands.
TF32_SLOPE = 4 * 2.0**-11
SCALING = 1.7
WORDS = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


class Case(NamedTuple):
    """``run`` calls an op and compares its results; the rest is what it runs under."""

    name: str
    run: Callable[[], Errors]
    strategy: str = "auto"
    processors: int | None = None
    precision: str = "highest"


class Outcome(NamedTuple):
    """The largest error over its bound and whose it is, or what stopped the case; and what was
    found on the way.
    """

    share: float
    words: str
    log: Log
    # False: the emulator, or the library, could not run the case to its end, for a reason that is
    # no fault of the kernel.
    ran: bool = True

    @property
    def right(self) -> bool:
        return self.share <= 1 and not self.log.faults.found


def run_case(case: Case, schedule: Schedule) -> Outcome:
    """Never raises: an error of the emulator or the library is an outcome."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision)
    log = Log(schedule)
    # A case that failed may have left counts behind.
    workspace._in_use.clear()
    try:
        with settings(strategy=case.strategy), emulated(schedule, case.processors) as log:
            errors = case.run()
        left = sum(int(buffer.count_nonzero()) for buffer in workspace._in_use.values())
        errors["counters left"] = float(left), 0.5
    except Exception as error:
        words = f"{type(error).__name__}: {str(error)[:300]}"
        return Outcome(float("inf"), words, log, ran=isinstance(error, EmulationError))
    finally:
        torch.set_float32_matmul_precision(precision)
    shares = {
        name: (error / bound if error else 0.0) if error == error else float("inf")
        for name, (error, bound) in errors.items()
    }
    worst = max(shares, key=lambda name: shares[name])
    return Outcome(shares[worst], f"{worst} {shares[worst]:.2f}", log)


def kernels_of(case: Case, arch: str) -> list[runner.Compiled]:
    """The compiled kernels of a case, each once, without running them."""
    kernels: dict[str, runner.Compiled] = {}

    def compile_only(
        launch: Launch, schedule: Schedule, more: Iterable[tuple[Tensor, str]] = ()
    ) -> Faults:
        compiled = runner.compile_to_ptx(launch, schedule.arch)
        kernels[compiled.ptx] = compiled
        return Faults()

    with mock.patch.object(library, "run", compile_only):
        outcome = run_case(case, Schedule(arch))
    # Its numbers are garbage: no kernel wrote them.
    assert outcome.ran, outcome.words
    return [*kernels.values()]


def _errors_of(case: calls.Case, given: calls.Operands) -> Errors:
    """The errors of a call with the operands ``given``, and their bounds."""
    leaf = calls.leaves(case, given)
    torch.manual_seed(case.seed)
    return _deviations(case, given, calls.results(case, calls.ours(case, leaf), leaf))


def _deviations(
    case: calls.Case, given: calls.Operands, results: Results, keep: Tensor | None = None
) -> Errors:
    """The errors of a call's ``results``. ``keep``: its mask, if it is not that of a run of it."""
    # TensorFloat-32 has ten bits of fraction, eager PyTorch on a CPU all.
    tf32 = torch.get_float32_matmul_precision() == "high"
    errors = {}
    for name, expected in expectations(case, given, keep).items():
        if tf32:
            expected = expected._replace(slope=TF32_SLOPE)
        element, *scale = expected.deviations(results[name], name)
        more = 2e-3 * expected.ref.abs().max().item() if tf32 else 0.0
        errors[name] = element.error, element.bound + more
        errors |= {one.of: (one.error, one.bound) for one in scale}
    return errors


def _layout(t: Tensor, how: str) -> Tensor:
    if how == "far rows":
        return far(t, 2**27)
    return far(t.t(), 2**27).t() if how == "far columns" else calls.laid_out(t, how)


def linear(
    m: int, n: int, k: int, r: int, dtype: torch.dtype = BF16, lora: torch.dtype = FP32, p: float = 0.0, bias: bool = True,
    quantized: str | None = None, layouts: dict[str, str] | None = None,
    wanted: Sequence[str] = ("x", "lora_A", "lora_B"),
) -> Errors:  # fmt: skip
    """A layer's forward, and the gradients that are ``wanted``."""
    case = calls.Case(
        "linear",
        (m, k),
        (n,),
        (r,),
        dtype,
        lora,
        p=p,
        bias=(bias,),
        quantized=(quantized,),
        wanted=wanted,
    )
    given = calls.make(case)
    for kind, how in (layouts or {}).items():
        name = kind if kind == "x" else f"{kind}0"
        given[name] = _layout(given[name], how)
    return _errors_of(case, given)


def with_tile(tile: Tile, run: Callable[[], Errors]) -> Errors:
    """``run`` as if first use had measured that one launch with this tile is the fastest way."""
    with mock.patch.object(rules, "choose", lambda call: Choice("one_launch", "", tile)):
        return run()


def branch(m: int, n: int, k: int, r: int, dtype: torch.dtype, p: float) -> Errors:
    """The branch alone onto a finished product."""
    case = calls.Case("branch", (m, k), (n,), (r,), dtype, FP32, p=p)
    return _errors_of(case, calls.make(case))


def rows(*adapters: calls.Case) -> Errors:
    """Lone branches on rows of their own, onto a finished product, in one call of ``lora_rows``.
    Between two of them are rows without a branch.
    """
    operands = [calls.make(case) for case in adapters]

    def matrix(name: str) -> Tensor:
        # Each part once more: its first rows are those between.
        return torch.cat([t for given in operands for t in (given[name], given[name][:3])])

    leaf = {name: matrix(name).requires_grad_() for name in ("x", "base_out")}
    branches: list[RowsBranch] = []
    start = 0
    for case, given in zip(adapters, operands, strict=True):
        lora_A, lora_B = (given[name].requires_grad_() for name in ("lora_A0", "lora_B0"))
        end = start + case.shape[0]
        branches.append(RowsBranch(start, end, lora_A, lora_B, case.scalings[0], case.p))
        start = end + given["x"][:3].shape[0]
    torch.manual_seed(0)
    y = lora_rows(leaf["x"], None, None, leaf["base_out"], branches)
    pairs = [t for branch in branches for t in (branch.lora_A, branch.lora_B)]
    dx, dbase, *grads = torch.autograd.grad(y, [*leaf.values(), *pairs], matrix("grad0"))
    torch.manual_seed(0)
    seeds = draw_seeds(dx.device, [case.p for case in adapters])
    errors: Errors = {}
    between = torch.ones(len(dx), dtype=torch.bool)
    for i, (case, branch) in enumerate(zip(adapters, branches, strict=True)):
        own = slice(branch.start, branch.end)
        between[own] = False
        results = {
            "Y0": y.detach()[own],
            "base_out": dbase[own],
            "x": dx[own],
            "lora_A0": grads[2 * i],
            "lora_B0": grads[2 * i + 1],
        }
        seed, keep = seeds[i], None
        if seed is not None:
            keep = dropout_keep_ref(*case.shape, case.p, int(seed[0]))
        found = _deviations(case, operands[i], results, keep)
        errors |= {f"{name} of branch {i}": one for name, one in found.items()}
    untouched = torch.equal(y[between], leaf["base_out"][between]) and not dx[between].any()
    return errors | {"rows without a branch": (float(not untouched), 0.5)}


def group(
    m: int,
    ns: Sequence[int],
    k: int,
    ranks: Sequence[int],
    dtype: torch.dtype = BF16,
    p: float = 0.0,
) -> Errors:
    """Projections of one X."""
    case = calls.Case("group", (m, k), (*ns,), (*ranks,), dtype, FP32, p=p, bias=(True,))
    return _errors_of(case, calls.make(case))


def mlp(
    m: int, f: int, n: int, k: int, ranks: Sequence[int | None] = (16, 8, 4), dtype: torch.dtype = BF16, p: float = 0.0,
    activation: str = "silu", shared: bool = False,
) -> Errors:  # fmt: skip
    """A gated MLP."""
    case = calls.Case(
        "mlp", (m, k), (f, f, n), (*ranks,), dtype, FP32, p=p, activation=activation, shared=shared
    )
    return _errors_of(case, calls.make(case))


def cross_entropy(
    tokens: int, vocabulary: int, dtype: torch.dtype = BF16, reduction: str = "mean", softcap: float | None = None,
    entropy: bool = False,
) -> Errors:  # fmt: skip
    """The loss of a head with LoRA and its gradients, compared with the PyTorch path's. ``entropy``: the
    negative loss by token, and entropies, with the gradients of both.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden, weight, bias = draw(tokens, 32), 0.2 * draw(vocabulary, 32), draw(vocabulary)
    lora_A, lora_B = draw(4, 32), 0.1 * draw(vocabulary, 4)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::3] = -100
    upstream = draw(tokens) if reduction == "none" else torch.tensor(1.0)
    found = []
    for name, kind in (("triton", dtype), ("torch", dtype), ("torch", FP64)):
        # In float64 the operands are the same numbers.
        leaves = [t.to(dtype).to(kind).requires_grad_() for t in (hidden, bias, lora_A, lora_B)]
        call: dict[str, Any] = {
            "hidden": leaves[0], "weight": weight.to(dtype).to(kind), "labels": labels, "bias": leaves[1], "lora_A": leaves[2],
            "lora_B": leaves[3], "scaling": SCALING, "softcap": softcap, "logit_scale": 0.7,
        }  # fmt: skip
        with settings(backend=name):
            results = (
                lora_linear_log_probs(**call)
                if entropy
                else (lora_linear_cross_entropy(**call, reduction=reduction),)
            )
            given = [upstream.to(result.dtype) for result in results]
            grads = torch.autograd.grad(results, leaves, given)
        found.append([*(result.detach() for result in results), *grads])
    names = [*("loss", "entropy")[: len(found[0]) - 4], "hidden", "bias", "A", "B"]
    errors = {}
    for name, ours, eager, exact in zip(names, *found, strict=True):
        # Logits and dZ are rounded to dtype, each once.
        bound = 8 * testing.EPS[dtype] * max(exact.abs().max().item(), 1e-3)
        error, of_eager = ((t.double() - exact).abs().max().item() for t in (ours, eager))
        if dtype == FP32:
            # PyTorch's product sums over the vocabulary in float32, on some processors one after
            # another.
            bound = max(bound, 2 * of_eager)
        errors[name] = error, bound
    return errors


def optimizer(
    steps: int,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    dtype: torch.dtype = FP32,
    way: str = "",
    latching: bool = False,
    shrink: bool = False,
    **options: Any,
) -> Errors:
    """Steps, compared with those of the PyTorch path. ``way``: "sharded", or "captured" as in the
    capture of a CUDA graph.

    ``latching``: pairs must latch in these steps, some of them and not all. ``shrink``: the steps are
    those of another optimizer with a StableShrink.
    """
    made, latches = [], []
    for name in ("triton", "torch"):
        with settings(backend=name), ExitStack() as stack:
            pairs = make_pairs([*shapes], dtype)
            if way == "sharded":
                pairs = stack.enter_context(_sharded(pairs))
            shrunk: StableLoRAAdamW | StableShrink
            if shrink:
                each = torch.optim.SGD([p for pair in pairs for p in (pair.A, pair.B)], lr=1.0)
                shrunk = StableShrink(each, pairs, seed=5, **options)
            else:
                given = {
                    "lr": 1e-2,
                    "weight_decay": 0.1,
                    "seed": 5,
                    "capturable": way == "captured",
                    **options,
                }
                each = shrunk = StableLoRAAdamW(pairs, **given)
            for step in range(steps):
                _set_gradients(params_of(each), step)
                capturing = name == "triton" and way == "captured" and step > 0
                with mock.patch.object(staging, "capturing", lambda now=capturing: now):
                    each.step()
            made.append([_whole(p.detach()) for p in params_of(each)])
            latches.append([pair.latched_at for pair in shrunk.stability()])
    errors = {"latches": (float(latches[0] != latches[1]), 0.5)}
    if latching:
        errors["no latch"] = float(len({*latches[0]}) == 1), 0.5
    for i, (p, q) in enumerate(zip(*made, strict=True)):
        # Moments of few bits round by random numbers, which an unlike last bit of a moment turns
        # over.
        few = options.get("moments_dtype", FP32) != FP32
        unit = 1e-2 if few else 2e-5 if dtype == FP32 else 2 * testing.EPS[dtype]
        errors[f"p{i}"] = (
            (p.double() - q.double()).abs().max().item(),
            unit * q.abs().max().item() + 2e-6,
        )
    return errors


@contextmanager
def _sharded(pairs: list[LoRAPair]) -> Iterator[list[LoRAPair]]:
    """``pairs`` as the second of two processes holds them: A by columns, so that a shard is not one
    run of it, B by rows.

    There is no first process. Its collectives return what this one brings, so norms are those of
    this process's shards, on both paths.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = DeviceMesh("cpu", [0, 1])
        yield [
            LoRAPair(
                pair.name,
                _half(pair.A, mesh, 1).requires_grad_(),
                _half(pair.B, mesh, 0).requires_grad_(),
            )
            for pair in pairs
        ]
    finally:
        dist.destroy_process_group()


def _half(t: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    mine = t.detach().chunk(2, dim)[1].contiguous()
    return DTensor.from_local(
        mine, mesh, [Shard(dim)], run_check=False, shape=t.shape, stride=t.stride()
    )


def _whole(t: Any) -> Tensor:
    return t.to_local().clone() if hasattr(t, "to_local") else t.clone()


def _set_gradients(params: list[Any], step: int) -> None:
    whole = [torch.empty(p.shape, dtype=p.dtype) for p in params]
    set_grads(whole, step)
    for p, w in zip(params, whole, strict=True):
        p.grad = (
            _half(w.grad, p.device_mesh, p.placements[0].dim)
            if hasattr(p, "placements")
            else w.grad
        )


def cases() -> Iterator[Case]:
    """All cases. Names have the op, the dtypes of X and of A and B, sizes, and what is special."""
    for dtype, lora in ((BF16, FP32), (BF16, BF16), (FP16, FP16)):
        for m, n, k, r in (
            (5, 64, 96, 4),
            (33, 96, 160, 16),
            (130, 96, 160, 16),
            (130, 160, 72, 4),
            (96, 72, 64, 100),
        ):
            for p in (0.0, 0.1) if dtype == BF16 or (m, r) == (130, 16) else ():
                yield Case(
                    f"linear {WORDS[dtype]}/{WORDS[lora]} M{m} N{n} K{k} r{r} p{p}",
                    partial(linear, m, n, k, r, dtype, lora, p),
                )
    for strategy in ("few_rows", "branch_first", "one_launch"):
        for m, p, r in (
            (33, 0.0, 16),
            (33, 0.0, 48),
            (130, 0.0, 16),
            (130, 0.1, 16),
            (130, 0.0, 48),
            (130, 0.1, 48),
        ):
            if strategy != "few_rows" or m == 33:
                yield Case(
                    f"linear {strategy} bf16/fp32 M{m} r{r} p{p}",
                    partial(linear, m, 96, 160, r, p=p),
                    strategy,
                )
        if strategy != "branch_first":
            yield Case(
                f"linear {strategy} bf16/fp32 M5 N64 K512 r16",
                partial(linear, 5, 64, 512, 16),
                strategy,
            )
        m = 33 if strategy == "few_rows" else 130
        yield Case(
            f"linear {strategy} bf16/bf16 M{m} r16",
            partial(linear, m, 96, 160, 16, BF16, BF16),
            strategy,
        )
    # The branch that the vendor's product adds to: behind a launch of S, in blocks of ranks, without a
    # bias, and beside branches that share S.
    for p in (0.0, 0.1):
        yield Case(
            f"linear branch_first bf16/fp32 M130 r200 p{p}",
            partial(linear, 130, 96, 160, 200, p=p),
            "branch_first",
        )
    yield Case(
        "linear branch_first fp16/fp16 M130 r16 p0.1, no bias",
        partial(linear, 130, 96, 160, 16, FP16, FP16, 0.1, bias=False),
        "branch_first",
    )
    yield Case(
        "group branch_first bf16 M130 r16+8+4 p0.1",
        partial(group, 130, (96, 64, 32), 64, (16, 8, 4), p=0.1),
        "branch_first",
    )
    # A single rank, whose columns beside it are all zeros: accumulators begin with equal values.
    for kernel, m, n, k, p, dtype, lora, bias in (
        ("auto", 5, 64, 96, 0.0, BF16, FP32, True), ("auto", 33, 96, 160, 0.1, BF16, FP32, True),
        ("auto", 130, 96, 160, 0.1, BF16, BF16, False),
        ("few_rows", 33, 96, 160, 0.0, BF16, FP32, True), ("one_launch", 130, 96, 160, 0.1, BF16, FP32, True),
        ("branch_first", 1, 40, 72, 0.5, BF16, FP32, True), ("branch_first", 130, 96, 160, 0.1, BF16, FP32, True),
        ("branch_first", 130, 96, 160, 0.0, FP16, FP16, False), ("auto", 14, 96, 160, 0.1, FP32, FP32, True),
    ):  # fmt: skip
        name = f"linear {kernel} {WORDS[dtype]}/{WORDS[lora]} M{m} N{n} r1 p{p}"
        run = partial(linear, m, n, k, 1, dtype, lora, p, bias)
        yield Case(name if bias else f"{name}, no bias", run, kernel)
    for p in (0.0, 0.1):
        yield Case(f"branch bf16 M130 r1 p{p}", partial(branch, 130, 96, 160, 1, BF16, p))
        for m in (33, 130):
            run = partial(group, m, (96, 64, 32), 64, (1, 1, 1), p=p)
            yield Case(f"group bf16 M{m} r1+1+1 p{p}", run)
        yield Case(f"mlp bf16 M130 r1+1+1 p{p}", partial(mlp, 130, 96, 64, 80, (1, 1, 1), p=p))
    yield Case(
        "nf4 bf16 M33 N96 K192 r1 p0.1", partial(linear, 33, 96, 192, 1, p=0.1, quantized="nf4")
    )
    # Adapters on rows of their own, by the numbers of their rows, ranks and probabilities.
    for dtype, adapters in (
        (BF16, ((33, 16, 0.25), (130, 1, 0.0))), (BF16, ((1, 3, 0.0), (150, 20, 0.5), (40, 1, 0.25))),
        (FP16, ((70, 1, 0.25), (5, 48, 0.0))), (FP32, ((17, 1, 0.0), (33, 4, 0.25))),
    ):  # fmt: skip
        words = ["+".join(map(str, column)) for column in zip(*adapters, strict=True)]
        lora = FP16 if dtype == FP16 else FP32
        run = partial(
            rows,
            *(
                calls.Case("branch", (m, 96), (72,), (r,), dtype, lora, p=p, seed=place)
                for place, (m, r, p) in enumerate(adapters)
            ),
        )
        yield Case(f"rows {WORDS[dtype]} M{words[0]} r{words[1]} p{words[2]}", run)
    # Few processors: several tiles a program, the widest tile.
    for p in (0.0, 0.1):
        name = f"linear bf16/fp32 M300 N520 r16 p{p}, 2 processors"
        yield Case(name, partial(linear, 300, 520, 160, 16, p=p), processors=2)
        # S comes from a launch of its own.
        name = f"group bf16 M300 N520+264 K160 r16 p{p}, 2 processors"
        yield Case(name, partial(group, 300, (520, 264), 160, (16, 16), p=p), processors=2)
    # Programs that begin when others have drawn their tiles, if fewer are resident.
    for p in (0.0, 0.1):
        name = f"linear one_launch bf16/fp32 M300 N520 r16 p{p}, 6 processors"
        yield Case(name, partial(linear, 300, 520, 160, 16, p=p), "one_launch", processors=6)
    # The widest that is read through pointers, forward and backward.
    for r in (40, 16):
        name = f"linear one_launch bf16/fp32 M300 N496 r{r} p0.0, 3 processors"
        yield Case(name, partial(linear, 300, 496, 160, r), "one_launch", processors=3)
    name = "group bf16 M300 N496+496 K160 r40 p0.0, 3 processors"
    yield Case(name, partial(group, 300, (496, 496), 160, (40, 40)), processors=3)
    # One program for two tiles of S, or two of dS and one of dB.
    for n, k, p, processors in ((800, 96, 0.0, 9), (96, 800, 0.1, 9), (800, 96, 0.0, 3)):
        name = f"linear one_launch bf16/fp32 M200 N{n} K{k} r16 p{p}, {processors} processors"
        yield Case(name, partial(linear, 200, n, k, 16, p=p), "one_launch", processors)
    # S, dB and dA whose parts programs share, each with counters of its own, beside those of the
    # chain.
    for p in (0.0, 0.1):
        name = f"linear one_launch bf16/fp32 M520 N520 K64 r16 p{p}, shared sums"
        yield Case(name, partial(linear, 520, 520, 64, 16, p=p), "one_launch")
    # A tile of S has more rows than the product's.
    for p in (0.0, 0.1):
        run = partial(
            with_tile,
            Tile(64, 256, 64, 8, 3),
            partial(linear, 200, 264, 160, 16, p=p),
        )
        yield Case(f"linear bf16/fp32 M200 N264 r16 p{p}, measured 64 x 256", run, processors=5)
    for m, k, p in (
        (1, 1024, 0.0),
        (5, 520, 0.0),
        (33, 520, 0.1),
        (130, 1100, 0.0),
        (130, 1104, 0.1),
    ):
        yield Case(
            f"linear bf16/fp32 M{m} K{k} r16 p{p}, long sum", partial(linear, m, 96, k, 16, p=p)
        )
    every = ("x", "weight", "lora_A", "lora_B", "grad")
    for words, layouts in (
        ("W transposed", {"weight": "transposed"}), ("X transposed", {"x": "transposed"}), ("X shifted", {"x": "shifted"}),
        ("A and B transposed", {"lora_A": "transposed", "lora_B": "transposed"}), ("X every second", {"x": "every second"}),
        ("all wider", dict.fromkeys(every, "wider")), ("X one row", {"x": "expanded"}), ("dY one row", {"grad": "expanded"}),
    ):  # fmt: skip
        for m, p in ((33, 0.1), (130, 0.0), (130, 0.1)):
            yield Case(
                f"linear bf16/fp32 M{m} r16 p{p}, {words}",
                partial(linear, m, 96, 160, 16, p=p, layouts=layouts),
            )
    for name in every:
        for how in ("far rows", "far columns"):
            for strategy, m, r in (("auto", 33, 16), ("auto", 130, 16), ("branch_first", 130, 200)):
                run = partial(linear, m, 96, 160, r, p=0.1, layouts={name: how})
                words = f"linear {strategy} bf16/fp32 M{m} r{r} p0.1, {name} {how}"
                yield Case(words, run, strategy)
    for m in (33, 130):
        yield Case(
            f"linear bf16/fp32 M{m} N71 K67 r3 p0.1, odd sizes",
            partial(linear, m, 71, 67, 3, p=0.1),
        )
        yield Case(
            f"linear bf16/fp32 M{m} r16, no bias", partial(linear, m, 96, 160, 16, bias=False)
        )
    for wanted in (("lora_A",), ("lora_B",), ("x",), ("lora_A", "lora_B"), ()):
        words = "+".join(wanted) or "nothing"
        yield Case(
            f"linear bf16/fp32 M130 p0.1, wanted {words}",
            partial(linear, 130, 96, 160, 16, p=0.1, wanted=wanted),
        )
    for words, precision in (("fp32", "highest"), ("tf32", "high")):
        for m, n, k, r, p in ((5, 64, 96, 4, 0.1), (14, 96, 160, 16, 0.0), (130, 96, 160, 16, 0.1)):
            run = partial(linear, m, n, k, r, FP32, FP32, p)
            yield Case(f"linear {words} M{m} N{n} K{k} r{r} p{p}", run, precision=precision)
        for m in (33, 70):
            run = partial(linear, m, 72, 96, 16, FP32, FP32, 0.1)
            yield Case(f"linear one_launch {words} M{m}", run, "one_launch", precision=precision)
    for m, r, p, dtype in (
        (33, 16, 0.0, BF16),
        (130, 16, 0.1, BF16),
        (130, 16, 0.1, FP32),
        (130, 16, 0.0, FP16),
        (130, 100, 0.1, BF16),
    ):
        yield Case(
            f"branch {WORDS[dtype]} M{m} r{r} p{p}", partial(branch, m, 96, 160, r, dtype, p)
        )
    for m, p, dtype in ((33, 0.1, BF16), (130, 0.0, BF16), (130, 0.1, BF16), (130, 0.1, FP32)):
        yield Case(
            f"group {WORDS[dtype]} M{m} r16+8+4 p{p}",
            partial(group, m, (96, 64, 32), 64, (16, 8, 4), dtype, p),
        )
    for p in (0.0, 0.1):
        name = f"group split-K bf16 M66 N64+32+32 K1024 r16 p{p}"
        yield Case(name, partial(group, 66, (64, 32, 32), 1024, (16,) * 3, p=p))
    yield Case(
        "group bf16 M130 N64+64 r48 p0.1",
        partial(group, 130, (64, 64), 96, (48, 48), p=0.1),
    )
    for m, p, dtype in ((33, 0.1, BF16), (130, 0.0, BF16), (130, 0.1, BF16), (70, 0.1, FP32)):
        yield Case(
            f"mlp {WORDS[dtype]} M{m} r16+8+4 p{p}", partial(mlp, m, 96, 64, 80, dtype=dtype, p=p)
        )
    for activation in ACTIVATIONS:
        yield Case(
            f"mlp {activation} bf16 M130 p0.1",
            partial(mlp, 130, 96, 64, 80, p=0.1, activation=activation),
        )
    yield Case("mlp one_launch bf16 M130 p0.1", partial(mlp, 130, 96, 64, 80, p=0.1), "one_launch")
    yield Case(
        "mlp bf16 M130 p0.1, shared A", partial(mlp, 130, 96, 64, 80, (16,) * 3, p=0.1, shared=True)
    )
    yield Case(
        "mlp bf16 M130, branch at down alone", partial(mlp, 130, 96, 64, 80, (None, None, 16))
    )
    # One launch for gate and up; dA of down reads G and U in its own loop.
    yield Case(
        "mlp bf16 M130 r16 p0.0, 2 processors",
        partial(mlp, 130, 96, 64, 80, (16,) * 3),
        processors=2,
    )
    yield Case(
        "mlp bf16 M300 F520 p0.1, 2 processors",
        partial(mlp, 300, 520, 264, 160, (16,) * 3, p=0.1),
        processors=2,
    )
    for quantized in QUANTIZED:
        if quantized == "nf4 128 nested":
            continue
        for m, n, k, p in (
            (5, 64, 128, 0.0),
            (33, 96, 192, 0.1),
            (100, 96, 192, 0.1),
            (300, 64, 128, 0.1),
            (33, 90, 130, 0.1),
            (33, 90, 48, 0.1),
        ):
            # Unaligned rows, of 48 elements in NVFP4 and of 130 in the others.
            if not can_hold(quantized, k) or (k == 48 and can_hold(quantized, 130)):
                continue
            yield Case(
                f"{quantized} bf16 M{m} N{n} K{k} r16 p{p}",
                partial(linear, m, n, k, 16, p=p, quantized=quantized),
            )
        yield Case(
            f"{quantized} fp32 M14 r16",
            partial(linear, 14, 64, 128, 16, FP32, FP32, quantized=quantized),
        )
        yield Case(
            f"{quantized} fp16 M33 r16 p0.1",
            partial(linear, 33, 64, 128, 16, FP16, FP16, 0.1, quantized=quantized),
        )
    for tokens, vocabulary, dtype, reduction, softcap in (
        (7, 5000, BF16, "mean", None),
        (5, 4096, FP16, "none", 5.0),
        (3, 9001, FP32, "none", None),
        (4, 33, BF16, "sum", 30.0),
    ):
        yield Case(
            f"cross_entropy {WORDS[dtype]} M{tokens} V{vocabulary} {reduction} softcap {softcap}",
            partial(cross_entropy, tokens, vocabulary, dtype, reduction, softcap),
        )
    for tokens, vocabulary, dtype, softcap in (
        (5, 5000, BF16, None),
        (4, 4099, FP32, 5.0),
        (3, 33, FP16, None),
    ):
        yield Case(
            f"log_probs {WORDS[dtype]} M{tokens} V{vocabulary} softcap {softcap}",
            partial(cross_entropy, tokens, vocabulary, dtype, "none", softcap, entropy=True),
        )
    dynamic = {"lr": torch.tensor(1e-2), "shrink_ratio": torch.tensor(5e-4), "lr_ratio_B": 4.0}
    for words, run in (
        ("fp32", partial(optimizer, 3)), ("fp32, chunks", partial(optimizer, 3, [(16, 600, 700), (8, 24, 40)])),
        ("bf16", partial(optimizer, 3, dtype=BF16)), ("fp32, never latching", partial(optimizer, 2, stop_condition="never")),
        ("fp32, clipped, maximize", partial(optimizer, 2, max_grad_norm=0.1, maximize=True)),
        ("bf16, masters, clipped", partial(optimizer, 2, dtype=BF16, master_weights=True, max_grad_norm=0.1)),
        ("fp32, bf16 moments", partial(optimizer, 2, moments_dtype=BF16)), ("fp32, tensors", partial(optimizer, 2, **dynamic)),
        ("bf16, 8-bit moments", partial(optimizer, 2, dtype=BF16, moments_dtype=torch.uint8)),
        ("fp32, sharded", partial(optimizer, 3, way="sharded")), ("fp32, captured", partial(optimizer, 3, way="captured")),
        ("bf16, sharded", partial(optimizer, 3, dtype=BF16, way="sharded")),
        ("fp32, sharded, latching", partial(optimizer, 3, way="sharded", latching=True, lr=0.1)),
        ("fp32, sharded, clipped", partial(optimizer, 2, way="sharded", max_grad_norm=0.1)),
    ):  # fmt: skip
        yield Case(f"optimizer {words}", run)
    two_chunks = [(8, 600, 700), (3, 24, 40), (1, 7, 13)]
    for words, run in (
        ("fp32", partial(optimizer, 3, two_chunks, shrink=True, shrink_ratio=0.3, latching=True)),
        ("bf16", partial(optimizer, 3, two_chunks, BF16, shrink=True, shrink_ratio=0.3, latching=True)),
        ("fp32, sharded", partial(optimizer, 3, way="sharded", shrink=True, shrink_ratio=0.3)),
    ):  # fmt: skip
        yield Case(f"shrink {words}", run)
