"""``explain``: the launches of a call, and the reasons, without the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import backend, first_use, problem, rules
from stablelora_kernels.dispatch.backend import explain_backend
from stablelora_kernels.dispatch.first_use import OPERATORS
from stablelora_kernels.dispatch.problem import MAX_GROUP, Call, Device
from stablelora_kernels.ops.first_use import NOT_TIMED
from stablelora_kernels.ops.lora_linear.triton import lora_linear_bwd, lora_linear_fwd
from stablelora_kernels.ops.meta_calls import DTypes, linear_calls, rows_launches
from stablelora_kernels.ops.plans import PlannedOp
from stablelora_kernels.projection import BIASES
from stablelora_kernels.quantized import WEIGHTS, QuantizedWeight
from stablelora_kernels.utils.validation import check_float, check_int


class Step(NamedTuple):
    """One launch.

    Attributes:
        kernel: "lora_linear_tma", "lora_down", ...; "vendor" for the vendor's product.
        variant: the kernel's variant and its tile, in words.
        reason: the reason for the tile.
        grid: programs. Empty for the vendor's product, which chooses grid, warps and stages itself.
        num_warps: warps a program, or None.
        num_stages: depth of the main loop's pipeline, or None.
    """

    kernel: str
    variant: str
    reason: str
    grid: tuple[int, ...]
    num_warps: int | None
    num_stages: int | None


class Explanation(NamedTuple):
    """The answer of :func:`~stablelora_kernels.explain`. ``str()`` of it is for reading.

    Attributes:
        backend: "triton" or "torch".
        arch: the GPU, as "sm_90"; empty on the PyTorch backend.
        forward_strategy: "few_rows", "one_launch" or "branch_first"; "torch" on the PyTorch backend.
            With a quantized weight, "in_loop", or "dequantize, " and one of the others. For fused
            projections, "together: " or "apart: " and each one's. For the branch alone,
            "one_launch" or "two_launches". For several M, "by rows: " and "vendor" for the product
            of all rows, then each adapter's.
        forward_reason: the reason for that strategy.
        forward: its launches, a :class:`~stablelora_kernels.explanation.Step` each; empty on the
            PyTorch backend.
        backward_strategy: likewise for dX, dA and dB.
        backward_reason: the reason for that strategy.
        backward: its launches.
        backend_reason: the reason for the backend. It says so if the installed Triton is not proven
            for the GPU, and names the compute capability that a newer GPU is taken as.
    """

    backend: str
    arch: str
    forward_strategy: str
    forward_reason: str
    forward: tuple[Step, ...]
    backward_strategy: str
    backward_reason: str
    backward: tuple[Step, ...]
    backend_reason: str = ""

    def __str__(self) -> str:
        place = f" on {self.arch}" if self.arch else ""
        reason = f" ({self.backend_reason})" if self.backend_reason else ""
        lines = [f"backend {self.backend}{place}{reason}"]
        for name in ("forward", "backward"):
            lines.append(
                f"{name}: {getattr(self, name + '_strategy')} ({getattr(self, name + '_reason')})"
            )
            for number, step in enumerate(getattr(self, name), 1):
                how = (
                    f", grid {step.grid}, {step.num_warps} warps, {step.num_stages} stages"
                    if step.grid
                    else ""
                )
                lines.append(f"  {number}. {step.kernel} [{step.variant}]{how}: {step.reason}")
        return "\n".join(lines)


def explain(
    M: int | Sequence[int],
    N: int | Sequence[int],
    K: int,
    r: int | Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    dropout_p: float = 0.0,
    *,
    lora_dtype: torch.dtype | None = None,
    quantized: str | None = None,
    branch_only: bool = False,
    device: torch.device | str | None = None,
) -> Explanation:
    """The launches of ``lora_linear`` on [M, K] rows with a [N, K] weight, forward and backward
    with all three gradients.

    With ``branch_only``, those of ``lora_branch``: onto a product that another layer has computed,
    whose launches are not listed. Forced strategies do not affect these.

    The op's own planner makes the list, on tensors without memory; nothing runs and no GPU is
    needed. The list holds for contiguous tensors at addresses that are multiples of 16 bytes;
    others take the kernels that read through pointers. On a GPU of this machine it is what first
    use has found there for such a call, if there was one; the reason then has the times.

    Args:
        M: rows of x, its leading sizes flattened. Several numbers are the rows of several adapters,
            as :func:`~stablelora_kernels.adapters_of_rows` computes them.
        N: output features. Several sizes are projections of one x, as ``fuse_projections`` computes
            them.
        K: input features.
        r: rank; with several M also several, one for each.
        dtype: of x and the weight.
        dropout_p: the probability of dropping an element, in [0, 1).
        lora_dtype: of lora_A and lora_B; float32 by default, as for
            :class:`~stablelora_kernels.LoRALinear`.
        quantized: None, ``"nf4"`` (blocks of 64 with nested scales, bitsandbytes' default),
            ``"fp8"``, ``"nvfp4"`` or ``"mxfp4"``.
        branch_only: the branch alone, which reads no weight.
        device: a torch device, or the name of any GPU, present or not: ``"sm_80"``, ``"sm_90"``,
            ``"gfx942"``, ... By default the current GPU, or the CPU if there is none.

    Raises:
        ValueError: a size below 1 (M may be 0), a dropout_p outside [0, 1), an unknown device, a
            forced strategy that can't do this call, ``quantized`` together with ``branch_only``, or
            several M together with several N or ``quantized``.
        TypeError: a size that is no int, or a dtype that the kernels do not compute in.
        RuntimeError: the Triton backend is forced and can't run, or a GPU is named and Triton can't
            be used.
    """
    ns = tuple(N) if isinstance(N, Sequence) else (N,)
    lora_dtype = torch.float32 if lora_dtype is None else lora_dtype
    if isinstance(N, Sequence):
        _check_several(N, quantized, branch_only)
    ms = _row_counts(M, N, quantized)
    ranks = _ranks(r, ms, is_one=isinstance(M, int))
    for m, rank in zip(ms, ranks, strict=True):
        _check_sizes(m, ns, K, rank, dropout_p)
    _check_dtypes(dtype, lora_dtype)
    _check_weight(quantized, branch_only)
    machine = _machine(device)
    gpu = machine.gpu
    if gpu is None:
        why = "the backend is PyTorch's operators; device='sm_90' lists an H100's launches"
        return Explanation("torch", "", "torch", why, (), "torch", why, (), machine.reason)
    if not isinstance(M, int):
        return _by_rows(
            gpu, ms, ns[0], K, ranks, (dtype, lora_dtype), dropout_p, branch_only, machine.reason
        )
    weight: str | QuantizedWeight = "plain"
    if branch_only:
        weight = "none"
    elif quantized is not None:
        weight = WEIGHTS[quantized](ns[0], K, "meta")
    dtypes = (dtype, lora_dtype)
    calls = linear_calls(M, ns, K, ranks[0], dtypes, dropout_p, weight)
    dropout = dropout_p > 0
    forwards = [Call("forward", M, n, K, ranks[0], dtype, lora_dtype, dropout) for n in ns]
    backwards = [Call("backward", M, K, n, ranks[0], dtype, lora_dtype, dropout) for n in ns]
    forward = _planned(lora_linear_fwd, machine, calls.forward, _strategy(forwards, weight))
    backward = _planned(lora_linear_bwd, machine, calls.backward, _strategy(backwards, weight))
    return Explanation(
        backend="triton",
        arch=gpu.arch,
        forward_strategy=forward.strategy.words,
        forward_reason=forward.strategy.reason,
        forward=forward.steps,
        backward_strategy=backward.strategy.words,
        backward_reason=backward.strategy.reason,
        backward=backward.steps,
        backend_reason=machine.reason,
    )


def _without_biases(operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    others = [*operands]
    others[BIASES] = [None for _ in others[BIASES]]
    return others


class _Planned(NamedTuple):
    strategy: _Strategy
    steps: tuple[Step, ...]


def _planned(
    op: PlannedOp[Any, Any], machine: _Machine, call: Any, strategy: _Strategy
) -> _Planned:
    """The launches of a call: the table's, by ``strategy``, or those that first use has found to be
    faster on this machine.
    """
    assert machine.gpu is not None
    choice = None
    if machine.here is not None and first_use.is_on(machine.here):
        # A layer without a bias is another kind of call.
        for of_kind in (call, call._replace(operands=_without_biases(call.operands))):
            decision = op.known(machine.here, of_kind)
            if decision.reason == NOT_TIMED:
                continue
            if decision.strategy == OPERATORS:
                return _Planned(_Strategy(OPERATORS, decision.reason), ())
            choice = decision.choice
            words = strategy.words if choice is None else choice.strategy
            strategy = _Strategy(words, decision.reason)
            break
    launches = op.plan(machine.gpu, call, choice)[1]
    return _Planned(strategy, tuple(map(_step, launches)))


def _row_counts(
    m: int | Sequence[int], n: int | Sequence[int], quantized: str | None
) -> tuple[int, ...]:
    """Each adapter's rows, or those of the only one."""
    if not isinstance(m, Sequence):
        return (m,)
    if not m:
        raise ValueError("M must be one number of rows, or one for each adapter, got none")
    if isinstance(n, Sequence):
        raise ValueError(f"N must be one size for several M, which are not fused, got {n}")
    if quantized is not None:
        raise ValueError(
            f"quantized must be None for several M, got {quantized!r}: the layer computes its own product, as with branch_only"
        )
    return tuple(m)


def _ranks(r: int | Sequence[int], ms: Sequence[int], is_one: bool) -> tuple[int, ...]:
    """Each adapter's rank."""
    if not isinstance(r, Sequence):
        return (r,) * len(ms)
    if is_one or len(r) != len(ms):
        rows = ms[0] if is_one else [*ms]
        raise ValueError(f"r must be one rank, or one for each of several M, got {r} for M {rows}")
    return tuple(r)


def _by_rows(
    gpu: Device, ms: Sequence[int], n: int, k: int, ranks: Sequence[int], dtypes: DTypes, dropout_p: float,
    branch_only: bool, backend_reason: str,
) -> Explanation:  # fmt: skip
    """:func:`explain` of several adapters, each on rows of its own."""
    forward, backward = rows_launches(gpu, ms, n, k, ranks, dtypes, dropout_p, branch_only)
    dtype, lora_dtype = dtypes
    strategies: dict[str, _Strategy] = {}
    for direction, columns, inner in (("forward", n, k), ("backward", k, n)):
        chosen = [
            rules.choose_branch(
                Call(direction, m, columns, inner, r, dtype, lora_dtype, dropout_p > 0)
            )
            for m, r in zip(ms, ranks, strict=True)
        ]
        words = [] if branch_only else ["vendor"]
        words += [branch.strategy for branch in chosen]
        reasons = dict.fromkeys(branch.reason for branch in chosen)
        reason = (
            f"one product for all rows, then each adapter's branch on its own: {'; '.join(reasons)}"
        )
        strategies[direction] = _Strategy(f"by rows: {', '.join(words)}", reason)
    return Explanation(
        backend="triton",
        arch=gpu.arch,
        forward_strategy=strategies["forward"].words,
        forward_reason=strategies["forward"].reason,
        forward=tuple(map(_step, forward)),
        backward_strategy=strategies["backward"].words,
        backward_reason=strategies["backward"].reason,
        backward=tuple(map(_step, backward)),
        backend_reason=backend_reason,
    )


def _check_several(ns: Sequence[int], quantized: str | None, branch_only: bool) -> None:
    """Raise ValueError unless ``ns`` may be projections of one x."""
    if not 2 <= len(ns) <= MAX_GROUP:
        raise ValueError(f"N must be one size or 2 to {MAX_GROUP}, got {ns}")
    if quantized is not None:
        raise ValueError(f"quantized must be None for several N, got {quantized!r}")
    if branch_only:
        raise ValueError(f"branch_only must be False for several N, got {branch_only!r}")


def _check_sizes(m: int, ns: Sequence[int], k: int, r: int, dropout_p: float) -> None:
    check_int("M", m, minimum=0)
    for n in ns:
        check_int("N", n, minimum=1)
    check_int("K", k, minimum=1)
    check_int("r", r, minimum=1)
    check_float("dropout_p", dropout_p, low=0.0, high=1.0)


def _check_dtypes(dtype: torch.dtype, lora_dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"dtype must be torch.bfloat16, torch.float16 or torch.float32, which the kernels compute in, got {dtype!r}"
        )
    if lora_dtype not in (dtype, torch.float32):
        raise TypeError(f"lora_dtype must be float32 or dtype {dtype}, got {lora_dtype}")


def _check_weight(quantized: str | None, branch_only: bool) -> None:
    if quantized is not None and quantized not in WEIGHTS:
        formats = ", ".join(map(repr, WEIGHTS))
        raise ValueError(f"quantized must be {formats} or None, got {quantized!r}")
    if quantized is not None and branch_only:
        raise ValueError(
            f"quantized must be None where branch_only is true, which reads no weight, got {quantized!r}"
        )


class _Strategy(NamedTuple):
    """The strategy of a call in words, and its reason."""

    words: str
    reason: str


def _strategy(calls: Sequence[Call], weight: str | QuantizedWeight) -> _Strategy:
    """The strategy of a forward or a backward, or those of fused projections; ``weight`` as for
    :func:`~stablelora_kernels.ops.meta_calls.linear_calls`.
    """
    call = calls[0]
    if weight == "none":
        branch = rules.choose_branch(call)
        return _Strategy(branch.strategy, branch.reason)
    choices = [rules.choose(call) for call in calls]
    if len(calls) > 1:
        sharing = rules.choose_group(calls)
        how = "together" if sharing.shared else "apart"
        strategies = ", ".join(choice.strategy for choice in choices)
        return _Strategy(f"{how}: {strategies}", sharing.reason)
    product = choices[0]
    if isinstance(weight, str):
        return _Strategy(product.strategy, product.reason)
    layout = weight.stored.layout
    reading = rules.choose_quantized(call, layout.bits, layout.aligned)
    if reading.strategy == "in_loop":
        return _Strategy(reading.strategy, reading.reason)
    return _Strategy(
        f"{reading.strategy}, {product.strategy}", f"{reading.reason}; then {product.reason}"
    )


class _Machine(NamedTuple):
    """The GPU, or None if PyTorch's operators would run, and the reason for the backend."""

    gpu: Device | None
    reason: str
    # The device, if it is one of this machine.
    here: torch.device | None = None


def _machine(device: torch.device | str | None) -> _Machine:
    """What ``device`` is."""
    if isinstance(device, str) and device in problem.DEVICES:
        if backend.TRITON_PROBLEM is not None:
            raise RuntimeError(
                f"device={device!r} asks for launches of Triton kernels, but {backend.TRITON_PROBLEM}"
            )
        gpu = problem.DEVICES[device]
        return _Machine(gpu, _reason_if_named(gpu))
    try:
        here = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        here = None
    if here is None or (here.type == "cuda" and (here.index or 0) >= torch.cuda.device_count()):
        known = ", ".join(f"{arch!r} ({names})" for arch, names in problem.GPU_NAMES.items())
        raise ValueError(
            f"device must be a device of this machine, as 'cpu', or a GPU by its kind, {known}; got {device!r}"
        )
    answer = explain_backend(here)
    gpu_here = problem.device_of(here) if answer.backend == "triton" else None
    return _Machine(gpu_here, answer.reason, here)


def _reason_if_named(gpu: Device) -> str:
    """The reason for listing Triton's launches on a GPU that need not be here."""
    if not gpu.nvidia:
        return ""
    verdict = backend.judge(divmod(gpu.generation, 10), backend.TRITON_VERSION)
    if not verdict.problem:
        return ""
    return (
        f"as named, but 'auto' would take PyTorch's operators: {verdict.problem}; {verdict.remedy}"
    )


def _step(launch: Any) -> Step:
    if not hasattr(launch, "kernel"):
        return Step("vendor", launch.variant, launch.reason, (), None, None)
    name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    return Step(name, launch.variant, launch.reason, launch.grid, **launch.options)
