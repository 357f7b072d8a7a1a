"""Transcription by a speech model: windows of 30 seconds, one after another, each decoded by beam search.

A window ends where its last complete segment ends, and the next window begins there (Radford et al., 2022, section
4.5). If a transcript repeats itself or is unlikely, tokens are sampled again at higher temperatures. Axes: windows,
mels, frames, rows = partial transcripts, vocab.
"""

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.data.audio.log_mel import FRAMES_PER_SECOND, HOP, RATE, log_mel
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.speech.rules import PREVIOUS, Logits, SpeechTokens, allow, speech_tokens
from keifu.inference.text.beam_search import Hypothesis, Search, beam_search
from keifu.inference.text.model import device_of, evaluation_mode
from keifu.layers.transformer.speech import Memory, SpeechRecognizer
from keifu.native.model import native_form
from keifu.native.targets import NativeHearer, NativeSpeech
from keifu.ranges import Count, check

TIME = 0.02  # seconds between consecutive time tokens
SILENT, UNLIKELY = 0.6, -1.0  # a window is skipped with a higher P(silence) and a lower mean ln P of its transcript
REPEATED = 2.4  # a higher compression ratio means that a transcript repeats itself
TEMPERATURES, DRAWN = (0.2, 0.4, 0.6, 0.8, 1.0), 5  # of further attempts, and number of transcripts drawn in each
WARM = 0.5  # above this temperature the next window does not get the text


@dataclass(frozen=True)
class TranscriptionParams:
    """How sound is transcribed."""

    language: str | None = None
    """Language that is spoken, such as en or Japanese; unset: that of generation_config.json, or the model finds it in
    the first window."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """transcribe, or translate into English."""
    beams: Count = 1
    """Transcripts held open at a time; 1 takes the likeliest token at each step."""
    previous: bool = False
    """Whether each window is given the text of the windows before."""
    prompt: str = ""
    """Text that comes before the first window with speech: names and spellings to expect."""
    fallback: bool = True
    """Whether a transcript that repeats itself or is unlikely is written again, drawn at higher temperatures."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Segment:
    """Part of a transcript: start and end in seconds, its tokens, their mean ln P, and P(silence).

    temperature: of the sampled tokens; 0 for the likeliest ones.
    """

    start: float
    end: float
    text: str
    tokens: list[int]
    mean_log_probability: float
    no_speech: float
    temperature: float = 0.0


@dataclass(frozen=True)
class Transcript:
    """Transcript of `duration` seconds of sound. The language is None for a monolingual model."""

    text: str
    language: str | None
    duration: float
    segments: list[Segment]


def speech_model(model: nn.Module) -> SpeechRecognizer:
    """Return the model. Raises `UserError` if it is not a speech model."""
    if not isinstance(model, SpeechRecognizer):
        raise UserError(f"A {type(model).__name__} does not hear: choose a Whisper, such as whisper-tiny-en.")
    return model


Hearer = SpeechRecognizer | NativeHearer


class SpeechBeamModel:
    """Decoder of one window of sound, whose transcript begins with a prompt. before: called before each token."""

    def __init__(
        self, model: Hearer, memory: Memory, prompt: Sequence[int], longest: int, tokens: SpeechTokens,
        before: Callable[[], object] = lambda: None,
    ):  # fmt: skip
        self.model, self.tokens, self.before = model, tokens, before
        self.state: Any = model.begin(memory, len(prompt) + longest)
        device = memory[0][0].device
        self.output = torch.zeros(1, 0, dtype=torch.long, device=device)
        indices = [prompt.index(tokens.start), len(prompt) - 1]
        start, self._last = model.write(torch.tensor([prompt], device=device), self.state, indices).float().unbind(1)
        self.no_speech = float(start.softmax(-1)[0, tokens.no_speech])

    def first(self) -> Logits:
        return allow(self._last.clone(), self.output, self.tokens)

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits:
        self.before()
        self.output = torch.cat([self.output, tokens[:, None]], 1)
        logits = self.model.write(tokens[:, None], self.state, [0])[:, 0]
        return allow(logits.float().clone(), self.output, self.tokens)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.state.select(rows)
        self.output = self.output[rows.to(self.output.device)]


def transcribe(
    model: nn.Module, tokenizer: Tokenizer, samples: Float[Tensor, " samples"],
    settings: TranscriptionParams = TranscriptionParams(),  # noqa: B008 (it is frozen)
    progress: Callable[[float], object] = lambda _: None,
) -> Transcript:  # fmt: skip
    """Transcribe sound of one channel at 16 kHz. `progress` is called with the finished seconds before each token."""
    torch_model, packed = speech_model(model), native_form(model, NativeSpeech)
    hearer = torch_model if packed is None else NativeHearer(packed, max(settings.beams, DRAWN))
    tokens = speech_tokens(hearer.config, tokenizer)
    default_language = tokenizer.generation_config.get("language") if tokens.languages else None
    language = tokens.code(settings.language or str(default_language or ""))
    tokens.check(language, settings.task)
    window, last = 2 * hearer.config.audio_length, -(-len(samples) // HOP)
    seconds = len(samples) / RATE
    if len(samples) < window * HOP:  # pad short sound with silence
        samples = F.pad(samples, (0, window * HOP - len(samples)))
    features = log_mel(samples, hearer.config.n_mels).to(device_of(model))
    frame, segments = 0, list[Segment]()
    previous_tokens = tokenizer.encode(" " + settings.prompt.strip()) if settings.prompt else []
    past = deque(previous_tokens, max(0, hearer.config.context_length // 2 - 1))
    with evaluation_mode(model), torch.inference_mode():
        while frame < last:
            before = partial(progress, frame / FRAMES_PER_SECOND)
            before()
            heard = F.pad(features[:, frame : frame + window], (0, max(0, frame + window - features.shape[1])))[None]
            memory = hearer.encode(heard)
            if language is None and tokens.languages:
                language = find_language(hearer, memory, tokens)
            previous_tokens = [tokenizer.token_id(PREVIOUS), *past] if past else []
            prompt = [*previous_tokens, *tokens.prompt(language, settings.task)]
            longest = hearer.config.context_length - len(prompt)
            make_model = partial(SpeechBeamModel, hearer, memory, prompt, longest, tokens, before)
            best, no_speech, temperature = write_window(make_model, tokenizer, longest, settings, frame)
            parts, done = cut(best.tokens, min(window, last - frame), tokens)
            for *times, part_tokens in () if silent(best, no_speech) else parts:
                start, end = (min(frame / FRAMES_PER_SECOND + time, seconds) for time in times)
                words = [token for token in part_tokens if token < tokens.end]
                text = tokenizer.decode(words)
                segments.append(Segment(start, end, text, part_tokens, best.score, no_speech, temperature))
                past.extend(words) if settings.previous and temperature <= WARM else past.clear()
            frame += done
    return Transcript("".join(segment.text for segment in segments).strip(), language, seconds, segments)


def silent(hypothesis: Hypothesis, no_speech: float) -> bool:
    """Return whether the window of this transcript is silence."""
    return no_speech > SILENT and hypothesis.score < UNLIKELY


def compression_ratio(text: str) -> float:
    """Return the length of the text divided by its length after zlib compression. Above 2.4 the text repeats itself
    (section 4.5)."""
    return len(data := text.encode()) / len(zlib.compress(data))


def write_window(
    begin: Callable[[], SpeechBeamModel], tokenizer: Tokenizer, longest: int, settings: TranscriptionParams, seed: int
) -> tuple[Hypothesis, float, float]:
    """Return the transcript of a window, P(silence), and the temperature of its tokens.

    begin: returns a new decoder of the window. The transcript at the last temperature is always accepted.
    """
    decoder = begin()
    search = Search((decoder.tokens.end,), settings.beams, penalty=lambda lengths: lengths)
    [best], no_speech, temperature = beam_search(decoder, search, [longest]), decoder.no_speech, 0.0
    for higher in TEMPERATURES if settings.fallback else ():
        text = tokenizer.decode([token for token in best.tokens if token < decoder.tokens.end])
        if silent(best, no_speech) or (best.score >= UNLIKELY and compression_ratio(text) <= REPEATED):
            break
        best, temperature = draw(begin(), longest, higher, seed), higher
    return best, no_speech, temperature


def draw(decoder: SpeechBeamModel, longest: int, temperature: float, seed: int) -> Hypothesis:
    """Sample several transcripts at a temperature. Return the likeliest."""
    logits, end = decoder.first().expand(DRAWN, -1), decoder.tokens.end
    decoder.select(torch.zeros(DRAWN, dtype=torch.long))
    random = torch.Generator(logits.device).manual_seed(seed)
    done, lengths = (torch.zeros(DRAWN, dtype=dtype, device=logits.device) for dtype in (torch.bool, torch.long))
    total, output = torch.zeros(DRAWN, device=logits.device), list[Tensor]()
    while len(output) < longest and not done.all():
        logits = decoder.next(output[-1]) if output else logits
        samples = (logits / temperature).softmax(-1).multinomial(1, generator=random)
        tokens = samples[:, 0].masked_fill(done, end)
        total += logits.log_softmax(-1).gather(1, samples)[:, 0].masked_fill(done, 0.0)
        lengths += ~done
        done |= tokens == end
        output.append(tokens)
    scores = total / lengths.clamp(min=1)
    ids = torch.stack(output, 1)[scores.argmax()].tolist() if output else []
    return Hypothesis([token for token in ids if token != end], float(scores.max()), end in ids)


def find_language(model: Hearer, memory: Memory, tokens: SpeechTokens) -> str:
    """Return the likeliest language of a window."""
    state: Any = model.begin(memory, 1)
    logits = model.write(torch.tensor([[tokens.start]], device=memory[0][0].device), state, [0])[0, 0]
    return max(tokens.languages, key=lambda name: float(logits[tokens.languages[name]]))


def cut(output: Sequence[int], frames: int, tokens: SpeechTokens) -> tuple[list[tuple[float, float, list[int]]], int]:
    """Split a window's transcript into segments (start, end, tokens), in seconds of the window. Also return the number
    of frames done.

    Two consecutive time tokens are a boundary. Text after the last boundary is transcribed again in the next window.
    But if the transcript ends with a single time token, the window contains no more speech.
    """
    is_time = [token >= tokens.times for token in output]
    times = [(token - tokens.times) * TIME for token in output]
    bounds = [index + 1 for index in range(len(output) - 1) if is_time[index] and is_time[index + 1]]
    ends_complete = is_time[-2:] == [False, True]
    if not bounds:
        said = [time for time, there in zip(times, is_time, strict=True) if there and time]
        return [(0.0, said[-1] if said else frames / FRAMES_PER_SECOND, list(output))], frames
    if ends_complete:
        bounds.append(len(output))
    cuts = zip([0, *bounds], bounds, strict=False)
    segments = [(times[first], times[stop - 1], list(output[first:stop])) for first, stop in cuts]
    return segments, frames if ends_complete else max(round(times[bounds[-1] - 1] * FRAMES_PER_SECOND), 1)
