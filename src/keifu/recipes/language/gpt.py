"""A language model whose size one option sets: --depth decides width, heads, context, learning rate, batch and steps.

The model is LLaMA's block (Touvron et al., 2023), the optimiser Muon with AdamW; sizes follow nanochat's idea of one
dial, the number of tokens Hoffmann et al. (2022): 20 a parameter, but at most 4 passes over the text (Muennighoff et
al., 2023).
Command: keifu train gpt --depth 4 --data english
Cost: printed before it starts, measured on the machine; depth 4 is about 5 M parameters and an hour on 2 cores.
Expected: see docs/results.md, "Loss and size".
"""

from dataclasses import dataclass
from pathlib import Path

from keifu.errors import UserError
from keifu.models import llama
from keifu.recipes.language.common import Task, Text, TextOptions, prepare_text, pretrain
from keifu.recipes.options import Logging
from keifu.training.settings import Settings

HEAD_DIM = 64


@dataclass(frozen=True)
class Recipe(TextOptions, Logging):
    """Options of the run. What is not given follows from the depth."""

    depth: int = 4
    """Blocks; the width is 64 times as many, and all else follows."""
    data: str = "english"
    """A catalogue name (keifu data list); a file: .txt, .md, .html (read without its tags), or records (.jsonl, .json,
    .csv, .tsv, .parquet); or a folder of them."""
    tokenizer: str = "bpe"
    """bpe, unigram, wordpiece or characters to learn one from the data; or a catalogue name, a file or a directory."""
    vocab_size: int | None = None
    """Tokens of a learned tokenizer."""
    context_length: int | None = None
    """Tokens that the model sees."""
    steps: int | None = None
    """Updates of the weights."""
    batch_size: int | None = None
    """Rows of context_length tokens in a step."""
    micro_batch: int | None = None
    """Rows computed at a time; unset: as many as fit in memory."""
    learning_rate: float = 3e-3
    """AdamW's highest rate, for embeddings and gains."""
    matrix_rate: float = 0.02
    """Muon's highest rate, for hidden matrices."""
    seed: int = 0
    """Of the weights, the order of the data and the samples."""
    compile: bool = False
    """Compile with torch.compile: slower to start, faster after."""
    prompt: str = "The"
    """What the samples begin with."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"depth must be at least 1, and it is {self.depth}.")


def model_config(depth: int, vocab_size: int, context_length: int | None = None) -> llama.Config:
    """The model at one setting of the dial."""
    dim = HEAD_DIM * depth
    return llama.Config(
        vocab_size=vocab_size,
        context_length=context_length or min(2048, 128 * 2 ** (depth // 2)),
        dim=dim,
        hidden_dim=-(-8 * dim // (3 * 64)) * 64,
        n_layers=depth,
        n_heads=depth,
        norm_eps=1e-5,
        tied=True,
    )


def parameters(config: llama.Config) -> int:
    """Of the blocks and the embedding, norms left out."""
    return config.n_layers * config.dim * (4 * config.dim + 3 * config.hidden_dim) + config.vocab_size * config.dim


def settings(recipe: Recipe, config: llama.Config, training_tokens: int) -> Settings:
    """Batch, steps and rates at one setting of the dial, for a text of so many tokens."""
    tokens_a_step = 4096 * 2 ** min(8, max(0, (recipe.depth - 2) // 2))
    batch_size = recipe.batch_size or max(1, tokens_a_step // config.context_length)
    wanted = min(20 * parameters(config), 4 * training_tokens)
    steps = recipe.steps or max(100, round(wanted / (batch_size * config.context_length)))
    return Settings(
        steps=steps,
        batch_size=batch_size,
        micro_batch=recipe.micro_batch,
        optimizer="muon",
        learning_rate=recipe.learning_rate,
        matrix_rate=recipe.matrix_rate,
        warmup=min(100, steps // 10),
        final_ratio=0.0,
        weight_decay=0.01,
        evaluate_every=max(50, steps // 20),
        sample_every=max(50, steps // 10),
        save_every=max(100, steps // 10),
        compile=recipe.compile,
        seed=recipe.seed,
        **recipe.logging(),
    )


def prepare(recipe: Recipe) -> tuple[Task, llama.Config, Settings]:
    """The text, the model's config and the settings that the dial gives."""
    vocab_size = recipe.vocab_size or min(32_768, 2048 * recipe.depth)
    task = prepare_text(Text(recipe.data, recipe.tokenizer, vocab_size, **recipe.reading()))
    config = model_config(recipe.depth, task.tokenizer.vocab_size, recipe.context_length)
    return task, config, settings(recipe, config, len(task.shards.tokens))


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Trains into `out`, which keifu.load, keifu generate and transformers read afterwards."""
    task, config, chosen = prepare(recipe)
    pretrain("gpt", task, llama.build, config, chosen, out, resume, recipe.prompt)
