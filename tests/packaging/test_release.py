"""What .ci/release asks for before it builds. The rest of it is tests/packaging/test_fresh_install.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or shutil.which("bash") is None, reason="needs git and bash"
)


def git(repository: Path, *arguments: str) -> None:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@host.example"]
    subprocess.run(["git", *who, *arguments], cwd=repository, check=True, capture_output=True)


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A repository that is ready for the release of 0.2.0."""
    repository = tmp_path / "repository"
    for name, text in {
        "stablelora_kernels/_version.py": '__version__ = "0.2.0"\n',
        "CHANGELOG.md": "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n- New.\n\n## 0.1.0 (2026-11-01)\n",
        "pyproject.toml": '[project.urls]\nSource = "https://host.example/owner/project"\n',
        ".ci/release": (ROOT / ".ci" / "release").read_text(encoding="utf-8"),
    }.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text, encoding="utf-8")
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "one")
    return repository


def release(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it with a Python that ends at once: status 77 if the build begins."""
    stubs = repository.parent / "stubs"
    stubs.mkdir(exist_ok=True)
    (stubs / "python3").write_text("#!/bin/sh\nexit 77\n")
    (stubs / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", repository / ".ci" / "release", *arguments], env=environment, capture_output=True, text=True
    )


def change(repository: Path, name: str, old: str, new: str) -> None:
    text = (repository / name).read_text(encoding="utf-8")
    assert old in text
    (repository / name).write_text(text.replace(old, new), encoding="utf-8")
    git(repository, "commit", "-q", "-a", "-m", "another")


def test_it_builds_what_is_ready(ready: Path) -> None:
    done = release(ready)
    assert done.returncode == 77 and "Not ready" not in done.stdout, done.stdout
    git(ready, "tag", "v0.2.0")
    assert release(ready).returncode == 77


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("stablelora_kernels/_version.py", "0.2.0", "0.2", "must hold a version like 0.2.0 or 0.2.0rc1, got '0.2'"),
        ("stablelora_kernels/_version.py", "0.2.0", "0.1.0", "must begin with '## 0.1.0 (YYYY-MM-DD)', got '## 0.2.0"),
        ("CHANGELOG.md", "0.2.0 (2026-12-01)", "Unreleased (0.2.0)", "got '## Unreleased (0.2.0)'"),
        ("CHANGELOG.md", "## 0.2.0", "## Unreleased\n\n## 0.2.0", "got '## Unreleased'"),
        ("pyproject.toml", "Source = ", "# Source = ", "must have Source, the repository's address"),
    ],
)
def test_what_is_not_ready_is_named(ready: Path, name: str, old: str, new: str, message: str) -> None:
    change(ready, name, old, new)
    done = release(ready)
    assert done.returncode == 1 and message in done.stdout
    rehearsal = release(ready, "--rehearse")
    assert rehearsal.returncode == 77 and message in rehearsal.stdout


def test_a_changed_tree_and_a_used_version_are_not_ready(ready: Path) -> None:
    git(ready, "tag", "v0.2.0")
    change(ready, "CHANGELOG.md", "New", "Newer")
    (ready / "file").touch()
    done = release(ready)
    assert done.returncode == 1 and done.stdout.count("Not ready to release:") == 2
    assert "clean, got 1 changed files" in done.stdout and "must be new, got 0.2.0, whose tag is" in done.stdout


def test_a_wrong_argument(ready: Path) -> None:
    done = release(ready, "--rehearsal")
    assert done.returncode == 2 and "usage: .ci/release [--rehearse], got --rehearsal" in done.stderr
