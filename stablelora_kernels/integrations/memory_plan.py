"""``memory_plan`` says what fits a GPU: which options a training step needs, how many layers need
checkpoints, and how many tokens fit. Importing this module needs neither transformers nor peft.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stablelora_kernels import functional
from stablelora_kernels.dispatch.backend import TRITON_PROBLEM
from stablelora_kernels.integrations.peft import accelerate_peft
from stablelora_kernels.integrations.step_memory import (
    ADAPTER,
    BF16,
    COUNTED_ATTENTION,
    CPU,
    GIB,
    NF4,
    USABLE,
    Counted,
    count,
    device_of,
    moments,
    most_tokens,
    positions_bytes,
    register_attention,
)
from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.validation import check_choice, check_float, check_int, counted

# Dense decoders of transformers whose layers are all alike and take the rotary embedding's angles.
MODEL_TYPES = ("llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
# Bytes of a frozen element.
WEIGHTS = {"bf16": BF16, "nf4": NF4}
# Launch plans are an H100's; other GPUs' take less than 0.3 % more or less.
_GPU = "sm_90"


class _Options(NamedTuple):
    """A row of a plan."""

    # Keywords of accelerate_peft.
    fusions: tuple[str, ...] = ()
    checkpointing: bool = False
    offload: bool = False


# In the order in which to try them.
_ROWS = (
    _Options(),
    _Options(("fuse_loss",)),
    _Options(("fuse_loss", "fuse_mlp")),
    _Options(("fuse_loss", "fuse_mlp"), checkpointing=True),
    _Options(("fuse_loss", "tile_mlp"), checkpointing=True),
    _Options(("fuse_loss", "tile_mlp"), checkpointing=True, offload=True),
)


def _without_mlp(row: _Options) -> _Options:
    return row._replace(fusions=tuple(name for name in row.fusions if name == "fuse_loss"))


@dataclass(frozen=True)
class PlannedStep:
    """A training step with some options, a row of :class:`MemoryPlan`.

    Attributes:
        fusions: the keywords of :func:`~stablelora_kernels.accelerate_peft` that are True.
        checkpoints: how many layers are checkpointed, the first ones of the model.
        offload: whether their inputs wait in the host's memory.
        tokens: batch size times sequence length.
        gib: the GPU's memory at the step's peak, with weights and the optimizer's state.
        host_gib: the host's memory that the inputs take.
        fits: whether the GPU holds it.
    """

    fusions: tuple[str, ...]
    checkpoints: int
    offload: bool
    tokens: int
    gib: float
    host_gib: float
    fits: bool


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`~stablelora_kernels.memory_plan` has counted. ``print(plan)`` prints a table.

    Attributes:
        model_type: transformers' name of the architecture.
        layers: how many decoder layers it has.
        r: the rank of LoRA.
        weights: "bf16" or "nf4".
        gpu_gib: the GPU's memory.
        tokens: those of the step that was asked for, or None.
        start_gib: what is there before any token: weights, adapters, their gradients and moments.
        steps: a row for each set of options, in the order in which to try them; without LoRA in
            the MLPs, none has ``fuse_mlp`` or ``tile_mlp``. Without ``tokens``, each has the most
            tokens that fit.
    """

    model_type: str
    layers: int
    r: int
    weights: str
    gpu_gib: float
    tokens: int | None
    start_gib: float
    steps: tuple[PlannedStep, ...]

    @property
    def best(self) -> PlannedStep | None:
        """The first step that fits ``tokens``, or without them the one that fits most; None if none
        fits.
        """
        fitting = [step for step in self.steps if step.fits]
        if self.tokens is None:
            return max(fitting, key=lambda step: step.tokens, default=None)
        return next(iter(fitting), None)

    def __str__(self) -> str:
        asked = "most tokens" if self.tokens is None else f"{self.tokens:,} tokens"
        lines = [
            f"{self.model_type}, {counted(self.layers, 'layer')}, {self.weights}, LoRA of rank {self.r}: "
            f"{self.start_gib:.1f} GiB before any token",
            f"{self.gpu_gib:g} GiB, of which {USABLE:.0%} are planned; {asked}",
            f"  {'accelerate_peft':22}{'checkpoints':>13}{'offload':>9}{'tokens':>11}{'GiB':>9}{'host GiB':>10}  fits",
        ]
        for step in self.steps:
            lines.append(
                f"{'* ' if step == self.best else '  '}{', '.join(step.fusions):22}"
                f"{f'{step.checkpoints} of {self.layers}':>13}{'yes' if step.offload else 'no':>9}"
                f"{step.tokens:>11,}{step.gib:>9.1f}{step.host_gib:>10.1f}  {'yes' if step.fits else 'no'}"
            )
        return "\n".join(lines)


def memory_plan(
    model: Any,
    *,
    gpu_gib: float,
    tokens: int | None = None,
    r: int = 16,
    weights: str = "bf16",
    target_modules: str | Sequence[str] = "all-linear",
) -> MemoryPlan:
    """Count what a training step of a PEFT model takes with
    :func:`~stablelora_kernels.accelerate_peft`, and say what fits a GPU.

    The model's own decoder layer and head run forward and backward on tensors without memory, with
    float32 adapters, flash attention and no dropout. A tenth of the GPU stays free for what is not
    counted. No weights are read, and no GPU is needed. While this runs, no other thread may train.

    A plan's checkpoints are non-reentrant, and on the first layers. After
    ``model.activation_checkpointing_enable({"use_reentrant": False}, offload=...)``, set
    ``layer.gradient_checkpointing = False`` on each of the other layers. Before transformers 5.23,
    the method is called ``gradient_checkpointing_enable``.

    Args:
        model: a transformers config, or a model that has one; of a PEFT model the config alone is
            read.
        gpu_gib: the GPU's memory in GiB, below 1,024.
        tokens: batch size times sequence length of one forward and backward. With it, the plan says
            which options such a step needs, and how few layers need checkpoints; without it, how
            many tokens fit with each set of options.
        r: the rank of LoRA.
        weights: ``"bf16"``, or ``"nf4"`` for decoder layers in bitsandbytes' 4 bits.
        target_modules: as PEFT's ``LoraConfig`` takes it; the head must stay frozen.

    Raises:
        ImportError: peft or transformers is not installed.
        RuntimeError: Triton is not installed, whose launches are planned.
        TypeError: ``gpu_gib`` is not a number, or ``tokens`` or ``r`` not an int.
        ValueError: ``model`` is no dense decoder of a supported type; ``gpu_gib`` is not between
            0 and 1,024; ``tokens`` or ``r`` is below 1; ``weights`` is unknown; or
            ``target_modules`` adapts the head, or nothing.
    """
    gpu_gib = check_float("gpu_gib", gpu_gib, low=0, high=1024, low_open=True)
    if tokens is not None:
        check_int("tokens", tokens, minimum=1)
    check_int("r", r, minimum=1)
    check_choice("weights", weights, list(WEIGHTS))
    config = _config_of(model)
    if TRITON_PROBLEM is not None:
        raise RuntimeError(f"memory_plan plans the launches of a GPU: {TRITON_PROBLEM}")
    decoder = Decoder(config, r, target_modules, weights, torch.bfloat16, _GPU)
    # Without LoRA in its MLPs, a model has none to fuse, and some rows become the same.
    rows = _ROWS if decoder.adapts_mlp() else dict.fromkeys(map(_without_mlp, _ROWS))
    start = decoder.start()
    room = USABLE * gpu_gib * GIB - start
    layers = decoder.layers

    def planned(options: _Options) -> PlannedStep:
        def moments_at(length: int, checkpoints: int = layers) -> list[float]:
            are_checkpointed = [options.checkpointing and i < checkpoints for i in range(layers)]
            return decoder.moments(length, options.fusions, are_checkpointed, options.offload)

        checkpoints = layers if options.checkpointing else 0
        if tokens is None:
            length = most_tokens(moments_at, room)
            while length and max(moments_at(length)) > room:
                length -= -(-length // 512)
        else:
            length = tokens
            fewer = range(checkpoints)
            checkpoints = next(
                (few for few in fewer if max(moments_at(length, few)) <= room), checkpoints
            )
        size = max(moments_at(length, checkpoints)) if length else 0.0
        host = checkpoints * decoder.input_bytes(length) if options.offload else 0
        return PlannedStep(
            options.fusions,
            checkpoints,
            options.offload,
            length,
            (start + size) / GIB,
            host / GIB,
            fits=length > 0 and size <= room,
        )

    steps = tuple(map(planned, rows))
    return MemoryPlan(config.model_type, layers, r, weights, gpu_gib, tokens, start / GIB, steps)


def _config_of(model: Any) -> Any:
    """The config of ``model``, which may be one itself."""
    config = getattr(model, "config", model)
    if getattr(config, "model_type", None) not in MODEL_TYPES:
        raise ValueError(
            f"model must be a dense decoder of transformers of type {', '.join(MODEL_TYPES)}, or its config, "
            f"got {type(config).__name__}: no other layer, no experts and no other modality is counted"
        )
    return config


class Decoder:
    """Counts a step of a model by one of its decoder layers and its head.

    ``weights``: those of the layers, a key of :data:`WEIGHTS`. ``dtype``: of other weights and of
    activations; adapters are float32. ``where``: as for :func:`~.step_memory.count`.
    """

    def __init__(
        self,
        config: Any,
        r: int,
        target_modules: str | Sequence[str],
        weights: str,
        dtype: torch.dtype,
        where: str,
    ) -> None:
        self._config = config
        self._lora = {"r": r, "target_modules": target_modules}
        self._weights = weights
        self._dtype = dtype
        self._where = where
        self._one_layer = cache(self._make_one_layer)
        self._layer = cache(self._count_layer)
        self._head = cache(self._count_head)
        self.layers: int = config.num_hidden_layers

    def start(self, an_adapter: float = ADAPTER) -> float:
        """The bytes before any token: of frozen weights, and ``an_adapter`` for each element of A and
        B.
        """
        model = self._one_layer(None)
        parameters = [*model.model.layers[0].parameters()]
        adapters = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters) - adapters
        rest = sum(p.numel() for p in model.parameters()) - adapters - frozen
        return self.layers * (an_adapter * adapters + WEIGHTS[self._weights] * frozen) + BF16 * rest

    def input_bytes(self, tokens: int) -> int:
        """A layer's input."""
        size: int = tokens * self._config.hidden_size * self._dtype.itemsize
        return size

    def moments(
        self,
        tokens: int,
        fusions: Sequence[str],
        are_checkpointed: Sequence[bool],
        offload: bool = False,
    ) -> list[float]:
        """Bytes at the backward of each layer and at the loss, beside :meth:`start`.

        ``are_checkpointed``: of each layer, the first one first. ``offload``: their inputs wait in
        the host's memory.
        """
        mlp = next((name for name in fusions if name != "fuse_loss"), None)
        layers = [self._layer(tokens, mlp, is_checkpointed) for is_checkpointed in are_checkpointed]
        if offload:
            # The first layer's input is also a leaf of the graph, by enable_input_require_grads().
            for i in range(1, self.layers):
                away = self.input_bytes(tokens) if are_checkpointed[i] else 0
                layers[i] = layers[i]._replace(kept=layers[i].kept - away)
        positions = positions_bytes(tokens, self._head_dim, self._dtype)
        *backwards, loss = moments(layers, self._head(tokens, "fuse_loss" in fusions))
        in_layers = positions + self._dequantized_bytes()
        return [*[size + in_layers for size in backwards], loss + positions]

    def adapts_mlp(self) -> bool:
        """Whether there is LoRA in the MLPs."""
        mlp = self._one_layer(None).model.layers[0].mlp
        return any(parameter.requires_grad for parameter in mlp.parameters())

    def _dequantized_bytes(self) -> int:
        """A layer's largest weight of NF4, which its product reads dequantized."""
        if self._weights != "nf4":
            return 0
        parameters = self._one_layer(None).model.layers[0].parameters()
        return self._dtype.itemsize * max(p.numel() for p in parameters)

    @property
    def _head_dim(self) -> int:
        config = self._config
        size: int | None = getattr(config, "head_dim", None)
        return size or config.hidden_size // config.num_attention_heads  # type: ignore[no-any-return]

    def _make_one_layer(self, mlp: str | None) -> Any:
        """The model with one of its layers, and LoRA in it."""
        transformers = import_extra("transformers", "peft", "memory_plan")
        peft = import_extra("peft", "peft", "memory_plan")
        register_attention()
        config = copy.deepcopy(self._config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        attention = "sdpa" if self._where == CPU else COUNTED_ATTENTION
        with torch.device(device_of(self._where)):
            base = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=attention
            )
            base.to(self._dtype)
            model = peft.get_peft_model(base, peft.LoraConfig(**self._lora))
        if type(base.lm_head) is not nn.Linear:
            raise ValueError(
                f"target_modules must leave the head frozen, got {self._lora['target_modules']!r}"
            )
        accelerate_peft(model, strict=True, **({} if mlp is None else {mlp: True}))
        return base.train()

    def _count_layer(self, tokens: int, mlp: str | None, checkpointing: bool) -> Counted:
        layer = self._one_layer(mlp).model.layers[0]
        with torch.device(device_of(self._where)):
            angles = torch.zeros(1, tokens, self._head_dim, dtype=self._dtype)
        owned = [*layer.parameters(), *layer.buffers(), angles]

        def run(x: Tensor) -> Tensor:
            y: Tensor = layer(x, position_embeddings=(angles, angles))
            return y

        return self._count(tokens, run, owned, checkpointing)

    def _count_head(self, tokens: int, fuse_loss: bool) -> Counted:
        """The last norm, the head and the loss."""
        model = self._one_layer(None)
        norm, head = model.model.norm, model.lm_head
        with torch.device(device_of(self._where)):
            labels = torch.zeros(1, tokens, dtype=torch.int64)
            # The last token has no next one.
            labels[:, -1] = -100

        def run(x: Tensor) -> Tensor:
            hidden = norm(x)
            loss: Tensor
            if fuse_loss:
                loss = functional.lora_linear_cross_entropy(
                    hidden, head.weight, labels, bias=None, lora_A=None, lora_B=None, scaling=1.0
                )
            else:
                loss = model.loss_function(head(hidden), labels, self._config.vocab_size)
            return loss

        return self._count(tokens, run, [*norm.parameters(), *head.parameters(), labels])

    def _count(
        self, tokens: int, run: Any, owned: Sequence[Tensor], checkpointing: bool = False
    ) -> Counted:
        shape = (1, tokens, self._config.hidden_size)
        return count(run, shape, self._dtype, self._where, owned, checkpointing)
