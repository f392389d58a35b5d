"""Modules: their hooks, and wrappers around them: data parallelism, torch.compile, checkpointing
and ``fully_shard``.
"""

from __future__ import annotations

from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# The hooks that nn.Module.__call__ runs.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DATA_PARALLEL = (nn.DataParallel, DistributedDataParallel)
# The attributes in which torch.compile and torch's checkpoint_wrapper hold the wrapped module.
_INNER = ("_orig_mod", "_checkpoint_wrapped_module")


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` may do something else than its class's forward."""
    # Runs at every call of a layer: nn.Module's __getattr__ would take longer.
    attributes = module.__dict__
    hooks = (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    )
    return bool(hooks) or ("forward" in attributes and not _is_kernelized(module))


def _is_kernelized(module: nn.Module) -> bool:
    """Whether the instance's forward is as the ``kernels`` library binds it, which transformers
    5.25 calls for each model that it loads: that of its class, or, without weights, that of a
    kernel's layer, which computes the same.
    """
    forward = module.__dict__["forward"]
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    function, kind = forward.__func__, type(module)
    if function is kind.forward:
        return True
    # Dynamo cannot trace what follows.
    if torch.compiler.is_compiling() or not isinstance(function, FunctionType):
        return False
    if module._parameters:
        return False
    layer = function.__globals__.get(function.__qualname__.partition(".")[0])
    # The layers that transformers chooses say that they can be compiled.
    is_kernels = hasattr(layer, "can_torch_compile") and hasattr(kind, "kernel_layer_name")
    return is_kernels and getattr(layer, "forward", None) is function


def weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of an ``nn.Linear``, at each call of it."""
    parameters = linear._parameters
    try:
        # nn.Module's __getattr__ takes longer.
        return parameters["weight"], parameters["bias"]  # type: ignore[return-value]
    except KeyError:
        # FSDP and parametrizations replace them by plain attributes.
        return linear.weight, linear.bias  # type: ignore[return-value]


def check_module(model: object) -> None:
    """Raise TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside its wrappers, which would prefix every name.

    It raises ValueError if a module is in FullyShardedDataParallel, or if data parallelism wraps a
    part of the model alone.
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
            raise ValueError(
                f"model must be in {type(module).__name__} as a whole, got its part {name!r} in one"
            )
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
    for name in names:
        wrapped = module._modules.get(name)
        if wrapped is not None:
            return wrapped
    return None


def clean(name: str) -> str:
    """A dotted name without the parts that wrappers inside the model add."""
    return ".".join(word for word in name.split(".") if word not in _INNER)


def same_anywhere(name: str) -> str:
    """A parameter's dotted name, the same with data parallelism or other wrappers and without."""
    return clean(name).removeprefix("module.")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) has sharded ``module``. The check needs no import, which is
    slow.
    """
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def in_fully_sharded(model: nn.Module, name: str) -> bool:
    """Whether ``fully_shard`` has sharded the submodule ``name`` of ``model``, or a module around
    it, so that each forward sees plain tensors in place of its shards.
    """
    words = name.split(".")
    around = [model.get_submodule(".".join(words[:depth])) for depth in range(len(words) + 1)]
    return any(map(is_fully_sharded, around))


def reshard(model: nn.Module) -> None:
    """Reshard ``fully_shard``'s parameters after a forward that left them gathered.

    The next reshard would drop gathered parameters and everything written to them.
    """
    for module in filter(is_fully_sharded, model.modules()):
        module.reshard()  # type: ignore[operator]
