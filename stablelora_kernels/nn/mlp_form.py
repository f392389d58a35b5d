"""Recognize a gated MLP, ``down(act(gate(x)) * up(x))``, by running a module's forward on an empty
tensor.

A ``TorchFunctionMode`` sees every operation on tensors and refuses those that a gated MLP does not
have. Nothing is computed, since values can mislead: a clamp at 7 changes no small number. The
forward runs on a stand-in for the module, which notes each attribute that the forward reads.
:func:`reason_to_skip` compares these attributes in each later call.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import itertools
import weakref
from collections.abc import Callable
from functools import partial, reduce
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from torch.overrides import TorchFunctionMode

from stablelora_kernels.utils.modules import HOOKS, is_hooked

# Values of these types never change in place, except functions that are closures.
_CONSTANTS = {
    type(None),
    bool,
    int,
    float,
    str,
    type,
    torch.dtype,
    torch.device,
    FunctionType,
    BuiltinFunctionType,
}
# Stands for a missing attribute. It is a class, so that copies and pickles of a Form have the same.
_ABSENT = inspect.Parameter.empty
_OPERATIONS = {silu, gelu, torch.mul, Tensor.mul, torch.chunk, Tensor.chunk}
# Formulas of activations without their input, and their names in the op. True means in place.
_ACTIVATIONS: dict[tuple[Any, ...], str] = {
    ("silu", False): "silu", ("silu", True): "silu", ("gelu",): "gelu", ("gelu", "none"): "gelu", ("gelu", "tanh"): "gelu_tanh",
}  # fmt: skip
_OTHER = "it computes something else than down(act(gate(x)) * up(x))"


class Child(NamedTuple):
    """The name of a child that computes a projection. If it computes gate and up stacked, ``half``
    tells which half this is.
    """

    name: str
    half: int | None = None


class Form(NamedTuple):
    """What a module computes: ``down(activation(gate(x)) * up(x))``.

    ``argument`` is the name of x. ``reads`` has the path of each attribute that the forward reads,
    and its key.
    """

    gate: Child
    up: Child
    down: Child
    activation: str
    argument: str = ""
    reads: tuple[tuple[tuple[str, ...], Any], ...] = ()


def reason_to_skip(module: nn.Module, form: Form) -> str | None:
    """Why the op does not stand for the forward: an attribute that it reads is another, or a child
    has hooks. None if it does.
    """
    for path, known in form.reads:
        value = reduce(_attribute, path, module)
        if _key(value) != known:
            return _OTHER
        if isinstance(value, nn.Module) and is_hooked(value):
            if any(value.__dict__[attribute] for attribute in HOOKS):
                return f"{path[0]!r} has hooks, which would not run"
            return f"{path[0]!r} has a forward that was replaced (as accelerate's hooks do)"
    return None


def _attribute(value: Any, name: str) -> Any:
    if not isinstance(value, nn.Module):
        return getattr(value, name, _ABSENT)
    # Attributes of the instance only. This is faster than nn.Module.__getattr__.
    own = value.__dict__
    plain = own.get(name, own["_buffers"].get(name, _ABSENT))
    return own["_modules"].get(name, own["_parameters"].get(name, plain))


def _key(value: Any) -> tuple[Any, ...]:
    """A value's type, and the value if it is constant. Its copies and pickles have an equal key."""
    kind = type(value)
    if kind is partial:
        return kind, value.func, value.args, tuple(value.keywords.items())
    if (kind in _CONSTANTS or isinstance(value, enum.Enum)) and getattr(
        value, "__closure__", None
    ) is None:
        return kind, value
    return (Tensor if isinstance(value, Tensor) else kind,)


def form_of(module: nn.Module, is_projection: Callable[[Any], bool]) -> Form | str:
    """The form of ``module``, or why it is no gated MLP. ``is_projection`` says which children
    compute a projection of x.
    """
    forward: Any = module.forward
    # A forward may be bound to the instance, as Liger's patches do.
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return "its forward was replaced (as accelerate's hooks do)"
    try:
        (argument,) = inspect.signature(forward).bind(None).arguments
    except (TypeError, ValueError):
        return "its forward takes more than one tensor"
    function: Any = forward.__func__
    if str(function.__module__).startswith("liger_kernel."):
        variables = function.__globals__ | _LIGER
        function = FunctionType(
            function.__code__, variables, None, function.__defaults__, function.__closure__
        )
    forms: set[Form] = set()
    reads: dict[tuple[str, ...], Any] = {}
    # A forward may do something else in each of these modes.
    gradients, cuda = (
        (torch.enable_grad, torch.no_grad, torch.inference_mode),
        torch.cuda.is_available(),
    )
    for autocast, gradient in itertools.product((False, True), gradients):
        with (
            torch.autocast("cpu", enabled=autocast),
            torch.autocast("cuda", enabled=autocast and cuda),
            gradient(),
        ):
            form = _Run(is_projection, reads).form(function, module)
        if isinstance(form, str):
            return form
        forms.add(form)
    # Children in the module's order: reasons name the first one.
    order: dict[tuple[str, ...], int] = {(name,): i for i, name in enumerate(module._modules)}
    ordered = tuple(sorted(reads.items(), key=lambda read: order.get(read[0], -1)))
    return _OTHER if len(forms) > 1 else forms.pop()._replace(argument=argument, reads=ordered)


def _mode() -> tuple[bool, ...]:
    autocast = map(torch.is_autocast_enabled, ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class _Run(TorchFunctionMode):
    """One run of a forward.

    Each tensor has a formula: "x", a Child of x, or a tuple. The tuple of a function has its name
    and its operands, with a Child last. The tuple of another projection has that Child and the
    formula of its input.
    """

    def __init__(
        self, is_projection: Callable[[Any], bool], reads: dict[tuple[str, ...], Any]
    ) -> None:
        self.is_projection, self.reads, self.mode, self.reason = is_projection, reads, _mode(), ""
        self.tensors: list[weakref.ref[Tensor]] = []
        self.attributes: list[_Attributes] = []

    def form(self, function: Callable[..., Any], module: nn.Module) -> Form | str:
        """The form without its argument and reads, or the first reason against it."""
        try:
            with self:
                formula = getattr(
                    function(_Attributes(self, (), module).stand_in, self.tensor("x")),
                    "formula",
                    None,
                )
            if any(tensor() is not None for tensor in self.tensors):
                self.refuse("its forward keeps a tensor")
            if any(attributes != attributes.given for attributes in self.attributes):
                self.refuse("its forward changes its attributes")
            match formula:
                case (Child() as down, ("mul", (*operation, Child() as gate), Child() as up)):
                    activation, halves = _ACTIVATIONS.get(tuple(operation)), {gate.half, up.half}
                    is_stacked = halves == {0, 1}
                    # Autograd refuses to change a half in place.
                    is_allowed = halves == {None} or (is_stacked and True not in operation)
                    is_distinct = gate != up and down.name not in (gate.name, up.name)
                    # Six tensors are x, gate, up, activation, product and output. A stacked
                    # projection and its halves make seven. Another operation may draw a second mask
                    # of dropout, or change one of these in place.
                    is_exact = len(self.tensors) == 6 + is_stacked and _mode() == self.mode
                    if activation and is_allowed and is_distinct and is_exact:
                        return self.reason or Form(gate, up, down, activation)
        except Exception as error:
            return self.reason or f"its forward can't be followed ({type(error).__name__})"
        return self.reason or _OTHER

    def refuse(self, reason: str) -> NoReturn:
        # The forward may catch the exception and go on, so the first reason counts.
        self.reason = self.reason or reason
        raise RuntimeError(reason)

    def tensor(self, formula: Any) -> Any:
        """The result of an operation, which must run in the mode of the call."""
        if _mode() != self.mode:
            self.refuse("its forward changes the gradient or the autocast mode")
        with torch._C.DisableTorchFunction():
            tensor: Any = torch.empty(0, device="meta")
        tensor.formula = formula
        self.tensors.append(weakref.ref(tensor))
        return tensor

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch._C._set_grad_enabled:
            return function(*args)
        name = function.__name__
        if name == "__get__":
            self.refuse(f"it reads {function.__self__.__name__!r} of a tensor")
        if function not in _OPERATIONS:
            self.refuse(f"it calls {name}")
        operands = (getattr(value, "formula", value) for value in (*args, *(kwargs or {}).values()))
        formula = (name, *sorted(operands, key=lambda operand: isinstance(operand, Child)))
        match formula:
            case ("chunk", 2, -1, Child(stacked, None)):
                return [self.tensor(Child(stacked, half)) for half in range(2)]
            case ("chunk", *_):
                self.refuse(_OTHER)
            case ("silu", True, _) if hasattr(args[0], "formula"):
                # The forward may use the input instead of the result.
                args[0].formula = self.tensor(formula).formula
                return args[0]
        return self.tensor(formula)


class _Attributes(dict[str, Any]):
    """The ``__dict__`` of a stand-in for ``value``. It reads and notes an attribute when the
    forward asks for it.

    ``nn.Module.__getattr__`` looks in ``__dict__["_parameters"]`` first, which is this dict itself.
    ``given`` is a copy of this dict until the forward sets an attribute.
    """

    def __init__(self, run: _Run, path: tuple[str, ...], value: Any) -> None:
        self.run, self.path, self.value = run, path, value
        # nn.Module.__call__ calls this attribute instead of the forward.
        self.given: dict[str, Any] = {"_compiled_call_impl": self.call}
        super().__init__(self.given)
        run.attributes.append(self)
        # The stand-in has the class of a module. A configuration's class may find attributes in
        # other ways.
        members = {
            "__getattr__": nn.Module.__getattr__,
            "__class__": property(lambda _: type(value)),
        }
        kind: Any = type(value) if isinstance(value, nn.Module) else type("StandIn", (), members)
        self.stand_in: Any = object.__new__(kind)
        object.__setattr__(self.stand_in, "__dict__", self)
        if not run.is_projection(value):
            # Python finds a class's attribute without asking here. The instance may have its own
            # instead, now or later.
            classes = set(kind.__mro__) - set(nn.Module.__mro__)
            names = (vars(value).keys() & dir(kind)).union(*map(vars, classes)) - {
                "forward",
                *_FOR_PRINTING,
            }
            for name in names:
                if not name.startswith("__"):
                    with contextlib.suppress(AttributeError):
                        self[name]

    def __missing__(self, name: str) -> Any:
        if name == "_parameters":
            return self
        path, value = (*self.path, name), _attribute(self.value, name)
        self.run.reads[path] = _key(value)
        if value is _ABSENT:
            raise AttributeError(name)
        parts = (
            (value.func, *value.args, *value.keywords.values())
            if isinstance(value, partial)
            else (value,)
        )
        is_value = isinstance(value, Tensor) or all(len(_key(part)) > 1 for part in parts)
        is_child = isinstance(value, nn.Module) and not self.path
        is_plain = (
            hasattr(value, "__dict__") and not callable(value) and not hasattr(value, "__len__")
        )
        # Calls do not compare the training mode, nor a projection's attributes.
        is_compared = name != "training" and not self.run.is_projection(self.value)
        if not is_compared or not (is_value or is_child or is_plain):
            self.run.refuse(
                f"it reads {'.'.join(path)!r}, a {type(value).__name__}, which may change unseen"
            )
        self[name] = self.given[name] = (
            value if is_value else _Attributes(self.run, path, value).stand_in
        )
        return self[name]

    def __contains__(self, name: Any) -> bool:
        return self[name] is not _ABSENT

    def get(self, name: str, default: Any = None) -> Any:
        # nn.Module.__setattr__ finds none of these, so it sets a plain attribute.
        return default if name in ("_parameters", "_buffers", "_modules") else self[name]

    def __iter__(self, *_: Any) -> NoReturn:
        self.run.refuse("its forward lists its attributes")

    __len__ = keys = values = items = __iter__  # type: ignore[assignment]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The output of a child."""
        (name,) = self.path
        if len(args) != 1 or kwargs or (formula := getattr(args[0], "formula", None)) is None:
            self.run.refuse(f"it calls {name!r} with more than one tensor")
        if self.run.is_projection(self.value):
            return self.run.tensor(Child(name) if formula == "x" else (Child(name), formula))
        kind = type(self.value)
        with contextlib.suppress(Exception):
            output: Any = kind.forward(self.stand_in, args[0])
            if output.formula[:-1] in _ACTIVATIONS:
                return output
        self.run.reason = (
            f"it calls {name!r}, a {kind.__name__}; only SiLU and GELU (exact or tanh) are fused"
        )
        raise RuntimeError(self.run.reason)


# Methods that print a module. Liger binds them to an instance together with its forward.
_FOR_PRINTING = ("_get_name", "extra_repr")
# PyTorch's operations for Liger's. Liger's take optional factors, which these refuse.
_LIGER = {
    "_swiglu_dispatch": lambda gate, up: silu(gate) * up,
    "LigerSiLUMulFunction": SimpleNamespace(apply=lambda gate, up: silu(gate) * up),
    "LigerGELUMulFunction": SimpleNamespace(
        apply=lambda gate, up: gelu(gate, approximate="tanh") * up
    ),
}
