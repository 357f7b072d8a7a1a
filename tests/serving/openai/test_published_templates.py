"""Published chat templates: the form of calls that is read off each, and calls by a model with random weights in it.

KEIFU_CHAT_TEMPLATES names the folder with the templates, such as models/templates of llama.cpp's sources.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from serving_toys import SIZE, running, sharp

import keifu
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import llama
from keifu.serving.app import Access
from keifu.serving.openai.tools import Reply, render, tool_format
from keifu.serving.worker import Limits

FOLDER = os.environ.get("KEIFU_CHAT_TEMPLATES")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="KEIFU_CHAT_TEMPLATES is not set")]
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "東京"], "description": "Where"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Published(NamedTuple):
    """What is known of a template: the token that ends an answer, and what stands before and after a call's name."""

    end: str
    opening: str
    middle: str
    native: bool = True


TAGGED = '<tool_call>\n{"name": "', '", "arguments": '
TEMPLATES = {
    "Qwen-Qwen3-0.6B": Published("<|im_end|>", *TAGGED),
    "Qwen-Qwen2.5-7B-Instruct": Published("<|im_end|>", *TAGGED),
    "Qwen-QwQ-32B": Published("<|im_end|>", *TAGGED),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": Published("<|im_end|>", *TAGGED),
    "ibm-granite-granite-4.0": Published("<|end_of_text|>", *TAGGED),
    "HuggingFaceTB-SmolLM3-3B": Published("<|im_end|>", *TAGGED, native=False),  # it writes no turn of calls itself
    "meta-llama-Llama-3.1-8B-Instruct": Published("<|eot_id|>", '{"name": "', '", "parameters": '),
    "meta-llama-Llama-3.2-3B-Instruct": Published("<|eot_id|>", '{"name": "', '", "parameters": '),
    "mistralai-Mistral-Nemo-Instruct-2407": Published("</s>", '[TOOL_CALLS][{"name": "', '", "arguments": '),
    "unsloth-mistral-Devstral-Small-2507": Published("</s>", "[TOOL_CALLS]", "[ARGS]"),
    "NVIDIA-Nemotron-Nano-v2": Published("<SPECIAL_12>", '<TOOLCALL>[{"name": "', '", "arguments": '),
}
CONTROL = ("[TOOL_CALLS]", "[ARGS]", *sorted({each.end for each in TEMPLATES.values()}))


def tokenizer_of(name: str) -> Tokenizer:
    """Return bytes, the tokens that end answers, and the published template."""
    trained = train_tokenizer("bpe", ["ab"], 257 + len(CONTROL), special_tokens=list(CONTROL))
    found = Tokenizer(trained.backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    template = (Path(FOLDER or "") / f"{name}.jinja").read_text(encoding="utf-8")
    return found.with_chat_template(template).replace(stop_ids=[found.token_id(TEMPLATES[name].end)])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_is_read_off_the_template(name: str) -> None:
    form, known = tool_format(tokenizer_of(name)), TEMPLATES[name]
    assert (form.opening.strip(), form.middle, form.native) == known[1:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_writes_is_parsed(name: str) -> None:
    """Its own turn of a call comes back from the parser as it was put in, and the functions stand in the prompt."""
    tokenizer = tokenizer_of(name)
    form = tool_format(tokenizer)
    arguments = {"city": 'a "b\\" } 東京', "deep": {"list": [1, {"x": None}]}}
    call = {
        "id": "000000000",
        "type": "function",
        "function": {"name": TOOL["name"], "arguments": json.dumps(arguments)},
    }
    asked = [{"role": "user", "content": "x"}]
    turns = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "000000000", "name": TOOL["name"], "content": "sun"})
    prompt = tokenizer.decode(render(tokenizer, asked, [TOOL]), skip_special=False)
    whole = tokenizer.decode(render(tokenizer, turns, [TOOL]), skip_special=False)
    assert "The weather of a city" in prompt and "sun" in whole
    reply = Reply(form, form.trigger(tokenizer))
    reply.push(whole[whole.rindex(form.opening) :].split(TEMPLATES[name].end)[0], last=True)
    (found,) = reply.calls
    assert found["function"]["name"] == TOOL["name"] and json.loads(found["function"]["arguments"]) == arguments


def test_a_model_of_each_template_calls_through_the_service(tmp_path: Path) -> None:
    """Required, streamed, and with the result given back."""
    torch.manual_seed(3)
    size: dict[str, Any] = SIZE | {"vocab_size": 257 + len(CONTROL), "context_length": 8192}
    model = sharp(llama.build(llama.Config(**size, n_heads=4, head_dim=6, n_kv_heads=2)))
    for name in TEMPLATES:
        keifu.save(model, tokenizer_of(name), tmp_path / name)
    with running([str(tmp_path / name) for name in TEMPLATES], Limits(), Access()) as served:
        for name in TEMPLATES:
            ask: Any = {"model": str(tmp_path / name), "tools": [{"type": "function", "function": TOOL}]}
            ask |= {"temperature": 1, "seed": 2, "max_tokens": 200, "parallel_tool_calls": False}
            history: Any = [{"role": "user", "content": "The weather?"}]
            create = served.openai.chat.completions.create
            turn = create(messages=history, tool_choice="required", **ask).choices[0]
            (call,) = turn.message.tool_calls
            assert turn.finish_reason == "tool_calls" and call.function.name == TOOL["name"], name
            assert json.loads(call.function.arguments)["city"] in ("Paris", "東京"), name
            chunks = create(messages=history, tool_choice="required", stream=True, **ask)
            deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
            assert "".join(each.function.arguments for each in deltas) == call.function.arguments, name
            history += [turn.message.model_dump(exclude_none=True)]
            history += [{"role": "tool", "tool_call_id": call.id, "name": TOOL["name"], "content": "sun"}]
            ask["max_tokens"] = 4
            assert create(messages=history, **ask).choices[0].finish_reason in ("stop", "length", "tool_calls"), name
