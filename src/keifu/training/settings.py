"""What a run of the training loop can be told, checked before anything starts; knows no model and no data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from keifu.data.batching import BatchSizeSchedule, batch_size_stages, linear_batch_size
from keifu.devices import chosen
from keifu.errors import UserError, unknown
from keifu.training.optim.loss_spikes import SpikeSettings

Optimizer = Literal["adamw", "muon", "adadelta", "adafactor"]
Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
RateBy = Literal["steps", "rows"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

# What a resumed run may change: how long, how often, and how a batch is split, never what a step computes.
ADJUSTABLE = frozenset(
    ["steps", "minutes", "micro_batch", "compile", "log_every", "evaluate_every", "sample_every", "save_every", "keep"]
    + ["tensorboard", "wandb"]
)


@dataclass(frozen=True)
class Settings:
    """How any model is trained."""

    steps: int = 1000
    """Updates of the weights."""
    minutes: float | None = None
    """How long the run may take, validations, samples and saving included: `steps` is then a first estimate, which
    follows the pace of the machine, and the rate falls over the steps that there are."""
    batch_size: int = 32
    """Rows in a step."""
    batch_stages: tuple[tuple[int, int], ...] = ()
    """Smaller batches at first, as pairs: rows, and the step up to which a step has them (PaLM: 512 50000 1024 115000).
    """
    batch_ramp: tuple[int, int] | None = None
    """A batch that grows evenly instead (GPT-3): the rows of the first step, and after how many rows it is whole."""
    micro_batch: int | None = None
    """Rows computed at a time; fewer need less memory and change no loss, dropout included. Unset: as many as fit in
    memory. Where rows differ in length, shorter ones go together in larger numbers."""
    optimizer: Optimizer = "adamw"
    """muon: Muon for hidden matrices, AdamW for everything else. adadelta: Zeiler's (2012), ρ 0.95, ε 1e-6.
    adafactor: PaLM's (2022), without factoring, updates scaled by the size of each matrix."""
    learning_rate: float = 3e-4
    """The highest rate of AdamW; Adadelta's, which its paper has as 1; Adafactor's, a share of each matrix's size."""
    matrix_rate: float = 0.02
    """The highest rate of Muon."""
    schedule: Schedule = "cosine"
    """How the rate falls after the warm-up."""
    warmup: int = 0
    """Steps in which the rate rises from 0."""
    hold: int = 0
    """Steps after them in which it stays the highest (PaLM: 10,000, then inverse_sqrt)."""
    final_ratio: float = 0.1
    """The last rate as a share of the highest one (linear and cosine)."""
    decay_steps: int | None = None
    """Steps after which linear and cosine have fallen, and the rate stays; unset: all."""
    rate_shares: tuple[tuple[str, float], ...] = ()
    """Weights whose names begin so learn with that share of AdamW's rate, as pairs: a beginning, and the share."""
    rate_by: RateBy = "steps"
    """What is counted for the rate. rows: a step counts as the share of batch_size that its batch has, so that rates
    follow the tokens seen while the batch grows."""
    weight_decay: float = 0.1
    """Applied to matrices and embeddings, times the rate, or for adafactor its square (1 is PaLM's); never to biases
    and gains."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the mean and of the square of the gradient; the first is Adafactor's too."""
    epsilon: float = 1e-8
    """AdamW's, added to the root of the mean square."""
    momentum: float = 0.95
    """Muon's."""
    clip: float = 1.0
    """The largest norm of the whole gradient; 0 does not clip."""
    ema: float = 0.0
    """Keep a moving average of the weights with this decay (DDPM: 0.9999), lower in the first steps, and validate,
    sample and save with it; 0 keeps none."""
    spikes: SpikeSettings = SpikeSettings()
    """What is done where the loss spikes."""
    precision: Precision = "auto"
    """Of matrix products; auto: bfloat16 where the hardware has it, else float16 on a GPU and float32 on a CPU. Weights
    stay in float32."""
    compile: bool = False
    """Compile the objective and the model with torch.compile."""
    seed: int = 0
    """Of dropout; recipes use it for the weights and the order of the data too."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 250
    """Steps between validation losses; 0: only at the end."""
    sample_every: int = 0
    """Steps between samples; 0: only at the end."""
    save_every: int = 500
    """Steps between saved states; 0: only at the end."""
    keep: int = 2
    """Saved states that are kept; with 2 or more, a damaged one loses no more than the steps since the one before."""
    tensorboard: bool = False
    """Write TensorBoard events too."""
    wandb: bool = False
    """Log to Weights & Biases too."""

    def __post_init__(self) -> None:
        for name in CHOICES:
            check_choice(name, vars(self)[name])
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in LEAST.items():
            value = vars(self)[name]
            if value is not None and not value >= least:
                raise UserError(f"{name} must be at least {least}, and it is {value}.")
        shares = {
            "final_ratio": [self.final_ratio],
            "betas": self.betas,
            "momentum": [self.momentum],
            "ema": [self.ema],
        }
        for name, values in shares.items():
            if not all(0 <= value < 1 or (value == 1 and name == "final_ratio") for value in values):
                raise UserError(f"{name} must lie between 0 and 1, and it is {vars(self)[name]}.")
        if self.rate_shares and self.optimizer != "adamw":
            raise UserError(f"rate_shares are of adamw's rate, and the optimizer is {self.optimizer}: leave them out.")
        if self.warmup > self.steps:
            raise UserError(f"A warm-up of {self.warmup} steps does not fit a run of {self.steps}; make it shorter.")
        _ = self.growth  # what cannot be is said at once

    @cached_property
    def growth(self) -> BatchSizeSchedule:
        """How many rows each step has."""
        if self.batch_stages and self.batch_ramp:
            raise UserError("batch_stages and batch_ramp are two ways to make the batch grow: give one of them.")
        if self.batch_ramp:
            return linear_batch_size(*self.batch_ramp, self.batch_size)
        return batch_size_stages(self.batch_stages, self.batch_size)

    def whole_steps(self, step: int) -> float:
        """The steps before this one, each counted as the share of batch_size that its batch has."""
        return self.growth.before(step) / self.batch_size

    def counted(self, step: int) -> float | int:
        """The steps before this one, as the rate counts them."""
        return self.whole_steps(step) if self.rate_by == "rows" else step


def as_chosen(settings: Settings) -> Settings:
    """The settings with the precision and the compilation that the command line says, where it does."""
    said = {"precision": chosen().precision, "compile": chosen().compile}
    return replace(settings, **{name: value for name, value in said.items() if value is not None})


CHOICES = {
    "optimizer": get_args(Optimizer), "schedule": get_args(Schedule), "rate_by": get_args(RateBy),
    "precision": get_args(Precision),
}  # fmt: skip
LEAST = {
    **dict.fromkeys(("steps", "batch_size", "micro_batch", "log_every", "keep", "decay_steps"), 1),
    "minutes": 0.0,
    **dict.fromkeys(("evaluate_every", "sample_every", "save_every", "warmup", "hold", "seed"), 0),
    **dict.fromkeys(("learning_rate", "matrix_rate", "weight_decay", "epsilon", "clip"), 0.0),
}


def check_choice(setting: str, value: str) -> None:
    """A `UserError` with the nearest known value, where a setting has a few values and this is none of them."""
    if value not in CHOICES[setting]:
        raise unknown(setting, value, CHOICES[setting])


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested options as one level, `model.n_layers` for example, with tuples as the lists that JSON makes of them."""
    if isinstance(value, Mapping):
        inside = (flat(inner, f"{prefix}.{key}" if prefix else key) for key, inner in value.items())
        return {name: inner for part in inside for name, inner in part.items()}
    return {prefix: listed(value)}


def listed(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [listed(inner) for inner in value] if isinstance(value, tuple) else value


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two flat mappings, as `name 1 → 2`."""
    missing = "(unset)"
    pairs = {name: (then.get(name, missing), now.get(name, missing)) for name in {**then, **now}}
    return [f"{name} {a} → {b}" for name, (a, b) in pairs.items() if a != b]


def check_resumed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resumed run changes and may change; a `UserError` names everything that it may not change.

    Both are what `describe_settings` gives: `then` when the state was saved.
    """
    if then["data"] != now["data"]:
        raise UserError(
            f"The data are not those of the run that is resumed (fingerprint {then['data']} → {now['data']}); "
            "resume with the same data, or start a new run."
        )
    before = flat(asdict(Settings())) | then["settings"]  # what a run does not name, older than that setting, was off
    split = [
        {name: value for name, value in chosen.items() if name not in ADJUSTABLE} | flat(options)
        for chosen, options in ((before, then["options"]), (now["settings"], now["options"]))
    ]
    if changed := compare(*split):
        raise UserError(
            f"A resumed run keeps its settings, and these differ: {', '.join(changed)}; "
            f"put them back, or start a new run. What may change: {', '.join(sorted(ADJUSTABLE))}."
        )
    return compare(before, now["settings"])


def describe_settings(settings: Settings, options: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """What decides a run's result, as JSON can hold it."""
    return {"settings": flat(asdict(settings)), "options": flat(options), "data": fingerprint}
