"""Every op in torch.library's and torch.compile's own checks."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.case_checks import check_compiled
from tests.helpers.cases import BF16, OPS, make, ours, run, small
from tests.helpers.operators import Operators

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


MIXED = small("mlp", shape=(260, 64), sizes=(16, 16, 8), dtype=BF16, quantized=("nf4 nested", "fp8", None))


@pytest.mark.covering(1)
@pytest.mark.parametrize(("p", "wanted"), [(0.0, None), (0.3, ["x", "lora_B"]), (0.3, ["lora_A"])])
@pytest.mark.parametrize("case", [*(small(op, 9) for op in (*OPS, "fp8")), MIXED], ids=str)
def test_every_operator_passes_opcheck(case, p, wanted):
    with Operators() as operators:
        run(case.but(p=p, wanted=wanted))
    calls = [call for call in operators.calls if call[0].namespace == "stablelora_kernels"]
    assert len(calls) == 2
    for operator, arguments, _ in calls:
        torch.library.opcheck(operator, arguments)
