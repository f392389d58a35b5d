"""Which forwards are gated MLPs: one table with its verdicts. What is fused computes the module's own numbers."""

from __future__ import annotations

import contextlib  # noqa: F401 (in sources)
import copy
import functools
import re
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint  # noqa: F401 (in sources)

from stablelora_kernels.nn.mlp_form import Form, Projection, form_of
from tests.helpers.gated_mlps import MLP, Stacked, assert_same, count_calls, rows, step, with_lora

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
silu, gelu = F.silu, F.gelu
BF16 = torch.autocast("cpu", torch.bfloat16)
Config = types.SimpleNamespace
KEPT: list[torch.Tensor] = []


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


def is_linear(module):
    return isinstance(module, nn.Linear)


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


class SwiGLU(torch.autograd.Function):
    """As many models have it; its backward may be anything."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate)
        return grad * up * s * (1 + gate * (1 - s)), grad * F.silu(gate)


def first(functions, x):
    return functions[0](x)


def squared(x):
    return x * x


def in_place(y, x):
    y += x
    return y


def forward_of(result, *lines, takes="self, x", decorator=""):
    """The forward that returns ``result``. g and u are the outputs of gate_proj and up_proj, d calls down_proj."""
    text = "\n".join((*lines, result))
    bound = [
        f"{name} = self.{layer}(x)"
        for name, layer in (("g", "gate_proj"), ("u", "up_proj"))
        if re.search(rf"\b{name}\b", text) and not re.search(rf"(?:^|: ){name} = ", "\n".join(lines))
    ]
    body = "\n    ".join([*bound, *lines, f"return {result}"])
    names: dict = dict(globals())
    exec(f"{decorator}\ndef forward({takes}):\n    " + re.sub(r"(?<![\w.])d\(", "self.down_proj(", body), names)
    return names["forward"]


def made(forward, base=MLP, change=lambda mlp: None, **attributes):
    torch.manual_seed(0)
    mlp = type("Unknown", (base,), {"forward": forward})().double()
    for name, value in attributes.items():
        setattr(mlp, name, copy.deepcopy(value))
    change(mlp)
    return mlp


def fused_and_not(forward, **more):
    return [with_lora(made(forward, **more), fuse) for fuse in (True, False)]


def asks(question):
    """A GELU where the answer is yes."""
    return (f"d((gelu if {question} else silu)(g) * u)",)


def scale(mlp):
    mlp.register_buffer("scale", torch.tensor(3.0, dtype=torch.float64))


# The source of each forward, what it gets, and the activation that it is fused with.
FUSED = {
    "as in Llama": (("d(self.act_fn(g) * u)",), {}, "silu"),
    "in place": (("d(silu(g, inplace=True) * u)",), {}, "silu"),
    "factors exchanged": (("d(u * self.act_fn(g))",), {}, "silu"),
    "torch.mul": (("d(torch.mul(self.act_fn(g), u))",), {}, "silu"),
    "in a context": (("d(silu(g) * u)", "with contextlib.nullcontext(): g = self.gate_proj(x)"), {}, "silu"),
    "optional arguments": (("d(silu(g) * u)",), {"takes": "self, x, scale=None, *args, **kwargs"}, "silu"),
    "asks for a tensor": (("d(silu(g) * u) if isinstance(x, torch.Tensor) else x",), {}, "silu"),
    "catches exceptions": (("d(h)", "with contextlib.suppress(Exception): h = silu(g) * u"), {}, "silu"),
    "asks for the type of x": (asks("type(x) is torch.Tensor"), {}, "gelu"),
    "asks for the type of a child": (asks("type(self.act_fn) is nn.SiLU"), {}, "gelu"),
    "asks for a buffer": (asks("hasattr(self, 'scale')"), {"change": scale}, "gelu"),
    "asks for no buffer": (asks("hasattr(self, 'scale')"), {}, "silu"),
    "asks its dictionary": (asks("'limit' in vars(self)"), {"limit": 1}, "gelu"),
    "reads from its dictionary": (asks("self.__dict__.get('limit') == 1"), {"limit": 1}, "gelu"),
    "asks for what nn.Module has too": (asks("self.type == 'gelu'"), {"type": "gelu"}, "gelu"),
    "asks a configuration": (asks("self.config.act == 'gelu'"), {"config": Config(act="gelu")}, "gelu"),
    "an activation in place": (("d(self.act_fn(g) * u)",), {"act_fn": nn.SiLU(inplace=True)}, "silu"),
    "gate in place": (("d(g * u)", "silu(g, inplace=True)"), {}, "silu"),
    "torch.chunk": (("d(b * silu(a))", "b, a = torch.chunk(self.gate_up_proj(x), 2, -1)"), {"base": Stacked}, "silu"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "more", "activation"), FUSED.values(), ids=FUSED)
def test_forwards_that_are_fused(source, more, activation, calls):
    more = dict(more)
    forward = forward_of(*source, **({"takes": more.pop("takes")} if "takes" in more else {}))
    (model, report), (plain, _) = fused_and_not(forward, **more)
    assert report.mlps[0].reason is None, report.mlps
    assert_same(step(model), step(plain))
    assert calls == [activation]


ELSE, GRADIENT = "something else", "gradient or the autocast mode"
TWICE = "more than one tensor"
SWIGLU = "d(silu(g) * u)"
REFUSED = {
    "clamp": (("d(self.act_fn(g.clamp(max=7)) * u)",), {}, "calls clamp"),
    "clamp for SiLU": (
        ("d(h)", "h = silu(g) * u", "if isinstance(self.act_fn, nn.SiLU): h = h.clamp(max=0.5)"), {}, "calls clamp",
    ),
    "factor": (("d(silu(g) * u * 2)",), {}, ELSE),
    "left factor": (("2 * d(silu(g) * u)",), {}, ELSE),
    "parameter": (("d(silu(g) * u) * self.factor",), {"factor": nn.Parameter(torch.ones(()))}, ELSE),
    "sum": (("x + d(silu(g) * u)",), {}, "calls add$"),
    "residual in place": (("in_place(d(silu(g) * u), x)",), {}, "calls add_"),
    "one more": (("d(silu(g) * (u + 1))",), {}, "calls add$"),
    "dropout": (("d(F.dropout(h, 0.1) if self.training else h)", "h = silu(g) * u"), {}, "reads 'training', a bool"),
    "another in training": (asks("self.training"), {}, "reads 'training', a bool, which may change unseen"),
    "another in evaluation": (("d(self.act_fn(g) * u)",), {"act_fn": ByMode()}, "it calls 'act_fn', a ByMode"),
    "dropout in every mode": (("d(F.dropout(silu(g)))",), {}, "calls dropout"),
    "another function": (("d(torch.tanh(g) * u)",), {}, "calls tanh"),
    "written out": (("d(g * torch.sigmoid(g) * u)",), {}, "calls sigmoid"),
    "square": (("d(squared(g) * u)",), {}, ELSE),
    "gate twice": (("d(silu(self.gate_proj(x)) * self.gate_proj(x))",), {}, ELSE),
    "called and dropped": ((SWIGLU, "self.gate_proj(x)"), {}, ELSE),
    "no gate": (("d(silu(u))",), {}, ELSE),
    "no down": (("silu(g) * u",), {}, ELSE),
    "up of up": (("d(silu(g) * silu(u))",), {}, ELSE),
    "act for down": (("gelu(silu(g) * u)",), {}, ELSE),
    "act of down": (("silu(d(silu(g) * u))",), {}, ELSE),
    "act of x": (("d(silu(self.gate_proj(silu(x))) * u)",), {}, ELSE),
    "a tuple": (("(d(silu(g) * u), None)",), {}, ELSE),
    "nothing": (("None",), {}, ELSE),
    "x itself": (("x",), {}, ELSE),
    "weight": (("F.linear(x, self.gate_proj.weight)",), {}, "reads 'gate_proj.weight', a Parameter"),
    "reads a projection": (asks("self.gate_proj.bias is None"), {}, "reads 'gate_proj.bias', a NoneType, which may change"),
    "shape": ((SWIGLU, "x = x.view(-1, x.shape[-1])"), {}, "reads 'view' of a tensor|reads 'shape'|reads 'view'"),
    "value": (("d(silu(g) * u) if x else x",), {}, "calls __bool__"),
    "slice": (("d(silu(self.gate_proj(x[..., :3])) * u)",), {}, "calls __getitem__"),
    "no gradients": ((SWIGLU,), {"decorator": "@torch.no_grad()"}, GRADIENT),
    "gate without gradients": ((SWIGLU, "with torch.no_grad(): g = self.gate_proj(x)"), {}, GRADIENT),
    "its own autocast": (("h", "with torch.autocast('cpu', torch.bfloat16): h = d(silu(g) * u)"), {}, GRADIENT),
    "autocast off inside": (
        ("h", "with torch.autocast('cpu', enabled=False): h = d(silu(g) * u)"), {"context": BF16}, GRADIENT,
    ),
    "autograd function": (("d(SwiGLU.apply(g, u))",), {}, GRADIENT),
    "reentrant checkpoint": (
        ("d(checkpoint(lambda g, u: silu(g) * u, g, u, use_reentrant=True))",), {}, "of a tensor|gradient or",
    ),
    "counts": ((SWIGLU, "self.count += 1"), {"count": 0}, "can't be followed|changes its attributes"),
    "counts anew": ((SWIGLU, "self.calls = getattr(self, 'calls', 0) + 1"), {}, "changes its attributes"),
    "counts elsewhere": ((SWIGLU, "self.config.count += 1"), {"config": Config(count=0)}, "changes its attributes"),
    "keeps its product": (("d(h)", "h = silu(g) * u", "self.kept.append(h)"), {"kept": []}, "reads 'kept', a list, which may"),
    "keeps it elsewhere": (("d(h)", "h = silu(g) * u", "KEPT.append(h)"), {}, "keeps a tensor"),
    "catches all": ((SWIGLU, "with contextlib.suppress(BaseException): x = x.contiguous()"), {}, "calls contiguous"),
    "two tensors": (("d(silu(g) * u) * weights",), {"takes": "self, x, weights"}, TWICE),
    "keyword only": ((SWIGLU,), {"takes": "self, *, x"}, TWICE),
    "no tensor": (("None",), {"takes": "self"}, TWICE),
    "raises": (("[][0]",), {}, r"can't be followed \(IndexError\)"),
    "a projection with an argument": (("self.down_proj(x, 1)",), {}, "'down_proj' with more than one tensor"),
    "getattr of a buffer": (
        ("d(h)", "h = silu(g) * u", "h = h * self.scale if getattr(self, 'scale', None) is not None else h"),
        {"change": scale}, ELSE,
    ),
    "hasattr of a buffer": (
        ("d(h)", "h = silu(g) * u", "h = h * self.scale if hasattr(self, 'scale') else h"), {"change": scale}, "else",
    ),
    "all children": (asks("all(isinstance(m, nn.Module) for m in self._modules.values())"), {}, "'_modules', a dict"),
    "asks for autocast": (asks("torch.is_autocast_enabled('cpu')"), {"context": BF16}, ELSE),
    "asks for gradients": (asks("not torch.is_grad_enabled()"), {"context": torch.no_grad()}, ELSE),
    "in inference": (asks("torch.is_inference_mode_enabled()"), {"context": torch.inference_mode()}, ELSE),
    "up in place": ((SWIGLU, "silu(u, inplace=True)"), {}, ELSE),
    "module in place": (("d(self.act_fn(g) * u)", "self.act_fn(u)"), {"act_fn": nn.SiLU(inplace=True)}, ELSE),
    "gate in place after its use": (("d(h)", "h = silu(g) * u", "silu(g, inplace=True)"), {}, ELSE),
    "x in place": (("d(h)", "h = silu(g) * u", "silu(x, inplace=True)"), {}, ELSE),
    "in place without gradients": (("d(g * u)", "with torch.no_grad(): silu(g, inplace=True)"), {}, "gradient or"),
    "lists its dictionary": (asks("'limit' in list(vars(self))"), {"limit": 1}, "lists its attributes"),
    "counts its dictionary": (asks("len(vars(self)) > 2"), {}, "lists its attributes"),
    "unpacks its dictionary": (asks("'limit' in {**vars(self)}"), {"limit": 1}, "lists its attributes"),
    "a list in a partial": (("d(self.act(g) * u)",), {"act": functools.partial(first, [F.silu])}, "reads 'act', a partial"),
    "closure": (("d(self.act(g) * u)",), {"act": (lambda c: lambda x: c[0](x))([F.silu])}, "reads 'act', a function"),
}  # fmt: skip
CUTS = {
    "rows": "y.chunk(2)", "three parts": "y.chunk(3, dim=-1)[:2]", "tokens": "y.chunk(2, dim=1)",
    "by slices": "(y[..., :3], y[..., 3:])", "one half twice": "(y.chunk(2, dim=-1)[0],) * 2",
    "a half and all": "(y.chunk(2, dim=-1)[0], y)", "all and a half": "(y, y.chunk(2, dim=-1)[1])",
}  # fmt: skip
REFUSED |= {
    f"cut: {name}": (("d(silu(a) * b)", "y = self.gate_up_proj(x)", f"a, b = {cut}"), {"base": Stacked}, "")
    for name, cut in CUTS.items()
}


def outcome(model):
    torch.manual_seed(3)
    try:
        y = model["mlp"](rows().detach().clone())
    except Exception as error:
        return type(error)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize(("source", "more", "reason"), REFUSED.values(), ids=REFUSED)
def test_forwards_that_are_refused(source, more, reason, calls):
    more = dict(more)
    context = more.pop("context", torch.enable_grad())
    forward = forward_of(*source, **{name: more.pop(name) for name in ("takes", "decorator") if name in more})
    (model, report), (plain, _) = fused_and_not(forward, **more)
    KEPT.clear()
    said = report.mlps[0].reason
    assert said is not None and re.search(reason, said) and "NameError" not in said, report.mlps
    for training in (True, False):
        with context:
            found, expected = (outcome(each.train(training)) for each in (model, plain))
        torch.testing.assert_close(found, expected) if isinstance(found, torch.Tensor) else None
        assert isinstance(found, torch.Tensor) or found is expected
    assert calls == []


ACTIVATIONS = {
    "silu": [nn.SiLU(), nn.SiLU(inplace=True), F.silu, transformers.activations.ACT2FN["silu"], "swish"],
    "gelu": [nn.GELU(), F.gelu, "gelu"],
    "gelu_tanh": [nn.GELU("tanh"), functools.partial(F.gelu, approximate="tanh"), "gelu_pytorch_tanh"],
    None: [
        nn.ReLU(), nn.Identity(), nn.Dropout(0.0), nn.Sigmoid(), nn.PReLU(), nn.Sequential(nn.SiLU()), torch.tanh,
        "relu2", "quick_gelu", "gelu_new", "gelu_10", "laplace", "gelu_python",
    ],
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    for act in ACTIVATIONS[activation]:
        act = transformers.activations.ACT2FN[act] if isinstance(act, str) else act
        form = form_of(MLP(act), is_linear)
        if activation is None:
            name = type(act).__name__ if isinstance(act, nn.Module) else act.__name__
            called = f"it calls 'act_fn', a {name}; only SiLU and GELU (exact or tanh) are fused"
            assert form == (called if isinstance(act, nn.Module) else f"it calls {name}")
        else:
            assert form.activation == activation, act
            # Calls watch the type of a module, whose attributes have paths of their own, and a function itself.
            assert (dict(form.reads)["act_fn",] == (type(act),)) == isinstance(act, nn.Module), act


def test_names_halves_and_arguments():
    gate_first, up_first = (form_of(Stacked(up_first), is_linear) for up_first in (False, True))
    assert gate_first.gate == up_first.up == Projection("gate_up_proj", 0)
    assert up_first.gate == gate_first.up == Projection("gate_up_proj", 1)
    assert gate_first.down == up_first.down == Projection("down_proj")
    assert gate_first.activation == "gelu_tanh" and gate_first.argument == "hidden_states"

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, states):
            return self.w2(F.silu(self.w1(states)) * self.w3(states))

    assert form_of(Other(), is_linear)[:4] == (Projection("w1"), Projection("w3"), Projection("w2"), "silu")


def test_nothing_is_touched():
    """No hook runs, no random number is drawn, nothing is computed: the meta device, training mode and attributes stay."""
    with torch.device("meta"):
        module = MLP()
    ran = []
    for part in module.modules():
        part.register_forward_hook(lambda *args: ran.append(args))
        part.register_forward_pre_hook(lambda *args: ran.append(args))
    before, state = {key: dict(part.__dict__) for key, part in module.named_modules()}, torch.get_rng_state()
    assert isinstance(form_of(module, is_linear), Form)
    assert ran == [] and torch.equal(state, torch.get_rng_state())
    assert {key: dict(part.__dict__) for key, part in module.named_modules()} == before


def test_forwards_bound_to_the_instance():
    """As Liger patches a model that exists; a bound one of another module, or a function, may do anything."""
    swiglu, module, other = forward_of(SWIGLU), MLP(nn.ReLU()), MLP(nn.ReLU())
    assert isinstance(form_of(module, is_linear), str)
    module.forward = types.MethodType(swiglu, module)
    assert form_of(module, is_linear).activation == "silu"
    for forward in (types.MethodType(swiglu, other), lambda x: x, functools.partial(swiglu, module)):
        module.forward = forward
        assert form_of(module, is_linear) == "its forward was replaced (as accelerate's hooks do)"


# As in liger-kernel 0.5 to 0.8: the class, and a function of the module that holds activation and product.
LIGER = """
class LigerSiLUMulFunction:
    def apply(*args): raise RuntimeError("no GPU")
LigerGELUMulFunction = LigerSiLUMulFunction
def _swiglu_dispatch(a, b, gate_multiplier=1.0, down_multiplier=1.0): raise RuntimeError("no GPU")
def old(self, x): return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
def new(self, x): return self.down_proj(_swiglu_dispatch(self.gate_proj(x), self.up_proj(x)))
def geglu(self, x): return self.down_proj(LigerGELUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
def scaled(self, x): return self.down_proj(_swiglu_dispatch(self.gate_proj(x), self.up_proj(x), 2.0, 1.0))
def phi3(self, x):
    gate, up_states = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(_swiglu_dispatch(gate, up_states))
"""


@pytest.mark.parametrize(
    ("name", "activation"), {"old": "silu", "new": "silu", "geglu": "gelu_tanh", "phi3": "silu", "scaled": None}.items()
)
def test_forwards_like_ligers(name, activation):
    def of(library):
        module = types.ModuleType(library)
        exec(LIGER, module.__dict__)
        return form_of(made(getattr(module, name), Stacked if name == "phi3" else MLP), is_linear)

    form = of("liger_kernel.transformers.swiglu")
    if activation is None:
        assert form == "its forward can't be followed (TypeError)"
    else:
        assert form.activation == activation and ("act_fn",) not in dict(form.reads)
    # Functions of these names elsewhere are run, and raise.
    assert of("other") == "its forward can't be followed (RuntimeError)"


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
        "y if self.post is None else self.post(y)",
        "h = self.act_fn(g) * u",
        "if self.limit is not None: h = h.clamp(-self.limit, self.limit)",
        "if self.config.scale != 1: h = h * self.config.scale",
        "y = d(h)",
    )
    (model, _), (plain, _) = fused_and_not(forward, act_fn=Act(), limit=None, post=None, config=Config(scale=1.0))
    for other in (model, copy.deepcopy(model)):
        assert_same(step(other), step(plain))
    assert calls == ["silu"] * 2
    for each in (model, plain):
        change(each["mlp"])
    assert_same(step(model), step(plain), 0.0)
    assert calls == ["silu"] * 2
