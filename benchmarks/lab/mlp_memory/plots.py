"""The picture of the guide: what an MLP of an 8B Llama keeps, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.memory import MIB
from benchmarks.common.plot_style import BLUE, GREEN, GREY, RED, STYLE, plt, save
from benchmarks.common.tables import RESULTS
from benchmarks.lab.mlp_memory.formula import ACT, COPIES, GROUPS, MASKS, SMALL, G, H, U, X, kept
from benchmarks.lab.mlp_memory.report import DTYPE, LLAMA_8B, ROWS, mib

PLOT = RESULTS.parents[1] / "docs" / "_static" / "fused-mlp-memory.png"
COLORS = {
    X: GREY, G: BLUE, U: "#7fb0dc", ACT: "#f0a202", H: "#e07a3f", COPIES: RED, MASKS: "#7a1f3d", SMALL: GREEN,
}  # fmt: skip


def draw(path: Path = PLOT) -> Path:
    rows = {name.replace("`", ""): arm for name, arm in ROWS.items()}
    labels = [name.replace(", also with", ",\nalso with").replace(", Liger", ",\nLiger") for name in rows]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(11.0, 4.3), layout="constrained", sharex=True, sharey=True)
        for axis, dropout in zip(panels, (False, True), strict=True):
            for place, arm in enumerate(rows.values()):
                value = mib(arm, dropout)
                if value is None:
                    axis.text(0, place, " its function has no dropout", va="center", fontsize=9, color="#555555")
                    continue
                terms, left = kept(arm, DTYPE, dropout, gpu=True), 0.0
                for group in GROUPS:
                    width = LLAMA_8B.bytes(terms.get(group, {})) / MIB
                    axis.barh(place, width, left=left, color=COLORS[group], height=0.66)
                    left += width
                axis.text(value, place, f" {value:,.0f}", va="center", fontsize=9)
            axis.set(title="dropout" if dropout else "no dropout", xlabel="MiB kept for backward by one MLP")
            axis.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(rows)), labels)
        panels[0].set_xlim(
            0, 1.12 * max(value for arm in rows.values() for p in (False, True) if (value := mib(arm, p)))
        )
        panels[0].invert_yaxis()
        # S is too thin to be seen.
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[group]) for group in GROUPS if group != SMALL]
        names = {H: "H = act(G) ∘ U", COPIES: "float32 copies of X and H"}
        shown = [names.get(group, group) for group in GROUPS if group != SMALL]
        figure.legend(handles, shown, loc="outside lower center", ncols=len(shown), fontsize=9)
    return save(figure, path)
