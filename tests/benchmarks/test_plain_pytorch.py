"""The yardstick of plain PyTorch: PEFT's own gradients, in as many lines as its name says."""

from __future__ import annotations

import ast
import io
import tokenize

import pytest
import torch

pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[bench]"
)
pytest.importorskip("peft", reason="runs where peft is installed: pip install .[bench]")

from benchmarks.common import arms, plain_pytorch
from tests.helpers.small_models import llama

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(1, 64, (3, 40), generator=torch.Generator().manual_seed(1))


def small_model(arm: str, dropout: float):
    torch.manual_seed(0)
    base = llama(vocab_size=64, use_cache=False, attention_bias=True).double()
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = arms.adapt(base.requires_grad_(False), arm, targets, r=3, dropout=dropout)
    arms.fill(model)
    return model.train()


def loss_of(model) -> torch.Tensor:
    # Both draw dropout's masks in the same order.
    torch.manual_seed(7)
    loss: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_and_gradients_are_pefts_own(dropout):
    losses, gradients = [], []
    for arm in (arms.PEFT, arms.PLAIN):
        model = small_model(arm, dropout)
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-13, atol=0)
    assert len(gradients[0]) == 24
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-11, atol=1e-14, msg=name)


def test_its_name_has_its_lines_of_code():
    """Lines without comments, docstrings and empty ones."""
    with open(plain_pytorch.__file__, encoding="utf-8") as file:
        source = file.read()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    strings = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    ]
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.string.strip() and token.type != tokenize.COMMENT
        for line in range(token.start[0], token.end[0] + 1)
    }
    for string in strings:
        code -= set(range(string.lineno, string.end_lineno + 1))
    assert f"{len(code)} lines of PyTorch" == arms.PLAIN
