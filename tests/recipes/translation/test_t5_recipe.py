"""The recipe of T5: spans without labels, then pairs whose source names the task, as transformers reads them too."""

import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from keifu import checkpoints, cli
from keifu.data.text.normalization import normalize
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text.translation import TranslationParams, translate_texts
from keifu.models.variants import t5 as variant
from keifu.recipes.translation import t5
from keifu.recipes.translation.translator_runs import prepare_pairs
from keifu.training.run import metrics

WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "bird", "sees", "likes", "eats", "big", "small"]
SIZES = shlex.split(
    "--vocab-size 400 --tokens-per-batch 500 --model.context-length 40 --model.dim 32 --model.hidden-dim 64 "
    "--model.n-layers 1 --model.n-heads 2 --model.head-dim 12 --pretraining.window 24 --learning-rate 0.02"
)
PREFIX = "turn around: "


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


@pytest.fixture
def table(own_cache: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Write rows of words and the same backwards."""
    chance = random.Random(0)
    rows = {tuple(chance.choice(WORDS) for _ in range(chance.randint(2, 6))) for _ in range(300)}
    lines = [f"{' '.join(row)}\t{' '.join(row[::-1])}\n" for row in sorted(rows)]
    (tmp_path / "backwards.tsv").write_text("".join(lines))
    return tmp_path / "backwards.tsv"


def go(table: Path, out: str, *options: str) -> Path:
    place = table.parent / out
    cli.parse(["train", "t5", "--data", str(table), "--out", str(place), *SIZES, *options])()
    return place


def losses(out: Path) -> list[float]:
    return [line["validation_loss"] for line in metrics.read(out) if "validation_loss" in line]


def test_both_stages_learn_and_the_run_translates_like_transformers(table: Path, capsys) -> None:
    out = go(table, "run", "--pretraining.steps", "10", "--steps", "12", "--prefix", PREFIX)
    first = losses(out / "pretraining")
    assert first[-1] < first[0] - 0.2 and losses(out)[-1] < losses(out)[0] - 0.2
    sample = (out / "pretraining/samples/step-00000010.txt").read_text()
    assert sample.count("  = <extra_id_0>") == 3 and sample.count("<extra_id_0>\n  = ") == 3
    assert "Pretraining: loss" in (out / "report.html").read_text()
    assert json.loads((out / "config.json").read_text())["prefix"] == PREFIX
    assert "prefix" not in json.loads((out / "pretraining/config.json").read_text())

    model, tokenizer = checkpoints.load(out)
    texts = ["red cat sees", "one big dog likes two birds"]
    greedy = TranslationParams(beam=1, max_tokens=9)
    ours = [part.text for [part] in translate_texts(model, tokenizer, texts, greedy)]
    named = translate_texts(model, tokenizer, [PREFIX + text for text in texts], greedy)
    assert [part.text for [part] in named] == ours, "a prefix that is there already is not doubled"
    theirs: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    reader: Any = transformers.AutoTokenizer.from_pretrained(out)
    for text, line in zip(texts, ours, strict=True):
        ids = reader(PREFIX + text, return_tensors="pt").input_ids
        blocked: dict[str, Any] = {"suppress_tokens": [tokenizer.pad_id]}
        written = theirs.generate(ids, max_new_tokens=9, do_sample=False, num_beams=1, **blocked)[0]
        assert reader.decode(written, skip_special_tokens=True).strip() == line
    cli.main(["translate", str(out), texts[0], "--beam", "1", "--max-tokens", "9"])
    assert capsys.readouterr().out.splitlines()[-1] == ours[0]


def test_a_run_that_starts_from_a_t5_has_no_first_stage_and_its_own_prefix(table: Path) -> None:
    begun = go(table, "run", "--pretraining.steps", "2", "--steps", "2") / "pretraining"
    later = go(table, "later", "--steps", "2", "--start-from", str(begun), "--prefix", PREFIX)
    assert not (later / "pretraining").exists()
    assert json.loads((later / "config.json").read_text())["prefix"] == PREFIX
    alone = go(table, "alone", "--steps", "2", "--pretraining.objective", "none")
    assert not (alone / "pretraining").exists()
    assert json.loads((alone / "config.json").read_text())["prefix"] == "translate: "


def test_held_out_sentences_are_not_among_the_texts_without_labels(table: Path) -> None:
    recipe = t5.Recipe(str(table), vocab_size=400)
    task = prepare_pairs(recipe, t5.SENTINEL_TOKENS)
    held_out = {normalize(side) for part in (task.parts.validation, task.parts.test) for pair in part for side in pair}
    other = table.with_name("lines.jsonl")
    lines = [*sorted(held_out), "a sentence of its own"]
    other.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for text in (None, str(other)):
        changed = t5.Recipe(str(table), vocab_size=400, pretraining=t5.Pretraining(text=text))
        training, validation = t5.unlabelled(changed, task)
        assert training and held_out.isdisjoint(map(normalize, training))
        assert {*validation} == {side for pair in task.parts.validation for side in pair}
    assert training == ["a sentence of its own"]


def test_a_batch_of_the_first_stage_has_the_tokens_per_batch(table: Path) -> None:
    recipe = t5.Recipe(str(table), vocab_size=400, tokens_per_batch=500, pretraining=t5.Pretraining(window=24))
    data = t5.denoised_text(recipe, prepare_pairs(recipe, t5.SENTINEL_TOKENS))
    assert len(data.batch(0)["source"]) == 500 // 24


@pytest.mark.parametrize(("start", "rates"), [(None, (2e-3, 0.02)), ("a-run", (2e-4, 0.002))])
def test_a_run_that_starts_from_another_has_a_tenth_of_both_rates(start: str | None, rates: tuple[float, ...]) -> None:
    settings = t5.settings(t5.Recipe(start_from=start), 100)
    assert (settings.learning_rate, settings.matrix_rate) == pytest.approx(rates)


def test_the_task_is_named_by_the_languages() -> None:
    assert t5.task_prefix(t5.Recipe(), ("ja", "en")) == "translate Japanese to English: "
    assert t5.task_prefix(t5.Recipe(), ("", "en")) == "translate: "
    assert t5.task_prefix(t5.Recipe(prefix=""), ("ja", "en")) == ""


def test_a_tokenizer_without_sentinels_and_wrong_spans_are_refused(table: Path) -> None:
    plain = table.parent / "plain"
    train_tokenizer("bpe", [table.read_text()], 290, ["<pad>"]).save(plain)
    with pytest.raises(UserError, match="no sentinels such as <extra_id_0>"):
        go(table, "no", "--tokenizer", str(plain), "--pretraining.steps", "1", "--steps", "1")
    with pytest.raises(UserError, match="span 0.5"):
        go(table, "no", "--pretraining.span", "0.5")


def test_a_published_t5_goes_on_with_the_token_that_begins_its_targets(table: Path) -> None:
    tokenizer = train_tokenizer("bpe", [table.read_text()], 290, ["<pad>"])
    tokenizer = tokenizer.replace(special={"eos_token": "<|endoftext|>", "pad_token": "<pad>"})
    ids: dict[str, Any] = {"start_id": tokenizer.pad_id, "end_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    sizes: dict[str, Any] = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "head_dim": 8}
    model = variant.build(variant.Config(tokenizer.vocab_size, 40, **sizes, **ids))
    checkpoints.save(model, tokenizer, table.parent / "published")
    recipe = t5.Recipe(str(table), start_from=str(table.parent / "published"), steps=1, tokens_per_batch=500)
    job: Any = next(t5.jobs(recipe))
    batch = job.data.batch(0)
    assert set(batch["target"][:, 0].tolist()) == {tokenizer.pad_id} == {job.model.config.start_id}
    assert set(batch["source"][:, -1].tolist()) <= {tokenizer.eos_id, tokenizer.pad_id}
