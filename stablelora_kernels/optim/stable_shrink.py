"""StableShrink: Stable-LoRA's shrinkage of A as a hook of any optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.dispatch.first_use import ONE_LAUNCH, OPERATORS
from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.dispatch.tallies import Tally, tally_of
from stablelora_kernels.optim.groups import check_halves_train, check_parameter
from stablelora_kernels.optim.latch import Widths
from stablelora_kernels.optim.options import Number, check_option
from stablelora_kernels.optim.placement import Placement, inner_optimizer
from stablelora_kernels.optim.proof import shrink_fault
from stablelora_kernels.optim.rounding import seed_word
from stablelora_kernels.optim.shrink import (
    Counters,
    Parts,
    ShrinkMember,
    ShrinkStep,
    TorchShrink,
    TritonShrink,
)
from stablelora_kernels.optim.stability import (
    PairCounts,
    PairNorms,
    PairStability,
    finite_norms,
    stability_of,
)
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.step import moved_to
from stablelora_kernels.optim.zero import ZeroPlacement, zero_optimizer
from stablelora_kernels.pairs import LoRAPair, full_shape, lora_pairs, stacked_experts
from stablelora_kernels.utils.modules import clean, innermost
from stablelora_kernels.utils.validation import counted

# The keys that a parameter group gets.
RATIO, SEED, STEPS, LATCHED = "shrink_ratio", "shrink_seed", "shrink_steps", "latched_at"
_Group = MutableMapping[str, Any]
Hook = Callable[[torch.optim.Optimizer, tuple[Any, ...], dict[str, Any]], object]


class _OnDevice(NamedTuple):
    """The pairs of one device."""

    engine: TorchShrink | TritonShrink
    tally: Tally
    # Their numbers among all pairs, those of a group together.
    numbers: list[int]


class _Held(NamedTuple):
    """The counters of a group's pairs on one device, which the group holds under ``key``."""

    group: int
    key: str
    counters: Tensor


class StableShrink:
    """Algorithm 1 of Stable-LoRA (arXiv 2603.05204) before every step of any optimizer.

    For each pair A [r, n], B [m, r] that has not latched, on the values before the step::

        if ||A||_F / n > ||B||_F / m:   A <- (1 - shrink_ratio) A
        else:                           the pair latches permanently

    Then the optimizer takes its step. With ``torch.optim.AdamW`` the two are
    :class:`~stablelora_kernels.StableLoRAAdamW`::

        optimizer = torch.optim.Muon(lora_parameters)
        shrink = slk.StableShrink(optimizer, model, shrink_ratio=5e-4)

    A pair whose A has no gradient neither shrinks nor latches, and none does in a step that a
    GradScaler skips. A in bfloat16 or float16 is rounded at random, so that it shrinks on average.
    The iterates that schedule-free optimizers keep beside A shrink with it. On Triton the pairs of a
    device take one launch, and nothing is read from the GPU; sharded pairs take one small collective
    more for each mesh dimension, until all have latched.

    Under DeepSpeed's ZeRO, stages 1 to 3, give the optimizer that ``deepspeed.initialize`` returns:
    the float32 partitions that each rank owns shrink. ZeRO fills missing gradients with zeros, so
    every pair takes every step there.

    Latches, the steps that pairs have taken, and the ratio are in the optimizer's parameter groups.
    So its ``state_dict`` has them, and whatever saves and loads it resumes to the bit. You may
    change a group's ``"shrink_ratio"``, a number or a 0-d tensor, between steps.

    Args:
        optimizer: the optimizer that updates every A, or accelerate's wrapper of it. Shard and wrap
            the model first.
        model_or_pairs: a model with LoRA layers, whose trainable pairs shrink; or
            :class:`LoRAPair` objects.
        shrink_ratio: lambda, in [0, 1), of groups that have no ``"shrink_ratio"`` of their own.
        seed: seed of the random rounding, of which all processes must have the same. Default:
            PyTorch's initial seed.

    Raises:
        TypeError: ``optimizer`` is a ``StableLoRAAdamW``, which shrinks A itself, or no optimizer;
            or another argument has the wrong type.
        ValueError: there is no pair, a pair's A is not in the optimizer, only one half of a pair
            trains, or the optimizer has a StableShrink of the same pair.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model_or_pairs: nn.Module | Iterable[LoRAPair],
        *,
        shrink_ratio: float = 5e-4,
        seed: int | None = None,
    ) -> None:
        ratio = check_option(RATIO, shrink_ratio)
        self._seed = cast("int", check_option("seed", seed))
        self._placement = placement_of(optimizer)
        self.optimizer = self._placement.optimizer
        self._pairs, self._experts = _trainable_pairs(model_or_pairs)
        _check_first(self._placement, self._pairs)
        self._group_of = [self._placement.group_of(pair) for pair in self._pairs]
        _check_ratios(self._groups, self._group_of, ratio)
        self._devices = [
            self._make_engine(device, numbers)
            for device, numbers in self._numbers_by_device().items()
        ]
        self._held = [*self._counters_by_group()]
        for index in {*self._group_of}:
            self._groups[index].setdefault(RATIO, ratio)
            self._groups[index].setdefault(SEED, self._seed)
        # By group, those of the last step: a state that is loaded may have none.
        self._ratios = self._current_ratios()
        for held in self._held:
            self._groups[held.group].setdefault(held.key, held.counters)
        self._take_over()
        self._handles = [
            hooked.register_step_pre_hook(self._before_step) for hooked in self._placement.hooked
        ]

    def __repr__(self) -> str:
        return (
            f"StableShrink({counted(len(self._pairs), 'LoRA pair')}, "
            f"{type(self.optimizer).__name__})"
        )

    @property
    def pairs(self) -> list[LoRAPair]:
        """The pairs, in the order of the model."""
        return list(self._pairs)

    @property
    def _groups(self) -> list[_Group]:
        return cast("list[_Group]", self._placement.groups)

    def _current_ratios(self) -> dict[int, Number]:
        """The ratio of every group with pairs, by the group's index."""
        groups = self._groups
        return {index: groups[index][RATIO] for index in {*self._group_of}}

    def _numbers_by_device(self) -> dict[torch.device, list[int]]:
        """The pairs on each device, by their numbers, those of a group together."""
        by_device: dict[torch.device, list[int]] = {}
        for k, pair in enumerate(self._pairs):
            a, b, _ = self._placement.parts(pair)
            check_parameter(f"A of pair {pair.name!r}", a)
            check_parameter(f"B of pair {pair.name!r}", b)
            if a.device != b.device:
                raise ValueError(
                    f"pair {pair.name!r}: A is on {a.device} and B on {b.device}; they must share one"
                )
            by_device.setdefault(a.device, []).append(k)
        for numbers in by_device.values():
            numbers.sort(key=lambda k: self._group_of[k])
        return by_device

    def _make_engine(self, device: torch.device, numbers: list[int]) -> _OnDevice:
        """The engine of a device's pairs, with counters of zero."""
        # Elements of the A's before each pair's, which number those of its own.
        sizes = [full_shape(pair.A).numel() for pair in self._pairs]
        bases = [0, *accumulate(sizes)]
        pairs = [self._pairs[k] for k in numbers]
        members = [
            ShrinkMember(
                Widths(n=full_shape(pair.A)[1], m=full_shape(pair.B)[0]),
                self._placement.shard_of(pair, bases[k]),
            )
            for k, pair in zip(numbers, pairs, strict=True)
        ]
        zeros = torch.zeros(2, len(pairs), dtype=torch.int32, device=device)
        counters = Counters(steps=zeros[0], latched=zeros[1])
        sums = self._placement.sums([pair.A for pair in pairs] + [pair.B for pair in pairs])
        parts = self._parts(pairs)
        engine_class = _engine_class(device, parts)
        fault = shrink_fault(members, parts) if engine_class is TritonShrink else ""
        engine = (TorchShrink if fault else engine_class)(members, counters, sums)
        strategy = ONE_LAUNCH if isinstance(engine, TritonShrink) else OPERATORS
        return _OnDevice(engine, tally_of("stable_shrink", strategy, fault), numbers)

    def _counters_by_group(self) -> Iterator[_Held]:
        """The counters of each group's pairs on each device, which are neighbors there."""
        for device, (engine, _, numbers) in enumerate(self._devices):
            # A group's pairs may be on several devices.
            suffix = f"_{device}" if device else ""
            first = 0
            for group, of_group in groupby(self._group_of[k] for k in numbers):
                span = slice(first, first + len([*of_group]))
                first = span.stop
                yield _Held(group, STEPS + suffix, engine.counters.steps[span])
                yield _Held(group, LATCHED + suffix, engine.counters.latched[span])

    def _take_over(self) -> None:
        """Take over what a state dict has put into the groups, where torch replaces them.

        Raises:
            ValueError: the state is of other pairs.
        """
        groups = self._groups
        loaded = [
            held for held in self._held if groups[held.group].get(held.key) is not held.counters
        ]
        if not loaded:
            return
        for group, key, counters in loaded:
            value = groups[group].get(key)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != counters.shape:
                got = list(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(
                    f"group {group} of the optimizer must have {key} {list(counters.shape)}, one a pair, got {got}: the state "
                    "that was loaded is of other pairs"
                )
        missing = [held for held in loaded if held.key not in groups[held.group]]
        if missing:
            warnings.warn(
                f"the state that was loaded has no {missing[0].key!r}: it was saved without StableShrink, so no pair has latched "
                "in it",
                RuntimeWarning,
                stacklevel=4,
            )
        for group, key, counters in loaded:
            counters.copy_(groups[group].get(key, torch.zeros_like(counters)))
            groups[group][key] = counters
        for engine, _, _ in self._devices:
            if isinstance(engine, TritonShrink):
                engine.latch_monitor.restart()
        for index in {held.group for held in loaded}:
            groups[index].setdefault(RATIO, self._ratios[index])
            groups[index].setdefault(SEED, self._seed)

    @torch._disable_dynamo
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Shrink before a step. With a closure, which makes the gradients, shrink behind its first
        call.
        """
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._shrink()
            return None
        waits = True

        def closure_and_shrink() -> object:
            nonlocal waits
            loss = closure()
            if waits:
                waits = False
                self._shrink()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_and_shrink}
        return (args[0], closure_and_shrink, *args[2:]), kwargs

    @torch.no_grad()
    def _shrink(self) -> None:
        """Shrink or latch the pairs."""
        placement = self._placement
        if not placement.takes_step(self._pairs):
            return
        self._take_over()
        groups = self._groups
        self._ratios = self._current_ratios()
        words = {index: seed_word(groups[index][SEED]) for index in {*self._group_of}}
        found_inf = placement.found_inf()
        for engine, tally, numbers in self._devices:
            pairs = [self._pairs[k] for k in numbers]
            of_pair = [self._group_of[k] for k in numbers]
            step = ShrinkStep(
                parts=partial(self._parts, pairs),
                present=[placement.has_gradient(pair) for pair in pairs],
                ratios=[groups[index][RATIO] for index in of_pair],
                seeds=[words[index] for index in of_pair],
                found_inf=moved_to(engine.device, found_inf),
            )
            tally.calls += 1
            engine.step(step)

    def _parts(self, pairs: Sequence[LoRAPair]) -> list[Parts]:
        """What there is of these pairs now: their memory may change from step to step."""
        return [self._placement.parts(pair) for pair in pairs]

    @torch.no_grad()
    def stability(self) -> list[PairStability]:
        """The stability of every pair after the last step. Reads the device; with sharded pairs all
        ranks must call together.

        Raises:
            RuntimeError: a norm is not finite, so its pair can neither shrink nor latch.
        """
        self._take_over()
        norms: dict[int, PairNorms] = {}
        counts: dict[int, PairCounts] = {}
        for engine, _, numbers in self._devices:
            pairs = [self._pairs[k] for k in numbers]
            parts = self._parts(pairs)
            halves = [part.a for part in parts] + [part.b for part in parts]
            is_triton = isinstance(engine, TritonShrink)
            found = finite_norms(pairs, halves, engine.sums, is_triton)
            norms |= dict(zip(numbers, found, strict=True))
            steps, latched = engine.counters.steps.tolist(), engine.counters.latched.tolist()
            counts |= dict(zip(numbers, map(PairCounts, steps, latched), strict=True))
        order = range(len(self._pairs))
        return stability_of(
            self._pairs, [norms[k] for k in order], [counts[k] for k in order], self._experts
        )

    def register_step_post_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` after every step of the optimizer."""

        def after_step(
            optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            if self._placement.ends_step():
                hook(optimizer, args, kwargs)

        # One hook suffices: DeepSpeed's second optimizer updates no last partition.
        return self.optimizer.register_step_post_hook(after_step)

    def remove(self) -> None:
        """Shrink no more, and take latches and ratio out of the optimizer's groups."""
        for handle in self._handles:
            handle.remove()
        for group in self._groups:
            for key in (RATIO, SEED, *[held.key for held in self._held]):
                group.pop(key, None)


def placement_of(optimizer: object) -> Placement | ZeroPlacement:
    """Where the parameters of ``optimizer`` are. TypeError if StableShrink cannot hook into it."""
    if (zero := zero_optimizer(optimizer)) is not None:
        return ZeroPlacement(zero)
    inner = inner_optimizer(optimizer)
    if isinstance(inner, StableLoRAAdamW):
        raise TypeError(
            "optimizer is a StableLoRAAdamW, which shrinks A in its own step: set its shrink_ratio, or give StableShrink another "
            "optimizer"
        )
    if not isinstance(inner, torch.optim.Optimizer) or not hasattr(
        inner, "_optimizer_step_pre_hooks"
    ):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer with step hooks, got {type(optimizer).__name__}"
        )
    return Placement(inner)


def shrinks_of(optimizer: object) -> list[StableShrink]:
    """The StableShrinks of an optimizer, also inside accelerate's or DeepSpeed's."""
    hooks = getattr(inner_optimizer(optimizer), "_optimizer_step_pre_hooks", {})
    owners = [getattr(hook, "__self__", None) for hook in hooks.values()]
    return [owner for owner in owners if isinstance(owner, StableShrink)]


def _trainable_pairs(
    source: nn.Module | Iterable[LoRAPair],
) -> tuple[list[LoRAPair], Mapping[str, int]]:
    """The pairs of a model that train, and by name how many experts they stack; or the pairs given."""
    experts: Mapping[str, int] = {}
    if isinstance(source, nn.Module):
        model = innermost(source)
        named = [(clean(name), p) for name, p in model.named_parameters()]
        check_halves_train(named)
        pairs = [pair for pair in lora_pairs(named) if pair.A.requires_grad]
        experts = stacked_experts(model)
    else:
        pairs = list(source)
        for pair in pairs:
            if not isinstance(pair, LoRAPair):
                raise TypeError(
                    f"model_or_pairs must be a module or give LoRAPairs, got a {type(pair).__name__}"
                )
            for half, p in (("A", pair.A), ("B", pair.B)):
                if not p.requires_grad:
                    raise ValueError(f"pair {pair.name!r}: {half} is frozen (requires_grad=False)")
    if not pairs:
        raise ValueError(
            "model_or_pairs has no trainable LoRA pair (lora_A with lora_B); PeftModel.from_pretrained freezes an adapter unless "
            "is_trainable=True"
        )
    return pairs, experts


def _check_first(placement: Placement | ZeroPlacement, pairs: Sequence[LoRAPair]) -> None:
    """Raise ValueError if the optimizer shrinks one of the pairs already, or A is in two of them."""
    taken = {
        id(pair.A): pair.name for shrink in shrinks_of(placement.optimizer) for pair in shrink.pairs
    }
    for pair in pairs:
        if id(pair.A) in taken:
            raise ValueError(
                f"pair {pair.name!r}: the optimizer has a StableShrink of its A already, as {taken[id(pair.A)]!r}; "
                "remove() that one first"
            )
    names: dict[int, str] = {}
    for pair in pairs:
        if id(pair.A) in names:
            raise ValueError(f"one A is given as {names[id(pair.A)]!r} and as {pair.name!r}")
        names[id(pair.A)] = pair.name


def _check_ratios(groups: Sequence[_Group], indices: Iterable[int], ratio: object) -> None:
    """Check the ratios that the groups have. Warn if a loaded one is not the one given."""
    for index in sorted({*indices}):
        group = groups[index]
        if RATIO not in group:
            continue
        value = check_option(RATIO, group[RATIO], where=f"group {index}'s ")
        if LATCHED in group and value != ratio:
            warnings.warn(
                f"shrink_ratio is {value}, which was loaded with group {index}, and not {ratio}",
                UserWarning,
                stacklevel=3,
            )


def _engine_class(device: torch.device, parts: Sequence[Parts]) -> type[TorchShrink | TritonShrink]:
    """The class of the engine that shrinks the pairs on ``device``."""
    has_float64 = any(t.dtype is torch.float64 for part in parts for t in (part.a, part.b))
    if has_float64 and settings.backend == "triton":
        raise TypeError("backend 'triton' has no float64 shrinkage; use 'auto' or 'torch'")
    return TorchShrink if has_float64 or resolve_backend(device) == "torch" else TritonShrink
