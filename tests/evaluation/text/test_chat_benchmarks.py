"""The benchmarks of chat models: a blind sheet and its count, and bits per byte of held-out conversations."""

import argparse
import json
import math
import random
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from keifu import checkpoints
from keifu.data.tokenizers.chat_template import PLAIN
from keifu.data.tokenizers.train import train_tokenizer
from keifu.evaluation.intervals import wilson
from keifu.inference.text.generate import Completion
from keifu.models import llama

ROOT = Path(__file__).parents[3]
DATA = ROOT / "docs/results/data"
TEXT = "User:\nHow are you today?\nAssistant:\nI am well, and you?\n"


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Return the folders of a chat model and of a base model."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("bpe", [TEXT], 270)
    for name, template in (("taught", PLAIN), ("base", None)):
        config = llama.Config(
            vocab_size=tokenizer.vocab_size, context_length=256, dim=16, hidden_dim=32, n_layers=1, n_heads=2, tied=True
        )
        checkpoints.save(llama.build(config), tokenizer.with_chat_template(template), tmp_path / name)
    return [str(tmp_path / "taught"), str(tmp_path / "base")]


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module(name)


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def test_choices_are_counted_for_the_models_that_the_sheet_hides(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    blind = benchmark("blind_comparison", monkeypatch)
    folder, choices, data = tmp_path / "blind", tmp_path / "choices.txt", tmp_path / "page.json"
    run(blind, monkeypatch, folder, "--models", *models, "--max-tokens", 3)
    shown, key = (folder / "sheet.md").read_text(), json.loads((folder / "key.json").read_text())
    assert not any(name in shown for name in models) and len(key["items"]) == 40
    assert {item["A"] for item in key["items"]} == {*models}, "each model is on either side"
    assert shown.count("**User:** Will you be here tomorrow?") == 2
    better = [models[0]] * 30 + [models[1]] * 6 + ["tie"] * 4
    sides = [{item["A"]: "A", item["B"]: "B"} for item in key["items"]]
    lines = [
        f"{number} {side.get(name, name)}" for number, (side, name) in enumerate(zip(sides, better, strict=True), 1)
    ]
    choices.write_text("\n".join(lines[:-1]))
    with pytest.raises(SystemExit, match="39 choices of 39 items, and the sheet has 40"):
        run(blind, monkeypatch, folder, "--choices", choices, "--judge", "a test")
    choices.write_text("\n".join(["x A", *lines[1:]]))
    with pytest.raises(SystemExit, match="no choice, such as 'x A'"):
        run(blind, monkeypatch, folder, "--choices", choices, "--judge", "a test")
    choices.write_text("\n".join(lines))
    run(blind, monkeypatch, folder, "--choices", choices, "--judge", "a test", "--write", data)
    (table,) = json.loads(data.read_text())
    low, high = wilson(30, 40)
    share = f"75.0% ({100 * low:.1f} to {100 * high:.1f})"
    assert table["rows"][0] == [f"{models[1]}, all prompts", "40", "30", "6", "4", share]
    assert [int(row[1]) for row in table["rows"][1:]] == [20, 10, 10]
    told = json.loads((tmp_path / table["values"]["file"]).read_text())
    assert told["judge"] == "a test" and [item["better"] for item in told["items"]] == better
    assert "75.0%" in capsys.readouterr().out


def test_other_prompts_are_asked_and_counted_in_their_own_table(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind, folder = benchmark("blind_comparison", monkeypatch), tmp_path / "blind"
    asked = {"conversation": [["Hi.", "And you?"]], "story": [["Tell one."]], "question": [["Why?"]]}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    given = ("--models", *models, "--max-tokens", 3, "--prompts", tmp_path / "asked.json")
    run(blind, monkeypatch, folder, *given)
    (tmp_path / "choices").write_text("1 tie\n2 tie\n3 tie\n")
    counted = ("--choices", tmp_path / "choices", "--judge", "a test", "--write", tmp_path / "page.json")
    run(blind, monkeypatch, folder, *counted)
    (table,) = json.loads((tmp_path / "page.json").read_text())
    assert table["section"] == blind.FRESH and table["command"].endswith("--prompts docs/results/data/asked.json")
    assert [row[1] for row in table["rows"]] == ["3", "1", "1", "1"]
    told = json.loads((tmp_path / blind.FRESH_ANSWERS).read_text())
    assert sorted(item["turns"] for item in told["items"]) == [["Hi.", "And you?"], ["Tell one."], ["Why?"]]


def test_no_prompt_is_in_the_lists_of_the_training_data(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, blind = benchmark("teacher_texts", monkeypatch), benchmark("blind_comparison", monkeypatch)
    prompts = [turn for several in blind.PROMPTS.values() for turns in several for turn in turns]
    whole = {text for name, texts in vars(lists).items() if name.isupper() for text in texts}
    assert "a dog" in whole and not whole & {*prompts}
    subjects = (*lists.BEINGS, *lists.EVENTS, *lists.PLACES, *lists.TOPICS, *lists.TASKS)
    words = [f" {prompt.lower().rstrip('?.!')} " for prompt in prompts]
    assert [(text, word) for text in subjects for word in words if f" {text.lower()} " in word] == []


def completion(text: str, reason: str = "stop") -> Completion:
    return Completion(text, [1], reason, 0, 1)


def test_bad_answers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = benchmark("simple_chats", monkeypatch).kept
    story = " ".join(f"Then the cat saw mouse {number} in the old barn." for number in "abcdefg")
    assert kept("talk", "I like tea.", completion(" It\u2019s good with milk. ")) == "It's good with milk."
    assert kept("story", "A story?", completion(f"{story} And then", "length")) == ""  # "in the old" occurs 7 times
    for text in ("I like tea.", "i like milk.", "I like milk", "Yes.", "I am an AI with milk.", "Ich mag süße Milch."):
        assert kept("talk", "I like tea.", completion(text)) == ""
    assert kept("talk", "I like tea.", completion("That is good. You should", "length")) == ""
    assert kept("story", "A story?", completion("A cat sat. The end.")) == "", "too short for a story"
    parts = "One day a cat met a dog by the river. They ate bread, drank cold water and slept under some tall trees."
    told = f"{parts} Both were glad."
    assert kept("story", "A story?", completion(f"{told} And so they", "length")) == told
    assert kept("fact", "What is tea?", completion("Grass is green.")) == "", "an example's answer"
    assert kept("fact", "What color is grass?", completion("Grass is green.")) == "Grass is green."
    assert kept("talk", "I am ill.", completion("I hope that your leg is well.")) == "", "a word of an example"
    assert kept("talk", "My leg hurts.", completion("I hope that your leg is well.")) == "I hope that your leg is well."
    assert kept("talk", "I am ill.", completion("No, no, you are well.")) == ""


def test_simple_chats_have_no_examples_and_no_compared_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    simple = benchmark("simple_chats", monkeypatch)
    near = ["My old phone is broken.", "Do fish live?", "I want to get a pet!", "She has a red pet."]
    monkeypatch.setattr(simple, "everyday", lambda: (near, ["Where do fish live?", "What is it?"]))
    asked = {simple.prompt_of("talk", random.Random(seed)) for seed in range(60)}
    assert asked - {*simple.MOODS} > {"She has a red pet."} and asked.isdisjoint(near[:3])
    assert {"Where do fish live?"}.isdisjoint(simple.prompt_of("fact", random.Random(seed)) for seed in range(200))
    writer = object.__new__(simple.SimpleWriter)
    writer.options = argparse.Namespace(seed=0, model="m", weights="int8")
    writer.tokenizer = train_tokenizer("bpe", [TEXT], 270)
    writer.tokenizer = writer.tokenizer.with_chat_template(PLAIN)
    read = []

    def write(prompts: list[list[int]], items: list[int], turn: int, *rest: object, **more: object) -> list[Completion]:
        read.extend(writer.tokenizer.decode(prompt) for prompt in prompts)
        return [completion(f"Well, item {item} of turn {turn} has seven words." * (item != 4)) for item in items]

    writer.write = write
    monkeypatch.setattr(writer, "on_topic", lambda asked, answers: ["item 5 " not in text for text in answers])
    monkeypatch.setattr(writer, "opened", lambda talk, opening: writer.tokenizer.render_chat(talk))
    lines = simple.write_items(writer, range(60))
    kinds = Counter(line["kind"] for line in lines)
    assert kinds == {"talk": 34, "fact": 12, "greeting": 6}, "short stories, empty item 4, off-topic item 5"
    assert all("I found a coin" in text for text in read if "red pet" in text)
    for line in lines:
        roles = [message["role"] for message in line["messages"]]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2) and "synthetic" in line["source"]
        assert "coin" not in str(line["messages"])
    assert 3 < sum(len(line["messages"]) == 4 for line in lines) < 20


def test_answers_that_fit_everything_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    simple = benchmark("simple_chats", monkeypatch)
    writer = object.__new__(simple.SimpleWriter)
    monkeypatch.setattr(writer, "vectors", lambda texts: torch.tensor([[*map(float, text.split())] for text in texts]))
    writer.others = torch.tensor([[0.6, 0.8]] * 5 + [[0.8, 0.6], [0.0, -1.0]])
    assert writer.on_topic(["1 0", "1 0", "0 1"], ["1 0", "0 1", "0.8 0.6"]) == [True, False, False]
    writer.others = writer.others[1:]
    assert writer.on_topic(["1 0", "1 0"], ["0 1", "0.6 0.8"]) == [True, True], "five others are nearer"
    assert writer.on_topic([], []) == []
    talk = {"kind": "talk", "messages": [{"content": text} for text in ("Hi.", "Hm! Yes, 2.5.", "Why?", "No. Hm!")]}
    assert simple.phrases(talk) == ["Hm!", "Yes, 2.5.", "No.", "Hm!"]
    assert simple.phrases({**talk, "kind": "greeting"}) == ["Hm! Yes, 2.5."]


def test_sentences_are_counted_in_the_file_that_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple, path = benchmark("simple_chats", monkeypatch), tmp_path / "chats.jsonl"

    def line(kind: str, answer: str) -> dict[str, Any]:
        return {"kind": kind, "messages": [{"content": "Hi."}, {"content": answer}]}

    path.write_text("".join(f"{json.dumps(line('talk', f'Good. Number {n}.'))}\n" for n in range(3)), encoding="utf-8")
    written = [line("talk", "Good. Fine."), line("talk", "Good. Last."), line("talk", "Fine.")]
    written += [line("greeting", "Hello! Good.")] * 12
    monkeypatch.setattr(simple, "write_items", lambda writer, items: written)
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(simple, "write_file", lambda kind, options, write: kept.extend(write(None, [0])))
    run(simple, monkeypatch, "--out", path)
    assert kept == [written[0], written[2]] + written[3:13], "four talks with 'Good.', ten equal greetings"


def test_bits_are_those_of_the_answers(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    held = benchmark("held_out_chats", monkeypatch)
    chats = [[("user", f"How are you, {n}?"), ("assistant", "I am well." * (1 + 60 * (n == 7)))] for n in range(40)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in chats]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    data = tmp_path / "held.jsonl"
    run(held, monkeypatch, "--split", tmp_path / "all.jsonl", "--held-out", 0.5, "--data", data)
    kept = data.read_text().splitlines()
    assert 5 < len(kept) < 35 and {*kept} < {*lines}
    capsys.readouterr()
    data.write_text("\n".join(lines[:10]))
    run(held, monkeypatch, *models, "--data", data, "--json", "--write", tmp_path / "page.json")
    found = json.loads(capsys.readouterr().out)
    assert (found["conversations"], found["bytes"]) == (9, 90), "the long one is left out"
    model, tokenizer = checkpoints.load(models[0])
    ids, learned = tokenizer.render_turns(json.loads(lines[0])["messages"])
    logits = model(torch.tensor([ids]))[0, :-1].detach().log_softmax(-1)
    nats = -sum(float(logits[at - 1, ids[at]]) for at in range(1, len(ids)) if learned[at])
    (table,) = json.loads((tmp_path / "page.json").read_text())
    bits = table["values"][models[0]]
    assert bits[0] == pytest.approx(nats / math.log(2), abs=0.02)
    assert found["bits per byte"] == pytest.approx(sum(bits) / 90, abs=1e-3)
    low, high = map(float, found["bits per byte, 95% interval"].split(" to "))
    assert low <= found["bits per byte"] <= high
    other = f"bits per byte of {models[1]}"
    assert table["rows"][1] == [models[1], f"{found[other]:.4f}", found[f"{other}, 95% interval"]]


def test_a_student_has_the_layers_of_its_body_and_its_teacher_s_tokens(
    models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Any = checkpoints.load(models[1])
    body, tokenizer = loaded
    rows, blocks = body.embedding.weight.detach().clone(), [weights.clone() for weights in body.blocks.parameters()]
    tokens = train_tokenizer("bpe", ["How well are you today, and you? "], 290, special_tokens=["<|im_end|>"])
    student = benchmark("student", monkeypatch).with_tokens(body, tokenizer, tokens)
    assert student(torch.arange(9)[None]).shape[-1] == tokens.vocab_size == student.config.vocab_size
    assert all(torch.equal(*pair) for pair in zip(blocks, student.blocks.parameters(), strict=True))
    (word,) = tokens.encode(" today")[-1:]
    expected = rows[tokenizer.encode(tokens.decode([word]))].mean(0)
    torch.testing.assert_close(student.embedding.weight[word], expected)


def test_a_file_of_texts_with_odd_line_breaks_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, path = benchmark("teacher_texts", monkeypatch), tmp_path / "texts.jsonl"
    lines = [json.dumps({"seed": 0, "item": item, "text": "a\u2028b\x85c"}, ensure_ascii=False) for item in (0, 2)]
    path.write_text("\n".join([*lines, '{"seed": 0, "it']), encoding="utf-8")
    assert texts.begun(path, 0) == [0, 2] and path.read_text(encoding="utf-8") == "\n".join([*lines, ""])
    with pytest.raises(SystemExit, match="lines of another seed than 1"):
        texts.begun(path, 1)


def test_figures_of_the_page_are_of_their_items(monkeypatch: pytest.MonkeyPatch) -> None:
    held = benchmark("held_out_chats", monkeypatch)
    page = {table["section"]: table for table in json.loads((DATA / "packaged.json").read_text(encoding="utf-8"))}
    measured = dict(page[held.SECTION]["values"])
    sizes = measured.pop("bytes")
    assert held.rows(measured, sizes) == page[held.SECTION]["rows"]
    chats = (DATA / "held-out-chats.jsonl").read_text(encoding="utf-8").splitlines()
    read = iter([held.size(json.loads(line)["messages"]) for line in chats])
    assert all(size in read for size in sizes), "in their order, without those that are too long"
    card = json.loads((ROOT / "pretrained/src/keifu_pretrained/chat-en/card.json").read_text(encoding="utf-8"))
    assert card["figures"].items() <= held.figures(measured, sizes).items()


@pytest.mark.parametrize("fresh", [False, True])
def test_comparisons_of_the_page_are_of_their_choices(monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    blind = benchmark("blind_comparison", monkeypatch)
    section, file = (blind.FRESH, blind.FRESH_ANSWERS) if fresh else (blind.SECTION, blind.ANSWERS)
    page = {table["section"]: table for table in json.loads((DATA / "packaged.json").read_text(encoding="utf-8"))}
    told, before = (
        json.loads((DATA / file.replace(".json", ending)).read_text(encoding="utf-8"))["items"]
        for ending in (".json", "-before.json")
    )
    assert blind.rows("chat-en", told) == page[section]["rows"]
    asked = json.loads((DATA / "fresh-prompts.json").read_text(encoding="utf-8")) if fresh else blind.PROMPTS
    prompts = sorted(2 * [turns for several in asked.values() for turns in several])
    assert sorted(item["turns"] for item in told) == sorted(item["turns"] for item in before) == prompts
    text = (DATA.parent / "packaged.md").read_text(encoding="utf-8")
    text = text[text.index(f"## {section}\n") :].partition("\n<!--")[0]
    _, _, better, worse, equal, _ = blind.rows("chat-en", before)[0]
    assert f"better than gpt-en's in {better} of these items, worse in {worse} and equal in {equal}" in " ".join(
        text.split()
    )


def test_new_weights_are_compared_with_the_earlier_ones_item_by_item(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = benchmark("blind_comparison", monkeypatch)
    files = ("blind-comparison.json", "blind-comparison-before.json", "fresh-comparison.json")
    asked = [json.loads((DATA / file).read_text(encoding="utf-8"))["items"] for file in files]
    asked.append(json.loads((DATA / "fresh-comparison-before.json").read_text(encoding="utf-8"))["items"])
    new, earlier = (
        {str(item["turns"]): own for item in items for own in [own_answers(item)] if own}
        for items in (asked[0] + asked[2], asked[1] + asked[3])
    )
    told = json.loads((DATA / blind.EARLIER_ANSWERS).read_text(encoding="utf-8"))
    items = told["items"]
    for item in items:
        given = {item[side]: item["answers"][side] for side in "AB"}
        assert given == {"new": new[str(item["turns"])], "earlier": earlier[str(item["turns"])]}
    assert len(items) == len(new) == 100
    page = {table["section"]: table for table in json.loads((DATA / "packaged.json").read_text(encoding="utf-8"))}
    assert blind.rows("new", items) == page[blind.EARLIER]["rows"]
    counts = Counter(item["better"] for item in items)
    assert page[blind.EARLIER]["rows"][0][2:5] == [str(counts[name]) for name in ("new", "earlier", "tie")]


def test_the_sheet_with_earlier_weights_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = benchmark("blind_comparison", monkeypatch)
    told = json.loads((DATA / blind.EARLIER_ANSWERS).read_text(encoding="utf-8"))
    run(blind, monkeypatch, tmp_path, "--earlier", "--seed", told["seed"])
    key = json.loads((tmp_path / "key.json").read_text(encoding="utf-8"))
    assert key["items"] == [{name: item[name] for name in item if name != "better"} for item in told["items"]]
    page = {table["section"]: table for table in json.loads((DATA / "packaged.json").read_text(encoding="utf-8"))}
    assert blind.origin(key) == (blind.EARLIER, blind.EARLIER_ANSWERS, page[blind.EARLIER]["command"])


def own_answers(item: dict[str, Any]) -> list[str] | None:
    """Return chat-en's answers in an item in which it is compared with gpt-en."""
    sides = {item[side]: side for side in "AB"}
    return item["answers"][sides["chat-en"]] if "gpt-en" in sides else None


def test_recorded_commands_have_the_options_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    typed, usual = benchmark("_results", monkeypatch).typed, {"seeds": [0], "rate": 0.1, "mixed": False, "tower": None}
    given = usual | {"rate": 0.2, "mixed": True, "folder": "x"}
    assert typed("a.py", given, usual) == "python benchmarks/a.py --rate 0.2 --mixed"
    assert typed("a.py", usual, usual, ("seeds",)) == "python benchmarks/a.py --seeds 0"
    arguments = "--tower emoji-clip --tower-rate 1 --steps 6400 --seeds 0"  # as a page prints them
    monkeypatch.setattr(sys, "argv", ["seeing.py", *arguments.split(), "--folder", "x"])
    seeing = benchmark("seeing", monkeypatch)
    tables = json.loads((DATA / "text_and_pictures.json").read_text(encoding="utf-8"))
    printed = [table["command"] for table in tables if table["section"] == "A tower that learns with the rest"]
    assert [seeing.command(seeing.read_options()).replace("1.0", "1")] == printed


@pytest.mark.parametrize("name", ["blind-comparison", "fresh-comparison", "chat-en-weights"])
def test_the_lengths_that_a_judge_preferred_follow_from_the_items(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = benchmark("blind_comparison", monkeypatch)
    stored = json.loads((blind.DATA / f"{name}.json").read_text(encoding="utf-8"))
    assert stored["lengths"] == blind.lengths(stored["items"])
    made = {"A": "x", "B": "y", "answers": {"A": ["four"], "B": ["eleven", "chars"]}}
    items = [made | {"better": "y"}, made | {"better": "x"}, made | {"better": "tie"}]
    assert [*blind.lengths(items).values()] == [2, 1, round((11 + 4) / 2), round((4 + 11) / 2)]
