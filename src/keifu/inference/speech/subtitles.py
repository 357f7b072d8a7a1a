"""Transcripts as text, and as the subtitles SRT and WebVTT."""

from collections.abc import Callable

from keifu.inference.speech.transcription import Transcript


def plain(transcript: Transcript) -> str:
    """Return the text alone."""
    return transcript.text + "\n"


def srt(transcript: Transcript) -> str:
    """Return SubRip's format: numbered segments with their times."""
    parts = enumerate(transcript.segments, 1)
    return "\n".join(f"{n}\n{_time(s.start, ',')} --> {_time(s.end, ',')}\n{s.text.strip()}\n" for n, s in parts)


def vtt(transcript: Transcript) -> str:
    """Return WebVTT, the browsers' format."""
    cues = (f"{_time(s.start, '.')} --> {_time(s.end, '.')}\n{_escaped(s.text)}\n" for s in transcript.segments)
    return "\n".join(["WEBVTT\n", *cues])


def _time(seconds: float, point: str) -> str:
    whole_seconds, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{whole_seconds // 3600:02}:{whole_seconds // 60 % 60:02}:{whole_seconds % 60:02}{point}{milliseconds:03}"


def _escaped(text: str) -> str:
    return text.strip().replace("&", "&amp;").replace("<", "&lt;").replace("-->", "--&gt;")


FORMATS: dict[str, Callable[[Transcript], str]] = {"text": plain, "srt": srt, "vtt": vtt}
