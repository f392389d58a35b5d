"""Saving an adapter on a full disk, under a limit on file sizes, and without rights: an error, and what was there stays."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from stablelora_kernels.cli import main
from stablelora_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from tests.helpers.adapters import fresh, loaded
from tests.helpers.dying import NOBODY, as_nobody, in_child, needs_fork
from tests.helpers.small_models import output, refused

safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed (pip install .[test])"
)
pytestmark = needs_fork


def fail_to_save(model, directory):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
    with pytest.raises(OSError, match=rf"{WEIGHTS_NAME} could not be written: .*File too large"):
        save_adapter(model, directory)


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_that_may_not_grow(tmp_path, old, new, exists):
    directory = tmp_path / "adapter"
    if exists:
        save_adapter(old, directory)

    assert in_child(partial(fail_to_save, new, directory)) == 0
    assert os.listdir(tmp_path) == ["adapter"] * exists
    if exists:
        assert sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME]
        assert torch.equal(loaded(directory), output(old))


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(tmp_path, old, new, exists):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        if exists:
            save_adapter(old, disk / "adapter")
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space left"), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        # From no room at all to room for the weights alone.
        for pages in range(3):
            os.truncate(filler, max(0, filler.stat().st_size - 4096 * pages))
            try:
                save_adapter(new, disk / "adapter")
            except OSError as error:
                assert "No space left" in str(error)
                assert torch.equal(loaded(disk / "adapter"), output(old)) if exists else not (disk / "adapter").exists()
                assert not exists or sorted(os.listdir(disk / "adapter")) == [CONFIG_NAME, WEIGHTS_NAME]
                assert sorted(os.listdir(disk)) == ["adapter"] * exists + ["filler"]
            else:
                assert torch.equal(loaded(disk / "adapter"), output(new))
                break
        else:
            raise AssertionError("three pages must be enough")
        assert pages > 0
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def open_directory():
    """A directory that another user may enter, unlike pytest's."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def read_and_fail_to_write(directory, expected, model):
    assert torch.equal(loaded(directory / "adapter"), expected)
    for target in (directory / "adapter", directory / "new"):
        with pytest.raises(PermissionError, match="Permission denied"):
            save_adapter(model, target)


def test_a_read_only_directory_is_read_and_not_written(open_directory, old, new):
    save_adapter(old, open_directory / "adapter")
    (open_directory / "adapter").chmod(0o555)

    if os.getuid() != 0:
        open_directory.chmod(0o555)
    as_nobody(partial(read_and_fail_to_write, open_directory, output(old), new))
    open_directory.chmod(0o755)
    assert os.listdir(open_directory) == ["adapter"]
    assert sorted(os.listdir(open_directory / "adapter")) == [CONFIG_NAME, WEIGHTS_NAME]


def test_the_parent_of_an_existing_directory_need_not_be_writable(open_directory, old, new):
    save_adapter(old, open_directory / "adapter")
    if os.getuid() == 0:
        for path in ((open_directory / "adapter"), *(open_directory / "adapter").iterdir()):
            os.chown(path, NOBODY, NOBODY)
    else:
        open_directory.chmod(0o555)
    as_nobody(partial(save_adapter, new, open_directory / "adapter"))
    open_directory.chmod(0o755)
    assert torch.equal(loaded(open_directory / "adapter"), output(new))


def fail_to_read(directory):
    model = fresh()
    with refused(model, PermissionError, f"Permission denied: .*{directory}"):
        load_adapter(model, directory)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(["inspect", str(directory)]) == 2
    error = said.getvalue()
    assert error.count("\n") == 1 and "inspect: error: [Errno 13] Permission denied: " in error


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, "."])
def test_what_may_not_be_read_is_said_to_be_so(open_directory, old, name):
    save_adapter(old, open_directory / "adapter")
    (open_directory / "adapter" / name).chmod(0)

    as_nobody(partial(fail_to_read, open_directory / "adapter"))
    (open_directory / "adapter" / name).chmod(0o755)
