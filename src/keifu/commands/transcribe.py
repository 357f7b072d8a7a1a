"""`keifu transcribe`: transcribes sound files as text, JSON or subtitles."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from keifu.commands.shared import flags
from keifu.commands.shared.terminal import say
from keifu.errors import UserError
from keifu.ranges import Count


@dataclass(frozen=True)
class Options(flags.Packed):
    """Transcribe speech by a Whisper, such as whisper-tiny-en. The files are WAV, FLAC, MP3 or Ogg, of any length."""

    model: flags.Model
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE...", help="The sound files.")]
    format: Literal["text", "json", "srt", "vtt"] = "text"
    """Form of the transcript; json has a line for each file, with segments, their seconds and probabilities."""
    language: str | None = None
    """Language that is spoken, such as en or Japanese; unset: that of generation_config.json, or the model finds it in
    the first window."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """transcribe, or translate into English."""
    beams: Count = 1
    """Transcripts that are open at a time; 1 takes the likeliest token at each step."""
    previous: bool = False
    """Whether each window of 30 seconds is given the text of the windows before."""
    prompt: str = ""
    """Text that comes before the first window with speech: names and spellings to expect."""
    fallback: bool = True
    """Whether a transcript that repeats itself or is unlikely is written again, drawn at higher temperatures."""


def run(options: Options) -> None:
    """Print the transcript of each file. All files are read before the model is loaded."""
    if not options.files:
        raise UserError("keifu transcribe needs FILE...: see keifu transcribe --help.")
    if options.language is not None and not options.language.strip():
        raise UserError("--language is empty: name the language, such as en or Japanese, or leave it out.")
    from keifu.checkpoints import load
    from keifu.data.audio.recordings import read_sound
    from keifu.inference.speech.subtitles import FORMATS
    from keifu.inference.speech.transcription import TranscriptionParams, speech_model, transcribe

    settings = TranscriptionParams(
        options.language, options.task, options.beams, options.previous, options.prompt, options.fallback
    )
    sounds = [read_sound(file) for file in options.files]
    model, tokenizer = load(options.model, weights=options.weights or "own")
    speech_model(model)
    for file, samples in zip(options.files, sounds, strict=True):
        transcript = transcribe(model, tokenizer, samples, settings)
        line = json.dumps({"file": str(file), **asdict(transcript)}, ensure_ascii=False) + "\n"
        say(line if options.format == "json" else FORMATS[options.format](transcript), end="")
