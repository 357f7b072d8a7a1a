"""The entry of keifu: its recipes' models and optimizers, with a schedule that ends about when the target is reached.

Each function prepares the data, and returns an iterator, which builds the model and trains it. The iterator gives the
number of steps done and the model whenever it wants to be measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from tracks import Digits, Draw, Predictor, Texts, alphabet

from keifu.data.images.batches import ImageBatches
from keifu.data.text.packed import PackedText
from keifu.data.text.token_shards import Shards, prepare_parts
from keifu.data.tokenizers.load import learned_tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline
from keifu.memory import keep_freed
from keifu.models import llama
from keifu.models.diffusion import ddpm as network
from keifu.recipes.images import ddpm
from keifu.recipes.language import gpt
from keifu.recipes.language.characters import WAYS
from keifu.training.objectives.diffusion import DiffusionLoss, add_draws
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.protocols import Data, Objective
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

NAME = "keifu"
STEPS = {"characters": 115, "english": 150, "digits": 480}  # until the rates are at their end
EVERY = {"characters": 5, "english": 10, "digits": 20}  # steps between measurements
AT_ONCE = 64  # pictures
CPU = torch.device("cpu")


def characters(task: Texts, seed: int) -> Iterator[tuple[int, Predictor]]:
    """Learn the characters with the recipe of `keifu train characters`."""
    places = {character: place for place, character in enumerate(alphabet(task))}
    parts = [np.array([places[each] for each in "".join(texts)]) for texts in (task.training, task.held_out)]
    _, config, settings = WAYS["keifu"]
    config, settings = replace(config, vocab_size=len(places)), replace(settings, steps=STEPS["characters"], seed=seed)
    shards = Shards(*parts, index={"source": "characters", "fingerprint": "characters"})
    return language(shards, config, settings, EVERY["characters"], lambda text: [places[c] for c in text])


def english(task: Texts, seed: int) -> Iterator[tuple[int, Predictor]]:
    """Learn English with the recipe of `keifu train gpt`: 4.3 M parameters, 4,096 tokens of 4,096 kinds a step."""
    texts = sha256("\0".join([*task.training, "", *task.held_out]).encode()).hexdigest()
    learn = partial(train_tokenizer, "bpe", task.training, 4096)
    tokenizer = learned_tokenizer(f"speedrun-bpe-4096-{texts[:16]}", learn)
    shards = prepare_parts("speedrun", texts, lambda: (task.training, task.held_out), tokenizer)
    config = gpt.model_config(4, tokenizer.vocab_size, 256)
    settings = gpt.settings(gpt.Recipe(depth=4, steps=STEPS["english"], seed=seed), 0, 256, 0)

    def encode(document: str) -> list[int]:
        return [*tokenizer.encode(document), cast(int, tokenizer.eos_id)]

    return language(shards, config, settings, EVERY["english"], encode)


def language(
    shards: Shards, config: llama.Config, settings: Settings, every: int, encode: Callable[[str], list[int]]
) -> Iterator[tuple[int, Predictor]]:
    """Train LLaMA's block."""
    torch.manual_seed(settings.seed)
    model = llama.build(config)
    predictor = Predictor(model, encode, config.context_length)
    data = PackedText(shards, config.context_length, settings.batch_size, settings.seed)
    for step in train(model, causal_language_modeling, data, settings, every):
        yield step, predictor


def digits(task: Digits, seed: int) -> Iterator[tuple[int, Draw]]:
    """Learn digits by a flow with the recipe of `keifu train ddpm`: 0.7 M parameters, drawn in 10 steps."""
    recipe = ddpm.Recipe(
        data="mnist", schedule="flow", dim=16, multipliers=(1, 2, 4), weighting="simple", batch_size=32,
        learning_rate=1e-3, steps=STEPS["digits"], seed=seed,
    ).resolved()  # fmt: skip
    settings = ddpm.settings(recipe, STEPS["digits"])
    torch.manual_seed(seed)
    model = network.build(ddpm.network(recipe, 1, ()))
    batches: Any = ImageBatches(task.training, task.training, settings.batch_size, seed)
    objective = DiffusionLoss(model.config.noise, recipe.weighting or "simple")

    def draw(seeds: range) -> torch.Tensor:
        painter, wanted = PixelPipeline(model), ImageRequest("ddim", 10)
        parts = [seeds[first : first + AT_ONCE] for first in range(0, len(seeds), AT_ONCE)]
        return torch.cat([painter.draw(wanted, part) for part in parts])

    for step in train(model, objective, add_draws(batches, seed), settings, EVERY["digits"]):
        yield step, draw


def train(model: nn.Module, objective: Objective, data: Data, settings: Settings, every: int) -> Iterator[int]:
    """Train, and stop for a measurement every so many steps near the end and after it, with the moving average if one
    is kept.

    The rates fall to a tenth in `settings.steps`. As many steps more follow at that tenth, for other machines, on which
    the target may take a few more.
    """
    end = settings.steps
    trainer = Trainer(model.train(), objective, replace(settings, steps=2 * end, decay_steps=end, final_ratio=0.1))
    with keep_freed(CPU):
        for step in range(2 * end):
            gradient = trainer.gradient(step, data.batch(step))
            assert gradient
            trainer.update(gradient)
            done = step + 1
            if done % every == 0 and done >= 0.9 * end:
                with trainer.optimizers.averaged():
                    model.eval()
                    yield done
                    model.train()
