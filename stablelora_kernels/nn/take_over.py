"""One way to take a module's forward over: the instance gets a subclass of its class, with a mixin
in front whose forward decides.

PEFT's layers and wrappers of experts, gated MLPs and language models are taken over so. The module
stays where it is, with its parameters, hooks and name, and giving it back is one assignment. Class
and mixin say it all, so that copies, pickles and replicas are taken over too; what a mixin must know
of the instance is in ``__dict__``. A subclass is made once for each class, and prints as that class.

No other code replaces a forward, but for one place where this does not work:
``nn/stacks.py``, ``_cache_in_forward``, says why.
"""

from __future__ import annotations

import copyreg
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from torch import nn

# The attribute of a class that was made here.
_TAKEN = "_stablelora_taken"


class TakesOver:
    """A base class of the mixins. Calls that a mixin does not compute go on to ``super()``."""

    @classmethod
    def members_for(cls, original: type) -> dict[str, Any]:
        """What the subclass of ``original`` has besides what it inherits."""
        return {}

    def __reduce_ex__(self: Any, protocol: Any) -> str | tuple[Any, ...]:
        # Pickles name the original class, since this one has no name in a module.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        taken: _Taken | None = vars(type(self)).get(_TAKEN)
        if taken is not None and reduced[0] is getattr(copyreg, "__newobj__", None):
            return (_new_instance, (*taken,), *reduced[2:])
        return reduced  # type: ignore[no-any-return]


class _Taken(NamedTuple):
    """The two classes that a subclass is made of."""

    mixin: type[TakesOver]
    original: type


# It keeps no class alive that nothing else refers to.
_classes: WeakValueDictionary[_Taken, type] = WeakValueDictionary()


def take_over(module: nn.Module, mixin: type[TakesOver]) -> str | None:
    """Put ``mixin`` in front of a module's class, or return why the class cannot have it."""
    if not is_taken_over(module, mixin):
        try:
            module.__class__ = _class_of(mixin, type(module))
        except Exception as error:
            return f"its class {type(module).__name__} can't have a subclass ({error})"
    return None


def give_back(module: nn.Module, mixin: type[TakesOver]) -> None:
    """Undo :func:`take_over`, if it was."""
    if is_taken_over(module, mixin):
        module.__class__ = own_class(module)


def is_taken_over(module: object, mixin: type[TakesOver]) -> bool:
    """Whether ``mixin`` is in front of a module's own class."""
    taken: _Taken | None = vars(type(module)).get(_TAKEN)
    return taken is not None and taken.mixin is mixin


def own_class(module: object) -> type:
    """The class of a module, whether it is taken over or not."""
    kind = type(module)
    taken: _Taken | None = vars(kind).get(_TAKEN)
    return kind if taken is None else taken.original


def _class_of(mixin: type[TakesOver], original: type) -> type:
    """The subclass of ``original`` with ``mixin`` in front."""
    taken = _Taken(mixin, original)
    subclass = _classes.get(taken)
    if subclass is None:
        members = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            _TAKEN: taken,
            **mixin.members_for(original),
        }
        subclass = type(original)(original.__name__, (mixin, original), members)
        _classes[taken] = subclass
    return subclass


def _new_instance(mixin: type[TakesOver], original: type) -> object:
    """An empty instance that is taken over, for copies and pickles."""
    subclass: Any = _class_of(mixin, original)
    return subclass.__new__(subclass)
