"""Which forwards are gated MLPs: one table with its verdicts. What is fused computes the module's
own numbers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint  # noqa: F401 (in sources)

from stablelora_kernels import activations
from stablelora_kernels.reference.lora import ACTIVATION_REFS, activation_ref
from tests.helpers.architectures import transformers
from tests.helpers.gated_mlps import INNER, MLP, WIDTH, adapted, assert_same, rows, step

silu, gelu = F.silu, F.gelu
Config = types.SimpleNamespace
KEPT: list[torch.Tensor] = []


class Act(nn.Module):
    """An activation whose function is an attribute."""

    fancy = None

    def __init__(self, function=F.silu) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return (self.fancy or self.function)(x)


class ByMode(Act):
    def forward(self, x):
        return self.function(x) if self.training else F.gelu(x)


class Twice(torch.autograd.Function):
    """Its gradient is not that of what it computes."""

    @staticmethod
    def forward(ctx, h):
        return h * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Unknown(MLP):
    """With all that the forwards ask for."""

    def __init__(self, act=None) -> None:
        super().__init__(act)
        self.gate_up_proj = nn.Linear(WIDTH, 2 * INNER, False)
        self.in_place = nn.SiLU(inplace=True)
        self.post = None
        self.gain = nn.Parameter(torch.ones(()))
        self.limit = None
        self.flag = False
        self.factor = 2.0
        self.count = 0
        self.kept = []
        self.type = "silu"
        self.config = Config(act="gelu", count=0, scale=1.0)
        self.register_buffer("mean", torch.tensor(3.0))


def squared(x):
    return x * x


def in_place(y, x):
    y += x
    return y


def forward_of(source, module=__name__):
    """A forward in ``module`` of ``source``'s lines, at first a decorator or the arguments. g is
    gate_proj's, u up_proj's, d calls down_proj.
    """
    lines = [source] if isinstance(source, str) else [*source]
    decorator = lines.pop(0) if lines[0].startswith("@") else ""
    takes = lines.pop(0) if re.match("self(,|$)", lines[0]) else "self, x"
    text = "\n".join(lines)
    bound = [
        f"{name} = self.{layer}(x)"
        for name, layer in (("g", "gate_proj"), ("u", "up_proj"))
        if re.search(rf"\b{name}\b", text)
        and not re.search(rf"(?:^|: ){name} = ", text, re.MULTILINE)
    ]
    body = "\n    ".join([*bound, *lines[:-1], f"return {lines[-1]}"])
    names: dict = globals() | {"__name__": module}
    exec(
        f"{decorator}\ndef forward({takes}):\n    "
        + re.sub(r"(?<![\w.])d\(", "self.down_proj(", body),
        names,
    )
    return names["forward"]


def made(forward, act=None, fuse=True, base=Unknown):
    """The model and the report."""
    torch.manual_seed(0)
    return adapted(
        type("Mine", (base,), {"forward": forward})(copy.deepcopy(act)).double(), fuse=fuse
    )


def verdict(model, report):
    """The activation of the op, or the reason against it."""
    (mlp,) = report.mlps
    return mlp.activation if mlp.reason is None else mlp.reason


def asks(question):
    """A GELU where the answer is yes."""
    return f"d((gelu if {question} else silu)(g) * u)"


SWIGLU = "d(silu(g) * u)"
FUSED = {
    "silu": [
        "d(u * self.act_fn(g))", "d(torch.mul(self.act_fn(g), u))", "d(silu(g) * u) if isinstance(x, torch.Tensor) else x",
        "d(self.in_place(g) * u)", ("silu(g, inplace=True)", "d(g * u)"), asks("hasattr(self, 'other')"),
        ("with contextlib.suppress(Exception): h = silu(g) * u", "d(h)"),
        ("b, a = torch.chunk(self.gate_up_proj(x), 2, -1)", "d(b * silu(a))"),
        ("self, x, scale=None, *args, **kwargs", SWIGLU),
    ],
    "gelu": [
        asks("type(x) is torch.Tensor"), asks("type(self.act_fn) is nn.SiLU"), asks("hasattr(self, 'mean')"),
        asks("'limit' in vars(self)"), asks("self.config.act == 'gelu'"),
    ],
}  # fmt: skip
HALVES = ("y = self.gate_up_proj(x)", "d(silu(a) * b)")
CUTS = [
    "y.chunk(2)", "y.chunk(2, dim=1)", "y.chunk(3, dim=-1)[:2]", "(y[..., :3], y[..., 3:])", "(y.chunk(2, dim=-1)[0], y)",
]  # fmt: skip
REFUSED = {
    "calls (clamp|add_|dropout|sigmoid|__bool__|__getitem__|contiguous)$": [
        "d(self.act_fn(g.clamp(max=7)) * u)", "in_place(d(silu(g) * u), x)", "d(F.dropout(silu(g)))",
        ("h = silu(g) * u", "if isinstance(self.act_fn, nn.SiLU): h = h.clamp(max=0.5)", "d(h)"),
        "d(g * torch.sigmoid(g) * u)", "d(silu(g) * u) if x else x", "d(silu(self.gate_proj(x[..., :3])) * u)",
        ("with contextlib.suppress(BaseException): x = x.contiguous()", SWIGLU),
    ],
    "something else": [
        "d(silu(g) * u * 2)", "2 * d(silu(g) * u)", "d(silu(g) * u) * self.gain", "d(squared(g) * u)",
        "d(silu(self.gate_proj(x)) * self.gate_proj(x))", ("self.gate_proj(x)", SWIGLU), "silu(g) * u",
        "d(silu(g) * silu(u))", "silu(d(silu(g) * u))", "d(silu(self.gate_proj(silu(x))) * u)", "(d(silu(g) * u), None)",
        asks("torch.is_autocast_enabled('cpu')"), asks("not torch.is_grad_enabled()"),
        asks("torch.is_inference_mode_enabled()"), ("silu(u, inplace=True)", SWIGLU),
        ("h = silu(g) * u", "silu(g, inplace=True)", "d(h)"), ("h = silu(g) * u", "silu(x, inplace=True)", "d(h)"),
        ("h = silu(g) * u", "h = h * self.mean if hasattr(self, 'mean') else h", "d(h)"),
        ("a, b = self.gate_up_proj(x).chunk(2, -1)", "d(silu(a, inplace=True) * b)"),
    ],
    "reads '[a-z_.]+', an? .+, which may change unseen": [
        ("h = silu(g) * u", "d(F.dropout(h, 0.1) if self.training else h)"), "F.linear(x, self.gate_proj.weight)",
        ("h = silu(g) * u", "self.kept.append(h)", "d(h)"),
    ],
    "reads '(view|shape)'": [("x = x.view(-1, x.shape[-1])", SWIGLU)],
    "takes more than one tensor": [("self, x, weights", SWIGLU)],
    "gradient or the autocast mode|of a tensor": [
        ("@torch.no_grad()", SWIGLU), "d(Twice.apply(silu(g) * u))",
        ("with torch.autocast('cpu', torch.bfloat16): h = d(silu(g) * u)", "h"),
        ("with torch.no_grad(): silu(g, inplace=True)", "d(g * u)"),
        "d(checkpoint(lambda g, u: silu(g) * u, g, u, use_reentrant=True))",
    ],
    "changes its attributes|can't be followed": [
        ("self.count += 1", SWIGLU), ("self.config.count += 1", SWIGLU), "[][0]",
    ],
    "keeps a tensor": [("h = silu(g) * u", "KEPT.append(h)", "d(h)")],
    "lists its attributes": [asks("len(vars(self)) > 2")],
    "'down_proj' with more than one tensor": ["self.down_proj(x, 1)"],
    "": [(HALVES[0], f"a, b = {cut}", HALVES[1]) for cut in CUTS],
}  # fmt: skip
TABLE = [(source, activation, None) for activation, sources in FUSED.items() for source in sources]
TABLE += [(source, None, reason) for reason, sources in REFUSED.items() for source in sources]


@pytest.mark.parametrize(
    ("source", "activation", "reason"), TABLE, ids=lambda value: str(value)[:70]
)
def test_forwards(source, activation, reason, calls):
    """The report has the verdict; what is fused is one op of the module's own numbers."""
    (model, report), (plain, _) = (made(forward_of(source), fuse=fuse) for fuse in (True, False))
    KEPT.clear()
    found = verdict(model, report)
    if activation is None:
        assert re.search(reason, found) and "NameError" not in found and found not in FUSED
        with contextlib.suppress(Exception):
            model(rows())
        assert calls.mlps == []
    else:
        assert found == activation
        assert_same(step(model), step(plain))
        assert calls.mlps == [activation]


ACTIVATIONS = {
    "silu": [nn.SiLU(), nn.SiLU(inplace=True), F.silu, "silu", Act()],
    "gelu": [nn.GELU(), "gelu"],
    "gelu_tanh": [nn.GELU("tanh"), functools.partial(F.gelu, approximate="tanh"), "gelu_pytorch_tanh"],
    f"it calls 'act_fn', a .*; only {activations.TITLES} are fused": [
        nn.ReLU(), nn.Dropout(0.0), nn.Sequential(nn.SiLU()), ByMode(), "quick_gelu", "gelu_new", "gelu_10",
    ],
    "reads 'act_fn', a (partial|function)": [
        functools.partial(lambda functions, x: functions[0](x), [F.silu]), (lambda c: lambda x: c[0](x))([F.silu]),
    ],
}  # fmt: skip


def test_every_activation_has_a_reference_of_its_own():
    """The tables of activations have the same names; values and gradients are the reference's."""
    assert activations.ACTIVATIONS.keys() == ACTIVATION_REFS.keys()
    for name, activation in activations.ACTIVATIONS.items():
        g = torch.linspace(-6, 6, 241, dtype=torch.float64, requires_grad=True)
        expected = activation_ref(g, name)
        (slope,) = torch.autograd.grad(expected.sum(), g)
        torch.testing.assert_close(activation.forward(g), expected)
        torch.testing.assert_close(activation.backward(torch.ones_like(g), g), slope)
        assert activation.title in activations.TITLES
        # What this module's tests recognize it by.
        assert ACTIVATIONS[name]
    with pytest.raises(KeyError, match="no such name"):
        activation_ref(g, "no such name")


@pytest.mark.parametrize("expected", ACTIVATIONS)
def test_activations(expected):
    for act in ACTIVATIONS[expected]:
        act = transformers.activations.ACT2FN[act] if isinstance(act, str) else act
        assert re.fullmatch(
            f"(.*{expected}.*)" if " " in expected else expected, verdict(*adapted(MLP(act)))
        ), act


def test_nothing_is_touched():
    """No hook runs, no random number is drawn, nothing is computed: the meta device, training mode
    and attributes stay.
    """
    ran, found = [], []
    for fuse in (True, False):
        with torch.device("meta"):
            module = MLP()
        for part in (module, module.act_fn):
            part.register_forward_hook(lambda *args: ran.append(args))
            part.register_forward_pre_hook(lambda *args: ran.append(args))
        act = dict(module.act_fn.__dict__)
        assert adapted(module, fuse=fuse)[0].training and module.act_fn.__dict__ == act
        found.append(torch.get_rng_state())
    assert ran == [] and torch.equal(*found)


def test_forwards_bound_to_the_instance():
    """A bound one of another module, or a function, may do anything; what Liger binds is in
    test_fused_mlp.py.
    """
    swiglu, other = forward_of(SWIGLU), MLP(nn.ReLU())
    for forward in (types.MethodType(swiglu, other), lambda x: x):
        module = MLP(nn.ReLU())
        module.forward = forward
        assert verdict(*adapted(module)) == "its forward was replaced (as accelerate's hooks do)"


# As liger-kernel 0.5 to 0.8 call activation and product.


def _swiglu_dispatch(gate, up, gate_multiplier=1.0, down_multiplier=1.0):
    raise RuntimeError("no GPU")


class LigerSiLUMulFunction:
    apply = staticmethod(_swiglu_dispatch)


LigerGELUMulFunction = LigerSiLUMulFunction
BY_LIGER = {
    "d(LigerSiLUMulFunction.apply(g, u))": "silu",
    "d(_swiglu_dispatch(g, u))": "silu",
    "d(LigerGELUMulFunction.apply(g, u))": "gelu_tanh",
    "d(_swiglu_dispatch(*self.gate_up_proj(x).chunk(2, dim=-1)))": "silu",
    "d(_swiglu_dispatch(g, u, 2.0, 1.0))": "its forward can't be followed (TypeError)",
}


@pytest.mark.parametrize("source", BY_LIGER)
def test_forwards_like_ligers(source):
    forward = forward_of(source, module="liger_kernel.transformers.swiglu")
    assert verdict(*made(forward)) == BY_LIGER[source]
    # Functions of these names elsewhere are run, and raise.
    assert verdict(*made(forward_of(source))) == "its forward can't be followed (RuntimeError)"


def test_a_partials_keywords_are_compared(calls):
    tanh, exact = (functools.partial(gelu, approximate=name) for name in ("tanh", "none"))
    models = [made(forward_of("d(self.act_fn(g) * u)"), tanh, fuse)[0] for fuse in (True, False)]
    for act_fn, tolerance in ((tanh, 1e-10), (exact, 0.0)):
        for model in models:
            model["mlp"].act_fn = act_fn
        assert_same(*map(step, models), tolerance)
        # Only the first was recognized.
        assert calls.mlps == ["gelu_tanh"]


CHANGES = {
    "another module of the same class": lambda mlp: setattr(mlp, "act_fn", Act(F.gelu)),
    "its function": lambda mlp: setattr(mlp.act_fn, "function", F.gelu),
    "in place of the class's": lambda mlp: setattr(mlp.act_fn, "fancy", F.gelu),
    "another limit": lambda mlp: setattr(mlp, "limit", 0.1),
    "a child": lambda mlp: setattr(mlp, "post", nn.Tanh()),
    "the configuration": lambda mlp: setattr(mlp.config, "scale", 2.0),
    "another configuration": lambda mlp: setattr(mlp, "config", Config(scale=2.0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_after_the_recognition(change, calls):
    forward = forward_of(
        (
            "h = self.act_fn(g) * u",
            "if self.limit is not None: h = h.clamp(-self.limit, self.limit)",
            "if self.config.scale != 1: h = h * self.config.scale",
            "y = d(h)",
            "y if self.post is None else self.post(y)",
        )
    )
    (model, _), (plain, _) = (made(forward, Act(), fuse) for fuse in (True, False))
    for other in (model, copy.deepcopy(model)):
        assert_same(step(other), step(plain))
    assert calls.mlps == ["silu"] * 2
    for each in (model, plain):
        change(each["mlp"])
    assert_same(step(model), step(plain), 0.0)
    assert calls.mlps == ["silu"] * 2
