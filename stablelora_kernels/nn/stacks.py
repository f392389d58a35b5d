"""The stacked parameters of a module of experts, plain or packed, and how their libraries hold
them.

bitsandbytes packs a parameter by a parametrization, which dequantizes the whole stack at each
access. So does :class:`MXFP4Parametrization`, which ``load_packed_experts`` makes. transformers'
module ``FP8Experts`` has its own parameters. Nothing here accesses such a parameter by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from stablelora_kernels.functional import (
    FLOAT_DTYPES,
    FP8Experts,
    MXFP4Experts,
    NF4Experts,
    PackedExperts,
)
from stablelora_kernels.packed_experts import is_in_4_bits
from stablelora_kernels.utils.tensors import is_sharded

# The module whose hooks only cache what bitsandbytes' parametrization dequantizes.
_OF_BITSANDBYTES = "bitsandbytes.nn.parametrize"


class MXFP4Parametrization(nn.Module):
    """Dequantizes a parameter that a checkpoint stores in MXFP4: its ``original`` are the blocks.

    Args:
        scales: the checkpoint's, uint8 [E, N, K / 32].
        dtype: the parameter's.
        transposed: whether the parameter is [E, K, N], as gpt-oss has it.
    """

    scales: Tensor

    def __init__(self, scales: Tensor, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.dtype = dtype
        self.transposed = transposed

    def stack(self, blocks: Tensor) -> MXFP4Experts:
        return MXFP4Experts.from_blocks(blocks.detach(), self.scales)

    @torch.no_grad()
    def forward(self, blocks: Tensor) -> Tensor:
        stack = self.stack(blocks)
        values = stack.experts(0, stack.layout.experts, self.dtype)
        return values.transpose(1, 2) if self.transposed else values


def computed_parameters(module: nn.Module) -> Mapping[str, Any]:
    """The parameters of a module that a parametrization computes, each a list of its steps."""
    computed = module._modules.get("parametrizations")
    return {} if computed is None else computed._modules


def parameter_names(module: nn.Module) -> list[str]:
    """The names of a module's own parameters in the order of their definition.

    A parametrization puts a parameter behind the others. Modules of experts define down last.
    """
    computed = computed_parameters(module)
    names = list(module._parameters)
    if not computed:
        return names
    return sorted([*names, *computed], key=lambda name: name == "down_proj")


def stacks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that stack matrices, as transformers 5 stores experts; of a packed
    stack, the one with its bytes.
    """
    if isinstance(module, parametrize.ParametrizationList):
        return {}
    stacks = {}
    for name, parameter in module._parameters.items():
        if parameter is None or is_lazy(parameter) or name.endswith("_scale_inv"):
            continue
        # Position embeddings have a first dimension of size 1.
        if parameter.dim() > 2 and min(parameter.shape) > 1:
            stacks[name] = parameter
    for name in computed_parameters(module):
        if is_packed(module, name) and _stacks_matrices(module, name):
            stacks[name] = stored_parameter(module, name)
    return stacks


def _stacks_matrices(module: nn.Module, name: str) -> bool:
    """Whether a packed parameter has three dimensions."""
    step = computed_parameters(module)[name][0]
    return not is_in_4_bits(module, name) or len(step.quant_state.shape) == 3


def is_packed(experts: nn.Module, name: str) -> bool:
    """Whether :func:`read_stack` gives a packed stack, or says why it does not."""
    if _is_fp8_module(experts) or is_in_4_bits(experts, name):
        return True
    return _mxfp4(experts, name) is not None


def _is_fp8_module(experts: nn.Module) -> bool:
    return any(kind.__name__ == "FP8Experts" for kind in type(experts).__mro__)


def _mxfp4(experts: nn.Module, name: str) -> MXFP4Parametrization | None:
    steps = list(computed_parameters(experts).get(name, ()))
    return steps[0] if len(steps) == 1 and isinstance(steps[0], MXFP4Parametrization) else None


def stored_parameter(experts: nn.Module, name: str) -> nn.Parameter:
    """The parameter that holds a stack, or a packed stack's bytes."""
    computed = computed_parameters(experts)
    return cast(
        nn.Parameter, computed[name].original if name in computed else getattr(experts, name)
    )


def read_stack(experts: nn.Module, name: str) -> Tensor | PackedExperts:
    """The stack ``name`` of a module of experts.

    Raises:
        TypeError, ValueError: it is packed in a way that ``lora_experts`` does not know.
    """
    if is_in_4_bits(experts, name):
        return NF4Experts.from_parametrization(experts, name)
    mxfp4 = _mxfp4(experts, name)
    if mxfp4 is not None:
        return mxfp4.stack(stored_parameter(experts, name))
    if _is_fp8_module(experts):
        return FP8Experts.from_module(experts, name)
    return cast(Tensor, getattr(experts, name))


def is_stored_as_taken(experts: nn.Module, name: str) -> bool:
    """Whether a stack is stored in the orientation that its module gives it."""
    mxfp4 = _mxfp4(experts, name)
    return mxfp4 is None or not mxfp4.transposed


def format_of_stack(experts: nn.Module, name: str) -> str | None:
    """What reports call the format of a packed stack, or None."""
    if not is_packed(experts, name):
        return None
    stack = read_stack(experts, name)
    return stack.format if isinstance(stack, PackedExperts) else None


def reason_stack_does_not_fit(experts: nn.Module, name: str, gathered: bool) -> str | None:
    """Why a stack and its bias cannot be computed by ``lora_experts``, or None. ``gathered``:
    shards have been put together.
    """
    if is_packed(experts, name):
        # Shards do not tell. They were whole when they got their adapter.
        if gathered or not is_sharded(stored_parameter(experts, name)):
            try:
                read_stack(experts, name)
            except (TypeError, ValueError) as error:
                return f"its {name} does not fit lora_experts: {error}"
    else:
        reason = _reason_against(name, getattr(experts, name), gathered)
        if reason is not None:
            return reason
    return _reason_against(name, getattr(experts, f"{name}_bias", None), gathered)


def _reason_against(name: str, tensor: Tensor | None, gathered: bool) -> str | None:
    if tensor is None or (not gathered and is_sharded(tensor)):
        return None
    if type(tensor) in (nn.Parameter, Tensor) and tensor.dtype in FLOAT_DTYPES:
        return None
    return f"its {name} is a {type(tensor).__name__} of {tensor.dtype}"


def has_hooks_of_others(experts: nn.Module) -> bool:
    """Whether calling a module of experts may do more than run its class's forward and cache what
    bitsandbytes' parametrization computes.
    """
    hooks: list[Any] = []
    for attribute in ("_forward_hooks", "_forward_pre_hooks"):
        hooks += experts.__dict__[attribute].values()
    if experts._backward_hooks or experts._backward_pre_hooks or "forward" in experts.__dict__:
        return True
    return any(not _only_caches(hook) for hook in hooks)


def _only_caches(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == _OF_BITSANDBYTES


# Parameters in MXFP4


def set_mxfp4(
    experts: nn.Module, name: str, blocks: Tensor, scales: Tensor, transposed: bool
) -> None:
    """Put ``blocks`` and ``scales`` of a checkpoint in place of the parameter ``name``, in whose
    dtype the module goes on to get its values.
    """
    dtype = cast(Tensor, getattr(experts, name)).dtype
    step = MXFP4Parametrization(scales, dtype, transposed)
    experts.register_parameter(name, nn.Parameter(blocks, requires_grad=False))
    parametrize.register_parametrization(experts, name, step, unsafe=True)
    experts.register_state_dict_post_hook(partial(_name_as_in_checkpoint, parameter=name))
    experts.register_load_state_dict_pre_hook(partial(_name_as_in_module, parameter=name))
    _cache_in_forward(type(experts))


def _cache_in_forward(kind: type[nn.Module]) -> None:
    """Let the forward of ``kind``, a class that parametrize has made for one module, dequantize each
    stack once. A loop over experts would dequantize it once for each.

    Not by ``take_over``: parametrize puts properties on a module's class, and takes it off by its
    first base, so it would not find its own class below another.
    """
    if "forward" in vars(kind):
        # Another stack of the module came first.
        return
    inherited = kind.forward

    @wraps(inherited)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Not by hooks: PyTorch calls none after a KeyboardInterrupt, and the cache is one for all
        # modules of the process.
        with parametrize.cached():
            return inherited(self, *args, **kwargs)

    kind.forward = forward


def _names_of_mxfp4(prefix: str, parameter: str) -> dict[str, str]:
    """The names in a checkpoint, by those that a module has."""
    computed = f"{prefix}parametrizations.{parameter}."
    return {
        f"{computed}original": f"{prefix}{parameter}_blocks",
        f"{computed}0.scales": f"{prefix}{parameter}_scales",
    }


def _name_as_in_checkpoint(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *, parameter: str
) -> None:
    for name, in_checkpoint in _names_of_mxfp4(prefix, parameter).items():
        if name in state:
            state[in_checkpoint] = state.pop(name)


def _name_as_in_module(
    module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any, parameter: str
) -> None:
    for name, in_checkpoint in _names_of_mxfp4(prefix, parameter).items():
        if in_checkpoint in state:
            state[name] = state.pop(in_checkpoint)
