"""The command line itself, and ``doctor``: what it tells, and that a wrong kernel, backend or argument is told of."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.cli import doctor, main, output, selftest
from stablelora_kernels.dispatch import backend, settings
from stablelora_kernels.dispatch.settings import check_environment
from stablelora_kernels.testing import error_and_bound
from tests.helpers.processes import printed, python

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def fails(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 2) -> str:
    """The one line that a command which can't be carried out says on stderr; stdout stays empty."""
    assert main(argv) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (out, err)
    return err


# The command line


def test_version_help_and_usage(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stablelora-kernels {slk.__version__}\n"
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main([]) == 2
    assert "required: COMMAND" in capsys.readouterr().err
    assert main(["cure"]) == 2
    assert "invalid choice: 'cure'" in capsys.readouterr().err
    assert main(["doctor", "--fast"]) == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_help_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    from stablelora_kernels.cli import COMMANDS

    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= int(columns)
        assert "Exit status" in text


def test_ctrl_c_and_a_closed_pipe_end_quietly(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "stablelora-kernels doctor: interrupted\n"


def test_a_reader_that_leaves_is_no_error():
    code = (
        "import sys; from stablelora_kernels import cli\n"
        "from types import SimpleNamespace as S\n"
        "cli.COMMANDS['doctor'].run = lambda args: print('x' * 10_000_000) or 0\n"
        "sys.exit(cli.main(['doctor']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(10) == b"xxxxxxxxxx"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()


def test_importing_the_package_imports_no_command():
    code = "import sys, stablelora_kernels; print([m for m in sys.modules if m.startswith('stablelora_kernels.cli')])"
    assert printed(code) == "[]"


def test_a_wrong_environment_variable_is_one_line():
    code = "import sys; from stablelora_kernels.cli import main; sys.argv = ['', 'doctor']; sys.exit(main())"
    done = python(code, STABLELORA_BACKEND="gpu")
    assert (done.returncode, done.stdout) == (2, "")
    wanted = "the environment variable STABLELORA_BACKEND must be one of 'auto', 'triton', 'torch', got 'gpu'"
    assert done.stderr == f"stablelora-kernels: error: {wanted}\n"


# What every command prints


def test_tables_fit_the_terminal_and_shorten_names_in_the_middle(capsys, monkeypatch):
    rows = [("model.layers.10.self_attn.q_proj", "1.5"), ("head", "12")]
    output.print_table(("name", "norm"), rows)
    assert capsys.readouterr().out.splitlines() == [
        "  name                              norm",
        "  model.layers.10.self_attn.q_proj   1.5",
        "  head                                12",
    ]
    monkeypatch.setenv("COLUMNS", "24")
    output.print_table(("name", "norm"), rows)
    assert capsys.readouterr().out.splitlines() == [
        "  name              norm",
        "  model.l…n.q_proj   1.5",
        "  head                12",
    ]


def test_json_has_no_infinities(capsys):
    output.print_json({"a": [float("inf"), {"b": float("nan"), "c": 1.5}]})
    assert json.loads(capsys.readouterr().out) == {"a": ["inf", {"b": "nan", "c": 1.5}]}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (2_359_296, "2.25 MiB"), (1023 << 20, "1023 MiB")],
)
def test_sizes(count, text):
    assert output.size(count) == text


# doctor


def doctor_json(capsys, *argv: str, status: int = 0):
    assert main(["doctor", "--device", "cpu", "--json", *argv]) == status
    return json.loads(capsys.readouterr().out)


def test_doctor_on_pytorchs_path(capsys):
    with slk.use_backend("auto"):
        report = doctor_json(capsys)
    assert report["ok"] is True
    assert report["backend"]["name"] == "torch" and "'auto' takes PyTorch's operators" in report["backend"]["reason"]
    assert report["versions"]["torch"] == torch.__version__ and report["version"] == slk.__version__
    assert set(report["optional"]) == set(doctor.OPTIONAL)
    (tested,) = report["self_tests"]
    assert tested["on"] == "PyTorch's operators on cpu"
    families = {check["family"] for check in tested["checks"]}
    assert families == {
        "lora_linear", "dropout's mask", "lora_linear_group", "lora_linear_quantized", "lora_branch", "stable_adamw",
    }  # fmt: skip
    for check in tested["checks"]:
        assert check["passed"] and check["error"] <= check["bound"] and not check["kernels"]
        # An exact result would mean that nothing was compared.
        assert check["family"] == "dropout's mask" or check["error"] > 0


def test_doctor_on_the_triton_kernels(capsys):
    pytest.importorskip("triton")
    with slk.use_backend("triton"):
        report = doctor_json(capsys)
    (tested,) = report["self_tests"]
    assert report["ok"] and tested["on"] == "the Triton kernels in Triton's interpreter"
    launched = {kernel for check in tested["checks"] for kernel in check["kernels"]}
    assert launched == {
        "lora_linear", "lora_expand", "lora_weight_grads", "lora_weight_grads_group", "lora_linear_quantized",
        "lora_linear_split_k", "lora_linear_tma", "lora_shrink", "lora_shrink_group", "square_sums", "stable_adamw",
    }  # fmt: skip


@pytest.mark.nightly
def test_doctor_interprets_in_a_process_of_its_own(capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("COLUMNS", "80")
    with slk.use_backend("torch"):
        assert main(["doctor", "--device", "cpu", "--interpret"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80
    assert "Self-test of PyTorch's operators on cpu" in out
    assert "Self-test of the Triton kernels in Triton's interpreter" in out and "stable_adamw" in out
    assert f"All {2 * len(selftest.checks())} checks passed." in out


def test_an_interpreter_that_cannot_start_fails_the_self_test(capsys, monkeypatch):
    # This process has read its environment, a new one has not.
    check_environment()
    monkeypatch.setenv("STABLELORA_KERNEL", "best")
    monkeypatch.setattr(doctor, "run_checks", lambda device: iter(()))
    report = doctor_json(capsys, "--interpret", status=1)
    (check,) = report["self_tests"][1]["checks"]
    assert "STABLELORA_KERNEL must be one of" in check["problem"] and not check["passed"]


def test_a_wrong_result_fails_the_self_test(capsys, monkeypatch):
    right = selftest.lora_branch
    monkeypatch.setattr(selftest, "lora_branch", lambda *args: right(*args) * 1.5)
    with slk.use_backend("auto"):
        report = doctor_json(capsys, status=1)
        failed = [check for check in report["self_tests"][0]["checks"] if not check["passed"]]
        assert [check["family"] for check in failed] == ["lora_branch"] and not report["ok"]
        assert failed[0]["error"] > failed[0]["bound"] and "off by" in failed[0]["problem"]
        assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED lora_branch, bf16: " in out and f"1 of {len(selftest.checks())} checks FAILED." in out


def test_nan_an_exception_and_a_wrong_mask_fail_too(monkeypatch):
    right, group = selftest.lora_linear, selftest.lora_linear_group

    def nan(*args):
        return right(*args) + float("nan")

    def raising(*args):
        raise RuntimeError("out of\nmemory")

    def unmasked(x, weight, bias, a, b, scaling, p=0.0):
        return right(x, weight, bias, a, b, scaling, p) + (1e-3 if p else 0.0)

    def problems(name, replacement):
        monkeypatch.setattr(selftest, name, replacement)
        with slk.use_backend("torch"):
            found = {(r.family, r.case): r.problem for r in selftest.run_checks(CPU)}
        monkeypatch.setattr(selftest, name, group if name == "lora_linear_group" else right)
        return found

    assert "off by inf" in problems("lora_linear", nan)["lora_linear", "few rows, bf16"]
    found = problems("lora_linear_group", raising)
    assert found["lora_linear_group", "3 projections, bf16"] == "RuntimeError: out of memory"
    assert sum(problem is not None for problem in found.values()) == 1
    assert problems("lora_linear", unmasked)["dropout's mask", "forward and backward"] is not None


def test_a_step_that_latches_elsewhere_fails(monkeypatch):
    def never(self):
        return [slk.PairStability(pair.name, 1.0, 0.0, False, None) for pair in self.pairs]

    monkeypatch.setattr(selftest.StableLoRAAdamW, "stability", never)
    with slk.use_backend("torch"):
        found = {(r.family, r.case): r.problem for r in selftest.run_checks(CPU)}
    assert "the pairs must latch at steps" in found["stable_adamw", "3 steps, fp32"]


def test_triton_checks_that_launch_nothing_fail(monkeypatch):
    monkeypatch.setattr(selftest.backend, "resolve_backend", lambda device: "triton")
    monkeypatch.setattr(selftest, "_launched", lambda on_triton: {})
    with slk.use_backend("torch"):
        assert {r.problem for r in selftest.run_checks(CPU)} == {"no Triton kernel was launched"}


def test_a_backend_that_cannot_run_is_told_of(capsys, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with slk.use_backend("triton"):
        report = doctor_json(capsys, status=1)
        assert report["backend"]["name"] is None and "TRITON_INTERPRET=1" in report["backend"]["reason"]
        assert report["self_tests"] == [] and report["ok"] is False
        assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "Backend on cpu: none, since backend 'triton' was asked for" in out
    assert "The backend 'triton' can't run here" in out


def test_what_doctor_refuses(capsys, monkeypatch):
    assert "--device must be a torch device, got 'gpu'" in fails(capsys, "doctor", "--device", "gpu")
    assert "must be of type cpu or cuda, got 'meta'" in fails(capsys, "doctor", "--device", "meta")
    assert "got 'cuda:99' where PyTorch sees" in fails(capsys, "doctor", "--device", "cuda:99")
    monkeypatch.setattr(backend, "TRITON_PROBLEM", "Triton is not installed")
    assert "interpreter, but Triton is not installed" in fails(capsys, "doctor", "--interpret")
    monkeypatch.setattr(backend, "TRITON_PROBLEM", None)
    monkeypatch.setattr(backend, "interpreter_problem", lambda: "it needs NumPy")
    assert "interpreter, but it needs NumPy" in fails(capsys, "doctor", "--interpret")


def test_missing_packages_and_set_variables_are_named(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda package: None if package == "peft" else "1.0")
    monkeypatch.setattr(doctor, "run_checks", lambda device: iter(()))
    # Read before, so that no other test runs with "split".
    check_environment()
    monkeypatch.setenv("STABLELORA_KERNEL", "split")
    assert main(["doctor", "--device", "cpu"]) == 1  # nothing was checked
    out = capsys.readouterr().out
    assert "  STABLELORA_KERNEL=split\n" in out
    assert "  peft             missing  accelerate_peft\n" in out


def test_gpus_are_named_with_their_kind(monkeypatch):
    known, new = (SimpleNamespace(name=f"GPU of sm_{m}0", major=m, minor=0, gcnArchName="") for m in (9, 7))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [known, new].__getitem__)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert doctor._versions()["GPU"] == "GPU of sm_90, sm_90"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert doctor._versions()["GPU 1"] == "GPU of sm_70, sm_70, for which the dispatch tables were not made"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._versions()["GPU"] == "no GPU that this torch could use"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert doctor._versions()["GPU"] == "no GPU that this torch sees"


@pytest.mark.parametrize("name", settings.BACKENDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("problem", [None, "Triton is not installed"])
def test_the_backends_explanation_is_its_answer(name, device, problem, monkeypatch, recwarn):
    monkeypatch.setattr(backend, "TRITON_PROBLEM", problem)
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with slk.use_backend(name):
        try:
            said = backend.explain_backend(torch.device(device))
        except RuntimeError as error:
            with pytest.raises(RuntimeError) as raised:
                backend.resolve_backend(torch.device(device))
            assert str(raised.value) == str(error)
            return
        assert not recwarn.list
        assert said[0] == backend.resolve_backend(torch.device(device))
        assert ("Triton is not installed" in said[1]) == (problem is not None and device == "cuda" and name == "auto")


def test_an_error_is_measured_against_its_bound():
    ref = torch.tensor([1.0, 2.0], dtype=torch.float64)
    error, bound = error_and_bound(ref.float() + 0.5, ref, ref.float() + 0.25)
    assert error == 0.5 and bound == pytest.approx(0.5 + 2 * 2**-23)
    assert error_and_bound(torch.empty(0), torch.empty(0), torch.empty(0)) == (0.0, 0.0)
