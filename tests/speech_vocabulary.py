"""Tokenizers of transcripts for toys of Whisper."""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken

from keifu.data.tokenizers.bpe import byte_level_backend
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.generation.speech.rules import NO_TIMESTAMPS, SPECIAL


def learn_tokenizer(texts: Iterable[str], vocab_size: int, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """Learn a byte-level BPE of transcripts; its special tokens, which end with `<|notimestamps|>`, follow its text.

    `vocab_size` counts text and special tokens, at least 256 bytes and those. Its models write no times.
    """
    learned = train_tokenizer("bpe", texts, max(vocab_size - len(special), 256) + 1)
    parts = learned.description()["model"]
    backend = byte_level_backend(
        {token: n - 1 for token, n in parts["vocab"].items() if n}, map(tuple, parts["merges"])
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ends = {f"{role}_token": special[0] for role in ("bos", "eos", "pad")}
    settings = {"no_timestamps_token_id": backend.token_to_id(NO_TIMESTAMPS), "return_timestamps": False}
    return Tokenizer(backend, ends, generation_config=settings | {"is_multilingual": False})
