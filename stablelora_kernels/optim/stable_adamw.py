"""StableLoRAAdamW: AdamW that shrinks LoRA's A by the latch rule of Stable-LoRA, in one pass over the parameters."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import nn

from stablelora_kernels.dispatch.backend import get_backend, resolve_backend
from stablelora_kernels.optim import checkpoint
from stablelora_kernels.optim import graph_capture as staging
from stablelora_kernels.optim import param_groups as checks
from stablelora_kernels.optim.gradients import look_at
from stablelora_kernels.optim.hyperparameters import Member, build_key, members_and_settings
from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.optim.stability import PairStability, finite_norms
from stablelora_kernels.optim.state import Pair, work_dtype
from stablelora_kernels.optim.torch_engine import TorchStep
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.dtensor import is_sharded, local, local_grad, whole_like
from stablelora_kernels.utils.wrappers import clean, innermost

# What a parameter's state holds beside tensors of its shape.
COUNTERS = ("step", "latched_at")


def _whole_state(entry: dict[str, Any], p: torch.Tensor) -> dict[str, Any]:
    """The state of this process's part of ``p`` as that of ``p``, over the same memory."""
    return {key: value if key in COUNTERS else whole_like(value, p) for key, value in entry.items()}


class StableLoRAAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, and Algorithm 1 of Stable-LoRA (arXiv 2603.05204) before every update.

    For each pair A [r, n], B [m, r] that has not latched, on the values held before the step::

        if ||A||_F / n > ||B||_F / m:   A <- (1 - shrink_ratio) A
        else:                           the pair latches for good

    Then A, B and every trainable parameter outside a pair take the step of :class:`torch.optim.AdamW`. A pair whose A has
    no gradient is left alone. Nothing is read back from a GPU in :meth:`step`.

    Parameters may be DTensors, sharded or replicated, as FSDP2 and tensor parallelism make them: norms are those of the whole
    A and B, by one small collective for each mesh dimension that shards them, in every step until all pairs have latched and in
    none after (clipping takes one a step). So all ranks latch at the same step, and an element's update, its random rounding
    too, does not depend on the number of ranks. Checkpoints go through ``torch.distributed.checkpoint``.

    Parameters are float32, float64, bfloat16 or float16. The low-precision ones are computed in float32, have float32
    moments and are rounded once, at random by ``seed``, step and element, so that small changes happen on average.

    Args:
        params: named parameters, as ``model.named_parameters()`` gives them, or :class:`LoRAPair`'s, or parameter groups
            (dicts with ``"params"`` of either kind and their own hyper-parameters). Pairs are found by name, across
            groups; a pair's ``shrink_ratio`` is that of A's group. Frozen parameters are ignored.
        lr: the learning rate, a number or a 0-d tensor. A tensor on a GPU is never read on the host.
        betas: decay rates of the two moments, in [0, 1). Tensors on the CPU are read once, here.
        eps: added to the square root of the second moment.
        weight_decay: decoupled from the gradient, times ``lr``; a number or a 0-d tensor, as ``lr``.
        shrink_ratio: lambda, in [0, 1); 0 gives plain AdamW. A number or a 0-d tensor, as ``lr``.
        shrink_pattern: shrink ratios of their own for some pairs. A key is a regular expression for the pair's dotted name,
            with PEFT's adapter or without, or the end of it after a dot, as in ``LoRAConfig.rank_pattern``; the first that
            matches counts. It is read when the optimizer is built, loaded or given a group.
        shrink_schedule: a function that gives the shrink ratio of a step, counted from one, for all pairs without a pattern.
            It is called on the host at each ``step()`` with a gradient, as a scheduler of ``lr`` would be, and its value is
            found in every group's ``"shrink_ratio"``. A CUDA graph would replay one value for ever, so capture is refused:
            give ``shrink_ratio`` as a tensor and write to it between replays. Like a scheduler's functions it is not in
            ``state_dict``; the count of steps is.
        stop_condition: "norm" is Algorithm 1; "never" shrinks at every step without ever latching, for comparison. A pair
            that has latched stays so.
        lr_ratio_B: LoRA+ (arXiv 2402.12354): B's learning rate is so many times ``lr``.
        maximize: climb instead of descend.
        amsgrad: divide by the root of the largest second moment so far, which is kept beside the others.
        capturable: :meth:`step` may be captured in a CUDA graph after one step outside of it, alone or with the backward pass
            whose gradients it takes; what changes between replays, ``lr`` or ``weight_decay``, must then be a tensor on the GPU.
            Other writes to parameters between replays are not noticed.
        max_grad_norm: clip the gradients of all parameters together to this norm, as
            ``torch.nn.utils.clip_grad_norm_`` would before the step: one launch for the norm beside the step's. The step may
            leave the clipped ones in ``.grad``. A step whose gradients' norm is not finite is not taken: A, B, moments,
            counters and latches stay, ``nonfinite_steps`` counts it, and :meth:`stability` and :meth:`state_dict` warn of it.
            ``math.inf`` clips nothing and only does that.
        master_weights: keep a float32 master of every bfloat16 or float16 parameter, in ``state[p]["master"]``, and write the
            parameter as its nearest rounding in the same launch; nothing is then rounded at random. A parameter that someone
            else writes to becomes its own master.
        moments_dtype: torch.float32; or torch.bfloat16, 4 bytes less a parameter; or torch.uint8, 6 bytes less: 8-bit
            floating-point codes, blocks of 256 having a float32 scale. Both are rounded at random. A loaded state is converted.
            8 bits are for whole parameters only, not for DTensors. With either the PyTorch path holds a group's moments in
            float32 during its step; Triton's does not.
        seed: of the random rounding. By default PyTorch's initial seed, which ``torch.manual_seed`` sets.

    Raises:
        TypeError: a parameter without a name, or an argument of the wrong type.
        ValueError: a hyper-parameter out of range, an A without its B, or no pair at all.
    """

    # GradScaler then hands us its scale and its verdict as device tensors instead of reading them.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | torch.Tensor = 1e-4,
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "shrink_ratio": shrink_ratio,
            "shrink_pattern": shrink_pattern,
            "stop_condition": stop_condition,
            "lr_ratio_B": lr_ratio_B,
            "maximize": maximize,
            "amsgrad": amsgrad,
            "capturable": capturable,
            "seed": torch.initial_seed() % 2**63 if seed is None else seed,
        }
        defaults.update(checks.check_hyper(defaults, ""))
        if max_grad_norm is not None:
            max_grad_norm = checks.check_max_grad_norm(max_grad_norm)
        if shrink_schedule is not None and not callable(shrink_schedule):
            raise TypeError(f"shrink_schedule must be a function of the step, got {shrink_schedule!r}")
        storage = checks.check_storage(moments_dtype, master_weights)
        groups = [checks.check_group(group, defaults) for group in checks.as_groups(params)]
        # Before the base class sees them, so that its first groups need not hold whole pairs.
        checks.find_pairs(groups)
        checks.check_storage_fits(groups, storage)
        self.storage = storage
        super().__init__(groups, defaults)
        self.max_grad_norm = max_grad_norm
        self.shrink_schedule = shrink_schedule
        self._rebuild()

    @classmethod
    def from_model(cls, model: nn.Module, **kwargs: Any) -> StableLoRAAdamW:
        """The optimizer of every trainable parameter of ``model``; its LoRA pairs may be this library's or PEFT's.

        Names are those without DistributedDataParallel, torch.compile and checkpoint_wrapper around the model or its parts.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        return cls(((clean(name), p) for name, p in innermost(model).named_parameters()), **kwargs)

    @property
    def pairs(self) -> list[LoRAPair]:
        """The pairs that the optimizer watches, in the order of their first parameter."""
        return list(self._pairs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters or pairs. It may not leave an A without its B."""
        constructed = "_pairs" in self.__dict__
        if constructed:
            param_group = checks.check_group(param_group, self.defaults)
            checks.find_pairs([*self.param_groups, param_group])
            checks.check_storage_fits([param_group], self.storage)
        super().add_param_group(param_group)
        if constructed:
            self._rebuild()

    def _rebuild(self) -> None:
        """Find the pairs of ``param_groups`` anew and forget everything derived from them."""
        self._pairs = checks.find_pairs(self.param_groups)
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._any_sharded = any(map(is_sharded, self._params))
        self._reported: int = getattr(self, "_reported", 0)
        self._skipped_there: dict[torch.device, torch.Tensor] = getattr(self, "_skipped_there", {})
        self._engines: list[tuple[list[int], Any]] = []
        self._engine_key: Any = None

    def _build_engines(self) -> None:
        """One engine for each device that holds parameters, on the backend in force there."""
        checks.check_storage_fits(self.param_groups, self.storage)
        all_members, settings = members_and_settings(self.param_groups, self._pairs)
        by_device: dict[torch.device, list[int]] = {}
        for place, member in enumerate(all_members):
            checks.check_parameter("a parameter", member.owner)
            by_device.setdefault(member.param.device, []).append(place)
        if len(by_device) > 1 and self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm needs all parameters on one device, got {', '.join(map(str, by_device))}; "
                "clip with torch.nn.utils.clip_grad_norm_ instead"
            )
        for pair in self._pairs:
            if pair.A.device != pair.B.device:
                raise ValueError(
                    f"pair {pair.name!r}: A is on {pair.A.device} and B on {pair.B.device}; they must share one"
                )
        engines = []
        for device, places in by_device.items():
            members = [all_members[place] for place in places]
            where = {id(member.owner): i for i, member in enumerate(members)}
            pairs = [Pair(where[id(pair.A)], where[id(pair.B)]) for pair in self._pairs if pair.A.device == device]
            engine: Any = TorchStep
            if resolve_backend(device) == "triton":
                doubles = any(work_dtype(member.param) is torch.float64 for member in members)
                if doubles and get_backend() == "triton":
                    raise TypeError("backend 'triton' has no float64 optimizer step; use 'auto' or 'torch'")
                if not doubles:
                    from stablelora_kernels.optim.triton_engine import TritonStep

                    engine = TritonStep
            state = {member.param: self._local_state(member) for member in members}
            engines.append((places, engine(members, pairs, settings, state, self._skipped(device), self.storage)))
            for member in members:
                if member.param is not member.owner:
                    self.state[member.owner] = _whole_state(state[member.param], member.owner)
        self._engines = engines

    def _local_state(self, member: Member) -> dict[str, Any]:
        """What an engine may fill and change: a parameter's state, or this process's parts of it."""
        entry = self.state[member.owner]
        return entry if member.param is member.owner else {key: local(value) for key, value in entry.items()}

    def _skipped(self, device: torch.device) -> torch.Tensor:
        if device not in self._skipped_there:
            self._skipped_there[device] = torch.zeros((), dtype=torch.int32, device=device)
        return self._skipped_there[device]

    @property
    def nonfinite_steps(self) -> int:
        """How many steps ``max_grad_norm`` has kept from being taken, as the gradients' norm was not finite. Reads the device."""
        return sum(int(skipped) for skipped in self._skipped_there.values())

    def _report_nonfinite_steps(self) -> None:
        found = self.nonfinite_steps
        if found > self._reported:
            warnings.warn(
                f"{found - self._reported} steps were not taken, as the norm of their gradients was not finite",
                RuntimeWarning,
                stacklevel=4,
            )
            self._reported = found

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. ``closure``, if given, computes the loss and its gradients anew, and its loss is returned.

        Raises:
            RuntimeError: a gradient that is sparse or complex; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Trainers that shard a model after this was made put other parameters into the groups.
        now = list(chain.from_iterable(group["params"] for group in self.param_groups))
        if len(now) != len(self._params) or not all(map(operator.is_, now, self._params)):
            self._rebuild()
        if self._any_sharded:
            params, grads = [local(p) for p in self._params], [local_grad(p) for p in self._params]
        else:
            params, grads = self._params, [p.grad for p in self._params]
        seen = look_at(grads)
        if seen is None and not checks.check_grads(grads):
            return loss
        if not self.state and self._is_made_up(grads):
            self._build_engines()
            return loss
        if self.shrink_schedule is not None:
            self._follow_schedule(self.shrink_schedule)
        # A module moved or cast after construction keeps its Parameter objects but not their memory.
        key = (list(map(torch.Tensor.data_ptr, params)), get_backend(), build_key(self.param_groups))
        if key != self._engine_key:
            self._check_not_capturing()
            self._build_engines()
            self._engine_key = key
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for places, engine in self._engines:
            scale, inf = (
                t if t is None else local(t).to(engine.device, torch.float32, non_blocking=True)
                for t in (grad_scale, found_inf)
            )
            own, own_seen = grads, seen
            if len(self._engines) > 1:
                own = [grads[place] for place in places]
                own_seen = seen and ([seen[0][place] for place in places], [seen[1][place] for place in places])
            engine(own, scale, inf, self.max_grad_norm, own_seen)
        return loss

    def _is_made_up(self, grads: list[torch.Tensor | None]) -> bool:
        """Whether this is no step but a way to make the state: torch.distributed.checkpoint takes one to have something to fill,
        with zero gradients and no learning rate, after which nothing may have changed. Algorithm 1 would shrink or latch.
        """
        for group in self.param_groups:
            lr = group["lr"]
            if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
                return False
            if lr != 0:
                return False
        device = self._params[0].device
        moving = torch.stack([g.any().to(device) for g in grads if g is not None]).any()
        sums = ShardSums(self._params)
        return not bool(sums.agree_(moving.int()) if sums else moving)

    def _follow_schedule(self, schedule: Callable[[int], float]) -> None:
        if staging.capturing():
            raise RuntimeError(
                "shrink_schedule is a function, which a CUDA graph would not call again: give shrink_ratio as a tensor, and "
                "write to it between replays"
            )
        step = self.param_groups[0].get("shrink_step", 0) + 1
        ratio = checks.check_float(f"shrink_schedule({step})", schedule(step), low=0.0, high=1.0)
        for group in self.param_groups:
            group["shrink_ratio"] = ratio
        self.param_groups[0]["shrink_step"] = step

    def _check_not_capturing(self) -> None:
        """Building tables allocates and copies, which a CUDA graph cannot hold: one step has to come before capture."""
        if staging.capturing():
            raise RuntimeError("run step() once before capturing it in a CUDA graph, so that its tables exist")

    @torch.no_grad()
    def stability(self) -> list[PairStability]:
        """Where every pair stands after the last step. This reads the device; of sharded pairs, all ranks must ask together.

        Raises:
            RuntimeError: a norm is not finite, so that its pair can neither shrink nor latch.
        """
        self._report_nonfinite_steps()
        norms = finite_norms(self._pairs)
        result = []
        for pair, (a, b) in zip(self._pairs, norms, strict=True):
            latched = self.state[pair.A].get("latched_at") if pair.A in self.state else None
            step = 0 if latched is None else int(latched)
            m, n = pair.B.shape[0], pair.A.shape[1]
            result.append(PairStability(pair.name, a / max(n, 1), b / max(m, 1), step > 0, step or None))
        return result

    def state_dict(self) -> dict[str, Any]:
        """Moments, steps, latches and hyper-parameters, seed and shrink ratio included: enough for a bit-exact resume.

        Raises:
            RuntimeError: a pair's norm is not finite.
        """
        self._report_nonfinite_steps()
        # Of the parts that are here: whoever saves may not be all processes.
        finite_norms(self._pairs, here=True)
        return super().state_dict()

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave. Moments keep their dtype, which PyTorch's own loading would not grant.

        Raises:
            ValueError: the state is another optimizer's, or of other parameters; nothing has been changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = checkpoint.check_state_groups(state_dict, self.param_groups)
        state = checkpoint.check_state(state_dict, groups, self.param_groups, self._pairs, self.storage)
        checks.check_amsgrad(groups, self.storage)
        state = {p: _whole_state(entry, p) for p, entry in state.items()}
        for saved, group in zip(groups, self.param_groups, strict=True):
            for key, value in saved.items():
                if key not in ("params", "param_names"):
                    old = group.get(key)
                    new = deepcopy(value)
                    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
                        new = new.to(old.device)
                    group[key] = new
        self.state.clear()
        self.state.update(state)
        self._rebuild()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("max_grad_norm", "shrink_schedule", "storage")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rebuild()
