"""Gemma 4 in the service: its channel of thoughts, its calls, and a model with its layers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from serving_toys import running, sharp

import keifu
from keifu.data.chat.thoughts import thought_tokens
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models.variants import gemma4
from keifu.serving.app import Access
from keifu.serving.openai.constraints import constraints
from keifu.serving.openai.tools import ToolUse, answer_grammar, render, tool_format
from keifu.serving.worker import Limits

CONTROL = [
    "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>",
]  # fmt: skip
TEMPLATE = (  # turns of the model go on after the results of its calls
    "{% if tools or enable_thinking %}<|turn>system\n{{ '<|think|>' if enable_thinking }}"
    "{% for t in tools or [] %}<|tool>declaration:{{ t.function.name }}<tool|>{% endfor %}<turn|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|tool_response>response:{{ m.name }}{value:<|\"|>{{ m.content }}"
    "<|\"|>}<tool_response|>{% else %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.reasoning_content and m.tool_calls %}<|channel>thought\n{{ m.reasoning_content }}\n<channel|>{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<|tool_call>call:{{ c.function.name }}{{ '{' }}"
    "{% for k, v in c.function.arguments | dictsort %}{{ ',' if not loop.first }}{{ k }}:"
    "{{ '<|\"|>' + v + '<|\"|>' if v is string else v | tojson }}{% endfor %}{{ '}' }}<tool_call|>{% endfor %}"
    "{% if not m.tool_calls %}<turn|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|turn>model\n"
    "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)
WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["東京", "x"]}}, "required": ["city"]},
}
THOUGHTS, CALL = "<|channel>thought\nso\n<channel|>", '<|tool_call>call:get_weather{city:<|"|>x<|"|>}<tool_call|>'
THINKING: dict[str, Any] = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    trained = train_tokenizer("bpe", ["ab"], 257 + len(CONTROL), special_tokens=CONTROL)
    stops = [trained.token_id("<turn|>"), trained.token_id("<|tool_response>")]
    return Tokenizer(trained.backend, {"eos_token": "<|endoftext|>"}, stops).with_chat_template(TEMPLATE)


@pytest.mark.parametrize(
    ("choice", "schema", "answer", "allowed"),
    [
        ("auto", None, THOUGHTS + CALL + "<|tool_response>", True),
        ("auto", None, THOUGHTS + "Hello<turn|>", True),
        ("auto", None, "Hello<turn|>", True),
        ("auto", None, CALL.replace("x", "y"), False),
        ("auto", None, THOUGHTS.replace("thought", "other"), False),
        ("required", None, THOUGHTS + CALL, True),
        ("required", None, CALL, True),
        ("required", None, THOUGHTS + "Hello<turn|>", False),
        ("auto", {"type": "integer"}, THOUGHTS + "12<turn|>", True),
        ("auto", {"type": "integer"}, THOUGHTS + "x<turn|>", False),
    ],
)
def test_an_answer_may_think_and_follows_the_format(
    tokenizer: Tokenizer, choice: str, schema: Any, answer: str, allowed: bool
) -> None:
    grammar = answer_grammar(tokenizer, ToolUse([WEATHER], choice), schema, False)
    assert grammar is not None
    constraint = constraints(grammar, tokenizer, tokenizer.vocab_size)()
    for token in tokenizer.encode(answer, allow_special=True):
        if not constraint.allowed()[token]:
            assert not allowed
            return
        constraint.accept(token)
    assert allowed


def test_the_form_is_read_off_the_template(tokenizer: Tokenizer) -> None:
    form = tool_format(tokenizer)
    assert (form.opening, form.middle, form.closing) == ("<|tool_call>call:", "", "<tool_call|>")
    assert [*thought_tokens(tokenizer)] == ["<|channel>", "<channel|>"]
    assert not thought_tokens(tokenizer.with_chat_template("{{ messages }}"))
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "x"}'}}
    turns = [
        {"role": "user", "content": "In x"},
        {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [call]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "1", "content": "sunny"},
    ]
    prompt = render(tokenizer, turns, [WEATHER])
    assert isinstance(prompt, list)
    assert tokenizer.decode(prompt, skip_special=False).endswith(
        THOUGHTS + CALL + '<|tool_response>response:get_weather{value:<|"|>sunny<|"|>}<tool_response|>'
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Any]:
    """Yield a server over a Gemma 4 with random weights, and this template."""
    torch.manual_seed(1)
    config = gemma4.Config(
        vocab_size=tokenizer.vocab_size, context_length=1024, dim=24, hidden_dim=40, n_layers=4, n_heads=4,
        n_kv_heads=2, head_dim=6, global_head_dim=8, sliding_window=9, global_layers=(1, 3), n_shared_layers=2,
        layer_dim=5,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("served") / "gemma"
    keifu.save(sharp(gemma4.build(config)), tokenizer, place)
    with running([str(place)], Limits(), Access()) as found:
        yield found


def test_the_server_tells_thoughts_and_calls_apart(served: Any, tokenizer: Tokenizer) -> None:
    ids = {word: str(tokenizer.token_id(word)) for word in CONTROL}
    bias = {ids["<|channel>"]: 100, ids["<channel|>"]: 60, ids["<|tool_call>"]: 90}
    ask: dict[str, Any] = {
        "model": "gemma", "messages": [{"role": "user", "content": "Weather?"}], "max_tokens": 80, "seed": 3,
        "tools": [{"type": "function", "function": WEATHER}], "tool_choice": "required", "logit_bias": bias, **THINKING,
    }  # fmt: skip
    whole = served.openai.chat.completions.create(**ask)
    message = whole.choices[0].message
    assert whole.usage.completion_tokens_details.reasoning_tokens > 0
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("東京", "x")
    assert message.content in (None, "")
    plain = ask | {"tools": None, "tool_choice": None, "max_tokens": 3, "logit_bias": {ids["<|channel>"]: 100}}
    found = served.openai.chat.completions.create(**{name: value for name, value in plain.items() if value is not None})
    assert found.choices[0].message.content == "<|channel>" * 3  # no thought has begun
