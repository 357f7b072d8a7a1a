"""Weights packed straight from a file: the same bits as packed from the loaded model; GGUF's blocks without loss."""

import pickle
import sys
from copy import deepcopy
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from quick import quick

from keifu import checkpoints, devices
from keifu.checkpoints.loading import planned
from keifu.devices import Choice, choosing
from keifu.errors import UserError
from keifu.models import bert
from keifu.native import library
from keifu.native.model import NativeLM, native_form, pack

sys.path.insert(0, str(Path(__file__).parent.parent / "native"))
from native_toys import TOYS, toy, unpacked

WRITABLE = {"llama", "qwen2", "qwen3", "gpt2", "gemma3 of windows", "mixtral", "olmoe"}  # as GGUF
TOKENS = torch.arange(3, 40)[None]


pytestmark = pytest.mark.usefixtures("opened")


def equal(one: NativeLM, other: NativeLM) -> bool:
    return torch.equal(one(TOKENS), other(TOKENS))


@pytest.mark.parametrize(
    ("kind", "weights"),
    quick(product(sorted(set(TOYS) - {"llama of one head", "yarn"}), ("f32", "bf16", "int8", "int4"))),
)
def test_from_a_directory(kind: str, weights: str, tmp_path: Path) -> None:
    model = toy(kind)
    checkpoints.save(model, None, tmp_path)
    loaded = checkpoints.load_model(tmp_path, weights=weights)
    assert isinstance(loaded, NativeLM) and loaded.config == checkpoints.load_model(tmp_path).config
    assert equal(loaded, pack(model, weights))


@pytest.mark.parametrize(("dtype", "kind"), quick(product(["f32", "f16", "bf16"], sorted(WRITABLE))))
def test_from_gguf(kind: str, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    checkpoints.save_gguf(toy(kind), None, path, dtype)
    model = checkpoints.load_model(path)
    for weights in ("f32", "bf16", "int8", "int4"):
        loaded = checkpoints.load_model(path, weights=weights)
        assert isinstance(loaded, NativeLM) and equal(loaded, pack(model, weights))


BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K"]


def random_blocks(rows: int, columns: int, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return rows of blocks of random bytes, with scales that are numbers of a usual size."""
    chance = np.random.default_rng(rows * columns)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = chance.integers(0, 256, (rows * columns // block, size), np.uint8)
    places = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [size - 2]}.get(kind.name, [0])
    for place in places:
        scale = chance.uniform(0.0001, 0.001, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write_blocks(path: Path, kind: str, experts: int = 0) -> None:
    """Write a LLaMA (with experts: a Mixtral) with random blocks of one kind. The embedding is in Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in {
        writer.add_block_count: 2, writer.add_context_length: 80, writer.add_embedding_length: 256,
        writer.add_feed_forward_length: 512, writer.add_head_count: 8, writer.add_head_count_kv: 4,
        writer.add_vocab_size: 101, writer.add_rope_dimension_count: 32, writer.add_layer_norm_rms_eps: 1e-5,
    }.items():  # fmt: skip
        add(value)
    writer.add_tokenizer_model("none")
    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256)}
    networks = {"gate": (512, 256), "up": (512, 256), "down": (256, 512)}
    shapes |= {f"ffn_{part}{'_exps' if experts else ''}": shape for part, shape in networks.items()}
    matrices = {f"blk.{n}.{name}.weight": (shape, kind) for n in range(2) for name, shape in shapes.items()}
    matrices |= {"token_embd.weight": ((101, 256), "Q8_0"), "output.weight": ((101, 256), kind)}
    for name, (shape, own) in matrices.items():
        number = gguf.GGMLQuantizationType[own]
        blocks = random_blocks(shape[0] * (experts if "_exps" in name else 1), shape[1], number)
        writer.add_tensor(name, blocks.reshape(experts, shape[0], -1) if "_exps" in name else blocks, raw_dtype=number)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    for n in range(2 if experts else 0):
        router = np.random.default_rng(n).normal(size=(experts, 256)).astype(np.float32)
        writer.add_tensor(f"blk.{n}.ffn_gate_inp.weight", router)
    for name in ("output_norm", *(f"blk.{n}.{each}_norm" for n in range(2) for each in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "experts", "weights"),
    quick(
        ((kind, experts, weights) for kind, experts in [*((kind, 0) for kind in BLOCKS), ("Q8_0", 5), ("Q4_K", 5)]
         for weights in ("int8", "int4")), (0, 1), (2,),
    ),
)  # fmt: skip
def test_blocks_keep_their_numbers_bit_for_bit(kind: str, experts: int, weights: str, tmp_path: Path) -> None:
    write_blocks(tmp_path / "model.gguf", kind, experts)
    model = checkpoints.load_model(tmp_path / "model.gguf")
    loaded = checkpoints.load_model(tmp_path / "model.gguf", weights=weights)
    assert isinstance(loaded, NativeLM)
    for name, each in unpacked(model, loaded).named_parameters():
        assert torch.equal(each, model.get_parameter(name)), name
    with torch.inference_mode():
        expected = model(TOKENS)
    error = (loaded(TOKENS) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.05


@pytest.mark.parametrize(("kind", "experts"), [("Q8_0", 0), ("Q4_K", 0), ("Q4_K", 5)])
def test_own_weights_are_the_blocks_where_native_code_has_them(
    kind: str, experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    write_blocks(path, kind, experts)
    own = checkpoints.load_model(path, weights="own")
    assert isinstance(own, NativeLM) and equal(own, checkpoints.load_model(path, weights="int8"))
    monkeypatch.setenv(library.VARIABLE, "off")
    assert not isinstance(checkpoints.load_model(path, weights="own"), NativeLM)
    monkeypatch.delenv(library.VARIABLE)


@pytest.mark.parametrize("stored", ["Q5_1", "f32", "f16"])
def test_own_weights_that_native_code_has_no_blocks_for_are_float32(stored: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if stored == "Q5_1":
        write_blocks(path, stored)
    else:
        checkpoints.save_gguf(toy("llama"), None, path, stored)
    own, plain = checkpoints.load_model(path, weights="own"), checkpoints.load_model(path)
    assert isinstance(own, NativeLM) and own.weights == "f32" and equal(own, pack(plain, "f32"))


def test_own_weights_of_bfloat16_and_of_what_writes_no_text_stay(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoints.save(toy("llama").to(torch.bfloat16), None, tmp_path / "llama")
    assert not isinstance(own := checkpoints.load_model(tmp_path / "llama", weights="own"), NativeLM)
    assert native_form(own) is not None  # which is packed beside it
    checkpoints.save(bert.build(bert.Config(vocab_size=20, dim=8, hidden_dim=8, n_layers=1, n_heads=2)), None, tmp_path)
    assert isinstance(checkpoints.load_model(tmp_path, weights="own"), bert.Bert)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags", ["avx512f avx512_bf16", "avx2 fma"])
def test_pytorch_computes_bfloat16_only_where_the_processor_does(flags: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(devices, "processor", lambda field: flags)
    small = bert.Config(vocab_size=20, dim=8, hidden_dim=8, n_layers=1, n_heads=2)
    checkpoints.save(bert.build(small).to(torch.bfloat16), None, tmp_path / "bert")
    for kind in ("llama", "yarn"):
        checkpoints.save(toy(kind).to(torch.bfloat16), None, tmp_path / kind)
    by_pytorch = torch.bfloat16 if "bf16" in flags else torch.float32

    def dtype(name: str, wanted: torch.dtype | None = None) -> torch.dtype:
        [dtype] = {weight.dtype for weight in checkpoints.load_model(tmp_path / name, wanted).parameters()}
        return dtype

    assert [dtype("bert"), dtype("yarn"), dtype("llama")] == [by_pytorch, torch.bfloat16, torch.bfloat16]
    assert dtype("bert", torch.bfloat16) == torch.bfloat16
    monkeypatch.setenv("KEIFU_NATIVE", "off")
    assert dtype("llama") == by_pytorch
    assert planned(tmp_path / "bert").exact == torch.bfloat16  # which a conversion keeps


def test_own_weights_that_are_not_finite_stay_where_they_are_allowed(tmp_path: Path) -> None:
    model = toy("llama")
    model.get_parameter("embedding.weight").data[7, 3] = torch.inf
    checkpoints.save(model, None, tmp_path)
    with pytest.raises(UserError, match="embedding"):
        checkpoints.load_model(tmp_path, weights="own")
    with choosing(Choice(allow_nonfinite=True)):
        assert not isinstance(checkpoints.load_model(tmp_path, weights="own"), NativeLM)


@pytest.mark.parametrize("numbers", [(3e38,), (3e38, -3e38, 3e38), (-2e19,)])
def test_numbers_whose_products_overflow_are_refused(numbers: tuple[float, ...], tmp_path: Path) -> None:
    model = toy("llama")
    model.get_parameter("embedding.weight").data[7, : len(numbers)] = torch.tensor(numbers)
    checkpoints.save(model, None, tmp_path)
    with pytest.raises(UserError, match=rf"{len(numbers)} numbers in .*embed.* that are not finite, or beyond 1e19"):
        checkpoints.load_model(tmp_path)
    with choosing(Choice(allow_nonfinite=True)):
        checkpoints.load_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "experts", "tensor", "name"),
    [
        ("Q8_0", 0, "blk.1.ffn_up.weight", "feedforward.gate_up.weight"),
        ("Q4_K", 0, "blk.1.ffn_up.weight", "feedforward.gate_up.weight"),
        ("Q8_0", 3, "blk.1.ffn_up_exps.weight", "feedforward.experts.2.gate_up.weight"),
    ],
)
def test_a_scale_that_is_no_number_is_told(kind: str, experts: int, tensor: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_blocks(path, kind, experts)
    reader = gguf.GGUFReader(path, "r+")
    damaged = next(each for each in reader.tensors if each.name == tensor)
    (damaged.data[-1] if experts else damaged.data)[3, :2] = [1, 0x7E]
    reader.data.flush()
    with pytest.raises(UserError, match=rf"blocks.1.{name} cannot be packed.*Row 3 has a NaN"):
        checkpoints.load_model(path, weights="own")


def test_blocks_as_bfloat16_are_rounded(tmp_path: Path) -> None:
    write_blocks(tmp_path / "model.gguf", "Q4_1")
    model = checkpoints.load_model(tmp_path / "model.gguf")
    loaded = checkpoints.load_model(tmp_path / "model.gguf", weights="bf16")
    assert equal(loaded, pack(model, "bf16"))


def test_a_type_without_a_format_is_packed_from_its_numbers(tmp_path: Path) -> None:
    write_blocks(tmp_path / "model.gguf", "Q5_1")
    model = checkpoints.load_model(tmp_path / "model.gguf")
    loaded = checkpoints.load_model(tmp_path / "model.gguf", weights="int4")
    formats = {matrix.format for (name, _), matrix in loaded.packer.matrices.items() if "blocks" in name}
    assert formats == {loaded.packer.formats.layers}
    assert torch.isfinite(loaded(TOKENS)).all() and model.config == loaded.config


def test_adapters_are_merged(tmp_path: Path) -> None:
    from keifu.checkpoints.lora.peft import adapt, save_adapter
    from keifu.layers.lora import LoraSettings, adapters, merge

    model = toy("llama")
    checkpoints.save(model, None, tmp_path / "base")
    for adapter in adapters(adapt(model, ["q_proj", "down_proj"], LoraSettings(2))):
        torch.nn.init.normal_(adapter.b)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    loaded = checkpoints.load_model(tmp_path / "adapter", weights="int8")
    assert isinstance(loaded, NativeLM) and equal(loaded, pack(merge(model), "int8"))


def test_refusals(tmp_path: Path) -> None:
    checkpoints.save(toy("llama"), None, tmp_path)
    with pytest.raises(UserError, match="There is no format of weights 'int3'. Did you mean 'int"):
        checkpoints.load(tmp_path, weights="int3")
    with pytest.raises(UserError, match="Weights are packed for the CPU, not meta"):
        checkpoints.load(tmp_path, weights="int8", device=torch.device("meta"))


def test_without_native_code_pytorch_has_the_weights_as_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    model = toy("llama")
    checkpoints.save(model, None, tmp_path)
    monkeypatch.setenv(library.VARIABLE, "off")
    loaded = checkpoints.load_model(tmp_path, weights="int8")
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert capfd.readouterr().err.count("\n") == 1


def test_a_model_that_native_code_lacks_stays_in_pytorch(tmp_path: Path, capfd) -> None:
    model = TOYS["yarn"]()
    from dataclasses import replace

    from keifu.layers.attention.positions import RopeScaling
    from keifu.models import llama

    model = llama.build(replace(model.config, rope_scaling=RopeScaling("dynamic", 2.0, 80)))
    checkpoints.save(model, None, tmp_path)
    loaded = checkpoints.load_model(tmp_path, weights="int8")
    assert not isinstance(loaded, NativeLM)
    assert "PyTorch" in capfd.readouterr().err


def test_packed_weights_are_not_saved(tmp_path: Path) -> None:
    packed = pack(toy("llama"), "int8")
    with pytest.raises(UserError, match="Weights packed as int8 cannot be saved"):
        checkpoints.save(packed, None, tmp_path / "model")
    with pytest.raises(UserError, match="Weights packed as int8 cannot be saved"):
        checkpoints.save_gguf(packed, None, tmp_path / "model.gguf")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for copied in (deepcopy, pickle.dumps):
        with pytest.raises(UserError, match="Weights packed as int8 cannot be saved"):
            copied(packed)
