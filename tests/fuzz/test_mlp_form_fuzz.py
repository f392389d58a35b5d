"""Random forwards of gated MLPs, changed afterwards: a fused MLP computes, keeps and raises what
its own forward does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint  # noqa: F401 (in sources)

from tests.helpers.gated_mlps import INNER, WIDTH, rows
from tests.nn import test_mlp_form
from tests.nn.test_mlp_form import Act, ByMode, Twice  # noqa: F401 (in sources)

pytestmark = pytest.mark.fuzz
KEPT: list[Any] = []
ACTIVATIONS = (
    nn.SiLU,
    lambda: nn.SiLU(inplace=True),
    lambda: nn.GELU("tanh"),
    Act,
    ByMode,
    lambda: F.gelu,
    nn.ReLU,
)
GATES = (
    "self.act_fn(g)", "F.silu(g)", "F.gelu(g, approximate='tanh')", "F.silu(g, inplace=True)", "g * torch.sigmoid(g)",
)  # fmt: skip
SEPARATE = ("g = self.gate_proj(x)", "u = self.up_proj(x)")
STACKED = ("s = self.gate_up_proj(x)", "g, u = s.chunk(2, dim=-1)")
PRODUCTS = (
    "a * u", "u * a", "torch.mul(a, u)", "u.mul(a)", "a.mul_(u)", "a * u * self.factor", "torch.addcmul(u, a, u)",
)  # fmt: skip
QUESTIONS = (
    "self.limit is not None", "self.config.scale != 1", "self.training", "hasattr(self, 'scale')", "not self.kept",
    "getattr(self, 'bias', None) is None", "isinstance(self.act_fn, nn.SiLU)", "type(x) is torch.Tensor", "x.dim() == 3",
    "isinstance(self.gate_proj, nn.Module)", "torch.is_grad_enabled()", "torch.is_autocast_enabled('cpu')", "self.flag",
    "torch.is_inference_mode_enabled()", "all(isinstance(m, nn.Module) for m in self.children())", "'limit' in vars(self)",
    "vars(self).get('limit') is None", "self.up_proj.bias is None", "self.act_fn is F.gelu",
    "type(self.gate_proj) is nn.Linear", "isinstance(x, nn.Parameter)", "self.type == 'silu'",
    "len(vars(self)) > 9", "'flag' in list(vars(self))", "{**vars(self)}.get('limit') is None",
)  # fmt: skip
CONTEXTS = ("torch.no_grad()", "torch.autocast('cpu', enabled=False)", "torch.autocast('cpu', torch.bfloat16)",
            "contextlib.suppress(Exception)", "contextlib.nullcontext()", "torch.enable_grad()")  # fmt: skip
STATEMENTS = (
    "pass", "{v} = {v} * 2", "{v} = {v} + 1", "{v} *= 0.5", "{v} = F.gelu({v})", "F.silu({v}, inplace=True)",
    "{v} = self.act_fn({v})", "{v}.register_hook(lambda d: d * 2)", "self.gate_proj(x)", "g = self.up_proj(x)", "g, u = u, g",
    "{v} = {v}.clamp(max=0.1)", "{v} = {v}.detach()", "{v} = Twice.apply({v})", "KEPT.append({v})", "self.kept.append(1)",
    "self.count += 1", "self.config.scale = self.config.scale", "{v} = {v}.to({v}.dtype)", "{v} = {v}[:]",
    "{v} = checkpoint.checkpoint(F.silu, {v}, use_reentrant=True)", "raise ValueError('as the module does')",
    "y = F.gelu(h)", "u = g", "g, u = u, u", "h = a * a", "a = g * g", "g, u = s.chunk(2, -1)[0], s",
    "{v} = F.dropout({v}, 0.5, self.training)", "{v} = {v}.chunk(2, -1)[0].repeat(1, 1, 2)",
)  # fmt: skip
CHANGES: dict[str, Callable[[Any], Any]] = test_mlp_form.CHANGES | {
    "nothing": lambda mlp: None,
    "flag": lambda mlp: setattr(mlp, "flag", True),
    "type": lambda mlp: setattr(mlp, "type", "gelu"),
    "kept": lambda mlp: mlp.kept.append(0),
    "buffer": lambda mlp: mlp.register_buffer("scale", torch.ones(())),
    "parameter": lambda mlp: mlp.register_parameter("bias", nn.Parameter(torch.ones(()))),
    "another activation": lambda mlp: setattr(mlp, "act_fn", nn.Tanh()),
    "an activation's hook": lambda mlp: mlp.act_fn.register_forward_hook(
        lambda module, args, y: y * 3
    ),
    "another layer": lambda mlp: setattr(mlp, "up_proj", nn.Linear(WIDTH, INNER, False).double()),
    "evaluation": lambda mlp: mlp.eval(),
    "the activation's mode": lambda mlp: mlp.act_fn.eval(),
}


@st.composite
def sources(draw: st.DrawFn) -> str:
    """A forward with up to three odd statements more or instead of its own, alone, under a question
    or in a context.
    """
    gate, product = (
        draw(st.sampled_from(kinds[:3]) | st.sampled_from(kinds)) for kinds in (GATES, PRODUCTS)
    )
    is_stacked = draw(st.booleans())
    lines = [
        *(STACKED if is_stacked else SEPARATE),
        f"a = {gate}",
        f"h = {product}",
        "y = self.down_proj(h)",
        "return y",
    ]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, 5))
        names = ["x", *("sg" if is_stacked else "gu"), "a", "h", "y"][: at + 1]
        statement = draw(st.sampled_from(STATEMENTS)).format(v=draw(st.sampled_from(names)))
        around = draw(st.sampled_from((None, "if", "with")))
        if around is not None:
            statement = f"{around} {draw(st.sampled_from(QUESTIONS if around == 'if' else CONTEXTS))}: {statement}"
        at += sum(line.startswith(("if", "with")) for line in lines[:at])
        lines[at : at + draw(st.integers(0, 1))] = [statement]
    return "\n    ".join(["def forward(self, x):", *lines])


def made(source: str, activation: Callable[[], Any], fuse: bool) -> Any:
    variables = globals().copy()
    exec(source, variables)
    return test_mlp_form.made(variables["forward"], activation(), fuse)[0]["mlp"]


def outcome(mlp: Any, context: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of one call and its backward; and the error, and what is kept."""
    KEPT.clear()
    x, found, error = rows(), {}, None
    torch.manual_seed(3)
    mlp.zero_grad()
    try:
        with context():
            y = mlp(x * 1.0)
        if y.requires_grad:
            y.double().square().sum().backward()
        found = {"y": y.detach().clone(), "x": x.grad} | {
            name: p.grad for name, p in mlp.named_parameters()
        }
    except Exception as raised:
        error = type(raised)
    tensors = {name: t for name, t in found.items() if t is not None}
    return tensors, {"error": error, "kept": len(KEPT), "count": mlp.count, "list": len(mlp.kept)}


MODES = {
    "plain": torch.enable_grad,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}


@settings(max_examples=settings.default.max_examples * 2)
@given(
    sources(),
    st.sampled_from(ACTIVATIONS),
    st.lists(st.sampled_from(sorted(CHANGES)), max_size=2),
    st.sampled_from(sorted(MODES)),
)
def test_forwards(source: str, activation: Any, changes: list[str], mode: str) -> None:
    fused, plain = (made(source, activation, fuse) for fuse in (True, False))
    assert not KEPT or KEPT.clear() is None
    for change in ("nothing", *changes):
        for mlp in (fused, plain):
            torch.manual_seed(8)
            # A function has no hooks, and is not registered where a module was.
            with contextlib.suppress(TypeError, AttributeError):
                CHANGES[change](mlp)
        (found, facts), (expected, others) = (outcome(mlp, MODES[mode]) for mlp in (fused, plain))
        assert facts == others and found.keys() == expected.keys(), (source, change)
        for name, value in found.items():
            assert value.dtype == expected[name].dtype, (source, change, name)
            # In bfloat16, one op rounds less often than three layers.
            tolerance = 2**-4 if mode == "autocast" else 1e-9
            error, largest = (value - expected[name]).abs().max(), expected[name].abs().max()
            assert error <= tolerance * largest, (source, change, name, error, largest)
