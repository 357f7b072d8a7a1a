"""Transcripts: transformers' tokens and times from the same weights, the rules, the cuts, languages, subtitles."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from speech_toys import SPECIAL, published, tokenizer

from keifu import checkpoints
from keifu.data.audio.log_mel import log_mel
from keifu.errors import UserError
from keifu.inference.speech import transcription
from keifu.inference.speech.rules import LANGUAGES, PREVIOUS, speech_tokens
from keifu.inference.speech.subtitles import FORMATS
from keifu.inference.speech.transcription import Segment, Transcript, TranscriptionParams, cut, transcribe
from keifu.inference.text.beam_search import Hypothesis, Search, beam_search

SPECIAL_END = tokenizer().token_id(SPECIAL[-1])
SOUND = torch.randn(16_000 * 4 - 700, generator=torch.Generator().manual_seed(3)) * torch.linspace(0, 1, 63_300)


@pytest.fixture
def hearing(tmp_path):
    """Make transformers' model and keifu's of the same weights, with the tokenizer."""

    def make(seed: int, several: bool = True):
        words = tokenizer(several)
        reference = published(words, seed)
        reference.save_pretrained(tmp_path)
        return reference, checkpoints.load_model(tmp_path), words

    return make


def without_the_boundary(tokens: list[int]) -> list[int]:
    """Return tokens without the second of two times at the end, which transformers keeps."""
    return tokens[:-1] if min(tokens[-2:]) > SPECIAL_END else tokens


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize("several", [True, False], ids=["languages", "english"])
def test_segments_are_those_of_transformers(hearing, seed, several) -> None:
    reference, model, words = hearing(seed, several)
    features = log_mel(SOUND, 8)[None]
    choice: dict[str, Any] = {"language": "ja", "task": "translate"} if several else {}
    expected = reference.generate(features, return_timestamps=True, return_segments=True, num_beams=1, **choice)
    got = transcribe(model, words, SOUND, TranscriptionParams(**choice, fallback=False))
    theirs = [
        (min(float(each["start"]), got.duration), without_the_boundary(each["tokens"].tolist()))
        for each in expected["segments"][0]
    ]
    assert len(got.segments) > 3 and got.language == ("ja" if several else None)
    assert [(pytest.approx(each.start), each.tokens) for each in got.segments] == theirs


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_language_and_short_sound_are_those_of_transformers(hearing, seed) -> None:
    reference, model, words = hearing(seed)
    features = log_mel(torch.nn.functional.pad(SOUND[40_000:55_000], (0, 1000)), 8)[None]
    expected = reference.detect_language(features, num_segment_frames=100)
    got = transcribe(model, words, SOUND[40_000:55_000], TranscriptionParams(fallback=False))
    assert words.token_id(f"<|{got.language}|>") == int(expected[0])
    kept = reference.generate(features, return_timestamps=True, return_segments=True, language=got.language)
    assert got.segments[0].tokens == without_the_boundary(kept["segments"][0][0]["tokens"].tolist())


@pytest.mark.parametrize(
    "given", ["Japanese", *(pytest.param(given, marks=pytest.mark.slow) for given in ("ja", "<|ja|>", "japanese"))]
)
def test_the_language_of_the_checkpoint_is_taken(hearing, given) -> None:
    _, model, words = hearing(0)
    settled, sound = words.replace(generation_config=words.generation_config | {"language": given}), SOUND[:16_000]
    once = TranscriptionParams(fallback=False)
    japanese = transcribe(model, words, sound, replace(once, language="ja"))
    assert transcribe(model, settled, sound, once) == japanese and japanese.language == "ja"
    assert transcribe(model, settled, sound, replace(once, language="en")).language == "en"


def test_an_unknown_language_of_the_checkpoint_is_refused(hearing) -> None:
    _, model, words = hearing(0)
    unknown = words.replace(generation_config=words.generation_config | {"language": "korean"})
    with pytest.raises(UserError, match="no language of this model 'ko'"):
        transcribe(model, unknown, SOUND)
    damaged = words.replace(generation_config=words.generation_config | {"language": ["ja"]})
    with pytest.raises(UserError, match="no language of this model"):
        transcribe(model, damaged, SOUND)


def test_languages_have_the_names_of_transformers() -> None:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    assert LANGUAGES == TO_LANGUAGE_CODE


def test_an_unlikely_transcript_is_drawn_again(hearing) -> None:
    """Random weights write unlikely transcripts: every temperature is tried, and the last one is kept."""
    _, model, words = hearing(0)
    found = transcribe(model, words, SOUND[:16_000], TranscriptionParams("en"))
    assert found.segments[0].mean_log_probability < transcription.UNLIKELY
    assert {each.temperature for each in found.segments} == {1.0}
    assert found == transcribe(model, words, SOUND[:16_000], TranscriptionParams("en"))
    cold = transcribe(model, words, SOUND[:16_000], TranscriptionParams("en", fallback=False))
    assert {each.temperature for each in cold.segments} == {0.0} and cold.text != found.text


@pytest.mark.parametrize(
    ("text", "score", "no_speech", "tries"),
    [("one two three", -0.5, 0.0, 1), ("one two three", -1.5, 0.0, 6), ("one two " * 20, -0.5, 0.0, 6),
     ("one two three", -1.5, 0.9, 1), ("one two " * 20, -0.5, 0.9, 6)],
)  # fmt: skip
def test_what_is_written_again(monkeypatch, text, score, no_speech, tries) -> None:
    words = tokenizer()
    written = Hypothesis(words.encode(text), score, True)
    begun: list[int] = []

    def begin() -> Any:
        begun.append(1)
        return SimpleNamespace(tokens=SimpleNamespace(end=words.token_id(SPECIAL[0])), no_speech=no_speech)

    monkeypatch.setattr(transcription, "beam_search", lambda *_: [written])
    monkeypatch.setattr(transcription, "draw", lambda *_: written)
    transcription.write_window(begin, words, 9, TranscriptionParams(), 0)
    assert len(begun) == tries


def test_drawn_transcripts_follow_the_rules_and_the_temperature(hearing) -> None:
    _, model, words = hearing(0)
    tokens = speech_tokens(model.config, words)
    memory = model.encode(log_mel(SOUND[:16_000], 8)[None])
    prompt = tokens.prompt("en", "transcribe")

    def decoder() -> Any:
        return transcription.SpeechBeamModel(model, memory, prompt, 36, tokens)

    with torch.inference_mode():
        [greedy] = beam_search(decoder(), Search((tokens.end,), 1, penalty=lambda lengths: lengths), [36])
        cold, warm = (transcription.draw(decoder(), 36, temperature, 0) for temperature in (1e-4, 1.0))
    assert cold.tokens == greedy.tokens and cold.score == pytest.approx(greedy.score, abs=1e-4)
    assert warm.tokens != cold.tokens and warm.tokens[0] >= tokens.times


def test_beams_find_a_likelier_transcript(hearing) -> None:
    _, model, words = hearing(0)
    one, four = (
        transcribe(model, words, SOUND[:16_000], TranscriptionParams("en", beams=beams, fallback=False)).segments[0]
        for beams in (1, 4)
    )
    assert four.mean_log_probability > one.mean_log_probability


def test_previous_text_and_a_prompt_change_what_is_written(hearing) -> None:
    _, model, words = hearing(0)
    plain = transcribe(model, words, SOUND, TranscriptionParams("en", fallback=False))
    with_text = transcribe(model, words, SOUND, TranscriptionParams("en", previous=True, fallback=False))
    prompted = transcribe(model, words, SOUND, TranscriptionParams("en", prompt="one two", fallback=False))
    assert with_text.segments[0].tokens == plain.segments[0].tokens != prompted.segments[0].tokens
    assert with_text.segments != plain.segments


class Written:
    """Decoder that notes the prompt of each window."""

    no_speech = 0.0
    prompts: ClassVar[list[list[int]]] = []

    def __init__(self, model, memory, prompt, longest, tokens, before):
        self.tokens = tokens
        self.prompts.append(list(prompt))


@pytest.mark.parametrize(("length", "room"), [(40, 19), (6, 2), (3, 0), (2, 0)])
@pytest.mark.parametrize("previous", [True, False], ids=["previous", "alone"])
def test_a_prompt_comes_before_the_first_window_and_fits(hearing, monkeypatch, length, room, previous) -> None:
    _, model, words = hearing(0)
    model.config = replace(model.config, context_length=length)
    monkeypatch.setattr(Written, "prompts", [])
    monkeypatch.setattr(transcription, "SpeechBeamModel", Written)
    monkeypatch.setattr(transcription, "beam_search", lambda *_: [Hypothesis([7], 0.0, True)])
    prompt = "one two three four " * 9
    transcribe(model, words, SOUND, TranscriptionParams("en", prompt=prompt, previous=previous, fallback=False))
    past, task = words.encode(" " + prompt.strip()), speech_tokens(model.config, words).prompt("en", "transcribe")
    before = [words.token_id(PREVIOUS)] if room else []
    first, second = ([*tokens][len(tokens) - room :] for tokens in (past, [*past, 7]))
    assert len(past) > 20 and Written.prompts[0] == [*before, *first, *task]
    assert Written.prompts[1] == ([*before, *second, *task] if previous else task)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_caller_can_stop_before_any_token(hearing, beams) -> None:
    _, model, words = hearing(0)
    asked: list[float] = []

    def go_on(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        transcribe(model, words, SOUND[:16_000], TranscriptionParams("en", beams=beams), go_on)
    assert asked == [0.0] * 5  # of the window's beginning and four tokens


def test_unknown_languages_and_other_models_are_refused(hearing) -> None:
    _, model, words = hearing(0)
    with pytest.raises(UserError, match="no language of this model 'jp'. Did you mean 'ja'"):
        transcribe(model, words, SOUND, TranscriptionParams("jp"))
    _, _, english = hearing(0, False)
    with pytest.raises(UserError, match="no language of this model 'ja'"):
        transcribe(model, english, SOUND, TranscriptionParams("ja"))
    with pytest.raises(UserError, match="task of this model 'translate'"):
        transcribe(model, english, SOUND, TranscriptionParams(task="translate"))
    forced = [[1, words.token_id("<|notimestamps|>")], [2, 7]]
    with pytest.raises(UserError, match="forced_decoder_ids of other tokens, .7.: remove them"):
        speech_tokens(model.config, words.replace(generation_config={"forced_decoder_ids": forced}))
    with pytest.raises(UserError, match="A Linear does not hear: choose a Whisper"):
        transcribe(torch.nn.Linear(1, 1), words, SOUND)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_to_id", 3), ("task_to_id", {"transcribe": {}}), ("lang_to_id", ["<|en|>"]), ("suppress_tokens", [2**70]),
        ("suppress_tokens", 3), ("begin_suppress_tokens", [10**6]), ("max_initial_timestamp_index", "50"),
        ("no_timestamps_token_id", "7"), ("no_timestamps_token_id", True), ("forced_decoder_ids", [3]),
    ],
)  # fmt: skip
def test_damaged_settings_of_a_model_are_named(hearing, name: str, value: Any) -> None:
    _, model, words = hearing(0)
    damaged = words.replace(generation_config={**words.generation_config, name: value})
    with pytest.raises(UserError, match=f"generation_config.json has {name} .*, which must be"):
        transcribe(model, damaged, SOUND)


def test_a_window_is_cut_at_pairs_of_times(hearing) -> None:
    _, model, words = hearing(0)
    tokens = speech_tokens(model.config, words)
    at = [tokens.times + n for n in range(51)]
    assert cut([at[0], 7, 8, at[30]], 100, tokens) == ([(0.0, 0.6, [at[0], 7, 8, at[30]])], 100)
    assert cut([at[5], 7], 80, tokens) == ([(0.0, 0.1, [at[5], 7])], 80)
    assert cut([7], 80, tokens) == ([(0.0, 0.8, [7])], 80)
    first = (0.0, 0.4, [at[0], 7, at[20]])
    assert cut([at[0], 7, at[20], at[25], 8, 9], 100, tokens) == ([first], 40)
    assert cut([at[0], 7, at[20], at[25], 8, at[40]], 100, tokens) == ([first, (0.5, 0.8, [at[25], 8, at[40]])], 100)


def test_a_model_without_times_writes_one_segment_a_window(hearing) -> None:
    _, model, words = hearing(0)
    words = words.replace(generation_config=words.generation_config | {"return_timestamps": False})
    found = transcribe(model, words, SOUND, TranscriptionParams("en", fallback=False))
    assert [each.start for each in found.segments] == [0, 1, 2, 3] and found.segments[-1].end == found.duration


def test_subtitles() -> None:
    segments = [Segment(0.0, 1.5, " One & <two>", [1], -0.1, 0.0), Segment(3661.25, 3662.0, " Three.", [2], -0.1, 0.0)]
    transcript = Transcript("One & <two> Three.", "en", 3662.0, segments)
    assert FORMATS["text"](transcript) == "One & <two> Three.\n"
    srt = "1\n00:00:00,000 --> 00:00:01,500\nOne & <two>\n\n2\n01:01:01,250 --> 01:01:02,000\nThree.\n"
    assert FORMATS["srt"](transcript) == srt
    vtt = "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nOne &amp; &lt;two>\n\n01:01:01.250 --> 01:01:02.000\nThree.\n"
    assert FORMATS["vtt"](transcript) == vtt
