"""Word errors of Whisper tiny.en on ten recorded sentences, compared with transformers and faster-whisper.

python benchmarks/transcription.py [--weights int8 | --write docs/results/data/sentences.json]

The recordings are those of Debian's package pocketsphinx-testdata: five sentences of LibriVox and five card calls. The
package is downloaded by apt-get and read at run time. Words are compared in lower case, without punctuation. Each
program reads all recordings in turn, and the order of the programs changes; the seconds are printed and not written.
keifu's time is that of native code, as in `keifu transcribe`. faster-whisper is left out if it is not installed. Its
time includes its feature extraction. --weights int8 compares keifu and faster-whisper with 8-bit matrices.
"""

import argparse
import re
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import torch
from _results import write_table
from _rounds import machine

import keifu
from keifu.data.audio.recordings import read_sound
from keifu.data.catalogue.archives import apt_download, read_debian
from keifu.data.catalogue.catalogue import fetch
from keifu.evaluation.text.transcription import word_errors
from keifu.inference.speech.transcription import TranscriptionParams, transcribe

PACKAGE, VERSION = "pocketsphinx-testdata", "0.8+5prealpha+1-15"
PROGRAMS = {"keifu": "keifu", "transformers": "transformers", "faster-whisper": "faster_whisper"}
DIGITS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {"mr": "mister"} | {str(number): word for number, word in enumerate(DIGITS, 2)}


def recordings(folder: Path) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Return sound and words of each recording by name."""
    file = apt_download(PACKAGE, VERSION, f"{PACKAGE}_{VERSION}_all.deb", folder, folder)
    with tarfile.open(fileobj=BytesIO(read_debian(file))) as archive:
        contents = {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and "/data/" in m.name}
    found = {}
    for name, data in contents.items():
        if name.endswith(("librivox/transcription", "cards/cards.transcription")):
            for line in data.decode().splitlines():
                text, _, end = line.rpartition("(")
                sound = f"{name.rpartition('/')[0]}/{end.strip(')')}.wav"
                if sound in contents:
                    found[end.strip(")")] = (read_sound(contents[sound]), words(text))
    return dict(sorted(found.items()))


def words(text: str) -> list[str]:
    """Return the words of a transcript: lower case, no punctuation, digits as words."""
    plain = re.sub(r"<[^>]*>|[^\w' ]+", " ", text.lower().replace("-", " "))
    return [NUMBERS.get(word, word) for word in plain.split()]


def by_keifu(folder: Path, beams: int, weights: str) -> Callable[[torch.Tensor], str]:
    model, tokenizer = keifu.load("whisper-tiny-en")
    keifu.save(model, tokenizer, folder / "saved")
    model, tokenizer = keifu.load("whisper-tiny-en", weights="int8" if weights == "int8" else "own")
    return lambda sound: transcribe(model, tokenizer, sound, TranscriptionParams(beams=beams, fallback=False)).text


def by_transformers(folder: Path, beams: int, weights: str) -> Callable[[torch.Tensor], str]:
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(folder / "saved", dtype=torch.float32)
    extractor, (_, tokenizer) = WhisperFeatureExtractor(), keifu.load(folder / "saved")

    def heard(sound: torch.Tensor) -> str:
        features = extractor(sound.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        ids = model.generate(features, return_timestamps=True, num_beams=beams, max_length=448)[0].tolist()
        return tokenizer.decode([each for each in ids if each < model.config.eos_token_id])

    return heard


def by_faster_whisper(folder: Path, beams: int, weights: str) -> Callable[[torch.Tensor], str]:
    from faster_whisper import WhisperModel

    threads = torch.get_num_threads()
    model = WhisperModel(str(fetch("whisper-tiny-en")), device="cpu", compute_type=weights, cpu_threads=threads)

    def heard(sound: torch.Tensor) -> str:
        settings = {"beam_size": beams, "temperature": 0.0, "condition_on_previous_text": False}
        return "".join(each.text for each in model.transcribe(sound.numpy(), language="en", **settings)[0])

    return heard


def main() -> None:
    """Transcribe, count, print and write the transcripts and the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="data file that gets the table and the transcripts")
    parser.add_argument("--weights", choices=("float32", "int8"), default="float32")
    options = parser.parse_args()
    if options.write and options.weights != "float32":
        parser.error("--write takes the table of float32 alone")
    made = {"keifu": by_keifu, "transformers": by_transformers, "faster-whisper": by_faster_whisper}
    made = {name: make for name, make in made.items() if find_spec(PROGRAMS[name])}
    if options.weights == "int8":
        del made["transformers"]
    with tempfile.TemporaryDirectory() as folder:
        sounds = recordings(Path(folder))
        programs = {name: make(Path(folder), 1, options.weights) for name, make in made.items()}
        seconds = dict.fromkeys(programs, 0.0)
        texts: dict[str, dict[str, str]] = {name: {} for name in programs}
        for number, (name, (sound, _)) in enumerate(sounds.items()):
            order = [*programs][number % len(programs) :] + [*programs][: number % len(programs)]
            for program in order:
                began = time.perf_counter()
                texts[program][name] = programs[program](sound).strip()
                seconds[program] += time.perf_counter() - began
    said = sum(len(expected) for _, expected in sounds.values())
    wrong = {p: sum(word_errors(words(t), sounds[n][1]) for n, t in texts[p].items()) for p in programs}
    length = sum(len(sound) for sound, _ in sounds.values()) / 16_000
    print(f"{machine()}\n{len(sounds)} recordings, {length:.1f} seconds, {said} words")
    for program, count in wrong.items():
        print(f"{program}: {count} wrong words ({count / said:.1%}), {seconds[program]:.1f} s")
    if options.write:
        table = [[program, str(count), f"{count / said:.1%}"] for program, count in wrong.items()]
        columns = ["", f"wrong words, of {said}", "word error rate"]
        values = {"said": {name: " ".join(expected) for name, (_, expected) in sounds.items()}, "heard": texts}
        write_table(options.write, "Transcribing speech", "python benchmarks/transcription.py", columns, table, values)


if __name__ == "__main__":
    main()
