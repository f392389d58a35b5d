"""The two files of an adapter are one unit, whoever dies, saves, reads or mixes them."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stablelora_kernels.cli import main
from stablelora_kernels.model import adapter_files
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from stablelora_kernels.utils import lock
from stablelora_kernels.utils.lock import locked
from tests.helpers.adapters import CONFIG_NAME, WEIGHTS_NAME, adapted, fresh, loaded
from tests.helpers.dying import NOBODY, as_nobody, in_child, kills, needs_fork, with_room
from tests.helpers.peft_models import make as make_peft
from tests.helpers.peft_models import peft
from tests.helpers.small_models import output, refused

pytestmark = needs_fork


@pytest.fixture(scope="module")
def old():
    return adapted(1, lora_alpha=4)


@pytest.fixture(scope="module")
def new():
    return adapted(2, lora_alpha=32)


def save_as_peft(directory):
    make_peft(model=fresh()).save_pretrained(directory)


def read_by_peft(directory):
    """PEFT's output with the adapter, or None if it finds none."""
    try:
        return output(peft.PeftModel.from_pretrained(fresh(), directory).eval())
    except ValueError as error:
        assert "Can't find" in str(error)
        return None


def near(one, other):
    return torch.allclose(one, other, atol=1e-5)


def leave_unfinished(directory, old, new):
    """``old`` was saved, and then a save of ``new`` was killed as soon as readers would find it."""

    def prepare():
        shutil.rmtree(directory, ignore_errors=True)
        save_adapter(old, directory)

    for _ in kills(partial(save_adapter, new, directory), prepare):
        if torch.equal(loaded(directory), output(new)):
            return


# The names that a saver uses in the directory for a while.
NAMES = [".adapter_save", ".adapter_save.tmp", ".adapter_save.lock"]
WAS = [
    "nothing",
    "a directory",
    "the same config",
    "another config",
    "PEFT's",
    "an unfinished save",
    "links",
]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("was", WAS)
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new_one(
    tmp_path, old, new, was, every
):
    """By day at one of three operations, another one for each state of the directory."""
    directory = tmp_path / "adapter"
    template = tmp_path / "before"
    written = adapted(3, lora_alpha=4)
    other = tmp_path / "other"
    save_adapter(old, other)
    if was == "PEFT's":
        save_as_peft(template)
    elif was == "an unfinished save":
        leave_unfinished(template, old, new)
    elif was.endswith("config"):
        save_adapter(old if was == "the same config" else new, template)
    elif was == "links":
        save_adapter(new, template)
        for name in NAMES:
            (template / name).symlink_to("../other")
    before = loaded(template) if template.exists() else None
    if was != "nothing":
        template.mkdir(exist_ok=True)
        (template / "README.md").write_text("kept")
    after = output(written)

    def prepare():
        for leftover in tmp_path.iterdir():
            if leftover not in (template, other):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if template.exists():
            shutil.copytree(template, directory, symlinks=True)

    outcomes = set()
    for _ in kills(
        partial(save_adapter, written, directory), prepare, 1 + WAS.index(was) % every, every
    ):
        try:
            found = loaded(directory)
        except ValueError as error:
            assert before is None and (
                "nothing there" in str(error) or f"must hold {CONFIG_NAME}" in str(error)
            )
            found = None
        assert found is before is None or torch.equal(found, after) or torch.equal(found, before)
        outcomes.add("new" if found is not None and torch.equal(found, after) else "old")
        theirs = read_by_peft(directory)
        assert theirs is None or near(theirs, after) or near(theirs, before)
        # The next save cleans up after the dead.
        save_adapter(written, directory)
        assert torch.equal(loaded(directory), after)
        assert sorted(os.listdir(directory)) == ["README.md"] * (was != "nothing") + [
            CONFIG_NAME,
            WEIGHTS_NAME,
        ]
        assert set(os.listdir(tmp_path)) <= {"adapter", "before", "other"}
    assert outcomes == {"old", "new"}
    assert sorted(os.listdir(other)) == [CONFIG_NAME, WEIGHTS_NAME] and torch.equal(
        loaded(other), output(old)
    )


def make_directory_with_a_file(path, other):
    path.mkdir()
    (path / "file").touch()


THINGS = {
    "a link to another adapter": lambda path, other: path.symlink_to(other),
    "a link to a file": lambda path, other: path.symlink_to(other / CONFIG_NAME),
    "a link to nothing": lambda path, other: path.symlink_to("nothing"),
    "a file": lambda path, other: path.touch(),
    "a pipe": lambda path, other: os.mkfifo(path),
    "a directory": make_directory_with_a_file,
}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("thing", THINGS)
def test_what_has_a_savers_name_is_removed_but_not_what_it_links_to(
    tmp_path, old, new, thing, name, exists
):
    """An archive may bring such a link."""
    directory, other = tmp_path / "adapter", tmp_path / "other"
    save_adapter(old, other)
    directory.mkdir()
    if exists:
        save_adapter(old, directory)
    THINGS[thing](directory / name, other)
    if name == NAMES[2] and (
        reason := {"a directory": "Is a directory", "a pipe": "No such device"}.get(thing)
    ):
        fail_to_save(new, directory, f"{reason}.*{name}")
        return
    if not exists:
        with refused(model := fresh(), ValueError, f"must hold {CONFIG_NAME}, got .* without it"):
            load_adapter(model, directory)
    save_adapter(new, directory)
    assert torch.equal(loaded(directory), output(new)) and torch.equal(loaded(other), output(old))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "other"]
    assert all(
        sorted(os.listdir(place)) == [CONFIG_NAME, WEIGHTS_NAME] for place in (directory, other)
    )


@pytest.mark.parametrize("target", ["a directory", "nothing"])
def test_the_directory_may_be_a_link(tmp_path, old, new, target):
    directory, link = tmp_path / "adapter", tmp_path / "link"
    if target == "a directory":
        save_adapter(old, directory)
    link.symlink_to("adapter")
    for model in (old, new):
        save_adapter(model, link)
        assert link.is_symlink() and torch.equal(loaded(link), output(model))
    assert sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME]


# No room, no rights


def fail_to_save(model, directory, message):
    with pytest.raises(OSError, match=message):
        save_adapter(model, directory)


@pytest.mark.nightly
@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_that_may_not_grow(tmp_path, old, new, exists, dies):
    directory = tmp_path / "adapter"
    save_adapter(old, directory)
    weights = (directory / WEIGHTS_NAME).stat().st_size
    if not exists:
        shutil.rmtree(directory)
    save = partial(save_adapter, new, directory)
    fail = partial(
        fail_to_save, new, directory, f"{WEIGHTS_NAME} could not be written: .*File too large"
    )
    for room in (0, 8, weights // 2, weights - 1):
        assert in_child(partial(with_room, room, save if dies else fail, dies)) == (
            signal.SIGXFSZ if dies else 0
        )
        assert not exists or torch.equal(loaded(directory), output(old))
        assert dies or os.listdir(tmp_path) == ["adapter"] * exists
        assert dies or not exists or sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME]
    save_adapter(new, directory)
    assert sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME] and os.listdir(
        tmp_path
    ) == ["adapter"]


@pytest.fixture
def place(old):
    """A directory that another user may enter, unlike pytest's, and not write to, with an adapter
    in it.
    """
    directory = Path(tempfile.mkdtemp())
    save_adapter(old, directory / "adapter")
    directory.chmod(0o555)
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


def read_and_fail_to_write(directory, expected, model):
    assert torch.equal(loaded(directory / "adapter"), expected)
    for target in (directory / "adapter", directory / "new"):
        fail_to_save(model, target, "Permission denied")


def test_a_read_only_directory_is_read_and_not_written(place, old, new):
    (place / "adapter").chmod(0o555)
    assert (
        in_child(partial(as_nobody, partial(read_and_fail_to_write, place, output(old), new))) == 0
    )
    assert os.listdir(place) == ["adapter"] and sorted(os.listdir(place / "adapter")) == [
        CONFIG_NAME,
        WEIGHTS_NAME,
    ]


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
    assert (
        main(
            [
                "merge",
                str(directory / "best"),
                "--into",
                str(directory),
                "--out",
                str(directory / "out"),
            ]
        )
        == 2
    )


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, "."])
def test_what_may_not_be_read_is_said_to_be_so(place, name):
    (place / "adapter" / name).chmod(0)
    assert in_child(partial(as_nobody, partial(fail_to_read, place / "adapter"))) == 0
    (place / "adapter" / name).chmod(0o755)


# Savers beside readers


@pytest.mark.parametrize("was", ["a save", "an unfinished save"])
def test_a_save_between_any_two_operations_of_a_reader(tmp_path, old, new, was):
    """The reader finds what was there or what is there now, whichever file operation of it the save
    comes before.
    """
    directory = tmp_path / "adapter"
    template = tmp_path / "before"
    written = adapted(3, lora_alpha=4)
    save_adapter(new, template) if was == "a save" else leave_unfinished(template, old, new)
    expected, limit, count = [loaded(template), output(written)], 0, 0

    def see(frame, event, function):
        nonlocal count
        if event == "c_call" and function.__module__ in ("posix", io.open.__module__):
            count += 1
            if count == limit:
                save_adapter(written, directory)

    while count >= limit:
        limit, count = limit + 1, 0
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(template, directory)
        sys.setprofile(see)
        try:
            found = loaded(directory)
        finally:
            sys.setprofile(None)
        assert any(torch.equal(found, one) for one in expected), limit
    assert limit > 1


def save_repeatedly(model, directory):
    """In a process of its own, in which a file takes its time to be written, so that others come in
    between.
    """
    write = safetensors.torch.save_file
    safetensors.torch.save_file = lambda *args, **kwargs: (
        time.sleep(0.002) or write(*args, **kwargs)
    )
    for _ in range(40):
        save_adapter(model, directory)


@pytest.mark.nightly
def test_two_writers_and_a_reader(tmp_path, old, new):
    """Every load while two processes save, and the last one, is one of the two adapters."""
    directory, expected, appeared = tmp_path / "adapter", (output(old), output(new)), False
    with ThreadPoolExecutor() as pool:
        saves = [
            pool.submit(in_child, partial(save_repeatedly, model, directory))
            for model in (old, new)
        ]
        while not all(save.done() for save in saves):
            if appeared := appeared or (directory / CONFIG_NAME).exists():
                found = loaded(directory)
                assert any(torch.equal(found, one) for one in expected)
    assert [save.result() for save in saves] == [0, 0]
    assert any(
        torch.equal(loaded(directory), one) and near(read_by_peft(directory), one)
        for one in expected
    )
    assert sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME] and os.listdir(
        tmp_path
    ) == ["adapter"]


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """The last holder removes the file as it ends. Who waited for that one must wait for the file
    of today.
    """
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def granted_by_a_holder_that_ends(descriptor, operation):
        flock(descriptor, operation)
        if not calls:
            path.unlink()
        calls.append(descriptor)

    monkeypatch.setattr(fcntl, "flock", granted_by_a_holder_that_ends)
    with locked(path) as held, path.open("w") as another:
        assert held and len(calls) == 2
        with pytest.raises(BlockingIOError):
            flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_link_that_another_process_has_replaced_by_its_lock_stays_away(tmp_path, monkeypatch):
    """Both have found the link. The one that comes second must not remove the other's file."""
    path, flock, others = tmp_path / "lock", fcntl.flock, []
    path.symlink_to("nothing")

    def replaced_meanwhile(descriptor, operation):
        if path.is_symlink():
            path.unlink()
            others.append(path.open("w"))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    with locked(path):
        assert os.path.samestat(os.fstat(others[0].fileno()), os.lstat(path))
    others[0].close()


@pytest.mark.parametrize("fails_too", [False, True])
@pytest.mark.parametrize("place", ["at its lock", "before its lock"])
def test_a_save_that_fails_leaves_a_new_directory_to_those_that_wait(
    tmp_path, monkeypatch, old, new, place, fails_too
):
    """If they fail, too, nothing stays. The one that waits has found the directory, which is gone
    when it goes on.
    """
    directory = tmp_path / "adapter"
    main_thread = threading.current_thread()
    write = adapter_files._write_files
    waiting, reached, gone = [], threading.Event(), threading.Event()

    def fail_once(*arguments):
        if not waiting:
            waiting.append(pool.submit(save_adapter, new, directory))
            assert reached.wait(60)
        elif not fails_too:
            return write(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    def reach(function, *arguments):
        if threading.current_thread() is not main_thread:
            reached.set()
            assert place == "at its lock" or gone.wait(60)
        return function(*arguments)

    owner, name = (fcntl, "flock") if place == "at its lock" else (lock, "_open_without_links")
    monkeypatch.setattr(owner, name, partial(reach, getattr(owner, name)))
    monkeypatch.setattr(adapter_files, "_write_files", fail_once)
    with ThreadPoolExecutor() as pool:
        fail_to_save(old, directory, "No space left on device")
        gone.set()
        if fails_too:
            with pytest.raises(OSError, match="No space left on device"):
                waiting[0].result()
            assert os.listdir(tmp_path) == []
        else:
            waiting[0].result()
            assert torch.equal(loaded(directory), output(new))
            assert sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME]


def test_a_directory_that_was_there_stays_if_a_save_fails(tmp_path, monkeypatch, old):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_files, "_write_files", fail)
    for directory in (tmp_path / "empty", tmp_path / "new"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        fail_to_save(old, directory, "No space left on device")
        assert os.listdir(tmp_path) == ["empty"] and os.listdir(tmp_path / "empty") == []


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOSPC])
def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path, monkeypatch, number):
    """As in /proc, in which no file can be made, or on a full disk."""

    def fail(path, flags):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(lock, "_open_without_links", fail)
    with (
        pytest.raises(OSError, match=f"{os.strerror(number)}: .*/new/lock"),
        locked(tmp_path / "new" / "lock"),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, old, new):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    for model in (old, new):
        save_adapter(model, tmp_path / "adapter")
        assert torch.equal(loaded(tmp_path / "adapter"), output(model))
        assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG_NAME, WEIGHTS_NAME]
    assert os.listdir(tmp_path) == ["adapter"]


def test_peft_may_write_over_ours(tmp_path, old):
    save_adapter(old, tmp_path)
    save_as_peft(tmp_path)
    assert near(loaded(tmp_path), read_by_peft(tmp_path))
