"""Random calls of the layer's ops: layouts of every operand, dtypes, ranks, gradients, autocast, NaN, infinity.

Between an operand's elements lies NaN, so that a kernel which assumes a stride reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels.functional import lora_branch, lora_linear, lora_linear_group
from tests.helpers.inputs import BF16, DEVICE, DTYPES, Inputs

FP64 = torch.float64
SIZES = [1, 2, 3, 8, 16, 17, 24, 31, 40, 64]
# Up to the rows below which the PyTorch path calls plain operators, and above a tile.
ROWS = [0, 1, 2, 5, 17, 63, 64, 65, 130]
LAYOUTS = ["contiguous", "transposed", "wider", "every second", "shifted", "expanded", "negated"]
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "grad", "base_out")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` with other strides, and NaN in the gaps. "expanded" repeats its first row, or element, with stride 0.

    "negated": a view whose memory holds the values times -1, as that of a conjugate's imaginary part does.
    """
    if layout == "negated":
        return torch._neg_view(-t)
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t
    if layout == "contiguous":
        return t.contiguous()
    if layout == "transposed":
        return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 1 else t
    if layout == "shifted":
        flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype, device=t.device)
        return flat[1:].view(t.shape).copy_(t)
    step = 2 if layout == "every second" else 1
    gaps = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan, dtype=t.dtype, device=t.device)
    return gaps[..., 1 : 1 + step * t.shape[-1] : step].copy_(t)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A call's settings by name, in sizes that shrink to the smallest."""
    backend = draw(st.sampled_from(["torch", "triton"]))
    dtypes = draw(st.sampled_from([*DTYPES, (FP64, FP64)] if backend == "torch" else DTYPES))
    op = draw(st.sampled_from(["linear", "branch", "group", "nf4", "fp8"]))
    leading = draw(st.sampled_from([(), *[(rows,) for rows in ROWS], (3, 5), (2, 1, 33), (2, 0, 3)]))
    size = st.sampled_from(SIZES)
    wanted = st.sampled_from(["x", "lora_A", "lora_B", "bias", *(["base_out"] if op == "branch" else []), "weight"])
    return {
        "op": op,
        "backend": backend,
        "dtypes": dtypes,
        "leading": leading,
        "k": draw(size) * (2 if op == "nf4" else 1),
        "n": draw(size),
        "r": draw(st.sampled_from([1, 2, 3, 4, 8, 16, 17, 20, 33, 70])),
        "bias": draw(st.booleans()),
        "layouts": {name: draw(st.sampled_from(LAYOUTS)) for name in NAMES},
        "wanted": draw(st.sets(wanted)),
        "scaling": draw(st.sampled_from([1.0, 1.7, -0.3, 0.0, 64.0])),
        "p": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "autocast": draw(st.booleans()) and dtypes[0] != FP64,
        "backward_in_autocast": draw(st.booleans()),
        "kernel": draw(st.sampled_from(["auto", "chained", "split", "vendor"])),
        "members": draw(st.integers(1, 3)),
        "in_place": draw(st.booleans()),
        "broken": draw(st.one_of(st.none(), st.sampled_from(["x", "weight", "lora_A", "lora_B", "bias", "grad"]))),
        "value": draw(st.sampled_from([torch.nan, torch.inf, -torch.inf])),
        "seed": draw(st.integers(0, 99)),
    }


def inputs_of(c: dict[str, Any], member: int) -> Inputs:
    """One projection's inputs, laid out, with one element broken if the call asks for it."""
    (dtype, lora_dtype), shape = c["dtypes"], (*c["leading"], c["k"])
    n = c["n"] + 3 * member
    inputs: Inputs = testing.make_inputs(
        shape, n, c["r"], dtype=dtype, lora_dtype=lora_dtype, bias=c["bias"], device=DEVICE, seed=c["seed"] + member
    )
    if c["op"] == "branch":
        inputs["base_out"] = torch.nn.functional.linear(inputs["x"].double(), inputs.pop("weight").double()).to(dtype)
        inputs["bias"] = None
    inputs = {name: None if t is None else laid_out(t, c["layouts"][name]) for name, t in inputs.items()}
    if c["op"] == "nf4":
        inputs["weight"] = testing.nf4_weight(n, c["k"], 64, c["seed"] % 2 == 0)
    elif c["op"] == "fp8":
        inputs["weight"] = testing.fp8_weight(n, c["k"])
    target = inputs.get(c["broken"])
    # An expanded tensor has one element for many.
    if isinstance(target, Tensor) and target.numel() and c["layouts"][c["broken"]] != "expanded" and not c["p"]:
        target[(0,) * target.dim()] = c["value"]
    return inputs


def is_broken(members: list[Inputs]) -> bool:
    return any(isinstance(t, Tensor) and not t.isfinite().all() for inputs in members for t in inputs.values())


def compute(c: dict[str, Any], members: list[Inputs]) -> list[dict[str, Tensor]]:
    """Each projection's results by the package: Y and the gradients that are wanted, all in one backward."""
    given = []
    for inputs in members:
        leaf = {
            name: t.detach().requires_grad_(name in c["wanted"]) if isinstance(t, Tensor) and name != "grad" else t
            for name, t in inputs.items()
        }
        given.append(leaf | {"x": given[0]["x"]} if given else leaf)
    first = given[0]
    pair = first["lora_A"], first["lora_B"], c["scaling"], c["p"]
    with torch.autocast(DEVICE, BF16, enabled=c["autocast"]):
        if c["op"] == "branch":
            ys: Any = (lora_branch(first["base_out"], first["x"], *pair),)
        elif c["op"] == "group":
            lists = ([leaf[name] for leaf in given] for name in ("weight", "bias", "lora_A", "lora_B"))
            ys = lora_linear_group(first["x"], *lists, [c["scaling"]] * len(given), c["p"])
        else:
            ys = (lora_linear(first["x"], first["weight"], first["bias"], *pair),)
    results = [{"Y": y.detach().clone()} for y in ys]
    if not any(y.requires_grad for y in ys):
        return results
    grads = [inputs["grad"].to(y.dtype) for inputs, y in zip(members, ys, strict=True)]
    if c["in_place"]:
        # Its gradient is that of the output before.
        ys = [y.add_(1) for y in ys]
    with torch.autocast(DEVICE, BF16, enabled=c["backward_in_autocast"]):
        torch.autograd.backward(ys, grads)
    for leaf, found in zip(given, results, strict=True):
        for name in c["wanted"]:
            if isinstance(leaf.get(name), Tensor):
                found[name] = leaf[name].grad
    return results


def check_value(
    name: str, value: Tensor, ref: Tensor, eager: Tensor, absolute: Tensor, eps: float, broken: bool
) -> None:
    """A result is finite where eager PyTorch's is, and as near to float64 as twice eager's error and ``eps`` of ``absolute``."""
    assert value.shape == ref.shape, (name, value.shape, ref.shape)
    if not value.numel():
        return
    if broken:
        # Which of NaN and infinity comes out depends on the order of a sum.
        assert torch.equal(value.isfinite(), eager.isfinite()), f"{name} is finite elsewhere than eager's"
    # Eager PyTorch isn't finite either where oneDNN's AMX instructions read the gaps between bfloat16 rows of odd length.
    finite = ref.isfinite() & eager.isfinite()
    assert broken or bool(value.isfinite()[finite].all()), f"{name} is not finite"
    finite &= value.isfinite()
    if not finite.any():
        return
    error = (value.double() - ref)[finite].abs().max().item()
    allowed = 2 * (eager.double() - ref)[finite].abs().max().item() + eps * absolute[absolute.isfinite()].max().item()
    assert error <= allowed, f"{name} is off by {error:.3e}, allowed {allowed:.3e}"
