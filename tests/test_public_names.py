"""Every public name can be imported from where README and docs show it, and from the modules that users imported before."""

from __future__ import annotations

import copy
import importlib
import pickle
import re

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from tests.helpers.processes import ROOT, printed

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
AUTODOC = re.compile(r"^\.\. auto\w+:: (stablelora_kernels[\w.]*)", re.MULTILINE)
ALIAS = re.compile(r"\bslk\.(\w+(?:\.\w+)*)")
# Modules that were single files before they became packages, with their public names.
FORMER_MODULES = {
    "stablelora_kernels.functional": "FLOAT_DTYPES FP8Weight NF4Weight lora_branch lora_linear lora_linear_group",
    "stablelora_kernels.model": (
        "LoRAReport MergeReport ReplacedModule SkippedModule apply_lora load_adapter merge_lora remove_lora save_adapter "
        "unmerge_lora"
    ),
    "stablelora_kernels.nn": (
        "LoRABranchLinear LoRAConv1D LoRALinear LoRAQuantizedLinear LoRAShardedLinear MergeError"
    ),
    "stablelora_kernels.optim": "PairStability StabilityLogger StableLoRAAdamW plot_stability",
    "stablelora_kernels.reference": (
        "StableAdamWRef adamw_ref dropout_keep_ref fp8_ref lora_branch_grads_ref lora_branch_ref lora_linear_grads_ref "
        "lora_linear_ref nf4_ref philox_ref shrink_ref stochastic_round_ref"
    ),
    "stablelora_kernels.tensor_parallel": "LoRAColwiseParallel LoRARowwiseParallel",
    "stablelora_kernels.testing": (
        "EPS assert_no_worse error_and_bound fp8_weight kept_for_backward make_inputs nf4_weight seed_of"
    ),
}


def names_in_pages() -> list[str]:
    names = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names |= set(AUTODOC.findall(text))
        names |= {f"stablelora_kernels.{name}" for name in ALIAS.findall(text)}
    return sorted(names)


def resolve(name: str) -> object:
    """The object of a dotted name: a module, or attributes of the longest module in it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", names_in_pages())
def test_names_in_the_docs_resolve(name):
    assert resolve(name) is not None


@pytest.mark.parametrize("module", FORMER_MODULES)
def test_former_modules_keep_their_names(module):
    for name in FORMER_MODULES[module].split():
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_every_exported_name_is_an_attribute():
    """In a fresh process: here, other tests may have imported the modules already."""
    code = "import stablelora_kernels as slk; print([name for name in slk.__all__ if not hasattr(slk, name)])"
    assert printed(code) == "[]"


@pytest.mark.parametrize("name", ["LoraConfig", "LoraLinear", "StableLoraAdamW"])
def test_pefts_spelling_gets_a_hint(name):
    with pytest.raises(
        AttributeError, match=f"has no attribute '{name}'; did you mean '{name.replace('Lora', 'LoRA')}'"
    ):
        getattr(slk, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'lora_config'$"):
        _ = slk.lora_config


def test_our_config_for_peft_gets_a_hint():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    config = slk.LoRAConfig(target_modules=["0"])
    with pytest.raises(AttributeError, match=r"a LoRAConfig is for slk.apply_lora; PEFT's .* takes a peft.LoraConfig"):
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    assert copy.copy(config) == pickle.loads(pickle.dumps(config)) == config


def test_a_report_for_the_model_gets_a_hint():
    model = nn.Sequential(nn.Linear(4, 4))
    for report in (slk.apply_lora(model, slk.LoRAConfig(target_modules=["0"])), slk.remove_lora(model)):
        with pytest.raises(AttributeError, match=r"has no attribute 'parameters': the model was changed in place"):
            torch.optim.AdamW(report.parameters())
        with pytest.raises(TypeError, match=r"is not callable: the model was changed in place"):
            report(torch.ones(4))
        assert copy.copy(report) == pickle.loads(pickle.dumps(report)) == report
