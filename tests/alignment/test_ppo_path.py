"""PPO from answers to what is learned of them, joined, against NumPy: rewards, what a cut-off costs, advantages and
returns, the sign of the distance; and the text beside the answers, which moves on and covers an epoch."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keifu import checkpoints
from keifu.alignment.grpo import GRPOBatches, grpo
from keifu.alignment.ppo import ActorCritic, PPOBatches, PPOSettings, PretrainingMix, ppo
from keifu.alignment.rollouts import RolloutPlan
from keifu.data.chat.prompts import prompt
from keifu.data.chat.thoughts import answer_of
from keifu.data.text.packed import PackedText
from keifu.data.text.token_shards import prepare
from keifu.data.tokenizers.chat_template import PLAIN
from keifu.models import task_head

RULE = PPOSettings(kl_coef=0.3, discount=0.9, gae_lambda=0.7, missing_eos_penalty=0.6, temperature=0.7)
PLAN = RolloutPlan(prompts=6, group=1, max_tokens=5, temperature=0.7, seed=3, minibatches=2, epochs=2)


def price(text: str) -> float:
    """Return the reward of any answer to this prompt."""
    return (sum(map(ord, text)) % 17) / 9


class Parts:
    """A policy, a reference that is another model, a value model, and prompts."""

    def __init__(self, base: Path):
        torch.set_num_threads(1)
        self.policy: Any
        self.policy, tokenizer = checkpoints.load(base, torch.float32)
        assert tokenizer is not None
        self.tokenizer = tokenizer.with_chat_template(PLAIN)
        torch.manual_seed(5)
        for parameter in self.policy.parameters():
            parameter.data = parameter + 0.05 * torch.randn_like(parameter)
        self.reference = self.shaken(self.policy)
        decoder = self.shaken(self.policy)
        self.value = task_head.add_head(decoder, task_head.Config(decoder.config, "score", ("reward",)))
        records = [{"prompt": f"{a} {b}"} for a in ("one", "two", "good") for b in ("bad", "five", "four three")]
        self.prompts = [prompt(record, "here") for record in records], [prompt(records[0], "here")]

    @staticmethod
    def shaken(model: Any) -> Any:
        """Return a copy with other weights."""
        found = copy.deepcopy(model)
        for parameter in found.parameters():
            parameter.data = parameter + 0.1 * torch.randn_like(parameter)
        return found.requires_grad_(False)

    def rollouts(self, kind: Any, plan: RolloutPlan = PLAN, **more: Any) -> Any:
        """Return rollouts of these parts."""
        return kind(
            self.policy, self.reference, self.tokenizer, *self.prompts,
            reward=lambda prompts, answers: [price(p.text) for p in prompts], plan=plan, **more,
        )  # fmt: skip

    def ppo(self, mix: PretrainingMix | None = None) -> PPOBatches:
        """Return rollouts for PPO."""
        return self.rollouts(PPOBatches, value=self.value, rule=RULE, pretraining=mix)


@pytest.fixture(scope="module")
def parts(base: Path) -> Parts:
    return Parts(base)


def logs_of(model: Any, tokens: torch.Tensor, temperature: float) -> np.ndarray:
    """Return ln p of each token after the first, the first one's as 0, by another way than the library's."""
    with torch.no_grad():
        logits = model(tokens[:, :-1]).double().numpy() / temperature
    logits = logits - logits.max(-1, keepdims=True)
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = np.take_along_axis(shares, tokens[:, 1:, None].numpy(), -1)[..., 0]
    return np.concatenate([np.zeros((len(found), 1)), found], 1)


def expected_of(parts: Parts, row: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the expected figures of an answer, from its tokens alone, by the equations."""
    places = np.flatnonzero(row["mask"])
    tokens = torch.from_numpy(row["tokens"][None, : places[-1] + 1])
    old, reference = (logs_of(model, tokens, 0.7)[0] for model in (parts.policy, parts.reference))
    with torch.no_grad():
        values = parts.value.scores_along(tokens[:, None])[0, 0].double().numpy()
    asked = row["tokens"][: places[0]].tolist()
    reward = next(price(one.text) for one in parts.prompts[0] if parts.tokenizer.render_chat(one.messages) == asked)
    finished = int(row["tokens"][places[-1]]) in parts.tokenizer.stop_ids
    score = reward - 0.6 * (not finished)
    found: dict[str, Any] = {"reward": reward, "finished": float(finished)}
    found["kl"] = sum(old[at] - reference[at] for at in places)
    estimate, following = 0.0, 0.0
    advantages, returns = {}, {}
    for at in reversed(places):
        gain = -0.3 * (old[at] - reference[at]) + (score if at == places[-1] else 0.0)
        before = values[at - 1]
        estimate = gain + 0.9 * following - before + 0.9 * 0.7 * estimate
        advantages[at], returns[at], following = estimate, estimate + before, before
    order = list(places)
    return found | {"advantage": [advantages[at] for at in order], "returns": [returns[at] for at in order]}


def test_what_is_learned_of_answers_is_that_of_numpy(parts: Parts) -> None:
    """Both minibatches of a rollout, of which the advantages are whitened together, after the returns were made."""
    data = parts.ppo()
    rows = []
    for step in range(2):
        batch = {name: tensor.numpy() for name, tensor in data.batch(step).items()}
        assert batch["share"] == pytest.approx(3 / batch["mask"].sum())
        rows += [{name: array[n] for name, array in batch.items()} for n in range(3)]
    wanted = [expected_of(parts, row) for row in rows]
    raw = np.concatenate([each["advantage"] for each in wanted])
    white = iter((raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8))
    for row, each in zip(rows, wanted, strict=True):
        mask = row["mask"]
        assert row["reward"] == pytest.approx(each["reward"], abs=1e-5) and row["finished"] == each["finished"]
        assert row["kl"] == pytest.approx(each["kl"], abs=1e-3)
        np.testing.assert_allclose(row["returns"][mask], each["returns"], atol=1e-3)
        np.testing.assert_allclose(row["advantage"][mask], [next(white) for _ in each["advantage"]], atol=2e-3)
        assert row["reward_spread"] == pytest.approx(np.std([one["reward"] for one in wanted]), abs=1e-5)
    assert {each["finished"] for each in wanted} <= {0.0, 1.0} and any(not each["finished"] for each in wanted)
    kl = [each["kl"] for each in wanted]
    assert np.abs(kl).max() > 0.5  # the sign can be told


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_what_was_just_written_has_a_ratio_of_one(method: str, parts: Parts) -> None:
    """Also where the temperature is not 1: it belongs to sampling and to learning."""
    if method == "ppo":
        data, model = parts.ppo(), ActorCritic(parts.policy, parts.value)
        figures = ppo(model, data.batch(0), RULE).figures
        assert float(figures["update_kl"]) == pytest.approx(0, abs=1e-8)
    else:
        plan = RolloutPlan(prompts=3, group=2, max_tokens=5, temperature=0.7, seed=3)
        data = parts.rollouts(GRPOBatches, plan)
        batch = data.batch(0)
        figures, kept = grpo(parts.policy, batch, (0.2, 0.2), 0.1, "grpo", 0.7).figures, batch["mask"]
        away = [(r - o)[m].double() for r, o, m in zip(batch["reference"], batch["old"], kept, strict=True)]
        expected = sum(float((d.exp() - d - 1).mean()) for d in away)  # Schulman's k3, of p_reference / p
        assert float(figures["kl"]) == pytest.approx(expected, rel=1e-3)
    assert float(figures["clip_fraction"]) == 0


def test_answers_of_a_rollout_are_gone_through_in_parts_and_twice(parts: Parts) -> None:
    data = parts.ppo()
    steps = [data.batch(step)["tokens"] for step in range(4)]
    texts = [{tuple(row[row != 0].tolist()) for row in tokens} for tokens in steps]
    assert texts[0] | texts[1] == texts[2] | texts[3] and len(texts[0] | texts[1]) > len(texts[0])


def test_text_moves_on_and_covers_an_epoch(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    words = ("one", "two", "three", "four", "five", "good", "bad")
    chance = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text(" ".join(chance.choice(words, 900)))
    shards = prepare(str(tmp_path / "text.txt"), parts.tokenizer, held_out=0.2)
    text = PackedText(shards, 12, 1, 4)
    mix = PretrainingMix(text, 4)
    data = parts.ppo(mix)
    seen: list[tuple[int, ...]] = []
    for step in range(-(-text.windows_per_epoch // 12)):
        found = mix.batch(step, 3)
        assert found.shape == (3, 4, 13)
        seen += [tuple(row) for row in found.flatten(0, 1).tolist()]
    texts = [data.batch(step)["pretraining"] for step in range(2)]  # the step's own, of as many rows as answers
    assert all(torch.equal(text, mix.batch(step, 3)) for step, text in enumerate(texts))
    epoch = {tuple(row) for row in text.windows(np.arange(text.windows_per_epoch)).tolist()}
    assert len(epoch) > 20 and set(seen[: text.windows_per_epoch]) == epoch
    held = [tuple(row) for row in mix.held_out(0, 3).flatten(0, 1).tolist()]
    held += [tuple(row) for row in mix.held_out(3, 3).flatten(0, 1).tolist()]
    assert held == [tuple(row) for row in np.resize(text.held_out, (24, 13)).tolist()]
    batches = list(data.validation())
    assert batches[0]["pretraining"].shape == (1, 4, 13)


def test_each_rollout_has_noise_of_its_own(base: Path) -> None:
    """With one prompt and fixed weights, only the noise of the sampling can make two rollouts differ."""
    parts = Parts(base)
    parts.prompts = parts.prompts[0][:1] * 6, parts.prompts[1]
    data = parts.rollouts(GRPOBatches, RolloutPlan(prompts=6, group=1, max_tokens=5, seed=3))
    rollouts = [data.batch(number)["tokens"].tolist() for number in (0, 1, 0)]
    assert rollouts[0] == rollouts[2], "a rollout is a function of the weights and its number"
    same = [first == second for first, second in zip(*rollouts[:2], strict=True)]
    assert not any(same), "rows of both rollouts have the same noise"


def test_each_part_of_the_validation_has_text_of_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    words = np.random.default_rng(0).choice(("one", "two", "three", "four", "five", "good", "bad"), 900)
    (tmp_path / "text.txt").write_text(" ".join(words))
    parts = Parts(base)
    parts.prompts = parts.prompts[0], parts.prompts[0][:2]
    text = PackedText(prepare(str(tmp_path / "text.txt"), parts.tokenizer, held_out=0.2), 12, 1, 4)
    data = parts.ppo(PretrainingMix(text, 2))
    data.at_a_time = 1
    windows = [batch["pretraining"].flatten(0, 1).tolist() for batch in data.validation()]
    assert windows == [text.held_out[:2].tolist(), text.held_out[2:4].tolist()]


def test_thoughts_that_were_cut_off_are_seen_by_rewards(base: Path) -> None:
    """The prompt opens thoughts, and the answers of a few tokens never close them: there is no answer."""
    parts, seen = Parts(base), list[str]()
    parts.tokenizer = parts.tokenizer.with_chat_template(PLAIN + "{% if add_generation_prompt %}<think>{% endif %}")
    data = GRPOBatches(
        parts.policy, None, parts.tokenizer, *parts.prompts, plan=RolloutPlan(prompts=2, group=2, max_tokens=4),
        reward=lambda _, answers: seen.extend(answers) or [float(answer_of(each) == "") for each in answers],
    )  # fmt: skip
    assert data.batch(0)["reward"].tolist() == [1.0] * 4
    assert all(text.startswith("<think>") for text in seen)
