"""StableLoRAAdamW: AdamW that also shrinks LoRA's A by Stable-LoRA's latch rule, in one pass over
the parameters.

The arithmetic of a step is in ``torch_step`` (PyTorch's operators) and ``triton_step`` (one
kernel). This module keeps the public interface and the parameter groups, and hands each step with
what has changed to the engine of each device.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.dispatch.settings import get_backend
from stablelora_kernels.optim import options, snapshot, state
from stablelora_kernels.optim.snapshot import Gradients, Snapshot, same_objects
from stablelora_kernels.optim.stability import PairStability, finite_norms, stability_of
from stablelora_kernels.optim.state import Member
from stablelora_kernels.optim.torch_step import TorchStep
from stablelora_kernels.optim.triton_step import TritonStep
from stablelora_kernels.pairs import LoRAPair, stacked_experts
from stablelora_kernels.utils.modules import check_module, clean, innermost
from stablelora_kernels.utils.tensors import is_sharded, local, local_grad
from stablelora_kernels.utils.validation import check_float, counted


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
        lr: the learning rate, a number or a 0-d tensor, which on Triton the host never reads from a
            GPU.
        betas: decay rates of the two moments, in [0, 1). CPU tensors are read once, at
            construction.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, multiplied by ``lr``; a number or a 0-d tensor, as
            ``lr``.
        shrink_ratio: lambda, in [0, 1); 0 gives plain AdamW. A number or a 0-d tensor, as ``lr``.
        shrink_pattern: shrink ratios of some pairs. A key is a regular expression for the pair's
            dotted name, with or without PEFT's adapter, or for its end after a dot, as in
            ``LoRAConfig.rank_pattern``. The first key that matches counts. Patterns are applied
            when the optimizer is built, loaded or given a group.
        shrink_schedule: a function from a step, counted from one, to the shrink ratio of all pairs
            without a pattern. Each ``step()`` with a gradient writes its value to every group's
            ``"shrink_ratio"``. A CUDA graph would replay one value, so capture is refused; instead
            pass ``shrink_ratio`` as a tensor and write to it between replays. ``state_dict`` holds
            the count of steps but not the function. A lambda can be copied but not pickled.
        stop_condition: "norm" is Algorithm 1. "never" shrinks at every step and latches no pair,
            for comparison; a latched pair stays latched.
        lr_ratio_B: B's learning rate is this multiple of ``lr``, as in LoRA+ (arXiv 2402.12354).
        maximize: climb instead of descend.
        amsgrad: divide by the root of the largest second moment so far, a third moment in the
            state.
        capturable: allow capturing :meth:`step` in a CUDA graph, alone or with the backward pass,
            after one step outside of it; only on Triton. Capture again after ``load_state_dict``
            and after a group has changed. Values that change between replays, such as ``lr``, must
            be tensors on the GPU. A replay does not notice writes to parameters between replays.
        max_grad_norm: clip the norm of all gradients together, as
            ``torch.nn.utils.clip_grad_norm_``, with one more launch. The step may leave clipped
            gradients in ``.grad``. A step whose norm is not finite changes nothing; it is counted
            in ``nonfinite_steps``, and :meth:`stability` and :meth:`state_dict` warn of it.
            ``math.inf`` never clips but still skips such steps.
        master_weights: keep a float32 master of every bfloat16 or float16 parameter in
            ``state[p]["master"]``. The launch that updates it writes its nearest rounding to the
            parameter; nothing is rounded at random. Elements that someone else writes to the
            parameter replace their master; after an in-place write to ``p.data`` call
            :meth:`refresh`, or the write is lost.
        moments_dtype: torch.float32; torch.bfloat16, which saves 4 bytes a parameter; or
            torch.uint8, which saves 6: 8-bit floating-point codes with a float32 scale for each
            block of 256, not for DTensors. The latter two are rounded at random. A loaded state is
            converted. During a step the PyTorch path, but not Triton's, holds the new moments and a
            float32 copy of all parameters, one group's moments in float32, and a copy of gradients
            that are scaled or clipped.
        seed: seed of the random rounding. Default: PyTorch's initial seed, which
            ``torch.manual_seed`` sets.

    Raises:
        TypeError: a parameter has no name, or an argument has the wrong type.
        ValueError: a hyperparameter is out of range, an A has no B, or there is no pair.
    """

    # GradScaler then passes its scale and found_inf as device tensors instead of reading them.
    _step_supports_amp_scaling = True
    # Skipped steps: those that were reported, and those counted by the optimizer that this one is a
    # copy of.
    _reported = _skipped_before = 0
    # What a step writes to, and by how much that raises the sum of the versions watched; None as
    # long as that is not known.
    _written: list[Tensor]
    _raised: int | None = None
    # Of the pairs that are stacks, by name; a model alone knows them.
    _experts: Mapping[str, int] | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        shrink_ratio: float | torch.Tensor = 5e-4,
        shrink_pattern: Mapping[str, float] | None = None,
        shrink_schedule: Callable[[int], float] | None = None,
        stop_condition: str = "norm",
        lr_ratio_B: float = 1.0,
        maximize: bool = False,
        amsgrad: bool = False,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        moments_dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "shrink_ratio": shrink_ratio, "shrink_pattern": shrink_pattern, "stop_condition": stop_condition,
            "lr_ratio_B": lr_ratio_B, "maximize": maximize, "amsgrad": amsgrad, "capturable": capturable,
            "seed": torch.initial_seed() % 2**63 if seed is None else seed, "max_grad_norm": max_grad_norm,
        }  # fmt: skip
        defaults.update(options.check_hyper(defaults, ""))
        if shrink_schedule is not None and not callable(shrink_schedule):
            raise TypeError(
                f"shrink_schedule must be a function of the step, got {shrink_schedule!r}"
            )
        self.storage = options.check_storage(moments_dtype, master_weights)
        defaults.update(self.storage._asdict())
        # Before the base class adds the groups one by one: the first need not hold whole pairs.
        groups = options.check_groups(options.as_groups(params), [], defaults, self.storage)
        super().__init__(groups, defaults)
        self.shrink_schedule = shrink_schedule
        self._find_pairs()

    @classmethod
    def from_model(cls, model: nn.Module, **kwargs: Any) -> StableLoRAAdamW:
        """The optimizer of every trainable parameter of ``model``, with this library's LoRA layers
        or PEFT's.

        Parameter names leave out DistributedDataParallel, torch.compile and checkpoint_wrapper.
        Given to a ``Trainer`` in ``optimizers``, it keeps its own ``lr``: the trainer's
        ``learning_rate`` does not count.

        Raises:
            TypeError: ``model`` is no module.
        """
        check_module(model)
        optimizer = cls(
            ((clean(name), p) for name, p in innermost(model).named_parameters()), **kwargs
        )
        optimizer._experts = stacked_experts(innermost(model))
        return optimizer

    def __repr__(self) -> str:
        # torch's has the names of all parameters, kilobytes of them, and a line for each setting.
        lines = [f"{type(self).__name__} ({counted(len(self._pairs), 'LoRA pair')})"]
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
        return self.param_groups[0]["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        value = options.check_max_grad_norm("max_grad_norm", value)
        for group in self.param_groups:
            group["max_grad_norm"] = value

    @property
    def pairs(self) -> list[LoRAPair]:
        """The pairs, in the order of their first parameter."""
        return list(self._pairs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters or pairs. It may not leave an A without its B."""
        if "_pairs" not in self.__dict__:
            # The constructor has checked all groups together.
            return super().add_param_group(param_group)
        # All groups share this value, which is not the default once another was set or loaded.
        defaults = {**self.defaults, "max_grad_norm": self.max_grad_norm}
        super().add_param_group(
            *options.check_groups([param_group], self.param_groups, defaults, self.storage)
        )
        self._find_pairs()

    def _find_pairs(self) -> None:
        """Find the pairs of ``param_groups`` again, and forget the engines and what the last step
        found.
        """
        self._pairs = options.find_pairs(self.param_groups)
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._any_sharded = any(map(is_sharded, self._params))
        self._skipped_on_device: dict[torch.device, Tensor] = getattr(
            self, "_skipped_on_device", {}
        )
        # One a device.
        self._engines: list[TorchStep | TritonStep] = []
        # The parameters, and their shards, whose versions tell that someone else wrote to them.
        self._watched: list[Tensor] = []
        self._last = Snapshot([list(group["params"]) for group in self.param_groups])

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step. ``closure``, if given, recomputes the loss and its gradients; its loss is
        returned.

        Raises:
            RuntimeError: a gradient is sparse; nothing has changed then.
            torch.OutOfMemoryError: nothing has changed then, unless parameters are on several
                devices.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if not same_objects(
            [list(group["params"]) for group in self.param_groups], self._last.params
        ):
            # Trainers replace the groups' parameters when they shard a model late.
            self._find_pairs()
        read = local_grad if self._any_sharded else attrgetter("grad")
        gradients = Gradients.of(list(map(read, self._params)))
        if not gradients.any():
            return loss
        if not self.state and state.is_state_init_step(
            self.param_groups, self._params, gradients.tensors
        ):
            self._build_engines()
            return loss
        if (scheduled := self._follow_schedule()) is not None:
            # The schedule is user code, which may have moved the gradients.
            gradients = Gradients.of(gradients.tensors)
        now, capturing = self._snapshot(gradients), snapshot.capturing()
        change = now.since(self._last)
        if change.build:
            if capturing:
                raise RuntimeError(
                    "run step() once before capturing it in a CUDA graph, so that its tables exist"
                )
            self._build_engines()
            now = self._snapshot(gradients).kept()
            self._last = dataclasses.replace(now, versions=None)
        # If this step raises, the next one uploads everything again.
        self._last.tensors = self._last.gradients = None
        if change.gradients and (written := gradients.owners(self._params)) is not self._written:
            self._written, self._raised = written, None
        for engine in self._engines:
            # torch.amp's scale and verdict, if GradScaler has set them.
            scale, found_inf = (
                t if t is None else local(t).to(engine.device, torch.float32, non_blocking=True)
                for t in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
            )
            own = gradients
            if len(self._engines) > 1:
                own = Gradients.of([gradients.tensors[member.place] for member in engine.members])
            engine.step(own, change, scale, found_inf)
        now.state, self._last = self._last.state, now
        self._count_write()
        # Copies and measurements of a graph exist only once it is replayed.
        if capturing and (change.hyper or change.gradients):
            now.tensors = now.gradients = None
        if capturing and change.written:
            now.versions = None
        # Last: a step that raised counts for nothing.
        if scheduled is not None:
            self.param_groups[0]["shrink_step"] = scheduled
        return loss

    def _snapshot(self, gradients: Gradients | None = None) -> Snapshot:
        """What there is in Python now."""
        params = [local(p) for p in self._params] if self._any_sharded else self._params
        on_cpu = all(engine.device.type == "cpu" for engine in self._engines)
        found = Snapshot.take(self.param_groups, params, self.state, self._watched, on_cpu)
        found.gradients = gradients and gradients.layout
        return found

    def _count_write(self) -> None:
        """Raise the versions of what a step has written, so that a backward pass through
        overwritten values is noticed.
        """
        torch.autograd.graph.increment_version(self._written)
        assert self._last.versions is not None
        if self._raised is None:
            self._raised = snapshot.versions_of(self._watched) - self._last.versions
        self._last.versions += self._raised

    def _follow_schedule(self) -> int | None:
        """Write this step's shrink ratio into the groups if there is a schedule, and return the
        step.
        """
        if self.shrink_schedule is None:
            return None
        if snapshot.capturing():
            raise RuntimeError(
                "shrink_schedule is a function, which a CUDA graph would not call again: give shrink_ratio as a tensor, and "
                "write to it between replays"
            )
        step = self.param_groups[0].get("shrink_step", 0) + 1
        ratio = check_float(
            f"shrink_schedule({step})", self.shrink_schedule(step), low=0.0, high=1.0
        )
        for group in self.param_groups:
            group["shrink_ratio"] = ratio
        return step

    def _build_engines(self) -> None:
        """Check and complete the state, then make one engine for each device that holds parameters."""
        self._last = Snapshot(self._last.params)
        by_device = state.members_of(self.param_groups, self._pairs, self.state, self.storage)
        classes = [_engine_class(device, members) for device, members in by_device.items()]
        self._engines = []
        for engine_class, (device, members) in zip(classes, by_device.items(), strict=True):
            none = torch.zeros((), dtype=torch.int32, device=device)
            skipped = self._skipped_on_device.setdefault(device, none)
            self._engines.append(engine_class(members, self._pairs, self.storage, skipped))
        members = [member for engine in self._engines for member in engine.members]
        self.state.update(
            {member.owner: state.as_owned(member.entry, member.owner) for member in members}
        )
        # An operation on a DTensor raises its own version, and one on its shard that of the shard.
        watched = [engine.members[i] for engine in self._engines for i in engine.watched]
        shards = [member.param for member in watched if member.param is not member.owner]
        self._watched = [member.owner for member in watched] + shards
        self._written = []

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
        self._last.versions = None

    @property
    def nonfinite_steps(self) -> int:
        """The number of steps that ``max_grad_norm`` skipped because the gradients' norm was not
        finite. Reads the device.
        """
        return self._skipped_before + sum(
            int(skipped) for skipped in self._skipped_on_device.values()
        )

    def _checked_norms(self, local_only: bool = False) -> list[tuple[float, float]]:
        """The norms of every pair. Warns of steps that were skipped, and of norms that a GPU's
        float32 does not hold.
        """
        if (new := self.nonfinite_steps - self._reported) > 0:
            steps, their = ("1 step was", "its") if new == 1 else (f"{new} steps were", "their")
            warnings.warn(
                f"{steps} skipped because the norm of {their} gradients was not finite",
                RuntimeWarning,
                stacklevel=4,
            )
            self._reported += new
        float32_squares = any(isinstance(engine, TritonStep) for engine in self._engines)
        return finite_norms(self._pairs, float32_squares, local_only)

    @torch.no_grad()
    def stability(self) -> list[PairStability]:
        """The stability of every pair after the last step. Reads the device; with sharded pairs all
        ranks must call together.

        Raises:
            RuntimeError: a norm is not finite, so its pair can neither shrink nor latch.
        """
        return stability_of(self._pairs, self._checked_norms(), self.state, self._experts or {})

    def state_dict(self) -> dict[str, Any]:
        """Moments, steps, latches and hyperparameters, seed and shrink ratio included: enough for a
        bit-exact resume.

        Raises:
            RuntimeError: a pair's norm is not finite.
        """
        # Without a collective: perhaps not all ranks save.
        self._checked_norms(local_only=True)
        return super().state_dict()

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, or that of ``torch.optim.AdamW`` to go on from
        there with Stable-LoRA.

        Hyperparameters become the saved ones, ``max_grad_norm`` included. AdamW's state has none of
        Stable-LoRA's own, which stay, and no pair has latched in it. ``moments_dtype`` and
        ``master_weights`` stay: the state is converted. A warning says so, and another says if the
        saved ``max_grad_norm`` replaces one that this optimizer was given.

        Raises:
            ValueError: the state belongs to another optimizer or to other parameters; nothing has
                changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved = options.check_saved(state_dict, self.param_groups)
        groups = [
            options.with_saved(own, theirs)
            for own, theirs in zip(self.param_groups, saved, strict=True)
        ]
        options.check_shared(groups, self.storage)
        loaded = state.load_state(state_dict, saved, self.param_groups, self._pairs, self.storage)
        options.warn_of_differences(saved[0], self.param_groups[0])
        for own, group in zip(self.param_groups, groups, strict=True):
            own.update(group)
        self.state.clear()
        self.state.update(loaded)
        self._find_pairs()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {
            "storage": self.storage,
            "_reported": self._reported,
            "_skipped_before": self.nonfinite_steps,
        }
        own["_experts"] = self._experts
        return {
            **super().__getstate__(),
            **own,
            "shrink_schedule": options.CopiedSchedule(self.shrink_schedule),
        }

    def __setstate__(self, given: dict[str, Any]) -> None:
        super().__setstate__(given)
        self.shrink_schedule = given["shrink_schedule"].schedule
        self._find_pairs()


def _engine_class(device: torch.device, members: Sequence[Member]) -> type[TorchStep | TritonStep]:
    """The class of the engine that takes the step of the ``members`` on ``device``."""
    has_float64 = any(member.param.dtype is torch.float64 for member in members)
    if has_float64 and get_backend() == "triton":
        raise TypeError("backend 'triton' has no float64 optimizer step; use 'auto' or 'torch'")
    return TorchStep if has_float64 or resolve_backend(device) == "torch" else TritonStep
