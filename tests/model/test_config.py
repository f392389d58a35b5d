"""LoRAConfig: what it refuses, and that it matches names as peft does."""

from __future__ import annotations

import re

import pytest

from stablelora_kernels.model.apply import apply_lora
from tests.helpers.small_models import Model, lora_config, refused

REFUSED = [
    ("r", 0, ValueError, "r must be at least 1, got 0"),
    ("lora_alpha", float("nan"), ValueError, "lora_alpha must be a finite number in (-inf, inf), got nan"),
    ("target_modules", None, ValueError, "must be a list of names, 'all-linear' or a regular expression, got None"),
    ("target_modules", [], ValueError, "target_modules must name at least one module, got []"),
    ("target_modules", "(q", ValueError, "target_modules must be a regular expression, got '(q'"),
    ("modules_to_save", "head", TypeError, "modules_to_save must be a list of names or None, got the string 'head'"),
    ("init_lora_weights", "pissa", ValueError, "must be True, False or 'gaussian', got 'pissa'"),
    ("bias", "some", ValueError, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
    ("rank_pattern", {"q": 0}, ValueError, "rank_pattern['q'] must be at least 1, got 0"),
    ("alpha_pattern", {"q": float("inf")}, ValueError, "alpha_pattern['q'] must be a finite number in"),
]


@pytest.mark.parametrize(("field", "value", "error", "message"), REFUSED, ids=str)
def test_config_refuses(field, value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        lora_config(**{field: value})


QV = ["q_proj", "v_proj"]
CHOICES = [
    {"target_modules": ["layers.1.q_proj", "v_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": r".*q_proj|lm_head"},
    {"target_modules": "All-Linear"},
    {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    {"target_modules": QV, "exclude_modules": r"layers\.0\..*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
    {"target_modules": QV, "modules_to_save": ["layers.0"]},
    {"target_modules": QV, "rank_pattern": {"q_proj": 3, "layers.0.v_proj": 5}, "use_rslora": True},
    {"target_modules": QV, "alpha_pattern": {"^layers.0.q_proj": 4, r"1\.\w_proj": 0.5}},
    {"target_modules": QV, "rank_pattern": {"oj": 3, ".*0.q_proj": 7, "q_proj": 1}},
]


@pytest.mark.parametrize("kwargs", CHOICES, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_matches_what_peft_matches(kwargs):
    """PEFT's own config is taken, too."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    theirs, config = Model(), peft.LoraConfig(**{"r": 2, "lora_alpha": 16} | kwargs)
    try:
        tuned = peft.get_peft_model(theirs, config)
    except ValueError:
        with pytest.raises(ValueError, match="target_modules must match"):
            apply_lora(Model(), lora_config(**kwargs))
        return
    expected = {
        name: (module.r["default"], module.lora_alpha["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    # PEFT knows the heads of transformers' models only; here the head is a layer like any other.
    report = apply_lora(Model(), lora_config(**kwargs))
    assert {m.name: (m.r, m.lora_alpha, m.scaling) for m in report.replaced} == expected
    assert report.trainable == tuned.get_nb_trainable_parameters()[0]
    assert apply_lora(Model(), config) == report


def test_pefts_configs_beyond_plain_lora_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    names = {"target_modules": ["q_proj"]}
    for config, message in (
        (peft.LoraConfig(**names, use_dora=True), "the LoraConfig must use plain LoRA, got use_dora=True"),
        (peft.LoraConfig(**names, layers_to_transform=[0]), "write them as a regular expression"),
        (peft.IA3Config(**names, feedforward_modules=[]), "peft_type in the IA3Config must be 'LORA'"),
    ):
        with refused(model := Model(), ValueError, message):
            apply_lora(model, config)
