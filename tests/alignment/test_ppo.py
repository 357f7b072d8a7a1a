"""PPO: its estimates and losses against NumPy, a reward that rises, resuming to the bit, what its value model begins
as, pretraining text beside it, rewards that fail."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keifu import checkpoints
from keifu.alignment import ppo
from keifu.alignment.ppo import ActorCritic, PPOSettings
from keifu.commands.train import parse
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.models import gpt2, llama, task_head
from keifu.recipes.assistant import finetuning, ppo as recipe
from keifu.training.run import metrics

CONFIG: dict[str, Any] = {"context_length": 48, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4}


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


def answers(rows: int, length: int) -> torch.Tensor:
    """Return masks of answers that begin and end anywhere."""
    starts = torch.randint(1, 5, (rows, 1))
    ends = starts + torch.randint(1, length - 5, (rows, 1))
    places = torch.arange(length)
    return (places >= starts) & (places < ends)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0)])
def test_rewards_and_advantages_are_those_of_numpy(discount: float, gae_lambda: float) -> None:
    mask, beta = answers(9, 17), 0.1
    old, reference, values = (torch.randn(9, 17) for _ in range(3))
    scores = torch.randn(9)
    rewards = ppo.kl_penalized_rewards(scores, old, reference, mask, beta)
    found = ppo.advantages(rewards, values, mask, discount, gae_lambda)
    for row in range(9):
        places = [int(at) for at in mask[row].nonzero()]
        following, estimate = 0.0, 0.0
        for at in reversed(places):  # equation 16, from the end
            reward = -beta * float(old[row, at] - reference[row, at]) + (float(scores[row]) if at == places[-1] else 0)
            assert float(rewards[row, at]) == pytest.approx(reward, abs=1e-6)
            error = reward + discount * following - float(values[row, at])
            estimate = error + discount * gae_lambda * estimate
            following = float(values[row, at])
            assert float(found[row, at]) == pytest.approx(estimate, abs=1e-6)
    assert not found[~mask].any() and not rewards[~mask].any()
    chosen = found[mask].double().numpy()
    normal = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(ppo.whiten(found, mask)[mask].numpy(), normal, rtol=0, atol=1e-6)
    left = (found + values)[mask].numpy() - values[mask].numpy()
    explained = 1 - left.var() / (found + values)[mask].numpy().var()
    assert ppo.explained_variance(values, found + values, mask) == pytest.approx(explained, abs=1e-5)


def made_up(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return a batch of answers for an untrained policy."""
    mask = answers(rows, length)
    places = {name: torch.randn(rows, length) * 0.3 for name in ("values", "advantage", "returns")}
    each = {name: torch.rand(rows) for name in ("reward", "finished", "kl", "reward_spread", "explained_variance")}
    batch = {"tokens": torch.randint(0, 29, (rows, length)), "mask": mask, **places, **each}
    batch["old"] = torch.randn(rows, length) * 0.3 - np.log(29)
    batch["share"] = torch.full((rows,), rows / float(mask.sum()))
    return batch | {"pretraining": torch.randint(0, 29, (rows, 2, 8))}


def written_out(
    batch: dict[str, np.ndarray], logits: np.ndarray, values: np.ndarray, rule: PPOSettings
) -> tuple[float, ...]:
    """Return the mean policy loss, the mean value loss and the clipped share, token by token, in NumPy alone."""
    sums = np.zeros(3)
    for row, at in np.argwhere(batch["mask"]):
        line, token = logits[row, at - 1].astype(np.float64), batch["tokens"][row, at]
        log = line[token] - line.max() - np.log(np.exp(line - line.max()).sum())
        ratio, advantage = np.exp(log - batch["old"][row, at]), batch["advantage"][row, at]
        kept = np.clip(ratio, 1 - rule.clip, 1 + rule.clip)
        value, before, came = values[row, at - 1], batch["values"][row, at], batch["returns"][row, at]
        near = np.clip(value, before - rule.value_clip, before + rule.value_clip)
        policy = max(-advantage * ratio, -advantage * kept)
        sums += policy, 0.5 * max((value - came) ** 2, (near - came) ** 2), policy > -advantage * ratio
    return tuple(sums / batch["mask"].sum())


def test_objective_is_that_of_numpy_however_it_is_split() -> None:
    torch.manual_seed(4)
    policy = llama.build(llama.Config(vocab_size=29, **CONFIG))
    decoder = gpt2.build(gpt2.Config(vocab_size=29, **CONFIG, dropout=0.5))
    value = task_head.add_head(decoder, task_head.Config(decoder.config, "score", ("reward",)))
    model: Any = ActorCritic(policy, value)
    batch, rule = made_up(7, 13), PPOSettings(text_weight=3.0)
    objective = partial(ppo.ppo, rule=rule)
    found = objective(model.train(), batch)
    model.eval()
    with torch.no_grad():
        logits = policy(batch["tokens"]).numpy()
        values = model.value.scores_along(batch["tokens"][:, None])[:, 0].numpy()
        nats = -policy(batch["pretraining"].flatten(0, 1)[:, :-1]).log_softmax(-1)
    text = float(nats.gather(-1, batch["pretraining"].flatten(0, 1)[:, 1:, None]).mean())
    told = {name: tensor.numpy() for name, tensor in batch.items()}
    policy_loss, value_loss, clipped = written_out(told, logits, values, rule)
    means = {name: float(value) / 7 for name, value in found.figures.items()}
    assert means["policy_loss"] == pytest.approx(policy_loss, abs=1e-6)
    assert means["value_loss"] == pytest.approx(value_loss, abs=1e-6)
    assert means["clip_fraction"] == pytest.approx(clipped, abs=1e-6) and 0 < clipped < 1
    assert means["text_loss"] == pytest.approx(text, abs=1e-5)
    total = policy_loss + rule.value_weight * value_loss + rule.text_weight * text
    assert found.weight == 7 and float(found.total.detach()) / 7 == pytest.approx(total, abs=2e-5)
    parts = [objective(model, {name: tensor[at : at + 3] for name, tensor in batch.items()}) for at in (0, 3, 6)]
    torch.testing.assert_close(torch.stack([part.total for part in parts]).sum(), found.total)


def test_where_clipping_holds_there_is_no_gradient() -> None:
    logs = torch.tensor([0.5, 0.5, -0.5, -0.5]).requires_grad_()
    values = torch.tensor([0.5, 0.5, -0.5, 0.1]).requires_grad_()
    zeros, returns = torch.zeros(4), torch.tensor([1.0, -1.0, -1.0, 1.0])
    found = ppo.terms(logs, zeros, torch.tensor([1.0, -1.0, 1.0, -1.0]), values, zeros, returns, PPOSettings())
    assert found.clipped.tolist() == [True, False, False, True]
    policy, value = torch.autograd.grad(found.policy.sum() + found.value.sum(), (logs, values))
    assert (policy == 0).tolist() == [True, False, False, True]
    assert (value == 0).tolist() == [True, False, True, False]


@pytest.fixture(scope="module")
def judge(base: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a reward model for a few steps, and return its folder."""
    out = tmp_path_factory.mktemp("judge")
    size = ["--steps", "3", "--batch-size", "4", "--learning-rate", "0.005"]
    parse(["reward", "--model", str(base), "--data", str(task / "pairs.jsonl"), *size, "--out", str(out)])()
    return out


def go(base: Path, task: Path, out: Path, *arguments: str, reward: str | Path = "letters") -> Path:
    given = reward if isinstance(reward, Path) else f"{task / 'rewards.py'}:{reward}"
    data = ["--data", str(task / "prompts.jsonl"), "--reward", str(given)]
    size = ["--prompts", "16", "--minibatches", "2", "--max-tokens", "6", "--warmup", "0"]
    parse(["ppo", "--model", str(base), *data, *size, "--out", str(out), *arguments])()
    return out


def lines(out: Path) -> list[dict[str, float]]:
    return [line for line in metrics.read(out) if "reward" in line]


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [[], ["--lora.rank", "4"]], ids=["whole", "adapters"])
def test_two_processes_learn_what_one_learns(adapters: list[str], base: Path, task: Path, tmp_path: Path) -> None:
    """Each writes half of the answers; advantages are whitened, and gradients of policy, value model and text added
    up, over both."""
    text = ["--text.data", str(task / "text.txt"), "--text.length", "16", "--text.each", "2", "--text.held-out", "0.2"]
    words = ["--steps", "6", "--learning-rate", "0.015", "--value-rate", "0.01", *text, *adapters]
    alone = lines(go(base, task, tmp_path / "alone", *words))
    both = lines(go(base, task, tmp_path / "both", *words, "--processes", "2"))
    assert len(alone) == len(both) == 6
    for name in (*FIGURES, "loss", "text_loss", "gradient_norm"):
        expected = [line[name] for line in alone]
        assert [line[name] for line in both] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


FIGURES = {
    "reward", "reward_spread", "kl", "entropy", "clip_fraction", "update_kl", "explained_variance", "length",
    "finished", "policy_loss", "value_loss",
}  # fmt: skip


def test_reward_rises(base: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = ["--rollouts", "20", "--learning-rate", "0.015", "--value-rate", "0.01", "--ema", "0.5"]
    found = lines(go(base, task, tmp_path / "run", *fast))
    assert found[0].keys() >= FIGURES and len(found) == 40
    first, last = (np.mean([line["reward"] for line in part]) for part in (found[:6], found[-6:]))
    assert last > first + 0.5, (first, last)
    assert found[0]["clip_fraction"] == 0 and found[0]["kl"] == pytest.approx(0, abs=1e-5)
    told = capsys.readouterr().out
    assert "explained variance" in told and "normal 0 to 1" in told and "mean reward of" in told
    assert "normal ranges" in (tmp_path / "run" / "report.html").read_text()
    assert checkpoints.load(tmp_path / "run")[0].config == checkpoints.load(base)[0].config


CHOICES: dict[str, list[str]] = {
    "all": ["--epochs", "2"],
    "text": ["--text.data", "text.txt", "--text.length", "16", "--text.each", "2", "--text.held-out", "0.2"],
    "adapters": [
        "--lora.rank",
        "2",
        "--lora.dropout",
        "0.3",
        "--missing-eos-penalty",
        "1.0",
        "--measured",
        "rewards.py:letters",
    ],
}


@pytest.mark.parametrize(
    "choice", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("all", "adapters")), "text"]
)
def test_resumed_to_the_bit_in_the_midst_of_a_rollout(
    choice: str, base: Path, task: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(task)
    fast = ["--rollouts", "2", "--learning-rate", "0.01", "--value-rate", "0.01", *CHOICES[choice]]
    whole, part = (go(base, task, tmp_path / name, *fast, reward=judge) for name in ("whole", "part"))
    [name] = [file.name for file in whole.glob("*model.safetensors")]
    weights, last = (whole / name).read_bytes(), max((part / "state").glob("*.json")).stem
    for file in [part / name, *(part / "state").glob(f"{last}.*")]:
        file.unlink()
    go(base, task, part, *fast, "--resume", reward=judge)
    assert weights == (part / name).read_bytes()
    assert [line["value_loss"] for line in lines(whole)] == [line["value_loss"] for line in lines(part)]
    keys = metrics.read(whole)[-1].keys()
    assert ("validation_text_loss" in keys) == (choice == "text")
    assert ("validation_measured_letters" in keys) == (choice == "adapters")


def test_the_value_model_begins_as_the_reward_model_or_the_policy(base: Path, task: Path, judge: Path) -> None:
    data = {"data": str(task / "prompts.jsonl"), "prompts": 4, "minibatches": 1, "max_tokens": 6}
    reward: Any = checkpoints.load_model(judge)
    tokens = torch.randint(5, 200, (3, 1, 9))
    made = recipe.prepare(recipe.Recipe(str(base), reward=str(judge), **data))
    torch.testing.assert_close(made.model.value.scores_along(tokens), reward.scores_along(tokens))
    first = made.data.batch(0)
    assert float(first["advantage"][first["mask"]].mean()) == pytest.approx(0, abs=1e-5)
    again = made.data.batch(0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    largest = made.data.largest()
    assert largest.keys() == first.keys() and largest["tokens"].numel() >= first["tokens"].numel()
    new = recipe.prepare(recipe.Recipe(str(base), reward=str(judge), value="policy", **data))
    assert not torch.equal(new.model.value.scores_along(tokens), reward.scores_along(tokens))
    policy = {name: tensor for name, tensor in new.model.policy.state_dict().items()}
    assert all(torch.equal(policy[name], each) for name, each in new.model.value.decoder.state_dict().items())


@pytest.mark.parametrize(
    ("reward", "said"),
    [("nan", "The reward is nan for the answer"), ("fails", "The reward raised KeyError for the answer")],
)
def test_a_reward_that_fails_is_told(reward: str, said: str, base: Path, task: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        go(base, task, tmp_path / "run", "--rollouts", "1", reward=reward)


def test_a_damaged_reward_model_is_told(base: Path, task: Path, judge: Path, tmp_path: Path) -> None:
    model: Any
    model, tokenizer = checkpoints.load(judge)
    for weight in model.decoder.blocks[0].feedforward.parameters():  # each is finite, and the scores are not
        torch.nn.init.normal_(weight, std=1e18)
    checkpoints.save(model, tokenizer, tmp_path / "damaged")
    with pytest.raises(UserError, match="The reward model's score is -?(nan|inf) for the answer"):
        go(base, task, tmp_path / "run", "--rollouts", "1", "--value", "policy", reward=tmp_path / "damaged")


def test_a_constant_reward_is_warned_of_once(
    base: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(base, task, tmp_path / "run", "--rollouts", "2", reward="constant")
    assert capsys.readouterr().err.count("so only the KL penalty is learned: look at the reward") == 1


def test_a_reward_model_of_other_tokens_is_refused(base: Path, task: Path, judge: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer("bpe", ["User: Assistant: six seven eight nine"] * 9, 270)
    model = llama.build(llama.Config(vocab_size=tokenizer.vocab_size, **CONFIG))
    checkpoints.save(model, tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match="reads other tokens than .*choose --value policy"):
        go(tmp_path / "other", task, tmp_path / "run", reward=judge)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clip", "1.5"], "clip, discount and gae_lambda must be between 0 and 1"),
        (["--kl-coef", "-1"], "--kl-coef must be a number from 0"),
        (["--minibatches", "3"], "16 answers cannot be split into 3 minibatches"),
        (["--value", "last-number"], "--value last-number is no model"),
        (["--text.each", "0"], "at least 1 window of 1 token or more"),
        (["--max-tokens", "48"], "this model's context is 48"),
    ],
)
def test_bad_options(arguments: list[str], said: str, base: Path, task: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        go(base, task, tmp_path / "run", *arguments)


def test_a_model_that_scores_nothing_is_no_reward(base: Path, task: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gives no score"):
        go(base, task, tmp_path / "run", reward=base)


@pytest.mark.parametrize(
    ("names", "figures"),
    [
        (["rewards.py:letters"], ["measured_letters"]),
        (["a.py:score", "b.py:score"], ["measured_a_score", "measured_b_score"]),
        (["runs/a/reward", "./runs/b/reward/"], ["measured_a_reward", "measured_b_reward"]),
        (["x/r", "y/s"], ["measured_r", "measured_s"]),
    ],
)
def test_measured_rewards_of_one_name_are_told_apart(names: list[str], figures: list[str], monkeypatch) -> None:
    monkeypatch.setattr(finetuning, "make_rewards", lambda name: finetuning.RewardOptions(lambda p, a: [], None, name))
    found = finetuning.measured(names)
    assert {figure: each.digest for figure, each in found.items()} == dict(zip(figures, names, strict=True))


@pytest.mark.parametrize("names", [["a.py:score", "a.py:score"], ["a/r", "./a/r"]])
def test_a_reward_that_is_measured_twice_is_refused(names: list[str], monkeypatch) -> None:
    monkeypatch.setattr(finetuning, "make_rewards", lambda name: finetuning.RewardOptions(lambda p, a: [], None, name))
    with pytest.raises(UserError, match="--measured"):
        finetuning.measured(names)


def test_a_reward_by_its_hub_id_has_the_digest_of_its_files(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer("bpe", ["a b c"], 270, special_tokens=["<|end|>"])
    decoder = gpt2.Config(vocab_size=270, **CONFIG)
    model = task_head.builder(gpt2.build)(task_head.Config(decoder, "score", ("reward",), classifier_dropout=0.0))
    checkpoints.save(model, tokenizer, tmp_path / "cache")
    monkeypatch.setattr("keifu.checkpoints.hub.download", lambda name: tmp_path / "cache")
    by_id, by_folder = (finetuning.make_rewards(name) for name in ("someone/reward", str(tmp_path / "cache")))
    assert by_id.digest == by_folder.digest and len(by_id.digest) == 64
