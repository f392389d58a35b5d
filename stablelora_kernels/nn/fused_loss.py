"""``fuse_loss``: train a causal language model on its loss without its logits.

:class:`FusedLoss` takes the forward of a model over (``nn/take_over.py``). In training, a forward
with labels runs the model's own code on a :class:`_Call` in the model's place. There the head keeps
its input instead of multiplying, and the loss function computes the loss of it
(:func:`~stablelora_kernels.functional.lora_linear_cross_entropy`). All else is the model's: the
shift of labels, ``num_items_in_batch``, a router's loss, the output's class. The output's
``logits`` are None, as Liger-Kernel's are. In evaluation, and without labels, the model's own
forward runs. Each call reads the head again; if the op does not fit it, the model computes logits.

With ``token_losses=True`` the output's loss is that of each token, as ``losses_of_rows`` takes it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.functional import lora_linear_cross_entropy
from stablelora_kernels.nn.loss_form import LossForm, loss_form_of
from stablelora_kernels.nn.operands import Operand, is_adapted, read_layer
from stablelora_kernels.nn.take_over import TakesOver, give_back, take_over
from stablelora_kernels.utils.modules import is_hooked
from stablelora_kernels.utils.refusal import Refusal

# The key of a model's __dict__ that holds its State.
ATTRIBUTE = "_stablelora_loss"
# The key of a model's __dict__ that is there once it has warned of a forward without labels.
_HAS_WARNED = "_stablelora_warned_of_labels"
WITHOUT_LABELS = (
    "fuse_loss=True has no effect on this forward: it got no labels= in training, so it computes all logits. "
    "A Trainer takes the labels away for label_smoothing_factor and compute_loss_func, and those of DPO and GRPO "
    "give none"
)


class LanguageModel(NamedTuple):
    """One language model that ``fuse_loss`` met."""

    # Its first dotted name; "" is the whole model.
    name: str
    # Why it goes on computing its loss by itself, or None if it trains without logits.
    reason: str | None

    def __str__(self) -> str:
        words = repr(self.name) if self.name else "the model"
        if self.reason is None:
            return f"fuse_loss: {words} computes its loss without logits; in training with labels its output's logits are None"
        return f"fuse_loss: {words} keeps its own loss: {self.reason}"


class State(NamedTuple):
    """How a fused model computes."""

    form: LossForm
    # The name of a layer with an adapter; "" if none is known. Once PEFT's merge_and_unload or
    # unload has replaced it, the model is a plain one again.
    adapted: str
    # Whether a forward with labels withholds logits in evaluation too, if it is not told.
    skips_logits_in_evaluation: bool = False


class _Withheld(NamedTuple):
    """A head with what it was called with."""

    hidden: Tensor
    operand: Operand


class _Call:
    """A language model in one forward without logits. It lives as long as the call, so threads and
    replicas do not meet in it.
    """

    def __init__(self, model: Any, state: State, token_losses: bool) -> None:
        self._model = model
        self._state = state
        self._wants_token_losses = token_losses
        self.withheld: _Withheld | None = None
        # [rows, tokens], where they are asked for.
        self.token_losses: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # A bound method in __dict__ would be a cycle: hidden states would live until Python finds it.
        return self._withhold if name == self._state.form.head else getattr(self._model, name)

    def _withhold(self, hidden: Tensor) -> Tensor:
        """What the model gets for its logits."""
        head = self._model._modules[self._state.form.head]
        operand = _read(head, hidden)
        if isinstance(operand, Refusal):
            logits: Tensor = head(hidden)
            return logits
        self.withheld = _Withheld(hidden, operand)
        # The model's scale or soft cap of nothing costs nothing.
        return hidden.new_empty(*hidden.shape[:-1], 0)

    def loss_function(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The loss; the arguments are those of transformers' ``ForCausalLMLoss``."""
        if self.withheld is None:
            loss: Tensor = self._model.loss_function(logits, labels, *args, **kwargs)
            return loss
        return self._loss(self.withheld, labels, *args, **kwargs)

    def _loss(
        self,
        withheld: _Withheld,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        hidden, operand = withheld
        weights = operand.weights
        transform = self._state.form.transform(self._model)
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = lora_linear_cross_entropy(
            hidden,
            weights.weight,  # type: ignore[arg-type]
            shift_labels.reshape(hidden.shape[:-1]).to(hidden.device),
            bias=weights.bias,
            lora_A=weights.lora_A,
            lora_B=weights.lora_B,
            scaling=weights.scaling,
            ignore_index=ignore_index,
            reduction="none" if self._wants_token_losses else reduction,
            softcap=transform.softcap,
            logit_scale=transform.logit_scale,
            dropout_p=operand.dropout_p or 0.0,
        )
        if self._wants_token_losses:
            self.token_losses = loss
            # A router's loss is added to it, which belongs to no token.
            return loss.sum()
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


def _read(head: nn.Module, hidden: Tensor | None) -> Operand | Refusal:
    """The head as the op reads it, or why its own forward must compute the logits. Without
    ``hidden``: whatever it is.
    """
    if _has_any_global_hook() or torch.jit.is_tracing():
        return Refusal("is watched")
    if is_hooked(head):
        return Refusal("has hooks, or its forward was replaced")
    if hidden is not None and type(hidden) is not Tensor:
        return Refusal(f"is called with a {type(hidden).__name__}")
    operand = read_layer(head, hidden)
    if isinstance(operand, Refusal):
        return operand
    weight = operand.weights.weight
    if not isinstance(weight, Tensor):
        return Refusal("has a quantized weight")
    if operand.added:
        return Refusal(f"has {1 + len(operand.added)} active adapters")
    if weight.requires_grad:
        return Refusal("has a weight that trains")
    return operand


class FusedLoss(TakesOver):
    """A mixin in front of a model's class."""

    @classmethod
    def members_for(cls, original: Any) -> dict[str, Any]:
        own_forward: Callable[..., Any] = original.forward

        # The signature tells the Trainer which columns and arguments the model takes.
        @functools.wraps(own_forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _forward(self, own_forward, args, kwargs)

        return {"forward": forward}


def _forward(
    model: Any,
    own_forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The model's own forward; in training with labels, without logits.

    ``skip_logits`` says for one call whether to do without them, as in Liger-Kernel's forwards;
    transformers' Trainer passes it. ``token_losses`` asks for the loss of each token, if it does
    without them.
    """
    skip_logits = kwargs.pop("skip_logits", None)
    token_losses = kwargs.pop("token_losses", False)
    state: State | None = model.__dict__.get(ATTRIBUTE)
    if state is not None and not _has_adapter(model, state):
        unfuse_losses([model])
        state = None
    if state is None:
        return own_forward(model, *args, **kwargs)
    if skip_logits is None:
        skip_logits = model.training or state.skips_logits_in_evaluation
        if kwargs.get("labels") is None:
            _warn_without_labels(model)
            skip_logits = False
    elif skip_logits and kwargs.get("labels") is None:
        raise ValueError(f"labels must be given with skip_logits={skip_logits}, got None")
    if not skip_logits or not _has_known_loss(model):
        return own_forward(model, *args, **kwargs)
    wants_tuple = kwargs.get("return_dict") is False
    if wants_tuple:
        # A tuple does not tell which of its members are the logits.
        kwargs["return_dict"] = True
    call = _Call(model, state, token_losses)
    output = own_forward(call, *args, **kwargs)
    if call.withheld is not None:
        fields = {name: value for name, value in output.items() if name != "logits"}
        if call.token_losses is not None:
            fields["loss"] = call.token_losses
        output = type(output)(**fields)
    return output.to_tuple() if wants_tuple else output


def _has_adapter(model: nn.Module, state: State) -> bool:
    """Whether the layer that had an adapter still has one."""
    layer: nn.Module | None = model
    for name in state.adapted.split(".") if state.adapted else ():
        layer = layer._modules.get(name) if layer is not None else None
    return layer is model or is_adapted(layer)


def _warn_without_labels(model: nn.Module) -> None:
    """Warn, once a model, of a training forward without labels."""
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    if not model.__dict__.get(_HAS_WARNED):
        model.__dict__[_HAS_WARNED] = True
        warnings.warn(WITHOUT_LABELS, UserWarning, stacklevel=2)


def fuse_losses(model: nn.Module) -> tuple[LanguageModel, ...]:
    """Fuse the losses of the language models in ``model``."""
    models = []
    for name, module in list(model.named_modules()):
        if not _may_be_language_model(module):
            continue
        unfuse_losses([module])
        form = loss_form_of(type(module))  # type: ignore[arg-type]
        reason = form.reason if isinstance(form, Refusal) else _fuse(module, form)
        models.append(LanguageModel(name, reason))
    return tuple(models)


def has_fused_loss(model: nn.Module) -> bool:
    """Whether a language model in ``model`` may train without logits, so that its forward takes
    ``token_losses``.
    """
    return any(ATTRIBUTE in module.__dict__ for module in model.modules())


def notes_on_losses(models: Iterable[LanguageModel]) -> list[str]:
    """The report's notes on what :func:`fuse_losses` met."""
    notes = [str(model) for model in models]
    return notes or ["fuse_loss: there is no language model with a head and a loss"]


def _may_be_language_model(module: nn.Module) -> bool:
    """Whether it has what transformers' models with a head and a loss have."""
    kind = type(module)
    if not isinstance(getattr(kind, "loss_function", None), property):
        return False
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return isinstance(head, nn.Module)


def _fuse(module: Any, form: LossForm) -> str | None:
    """Take the forward of ``module`` over, or return why it keeps its own loss."""
    if "forward" in module.__dict__:
        return f"its forward was replaced by {_source(module.__dict__['forward'])}"
    head = module._modules.get(form.head)
    if head is None:
        return f"it has no module {form.head!r}"
    operand = _read(head, None)
    if isinstance(operand, Refusal):
        return f"{form.head!r} {operand.reason}"
    if not _has_known_loss(module):
        return "its loss_function is not transformers' ForCausalLMLoss"
    layers = module.named_modules()
    adapted = next((name for name, layer in layers if is_adapted(layer)), "")
    reason = take_over(module, FusedLoss)
    if reason is not None:
        return reason
    module.__dict__[ATTRIBUTE] = State(form, adapted)
    return None


def _has_known_loss(model: Any) -> bool:
    """Whether a model's loss is the one that :class:`_Call` computes."""
    return getattr(model.loss_function, "__name__", "") == "ForCausalLMLoss"


def _source(function: Any) -> str:
    """The module whose code a bound, partial or plain function runs, as far as it is known."""
    while inner := getattr(function, "__func__", None) or getattr(function, "func", None):
        function = inner
    name: str = getattr(function, "__globals__", {}).get("__name__", type(function).__name__)
    return name


def skip_logits_in_evaluation(modules: Iterable[nn.Module]) -> None:
    """Let fused models do without logits in evaluation too, if labels are there and nobody reads
    logits.
    """
    for module in modules:
        state: State | None = module.__dict__.get(ATTRIBUTE)
        if state is not None:
            module.__dict__[ATTRIBUTE] = state._replace(skips_logits_in_evaluation=True)


def unfuse_losses(modules: Iterable[nn.Module]) -> None:
    """Give fused models their class back."""
    for module in modules:
        module.__dict__.pop(ATTRIBUTE, None)
        module.__dict__.pop(_HAS_WARNED, None)
        give_back(module, FusedLoss)
