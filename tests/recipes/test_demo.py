"""The demonstration's first part: what the package of trained models shows, and what is said where it is missing."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from keifu.checkpoints.hub import locate
from keifu.commands.evaluate import training_facts
from keifu.data.catalogue import catalogue
from keifu.data.images.dataset import read_images
from keifu.data.images.splits import split_of_run
from keifu.errors import UserError
from keifu.inference.text.fill import Guess
from keifu.recipes import demo, landmarks
from keifu.recipes.running import run_jobs
from keifu.training.job import Computation, Job


@pytest.mark.usefixtures("drawn_boundaries")
def test_trained_models_are_shown_at_work(capsys: pytest.CaptureFixture) -> None:
    pictures, differing_models = landmarks.show()
    assert not differing_models
    told = capsys.readouterr().out
    assert len(pictures) == len(landmarks.SHOWN)
    for picture in pictures.values():
        width, height = Image.open(io.BytesIO(picture)).size
        assert width >= 200 and height >= 80
    assert "a neuron learns AND in 11 corrections" in told
    assert "0 AND 1 = 0, 1 AND 0 = 0, 1 AND 1 = 1" in told
    assert len(re.findall(r"\d \(\d+%\)", told)) == 9 and "█" in told
    assert "この川の水はとても冷たい。 → This river is very cold." in told
    assert len(re.findall(r"2018, BERT, .* not seen before: .*___.* [a-z]+ \d+%", told)) == len(landmarks.GAPS)
    assert "forms from noise, in 20 steps" in told and "sees in the last one: 7 (" in told
    assert re.search(r"CLIP finds the name of \d of the first and \d of the others", told)


def test_names_that_are_said_to_be_unseen_have_no_relative_in_training() -> None:
    parts = split_of_run(read_images("emoji", 16, 3), training_facts(locate("emoji"))["held_out"])
    learned, unseen = ({*part.texts("en"), *part.texts("ja")} for part in (parts.train, parts.test))
    assert learned.issuperset(landmarks.LEARNED)
    assert unseen.issuperset(landmarks.UNSEEN)


@pytest.mark.slow
def test_sentences_with_a_gap_are_none_of_the_training_documents() -> None:
    """Other sentences may end like them: "... the president of the united states." does."""
    gaps = [re.escape(gap.lower()).replace(re.escape("[mask]"), r"\w+") for gap in landmarks.GAPS]
    known = re.compile(rf"(?:^|[.!?:;\"]\s+|\n)(?:{'|'.join(gaps)})")
    assert known.search("so it is. cook for ten minutes, then add salt.")
    assert not [text for text in catalogue.documents("english-documents") if known.search(text.lower())]


def test_without_the_package_it_goes_on(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "is_cached", lambda name, among: name == "neuron")
    pictures, differing_models = landmarks.show()
    assert ([*pictures], differing_models) == (["1958 a neuron learns AND"], [])
    told = capsys.readouterr().out.splitlines()
    assert told[1].startswith("   0 AND 0 = 0")
    assert told[2:] == [
        "   Left out: network, ja-en, en-ja, bert-en, digits, emoji (pip install ./pretrained brings them)."
    ]


def test_the_packaged_chat_model_answers(capsys: pytest.CaptureFixture) -> None:
    demo._ask("chat-en", "My umbrella is broken. What should I do?")
    asked, *answer = capsys.readouterr().out.splitlines()
    assert asked == "   > My umbrella is broken. What should I do?"
    assert len(re.findall(r"[a-z]+", " ".join(answer))) > 5


@pytest.mark.parametrize(
    ("name", "function", "answer"),
    [
        ("network", "_readings", ["1 (100%)"] * 8),
        ("ja-en", "translate_texts", [[SimpleNamespace(source="川", text="できません")]] * 2),
        ("bert-en", "fill", [[Guess("the", 1, 0.5)]]),
        ("digits", "_readings", ["1 (100%)"]),
    ],
)
def test_a_model_that_answers_otherwise_is_named(
    name: str, function: str, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without these answers none is named: see test_trained_models_are_shown_at_work."""
    monkeypatch.setattr(landmarks, "SHOWN", {name: landmarks.SHOWN[name]})
    monkeypatch.setattr(landmarks, function, lambda *_: answer)
    assert landmarks.show()[1] == [name]


def test_the_demonstration_fails_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What AMX did: every model is shown, and each answer is nonsense."""
    loss = demo.held_out_loss("chat-en")
    assert 0.5 < loss < 0.75 < demo.HIGHEST_LOSS
    monkeypatch.setattr(landmarks, "show", lambda: ({}, ["bert-en"]))
    monkeypatch.setattr(demo, "_ask", lambda name, *questions: ["ance camels"] * len(questions))
    monkeypatch.setattr(demo, "held_out_loss", lambda name: demo.HIGHEST_LOSS + 0.1)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. A dog ran to the house.\n" * 900)
    parts = demo.jobs(demo.Recipe(str(text)))
    assert isinstance(next(parts), Computation) and isinstance(parts.send(None), Job)
    untrained = SimpleNamespace(figures={"validation_loss": 9.9}, directory=tmp_path)
    with pytest.raises(UserError, match="The answers of bert-en, the model that was trained here, smollm2, chat-en"):
        parts.send(untrained)
    monkeypatch.setattr(landmarks, "show", lambda: ({}, []))
    monkeypatch.setattr(demo, "_ask", lambda name, *questions: ["Paris.", "It is Tokyo."])
    monkeypatch.setattr(demo, "held_out_loss", lambda name: loss)
    run_jobs(demo.jobs(demo.Recipe(str(text), 2)), tmp_path / "again")
    assert "Done in" in capsys.readouterr().out


def test_a_character_is_two_pixels() -> None:
    digit = torch.zeros(1, 28, 28)
    digit[0, 0, 0] = digit[0, 3, 2] = 1  # the first line's upper half, the second's lower half
    lines = landmarks._character_picture(digit.flatten(1)).split("\n")
    assert lines[:3] == ["▀" + " " * 13, " ▄" + " " * 12, " " * 14]
