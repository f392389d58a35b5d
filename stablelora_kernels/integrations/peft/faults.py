"""What PEFT trains wrongly or not at all without saying so, whoever computes the branch. This
module imports peft.

What a PEFT release does is tried on two small experts rather than looked up by its version.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, cast

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.integrations.peft.wrappers import wrapped_parameters
from stablelora_kernels.model.reports import list_some
from stablelora_kernels.nn.stacks import computed_parameters, is_packed, parameter_names


class ParametrizedFaults(NamedTuple):
    """What PEFT does wrong with adapters on parameters that another parametrization computes, as
    bitsandbytes does in 4 bits.
    """

    # Parameters whose adapter gets no gradient.
    lost: tuple[str, ...] = ()
    # Each call without gradients adds the delta to those of the calls before it.
    repeats: bool = False
    # A disabled adapter's delta is added still.
    remains: bool = False
    # PEFT nests the parameters, and so names them in the adapter's file, in another order than
    # plain ones.
    reorders: bool = False

    @property
    def trains_wrongly(self) -> bool:
        return bool(self.lost) or self.repeats or self.remains

    def __str__(self) -> str:
        texts = []
        if self.lost:
            lost = " and ".join(self.lost)
            texts.append(f"the adapter of {lost} has no effect and gets no gradient")
        if self.repeats:
            texts.append("each call without gradients adds the delta once more")
        if self.remains:
            texts.append("disabling the adapter leaves its delta there")
        if self.reorders:
            texts.append(
                "the adapter's file names the parameters in another order, so it does not load on plain weights"
            )
        return "; ".join(texts)


# What runs right, for the end of a report's sentence.
_RIGHT = (
    "accelerate_peft computes experts right in bitsandbytes' 4 bits, in transformers' FP8Experts and by "
    "load_packed_experts, in whole blocks"
)


def faults_of_wrappers(wrappers: Iterable[tuple[str, ParamWrapper]]) -> list[str]:
    """A sentence on each fault of PEFT's ``wrappers`` of parameters that its own forward computes;
    they come by name, the outermost first.
    """
    names: dict[str, list[str]] = {}
    nested = set()
    for name, wrapper in wrappers:
        nested.add(id(wrapper.base_layer))
        reasons = [_fault_of_dtype(wrapper)]
        if id(wrapper) not in nested:
            reasons.append(_fault_of_parametrization(wrapper))
        for reason in reasons:
            if reason is not None:
                names.setdefault(reason, []).append(name)
    return [f"{reason}: {list_some(some)}; {_RIGHT}" for reason, some in names.items()]


def fault_of_packed(outermost: ParamWrapper) -> str | None:
    """What PEFT's own forward does wrong with packed experts, or None."""
    base = outermost.get_base_layer()
    wrappers = wrapped_parameters(outermost)
    if not any(is_packed(base, name) for name in wrappers):
        return None
    reasons = [_fault_of_dtype(wrapper) for wrapper in wrappers.values()]
    reasons.append(_fault_of_parametrization(outermost))
    return next((reason for reason in reasons if reason is not None), None)


def _fault_of_dtype(wrapper: ParamWrapper) -> str | None:
    parameter = wrapper.parameter_name
    base = wrapper.get_base_layer()
    if parameter in computed_parameters(base):
        return None
    dtype = wrapper.get_param().dtype
    if dtype in FLOAT_DTYPES:
        return None
    return f"PEFT rounds {parameter} with its branch to {dtype}, without a scale, so its adapter trains nothing"


def _fault_of_parametrization(outermost: ParamWrapper) -> str | None:
    faults = faults_of_parametrized(*_parameters(outermost))
    if not faults.trains_wrongly:
        return None
    return f"PEFT {peft.__version__} trains experts wrongly whose weights another parametrization computes: {faults}"


def _parameters(wrapper: ParamWrapper) -> tuple[tuple[str, ...], frozenset[str]]:
    """The adapted parameters of a module, in the order of their definition, and those that a
    parametrization computes.
    """
    base = wrapper.get_base_layer()
    adapted = wrapped_parameters(wrapper)
    computed = computed_parameters(base)
    names = tuple(name for name in parameter_names(base) if name in adapted)
    return names, frozenset(computed) & frozenset(adapted)


@lru_cache
def faults_of_parametrized(names: tuple[str, ...], computed: frozenset[str]) -> ParametrizedFaults:
    """What the installed PEFT does wrong with adapters on the parameters ``names`` of a module, of
    which some are computed.
    """
    if not computed:
        return ParametrizedFaults()
    # The trial draws none of the user's random numbers, and takes none of the user's modes.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # It turns gradients on, too.
        with torch.inference_mode(False):
            try:
                return _try(names, computed)
            except Exception:
                # A PEFT that refuses such experts is not silent about them.
                return ParametrizedFaults()


def _try(names: tuple[str, ...], computed: frozenset[str]) -> ParametrizedFaults:
    """The faults that PEFT shows on two small experts."""
    experts = _adapted(names, computed)
    plain = _adapted(names, frozenset())
    wrappers = wrapped_parameters(experts)
    x = torch.ones(1, _TwoExperts.SIZE)
    frozen = experts.get_base_layer()(x)
    experts(x).sum().backward()
    lost = [name for name in names if all(p.grad is None for p in _pair(wrappers[name]))]
    with torch.no_grad():
        repeats = not torch.equal(experts(x), experts(x))
        for wrapper in wrappers.values():
            wrapper.enable_adapters(False)
        remains = not torch.equal(experts(x), frozen)
    reorders = list(wrappers) != list(wrapped_parameters(plain))
    return ParametrizedFaults(tuple(lost), repeats, remains, reorders)


def _pair(wrapper: ParamWrapper) -> list[Tensor]:
    """A and B of a wrapper's only adapter."""
    (adapter,) = wrapper.lora_A
    return [wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight]  # type: ignore[list-item]


class _Integers(nn.Module):
    """Computes a parameter from integers, as bitsandbytes does from 4 bits."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


class _TwoExperts(nn.Module):
    """Multiplies by each of its parameters, which stack two matrices."""

    SIZE = 4

    def __init__(self, names: tuple[str, ...], computed: frozenset[str]) -> None:
        super().__init__()
        for name in names:
            dtype = torch.int8 if name in computed else torch.float32
            weight = torch.ones(2, self.SIZE, self.SIZE, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        for name in names:
            if name in computed:
                parametrize.register_parametrization(self, name, _Integers(), unsafe=True)
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = x @ getattr(self, name).sum(0)
        return x


def _adapted(names: tuple[str, ...], computed: frozenset[str]) -> ParamWrapper:
    """Two experts with a LoRA adapter of PEFT's on each parameter."""
    targets = [f"experts.{name}" for name in names]
    config = peft.LoraConfig(
        r=1, target_modules=[], target_parameters=targets, init_lora_weights=False
    )
    model = nn.ModuleDict({"experts": _TwoExperts(names, computed)})
    return cast(ParamWrapper, peft.inject_adapter_in_model(config, model).get_submodule("experts"))
