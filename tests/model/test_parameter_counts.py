"""count_parameters and print_trainable_parameters: PEFT's numbers in PEFT's words."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stablelora_kernels as slk
from tests.helpers.peft_models import make as make_peft
from tests.helpers.quantized_weights import bnb_4bit
from tests.helpers.small_models import Model, lora_config


def in_4_bits(storage):
    layer = bnb_4bit(nn.Linear(64, 64), quant_storage=storage)
    return make_peft(model=nn.Sequential(layer), target_modules=["0"])


PEFTS = {
    "tied": lambda: make_peft(model=Model(tied=True)),
    "modules_to_save": lambda: make_peft(modules_to_save=["lm_head"]),
    "4 bits": lambda: in_4_bits(torch.uint8),
    "4 bits in bfloat16": lambda: in_4_bits(torch.bfloat16),
}


@pytest.mark.parametrize("kind", PEFTS)
def test_pefts_line(capsys, kind):
    model = PEFTS[kind]()
    model.print_trainable_parameters()
    theirs = capsys.readouterr().out
    for _ in range(2):
        slk.print_trainable_parameters(model)
        assert capsys.readouterr().out == theirs
        assert slk.count_parameters(model) == model.get_nb_trainable_parameters()
        slk.accelerate_peft(model)


def of_zero_3():
    """Cut by DeepSpeed, which leaves an empty placeholder."""
    model = nn.Linear(4, 4, bias=False)
    model.weight.ds_numel, model.weight.data = 16, torch.empty(0)
    return model


EDGES = {"nothing": (nn.Identity, 0), "lazy": (lambda: nn.LazyLinear(4), 0), "ZeRO 3": (of_zero_3, 16)}


@pytest.mark.parametrize(("make", "count"), EDGES.values(), ids=EDGES)
def test_edges(capsys, make, count):
    slk.print_trainable_parameters(make())
    line = f"trainable params: {count} || all params: {count} || trainable%: {100 if count else 0:.4f}\n"
    assert capsys.readouterr().out == line


def test_shards_count_whole():
    """Of two processes, of which this one is the first and the other only pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model, whole = Model(), Model()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        for each in (model, whole):
            slk.apply_lora(each, lora_config(r=3))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
        assert held < slk.count_parameters(whole)[1] and slk.count_parameters(model) == slk.count_parameters(whole)
    finally:
        dist.destroy_process_group()
