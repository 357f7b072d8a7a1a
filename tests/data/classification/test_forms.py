"""The four forms, token by token, the tables they are read from, and the tokenizer that knows them."""

import json
from pathlib import Path

import pytest

from keifu.data.classification.batches import FormBatches, encode_form
from keifu.data.classification.examples import Examples
from keifu.data.classification.input_formats import (
    FORMS,
    Delimiters,
    add_delimiters,
    delimiters_of,
    examples_of,
    form_of,
    read_examples,
)
from keifu.data.classification.tables import read
from keifu.data.padding import stack_sequences
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError

S, D, E = 97, 98, 99
MARKS = Delimiters((S,), (D,), (E,))


class Letters:
    """a is 1, b is 2, ..."""

    def encode_batch(self, texts, special=False, allow_special=False):
        return [[ord(letter) - 96 for letter in text] for text in texts]


def examples(form: str, *texts: tuple[str, ...]) -> Examples:
    return examples_of(["\t".join(each) for each in texts], form_of(form))


@pytest.mark.parametrize(
    ("form", "texts", "sequences"),
    [
        ("classification", ("abc",), [[S, 1, 2, 3, E]]),
        ("entailment", ("ab", "c"), [[S, 1, 2, D, 3, E]]),
        ("similarity", ("ab", "c"), [[S, 1, 2, D, 3, E], [S, 3, D, 1, 2, E]]),
        ("choice", ("ab", "c", "de", "f"), [[S, 1, 2, D, 3, E], [S, 1, 2, D, 4, 5, E], [S, 1, 2, D, 6, E]]),
    ],
)
def test_each_form_token_by_token(form: str, texts: tuple[str, ...], sequences: list[list[int]]) -> None:
    assert encode_form(Letters(), form_of(form), MARKS, examples(form, texts), 7).rows == [sequences]


@pytest.mark.parametrize(
    ("form", "texts", "limit", "sequences"),
    [
        ("classification", ("abcdef",), 5, [[S, 1, 2, 3, E]]),
        ("entailment", ("abcdef", "gh"), 8, [[S, 1, 2, 3, D, 7, 8, E]]),
        ("similarity", ("abcd", "efgh"), 8, [[S, 1, 2, D, 5, 6, E], [S, 5, 6, D, 1, 2, E]]),
        ("choice", ("abcdef", "g", "hijk"), 8, [[S, 1, 2, 3, 4, D, 7, E], [S, 1, 2, D, 8, 9, E]]),
    ],
)
def test_the_longest_texts_are_cut_and_no_mark_is_lost(form, texts, limit, sequences) -> None:
    rows, cut = encode_form(Letters(), form_of(form), MARKS, examples(form, texts), limit, cut=True)
    assert rows == [sequences] and cut == 1
    with pytest.raises(UserError, match=f"Text 1 of 1: this example has .* tokens, and {limit} is the most"):
        encode_form(Letters(), form_of(form), MARKS, examples(form, texts), limit)


def test_examples_with_fewer_answers_have_empty_sequences_at_their_end() -> None:
    rows = encode_form(
        Letters(), FORMS["choice"], MARKS, examples("choice", ("a", "b", "c"), ("a", "bb", "c", "d")), 9
    ).rows
    tokens, mask = stack_sequences(rows, 0)
    assert tokens.shape == mask.shape == (2, 3, 6)
    assert tokens[0].tolist() == [[S, 1, D, 2, E, 0], [S, 1, D, 3, E, 0], [0] * 6] and not mask[0, 2].any()
    assert tokens[1, 0].tolist() == [S, 1, D, 2, 2, E] and mask[1].sum(-1).tolist() == [6, 5, 5]
    batch = FormBatches(rows, [1, 2]).batch([1, 0], 0)
    assert batch["targets"].tolist() == [2, 1] and batch["tokens"][1].equal(tokens[0])
    assert FormBatches(rows, [1, 2]).lengths == [10, 18]
    assert FormBatches(rows, [1, 2]).fingerprint != FormBatches(rows, [1, 1]).fingerprint


def test_a_tokenizer_gets_the_marks_once_and_puts_them_around_texts(tmp_path: Path) -> None:
    plain = train_tokenizer("bpe", ["the cat sat on a mat"] * 3, 270)
    marked, ids = add_delimiters(plain)
    assert ids == [plain.vocab_size + n for n in range(3)] and marked.vocab_size == plain.vocab_size + 3
    text = marked.encode("the cat")
    assert text == plain.encode("the cat") and marked.encode("the cat", special=True) == [ids[0], *text, ids[2]]
    assert marked.backend.encode("a", "mat").ids == [ids[0], *plain.encode("a"), ids[1], *plain.encode("mat"), ids[2]]
    assert set(ids).isdisjoint(marked.encode("_start_ _delimiter_ _classify_"))  # text that spells them stays text
    assert marked.pad_id == ids[0] and marked.eos_id == plain.eos_id
    again, same = add_delimiters(marked)
    assert same == ids and again.vocab_size == marked.vocab_size
    again.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("the cat", special=True) == [ids[0], *text, ids[2]]
    assert delimiters_of(marked, ids) == Delimiters((ids[0],), (ids[1],), (ids[2],))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat", "a mat")["input_ids"] == marked.backend.encode("the cat", "a mat").ids
    assert theirs.pad_token_id == ids[0]


def test_a_model_without_marks_reads_texts_as_its_tokenizer_makes_them() -> None:
    plain = train_tokenizer("wordpiece", ["the cat sat"] * 3, 60)
    whole = plain.encode("the cat", special=True)
    marks = delimiters_of(plain, (None, None, None))
    assert marks.sequence(plain.encode("the cat")) == whole and len(whole) == len(plain.encode("the cat")) + 2


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


def lines(*rows: object) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def test_tables_of_each_form_are_read(tmp_path: Path) -> None:
    nli = write(tmp_path, "nli.csv", 'premise,hypothesis,label\nIt rains,It is wet,yes\nIt rains,"It, snows",no\n')
    found = read_examples(nli, FORMS["entailment"])
    assert [row.texts for row in found.rows] == [("It rains", "It is wet"), ("It rains", "It, snows")]
    assert found.classes == ("no", "yes") and found.rows[1].where.endswith("nli.csv, line 3")
    other = read_examples(nli, FORMS["similarity"], ("hypothesis", "premise"), "label")
    assert other.rows[0].texts == ("It is wet", "It rains")
    row = {"context": "2 + 2 =", "answers": ["3", "4"], "label": 1}
    letters = write(tmp_path, "c.jsonl", lines(row, row | {"answers": ["4", 5, "6"], "label": "A"}))
    assert [(r.texts[1:], r.label) for r in read_examples(letters, FORMS["choice"]).rows] == [
        (("3", "4"), "1"), (("4", "5", "6"), "0"),
    ]  # fmt: skip
    spread = write(tmp_path, "c.tsv", "q\ta\tb\tc\tright\nWho?\tI\tyou\tall\tC\n")
    found = read_examples(spread, FORMS["choice"], ("q", "a", "b", "c"), "right")
    assert found.rows[0].texts == ("Who?", "I", "you", "all") and found.rows[0].label == "2"
    in_csv = write(tmp_path, "j.csv", 'context,answers,label\nWho?,"[""I"", ""you""]",0\n')
    assert read_examples(in_csv, FORMS["choice"]).rows[0].texts == ("Who?", "I", "you")


CHOICE = {"context": "Who?", "answers": ["I", "you"], "label": 0}


@pytest.mark.parametrize(
    ("form", "rows", "columns", "sentence"),
    [
        ("classification", [{"premise": "a", "hypothesis": "b", "label": 0}], (), "are those of the form entai"),
        ("entailment", [{"text": "a", "label": 0}], (), "has no 'premise' and no 'hypothesis': .* form classification"),
        ("entailment", [{"premise": "a", "hypotesis": "b", "label": 0}], (), "line 1.*Did you mean 'hypotesis'"),
        ("similarity", [CHOICE], (), "those of the form choice"),
        ("similarity", [CHOICE], ("context",), "similarity has 2 columns of text .first, second., not"),
        ("choice", [CHOICE], ("context",), "at least 2 columns"),
        ("choice", [CHOICE, CHOICE | {"answers": "I"}], (), "line 2: the column 'answers' holds 'I' where a list of"),
        ("choice", [CHOICE | {"answers": ["I"]}], (), "line 1: the column 'answers' has 1 answers"),
        ("choice", [CHOICE | {"answers": ["I", ""]}], (), "line 1, answer 1: the column 'answers' is empty"),
        ("choice", [CHOICE | {"answers": "[1,"}], (), "line 1: the column 'answers' is no JSON list"),
        ("choice", [CHOICE | {"label": 2}], (), "line 1: the label '2' names none of the 2 answers.* from A to B"),
        ("choice", [CHOICE | {"label": "you"}], (), "the label 'you' names none"),
        ("choice", [CHOICE | {"label": -1}], (), "the label '-1' names none"),
        ("entailment", [{"premise": "a", "hypothesis": "b", "label": 0}, {"premise": "a", "label": 0}], (),
         "line 2.*'hypothesis'"),
        ("entailment", [{"premise": "a", "hypothesis": ["b"], "label": 0}], (), "line 1: .*'hypothesis' holds a list"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_its_form_is_named_by_line_and_column(
    form: str, rows: list[dict], columns: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        read_examples(write(tmp_path, "t.jsonl", lines(*rows)), FORMS[form], columns)


def test_what_shares_its_first_text_stays_on_one_side() -> None:
    rows = examples("entailment", *((f"premise {n // 3}", f"hypothesis {n}") for n in range(60)))
    training, held = rows.split(12)
    sides = [{row.texts[0] for row in part.rows} for part in (training, held)]
    assert len(training) + len(held) == 60 and len(held) == 12 and sides[0].isdisjoint(sides[1])


@pytest.mark.parametrize(("form", "text"), [("entailment", "a"), ("entailment", "a\tb\tc"), ("choice", "a\tb")])
def test_a_text_with_another_number_of_parts_is_refused(form: str, text: str) -> None:
    with pytest.raises(UserError, match="Text 1 of 1 has . parts, and"):
        examples_of([text], form_of(form))


def test_an_unknown_form_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'entailment'"):
        form_of("entailmant")


def test_the_marked_tokenizer_is_a_tokenizer() -> None:
    assert isinstance(add_delimiters(train_tokenizer("characters", ["abc"], 9))[0], Tokenizer)


def test_a_table_in_another_encoding_names_it_and_is_read_with_it(tmp_path: Path) -> None:
    table = tmp_path / "感想.csv"
    table.write_text("本文,評価\n面白い,良い\nつまらない,悪い\n", encoding="cp932")
    with pytest.raises(UserError, match=r"感想.csv, line 1: .* is not UTF-8: it may be cp932; convert it, as with `ic"):
        read(table, "本文", "評価")
    found = read(table, "本文", "評価", "cp932")
    assert (found.texts, found.classes) == (("面白い", "つまらない"), ("悪い", "良い"))
    assert read_examples(table, form_of("classification"), ("本文",), "評価", "cp932") == found
    with pytest.raises(UserError, match="may be cp932; name it with --encoding cp932, or convert it"):
        read(table, "本文", "評価", "utf-8")
