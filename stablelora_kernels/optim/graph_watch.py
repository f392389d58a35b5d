"""What the CUDA graph of a training step takes for granted: what it cannot hold, and what may not change after the capture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as torch_optimizer

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.dispatch.settings import get_autotune, get_backend, get_kernel, tf32_allowed
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import same_objects
from stablelora_kernels.utils.dtensor import is_sharded
from stablelora_kernels.utils.hooks import HOOKS
from stablelora_kernels.utils.validation import shown

# Hyperparameters that may change between replays: schedulers write them as numbers, and the graph reads them from memory.
LIVE = ("lr", "weight_decay", "shrink_ratio")
_TENSOR_FLAGS = ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_flags = attrgetter(*_TENSOR_FLAGS)
_version = attrgetter("_version")


def check_capturable(model: nn.Module, optimizer: StableLoRAAdamW) -> None:
    """Raise ValueError, with the reason, if a CUDA graph cannot hold a training step of ``model`` and ``optimizer``."""
    tensors = _tensors(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, (nn.DataParallel, DistributedDataParallel)) or "_fsdp_wrapped_module" in module._modules:
            raise ValueError(
                f"model must not be in {type(module).__name__}, which runs Python in every step, got "
                f"{repr(name) if name else 'it'} in one"
            )
    owned = set(map(id, params_of(optimizer)))
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            raise ValueError(
                f"model must be whole on one GPU, got the DTensor {name!r}, whose collectives run in every step"
            )
        if tensor.requires_grad and id(tensor) not in owned:
            raise ValueError(
                "optimizer must have every trainable parameter of model, since a CUDA graph keeps the gradients of others to "
                f"itself, got none of the name {name!r}: freeze it, add it to the optimizer, or set enabled=False"
            )
    devices = {p.device for p in chain(tensors.values(), params_of(optimizer))}
    if len(devices) > 1:
        raise ValueError(
            f"model and optimizer must be on one GPU, got tensors on {', '.join(sorted(map(str, devices)))}"
        )
    hooked = [name for name, module in modules.items() if _is_hooked(module)]
    hooked += [name for name, tensor in tensors.items() if any(_flags(tensor)[1:])]
    if hooked or _has_any_global_hook():
        where = f"hooks on {hooked[0]!r}" if hooked else "global module hooks"
        raise ValueError(f"model must have no hooks, since a CUDA graph would not call them again, got {where}")
    if not all(group["capturable"] for group in optimizer.param_groups):
        raise ValueError("optimizer must be built with capturable=True, got capturable=False")
    if optimizer.shrink_schedule is not None:
        raise ValueError(
            "optimizer must have no shrink_schedule, which a CUDA graph would not call again, got "
            f'{optimizer.shrink_schedule!r}: write its value to each group\'s "shrink_ratio" before each step'
        )
    if hooks := _step_hooks(optimizer):
        raise ValueError(
            f"optimizer must have no step hooks, since a CUDA graph would not call them again, got {hooks[0]!r}"
        )
    (device,) = devices
    if resolve_backend(device) != "triton" or any(p.dtype is torch.float64 for p in params_of(optimizer)):
        raise ValueError(
            "optimizer must step on Triton's kernels to be captured, got float64 parameters or the backend "
            f"{get_backend()!r}: PyTorch's operators read from the GPU"
        )


class Watch:
    """The state of a model, an optimizer and the settings, as it was after a step.

    Every replay asks :meth:`change`, so that takes few passes, all of them Python's own: a few microseconds a module.
    """

    def __init__(self, model: nn.Module, optimizer: StableLoRAAdamW, scaler: torch.amp.GradScaler | None) -> None:
        self.optimizer, self.scaler, self.device = optimizer, scaler, next(params_of(optimizer)).device
        self.containers = dict(_containers(model))
        dicts = [container for container in self.containers.values() if isinstance(container, dict)]
        # Most of the dicts are for hooks, and empty.
        self.empty, self.filled = [d for d in dicts if not d], [d for d in dicts if d]
        self.lists = [container for container in self.containers.values() if isinstance(container, list)]
        self.contents = {label: _copy(container) for label, container in self.containers.items()}
        self.values = self._values()
        self.modules = dict(model.named_modules())
        self.classes = list(map(type, self.modules.values()))
        self.tensors = {name: tensor for name, tensor in _tensors(model).items() if _has_address(tensor)}
        self.addresses, self.flags = self._addresses(), self._flags()
        self.engines = [engine for _, engine in optimizer._engines]
        self.params = list(params_of(optimizer))
        self.state = {p: dict(entry) for p, entry in optimizer.state.items()}
        self.settings = self._settings()

    def change(self) -> str | None:
        """What has changed since, in words, or None."""
        return next(self._changes(), None)

    def _changes(self) -> Iterator[str]:
        if any(self.empty) or not same_objects(self._values(), self.values):
            yield from _differences({label: _copy(c) for label, c in self.containers.items()}, self.contents)
        # accelerate_peft and restore_peft change classes.
        if self.classes != (classes := list(map(type, self.modules.values()))):
            found, known = (
                {"model": {name: kind.__name__ for name, kind in zip(self.modules, kinds, strict=True)}}
                for kinds in (classes, self.classes)
            )
            yield from _differences(found, known)
        if self.addresses != (addresses := self._addresses()):
            moved = [name for name, old, new in zip(self.tensors, self.addresses, addresses, strict=True) if old != new]
            yield f"model.{moved[0]} has other memory than before"
        if self.flags != (flags := self._flags()):
            yield from _differences(self._by_name(flags), self._by_name(self.flags))
        optimizer = self.optimizer
        if not (
            self.engines == [engine for _, engine in optimizer._engines]
            and same_objects(list(params_of(optimizer)), self.params)
            and same_objects(optimizer.state, self.state)
        ):
            yield "optimizer has other parameters or another state than before (add_param_group, load_state_dict, state)"
        if not same_objects(settings := self._settings(), self.settings):
            yield from _differences({"": settings}, {"": self.settings})

    def written(self) -> bool:
        """Whether someone wrote to a parameter of which the optimizer keeps the norm or a master."""
        return any(engine.versions != sum(map(_version, engine.watched)) for engine in self.engines)

    def count_write(self) -> None:
        """Raise the versions of the parameters that a replay writes, as an eager step does."""
        for engine in self.engines:
            torch.autograd.graph.increment_version(engine.written)
            engine.versions = sum(map(_version, engine.watched))

    def _values(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self.filled)), *chain.from_iterable(self.lists)]

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors.values()))

    def _flags(self) -> list[tuple[Any, ...]]:
        return list(map(_flags, self.tensors.values()))

    def _by_name(self, flags: list[tuple[Any, ...]]) -> dict[str, dict[Any, Any]]:
        return {
            f"model.{name}": dict(zip(_TENSOR_FLAGS, values, strict=True))
            for name, values in zip(self.tensors, flags, strict=True)
        }

    def _settings(self) -> dict[str, Any]:
        """By their names, values that a capture turns into constants."""
        found: dict[str, Any] = {
            "backend": get_backend(),
            "kernel": get_kernel(),
            "autotune": get_autotune(),
            "TensorFloat-32 in float32 products": tf32_allowed(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "global module hooks": bool(_has_any_global_hook()),
            "optimizer.shrink_schedule": self.optimizer.shrink_schedule,
            "optimizer's step hooks": _step_hooks(self.optimizer),
        }
        for index, group in enumerate(self.optimizer.param_groups):
            for name in self.optimizer.defaults:
                value = group[name]
                if name in LIVE and not reads_from_memory(value, self.device):
                    value = "a number"
                found[f"optimizer.param_groups[{index}][{name!r}]"] = value
        if self.scaler is not None:
            getters = (self.scaler.get_growth_factor, self.scaler.get_backoff_factor, self.scaler.get_growth_interval)
            found |= {f"grad_scaler.{getter.__name__}()": getter() for getter in (*getters, self.scaler.is_enabled)}
            found["grad_scaler's scale"] = self.scaler._scale
        return found


def reads_from_memory(value: Any, device: torch.device) -> bool:
    """Whether the optimizer reads a live hyperparameter from the tensor that its group holds."""
    return isinstance(value, Tensor) and value.device == device


def params_of(optimizer: StableLoRAAdamW) -> Iterator[Tensor]:
    """Every parameter of ``optimizer``."""
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _has_address(tensor: Tensor) -> bool:
    """Whether ``tensor`` has memory of its own, which wrappers around quantized data have not."""
    try:
        return tensor.data_ptr() is not None
    except RuntimeError:
        return False


def _is_hooked(module: nn.Module) -> bool:
    """Whether ``module`` has hooks that a replay would miss, or that of accelerate, which replaces its forward."""
    hooks = chain.from_iterable(vars(module)[name].values() for name in HOOKS)
    return "_hf_hook" in vars(module) or not all(getattr(hook, "only_after_errors", False) for hook in hooks)


def _step_hooks(optimizer: StableLoRAAdamW) -> list[Any]:
    """The hooks that run around ``optimizer.step``."""
    every = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return [hook for hooks in (*every, *own) for hook in hooks.values()]


def _containers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of every module, and the dicts and lists among them: parameters, modules, hooks, PEFT's adapters."""
    for name, module in model.named_modules():
        label = f"model.{name}".rstrip(".")
        yield label, vars(module)
        for key, value in vars(module).items():
            if isinstance(value, (dict, list)):
                yield f"{label}.{key}", value


def _copy(container: dict[Any, Any] | list[Any]) -> dict[Any, Any]:
    return dict(container if isinstance(container, dict) else enumerate(container))


def _differences(found: dict[str, dict[Any, Any]], known: dict[str, dict[Any, Any]]) -> Iterator[str]:
    """What differs between dicts of the same labels, in words."""
    for label, values in found.items():
        for key in {**known[label], **values}:
            old, new = _value(known[label], key), _value(values, key)
            if not same_objects([old], [new]):
                yield f"{label}.{key}".lstrip(".") + f" was {_words(old)} and is {_words(new)}"


def _value(values: dict[Any, Any], key: Any) -> Any:
    """A dict's value, or None for what is left of hooks that were removed."""
    value = values.get(key, "absent")
    return None if key == "_is_full_backward_hook" or (isinstance(value, dict) and not value) else value


def _words(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else shown(repr(value))
