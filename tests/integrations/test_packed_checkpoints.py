"""``load_packed_experts``: gpt-oss in MXFP4, against the model that transformers makes of it."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import parametrize

import stablelora_kernels as slk
from stablelora_kernels.nn.stacks import MXFP4Parametrization
from stablelora_kernels.testing.cases import BF16, FP32
from tests.helpers.moe_models import IDS, E, build, results, transformers, with_lora
from tests.helpers.packed_stacks import mxfp4

accelerate = pytest.importorskip("accelerate", reason="runs where accelerate is installed")
pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH = 64
NAMES = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]


def checkpoint(dtype: torch.dtype = FP32) -> tuple[Any, dict[str, Tensor]]:
    """A small gpt-oss with what its stacks in MXFP4 stand for; and what a checkpoint holds."""
    model = build("gpt_oss", dtype=dtype, width=WIDTH).eval()
    state = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        count, columns, rows = state.pop(name).shape
        sizes = (count, rows, columns // 32)
        blocks = torch.randint(0, 256, (*sizes, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 125, sizes, dtype=torch.uint8, generator=generator)
        values = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        model.get_parameter(name).data.copy_(values)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return model, state


def write(state: dict[str, Tensor], directory: Path, files: int = 1) -> Path:
    """The checkpoint in one file, or in several with an index."""
    state = {name: t.contiguous() for name, t in state.items()}
    if files == 1:
        save_file(state, directory / "model.safetensors")
        return directory
    places = {name: f"model-{i % files}.safetensors" for i, name in enumerate(state)}
    for file in {*places.values()}:
        save_file({n: t for n, t in state.items() if places[n] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return directory


def without_memory(model: Any) -> Any:
    with accelerate.init_empty_weights():
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype).eval()


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_model_made_without_memory(files, dtype, tmp_path):
    plain, state = checkpoint(dtype)
    model = without_memory(plain)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    names = slk.load_packed_experts(model, write(state, tmp_path, files))
    assert sorted(names) == sorted(NAMES)
    experts, expected = (m.model.layers[0].mlp.experts for m in (model, plain))
    assert all(
        getattr(experts, n).equal(getattr(expected, n)) for n in ("gate_up_proj", "down_proj")
    )
    # Products read them in another order.
    y, right = (each(input_ids=IDS).logits for each in (model, plain))
    torch.testing.assert_close(y, right)
    saved = model.state_dict()
    assert saved.keys() == state.keys() and all(saved[key].equal(state[key]) for key in state)
    other = without_memory(plain)
    slk.load_packed_experts(other, tmp_path)
    other.load_state_dict({k: torch.zeros_like(t) for k, t in saved.items()})
    assert not other.state_dict()[f"{NAMES[0]}_blocks"].any()
    other.load_state_dict(saved)
    assert other(input_ids=IDS).logits.equal(y)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) == 5
    for name, value in found.items():
        atol = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)


def loaded(directory: Path, dtype: torch.dtype = FP32) -> tuple[Any, Any]:
    """A model with the stacks of a checkpoint, which it writes, and one of what they stand for."""
    plain, state = checkpoint(dtype)
    model = without_memory(plain)
    slk.load_packed_experts(model, write(state, directory))
    return model, plain


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=str)
@pytest.mark.parametrize("fuse_mlp", [False, True])
def test_it_trains_with_lora(checkpointing, fuse_mlp, tmp_path):
    """Against plain stacks in two ops."""
    model, plain = loaded(tmp_path)
    frozen = model(input_ids=IDS).logits
    model, plain = (with_lora(each, target_parameters=NAMES) for each in (model, plain))
    report = slk.accelerate_peft(model, strict=True, fuse_mlp=fuse_mlp)
    assert {(row.r, row.experts) for row in report.replaced} == {(3, E)}
    assert [mlp.reason for mlp in report.mlps] == [None] * fuse_mlp
    slk.accelerate_peft(plain, strict=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, p in plain.named_parameters():
        assert p.requires_grad == (name in trained)
        if p.requires_grad:
            p.data.copy_(trained[name])
    for each in (model, plain):
        if checkpointing is not None:
            each.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            each.enable_input_require_grads()
            each.train()
    assert_close(results(model), results(plain))
    model.eval()
    for off in (model.disable_adapter(), slk.disable_lora(model)):
        with off:
            assert model(input_ids=IDS).logits.equal(frozen)
    assert not parametrize._cache_enabled


class Experts(torch.nn.Module):
    """Two experts, whose forward reads the stack once for each."""

    # What forward raises at its end.
    error: BaseException | None = None

    def __init__(self, columns: int = 32) -> None:
        super().__init__()
        self.up_proj = torch.nn.Parameter(torch.zeros(2, 8, columns), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.up_proj[0].t() + x @ self.up_proj[1].t()
        if self.error is not None:
            raise self.error
        return y


# Of the stack of Experts, which is of 1.5 then.
PACKED_STACK = {
    "experts.up_proj_blocks": torch.full((2, 8, 1, 16), 0x33, dtype=torch.uint8),
    "experts.up_proj_scales": torch.full((2, 8, 1), 127, dtype=torch.uint8),
}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), SystemExit(), ValueError()], ids=repr)
def test_interrupted_experts_leave_no_cache(error, tmp_path, monkeypatch):
    """The cache is one for all parametrized modules. Left on, others go on with old values."""
    model = torch.nn.ModuleDict({"experts": Experts()})
    slk.load_packed_experts(model, write(PACKED_STACK, tmp_path))
    monkeypatch.setattr(Experts, "error", error)
    computed = []
    own = MXFP4Parametrization.forward
    monkeypatch.setattr(
        MXFP4Parametrization, "forward", lambda *args: computed.append(1) or own(*args)
    )
    with nullcontext() if error is None else pytest.raises(type(error)):
        assert model.experts(torch.ones(1, 32)).equal(torch.full((1, 8), 2 * 32 * 1.5))
    assert len(computed) == 1, "each read of the stack has dequantized it"
    assert not parametrize._cache_enabled and not parametrize._cache
    other = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))
    before = other.weight.detach().clone()
    with torch.no_grad():
        other.parametrizations.weight.original0.mul_(5)
    torch.testing.assert_close(other.weight, 5 * before)


def test_files_are_those_of_plain_experts_and_merging_is_refused(tmp_path):
    saved = []
    for name, each in zip(("packed", "plain"), loaded(tmp_path), strict=True):
        model = with_lora(each, target_parameters=NAMES)
        slk.accelerate_peft(model, strict=True)
        torch.manual_seed(2)
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.data.normal_()
        model.save_pretrained(tmp_path / name)
        saved.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert saved[0].keys() == saved[1].keys() and len(saved[0]) == 4
    assert all(saved[0][key].equal(saved[1][key]) for key in saved[0])
    fresh, _ = loaded(tmp_path)
    frozen = fresh(input_ids=IDS).logits
    fresh = with_lora(fresh, target_parameters=NAMES)
    slk.accelerate_peft(fresh)
    fresh.load_adapter(tmp_path / "plain", "default")
    with torch.no_grad():
        y, expected = (each.eval()(input_ids=IDS).logits for each in (fresh, model))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    with pytest.raises(ValueError, match="down_proj is a stack in MXFP4, which would have to be"):
        fresh.merge_adapter()
    assert fresh.unload()(input_ids=IDS).logits.equal(frozen)


@pytest.mark.parametrize("is_stored", [False, True])
def test_loading_changes_values_alone(is_stored, tmp_path):
    """Neither what trains, nor a dtype, nor what is tied, whatever the checkpoint has."""
    plain, state = checkpoint(BF16)
    plain.config.tie_word_embeddings = True
    plain.to(FP32)
    model = without_memory(plain).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    if is_stored:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    else:
        model.tie_weights()
        del state["lm_head.weight"]
    slk.load_packed_experts(model, write(state, tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.is_meta for p in model.parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {FP32}


def test_only_stacks_of_a_model_with_values(tmp_path):
    """Whatever else the checkpoint holds."""
    plain, state = checkpoint()
    model = build("gpt_oss", dtype=FP32, width=WIDTH)
    head = model.lm_head.weight.clone()
    state["lm_head.weight"] = torch.zeros_like(head)
    slk.load_packed_experts(model, write(state, tmp_path))
    assert model.lm_head.weight.equal(head)
    experts, expected = (m.model.layers[0].mlp.experts for m in (model, plain))
    assert experts.gate_up_proj.equal(expected.gate_up_proj)
    assert copy.deepcopy(experts).down_proj.equal(expected.down_proj)
    bytes_of_stacks = sum(p.numel() for n, p in experts.named_parameters() if "parametriz" in n)
    assert bytes_of_stacks == (3 * WIDTH * WIDTH * E) // 2


def drop(name):
    return lambda state: state.pop(name)


def put(name, value):
    return lambda state: state.update({name: value})


GATE_UP = NAMES[0]
WRONG = [
    (drop(f"{GATE_UP}_scales"), rf"{GATE_UP}_blocks must come with {GATE_UP}_scales, got none"),
    (
        put(f"{GATE_UP}_blocks", torch.zeros(4, 128, 1, 16, dtype=torch.uint8)),
        rf"{GATE_UP}_blocks must be \[4, 128, 2, 16\] to fit \[4, 64, 128\], got \[4, 128, 1, 16\]",
    ),
    (
        put(f"{GATE_UP}_scales", torch.zeros(4, 128, 2)),
        rf"{GATE_UP}_scales must be U8, got F32",
    ),
    (
        put("model.layers.7.mlp.experts.down_proj_blocks", torch.zeros(1)),
        r"must come with model.layers.7.mlp.experts.down_proj_scales",
    ),
    (
        lambda state: [state.pop(f"{name}_blocks") for name in NAMES],
        "path must hold stacks in MXFP4, NAME_blocks and NAME_scales, got none in",
    ),
    (
        drop("lm_head.weight"),
        "path must hold values for the parameters on the meta device, got none for lm_head.weight",
    ),
    (
        put("lm_head.weight", torch.zeros(3, 64)),
        r"lm_head.weight must be \[64, 64\], got \[3, 64\]",
    ),
    (
        put("lm_head.weight", torch.zeros(64, 64).to(torch.float8_e4m3fn)),
        r"lm_head.weight must be torch.float32, or a float of .* got torch.float8_e4m3fn",
    ),
    (
        put("lm_head.weight", torch.zeros(64, 64, dtype=torch.int8)),
        r"lm_head.weight must be torch.float32, or a float of .* got torch.int8",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_checkpoints_that_do_not_fit(change, message, tmp_path):
    plain, state = checkpoint()
    model = without_memory(plain)
    change(state)
    before = [*model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        slk.load_packed_experts(model, write(state, tmp_path))
    assert all(p is q for (_, p), (_, q) in zip(before, model.named_parameters(), strict=True))


def test_models_that_do_not_fit(tmp_path):
    plain, state = checkpoint()
    write(state, tmp_path)
    with pytest.raises(ValueError, match=r"path must be a directory with model.safetensors, got"):
        slk.load_packed_experts(plain, tmp_path / "nothing")
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
        slk.load_packed_experts("gpt-oss", tmp_path)
    with torch.device("meta"):
        model = type(plain)._from_config(copy.deepcopy(plain.config))
    with pytest.raises(ValueError, match="got a buffer on the meta device; make the model within"):
        slk.load_packed_experts(model, tmp_path)
    with pytest.raises(ValueError, match=r"model must have 'model.layers.0.mlp.experts' for"):
        slk.load_packed_experts(plain.lm_head, tmp_path)
    slk.load_packed_experts(plain, tmp_path)
    with pytest.raises(
        ValueError, match=r"experts.\w+_proj must not be packed yet, got one that is"
    ):
        slk.load_packed_experts(plain, tmp_path)
    assert transformers.__name__ == "transformers"


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    """The files exist there, so that only this check keeps them out."""
    plain, state = checkpoint()
    model = without_memory(plain)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    write(state, directory, files=3)
    outside = tmp_path / "model-0.safetensors"
    (directory / "model-0.safetensors").rename(outside)
    index = directory / "model.safetensors.index.json"
    inside = index.read_text()
    for name in ("../model-0.safetensors", str(outside)):
        index.write_text(inside.replace("model-0.safetensors", name))
        with pytest.raises(ValueError, match="must name files of its own directory, got"):
            slk.load_packed_experts(model, directory)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("columns", [40, 63])
def test_a_stack_of_other_columns_is_not_cut(columns, tmp_path):
    model = torch.nn.ModuleDict({"experts": Experts(columns)})
    with pytest.raises(ValueError, match=rf"must have a multiple of 32 columns, .* got {columns}"):
        slk.load_packed_experts(model, write(PACKED_STACK, tmp_path))
    assert model.experts.up_proj.shape == (2, 8, columns)


def test_a_tensor_of_two_files_comes_from_the_one_that_the_index_names(tmp_path):
    blocks, scales = PACKED_STACK
    other = {blocks: torch.zeros_like(PACKED_STACK[blocks])}
    for first, second in (("a", "b"), ("b", "a")):
        save_file({blocks: PACKED_STACK[blocks]}, tmp_path / f"{first}.safetensors")
        save_file(other | {scales: PACKED_STACK[scales]}, tmp_path / f"{second}.safetensors")
        places = {blocks: f"{first}.safetensors", scales: f"{second}.safetensors"}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
        model = torch.nn.ModuleDict({"experts": Experts()})
        slk.load_packed_experts(model, tmp_path)
        assert model.experts.up_proj.equal(torch.full((2, 8, 32), 1.5))


INDEX = "model.safetensors.index.json"
# By the name of the file, its content and what the error says.
DAMAGED = [
    (INDEX, b"", "path must hold an index in JSON, got a damaged .*: Expecting value"),
    (INDEX, b"\xff", "path must hold an index in JSON, got a damaged .*: 'utf-8' codec"),
    (INDEX, b'{"a":' * 100_000, "path must hold an index in JSON, got a damaged .*: maximum rec"),
    (INDEX, b"[]", "'weight_map' of .* must map the names of tensors .* got None"),
    (INDEX, b"{}", "'weight_map' of .* must map the names of tensors .* got None"),
    (INDEX, b'{"weight_map": 5}', "'weight_map' of .* must map .* got 5"),
    (INDEX, b'{"weight_map": {"a": true}}', "'weight_map' of .* must map .* got {'a': True}"),
    (INDEX, b'{"weight_map": {"a": ["b"]}}', r"'weight_map' of .* must map .* got {'a': \['b'\]}"),
    (
        INDEX,
        b'{"weight_map": {"a": "model.safetensors"}}',
        "'.*model.safetensors' must hold the tensors that model.safetensors.index.json says, got "
        "none by the name of a",
    ),
    ("model.safetensors", b"", "path must hold files of safetensors, got a damaged .*: "),
    ("model.safetensors", b"\x40\0\0\0\0\0\0\0{", "path must hold files of .* damaged .*: "),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_a_damaged_file_is_named(name, content, message, tmp_path):
    model = torch.nn.ModuleDict({"experts": Experts()})
    write(PACKED_STACK, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        slk.load_packed_experts(model, tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert not model.experts.up_proj.any()
