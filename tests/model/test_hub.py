"""load_adapter by a hub id: what it asks the hub for, that a local directory wins, and what it says when the hub is not there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from stablelora_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from tests.helpers.adapters import adapted, fresh
from tests.helpers.processes import printed
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
    ("options", "folder"),
    [({}, ""), ({"revision": "v1"}, ""), ({"subfolder": "a/b"}, "a/b/"), ({"revision": "v1", "subfolder": "a"}, None)],
)
def test_it_downloads_the_two_files(asked, options, folder):
    model = fresh()
    if folder is None:
        with refused(model, ValueError, f"got 'org/an-adapter' without a/{CONFIG_NAME}, a/{WEIGHTS_NAME}"):
            load_adapter(model, "org/an-adapter", **options)
        return
    load_adapter(model, "org/an-adapter", **options)
    assert torch.equal(output(model), output(adapted(1)))
    patterns = {"allow_patterns": [f"{folder}{CONFIG_NAME}", f"{folder}{WEIGHTS_NAME}"]}
    revision = {"revision": options["revision"]} if "revision" in options else {}
    assert asked == [("org/an-adapter", patterns | revision)]


def test_a_local_directory_wins(asked, tmp_path):
    save_adapter(adapted(1), tmp_path / "org" / "an-adapter")
    save_adapter(adapted(1), tmp_path / "org" / "an-adapter" / "best")
    for options in ({}, {"subfolder": "best"}):
        model = fresh()
        load_adapter(model, "org/an-adapter", **options)
        assert torch.equal(output(model), output(adapted(1)))
    match = r"revision is for hub ids, got 'v1' with 'org/an-adapter', a path on this machine"
    with refused(model, ValueError, match):
        load_adapter(model, "org/an-adapter", revision="v1")
    assert asked == []


@pytest.mark.parametrize("path", ["name", "a/b/c", "./a", "/a/b", "../a", "a/", "a b/c", Path("org/an-adapter")])
def test_other_paths_ask_nobody(asked, path):
    with refused(model := fresh(), ValueError, r"path must be a directory on this machine .* \(nothing there\)"):
        load_adapter(model, path)
    with refused(model, ValueError, "revision is for hub ids, got 'v1'"):
        load_adapter(model, path, revision="v1")
    assert asked == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"revision": 3}, TypeError, "revision must be a string or None, got int"),
        ({"subfolder": Path("a")}, TypeError, "subfolder must be a string or None, got PosixPath"),
        ({"subfolder": 3}, TypeError, "subfolder must be a string or None, got int"),
        ({"subfolder": "../b"}, ValueError, "subfolder must be a relative path inside of path, got "),
        ({"subfolder": "/tmp"}, ValueError, "subfolder must be a relative path inside of path, got "),
        ({"subfolder": "a/../../b"}, ValueError, "subfolder must be a relative path inside of path, got "),
    ],
    ids=["revision 3", "subfolder Path", "subfolder 3", "above", "absolute", "above from inside"],
)  # fmt: skip
def test_options_that_are_refused(asked, options, error, message):
    with refused(model := fresh(), error, message):
        load_adapter(model, "org/an-adapter", **options)
    assert asked == []


def test_a_repository_without_safetensors_is_named(asked, monkeypatch, tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    (tmp_path / CONFIG_NAME).write_text("{}")
    monkeypatch.setattr(hub, "snapshot_download", lambda repo_id, **kwargs: str(tmp_path))
    match = "path must name a hub repository with safetensors, got 'org/an-adapter' without adapter_model.safetensors"
    with refused(model := fresh(), ValueError, match):
        load_adapter(model, "org/an-adapter")


def test_a_hub_that_is_not_there(asked, monkeypatch):
    def unreachable(repo_id, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with refused(
        model := fresh(),
        ValueError,
        r"path 'org/an-adapter' is no path on this machine, and the hub did not give it: no route$",
    ):
        load_adapter(model, "org/an-adapter")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused(
        model,
        ImportError,
        r"path 'org/an-adapter' is no path on this machine, and a hub id needs huggingface_hub: pip install",
    ):
        load_adapter(model, "org/an-adapter")


def test_the_real_hub_offline(tmp_path):
    code = (
        "import torch, stablelora_kernels as slk\n"
        "try: slk.load_adapter(torch.nn.Linear(2, 2), 'org/an-adapter')\n"
        "except ValueError as error: print(error)"
    )
    message = printed(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert message.startswith("path 'org/an-adapter' is no path on this machine, and the hub did not give it: ")
    assert "outgoing traffic has been disabled" in message and "\n" not in message
