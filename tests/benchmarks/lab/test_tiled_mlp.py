"""The command that measures ``tile_mlp``."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
from benchmarks.lab import tiled_mlp


def test_its_rows_add_up_at_small_sizes(monkeypatch, capsys):
    sizes = {"--width": 32, "--inner": 512, "--tokens": 4096, "--rounds": 1}
    monkeypatch.setattr(
        "sys.argv", ["tiled_mlp", *(str(each) for p in sizes.items() for each in p)]
    )
    tiled_mlp.main()
    assert capsys.readouterr().out.count("tile_mlp") == 2
    rows = tiled_mlp.rows(32, 512, 4096, 1)
    by_arm = {(row[""], row["checkpointed"]): row for row in rows}
    assert [*dict.fromkeys(arm for arm, _ in by_arm)] == [*tiled_mlp.ARMS]
    x, wide, thin = (4096 * width * 4 / tiled_mlp.MIB for width in (32, 512, 16))
    # The norm's x is the caller's; it keeps a mean and a deviation of each row, and the MLP its x.
    norm = 2 * 4096 * 4 / tiled_mlp.MIB
    assert by_arm["tile_mlp", False]["kept, MiB"] == pytest.approx(x + norm)
    assert by_arm["fuse_mlp", False]["kept, MiB"] == pytest.approx(x + norm + 2 * wide + 3 * thin)
    for checkpointed in (True, False):
        peaks = {arm: by_arm[arm, checkpointed]["peak, MiB"] for arm in tiled_mlp.ARMS}
        assert peaks["tile_mlp"] < peaks["fuse_mlp"] < peaks["PEFT"]
