"""The commands that pages name as the source of their figures start: each exists, imports all that
its run needs, and knows the options that the pages give it.

``--help`` alone shows less: a name that has moved is missed only where a function imports it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md")),
]  # fmt: skip
COMMAND = re.compile(r"python -m ((?:benchmarks|tests)(?:\.\w+)*)([^`\n#|]*)")
# A command of an earlier commit, which the page names.
AT_A_COMMIT = re.compile(r"`[^`]+`\s+at commit [0-9a-f]{7,}")
# A row of the table in benchmarks/README.md, whose commands lack "python -m".
ROW = re.compile(r"^\|[^|]*\| (`(?:benchmarks|tests)[^|]*)\|", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OURS = ("benchmarks", "tests", "stablelora_kernels")


def commands() -> dict[str, set[str]]:
    """The options that pages give, by the module that they name."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        text = AT_A_COMMIT.sub("", page.read_text(encoding="utf-8"))
        for module, rest in COMMAND.findall(text):
            found.setdefault(module, set()).update(OPTION.findall(rest))
        for cell in ROW.findall(text):
            modules = re.findall(r"`((?:benchmarks|tests)(?:\.\w+)*)\b", cell)
            for module in modules:
                found.setdefault(module, set()).update(OPTION.findall(cell))
    return found


COMMANDS = commands()


def file_of(module: str) -> Path | None:
    """The file that ``python -m`` runs, or that an import of ``module`` does."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path / "__main__.py", path.with_suffix(".py")):
        if candidate.exists():
            return candidate
    return None


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def faults_of(file: Path) -> list[str]:
    """What ``file`` imports from this repository, anywhere, and what it reads of the modules, that
    is not there.
    """
    tree, names, found = tree_of(file), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = {alias.name.partition(".")[0] for alias in node.names}
        else:
            roots = {(getattr(node, "module", None) or "").partition(".")[0]}
        if isinstance(node, ast.Import | ast.ImportFrom) and roots & {*OURS}:
            try:
                exec(compile(ast.Module([node], []), file.name, "exec"), names)
            except ImportError as error:
                found.append(f"{file.name}:{node.lineno}: {error}")
    stored = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    stored |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
            continue
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        module = names.get(name) if name not in stored else None
        if isinstance(module, ModuleType) and not hasattr(module, node.attr):
            found.append(f"{file.name}:{node.lineno}: {module.__name__} has no {node.attr}")
    return found


def files_of(module: str) -> list[Path]:
    """The file of a command, and those of this repository's benchmarks and tests that it imports,
    directly or not.
    """
    file = file_of(module)
    assert file is not None
    found: list[Path] = []
    waiting = [file, *(file.parent.glob("*.py") if file.name == "__main__.py" else ())]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.append(file)
        for node in ast.walk(tree_of(file)):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith(OURS[:2])
            ):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                waiting += [path for name in names if (path := file_of(name)) is not None]
    return [path for path in found if not path.name.startswith("test_")]


def test_pages_name_the_commands_that_this_test_reads():
    assert len(COMMANDS) > 20 and {"--quick"} <= COMMANDS["tests.peft_suite"]
    assert {"benchmarks", "benchmarks.lab.memory", "benchmarks.lab.gpu"} <= {*COMMANDS}


def test_a_name_that_has_moved_is_found_wherever_it_is_read(tmp_path):
    file = tmp_path / "command.py"
    file.write_text(
        "from stablelora_kernels.nn import fused_experts\n"
        "def run():\n"
        "    from benchmarks.lab import nothing_here\n"
        "    from benchmarks.no_such_module import some\n"
        "    fused_experts.lora_experts_mlp_op\n"
        "    fused_experts.gone\n"
    )
    imported, module, read = faults_of(file)
    assert imported.startswith("command.py:3: cannot import name 'nothing_here'")
    assert module.startswith("command.py:4: No module named 'benchmarks.no_such_module'")
    assert read == "command.py:6: stablelora_kernels.nn.fused_experts has no gone"


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_a_command_that_a_page_names_starts(module, monkeypatch):
    assert file_of(module) is not None, f"pages name python -m {module}, and there is none"
    faults = [fault for file in files_of(module) for fault in faults_of(file)]
    assert not faults, "\n".join(faults)
    source = file_of(module).read_text(encoding="utf-8")
    if "ArgumentParser" not in source and not COMMANDS[module]:
        return
    printed = io.StringIO()
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code
    unknown = {option for option in COMMANDS[module] if option not in printed.getvalue()}
    assert not unknown, f"python -m {module} has no {', '.join(sorted(unknown))}"
