"""``lora_linear_cross_entropy`` against its float64 reference, on both backends; what it keeps, and how
often it multiplies by the head.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.dispatch import tiles
from stablelora_kernels.functional import lora_linear_cross_entropy
from stablelora_kernels.ops import cpu_products
from stablelora_kernels.ops.lora_linear_cross_entropy import chunks
from stablelora_kernels.ops.lora_linear_cross_entropy import torch as loss_torch
from stablelora_kernels.ops.lora_linear_cross_entropy.call import (
    Chunk,
    CrossEntropyResults,
    CrossEntropySettings,
)
from stablelora_kernels.reference import lora_linear_cross_entropy_ref
from stablelora_kernels.testing import assert_no_worse
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64
from tests.helpers.operators import Operators

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
LEAVES = ("hidden", "bias", "lora_A", "lora_B")
SCALING = 1.7


class Loss(NamedTuple):
    dtype: torch.dtype = FP32
    lora_dtype: torch.dtype = FP32
    # Leading sizes of hidden, and H.
    shape: tuple[int, ...] = (37, 32)
    vocabulary: int = 101
    r: int = 4
    reduction: str = "mean"
    softcap: float | None = None
    logit_scale: float = 1.0
    # Every so many labels are ignored.
    ignored: int = 5
    # Each of hidden's columns is the second of a wider tensor, W is a transposed one.
    strided: bool = False
    wanted: tuple[str, ...] = LEAVES

    def __str__(self) -> str:
        return " ".join(
            f"{name}={value}"
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
        )


CASES = [
    Loss(),
    Loss(reduction="sum", softcap=3.0, logit_scale=0.7),
    Loss(reduction="none", softcap=3.0, logit_scale=0.7),
    # Logits far below the cap.
    Loss(reduction="none", softcap=30.0, logit_scale=0.1),
    Loss(BF16, BF16, reduction="none"),
    Loss(BF16, FP32, softcap=30.0, strided=True),
    Loss(BF16, FP32, reduction="sum", logit_scale=0.25),
    Loss(FP16, FP16),
    Loss(FP16, FP32, reduction="none", softcap=2.0),
    Loss(r=1, wanted=("hidden",)),
    Loss(r=3, wanted=("lora_A",), reduction="none"),
    Loss(BF16, FP32, r=20, wanted=("lora_B",), reduction="none"),
    Loss(r=20, wanted=("bias",)),
    Loss(wanted=("bias",), reduction="none"),
    Loss(r=0, wanted=("hidden", "bias")),
    Loss(r=0, wanted=("hidden",), reduction="none", strided=True),
    Loss(shape=(1, 32), ignored=2),
    Loss(shape=(2, 3, 7, 31), vocabulary=53, reduction="none"),
    Loss(vocabulary=1),
    Loss(vocabulary=1, reduction="none", softcap=1.0),
    Loss(shape=(5, 1), vocabulary=2, strided=True),
    Loss(vocabulary=64, strided=True, reduction="sum"),
    Loss(ignored=1000),
]  # fmt: skip
FLOAT64_CASES = [case._replace(dtype=FP64, lora_dtype=FP64) for case in CASES if case.dtype == FP32]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 tokens, float32 copies of two or three, blocks of 24 rows of the head and 32
    columns a step of the kernel.
    """
    monkeypatch.setattr(chunks, "CPU_LOGIT_BYTES", 0)
    monkeypatch.setattr(loss_torch, "FLOAT32_ELEMENTS", 256)
    monkeypatch.setattr(chunks, "BLOCK", 24)
    (rule,) = tiles.CROSS_ENTROPY_TILES
    small = rule._replace(choice=rule.choice._replace(BLOCK_N=32))
    monkeypatch.setattr(tiles, "CROSS_ENTROPY_TILES", (small,))


def make(case: Loss) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    *leading, width = case.shape

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=FP64).to(dtype)

    hidden = draw(*leading, 2 * width)[..., ::2] if case.strided else draw(*leading, width)
    weight = draw(width, case.vocabulary).t() if case.strided else draw(case.vocabulary, width)
    labels = torch.randint(case.vocabulary, leading, generator=generator)
    labels.view(-1)[case.ignored - 1 :: case.ignored] = -100
    given = {
        "hidden": hidden,
        "weight": weight * width**-0.5,
        "labels": labels,
        "bias": draw(case.vocabulary),
        "lora_A": draw(case.r, width, dtype=case.lora_dtype) if case.r else None,
        "lora_B": 0.3 * draw(case.vocabulary, case.r, dtype=case.lora_dtype) if case.r else None,
        "grad": draw(*leading, dtype=FP64) if case.reduction == "none" else draw(dtype=FP64),
    }
    for name in case.wanted:
        given[name].requires_grad_()
    return given


def call(case: Loss, given: dict[str, Any], function: Any = lora_linear_cross_entropy) -> Tensor:
    return function(
        given["hidden"],
        given["weight"],
        given["labels"],
        bias=given["bias"],
        lora_A=given["lora_A"],
        lora_B=given["lora_B"],
        scaling=SCALING,
        reduction=case.reduction,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
    )


def results(case: Loss, given: dict[str, Any], function: Any) -> dict[str, Tensor]:
    loss = call(case, given, function)
    leaves = [given[name] for name in case.wanted]
    grads = torch.autograd.grad(loss, leaves, given["grad"].to(loss.dtype))
    return {"loss": loss.detach()} | dict(zip(case.wanted, grads, strict=True))


def in_dtype(case: Loss, given: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Copies of the operands in ``dtype``; with None, all in the case's."""
    copies = {}
    for name, t in given.items():
        if t is None or name in ("labels", "grad"):
            copies[name] = t
            continue
        copies[name] = t.detach().to(dtype or case.dtype).requires_grad_(name in case.wanted)
    return copies


def eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, lora_A: Any, lora_B: Any, scaling: float,
    reduction: str, softcap: float | None, logit_scale: float,
) -> Tensor:  # fmt: skip
    """PEFT's head and transformers' loss, whose logits are float32."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if lora_A is not None:
        logits = logits + hidden @ lora_A.t() @ lora_B.t() * scaling
    logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    flat = logits.float().view(-1, weight.shape[0])
    loss = torch.nn.functional.cross_entropy(flat, labels.reshape(-1), reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


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
    cross_entropy(call, Chunk(logits, labels, None), losses).run(memory.device)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert memory.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, backend):
    given = make(case)
    with slk.settings(backend=backend):
        found = results(case, given, lora_linear_cross_entropy)
    exact = results(case, in_dtype(case, given, FP64), lora_linear_cross_entropy_ref)
    usual = results(case, in_dtype(case, given, None), eager)
    for name, value in found.items():
        dtype = FP32 if name == "loss" else given[name].dtype
        assert value.dtype == dtype, name
        assert_no_worse(value, exact[name], usual[name], dtype=case.dtype, name=name)


@pytest.mark.parametrize("case", FLOAT64_CASES, ids=str)
def test_float64_to_3e15(case):
    given = make(case)
    found = results(case, given, lora_linear_cross_entropy)
    exact = results(case, in_dtype(case, given, FP64), lora_linear_cross_entropy_ref)
    for name, value in found.items():
        assert value.dtype == FP64
        # A loss or a gradient that is zero is compared with the operands, which are about 1.
        error = (value - exact[name]).norm() / exact[name].norm().clamp(min=1)
        assert error <= 3e-15, (name, error)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_processors_that_do_not_multiply_low_precision_use_float32(dtype, monkeypatch):
    monkeypatch.setattr(cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, False))
    case = Loss(dtype, FP32, reduction="sum")
    given = make(case)
    found = results(case, given, lora_linear_cross_entropy)
    exact = results(case, in_dtype(case, given, FP64), lora_linear_cross_entropy_ref)
    usual = results(case, in_dtype(case, given, None), eager)
    for name, value in found.items():
        assert_no_worse(value, exact[name], usual[name], dtype=dtype, name=name)


def test_float16_keeps_small_probabilities():
    """Of 60,000 equal logits each has a probability of 1.7e-5, a subnormal number in float16."""
    count = 60_000
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
    case = Loss(shape=(rows, 32), ignored=1)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        given = make(case)
        with slk.settings(backend=backend):
            found = results(case._replace(reduction=reduction), given, lora_linear_cross_entropy)
        usual = eager(**{name: given[name] for name in given if name != "grad"}, scaling=SCALING,
                      reduction=reduction, softcap=None, logit_scale=1.0)  # fmt: skip
        assert torch.equal(found["loss"].isnan(), usual.isnan())
        torch.testing.assert_close(found.pop("loss"), torch.tensor(expected), equal_nan=True)
        assert all(not grad.any() for grad in found.values())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("scaling", [SCALING, 0.0])
def test_not_a_number_in_gives_not_a_number_out(scaling, backend, monkeypatch):
    """Also through a branch whose scaling is 0, since 0 times NaN is NaN."""
    monkeypatch.setattr(sys.modules[__name__], "SCALING", scaling)
    for name in ("hidden", "weight", "bias", "lora_A", "lora_B"):
        case = Loss(reduction="none", ignored=1000)
        given = make(case)
        with torch.no_grad():
            given[name][0] = torch.nan
        with slk.settings(backend=backend):
            found = results(case, given, lora_linear_cross_entropy)
        is_nan = found["loss"].isnan()
        if name == "hidden":
            assert is_nan.nonzero().tolist() == [[0]]
        else:
            assert is_nan.all(), name
    given = make(case)
    with torch.no_grad():
        given["hidden"][1] = torch.nan
    with slk.settings(backend=backend):
        found = results(case, given, lora_linear_cross_entropy)
    assert found["loss"].isnan().nonzero().tolist() == [[1]]
    assert found["hidden"].isnan().any(1).nonzero().tolist() == [[1]]
    assert found["lora_A"].isnan().any() and found["lora_B"].isnan().any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("label", [-1, 101, 1 << 40])
def test_a_label_that_a_gpu_cannot_refuse_gives_not_a_number(label, backend):
    case = Loss(shape=(3, 32))
    given = make(case)
    labels = torch.tensor([label, 5, -100])
    s = given["hidden"] @ given["lora_A"].t()
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
            given["hidden"].detach(), given["weight"], None, s.detach(), given["lora_B"].detach(), labels, None, *settings
        )
    )  # fmt: skip
    assert found.losses.isnan().tolist() == [True, False, False]
    assert found.dhidden.isnan().all(1).tolist() == [True, False, False]
    assert not found.dhidden[2].any() and found.losses[2] == 0


def test_any_ignore_index():
    case = Loss(reduction="none")
    given = make(case)
    expected = call(case, given)
    given["labels"] = given["labels"].masked_fill(given["labels"] == -100, 7_000)
    found = lora_linear_cross_entropy(
        given["hidden"], given["weight"], given["labels"], bias=given["bias"], lora_A=given["lora_A"],
        lora_B=given["lora_B"], scaling=SCALING, reduction="none", ignore_index=7_000,
    )  # fmt: skip
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
    given = make(Loss())
    del given["grad"]
    with pytest.raises(error, match=words):
        lora_linear_cross_entropy(**given | {"scaling": SCALING} | changes)


def test_float64_is_refused_by_name_on_triton():
    given = make(Loss(FP64, FP64))
    with (
        slk.settings(backend="triton"),
        pytest.raises(TypeError, match=r"hidden is torch\.float64"),
    ):
        call(Loss(), given)


def test_dtensors_are_refused_by_name(mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    given = make(Loss())
    del given["grad"]
    for name in ("hidden", "weight", "bias", "lora_A", "lora_B"):
        sharded = distribute_tensor(given[name].detach(), mesh, [Replicate()])
        with pytest.raises(TypeError, match=f"{name} must be a plain tensor, got a DTensor"):
            lora_linear_cross_entropy(**given | {"scaling": SCALING, name: sharded})


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
        ("none", ("hidden", "lora_A"), 2),
        ("none", LEAVES, 3),
        ("mean", ("lora_A", "lora_B"), 1),
        ("none", ("hidden",), 2),
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
    case = Loss(reduction=reduction, wanted=wanted)
    given = make(case)

    def run():
        loss = call(case, given)
        if wanted:
            loss.sum().backward()

    assert products_with_the_head(run) == count


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_labels_and_gradients_of_any_strides(backend):
    """As labels of every second token, and sum()'s gradient, which is one number for all tokens."""
    case = Loss(reduction="none")
    given = make(case)
    expected = results(case, given | {"grad": torch.ones(37)}, lora_linear_cross_entropy)
    labels = given["labels"].repeat_interleave(2)[::2]
    grad = torch.ones(1).expand(37)
    with slk.settings(backend=backend):
        found = results(case, given | {"labels": labels, "grad": grad}, lora_linear_cross_entropy)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_may_run_again(backend):
    for reduction in ("mean", "none"):
        case = Loss(BF16, FP32, reduction=reduction)
        given = make(case)
        leaves = [given[name] for name in LEAVES]
        with slk.settings(backend=backend):
            loss = call(case, given).sum()
            first = torch.autograd.grad(loss, leaves, retain_graph=True)
            second = torch.autograd.grad(2 * loss, leaves)
        for one, two in zip(first, second, strict=True):
            torch.testing.assert_close(two, 2 * one)


def test_memory_is_that_of_a_chunk_not_of_all_tokens(monkeypatch):
    """No tensor that is made or kept has more elements than a chunk's logits, dX, or dB."""
    case = Loss(BF16, FP32, shape=(160, 32))
    given = make(case)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = call(case, given)
    with torch.profiler.profile(profile_memory=True) as profile:
        call(case, given)
    allocated = [event.cpu_memory_usage for event in profile.events()]
    logits = 160 * 101 * 2
    assert loss.isfinite() and max(allocated) < logits
    own = {given[name].data_ptr() for name in given if given[name] is not None}
    of_op = {t.numel() for t in kept if t.data_ptr() not in own and t.dim() == 2}
    # dX, S and dS, A in bfloat16, and dB.
    assert of_op == {160 * 32, 160 * 4, 4 * 32, 101 * 4}


def test_the_second_derivative_is_refused():
    """PyTorch's ``once_differentiable`` alone would take a constant incoming gradient for an answer."""
    given = make(Loss())
    with pytest.raises(RuntimeError, match="differentiated once, got a backward with create_graph"):
        torch.autograd.grad(call(Loss(), given), given["hidden"], create_graph=True)


# Beside PyTorch's features.


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_casts_all_but_float32_adapters(reduction):
    case = Loss(reduction=reduction)
    given = make(case)
    low = given | {
        name: given[name].detach().to(BF16).requires_grad_(name in LEAVES)
        for name in ("hidden", "weight", "bias")
    }
    with torch.autocast("cpu", BF16):
        found = results(case, given, lora_linear_cross_entropy)
    for name, value in results(case, low, lora_linear_cross_entropy).items():
        assert torch.equal(found[name].to(value.dtype), value), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing(reduction, reentrant):
    case = Loss(reduction=reduction)
    given = make(case)
    expected = results(case, given, lora_linear_cross_entropy)

    def run(*leaves: Tensor) -> Tensor:
        return call(case, given | dict(zip(LEAVES, leaves, strict=True)))

    leaves = [given[name] for name in LEAVES]
    loss = checkpoint(run, *leaves, use_reentrant=reentrant)
    loss.backward(given["grad"].to(loss.dtype))
    for name in LEAVES:
        assert torch.equal(given[name].grad, expected[name]), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_and_torch_compile_without_a_break(reduction, backend):
    case = Loss(reduction=reduction, softcap=3.0)
    given = make(case)
    with slk.settings(backend=backend):
        with Operators() as operators:
            expected = results(case, given, lora_linear_cross_entropy)
        calls = [each for each in operators.calls if each[0].namespace == "stablelora_kernels"]
        assert len(calls) == (1 if reduction == "mean" else 2)
        for operator, arguments, _ in calls:
            plain = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
            torch.library.opcheck(operator, plain)
        torch._dynamo.reset()
        compiled = torch.compile(lora_linear_cross_entropy, backend="aot_eager", fullgraph=True)
        found = results(case, given, compiled)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_dropout_is_on_the_branch_and_in_training_alone():
    given = make(Loss())
    del given["grad"]
    given |= {"scaling": SCALING}
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
    for name in LEAVES:
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, given[name], retain_graph=True)[0] for loss in (found, expected))
        )  # fmt: skip
    still = lora_linear_cross_entropy(**given, dropout_p=0.5, training=False)
    assert torch.equal(still, lora_linear_cross_entropy(**given))
