"""Options of recipes that become settings of the training loop: the settings themselves, and those for fine-tuning."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from keifu.ranges import BelowOne, Count, Positive, Seed
from keifu.recipes.options import Logging
from keifu.training.settings import Settings

TrainingOptions = Annotated[Settings, tyro.conf.arg(name="")]  # options without a prefix


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Logging):
    """Options of every fine-tuning recipe, each of which has different defaults."""

    model: str = field(default="smollm2", kw_only=False)
    """The pretrained model: a run, a directory, a .gguf file, a catalogue name or a hub id."""
    data: str = field(default="preferences.jsonl", kw_only=False)
    """Data to learn from."""
    held_out: BelowOne = 0.1
    """Share of the prompts that is kept for validation, chosen by a hash of the text."""
    epochs: Positive = 1.0
    """Passes over the training examples."""
    steps: Count | None = None
    """Updates of the weights; replaces epochs."""
    micro_batch: Count | None = None
    """Examples computed at a time; unset: as many as fit in memory."""
    learning_rate: float | None = None
    """AdamW's highest learning rate."""
    seed: Seed = 0
    """Random seed of new weights, the order of the examples, dropout and sampling."""

    def origin(self) -> dict[str, Any]:
        """Return the values that a resumed run must share."""
        return {"begins with": self.model}

    def total_steps(self, steps_per_epoch: float | int) -> int:
        """Return the steps of the whole run."""
        return self.steps or max(1, round(self.epochs * steps_per_epoch))

    def settings(self, steps: int, **different: Any) -> Settings:
        """Return settings: AdamW without weight decay, five validations and ten checkpoints. different: the learning
        rate, and other fields of `Settings`."""
        default = {"weight_decay": 0.0, "betas": (0.9, 0.999), "keep_best": True}
        default |= {"evaluate_every": max(1, steps // 5), "save_every": max(1, steps // 10)}
        return Settings(
            steps=steps, micro_batch=self.micro_batch, seed=self.seed, **self.logging(), **default | different
        )
