"""NumPy archives (.npz) as models: g2p-en's weights, which are published in no other form.

The archive has only arrays. This file adds that they are a recurrent encoder-decoder without attention, and the meaning
of each row. Nothing is ever unpickled. The phonemes are ARPAbet's, as in the CMU Pronouncing Dictionary: vowels have a
stress, 0, 1 or 2. Their order is alphabetical, as in g2p-en's weights (Park and Kim, 2019); one vowel also exists
without stress.
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase

import tokenizers
import torch
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from torch import Tensor

from keifu.checkpoints.plan import Source, StoredTensor
from keifu.checkpoints.registry import describe
from keifu.data.tokenizers.seq2seq import TwoSidedTokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer, put_around_text
from keifu.errors import UserError
from keifu.models import seq2seq
from keifu.untrusted import plain_file

NAMES = {
    "source_embedding.weight": "enc_emb",
    "target_embedding.weight": "dec_emb",
    "encoder.forwards.input.weight": "enc_w_ih",
    "encoder.forwards.input.bias": "enc_b_ih",
    "encoder.forwards.recurrent.weight": "enc_w_hh",
    "encoder.forwards.recurrent.bias": "enc_b_hh",
    "decoder.gru.input.weight": "dec_w_ih",
    "decoder.gru.input.bias": "dec_b_ih",
    "decoder.gru.recurrent.weight": "dec_w_hh",
    "decoder.gru.recurrent.bias": "dec_b_hh",
    "head.weight": "fc_w",
    "head.bias": "fc_b",
}
# In the archive, a target's first tokens are <pad>, <unk>, <s>, </s>, and a source's are <pad>, <unk>, </s>. In keifu
# one id ends both sides, so the rows of <s> and </s> of the target are swapped.
SWAPPED = ("dec_emb", "fc_w", "fc_b")
START_ROW, END_ROW = 2, 3
LARGEST = 2**28  # the most bytes of an unpacked archive
NOTE = f"The rows of <s> and </s> in {', '.join(SWAPPED)} were swapped, so that 2 is the end of both sides."
DTYPES = {"float32": torch.float32, "float64": torch.float64}
VOWELS = ["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"]
CONSONANTS = ["CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH", *"BDFGKLMNPRSTVWYZ"]
PHONEMES = sorted([*CONSONANTS, "UW", *(vowel + stress for vowel in VOWELS for stress in "012")])
PAD, UNKNOWN, END, START = "<pad>", "<unk>", "</s>", "<s>"


def open_npz(path: Path) -> Source:
    """Open the model in an archive. Raises UserError for another kind of file, or other arrays than g2p-en's."""
    arrays, config = _read(path), seq2seq.SIZES["g2p-en"]
    missing_names = [name for name in NAMES.values() if name not in arrays]
    if missing_names:
        raise UserError(
            f"{path} is not g2p-en's archive, the only .npz that keifu reads: it lacks {', '.join(missing_names[:5])}; "
            "give weights as safetensors, with a config.json that describes them."
        )
    family, _ = describe(config)
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in arrays.items()}
    stored = {name: StoredTensor(tuple(t.shape), kinds[name], t.dtype) for name, t in arrays.items()}
    return Source(path, "NumPy", family, config, stored, lambda name: _swapped(name, arrays[name]),
                  letters_to_phonemes, NAMES, notes=(NOTE,))  # fmt: skip


def _read(path: Path) -> Mapping[str, Tensor]:
    import numpy as np

    try:
        with zipfile.ZipFile(plain_file(path)) as members:
            if (size := sum(member.file_size for member in members.infolist())) > LARGEST:
                raise UserError(f"{path} would have {size:,} bytes unpacked, and at most {LARGEST:,} are read.")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}  # anything but an array comes as bytes
    except (ValueError, EOFError, OSError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no NumPy archive of plain numbers, or is torn: {error}") from error
    other = [f"{name} as {array.dtype}" for name, array in arrays.items() if str(array.dtype) not in DTYPES]
    if other:
        raise UserError(f"{path} stores {', '.join(other[:5])}, and keifu reads only float32 and float64 there.")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _swapped(name: str, tensor: Tensor) -> Tensor:
    if name not in SWAPPED:
        return tensor
    rows = torch.arange(len(tensor))
    rows[[START_ROW, END_ROW]] = rows[[END_ROW, START_ROW]]
    return tensor[rows]


def letters_to_phonemes() -> TwoSidedTokenizer:
    """Build the tokenizers of letters and phonemes. A word is lowercased and loses its accents; any other character is
    unknown.

    On both sides padding, unknown and end have the ids 0, 1, 2; the token that begins a sequence of phonemes has 3.
    """
    letters = _words([PAD, UNKNOWN, END, *ascii_lowercase], {})
    steps = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    letters.backend.normalizer = normalizers.Sequence(steps)
    letters.backend.pre_tokenizer = pre_tokenizers.FixedLength(1)
    phonemes = _words([PAD, UNKNOWN, END, START, *PHONEMES], {"bos_token": START})
    phonemes.backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TwoSidedTokenizer(letters, phonemes)


def _words(vocabulary: Sequence[str], more_tokens: dict[str, str]) -> Tokenizer:
    """Return a tokenizer whose tokens are whole words, numbered in this order, with an end token after a text."""
    special = {"pad_token": PAD, "unk_token": UNKNOWN, "eos_token": END, **more_tokens}
    backend = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, UNKNOWN))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    put_around_text(backend, special, bos=False, eos=True)
    return Tokenizer(backend, special)
