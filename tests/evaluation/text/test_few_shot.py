"""Few-shot tasks: prompts, task files and what is wrong with them, the four scores, intervals, the verb."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from keifu import checkpoints, cli
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text import few_shot, perplexity, prompt_runner, tasks
from keifu.evaluation.text.few_shot import baselines, majority, normalize_answer
from keifu.evaluation.text.tasks import FewShotTask, TaskItem, is_task, read_task
from keifu.inference.text.generate import Completion, generate
from keifu.inference.text.likelihood import score
from keifu.models import gpt2

PAGE = Path(__file__).parents[3] / "docs/tasks.md"
TEXT = "Q: What is the capital of France? A: Paris, Lyon, Tokyo, Osaka, Cusco, Lima, Ottawa, Toronto. Answer: "
ITEMS = tuple(
    TaskItem(f"Q: {n}\nA:", "ab"[n % 2] * (n % 3 + 1), ("a", "b", "aa", "bb", "aaa", "bbb")) for n in range(9)
)


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer("bpe", [TEXT] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> nn.Module:
    torch.manual_seed(0)
    size: dict[str, Any] = {"context_length": 120, "dim": 24, "hidden_dim": 48, "n_layers": 2, "n_heads": 3}
    model = gpt2.build(gpt2.Config(vocab_size=tokenizer.vocab_size, **size))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


@pytest.fixture
def capitals(tmp_path: Path) -> Path:
    """Write the example of docs/tasks.md to files and return the path of its YAML."""
    yaml, table = re.findall(
        r"^```(?:yaml|json)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "capitals.yaml").write_text(yaml)
    (tmp_path / "capitals.jsonl").write_text(table)
    return tmp_path / "capitals.yaml"


def test_the_example_of_the_page_is_read_as_it_says(capitals: Path) -> None:
    task = read_task(capitals)
    first = TaskItem("Q: What is the capital of France?\nA:", "Paris", ("Lyon", "Paris"))
    assert (task.name, task.metric, task.items[0], len(task.items)) == ("capitals", "choice", first, 4)
    as_json = capitals.with_suffix(".json")
    fields = {
        "items": "capitals.jsonl",
        "prompt": "{{{country}}}: ",
        "answer": "capital",
        "until": "x",
        "max_tokens": 3,
    }
    as_json.write_text(json.dumps(fields))
    task = read_task(as_json)
    assert (task.metric, task.until, task.max_tokens) == ("exact", ("x",), 3)
    assert task.items[1] == TaskItem("{Japan}: ", "Tokyo")
    assert is_task(capitals) and is_task(as_json) and not is_task(capitals.with_suffix(".jsonl"))


@pytest.mark.parametrize(
    ("description", "rows", "told"),
    [
        ("items: a.jsonl\nanswer: b", "", r"a\.yaml, line 1: the task has no field 'prompt', which it needs; it has"),
        ("items: a.jsonl\nprompt: x\nanswer: b\nmetrik: u", "", r"a\.yaml, line 4\) 'metrik'. Did you mean 'metric'"),
        ("items: a.jsonl\nprompt: x\nanswer: b\nmetric: exakt", '{"b": 1}', "no metric of a task 'exakt'. Did you"),
        ("items: a.jsonl\nprompt: 3\nanswer: b", "", r"a\.yaml, line 2: 'prompt' is a number, which it cannot be"),
        ("items: b.jsonl\nprompt: x\nanswer: b", "", r"no file for 'items' \(in .*line 1\) 'b.jsonl'. Did you"),
        ("items: a.jsonl\nprompt: x\nanswer: b", "", r"a\.jsonl has no items"),
        ("items: a.jsonl\nprompt: '{c}'\nanswer: b", '{"c": 1, "b": 2}\n\n{"b": 2}',
         r"a\.jsonl, line 3: there is no field 'c', which .*a\.yaml, line 2 names; it has 'b'"),
        ("items: a.jsonl\nprompt: '{c}'\nanswer: b", '{"c": 1, "b": 2}\n{"c": 2}',
         r"a\.jsonl, line 2: there is no field 'b', which .*a\.yaml, line 3 names; it has 'c'"),
        ("items: a.jsonl\nprompt: '{c}'\nanswer: b", '{"c": [1], "b": 2}', r"line 1: the field 'c' is a list"),
        ("items: a.jsonl\nprompt: x\nanswer: b\nchoices: [u, v]", '{"b": 0}\n{"b": "w"}',
         r"a\.jsonl, line 2: the field 'b' is 'w', which is none of the choices \['u', 'v'\] nor a number from 0 to 1"),
        ("items: a.jsonl\nprompt: x\nanswer: b\nchoices: c", '{"b": 0, "c": []}', "line 1: the field 'c' is"),
        ("items: a.jsonl\nprompt: x\nanswer: b\nchoices: [1, 2]", '{"b": 0}', "line 4: 'choices' must be texts"),
        ("items: a.jsonl\nprompt: x\nanswer: b\nmetric: choice", '{"b": "u"}', "has no choices to choose from"),
        ("items: a.jsonl\nprompt: [\nanswer: b", "", r"a\.yaml cannot be read: "),
        ("items: a.jsonl\nprompt: x\nanswer: b", '{"b": 1}\n{', r"a\.jsonl, line 2: this is no JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_task_file_is_named_by_its_place(
    description: str, rows: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(description)
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(UserError, match=told):
        read_task(tmp_path / "a.yaml")


def test_answers_may_be_numbers_of_choices_and_several_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('q;right;all\n1;2;"[""x"", ""y""]"\n2;no;z\n')
    common = "items: a.csv\nprompt: '{q}'\n"
    (tmp_path / "a.yaml").write_text(common + "answer: right\nchoices: ['yes', 'no', maybe]")
    assert [item.answer for item in read_task(tmp_path / "a.yaml").items] == ["maybe", "no"]
    (tmp_path / "a.yaml").write_text(common + "answer: all\ndemonstrations: a.csv")
    task = read_task(tmp_path / "a.yaml")
    assert task.items[0] == TaskItem("1", "x", (), ("y",)) and task.demonstrations == task.items


def test_a_context_of_one_token_leaves_nothing_to_predict(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    size: dict[str, Any] = {"context_length": 1, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 1}
    model = gpt2.build(gpt2.Config(vocab_size=tokenizer.vocab_size, **size))
    with pytest.raises(UserError, match="context is 1 token"):
        perplexity.evaluate(model, tokenizer, EvalRequest(str(tmp_path / "a.txt")))


def test_prompts_have_their_examples_in_front() -> None:
    task = FewShotTask("t", ITEMS, instruction="Say.", delimiter="=", separator="|")
    drawn = task.sample(2, seed=1, limit=3)
    one, two = (f"{each.prompt}={each.answer}|" for each in drawn.examples)
    assert drawn.prompts(2)[1] == f"Say.|{one}{two}{drawn.items[1].prompt}"
    assert drawn.prompts(1)[1] == f"Say.|{one}{drawn.items[1].prompt}"
    assert replace(task, instruction="").sample(0).prompts(0) == [item.prompt for item in ITEMS]


def test_no_item_is_its_own_example_and_the_draw_is_the_seeds() -> None:
    task = FewShotTask("t", ITEMS)
    for limit in (None, 3, 7, 8):
        drawn = task.sample(4, 3, limit)
        assert len(drawn.examples) == 4 and not set(drawn.examples) & set(drawn.items)
        assert len(drawn.items) == min(limit or 5, 5 if limit != 3 else 3)
        assert [*task.sample(2, 3, limit).examples] == [*drawn.examples[:2]]
    assert task.sample(4, 3, 3).items == ITEMS[:3]  # where others can be shown, the same items are asked
    shuffled = FewShotTask("t", ITEMS[::-1])
    assert shuffled.sample(4, 3).examples == task.sample(4, 3).examples != task.sample(4, 5).examples
    own = FewShotTask("t", ITEMS[:4], demonstrations=ITEMS)
    assert set(own.sample(5).examples) == set(ITEMS[4:]) and own.sample(5).items == ITEMS[:4]
    with pytest.raises(UserError, match="6 shots were requested, but t has 5 items to draw from"):
        own.sample(6)
    with pytest.raises(UserError, match="9 shots were requested, but t has 9 items .* at least one must be left"):
        task.sample(9)


def by_hand(model: nn.Module, tokenizer: Tokenizer, prompt: str, answer: str) -> torch.Tensor:
    start, whole = len(tokenizer.encode(prompt)), tokenizer.encode(prompt + answer)
    return score(model, torch.tensor([whole]))[0, start - 1 :].double()


def test_choices_have_four_scores(model: nn.Module, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    task = FewShotTask("t", ITEMS, unconditional="Answer:", score="character")
    monkeypatch.setitem(few_shot.TASKS, "t", lambda: task)
    found = few_shot.evaluate(model, tokenizer, EvalRequest("t", by_shots=(0, 2), seed=4, batch_size=3))
    drawn = task.sample(2, 4)
    rows: list[tuple[Any, ...]] = []
    for shots in (0, 2):
        right = {name: 0 for name in ("sum", "token", "character", "unconditional")}
        for prompt, item in zip(drawn.prompts(shots), drawn.items, strict=True):
            each = [by_hand(model, tokenizer, prompt, f" {choice}") for choice in item.choices]
            free = [by_hand(model, tokenizer, "Answer:", f" {choice}").sum() for choice in item.choices]
            ways = {
                "sum": [x.sum() for x in each], "token": [x.mean() for x in each],
                "character": [x.sum() / len(c) for x, c in zip(each, item.choices, strict=True)],
                "unconditional": [x.sum() - f for x, f in zip(each, free, strict=True)],
            }  # fmt: skip
            for name, values in ways.items():
                right[name] += item.choices[int(torch.stack(values).argmax())] == item.answer
        rows += [(shots, name, round(count / 7, 4)) for name, count in right.items()]
    assert [row[:3] for row in found.tables["by shots"].rows] == rows
    assert found.figures["accuracy"] == rows[6][2] and found.figures["scored by"] == "character"
    assert (found.figures["shots"], found.figures["items"], found.figures["chance"]) == (2, 7, round(1 / 6, 4))
    assert found.items and [row[1] for row in found.items.rows] == drawn.prompts(0) + drawn.prompts(2)


def test_written_answers_end_at_a_stop_string(
    model: nn.Module, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = [TaskItem(item.prompt, "?") for item in ITEMS]
    written = [generate(model, tokenizer, i.prompt, max_tokens=6, temperature=0, stop="a") for i in bare]
    answers = [f"no {n}" if n % 3 else f"{text.upper()}." for n, text in enumerate(written)]
    said = tuple(TaskItem(item.prompt, answer) for item, answer in zip(bare, answers, strict=True))
    task = FewShotTask("t", said, metric="exact", until=("a",), max_tokens=6)
    monkeypatch.setitem(few_shot.TASKS, "t", lambda: task)
    found = few_shot.evaluate(model, tokenizer, EvalRequest("t"))
    assert found.items and [row[3] for row in found.items.rows] == written
    assert [row[4] for row in found.items.rows] == [n % 3 == 0 for n in range(9)]
    assert found.figures["accuracy"] == 0.3333 and found.figures["scored by"] == "exact match"


def test_the_majority_of_samples_counts(
    model: nn.Module, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert majority(["b", "A.", "<think>b</think>a", "b</think>a", "b"]) == 1 and majority(["x", "y"]) == 0
    texts = iter(["no", "Yes.", "yes", "no", "no", "yes"] * 2)
    written = lambda *given: [Completion(next(texts), [], "stop", 0, 0) for _ in given[2]]  # noqa: E731
    monkeypatch.setattr(prompt_runner, "generate_batch", written)
    items = TaskItem("one", "yes"), TaskItem("two", "yes")
    monkeypatch.setitem(few_shot.TASKS, "t", lambda: FewShotTask("t", items, metric="exact"))
    found = few_shot.evaluate(model, tokenizer, EvalRequest("t", samples=3))
    rows = {row[1]: row[2] for row in found.tables["by shots"].rows}
    assert rows == {"majority of 3": 0.5, "one sample": 0.0, "any of 3": 1.0}
    assert found.figures["accuracy"] == 0.5 and found.figures["scored by"] == "majority of 3"
    monkeypatch.setitem(few_shot.TASKS, "t", lambda: FewShotTask("t", ITEMS))
    with pytest.raises(UserError, match="--samples votes on generated answers"):
        few_shot.evaluate(model, tokenizer, EvalRequest("t", samples=3))


def test_a_cloze_is_right_where_greedy_choice_writes_it(
    model: nn.Module, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = FewShotTask("t", ITEMS, metric="cloze", delimiter="")
    monkeypatch.setitem(few_shot.TASKS, "t", lambda: task)
    found = few_shot.evaluate(model, tokenizer, EvalRequest("t"))
    loss = -sum(by_hand(model, tokenizer, item.prompt, item.answer).sum() for item in ITEMS) / len(ITEMS)
    perplexity = found.figures["perplexity of an answer"]
    assert perplexity == pytest.approx(float(torch.as_tensor(loss).exp()), rel=1e-3)
    low, high = (found.figures[f"perplexity, 95% {end} (bootstrap)"] for end in ("from", "to"))
    assert float(low) < float(perplexity) < float(high)


def test_shots_that_do_not_fit_are_refused_with_both_lengths(
    model: nn.Module, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tuple(TaskItem(f"{TEXT}{n}", "a", ("a", "b")) for n in range(9))
    monkeypatch.setitem(few_shot.TASKS, "t", lambda: FewShotTask("t", long))
    told = (
        r"With 5 shots the longest prompt and its answer have (\d+) tokens, but this model's context is 120: .* fewer"
    )
    with pytest.raises(UserError, match=told) as error:
        few_shot.evaluate(model, tokenizer, EvalRequest("t", shots=5))
    longest = max(len(tokenizer.encode(each + " a")) - 1 for each in FewShotTask("t", long).sample(5).prompts(5))
    assert f" {longest} tokens" in str(error.value)
    with pytest.raises(UserError, match="shots must be a whole number from 0"):
        few_shot.evaluate(model, tokenizer, EvalRequest("t", shots=-1))


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (" 1,234. ", "1234"),
        ("-19", "-19"),
        ("“The  End!”", "the end"),
        ("Ｔｏｋｙｏ\n", "tokyo"),
        ("1, 2", "1, 2"),
        ("", ""),
    ],
)
def test_what_makes_no_other_answer(text: str, bare: str) -> None:
    assert normalize_answer(text) == bare


def test_baselines_need_no_model() -> None:
    assert baselines(ITEMS[:5]) == {"majority": 0.2, "majority answer": "a", "chance": 0.1667}
    own = [TaskItem("x", choice, (choice, "z")) for choice in "abc"] + [TaskItem("x", "d", ("z", "q", "d"))]
    assert baselines(own) == {"majority": 0.75, "majority answer": "choice 1", "chance": round((1.5 + 1 / 3) / 4, 4)}
    assert baselines([TaskItem("x", "A."), TaskItem("y", "a"), TaskItem("z", "b")]) == {
        "majority": 0.6667,
        "majority answer": "a",
    }


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if "digit" in name])
def test_arithmetic_is_right_and_always_the_same(name: str) -> None:
    task = tasks.TASKS[name]()
    assert task == tasks.TASKS[name]()
    shown = task.demonstrations or ()
    assert (len(task.items), len(set(task.items) | set(shown))) == (2000, 2200)
    for item in (*task.items, *shown):
        sum_ = re.sub(r"plus|minus|times", lambda word: {"p": "+", "m": "-", "t": "*"}[word[0][0]], item.prompt)
        assert str(eval(sum_[len("Q: What is ") : sum_.index("?")])) == item.answer
        assert normalize_answer(item.answer) == item.answer


def out(capsys: pytest.CaptureFixture, *words: str) -> str:
    cli.main(words)
    return capsys.readouterr().out


def test_the_verb_asks_a_task_file(
    model: nn.Module, tokenizer: Tokenizer, capitals: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "model"
    checkpoints.save(model, tokenizer, folder)
    asked = ("evaluate", str(folder), "--on", str(capitals))
    told = json.loads(out(capsys, *asked, "--by-shots", "0", "1", "--output", str(tmp_path / "o.jsonl"), "--json"))
    assert (told["shots"], told["items"], told["chance"], len(told["by shots"])) == (1, 3, 0.5, 8)
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[5]["prompt"].count("Q: What is") == 2 and rows[5]["right"] in rows[5]["details"]
    table = out(capsys, *asked, "--shots", "1", "--metric", "exact", "--output", str(tmp_path / "o.tsv"))
    assert "exact match" in table and "majority" in table
    assert (tmp_path / "o.tsv").read_text().splitlines()[0].split("\t")[:3] == ["shots", "prompt", "right"]
    for words, sentence in (
        (["--metric", "choise"], "There is no metric of a task 'choise'. Did you mean 'choice'?"),
        (["--beam", "3"], "--beam has no meaning here"),
        (["--shots", "4"], "4 shots were requested, but capitals has 4 items to draw from"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*asked, *words])
        assert sentence in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*asked[:3], "topiks"])
    assert "Did you mean 'topics'?" in capsys.readouterr().err


def test_every_sample_of_every_item_has_a_seed_of_its_own(
    model: nn.Module, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one item, seeds that begin again at each item could not be seen; with one seed, no overlap of two."""
    seeds: list[int] = []

    def written(model: Any, tokenizer: Any, prompts: Any, samplings: Any, *rest: Any) -> list[Completion]:
        seeds.extend(each.seed for each in samplings)
        return [Completion("yes", [], "stop", 0, 0) for _ in prompts]

    monkeypatch.setattr(prompt_runner, "generate_batch", written)
    items = tuple(TaskItem(text, "yes") for text in ("one", "two", "three"))
    monkeypatch.setitem(few_shot.TASKS, "t", lambda: FewShotTask("t", items, metric="exact"))
    for seed in (0, 1):
        few_shot.evaluate(model, tokenizer, EvalRequest("t", samples=4, seed=seed))
    assert len(seeds) == len({*seeds}) == 2 * 3 * 4
