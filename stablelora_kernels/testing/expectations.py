"""What the results of a :class:`Case` must be: by the reference in float64, by hand as a user
computes them, and by the analysis of their rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.ops.dropout import draw_keep, draw_seeds
from stablelora_kernels.reference import dropout_keep_ref, lora_branch_ref, lora_linear_ref
from stablelora_kernels.reference.lora import lora_mlp_ref
from stablelora_kernels.reference.rounding import (
    Arithmetic,
    Rounded,
    RoundedLayer,
    RoundedMLP,
)
from stablelora_kernels.testing.bounds import (
    MLP_SLOPES,
    SLOPES,
    Deviation,
    assert_no_worse,
    deviations,
)
from stablelora_kernels.testing.cases import (
    BF16,
    FP32,
    FP64,
    Case,
    Operands,
    Results,
    leaves,
    projections,
    results,
)
from stablelora_kernels.testing.inputs import dequantized_ref
from stablelora_kernels.testing.layers import as_rows, rounded_operand
from stablelora_kernels.utils.tensors import drop_share


def combined(case: Case, layer: Callable[[Tensor, int], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of a call whose projection ``i`` of an input is ``layer(input, i)``."""
    if case.op == "mlp":
        return (layer(ACTIVATIONS[case.activation].forward(layer(x, 0)) * layer(x, 1), 2),)
    return tuple(layer(x, i) for i in range(case.count))


def plain(weight: Any, dtype: torch.dtype) -> Tensor:
    """A weight in full."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    return (
        dequantized_ref(weight).to(weight.stored.data.device)
        if dtype == FP64
        else weight.dequantize(dtype)
    )


def by_hand(
    case: Case, operands: Operands, keeps: Sequence[Tensor | None], p: float
) -> tuple[Tensor, ...]:
    """The outputs as a user computes them, operator by operator in x's dtype."""
    loras: list[Any] = [*projections(case, operands)]

    def layer(x: Tensor, i: int) -> Tensor:
        lora, keep = loras[i], keeps[i]
        base = operands.get("base_out")
        if base is None:
            base = torch.nn.functional.linear(x, plain(lora.weight, x.dtype), lora.bias)
        if lora.lora_A is None:
            return base
        dropped = x if keep is None else x * keep.to(x.dtype) / (1 - p)
        branch = dropped @ lora.lora_A.to(x.dtype).T @ lora.lora_B.to(x.dtype).T
        return (base + branch * lora.scaling).to(base.dtype)

    return combined(case, layer, operands["x"])


def by_reference(
    case: Case, operands: Operands, keeps: Sequence[Tensor | None], p: float
) -> tuple[Tensor, ...]:
    """The outputs of ``stablelora_kernels.reference``, for operands in float64."""
    loras: list[Any] = [*projections(case, operands)]
    x, first = operands["x"], loras[0]
    if case.op == "branch":
        return (
            lora_branch_ref(
                operands["base_out"], x, first.lora_A, first.lora_B, first.scaling, keeps[0], p
            ),
        )
    layers: list[Any] = []
    for lora in loras:
        lora_A, lora_B = lora.lora_A, lora.lora_B
        if lora_A is None:
            lora_A = x.new_zeros(0, lora.weight.shape[1])
            lora_B = x.new_zeros(lora.weight.shape[0], 0)
        layers.append((lora.weight, lora.bias, lora_A, lora_B))
    scalings = [lora.scaling for lora in loras]
    if case.op == "mlp":
        return (lora_mlp_ref(x, layers, scalings, case.activation, keeps, p),)
    outputs = []
    for (weight, bias, lora_A, lora_B), scaling, keep in zip(layers, scalings, keeps, strict=True):
        outputs.append(lora_linear_ref(x, weight, bias, lora_A, lora_B, scaling, keep, p))
    return tuple(outputs)


# Of a result with more elements, eager's own error is no luck, and the analysis takes long.
MOST_ROUNDINGS = 2**21


class Expected(NamedTuple):
    """What one result must be, by the arguments of ``assert_no_worse``."""

    ref: Tensor
    baseline: Tensor
    # That of the arithmetic.
    dtype: torch.dtype
    rounding: Rounded | None
    slope: float

    def deviations(self, out: Tensor, name: str) -> list[Deviation]:
        return deviations(out, name=name, **self._asdict())

    def check(self, out: Tensor, name: str) -> list[Deviation]:
        """Raise AssertionError as :func:`assert_no_worse` does; return what was compared."""
        return assert_no_worse(out, name=name, **self._asdict())


def expectations(
    case: Case,
    operands: Operands,
    keep: Tensor | None = None,
    contiguous: bool = False,
    baseline: Results | None = None,
) -> dict[str, Expected]:
    """What each result of a call with these ``operands`` must be, by name: "Y0", and each gradient
    by its operand's, "x", "lora_A0" and "lora_B0".

    ``keep``: the dropout mask, if it is not that of a run of the case. ``contiguous``: eager
    PyTorch gets its operands so. ``baseline``: the results of another's code, which the call may
    not be worse than, in place of eager PyTorch's.
    """
    computed = as_computed(case, operands)
    keeps, p = masks(case, operands) if keep is None else ([keep], case.p)
    ref = oracle(case, computed, keeps, p)
    if baseline is None:
        eagers = changed(computed, lambda name, t: t.contiguous()) if contiguous else computed
        baseline = eager(case, eagers, keeps, p)
    elements = max(t.numel() for t in baseline.values())
    allowed = roundings(case, computed, keeps, p) if elements <= MOST_ROUNDINGS else {}
    slopes = MLP_SLOPES if case.op == "mlp" else SLOPES
    arithmetic = BF16 if case.autocast else case.dtype
    expected = {}
    for name, value in baseline.items():
        # Gradients are products in x's dtype; the output is rounded to base_out's.
        dtype = value.dtype if name.startswith("Y") else arithmetic
        expected[name] = Expected(ref[name], value, dtype, allowed.get(name), slopes[dtype])
    return expected


def next_keep(rows: int, width: int, p: float, backend: str, device: str) -> tuple[Tensor, float]:
    """The mask [rows, width] that a call draws next from torch's generator, and the probability
    that it is drawn with.
    """
    if backend != "triton":
        return draw_keep(torch.empty(rows, width, device=device), p)
    (seed,) = draw_seeds(torch.device(device), [p])
    return _keep_of(seed, rows, width, p), drop_share(p)


def _keep_of(seed: Tensor | None, rows: int, width: int, p: float) -> Tensor:
    """The mask [rows, width] that the kernels draw from ``seed``."""
    assert seed is not None
    return dropout_keep_ref(rows, width, p, int(seed[0])).to(seed.device)


def masks(case: Case, operands: Operands) -> tuple[list[Tensor | None], float]:
    """The dropout masks that a call must draw behind its seed, by projection, and the probability
    that they are drawn with.
    """
    keeps: list[Tensor | None] = []
    torch.manual_seed(case.seed)
    x, p = operands["x"], case.p
    drawn = [
        case.p if r is not None and case.training and not (case.shared and i == 1) else 0.0
        for i, r in enumerate(case.ranks)
    ]
    seeds: list[Tensor | None] = [None] * len(drawn)
    if case.backend == "triton":
        # A call draws the seeds of all its masks at once.
        seeds = draw_seeds(torch.device(case.device), drawn)
    for i, (seed, of_branch) in enumerate(zip(seeds, drawn, strict=True)):
        width = case.sizes[0] if case.op == "mlp" and i == 2 else x.shape[-1]
        shape = (*x.shape[:-1], width)
        if not of_branch:
            keeps.append(keeps[0] if case.shared and i == 1 else None)
        elif seed is not None:
            p = drop_share(of_branch)
            keeps.append(_keep_of(seed, x.shape[:-1].numel(), width, of_branch).view(shape))
        else:
            keep, p = draw_keep(torch.empty(shape, device=case.device), of_branch)
            keeps.append(keep)
    return keeps, p


def changed(operands: Operands, change: Callable[[str, Tensor], Tensor]) -> Operands:
    """``operands`` with ``change(name, t)`` for each tensor."""
    return {name: change(name, t) if isinstance(t, Tensor) else t for name, t in operands.items()}


def as_computed(case: Case, operands: Operands) -> Operands:
    """The values that the op computes with: under autocast, float32 A and B are cast on the fly,
    and base_out is left alone.
    """

    def cast(name: str, t: Tensor) -> Tensor:
        unchanged = name.startswith(("base_out", "grad")) or (
            name.startswith("lora_") and t.dtype == FP32
        )
        return t if unchanged else t.to(BF16)

    return changed(operands, cast) if case.autocast else operands


def eager(case: Case, operands: Operands, keeps: Sequence[Tensor | None], p: float) -> Results:
    """The results by hand, in x's dtype."""
    return called(case, operands, lambda leaf: by_hand(case, leaf, keeps, p))


def oracle(case: Case, operands: Operands, keeps: Sequence[Tensor | None], p: float) -> Results:
    """The results in float64, from the values of ``operands``."""
    wide = {name: None if t is None else plain(t, FP64) for name, t in operands.items()}
    return called(case, wide, lambda leaf: by_reference(case, leaf, keeps, p))


def roundings(
    case: Case, operands: Operands, keeps: Sequence[Tensor | None], p: float
) -> dict[str, Rounded]:
    """How far rounding may move each result, on any processor."""
    storage = arithmetic_of(case)
    arithmetic = Arithmetic(storage)
    loras: list[Any] = [*projections(case, operands)]
    layers = []
    for lora, keep in zip(loras, keeps, strict=True):
        weight, bias = rounded_operand(lora.weight, storage), rounded_operand(lora.bias, storage)
        lora_A = rounded_operand(lora.lora_A, storage)
        lora_B = rounded_operand(lora.lora_B, storage)
        layers.append(RoundedLayer(arithmetic, weight, bias, lora_A, lora_B, lora.scaling, keep, p))
    x = as_rows(operands["x"], storage)
    grads = {i: as_rows(operands[f"grad{i}"], storage) for i in case.outputs()}
    if case.op == "mlp":
        gate, up, down = layers
        mlp = RoundedMLP(gate, up, down, case.activation)
        outputs = {"Y0": mlp.forward(x)}
        gradients = mlp.backward(grads[2])
        dx = gradients[0]["x"]
    elif case.op == "branch":
        base = operands["base_out"]
        outputs = {"Y0": layers[0].forward(x, as_rows(base, base.dtype), base.dtype)}
        # The gradient of base_out is the incoming one.
        gradients = [layers[0].backward(grads[0])]
        outputs["base_out"] = as_rows(operands["grad0"], operands["grad0"].dtype)
        dx = gradients[0]["x"]
    else:
        outputs = {f"Y{i}": layer.forward(x) for i, layer in enumerate(layers)}
        gradients = [layer.backward(grads[i]) for i, layer in enumerate(layers)]
        of_x = [of_layer["x"] for of_layer in gradients]
        dx = arithmetic.total(of_x, [grads[i].exact.shape[1] for i in grads])
    if case.shared and "lora_A" in gradients[1]:
        of_a = [of_layer["lora_A"] for of_layer in gradients[:2]]
        gradients[0]["lora_A"] = arithmetic.total(of_a, [x.exact.shape[0]] * 2)
    named = {
        f"{name}{i}": t
        for i, of_layer in enumerate(gradients)
        for name, t in of_layer.items()
        if name != "x"
    }
    return outputs | named | {"x": dx}


def arithmetic_of(case: Case) -> torch.dtype:
    """The dtype that the products of a call are stored in."""
    # Below some rows autograd calls plain operators, which a backward inside autocast runs in
    # bfloat16.
    lowered = case.autocast or (case.backward_in_autocast and case.dtype != FP64)
    return BF16 if lowered else case.dtype


def called(case: Case, operands: Operands, call: Callable[[Operands], Sequence[Tensor]]) -> Results:
    """The results of ``call`` with leaves of ``operands``, without what a case does to the op's
    own.
    """
    leaf = leaves(case, operands)
    return results(case.but(in_place=False, backward_in_autocast=False), call(leaf), leaf)
