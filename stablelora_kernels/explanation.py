"""Which launches a call of ``lora_linear`` or ``lora_branch`` takes, and why, without making it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stablelora_kernels.dispatch import autotune, backend, problem, rules
from stablelora_kernels.dispatch.problem import MAX_GROUP, Call, Device
from stablelora_kernels.utils.validation import check_float, check_int


class Step(NamedTuple):
    """One launch.

    Attributes:
        kernel: "lora_linear_tma", "lora_shrink", ...; "vendor" for the vendor's product.
        variant: what the kernel does here and its tile, in words.
        reason: why that tile.
        grid: programs. Empty for the vendor's product, which chooses this, warps and stages for itself.
        num_warps: warps a program, or None.
        num_stages: steps of the main loop that are on their way at once, or None.
    """

    kernel: str
    variant: str
    reason: str
    grid: tuple[int, ...]
    num_warps: int | None
    num_stages: int | None


class Explanation(NamedTuple):
    """What :func:`~stablelora_kernels.explain` found. ``str()`` of it is made for reading.

    Attributes:
        backend: "triton" or "torch".
        arch: the GPU, as "sm_90"; empty on the PyTorch backend.
        forward_kernel: "fused", "split" or "vendor"; "torch" on the PyTorch backend. With a quantized weight "in_loop", or
            "dequantize, " before one of the others. Of projections that share x, "together: " or "apart: " and each. Of the
            branch alone "fused" where S, or dS, is computed within its launch, and "split" otherwise.
        forward_reason: why.
        forward: its launches, a :class:`~stablelora_kernels.explain.Step` each; empty on the PyTorch backend.
        backward_kernel: likewise for dX, dA and dB.
        backward_reason: why.
        backward: its launches.
    """

    backend: str
    arch: str
    forward_kernel: str
    forward_reason: str
    forward: tuple[Step, ...]
    backward_kernel: str
    backward_reason: str
    backward: tuple[Step, ...]

    def __str__(self) -> str:
        lines = [f"backend {self.backend}" + (f" on {self.arch}" if self.arch else "")]
        for name in ("forward", "backward"):
            lines.append(f"{name}: {getattr(self, name + '_kernel')} ({getattr(self, name + '_reason')})")
            for number, step in enumerate(getattr(self, name), 1):
                how = f", grid {step.grid}, {step.num_warps} warps, {step.num_stages} stages" if step.grid else ""
                lines.append(f"  {number}. {step.kernel} [{step.variant}]{how}: {step.reason}")
        return "\n".join(lines)


def explain(
    M: int,
    N: int | Sequence[int],
    K: int,
    r: int,
    dtype: torch.dtype = torch.bfloat16,
    dropout_p: float = 0.0,
    *,
    lora_dtype: torch.dtype | None = None,
    quantized: str | None = None,
    branch_only: bool = False,
    device: torch.device | str | None = None,
    quantised: str | None = None,
) -> Explanation:
    """The launches of ``lora_linear`` on [M, K] rows with a [N, K] weight, forward and backward with all three gradients.

    With ``branch_only`` those of ``lora_branch``: on a product that some other layer has computed, whose own launches are
    not listed. Neither autotuning nor a kernel that is forced bears on these.

    The list is made by the code that launches, on tensors without memory; nothing runs and no GPU is needed. It holds for
    contiguous tensors at addresses that are multiples of 16 bytes; others take the kernels that read through pointers. Where
    autotuning is on the table's answer is given, and the reasons say that a measurement may replace it.

    Args:
        M: rows of x, its leading sizes flattened.
        N: output features. Several are projections that share x, as ``fuse_projections`` computes them.
        K: input features.
        r: rank.
        dtype: of x and the weight.
        dropout_p: the probability of dropping an element, in [0, 1).
        lora_dtype: of lora_A and lora_B, float32 unless given, as for :class:`~stablelora_kernels.LoRALinear`.
        quantized: None, ``"nf4"`` (blocks of 64 with nested scales, bitsandbytes' usual) or ``"fp8"``.
        branch_only: of the branch alone, for which no weight is read.
        device: a torch device, or the name of a GPU that need not be there: ``"sm_80"``, ``"sm_90"``, ``"gfx942"``, ... The
            current GPU unless given, and the CPU where there is none.
        quantised: another spelling of ``quantized``.

    Raises:
        ValueError: a size below 1 (M may be 0), a dropout_p outside [0, 1), an unknown GPU, a kernel that is forced and can't do
            this call, or ``quantized`` beside ``branch_only``.
        TypeError: sizes that are no ints, or dtypes that the kernels do not compute in.
        RuntimeError: the Triton backend was forced where it can't run.
    """
    quantized = quantized if quantized is not None else quantised
    several = isinstance(N, Sequence)
    ns = tuple(N) if isinstance(N, Sequence) else (N,)
    if several and not 2 <= len(ns) <= MAX_GROUP:
        raise ValueError(f"N must be one size or 2 to {MAX_GROUP}, got {N}")
    for name, value, low in (("M", M, 0), *(("N", n, 1) for n in ns), ("K", K, 1), ("r", r, 1)):
        check_int(name, value, minimum=low)
    check_float("dropout_p", dropout_p, low=0.0, high=1.0)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"dtype must be bfloat16, float16 or float32, which the kernels compute in, got {dtype}")
    lora_dtype = torch.float32 if lora_dtype is None else lora_dtype
    if lora_dtype not in (dtype, torch.float32):
        raise TypeError(f"lora_dtype must be float32 or dtype {dtype}, got {lora_dtype}")
    if quantized not in (None, "nf4", "fp8"):
        raise ValueError(f"quantized must be 'nf4', 'fp8' or None, got {quantized!r}")
    for name, given in (("quantized", quantized), ("branch_only", branch_only or None)):
        if several and given is not None:
            raise ValueError(f"{name} must be {'None' if name == 'quantized' else False} for several N, got {given!r}")
    if quantized is not None and branch_only:
        raise ValueError(f"quantized must be None where branch_only is true, which reads no weight, got {quantized!r}")
    gpu = _gpu(device)
    if gpu is None:
        why = f"the backend is {backend.get_backend()!r}, which on a CPU means PyTorch's operators"
        return Explanation("torch", "", "torch", why, (), "torch", why, ())
    if several:
        return _explain_group(gpu, M, ns, K, r, dtype, lora_dtype, dropout_p)
    from stablelora_kernels.launch.dry_run import branch_launches, call_launches, quantized_launches

    (n,) = ns
    calls = _calls(M, n, K, r, dtype, lora_dtype, dropout_p)
    if quantized is not None:
        forward, backward = quantized_launches(gpu, M, n, K, r, dtype, lora_dtype, dropout_p, quantized)
        (y, y_reason), (dx, dx_reason) = (_quantized_choice(gpu, call, quantized) for call in calls)
        return Explanation("triton", gpu.arch, y, y_reason, _steps(forward), dx, dx_reason, _steps(backward))
    if branch_only:
        forward, backward = branch_launches(gpu, M, n, K, r, dtype, lora_dtype, dropout_p)
        (y, y_reason), (dx, dx_reason) = _branch_reasons(forward, calls)
        return Explanation("triton", gpu.arch, y, y_reason, _steps(forward), dx, dx_reason, _steps(backward))
    forward, backward = call_launches(gpu, M, n, K, r, dtype, lora_dtype, dropout_p)
    # A kernel that is forced is not measured against others.
    tuned = autotune.get_autotune() and rules.get_kernel() == "auto"
    note = "; autotuning is on and may replace this by what it measures" if tuned else ""
    (y, y_reason, _), (dx, dx_reason, _) = (rules.choose(gpu, call) for call in calls)
    return Explanation("triton", gpu.arch, y, y_reason + note, _steps(forward), dx, dx_reason + note, _steps(backward))


def _calls(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, dropout_p: float
) -> tuple[Call, Call]:
    """The forward's and the backward's."""
    rest = (r, dtype, lora_dtype, dropout_p > 0)
    return Call("forward", m, n, k, *rest), Call("backward", m, k, n, *rest)


def _explain_group(
    gpu: Device,
    m: int,
    ns: Sequence[int],
    k: int,
    r: int,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    dropout_p: float,
) -> Explanation:
    """The launches for projections that share x."""
    from stablelora_kernels.launch.dry_run import group_launches

    launches = group_launches(gpu, m, ns, k, r, dtype, lora_dtype, dropout_p)
    members = [_calls(m, n, k, r, dtype, lora_dtype, dropout_p) for n in ns]
    words: list[Any] = []
    for calls, made in zip(zip(*members, strict=True), launches, strict=True):
        choices = [rules.choose(gpu, call) for call in calls]
        sharing = rules.choose_group(calls, choices)
        kernels = ", ".join(choice.kernel for choice in choices)
        words += [f"{'together' if sharing.shared else 'apart'}: {kernels}", sharing.reason, _steps(made)]
    return Explanation("triton", gpu.arch, *words)


def _quantized_choice(gpu: Device, call: Call, quantized: str) -> tuple[str, str]:
    """The kernel and the reason for a call with a quantized weight."""
    choice = rules.choose_quantized(gpu, call, 4 if quantized == "nf4" else 8)
    if choice.kernel == "in_loop":
        return choice.kernel, choice.reason
    then = rules.choose(gpu, call)
    return f"{choice.kernel}, {then.kernel}", f"{choice.reason}; then {then.reason}"


def _branch_reasons(forward: list[Any], calls: Sequence[Call]) -> tuple[tuple[str, str], tuple[str, str]]:
    """What the branch's forward and backward are called, and why."""
    most = problem.MAX_FUSED_R
    if len(forward) < 2:
        y = "fused", f"up to rank {most}, S is computed within the launch that adds the branch"
    elif calls[0].r > most:
        y = "split", f"a rank above {most}: S first, in a launch of its own"
    else:
        y = "split", "dropout: S first, or every program that shares a row's columns would draw the mask anew"
    if rules.branch_fuses(calls[1]):
        dx = "fused", f"up to {problem.SMALL_M} rows and rank {most}: dS within dX's launch, then dA and dB in one"
    else:
        dx = "split", "many rows or a high rank: dS with dB, in one pass over dY, then dX, then dA"
    return y, dx


def _gpu(device: torch.device | str | None) -> Device | None:
    """The GPU that is meant, or None where PyTorch's operators would run."""
    if isinstance(device, str) and device.startswith(("sm_", "gfx")):
        if device not in problem.DEVICES:
            raise ValueError(f"device must be a torch device or one of {', '.join(problem.DEVICES)}, got {device!r}")
        return problem.DEVICES[device]
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return problem.device_of(device) if backend.resolve_backend(device) == "triton" else None


def _steps(launches: list[Any]) -> tuple[Step, ...]:
    steps = []
    for launch in launches:
        if hasattr(launch, "kernel"):
            name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            options = launch.options
            steps.append(
                Step(name, launch.variant, launch.reason, launch.grid, options["num_warps"], options["num_stages"])
            )
        else:
            steps.append(Step("vendor", launch.variant, launch.reason, (), None, None))
    return tuple(steps)
