"""``lora_linear_cross_entropy`` against its float64 reference, on both backends; what it keeps, and how
often it multiplies by the head.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stablelora_kernels.functional import lora_linear_cross_entropy
from stablelora_kernels.ops import cpu_products
from stablelora_kernels.ops.lora_linear_cross_entropy import chunks
from stablelora_kernels.ops.lora_linear_cross_entropy.call import (
    Chunk,
    CrossEntropyResults,
    CrossEntropySettings,
)
from stablelora_kernels.reference import lora_linear_cross_entropy_ref
from stablelora_kernels.testing.cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    Case,
    Operands,
    forced,
    leaves,
    make,
    ours,
    run,
)
from stablelora_kernels.testing.expectations import eager, expectations, oracle
from stablelora_kernels.testing.ops import CrossEntropy
from tests.helpers.operators import Operators

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "small_chunks")
LEAVES = ("x", "bias0", "lora_A0", "lora_B0")
# With it a soft cap bends many logits.
SCALING = 5.8


def head(
    dtype: torch.dtype = FP32,
    lora_dtype: torch.dtype = FP32,
    shape: tuple[int, ...] = (37, 32),
    vocabulary: int = 101,
    r: int | None = 4,
    strided: bool = False,
    wanted: tuple[str, ...] = LEAVES,
    **options: Any,
) -> Case:
    """A call. ``strided``: each of hidden's columns is the second of a wider tensor, W is a
    transposed one.
    """
    return Case(
        CrossEntropy(**options),
        shape,
        (vocabulary,),
        (r,),
        dtype,
        lora_dtype,
        scalings=(SCALING,),
        layouts={"x": "every second", "weight": "transposed"} if strided else {},
        wanted=wanted,
        backend="torch",
        device="cpu",
    )


CASES = [
    head(),
    head(reduction="sum", softcap=3.0, logit_scale=0.7),
    head(reduction="none", softcap=3.0, logit_scale=0.7),
    # Logits far below the cap.
    head(reduction="none", softcap=30.0, logit_scale=0.1),
    head(BF16, BF16, reduction="none"),
    head(BF16, FP32, softcap=30.0, strided=True),
    head(BF16, FP32, reduction="sum", logit_scale=0.25),
    head(FP16, FP16),
    head(FP16, FP32, reduction="none", softcap=2.0),
    head(r=1, wanted=("x",)),
    head(r=3, wanted=("lora_A0",), reduction="none"),
    head(BF16, FP32, r=20, wanted=("lora_B0",), reduction="none"),
    head(r=20, wanted=("bias0",)),
    head(wanted=("bias0",), reduction="none"),
    head(r=None, wanted=("x", "bias0")),
    head(r=None, wanted=("x",), reduction="none", strided=True),
    head(shape=(1, 32), ignored=2),
    head(shape=(2, 3, 7, 31), vocabulary=53, reduction="none"),
    head(vocabulary=1),
    head(vocabulary=1, reduction="none", softcap=1.0),
    head(shape=(5, 1), vocabulary=2, strided=True),
    head(vocabulary=64, strided=True, reduction="sum"),
    head(ignored=1000),
]  # fmt: skip
FLOAT64_CASES = [case.but(dtype=FP64, lora_dtype=FP64) for case in CASES if case.dtype == FP32]


def arguments(given: Operands) -> dict[str, Any]:
    """The op's."""
    return {
        "hidden": given["x"],
        "weight": given["weight0"],
        "labels": given["labels"],
        "bias": given["bias0"],
        "lora_A": given["lora_A0"],
        "lora_B": given["lora_B0"],
        "scaling": SCALING,
    }


def test_the_kernel_reads_nothing_that_nobody_has_written():
    """It reads whole rows of the logits' memory, which end behind the vocabulary."""
    pytest.importorskip("triton", reason="runs where Triton is installed")
    from stablelora_kernels.launch.lora_linear_cross_entropy import cross_entropy

    vocabulary, rows = 53, 5
    width = -(-vocabulary // chunks.ROW_ALIGNMENT) * chunks.ROW_ALIGNMENT
    memory = torch.full((rows, width), float("nan"))
    logits = memory[:, :vocabulary]
    logits.copy_(torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(rows)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    losses = torch.empty(rows)
    settings = CrossEntropySettings(-100, 1.0, 0.0, 1.0, "triton", need_hidden=True)
    call = SimpleNamespace(settings=settings, unit=1.0)
    cross_entropy(call, Chunk(logits, labels, None), losses, losses[:0]).run(memory.device)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert memory.isfinite().all()


def check(case: Case) -> None:
    given = make(case)
    found = run(case, given)
    for name, expected in expectations(case, given).items():
        dtype = FP32 if name == "Y0" else given[name].dtype
        assert found[name].dtype == dtype, name
        expected.check(found[name], name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, backend):
    check(case.but(backend=backend))


@pytest.mark.parametrize("case", FLOAT64_CASES, ids=str)
def test_float64_to_3e15(case):
    given = make(case)
    exact = oracle(case, given, [])
    for name, value in run(case, given).items():
        assert value.dtype == FP64
        # A loss or a gradient that is zero is compared with the operands, which are about 1.
        error = (value - exact[name]).norm() / exact[name].norm().clamp(min=1)
        assert error <= 3e-15, (name, error)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_processors_that_do_not_multiply_low_precision_use_float32(dtype, monkeypatch):
    monkeypatch.setattr(cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, False))
    check(head(dtype, reduction="sum"))


@pytest.mark.parametrize("multiplied", [False, True])
def test_float16_keeps_small_probabilities(multiplied, monkeypatch):
    """Of 120,000 equal logits each has a probability of 8e-6, a subnormal number in float16. A
    processor that does not multiply float16 computes in float32.
    """
    monkeypatch.setattr(
        cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, multiplied)
    )
    count = 120_000
    hidden = torch.ones(4, 8, dtype=FP16, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(count, 8, generator=generator).to(FP16) * 1e-3
    lora_B = torch.zeros(count, 2, requires_grad=True)
    lora_A = torch.full((2, 8), 0.1)
    options = {"bias": None, "lora_A": lora_A, "lora_B": lora_B, "scaling": 1.0}
    lora_linear_cross_entropy(
        hidden, weight, torch.zeros(4, dtype=torch.long), **options
    ).backward()
    exact = lora_B.detach().double().requires_grad_()
    lora_linear_cross_entropy_ref(
        hidden.detach().double(),
        weight.double(),
        torch.zeros(4, dtype=torch.long),
        bias=None,
        lora_A=lora_A.double(),
        lora_B=exact,
        scaling=1.0,
    ).backward()
    error = (lora_B.grad.double() - exact.grad)[1:].norm() / exact.grad[1:].norm()
    # In units of 2^-24 the probabilities alone would be off by 2e-3.
    assert error < 1e-3


# Labels.


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [0, 20])
def test_no_label_counts(rows, backend):
    """The mean over nothing is NaN, as F.cross_entropy's; its gradients are zeros, as there."""
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        case = head(shape=(rows, 32), ignored=1, reduction=reduction).but(backend=backend)
        given = make(case)
        found, usual = run(case, given), eager(case, given, [])["Y0"]
        assert torch.equal(found["Y0"].isnan(), usual.isnan())
        torch.testing.assert_close(found.pop("Y0"), torch.tensor(expected), equal_nan=True)
        assert all(not grad.any() for grad in found.values())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("scaling", [SCALING, 0.0])
def test_not_a_number_in_gives_not_a_number_out(scaling, backend):
    """Also through a branch whose scaling is 0, since 0 times NaN is NaN."""
    case = head(reduction="none", ignored=1000).but(scalings=(scaling,), backend=backend)
    for name in ("x", "weight0", "bias0", "lora_A0", "lora_B0"):
        given = make(case)
        given[name][0] = torch.nan
        is_nan = run(case, given)["Y0"].isnan()
        if name == "x":
            assert is_nan.nonzero().tolist() == [[0]]
        else:
            assert is_nan.all(), name
    given = make(case)
    given["x"][1] = torch.nan
    found = run(case, given)
    assert found["Y0"].isnan().nonzero().tolist() == [[1]]
    assert found["x"].isnan().any(1).nonzero().tolist() == [[1]]
    assert found["lora_A0"].isnan().any() and found["lora_B0"].isnan().any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("label", [-1, 101, 1 << 40])
def test_a_label_that_a_gpu_cannot_refuse_gives_not_a_number(label, backend):
    given = make(head(shape=(3, 32)))
    labels = torch.tensor([label, 5, -100])
    s = given["x"] @ given["lora_A0"].t()
    settings = CrossEntropySettings(
        -100,
        SCALING,
        0.0,
        1.0,
        backend,
        need_hidden=True,
        need_s=True,
        need_b=False,
        need_bias=False,
    )
    found = CrossEntropyResults(
        *chunks.lora_linear_cross_entropy(
            given["x"], given["weight0"], None, s, given["lora_B0"], labels, None, None, *settings
        )
    )  # fmt: skip
    assert found.losses.isnan().tolist() == [True, False, False]
    assert found.dhidden.isnan().all(1).tolist() == [True, False, False]
    assert not found.dhidden[2].any() and found.losses[2] == 0


def test_any_ignore_index():
    case = head(reduction="none")
    given = make(case)
    (expected,) = ours(case, given)
    given["labels"] = given["labels"].masked_fill(given["labels"] == -100, 7_000)
    found = lora_linear_cross_entropy(**arguments(given), reduction="none", ignore_index=7_000)
    assert torch.equal(found, expected)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "label": ({"labels": torch.full((37,), 101)}, ValueError, r"labels must be in \[0, 101\) .* got 101"),
    "negative label": ({"labels": torch.full((37,), -1)}, ValueError, "ignore_index -100, got -1"),
    "labels' shape": ({"labels": torch.zeros(36).long()}, ValueError, r"labels must be \[37\] .* got \[36\]"),
    "labels' dtype": ({"labels": torch.zeros(37).int()}, TypeError, "labels must be int64, got torch.int32"),
    "hidden": ({"hidden": torch.zeros(37, 31)}, ValueError, r"hidden must be \[\.\.\., 32\]"),
    "weight's dtype": ({"weight": torch.zeros(101, 32).double()}, TypeError, "weight must have hidden's dtype"),
    "trained": ({"weight": torch.zeros(101, 32, requires_grad=True)}, ValueError, "weight must be frozen"),
    "empty": ({"weight": torch.zeros(0, 32), "bias": None, "lora_B": torch.zeros(0, 4)}, ValueError, "at least one row"),
    "A alone": ({"lora_B": None}, ValueError, "lora_B must be given with lora_A"),
    "B": ({"lora_B": torch.zeros(101, 5)}, ValueError, r"lora_B must be \[101, 4\]"),
    "bias": ({"bias": torch.zeros(100)}, ValueError, r"bias must be \[101\]"),
    "quantized": ({"weight": object()}, TypeError, "weight must be a Tensor, got object"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'batch"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be positive or None, got 0.0"),
    "scale": ({"logit_scale": torch.tensor(1.0)}, TypeError, "logit_scale must be a number, got a Tensor"),
    "scaling": ({"scaling": None}, TypeError, "scaling must be a number, got a NoneType"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument_and_both_values(changes, error, words):
    given = arguments(make(head()))
    with pytest.raises(error, match=words):
        lora_linear_cross_entropy(**given | changes)


def test_float64_is_refused_by_name_on_triton():
    with pytest.raises(TypeError, match=r"hidden is torch\.float64"):
        run(head(FP64, FP64).but(backend="triton"))


def test_dtensors_are_refused_by_name(mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    given = arguments(make(head()))
    for name in ("hidden", "weight", "bias", "lora_A", "lora_B"):
        sharded = distribute_tensor(given[name], mesh, [Replicate()])
        with pytest.raises(TypeError, match=f"{name} must be a plain tensor, got a DTensor"):
            lora_linear_cross_entropy(**given | {name: sharded})


# What it costs.


def products_with_the_head(run: Any) -> int:
    """How many times the head is read as a matrix while ``run`` runs, in all chunks together."""
    with torch.profiler.profile(record_shapes=True) as profile:
        run()
    sizes = [
        event.input_shapes
        for event in profile.events()
        if event.name in ("aten::mm", "aten::addmm")
    ]
    return sum([101, 32] in shapes or [32, 101] in shapes for shapes in sizes)


@pytest.mark.parametrize(
    ("reduction", "wanted", "count"),
    [
        ("mean", LEAVES, 2),
        ("sum", LEAVES, 2),
        ("none", ("x", "lora_A0"), 2),
        ("none", LEAVES, 3),
        ("mean", ("lora_A0", "lora_B0"), 1),
        ("none", ("x",), 2),
        ("none", (), 1),
        ("mean", (), 1),
    ],
)
def test_products_with_the_head(reduction, wanted, count, monkeypatch):
    """Two, forward and backward together. Losses by token take a third one for dB: g is known in
    backward.
    """
    monkeypatch.setattr(chunks, "LEAST_ROWS", 64)
    monkeypatch.setattr(cpu_products, "ONEDNN_HELPS", False)
    case = head(reduction=reduction, wanted=wanted)
    given = leaves(case, make(case))

    def step():
        (loss,) = ours(case, given)
        if wanted:
            loss.sum().backward()

    assert products_with_the_head(step) == count


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_labels_and_gradients_of_any_strides(backend):
    """As labels of every second token, and sum()'s gradient, which is one number for all tokens."""
    case = head(reduction="none")
    given = make(case) | {"grad0": torch.ones(37)}
    expected = run(case, given)
    labels = given["labels"].repeat_interleave(2)[::2]
    grad = torch.ones(1).expand(37)
    found = run(case.but(backend=backend), given | {"labels": labels, "grad0": grad})
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_may_run_again(backend):
    for reduction in ("mean", "none"):
        case = head(BF16, FP32, reduction=reduction).but(backend=backend)
        given = leaves(case, make(case))
        inputs = [given[name] for name in LEAVES]
        with forced(case):
            loss = ours(case, given)[0].sum()
            first = torch.autograd.grad(loss, inputs, retain_graph=True)
            second = torch.autograd.grad(2 * loss, inputs)
        for one, two in zip(first, second, strict=True):
            torch.testing.assert_close(two, 2 * one)


def test_memory_is_that_of_a_chunk_not_of_all_tokens(monkeypatch):
    """No tensor that is made or kept has more elements than a chunk's logits, dX, or dB."""
    case = head(BF16, FP32, shape=(160, 32))
    given = leaves(case, make(case))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (loss,) = ours(case, given)
    with torch.profiler.profile(profile_memory=True) as profile:
        ours(case, given)
    allocated = [event.cpu_memory_usage for event in profile.events()]
    logits = 160 * 101 * 2
    assert loss.isfinite() and max(allocated) < logits
    own = {given[name].data_ptr() for name in given if given[name] is not None}
    of_op = {t.numel() for t in kept if t.data_ptr() not in own and t.dim() == 2}
    # dX, S and dS, A in bfloat16, and dB.
    assert of_op == {160 * 32, 160 * 4, 4 * 32, 101 * 4}


def test_behind_the_rows_of_logits_are_zeros(monkeypatch):
    """oneDNN's products in bfloat16 on AMX multiply what lies there by 0, which NaN survives."""
    monkeypatch.setattr(chunks, "CPU_LOGIT_BYTES", 1 << 20)
    monkeypatch.setattr(chunks, "BLOCK", 8192)
    behind = []
    product = chunks.product

    def watched(dz, rows):
        whole = torch.as_strided(dz, (dz.shape[0], dz.stride(0)), dz.stride(), dz.storage_offset())
        behind.append(whole[:, dz.shape[1] :].clone())
        return product(dz, rows)

    monkeypatch.setattr(chunks, "product", watched)
    case = head(BF16, FP32, shape=(64, 32)).but(backend="torch")
    found = run(case, make(case))
    assert all(t.isfinite().all() for t in found.values())
    # Of the rows with labels.
    assert [(*t.shape, t.count_nonzero().item()) for t in behind] == [(52, 11, 0)]


def test_the_second_derivative_is_refused():
    """PyTorch's ``once_differentiable`` alone would take a constant incoming gradient for an answer."""
    given = leaves(head(), make(head()))
    with pytest.raises(RuntimeError, match="differentiated once, got a backward with create_graph"):
        torch.autograd.grad(ours(head(), given), given["x"], create_graph=True)


# Beside PyTorch's features.


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_casts_all_but_float32_adapters(reduction):
    case = head(reduction=reduction)
    given = make(case)
    low = given | {name: given[name].to(BF16) for name in ("x", "weight0", "bias0")}
    found = run(case.but(autocast=True), given)
    for name, value in run(case, low).items():
        assert torch.equal(found[name].to(value.dtype), value), name


def test_autocast_leaves_float64_alone():
    case = head(FP64, FP64).but(backend="torch")
    given = make(case)
    found = run(case.but(autocast=True), given)
    for name, value in run(case, given).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing(reduction, reentrant):
    case = head(reduction=reduction)
    given = make(case)

    def checkpointed(case: Case, given: Operands) -> tuple[Tensor, ...]:
        def call(*inputs: Tensor) -> Tensor:
            return ours(case, given | dict(zip(LEAVES, inputs, strict=True)))[0]

        return (checkpoint(call, *(given[name] for name in LEAVES), use_reentrant=reentrant),)

    expected = run(case, given)
    for name, value in run(case, given, checkpointed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_and_torch_compile_without_a_break(reduction, backend):
    case = head(reduction=reduction, softcap=3.0).but(backend=backend)
    given = make(case)
    with Operators() as operators:
        expected = run(case, given)
    calls = [each for each in operators.calls if each[0].namespace == "stablelora_kernels"]
    assert len(calls) == (1 if reduction == "mean" else 2)
    with forced(case):
        for operator, values, _ in calls:
            plain = [t.detach() if isinstance(t, Tensor) else t for t in values]
            torch.library.opcheck(operator, plain)
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear_cross_entropy, backend="aot_eager", fullgraph=True)
    op = case.description
    assert isinstance(op, CrossEntropy)
    found = run(case, given, lambda case, given: (op.loss(case, given, compiled),))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_dropout_is_on_the_branch_and_in_training_alone():
    given = arguments(leaves(head(), make(head())))
    torch.manual_seed(5)
    kept = torch.nn.functional.dropout(torch.ones_like(given["hidden"]), 0.5)
    expected = lora_linear_cross_entropy_ref(
        given["hidden"],
        given["weight"],
        given["labels"],
        bias=given["bias"] + SCALING * (given["hidden"] * kept) @ given["lora_A"].t() @ given["lora_B"].t(),
        lora_A=None,
        lora_B=None,
        scaling=1.0,
    )  # fmt: skip
    torch.manual_seed(5)
    found = lora_linear_cross_entropy(**given, dropout_p=0.5)
    torch.testing.assert_close(found, expected)
    for name in ("hidden", "bias", "lora_A", "lora_B"):
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, given[name], retain_graph=True)[0] for loss in (found, expected))
        )  # fmt: skip
    still = lora_linear_cross_entropy(**given, dropout_p=0.5, training=False)
    assert torch.equal(still, lora_linear_cross_entropy(**given))
