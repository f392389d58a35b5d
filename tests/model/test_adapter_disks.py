"""Saving an adapter without room or rights: an error or a dead process, and what was there stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from stablelora_kernels.cli import main
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from tests.helpers.adapters import CONFIG_NAME, WEIGHTS_NAME, fresh, loaded
from tests.helpers.dying import NOBODY, as_nobody, in_child, needs_fork, with_room
from tests.helpers.small_models import output, refused

pytest.importorskip("safetensors.torch", reason="safetensors is not installed (pip install .[test])")
pytestmark = needs_fork


def fail_to_save(model, directory, error, message):
    with pytest.raises(error, match=message):
        save_adapter(model, directory)


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_that_may_not_grow(tmp_path, old, new, exists, dies):
    directory = tmp_path / "adapter"
    save_adapter(old, directory)
    weights = (directory / WEIGHTS_NAME).stat().st_size
    if not exists:
        shutil.rmtree(directory)
    save = partial(save_adapter, new, directory)
    fail = partial(fail_to_save, new, directory, OSError, f"{WEIGHTS_NAME} could not be written: .*File too large")
    for room in (0, 8, weights // 2, weights - 1):
        assert in_child(partial(with_room, room, save if dies else fail, dies)) == (signal.SIGXFSZ if dies else 0)
        assert not exists or torch.equal(loaded(directory), output(old))
        assert dies or os.listdir(tmp_path) == ["adapter"] * exists
        assert dies or not exists or sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME]
    save_adapter(new, directory)
    assert sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME] and os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(tmp_path, old, new, exists):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        if exists:
            save_adapter(old, disk / "adapter")
        before = sorted(disk.rglob("*"))
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space left"), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        # From no room at all to room for one file.
        for pages in range(4):
            os.truncate(filler, filler.stat().st_size - 4096 * pages)
            try:
                save_adapter(new, disk / "adapter")
                break
            except OSError as error:
                assert "No space left" in str(error) and sorted(disk.rglob("*")) == sorted([*before, filler])
                assert not exists or torch.equal(loaded(disk / "adapter"), output(old))
        assert pages > 0 and torch.equal(loaded(disk / "adapter"), output(new))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def place(old):
    """A directory that another user may enter, unlike pytest's, and not write to, with an adapter in it."""
    directory = Path(tempfile.mkdtemp())
    save_adapter(old, directory / "adapter")
    directory.chmod(0o555)
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


def read_and_fail_to_write(directory, expected, model):
    assert torch.equal(loaded(directory / "adapter"), expected)
    for target in (directory / "adapter", directory / "new"):
        fail_to_save(model, target, PermissionError, "Permission denied")


def test_a_read_only_directory_is_read_and_not_written(place, old, new):
    (place / "adapter").chmod(0o555)
    assert in_child(partial(as_nobody, partial(read_and_fail_to_write, place, output(old), new))) == 0
    assert os.listdir(place) == ["adapter"] and sorted(os.listdir(place / "adapter")) == [CONFIG_NAME, WEIGHTS_NAME]


def test_the_parent_of_an_existing_directory_need_not_be_writable(place, new):
    if os.getuid() == 0:
        for path in (place / "adapter", *(place / "adapter").iterdir()):
            os.chown(path, NOBODY, NOBODY)
    assert in_child(partial(as_nobody, partial(save_adapter, new, place / "adapter"))) == 0
    assert torch.equal(loaded(place / "adapter"), output(new))


def fail_to_read(directory):
    with refused(model := fresh(), PermissionError, f"Permission denied: .*{directory}"):
        load_adapter(model, directory)
    assert main(["inspect", str(directory)]) == 2
    assert main(["merge", str(directory / "best"), "--into", str(directory), "--out", str(directory / "out")]) == 2


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, "."])
def test_what_may_not_be_read_is_said_to_be_so(place, name):
    (place / "adapter" / name).chmod(0)
    assert in_child(partial(as_nobody, partial(fail_to_read, place / "adapter"))) == 0
    (place / "adapter" / name).chmod(0o755)
