"""What a CUDA graph of a training step takes for granted: what it cannot hold, and changes that it
would not notice.
"""

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
from stablelora_kernels.optim.snapshot import Snapshot, first_difference, same_objects
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.utils.modules import HOOKS
from stablelora_kernels.utils.tensors import is_sharded

_TENSOR_FLAGS = ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_flags_of = attrgetter(*_TENSOR_FLAGS)


class Watch:
    """A model, an optimizer and the settings as a step has left them: a CUDA graph takes them for
    granted.

    Every replay asks :meth:`change`, so that takes few passes, all of them Python's own: a few
    microseconds a module.
    """

    def __init__(
        self, model: nn.Module, optimizer: StableLoRAAdamW, scaler: torch.amp.GradScaler | None
    ) -> None:
        self.optimizer, self.scaler, self.device = (
            optimizer,
            scaler,
            next(params_of(optimizer)).device,
        )
        self.modules = dict(model.named_modules())
        self.containers = dict(_containers(self.modules))
        dicts = [container for container in self.containers.values() if isinstance(container, dict)]
        # Most of the dicts are for hooks, and empty.
        self.empty, self.filled = [d for d in dicts if not d], [d for d in dicts if d]
        self.lists = [
            container for container in self.containers.values() if isinstance(container, list)
        ]
        self.tensors = {
            name: tensor for name, tensor in tensors_of(model).items() if _has_address(tensor)
        }
        self.values, self.labelled, self.snapshot = (
            self._values(),
            self._labelled(),
            optimizer._snapshot().kept(),
        )

    def change(self, now: Snapshot) -> str | None:
        """What has changed since, in words, or None. ``now``: what the optimizer finds."""
        values = self._values()
        if any(self.empty) or not same_objects(values, self.values):
            if words := first_difference(self.labelled, self._labelled()):
                return words
            for name, old, new in zip(self.tensors, self.values[-1], values[-1], strict=True):
                if old != new:
                    return f"model.{name} has other memory than before"
        return now.words(self.snapshot, self.device)

    def _values(self) -> list[list[Any]]:
        """All that is compared. The last are the tensors' addresses."""
        return [
            [*chain.from_iterable(map(dict.values, self.filled)), *chain.from_iterable(self.lists)],
            # accelerate_peft and restore_peft change classes.
            list(map(type, self.modules.values())),
            list(map(_flags_of, self.tensors.values())),
            list(self._settings().values()),
            list(map(Tensor.data_ptr, self.tensors.values())),
        ]

    def _labelled(self) -> dict[str, Any]:
        """The same, but addresses, by its name in a message."""
        found: dict[str, Any] = {}
        for label, container in self.containers.items():
            items = container.items() if isinstance(container, dict) else enumerate(container)
            found |= {
                f"{label}.{key}": value for key, value in items if key != "_is_full_backward_hook"
            }
        found |= {f"model.{name}": type(module).__name__ for name, module in self.modules.items()}
        for name, tensor in self.tensors.items():
            found |= {f"model.{name}.{flag}": getattr(tensor, flag) for flag in _TENSOR_FLAGS}
        return found | self._settings()

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
        if self.scaler is not None:
            getters = (
                self.scaler.get_growth_factor,
                self.scaler.get_backoff_factor,
                self.scaler.get_growth_interval,
            )
            found |= {
                f"grad_scaler.{getter.__name__}()": getter()
                for getter in (*getters, self.scaler.is_enabled)
            }
            found["grad_scaler's scale"] = self.scaler._scale
        return found


def check_capturable(model: nn.Module, optimizer: StableLoRAAdamW) -> None:
    """Raise ValueError, with the reason, if a CUDA graph cannot hold a training step of ``model``
    and ``optimizer``.
    """
    modules, tensors = dict(model.named_modules()), tensors_of(model)
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
            f"{get_backend()!r}: PyTorch's operators read from the GPU"
        )


def params_of(optimizer: StableLoRAAdamW) -> Iterator[Tensor]:
    """Every parameter of ``optimizer``."""
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _step_hooks(optimizer: StableLoRAAdamW) -> list[Any]:
    """The hooks that run around ``optimizer.step``."""
    every = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return [hook for hooks in (*every, *own) for hook in hooks.values()]


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


def _containers(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """The attributes of every module, and the dicts and lists among them: parameters, modules,
    hooks, PEFT's adapters.
    """
    for name, module in modules.items():
        label = f"model.{name}".rstrip(".")
        yield label, vars(module)
        for key, value in vars(module).items():
            if isinstance(value, (dict, list)):
                yield f"{label}.{key}", value
