"""``lora_linear_log_probs`` against log_softmax in float64: log-probabilities, entropies, and the
gradients of both.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_linear_cross_entropy, lora_linear_log_probs
from stablelora_kernels.ops.lora_linear_cross_entropy import autograd
from stablelora_kernels.ops.lora_linear_cross_entropy.call import CrossEntropySettings

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "small_chunks")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LEAVES = ("hidden", "bias", "lora_A", "lora_B")
SCALING = 5.8


def operands(
    dtype: torch.dtype = FP32,
    lora_dtype: torch.dtype = FP32,
    shape: tuple[int, ...] = (37, 32),
    vocabulary: int = 101,
    r: int | None = 4,
) -> dict[str, Any]:
    """A call's tensors, of labels that are ignored each third time."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    h = shape[-1]
    labels = torch.randint(vocabulary, shape[:-1], generator=generator)
    labels.view(-1)[2::3] = -100
    given: dict[str, Any] = {
        "hidden": draw(*shape),
        "weight": draw(vocabulary, h, scale=h**-0.5),
        "bias": draw(vocabulary),
        "lora_A": None,
        "lora_B": None,
        "scaling": SCALING,
        "labels": labels,
    }
    if r is not None:
        given["lora_A"] = draw(r, h, scale=h**-0.5, dtype=lora_dtype)
        given["lora_B"] = draw(vocabulary, r, scale=0.3, dtype=lora_dtype)
    return given


def leaves(given: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies of the operands, of which those of LEAVES require gradients."""
    made = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(dtype or value.dtype, copy=True)
            value.requires_grad_(name in LEAVES)
        made[name] = value
    return made


def by_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    labels: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by all logits."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    if lora_A is not None and lora_B is not None:
        z = z + scaling * (hidden @ lora_A.t().to(hidden.dtype) @ lora_B.t().to(hidden.dtype))
    z = logit_scale * z
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    log_p = (z.to(torch.promote_types(z.dtype, FP32)) / temperature).log_softmax(-1)
    counts = labels != -100
    at_label = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return at_label * counts, entropy * counts


def computed(function: Any, given: dict[str, Any], weights: Any, **options: Any) -> list[Tensor]:
    """The values of both outputs, and the gradients of the sum of them times ``weights``."""
    values = function(**given, **options)
    loss = sum((w.to(v.dtype) * v).sum() for w, v in zip(weights, values, strict=True))
    wanted = [given[name] for name in LEAVES if given[name] is not None]
    return [*(v.detach() for v in values), *torch.autograd.grad(loss, wanted)]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "temperature": ({}, {"temperature": 0.7}),
    "cap": ({}, {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}),
    "bf16": ({"dtype": BF16}, {"temperature": 0.9}),
    "bf16 adapter": ({"dtype": BF16, "lora_dtype": BF16}, {}),
    "fp16": ({"dtype": FP16, "lora_dtype": FP16}, {"softcap": 20.0}),
    "no branch": ({"r": None}, {}),
    "r 1": ({"r": 1, "shape": (2, 3, 7, 31), "vocabulary": 53}, {}),
    "r 20": ({"r": 20, "vocabulary": 64}, {}),
    "one token": ({"shape": (1, 32)}, {}),
    "one word": ({"vocabulary": 1}, {}),
    "no tokens": ({"shape": (0, 32)}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_as_log_softmax(name: str, backend: str) -> None:
    sizes, options = CASES[name]
    given = operands(**sizes)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(given["labels"].shape, generator=generator).double() for _ in range(2)]
    exact = computed(by_softmax, leaves(given, FP64), weights, **options)
    eager = computed(by_softmax, leaves(given), weights, **options)
    found = computed(lora_linear_log_probs, leaves(given), weights, **options)
    names = ("log_probs", "entropy", *[leaf for leaf in LEAVES if given[leaf] is not None])
    for what, value, oracle, usual in zip(names, found, exact, eager, strict=True):
        assert value.isfinite().all(), what
        if value.numel():
            error = (value.double() - oracle).abs().max().item()
            allowed = 2 * (usual.double() - oracle).abs().max().item()
            unit = torch.finfo(value.dtype).eps * (1 + oracle.abs().max().item())
            assert error <= allowed + 8 * unit, (what, error, allowed)


@pytest.mark.parametrize("name", [name for name in CASES if "16" not in name])
def test_float64(name: str) -> None:
    sizes, options = CASES[name]
    given = leaves(operands(**sizes), FP64)
    weights = [torch.full(given["labels"].shape, w, dtype=FP64) for w in (0.3, -0.8)]
    exact = computed(by_softmax, given, weights, **options)
    found = computed(lora_linear_log_probs, given, weights, **options)
    for value, oracle in zip(found, exact, strict=True):
        largest = max([1.0, *oracle.abs().flatten().tolist()])
        assert (value - oracle).abs().max().item() <= 1e-14 * largest if value.numel() else True


def test_log_probs_are_the_negative_losses(backend: str) -> None:
    given = operands()
    losses = lora_linear_cross_entropy(**given, reduction="none")
    for outputs in (("log_probs",), ("entropy", "log_probs"), "log_probs"):
        found = lora_linear_log_probs(**given, outputs=outputs)
        assert len(found) == 1 if outputs != ("entropy", "log_probs") else 2
        assert torch.equal(found[-1], -losses)
    (entropy,) = lora_linear_log_probs(**given, outputs=("entropy",))
    assert torch.equal(entropy, lora_linear_log_probs(**given)[1])
    assert not entropy[given["labels"] == -100].any() and bool((entropy >= 0).all())


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")], ids=str)
def test_a_repeated_forward_has_the_same_bits(backend: str, outputs: tuple[str, ...]) -> None:
    """With gradients and without, and whatever rows are beside: the ratio of a policy is exactly 1."""
    given = operands(BF16)
    with torch.no_grad():
        old = lora_linear_log_probs(**given, outputs=outputs)
    new = lora_linear_log_probs(**leaves(given), outputs=outputs)
    assert all(map(torch.equal, old, new))
    assert bool((torch.exp(new[0] - old[0]) == 1).all())


@pytest.mark.parametrize(("first", "second"), [(1.0, 0.0), (0.0, 1.0), (-0.5, 2.0)])
def test_one_output_may_have_no_gradient(backend: str, first: float, second: float) -> None:
    """As an entropy that is logged alone."""
    given = leaves(operands())
    log_probs, entropy = lora_linear_log_probs(**given)
    parts = [w * v.sum() for w, v in ((first, log_probs), (second, entropy)) if w]
    loss = sum(parts[1:], parts[0])
    grads = torch.autograd.grad(loss, [given[name] for name in LEAVES])
    exact = leaves(operands(), FP64)
    values = by_softmax(**exact)
    expected = torch.autograd.grad(
        first * values[0].sum() + second * values[1].sum(), [exact[name] for name in LEAVES]
    )
    for grad, oracle in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), oracle, rtol=1e-4, atol=1e-4)


def test_only_wanted_gradients_are_computed(backend: str) -> None:
    """A frozen head of which the hidden states alone want a gradient."""
    given = leaves(operands(r=None))
    given["bias"].requires_grad_(False)
    with mock.patch.object(
        autograd, "lora_linear_cross_entropy", wraps=autograd.lora_linear_cross_entropy
    ) as op:
        sum(v.sum() for v in lora_linear_log_probs(**given)).backward()
    forward, backward = (CrossEntropySettings(*call.args[8:]) for call in op.call_args_list)
    assert forward.need_entropy and not forward.needs_gradient
    assert backward.need_hidden and not (backward.need_bias or backward.need_b or backward.need_s)
    assert given["hidden"].grad is not None and given["bias"].grad is None


def test_certain_and_impossible_words(backend: str) -> None:
    """A probability of 1, and logits of -inf as of masked words: 0 times their logarithm is 0."""
    given = operands(r=None, vocabulary=70)
    given["bias"] = torch.zeros(70)
    given["bias"][5] = 400.0
    given["bias"][33:40] = -torch.inf
    given["labels"] = torch.full((37,), 5)
    given["hidden"].requires_grad_()
    log_probs, entropy = lora_linear_log_probs(**given)
    assert torch.equal(log_probs.detach(), torch.zeros(37))
    assert torch.equal(entropy.detach(), torch.zeros(37))
    (entropy.sum() + log_probs.sum()).backward()
    assert not given["hidden"].grad.any()


def test_under_autocast_and_compiled() -> None:
    given = leaves(operands())
    with torch.autocast("cpu", BF16):
        low = lora_linear_log_probs(**given)
    exact = lora_linear_log_probs(**given)
    for a, b in zip(low, exact, strict=True):
        assert a.dtype == FP32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.3)
    compiled = torch.compile(lora_linear_log_probs, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(**given), exact))


def test_a_second_derivative_is_refused() -> None:
    given = leaves(operands())
    loss = sum(v.sum() for v in lora_linear_log_probs(**given))
    with pytest.raises(RuntimeError, match="lora_linear_log_probs can be differentiated once"):
        torch.autograd.grad(loss, given["hidden"], create_graph=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.0}, r"temperature must be a finite number in \(0, inf\), got 0"),
        ({"outputs": ()}, r"outputs must be some of 'log_probs', 'entropy', got \(\)"),
        ({"outputs": ("logits",)}, "outputs must be some of 'log_probs', 'entropy', got"),
        ({"outputs": ("entropy", "entropy")}, "outputs must be some of"),
        ({"dropout_p": 1.0, "training": False}, "dropout_p"),
        ({"labels": torch.full((37,), 101)}, r"labels must be in \[0, 101\)"),
        ({"softcap": -1.0}, "softcap must be positive or None, got -1"),
    ],
)
def test_errors_name_the_argument_and_both_values(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lora_linear_log_probs(**operands() | changes)


def test_first_use_proves_the_kernel_with_entropies(nothing_known: None) -> None:
    pytest.importorskip("triton", reason="runs where Triton is installed")
    from stablelora_kernels.dispatch import first_use

    given = leaves(operands(BF16))
    with slk.settings(backend="triton"):
        sum(v.sum() for v in lora_linear_log_probs(**given)).backward()
    words = [kind.words for _, kind in first_use._findings if "cross_entropy" in kind.op]
    assert any("its gradient True" in word for word in words)
    assert not any(first_use._retired.values())


def test_checkpointed_and_in_threads() -> None:
    """In each of four threads as without a checkpoint, to the bit. The interpreter has one thread."""
    given = operands()
    weights = [torch.linspace(-1, 1, 37), torch.linspace(2, 0, 37)]
    with slk.settings(backend="torch"):
        expected = computed(lora_linear_log_probs, leaves(given), weights)

    def call(*args: Any) -> Any:
        return lora_linear_log_probs(*args)

    def step(reentrant: bool) -> list[Tensor]:
        mine = leaves(given)
        with slk.settings(backend="torch"):
            values = checkpoint(call, *mine.values(), use_reentrant=reentrant)
            sum((w * v).sum() for w, v in zip(weights, values, strict=True)).backward()
        return [*(v.detach() for v in values), *(mine[name].grad for name in LEAVES)]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(step, [False, True] * 2):
            assert all(map(torch.equal, found, expected))
