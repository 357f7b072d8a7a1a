"""Conversations in every form that is known, what is refused, and how they are packed."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from keifu.data.chat.conversations import names, read
from keifu.data.chat.packing import PackedConversations, TurnMasks, fit_conversations, pack
from keifu.errors import UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be kind."}
FORMS = {
    "openai": ({"messages": [SYSTEM, *TALK]}, [SYSTEM, *TALK]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, TALK),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, TALK),
    "alpaca with input": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    "prompt and response": ({"prompt": "Hi", "response": "Hello"}, TALK),
    "question and answer": ({"question": "Hi", "answer": "Hello"}, TALK),
    "prompt and completion": ({"prompt": [SYSTEM, TALK[0]], "completion": [TALK[1]]}, [SYSTEM, *TALK]),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, suffix: str, tmp_path: Path) -> None:
    record, expected = FORMS[form]
    file = tmp_path / f"talk.{suffix}"
    file.write_text(json.dumps(record) + "\n\n" + json.dumps(record) if suffix == "jsonl" else json.dumps([record] * 2))
    assert list(read(str(file))) == [expected] * 2


def turn(role: str, content: object = "x") -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"text": "x"}, r"line 2: .*instruction and output.*This has 'text'"),
        ([1], "line 2: this is list"),
        ({"messages": [turn("user"), turn("user")]}, r"line 2, message 2: user after user is out of order"),
        ({"messages": [turn("assistant")]}, "message 1: assistant at the start"),
        ({"messages": [turn("user"), turn("asistant")]}, "'asistant'.*assistant"),
        ({"messages": [turn("user"), turn("assistant", " \n")]}, "message 2: the assistant's answer is empty"),
        ({"messages": [turn("user"), turn("assistant"), turn("user")]}, "ends with user"),
        ({"messages": [turn("user", 3), turn("assistant")]}, "message 1: its content is int"),
        ({"messages": []}, "a list of messages"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "'bing'"),
    ],
)
def test_faults_are_named_with_their_line(line: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps(FORMS["openai"][0]) + "\n" + json.dumps(line))
    with pytest.raises(UserError, match=said):
        list(read(str(file)))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "one.json").write_text("{}")
    for name, said in {"bad": "line 1: this is no JSON", "empty": "it is empty", "bat": "bad.jsonl"}.items():
        with pytest.raises(UserError, match=said):
            list(read(str(tmp_path / f"{name}.jsonl")))
    with pytest.raises(UserError, match="a list of objects"):
        list(read(str(tmp_path / "one.json")))
    with pytest.raises(UserError, match="chitchat"):
        list(read("chitchatt"))
    assert {"chitchat", "summary-instructions"} <= {*names()}


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_rows_hold_everything_once_and_leave_little_room(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[place] for place in row) for row in rows)
    assert sums[-1] <= 20 and (len(sums) < 2 or sums[0] + sums[1] > 20)


def turns(*lengths: int) -> list[TurnMasks]:
    return [TurnMasks([10 * k + i % 10 for i in range(n)], [i > 1 for i in range(n)]) for k, n in enumerate(lengths, 1)]


def test_batches_are_a_function_of_seed_and_step() -> None:
    data = PackedConversations(turns(5, 8, 3, 6, 2), turns(4, 4, 4), 10, 2, seed=3, pad_id=0)
    again = PackedConversations(turns(5, 8, 3, 6, 2), turns(4, 4, 4), 10, 2, seed=3, pad_id=0)
    other = PackedConversations(turns(5, 8, 3, 6, 2), turns(4, 4, 4), 10, 2, seed=4, pad_id=0)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    for step in (7, 0):
        assert all((data.batch(step)[name] == again.batch(step)[name]).all() for name in data.batch(step))
    assert len(data.rows) == 3 and sum(map(len, data.rows)) == 5
    seen = [row.tolist() for step in range(3) for row in data.batch(step)["documents"]]
    assert len(seen) == 6  # two epochs
    for batch in (*data.validation(), data.batch(1)):
        tokens, mask, documents = batch["tokens"], batch["mask"], batch["documents"]
        assert not mask[documents == -1].any() and (tokens[documents == -1] == 0).all()
        assert not mask[:, 0].any()
    assert int(data.largest()["tokens"].shape[1]) == 10


def test_what_is_too_long_is_said() -> None:
    with pytest.raises(UserError, match=r"2 of 3 conversations are longer than the 6 tokens.*longest has 9"):
        fit_conversations(turns(5, 9, 7), 6, "error")
    assert [len(each.ids) for each in fit_conversations(turns(5, 9, 7), 6, "drop").fitting] == [5]
    cut = fit_conversations(turns(5, 9, 7), 6, "truncate")
    assert [len(each.ids) for each in cut.fitting] == [5, 6, 6] and cut.shortened == 2
    assert cut.sentence(6) == "3 conversations: 2 were cut to their first 6 tokens, because they are longer."
    late = [TurnMasks([1] * 9, [False] * 8 + [True])]
    assert fit_conversations(late, 6, "truncate") == ([], 1, 0)
