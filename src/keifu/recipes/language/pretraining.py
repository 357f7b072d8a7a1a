"""Shared code of the language model recipes: text, tokenizer, the training run, and common options and settings of
GPT-3 and PaLM."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from keifu.data.catalogue import catalogue
from keifu.data.text import prepared
from keifu.data.text.documents import TextFileFormat, content_hash, documents
from keifu.data.text.held_out import SplitRule, training_texts
from keifu.data.text.packed import PackedText
from keifu.data.text.token_shards import Shards, prepare
from keifu.data.tokenizers.load import learned_tokenizer, load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import KINDS, train_tokenizer
from keifu.devices import choose
from keifu.inference.text.generate import generate
from keifu.layers.lazy import build_lazily
from keifu.layers.mixture import collapsed_routers, mixtures
from keifu.layers.transformer.decoder import DecoderLM
from keifu.processes import current
from keifu.ranges import BelowOne, Count, NotNegative, Seed
from keifu.recipes.options import Logging, value_or
from keifu.recipes.plan import check_plan
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Job, RunFacts, parameters
from keifu.training.objectives.language_modeling import causal_language_modeling, masked_diffusion
from keifu.training.objectives.layer_losses import with_balancing
from keifu.training.protocols import Data, Objective
from keifu.training.run.progress import format_count
from keifu.training.settings import Settings

VALIDATION_TOKENS = 100_000
PER_TOKEN = (causal_language_modeling, masked_diffusion)  # their losses are nats per token of the text
SAMPLE_TOKENS = 100


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Format of a text, and its held-out part."""

    held_out: BelowOne = 0.05
    """Share of the text that is kept for validation."""
    validation_data: str | None = None
    """Another text, like --data, to validate on; all of the first is then trained on."""
    text_field: str | None = None
    """The field, or column, that holds the text in .jsonl, .json, .csv, .tsv and .parquet files; unset: text."""
    encoding: str = "utf-8"
    """Encoding of text files without a byte order mark, such as cp932 (Shift-JIS), euc_jp or cp1252."""
    split: tyro.conf.Suppress[SplitRule] = "spread"
    """Rule that chooses the held-out part; a run of an earlier version is resumed with "end"."""

    @property
    def form(self) -> TextFileFormat:
        """Format of the text files."""
        return TextFileFormat(self.text_field, self.encoding)

    def reading(self) -> dict[str, Any]:
        """Return only these options, by name."""
        return {field.name: getattr(self, field.name) for field in fields(TextOptions)}

    def shards(self, data: str, tokenizer: Tokenizer) -> Shards:
        """Return the tokenized training and held-out parts of a text, or of a folder of shards (keifu data prepare)."""
        if prepared.is_prepared(data):
            return prepared.open_prepared(data, self.held_out, self.split)
        return prepare(data, tokenizer, self.held_out, 0, self.form, self.validation_data, self.split)

    def described(self) -> dict[str, Any]:
        """Return the options, without a rule that earlier versions had alone."""
        values = asdict(self)
        return {name: value for name, value in values.items() if (name, value) != ("split", "end")}


@dataclass(frozen=True)
class Text(TextOptions):
    """Text that a language model learns from."""

    data: str = "english"
    """A catalogue name (keifu data list); a file: .txt, .md, .html (read without its tags), or records (.jsonl, .json,
    .csv, .tsv, .parquet); or a folder of them."""
    tokenizer: str = "bpe"
    """bpe, unigram, wordpiece or characters to learn one from the data; or a catalogue name, a file or a directory."""
    vocab_size: Count = 8192
    """Vocabulary size of a learned tokenizer."""


TextArgument = Annotated[Text, tyro.conf.arg(name="")]  # options without a prefix


@dataclass(frozen=True)
class TextTask:
    """Text that is ready to train on: its tokens on disk, and the tokenizer."""

    text: Text
    tokenizer: Tokenizer
    shards: Shards

    def facts(self) -> dict[str, Any]:
        """Return the facts for the report."""
        counts = {f"{part} tokens": self.shards.index[part]["tokens"] for part in ("training", "validation")}
        facts = {"source": self.text.data, "fingerprint": self.shards.fingerprint, **counts}
        return facts | {"bytes per token": round(self.shards.bytes_per_token, 3), "held out": self.shards.held_out()}


def prepare_text(text: Text, **options: Any) -> TextTask:
    """Download the text, train the tokenizer (with these options) and tokenize. Results are cached."""
    # a tokenizer of characters refuses all others, so that it needs those of the whole text
    parted = text.split == "spread" and text.validation_data is None and text.tokenizer != "characters"
    part = text.held_out if parted and text.data not in catalogue.CATALOGUE else None
    tokenizer = tokenizer_of(text, part, **options)
    return TextTask(text, tokenizer, text.shards(text.data, tokenizer))


def tokenizer_of(text: Text, held_out: float | None = None, **options: Any) -> Tokenizer:
    """Load the tokenizer of a text, or train one with these options. held_out: share of the text that it does not see;
    None: it sees all.

    Of another model's tokenizer only the vocabulary is kept, because a model at the start of its training is not a chat
    model.
    """
    if prepared.is_prepared(text.data):
        return prepared.tokenizer_of(text.data)
    if text.tokenizer not in KINDS:
        is_catalogued = text.tokenizer in catalogue.CATALOGUE
        tokenizer = load_tokenizer(catalogue.fetch(text.tokenizer) if is_catalogued else Path(text.tokenizer))
        return tokenizer.replace(chat_template=None, generation_config=None)
    option_text = "".join(f"-{option}" for option, value in options.items() if value)
    option_text += "".join(f"-{option}={value}" for option, value in text.form.settings().items())
    option_text += "" if held_out is None else f"-without={held_out}"
    name = f"{text.tokenizer}-{text.vocab_size}{option_text}-{content_hash(text.data, text.form)[:16]}"

    def learn() -> Tokenizer:
        print(f"Learning a {text.tokenizer} tokenizer of {text.vocab_size} tokens from {text.data} ...", flush=True)
        return train_tokenizer(text.tokenizer, _Pieces(text, held_out), text.vocab_size, **options)

    return learned_tokenizer(name, learn)


@dataclass(frozen=True)
class _Pieces:
    """Documents in pieces of limited length, so that all cores help to count one long document."""

    text: Text
    held_out: float | None

    def __iter__(self) -> Iterator[str]:
        data, form = self.text.data, self.text.form
        texts = documents(data, form) if self.held_out is None else training_texts(data, self.held_out, form)
        for document in texts:
            yield from (document[start : start + 100_000] for start in range(0, len(document), 100_000))


@dataclass(frozen=True, kw_only=True)
class TextObjective:
    """Objective of a language model, and the form of the data that it asks for.

    loss: of the tokens, or of a teacher. z_loss: weight of the penalty for a large log-sum of logits. row: tokens of
    a row, if fewer than the context. change: converts the data; its second argument is the seed. options: further
    values that affect the result.
    """

    loss: Objective = causal_language_modeling
    z_loss: float = 0.0
    row: int | None = None
    change: Callable[[Data, int], Data] = lambda data, seed: data
    options: Mapping[str, Any] = field(default_factory=dict)


def pretraining_job(
    name: str, task: TextTask, build: Callable[[Any], DecoderLM], config: Any, settings: Settings, *, prompt: str = "",
    objective: TextObjective = TextObjective(),
) -> Job:  # fmt: skip
    """Return the training of a causal model on a text. The vocabulary is the tokenizer's, not that of `config`."""
    print(task.shards.held_out(), flush=True)
    torch.manual_seed(settings.seed)
    config, split = replace(config, vocab_size=task.tokenizer.vocab_size), not current().is_replicated
    model: Any = build_lazily(partial(build, config), choose()) if split else build(config).to(choose())
    config = model.config
    row = objective.row or config.context_length
    text = PackedText(task.shards, row, settings.growth, settings.seed, VALIDATION_TOKENS)
    deciding = {"model": asdict(config), "text": task.text.described(), **objective.options}
    loss = objective.loss
    if objective.z_loss:
        deciding["z_loss"] = objective.z_loss
        loss = partial(causal_language_modeling, z_loss=objective.z_loss)
    if (balancing := vars(config).get("balancing")) and mixtures(model):
        loss = with_balancing(loss, balancing)

    def sample(step: int) -> str:
        return prompt + generate(model, task.tokenizer, prompt or "\n", raw=True, max_tokens=SAMPLE_TOKENS, seed=step)

    data = objective.change(text, settings.seed)
    return Job(
        model=model, objective=loss, data=data, settings=settings, tokenizer=task.tokenizer, sample=sample,
        largest=data.batch(text.growth.largest),
        facts=RunFacts(
            title=name, about={"parameters": parameters(model)}, data=task.facts(), options=deciding,
            bytes_per_unit=task.shards.bytes_per_token if objective.loss in PER_TOKEN else None,
            watch=lambda figures: collapsed_routers(model),
        ),
    )  # fmt: skip


def check_language_plan(
    build: Callable[[Any], nn.Module], config: Any, text: Text, settings: Settings, yes: bool
) -> None:
    """Check the plan of a new run (see `check_plan`): a token costs six operations per parameter."""
    if text.tokenizer in KINDS:
        config = replace(config, vocab_size=text.vocab_size)
    with torch.device("meta"):
        size = parameters(build(config))
    tokens = settings.steps * settings.batch_size * config.context_length
    check_plan(size, 6 * size * tokens, settings, yes, f", {format_count(tokens)} tokens")


published = partial(
    Settings, warmup=2000, weight_decay=0.1, betas=(0.9, 0.95), clip=1.0, final_ratio=0.1, evaluate_every=1000,
    sample_every=5000, save_every=1000,
)  # fmt: skip


SMALL: dict[str, Any] = {"context_length": 256, "dim": 256, "n_layers": 4, "n_heads": 4}
SMALL_SETTINGS = Settings(  # for a few minutes on two cores
    steps=600, batch_size=16, optimizer="muon", schedule="linear", learning_rate=2e-3, warmup=60, final_ratio=0.0,
    weight_decay=0.01, evaluate_every=150, sample_every=300, save_every=150,
)  # fmt: skip


@dataclass(frozen=True)
class PublishedOptions:
    """Options of the recipes that know a published size and its settings. The module of each has a recipe `PUBLISHED`
    with these values."""

    text: TextArgument = Text(vocab_size=4096)
    """Text to learn from; the default tokenizer is a byte-level BPE that is learned from the text."""
    training: TrainingOptions = SMALL_SETTINGS
    """Settings of the training."""
    prompt: str = "The"
    """Beginning of the samples."""
    recipe_of: Literal["keifu", "paper"] = "keifu"
    """Source of all defaults: keifu (a small model, a few minutes on two cores) or the paper."""
    yes: bool = False
    """Start although the run would take longer than a day."""


@dataclass(frozen=True)
class PretrainingOptions(Logging):
    """Options of the GPT-3 and PaLM recipes."""

    text: TextArgument = Text()
    """Text to learn from."""
    recipe_of: Literal["keifu", "paper"] = "keifu"
    """Source of the training settings: keifu or the paper. The model is the same."""
    steps: Count = 600
    """Updates of the weights; the paper's numbers of steps shrink with them."""
    batch_size: Count = 16
    """Rows in a step, once the batch has grown."""
    micro_batch: Count | None = None
    """Rows computed at a time, which changes no loss; unset: as many as fit in memory."""
    learning_rate: NotNegative | None = None
    """The highest rate; unset: 2e-3, of AdamW next to Muon, or the paper's."""
    matrix_rate: NotNegative = 0.02
    """The highest rate of Muon, for hidden matrices; the papers have none."""
    compile: bool = False
    """Compile with torch.compile: slower to start, then faster."""
    seed: Seed = 0
    """Random seed of the weights, the order of the data and the samples."""
    prompt: str = "The"
    """Beginning of the samples."""

    def share(self, part: float) -> int:
        """Return the number of steps in this fraction of the run."""
        return round(part * self.steps)

    def own_settings(self) -> Settings:
        """Return keifu's settings (see the function of that name)."""
        return own_settings(self, self.steps, self.batch_size, compile=self.compile)

    def settings(self, learning_rate: float, **different: Any) -> Settings:
        """Return the training settings (see `settings_of`)."""
        return settings_of(self, self.steps, self.batch_size, learning_rate, compile=self.compile, **different)


def settings_of(recipe: Any, steps: int, batch_size: int, learning_rate: float, **different: Any) -> Settings:
    """Return settings for this number of steps: 20 validations, 10 samples and 10 checkpoints, fewer in a short run.

    learning_rate: the highest rate, unless the recipe has one. different: fields of `Settings` with other values.
    """
    return Settings(
        steps=steps, batch_size=batch_size, micro_batch=recipe.micro_batch, seed=recipe.seed,
        learning_rate=value_or(recipe.learning_rate, learning_rate), evaluate_every=max(50, steps // 20),
        sample_every=max(50, steps // 10), save_every=max(100, steps // 10), **recipe.logging(), **different,
    )  # fmt: skip


def own_settings(recipe: Any, steps: int, batch_size: int, **different: Any) -> Settings:
    """Return keifu's settings for this number of steps: Muon, with a linear decay of the rates to 0."""
    return settings_of(
        recipe, steps, batch_size, 2e-3, optimizer="muon", schedule="linear", matrix_rate=recipe.matrix_rate,
        warmup=min(100, -(-steps // 10)), final_ratio=0.0, weight_decay=0.01, **different,
    )  # fmt: skip
