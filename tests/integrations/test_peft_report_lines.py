"""Each line of accelerate_peft's report is true of the call that follows, of this library's ops and
of PEFT's own forward.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from torch import nn

import stablelora_kernels as slk
from tests.helpers.peft_models import config, make, own_forwards
from tests.helpers.quantized_weights import bnb_4bit, torchao
from tests.helpers.small_models import IDS, llama

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
hotswap = pytest.importorskip(
    "peft.utils.hotswap", reason="peft is not installed (pip install .[test])"
)
FUSIONS = ("fuse_projections", "fuse_mlp")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Setting(NamedTuple):
    """PEFT's options, a change of the model before the report, and what the report must say of
    projections and of MLPs.
    """

    options: dict[str, Any]
    of_groups: str
    of_mlps: str
    change: Callable[[Any], Any] = lambda model: None
    base: Callable[[Any], Any] = lambda model: model

    def of(self, fusion: str) -> str:
        return self.of_groups if fusion == "fuse_projections" else self.of_mlps


def adds(*active: str, **options: Any) -> Callable[[Any], None]:
    """The change that adds an adapter "more", after which ``active`` are active."""

    def change(model: Any) -> None:
        model.add_adapter("more", config(**{"target_modules": TARGETS} | options))
        model.base_model.set_adapter([*active])

    return change


def disables(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def prepares_for_hotswap(model: Any) -> None:
    """A second report comes after it: the layers are accelerated already."""
    slk.accelerate_peft(model)
    hotswap.prepare_model_for_compiled_hotswap(model)


def in_4_bits(model):
    """``model`` with each nn.Linear but the head in NF4."""
    for parent in [module for module in model.model.modules() if module._modules]:
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, bnb_4bit(child))
    return model


FUSED = "fused projections: 2 x (q_proj, k_proj, v_proj); 2 x (gate_proj, up_proj)"
NOT_FUSED = "projections that are not fused: 2 x (q_proj, k_proj, v_proj): 'q_proj' "
ONE_OP, NOT_IN_ONE_OP = "computed in one op each: 2 x gated MLP (silu)", "mlp: 'gate_proj' "
NO_ADAPTER = "mlp: no projection has an active adapter"
BY_ITSELF = "computes adapter 'default', which is DoRA, by itself"
BY_PEFT = "runs PEFT's own forward: "
DROPS = f"{BY_PEFT}adapter 'default' is DoRA with dropout"
BESIDE = f"{BY_PEFT}adapter 'default' is DoRA beside another active adapter"
SCALED = f"{BY_PEFT}the scaling of adapter 'default' is a Tensor"
SETTINGS = {
    "LoRA": Setting({}, FUSED, ONE_OP),
    "LoRA with dropout": Setting({"lora_dropout": 0.3}, FUSED, ONE_OP),
    "biases of B": Setting({"lora_bias": True}, FUSED, f"{NOT_IN_ONE_OP}has a bias in lora_B"),
    "two adapters": Setting({}, FUSED, f"{NOT_IN_ONE_OP}has 2 active adapters", adds("default", "more")),
    "on q alone": Setting({}, "'k_proj' has no active adapter", NO_ADAPTER, adds("more", target_modules=["q_proj"])),
    "DoRA": Setting({"use_dora": True}, NOT_FUSED + BY_ITSELF, NOT_IN_ONE_OP + BY_ITSELF),
    "DoRA with dropout": Setting({"use_dora": True, "lora_dropout": 0.3}, NOT_FUSED + DROPS, NOT_IN_ONE_OP + DROPS),
    "DoRA beside LoRA": Setting({"use_dora": True}, NOT_FUSED + BESIDE, NOT_IN_ONE_OP + BESIDE, adds("default", "more")),
    "LoRA on a layer of DoRA": Setting({"use_dora": True}, FUSED, ONE_OP, adds("more")),
    "merged": Setting({}, f"{NOT_FUSED}is merged", f"{NOT_IN_ONE_OP}is merged", lambda model: model.merge_adapter()),
    "disabled": Setting({}, f"{NOT_FUSED}is disabled", f"{NOT_IN_ONE_OP}is disabled", disables),
    "prepared for hotswapping": Setting({}, NOT_FUSED + SCALED, NOT_IN_ONE_OP + SCALED, prepares_for_hotswap),
    "float8": Setting(
        {}, f"{NOT_FUSED}has a quantized weight", f"{NOT_IN_ONE_OP}has a quantized weight",
        base=lambda model: torchao(model, "Float8WeightOnlyConfig"),
    ),
    "NF4": Setting(
        {}, f"{NOT_FUSED}has a quantized weight", f"{NOT_IN_ONE_OP}has a quantized weight", base=in_4_bits,
    ),
}  # fmt: skip


def claimed(note: str) -> Counter[int]:
    """How many groups of how many projections a note counts."""
    listed = re.findall(r"(\d+) x \(([^)]*)\)", note)
    return Counter({len(names.split(", ")): int(count) for count, names in listed})


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_lines_are_true_of_the_next_call(setting, fusion, calls):
    model = make(
        model=setting.base(llama(pad_token_id=0)), target_modules=TARGETS, **setting.options
    ).train()
    setting.change(model)
    report = slk.accelerate_peft(model, **{fusion: True})
    assert setting.of(fusion) in str(report)
    with own_forwards() as layers:
        model(IDS)
    names = {id(module): name for name, module in model.named_modules()}
    own = {names[id(layer)] for layer in layers}
    groups, mlps = Counter[int](), 0
    for note in report.notes:
        if note.startswith("fused projections: "):
            groups += claimed(note)
        elif note.startswith("computed in one op each: "):
            mlps += int(note.split()[5])
        elif (reason := re.search(f"'(\\w+)' ({BY_PEFT}|computes .* by itself)", note)) is not None:
            assert any(name.endswith(reason[1]) for name in own) == reason[2].endswith(BY_PEFT), (
                note
            )
    assert groups == Counter(calls.groups) and mlps == len(calls.mlps)
    # What a line says of a layer, if all its adapters are in use.
    replaced, skipped = ({row.name for row in rows} for rows in (report.replaced, report.skipped))
    if not any(
        state in setting.of_groups for state in ("is merged", "is disabled", "no active adapter")
    ):
        beside = any(
            note.startswith("PEFT's own forward computes DoRA beside") for note in report.notes
        )
        assert own == (replaced if beside else skipped)
