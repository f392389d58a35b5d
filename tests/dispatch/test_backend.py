"""Which backend a call takes: by device, by the installed Triton, and by the GPU's compute
capability.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.cli import doctor
from stablelora_kernels.dispatch import backend, problem
from stablelora_kernels.dispatch.problem import DEVICES, Device
from stablelora_kernels.ops.meta_calls import linear_launches

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No answer of another test, and no warning that was given before."""
    monkeypatch.setattr(backend, "_on_gpus", {})
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(backend, "TRITON_PROBLEM", None)


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine one with GPUs of these compute capabilities and a Triton."""

    def with_gpus(*capabilities, triton="3.9.0", limit=232_448):
        def properties(index):
            major, minor = capabilities[index]
            return SimpleNamespace(
                name="some GPU", major=major, minor=minor, multi_processor_count=148
            )

        def device_of(device):
            return Device(problem.arch_of(properties(device.index or 0)), 148, limit)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(problem, "device_of", device_of)
        monkeypatch.setattr(backend, "TRITON_VERSION", triton)

    return with_gpus


def warned(device=CUDA):
    """The backend of two calls, and the messages of the warnings that they gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = {backend.resolve_backend(device) for _ in range(2)}
    assert all(message.category is RuntimeWarning for message in caught)
    return *chosen, [str(message.message) for message in caught]


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu_where_triton_needs_its_interpreter(
    monkeypatch, machine
):
    machine((9, 0))
    monkeypatch.setattr(backend, "INTERPRETING", True)
    for name, device, chosen in (
        ("auto", CPU, "torch"), ("auto", CUDA, "triton"), ("torch", CUDA, "torch"), ("triton", CPU, "triton"),
        ("triton", CUDA, "triton"),
    ):  # fmt: skip
        with slk.settings(backend=name):
            assert warned(device) == (chosen, [])
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with (
        slk.settings(backend="triton"),
        pytest.raises(RuntimeError, match=r"on a tensor on cpu.*TRITON_INTERPRET=1"),
    ):
        backend.resolve_backend(CPU)


def test_a_gpu_without_a_usable_triton_is_warned_of(monkeypatch, machine):
    machine((9, 0))
    monkeypatch.setattr(backend, "TRITON_PROBLEM", "Triton is not installed")
    with (
        slk.settings(backend="auto"),
        pytest.warns(RuntimeWarning, match="Triton is not installed, so .* install a newer"),
    ):
        assert backend.resolve_backend(CUDA) == "torch"
    with (
        slk.settings(backend="triton"),
        pytest.raises(RuntimeError, match="can't run: Triton is not installed"),
    ):
        backend.resolve_backend(CUDA)


# What is installed: Triton for any device, and NumPy for its interpreter.
INSTALLED = [
    ({"triton": "3.2.0"}, "Triton 3.2.0 is installed, but the kernels need 3.6 or newer"),
    *(({"triton": version}, None) for version in ("3.6.0+git1234", "3.10.1", "4.0")),
    ({"triton": "3.6.0", "numpy": "2.3.5"}, None),
    ({"triton": "3.6.0", "numpy": "2.4.0"}, "the interpreter of Triton 3.6.0 does not run with NumPy 2.4.0: pip"),
    ({"triton": "3.7.1", "numpy": "2.4.6"}, None),
    ({"pytorch-triton": "3.5.1+git1234"}, "Triton 3.5.1+git1234 is installed, but the kernels need 3.6 or newer"),
    ({}, None),
]  # fmt: skip


@pytest.mark.parametrize(("versions", "problem"), INSTALLED)
def test_versions_that_do_not_run(monkeypatch, versions, problem):
    def version(package):
        if package not in versions:
            raise backend.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend.metadata, "version", version)
    found = (backend.interpreter_problem if "numpy" in versions else backend._triton_problem)()
    assert found is None if problem is None else found.startswith(problem)


# The table of compute capabilities


# A capability, a Triton, and the words of the problem; none if the kernels run. Then what the GPU
# is taken as.
JUDGED = [
    ((6, 1), "3.9.0", ["Triton 3.9.0 makes scalar code", "for compute capability 6.1"], ""),
    ((7, 0), "3.9.0", ["Triton 3.9.0 makes scalar code", "for compute capability 7.0 (V100)"], ""),
    ((7, 5), "3.6.0", ["Triton 3.6.0 makes scalar code", "for compute capability 7.5 (T4, RTX 2080)"], ""),
    ((7, 5), None, ["Triton makes scalar code", "7.5 (T4"], ""),
    ((8, 0), "3.6.0", [], ""),
    ((8, 6), "3.6.0", [], ""),
    ((8, 7), "3.6.0", [], "compute capability 8.7 (Jetson Orin) is taken as 8.0"),
    ((8, 9), "3.9.0", [], ""),
    ((9, 0), "3.6.0", [], ""),
    ((9, 0), None, [], ""),
    ((10, 0), "3.6.0", ["Triton 3.6.0 makes wrong code", "for compute capability 10.0 (B200)"], ""),
    ((10, 0), "3.8.0", ["Triton 3.8.0 makes wrong code"], ""),
    ((10, 0), "3.9.0", [], ""),
    ((10, 3), "3.9.0", [], "compute capability 10.3 (B300) is taken as 10.0"),
    ((11, 0), "3.7.1", ["Triton 3.7.1 makes wrong code", "for compute capability 11.0 (Jetson Thor)"],
     "compute capability 11.0 (Jetson Thor) is taken as 10.0"),
    ((11, 0), "3.9.0", [], "compute capability 11.0 (Jetson Thor) is taken as 10.0"),
    ((12, 0), "3.6.0", [], ""),
    ((12, 1), "3.6.0", [], "compute capability 12.1 (GB10) is taken as 12.0"),
    ((12, 2), "3.9", [], "compute capability 12.2 is taken as 12.0"),
    ((13, 0), "3.9.0", ["Triton 3.9.0 cannot compile these kernels for compute capability 13.0"], ""),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "version", "words", "taken_as"), JUDGED)
def test_what_the_table_says_of_a_gpu(capability, version, words, taken_as):
    verdict = backend.judge(capability, version)
    assert all(word in verdict.problem for word in words) and bool(verdict.problem) == bool(words)
    assert verdict.taken_as == taken_as


def test_the_table_has_a_row_for_each_gpu_that_the_kernels_are_compiled_for():
    assert [row.least for row in backend.ROWS] == sorted(row.least for row in backend.ROWS)
    for device in DEVICES.values():
        if device.nvidia:
            capability = divmod(device.generation, 10)
            assert (
                capability in backend.row_of(capability).gpus
                and not backend.judge(capability, "3.9.0").problem
            )
    for row in backend.ROWS:
        assert all(backend.row_of(capability) is row for capability in row.gpus)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (13, 0)])
def test_a_gpu_for_which_no_triton_will_do_takes_pytorchs_operators(capability, machine):
    machine(capability)
    with slk.settings(backend="auto"):
        chosen, (message,) = warned()
        reason = backend.explain_backend(CUDA).reason
    name = f"{capability[0]}.{capability[1]}"
    assert chosen == "torch" and "Triton 3.9.0" in reason and f"compute capability {name}" in reason
    assert reason.endswith(
        "so this GPU runs PyTorch's operators, with more launches and memory traffic"
    )
    assert (
        message
        == f"stablelora_kernels: {reason}; set slk.settings.backend = 'torch' to choose this"
    )


RAISED = backend.ROWS[2]._replace(triton=(3, 7, 1))


def test_a_triton_that_is_too_old_for_a_gpu_is_not_used_there(monkeypatch, machine):
    """A table that says so: two GPUs in a machine, of which one's row asks for a newer Triton."""
    monkeypatch.setattr(backend, "ROWS", (*backend.ROWS[:2], RAISED, *backend.ROWS[3:]))
    machine((9, 0), (8, 0), triton="3.7.0")
    wrong = "Triton 3.7.0 makes wrong code of these kernels for compute capability 9.0 (H100, H200, GH200)"
    with slk.settings(backend="auto"):
        chosen, (message,) = warned(torch.device("cuda", 0))
        assert chosen == "torch" and message == (
            f"stablelora_kernels: {wrong}, so this GPU runs PyTorch's operators, with more launches and memory traffic; "
            "install Triton 3.7.1 or newer, or set slk.settings.backend = 'torch' to choose this"
        )
        assert warned(torch.device("cuda", 1)) == ("triton", [])
        # The current device is the first, which was warned of.
        assert warned(CUDA) == ("torch", [])
    with slk.settings(backend="triton"):
        chosen, (message,) = warned()
        assert chosen == "triton" and message == (
            f"stablelora_kernels: the backend is forced (slk.settings or STABLELORA_BACKEND), although {wrong}; "
            "install Triton 3.7.1 or newer"
        )
        assert warned(torch.device("cuda", 1)) == ("triton", [])
    with slk.settings(backend="torch"):
        assert warned() == ("torch", [])


@pytest.mark.parametrize("version", ["3.7.1", "3.7.1+git1234", "3.10.0", None])
def test_a_triton_that_is_new_enough_is_used(monkeypatch, machine, version):
    monkeypatch.setattr(backend, "ROWS", (*backend.ROWS[:2], RAISED, *backend.ROWS[3:]))
    machine((9, 0), triton=version)
    with slk.settings(backend="auto"):
        assert warned() == ("triton", [])


def test_a_forced_backend_runs_on_a_t4(machine):
    machine((7, 5))
    with slk.settings(backend="triton"):
        chosen, (message,) = warned()
    assert (
        chosen == "triton"
        and "7.5 (T4, RTX 2080); set slk.settings.backend = 'auto' for PyTorch's operators"
        in message
    )


def test_a_gpu_is_asked_once(monkeypatch, machine):
    """Of a call's host time, the answer is a look-up."""
    machine((9, 0))
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, 0)
    )
    with slk.settings(backend="auto"):
        for device in (CUDA, torch.device("cuda", 0), CUDA):
            assert backend.resolve_backend(device) == "triton"
    assert asked == [0]


def test_each_gpu_and_setting_has_an_answer_of_its_own(monkeypatch, machine):
    """Behind two answers for others; and "cuda" is the current GPU."""
    machine((9, 0), (13, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    expected = {0: ["triton", "triton"], 1: ["torch", "triton"], None: ["torch", "triton"]}
    for index in (0, 1, None, 0):
        device = CUDA if index is None else torch.device("cuda", index)
        found = []
        for name in ("auto", "triton"):
            with slk.settings(backend=name):
                found.append(backend.explain_backend(device).backend)
        assert found == expected[index], device


def test_amds_gpus_have_no_compute_capability(monkeypatch, machine):
    machine((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)
    with slk.settings(backend="auto"):
        assert warned() == ("triton", [])


def test_a_compiled_model_is_warned_once_and_has_no_graph_break(monkeypatch):
    """torch.compile traces the choice. It can't trace a warning."""
    monkeypatch.setattr(backend, "verdict_of", lambda index: backend.judge((7, 5), "3.9.0"))

    def step(x):
        return x + 1 if backend.resolve_backend(torch.device("cuda", 0)) == "triton" else x + 2

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with slk.settings(backend="auto"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [compiled(torch.zeros(size)).sum() for size in (1, 2)] == [2, 4]
    assert ["T4" in str(message.message) for message in caught] == [True]


# explain and doctor


def test_explain_and_doctor_say_that_a_gpu_is_too_old(machine):
    machine((7, 5))
    with slk.settings(backend="auto"):
        text = str(slk.explain(8, 64, 64, 8))
    wrong = "Triton 3.9.0 makes scalar code, which spills registers, of these kernels for compute capability 7.5 (T4, RTX 2080)"
    assert text.startswith(f"backend torch ({wrong}, so this GPU runs PyTorch's operators")
    assert doctor._versions()["GPU"] == f"some GPU, sm_75; {wrong}"


def test_explain_and_doctor_say_which_row_a_newer_gpu_takes(machine):
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    machine((10, 3), (9, 0))
    taken = "compute capability 10.3 (B300) is taken as 10.0"
    with slk.settings(backend="auto"):
        found, other = slk.explain(8, 64, 64, 8), slk.explain(8, 64, 64, 8, device="cuda:1")
    assert found.arch == "sm_103" and found.forward
    assert str(found).startswith(
        f"backend triton on sm_103 ('auto' takes the Triton kernels on a GPU; {taken})\n"
    )
    assert "taken as" not in str(other)
    gpus = doctor._versions()
    assert (
        gpus["GPU 0"]
        == f"some GPU, sm_103; {taken}; the row of compute capability 10.0 needs Triton 3.9.0 or newer"
    )
    assert (
        gpus["GPU 1"]
        == "some GPU, sm_90; the row of compute capability 9.0 needs Triton 3.6.0 or newer"
    )


def test_explain_lists_a_named_gpus_launches_and_says_that_the_installed_triton_is_not_proven(
    monkeypatch,
):
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    monkeypatch.setattr(backend, "ROWS", (*backend.ROWS[:2], RAISED, *backend.ROWS[3:]))
    for version, proven in (("3.6.0", False), ("3.7.1", True)):
        monkeypatch.setattr(backend, "TRITON_VERSION", version)
        found = slk.explain(8, 64, 64, 8, device="sm_90")
        assert found.forward and proven == (found.backend_reason == "")
        for words in (
            () if proven else ("Triton 3.6.0 makes wrong code", "install Triton 3.7.1 or newer")
        ):
            assert words in str(found)
        assert slk.explain(8, 64, 64, 8, device="gfx942").backend_reason == ""


# A newer GPU, and the GPU that it is taken as, whose launches it must get if it had as many
# processors.
TAKEN = [
    (Device("sm_103", 148, 232_448), "sm_100"),
    (Device("sm_110", 20, 232_448), "sm_100"),
    (Device("sm_121", 48, 101_376), "sm_120"),
    (Device("sm_87", 16, 166_912), "sm_80"),
]


@pytest.mark.parametrize(("device", "arch"), TAKEN, ids=lambda value: getattr(value, "arch", None))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_newer_gpu_gets_the_launches_of_the_one_it_is_taken_as(device, arch, dropout):
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    alike = DEVICES[arch]._replace(processors=device.processors)
    for rows in (8, 128, 512, 4096):
        launches = [
            [
                (
                    getattr(launch, "kernel", None),
                    launch.variant,
                    launch.reason,
                    getattr(launch, "grid", None),
                )
                for way in linear_launches(gpu, rows, 4096, 4096, 16, (BF16, FP32), dropout)
                for launch in way
            ]
            for gpu in (device, alike)
        ]
        assert launches[0] == launches[1]
