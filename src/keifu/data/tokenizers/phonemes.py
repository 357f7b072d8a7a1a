"""A tokenizer from English letters to the phonemes of American English: source and target vocabulary.

The phonemes are ARPAbet's as the CMU Pronouncing Dictionary writes them: vowels carry their stress, 0, 1 or 2. Their
order is alphabetical, as in g2p-en's weights (Park and Kim, 2019); one vowel also exists without stress.
"""

from collections.abc import Sequence
from string import ascii_lowercase

import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from keifu.data.tokenizers.seq2seq import TwoSidedTokenizer
from keifu.data.tokenizers.special_tokens import put_around_text
from keifu.data.tokenizers.tokenizer import Tokenizer

VOWELS = ["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"]
CONSONANTS = ["CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH", *"BDFGKLMNPRSTVWYZ"]
PHONEMES = sorted([*CONSONANTS, "UW", *(vowel + stress for vowel in VOWELS for stress in "012")])
PAD, UNKNOWN, END, START = "<pad>", "<unk>", "</s>", "<s>"


def letters_to_phonemes() -> TwoSidedTokenizer:
    """Letters in, phonemes out. Capitals and accents are taken off a word; what else is no letter is unknown.

    Both sides give padding, unknown and end the ids 0, 1, 2; the token that begins a row of phonemes has 3.
    """
    letters = _words([PAD, UNKNOWN, END, *ascii_lowercase], {})
    letters.backend.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    letters.backend.pre_tokenizer = pre_tokenizers.FixedLength(1)
    phonemes = _words([PAD, UNKNOWN, END, START, *PHONEMES], {"bos_token": START})
    phonemes.backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TwoSidedTokenizer(letters, phonemes)


def _words(vocabulary: Sequence[str], more: dict[str, str]) -> Tokenizer:
    """A tokenizer whose tokens are whole words, numbered in this order, with an end token after a text."""
    special = {"pad_token": PAD, "unk_token": UNKNOWN, "eos_token": END, **more}
    backend = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, UNKNOWN))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    put_around_text(backend, special, bos=False, eos=True)
    return Tokenizer(backend, special)
