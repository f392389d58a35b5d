"""``inspect``: every figure against one computed here, what is flagged, and what is refused."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.cli import files, main
from tests.cli.test_cli import fails
from tests.helpers.small_models import Model, fill_b, lora_config

safetensors = pytest.importorskip("safetensors.torch")
PREFIX = "base_model.model."


def write(directory, tensors, **config):
    """An adapter's directory with these tensors under PEFT's prefix."""
    directory.mkdir(exist_ok=True)
    safetensors.save_file({PREFIX + key: t for key, t in tensors.items()}, directory / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]} | config
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


def pair(r=2, n=5, m=3, a=1.0, b=1.0, name="q", dtype=torch.float32):
    return {
        f"{name}.lora_A.weight": torch.full((r, n), a, dtype=dtype),
        f"{name}.lora_B.weight": torch.full((m, r), b, dtype=dtype),
    }


def inspect_json(capsys, *argv, status=0):
    assert main(["inspect", "--json", *map(str, argv)]) == status
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def adapter(tmp_path):
    """One of this library's, with ranks and alphas of their own, modules_to_save, and B that is not zero."""
    torch.manual_seed(0)
    model = Model()
    config = lora_config(
        rank_pattern={"layers.1.v_proj": 3}, alpha_pattern={"q_proj": 5}, use_rslora=True, modules_to_save=["lm_head"]
    )
    slk.apply_lora(model, config)
    fill_b(model)
    slk.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_every_figure(adapter, capsys):
    path, model = adapter
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
        assert row["stable"] == (a.norm() / 8 <= b.norm() / 8).item()
        assert row["bytes"] == 4 * 2 * 8 * layer.r and row["dtype"] == "float32"
    assert {row["stable"] for row in report["pairs"]} == {True}
    totals = report["totals"]
    assert totals["pairs"] == totals["stable"] == 4
    assert totals["bytes"] == 4 * totals["parameters"] == sum(r["bytes"] for r in report["pairs"]) + 4 * 11 * 8
    assert totals["file_bytes"] == (path / "adapter_model.safetensors").stat().st_size
    (other,) = report["other_tensors"]
    assert other == {"key": "lm_head.weight", "shape": [11, 8], "dtype": "float32", "bytes": 352, "kind": "saved whole"}
    assert report["problems"] == report["beyond_plain_lora"] == []


def test_stable_is_the_papers_condition(tmp_path, capsys):
    # ||A||/n is sqrt(2 n)/n times a, ||B||/m sqrt(2 m)/m times b.
    tensors = pair(n=8, m=8, a=1, b=1, name="equal") | pair(n=8, m=8, a=1.01, b=1, name="above")
    tensors |= pair(n=2, m=8, a=1, b=1, name="narrow") | pair(a=1, b=0, name="fresh")
    report = inspect_json(capsys, write(tmp_path / "a", tensors))
    stable = {row["name"]: row["stable"] for row in report["pairs"]}
    assert stable == {"equal": True, "above": False, "narrow": False, "fresh": False}
    assert report["totals"]["stable"] == 1


def test_a_lone_file_and_low_precision(tmp_path, capsys):
    path = write(tmp_path / "a", pair(dtype=torch.bfloat16, a=3.0))
    (path / "adapter_config.json").unlink()
    report = inspect_json(capsys, path / "adapter_model.safetensors")
    (row,) = report["pairs"]
    assert row["scaling"] is None and report["config"] is None and row["dtype"] == "bfloat16" and row["bytes"] == 32
    assert row["a_frobenius"] == pytest.approx(math.sqrt(90))
    assert main(["inspect", str(path / "adapter_model.safetensors")]) == 0
    assert "scalings are not known" in capsys.readouterr().out


def test_sorting_and_limits(tmp_path, capsys):
    tensors = pair(name="layers.10.q", a=3, b=1) | pair(name="layers.2.q", r=4, a=1, b=5) | pair(name="layers.1.q", b=0)
    path = write(tmp_path / "a", tensors, rank_pattern={"layers.2.q": 4}, alpha_pattern={"layers.1.q": 60})

    def order(*argv):
        return [row["name"].split(".")[1] for row in inspect_json(capsys, path, *argv)["pairs"]]

    assert order() == ["1", "2", "10"]
    assert order("--sort", "rank") == ["2", "1", "10"]
    assert order("--sort", "a")[0] == "10" and order("--sort", "b")[0] == "2"
    # A B of zeros is infinitely far from stable.
    assert order("--sort", "ratio") == ["1", "10", "2"]
    assert order("--sort", "scaling")[0] == "1" and order("--sort", "bytes")[0] == "2"
    assert order("--limit", "2") == ["1", "2"]
    assert main(["inspect", str(path), "--limit", "1"]) == 0
    assert "… and 2 pairs more" in capsys.readouterr().out
    for value in ("0", "-1", "x"):
        assert main(["inspect", str(path), "--limit", value]) == 2
        assert f"got '{value}'" in capsys.readouterr().err


def test_what_is_wrong_is_flagged(tmp_path, capsys):
    tensors = pair(name="good") | pair(name="bad", a=float("inf")) | pair(name="rank", r=3)
    tensors["bad.lora_B.weight"][0, 0] = float("nan")
    tensors["half.lora_A.weight"] = torch.ones(2, 5)
    tensors |= {"odd.lora_A.weight": torch.ones(2, 5), "odd.lora_B.weight": torch.ones(3, 4)}
    tensors["head.weight"] = torch.full((2, 2), float("nan"))
    path = write(tmp_path / "a", tensors)
    report = inspect_json(capsys, path, status=1)
    assert [row["name"] for row in report["pairs"]] == ["bad", "good", "rank"]  # what is not finite comes first
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
    assert main(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert "NOT FINITE" in out and "Problems\n" in out and "half has lora_A [2, 5]" in out


def test_whatever_goes_beyond_plain_lora_is_named(tmp_path, capsys):
    tensors = pair() | {
        "q.lora_magnitude_vector": torch.ones(3),
        "q.lora_B.bias": torch.ones(3),
        "e.lora_embedding_A": torch.ones(2, 7),
        "c.lora_A.weight": torch.ones(2, 3, 1, 1),
        "steps": torch.arange(3),
        "q.base_layer.bias": torch.ones(3),
    }
    report = inspect_json(capsys, write(tmp_path / "a", tensors, use_dora=True, lora_bias=True, peft_version="0.1"))
    assert report["beyond_plain_lora"] == [
        "use_dora=True",
        "lora_bias=True",
        "LoRA of 4 dimensions (a convolution)",
        "LoRA on an embedding",
        "LoRA's own bias",
        "DoRA's magnitudes",
    ]
    kinds = {other["key"]: other["kind"] for other in report["other_tensors"]}
    assert kinds["steps"] == "saved whole" and kinds["q.base_layer.bias"] == "a bias"
    report = inspect_json(capsys, write(tmp_path / "b", pair(), peft_type="ADALORA"))
    assert report["pairs"][0]["scaling"] is None


@pytest.mark.parametrize("columns", [80, 120])
def test_it_fits_the_terminal(adapter, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["inspect", str(adapter[0])]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= columns
    assert "4 of 4" in out and "rank-stabilized" in out and "layers.…" in out and "lm_head.weight" in out


def test_a_peft_adapter(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(6, 4))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    tuned.save_pretrained(tmp_path / "p")
    (row,) = inspect_json(capsys, tmp_path / "p")["pairs"]
    assert (row["name"], row["scaling"], row["stable"]) == ("0", 1.5, False)


def test_what_is_refused(tmp_path, capsys, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "ADAPTER must hold adapter_config.json, got" in fails(capsys, "inspect", str(empty))
    pickle = tmp_path / "adapter_model.bin"
    pickle.write_bytes(b"\x80")
    assert "a pickle can run code, so it is refused" in fails(capsys, "inspect", str(pickle))
    (empty / "adapter_config.json").write_text("{}")
    (empty / "adapter_model.bin").write_bytes(b"\x80")
    assert "a pickle can run code, so it is refused" in fails(capsys, "inspect", str(empty))
    (empty / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert "must be a safetensors file, got one that cannot be read" in fails(capsys, "inspect", str(empty))
    (empty / "adapter_config.json").write_text("[1]")
    assert "must hold a JSON object, got a list" in fails(capsys, "inspect", str(empty))
    (empty / "adapter_config.json").write_text("{")
    assert "must be JSON, got text that is not" in fails(capsys, "inspect", str(empty))
    path = write(tmp_path / "alpha", pair(), lora_alpha="much")
    assert "lora_alpha of q must be a number, got 'much'" in fails(capsys, "inspect", str(path))
    path = write(tmp_path / "pattern", pair(), rank_pattern={"(": 1})
    assert "inspect: error: " in fails(capsys, "inspect", str(path))
    path = write(tmp_path / "list", pair(), alpha_pattern=[1])
    assert "alpha_pattern must be a dict of name patterns, got [1]" in fails(capsys, "inspect", str(path))
    assert "must be a path or a hub id like 'owner/name', got './no'" in fails(capsys, "inspect", "./no")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    good = tmp_path / "alpha"
    assert "pip install 'stablelora-kernels[adapters]'" in fails(capsys, "inspect", str(good))


def test_the_hub(tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    path, asked = write(tmp_path / "a", pair()), []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert inspect_json(capsys, "someone/an-adapter")["totals"]["pairs"] == 1
    assert asked == [("someone/an-adapter", ["adapter_config.json", "adapter_model.safetensors"])]

    def unreachable(name, allow_patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    error = fails(capsys, "inspect", "someone/an-adapter")
    assert "'someone/an-adapter' is no path on this machine, and the hub did not give it: no route" in error
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'stablelora-kernels[cli]'" in fails(capsys, "inspect", "someone/an-adapter")
    with pytest.raises(files.CommandError, match="got 'a/b/c'"):
        files.from_hub("ADAPTER", "a/b/c", ())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_alpha", 10**400, "lora_alpha of q must be a finite number in (-inf, inf), got 1000"),
        ("lora_alpha", [6], "lora_alpha of q must be a number, got [6] of type list"),
        ("rank_pattern", {"a{99999999999}": 1}, "rank_pattern must be a regular expression, got 'a{99999999999}'"),
        pytest.param(
            "rank_pattern", {"(?i)q": 1}, "rank_pattern must be a regular expression",
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 takes flags at any place"),
        ),
    ],
)  # fmt: skip
def test_fields_beyond_all_bounds_are_refused_in_one_line(tmp_path, capsys, field, value, message):
    path = write(tmp_path / "odd", pair(), **{field: value})
    error = fails(capsys, "inspect", str(path))
    assert message in error and "adapter_config.json: " in error and len(error) < 600
    with pytest.raises((TypeError, ValueError), match=r"adapter_config\.json: "):
        slk.load_adapter(nn.ModuleDict({"q": nn.Linear(5, 3)}), path)


def test_json_that_is_nested_too_deep_is_refused_in_one_line(tmp_path, capsys):
    path = write(tmp_path / "deep", pair())
    (path / "adapter_config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert "adapter_config.json must be JSON of a few levels, got it nested too deep to read" in fails(
        capsys, "inspect", str(path)
    )
    with pytest.raises(ValueError, match="nested too deep to read"):
        slk.load_adapter(nn.ModuleDict({"q": nn.Linear(5, 3)}), path)


def test_odd_texts_in_a_config_are_printed(tmp_path, capsys):
    path = write(tmp_path / "odd", pair(), target_modules=[1, None, "q"], base_model_name_or_path="\ud800", r="2")
    assert main(["inspect", str(path)]) == 1
    assert "on 1, None, q" in capsys.readouterr().out


HOSTILE = [
    "a\x1b[31m\x1b[2Kz\r\n  faked line",
    "right to left \u202e",
    "²³",
    "9" * 5000,
    "layers.10",
    "layers.9",
    "layers.007",
]


def test_names_of_a_file_neither_break_the_sort_nor_reach_the_terminal_raw(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = write(tmp_path / "hostile", {k: t for name in HOSTILE for k, t in pair(a=0.5, name=name).items()})
    listed = [row["name"] for row in inspect_json(capsys, path)["pairs"]]
    # A name with a line break is no pair's.
    assert sorted(listed) == sorted(HOSTILE[1:]) and [name for name in listed if "layers" in name] == HOSTILE[:3:-1]
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "a\\x1b[31m\\x1b[2Kz\\r\\n  faked line" in out and "right to left \\u202e" in out
    assert out.replace("\n", "").isprintable()
    write(path, pair(name=HOSTILE[1]), lora_alpha=10**400)
    assert "lora_alpha of right to left \\u202e must be" in fails(capsys, "inspect", str(path))
