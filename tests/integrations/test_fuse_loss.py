"""``fuse_loss``: a language model's loss without logits, against PEFT's own model in float64; and what
keeps logits, with the reason.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import gc
import importlib
import inspect
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import stablelora_kernels as slk
from stablelora_kernels.nn import fused_loss, loss_form
from stablelora_kernels.utils.refusal import Refusal
from tests.helpers.architectures import build
from tests.helpers.operators import Operators
from tests.helpers.small_models import fill_b, remove_lora, unpickled
from tests.helpers.small_models import llama as small_llama
from tests.helpers.trainer_runs import make_trainer, trained, transformers

peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
# nn.parallel has a function of this name too.
replication = importlib.import_module("torch.nn.parallel.replicate")
TARGETS = ["lm_head", "q_proj", "c_attn", "query_key_value"]
IDS = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(2))
LABELS = IDS.masked_fill(torch.arange(9) < 3, -100)
WITHOUT = "computes its loss without logits"
MODELS = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    # A soft cap and a tied head; a logit scale and a tied head; a divisor; a bias; Conv1D; a router's loss.
    "gemma2": "Gemma2ForCausalLM", "cohere": "CohereForCausalLM", "granite": "GraniteForCausalLM", "phi": "PhiForCausalLM",
    "gpt2": "GPT2LMHeadModel", "mixtral": "MixtralForCausalLM",
}  # fmt: skip


def notes_on_loss(report: slk.LoRAReport) -> list[str]:
    return [note for note in report.notes if note.startswith("fuse_loss: ")]


def make(model_type: str = "llama", dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    """A PEFT model whose head has LoRA; no B is zero."""
    base = build(model_type, MODELS[model_type])
    if model_type == "mixtral":
        base.config.output_router_logits = True
    if model_type == "granite":
        base.config.logits_scaling = 4.0
    torch.manual_seed(0)
    options = {"r": 3, "target_modules": TARGETS, "init_lora_weights": False, **lora}
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).to(dtype).train()
    for name, module in model.named_modules():
        # Other layers of ours draw masks of their own.
        if isinstance(module, nn.Dropout) and "lm_head" not in name:
            module.p = 0.0
    return model


def loss_in_float64(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> Tensor:
    """transformers' ForCausalLMLoss, which would round logits to float32."""
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(logits.view(-1, vocab_size), shifted, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def results(model: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The loss, and the gradient of all that trains."""
    model.zero_grad()
    torch.manual_seed(7)
    output = model(**{"input_ids": IDS, "labels": LABELS} | kwargs)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach()} | grads


def expected_of(model: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Those of a PEFT model that nothing has fused."""
    base = model.get_base_model()
    base.loss_function = loss_in_float64
    found = results(model, **kwargs)
    del base._loss_function
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("model_type", MODELS)
def test_equals_pefts_loss_and_gradients(model_type, num_items):
    model = make(model_type, lora_dropout=0.2)
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    expected = expected_of(model, **options)
    assert any("lm_head.lora_B" in name for name in expected)
    (note,) = notes_on_loss(slk.accelerate_peft(model, fuse_loss=True))
    assert WITHOUT in note and "base_model.model" in note
    assert_equal(results(model, **options), expected)
    slk.restore_peft(model)
    assert type(model.get_base_model()) is getattr(transformers, MODELS[model_type])


def test_a_frozen_head_and_our_own_layers():
    """The head of apply_lora is a LoRALinear; a frozen one takes no branch."""
    for targets in (["q_proj", "lm_head"], ["q_proj"]):
        torch.manual_seed(0)
        plain = small_llama(tie_word_embeddings=False).double()
        fused = copy.deepcopy(plain)
        slk.apply_lora(plain, targets, r=3)
        (note,) = notes_on_loss(slk.apply_lora(fused, targets, r=3, fuse_loss=True))
        assert WITHOUT in note and "the model" in note
        for model in (plain, fused):
            torch.manual_seed(1)
            fill_b(model)
        plain.load_state_dict(fused.state_dict())
        plain.loss_function = loss_in_float64
        assert_equal(results(fused), results(plain))
        remove_lora(fused)
        assert fused(input_ids=IDS, labels=LABELS).logits is not None
        assert type(fused) is transformers.LlamaForCausalLM


def test_a_loaded_adapter_may_be_fused(tmp_path):
    model = small_llama()
    slk.apply_lora(model, ["lm_head"], r=3)
    slk.save_adapter(model, tmp_path)
    report = slk.load_adapter(small_llama(), tmp_path, fuse_loss=True)
    assert WITHOUT in notes_on_loss(report)[0]


def test_no_logits_are_computed():
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)
    with Operators() as operators:
        output = model(input_ids=IDS, labels=LABELS)
    made = [result for _, _, result in operators.calls if isinstance(result, Tensor)]
    logits = IDS.numel() * model.config.vocab_size
    assert made and all(t.numel() != logits for t in made)
    assert output.logits is None and "logits" not in output
    assert type(output) is transformers.modeling_outputs.CausalLMOutputWithPast
    assert output.past_key_values is not None


def test_a_forward_leaves_nothing_to_the_garbage_collector():
    """Hidden states that a cycle held would live until Python looks for cycles."""
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)
    gc.collect()
    gc.disable()
    try:
        model(input_ids=IDS, labels=LABELS).loss.backward()
        assert not [thing for thing in gc.get_objects() if type(thing) is fused_loss._Call]
    finally:
        gc.enable()


def test_tuples_leave_the_logits_out():
    """As ``to_tuple`` leaves out what is None: of a router's model, aux_loss comes before logits."""
    for model_type in ("llama", "mixtral"):
        model = make(model_type)
        plain = model(input_ids=IDS, labels=LABELS)
        slk.accelerate_peft(model, fuse_loss=True)
        answer = model(input_ids=IDS, labels=LABELS, return_dict=False)
        assert isinstance(answer, tuple) and len(answer) == len(plain.to_tuple()) - 1
        torch.testing.assert_close(answer[0].double(), plain.loss.double())
        if model_type == "mixtral":
            torch.testing.assert_close(answer[1], plain.aux_loss)
        assert model(input_ids=IDS, labels=LABELS, return_dict=True).logits is None


def test_evaluation_and_calls_without_labels_are_pefts():
    model = make()
    expected = model.eval()(input_ids=IDS, labels=LABELS)
    slk.accelerate_peft(model, fuse_loss=True)
    for labels in (None, LABELS):
        output = model(input_ids=IDS, labels=labels)
        torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)
    assert model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape == (2, 11)


def test_skip_logits_decides_for_one_call():
    """Liger-Kernel's keyword, which transformers' Trainer passes."""
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)
    model.eval()
    plain = model(input_ids=IDS, labels=LABELS)
    skipped = model(input_ids=IDS, labels=LABELS, skip_logits=True)
    assert skipped.logits is None and plain.logits is not None
    torch.testing.assert_close(skipped.loss.float(), plain.loss)
    model.train()
    assert model(input_ids=IDS, labels=LABELS, skip_logits=False).logits.shape == (2, 9, 64)
    with pytest.raises(ValueError, match="labels must be given with skip_logits=True, got None"):
        model(input_ids=IDS, skip_logits=True)


def test_training_without_labels_warns_once():
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(input_ids=IDS)
        model(input_ids=IDS, labels=LABELS)
        model.eval()(input_ids=IDS)
    model.train()
    with pytest.warns(UserWarning, match=r"fuse_loss=True has no effect .*label_smoothing_factor"):
        assert model(input_ids=IDS).logits.shape == (2, 9, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS)


@pytest.mark.parametrize("method", ["unload", "merge_and_unload"])
def test_unloaded_models_are_plain(method):
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)
    assert model(input_ids=IDS, labels=LABELS).logits is None
    plain = getattr(model, method)()
    output = plain.train()(input_ids=IDS, labels=LABELS)
    assert output.logits.shape == (2, 9, 64) and output.loss.requires_grad is False
    assert type(plain) is transformers.LlamaForCausalLM
    assert fused_loss.ATTRIBUTE not in vars(plain)


def test_threads_train_on_their_own_hidden_states():
    """Each forward has its own state, also if threads switch between head and loss."""
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)
    parts = [(IDS[k : k + 1], LABELS[k : k + 1]) for k in range(2)]
    expected = [model(input_ids=ids, labels=labels).loss.item() for ids, labels in parts]
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    # Each thread waits for the other between its head and its loss.
    meeting, own = threading.Barrier(2), fused_loss._Call.loss_function

    def after_both(*args: Any, **kwargs: Any) -> Tensor:
        meeting.wait(60)
        return own(*args, **kwargs)

    def loss(part: tuple[Tensor, Tensor]) -> float:
        return model(input_ids=part[0], labels=part[1]).loss.item()

    with (
        mock.patch.object(fused_loss._Call, "loss_function", after_both),
        ThreadPoolExecutor(2) as pool,
    ):
        assert [*pool.map(loss, parts)] == expected


def test_replicas_as_data_parallel_makes_them():
    """A thread a replica, as DataParallel has them; its copies to GPUs are copies on the CPU here."""
    model = make()
    expected = results(model)
    slk.accelerate_peft(model, fuse_loss=True)
    model.zero_grad()

    def copies(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t * 1 for t in tensors] for _ in devices]

    with mock.patch.object(replication, "_broadcast_coalesced_reshape", copies):
        replicas = nn.parallel.replicate(model, [0, 1])
    # Half of each row's labels count in each half of the batch, so the mean of means is the mean.
    options = [{"input_ids": IDS[k : k + 1], "labels": LABELS[k : k + 1]} for k in range(2)]
    with ThreadPoolExecutor(2) as pool:
        outputs = [*pool.map(lambda replica, keywords: replica(**keywords), replicas, options)]
    assert all(output.logits is None for output in outputs)
    loss = sum(output.loss for output in outputs) / 2
    loss.backward()
    torch.testing.assert_close(loss.float(), expected.pop("loss").float())
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name
            )


def test_shift_labels_as_under_context_parallelism():
    model = make()
    expected = expected_of(model)
    slk.accelerate_peft(model, fuse_loss=True)
    shifted = nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    assert_equal(results(model, shift_labels=shifted), expected)


def test_another_ignore_index():
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)
    others = LABELS.where(LABELS != -100, -7)
    assert_equal(results(model, labels=others, ignore_index=-7), results(model))


def test_copies_pickles_and_signatures():
    model = make()
    signature = inspect.signature(model.get_base_model().forward)
    slk.accelerate_peft(model, fuse_loss=True)
    base = model.get_base_model()
    assert inspect.signature(base.forward) == signature
    assert isinstance(base, transformers.LlamaForCausalLM)
    assert type(base).__name__ == "LlamaForCausalLM" and base.config.architectures is None
    expected = results(model)
    for other in (copy.deepcopy(model), unpickled(model)):
        assert isinstance(other.get_base_model(), fused_loss.FusedLoss)
        assert_equal(results(other), expected)
        slk.restore_peft(other)
    # Fusing twice is fusing once.
    slk.accelerate_peft(model, fuse_loss=True)
    assert_equal(results(model), expected)
    slk.accelerate_peft(model, fuse_loss=False)
    assert not isinstance(model.get_base_model(), fused_loss.FusedLoss)


def test_saved_files_are_pefts(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "before")
    slk.accelerate_peft(model, fuse_loss=True)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_torch_compile_without_a_break():
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)
    expected = results(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    loss = compiled(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.pop("loss"))
    for name, grad in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, msg=name)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = make()
    expected = expected_of(model)
    slk.accelerate_peft(model, fuse_loss=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(results(model), expected)


# What keeps logits.


def at_once(model: Any) -> str:
    """The note on a model that is not fused."""
    (note,) = notes_on_loss(slk.accelerate_peft(model, fuse_loss=True))
    assert not isinstance(model.get_base_model(), fused_loss.FusedLoss)
    assert model(input_ids=IDS, labels=LABELS).logits.shape[:2] == IDS.shape
    return note


def test_heads_that_keep_logits_and_their_reasons():
    assert "is merged" in at_once(_changed(lambda model: model.merge_adapter()))
    assert "which is DoRA" in at_once(make(use_dora=True))
    saved = make(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "a ModulesToSaveWrapper" in at_once(saved)

    def add_second(model: Any) -> None:
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS))
        model.base_model.set_adapter(["default", "second"])
        model.to(torch.float64)

    assert "has 2 active adapters" in at_once(_changed(add_second))

    def train_embedding(model: Any) -> None:
        model.get_output_embeddings().base_layer.weight.requires_grad_()

    assert "has a weight that trains" in at_once(_changed(train_embedding))

    def hook(model: Any) -> None:
        model.get_output_embeddings().register_forward_hook(lambda *_: None)

    assert "has hooks" in at_once(_changed(hook))

    def own_loss(model: Any) -> None:
        model.get_base_model().loss_function = loss_in_float64

    assert "loss_function is not transformers' ForCausalLMLoss" in at_once(_changed(own_loss))

    def own_forward(model: Any) -> None:
        base = model.get_base_model()
        base.forward = functools.partial(type(base).forward, base)

    # Its name is that of the code that runs, not of what a wrapper says of itself.
    assert "its forward was replaced by transformers." in at_once(_changed(own_forward))


def _changed(change: Any) -> Any:
    model = make()
    change(model)
    return model


def test_a_quantized_head_keeps_logits():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = build("llama", "LlamaForCausalLM")
    linear = bitsandbytes.nn.Linear4bit(32, 64, bias=False, compute_dtype=torch.float32)
    linear.load_state_dict(base.lm_head.state_dict())
    base.lm_head = linear.to("cpu")
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=TARGETS))
    (note,) = notes_on_loss(slk.accelerate_peft(model, fuse_loss=True))
    assert "quantized weight" in note and "keeps its own loss" in note


def test_what_changes_later_is_read_at_each_call():
    """Merged, disabled or beside a second adapter, the head multiplies, and the loss is the model's."""
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)

    def has_logits() -> bool:
        output = model(input_ids=IDS, labels=LABELS)
        assert output.loss.isfinite()
        return type(output.logits) is Tensor

    assert not has_logits()
    model.merge_adapter()
    assert has_logits()
    model.unmerge_adapter()
    assert not has_logits()
    with model.disable_adapter():
        assert has_logits()
    model.get_base_model().loss_function = loss_in_float64
    assert has_logits()


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj"]], ids=["adapted", "frozen"])
def test_hooks_see_the_head(targets):
    model = make(target_modules=targets)
    slk.accelerate_peft(model, fuse_loss=True)
    head = model.get_output_embeddings()
    for register in (head.register_forward_hook, register_module_forward_hook):
        seen = []
        handle = register(lambda module, *_, seen=seen: seen.append(module))
        output = model(input_ids=IDS, labels=LABELS)
        handle.remove()
        assert head in seen and type(output.logits) is Tensor
    assert model(input_ids=IDS, labels=LABELS).logits is None


def test_an_error_in_the_model_leaves_it_usable():
    model = make()
    slk.accelerate_peft(model, fuse_loss=True)
    expected = results(model)
    with pytest.raises(ValueError, match="labels must be in"):
        model(input_ids=IDS, labels=LABELS + 1000)
    assert model(input_ids=IDS).logits.shape == (2, 9, 64)
    assert_equal(results(model), expected)


def test_models_without_a_known_loss_say_so():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"])
    )
    (note,) = notes_on_loss(slk.accelerate_peft(model, fuse_loss=True))
    assert note == "fuse_loss: there is no language model with a head and a loss"

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            logits = logits.relu()
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels, self.vocab_size)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    base = Other(small_llama().config)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"]))
    (note,) = notes_on_loss(slk.accelerate_peft(model, fuse_loss=True))
    assert "Other.forward computes its loss in a way that is not known" in note


def test_the_forms_of_transformers_models():
    """By the classes' sources: which are known, and that none is known by mistake."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kinds = {
        name: getattr(transformers, name, None) for name in {*names.values()} if type(name) is str
    }
    forms = {
        name: loss_form.loss_form_of(kind) for name, kind in kinds.items() if isinstance(kind, type)
    }
    known = {name for name, form in forms.items() if not isinstance(form, Refusal)}
    assert len(known) > 80 and known >= {*MODELS.values()}
    # They do more to logits, or read them after the loss.
    unknown = {
        "BambaForCausalLM",
        "RecurrentGemmaForCausalLM",
        "BeamForCausalLM",
        "MambaForCausalLM",
    }
    assert not known & unknown
    read = {
        loss_form._unchanged: 0,
        loss_form._capped: 0,
        loss_form._scaled: 0,
        loss_form._divided: 0,
    }
    for name in known:
        read[forms[name].transform] += 1
    assert all(read.values()), read


SOURCE = """
def forward(self, ids, labels=None):
    logits = self.lm_head(ids)
    loss = None
    if labels is not None:
        loss = self.loss_function(logits, labels, self.vocab_size)
    return Output(loss=loss, logits=logits)
"""
# Each is refused by one condition alone.
UNKNOWN = {
    "no head": ("self.lm_head(ids)", "ids"),
    "a head that is read twice": ("    logits = self", "    ids = ids.to(self.lm_head.weight.dtype)\n    logits = self"),
    "logits read again": ("self.vocab_size)\n", "self.vocab_size)\n    ids = logits.argmax()\n"),
    "another transform": ("    loss = None\n", "    logits = logits * 2\n    loss = None\n"),
    "a tuple": ("Output(loss=loss, logits=logits)", "(loss, logits)"),
    "an addend": ("self.vocab_size)\n", "self.vocab_size)\n        loss = loss + 1\n"),
    "another order": ("(logits, labels,", "(labels, logits,"),
    "the model passed on": ("self.vocab_size)\n", "self.vocab_size, model=self)\n"),
    "an attribute that is set": ("    logits = self", "    self.steps = 1\n    logits = self"),
    "the class above": ("    logits = self", "    super().check(ids)\n    logits = self"),
    "outputs that are recorded": ("def forward", "@capture_outputs\ndef forward"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), UNKNOWN.values(), ids=UNKNOWN)
def test_forms_that_are_not_known(old, new, monkeypatch):
    def form(source: str) -> Any:
        assert isinstance(ast.parse(source).body[0], ast.FunctionDef)
        monkeypatch.setattr(inspect, "getsource", lambda _: source)
        return loss_form.loss_form_of(type("Made", (), {"forward": lambda self: None}))

    assert form(SOURCE).head == "lm_head" and SOURCE.count(old) == 1
    assert "not known" in form(SOURCE.replace(old, new)).reason


# Hugging Face's Trainer.


def head_llama(fused: bool) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        small_llama(pad_token_id=0),
        peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    )
    slk.accelerate_peft(model, fuse_loss=fused)
    return model


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_trainer_trains_as_without_it(tmp_path, bf16):
    """Two steps of accumulation, whose losses are sums over num_items_in_batch."""
    found = []
    for fused in (False, True):
        model = head_llama(fused)
        trainer = make_trainer(model, tmp_path / str(fused), bf16=bf16, learning_rate=1e-2)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found.append((trained(model), losses, trainer.evaluate(trainer.train_dataset)["eval_loss"]))
    tolerance = 0.1 if bf16 else 1e-4
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=tolerance, atol=tolerance / 10)
    assert found[1][2] == pytest.approx(found[0][2], rel=tolerance)


def trainer_with_evaluation(**options: Any) -> Any:
    return transformers.Trainer(**options, eval_dataset=options["train_dataset"])


def test_metrics_and_predictions_are_pefts(tmp_path):
    """Evaluations between the steps of a training, and predict after it."""
    seen = {}
    for fused in (False, True):
        rows_of_logits = []

        def metrics(prediction: Any, rows: list[Any] = rows_of_logits) -> dict[str, float]:
            rows.append(torch.tensor(prediction.predictions))
            return {"size": prediction.predictions.size}

        trainer = make_trainer(
            head_llama(fused), tmp_path / str(fused), made=trainer_with_evaluation, eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
        trainer.compute_metrics = metrics
        trainer.train()
        predicted = trainer.predict(trainer.train_dataset).predictions
        seen[fused] = [*rows_of_logits, torch.tensor(predicted)]
    assert len(seen[True]) == len(seen[False]) > 2
    for one, other in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("only_loss", [False, True])
def test_prediction_loss_only_evaluates_without_logits(tmp_path, only_loss):
    """TrainingArguments says that nobody reads logits, and the callback reads it."""
    trainer = make_trainer(
        head_llama(False), tmp_path, max_steps=1, prediction_loss_only=only_loss,
        callbacks=[slk.AccelerateCallback(fuse_loss=True)],
    )  # fmt: skip
    trainer.train()
    op = mock.Mock(wraps=fused_loss.lora_linear_cross_entropy)
    with mock.patch.object(fused_loss, "lora_linear_cross_entropy", op):
        found = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert (op.call_count > 0) == only_loss
    slk.restore_peft(trainer.model)
    assert found == pytest.approx(trainer.evaluate(trainer.train_dataset)["eval_loss"], rel=1e-5)


def own_loss_of_a_script(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """transformers' ``compute_loss_func``."""
    return transformers.loss.loss_utils.ForCausalLMLoss(
        outputs.logits,
        labels,
        vocab_size=outputs.logits.shape[-1],
        num_items_in_batch=num_items_in_batch,
    )


@pytest.mark.parametrize(
    "reason",
    ["label_smoothing_factor", pytest.param("compute_loss_func", marks=pytest.mark.nightly)],
)
def test_what_takes_the_labels_away_trains_as_before_and_warns(tmp_path, reason):
    found = []
    for fused in (False, True):
        changes = {"label_smoothing_factor": 0.1} if reason == "label_smoothing_factor" else {}
        model = head_llama(fused)
        trainer = make_trainer(model, tmp_path / str(fused), max_steps=2, **changes)
        if reason == "compute_loss_func":
            trainer.compute_loss_func = own_loss_of_a_script
        context = pytest.warns(UserWarning, match=reason) if fused else contextlib.nullcontext()
        with context:
            trainer.train()
        found.append(trained(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_sfttrainer_keeps_its_own_loss_and_the_note_says_whose(tmp_path, capsys):
    """TRL puts a forward of its own, which makes no logits, onto the model."""
    trl = pytest.importorskip("trl")
    found = []
    for callbacks in ([], [slk.AccelerateCallback(fuse_loss=True)]):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            small_llama(pad_token_id=0), peft.LoraConfig(r=3, target_modules=["q_proj"])
        )
        place = tmp_path / str(len(callbacks))
        trainer = make_trainer(model, place, made=trl.SFTTrainer, max_steps=2, callbacks=callbacks)
        trainer.train()
        found.append(trained(model))
    said = capsys.readouterr().out
    assert "keeps its own loss: its forward was replaced by trl.trainer" in said
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_offloaded_checkpoints_train_to_the_same_gradients(monkeypatch):
    """transformers' ``offload=True``, which has moved a layer's input to the host until backward."""
    enable = transformers.PreTrainedModel.__dict__.get("activation_checkpointing_enable")
    if enable is None or "offload" not in inspect.signature(enable).parameters:
        pytest.skip("runs where transformers is 5.23 or newer")
    modeling = transformers.modeling_utils
    moved = []

    class Counted(modeling.save_on_cpu):
        def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
            moved.append(device_type)
            # There is no pinned memory without a GPU.
            super().__init__(pin_memory=False)

    monkeypatch.setattr(modeling, "save_on_cpu", Counted)
    model = make(target_modules="all-linear")
    expected = results(model)
    slk.accelerate_peft(model, fuse_mlp=True, fuse_projections=True, fuse_loss=True)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False}, offload=True)
    answer = results(model)
    assert len(moved) == model.config.num_hidden_layers
    assert answer.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            answer[name].float(), value.float(), rtol=1e-5, atol=1e-6, msg=name
        )
