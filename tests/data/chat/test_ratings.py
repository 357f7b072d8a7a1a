"""Preferences out of ratings, sums as instructions, reasoning-gym's problems and scorers; each says what it is of."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from keifu.alignment.rewards import reward, score
from keifu.data.attribution import attribution_of
from keifu.data.catalogue import catalogue
from keifu.data.chat import conversations, preferences, prompts, prompts as gym
from keifu.data.chat.conversations import INSTRUCTIONS, MADE_OF
from keifu.data.chat.preferences import read_preferences
from keifu.errors import UserError
from keifu.recipes.assistant.finetuning import SumPrompts, prompts as prompts_of


def talk(question: str, said: str, *marks: int) -> dict:
    """Return a record in the form of chitchat, of three turns."""
    turns = [[{"text": text, "sender": who}] for who, text in (("x", "Hi"), ("y", said), ("x", "Bye"))]
    rated = dict(zip(("witty", "upbeat", "interesting"), marks, strict=False)) or None
    return {"prompt": question, "ratings": rated, "messages": turns}


def test_pairs_are_of_one_question_far_apart_and_each_talk_is_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [talk("Why?", name, mark, mark, mark) for name, mark in (("a", 10), ("b", 7), ("c", 6), ("d", 2), ("e", 5))]
    others = [talk("Who?", "f", 1, 1, 1), talk("", "g", 9, 9, 9), talk("Why?", "h"), talk("Why?", "i", 1, 1, 4)]
    (tmp_path / "talks.json").write_text(json.dumps(dict(enumerate(asked + others))))
    monkeypatch.setattr(catalogue, "fetch", lambda name: tmp_path / "talks.json")
    found = list(read_preferences("chitchat-preferences"))
    said = [tuple(answer.splitlines()[1] for answer in each.answers) for each in found]
    assert said == [("B: a", "B: i"), ("B: b", "B: d")]  # e was never touched, h has no rating, c has none to go with
    assert all("begins with this question: Why?" in each.prompt[0]["content"] for each in found)


def test_what_is_made_says_of_what() -> None:
    assert MADE_OF.keys() == INSTRUCTIONS.keys() | preferences.PREFERENCES.keys()
    assert attribution_of("chitchat-preferences")["licence"] == "MIT"
    assert "nobody compared two" in attribution_of("chitchat-preferences")["how it was made"]
    assert attribution_of("arithmetic-instructions") == {"how it was made": "sums drawn and worked out here"}
    assert attribution_of("sotu").keys() == {"licence", "attribution"} and attribution_of("mine.jsonl") == {}
    with pytest.raises(UserError, match="chitchat-preferences"):
        list(read_preferences("chitchat-preference"))


def test_sums_are_instructions_and_prompts() -> None:
    found = list(conversations.read("arithmetic-instructions"))
    asked, answered = (found[0][place]["content"] for place in (0, 1))
    assert len(found) == 10_000 and str(eval(asked.removeprefix("What is ").removesuffix("?"))) == answered
    first = next(prompts.read_prompts("arithmetic-instructions"))
    assert first.text == asked and score(reward("exact"), first.text, answered, first.record) == 1


def test_scorers_of_reasoning_gym_get_the_answer_without_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lambda answer, _: float(answer == "4")  # noqa: E731
    monkeypatch.setattr(gym, "reasoning_gym", lambda: SimpleNamespace(get_score_answer_fn=lambda _: right))
    example = {"entry": {"metadata": {"source_dataset": "s"}}}
    for answer, reached in {"<think>\n3</think>\n4": 1, "4": 1, "<think>\n4": 0, "3 </think>4": 1}.items():
        assert gym.gym_score("", answer, example) == reached


def test_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    sums = SumPrompts(count=5)
    found = prompts_of("gym:chain_sum,min_terms=2,max_terms=3", sums, 3)
    assert len(found) == 5 and found == prompts_of("gym:chain_sum,min_terms=2,max_terms=3", sums, 3)
    for each in found:
        assert score(reward("reasoning-gym"), each.text, f" {each.record['answer']}\n", each.record) == 1
        assert score(reward("reasoning-gym"), each.text, "x", each.record) < 1
    for wrong, said in {
        "gym:chain_summ": "Did you mean 'chain_sum'", "gym:chain_sum,terms=2": "refuses gym:chain_sum,terms=2",
        "gym:chain_sum,min_terms": "of reasoning-gym must be name=value", "gym:chain_sum,min_terms=0": "refuses",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=said):
            prompts_of(wrong, sums, 0)
    with pytest.raises(UserError, match="none of reasoning-gym's"):
        score(reward("reasoning-gym"), "1 + 1", "2", {})


def test_reasoning_gym_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError("No module named 'bfi'")

    monkeypatch.setattr(gym, "import_module", absent)
    with pytest.raises(UserError, match=r"No module named 'bfi'\): pip install '\.\[gym\]'"):
        list(gym.gym_problems("gym:chain_sum", 1, 0))


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {turn}" for n, turn in enumerate(turns))


def test_the_plain_texts_of_hh_rlhf_are_read(tmp_path: Path) -> None:
    shared = "Hi", "Hello.\n\nHow can I help?", "Name a bird"
    records = [
        {"chosen": hh(*shared, "A swan: white."), "rejected": hh(*shared, "No.")},
        {"chosen": hh("a", "b").replace("Human: a", "Human: a\n\nHuman: more"), "rejected": hh("a\n\nmore", "c")},
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    first, second = read_preferences(tmp_path / "hh.jsonl")
    assert [(message["role"], message["content"]) for message in first.prompt] == list(
        zip(("user", "assistant", "user"), shared, strict=True)
    )
    assert first.answers == ("A swan: white.", "No.") and first.pairs() == [(0, 1)]
    assert second.prompt == [{"role": "user", "content": "a\n\nmore"}] and second.answers == ("b", "c")


@pytest.mark.parametrize(
    ("chosen", "rejected", "sentence"),
    [
        ("What?", hh("a", "b"), "line 1, chosen: a conversation is a list of messages, or a text of turns that begin"),
        (hh("a", "b"), hh("c", "d"), "line 1: chosen and rejected differ before their last message"),
        (hh("a", "b"), hh("a"), "line 1, rejected: the conversation ends with user"),
        (hh("a", "b"), hh("a", " "), "line 1, rejected, message 2: the assistant's answer is empty"),
        (hh("a", "b"), hh("a", "b"), "line 1: two answers are equal"),
    ],
)
def test_a_faulty_text_of_two_conversations_is_named(tmp_path: Path, chosen, rejected, sentence: str) -> None:
    (tmp_path / "hh.jsonl").write_text(json.dumps({"chosen": chosen, "rejected": rejected}))
    with pytest.raises(UserError, match=sentence):
        list(read_preferences(tmp_path / "hh.jsonl"))
