"""count_parameters and print_trainable_parameters: PEFT's numbers in PEFT's words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import stablelora_kernels as slk
from tests.helpers.peft_models import make as make_peft
from tests.helpers.processes import needs_gloo, spawn
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


def sharded(rank: int, world: int, place: Path) -> list[tuple[int, int]]:
    counts = []
    mesh = init_device_mesh("cpu", (world,))
    for cut in ("tensor parallel", "fully_shard"):
        model = Model()
        if cut == "tensor parallel":
            parallelize_module(model, mesh, {"layers.0.q_proj": ColwiseParallel()})
        slk.apply_lora(model, lora_config(r=3))
        if cut == "fully_shard":
            fully_shard(model, mesh=mesh)
        counts.append(slk.count_parameters(model))
    return counts


@needs_gloo
def test_shards_count_whole(tmp_path):
    model = Model()
    slk.apply_lora(model, lora_config(r=3))
    assert spawn(sharded, 2, tmp_path) == [[slk.count_parameters(model)] * 2] * 2


def test_parameters_that_zero_3_has_cut_count_whole():
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight.ds_numel = 16
    model.weight.data = torch.empty(0)
    assert slk.count_parameters(model) == (16, 16)
