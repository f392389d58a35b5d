"""``LoRAConfig``: which layers get a LoRA branch, and of which kind; and names of modules, matched
as PEFT matches them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, NoReturn

from stablelora_kernels.utils.validation import check_bool, check_choice, check_float, check_int

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")
# The modules that PEFT trains whole for a task, because transformers initializes them at random.
HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# How the keys of rank_pattern and alpha_pattern are matched: as regular expressions for a dotted
# name or its end after a dot.
PATTERN = r"(.*\.)?({})$"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The settings of :func:`~stablelora_kernels.apply_lora`. Fields have PEFT's names and match
    module names as PEFT's do.

    Args:
        r: rank, at least 1.
        lora_alpha: the branch is scaled by ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with
            ``use_rslora``. It is 16 unless given; PEFT's default is 8.
        lora_dropout: probability of dropping an element of the branch's input, in [0, 1).
        target_modules: required, since PEFT's defaults per architecture are not carried over. One
            of:

            - a list of names; each matches a module's whole dotted name or its end after a dot;
            - "all-linear": every ``nn.Linear`` but the output head;
            - any other string: a regular expression for the whole dotted name;
            - None or an empty list, if there are ``target_parameters``.
        target_parameters: names of stacks of experts, as "mlp.experts.gate_up_proj": each matches a
            parameter's whole dotted name or its end after a dot.
        exclude_modules: names or a regular expression, as above, of modules to leave unchanged.
        use_rslora: rank-stabilized scaling.
        init_lora_weights: True, False or "gaussian", see :class:`~stablelora_kernels.LoRALinear`.
        rank_pattern: ranks of some layers. A key is a regular expression for the whole dotted name
            or its end after a dot; the first key that matches counts.
        alpha_pattern: alphas of some layers, likewise.
        bias: which biases are also trained and saved: "none", "all" of the model's, or "lora_only",
            those of layers with a branch.
        modules_to_save: ends of names of modules that are trained whole and saved with the adapter.
        fan_in_fan_out: whether weights are stored as [in, out], as in transformers' ``Conv1D``. As
            in PEFT the layer's type decides; the report names layers whose type contradicts this
            field.
        task_type: PEFT's name of the task, such as "CAUSAL_LM", which ``save_adapter`` writes for
            PEFT's auto classes. None stands for what the model's class says. As in PEFT, "SEQ_CLS"
            and "TOKEN_CLS" add "classifier" and "score" to ``modules_to_save``, and "QUESTION_ANS"
            adds "qa_outputs": such a head is new, so it is trained whole.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has the wrong type.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None

    def __post_init__(self) -> None:
        check_int("r", self.r, minimum=1)
        check_float("lora_alpha", self.lora_alpha)
        check_float("lora_dropout", self.lora_dropout, low=0.0, high=1.0)
        check_bool("use_rslora", self.use_rslora)
        check_bool("fan_in_fan_out", self.fan_in_fan_out)
        check_init(self.init_lora_weights)
        check_choice("bias", self.bias, BIASES)
        if self.target_modules is None and not self.target_parameters:
            raise ValueError(
                "target_modules must be a list of names, 'all-linear' or a regular expression, got None"
            )
        for name in ("modules_to_save", "target_parameters"):
            if isinstance(value := getattr(self, name), str):
                raise TypeError(f"{name} must be a list of names or None, got the string {value!r}")
        # Copy, so that a list that its owner changes later stays as it was checked.
        set_field = object.__setattr__
        set_field(self, "target_modules", _check_names("target_modules", self.target_modules))
        set_field(
            self,
            "target_parameters",
            _check_names("target_parameters", self.target_parameters) or None,
        )
        set_field(
            self, "exclude_modules", _check_names("exclude_modules", self.exclude_modules) or None
        )
        set_field(
            self, "modules_to_save", _check_names("modules_to_save", self.modules_to_save) or None
        )
        if not self.target_modules and not self.target_parameters:
            raise ValueError(
                f"target_modules must name at least one module, got {self.target_modules!r}"
            )
        set_field(self, "rank_pattern", check_patterns("rank_pattern", self.rank_pattern))
        set_field(self, "alpha_pattern", check_patterns("alpha_pattern", self.alpha_pattern))
        for key, rank in self.rank_pattern.items():
            check_int(f"rank_pattern[{key!r}]", rank, minimum=1)
        for key, alpha in self.alpha_pattern.items():
            check_float(f"alpha_pattern[{key!r}]", alpha)
        if self.task_type is not None and not isinstance(self.task_type, str):
            raise TypeError(f"task_type must be a string or None, got {self.task_type!r}")

    def __hash__(self) -> int:
        values = (getattr(self, item.name) for item in fields(self))
        return hash(tuple(map(_hashable, values)))

    @property
    def base_model_name_or_path(self) -> NoReturn:
        # PEFT's get_peft_model reads it first.
        raise AttributeError(
            "a LoRAConfig is for slk.apply_lora; PEFT's get_peft_model takes a peft.LoraConfig"
        )

    @property
    def all_linear(self) -> bool:
        """Whether ``target_modules`` is "all-linear", upper or lower case."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def targets(self, name: str) -> bool:
        """Whether ``target_modules`` matches a module's dotted name. "all-linear" matches every
        name.
        """
        return self.all_linear or self._matches("target_modules", name)

    def targets_parameter(self, name: str) -> bool:
        """Whether ``target_parameters`` matches a parameter's dotted name."""
        return self._matches("target_parameters", name)

    def reason_to_exclude(self, name: str) -> str | None:
        """Why a module that ``target_modules`` matches is left unchanged, or None."""
        if self.exclude_modules and self._matches("exclude_modules", name):
            return "exclude_modules matches it"
        return self.reason_to_train_whole(name)

    def reason_to_train_whole(self, name: str) -> str | None:
        """The reason if a module gets no branch because it is trained whole, or None."""
        parents = name.split(".")
        if any(self.saves(".".join(parents[: i + 1])) for i in range(len(parents))):
            return "it is trained whole (modules_to_save)"
        return None

    def _matches(self, field_name: str, name: str) -> bool:
        if isinstance(names := getattr(self, field_name), str):
            return re.fullmatch(names, name) is not None
        return not self._names[field_name].isdisjoint(ends_of(name))

    @cached_property
    def _names(self) -> dict[str, set[str]]:
        return {
            key: set(getattr(self, key) or ())
            for key in ("target_modules", "target_parameters", "exclude_modules")
        }

    def saves(self, name: str) -> bool:
        """Whether ``modules_to_save`` names this module. As in PEFT, "head" also names "lm_head":
        no dot is needed.
        """
        return any(name.endswith(end) for end in self.modules_to_save or ())

    @property
    def heads_of_task(self) -> tuple[str, ...]:
        """The ends of names of modules that ``task_type`` trains whole."""
        return HEADS_OF_TASKS.get(self.task_type or "", ())

    def rank_of(self, name: str) -> int:
        """The rank of the layer of this dotted name: from ``rank_pattern``, else ``r``."""
        return lookup_pattern(self.rank_pattern, (name,), self.r)

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer of this dotted name: from ``alpha_pattern``, else ``lora_alpha``."""
        return lookup_pattern(self.alpha_pattern, (name,), self.lora_alpha)


def check_init(init_lora_weights: Any) -> None:
    """Raise ValueError unless it is True, False or "gaussian"."""
    # isinstance, since 0 and 1 equal False and True.
    if not isinstance(init_lora_weights, bool) and init_lora_weights != "gaussian":
        raise ValueError(
            f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}"
        )


def ends_of(name: str) -> list[str]:
    """A dotted name and what follows each of its dots: the names of ``target_modules`` that match
    it.
    """
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def unmatched_names(names: object, matched: Iterable[str], what: str = "target_modules") -> str:
    """A message on those of ``target_modules``, or ``what``, that match none of the dotted names
    ``matched``, or an empty one.

    A regular expression has no parts to look at.
    """
    if not isinstance(names, (list, tuple, set, frozenset)):
        return ""
    missed = sorted(set(names).difference(*map(ends_of, matched)))
    verb = "matches" if len(missed) == 1 else "match"
    return f"{what} {', '.join(map(repr, missed))} {verb} nothing" if missed else ""


def check_regex(name: str, value: str) -> str:
    """``value``, which must be a regular expression."""
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} must be a regular expression, got {value!r}: {error}") from None
    return value


def check_patterns(name: str, value: Any) -> dict[str, Any]:
    """A copy of the dict ``value``, whose keys must be regular expressions; None gives an empty
    one.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a dict of name patterns, got {value!r}")
    try:
        compile_patterns(tuple(value))
    except (re.error, OverflowError, RecursionError) as error:
        for key in value:
            check_regex(name, key)
        # As it is matched: a flag like (?i) may only begin a whole expression.
        pattern = getattr(error, "pattern", None)
        raise ValueError(
            f"{name} must be a regular expression that may follow other text, got {pattern!r}: {error}"
        ) from None
    return dict(value)


@lru_cache(8)
def compile_patterns(
    keys: tuple[str, ...],
) -> tuple[re.Pattern[str], list[tuple[str, re.Pattern[str]]]]:
    """An expression for names that any of ``keys`` may match, and one for each key. Python itself
    keeps 512 of them.
    """
    each = []
    for key in keys:
        # By itself as well: ")(" is none.
        re.compile(key)
        each.append((key, re.compile(PATTERN.format(key))))
    # A key's groups have other numbers among other keys, and may refer to them.
    return re.compile("" if "(" in "".join(keys) else PATTERN.format("|".join(keys))), each


def lookup_pattern(patterns: Mapping[str, Any], names: Collection[str], default: Any) -> Any:
    """The value of the first key of ``rank_pattern`` or the like that matches one of ``names``, or
    ``default``.
    """
    any_key, each = compile_patterns(tuple(patterns))
    if any(map(any_key.match, names)):
        return next(
            (patterns[key] for key, pattern in each if any(map(pattern.match, names))), default
        )
    return default


def unmatched_patterns(patterns: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The keys of ``rank_pattern`` or the like that match none of ``names``."""
    return [
        key
        for key, pattern in compile_patterns(tuple(patterns))[1]
        if not any(map(pattern.match, names))
    ]


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return frozenset(value.items())
    return tuple(value) if isinstance(value, list) else value


def _check_names(name: str, value: Any) -> Any:
    """A regular expression unchanged; any collection of names as a list."""
    if value is None:
        return None
    if isinstance(value, str):
        return check_regex(name, value)
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(
        isinstance(item, str) and item for item in value
    ):
        raise TypeError(f"{name} must be a string or a list of names, got {value!r}")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
