"""BERT (Devlin et al., 2018) from scratch: masked words and sentence pairs, on any text.

Paper: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", appendix A.2: 15% of the
pieces predicted, half of the pairs false, batch 256, a million steps (nine tenths of them with rows of 128 tokens, the
rest, begun with --start-from, with rows of 512), Adam 1e-4, warm-up 10,000, a linear decrease, decay 0.01, dropout 0.1.
Command: keifu train bert --data wiki-summaries
Cost: printed before it starts; the default, a model of 5 M parameters and 1,000 steps, a few minutes on 2 cores.
`--recipe-of paper` has the settings above and the sizes of BERT-base, with the paper's vocabulary.
Expected: the share of predicted masked words rises; no figure was made for this recipe. For a published encoder of this
kind see docs/results.md, "Bidirectional pretraining".
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from keifu import checkpoints
from keifu.data.text.masked_lm import MaskedText, MaskingScheme, MaskingVocabulary
from keifu.data.text.sentence_shards import SentenceShards, prepare_sentences
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import KINDS
from keifu.devices import choose
from keifu.errors import UserError
from keifu.inference.embeddings.encoders import encoder
from keifu.inference.text.fill import fill
from keifu.inference.text.translation import sentences
from keifu.models import bert
from keifu.recipes.language.pretraining import Text, TextArgument, check_language_plan, tokenizer_of
from keifu.recipes.starting import adapted
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Job, Jobs, RunFacts, parameters
from keifu.training.objectives.language_modeling import masked_language_modeling
from keifu.training.settings import Settings

SMALL = bert.Config(context_length=128, dim=256, hidden_dim=1024, n_layers=4, n_heads=4)
LEARNING = Settings(
    steps=1000, batch_size=32, learning_rate=5e-4, warmup=100, schedule="linear", final_ratio=0.0, weight_decay=0.01,
    betas=(0.9, 0.999), clip=1.0, evaluate_every=250, sample_every=500, save_every=250,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    text: TextArgument = Text("wiki-summaries", "wordpiece")
    """Text to learn from; BERT's tokenizer is wordpiece."""
    lowercase: bool = True
    """A learned tokenizer sees lower case without accents, as "uncased" BERT does."""
    masking: MaskingScheme = MaskingScheme()
    """Length of a row, and the part of it that is hidden."""
    model: bert.Config = SMALL
    """The vocabulary is the tokenizer's, and the heads follow from the rows, whatever is given here."""
    start_from: str | None = None
    """BERT whose weights, tokenizer and sizes the run starts from: a run, a directory, a hub id or a catalogue name.
    The default learning rate is then a tenth of 5e-4."""
    training: TrainingOptions = LEARNING
    """How to learn it."""
    gaps: tuple[str, ...] = ("The capital of France is [MASK].", "She was born in [MASK] and is an American [MASK].")
    """Sentences that the samples fill in."""
    recipe_of: Literal["keifu", "paper"] = "keifu"
    """Source of all defaults: keifu (a small model, minutes on two cores) or the paper."""
    yes: bool = False
    """Start although the run would take longer than a day."""


PUBLISHED = Recipe(
    recipe_of="paper", text=Text("wiki-summaries", "minilm"), model=bert.Config(), masking=MaskingScheme(length=128),
    training=replace(
        LEARNING, steps=1_000_000, batch_size=256, learning_rate=1e-4, warmup=10_000, evaluate_every=10_000,
        sample_every=50_000, save_every=5_000,
    ),
)  # fmt: skip


def check_before_start(recipe: Recipe) -> None:
    """Raise UserError for a run that needs too much memory, or more than a day without --yes."""
    row = replace(recipe.model, context_length=min(recipe.masking.length, recipe.model.context_length))
    check_language_plan(bert.build, row, recipe.text, recipe.training, recipe.yes)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load, keifu embed, keifu train classifier and transformers read."""
    model, tokenizer = first_model(recipe)
    text, masking = recipe.text, recipe.masking
    training = adapted(recipe.training, LEARNING, recipe.start_from)
    if masking.length > model.config.context_length:
        room = f"the model has {model.config.context_length} positions"
        raise UserError(f"Rows of {masking.length} tokens do not fit: {room}; change masking.length or the model.")
    shards = prepare_sentences(
        text.data, tokenizer, sentences, held_out=text.held_out, form=text.form, validation=text.validation_data
    )
    data = MaskedText(shards, MaskingVocabulary.of(tokenizer), masking, training.batch_size, training.seed)
    options = {"model": asdict(model.config), "text": text.described(), "masking": asdict(masking)}
    facts = RunFacts(title="bert", about={"parameters": parameters(model)}, data=_facts(text, shards), options=options)
    summary = yield Job(
        model=model, objective=masked_language_modeling, data=data, settings=training, facts=facts, tokenizer=tokenizer,
        sample=lambda step: fill_samples(model, tokenizer, recipe.gaps), largest=data.largest,
    )  # fmt: skip
    perplexity = math.exp(min(summary.figures["validation_word_loss"], 700.0))
    print(f"Held-out words: perplexity {perplexity:.2f}, {summary.figures['validation_word_accuracy']:.1%} right.")


def fill_samples(model: nn.Module, tokenizer: Tokenizer, gaps: tuple[str, ...]) -> str:
    """Return each sentence, followed by the likeliest words for each of its gaps."""
    lines = []
    for sentence in gaps:
        lines.append(sentence)
        for guesses in fill(model, tokenizer, sentence):
            lines.append("    " + ", ".join(f"{guess.word} {guess.probability:.0%}" for guess in guesses))
    return "\n".join(lines)


def first_model(recipe: Recipe) -> tuple[Any, Tokenizer]:
    """Return the model to train and its tokenizer: new, or loaded, with the heads for these rows."""
    pairs = recipe.masking.sentence_pairs
    torch.manual_seed(recipe.training.seed)
    if recipe.start_from is None:
        algorithm = recipe.text.tokenizer
        if algorithm in KINDS and algorithm != "wordpiece":
            raise UserError(f"BERT needs [CLS], [SEP] and [MASK], which {algorithm} does not have: learn wordpiece.")
        tokenizer = tokenizer_of(recipe.text, lowercase=recipe.lowercase and algorithm == "wordpiece")
        sizes = replace(recipe.model, vocab_size=tokenizer.vocab_size, labels=())
        return bert.build(replace(sizes, words=True, next_sentence=pairs, pooled=pairs)).to(choose()), tokenizer
    loaded, tokenizer = checkpoints.load(recipe.start_from, torch.float32)
    config = encoder(loaded).config
    heads = {"words": True, "next_sentence": pairs or config.next_sentence, "pooled": pairs or config.pooled}
    return bert.with_heads(loaded, config, **heads).to(choose()), tokenizer


def _facts(text: Text, shards: SentenceShards) -> dict[str, Any]:
    counts = {f"{part} {what}": n for part in ("training", "validation") for what, n in shards.index[part].items()}
    return {"source": text.data, "fingerprint": shards.fingerprint} | counts
