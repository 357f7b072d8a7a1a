"""keifu train whisper: a model learns to write down recordings, and its evaluation prints the word error rate."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import wiring
from toy_recordings import tones
from wiring import DIFFERENT, Group, Reach

from keifu import checkpoints, cli
from keifu.data.audio import recordings
from keifu.data.audio.recordings import DIGITS, read_recordings
from keifu.errors import UserError
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text.transcription import evaluate, word_errors, words
from keifu.models.speech import whisper as model_file
from keifu.recipes.running import run_jobs
from keifu.recipes.speech import whisper

pytest.importorskip("soundfile")
MODEL = model_file.Config(
    context_length=24, audio_length=20, n_mels=16, dim=32, hidden_dim=64, n_layers=1, n_heads=2
)  # fmt: skip


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tones(tmp_path_factory.mktemp("spoken") / "tones", 72)


def small(folder: Path, model: model_file.Config = MODEL, **changes: Any) -> whisper.Recipe:
    training = replace(whisper.LEARNING, **{"steps": 3, "batch_size": 8, "warmup": 0} | changes)
    return whisper.Recipe(str(folder), 0.25, model=model, training=training)


@pytest.mark.usefixtures("own_cache", "one_thread")
def test_it_learns_to_hear(spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small(spoken, steps=120, batch_size=16, learning_rate=5e-3, evaluate_every=60)
    summary = run_jobs(whisper.jobs(recipe), tmp_path / "run")
    assert summary.figures["validation_word_error_rate"] == 0
    assert "validation word error rate 0" in capsys.readouterr().err
    cli.main(["evaluate", str(tmp_path / "run"), "--on", str(spoken), "--json", "--output", str(tmp_path / "a.jsonl")])
    found = json.loads(capsys.readouterr().out)
    assert found["word error rate"] == 0 and found["recordings"] == 24 and found["recordings without an error"] == 1
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(row["text"] == row["written"] and not row["errors"] for row in rows)
    cli.main(["transcribe", str(tmp_path / "run"), str(spoken / "0.wav"), str(spoken / "1.wav")])
    learned, _ = read_recordings(str(spoken))
    assert capsys.readouterr().out.splitlines() == [each.text for each in learned[:2]]


def test_a_wrong_transcript_is_counted(spoken: Path, tmp_path: Path) -> None:
    untrained, _, _, words = whisper.prepare(small(spoken))
    checkpoints.save(untrained, words, tmp_path)
    model, tokenizer = checkpoints.load(tmp_path)
    found = evaluate(model, tokenizer, EvalRequest(on=str(spoken), limit=5))
    assert found.items is not None and len(found.items.rows) == found.figures["recordings"] == 5
    wrong = sum(row[-1] for row in found.items.rows)
    assert wrong > 0 and found.figures["word error rate"] == round(wrong / found.figures["words"], 4)  # pyright: ignore


@pytest.mark.filterwarnings("error")
def test_a_transcript_without_words_has_no_rate(spoken: Path, tmp_path: Path) -> None:
    model, _, _, tokenizer = whisper.prepare(small(spoken))
    shutil.copy(spoken / "0.wav", tmp_path)
    rows = [{"file_name": "0.wav", "text": text, "part": "test"} for text in ("...", "low")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(model, tokenizer, EvalRequest(on=str(tmp_path))).figures["words"] == 1
    with pytest.raises(UserError, match="has no recordings of words to test on"):
        evaluate(model, tokenizer, EvalRequest(on=str(tmp_path), limit=1))


def test_words_and_errors() -> None:
    assert words("One, two -  THREE. don't") == ["one", "two", "three", "don't"]
    pairs = {("a b c", "a b c"): 0, ("a c", "a b c"): 1, ("", "a b"): 2, ("x a b y", "a b"): 2, ("b a", "a b"): 2}
    assert {pair: word_errors(*(each.split() for each in pair)) for pair in pairs} == pairs


def test_speakers_are_never_on_both_sides(spoken: Path) -> None:
    learned, tested = read_recordings(str(spoken))
    assert (len(learned), len(tested)) == (48, 24)
    _, _, data, _ = whisper.prepare(small(spoken))
    held, others = ({learned[number].speaker for number in part} for part in (data.held_out, data.training))
    assert (len(held), len(others)) == (1, 3) and not held & others


WRONG = {
    "file_name, text must be texts": {"file_name": "a.wav", "text": " "},
    r"file_name, text must be texts, not \['a": {"file_name": "a\0.wav", "text": "one"},
    "the sound file ../a.wav is outside of the folder": {"file_name": "../a.wav", "text": "one"},
    'part must be "train" or "test", not \'tests\'': {"file_name": "a.wav", "text": "one", "part": "tests"},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_row_is_named(sentence: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps(WRONG[sentence]) + "\n")
    with pytest.raises(UserError, match=f"line 1: {sentence}"):
        read_recordings(str(tmp_path))


def test_what_does_not_fit_is_refused(spoken: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 0.3 seconds, and a window 0.2: set --model.audio-length"):
        whisper.prepare(small(spoken, replace(MODEL, audio_length=10)))
    with pytest.raises(UserError, match="has 4 tokens: set --model.context-length"):
        whisper.prepare(small(spoken, replace(MODEL, context_length=3)))


def test_without_espeak_ng_the_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="missing: install Debian's package espeak-ng"):
        read_recordings(DIGITS)
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    with pytest.raises(UserError, match="espeak-ng did not speak '.*status 2.*check how it is installed"):
        read_recordings(DIGITS)[1][0].samples()


def test_other_voices_and_speeds_are_tested() -> None:
    assert not {*recordings.LEARNED[0]} & {*recordings.TESTED[0]}
    assert not {*recordings.LEARNED[1]} & {*recordings.TESTED[1]}


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_the_digits_are_spoken_and_always_the_same() -> None:
    learned, tested = read_recordings(DIGITS)
    assert (len(learned), len(tested)) == (2000, 300)
    # without -D some voices differ from second to second
    assert all("-D" in cast(partial, each.read).args for each in tested)
    one, again = (tested[0].samples() for _ in range(2))
    assert len(one) > 4000 and torch.equal(one, again)
    assert {*tested[0].text.split()} <= {*recordings.WORDS}


def of_whisper(folder: Path) -> tuple[Any, list[Group]]:
    sides = lambda r: (len(r.data.training), len(r.data.held_out))  # noqa: E731
    ids, base = ("vocab_size", "start_id", "end_id", "pad_id"), small(folder)
    rows = {
        "data": Reach(str(tones(folder.with_name("others"), 24)), sides, DIFFERENT),
        "held_out": Reach(0.5, sides, DIFFERENT),
        "vocab_size": Reach(264, "model.config.vocab_size"),
        "model": Reach(replace(MODEL, dim=24, n_mels=20, dropout=0.2), "model.config", but=ids),
        "training": Reach(replace(base.training, steps=41, batch_size=5, seed=4), "settings"),
    }
    return base, [Group(rows)]


TABLE = {"whisper": of_whisper}


@pytest.mark.usefixtures("own_cache", "one_thread")
def test_every_option_reaches_what_it_names(spoken: Path, tmp_path: Path) -> None:
    base, groups = of_whisper(spoken)
    assert not wiring.uncovered(base, groups, {}), "an option without a row in the table above"
    wiring.check(groups, lambda given: wiring.run("whisper", wiring.assign(base, given), tmp_path / "run"))


def test_figures_of_the_paper(spoken: Path, tmp_path: Path) -> None:
    """Table 17: AdamW, its betas, ε, decay and schedule."""
    found = wiring.run("whisper", small(spoken), tmp_path / "run").settings
    assert (found.betas, found.epsilon, found.weight_decay) == ((0.9, 0.98), 1e-6, 0.1)
    assert (found.optimizer, found.schedule, found.final_ratio, found.clip) == ("adamw", "linear", 0.0, 1.0)
