"""Options and optimizer settings that all fine-tuning recipes share."""

from dataclasses import dataclass, field
from typing import Any

from keifu.recipes.options import Logging
from keifu.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Logging):
    """Options of every fine-tuning recipe, each of which sets its own defaults."""

    model: str = field(default="smollm2", kw_only=False)
    """The pretrained model: a run, a directory, a .gguf file, a catalogue name or a hub id."""
    data: str = field(default="preferences.jsonl", kw_only=False)
    """What is learned from."""
    held_out: float = 0.1
    """Share of the prompts that is kept for validation, chosen by a hash of the text."""
    epochs: float = 1.0
    """Passes over the training examples."""
    steps: int | None = None
    """Updates of the weights; replaces epochs."""
    micro_batch: int | None = None
    """Examples computed at a time; unset: as many as fit in memory."""
    learning_rate: float | None = None
    """AdamW's highest learning rate."""
    seed: int = 0
    """Of all random numbers: new weights, the order of the examples, dropout and sampling."""

    def origin(self) -> dict[str, Any]:
        """What a resumed run must begin with too."""
        return {"begins with": self.model}

    def total_steps(self, steps_per_epoch: float | int) -> int:
        """Steps of the whole run."""
        return self.steps or max(1, round(self.epochs * steps_per_epoch))


def finetune_settings(recipe: FinetuneOptions, steps: int, **different: Any) -> Settings:
    """AdamW without weight decay, five validations and ten checkpoints in `steps` steps; `different` are the fields of
    `Settings` in which a recipe differs from that."""
    every = {"evaluate_every": max(1, steps // 5), "save_every": max(1, steps // 10)}
    return Settings(**recipe.loop(**{"steps": steps, "weight_decay": 0.0, "betas": (0.9, 0.999), **every, **different}))
