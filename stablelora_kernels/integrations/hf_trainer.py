"""``StableLoRAAdamWFactory``: the optimizer inside Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW


class StableLoRAAdamWFactory:
    """Makes a :class:`StableLoRAAdamW` from a model, for trainers that build the optimizer themselves.

    Hugging Face's Trainer gives an optimizer class parameter groups without names, in which no pair can be found. It gives a
    factory the model::

        Trainer(model, args, ..., optimizer_cls_and_kwargs=(slk.StableLoRAAdamWFactory, {"lr": 1e-4, "shrink_ratio": 5e-4}))

    The keywords are those of :class:`StableLoRAAdamW`. From the trainer's own arguments it takes only the schedule, which scales
    ``lr``.

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
        return StableLoRAAdamW.from_model(model, **kwargs)
