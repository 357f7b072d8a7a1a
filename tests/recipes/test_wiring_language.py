"""Every option of the recipes for language models and translators reaches what it names, and the papers' figures stand
in the recipes."""

import random
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import wiring
from wiring import DIFFERENT, Group, Reach

from keifu import checkpoints, recipes
from keifu.commands.shared import flags
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.layers.attention.positions import RopeScaling, Rotary
from keifu.models import bert, gpt1, gpt2, gpt3, llama, olmo2, palm, seq2seq, transformer
from keifu.models.classic import lstm
from keifu.models.diffusion import llada
from keifu.models.variants import t5
from keifu.recipes.language import (
    bert as bert_recipe,
    characters,
    gpt,
    gpt1 as gpt1_recipe,
    gpt2 as gpt2_recipe,
    gpt3 as gpt3_recipe,
    llada as llada_recipe,
    llama as llama_recipe,
    lstm as lstm_recipe,
    olmo2 as olmo2_recipe,
    palm as palm_recipe,
    palm2,
    word2vec as word2vec_recipe,
)
from keifu.recipes.language.pretraining import Text
from keifu.recipes.options import from_json, to_json
from keifu.recipes.translation import seq2seq as seq2seq_recipe, t5 as t5_recipe, transformer as transformer_recipe
from keifu.training.objectives.mapped_data import MappedData
from keifu.training.settings import Settings

TINY: dict[str, Any] = {"context_length": 16, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
SMALL = Settings(steps=30, batch_size=4, save_every=10)
OTHER = Settings(
    steps=31, batch_size=5, batch_ramp=(2, 12), micro_batch=1, learning_rate=0.007, schedule="linear", warmup=3, hold=2,
    final_ratio=0.3, decay_steps=21, rate_by="rows", weight_decay=0.03, betas=(0.7, 0.8), epsilon=1e-5, momentum=0.6,
    clip=0.4, ema=0.9, precision="float32", compile=True, seed=7, log_every=3, evaluate_every=11, sample_every=12,
    save_every=13, keep=4,
)  # fmt: skip


@dataclass(frozen=True)
class Toys:
    """Paths of small inputs."""

    text: str
    other: str
    pairs: str
    other_pairs: str
    bert: str
    mixture: str
    other_mixture: str
    out: Path


@pytest.fixture(scope="module")
def toys(own_cache: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Return two texts, two tables of pairs, a BERT and two mixtures."""
    folder = tmp_path_factory.mktemp("toys")
    chance = random.Random(0)
    words = ["red", "Blue", "green", "one", "two", "three", "cat", "dog", "bird", "sees", "likes", "eats"]
    paths = {name: folder / name for name in ("text.txt", "other.txt", "pairs.tsv", "other.tsv", "bert", "a.json")}
    for name, count in (("text.txt", 400), ("other.txt", 500)):
        lines = (" ".join(chance.choice(words) for _ in range(7)) + ".\n" for _ in range(count))
        paths[name].write_text("".join(lines))
    for name, count in (("pairs.tsv", 150), ("other.tsv", 170)):
        rows = {" ".join(chance.choice(words) for _ in range(5)) for _ in range(count)}
        paths[name].write_text("".join(f"{row}\t{row[::-1]} {row}\n" for row in sorted(rows)))
    tokenizer = train_tokenizer("wordpiece", [" ".join(words)] * 5, 90)
    checkpoints.save(bert.build(bert.Config(vocab_size=tokenizer.vocab_size, **TINY)), tokenizer, paths["bert"])
    source = '{"sources": {"one": {"data": "text.txt", "weight": 0.5}, "two": {"data": "other.txt", "weight": 0.5}}}'
    paths["a.json"].write_text(source)
    (folder / "b.json").write_text(source.replace("0.5}, ", "0.3}, ").replace("0.5}}", "0.7}}"))
    given = ("text.txt", "other.txt", "pairs.tsv", "other.tsv", "bert", "a.json")
    return Toys(*(str(paths[name]) for name in given), str(folder / "b.json"), folder / "runs")


def weights(record: Any) -> list[float]:
    """Return some of the first weights of the model."""
    return next(p for p in record.model.parameters() if p.dim() > 1).flatten()[:9].tolist()


def source(record: Any) -> str:
    return record.run.about["data"][0]["source"]


def kind(record: Any) -> str:
    """Return the kind of the run's tokenizer."""
    return type(wiring.look(record, "sample.task.tokenizer.backend").model).__name__


def text_rows(toys: Toys, prefix: str) -> dict[str, Reach]:
    """Return the rows of `Text`."""
    return {
        f"{prefix}data": Reach(toys.other, source),
        f"{prefix}tokenizer": Reach("unigram", kind, "Unigram"),
        f"{prefix}vocab_size": Reach(291, ("model.config.vocab_size", "sample.task.tokenizer.vocab_size")),
        f"{prefix}held_out": Reach(0.2, lambda r: round(len(shards(r).validation) / len(shards(r).tokens), 1)),
    } | format_rows(prefix)


def of_text(name: str) -> Any:
    """Return a reader of a setting of the text that a run learns from."""
    return lambda record: shards(record).index["settings"].get(name)


def shards(record: Any) -> Any:
    """Return the tokens of a run, whose batches may be changed on their way."""
    data = record.data
    while isinstance(data, MappedData):
        data = data.data
    return data.shards


def format_rows(prefix: str) -> dict[str, Reach]:
    """Return the rows of how a text lies in its files."""
    return {
        f"{prefix}text_field": Reach("body", of_text("field")),
        f"{prefix}encoding": Reach("cp932", of_text("encoding")),
        f"{prefix}split": Reach("end", of_text("split"), None),
    }


def validated(toys: Toys, base: Any) -> list[Group]:
    """Return a group for a separate validation text, for recipes that learn from a text."""
    name = "text.validation_data" if hasattr(base, "text") else "validation_data"
    if not hasattr(base, "text") and (hasattr(base, "test_data") or not hasattr(base, "validation_data")):
        return []
    return [Group({name: Reach(toys.other, of_text("validation"), DIFFERENT)})]


def budget_rows() -> dict[str, Reach]:
    """Return the rows of recipes that have the loop's settings one by one."""
    return {
        "steps": Reach(41, "settings.steps"),
        "batch_size": Reach(6, ("settings.batch_size", "data.batch_size")),
        "micro_batch": Reach(2, "settings.micro_batch"),
        "learning_rate": Reach(0.0071, "settings.learning_rate"),
        "seed": Reach(5, ("settings.seed", "data.seed")),
    }


def own_rows() -> dict[str, Reach]:
    """Return the rows of recipes that also know Muon."""
    return budget_rows() | {
        "matrix_rate": Reach(0.031, "settings.matrix_rate"),
        "prompt": Reach("one", "sample.prompt"),
    }


def seeded(given: dict[str, Any] | None = None) -> Group:
    """Return a group that checks that the seed also decides the weights."""
    return Group({"seed": Reach(5, weights, DIFFERENT)}, given or {})


def scaled() -> Group:
    """Return a group that checks that options of rotary scaling reach the model, and change what it computes."""
    yarn = RopeScaling("yarn", 4.0, 8, beta_fast=3.0, beta_slow=0.5, truncate=False)
    return Group({"model.rope_scaling": Reach(yarn, ("model.config.rope_scaling", angles), DIFFERENT)})


def angles(record: Any) -> list[float]:
    """Return the cosines of some positions in the first rotary encoding of the model."""
    rotary = next(part for part in record.model.modules() if isinstance(part, Rotary))
    return rotary(torch.arange(16)).cos.flatten().tolist()


def whole(toys: Toys, config: Any) -> list[Group]:
    """Return groups of recipes that accept a whole config and whole `Settings`."""
    rows = {"model": Reach(config, "model.config", but=("vocab_size",)), "training": Reach(OTHER, "settings")}
    more = {"prompt": Reach("one", "sample.prompt")}
    of_data = {"training": Reach(replace(SMALL, seed=8, batch_size=3), ("data.batch_size", weights), DIFFERENT)}
    return [Group(text_rows(toys, "text.") | rows | more), Group(of_data)]


def small_text(toys: Toys) -> Text:
    return Text(toys.text, "bpe", 280)


def of_gpt(toys: Toys) -> tuple[Any, list[Group]]:
    base = gpt.Recipe(1, toys.text, vocab_size=280, context_length=16, steps=30, batch_size=4)
    rows = text_rows(toys, "") | own_rows()
    rows |= {
        "depth": Reach(2, ("model.config.n_layers", "model.config.n_heads")),
        "context_length": Reach(24, ("model.config.context_length", "data.context_length")),
        "compile": Reach(True, "settings.compile"),
        "family": Reach("qwen3.5", "model.config.__class__.__module__", "keifu.models.hybrid.qwen3_5"),
    }
    taught = {"tokenizer": begun_gpt(toys), "vocab_size": None}
    distill = wiring.distill_groups(begun_gpt(toys), taught)
    own = {"vocab_size": None}  # a model that is gone on from has its tokenizer
    start = Group({"start_from": Reach(begun_gpt(toys), "model.config.n_layers", 3)}, own)
    long = own | {"start_from": begun_gpt(toys), "stretch": "linear", "context_length": 512}
    stretch = Group({"stretch": Reach("yarn", "model.config.rope_scaling.kind")}, long)
    return base, [Group(rows), *distill, start, stretch, seeded()]


def begun_gpt(toys: Toys) -> str:
    """Return the folder of an existing language model."""
    folder = Path(toys.text).with_name("begun-gpt")
    tokenizer = train_tokenizer("bpe", ["ab cd"] * 5, 270)
    config = llama.Config(**TINY | {"n_layers": 3, "vocab_size": tokenizer.vocab_size, "context_length": 128})
    checkpoints.save(llama.build(config), tokenizer, folder)
    return str(folder)


def of_gpt1(toys: Toys) -> tuple[Any, list[Group]]:
    base = gpt1_recipe.Recipe(small_text(toys), model=gpt1.Config(**TINY, dropout=0.0))
    config = gpt1.Config(**TINY | {"dim": 24, "context_length": 20}, dropout=0.4)
    rows = {"model": Reach(config, "model.config", but=("vocab_size",))}
    of_paper = {"recipe_of": Reach("paper", "settings.optimizer", "adamw")}
    twice = {"epochs": Reach(1.0, lambda r: round(r.settings.steps / r.data.steps_per_epoch), 1)}
    return base, [Group(text_rows(toys, "text.") | own_rows() | rows), Group(of_paper), Group(twice), seeded()]


def of_gpt3(toys: Toys) -> tuple[Any, list[Group]]:
    base = gpt3_recipe.Recipe(small_text(toys), steps=30, batch_size=4, model=gpt3.Config(**TINY, band=4))
    config = gpt3.Config(**TINY | {"dim": 24, "context_length": 20}, band=5)
    rows = {"model": Reach(config, "model.config", but=("vocab_size",)), "compile": Reach(True, "settings.compile")}
    rate = {"learning_rate": Reach(0.0072, "settings.learning_rate")}
    of_paper = {"recipe_of": Reach("paper", "settings.optimizer", "adamw")}
    paper = Group(rate, {"recipe_of": "paper"})
    return base, [Group(text_rows(toys, "text.") | own_rows() | rows), Group(of_paper), paper, seeded()]


def of_palm(toys: Toys) -> tuple[Any, list[Group]]:
    base = palm_recipe.Recipe(small_text(toys), steps=30, batch_size=4, model=palm.Config(**TINY, head_dim=8))
    config = palm.Config(**TINY | {"dim": 24, "context_length": 20}, head_dim=4)
    rows = {"model": Reach(config, "model.config", but=("vocab_size",)), "compile": Reach(True, "settings.compile")}
    rows |= {"z_loss": Reach(0.02, ("objective.z_loss", "run.options.z_loss"))}
    own = type(base.spikes)(rise=0.6, rewind=17, skip=43)
    spikes = {"spikes": Reach(replace(own, steps=own.steps + 3), "settings.spikes")}
    of_paper = Group({"recipe_of": Reach("paper", "settings.optimizer", "adafactor")}, {"z_loss": 0.1})
    paper = Group(spikes | {"learning_rate": Reach(0.0072, "settings.learning_rate")}, {"recipe_of": "paper"})
    first = Group(text_rows(toys, "text.") | own_rows() | rows, {"z_loss": 0.3})
    return base, [first, Group(spikes), of_paper, paper, scaled(), seeded()]


def of_characters(toys: Toys) -> tuple[Any, list[Group]]:
    base = characters.Recipe(toys.text)
    rows = {"data": Reach(toys.other, source), "steps": Reach(33, "settings.steps")}
    rows |= format_rows("") | {"held_out": Reach(0.2, of_text("held_out")), "split": Reach("spread", of_text("split"))}
    rows |= {"seed": Reach(5, ("settings.seed", "data.seed")), "recipe_of": Reach("nanogpt", kind_of_model, "gpt2")}
    return base, [Group(rows), seeded()]


def kind_of_model(record: Any) -> str:
    """Return the name of the module that defines a model's Config."""
    return type(record.model.config).__module__.rpartition(".")[2]


def of_bert(toys: Toys) -> tuple[Any, list[Group]]:
    text = Text(toys.text, "wordpiece", 52, held_out=0.2)
    small = bert.Config(**TINY | {"context_length": 40})
    base = bert_recipe.Recipe(text, model=small, training=SMALL, masking=bert_recipe.MaskingScheme(length=20))
    tokenizer, heads = "sample.tokenizer", ("vocab_size", "pooled", "next_sentence", "words")
    rows = {name: row for name, row in text_rows(toys, "text.").items() if "tokenizer" not in name}
    rows["text.vocab_size"] = Reach(47, f"{tokenizer}.vocab_size")
    rows["text.held_out"] = Reach(0.4, lambda r: r.data.shards.index["validation"]["tokens"], DIFFERENT)
    del rows["text.split"]
    masking = bert_recipe.MaskingScheme(18, 0.4, 5, True, False, 0.3)
    rows |= {
        "lowercase": Reach(False, lambda r: (t := wiring.look(r, tokenizer)).encode("Blue") == t.encode("blue"), False),
        "masking": Reach(masking, "data.masking"),
        "model": Reach(replace(small, dim=24, dropout=0.4), "model.config", but=heads),
        "training": Reach(OTHER, "settings"),
        "gaps": Reach(("one [MASK] two.",), lambda r: r.sample(0).splitlines()[0], "one [MASK] two."),
    }  # fmt: skip
    begun = {"text.tokenizer": Reach(toys.bert, f"{tokenizer}.vocab_size", DIFFERENT)}
    start = {"start_from": Reach(toys.bert, "model.config.context_length", 16)}
    room = {"masking.length": 12}
    pairs = {"masking.sentence_pairs": Reach(False, ("model.config.next_sentence", "model.config.pooled"))}
    batch = {"training": Reach(replace(SMALL, seed=8, batch_size=3), ("data.batch_size", "data.seed"), DIFFERENT)}
    groups = [Group(rows), Group(begun), Group(start, room), Group(pairs), Group(batch)]
    return base, groups


def of_palm2(toys: Toys) -> tuple[Any, list[Group]]:
    config = palm.Config(**TINY | {"context_length": 32}, head_dim=8)
    samples = {"gaps": ("one ___.",), "prompts": ("two",)}
    base = palm2.Recipe(toys.mixture, vocab_size=372, model=config, training=SMALL, **samples)
    rows = {
        "mixture": Reach(toys.other_mixture, lambda r: r.data.sources[1].weight, DIFFERENT),
        "vocab_size": Reach(367, "model.config.vocab_size"),
        "held_out": Reach(0.3, lambda r: r.data.sources[0].shards.index["settings"]["held_out"]),
        "split": Reach("end", lambda r: r.data.sources[0].shards.index["settings"].get("split"), None),
        "shares": Reach((0.1, 0.3, 0.6), shares, (0.1, 0.3, 0.6)),
        "prefix": Reach(0.3, prefix_of),
        "sentinels": Reach(90, lambda r: len(r.data.task.markers.sentinels), 90),
        "model": Reach(replace(config, dim=24, head_dim=4), "model.config", but=("vocab_size",)),
        "training": Reach(OTHER, "settings"),
        "gaps": Reach(("cat ___ two.",), "sample.gaps"),
        "prompts": Reach(("cat",), "sample.recipe.prompts"),
    }
    causal = {"objective": Reach("causal", lambda r: type(r.data.task).__name__, "CausalBatches")}
    drawn = {"training": Reach(replace(SMALL, seed=8, batch_size=3), ("data.growth", "data.seed", weights), DIFFERENT)}
    return base, [Group(rows), Group(causal), Group(drawn), scaled()]


def shares(record: Any) -> tuple[float, ...]:
    """Return the shares of the three kinds of denoisers in the rows."""
    found = dict[str, float]()
    for denoiser in record.data.task.denoisers:
        found[denoiser.mode] = found.get(denoiser.mode, 0.0) + denoiser.share
    return tuple(round(found[mode], 6) for mode in ("[NLU]", "[NLG]", "[S2S]"))


def prefix_of(record: Any) -> float:
    return next(denoiser for denoiser in record.data.task.denoisers if denoiser.mode == "[S2S]").rate


def pair_rows(toys: Toys) -> dict[str, Reach]:
    """Return the rows of both recipes for translation."""
    return {
        "data": Reach(toys.other_pairs, source),
        "vocab_size": Reach(291, "model.config.vocab_size"),
        "steps": Reach(41, "settings.steps"),
        "tokens_per_batch": Reach(150, lambda r: r.data.batching.name, "150 tokens"),
        "micro_batch": Reach(2, "settings.micro_batch"),
        "keep": Reach(4, "settings.keep"),
        "seed": Reach(5, ("settings.seed", "data.seed")),
        "learning_rate": Reach(0.0071, "settings.learning_rate"),
        "label_smoothing": Reach(0.23, "objective.label_smoothing"),
    }


def more_of_translation(toys: Toys) -> list[Group]:
    """Return groups of both recipes, each independent of the others."""
    reverse = {"reverse": Reach(True, lambda r: len(r.data.train.source.ids) > len(r.data.train.target.ids), True)}
    average = {"average": Reach(6, ("save.average", "settings.keep"))}
    minutes = {"minutes": Reach(0.5, "settings.steps", wiring.MINUTES // 2)}
    kinds = {"tokenizer": Reach("unigram", kind, "Unigram")}
    table = Path(toys.pairs).with_name("fields.csv")
    table.write_bytes("".join(["n,a,b\n", *(f"{n},これ {n},it {n}\n" for n in range(60))]).encode("cp932"))
    named = {"source_field": Reach("a", ""), "target_field": Reach("b", ""), "encoding": Reach("cp932", "")}
    held = {
        "validation_data": Reach(toys.other_pairs, lambda r: len(r.data.held_out), DIFFERENT),
        "test_data": Reach(toys.other_pairs, lambda r: r.run.about["data"][0]["test pairs"], DIFFERENT),
    }
    own = [Group(named, {"data": str(table)}, refused=True), Group(held)]
    return [*own, Group(reverse), Group(average), Group(minutes, {"steps": None}), Group(kinds), seeded()]


def started(toys: Toys, module: Any, config: Any) -> Group:
    """Return the group of a start from a translator that was made before, whose vocabulary and width it takes."""
    folder = Path(toys.pairs).with_name(module.__name__)
    tokenizer = train_tokenizer("bpe", [toys.pairs] * 5, 270, ["<pad>"])
    checkpoints.save(module.build(replace(config, dim=24, vocab_size=tokenizer.vocab_size)), tokenizer, folder)
    return Group({"start_from": Reach(str(folder), ("model.config.dim",), 24)})


def of_transformer(toys: Toys) -> tuple[Any, list[Group]]:
    config = transformer.Config(**TINY | {"context_length": 60}, dropout=0.0)
    base = transformer_recipe.Recipe(toys.pairs, vocab_size=280, steps=30, tokens_per_batch=200, model=config)
    ids = ("vocab_size", "start_id", "end_id", "pad_id")
    rows = {"model": Reach(replace(config, dim=24, dropout=0.3), "model.config", but=ids)}
    rows |= {"matrix_rate": Reach(0.033, "settings.matrix_rate")}
    paper = {"recipe_of": Reach("paper", ("settings.schedule",), "inverse_sqrt")}
    return base, [
        Group(pair_rows(toys) | rows),
        Group(paper),
        started(toys, transformer, config),
        *more_of_translation(toys),
    ]


def of_seq2seq(toys: Toys) -> tuple[Any, list[Group]]:
    config = seq2seq.Config(context_length=60, dim=16, embedding_dim=8, attention_dim=8, maxout_dim=8, dropout=0.0)
    base = seq2seq_recipe.Recipe(toys.pairs, vocab_size=280, steps=30, tokens_per_batch=200, model=config)
    ids = ("vocab_size", "start_id", "end_id", "pad_id", "context")
    rows = {"model": Reach(replace(config, dim=24, dropout=0.3), "model.config", but=ids)}
    paper = {"recipe_of": Reach("paper", ("settings.optimizer",), "adadelta")}
    context = {"attention": Reach("none", "model.config.context", "fixed")}
    own = [Group(pair_rows(toys) | rows), Group(paper), Group(context), started(toys, seq2seq, config)]
    return base, [*own, *more_of_translation(toys)]


def objective_of_t5(record: Any) -> str:
    """Return the class of the first stage's objective; empty without that stage."""
    return type(record.parts["pretraining"].data.task).__name__ if "pretraining" in record.parts else ""


def of_t5(toys: Toys) -> tuple[Any, list[Group]]:
    config = t5.Config(**TINY | {"context_length": 60}, head_dim=8, dropout=0.0)
    first = t5_recipe.Pretraining(steps=20, window=16)
    base = t5_recipe.Recipe(toys.pairs, vocab_size=380, steps=30, tokens_per_batch=200, model=config, pretraining=first)
    ids = ("vocab_size", "start_id", "end_id", "pad_id", "prefix")
    other = replace(config, dim=24, n_decoder_layers=2, dropout=0.3, prefix="no: ")
    rows = {
        "model": Reach(other, "model.config", but=ids),
        "matrix_rate": Reach(0.033, ("settings.matrix_rate", "pretraining:settings.matrix_rate")),
        "vocab_size": Reach(391, "model.config.vocab_size"),
        "prefix": Reach("task: ", "model.config.prefix"),
        "pretraining.rate": Reach(0.25, ("pretraining:data.task.rate", "pretraining:run.options.pretraining.rate")),
        "pretraining.span": Reach(2.0, "pretraining:data.task.span"),
        "pretraining.window": Reach(24, "pretraining:data.length"),
        "pretraining.steps": Reach(25, "pretraining:settings.steps"),
        "pretraining.text": Reach(toys.text, "pretraining:run.about.data.0.source"),
    }
    minutes = {"pretraining.minutes": Reach(0.5, "pretraining:settings.steps", wiring.MINUTES // 2)}
    left = {"pretraining.objective": Reach("prefix", objective_of_t5, "HiddenEnd")}
    none = {"pretraining.objective": Reach("none", objective_of_t5, "")}
    own = [Group(pair_rows(toys) | rows), Group(minutes, {"pretraining.steps": None}), Group(left), Group(none)]
    return base, [*own, started(toys, t5, config), *more_of_translation(toys)]


def of_gpt2(toys: Toys) -> tuple[Any, list[Group]]:
    config = gpt2.Config(**TINY, dropout=0.0)
    return gpt2_recipe.Recipe(small_text(toys), SMALL, model=config), whole(toys, replace(config, dim=24, dropout=0.4))


def of_llama(toys: Toys) -> tuple[Any, list[Group]]:
    config = llama.Config(**TINY)
    groups = [*whole(toys, replace(config, dim=24, norm_eps=1e-4)), scaled()]
    return llama_recipe.Recipe(small_text(toys), SMALL, model=config), groups


def of_llada(toys: Toys) -> tuple[Any, list[Group]]:
    config = llada.Config(**TINY, mask_token=0)
    rows = whole(toys, replace(config, dim=24, norm_eps=1e-4))[0].rows
    own = {
        "model": Reach(rows["model"].value, "model.config", but=("vocab_size", "mask_token")),
        "text.vocab_size": Reach(291, ("model.config.vocab_size", "model.config.mask_token"), DIFFERENT),
    }
    of_data = {
        "training": Reach(replace(SMALL, seed=8, batch_size=3), ("data.data.data.batch_size", weights), DIFFERENT)
    }
    return llada_recipe.Recipe(small_text(toys), SMALL, model=config), [Group(rows | own), Group(of_data), scaled()]


def of_olmo2(toys: Toys) -> tuple[Any, list[Group]]:
    config = olmo2.Config(**TINY)
    groups = whole(toys, replace(config, dim=24, norm_eps=1e-4))
    z_loss = {"z_loss": Reach(0.02, ("objective.z_loss", "run.options.z_loss"))}
    return olmo2_recipe.Recipe(small_text(toys), SMALL, model=config), [*groups, Group(z_loss), scaled()]


def of_lstm(toys: Toys) -> tuple[Any, list[Group]]:
    config = lstm.Config(context_length=16, dim=16, dropout=0.0)
    other = lstm.Config(context_length=20, dim=24, n_layers=1, cell="gru", dropout=0.4, tied=True)
    return lstm_recipe.Recipe(small_text(toys), training=SMALL, model=config, row_length=16), [
        *whole(toys, other),
        Group({"row_length": Reach(20, "data.context_length")}),
    ]


def of_word2vec(toys: Toys) -> tuple[Any, list[Group]]:
    base = word2vec_recipe.Recipe(toys.text, min_count=1, dim=8, words=("red",), training=SMALL)
    rows = {
        "data": Reach(toys.other, source),
        "vocab_size": Reach(7, ("model.config.vocab_size", "tokenizer.vocab_size")),
        "dim": Reach(12, "model.config.dim"),
        "held_out": Reach(0.3, lambda r: round(len(r.data.held_out) / len(r.data.training), 2), 0.43),
        "words": Reach(("blue",), lambda r: r.sample(0).partition(":")[0], "blue"),
        "neighbours.window": Reach(3, "data.window"),
        "neighbours.negatives": Reach(2, "data.negatives"),
        "text_field": Reach("body", "run.options.text.field"),
        "encoding": Reach("cp932", "run.options.text.encoding"),
        "training": Reach(OTHER, "settings"),
    }
    thinned = {"neighbours.sample": Reach(0.01, lambda r: len(r.data.training), DIFFERENT)}
    rare = {"min_count": Reach(235, "model.config.vocab_size", DIFFERENT)}
    of_data = {"training": Reach(replace(SMALL, seed=8, batch_size=3), ("data.batch_size", weights), DIFFERENT)}
    return base, [Group(rows), Group(thinned), Group(rare), Group(of_data)]


TABLE = {
    "gpt": of_gpt, "gpt1": of_gpt1, "gpt2": of_gpt2, "gpt3": of_gpt3, "llama": of_llama, "llada": of_llada,
    "olmo2": of_olmo2, "palm": of_palm, "palm2": of_palm2, "characters": of_characters, "bert": of_bert,
    "lstm": of_lstm, "word2vec": of_word2vec, "transformer": of_transformer, "seq2seq": of_seq2seq,
    "t5": of_t5,
}  # fmt: skip


PLAN = {"yes": "test_published_recipes.py: it only decides whether a run starts"}
OF_PAPER = PLAN | {"recipe_of": "test_published_recipes.py: it chooses the defaults, before the recipe is made"}
FREE = {  # options without a row, and the reason
    "bert": {"text.split": "BERT holds out sentences, by one rule"} | OF_PAPER,
    "gpt": {"recipe_of": "test_gpt_recipe.py: it only chooses the number of steps"},
    "gpt1": PLAN,
    **dict.fromkeys(("gpt2", "llama", "llada", "olmo2"), OF_PAPER),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", TABLE)
def test_every_option_reaches_what_it_names(name: str, toys: Toys) -> None:
    base, groups = TABLE[name](toys)
    groups += validated(toys, base)
    groups = wiring.logged(base, groups)
    assert not wiring.uncovered(base, groups, FREE.get(name, {})), "an option without a row in the table above"
    wiring.check(groups, lambda given: wiring.run(name, wiring.assign(base, given), toys.out / name))


SCALED = {"kind": "yarn", "factor": "4", "original-context-length": "8", "beta-fast": "3", "attention-factor": "1.5"}
PART = "model.rope-scaling:rope-scaling"  # the word that tyro asks for, which commands of earlier versions have


@pytest.mark.parametrize("name", ["llama", "llada", "olmo2", "palm", "palm2"])
def test_options_of_rotary_scaling_are_read_with_and_without_their_part_and_from_a_record(name: str) -> None:
    recipe = import_module(f"{recipes.__name__}.{recipes.RECIPES[name]}").Recipe
    words = [word for option, value in SCALED.items() for word in (f"--model.rope-scaling.{option}", value)]
    expected = RopeScaling("yarn", 4.0, 8, beta_fast=3.0, attention_factor=1.5)
    for given in (words, [PART, *words], ["--model.dim", "64", *words, "--model.n-heads", "2"]):
        read = flags.parse(recipe, given, "keifu train")
        assert read.model.rope_scaling == expected
        assert from_json(recipe(), to_json(read)) == read, "a resumed run has the options that it began with"
        assert flags.parse(recipe, ["--model.rope-scaling.factor", "4.0"], "", read).model.rope_scaling == expected
    assert flags.parse(recipe, ["--model.dim", "64"], "keifu train").model.rope_scaling is None
    wrong = {"factor": ("-1", "factor must be a number above 0"), "kind": ("yarm", "no rotary scaling 'yarm'")}
    for option, (value, message) in wrong.items():
        with pytest.raises(UserError, match=message):
            flags.parse(recipe, [*words, f"--model.rope-scaling.{option}={value}"], "keifu train")
    with pytest.raises(UserError, match="needs --model.rope-scaling.original-context-length: see"):
        flags.parse(recipe, words[:4], "keifu train")


PAPERS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("gpt1", "paper"): {
        "settings.learning_rate": 2.5e-4, "settings.betas": (0.9, 0.999), "settings.weight_decay": 0.01,
        "settings.schedule": "cosine", "settings.final_ratio": 0.0, "settings.batch_size": 64, "settings.clip": 1.0,
        "settings.optimizer": "adamw",
    },
    ("transformer", "paper"): {
        "settings.betas": (0.9, 0.98), "settings.epsilon": 1e-9, "settings.schedule": "inverse_sqrt",
        "settings.clip": 0.0, "settings.weight_decay": 0.0, "objective.label_smoothing": 0.1, "settings.keep": 5,
        "save.average": 5, "settings.optimizer": "adamw",
    },
    ("transformer", "keifu"): {
        "settings.optimizer": "muon", "settings.betas": (0.9, 0.98), "objective.label_smoothing": 0.1,
        "settings.weight_decay": 0.01, "save.average": 1, "settings.schedule": "linear",
        "settings.final_ratio": 0.0, "settings.learning_rate": 2e-3, "settings.matrix_rate": 0.02,
    },
    ("seq2seq", "paper"): {
        "settings.optimizer": "adadelta", "settings.learning_rate": 1.0, "settings.schedule": "constant",
        "settings.warmup": 0, "settings.clip": 1.0, "settings.weight_decay": 0.0, "objective.label_smoothing": 0.0,
        "data.batching.pool": 1600,
    },
    ("seq2seq", "keifu"): {
        "settings.optimizer": "adamw", "settings.betas": (0.9, 0.98), "settings.schedule": "linear",
        "settings.final_ratio": 0.0, "settings.weight_decay": 0.01, "objective.label_smoothing": 0.1,
    },
    ("palm", "paper"): {
        "settings.optimizer": "adafactor", "settings.learning_rate": 1e-2, "settings.schedule": "inverse_sqrt",
        "settings.weight_decay": 1.0, "settings.clip": 1.0, "objective.z_loss": 1e-4,
    },
    ("palm", "keifu"): {
        "settings.optimizer": "muon", "settings.schedule": "linear", "settings.final_ratio": 0.0,
        "settings.weight_decay": 0.01, "settings.spikes.rise": 0.25, "settings.learning_rate": 2e-3,
    },
    ("gpt3", "paper"): {
        "settings.betas": (0.9, 0.95), "settings.epsilon": 1e-8, "settings.clip": 1.0, "settings.weight_decay": 0.1,
        "settings.learning_rate": 6e-4, "settings.final_ratio": 0.1, "settings.rate_by": "rows",
    },
    ("gpt1", "keifu"): {"settings.optimizer": "muon", "settings.weight_decay": 0.01, "settings.final_ratio": 0.0},
    ("gpt", None): {
        "settings.optimizer": "muon", "settings.matrix_rate": 0.02, "settings.learning_rate": 3e-3,
        "settings.final_ratio": 0.0, "settings.weight_decay": 0.01,
    },
    ("characters", "nanogpt"): {
        "settings.learning_rate": 1e-3, "settings.betas": (0.9, 0.99), "settings.batch_size": 12,
        "settings.steps": 2000, "settings.warmup": 100, "settings.final_ratio": 0.1, "data.context_length": 64,
        "model.config.dropout": 0.0, "settings.weight_decay": 0.1,
    },
}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "of"), PAPERS)
def test_figures_of_the_papers(name: str, of: str | None, toys: Toys) -> None:
    base = TABLE[name](toys)[0]
    base = wiring.assign(base, {"batch_size": None} if name == "gpt1" else {})
    record = wiring.run(name, base if of is None else replace(base, recipe_of=of), toys.out)
    found = {path: wiring.look(record, path) for path in PAPERS[name, of]}
    assert found == PAPERS[name, of]


def test_published_settings() -> None:
    published = ((gpt2_recipe, 6e-4, 512), (llama_recipe, 3e-4, 2048), (olmo2_recipe, 3e-4, 1024))
    for found, rate, rows in ((recipe.PUBLISHED.training, *figures) for recipe, *figures in published):
        shared = (found.betas, found.weight_decay, found.clip, found.final_ratio, found.warmup, found.schedule)
        assert shared == ((0.9, 0.95), 0.1, 1.0, 0.1, 2000, "cosine")
        assert (found.optimizer, found.learning_rate, found.batch_size) == ("adamw", rate, rows)
    assert bert_recipe.LEARNING.betas == (0.9, 0.999) and bert_recipe.LEARNING.schedule == "linear"
    assert (bert_recipe.LEARNING.weight_decay, bert_recipe.LEARNING.final_ratio) == (0.01, 0.0)
    papers = bert_recipe.PUBLISHED.training
    assert (papers.steps, papers.batch_size, papers.learning_rate, papers.warmup) == (10**6, 256, 1e-4, 10_000)
    masking = bert_recipe.MaskingScheme()
    assert (masking.share, masking.short, masking.sentence_pairs) == (0.15, 0.1, True)
    assert palm2.LEARNING.optimizer == "muon" and palm2.LEARNING.final_ratio == 0.0


def test_the_transformers_rate_is_the_papers() -> None:
    """Section 5.3: d^-0.5 min(step^-0.5, step 4000^-1.5)."""
    found = transformer_recipe.paper_settings(transformer_recipe.Recipe(model=transformer.Config(dim=512)), 100_000)
    assert found.warmup == 4000 and found.learning_rate == pytest.approx(512**-0.5 * 4000**-0.5)
    assert transformer_recipe.paper_settings(transformer_recipe.Recipe(), 100).warmup == 100
    long = gpt1_recipe.paper_settings(gpt1_recipe.Recipe(), 50_000, 64)
    assert long.warmup == 2000


def test_batches_of_both_ways_to_translate(toys: Toys) -> None:
    base = TABLE["seq2seq"](toys)[0]
    for of, batching in (("keifu", f"{base.tokens_per_batch} tokens"), ("paper", "80 rows of 1600")):
        record = wiring.run("seq2seq", replace(base, recipe_of=of), toys.out)
        assert record.data.batching.name == batching
    assert record.data.batching.bounds[1] == 80  # rows of a batch in the paper
    own = record.model.config
    assert tuple(record.data.special) == (own.start_id, own.end_id, own.pad_id)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("length", [16, 24])
def test_a_row_of_llada_is_as_long_as_its_context(length: int, toys: Toys) -> None:
    config = llada.Config(**TINY | {"context_length": length}, mask_token=0)
    found = wiring.run("llada", llada_recipe.Recipe(small_text(toys), SMALL, model=config), toys.out / f"row-{length}")
    assert found.data.batch(0)["tokens"].shape == (SMALL.batch_size, length)
