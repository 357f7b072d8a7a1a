"""Constraints of an answer: a grammar, for example of a JSON schema, defines the allowed tokens at each position
(llguidance)."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.serving.errors import ApiError
from keifu.serving.openai.json_schema import checked

# Otherwise a small model might write endless white space.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
BITS = torch.arange(8, dtype=torch.uint8)


class GrammarConstraint:
    """Constraint of one text. vocab_size: of the model; its last ids may be missing in the tokenizer."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size

    def allowed(self) -> Bool[Tensor, " vocab"]:
        """Return a mask of the tokens that may come next. At the end of the grammar, these are the tokens that end the
        text."""
        packed = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        mask = ((packed[:, None] >> BITS) & 1).bool().flatten()[: self.vocab_size]
        return torch.nn.functional.pad(mask, (0, self.vocab_size - len(mask)))

    def accept(self, token: int) -> None:
        """Advance the grammar's state by this token."""
        self.matcher.consume_token(token)


@lru_cache(maxsize=16)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """Convert the tokenizer for llguidance, which takes a second."""
    return LLTokenizer(
        json.dumps(tokenizer.description()), n_vocab=tokenizer.vocab_size, eos_token=[*tokenizer.stop_ids]
    )


class Grammar(NamedTuple):
    """Grammar of a text in llguidance's format, and the request's field for which it was made."""

    source: str
    field: str


def schema_grammar(schema: Any) -> Grammar:
    """Return the grammar of JSON that follows a schema. See `json_schema.checked` for unsupported schemas."""
    grammar_schema = checked(schema, "response_format")
    return Grammar(LLMatcher.grammar_from_json_schema(grammar_schema, overrides=LAYOUT), "response_format")


def constraints(grammar: Grammar, tokenizer: Tokenizer, vocab_size: int) -> Callable[[], GrammarConstraint]:
    """Return a function that creates a constraint for each text.

    Raises `ApiError`, with the reason, for a schema that cannot be satisfied or has unsupported keywords.
    """
    if not tokenizer.stop_ids:
        text = "This model has no token that ends a text, so none can be held to a schema: choose another model."
        raise ApiError(400, text, grammar.field, "no_end_token")
    vocabulary = _vocabulary(tokenizer)
    wrong, reasons = LLMatcher.validate_grammar_with_warnings(grammar.source, vocabulary)
    if wrong:
        reason = " ".join(" ".join(reasons).split()).rstrip(".")
        raise ApiError(400, f"The schema cannot be followed: {reason}.", grammar.field, "invalid_schema")
    return lambda: GrammarConstraint(LLMatcher(vocabulary, grammar.source), vocab_size)
