"""OLMo 2 (Ai2, 2024) from scratch: norms after the sublayers, QK-norm and z-loss; a small one, or the 7B.

Paper: "2 OLMo 2 Furious", section 3, and the configuration published with it: AdamW (0.9, 0.95), weight decay 0.1,
clipping at 1.0, z-loss 1e-5, 2,000 steps of warm-up, 4 M tokens per step. The paper's cosine is made for 5 T tokens and
stops at 3.9 T: `--decay-steps 1192093`. Here the cosine ends with the run, and embeddings decay too.
The default is a model of 5 M parameters with Muon; `--recipe-of paper` has the settings above.
Command: keifu train olmo2 --data english
Cost: printed before it starts; the default, a few minutes on 2 cores. The published size is for a cluster.
Expected: no run of the published size was made here, and no figure was made for a small one.
"""

from dataclasses import dataclass

from keifu.models import olmo2
from keifu.ranges import NotNegative
from keifu.recipes.language import pretraining
from keifu.training.job import Jobs


@dataclass(frozen=True)
class Recipe(pretraining.PublishedOptions):
    """Options of the run."""

    model: olmo2.Config = olmo2.Config(**pretraining.SMALL, hidden_dim=704)
    """Sizes of the model. The vocabulary is the tokenizer's, whatever is given here."""
    z_loss: NotNegative = 1e-5
    """Factor of the z-loss, which keeps the sum of exponentials of the logits near 1."""


PUBLISHED = Recipe(
    recipe_of="paper", model=olmo2.Config(),
    training=pretraining.published(steps=928_646, batch_size=1024, learning_rate=3e-4),
)  # fmt: skip


def check_before_start(recipe: Recipe) -> None:
    """Raise UserError for a run that needs too much memory, or more than a day without --yes."""
    pretraining.check_language_plan(olmo2.build, recipe.model, recipe.text, recipe.training, recipe.yes)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu.load, keifu generate and transformers read."""
    task = pretraining.prepare_text(recipe.text)
    yield pretraining.pretraining_job(
        "olmo2",
        task,
        olmo2.build,
        recipe.model,
        recipe.training,
        prompt=recipe.prompt,
        objective=pretraining.TextObjective(z_loss=recipe.z_loss),
    )
