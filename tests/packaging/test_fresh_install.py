"""The wheel in fresh environments, as a user installs it: each extra brings what it promises, and
the quick start runs.

SLK_WHEEL names a wheel to test; without it, one is built. pip needs a network, or a cache of what
it installs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import venv
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from tests.packaging.test_builds import build_wheel

pytestmark = pytest.mark.nightly

# What an environment without extras can do, and what the features begin with.
CORE = """
import torch, stablelora_kernels as slk
from torch.nn import Linear, ReLU, Sequential
def make_model():
    return Sequential(Linear(16, 16), ReLU(), Linear(16, 2))
model = make_model()
slk.apply_lora(model, ["0"], r=2, lora_alpha=4)
optimizer = slk.StableLoRAAdamW.from_model(model, lr=1e-3)
with slk.StabilityLogger(optimizer, "stability.csv", every=1):
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
def command(*arguments):
    from stablelora_kernels.cli import main
    assert main(list(arguments)) == 0
"""
# The features that each extra promises; without one, what the package alone can do.
PROMISES = {
    "": 'command("doctor")',
    "adapters": """
slk.save_adapter(model, "adapter")
slk.load_adapter(make_model(), "adapter")
command("doctor", "--interpret")
""",
    "peft": """
import peft
base = Sequential(Linear(16, 16), ReLU())
model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
assert len(slk.accelerate_peft(model).replaced) == 1
model(torch.randn(4, 16)).sum().backward()
""",
    "nvfp4": """
from compressed_tensors.compressors import decompress_module
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
made = make_model()
made[0].weight = torch.nn.Parameter(NVFP4Tensor.to_nvfp4(torch.randn(16, 16)), requires_grad=False)
assert len(slk.apply_lora(made, ["0"], r=2).replaced) == 1
made(torch.randn(4, 16)).sum().backward()
""",
}


class Environment:
    """A virtual environment that sees nothing of this repository."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def install(self, what: str) -> None:
        for command in (["install", "-q", "--disable-pip-version-check", what], ["check"]):
            done = self.run("-m", "pip", *command)
            assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        ours = ("PYTHON", "STABLELORA", "TRITON_", "VIRTUAL_ENV")
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(ours)
        }
        line = [str(self.directory / "bin" / "python"), *arguments]
        return subprocess.run(
            line, cwd=cwd or self.directory, env=environment, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("SLK_WHEEL"):
        return Path(given).resolve()
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environments(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Environment]:
    """Makes the environment of ``pip install 'stablelora-kernels[extras]'``: torch is linked, the
    extras are installed.
    """
    plain = Environment(tmp_path_factory.mktemp("fresh") / "plain")
    venv.create(plain.directory, with_pip=True, symlinks=True)
    plain.install(str(wheel))

    @cache
    def make(extras: str) -> Environment:
        if not extras:
            return plain
        environment = Environment(plain.directory.with_name(extras))
        shutil.copytree(
            plain.directory, environment.directory, symlinks=True, copy_function=os.link
        )
        environment.install(f"{wheel}[{extras}]")
        return environment

    return make


def test_the_package_alone_brings_little(
    environments: Callable[[str], Environment], wheel: Path
) -> None:
    installed = environments("").run("-m", "pip", "list", "--format=freeze").stdout
    assert f"stablelora-kernels=={wheel.name.split('-')[1]}" in installed
    assert not re.search("^(numpy|safetensors|peft|transformers|matplotlib)=", installed, re.M)


@pytest.mark.parametrize("extra", PROMISES)
def test_an_extra_brings_what_it_promises(
    extra: str, environments: Callable[[str], Environment], tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(CORE + PROMISES[extra], encoding="utf-8")
    done = environments(extra).run("program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks passed" in done.stdout or "doctor" not in PROMISES[extra]


def test_the_quick_start(environments: Callable[[str], Environment], tmp_path: Path) -> None:
    """The README's Python blocks, with exactly the extras of its first pip line."""
    from tests.docs.test_docs import write_code

    readme = ROOT / "README.md"
    line = r"pip install ['\"]?(?:stablelora-kernels|\.)(?:\[([\w,-]+)\])?"
    extras = re.search(line, readme.read_text(encoding="utf-8"))[1]
    done = environments(extras or "").run(str(write_code(readme, tmp_path)), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
