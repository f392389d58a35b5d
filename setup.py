"""The description on PyPI: README.md with absolute links. Everything else is in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# Code, which stays as it is, or the beginning of a link or of an attribute of HTML and its target
# in the repository.
LINK = re.compile(
    r'```.*?```|`[^`\n]+`|(\]\(|\b(?:src|srcset|href)=")(?!https?:|mailto:|#)([^)"\s]+)', re.S
)
IMAGES = (".png", ".svg", ".jpg", ".gif", ".webp")


def description(readme: str, source: str, tag: str) -> str:
    """``readme`` with its links into the repository led to ``tag`` in the repository at the address
    ``source``.
    """

    def absolute(match: re.Match[str]) -> str:
        start, target = match.groups()
        if target is None:
            return match[0]
        return f"{start}{source.rstrip('/')}/{'raw' if target.endswith(IMAGES) else 'blob'}/{tag}/{target}"

    return LINK.sub(absolute, readme)


def main() -> None:
    readme, project, version = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("README.md", "pyproject.toml", "stablelora_kernels/_version.py")
    )
    if source := re.search(r'^Source = "(.+)"$', project, re.M):
        readme = description(readme, source[1], f"v{version.split(chr(34))[1]}")
    setup(long_description=readme, long_description_content_type="text/markdown")


if __name__ == "__main__":
    main()
