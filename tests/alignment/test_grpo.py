"""GRPO: its objective against NumPy, its rollouts, a reward that rises, resuming to the bit, rewards that fail."""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keifu.alignment.grpo import NORMAL, Variant, advantages, grpo, terms, token_shares
from keifu.alignment.monitor import DivergenceMonitor, Healthy
from keifu.alignment.rewards import reward, score
from keifu.commands.train import parse
from keifu.data.text.synthetic_math import arithmetic, chain_sums, countdowns
from keifu.errors import UserError
from keifu.layers.lora import adapters
from keifu.models import llama
from keifu.recipes.assistant import finetuning, grpo as recipe, ppo
from keifu.recipes.assistant.finetuning import Lora
from keifu.training.run import metrics

CONFIG = {"context_length": 48, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4}


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


def written_out(batch: dict[str, np.ndarray], logits: np.ndarray, clip: float, beta: float) -> tuple[float, float]:
    """Return the sums of loss and k3 over answers, token by token, in NumPy alone."""
    total = kl = 0.0
    for row, tokens in enumerate(batch["tokens"]):
        places = [at for at in range(1, len(tokens)) if batch["mask"][row, at]]
        for at in places:
            line = logits[row, at - 1].astype(np.float64)
            log = line[tokens[at]] - line.max() - np.log(np.exp(line - line.max()).sum())
            ratio, advantage = np.exp(log - batch["old"][row, at]), batch["advantage"][row]
            away = batch["reference"][row, at] - log
            gained = min(ratio * advantage, np.clip(ratio, 1 - clip, 1 + clip) * advantage)
            total += (beta * (np.exp(away) - away - 1) - gained) / len(places)
            kl += (np.exp(away) - away - 1) / len(places)
    return total, kl


def made_up(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return a batch with old and reference log-probabilities close to those of an untrained model."""
    places, ends = torch.arange(length), torch.randint(5, length + 1, (rows, 1))
    each = {name: torch.rand(rows) for name in ("reward", "varied", "finished")}
    old, reference = (torch.randn(rows, length) * 0.3 - np.log(29) for _ in range(2))
    mask = (places >= 3) & (places < ends)
    tokens = torch.randint(0, 29, (rows, length))
    each |= {"advantage": torch.randn(rows), "share": token_shares(mask, "grpo", length)}
    return {"tokens": tokens, "mask": mask, "old": old, "reference": reference, **each}


def test_objective_is_that_of_numpy_however_it_is_split() -> None:
    torch.manual_seed(4)
    model, batch = llama.build(llama.Config(vocab_size=29, **CONFIG)), made_up(7, 13)
    objective = partial(grpo, clip=(0.2, 0.2), beta=0.04, variant="grpo")
    found = objective(model, batch)
    with torch.no_grad():
        logits = model(batch["tokens"]).numpy()
    total, kl = written_out({name: tensor.numpy() for name, tensor in batch.items()}, logits, 0.2, 0.04)
    assert float(found.total.detach()) / 7 == pytest.approx(total / 7, abs=1e-6)
    assert float(found.figures["kl"]) / 7 == pytest.approx(kl / 7, abs=1e-6)
    assert found.weight == 7 and 0 < float(found.figures["clip_fraction"]) < 7
    parts = [objective(model, {name: tensor[at : at + 3] for name, tensor in batch.items()}) for at in (0, 3, 6)]
    torch.testing.assert_close(torch.stack([part.total for part in parts]).sum(), found.total)


def test_advantages_are_those_of_numpy() -> None:
    rewards = torch.randn(5, 7)
    spread = rewards.double().numpy().std(1, ddof=1, keepdims=True) + 1e-4
    expected = (rewards.double().numpy() - rewards.double().numpy().mean(1, keepdims=True)) / spread
    np.testing.assert_allclose(advantages(rewards).numpy(), expected, rtol=0, atol=1e-6)
    assert advantages(torch.full((2, 4), 0.3)).abs().max() == 0
    plain = rewards - rewards.mean(1, keepdim=True)  # Dr. GRPO
    torch.testing.assert_close(advantages(rewards, scaled=False), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["dr-grpo", "dapo", "gspo"])
def test_variants_are_those_of_their_papers_written_out(variant: Variant) -> None:
    """Token by token, as TRL's GRPOTrainer with loss_type dr_grpo, dapo, or grpo and ratios of sequences."""
    torch.manual_seed(5)
    model, batch = llama.build(llama.Config(vocab_size=29, **CONFIG)), made_up(6, 13)
    batch["share"] = token_shares(batch["mask"], variant, 11)
    low, high = 0.2, 0.28
    found = grpo(model, batch, (low, high), 0.0, variant)
    logs = model(batch["tokens"])[:, :-1].double().log_softmax(-1).gather(-1, batch["tokens"][:, 1:, None])[..., 0]
    mask, total = batch["mask"][:, 1:], torch.zeros((), dtype=torch.float64)
    for row in range(6):
        ratios = (logs[row] - batch["old"][row, 1:])[mask[row]]
        ratios = ratios.mean().expand(len(ratios)) if variant == "gspo" else ratios
        advantage = batch["advantage"][row].double()
        cut = ratios.exp().clamp(1 - low, 1 + high)
        each = -torch.minimum(ratios.exp() * advantage, cut * advantage)
        total += {"dr-grpo": each.sum() / 11 / 6, "dapo": each.sum() / mask.sum(), "gspo": each.mean() / 6}[variant]
    torch.testing.assert_close(found.total.double() / found.weight, total, rtol=0, atol=1e-6)
    weights = [*model.parameters()]
    ours, theirs = (torch.autograd.grad(each, weights) for each in (found.total / found.weight, total))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.float(), rtol=1e-4, atol=1e-6)


def test_where_clipping_holds_there_is_no_gradient() -> None:
    logs = torch.tensor([0.5, 0.5, -0.5, -0.5]).requires_grad_()
    zeros = torch.zeros(4)
    found = terms(logs, logs, zeros, torch.tensor([1.0, -1.0, 1.0, -1.0]), (0.2, 0.2), 0.0)
    assert found.clipped.tolist() == [True, False, False, True]
    [gradient] = torch.autograd.grad(found.loss.sum(), logs)
    assert (gradient == 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "variant", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("dr-grpo", "gspo")), "dapo"]
)
def test_variants_learn_and_report_lengths(variant: str, base: Path, task: Path, tmp_path: Path) -> None:
    clip = ["--clip", "0.2"] if variant == "gspo" else []
    out = go(base, task, tmp_path / "run", "--steps", "8", "--learning-rate", "0.015", "--variant", variant, *clip)
    found = lines(out)
    validated = [line["validation_reward"] for line in metrics.read(out) if "validation_reward" in line]
    later = float(np.mean([line["reward"] for line in found[-3:]]))
    if variant != "dapo":  # of which each rollout has the groups that differ
        assert validated[-1] > validated[0] or later > found[0]["reward"]
    assert len({line["loss"] for line in found}) > 1 and all(math.isfinite(line["loss"]) for line in found)
    assert {"length_of_right", "length_of_wrong"} <= found[0].keys()
    assert found[0]["length_of_wrong"] > 0


def test_dynamic_sampling_replaces_groups_with_equal_rewards(base: Path, task: Path) -> None:
    reward = f"{task / 'rewards.py'}:letters"
    options: dict[str, Any] = {"reward": reward, "prompts": 2, "group": 2, "max_tokens": 3, "variant": "dapo"}
    varied = []
    for rounds in (1, 6):
        made = recipe.Recipe(str(base), str(task / "prompts.jsonl"), rounds=rounds, **options)
        batch = recipe.prepare(made).data.batch(0)
        assert len(batch["tokens"]) == 4
        assert torch.allclose(batch["share"] * batch["mask"].sum(), torch.full((4,), 4.0))
        varied.append(batch["varied"].sum())
    assert varied[1] > varied[0]


def test_lengths_are_those_of_right_and_of_wrong_answers(base: Path, task: Path) -> None:
    made = recipe.Recipe(str(base), str(task / "prompts.jsonl"), reward=f"{task / 'rewards.py'}:letters", max_tokens=6)
    batch = recipe.prepare(made).data.batch(0)
    right, lengths = batch["reward"] > 0.5, batch["mask"].sum(1).float()
    for name, side in (("length_of_right", right), ("length_of_wrong", ~right)):
        assert batch[name][0] == pytest.approx(float(lengths[side].mean()) if side.any() else 0.0)


PROBLEM = {"numbers": [3, 5, 8], "target": 16}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("8 + 5 + 3", 1), ("8 + 3 + 5 = 16", 1), ("First 8 * 2.\nAnswer: (8 + 5) + 3 = 16", 1), ("8 * (5 - 3)", 1),
        ("<think>8 + 5 = 13, and 3</think>\n8 + 5 + 3", 1), ("<think>8 + 5 + 3", 0), ("8 + 8", 0), ("8 + 5 - 3", 0),
        ("8 ** 5 ** 3", 0), ("", 0), ("8 + 5 + 3 = ) = 16", 1), ("__import__('os') or 8 + 5 + 3", 0),
        ("3 / (5 - 5) + 8", 0), ("8 + 5 + 3.0", 0), ("(" * 150 + "8+5+3" + ")" * 40, 0),
        ("8 + 5 + 3 + True - True", 0), ("0_8 + 5 + 3", 0),
    ],
)  # fmt: skip
def test_countdown_reward(answer: str, expected: float) -> None:
    assert score(reward("countdown"), "", answer, PROBLEM) == expected


@pytest.mark.parametrize("name", ["last-number", "exact", "worked-steps", "countdown"])
def test_thoughts_that_the_prompt_opened_are_no_answer(name: str) -> None:
    example = {"answer": "85", "numbers": [85], "target": 85}
    assert score(reward(name), "", "2 + 1 = 3, I think 3.\n</think>\n85", example) == 1
    assert score(reward(name), "", "2 + 83 = 85, so 85.\n</think>\n3", example) == 0


@pytest.mark.parametrize(
    ("name", "record", "missing"),
    [("countdown", {"target": 3}, "numbers"), ("countdown", {"numbers": [3]}, "target"), ("exact", {}, "answer")],
)
def test_examples_without_the_fields_of_a_reward_are_refused(name: str, record: dict, missing: str, tmp_path) -> None:
    with pytest.raises(UserError, match=f"has no field {missing}: give it one"):
        score(reward(name), "", "3", record)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, **record}) + "\n" for text in "ab"))
    for chosen in (recipe, ppo):  # before the model, which does not exist, is loaded
        with pytest.raises(UserError, match=f"has no field {missing}, which the reward {name} reads"):
            chosen.prepare(chosen.Recipe(data=str(file), model="none", reward=name))


def test_countdown_problems_can_be_solved_and_are_different() -> None:
    found = [*countdowns(60, (3, 4), 1, seed=2)]
    assert found == [*countdowns(60, (3, 4), 1, seed=2)] and len({str(each) for each in found}) > 50
    assert all(score(reward("countdown"), each["prompt"], each["answer"], each) == 1 for each in found)
    with pytest.raises(UserError, match="2 numbers or more"):
        next(countdowns(1, (1, 2), 1))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("47 + 38 = 85", 1), ("40 + 30 = 70\n7 + 8 = 16\nAnswer: 85", 0), ("85", 0), ("40 + 30 = 70\n86", 0)],
)
def test_worked_steps_have_to_be_true(answer: str, expected: float) -> None:
    [found] = [each for each in arithmetic(300) if each["answer"] == "85"][:1] or [{"prompt": "", "answer": "85"}]
    assert score(reward("worked-steps"), found["prompt"], answer, found) == expected


@pytest.mark.parametrize("data", ["countdown", "arithmetic"])
def test_built_in_tasks_are_prompts(data: str, base: Path) -> None:
    options = finetuning.SumPrompts(count=20)
    found = finetuning.prompts(data, options, 0)
    assert len(found) == 20 and all(each.record["answer"] for each in found)


def go(base: Path, task: Path, out: Path, *arguments: str, function: str = "letters") -> Path:
    data = ["--data", str(task / "prompts.jsonl"), "--reward", f"{task / 'rewards.py'}:{function}"]
    size = ["--prompts", "2", "--group", "8", "--max-tokens", "6"]
    parse(["grpo", "--model", str(base), *data, *size, "--out", str(out), *arguments])()
    return out


def lines(out: Path) -> list[dict[str, float]]:
    return [line for line in metrics.read(out) if "reward" in line]


def test_reward_rises(base: Path, task: Path, tmp_path: Path) -> None:
    found = lines(go(base, task, tmp_path / "run", "--steps", "30", "--learning-rate", "0.015"))
    assert {"reward", "kl", "entropy", "clip_fraction", "length", "finished", "varied"} <= found[0].keys()
    first, last = (np.mean([line["reward"] for line in part]) for part in (found[:5], found[-5:]))
    assert last > first + 0.5, (first, last)
    assert found[0]["clip_fraction"] == 0 and found[0]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(base: Path, task: Path, tmp_path: Path) -> None:
    """Each writes half of the answers, by their own seeds; rewards and gradients are those of the whole rollout."""
    words = ["--steps", "6", "--learning-rate", "0.015", "--precision", "float32"]
    alone = lines(go(base, task, tmp_path / "alone", *words))
    both = lines(go(base, task, tmp_path / "both", *words, "--processes", "2"))
    for name in ("reward", "loss", "kl", "length", "gradient_norm"):
        expected = [line[name] for line in alone]
        assert [line[name] for line in both] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_adapters_learn_without_a_reference(base: Path, task: Path, tmp_path: Path) -> None:
    out = go(base, task, tmp_path / "run", "--steps", "2", "--lora.rank", "4", "--beta", "0")
    assert (out / "adapter_model.safetensors").is_file()
    assert [line["kl"] for line in lines(out)] == [0, 0]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_held_to_the_model_they_are_on(dora: bool, base: Path, task: Path) -> None:
    """Without a copy of it: the reference is the policy, whose adapters are left out."""
    data = str(task / "prompts.jsonl"), f"{task / 'rewards.py'}:letters"
    few = {"prompts": 2, "group": 3, "max_tokens": 6}
    rollouts = recipe.prepare(recipe.Recipe(str(base), data[0], reward=data[1], **few, lora=Lora(2, dora=dora))).data
    assert rollouts.reference is rollouts.policy
    with torch.no_grad():
        for adapter in adapters(rollouts.policy):
            adapter.b.normal_(std=0.5)
    made = rollouts.batch(0)
    assert (made["old"] - made["reference"]).abs().max() > 0.01
    copy = recipe.prepare(recipe.Recipe(str(base), data[0], reward=data[1], **few)).data
    assert copy.reference is not copy.policy
    torch.testing.assert_close(made["reference"], copy._log_probabilities(copy.reference, made), rtol=0, atol=1e-6)
    assert torch.equal(rollouts.batch(0)["old"], made["old"])  # the adapters are back


SEVERAL = ["--minibatches", "2", "--epochs", "2", "--lora.rank", "2", "--lora.dropout", "0.2"]


@pytest.mark.parametrize("parts", [pytest.param([], marks=pytest.mark.slow), SEVERAL])
def test_resumed_to_the_bit(parts: list[str], base: Path, task: Path, tmp_path: Path) -> None:
    """Also in the midst of a rollout that serves several updates."""
    fast = ["--steps", "4", "--learning-rate", "0.01", *parts]
    whole, part = (go(base, task, tmp_path / name, *fast) for name in ("whole", "part"))
    [name] = [file.name for file in whole.glob("*model.safetensors")]
    weights = (whole / name).read_bytes()
    assert weights == (part / name).read_bytes()
    for file in [part / name, *(part / "state").glob("step-00000004.*")]:
        file.unlink()
    go(base, task, part, *fast, "--resume")
    assert weights == (part / name).read_bytes()
    assert [line["reward"] for line in lines(whole)] == [line["reward"] for line in lines(part)]


def test_answers_are_of_the_seed_the_step_and_the_weights(base: Path, task: Path) -> None:
    data = str(task / "prompts.jsonl"), f"{task / 'rewards.py'}:letters"
    options = recipe.Recipe(str(base), data[0], reward=data[1], prompts=2, group=3, max_tokens=6)
    rollouts = recipe.prepare(options).data
    first, again, later = rollouts.batch(3), rollouts.batch(3), rollouts.batch(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len({tuple(row.tolist()) for row in first["tokens"]}) > 2
    assert first["tokens"].shape != later["tokens"].shape or not torch.equal(first["tokens"], later["tokens"])
    torch.testing.assert_close(first["old"], first["reference"], rtol=0, atol=1e-5)  # nothing is learned yet
    torch.nn.init.normal_(next(rollouts.policy.parameters()))
    changed = rollouts.batch(3)["old"]
    assert changed.shape != first["old"].shape or not torch.equal(changed, first["old"])
    largest = rollouts.largest()
    assert largest.keys() == first.keys() and largest["tokens"].numel() >= first["tokens"].numel()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nan", "The reward is nan for the answer"),
        ("text", "The reward is 'good' for the answer"),
        ("fails", "The reward raised KeyError for the answer"),
        ("huge", "The reward is 10{400} for the answer"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_reward_that_fails_is_told(function: str, said: str, base: Path, task: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        go(base, task, tmp_path / "run", "--steps", "2", function=function)


@pytest.mark.parametrize("name", ["price.py", "math.py"])  # also where that is another module's name
def test_the_file_of_a_reward_may_have_dataclasses(name: str, tmp_path: Path) -> None:
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Price:\n"
    file = tmp_path / name
    file.write_text(head + "    each: int = 3\ndef three(prompt, answer, example): return Price().each\n")
    assert score(reward(f"{file}:three"), "a", "b", {}) == 3
    assert sys.modules["math"] is math


def test_the_file_of_a_reward_stands_in_no_import_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model.py may import reward_model, and a second file of the same name stays apart from the first."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reward_model.py").write_text("def seven(prompt, answer, example): return 7\n")
    (tmp_path / "model.py").write_text("from reward_model import seven\n")
    assert score(reward(f"{tmp_path / 'model.py'}:seven"), "a", "b", {}) == 7
    found = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "price.py").write_text("def price(prompt, answer, example): return 1\n")
        found.append(reward(f"{tmp_path / folder / 'price.py'}:price"))
    assert found[0].__module__ != found[1].__module__


def test_a_constant_reward_is_warned_of_once(
    base: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(base, task, tmp_path / "run", "--steps", "3", function="constant")
    assert capsys.readouterr().err.count("so nothing is learned: look at the reward") == 1


def test_a_warning_comes_each_time_that_a_figure_leaves_its_range() -> None:
    watch, values = DivergenceMonitor(NORMAL), [0.1, 0.7, 0.8, 0.2, 0.9]
    assert [len([*watch({"kl": value})]) for value in values] == [0, 1, 0, 0, 1]
    assert "kl is 0.9, normal is 0 to 0.5" in [*DivergenceMonitor(NORMAL)({"kl": 0.9})][0]
    long = DivergenceMonitor({"length": Healthy(0.5, 2.0, "look", relative=True)})
    assert [len([*long({"length": value})]) for value in (7.0, 13.0, 15.0)] == [0, 0, 1]
    assert "length" in long.table({"length": 15.0}) and "normal 3.5 to 14  <- look" in long.table({"length": 15.0})


def test_sums_are_right_and_different() -> None:
    found = [*chain_sums(50, (2, 4), 2, seed=3)]
    assert len({each["prompt"] for each in found}) == 50 and found == [*chain_sums(50, (2, 4), 2, seed=3)]
    for each in found:
        numbers = re.findall(r"([+-]?) ?(\d+)", each["prompt"])
        total = sum(int(sign + number) for sign, number in numbers)
        assert str(total) == each["answer"]
        assert score(reward("last-number"), each["prompt"], f"1 + 2 is not it, but {total}.", each) == 1
        assert score(reward("exact"), each["prompt"], f"{total} ", each) == 1
        assert score(reward("last-number"), each["prompt"], "none", each) == 0


def test_the_built_in_task_is_labelled(base: Path, tmp_path: Path) -> None:
    few = ["--sums.count", "20", "--prompts", "1", "--group", "2", "--max-tokens", "4", "--steps", "1"]
    parse(["grpo", "--model", str(base), *few, "--out", str(tmp_path / "run")])()
    assert "made here" in (tmp_path / "run" / "recipe.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--beta", "-1"], "beta must be 0 or more"),
        (["--group", "1"], "2 answers or more"),
        (["--minibatches", "3"], "16 answers cannot be split into 3 minibatches"),
        (["--max-tokens", "48"], "this model's context is 48"),
        (["--reward", "lst-number"], "Did you mean 'last-number'"),
        (["--reward", "absent.py:f"], "There is no file absent.py"),
        (["--data", "absent.jsonl"], "There is no file absent.jsonl"),
        (["--sums.digits", "0", "--data", "chain-sum"], "--sums.digits must be a whole number from 1"),
    ],
)
def test_bad_options(arguments: list[str], said: str, base: Path, task: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        go(base, task, tmp_path / "run", *arguments)
