"""Distillation: the objective against its definition, packed teachers, a student's own answers, and refusals."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from keifu import checkpoints
from keifu.alignment.distillation import Distillation
from keifu.commands.train import parse
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.models import llama
from keifu.models.variants import gemma2
from keifu.native.model import pack
from keifu.recipes.assistant import sft
from keifu.recipes.distilling import Distill, DistillAnswers
from keifu.training.run import metrics

SIZES = {"vocab_size": 31, "context_length": 48, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
TALKS = {"one two": "good three", "two five": "bad four", "five one": "good good", "four": "three two one"}


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


def two_models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a student, and a teacher of another width whose head has 3 rows more."""
    torch.manual_seed(1)
    teacher = llama.build(llama.Config(**SIZES | {"dim": 64, "vocab_size": 34}))
    return llama.build(llama.Config(**SIZES)), teacher.requires_grad_(False).eval()


def packed_rows() -> dict[str, torch.Tensor]:
    """Return two rows of two conversations each, some tokens of which are learned."""
    tokens = torch.randint(0, 31, (2, 40))
    documents = (torch.arange(40) >= torch.tensor([[13], [33]])).long()
    return {"tokens": tokens, "mask": torch.rand(2, 40) < 0.6, "documents": documents}


def test_objective_is_the_divergence_of_the_marked_tokens() -> None:
    student, teacher = two_models()
    batch = packed_rows()
    total, weight, figures = Distillation(teacher, 0.3, 2.0)(student.train(), batch)
    inputs, documents, mask = batch["tokens"][:, :-1], batch["documents"][:, :-1], batch["mask"][:, 1:]
    mine, theirs = (model.logits(model.hidden(inputs, documents=documents))[mask] for model in (student, teacher))
    q, p = ((logits[:, :31] / 2).softmax(-1) for logits in (mine, theirs))
    mixture = 0.3 * p + 0.7 * q
    expected = (0.3 * p * (p / mixture).log() + 0.7 * q * (q / mixture).log()).sum()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    assert weight == mask.sum() and not figures
    nats = Distillation(teacher)(student.eval(), batch).figures["nats"]
    torch.testing.assert_close(nats, F.cross_entropy(mine, batch["tokens"][:, 1:][mask], reduction="sum"))
    mixed = Distillation(teacher, 0.3, 2.0, hard=0.25)
    torch.testing.assert_close(mixed(student.train(), batch).total, 0.75 * expected + 0.25 * nats)
    own = {**batch, "own": torch.ones(2, dtype=torch.bool)}
    torch.testing.assert_close(mixed(student.train(), own).total, expected, rtol=1e-6, atol=1e-6)
    total.backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in student.parameters())
    assert all(each.grad is None for each in teacher.parameters())


def test_packed_teacher_says_the_same_and_sees_no_other_conversation(opened) -> None:
    student, teacher = two_models()
    batch = packed_rows()
    expected = Distillation(teacher, 0.5)(student, batch).total
    found = Distillation(pack(teacher, "f32"), 0.5)(student, batch).total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [{"prompt": question, "response": answer} for question, answer in TALKS.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def teacher(base: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a teacher until it knows the answers, and return its run."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    return go(base, talks, out, "--steps", "80", "--learning-rate", "0.01")


def go(model: Path, data: Path, out: Path, *arguments: str) -> Path:
    fixed = ["--model", str(model), "--data", str(data), "--held-out", "0", "--batch-size", "2", "--out", str(out)]
    parse(["sft", *fixed, *arguments])()
    return out


@pytest.mark.parametrize(("own", "steps", "part"), [("0", "60", 0.25), ("1", "24", 0.7)], ids=["given", "its own"])
def test_a_student_comes_near_its_teacher(
    own: str, steps: str, part: float, base: Path, talks: Path, teacher: Path, tmp_path: Path
) -> None:
    options = ["--distill.teacher", str(teacher), "--distill.on-policy", own, "--distill.max-tokens", "8"]
    out = go(base, talks, tmp_path / "run", *options, "--steps", steps, "--learning-rate", "0.01", "--no-packed")
    losses = [line["loss"] for line in metrics.read(out) if "loss" in line]
    assert losses[-1] < losses[0] * part
    assert "bits_per_byte" not in metrics.read(out)[-1]


def test_own_answers_follow_the_questions_of_the_data(base: Path, talks: Path) -> None:
    distill = DistillAnswers(teacher=str(base), on_policy=0.5, max_tokens=5)
    task = sft.prepare(sft.Recipe(model=str(base), data=str(talks), held_out=0.0, batch_size=2, distill=distill))
    prompts = {tuple(turns.ids[: turns.last_answer]) for turns in task.training.fitting}
    own = 0
    for step in range(8):
        batch = task.data.batch(step)
        assert all(torch.equal(batch[name], again) for name, again in task.data.batch(step).items())
        if "documents" in batch:
            continue
        own += 1
        for tokens, mask in zip(batch["tokens"].tolist(), batch["mask"], strict=True):
            first = int(mask.nonzero()[0])
            assert tuple(tokens[:first]) in prompts and 1 <= mask.sum() <= 5
    assert 0 < own < 8


def test_a_language_model_learns_from_a_teacher(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three good bad four five " * 80)
    of = ["--data", str(tmp_path / "text.txt"), "--tokenizer", str(teacher), "--distill.teacher", str(teacher)]
    small = ["--depth", "1", "--context-length", "16", "--steps", "40", "--batch-size", "4"]
    parse(["gpt", *of, *small, "--out", str(tmp_path / "run")])()
    lines = metrics.read(tmp_path / "run")
    assert "bits_per_byte" not in lines[-1]
    validated = [line["validation_nats"] for line in lines if "validation_nats" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert validated and losses[-1] < losses[0]


def test_divergences_by_name() -> None:
    options: list[dict] = [{}, {"divergence": "reverse"}, {"divergence": "jsd"}, {"beta": 0.2}]
    assert [Distill(teacher="a", **given).strength for given in options] == [0, 1, 0.5, 0.2]
    assert Distill(teacher="a", divergence="jsd", beta=0.9).strength == 0.9


def test_options_that_cannot_be_followed_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill.beta needs a teacher"):
        Distill(beta=0.5)
    with pytest.raises(UserError, match="forward has no beta"):
        Distill(teacher="a", divergence="forward", beta=0.5)
    with pytest.raises(UserError, match=r"distill.on_policy needs a teacher"):
        DistillAnswers(on_policy=0.5)
    _, tokenizer = checkpoints.load(base)
    with pytest.raises(UserError, match="reads 48 tokens, and a row has 64"):
        Distill(teacher=str(base)).objective(tokenizer, 64)
    capped = gemma2.build(gemma2.Config(**SIZES | {"vocab_size": 34, "n_kv_heads": 2, "head_dim": 8}))
    for pair in ((capped, two_models()[0]), (two_models()[1], capped)):
        with pytest.raises(UserError, match="soft cap on its logits"):
            Distillation(pair[0])(pair[1], packed_rows())
    folder = tmp_path / "capped"
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size, "n_kv_heads": 2, "head_dim": 8}
    checkpoints.save(gemma2.build(gemma2.Config(**sizes)), tokenizer, folder)
    for teacher, student in ((folder, None), (base, capped)):  # before the run starts
        with pytest.raises(UserError, match="soft cap on its logits"):
            Distill(teacher=str(teacher)).objective(tokenizer, 16, student)
    other = train_tokenizer("bpe", ["red green blue"] * 9, 280)
    with pytest.raises(UserError, match="another tokenizer than the student"):
        Distill(teacher=str(base)).objective(other, 16)
