"""Triton's interpreter, without work that it does again and again, and for nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from typing import Any


def speed_up_interpreter() -> None:
    """Save half of our tests' time under the interpreter. What kernels compute stays the same, but
    for subnormal bfloat16.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # Another Triton's.
    # It computes whether each sum of integers overflows, and then asserts it only with debug.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    _patch_language_once_a_launch(interpreter)
    _find_builtins_once(interpreter)
    _keep_numpy_types(interpreter)
    _keep_block_types(interpreter.tl)
    _shift_bfloat16(interpreter)


def _patch_language_once_a_launch(interpreter: Any) -> None:
    """Triton's interpreter puts its own functions into ``triton.language`` as a kernel starts, and
    takes them out as it ends.

    It does so anew, in a millisecond, for every call of a function *within* a kernel, where all of
    it is in place already.
    """
    tl, original = interpreter.tl, interpreter._patch_lang
    # What is patched at present: of which modules a function sees.
    seen: set[frozenset[str]] = set()
    known: dict[Any, frozenset[str]] = {}

    def patch(fn: Any) -> Any:
        if (languages := known.get(fn)) is None:
            found = (
                value
                for value in fn.__globals__.values()
                if inspect.ismodule(value) and value in (tl, tl.core)
            )
            languages = known[fn] = frozenset(value.__name__ for value in found)
        if languages in seen:
            # That of a call within a kernel, whose scope nobody restores.
            return interpreter._LangPatchScope()
        scope, outermost = original(fn), not seen
        seen.add(languages)
        if outermost:
            restore = scope.restore

            def restore_all() -> None:
                seen.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch


def _find_builtins_once(interpreter: Any) -> None:
    """It looks through all of ``triton.language`` for them, at every launch."""
    known: dict[Any, list[tuple[str, Any]]] = {}

    def patch(package: Any, builder: Any, scope: Any) -> None:
        if (members := known.get(package)) is None:
            members = known[package] = [
                (name, member)
                for name, member in inspect.getmembers(package)
                if interpreter.tl.core.is_builtin(member)
            ]
        for name, member in members:
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


def _keep_numpy_types(interpreter: Any) -> None:
    """It fills a table of all types for each question about one."""
    original, known = interpreter._get_np_dtype, {}

    def get(dtype: Any) -> Any:
        name = getattr(dtype, "element_ty", dtype).name if dtype.is_block() else dtype.name
        if (found := known.get(name)) is None:
            found = known[name] = original(dtype)
        return found

    interpreter._get_np_dtype = get


def _keep_block_types(tl: Any) -> None:
    """Each result of each operation makes its type and shape anew, with names and checks: the same
    few, thousands of times.
    """
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    known: dict[Any, dict[str, Any]] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([getattr(size, "value", size) for size in shape])
        key = element_ty.name, getattr(element_ty, "address_space", ""), sizes
        if (found := known.get(key)) is None:
            make_type(self, element_ty, shape)
            found = known[key] = vars(self) | {"_of_tensors": {}}
        vars(self).update(found)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        kept = vars(type).setdefault("_of_tensors", {})
        if not kept:
            make_tensor(self, handle, type)
            kept.update(
                {
                    name: value
                    for name, value in vars(self).items()
                    if name not in ("handle", "type")
                }
            )
        vars(self).update(kept, handle=handle, type=type)

    tl.block_type.__init__ = init_type
    tl.tensor.__init__ = init_tensor


def _shift_bfloat16(interpreter: Any) -> None:
    """A bfloat16 is the upper half of a float32. It takes each apart and puts it together again,
    and loses subnormal ones.
    """
    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source.name == "bf16" and target.name == "fp32":
            return data.astype("uint32") << 16
        if source.name == "fp32" and target.name == "bf16" and rounding_mode is None:
            return (data.view("uint32") >> 16).astype("uint16")
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = convert
