"""Which modules are told to be gated MLPs: forms that are, and ever so slightly different ones that are not."""

from __future__ import annotations

import contextlib
import functools
import re
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stablelora_kernels.nn.mlp_form import Form, Projection, form_of
from tests.helpers.gated_mlps import INNER, MLP, WIDTH, Stacked

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
GATE, UP, DOWN = Projection("gate_proj"), Projection("up_proj"), Projection("down_proj")


def is_linear(module):
    return isinstance(module, nn.Linear)


def computing(forward, base=MLP, **attributes):
    """An MLP of an unknown class whose forward is ``forward``."""
    kind = type("Unknown", (base,), {"forward": forward})
    module = kind()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def swiglu(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@contextlib.contextmanager
def nothing():
    yield


def swallows(self, x):
    with contextlib.suppress(Exception):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return x


SAME = {
    "as in Llama": MLP.forward,
    "functional silu": swiglu,
    "in place": lambda self, x: self.down_proj(F.silu(self.gate_proj(x), inplace=True) * self.up_proj(x)),
    "factors exchanged": lambda self, x: self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x))),
    "torch.mul": lambda self, x: self.down_proj(torch.mul(self.act_fn(self.gate_proj(x)), self.up_proj(x))),
    "in a context": lambda self, x: [nothing().__enter__(), swiglu(self, x)][1],
    "optional arguments": lambda self, x, scale=None, *args, **kwargs: swiglu(self, x),
    "asks for a tensor": lambda self, x: swiglu(self, x) if isinstance(x, torch.Tensor) else x,
    "catches exceptions": swallows,
}


@pytest.mark.parametrize("forward", SAME.values(), ids=SAME)
def test_forms_that_are_the_same(forward):
    form = form_of(computing(forward), is_linear)
    assert isinstance(form, Form), form
    assert form[:4] == (GATE, UP, DOWN, "silu")
    assert form.argument == "x"


def clamps(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


def in_training(self, x):
    h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(F.dropout(h, 0.1) if self.training else h)


def other_in_training(self, x):
    act = F.silu if self.training else F.gelu
    return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


@torch.no_grad()
def without_gradients(self, x):
    return swiglu(self, x)


def detaches(self, x):
    with torch.no_grad():
        gate = self.gate_proj(x)
    return self.down_proj(self.act_fn(gate) * self.up_proj(x))


def without_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return swiglu(self, x)


def counts(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return swiglu(self, x)


def falls_back(self, x):
    with contextlib.suppress(BaseException):
        x = x.contiguous()
    return swiglu(self, x)


OTHER = {
    "clamp": (clamps, "calls clamp"),
    "factor": (lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) * 2), "something else"),
    "left factor": (lambda self, x: 2 * swiglu(self, x), "something else"),
    "sum": (lambda self, x: x + swiglu(self, x), "calls add$"),
    "residual in place": (lambda self, x: operator_iadd(swiglu(self, x), x), "calls add_"),
    "one more": (lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * (self.up_proj(x) + 1)), "calls add$"),
    "dropout": (in_training, "reads 'training', a bool, which may change unseen"),
    "another activation in training": (other_in_training, "reads 'training', a bool, which may change unseen"),
    "dropout in every mode": (lambda self, x: self.down_proj(F.dropout(F.silu(self.gate_proj(x)))), "calls dropout"),
    "another function": (lambda self, x: self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x)), "calls tanh"),
    "written out": (
        lambda self, x: self.down_proj(self.gate_proj(x) * torch.sigmoid(self.gate_proj(x)) * self.up_proj(x)),
        "calls sigmoid",
    ),
    "gate twice": (lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * self.gate_proj(x)), "something else"),
    "no gate": (lambda self, x: self.down_proj(F.silu(self.up_proj(x))), "something else"),
    "no down": (lambda self, x: F.silu(self.gate_proj(x)) * self.up_proj(x), "something else"),
    "up of up": (lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * F.silu(self.up_proj(x))), "something else"),
    "act for down": (lambda self, x: F.gelu(F.silu(self.gate_proj(x)) * self.up_proj(x)), "something else"),
    "act of down": (lambda self, x: F.silu(swiglu(self, x)), "something else"),
    "act of x": (lambda self, x: self.down_proj(F.silu(self.gate_proj(F.silu(x))) * self.up_proj(x)), "something else"),
    "a tuple": (lambda self, x: (swiglu(self, x), None), "something else"),
    "nothing": (lambda self, x: None, "something else"),
    "x itself": (lambda self, x: x, "something else"),
    "a weight": (lambda self, x: F.linear(x, self.gate_proj.weight), "reads 'gate_proj.weight', a Parameter"),
    "a shape": (lambda self, x: swiglu(self, x.view(-1, x.shape[-1])), "reads 'view' of a tensor|reads 'shape'"),
    "a value": (lambda self, x: swiglu(self, x) if x else x, "calls __bool__"),
    "a slice": (lambda self, x: swiglu(self, x[..., :3]), "calls __getitem__"),
    "no gradients": (without_gradients, "gradient or the autocast mode"),
    "gate without gradients": (detaches, "gradient or the autocast mode"),
    "its own autocast": (without_autocast, "gradient or the autocast mode"),
    "state": (counts, "changes its attributes"),
    "catches all": (falls_back, "calls contiguous"),
    "two tensors": (lambda self, x, weights: swiglu(self, x) * weights, "more than one tensor"),
    "keyword only": (lambda self, *, x: swiglu(self, x), "more than one tensor"),
    "no tensor": (lambda self: None, "more than one tensor"),
    "raises": (lambda self, x: [][0], r"can't be followed \(IndexError\)"),
    "a projection with an argument": (lambda self, x: self.down_proj(x, 1), "'down_proj' with more than one tensor"),
    "a parameter": (lambda self, x: swiglu(self, x) * self.factor, "something else"),
}  # fmt: skip


def operator_iadd(y, x):
    y += x
    return y


@pytest.mark.parametrize(("forward", "reason"), OTHER.values(), ids=OTHER)
def test_forms_that_differ(forward, reason):
    module = computing(forward, factor=nn.Parameter(torch.ones(())))
    found = form_of(module, is_linear)
    assert isinstance(found, str) and re.search(reason, found), found


ACTIVATIONS = {
    "silu": [nn.SiLU(), nn.SiLU(inplace=True), F.silu, transformers.activations.ACT2FN["silu"], "swish"],
    "gelu": [nn.GELU(), F.gelu, "gelu"],
    "gelu_tanh": [nn.GELU("tanh"), functools.partial(F.gelu, approximate="tanh"), "gelu_pytorch_tanh"],
    None: [
        nn.ReLU(), nn.Identity(), nn.Dropout(0.0), nn.Sigmoid(), nn.PReLU(), nn.Sequential(nn.SiLU()), torch.tanh,
        "relu2", "quick_gelu", "gelu_new", "gelu_10", "laplace", "gelu_python",
    ],
}  # fmt: skip
BY_ACTIVATION = [(activation, act) for activation, acts in ACTIVATIONS.items() for act in acts]


def name_of(activation, act):
    """The same in each of pytest-xdist's processes: a function's text has its address."""
    text = "partial" if isinstance(act, functools.partial) else getattr(act, "__name__", act)
    return f"{activation} by {text}"


@pytest.mark.parametrize(("activation", "act"), BY_ACTIVATION, ids=[name_of(*pair)[:60] for pair in BY_ACTIVATION])
def test_activations(activation, act):
    act = transformers.activations.ACT2FN[act] if isinstance(act, str) else act
    form = form_of(MLP(act), is_linear)
    if activation is None:
        assert isinstance(form, str)
        name = type(act).__name__ if isinstance(act, nn.Module) else act.__name__
        assert form in (
            f"it calls 'act_fn', a {name}; only SiLU and GELU (exact or tanh) are fused",
            f"it calls {name}",
        )
    else:
        assert form.activation == activation
        # Calls watch the type of a module, whose attributes have paths of their own, and a function itself.
        assert (dict(form.reads)["act_fn",] == (type(act),)) == isinstance(act, nn.Module)


def test_a_stacked_projection_has_either_half_first():
    gate_first, up_first = (form_of(Stacked(up_first), is_linear) for up_first in (False, True))
    assert gate_first.gate == Projection("gate_up_proj", 0) and gate_first.up == Projection("gate_up_proj", 1)
    assert up_first.gate == Projection("gate_up_proj", 1) and up_first.up == Projection("gate_up_proj", 0)
    assert gate_first.down == up_first.down == DOWN
    assert gate_first.activation == "gelu_tanh" and gate_first.argument == "hidden_states"


@pytest.mark.parametrize("cut", [
    lambda y: y.chunk(2), lambda y: y.chunk(3, dim=-1)[:2], lambda y: y.chunk(2, dim=1), lambda y: (y[..., :3], y[..., 3:]),
    lambda y: (y.chunk(2, dim=-1)[0],) * 2, lambda y: (y.chunk(2, dim=-1)[0], y), lambda y: (y, y.chunk(2, dim=-1)[1]),
])  # fmt: skip
def test_other_ways_of_cutting_are_refused(cut):
    def forward(self, x):
        gate, up = cut(self.gate_up_proj(x))
        return self.down_proj(F.silu(gate) * up)

    assert isinstance(form_of(computing(forward, Stacked), is_linear), str)


def test_torch_chunk_and_other_names():
    def forward(self, x):
        up, gate = torch.chunk(self.gate_up_proj(x), 2, -1)
        return self.down_proj(up * F.silu(gate))

    assert form_of(computing(forward, Stacked), is_linear).gate == Projection("gate_up_proj", 1)

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
    module, other = MLP(nn.ReLU()), MLP(nn.ReLU())
    assert isinstance(form_of(module, is_linear), str)
    module.forward = types.MethodType(swiglu, module)
    assert form_of(module, is_linear).activation == "silu"
    for forward in (types.MethodType(swiglu, other), lambda x: x, functools.partial(swiglu, module)):
        module.forward = forward
        assert form_of(module, is_linear) == "its forward was replaced (as accelerate's hooks do)"


# As in liger-kernel 0.5 to 0.8: the class, and a function of the module that holds activation and product.
LIGER = """
from torch import nn
class LigerSiLUMulFunction:
    def apply(*args): raise RuntimeError("no GPU")
LigerGELUMulFunction = LigerSiLUMulFunction
def _swiglu_dispatch(a, b, gate_multiplier=1.0, down_multiplier=1.0): raise RuntimeError("no GPU")
class Old(nn.Module):
    def forward(self, x):
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
class New(nn.Module):
    def forward(self, x): return self.down_proj(_swiglu_dispatch(self.gate_proj(x), self.up_proj(x)))
class Geglu(nn.Module):
    def forward(self, x): return self.down_proj(LigerGELUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
class Scaled(nn.Module):
    def forward(self, x): return self.down_proj(_swiglu_dispatch(self.gate_proj(x), self.up_proj(x), 2.0, 1.0))
class Phi3(nn.Module):
    def forward(self, x):
        up_states = self.gate_up_proj(x)
        gate, up_states = up_states.chunk(2, dim=-1)
        return self.down_proj(_swiglu_dispatch(gate, up_states))
"""


def test_forwards_like_ligers():
    liger = types.ModuleType("liger_kernel.transformers.swiglu")
    exec(LIGER, liger.__dict__)
    expected = {"Old": "silu", "New": "silu", "Geglu": "gelu_tanh", "Phi3": "silu", "Scaled": None}
    for name, activation in expected.items():
        form = form_of(computing(getattr(liger, name).forward, Stacked if name == "Phi3" else MLP), is_linear)
        if activation is None:
            assert form == "its forward can't be followed (TypeError)"
        else:
            assert form.activation == activation and ("act_fn",) not in dict(form.reads)
    # Functions of these names elsewhere are run, and raise.
    other = types.ModuleType("other")
    exec(LIGER, other.__dict__)
    assert form_of(computing(other.Old.forward), is_linear) == "its forward can't be followed (RuntimeError)"


def test_ligers_own_classes():
    swiglu = pytest.importorskip("liger_kernel.transformers.swiglu", reason="liger-kernel is not installed")
    geglu = pytest.importorskip("liger_kernel.transformers.geglu")
    config = transformers.LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=2)
    for kind, activation, stacked in (
        (swiglu.LigerSwiGLUMLP, "silu", False),
        (swiglu.LigerPhi3SwiGLUMLP, "silu", True),
        (geglu.LigerGEGLUMLP, "gelu_tanh", False),
    ):
        form = form_of(kind(config), is_linear)
        assert form.activation == activation and (form.gate.half == 0) == stacked
