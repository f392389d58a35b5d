"""The report that ``apply_lora``, ``load_adapter`` and ``accelerate_peft`` return."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from stablelora_kernels.nn.fused_mlp import GatedMLP
from stablelora_kernels.nn.gradients import layers_without_gradient
from stablelora_kernels.nn.stacks import stacks_of
from stablelora_kernels.utils.validation import counted


@dataclass(frozen=True)
class ReplacedModule:
    """One layer that now has a LoRA branch.

    Attributes:
        name: its first dotted name in the model.
        in_features: K.
        out_features: N.
        r: the branch's rank.
        lora_alpha: the numerator of the scaling.
        scaling: the factor of the branch.
        adapter: the adapter's name in a PEFT layer, which has a row for each adapter; None for this
            library's layers.
        experts: how many experts' pairs are stacked; 1 for a single layer.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    scaling: float
    adapter: str | None = None
    experts: int = 1


@dataclass(frozen=True)
class SkippedModule:
    """One module that was matched but left unchanged.

    Attributes:
        name: its dotted name in the model.
        reason: why it was left unchanged.
    """

    name: str
    reason: str


# A report is easily taken for the model.
_NO_MODEL = (
    "the model was changed in place, and this is the report on it; go on with the model itself"
)


@dataclass(frozen=True, repr=False)
class LoRAReport:
    """The changes to a model. ``print(report)`` prints a summary.

    Attributes:
        replaced: every layer that now has a branch.
        skipped: every match that was left unchanged, with the reason.
        trainable: the number of trainable parameter elements.
        total: the number of all parameter elements.
        notes: other surprises, such as a pattern that matched nothing.
        mlps: with ``fuse_mlp`` or ``tile_mlp``, every gated MLP and every module of experts with LoRA in it. The
            notes have them by outcome.
    """

    replaced: tuple[ReplacedModule, ...]
    skipped: tuple[SkippedModule, ...]
    trainable: int
    total: int
    notes: tuple[str, ...] = ()
    mlps: tuple[GatedMLP, ...] = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).splitlines()[0]}>"

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__!r} object is not callable: {_NO_MODEL}")

    # Type checkers would accept every name.
    if not TYPE_CHECKING:

        def __getattr__(self, name):
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}: {_NO_MODEL}"
            )

    def __str__(self) -> str:
        share = self.trainable / self.total if self.total else 0.0
        modules = len({module.name for module in self.replaced})
        where = (
            f"LoRA on {counted(modules, 'module')}"
            if modules
            else "No LoRA module trains on this library's ops"
        )
        lines = [f"{where}; {self.trainable:,} of {self.total:,} parameters train ({share:.2%})"]
        kinds = Counter((m.name.rpartition(".")[2], *astuple(m)[1:]) for m in self.replaced)
        for (name, k, n, r, alpha, scaling, adapter, experts), count in kinds.items():
            named = "" if adapter is None else f", adapter {adapter!r}"
            stacked = "" if experts == 1 else f"{experts} experts of "
            lines.append(
                f"  {count} x {name}: {stacked}{k} -> {n}, r {r}, alpha {alpha:g}, scaling {scaling:g}{named}"
            )
        lines += [f"  skipped {text}" for text in by_reason(self.skipped)]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


NO_MLP = "fuse_mlp found no gated MLP with LoRA"


def notes_on_mlps(mlps: Collection[GatedMLP]) -> list[str]:
    """A note on all MLPs that are computed in one op, and one on those of each reason that are not."""
    fused = Counter(_kind_of(mlp) for mlp in mlps if mlp.reason is None)
    kinds = "; ".join(f"{n} x {kind}" for kind, n in fused.items())
    notes = [f"computed in one op each: {kinds}"] if fused else []
    notes += [
        f"not in one op: {text}"
        for text in by_reason(mlp for mlp in mlps if mlp.reason is not None)
    ]
    return notes or [NO_MLP]


def _kind_of(mlp: GatedMLP) -> str:
    in_tiles = " in tiles" if mlp.tiled else ""
    if mlp.experts is not None:
        return f"MLP of {mlp.experts} experts{in_tiles}"
    return f"gated MLP ({mlp.activation}){in_tiles}"


def stacks_without_adapter(
    model: nn.Module, adapted: Collection[nn.Parameter | None]
) -> dict[str, str]:
    """The modules whose own parameters stack matrices, as transformers 5 stores experts, with what
    that means.

    Parameters of ``adapted`` have an adapter and do not count.
    """
    stacks: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        # Convolutions' weights have as many dimensions.
        if isinstance(module, _ConvNd):
            continue
        sizes = {key: p.numel() for key, p in stacks_of(module).items() if p not in adapted}
        if sizes:
            stacks[name] = sizes
    share = sum(sum(sizes.values()) for sizes in stacks.values()) / max(
        count_parameters(model)[1], 1
    )
    reason = (
        f"as experts are stored, and has no linear layers for them: {share:.1%} of the model's weights are in such parameters "
        "and get no adapter unless target_parameters names them"
    )
    return {
        name: f"it stacks matrices in {', '.join(sizes)}, {reason}"
        for name, sizes in stacks.items()
    }


def notes_on_gradients(model: nn.Module) -> list[str]:
    """A note on the layers of ``model`` through which LoRA on earlier layers gets no gradient, for
    each reason.
    """
    names: dict[str, list[str]] = {}
    for name, reason in layers_without_gradient(model).items():
        names.setdefault(reason, []).append(name)
    return [
        f"{reason}, so adapters before it get wrong gradients: {list_some(some)}"
        for reason, some in names.items()
    ]


# The ends of transformers' names of classes whose head is new in each fine-tuning, and of
# attributes that hold such a head.
_NEW_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice", "Segmentation", "Detection")
_HEADS = ("classifier", "score", "qa_outputs", "head")


def new_heads(model: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """The modules by name that are the head of a transformers model for classification or the like,
    which is new in each fine-tuning; before them the name of the model's class.
    """
    for module in model.modules():
        kinds = type(module).__mro__
        if not any(
            kind.__name__.endswith(_NEW_HEADS)
            for kind in kinds
            if kind.__module__.startswith("transformers.")
        ):
            continue
        body = getattr(type(module), "base_model_prefix", "")
        heads = {
            name: child
            for name, child in module.named_children()
            if (name != body if body in module._modules else name.endswith(_HEADS))
            and any(True for _ in child.parameters())
        }
        return type(module).__name__, heads
    return "", {}


def notes_on_heads(model: nn.Module) -> list[str]:
    """A note if the head of a transformers model stays frozen, though a new head has random values."""
    of, heads = new_heads(model)
    frozen = [
        repr(name)
        for name, head in heads.items()
        if not any(parameter.requires_grad for parameter in head.parameters())
    ]
    if not frozen:
        return []
    return [
        f"{', '.join(frozen)} of {of} stays frozen; if it is new, its values are random: "
        "name it in PEFT's modules_to_save, or let its parameters require gradients after apply_lora"
    ]


def notes_on_compute_dtypes(model: nn.Module) -> list[str]:
    """A note on weights in bitsandbytes' 4 bits that a 16-bit model computes in float32, the default
    of transformers' ``BitsAndBytesConfig``.
    """
    names = []
    for name, module in model.named_modules():
        # Not getattr: PEFT's trainable tokens compute their weight, which fails on meta tensors.
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        # The dtype from which bitsandbytes quantized the weight.
        dtype = getattr(state, "dtype", torch.float32)
        if dtype != torch.float32 and getattr(module, "compute_dtype", None) == torch.float32:
            names.append(name)
    if not names:
        return []
    return [
        f"{list_some(names)}: computed in float32 in a 16-bit model, which is slow. With 16-bit inputs, no MLP of such "
        "layers is computed in one op, and under accelerate_peft bitsandbytes computes each layer. Give "
        "BitsAndBytesConfig the model's dtype as bnb_4bit_compute_dtype"
    ]


def by_reason(modules: Iterable[SkippedModule | GatedMLP]) -> list[str]:
    """The names of each reason, and the reason."""
    names: dict[str | None, list[str]] = {}
    for module in modules:
        names.setdefault(module.reason, []).append(module.name)
    return [f"{list_some(some)}: {reason}" for reason, some in names.items()]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of trainable and of all parameter elements, as PEFT's
    ``get_nb_trainable_parameters``.

    A weight in 4 bits counts its elements, and a DTensor and a parameter cut by ZeRO-3 those of the
    full tensor. A parameter in two places counts once. A lazy module's parameters, which have no
    shape yet, do not count.
    """
    parameters = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    trainable = sum(_elements(parameter) for parameter in parameters if parameter.requires_grad)
    return trainable, sum(map(_elements, parameters))


def _elements(parameter: nn.Parameter) -> int:
    """The elements of the weight that ``parameter`` stands for."""
    # ZeRO-3 leaves an empty placeholder for a sharded parameter.
    if (whole := getattr(parameter, "ds_numel", None)) is not None and not parameter.numel():
        return whole
    # For 4-bit weights, count elements, not storage bytes.
    return math.prod(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))


def list_some(names: list[str], limit: int = 5) -> str:
    """The first names, as ``a, b and 7 more``."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
