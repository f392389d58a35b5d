"""The optimizer, its stability log and ``accelerate_peft`` inside Hugging Face's Trainer. Importing
this module needs no transformers.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stablelora_kernels.integrations.peft import (
    accelerate_peft,
    check_accelerate_options,
    restore_peft,
)
from stablelora_kernels.nn.fused_loss import skip_logits_in_evaluation
from stablelora_kernels.optim import PairStability, StableLoRAAdamW, StableShrink
from stablelora_kernels.optim.options import check_option
from stablelora_kernels.optim.placement import inner_optimizer
from stablelora_kernels.optim.stable_shrink import STEPS, shrinks_of
from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.modules import clean, innermost
from stablelora_kernels.utils.validation import check_bool, no_argument

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

# The optimizer's keywords for which TrainingArguments has values.
_OF_ARGS = ("lr", "weight_decay", "betas", "eps")


class StableLoRAAdamWFactory:
    """Makes a :class:`StableLoRAAdamW` from a model, for trainers that build the optimizer
    themselves.

    Hugging Face's Trainer gives an optimizer class parameter groups without names, in which no pair
    can be found. It gives a factory the model::

        Trainer(model, args, ..., optimizer_cls_and_kwargs=slk.StableLoRAAdamWFactory.from_args(args, shrink_ratio=5e-4))

    The trainer applies its own schedule, accumulation and clipping, but hands a factory nothing
    else of ``args``. So :meth:`from_args` reads ``args``. ``(slk.StableLoRAAdamWFactory, {"lr":
    1e-4, ...})`` takes the keywords alone, in one group.

    Raises:
        TypeError: the class got arguments. Older Trainers do not know factories; give them
            ``optimizers=(slk.StableLoRAAdamW.from_model(model, ...), None)``.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        if args or kwargs:
            raise TypeError(
                "StableLoRAAdamWFactory takes no arguments until it is called with the model: this trainer took it for an "
                "optimizer class and would give it parameters without names. Pass an optimizer instead: "
                "optimizers=(StableLoRAAdamW.from_model(model, ...), None)"
            )

    @classmethod
    def from_args(
        cls, args: TrainingArguments, **kwargs: object
    ) -> tuple[type[StableLoRAAdamWFactory], dict[str, Any]]:
        """``optimizer_cls_and_kwargs`` with all that the Trainer's own AdamW takes of ``args``, the
        ``TrainingArguments``.

        That is ``lr``, ``weight_decay``, ``betas`` and ``eps``, unless ``kwargs`` has them, and the
        rule that biases and norms have no weight decay (``Trainer.get_decay_parameter_names``).
        These parameters are the second of two groups, as in the Trainer's AdamW, so its checkpoints
        can be resumed. The other ``kwargs`` are :class:`StableLoRAAdamW`'s.

        Raises:
            TypeError: the optimizer has no argument of such a name.
        """
        known = [name for name in inspect.signature(StableLoRAAdamW).parameters if name != "params"]
        for name in kwargs:
            if name not in known:
                raise TypeError(no_argument("StableLoRAAdamW", name, known))
        settings: dict[str, Any] = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "trainer_groups": True,
        }
        return cls, settings | kwargs

    def __call__(
        self, model: nn.Module, *, trainer_groups: bool = False, **kwargs: Any
    ) -> StableLoRAAdamW:
        """The optimizer of ``model``'s trainable parameters, with ``trainer_groups`` in the
        Trainer's two groups.

        It warns of the optimizer's own defaults that it uses where ``TrainingArguments`` has a
        value.
        """
        if missing := [name for name in _OF_ARGS if name not in kwargs]:
            defaults = inspect.signature(StableLoRAAdamW).parameters
            used = ", ".join(f"{name}={defaults[name].default}" for name in missing)
            warnings.warn(
                f"StableLoRAAdamWFactory uses {used}, the optimizer's defaults: a trainer does not give its TrainingArguments "
                "to a factory. StableLoRAAdamWFactory.from_args(args, ...) takes theirs, and no decay of biases and norms",
                UserWarning,
                stacklevel=2,
            )
        if not trainer_groups:
            return StableLoRAAdamW.from_model(model, **kwargs)
        inner = innermost(model)
        trainer = import_extra("transformers", "peft", "StableLoRAAdamWFactory.from_args").Trainer
        decaying = set(trainer.get_decay_parameter_names(None, inner))
        with_decay: list[tuple[str, nn.Parameter]] = []
        without_decay: list[tuple[str, nn.Parameter]] = []
        for name, parameter in inner.named_parameters():
            members = with_decay if name in decaying else without_decay
            members.append((clean(name), parameter))
        groups: list[dict[str, Any]] = [
            {"params": with_decay},
            {"params": without_decay, "weight_decay": 0.0},
        ]
        return StableLoRAAdamW(groups, **kwargs)


class _Callback:
    """A base of callbacks, whose instances derive from transformers' ``TrainerCallback`` too. Their
    class is made when there is an instance, because importing this module needs no transformers.
    """

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return _new_callback(cls)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles name the class that a module has.
        (named, _) = type(self).__bases__
        return _new_callback, (named,), self.__dict__


class StabilityCallback(_Callback):
    """Adds the stability of the pairs to the log entries of Hugging Face's Trainer.

    Whatever the Trainer reports to (TensorBoard, wandb, ...) gets the values in the entry of the
    loss, at the Trainer's ``logging_steps``, and so does ``trainer.state.log_history``::

        trainer.add_callback(slk.StabilityCallback(trainer))

    With ``a_norm`` = ``||A||_F / n`` and ``b_norm`` = ``||B||_F / m`` of a pair A [r, n], B [m, r],
    the values are:

    - ``stability/ratio_mean``, ``ratio_min`` and ``ratio_max``, of ``b_norm / a_norm`` over the
      pairs. A pair starts at 0 and latches once its ratio reaches 1. Pairs whose A is zero have
      none.
    - ``stability/latched_fraction``, the share of pairs that have latched.
    - ``stability/a_norm`` and ``stability/b_norm``, the means over the pairs.

    Each entry waits for the device. In a distributed run every process computes them, because the
    norms of sharded pairs take a collective; the first one reports. The callback has no state of
    its own, so a resumed run goes on. It raises, as
    :meth:`~stablelora_kernels.StableLoRAAdamW.stability` does, if a norm is not finite. It derives
    from transformers' ``TrainerCallback``.

    Args:
        trainer: the trainer that the callback is added to, a ``Trainer`` or one derived from it, as
            TRL's. Its optimizer is a :class:`StableLoRAAdamW`, by either way, or it has a
            :class:`StableLoRACallback`; accelerate's wrapper around the optimizer does not matter.

    Raises:
        TypeError: ``trainer`` is no trainer; or, when training starts, its optimizer is another
            one without a ``StableLoRACallback``.
        ImportError: transformers is not installed.
    """

    def __init__(self, trainer: Trainer) -> None:
        if not callable(getattr(trainer, "log", None)) or not hasattr(trainer, "optimizer"):
            raise TypeError(
                f"trainer must be a Trainer of transformers, got {type(trainer).__name__}"
            )
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Check the optimizer, and go before all callbacks that report, since a user's come after
        them.

        It warns if the optimizer has its default learning rate where ``TrainingArguments`` has
        another one.
        """
        callbacks = self.trainer.callback_handler.callbacks
        # One of them may come later, and makes a StableShrink then.
        if not any(isinstance(callback, StableLoRACallback) for callback in callbacks):
            _warn_of_default_lr(_stable_optimizer(self.trainer.optimizer), args.learning_rate)
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Add the values to a training entry: to what the next callbacks report, and to its copy in
        the history.
        """
        if "loss" in logs:
            values = _summary(_stable_optimizer(self.trainer.optimizer).stability())
            logs.update(values)
            state.log_history[-1].update(values)


class StableLoRACallback(_Callback):
    """Puts a :class:`~stablelora_kernels.StableShrink` before every step of the Trainer's optimizer,
    whatever ``optim`` is::

        Trainer(model, TrainingArguments(optim="adafactor", ...), ..., callbacks=[slk.StableLoRACallback(shrink_ratio=5e-4)])

    It does so when training begins, behind the loading of a checkpoint, whose latches and ratio go
    on. Training again goes on, too. It also works under DeepSpeed's ZeRO. ``shrink`` is the
    ``StableShrink`` from then on. It derives from transformers' ``TrainerCallback``.

    Args:
        shrink_ratio, seed: as of :class:`~stablelora_kernels.StableShrink`.

    Raises:
        TypeError: an argument has another type.
        ValueError: a value is out of range; or, when training begins, as
            :class:`~stablelora_kernels.StableShrink`.
        ImportError: transformers is not installed.
    """

    def __init__(self, *, shrink_ratio: float = 5e-4, seed: int | None = None) -> None:
        check_option("shrink_ratio", shrink_ratio)
        check_option("seed", seed)
        self.shrink_ratio = shrink_ratio
        self.seed = seed
        self.shrink: StableShrink | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Hook into the optimizer, unless an earlier training has.

        It warns if the training resumes from a checkpoint without the counters of the pairs.
        """
        if model is None or optimizer is None:
            raise TypeError(
                f"the trainer must train a model by an optimizer, got {type(model).__name__} and {type(optimizer).__name__}"
            )
        if self.shrink is not None and self.shrink in shrinks_of(optimizer):
            return
        has_counters = any(STEPS in group for group in inner_optimizer(optimizer).param_groups)
        self.shrink = StableShrink(optimizer, model, shrink_ratio=self.shrink_ratio, seed=self.seed)
        if state.global_step and not has_counters:
            warnings.warn(
                f"the checkpoint of step {state.global_step} was saved without StableLoRACallback, so no pair has latched in it",
                RuntimeWarning,
                stacklevel=2,
            )


class AccelerateCallback(_Callback):
    """Calls :func:`~stablelora_kernels.accelerate_peft` on the Trainer's model when training begins.

    It is one argument of a Trainer of transformers or TRL, or of LLaMA-Factory's ``run_exp``, for
    those who do not make the model themselves::

        SFTTrainer("Qwen/Qwen3-8B", args, peft_config=..., callbacks=[slk.AccelerateCallback(fuse_mlp=True)])

    By then the Trainer has loaded a checkpoint, wrapped the model and applied Liger's kernels. The
    first process prints the report, once. Training twice changes nothing more. It derives from
    transformers' ``TrainerCallback``.

    Args:
        restore: call :func:`~stablelora_kernels.restore_peft` when training ends. An exception in
            training leaves the model accelerated.
        options: keywords of :func:`~stablelora_kernels.accelerate_peft`, such as ``fuse_mlp=True``.

    Raises:
        TypeError: ``accelerate_peft`` has no such keyword, or a value has another type.
        ImportError: transformers is not installed.
        ValueError: when training begins, as :func:`~stablelora_kernels.accelerate_peft`.
    """

    def __init__(self, *, restore: bool = False, **options: bool | int) -> None:
        check_accelerate_options("AccelerateCallback", options, others=("restore",))
        self.restore = check_bool("restore", restore)
        self.options: dict[str, Any] = options
        self._has_printed = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Accelerate the model, and print the report unless an earlier training has."""
        if model is None:
            raise TypeError("model must be the trainer's nn.Module, got None: it trains no model")
        report = accelerate_peft(model, **self.options)
        if args.prediction_loss_only:
            skip_logits_in_evaluation(model.modules())
        if state.is_world_process_zero and not self._has_printed:
            print(f"accelerate_peft: {report}")
            self._has_printed = True

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Restore the model if that was asked for."""
        if self.restore and model is not None:
            restore_peft(model)


def _new_callback(cls: type) -> Any:
    """An empty instance of a callback's class, which derives from ``TrainerCallback`` too, whose
    other events do nothing.
    """
    return object.__new__(derived_from_transformers(cls, "TrainerCallback"))


@functools.cache
def derived_from_transformers(cls: type, base: str) -> type:
    """``cls``, derived from transformers' class ``base`` too."""
    transformers = import_extra("transformers", "peft", cls.__name__)
    return type(
        cls.__name__,
        (cls, getattr(transformers, base)),
        {"__module__": cls.__module__, "__doc__": cls.__doc__},
    )


def _warn_of_default_lr(optimizer: StableLoRAAdamW | StableShrink, wanted: float) -> None:
    """Warn if a StableLoRAAdamW has its default learning rate, and the trainer's arguments another."""
    if isinstance(optimizer, StableShrink):
        return
    default = inspect.signature(StableLoRAAdamW).parameters["lr"].default
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if wanted != default and all(isinstance(rate, float) and rate == default for rate in rates):
        warnings.warn(
            f"the optimizer's lr is {default}, its default, and not learning_rate={wanted} of TrainingArguments: "
            "a trainer takes an optimizer as it is. Pass lr to it, or "
            "optimizer_cls_and_kwargs=StableLoRAAdamWFactory.from_args(args, ...)",
            UserWarning,
            stacklevel=3,
        )


def _stable_optimizer(optimizer: object) -> StableLoRAAdamW | StableShrink:
    """The optimizer inside a trainer's or accelerate's wrapper of it, or its StableShrink."""
    inner = optimizer
    while not isinstance(inner, StableLoRAAdamW) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if isinstance(inner, StableLoRAAdamW):
        return inner
    for shrink in shrinks_of(optimizer):
        return shrink
    raise TypeError(
        f"trainer must train with a StableLoRAAdamW or a StableLoRACallback, got {type(inner).__name__}: pass "
        "callbacks=[StableLoRACallback(...)], optimizer_cls_and_kwargs=StableLoRAAdamWFactory.from_args(args, ...) or "
        "optimizers=(StableLoRAAdamW.from_model(...), None)"
    )


def _summary(pairs: Sequence[PairStability]) -> dict[str, float]:
    """The values of one log entry."""
    values = {"latched_fraction": sum(pair.latched for pair in pairs) / len(pairs)}
    for name in ("a_norm", "b_norm"):
        values[name] = sum(getattr(pair, name) for pair in pairs) / len(pairs)
    if ratios := [pair.b_norm / pair.a_norm for pair in pairs if pair.a_norm]:
        values |= {
            "ratio_mean": sum(ratios) / len(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return {f"stability/{name}": value for name, value in values.items()}
