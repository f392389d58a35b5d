"""The rules of imports that docs/internals/architecture.md draws: each file's imports are read, none is run."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "stablelora_kernels"
# From the bottom up. A file imports only levels below its own, and its own package; "" is the package's __init__.
LEVELS = (
    {"_version", "utils"},
    {"config", "pairs", "quantized"},
    {"projection", "reference", "dispatch"},
    {"kernels"},
    {"launch"},
    {"ops", "optim"},
    {"functional", "explanation", "graphed_step"},
    {"nn"},
    {"model", "tensor_parallel", "testing"},
    {"integrations"},
    {""},
    {"cli"},
    {"__main__"},
)
LEVEL_OF = {part: number for number, level in enumerate(LEVELS) for part in level}


class Import(NamedTuple):
    """One import of ``target``. ``lazy``: inside a function, so that importing the file does not run it."""

    path: str
    line: int
    importer: str
    target: str
    lazy: bool
    relative: bool


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def ours(*parts: str) -> tuple[str, ...]:
    return tuple(f"{PACKAGE}.{part}" for part in parts)


def part_of(module: str) -> str | None:
    """The part of the package that ``module`` belongs to, or None outside of the package."""
    return [*module.split("."), ""][1] if within(module, PACKAGE) else None


def breaks_levels(i: Import) -> bool:
    above, below = part_of(i.importer), part_of(i.target)
    if above is None or below is None or above == below:
        return False
    return above not in LEVEL_OF or below not in LEVEL_OF or LEVEL_OF[above] <= LEVEL_OF[below]


# By a rule's words, whether an import breaks it. Tests and benchmarks/lab may take kernels and launches apart.
RULES: dict[str, Callable[[Import], bool]] = {
    "imports are absolute": lambda i: i.relative,
    "a part of the package imports only parts on lower levels": breaks_levels,
    "only launch/ imports kernels/": lambda i: (
        within(i.target, *ours("kernels"))
        and not within(i.importer, *ours("kernels", "launch"), "tests", "benchmarks.lab")
    ),
    "launch/ and kernels/ are imported inside functions, since Triton is optional": lambda i: (
        within(i.target, *ours("kernels", "launch"))
        and not i.lazy
        and within(i.importer, PACKAGE)
        and not within(i.importer, *ours("kernels", "launch"))
    ),
    "kernels/ imports nothing of the package but kernels/ and dispatch.backend": lambda i: (
        within(i.importer, *ours("kernels"))
        and within(i.target, PACKAGE, "benchmarks", "tests")
        and not within(i.target, *ours("kernels", "dispatch.backend"))
    ),
    "dispatch/ imports neither launch/ nor ops/, and Triton only inside functions": lambda i: (
        within(i.importer, *ours("dispatch"))
        and (within(i.target, *ours("launch", "ops")) or (within(i.target, "triton") and not i.lazy))
    ),
    "nn/ and optim/ do not import each other": lambda i: {part_of(i.importer), part_of(i.target)} == {"nn", "optim"},
    "only tests, testing.py and cli/selftest.py import reference/": lambda i: (
        within(i.target, *ours("reference"))
        and not within(i.importer, *ours("reference", "testing", "cli.selftest"), "tests")
        and i.importer != PACKAGE
    ),
    "only tests import cli/": lambda i: (
        within(i.target, *ours("cli")) and not within(i.importer, *ours("cli", "__main__"), "tests")
    ),
    "only benchmarks.lab, its tests, the PTX emulator and the goldens import benchmarks.lab": lambda i: (
        within(i.target, "benchmarks.lab")
        and not within(i.importer, "benchmarks.lab", "tests.benchmarks.lab", "tests.ptx_emulator", "tests.goldens")
    ),
    "only tests import tests": lambda i: within(i.target, "tests") and not within(i.importer, "tests"),
}


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def statements(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements below ``node`` that run, each with whether it stands inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, lazy
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from statements(other, lazy)
        else:
            yield from statements(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def imports_of(path: str, source: str, modules: set[str]) -> Iterator[Import]:
    """``from package import name`` imports the module of that name, or the package itself where there is none."""
    importer = module_of(path)
    for node, lazy in statements(ast.parse(source, path)):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if isinstance(node, ast.Import):
            targets = {alias.name for alias in node.names}
        else:
            base = node.module or ""
            if relative:
                package = importer if path.endswith("__init__.py") else importer.rpartition(".")[0]
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            targets = {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
        for target in sorted(targets):
            yield Import(path, node.lineno, importer, target, lazy, relative)


def violations(files: Mapping[str, str]) -> list[str]:
    """Of sources by path, every import that breaks a rule, with its file and line, and a circle of imports."""
    modules = {module_of(path) for path in files}
    imports = [i for path, source in files.items() for i in imports_of(path, source, modules)]
    broken = [
        f"{i.path}:{i.line}: {rule}: {i.importer} imports {i.target}"
        for i in imports
        for rule, breaks in RULES.items()
        if breaks(i)
    ]
    targets: dict[str, set[str]] = {module: set() for module in modules}
    for i in imports:
        targets[i.importer] |= {i.target} & modules - {i.importer}
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
    ("stablelora_kernels/ops/matmul.py", "def f():\n    from stablelora_kernels.kernels import common", "only launch/"),
    ("stablelora_kernels/nn/linear.py", "class C:\n    import stablelora_kernels.launch.base", "inside functions"),
    ("stablelora_kernels/kernels/common.py", "import stablelora_kernels.dispatch.rules", "kernels/ imports nothing"),
    ("stablelora_kernels/dispatch/rules.py", "import triton", "Triton only inside functions"),
    ("stablelora_kernels/nn/linear.py", "from stablelora_kernels.optim import StableLoRAAdamW", "do not import each other"),
    ("benchmarks/common/models.py", "from stablelora_kernels import reference", "import reference/"),
    ("benchmarks/common/models.py", "def f():\n    import stablelora_kernels.cli.bench", "only tests import cli/"),
    ("tests/benchmarks/test_suite.py", "import benchmarks.lab.page.page", "only benchmarks.lab, its tests"),
    ("benchmarks/suite/layers.py", "from tests.helpers.cases import check", "only tests import tests"),
    ("benchmarks/suite/layers.py", "import benchmarks.common.models", "in a circle"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "wrong", "rule"), PLANTED, ids=[rule for *_, rule in PLANTED])
def test_a_planted_import_is_found(path, wrong, rule):
    known = ["kernels/common", "launch/base", "dispatch/rules", "reference/__init__", "optim/__init__"]
    files = dict.fromkeys((f"stablelora_kernels/{name}.py" for name in known), "")
    files["benchmarks/common/models.py"] = "def f():\n    from benchmarks.suite import layers"
    found = violations(files | {path: f'"""What it does."""\n\n{wrong}\n'})
    line = 3 + wrong.count("\n")
    assert any((text.startswith(f"{path}:{line}: ") or "circle" in rule) and rule in text for text in found), found


def test_every_rule_has_a_planted_import():
    assert all(any(planted in rule for _, _, planted in PLANTED) for rule in RULES)
