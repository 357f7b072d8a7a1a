"""The catalogue: its table holds together, its readers read, and small entries arrive from the network."""

import gzip
import json
from pathlib import Path

import pytest

from keifu.data.catalogue import catalogue, readers
from keifu.data.catalogue.catalogue import CATALOGUE
from keifu.data.classification import examples
from keifu.errors import UserError

NAMES = {
    "weights": {"smollm2", "minilm", "g2p-en"},
    "text": {"english", "sotu", "wiki-summaries", "recipes", "tatoeba-en", "tatoeba-ja-en", "chitchat"},
    "tokenizer": {"gpt2-bpe", "clip-bpe", "sentencepiece-32k"},
    "pictures": {"emoji", "openmoji", "mnist", "fashion-mnist", "photos"},
    "questions": {"easy-vqa"},
    "part": {"twemoji", "openmoji-svg", "emoji-names", "emoji-groups"},
    "font": {"japanese-font"},
}
TATOEBA = """1\tはい。\tYes.\t-\tJa.\t-\t-\t-\t-
2\tうん。\tYes.\t-\t-\t-\t-\t-\t-
3\t雨だ。\t-\t-\tEs regnet.\t-\t-\t-\tsomebody
"""
PLAY = "# Hamlet\n\n_Enter two\nguards_\n\n**BERNARDO**  \nWho's \\there?  \n_Exit_\n\n**FRANCISCO**  \nNay.\n"
DIALOGUES = "\ufeffconversations:\n- - more?\n  - no\n- alone - x\n- - more?\n  - no\n"


@pytest.mark.parametrize("kind", NAMES)
def test_every_promised_name_is_there(kind: str) -> None:
    assert NAMES[kind] <= {name for name, entry in CATALOGUE.items() if entry.kind == kind}


@pytest.mark.parametrize("name", CATALOGUE)
def test_entry_is_consistent(name: str) -> None:
    entry = CATALOGUE[name]
    assert entry.licence and entry.attribution and entry.about and entry.kind in NAMES
    assert bool(entry.gives) == (entry.kind == "text") == (entry.reader is not None or "text" in kinds_of(entry))
    assert [entry.archive is not None, *map(bool, (entry.parts, entry.place, entry.package))].count(True) == 1
    assert all(part in CATALOGUE and not CATALOGUE[part].parts for part in entry.parts)
    if entry.archive:
        assert len(entry.archive.sha256) == 64 and int(entry.archive.sha256, 16)
        targets = [target for _, target in entry.archive.members]
        targets = targets or [entry.archive.file]  # kept whole
        assert entry.member == "." or entry.member in targets or f"{entry.member}/" in targets


def kinds_of(entry: catalogue.Entry) -> set[str]:
    return {CATALOGUE[part].kind for part in entry.parts}


def test_rows_tell_what_is_fetched_and_what_a_mixture_costs(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    (tmp_path / CATALOGUE["sotu"].archive.folder).mkdir()
    rows = {row["name"]: row for row in catalogue.rows()}
    assert rows.keys() == CATALOGUE.keys()
    assert (rows["sotu"]["fetched"], rows["recipes"]["fetched"], rows["english"]["fetched"]) == ("yes", "no", "no")
    assert rows["english"]["download"] == "86.0 MB"


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UserError, match="no catalogue entry 'smolm2'. Did you mean 'smollm2'"):
        catalogue.fetch("smolm2")


@pytest.mark.parametrize(
    ("read", "name", "wanted"),
    [(catalogue.pairs, "sotu", "pairs"), (catalogue.conversations, "tatoeba-ja-en", "conversations")],
)
def test_the_wrong_kind_of_text_is_refused(read, name: str, wanted: str) -> None:
    with pytest.raises(UserError, match=f"{name!r} does not hold {wanted}; these do: "):
        list(read(name))


def test_weights_hold_no_text() -> None:
    with pytest.raises(UserError, match="'smollm2' does not hold text; these do: sotu"):
        list(catalogue.documents("smollm2"))


@pytest.fixture
def _fetched(monkeypatch, tmp_path: Path) -> None:
    """Fill a cache with tiny files instead of the real ones."""
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    talk = [[said("Hi", 1), said("there", 1)], [said("Hello", 2)]] * 2
    chats = {"a": {"messages": talk}, "too short": {"messages": talk[:3]}}
    article = {"title": "X", "extract": "It is."}
    recipe = {"title": "Tea", "ingredients": ["water", "leaves"], "steps": ["Boil.", "Wait."]}
    contents = {
        "sotu": ("1790-b.txt", "Second\n"), "wiki-summaries": ("", json.dumps({"X": article})),
        "recipes": ("", json.dumps({"Cookbook:Tea": recipe})), "chitchat": ("", json.dumps(chats)),
        "tatoeba-en": ("", TATOEBA), "shakespeare": ("hamlet.md", PLAY), "chatterbot": ("a.yml", DIALOGUES),
    }  # fmt: skip
    for name, (file, content) in contents.items():
        path = tmp_path / CATALOGUE[name].archive.folder / CATALOGUE[name].member / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
    (path.parent.parent / "japanese").mkdir()
    (tmp_path / CATALOGUE["sotu"].archive.folder / "speeches" / "1789-a.txt").write_text("First\n")


def said(text: str, sender: int) -> dict:
    return {"text": text, "sender": sender}


@pytest.mark.usefixtures("_fetched")
def test_documents_of_each_kind() -> None:
    assert list(catalogue.documents("sotu")) == ["First", "Second"]
    assert list(catalogue.documents("wiki-summaries")) == ["X\n\nIt is."]
    tea = "Tea\n\nIngredients:\n- water\n- leaves\n\nSteps:\n1. Boil.\n2. Wait."
    assert list(catalogue.documents("recipes")) == [tea]
    assert list(catalogue.documents("shakespeare")) == ["BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay."]
    assert list(catalogue.documents("tatoeba-en")) == ["Yes."]
    assert list(catalogue.documents("tatoeba-ja-en")) == ["はい。\nYes.", "うん。\nYes."]
    assert list(catalogue.documents("chitchat")) == ["A: Hi\nthere\nB: Hello\nA: Hi\nthere\nB: Hello"]
    assert list(catalogue.documents("chatterbot")) == ["A: more?\nB: no"]


@pytest.mark.usefixtures("_fetched")
def test_a_mixture_is_its_parts_one_after_the_other() -> None:
    parts = [list(catalogue.documents(part)) for part in CATALOGUE["english"].parts]
    assert list(catalogue.documents("english")) == sum(parts, []) and len(parts) == 5


@pytest.mark.usefixtures("_fetched")
def test_pairs_and_conversations() -> None:
    assert list(catalogue.pairs("tatoeba-ja-de")) == [("はい。", "Ja."), ("雨だ。", "Es regnet.")]
    (chat,) = catalogue.conversations("chitchat")
    assert [turn["role"] for turn in chat] == ["user", "assistant", "user", "assistant"]
    assert chat[0]["content"] == "Hi\nthere"


def test_python_code_is_decoded_as_declared_and_without_tests(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text("left out")
    (tmp_path / "b.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    assert list(readers.python_files(tmp_path)) == ["# coding: latin-1\nname = 'é'\n"]
    assert any("def " in text for text, _ in zip(catalogue.documents("python-code"), range(5), strict=False))


def test_small_entries_arrive(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    try:
        folder = catalogue.fetch("gpt2-bpe")
    except UserError as error:
        if "gave no file" in str(error):
            pytest.skip(str(error))
        raise
    assert len(json.loads((folder / "vocab.json").read_text("utf-8"))) == 50_257
    assert catalogue.fetch("g2p-en").stat().st_size == 3_342_298


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_arrives_and_reads(name: str) -> None:
    assert catalogue.fetch(name).exists() and catalogue.is_cached(name)
    if CATALOGUE[name].gives:
        assert all(text.strip() for text in catalogue.documents(name))


def test_no_summary_that_topics_are_tested_on_is_in_the_training_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "HELD_OUT_ARTICLES", 12)
    file = tmp_path / "summaries.json"
    articles = {f"T{n}": {"title": f"T{n % 35}", "extract": "It is.", "topic": f"{n % 3}"} for n in range(40)}
    file.write_text(json.dumps(articles))
    whole = list(readers.summaries(file))
    rows = tuple(examples.Example("it", (text,), f"{n % 3}") for n, text in enumerate(whole))
    _, held = examples.Examples("it", rows).split(12)
    learned = set(readers.untested_summaries(file))
    assert len(held.texts) in (11, 12) and not learned & set(held.texts)
    assert len(learned) >= 22 and learned < set(whole)


def test_a_dictionary_gives_common_nouns(tmp_path: Path) -> None:
    def entry(kanji: str, kana: str, *rest: str) -> str:
        forms = [f"<keb>{kanji}</keb>"] * bool(kanji) + [f"<reb>{kana}</reb>"]
        return "\n".join(["<entry>", *forms, *rest, "</entry>"])

    goose = entry("鵝鳥", "ガチョウ", "<pos>&n;</pos>", "<misc>&uk;</misc>", "<gloss>goose</gloss>")
    cat = entry("猫", "ねこ", "<ke_pri>ichi1</ke_pri>", "<pos>&n;</pos>", "<gloss>cat (esp. a tame one)</gloss>",
                "<gloss>shamisen</gloss>", '<gloss xml:lang="ger">Katze</gloss>', "<gloss>geisha</gloss>")  # fmt: skip
    rare = entry("稀語", "きご", "<pos>&n;</pos>", "<gloss>rarity</gloss>")
    long = entry("", "ラング", "<re_pri>gai1</re_pri>", "<pos>&n;</pos>", "<gloss>one of three words</gloss>")
    file = tmp_path / "jmdict.xml.gz"
    file.write_bytes(gzip.compress("\n".join([goose, cat, rare, long]).encode()))
    assert [*readers.dictionary(file)] == [("鵝鳥", "goose"), ("ガチョウ", "goose"), ("猫", "cat"), ("猫", "shamisen")]
