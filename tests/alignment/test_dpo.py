"""DPO: its losses against TRL's and written out, its gradient, a run that learns a preference, bad files."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from keifu import checkpoints
from keifu.alignment.dpo import dpo, kto, kto_losses, losses, reference, sequence_log_probabilities
from keifu.commands.train import parse
from keifu.data.chat.preferences import PreferencePairs, RankedResponses, read_preferences
from keifu.errors import UserError
from keifu.models import llama
from keifu.recipes.assistant import dpo as recipe
from keifu.training.run import metrics

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CONFIG = {"context_length": 48, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4}


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


def test_losses_written_out() -> None:
    torch.manual_seed(1)
    ratios, lengths = torch.randn(6, 2) * 5, torch.randint(1, 20, (6, 2)).float()
    margin, mean = ratios[:, 0] - ratios[:, 1], (ratios / lengths)[:, 0] - (ratios / lengths)[:, 1]
    beta = 0.3
    expected = {  # as TRL's DPOTrainer computes sigmoid, ipo, sigmoid_norm and robust
        "dpo": -F.logsigmoid(beta * margin),
        "ipo": (mean - 1 / (2 * beta)) ** 2,
        "normalised": -F.logsigmoid(beta * mean),
    }
    for loss, value in expected.items():
        torch.testing.assert_close(losses(ratios, lengths, loss, beta), value, rtol=0, atol=1e-6)
    smooth = -0.9 * F.logsigmoid(beta * margin) - 0.1 * F.logsigmoid(-beta * margin)
    torch.testing.assert_close(losses(ratios, lengths, "dpo", beta, 0.1), smooth, rtol=0, atol=1e-6)
    robust = (-0.9 * F.logsigmoid(beta * margin) + 0.1 * F.logsigmoid(-beta * margin)) / 0.8
    torch.testing.assert_close(losses(ratios, lengths, "robust", beta, 0.1), robust, rtol=0, atol=1e-6)


def test_losses_without_a_reference_written_out() -> None:
    torch.manual_seed(1)
    logs, lengths, beta = -torch.rand(6, 2) * 30 - 0.01, torch.randint(1, 20, (6, 2)).float(), 0.3
    better, worse = (logs / lengths).double().unbind(1)
    simpo = -(1 / (1 + (-(beta * (better - worse) - 0.4)).exp())).log()  # TRL's CPOTrainer, loss_type simpo
    torch.testing.assert_close(losses(logs, lengths, "simpo", beta, 0.0, 0.4).double(), simpo, rtol=0, atol=1e-6)
    odds = [mean.exp() / (1 - mean.exp()) for mean in (better, worse)]
    orpo = -better - beta * (1 / (1 + odds[1] / odds[0])).log()
    torch.testing.assert_close(losses(logs, lengths, "orpo", beta).double(), orpo, rtol=0, atol=1e-6)
    sure = losses(torch.tensor([[0.0, -90.0]]), torch.ones(1, 2), "orpo", beta)  # p = 1 has no finite odds
    assert sure.isfinite().all()


def test_kto_written_out() -> None:
    ratios, good, kl = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 0.0, 0.0]), torch.full((3,), 0.25)
    value = [1 / (1 + math.exp(-0.3 * (1.0 - 0.25))), *(1 / (1 + math.exp(-0.3 * (0.25 - r))) for r in (-2.0, 0.5))]
    torch.testing.assert_close(kto_losses(ratios, good, kl, 0.3), 1 - torch.tensor(value), rtol=0, atol=1e-6)


def batch(lengths: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return pairs with a prompt of three tokens, padded on the right."""
    longest = max(map(max, lengths))
    tokens = torch.randint(0, 29, (len(lengths), 2, longest), generator=torch.Generator().manual_seed(3))
    places = torch.arange(longest)
    mask = (places >= 3) & (places < torch.tensor(lengths)[..., None])
    return {"tokens": tokens, "mask": mask, "reference": torch.zeros(len(lengths), 2)}


def test_log_probabilities_and_gradient_are_those_of_all_logits() -> None:
    torch.manual_seed(0)
    model, given = llama.build(llama.Config(vocab_size=29, **CONFIG)), batch([(7, 5), (4, 11), (9, 9)])
    found = sequence_log_probabilities(model, given)
    tokens, mask = given["tokens"].flatten(0, 1), given["mask"].flatten(0, 1)
    logs = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    expected = (logs * mask[:, 1:]).sum(-1).view(-1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    frozen = next(iter(model.train().children())).eval()
    torch.testing.assert_close(reference(model, given), expected, rtol=1e-5, atol=1e-5)
    assert model.training and not frozen.training  # each module's own mode is as it was
    assert model.training
    weights = [*model.parameters()]
    ours, theirs = (torch.autograd.grad((x @ torch.tensor([1.0, -2.0])).sum(), weights) for x in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    objective = partial(dpo, loss="dpo", beta=0.5)
    rows = [{name: tensor[row : row + 1] for name, tensor in given.items()} for row in range(3)]
    one, few = objective(model, given), [objective(model, row) for row in rows]
    torch.testing.assert_close(one.total, torch.stack([each.total for each in few]).sum())
    assert one.weight == 3 and {*one.figures} == {"accuracy", "reward_of_better", "reward_of_worse"}


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return "good" is preferred, whatever is asked."""
    file = tmp_path_factory.mktemp("preferences") / "preferences.jsonl"
    words = ["one", "two", "three", "four", "five"]
    rows = [{"prompt": f"{a} {b}", "chosen": f"good {b}", "rejected": f"bad {b}"} for a in words for b in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def go(base: Path, data: Path, out: Path, *arguments: str) -> Path:
    fixed = ["--model", str(base), "--data", str(data), "--batch-size", "4", "--out", str(out)]
    parse(["dpo", *fixed, *arguments])()
    return out


@pytest.mark.parametrize("arguments", [[], ["--loss", "ipo", "--beta", "0.5"], ["--lora.rank", "4"]])
def test_a_preference_is_learned_and_holds_for_new_prompts(
    arguments: list[str], base: Path, preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["--steps", "30", "--learning-rate", "0.005", "--held-out", "0.2"]
    out = go(base, preferences, tmp_path / "run", *fast, *arguments)
    first = next(line for line in metrics.read(out) if "loss" in line)
    last = [line for line in metrics.read(out) if "validation_accuracy" in line][-1]
    assert last["validation_accuracy"] == 1.0 and last["validation_loss"] < first["loss"]
    assert "in 100.0%" in capsys.readouterr().out
    assert checkpoints.load(out)[1].chat_template


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--lora.rank", "4", "--mesh.shard", "2"]], ids=["whole", "shared"])
def test_two_processes_learn_what_one_learns(
    arguments: list[str], base: Path, preferences: Path, tmp_path: Path
) -> None:
    """Each with half of the pairs, or each with half of every matrix too."""
    words = ["--steps", "8", "--learning-rate", "0.005", "--held-out", "0.2", "--precision", "float32"]
    alone = metrics.read(go(base, preferences, tmp_path / "alone", *words, *arguments[:2]))
    both = metrics.read(go(base, preferences, tmp_path / "both", *words, *arguments, "--processes", "2"))
    names = [name for line in alone for name in line if "loss" in name or "accuracy" in name or "norm" in name]
    assert len(names) > 4
    for expected, found in zip(alone, both, strict=True):
        chosen = {name: value for name, value in expected.items() if name in names}
        assert {name: found[name] for name in chosen} == pytest.approx(chosen, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", ["simpo", "orpo", "kto"])
def test_relatives_learn_the_preference_too(loss: str, base: Path, preferences: Path, tmp_path: Path) -> None:
    fast = ["--steps", "24", "--learning-rate", "0.005", "--held-out", "0.2", "--loss", loss]
    out = go(base, preferences, tmp_path / "run", *fast)
    last = [line for line in metrics.read(out) if "validation_accuracy" in line][-1]
    assert last["validation_accuracy"] >= (0.7 if loss == "kto" else 1.0)  # of kto, against a point that moves
    assert {"simpo": "SimPO", "orpo": "ORPO", "kto": "KTO"}[loss] in (out / "report.html").read_text()


def test_kto_learns_from_single_marks(base: Path, tmp_path: Path) -> None:
    words = ["one", "two", "three", "four"]
    rows = [{"prompt": f"{a} {b}", "completion": f"{mark} {b}", "label": mark == "good"}
            for a in words for b, mark in zip(words, ("good", "bad", "bad", "good"), strict=True)]  # fmt: skip
    file = tmp_path / "marks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fast = ["--learning-rate", "0.005", "--held-out", "0", "--loss", "kto"]
    out = go(base, file, tmp_path / "run", "--steps", "16", *fast)
    seen = [line for line in metrics.read(out) if "accuracy" in line]
    assert seen[-1]["accuracy"] == 1.0 and all(line["kl"] >= 0 for line in seen)
    with pytest.raises(UserError, match="line 1: one answer with a mark makes no pair"):
        go(base, file, tmp_path / "pairs")


def test_reference_point_of_kto_is_of_the_whole_batch(base: Path, preferences: Path) -> None:
    """However the batch is split, and of answers to other prompts."""
    task = recipe.prepare(recipe.Recipe(model=str(base), data=str(preferences), loss="kto", batch_size=6))
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    given = task.data.batch(0)
    assert given["tokens"].shape[:2] == (6, 1) and len(given["kl"].unique()) == 1
    objective = partial(kto, beta=0.1)
    parts = [{name: tensor[rows] for name, tensor in given.items()} for rows in (slice(2), slice(2, 6))]
    whole, split = objective(task.model, given), [objective(task.model, part) for part in parts]
    torch.testing.assert_close(whole.total, split[0].total + split[1].total)
    for own, other in task.data.parts[0]:
        start = own.last_answer
        assert other.ids[:start] == own.ids[:start] and other.last_answer == start


def test_resumed_to_the_bit(base: Path, preferences: Path, tmp_path: Path) -> None:
    fast = ["--steps", "4", "--learning-rate", "0.005"]
    whole, part = (go(base, preferences, tmp_path / name, *fast) for name in ("whole", "part"))
    for file in (part / "state").glob("step-00000004.*"):
        file.unlink()
    go(base, preferences, part, *fast, "--resume")
    assert (whole / "model.safetensors").read_bytes() == (part / "model.safetensors").read_bytes()


def test_only_the_last_answer_is_learned(base: Path) -> None:
    _, tokenizer = recipe.finetuning.open_model(str(base), "own")
    ranked = RankedResponses([*TALK, {"role": "user", "content": "two"}], ("one", "bad"), (1.0, 0.0))
    ids, learned = recipe.finetuning.sample_answer(tokenizer, ranked, 0)
    told = [id for id, mine in zip(ids, learned, strict=True) if mine]
    assert tokenizer.decode(told, skip_special=False) == "one" + tokenizer.special["eos_token"]


FORMS = {
    "pair": ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, [("a", "b")]),
    "messages": ({"prompt": [TALK[0]], "chosen": [{**TALK[1], "content": "a"}], "rejected": "b"}, [("a", "b")]),
    "conversations": ({"chosen": TALK, "rejected": [TALK[0], {**TALK[1], "content": "b"}]}, [("Hello", "b")]),
    "ranked": ({"prompt": "Hi", "answers": ["a", "b", "c"]}, [("a", "b"), ("a", "c"), ("b", "c")]),
    "marked": ({"prompt": "Hi", "completion": "a", "label": True}, []),
    "scored": ({"prompt": "Hi", "answers": ["a", "b", "c"], "scores": [1, 7, 1]}, [("b", "a"), ("b", "c")]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tmp_path: Path) -> None:
    record, expected = FORMS[form]
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    [found] = read_preferences(tmp_path / "p.jsonl", single=form == "marked")
    assert found.prompt == TALK[:1]
    assert [(found.answers[better], found.answers[worse]) for better, worse in found.pairs()] == expected


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "line 1: two answers are equal"),
        ({"prompt": "Hi", "chosen": "", "rejected": "a"}, "line 1, chosen: an answer must be a text"),
        ({"prompt": "Hi", "answers": ["a"]}, "at least two"),
        ({"prompt": "Hi", "answers": ["a", "b"], "scores": [1]}, "2 answers need 2 scores"),
        ({"prompt": "Hi", "answers": ["a", "b"], "scores": [1, 1]}, "no answer is better"),
        ({"chosen": TALK, "rejected": [{"role": "user", "content": "x"}, TALK[1]]}, "differ before their last"),
        ({"prompt": "Hi", "completion": "a", "label": 1}, "label must be true or false"),
        ({"question": "x"}, "prompt and chosen and rejected"),
    ],
)
def test_faults(record: dict[str, object], said: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=said):
        list(read_preferences(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--beta", "0"], "beta must be more than 0"),
        (["--loss", "kto", "--label-smoothing", "0.1"], "The loss kto has no label_smoothing"),
        (["--margin", "0.1"], "The loss dpo has no margin"),
        (["--label-smoothing", "0.5"], "below 0.5"),
        (["--context-length", "6"], "pairs are longer than 6 tokens"),
    ],
)
def test_bad_options(arguments: list[str], said: str, base: Path, preferences: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        go(base, preferences, tmp_path / "run", *arguments)


@pytest.mark.parametrize("shift", [-3.0, 0.5])
def test_reference_point_of_kto_is_the_mean_log_ratio_and_at_least_0(
    base: Path, preferences: Path, shift: float
) -> None:
    """shift: log-ratio of every answer to another prompt, once below 0 and once above."""
    task = recipe.prepare(recipe.Recipe(model=str(base), data=str(preferences), loss="kto", batch_size=6))
    items = np.arange(6)
    both = PreferencePairs.make_batch(task.data, False, items)
    other = {name: tensor[:, 1:2] for name, tensor in both.items()}
    now = reference(task.model, other)
    part = task.data.parts[0]
    stored = both["reference"][:, 1:2]
    change = float((now - stored).mean()) - shift
    for tensor in vars(task.data).values():
        if isinstance(tensor, tuple) and any(torch.is_tensor(each) and each.shape[1:] == (2,) for each in tensor):
            for each in tensor:
                each += change
    found = task.data.make_batch(False, items)["kl"]
    assert len(part) >= 6
    torch.testing.assert_close(found, torch.full((6,), max(0.0, shift)), rtol=0, atol=1e-4)
