"""The cost model: the rivals' sequences are the published ones, predictions behave, and pages have the model's figures."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest

pytest.importorskip("pandas", reason="tables need the bench extra")
pytest.importorskip("triton", reason="Triton is not installed on this platform")

import pandas as pd
import torch
import triton

from benchmarks.common.records import record, write_records
from benchmarks.lab.predict import __main__, bytes_moved, launch_time, layer_time, quantized
from benchmarks.lab.predict.layer_time import DIRECTIONS, ONE_OP, OURS, SEPARATE, seconds
from benchmarks.lab.predict.rivals import FROZEN, LORAFUSION, MLP, PEFT, RIVALS, Shape, rival
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.rules import Choice, choose
from stablelora_kernels.launch.dry_run import quantized_launches
from tests.helpers.processes import ROOT, printed

GPUS = {name: launch_time.load_gpu(name) for name in ("a100", "b200", "h100")}
H100 = GPUS["h100"]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Nothing runs, and the interpreter's launches would not overlap."""
    monkeypatch.setattr(backend, "INTERPRETING", False)


def page_of(*place):
    return (ROOT / "docs").joinpath(*place).read_text(encoding="utf-8")


def test_rivals_make_the_passes_that_were_published():
    """Bytes beyond the frozen layer's, in units of a square layer's activation, as r goes to nothing beside its sizes; of an
    activation between layers, and of the sum of both dX."""
    for name, dropout, passes in (
        (PEFT, True, 21),
        ("Unsloth", False, 10),
        ("Axolotl", False, 9),
        (LORAFUSION, True, 6),
    ):
        s = Shape(2**20, 2**14, 2**14, 1, dropout)
        total, frozen = (sum(work.bytes for way in RIVALS[n](s) for work in way) for n in (name, FROZEN))
        assert (total - frozen) / (2 * s.m * s.k) == pytest.approx(passes, abs=0.01), name
    m, k, f = 2**12, 2**10, 2**14
    for name, passes in ((FROZEN, 8), (PEFT, 14), ("Unsloth", 9)):
        works = [
            work for way in rival(name, MLP(m, k, f, 16)) for work in way if work.name in ("activation", "both dX")
        ]
        assert sum(work.bytes for work in works) == 2 * (passes * m * f + 3 * m * k), name


def test_the_published_ratio_is_reproduced_within_15_percent():
    """LoRAFusion over eager LoRA, the mean of 2k to 16k rows of an 8B model."""
    sizes = itertools.product((2048, 4096, 8192, 16384), ((4096, 4096), (14336, 4096), (4096, 14336)))
    shapes = [Shape(m, n, k, 16, True) for m, (n, k) in sizes]
    mean = statistics.mean(sum(seconds(H100, s, PEFT)) / sum(seconds(H100, s, LORAFUSION)) for s in shapes)
    assert mean == pytest.approx(1.27, rel=0.15) and f"predicted at {mean:.2f}x on average" in page_of(
        "internals", "predictions.md"
    )


def test_every_gpu_file_is_whole():
    for name, gpu in GPUS.items():
        content = json.loads((launch_time.GPUS / f"{name}.json").read_text())
        assert gpu.arch in DEVICES and set(content) - {"sources"} == set(launch_time.Gpu._fields) - {"efficiency"}
        assert {"bandwidth", "l2_bandwidth", "matrix_rate", "launch"} <= set(content["sources"])
    with pytest.raises(SystemExit, match="--gpu must be one of a100, b200, h100, got 'h1000'"):
        launch_time.load_gpu("h1000")


def test_predictions_are_above_the_frozen_layer_and_grow():
    for (n, k), dropout in itertools.product(((4096, 4096), (14336, 4096)), (False, True)):
        shapes = [Shape(m, n, k, 16, dropout) for m in layer_time.ROWS]
        ours, bare, frozen = (
            [sum(seconds(H100, s, arm)) for s in shapes] for arm in (OURS, layer_time.NO_OVERLAP, FROZEN)
        )
        assert ours == sorted(ours) and all(a > b for a, b in zip(ours, frozen, strict=True))
        assert all(b > a for a, b in zip(ours[4:], bare[4:], strict=True))
    # 32 programs of 132 take four times as long as all of them would.
    assert [H100.share(units) for units in (32, 132, 133, 264)] == [132 / 32, 1, 2 * 132 / 133, 1]


def test_kernels_differ_as_they_should():
    s = Shape(4096, 4096, 4096, 16, True)
    for direction in DIRECTIONS:
        pair, one = (layer_time.kernel_seconds(H100, s, direction, kernel) for kernel in ("split", "chained"))
        # One launch less; S's programs, one a processor instead of two, may have fewer bytes on their way.
        assert 0 < pair - one <= 1.001 * H100.overlapped_launch
    # A slower Triton makes the vendor win.
    s = Shape(8192, 4096, 4096, 16, False)
    assert layer_time.regret(H100._replace(l2_range=(1e15, 1e15)), s, "forward")[""]["chained"] == 0
    slow = H100._replace(efficiency=0.7)
    assert layer_time.kernel_seconds(slow, s, "forward", "vendor") < layer_time.kernel_seconds(
        slow, s, "forward", "chained"
    )
    for gpu, shape, dropout in itertools.product(GPUS.values(), layer_time.MLPS, (False, True)):
        for end in launch_time.band_ends(gpu).values():
            assert sum(seconds(end, MLP(*shape, dropout), ONE_OP)) < sum(seconds(end, MLP(*shape, dropout), SEPARATE))


@pytest.mark.parametrize("wide_adapters", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_tables_regret_over_the_band_is_bounded(dropout, wide_adapters):
    """On the GPU that the tables are for, at the worse end of each call."""
    excess = []
    for (n, k), m, r, way in itertools.product(layer_time.SIZES, layer_time.ROWS, layer_time.RANKS, DIRECTIONS):
        s = Shape(m, n, k, r, dropout, wide_adapters)
        worst = layer_time.regret(H100, s, way).max(axis=1)
        chosen = worst[choose(H100.device, layer_time.call_of(s, way)).kernel]
        assert 0 <= worst.min() <= chosen < 0.26, (s, way)
        excess.append(chosen - worst.min())
    # Beyond what no table can avoid, because the ends of the band disagree.
    assert statistics.mean(excess) < 0.015


def test_predictions_are_compared_with_what_was_measured(tmp_path):
    assert __main__.against_measured(H100, "h100", tmp_path).startswith("No measurements of an H100 SXM")
    s = Shape(8192, 4096, 4096, 16, True, False)
    sizes = {"m": 8192, "n_out": 4096, "k": 4096, "r": 16, "dropout": 0.1, "mode": "graph"}
    times = {"ours": 2 * sum(seconds(H100, s, OURS)), "eager LoRA": 0.5 * sum(seconds(H100, s, PEFT)), "chained": 1.0}
    rows = [record("a shape", "both", arm, "us", [1e6 * each]) | sizes for arm, each in times.items()]
    # What is no measurement of the device.
    rows += [rows[0] | {"median": 1.0, **more} for more in ({"dry": "dry"}, {"mode": "eager"}, {"metric": "host_us"})]
    for place in ("nvidia-h100-80gb-hbm3", "nvidia-h1000"):
        write_records(tmp_path / place / "layer.csv", rows, {})
    *_, eager, mine = __main__.against_measured(H100, "h100", tmp_path).splitlines()
    assert eager.split() == ["eager", "LoRA", "both", "1", "+100%", "+100%", "+100%", "a", "shape"]
    assert mine.split() == ["ours", "both", "1", "-50%", "-50%", "-50%", "a", "shape"]


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_the_quantized_tables_crossovers_are_the_models(kind):
    """Nowhere is the other way faster, whether dequantizing runs beside the products or takes turns with them; and where that
    decides, the choice is the one that can cost less."""
    rows = (1, 16, 64, 128, 192, 256, 320, 384, 512, 1024, 2048, 8192)
    for (n, k), m, (place, way) in itertools.product(quantized.SIZES, rows, enumerate(DIRECTIONS)):
        s = Shape(m, n, k, 16, False)
        first = quantized.seconds(H100, s, kind, "dequantize")[place]
        fast, slow = (quantized.seconds(H100, s, kind, "in_loop", overlap)[place] for overlap in (True, False))
        chosen = quantized.chosen(H100, s, kind, way)
        assert (slow > first) if chosen == "dequantize" else (fast < first), (s, way)
        assert chosen == "dequantize" or slow <= first or slow / first <= 1.02 * first / fast, (s, way)


@pytest.mark.nightly
def test_the_instructions_are_those_of_the_machine_code():
    code = """
from tests.benchmarks.lab import test_predict
print(test_predict.counts())
"""
    if triton.__version__.startswith("3.9."):
        assert printed(code).strip() == str(quantized.COUNTS)


def counts():
    """``quantized.COUNTS``, by compiling, in a process without the interpreter."""
    from benchmarks.lab.compile_report.machine_code import compile_launch, cuobjdump, sass_counts

    found = {key: {} for key in quantized.COUNTS}
    kernels = ((16, "in_loop"), (64, "in_loop"), (256, "in_loop"), (256, "dequantize"))
    for kind, (m, kernel) in itertools.product(quantized.KINDS, kernels):
        call = H100.device, m, 4096, 4096, 16, torch.bfloat16, torch.float32, 0.0, kind, Choice(kernel, "")
        for launch in (launch for way in quantized_launches(*call) for launch in way):
            if (key := quantized.key_of(launch)) and key[1] not in found[key[0]]:
                elements = (
                    launch.constants["BLOCK_N"] * launch.constants["BLOCK_K"] / (32 * launch.options["num_warps"])
                )
                one = sass_counts(cuobjdump(compile_launch(launch, "sm_90").asm["cubin"]))
                found[key[0]][key[1]] = (round(one[0] / elements, 1), round(one[1] / elements, 1))
    return found


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layer_time, "SIZES", ((4096, 4096),))
    monkeypatch.setattr(layer_time, "ROWS", (64, 8192))
    __main__.main(["--out", str(tmp_path), "--dropout", "0.1"])
    out = capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "predicted_dropout_0.1.csv")
    fast, slow = (__main__.over_frozen(rows, OURS, end) for end in ("", launch_time.SLOW))
    # Few rows are bound by bytes; many by products, which take up to 1 / 0.85 of the time at the slow end.
    few = rows.m == 64
    assert (fast == slow)[few].all() and (1.1 * fast < slow)[~few].all() and (slow <= fast / 0.85).all()
    assert (
        all(f"{low:.2f}-{high:.2f}" in out for low, high in zip(fast, slow, strict=True))
        and "PREDICTED for an H100" in out
    )
    monkeypatch.setattr(quantized, "ROWS", (1,))
    __main__.main(["--weights", "nf4"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + len(quantized.SIZES)


def test_the_stored_tables_are_the_models(monkeypatch):
    """The README's figure draws them, and the fusing guide has the MLP's ranges over the frozen MLP's time."""
    monkeypatch.setattr(layer_time, "SIZES", ((4096, 4096),))
    mlps = []
    for p in (0, 0.1):
        for name, table in (("predicted", layer_time.layer_table), ("predicted_mlp", layer_time.mlp_table)):
            stored = pd.read_csv(__main__.RESULTS / "predicted-h100" / f"{name}_dropout_{p:g}.csv")
            if name == "predicted":
                stored = stored.query("n == 4096 and k == 4096").reset_index(drop=True)
            pd.testing.assert_frame_equal(table(H100, p > 0), stored, check_dtype=False, rtol=0, atol=1e-9)
        mlps.append(stored)
    guide = page_of("guides", "fusing.md").replace("\n", " ")
    both = ("", launch_time.SLOW)
    for arm, ends in {ONE_OP: both, SEPARATE: both, "Unsloth": ("",), PEFT: ("",)}.items():
        tables = [table for table in mlps if f"{arm} forward" in table]
        found = pd.concat(__main__.over_frozen(table, arm, end) for table in tables for end in ends)
        assert f"{found.min():.2f} to {found.max():.2f}" in guide, arm


def test_the_predictions_page_has_the_models_figures(monkeypatch):
    page = page_of("internals", "predictions.md")
    for name, value in {"SIZES": ((4096, 4096),), "ROWS": (64, 512, 2048, 8192), "RANKS": (16,)}.items():
        monkeypatch.setattr(layer_time, name, value)
    rows = layer_time.layer_table(H100, True)
    arms = [(OURS, ""), (OURS, launch_time.SLOW), (PEFT, ""), ("Axolotl", ""), (LORAFUSION, "")]
    for m, *cells in zip(rows.m, *(__main__.over_frozen(rows, *arm) for arm in arms), strict=True):
        fast, slow, *rivals = (f"{cell:.2f}" for cell in cells)
        assert f"| {' | '.join([str(m), f'{fast} to {slow}', *rivals])} |" in page
    for m in (1, 128, 256, 2048):
        s = Shape(m, 4096, 4096, 16, False)
        times = [seconds(H100, s, OURS)]
        for kind in quantized.KINDS:
            times += [quantized.seconds(H100, s, kind, "in_loop", overlap) for overlap in (True, False)]
            times.append(quantized.seconds(H100, s, kind, "dequantize"))
        assert f"| {' | '.join([str(m), *(f'{1e6 * y:.0f} / {1e6 * dx:.0f}' for y, dx in times)])} |" in page
    monkeypatch.setattr(backend, "INTERPRETING", True)
    found = []
    for case in [(4096, 4096, 16, 0.1, "auto")] + [
        (ns, 4096, 16, 0.0, how) for ns in ((4096, 1024, 1024), (14336,) * 2) for how in ("together", "apart")
    ]:
        case = bytes_moved.Case(8192, *case)
        found.append(bytes_moved.whole(case, bytes_moved.launch_table(H100.device, case)))
    layer, *groups = found
    assert f"{layer['extra X, Y passes']:.1f}; {layer['extra passes']:.2f} with partial sums and small tensors" in page
    for words, together, apart in zip(
        ("q, k and v of an 8B Llama, 8,192 rows", "gate and up"), groups[::2], groups[1::2], strict=True
    ):
        figures = f"{together['launches']} launches and {together['unique'] / 1e9:.2f} GB; "
        figures += f"apart {apart['launches']} and {apart['unique'] / 1e9:.2f} GB"
        assert f"| `fuse_projections`, {words} | {figures} |" in page
