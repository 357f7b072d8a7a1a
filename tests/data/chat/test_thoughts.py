"""Thoughts apart from answers: whole texts and texts in pieces, and options of chat templates."""

import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from keifu.data.chat.thoughts import ThoughtSplitter, answer_of, opens_thoughts, split_thoughts, template_options
from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

TEXTS = {  # of a text, and whether it begins inside of thoughts: both parts
    ("<think>\nSo 2.\n</think>\n\nIt is 2.", False): ("So 2.", "It is 2."),
    ("\n<think> a </thi b </think>c <think>d</think> ", False): ("a </thi b", "c <think>d</think> "),
    ("So 2.\n</think>\nIt is 2.", True): ("So 2.", "It is 2."),
    (" plain text \n", False): ("", " plain text \n"),
    ("a <think>b</think>", False): ("", "a <think>b</think>"),
    ("<think>cut off </th", False): ("cut off </th", ""),
    ("<thin", False): ("", "<thin"),
    ("<think></think>x", False): ("", "x"),
    ("", False): ("", ""),
    ("<|channel>thought\nSo </think> 2.\n<channel|>It is 2.", False): ("So </think> 2.", "It is 2."),
    ("<|channel>thought\n<channel|>It <channel|>", False): ("", "It <channel|>"),
    ("<|channel>tho", False): ("", "<|channel>tho"),
    ("So 2.\n<channel|>It is 3.", True): ("So 2.", "It is 3."),
}


@pytest.mark.parametrize(("text", "thinking"), TEXTS)
def test_a_text_is_split_once(text: str, thinking: bool) -> None:
    assert split_thoughts(text, thinking) == TEXTS[text, thinking]


@pytest.mark.parametrize(("text", "thinking"), TEXTS)
@given(sizes=lists(integers(1, 9), min_size=60, max_size=60))
def test_pieces_make_the_same_parts(text: str, thinking: bool, sizes: list[int]) -> None:
    splitter, parts = ThoughtSplitter(thinking), []
    for size in sizes:
        parts.append(splitter(text[:size]))
        text = text[size:]
    parts.append(splitter.end())
    whole = tuple("".join(each) for each in zip(*parts, strict=True))
    assert whole in TEXTS.values() and not text


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("I think 3.\n</think>\n85", "85"), ("<think>3</think>85", "85"), ("85", "85"), ("<think>3", ""),
        ("a <think>b</think>", "a <think>b</think>"),
    ],
)  # fmt: skip
def test_the_answer_of_a_completion_whose_prompt_may_have_opened_thoughts(completion: str, answer: str) -> None:
    assert answer_of(completion) == answer


def test_a_template_may_open_thoughts_and_has_the_options_that_it_reads() -> None:
    backend = train_tokenizer("bpe", ["ab"], 260, special_tokens=["<|im_start|>", "<|im_end|>"]).backend
    end = "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}"
    tokenizer = Tokenizer(backend, {"eos_token": "<|im_end|>"}, chat_template=CHATML + end)
    for thinking in (True, False):
        variables = template_options(tokenizer, {"enable_thinking": thinking})
        prompt = tokenizer.render_chat([{"role": "user", "content": "Hi"}], **variables)
        assert opens_thoughts(tokenizer, prompt) == thinking
    assigned = tokenizer.with_chat_template("{% if a is not defined %}{% set a = 1 %}{% endif %}" + CHATML)
    assert template_options(assigned, {"a": 2}) == {"a": 2}
    names = "namespace(a=raise_exception, b=strftime_now, c=range, d=eos_token) "
    tokenizer = tokenizer.with_chat_template(f"{{{{ {names} }}}}{tokenizer.chat_template}")
    refused = (
        "messages",
        "tools",
        "eos_token",
        "raise_exception",
        "strftime_now",
        "range",
        "namespace",
        "turn_opening",
    )
    for name in ("enable_think", "if", "message", *refused):
        with pytest.raises(UserError, match=f"has no option {name}"):
            template_options(tokenizer, {name: True})
