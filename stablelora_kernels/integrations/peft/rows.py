"""``adapters_of_rows``: which rows of a batch run which of a PEFT model's adapters, in training too;
and ``losses_of_rows``, each adapter's loss. Importing needs no peft.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from stablelora_kernels.integrations.peft.accelerate import layers_module
from stablelora_kernels.integrations.peft.rows_state import (
    ATTRIBUTE,
    BASE,
    Rows,
    RowsState,
    ranges_of,
)
from stablelora_kernels.model.reports import list_some
from stablelora_kernels.nn.take_over import is_taken_over
from stablelora_kernels.utils.modules import check_module


@contextmanager
def adapters_of_rows(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within the ``with`` block, row i of each batch runs adapter ``names[i]`` of an accelerated PEFT
    model, in training and in evaluation::

        with slk.adapters_of_rows(model, ["a", "a", "b"]):
            logits = model(input_ids).logits
            sum(slk.losses_of_rows(logits, labels, names).values()).backward()

    Each layer computes its base product once for all rows, and each adapter's branch for its own
    rows, with that adapter's rank, scaling, targets and dropout. Each adapter gets the gradients
    that it would get alone. Which adapter is active does not count; that an adapter's parameters
    require gradients does: :meth:`StableLoRAAdamW.from_model(model, adapters=...)
    <stablelora_kernels.StableLoRAAdamW.from_model>` sees to it. With gradients on, a ``UserWarning``
    names adapters that are frozen beside others that train, once each.

    Call backward within the block. Gradient checkpointing runs layers again there, and raises
    outside of it. Blocks nest: the inner names hold until the inner block ends.
    ``model.disable_adapter()`` within the block gives the base model for all rows.

    Projection groups and gated MLPs (``fuse_projections``, ``fuse_mlp``) compute layer by layer
    within the block. torch.compile leaves the layers out of its graphs there.

    Args:
        model: a PEFT model after :func:`accelerate_peft`, or a wrapper of one.
        names: one for each row of the batch, the first dimension of each layer's input. The rows of
            one adapter lie together. ``"__base__"`` is the model without an adapter, as for
            reference log-probabilities. A layer without a row's adapter computes the base product
            alone. Where ``generate`` repeats rows, for beams or several sequences, each name comes as
            often.

    Raises:
        ImportError, TypeError: as :func:`accelerate_peft`; or ``names`` are no strings.
        ValueError: the rows of one adapter do not lie together; the model has no such adapter; or a
            module cannot run it on rows of its own: DoRA, experts, embeddings, ``modules_to_save``,
            a bias in lora_B, merged adapters, and layers that are not accelerated. Within the block:
            the batch has another number of rows, or an adapter of ``names`` was deleted.
        RuntimeError: another thread has a block of this model open.
    """
    ranges = ranges_of(names)
    parts = _parts_by_rows(model, {row.adapter for row in ranges})
    rows = Rows(ranges, {name: layer.lora_A for name, layer in parts.holders.items()})  # type: ignore[misc]
    state = _state_of(parts.layers)
    _warn_of_frozen(parts, state)
    before = state.change(rows)
    with ExitStack() as hooks:
        hooks.callback(state.change, before)
        for embedding in parts.embeddings:
            hooks.callback(embedding.register_forward_pre_hook(rows.note_tokens).remove)
        yield


class _Parts(NamedTuple):
    """What a context needs of a model."""

    # The accelerated layers.
    layers: list[nn.Module]
    # For each adapter that is named, one of the layers that have it.
    holders: dict[str, nn.Module]
    # They see how many tokens each row has.
    embeddings: list[nn.Embedding]


def _parts_by_rows(model: nn.Module, names: Collection[str]) -> _Parts:
    """The parts of ``model``, all of whose PEFT modules can run ``names`` by rows."""
    layers = layers_module("adapters_of_rows")
    check_module(model)
    adapters = set(names) - {BASE}
    known: set[str] = set()
    parts = _Parts([], {}, [])
    for name, module in layers.modules_outside_adapters(model):
        held = {*layers.adapters_held(module)}
        if not held:
            if isinstance(module, nn.Embedding):
                parts.embeddings.append(module)
            continue
        known |= held
        is_accelerated = is_taken_over(module, layers.Accelerated)
        reason = layers.reason_against_rows(module, adapters, is_accelerated)
        if reason is None and adapters & held and _is_of_expert(name):
            reason = "an expert gets tokens of all rows"
        if reason is not None:
            raise ValueError(f"adapters_of_rows cannot run {name!r} by rows: {reason}")
        if is_accelerated:
            parts.layers.append(module)
            for adapter in (adapters & held) - parts.holders.keys():
                parts.holders[adapter] = module
    if not known:
        raise ValueError(
            f"model must have PEFT LoRA layers, got a {type(model).__name__} without any"
        )
    unknown = sorted(adapters - known)
    if unknown:
        raise ValueError(
            f"names must be {BASE!r} or adapters of the model, {list_some(sorted(map(repr, known)))}, got {unknown[0]!r}"
        )
    return parts


def _warn_of_frozen(parts: _Parts, state: RowsState) -> None:
    """Warn of named adapters that are frozen where others train."""
    if not torch.is_grad_enabled():
        return
    frozen = sorted(
        name
        for name, layer in parts.holders.items()
        if name not in state.warned and not any(p.requires_grad for p in _pair(layer, name))
    )
    if not frozen or not any(p.requires_grad for layer in parts.layers for p in layer.parameters()):
        return
    state.warned.update(frozen)
    one = len(frozen) == 1
    warnings.warn(
        f"adapters_of_rows: {'adapter' if one else 'adapters'} {list_some([*map(repr, frozen)])} "
        f"{'is' if one else 'are'} frozen, so {'its' if one else 'their'} rows train nothing. "
        "StableLoRAAdamW.from_model(model, adapters=...) unfreezes the adapters that it trains; PEFT freezes all but the "
        "active one, and a Trainer's own optimizer takes that one alone",
        UserWarning,
        # This function, the generator and contextlib's __enter__ lie between.
        stacklevel=4,
    )


def _pair(layer: nn.Module, adapter: str) -> list[nn.Parameter]:
    """A and B of an adapter of a layer."""
    return [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]  # type: ignore[index, union-attr]


def _is_of_expert(name: str) -> bool:
    """Whether a layer's dotted name is that of one of a list of experts."""
    words = name.split(".")
    return any("expert" in word and number.isdigit() for word, number in itertools.pairwise(words))


def _state_of(layers: Sequence[nn.Module]) -> RowsState:
    """The state that ``layers`` share from now on."""
    states: list[RowsState | None] = [layer.__dict__.get(ATTRIBUTE) for layer in layers]
    shared = states[0] if states else None
    if shared is not None and all(state is shared for state in states):
        return shared
    # The first context, or the model has other layers than in the last one.
    for state in states:
        if state is not None:
            state.check_free("the layers of another model are")
    shared = RowsState()
    for layer in layers:
        layer.__dict__[ATTRIBUTE] = shared
    return shared


def losses_of_rows(
    logits: Tensor,
    labels: Tensor,
    names: Sequence[str],
    *,
    ignore_index: int = -100,
    num_items: Mapping[str, Tensor | int] | None = None,
) -> dict[str, Tensor]:
    """Each adapter's next-token loss, by its name: the mean over its own tokens.

    The gradient of the losses' sum is for each adapter that of its own loss, as if it trained
    alone. As in transformers' models, ``labels`` are not shifted (those of the tokens themselves,
    usually ``input_ids``), and low-precision logits are computed in float32. Unlike there, an adapter
    whose labels are all ignored has a loss of 0, not NaN. The loss of ``"__base__"`` has no
    gradient.

    A model with ``fuse_loss=True`` needs no logits for them. It computes the loss of each token::

        token_losses = model(input_ids, labels=labels, token_losses=True).loss
        losses = slk.losses_of_rows(token_losses, labels, names)

    Args:
        logits: [rows, tokens, vocabulary]; or the losses of tokens [rows, tokens], as above.
        labels: [rows, tokens]; the label at t is what the logits at t - 1 predict.
        names: those of :func:`adapters_of_rows`.
        ignore_index: the label of tokens that do not count.
        num_items: by adapter, what to divide the sum of its losses by, in place of its tokens in
            ``labels``: its tokens in all micro-batches of a step, as the ``num_items_in_batch`` of
            transformers' Trainer.

    Raises:
        ValueError: shapes do not fit each other or ``names``, the rows of one adapter do not lie
            together, or ``num_items`` lacks one of ``names``.
    """
    ranges = ranges_of(names)
    if logits.dim() not in (2, 3) or labels.shape != logits.shape[:2]:
        raise ValueError(
            "logits must be [rows, tokens, vocabulary], or the losses of tokens [rows, tokens], and labels [rows, tokens], "
            f"got {list(logits.shape)} and {list(labels.shape)}"
        )
    if logits.shape[0] != len(names):
        raise ValueError(
            f"logits must have {len(names)} rows, one for each of the names, got {logits.shape[0]}"
        )
    if num_items is not None and (
        missing := [row for row in ranges if row.adapter not in num_items]
    ):
        raise ValueError(
            f"num_items must have each of the names, got none for {missing[0].adapter!r} in {list_some([*map(repr, num_items)])}"
        )
    # Shifting the labels copies less than leaving out the last logits.
    targets = pad(labels[:, 1:], (0, 1), value=ignore_index).to(logits.device)
    lengths = [row.end - row.start for row in ranges]
    losses = {}
    # One split, whose backward writes the gradient of all logits once.
    for row, of_rows in zip(ranges, logits.split(lengths), strict=True):
        if row.adapter == BASE:
            of_rows = of_rows.detach()
        if of_rows.dtype != torch.float64:
            of_rows = of_rows.float()
        target = targets[row.start : row.end].flatten()
        if of_rows.dim() == 2:
            total = of_rows.sum()
        else:
            total = cross_entropy(
                of_rows.flatten(0, 1), target, ignore_index=ignore_index, reduction="sum"
            )
        count = (target != ignore_index).sum() if num_items is None else num_items[row.adapter]
        losses[row.adapter] = total / torch.as_tensor(count, device=total.device).clamp(min=1)
    return losses
