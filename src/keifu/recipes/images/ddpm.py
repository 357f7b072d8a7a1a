"""DDPM (Ho et al., 2020): a diffusion model of pictures, conditioned on a class if wanted.

Paper: "Denoising Diffusion Probabilistic Models"; CIFAR-10: 35.7 M parameters, T 1000, linear β, the noise as target,
plain squared error, Adam at 2e-4 after 5,000 steps of warm-up, batches of 128, dropout 0.1, mirrored pictures, a moving
average with 0.9999, 800,000 steps. --recipe-of paper is that. --recipe-of keifu is a network a tenth that size that
predicts the velocity under a cosine schedule (Salimans and Ho, 2022; Nichol and Dhariwal, 2021), weighted by min-SNR
(Hang et al., 2023), at five times the rate, which falls to 0.
Command: keifu train ddpm --data emoji
Cost: printed before it starts; the default is as many steps as fit in 9 minutes on the machine.
Expected: see docs/results.md, "Drawing digits".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from keifu.data.images import augmentation, dataset, splits
from keifu.data.images.grid import grid
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline
from keifu.layers.diffusion.noise_schedule import Noise, Sampling, Schedule, Target, Variance, Weighting
from keifu.models.diffusion import ddpm
from keifu.ranges import BelowOne, Count, Natural, NotNegative, Positive, Seed, check
from keifu.recipes.images.image_runs import ImageTask, drawn_batches, image_settings, of_both, picture_facts
from keifu.recipes.images.latent_diffusion import encode_dataset
from keifu.recipes.options import Logging
from keifu.recipes.plan import check_plan
from keifu.recipes.starting import keeps_best, load_start, scaled
from keifu.training.job import Budget, Job, Jobs, PlannedSettings, parameters
from keifu.training.loop import Summary
from keifu.training.objectives.diffusion import DiffusionLoss, dequantise_data, use_latents
from keifu.training.settings import Precision, Settings

DIGITS = ("mnist", "fashion-mnist")
DIGIT_SIZE = 28
SIZE = 32  # default side for other pictures
DRAWN, COLUMNS = 25, 10  # pictures of a sample; with classes, columns of a sample
KEIFU: dict[str, Any] = {
    "dim": 32, "multipliers": (1, 2, 4), "residual_blocks": 1, "attention": (2,), "dropout": 0.0, "scale_shift": True,
    "schedule": "cosine", "target": "velocity", "variance": "fixed_small", "weighting": "min_snr",
    "batch_size": 32, "learning_rate": 1e-3, "ema": 0.999, "minutes": 9.0,
}  # fmt: skip
PAPER: dict[str, Any] = {
    "dim": 128, "multipliers": (1, 2, 2, 2), "residual_blocks": 2, "attention": (1,), "dropout": 0.1,
    "scale_shift": False, "schedule": "linear", "target": "noise", "variance": "fixed_large", "weighting": "simple",
    "batch_size": 128, "learning_rate": 2e-4, "ema": 0.9999, "steps": 800_000,
}  # fmt: skip
FLOW = {"target": "flow", "weighting": "simple"}


@dataclass(frozen=True)
class PictureOptions(Logging):
    """Options of the recipes whose model draws pictures, or pictures of a class. Unset ones are the recipe's."""

    data: str = "emoji"
    """A catalogue name (emoji, mnist, fashion-mnist), a folder of pictures, a folder a class, or .tar shards."""
    start_from: str | None = None
    """Diffusion model whose weights, sizes, classes and noise the run starts from: a run, a folder or a catalogue name
    such as digits. The default learning rate is then a tenth."""
    size: Count | None = None
    """The side of the squares in pixels; unset: 28 for mnist and fashion-mnist, 32 for other data and the paper's."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; unset: as the pictures are."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How pictures become square: cut, with white added, or stretched."""
    distinct: bool = False
    """Only one picture of each group of near copies: emoji without skin tones."""
    flip: bool | None = None
    """Mirror every second picture; unset: all but digits and clothes."""
    dequantise: bool = False
    """Spread each grey value evenly over its 256th."""
    classes: bool = False
    """Condition the model on the class of a picture."""
    label_dropout: BelowOne = 0.1
    """With --classes: the share of pictures whose class is left out in training, which guidance needs."""
    dropout: BelowOne | None = None
    """Dropout probability."""
    schedule: Schedule | None = None
    """Noise schedule; flow: along a straight line (flow matching)."""
    noise_steps: Count = 1000
    """Noise levels, the paper's T."""
    target: Target | None = None
    """Target that the network predicts."""
    times: Sampling = "uniform"
    """How the noise levels of a step are drawn; logit_normal: most of them in the middle (Stable Diffusion 3)."""
    steps: Count | None = None
    """Updates of the weights."""
    batch_size: Count | None = None
    """Pictures in a step."""
    micro_batch: Count | None = None
    """Pictures computed at a time; unset: as many as fit in memory."""
    learning_rate: NotNegative | None = None
    """AdamW's highest rate."""
    ema: BelowOne | None = None
    """Decay of the moving average of the weights, which is evaluated, sampled from and saved."""
    precision: Precision = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it."""
    keep: Count = 2
    """Saved states that are kept, a twentieth of the run apart, or 1,000 steps."""
    held_out: BelowOne = 0.05
    """Share of the pictures for validation, and as many for testing."""
    seed: Seed = 0
    """Random seed of the weights, the order of the pictures, their noise and the samples."""

    def __post_init__(self) -> None:
        check(self)
        _ = self.budget  # raises its error early

    @property
    def budget(self) -> Budget:
        """Number of steps or minutes, after the options are resolved."""
        return Budget.of(self.steps, self.minutes, 0.0)

    def filled(self, defaults: Mapping[str, Any]) -> Any:
        """Return the recipe with these values for unset options. Steps and minutes exclude each other."""
        defaults = {"flip": self.data not in DIGITS, "size": DIGIT_SIZE if self.data in DIGITS else SIZE} | dict(
            defaults
        )
        defaults["learning_rate"] = scaled(defaults["learning_rate"], self.start_from)
        defaults = {
            n: v for n, v in defaults.items() if not (n in ("steps", "minutes") and (self.steps or self.minutes))
        }
        return replace(self, **{name: value for name, value in defaults.items() if vars(self)[name] is None})


@dataclass(frozen=True)
class Recipe(PictureOptions):
    """Options of the run. Unset ones are those of --recipe-of."""

    recipe_of: Literal["keifu", "paper"] = "keifu"
    """Set of default values for the other options; see above."""
    dim: Count | None = None
    """Channels of the finest level; the other levels have multiples."""
    multipliers: tuple[Count, ...] | None = None
    """Multiples of dim, from the finest level to the coarsest; each level halves the side."""
    residual_blocks: Count | None = None
    """A level, on the way down."""
    attention: tuple[Natural, ...] | None = None
    """Levels with self-attention, 0 the finest; of fewer levels than usual, the coarsest."""
    scale_shift: bool | None = None
    """Whether the noise level scales and shifts, as in improved DDPM, or is added."""
    variance: Variance | None = None
    """Variance of the random steps back; learned_range learns it (improved DDPM)."""
    weighting: Weighting | None = None
    """How much each noise level counts in the loss."""
    gamma: Positive | None = None
    """Parameter of min_snr (5) and p2 (1)."""
    yes: bool = False
    """Start although the run would take longer than a day."""

    def resolved(self) -> "Recipe":
        """Return the recipe with defaults for unset options."""
        fitting: dict[str, Any] = KEIFU | {} if self.recipe_of == "keifu" else PAPER | {"size": SIZE}
        if self.schedule == "flow":
            fitting |= FLOW
        coarsest = len(self.multipliers or fitting["multipliers"]) - 1
        fitting["attention"] = tuple(sorted({min(level, coarsest) for level in fitting["attention"]}))
        return self.filled(fitting)


def check_before_start(recipe: Recipe) -> None:
    """Raise UserError for a run that needs too much memory, or more than a day without --yes."""
    recipe = recipe.resolved()
    if recipe.steps and not recipe.start_from:
        channels, side = recipe.channels or 3, recipe.size or SIZE
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = ddpm.build(network(recipe, channels, ()))
            model(torch.zeros(1, channels, side, side), torch.zeros(1, dtype=torch.long))
        pictures = recipe.steps * (recipe.batch_size or 1)
        operations = 3 * counter.get_total_flops() * pictures  # a backward pass costs two forward passes
        check_plan(parameters(model), operations, settings(recipe, recipe.steps), recipe.yes)


def prepare(recipe: Recipe) -> ImageTask:
    """Read the pictures, hold some out, and build the network. Options must be resolved."""

    def build(channels: int, classes: tuple[str, ...]) -> ddpm.DDPM:
        return ddpm.build(network(recipe, channels, classes))

    return prepare_task(recipe, ddpm.Config, build, recipe.weighting or "simple", recipe.gamma)


def prepare_task(
    recipe: PictureOptions, config_class: type, build: Callable[[int, tuple[str, ...]], Any],
    weighting: Weighting = "simple", gamma: float | None = None,
) -> ImageTask:  # fmt: skip
    """Read the pictures, hold some out, and build the network.

    config_class: class of the network's Config. build: function from the number of channels and the classes to the
    network. With an autoencoder, the pictures are encoded here, once. The classes of a run that starts from a model are
    the model's, in the same order.
    """
    started = load_start(recipe.start_from, config_class)[0] if recipe.start_from else None
    size, channels = (started.config.size, started.colours) if started else (recipe.size, recipe.channels)
    pictures = dataset.read_images(recipe.data, size, channels, recipe.fit)
    if recipe.classes and not pictures.classes:
        raise UserError(f"--classes needs labels, and the pictures of {recipe.data} have none: sort them into folders.")
    parts = splits.split(pictures.distinct() if recipe.distinct else pictures, recipe.held_out)
    torch.manual_seed(recipe.seed)
    if started is None:
        started = build(pictures.shape[0], pictures.classes if recipe.classes else ())
    elif (known_classes := started.config.classes) and tuple(pictures.classes) != tuple(known_classes):
        raise UserError(
            f"{recipe.start_from} knows the classes {', '.join(known_classes)}, and the pictures of {recipe.data} have "
            f"{', '.join(pictures.classes) or 'none'}: take pictures with the same classes."
        )
    config = started.config
    model = started.to(choose())
    model.check_size(*pictures.shape)
    data = drawn_batches(parts, recipe.batch_size or 1, recipe.seed, augmentation.Augmentation(flip=bool(recipe.flip)))
    if model.coder is not None:
        coder = model.coder.requires_grad_(False).eval()
        data = use_latents(data, *of_both(parts, partial(encode_dataset, coder, coder.config.scale)))
    dropped = recipe.label_dropout if config.null_class else 0.0
    objective = DiffusionLoss(config.noise, weighting, gamma, dropped, sampling=recipe.times)
    return ImageTask(model, parts, dequantise_data(data) if recipe.dequantise else data, objective)


def network(recipe: Recipe, channels: int, classes: tuple[str, ...]) -> ddpm.Config:
    """Return the network's Config. Its norms have the largest number of groups that divides every level, with at least
    4 channels in a group."""
    full = vars(recipe)
    widths = [full["dim"] * multiplier for multiplier in full["multipliers"]]
    groups = math.gcd(32, max(1, full["dim"] // 4), *widths)
    noise = Noise(full["schedule"], recipe.noise_steps, target=full["target"], variance=full["variance"])
    shared_fields = ("size", "dim", "multipliers", "attention", "dropout", "scale_shift")
    return ddpm.Config(
        channels=channels, n_residual_blocks=full["residual_blocks"], norm_groups=groups, middle_groups=groups,
        n_classes=len(classes), null_class=bool(classes and recipe.label_dropout), classes=classes, noise=noise,
        **{name: full[name] for name in shared_fields},
    )  # fmt: skip


def settings(recipe: Recipe, steps: int) -> Settings:
    """Return the training settings for this number of steps."""
    paper = {"schedule": "constant", "warmup": min(5000, steps // 10), "weight_decay": 0.0, "betas": (0.9, 0.999)}
    different = paper if recipe.recipe_of == "paper" else {}
    return image_settings(recipe, steps, micro_batch=recipe.micro_batch, **different, **keeps_best(recipe.start_from))


def sampler(model: Any, seed: int) -> Callable[[int], bytes]:
    """Return a function that draws a sample by DDIM with the same seeds at each call: a row for each class, or a square
    of pictures."""
    classes = range(min(COLUMNS, model.config.n_classes))
    count = DRAWN // max(1, len(classes)) or 1
    seeds = [seed + number for number in range(count)]

    def sample(step: int) -> bytes:
        requests = [ImageRequest(label=label) for label in classes] or [ImageRequest()]
        pictures = torch.cat([PixelPipeline(model).draw(request, seeds) for request in requests])
        about = {"keifu": f"step {step}, sampler ddim, seeds {seeds[0]} to {seeds[-1]}"}
        return grid(pictures, columns=count if classes else None, about=about)

    return sample


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu draw and diffusers' DDPMPipeline read."""
    recipe = recipe.resolved()
    paper = "Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models (2020)"
    option_names = ("recipe_of", "weighting", "gamma")
    show_folder((yield job_of(recipe, prepare(recipe), partial(settings, recipe), option_names, "DDPM", paper)))


def job_of(
    recipe: PictureOptions, task: ImageTask, settings: Callable[[int], Settings], option_names: Sequence[str],
    name: str, paper: str,
) -> Job:  # fmt: skip
    """Return the training of a task's model.

    option_names: options of the recipe, in addition to the common ones, that affect the result."""
    print(task.parts.train.sentence(), task.parts.sentence(), flush=True)
    if task.parts.train.classes and not task.model.config.n_classes:
        print("The classes are not learned: add --classes to draw them by name.", flush=True)
    facts = picture_facts(
        recipe, task.parts.train,
        ("data", "fit", "distinct", "flip", "dequantise", "label_dropout", "times", *option_names),
        {"model": asdict(task.model.config)}, title=f"{name} learns to draw “{Path(recipe.data).stem}”",
        about={"parameters": parameters(task.model), "paper": paper},
        held_out={"share": recipe.held_out, "distinct": recipe.distinct},
    )  # fmt: skip
    return Job(
        model=task.model, objective=task.objective, data=task.data, settings=PlannedSettings(recipe.budget, settings),
        facts=facts, sample=sampler(task.model, recipe.seed),
    )  # fmt: skip


def show_folder(summary: Summary) -> None:
    """Print the folder of a network, with the command that draws by it."""
    print(f"The network is in {summary.directory}: keifu draw {shell(summary.directory)} -o picture.png")
