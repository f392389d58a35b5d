"""Recognize a gated MLP, ``down(act(gate(x)) * up(x))``, by running a module's forward on an empty
tensor.

A ``TorchFunctionMode`` sees every operation on tensors and refuses those that a gated MLP does not
have. Nothing is computed, since values can mislead: a clamp at 7 changes no small number. The
forward runs on a stand-in for the module, which notes each attribute that the forward reads.
:func:`reason_form_changed` compares these attributes in each later call.

A trial run on numbers, with small layers and numbers up to 1e30, was tried instead. It is wrong on
14 of the 62 forwards of tests/nn/test_mlp_form.py, and accepts these, which later calls change:
``self.config.scale`` that is 1 now, dropout whose p is 0 now, a clamp only for
``x.dtype == torch.float16``, for long sequences or on a GPU, ``F.linear(x, self.gate_proj.weight)``,
which has no LoRA, and ``self.config.count += 1``, which changes the user's model. To refuse them, a
trial has to see each read of an attribute and of a tensor, which is most of this file.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable
from functools import partial, reduce
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from torch.overrides import TorchFunctionMode

from stablelora_kernels.activations import ACTIVATIONS, TITLES
from stablelora_kernels.nn.take_over import own_class
from stablelora_kernels.utils.modules import HOOKS, is_hooked
from stablelora_kernels.utils.refusal import Refusal

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
# The names of attributes that lead from a module to a value.
Path = tuple[str, ...]
_OPERATIONS = {activation.function for activation in ACTIVATIONS.values()} | {
    torch.mul, Tensor.mul, torch.chunk, Tensor.chunk,
}  # fmt: skip
# Formulas of activations without their input, and their names in the op. True means in place.
_ACTIVATIONS: dict[tuple[object, ...], str] = {
    (activation.function.__name__, *arguments): name
    for name, activation in ACTIVATIONS.items()
    for arguments in activation.arguments
}
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
    reads: tuple[tuple[Path, object], ...] = ()


def reason_form_changed(module: nn.Module, form: Form) -> str | None:
    """Why ``module`` may not compute its form any more, or None: an attribute that its forward reads
    is another, or a child has hooks.
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


def _attribute(value: object, name: str) -> Any:
    """An attribute of a module or a configuration, or ``_ABSENT``."""
    if not isinstance(value, nn.Module):
        return getattr(value, name, _ABSENT)
    # Attributes of the instance only. This is faster than nn.Module.__getattr__.
    attributes = value.__dict__
    children = attributes["_modules"]
    if name in children:
        return children[name]
    parameters = attributes["_parameters"]
    if name in parameters:
        return parameters[name]
    if name in attributes:
        return attributes[name]
    return attributes["_buffers"].get(name, _ABSENT)


def _key(value: object) -> tuple[object, ...]:
    """A value's type, and the value if it is constant. Its copies and pickles have an equal key."""
    if isinstance(value, nn.Module):
        # A class that is made to take a forward over has no name for a pickle.
        return (own_class(value),)
    kind = type(value)
    if isinstance(value, partial) and kind is partial:
        return kind, value.func, value.args, tuple(value.keywords.items())
    is_constant = kind in _CONSTANTS or isinstance(value, enum.Enum)
    if is_constant and getattr(value, "__closure__", None) is None:
        return kind, value
    return (Tensor if isinstance(value, Tensor) else kind,)


def form_of(module: nn.Module, is_projection: Callable[[object], bool]) -> Form | Refusal:
    """The form of ``module``, or why it is no gated MLP. ``is_projection`` says which children
    compute a projection of x.
    """
    forward: Any = module.forward
    # A forward may be bound to the instance, as Liger's patches do.
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return Refusal("its forward was replaced (as accelerate's hooks do)")
    try:
        (argument,) = inspect.signature(forward).bind(None).arguments
    except (TypeError, ValueError):
        return Refusal("its forward takes more than one tensor")
    function = _without_liger(forward.__func__)
    forms: set[Form] = set()
    reads: dict[Path, object] = {}
    cuda = torch.cuda.is_available()
    # A forward may do something else in each of these modes.
    gradient_modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    for autocast, gradient_mode in itertools.product((False, True), gradient_modes):
        with (
            torch.autocast("cpu", enabled=autocast),
            torch.autocast("cuda", enabled=autocast and cuda),
            gradient_mode(),
        ):
            form = _Run(is_projection, reads).form(function, module)
        if isinstance(form, Refusal):
            return form
        forms.add(form)
    if len(forms) > 1:
        return Refusal(_OTHER)
    # Children in the module's order: reasons name the first one.
    places: dict[Path, int] = {(name,): place for place, name in enumerate(module._modules)}
    ordered = sorted(reads.items(), key=lambda read: places.get(read[0], -1))
    return forms.pop()._replace(argument=argument, reads=tuple(ordered))


def _without_liger(function: Any) -> Callable[..., object]:
    """A forward of Liger's with PyTorch's operations in place of Liger's; any other as it is."""
    if not str(function.__module__).startswith("liger_kernel."):
        return function  # type: ignore[no-any-return]
    variables = function.__globals__ | _LIGER
    return FunctionType(
        function.__code__, variables, None, function.__defaults__, function.__closure__
    )


def _mode() -> tuple[bool, ...]:
    """The modes of gradients and autocast."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


class _Run(TorchFunctionMode):
    """One run of a forward.

    Each tensor has a formula: "x", a Child of x, or a tuple. The tuple of a function has its name
    and its operands, with a Child last. The tuple of another projection has that Child and the
    formula of its input.
    """

    def __init__(self, is_projection: Callable[[object], bool], reads: dict[Path, object]) -> None:
        self.is_projection = is_projection
        # What the forward has read; see Form.
        self.reads = reads
        self.mode = _mode()
        # The first reason against the form.
        self.reason = ""
        self.tensors: list[weakref.ref[Tensor]] = []
        self.attributes: list[_Attributes] = []

    def form(self, function: Callable[..., object], module: nn.Module) -> Form | Refusal:
        """The form without its argument and reads, or the first reason against it."""
        try:
            formula = self._formula_of_output(function, module)
            if any(tensor() is not None for tensor in self.tensors):
                self.refuse("its forward keeps a tensor")
            if any(attributes != attributes.as_read for attributes in self.attributes):
                self.refuse("its forward changes its attributes")
            form = self._form_of(formula)
        except Exception as error:
            return Refusal(self.reason or f"its forward can't be followed ({type(error).__name__})")
        if self.reason or form is None:
            return Refusal(self.reason or _OTHER)
        return form

    def _formula_of_output(self, function: Callable[..., object], module: nn.Module) -> object:
        """Run the forward, and return its output's formula."""
        with self:
            stand_in = _Attributes(self, (), module).stand_in
            # No variable may hold x or the output: form() looks whether the forward keeps a tensor.
            return _formula(function(stand_in, self.tensor("x")))

    def _form_of(self, formula: object) -> Form | None:
        """The form of a gated MLP if ``formula`` is one's and the forward did nothing else."""
        match formula:
            case (Child() as down, ("mul", (*operation, Child() as gate), Child() as up)):
                activation = _ACTIVATIONS.get(tuple(operation))
                halves = {gate.half, up.half}
                is_stacked = halves == {0, 1}
                # Autograd refuses to change a half in place.
                is_allowed = halves == {None} or (is_stacked and True not in operation)
                is_distinct = gate != up and down.name not in (gate.name, up.name)
                # Six tensors are x, gate, up, activation, product and output. A stacked projection
                # and its halves make seven. Another operation may draw a second mask of dropout, or
                # change one of these in place.
                is_exact = len(self.tensors) == 6 + is_stacked and _mode() == self.mode
                if activation and is_allowed and is_distinct and is_exact:
                    return Form(gate, up, down, activation)
        return None

    def refuse(self, reason: str) -> NoReturn:
        """End the run: the module is no gated MLP."""
        # The forward may catch the exception and go on, so the first reason counts.
        self.reason = self.reason or reason
        raise RuntimeError(reason)

    def tensor(self, formula: object) -> Tensor:
        """The result of an operation, which must run in the mode of the call."""
        if _mode() != self.mode:
            self.refuse("its forward changes the gradient or the autocast mode")
        with torch._C.DisableTorchFunction():
            tensor = torch.empty(0, device="meta")
        tensor.formula = formula  # type: ignore[attr-defined]
        self.tensors.append(weakref.ref(tensor))
        return tensor

    def __torch_function__(
        self,
        function: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Instead of an operation: its result as an empty tensor with its formula. It refuses
        operations that a gated MLP does not have.
        """
        if function is torch._C._set_grad_enabled:
            return function(*args)
        name: str = function.__name__
        if name == "__get__":
            self.refuse(f"it reads {function.__self__.__name__!r} of a tensor")
        if function not in _OPERATIONS:
            self.refuse(f"it calls {name}")
        arguments = [*args, *(kwargs or {}).values()]
        operands = _children_last(getattr(value, "formula", value) for value in arguments)
        if name == "chunk":
            return self._halves(operands)
        formula = (name, *operands)
        is_in_place = operands[0] is True and formula[:-1] in _ACTIVATIONS
        if is_in_place and hasattr(args[0], "formula"):
            # In place: the forward may use the input instead of the result.
            self.tensor(formula)
            args[0].formula = formula
            return args[0]
        return self.tensor(formula)

    def _halves(self, operands: list[object]) -> list[Tensor]:
        """Gate and up of a projection that computes both stacked, which the forward cuts in two."""
        match operands:
            case [2, -1, Child(stacked, None)]:
                return [self.tensor(Child(stacked, half)) for half in range(2)]
        self.refuse(_OTHER)


def _formula(value: object) -> object:
    """The formula of a tensor of a run; None for anything else."""
    return getattr(value, "formula", None)


def _children_last(operands: Iterable[object]) -> list[object]:
    """The order of operands in a formula, in which a * b and b * a are one."""
    return sorted(operands, key=lambda operand: isinstance(operand, Child))


class _Attributes(dict[str, Any]):
    """The ``__dict__`` of a stand-in for ``value``. It reads and notes an attribute when the
    forward asks for it.

    ``nn.Module.__getattr__`` looks in ``__dict__["_parameters"]`` first, which is this dict itself.
    ``as_read`` is a copy of this dict until the forward sets an attribute.
    """

    def __init__(self, run: _Run, path: Path, value: object) -> None:
        self.run = run
        self.path = path
        self.value = value
        # nn.Module.__call__ calls this attribute instead of the forward.
        self.as_read: dict[str, object] = {"_compiled_call_impl": self.call}
        super().__init__(self.as_read)
        run.attributes.append(self)
        kind = self._class_of_stand_in()
        self.stand_in: object = object.__new__(kind)
        object.__setattr__(self.stand_in, "__dict__", self)
        if not run.is_projection(value):
            self._read_attributes_of_class(kind)

    def _class_of_stand_in(self) -> type:
        """A module's own class; for a configuration one whose attributes all come by here."""
        kind = type(self.value)
        if isinstance(self.value, nn.Module):
            return kind
        # A configuration's class may find attributes in other ways.
        members = {"__getattr__": nn.Module.__getattr__, "__class__": property(lambda _: kind)}
        return type("StandIn", (), members)

    def _read_attributes_of_class(self, kind: type) -> None:
        """Read the attributes that Python finds in the class without asking here. The instance may
        have its own instead, now or later.
        """
        names = vars(self.value).keys() & set(dir(kind))
        for base in set(kind.__mro__) - set(nn.Module.__mro__):
            names |= vars(base).keys()
        for name in names - {"forward", *_FOR_PRINTING}:
            if not name.startswith("__"):
                with contextlib.suppress(AttributeError):
                    self[name]

    def __missing__(self, name: str) -> object:
        """Read an attribute and note it. It refuses one whose change no later call would notice."""
        if name == "_parameters":
            return self
        path = (*self.path, name)
        value = _attribute(self.value, name)
        self.run.reads[path] = _key(value)
        if value is _ABSENT:
            raise AttributeError(name)
        is_child = isinstance(value, nn.Module) and not self.path
        # Calls do not compare the training mode, nor a projection's attributes.
        is_compared = name != "training" and not self.run.is_projection(self.value)
        if not is_compared or not (_is_constant(value) or is_child or _is_record(value)):
            self.run.refuse(
                f"it reads {'.'.join(path)!r}, a {type(value).__name__}, which may change unseen"
            )
        if not _is_constant(value):
            value = _Attributes(self.run, path, value).stand_in
        self.as_read[name] = value
        self[name] = value
        return value

    def __contains__(self, name: Any) -> bool:
        return self[name] is not _ABSENT

    def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
        # nn.Module.__setattr__ finds none of these, so it sets a plain attribute.
        return default if name in ("_parameters", "_buffers", "_modules") else self[name]

    def __iter__(self, *args: object) -> NoReturn:
        self.run.refuse("its forward lists its attributes")

    __len__ = keys = values = items = __iter__  # type: ignore[assignment]

    def call(self, *args: object, **kwargs: object) -> object:
        """The output of a child."""
        (name,) = self.path
        formula = _formula(args[0]) if len(args) == 1 and not kwargs else None
        if formula is None:
            self.run.refuse(f"it calls {name!r} with more than one tensor")
        if self.run.is_projection(self.value):
            return self.run.tensor(Child(name) if formula == "x" else (Child(name), formula))
        kind: Any = type(self.value)
        with contextlib.suppress(Exception):
            output = kind.forward(self.stand_in, args[0])
            # An activation's formula without its input.
            if output.formula[:-1] in _ACTIVATIONS:
                return output  # type: ignore[no-any-return]
        self.run.reason = f"it calls {name!r}, a {kind.__name__}; only {TITLES} are fused"
        raise RuntimeError(self.run.reason)


def _is_constant(value: object) -> bool:
    """Whether :func:`_key` tells a change of ``value``, or ``value`` is a tensor."""
    if isinstance(value, Tensor):
        return True
    parts: tuple[object, ...] = (value,)
    if isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
    return all(len(_key(component)) > 1 for component in parts)


def _is_record(value: object) -> bool:
    """Whether ``value`` has attributes of its own to read, as a configuration has."""
    return hasattr(value, "__dict__") and not callable(value) and not hasattr(value, "__len__")


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
