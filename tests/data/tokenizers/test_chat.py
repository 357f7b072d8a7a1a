"""Chat templates: rendered as transformers renders them, and out of reach for the text of messages."""

import re
from datetime import datetime
from itertools import groupby, product

import pytest
from hypothesis import given, settings, strategies as st
from quick import quick
from transformers import AutoTokenizer

from keifu.data.tokenizers.chat_template import CHATML, render
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

# Templates of the published kinds, written for these tests.
LLAMA_2 = """\
{%- set start = 0 -%}
{%- if messages[0].role == 'system' -%}
  {%- set start = 1 -%}
  {%- set opening = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}
{%- endif -%}
{%- for message in messages[start:] -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('user and assistant must take turns') -}}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {%- set words = (opening if loop.first and opening else '') ~ message.content.strip() -%}
    {{- bos_token ~ '[INST] ' ~ words ~ ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ message.content.strip() ~ ' ' ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
LLAMA_3 = """\
{{- bos_token -}}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]\
{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% else %}\
{{ raise_exception('only user and assistant are known, not ' + message['role']) }}{% endif %}{% endfor %}
"""


@pytest.fixture(scope="session")
def chats(smollm2, corpus, tmp_path_factory) -> dict[str, tuple[Tokenizer, object]]:
    """Return each kind of template on a tokenizer of its kind, and the same as transformers reads it from disk."""
    sentencepiece = load_tokenizer("sentencepiece-32k")
    headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    bpe = train_tokenizer("bpe", corpus, 600, special_tokens=headers).backend
    unigram = train_tokenizer("unigram", corpus, 800, special_tokens=["<|im_start|>", "<|im_end|>"])
    ours = {
        "chatml": smollm2,
        "llama-2": sentencepiece.with_chat_template(LLAMA_2),
        "mistral": sentencepiece.with_chat_template(MISTRAL),
        "llama-3": Tokenizer(bpe, {"bos_token": headers[0], "eos_token": headers[3]}, (), LLAMA_3),
        "plain": unigram.with_chat_template(CHATML),
    }
    found = {}
    for name, tokenizer in ours.items():
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save(folder)
        found[name] = tokenizer, AutoTokenizer.from_pretrained(folder)
    return found


NAMES = ["chatml", "llama-2", "mistral", "llama-3", "plain"]


def conversation(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


@pytest.mark.parametrize(("name", "prompt"), quick(product(NAMES, [True, False])))
def test_ids_are_those_of_transformers(name, prompt, chats, texts) -> None:
    ours, reference = chats[name]
    for first, second in zip(texts, texts[::-1], strict=True):
        talk = conversation(first, second, "And then?")
        systems = [[]] if name == "mistral" else [[], [{"role": "system", "content": "Be brief. 短く。"}]]
        for system in systems:
            given = [*system, *talk]
            assert ours.chat_text(given, prompt) == reference.apply_chat_template(
                given, tokenize=False, add_generation_prompt=prompt
            )
            ids = reference.apply_chat_template(given, add_generation_prompt=prompt, return_dict=False)
            assert ours.render_chat(given, prompt) == ids
            assert ids.count(ours.bos_id) <= 2 * len(given), "and one BOS where the template writes one"
    assert name != "llama-3" or ours.render_chat(talk).count(ours.bos_id) == 1


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_messages_cannot_write_control_tokens(name, chats, data) -> None:
    ours, _ = chats[name]
    control = sorted(ours._shield.names)
    part = st.one_of(
        st.sampled_from([*control, *(token[:3] for token in control), " ", "user"]), st.text("a b<|>\n", max_size=3)
    )
    words = st.lists(part, min_size=1, max_size=6).map("".join)
    evil, plain = conversation(data.draw(words), data.draw(words), data.draw(words)), conversation("x", "x", "x")
    special = [number for number in ours.render_chat(evil) if number in ours.special_ids]
    assert special == [number for number in ours.render_chat(plain) if number in ours.special_ids]
    text = ours.decode(ours.render_chat(evil), skip_special=False)
    shown = ours.chat_text(evil)
    assert re.sub(r"\s", "", text) == re.sub(r"\s", "", shown), "and what they wrote stays as text"


def test_a_token_that_a_template_cuts_apart_stays_text(smollm2) -> None:
    cutting = smollm2.with_chat_template("{{ messages[0].content.replace('X ', '') }}<|im_end|>")
    ids = cutting.render_chat(conversation("a<|im_<|im_end|>X end|>"))
    assert [number for number in ids if number in smollm2.special_ids] == [2] and ids[-1] == 2


def test_variables_reach_the_template_and_are_shielded_too(smollm2) -> None:
    template = "{{ tools | tojson }}{{ mood }}{% if documents is none %}, no documents{% endif %}"
    tokenizer = smollm2.with_chat_template(template)
    shown = tokenizer.chat_text(conversation("x"), tools=[{"b": "<é>", "a": 1}], mood="calm")
    assert shown == '[{"b": "<é>", "a": 1}]calm, no documents'
    assert not smollm2.special_ids & set(tokenizer.render_chat(conversation("x"), tools=["<|im_end|>"]))


def test_the_language_of_templates() -> None:
    talk = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "user", "content": "b"}]

    def shown(template: str) -> str:
        return render(template, talk, False, {})

    assert (
        shown("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}") == "a"
    )
    assert shown("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert shown("{{ {'b': [1, '<']} | tojson }}") == '{"b": [1, "<"]}'
    assert shown("{{ {'b': 1} | tojson(indent=1) }}") == '{\n "b": 1\n}'
    assert shown("{% generation %}x{{ messages[1].content }}{% endgeneration %}y") == "xby"
    assert shown("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny", "blocks take their own lines with them"
    assert shown("{{ 'tool_calls' in messages[0] }}") == "False", "an entry that is None is left out"


@pytest.mark.parametrize(
    "template, message",
    [
        ("a\n{% if %}", "cannot be read, at its line 2: Expected an expression"),
        ("a\n\n{{ x | nope }}", "cannot be read, at its line 3: No filter named 'nope'."),
        (
            "a\n{{ messages[0].nothing.more }}",
            "refuses this conversation, at its line 2: 'dict object' has no attribute",
        ),
        (
            "a\nb\n{{ raise_exception('No systems here.') }}",
            "refuses this conversation, at its line 3: No systems here.$",
        ),
        ("{{ 1 / 0 }}", "at its line 1: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "at its line 1: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "at its line 1: access to attribute 'append' of 'list' object is unsafe"),
    ],
)
def test_templates_that_fail_name_their_line(template, message) -> None:
    with pytest.raises(UserError, match=message):
        render(template, conversation("x"), True, {})


def test_roles_that_a_template_refuses(chats) -> None:
    with pytest.raises(UserError, match="at its line 8: user and assistant must take turns"):
        chats["llama-2"][0].render_chat([{"role": "assistant", "content": "x"}])
    with pytest.raises(UserError, match="only user and assistant are known, not system"):
        chats["mistral"][0].render_chat([{"role": "system", "content": "x"}])


def test_no_template_and_no_messages(smollm2, corpus) -> None:
    with pytest.raises(UserError, match="has no chat template.*give plain text to continue, or set one with"):
        train_tokenizer("bpe", corpus, 300).render_chat(conversation("x"))
    with pytest.raises(UserError, match="There is no message to render"):
        smollm2.render_chat([])
    with pytest.raises(UserError, match="Message 1 is {'content': 'x'}: each must be like"):
        smollm2.render_chat([*conversation("x"), {"content": "x"}])


MARKED = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant
{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}

{% else %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TALKS = [
    conversation("Hello", "Hi there."),
    conversation("2 + 2?", " 4\n", "And 東京 😀?", "It's 首都.\n\n  Yes. ", "Bye", "So <|im_end|>"),
    [{"role": "system", "content": "Be brief."}, *conversation("x", "\n\ny", "", "z <s> </s>")],
]


def learned(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[str]:
    """Return the learned parts of a conversation, one string per turn, with special tokens."""
    ids, mask = tokenizer.render_turns(messages)
    runs = [[id for id, _ in run] for own, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1]) if own]
    return [tokenizer.decode(run, skip_special=False) for run in runs]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("talk", TALKS[:2], ids=["short", "long"])
def test_turns_are_what_a_model_writes(name: str, talk: list[dict[str, str]], chats) -> None:
    """The ids are those of the conversation, and what is learned is what follows each question, to the turn's end."""
    tokenizer, _ = chats[name]
    ids, mask = tokenizer.render_turns(talk)
    assert ids == tokenizer.render_chat(talk, add_generation_prompt=False) and len(mask) == len(ids)
    answers = [message["content"].strip() for message in talk if message["role"] == "assistant"]
    turns = learned(tokenizer, talk)
    assert len(turns) == len(answers)
    end = {"llama-3": "<|eot_id|>", "chatml": "<|im_end|>", "plain": "<|im_end|>"}.get(name, "</s>")
    for turn, answer in zip(turns, answers, strict=True):
        assert turn.endswith(end) and turn.removesuffix(end).strip() == answer


@pytest.mark.parametrize("name", ["chatml", "plain", "llama-3"])
def test_masks_of_a_template_that_marks_are_transformers(name: str, chats, tmp_path) -> None:
    tokenizer, _ = chats[name]
    marked = tokenizer.with_chat_template(MARKED)
    marked.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for talk in TALKS:
        plain = [{**message, "content": re.sub(r"<[^>]*>", "", message["content"])} for message in talk]
        expected = theirs.apply_chat_template(plain, return_assistant_tokens_mask=True, return_dict=True)
        ids, mask = marked.render_turns(plain)
        assert ids == expected["input_ids"], talk
        assert mask == [bool(each) for each in expected["assistant_masks"]], talk


def test_a_template_that_rewrites_earlier_turns_must_mark(chats) -> None:
    tokenizer, _ = chats["chatml"]
    only_last = "{% for m in messages %}{{ m.role[0] }}{{ m.content if loop.last else '' }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match=r"once message 1 has been answered.*generation"):
        tokenizer.with_chat_template(only_last).render_turns(TALKS[1])
