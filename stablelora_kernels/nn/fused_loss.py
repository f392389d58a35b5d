"""``fuse_loss``: compute the loss of a causal language model without its logits.

A fused model gets a subclass of its class. In a forward with labels, the head hands out what it was
called with instead of multiplying, and the model's loss function computes the loss of that
(:func:`~stablelora_kernels.functional.lora_linear_cross_entropy`). All else is the model's own
forward: the shift of labels, ``num_items_in_batch``, a router's loss, the output's class. Each call
reads the head again; where the op does not fit it, the head and the loss are the model's own.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.functional import lora_linear_cross_entropy
from stablelora_kernels.nn.loss_form import LossForm, Transform, loss_form_of
from stablelora_kernels.nn.operands import LayerKind, Operand
from stablelora_kernels.utils.modules import is_hooked

# The keys of a model's __dict__ that hold its State and, during a forward with labels, its Pending.
ATTRIBUTE = "_stablelora_loss"
PENDING = "_stablelora_pending_loss"
# The class attribute that holds the class before.
_ORIGINAL = "_stablelora_before_loss"
REFUSAL = (
    "fuse_loss=True computes the loss without logits, so the output of a forward with labels has none. "
    "What reads them (compute_metrics, preprocess_logits_for_metrics, prediction_loss_only=False, a label "
    "smoother) needs a model without it: call accelerate_peft(model) again, without fuse_loss"
)


class State(NamedTuple):
    """How a fused model computes."""

    form: LossForm
    kind: LayerKind
    # transformers' ForCausalLMLoss.
    own_loss: Callable[..., Tensor]


class Withheld(NamedTuple):
    """A head with what it was called with."""

    hidden: Tensor
    operand: Operand


class Pending:
    """A forward with labels: what the head withholds from it, once it is called."""

    def __init__(self) -> None:
        self.withheld: Withheld | None = None


class WithheldLogits(Tensor):
    """Stands for the logits that were not computed. Anything but its facts raises RuntimeError."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Wrappers of a model ask about the tensors of its output: dtype, device, requires_grad.
        if getattr(func, "__name__", "") != "__get__":
            raise RuntimeError(REFUSAL)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        return "WithheldLogits()"


class _WithholdingHead:
    """Takes the place of a model's head in a forward with labels."""

    def __init__(self, head: nn.Module, kind: LayerKind, pending: Pending) -> None:
        self._head = head
        self._kind = kind
        self._pending = pending

    def __call__(self, hidden: Tensor) -> Tensor:
        operand = _read(self._head, self._kind, hidden)
        if isinstance(operand, str):
            y: Tensor = self._head(hidden)
            return y
        self._pending.withheld = Withheld(hidden, operand)
        # What the model does to logits costs nothing.
        return hidden.new_empty(*hidden.shape[:-1], 0)


def _read(head: nn.Module, kind: LayerKind, hidden: Tensor | None) -> Operand | str:
    """The head as the op reads it, or why its own forward must compute the logits. Without
    ``hidden``: whatever it is.
    """
    if _has_any_global_hook() or torch.jit.is_tracing():
        return "is watched"
    if is_hooked(head):
        return "has hooks, or its forward was replaced"
    if hidden is not None and type(hidden) is not Tensor:
        return f"is called with a {type(hidden).__name__}"
    operand = kind.read(head, hidden)
    if isinstance(operand, str):
        return operand
    weight = operand.weights.weight
    if not isinstance(weight, Tensor):
        return "has a quantized weight"
    if operand.added:
        return f"has {1 + len(operand.added)} active adapters"
    if weight.requires_grad:
        return "has a weight that trains"
    return operand


def _loss(
    withheld: Withheld,
    transform: Transform,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: object,
) -> Tensor:
    """transformers' ``ForCausalLMLoss`` of a head that is not multiplied. The arguments from
    ``logits`` on are that function's.
    """
    hidden, operand = withheld
    weights = operand.weights
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = lora_linear_cross_entropy(
        hidden,
        weights.weight,  # type: ignore[arg-type]
        shift_labels.reshape(hidden.shape[:-1]).to(hidden.device),
        bias=weights.bias,
        lora_A=weights.lora_A,
        lora_B=weights.lora_B,
        scaling=weights.scaling,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        softcap=transform.softcap,
        logit_scale=transform.logit_scale,
        dropout_p=operand.dropout_p or 0.0,
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


class FusedLoss:
    """A mixin in front of a model's class."""

    @property
    def loss_function(self: Any) -> Callable[..., Tensor]:
        state: State = self.__dict__[ATTRIBUTE]
        pending: Pending | None = self.__dict__.get(PENDING)
        if pending is None or pending.withheld is None:
            return state.own_loss
        return functools.partial(_loss, pending.withheld, state.form.transform(self))

    @loss_function.setter
    def loss_function(self: Any, value: Callable[..., Tensor]) -> None:
        # It may read logits.
        unfuse_losses([self])
        self.loss_function = value

    def __reduce_ex__(self: Any, protocol: Any) -> str | tuple[Any, ...]:
        # Pickles name the original class, since this one has no name in a module.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        if is_fused(self) and reduced[0] is getattr(copyreg, "__newobj__", None):
            original = getattr(type(self), _ORIGINAL)
            arguments = (original, self.__dict__[ATTRIBUTE].form.head)
            return (_new_instance, arguments, *reduced[2:])
        return reduced  # type: ignore[no-any-return]


def _forward(
    model: Any, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The model's own forward; with labels, without logits."""
    state: State | None = model.__dict__.get(ATTRIBUTE)
    if state is None or kwargs.get("labels") is None:
        return own_forward(model, *args, **kwargs)
    pending = Pending()
    setattr(model, PENDING, pending)
    try:
        output = own_forward(model, *args, **kwargs)
    finally:
        setattr(model, PENDING, None)
    if pending.withheld is None:
        return output
    return _without_logits(output)


def _without_logits(output: Any) -> Any:
    """A model's output with :class:`WithheldLogits` in the place of its logits."""
    withheld = torch.empty(0).as_subclass(WithheldLogits)
    if isinstance(output, tuple):
        # The loss comes first.
        return (output[0], withheld, *output[2:])
    output.logits = withheld
    return output


def fuse_losses(model: nn.Module, kind: LayerKind) -> list[str]:
    """Fuse the losses of the language models in ``model``, and return a note on each."""
    notes = []
    for name, module in list(model.named_modules()):
        if not _may_be_language_model(module):
            continue
        unfuse_losses([module])
        form = loss_form_of(type(module))  # type: ignore[arg-type]
        reason = form if isinstance(form, str) else _fuse(module, form, kind)
        words = repr(name) if name else "the model"
        if reason is None:
            notes.append(
                f"fuse_loss: {words} computes its loss without logits; the output of a forward with labels has none"
            )
        else:
            notes.append(f"fuse_loss: {words} computes its loss from logits: {reason}")
    return notes or ["fuse_loss: there is no language model with a head and a loss"]


def _may_be_language_model(module: nn.Module) -> bool:
    """Whether it has what transformers' models with a head and a loss have."""
    kind = type(module)
    if not isinstance(getattr(kind, "loss_function", None), property):
        return False
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return isinstance(head, nn.Module)


def _fuse(module: Any, form: LossForm, kind: LayerKind) -> str | None:
    """Change the class of ``module``, or return why its logits are needed."""
    if "forward" in module.__dict__:
        return "its forward was replaced (as accelerate's hooks do)"
    head = module._modules.get(form.head)
    if head is None:
        return f"it has no module {form.head!r}"
    operand = _read(head, kind, None)
    if isinstance(operand, str):
        return f"{form.head!r} {operand}"
    own_loss = module.loss_function
    # _loss repeats no other one.
    if getattr(own_loss, "__name__", "") != "ForCausalLMLoss":
        return "its loss_function is not transformers' ForCausalLMLoss"
    try:
        module.__class__ = _fused_class(type(module), form.head)
    except Exception as error:
        return f"its class {type(module).__name__} can't have a subclass ({error})"
    module.__dict__[ATTRIBUTE] = State(form, kind, own_loss)
    return None


def unfuse_losses(modules: Iterable[nn.Module]) -> None:
    """Give fused models their class back."""
    for module in modules:
        module.__dict__.pop(ATTRIBUTE, None)
        module.__dict__.pop(PENDING, None)
        if is_fused(module):
            module.__class__ = getattr(type(module), _ORIGINAL)


def is_fused(module: nn.Module) -> bool:
    """Whether the class of ``module`` is that of a model with a fused loss."""
    return _ORIGINAL in vars(type(module))


# It keeps no class alive that nothing else refers to.
_classes: WeakValueDictionary[tuple[type, str], type] = WeakValueDictionary()


def _fused_class(original: type, head: str) -> type:
    """The subclass of ``original``, of its name, whose attribute ``head`` may withhold."""
    fused = _classes.get((original, head))
    if fused is None:
        own_forward: Callable[..., Any] = original.forward  # type: ignore[attr-defined]

        # The signature tells the Trainer which columns and arguments the model takes.
        @functools.wraps(own_forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _forward(self, own_forward, args, kwargs)

        members = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "forward": forward,
            head: property(lambda self: _head(self, head)),
            _ORIGINAL: original,
        }
        fused = type(original)(original.__name__, (FusedLoss, original), members)
        _classes[original, head] = fused
    return fused


def _head(model: nn.Module, name: str) -> Any:
    """A fused model's head, or during a forward with labels what takes its place."""
    head = model._modules[name]
    pending: Pending | None = model.__dict__.get(PENDING)
    if pending is None or head is None:
        return head
    state: State = model.__dict__[ATTRIBUTE]
    return _WithholdingHead(head, state.kind, pending)


def _new_instance(original: type, head: str) -> object:
    """An empty fused instance, for copies and pickles."""
    fused: Any = _fused_class(original, head)
    return fused.__new__(fused)
