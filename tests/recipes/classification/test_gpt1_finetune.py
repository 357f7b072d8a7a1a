"""`keifu train gpt1-finetune`: its loss, what it learns in each form, saves and refuses, from several decoders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import keifu
from keifu import checkpoints
from keifu.cli import main
from keifu.data.classification.input_formats import examples_of
from keifu.data.padding import stack_sequences
from keifu.data.tokenizers.train import train_tokenizer
from keifu.inference.embeddings.classifiers import text_classifier
from keifu.models import bert, gemma3, gpt1, gpt2, gpt3, llama, palm, task_head
from keifu.recipes.classification import gpt1_finetune
from keifu.recipes.classification.gpt1_finetune import Recipe
from keifu.recipes.running import train_job
from keifu.training.objectives.language_modeling import finetuning_loss
from keifu.training.run import checkpoint

WORDS = ["cat", "dog", "cow", "hen", "lamp", "chair", "spoon", "door"]
SMALL = {"context_length": 24, "dim": 16, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
MODULES = {
    "gpt1": (gpt1, gpt1.Config(**SMALL, dropout=0.0)),
    "gpt2": (gpt2, gpt2.Config(**SMALL, dropout=0.0, tied=False)),
    "gpt3": (gpt3, gpt3.Config(**SMALL, band=4)),
    "llama": (llama, llama.Config(**SMALL, n_kv_heads=1)),
    "palm": (palm, palm.Config(**SMALL, head_dim=8)),
    "gemma3": (gemma3, gemma3.Config(**SMALL, n_kv_heads=1, head_dim=8, sliding_window=4)),
}
FLAGS = ("--epochs", "8", "--learning-rate", "2e-2", "--batch-size", "8")


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder for each decoder. Its tokenizer has no end-of-text token, as GPT-1's."""
    from dataclasses import replace

    torch.manual_seed(1)
    tokenizer = train_tokenizer("characters", [" ".join(WORDS), "is not 0123456789"], 99)
    folders = {name: tmp_path_factory.mktemp(name) for name in MODULES}
    for name, (module, config) in MODULES.items():
        model = module.build(replace(config, vocab_size=tokenizer.vocab_size + 2))  # two rows that no token has
        checkpoints.save(model, tokenizer, folders[name])
    return folders


def model(form: str, labels: tuple[str, ...] = ("a", "b", "c"), **sizes: Any) -> task_head.ModelWithHead:
    torch.manual_seed(3)
    config = gpt2.Config(vocab_size=31, **SMALL | sizes, dropout=0.0)
    return task_head.builder(gpt2.build)(task_head.Config(config, form, labels, 28, 29, 30)).eval()


ROWS = [
    [[28, 1, 2, 3, 29, 4, 30], [28, 4, 29, 1, 2, 3, 30]],
    [[28, 5, 29, 6, 7, 8, 9, 10, 30], [28, 6, 7, 8, 9, 10, 29, 5, 30]],
    [[28, 3, 29, 1, 30]],
]


def batch(rows: list[list[list[int]]], targets: list[int]) -> dict[str, torch.Tensor]:
    tokens, mask = stack_sequences(rows, 28)
    return {"tokens": tokens, "mask": mask, "targets": torch.tensor(targets)}


def by_hand(made: task_head.ModelWithHead, row: list[list[int]], target: int, lm_weight: float) -> torch.Tensor:
    """Return the loss of one example, one sequence at a time and from all logits."""
    states, words = [], []
    for sequence in row:
        ids = torch.tensor([sequence])
        hidden = made.decoder.hidden(ids)[0]
        states.append(hidden[-1])
        words.append(F.cross_entropy(made.decoder(ids)[0, :-1], ids[0, 1:]))
    project = made.task_head.project
    if made.config.form == "choice":
        logits = torch.stack([project(each)[0] for each in states])
    else:
        logits = sum(project.weight @ each for each in states)
    return -logits.log_softmax(0)[target] + lm_weight * torch.stack(words).mean()


@pytest.mark.parametrize("form", ["classification", "similarity", "choice"])
@pytest.mark.parametrize("lm_weight", [0.0, 0.5, 2.0])
def test_the_loss_is_that_of_each_example_alone_computed_by_hand(form: str, lm_weight: float) -> None:
    made = model(form, () if form == "choice" else ("a", "b", "c"))
    rows = [[row[0]] for row in ROWS] if form == "classification" else ROWS if form == "choice" else ROWS[:2]
    targets = [0, 1, 0][: len(rows)]
    outcome = finetuning_loss(made, batch(rows, targets), lm_weight)
    expected = sum(by_hand(made, row, target, lm_weight) for row, target in zip(rows, targets, strict=True))
    torch.testing.assert_close(outcome.total, expected, rtol=1e-5, atol=1e-5)
    assert outcome.weight == len(rows) and set(outcome.figures) == {"accuracy", "task_loss"} | (
        {"lm_loss"} if lm_weight else set()
    )
    ours = torch.autograd.grad(outcome.total, list(made.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(made.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("form", ["similarity", "choice"])
@torch.no_grad()
def test_a_padded_batch_equals_each_example_alone(form: str) -> None:
    made = model(form, () if form == "choice" else ("a", "b"))
    whole = batch(ROWS, [0, 0, 0])
    together = made.classify(whole["tokens"], whole["mask"]).softmax(-1)
    for row, shares in zip(ROWS, together, strict=True):
        alone = batch([row], [0])
        found = made.classify(alone["tokens"], alone["mask"]).softmax(-1)[0]
        torch.testing.assert_close(shares[: len(found)], found, rtol=1e-5, atol=1e-6)
        assert shares[len(found) :].sum() == 0  # answers that it does not have


@torch.no_grad()
def test_similarity_does_not_know_which_text_is_the_first() -> None:
    made = model("similarity")
    swapped = batch([row[::-1] for row in ROWS[:2]], [0, 0])
    given = batch(ROWS[:2], [0, 0])
    torch.testing.assert_close(made.classify(given["tokens"], given["mask"]),
                               made.classify(swapped["tokens"], swapped["mask"]))  # fmt: skip


def tables(folder: Path, form: str, count: int = 40) -> Path:
    """Return tasks that a look at one or two words solves."""
    rows = []
    for n in range(count):
        first, second = WORDS[n % 8], WORDS[(3 * n + n // 8) % 8]
        alive = n % 8 < 4
        rows.append(
            {
                "classification": {"text": f"{first} {n}", "label": "animal" if alive else "thing"},
                "entailment": {"premise": f"{first} {n}", "hypothesis": second, "label": "yes" if alive else "no"},
                "similarity": {"first": f"{first} {n}", "second": f"{first} {n + 1}", "label": alive},
                "choice": {"context": f"{n}", "answers": [["lamp", "cat"], ["cat", "lamp"]][n % 2], "label": 1 - n % 2},
            }[form]
        )
    (folder / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / f"{form}.jsonl"


def train(*words: object) -> None:
    main(["train", "gpt1-finetune", *map(str, words)])


@pytest.mark.parametrize(
    ("form", "base"),
    [("classification", "gpt1"), ("entailment", "llama"), ("similarity", "gpt3"), ("choice", "gpt2")],
)
def test_each_form_is_learned_saved_and_used(
    form: str, base: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table, run = tables(tmp_path, form), tmp_path / "run"
    train("--data", table, "--form", form, "--model", bases[base], *FLAGS, "--out", run)
    said = capsys.readouterr().out
    assert "On held-out examples: Accuracy 100.0% of 4 texts" in said
    assert "Accuracy 100.0%" in sorted((run / "samples").glob("*.txt"))[-1].read_text()
    assert "lm loss" in (run / "report.html").read_text()
    main(["classify", str(run), "--on", str(table), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] > 0.9 and told["texts"] == 40
    text = {"classification": "cow 3", "entailment": "cow 3\tcat", "similarity": "cow 3\tcow 4",
            "choice": "7\tlamp\tcat"}[form]  # fmt: skip
    main(["classify", str(run), text, "--json"])
    line = json.loads(capsys.readouterr().out)
    right = {"classification": "animal", "entailment": "yes", "similarity": "True", "choice": "cat"}[form]
    assert line["label"] == right and sum(line["probabilities"].values()) == pytest.approx(1)
    main(["classify", str(run), text])
    assert right in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize("base", MODULES)
def test_any_decoder_gets_new_rows_and_keeps_its_weights(base: str, bases: dict[str, Path]) -> None:
    made, tokenizer = gpt1_finetune.start_model(Recipe(model=str(bases[base])), ("a", "b"))
    plain, own = keifu.load(bases[base])
    before, after = plain.state_dict(), made.decoder.state_dict()
    assert tokenizer.vocab_size == own.vocab_size + 3 == made.config.vocab_size
    for name, tensor in before.items():
        rows = own.vocab_size if tensor.shape[0] == plain.config.vocab_size else len(tensor)
        assert torch.equal(after[name][:rows], tensor[:rows]), name
    fresh = made.decoder.embedding.weight[-3:]
    assert made.config.start_id == own.vocab_size and 0.01 < float(fresh.std()) < 0.03
    assert made.decoder.head_weight.shape == (made.config.vocab_size, 16)
    ids = torch.tensor([own.encode("cat is not dog")])
    assert torch.equal(made.decoder.hidden(ids), plain.hidden(ids)), "the words that it knew mean what they meant"


def test_transformers_reads_a_run_with_pairs(bases: dict[str, Path], tmp_path: Path) -> None:
    """As its tokenizer makes them."""
    transformers = pytest.importorskip("transformers")
    table, run = tables(tmp_path, "entailment"), tmp_path / "run"
    train("--data", table, "--form", "entailment", "--model", bases["gpt1"], "--epochs", "1", "--out", run)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(run).eval()
    read = transformers.AutoTokenizer.from_pretrained(run)
    texts = [("cat", "dog"), ("cat is not", "hen"), ("lamp", "spoon is not")]
    ours, tokenizer = keifu.load(run)
    how = text_classifier(ours, tokenizer)
    examples = examples_of(["\t".join(pair) for pair in texts], how.form)
    given = read([a for a, _ in texts], [b for _, b in texts], padding=True, return_tensors="pt")
    given.pop("token_type_ids", None)  # openai-gpt adds them as tokens
    with torch.no_grad():
        expected = theirs(**given).logits.softmax(-1)
    given = how.predict_proba(how.read(examples, how.limit, False).rows)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    assert theirs.config.id2label == {0: "no", 1: "yes"}


def test_a_fine_tuned_decoder_can_learn_another_task(bases: dict[str, Path], tmp_path: Path) -> None:
    first, second = tables(tmp_path, "classification"), tables(tmp_path, "choice")
    train("--data", first, "--model", bases["llama"], "--epochs", "1", "--out", tmp_path / "a")
    train("--data", second, "--form", "choice", "--model", tmp_path / "a", "--epochs", "1", "--out", tmp_path / "b")
    a, b = (keifu.load(tmp_path / name)[0].config for name in "ab")
    assert (a.form, b.form) == ("classification", "choice") and a.vocab_size == b.vocab_size
    assert (a.start_id, a.extract_id) == (b.start_id, b.extract_id)


def final(recipe: Recipe, out: Path, resume: bool = False) -> dict[str, torch.Tensor]:
    train_job(gpt1_finetune.job_of(recipe, gpt1_finetune.prepare(recipe), out), out, resume)
    return checkpoint.latest(out)[0].tensors


@pytest.mark.parametrize(
    ("form", "flags", "sentence"),
    [
        ("entailment", (), "its columns are those of the form entailment"),
        ("classification", ("--form", "entailment"), "its columns are those of the form classification"),
        ("classification", ("--label", "lable"), "Did you mean 'label'?"),
        ("classification", ("--cut", "4"), "cut must be from 8 to 24 tokens"),
        ("classification", ("--held-out", "1"), "held_out must be a number from 0 and below 1"),
        ("classification", ("--lm-weight", "-1"), "lm_weight must be a number from 0 to"),
        ("classification", ("--form", "poem"), "There is no --form called 'poem'"),
        ("classification", ("--test", "other.jsonl"), "line 2: nothing that is learned from has the label"),
        ("classification", ("--test", "long.jsonl"), "long.jsonl, line 1: this example has 61 tokens, and 24 is the"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    form: str, flags: tuple[str, ...], sentence: str, bases: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "cat", "label": "animal"}, {"text": "door", "label": "plant"}]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("long.jsonl").write_text(json.dumps({"text": "cat " * 15, "label": "animal"}) + "\n")
    with pytest.raises(SystemExit):
        train("--data", tables(tmp_path, form), "--model", bases["gpt1"], "--out", "run", *flags)
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_an_encoder_cannot_be_fine_tuned_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = train_tokenizer("wordpiece", [" ".join(WORDS)] * 2, 60)
    config = bert.Config(vocab_size=tokenizer.vocab_size, context_length=8, dim=8, hidden_dim=8, n_layers=1, n_heads=2)
    checkpoints.save(bert.build(config), tokenizer, tmp_path / "bert")
    with pytest.raises(SystemExit):
        train("--data", tables(tmp_path, "classification"), "--model", tmp_path / "bert", "--out", tmp_path / "run")
    assert "reads both sides of a text" in capsys.readouterr().err


def test_what_only_classifies_writes_no_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = train_tokenizer("characters", ["abcdefghijklmnopqrstuvwxyz 0123"], 60)
    checkpoints.save(model("classification"), tokenizer, tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path / "run"), "a"])
    assert "keifu classify" in capsys.readouterr().err
