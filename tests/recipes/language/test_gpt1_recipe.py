"""`keifu train gpt1`: the paper's figures, and a run that is saved as transformers' openai-gpt and fine-tuned."""

import json
from pathlib import Path

import pytest
import torch

import keifu
from keifu.cli import main
from keifu.errors import UserError
from keifu.recipes.language import gpt1
from keifu.recipes.language.gpt1 import Recipe

SIZES = ("--model.context-length", "16", "--model.dim", "16", "--model.n-layers", "1", "--model.n-heads", "2")


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    torch.set_num_threads(1)


def test_the_papers_way_is_the_papers() -> None:
    recipe = Recipe(recipe_of="paper", model=gpt1.gpt1.Config())
    found = gpt1.choose_settings(recipe, 64 * 512 * 1000)
    assert (found.steps, found.batch_size, found.warmup) == (100_000, 64, 2000)
    assert (found.learning_rate, found.schedule, found.final_ratio) == (2.5e-4, "cosine", 0.0)
    assert (found.weight_decay, found.betas, found.optimizer) == (0.01, (0.9, 0.999), "adamw")
    assert gpt1.choose_settings(Recipe(recipe_of="paper", steps=50), 10**6).warmup == 50
    assert [gpt1.choose_settings(each, 16 * 256 * 30).steps for each in (Recipe(), Recipe(epochs=0.5))] == [600, 15]


def test_no_epochs_are_refused() -> None:
    with pytest.raises(UserError, match="epochs must be above 0, not -1.0"):
        Recipe(epochs=-1.0)


@pytest.mark.parametrize("of", ["keifu", "paper"])
def test_what_it_trains_is_openai_gpt_and_can_be_fine_tuned(
    of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    text, table = tmp_path / "text.txt", tmp_path / "table.csv"
    text.write_text("the cat sat on the mat and the dog ran\n" * 60)
    table.write_text("text,label\n" + "the cat,animal\nthe mat,thing\nthe dog,animal\non the mat,thing\n" * 3)
    run = tmp_path / "run"
    words = ("--data", str(text), "--vocab-size", "270", *SIZES, "--model.hidden-dim", "64", "--recipe-of", of)
    main(["train", "gpt1", *words, "--steps", "6", "--out", str(run), "--prompt", "the"])
    assert json.loads((run / "config.json").read_text())["architectures"] == ["OpenAIGPTLMHeadModel"]
    transformers = pytest.importorskip("transformers")
    model, tokenizer = keifu.load(run)
    ids = torch.tensor([tokenizer.encode("the cat sat")])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(run).eval()(ids).logits
        torch.testing.assert_close(model(ids), theirs, atol=1e-5, rtol=0)
    tuned = tmp_path / "tuned"
    main(["train", "gpt1-finetune", "--data", str(table), "--model", str(run), "--epochs", "1", "--out", str(tuned)])
    assert json.loads((tuned / "config.json").read_text())["architectures"] == ["OpenAIGPTForSequenceClassification"]
    main(["classify", str(tuned), "the cat"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("the cat")
