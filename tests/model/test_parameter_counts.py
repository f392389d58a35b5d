"""count_parameters and print_trainable_parameters: PEFT's numbers in PEFT's words."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import stablelora_kernels as slk
from tests.helpers.peft_models import make as make_peft
from tests.helpers.quantized_weights import bnb_4bit
from tests.helpers.small_models import Model, lora_config


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_pefts_line(capsys, kwargs, accelerated):
    model = make_peft(model=Model(tied=not kwargs), **kwargs)
    model.print_trainable_parameters()
    theirs = capsys.readouterr().out
    if accelerated:
        slk.accelerate_peft(model)
    assert slk.print_trainable_parameters(model) is None
    assert capsys.readouterr().out == theirs and theirs.startswith("trainable params: ")
    assert slk.count_parameters(model) == model.get_nb_trainable_parameters()


def test_our_layers(capsys):
    model = Model(tied=True)
    report = slk.apply_lora(model, lora_config())
    # Two layers of q_proj (8 x 8 with a bias) and v_proj; rank 2. The tied head counts once.
    trained, frozen = 4 * 2 * (8 + 8), 11 * 8 + 2 * (8 * 8 + 8 + 8 * 8 + 2 * 8)
    assert slk.count_parameters(model) == (trained, trained + frozen) == (report.trainable, report.total)
    slk.print_trainable_parameters(model)
    expected = f"trainable params: {trained:,} || all params: {trained + frozen:,} || trainable%: "
    assert capsys.readouterr().out == f"{expected}{100 * trained / (trained + frozen):.4f}\n"
    slk.merge_lora(model)
    assert slk.count_parameters(model) == (report.trainable, report.total)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_weights_in_4_bits_count_elements(storage):
    """As PEFT counts them, whatever dtype holds the bytes."""
    model = nn.ModuleDict({"q_proj": bnb_4bit(nn.Linear(64, 64), quant_storage=getattr(torch, storage))})
    assert slk.count_parameters(model)[1] == 64 * 64 + 64
    theirs = make_peft(model=nn.Sequential(model["q_proj"]), target_modules=["0"])
    assert slk.count_parameters(theirs) == theirs.get_nb_trainable_parameters()


def test_edges(capsys):
    slk.print_trainable_parameters(nn.Identity())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"
    assert slk.count_parameters(nn.Linear(3, 2)) == (8, 8)
    # A lazy module has no shape yet.
    assert slk.count_parameters(nn.Sequential(nn.LazyLinear(4), nn.Linear(3, 2))) == (8, 8)
    for function in (slk.count_parameters, slk.print_trainable_parameters):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
            function([nn.Linear(2, 2)])


@pytest.fixture
def mesh_of_two():
    """Of which this process is one and the other only pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("cut", ["tensor parallel", "fully_shard"])
def test_shards_count_whole(cut, mesh_of_two):
    mesh, models = mesh_of_two, (Model(), Model())
    if cut == "tensor parallel":
        parallelize_module(models[0], mesh, {"layers.0.q_proj": ColwiseParallel()})
    for model in models:
        slk.apply_lora(model, lora_config(r=3))
    if cut == "fully_shard":
        fully_shard(models[0], mesh=mesh)
    assert slk.count_parameters(models[0]) == slk.count_parameters(models[1])
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in models[0].parameters())
    assert held < slk.count_parameters(models[0])[1]


def test_parameters_that_zero_3_has_cut_count_whole():
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight.ds_numel = 16
    model.weight.data = torch.empty(0)
    assert slk.count_parameters(model) == (16, 16)
