"""Published clients beside OpenAI's own, unchanged: `llm` at the command line, and lm-eval's local-completions, whose
figures are those of keifu's own scorer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving_toys import WAIT

import keifu
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import sampling_for


def test_llm_at_the_command_line(served: Any, chat: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    models = [{"model_id": "toy", "model_name": chat, "api_base": f"{served.url}/v1", "api_key_name": "none"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    options = ["-o", "max_tokens", "12", "-o", "temperature", "0", "-s", "Be brief."]
    asked = [sys.executable, "-m", "llm", "-m", "toy", *options]
    model, tokenizer = keifu.load(chat)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    sampling = sampling_for(tokenizer, {"max_tokens": 12, "temperature": 0})
    expected = generate_batch(model, tokenizer, [tokenizer.render_chat(messages)], sampling)[0].text
    for stream in ([], ["--no-stream"]):
        found = subprocess.run([*asked, *stream, "Hello"], env=environment, capture_output=True, timeout=WAIT)
        assert found.stdout.decode("utf-8", "replace").rstrip("\n") == expected.rstrip("\n"), found.stderr


def test_lm_eval_has_the_figures_of_the_library(served: Any, base: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from keifu.lm_eval import KeifuLM

    own = KeifuLM(base)
    settings = {"tokenizer": base, "tokenizer_backend": "huggingface", "tokenized_requests": True, "max_length": 512}
    remote = LocalCompletionsAPI(model=base, base_url=f"{served.url}/v1/completions", batch_size=3, **settings)
    pairs = [("The capital of France is", " Paris"), ("a b", " c d"), ("日本", "東京"), ("x", " y" * 30)]
    asked = [SimpleNamespace(args=pair, task_name="") for pair in pairs]
    expected, found = own.loglikelihood(asked), remote.loglikelihood(asked)
    for (value, greedy), (same, likeliest) in zip(expected, found, strict=True):
        assert same == pytest.approx(value, abs=1e-4) and likeliest == greedy
    how = {"until": ["q"], "max_gen_toks": 8, "temperature": 0.0}
    asked = [SimpleNamespace(args=(text, dict(how)), task_name="") for text, _ in pairs]
    assert remote.generate_until(asked) == own.generate_until(asked)
