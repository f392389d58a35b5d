"""The engines of an optimizer: one for each device that holds parameters, on the backend in force there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.dispatch.settings import get_backend
from stablelora_kernels.optim.hyperparameters import Member, members_and_settings
from stablelora_kernels.optim.param_groups import check_parameter, check_storage_fits
from stablelora_kernels.optim.state import Pair, Storage, as_dtensors, check_entry, local_state, work_dtype
from stablelora_kernels.optim.torch_engine import TorchStep
from stablelora_kernels.pairs import LoRAPair


def build_engines(
    groups: Sequence[dict[str, Any]],
    pairs: Sequence[LoRAPair],
    state: dict[torch.Tensor, dict[str, Any]],
    storage: Storage,
    max_grad_norm: float | None,
    skipped_on_device: dict[torch.device, torch.Tensor],
) -> list[tuple[list[int], Any]]:
    """For each device the indices of its parameters, and their engine. Completes ``state`` and ``skipped_on_device``.

    Raises:
        TypeError: a parameter has a dtype that the optimizer or the backend in force does not take.
        ValueError: a parameter or its state does not fit; nothing has changed then.
    """
    check_storage_fits(groups, storage)
    members, settings = members_and_settings(groups, pairs)
    by_device: dict[torch.device, list[int]] = {}
    for index, member in enumerate(members):
        check_parameter("a parameter", member.owner)
        by_device.setdefault(member.param.device, []).append(index)
    if len(by_device) > 1 and max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm needs all parameters on one device, got {', '.join(map(str, by_device))}; "
            "clip with torch.nn.utils.clip_grad_norm_ instead"
        )
    for pair in pairs:
        if pair.A.device != pair.B.device:
            raise ValueError(
                f"pair {pair.name!r}: A is on {pair.A.device} and B on {pair.B.device}; they must share one"
            )
    classes = {device: _engine_class(device, [members[i] for i in indices]) for device, indices in by_device.items()}
    names = [name for group in groups for name in group["param_names"]]
    entries = [local_state(state.get(member.owner, {}), member) for member in members]
    for entry, name, member in zip(entries, names, members, strict=True):
        check_entry(entry, name, member, settings[member.setting_index], storage)
    engines = []
    for device, indices in by_device.items():
        if device not in skipped_on_device:
            skipped_on_device[device] = torch.zeros((), dtype=torch.int32, device=device)
        engine = classes[device](
            [members[i] for i in indices],
            _pairs_of([members[i] for i in indices], pairs),
            settings,
            {members[i].param: entries[i] for i in indices},
            skipped_on_device[device],
            storage,
        )
        engines.append((indices, engine))
    for member, entry in zip(members, entries, strict=True):
        state[member.owner] = entry if member.param is member.owner else as_dtensors(entry, member.owner)
    return engines


def _engine_class(device: torch.device, members: Sequence[Member]) -> Any:
    """The class of the engine that takes the step of the ``members`` on ``device``."""
    if resolve_backend(device) == "torch":
        return TorchStep
    if any(work_dtype(member.param) is torch.float64 for member in members):
        if get_backend() == "triton":
            raise TypeError("backend 'triton' has no float64 optimizer step; use 'auto' or 'torch'")
        return TorchStep
    # Triton is optional, so nothing imports its engine before it is used.
    from stablelora_kernels.optim.triton_engine import TritonStep

    return TritonStep


def _pairs_of(members: Sequence[Member], pairs: Sequence[LoRAPair]) -> list[Pair]:
    """Those of ``pairs`` that are among ``members``, as indices."""
    index_of = {id(member.owner): i for i, member in enumerate(members)}
    return [Pair(index_of[id(pair.A)], index_of[id(pair.B)]) for pair in pairs if id(pair.A) in index_of]
