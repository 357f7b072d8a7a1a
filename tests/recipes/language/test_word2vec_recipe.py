"""The recipe of word vectors: the words of a text in another encoding, and the samples."""

from pathlib import Path

import torch

from keifu.recipes.language import word2vec


def test_a_text_in_another_encoding_has_the_same_words(tmp_path: Path) -> None:
    line = "猫 は 犬 を 見る 犬 は 猫 を 見る\n"
    read = []
    for encoding in ("utf-8", "cp932"):
        path = tmp_path / f"{encoding}.txt"
        path.write_text(line * 200, encoding=encoding)
        recipe = word2vec.Recipe(str(path), encoding=encoding, neighbours=word2vec.NeighbourRules(sample=1.0))
        tokenizer, pairs, counts = word2vec.prepare(recipe)
        assert len(pairs.training) + len(pairs.held_out) == sum(counts) == 2000
        read.append((tokenizer.backend.get_vocab(), pairs.training.tolist()))
    assert read[0] == read[1]


def test_the_sample_of_a_word_in_capitals_is_that_of_the_word(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the king and the queen of france\n" * 200)
    tokenizer, *_ = word2vec.prepare(word2vec.Recipe(str(tmp_path / "text.txt")))
    torch.manual_seed(0)
    model = word2vec.word2vec.build(word2vec.word2vec.Config(tokenizer.vocab_size, 4))
    lines = word2vec.sampler(model, tokenizer, ("king", "France", "zebra"))(0).splitlines()
    assert lines[2] == "zebra: not in the vocabulary" and lines[1].startswith("France: ")
    assert all("king" not in line.partition(": ")[2] for line in lines[:1]), "a word is not near itself"
    assert lines[1] == word2vec.sampler(model, tokenizer, ("france",))(0).replace("france: ", "France: ")
