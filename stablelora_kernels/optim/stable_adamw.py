"""StableLoRAAdamW: AdamW that also shrinks LoRA's A by Stable-LoRA's latch rule, in one pass over
the parameters.

The arithmetic of a step is in ``torch_step`` (PyTorch's operators) and ``triton_step`` (one
kernel). This module keeps the public interface and the parameter groups, and hands each step with
what has changed to the engine of each device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from stablelora_kernels.optim import groups, options, state
from stablelora_kernels.optim.groups import ParamGroup
from stablelora_kernels.optim.options import Options
from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.optim.stability import (
    PairCounts,
    PairNorms,
    PairStability,
    finite_norms,
    stability_of,
    warn_of_skipped,
)
from stablelora_kernels.optim.step import Steps
from stablelora_kernels.pairs import LoRAPair, stacked_experts
from stablelora_kernels.utils.modules import check_module, clean, innermost
from stablelora_kernels.utils.tensors import local
from stablelora_kernels.utils.validation import counted

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Named parameters, pairs, or group dicts of either.
Params = Iterable[tuple[str, Tensor]] | Iterable[LoRAPair] | Iterable[dict[str, Any]]


@options.shows_options
class StableLoRAAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, preceded by Algorithm 1 of Stable-LoRA (arXiv 2603.05204)
    at every step.

    For each pair A [r, n], B [m, r] that has not latched, on the values before the step::

        if ||A||_F / n > ||B||_F / m:   A <- (1 - shrink_ratio) A
        else:                           the pair latches permanently

    Then A, B and every trainable parameter outside a pair take the step of
    :class:`torch.optim.AdamW`. A pair whose A has no gradient neither shrinks nor latches. On
    Triton :meth:`step` never reads from the GPU. PyTorch's operators, which run float64 and GPUs
    without Triton, decide the latch on the host.

    Parameters may be DTensors, sharded or replicated. Norms are then those of the full A and B,
    which takes one small collective for each mesh dimension that shards them, until all pairs have
    latched (clipping takes one at every step). All ranks latch at the same step. An element's
    update, its random rounding included, does not depend on the number of ranks. Save checkpoints
    with ``torch.distributed.checkpoint``.

    Parameters are float32, float64, bfloat16 or float16. The two low-precision types are computed
    in float32 with float32 moments and rounded once, at random, so that small changes happen on
    average. Seed, step and element decide the rounding.

    Args:
        params: named parameters, as from ``model.named_parameters()``; or :class:`LoRAPair`
            objects; or parameter groups, dicts with ``"params"`` of either kind and their own
            hyperparameters. Pairs are found by name, across groups. A pair has the ``shrink_ratio``
            of A's group. Frozen parameters are ignored.
        {options}

    Raises:
        TypeError: a parameter has no name, or an argument has the wrong type.
        ValueError: a hyperparameter is out of range, an A has no B, or there is no pair.
    """

    # GradScaler then passes its scale and found_inf as device tensors instead of reading them.
    _step_supports_amp_scaling = True
    # How many skipped steps a warning has told of, and how many were counted by the optimizer that
    # this one is a copy of.
    _reported = 0
    _skipped_before = 0
    # Of the pairs that are stacks, by name; a model alone knows them.
    _experts: Mapping[str, int] | None = None
    # Adapters of which a warning has told that they are frozen.
    _frozen: set[str]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = options.DEFAULT_LR,
        **hyper: Unpack[Options],
    ) -> None:
        defaults = options.check_options(options.with_defaults({"lr": lr, **hyper}))
        # Before the base class adds the groups one by one: the first need not hold whole pairs.
        checked = groups.check_groups(groups.as_groups(params), [], defaults)
        super().__init__(cast("list[dict[str, Any]]", checked), defaults)
        self._frozen = set()
        self._find_pairs()

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        adapters: Mapping[str, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> StableLoRAAdamW:
        """The optimizer of every trainable parameter of ``model``, with this library's LoRA layers
        or PEFT's.

        Parameter names leave out DistributedDataParallel, torch.compile and checkpoint_wrapper.
        Given to a ``Trainer`` in ``optimizers``, it keeps its own ``lr``: the trainer's
        ``learning_rate`` does not count.

        Args:
            model: a model with LoRA layers.
            adapters: by the names of a PEFT model's adapters, the settings in which each differs
                from ``kwargs``: ``{"a": {"lr": 1e-4}, "b": {"lr": 1e-3, "shrink_ratio": 0.0}}``.
                Each adapter gets a parameter group, and one launch takes the step of all. Those
                that PEFT has frozen, because another was active, require gradients from now on.
                All other trainable parameters are in a last group.
            **kwargs: the arguments of the class. With ``adapters``, ``max_grad_norm`` must be None:
                it would clip the norm of all adapters together.

        Raises:
            TypeError: ``model`` is no module, or ``adapters`` or one of its values is no dict.
            ValueError: ``adapters`` has a name that is no adapter's, or a setting that a group does
                not have.
        """
        check_module(model)
        named = [(clean(name), p) for name, p in innermost(model).named_parameters()]
        optimizer = (
            cls(named, **kwargs) if adapters is None else cls._of_adapters(adapters, named, kwargs)
        )
        optimizer._experts = stacked_experts(innermost(model))
        return optimizer

    @classmethod
    def _of_adapters(
        cls,
        adapters: Mapping[str, Mapping[str, Any]],
        named: Sequence[groups.Named],
        kwargs: Mapping[str, Any],
    ) -> StableLoRAAdamW:
        """:meth:`from_model` with a group for each of ``adapters``."""
        groups.check_adapters(adapters, named, kwargs)
        frozen = groups.frozen_adapters(adapters, named)
        for _, p in frozen:
            p.requires_grad_(True)
        try:
            return cls(groups.groups_by_adapter(adapters, named), **kwargs)
        except BaseException:
            for _, p in frozen:
                p.requires_grad_(False)
            raise

    def __repr__(self) -> str:
        # torch's has the names of all parameters, kilobytes of them, and a line for each setting.
        lines = [f"{type(self).__name__} ({counted(len(self._steps.pairs), 'LoRA pair')})"]
        for i, group in enumerate(self.param_groups):
            settings = [
                f"{key}: {group[key]}"
                for key in sorted(group)
                if key not in ("params", "param_names")
            ]
            lines.append(
                f"Parameter Group {i} ({counted(len(group['params']), 'parameter')}): {', '.join(settings)}"
            )
        return "\n".join(lines)

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that all gradients together are clipped to, or None. Setting it sets it in every
        group.
        """
        return self._groups[0]["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        value = options.check_max_grad_norm("max_grad_norm", value)
        for group in self._groups:
            group["max_grad_norm"] = value

    @property
    def _groups(self) -> list[ParamGroup]:
        """``param_groups``, which torch declares as dicts of anything."""
        return cast("list[ParamGroup]", self.param_groups)

    @property
    def pairs(self) -> list[LoRAPair]:
        """The pairs, in the order of their first parameter."""
        return list(self._steps.pairs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters or pairs. It may not leave an A without its B."""
        if "_steps" not in self.__dict__:
            # The constructor has checked all groups together.
            return super().add_param_group(param_group)
        # What all groups share is not the default once another was set or loaded.
        defaults = {**self.defaults, **groups.shared_options(self._groups[0])}
        (checked,) = groups.check_groups([param_group], self._groups, defaults)
        super().add_param_group(cast("dict[str, Any]", checked))
        self._find_pairs()

    def _find_pairs(self) -> None:
        """Find the pairs of ``param_groups`` again, and forget the engines and what the last step
        found.
        """
        skipped = self._steps.skipped if "_steps" in self.__dict__ else {}
        self._steps: Steps = Steps(self._groups, groups.find_pairs(self._groups), skipped)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. ``closure``, if given, recomputes the loss and its gradients; its loss is
        returned.

        Raises:
            RuntimeError: a gradient is sparse; nothing has changed then.
            torch.OutOfMemoryError: nothing has changed then, unless parameters are on several
                devices.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups.warn_of_frozen(self._groups, self._frozen)
        if not self._steps.are_of(self._groups):
            # Trainers replace the groups' parameters when they shard a model late.
            self._find_pairs()
        steps = self._steps
        gradients = steps.gradients()
        if not gradients.any():
            return loss
        if not self.state and state.is_state_init_step(
            self._groups, steps.params, gradients.tensors
        ):
            steps.build(self._groups, self.state)
            return loss
        # GradScaler sets its scale and its verdict as attributes.
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        steps.take(self._groups, self.state, gradients, grad_scale, found_inf)
        return loss

    def refresh(self) -> None:
        """Tell the optimizer that parameters were written to in a way that it cannot notice.
        Returns at once.

        The next step then measures the norms again, in one more launch on Triton, and takes over
        parameters that are no longer their master's rounding. The step notices these writes by
        itself: in-place operations under ``torch.no_grad()`` or on ``p.detach()``,
        ``load_state_dict``, and new memory by ``p.data = tensor``. It cannot notice in-place writes
        to ``p.data``, to a NumPy view, or by another library's kernel or collective: these change
        no version counter. Without ``refresh`` such a write is lost with ``master_weights``.
        Otherwise it counts, but on Triton the next step still decides the latch by the norms from
        before it.
        """
        self._steps.refresh()

    @property
    def nonfinite_steps(self) -> int:
        """The number of steps that ``max_grad_norm`` skipped because the gradients' norm was not
        finite. Reads the device.
        """
        return self._skipped_before + sum(map(int, self._steps.skipped.values()))

    def _checked_norms(self, local_only: bool = False) -> list[PairNorms]:
        """The norms of every pair; ``local_only`` takes those of this process's shards. Warns of
        steps that were skipped, and of norms that a GPU's float32 does not hold.
        """
        unreported = self.nonfinite_steps - self._reported
        if unreported > 0:
            warn_of_skipped(unreported)
            self._reported += unreported
        pairs = self._steps.pairs
        owners = [pair.A for pair in pairs] + [pair.B for pair in pairs]
        halves = [local(p.detach()) for p in owners]
        sums = None if local_only else ShardSums(owners)
        return finite_norms(pairs, halves, sums, self._steps.any_triton)

    @torch.no_grad()
    def stability(self) -> list[PairStability]:
        """The stability of every pair after the last step. Reads the device; with sharded pairs all
        ranks must call together.

        Raises:
            RuntimeError: a norm is not finite, so its pair can neither shrink nor latch.
        """
        norms = self._checked_norms()
        counts = []
        for pair in self._steps.pairs:
            entry = self.state.get(pair.A, {})
            counts.append(PairCounts(int(entry.get("step", 0)), int(entry.get("latched_at", 0))))
        return stability_of(self._steps.pairs, norms, counts, self._experts or {})

    def state_dict(self) -> dict[str, Any]:
        """Moments, steps, latches and hyperparameters, seed and shrink ratio included: enough for a
        bit-exact resume.

        Raises:
            RuntimeError: a pair's norm is not finite.
        """
        # Without a collective: perhaps not all ranks save.
        self._checked_norms(local_only=True)
        state_dict = super().state_dict()
        state.add_dtypes(state_dict, self._groups)
        return state_dict

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, or that of ``torch.optim.AdamW`` to go on from
        there with Stable-LoRA.

        Hyperparameters become the saved ones, ``max_grad_norm`` included. AdamW's state has none of
        Stable-LoRA's own, which stay, and no pair has latched in it. ``moments_dtype`` and
        ``master_weights`` stay: the state is converted. A warning says so. Others say if the saved
        ``max_grad_norm`` replaces one that this optimizer was given, and if a parameter is of
        another dtype than the one of which the state was saved.

        Raises:
            ValueError: the state belongs to another optimizer or to other parameters; nothing has
                changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        state.load(state_dict, self._groups, self.state, self._steps.pairs)
        self._find_pairs()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_reported": self._reported,
            "_skipped_before": self.nonfinite_steps,
            "_experts": self._experts,
            "_frozen": self._frozen,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_pairs()
