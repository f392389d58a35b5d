"""The cost model: the rivals' sequences are the published ones, and predictions behave."""

from __future__ import annotations

import ast
import itertools
import json

import pytest

pytest.importorskip("pandas", reason="tables need the bench extra")
pytest.importorskip("triton", reason="Triton is not installed on this platform")

import pandas as pd
import triton

from benchmarks.lab.compile_report import report
from benchmarks.lab.compile_report.machine_code import sass_counts
from benchmarks.lab.predict import __main__, bytes_moved, ceilings, launch_time, layer_time, quantized
from benchmarks.lab.predict.rivals import MLP, RIVALS, Shape, rival_mlp, rival_seconds
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.problem import DEVICES
from tests.helpers.processes import ROOT, printed

H100 = ceilings.load_gpu("h100")


@pytest.mark.parametrize(
    ("name", "dropout", "passes"),
    [("eager (PEFT)", True, 21), ("Unsloth", False, 10), ("Axolotl", False, 9), ("LoRAFusion", True, 6)],
)
def test_rivals_make_the_passes_that_peers_says(name, dropout, passes):
    """Bytes beyond the frozen layer's, in units of a square layer's activation, as r goes to nothing beside its sizes."""
    s = Shape(2**20, 2**14, 2**14, 1, dropout)
    total, frozen = (sum(work.bytes for works in RIVALS[n](s) for work in works) for n in (name, "frozen"))
    assert (total - frozen) / (2 * s.m * s.k) == pytest.approx(passes, abs=0.01)


def test_the_published_ratio_is_reproduced():
    line = __main__.check_published(H100)
    assert "within 15%" in line and "NOT" not in line
    # Half the bandwidth makes passes dear and the ratio wrong: the check can fail.
    assert "NOT within 15%" in __main__.check_published(H100._replace(bandwidth=H100.bandwidth / 2))


@pytest.mark.parametrize("gpu", ["h100", "a100", "b200"])
def test_every_gpu_file_is_whole(gpu):
    loaded = ceilings.load_gpu(gpu)
    assert loaded.arch in DEVICES
    content = json.loads((ceilings.GPUS / f"{gpu}.json").read_text())
    assert set(content) - {"sources"} == set(ceilings.Gpu._fields) - {"efficiency"}
    assert {"bandwidth", "l2_bandwidth", "matrix_rate", "launch"} <= set(content["sources"])


def test_unknown_gpu():
    with pytest.raises(SystemExit, match="--gpu must be one of a100, b200, h100, got 'h1000'"):
        ceilings.load_gpu("h1000")


@pytest.mark.parametrize("dropout", [False, True])
def test_predictions_are_above_the_frozen_layer_and_grow(dropout):
    for n, k in ((4096, 4096), (14336, 4096)):
        before = 0.0
        for m in layer_time.ROWS:
            s = Shape(m, n, k, 16, dropout)
            whole = sum(layer_time.ours(H100, s))
            assert whole > sum(rival_seconds(H100, works) for works in RIVALS["frozen"](s))
            assert whole >= before
            before = whole


def test_regret_is_the_distance_to_the_fastest_at_each_end(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    for s in (Shape(8, 4096, 4096, 16, False), Shape(8192, 4096, 14336, 64, False)):
        for direction in ("forward", "backward"):
            found = layer_time.regret(H100, s, direction)
            for end, fastest, more in zip(ceilings.band_ends(H100), found.fastest, found.at_ends, strict=True):
                times = layer_time.best(end, s, direction)
                assert times[fastest] == min(times.values())
                assert more == pytest.approx(times[found.kernel] / times[fastest] - 1) and more >= 0
            assert found.worst >= found.least >= 0
    assert "fused" not in layer_time.best(H100, Shape(64, 64, 64, 16, True), "forward")
    assert "fused" not in layer_time.best(H100, Shape(64, 64, 64, 65, False), "backward")


@pytest.mark.parametrize("wide_adapters", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_tables_regret_over_the_band_is_bounded(dropout, wide_adapters, monkeypatch):
    """On the GPU that the tables are for, at the worse end of each call."""
    # Nothing runs, and the interpreter's launches would not overlap.
    monkeypatch.setattr(backend, "INTERPRETING", False)
    excess = []
    for n, k in layer_time.SIZES:
        for m, r, direction in itertools.product(layer_time.ROWS, layer_time.RANKS, ("forward", "backward")):
            found = layer_time.regret(H100, Shape(m, n, k, r, dropout, wide_adapters), direction)
            assert found.worst < 0.26, (m, n, k, r, direction, found)
            excess.append(found.worst - found.least)
    # Beyond what no table can avoid, because the ends of the band disagree.
    assert sum(excess) / len(excess) < 0.015


def test_idle_processors_count():
    """32 programs of 132 take four times as long as all of them would, in operations and in what one can read."""
    s = Shape(128, 4096, 4096, 16, False)
    assert [H100.share(units) for units in (32, 132, 133, 264)] == [132 / 32, 1, 2 * 132 / 133, 1]
    assert layer_time.ours(H100, s)[0] < 1.3 * H100.launch + 1.6 * launch_time.vendor_seconds(H100, 128, 4096, 4096)


def test_one_launch_costs_a_launch_less(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    for direction in ("forward", "backward"):
        s = Shape(4096, 4096, 4096, 16, True)
        pair, one = (layer_time.kernel_seconds(H100, s, direction, kernel) for kernel in ("split", "chained"))
        # S's programs, one a processor instead of two, may have fewer bytes on their way.
        assert 0 < pair - one <= 1.001 * H100.overlapped_launch


@pytest.mark.parametrize("dropout", [False, True])
def test_without_overlap_it_takes_longer(dropout, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    for m in (2048, 16384):
        s = Shape(m, 4096, 4096, 16, dropout)
        planned, bare = sum(layer_time.ours(H100, s)), layer_time.without_overlap(H100, s)
        # The second read of dY, dA's of X, and two launches' gaps.
        least = 2 * H100.launch + 2 * m * 4096 * 2 / H100.bandwidth
        assert planned < bare < planned + 2 * least


def test_a_slower_triton_makes_the_vendor_win():
    s = Shape(8192, 4096, 4096, 16, False)
    for efficiency, expected in ((1.0, "chained"), (0.7, "vendor")):
        times = layer_time.best(H100._replace(efficiency=efficiency), s, "forward")
        assert min(times, key=times.__getitem__) == expected


def test_predictions_are_compared_with_what_was_measured(tmp_path):
    assert __main__.against_measured(H100, "h100", tmp_path).startswith("No measurements of an H100 SXM")
    s = Shape(8192, 4096, 4096, 16, True, False)
    columns = "m,n,k,r,dropout,mode,direction,arm,status,us,dry\n"
    shape = "8192,4096,4096,16,0.1,"
    ours, eager = (
        sum(layer_time.ours(H100, s)),
        sum(rival_seconds(H100, works) for works in RIVALS["eager (PEFT)"](s)),
    )
    rows = [
        f"{shape}graph,both,ours,ok,{2e6 * ours},",
        f"{shape}graph,both,eager,ok,{0.5e6 * eager},",
        # What is no measurement of the device, or has no prediction.
        f"{shape}graph,both,ours,ok,1,dry",
        f"{shape}eager,both,ours,ok,1,",
        f"{shape}graph,both,ours,failed,,",
        f"{shape}graph,both,compiled,ok,1,",
    ]
    for place in ("nvidia-h100-80gb-hbm3", "nvidia-h1000"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "layer.csv").write_text(columns + "\n".join(rows) + "\n")
    *_, eager, mine = __main__.against_measured(H100, "h100", tmp_path).splitlines()
    shape = "M 8192 N 4096 K 4096 r 16 dropout 0.1"
    assert eager.split(maxsplit=5) == ["eager", "both", "1", "+100%", "+100%", shape]
    assert mine.split(maxsplit=5) == ["ours", "both", "1", "-50%", "-50%", shape]


@pytest.mark.parametrize(("n", "k"), quantized.SIZES)
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_the_quantized_tables_crossovers_are_the_models(kind, n, k, monkeypatch):
    """Nowhere is the other way faster, whether dequantizing runs beside the products or takes turns with them; and where that
    decides, the choice is the one that can cost less."""
    monkeypatch.setattr(backend, "INTERPRETING", False)
    for m, (place, direction) in itertools.product(quantized.ROWS, enumerate(quantized.DIRECTIONS)):
        s = Shape(m, n, k, 16, False)
        first = quantized.seconds(H100, s, kind, "dequantize")[place]
        loops = [quantized.seconds(H100, s, kind, "in_loop", overlap)[place] for overlap in (True, False)]
        chosen = quantized.chosen(H100, s, kind, direction)
        assert chosen == "in_loop" or max(loops) > first, (m, direction)
        assert chosen == "dequantize" or min(loops) < first, (m, direction)
        if chosen == "in_loop" and max(loops) > first:
            assert max(loops) / first <= 1.02 * first / min(loops), (m, direction)
        assert quantized.seconds(H100, s, kind)[place] in (first, loops[0])


def test_few_rows_of_4_bits_are_no_slower_than_plain_ones_and_far_from_their_bytes(monkeypatch):
    """A quarter of the bytes, but an element's instructions take as long as its bytes in 16 bits."""
    monkeypatch.setattr(backend, "INTERPRETING", False)
    s = Shape(1, 4096, 4096, 16, False)
    plain, low = layer_time.ours(H100, s)[0], quantized.seconds(H100, s, "nf4")[0]
    assert 0.7 * plain < low < plain


@pytest.mark.nightly
@pytest.mark.skipif(
    not triton.__version__.startswith(f"{report.TRITON}."),
    reason="counted in the code of the report's compiler",
)
def test_the_instructions_are_those_of_the_machine_code():
    out = printed("from benchmarks.lab.predict.quantized import main; main(['--count'])")
    assert ast.literal_eval("{" + out + "}") == quantized.COUNTS


def test_counting_instructions():
    """Of the innermost loop with matrix instructions, the largest; padding and what only waits are none."""
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E [R5], desc[UR4][R2.64] ;
        /*0030*/              @!P0 STS.128 [R7], R8 ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/               @P1 BRA 0x20 ;
        /*0070*/                   HMMA.16816.F32 R4, R4, R6, R8 ;
        /*0080*/               @P2 BRA 0x70 ;
        /*0090*/               @P3 BRA 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   NOP ;
    """
    assert sass_counts(text) == (4, 2)
    assert sass_counts(text.replace("HGMMA", "FFMA").replace("HMMA", "FADD")) == (10, 3)


def test_quantized_command(capsys, monkeypatch):
    monkeypatch.setattr(quantized, "SIZES", ((4096, 4096),))
    monkeypatch.setattr(quantized, "ROWS", (1, 8192))
    quantized.main([])
    printed = capsys.readouterr().out
    assert printed.startswith("All times are PREDICTED for an H100 SXM in bf16, r 16, us; none is measured.")
    assert printed.count("dequantized first is faster from") == 4


def test_rival_mlps_make_the_activations_passes():
    """Beyond three layers: PEFT passes over [M, F] 14 times and Unsloth 9 times, and both add dX of [M, K] up."""
    m, k, f = 2**12, 2**10, 2**14
    for name, passes in (("frozen", 8), ("eager (PEFT)", 14), ("Unsloth", 9)):
        ways = rival_mlp(name, MLP(m, k, f, 16))
        found = [work for way in ways for work in way if work.name in ("activation", "both dX")]
        assert sum(work.bytes for work in found) == 2 * (passes * m * f + 3 * m * k)


@pytest.mark.parametrize("gpu", ["h100", "a100", "b200"])
@pytest.mark.parametrize("dropout", [False, True])
def test_one_op_takes_less_than_three_layers(gpu, dropout):
    """At both ends of the band, forward and backward together."""
    for shape in __main__.MLPS:
        for end in ceilings.band_ends(ceilings.load_gpu(gpu)):
            one, three = (layer_time.mlp_seconds(end, MLP(*shape, dropout), arm) for arm in ("one op", "three layers"))
            assert sum(one) < sum(three), shape


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(__main__, "SIZES", ((4096, 4096),))
    monkeypatch.setattr(__main__, "ROWS", (64, 8192))
    __main__.main(["--out", str(tmp_path), "--dropout", "0.1"])
    printed = capsys.readouterr().out
    assert printed.startswith("All times are PREDICTED for an H100 SXM in bf16, dropout 0.1; none is measured.")
    assert "published 1.27x mean" in printed
    rows = pd.read_csv(tmp_path / "predicted_dropout_0.1.csv")
    assert len(rows) == 2 * len(layer_time.RANKS)
    fast, slow = (__main__.over_frozen(rows, "ours", end) for end in ("", ceilings.SLOW))
    # Few rows are bound by bytes; many by products, which take up to 1 / 0.85 of the time at the slow end.
    few = rows.m == 64
    assert (fast == slow)[few].all() and (1.1 * fast < slow)[~few].all() and (slow <= fast / 0.85).all()
    for low, high in zip(fast[rows.r == 16], slow[rows.r == 16], strict=True):
        assert f"{low:.2f}-{high:.2f}" in printed
    mlps = pd.read_csv(tmp_path / "predicted_mlp_dropout_0.1.csv")
    assert len(mlps) == len(__main__.MLPS) and "Unsloth forward" not in mlps
    assert (mlps["one op forward"] <= mlps["one op forward (slow)"]).all()
    with pytest.raises(SystemExit):
        __main__.main(["--efficiency", "0"])


def test_the_stored_tables_are_the_models(monkeypatch):
    """The README's figure draws them."""
    monkeypatch.setattr(backend, "INTERPRETING", False)
    monkeypatch.setattr(__main__, "SIZES", ((4096, 4096),))
    for p in (0, 0.1):
        for name, table in (("predicted", __main__.layer_table), ("predicted_mlp", __main__.mlp_table)):
            stored = pd.read_csv(__main__.RESULTS / "predicted-h100" / f"{name}_dropout_{p:g}.csv")
            if name == "predicted":
                stored = stored.query("n == 4096 and k == 4096").reset_index(drop=True)
            pd.testing.assert_frame_equal(table(H100, p > 0), stored, check_dtype=False, rtol=0, atol=1e-9)


def test_the_predictions_page_has_the_models_figures(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    page = (ROOT / "docs" / "internals" / "predictions.md").read_text(encoding="utf-8")
    for name, value in {"SIZES": ((4096, 4096),), "ROWS": (64, 512, 2048, 8192), "RANKS": (16,)}.items():
        monkeypatch.setattr(__main__, name, value)
    rows = __main__.layer_table(H100, True)
    arms = [("ours", ""), ("ours", ceilings.SLOW), ("eager (PEFT)", ""), ("Axolotl", ""), ("LoRAFusion", "")]
    for m, *cells in zip(rows.m, *(__main__.over_frozen(rows, *arm) for arm in arms), strict=True):
        fast, slow, *rivals = (f"{cell:.2f}" for cell in cells)
        assert f"| {' | '.join([str(m), f'{fast} to {slow}', *rivals])} |" in page
    for m in (1, 128, 256, 2048):
        s = Shape(m, 4096, 4096, 16, False)
        times = [layer_time.ours(H100, s)]
        for kind in quantized.KINDS:
            times += [quantized.seconds(H100, s, kind, "in_loop", overlap) for overlap in (True, False)]
            times.append(quantized.seconds(H100, s, kind, "dequantize"))
        cells = [f"{1e6 * forward:.0f} / {1e6 * backward:.0f}" for forward, backward in times]
        assert f"| {' | '.join([str(m), *cells])} |" in page


def test_the_predictions_page_has_the_formulas_bytes():
    page = (ROOT / "docs" / "internals" / "predictions.md").read_text(encoding="utf-8")
    device = DEVICES["sm_90"]
    row = bytes_moved.case_rows(device, bytes_moved.TARGET)[-1]
    figures = f"{row['extra X, Y passes']:.1f}; {row['extra passes']:.2f} with partial sums and small tensors"
    assert figures in page
    for ns, words in zip(
        bytes_moved.PROJECTIONS, ("q, k and v of an 8B Llama, 8,192 rows", "gate and up"), strict=True
    ):
        apart, together = bytes_moved.group_rows(device, bytes_moved.Group(8192, ns, 4096, 16))
        figures = f"{together['launches']} launches and {together['unique'] / 1e9:.2f} GB; "
        figures += f"apart {apart['launches']} and {apart['unique'] / 1e9:.2f} GB"
        assert f"| `fuse_projections`, {words} | {figures} |" in page


def test_the_fusing_guide_has_the_models_figures():
    """Ranges over the frozen MLP's time, of every shape, with dropout and without."""
    guide = (ROOT / "docs" / "guides" / "fusing.md").read_text(encoding="utf-8").replace("\n", " ")
    tables = [__main__.mlp_table(H100, dropout) for dropout in (False, True)]
    both_ends, fast_end = ("", ceilings.SLOW), ("",)
    ranges = {"one op": both_ends, "three layers": both_ends, "Unsloth": fast_end, "eager (PEFT)": fast_end}
    for name, ends in ranges.items():
        found = pd.concat(
            __main__.over_frozen(table, name, end) for table in tables for end in ends if f"{name} forward" in table
        )
        assert f"{found.min():.2f} to {found.max():.2f}" in guide, (name, found.min(), found.max())
