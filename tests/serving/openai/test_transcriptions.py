"""Sound files by OpenAI's own client: every form of answer, and one clear error for what is no sound."""

import io
import socket
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving_toys import WAIT, openai, running, until

from keifu import checkpoints
from keifu.inference.speech.subtitles import FORMATS
from keifu.inference.speech.transcription import TranscriptionParams, transcribe
from keifu.serving.app import Access
from keifu.serving.errors import ApiError
from keifu.serving.worker import Limits

sys.path.append(str(Path(__file__).parents[2] / "inference"))
from speech_toys import published, tokenizer

soundfile = pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return the folder of a Whisper with random weights."""
    path, words = tmp_path_factory.mktemp("speech") / "whisper", tokenizer()
    published(words, 0).save_pretrained(path)
    checkpoints.save(checkpoints.load_model(path), words, path)
    return path


@pytest.fixture(scope="module")
def served(folder):
    with running([str(folder)], Limits(), Access()) as found:
        yield found


def noise(seconds: float) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(0).normal(size=int(seconds * 16_000)) * 0.2
    soundfile.write(file, samples, 16_000, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def sound() -> bytes:
    return noise(2.0)


def test_the_client_gets_the_transcript_in_each_form(served, folder) -> None:
    from keifu.data.audio.recordings import read_sound

    sound = noise(1.0)  # is transcribed nine times
    model, words = checkpoints.load(folder)
    expected = transcribe(model, words, read_sound(sound), TranscriptionParams("en"))
    ask = {"model": "whisper", "file": ("a.wav", sound), "language": "en"}
    create = served.openai.audio.transcriptions.create
    assert create(**ask).text == expected.text
    for form, write in FORMATS.items():
        assert create(**ask, response_format=form) == write(expected)
    whole = create(**ask, response_format="verbose_json", temperature=0)
    assert whole.language == "en" and whole.duration == pytest.approx(1.0) and whole.text == expected.text
    assert [each.tokens for each in whole.segments] == [each.tokens for each in expected.segments]
    translated = transcribe(model, words, read_sound(sound), TranscriptionParams(task="translate"))
    assert served.openai.audio.translations.create(model="whisper", file=("a.wav", sound)).text == translated.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": ("b.wav", b"RIFF nothing")}, "b.wav cannot be read as sound"),
        ({"language": "jp"}, "no language of this model 'jp'. Did you mean 'ja'"),
        ({"temperature": 0.5}, "temperature is not supported by this server"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities is not supported"),
    ],
)
def test_what_cannot_be_transcribed_is_one_error(served, sound, change, message) -> None:
    ask = {"model": "whisper", "file": ("a.wav", sound)} | change
    with pytest.raises(openai.BadRequestError, match=message):
        served.openai.audio.transcriptions.create(**ask)


def test_a_form_without_a_file_and_a_sound_that_is_too_long_are_refused(served, sound, monkeypatch) -> None:
    url = f"{served.url}/v1/audio/transcriptions"
    found = httpx.post(url, data={"model": "whisper"}, files={"model2": (None, "x")}, timeout=WAIT)
    assert found.status_code == 400 and "send the sound as file" in found.json()["error"]["message"]
    monkeypatch.setattr("keifu.serving.openai.transcriptions.SECONDS", 1.0)
    found = httpx.post(url, data={"model": "whisper"}, files={"file": ("a.wav", sound)}, timeout=WAIT)
    assert found.status_code == 400 and "at most 1 seconds" in found.json()["error"]["message"]
    monkeypatch.setattr("keifu.serving.openai.transcriptions.SECONDS", 3.0)
    monkeypatch.setattr("keifu.data.audio.recordings.DENSEST", 10_000)
    found = httpx.post(url, data={"model": "whisper"}, files={"file": ("a.wav", sound)}, timeout=WAIT)
    assert found.status_code == 400 and "30,000 samples of all channels" in found.json()["error"]["message"]


def test_the_decoding_ends_when_the_client_leaves(served, sound, monkeypatch) -> None:
    from keifu.data.audio.recordings import read_sound

    begun, goes_on, ends = threading.Event(), threading.Event(), []

    def read(data, longest, name, go_on):
        begun.set()
        goes_on.wait(WAIT)
        try:
            return read_sound(data, longest, name, go_on)
        except ApiError as error:
            ends.append(error.status)
            raise

    monkeypatch.setattr("keifu.serving.openai.transcriptions.read_sound", read)
    url, ask = f"{served.url}/v1/audio/transcriptions", {"data": {"model": "whisper"}, "files": {"file": ("a", sound)}}
    request = httpx.Request("POST", url, **ask)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port)) as connection:
        connection.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        assert begun.wait(WAIT)
    until(lambda: not served.models.workers["whisper"].pending)
    goes_on.set()
    monkeypatch.undo()
    assert httpx.post(url, **ask, timeout=WAIT).status_code == 200
    assert ends == [499]
