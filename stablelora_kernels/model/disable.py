"""``disable_lora``: a model without its LoRA, this library's or PEFT's, for the length of a block."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.utils.modules import check_module

# The number of open blocks of each module that they have disabled.
_blocks: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
# The attributes that disable a layer of this library, and one of PEFT's or its wrapper around
# modules_to_save.
_OURS, _PEFTS = "_disabled", "_disable_adapters"


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Compute without LoRA in the body of a ``with`` statement: the model gives its base model's
    output.

    A reference model for DPO or GRPO then needs no second copy of the weights::

        policy = model(**batch).logits
        with torch.no_grad(), slk.disable_lora(model):
            reference = model(**batch).logits

    Each of this library's layers computes its frozen layer's product, to the bit, merged or not; A
    and B get no gradient. In a PEFT model, accelerated or not, all adapters of all layers are off
    and ``modules_to_save`` are their originals, as in PEFT's ``disable_adapter``. Unlike there,
    parameters keep their ``requires_grad``. PEFT unmerges a merged layer at its first call.

    Blocks may be nested, may overlap, and may be opened on a part of the model. The model is as
    before when the last one ends, by an exception too, also in the ``requires_grad`` of PEFT's
    parameters. A block is in force in all threads that call the model, but not in copies of this
    library's layers; copies of PEFT's layers made in a block stay disabled. A compiled model is
    compiled once more, for the block; a block inside compiled code breaks its graph.

    Call ``backward`` of a checkpointed forward on the same side of the block as the forward, since
    it computes the forward again. Otherwise non-reentrant checkpointing mostly raises
    ``CheckpointError``, but reentrant checkpointing silently computes the other forward: with LoRA
    after the block, or, for a forward before the block, without gradients of A and B. Under
    ``torch.no_grad()`` nothing is recomputed.

    Args:
        model: any module with this library's LoRA layers or PEFT's, in any wrapper; or one such
            layer.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no LoRA layers; or biases train, whose base values are not kept. A
            part of the model is checked by its own layers' biases alone.
    """
    switches = _switches(model)
    trainable = {p: p.requires_grad for m, key in switches if key != _OURS for p in m.parameters()}
    with _lock:
        opened = [
            (module, key)
            for module, key in switches
            if module in _blocks or not module.__dict__.get(key)
        ]
        for module, key in opened:
            _blocks[module] = _blocks.get(module, 0) + 1
            module.__dict__[key] = True
    try:
        yield
    finally:
        with _lock:
            for module, key in opened:
                _blocks[module] -= 1
                if not _blocks[module]:
                    del _blocks[module]
                    module.__dict__[key] = False
        # PEFT's disable_adapter in the body may have left them frozen.
        for parameter, flag in trainable.items():
            parameter.requires_grad = flag


def _switches(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of ``model`` to disable, each with the attribute that does it."""
    check_module(model)
    switches: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            switches.append((module, _OURS))
        elif _PEFTS in vars(module) or hasattr(type(module), _PEFTS):
            switches.append((module, _PEFTS))
        if lost := _trained_in_place(module):
            raise ValueError(
                f"model must keep what its base model computes, got {lost}, which is trained in place: disable_lora could not "
                "give the base model's output. Use a copy of the base model as the reference"
            )
    if not switches:
        raise ValueError(
            f"model must have LoRALinear layers or PEFT's, got a {type(model).__name__} without any"
        )
    return switches


def _trained_in_place(module: nn.Module) -> str | None:
    """The setting, such as "bias='all'", by which a model trains more than A and B and keeps no
    original of it.
    """
    if isinstance(module, LoRALinear) and module.bias is not None and module.bias.requires_grad:
        return "a bias that trains"
    pefts = module.__dict__.get("peft_config")
    for item in pefts.values() if isinstance(pefts, dict) else ():
        if (bias := getattr(item, "bias", "none")) not in (None, "none"):
            return f"bias={bias!r}"
    return None
