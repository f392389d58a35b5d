"""The two files of an adapter are one unit: kills at every moment, two writers, mixed files."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from stablelora_kernels.cli import main
from stablelora_kernels.model.adapter_files import CONFIG_NAME, PENDING, STAMP, WEIGHTS_NAME
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from stablelora_kernels.utils import files as lock_files
from stablelora_kernels.utils.files import locked
from tests.helpers.adapters import adapted, fresh, loaded
from tests.helpers.dying import in_child, kills, needs_fork
from tests.helpers.small_models import output, refused

safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed (pip install .[test])"
)
pytestmark = needs_fork


def save_as_peft(directory):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    theirs = peft.get_peft_model(
        fresh(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    ).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    theirs.save_pretrained(directory)


def read_by_peft(directory):
    """PEFT's output with the adapter, or None if it finds none."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    try:
        return output(peft.PeftModel.from_pretrained(fresh(), directory).eval())
    except ValueError as error:
        assert "Can't find" in str(error)
        return None


def near(one, other):
    return torch.allclose(one, other, atol=1e-5)


# Kills


WAS = ["nothing", "a directory", "the same config", "another config", "PEFT's", "an unfinished save"]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("was", WAS)
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new_one(tmp_path, old, new, same_config, was, every):
    """By day at one of three operations, another one for each state of the directory."""
    directory = tmp_path / "adapter"
    template = tmp_path / "before"

    def prepare_template():
        if was == "nothing":
            return
        template.mkdir()
        (template / "README.md").write_text("kept")
        if was == "PEFT's":
            save_as_peft(template)
        elif was != "a directory":
            save_adapter(old, template)
        if was == "an unfinished save":
            save_adapter(same_config, tmp_path / "other")
            (tmp_path / "other").rename(template / PENDING)
            (template / CONFIG_NAME).unlink()

    prepare_template()
    written = same_config if was == "the same config" else new
    before = loaded(template) if was not in ("nothing", "a directory") else None
    after = output(written)
    save_adapter(written, tmp_path / "warm")  # Imports and caches are no part of a save.
    shutil.rmtree(tmp_path / "warm")

    def prepare():
        for leftover in tmp_path.iterdir():
            if leftover != template:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if template.exists():
            shutil.copytree(template, directory)

    outcomes = set()
    for _ in kills(partial(save_adapter, written, directory), prepare, 1 + WAS.index(was) % every, every):
        try:
            found = loaded(directory)
        except ValueError as error:
            assert before is None and ("nothing there" in str(error) or f"must hold {CONFIG_NAME}" in str(error))
            found = None
        assert found is before is None or torch.equal(found, after) or torch.equal(found, before)
        outcomes.add("new" if found is not None and torch.equal(found, after) else "old")
        theirs = read_by_peft(directory)
        assert theirs is None or near(theirs, after) or near(theirs, before)
        # The next save cleans up after the dead.
        save_adapter(written, directory)
        assert torch.equal(loaded(directory), after)
        assert sorted(os.listdir(directory)) == ["README.md"] * (was != "nothing") + [CONFIG_NAME, WEIGHTS_NAME]
        assert set(os.listdir(tmp_path)) <= {"adapter", "before"}
    assert outcomes == {"old", "new"}


def save_with_room(room, model, directory):
    """Save while files may grow to ``room`` bytes only, beyond which the process is killed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    save_adapter(model, directory)


def test_a_save_that_is_killed_while_it_writes(tmp_path, old, new):
    save_adapter(old, tmp_path / "adapter")
    weights = (tmp_path / "adapter" / WEIGHTS_NAME).stat().st_size
    for room in (0, 1, 8, 100, weights // 2, weights - 1):
        assert in_child(partial(save_with_room, room, new, tmp_path / "adapter")) == signal.SIGXFSZ
        assert torch.equal(loaded(tmp_path / "adapter"), output(old))
    save_adapter(new, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG_NAME, WEIGHTS_NAME]


# Several processes


def save_repeatedly(rounds, model, directory):
    for _ in range(rounds):
        save_adapter(model, directory)


def test_two_writers_and_a_reader(tmp_path, old, new):
    """Every load while two processes save, and the last one, is one of the two adapters."""
    directory = tmp_path / "adapter"
    rounds = 60
    threads = [
        threading.Thread(target=in_child, args=(partial(save_repeatedly, rounds, model, directory),))
        for model in (old, new)
    ]
    for thread in threads:
        thread.start()
    expected, loads, seen = (output(old), output(new)), 0, set()
    while any(thread.is_alive() for thread in threads):
        if directory.exists():
            found = loaded(directory)
            assert any(torch.equal(found, one) for one in expected)
            seen.add(torch.equal(found, expected[0]))
            loads += 1
    assert loads > 5 and seen == {True, False}
    found = loaded(directory)
    assert any(torch.equal(found, one) and near(read_by_peft(directory), one) for one in expected)
    assert sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME] and os.listdir(tmp_path) == ["adapter"]


def test_weights_that_are_moved_while_a_reader_looks_are_found(tmp_path, old, new, monkeypatch):
    """A saver finishes a committed save just after the reader has seen its weights in the pending directory."""
    save_adapter(old, tmp_path / "adapter")
    save_adapter(new, tmp_path / "next")
    directory, pending = tmp_path / "adapter", tmp_path / "adapter" / PENDING
    os.replace(tmp_path / "next", pending)
    (directory / CONFIG_NAME).unlink()
    is_file, moved = Path.is_file, []

    def look(path):
        there = is_file(path)
        if path == pending / WEIGHTS_NAME and there:
            os.replace(path, directory / WEIGHTS_NAME)
            os.replace(pending / CONFIG_NAME, directory / CONFIG_NAME)
            moved.append(path)
        return there

    monkeypatch.setattr(Path, "is_file", look)
    assert torch.equal(loaded(directory), output(new)) and len(moved) == 1


def die_in_lock(path):
    with locked(path):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_is_held_by_one_and_freed_by_death(tmp_path):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        for _ in range(200):
            with locked(tmp_path / "lock") as held:
                assert held
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and os.listdir(tmp_path) == []

    assert in_child(partial(die_in_lock, tmp_path / "lock")) == signal.SIGKILL
    assert os.listdir(tmp_path) == ["lock"]
    with locked(tmp_path / "lock") as held:
        assert held
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, old, new):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_files.fcntl, "flock", none)
    for model in (old, new):
        save_adapter(model, tmp_path / "adapter")
        assert torch.equal(loaded(tmp_path / "adapter"), output(model))
        assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG_NAME, WEIGHTS_NAME]
    assert os.listdir(tmp_path) == ["adapter"]


# Files of two saves


def mixed(tmp_path, old, new):
    """The config of one save beside the weights of another."""
    save_adapter(old, tmp_path / "adapter")
    save_adapter(new, tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS_NAME, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_files_of_two_saves_are_refused_by_every_reader(tmp_path, old, new, capsys):
    directory = mixed(tmp_path, old, new)
    message = (
        rf"{directory / CONFIG_NAME} and {directory / WEIGHTS_NAME} must be of one save, got a config of '\w+' and"
    )
    for model in (fresh(), adapted(5, lora_alpha=4)):
        with refused(model, ValueError, message):
            load_adapter(model, directory)
    (tmp_path / "model").mkdir()
    for argv in (
        ["inspect", str(directory)],
        ["inspect", str(directory / WEIGHTS_NAME)],
        ["merge", str(directory), "--into", str(tmp_path / "model"), "--out", str(tmp_path / "out")],
    ):
        assert main(argv) == 2
        assert "must be of one save" in capsys.readouterr().err
    # As the message says.
    content = json.loads((directory / CONFIG_NAME).read_text())
    del content["auto_mapping"][STAMP]
    (directory / CONFIG_NAME).write_text(json.dumps(content))
    load_adapter(fresh(), directory)


def test_a_config_that_is_edited_by_hand_counts(tmp_path, old):
    save_adapter(old, tmp_path)
    content = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(content | {"lora_alpha": 40}))
    stronger = adapted(1, lora_alpha=40)
    assert torch.equal(loaded(tmp_path), output(stronger))


def test_peft_may_write_over_ours_and_we_over_peft(tmp_path, old, new):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    save_adapter(old, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    assert near(output(theirs), output(old))
    theirs.save_pretrained(tmp_path)
    assert near(loaded(tmp_path), output(old))
    save_as_peft(tmp_path)
    assert near(loaded(tmp_path), read_by_peft(tmp_path))
    save_adapter(new, tmp_path)
    assert torch.equal(loaded(tmp_path), output(new)) and near(read_by_peft(tmp_path), output(new))
    # Its weights or its config alone beside ours have no stamp to contradict.
    save_as_peft(tmp_path / "theirs")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        save_adapter(adapted(2, lora_alpha=6), tmp_path / f"beside {name}")
        shutil.copy(tmp_path / "theirs" / name, tmp_path / f"beside {name}")
        assert near(loaded(tmp_path / f"beside {name}"), read_by_peft(tmp_path / f"beside {name}"))


def test_a_damaged_file_is_an_error_at_once(tmp_path, old, monkeypatch):
    save_adapter(old, tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"nonsense")
    reads, read = [], safetensors_torch.safe_open
    monkeypatch.setattr(safetensors_torch, "safe_open", lambda *args, **kw: reads.append(1) or read(*args, **kw))
    with pytest.raises(ValueError, match="must be a safetensors file, got one that cannot be read"):
        load_adapter(fresh(), tmp_path)
    assert len(reads) == 1
