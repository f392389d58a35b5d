"""A small Llama; a layer, projections of one x and a gated MLP, with every rival's adapters over
the same frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.common.arms import (
    ACCELERATED,
    MLP_FUSED,
    OURS,
    PEFT,
    PLAIN,
    PROJECTIONS_FUSED,
    adapt,
    fill,
)
from benchmarks.common.memory import saved_for_backward
from benchmarks.common.models import linear_names, share
from benchmarks.common.optimizers import Unavailable, optional
from benchmarks.suite.rivals import Case, Parts
from stablelora_kernels.dispatch import backend, settings
from stablelora_kernels.ops import cpu_products
from stablelora_kernels.testing import EagerLoRA

AUTOCAST = "bf16-autocast"
# Of weights and x.
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, AUTOCAST: torch.float32}
FROZEN, FROZEN_MLP = "frozen nn.Linear", "frozen MLP"
EAGER, PEFT_COMPILED, LORALIB = "eager LoRA", "PEFT compiled", "loralib"
# The frozen layer by the library that our base product uses: shows what the branch alone costs us.
FROZEN_ONEDNN = "frozen, by oneDNN"
OURS_TORCH, OURS_TRITON, OURS_COMPILED = "ours, PyTorch", "ours, Triton", "ours compiled"
APART, TOGETHER, FUSED = "ours, one by one", OURS + PROJECTIONS_FUSED, OURS + MLP_FUSED
# The adapters of arms that differ from common.arms in name, backend or compilation alone.
ADAPTERS = {
    PEFT_COMPILED: PEFT,
    **dict.fromkeys((OURS_TORCH, OURS_TRITON, OURS_COMPILED, APART), OURS),
}
COMPILED = (PEFT_COMPILED, OURS_COMPILED)
BACKENDS = {OURS_TORCH: "torch", OURS_TRITON: "triton"}
# Names of two or three projections of one x.
PROJECTIONS = {2: ("gate_proj", "up_proj"), 3: ("q_proj", "k_proj", "v_proj")}


class Sizes(NamedTuple):
    layers: int
    width: int
    vocabulary: int = 2048

    def __str__(self) -> str:
        return f"{self.layers} layers width {self.width}"


def llama(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen Llama with random weights, the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(2, sizes.width // 64)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 8 // 3 // 16 * 16,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device, dtype).requires_grad_(False)


def linears(names: Sequence[str], k: int, ns: Sequence[int]) -> nn.ModuleDict:
    return nn.ModuleDict(
        {name: nn.Linear(k, n, bias=False) for name, n in zip(names, ns, strict=True)}
    )


def gated_mlp(k: int, inner: int) -> nn.ModuleDict:
    """A Llama's."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    return nn.ModuleDict(
        {
            "mlp": LlamaMLP(
                LlamaConfig(hidden_size=k, intermediate_size=inner, num_attention_heads=1)
            )
        }
    )


def adapted(
    frozen: nn.Module, arm: str, r: int, dropout: float, float32: bool = False
) -> nn.Module:
    """A copy of ``frozen`` over the same weights, with an arm's adapters on its linear layers.
    Adapters have equal numbers.
    """
    model = share(frozen)
    if arm in (FROZEN, FROZEN_MLP):
        return model
    make: Any = {EAGER: by_hand, LORALIB: by_loralib, FROZEN_ONEDNN: FrozenByOneDNN}.get(arm)
    adapt(
        model,
        OURS if make else ADAPTERS.get(arm, arm),
        linear_names(model),
        r=r,
        dropout=dropout,
        float32=float32,
    )
    fill(model)
    for name, layer in [*model.named_modules()] if make else ():
        if isinstance(layer, slk.LoRALinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(layer, dropout))
    return model.train()


def by_hand(ours: slk.LoRALinear, dropout: float) -> nn.Module:
    base = nn.Linear(ours.in_features, ours.out_features, bias=False, device="meta")
    base.weight = ours.weight
    return EagerLoRA(base, ours.lora_A.detach(), ours.lora_B.detach(), ours.scaling, dropout)


def by_loralib(ours: slk.LoRALinear, dropout: float) -> nn.Module:
    make, r = optional("loralib", "Linear"), ours.lora_A.shape[0]
    sizes = (ours.in_features, ours.out_features, r, ours.scaling * r, dropout)
    layer = make(*sizes, merge_weights=False, bias=False, device="meta")
    layer.weight, layer.lora_A, layer.lora_B = ours.weight, ours.lora_A, ours.lora_B
    return layer


class FrozenByOneDNN(nn.Module):
    """The frozen layer with our two products."""

    def __init__(self, ours: slk.LoRALinear, dropout: float) -> None:
        super().__init__()
        if not cpu_products.by_onednn(ours.weight.dtype, ours.weight.device):
            raise Unavailable(
                "our base product is PyTorch's own here: the same as the frozen nn.Linear's"
            )
        self.weight = ours.weight

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return cpu_products.wide_product(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return cpu_products.wide_product(grad, *ctx.saved_tensors), None


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 around float32 weights and adapters if ``dtype`` is ``AUTOCAST``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == AUTOCAST)


def compiled(module: Callable[..., Any]) -> Callable[..., Any]:
    """``module`` under torch.compile; raises :class:`Unavailable` if the compiler fails."""
    from torch._dynamo.exc import TorchDynamoException

    run = torch.compile(module, dynamic=False)

    def call(*args: Any) -> Any:
        try:
            return run(*args)
        except TorchDynamoException as error:
            raise Unavailable(
                f"torch.compile failed: {str(error).strip().splitlines()[0]}"
            ) from error

    return call


def choose_backend(name: str, device: torch.device) -> None:
    """Raises :class:`Unavailable` if ``name`` is Triton and there is no GPU."""
    if name == "triton" and device.type == "cpu":
        raise Unavailable(
            "Triton's kernels need a GPU; times in its interpreter say nothing about them"
        )
    with settings.settings(backend=name):
        try:
            backend.resolve_backend(device)
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
    slk.settings.backend = name


@dataclass(frozen=True)
class LayerCase(Case):
    """One linear layer. Adapters have the weight's dtype."""

    base = FROZEN
    rival = PEFT
    ours = (OURS_TRITON, OURS_TORCH, OURS_COMPILED, ACCELERATED)
    arms = (
        FROZEN, FROZEN_ONEDNN, EAGER, PEFT, PLAIN, PEFT_COMPILED, LORALIB, OURS_TORCH, OURS_TRITON, OURS_COMPILED, ACCELERATED,
    )  # fmt: skip
    phases: ClassVar = {
        "forward": ("forward",),
        "backward": ("backward",),
        "both": ("forward", "backward"),
    }
    float32: ClassVar = False

    rows: int
    k: int
    n: Any
    r: int
    dtype: str
    device: torch.device
    dropout: float = 0.0

    @property
    def name(self) -> str:
        return self._name("layer", self.n)

    def _name(self, kind: str, n: Any) -> str:
        axis = f"{self.axis}: " if self.axis else ""
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"{axis}{kind} {self.rows}x{self.k}x{n} r{self.r} {self.dtype}{dropout}"

    def facts(self) -> dict[str, Any]:
        sizes = {"width": self.k, "rank": self.r, "tokens": self.rows}
        return {"axis": self.axis, "size": sizes[self.axis]} if self.axis else {}

    def frozen(self) -> nn.ModuleDict:
        """Modules that are called with one x."""
        return linears(["linear"], self.k, [self.n])

    def open(self) -> None:
        # Dynamo gives up on code that it has compiled too often.
        torch._dynamo.reset()
        torch.manual_seed(0)
        stored = STORED[self.dtype]
        with torch.device(self.device):
            frozen = self.frozen().to(stored).requires_grad_(False)
            x = torch.randn(self.rows, self.k, dtype=stored, requires_grad=True)
        grads = [torch.randn_like(out) for out in self._forward([*frozen.children()], x.detach())]
        self.shared.update(backend=slk.settings.backend, frozen=frozen, x=x, grads=grads, models={})

    def close(self) -> None:
        slk.settings.backend = self.shared["backend"]
        super().close()

    def build(self, arm: str) -> Parts:
        use = BACKENDS.get(arm, "auto")
        choose_backend(use, self.device)
        if arm == FROZEN_ONEDNN and self.dtype == AUTOCAST:
            raise Unavailable("under autocast our base product is PyTorch's own")
        model = adapted(self.shared["frozen"], arm, self.r, self.dropout, self.float32)
        calls: list[Any] = [*model.children()]
        if arm in COMPILED:
            calls = [compiled(call) for call in calls]
        self.shared["models"][arm] = model
        x, grads, out = self.shared["x"], self.shared["grads"], []
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

        def prepare() -> None:
            slk.settings.backend = use
            out.clear()
            for tensor in leaves:
                tensor.grad = None

        return {
            "prepare": prepare,
            "forward": lambda: out.extend(self._forward(calls, x)),
            "backward": lambda: torch.autograd.backward(out, grads),
        }

    def _forward(self, calls: list[Any], x: Tensor) -> list[Tensor]:
        with autocast(self.device, self.dtype):
            return [call(x) for call in calls]

    def notes(self, arm: str) -> dict[str, Any]:
        """Bytes kept for backward, x included: in a model it is a norm's output, which the frozen
        layers alone would not keep.
        """
        if arm in COMPILED:
            return {}
        model, x = self.shared["models"][arm], self.shared["x"]
        with slk.settings(backend=BACKENDS.get(arm, "auto")):
            saved = saved_for_backward(
                lambda: self._forward([*model.children()], x), [*model.parameters()]
            )
        return {"saved_bytes": saved}


@dataclass(frozen=True)
class ProjectionsCase(LayerCase):
    """q, k and v, or gate and up; ``n`` has their widths."""

    ours = (TOGETHER, APART)
    arms = (FROZEN, PEFT, APART, TOGETHER)
    phases: ClassVar = {"both": ("forward", "backward")}

    @property
    def name(self) -> str:
        return self._name("projections", "+".join(map(str, self.n)))

    def frozen(self) -> nn.ModuleDict:
        return linears(PROJECTIONS[len(self.n)], self.k, self.n)


@dataclass(frozen=True)
class MLPCase(LayerCase):
    """A Llama's gated MLP, whose activation has width ``n``. Adapters are float32, PEFT's default
    and ours.
    """

    base = FROZEN_MLP
    ours = (FUSED, TOGETHER, APART, ACCELERATED + MLP_FUSED)
    arms = (FROZEN_MLP, PEFT, PLAIN, APART, TOGETHER, FUSED, ACCELERATED + MLP_FUSED)
    phases: ClassVar = {"both": ("forward", "backward")}
    mark = "mlp"
    float32: ClassVar = True

    @property
    def name(self) -> str:
        return self._name("mlp", self.n)

    def frozen(self) -> nn.ModuleDict:
        return gated_mlp(self.k, self.n)
