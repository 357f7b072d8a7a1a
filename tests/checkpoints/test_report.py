"""The load report says what loading does, and reads no weight for it."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.checkpoints.loading import open_source

SIZES = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 42, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def test_everything_that_is_done_is_said(published, tmp_path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16}
    config = transformers.MistralConfig(**SIZES, sliding_window=7, rms_norm_eps=1e-5, rope_parameters=rope)
    published(config).half().save_pretrained(tmp_path)
    report = checkpoints.inspect(tmp_path)
    rows = {row.ours: row for row in report.rows}
    joined = rows["blocks.1.attention.qkv.weight"]
    assert joined.theirs == tuple(f"model.layers.1.self_attn.{one}_proj.weight" for one in "qkv")
    assert (joined.shape, joined.stored, joined.dtype) == ((48, 24), "F16", "float32")
    assert joined.done == "joined, cast to float32"
    assert report.parameters == sum(parameter.numel() for parameter in published(config).parameters())
    assert report.family == "mistral" and report.settings["sliding_window"] == 7 and report.settings["norm_eps"] == 1e-5
    assert report.settings["rope_theta"] == 5e5 and report.settings["rope_scaling"].kind == "yarn"
    assert any("float16" in note and "slow" in note for note in report.notes)
    text = str(report)
    for said in ("yarn", "sliding_window", "silu", "context_length", "model.layers.1.mlp.gate_proj.weight", "cast"):
        assert said in text
    assert json.loads(json.dumps(report.as_dict()))["rows"][0]["ours"] == "embedding.weight"


def test_transposed_and_left_out(published, tmp_path) -> None:
    published(transformers.GPT2Config(vocab_size=97, n_embd=20, n_layer=2, n_head=5)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    report = checkpoints.inspect(tmp_path)
    assert {row.done for row in report.rows if row.theirs[0].endswith("c_attn.weight")} == {"transposed"}
    assert list(report.skipped) == ["transformer.h.0.attn.masked_bias"] and "masked_bias" in str(report)
    assert any("The head is the embedding" in note for note in report.notes)


def test_gguf(tmp_path, published) -> None:
    published(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "hf")
    checkpoints.save_gguf(checkpoints.load_model(tmp_path / "hf"), None, tmp_path / "x.gguf", "bf16")
    report = checkpoints.inspect(tmp_path / "x.gguf")
    rows = {row.ours: row for row in report.rows}
    assert rows["blocks.0.attention.qkv.weight"].done == "joined, rotary pairs moved to halves, cast to float32"
    assert rows["norm.weight"].done == "" and report.format == "GGUF"


def test_no_weight_is_read(published, tmp_path, monkeypatch) -> None:
    published(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    import safetensors

    class Closed:
        def __init__(self, *args):
            self.inner = safetensors_open(*args)

        def keys(self):
            return self.inner.keys()

        def get_slice(self, name):
            return self.inner.get_slice(name)

    safetensors_open = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Closed)
    assert len(checkpoints.inspect(tmp_path).rows) == len(open_source(tmp_path).stored) - 3 * 2  # q, k, v; gate, up
