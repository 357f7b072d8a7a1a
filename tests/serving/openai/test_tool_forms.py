"""Forms of calls: recorded answers are read the same in any pieces, and a torn or changed answer gives text."""

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tool_toys import tokenizer_of

from keifu.serving.openai.tools import Reply, ToolUse, tool_format

WRITE = {
    "name": "write",
    "parameters": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}, "deep": {"type": "object"}},
        "required": ["path"],
    },
}
CALLS = [("write", {"path": "7", "lines": 7, "deep": {"a": [None, "x\n"]}}), ("write", {"path": "a < b\n<tag>\n"})]
ANSWERS = {
    "xml": "Let us <tool see: <tool_call>\n<function=write>\n<parameter=path>\n7\n</parameter>\n<parameter=lines>\n7\n"
    '</parameter>\n<parameter=deep>\n{"a": [null, "x\\n"]}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n'
    "<function=write>\n<parameter=path>\na < b\n<tag>\n\n</parameter>\n</function>\n</tool_call>",
    "keyed": "Let us <tool see: <tool_call>write\n<arg_key>path</arg_key>\n<arg_value>7</arg_value>\n<arg_key>lines"
    '</arg_key>\n<arg_value>7</arg_value>\n<arg_key>deep</arg_key>\n<arg_value>{"a": [null, "x\\n"]}</arg_value>\n'
    "</tool_call>\n<tool_call>write\n<arg_key>path</arg_key>\n<arg_value>a < b\n<tag>\n</arg_value>\n</tool_call>",
    "braced": "Let us <tool see: [CALLS]call:write{path:<q>7<q>,lines:7,deep:{a:[null,<q>x\n<q>]}}[ARGS]"
    "[CALLS]call:write{path:<q>a < b\n<tag>\n<q>}[ARGS]",
    "textual": 'Let us <tool see: [CALLS][ARGS]write<sep>{"path": "7", "lines": 7, "deep": {"a": [null, "x\\n"]}}<end>'
    '[ARGS]write<sep>{"path": "a < b\\n<tag>\\n"}<end><ends>',
    "tagged": 'Let us <tool see: <tool_call>\n{"name": "write", "arguments": {"path": "7", "lines": 7, "deep": '
    '{"a": [null, "x\\n"]}}}\n</tool_call>\n<tool_call>\n{"name": "write", "arguments": {"path": "a < b\\n<tag>\\n"}}'
    "\n</tool_call>",
}
FORMATS = {
    form: (tool_format(tokenizer_of(form)), tool_format(tokenizer_of(form)).trigger(tokenizer_of(form)))
    for form in ANSWERS
}


def read(form: str, *pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls of an answer in these pieces."""
    reply = Reply(*FORMATS[form], functions={"write": WRITE["parameters"]})
    deltas = [delta for piece in pieces for delta in reply.push(piece)] + reply.push("", last=True)
    assert "".join(delta.content for delta in deltas) == reply.text
    for index, call in enumerate(reply.calls):
        own_deltas = [delta for delta in deltas if delta.call == index]
        assert [delta.name for delta in own_deltas if delta.name] == [call["function"]["name"]]
        assert "".join(delta.arguments for delta in own_deltas) == call["function"]["arguments"]
    return reply.text, [(call["function"]["name"], call["function"]["arguments"]) for call in reply.calls]


@pytest.mark.parametrize("form", ANSWERS)
def test_an_answer_is_read_the_same_wherever_it_is_cut(form: str) -> None:
    answer = ANSWERS[form]
    text, calls = read(form, answer)
    assert text == "Let us <tool see: "
    assert [(name, json.loads(arguments)) for name, arguments in calls] == CALLS
    assert all(read(form, answer[:cut], answer[cut:]) == (text, calls) for cut in range(len(answer)))
    assert read(form, *answer) == (text, calls)


@pytest.mark.parametrize("form", ANSWERS)
def test_an_answer_that_ends_before_its_first_call_is_text(form: str) -> None:
    answer = ANSWERS[form]
    named = answer.index("write") + len("write")
    assert all(read(form, answer[:cut]) == (answer[:cut], []) for cut in range(named))


@pytest.mark.parametrize("form", ["xml", "keyed"])
def test_a_call_whose_tags_are_broken_is_text(form: str) -> None:
    broken = ANSWERS[form].replace("path", "", 1).replace("</", "<")
    assert read(form, broken) == (broken, [])


@settings(max_examples=150, deadline=None)
@given(form=st.sampled_from([*ANSWERS]), data=st.data())
def test_a_changed_answer_never_fails_and_is_the_same_streamed(form: str, data: st.DataObject) -> None:
    answer = ANSWERS[form]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(answer)))
        end = data.draw(st.integers(start, min(len(answer), start + 30)))
        piece = data.draw(
            st.sampled_from(["", "{" * 50, '"', "\\", "</", "<tool_call>", "[CALLS]", "\ud800", answer[:60]])
        )
        answer = answer[:start] + piece + answer[end:]
    whole = read(form, answer)
    assert read(form, *answer) == whole
    cut = data.draw(st.integers(0, len(answer)))
    assert read(form, answer[:cut], answer[cut:]) == whole


@pytest.mark.parametrize("form", ["xml", "keyed", "braced"])
def test_a_grammar_of_tags_takes_what_the_template_writes(form: str) -> None:
    from keifu.serving.openai.constraints import constraints

    tokenizer: Any = tokenizer_of(form)
    grammar = ToolUse([WRITE], "required").grammar(tokenizer, None)
    calls = ANSWERS[form][len("Let us <tool see: ") :]
    for text, valid in ((calls, True), (calls.replace("lines", "linez"), False), (calls.replace("7", '"7', 2), False)):
        constraint = constraints(grammar, tokenizer, tokenizer.vocab_size)()
        followed = True
        for token in [*tokenizer.encode(text, allow_special=True), tokenizer.token_id("<|im_end|>")]:
            followed = followed and bool(constraint.allowed()[token])
            if followed:
                constraint.accept(token)
        assert followed == valid
