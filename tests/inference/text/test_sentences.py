"""Texts cut into sentences and put together again, in Latin script and in Japanese."""

import pytest

from keifu.inference.text.translation import join_sentences, sentences

CUT = {
    "one": ["This is a pen."],
    "two": ["This is a pen.", "Is it yours?"],
    "Japanese": ["これはペンです。", "君のですか？", "違う！"],
    "half-width in Japanese": ["Tomは3.5キロ走った。", "OK!行こう。"],
    "a quotation inside": ["「疲れた。もう寝る。」と彼は言った。", "皆が笑った。"],
    "a quotation at the end": ["「疲れた。」", "彼は寝た。"],
    "brackets": ["He left (he was tired. Very.) at noon.", "She stayed."],
    "quotes": ['"Go away!" he said.', '"No."', "They stayed."],
    "abbreviations": ["Mr. Smith met Dr. Jones at No. 5 St. James St. on Jan. 3.", "It rained."],
    "initials": ["J. R. R. Tolkien wrote it, e.g. That is known.", "Yes."],
    "numbers": ["It costs 3.50 dollars.", "2 of them cost 7."],
    "no capital": ["I like it... sometimes.", "Really?!", "Yes."],
    "no mark at the end": ["First.", "And then"],
    "an open bracket that nothing closes": ["「違う。", "違わない。"],
    "dots": ["...", "Well."],
}


@pytest.mark.parametrize("name", CUT)
def test_sentences_are_cut_and_nothing_is_lost(name: str) -> None:
    expected = CUT[name]
    text = "".join(part if part[0] > "\u2e80" and n else f" {part}" for n, part in enumerate(expected))
    found = sentences(text + " ")
    assert found == expected
    assert "".join("".join(found).split()) == "".join(text.split())


def test_a_text_of_spaces_has_none() -> None:
    assert sentences("") == sentences(" \u3000 ") == []


def test_the_mark_of_a_language_stands_before_each_sentence() -> None:
    assert sentences(">>fra<< This is. That is.") == [">>fra<< This is.", ">>fra<< That is."]


def test_long_texts_take_time_in_proportion() -> None:
    assert len(sentences("「あ。」い。" * 3000)) == 6000
    assert len(sentences("Well, yes. " * 3000)) == 3000


def test_joined_with_spaces_where_the_script_has_them() -> None:
    assert join_sentences(["A pen.", " Is it?", ""]) == "A pen. Is it?"
    assert join_sentences(["ペンです。", "そうですか。"]) == "ペンです。そうですか。"
    assert join_sentences(["OK.", "そうですか。"]) == "OK.そうですか。"
    assert join_sentences([]) == ""
