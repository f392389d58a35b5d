"""``apply_lora``: put ``LoRALinear`` layers into a model in place of its ``nn.Linear`` layers."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.model.reports import (
    LoRAReport,
    ReplacedModule,
    SkippedModule,
    count_parameters,
    list_some,
    new_heads,
    notes_on_compute_dtypes,
    notes_on_gradients,
    notes_on_heads,
    notes_on_mlps,
)
from stablelora_kernels.nn.fused_loss import fuse_losses, notes_on_losses
from stablelora_kernels.nn.fused_mlp import GatedMLP, fuse_mlps
from stablelora_kernels.nn.linear import LoRALinear, reason_against_lora
from stablelora_kernels.nn.projection_group import make_projection_groups
from stablelora_kernels.quantized import is_quantized
from stablelora_kernels.utils.modules import check_module, check_not_in_ddp, clean, is_hooked
from stablelora_kernels.utils.names import check_regex, ends_of, unmatched_names
from stablelora_kernels.utils.validation import check_tiles, counted

ALL_LINEAR = "all-linear"


def apply_lora(
    model: nn.Module,
    target_modules: str | Collection[str],
    *,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    fuse_projections: bool = False,
    fuse_mlp: bool = False,
    tile_mlp: bool | int = False,
    fuse_loss: bool = False,
) -> LoRAReport:
    """Replace linear layers of ``model`` by :class:`LoRALinear`, in place, without PEFT. Every other
    parameter is frozen.

    Each new layer shares the old one's weight and bias. A and B are float32, or float64 with a
    float64 weight. A layer that is registered in two places stays one layer in both. For ranks or
    alphas that differ by layer, call it once for each; earlier layers keep training. For everything
    else that PEFT's ``LoraConfig`` has, use PEFT and :func:`~stablelora_kernels.accelerate_peft`.

    Args:
        model: any module.
        target_modules: as in PEFT, a collection of names, each of which matches a module's whole
            dotted name or its end after a dot; or "all-linear", every ``nn.Linear`` but the head
            of a transformers model; or any other string, a regular expression for the whole dotted name.
        r, lora_alpha, lora_dropout, use_rslora: those of :class:`LoRALinear`.
        fuse_projections: compute layers together whose names say that they share an input (q, k and
            v of an attention; gate and up of an MLP). The first layer's call computes the whole
            projection group from one read of the input; results are those of separate layers up to
            rounding. Each call checks that the layers really get the same tensor. If they do not,
            they are computed one by one and a warning says so. The report's notes list the groups.
        fuse_mlp: compute each gated MLP, ``down(act(gate(x)) * up(x))``, in one op that keeps less
            for backward (:func:`~stablelora_kernels.functional.lora_mlp`). Its class must be known
            by what its forward computes; the activation is SiLU or GELU, and at least one of its
            projections has LoRA. The report's ``mlps`` lists each MLP, fused or with the reason why
            not. A call that the op does not fit runs the module's own forward. Where both apply,
            ``fuse_mlp`` goes before ``fuse_projections``.
        tile_mlp: as ``fuse_mlp``, and keep each MLP's input alone: forward and backward compute a tile
            of rows at a time, and backward computes gate and up again. For long sequences with
            activation checkpointing, where it takes no more products than ``fuse_mlp``. True
            chooses the tile's rows, a number gives them
            (:func:`~stablelora_kernels.functional.lora_mlp`).
        fuse_loss: compute the loss of a causal language model of transformers without its logits
            (:func:`~stablelora_kernels.functional.lora_linear_cross_entropy`). In training with
            labels, the output's ``logits`` are then None. In evaluation, and without labels, the
            model's own forward runs. The model's class must be known by what its forward computes
            between head and loss. The head may have LoRA or be frozen. A note says which model is
            computed so, or why it is not; a call that the op does not fit computes logits.

    Returns:
        The report. It names the layers that were matched and stay as they are, with the reason.
        Names of ``target_modules`` that match nothing, as a typo does, are in its notes and in a
        warning. So is a head for classification or the like that stays frozen, and a frozen layer
        that gives its input no gradient.

    Raises:
        ValueError: no layer matches, or an argument is out of range. The model is as it was.
        TypeError: an argument has another type.
    """
    check_module(model)
    check_not_in_ddp(model)
    _check_targets(target_modules)
    check_tiles("tile_mlp", tile_mlp)
    # A set, since it is looked up for each module.
    wanted = target_modules if isinstance(target_modules, str) else frozenset(target_modules)
    is_all_linear = _is_all_linear(target_modules)
    heads = _heads(model) if is_all_linear else {}
    targets: dict[str, nn.Linear] = {}
    skipped: list[SkippedModule] = []
    for path, module in model.named_modules():
        name = clean(path)
        if not name or not _matches(wanted, name):
            continue
        if is_all_linear and not isinstance(module, (nn.Linear, LoRALinear)):
            continue
        reason = heads.get(module) or _reason_to_skip(model, path, module)
        if reason is None:
            targets[name] = module  # type: ignore[assignment]
        else:
            skipped.append(SkippedModule(name, reason))
    if not targets:
        raise ValueError(_nothing_matched(model, target_modules, skipped))
    settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora)
    notes = put_in(model, targets, dict.fromkeys(targets, settings))
    unmatched = unmatched_names(target_modules, [clean(name) for name, _ in model.named_modules()])
    if unmatched:
        notes.append(unmatched)
        where = counted(len(targets), "module")
        warnings.warn(f"{unmatched}, while other names match {where}", stacklevel=2)
    return fuse(model, targets, skipped, notes, fuse_projections, fuse_mlp, tile_mlp, fuse_loss)


class LoRASettings(NamedTuple):
    """The arguments of a new layer, as :class:`LoRALinear` has them."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    lora_dtype: torch.dtype = torch.float32


def put_in(
    model: nn.Module, targets: Mapping[str, nn.Linear], settings: Mapping[str, LoRASettings]
) -> list[str]:
    """Put a layer in the place of each target, by its name; freeze all but A's and B's. Return
    notes.

    If it raises, the model is as it was.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        new: dict[nn.Module, LoRALinear] = {
            linear: LoRALinear.from_linear(linear, **settings[name]._asdict())
            for name, linear in targets.items()
        }
    except BaseException:
        for parameter, flag in flags.items():
            parameter.requires_grad = flag
        raise
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child in new
    ]
    for parent, key, child in places:
        parent.register_module(key, new[child])
    trained = {p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    for parameter in model.parameters():
        if parameter not in trained:
            # An assignment, not requires_grad_(), which a lazy module's parameters do not have.
            parameter.requires_grad = False
    counts = Counter(child for _, _, child in places)
    return [
        f"{name!r} is registered in {counts[linear]} places and stays one layer"
        for name, linear in targets.items()
        if counts[linear] > 1
    ]


def fuse(
    model: nn.Module,
    names: Iterable[str],
    skipped: Iterable[SkippedModule],
    notes: list[str],
    fuse_projections: bool,
    fuse_mlp: bool,
    tile_mlp: bool | int,
    fuse_loss: bool,
) -> LoRAReport:
    """The fusions of :func:`apply_lora`, the report on the layers of these names, and a warning of
    what would train wrongly.
    """
    layers = lora_layers(model)
    if fuse_projections:
        notes = notes + make_projection_groups(model, layers)
    mlps: tuple[GatedMLP, ...] = ()
    if fuse_mlp or tile_mlp:
        mlps = fuse_mlps(model, tile_mlp)
        notes = notes + notes_on_mlps(mlps)
    if fuse_loss:
        notes = notes + notes_on_losses(fuse_losses(model))
    wrong = notes_on_gradients(model) + notes_on_heads(model)
    for note in wrong:
        warnings.warn(note, stacklevel=3)
    notes = notes + wrong + notes_on_compute_dtypes(model)
    rows = []
    for name in names:
        layer = layers[name]
        rows.append(
            ReplacedModule(
                name,
                layer.in_features,
                layer.out_features,
                layer.r,
                layer.lora_alpha,
                layer.scaling,
            )
        )
    return LoRAReport(tuple(rows), tuple(skipped), *count_parameters(model), tuple(notes), mlps)


def _check_targets(target_modules: object) -> None:
    if isinstance(target_modules, str):
        check_regex("target_modules", target_modules)
        return
    names = target_modules if isinstance(target_modules, Collection) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(
            f"target_modules must be 'all-linear', a regular expression or names, got {target_modules!r}"
        )


def _is_all_linear(target_modules: object) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def _matches(target_modules: str | Collection[str], name: str) -> bool:
    """Whether ``target_modules`` matches a module's dotted name. "all-linear" matches every name."""
    if not isinstance(target_modules, str):
        return any(end in target_modules for end in ends_of(name))
    return _is_all_linear(target_modules) or re.fullmatch(target_modules, name) is not None


def _heads(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that "all-linear" leaves out, with their reasons."""
    heads: dict[nn.Module, str] = {}
    embeddings = {
        m.weight: name for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    for module in model.modules():
        if type(module) is nn.Linear and module.weight in embeddings:
            heads[module] = (
                f'its weight is tied to {embeddings[module.weight]!r}, so "all-linear" leaves it out'
            )
        # transformers' models have this method. The model may contain one.
        if callable(find := getattr(module, "get_output_embeddings", None)):
            try:
                head = find()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(head, nn.Module):
                heads[head] = _OUTPUT_HEAD
    for head in new_heads(model)[1].values():
        heads |= dict.fromkeys(head.modules(), _OUTPUT_HEAD)
    return heads


_OUTPUT_HEAD = 'it is the output head, which "all-linear" leaves out'


def _reason_to_skip(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why a matched module stays as it is, or None."""
    if isinstance(module, LoRALinear):
        return "it is a LoRALinear already"
    words = path.split(".")
    parents = [model.get_submodule(".".join(words[:depth])) for depth in range(len(words))]
    if any("base_layer" in parent._modules for parent in [*parents, module]):
        return _OF_PEFT
    if isinstance(parents[-1], nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight instead of calling it in inference"
    reason = reason_against_lora(module)
    if reason is not None:
        return f"it {reason}"
    if is_hooked(module):
        return "it has hooks, or its forward was replaced (as accelerate's hooks do)"
    if set(module._parameters) != {"weight", "bias"} or module._modules:
        return "it holds other parameters or modules than weight and bias"
    weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
    if not is_quantized(weight) and weight.dtype not in FLOAT_DTYPES:
        return f"its weight is of {weight.dtype}"
    if 0 in weight.shape:
        return f"its weight is empty, {list(weight.shape)}"
    return None


_OF_PEFT = "it is part of a PEFT layer; accelerate_peft runs those"


def _nothing_matched(
    model: nn.Module, target_modules: object, skipped: Collection[SkippedModule]
) -> str:
    """The message of the error that no layer gets LoRA."""
    if any(module.reason == _OF_PEFT for module in skipped):
        # A list of the skipped layers and of the model's linear layers would bury that.
        return (
            f"target_modules {target_modules!r} matches no layer but PEFT's, which have LoRA already: "
            "slk.accelerate_peft(model) runs them on these kernels"
        )
    text = f"target_modules must match an nn.Linear of the model, got {target_modules!r}, which matches none"
    if skipped:
        text += f"; skipped {list_some([f'{module.name} ({module.reason})' for module in skipped])}"
    elif isinstance(target_modules, str):
        text += "; a string is a regular expression for the whole dotted name, a list holds ends of names"
    candidates = [
        repr(clean(name))
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name
    ]
    return text + f". Its linear layers: {list_some(candidates) or 'none'}"
