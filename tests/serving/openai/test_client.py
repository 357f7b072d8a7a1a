"""OpenAI's own client against the service: its answers are those of the library, whole, streamed and side by side."""

import asyncio
import re
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel

import keifu
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.likelihood import score
from keifu.inference.text.sampling_params import SamplingParams, sampling_for

HELLO = [{"role": "user", "content": "Hello, 世界"}]


def expected(name: str, messages: list[dict[str, str]], **sampling: Any) -> Any:
    """Return the result of the library without the server, with the model's settings if none are given."""
    model, tokenizer = keifu.load(name)
    return generate_batch(model, tokenizer, [tokenizer.render_chat(messages)], sampling_for(tokenizer, sampling))[0]


def test_an_answer_is_the_librarys_with_exact_usage(served: Any, chat: str) -> None:
    found = served.openai.chat.completions.create(model=chat, messages=HELLO, max_tokens=20, temperature=0.9, seed=7)
    alone = expected(chat, HELLO, max_tokens=20, temperature=0.9, seed=7)
    assert found.choices[0].message.content == alone.text
    assert found.choices[0].finish_reason == alone.finish_reason
    assert found.usage.prompt_tokens == alone.prompt_tokens
    assert found.usage.completion_tokens == len(alone.tokens)
    assert found.usage.total_tokens == alone.prompt_tokens + len(alone.tokens)
    assert found.seed == 7


def test_a_stream_says_the_same_and_no_half_character(served: Any, chat: str) -> None:
    settings: dict[str, Any] = {"model": chat, "messages": HELLO, "max_tokens": 40, "temperature": 1.5, "seed": 3}
    whole = served.openai.chat.completions.create(**settings)
    usage = {"include_usage": True}
    chunks = list(served.openai.chat.completions.create(**settings, stream=True, stream_options=usage))
    *body, last = chunks
    assert body[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in body][-1] == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in body)


def test_requests_side_by_side_get_what_each_gets_alone(served: Any, chat: str) -> None:
    def settings(n: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": "word " * n}]
        return {"model": chat, "messages": messages, "max_tokens": 5 + n, "seed": n, "temperature": n % 3}

    async def all_of_them() -> list[Any]:
        async with served.openai_async as client:
            return await asyncio.gather(*(client.chat.completions.create(**settings(n)) for n in range(8)))

    for n, found in enumerate(asyncio.run(all_of_them())):
        own = settings(n)
        alone = expected(chat, own["messages"], max_tokens=5 + n, seed=n, temperature=n % 3)
        assert found.choices[0].message.content == alone.text


def test_an_async_stream(served: Any, chat: str) -> None:
    async def collect() -> str:
        async with served.openai_async as client:
            stream = await client.chat.completions.create(
                model=chat, messages=HELLO, max_tokens=9, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(collect()) == expected(chat, HELLO, max_tokens=9, temperature=0).text


def test_each_of_n_choices_has_its_own_seed(served: Any, chat: str) -> None:
    found = served.openai.chat.completions.create(model=chat, messages=HELLO, max_tokens=12, temperature=1, seed=5, n=3)
    texts = [choice.message.content for choice in found.choices]
    assert texts == [expected(chat, HELLO, max_tokens=12, temperature=1.0, seed=5 + n).text for n in range(3)]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.usage.prompt_tokens == expected(chat, HELLO, max_tokens=1).prompt_tokens
    chunks = list(
        served.openai.chat.completions.create(
            model=chat, messages=HELLO, max_tokens=12, temperature=1, seed=5, n=3, stream=True
        )
    )
    pieces = [(chunk.choices[0].index, chunk.choices[0].delta.content or "") for chunk in chunks]
    assert texts == ["".join(text for index, text in pieces if index == n) for n in range(3)]


def test_a_stop_string_ends_the_text(served: Any, base: str) -> None:
    ask: dict[str, Any] = {"model": base, "prompt": "abc", "max_tokens": 40, "temperature": 1, "seed": 2}
    text = served.openai.completions.create(**ask).choices[0].text
    stop = text[3:5]
    found = served.openai.completions.create(**ask, stop=[stop, "never there"]).choices[0]
    assert found.text == text[: text.index(stop)] and found.finish_reason == "stop"


def test_probabilities_are_those_of_the_model(served: Any, chat: str) -> None:
    ask: dict[str, Any] = {"model": chat, "messages": HELLO, "max_tokens": 6, "temperature": 0}
    found = served.openai.chat.completions.create(**ask, logprobs=True, top_logprobs=3).choices[0]
    alone = expected(chat, HELLO, max_tokens=6, temperature=0, log_probabilities=True, top_log_probabilities=3)
    content = found.logprobs.content
    assert [token.logprob for token in content] == pytest.approx(alone.log_probabilities, abs=1e-5)
    assert (
        b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace").startswith(found.message.content)
    )
    for token in content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob
    chunks = served.openai.chat.completions.create(**ask, logprobs=True, top_logprobs=3, stream=True)
    streamed = [token for chunk in chunks if (given := chunk.choices[0].logprobs) for token in given.content]
    assert streamed == content


def test_a_bias_forbids_or_forces_a_token(served: Any, base: str) -> None:
    found = served.openai.completions.create(model=base, prompt="x", max_tokens=4, temperature=0, logit_bias={97: 1e5})
    token = keifu.load(base)[1].decode([97])
    assert found.choices[0].text == token * 4


def test_echoed_prompts_have_the_scores_of_the_library(served: Any, base: str) -> None:
    model, tokenizer = keifu.load(base)
    prompts = [tokenizer.encode("The sun rises", special=True), tokenizer.encode("in the east.", special=True)]
    found = served.openai.completions.create(model=base, prompt=prompts, max_tokens=1, logprobs=1, echo=True)
    for prompt, choice in zip(prompts, found.choices, strict=True):
        values = choice.logprobs.token_logprobs
        assert values[0] is None and len(values) == len(prompt) + 1
        assert values[1:-1] == pytest.approx(score(model, torch.tensor([prompt]))[0].tolist(), abs=1e-5)
        assert choice.text.startswith(tokenizer.decode(prompt))
        assert "".join(choice.logprobs.tokens[: len(prompt)]) == tokenizer.decode(prompt, skip_special=False)


def test_parts_of_characters_have_names_of_their_own(served: Any, base: str) -> None:
    ask: dict[str, Any] = {"model": base, "prompt": "\u0416\u04e9", "max_tokens": 12, "echo": True, "logprobs": 5}
    found = served.openai.completions.create(**ask, temperature=0).choices[0].logprobs
    assert found.tokens[:4] == ["bytes:\\xd0", "bytes:\\x96", "bytes:\\xd3", "bytes:\\xa9"]
    assert all(len(top) in (5, 6) for top in found.top_logprobs[1:])
    assert any(sum(name.startswith("bytes:") for name in top) > 1 for top in found.top_logprobs[1:])


def test_a_token_that_is_none_of_the_likeliest_stands_beside_them(served: Any, base: str) -> None:
    ask: dict[str, Any] = {"model": base, "prompt": "xyz", "max_tokens": 8, "echo": True, "logprobs": 2}
    found = served.openai.completions.create(**ask, temperature=0, logit_bias={97: 1e5}).choices[0].logprobs
    assert found.top_logprobs[0] is None
    rows = list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]
    assert all(top[token] == value and len(top) <= 3 for token, value, top in rows)
    assert any(len(top) == 3 for *_, top in rows)


def test_several_prompts_are_answered_in_order(served: Any, base: str) -> None:
    model, tokenizer = keifu.load(base)
    prompts = ["one", "two", "three"]
    found = served.openai.completions.create(model=base, prompt=prompts, max_tokens=7, temperature=0)
    alone = generate_batch(model, tokenizer, prompts, SamplingParams(max_tokens=7, temperature=0))
    assert [choice.text for choice in found.choices] == [each.text for each in alone]
    chunks = served.openai.completions.create(model=base, prompt=prompts, max_tokens=7, temperature=0, stream=True)
    pieces = [(chunk.choices[0].index, chunk.choices[0].text) for chunk in chunks]
    assert ["".join(text for index, text in pieces if index == n) for n in range(3)] == [e.text for e in alone]


def test_the_models_are_listed_with_what_they_are_for(served: Any, chat: str, base: str) -> None:
    listed = {model.id: model.uses for model in served.openai.models.list()}
    assert listed["chat"] == ["chat", "completion", "inspection"] and listed["base"] == ["completion", "inspection"]
    assert served.openai.models.retrieve(base).id == "base"


def test_roles_and_parts_go_through_the_template(served: Any, chat: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    ask: dict[str, Any] = {"model": chat, "max_completion_tokens": 8, "temperature": 0}
    found = served.openai.chat.completions.create(messages=given, **ask)
    assert found.choices[0].message.content == expected(chat, plain, max_tokens=8, temperature=0).text


def test_the_second_turn_of_a_chat_finds_the_first_in_the_cache(served: Any, chat: str) -> None:
    asked = [{"role": "user", "content": "A long question, " * 12}]
    ask: dict[str, Any] = {"model": chat, "max_tokens": 20, "temperature": 0}
    first = served.openai.chat.completions.create(messages=asked, **ask)
    asked += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "And?"}]
    second = served.openai.chat.completions.create(messages=asked, **ask)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 16 <= cached < second.usage.prompt_tokens
    assert second.choices[0].message.content == expected(chat, asked, max_tokens=20, temperature=0).text
    text = httpx.get(f"{served.url}/metrics").text
    (counted,) = re.findall(r'keifu_cached_tokens_total{model="chat"} (\S+)', text)
    (used,) = re.findall(r'keifu_cache_used_ratio{model="chat"} (\S+)', text)
    assert float(counted) >= cached and 0 <= float(used) <= 1


def test_what_is_wrong_is_raised_by_name(served: Any, chat: str, base: str) -> None:
    with pytest.raises(openai.NotFoundError, match=r"no model .*Did you mean"):
        served.openai.chat.completions.create(model="chta", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="is for /v1/completions") as error:
        served.openai.chat.completions.create(model=base, messages=HELLO)
    assert error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="top_p must be a number above 0.*not 2.0") as error:
        served.openai.chat.completions.create(model=chat, messages=HELLO, top_p=2)
    assert error.value.param == "top_p"
    with pytest.raises(openai.BadRequestError, match="has 6.. tokens, but this model's context is 512"):
        served.openai.completions.create(model=base, prompt="a" * 600)


def test_cached_tokens_of_several_choices_are_no_more_than_the_prompt(served: Any, chat: str) -> None:
    ask: dict[str, Any] = {"model": chat, "messages": HELLO * 9, "max_tokens": 2, "n": 2}
    for _ in range(2):
        usage = served.openai.chat.completions.create(**ask).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens


def test_the_sampled_token_is_among_the_likeliest(served: Any, chat: str) -> None:
    ask: dict[str, Any] = {"model": chat, "messages": HELLO, "max_tokens": 30, "temperature": 50, "seed": 1}
    content = served.openai.chat.completions.create(**ask, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert any(len(token.top_logprobs) == 2 for token in content)
    for token in content:
        assert (token.token, token.logprob) in [(each.token, each.logprob) for each in token.top_logprobs]


def test_offsets_of_tokens_are_the_sums_of_the_lengths_before_them(served: Any, base: str) -> None:
    ask: dict[str, Any] = {"model": base, "prompt": "abc def", "max_tokens": 12, "temperature": 0, "logprobs": 0}
    found = served.openai.completions.create(**ask, echo=True).choices[0]
    assert found.text.startswith("abc def")
    own = found.logprobs
    assert own.text_offset[:7] == [*range(7)]  # a token is a byte
    for token, start in zip(own.tokens, own.text_offset, strict=True):
        if not token.startswith("bytes:") and token.isprintable():
            assert found.text[start : start + len(token)] == token


def test_the_answer_continues_a_last_message_of_the_assistant(served: Any, chat: str) -> None:
    model, tokenizer = keifu.load(chat)
    turns = [*HELLO, {"role": "assistant", "content": "The colours are"}]
    prompt = tokenizer.render_chat(HELLO) + tokenizer.encode("The colours are")
    settings = sampling_for(tokenizer, {"max_tokens": 12, "temperature": 0})
    alone = generate_batch(model, tokenizer, [prompt], settings)[0]
    ask: dict[str, Any] = {"model": chat, "max_tokens": 12, "temperature": 0}
    found = served.openai.chat.completions.create(messages=turns, **ask)
    assert found.choices[0].message.content == alone.text and found.usage.prompt_tokens == len(prompt)
    assert found.choices[0].message.content != expected(chat, HELLO, max_tokens=12, temperature=0).text
    kept = {"model": chat, "input": turns, "max_output_tokens": 12, "temperature": 0}
    first = served.openai.responses.create(**kept)
    assert first.output_text == alone.text
    told = [*HELLO, {"role": "assistant", "content": "The colours are" + alone.text}, {"role": "user", "content": "x"}]
    second = served.openai.responses.create(model=chat, input="x", previous_response_id=first.id, max_output_tokens=1)
    assert second.usage.input_tokens == len(tokenizer.render_chat(told))


def test_a_message_that_the_client_parsed_or_streamed_can_be_sent_back(served: Any, chat: str) -> None:
    class Colour(BaseModel):
        name: Literal["red", "blue"]

    turns: list[Any] = [{"role": "user", "content": "Which colour?"}]
    ask: dict[str, Any] = {"model": chat, "messages": turns, "temperature": 0, "max_tokens": 250}
    parsed = served.openai.chat.completions.parse(**ask, response_format=Colour).choices[0].message
    tool = openai.pydantic_function_tool(Colour)
    called = served.openai.chat.completions.parse(**ask, tools=[tool], tool_choice="required").choices[0].message
    with served.openai.chat.completions.stream(**ask, response_format=Colour) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert parsed.parsed == streamed.parsed and len(called.tool_calls) == 1, "one call unless more are asked for"
    for message in (parsed, called, streamed):
        calls = message.tool_calls or []
        results = [{"role": "tool", "tool_call_id": call.id, "content": "good"} for call in calls]
        more = [*turns, message, *results, {"role": "user", "content": "Why?"}]
        assert served.openai.chat.completions.create(**ask | {"messages": more, "max_tokens": 2}).choices
    noted = {"role": "assistant", "content": "b", "reasoning": "why", "nothing": None}
    found = served.post("/v1/chat/completions", ask | {"messages": [*turns, noted, *turns]})
    assert found.status_code == 200 and found.headers["x-keifu-ignored"] == "reasoning"
    noted["nothing"] = 1
    found = served.post("/v1/chat/completions", ask | {"messages": [*turns, noted, *turns]})
    assert found.json()["error"]["param"] == "messages.1.nothing"


def test_a_prompt_is_scored_without_an_answer(served: Any, base: str) -> None:
    ask: dict[str, Any] = {"model": base, "prompt": ["abc", "xyz"], "echo": True, "logprobs": 1, "temperature": 0}
    alone = served.openai.completions.create(**ask, max_tokens=0)
    longer = served.openai.completions.create(**ask, max_tokens=1)
    for choice, other in zip(alone.choices, longer.choices, strict=True):
        assert choice.text in ("abc", "xyz") and choice.finish_reason == "length"
        assert choice.logprobs.token_logprobs == other.logprobs.token_logprobs[:3]
    assert alone.usage.completion_tokens == 0
    chunks = [*served.openai.completions.create(**ask, max_tokens=0, stream=True)]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == ["length", "length"]
    with pytest.raises(openai.BadRequestError, match="max_tokens must be a whole number from 1"):
        served.openai.completions.create(model=base, prompt="abc", max_tokens=0)
