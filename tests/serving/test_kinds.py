"""Qwen3, Gemma 3 and LLaMA, as directories and as GGUF files, plain, quantised and packed: the service's texts are the
library's, alone and side by side.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from quick import quick
from serving_toys import running, sharp

import keifu
from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.inference.text.likelihood import score_likeliest
from keifu.inference.text.request import prompt_tokens
from keifu.models import gemma3, llama, qwen3
from keifu.serving.app import Access
from keifu.serving.worker import Limits

SIZE: dict[str, Any] = {"vocab_size": 272, "context_length": 256, "dim": 64, "hidden_dim": 96, "n_layers": 3}
HEADS: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 32}
KINDS = {
    "llama": lambda: llama.build(llama.Config(**SIZE, **HEADS)),
    "qwen3": lambda: qwen3.build(qwen3.Config(**SIZE, **HEADS)),
    "gemma3": lambda: gemma3.build(gemma3.Config(**SIZE, **HEADS, sliding_window=9)),
}
PROMPTS = ("a", "The sea is wide, and a small boat sails to an old town of stars.", "x" * 90)


@pytest.fixture(scope="module", params=[None, "int8"])
def kinds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a server over each kind as a directory and as a GGUF file of 8 bits, with plain or packed weights."""
    place = tmp_path_factory.mktemp("kinds")
    trained = train_tokenizer("bpe", [PROMPTS[1]] * 2, 272, special_tokens=["<|im_start|>", "<|im_end|>"])
    ends: Any = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = Tokenizer(trained.backend, ends).with_chat_template(CHATML)
    names = []
    for seed, (kind, build) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        model = sharp(build())
        keifu.save(model, tokenizer, place / kind)
        keifu.checkpoints.save_gguf(model, tokenizer, place / f"{kind}.gguf", "q8_0")
        names += [str(place / kind), str(place / f"{kind}.gguf")]
    with running(names, Limits(slots=2), Access(), weights=request.param) as found:
        yield found.openai, place, request.param


@pytest.mark.parametrize(("file", "kind"), quick(product(["{}", "{}.gguf"], KINDS)))
def test_the_texts_are_the_librarys(kinds: Any, kind: str, file: str) -> None:
    client, place, weights = kinds
    name = str(place / file.format(kind))
    model, tokenizer = keifu.load(name, weights=weights or "own")
    ask: dict[str, Any] = {"max_tokens": 24, "seed": 3, "temperature": 0.7}

    def asked(prompt: str) -> str:
        return client.completions.create(model=name, prompt=prompt, **ask).choices[0].text

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(asked, PROMPTS))
    assert found == [keifu.generate(model, tokenizer, prompt, raw=True, **ask) for prompt in PROMPTS]
    messages = [{"role": "user", "content": PROMPTS[1]}]
    answer = client.chat.completions.create(model=name, messages=messages, max_tokens=8, seed=1)
    assert answer.usage.completion_tokens <= 8 and answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("file", ["{}", "{}.gguf"])
def test_a_prompt_is_scored_as_the_library_scores_it(kinds: Any, file: str) -> None:
    client, place, weights = kinds
    name = str(place / file.format("llama"))
    model, tokenizer = keifu.load(name, weights=weights or "own")
    ids = torch.tensor(prompt_tokens(tokenizer, PROMPTS[1]))
    answer = client.completions.create(model=name, prompt=PROMPTS[1], max_tokens=1, echo=True, logprobs=1)
    found = answer.choices[0].logprobs.token_logprobs[1 : len(ids)]
    assert found == pytest.approx(score_likeliest(model, ids, 1).values, abs=1e-5)
