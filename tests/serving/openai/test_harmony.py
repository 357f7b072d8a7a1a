"""gpt-oss's channels: thoughts, calls and text of the format's published examples, whole and in pieces of any size, and
what a model may write in that format."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from serving_toys import SIZE, running, sharp

import keifu
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import llama
from keifu.serving.app import Access
from keifu.serving.openai.constraints import constraints
from keifu.serving.openai.tools import HarmonyReply, ToolUse, answer_grammar, render
from keifu.serving.tool_parsers.harmony import ENDS, MARKS, begun_message
from keifu.serving.worker import Limits

# the parts of gpt-oss's template that matter here: thoughts stay only before calls
TEMPLATE = (
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}"
    "{% if 'tool_calls' in m and m.role == 'assistant' %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}{% set c = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ c.name }}"
    "<|channel|>commentary json<|message|>{{ c.arguments | tojson }}<|call|>{% elif m.role == 'tool' %}"
    "<|start|>functions.f to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>{% else %}"
    "<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
NAMES = ("get_weather", "generate_file")
THOUGHTS = "Need to use function get_weather."
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
CITY = '{"location":"San Francisco"}'
PLAN = "**Action plan**:\n1. Generate an HTML file\n---\nWill start executing the plan step by step"
PAGE = '{"template": "basic_html", "path": "index.html"}'
EXAMPLES = {  # answer → thoughts, text, calls; the first three are examples of the format's description
    '<|channel|>analysis<|message|>User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.<|end|>'
    "<|start|>assistant<|channel|>final<|message|>2 + 2 = 4.": (
        'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.', "2 + 2 = 4.", [],
    ),
    f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant{CALL}{CITY}<|call|>": (
        THOUGHTS, "", [("get_weather", CITY)],
    ),
    f"<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary<|message|>{PLAN}<|end|><|start|>"
    f"assistant<|channel|>commentary to=functions.generate_file<|constrain|>json<|message|>{PAGE}<|call|>": (
        "x", PLAN, [("generate_file", PAGE)],
    ),
    f" to=functions.get_weather<|channel|>commentary json<|message|>{CITY}": ("", "", [("get_weather", CITY)]),
    f"<|channel|>commentary to=get_weather<|message|>{CITY}": ("", "", [("get_weather", CITY)]),
    f"{CALL}{CITY}<|call|><|start|>assistant{CALL}{{}}": ("", "", [("get_weather", CITY), ("get_weather", "{}")]),
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b": ("a\nb", "", []),
    "<|channel|>analysis to=python<|message|>1+1<|call|>": ("1+1", "", []),
    "<|channel|>commentary to=functions.unknown<|message|>{}<|call|>": ("", "{}", []),
    "No channel at all, and a < b": ("", "No channel at all, and a < b", []),
    "long " * 99: ("", "long " * 99, []),
    "cut<|end|><|start|>assis": ("", "cut", []),
    "<|channel|>final<|message|>a <| b <|mess": ("", "a <| b <|mess", []),
    "<|channel|>final<|message|>a<|channel|>analysis<|message|>b": ("b", "a", []),
    "<|channel|>analysis": ("", "", []),
    "<|message|>x<|constrain|><|message|>y": ("", "x\ny", []),
    "": ("", "", []),
}  # fmt: skip


def answered(pieces: list[str], begun: str = "") -> tuple[HarmonyReply, list[Any], str]:
    """Return the reply to these pieces, its deltas, and its thoughts as they were streamed."""
    reply, deltas, thoughts = HarmonyReply(functions=dict.fromkeys(NAMES, {}), begun=begun), [], ""
    for index, piece in enumerate(pieces):
        deltas += reply.push(piece, index + 1 == len(pieces))
        thoughts += reply.thought
    return reply, deltas, thoughts


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("answer", EXAMPLES)
def test_the_examples_of_the_format_whole_and_streamed(answer: str, step: int) -> None:
    reply, deltas, thoughts = answered([answer[at : at + step] for at in range(0, len(answer), step)] or [""])
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in reply.calls]
    assert (reply.reasoning, reply.text, calls) == EXAMPLES[answer]
    assert thoughts == reply.reasoning and "".join(delta.content for delta in deltas) == reply.text
    for index, (name, arguments) in enumerate(calls):
        parts = [delta for delta in deltas if delta.call == index]
        assert parts[0].name == name and "".join(part.arguments for part in parts) == arguments
    assert not reply.unfinished


def test_no_order_of_marks_fails_or_depends_on_the_pieces() -> None:
    draw = random.Random(0)
    words = [
        *MARKS,
        *ENDS,
        "assistant",
        "analysis",
        "final",
        "commentary",
        " to=functions.get_weather",
        "{",
        "<|",
        "é ",
    ]
    for _ in range(300):
        answer = "".join(draw.choices(words, k=draw.randint(1, 14)))
        whole, single = answered([answer])[0], answered(list(answer))[0]
        assert (whole.text, whole.reasoning) == (single.text, single.reasoning)
        assert [call["function"] for call in whole.calls] == [call["function"] for call in single.calls]


def test_a_call_without_its_end_is_unfinished() -> None:
    assert answered([CALL + '{"location": "Pa'])[0].unfinished and answered([CALL])[0].unfinished


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return bytes and the tokens of the format, and a template in channels."""
    control = [*MARKS, *ENDS]
    trained = train_tokenizer("bpe", ["ab"], 256 + len(control) + 1, special_tokens=control)
    found = Tokenizer(trained.backend, {"eos_token": "<|return|>"}, [trained.token_id("<|call|>")])
    return found.with_chat_template(TEMPLATE)


WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["東京", "x"]}},
    "required": ["city"]}}  # fmt: skip
TOKYO = f'{CALL}{{"city": "東京"}}<|call|>'
THINKS = "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("choice", "schema", "answer", "allowed"),
    [
        ("auto", None, THINKS + TOKYO, True),
        ("auto", None, THINKS + FINAL + "Hello<|return|>", True),
        ("auto", None, TOKYO.replace("東京", "Paris"), False),
        ("auto", None, "Hello<|return|>", False),
        ("required", None, THINKS + TOKYO, True),
        ("required", None, FINAL + "Hello<|return|>", False),
        ("auto", {"type": "integer"}, THINKS + FINAL + "12<|return|>", True),
        ("auto", {"type": "integer"}, FINAL + "x<|return|>", False),
        (None, {"type": "integer"}, THINKS + FINAL + "12<|return|>", True),
        (None, {"type": "integer"}, THINKS + TOKYO, False),
        (None, {"type": "integer"}, "12<|return|>", False),
    ],
)
def test_an_answer_follows_the_format_and_the_schemas(
    tokenizer: Tokenizer, choice: str | None, schema: Any, answer: str, allowed: bool
) -> None:
    tools = None if choice is None else ToolUse([WEATHER], choice)
    grammar = answer_grammar(tokenizer, tools, schema, True)
    assert grammar is not None
    constraint = constraints(grammar, tokenizer, tokenizer.vocab_size)()
    for token in tokenizer.encode(answer, allow_special=True):
        if not constraint.allowed()[token]:
            assert not allowed
            return
        constraint.accept(token)
    assert allowed


def test_thoughts_before_a_call_go_back_to_the_model_and_an_answer_is_continued(tokenizer: Tokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "x"}'}}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Where?"},
        {"role": "user", "content": "In x"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    prompt = render(tokenizer, turns, [WEATHER])
    assert isinstance(prompt, list)
    text = tokenizer.decode(prompt, skip_special=False)
    assert "analysis<|message|>hm<|end|>" in text and "to=functions.get_weather<|channel|>commentary json<|mess" in text
    assert begun_message(tokenizer, prompt) == ""
    prompt = render(tokenizer, [turns[0], {"role": "assistant", "content": "It <|end|> is"}], [])
    assert isinstance(prompt, list)
    assert tokenizer.decode(prompt, skip_special=False).endswith("assistant" + FINAL + "It <|end|> is")
    assert answered([" sunny"], FINAL + "It is")[0].text == " sunny"


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Any]:
    """Yield a server over a model with random weights and this format."""
    torch.manual_seed(1)
    place = tmp_path_factory.mktemp("speaking") / "oss"
    size: Any = SIZE | {"vocab_size": tokenizer.vocab_size}
    keifu.save(sharp(llama.build(llama.Config(**size, n_heads=4, head_dim=6, n_kv_heads=2))), tokenizer, place)
    with running([str(place)], Limits(), Access()) as found:
        yield found


def test_the_server_streams_what_it_answers_whole(speaking: Any, tokenizer: Tokenizer) -> None:
    bias = {str(tokenizer.encode(mark, allow_special=True)[0]): 30 for mark in ("<|end|>", "<|return|>", " ", "c", "a")}
    tools: Any = [{"type": "function", "function": WEATHER}]
    seen = set()
    for seed in range(4):
        ask: Any = {
            "model": "oss", "messages": [{"role": "user", "content": "Weather?"}], "tools": tools, "seed": seed,
            "tool_choice": "required" if seed % 2 else "auto", "max_tokens": 100, "logit_bias": bias,
            "temperature": 2,
        }  # fmt: skip
        choice = speaking.openai.chat.completions.create(**ask).choices[0]
        thoughts, text, arguments, reason = "", "", "", None
        for chunk in speaking.openai.chat.completions.create(**ask, stream=True):
            delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason
            thoughts += getattr(delta, "reasoning_content", None) or ""
            text += delta.content or ""
            arguments += "".join(call.function.arguments for call in delta.tool_calls or ())
        assert thoughts == (getattr(choice.message, "reasoning_content", None) or "") and reason == choice.finish_reason
        assert text == (choice.message.content or "")
        assert not any(mark in text + thoughts for mark in (*MARKS, *ENDS))
        for call in choice.message.tool_calls or ():
            assert arguments == call.function.arguments
            assert reason != "tool_calls" or json.loads(arguments)["city"] in ("東京", "x")
        seen |= {reason} | ({"thoughts"} if thoughts else set()) | ({"text"} if text else set())
    assert {"tool_calls", "thoughts"} <= seen
