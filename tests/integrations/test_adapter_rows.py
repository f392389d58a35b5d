"""``adapters_of_rows``: each adapter trains as it would alone under plain PEFT; and what it refuses."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.integrations.peft.accelerate import ROWS_ARE_NOT_FUSED
from stablelora_kernels.integrations.peft.rows_state import ATTRIBUTE
from stablelora_kernels.ops.dropout import Drawn
from stablelora_kernels.ops.lora_rows import torch as rows_torch
from tests.helpers.launches import count_launches
from tests.helpers.peft_models import config, make, peft
from tests.helpers.quantized_weights import bnb_4bit
from tests.helpers.small_models import IDS, Model, llama, through_a_file

transformers = pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[test]"
)
# Three adapters of other ranks, scalings, targets and dropout, with their rows and learning rates.
CONFIGS = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 3, "lora_alpha": 8, "use_rslora": True},
    "c": {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
}
DROPOUT = {"a": 0.25, "b": 0.0, "c": 0.5}
RATES = {"a": 1e-2, "b": 3e-3, "c": 1e-3}
NAMES = ["a", "a", "b", "c", "c", "c"]
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "gemma3": (transformers.Gemma3TextConfig, {}),
}


def three_adapters(family: str = "llama", dropout: bool = False, dtype=torch.float64) -> nn.Module:
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(kind(**SIZES, **settings))
    model = None
    for name, own in CONFIGS.items():
        lora = {"target_modules": "all-linear", "init_lora_weights": False} | own
        lora_config = peft.LoraConfig(**lora, lora_dropout=DROPOUT[name] if dropout else 0.0)
        if model is None:
            model = peft.get_peft_model(base, lora_config, adapter_name=name)
        else:
            model.add_adapter(name, lora_config)
    return model.to(dtype).train()


def of_adapter(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: p for key, p in model.named_parameters() if f".{name}." in key and "lora_" in key}


def train_all(model: nn.Module) -> None:
    for name in CONFIGS:
        for p in of_adapter(model, name).values():
            p.requires_grad_(True)


def fixed_keep(x: Tensor, dropout_p: float) -> Tensor:
    """A mask that the size of x decides."""
    numbers = torch.arange(x.numel()) * 2654435761 % 1009
    return (numbers >= 1009 * dropout_p).view(x.shape)


class FixedDropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * fixed_keep(x, self.p) / (1 - self.p)


@contextmanager
def fixed_masks(alone: nn.Module) -> Iterator[None]:
    """PEFT's dropout and the op's draw the same masks."""

    def draw(x: Tensor, dropout_p: float) -> Drawn:
        if not dropout_p:
            return Drawn(None, None, 1.0)
        keep = fixed_keep(x, dropout_p)
        return Drawn(keep, keep, 1 / (1 - dropout_p))

    for module in [*alone.modules()]:
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[name] = FixedDropout(dropout.p)
    with mock.patch.object(rows_torch, "draw_to_keep", draw):
        yield


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """What transformers' models compute, without leaving float64."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.covering(2)
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    "reentrant", [None, False, True], ids=["kept", "not reentrant", "reentrant"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_adapter_trains_as_alone(family, reentrant, dropout, fuse):
    """Four steps of AdamW in float64 against plain PEFT, one adapter after another."""
    together = three_adapters(family, dropout)
    alone = copy.deepcopy(together)
    slk.accelerate_peft(together, fuse_projections=fuse, fuse_mlp=fuse)
    train_all(together)
    if reentrant is not None:
        for model in (together, alone):
            kwargs = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
    groups = [
        {"params": [*of_adapter(together, name).values()], "lr": rate}
        for name, rate in RATES.items()
    ]
    optimizer = torch.optim.AdamW(groups)
    optimizers = {
        name: torch.optim.AdamW(of_adapter(alone, name).values(), lr=rate)
        for name, rate in RATES.items()
    }
    with fixed_masks(alone):
        for _ in range(4):
            ids = torch.randint(1, 40, (len(NAMES), 9))
            with slk.adapters_of_rows(together, NAMES):
                losses = slk.losses_of_rows(together(ids).logits, ids, NAMES)
                sum(losses.values()).backward()
            for name in CONFIGS:
                rows = [row for row, row_name in enumerate(NAMES) if row_name == name]
                alone.set_adapter(name)
                loss = loss_of(alone(ids[rows]).logits, ids[rows])
                loss.backward()
                assert abs(loss.item() - losses[name].item()) <= 1e-12
                for key, p in of_adapter(alone, name).items():
                    grad = together.get_parameter(key).grad
                    assert p.grad.any() and (grad - p.grad).norm() <= 1e-12 * p.grad.norm(), key
                optimizers[name].step()
                optimizers[name].zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            for name in CONFIGS:
                for key, p in of_adapter(alone, name).items():
                    of_all = together.get_parameter(key)
                    assert (of_all - p).norm() <= 1e-12 * p.norm(), key
                    # The next gradients are compared at the same point.
                    of_all.data.copy_(p)


def outputs_alone(model: nn.Module, names: list[str], ids: Tensor, **kwargs) -> Tensor:
    """Each row's output under plain PEFT with its adapter alone."""
    active = [*model.active_adapters]
    slk.restore_peft(model)
    outputs = []
    for row, name in zip(ids.split(1), names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(model(row, **kwargs))
        else:
            model.set_adapter(name)
            outputs.append(model(row, **kwargs))
    model.set_adapter(active[0])
    slk.accelerate_peft(model)
    return torch.cat([getattr(output, "logits", output) for output in outputs])


def test_the_small_model_on_both_backends(backend):
    """A layer without a row's adapter computes the base product alone."""
    model = make(("b", {"r": 5}), ("q", {"target_modules": ["q_proj"]}), r=3)
    slk.accelerate_peft(model)
    names = ["q", "__base__", "default", "b"]
    ids = torch.arange(20).view(4, 5) % 11
    expected = outputs_alone(model, names, ids)
    with slk.adapters_of_rows(model, names):
        found = model(ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_launches_and_one_optimizer_launch():
    """On each of four layers a launch for each adapter that it has, and one for the step of all."""
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    names = ["default", *(f"lr{i}" for i in range(7))]
    with slk.settings(backend="triton"):
        model = make(*((name, {}) for name in names[1:])).train()
        slk.accelerate_peft(model)
        settings = {name: {"lr": 10.0**-i} for i, name in enumerate(names)}
        optimizer = slk.StableLoRAAdamW.from_model(model, adapters=settings)
        ids = torch.arange(40).view(8, 5) % 11
        for _ in range(2):
            with slk.adapters_of_rows(model, names):
                with count_launches() as forward:
                    losses = slk.losses_of_rows(model(ids), ids, names)
                with count_launches() as backward:
                    sum(losses.values()).backward()
            with count_launches() as step:
                optimizer.step()
            optimizer.zero_grad()
    assert sum(forward.values()) == 4 * 8 and sum(backward.values()) == 4 * 8
    assert dict(step) == {"_stable_adamw_kernel": 1}


def test_base_rows_are_dpos_reference_in_the_same_forward():
    """DPO by one forward, against a second one with the adapter disabled."""
    model = three_adapters()
    model.set_adapter("a")
    alone = copy.deepcopy(model)
    slk.accelerate_peft(model)
    chosen, rejected = torch.randint(1, 40, (2, 3, 9))
    ids = torch.cat([chosen, rejected])

    def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        return chosen.sum((1, 2))

    def dpo(policy: Tensor, reference: Tensor) -> Tensor:
        chosen, rejected = (0.1 * (policy - reference)).chunk(2)
        return -nn.functional.logsigmoid(chosen - rejected).mean()

    names = ["a"] * len(ids) + ["__base__"] * len(ids)
    with slk.adapters_of_rows(model, names):
        both = log_probs(model(ids.repeat(2, 1)).logits, ids.repeat(2, 1))
        policy, reference = both.chunk(2)
        loss = dpo(policy, reference.detach())
        loss.backward()
    with torch.no_grad(), alone.disable_adapter():
        expected_reference = log_probs(alone(ids).logits, ids)
    expected = dpo(log_probs(alone(ids).logits, ids), expected_reference)
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-12
    for key, p in of_adapter(alone, "a").items():
        grad = model.get_parameter(key).grad
        assert p.grad.any() and (grad - p.grad).norm() <= 1e-11 * p.grad.norm(), key


# Contexts.


def test_contexts_nest_and_end_with_an_exception():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    plain = model(IDS)
    inner, outer = (
        outputs_alone(model, names, IDS) for names in (["__base__"] * 2, ["b", "default"])
    )
    with slk.adapters_of_rows(model, ["b", "default"]):
        with slk.adapters_of_rows(model, ["__base__"] * 2):
            torch.testing.assert_close(model(IDS), inner)
        torch.testing.assert_close(model(IDS), outer)
        with pytest.raises(KeyError), slk.adapters_of_rows(model, ["default"] * 2):
            raise KeyError
        torch.testing.assert_close(model(IDS), outer)
    assert torch.equal(model(IDS), plain)


def test_layers_that_are_adapted_later_take_part_in_later_contexts():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    with slk.adapters_of_rows(model, ["b", "b"]):
        model(IDS)
    model.add_adapter("c", config(target_modules=["q_proj", "v_proj", "lm_head"]))
    slk.accelerate_peft(model)
    with slk.adapters_of_rows(model, ["c", "c"]):
        found = model(IDS)
    model.set_adapter("c")
    torch.testing.assert_close(found, model(IDS))


def test_a_context_of_a_wider_model_within_one_of_its_part_is_refused():
    """The part's layers would leave the open context."""
    parts = [make(("b", {})), make(("b", {}))]
    for part in parts:
        slk.accelerate_peft(part)
    error = pytest.raises(RuntimeError, match="within adapters_of_rows of this model")
    with (
        slk.adapters_of_rows(parts[0], ["b", "default"]),
        error,
        slk.adapters_of_rows(nn.ModuleList(parts), ["b", "b"]),
    ):
        pass


def test_disabled_adapters_are_the_base_for_all_rows():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    with slk.adapters_of_rows(model, ["b", "default"]), model.disable_adapter():
        found = model(IDS)
    with model.disable_adapter():
        assert torch.equal(found, model(IDS))


def test_generation_gives_each_adapters_tokens():
    model = three_adapters(dtype=torch.float32).eval()
    slk.accelerate_peft(model)
    ids = torch.randint(1, 40, (4, 5))
    names = ["b", "a", "c", "__base__"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    with slk.adapters_of_rows(model, names):
        found = model.generate(input_ids=ids, **settings)
    expected = []
    for row, name in zip(ids.split(1), names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(model.generate(input_ids=row, **settings))
        else:
            model.set_adapter(name)
            expected.append(model.generate(input_ids=row, **settings))
    assert torch.equal(found, torch.cat(expected))


def checkpointed(reentrant: bool) -> nn.Module:
    model = three_adapters()
    slk.accelerate_peft(model)
    train_all(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_of_a_checkpointed_forward_needs_its_own_context(reentrant):
    model = checkpointed(reentrant)
    ids = torch.randint(1, 40, (len(NAMES), 9))

    def forward() -> Tensor:
        return model(ids).logits.sum()

    error = pytest.raises(
        RuntimeError, match="call backward within the adapters_of_rows of the forward"
    )
    # After the context, also if others have come between.
    with slk.adapters_of_rows(model, NAMES):
        loss, other = forward(), forward()
    with error:
        loss.backward()
    with torch.no_grad(), slk.adapters_of_rows(model, NAMES):
        forward()
    with error:
        other.backward()
    # A forward without a context, whose backward is in one.
    loss = forward()
    with slk.adapters_of_rows(model, NAMES), error:
        loss.backward()
    # Another context's.
    with slk.adapters_of_rows(model, NAMES):
        loss = forward()
        with slk.adapters_of_rows(model, NAMES[::-1]), error:
            loss.backward()
    # What is right: before, between and after contexts.
    plain = forward()
    with slk.adapters_of_rows(model, NAMES):
        outer = forward()
        with slk.adapters_of_rows(model, NAMES[::-1]):
            forward().backward()
        outer.backward()
        forward().backward()
    plain.backward()


def test_backward_without_checkpointing_may_come_later():
    model = three_adapters()
    slk.accelerate_peft(model)
    train_all(model)
    ids = torch.randint(1, 40, (len(NAMES), 9))
    grads = []
    for inside in (True, False):
        model.zero_grad()
        with slk.adapters_of_rows(model, NAMES):
            loss = model(ids).logits.square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items())


def test_a_context_is_one_threads():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    errors: list[str] = []

    def elsewhere() -> None:
        for action in (
            lambda: slk.adapters_of_rows(model, ["b", "b"]).__enter__(),
            lambda: model(IDS),
        ):
            try:
                action()
            except RuntimeError as error:
                errors.append(str(error))

    with slk.adapters_of_rows(model, ["b", "default"]):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(errors) == 2 and "cannot open another" in errors[0] and "has opened" in errors[1]
    # A thread may open one once it is free.
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(errors) == 2


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.q_proj, x, use_reentrant=False)


def make_nodes(count: int) -> None:
    """As many nodes of autograd's, which numbers those of each thread."""
    x = torch.ones(1, requires_grad=True)
    for _ in range(count):
        x * 2


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_threads_number_autograds_nodes_by_themselves():
    """A thread's numbers may fall into the block of another thread, or of one that has ended."""
    lora = {"target_modules": ["q_proj"]}
    model = make(("b", lora), model=Checkpointed(), **lora)
    slk.accelerate_peft(model)
    x = torch.randn(2, 5, 8)

    def block() -> None:
        make_nodes(5)
        with slk.adapters_of_rows(model, ["default", "b"]):
            make_nodes(200)
            model(x).sum().backward()

    def outside() -> list[Tensor]:
        model.zero_grad()
        make_nodes(50)
        model(x).sum().backward()
        # A later backward adds to the gradients themselves.
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = outside()
    assert expected
    for within in (in_a_thread, lambda function: function()):
        within(block)
        # Some of these threads get the number of the one that has ended.
        for _ in range(4):
            for grad, alone in zip(in_a_thread(outside), expected, strict=True):
                assert torch.equal(grad, alone)


def test_backward_in_another_thread():
    """A thread that has called no layer, as autograd's for a GPU, runs the nodes of another one."""
    lora = {"target_modules": ["q_proj"]}
    model = make(("b", lora), model=Checkpointed(), **lora)
    slk.accelerate_peft(model)
    x = torch.randn(2, 5, 8)
    with slk.adapters_of_rows(model, ["default", "b"]):
        in_a_thread(model(x).sum().backward)
        late = model(x).sum()
    with pytest.raises(RuntimeError, match="call backward within the adapters_of_rows"):
        in_a_thread(late.backward)


def test_copies_and_files_of_a_model_are_outside_of_its_context():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    expected = model(IDS)
    with slk.adapters_of_rows(model, ["b", "__base__"]):
        copies = [copy.deepcopy(model), through_a_file(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        assert torch.equal(each(IDS), expected)
    slk.restore_peft(model)
    assert not any(ATTRIBUTE in module.__dict__ for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_breaks_its_graph():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    plain, rows = model(IDS), outputs_alone(model, ["b", "__base__"], IDS)
    swapped = outputs_alone(model, ["default", "b"], IDS)
    for _ in range(2):
        torch.testing.assert_close(compiled(IDS), plain)
        with slk.adapters_of_rows(model, ["b", "__base__"]):
            torch.testing.assert_close(compiled(IDS), rows)
        with slk.adapters_of_rows(compiled, ["default", "b"]):
            torch.testing.assert_close(compiled(IDS), swapped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = make(("b", {"r": 5}))
    slk.accelerate_peft(model)
    names = ["b", "default"]
    with torch.autocast("cpu", dtype):
        expected = outputs_alone(model, names, IDS)
        with slk.adapters_of_rows(model, names):
            found = model(IDS)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


@pytest.mark.filterwarnings("ignore:.*4-bit linear.*")
def test_a_quantized_base(backend):
    torch.manual_seed(0)
    model = nn.Sequential(bnb_4bit(nn.Linear(64, 96)))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = True, False
    model = peft.get_peft_model(model, config(target_modules=["0"], r=3)).train()
    model.add_adapter("b", config(target_modules=["0"], r=5))
    slk.accelerate_peft(model)
    x = torch.randn(4, 3, 64, requires_grad=True)
    names = ["default", "b", "b", "__base__"]
    expected = outputs_alone(model, names, x)
    (expected_dx,) = torch.autograd.grad(expected.square().sum(), x)
    with slk.adapters_of_rows(model, names):
        found = model(x)
        (dx,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-5, atol=1e-3)


class Flattens(nn.Module):
    """As OPT and the shared experts of Qwen2-MoE: the second layer gets all tokens in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        flat = self.q_proj(x).flatten(0, 1)
        return self.v_proj(flat if chosen is None else flat[chosen])


def test_flattened_inputs_have_all_tokens():
    model = make(("b", {}), model=Flattens())
    slk.accelerate_peft(model)
    x, names = torch.randn(2, 5, 8), ["b", "__base__"]
    expected = outputs_alone(model, names, x)
    with slk.adapters_of_rows(model, names):
        torch.testing.assert_close(model(x), expected)
        with pytest.raises(
            ValueError, match=r"must have 2 rows.*or 10 of a flattened batch.* got .*\[4, 8\]"
        ):
            model(x, torch.tensor([0, 1, 5, 9]))


TINY = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TINY, intermediate_size=16))


def opt() -> nn.Module:
    sizes = {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**TINY, **sizes))


def pooled(output) -> Tensor:
    return output.pooler_output


def logits(output) -> Tensor:
    return output.logits


@pytest.mark.parametrize(
    ("build", "targets", "read"),
    [(bert, "all-linear", pooled), (bert, ["pooler.dense"], pooled), (opt, ["fc1", "fc2"], logits)],
    ids=["BERT", "BERT's pooler alone", "OPT's MLPs alone"],
)
def test_matrices_of_rows_and_of_all_tokens(build, targets, read):
    """BERT's pooler gets [rows, K], and OPT's MLPs get [rows * tokens, K], as the first layers too."""
    torch.manual_seed(0)
    lora = {"target_modules": targets}
    model = make(("b", lora), model=build(), **lora).double()
    slk.accelerate_peft(model)
    names, ids = ["default", "default", "b", "__base__"], torch.randint(50, (4, 7))
    with slk.adapters_of_rows(model, names):
        found = read(model(input_ids=ids))
    expected = []
    for row, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            expected.append(read(model(input_ids=ids[row : row + 1])))
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)
    assert not any(len({*module._forward_pre_hooks}) for module in model.modules())


def test_a_matrix_with_several_times_the_rows_is_no_flattened_batch():
    """Unless an embedding, or another layer, has shown that each row has so many tokens."""
    model = make(
        ("b", {"target_modules": ["0"]}), model=nn.Sequential(nn.Linear(8, 8)), target_modules=["0"]
    )
    slk.accelerate_peft(model)
    error = pytest.raises(
        ValueError,
        match=r"must have 2 rows, .* got an input of shape \[4, 8\]: if it is a flattened batch, an embedding",
    )
    with slk.adapters_of_rows(model, ["b", "default"]):
        assert model(torch.randn(2, 8)).shape == (2, 8)
        with error:
            model(torch.randn(4, 8))
    lora = {"target_modules": ["fc1"]}
    model = make(("b", lora), model=opt(), **lora)
    slk.accelerate_peft(model)
    with slk.adapters_of_rows(model, ["b", "default"]):
        with pytest.raises(
            ValueError, match=r"must have 2 rows, .* got an input of shape \[28, 16\]"
        ):
            model(torch.randint(50, (4, 7)))
        model(torch.randint(50, (2, 7)))
        with pytest.raises(
            ValueError, match=r"or 14 of a flattened batch.* got an input of shape \[28, 16\]$"
        ):
            model(torch.randint(50, (4, 7)))


def test_beams_need_each_name_as_often():
    model = three_adapters(dtype=torch.float32).eval()
    slk.accelerate_peft(model)
    ids = torch.randint(1, 40, (2, 5))
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    names = ["b", "a"]
    with (
        slk.adapters_of_rows(model, names),
        pytest.raises(ValueError, match=r"where generate runs 3 beams .* give each name 3 times"),
    ):
        model.generate(input_ids=ids, **settings)
    with slk.adapters_of_rows(model, (name for name in names for _ in range(3))):
        found = model.generate(input_ids=ids, **settings)
    expected = []
    for row, name in zip(ids.split(1), names, strict=True):
        model.set_adapter(name)
        expected.append(model.generate(input_ids=row, **settings))
    assert torch.equal(found, torch.cat(expected))


# Refusals.


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (["b", "default", "b"], ValueError, "'b' has row 0, then 'default' has row 1, and 'b' has row 2 again"),
        ([], ValueError, "one name for each row of the batch, got none"),
        ("bb", TypeError, "one string for each row of the batch, got 'bb'"),
        (["b", 1], TypeError, "one string for each row"),
        (None, TypeError, "one string for each row of the batch, got None"),
        (iter(["b", "default", "b"]), ValueError, "'b' has row 2 again"),
        (["b", "B"], ValueError, "must be '__base__' or adapters of the model, 'b', 'default', got 'B'"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit(names, error, match):
    model = make(("b", {}))
    slk.accelerate_peft(model)
    with pytest.raises(error, match=match), slk.adapters_of_rows(model, names):
        pass


def test_a_batch_of_another_size():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    with (
        slk.adapters_of_rows(model, ["b"] * 3),
        pytest.raises(ValueError, match=r"must have 3 rows, .* got an input of shape \[2, 5, 8\]"),
    ):
        model(IDS)


def test_an_adapter_that_is_deleted_within_the_context():
    """Its rows would get the base model."""
    model = make(("b", {}))
    slk.accelerate_peft(model)
    with slk.adapters_of_rows(model, ["b", "__base__"]):
        model.delete_adapter("b")
        with pytest.raises(
            ValueError, match="adapters of the model, got 'b', which was deleted within"
        ):
            model(IDS)
    with (
        pytest.raises(ValueError, match=r"must be '__base__' or adapters of the model.* got 'b'"),
        slk.adapters_of_rows(model, ["b", "b"]),
    ):
        pass


def warnings_of(model: nn.Module, names: list[str]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with slk.adapters_of_rows(model, names):
            model(IDS)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_frozen_adapters_beside_one_that_trains_are_named_once():
    model = make(("b", {}), ("c", {}))
    slk.accelerate_peft(model)
    with torch.no_grad():
        assert warnings_of(model, ["b", "default"]) == []
    (message,) = warnings_of(model, ["b", "default"])
    assert "adapter 'b' is frozen, so its rows train nothing" in message
    (message,) = warnings_of(model, ["b", "c"])
    assert "adapter 'c' is frozen" in message
    assert warnings_of(model, ["b", "c"]) == warnings_of(model, ["default", "__base__"]) == []


def test_a_model_that_trains_nothing_or_all_warns_of_nothing():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    model.requires_grad_(False)
    assert warnings_of(model, ["b", "default"]) == []
    slk.StableLoRAAdamW.from_model(model, adapters={"default": {}, "b": {}})
    assert warnings_of(model, ["b", "default"]) == []


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8)})])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0]["q_proj"](x)


Q_PROJ = {"target_modules": ["q_proj"]}
EMBED = {"target_modules": ["embed", "q_proj"]}
# The model, the active adapter and adapter b.
REFUSED = {
    "DoRA": (Model, Q_PROJ, {"use_dora": True}, "adapter 'b' is a variant of LoRA"),
    "an embedding": (Model, Q_PROJ, EMBED, "PEFT's Embedding, which is not accelerated"),
    "an embedding's active adapter": (
        Model,
        EMBED,
        Q_PROJ,
        "PEFT's Embedding, which is not accelerated, runs adapter 'default' on all rows",
    ),
    "modules_to_save": (
        Model,
        Q_PROJ,
        {"modules_to_save": ["lm_head"]},
        "PEFT's ModulesToSaveWrapper",
    ),
    "experts": (Routed, Q_PROJ, Q_PROJ, "an expert gets tokens of all rows"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_runs_for_all_rows_is_refused(what):
    kind, active, lora, reason = REFUSED[what]
    model = make(("b", lora), model=kind(), **active)
    slk.accelerate_peft(model)
    error = pytest.raises(ValueError, match=f"adapters_of_rows cannot run '.*' by rows: {reason}")
    with error, slk.adapters_of_rows(model, ["b", "b"]):
        pass


def test_experts_in_a_list_may_have_adapters_that_are_not_named():
    model = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), routed=Routed()))
    model = make(
        ("b", {"target_modules": ["first"]}), model=model, target_modules=["first", "q_proj"]
    )
    x = torch.randn(2, 5, 8)
    model.set_adapter("b")
    of_b = model(x)
    model.set_adapter("default")
    assert not torch.equal(model(x), of_b)
    slk.accelerate_peft(model)
    with slk.adapters_of_rows(model, ["b", "b"]):
        torch.testing.assert_close(model(x), of_b)


class Scaled(nn.Linear):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return super().forward(x) * factor


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = Scaled(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x, factor=3.0)


def test_arguments_of_a_base_layer_reach_it():
    model = make(("b", Q_PROJ), model=Scales(), **Q_PROJ)
    x = torch.randn(2, 5, 8)
    expected = model(x)
    slk.accelerate_peft(model)
    with slk.adapters_of_rows(model, ["default", "default"]):
        torch.testing.assert_close(model(x), expected)


def test_layers_that_are_not_accelerated_are_refused():
    model = make(("b", {}))
    with (
        pytest.raises(ValueError, match="q_proj' by rows: PEFT's Linear, which is not accelerated"),
        slk.adapters_of_rows(model, ["b", "b"]),
    ):
        pass
    with (
        pytest.raises(
            ValueError, match="model must have PEFT LoRA layers, got a Model without any"
        ),
        slk.adapters_of_rows(Model(), ["b"]),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"),
        slk.adapters_of_rows("model", ["b"]),
    ):
        pass


def test_merged_adapters_and_two_ways_of_names_are_refused():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    with slk.adapters_of_rows(model, ["b", "b"]):
        with pytest.raises(ValueError, match=r"adapter_names is .* but adapters_of_rows is open"):
            # PEFT leaves its hooks in a model whose forward raises.
            other = make(("b", {}))
            slk.accelerate_peft(other)
            with slk.adapters_of_rows(other, ["b", "b"]):
                other(IDS, adapter_names=["b", "default"])
        model.merge_adapter()
        with pytest.raises(ValueError, match="an adapter is merged; call unmerge_adapter first"):
            model(IDS)
    error = pytest.raises(ValueError, match="'default' is merged; call unmerge_adapter first")
    with error, slk.adapters_of_rows(model, ["b", "b"]):
        pass


def test_a_bias_of_lora_b_is_refused_by_its_layer():
    model = make(("b", {"lora_bias": True}))
    slk.accelerate_peft(model)
    error = pytest.raises(ValueError, match="adapter 'b' has a bias in lora_B, which trains")
    with slk.adapters_of_rows(model, ["b", "b"]), error:
        model(IDS)


def test_a_base_layer_that_trains_is_refused():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    model.base_model.model.layers[1].q_proj.base_layer.bias.requires_grad_()
    with (
        slk.adapters_of_rows(model, ["b", "b"]),
        pytest.raises(ValueError, match="base layer's bias must be frozen"),
    ):
        model(IDS)


def test_a_model_within_a_context_stays_accelerated():
    model = make(("b", {}))
    slk.accelerate_peft(model)
    with slk.adapters_of_rows(model, ["b", "b"]):
        for action in (slk.restore_peft, slk.accelerate_peft):
            with pytest.raises(RuntimeError, match=f"{action.__name__} within adapters_of_rows"):
                action(model)
        model(IDS)


def test_the_report_says_that_rows_are_not_fused():
    model = make(("b", {}), model=llama(), target_modules="all-linear")
    assert ROWS_ARE_NOT_FUSED in slk.accelerate_peft(model, fuse_mlp=True).notes
    assert ROWS_ARE_NOT_FUSED in slk.accelerate_peft(model, fuse_projections=True).notes
    assert ROWS_ARE_NOT_FUSED in slk.accelerate_peft(model).notes
    plain = slk.accelerate_peft(model, fuse_mlp=False, fuse_projections=False)
    assert ROWS_ARE_NOT_FUSED not in plain.notes
    one = make(model=llama(), target_modules="all-linear")
    assert ROWS_ARE_NOT_FUSED not in slk.accelerate_peft(one, fuse_mlp=True).notes


# Losses and files.


def test_losses_are_transformers_own():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    ids = torch.randint(1, 40, (len(NAMES), 9))
    labels = ids.clone()
    labels[0, :5] = labels[3, 2:] = -100
    logits = model(ids).logits
    losses = slk.losses_of_rows(logits, labels, NAMES)
    assert [*losses] == ["a", "b", "c"]
    for name, loss in losses.items():
        rows = [row for row, row_name in enumerate(NAMES) if row_name == name]
        torch.testing.assert_close(loss, model(ids[rows], labels=labels[rows]).loss)
    low = slk.losses_of_rows(logits.bfloat16(), labels, NAMES)
    assert {loss.dtype for loss in low.values()} == {torch.float32}
    ours = slk.losses_of_rows(logits, labels.masked_fill(labels == -100, 7), NAMES, ignore_index=7)
    other = slk.losses_of_rows(logits, labels.masked_fill(labels == 7, -100), NAMES)
    assert ours.keys() == other.keys() and all(
        torch.equal(ours[name], other[name]) for name in ours
    )


def small_and_fused(**options: Any) -> nn.Module:
    model = three_adapters(dtype=torch.float32)
    slk.accelerate_peft(model, fuse_loss=True, **options)
    train_all(model)
    return model


def test_losses_without_logits_are_those_of_logits():
    """Of the loss op's tokens, divided by each adapter's own or by the tokens of a whole step."""
    model = small_and_fused()
    names = [*NAMES, "__base__"]
    ids = torch.randint(1, 40, (len(names), 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    for num_items in (None, {"a": 30, "b": torch.tensor(20), "c": 10, "__base__": 0}):
        found, grads = {}, {}
        for fused in (False, True):
            model.zero_grad()
            with slk.adapters_of_rows(model, names):
                if fused:
                    output = model(ids, labels=labels, token_losses=True)
                    assert output.logits is None and output.loss.shape == labels.shape
                values = output.loss if fused else model(ids).logits
                losses = slk.losses_of_rows(values, labels, names, num_items=num_items)
                sum(losses.values()).backward()
            found[fused] = losses
            grads[fused] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        assert [*found[True]] == ["a", "b", "c", "__base__"]
        torch.testing.assert_close(found[True], found[False])
        assert len(grads[True]) == len(grads[False]) > 0
        torch.testing.assert_close(grads[True], grads[False], rtol=1e-4, atol=1e-7)
        if num_items is not None:
            own = slk.losses_of_rows(values, labels, names)
            counts = {name: int((labels[row, 1:] != -100).sum()) for row, name in enumerate(names)}
            torch.testing.assert_close(own["b"] * counts["b"] / 20, losses["b"])


def test_token_losses_leave_a_forward_with_logits_as_it_is():
    """In evaluation, and where a head is an adapter's own: its logits cannot be of one op."""
    model = small_and_fused()
    ids = torch.randint(1, 40, (len(NAMES), 9))
    with slk.adapters_of_rows(model.eval(), NAMES):
        output = model(ids, labels=ids, token_losses=True)
    assert output.logits.shape == (*ids.shape, 40) and output.loss.dim() == 0
    with pytest.raises(ValueError, match=r"the losses of tokens \[rows, tokens\], .* got \[\] and"):
        slk.losses_of_rows(output.loss, ids, NAMES)
    lora = {"target_modules": ["lm_head"]}
    model = make(("b", lora), model=llama(), **lora).train()
    slk.accelerate_peft(model, fuse_loss=True)
    ids = ids[:2] % 11
    assert model(ids, labels=ids, token_losses=True).loss.shape == ids.shape
    with slk.adapters_of_rows(model, ["default", "b"]):
        assert model(ids, labels=ids, token_losses=True).logits.dim() == 3


def test_losses_need_a_number_for_each_name():
    with pytest.raises(
        ValueError, match="num_items must have each of the names, got none for 'b' in 'a'"
    ):
        slk.losses_of_rows(torch.zeros(2, 3), torch.zeros(2, 3), ["a", "b"], num_items={"a": 3})


def test_a_loss_without_tokens_is_zero_and_that_of_the_base_has_no_gradient():
    logits = torch.randn(3, 4, 11, requires_grad=True)
    labels = torch.randint(11, (3, 4))
    labels[1, 1:] = -100
    losses = slk.losses_of_rows(logits, labels, ["a", "b", "__base__"])
    assert losses["b"] == 0 and losses["__base__"] > 0
    sum(losses.values()).backward()
    assert logits.grad[0, :-1].any() and not logits.grad[1:].any() and not logits.grad[0, -1].any()


@pytest.mark.parametrize(
    ("logits", "labels", "names", "match"),
    [
        ((3, 4, 11), (3, 5), ["a"] * 3, r"labels \[rows, tokens\], got \[3, 4, 11\] and \[3, 5\]"),
        ((3, 11), (3,), ["a"] * 3, r"got \[3, 11\] and \[3\]"),
        ((3, 4, 11), (3, 4), ["a"] * 2, "logits must have 2 rows, one for each of the names, got 3"),
        ((3, 4, 11), (3, 4), ["a", "b", "a"], "'a' has row 2 again"),
    ],
)  # fmt: skip
def test_losses_that_do_not_fit(logits, labels, names, match):
    with pytest.raises(ValueError, match=match):
        slk.losses_of_rows(torch.zeros(logits), torch.zeros(labels, dtype=torch.long), names)


def test_files_of_one_adapter_load_in_plain_peft(tmp_path):
    model = three_adapters(dtype=torch.float32)
    slk.accelerate_peft(model)
    optimizer = slk.StableLoRAAdamW.from_model(
        model, adapters={name: {"lr": rate} for name, rate in RATES.items()}
    )
    ids = torch.randint(1, 40, (len(NAMES), 9))
    with slk.adapters_of_rows(model, NAMES):
        sum(slk.losses_of_rows(model(ids).logits, ids, NAMES).values()).backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path, selected_adapters=["b", "c"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["b", "c"]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "c").eval()
    model.set_adapter("c")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
