"""Tokenizers learned from text: what each kind can spell, and what it refuses."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers

from keifu.data.tokenizers.load import learned_tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError


def test_bpe_is_what_the_library_itself_learns(corpus, texts) -> None:
    ours = train_tokenizer("bpe", corpus, 700)
    reference = tokenizers.ByteLevelBPETokenizer()
    reference.train_from_iterator(corpus, 700, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False)
    assert ours.vocab_size == 700
    for text in texts:
        assert ours.encode(text) == reference.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert train_tokenizer("bpe", iter(corpus), 700).fingerprint == ours.fingerprint


def test_digits_can_be_split(corpus) -> None:
    numbers = [f"{n} apples" for n in range(1000, 1400)]
    joined, split = (train_tokenizer("bpe", numbers, 400, split_digits=digits) for digits in (False, True))
    assert len(split.encode("1234")) == 4 > len(joined.encode("1234"))
    assert split.decode(split.encode(" 12 and 345")) == " 12 and 345"


def test_unigram_needs_no_spaces_and_knows_every_character(corpus) -> None:
    unigram = train_tokenizer("unigram", corpus, 700)
    japanese = "私は学生です、東京でした。"
    assert len(unigram.encode(japanese)) < 0.7 * len(japanese), "pieces of several characters, without a segmenter"
    for text in (japanese, "  spaces  kept ", "line\nend\tand tab", "unseen: 😀👩‍👧 麤 한"):
        assert unigram.decode(unigram.encode(text)) == text
    assert unigram.decode(unigram.encode("ｆｕｌｌ ①")) == "full 1", "NFKC"
    assert unigram.encode("a", special=True)[0] == unigram.bos_id == 1


def test_wordpiece_follows_bert(corpus) -> None:
    cased, uncased = (train_tokenizer("wordpiece", corpus, 500, lowercase=lower) for lower in (False, True))
    assert uncased.encode("The STATE") == uncased.encode("the state") and cased.encode("STATE") != cased.encode("state")
    assert (cased.pad_id, cased.encode("", special=True)) == (0, [cased.token_id("[CLS]"), cased.token_id("[SEP]")])
    assert cased.decode(cased.encode("学生です。")) == "学 生 です 。", "BERT sets ideographs apart"
    assert cased.encode("麤") == [cased.token_id("[UNK]")]


def test_wordpiece_learns_the_same_tokens_every_time(corpus) -> None:
    rare = "".join(map(chr, range(0x4E00, 0x5200)))  # 1,024 ideographs of equal counts, more than the alphabet may have
    texts = [*corpus[:50], rare]
    first, *others = (train_tokenizer("wordpiece", texts, 1600).fingerprint for _ in range(4))
    assert set(others) == {first}
    assert train_tokenizer("wordpiece", iter(texts), 1600).fingerprint == first


def test_characters_are_those_of_the_text() -> None:
    characters = train_tokenizer("characters", ["hello\n", "日本😀"], 100)
    assert characters.vocab_size == len(set("hello\n日本😀"))
    assert characters.encode("ehl") == sorted(characters.encode("hle")), "numbered in the characters' own order"
    assert characters.decode(characters.encode("日本\nhello😀")) == "日本\nhello😀"
    with pytest.raises(UserError, match=r"'é' \(U\+00E9, at place 1\) is not in this tokenizer's vocabulary of 8"):
        characters.encode("hé")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters"])
def test_special_tokens_are_added_and_kept_out_of_text(kind, corpus) -> None:
    tokenizer = train_tokenizer(kind, corpus + ["<|turn|>"], 900, special_tokens=["<|turn|>"])
    turn = tokenizer.token_id("<|turn|>")
    assert turn in tokenizer.special_ids and turn not in tokenizer.encode("a<|turn|>")
    assert tokenizer.encode("<|turn|>", allow_special=True) == [turn] and tokenizer.decode([turn]) == ""


@pytest.mark.parametrize(
    "kind, size, options, message",
    [
        ("bpe", 256, {}, "vocab_size=256 is too small: bpe needs at least 257 tokens"),
        ("unigram", 259, {}, "unigram needs at least 260 tokens"),
        ("unigram", 270, {}, "vocab_size=270 is too small"),
        ("wordpiece", 20, {}, "vocab_size=20 is too small: wordpiece needs at least"),
        ("characters", 20, {}, "characters needs at least"),
        ("bpw", 500, {}, "no kind of tokenizer 'bpw'. Did you mean 'bpe'"),
        ("unigram", 500, {"split_digits": True}, "split_digits belongs to the kind bpe, not to unigram"),
        ("bpe", 500, {"lowercase": True}, "lowercase belongs to the kind wordpiece"),
    ],
)
def test_impossible_wishes_are_refused(kind, size, options, message, corpus) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(kind, corpus, size, **options)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters"])
@pytest.mark.parametrize("nothing", [[], ["", ""]])
def test_no_text_is_refused(kind, nothing) -> None:
    with pytest.raises(UserError, match="no text to learn a tokenizer from"):
        train_tokenizer(kind, nothing, 500)


def test_errors_of_the_texts_come_through() -> None:
    def broken():
        yield "some text"
        raise UserError("line 7 is not UTF-8.")

    with pytest.raises(UserError, match="line 7 is not UTF-8"):
        train_tokenizer("bpe", broken(), 300)


def test_of_several_processes_one_learns_and_the_others_take_its_tokenizer(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    monkeypatch.setattr("keifu.data.tokenizers.load.LEARNED", {})
    learned = []

    def learn():
        learned.append(train_tokenizer("characters", ["abc"[: 1 + len(learned)]], 9))
        time.sleep(0.2)
        return learned[-1]

    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda _: learned_tokenizer("characters-9", learn), range(2))]
    assert len(learned) == 1 and {each.fingerprint for each in found} == {learned[0].fingerprint}
