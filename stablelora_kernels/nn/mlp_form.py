"""Find out whether a module is a gated MLP, ``down(act(gate(x)) * up(x))``, by running its forward on an empty tensor.

A ``TorchFunctionMode`` sees every operation on tensors, knows those of a gated MLP and refuses all others. It computes nothing,
so no value of x can be missed (a clamp at 7 changes no small number). The forward gets instances of the module's and its
children's own classes, which ask :class:`_Run` for each attribute. :func:`is_unchanged` compares them in each later call.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import itertools
import weakref
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stablelora_kernels.utils.hooks import is_hooked

# Functions, if they are no closures.
_CONSTANTS = {
    type(None), bool, int, float, str, torch.dtype, torch.device, FunctionType, BuiltinFunctionType, type(NotImplemented),
}  # fmt: skip
# For an attribute that an instance does not have. Copies and pickles have the same object.
_ABSENT: Any = NotImplemented
_OTHER = "it computes something else than down(act(gate(x)) * up(x))"


class Projection(NamedTuple):
    """A child of an MLP by its name; one of its two halves if it holds gate and up stacked."""

    name: str
    half: int | None = None


class Form(NamedTuple):
    """What a module computes: ``down(activation(gate(x)) * up(x))``.

    ``activation_module`` is the child that computes the activation, or None if a function does. ``argument`` is the name of x.
    ``reads`` has the path of each attribute that the forward read, and its key.
    """

    gate: Projection
    up: Projection
    down: Projection
    activation: str
    activation_module: str | None
    argument: str
    reads: tuple[tuple[tuple[str, ...], Any], ...] = ()

    @property
    def children(self) -> tuple[str, ...]:
        """The projections' names, each once."""
        return tuple(dict.fromkeys((self.gate.name, self.up.name, self.down.name)))


def is_unchanged(module: nn.Module, form: Form) -> bool:
    """Whether every attribute that the forward of ``module`` read is as it was, and no child has hooks, which would not run."""
    for path, known in form.reads:
        value = _attribute(module, path)
        key = _key(value)
        if (type(key), key) != (type(known), known) or (isinstance(value, nn.Module) and is_hooked(value)):
            return False
    return True


def _attribute(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if isinstance(value, nn.Module):
            # Of the instance alone, and faster than nn.Module's __getattr__.
            own = value.__dict__
            plain = own.get(name, own["_buffers"].get(name, _ABSENT))
            value = own["_modules"].get(name, own["_parameters"].get(name, plain))
        else:
            value = getattr(value, name, _ABSENT)
    return value


def _key(value: Any) -> Any:
    """What stands for an attribute in comparisons: itself if it is constant, else its kind. Copies have equal keys."""
    if isinstance(value, partial):
        return partial, _key(value.func), value.args, tuple(value.keywords.items())
    is_constant = type(value) in _CONSTANTS or isinstance(value, (type, enum.Enum))
    if is_constant and getattr(value, "__closure__", None) is None:
        return value
    return (Tensor if isinstance(value, Tensor) else type(value),)


def form_of(module: nn.Module, is_projection: Callable[[Any], bool]) -> Form | str:
    """The form of ``module``, or why it is no gated MLP. ``is_projection`` says which children compute a projection of x."""
    function = module.__dict__.get("forward", type(module).forward)
    if isinstance(function, MethodType) and function.__self__ is module:
        # Bound to it, as Liger's patches do.
        function = function.__func__
    elif "forward" in module.__dict__:
        return "its forward was replaced (as accelerate's hooks do)"
    try:
        _, argument = inspect.signature(function).bind(module, None).arguments
    except (TypeError, ValueError):
        return "its forward takes more than one tensor"
    if isinstance(function, FunctionType) and str(function.__module__).startswith("liger_kernel."):
        variables = function.__globals__ | _LIGER
        function = FunctionType(function.__code__, variables, None, function.__defaults__, function.__closure__)
    run, cuda = _Run(module, is_projection), torch.cuda.is_available()
    forms: set[Form] = set()
    # A forward may do something else in each of these modes.
    gradients = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    for autocast, gradient in itertools.product((False, True), gradients):
        with torch.autocast("cpu", enabled=autocast), torch.autocast("cuda", enabled=autocast and cuda), gradient():
            form = run.form(function)
        if isinstance(form, str):
            return form
        forms.add(form)
    return _OTHER if len(forms) > 1 else forms.pop()._replace(argument=argument, reads=tuple(run.reads.items()))


def _mode() -> tuple[bool, ...]:
    gradients = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *gradients, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class _Refused(BaseException):
    """Not an Exception, which a forward may catch to go another way."""


class _Attributes(dict[str, Any]):
    """An instance's attributes: those that were read. For another one, nn.Module's __getattr__ looks in "_parameters" of this."""

    def __init__(self, read: Callable[[str], Any], given: dict[str, Any]) -> None:
        super().__init__(given)
        self.read, self.given = read, given

    def __missing__(self, name: str) -> Any:
        if name == "_parameters":
            return self
        if (value := self.read(name)) is _ABSENT:
            raise AttributeError(name)
        self[name] = self.given[name] = value
        return value

    def __contains__(self, name: Any) -> bool:
        return self[name] is not _ABSENT

    def get(self, name: str, default: Any = None) -> Any:
        # For nn.Module's __setattr__ there are none, so that it sets a plain attribute.
        return default if name in ("_parameters", "_buffers", "_modules") else self[name]


class _Run(TorchFunctionMode):
    """Runs of a forward.

    The attribute ``held`` of a tensor is "x", a projection of x, (activation, gate), [gate, up, activation] for the product, or
    the form.
    """

    def __init__(self, module: nn.Module, is_projection: Callable[[Any], bool]) -> None:
        self.module, self.is_projection = module, is_projection
        self.reads: dict[tuple[str, ...], Any] = {}

    def form(self, function: Callable[..., Any]) -> Form | str:
        """The form but for its argument and reads, or the first reason against it."""
        self.mode, self.reason = _mode(), ""
        self.called: list[str] = []
        self.tensors: list[weakref.ref[Tensor]] = []
        self.instances: list[_Attributes] = []
        try:
            with self:
                form = self.held(function(self.instance((), self.module), self.tensor("x")), Form)
            if any(tensor() is not None for tensor in self.tensors):
                self.refuse("its forward keeps a tensor")
            if any(attributes != attributes.given for attributes in self.instances):
                self.refuse("its forward changes its attributes")
            activation = [name for name in self.called if name not in form.children]
            # Each projection is called once, since it draws a mask of dropout in each call.
            called_once = sorted(self.called) == sorted((*form.children, *activation[:1]))
            halves = {0, 1} if form.gate.name == form.up.name else {None}
            if not called_once or {form.gate.half, form.up.half} != halves or _mode() != self.mode:
                self.refuse(_OTHER)
            return self.reason or form._replace(activation_module=activation[0] if activation else None)
        except _Refused:
            return self.reason
        except Exception as error:
            return self.reason or f"its forward can't be followed ({type(error).__name__})"

    def refuse(self, reason: str) -> NoReturn:
        self.reason = self.reason or reason
        raise _Refused

    def tensor(self, held: Any) -> Any:
        # A forward that turns gradients off, or autocast on or off, computes another thing than its formula says.
        if _mode() != self.mode:
            self.refuse("its forward changes the gradient or the autocast mode")
        with torch._C.DisableTorchFunction():
            tensor: Any = torch.empty(0, device="meta")
        tensor.held = held
        self.tensors.append(weakref.ref(tensor))
        return tensor

    def held(self, tensor: Any, kind: Any) -> Any:
        """What ``tensor`` holds, once: a second use could see, or be disturbed by, a change in place."""
        held = getattr(tensor, "held", None)
        if type(held) is not kind:
            self.refuse(_OTHER)
        tensor.held = None
        return held

    def instance(self, path: tuple[str, ...], value: Any) -> Any:
        """An instance of the class of ``value`` that asks :meth:`read` for its attributes, and :meth:`call` if it is called."""
        # A configuration's class may find attributes by other ways.
        members = {"__getattr__": nn.Module.__getattr__, "__class__": property(lambda _: type(value))}
        kind: Any = type(value) if isinstance(value, nn.Module) else type("Object", (), members)
        instance = object.__new__(kind)
        given = {"_compiled_call_impl": partial(self.call, path[0], value, instance)} if path else {}
        attributes = _Attributes(lambda name: self.read((*path, name)), given)
        object.__setattr__(instance, "__dict__", attributes)
        self.instances.append(attributes)
        # What an instance may have in place of its class's attributes, now or later. Of projections nothing is read.
        kinds = () if path and self.is_projection(value) else kind.__mro__
        names = {name for k in kinds if k not in nn.Module.__mro__ for name in vars(k) if not name.startswith("__")}
        for name in names - {"forward"}:
            with contextlib.suppress(AttributeError):
                attributes[name]
        return instance

    def read(self, path: tuple[str, ...]) -> Any:
        """What the forward gets for an attribute, of which ``reads`` takes note."""
        if path[-1] == "training":
            self.refuse("it asks whether it is in training")
        value = _attribute(self.module, path)
        key = self.reads[path] = _key(value)
        if len(path) > 1 and self.is_projection(_attribute(self.module, path[:1])):
            self.refuse(f"it reads {path[1]!r} of {path[0]!r} itself")
        if key is value or isinstance(value, Tensor) or (isinstance(value, partial) and key[1] is value.func):
            return value
        is_child = isinstance(value, nn.Module) and len(path) == 1
        if not is_child and (callable(value) or hasattr(value, "__len__") or not hasattr(value, "__dict__")):
            self.refuse(f"it reads {'.'.join(path)!r}, a {type(value).__name__}, which may change unseen")
        return self.instance(path, value)

    def call(self, name: str, child: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """What the forward gets for a call of a child."""
        if len(args) != 1 or kwargs or not hasattr(args[0], "held"):
            self.refuse(f"it calls {name!r} with more than one tensor")
        self.called.append(name)
        if self.is_projection(child):
            if args[0].held == "x":
                return self.tensor(Projection(name))
            gate, up, activation = self.held(args[0], list)
            return self.tensor(Form(gate, up, Projection(name), activation, None, ""))
        try:
            result: Any = type(child).forward(instance, args[0]) if "forward" not in child.__dict__ else None
            result.held = self.held(result, tuple)
        except _Refused:
            self.reason = f"it calls {name!r}, a {type(child).__name__}; only SiLU and GELU (exact or tanh) are fused"
            raise
        return result

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._C._set_grad_enabled:
            return function(*args)
        if (known := _KNOWN.get(function)) is None:
            name = getattr(function, "__name__", str(function))
            self.refuse(
                f"it reads {function.__self__.__name__!r} of a tensor" if name == "__get__" else f"it calls {name}"
            )
        return known(self, *args, **kwargs or {})

    def silu(self, input: Any, inplace: bool = False) -> Any:
        gate = self.held(input, Projection)
        output = self.tensor(("silu", gate))
        if not inplace:
            return output
        if gate.half is not None:
            # Autograd refuses that for views.
            self.refuse(_OTHER)
        input.held = output.held
        return input

    def gelu(self, input: Any, approximate: str = "none") -> Any:
        return self.tensor(({"none": "gelu", "tanh": "gelu_tanh"}[approximate], self.held(input, Projection)))

    def mul(self, input: Any, other: Any) -> Any:
        if isinstance(getattr(input, "held", None), Projection):
            input, other = other, input
        activation, gate = self.held(input, tuple)
        return self.tensor([gate, self.held(other, Projection), activation])

    def chunk(self, input: Any, chunks: int, dim: int = 0) -> list[Any]:
        stacked = self.held(input, Projection)
        if (chunks, dim, stacked.half) != (2, -1, None):
            self.refuse(_OTHER)
        return [self.tensor(Projection(stacked.name, half)) for half in range(2)]


_KNOWN: dict[Any, Callable[..., Any]] = {
    nn.functional.silu: _Run.silu, nn.functional.gelu: _Run.gelu, torch.mul: _Run.mul, Tensor.mul: _Run.mul,
    torch.chunk: _Run.chunk, Tensor.chunk: _Run.chunk,
}  # fmt: skip


def _product(activation: Callable[[Any], Any], gate: Any, up: Any) -> Any:
    return activation(gate) * up


# PyTorch's operations for Liger's. Liger's may be given factors, for which these have no argument.
_SILU = partial(_product, nn.functional.silu)
_GELU = partial(_product, partial(nn.functional.gelu, approximate="tanh"))
_LIGER = {
    "_swiglu_dispatch": _SILU,
    "LigerSiLUMulFunction": SimpleNamespace(apply=_SILU),
    "LigerGELUMulFunction": SimpleNamespace(apply=_GELU),
}
