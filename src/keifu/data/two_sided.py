"""A tokenizer of two vocabularies, one for what a model reads and one for what it writes; it knows neither's rules.

In a directory the side that is read stands where any tokenizer does, and the other beside it in target_tokenizer.json,
with the tokens of its roles under "target" in tokenizer_config.json.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from keifu.data.tokenizer_core import Tokenizer
from keifu.data.tokenizer_formats import finish, reader, settings_beside
from keifu.files import write_atomic

SOURCE, TARGET = "tokenizer.json", "target_tokenizer.json"


class TwoSidedTokenizer(Tokenizer):
    """Encodes with one tokenizer and decodes with another; ids that begin, end and pad are those of the second.

    `vocab_size` counts the first one's tokens. Text of the second kind, for training, is encoded by
    `encode_target_batch`.
    """

    def __init__(self, source: Tokenizer, target: Tokenizer):
        super().__init__(target.backend, target.special, target.stop_ids, max_length=target.max_length)
        self.source, self.target, self.vocab_size = source, target, source.vocab_size

    def encode_batch(self, texts: Sequence[str], special: bool = False, allow_special: bool = False) -> list[list[int]]:
        """The ids of each text that the model is to read."""
        return self.source.encode_batch(texts, special, allow_special)

    def encode_target_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The ids of each text that the model is to write."""
        return self.target.encode_batch(texts, special)

    @property
    def sides(self) -> tuple[Tokenizer, Tokenizer]:
        return self.source, self.target

    @property
    def target_vocab_size(self) -> int:
        return self.target.vocab_size

    def save(self, directory: str | Path) -> None:
        """Writes both sides."""
        directory = Path(directory)
        self.source.save(directory)
        write_atomic(directory / TARGET, self.target.backend.to_str(pretty=True))
        settings = directory / "tokenizer_config.json"
        config = json.loads(settings.read_text(encoding="utf-8")) | {"target": self.target.special}
        write_atomic(settings, json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    def __reduce__(self) -> tuple[Any, ...]:
        return TwoSidedTokenizer, (self.source, self.target)

    @cached_property
    def _hash(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint} {self.target.fingerprint}".encode()).hexdigest()


def read_two_sided(directory: Path) -> TwoSidedTokenizer:
    """The tokenizer of a directory that has a target_tokenizer.json."""
    config = settings_beside(directory)
    sides = (directory / SOURCE, config), (directory / TARGET, config.get("target", {}))
    source, target = (finish(reader(path)(path, roles), directory, roles) for path, roles in sides)
    return TwoSidedTokenizer(source, target)
