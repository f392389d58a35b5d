"""``slk.status``: what ran, by which strategy, what fell back and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import first_use, tallies
from stablelora_kernels.ops import plans
from stablelora_kernels.testing.cases import BF16, DEVICE

peft = pytest.importorskip("peft", reason="needs the extra peft")


@pytest.fixture(autouse=True)
def nothing_has_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tallies, "_tallies", {})
    plans.clear()
    yield
    plans.clear()


def tiny_model() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32))
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=0.1)
    model = peft.get_peft_model(model.to(DEVICE, BF16), config)
    slk.accelerate_peft(model)
    return model


def calls_of(status: slk.Status) -> dict[tuple[str, str], int]:
    return {(c.op, c.strategy): c.calls for c in status.calls}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_call_is_counted_by_how_it_ran(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="runs where Triton is installed")
    model = tiny_model()
    x = torch.randn(70, 32, device=DEVICE, dtype=BF16)
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=1e-3)
    with slk.settings(backend=backend):
        for _ in range(4):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        status = slk.status(model)
    if backend == "torch":
        # Forward and backward are one.
        assert calls_of(status) == {("lora_linear", "torch"): 8, ("stable_adamw", "torch"): 4}
        assert "the backend is forced" in status.calls[0].reason
    else:
        # The first layer's x needs no gradient: no product stands in its backward.
        assert calls_of(status) == {
            ("lora_linear_fwd", "one_launch"): 8,
            ("lora_linear_bwd", "one_launch"): 4,
            ("lora_linear_bwd", "gradients"): 4,
            ("stable_adamw", "one_launch"): 4,
        }
    assert not status.fallbacks and not status.faults
    for calls in status.calls:
        assert f"{calls.calls:,} x {calls.op} " in str(status)


def test_layers_that_fell_back_are_named_with_the_reason() -> None:
    model = tiny_model()
    x = torch.randn(6, 32, device=DEVICE, dtype=BF16)
    with slk.settings(backend="torch"):
        model(x)
        with model.disable_adapter():
            model(x)
            model(x)
        model.merge_adapter()
        model(x)
        model.unmerge_adapter()
    status = slk.status(model)
    reasons = Counter({f.reason: 0 for f in status.fallbacks})
    for fallback in status.fallbacks:
        reasons[fallback.reason] += fallback.calls
        assert fallback.name.endswith((".0", ".2"))
    assert reasons == {"its adapters are disabled": 4, "its adapters are merged": 2}
    assert "2 x PEFT's own forward of 1 x 0: its adapters are disabled" in str(status)
    # Another model's layers have none, and a restored one keeps what it was.
    assert not slk.status(torch.nn.Linear(2, 2)).fallbacks


def test_a_compiled_model_is_counted_where_its_ops_run() -> None:
    pytest.importorskip("triton", reason="runs where Triton is installed")
    layer = slk.LoRALinear(32, 24, r=4, dtype=BF16, device=DEVICE)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(70, 32, device=DEVICE, dtype=BF16)
    with slk.settings(backend="triton"), torch.no_grad():
        for _ in range(5):
            compiled(x)
    assert calls_of(slk.status(layer)) == {("lora_linear_fwd", "one_launch"): 5}


def test_what_first_use_found_is_part_of_it(tmp_path, monkeypatch) -> None:
    pytest.importorskip("triton", reason="runs where Triton is installed")
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path))
    first_use.forget()
    layer = slk.LoRALinear(32, 24, r=4, dtype=BF16, device=DEVICE)
    x = torch.randn(70, 32, device=DEVICE, dtype=BF16)
    with slk.settings(backend="triton", first_use="on"), torch.no_grad():
        layer(x)
        with pytest.warns(RuntimeWarning, match="is wrong on this machine"):
            first_use.retire("lora_mlp_fwd", "one_launch", torch.device(DEVICE), "Y is off by 1")
        status = slk.status(layer)
    first_use.forget()
    assert status.proven == 1 and "first use: 1 kind of calls proven here" in str(status)
    assert [(fault.op, fault.strategy) for fault in status.faults] == [
        ("lora_mlp_fwd", "one_launch")
    ]
    assert "lora_mlp_fwd by 'one_launch' is wrong here: Y is off by 1" in str(status)


def test_before_any_call_it_says_so_and_it_wants_a_module() -> None:
    assert str(slk.status(torch.nn.Linear(2, 2))) == "no call has run yet"
    with pytest.raises(TypeError, match="model"):
        slk.status("model")
