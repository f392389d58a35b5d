"""disable_lora: the base model's output while its block is open, and nothing of it afterwards."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from tests.helpers.inputs import FP32
from tests.helpers.peft_models import make as make_peft
from tests.helpers.quantized_weights import K, N, bnb_4bit
from tests.helpers.small_models import IDS, Model, fill_b, llama, lora_config, lora_over, output


def adapted(model=None, **kwargs):
    """The small model with branches that are not zero, and its output without them."""
    torch.manual_seed(0)
    model = Model() if model is None else model
    base = output(model)
    slk.apply_lora(model, lora_config(**kwargs))
    fill_b(model)
    assert not torch.allclose(output(model), base, atol=1e-3)
    return model, base


def test_a_layer_that_was_moved_computes_with_its_own_weight():
    base, x = bnb_4bit(nn.Linear(K, N)), torch.randn(2, 5, K)
    expected, base_bias = base(x), base.bias
    layer = lora_over(base)
    # As .to() does it: the new parameters are registered in the LoRA layer alone.
    layer.bias = nn.Parameter(torch.zeros(N), requires_grad=False)
    with slk.disable_lora(layer):
        torch.testing.assert_close(layer(x), expected - base_bias)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_nested_and_after_an_error(fused):
    torch.manual_seed(0)
    model = llama()
    base = output(model)
    slk.apply_lora(model, lora_config(target_modules="all-linear"), fuse_projections=fused)
    fill_b(model)
    active = output(model)
    assert not torch.allclose(active, base, atol=1e-3)
    with slk.disable_lora(model):
        assert torch.equal(output(model), base)
        with slk.disable_lora(model.model.layers[0]), slk.disable_lora(model):
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), active)
    with pytest.raises(KeyError, match="why"), slk.disable_lora(model):
        raise KeyError("why")
    assert torch.equal(output(model), active)
    groups = {layer.__dict__[ATTRIBUTE] for layer in lora_layers(model).values() if ATTRIBUTE in layer.__dict__}
    assert bool(groups) == fused and all(group.on for group in groups)


def test_part_of_a_projection_group():
    """The others go on with their branch, and the group is there again afterwards."""
    torch.manual_seed(0)
    model = llama()
    slk.apply_lora(model, lora_config(target_modules="all-linear"), fuse_projections=True)
    fill_b(model)
    twin = copy.deepcopy(model)
    slk.nn.projection_group.remove_projection_groups(twin.modules())
    attention = model.model.layers[0].self_attn
    with slk.disable_lora(attention.k_proj), slk.disable_lora(twin.model.layers[0].self_attn.k_proj):
        for _ in range(3):
            torch.testing.assert_close(output(model), output(twin))
        active = output(copy.deepcopy(model))
        assert not torch.allclose(output(model), active, atol=1e-3)
    torch.testing.assert_close(output(model), active)
    assert attention.q_proj.__dict__[ATTRIBUTE].on


def test_copies_made_in_the_block_are_not_in_it():
    model, base = adapted()
    active = output(model)
    # In DataParallel as well.
    with slk.disable_lora(nn.DataParallel(model)):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert all(torch.equal(output(twin), active) for twin in twins) and torch.equal(output(model), base)
        # A replica of DataParallel is the same layer.
        assert model.layers[0].q_proj._replicate_for_data_parallel()._disabled
    assert all(torch.equal(output(twin), active) for twin in twins)


def test_blocks_of_two_threads_overlap():
    """The model is off for all threads until the last block ends."""
    model, base = adapted()
    active = output(model)
    entered, leave, found = threading.Event(), threading.Event(), []

    def other():
        with slk.disable_lora(model):
            entered.set()
            assert leave.wait(30)
            found.append(output(model))

    thread = threading.Thread(target=other)
    with slk.disable_lora(model):
        thread.start()
        assert entered.wait(30)
    assert torch.equal(output(model), base)
    leave.set()
    thread.join()
    assert torch.equal(found[0], base) and torch.equal(output(model), active)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_is_compiled_once_more(fullgraph):
    model, base = adapted()
    active = output(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    for _ in range(3):
        torch.testing.assert_close(output(compiled), active)
        with slk.disable_lora(compiled):
            torch.testing.assert_close(output(compiled), base)
            with slk.disable_lora(model):
                torch.testing.assert_close(output(compiled), base)
    assert len(graphs) == 2


def test_a_block_inside_of_compiled_code():
    model, base = adapted()
    active = output(model)
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def both(ids):
        policy = model(ids)
        with slk.disable_lora(model):
            reference = model(ids)
        return policy, reference

    for _ in range(2):
        for found, expected in zip(both(IDS), (active, base), strict=True):
            torch.testing.assert_close(found, expected)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant, self.contexts = body, reentrant, {}

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant, **self.contexts)


def checkpointed(reentrant: bool) -> tuple[Checkpointed, torch.Tensor, torch.Tensor]:
    """A model with LoRA, an input, and the gradient that its base gives the input."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    x = torch.randn(5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(body(x).square().sum(), x)
    slk.apply_lora(body, lora_config(target_modules=["0", "2"]))
    fill_b(body)
    return Checkpointed(body, reentrant), x, expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_recomputed_in_the_block(reentrant):
    """Backward inside of the block gives the base's gradients. Of a forward without gradients nothing is recomputed."""
    model, x, expected = checkpointed(reentrant)
    with slk.disable_lora(model):
        model(x).square().sum().backward()
    assert torch.equal(x.grad, expected) and all(p.grad is None for p in model.body.parameters())
    model(x).square().sum().backward()
    grads = [layer.lora_A.grad.clone() for layer in lora_layers(model.body).values()]
    model.body.zero_grad()
    # As DPO does it.
    policy = model(x)
    with torch.no_grad(), slk.disable_lora(model):
        reference = model(x)
    (policy.square().sum() + reference.sum()).backward()
    assert all(
        torch.equal(layer.lora_A.grad, g) for layer, g in zip(lora_layers(model.body).values(), grads, strict=True)
    )


def test_checkpointed_blocks_that_are_recomputed_after_the_block_raise():
    """PyTorch notices that the recomputed block saves other tensors. context_fn disables the layers for the recomputation."""
    model, x, expected = checkpointed(reentrant=False)
    with slk.disable_lora(model):
        y = model(x)
    with pytest.raises(CheckpointError):
        y.square().sum().backward()
    model.contexts = {"context_fn": lambda: (nullcontext(), slk.disable_lora(model.body))}
    with slk.disable_lora(model):
        y = model(x)
    x.grad = None
    y.square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft_models(accelerated, saved):
    """modules_to_save go back to their originals, and no flag is left changed."""
    torch.manual_seed(0)
    base = output(Model())
    model = make_peft(modules_to_save=saved)
    if saved:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    if accelerated:
        slk.accelerate_peft(model)
    # Somebody has frozen one adapter.
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    active, flags = output(model), {name: p.requires_grad for name, p in model.named_parameters()}
    with slk.disable_lora(model):
        assert torch.equal(output(model), base) and model.get_model_status().enabled is False
        with slk.disable_lora(model), model.disable_adapter():
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), active) and model.get_model_status().enabled is True
    frozen.requires_grad_(False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(KeyError), slk.disable_lora(model):
        raise KeyError
    assert torch.equal(output(model), active)
    # What PEFT has disabled stays so.
    model.base_model.disable_adapter_layers()
    with slk.disable_lora(model):
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), base)


def bias_that_trains():
    part = nn.Sequential(nn.Linear(4, 4))
    slk.apply_lora(part, slk.LoRAConfig(r=2, target_modules=["0"], bias="all"))
    return part[0]


SAVED = r"model must keep what its base model computes, got modules_to_save=\['lm_head'\]"
REFUSED = {
    "no module": (lambda: "model", TypeError, r"model must be an nn\.Module, got str"),
    "no LoRA": (lambda: nn.Linear(2, 2), ValueError, "got a Linear without any"),
    "modules_to_save": (lambda: nn.DataParallel(adapted(modules_to_save=["lm_head"])[0]), ValueError, SAVED),
    "biases": (lambda: adapted(bias="lora_only")[0], ValueError, "got bias='lora_only'"),
    "PEFT's biases": (lambda: make_peft(bias="all"), ValueError, "got bias='all'"),
    "a layer's bias": (bias_that_trains, ValueError, "got a bias that trains"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make, error, message):
    model = make()
    with pytest.raises(error, match=message), slk.disable_lora(model):
        pass
    if isinstance(model, nn.DataParallel):
        assert not torch.equal(output(model.module), output(Model()))


def test_a_4_bit_layer_is_as_before():
    """bitsandbytes' own forward casts its bias in place and takes its first input's dtype for good."""
    base = bnb_4bit(nn.Linear(K, N), None)
    base.bias.data = base.bias.data.float() + 1e-4
    base.compute_dtype = None
    layer = lora_over(base)
    x = torch.randn(3, K)
    bias, before = layer.bias.clone(), layer(x)
    with slk.disable_lora(layer):
        layer(x.bfloat16())
    assert layer.bias.dtype == FP32 and torch.equal(layer.bias, bias)
    assert base.compute_dtype is None and torch.equal(layer(x), before)
