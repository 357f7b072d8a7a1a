"""Shared code of the translation recipes: options, sentence pairs, tokenizer, batches and the training run."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from keifu import checkpoints
from keifu.checkpoints.hub import locate
from keifu.data.attribution import attribution_of
from keifu.data.catalogue import catalogue
from keifu.data.epochs import Batching
from keifu.data.text.dataset_report import coverage
from keifu.data.tokenizers.load import learned_tokenizer, load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer, put_around_text
from keifu.data.tokenizers.train import train_tokenizer
from keifu.data.translation.batches import EncodedPairs, PairData, SpecialIds, encode
from keifu.data.translation.pairs import Pair, Pairs, PairSplit, pair_names, read_pairs, split
from keifu.devices import choose
from keifu.errors import UserError
from keifu.files import hash_of
from keifu.inference.text.translation import TranslationParams, translate_texts
from keifu.ranges import Count, Seed
from keifu.recipes.options import Logging, value_or
from keifu.recipes.starting import check_start, keeps_best, scaled
from keifu.training.job import Budget, Job, PlannedSettings, RunFacts, parameters
from keifu.training.objectives.language_modeling import translation
from keifu.training.optim.weight_averaging import averaged_weights
from keifu.training.settings import Settings

LEARNED = "bpe", "unigram"  # they have an end token and can encode every character
PAD = "<pad>"
MINUTES = 9.0
SAMPLES = 6
# options that may change in a resumed run, or that are also in its config
FREE = {"steps", "minutes", "micro_batch", "average", "keep", "model", "tensorboard", "wandb"}


@dataclass(frozen=True)
class TranslationOptions(Logging):
    """Options of every translation recipe."""

    data: str = "tatoeba-ja-en"
    """A catalogue name (tatoeba-ja-en, tatoeba-en-ja); a file: .tsv, or records with a field for each side (.csv,
    .jsonl, .json, .parquet); or two files A,B whose lines belong together."""
    source_field: str | None = None
    """The field, or column, of the source in a file of records; unset: source, or the first of two."""
    target_field: str | None = None
    """The field of the translation; unset: target, or the second of two."""
    encoding: str = "utf-8"
    """Encoding of files without a byte order mark, such as cp932 (Shift-JIS), euc_jp or cp1252."""
    validation_data: str | None = None
    """Pairs to validate on, like --data; training pairs that share a sentence with one of them are left out."""
    test_data: str | None = None
    """Pairs that are kept from training in the same way, for keifu evaluate."""
    reverse: bool = False
    """Swap the sides of the pairs: the second is the source."""
    tokenizer: str = "bpe"
    """bpe or unigram to learn one for both languages from the training pairs; or a catalogue name, file or folder."""
    vocab_size: Count = 8000
    """Vocabulary size of a learned tokenizer, both languages together."""
    start_from: str | None = None
    """A translator of the same kind (a run, a folder, a catalogue name such as ja-en) whose weights and tokenizer the
    run starts from: to adapt it to your own pairs, or to train it longer. Its sizes are the model's."""
    steps: Count | None = None
    """Updates of the weights."""
    tokens_per_batch: Count = 4000
    """Source and target tokens in a step, padding counted."""
    micro_batch: Count | None = None
    """Rows of the largest batch computed at a time; unset: as many as fit in memory."""
    keep: Count = 2
    """Saved states that are kept, 2% of the run apart."""
    seed: Seed = 0
    """Random seed of the weights, the order of the data and dropout."""


@dataclass(frozen=True)
class TranslationTask:
    """Sentence pairs that are ready to train on: their source, their three parts, and a tokenizer for both sides."""

    pairs: Pairs
    parts: PairSplit
    tokenizer: Tokenizer


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Return the ids around a sentence. Raises `UserError` for a tokenizer without an end token."""
    start, end, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    if end is None:
        raise UserError("This tokenizer has no end token, so a translation could not end: take another.")
    return SpecialIds(end if start is None else start, end, end if pad is None else pad)


def prepare_pairs(options: TranslationOptions, special: Sequence[str] = ()) -> TranslationTask:
    """Read and split the pairs, and train the tokenizer on the training part, with these further special tokens; print
    the number of pairs."""
    pairs = _read(options, options.data)
    held_out_files = (options.validation_data, options.test_data)
    validation, test = (None if path is None else _read(options, path) for path in held_out_files)
    parts = split(pairs, validation=validation, test=test)
    tokenizer = _tokenizer(options, parts.train, special)
    _print_sentence(pairs.left_out)
    _print_sentence(parts.sentence())
    for side, name in enumerate(("source", "target")):
        covered = coverage(tokenizer.sides[side], (pair[side] for pair in parts.train))
        _print_sentence(covered.sentence(f"the {name} side"))
    return TranslationTask(pairs, parts, tokenizer)


def _read(options: TranslationOptions, source: str) -> Pairs:
    return read_pairs(source, options.reverse, (options.source_field, options.target_field), options.encoding)


def _print_sentence(sentence: str) -> None:
    if sentence:
        print(sentence, flush=True)


def _tokenizer(options: TranslationOptions, train: list[Pair], special: Sequence[str]) -> Tokenizer:
    algorithm = options.tokenizer
    if options.start_from is not None:
        return load_tokenizer(locate(options.start_from))
    if algorithm not in LEARNED:
        return load_tokenizer(catalogue.fetch(algorithm) if algorithm in catalogue.CATALOGUE else Path(algorithm))
    texts = sorted(side for pair in train for side in pair)  # sorted, so that both directions get the same tokenizer
    content = hashlib.sha256("\n".join(texts).encode()).hexdigest()

    def learn() -> Tokenizer:
        _print_sentence(f"Learning a {algorithm} tokenizer of {options.vocab_size} tokens from {options.data} ...")
        learned = train_tokenizer(algorithm, texts, options.vocab_size, [PAD, *special])
        put_around_text(learned.backend, learned.special, bos=False, eos=True)  # sources end with EOS, as in Marian
        return Tokenizer(learned.backend, learned.special | {"pad_token": PAD})

    further = f"-{hash_of(special)[:8]}" if special else ""
    return learned_tokenizer(f"pairs-{algorithm}-{options.vocab_size}-{content[:16]}{further}", learn)


@dataclass(frozen=True)
class Training:
    """How a translator is trained. settings: from the number of steps. batching: from the sizes of rows. average:
    number of last checkpoints whose mean is the result. minutes: budget if the options name none."""

    settings: Callable[[int], Settings]
    batching: Callable[[np.ndarray], Batching]
    label_smoothing: float
    average: int
    minutes: float = MINUTES


def config_for(task: TranslationTask, config: Any) -> Any:
    """Return the config with the vocabulary and the special ids of the tokenizer."""
    ids = {f"{name}_id": token for name, token in special_ids(task.tokenizer)._asdict().items()}
    return replace(config, vocab_size=task.tokenizer.vocab_size, **ids, **_two_vocabularies(task, config))


def translator_job(
    name: str, options: TranslationOptions, build: Callable[[Any], nn.Module], config: Any, training: Training,
    task: TranslationTask | None = None, start: str | Path | None = None,
) -> Job:  # fmt: skip
    """Return the training of an encoder-decoder on pairs. The vocabulary and the special ids are the tokenizer's, not
    those of `config`. task: the pairs, if they are prepared. start: folder of the weights of an earlier stage."""
    budget = Budget.of(options.steps, options.minutes, training.minutes)
    task = task or prepare_pairs(options)
    config, start = config_for(task, config), start or options.start_from
    torch.manual_seed(options.seed)
    model: Any = build(config) if start is None else start_model(start, build, config)
    model = model.to(choose())
    data = _data(options, task, model.config, training.batching)
    average = training.average
    mean = {"keep_best": False} if average > 1 else {}  # the result is a mean of checkpoints, not one of them
    changes: dict[str, Any] = {"minutes": budget.limit, "keep": max(options.keep, average), **mean}

    def save(directory: Path) -> None:
        with averaged_weights(model, directory, average):
            checkpoints.save(model, task.tokenizer, directory)

    values = {name: value for name, value in asdict(options).items() if name not in FREE}
    held_bytes = sum(len(task.parts.validation[index][1].encode()) for index in data.held_out.indices)
    held_tokens = len(data.held_out.target.ids) + len(data.held_out)  # with the end of each sentence
    return Job(
        model=model, objective=partial(translation, label_smoothing=training.label_smoothing), data=data,
        settings=PlannedSettings(budget, lambda steps: replace(training.settings(steps), **changes)),
        tokenizer=task.tokenizer, sample=_sampler(task, model), save=save, largest=data.largest(),
        facts=RunFacts(
            title=name, about={"parameters": parameters(model), "languages": task.pairs.languages},
            data=_source(options, task, data), options={"model": asdict(model.config), "recipe": values},
            bytes_per_unit=held_bytes / held_tokens,
        ),
    )  # fmt: skip


def start_model(name: str | Path, build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """Return a model with the sizes and weights of `name`, and the dropout and prefix of this run."""
    started: Any = checkpoints.load_model(name, torch.float32)  # not copied, so that each process only reads its part
    check_start(str(name), started, type(config))
    own = [field.name for field in fields(config) if "dropout" in field.name or field.name == "prefix"]
    model = build(replace(started.config, **{name: vars(config)[name] for name in own}))
    model.load_state_dict(started.state_dict(), assign=True)  # from a file a process reads only its part
    return model


def _two_vocabularies(task: TranslationTask, config: Any) -> dict[str, Any]:
    """Return the config fields for a target with a separate vocabulary: its size, and no shared embedding."""
    size = task.tokenizer.target_vocab_size
    shared = {"shared": False} if "shared" in vars(config) else {}
    return {} if size is None else {"target_vocab_size": size, **shared}


def _data(
    options: TranslationOptions, task: TranslationTask, config: Any, batching: Callable[[np.ndarray], Batching]
) -> PairData:
    """Return the encoded training and held-out pairs, whose sources begin with the config's prefix, if it has one.
    Pairs that are too long are left out, and their number is printed."""
    # of a published model that a run starts from, the start is the padding token, which its tokenizer does not say
    reader, special = task.tokenizer.sides[0], SpecialIds(config.start_id, config.end_id, config.pad_id)
    source = special if reader.eos_id is None else special_ids(reader)
    prefix = vars(config).get("prefix") or ""
    train, validation = (
        _fitting(task, [(prefix + source, target) for source, target in part], config.context_length)
        for part in (task.parts.train, task.parts.validation)
    )
    most = max(8000, options.tokens_per_batch)
    return PairData(train, validation, special, batching(train.sizes()), options.seed, most, source)


def _fitting(task: TranslationTask, rows: list[Pair], context_length: int) -> EncodedPairs:
    ways = task.tokenizer.encode_batch, task.tokenizer.encode_target_batch
    source, target = (encode(way, [pair[side] for pair in rows]) for side, way in enumerate(ways))
    fitting = EncodedPairs(source, target).fitting(context_length)
    if left_out := len(rows) - len(fitting):
        limit = f"{context_length} tokens, which is all that the model takes"
        _print_sentence(f"{left_out:,} of {len(rows):,} pairs have a side longer than {limit}, and are left out.")
    return fitting


def settings_of(options: TranslationOptions, steps: int, **different: Any) -> Settings:
    """Return settings for this number of steps, with 20 validations, 10 samples and 50 checkpoints. different: the
    learning rate, and other fields of `Settings`."""
    return Settings(
        steps=steps, micro_batch=options.micro_batch, keep=options.keep, seed=options.seed,
        evaluate_every=max(1, steps // 20), sample_every=max(1, steps // 10), save_every=max(1, steps // 50),
        **options.logging(), **keeps_best(options.start_from), **different,
    )  # fmt: skip


def own_settings(options: Any, steps: int, warmup: int, **different: Any) -> Settings:
    """Return keifu's settings for this number of steps: a warm-up of at most `warmup` steps, then a linear decay to
    0."""
    rate = value_or(options.learning_rate, scaled(2e-3, options.start_from))
    defaults = {"warmup": min(warmup, -(-steps // 5)), "schedule": "linear", "final_ratio": 0.0, "weight_decay": 0.01}
    return settings_of(options, steps, learning_rate=rate, betas=(0.9, 0.98), **defaults, **different)


def _source(options: TranslationOptions, task: TranslationTask, data: PairData) -> dict[str, Any]:
    source = options.data + (", sides swapped" if options.reverse else "")
    counts = {"training pairs": len(data.train), "validation pairs": len(data.held_out)}
    counts |= {"test pairs": len(task.parts.test), "steps an epoch": data.steps_per_epoch}
    licence = attribution_of(pair_names().get(options.data, ("",))[0])
    return {"source": source, "fingerprint": task.pairs.fingerprint, **counts, **licence}


def _sampler(task: TranslationTask, model: nn.Module) -> Callable[[int], str]:
    """Return a function that translates the first held-out sentences that fit the model, by greedy decoding."""
    config: Any = model.config
    prefix = vars(config).get("prefix") or ""
    sample_pairs = [
        pair for pair in task.parts.validation if len(task.tokenizer.encode(prefix + pair[0])) < config.context_length
    ]

    def sample(step: int) -> str:
        sources = [source for source, _ in sample_pairs[:SAMPLES]]
        translations = translate_texts(model, task.tokenizer, sources, TranslationParams(beam=1), lambda text: [text])
        rows = zip(sample_pairs, translations, strict=False)
        return "\n".join(f"{source}\n  = {target}\n  > {translation.text}" for (source, target), [translation] in rows)

    return sample
