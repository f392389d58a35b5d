"""What trainers need beyond the optimizer itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW


class StableLoRAAdamWFactory:
    """Makes a :class:`StableLoRAAdamW` from a model, for trainers that build the optimizer themselves.

    Hugging Face's Trainer hands an optimizer class parameter groups without names, in which no pair can be found; a factory it
    hands the model::

        Trainer(model, args, ..., optimizer_cls_and_kwargs=(slk.StableLoRAAdamWFactory, {"lr": 1e-4, "shrink_ratio": 5e-4}))

    The keywords are those of :class:`StableLoRAAdamW`; nothing is taken from the trainer's own arguments but the schedule, which
    scales ``lr``.

    Raises:
        TypeError: the class was given arguments, as an older Trainer does, which knows no factories. There pass
            ``optimizers=(slk.StableLoRAAdamW.from_model(model, ...), None)``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise TypeError(
                "StableLoRAAdamWFactory takes the model when it is called, and nothing before: this trainer took it for an "
                "optimizer class and would give it parameters without names. Pass an optimizer instead: "
                "optimizers=(StableLoRAAdamW.from_model(model, ...), None)"
            )

    def __call__(self, model: nn.Module, **kwargs: Any) -> StableLoRAAdamW:
        return StableLoRAAdamW.from_model(model, **kwargs)
