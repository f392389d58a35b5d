"""The count of bytes and launches: its formulas against the operators that PyTorch runs and the tensors of our
launches, its least times, and its table.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.arms import FROZEN, OURS, PEFT, PLAIN, adapt
from benchmarks.lab import arithmetic
from benchmarks.lab.arithmetic import ARMS, H100, LAYERS, Gpu, Launch, Layer

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="runs where Triton is installed, for launch plans: Linux on x86-64 and aarch64",
)
# No size divides another.
SMALL = Layer("a small layer", n=40, k=24, m=7, r=3)


class Counted(NamedTuple):
    """One operator."""

    moved: int
    multiplied: int


class Counter(TorchDispatchMode):
    """Counts operators that move something: not views, nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Counted] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if operator.is_view or name == "empty_like":
            return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        # It does not read what it overwrites.
        read = [] if name == "bernoulli_" else given
        multiplied = 0
        if name in ("mm", "addmm_"):
            left, right = given[-2:]
            multiplied = left.shape[0] * left.shape[1] * right.shape[1]
        self.operators.append(Counted(sum(t.nbytes for t in read + made), multiplied))
        return result


def counted(arm: str, layer: Layer, dropout: bool) -> list[list[Counted]]:
    """The operators of a layer's forward, and of its backward."""
    with torch.device("meta"):
        linear = nn.Linear(layer.k, layer.n, bias=False, dtype=torch.bfloat16)
        x = torch.empty(layer.m, layer.k, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.empty(layer.m, layer.n, dtype=torch.bfloat16)
    model = nn.ModuleDict({"q_proj": linear}).requires_grad_(False)
    p = 0.1 if dropout else 0.0
    model = adapt(model, arm, ["q_proj"], r=layer.r, dropout=p, float32=False).train()
    module = next(each for name, each in model.named_modules() if name.endswith("q_proj"))
    with Counter() as forward:
        y = module(x)
    with Counter() as backward:
        y.backward(dy)
    return [forward.operators, backward.operators]


@pytest.mark.parametrize(
    ("arm", "dropout"),
    [(FROZEN, False), *((arm, dropout) for arm in (PEFT, PLAIN) for dropout in (False, True))],
)
@pytest.mark.parametrize("layer", [SMALL, LAYERS[3]], ids=lambda layer: layer.name)
def test_each_launch_is_an_operator_that_pytorch_runs(arm, dropout, layer, monkeypatch):
    """With PyTorch's operator for dropout on a GPU, whose mask is bool."""
    drop = torch.native_dropout
    monkeypatch.setattr(
        nn.functional,
        "dropout",
        lambda x, p=0.5, training=True, inplace=False: drop(x, p, training)[0],
    )
    ways = arithmetic.launches(arm, dropout)
    for way, operators in zip(ways, counted(arm, layer, dropout), strict=True):
        listed = [
            (arithmetic.bytes_of(each, layer, dropout), arithmetic.multiplies_of(each, layer))
            for each in way
        ]
        assert sorted(listed) == sorted(operators)
    forward, backward = counted(arm, layer, dropout)
    assert arithmetic.launch_counts(arm, layer, dropout) == [len(forward), len(backward)]


# Of a launch: counters, the seed, and the sums that programs share.
LEFT_OUT = ("chain", "tickets", "seed", "shared")


@needs_triton
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_our_launches_take_the_tensors_of_the_formula(layer: Layer, dropout: bool) -> None:
    """Each of the launch's tensors is read or written once, under each name that it has there."""
    from benchmarks.lab.gpu import parts
    from stablelora_kernels.dispatch.problem import DEVICES

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    shape = parts.Shape(layer.m, layer.n, layer.k, layer.r, 0.1 if dropout else 0.0)
    launches = parts.launches(DEVICES["sm_90"], parts.calls(shape, empty))
    names = parts.ONE_LAUNCH, parts.ONE_LAUNCH_BACKWARD
    for name, expected in zip(names, arithmetic.moved(OURS, layer, dropout), strict=True):
        taken = left_out = 0
        for argument, value in launches[name].named.items():
            tensor = getattr(value, "base", value)
            if not isinstance(tensor, Tensor):
                continue
            if {*argument.split(".")} & {*LEFT_OUT}:
                left_out += 2 * tensor.nbytes
            else:
                taken += tensor.nbytes
        assert taken == expected and left_out < 0.02 * expected


@pytest.mark.parametrize("layer", [SMALL, *LAYERS], ids=lambda layer: layer.name)
def test_every_lora_layer_has_the_same_multiply_adds(layer: Layer) -> None:
    n, k, m, r = layer[1:]
    assert arithmetic.multiplied(FROZEN, layer) == [m * n * k] * 2
    expected = [m * n * k + m * r * (n + k), m * n * k + 2 * m * r * (n + k)]
    for arm in (PEFT, PLAIN, OURS):
        assert arithmetic.multiplied(arm, layer) == expected


def test_a_launch_takes_at_least_the_longer_of_its_two_times(monkeypatch) -> None:
    for arm in ARMS:
        moved = sum(arithmetic.moved(arm, SMALL, True))
        operations = 2 * sum(arithmetic.multiplied(arm, SMALL))
        slow_memory = Gpu("slow memory", operations=1e30, bandwidth=10.0)
        slow_units = Gpu("slow units", operations=10.0, bandwidth=1e30)
        for gpu, expected in ((slow_memory, moved / 10), (slow_units, operations / 10)):
            found = arithmetic.least_seconds(arm, SMALL, True, gpu)
            assert found == pytest.approx(expected, rel=1e-9)
    # X has 336 bytes, and MNK is 6,720: the first takes 336 s, the second 13,440 s.
    pair = arithmetic.Arm((Launch("moves", "X"),), (Launch("multiplies", "X", "MNK"),))
    monkeypatch.setitem(ARMS, FROZEN, pair)
    assert arithmetic.least_seconds(FROZEN, SMALL, False, Gpu("one", 1.0, 1.0)) == 336 + 13_440


@needs_triton
def test_the_committed_page_is_what_the_command_writes(tmp_path, monkeypatch, capsys) -> None:
    text = arithmetic.PAGE.read_text(encoding="utf-8")
    assert arithmetic.page() == text
    changed = tmp_path / "performance.md"
    changed.write_text(
        text.replace(" 4,096 x 4,096 | 336 |", " 4,096 x 4,096 | 337 |"), encoding="utf-8"
    )
    monkeypatch.setattr(arithmetic, "PAGE", changed)
    assert changed.read_text(encoding="utf-8") != text
    arithmetic.main([])
    assert changed.read_text(encoding="utf-8") == text
    assert capsys.readouterr().out == f"wrote {changed}\n"


@needs_triton
def test_the_page_has_the_data_sheet_and_the_launches() -> None:
    text = arithmetic.PAGE.read_text(encoding="utf-8")
    speeds = (
        f"{H100.operations / 1e12:g} TFLOP/s in dense bfloat16 and {H100.bandwidth / 1e12:g} TB/s"
    )
    assert f"[{H100.name}]" in text and speeds in text
    counts = {
        arm: [
            "{} + {}".format(*arithmetic.launch_counts(arm, LAYERS[0], dropout))
            for dropout in (False, True)
        ]
        for arm in (PEFT, PLAIN, OURS)
    }
    said = "PEFT takes {} launches (forward + backward; with dropout {})"
    assert said.format(*counts[PEFT]) in text
    assert "the 72 lines {} ({})".format(*counts[PLAIN]) in text
    assert counts[OURS] == ["1 + 1", "1 + 1"] and "and this library 1 + 1." in text
    layer = LAYERS[0]
    forward, backward = arithmetic.moved(FROZEN, layer, False)
    multiplied, _ = arithmetic.multiplied(FROZEN, layer)
    assert forward == backward
    # By hand: 168 MB / 3.35 TB/s = 50 µs, and 2 · 137.4 · 10⁹ / 989 TFLOP/s = 278 µs, twice.
    assert (round(forward / 1e6), round(multiplied / 1e8)) == (168, 1374)
    assert round(1e6 * arithmetic.least_seconds(FROZEN, layer, False, H100)) == 556
