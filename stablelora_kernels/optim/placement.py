"""Where the A and B of a shrinkage's pairs are: an optimizer's own parameters, whole or DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from stablelora_kernels.optim.groups import ParamGroup
from stablelora_kernels.optim.sharding import Shard, ShardSums, shard_of
from stablelora_kernels.optim.shrink import Parts
from stablelora_kernels.optim.state import is_state_init_step
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.tensors import local, local_grad


class _Place(NamedTuple):
    """The index of a parameter's group, and its own in the group."""

    group: int
    number: int


class Placement:
    """The parameters of a torch optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        # The optimizers whose steps are hooked.
        self.hooked = [optimizer]
        self._places = {
            p: _Place(g, i)
            for g, group in enumerate(optimizer.param_groups)
            for i, p in enumerate(group["params"])
        }

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    def group_of(self, pair: LoRAPair) -> int:
        """The index of the group that has A. ValueError if none has it."""
        if pair.A not in self._places:
            hint = (
                "shard or wrap the model before the optimizer is made, and make StableShrink last"
            )
            if all(p.dim() == 1 for p in self._places):
                hint = (
                    "its parameters are flat, as under DeepSpeed's ZeRO: give StableShrink the optimizer that "
                    "deepspeed.initialize returns"
                )
            raise ValueError(
                f"pair {pair.name!r}: A {list(pair.A.shape)} is not among the {len(self._places)} parameters of the "
                f"optimizer; {hint}"
            )
        return self._places[pair.A].group

    def parts(self, pair: LoRAPair) -> Parts:
        """This process's parts of the pair's tensors."""
        a, b = local(pair.A.detach()), local(pair.B.detach())
        group = self.optimizer.param_groups[self._places[pair.A].group]
        # A schedule-free optimizer's parameters interpolate between this iterate and the average.
        beside = self.optimizer.state.get(pair.A, {}).get("z") if "train_mode" in group else None
        return Parts(a, b, None if beside is None else local(beside))

    def shard_of(self, pair: LoRAPair, base: int) -> Shard:
        """The elements of A that this process has; A's first has the index ``base``."""
        return shard_of(f"A of pair {pair.name!r}", pair.A, base)

    def sums(self, owners: Sequence[Tensor]) -> ShardSums:
        """Sums over the processes that share the parameters ``owners``."""
        return ShardSums(owners)

    def takes_step(self, pairs: Sequence[LoRAPair]) -> bool:
        """Whether the optimizer's step begins with this call, and changes its parameters.

        Raises:
            RuntimeError: a pair's A is no longer in the optimizer.
        """
        groups = self.optimizer.param_groups
        for pair in pairs:
            group, number = self._places[pair.A]
            params = groups[group]["params"]
            if number >= len(params) or params[number] is not pair.A:
                raise RuntimeError(
                    f"A of pair {pair.name!r} is no longer in the optimizer, as if the model was sharded since: make "
                    "StableShrink last"
                )
        # schedule-free's step raises an error in its evaluation mode.
        if not all(group.get("train_mode", True) for group in groups):
            return False
        if self.optimizer.state:
            return True
        params = [p for group in groups for p in group["params"]]
        grads = [local_grad(p) for p in params]
        if all(grad is None for grad in grads):
            return False
        return not is_state_init_step(cast("list[ParamGroup]", groups), params, grads)

    def ends_step(self) -> bool:
        """Whether the call of the optimizer's step that has just ended was the step's last."""
        return True

    def has_gradient(self, pair: LoRAPair) -> bool:
        """Whether A takes the next step."""
        return pair.A.grad is not None

    def found_inf(self) -> Tensor | None:
        """GradScaler's verdict, where it leaves skipping the step to the optimizer."""
        return cast("Tensor | None", getattr(self.optimizer, "found_inf", None))


def inner_optimizer(optimizer: object) -> Any:
    """The optimizer inside accelerate's wrapper."""
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    return inner
