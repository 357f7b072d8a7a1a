"""GGUF files on a GPU: linear layers stay in the file's blocks, and compute what the unpacked ones compute."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

sys.path.insert(0, str(Path(__file__).parents[2]))

from simulated_device import READ, device, simulated  # noqa: E402
from test_launch_budgets import flash  # noqa: E402, F401

from keifu import checkpoints  # noqa: E402
from keifu.checkpoints import loading, plan  # noqa: E402
from keifu.checkpoints.gguf.config import read_config  # noqa: E402
from keifu.checkpoints.packing import bytes_in_blocks, fill_in_blocks  # noqa: E402
from keifu.checkpoints.plan import Source, StoredTensor  # noqa: E402
from keifu.checkpoints.registry import describe  # noqa: E402
from keifu.commands.bench import _weight_bytes  # noqa: E402
from keifu.devices import Choice, choosing  # noqa: E402
from keifu.errors import UserError  # noqa: E402
from keifu.inference.text.draft import Draft  # noqa: E402
from keifu.inference.text.generate import generate_batch  # noqa: E402
from keifu.inference.text.sampling_params import SamplingParams  # noqa: E402
from keifu.layers.quantized import FORMATS, QuantizedLinear  # noqa: E402
from keifu.models import llama  # noqa: E402
from keifu.models.mixture import mixtral  # noqa: E402
from keifu.native.pack import Blocks  # noqa: E402

SIZES = {"vocab_size": 261, "context_length": 64, "dim": 256, "hidden_dim": 256, "n_layers": 2, "n_heads": 4}
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K", "": "Q4_K"}  # as Q4_K_M has them


def file_of(config: llama.Config | mixtral.Config, kinds: dict[str, str], path: Path) -> Path:
    """Write a model of random numbers whose matrices are of these types, by the ends of their names."""
    torch.manual_seed(0)
    module = sys.modules[type(config).__module__]
    checkpoints.save_gguf(module.build(config), None, path)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0])
    generator = np.random.default_rng(0)
    for tensor in reader.tensors:
        name, data = tensor.name.removesuffix(".weight").rpartition(".")[2], np.array(tensor.data)
        kind = next(kind for end, kind in kinds.items() if name.startswith(end))
        if data.ndim == 1 or kind == "F16":
            writer.add_tensor(tensor.name, data if data.ndim == 1 else data.astype(np.float16))
            continue
        numbers, size = FORMATS[kind][:2]
        blocks = generator.integers(0, 256, (*data.shape[:-1], data.shape[-1] // numbers, size), np.uint8)
        at = slice(208, 210) if kind == "Q6_K" else slice(0, 4 if kind in ("Q4_1", "Q4_K") else 2)
        scales = generator.uniform(1e-4, 3e-4, (*blocks.shape[:-1], (at.stop - at.start) // 2)).astype(np.float16)
        blocks[..., at] = scales.view(np.uint8)
        writer.add_tensor(tensor.name, blocks.reshape(*data.shape[:-1], -1), raw_dtype=Type[kind])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    path.with_suffix(".new").replace(path)
    return path


CASES = {kind: (llama.Config(**SIZES, n_kv_heads=2), {"": kind}) for kind in FORMATS} | {
    "Q4_K_M, biases, tied": (llama.Config(**SIZES, n_kv_heads=2, qkv_bias=True, tied=True), MIXED),
    "mixture": (mixtral.Config(**SIZES, n_kv_heads=2, n_experts=3), {"": "Q4_0"}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_unpacked_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    path = file_of(*CASES[name], tmp_path / "model.gguf")
    tokens = torch.arange(14).view(2, 7) * 17
    with simulated(), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            packed, plain = (checkpoints.load_model(path, dtype, weights=weights) for weights in ("own", None))
            assert {each.device for each in packed.state_dict().values()} == {device()}
            there = tokens.to(device())
            assert torch.equal(packed(there).cpu(), plain(there).cpu()) and packed.embedding.weight.dtype == dtype
    here = fill_in_blocks(loading.planned(path, torch.float32), torch.device("cpu"))  # the same layers on a CPU
    with torch.no_grad():
        assert torch.equal(here(tokens), checkpoints.load_model(path, device="cpu")(tokens))
    with pytest.raises(UserError, match="weights='own' may be packed: load it without, and save that"):
        checkpoints.save(here, None, tmp_path / "saved")
    layers = [each for each in packed.modules() if isinstance(each, QuantizedLinear)]
    reader = gguf.GGUFReader(path)
    stored = sum(tensor.n_bytes for tensor in reader.tensors if len(tensor.shape) > 1)
    embedding = next(tensor.n_bytes for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert sum(buffer.nbytes for layer in layers for buffer in layer.buffers()) == stored - embedding
    assert _weight_bytes(packed, 1)[0] >= stored - embedding <= Draft(packed).nbytes / 2  # what bench and serve count


def test_an_engine_writes_the_same_from_blocks(tmp_path: Path, flash: None) -> None:  # noqa: F811
    """In the kernels and graphs of decoding too: unpacking reads nothing back."""
    path = file_of(*CASES["Q4_0"], tmp_path / "model.gguf")
    params, written = SamplingParams(max_tokens=9, temperature=0.8, seed=1), []
    with simulated():
        for weights in ("own", None):
            model = checkpoints.load_model(path, torch.bfloat16, weights=weights)
            READ.clear()
            written.append([each.tokens for each in generate_batch(model, None, [[5, 6, 7], [9]], params)])
            written.append(READ.total())
    assert written[:2] == written[2:]


def test_a_file_in_half_precision_stays_so_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "has_bfloat16", lambda where: True)
    path = file_of(llama.Config(**SIZES, n_kv_heads=2), {"": "F16"}, tmp_path / "model.gguf")
    with simulated():
        for weights in ("auto", None):
            with choosing(Choice(weights=weights)):
                model = checkpoints.load_model(path, weights="own")
            assert {each.dtype for each in model.parameters()} == {torch.float16}
        assert checkpoints.load_model(path, device="cpu").embedding.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.attn_v.weight"])
def test_infinite_scales_are_refused(name: str, tmp_path: Path) -> None:
    path = file_of(*CASES["Q4_0"], tmp_path / "model.gguf")
    place = next(each for each in gguf.GGUFReader(path).tensors if each.name == name)
    data = bytearray(path.read_bytes())
    data[place.data_offset : place.data_offset + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    with simulated(), pytest.raises(UserError, match=f"32 numbers in {name} that are not finite"):
        checkpoints.load_model(path, weights="own")


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of_a_model_are_known_before_it_is_loaded(name: str, tmp_path: Path) -> None:
    path = file_of(*CASES[name], tmp_path / "model.gguf")
    with simulated():
        model = checkpoints.load_model(path, weights="own")
        storages = {x.untyped_storage().data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
        assert bytes_in_blocks(loading.planned(path, device=device())) == sum(storages.values())


def test_a_llama_7b_in_q4_0_takes_less_than_5_gb() -> None:
    """Weights, the keys and values of 1,024 tokens, and the largest matrix unpacked, computed without memory."""
    fields = {"general.architecture": "llama", "llama.context_length": 2048, "llama.embedding_length": 4096,
              "llama.block_count": 32, "llama.feed_forward_length": 11008, "llama.attention.head_count": 32,
              "llama.attention.layer_norm_rms_epsilon": 1e-6}  # fmt: skip
    rows = {"attn_q": 4096, "attn_k": 4096, "attn_v": 4096, "attn_output": 4096, "ffn_gate": 11008, "ffn_up": 11008}
    shapes = {f"blk.{n}.{name}.weight": (size, 4096) for n in range(32) for name, size in rows.items()}
    shapes |= {f"blk.{n}.ffn_down.weight": (4096, 11008) for n in range(32)}
    shapes |= {f"blk.{n}.{name}_norm.weight": (4096,) for n in range(32) for name in ("attn", "ffn")}
    shapes |= {f"{name}.weight": (32000, 4096) for name in ("token_embd", "output")} | {"output_norm.weight": (4096,)}
    architecture, config = read_config(fields, shapes, {}, "a file")
    kinds = {name: "F32" if len(shape) == 1 else "Q4_0" for name, shape in shapes.items()} | {"output.weight": "Q6_K"}
    stored = {name: StoredTensor(shape, kinds[name], torch.float32) for name, shape in shapes.items()}

    def blocks(name: str) -> Blocks:
        numbers, size = FORMATS[kinds[name]][:2]
        row = shapes[name][1] // numbers * size
        return Blocks(Type[kinds[name]].value, torch.empty(shapes[name][0], row, dtype=torch.uint8, device="meta"))

    source = Source(Path("a file"), "GGUF", describe(config)[0], config, stored,
                    lambda name: torch.empty(shapes[name], device="meta"), lambda: None, architecture.names, 128,
                    (), blocks)  # fmt: skip
    with choosing(Choice(allow_nonfinite=True)):
        model = fill_in_blocks(plan.plan(source, torch.bfloat16), torch.device("meta"))
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    cache = model.new_state(1, 1024)
    kept = sum(each.nbytes for each in (*cache.keys, *cache.values))
    unpacked = 2 * max(layer.shape.numel() for layer in model.modules() if isinstance(layer, QuantizedLinear))
    assert 4.0e9 < weights < 4.1e9 and weights + kept + unpacked < 5e9, (weights, kept, unpacked)
