"""Both recipes for translation, from the command line to a model that is loaded: by steps, by time, resumed."""

import json
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keifu import checkpoints
from keifu.cli import parse
from keifu.data.translation.pairs import read_pairs, split
from keifu.errors import UserError
from keifu.recipes.translation import seq2seq, transformer
from keifu.training.run import checkpoint, metrics

WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "bird", "sees", "likes", "eats", "big", "small"]
COMMON = ["--vocab-size", "290", "--tokens-per-batch", "500", "--model.context-length", "24"]
SIZES = {
    "transformer": ["--model.dim", "32", "--model.hidden-dim", "64", "--model.n-layers", "1", "--model.n-heads", "2"],
    "seq2seq": [w for n in ("dim", "embedding-dim", "attention-dim", "maxout-dim") for w in (f"--model.{n}", "32")],
}


FAST = ["--learning-rate", "0.02"]


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


def write_table(folder: Path) -> Path:
    """Write rows of words and the same backwards."""
    chance = random.Random(0)
    rows = {tuple(chance.choice(WORDS) for _ in range(chance.randint(2, 6))) for _ in range(300)}
    lines = [f"{' '.join(row)}\t{' '.join(row[::-1])}\n" for row in sorted(rows)]
    (folder / "backwards.tsv").write_text("".join(lines))
    return folder / "backwards.tsv"


@pytest.fixture
def table(own_cache: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a table of a test's own; its tokenizers are learned once for all tests."""
    return write_table(tmp_path)


@pytest.fixture(scope="module")
def first(own_cache: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the run of a recipe from which other runs start."""

    @cache
    def trained(name: str) -> Path:
        return go(name, write_table(tmp_path_factory.mktemp("first")), "run", "--steps", "12")

    return trained


def go(name: str, table: Path, out: str, *options: str) -> Path:
    place = table.parent / out
    parse(["train", name, "--data", str(table), "--out", str(place), *COMMON, *SIZES[name], *options])()
    return place


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / f"state/step-{checkpoint.steps(directory)[-1]:08d}.safetensors")


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_trains_and_its_run_loads_and_translates(name: str, table: Path, capsys) -> None:
    out = go(name, table, "run", "--steps", "20", *FAST)
    said = capsys.readouterr().out
    assert "pairs for training" in said and "Every character of the source side is in the tokenizer's" in said
    losses = [line["validation_loss"] for line in metrics.read(out) if "validation_loss" in line]
    assert losses[-1] < losses[0] - 0.05
    assert "nats" in metrics.read(out)[-2] or "nats" in metrics.read(out)[-1]
    model, tokenizer = checkpoints.load(out)
    assert model.config.vocab_size == tokenizer.vocab_size and tokenizer.pad_id not in (None, tokenizer.eos_id)
    recipe = json.loads((out / "recipe.json").read_text())
    facts = recipe["data"][0]
    parts = split(read_pairs(table))
    assert [facts[f"{part} pairs"] for part in ("training", "validation", "test")] == [
        len(parts.train), len(parts.validation), len(parts.test)
    ]  # fmt: skip
    sample = (out / "samples/step-00000020.txt").read_text()
    assert f"{parts.validation[0][0]}\n  = {parts.validation[0][1]}\n  > " in sample


def test_minutes_become_steps_and_a_finished_run_resumed_makes_no_more(table: Path, capsys) -> None:
    out = go("transformer", table, "timed", "--minutes", "0.01")
    recipe = json.loads((out / "recipe.json").read_text())
    steps, first = checkpoint.steps(out)[-1], recipe["settings"]["steps"]
    assert recipe["settings"]["minutes"] == 0.01 and recipe["settings"]["warmup"] == min(400, -(-first // 5))
    assert recipe["steps"] == steps, "which may be other than the first estimate"
    go("transformer", table, "timed", "--minutes", "0.01", "--resume")
    assert checkpoint.steps(out)[-1] == steps
    go("transformer", table, "timed", "--minutes", "0.03", "--resume")  # at the pace so far
    assert (
        checkpoint.steps(out)[-1] > steps
        and json.loads((out / "recipe.json").read_text())["settings"]["steps"] == first
    )
    with pytest.raises(UserError, match="--steps 5 and --minutes 1 are two budgets"):
        go("transformer", table, "both", "--minutes", "1", "--steps", "5")


@pytest.mark.parametrize("name", SIZES)
def test_a_run_starts_from_the_weights_and_the_tokenizer_of_another(
    name: str, first: Callable[[str], Path], table: Path
) -> None:
    begun = str(first(name))
    later = go(name, table, "later", "--steps", "1", "--start-from", begun, "--learning-rate", "1e-12", "--seed", "9")
    (before, its), (after, own) = checkpoints.load(begun), checkpoints.load(later)
    assert its.backend.get_vocab() == own.backend.get_vocab() and before.config == after.config
    near = [torch.allclose(a, b, atol=0.05) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(near), "a step at such a rate moves no weight far; another seed's weights are further away"
    other = {"transformer": "seq2seq", "seq2seq": "transformer"}[name]
    with pytest.raises(UserError, match=f"--start-from {begun} is of the type .*, which this recipe does not train"):
        go(other, table, "wrong", "--steps", "1", "--start-from", begun)


@pytest.mark.parametrize("name", SIZES)
def test_a_run_that_starts_from_a_translator_takes_a_tenth_of_the_rates_and_leaves_no_worse_model(
    name: str, first: Callable[[str], Path], table: Path, capsys
) -> None:
    begun = first(name)
    later = go(name, table, "later", "--steps", "4", "--start-from", str(begun))
    settings = [json.loads((out / "recipe.json").read_text())["settings"] for out in (begun, later)]
    shares = [settings[1][rate] / settings[0][rate] for rate in ("learning_rate", "matrix_rate")]
    assert shares == pytest.approx([0.1, 0.1] if name == "transformer" else [0.1, 1.0])
    assert (settings[0]["keep_best"], settings[1]["keep_best"]) == (False, True)
    losses = [line["validation_loss"] for line in metrics.read(later) if "validation_loss" in line]
    figures = json.loads((later / "recipe.json").read_text())["figures"]
    assert figures["validation_loss"] == min(losses) and f"Validation loss: {losses[0]:.4g} before" in (
        capsys.readouterr().err
    )
    paper = go(name, table, "paper", "--steps", "1", "--start-from", str(begun), "--recipe-of", "paper")
    rates = {"transformer": 0.1 * 256**-0.5 * 4000**-1.5, "seq2seq": 0.1}
    rate = json.loads((paper / "recipe.json").read_text())["settings"]["learning_rate"]
    assert rate == pytest.approx(rates[name] * (8**0.5 if name == "transformer" else 1))  # of the toy's dim 32


def test_the_papers_transformer_leaves_the_mean_of_its_last_states(table: Path) -> None:
    out = go("transformer", table, "paper", "--recipe-of", "paper", "--steps", "4", "--average", "2", "--reverse")
    files = [load_file(out / f"state/step-{step:08d}.safetensors") for step in checkpoint.steps(out)]
    model, _ = checkpoints.load(out)
    name = "encoder.0.feedforward.up.weight"
    mean = (files[-1][f"model.{name}"].double() + files[-2][f"model.{name}"].double()) / 2
    assert torch.equal(model.state_dict()[name], mean.float())
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["data"][0]["source"].endswith(", sides swapped") and recipe["settings"]["keep"] == 2


def test_the_papers_settings_are_theirs() -> None:
    recipe = transformer.Recipe(recipe_of="paper", model=transformer.transformer.Config())
    long, short = (transformer.paper_settings(recipe, steps) for steps in (100_000, 1000))
    assert (long.warmup, long.betas, long.epsilon, long.schedule) == (4000, (0.9, 0.98), 1e-9, "inverse_sqrt")
    assert long.learning_rate == pytest.approx(512**-0.5 * 4000**-0.5)
    assert short.learning_rate / 1000 == pytest.approx(long.learning_rate / 4000)  # the same rise
    settings = seq2seq.paper_settings(seq2seq.Recipe(), 100)
    assert (settings.optimizer, settings.clip, settings.learning_rate) == ("adadelta", 1.0, 1.0)


def test_bahdanaus_recipe_and_the_network_without_attention(table: Path) -> None:
    out = go("seq2seq", table, "none", "--attention", "none", "--recipe-of", "paper", "--steps", "3")
    model, _ = checkpoints.load(out)
    assert model.config.context == "fixed"
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["settings"]["optimizer"] == "adadelta" and "80 rows of 1600" in recipe["data_fingerprint"]


def test_pairs_too_long_are_left_out_and_said(table: Path, capsys) -> None:
    with table.open("a") as file:
        file.write(f"{'cat ' * 60}\t{'dog ' * 60}\n")
    go("transformer", table, "long", "--steps", "1")
    said = capsys.readouterr().out
    assert "have a side longer than 24 tokens, which is all that the model takes, and are left out" in said


def test_bits_per_byte_count_the_end_tokens_and_the_pairs_that_fit(table: Path) -> None:
    held = table.parent / "held.csv"
    held.write_text(f"source,target\nred cat,cat red\nbig dog,dog big\n{'cat ' * 60},{'dog ' * 60}\n")
    out = go("transformer", table, "held", "--validation-data", str(held), "--steps", "1")
    figures = json.loads((out / "recipe.json").read_text())["figures"]
    _, tokenizer = checkpoints.load(out)
    assert tokenizer is not None
    fitting = ["cat red", "dog big"]
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in fitting)  # and the end of each
    nats = figures["validation_loss"] * tokens
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(map(len, fitting)))


def test_a_tokenizer_that_cannot_end_a_text_or_does_not_exist_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no tokenizer at bpee"):
        go("transformer", table, "run", "--steps", "1", "--tokenizer", "bpee")


def test_a_tokenizer_with_two_vocabularies_trains_on_the_targets_own_ids(table: Path) -> None:
    from keifu.data.tokenizers.seq2seq import TwoSidedTokenizer
    from keifu.data.tokenizers.train import train_tokenizer
    from keifu.recipes.translation import translator_runs

    sides = []
    for size, texts in ((300, WORDS), (280, ["".join(reversed(word)) for word in WORDS])):
        sides.append(train_tokenizer("bpe", texts * 3, size, ["<pad>"]))
    TwoSidedTokenizer(*sides).save(table.parent / "two")
    task = translator_runs.prepare_pairs(transformer.Recipe(data=str(table), tokenizer=str(table.parent / "two")))
    encoded = translator_runs._fitting(task, task.parts.train[:1], 128)
    source, target = task.parts.train[0]
    assert encoded.source.ids.tolist() == sides[0].encode(source)
    assert encoded.target.ids.tolist() == sides[1].encode(target) != sides[0].encode(target)
    out = go("transformer", table, "two-run", "--tokenizer", str(table.parent / "two"), "--steps", "1")
    model, tokenizer = checkpoints.load(out)
    sizes = model.config.vocab_size, model.config.target_vocab_size
    assert sizes == (sides[0].vocab_size, sides[1].vocab_size) and isinstance(tokenizer, TwoSidedTokenizer)


def test_own_validation_and_test_pairs_reach_the_run(table: Path) -> None:
    (table.parent / "held.csv").write_text("source,target\nred cat,cat red\nbig dog,dog big\n")
    held = str(table.parent / "held.csv")
    out = go("transformer", table, "own", "--validation-data", held, "--test-data", held, "--steps", "1")
    facts = json.loads((out / "recipe.json").read_text())["data"][0]
    assert facts["validation pairs"] == facts["test pairs"] == 2
