"""The judge itself: what it would run, that its harness accelerates and notices a difference, and
what it refuses.
"""

from __future__ import annotations

import io
import re
import shlex
import tarfile

import pandas as pd
import pytest

pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")

from benchmarks.common.assets import AssetError
from tests.peft_suite import __main__ as suite
from tests.peft_suite import hub

# One test that does not know of acceleration, one that does, one that fails anyway, and one that
# nobody asks for.
TESTS = """
import peft, pytest, torch

def layer():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], init_lora_weights=False))

def test_lora_forward():
    model = layer()
    x = torch.randn(3, 4)
    with model.disable_adapter():
        base = model(x)
    assert not torch.allclose(model(x), base)

def test_lora_class():
    assert type(layer().base_model.model[0]) is peft.tuners.lora.Linear

@pytest.mark.parametrize("x", [1, 2])
def test_lora_download(x):
    if x == 2:
        pytest.skip("2")
    raise OSError("no network")

def test_vblora():
    raise AssertionError("not LoRA")
"""


def sdist(path):
    with tarfile.open(path, "w:gz") as file:
        info = tarfile.TarInfo("peft-1.0/tests/test_mixed.py")
        info.size = len(TESTS)
        file.addfile(info, io.BytesIO(TESTS.encode()))
    return path


@pytest.mark.nightly
def test_the_harness_accelerates_and_a_difference_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MODELS", {})
    (tmp_path / "run").mkdir()
    suite.unpack(sdist(tmp_path / "peft.tar.gz"), tmp_path / "run")
    off, on = suite.run_both(tmp_path / "run", ["test_mixed"], suite.LORA, "torch")
    test = "tests/test_mixed.py::test_lora_"
    assert off["outcomes"] == {
        f"{test}forward": "passed",
        f"{test}class": "passed",
        f"{test}download[1]": "failed",
        f"{test}download[2]": "skipped",
    }
    assert off["counts"] == {} and on["counts"] == {
        "accelerated rows of reports": 2,
        "calls of lora_linear": 1,
    }
    different, counts = suite.compare(off["outcomes"], on["outcomes"])
    assert [*different.itertuples(name=None)] == [(f"{test}class", "passed", "failed")]
    (row,) = counts.to_dict("records")
    assert row == dict.fromkeys(suite.KINDS, "0/0") | {
        "file": "test_mixed", "passed": "2/1", "failed": "1/2", "skipped": "1/1", "different": 1,
    }  # fmt: skip


def test_a_run_that_breaks_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MODELS", {})
    (tmp_path / "run").mkdir()
    suite.unpack(sdist(tmp_path / "peft.tar.gz"), tmp_path / "run")
    monkeypatch.setattr(
        suite, "command", lambda files, keyword: [suite.sys.executable, "-c", "print('broken')"]
    )
    with pytest.raises(RuntimeError, match=r"did not run \(pytest's exit status 0\):\nbroken"):
        suite.run_both(tmp_path / "run", ["test_mixed"], suite.LORA, "torch")


def test_a_file_that_cannot_be_collected_is_no_result(tmp_path, monkeypatch):
    """pytest ends with 2 then, and the plugin has written the outcomes of no test: all alike."""
    monkeypatch.setattr(hub, "MODELS", {})
    (tmp_path / "run").mkdir()
    suite.unpack(sdist(tmp_path / "peft.tar.gz"), tmp_path / "run")
    code = f"import os, sys; open(os.environ[{suite.OUTCOMES!r}], 'w').write('{{}}'); sys.exit(2)"
    monkeypatch.setattr(suite, "command", lambda files, keyword: [suite.sys.executable, "-c", code])
    with pytest.raises(RuntimeError, match=r"did not run \(pytest's exit status 2\)"):
        suite.run_both(tmp_path / "run", ["test_mixed"], suite.LORA, "torch")


def test_without_a_network_it_fails_and_says_so(capsys, monkeypatch):
    (version,) = suite.SHA256

    def fetch(asset):
        raise AssetError(f"could not download {asset.package}=={asset.version}")

    monkeypatch.setattr(suite, "NEEDED", ())
    monkeypatch.setattr(suite.metadata, "version", lambda name: version)
    monkeypatch.setattr(suite, "fetch", fetch)
    assert suite.main(["--quick"]) == 2
    assert f"could not download peft=={version}" in capsys.readouterr().err


def test_the_extra_pins_a_release_whose_tests_are_known():
    extra = (suite.ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("peft-suite = [")
    assert re.search(r'"peft==(.+?)"', extra[2])[1] in suite.SHA256


def test_the_pages_state_the_passes_of_the_stored_table():
    counts = pd.read_csv(suite.RESULTS)
    passes = counts.passed.str.split("/", expand=True).astype(int).sum()
    assert passes[0] == passes[1] and not counts.different.any()
    (version,) = suite.SHA256
    for page in ("README.md", "docs/guides/peft.md"):
        text = (suite.ROOT / page).read_text(encoding="utf-8")
        assert re.search(
            rf"PEFT {re.escape(version)}'s own LoRA tests\b.*\b{passes[0]:,} pass", text
        ), page


def test_quick_is_a_share_of_the_files(capsys):
    assert {*suite.QUICK} < {*suite.FILES}
    assert suite.main(["--quick", "--dry"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("-k") + 1] == f"({suite.LORA}) and ({suite.QUICK_TESTS})"


def test_what_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(suite, "NEEDED", ("torch", "no_such_module"))
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--quick"])
    assert "import no_such_module: pip install -e '.[peft-suite]'" in capsys.readouterr().err
    monkeypatch.setattr(suite, "NEEDED", ())
    monkeypatch.setattr(suite.metadata, "version", lambda name: "0.1")
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--quick"])
    assert "peft 0.1 is installed, but the hash" in capsys.readouterr().err
