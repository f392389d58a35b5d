"""``inspect``: every figure against one computed here, what is flagged, and what is refused."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.cli import inspect, main
from tests.cli.test_cli import fails
from tests.helpers.adapters import CONFIG_NAME, WEIGHTS_NAME, adapted

safetensors = pytest.importorskip(
    "safetensors.torch", reason="runs where safetensors is installed: pip install .[test]"
)
PREFIX = "base_model.model."


def write(directory, tensors, **config):
    """An adapter's directory with these tensors under PEFT's prefix."""
    directory.mkdir(exist_ok=True)
    safetensors.save_file({PREFIX + key: t for key, t in tensors.items()}, directory / WEIGHTS_NAME)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]} | config
    (directory / CONFIG_NAME).write_text(json.dumps(content))
    return directory


def pair(r=2, n=5, m=3, a=1.0, b=1.0, name="q", dtype=torch.float32):
    return {
        f"{name}.lora_A.weight": torch.full((r, n), a, dtype=dtype),
        f"{name}.lora_B.weight": torch.full((m, r), b, dtype=dtype),
    }


def inspect_json(capsys, *argv, status=0):
    assert main(["inspect", "--json", *map(str, argv)]) == status
    return json.loads(capsys.readouterr().out)


def printed(capsys, *argv, status=0):
    assert main(["inspect", *map(str, argv)]) == status
    return capsys.readouterr().out


def test_every_figure(tmp_path, capsys, monkeypatch):
    """An adapter with ranks and alphas of its own, modules_to_save, and B that is not zero. Norms
    are sums of several parts.
    """
    monkeypatch.setattr(inspect, "_ELEMENTS", 7)
    patterns = {"rank_pattern": {"layers.1.v_proj": 3}, "alpha_pattern": {"q_proj": 5}}
    model = adapted(0, use_rslora=True, modules_to_save=["lm_head"], **patterns)
    path = tmp_path / "adapter"
    slk.save_adapter(model, path)
    report = inspect_json(capsys, path)
    rows = {row["name"]: row for row in report["pairs"]}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, slk.LoRALinear)}
    assert set(rows) == set(layers) and len(rows) == 4
    for name, layer in layers.items():
        row, a, b = rows[name], layer.lora_A.double(), layer.lora_B.double()
        assert (row["r"], row["in_features"], row["out_features"]) == (layer.r, 8, 8)
        assert row["scaling"] == pytest.approx(layer.scaling, rel=1e-12)
        assert row["a_frobenius"] == pytest.approx(a.norm().item(), rel=1e-12)
        assert row["b_norm"] == pytest.approx(b.norm().item() / 8, rel=1e-12)
        assert row["bytes"] == 4 * 2 * 8 * layer.r and row["dtype"] == "float32"
    totals = report["totals"]
    assert totals["pairs"] == totals["stable"] == 4
    assert (
        totals["bytes"]
        == 4 * totals["parameters"]
        == sum(r["bytes"] for r in report["pairs"]) + 4 * 11 * 8
    )
    assert totals["file_bytes"] == (path / WEIGHTS_NAME).stat().st_size
    (other,) = report["other_tensors"]
    assert other == {
        "key": "lm_head.weight",
        "shape": [11, 8],
        "dtype": "float32",
        "bytes": 352,
        "kind": "saved whole",
    }
    assert report["problems"] == report["beyond_plain_lora"] == []
    # The weights alone will do, with the config beside them; a pickle will not.
    assert inspect_json(capsys, path / WEIGHTS_NAME)["pairs"] == report["pairs"]
    (tmp_path / "adapter_model.bin").touch()
    message = "ADAPTER must be a directory or a safetensors file, got .*bin': a pickle can run code, so it is refused"
    assert main(["inspect", str(tmp_path / "adapter_model.bin")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_stable_is_the_papers_condition(tmp_path, capsys):
    # ||A||/n is sqrt(2 n)/n times a, ||B||/m sqrt(2 m)/m times b.
    tensors = pair(n=8, m=8, a=1, b=1, name="equal") | pair(n=8, m=8, a=1.01, b=1, name="above")
    tensors |= pair(n=2, m=8, a=1, b=1, name="narrow") | pair(a=1, b=0, name="fresh")
    report = inspect_json(capsys, write(tmp_path / "a", tensors))
    stable = {row["name"]: row["stable"] for row in report["pairs"]}
    assert stable == {"equal": True, "above": False, "narrow": False, "fresh": False}
    assert report["totals"]["stable"] == 1


@pytest.mark.parametrize(
    ("argv", "order"),
    [
        ([], ["1", "2", "10"]),
        (["--sort", "rank"], ["2", "1", "10"]),
        # A B of zeros is infinitely far from stable.
        (["--sort", "ratio"], ["1", "10", "2"]),
        (["--limit", "2"], ["1", "2"]),
    ],
    ids=" ".join,
)
def test_sorting_and_limits(tmp_path, capsys, argv, order):
    tensors = (
        pair(name="layers.10.q", a=3, b=1)
        | pair(name="layers.2.q", r=4, a=1, b=5)
        | pair(name="layers.1.q", b=0)
    )
    path = write(tmp_path / "a", tensors, rank_pattern={"layers.2.q": 4})
    assert [
        row["name"].split(".")[1] for row in inspect_json(capsys, path, *argv)["pairs"]
    ] == order


def test_what_is_wrong_is_flagged(tmp_path, capsys):
    tensors = pair(name="good") | pair(name="bad", a=float("inf")) | pair(name="rank", r=3)
    tensors["bad.lora_B.weight"][0, 0] = float("nan")
    tensors["half.lora_A.weight"] = torch.ones(2, 5)
    tensors |= {"odd.lora_A.weight": torch.ones(2, 5), "odd.lora_B.weight": torch.ones(3, 4)}
    tensors["head.weight"] = torch.full((2, 2), float("nan"))
    path = write(tmp_path / "a", tensors)
    report = inspect_json(capsys, path, status=1)
    # What is not finite comes first.
    assert [row["name"] for row in report["pairs"]] == ["bad", "good", "rank"]
    bad = report["pairs"][0]
    assert bad["stable"] is None and bad["a_frobenius"] == "inf" and bad["b_norm"] == "nan"
    assert sorted(report["problems"]) == [
        f"{PREFIX}bad.lora_A.weight holds 10 values that are not finite",
        f"{PREFIX}bad.lora_B.weight holds 1 value that is not finite",
        f"{PREFIX}head.weight holds 4 values that are not finite",
        "half has lora_A [2, 5], but no lora_B",
        "odd must have A [r, n] and B [m, r] of one r, got A [2, 5] and B [3, 4]",
        "rank has rank 3, but its config says 2",
    ]
    out = printed(capsys, path, status=1)
    assert "NOT FINITE" in out and "Problems\n" in out and "half has lora_A [2, 5]" in out


def test_whatever_goes_beyond_plain_lora_is_named(tmp_path, capsys):
    beyond = {
        "c.lora_A.weight": (torch.ones(2, 3, 1, 1), "LoRA of 4 dimensions (a convolution)"),
        "e.lora_embedding_A": (torch.ones(2, 7), "LoRA on an embedding"),
        "q.lora_B.bias": (torch.ones(3), "LoRA's own bias"),
        "q.lora_magnitude_vector": (torch.ones(3), "DoRA's magnitudes"),
    }
    plain = {
        "steps": (torch.arange(3), "saved whole"),
        "q.base_layer.bias": (torch.ones(3), "a bias"),
    }
    tensors = pair() | {key: tensor for key, (tensor, _) in (beyond | plain).items()}
    report = inspect_json(
        capsys, write(tmp_path / "a", tensors, use_dora=True, lora_bias=True, peft_version="0.1")
    )
    kinds = [kind for _, kind in beyond.values()]
    assert report["beyond_plain_lora"] == ["use_dora=True", "lora_bias=True", *kinds]
    found = {other["key"]: other["kind"] for other in report["other_tensors"]}
    assert found == {key: kind for key, (_, kind) in (beyond | plain).items()}


def test_without_safetensors(tmp_path, capsys, monkeypatch):
    """What makes every reader refuse a file is tests/model/test_save_load.py."""
    good = write(tmp_path / "good", pair())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install 'stablelora-kernels[adapters]'" in fails(capsys, "inspect", str(good))


def test_names_of_a_file_neither_break_the_sort_nor_reach_the_terminal_raw(tmp_path, capsys):
    names = ["right to left \u202e", "²³", "9" * 5000, "layers.10", "layers.9"]
    path = write(
        tmp_path / "hostile", {k: t for name in names for k, t in pair(a=0.5, name=name).items()}
    )
    listed = [row["name"] for row in inspect_json(capsys, path)["pairs"]]
    assert sorted(listed) == sorted(names) and listed.index("layers.9") < listed.index("layers.10")
    out = printed(capsys, path)
    assert "right to left \\u202e" in out and out.replace("\n", "").isprintable()
