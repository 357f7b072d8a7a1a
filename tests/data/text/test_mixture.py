"""Mixtures: shares that are exact at any time, sources that stay apart from what is held out, and files with faults."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st

from keifu.data.interleaving import interleave, source_of_row
from keifu.data.text import mixture, synthetic_math
from keifu.data.text.mixture import (
    Check,
    MixedText,
    WeightedSource,
    elements,
    prepare_mixture,
    read_mixture,
    source_names,
)
from keifu.data.text.normalization import normalize
from keifu.data.text.span_corruption import (
    MODES,
    CausalBatches,
    InfillingExamples,
    Markers,
    SpanCorruptionBatches,
    ul2,
)
from keifu.data.text.token_shards import Shards
from keifu.data.tokenizers.train import train_tokenizer
from keifu.data.translation import tatoeba
from keifu.errors import UserError

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=12)
MARKERS = Markers(dict(zip(MODES, (1, 2, 3), strict=True)), np.arange(4, 104), 0, 0)

EQUATION = re.compile(r"(-?\d+) ([-+*]) (-?\d+) = (-?\d+)")


def wrong_steps(text: str) -> list[str]:
    """Return the equations that do not hold, and the answers that differ from the result of the equation before."""
    wrong, last = [], None
    for line in text.splitlines():
        if found := EQUATION.fullmatch(line):
            left, sign, right, last = found.groups()
            if synthetic_math.OPERATIONS[sign](int(left), int(right)) != int(last):
                wrong.append(line)
        elif line.startswith("Answer: ") and line.removeprefix("Answer: ") != last:
            wrong.append(line)
    return wrong


def shards(name: str, first: int, training: int, validation: int = 90) -> Shards:
    """Return ids that tell their source and place."""
    index = {"fingerprint": name, "source": name, "validation": {"tokens": validation, "bytes": 3 * validation}}
    parts = np.arange(first, first + training), np.arange(first + training, first + training + validation)
    return Shards(parts[0].astype("<u4"), parts[1].astype("<u4"), index)


SOURCES = [
    WeightedSource("large", 0.6, shards("large", 10_000, 4000)),
    WeightedSource("small", 0.25, shards("small", 20_000, 200)),
    WeightedSource("least", 0.15, shards("least", 30_000, 60)),
]


@given(WEIGHTS, st.integers(0, 10**9), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_each_has_its_share_at_any_time(weights: list[int], start: int, count: int) -> None:
    shares = np.array(weights) / sum(weights)
    slack = 0.5 + shares * len(weights) / 2 + 1e-3
    found = interleave(shares, start, start + count)
    for n in range(len(shares)):
        numbers = found.numbers[found.whose == n]
        if len(numbers):
            assert np.array_equal(numbers, np.arange(numbers[0], numbers[0] + len(numbers)))  # none is left out
            assert abs(numbers[0] - shares[n] * start) <= slack[n] + 1
            assert abs(numbers[-1] + 1 - shares[n] * (start + count)) <= slack[n] + 1
    middle = start + count // 2
    first, second = interleave(shares, start, middle), interleave(shares, middle, start + count)
    assert np.array_equal(np.concatenate([first.whose, second.whose]), found.whose)
    assert np.array_equal(np.concatenate([first.numbers, second.numbers]), found.numbers)


def test_shares_from_the_start_are_exact() -> None:
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    given = interleave(shares, 0, 2000).whose
    counted = np.cumsum(np.eye(4)[given], axis=0) - shares * np.arange(1, 2001)[:, None]
    assert np.abs(counted).max() < 1.0
    assert np.array_equal(source_of_row(shares, np.array([5, 3, 1999, 3])), given[[5, 3, 1999, 3]])
    assert len(source_of_row(shares, np.zeros(0, int))) == 0


@pytest.mark.parametrize("task", [CausalBatches(16), SpanCorruptionBatches(ul2(), MARKERS, 32)], ids=["causal", "ul2"])
def test_a_batch_is_a_function_of_seed_and_step_alone(task) -> None:
    one, other = (MixedText(SOURCES, task, 16, 7, seed=5) for _ in range(2))
    in_order = [one.batch(step) for step in range(30)]
    for step in (29, 4, 0, 17):
        again = other.batch(step)
        assert again.keys() == in_order[step].keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in in_order[step].items())
    assert not torch.equal(MixedText(SOURCES, task, 16, 7, seed=6).batch(0)["tokens"], in_order[0]["tokens"])
    assert one.fingerprint == other.fingerprint != MixedText(SOURCES, task, 16, 8, seed=5).fingerprint
    with pytest.raises(UserError, match="counted from 0"):
        one.batch(-1)


def test_sources_come_by_their_weights_and_small_ones_in_more_epochs() -> None:
    data = MixedText(SOURCES, CausalBatches(16), 16, 10)
    rows = torch.cat([data.batch(step)["tokens"] for step in range(60)])
    counts = torch.bincount(rows[:, 0] // 10_000)[1:].tolist()
    assert [abs(n - 600 * s.weight) <= 1 for n, s in zip(counts, SOURCES, strict=True)] == [True] * 3
    epochs = data.epochs(60)
    assert epochs == {"large": 360 / 249, "small": 150 / 11, "least": 90 / 2}
    large = rows[rows[:, 0] < 20_000][:249]  # an epoch takes every window once
    assert len({int(row[0]) for row in large}) == 249
    assert (rows == rows[:, :1] + torch.arange(17)).all()


def test_validation_measures_every_source_by_every_check() -> None:
    decoder = SpanCorruptionBatches(ul2(), MARKERS, 32)
    checks = {
        "bits_per_byte": Check(CausalBatches(32, 3), lambda own: own.bits_per_byte(1.0)),
        "infilling": Check(InfillingExamples(decoder)),
    }
    data = MixedText(SOURCES, decoder, 32, 8, checks=checks, validation_rows=40, check_rows=3)
    assert data.figures == [f"{s.name}/{check}" for check in checks for s in SOURCES]
    found = list(data.validation())
    own = [batch for batch in found if not batch["figure"].any()]
    assert sum(len(batch["tokens"]) for batch in own) == 40
    units = sum(map(elements, own))
    for place in range(1, 7):
        batches = [batch for batch in found if int(batch["figure"][0]) == place]
        scale = 1 / np.log(2) / 3 if place <= 3 else 1.0
        count = sum(map(elements, batches))
        assert float(batches[0]["factor"][0]) * count / units == pytest.approx(scale)
        source = SOURCES[(place - 1) % 3].shards
        for batch in batches:
            asked = batch["tokens"][batch["mask"]]
            assert asked.min() >= source.validation[0] and asked.max() <= source.validation[-1]  # nothing learned from
    again = list(data.validation())
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, again, strict=True) for name in a)


ROWS = [
    {"ja": f"文{n}。", "en": f"Sentence {n // 2}.", "de": f"Satz {n}!" if n % 3 else "-", "fr": "-"} for n in range(200)
]


def test_what_is_held_out_stands_nowhere_in_training() -> None:
    learned, kept = tatoeba.split_sentences(ROWS, 0.1)
    assert 8 < len(kept) < 40 and len(learned) + len(kept) < len(ROWS)  # a few share a sentence with one held out
    for codes in (("en",), ("de",), ("ja", "en"), ("en", "de")):
        make = tatoeba.sentences if len(codes) == 1 else tatoeba.translation_prompt
        texts, hidden = "\n".join(make(learned, codes)), [tatoeba.sentences_of(row) for row in kept]
        lines = {normalize(line) for line in texts.splitlines()}
        assert texts and lines.isdisjoint({normalize(row[code]) for row in hidden for code in codes if code in row})
    documents = tatoeba.translation_prompt(learned, ("de", "en"))
    pairs = {(row["de"], row["en"]) for row in learned if row["de"] != "-"}
    whole = "\n".join(documents)
    formats = {fmt("German", "English", pair) in whole for fmt in tatoeba.FORMATS for pair in pairs}
    assert formats == {True, False}  # each pair in one of several formats
    for names, one in ((("German", "English"), pairs), (("English", "German"), {(b, a) for a, b in pairs})):
        assert all(any(fmt(*names, pair) in whole for fmt in tatoeba.FORMATS) for pair in one)  # and both ways round


def test_sums_have_steps_that_hold() -> None:
    learned, kept = synthetic_math.documents(900, 0.1)
    assert (learned, kept) == synthetic_math.documents(900, 0.1)
    assert not any(wrong_steps(text) for text in learned + kept)
    lines = [{line for text in part for line in text.splitlines()} for part in (learned, kept)]
    questions = [{line for line in part if "Question" in line} for part in lines]
    assert questions[0].isdisjoint(questions[1]) and 50 < len(questions[1]) < 120
    for number in range(100):
        found = synthetic_math.problem(number, seed=1)
        expression = found.question.removesuffix(" = ?")
        if expression != found.question:
            assert eval(expression) == found.answer
    assert wrong_steps("7 + 8 = 16\nAnswer: 16") == ["7 + 8 = 16"]
    assert wrong_steps("7 + 8 = 15\nAnswer: 16") == ["Answer: 16"]


def written(folder: Path, content, name: str = "mix.yaml") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return str(path)


def test_a_mixture_comes_from_yaml_or_json_beside_its_texts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("One two three four. " * 200)
    (tmp_path / "b.tsv").write_text("".join(f"eins {n}\tone {n}\n" for n in range(200)))
    sources = {
        "prose": {"data": "a.txt", "weight": 3},
        "pairs": {"data": "b.tsv", "weight": 1, "languages": ["German", "English"]},
    }
    given = {"sources": sources, "normalise": True}
    found = read_mixture(written(tmp_path, given))
    assert [(s.name, s.weight) for s in found.sources] == [("prose", 0.75), ("pairs", 0.25)]
    (tmp_path / "mix.json").write_text(json.dumps(given))
    assert read_mixture(str(tmp_path / "mix.json")).sources == found.sources
    found = replace(found, held_out=0.1)
    tokenizer = train_tokenizer("bpe", mixture.texts(found, 3000), 300)
    prose, pairs = prepare_mixture(found, tokenizer)
    assert "One two three" in tokenizer.decode(prose.tokens[:60].tolist())
    texts = [tokenizer.decode(part.tolist()) for part in (pairs.tokens, pairs.validation)]
    assert "German: eins" in texts[0] and "English: one" in texts[0] and "English for “eins" in texts[0]
    kept = {n for n in range(200) if f"one {n}\n" in texts[1]}
    assert kept and not any(f"one {n}\n" in texts[0] for n in kept)
    assert prepare_mixture(found, tokenizer)[1].fingerprint == pairs.fingerprint


def test_the_named_mixture_is_one() -> None:
    found = read_mixture("multilingual")
    assert len(found.sources) >= 12 and all(s.data in source_names() for s in found.sources)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"sources": {n: {"data": "a.txt", "weight": w} for n, w in (("a", 0.7), ("b", 0.5))}}, "sum to 1.2, and"),
        ({"sources": {"a": {"data": "a.txt", "weight": -0.5}}}, "The weight of the source 'a' is -0.5"),
        ({"sources": {"a": {"data": "a.txt", "weight": 0}}}, "must be a number above 0"),
        ({"sources": {"a": {"data": "a.txt", "weight": "much"}}}, "is 'much'"),
        ({"sources": {"a": {"data": "a.txt"}}}, "the source 'a' has no weight"),
        ({"sources": {"a": {"data": "", "weight": 1}}}, "the source 'a' has no data"),
        ({"sources": {"a": {"data": "a.txt", "wieght": 1}}}, "Did you mean 'weight'"),
        ({"sources": {"a": 3}}, "the source 'a' needs data and weight"),
        ({"sources": {}}, "has no sources"),
        ({"source": {}}, "it needs `sources:`"),
        ({"sources": {"a": {"data": "a.txt", "weight": 1}}, "normalize": True}, "Did you mean 'normalise'"),
        ({"sources": {"a": {"data": "a.txt", "weight": 1, "languages": ["German"]}}}, "has 1 languages"),
        ("a: [", "neither YAML nor JSON"),
        (
            "sources:\n  a: {data: a.txt, weight: 1}\n  a: {data: b.txt, weight: 1}",
            "has the key 'a' 2 times in one place",
        ),
    ],
)
def test_a_faulty_mixture_is_refused(content, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        read_mixture(written(tmp_path, content))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("wiki-sumaries", "The source 'a': There is no .* Did you mean 'wiki-summaries'"),
        ("tatoeba-jp", "The source 'a': There is no .*'tatoeba-"),
        ("a**b.txt", r"The source 'a': There is no file, .*'a\*\*b.txt'"),
        ("empty.txt", "The source 'a': There is no text in .*empty.txt"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(data: str, sentence: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty.txt").write_text("\n\n")
    found = read_mixture(written(tmp_path, {"sources": {"a": {"data": data, "weight": 1}}}))
    with pytest.raises(UserError, match=sentence):
        prepare_mixture(found, train_tokenizer("bpe", ["some text"] * 3, 300))


def test_an_unknown_mixture_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'multilingual'"):
        read_mixture("multilinguall")


def test_the_share_held_out_and_the_encoding_are_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("n,body\n1,これは\n".encode("cp932"))
    source = "{data: a.csv, weight: 1, field: body, encoding: cp932}"
    (tmp_path / "m.yaml").write_text(f"held_out: 0.1\nsources:\n  a: {source}\n")
    found = read_mixture(str(tmp_path / "m.yaml"))
    assert found.held_out == 0.1 and "".join(mixture.texts(found, 100)) == "これは"
    (tmp_path / "m.yaml").write_text(f"held_out: 2.0\nsources:\n  a: {source}\n")
    with pytest.raises(UserError, match="held_out of .* is 2.0"):
        read_mixture(str(tmp_path / "m.yaml"))


def test_other_weights_are_another_text_for_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aa ab " * 50)
    (tmp_path / "b.txt").write_text("bb ba " * 50)

    def written(*weights: float) -> mixture.Mixture:
        path = tmp_path / "mixture.json"
        names = zip("ab", weights, strict=True)
        rows = {name: {"data": str(tmp_path / f"{name}.txt"), "weight": weight} for name, weight in names}
        path.write_text(json.dumps({"sources": rows}))
        return read_mixture(str(path))

    hashes = [mixture.content_hash(written(*weights)) for weights in ((0.75, 0.25), (0.25, 0.75), (0.75, 0.25))]
    assert hashes[0] == hashes[2] != hashes[1]
