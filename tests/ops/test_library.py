"""Every op in torch.library's and torch.compile's own checks."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.case_checks import check_compiled
from tests.helpers.cases import BF16, OPS, make, ours, run, small

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.covering(1)
@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.0), (70, 0.3)])
@pytest.mark.parametrize("op", [*OPS, "fp8", "shared"])
def test_torch_compile_has_no_graph_break(op, rows, p, backend):
    case = small("mlp", rows, p=p, ranks=(6, 6, 4), shared=True) if op == "shared" else small(op, rows, p=p)
    given, names = make(case), case.wanted_names

    def function(*tensors):
        return ours(case, given | dict(zip(names, tensors, strict=True)))

    check_compiled(function, [given[name] for name in names], [given[f"grad{i}"] for i in case.outputs()])


class Library(TorchDispatchMode):
    """The library's operators that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stablelora_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


MIXED = small("mlp", shape=(260, 64), sizes=(16, 16, 8), dtype=BF16, quantized=("nf4 nested", "fp8", None))


@pytest.mark.covering(1)
@pytest.mark.parametrize(("p", "wanted"), [(0.0, None), (0.3, ["x", "lora_B"]), (0.3, ["lora_A"])])
@pytest.mark.parametrize("case", [*(small(op, 9) for op in (*OPS, "fp8")), MIXED], ids=str)
def test_every_operator_passes_opcheck(case, p, wanted):
    with Library() as library:
        run(case.but(p=p, wanted=wanted))
    assert len(library.calls) == 2
    for operator, arguments in library.calls:
        torch.library.opcheck(operator, arguments)
