"""What .ci/release asks for before it builds. The rest of it is
tests/packaging/test_fresh_install.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or shutil.which("bash") is None,
    reason="runs where git and bash are installed",
)
VERSION, CHANGES, PROJECT = "stablelora_kernels/_version.py", "CHANGELOG.md", "pyproject.toml"


def git(repository: Path, *arguments: str) -> None:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@host.example"]
    subprocess.run(["git", *who, *arguments], cwd=repository, check=True, capture_output=True)


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A repository that is ready for the release of 0.2.0, and a Python that ends at once, with 77,
    when the build begins.
    """
    repository, stub = tmp_path / "repository", tmp_path / "stubs" / "python3"
    for name, text in {
        VERSION: '__version__ = "0.2.0"\n',
        CHANGES: "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n- New.\n\n## 0.1.0 (2026-11-01)\n",
        PROJECT: '[project.urls]\nSource = "https://host.example/owner/project"\n',
        ".ci/release": (ROOT / ".ci" / "release").read_text(encoding="utf-8"),
        stub: "#!/bin/sh\nexit 77\n",
    }.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text, encoding="utf-8")
    stub.chmod(0o755)
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "one")
    git(repository, "tag", "v0.2.0")
    return repository


def release(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{repository.parent / 'stubs'}:{os.environ['PATH']}"}
    line = ["bash", repository / ".ci" / "release", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True)


def test_it_builds_what_is_ready(ready: Path) -> None:
    """Tagged or not."""
    assert release(ready).returncode == 77
    git(ready, "tag", "-d", "v0.2.0")
    done = release(ready)
    assert done.returncode == 77 and "Not ready" not in done.stdout, done.stdout


def test_what_is_not_ready_is_named(ready: Path) -> None:
    """And only named by a rehearsal, which builds what is there."""
    git(ready, "tag", "v0.2")
    for name, old, new in ((VERSION, "0.2.0", "0.2"), (PROJECT, "Source = ", "# Source = ")):
        text = (ready / name).read_text(encoding="utf-8")
        (ready / name).write_text(text.replace(old, new), encoding="utf-8")
    git(ready, "commit", "-q", "-a", "-m", "another")
    (ready / "file").touch()
    done, rehearsal = release(ready), release(ready, "--rehearse")
    assert (done.returncode, rehearsal.returncode) == (1, 77)
    for message in (
        "must hold a version like 0.2.0 or 0.2.0rc1, got '0.2'",
        "must begin with '## 0.2 (YYYY-MM-DD)', got '## 0.2.0",
        "must have Source, the repository's address",
        "clean, got 1 changed files",
        "must be new, got 0.2, whose tag is",
    ):
        assert message in done.stdout and message in rehearsal.stdout
