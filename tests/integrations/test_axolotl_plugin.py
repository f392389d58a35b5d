"""Axolotl's plugin: its keys, what it refuses, and the model that it accelerates. Axolotl itself pins
other versions of nearly everything, so a stub stands for its base class; where Axolotl is
installed, the stub is compared with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest

from stablelora_kernels.integrations.peft.layers import Accelerated
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from tests.helpers.trainer_runs import llama

BASE = "axolotl.integrations.base"
PLUGIN = "stablelora_kernels.integrations.axolotl"
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class StubPlugin:
    """The methods of Axolotl 0.19's BasePlugin that the plugin overrides."""

    def register(self, cfg: dict) -> None: ...

    def get_input_args(self) -> str | None: ...

    def post_lora_load(self, cfg: Any, model: Any) -> None: ...


class Settings(dict):
    """As Axolotl's DictDefault: a dictionary whose missing keys are None."""

    def __missing__(self, key: str) -> None:
        return None


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    """The plugin's module, on the stub."""
    for name in ("axolotl", "axolotl.integrations", BASE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[BASE].BasePlugin = StubPlugin  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    module = importlib.import_module(PLUGIN)
    monkeypatch.delitem(sys.modules, PLUGIN)
    return module


def settings(**options: Any) -> Settings:
    return Settings({"adapter": "lora", "plugins": [f"{PLUGIN}.Plugin"], "stablelora": options})


def test_it_accelerates_the_model_with_the_options(module, capsys):
    model = llama("peft")
    cfg = settings(fuse_projections=True)
    plugin = module.Plugin()
    plugin.register(cfg)
    plugin.post_lora_load(cfg, model)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert layers and all(isinstance(layer, Accelerated) for layer in layers)
    out = capsys.readouterr().out
    assert out.startswith("accelerate_peft: LoRA on 4 modules")
    groups = [m for m in model.modules() if ATTRIBUTE in vars(m)]
    assert groups


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_prints(module, capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    module.Plugin().post_lora_load(settings(), llama("peft"))
    assert ("accelerate_peft: LoRA on 4 modules" in capsys.readouterr().out) == (rank == "0")


def test_axolotls_own_kernels_stay_off(module):
    """Axolotl switches them on where none of the keys is set, and they would replace ours."""
    cfg = settings()
    module.Plugin().register(cfg)
    assert [cfg[key] for key in KERNELS] == [False] * 3
    for key in KERNELS:
        with pytest.raises(ValueError, match=f"{key} must be false with {PLUGIN}, got True"):
            module.Plugin().register(settings() | {key: True})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stablelora": {"fuse_mpl": True}}, TypeError, "stablelora has no argument 'fuse_mpl'; did you mean 'fuse_mlp'"),
        ({"stablelora": {"fuse_mlp": "yes"}}, TypeError, "fuse_mlp must be a bool, got 'yes'"),
        ({"stablelora": ["fuse_mlp"]}, TypeError, r"stablelora must map keywords .* got \['fuse_mlp'\]"),
        ({"adapter": None}, ValueError, "adapter must be lora or qlora with .*, got None"),
        ({"adapter": "llama-adapter"}, ValueError, "adapter must be lora or qlora with .*, got 'llama-adapter'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_loaded(module, changes, error, message):
    with pytest.raises(error, match=message):
        module.Plugin().register(Settings(settings() | changes))


@pytest.mark.parametrize("section", [{}, {"stablelora": None}], ids=["none", "empty"])
def test_no_section_means_the_defaults(module, section):
    cfg = Settings(adapter="qlora", **section)
    module.Plugin().register(cfg)
    model = llama("peft")
    module.Plugin().post_lora_load(cfg, model)
    assert any(isinstance(m, Accelerated) for m in model.modules())


@pytest.mark.parametrize("kind", ["a reference model", "a run that merges"])
def test_what_trains_no_adapter_stays_as_it_is(module, kind, capsys):
    model = llama("peft")
    cfg = settings()
    if kind == "a reference model":
        model = model.unload()
    else:
        cfg["merge_lora"] = True
    before = {name: type(m) for name, m in model.named_modules()}
    module.Plugin().post_lora_load(cfg, model)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert not capsys.readouterr().out


def test_its_keys_enter_axolotls_schema(module):
    """Axolotl derives its own pydantic class from the one that is named."""
    name = module.Plugin().get_input_args()
    assert name == f"{PLUGIN}.Args"
    args = getattr(module, name.rpartition(".")[2])(stablelora={"fuse_mlp": True})
    assert args.model_dump() == {"stablelora": {"fuse_mlp": True}}
    assert args.__class__().stablelora is None


def test_the_stub_has_the_signatures_of_the_installed_axolotl():
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("runs where axolotl is installed; it pins its own versions of torch and peft")
    base = importlib.import_module(BASE)
    for name in ("register", "get_input_args", "post_lora_load"):
        installed = inspect.signature(getattr(base.BasePlugin, name))
        stub = inspect.signature(getattr(StubPlugin, name))
        assert list(installed.parameters) == list(stub.parameters), name
