"""llama.cpp loads the GGUF files that keifu writes and picks the same tokens; without llama-cpp-python, left out."""

import sys

import pytest
import torch

from keifu import checkpoints
from keifu.checkpoints.gguf.config import ARCHITECTURES, architecture_for
from keifu.data.tokenizers.chat_template import CHATML
from keifu.layers.attention.positions import RopeScaling
from keifu.models import gemma3, gpt2, llama, olmo2, qwen3
from keifu.models.mixture import mixtral, olmoe, qwen3_moe
from keifu.models.variants import gemma2, granite, smollm3

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

SMALL = {"vocab_size": 320, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4, "context_length": 128}
SCALINGS = {
    "linear": RopeScaling("linear", 2.5, 128),
    "yarn": RopeScaling("yarn", 4.0, 16, attention_factor=1.1),
    "llama3": RopeScaling("llama3", 8.0, 24),
}
CONFIGS = {
    "gpt2": gpt2.Config(**SMALL, dropout=0.0),
    "gpt2-untied": gpt2.Config(**SMALL, dropout=0.0, tied=False),
    "llama": llama.Config(**SMALL, n_kv_heads=2, norm_eps=1e-5),
    "llama-tied-multi-query": llama.Config(**SMALL, n_kv_heads=1, tied=True, rope_theta=1e5),
    "llama-biased": llama.Config(**SMALL, n_kv_heads=2, qkv_bias=True, out_bias=True, feedforward_bias=True),
    "llama-wide-heads": llama.Config(**SMALL, n_kv_heads=2, head_dim=32),
    "qwen2": llama.Config(**SMALL, n_kv_heads=2, qkv_bias=True, tied=True),
    "qwen3": qwen3.Config(**SMALL, n_kv_heads=2, head_dim=32),
    "qwen3-tied": qwen3.Config(**SMALL, n_kv_heads=1, head_dim=16, tied=True, rope_theta=1e4),
    "olmo2": olmo2.Config(**SMALL, n_kv_heads=2),
    "gemma3": gemma3.Config(**SMALL | {"n_layers": 7}, n_kv_heads=2, head_dim=32, sliding_window=8),
    "gemma3-scaled-untied": gemma3.Config(
        **SMALL | {"n_layers": 6},
        head_dim=16,
        sliding_window=5,
        rope_scaling=RopeScaling("linear", 8.0, 128),
        tied=False,
    ),
    "mixtral": mixtral.Config(**SMALL, n_kv_heads=2),
    "mixtral-tied": mixtral.Config(**SMALL, n_kv_heads=1, n_experts=5, n_experts_per_token=1, tied=True),
    "qwen3moe": qwen3_moe.Config(
        **SMALL, n_kv_heads=2, head_dim=32, expert_dim=32, n_experts=12, n_experts_per_token=3
    ),
    "granite": granite.Config(**SMALL, n_kv_heads=2, attention_scale=0.3, logit_divisor=3.0, residual_scale=0.4),
    "granite-biased-untied": granite.Config(
        **SMALL, n_kv_heads=4, attention_bias=True, feedforward_bias=True, tied=False, embedding_scale=3.0
    ),
    "granite-llama3": granite.Config(**SMALL, n_kv_heads=2, rope_scaling=SCALINGS["llama3"]),
    "mixtral-llama3": mixtral.Config(**SMALL, n_kv_heads=2, rope_scaling=SCALINGS["llama3"]),
    "smollm3": smollm3.Config(**SMALL | {"n_layers": 5}, n_kv_heads=2),
    "gemma2": gemma2.Config(
        **SMALL | {"n_layers": 5}, n_kv_heads=2, head_dim=32, sliding_window=8, attention_cap=5.0, logit_cap=8.0
    ),
    "olmoe": olmoe.Config(**SMALL, n_experts=9, n_experts_per_token=4),
    **{name: llama.Config(**SMALL, n_kv_heads=2, rope_scaling=scaling) for name, scaling in SCALINGS.items()},
}


def random(config) -> torch.nn.Module:
    module = sys.modules[type(config).__module__]
    model = module.build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.15
    return model


def greedy(model, tokens: list[int], count: int) -> list[int]:
    state, new = model.new_state(1, len(tokens) + count), tokens
    for _ in range(count):
        new = [int(model(torch.tensor([new]), state)[0, -1].argmax())]
        tokens = tokens + new
    return tokens


def run(path, tokens: list[int], count: int):
    """Return llama.cpp's logits [tokens, vocab] for a prompt, and the prompt continued greedily."""
    engine = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=2)
    engine.eval(tokens)
    logits = torch.from_numpy(engine.scores[: len(tokens)].copy())
    for _ in range(count):
        tokens = [*tokens, int(engine.scores[len(tokens) - 1].argmax())]
        engine.eval(tokens[-1:])
    return engine, logits, tokens


def test_every_architecture_that_is_written_is_compared_with_llama_cpp() -> None:
    assert {architecture_for(config)[0] for config in CONFIGS.values()} == {*ARCHITECTURES}


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_same_logits_and_greedy_tokens(kind, tokenizer, tmp_path) -> None:
    model = random(CONFIGS[kind])
    checkpoints.save_gguf(model, tokenizer.with_chat_template(CHATML), tmp_path / "x.gguf")
    text = "The capital of Japan is 東京 🙂 and x = 1"
    tokens = tokenizer.encode(text)
    engine, logits, continued = run(tmp_path / "x.gguf", tokens, 24)
    assert engine.tokenize(text.encode(), add_bos=False) == tokens
    assert engine.detokenize(tokens).decode() == text
    assert engine.metadata["tokenizer.chat_template"] == CHATML
    expected = model(torch.tensor([tokens]))[0]
    assert (logits - expected).abs().max() <= 2e-3 * expected.abs().max()  # llama.cpp's GELU and softmax use tables
    assert continued == greedy(model, tokens, 24)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@torch.no_grad()
def test_other_number_formats(dtype, tokenizer, tmp_path) -> None:
    model = random(CONFIGS["llama"])
    checkpoints.save_gguf(model, tokenizer, tmp_path / "x.gguf", dtype)
    rounded = checkpoints.load_model(tmp_path / "x.gguf", torch.float32)
    tokens = tokenizer.encode("def f(x):\n    return x")
    _, logits, _ = run(tmp_path / "x.gguf", tokens, 0)
    expected = rounded(torch.tensor([tokens]))[0]
    assert (logits - expected).abs().max() <= 3e-2 * expected.abs().max()  # llama.cpp rounds what it multiplies, too


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
@torch.no_grad()
def test_smollm2_written_again(dtype, smollm2, tmp_path) -> None:
    checkpoints.convert(smollm2, tmp_path / "smollm2.gguf", "gguf", dtype)
    model, tokenizer = checkpoints.load(tmp_path / "smollm2.gguf")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.render_chat(messages)
    ours = greedy(model, tokens, 8)
    assert "Paris" in tokenizer.decode(ours[len(tokens) :])
    engine, logits, _ = run(tmp_path / "smollm2.gguf", ours, 0)
    assert engine.tokenize(tokenizer.chat_text(messages).encode(), add_bos=False, special=True) == tokens
    expected = model(torch.tensor([ours]))[0]
    rounding = {"f32": 2e-3, "q8_0": 6e-2}[dtype] * expected.abs().max()  # with q8_0 llama.cpp rounds activations too
    assert (logits - expected).abs().max() <= rounding
    for place in range(len(tokens) - 1, len(ours) - 1):
        first, second = expected[place].topk(2).values
        assert first - second < rounding or int(logits[place].argmax()) == ours[place + 1]
