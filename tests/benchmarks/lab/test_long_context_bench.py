"""The count of the recipe of *Long context*, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.launches import needs_triton

pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[bench]"
)
pytest.importorskip("peft", reason="runs where peft is installed: pip install .[bench]")

from benchmarks.lab import long_context
from benchmarks.lab.long_context import OFFLOAD, RECIPE, RIVAL, SHAPES, TOKENS

ROOT = Path(__file__).resolve().parents[3]
KIB = 1 << 10
pytestmark = needs_triton


def test_the_page_has_what_the_command_prints(capsys):
    long_context.main([])
    page = (ROOT / "docs" / "guides" / "long-context.md").read_text(encoding="utf-8")
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page
    assert f"on {TOKENS:,} tokens" in page
    for shape in SHAPES.values():
        gain = RIVAL.kib(shape) / OFFLOAD.kib(shape)
        assert f"fits {gain:.1f} times the tokens of PEFT with Liger-Kernel and offload" in page
        # What waits on the host.
        on_host = 2 * shape.hidden_size * shape.num_hidden_layers
        assert f"{on_host // KIB:,} KiB" in page and f"{100_000 * on_host / KIB**3:.0f} GiB" in page


def test_the_readme_has_these_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (
        line
        for line in readme.splitlines()
        if " the peak memory of a training step of Llama 3.1 8B, " in line
    )
    shape = SHAPES["8B"]
    assert f"{TOKENS:,} tokens" in row
    assert row.endswith(f"| {RIVAL.kib(shape):.0f} KiB | | **{OFFLOAD.kib(shape):.0f} KiB** |")


def test_each_line_saves_what_its_shapes_say():
    """In KiB a token. The last layer is the peak from the loss without logits on."""
    for shape in SHAPES.values():
        before = dict(zip(RECIPE[1:], RECIPE, strict=False))
        saved = {line: before[line].kib(shape) - line.kib(shape) for line in RECIPE[1:]}
        *_, tiles, offload = RECIPE
        width, inner = 2 * shape.hidden_size / KIB, 2 * shape.intermediate_size / KIB
        # The inputs of all layers but the last one, whose input is on the GPU in its backward.
        assert saved[offload] == pytest.approx((shape.num_hidden_layers - 1) * width)
        # Of G, U, their gradients, and what else of their width is alive.
        assert 0 < saved[tiles] < 6 * inner
        # Without a checkpoint, G and U are not kept.
        fused = tiles._replace(arm=long_context.ACCELERATED + long_context.MLP_FUSED)
        assert fused.layer_kib(shape) - tiles.layer_kib(shape) == pytest.approx(2 * inner, rel=0.01)
