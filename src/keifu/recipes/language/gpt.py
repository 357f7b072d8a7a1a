"""A language model whose size one option sets: --depth decides width, heads, context, learning rate, batch and steps.

The model consists of LLaMA's blocks (Touvron et al., 2023); the optimiser is Muon with AdamW. One option for all sizes
is nanochat's idea. `--recipe-of chinchilla` trains on the number of tokens of Hoffmann et al. (2022), 20 per parameter,
but at most 4 passes over the text (Muennighoff et al., 2023). The default stops at 80 TFLOP, or at 50 with Gated
DeltaNets: a few minutes on 2 cores. With `--distill.teacher` the model learns all probabilities of a larger model with
the same tokenizer.
Command: keifu train gpt --depth 4 --data english
Cost: printed before it starts, measured on the machine; depth 4 has about 5 M parameters and takes a few minutes on 2
cores, and an hour or more with --recipe-of chinchilla.
Expected: see docs/results.md, "Loss and size".
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from keifu import checkpoints
from keifu.checkpoints import registry
from keifu.errors import UserError
from keifu.inference.text.model import causal
from keifu.layers.attention.positions import RopeScaling
from keifu.layers.lora import merge
from keifu.models import llama
from keifu.models.hybrid import qwen3_5
from keifu.ranges import Count, Depth, NotNegative, Seed
from keifu.recipes.distilling import Distill
from keifu.recipes.language.pretraining import (
    Text,
    TextObjective,
    TextOptions,
    TextTask,
    prepare_text,
    pretraining_job,
    settings_of,
)
from keifu.recipes.options import Logging, value_or
from keifu.recipes.starting import keeps_best, scaled
from keifu.training import job
from keifu.training.settings import Settings

HEAD_DIM = 64
OPERATIONS = {"llama": 8e13, "qwen3.5": 5e13}  # FLOP of a default run: a few minutes on two cores; deltas are slower
FEWEST_STEPS = 100


@dataclass(frozen=True)
class Recipe(TextOptions, Logging):
    """Options of the run. Unset ones follow from the depth."""

    depth: Depth = 4
    """Number of blocks; the width is 64 times as many, and the rest follows."""
    data: str = "english"
    """A catalogue name (keifu data list); a file: .txt, .md, .html (read without its tags), or records (.jsonl, .json,
    .csv, .tsv, .parquet); or a folder of them."""
    tokenizer: str = "bpe"
    """bpe, unigram, wordpiece or characters to learn one from the data; or a catalogue name, a file or a directory."""
    vocab_size: Count | None = None
    """Vocabulary size of a learned tokenizer."""
    family: Literal["llama", "qwen3.5"] = "llama"
    """Layers of the model: LLaMA's, or Qwen3.5's, three Gated DeltaNets for each layer of attention."""
    start_from: str | None = None
    """A language model to continue, with its tokenizer and sizes, to train it longer or on a text of one's own: a
    run, a folder, a .gguf file, a catalogue name (gpt-en, smollm2) or a hub id. The depth then sets the batch alone."""
    context_length: Count | None = None
    """Context length of a new model. If you continue a model, the tokens of a row."""
    stretch: Literal["yarn", "linear"] | None = None
    """Scaling of the rotary positions of a model to continue, for rows that are longer than its context: YaRN (Peng et
    al., 2023), or linear, which is position interpolation (Chen et al., 2023)."""
    steps: Count | None = None
    """Updates of the weights; unset: see --recipe-of, and 100 with --stretch."""
    recipe_of: Literal["keifu", "chinchilla"] = "keifu"
    """Source of the number of steps: keifu, a few minutes on two cores, or Chinchilla's law, 20 tokens per parameter.
    Neither makes more than 4 passes over the text, nor fewer than 100 steps."""
    batch_size: Count | None = None
    """Rows of context_length tokens in a step."""
    micro_batch: Count | None = None
    """Rows computed at a time; unset: as many as fit in memory."""
    learning_rate: NotNegative | None = None
    """AdamW's highest rate, for embeddings and gains; unset: 3e-3, or with --start-from a tenth of it."""
    matrix_rate: NotNegative | None = None
    """Muon's highest rate, for hidden matrices; unset: 0.02, or with --start-from a tenth of it."""
    seed: Seed = 0
    """Random seed of the weights, the order of the data and the samples."""
    compile: bool = False
    """Compile with torch.compile: slower to start, faster after."""
    prompt: str = "The"
    """Beginning of the samples."""
    distill: Distill = field(default_factory=Distill)
    """Teacher that the model learns from."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"depth must be at least 1, not {self.depth}.")
        if self.compile and self.distill.teacher:
            raise UserError("A run with a teacher cannot be compiled: leave --compile out.")
        if self.stretch and not self.start_from:
            raise UserError("--stretch is for a model to continue: name it with --start-from, or leave --stretch out.")
        if self.start_from is not None and (self.vocab_size is not None or self.tokenizer != Recipe.tokenizer):
            option = f"--tokenizer {self.tokenizer}" if self.vocab_size is None else f"--vocab-size {self.vocab_size}"
            raise UserError(f"{self.start_from} goes on with its own tokenizer: leave {option} out.")


def model_config(depth: int, vocab_size: int, context_length: int | None = None) -> llama.Config:
    """Return the model's config for this depth."""
    dim = HEAD_DIM * depth
    sizes: dict[str, Any] = {"hidden_dim": -(-8 * dim // (3 * 64)) * 64, "n_layers": depth, "n_heads": depth}
    return llama.Config(vocab_size, context_length or usual_context(depth), dim, **sizes, norm_eps=1e-5, tied=True)


def hybrid_config(config: llama.Config) -> qwen3_5.Config:
    """Return a Qwen3.5 config with the same sizes. With fewer than four layers, the last one has attention."""
    shared = {name: vars(config)[name] for name in ("vocab_size", "context_length", "dim", "hidden_dim", "n_layers")}
    heads, n_layers = config.n_heads, config.n_layers
    return qwen3_5.Config(
        **shared, n_heads=heads, n_kv_heads=heads, head_dim=HEAD_DIM, rope_dim=HEAD_DIM // 4, n_linear_key_heads=heads,
        n_linear_value_heads=heads, linear_key_dim=HEAD_DIM, linear_value_dim=HEAD_DIM, tied=True,
        global_layers=None if n_layers > 3 else (n_layers - 1,),
    )  # fmt: skip


FAMILIES: dict[str, Any] = {"llama": (llama.build, lambda config: config), "qwen3.5": (qwen3_5.build, hybrid_config)}


def usual_context(depth: int) -> int:
    """Return the default context length for this depth."""
    return min(2048, 128 * 2 ** (depth // 2))


def parameters(config: llama.Config) -> int:
    """Count the parameters of the blocks and the embedding, without norms."""
    return config.n_layers * config.dim * (4 * config.dim + 3 * config.hidden_dim) + config.vocab_size * config.dim


def settings(recipe: Recipe, size: int, row: int, training_tokens: int) -> Settings:
    """Return batch size, steps and rates for this depth. size: number of parameters. row: tokens of a row."""
    tokens_a_step = 4096 * 2 ** min(8, max(0, (recipe.depth - 2) // 2))
    batch_size = recipe.batch_size or max(1, tokens_a_step // row)
    few = FEWEST_STEPS if recipe.stretch else None  # a stretched model learned the language before (Peng et al., 2023)
    steps = recipe.steps or few or default_steps(recipe, size, batch_size * row, training_tokens)
    return settings_of(
        recipe, steps, batch_size, scaled(3e-3, recipe.start_from), optimizer="muon", compile=recipe.compile,
        matrix_rate=value_or(recipe.matrix_rate, scaled(0.02, recipe.start_from)), warmup=min(100, steps // 10),
        final_ratio=0.0, weight_decay=0.01, **keeps_best(recipe.start_from),
    )  # fmt: skip


def default_steps(recipe: Recipe, size: int, tokens_a_step: int, training_tokens: int) -> int:
    """Return the number of steps by Chinchilla's law, or those of them that fit the default's number of operations."""
    by_law = max(FEWEST_STEPS, round(min(20 * size, 4 * training_tokens) / tokens_a_step))
    if recipe.recipe_of == "chinchilla":
        return by_law
    step_operations = 6 * size * tokens_a_step  # 6 per token and parameter
    steps = min(by_law, max(FEWEST_STEPS, round(OPERATIONS[recipe.family] / step_operations)))
    if steps < by_law:
        law = f"Chinchilla's law asks for {by_law:,} steps of {tokens_a_step:,} tokens (--recipe-of chinchilla)"
        print(f"{law}; this run makes {steps:,}, to end within minutes.", flush=True)
    return steps


def prepare(recipe: Recipe) -> tuple[TextTask, llama.Config, Settings]:
    """Return the text, and the model's config and the settings for this depth."""
    vocab_size = recipe.vocab_size or min(32_768, 2048 * recipe.depth)
    task = prepare_text(Text(recipe.data, recipe.tokenizer, vocab_size, **recipe.reading()))
    config = model_config(recipe.depth, task.tokenizer.vocab_size, recipe.context_length)
    return task, config, settings(recipe, parameters(config), config.context_length, len(task.shards.tokens))


def jobs(recipe: Recipe) -> job.Jobs:
    """Yield the training, whose result keifu.load, keifu generate and transformers read."""
    if recipe.start_from is not None:
        yield continued(recipe, recipe.start_from)
        return
    task, config, training = prepare(recipe)
    build, size = FAMILIES[recipe.family]
    loss = recipe.distill.objective(task.tokenizer, config.context_length)
    objective = TextObjective(loss=loss, options=recipe.distill.options())
    yield pretraining_job("gpt", task, build, size(config), training, prompt=recipe.prompt, objective=objective)


def start_model(name: str) -> tuple[Any, Any]:
    """Load a language model for further training, in float32, with adapters merged; and its tokenizer."""
    loaded, tokenizer = checkpoints.load(name, torch.float32)
    return causal(merge(loaded).requires_grad_(True)), tokenizer


def stretched(model: Any, name: str, kind: Literal["yarn", "linear"], length: int) -> Any:
    """Return the model with its rotary positions scaled to a longer context, and the same weights."""
    config = model.config
    trained = config.context_length
    if length <= trained:
        advice = "give a longer --context-length, or leave --stretch out"
        raise UserError(f"{name} takes {trained} tokens without --stretch, and rows have {length}: {advice}.")
    if "rope_scaling" not in vars(config) or config.rope_scaling is not None:
        reason = "they are scaled already" if "rope_scaling" in vars(config) else "its model has none"
        raise UserError(f"--stretch scales the plain rotary positions of a model, and of {name} {reason}.")
    scaling = RopeScaling(kind, length / trained, trained)
    longer = replace(config, context_length=length, rope_scaling=scaling)
    built: Any = registry.describe(longer)[0].build(longer)
    built.load_state_dict(model.state_dict())
    return built


def continued(recipe: Recipe, name: str) -> job.Job:
    """Return the further training of a given model, with its weights, sizes and tokenizer. Rows have the depth's
    context length, at most the model's."""
    model, tokenizer = start_model(name)
    most = model.config.context_length
    row = recipe.context_length or min(most, usual_context(recipe.depth))
    if recipe.stretch:
        model = stretched(model, name, recipe.stretch, row)
    elif row > most:
        advice = "give less, or stretch its rotary positions with --stretch yarn"
        raise UserError(f"--context-length {row} is more than the {most} tokens that {name} takes: {advice}.")
    task = TextTask(Text(recipe.data, name, **recipe.reading()), tokenizer, recipe.shards(recipe.data, tokenizer))
    training = settings(recipe, job.parameters(model), row, len(task.shards.tokens))
    loss = recipe.distill.objective(tokenizer, row, model)
    objective = TextObjective(loss=loss, row=row, options=recipe.distill.options())
    return pretraining_job(
        "gpt", task, lambda _: model, model.config, training, prompt=recipe.prompt, objective=objective
    )
