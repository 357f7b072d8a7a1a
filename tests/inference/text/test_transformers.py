"""Greedy texts beside transformers' generate() on the same random weights, alone and left padded."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from quick import quick

from keifu import checkpoints
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams

LLAMA = {
    "vocab_size": 261,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 90,
}
CONFIGS: dict[str, Any] = {
    "gpt2": hf.GPT2Config(vocab_size=261, n_positions=90, n_embd=24, n_layer=3, n_head=4),
    "llama": hf.LlamaConfig(**LLAMA),
    "mistral": hf.MistralConfig(**LLAMA, sliding_window=7),
}


@pytest.mark.parametrize(("kind", "penalty"), quick(product(CONFIGS, [1.0, 1.3])))
def test_greedy_tokens_equal(kind: str, penalty: float, tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = hf.AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(12) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    ours = checkpoints.load_model(tmp_path)
    prompts = [torch.randint(5, 261, (n,)).tolist() for n in (31, 2, 13)]
    bare = Tokenizer(tokenizer.backend, {})  # without tokens that end a text
    found = generate_batch(
        ours, bare, prompts, SamplingParams(temperature=0, max_tokens=40, repetition_penalty=penalty)
    )
    for prompt, completion in zip(prompts, found, strict=True):
        settings = {"repetition_penalty": penalty, "eos_token_id": None, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, **settings
        )
        assert completion.tokens == expected[0, len(prompt) :].tolist()
