"""accelerate_peft's layers in a model's life: replaced, restored, copied and switched; what is not
understood stays PEFT's.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import stablelora_kernels as slk
from stablelora_kernels.utils.memory import saved_for_backward
from tests.helpers.peft_models import assert_equal_to_pefts, config, make, one_layer, peft, results
from tests.helpers.processes import printed
from tests.helpers.quantized_weights import conv1d
from tests.helpers.small_models import (
    IDS,
    Model,
    assert_untouched,
    llama,
    output,
    reasons,
    snapshot,
)

lora = peft.tuners.lora


def test_state_is_untouched_and_restore_is_exact():
    model, other = make(("more", {"use_dora": True, "lora_dropout": 0.1})), make()
    forward, others = lora.Linear.forward, [type(m) for m in other.modules()]
    before, keys, text = snapshot(model), list(model.state_dict()), repr(model)
    classes = [type(m) for m in model.modules()]
    slots = [dict(m.__dict__) for m in model.modules()]
    report = slk.accelerate_peft(model)
    assert_untouched(model, before)
    assert list(model.state_dict()) == keys and [dict(m.__dict__) for m in model.modules()] == slots
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert repr(model) == text and len(report.replaced) == 4
    # Twice is once, and nothing is patched.
    accelerated = [type(m) for m in model.modules()]
    assert (
        slk.accelerate_peft(model) == report and [type(m) for m in model.modules()] == accelerated
    )
    assert lora.Linear.forward is forward and [type(m) for m in other.modules()] == others
    for _ in range(2):
        slk.restore_peft(model)
        assert [type(m) for m in model.modules()] == classes and repr(model) == text
        assert_untouched(model, before)


class Zoo(nn.Module):
    """One of each kind of layer that PEFT's LoRA takes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.linear, self.wrapped = nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv1d = conv1d(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, ids):
        x = self.conv1d(torch.tanh(self.wrapped(self.linear(self.embed(ids)))))
        return self.conv(self.attention(x, x, x)[0].unsqueeze(1)).squeeze(1)


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_understood_is_named_and_stays_pefts(backend, calls):
    model = make(
        model=Zoo(), target_modules=["embed", "linear", "wrapped", "conv1d", "attention", "conv"]
    )
    layers = model.base_model.model
    layers.wrapped.forward = layers.wrapped.forward
    expected, before = output(model), [type(m) for m in model.modules()]
    with pytest.raises(
        ValueError, match=r"strict=True, but .* base_model.model.embed \(lora.Embedding is not"
    ):
        slk.accelerate_peft(model, strict=True)
    assert [type(m) for m in model.modules()] == before
    report = slk.accelerate_peft(model)
    prefix, known = "base_model.model.", "is not a layer that the ops are known to fit"
    assert [m.name for m in report.replaced] == [prefix + "linear", prefix + "conv1d"]
    assert reasons(report) == {
        prefix + "embed": f"lora.Embedding {known}",
        prefix + "wrapped": "its forward was replaced (as accelerate's hooks do)",
        prefix + "attention": f"lora.MultiheadAttention {known}",
        prefix
        + "attention.base_layer.out_proj": "nn.MultiheadAttention reads its weight instead of calling it",
        prefix + "conv": f"lora.Conv2d {known}",
    }
    assert "skipped" in str(report) and "adapter 'default'" in str(report)
    torch.testing.assert_close(output(model), expected)
    # Conv1D computes its own product.
    assert calls.layers == {"lora_linear": 1, "lora_branch": 1}
    del layers.wrapped.forward
    assert_equal_to_pefts(model)
    assert slk.accelerate_peft(make(), strict=True).skipped == ()


FUSES_NOTHING = {
    "no MLP": (
        lambda: make(), {"fuse_mlp": True}, "fuse_mlp found no gated MLP with LoRA"
    ),
    "MLPs that are called otherwise": (
        lambda: make(model=llama(hidden_act="relu6"), target_modules="all-linear"),
        {"fuse_mlp": True},
        r"fuse_mlp computes no MLP in one op: .*layers.0.mlp, .*layers.1.mlp: ",
    ),
    "no language model": (
        lambda: make(), {"fuse_loss": True}, "fuse_loss: there is no language model"
    ),
    "a head that trains": (
        lambda: make(model=llama(), modules_to_save=["lm_head"]),
        {"fuse_loss": True},
        "fuse_loss: 'base_model.model' keeps its own loss: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "fusion", "reason"), FUSES_NOTHING.values(), ids=FUSES_NOTHING)
def test_strict_refuses_a_fusion_without_effect(build, fusion, reason):
    model = build()
    before = [(type(m), {*m.__dict__}) for m in model.modules()]
    with pytest.raises(ValueError, match=f"^strict=True, but {reason}"):
        slk.accelerate_peft(model, strict=True, **fusion)
    assert [(type(m), {*m.__dict__}) for m in model.modules()] == before
    # So does a later call that keeps the fusion.
    assert slk.accelerate_peft(model, **fusion).replaced
    with pytest.raises(ValueError, match=f"^strict=True, but {reason}"):
        slk.accelerate_peft(model, strict=True)


@pytest.mark.filterwarnings("ignore")
def test_variants_are_named():
    model = make(model=llama(pad_token_id=0), task_type="CAUSAL_LM", alora_invocation_tokens=[1])
    before = [type(m).forward for m in model.modules()]
    report = slk.accelerate_peft(model)
    assert not report.replaced and [type(m).forward for m in model.modules()] == before
    assert len(report.skipped) == 4
    assert all(
        text.startswith("adapter 'default' is a variant of LoRA")
        for text in reasons(report).values()
    )
    assert str(report).startswith("No LoRA module trains on this library's ops; ")
    for change, reason in (
        (
            lambda layer: layer.lora_A.update({"default": nn.Linear(16, 4)}),
            "lora_A of adapter 'default' has a bias",
        ),
        (
            lambda layer: layer.lora_B["default"].double(),
            "lora_A of adapter 'default' has a bias, or another dtype than lora_B",
        ),
        (
            lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)}),
            "the dropout of adapter 'default' drops everything",
        ),
        (
            lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.1)}),
            "'default' is a AlphaDropout, or has hooks",
        ),
        (
            lambda layer: layer.scaling.update(default=torch.ones(())),
            "the scaling of adapter 'default' is a Tensor, not a",
        ),
        (
            lambda layer: layer.lora_B["default"].register_forward_hook(print),
            "lora_B of adapter 'default' is not a plain",
        ),
    ):
        model = make()
        change(model.base_model.model.layers[0].q_proj)
        (skipped,) = slk.accelerate_peft(model).skipped
        assert skipped.name == "base_model.model.layers.0.q_proj" and reason in skipped.reason


# Where a hook is, and the ops that compute: on the base layer, that computes its own product; on
# what PEFT's forward calls, none.
HOOKED = {
    "base layer": (lambda layer: layer.base_layer, {"lora_linear": 3, "lora_branch": 1}),
    "A": (lambda layer: layer.lora_A["default"], {"lora_linear": 3}),
    "B": (lambda layer: layer.lora_B["default"], {"lora_linear": 3}),
    "dropout": (lambda layer: layer.lora_dropout["default"], {"lora_linear": 3}),
    "magnitude": (lambda layer: layer.lora_magnitude_vector["default"], {"lora_linear": 3}),
    "layer": (lambda layer: layer, {"lora_linear": 4}),
    "every module": (None, {}),
}
HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", HOOKED)
def test_hooks_are_called(place, hook, calls):
    model, seen = make(use_dora=place == "magnitude"), []
    expected = output(model)
    slk.accelerate_peft(model)
    module_of, made = HOOKED[place]
    if module_of is None:
        register = getattr(nn.modules.module, f"register_module_{hook}_hook")
    else:
        # Its input wants a gradient, without which there is no backward of the base layer.
        module = module_of(model.base_model.model.layers[1].q_proj)
        register = getattr(module, f"register_{hook}_hook")
    handle = register(lambda *args: seen.append(args[0]))
    y = model(IDS)
    y.sum().backward()
    handle.remove()
    torch.testing.assert_close(y, expected)
    assert seen and calls.layers == made


def test_a_and_b_of_two_dtypes_are_pefts_under_autocast(calls):
    model = make()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = p.data.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = output(model)
        slk.accelerate_peft(model)
        torch.testing.assert_close(output(model), expected)
    assert calls.layers == {}


def test_a_base_layer_with_another_forward(calls):
    model = make()
    expected = output(model)
    slk.accelerate_peft(model)
    base = model.base_model.model.layers[0].q_proj.base_layer
    base.forward = lambda x: nn.Linear.forward(base, x) + 1
    assert not torch.allclose(output(model), expected, atol=1e-3)
    assert calls.layers == {"lora_linear": 3, "lora_branch": 1}


def test_peft_without_a_peft_model():
    torch.manual_seed(0)
    assert_equal_to_pefts(peft.inject_adapter_in_model(config(), Model()).eval())


@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["accelerate", "shard"])
def test_fully_sharded(first, backend, calls, mesh):
    """FSDP with its parameters in one flat one, which each forward sees as tensors; one process is
    enough for that.
    """
    model = make()
    expected = output(model)
    if first == "accelerate":
        slk.accelerate_peft(model)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    report = slk.accelerate_peft(model)
    assert len(report.replaced) == 4 and not report.skipped
    torch.testing.assert_close(output(model), expected)
    assert calls.layers == {"lora_linear": 4}
    assert sum("lora_" in name and bool(value.any()) for name, value in results(model).items()) == 8


@pytest.mark.parametrize("several_devices", [False, True])
def test_device_map(several_devices, backend, calls):
    """accelerate puts hooks on every module if ``device_map`` names several devices, here forced on
    one: then the base layers compute their products, and MLPs stay unfused, as peft.md says.
    """
    accelerate = pytest.importorskip(
        "accelerate", reason="runs where accelerate is installed: pip install .[bench]"
    )
    base = llama()
    layers = {f"model.layers.{layer}": "cpu" for layer in range(len(base.model.layers))}
    others = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    device_map = layers | others if several_devices else {"": "cpu"}
    accelerate.dispatch_model(base, device_map, force_hooks=several_devices)
    lora_config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, lora_config)
    expected = output(model)
    report = slk.accelerate_peft(model, fuse_mlp=True)
    torch.testing.assert_close(output(model), expected)
    assert not report.skipped
    op = "lora_branch" if several_devices else "lora_linear"
    assert calls.layers[op] > 0
    hooked = "its forward was replaced (as accelerate's hooks do)"
    assert {mlp.reason for mlp in report.mlps} == ({hooked} if several_devices else {None})


def test_errors():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        slk.accelerate_peft("model")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        slk.restore_peft("model")
    for model in (
        Model(),
        peft.get_peft_model(Model(), peft.LoHaConfig(target_modules=["q_proj"])),
    ):
        with pytest.raises(
            ValueError, match=f"model must have PEFT LoRA layers, got a {type(model).__name__}"
        ):
            slk.accelerate_peft(model)


TYPO = "target_modules 'v_porj' matches nothing (adapter 'default')"
ALL = {"target_modules": "all-linear"}
NOTES = {
    "a typo": ({"target_modules": ["q_proj", "v_porj"]}, (TYPO,)),
    "a list": ({"target_modules": ["q_proj", "v_proj"]}, ()),
    # Nobody wrote the names that PEFT makes of it.
    "all-linear without a layer": (ALL | {"exclude_modules": ["v_proj"]}, ()),
    "all-linear without a trained module": (ALL | {"modules_to_save": ["lm_head"]}, ()),
    "names that are excluded": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        (),
    ),
}


@pytest.mark.parametrize(("options", "notes"), NOTES.values(), ids=NOTES)
def test_names_that_match_nothing_are_told_and_no_others(options, notes):
    assert slk.accelerate_peft(make(**options)).notes == notes


def test_peft_is_imported_only_when_it_is_asked_for(monkeypatch):
    assert printed("import sys, stablelora_kernels; print('peft' in sys.modules)") == "False"
    needs = r"needs peft: pip install 'stablelora-kernels\[peft\]' \(import of peft halted"
    older = r"peft must be 0\.16 or newer, .* got 0\.15\.2: pip install .*\[peft\]"
    for call in (slk.accelerate_peft, slk.restore_peft):
        with monkeypatch.context() as patch, pytest.raises(ImportError, match=needs):
            patch.setitem(sys.modules, "peft", None)
            call(Model())
        with monkeypatch.context() as patch, pytest.raises(ImportError, match=older):
            patch.setattr(peft, "__version__", "0.15.2")
            call(Model())


@pytest.mark.parametrize("casts", [True, False])
def test_an_input_that_must_not_be_cast_is_pefts_own_error(casts):
    model, x = one_layer(torch.bfloat16)
    slk.accelerate_peft(model)
    model.base_model.model[0].cast_input_dtype_enabled = casts
    with nullcontext() if casts else pytest.raises(RuntimeError, match="same dtype"):
        model(x)


def test_a_frozen_A_keeps_no_input_for_backward():
    """LoRA-FA: its gradient alone needs x. B's needs A x, of r numbers a row."""
    model, x = one_layer(torch.float32)
    slk.accelerate_peft(model)
    size, rows, r = 4, x.shape[0], 8

    def kept() -> int:
        return saved_for_backward(lambda: model(x), [*model.parameters()])

    assert kept() == size * (rows * r + x.numel())
    model.base_model.model[0].lora_A.requires_grad_(False)
    assert kept() == size * rows * r


VISION = {
    "ViT": (
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
    "DINOv2": (
        "Dinov2Model",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
    "Swin": (
        "SwinModel",
        {
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "image_size": 32,
            "patch_size": 4,
            "window_size": 4,
        },
    ),
}


@pytest.mark.parametrize(("kind", "sizes"), VISION.values(), ids=VISION)
def test_vision_transformers_are_pefts(kind, sizes):
    transformers = pytest.importorskip(
        "transformers", reason="runs where transformers is installed: pip install .[test]"
    )
    torch.manual_seed(0)
    kind = getattr(transformers, kind)
    model = make(model=kind(kind.config_class(**sizes)), target_modules="all-linear").double()
    images = torch.randn(2, 3, sizes["image_size"], sizes["image_size"]).double()

    def step() -> dict[str, torch.Tensor]:
        return results(model, model(pixel_values=images)[0])

    expected = step()
    assert not slk.accelerate_peft(model, strict=True).skipped
    found = step()
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in found.items():
        assert (value - expected[name]).norm() <= 1e-9 * expected[name].norm(), name


def unet(diffusers):
    """Stable Diffusion's: its attention projections are linear layers among convolutions."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8)}
    return model, inputs | {"timestep": torch.tensor([3, 7])}


def flux(diffusers):
    """A transformer, whose blocks join the tokens of image and text."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 5, 8)}
    inputs |= {"pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([0.3, 0.7])}
    return model, inputs | {"img_ids": torch.randn(6, 3), "txt_ids": torch.zeros(5, 3)}


@pytest.mark.parametrize("build", [unet, flux])
def test_diffusion_models_are_pefts(build):
    """By diffusers' own ``add_adapter``, on the layers that its training scripts adapt."""
    diffusers = pytest.importorskip(
        "diffusers", reason="runs where diffusers is installed: pip install .[test]"
    )
    torch.manual_seed(0)
    model, inputs = build(diffusers)
    model.add_adapter(
        peft.LoraConfig(
            r=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"], init_lora_weights=False
        )
    )
    model.double()
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }

    def step() -> dict[str, torch.Tensor]:
        return results(model, model(**inputs).sample)

    expected = step()
    report = slk.accelerate_peft(model, strict=True)
    assert len(report.replaced) >= 6 and not report.skipped
    found = step()
    assert found.keys() == expected.keys() and len(found) > 2 * 6
    for name, value in found.items():
        assert (value - expected[name]).norm() <= 1e-9 * expected[name].norm(), name
