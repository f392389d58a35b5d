"""Every op in autograd's, torch.library's and torch.compile's own checks."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels import quantized, testing
from tests.helpers.case_checks import check_compiled
from tests.helpers.cases import ACTIVATIONS, DEVICE, FP64, OPS, Case, leaves, make, ours, small

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [3, 66])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ranks", [(2, 1, 2), (None, 2, None)], ids=str)
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp"])
def test_gradcheck(op, ranks, activation, rows, p):
    sizes = {"group": (2, 3, 2), "mlp": (4, 4, 2)}.get(op, (2,))
    ranks = ranks if op == "mlp" else (2, 1, 2)[: len(sizes)]
    case = Case(op, (rows, 3), sizes, ranks, FP64, FP64, p=p, backend="torch", activation=activation, seed=3)
    case = case.but(
        wanted=None if op == "mlp" else ["x", "base_out", "weight0", "bias0", "lora_A0", "lora_B0", "lora_A1"]
    )
    given = make(case)
    names = [name for name in case.wanted_names if name in given and given[name] is not None]

    def function(*tensors):
        torch.manual_seed(0)
        return ours(case, given | dict(zip(names, tensors, strict=True)))

    with slk.use_backend("torch"):
        assert torch.autograd.gradcheck(function, [leaves(case, given)[name] for name in names], fast_mode=op == "mlp")


@pytest.mark.covering(1)
@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.0), (70, 0.3)])
@pytest.mark.parametrize("op", [*OPS, "fp8", "shared"])
def test_torch_compile_has_no_graph_break(op, rows, p, backend):
    case = small("mlp" if op == "shared" else op, rows, p=p, shared=op == "shared")
    case = case.but(ranks=(6, 6, 4)) if case.shared else case
    given, names = make(case), case.wanted_names

    def function(*tensors):
        return ours(case, given | dict(zip(names, tensors, strict=True)))

    check_compiled(function, [given[name] for name in names], [given[f"grad{i}"] for i in case.outputs()])


def opchecks():
    """Each operator of the library with its arguments: with dropout and without, and for each gradient that may be wanted."""
    seed, library = torch.tensor([3], device=DEVICE), torch.ops.stablelora_kernels
    wanted = ((True, True, True), (True, False, False), (False, True, False), (False, False, True))
    for p, random in ((0.0, None), (0.3, seed)):
        rest = random, 1.7, p
        for op in ("linear", "branch", "nf4", "fp8"):
            given = make(small(op, 9))
            x, bias, a, b, grad = (given.get(name) for name in ("x", "bias0", "lora_A0", "lora_B0", "grad0"))
            s = torch.randn(9, 6, device=DEVICE)
            if op in ("nf4", "fp8"):
                stored = given["weight0"].stored
                forward, backward = library.lora_linear_quantized_fwd, library.lora_linear_quantized_bwd
                before, behind, needs = (
                    (x, *stored, bias, a, b),
                    (x, grad, *stored, a, b, s),
                    {need[:2] for need in wanted},
                )
            elif op == "linear":
                forward, backward, needs = library.lora_linear_fwd, library.lora_linear_bwd, wanted
                before, behind = (x, given["weight0"], bias, a, b), (x, grad, given["weight0"], a, b, s)
            else:
                forward, backward, needs = library.lora_branch_fwd, library.lora_branch_bwd, wanted
                before, behind = (given["base_out"], x, a, b), (x, grad, a, b, s)
            yield from ((forward, (*before, *rest, save_s)) for save_s in (True, False))
            yield from ((backward, (*behind, *rest, *need)) for need in sorted(needs))
        given = make(small("group"))
        lists = [[given[f"{kind}{i}"] for i in range(3)] for kind in ("grad", "weight", "bias", "lora_A", "lora_B")]
        rest = [seed] * 3 if p else [], [1.7] * 3, p
        s = [torch.randn(70, r, device=DEVICE) for r in (6, 3, 3)]
        yield library.lora_linear_group_fwd, (given["x"], *lists[1:], *rest)
        for need in wanted:
            yield library.lora_linear_group_bwd, (given["x"], *lists[:2], *lists[3:], s, *rest, *need)


def test_ops_pass_opcheck():
    for op, args in opchecks():
        torch.library.opcheck(op.default, args)


def test_the_mlps_op_passes_opcheck():
    case = small("mlp", 66, activation="gelu")
    given, library = make(case), torch.ops.stablelora_kernels
    weights, biases, *pairs = (
        [given[f"{kind}{i}"] for i in range(3)] for kind in ("weight", "bias", "lora_A", "lora_B")
    )
    stored = [testing.nf4_weight(40, 24, 64, True).stored, testing.fp8_weight(40, 24).stored, weights[2]]
    seeds = [torch.tensor([i], device=DEVICE) for i in range(3)]
    g, u, s, s_down = (torch.randn(66, width, device=DEVICE) for width in (40, 40, 9, 4))
    for given_weights, p, random, save, need in (
        (weights, 0.0, [None] * 3, True, (True, [True] * 3, [True] * 3)),
        (stored, 0.3, seeds, False, (False, [True, True, False], [False] * 3)),
    ):
        apart, rest = quantized.apart(given_weights), (random, list(case.scalings), p, "gelu")
        torch.library.opcheck(library.lora_mlp_fwd.default, (given["x"], *apart, biases, *pairs, *rest, save))
        datas, scales, layouts = apart
        read = [data if need[0] or i == 2 else None for i, data in enumerate(datas)]
        args = (given["x"], given["grad2"], g, u, read, scales, layouts, *pairs, s, s_down, *rest, *need)
        torch.library.opcheck(library.lora_mlp_bwd.default, args)
