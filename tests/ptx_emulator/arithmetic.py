"""From arithmetic instructions to Python expressions over arrays of all threads of a CTA.

A register is an array of unsigned integers, or of bools for a predicate, in the list ``R`` of the
CTA ``c``. Expressions see the operands as the instruction's type says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.ptx_emulator import numerics
from tests.ptx_emulator.memory import WORDS
from tests.ptx_emulator.parse import SIZES, Instruction, Program

# What generated code sees.
NAMES: dict[str, Any] = {"np": np, "nx": numerics} | {
    f"{letter}{8 * size}": np.dtype(f"{kind}{size}").type
    for letter, kind in (("U", "u"), ("I", "i"), ("F", "f"))
    for size in (1, 2, 4, 8)
    if (letter, size) != ("F", 1)
}
# Expressions of operands of one type that give a result of that type; "head.letter" is for the
# types of that letter.
PLAIN = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "mad": "({0} * {1} + {2})", "neg": "(-{0})",
    "abs": "np.abs({0})", "min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})", "min.f": "np.fmin({0}, {1})",
    "max.f": "np.fmax({0}, {1})", "div": "nx.divide({0}, {1})", "div.f": "({0} / {1})", "rem": "nx.remainder({0}, {1})",
    "fma.f": "nx.fma({0}, {1}, {2})", "rcp.f": "(F32(1) / {0})", "sqrt.f": "np.sqrt({0})", "rsqrt.f": "(F32(1) / np.sqrt({0}))",
    "ex2.f": "np.exp2({0})", "lg2.f": "np.log2({0})", "tanh.f": "np.tanh({0})", "copysign.f": "np.copysign({1}, {0})",
    "and": "({0} & {1})", "or": "({0} | {1})", "xor": "({0} ^ {1})", "not": "(~{0})", "bfe": "nx.bit_field({0}, {1}, {2})",
    "prmt": "nx.permute_bytes({0}, {1}, {2})", "selp": "np.where({2}, {0}, {1})", "cvta": "{0}",
}  # fmt: skip
# Words between an operation and its type that change nothing, or that are seen to.
MODIFIERS = {"rn", "ftz", "lo", "hi", "wide", "approx", "full", "NaN", "to", "global", "param"}
COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
NARROW = ("bf16", "f16")
ROUNDINGS = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}
Result = list[tuple[int, str]]


class Arithmetic:
    """Expressions for one program's instructions. ``space`` is what they see: names, and constants
    as arrays.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.registers = program, program.registers
        self.space: dict[str, Any] = dict(NAMES)
        self._constants: dict[Any, str] = {}

    def expressions(self, ins: Instruction) -> Result | None:
        """The places of the instruction's results with their expressions; None if it is no
        arithmetic.
        """
        head = ins.mods[0]
        special: Callable[[Instruction], Result] | None = getattr(self, f"_{head}", None)
        if special is not None:
            return special(ins)
        letter = "f" if ins.kind in NARROW else ins.kind[0]
        template = PLAIN.get(f"{head}.{letter}", PLAIN.get(head))
        return None if template is None else self._plain(ins, template)

    # Operands and results.

    def place(self, name: str) -> int:
        return self.registers[name][0]

    def value(self, arg: str, kind: str) -> str:
        """An operand as an array of ``kind``."""
        if kind == "pred" and arg[0] == "!":
            return f"(~{self.value(arg[1:], kind)})"
        if kind == "pred":
            return (
                f"R[{self.place(arg)}]"
                if arg in self.registers
                else f"({self.value(arg, 'u8')} != 0)"
            )
        view = f".view({_dtype(kind)})"
        if arg in self.registers:
            place, declared = self.registers[arg]
            narrow = "" if SIZES[declared] == SIZES[kind] else f".astype(U{8 * SIZES[kind]})"
            return f"R[{place}]{narrow}{view}"
        if arg[0] == "%":
            return f"c.program.special(c, {arg!r}).astype(U{8 * SIZES[kind]}){view}"
        bits = self.number(arg) % (1 << (8 * SIZES[kind]))
        if (bits, kind) not in self._constants:
            name = self._constants[bits, kind] = f"K{len(self._constants)}"
            array = np.full(self.program.threads, bits, WORDS[SIZES[kind]])
            self.space[name] = array.view(NAMES[_dtype(kind)])
        return self._constants[bits, kind]

    def reader(self, arg: str, kind: str) -> Callable[[Any], Any]:
        """A function of the CTA that gives an operand."""
        return eval(f"lambda c: (lambda R: {self.value(arg, kind)})(c.R)", self.space)

    def number(self, text: str) -> int:
        """An immediate operand's bits, or a symbol's address."""
        symbol = re.fullmatch(r"([A-Za-z_$][\w$]*)\s*(?:\+\s*(\d+))?", text)
        if symbol:
            return self.program.symbols[symbol[1]] + int(symbol[2] or 0)
        return int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text.rstrip("U"), 0)

    def address(self, operand: str) -> Callable[[Any], Any]:
        """A function of the CTA that gives the addresses of an operand in brackets."""
        base, offset = re.fullmatch(r"\[\s*([%\w$.@]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()  # type: ignore[union-attr]
        number = int(offset or "0", 0)
        if base in self.registers:
            place = self.place(base)
            return lambda c: c.R[place].astype(np.int64) + number
        constant = np.full(self.program.threads, self.number(base) + number, np.int64)
        return lambda c: constant

    def _result(self, name: str, expression: str, kind: str) -> Result:
        """``expression``, of ``kind``, for the register ``name``. A wider register takes the sign
        of a signed result.
        """
        if name == "_":
            return []
        place, declared = self.registers[name]
        if kind == "pred":
            return [(place, expression)]
        have, want = SIZES[kind], SIZES[declared]
        if want != have and kind[0] == "s":
            return [(place, f"{expression}.astype(I{8 * want}).view(U{8 * want})")]
        narrow = "" if want == have else f".astype(U{8 * want})"
        return [(place, f"{expression}.view(U{8 * have}){narrow}")]

    # Instructions.

    def _plain(self, ins: Instruction, template: str) -> Result:
        kind, args = ins.kind, ins.args[1:]
        if kind in NARROW and "f32" in ins.mods:
            return self._mixed(ins, template)
        if kind == "f32x2":
            return self._pair(ins, template)
        if kind in ("bf16", "f16", "f64", "bf16x2", "f16x2") or not {*ins.mods[1:-1]} <= MODIFIERS:
            raise ins.unknown()
        if "hi" in ins.mods:
            template = "nx.mulhi({0}, {1})"
        if ins.mods[0] in ("min", "max") and "NaN" in ins.mods:
            template = PLAIN[ins.mods[0]]
        if ins.mods[0] in ("min", "max") and len(args) == 3:
            # Blackwell's, of three operands.
            template = template.format(template, "{2}")
        if len(args) != len({*re.findall(r"\{\d\}", template)}):
            raise ins.unknown()
        kinds = {"bfe": [kind, "u32", "u32"], "selp": [kind, kind, "pred"]}.get(
            ins.mods[0], [kind] * 3
        )
        values = [self.value(arg, of) for arg, of in zip(args, kinds, strict=False)]
        if "wide" in ins.mods:
            kind = kind[0] + str(16 * SIZES[kind])
            values = [f"{each}.astype({_dtype(kind)})" for each in values[:2]] + [
                self.value(arg, kind) for arg in args[2:]
            ]
        if "ftz" in ins.mods:
            template = "nx.ftz(" + template + ")"
            values = [f"nx.ftz({value})" for value in values]
        return self._result(ins.args[0], template.format(*values), kind)

    def _mixed(self, ins: Instruction, template: str) -> Result:
        """Blackwell's sums of float32 and narrower numbers: all operands but the last are narrow."""
        if not {*ins.mods[1:-2]} <= {"rn"}:
            raise ins.unknown()
        *narrow, wide = ins.args[1:]
        values = [f"nx.{ins.kind}_to_f32({self.value(arg, 'b16')})" for arg in narrow]
        return self._result(ins.args[0], template.format(*values, self.value(wide, "f32")), "f32")

    def _pair(self, ins: Instruction, template: str) -> Result:
        """Blackwell's arithmetic on two float32 in 64 bits. In a view of float32 they are
        neighbors.
        """
        if not {*ins.mods[1:-1]} <= {"rn"}:
            raise ins.unknown()
        values = [f"{self.value(arg, 'b64')}.view(F32)" for arg in ins.args[1:]]
        return self._result(ins.args[0], f"{template.format(*values)}.view(U64)", "b64")

    def _shl(self, ins: Instruction) -> Result:
        value, left = self.value(ins.args[1], ins.kind), ins.mods[0] == "shl"
        if ins.args[2].isdigit() and int(ins.args[2]) < 8 * SIZES[ins.kind]:
            expression = f"({value} {'<<' if left else '>>'} {self.value(ins.args[2], ins.kind)})"
        else:
            expression = f"nx.shift({value}, {self.value(ins.args[2], 'u32')}, {left})"
        return self._result(ins.args[0], expression, ins.kind)

    _shr = _shl

    def _setp(self, ins: Instruction) -> Result:
        compare, kind = ins.mods[1], ins.kind
        a, b = (self.value(arg, kind) for arg in ins.args[1:3])
        is_float = kind[0] == "f"
        unordered = f"(np.isnan({a}) | np.isnan({b}))"
        if compare in ("num", "nan"):
            test = unordered if compare == "nan" else f"(~{unordered})"
        elif is_float and compare[-1] == "u" and compare[:-1] in COMPARISONS:
            test = f"(({a} {COMPARISONS[compare[:-1]]} {b}) | {unordered})"
        else:
            test = f"({a} {COMPARISONS[compare]} {b})"
            if is_float and compare == "ne":
                test = f"({test} & ~{unordered})"
        if "ftz" in ins.mods or {"and", "or", "xor"} & set(ins.mods) or "|" in ins.args[0]:
            raise ins.unknown()
        return self._result(ins.args[0], test, "pred")

    def _mov(self, ins: Instruction) -> Result:
        """Also between one wide register and several narrow ones."""
        to, source, bits = ins.args[0], ins.args[1], 8 * SIZES[ins.kind]
        if isinstance(to, list):
            part, whole = bits // len(to), self.value(source, f"b{bits}")
            return [
                pair
                for i, name in enumerate(to)
                for pair in self._result(
                    name, f"({whole} >> U{bits}({part * i})).astype(U{part})", f"b{part}"
                )
            ]
        if isinstance(source, list):
            part = bits // len(source)
            parts = [
                f"({self.value(each, f'b{part}')}.astype(U{bits}) << U{bits}({part * i}))"
                for i, each in enumerate(source)
            ]
            return self._result(to, f"({' | '.join(parts)})", f"b{bits}")
        return self._result(to, self.value(source, ins.kind), ins.kind)

    def _cvt(self, ins: Instruction) -> Result:
        to, source = ins.mods[-2:]
        rounding = next(
            (word for word in ins.mods[1:-2] if word in ("rn", "rz", "rna", *ROUNDINGS)), "rn"
        )
        if set(ins.mods[1:-2]) - {rounding, "ftz"}:
            raise ins.unknown()
        values = [
            self.value(arg, {"bf16": "b16", "f16": "b16", "e4m3x2": "b16"}.get(source, source))
            for arg in ins.args[1:]
        ]
        if to in ("bf16x2", "f16x2"):
            if source == "e4m3x2":
                parts = [f"nx.E4M3[({values[0]} >> U16({at})) & U16(255)]" for at in (8, 0)]
            elif source == "f32":
                parts = values
            else:
                raise ins.unknown()
            upper, lower = (
                f"nx.f32_to_{to[:-2]}({part}, {rounding!r}).astype(U32)" for part in parts
            )
            return self._result(ins.args[0], f"(({upper} << U32(16)) | {lower})", "b32")
        value = f"nx.{source}_to_f32({values[0]})" if source in ("bf16", "f16") else values[0]
        if "ftz" in ins.mods:
            value = f"nx.ftz({value})"
        if to == "tf32":
            return self._result(
                ins.args[0], f"nx.tf32({self.value(ins.args[1], 'b32')}, {rounding!r})", "b32"
            )
        if to in ("bf16", "f16"):
            return self._result(
                ins.args[0], f"nx.f32_to_{to}({value}.astype(F32), {rounding!r})", "b16"
            )
        if to == "f32":
            whole = f"np.{ROUNDINGS[rounding]}({value})" if rounding in ROUNDINGS else value
            return self._result(ins.args[0], f"{whole}.astype(F32)", "f32")
        if source in ("f32", "bf16", "f16"):
            return self._result(ins.args[0], f"nx.to_integer({value}, {to!r}, {rounding!r})", to)
        if to not in numerics.INTEGERS or source not in numerics.INTEGERS:
            raise ins.unknown()
        return self._result(ins.args[0], f"{value}.astype({_dtype(to)})", to)


def _dtype(kind: str) -> str:
    """The name of a type's dtype: unsigned for bits."""
    return f"{ {'s': 'I', 'f': 'F'}.get(kind[0], 'U') }{8 * SIZES[kind]}"


def whole(
    act: Callable[[Instruction, Any, Any], None],
) -> Callable[[Arithmetic, Instruction], Callable[[Any, Any], None]]:
    """The builder of an instruction without registers: ``act`` takes it, the CTA and the mask."""
    return lambda words, ins: partial(act, ins)
