"""When the layers of a projection group compute together: which inputs, modes, threads and
exceptions end a round.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from tests.helpers.gated_mlps import LIBRARIES, Wrapper, adapted, base_of
from tests.helpers.peft_models import make
from tests.helpers.quantized_weights import bnb_4bit
from tests.nn.test_fused_mlp_reasons import set_dropout

# No group gives up unless a test expects the warning.
pytestmark = pytest.mark.filterwarnings("error:fuse_projections")
each_library = pytest.mark.parametrize("library", LIBRARIES)
TARGETS = ["q_proj", "k_proj", "v_proj"]


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


def attention(library="ours", name="self_attn", fuse=True, **options):
    """The module in its model, and the last note of the report."""
    torch.manual_seed(0)
    model = Wrapper({name: Attention()})
    model, report = adapted(
        model, library, False, targets=TARGETS, fuse_projections=fuse, **options
    )
    return base_of(model)[name], report.notes[-1] if report.notes else ""


def rows(count=70):
    return torch.randn(count, 16)


@each_library
def test_a_projection_that_is_never_called_ends_it(library, calls):
    layer, _ = attention(library)
    # Recomputation of a checkpoint may end behind the first projection, between whole rounds.
    for _ in range(3):
        layer(rows(), only_queries=True)
        layer(rows())
    x = rows()
    # Once may be an exception's doing.
    layer(x, only_queries=True)
    layer(x, only_queries=True)
    message = r"not all of them are called, so '\S*self_attn.q_proj', .* one by one from here on"
    with pytest.warns(RuntimeWarning, match=message):
        layer(x, only_queries=True)
    calls.clear()
    layer(x)
    assert calls.groups == [] and calls.layers == {"lora_linear": 3}


class Mishap(Exception):
    pass


def fails(*args):
    raise Mishap


BREAKS = {
    "the op": lambda layer, calls, patch: patch.setattr(calls, "before", fails),
    "a sibling": lambda layer, calls, patch: patch.setattr(layer.k_proj, "forward", fails),
    "what is between": lambda layer, calls, patch: patch.setattr(layer, "norm_of_queries", fails),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("breaks", BREAKS.values(), ids=BREAKS)
@each_library
def test_an_exception_leaves_nothing_and_counts_for_nothing(
    library, breaks, trains, calls, monkeypatch
):
    """Out of memory in a row of smaller and smaller batches: it kept the batch that did not fit,
    and then gave up for good.
    """
    layer, _ = attention(library)

    def raises_and_keeps():
        x, raised = rows() * 1, False
        alive = weakref.ref(x)
        try:
            layer(x)
        except Mishap:
            raised = True
        del x
        return raised, alive() is not None

    with torch.set_grad_enabled(trains):
        for _ in range(4):
            with monkeypatch.context() as patch:
                breaks(layer, calls, patch)
                assert raises_and_keeps() == (True, False)
        calls.clear()
        assert raises_and_keeps() == (False, False) and calls.groups == [3]
        # Layers that are really never called still end it, after as many rounds as ever.
        layer(rows(), only_queries=True)
        layer(rows(), only_queries=True)
        with pytest.warns(RuntimeWarning, match="not all of them are called"):
            layer(rows(), only_queries=True)


def test_outputs_that_nobody_fetched_are_freed_before_the_next_are_computed(calls):
    """After an error between q and k, such as out of memory, the group holds k's and v's outputs
    and their graph.
    """
    layer, _ = attention()
    x = rows() * 1
    before, alive = weakref.ref(x), []
    layer.q_proj(x)
    del x
    assert before() is not None
    calls.before = lambda: alive.append(before())
    layer.q_proj(rows())
    assert alive == [None]


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["cross_attn", "EncDecAttention", "encoder_attn"])
@each_library
def test_cross_attention_shares_between_keys_and_values_only(library, name, calls):
    layer, note = attention(library, name)
    assert "1 x (k_proj, v_proj)" in note
    for _ in range(2):
        layer(rows(), rows(80))
    assert calls.groups == [2, 2]


@each_library
def test_siblings_that_are_not_called_with_one_tensor_go_apart(library, calls):
    """Right from the first call on, and said."""
    layer = attention(library)[0]
    plain = attention(library, fuse=False)[0]
    x = rows()
    keys = rows(80)
    message = r"'\S*self_attn.k_proj' was called with another tensor .*'\S*self_attn.q_proj'"
    with pytest.warns(RuntimeWarning, match=message) as seen:
        found = layer(x, keys)
    assert len(seen) == 1
    calls.clear()
    torch.testing.assert_close([found, layer(x, keys)], [plain(x, keys)] * 2)
    assert calls.groups == []


def test_quantized_siblings_are_named_and_cost_no_call_more(calls):
    model = nn.ModuleDict({"self_attn": Attention()})
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(model["self_attn"], name, bnb_4bit(getattr(model["self_attn"], name)))
    report = slk.apply_lora(model, "all-linear", r=2, fuse_projections=True)
    names = "1 x (q_proj, k_proj, v_proj)"
    assert (
        report.notes[-1]
        == f"projections that are not fused: {names}: 'q_proj' has a quantized weight"
    )
    assert not any(ATTRIBUTE in module.__dict__ for module in model.modules())
    assert not model["self_attn"]._forward_hooks and calls.groups == []


def test_layers_of_different_inputs_are_not_siblings():
    model = nn.ModuleDict({"self_attn": Attention(k_features=12)})
    report = slk.apply_lora(model, "all-linear", r=2, fuse_projections=True)
    assert report.notes[-1] == "fuse_projections found no layers that share an input"


@pytest.mark.covering(1)
@each_library
def test_siblings_of_two_dropouts_keep_their_own(library, backend, calls):
    """Although calls of these layouts are known already."""
    found = []
    for fuse in (True, False):
        layer, _ = attention(library, fuse=fuse, dropout=0.2)
        for _ in range(2):
            layer(torch.ones(70, 16))
        calls.clear()
        set_dropout(layer.k_proj, 0.6)
        torch.manual_seed(3)
        found.append(layer(torch.ones(70, 16)))
        assert calls.groups == []
    torch.testing.assert_close(*found)


def test_a_sibling_without_the_active_adapter_computes_alone():
    model = make(
        ("b", {"target_modules": ["q_proj"]}),
        model=Wrapper({"self_attn": Attention()}),
        target_modules=TARGETS,
    )
    layer, x = model.get_base_model()["self_attn"], rows()
    model.set_adapter("b")
    expected = layer(x)
    model.set_adapter("default")
    slk.accelerate_peft(model, fuse_projections=True)
    layer(x)
    model.set_adapter("b")
    torch.testing.assert_close(layer(x), expected)


CHANGES = {
    "in place": lambda x: x.mul_(2) is None,
    "gradients": lambda x: torch.enable_grad(),
    "autocast": lambda x: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@each_library
def test_an_input_or_a_mode_that_changed_between_two_calls_is_another(library, change):
    """Keys that were computed without a graph are not handed to a call that wants one."""
    layer, plain, x = attention(library)[0], attention(library, fuse=False)[0], rows()
    with torch.no_grad():
        layer.q_proj(x)
        with change(x) or nullcontext():
            found, expected = layer.k_proj(x), plain.k_proj(x)
    assert (found.dtype, found.requires_grad) == (expected.dtype, expected.requires_grad)
    torch.testing.assert_close(found, expected)


@each_library
def test_inference_mode(library, calls):
    layer, _ = attention(library)
    with torch.inference_mode():
        assert all(y.is_inference() for y in layer(rows()))
    assert calls.groups == [3]


def test_threads_get_their_own_outputs():
    """A round that another thread has replaced is not used: slower at worst, never another's
    output.
    """
    layer, plain = attention()[0], attention(fuse=False)[0]
    wrong = []

    def work(x):
        with torch.no_grad():
            expected = plain(x)
            for _ in range(50):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = layer(x)
                if not all(
                    torch.allclose(y, e, atol=1e-5) for y, e in zip(found, expected, strict=True)
                ):
                    wrong.append(x)

    threads = [threading.Thread(target=work, args=(rows(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
