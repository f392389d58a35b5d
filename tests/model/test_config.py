"""LoRAConfig: what it refuses, and that it matches names as peft does."""

from __future__ import annotations

import pytest

from stablelora_kernels.model.apply import apply_lora
from tests.helpers.small_models import Model, lora_config, refused


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be an int, got 2.0 of type float"),
        ({"r": True}, TypeError, "r must be an int, got True"),
        ({"lora_alpha": float("nan")}, ValueError, r"lora_alpha must be a finite number in .*, got nan"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number, got '16'"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be a finite number in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout must be a finite number in \[0, 1\), got -0.1"),
        ({"target_modules": None}, ValueError, "target_modules must be a list of names, 'all-linear' or .*, got None"),
        ({"target_modules": []}, ValueError, r"target_modules must name at least one module, got \[\]"),
        ({"target_modules": ""}, ValueError, "target_modules must name at least one module, got ''"),
        ({"target_modules": "(q"}, ValueError, r"target_modules must be a regular expression, got '\(q'"),
        ({"target_modules": [1]}, TypeError, r"target_modules must be a string or a list of names, got \[1\]"),
        ({"exclude_modules": "*"}, ValueError, r"exclude_modules must be a regular expression, got '\*'"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules must be a string or a list of names, got 3"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of names or None, got the string 'head'"),
        ({"modules_to_save": [""]}, TypeError, r"modules_to_save must be a string or a list of names, got \[''\]"),
        ({"use_rslora": 1}, TypeError, "use_rslora must be a bool, got 1 of type int"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be True, False or 'gaussian', got 'pissa'"),
        ({"init_lora_weights": None}, ValueError, "init_lora_weights must be True, False or 'gaussian', got None"),
        ({"bias": "some"}, ValueError, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\] must be at least 1, got 0"),
        ({"rank_pattern": {"(": 1}}, ValueError, r"rank_pattern must be a regular expression, got '\('"),
        ({"rank_pattern": [1]}, TypeError, r"rank_pattern must be a dict of name patterns, got \[1\]"),
        ({"alpha_pattern": {"q": float("inf")}}, ValueError, r"alpha_pattern\['q'\] must be a finite number in .*, got inf"),
        ({"fan_in_fan_out": 1}, TypeError, "fan_in_fan_out must be a bool, got 1 of type int"),
    ],
)  # fmt: skip
def test_config_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        lora_config(**kwargs)


def test_config_copies_what_it_checked_and_takes_sets_and_tuples():
    names, ranks = ["q_proj"], {"q_proj": 3}
    config = lora_config(target_modules=names, rank_pattern=ranks)
    names.append("v_proj")
    ranks["q_proj"] = -1
    assert (config.target_modules, config.rank_pattern) == (["q_proj"], {"q_proj": 3})
    config = lora_config(target_modules={"v_proj", "q_proj"}, exclude_modules=("a",), rank_pattern=None)
    assert (config.target_modules, config.exclude_modules, config.rank_pattern) == (["q_proj", "v_proj"], ["a"], {})


CHOICES = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["layers.1.q_proj", "v_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": r".*\.1\..*_proj"},
    {"target_modules": r".*q_proj|lm_head"},
    {"target_modules": "All-Linear"},
    {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"layers\.0\..*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["layers.0"]},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3, "layers.0.v_proj": 5}, "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"^layers.0.q_proj": 4, r"1\.\w_proj": 0.5}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"oj": 3, ".*0.q_proj": 7, "q_proj": 1}},
]


@pytest.mark.parametrize("kwargs", CHOICES)
@pytest.mark.filterwarnings("ignore")
def test_matches_what_peft_matches(kwargs):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    theirs, ours = Model(), Model()
    try:
        peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 2, "lora_alpha": 16} | kwargs))
    except ValueError:
        with pytest.raises(ValueError, match="target_modules must match"):
            apply_lora(ours, lora_config(**kwargs))
        return
    expected = {
        name: (module.r["default"], module.lora_alpha["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    # PEFT knows the heads of transformers' models only; here the head is a layer like any other.
    report = apply_lora(ours, lora_config(**kwargs))
    assert {m.name: (m.r, m.lora_alpha, m.scaling) for m in report.replaced} == expected


def test_pefts_config_is_taken():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"], "use_rslora": True, "bias": "lora_only"}
    fields |= {"rank_pattern": {"lm_head": 2}, "exclude_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    model, other = Model(), Model()
    assert apply_lora(model, peft.LoraConfig(**fields)) == apply_lora(other, lora_config(**fields))
    for change, message in (
        ({"use_dora": True}, "the LoraConfig must use plain LoRA, got use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False or 'gaussian', got 'pissa'"),
        ({"layers_to_transform": [0]}, r"got layers_to_transform=\[0\]; write them as a regular expression"),
    ):
        with refused(other, ValueError, message):
            apply_lora(other, peft.LoraConfig(r=2, target_modules=["q_proj"], **change))
    with refused(other, ValueError, "peft_type in the IA3Config must be 'LORA'"):
        apply_lora(other, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


def test_configs_are_hashable():
    one, other = (lora_config(lora_alpha=a, rank_pattern={"a": 1, "b": 2}, modules_to_save=["x"]) for a in (16, 16.0))
    assert one == other and hash(one) == hash(other) and len({one, other, lora_config(r=3)}) == 2
