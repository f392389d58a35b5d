"""pyproject.toml and the package's optional imports agree on extras and bounds; the README's links
work on PyPI.
"""

from __future__ import annotations

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


def requirements(extra: str | None) -> Iterator[Requirement]:
    """What an extra installs, its own extras resolved; None for the package alone."""
    for line in PROJECT["dependencies"] if extra is None else EXTRAS[extra]:
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) != canonicalize_name(PROJECT["name"]):
            yield requirement
        for other in sorted(requirement.extras):
            yield from requirements(other)


def lower_bounds(extra: str | None) -> dict[str, str]:
    """What an extra installs, each with its oldest version."""
    return {
        canonicalize_name(requirement.name): next(
            s.version for s in requirement.specifier if s.operator == ">="
        )
        for requirement in requirements(extra)
    }


def test_every_optional_import_is_in_its_extra():
    """That each goes through import_extra is a rule of tests/test_import_rules.py."""
    sources = "".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "stablelora_kernels").rglob("*.py")
    )
    calls = re.findall(r'(?<!def )import_extra\(\s*"([\w.]+)",\s*"(\w+)"', sources)
    assert len(calls) == len(re.findall(r"(?<!def )import_extra\(", sources)) > 5
    assert {extra for _, extra in calls} == {"adapters", "nvfp4", "peft"}
    missing = [
        call
        for call in calls
        if canonicalize_name(call[0].split(".")[0]) not in lower_bounds(call[1])
    ]
    assert missing == []
    # Few need compressed-tensors and torchao.
    usual = {extra for _, extra in calls} - {"nvfp4"}
    assert lower_bounds("all") == {
        name: bound for extra in usual for name, bound in lower_bounds(extra).items()
    }


def test_bounds_in_the_code_and_the_oldest_that_ci_installs_are_those_of_the_metadata():
    assert lower_bounds(None)["triton"] == ".".join(map(str, MIN_TRITON))
    peft = (ROOT / "stablelora_kernels" / "integrations" / "peft" / "accelerate.py").read_text(
        encoding="utf-8"
    )
    assert f"peft must be {lower_bounds('peft')['peft']} or newer" in peft
    pins = dict(
        re.findall(
            r"^([\w-]+)==(\S+)\.\*$",
            (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8"),
            re.M,
        )
    )
    assert {canonicalize_name(name): version for name, version in pins.items()} == lower_bounds(
        None
    ) | lower_bounds("all")


SOURCE = "https://host.example/owner/project"
describe = runpy.run_path(str(ROOT / "setup.py"))["description"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/a.md#b)", f"[a]({SOURCE}/blob/v1.0/docs/a.md#b)"),
        ("![a](docs/a.png)", f"![a]({SOURCE}/raw/v1.0/docs/a.png)"),
        ("[![a](a.svg)](docs/a.md)", f"[![a]({SOURCE}/raw/v1.0/a.svg)]({SOURCE}/blob/v1.0/docs/a.md)"),
        ('<a href="a.md"><img src="a.png">', f'<a href="{SOURCE}/blob/v1.0/a.md"><img src="{SOURCE}/raw/v1.0/a.png">'),
        *((text, text) for text in ("[a](https://x.org/a)", "[a](#b)", "```python\na[0](b)\n```")),
    ],
)  # fmt: skip
def test_links_for_pypi(text, expected):
    assert describe(text, f"{SOURCE}/", "v1.0") == expected
