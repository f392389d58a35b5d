"""``inspect``: list the pairs in an adapter's files, and whether each is stable by Stable-LoRA's condition."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.cli.arguments import load_files, positive
from stablelora_kernels.cli.output import (
    CommandError,
    print_json,
    print_pairs,
    print_table,
    printable,
    shorten,
    size,
    width,
    wrapped,
)
from stablelora_kernels.config import check_patterns, lookup_pattern
from stablelora_kernels.model.peft_format import PEFT_ALPHA, PREFIX, beyond_plain_lora
from stablelora_kernels.pairs import split_lora_name
from stablelora_kernels.utils.validation import check_float, counted, shown

HELP = "list every pair of an adapter: rank, norms, stability and size"
DESCRIPTION = """\
Lists the contents of an adapter in PEFT's format. For each pair of A [r, n] and B [m, r] it shows rank, sizes, dtype, scaling,
the Frobenius norms ‖A‖ and ‖B‖, bytes, and whether the pair is stable: ‖A‖/n ≤ ‖B‖/m, where Stable-LoRA stops shrinking A. It
also names other tensors (modules_to_save, biases, DoRA's magnitudes) and everything beyond plain LoRA.

It reads the file tensor by tensor, runs no code in it and refuses pickles (.bin).

Exit status: 0 no problems; 1 values that are not finite, halves of pairs, or ranks that contradict the config; 2 the adapter
can't be read."""

# Elements to convert to float64 at a time.
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class PairFigures:
    """One A [r, n] and B [m, r]. ``a_norm`` is ‖A‖/n, ``b_norm`` ‖B‖/m; ``scaling`` is None without a config."""

    name: str
    r: int
    in_features: int
    out_features: int
    dtype: str
    scaling: float | None
    a_frobenius: float
    b_frobenius: float
    a_norm: float
    b_norm: float
    # None if a norm is not finite.
    stable: bool | None
    bytes: int

    @property
    def ratio(self) -> float:
        """(‖A‖/n) / (‖B‖/m); the pair is unstable above 1. It is infinite if B is zero."""
        return self.a_norm / self.b_norm if self.b_norm else math.inf


@dataclass(frozen=True)
class Figures:
    """A tensor's figures, without the tensor: only one tensor is in memory at a time."""

    shape: list[int]
    dtype: str
    bytes: int
    norm: float
    # The number of elements that are infinite or NaN.
    non_finite: int


# The sort keys of --sort. Figures are sorted from the largest.
SORTS: dict[str, Callable[[PairFigures], Any]] = {
    "name": lambda p: _natural(p.name),
    "rank": lambda p: -p.r,
    "a": lambda p: -p.a_norm,
    "b": lambda p: -p.b_norm,
    "ratio": lambda p: -p.ratio,
    "scaling": lambda p: -(p.scaling or 0.0),
    "bytes": lambda p: -p.bytes,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a directory, an adapter_model.safetensors, or a hub id")
    order = f"{', '.join(SORTS)}: by name, or the largest first (a: ‖A‖/n, b: ‖B‖/m, ratio: a over b)"
    parser.add_argument("--sort", choices=SORTS, default="name", metavar="ORDER", help=order)
    parser.add_argument("--limit", type=positive, metavar="N", help="list so many pairs and other tensors")


def run(args: argparse.Namespace) -> int:
    adapter = load_files(args.adapter, _figures)
    weights, tensors, config = adapter.weights_file, adapter.tensors, adapter.config or {}
    try:
        pairs, others, problems = _sort_tensors(tensors, config)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{adapter.config_file}: {error}") from None
    non_finite = {key: figures.non_finite for key, figures in tensors.items() if figures.non_finite}
    are = {key: "is" if count == 1 else "are" for key, count in non_finite.items()}
    problems = [
        f"{key} holds {counted(count, 'value')} that {are[key]} not finite" for key, count in non_finite.items()
    ] + problems
    finite = [pair for pair in pairs if pair.stable is not None]
    totals = {
        "pairs": len(pairs),
        "stable": sum(pair.stable is True for pair in finite),
        "parameters": sum(math.prod(s.shape) for s in tensors.values()),
        "tensors": len(tensors),
        "bytes": sum(s.bytes for s in tensors.values()),
        "file_bytes": weights.stat().st_size,
    }
    # List pairs with NaN first: a NaN key would break the sort.
    finite.sort(key=SORTS[args.sort])
    pairs = [pair for pair in pairs if pair.stable is None] + finite
    report = {
        "weights": str(weights),
        "config": adapter.config,
        "beyond_plain_lora": beyond_plain_lora(config) + _beyond(others),
        "totals": totals,
        "problems": problems,
        "pairs": [asdict(pair) for pair in pairs[: args.limit]],
        "other_tensors": others[: args.limit],
    }
    if args.json:
        print_json(report)
    else:
        _print(report, pairs, others, args.limit)
    return 1 if problems else 0


def _figures(tensor: Tensor) -> Figures:
    squares, non_finite = 0.0, 0
    if tensor.is_floating_point():
        for part in tensor.reshape(-1).split(_ELEMENTS):
            values = part.double()
            squares += values.square().sum().item()
            non_finite += int((~torch.isfinite(values)).sum())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Figures(list(tensor.shape), dtype, tensor.numel() * tensor.element_size(), math.sqrt(squares), non_finite)


def _sort_tensors(
    tensors: Mapping[str, Figures], config: Mapping[str, Any]
) -> tuple[list[PairFigures], list[dict[str, Any]], list[str]]:
    """The pairs, the other tensors and the problems."""
    if config.get("peft_type") == "LORA":
        config = {**config, **{key: check_patterns(key, config.get(key)) for key in ("rank_pattern", "alpha_pattern")}}
    halves: dict[str, dict[str, Figures]] = {}
    others: list[dict[str, Any]] = []
    problems = []
    for key, s in tensors.items():
        split = split_lora_name(key.removeprefix(PREFIX))
        if split is not None and len(s.shape) == 2:
            halves.setdefault(split[0], {})[split[1]] = s
        else:
            about = {"shape": s.shape, "dtype": s.dtype, "bytes": s.bytes, "kind": _kind(key, s.shape)}
            others.append({"key": key.removeprefix(PREFIX), **about})
    pairs = []
    for name, half in halves.items():
        if len(half) == 1:
            (role,) = half
            problems.append(f"{name} has lora_{role} {half[role].shape}, but no lora_{'B' if role == 'A' else 'A'}")
            continue
        a, b = half["A"], half["B"]
        if a.shape[0] != b.shape[1]:
            problems.append(f"{name} must have A [r, n] and B [m, r] of one r, got A {a.shape} and B {b.shape}")
            continue
        pairs.append(_pair(name, a, b, _scaling(name, a.shape[0], config, problems)))
    return pairs, sorted(others, key=lambda other: _natural(other["key"])), problems


def _pair(name: str, a: Figures, b: Figures, scaling: float | None) -> PairFigures:
    (r, n), m = a.shape, b.shape[0]
    a_norm, b_norm = a.norm / max(n, 1), b.norm / max(m, 1)
    stable = a_norm <= b_norm if math.isfinite(a_norm) and math.isfinite(b_norm) else None
    dtype = "/".join(dict.fromkeys((a.dtype, b.dtype)))
    return PairFigures(name, r, n, m, dtype, scaling, a.norm, b.norm, a_norm, b_norm, stable, a.bytes + b.bytes)


def _scaling(name: str, r: int, config: Mapping[str, Any], problems: list[str]) -> float | None:
    """The scaling that PEFT uses with this config. A rank that differs from the file's is a problem."""
    if config.get("peft_type") != "LORA" or r < 1:
        return None
    rank = lookup_pattern(config["rank_pattern"], (name,), config.get("r", r))
    if rank != r:
        problems.append(f"{name} has rank {r}, but its config says {shown(rank)}")
    alpha = lookup_pattern(config["alpha_pattern"], (name,), config.get("lora_alpha", PEFT_ALPHA))
    return check_float(f"lora_alpha of {name}", alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def _kind(key: str, shape: list[int]) -> str:
    if "lora_magnitude_vector" in key:
        return "DoRA's magnitudes"
    if "lora_embedding_" in key:
        return "LoRA on an embedding"
    if ".lora_A." in key or ".lora_B." in key:
        return "LoRA's own bias" if key.endswith(".bias") else f"LoRA of {len(shape)} dimensions (a convolution)"
    if ".lora_" in key:
        return "a variant of LoRA"
    return "a bias" if key.endswith("bias") else "saved whole"


def _beyond(others: Iterable[Mapping[str, Any]]) -> list[str]:
    """Kinds of tensors that plain LoRA does not have."""
    return list(dict.fromkeys(other["kind"] for other in others if other["kind"] not in ("a bias", "saved whole")))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that orders numbers in a name by value: layers.2 before layers.10."""
    # By their count and the digits themselves: int() takes no more than 4,300.
    return [(len(part) if i % 2 else 0, part) for i, part in enumerate(re.split(r"0*([0-9]+)", name))]


def _print(
    report: Mapping[str, Any], pairs: list[PairFigures], others: list[dict[str, Any]], limit: int | None
) -> None:
    totals, config = report["totals"], report["config"]
    print(shorten(printable(report["weights"]), width()))
    about = {
        "file": f"{size(totals['file_bytes'])}, {counted(totals['tensors'], 'tensor')}, "
        f"{counted(totals['parameters'], 'parameter')}"
    }
    if config is None:
        about["config"] = "none with the file, so scalings are not known"
    else:
        about["config"] = _describe(config)
        about["base model"] = str(config.get("base_model_name_or_path") or "not given")
    if report["beyond_plain_lora"]:
        about["beyond plain LoRA"] = "; ".join(report["beyond_plain_lora"])
    # Print values that all pairs share only once.
    same = {name: text for name, text in _COLUMNS.items() if len({text(pair) for pair in pairs}) == 1}
    same_text = "".join(f", {name} {text(pairs[0])}" for name, text in same.items())
    about["pairs"] = f"{totals['pairs']}{same_text}" if pairs else "none"
    about["stable"] = f"{totals['stable']} of {totals['pairs']} (‖A‖/n ≤ ‖B‖/m, for A [r, n] and B [m, r])"
    print_pairs(about)
    if pairs:
        print()
        varying = {name: text for name, text in _COLUMNS.items() if name not in same} | _FIGURES
        prefix = _common_prefix([pair.name for pair in pairs])
        rows = [[pair.name[len(prefix) :], *(text(pair) for text in varying.values())] for pair in pairs[:limit]]
        print_table((f"{prefix}…" if prefix else "pair", *varying), rows, left=(0, len(varying)))
        _print_rest(len(pairs), limit, "pairs")
    if others:
        print("\nOther tensors")
        rows = [[o["key"], str(o["shape"]), o["dtype"], size(o["bytes"]), o["kind"]] for o in others[:limit]]
        print_table(("key", "shape", "dtype", "bytes", "what it is"), rows, left=(0, 4))
        _print_rest(len(others), limit, "others")
    if report["problems"]:
        print("\nProblems")
        for problem in report["problems"]:
            print(wrapped(f"  {problem}", 4))


_COLUMNS: dict[str, Callable[[PairFigures], str]] = {
    "r": lambda p: str(p.r),
    "scaling": lambda p: "?" if p.scaling is None else f"{p.scaling:.4g}",
    "dtype": lambda p: p.dtype,
}
_FIGURES: dict[str, Callable[[PairFigures], str]] = {
    "n": lambda p: str(p.in_features),
    "m": lambda p: str(p.out_features),
    "‖A‖": lambda p: f"{p.a_frobenius:.3g}",
    "‖B‖": lambda p: f"{p.b_frobenius:.3g}",
    "‖A‖/n": lambda p: f"{p.a_norm:.3g}",
    "‖B‖/m": lambda p: f"{p.b_norm:.3g}",
    "bytes": lambda p: size(p.bytes),
    "": lambda p: "NOT FINITE" if p.stable is None else "stable" if p.stable else "unstable",
}


def _common_prefix(names: list[str]) -> str:
    """The modules that all names begin with, with a trailing dot. Printed once, they leave room for the rest."""
    if len(names) < 2:
        return ""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in takewhile(lambda level: len({*level}) == 1, levels))


def _print_rest(count: int, limit: int | None, noun: str) -> None:
    if limit is not None and count > limit:
        print(f"  … and {count - limit} {noun} more")


def _describe(config: Mapping[str, Any]) -> str:
    """The config's fields about A and B, in one line."""
    if config.get("peft_type") != "LORA":
        return f"peft_type {config.get('peft_type')!r}, not LoRA"
    targets = config.get("target_modules")
    text = f"r {shown(config.get('r'))}, alpha {shown(config.get('lora_alpha', PEFT_ALPHA))}"
    text += ", rank-stabilized" if config.get("use_rslora") else ""
    text += f", on {', '.join(map(str, targets)) if isinstance(targets, list) else targets}"
    text += f", bias {config.get('bias')}" if config.get("bias") not in (None, "none") else ""
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern"):
        text += f", {key} {config[key]}" if config.get(key) else ""
    return text
