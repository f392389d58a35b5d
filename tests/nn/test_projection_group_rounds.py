"""When the layers of a projection group compute together: which inputs, modes, threads and exceptions end a round."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

import stablelora_kernels as slk

pytest.importorskip("peft", reason="peft is not installed")

from stablelora_kernels.nn import projection_group
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from tests.helpers.oracle import bytes_held
from tests.helpers.projection_groups import count_groups
from tests.helpers.small_models import fill_b

# No group gives up unless a test expects the warning.
pytestmark = pytest.mark.filterwarnings("error:fuse_projections")


@pytest.fixture
def calls(monkeypatch):
    return count_groups(monkeypatch)


class Attention(nn.Module):
    """q, k and v of which a test calls those it wants."""

    def __init__(self, k_features=16) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 24), nn.Linear(k_features, 8)
        self.v_proj = nn.Linear(16, 8)

    def norm_of_queries(self, queries):
        return queries

    def forward(self, x, keys=None, only_queries=False):
        keys, queries = x if keys is None else keys, self.norm_of_queries(self.q_proj(x))
        return (queries,) if only_queries else (queries, self.k_proj(keys), self.v_proj(keys))


def attention(name="self_attn", **kwargs):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: Attention(**kwargs)})
    report = slk.apply_lora(
        model, slk.LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]), fuse_projections=True
    )
    fill_b(model)
    return model[name], report


def test_a_projection_that_is_never_called_ends_it():
    layer, _ = attention()
    x = torch.randn(70, 16)
    # Once may be an exception's doing.
    layer(x, only_queries=True)
    layer(x, only_queries=True)
    with pytest.warns(
        RuntimeWarning, match=r"not all of them are called, so 'self_attn.q_proj', .* one by one from here on"
    ):
        layer(x, only_queries=True)
    assert not layer.q_proj.__dict__[ATTRIBUTE].on


class Mishap(Exception):
    pass


def fails(*args):
    raise Mishap


def breaks_the_op(layer, patch):
    patch.setattr(layer.q_proj.__dict__[ATTRIBUTE], "compute", fails)


def breaks_a_sibling(layer, patch):
    patch.setattr(layer.k_proj, "forward", fails)


def breaks_what_is_between(layer, patch):
    patch.setattr(layer, "norm_of_queries", fails)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("breaks", [breaks_the_op, breaks_a_sibling, breaks_what_is_between])
def test_an_exception_leaves_nothing_and_counts_for_nothing(breaks, trains, monkeypatch, calls):
    """Out of memory in a row of smaller and smaller batches: it kept the batch that did not fit, and then gave up for good."""
    layer, _ = attention()
    group = layer.q_proj.__dict__[ATTRIBUTE]
    with torch.set_grad_enabled(trains):
        for _ in range(4):
            x = torch.randn(70, 16) * 1
            alive = weakref.ref(x)
            with monkeypatch.context() as patch:
                breaks(layer, patch)
                try:
                    layer(x)
                except Mishap:
                    pass
                else:
                    raise AssertionError("no exception")
            del x
            assert alive() is None and group._pending is None
        assert group.on and group._wasted == 0
        # Layers that are really never called still end it, after as many rounds as ever.
        layer(torch.randn(70, 16), only_queries=True)
        layer(torch.randn(70, 16), only_queries=True)
        with pytest.warns(RuntimeWarning, match="not all of them are called"):
            layer(torch.randn(70, 16), only_queries=True)


def test_cross_attention_shares_between_keys_and_values_only(calls):
    for name in ("cross_attn", "EncDecAttention", "encoder_attn"):
        layer, report = attention(name)
        assert "1 x (k_proj, v_proj)" in report.notes[-1]
        x, keys = torch.randn(70, 16), torch.randn(80, 16)
        calls.clear()
        for _ in range(2):
            layer(x, keys)
        assert calls == [2, 2]


def test_layers_of_different_inputs_are_not_siblings():
    model = nn.ModuleDict({"self_attn": Attention(k_features=12)})
    report = slk.apply_lora(model, slk.LoRAConfig(r=2, target_modules="all-linear"), fuse_projections=True)
    assert report.notes[-1] == "fuse_projections found no layers that share an input"


def test_an_input_changed_between_two_calls_is_another():
    layer, _ = attention()
    x = torch.randn(70, 16)
    with torch.no_grad():
        layer.q_proj(x)
        x.mul_(2)
        sharing_off, _ = attention()
        for part in (sharing_off.q_proj, sharing_off.k_proj, sharing_off.v_proj):
            part.__dict__.pop(ATTRIBUTE)
        torch.testing.assert_close(layer.k_proj(x), sharing_off.k_proj(x))


def test_grad_mode_is_part_of_a_round():
    """Keys that were computed without a graph are not handed to a call that wants one."""
    layer, _ = attention()
    x = torch.randn(70, 16)
    with torch.no_grad():
        layer.q_proj(x)
    assert layer.k_proj(x).requires_grad


def test_inference_mode():
    layer, _ = attention()
    with torch.inference_mode():
        x = torch.randn(70, 16)
        assert all(y.is_inference() for y in layer(x))


def test_threads_get_their_own_outputs():
    """A round that another thread has replaced is not used: slower at worst, never another's output."""
    layer, _ = attention()
    inputs = [torch.randn(70, 16) for _ in range(4)]
    plain = copy.deepcopy(layer)
    projection_group.remove_projection_groups(plain.modules())
    wrong = []

    def work(x):
        with torch.no_grad():
            expected = plain(x)
            for _ in range(50):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = layer(x)
                if not all(torch.allclose(y, e, atol=1e-5) for y, e in zip(found, expected, strict=True)):
                    wrong.append(x)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_errors_are_the_layers_own():
    layer, _ = attention()
    with pytest.raises(ValueError, match=r"x must be \[..., 16\] to fit weight \[24, 16\], got \[70, 15\]"):
        layer(torch.randn(70, 15))
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch.bfloat16, got torch.float32"):
        layer(torch.randn(70, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_no_more_is_saved_for_backward(dropout, backend):
    """The bytes that autograd keeps, by storage: X once, each S, seeds or masks; as without."""

    def kept(fused):
        torch.manual_seed(0)
        model = nn.ModuleDict({"self_attn": Attention()})
        config = slk.LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=dropout)
        slk.apply_lora(model, config, fuse_projections=fused)
        x = torch.randn(70, 16, requires_grad=True)
        return bytes_held(lambda: model.train()["self_attn"](x), model.parameters())

    assert kept(True) == kept(False)
    if backend == "triton":
        # X and three S in float32, and a seed for each mask.
        assert kept(True) == 4 * 70 * (16 + 3 * 2) + (3 * 8 if dropout else 0)


def test_outputs_that_nobody_fetched_are_freed_before_the_next_are_computed():
    """After an error between q and k, such as out of memory, the group holds k's and v's outputs and their graph."""
    held = []

    def compute(layers, x):
        held.append(group._pending is not None)
        return [x.clone() for _ in layers]

    layers = [nn.Identity(), nn.Identity()]
    group = projection_group.ProjectionGroup(("q_proj", "k_proj"), layers, compute)
    group.output(layers[0], torch.ones(2))
    group.output(layers[0], torch.ones(2))
    assert held == [False, False]
