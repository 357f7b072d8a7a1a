"""llama.cpp loads the GGUF files that keifu writes and picks the same tokens; without llama-cpp-python, left out."""

import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gguf_toys import CONFIGS

from keifu import checkpoints
from keifu.checkpoints.gguf.config import ARCHITECTURES, architecture_for
from keifu.data.tokenizers.chat_template import CHATML
from keifu.layers.attention.positions import RopeScaling
from keifu.layers.feedforward import FeedForward, GatedFeedForward
from keifu.models.mixture import gpt_oss

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def random(config) -> torch.nn.Module:
    module = sys.modules[type(config).__module__]
    model = module.build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.15
        for buffer in model.buffers():  # the corrections of DeepSeek-V3's routers
            buffer += torch.randn_like(buffer) * 0.1
    return model


def greedy(model, tokens: list[int], count: int) -> list[int]:
    state, new = model.new_state(1, len(tokens) + count), tokens
    for _ in range(count):
        new = [int(model(torch.tensor([new]), state)[0, -1].argmax())]
        tokens = tokens + new
    return tokens


def run(path, tokens: list[int], count: int):
    """Return llama.cpp's logits [tokens, vocab] for a prompt, and the prompt continued greedily."""
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # keys and values are not rounded
    alone = {"n_threads": 1, "n_threads_batch": 1}  # several threads wait for each other on a busy machine
    engine = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, **alone, **exact)
    engine.eval(tokens)
    logits = torch.from_numpy(engine.scores[: len(tokens)].copy())
    for _ in range(count):
        tokens = [*tokens, int(engine.scores[len(tokens) - 1].argmax())]
        engine.eval(tokens[-1:])
    return engine, logits, tokens


def with_tabulated_gelu(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with llama.cpp's GELU: a table with an entry for each number of float16."""
    rounded = deepcopy(model)

    def gelu(x: torch.Tensor) -> torch.Tensor:
        table = F.gelu(x.half().float(), approximate="tanh").half().float()
        return table.where(x > -10, 0.0).where(x < 10, x)

    for module in rounded.modules():
        if isinstance(module, FeedForward | GatedFeedForward):
            module.activation = gelu
    return rounded


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
    tolerance = 1e-4
    if vars(model.config).get("activation") == "gelu_tanh":
        assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()
        expected = with_tabulated_gelu(model)(torch.tensor([tokens]))[0]
        tolerance = 3e-4  # an input between two entries may take either
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert continued == greedy(model, tokens, 24)


@torch.no_grad()
def test_yarn_of_gpt_oss_differs_only_in_rounded_bounds(tokenizer, tmp_path, capsys) -> None:
    """llama.cpp rounds the bounds of every yarn, which gpt-oss does not: the notice says so."""
    yarn = RopeScaling("yarn", 4.0, 16, truncate=False)
    model = random(replace(CONFIGS["gpt-oss"], rope_scaling=yarn, rope_theta=1e4))
    checkpoints.save_gguf(model, tokenizer, tmp_path / "x.gguf")
    assert "llama.cpp rounds the bounds of this model's yarn" in capsys.readouterr().err
    assert checkpoints.load_model(tmp_path / "x.gguf").config == model.config
    tokens = tokenizer.encode("The capital of Japan is 東京")
    _, logits, _ = run(tmp_path / "x.gguf", tokens, 0)
    rounded = gpt_oss.build(replace(model.config, rope_scaling=replace(yarn, truncate=True))).eval()
    rounded.load_state_dict(model.state_dict())
    exact, expected = (one(torch.tensor([tokens]))[0] for one in (model, rounded))
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max() < (exact - expected).abs().max()


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
@torch.no_grad()
def test_other_number_formats(dtype, tokenizer, tmp_path) -> None:
    model = random(CONFIGS["llama"])
    checkpoints.save_gguf(model, tokenizer, tmp_path / "x.gguf", dtype)
    rounded = checkpoints.load_model(tmp_path / "x.gguf", torch.float32)
    tokens = tokenizer.encode("def f(x):\n    return x")
    _, logits, _ = run(tmp_path / "x.gguf", tokens, 0)
    expected = rounded(torch.tensor([tokens]))[0]
    # llama.cpp rounds what it multiplies, too: to 8 bits with a packed format
    assert (logits - expected).abs().max() <= (5e-2 if dtype.startswith("q") else 3e-2) * expected.abs().max()


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
