"""nanoGPT's model with keifu's optimizer, on the track characters: what the recipe brings without LLaMA's block.

The model is GPT-2's with the sizes of nanoGPT's command for a CPU. Optimizer, batches, number format and schedule are
those of keifu's entry, with more steps, because this model learns more slowly. Their number was chosen with seed 100,
which is not printed.
"""

from collections.abc import Iterator
from dataclasses import replace

import keifu_entry
import numpy as np
import torch
from tracks import Predictor, Texts, alphabet

from keifu.data.text.packed import PackedText
from keifu.data.text.token_shards import Shards
from keifu.models import gpt2
from keifu.recipes.language.characters import WAYS
from keifu.training.objectives.language_modeling import causal_language_modeling

NAME = "nanoGPT's model in keifu"
STEPS, EVERY = 180, 5


def characters(task: Texts, seed: int) -> Iterator[tuple[int, Predictor]]:
    """Learn the characters."""
    places = {character: place for place, character in enumerate(alphabet(task))}
    parts = [np.array([places[each] for each in "".join(texts)]) for texts in (task.training, task.held_out)]
    settings = replace(WAYS["keifu"][2], steps=STEPS, seed=seed)
    shards = Shards(*parts, index={"source": "characters", "fingerprint": "characters"})
    torch.manual_seed(seed)
    config = replace(WAYS["nanogpt"][1], vocab_size=len(places))
    model = gpt2.build(config)
    data = PackedText(shards, config.context_length, settings.batch_size, seed)
    predictor = Predictor(model, lambda text: [places[each] for each in text], config.context_length)
    for step in keifu_entry.train(model, causal_language_modeling, data, settings, EVERY):
        yield step, predictor
