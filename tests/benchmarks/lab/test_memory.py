"""What is kept for backward: the formula against hooks, and the tables that the documentation has."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="has the MLP; the bench extra brings it")
pytest.importorskip("peft", reason="is an arm; the bench extra brings it")
pytest.importorskip("matplotlib", reason="draws; the bench extra brings it")

from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import stablelora_kernels as slk
from benchmarks.common.arms import ACCELERATED, FROZEN, MLP_FUSED, OURS, PEFT, PROJECTIONS_FUSED, adapt
from benchmarks.common.memory import saved_for_backward
from benchmarks.lab import memory
from tests.helpers.processes import ROOT

SEPARATE = "`apply_lora`, also with `fuse_projections`"
ROWS = {
    FROZEN: "frozen", PEFT: "PEFT", OURS: SEPARATE, OURS + PROJECTIONS_FUSED: SEPARATE, OURS + MLP_FUSED: "`fuse_mlp`",
    ACCELERATED + MLP_FUSED: "`fuse_mlp`",
}  # fmt: skip
# More than the 64 rows below which plain operators compute; no size divides another.
SMALL = {"M": 97, "K": 24, "F": 40, "r": 3}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    ("arm", "sizes", "device"),
    [*((arm, SMALL, "cpu") for arm in ROWS), *((arm, memory.LLAMA_8B, "meta") for arm in (FROZEN, PEFT))],
)
def test_the_formula_is_what_hooks_count(arm, sizes, device, dropout, monkeypatch):
    """Ours by the kernels in the interpreter, and PEFT's by the operator that a GPU has for dropout, whose mask is bool."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    drop = torch.native_dropout
    monkeypatch.setattr(
        nn.functional, "dropout", lambda x, p=0.5, training=True, inplace=False: drop(x, p, training)[0]
    )
    m, k, f, r = sizes.values()
    with torch.device(device):
        config = LlamaConfig(hidden_size=k, intermediate_size=f, num_attention_heads=1)
        mlp = LlamaMLP(config).to(torch.bfloat16).requires_grad_(False)
        x = torch.zeros(1, m, k, dtype=torch.bfloat16, requires_grad=True)
    adapt(nn.ModuleDict({"mlp": mlp}), arm, memory.LINEAR[-3:], r=r, dropout=dropout).train()
    with slk.use_backend("triton"):
        found = saved_for_backward(lambda: mlp(x), [*mlp.parameters()])
    kept = memory.kept(dropout > 0, **sizes).loc[ROWS[arm]].sum()
    # A frozen MLP does not keep x; of others a test's x has no other owner.
    assert found == kept


def test_the_guides_have_the_tables():
    tables = {
        "fusing": memory.mlp_table(),
        "peft": memory.layer_table(memory.layer_counts()),
        "will-it-fit": memory.fit_table(),
    }
    for name, table in tables.items():
        assert table in (ROOT / "docs" / "guides" / f"{name}.md").read_text(encoding="utf-8"), name
