"""The command that compares servers' log-probabilities with transformers'."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from benchmarks.lab import serving


def test_differences_are_from_the_adapter_and_from_the_base(tmp_path, capsys):
    """A server is off by 0.5 everywhere; the i-th adapter adds i to its base."""
    names = ["base", "mixture", *serving.ADAPTERS]
    kept = {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}
    save_file(kept, tmp_path / "found.safetensors")

    def serve(model: str, adapter: str | None) -> torch.Tensor | str:
        if adapter == "dora":
            return "no DoRA"
        return kept[adapter or serving.MERGED.get(model, model)] + 0.5

    serving.compare(tmp_path, serve, ["base", "merged_experts"])
    head, base, *adapters, merged = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["model", "adapter"] and base.split() == ["base", "5.0e-01", "0.00"]
    of_base = [name for name, model in serving.ADAPTERS.items() if model == "base"]
    assert [line.split()[1:] for line in adapters] == [
        [name, "refused:", "no", "DoRA"]
        if name == "dora"
        else [name, "5.0e-01", f"{names.index(name):.2f}"]
        for name in of_base
    ]
    effect = names.index("experts") - names.index("mixture")
    assert merged.split() == ["merged_experts", "5.0e-01", f"{effect:.2f}"]
