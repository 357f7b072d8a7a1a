"""PaLM (Chowdhery et al., 2022) from scratch: parallel attention and feed-forward, multi-query attention, on any text.

Paper: "PaLM: Scaling Language Modeling with Pathways", section 5. `--recipe-of paper` trains with its settings:
Adafactor without factoring, updates scaled by the size of each matrix, at a rate of 0.01 that is constant and then
decreases with the root of the step, β₁ 0.9, β₂ 1 − k^-0.8, clipping at 1, weight decay by the square of the rate,
z-loss 1e-4, and a batch that doubles twice. Its rate is constant for 10,000 of 255,000 steps, and its batch grows after
50,000 and 115,000; a shorter run has the same shares. The default is for minutes on a processor: Muon, and rates that
fall to 0. With both settings the run goes back after a spike of the loss and skips batches (section 5.1), and a trained
BPE encodes numbers digit by digit. The paper's 8B: --steps 255000 --batch-size 2048 --model.context-length 2048
--model.dim 4096 --model.hidden-dim 16384 --model.n-layers 32 --model.n-heads 16 --model.head-dim 256 --vocab-size
256000. The paper does not state what β₁ averages, or whether Adafactor clips each update; here both are as in T5X,
which trained it.
Command: keifu train palm --recipe-of paper --data english
Cost: printed before it starts; the default, a model of 6 M parameters and 2.5 M tokens, a few minutes on 2 cores.
Expected: see docs/results.md, "PaLM's layer and optimizer: learning" and "Recovery from loss spikes".
"""

from dataclasses import dataclass, replace

from keifu.models import palm
from keifu.ranges import NotNegative
from keifu.recipes.language.pretraining import PretrainingOptions, TextObjective, prepare_text, pretraining_job
from keifu.training.job import Jobs
from keifu.training.optim.loss_spikes import SpikeSettings
from keifu.training.settings import Settings

STEPS, HELD, GROWS = 255_000, 10_000, (50_000, 115_000)  # as in the paper


@dataclass(frozen=True)
class Recipe(PretrainingOptions):
    """Options of the run."""

    model: palm.Config = palm.Config(context_length=256, dim=256, hidden_dim=1024, n_layers=4, n_heads=4, head_dim=64)
    """The vocabulary is the tokenizer's, whatever is given here."""
    z_loss: NotNegative | None = None
    """Times log²Z, added to the loss of a token; unset: 0, the paper's 1e-4."""
    spikes: SpikeSettings = SpikeSettings(rise=0.25)
    """Treatment of spikes of the loss."""


def paper_settings(recipe: Recipe) -> Settings:
    """Return the settings of section 5. Its numbers of steps are converted to shares of the run."""
    rows = [max(1, recipe.batch_size // 4), max(1, recipe.batch_size // 2)]
    until = [recipe.share(step / STEPS) for step in GROWS]
    growing = until[0] < until[1] and until[0] > 0  # otherwise the run is too short for growth
    return recipe.settings(
        batch_stages=tuple(zip(rows, until, strict=True)) if growing else (), optimizer="adafactor", learning_rate=1e-2,
        schedule="inverse_sqrt", hold=max(1, recipe.share(HELD / STEPS)), weight_decay=1.0, clip=1.0,
        spikes=recipe.spikes,
    )  # fmt: skip


def keifu_settings(recipe: Recipe) -> Settings:
    """Return keifu's settings, with the treatment of spikes."""
    return replace(recipe.own_settings(), spikes=recipe.spikes)


WAYS = {"keifu": (keifu_settings, 0.0), "paper": (paper_settings, 1e-4)}  # with their default z-loss


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load and keifu generate read, and transformers as a Cohere model."""
    settings, default_z = WAYS[recipe.recipe_of]
    z_loss = default_z if recipe.z_loss is None else recipe.z_loss
    task = prepare_text(recipe.text, split_digits=recipe.text.tokenizer == "bpe")
    objective = TextObjective(z_loss=z_loss)
    yield pretraining_job(
        "palm", task, palm.build, recipe.model, settings(recipe), prompt=recipe.prompt, objective=objective
    )
