"""What a CUDA graph of a training step takes for granted: what it cannot hold, and changes that it
would not notice.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, compress
from operator import attrgetter, ne
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as torch_optimizer

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.dispatch.settings import settings, tf32_allowed
from stablelora_kernels.optim.snapshot import Snapshot, first_difference, same_objects
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.utils.modules import HOOKS
from stablelora_kernels.utils.tensors import is_sharded

_TENSOR_FLAGS = ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_flags_of = attrgetter(*_TENSOR_FLAGS)
# A module's attributes, or a dict or list among them.
Container = dict[str, object] | list[object]


class Compared(NamedTuple):
    """All that a replay compares, but for the optimizer: values of attributes, classes of modules,
    flags and addresses of tensors, and settings. Labels are made only for a message.
    """

    attributes: list[object]
    # accelerate_peft and restore_peft change classes.
    classes: list[type]
    flags: list[tuple[object, ...]]
    settings: list[object]
    addresses: list[int]


class Watch:
    """A model, an optimizer and the settings as a step has left them: a CUDA graph takes them for
    granted.

    Python would see each change at the next eager step; a replay does not. Without a comparison it
    would train with another branch than the model now has, as after ``merge_lora`` or
    ``set_scale``, or write to memory that the model no longer reads, and nothing would say so.

    Every replay asks :meth:`change`, so that takes few passes, all of them Python's own: a few
    microseconds a module.
    """

    def __init__(
        self, model: nn.Module, optimizer: StableLoRAAdamW, scaler: torch.amp.GradScaler | None
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self.device = next(params_of(optimizer)).device
        self.modules = dict(model.named_modules())
        self.containers = dict(_containers(self.modules))
        dicts = [c for c in self.containers.values() if isinstance(c, dict)]
        # Most of the dicts are for hooks, and empty.
        self.empty = [d for d in dicts if not d]
        self.filled = [d for d in dicts if d]
        self.lists = [c for c in self.containers.values() if isinstance(c, list)]
        self.tensors = {
            name: tensor for name, tensor in tensors_of(model).items() if _has_address(tensor)
        }
        self.compared = self._compared()
        self.labelled = self._labelled()
        self.snapshot = optimizer._snapshot().kept()

    def change(self, now: Snapshot) -> str | None:
        """What has changed since, in words, or None. ``now``: what the optimizer finds."""
        compared = self._compared()
        # A hook that came since is in a dict that was empty.
        if any(self.empty) or not same_objects(compared, self.compared):
            if words := first_difference(self.labelled, self._labelled()):
                return words
            moved = map(ne, self.compared.addresses, compared.addresses)
            for name in compress(self.tensors, moved):
                return f"model.{name} has other memory than before"
        return now.change_for_graph(self.snapshot, self.device)

    def _compared(self) -> Compared:
        """All that is compared, as it is now."""
        of_dicts = chain.from_iterable(map(dict.values, self.filled))
        return Compared(
            attributes=[*of_dicts, *chain.from_iterable(self.lists)],
            classes=list(map(type, self.modules.values())),
            flags=list(map(_flags_of, self.tensors.values())),
            settings=list(self._settings().values()),
            addresses=list(map(Tensor.data_ptr, self.tensors.values())),
        )

    def _labelled(self) -> dict[str, object]:
        """What :meth:`_compared` holds but for addresses, each value by its name in a message."""
        values: dict[str, object] = {}
        for label, container in self.containers.items():
            items = container.items() if isinstance(container, dict) else enumerate(container)
            for key, value in items:
                if key != "_is_full_backward_hook":
                    values[f"{label}.{key}"] = value
        for name, module in self.modules.items():
            values[f"model.{name}"] = type(module).__name__
        for name, tensor in self.tensors.items():
            for flag in _TENSOR_FLAGS:
                values[f"model.{name}.{flag}"] = getattr(tensor, flag)
        return values | self._settings()

    def _settings(self) -> dict[str, object]:
        """By their names, values that a capture turns into constants."""
        values: dict[str, object] = {
            "backend": settings.backend,
            "strategy": settings.strategy,
            "first_use": settings.first_use,
            "TensorFloat-32 in float32 products": tf32_allowed(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "global module hooks": bool(_has_any_global_hook()),
            "optimizer.shrink_schedule": self.optimizer.shrink_schedule,
            "optimizer's step hooks": _step_hooks(self.optimizer),
        }
        if self.scaler is not None:
            values |= _settings_of(self.scaler)
        return values


def _settings_of(scaler: torch.amp.GradScaler) -> dict[str, object]:
    """By their names, the values of ``scaler`` that a capture turns into constants."""
    getters: tuple[Callable[[], object], ...] = (
        scaler.get_growth_factor,
        scaler.get_backoff_factor,
        scaler.get_growth_interval,
        scaler.is_enabled,
    )
    values = {f"grad_scaler.{getter.__name__}()": getter() for getter in getters}
    return values | {"grad_scaler's scale": scaler._scale}


def check_capturable(model: nn.Module, optimizer: StableLoRAAdamW) -> None:
    """Raise ValueError, with the reason, if a CUDA graph cannot hold a training step of ``model``
    and ``optimizer``.
    """
    tensors = tensors_of(model)
    _check_no_python(model, tensors)
    owned = set(map(id, params_of(optimizer)))
    for name, tensor in tensors.items():
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
    if resolve_backend(device) != "triton" or any(
        p.dtype is torch.float64 for p in params_of(optimizer)
    ):
        raise ValueError(
            "optimizer must step on Triton's kernels to be captured, got float64 parameters or the backend "
            f"{settings.backend!r}: PyTorch's operators read from the GPU"
        )


def _check_no_python(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a step of ``model``, whose parameters and buffers are ``tensors``, runs
    Python that a replay would leave out: wrappers, collectives, hooks.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if (
            isinstance(module, (nn.DataParallel, DistributedDataParallel))
            or "_fsdp_wrapped_module" in module._modules
        ):
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
        raise ValueError(
            f"model must have no hooks, since a CUDA graph would not call them again, got {where}"
        )


class HostGenerators(NamedTuple):
    """The states of the host's global random number generators."""

    torch: list[int]
    python: tuple[object, ...]
    # Bytes, since comparing NumPy's arrays gives no bool; None if NumPy is not imported.
    numpy: bytes | None


def host_generators() -> HostGenerators:
    """The states of the host's global random number generators as they are now."""
    numpy = sys.modules.get("numpy")
    return HostGenerators(
        torch=torch.get_rng_state().tolist(),
        python=random.getstate(),
        numpy=None if numpy is None else pickle.dumps(numpy.random.get_state()),
    )


def params_of(optimizer: StableLoRAAdamW) -> Iterator[Tensor]:
    """Every parameter of ``optimizer``."""
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _step_hooks(optimizer: StableLoRAAdamW) -> list[Callable[..., object]]:
    """The hooks that run around ``optimizer.step``."""
    tables: tuple[Mapping[int, Callable[..., object]], ...] = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    )
    return [hook for hooks in tables for hook in hooks.values()]


def _is_hooked(module: nn.Module) -> bool:
    """Whether ``module`` has hooks that a replay would miss, or that of accelerate, which replaces
    its forward.
    """
    hooks = chain.from_iterable(vars(module)[name].values() for name in HOOKS)
    return "_hf_hook" in vars(module) or not all(
        getattr(hook, "only_after_errors", False) for hook in hooks
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of ``model``."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _has_address(tensor: Tensor) -> bool:
    """Whether ``tensor`` has memory of its own, which wrappers around quantized data have not."""
    try:
        return tensor.data_ptr() is not None
    except RuntimeError:
        return False


def _containers(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Container]]:
    """The attributes of every module, and the dicts and lists among them: parameters, modules,
    hooks, PEFT's adapters.
    """
    for name, module in modules.items():
        label = f"model.{name}".rstrip(".")
        yield label, vars(module)
        for key, value in vars(module).items():
            if isinstance(value, (dict, list)):
                yield f"{label}.{key}", value
