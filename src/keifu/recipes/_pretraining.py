"""What the recipes of PaLM and GPT-3 have in common: their options, and keifu's own way to train; knows no model."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from keifu.recipes._language import Text
from keifu.recipes._options import Logging
from keifu.training.settings import Settings


@dataclass(frozen=True)
class Options(Logging):
    """What both can be told."""

    text: Annotated[Text, tyro.conf.arg(name="")] = Text()
    """What to learn from."""
    recipe_of: Literal["keifu", "paper"] = "keifu"
    """Whose way to train; the model is the one below either way."""
    steps: int = 2000
    """Updates of the weights; the paper's numbers of steps shrink with them."""
    batch_size: int = 32
    """Rows in a step, once the batch has grown."""
    micro_batch: int | None = None
    """Rows computed at a time, which changes no loss; unset: as many as fit in memory."""
    learning_rate: float | None = None
    """The highest rate; unset: 2e-3, of AdamW beside Muon, or the paper's."""
    matrix_rate: float = 0.02
    """The highest rate of Muon, for hidden matrices; the papers have none."""
    compile: bool = False
    """Compile with torch.compile: slower to start, then faster."""
    seed: int = 0
    """Of the weights, the order of the data and the samples."""
    prompt: str = "The"
    """How the samples begin."""

    def share(self, part: float) -> int:
        """So many steps as are this part of the run."""
        return round(part * self.steps)


def usual(options: Options) -> dict[str, Any]:
    """What either way to train has, as `Settings` names it."""
    return {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "micro_batch": options.micro_batch,
        "compile": options.compile,
        "seed": options.seed,
        **options.logging(),
        "evaluate_every": max(50, options.share(0.05)),
        "sample_every": max(50, options.share(0.1)),
        "save_every": max(100, options.share(0.1)),
    }


def own_settings(options: Options, **more: Any) -> Settings:
    """How keifu trains: Muon, and rates that fall to 0 in a line."""
    return Settings(
        **usual(options), warmup=min(100, -(-options.steps // 10)), optimizer="muon", schedule="linear",
        learning_rate=options.learning_rate or 2e-3, matrix_rate=options.matrix_rate, final_ratio=0.0,
        weight_decay=0.01, **more,
    )  # fmt: skip
