"""``accelerate_peft`` runs a PEFT model on this library's kernels; ``restore_peft`` undoes it.
Importing needs no peft.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from stablelora_kernels.integrations.peft.merging import (
    KeepsBase,
    keep_base,
    keep_until_unmerged,
    let_go,
)
from stablelora_kernels.integrations.peft.rows_state import ATTRIBUTE, RowsState
from stablelora_kernels.model.reports import (
    NO_MLP,
    LoRAReport,
    ReplacedModule,
    SkippedModule,
    by_reason,
    count_parameters,
    list_some,
    notes_on_compute_dtypes,
    notes_on_gradients,
    notes_on_heads,
    notes_on_mlps,
    stacks_without_adapter,
)
from stablelora_kernels.nn.fused_loss import (
    LanguageModel,
    fuse_losses,
    notes_on_losses,
    unfuse_losses,
)
from stablelora_kernels.nn.fused_mlp import GatedMLP, fuse_mlps, unfuse_mlps
from stablelora_kernels.nn.projection_group import make_projection_groups, remove_projection_groups
from stablelora_kernels.nn.stacks import stored_parameter
from stablelora_kernels.nn.take_over import give_back, is_taken_over, own_class, take_over
from stablelora_kernels.utils.extras import import_extra, release
from stablelora_kernels.utils.modules import check_module, in_fully_sharded, innermost
from stablelora_kernels.utils.names import unmatched_names
from stablelora_kernels.utils.refusal import Refusal
from stablelora_kernels.utils.validation import check_bool, check_tiles, no_argument

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

# The key of a model's __dict__ that holds which fusions were asked for, by keyword.
FUSIONS = "_stablelora_fusions"
FUSION_NAMES = ("fuse_projections", "fuse_mlp", "tile_mlp", "fuse_loss")
# The report's note on a model with several adapters.
ROWS_ARE_NOT_FUSED = (
    "within adapters_of_rows, fused projections and MLPs compute layer by layer, "
    "because each adapter has its own rows"
)


def accelerate_peft(
    model: nn.Module,
    *,
    strict: bool = False,
    fuse_projections: bool | None = None,
    fuse_mlp: bool | None = None,
    tile_mlp: bool | int | None = None,
    fuse_loss: bool | None = None,
) -> LoRAReport:
    """Run the LoRA layers of a PEFT model on this library's ops, in place and per instance.

    Parameters, names, adapters and checkpoints stay PEFT's; only the forward of the current layers
    changes, and ``unmerge`` gives plain weights back to the bit, from a copy that merged layers keep
    in the host's memory. The forward reads the layer's state at each call, so adapters may be added,
    switched, scaled, disabled, merged and deleted afterwards. Calls that it does not support run
    PEFT's own forward.
    Layers that PEFT adds later are not accelerated until this is called again; calling it twice
    changes nothing. A fusion that is not given, or None, stays as the model's last call asked for it;
    at first it is off.

    On a plain ``nn.Linear``, the base product and the first adapter are one op. On Triton this also
    holds for bitsandbytes' 4-bit weights and torchao's float8 and NVFP4. Any other base layer
    (otherwise quantized, transformers' Conv1D, with hooks) computes its own product, and one op per
    adapter adds the branch. Products are in x's dtype, or autocast's. Float32 adapters do not change that:
    PEFT would copy x to float32, this library does not. DoRA without dropout (with dropout in
    evaluation only), and stacks of experts with one active adapter
    (:func:`~stablelora_kernels.functional.lora_experts`), run without anything of the weight's
    size. So do stacks in bitsandbytes' 4 bits, in transformers' ``FP8Experts`` and in MXFP4, which
    PEFT trains wrongly; their wrappers are nested, and named, as those of plain stacks.

    A ``UserWarning`` and a note name adapters that PEFT trains wrongly or not at all: on experts
    that are packed otherwise, and before a layer that quantizes its input, as some of torchao's and
    compressed-tensors' do.

    Args:
        model: a ``PeftModel``, or any module that contains PEFT's LoRA layers.
        strict: raise unless every adapter of every PEFT layer runs on this library's ops, and
            trains; ``fuse_mlp`` computes an MLP in one op; and ``fuse_loss`` needs no logits.
        fuse_projections: compute projection groups together, as
            :func:`~stablelora_kernels.apply_lora` does. Each of their layers then holds a reference
            to its group, and their parent a hook, until :func:`restore_peft`, which must come
            before PEFT's ``unload`` and ``merge_and_unload``: they would leave the hook behind.
        fuse_mlp: compute each gated MLP in one op, as :func:`~stablelora_kernels.apply_lora` does.
            A call runs in one op while each projection has at most one active adapter. So does a
            module of experts with a router, whatever its gate. The modules of gated MLPs
            get another class of the same name until :func:`restore_peft`, or until PEFT's
            ``unload`` or ``merge_and_unload`` has taken the last adapter out of them.
        tile_mlp: as ``fuse_mlp``, and keep each MLP's input alone: forward and backward compute a tile
            of rows at a time, and backward computes gate and up again. For long sequences with
            activation checkpointing, where it takes no more products than ``fuse_mlp``. True
            chooses the tile's rows, a number gives them
            (:func:`~stablelora_kernels.functional.lora_mlp`).
        fuse_loss: compute the loss of a causal language model without its logits, as
            :func:`~stablelora_kernels.apply_lora` does. The head may be adapted or frozen.

    Returns:
        The report. It has one row for each layer and adapter that runs on the ops. It lists as
        skipped, with the reason, those that PEFT's own forward computes (aLoRA and other variants,
        embeddings, convolutions, ...).

    Raises:
        ImportError: peft is not installed, or is older than 0.16.
        TypeError: ``model`` is not a module, or a fusion is neither a bool nor None; ``tile_mlp`` may
            be a number.
        ValueError: ``tile_mlp`` is set and ``fuse_mlp`` is False; the model has no PEFT LoRA layers;
            ``strict`` is set and something would be skipped, or a fusion would have no effect; or
            ``lora_experts`` does not fit packed experts, which PEFT's own forward would compute
            wrongly. Nothing is changed then.
        RuntimeError: the model is within :func:`adapters_of_rows`.
    """
    layers = layers_module()
    _check_no_rows(model, "accelerate_peft")
    before = _fusions_of(model)
    asked = {
        "fuse_projections": fuse_projections,
        "fuse_mlp": fuse_mlp,
        "tile_mlp": tile_mlp,
        "fuse_loss": fuse_loss,
    }
    if fuse_mlp is False:
        if tile_mlp:
            raise ValueError(
                f"fuse_mlp must not be False with tile_mlp={tile_mlp!r}, which fuses MLPs"
            )
        asked["tile_mlp"] = False
    fusions = before | {k: _check_fusion(k, v) for k, v in asked.items() if v is not None}
    experts = _experts()
    accelerated: list[nn.Module] = []
    # Layers whose merge can be undone to the bit.
    merging: list[nn.Module] = []
    replaced: list[ReplacedModule] = []
    skipped: list[SkippedModule] = []
    # Layers of which PEFT's own forward computes DoRA beside another active adapter.
    beside: list[str] = []
    wrappers: dict[str, ParamWrapper] = {}
    for name, module in _tuner_layers(model, layers):
        if experts is not None and isinstance(module, experts.ParamWrapper):
            wrappers[name] = module
            merging.append(module)
            continue
        if _merges_into_its_base(model, name, module, layers):
            merging.append(module)
        reason = _reason_layer_stays_pefts(model, name, module, layers)
        if reason is not None:
            skipped.append(SkippedModule(name, reason))
            continue
        runs = False
        is_gathered_in_calls = in_fully_sharded(model, name)
        for adapter in module.lora_A:
            reading = layers.read(module, [adapter], is_gathered_in_calls)
            if isinstance(reading, Refusal):
                skipped.append(SkippedModule(name, reading.reason))
                continue
            runs = True
            reason = reading.reason_against_training()
            if reason is None:
                replaced.append(_row(name, module, adapter))
            else:
                # In evaluation the ops compute it.
                skipped.append(SkippedModule(name, reason))
        if runs:
            accelerated.append(module)
            if layers.is_dora_beside(module):
                beside.append(name)
    stacks: dict[str, ParamWrapper] = {}
    if experts is not None and wrappers:
        stacks, skipped_stacks = experts.read_wrappers(wrappers)
        skipped += skipped_stacks
        for name, outermost in stacks.items():
            for parameter, wrapper in experts.wrapped_parameters(outermost).items():
                for adapter in wrapper.lora_A:
                    replaced.append(_row(f"{name}.{parameter}", wrapper, adapter))
    computed_here = {
        id(wrapper)
        for outermost in stacks.values()
        for wrapper in experts.wrapped_parameters(outermost).values()  # type: ignore[union-attr]
    }
    of_peft = {name: w for name, w in wrappers.items() if id(w) not in computed_here}
    faults = _faults(model, of_peft)
    if strict and faults:
        raise ValueError(f"strict=True, but {faults[0]}")
    if strict and skipped:
        text = list_some([f"{module.name} ({module.reason})" for module in skipped])
        if any("Router" in module.reason for module in skipped):
            text += '; "all-linear" adapts routers too, so name the layers instead'
        raise ValueError(f"strict=True, but PEFT's own forward would go on computing {text}")
    for fault in faults:
        warnings.warn(fault, UserWarning, stacklevel=2)
    untouched = {
        module for module in model.modules() if not _is_accelerated(module, layers, experts)
    }
    kept = [module for module in untouched if is_taken_over(module, KeepsBase)]
    for module in merging:
        let_go(module)
    for module in accelerated:
        take_over(module, layers.Accelerated)
    for outermost in stacks.values():
        experts.accelerate(model, outermost)  # type: ignore[union-attr]
    for module in merging:
        keep_base(module)
    _unfuse(model)
    fused = _fuse(model, fusions, layers)
    refusal = _refusal(fused, fusions) if strict else None
    if refusal is not None:
        # What fuses is known only once it is tried.
        _unfuse(model)
        _restore(model, untouched, layers, experts)
        for module in kept:
            keep_base(module)
        _fuse(model, before, layers)
        raise ValueError(f"strict=True, but {refusal}")
    for module in model.modules():
        module.__dict__.pop(FUSIONS, None)
    if any(fusions.values()):
        innermost(model).__dict__[FUSIONS] = fusions
    notes = faults + _unmatched(model, wrappers)
    if any(parameter.requires_grad for parameter in model.parameters()):
        notes += notes_on_heads(model)
    notes += _notes_on_stacks(model, wrappers) + notes_on_compute_dtypes(model)
    if beside:
        notes.append(
            f"PEFT's own forward computes DoRA beside another active adapter: {list_some(beside)}"
        )
    notes += fused.notes
    makes_groups = any(fusions[name] for name in ("fuse_projections", "fuse_mlp", "tile_mlp"))
    if makes_groups and len({row.adapter for row in replaced}) > 1:
        notes.append(ROWS_ARE_NOT_FUSED)
    counts = count_parameters(model)
    return LoRAReport(tuple(replaced), tuple(skipped), *counts, tuple(notes), fused.mlps)


class _Fused(NamedTuple):
    """What the fusions of a call did."""

    notes: list[str]
    mlps: tuple[GatedMLP, ...]
    losses: tuple[LanguageModel, ...]


def _check_fusion(name: str, value: object) -> bool | int:
    """``value`` of a keyword as its type asks."""
    return (check_tiles if name == "tile_mlp" else check_bool)(name, value)


def _fusions_of(model: nn.Module) -> dict[str, bool | int]:
    """The fusions that the last call on the model, or on what it wraps, has asked for."""
    check_module(model)
    kept = (module.__dict__[FUSIONS] for module in model.modules() if FUSIONS in module.__dict__)
    return next(kept, dict.fromkeys(FUSION_NAMES, False))


def _fuse(model: nn.Module, fusions: Mapping[str, bool | int], layers: ModuleType) -> _Fused:
    """Fuse the layers of an accelerated model."""
    notes: list[str] = []
    if fusions["fuse_projections"]:
        named = {
            name: module
            for name, module in model.named_modules()
            if is_taken_over(module, layers.Accelerated)
        }
        notes += make_projection_groups(model, named)
    mlps: tuple[GatedMLP, ...] = ()
    if fusions["fuse_mlp"] or fusions["tile_mlp"]:
        mlps = fuse_mlps(model, fusions["tile_mlp"])
        notes += notes_on_mlps(mlps)
    losses: tuple[LanguageModel, ...] = ()
    if fusions["fuse_loss"]:
        losses = fuse_losses(model)
        notes += notes_on_losses(losses)
    return _Fused(notes, mlps, losses)


def _refusal(fused: _Fused, fusions: Mapping[str, bool | int]) -> str | None:
    """Why ``strict`` does not accept what the fusions did, or None."""
    fuses = fusions["fuse_mlp"] or fusions["tile_mlp"]
    if fuses and all(mlp.reason is not None for mlp in fused.mlps):
        if not fused.mlps:
            return NO_MLP
        return f"fuse_mlp computes no MLP in one op: {list_some(by_reason(fused.mlps))}"
    if fusions["fuse_loss"]:
        kept = [loss for loss in fused.losses if loss.reason is not None]
        return notes_on_losses(kept)[0] if kept or not fused.losses else None
    return None


def check_accelerate_options(
    owner: str, options: Mapping[str, object], *, others: Sequence[str] = ()
) -> None:
    """Raise TypeError or ValueError unless ``options`` of ``owner`` are keywords of
    :func:`accelerate_peft` with values that it takes. ``others``: what ``owner`` takes besides.
    """
    known = [*accelerate_options(), *others]
    for name, value in options.items():
        if name not in known:
            raise TypeError(no_argument(owner, name, known))
        _check_fusion(name, value)


def accelerate_options() -> list[str]:
    """The names of the keywords of :func:`accelerate_peft`."""
    return [name for name in inspect.signature(accelerate_peft).parameters if name != "model"]


def _row(name: str, layer: LoraLayer, adapter: str) -> ReplacedModule:
    """The report's row on an adapter of a layer."""
    return ReplacedModule(
        name,
        layer.in_features,  # type: ignore[arg-type]
        layer.out_features,  # type: ignore[arg-type]
        layer.r[adapter],
        layer.lora_alpha[adapter],
        layer.scaling[adapter],
        adapter,
        getattr(layer, "num_experts", 1),
    )


def _faults(model: nn.Module, wrappers: Mapping[str, ParamWrapper]) -> list[str]:
    """What trains wrongly or not at all without PEFT's saying so, whoever computes the branch."""
    faults = []
    if wrappers:
        from stablelora_kernels.integrations.peft.faults import faults_of_wrappers

        faults += faults_of_wrappers(wrappers.items())
    if any(parameter.requires_grad for parameter in model.parameters()):
        faults += notes_on_gradients(model)
    return faults


def _notes_on_stacks(model: nn.Module, wrappers: Mapping[str, ParamWrapper]) -> list[str]:
    """Notes on the experts that have no adapter: PEFT's "all-linear" reaches those of some families
    alone.
    """
    adapted = {
        stored_parameter(wrapper.get_base_layer(), wrapper.parameter_name)
        for wrapper in wrappers.values()
    }
    adapted |= {parameter for parameter in model.parameters() if parameter.requires_grad}
    stacks = stacks_without_adapter(model, adapted)
    return by_reason(
        SkippedModule(name.replace(".base_layer", ""), reason) for name, reason in stacks.items()
    )


def _unfuse(model: nn.Module) -> None:
    """Take all layers out of projection groups, fused MLPs and fused losses."""
    remove_projection_groups(model.modules())
    unfuse_mlps(model.modules())
    unfuse_losses(model.modules())


def _unmatched(model: nn.Module, wrappers: Mapping[str, ParamWrapper]) -> list[str]:
    """A note on each adapter whose target_modules name something that matches no module, of which
    PEFT says nothing, or whose target_parameters match no parameter.

    Under "all-linear" PEFT lists every linear layer there, also those that ``exclude_modules`` or
    ``modules_to_save`` keep out.
    """
    names = []
    configs: dict[str, object] = {}
    for name, module in model.named_modules():
        names.append(name)
        configs_of_module = module.__dict__.get("peft_config")
        if isinstance(configs_of_module, dict):
            configs |= configs_of_module
    notes = []
    for adapter, config in configs.items():
        note = unmatched_names(getattr(config, "target_modules", None), names)
        if note:
            notes.append(f"{note} (adapter {adapter!r})")
        adapted = [
            f"{name.replace('.base_layer', '')}.{wrapper.parameter_name}"
            for name, wrapper in wrappers.items()
            if adapter in wrapper.lora_A
        ]
        note = unmatched_names(
            getattr(config, "target_parameters", None), adapted, "target_parameters"
        )
        if note:
            notes.append(f"{note} (adapter {adapter!r})")
            if any(name.endswith(".parametrizations") for name in names):
                notes[-1] += ": PEFT finds experts in 4 bits by their full names alone"
    return notes


def restore_peft(model: nn.Module) -> None:
    """Undo :func:`accelerate_peft` exactly: every layer, every fused MLP and every model with a fused
    loss gets its own class back; a merged layer once it is unmerged, to the bit.

    A model without such layers stays unchanged.

    Raises:
        ImportError, TypeError, RuntimeError: as :func:`accelerate_peft`.
    """
    layers = layers_module()
    _check_no_rows(model, "restore_peft")
    _unfuse(model)
    modules = [*model.modules()]
    for module in modules:
        module.__dict__.pop(ATTRIBUTE, None)
        module.__dict__.pop(FUSIONS, None)
    _restore(model, modules, layers, _experts())


def _is_accelerated(module: nn.Module, layers: ModuleType, experts: ModuleType | None) -> bool:
    """Whether a layer, or a stack of experts, runs on the ops."""
    return is_taken_over(module, layers.Accelerated) or (
        experts is not None and is_taken_over(module, experts.AcceleratedExperts)
    )


def _restore(
    model: nn.Module,
    modules: Collection[nn.Module],
    layers: ModuleType,
    experts: ModuleType | None,
) -> None:
    """Give those of ``modules`` that are accelerated their own class back; merged ones once they are
    unmerged.
    """
    for module in modules:
        give_back(module, layers.Accelerated)
        if experts is not None and is_taken_over(module, experts.AcceleratedExperts):
            experts.restore(model, module)
        let_go(module)
        keep_until_unmerged(module)


def _check_no_rows(model: nn.Module, function: str) -> None:
    """Raise RuntimeError if the model is within ``adapters_of_rows``."""
    check_module(model)
    for module in model.modules():
        state: RowsState | None = module.__dict__.get(ATTRIBUTE)
        if state is not None:
            state.check_free(function)


def layers_module(function: str = "accelerate_peft") -> ModuleType:
    """``layers``; raises ImportError without a PEFT that it fits."""
    peft = import_extra("peft", "peft", function)
    if release(peft.__version__) < (0, 16):
        raise ImportError(
            f"peft must be 0.16 or newer, whose layers tell their variants, got {peft.__version__}: "
            "pip install 'stablelora-kernels[peft]'"
        )
    from stablelora_kernels.integrations.peft import layers

    return layers


def _experts() -> ModuleType | None:
    """``experts``, or None with a PEFT before 0.17, which wraps no parameters."""
    from peft.tuners import lora

    if not hasattr(lora, "ParamWrapper"):
        return None
    from stablelora_kernels.integrations.peft import experts

    return experts


def _tuner_layers(model: nn.Module, layers: ModuleType) -> list[tuple[str, Any]]:
    """The PEFT layers of ``model``; raises ValueError if none is a LoRA layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_module(model)
    tuner_layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    if not any(isinstance(module, layers.lora.LoraLayer) for _, module in tuner_layers):
        raise ValueError(
            f"model must have PEFT LoRA layers, got a {type(model).__name__} without any"
        )
    return tuner_layers


def _reason_layer_stays_pefts(
    model: nn.Module, name: str, module: BaseTunerLayer, layers: ModuleType
) -> str | None:
    """Why no adapter of a PEFT layer can run on the ops, or None if some can."""
    kind = type(module).__name__
    if not isinstance(module, layers.lora.LoraLayer):
        return f"{kind} is not a LoRA layer"
    if own_class(module) not in layers.KNOWN:
        return f"lora.{kind} is not a layer that the ops are known to fit"
    if "forward" in module.__dict__:
        return "its forward was replaced (as accelerate's hooks do)"
    if _in_multihead_attention(model, name):
        return "nn.MultiheadAttention reads its weight instead of calling it"
    return None if len(module.lora_A) else "it holds no adapter"


def _in_multihead_attention(model: nn.Module, name: str) -> bool:
    path = name.split(".")
    around = [model.get_submodule(".".join(path[:i])) for i in range(len(path))]
    return any(isinstance(module, nn.MultiheadAttention) for module in around)


def _merges_into_its_base(
    model: nn.Module, name: str, module: BaseTunerLayer, layers: ModuleType
) -> bool:
    """Whether PEFT's merge writes to the base layer of a LoRA layer, so that unmerging can give it
    back.

    It puts other tensors in the place of an ``nn.MultiheadAttention``'s parameters.
    """
    if not isinstance(module, layers.lora.LoraLayer) or "forward" in module.__dict__:
        return False
    is_attention = isinstance(module.get_base_layer(), nn.MultiheadAttention)
    return not is_attention and not _in_multihead_attention(model, name)
