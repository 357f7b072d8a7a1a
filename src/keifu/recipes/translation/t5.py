"""T5 (Raffel et al., 2020): an encoder-decoder that restores hidden spans of a text, then translates, in one form.

Paper: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer". The first stage has no
labels: 15% of the tokens are hidden in spans of 3 tokens on average, and the target is the hidden spans. Its model is
in the folder pretraining of the run. The second stage is a translation whose source begins with the name of the task.
The paper pretrained on 2^35 tokens with AdaFactor, and then kept a constant rate of 0.001; the default here is for a
budget of minutes on a processor, with Muon.
Command: keifu train t5 --data tatoeba-ja-en
Cost: 4 minutes for the first stage and 4.5 for the second; the first run learns its tokenizer before them.
Expected: see docs/results.md, "Hidden spans and left to right", for smaller models and shorter runs.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch

from keifu.data.text.documents import documents
from keifu.data.text.normalization import normalize
from keifu.data.text.span_corruption import SENTINELS, SpanCorruption
from keifu.data.translation.batches import by_tokens
from keifu.data.translation.denoising import DenoisedText, HiddenEnd, HiddenSpans, token_stream
from keifu.data.translation.pairs import Pair
from keifu.devices import choose
from keifu.errors import UserError
from keifu.inference.text.translation import TranslationParams, search
from keifu.models.variants import t5
from keifu.ranges import BelowOne, Count, NotNegative, Positive, check
from keifu.recipes.options import value_or
from keifu.recipes.starting import scaled
from keifu.recipes.translation.translator_runs import (
    FREE,
    Training,
    TranslationOptions,
    TranslationTask,
    config_for,
    own_settings,
    prepare_pairs,
    special_ids,
    translator_job,
)
from keifu.training.job import Budget, Job, Jobs, JobStage, PlannedSettings, RunFacts, parameters
from keifu.training.objectives.language_modeling import translation
from keifu.training.settings import Settings

MINUTES = 4.5  # of the second stage
PRETRAINING = JobStage("pretraining", "Pretraining")
LANGUAGES = {
    "de": "German", "en": "English", "es": "Spanish", "fr": "French", "ja": "Japanese", "nl": "Dutch", "sv": "Swedish",
}  # fmt: skip
SENTINEL_TOKENS = [f"<extra_id_{n}>" for n in range(SENTINELS)]
SAMPLES = 3


@dataclass(frozen=True)
class Pretraining:
    """Options of the first stage."""

    objective: Literal["spans", "prefix", "none"] = "spans"
    """Hidden spans; the end of a text after its beginning (left to right); or none, which leaves the stage out."""
    text: str | None = None
    """Text without labels, a catalogue name, file or folder; unset: the sentences of the training pairs, each by
    itself. Documents that are sentences held out for validation or testing are left out."""
    rate: BelowOne = 0.15
    """Share of the tokens that are hidden, at most 0.5."""
    span: Positive = 3.0
    """Mean length of a hidden span, in tokens."""
    window: Count = 96
    """Tokens of the text in a row."""
    minutes: Positive = 4.0
    """Time limit of the stage."""
    steps: Count | None = None
    """Updates of the weights, instead of the minutes."""

    def task(self, sentinels: list[int]) -> HiddenSpans | HiddenEnd:
        """Return the objective. sentinels: their ids."""
        return HiddenSpans(self.rate, self.span, sentinels) if self.objective == "spans" else HiddenEnd()


@dataclass(frozen=True)
class Recipe(TranslationOptions):
    """Options of the run."""

    pretraining: Pretraining = Pretraining()
    """Settings of the first stage, which --start-from leaves out."""
    prefix: str | None = None
    """Name of the task, which is put before each source. Unset: from the languages, as in "translate Japanese to
    English: "."""
    model: t5.Config = t5.Config(
        context_length=128, dim=256, hidden_dim=1024, n_layers=3, n_heads=4, head_dim=64, dropout=0.0
    )
    """The vocabulary and the prefix are the run's, whatever is given here. T5-Small: dim 512, hidden-dim 2048,
    n-layers 6, n-heads 8, dropout 0.1; T5 1.1 is gated, with activation gelu_tanh, not tied and not scaled."""
    learning_rate: NotNegative | None = None
    """Highest learning rate of AdamW, for embeddings and gains, in both stages. Default: 2e-3, and a tenth of it with
    --start-from."""
    matrix_rate: NotNegative | None = None
    """Highest learning rate of Muon, for hidden matrices. Default: 0.02, and a tenth of it with --start-from."""
    label_smoothing: BelowOne = 0.1
    """Share of the probability that is spread over all tokens, in the second stage."""
    average: Count = 1
    """Number of last saved states whose mean is the resulting model, 2% of the run apart."""

    def __post_init__(self) -> None:
        check(self.pretraining)
        SpanCorruption("[NLU]", self.pretraining.rate, self.pretraining.span)  # raises UserError


def settings(recipe: Recipe, steps: int) -> Settings:
    """Return the settings of either stage for this number of steps."""
    matrix_rate = value_or(recipe.matrix_rate, scaled(0.02, recipe.start_from))
    return own_settings(recipe, steps, 400, optimizer="muon", matrix_rate=matrix_rate)


def task_prefix(recipe: Recipe, languages: tuple[str, str]) -> str:
    """Return the name of the task. languages: codes of source and target, or empty strings."""
    if recipe.prefix is not None:
        return recipe.prefix
    source, target = (LANGUAGES.get(code) for code in languages)
    return f"translate {source} to {target}: " if source and target else "translate: "


def sentences_of(pairs: list[Pair]) -> list[str]:
    """Return the distinct sentences of both sides in random order, always the same."""
    distinct = [*dict.fromkeys(pair[side] for side in (0, 1) for pair in pairs)]
    return [distinct[index] for index in np.random.default_rng(0).permutation(len(distinct))]


def unlabelled(recipe: Recipe, task: TranslationTask) -> tuple[list[str], list[str]]:
    """Return the texts of the first stage: for training, and for validation, which are sentences of held-out pairs."""
    parts, name = task.parts, recipe.pretraining.text
    held_out = sentences_of(parts.validation)
    if name is None:
        return sentences_of(parts.train), held_out
    hidden = {normalize(side) for part in (parts.validation, parts.test) for pair in part for side in pair}
    return [text for text in documents(name) if normalize(text) not in hidden], held_out


def denoised_text(recipe: Recipe, task: TranslationTask) -> DenoisedText:
    """Return the data of the first stage."""
    options, tokenizer, special = recipe.pretraining, task.tokenizer, special_ids(task.tokenizer)
    names = tokenizer.backend.get_vocab()
    sentinels = [names[token] for token in SENTINEL_TOKENS if token in names]
    if options.objective == "spans" and not sentinels:
        raise UserError("This tokenizer has no sentinels such as <extra_id_0>: learn one, with --tokenizer bpe.")
    training, held_out = (token_stream(tokenizer.encode_batch, t, special.end) for t in unlabelled(recipe, task))
    return DenoisedText(
        training, held_out, options.task(sentinels), special, length=options.window, seed=recipe.seed,
        rows=max(1, recipe.tokens_per_batch // options.window),
    )  # fmt: skip


def pretraining_job(recipe: Recipe, task: TranslationTask) -> Job:
    """Return the first stage."""
    options, data = recipe.pretraining, denoised_text(recipe, task)
    torch.manual_seed(recipe.seed)
    model = t5.build(config_for(task, recipe.model)).to(choose())
    budget = Budget(options.steps, options.minutes)
    values = {name: value for name, value in asdict(recipe).items() if name not in FREE | {"pretraining"}}
    chosen = {name: value for name, value in asdict(options).items() if name not in ("minutes", "steps")}
    return Job(
        model=model, objective=translation, data=data, stage=PRETRAINING, tokenizer=task.tokenizer,
        settings=PlannedSettings(budget, lambda steps: replace(settings(recipe, steps), minutes=budget.limit)),
        sample=sampler(data, task, model),
        facts=RunFacts(
            title="T5 learns from a text without labels", about={"parameters": parameters(model)},
            data={"source": options.text or recipe.data, "training tokens": len(data.training)},
            options={"model": asdict(model.config), "recipe": values, "pretraining": chosen},
        ),
    )  # fmt: skip


def sampler(data: DenoisedText, task: TranslationTask, model: Any) -> Callable[[int], str]:
    """Return a function that shows held-out sources, the right targets and those of greedy decoding. A bar stands
    between two texts of a window."""
    batch = next(iter(data.validation()))
    sides = [batch["source"][:SAMPLES].tolist(), batch["target"][:SAMPLES, 1:].tolist()]

    def text(ids: list[int]) -> str:
        texts = (list(group) for is_end, group in groupby(ids, lambda token: token == data.special.end) if not is_end)
        return " | ".join(task.tokenizer.decode(part, skip_special=False) for part in texts)

    def sample(step: int) -> str:
        longest = max(map(len, sides[1]))
        found = search(model, sides[0], TranslationParams(beam=1, max_tokens=longest))
        rows = zip(*sides, found, strict=True)
        return "\n".join(f"{text(a)}\n  = {text(b)}\n  > {text([*best.tokens])}" for a, b, best in rows)

    return sample


def jobs(recipe: Recipe) -> Jobs:
    """Yield the stages, whose result keifu translate, keifu evaluate, keifu.load and transformers read."""
    task, start = prepare_pairs(recipe, SENTINEL_TOKENS), None
    if recipe.start_from is None and recipe.pretraining.objective != "none":
        summary = yield pretraining_job(recipe, task)
        start = summary.directory
    batching = partial(by_tokens, tokens=recipe.tokens_per_batch)
    training = Training(partial(settings, recipe), batching, recipe.label_smoothing, recipe.average, MINUTES)
    config = replace(recipe.model, prefix=task_prefix(recipe, task.pairs.languages))
    yield translator_job("t5", recipe, t5.build, config, training, task, start)
