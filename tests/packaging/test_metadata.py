"""pyproject.toml, the package's optional imports, the workflow and the README agree on extras, bounds and links."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stablelora_kernels.dispatch.backend import MIN_TRITON
from tests.helpers.processes import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCES = {
    str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8"))
    for file in sorted((ROOT / "stablelora_kernels").rglob("*.py"))
}
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
OWN = canonicalize_name(PROJECT["name"])
# These files are imported only once import_extra has found peft; a layer of bitsandbytes' class proves that it is installed.
BEHIND_IMPORT_EXTRA = {
    "stablelora_kernels/integrations/peft.py": {"peft"},
    "stablelora_kernels/integrations/peft_layers.py": {"peft", "bitsandbytes"},
    "stablelora_kernels/integrations/peft_mlp.py": {"peft"},
}


def requirements(extra: str | None) -> Iterator[Requirement]:
    """What an extra installs, its own extras resolved; None for the package alone."""
    for line in PROJECT["dependencies"] if extra is None else EXTRAS[extra]:
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) != OWN:
            yield requirement
        for other in sorted(requirement.extras):
            yield from requirements(other)


def names(extra: str | None) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements(extra)}


def lower_bounds(extra: str | None) -> dict[str, str]:
    bounds = {}
    for requirement in requirements(extra):
        (bounds[canonicalize_name(requirement.name)],) = (
            s.version for s in requirement.specifier if s.operator == ">="
        )
    return bounds


def optional_imports() -> Iterator[tuple[str, str, str]]:
    """The file, module and extra of each call of import_extra."""
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_extra":
                module, extra = (ast.literal_eval(argument) for argument in node.args[:2])
                yield path, module, extra


def test_every_optional_import_is_in_its_extra():
    found = list(optional_imports())
    assert {extra for *_, extra in found} == {"adapters", "peft", "plot", "cli"}
    missing = [
        (path, module) for path, module, extra in found if canonicalize_name(module.split(".")[0]) not in names(extra)
    ]
    assert missing == []


def test_no_optional_import_goes_round_import_extra():
    # filelock is a requirement of torch.
    core = {*sys.stdlib_module_names, "torch", "filelock", "triton", "stablelora_kernels"}
    found = []
    for path, tree in SOURCES.items():
        checked_only = {
            statement
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for statement in node.body
        }
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in checked_only:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {str(module).split(".")[0] for module in modules} - core - BEHIND_IMPORT_EXTRA.get(path, set())
                found += [(path, node.lineno, root) for root in sorted(roots)]
    assert found == []


def test_all_is_every_extra_of_a_user():
    assert names("all") == names("adapters") | names("peft") | names("plot") | names("cli")
    assert names(None) == {"torch", "triton"}


def test_extras_that_are_named_exist():
    """In messages, pages and commands. A shell may expand brackets, so a pip line quotes them."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", ".ci/run", ".ci/release", ".readthedocs.yaml")]
    files += [
        *ROOT.glob(".github/workflows/*.yml"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("stablelora_kernels/**/*.py"),
    ]
    known, seen = {*EXTRAS, "{extra}"}, set()
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            for quote, named in re.findall(r"""(.?)(?:stablelora-kernels|(?<=['" ])\.)\[([a-z{][\w,{}-]*)\]""", line):
                assert set(named.split(",")) <= known, (file.name, line)
                assert quote in "'\"" or "pip install" not in line, (file.name, line)
                seen |= set(named.split(","))
    assert seen >= {"adapters", "cli", "bench", "test"}


def test_bounds_in_the_code_are_those_of_the_metadata():
    assert lower_bounds(None)["triton"] == ".".join(map(str, MIN_TRITON))
    assert "peft must be {} or newer".format(lower_bounds("peft")["peft"]) in (
        ROOT / "stablelora_kernels" / "integrations" / "peft.py"
    ).read_text(encoding="utf-8")


def test_the_oldest_that_ci_installs_is_the_oldest_allowed():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)\.\*$", (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8"), re.M))
    assert {canonicalize_name(name): version for name, version in pins.items()} == lower_bounds(None) | lower_bounds(
        "all"
    )
    oldest_python = PROJECT["requires-python"].removeprefix(">=")
    (job,) = re.findall(r"^  oldest:\n(.*?)(?=^  \S)", WORKFLOW, re.M | re.S)
    assert f'python-version: "{oldest_python}"' in job and "-c .ci/oldest.txt" in job


def test_pythons_of_the_classifiers_are_those_of_ci():
    marked = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    listed = {version for text in re.findall(r"python: \[(.*)\]", WORKFLOW) for version in re.findall(r"[\d.]+", text)}
    assert marked == listed | set(re.findall(r'python-version: "([\d.]+)"', WORKFLOW))


SOURCE = "https://host.example/owner/project"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/a.md#b)", f"[a]({SOURCE}/blob/v1.0/docs/a.md#b)"),
        ("![a](docs/a.png)", f"![a]({SOURCE}/raw/v1.0/docs/a.png)"),
        ("[![a](a.svg)](docs/a.md)", f"[![a]({SOURCE}/raw/v1.0/a.svg)]({SOURCE}/blob/v1.0/docs/a.md)"),
        ('<a href="a.md"><img src="a.png">', f'<a href="{SOURCE}/blob/v1.0/a.md"><img src="{SOURCE}/raw/v1.0/a.png">'),
        *((text, text) for text in ("[a](https://x.org/a)", "[a](#b)", "`a[0](b)`", "```python\na[0](b)\n```")),
    ],
)  # fmt: skip
def test_links_for_pypi(text, expected):
    describe = runpy.run_path(str(ROOT / "setup.py"))["description"]
    assert describe(text, f"{SOURCE}/", "v1.0") == expected


def test_the_readme_links_to_files_that_exist():
    describe = runpy.run_path(str(ROOT / "setup.py"))["description"]
    text = describe((ROOT / "README.md").read_text(encoding="utf-8"), SOURCE, "v1.0")
    targets = re.findall(rf"{re.escape(SOURCE)}/(?:blob|raw)/v1\.0/([^)\"#]+)", text)
    assert len(targets) > 3 and [target for target in targets if not (ROOT / target).exists()] == []
