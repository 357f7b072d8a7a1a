"""Figures of packaged models: cards, tables and intervals follow from the values that the evaluations wrote."""

import json
import math
import re
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from keifu.checkpoints.hub import locate
from keifu.data.images.dataset import read_images
from keifu.data.images.splits import recorded, split_of_run
from keifu.data.text.normalization import near_training
from keifu.data.translation.pairs import read_pairs, split
from keifu.evaluation.intervals import as_text, bootstrap, wilson
from keifu.evaluation.text.translation import Scorer, by_nearness
from keifu.recipes import landmarks

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs/results/data"
CARDS = {path.parent.name: path for path in (ROOT / "pretrained/src/keifu_pretrained").glob("*/card.json")}
MEASURED = sorted(name for name in CARDS if (DATA / f"{name}.json").is_file())
TRANSLATORS = ["ja-en", "en-ja"]


def read(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def rows(name: str) -> list[dict[str, Any]]:
    """Return the items of an evaluation, each value by the name of its column."""
    found = read(name)
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def share(name: str, right: int, count: int) -> dict[str, Any]:
    """Return a share of right items and its interval by Wilson, as figures."""
    return {name: round(right / count, 4), f"{name}, 95% interval": as_text(wilson(right, count))}


def is_part(some: dict[str, Any], of: dict[str, Any]) -> bool:
    return some.items() <= of.items()


def test_all_models_but_the_conversational_one_have_a_file_of_values() -> None:
    assert set(CARDS) - set(MEASURED) <= {"chat-en"}  # whose values are in packaged.json


def test_the_demonstration_tells_how_large_its_chat_model_is() -> None:
    card = CARDS["chat-en"].with_name("README.md").read_text(encoding="utf-8")
    (count,) = re.findall(r"\| parameters \| ([\d,]+),", card)
    for page in ("demonstration.md", "demonstration.ja.md"):
        told = (ROOT / "docs/start" / page).read_text(encoding="utf-8")
        assert f"{int(count.replace(',', '')) / 1e6:.1f} M" in told[told.index("SmolLM2-135M") :][:250]


@pytest.mark.parametrize("name", MEASURED)
def test_a_card_has_the_figures_of_the_values(name: str) -> None:
    found, card = read(name), json.loads(CARDS[name].read_text(encoding="utf-8"))
    assert found["options"]["model"] == name
    assert is_part(card["figures"], found["figures"])
    text = CARDS[name].with_name("README.md").read_text(encoding="utf-8")
    for figure, value in card["figures"].items():
        assert str(figure).replace("|", r"\|") in text and str(value).replace("|", r"\|") in text
    for table in found["tables"].values():
        for row in table:
            assert f"| {' | '.join(map(str, row.values()))} |" in text


@pytest.mark.parametrize("name", TRANSLATORS)
def test_scores_follow_from_the_translations(name: str) -> None:
    found, items, scorer = read(name), rows(name), Scorer(name[-2:])
    texts, references, near = ([item[key] for item in items] for key in ("translation", "reference", "near copy"))
    scores, (bleu, chrf) = scorer(texts, references), scorer.intervals(texts, references)
    again = {
        "BLEU": round(scores.bleu, 2), "BLEU, 95% interval": bleu,
        "chrF": round(scores.chrf, 2), "chrF, 95% interval": chrf, "pairs": len(items),
    }  # fmt: skip
    assert is_part(again, found["figures"])
    table = by_nearness(scorer, texts, references, near)
    assert [[*row.values()] for row in found["tables"]["near copies in the training part"]] == [*map(list, table.rows)]


@pytest.mark.slow
def test_near_copies_are_those_of_the_training_pairs() -> None:
    parts = split(read_pairs("tatoeba-ja-en"))
    near = near_training(parts.test, parts.train)
    assert [[item["source"], item["reference"]] for item in rows("ja-en")] == [*map(list, parts.test)]
    assert [item["near copy"] for item in rows("ja-en")] == near
    reverse = {(item["reference"], item["source"]): item["near copy"] for item in rows("en-ja")}
    assert [reverse[pair] for pair in parts.test] == near


@pytest.mark.slow
def test_sentences_of_the_demonstration_have_no_near_copy_in_training() -> None:
    """Both sides are asked: a pair is two sentences of the demonstration, which need not be translations."""
    training = split(read_pairs("tatoeba-ja-en")).train
    japanese, english = landmarks.SENTENCES["ja-en"], landmarks.SENTENCES["en-ja"]
    assert near_training([*zip(japanese, english, strict=True)], training) == [False] * len(japanese)


@pytest.mark.parametrize("name", ["network", "neuron"])
def test_accuracy_follows_from_the_rows(name: str) -> None:
    items = rows(name)
    right = sum(item["right"] == item["given"] for item in items)
    assert read(name)["figures"] == share("accuracy", right, len(items)) | {"rows": len(items)}


def test_digits_that_are_read_as_asked_follow_from_the_drawings() -> None:
    items, figures = rows("digits"), read("digits")["figures"]
    right = sum(item["asked"] == item["read as"] for item in items)
    assert is_part(share("asked class seen", right, len(items)) | {"pictures": len(items)}, figures)
    assert {"precision", "recall", "kernel distance x 1000"} <= figures.keys()  # at the same guidance


def test_distances_of_digits_follow_from_the_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    digits = import_module("drawn_digits")
    (table,) = [each for each in read("packaged") if each["section"] == digits.SECTION]
    sets = [*table["values"]["by first seed"].values()]
    assert len(sets) == 3 and table["rows"] == digits.rows(sets)
    sets[0]["recall"] = 0.0
    assert table["rows"] != digits.rows(sets)


def test_emoji_that_are_recognised_follow_from_the_drawings() -> None:
    items, figures = rows("emoji"), read("emoji")["figures"]
    columns = {"": "own caption first", " of real pictures": "its own caption first"}
    for whose, column in columns.items():
        for part, where in (("in training", ""), ("held-out captions", " of held-out captions")):
            some = [item[column] for item in items if item["captions"] == part]
            assert is_part(share(f"own caption first of {len(some)}{whose}{where}", sum(some), len(some)), figures)


def test_names_that_a_judge_saw_as_new_were_not_learned() -> None:
    shown: dict[str, set[str]] = {}
    now, before = (read(file)["items"] for file in ("named-by-eye", "named-by-eye-before"))
    assert [(item["kind"], item["name"]) for item in before] == [(item["kind"], item["name"]) for item in now]
    right = Counter(item["kind"] for item in before if item["name"] == item["chosen"])
    assert (right["drawings of learned names"], right["drawings of new names"]) == (43, 10)
    for item in now:
        shown.setdefault(item["kind"], set()).add(item["name"])
    parts = split_of_run(read_images("emoji", 16, 3), recorded(locate("emoji")))
    learned, new = ({*part.texts("en")} for part in (parts.train, parts.test))
    assert shown["drawings of learned names"] <= learned
    assert shown["drawings of new names"] == shown["real pictures of the new names"] <= new - learned


def test_intervals_of_masked_words_follow_from_the_counts() -> None:
    found, items = read("bert-en"), rows("bert-en")

    def interval(some: list[dict[str, Any]], column: str) -> str:
        values, sizes, lines = ([item[key] for item in some] for key in (column, "count", "row"))
        return as_text(bootstrap(values, clusters=lines, sizes=sizes))

    figures = found["figures"]
    assert figures["masked words right, 95% interval"] == interval(items, "right")
    assert figures["masked words looked up, 95% interval"] == interval(items, "looked up")
    for line in found["tables"]["by class"]:
        some = [item for item in items if item["tokens"] == line["tokens"]]
        assert line["95% interval"] == interval(some, "right")


def test_bits_per_byte_follow_from_the_windows() -> None:
    items, figures = rows("gpt-en"), read("gpt-en")["figures"]
    nats, sizes = [item["nats"] for item in items], [item["tokens"] for item in items]
    unit = math.log(2) * figures["bytes per token"]
    assert sum(sizes) == figures["tokens"]
    assert abs(sum(nats) / sum(sizes) / unit - figures["bits per byte"]) < 0.00006
    low, high = bootstrap([value / unit for value in nats], sizes=sizes)
    printed = map(float, figures["bits per byte, 95% interval"].split(" to "))
    assert all(abs(a - b) < 0.0002 for a, b in zip((low, high), printed, strict=True))


def test_accuracy_on_questions_follows_from_the_answers() -> None:
    items, figures = rows("see"), read("see")["figures"]
    right = [item["given"] == item["answer"] for item in items]
    blind = [item["given without the picture"] == item["answer"] for item in items]
    assert is_part(share("accuracy", sum(right), len(items)), figures)
    assert is_part(share("without the picture", sum(blind), len(items)), figures)


def test_the_tables_of_the_page_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "packaged", raising=False)
    packaged = import_module("packaged")
    tables = read("packaged")
    for section, columns, make in packaged.TABLES:
        (table,) = [each for each in tables if each["section"] == section]
        assert table["columns"] == [*columns] and table["rows"] == make()


def test_held_out_conversations_follow_from_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    chats = import_module("held_out_chats")
    (table,) = [each for each in read("packaged") if each["section"] == chats.SECTION]
    values = dict(table["values"])
    sizes = values.pop("bytes")
    assert chats.rows(values, sizes) == table["rows"]
    figures = json.loads(CARDS["chat-en"].read_text(encoding="utf-8"))["figures"]
    assert is_part(figures, chats.figures(values, sizes))


def test_shares_of_all_unseen_emoji_follow_from_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    clip = import_module("clip_emoji")
    found = json.loads(clip.ALL.read_text(encoding="utf-8"))
    tables = {each["section"]: each["rows"] for each in read("text_and_pictures")}
    assert tables[clip.SECTION] == [[f"{each['set']}, {each['language']}", *clip.cells(each)] for each in found]
    unseen = [each for each in found if each["set"] == clip.UNSEEN]
    assert tables[clip.RELATIVES] == [row for each in unseen for row in clip.relatives(each)]
