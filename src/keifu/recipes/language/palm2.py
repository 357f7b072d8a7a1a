"""PaLM 2 (Anil et al., 2023) as far as it is public: PaLM's block, UL2's denoising objectives, many languages.

The "PaLM 2 Technical Report" states: a Transformer, smaller than PaLM and trained for longer; "a tuned mixture of
different pre-training objectives" after the results of UL2; more languages, parallel text, code and mathematics;
near-duplicates removed; data and parameters grown in step. It does not state the sizes, layers, mixture of objectives,
sources and weights. Here they are our choice: PaLM's block (Chowdhery et al., 2022), the seven denoisers of UL2's table
1 (Tay et al., 2022) in the shares of U-PaLM (Tay et al., 2022b, section 2.3), attention that is causal over the prefix
too, and the sources of `keifu.data.text.mixture` with weights that we chose. No figure of this run is one of PaLM 2.
Command: keifu train palm2 --mixture multilingual
Cost: printed before it starts; a model of 6 M parameters and 2.1 M tokens, some 7 minutes on 2 cores. The texts are
downloaded and tokenized before, once.
Expected: see docs/results.md, "Mixture of objectives".
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from keifu import checkpoints
from keifu.data.attribution import attribution_of
from keifu.data.text import mixture as mixtures, span_corruption as corruption
from keifu.data.text.held_out import SplitRule
from keifu.data.tokenizers.load import learned_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer, put_around_text
from keifu.data.tokenizers.train import train_tokenizer
from keifu.devices import choose
from keifu.files import write_atomic
from keifu.inference.text.fill import continuation, infill
from keifu.inference.text.sampling_params import sampling_for
from keifu.models import palm
from keifu.ranges import BelowOne, Count, Share
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Job, Jobs, RunFacts, parameters
from keifu.training.objectives.language_modeling import masked_share_loss, span_corruption
from keifu.training.settings import Settings

CHARACTERS = 12_000_000  # for training the tokenizer
BITS = methodcaller("bits_per_byte", 1.0)  # of a text, for a loss of one nat per token
OFTEN = 4  # more epochs of the same text teach less (Muennighoff et al., 2023)
SMALL = palm.Config(context_length=256, dim=256, hidden_dim=1024, n_layers=4, n_heads=4, head_dim=64)
LEARNING = Settings(
    steps=600, batch_size=32, optimizer="muon", learning_rate=1e-2, warmup=100, final_ratio=0.0, weight_decay=0.01,
    evaluate_every=300, sample_every=300, save_every=300,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    mixture: str = "multilingual"
    """Sources to learn from: multilingual, or a YAML or JSON file of sources with weights (docs/lineage/palm2.md)."""
    held_out: BelowOne | None = None
    """Share of each source that is kept for validation; unset: the mixture's own, or 0.02."""
    split: tyro.conf.Suppress[SplitRule] = "spread"
    """Rule that chooses the held-out part of a plain text; a run of an earlier version is resumed with "end"."""
    objective: Literal["ul2", "causal"] = "ul2"
    """A mixture of denoisers, or each token from those before it."""
    shares: tuple[Share, Share, Share] = (0.25, 0.25, 0.5)
    """Shares of the rows: R (a few short spans hidden), X (long spans, or half of the text), S (the end)."""
    prefix: Share = 0.5
    """The mean share of a text that S hides; UL2's table says 0.25, its code 0.5."""
    vocab_size: Count = 8192
    """Tokens of the tokenizer, which is learned from the mixture: bytes, every digit by itself, modes and sentinels."""
    sentinels: Count = corruption.SENTINELS
    """Marks for hidden spans; a longer context can need more."""
    model: palm.Config = SMALL
    """The vocabulary is the tokenizer's, whatever is given here."""
    training: TrainingOptions = LEARNING
    """How to learn it."""
    gaps: tuple[str, ...] = ("She was born in ___ and died in ___.", "彼女は___が好きです。")
    """Sentences that the samples fill in."""
    prompts: tuple[str, ...] = ("The city is", "私は")
    """Beginnings that the samples continue."""


@dataclass(frozen=True)
class PreparedMixture:
    """Mixture that is ready to train on: its tokenized sources, and the tokenizer."""

    mixture: mixtures.Mixture
    tokenizer: Tokenizer
    sources: list[mixtures.WeightedSource]


def prepare(mixture: mixtures.Mixture, vocab_size: int, sentinels: int = corruption.SENTINELS) -> PreparedMixture:
    """Download the texts, train the tokenizer and tokenize. Results are cached."""
    tokenizer = tokenizer_of(mixture, vocab_size, sentinels)
    pairs = zip(mixture.sources, mixtures.prepare_mixture(mixture, tokenizer), strict=True)
    total = sum(source.weight for source in mixture.sources)
    weighted = [mixtures.WeightedSource(source.name, source.weight / total, shards) for source, shards in pairs]
    return PreparedMixture(mixture, tokenizer, weighted)


def tokenizer_of(mixture: mixtures.Mixture, vocab_size: int, sentinels: int) -> Tokenizer:
    """Return a byte-level BPE trained on the mixture by its weights. It can encode every character."""
    content = hashlib.sha256(mixtures.content_hash(mixture).encode()).hexdigest()

    def learn() -> Tokenizer:
        print(f"Learning a tokenizer of {vocab_size} tokens from the mixture {mixture.name} ...", flush=True)
        special = corruption.special_tokens(sentinels)
        return train_tokenizer("bpe", mixtures.texts(mixture, CHARACTERS), vocab_size, special, split_digits=True)

    return learned_tokenizer(f"mixture-bpe-{vocab_size}-{sentinels}-{content[:16]}", learn)


def losses_by_mode(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with [S2S] added before each text, since the loaded model continues texts in that mode."""
    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    special = tokenizer.special | {"bos_token": corruption.SEQUENTIAL}
    put_around_text(backend, special, bos=True, eos=False)
    return Tokenizer(backend, special)


def task_of(recipe: Recipe, tokenizer: Tokenizer) -> tuple[corruption.CorruptionTask, dict[str, mixtures.Check]]:
    """Return the training task (denoising or causal), and the metrics for each source: bits per byte and the loss of
    hidden parts."""
    context = recipe.model.context_length
    if recipe.objective == "causal":
        measured = mixtures.Check(corruption.CausalBatches(context - 1), BITS)
        return corruption.CausalBatches(context), {"bits_per_byte": measured}
    markers = corruption.Markers.of(tokenizer, recipe.sentinels)
    regular = corruption.SpanCorruptionBatches([corruption.SpanCorruption("[NLU]", 0.15, 3)], markers, context)
    checks = {
        "bits_per_byte": mixtures.Check(corruption.CausalBatches(context, markers.modes[corruption.SEQUENTIAL]), BITS),
        "infilling": mixtures.Check(corruption.InfillingExamples(regular)),
    }
    return corruption.SpanCorruptionBatches(corruption.ul2(recipe.shares, recipe.prefix), markers, context), checks


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load, keifu generate, keifu evaluate and transformers read."""
    mixture = replace(mixtures.read_mixture(recipe.mixture), split=recipe.split)
    if recipe.held_out is not None:
        mixture = replace(mixture, held_out=recipe.held_out)
    yield job_of(recipe, prepare(mixture, recipe.vocab_size, recipe.sentinels))


def job_of(recipe: Recipe, prepared: PreparedMixture) -> Job:
    """Return the training on a prepared mixture."""
    config = replace(recipe.model, vocab_size=prepared.tokenizer.vocab_size)
    torch.manual_seed(recipe.training.seed)
    model = palm.build(config).to(choose())
    task, checks = task_of(recipe, prepared.tokenizer)
    training = recipe.training
    data = mixtures.MixedText(prepared.sources, task, config.context_length, training.growth, training.seed, checks)
    objective = partial(masked_share_loss, objective=span_corruption, names=data.figures)
    saved = losses_by_mode(prepared.tokenizer) if recipe.objective == "ul2" else prepared.tokenizer
    epochs = data.epochs(training.steps)
    if often := [f"{name} ({count:.1f})" for name, count in epochs.items() if count > OFTEN]:
        print(f"These sources are small for their weight and come more than {OFTEN} times: {', '.join(often)}.")

    def save(directory: Path) -> None:
        checkpoints.save(model, saved, directory)
        fields = {source.name: asdict(source).items() for source in prepared.mixture.sources}
        sources = {name: {key: v for key, v in items if v and key != "name"} for name, items in fields.items()}
        content = {"held_out": prepared.mixture.held_out, "sources": sources}
        write_atomic(directory / "mixture.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    mixture = {source.name: [source.data, source.weight] for source in prepared.mixture.sources}
    values = {"objective": recipe.objective, "shares": recipe.shares, "prefix": recipe.prefix}
    facts = [_facts(*pair, epochs) for pair in zip(prepared.mixture.sources, prepared.sources, strict=True)]
    about = {"parameters": parameters(model), "data": facts}
    return Job(
        model=model, objective=objective, data=data, settings=training, tokenizer=saved, save=save,
        sample=_sampler(recipe, model, saved), largest=data.largest(),
        facts=RunFacts(
            title="palm2", about=about, options={"model": asdict(config), "recipe": values, "mixture": mixture}
        ),
    )  # fmt: skip


def _facts(source: Any, weighted: mixtures.WeightedSource, epochs: dict[str, float]) -> dict[str, Any]:
    index = weighted.shards.index
    tokens = {f"{part} tokens": index[part]["tokens"] for part in ("training", "validation")}
    facts = {"source": source.name, "data": source.data, "weight": round(weighted.weight, 6), **tokens}
    facts |= {"bytes per token": round(weighted.shards.bytes_per_token, 3), "epochs": round(epochs[source.name], 2)}
    return facts | attribution_of("tatoeba-en" if source.data.startswith("tatoeba-") else source.data)


def _sampler(recipe: Recipe, model: nn.Module, tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return a function that continues the prompts and, if the model learns infilling, fills the gaps of texts."""
    gaps = recipe.gaps if recipe.objective == "ul2" else ()

    def sample(step: int) -> str:
        chance = sampling_for(tokenizer, {"max_tokens": 40, "seed": step})
        filled = (f"{text}\n  = {infill(model, tokenizer, text)}" for text in gaps)
        gone_on = (text + continuation(model, tokenizer, text, chance) for text in recipe.prompts)
        return "\n".join([*filled, *gone_on])

    return sample
