"""The tab Listen in a real browser: a file and the microphone, in both languages."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_toys import WAIT, running

from keifu import checkpoints
from keifu.data.audio.recordings import read_sound
from keifu.inference.speech.transcription import transcribe
from keifu.serving.app import Access
from keifu.serving.worker import Limits

sys.path.append(str(Path(__file__).parents[1] / "inference"))
from speech_toys import published, tokenizer

pytestmark = pytest.mark.slow
soundfile = pytest.importorskip("soundfile")


SHAPES = [(1280, "en-GB", "Did you mean"), (390, "ja", "言語 jp はありません")]


@pytest.mark.parametrize(("width", "locale", "failed"), SHAPES)
def test_a_file_and_a_recording_are_written_down(browser: Any, tmp_path: Path, width: int, locale: str, failed: str):
    words = tokenizer()
    published(words, 0).save_pretrained(tmp_path / "whisper")
    checkpoints.save(checkpoints.load_model(tmp_path / "whisper"), words, tmp_path / "whisper")
    noise = np.random.default_rng(0).normal(size=40_000) * 0.2
    soundfile.write(tmp_path / "a.wav", noise, 16_000)
    with running([str(tmp_path / "whisper")], Limits(), Access(runs=tmp_path / "no-runs")) as served:
        context = browser.new_context(viewport={"width": width, "height": 800}, locale=locale)
        context.set_default_timeout(WAIT * 1000)
        page = context.new_page()
        page.goto(f"{served.url}/#listen")
        page.wait_for_selector("#listen:visible")
        page.click("#listen form button:not([type])")
        page.wait_for_selector("#listen .told.error")
        page.set_input_files("#listen [name=sound]", tmp_path / "a.wav")
        page.click("#listen form button:not([type])")
        page.wait_for_selector("#listen .spoken")
        model, _ = checkpoints.load(tmp_path / "whisper")
        expected = [each.text.strip() for each in transcribe(model, words, read_sound(tmp_path / "a.wav")).segments]
        assert page.eval_on_selector_all("#listen .spoken span", "all => all.map(each => each.textContent)") == expected
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.querySelector('#listen audio').src").startswith("blob:")
        page.fill("#listen [name=spoken]", "jp")
        page.click("#listen form button:not([type])")
        page.wait_for_function("text => document.querySelector('#listen .told').innerText.includes(text)", arg=failed)
        context.close()
