"""load_adapter by a hub id: what it asks the hub for, that a local directory wins, and what it says when the hub is not there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from stablelora_kernels.cli import main
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from tests.helpers.adapters import CONFIG_NAME, WEIGHTS_NAME, adapted, fresh
from tests.helpers.small_models import output, refused

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (pip install .[test])")


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A hub with one adapter, at its top and in a folder of it. The fixture is the list of what it was asked for."""
    monkeypatch.chdir(tmp_path)
    snapshot, asked = tmp_path / "cache", []
    save_adapter(adapted(1), snapshot)
    shutil.copytree(snapshot, snapshot / "a" / "b")

    def download(repo_id, **kwargs):
        asked.append((repo_id, kwargs))
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    ("options", "folder"), [({}, ""), ({"revision": "v1"}, ""), ({"subfolder": "a/b"}, "a/b/")], ids=str
)
def test_it_downloads_the_two_files(asked, options, folder):
    load_adapter(model := fresh(), "org/an-adapter", **options)
    assert torch.equal(output(model), output(adapted(1)))
    patterns = {"allow_patterns": [f"{folder}{CONFIG_NAME}", f"{folder}{WEIGHTS_NAME}"]}
    revision = {"revision": options["revision"]} if "revision" in options else {}
    assert asked == [("org/an-adapter", patterns | revision)]
    assert options or main(["inspect", "org/an-adapter"]) == 0


def test_a_local_directory_wins(asked, tmp_path):
    save_adapter(adapted(1), tmp_path / "org" / "an-adapter" / "best")
    load_adapter(model := fresh(), "org/an-adapter", subfolder="best")
    assert torch.equal(output(model), output(adapted(1)))
    match = "revision is for hub ids, got 'v1' with 'org/an-adapter', a path on this machine"
    with refused(model, ValueError, match):
        load_adapter(model, "org/an-adapter", revision="v1", subfolder="best")
    assert asked == []


@pytest.mark.parametrize("path", ["name", "a/b/c", "../a", "/a/b", Path("org/an-adapter")])
def test_other_paths_ask_nobody(asked, path):
    with refused(model := fresh(), ValueError, r"path must be a directory on this machine .* \(nothing there\)"):
        load_adapter(model, path)
    assert asked == []


@pytest.mark.parametrize(
    ("subfolder", "message"),
    [
        ("/tmp", "subfolder must be a relative path inside of path, got "),
        ("a/../../b", "subfolder must be a relative path inside of path, got "),
        ("a", f"with safetensors, got 'org/an-adapter' without a/{CONFIG_NAME}, a/{WEIGHTS_NAME}"),
    ],
)
def test_subfolders_that_are_refused(asked, subfolder, message):
    with refused(model := fresh(), ValueError, message):
        load_adapter(model, "org/an-adapter", subfolder=subfolder)


def test_a_hub_that_is_not_there(asked, monkeypatch, capsys):
    def unreachable(repo_id, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    missing = "'org/an-adapter' is no path on this machine, and "
    with refused(model := fresh(), ValueError, f"path {missing}the hub did not give it: no route$"):
        load_adapter(model, "org/an-adapter")
    assert main(["inspect", "org/an-adapter"]) == 2
    assert f"ADAPTER {missing}the hub did not give it: no route\n" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused(model, ImportError, f"path {missing}a hub id needs huggingface_hub: pip install"):
        load_adapter(model, "org/an-adapter")
