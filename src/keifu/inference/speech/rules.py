"""Rules of Whisper's transcripts: special tokens, and the tokens that may follow a partial transcript.

Axes: rows = partial transcripts, written = tokens of each so far, vocab.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, require_known

NO_TIMESTAMPS, PREVIOUS = "<|notimestamps|>", "<|startofprev|>"
_NAMES = """en english zh chinese de german es spanish ru russian ko korean fr french ja japanese pt portuguese
    tr turkish pl polish ca catalan nl dutch ar arabic sv swedish it italian id indonesian hi hindi fi finnish
    vi vietnamese he hebrew uk ukrainian el greek ms malay cs czech ro romanian da danish hu hungarian ta tamil no
    norwegian th thai ur urdu hr croatian bg bulgarian lt lithuanian la latin mi maori ml malayalam cy welsh sk
    slovak te telugu fa persian lv latvian bn bengali sr serbian az azerbaijani sl slovenian kn kannada et
    estonian mk macedonian br breton eu basque is icelandic hy armenian ne nepali mn mongolian bs bosnian kk
    kazakh sq albanian sw swahili gl galician mr marathi pa punjabi si sinhala km khmer sn shona yo yoruba so
    somali af afrikaans oc occitan ka georgian be belarusian tg tajik sd sindhi gu gujarati am amharic yi
    yiddish lo lao uz uzbek fo faroese ps pashto tk turkmen nn nynorsk mt maltese sa sanskrit lb luxembourgish
    my myanmar bo tibetan tl tagalog mg malagasy as assamese tt tatar haw hawaiian ln lingala ha hausa ba
    bashkir jw javanese su sundanese yue cantonese"""
_WORDS = _NAMES.split()
LANGUAGES = {  # language codes by Whisper's names and by other common names
    **dict(zip(_WORDS[1::2], _WORDS[::2], strict=True)), "haitian creole": "ht", "burmese": "my", "valencian": "ca",
    "flemish": "nl", "haitian": "ht", "letzeburgesch": "lb", "pushto": "ps", "panjabi": "pa", "moldavian": "ro",
    "moldovan": "ro", "sinhalese": "si", "castilian": "es", "mandarin": "zh",
}  # fmt: skip
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", PREVIOUS, "<|nospeech|>", NO_TIMESTAMPS)


@dataclass(frozen=True)
class SpeechTokens:
    """Special tokens from generation_config.json. Text has the ids below `end`; time tokens come last.

    languages, tasks: the token of each; empty for a monolingual model.
    """

    start: int
    end: int
    without_times: int
    languages: Mapping[str, int]
    tasks: Mapping[str, int]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    latest_start: int | None
    has_times: bool

    @property
    def times(self) -> int:
        """Token of the time 0. Consecutive time tokens are 0.02 seconds apart."""
        return self.without_times + 1

    @property
    def no_speech(self) -> int:
        """Token for silence."""
        return self.without_times - 1

    def prompt(self, language: str | None, task: str) -> list[int]:
        """Return the tokens that begin a transcript."""
        tokens = [self.start]
        if self.languages and language is not None:
            tokens += [self.languages[language], self.tasks[task]]
        return tokens if self.has_times else [*tokens, self.without_times]

    def code(self, language: str | None) -> str | None:
        """Return the code of a language given by code, name or token. An unknown language is returned unchanged."""
        plain = (language or "").strip("<|>").lower()
        return LANGUAGES.get(plain, plain) or None

    def check(self, language: str | None, task: str) -> None:
        """Raise `UserError` for a language or task that the model does not support."""
        require_known("language of this model", language or "en", self.languages or {"en": 0})
        require_known("task of this model", task, self.tasks or {"transcribe": 0})


def _check_ids(generation_config: Mapping[str, Any], size: int) -> None:
    """Raise `UserError` for an entry of generation_config.json that is not of its kind, or a token that is not in the
    vocabulary of this size."""

    def is_token(value: Any) -> bool:
        return type(value) is int and 0 <= value < size

    def are_tokens(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(map(is_token, value))

    def names_tokens(value: Any) -> bool:
        return isinstance(value, Mapping) and all(map(is_token, value.values()))

    def are_forced(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 and (pair[1] is None or is_token(pair[1]))
            for pair in value
        )

    tokens = f"tokens from 0 to {size - 1:,}"
    kinds = {
        "no_timestamps_token_id": (is_token, f"one of the {tokens}"),
        "lang_to_id": (names_tokens, f"an object with {tokens}"),
        "task_to_id": (names_tokens, f"an object with {tokens}"),
        "suppress_tokens": (are_tokens, f"a list of {tokens}"),
        "begin_suppress_tokens": (are_tokens, f"a list of {tokens}"),
        "forced_decoder_ids": (are_forced, f"a list of pairs of a position and one of the {tokens}"),
        "max_initial_timestamp_index": (is_token, "a whole number within the vocabulary"),
    }
    for name, (is_right, kind) in kinds.items():
        value = generation_config.get(name)
        if value is not None and not is_right(value):
            raise UserError(f"generation_config.json has {name} {str(value)[:60]!r}, which must be {kind}.")


def speech_tokens(config: Any, tokenizer: Tokenizer) -> SpeechTokens:
    """Return the special tokens of a model."""
    generation_config = tokenizer.generation_config
    without_times = generation_config.get("no_timestamps_token_id", tokenizer.backend.token_to_id(NO_TIMESTAMPS))
    _check_ids(generation_config, config.vocab_size)
    if without_times is None:
        raise UserError(f"This tokenizer has no {NO_TIMESTAMPS}, so it is not one of a model that hears.")
    languages = {token.strip("<|>"): number for token, number in generation_config.get("lang_to_id", {}).items()}
    forced = {token for _, token in generation_config.get("forced_decoder_ids") or ()}
    if other_tokens := forced - {
        None,
        without_times,
        *languages.values(),
        *generation_config.get("task_to_id", {}).values(),
    }:
        raise UserError(
            f"generation_config.json has forced_decoder_ids of other tokens, {sorted(other_tokens)}: remove them."
        )
    never, not_first = (
        tuple(generation_config.get(name) or ()) for name in ("suppress_tokens", "begin_suppress_tokens")
    )
    return SpeechTokens(
        config.start_id, config.end_id, without_times, languages, generation_config.get("task_to_id", {}), never,
        not_first, generation_config.get("max_initial_timestamp_index"),
        bool(generation_config.get("return_timestamps", True)),
    )  # fmt: skip


Logits = Float[Tensor, "rows vocab"]


def allow(logits: Logits, output: Int[Tensor, "rows written"], tokens: SpeechTokens) -> Logits:
    """Set the logits of tokens that may not follow to -inf, in place.

    Times never decrease. They come in pairs, the end of a segment and the start of the next, except the first and the
    last. A time token is forced if all time tokens together are more likely than any other token (as in Whisper's
    code).
    """
    logits[:, list(tokens.suppressed)] = -torch.inf
    if not output.shape[1]:
        logits[:, list(tokens.suppressed_first)] = -torch.inf
    if not tokens.has_times:
        return logits
    logits[:, tokens.without_times] = -torch.inf
    times, texts = logits[:, tokens.times :], logits[:, : tokens.times]  # views
    if output.shape[1]:
        is_time = output >= tokens.times
        last, before = is_time[:, -1:], is_time[:, -2:-1] if output.shape[1] > 1 else torch.ones_like(is_time)
        newest = torch.where(is_time, output, tokens.times - 1).amax(1, keepdim=True)
        early = torch.arange(times.shape[1], device=logits.device) + tokens.times <= newest - (last & ~before).long()
        times.masked_fill_(early | (last & before), -torch.inf)
        logits[:, : tokens.end].masked_fill_(last & ~before, -torch.inf)
    else:
        texts.fill_(-torch.inf)
        times[:, len(times[0]) if tokens.latest_start is None else tokens.latest_start + 1 :] = -torch.inf
    chances = logits.log_softmax(-1)
    likelier = chances[:, tokens.times :].logsumexp(-1) > chances[:, : tokens.times].amax(-1)
    texts.masked_fill_(likelier[:, None], -torch.inf)
    return logits
