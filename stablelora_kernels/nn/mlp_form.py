"""Find out whether a module is a gated MLP, ``down(act(gate(x)) * up(x))``, by running its forward with a symbol for x.

The symbol knows the few operations of a gated MLP. The run refuses any other: a clamp, a factor, a bias, a dropout, a norm, a
look at x's shape or values. Names of classes and of projections do not matter. Compared with a run on numbers, no value of x can
be missed (a clamp at 7 changes no small number), and no device, memory, hook, random state or parameter is touched, so modules
on the meta device, quantized and sharded ones are told like others.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn


class Projection(NamedTuple):
    """A child of an MLP by its name; one of its two halves if it holds gate and up stacked."""

    name: str
    half: int | None = None


class Form(NamedTuple):
    """What a module computes: ``down(activation(gate(x)) * up(x))``.

    ``activation_module`` is the child that computes the activation, or None if a function does. ``argument`` is the name of x.
    """

    gate: Projection
    up: Projection
    down: Projection
    activation: str
    activation_module: str | None
    argument: str

    @property
    def children(self) -> tuple[str, ...]:
        """The projections' names, each once."""
        return tuple(dict.fromkeys((self.gate.name, self.up.name, self.down.name)))


def form_of(module: nn.Module, is_projection: Callable[[Any], bool]) -> Form | str:
    """The form of ``module``, or why it is no gated MLP. ``is_projection`` says which children compute a projection of x."""
    function = forward_of(module)
    if function is None:
        return "its forward was replaced (as accelerate's hooks do)"
    if (argument := _only_argument(function)) is None:
        return "its forward takes more than one tensor"
    # Both modes: a forward may drop or scale in training only.
    first, second = (_Run(module, is_projection, training).form(function, argument) for training in (False, True))
    return first if isinstance(first, str) or first == second else second if isinstance(second, str) else _OTHER


def forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function that computes ``module``: its class's or one bound to it, as Liger's patches do; else None."""
    own = module.__dict__.get("forward")
    if own is None:
        return type(module).forward
    return own.__func__ if isinstance(own, MethodType) and own.__self__ is module else None


_OTHER = "it computes something else than down(act(gate(x)) * up(x))"


def _only_argument(function: Callable[..., Any]) -> str | None:
    """The name of the only argument that a forward needs beside self."""
    try:
        _, *parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    is_first = len(needed) == 1 and needed[0] is parameters[0] and needed[0].kind is not needed[0].KEYWORD_ONLY
    return needed[0].name if is_first else None


class _Refused(BaseException):
    """Not an Exception, which a forward may catch to go another way."""


class _Run:
    """One run of a forward. ``module`` is not called: the forward gets a copy of its attributes with other children."""

    def __init__(self, module: nn.Module, is_projection: Callable[[Any], bool], training: bool) -> None:
        self.reason: str | None = None
        self.activation_module: str | None = None
        self.mode = _mode()
        self.copy = object.__new__(type(module))
        children = {
            name: None if child is None else _Child(self, name, child, is_projection(child))
            for name, child in module._modules.items()
        }
        # Without parameters and buffers: a forward that reads them itself does more than call its children.
        replaced = {"_modules": children, "_parameters": {}, "_buffers": {}, "training": training}
        self.attributes = module.__dict__ | replaced
        self.copy.__dict__.update(self.attributes)

    def form(self, function: Callable[..., Any], argument: str) -> Form | str:
        """The form, or the first reason against it."""
        try:
            result = _with_liger_functions(self, function)(self.copy, _Symbol(self, ("x",)))
        except _Refused:
            result = None
        except Exception as error:
            return self.reason or f"its forward can't be followed ({type(error).__name__})"
        if self.reason is not None:
            return self.reason
        now = self.copy.__dict__
        if now.keys() != self.attributes.keys() or any(now[key] is not self.attributes[key] for key in now):
            return "its forward changes its attributes"
        return self._match(result.value, argument) if type(result) is _Symbol else _OTHER

    def _match(self, value: Any, argument: str) -> Form | str:
        match value:
            case ("linear", down, ("product", ("act", activation, gate), up)):
                pass
            case ("linear", down, ("product", up, ("act", activation, gate))):
                pass
            case _:
                return _OTHER
        found = []
        for projected in (gate, up):
            match projected:
                case ("linear", str(name), ("x",)):
                    found.append(Projection(name))
                case ("half", int(half), ("linear", str(name), ("x",))):
                    found.append(Projection(name, half))
                case _:
                    return _OTHER
        names = {p.name for p in found}
        stacked = {p.half for p in found} == {0, 1} and len(names) == 1
        if down in names or not (stacked or (len(names) == 2 and all(p.half is None for p in found))):
            return _OTHER
        gate, up = found
        return Form(gate, up, Projection(down), activation, self.activation_module, argument)

    def refuse(self, reason: str) -> NoReturn:
        self.reason = self.reason or reason
        raise _Refused

    def symbol(self, *value: Any) -> _Symbol:
        # A forward that turns gradients off, or autocast on or off, computes another thing than its formula says.
        if _mode() != self.mode:
            self.refuse("its forward changes the gradient or the autocast mode")
        return _Symbol(self, value)


class _Symbol:
    """A tensor of which only the way it was computed is known."""

    # A forward may ask whether x is a tensor.
    __class__ = property(lambda self: Tensor)  # type: ignore[assignment]
    __slots__ = ("run", "value")

    def __init__(self, run: _Run, value: tuple[Any, ...]) -> None:
        self.run, self.value = run, value

    def __getattr__(self, name: str) -> NoReturn:
        self.run.refuse(f"it reads {name!r} of a tensor")

    def __mul__(self, other: Any) -> _Symbol:
        if type(other) is not _Symbol:
            self.run.refuse("it multiplies by something else than a projection of x")
        return self.run.symbol("product", self.value, other.value)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[_Symbol, ...]:
        if chunks != 2 or dim != -1:
            self.run.refuse("it cuts a tensor otherwise than in two along its last dimension")
        return tuple(self.run.symbol("half", i, self.value) for i in range(2))

    def act(self, activation: str) -> _Symbol:
        return self.run.symbol("act", activation, self.value)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Symbol:
        symbol = next(value for value in (*args, *(kwargs or {}).values()) if type(value) is _Symbol)
        known = _FUNCTIONS.get(function)
        if known is None:
            symbol.run.refuse(f"it calls {getattr(function, '__name__', function)}")
        return known(*args, **kwargs or {})


def _refuse_operator(name: str) -> Callable[..., Any]:
    def refuse(self: _Symbol, *others: Any) -> NoReturn:
        self.run.refuse(f"it computes {name} of a tensor")

    return refuse


for _name in ("add", "sub", "truediv", "floordiv", "mod", "pow", "matmul", "getitem", "neg", "abs", "eq", "ne", "lt", "le",
              "gt", "ge", "iadd", "isub", "imul", "itruediv", "setitem", "index"):  # fmt: skip
    assert hasattr(operator, _name)
    setattr(_Symbol, f"__{_name}__", _refuse_operator(_name))
for _name in ("radd", "rmul", "rsub", "rtruediv", "rpow", "rmatmul", "bool", "len", "iter", "int", "float"):
    setattr(_Symbol, f"__{_name}__", _refuse_operator(_name))


def _gelu(input: _Symbol, approximate: str = "none") -> _Symbol:
    if approximate not in ("none", "tanh"):
        input.run.refuse(f"its GELU is approximated by {approximate!r}")
    return input.act("gelu_tanh" if approximate == "tanh" else "gelu")


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    # In place or not is the same to who reads the result.
    nn.functional.silu: lambda input, inplace=False: input.act("silu"),
    nn.functional.gelu: _gelu,
    torch.mul: lambda input, other: input * other,
    torch.chunk: lambda input, chunks, dim=0: input.chunk(chunks, dim),
}


class _Child:
    """A child of the module. A projection is not called, a child without state (an activation) is, and no other may be."""

    def __init__(self, run: _Run, name: str, child: nn.Module, is_projection: bool) -> None:
        self._run, self._name, self._child, self._is_projection = run, name, child, is_projection

    def __getattr__(self, name: str) -> NoReturn:
        self._run.refuse(f"it reads {name!r} of {self._name!r} itself")

    def __call__(self, *args: Any, **kwargs: Any) -> _Symbol:
        run, child = self._run, self._child
        if len(args) != 1 or kwargs or type(args[0]) is not _Symbol:
            run.refuse(f"it calls {self._name!r} with more than one tensor")
        if self._is_projection:
            return run.symbol("linear", self._name, args[0].value)
        state = (child._parameters, child._buffers, child._modules)
        unknown = f"it calls {self._name!r}, a {type(child).__name__}; only SiLU and GELU (exact or tanh) are fused"
        if any(state) or "forward" in child.__dict__:
            run.refuse(unknown)
        try:
            result: Any = type(child).forward(child, args[0])
        except _Refused:
            run.reason = unknown
            raise
        if type(result) is not _Symbol or result.value[0] != "act" or result.value[2] is not args[0].value:
            run.refuse(unknown)
        run.activation_module = self._name
        return result


def _with_liger_functions(run: _Run, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with symbols' versions of Liger's autograd functions, which compute activation and product in one."""
    if not isinstance(function, FunctionType) or not function.__module__.startswith("liger_kernel."):
        return function
    silu, gelu = _LigerProduct(run, "silu"), _LigerProduct(run, "gelu_tanh")
    symbolic = {"_swiglu_dispatch": silu, "LigerSiLUMulFunction": silu, "LigerGELUMulFunction": gelu}
    variables = function.__globals__ | {name: by for name, by in symbolic.items() if name in function.__globals__}
    return FunctionType(function.__code__, variables, None, function.__defaults__, function.__closure__)


class _LigerProduct:
    def __init__(self, run: _Run, activation: str) -> None:
        self.run, self.activation = run, activation

    def __call__(self, *args: Any, **kwargs: Any) -> _Symbol:
        if len(args) != 2 or kwargs or not all(type(arg) is _Symbol for arg in args):
            self.run.refuse("it multiplies gate or up by a factor")
        return args[0].act(self.activation) * args[1]

    apply = __call__


def _mode() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
    )
