"""The documentation: its Python runs, its names are the package's, and its reference has every
public name.
"""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import runpy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels import functional, reference
from tests.helpers.processes import ROOT, printed

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A block of Python is run unless the line before it says why not.
BLOCK = re.compile(r"(?:^(?P<before>[^\n]*)\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
PRINTED = re.compile(r"^It prints\n\n```text\n(.*?)^```$", re.M | re.S)


def text_of(page: str | Path) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


class Block(NamedTuple):
    # Counted from one, the line of its first statement.
    line: int
    code: str
    run: bool


def blocks_of(page: Path) -> list[Block]:
    """The Python blocks of a page."""
    text = text_of(page)
    blocks = [
        Block(
            text.count("\n", 0, found.start("code")) + 1,
            found["code"],
            not NOT_RUN.fullmatch(found["before"] or ""),
        )
        for found in BLOCK.finditer(text)
    ]
    assert len(blocks) == text.count("```python"), (
        f"{page.name}: a block that is indented or does not end is not run"
    )
    return blocks


def write_code(page: Path, directory: Path) -> Path:
    """The blocks of a page as one file, in which they are at their lines of the page; those not to
    be run are only parsed.
    """
    lines = [""] * len(text_of(page).splitlines())
    for block in blocks_of(page):
        ast.parse(block.code, filename=f"{page.name}:{block.line}")
        if block.run:
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    # A file, since Triton reads its kernels' source.
    file = directory / f"{page.stem.replace('-', '_')}_page.py"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.stem
)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys) -> None:
    """All blocks of a page run one after another, then the tests that they define. What it says is
    printed is printed.
    """
    content, file = text_of(page), write_code(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    defined = runpy.run_path(str(file))
    for name, function in defined.items():
        if name.startswith("test_"):
            function()
    out, said = capsys.readouterr().out, PRINTED.findall(content)
    assert all(text in out for text in said) and content.count("It prints\n") == len(said)


def test_the_machine_code_is_what_the_page_says(tmp_path: Path) -> None:
    """In a process that compiles: Triton decides at import whether it interprets."""
    module = write_code(ROOT / "docs" / "internals" / "adding-a-kernel.md", tmp_path).stem
    code = f"import json, {module}; print(json.dumps({module}.machine_code()))"
    facts = json.loads(printed(code, PYTHONPATH=f"{tmp_path}:{ROOT}"))
    assert (
        facts.items() >= {"spills": 0, "load_bits": 91, "store_bits": 128, "wide_loads": 2}.items()
    )


def test_the_tutorials_blocks_are_the_programs() -> None:
    program = (ROOT / "examples" / "tutorial.py").read_text(encoding="utf-8")
    lines = [line.strip() for line in program.splitlines()]
    for block in blocks_of(ROOT / "docs" / "getting-started" / "tutorial.md"):
        # Inside main(), one level deeper.
        code = [line.strip() for line in block.code.splitlines()]
        assert any(lines[i : i + len(code)] == code for i in range(len(lines))), block.code


def documented_names() -> set[str]:
    """The full names that the reference documents."""
    names: set[str] = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        module = ""
        for directive, name in re.findall(
            r"^\.\. (automodule|currentmodule|auto\w+):: (\S+)$", text_of(page), re.M
        ):
            if directive in ("automodule", "currentmodule"):
                module = name
            names.add(name if "." in name else f"{module}.{name}")
    return names


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them, and those that the page sets itself."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    made = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*made, *re.findall(r'<a id="([^"]+)"', text)}


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"]
)
def test_links_of_pages_outside_the_site_lead_somewhere(name: str) -> None:
    """Sphinx checks those of docs/."""
    page = ROOT / name
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    lost = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = page if not file else (page.parent / file).resolve()
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == [] and (links or name == "SECURITY.md")


def test_reference_has_every_public_name() -> None:
    public = {f"stablelora_kernels.{name}" for name in slk.__all__}
    public -= {f"stablelora_kernels.{name}" for name in ("functional", "reference", "__version__")}
    for module in (functional, reference):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    public |= {f"stablelora_kernels.testing.{name}" for name in ("make_inputs", "assert_no_worse")}
    assert public - documented_names() == set()


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of the longest module in it."""
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


def test_names_in_the_docs_resolve() -> None:
    """In pages and in ``__all__``, which a fresh process shows: here, other tests may have imported
    the modules already.
    """
    names = documented_names()
    for page in PAGES:
        names |= {
            f"stablelora_kernels.{name}"
            for name in re.findall(r"\bslk\.(\w+(?:\.\w+)*)", text_of(page))
        }
    assert len(names) > 70 and [name for name in sorted(names) if not resolves(name)] == []
    code = "import stablelora_kernels as slk; print([name for name in slk.__all__ if not hasattr(slk, name)])"
    assert printed(code) == "[]"


def test_wrong_names_get_a_hint() -> None:
    """Another spelling, and a report taken for the model."""
    with pytest.raises(
        AttributeError, match="has no attribute 'LoraLinear'; did you mean 'LoRALinear'"
    ):
        slk.LoraLinear(4, 4)
    report = slk.apply_lora(nn.Sequential(nn.Linear(4, 4)), ["0"])
    with pytest.raises(
        AttributeError, match="no attribute 'parameters': the model was changed in place"
    ):
        report.parameters()
    with pytest.raises(TypeError, match="is not callable: the model was changed in place"):
        report(torch.ones(4))
