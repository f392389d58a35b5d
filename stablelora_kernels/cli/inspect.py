"""Lists the contents of an adapter in PEFT's format. For each pair of A [r, n] and B [m, r] it
shows rank, sizes, dtype, scaling, the Frobenius norms ‖A‖ and ‖B‖, bytes, and whether the pair is
stable: ‖A‖/n ≤ ‖B‖/m, where Stable-LoRA stops shrinking A. Whether a pair has latched is in the
optimizer's state alone, not in an adapter. It also names other tensors (modules_to_save, biases,
DoRA's magnitudes) and everything beyond plain LoRA.

It reads the file tensor by tensor, runs no code in it and refuses pickles (.bin).

Exit status: 0 no problems; 1 values that are not finite, halves of pairs, or ranks that contradict
the config; 2 the adapter can't be read."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.cli.common import (
    Report,
    failing,
    load_files,
    positive,
    printable,
    shorten,
    size,
    width,
)
from stablelora_kernels.config import check_patterns, ends_of, lookup_pattern
from stablelora_kernels.model.peft_format import PEFT_ALPHA, PREFIX, beyond_plain_lora
from stablelora_kernels.pairs import is_stable, other_half, split_lora_name
from stablelora_kernels.utils.validation import check_float, counted, shown

HELP = "list every pair of an adapter: rank, norms, stability and size"
# Elements to convert to float64 at a time.
_ELEMENTS = 1 << 22
# A pair's figures, or another tensor's, by their names in JSON.
Row = dict[str, Any]


class Figures(NamedTuple):
    """A tensor's figures, without the tensor: only one tensor is in memory at a time."""

    shape: list[int]
    dtype: str
    bytes: int
    norm: float
    # The number of elements that are infinite or NaN.
    non_finite: int


# The sort keys of --sort. Figures are sorted from the largest. A B of zeros is infinitely far from
# stable.
SORTS: dict[str, Callable[[Row], Any]] = {
    "name": lambda p: _natural(p["name"]),
    "rank": lambda p: -p["r"],
    "a": lambda p: -p["a_norm"],
    "b": lambda p: -p["b_norm"],
    "ratio": lambda p: -p["a_norm"] / p["b_norm"] if p["b_norm"] else -math.inf,
    "scaling": lambda p: -(p["scaling"] or 0.0),
    "bytes": lambda p: -p["bytes"],
}
# The columns of the table of pairs: their titles and figures. The first three are printed once if
# all pairs share the value.
COLUMNS = {
    "r": "r", "scaling": "scaling", "dtype": "dtype", "n": "in_features", "m": "out_features", "‖A‖": "a_frobenius",
    "‖B‖": "b_frobenius", "‖A‖/n": "a_norm", "‖B‖/m": "b_norm", "bytes": "bytes", "": "stable",
}  # fmt: skip
PLAIN = ("a bias", "saved whole")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="a directory, an adapter_model.safetensors, or a hub id"
    )
    order = (
        f"{', '.join(SORTS)}: by name, or the largest first (a: ‖A‖/n, b: ‖B‖/m, ratio: a over b)"
    )
    parser.add_argument("--sort", choices=SORTS, default="name", metavar="ORDER", help=order)
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="list so many pairs and other tensors"
    )


def run(args: argparse.Namespace, report: Report) -> int:
    """List the adapter's pairs and other tensors, and what is wrong with them."""
    adapter = load_files(args.adapter, _figures)
    tensors, config = adapter.tensors, adapter.config or {}
    problems = [
        f"{key} holds {counted(s.non_finite, 'value')} that {'is' if s.non_finite == 1 else 'are'} not finite"
        for key, s in tensors.items()
        if s.non_finite
    ]
    with failing(TypeError, ValueError, before=f"{adapter.config_file}: "):
        pairs, others = _sort_tensors(tensors, config, problems)
    order = SORTS[args.sort]
    # List pairs with NaN first: a NaN key would break the sort.
    pairs.sort(key=lambda pair: (0, 0) if pair["stable"] is None else (1, order(pair)))
    kinds = dict.fromkeys(other["kind"] for other in others if other["kind"] not in PLAIN)
    totals = {
        "pairs": len(pairs),
        "stable": sum(pair["stable"] is True for pair in pairs),
        "parameters": sum(math.prod(s.shape) for s in tensors.values()),
        "tensors": len(tensors),
        "bytes": sum(s.bytes for s in tensors.values()),
        "file_bytes": adapter.weights_file.stat().st_size,
    }
    report.data = {
        "weights": str(adapter.weights_file),
        "config": adapter.config,
        "beyond_plain_lora": [*beyond_plain_lora(config), *kinds],
        "totals": totals,
        "problems": problems,
        "pairs": pairs[: args.limit],
        "other_tensors": others[: args.limit],
    }
    _print(report, pairs, others, args.limit)
    return 1 if problems else 0


def _print(report: Report, pairs: list[Row], others: list[Row], limit: int | None) -> None:
    totals, config = report.data["totals"], report.data["config"]
    report.text(shorten(printable(report.data["weights"]), width()))
    counts = f"{counted(totals['tensors'], 'tensor')}, {counted(totals['parameters'], 'parameter')}"
    about = {"file": f"{size(totals['file_bytes'])}, {counts}"}
    if config is None:
        about["config"] = "none with the file, so scalings are not known"
    else:
        about["config"] = _describe(config)
        about["base model"] = str(config.get("base_model_name_or_path") or "not given")
    if beyond := report.data["beyond_plain_lora"]:
        about["beyond plain LoRA"] = "; ".join(beyond)
    cells = [
        {title: _cell(figure, pair[figure]) for title, figure in COLUMNS.items()} for pair in pairs
    ]
    shared = [
        title for title in ("r", "scaling", "dtype") if len({row[title] for row in cells}) == 1
    ]
    about["pairs"] = ", ".join(
        [str(len(pairs) or "none"), *(f"{title} {cells[0][title]}" for title in shared)]
    )
    about["stable"] = (
        f"{totals['stable']} of {totals['pairs']} (‖A‖/n ≤ ‖B‖/m, for A [r, n] and B [m, r])"
    )
    report.pairs(about)
    if pairs:
        # The modules that all names begin with are printed once, which leaves room for the rest.
        levels = (
            zip(*(pair["name"].split(".")[:-1] for pair in pairs), strict=False)
            if len(pairs) > 1
            else ()
        )
        prefix = "".join(
            f"{level[0]}." for level in takewhile(lambda level: len({*level}) == 1, levels)
        )
        columns = [title for title in COLUMNS if title not in shared]
        names = (pair["name"][len(prefix) :] for pair in pairs)
        rows = [
            [name, *(row[title] for title in columns)]
            for name, row in zip(names, cells, strict=True)
        ]
        titles = (f"{prefix}…" if prefix else "pair", *columns)
        report.text("")
        report.table(titles, rows, left=(0, len(columns)), limit=limit, noun="pairs")
    if others:
        report.text("", "Other tensors")
        rows = [
            [o["key"], str(o["shape"]), o["dtype"], size(o["bytes"]), o["kind"]] for o in others
        ]
        titles = ("key", "shape", "dtype", "bytes", "what it is")
        report.table(titles, rows, left=(0, 4), limit=limit, noun="others")
    if report.data["problems"]:
        report.text(
            "", "Problems", *(f"  {problem}" for problem in report.data["problems"]), hang=4
        )


def _figures(tensor: Tensor) -> Figures:
    """The norm of a tensor, its bytes, and how many of its values are not finite."""
    squares, non_finite = 0.0, 0
    if tensor.is_floating_point():
        for part in tensor.reshape(-1).split(_ELEMENTS):
            values = part.double()
            squares += values.square().sum().item()
            non_finite += int((~torch.isfinite(values)).sum())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Figures(
        list(tensor.shape),
        dtype,
        tensor.numel() * tensor.element_size(),
        math.sqrt(squares),
        non_finite,
    )


def _sort_tensors(
    tensors: Mapping[str, Figures], config: Mapping[str, Any], problems: list[str]
) -> tuple[list[Row], list[Row]]:
    """The pairs and the other tensors. What is wrong with them goes to ``problems``."""
    if config.get("peft_type") == "LORA":
        config = {
            **config,
            **{
                key: check_patterns(key, config.get(key))
                for key in ("rank_pattern", "alpha_pattern")
            },
        }
    halves: dict[str, dict[str, Figures]] = {}
    others: list[Row] = []
    for key, s in tensors.items():
        split = split_lora_name(key.removeprefix(PREFIX))
        if split is not None and len(s.shape) == 2:
            halves.setdefault(split[0], {})[split[1]] = s
        else:
            about = {
                "shape": s.shape,
                "dtype": s.dtype,
                "bytes": s.bytes,
                "kind": _kind(key, s.shape),
            }
            others.append({"key": key.removeprefix(PREFIX), **about})
    pairs = []
    for name, half in halves.items():
        if len(half) == 1:
            (role,) = half
            problems.append(
                f"{name} has lora_{role} {half[role].shape}, but no lora_{other_half(role)}"
            )
            continue
        a, b = half["A"], half["B"]
        if a.shape[0] != b.shape[1]:
            problems.append(
                f"{name} must have A [r, n] and B [m, r] of one r, got A {a.shape} and B {b.shape}"
            )
            continue
        pairs.append(_pair(name, a, b, *_rank_and_scaling(name, a.shape[0], config, problems)))
    return pairs, sorted(others, key=lambda other: _natural(other["key"]))


def _pair(name: str, a: Figures, b: Figures, r: int, scaling: float | None) -> Row:
    """The figures of A [r, n] and B [m, r]: ``a_norm`` is ‖A‖/n, ``b_norm`` ‖B‖/m; ``stable`` is
    None if one is not finite.
    """
    n, m = a.shape[1], b.shape[0]
    a_norm = a.norm / max(n, 1)
    b_norm = b.norm / max(m, 1)
    are_finite = math.isfinite(a_norm) and math.isfinite(b_norm)
    stable = is_stable(a_norm, b_norm) if are_finite else None
    dtype = "/".join(dict.fromkeys((a.dtype, b.dtype)))
    return {
        "name": name, "r": r, "in_features": n, "out_features": m, "dtype": dtype, "scaling": scaling, "a_frobenius": a.norm,
        "b_frobenius": b.norm, "a_norm": a_norm, "b_norm": b_norm, "stable": stable, "bytes": a.bytes + b.bytes,
    }  # fmt: skip


def _cell(figure: str, value: Any) -> str:
    """A figure of a pair as the table has it."""
    if figure == "bytes":
        return size(value)
    if figure == "stable":
        return {None: "NOT FINITE", True: "stable", False: "unstable"}[value]
    if figure == "scaling":
        return "?" if value is None else f"{value:.4g}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rank_and_scaling(
    name: str, r: int, config: Mapping[str, Any], problems: list[str]
) -> tuple[int, float | None]:
    """The rank and the scaling that PEFT uses with this config, if there is one; ``r`` is that of
    A.

    A stack of experts has a multiple of its rank there. Any other rank that differs from the file's
    is a problem.
    """
    if config.get("peft_type") != "LORA" or r < 1:
        return r, None
    key = _stack(name, config) or name
    rank = lookup_pattern(config["rank_pattern"], (key,), config.get("r", r))
    if rank != r and (key == name or not isinstance(rank, int) or rank < 1 or r % rank):
        problems.append(f"{name} has rank {r}, but its config says {shown(rank)}")
        rank = r
    alpha = lookup_pattern(config["alpha_pattern"], (key,), config.get("lora_alpha", PEFT_ALPHA))
    return rank, check_float(f"lora_alpha of {name}", alpha) / (
        math.sqrt(rank) if config.get("use_rslora") else rank
    )


def _stack(name: str, config: Mapping[str, Any]) -> str | None:
    """The name of the stack of experts that a pair is of, or None: PEFT's files have its place
    among nested modules instead.
    """
    module = re.sub(r"(\.base_layer)*$", "", name)
    given = config.get("target_parameters")
    targets = (
        [target for target in given if isinstance(target, str)] if isinstance(given, list) else []
    )
    stacks = {f"{module}.{target.rpartition('.')[2]}" for target in targets}
    # PEFT nests in the order of the module's parameters, and down comes last.
    found = sorted(
        (stack for stack in stacks if not {*ends_of(stack)}.isdisjoint(targets)),
        key=lambda stack: (stack.endswith("down_proj"), stack),
    )
    depth = name.count(".base_layer", len(module))
    return found[-1 - depth] if depth < len(found) else None


def _kind(key: str, shape: list[int]) -> str:
    if "lora_magnitude_vector" in key:
        return "DoRA's magnitudes"
    if "lora_embedding_" in key:
        return "LoRA on an embedding"
    if ".lora_A." in key or ".lora_B." in key:
        return (
            "LoRA's own bias"
            if key.endswith(".bias")
            else f"LoRA of {len(shape)} dimensions (a convolution)"
        )
    if ".lora_" in key:
        return "a variant of LoRA"
    return PLAIN[0] if key.endswith("bias") else PLAIN[1]


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that orders numbers in a name by value: layers.2 before layers.10."""
    # By their count and the digits themselves: int() takes no more than 4,300.
    return [
        (len(part) if i % 2 else 0, part) for i, part in enumerate(re.split(r"0*([0-9]+)", name))
    ]


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
