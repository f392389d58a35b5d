"""fuse_projections, fuse_mlp and tile_mlp in the life of a Llama, on our layers and PEFT's: as the
same model without.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.gated_mlps import LIBRARIES, adapted, assert_same, base_of, step
from tests.helpers.peft_models import peft
from tests.helpers.small_models import holds_kernels, lora_options, remove_lora, unpickled
from tests.helpers.small_models import llama as small_llama

# No group gives up.
pytestmark = pytest.mark.filterwarnings("error:fuse_projections")
FP32, FP64 = torch.float32, torch.float64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Above 64 tokens, below which projections are computed one by one.
IDS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
# The ops that a forward of two layers calls.
FUSED = {"fuse_projections": [3, 2] * 2, "fuse_mlp": ["silu"] * 2, "tile_mlp": ["silu"] * 2}
NOTES = {
    "fuse_projections": "fused projections: 2 x (q_proj, k_proj, v_proj); 2 x (gate_proj, up_proj)",
    "fuse_mlp": "computed in one op each: 2 x gated MLP (silu)",
    "tile_mlp": "computed in one op each: 2 x gated MLP (silu) in tiles",
}
each_fusion = pytest.mark.parametrize("fusion", FUSED)
each_library = pytest.mark.parametrize("library", LIBRARIES)


def llama(dtype=FP64):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return small_llama(**sizes, vocab_size=50, pad_token_id=0, attn_implementation="eager").to(
        dtype
    )


def make(library, fusion=None, dropout=0.0, dtype=FP64):
    """The model and the report."""
    fuse = {
        "fuse": fusion == "fuse_mlp",
        # 80 rows in three tiles.
        "tile": 32 if fusion == "tile_mlp" else False,
        "fuse_projections": fusion == "fuse_projections",
    }
    return adapted(llama(dtype), library, dropout=dropout, targets=TARGETS, **fuse)


def pair(library, fusion, dropout=0.0):
    """The model fused and not. Tiles draw masks of their own."""
    dropout = 0.0 if fusion == "tile_mlp" else dropout
    return make(library, fusion, dropout)[0], make(library, None, dropout)[0]


def classes_and_hooks(model):
    """And the attributes, of which transformers has one more on layers that it made."""
    return {
        name: (type(m), vars(m).keys() - {"_is_hf_initialized"}, len(m._forward_hooks))
        for name, m in model.named_modules()
    }


@pytest.mark.covering(1)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@each_library
@each_fusion
def test_it_trains_as_without(fusion, library, dropout, backend, calls):
    if fusion == "tile_mlp" and dropout:
        pytest.skip("tiles draw masks of their own: test_ops_oracle knows them")
    dtype, tolerance = (FP32, 1e-4) if backend == "triton" else (FP64, 1e-10)
    (model, report), (plain, other) = (
        make(library, which, dropout, dtype) for which in (fusion, None)
    )
    assert NOTES[fusion] in report.notes and NOTES[fusion] not in other.notes and other.mlps == ()
    expected = step(plain, IDS)
    assert calls.fused == []
    for _ in range(2):
        calls.clear()
        assert_same(step(model, IDS), expected, tolerance)
        assert calls.fused == FUSED[fusion]


@each_library
@each_fusion
def test_copies_and_pickles_compute_with_their_own_layers(fusion, library, calls):
    model, plain = pair(library, fusion, 0.2)
    expected = step(plain, IDS)
    assert model.state_dict().keys() == plain.state_dict().keys() and repr(model) == repr(plain)
    others = [copy.deepcopy(model), unpickled(model)]
    assert_same(step(copy.copy(model), IDS), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in others:
        calls.clear()
        assert_same(step(other, IDS), expected)
        assert calls.fused == FUSED[fusion]


def replica(module):
    """What DataParallel makes on each device: copies of the dicts, with plain tensors for
    parameters.
    """
    new = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        new._modules[name] = replica(child)
        setattr(new, name, new._modules[name])
    for name, p in module._parameters.items():
        setattr(new, name, None if p is None else p * 1 if p.requires_grad else p.detach().clone())
    return new


@each_library
@each_fusion
def test_replicas_compute_with_their_own_tensors(fusion, library, calls):
    model, plain = pair(library, fusion)
    expected, other = step(plain, IDS), replica(model)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(3)
    assert_same(step(model, IDS, call=other), expected)
    # By identity, a replica of a layer is not in its group.
    assert calls.fused == ([] if fusion == "fuse_projections" else FUSED[fusion])


@pytest.mark.covering
@pytest.mark.parametrize("reentrant", [True, False])
@each_library
@each_fusion
def test_gradient_checkpointing(fusion, library, reentrant, calls):
    model, plain = pair(library, fusion, 0.2)
    expected = step(plain, IDS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls.clear()
    assert_same(step(model, IDS), expected)
    # Forward, and again in backward.
    assert sorted(calls.fused) == sorted(2 * FUSED[fusion])


@pytest.mark.nightly
@each_library
@each_fusion
def test_torch_compile_has_no_graph_break(fusion, library):
    model, plain = pair(library, fusion)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(step(model, IDS, call=compiled), step(plain, IDS))


@each_library
@each_fusion
def test_merged_and_disabled_layers_compute_by_themselves(fusion, library, calls):
    model, plain = (each.eval() for each in pair(library, fusion))
    with torch.no_grad():
        expected = model(IDS).logits
        calls.clear()
        with slk.disable_lora(model), slk.disable_lora(plain):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        merge(model)
        torch.testing.assert_close(model(IDS).logits, expected)
        assert calls.fused == []
        unmerge(model)
        torch.testing.assert_close(model(IDS).logits, expected)
        assert calls.fused == FUSED[fusion]


def merge(model):
    if hasattr(model, "merge_adapter"):
        model.merge_adapter()
        return
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model):
    if hasattr(model, "unmerge_adapter"):
        model.unmerge_adapter()
        return
    for layer in lora_layers(model).values():
        layer.unmerge()


def two_adapters(model):
    import peft

    torch.manual_seed(9)
    targets = ["q_proj", "v_proj", "up_proj"]
    model.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    model.double()
    model.base_model.set_adapter(["default", "other"])


def scales(model):
    for layer in base_of(model).model.layers:
        layer.mlp.up_proj.scale_layer(1.5), layer.self_attn.k_proj.scale_layer(0.5)


# Groups need the adapter on each layer, an MLP at most one on each.
ADAPTERS = [
    (two_adapters, [3, 2] * 2, []),
    (lambda model: model.base_model.set_adapter("other"), [], ["silu"] * 2),
    (lambda model: model.base_model.set_adapter("default"), [3, 2] * 2, ["silu"] * 2),
    (scales, [3, 2] * 2, ["silu"] * 2),
    (
        lambda model: (model.base_model.set_adapter("other"), model.delete_adapter("default")),
        [],
        ["silu"] * 2,
    ),
]


@each_fusion
def test_pefts_adapters_are_switched_scaled_and_deleted(fusion, calls):
    models = pair("PEFT", fusion)
    for change, groups, mlps in ADAPTERS:
        for model in models:
            change(model)
        calls.clear()
        assert_same(*(step(model, IDS) for model in models))
        assert calls.fused == (groups if fusion == "fuse_projections" else mlps)


@pytest.mark.covering
@pytest.mark.parametrize("around", ["the layers", "the model"])
@each_library
@each_fusion
def test_fsdp2(fusion, library, around, mesh, calls):
    """Parameters are DTensors until a forward gathers them."""
    model, plain = pair(library, fusion)
    expected = step(plain, IDS)
    for layer in base_of(model).model.layers if around == "the layers" else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = step(model, IDS)
    assert calls.fused == FUSED[fusion]
    assert_same(
        {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()},
        expected,
    )


@each_fusion
def test_a_call_without_the_keyword_keeps_what_was_asked_for(fusion):
    """Also of a copy, of a pickle and of a wrapper, and with the other fusion."""
    model, plain = pair("PEFT", fusion)
    fused = classes_and_hooks(model)
    assert fused != classes_and_hooks(plain)
    for each in (model, copy.deepcopy(model), unpickled(model)):
        slk.accelerate_peft(each, **{fusion: None})
        assert classes_and_hooks(each) == fused
    slk.accelerate_peft(torch.nn.DataParallel(model))
    assert classes_and_hooks(model) == fused
    other = "fuse_projections" if fusion != "fuse_projections" else "fuse_mlp"
    notes = slk.accelerate_peft(model, **{other: True}).notes
    assert {NOTES[fusion], NOTES[other]} <= {*notes}
    assert NOTES[fusion] in slk.accelerate_peft(model, **{other: False}).notes
    # What was turned off stays off.
    slk.accelerate_peft(model, **{fusion: False})
    assert NOTES[fusion] not in slk.accelerate_peft(model).notes
    assert classes_and_hooks(model) == classes_and_hooks(plain)


@each_fusion
def test_layers_of_a_later_adapter_are_fused(fusion):
    """As the guide says: accelerate again after add_adapter."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    slk.accelerate_peft(model, **{fusion: True})
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("b")
    assert NOTES[fusion] in slk.accelerate_peft(model).notes


def test_what_is_no_bool_is_refused():
    model, _ = make("PEFT")
    before = classes_and_hooks(model)
    for options, error, message in (
        ({"fuse_mlp": 1}, TypeError, "fuse_mlp must be a bool, got 1 of type int"),
        (
            {"tile_mlp": 2.5},
            TypeError,
            "tile_mlp must be a bool or a tile's rows, got 2.5 of type float",
        ),
        ({"tile_mlp": 0}, ValueError, "tile_mlp must be at least 1, got 0"),
        (
            {"tile_mlp": 64, "fuse_mlp": False},
            ValueError,
            "fuse_mlp must not be False with tile_mlp=64",
        ),
    ):
        with pytest.raises(error, match=message):
            slk.accelerate_peft(model, **options)
        assert classes_and_hooks(model) == before


def test_tiles_need_no_other_keyword_and_go_with_the_fusion():
    model, _ = make("PEFT")
    assert slk.accelerate_peft(model, tile_mlp=16).mlps[0].tiled == 16
    assert NOTES["tile_mlp"] in slk.accelerate_peft(model, tile_mlp=True).notes
    # The MLP stays fused if that was asked for, and tiles go with it.
    assert NOTES["fuse_mlp"] in slk.accelerate_peft(model, fuse_mlp=True, tile_mlp=False).notes
    slk.accelerate_peft(model, tile_mlp=True)
    report = slk.accelerate_peft(model, fuse_mlp=False)
    assert report.mlps == () == slk.accelerate_peft(model).mlps


@each_library
@each_fusion
def test_it_is_given_back(fusion, library, calls):
    """By putting plain layers in, restoring, PEFT's unloading, and by accelerating without it."""
    if library == "ours":
        model = llama()
        state = copy.deepcopy(model.state_dict())
        slk.apply_lora(model, **lora_options(target_modules=TARGETS), **{fusion: True})
        remove_lora(model)
        expected = llama()(IDS).logits
        assert torch.equal(model(IDS).logits, expected) and calls.fused == []
        assert torch.equal(unpickled(model)(IDS).logits, expected)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        return
    model, plain = pair(library, fusion)
    fused, accelerated = classes_and_hooks(model), classes_and_hooks(plain)
    assert fused != accelerated
    slk.accelerate_peft(model, **{fusion: False})
    assert classes_and_hooks(model) == accelerated
    for _ in range(2):
        slk.accelerate_peft(model, **{fusion: True})
        assert classes_and_hooks(model) == fused
    for unloaded in (copy.deepcopy(model).merge_and_unload(), copy.deepcopy(model).unload()):
        # The classes come back with the last adapter that leaves, and then a pickle names no class
        # of this library.
        assert [type(module) for module in unloaded.modules()] == [
            type(module) for module in llama().modules()
        ]
        if fusion != "fuse_projections" and not holds_kernels(unloaded):
            assert b"stablelora_kernels" not in pickle.dumps(unloaded)
    slk.restore_peft(model), slk.restore_peft(plain)
    restored = classes_and_hooks(model)
    assert restored == classes_and_hooks(plain)
    slk.accelerate_peft(model)
    assert classes_and_hooks(model) == accelerated
    slk.restore_peft(model)
    assert torch.equal(unloaded(IDS).logits, llama()(IDS).logits) and calls.fused == []


@each_fusion
def test_load_adapter_fuses_too(fusion, calls, tmp_path):
    plain, _ = make("ours")
    slk.save_adapter(plain, tmp_path)
    model = llama()
    assert NOTES[fusion] in slk.load_adapter(model, tmp_path, **{fusion: True}).notes
    assert_same(step(model.train(), IDS), step(plain, IDS))
    assert calls.fused == FUSED[fusion]
