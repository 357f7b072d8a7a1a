"""Every option of the recipes that make an assistant or a classifier reaches what it names, and the papers' figures
stand in them, once."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import wiring
from toy_questions import coloured_shapes
from wiring import DIFFERENT, Group, Reach

from keifu import checkpoints
from keifu.alignment.ppo import PPOSettings
from keifu.data.tokenizers.chat_template import PLAIN
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.layers.lora import adapters
from keifu.layers.quantized import QuantizedLinear
from keifu.models import bert, llama, task_head
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.recipes.assistant import distill, dpo, grpo, instruct, ppo, reward, see, sft
from keifu.recipes.assistant.finetuning import Lora
from keifu.recipes.classification import classifier, gpt1_finetune
from keifu.recipes.distilling import DistillAnswers

TOWER: dict[str, Any] = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
TINY: dict[str, Any] = {"context_length": 64, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
WORDS = "one two three four five good bad red blue"


@dataclass(frozen=True)
class Toys:
    """A folder of small inputs by name."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def toys(own_cache: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Return models, conversations, preferences, prompts, rewards, a text and tables."""
    folder = tmp_path_factory.mktemp("toys")
    learned = train_tokenizer("bpe", [f"User: Assistant: System: {WORDS}"] * 9, 300, ["<|im_start|>", "<|im_end|>"])
    for name, dim, layers in (("base", 32, 1), ("wide", 64, 1), ("deep", 32, 3)):
        sizes = TINY | {"dim": dim, "n_layers": layers}
        model = llama.build(llama.Config(vocab_size=learned.vocab_size, **sizes))
        checkpoints.save(model, learned, folder / name)
        judge = task_head.add_head(model, task_head.Config(model.config, "score", ("reward",), classifier_dropout=0.0))
        checkpoints.save(judge, learned.with_chat_template(PLAIN), folder / f"judge-{name}")
    for name, count in (("seen", 8), ("seen-other", 3)):
        coloured_shapes(folder / name, count)
    text = clip_text.Config(vocab_size=learned.vocab_size, context_length=8, embedding_dim=8, **TOWER)
    image = clip_image.Config(image_size=12, patch_size=3, embedding_dim=8, **TOWER)
    checkpoints.save(clip.build(clip.Config(text, image, clip.Pixels(12, 12))), learned, folder / "clip")
    pairs = [(a, b) for a in WORDS.split()[:5] for b in WORDS.split()[5:]]
    for name, count in (("", 20), ("-other", 16)):
        some = pairs[:count]
        talks = [{"prompt": f"{a} {b}", "response": f"{b} " * (9 if b == "red" else 3)} for a, b in some]
        jsonl(folder / f"talks{name}.jsonl", talks)
        jsonl(folder / f"ranked{name}.jsonl", [{"prompt": f"{a} {b}", "chosen": a, "rejected": b} for a, b in some])
        jsonl(folder / f"prompts{name}.jsonl", [{"prompt": f"{a} {b}", "answer": b} for a, b in some])
        lines = [f"{a} {b} {a},{b if b in ('good', 'bad') else 'red'}" for a, b in some]
        (folder / f"table{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    renamed = (folder / "table.csv").read_text().replace("text,label", "words,kind")
    (folder / "renamed.csv").write_text(renamed)
    (folder / "cp932.csv").write_text(
        renamed.replace("words", "text").replace("kind", "label") + "猫,ネコ\n" * 9, "cp932"
    )
    (folder / "entail.csv").write_text(
        "\n".join(["premise,hypothesis,label", *(f"{a} {b},{b},{'yes' if a < 'o' else 'no'}" for a, b in pairs)]) + "\n"
    )
    (folder / "rewards.py").write_text(
        "def length(prompt, answer, example): return len(answer)\ndef other(prompt, answer, example): return 1.0\n"
    )
    for name in ("text.txt", "text-other.txt"):
        (folder / name).write_text(f"{WORDS} {name} " * 60)
    for name, dim in (("bert", 16), ("bert-wide", 32)):
        tokenizer = train_tokenizer("wordpiece", [f"{WORDS} {name}"] * 3, 99)
        size = bert.Config(vocab_size=tokenizer.vocab_size, **TINY | {"dim": dim})
        checkpoints.save(bert.build(size), tokenizer, folder / name)
    return Toys(folder)


def tokenizer_of(record: Any) -> Tokenizer:
    """Return the tokenizer that a run saves."""
    return record.tokenizer


def template(record: Any) -> str | None:
    return tokenizer_of(record).chat_template


def counts(record: Any) -> tuple[int, int]:
    """Count the rows to learn from, and held out."""
    data = record.data
    parts = data.parts if hasattr(data, "parts") else (data.training, data.held_out)
    return len(parts[0]), len(parts[1])


def adapted(what: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return something of the first adapter of what is trained; None where there is none."""
    return lambda record: next((what(adapter) for adapter in adapters(record.model)), None)


def quantized(record: Any) -> bool:
    """Return whether a frozen matrix is in blocks of 4 bits."""
    return any(isinstance(part, QuantizedLinear) for part in record.model.modules())


def labels(record: Any) -> set[str]:
    """Return the layers that have adapters."""
    return {adapter.target.label.rpartition(".")[2] for adapter in adapters(record.model)}


def lora_groups() -> list[Group]:
    """Return the group of `Lora`, which all of these have."""
    rows = {
        "lora.rank": Reach(3, adapted(lambda a: a.low.rank)),
        "lora.alpha": Reach(5.0, adapted(lambda a: a.low.alpha)),
        "lora.targets": Reach(("q_proj", "up_proj"), labels, {"q_proj", "up_proj"}),
        "lora.dropout": Reach(0.3, adapted(lambda a: a.low.dropout)),
        "lora.base": Reach("int4", quantized, True),
        "lora.dora": Reach(True, adapted(lambda a: a.length is not None)),
    }
    return [Group(rows), Group({"lora.rank": Reach(3, ("settings.learning_rate",), DIFFERENT)})]


def shared_rows(toys: Toys) -> dict[str, Reach]:
    """Return the rows of all that begin with a language model."""
    return {
        "model": Reach(toys["wide"], decoder_dim, 64),
        "template": Reach("chatml", template, DIFFERENT),
        "held_out": Reach(0.3, counts, DIFFERENT),
        "micro_batch": Reach(2, "settings.micro_batch"),
        "learning_rate": Reach(0.0071, "settings.learning_rate"),
        "seed": Reach(5, "settings.seed"),
    }


def decoder_dim(record: Any) -> int:
    """Return the width of the language model that is trained."""
    model = getattr(record.model, "policy", record.model)
    return getattr(model, "decoder", model).config.dim


def ranked_rows(toys: Toys) -> dict[str, Reach]:
    """Return the rows of recipes that learn from rankings."""
    return shared_rows(toys) | {
        "data": Reach(toys["ranked-other.jsonl"], lambda r: sum(counts(r)), 16),
        "steps": Reach(41, "settings.steps"),
        "batch_size": Reach(3, ("settings.batch_size", "data.batch_size")),
        "warmup": Reach(0.5, lambda r: round(r.settings.warmup / r.settings.steps, 1)),
        "seed": Reach(5, ("settings.seed", "data._epochs.seed")),
    }


def ranked_groups(toys: Toys) -> list[Group]:
    """Return groups for long conversations, and for passes over the data."""
    longer = 14
    return [
        Group({"epochs": Reach(3.0, lambda r: round(r.settings.steps / r.data.steps_per_epoch))}),
        Group({"drop_long": Reach(True, counts, DIFFERENT)}, {"context_length": longer}, refused=True),
        Group({"context_length": Reach(longer, counts, DIFFERENT)}, {"drop_long": True}),
        *lora_groups(),
    ]


def of_sft(toys: Toys, teacher: str = "base") -> tuple[Any, list[Group]]:
    base = sft.Recipe(toys["base"], toys["talks.jsonl"])
    rows = ranked_rows(toys) | {
        "data": Reach(toys["talks-other.jsonl"], lambda r: sum(counts(r)), 12),
        "limit": Reach(12, lambda r: sum(counts(r))),
        "context_length": Reach(48, "data.context_length"),
        "weight_decay": Reach(0.07, "settings.weight_decay"),
    }
    packed = {"packed": Reach(False, lambda r: len(r.data.rows) == len(r.data.training), True)}
    answers = {
        "distill.on_policy": Reach(0.5, lambda r: getattr(r.data, "share", 0.0)),
        "distill.max_tokens": Reach(9, "run.options.distill.max_tokens"),
    }
    groups = [Group(rows), Group(packed), ranked_groups(toys)[0], *lora_groups()]
    groups += wiring.distill_groups(toys[teacher], {}, answers)
    return base, [*groups, Group({"too_long": Reach("drop", counts)}, {"context_length": 20}, refused=True)]


def of_distill(toys: Toys) -> tuple[Any, list[Group]]:
    """Return the groups of sft, and those of how the student is cut."""
    plain, groups = of_sft(toys, "wide")
    base = distill.Recipe(plain.model, plain.data, distill=DistillAnswers(teacher=toys["deep"]))
    cut = {
        "student_layers": Reach(2, "model.config.n_layers"),
        "student_vocabulary": Reach(9, lambda r: r.model.config.vocab_size, DIFFERENT),
    }
    used = {"student_merges": Reach("used", lambda r: sorted(tokenizer_of(r).backend.get_vocab()), DIFFERENT)}
    vocabulary = {"student_vocabulary": 9}
    teacher = {"distill.teacher": Reach(toys["wide"], "objective.teacher.config.dim", 64)}
    groups = [group for group in groups if "distill.teacher" not in group.rows]
    return base, [
        *groups,
        Group(used, vocabulary),
        Group(teacher),
        Group(cut, {"model": toys["deep"], "distill.teacher": toys["base"]}),
    ]


def of_see(toys: Toys) -> tuple[Any, list[Group]]:
    image = clip_image.Config(image_size=12, patch_size=4, projected=False, **TOWER)
    base = see.Recipe(toys["base"], data=toys["seen"], image=image, held_out=0.25, batch_size=2)
    sides = lambda r: tuple(map(len, r.data.rows))  # noqa: E731
    rows = shared_rows(toys) | {
        "model": Reach(toys["wide"], "model.config.text.dim", 64),
        "held_out": Reach(0.5, sides, DIFFERENT),
        "data": Reach(toys["seen-other"], lambda r: sum(sides(r)), 6),
        "steps": Reach(41, "settings.steps"),
        "batch_size": Reach(3, ("settings.batch_size", "data.batch_size")),
        "warmup": Reach(0.5, lambda r: round(r.settings.warmup / r.settings.steps, 1)),
        "seed": Reach(5, ("settings.seed", "data.seed")),
        "image": Reach(replace(image, patch_size=6), "model.config.image.patch_size", 6),
        "tower_rate": Reach(0.5, "settings.rate_shares", (("tower.", 0.5),)),
        "names_first": Reach(False, lambda r: bool(r.data._names_picture.any())),
    }
    tower = Group({"tower": Reach(toys["clip"], "model.config.image.patch_size", 3)}, {"image": see.Recipe.image})
    left_out = {"left_out": Reach(("red", "round"), lambda r: sum(sides(r)), DIFFERENT)}
    epochs = {"epochs": Reach(6.0, lambda r: round(r.settings.steps / r.data.steps_per_epoch))}
    return base, [
        Group(rows),
        tower,
        Group(left_out),
        Group(epochs),
        *lora_groups(),
    ]


def of_dpo(toys: Toys) -> tuple[Any, list[Group]]:
    rows = ranked_rows(toys) | {
        "loss": Reach("robust", "objective.loss"),
        "beta": Reach(0.37, "objective.beta"),
        "label_smoothing": Reach(0.21, "objective.label_smoothing"),
    }
    margin = Group({"margin": Reach(0.3, "objective.margin")}, {"loss": "simpo"})
    return dpo.Recipe(toys["base"], toys["ranked.jsonl"]), [Group(rows), margin, *ranked_groups(toys)]


def of_reward(toys: Toys) -> tuple[Any, list[Group]]:
    shown = {"demonstrations": Reach(toys["talks.jsonl"], "save.task.demonstrations", DIFFERENT)}
    base = reward.Recipe(toys["base"], toys["ranked.jsonl"])
    return base, [Group(ranked_rows(toys)), Group(shown), *ranked_groups(toys)]


def rollout_rows(toys: Toys) -> dict[str, Reach]:
    """Return the rows of recipes that learn from answers of their own."""
    return shared_rows(toys) | {
        "data": Reach(toys["prompts-other.jsonl"], lambda r: sum(counts(r)), 16),
        "reward": Reach(f"{toys['rewards.py']}:other", scored, 1.0),
        "prompts": Reach(6, "data.plan.prompts"),
        "max_tokens": Reach(9, "data.plan.max_tokens"),
        "minibatches": Reach(3, "data.plan.minibatches"),
        "epochs": Reach(2, "data.plan.epochs"),
        "warmup": Reach(3, "settings.warmup"),
        "seed": Reach(5, ("settings.seed", "data.plan.seed")),
    }


def scored(record: Any) -> float:
    """Return the reward of an answer."""
    prompts = record.data.parts[0][:1]
    return round(float(record.data.scorers["reward"](prompts, ["nine"])[0]), 6)


def sums_group(given: dict[str, Any]) -> Group:
    """Return the group of the built-in task."""
    rows = {
        "sums.count": Reach(30, lambda r: sum(counts(r))),
        "sums.terms": Reach((4, 5), lambda r: {len(found) for found in numbers(r)}, {4, 5}),
        "sums.digits": Reach(3, lambda r: max(len(each) for found in numbers(r) for each in found)),
    }
    return Group(rows, given | {"data": "chain-sum", "template": "plain", "max_tokens": 2})


def numbers(record: Any) -> list[list[str]]:
    """Return the numbers of each problem."""
    return [re.findall(r"\d+", each.text) for each in record.data.parts[0]]


def of_grpo(toys: Toys) -> tuple[Any, list[Group]]:
    rows = rollout_rows(toys) | {
        "group": Reach(4, "data.plan.group"),
        "temperature": Reach(0.7, ("data.plan.temperature", "objective.temperature")),
        "clip": Reach(0.13, "objective.clip", (0.13, 0.31)),
        "clip_high": Reach(0.31, "objective.clip.1"),
        "variant": Reach("dr-grpo", ("objective.variant", "data.variant")),
        "rounds": Reach(3, "data.rounds"),
        "beta": Reach(0.0, ("objective.beta", lambda r: float(r.data.reference is not None))),
        "steps": Reach(41, "settings.steps"),
    }
    batch = {"prompts": Reach(6, "settings.batch_size", 12)}
    by = f"{toys['rewards.py']}:length"
    base = grpo.Recipe(toys["base"], toys["prompts.jsonl"], reward=by, max_tokens=5, group=2)
    beta = {"beta": Reach(0.3, "objective.beta")}
    return base, [Group(rows), Group(batch), Group(beta), sums_group({}), *lora_groups()]


def of_ppo(toys: Toys) -> tuple[Any, list[Group]]:
    rate = {"learning_rate": 1e-3}
    rows = rollout_rows(toys) | {
        "value": Reach("policy", lambda r: round(value_sum(r), 5), DIFFERENT),
        "measured": Reach(("exact", "last-number"), lambda r: len(r.data.scorers), 3),
        "temperature": Reach(0.7, ("data.plan.temperature", "objective.rule.temperature")),
        "kl_coef": Reach(0.31, ("objective.rule.kl_coef", "data.rule.kl_coef")),
        "clip": Reach(0.13, "objective.rule.clip"),
        "value_clip": Reach(0.14, "objective.rule.value_clip"),
        "discount": Reach(0.91, "data.rule.discount"),
        "gae_lambda": Reach(0.92, "data.rule.gae_lambda"),
        "missing_eos_penalty": Reach(0.93, "data.rule.missing_eos_penalty"),
        "rollouts": Reach(7, lambda r: r.settings.steps // r.data.plan.updates),
        "ema": Reach(0.81, "settings.ema"),
    }
    text = {
        "text.data": Reach(toys["text-other.txt"], "data.pretraining.text.shards.index.source"),
        "text.weight": Reach(3.1, "objective.rule.text_weight"),
        "text.each": Reach(3, "data.pretraining.per_answer"),
        "text.length": Reach(11, "data.pretraining.text.context_length"),
        "text.held_out": Reach(0.3, lambda r: len(r.data.pretraining.text.held_out), DIFFERENT),
        "text.text_field": Reach("body", lambda r: of_text(r)["field"]),
        "text.encoding": Reach("cp932", lambda r: of_text(r).get("encoding")),
        "text.split": Reach("end", lambda r: of_text(r).get("split"), None),
        "seed": Reach(5, "data.pretraining.text.seed"),
    }
    value = {"value_rate": Reach(5e-3, lambda r: dict(r.settings.rate_shares)["value."] * r.settings.learning_rate)}
    base = ppo.Recipe(
        toys["base"], reward=toys["judge-base"], data=toys["prompts.jsonl"], prompts=4, minibatches=2, max_tokens=5
    )
    begun = {"text.data": toys["text.txt"], "text.length": 16}
    apart = {"text.validation_data": Reach(toys["text-other.txt"], lambda r: of_text(r).get("validation"), DIFFERENT)}

    def of_text(record: Any) -> dict[str, Any]:
        return record.data.pretraining.text.shards.index["settings"]

    wide = Group(rows, {"value": None})
    sums = sums_group({"reward": "last-number"})
    groups = [wide, Group(text, begun), Group(apart, begun), Group(value, rate), Group(value), sums, STEPS]
    return base, [*groups, *lora_groups()]


def value_sum(record: Any) -> float:
    return float(record.model.value.task_head.project.weight.detach().sum())


STEPS = Group({"steps": Reach(9, "settings.steps")})


def encoded(toys: Toys) -> Group:
    """Return a group for a table as Excel in Japan writes it."""
    return Group({"encoding": Reach("cp932", counts)}, {"data": toys["cp932.csv"]}, refused=True)


def table_rows() -> dict[str, Reach]:
    """Return the rows of both recipes that read a table."""
    return {
        "batch_size": Reach(5, ("settings.batch_size", "data.batch_size")),
        "micro_batch": Reach(2, "settings.micro_batch"),
        "learning_rate": Reach(0.0071, "settings.learning_rate"),
        "weight_decay": Reach(0.07, "settings.weight_decay"),
        "held_out": Reach(0.3, counts, DIFFERENT),
        "epochs": Reach(5, lambda r: r.settings.steps // r.data.steps_per_epoch),
        "seed": Reach(5, ("settings.seed", "data._epochs.seed")),
    }


def of_classifier(toys: Toys) -> tuple[Any, list[Group]]:
    base = classifier.Recipe(data=toys["table.csv"], model=toys["bert"], fine_tune=True)
    rows = table_rows() | {
        "data": Reach(toys["table-other.csv"], lambda r: sum(counts(r)), 16),
        "model": Reach(toys["bert-wide"], "model.config.dim", 32),
        "cut": Reach(4, lambda r: max(map(len, r.data.training.rows))),
    }
    columns = {"text": Reach("words", counts), "label": Reach("kind", counts)}
    new = {"model": "scratch", "size": bert.Config(**TINY), "tokenizer": toys["bert"]}
    size = bert.Config(**TINY | {"dim": 32}, dropout=0.3)
    sizes = {
        "size": Reach(size, ("model.config.dim", "model.config.dropout"), DIFFERENT),
        "tokenizer": Reach(toys["bert-wide"], "model.config.vocab_size", DIFFERENT),
    }
    named = Group(columns, {"data": toys["renamed.csv"]}, refused=True)
    return base, [Group(rows), named, encoded(toys), Group(sizes, new), STEPS]


def of_gpt1_finetune(toys: Toys) -> tuple[Any, list[Group]]:
    base = gpt1_finetune.Recipe(data=toys["table.csv"], model=toys["base"])
    rows = table_rows() | {
        "data": Reach(toys["table-other.csv"], lambda r: sum(counts(r)), 16),
        "model": Reach(toys["wide"], decoder_dim, 64),
        "lm_weight": Reach(0.27, "objective.lm_weight"),
        "warmup": Reach(0.5, lambda r: round(r.settings.warmup / r.settings.steps, 1)),
        "classifier_dropout": Reach(0.37, "model.config.classifier_dropout"),
        "cut": Reach(8, lambda r: max(r.data.training.lengths)),
    }
    columns = {"columns": Reach(("words",), counts), "label": Reach("kind", counts)}
    test = {"test": Reach(toys["table-other.csv"], lambda r: counts(r)[1], 16)}
    form = {"form": Reach("entailment", "model.config.form")}
    entail = {"columns": ("premise", "hypothesis"), "data": toys["entail.csv"]}
    return base, [
        Group(rows), Group(columns, {"data": toys["renamed.csv"]}, refused=True), Group(test), encoded(toys), STEPS,
        Group(form, entail, refused=True),
    ]  # fmt: skip


TABLE = {
    "sft": of_sft, "distill": of_distill, "see": of_see, "dpo": of_dpo, "reward": of_reward, "grpo": of_grpo,
    "ppo": of_ppo, "classifier": of_classifier, "gpt1_finetune": of_gpt1_finetune,
}  # fmt: skip


FREE = {"classifier": {"frozen": "test_frozen.py", "fine_tune": "test_frozen.py"}}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", TABLE)
def test_every_option_reaches_what_it_names(name: str, toys: Toys, tmp_path: Path) -> None:
    base, groups = TABLE[name](toys)
    groups = wiring.logged(base, groups)
    assert not wiring.uncovered(base, groups, FREE.get(name, {})), "an option without a row in the table above"
    wiring.check(groups, lambda given: wiring.run(name, wiring.assign(base, given), tmp_path / name))


PAPERS: dict[str, dict[str, Any]] = {
    "ppo": {
        "objective.rule.kl_coef": 0.02, "objective.rule.clip": 0.2, "objective.rule.text_weight": 27.8,
        "objective.rule.discount": 1.0, "objective.rule.temperature": 1.0, "settings.ema": 0.992,
        "settings.warmup": 10, "settings.betas": (0.9, 0.95), "settings.weight_decay": 0.0, "data.plan.epochs": 1,
        "data.plan.minibatches": 8, "data.plan.group": 1, "settings.learning_rate": 5e-6,
        "objective.rule.gae_lambda": 0.95,
        "settings.schedule": "constant", "settings.precision": "float32", "objective.rule.value_weight": 0.1,
    },
    "grpo": {
        "objective.clip": (0.2, 0.2), "objective.beta": 0.04, "settings.learning_rate": 1e-6,
        "settings.schedule": "constant",
        "settings.betas": (0.9, 0.999), "data.plan.minibatches": 1, "data.plan.epochs": 1, "settings.weight_decay": 0.0,
    },
    "dpo": {
        "objective.beta": 0.1, "objective.loss": "dpo", "objective.label_smoothing": 0.0, "settings.schedule": "linear",
        "settings.learning_rate": 1e-6, "settings.betas": (0.9, 0.999), "settings.weight_decay": 0.0,
        "settings.final_ratio": 0.0,
    },
    "reward": {
        "settings.learning_rate": 9e-6, "settings.betas": (0.9, 0.95), "settings.weight_decay": 0.0,
        "settings.schedule": "cosine", "settings.final_ratio": 0.1, "model.config.classifier_dropout": 0.0,
    },
    "sft": {
        "settings.schedule": "cosine", "settings.final_ratio": 0.1, "settings.betas": (0.9, 0.999),
        "settings.learning_rate": 2e-5, "settings.weight_decay": 0.0,
    },
    "gpt1_finetune": {
        "objective.lm_weight": 0.5, "settings.batch_size": 32, "settings.learning_rate": 6.25e-5,
        "settings.schedule": "linear", "settings.final_ratio": 0.0, "settings.betas": (0.9, 0.999),
        "settings.weight_decay": 0.01, "model.config.classifier_dropout": 0.1, "settings.clip": 1.0,
    },
    "classifier": {
        "settings.batch_size": 16, "settings.learning_rate": 5e-5, "settings.schedule": "linear",
        "settings.final_ratio": 0.0, "settings.betas": (0.9, 0.999), "settings.weight_decay": 0.01,
    },
}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PAPERS)
def test_figures_of_the_papers(name: str, toys: Toys, tmp_path: Path) -> None:
    base = TABLE[name](toys)[0]
    base = replace(base, prompts=8, minibatches=8) if name == "ppo" else base
    record = wiring.run(name, base, tmp_path)
    assert {path: wiring.look(record, path) for path in PAPERS[name]} == PAPERS[name]
    if name == "ppo":
        assert dict(record.settings.rate_shares)["value."] * record.settings.learning_rate == pytest.approx(9e-6)
    if name in ("classifier", "gpt1_finetune"):
        assert record.settings.steps == 3 * record.data.steps_per_epoch
    shares = {"sft": 0.03, "dpo": 0.1, "reward": 0.03, "classifier": 0.1}
    if name in shares:
        long = wiring.assign(base, {"steps": 1000} if name != "classifier" else {"epochs": 500})
        found = wiring.run(name, long, tmp_path).settings
        assert found.warmup == pytest.approx(shares[name] * found.steps, abs=1)


def test_rates_of_adapters(toys: Toys, tmp_path: Path) -> None:
    for name, rate in (("sft", 2e-4), ("dpo", 2e-5), ("reward", 1e-4), ("grpo", 2e-5), ("ppo", 5e-5)):
        base = replace(TABLE[name](toys)[0], lora=Lora(rank=2))
        assert wiring.run(name, base, tmp_path).settings.learning_rate == rate, name


def test_a_rate_of_0_counts_as_given(toys: Toys, tmp_path: Path) -> None:
    for name in ("sft", "grpo", "classifier", "gpt1_finetune"):
        base = replace(TABLE[name](toys)[0], learning_rate=0.0)
        assert wiring.run(name, base, tmp_path).settings.learning_rate == 0.0, name
    with pytest.raises(UserError, match="learning_rate must be above 0"):
        ppo.Recipe(learning_rate=0.0)


def test_paper_figures_stand_once() -> None:
    """The recipe's are the rule's own."""
    recipe, rule = ppo.Recipe(), PPOSettings()
    for name in ("kl_coef", "clip", "value_clip", "discount", "gae_lambda", "missing_eos_penalty", "temperature"):
        assert vars(recipe)[name] == vars(rule)[name]
    assert recipe.text.weight == rule.text_weight and recipe.text.each == 8 and recipe.ema == 0.992


def test_the_steps_of_instructgpt_are_the_recipes_of_their_names(tmp_path: Path) -> None:
    """Each with the options that it was given, beginning with what the step before left."""
    chosen = {"sft": sft.Recipe(steps=3), "reward": reward.Recipe(steps=4), "ppo": ppo.Recipe(rollouts=5)}
    found = list(instruct.phases(instruct.Recipe("base", **chosen), tmp_path))
    tuned, judge = str(tmp_path / "sft"), str(tmp_path / "reward")
    given = {"sft": {"model": "base"}, "reward": {"model": tuned}, "ppo": {"model": tuned, "reward": judge}}
    assert [phase.name for phase in found] == ["sft", "reward", "ppo"]
    for phase, module in zip(found, (sft, reward, ppo), strict=True):
        assert phase.recipe == replace(chosen[phase.name], **given[phase.name])
        assert phase.jobs is module.jobs and phase.folder == tmp_path / phase.name
