"""Forwards that fooled an earlier recognition: what is fused computes the module's own numbers, the rest is refused."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import re
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from tests.helpers.gated_mlps import MLP, assert_same, count_calls, rows, step, with_lora

BF16 = torch.autocast("cpu", torch.bfloat16)
KEPT: list[torch.Tensor] = []


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


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


def pair(forward, change=lambda mlp: None, **attributes):
    """An MLP with this forward and these attributes, fused and not."""
    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        mlp = type("Unknown", (MLP,), {"forward": forward})().double()
        for name, value in attributes.items():
            setattr(mlp, name, copy.deepcopy(value))
        change(mlp)
        models.append(with_lora(mlp, fuse))
    return models


def of(gate="silu", up="", product="", before="", after=""):
    """The source of a forward: of its functions, and of statements before and after the product h."""
    lines = ["g, u = self.gate_proj(x), self.up_proj(x)", before, f"h = {gate}(g) * {up}(u){product}", after]
    source = "\n    ".join(["def forward(self, x):", *filter(None, lines), "return self.down_proj(h)"])
    variables = globals() | {"silu": F.silu, "gelu": F.gelu, "checkpoint": checkpoint}
    exec(source.replace(" (u)", " u"), variables)
    return variables["forward"]


def asks(question, **more):
    """A forward that computes a GELU where the answer is yes."""
    return of(f"(gelu if {question} else silu)", **more)


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return MLP.forward(self, x)


def first(functions, x):
    return functions[0](x)


def squared(x):
    return x * x


def scale(mlp):
    mlp.register_buffer("scale", torch.tensor(3.0, dtype=torch.float64))


REFUSED = {
    "autograd function": (
        lambda self, x: self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x))), {}, "gradient or the autocast mode",
    ),
    "reentrant checkpoint": (
        of(after="h = checkpoint(lambda g, u: silu(g) * u, g, u, use_reentrant=True)"), {}, "of a tensor|gradient or",
    ),
    "getattr of a buffer": (
        asks("getattr(self, 'scale', None) is not None", after="h = h * self.scale"), {"change": scale}, "something else",
    ),
    "hasattr of a buffer": (of(after="h = h * self.scale if hasattr(self, 'scale') else h"), {"change": scale}, "else"),
    "a clamp for SiLU": (of(after="if isinstance(self.act_fn, nn.SiLU): h = h.clamp(max=0.5)"), {}, "calls clamp"),
    "all children": (asks("all(isinstance(m, nn.Module) for m in self._modules.values())"), {}, "'_modules', a dict"),
    "autocast off inside": (without_autocast, {"context": BF16}, "gradient or the autocast mode"),
    "asks for autocast": (asks("torch.is_autocast_enabled('cpu')"), {"context": BF16}, "something else"),
    "asks for gradients": (asks("not torch.is_grad_enabled()"), {"context": torch.no_grad()}, "something else"),
    "in inference": (asks("torch.is_inference_mode_enabled()"), {"context": torch.inference_mode()}, "something else"),
    "function in place": (of(before="silu(u, inplace=True)"), {}, "something else"),
    "module in place": (of(before="self.act_fn(u)"), {"act_fn": nn.SiLU(inplace=True)}, "something else"),
    "another activation in evaluation": (MLP.forward, {"act_fn": ByMode()}, "it calls 'act_fn', a ByMode"),
    "gate in place after its use": (of(after="silu(g, inplace=True)"), {}, "something else"),
    "x in place": (of(after="silu(x, inplace=True)"), {}, "something else"),
    "in place without gradients": (of(before="with torch.no_grad(): silu(g, inplace=True)", gate=""), {}, "gradient or"),
    "keeps its product": (of(after="self.kept.append(h)"), {"kept": []}, "reads 'kept', a list, which may change"),
    "keeps it elsewhere": (of(after="KEPT.append(h)"), {}, "keeps a tensor"),
    "counts": (of(after="self.count += 1"), {"count": 0}, "can't be followed|changes its attributes"),
    "counts elsewhere": (
        of(after="self.config.count += 1"), {"config": types.SimpleNamespace(count=0)}, "changes its attributes",
    ),
    "lists its dictionary": (asks("'limit' in list(vars(self))"), {"limit": 1}, "lists its attributes"),
    "counts its dictionary": (asks("len(vars(self)) > 2"), {}, "lists its attributes"),
    "unpacks its dictionary": (asks("'limit' in {**vars(self)}"), {"limit": 1}, "lists its attributes"),
    "a list in a partial": (of("self.act"), {"act": functools.partial(first, [F.silu])}, "reads 'act', a partial"),
    "a square": (lambda self, x: self.down_proj(squared(self.gate_proj(x)) * self.up_proj(x)), {}, "something else"),
    "reads a projection": (asks("self.gate_proj.bias is None"), {}, "reads 'gate_proj.bias', a NoneType, which may change"),
    "calls one twice": (of(before="self.gate_proj(x)"), {}, "something else"),
    "closure": (of("self.act"), {"act": (lambda c: lambda x: c[0](x))([F.silu])}, "reads 'act', a function"),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "more", "reason"), REFUSED.values(), ids=REFUSED)
def test_forwards_that_fooled_it_are_refused(forward, more, reason, calls):
    context = more.get("context", torch.enable_grad())
    (model, report), (plain, _) = pair(forward, **{k: v for k, v in more.items() if k != "context"})
    assert KEPT.clear() is None and re.search(reason, report.mlps[0].reason or ""), report.mlps
    for training in (True, False):
        with context:
            results = [each.train(training)["mlp"](rows().detach().clone()) for each in (model, plain)]
        torch.testing.assert_close(*results)
    assert calls == []


SAME = {
    "asks for the type of x": (asks("type(x) is torch.Tensor"), {}, "gelu"),
    "asks for the type of a child": (asks("type(self.act_fn) is nn.SiLU"), {}, "gelu"),
    "asks for a buffer": (asks("hasattr(self, 'scale')"), {"change": scale}, "gelu"),
    "asks for no buffer": (asks("hasattr(self, 'scale')"), {}, "silu"),
    "asks its dictionary": (asks("'limit' in vars(self)"), {"limit": 1}, "gelu"),
    "reads from its dictionary": (asks("self.__dict__.get('limit') == 1"), {"limit": 1}, "gelu"),
    "asks for what nn.Module has too": (asks("self.type == 'gelu'"), {"type": "gelu"}, "gelu"),
    "asks a configuration": (asks("self.config.act == 'gelu'"), {"config": types.SimpleNamespace(act="gelu")}, "gelu"),
    "an activation in place": (of("self.act_fn"), {"act_fn": nn.SiLU(inplace=True)}, "silu"),
    "gate in place": (of(before="silu(g, inplace=True)", gate=""), {}, "silu"),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "more", "activation"), SAME.values(), ids=SAME)
def test_real_answers(forward, more, activation, calls):
    (model, _), (plain, _) = pair(forward, **more)
    assert_same(step(model), step(plain))
    assert calls == [activation]


def changeable(self, x):
    h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    if self.limit is not None:
        h = h.clamp(-self.limit, self.limit)
    if self.config.scale != 1:
        h = h * self.config.scale
    y = self.down_proj(h)
    return y if self.post is None else self.post(y)


CHANGES = {
    "another module of the same class": lambda mlp: setattr(mlp, "act_fn", Act(F.gelu)),
    "its function": lambda mlp: setattr(mlp.act_fn, "function", F.gelu),
    "in place of the class's": lambda mlp: setattr(mlp.act_fn, "fancy", F.gelu),
    "another limit": lambda mlp: setattr(mlp, "limit", 0.1),
    "a child": lambda mlp: setattr(mlp, "post", nn.Tanh()),
    "the configuration": lambda mlp: setattr(mlp.config, "scale", 2.0),
    "another configuration": lambda mlp: setattr(mlp, "config", types.SimpleNamespace(scale=2.0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_after_the_recognition(change, calls):
    config = types.SimpleNamespace(scale=1.0)
    (model, _), (plain, _) = pair(changeable, act_fn=Act(), limit=None, post=None, config=config)
    for other in (model, copy.deepcopy(model)):
        assert_same(step(other), step(plain))
    assert calls == ["silu"] * 2
    for each in (model, plain):
        change(each["mlp"])
    assert_same(step(model), step(plain), 0.0)
    assert calls == ["silu"] * 2


def test_layers_that_share_their_A_draw_two_masks(calls):
    """The halves of a stacked projection draw one."""
    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        model = with_lora(MLP().double(), fuse, dropout=0.5)[0]
        model["mlp"].up_proj.lora_A = model["mlp"].gate_proj.lora_A
        models.append(model)
    model, plain = models
    assert_same(step(model), step(plain), 0.0)
    assert calls == []
    assert_same(step(model.eval()), step(plain.eval()))
    assert calls == ["silu"]


def test_a_parameter_as_input_is_no_tensor(calls):
    (model, _), (plain, _) = pair(asks("isinstance(x, nn.Parameter)"))
    torch.testing.assert_close(*(each["mlp"](nn.Parameter(rows())) for each in (model, plain)))
    assert calls == []


def test_classes_are_not_kept():
    def once():
        class Local(MLP):
            pass

        class LocalAct(nn.SiLU):
            pass

        model, report = with_lora(Local(LocalAct()))
        assert report.mlps[0].reason is None
        slk.remove_lora(model)
        return weakref.ref(Local), weakref.ref(LocalAct)

    classes = [kind for _ in range(3) for kind in once()]
    # The first collection ends the fused classes, which hold these.
    gc.collect(), gc.collect()
    assert [kind() for kind in classes] == [None] * 6


def test_pickles_know_what_was_read(calls):
    model = pickle.loads(pickle.dumps(with_lora(MLP(nn.GELU("tanh")))[0]))
    model["mlp"](rows(torch.float32))
    model["mlp"].act_fn.approximate = "none"
    model["mlp"](rows(torch.float32))
    assert calls == ["gelu_tanh"]
