"""apply_lora on whole models: names matched as PEFT matches them, what is left alone and why,
counts, and its rollback.
"""

from __future__ import annotations

import re
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import stablelora_kernels as slk
from stablelora_kernels.cli import main
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.small_models import Model, fill_b, llama, lora_config, output, reasons, refused

BAD_CONFIGS = [
    ("r", 0, ValueError, "r must be at least 1, got 0"),
    (
        "lora_alpha",
        float("nan"),
        ValueError,
        "lora_alpha must be a finite number in (-inf, inf), got nan",
    ),
    (
        "target_modules",
        None,
        ValueError,
        "must be a list of names, 'all-linear' or a regular expression, got None",
    ),
    ("target_modules", [], ValueError, "target_modules must name at least one module, got []"),
    ("target_modules", "(q", ValueError, "target_modules must be a regular expression, got '(q'"),
    (
        "modules_to_save",
        "head",
        TypeError,
        "modules_to_save must be a list of names or None, got the string 'head'",
    ),
    ("init_lora_weights", "pissa", ValueError, "must be True, False or 'gaussian', got 'pissa'"),
    ("bias", "some", ValueError, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
    ("rank_pattern", {"q": 0}, ValueError, "rank_pattern['q'] must be at least 1, got 0"),
    (
        "alpha_pattern",
        {"q": float("inf")},
        ValueError,
        "alpha_pattern['q'] must be a finite number in",
    ),
    (
        "alpha_pattern",
        {"(?i)q": 1},
        ValueError,
        "alpha_pattern must be a regular expression that may follow other text",
    ),
]


def test_config_refuses_and_hashes():
    for field, value, error, message in BAD_CONFIGS:
        with pytest.raises(error, match=re.escape(message)):
            lora_config(**{field: value})
    every = {
        lora_config(rank_pattern={"q": r}, target_modules=names)
        for r in (1, 2)
        for names in (["q"], ["q", "v"], ["q"])
    }
    assert len(every) == 4


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
    peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
    theirs, config = Model(), peft.LoraConfig(**{"r": 2, "lora_alpha": 16} | kwargs)
    try:
        tuned = peft.get_peft_model(theirs, config)
    except ValueError:
        with pytest.raises(ValueError, match="target_modules must match"):
            slk.apply_lora(Model(), lora_config(**kwargs))
        return
    expected = {
        name: (module.r["default"], module.lora_alpha["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    # PEFT knows the heads of transformers' models only; here the head is a layer like any other.
    report = slk.apply_lora(Model(), lora_config(**kwargs))
    assert {m.name: (m.r, m.lora_alpha, m.scaling) for m in report.replaced} == expected
    assert report.trainable == tuned.get_nb_trainable_parameters()[0]
    assert slk.apply_lora(Model(), config) == report


# What is left alone.


def linear(**attributes):
    layer = nn.Linear(4, 4)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def with_state_hook():
    layer = nn.Linear(4, 4)
    layer.register_state_dict_post_hook(lambda *args: None)
    return layer


def peft_layer():
    layer = nn.Module()
    layer.base_layer, layer.lora_A = nn.Linear(4, 4), nn.ModuleDict({"default": nn.Linear(4, 2)})
    return layer


def with_experts():
    """As transformers 5 stores them, beside a convolution and a position embedding, which are none."""
    model = Model()
    model.experts, model.conv = nn.Module(), nn.Conv1d(3, 5, 2)
    model.experts.up, model.experts.down = (
        nn.Parameter(torch.zeros(4, *shape)) for shape in ((16, 8), (8, 16))
    )
    model.positions = nn.Parameter(torch.zeros(1, 7, 16))
    return model


class Subclass(nn.Linear):
    pass


class Headless(Model):
    def get_output_embeddings(self):
        raise NotImplementedError


def with_parts(model, **parts):
    for name, part in parts.items():
        setattr(model, name, part(model))
    return model


def odd(make):
    """A model with this layer as "odd" and a good one beside it."""
    return lambda: nn.ModuleDict({"good": nn.Linear(4, 4), "odd": make()})


SUBCLASS = "{} is a subclass of nn.Linear that a model may use without calling it"
OUT_PROJ = SUBCLASS.format("NonDynamicallyQuantizableLinear")
READ = "nn.TransformerEncoderLayer reads its weight instead of calling it in inference"
PEFTS = "it is part of a PEFT layer; accelerate_peft runs those"
INTEGERS = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
# A layer, and why "all-linear" skips which part of it.
ODD = {
    "lora": (lambda: slk.LoRALinear(4, 4), {"": "it is a LoRALinear already"}),
    "sub": (lambda: Subclass(4, 4), {"": SUBCLASS.format("Subclass")}),
    "conv1d": (lambda: type("Conv1D", (nn.Embedding,), {})(4, 4), {"": "Conv1D is not an nn.Linear"}),
    "attention": (lambda: nn.MultiheadAttention(4, 2), {".out_proj": OUT_PROJ}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(4, 2, 4), {".self_attn.out_proj": OUT_PROJ, ".linear1": READ, ".linear2": READ},
    ),
    "normed": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), {"": SUBCLASS.format("ParametrizedLinear")}),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 2),
        {"": "it holds other parameters or modules than weight and bias"},
    ),
    "replaced": (lambda: linear(forward=lambda x: x), {"": "its forward was replaced (as accelerate's hooks do)"}),
    "integers": (
        lambda: linear(weight=INTEGERS), {"": "it holds a Parameter of torch.int8, not a plain floating-point Parameter"},
    ),
    "state_hook": (with_state_hook, {"": "it has state_dict hooks"}),
    "empty": (lambda: nn.Linear(0, 4), {"": "its weight is empty, [4, 0]"}),
    "peft": (peft_layer, {".base_layer": PEFTS, ".lora_A.default": PEFTS}),
}  # fmt: skip
SHARE = 2 * 4 * 16 * 8 / sum(p.numel() for p in with_experts().parameters())
EXPERTS = (
    "it stacks matrices in up, down, as experts are stored, and has no linear layers for them: "
    f"{SHARE:.1%} of the model's weights are in such parameters and get no adapter unless target_parameters names them"
)
EXCLUDED, SAVED = "exclude_modules matches it", "it is trained whole (modules_to_save)"
ALL = {"target_modules": "all-linear"}
# A model, the config, how many layers are replaced, and what is skipped.
SKIPPED = {
    "by name": (
        Model, {"exclude_modules": ["layers.0.v_proj"], "modules_to_save": ["layers.1"]}, 1,
        {"layers.0.v_proj": EXCLUDED, "layers.1.q_proj": SAVED, "layers.1.v_proj": SAVED},
    ),
    "a second name alone": (
        lambda: with_parts(Model(), again=lambda model: model.lm_head), {"target_modules": ["again", "q_proj"]}, 2,
        {"again": "it is the same module as 'lm_head', which is not matched"},
    ),
    "a head that is not said": (Headless, ALL, 5, {}),
    "experts": (with_experts, ALL, 5, {"experts": EXPERTS}),
    "a llama's head": (llama, ALL, 14, {"lm_head": 'it is the output head, which "all-linear" leaves out'}),
    "a tied head": (
        lambda: Model(tied=True), ALL, 4, {"lm_head": "its weight is tied to 'embed', so \"all-linear\" leaves it out"},
    ),
} | {
    name: (odd(make), ALL, 1, {f"odd{part}": reason for part, reason in parts.items()})
    for name, (make, parts) in ODD.items()
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("make", "config", "replaced", "skipped"), SKIPPED.values(), ids=SKIPPED)
def test_what_is_skipped_is_reported_with_its_reason(make, config, replaced, skipped):
    model = make()
    kept = {path: model.get_submodule(path) for path in skipped}
    report = slk.apply_lora(model, lora_config(**config))
    assert len(report.replaced) == replaced and reasons(report) == skipped and not report.notes
    assert all(
        SAVED in skipped[path] or model.get_submodule(path) is module
        for path, module in kept.items()
    )


def test_a_typo_beside_a_match_is_warned_of_and_reported(recwarn):
    with pytest.warns(
        UserWarning,
        match="target_modules 'v_porj' matches nothing, while other names match 2 modules",
    ):
        report = slk.apply_lora(Model(), lora_config(target_modules=["q_proj", "v_porj"]))
    assert report.notes == ("target_modules 'v_porj' matches nothing",)
    # What matches and is skipped is no typo.
    recwarn.clear()
    slk.apply_lora(Model(), lora_config(target_modules=["q_proj", "norm", "layers.1.v_proj"]))
    assert not recwarn.list


def test_patterns_and_names_that_match_nothing_are_noted():
    patterns = {
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"k": 1},
        "exclude_modules": ["k_proj"],
    }
    assert slk.apply_lora(
        Model(), lora_config(modules_to_save=["lm_head", "score"], **patterns)
    ).notes == (
        "modules_to_save 'score' matches nothing",
        "rank_pattern 'k_proj' matches nothing",
        "alpha_pattern 'k' matches nothing",
        "exclude_modules ['k_proj'] matches nothing that target_modules does",
    )


def test_every_replaced_module_is_in_the_report():
    model = Model()
    report = slk.apply_lora(
        model,
        lora_config(r=4, lora_alpha=6, lora_dropout=0.25, rank_pattern={"layers.1.q_proj": 3}),
    )
    assert [m.name for m in report.replaced] == [
        f"layers.{i}.{n}_proj" for i in (0, 1) for n in "qv"
    ]
    assert [(m.r, m.scaling) for m in report.replaced] == [(4, 1.5), (4, 1.5), (3, 2), (4, 1.5)]
    assert [(m.in_features, m.out_features, m.lora_alpha) for m in report.replaced] == [
        (8, 8, 6)
    ] * 4
    assert all(layer.lora_dropout == 0.25 for layer in lora_layers(model).values())
    assert report.trainable == 3 * 4 * 16 + 3 * 16 and report.total == sum(
        p.numel() for p in model.parameters()
    )
    assert slk.apply_lora(Model().to("meta"), lora_config()).trainable == 4 * 2 * 16


def test_init_is_passed_on():
    model = Model()
    slk.apply_lora(model, lora_config(init_lora_weights=False))
    assert bool(model.layers[0].q_proj.lora_B.any())


def test_a_tied_module_to_save_is_trained_alone():
    model = Model(tied=True)
    report = slk.apply_lora(model, lora_config(modules_to_save=["lm_head"]))
    assert report.notes == (
        "'lm_head.weight' was tied to a module outside modules_to_save and is a copy now",
    )
    assert model.lm_head.weight is not model.embed.weight and torch.equal(
        model.lm_head.weight, model.embed.weight
    )
    assert model.lm_head.weight.requires_grad and not model.embed.weight.requires_grad


def test_a_layer_in_two_places_stays_one():
    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    report = slk.apply_lora(model, lora_config(target_modules=["q_proj"]))
    assert [m.name for m in report.replaced] == ["layers.0.q_proj"]
    assert report.notes == ("'layers.0.q_proj' is registered in 2 places and stays one layer",)
    assert (
        model.layers[0].q_proj is model.layers[1].q_proj
        and type(model.layers[1].q_proj) is slk.LoRALinear
    )
    slk.remove_lora(model)
    assert (
        type(model.layers[0].q_proj) is nn.Linear
        and model.layers[0].q_proj is model.layers[1].q_proj
    )


class Interrupt(TorchDispatchMode):
    """Ctrl-C before the operator number ``at``."""

    def __init__(self, at):
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt("by the user")
        return func(*args, **(kwargs or {}))


WITH_BIASES = lora_config(modules_to_save=["lm_head", "embed"], bias="all")
CALLS = {
    "apply_lora": (
        False,
        lambda model, path: slk.apply_lora(model, WITH_BIASES, fuse_projections=True),
    ),
    "load_adapter, new layers": (
        False,
        lambda model, path: slk.load_adapter(model, path, fuse_projections=True),
    ),
    "load_adapter, old layers": (True, slk.load_adapter),
    "merge_lora": (True, lambda model, path: slk.merge_lora(model)),
}


@pytest.mark.parametrize(("has_lora", "call"), CALLS.values(), ids=CALLS)
def test_a_call_that_is_interrupted_at_any_operator_is_rolled_back(tmp_path, has_lora, call):
    pytest.importorskip(
        "safetensors.torch", reason="runs where safetensors is installed: pip install .[test]"
    )
    source, model, calls = Model(), Model(tied=True), []
    slk.apply_lora(source, WITH_BIASES)
    fill_b(source)
    slk.save_adapter(source, tmp_path)
    if has_lora:
        slk.apply_lora(model, WITH_BIASES)
    model.layers[0].norm.weight.requires_grad_(False)
    model.layers[0].q_proj.register_forward_hook(lambda *_: calls.append(1))
    before = output(model)
    for at in count(1, 3):
        interrupt = Interrupt(at)
        calls.clear()
        try:
            # safetensors makes a ValueError of the user's interrupt.
            with (
                refused(model, (KeyboardInterrupt, ValueError), "by the user|cannot be read"),
                interrupt,
            ):
                call(model, tmp_path)
        except pytest.fail.Exception:
            break
        assert torch.equal(output(model), before) and calls == [1]
        assert bool(lora_layers(model)) == has_lora
        assert model.lm_head.weight is model.embed.weight or has_lora
    assert interrupt.seen < at


def test_a_call_that_fails_at_its_end_is_rolled_back(monkeypatch):
    """Then its attributes are there already."""

    def fail(model):
        raise OSError("at the end")

    monkeypatch.setattr("stablelora_kernels.model.apply.count_parameters", fail)
    with refused(model := Model(), OSError, "at the end"):
        slk.apply_lora(model, WITH_BIASES, fuse_projections=True)


def of_zero_3():
    """Cut by DeepSpeed, which leaves an empty placeholder."""
    model = nn.Linear(4, 4, bias=False)
    model.weight.ds_numel, model.weight.data = 16, torch.empty(0)
    return model


EDGES = {
    "nothing": (nn.Identity, 0),
    "lazy": (lambda: nn.LazyLinear(4), 0),
    "ZeRO 3": (of_zero_3, 16),
}


@pytest.mark.parametrize(("make", "count"), EDGES.values(), ids=EDGES)
def test_edges(capsys, make, count):
    slk.print_trainable_parameters(make())
    line = f"trainable params: {count} || all params: {count} || trainable%: {100 if count else 0:.4f}\n"
    assert capsys.readouterr().out == line


def calls(layers: int, directory: Path) -> dict[str, int]:
    """The calls of each action on a model of so many layers."""

    def fresh() -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(layers))})

    config = slk.LoRAConfig(r=1, target_modules=[f"layers.{i}" for i in range(layers)])
    model, other = fresh(), fresh()
    actions = {
        "apply": lambda: slk.apply_lora(model, config, fuse_projections=True),
        "save": lambda: slk.save_adapter(model, directory),
        "load": lambda: slk.load_adapter(other, directory),
        "load again": lambda: slk.load_adapter(model, directory),
        "inspect": lambda: main(["inspect", str(directory)]),
        "optimizer": lambda: slk.StableLoRAAdamW.from_model(model),
    }
    counts = dict.fromkeys(actions, 0)
    for name, action in actions.items():

        def see(frame, event, arg, name=name):
            counts[name] += event in ("call", "c_call")

        sys.setprofile(see)
        try:
            action()
        finally:
            sys.setprofile(None)
    return counts


def test_calls_grow_like_layers(tmp_path: Path) -> None:
    """Twice the layers take twice the calls, Python's and C's."""
    pytest.importorskip(
        "safetensors", reason="runs where safetensors is installed: pip install .[test]"
    )
    # What only a first run does.
    calls(2, tmp_path)
    few, twice = calls(100, tmp_path), calls(200, tmp_path)
    growth = {name: twice[name] / few[name] for name in few}
    assert all(factor < 2.2 for factor in growth.values()), growth
