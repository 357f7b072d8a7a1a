"""Students that are cut from their teacher: the layers and tokens that stay, and the recipe that trains them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keifu import checkpoints
from keifu.commands.train import parse
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.models import gpt2, llama
from keifu.recipes.assistant import distill
from keifu.recipes.assistant.finetuning import Lora
from keifu.recipes.distilling import Distill, DistillAnswers, evenly, keep_layers, keep_rows, prune
from keifu.recipes.running import run_jobs
from keifu.training.run import metrics

SIZES: dict[str, Any] = {"context_length": 64, "dim": 32, "hidden_dim": 48, "n_layers": 5, "n_heads": 2}
WORDS = "one two three four five good bad User: Assistant: which is better"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model of five layers with a head of its own."""
    folder = tmp_path_factory.mktemp("large")
    tokenizer = train_tokenizer("bpe", [WORDS] * 9, 300)
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size + 3, "sliding_window": 9, "first_window_layer": 2}
    checkpoints.save(llama.build(llama.Config(**sizes)), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [{"prompt": f"{a} two", "response": f"{b} three"} for a in WORDS.split() for b in WORDS.split()[:3]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(folder: Path) -> tuple[Any, Any]:
    return checkpoints.load(folder)


def test_layers_at_even_distances() -> None:
    assert evenly(30, 7) == [0, 5, 10, 14, 19, 24, 29]
    assert evenly(4, 4) == [0, 1, 2, 3] and evenly(9, 2) == [0, 8]
    for kept in (1, 5):
        with pytest.raises(UserError, match="choose 2 to 4"):
            evenly(4, kept)


@torch.no_grad()
def test_logits_of_tokens_that_stay_do_not_change(large: Path) -> None:
    model, tokenizer = load(large)
    text = torch.tensor([tokenizer.encode("one two")])
    before = model(text)
    model, cut = prune(model, tokenizer, None, 38)
    ids = [tokenizer.token_id(cut.backend.id_to_token(token)) for token in range(cut.vocab_size)]
    mine = cut.encode("one two")
    assert torch.equal(text, torch.tensor([[ids[token] for token in mine]]))
    assert model.config.vocab_size == cut.vocab_size < tokenizer.vocab_size
    torch.testing.assert_close(model(torch.tensor([mine])), before[..., ids], rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_layers_that_stay_are_the_ones_of_the_model(large: Path, tmp_path: Path) -> None:
    model, tokenizer = load(large)
    tokens = torch.arange(20)[None]
    states = [{name: value.clone() for name, value in block.state_dict().items()} for block in model.blocks]
    model, tokenizer = prune(model, tokenizer, 3, None)
    for block, layer in zip(model.blocks, (0, 2, 4), strict=True):
        assert all(torch.equal(value, states[layer][name]) for name, value in block.state_dict().items())
    checkpoints.save(model, tokenizer, tmp_path / "small")
    again, _ = load(tmp_path / "small")
    assert again.config.first_window_layer == 1 and again.config.n_layers == 3
    torch.testing.assert_close(again(tokens), model(tokens))


def test_a_cut_student_learns_from_a_teacher_that_is_cut_alike(large: Path, talks: Path, tmp_path: Path) -> None:
    parse([
        "distill", "--teacher", str(large), "--model", str(large), "--data", str(talks), "--student-layers", "2",
        "--student-vocabulary", "12", "--steps", "12", "--learning-rate", "0.01", "--on-policy", "0.4", "--hard", "0.5",
        "--divergence", "jsd", "--max-tokens", "4", "--weights", "f32", "--out", str(tmp_path / "run"),
    ])()  # fmt: skip
    student, tokenizer = load(tmp_path / "run")
    assert (len(student.blocks), student.config.vocab_size) == (2, tokenizer.vocab_size)
    lines = [line["validation_nats"] for line in metrics.read(tmp_path / "run") if "validation_nats" in line]
    assert lines[-1] < lines[0]
    objective: Any = Distill(teacher=str(large)).objective(tokenizer, 32)
    teacher = objective.teacher
    assert teacher.config.vocab_size == tokenizer.vocab_size and teacher.config.n_layers == 5


def test_students_that_cannot_be_made_are_refused(large: Path, tmp_path: Path) -> None:
    of: dict[str, Any] = {"model": str(large), "distill": DistillAnswers(teacher=str(large))}
    with pytest.raises(UserError, match="is its own teacher"):
        run_jobs(distill.jobs(distill.Recipe(**of)), tmp_path)
    with pytest.raises(UserError, match="give --student-vocabulary, or leave it out"):
        run_jobs(distill.jobs(distill.Recipe(**of, student_layers=2, student_merges="used")), tmp_path)
    with pytest.raises(UserError, match="Adapters need a saved model"):
        run_jobs(distill.jobs(distill.Recipe(**of, student_layers=2, lora=Lora(rank=2))), tmp_path)
    other = gpt2.build(gpt2.Config(vocab_size=40, context_length=8, dim=16, n_layers=2, n_heads=2))
    with pytest.raises(UserError, match="LLaMA's type"):
        keep_layers(other, [0, 1])
    with pytest.raises(UserError, match="writes no text"):
        keep_rows(torch.nn.Linear(2, 2), [0])
