"""Supervised fine-tuning: answers that stop, adapters, packing that changes no loss, resuming to the bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import keifu
from keifu import checkpoints
from keifu.commands.train import parse
from keifu.data.chat import conversations
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.chat.conversation import Conversation
from keifu.models import llama
from keifu.recipes.assistant import sft
from keifu.training.objectives.language_modeling import causal_language_modeling

TALKS = {"What is red?": "A colour.", "What is two?": "A number, 二.", "Who barks?": "The dog does.", "Hm": "Yes?"}
CONFIG = {"context_length": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}


@pytest.mark.parametrize("flags", [["--lora.dora"], ["--lora.base", "int4"]], ids=" ".join)
def test_options_of_adapters_without_adapters_are_refused(flags: list[str]) -> None:
    with pytest.raises(UserError, match="set --lora.rank too"):
        parse(["sft", *flags])


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Use one thread: models this small are faster without a second one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an untrained model, with a tokenizer without a chat template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer("bpe", [*TALKS, *TALKS.values(), "User: Assistant: System:"] * 3, 290)
    torch.manual_seed(0)
    checkpoints.save(llama.build(llama.Config(vocab_size=tokenizer.vocab_size, **CONFIG)), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return questions with answers, and one conversation of two turns."""
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [{"prompt": question, "response": answer} for question, answer in TALKS.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def go(base: Path, talks: Path, out: Path, *arguments: str) -> Path:
    fixed = ["--model", str(base), "--data", str(talks), "--held-out", "0", "--batch-size", "2", "--out", str(out)]
    parse(["sft", *fixed, *arguments])()
    return out


@pytest.fixture(scope="module")
def taught(base: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a whole model until it knows the answers, and return its run."""
    torch.set_num_threads(1)
    return go(base, talks, tmp_path_factory.mktemp("runs") / "taught", "--steps", "120", "--learning-rate", "0.01")


def test_samples_ask_what_was_held_out_and_nothing_that_is_learned(base: Path, talks: Path) -> None:
    for held_out in (0.2, 0.4):
        recipe = sft.Recipe(model=str(base), data=str(talks), held_out=held_out)
        learned, held = sft.split(list(conversations.read(str(talks))), held_out)
        shown = sft.prepare(recipe).sample_conversations
        assert shown and all(talk in held and talk not in learned for talk in shown)


def test_conversations_of_one_system_prompt_are_split_by_their_questions() -> None:
    system = {"role": "system", "content": "Be brief."}
    asked = [f"What is {number}?" for number in (*range(50), *range(50))]  # each question twice
    answered = [{"role": "assistant", "content": "A number."}]
    learned, held = sft.split([[system, {"role": "user", "content": text}, *answered] for text in asked], 0.3)
    questions = [{chat[1]["content"] for chat in part} for part in (learned, held)]
    assert all(questions) and questions[0].isdisjoint(questions[1])


def answered(folder: Path) -> dict[str, tuple[str, str | None]]:
    model, tokenizer = keifu.load(folder)
    found = {}
    for question in TALKS:
        talk = Conversation(model, tokenizer)
        found[question] = "".join(talk.reply(question, temperature=0.0, max_tokens=30)), talk.finish_reason
    return found


RIGHT = {question: (answer, "stop") for question, answer in TALKS.items()}


def test_a_whole_model_learns_the_answers_and_where_they_end(taught: Path) -> None:
    assert answered(taught) == RIGHT
    assert (taught / "report.html").exists() and "Assistant:" in (taught / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    "flags", [pytest.param([], id="LoRA"), pytest.param(["--lora.dora"], id="DoRA", marks=pytest.mark.slow)]
)
def test_adapters_learn_other_answers_and_are_all_that_is_left(flags: list[str], taught: Path, tmp_path: Path) -> None:
    others = dict(zip(TALKS, [*TALKS.values()][::-1], strict=True))
    file = tmp_path / "others.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in others.items()))
    before = load_file(taught / "model.safetensors")
    settings = taught / "generation_config.json"
    said = json.loads(settings.read_text())
    settings.write_text(json.dumps(said | {"do_sample": True, "top_k": 1}))
    out = go(taught, file, tmp_path / "run", "--steps", "80", "--learning-rate", "0.02", "--lora.rank", "8", *flags)
    right = {question: (answer, "stop") for question, answer in others.items()}
    assert answered(out) == right and answered(taught) == RIGHT
    own = out / "generation_config.json"
    for place in ("beside the adapters", "of the base"):
        assert keifu.load(out)[1].generation_config.items() >= {"do_sample": True, "top_k": 1}.items(), place
        own.unlink(missing_ok=True)
    settings.write_text(json.dumps(said))
    assert not (out / "model.safetensors").exists() and (out / "adapter_model.safetensors").exists()
    state = load_file(max((out / "state").glob("*.safetensors")))
    assert all(".adapters." in name for name in state if name.startswith("model."))
    checkpoints.convert(out, tmp_path / "merged", "hf")
    assert answered(tmp_path / "merged") == right
    assert all(torch.equal(before[name], tensor) for name, tensor in load_file(taught / "model.safetensors").items())


def test_packing_changes_no_loss(base: Path, talks: Path) -> None:
    found = {}
    for packed in (True, False):
        task = sft.prepare(sft.Recipe(model=str(base), data=str(talks), held_out=0.0))
        rows = task.training.fitting
        data = sft.PackedConversations(rows, [], 64, 4, 0, 0, packed)
        assert len(data.rows) == (2 if packed else 4)
        total, weight, _ = causal_language_modeling(task.model.train(), data.batch(0))
        found[packed] = total.item(), float(weight)
    assert found[True][1] == found[False][1]
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--template", "chatml"], "<|im_start|>"),
        (["--context-length", "65"], "does not fit this model's context of 64"),
        (["--context-length", "8"], "are longer than the 8 tokens of a row"),
        (["--lora.rank", "2", "--lora.targets", "q_projj"], "q_proj"),
        (["--limit", "1"], "at least 2"),
        (["--held-out", "1.5"], "--held-out must be a number from 0 and below 1"),
    ],
)
def test_bad_options(arguments: list[str], said: str, base: Path, talks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said.replace("|", r"\|")):
        go(base, talks, tmp_path / "run", *arguments)
