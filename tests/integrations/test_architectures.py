"""accelerate_peft and load_adapter against PEFT on tiny models of transformers' architectures, all
linear layers adapted.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels.testing import EPS
from tests.helpers.architectures import architectures, build, logits, transformers
from tests.helpers.small_models import refused

peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
BY_TYPE = dict(architectures())
# Their MLPs are computed in one op.
GATED = ["llama", "qwen3", "gemma", "phi3", "qwen2_moe"]
# One of each kind: branches added in place (falcon), Conv1D (gpt2), experts, tied heads, encoder
# and decoder, classifiers. The night has all.
SAMPLE = [*GATED, "gpt2", "gpt_neox", "falcon", "mixtral", "t5", "bart", "deberta-v2"]
# transformers 5.24 builds about 150 at these sizes, of which 58 have gated MLPs that one op
# computes; an older one fewer.
AT_LEAST, GATED_AT_LEAST = 40, 30
# A router, which PEFT adapts by its parameter.
ROUTER = "is not a stack of experts that lora_experts is known to fit"


def results(model: nn.Module) -> dict[str, Tensor]:
    """Logits, the gradients of A and B by PEFT's names, and the logits after a step of AdamW."""
    pairs = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    out = logits(model)
    found = {"logits": out.detach().clone()}
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    # A layer that this input does not reach has no gradient.
    found |= {name: p.grad.clone() for name, p in pairs.items() if p.grad is not None}
    torch.optim.AdamW(pairs.values(), lr=1e-2).step()
    with torch.no_grad():
        return found | {"after a step": logits(model)}


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Up to rounding: of the layers' own, and four times what PEFT's results are off their values
    in float64.
    """
    assert found.keys() == expected.keys() and len(found) > 4
    for name, value in found.items():
        scale = max(expected[name].abs().max().item(), 1e-3)
        # A step of AdamW divides small gradients by themselves.
        own = (2000 if name == "after a step" else 200) * EPS[torch.float32] * scale
        bound = (
            own
            + 4
            * (expected[name] - exact.get(name, expected[name])).abs().max().nan_to_num(0.0).item()
        )
        assert (value - expected[name]).abs().max().item() <= bound, name


def adapted(base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False
    )
    return peft.get_peft_model(copy.deepcopy(base), config)


def check(model_type: str, base: nn.Module, tmp_path: Path) -> bool:
    """Returns whether it has gated MLPs and one op computes each."""
    model = adapted(base)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(model.state_dict())
    expected, exact = results(model), {}
    # Some have no float64, or a smallest float32 that it makes NaN.
    with contextlib.suppress(RuntimeError):
        exact = results(adapted(base).double())

    model.load_state_dict(state)
    report = slk.accelerate_peft(model, fuse_projections=True, fuse_mlp=True)
    # PEFT puts experts' parameters, which no layer holds alone, into a layer of its own.
    assert report.replaced and all(module.reason.endswith(ROUTER) for module in report.skipped), (
        report
    )
    is_gated = bool(report.mlps) and all(mlp.reason is None for mlp in report.mlps)
    assert is_gated or model_type not in GATED, report
    assert_same(results(model), expected, exact)

    ours = copy.deepcopy(base)
    # A model's own layers, such as FalconLinear, may compute something else.
    kinds = {type(m.base_layer) for m in model.modules() if hasattr(m, "base_layer")}
    if model.peft_config["default"].target_parameters or kinds != {nn.Linear}:
        with refused(ours, ValueError, "target_parameters=|use PEFT and accelerate_peft"):
            slk.load_adapter(ours, tmp_path)
    else:
        slk.load_adapter(ours, tmp_path, fuse_projections=True, fuse_mlp=True)
        assert_same(results(ours), expected, exact)
    return is_gated


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_is_pefts(model_type, tmp_path):
    check(model_type, build(model_type, BY_TYPE[model_type]), tmp_path)


@pytest.mark.parametrize("model_type", ["falcon", "gpt2"])
def test_a_sample_on_triton_is_pefts(model_type, tmp_path):
    with slk.settings(backend="triton"):
        check(model_type, build(model_type, BY_TYPE[model_type]), tmp_path)


@pytest.mark.nightly
def test_every_architecture_is_pefts(tmp_path):
    """All that transformers builds at these sizes; those that it does not build are listed in the
    output.
    """
    not_built, differ, same = [], {}, {}
    for model_type, class_name in BY_TYPE.items():
        try:
            base = build(model_type, class_name)
            # PEFT itself cannot train all of them.
            results(adapted(base))
        except Exception as error:
            not_built.append(f"{model_type}: {type(error).__name__}")
            continue
        try:
            same[model_type] = check(model_type, base, tmp_path / model_type)
        except (Exception, pytest.fail.Exception) as error:
            differ[model_type] = f"{type(error).__name__}: {error}"[:300]
    print(f"transformers {transformers.__version__}: {len(same)} the same: {', '.join(same)}")
    print(f"{len(not_built)} not built: {', '.join(not_built)}")
    assert not differ, "\n".join(f"{name}: {text}" for name, text in differ.items())
    assert len(same) >= AT_LEAST and sum(same.values()) >= GATED_AT_LEAST
