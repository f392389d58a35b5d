"""``StableLoRAAdamWFactory``: the optimizer inside Hugging Face's Trainer."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import nn

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW


class StableLoRAAdamWFactory:
    """Makes a :class:`StableLoRAAdamW` from a model, for trainers that build the optimizer themselves.

    Hugging Face's Trainer gives an optimizer class parameter groups without names, in which no pair can be found. It gives a
    factory the model::

        Trainer(model, args, ..., optimizer_cls_and_kwargs=(slk.StableLoRAAdamWFactory, {"lr": 1e-4, "shrink_ratio": 5e-4}))

    The keywords are those of :class:`StableLoRAAdamW`. The trainer applies its own schedule, accumulation and clipping, but hands
    no other arguments to a factory: give ``{"lr": args.learning_rate}``, and likewise ``weight_decay``, ``betas`` and ``eps``.

    Raises:
        TypeError: the class got arguments. Older Trainers do not know factories; give them
            ``optimizers=(slk.StableLoRAAdamW.from_model(model, ...), None)``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise TypeError(
                "StableLoRAAdamWFactory takes no arguments until it is called with the model: this trainer took it for an "
                "optimizer class and would give it parameters without names. Pass an optimizer instead: "
                "optimizers=(StableLoRAAdamW.from_model(model, ...), None)"
            )

    def __call__(self, model: nn.Module, **kwargs: Any) -> StableLoRAAdamW:
        """The optimizer of ``model``'s trainable parameters. Without ``lr`` it warns that it takes its own default."""
        if "lr" not in kwargs:
            default = inspect.signature(StableLoRAAdamW).parameters["lr"].default
            warnings.warn(
                f"StableLoRAAdamWFactory was given no lr, so it is {default}, the optimizer's default: a trainer does not hand "
                'TrainingArguments(learning_rate=...) to a factory. Give it {"lr": args.learning_rate, ...}',
                UserWarning,
                stacklevel=2,
            )
        return StableLoRAAdamW.from_model(model, **kwargs)
