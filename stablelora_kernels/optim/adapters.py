"""Parameter groups by a PEFT model's adapters, each with settings of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import cast

from stablelora_kernels.optim.groups import Named, ParamGroup
from stablelora_kernels.optim.options import HYPER
from stablelora_kernels.pairs import adapter_of

# The key of a group that holds its adapter's name.
ADAPTER = "adapter"
# The norm that it clips is that of all gradients together.
_SHARED = "max_grad_norm"
_PER_ADAPTER = tuple(name for name in HYPER if name != _SHARED)


def check_adapters(adapters: object, named: Sequence[Named], options: Mapping[str, object]) -> None:
    """Raise unless ``adapters`` are names of adapters among ``named`` parameters, each with settings
    that a group may have. ``options``: the optimizer's.
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(
            f"adapters must be a dict of adapters' names and their settings, got {adapters!r}"
        )
    known = {adapter for name, _ in named if (adapter := adapter_of(name)) is not None}
    for adapter, settings in adapters.items():
        if adapter not in known:
            listed = ", ".join(sorted(map(repr, known))) or "none"
            raise ValueError(f"adapters names {adapter!r}, but the model's adapters are {listed}")
        if not isinstance(settings, Mapping):
            raise TypeError(f"adapters[{adapter!r}] must be a dict of settings, got {settings!r}")
        for key in settings:
            if key not in _PER_ADAPTER:
                raise ValueError(
                    f"adapters[{adapter!r}] may have the keys {', '.join(_PER_ADAPTER)}, got {key!r}"
                )
    if options.get(_SHARED) is not None:
        raise ValueError(
            f"{_SHARED} must be None with adapters, got {options[_SHARED]}: "
            "it clips the norm of all adapters' gradients together. "
            "Call torch.nn.utils.clip_grad_norm_ for the params of each group instead"
        )


def frozen_adapters(adapters: Mapping[str, object], named: Sequence[Named]) -> list[Named]:
    """The parameters of those of ``adapters`` that are frozen as a whole, as PEFT leaves all but the
    active one.
    """
    training = {adapter_of(name) for name, p in named if p.requires_grad}
    return [
        (name, p)
        for name, p in named
        if (adapter := adapter_of(name)) in adapters and adapter not in training
    ]


def groups_by_adapter(
    adapters: Mapping[str, Mapping[str, object]], named: Sequence[Named]
) -> list[dict[str, object]]:
    """A group for each of ``adapters``, and one of all other parameters."""
    groups: list[dict[str, object]] = []
    for adapter, settings in adapters.items():
        of_adapter = [(name, p) for name, p in named if adapter_of(name) == adapter]
        groups.append({"params": of_adapter, ADAPTER: adapter, **settings})
    others = [(name, p) for name, p in named if adapter_of(name) not in adapters]
    if any(p.requires_grad for _, p in others):
        groups.append({"params": others})
    return groups


def warn_of_frozen(groups: Sequence[ParamGroup], warned: set[str]) -> None:
    """Warn of each adapter that has been frozen since the optimizer was made, as PEFT's set_adapter
    does; once, by ``warned``.
    """
    for group in groups:
        adapter = cast("str | None", group.get(ADAPTER))
        params = group["params"]
        if adapter is None or adapter in warned or not params or params[0].requires_grad:
            continue
        warned.add(adapter)
        warnings.warn(
            f"adapter {adapter!r} no longer requires gradients, so it does not train: PEFT's set_adapter freezes all others. "
            "adapters_of_rows runs any adapter without it",
            RuntimeWarning,
            stacklevel=7,
        )
