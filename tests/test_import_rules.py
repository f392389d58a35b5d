"""The rules of imports that docs/internals/architecture.md draws: each file's imports are read,
none is run.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "stablelora_kernels"
# From the bottom up. A file imports only levels below its own, and its own package.
LEVELS = (
    {"_version", "utils"},
    {"formats"},
    {"activations", "config", "pairs", "quantized"},
    {"projection", "packed_experts", "reference", "dispatch"},
    {"kernels"},
    {"launch"},
    {"ops", "optim"},
    {"cross_entropy"},
    {"functional", "explanation", "status"},
    {"nn"},
    {"model", "testing"},
    {"integrations"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
LEVEL_OF = {part: number for number, level in enumerate(LEVELS) for part in level}


class Import(NamedTuple):
    """One import of ``target``. ``lazy``: inside a function, so that importing the file does not
    run it.
    """

    path: str
    line: int
    target: str
    lazy: bool
    relative: bool

    @property
    def importer(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")


class Rule(NamedTuple):
    """Files of ``importers``, but not of ``excepted``, do not import ``targets``, but may import
    what is ``allowed``.
    """

    words: str
    importers: tuple[str, ...]
    targets: tuple[str, ...]
    excepted: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    # Inside functions they may.
    eager: bool = False

    def is_broken(self, i: Import) -> bool:
        applies = within(i.importer, *self.importers) and not within(i.importer, *self.excepted)
        return (
            applies and within(i.target, *self.targets) and not within(i.target, *self.allowed)
            and not (self.eager and i.lazy)
        )  # fmt: skip


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def ours(*parts: str) -> tuple[str, ...]:
    return tuple(f"{PACKAGE}.{part}" for part in parts)


ALL, TRITON = (PACKAGE, "benchmarks", "tests", "examples"), ours("kernels", "launch")
PROOFS = ours(
    "ops.proofs",
    "ops.lora_linear.proof",
    "ops.lora_mlp.proof",
    "ops.lora_rows.proof",
    "ops.lora_linear_cross_entropy.proof",
)
# Tests and benchmarks/lab may take kernels and launches apart.
RULES = (
    Rule("only launch/ imports kernels/", ALL, ours("kernels"), (*TRITON, "tests", "benchmarks.lab")),
    Rule("launch/ and kernels/ are imported inside functions: Triton is optional", (PACKAGE,), TRITON, TRITON, eager=True),
    Rule("kernels/ imports kernels/ and dispatch.backend alone", ours("kernels"), ALL, (), ours("kernels", "dispatch.backend")),
    Rule("dispatch/ imports neither launch/ nor ops/", ours("dispatch"), ours("launch", "ops")),
    Rule("dispatch/ imports Triton only inside functions", ours("dispatch"), ("triton",), eager=True),
    Rule("nn/ does not import optim/", ours("nn"), ours("optim")),
    Rule("only tests, testing/, first use's proofs and the self-test import reference/", ALL, ours("reference"),
         (*ours("__init__", "reference", "testing", "cli.self_test"), *PROOFS, "tests")),
    Rule("only tests import cli/", ALL, ours("cli"), (*ours("cli", "__main__"), "tests")),
    Rule("only benchmarks.lab, its tests and the PTX emulator import benchmarks.lab", ALL, ("benchmarks.lab",),
         ("benchmarks.lab", "tests.benchmarks.lab", "tests.ptx_emulator")),
    Rule("only tests import tests", ALL, ("tests",), ("tests",)),
)  # fmt: skip
# What the package needs. Other packages come by import_extra, which names the extra that brings
# them; these files are imported only once it has found peft, and a layer of bitsandbytes' class
# proves that that is installed. Axolotl, which needs peft and pydantic, imports its plugin itself.
NEEDED = {*sys.stdlib_module_names, "torch", "triton", PACKAGE}
BEHIND_IMPORT_EXTRA = {
    "integrations.axolotl": {"axolotl", "peft", "pydantic"},
    "integrations.peft.accelerate": {"peft"},
    "integrations.peft.experts": {"peft"},
    "integrations.peft.faults": {"peft"},
    "integrations.peft.layers": {"peft"},
    "integrations.peft.merged": {"peft"},
    "integrations.peft.read": {"peft"},
    "integrations.peft.wrappers": {"peft"},
}


def part_of(module: str) -> str | None:
    """The part of the package that ``module`` belongs to, or None outside of the package."""
    return [*module.split("."), "__init__"][1] if within(module, PACKAGE) else None


def broken_by(i: Import) -> Iterator[str]:
    """The rules that an import breaks."""
    yield from (rule.words for rule in RULES if rule.is_broken(i))
    if i.relative:
        yield "imports are absolute"
        return
    part, below = part_of(i.importer), part_of(i.target)
    if part is None:
        return
    if i.target.split(".")[0] not in NEEDED | BEHIND_IMPORT_EXTRA.get(
        i.importer.removeprefix(f"{PACKAGE}."), set()
    ):
        yield "what an extra brings is imported by import_extra"
    if below not in (None, part) and not LEVEL_OF.get(below, len(LEVELS)) < LEVEL_OF.get(part, -1):
        yield "a part of the package imports only parts on lower levels"


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def statements(
    node: ast.AST, lazy: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements below ``node`` that run, each with whether it stands inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, lazy
        elif isinstance(child, ast.If) and ast.unparse(child.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            for other in child.orelse:
                yield from statements(other, lazy)
        else:
            yield from statements(
                child,
                lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
            )


def imports_of(path: str, source: str, modules: set[str]) -> Iterator[Import]:
    """``from package import name`` imports the module of that name, or the package itself where
    there is none.
    """
    for node, lazy in statements(ast.parse(source, path)):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if isinstance(node, ast.Import):
            targets = {alias.name for alias in node.names}
        else:
            base = node.module or ""
            targets = {
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base
                for alias in node.names
            }
        for target in sorted(targets):
            yield Import(path, node.lineno, target, lazy, relative)


def violations(files: Mapping[str, str]) -> list[str]:
    """Of sources by path, every import that breaks a rule, with its file and line, and a circle of
    imports.
    """
    modules = {module_of(path) for path in files}
    imports = [i for path, source in files.items() for i in imports_of(path, source, modules)]
    broken = [
        f"{i.path}:{i.line}: {rule}: {i.importer} imports {i.target}"
        for i in imports
        for rule in broken_by(i)
    ]
    targets: dict[str, set[str]] = {module: set() for module in modules}
    for i in imports:
        targets[module_of(i.path)] |= {i.target} & modules - {module_of(i.path)}
    try:
        TopologicalSorter(targets).prepare()
    except CycleError as error:
        broken.append(f"modules import each other in a circle: {' <- '.join(error.args[1])}")
    return broken


def test_every_file_keeps_the_rules():
    trees = (ROOT / tree for tree in (PACKAGE, "benchmarks", "tests", "examples"))
    paths = sorted(path for tree in trees for path in tree.rglob("*.py"))
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    assert len(files) > 150
    assert not (found := violations(files)), "\n".join(found)


# A path, the only line that is wrong in it, and the rule that it breaks: one of each rule.
PLANTED = [
    ("tests/nn/test_linear.py", "from ..helpers import cases", "imports are absolute"),
    ("stablelora_kernels/model/apply.py", "from stablelora_kernels.testing import make_inputs", "lower levels"),
    ("stablelora_kernels/ops/plans.py", "def f():\n    from stablelora_kernels.kernels import common", "only launch/"),
    ("stablelora_kernels/nn/linear.py", "class C:\n    import stablelora_kernels.launch.base", "inside functions"),
    ("stablelora_kernels/kernels/common.py", "import stablelora_kernels.dispatch.rules", "kernels/ imports kernels/"),
    ("stablelora_kernels/dispatch/rules.py", "import triton", "Triton only inside functions"),
    ("stablelora_kernels/dispatch/rules.py", "def f():\n    import stablelora_kernels.launch.base", "neither launch/"),
    ("stablelora_kernels/nn/linear.py", "from stablelora_kernels.optim import StableLoRAAdamW", "does not import optim/"),
    ("benchmarks/common/models.py", "from stablelora_kernels import reference", "import reference/"),
    ("benchmarks/common/models.py", "def f():\n    import stablelora_kernels.cli.doctor", "only tests import cli/"),
    ("tests/benchmarks/test_suite.py", "import benchmarks.lab.page.page", "only benchmarks.lab, its tests"),
    ("benchmarks/suite/layers.py", "from tests.helpers.cases import check", "only tests import tests"),
    ("stablelora_kernels/model/apply.py", "def f():\n    import safetensors.torch", "by import_extra"),
    ("benchmarks/suite/layers.py", "import benchmarks.common.models", "in a circle"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "wrong", "rule"), PLANTED, ids=[rule for *_, rule in PLANTED])
def test_a_planted_import_is_found(path, wrong, rule):
    known = [
        "kernels/common",
        "launch/base",
        "dispatch/rules",
        "reference/__init__",
        "optim/__init__",
    ]
    files = dict.fromkeys((f"stablelora_kernels/{name}.py" for name in known), "")
    files["benchmarks/common/models.py"] = "def f():\n    from benchmarks.suite import layers"
    found = violations(files | {path: f'"""What it does."""\n\n{wrong}\n'})
    line = 3 + wrong.count("\n")
    assert any(
        (text.startswith(f"{path}:{line}: ") or "circle" in rule) and rule in text for text in found
    ), found


def test_every_rule_has_a_planted_import():
    assert all(any(planted in rule.words for _, _, planted in PLANTED) for rule in RULES)
