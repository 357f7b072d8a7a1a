"""keifu's models in lm-evaluation-harness: its scores of a checkpoint are those of its own transformers backend."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
transformers = pytest.importorskip("transformers")

import lm_eval  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from keifu import checkpoints  # noqa: E402
from keifu.data.tokenizers.train import train_tokenizer  # noqa: E402
from keifu.errors import UserError  # noqa: E402
from keifu.lm_eval import KeifuLM  # noqa: E402
from keifu.models import gpt2  # noqa: E402

TEXT = "Q: What is the capital of France? A: Paris. Q: And that of Japan? A: Tokyo. The end comes once upon a time. "
CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
{rest}
"""
TASKS = {
    "offline-choice": """
output_type: multiple_choice
num_fewshot: 1
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
""",
    "offline-written": """
output_type: generate_until
num_fewshot: 1
doc_to_text: "Q: {{question}}\\nA: "
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "Q"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "offline-rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{question}} {{question}} {{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a GPT-2 of a few thousand weights with sharp answers, and of its tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("bpe", [TEXT] * 3, 300)
    config = gpt2.Config(
        vocab_size=tokenizer.vocab_size, context_length=96, dim=24, hidden_dim=48, n_layers=2, n_heads=3
    )
    model = gpt2.build(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.2)
    folder = tmp_path_factory.mktemp("tiny")
    checkpoints.save(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def both(folder: str) -> tuple[Any, Any]:
    return KeifuLM(folder), HFLM(pretrained=folder, batch_size=4, device="cpu")


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each, task_name="") for each in args]


def test_a_task_from_files_has_the_scores_of_the_transformers_backend(both: tuple[Any, Any], tmp_path: Path) -> None:
    data = tmp_path / "items.json"
    places = [
        ("France", "Paris"),
        ("Japan", "Tokyo"),
        ("the end", "time"),
        ("a model", "once"),
        ("Peru", "Lima a long"),
    ]
    rows = [
        {"question": f"What is the capital of {a}?", "choices": [b, "Tokyo, once", "an"], "answer": n % 3}
        for n, (a, b) in enumerate(places * 2)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, rest in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(CHOICES.format(name=name, data=data, rest=rest))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = [
        lm_eval.simple_evaluate(each, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0, log_samples=True)
        for each in both
    ]
    ours, theirs = (each["results"] for each in found)
    for task, figures in theirs.items():
        for name, value in figures.items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert ours[task][name] == expected, (task, name)
    kept = [result["samples"]["offline-written"] for result in found]
    assert [each["filtered_resps"] for each in kept[0]] == [each["filtered_resps"] for each in kept[1]]
    assert 0 < found[0]["results"]["offline-choice"]["acc,none"] < 1


def test_likelihoods_are_those_of_the_transformers_backend(both: tuple[Any, Any]) -> None:
    asked = requests(
        ("", "Paris"), ("Q: What ", "is"), ("The end", " comes"), ("The en", "d comes"), ("<|endoftext|>The", " end"),
        ("", "<|endoftext|>Paris"),
        (TEXT * 3, " Tokyo."), ("The end\n\n", "once"),
    )  # fmt: skip
    for ours, theirs in zip(*(each.loglikelihood(asked, disable_tqdm=True) for each in both), strict=True):
        assert ours == (pytest.approx(theirs[0], rel=1e-5, abs=1e-4), theirs[1])
    long = requests((TEXT,), (TEXT * 3,), ("a",))
    ours, theirs = (each.loglikelihood_rolling(long, disable_tqdm=True) for each in both)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_writing_heeds_what_a_task_asks(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    asked = requests(
        ("The end", {"until": ["a", "\n"], "max_gen_toks": 9}), (TEXT * 3, {"until": "Q", "max_gen_toks": 7}),
        ("once", {"max_gen_toks": 3, "do_sample": False, "temperature": 0.0}),
    )  # fmt: skip
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    drawn = requests(*[("The", {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0, "top_p": 0.9})] * 3)
    assert len(set(ours.generate_until(drawn))) > 1
    with pytest.raises(UserError, match="num_beams is 4"):
        ours.generate_until(requests(("a", {"num_beams": 4})))
    with pytest.raises(UserError, match="leave no room in the context of 96"):
        ours.generate_until(requests(("a", {"max_gen_toks": 96})))


def test_a_models_repetition_penalty_holds_as_in_the_transformers_backend(folder: str, tmp_path: Path) -> None:
    model, tokenizer = checkpoints.load(folder)
    checkpoints.save(model, tokenizer.replace(generation_config={"repetition_penalty": 1.5}), tmp_path)
    ours, theirs = KeifuLM(str(tmp_path)), HFLM(pretrained=str(tmp_path), batch_size=4, device="cpu")
    asked = requests(*[(text, {"max_gen_toks": 20, "do_sample": False}) for text in ("The end", "once", "Q: What")])
    answers = ours.generate_until(asked)
    assert answers == theirs.generate_until(asked, disable_tqdm=True)
    assert answers != KeifuLM(folder).generate_until(asked)


def test_the_harness_knows_it_by_name(folder: str) -> None:
    from lm_eval.api.registry import get_model

    made = get_model("keifu").create_from_arg_string(f"model={folder}", {"batch_size": 3, "device": "cpu"})
    assert isinstance(made, KeifuLM) and made.batch_size == 3 and made.rank == 0 and made.world_size == 1
    assert made.get_model_info()["model"] == folder and made.tokenizer_name == made.tokenizer.fingerprint
    assert KeifuLM(folder, batch_size="auto").batch_size is None
    with pytest.raises(UserError, match="no tokenizer"):
        KeifuLM(made.model)
