"""GGUF in and out: every number, every setting; torn files; SmolLM2 as transformers reads it."""

import sys

import gguf
import gguf_toys
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st

from keifu import checkpoints
from keifu.checkpoints.gguf.config import FREQS, divisors, read_scaling
from keifu.checkpoints.gguf.read import open_file, read_blocks
from keifu.errors import UserError
from keifu.layers import quantized
from keifu.layers.attention.positions import RopeScaling
from keifu.models import gemma3, gpt2, llama, mlp, olmo2, palm, qwen3
from keifu.models.hybrid import qwen3_5, qwen3_next
from keifu.models.mixture import deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe
from keifu.models.variants import exaone4, gemma2, granite, ministral, smollm3

SMALL = {"vocab_size": 320, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "context_length": 64}

DEEPSEEK = SMALL | {
    "expert_dim": 24, "n_dense_layers": 1, "head_dim": 8, "rope_dim": 6, "value_dim": 10, "q_rank": 20, "kv_rank": 12,
    "n_experts": 6, "n_groups": 3, "n_groups_per_token": 2, "n_experts_per_token": 3,
}  # fmt: skip
DELTA = {
    "n_kv_heads": 2, "head_dim": 8, "rope_dim": 4, "n_linear_key_heads": 2, "n_linear_value_heads": 4,
    "linear_key_dim": 8, "linear_value_dim": 8,
}  # fmt: skip
LLAMA3 = RopeScaling("llama3", 8.0, 24)


def scaled(kind: str, qkv_bias: bool = False, **changes) -> llama.Config:
    scaling = RopeScaling(kind, **{"factor": 4.0, "original_context_length": 16} | changes)
    sizes = SMALL | {"n_kv_heads": 2, "head_dim": 16, "norm_eps": 1e-5, "qkv_bias": qkv_bias}
    return llama.Config(**sizes, rope_scaling=scaling)


CONFIGS = gguf_toys.CONFIGS | {
    "gpt2": gpt2.Config(**SMALL, dropout=0.0),
    "gpt2-untied": gpt2.Config(**SMALL, dropout=0.0, tied=False, norm_eps=1e-3),
    "llama": llama.Config(**SMALL, n_kv_heads=4),
    "llama-grouped-tied": llama.Config(**SMALL, n_kv_heads=2, norm_eps=1e-5, rope_theta=1e6, tied=True),
    "llama-wide-heads": llama.Config(**SMALL, n_kv_heads=1, head_dim=10),
    "llama-biased": llama.Config(**SMALL, n_kv_heads=2, qkv_bias=True, out_bias=True, feedforward_bias=True),
    "qwen2": llama.Config(**SMALL, n_kv_heads=2, qkv_bias=True, tied=True),
    "qwen3": qwen3.Config(**SMALL, n_kv_heads=2, head_dim=10),
    "gemma3": gemma3.Config(**SMALL, n_kv_heads=2, head_dim=10, sliding_window=5),
    "olmo2": olmo2.Config(**SMALL, n_kv_heads=2, norm_eps=1e-5),
    "mixtral": mixtral.Config(**SMALL, n_kv_heads=2, n_experts=5),
    "mixtral-one-expert-each-tied": mixtral.Config(**SMALL, n_kv_heads=2, n_experts_per_token=1, tied=True),
    "qwen3moe": qwen3_moe.Config(**SMALL, n_kv_heads=2, head_dim=10, expert_dim=24, n_experts=7, n_experts_per_token=3),
    "granite": granite.Config(**SMALL, n_kv_heads=2, attention_scale=0.3, attention_bias=True, feedforward_bias=True),
    "smollm3": smollm3.Config(**SMALL | {"n_layers": 5}, n_kv_heads=2, tied=False),
    "gemma2": gemma2.Config(**SMALL, n_kv_heads=2, head_dim=10, sliding_window=5, attention_cap=2.5, logit_cap=1.5),
    "olmoe": olmoe.Config(**SMALL, n_kv_heads=4, n_experts=6, n_experts_per_token=6),
    "window-of-all": llama.Config(**SMALL, n_kv_heads=2, sliding_window=64),
    "linear": scaled("linear", original_context_length=64),
    "yarn": scaled("yarn"),
    "yarn-attention-factor": scaled("yarn", attention_factor=0.8),
    "llama3": scaled("llama3", factor=32.0, original_context_length=8192),
}
COMPUTED = ("norm.weight", "log_rate")  # the file has weight + 1, or -exp(log_rate)
WITH_OFFSETS = (gemma2.Config, gemma3.Config, qwen3_next.Config, qwen3_5.Config)


def random(config) -> torch.nn.Module:
    module = sys.modules[type(config).__module__]
    model = module.build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read_again_is_the_same(name, tmp_path) -> None:
    model = random(CONFIGS[name])
    checkpoints.save_gguf(model, None, tmp_path / "model.gguf")
    again = checkpoints.load_model(tmp_path / "model.gguf")
    changes = {"attention_factor": pytest.approx(0.8)} if name == "yarn-attention-factor" else {}
    expected = vars(model.config.rope_scaling) | changes if changes else None
    assert again.config == model.config if expected is None else vars(again.config.rope_scaling) == expected
    computed = COMPUTED if type(CONFIGS[name]) in WITH_OFFSETS else ()
    found = again.state_dict()
    for key, tensor in model.state_dict().items():
        exact = not key.endswith(computed)
        assert torch.equal(found[key], tensor) if exact else torch.allclose(found[key], tensor, rtol=1e-6, atol=1.2e-7)
    tokens = torch.randint(0, 320, (1, 50))
    with torch.no_grad():
        assert torch.allclose(model(tokens), again(tokens), rtol=0, atol=1e-5 if computed else 1e-6)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_each_format_is_what_its_name_says(dtype, tmp_path) -> None:
    model = random(CONFIGS["gpt2"])
    path = tmp_path / "model.gguf"
    checkpoints.save_gguf(model, None, path, dtype)
    reader = gguf.GGUFReader(path)  # the reference
    for tensor in reader.tensors:
        vector = len(tensor.shape) == 1 or tensor.name == "position_embd.weight"
        matrix = "q8_0" if dtype.startswith("q4") and tensor.name in ("token_embd.weight", "output.weight") else dtype
        assert tensor.tensor_type.name == ("F32" if vector else matrix.upper())
    numbers = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3}  # llama.h, enum llama_ftype
    assert reader.fields["general.file_type"].contents() == numbers[dtype]
    again = checkpoints.load_model(path)
    error = {"f32": 0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2, "q4_0": 0.13, "q4_1": 0.07}[dtype]
    for key, tensor in model.state_dict().items():
        assert (again.state_dict()[key] - tensor).abs().max() <= error * tensor.abs().max(), key


def test_queries_and_keys_have_neighbouring_pairs_biases_too(tmp_path) -> None:
    """llama.cpp rotates numbers 2i and 2i + 1 of a LLaMA's heads; here i and i + half. Computed with NumPy alone."""
    config = llama.Config(**SMALL, n_kv_heads=2, qkv_bias=True, out_bias=True, feedforward_bias=True)
    model, size = random(config), SMALL["dim"] // SMALL["n_heads"]
    checkpoints.save_gguf(model, None, tmp_path / "model.gguf")
    file = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    joined = model.blocks[0].attention.qkv
    rows = (SMALL["dim"], 2 * size, 2 * size)
    for ending, whole in (("weight", joined.weight), ("bias", joined.bias)):
        parts = dict(zip("qkv", whole.detach().split(rows), strict=True))
        assert np.array_equal(file[f"blk.0.attn_v.{ending}"], parts["v"].numpy())
        for letter in "qk":
            ours, theirs = parts[letter].numpy(), file[f"blk.0.attn_{letter}.{ending}"]
            assert not np.array_equal(ours, theirs)
            for head in range(len(ours) // size):
                for pair in range(size // 2):
                    first, second = ours[head * size + pair], ours[head * size + pair + size // 2]
                    assert np.array_equal(theirs[head * size + 2 * pair], first)
                    assert np.array_equal(theirs[head * size + 2 * pair + 1], second)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "olmoe"])
def test_the_experts_of_a_layer_are_one_tensor(name, tmp_path) -> None:
    """By llama.cpp's names and settings; the router stays float32 in every format."""
    model = random(CONFIGS[name])
    config, path = model.config, tmp_path / "model.gguf"
    checkpoints.save_gguf(model, None, path, "q8_0")
    reader = gguf.GGUFReader(path)
    arch = {"mixtral": "llama"}.get(name, name)
    fields = {key: reader.fields[f"{arch}.{key}"].contents() for key in ("expert_count", "expert_used_count")}
    assert fields == {"expert_count": config.n_experts, "expert_used_count": config.n_experts_per_token}
    inner = reader.fields[f"{arch}.{'expert_' if name == 'qwen3moe' else ''}feed_forward_length"].contents()
    kinds = {tensor.name: tensor for tensor in reader.tensors}
    assert kinds["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    checkpoints.save_gguf(model, None, path, "f32")
    file = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[{"mixtral": "LLAMA"}.get(name, name.upper())], config.n_layers)
    assert {tensor.rpartition(".")[0] for tensor in file} <= {*known.mapping}
    assert file.keys() == kinds.keys() and not [each for each in file if "experts" in each or "_exps.0" in each]
    layer = model.blocks[1].feedforward
    assert np.array_equal(file["blk.1.ffn_gate_inp.weight"], layer.router.gate.weight.detach().numpy())
    for number, expert in enumerate(layer.experts):
        gate, up = expert.gate_up.weight.detach().numpy().reshape(2, inner, config.dim)
        found = [file[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")]
        assert found[0].shape == (config.n_experts, inner, config.dim)
        for own, theirs in zip((gate, up, expert.down.weight.detach().numpy()), found, strict=True):
            assert np.array_equal(theirs[number], own)


def test_rows_that_are_no_blocks_stay_exact(tmp_path) -> None:
    model = random(gpt2.Config(**SMALL | {"dim": 20, "hidden_dim": 64}, dropout=0.0))
    checkpoints.save_gguf(model, None, tmp_path / "model.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == "F32" and kinds["blk.0.ffn_down.weight"] == "Q8_0"


KINDS = [kind for kind in gguf.GGMLQuantizationType if kind.name not in ("I8", "I16", "I32", "I64", "F64")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_gguf_package_reads_it(kind, tmp_path) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (5, 3, 2 * size), np.uint8)
    raw &= np.uint8(0x3F)  # so that no float is infinite
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("odd", raw[0, :1, :size], raw_dtype=kind)  # one block alone
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_file(tmp_path / "x.gguf")
    reference = next(tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors if tensor.name == "x")
    try:
        expected = gguf.dequantize(reference.data, kind)
    except NotImplementedError:
        assert file.stored()["x"].dtype is None
        return
    got = file.read("x")
    assert file.stored()["x"].dtype == got.dtype and got.shape == file.stored()["x"].shape == (5, 3, 2 * block)
    assert np.array_equal(got.float().numpy(), expected, equal_nan=True) and file.read("odd").shape == (1, block)


VALUES = st.one_of(
    st.text(max_size=9), st.booleans(), st.integers(0, 2**32 - 1), st.floats(width=32, allow_nan=False),
    st.lists(st.text(max_size=5), min_size=1, max_size=4), st.lists(st.integers(-9, 9), min_size=1, max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4),
)  # fmt: skip


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=8), VALUES, max_size=6))
@settings(max_examples=40, deadline=None)
def test_metadata_are_read_as_the_gguf_package_reads_them(tmp_path_factory, fields) -> None:
    path = tmp_path_factory.mktemp("fields") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reference = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert dict(open_file(path).fields) == reference == {"general.architecture": "llama"} | fields


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    checkpoints.save_gguf(random(CONFIGS["llama"]), None, path)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.001, 0.004, 0.5, 0.9999])
def test_truncated_anywhere(whole, share, tmp_path) -> None:
    path = tmp_path / "torn.gguf"
    kept = int(len(whole) * share)
    path.write_bytes(whole[:kept])
    with pytest.raises(UserError, match="truncated or corrupt|no GGUF file") as caught:
        checkpoints.load_model(path)
    assert str(path) in str(caught.value) and (kept < 4 or f"{kept:,} bytes" in str(caught.value))


def rewrite(path, changes=None, tensors=None) -> None:
    """Rewrite a GGUF file with other fields and tensors (None drops one)."""
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")} | (changes or {})
    writer = gguf.GGUFWriter(path.with_suffix(".new"), fields.pop("general.architecture"))
    for key, value in fields.items():
        if value is not None:
            kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
    held = {tensor.name: np.array(tensor.data) for tensor in reader.tensors} | (tensors or {})
    for name, data in held.items():
        if data is not None:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("changes", "tensors", "text"),
    [
        ({"general.architecture": "lama"}, {}, "'lama', which keifu does not read"),
        ({"llama.block_count": None}, {}, "lacks llama.block_count"),
        ({"llama.expert_count": 8}, {}, "lacks llama.expert_used_count"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, {}, "not part of the model (blk.0.ffn_down.weight"),
        ({"llama.expert_shared_count": 1}, {}, "sets llama.expert_shared_count"),
        ({"llama.rope.dimension_count": 4}, {}, "rope.dimension_count 4 with heads of 8"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "'longrope'"),
        ({"llama.attention.head_count": 5}, {}, "n_heads"),
        ({"llama.attention.head_count_kv": [4, 2]}, {}, "another llama.attention.head_count_kv in each layer"),
        ({"split.count": 3}, {}, "one of 3 parts"),
        ({}, {"blk.1.attn_q.weight": None}, "1 missing (blk.1.attn_q.weight)"),
        ({}, {"blk.1.attn_sinks.weight": np.zeros(4, np.float32)}, "1 not part of the model (blk.1.attn_sinks.weight)"),
        ({}, {"output_norm.weight": np.zeros(5, np.float32)}, "output_norm.weight is [5] where the config asks"),
        ({}, {"token_embd.weight": None}, "lacks the tensor token_embd.weight"),
        ({}, {FREQS: np.array([1, 3, 2, 7], np.float32)}, "no formula"),
    ],
)
def test_files_that_are_not_what_they_say(whole, changes, tensors, text, tmp_path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    rewrite(path)
    checkpoints.load_model(path)
    rewrite(path, changes, tensors)
    with pytest.raises(UserError) as caught:
        checkpoints.load_model(path)
    assert text in str(caught.value)


SHORT = "rope_factors_short.weight"


@pytest.mark.parametrize(
    ("name", "changes", "tensors", "text"),
    [
        ("phi3-long", {}, {SHORT: None}, "has only one of rope_factors_short.weight and rope_factors_long.weight"),
        ("phi3-long", {}, {SHORT: np.ones(5, np.float32)}, "longrope needs 6 factors"),
        ("phi3-long", {"phi3.rope.dimension_count": 18}, {}, "rope.dimension_count 18 with heads of 16"),
        (
            "deepseek-v3-yarn-normalised-by-nothing",
            {"deepseek2.rope.scaling.yarn_log_multiplier": None},
            {},
            "lacks rope.scaling.yarn_log_multiplier",
        ),
        ("deepseek-v3", {"deepseek2.attention.key_length_mla": None}, {}, "lacks deepseek2.attention.key_length_mla"),
        ("lfm2", {"lfm2.attention.head_count_kv": 2}, {}, "a lfm2 model needs a number for each layer"),
        ("lfm2", {"lfm2.attention.head_count_kv": [0, 2, 0]}, {}, "has [0, 2, 0] for lfm2.attention.head_count_kv"),
        ("lfm2", {"lfm2.attention.head_count_kv": [0, 0, 0, 0]}, {}, "has [0, 0, 0, 0] for"),
        ("lfm2", {"lfm2.attention.head_count_kv": [0, 2, 0, 4]}, {}, "another lfm2.attention.head_count_kv in each"),
    ],
)
def test_other_architectures_that_are_not_what_they_say(name, changes, tensors, text, tmp_path) -> None:
    path = tmp_path / "x.gguf"
    checkpoints.save_gguf(random(CONFIGS[name]), None, path)
    rewrite(path, changes, tensors)
    with pytest.raises(UserError) as caught:
        checkpoints.load_model(path)
    assert text in str(caught.value)


def test_a_file_whose_layers_all_have_experts_may_lack_another_width(tmp_path) -> None:
    """The config.json of Qwen3.5 with experts has none."""
    path = tmp_path / "x.gguf"
    model = random(CONFIGS["qwen3.5-experts"])
    checkpoints.save_gguf(model, None, path)
    rewrite(path, {"qwen35moe.feed_forward_length": None})
    assert torch.equal(checkpoints.load_model(path).embedding.weight, model.embedding.weight)
    checkpoints.save_gguf(random(CONFIGS["deepseek-v3"]), None, path)
    rewrite(path, {"deepseek2.feed_forward_length": None})
    with pytest.raises(UserError, match=r"lacks deepseek2\.feed_forward_length"):
        checkpoints.load_model(path)


def test_a_short_convolution_is_an_exact_matrix(tmp_path) -> None:
    """llama.cpp's operation takes float32 and no axis of size 1."""
    model = random(CONFIGS["lfm2"])
    checkpoints.save_gguf(model, None, tmp_path / "x.gguf", "f16")
    file = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    stored = file["blk.0.shortconv.conv.weight"]
    assert stored.tensor_type.name == "F32" and file["blk.0.shortconv.in_proj.weight"].tensor_type.name == "F16"
    assert np.array_equal(stored.data, model.blocks[0].attention.convolution.weight.detach().squeeze(1).numpy())


@pytest.mark.timeout(60)
def test_a_tensor_without_numbers_is_not_split_into_experts(tmp_path) -> None:
    """A file of a few bytes can give it any number of them."""
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor_info("blk.0.ffn_up_exps.weight", [10**15, 0, 32], np.dtype(np.float32), 0)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
        write()
    writer.close()
    path.write_bytes(path.read_bytes() + bytes(-path.stat().st_size % 32))
    with pytest.raises(UserError, match="lacks|missing|has no"):
        checkpoints.load_model(path)


@pytest.mark.timeout(60)
def test_experts_of_one_number_are_not_built(tmp_path) -> None:
    """A file of two bytes for each would take minutes and gigabytes."""
    path, count = tmp_path / "a.gguf", 20_000
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"context_length": 8, "embedding_length": 8, "feed_forward_length": 8, "block_count": 1}
    sizes |= {"attention.head_count": 2, "rope.dimension_count": 4, "expert_count": count, "expert_used_count": 1}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float16))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((count, 1, 1), np.float16))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(UserError, match=f"has 2 tensors, too few for its config's {count} experts"):
        checkpoints.load_model(path)


STACK = "blk.1.ffn_down_exps.weight"


@pytest.mark.parametrize(
    ("changes", "tensors", "text"),
    [
        ({"llama.expert_count": 4}, {}, "2 of another shape (blk.0.ffn_gate_inp.weight is [5, 32]"),
        ({"llama.expert_count": 6}, {}, "6 missing (blk.0.ffn_gate_exps.5.weight, blk.0.ffn_up_exps.5.weight"),
        ({"llama.expert_count": 0}, {}, "32 not part of the model (blk.0.ffn_down_exps.0.weight"),
        ({"llama.expert_used_count": 6}, {}, "6 experts of a token cannot be chosen from 5"),
        ({"llama.expert_used_count": 0}, {}, "gives 0 for n_experts_per_token, which must be at least 1"),
        ({"llama.expert_used_count": [2, 1]}, {}, "another llama.expert_used_count in each layer"),
        ({}, {STACK: None}, "5 missing (blk.1.ffn_down_exps.0.weight"),
        ({}, {STACK: np.zeros((5, 32, 63), np.float32)}, "blk.1.ffn_down_exps.0.weight is [32, 63] where"),
        ({}, {STACK: np.full((5, 32, 64), np.nan, np.float32)}, "that are not finite"),
    ],
)
def test_mixtures_that_are_not_what_they_say(changes, tensors, text, tmp_path) -> None:
    path = tmp_path / "x.gguf"
    checkpoints.save_gguf(random(CONFIGS["mixtral"]), None, path)
    rewrite(path, changes, tensors)
    with pytest.raises(UserError) as caught:
        checkpoints.load_model(path)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (qwen3_moe.Config(**SMALL, dense_layers=(0,)), "qwen3moe needs dense_layers=()"),
        (qwen3_moe.Config(**SMALL, normalised=False), "qwen3moe needs normalised=True"),
        (olmoe.Config(**SMALL, normalised=True), "olmoe needs normalised=False"),
        (olmoe.Config(**SMALL, n_kv_heads=2), "olmoe needs n_kv_heads=4"),
        (gpt_oss.Config(**SMALL, n_kv_heads=2, gate_limit=5.0), "gpt-oss needs gate_limit=7.0"),
        (gpt_oss.Config(**SMALL, n_kv_heads=2, rope_scaling=RopeScaling("yarn", 4.0, 16)), "truncate=False"),
        (deepseek_v3.Config(**DEEPSEEK, rope_interleaved=False), "deepseek2 needs rope_interleaved=True"),
        (deepseek_v3.Config(**DEEPSEEK | {"q_rank": None}), "deepseek2 needs q_rank=None with 26 or 27 layers"),
        (deepseek_v3.Config(**DEEPSEEK | {"n_layers": 27}), "deepseek2 needs q_rank=None with 26 or 27 layers"),
        (
            deepseek_v3.Config(**DEEPSEEK, rope_scaling=RopeScaling("yarn", 4.0, 16, mscale=1.0, mscale_all_dim=0.7)),
            "it has mscale=1.0, mscale_all_dim=0.7",
        ),
        (qwen3_next.Config(**SMALL, **DELTA, dense_layers=(0,), n_experts=12), "qwen3next needs dense_layers=()"),
        (
            qwen3_next.Config(**SMALL, **DELTA, global_layers=(0,), n_experts=12),
            "qwen3next needs full attention in every n-th layer",
        ),
        (
            qwen3_5.Config(**SMALL, **DELTA | {"linear_key_dim": 16}),
            "qwen35 needs equal linear_key_dim and linear_value_dim",
        ),
        (palm.Config(**SMALL, head_dim=10), "command-r needs head_dim=None"),
        (palm.Config(**SMALL | {"n_layers": 64}, head_dim=8), "command-r needs fewer than 64 layers"),
        (gpt2.Config(**SMALL, activation="relu"), "gpt2 needs activation='gelu_tanh'"),
        (gpt2.Config(**SMALL, bias=False), "gpt2 needs bias=True"),
        (llama.Config(**SMALL, activation="gelu"), "llama needs activation='silu'"),
        (scaled("dynamic"), "dynamic"),
        (scaled("yarn", beta_fast=20.0), "beta_fast"),
        (scaled("llama3", qkv_bias=True), "runs no qwen2 model with the rotary scaling 'llama3'"),
        (smollm3.Config(**SMALL, n_kv_heads=2, rope_scaling=LLAMA3), "runs no smollm3 model with the rotary scaling"),
        (gemma2.Config(**SMALL, n_kv_heads=2, rope_scaling=LLAMA3), "runs no gemma2 model with the rotary scaling"),
        (exaone4.Config(**SMALL, n_kv_heads=2, head_dim=8, sliding_window=5), "exaone4 needs sliding_window=None"),
        (exaone4.Config(**SMALL, n_kv_heads=2, head_dim=10, sliding_window=None), "exaone4 needs head_dim=8"),
        (
            ministral.Config(**SMALL, n_kv_heads=2, query_growth=0.1, rope_scaling=RopeScaling("linear", 2.0, 32)),
            "mistral3 needs query_growth=None",
        ),
        (mlp.Config(), "keifu.models.mlp"),
    ],
)
def test_what_llama_cpp_cannot_run_is_not_written(config, text, tmp_path) -> None:
    module = sys.modules[type(config).__module__]
    with pytest.raises(UserError, match="hf") as caught:
        checkpoints.save_gguf(module.build(config), None, tmp_path / "x.gguf")
    assert text in str(caught.value) and not list(tmp_path.iterdir())


def test_a_window_becomes_the_context_and_that_is_said(tmp_path, capsys: pytest.CaptureFixture) -> None:
    """llama.cpp sees everything: within one window that is the same."""
    checkpoints.save_gguf(random(llama.Config(**SMALL, sliding_window=9)), None, tmp_path / "x.gguf")
    config = checkpoints.load_model(tmp_path / "x.gguf").config
    assert (config.context_length, config.sliding_window) == (9, 9)
    length = SMALL["context_length"]
    assert f"the file's context length is 9 and not {length}" in capsys.readouterr().err
    checkpoints.save_gguf(random(llama.Config(**SMALL, sliding_window=length)), None, tmp_path / "y.gguf")
    assert not capsys.readouterr().err


@given(
    factor=st.floats(1.5, 64, width=32), length=st.integers(16, 9000), low=st.floats(0.5, 2), ratio=st.floats(1.01, 9),
    head_dim=st.sampled_from([8, 16, 64, 128]),
)  # fmt: skip
@example(factor=8.0, length=777, low=1.0, ratio=4.0, head_dim=64)
@settings(max_examples=100, deadline=None)
def test_llama3_settings_are_found_from_their_divisors_alone(factor, length, low, ratio, head_dim) -> None:
    scaling = RopeScaling("llama3", factor, length, low_freq_factor=low, high_freq_factor=low * ratio)
    freqs = divisors(scaling, 500_000.0, head_dim)
    assume(1 < freqs.max() == factor and freqs.min() < factor)
    found = read_scaling({}, 500_000.0, 4096, {FREQS: freqs}, "x.gguf", llama.GGUF["llama"])
    assert found is not None and torch.allclose(divisors(found, 500_000.0, head_dim), freqs, rtol=1e-5)
    if (length, low, ratio) == (777, 1.0, 4.0):
        assert found == scaling


def test_a_full_disk_keeps_the_old_file(whole, tmp_path, monkeypatch) -> None:
    def full(*args):
        raise OSError("16384 requested and 10000 written")

    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UserError, match="disk is full"):
        checkpoints.save_gguf(random(CONFIGS["llama"]), None, path)
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1


def test_a_gguf_by_any_name_in_a_folder_of_its_own(whole, tmp_path) -> None:
    (tmp_path / "model.bin.part").write_bytes(whole)
    by_file = checkpoints.load_model(tmp_path / "model.bin.part")
    (tmp_path / "x.gguf").write_bytes(whole)
    by_folder = checkpoints.load_model(tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "model.gguf").write_bytes(whole)
    expected = checkpoints.load_model(tmp_path / "alone" / "model.gguf").state_dict()
    for model in (by_file, by_folder):
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ({"do_sample": False, "top_k": 20}, {"temp": 0.0, "top_k": 20}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.05},
            {"temp": 0.6, "top_p": 0.9, "min_p": 0.1, "penalty_repeat": 1.05},
        ),
        ({}, {}),
    ],
)
def test_how_to_generate_text_travels_too(said, fields, tokenizer, tmp_path) -> None:
    file = tmp_path / "model.gguf"
    checkpoints.save_gguf(random(CONFIGS["llama"]), tokenizer.replace(generation_config=said), file)
    written = {key: value.contents() for key, value in gguf.GGUFReader(file).fields.items() if ".sampling." in key}
    assert written == {f"general.sampling.{key}": pytest.approx(value) for key, value in fields.items()}
    assert checkpoints.load(file)[1].generation_config == said


def test_tokenizer_travels_with_the_model(tokenizer, tmp_path) -> None:
    model = random(CONFIGS["llama-grouped-tied"])
    checkpoints.save_gguf(model, tokenizer, tmp_path / "x.gguf")
    again, same = checkpoints.load(tmp_path / "x.gguf")
    text = "The capital of Japan is 東京 🙂\n\n  x"
    assert same.encode(text) == tokenizer.encode(text) and same.decode(same.encode(text)) == text
    assert same.vocab_size == again.config.vocab_size == 320 > tokenizer.vocab_size
    assert (same.bos_id, same.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize(
    ("to", "dtype"), [("hf", None), ("hf", "bf16"), ("gguf", None), ("gguf", "q8_0"), ("gguf", "q4_1")]
)
def test_convert(to, dtype, tokenizer, tmp_path) -> None:
    model = random(CONFIGS["qwen2"]).half()
    checkpoints.save(model, tokenizer, tmp_path / "source")
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    checkpoints.convert(tmp_path / "source", out, to, dtype)
    held = {None: torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    again = checkpoints.load_model(out, held)
    error = {None: 0, "bf16": 1e-2, "q8_0": 2e-2, "q4_1": 0.07}[dtype]
    for key, tensor in model.state_dict().items():
        assert (again.state_dict()[key].float() - tensor.float()).abs().max() <= error * tensor.float().abs().max()
    if to == "gguf" and dtype is None:
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
        assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.attn_q.bias"] == "F32"


def test_convert_says_what_it_cannot(tmp_path) -> None:
    checkpoints.save(random(CONFIGS["llama"]), None, tmp_path / "source")
    wrong = [("hf", "q8_0", "cannot hold q8_0"), ("hf", "q4_0", "cannot hold q4_0"), ("gguf", "q3", "'q3'")]
    wrong += [("hf", "q8", "Did you mean 'q8_0'"), ("gguf", "q4", "Did you mean 'q4_")]
    for to, dtype, text in wrong:
        with pytest.raises(UserError, match=text):
            checkpoints.convert(tmp_path / "source", tmp_path / "out", to, dtype)


@pytest.mark.slow
def test_smollm2_equals_transformers_reading_of_the_same_file(smollm2) -> None:
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    model, tokenizer = checkpoints.load("smollm2")
    tokens = torch.tensor([tokenizer.encode("The quick brown fox jumps over the lazy dog. 日本語のテスト")])
    with torch.no_grad():
        expected = reference(tokens).logits
        assert (model(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", quantized.FORMATS)
def test_quantised_numbers_are_those_of_the_gguf_package(kind: str, monkeypatch) -> None:
    """Any bytes, NaN and infinite scales among them, over the seam between two pieces."""
    numbers_of, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert quantized.FORMATS[kind][:2] == (numbers_of, size)
    monkeypatch.setattr(quantized, "IN_CACHE", 100 * numbers_of)
    stored = np.random.default_rng(0).integers(0, 256, (257, size), np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read_blocks(torch.from_numpy(stored), kind, numbers_of).numpy(), wanted)


def test_tokens_that_fill_the_vocabulary_are_unused_ones(tokenizer, tmp_path) -> None:
    """llama.cpp never writes a token of type 5. The tokenizer has fewer tokens than the model has embeddings."""
    checkpoints.save_gguf(random(CONFIGS["llama-grouped-tied"]), tokenizer, tmp_path / "x.gguf")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    kinds, tokens = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("token_type", "tokens"))
    size = tokenizer.vocab_size
    assert size < len(kinds) == len(tokens) == 320
    assert {*kinds[size:]} == {int(gguf.TokenType.UNUSED)} and int(gguf.TokenType.UNUSED) not in kinds[:size]
    assert tokens[size:] == [f"[unused {n}]" for n in range(size, 320)]
