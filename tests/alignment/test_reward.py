"""Reward models: the loss written out, a run that learns a ranking, transformers' scores, the demonstrations' mean."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from keifu import checkpoints
from keifu.alignment.reward_model import calibration, margins, ranking_loss, ranking_losses, scores_of
from keifu.commands.train import parse
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.embeddings.classifiers import text_classifier
from keifu.models import gpt2, llama, task_head
from keifu.recipes.assistant import reward as recipe
from keifu.training.run import metrics

SIZES: dict[str, Any] = {"context_length": 48, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4}
WORDS = ["one", "two", "three", "four", "five"]
NAN = float("nan")


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


def test_the_loss_is_that_of_every_pair() -> None:
    scores = torch.randn(4, 3, dtype=torch.float64).float()
    levels = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, NAN], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    better = [[(0, 1), (0, 2), (1, 2)], [(1, 0)], [(0, 2), (1, 2)], [(1, 0), (2, 0)]]
    told = scores.numpy().astype(float)
    expected = [
        np.mean([np.log1p(np.exp(row[b] - row[a])) for a, b in each]) for row, each in zip(told, better, strict=True)
    ]
    torch.testing.assert_close(ranking_losses(scores, levels), torch.tensor(expected).float(), rtol=0, atol=1e-6)
    two = ranking_losses(scores[:, :2], torch.tensor([[1.0, 0.0]]).expand(4, 2))  # TRL's RewardTrainer
    expected = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1])
    torch.testing.assert_close(two, expected, rtol=0, atol=1e-6)


def test_parts_of_a_batch_add_up_and_even_answers_do_not_count() -> None:
    model = recipe.with_score_head(llama.build(llama.Config(vocab_size=31, **SIZES)), recipe.finetuning.Lora(), 0)
    tokens, lengths = torch.randint(0, 31, (3, 4, 9)), torch.randint(2, 9, (3, 4, 1))
    levels = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 0.0, NAN, NAN], [1.0, 1.0, 0.0, NAN]])
    batch = {"tokens": tokens, "mask": torch.arange(9) < lengths, "levels": levels}
    whole = ranking_loss(model, batch)
    parts = [ranking_loss(model, {name: each[row : row + 1] for name, each in batch.items()}) for row in range(3)]
    torch.testing.assert_close(whole.total, torch.stack([part.total for part in parts]).sum())
    assert whole.weight == 3 and 0 <= float(whole.figures["accuracy"]) <= 3
    whole.total.backward()
    other = ranking_loss(model, batch | {"tokens": tokens.masked_fill(torch.arange(9) >= lengths, 7)})
    torch.testing.assert_close(other.total, whole.total)


def test_margins_are_of_the_better_over_the_worse() -> None:
    """In every pair of levels that differ, and by the model's own scores."""
    model = recipe.with_score_head(
        llama.build(llama.Config(vocab_size=31, **SIZES)), recipe.finetuning.Lora(), 0
    ).eval()
    tokens, levels = torch.randint(0, 31, (2, 3, 9)), torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, NAN]])
    batch = {"tokens": tokens, "mask": torch.ones(2, 3, 9, dtype=torch.bool), "levels": levels}
    scores = model.classify(tokens, batch["mask"]).detach()
    wanted = [scores[0, a] - scores[0, b] for a, b in ((0, 1), (0, 2), (1, 2))] + [scores[1, 1] - scores[1, 0]]
    torch.testing.assert_close(margins(model, [batch]), torch.stack(wanted))


def test_calibration() -> None:
    told = calibration(torch.tensor([0.1, -0.1, 4.0, 3.0, 5.0, -4.0]), bins=2)
    assert told.count == [2, 4] and told.right == [0.5, 0.75]
    assert told.sure[0] == pytest.approx(0.525, abs=1e-3)
    assert told.error == pytest.approx((abs(told.sure[0] - 0.5) * 2 + abs(told.sure[1] - 0.75) * 4) / 6)


KINDS: dict[str, Any] = {"gpt2": (gpt2, {}), "llama": (llama, {"n_kv_heads": 2})}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return models that know nothing."""
    tokenizer = train_tokenizer("bpe", ["User: Assistant: one two three four five good bad fair"] * 9, 280)
    found = {}
    for kind, (module, more) in KINDS.items():
        torch.manual_seed(0)
        found[kind] = tmp_path_factory.mktemp(kind)
        model = module.build(module.Config(vocab_size=tokenizer.vocab_size, **SIZES, **more))
        checkpoints.save(model, tokenizer, found[kind])
    return found


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return answers that begin with good beat fair, and those bad, whatever is asked; some prompts have two answers
    alone."""
    file = tmp_path_factory.mktemp("rankings") / "rankings.jsonl"
    rows: list[dict[str, Any]] = []
    for a in WORDS:
        rows += [{"prompt": f"{a} {b}", "answers": ["bad", f"good {b}", "fair"], "scores": [-1, 2, 0]} for b in WORDS]
        rows += [{"prompt": f"{a} {a} {b}", "chosen": f"fair {b}", "rejected": "bad"} for b in WORDS[:2]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def go(base: Path, data: Path, out: Path, *arguments: str) -> Path:
    fixed = ["--model", str(base), "--data", str(data), "--batch-size", "4", "--out", str(out)]
    parse(["reward", *fixed, *arguments])()
    return out


FAST = ["--steps", "30", "--learning-rate", "0.003", "--held-out", "0.2"]


@pytest.mark.parametrize(("kind", "arguments"), [("gpt2", []), ("llama", ["--lora.rank", "4"])])
def test_a_ranking_is_learned_and_transformers_has_the_same_scores(
    kind: str,
    arguments: list[str],
    bases: dict[str, Path],
    rankings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = go(bases[kind], rankings, tmp_path / "run", *FAST, *arguments)
    last = [line for line in metrics.read(out) if "validation_accuracy" in line][-1]
    assert last["validation_accuracy"] == 1.0 and "in 100.0%" in capsys.readouterr().out
    assert "Calibration" in (out / "report.html").read_text()
    model: Any
    model, tokenizer = checkpoints.load(out)
    task = recipe.prepare(recipe.Recipe(model=str(bases[kind]), data=str(rankings), held_out=0.2))
    assert scores_of(model, task.demonstrations, tokenizer.pad_id or 0).mean().abs() < 1e-5
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    texts = transformers.AutoTokenizer.from_pretrained(out)
    talks = [[{"role": "user", "content": "one"}, {"role": "assistant", "content": a}] for a in ("good one", "bad")]
    told = texts([texts.apply_chat_template(talk, tokenize=False) for talk in talks], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = theirs(told.input_ids, attention_mask=told.attention_mask).logits[:, 0]
    ours = scores_of(model, [tokenizer.render_chat(talk, add_generation_prompt=False) for talk in talks], 0)
    assert theirs.config.num_labels == 1 and ours[0] > ours[1]
    assert (model.config.bias == 0) == (kind == "gpt2")  # a LayerNorm's bias holds it, which an RMSNorm has not
    torch.testing.assert_close(ours, expected + model.config.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(bases: dict[str, Path], rankings: Path, tmp_path: Path) -> None:
    words = ["--steps", "8", "--learning-rate", "0.005", "--held-out", "0.2", "--precision", "float32"]
    alone = metrics.read(go(bases["llama"], rankings, tmp_path / "alone", *words))
    both = metrics.read(go(bases["llama"], rankings, tmp_path / "both", *words, "--processes", "2"))
    names = [name for line in alone for name in line if "loss" in name or "accuracy" in name or "norm" in name]
    assert len(names) > 4
    for expected, found in zip(alone, both, strict=True):
        chosen = {name: value for name, value in expected.items() if name in names}
        assert {name: found[name] for name in chosen} == pytest.approx(chosen, rel=1e-4, abs=1e-6)


def test_demonstrations_of_a_file_have_the_mean_zero(bases: dict[str, Path], rankings: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "two", "response": "fair two"}))
    given = ["--steps", "2", "--demonstrations", str(tmp_path / "d.jsonl")]
    model, tokenizer = checkpoints.load(go(bases["llama"], rankings, tmp_path / "run", *given))
    talk = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "fair two"}]
    assert scores_of(model, [tokenizer.render_turns(talk)[0]], 0).abs() < 1e-5


def test_a_published_reward_model_loads_and_goes_back(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
    sizes |= {"num_labels": 1, "pad_token_id": 0}
    theirs = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model: Any = checkpoints.load_model(tmp_path / "theirs")
    assert model.config.form == "score" and model.config.labels == ("LABEL_0",)
    tokens = torch.randint(1, 53, (3, 11))
    with torch.no_grad():
        expected = theirs(tokens).logits[:, 0]
        torch.testing.assert_close(model.scores_along(tokens[:, None])[:, 0, -1], expected, rtol=1e-5, atol=1e-5)
    task_head.shift(model, 1.5)
    torch.testing.assert_close(scores_of(model, tokens.tolist(), 0), expected + 1.5, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="gives a score"):
        text_classifier(model, train_tokenizer("characters", ["ab"], 9))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context-length", "6"], "prompts have an answer longer than 6 tokens"),
        (["--held-out", "1.0"], "--held-out must be a number from 0 and below 1"),
        (["--lora.rank", "2", "--lora.targets", "q_projj"], "q_proj"),
    ],
)
def test_bad_options(arguments: list[str], said: str, bases: dict[str, Path], rankings: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        go(bases["llama"], rankings, tmp_path / "run", *arguments)
