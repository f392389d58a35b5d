"""The documentation: its Python runs, and its reference has every public name."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import stablelora_kernels
from stablelora_kernels import functional, reference
from tests.helpers.processes import ROOT, printed, python

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A block is run unless this is in the line before it.
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
PRINTED = re.compile(r"^It prints\n\n```text\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    # Counted from one, the line of its first statement.
    line: int
    code: str
    run: bool


def blocks_of(page: Path) -> list[Block]:
    """The Python blocks of a page."""
    blocks, begun = [], 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if begun and line == "```":
            run = begun < 3 or NOT_RUN.fullmatch(lines[begun - 3]) is None
            blocks.append(Block(begun, "\n".join(lines[begun - 1 : number - 1]), run))
            begun = 0
        elif not begun and line.lstrip() == "```python":
            assert line == "```python", f"{page.name}:{number}: a block that is indented is not run"
            begun = number + 1
    assert not begun, f"{page.name}:{begun}: a block that does not end"
    return blocks


def write_code(page: Path, directory: Path) -> Path:
    """The blocks of a page as one file, in which they are at their lines of the page; those not to be run are only parsed."""
    lines = [""] * len(page.read_text(encoding="utf-8").splitlines())
    for block in blocks_of(page):
        ast.parse(block.code, filename=f"{page.name}:{block.line}")
        if block.run:
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    # A file, since Triton reads its kernels' source.
    file = directory / f"{page.stem.replace('-', '_')}_page.py"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marked, unmarked = "<!-- not run: a reason -->", "<!-- not run: -->"
    page.write_text(f"```python\na = 1\n```\n{marked}\n```python\nb\nc\n```\n{unmarked}\n```python\nd\n```\n")
    assert blocks_of(page) == [Block(2, "a = 1", True), Block(6, "b\nc", False), Block(11, "d", True)]
    page.write_text("- item\n\n  ```python\n  a\n  ```\n")
    with pytest.raises(AssertionError, match=r"page.md:3: a block that is indented"):
        blocks_of(page)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.stem)
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a page run one after another, then the tests that they define. What it says is printed is printed."""
    content = page.read_text(encoding="utf-8")
    file = write_code(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    defined = runpy.run_path(str(file))
    for name, function in defined.items():
        if name.startswith("test_"):
            function()
    out = capsys.readouterr().out
    for text in PRINTED.findall(content):
        assert text in out
    assert content.count("It prints\n") == len(PRINTED.findall(content))


def machine_code_of(page: str, directory: Path) -> Any:
    """What the page's ``machine_code`` gives, in a process that compiles: Triton decides at import whether it interprets."""
    file = write_code(ROOT / "docs" / page, directory)
    code = f"import json, {file.stem} as page; print(json.dumps(page.machine_code()))"
    return json.loads(printed(code, PYTHONPATH=f"{directory}:{ROOT}"))


def test_the_example_kernel_compiles(tmp_path: Path) -> None:
    facts = machine_code_of("internals/adding-a-kernel.md", tmp_path)
    assert facts.items() >= {"spills": 0, "load_bits": 91, "store_bits": 128, "wide_loads": 2}.items()


def test_the_tensor_that_is_followed_meets_these_instructions(tmp_path: Path) -> None:
    y, dx = machine_code_of("internals/kernels-walkthrough.md", tmp_path)
    assert [launch["programs"] for launch in (y, dx)] == [260, 644]
    assert [launch["kernel"] for launch in (y, dx)] == ["_lora_linear_tma_kernel"] * 2
    s = ("LDGSTS.E.BYPASS.128", "HGMMA.64x16x16", "ATOMG", "MEMBAR.ALL.GPU", "REDG")
    product = ("UTMALDG.2D", "HGMMA.64x256x16", "LDG.E.STRONG.GPU", "CCTL.IVALL", "UTMASTG.2D")
    text = (
        (ROOT / "docs" / "internals" / "kernels-walkthrough.md")
        .read_text(encoding="utf-8")
        .split("## One tensor on the GPU")[1]
    )
    for launch in (y, dx):
        for name in (*s, *product):
            assert any(found.startswith(name) for found in launch["instructions"]), (launch["programs"], name)
            assert f"`{name}`" in text


def documented_names() -> set[str]:
    """The full names that the reference documents."""
    names: set[str] = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        module = ""
        for directive, name in re.findall(
            r"^\.\. (automodule|currentmodule|auto\w+):: (\S+)$", page.read_text(encoding="utf-8"), re.M
        ):
            if directive in ("automodule", "currentmodule"):
                module = name
            names.add(name if "." in name else f"{module}.{name}")
    return names


def test_reference_has_every_public_name() -> None:
    public = {f"stablelora_kernels.{name}" for name in stablelora_kernels.__all__}
    public -= {f"stablelora_kernels.{name}" for name in ("functional", "reference", "__version__")}
    for module in (functional, reference):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    public |= {f"stablelora_kernels.testing.{name}" for name in ("make_inputs", "assert_no_worse")}
    public |= {f"stablelora_kernels.tensor_parallel.{name}" for name in ("LoRAColwiseParallel", "LoRARowwiseParallel")}
    assert public - documented_names() == set()


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_a_reference_page_lists_its_names(page: Path) -> None:
    """In the first table, which GitHub shows: autodoc runs on the site alone."""
    text = page.read_text(encoding="utf-8")
    documented = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto(?!module)\w+:: (\S+)$", text, re.M)}
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| \S.* \|$", text.split("```{eval-rst}")[0], re.M)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert not documented or (set(listed) == documented and len(listed) == len(documented))


def environment_variables() -> dict[str, list[str]]:
    """The documented variables, each with its values; none if it takes any."""
    text = (ROOT / "docs" / "reference" / "backends.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(STABLELORA_\w+)` \| (.+?) \|", text, re.M)
    return {name: re.findall(r"`(\w+)`", values) for name, values in rows}


def test_the_documented_environment_variables_are_the_packages() -> None:
    used = {name for text in messages() for name in re.findall(r"STABLELORA_[A-Z]+", text)}
    assert environment_variables().keys() == used


@pytest.mark.parametrize("setting", ["backend", "kernel", "autotune"])
def test_environment_variables_are_read_at_first_use(setting: str) -> None:
    """As the page says: importing the package raises nothing."""
    page = (ROOT / "docs" / "reference" / "backends.md").read_text(encoding="utf-8")
    assert "## Environment variables\n\nRead at first use" in page
    name = f"STABLELORA_{setting.upper()}"
    use = f"import stablelora_kernels as slk; print('imported', flush=True); print(slk.get_{setting}())"
    wrong = python(use, **{name: "bogus"})
    assert wrong.stdout == "imported\n" and f"ValueError: the environment variable {name}" in wrong.stderr
    values = environment_variables()[name]
    assert all(f"'{value}'" in wrong.stderr for value in values)
    assert printed(use, **{name: values[-1]}) == f"imported\n{True if setting == 'autotune' else values[-1]}"


def messages() -> list[str]:
    """The package's strings, values in them replaced by "…"."""
    found = []
    for file in sorted((ROOT / "stablelora_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_are_the_codes() -> None:
    """Each message and reason that the index of errors quotes is one of the code's."""
    index = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    rows = [line for line in index.splitlines() if line[:2] == "- "]
    quoted = [span for row in rows for span in re.findall(r"`([^`]+)`", row) if span.count(" ") > 2]
    assert len(quoted) > 80
    known = messages()
    # "…" at an end stands for any text.
    missing = [text for text in quoted if not any(text.strip("… ") in message for message in known)]
    assert missing == []


def test_the_tutorials_blocks_are_the_programs() -> None:
    program = (ROOT / "examples" / "tutorial.py").read_text(encoding="utf-8")
    lines = [line.strip() for line in program.splitlines()]
    blocks = blocks_of(ROOT / "docs" / "getting-started" / "tutorial.md")
    assert len(blocks) == 7
    for block in blocks:
        # Inside main(), one level deeper.
        code = [line.strip() for line in block.code.splitlines()]
        assert any(lines[i : i + len(code)] == code for i in range(len(lines))), block.code


@pytest.mark.parametrize("library", ["Unsloth", "Axolotl", "loralib"])
def test_what_a_switcher_loses_is_what_the_librarys_table_lacks(library: str) -> None:
    """A feature that the library's own table has is not among the losses at the top of the page, and the reverse."""
    page = (ROOT / "docs" / "guides" / "migrating.md").read_text(encoding="utf-8")
    (losses,) = re.findall(rf"^\| {library} \| .* \| (.+) \|$", page, re.M)
    section = page.split(f"## From {library}\n")[1].split("\n## ")[0]
    lacking = re.findall(r"^\| (.+?) \| none\b.*\|$", section, re.M)
    assert losses.split("; ") == lacking


def test_one_name_a_feature() -> None:
    """``fuse_projections`` gives fused projections; guides call them by no other name."""
    pages = [ROOT / "docs" / "index.md", *(ROOT / "docs" / "guides").glob("*.md"), ROOT / "docs" / "limitations.md"]
    found = [
        (page.name, name)
        for page in pages
        for name in ("shared input", "projection group", "computed together", "computes together")
        if name in page.read_text(encoding="utf-8").lower() and "orphan: true" not in page.read_text(encoding="utf-8")
    ]
    assert found == []
