"""`keifu compare` with scripted input: blind, in an order of the seed, kept when chosen, gone on with; the interval."""

import json
from pathlib import Path

import pytest
import torch

from keifu import checkpoints
from keifu.cli import parse
from keifu.data.chat.preferences import read_preferences
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.evaluation.pairwise import Judgement, Judgements, Tally, a_is_left
from keifu.models import llama

WORDS = ["one", "two", "three", "four", "five"]
SIZES = {"context_length": 32, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two models that know nothing, and prompts."""
    folder = tmp_path_factory.mktemp("compare")
    tokenizer = train_tokenizer("bpe", ["User: Assistant: one two three four five good bad"] * 9, 280)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = llama.build(llama.Config(vocab_size=tokenizer.vocab_size, **SIZES))
        checkpoints.save(model, tokenizer, folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS))
    (folder / "rewards.py").write_text("def longer(prompt, answer, example): return len(answer)\n")
    return folder


def go(folder: Path, out: Path, keys: str, monkeypatch: pytest.MonkeyPatch, *more: str, b: str = "second") -> None:
    """Run the command with these keys as typed answers, one per line, followed by the end of input."""
    typed = iter(keys)

    def line(prompt: str = "") -> str:
        if (key := next(typed, None)) is None:
            raise EOFError
        return key

    monkeypatch.setattr("builtins.input", line)
    models = [str(folder / "first"), str(folder / b)]
    parse(
        ["compare", *models, "--prompts", str(folder / "prompts.jsonl"), "--max-tokens", "5", "--out", str(out), *more]
    )()


def kept(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()][1:]


def test_choices_are_kept_and_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    go(folder, out, "1x2q", monkeypatch)
    said = capsys.readouterr().out
    assert "first" not in said.partition("A (")[0] and "1:\n" in said and "2:\n" in said  # blind until it ends
    (out / "judgements.jsonl").open("a").write('{"prompt": [{"ro')  # as a crash leaves it
    go(folder, out, "0s1", monkeypatch)
    made = kept(out)
    assert [each["prompt"][0]["content"] for each in made] == WORDS
    lefts = ["A" if a_is_left(0, each["prompt"]) else "B" for each in made]
    rights = ["B" if left == "A" else "A" for left in lefts]
    assert [each["choice"] for each in made] == [lefts[0], rights[1], "even", "skipped", lefts[4]]
    preferences = list(read_preferences(out / "preferences.jsonl"))
    assert len(preferences) == 3
    for each, judged in zip(preferences, (made[0], made[1], made[4]), strict=True):
        a, b = judged["answers"]
        assert each.answers == ((a, b) if judged["choice"] == "A" else (b, a))
    assert "1 even. B wins" in capsys.readouterr().out
    go(folder, out, "", monkeypatch, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["even"] == told["skipped"] == 1 and told["a"] + told["b"] == 3


@pytest.mark.parametrize("key", ["1", "2"])
def test_a_key_means_the_side_whichever_model_stands_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    go(folder, tmp_path / "out", key * len(WORDS), monkeypatch)
    made = kept(tmp_path / "out")
    lefts = ["A" if a_is_left(0, each["prompt"]) else "B" for each in made]
    assert {*lefts} == {"A", "B"} and len(made) == len(WORDS)
    assert [each["choice"] for each in made] == (lefts if key == "1" else ["AB"[side == "A"] for side in lefts])


def test_answers_do_not_depend_on_where_it_was_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(folder, tmp_path / "whole", "11111", monkeypatch)
    go(folder, tmp_path / "parts", "1", monkeypatch)
    go(folder, tmp_path / "parts", "1111", monkeypatch)
    assert kept(tmp_path / "whole") == kept(tmp_path / "parts")


def test_an_answer_may_hold_any_sign(tmp_path: Path) -> None:
    made = Judgement([{"role": "user", "content": "q"}], ("one\u2028two", "three\x85"), "A")
    Judgements(tmp_path, {"by": "me"}).add(made)
    assert Judgements(tmp_path, {"by": "me"}).judgements == [made]


def test_a_reward_chooses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(folder, tmp_path / "out", "", monkeypatch, "--by", f"{folder / 'rewards.py'}:longer", "--limit", "4")
    made = kept(tmp_path / "out")
    longer = ["even" if len(a) == len(b) else "A" if len(a) > len(b) else "B" for a, b in (x["answers"] for x in made)]
    assert len(made) == 4 and [each["choice"] for each in made] == longer


def test_equal_answers_are_not_asked_about(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(folder, tmp_path / "out", "", monkeypatch, "--temperature", "0", b="first")
    assert [each["choice"] for each in kept(tmp_path / "out")] == ["even"] * 5


def test_another_comparison_in_the_folder_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(folder, tmp_path / "out", "1", monkeypatch)
    with pytest.raises(UserError, match=r"holds another comparison \(seed 0 → 3"):
        go(folder, tmp_path / "out", "1", monkeypatch, "--seed", "3")


def test_the_order_is_of_the_seed_and_falls_both_ways() -> None:
    lefts = [a_is_left(seed, [{"role": "user", "content": word}]) for seed in range(20) for word in WORDS]
    assert 30 < sum(lefts) < 70


def test_sentences() -> None:
    assert "Nothing is decided yet" in Tally(0, 0, 3, 0).sentence("x", "y")
    assert "away from chance" in Tally(2, 30, 0, 0).sentence("x", "y")
    told = Tally(9, 11, 1, 0).sentence("x", "y")
    assert "B wins 55.0% of 20 decided; 95% interval 34.2% to 74.2%, which leaves open" in told


def test_a_limit_counts_the_prompts_of_the_file_also_when_it_is_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times: the second continues, and the third, which has no prompt left, asks for none."""
    for keys in ("1", "11", ""):
        go(folder, tmp_path / "out", keys, monkeypatch, "--limit", "3")
    assert [each["prompt"][0]["content"] for each in kept(tmp_path / "out")] == WORDS[:3]
    go(folder, tmp_path / "out", "1111", monkeypatch, "--limit", "4")
    assert [each["prompt"][0]["content"] for each in kept(tmp_path / "out")] == WORDS[:4]
