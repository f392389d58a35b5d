"""Modules: their hooks, wrappers around them, and a watch on a model that a CUDA graph holds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from stablelora_kernels.utils.tensors import is_sharded
from stablelora_kernels.utils.validation import shown

# The hooks that nn.Module.__call__ runs.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DATA_PARALLEL = (nn.DataParallel, DistributedDataParallel)
# The attributes in which torch.compile and torch's checkpoint_wrapper hold the wrapped module.
_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
_TENSOR_FLAGS = ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_flags_of = attrgetter(*_TENSOR_FLAGS)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` may do more than run its class's forward."""
    # Runs at every call of a layer: nn.Module's __getattr__ would take longer.
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def check_module(model: Any) -> None:
    """Raise TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside its wrappers, which would prefix every name.

    It raises ValueError if a module is in FullyShardedDataParallel, or if data parallelism wraps a part of the model alone.
    """
    check_module(model)
    for name, module in model.named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            raise ValueError(
                f"model must be sharded by fully_shard (FSDP2), got {type(module).__name__} around "
                f"{repr(name) if name else 'it'}, whose flat parameters hold no A and B"
            )
    model = innermost(model)
    for name, module in model.named_modules():
        if isinstance(module, DATA_PARALLEL):
            raise ValueError(f"model must be in {type(module).__name__} as a whole, got its part {name!r} in one")
    return model


def innermost(model: nn.Module) -> nn.Module:
    """The module inside its wrappers, without the checks of :func:`unwrap`."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def in_ddp(model: nn.Module) -> bool:
    """Whether ``model`` or a part of it is in DistributedDataParallel."""
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())


def check_not_in_ddp(model: nn.Module) -> None:
    """Raise ValueError if a model that is about to get parameters is in DistributedDataParallel."""
    if in_ddp(model):
        raise ValueError(
            "model must be given LoRA before DistributedDataParallel is around it, which would not average the gradients of "
            "parameters that come later, got one around it"
        )


def _inner(module: nn.Module) -> nn.Module | None:
    """The module that ``module`` wraps, or None."""
    names = ("module",) if isinstance(module, DATA_PARALLEL) else _INNER
    return next((module._modules[name] for name in names if module._modules.get(name) is not None), None)


def clean(name: str) -> str:
    """A dotted name without the parts that wrappers inside the model add."""
    return ".".join(part for part in name.split(".") if part not in _INNER)


def same_anywhere(name: str) -> str:
    """A parameter's dotted name, the same with data parallelism or other wrappers and without."""
    return clean(name).removeprefix("module.")


def wrapped_parts(model: nn.Module) -> list[str]:
    """The names of the submodules of ``model`` that have their own wrapper."""
    return [clean(name) for name, module in model.named_modules() if name and _inner(module) is not None]


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) has sharded ``module``. The check needs no import, which is slow."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def reshard(model: nn.Module) -> None:
    """Reshard ``fully_shard``'s parameters after a forward that left them gathered.

    The next reshard would drop gathered parameters and everything written to them.
    """
    for module in filter(is_fully_sharded, model.modules()):
        module.reshard()  # type: ignore[operator]


class _NoTensorsAreEqual(TorchFunctionMode):
    """Answers ``==`` between tensors with False. Containers do not ask it about an element that both hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


_NO_TENSORS_ARE_EQUAL = _NoTensorsAreEqual()


def same_objects(found: Any, known: Any) -> bool:
    """Whether two lists or nested dicts hold the very same tensors in the same places.

    Every step asks this, so all of the work is Python's own comparison of containers: a tenth of a microsecond a tensor.
    """
    with _NO_TENSORS_ARE_EQUAL:
        return bool(found == known)


def difference(label: str, old: Any, new: Any) -> str | None:
    """Says in words that ``label`` has another value; None if it has not. An empty dict, left of hooks, is as good as None."""
    old, new = (None if isinstance(v, dict) and not v else v for v in (old, new))
    if old is new or same_objects([old], [new]):
        return None
    words = (f"a tensor of shape {list(v.shape)}" if isinstance(v, Tensor) else shown(repr(v)) for v in (old, new))
    return "{} was {} and is {}".format(label, *words)


class ModelWatch:
    """The modules, attributes and tensors of a model as they were when this was made.

    Every replay asks :meth:`change`, so that takes few passes, all of them Python's own: a few microseconds a module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.containers = dict(_containers(self.modules))
        dicts = [container for container in self.containers.values() if isinstance(container, dict)]
        # Most of the dicts are for hooks, and empty.
        self.empty, self.filled = [d for d in dicts if not d], [d for d in dicts if d]
        self.lists = [container for container in self.containers.values() if isinstance(container, list)]
        self.contents = {label: _copy(container) for label, container in self.containers.items()}
        self.tensors = {name: tensor for name, tensor in tensors_of(model).items() if _has_address(tensor)}
        self.known = self._now()

    def _now(self) -> tuple[list[Any], ...]:
        """The values in containers, the modules' classes, and the tensors' addresses and flags."""
        values = [*chain.from_iterable(map(dict.values, self.filled)), *chain.from_iterable(self.lists)]
        tensors = self.tensors.values()
        addresses, flags = map(Tensor.data_ptr, tensors), map(_flags_of, tensors)
        return values, list(map(type, self.modules.values())), list(addresses), list(flags)

    def change(self) -> str | None:
        """What has changed since, in words, or None."""
        now = self._now()
        if not any(self.empty) and same_objects(now, self.known):
            return None
        return next(filter(None, self._changes(*now[1:])), None)

    def _changes(self, classes: list[Any], addresses: list[Any], flags: list[Any]) -> Iterator[str | None]:
        for label, container in self.containers.items():
            known, found = self.contents[label], _copy(container)
            for key in {**known, **found}:
                if key != "_is_full_backward_hook":
                    yield difference(f"{label}.{key}", known.get(key, "absent"), found.get(key, "absent"))
        # accelerate_peft and restore_peft change classes.
        for name, old, new in zip(self.modules, self.known[1], classes, strict=True):
            yield difference(f"model.{name}", old.__name__, new.__name__)
        for name, old, new in zip(self.tensors, self.known[2], addresses, strict=True):
            if old != new:
                yield f"model.{name} has other memory than before"
        for name, *both in zip(self.tensors, self.known[3], flags, strict=True):
            for flag, old, new in zip(_TENSOR_FLAGS, *both, strict=True):
                yield difference(f"model.{name}.{flag}", old, new)


def check_model_capturable(model: nn.Module) -> None:
    """Raise ValueError, with the reason, if a CUDA graph cannot hold a training step of ``model``."""
    modules, tensors = dict(model.named_modules()), tensors_of(model)
    for name, module in modules.items():
        if isinstance(module, DATA_PARALLEL) or "_fsdp_wrapped_module" in module._modules:
            raise ValueError(
                f"model must not be in {type(module).__name__}, which runs Python in every step, got "
                f"{repr(name) if name else 'it'} in one"
            )
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            raise ValueError(
                f"model must be whole on one GPU, got the DTensor {name!r}, whose collectives run in every step"
            )
    hooked = [name for name, module in modules.items() if _is_hooked(module)]
    hooked += [name for name, tensor in tensors.items() if any(_flags_of(tensor)[1:])]
    if hooked or _has_any_global_hook():
        where = f"hooks on {hooked[0]!r}" if hooked else "global module hooks"
        raise ValueError(f"model must have no hooks, since a CUDA graph would not call them again, got {where}")


def _is_hooked(module: nn.Module) -> bool:
    """Whether ``module`` has hooks that a replay would miss, or that of accelerate, which replaces its forward."""
    hooks = chain.from_iterable(vars(module)[name].values() for name in HOOKS)
    return "_hf_hook" in vars(module) or not all(getattr(hook, "only_after_errors", False) for hook in hooks)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of ``model``."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _has_address(tensor: Tensor) -> bool:
    """Whether ``tensor`` has memory of its own, which wrappers around quantized data have not."""
    try:
        return tensor.data_ptr() is not None
    except RuntimeError:
        return False


def _containers(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """The attributes of every module, and the dicts and lists among them: parameters, modules, hooks, PEFT's adapters."""
    for name, module in modules.items():
        label = f"model.{name}".rstrip(".")
        yield label, vars(module)
        for key, value in vars(module).items():
            if isinstance(value, (dict, list)):
                yield f"{label}.{key}", value


def _copy(container: dict[Any, Any] | list[Any]) -> dict[Any, Any]:
    return dict(container if isinstance(container, dict) else enumerate(container))
