"""The settings of a training run: checked before it starts, and compared when it is resumed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from keifu.data.epochs import BatchSizeSchedule, batch_size_stages, linear_batch_size
from keifu.devices import device_choice
from keifu.errors import UserError
from keifu.ranges import BelowOne, Count, Natural, NotNegative, Positive, PositiveShare, Seed, Share, check
from keifu.training.optim.loss_spikes import SpikeSettings

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Recompute = Literal["none", "blocks", "selective"]

# Settings that may change when a run is resumed: its length, intervals and the splitting of a batch. They do not change
# the computation of a step.
ADJUSTABLE = frozenset(
    ["steps", "minutes", "micro_batch", "compile", "log_every", "evaluate_every", "evaluate_share", "sample_every"]
    + ["save_every", "keep", "keep_best", "tensorboard", "wandb", "activation_checkpointing"]
)


@dataclass(frozen=True)
class Settings:
    """Settings of the training of any model."""

    steps: Count = 1000
    """Updates of the weights."""
    minutes: Positive | None = None
    """Time limit of the run, including validation, samples and saving. `steps` is then a first estimate: the number of
    steps and the learning rate schedule are adjusted to the speed of the machine."""
    batch_size: Count = 32
    """Rows per step."""
    batch_stages: tuple[tuple[Count, Count], ...] = ()
    """Batch-size warm-up in stages, as pairs: rows per step, and the last step of this stage (PaLM: 512 50000 1024
    115000)."""
    batch_ramp: tuple[Count, Count] | None = None
    """Linear batch-size warm-up (GPT-3): the rows of the first step, and the number of rows after which the batch has
    its full size."""
    micro_batch: Count | None = None
    """Rows computed at a time. Fewer rows need less memory and change neither the loss nor dropout. Unset: as many as
    fit in memory. If rows differ in length, more of the shorter ones are computed together."""
    optimizer: Literal["adamw", "muon", "adadelta", "adafactor"] = "adamw"
    """muon: Muon for hidden matrices, AdamW for everything else. adadelta: Zeiler's (2012), ρ 0.95, ε 1e-6.
    adafactor: PaLM's (2022), without factoring, updates scaled by the size of each matrix."""
    learning_rate: NotNegative = 3e-4
    """The highest learning rate, of AdamW, Adadelta (1 in its paper), or Adafactor (relative to each matrix's size)."""
    matrix_rate: NotNegative = 0.02
    """The highest learning rate of Muon."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"
    """How the learning rate decays after the warm-up."""
    warmup: Natural = 0
    """Steps in which the learning rate rises linearly from 0."""
    hold: Natural = 0
    """Steps after the warm-up at the highest rate (PaLM: 10,000, then inverse_sqrt)."""
    final_ratio: Share = 0.1
    """The last learning rate as a share of the highest one (linear and cosine)."""
    decay_steps: Count | None = None
    """Step at which a linear or cosine decay ends; the rate is constant after it. Unset: the last step."""
    rate_shares: tuple[tuple[str, NotNegative], ...] = ()
    """AdamW's rate for some weights, as pairs: a prefix of their names, and a share of the learning rate."""
    rate_by: Literal["steps", "rows"] = "steps"
    """Unit that the schedule counts. rows: a step with a smaller batch counts as its share of batch_size, so that the
    rate follows the number of tokens seen during batch-size warm-up."""
    weight_decay: NotNegative = 0.1
    """Weight decay of matrices and embeddings, multiplied by the learning rate, or for adafactor by its square (1 in
    PaLM). Biases and gains have none."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """AdamW's β₁ and β₂, the decays of the mean and of the mean square of the gradient; β₁ is Adafactor's too."""
    epsilon: NotNegative = 1e-8
    """AdamW's ε, added to the root of the mean square."""
    momentum: BelowOne = 0.95
    """Muon's momentum."""
    clip: NotNegative = 1.0
    """Gradient clipping: the largest norm of the whole gradient; 0 does not clip."""
    ema: BelowOne = 0.0
    """Decay of an exponential moving average of the weights (DDPM: 0.9999), lower in the first steps. The average is
    used for validation, samples and the saved model; 0 keeps none."""
    spikes: SpikeSettings = SpikeSettings()
    """Recovery from loss spikes."""
    precision: Precision = "auto"
    """Number format of matrix multiplications. auto: bfloat16 if the hardware supports it, else float16 on a GPU and
    float32 on a CPU. Weights stay in float32. float32 forbids NVIDIA's TF32, which the others allow for multiplications
    in float32.
    """
    compile: bool = False
    """Compile the objective and the model with torch.compile."""
    activation_checkpointing: Recompute = "none"
    """Activations that the backward pass computes again, which changes no bit on a CPU. blocks: all but the inputs of
    blocks, a third more computation. selective: all but the results of matrix multiplications."""
    optimizer_state: Literal["float32", "int8"] = "float32"
    """Format of AdamW's two averages. int8: 8 bits, with a scale for 256 numbers; not if a mesh splits the model."""
    deterministic: bool = False
    """Whether a GPU uses only deterministic kernels, which may be slower. A CPU always does."""
    seed: Seed = 0
    """Seed of dropout; recipes use it for the initial weights and the order of the data too."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Natural = 250
    """Steps between validations; 0: only at the start and at the end."""
    evaluate_share: PositiveShare = 0.1
    """Largest share of all computation for validations: they come less often than `evaluate_every` if necessary. 1: no
    limit."""
    sample_every: Natural = 0
    """Steps between samples; 0: only at the start and at the end."""
    save_every: Natural = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2
    """Checkpoints that are kept; with 2 or more, a run can go on from the one before if the last is damaged."""
    keep_best: bool = False
    """Whether the finished model has the weights of the lowest validation loss instead of the last ones."""
    tensorboard: bool = False
    """Write TensorBoard events too."""
    wandb: bool = False
    """Log to Weights & Biases too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check(self)
        if self.rate_shares and self.optimizer != "adamw":
            raise UserError(f"rate_shares are of adamw's rate, and the optimizer is {self.optimizer}: leave them out.")
        if self.optimizer_state == "int8" and self.optimizer not in ("adamw", "muon"):
            raise UserError(f"optimizer_state int8 is of AdamW, and the optimizer is {self.optimizer}: leave it out.")
        if self.warmup > self.steps:
            raise UserError(f"A warm-up of {self.warmup} steps does not fit a run of {self.steps}: lower warmup.")
        _ = self.growth  # raises errors about the batch size now

    @cached_property
    def growth(self) -> BatchSizeSchedule:
        """The batch size of each step."""
        if self.batch_stages and self.batch_ramp:
            raise UserError("batch_stages and batch_ramp are two ways to make the batch grow: give one of them.")
        if self.batch_ramp:
            return linear_batch_size(*self.batch_ramp, self.batch_size)
        return batch_size_stages(self.batch_stages, self.batch_size)

    def whole_steps(self, step: int) -> float:
        """Return the number of steps before this one, where a smaller batch counts as its share of batch_size."""
        return self.growth.before(step) / self.batch_size

    def counted(self, step: int) -> float | int:
        """Return the number of steps before this one, as the learning rate schedule counts them (see `rate_by`)."""
        return self.whole_steps(step) if self.rate_by == "rows" else step


COMPUTING = "precision", "compile", "activation_checkpointing", "optimizer_state", "deterministic"


def as_chosen(settings: Settings) -> Settings:
    """Return the settings with the command line's general computing options, such as --precision, if these are set."""
    options = {name: vars(device_choice())[name] for name in COMPUTING}
    return replace(settings, **{name: value for name, value in options.items() if value is not None})


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested options as one level (`model.n_layers`), with tuples as lists, as in JSON."""
    if isinstance(value, Mapping):
        inside = (flat(inner, f"{prefix}.{key}" if prefix else key) for key, inner in value.items())
        return {name: inner for part in inside for name, inner in part.items()}
    return {prefix: _listed(value)}


def _listed(value: Any) -> Any:
    """Convert tuples to lists, as JSON does."""
    return [_listed(inner) for inner in value] if isinstance(value, tuple) else value


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two flat mappings, as `name 1 → 2`."""
    unset = "(unset)"
    pairs = {name: (then.get(name, unset), now.get(name, unset)) for name in {**then, **now}}
    return [f"{name} {a} → {b}" for name, (a, b) in pairs.items() if a != b]


def check_resumed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the allowed changes of a resumed run. Raises UserError with all changes that are not allowed.

    then, now: results of `describe_settings`, when the state was saved and now.
    """
    if then["data"] != now["data"]:
        hashes = f"The data are not those of the run that is resumed (fingerprint {then['data']} → {now['data']})"
        raise UserError(f"{hashes}; resume with the same data, or start a new run.")
    # a run of an older version did not use a setting that it lacks
    before = flat(asdict(Settings())) | then["settings"]
    split = [
        {name: value for name, value in settings.items() if name not in ADJUSTABLE}
        # the data's path does not matter
        | {name: value for name, value in flat(options).items() if name.split(".")[-1] != "data"}
        for settings, options in ((before, then["options"]), (now["settings"], now["options"]))
    ]
    if (new := sorted(split[1].keys() - split[0].keys())) and len(new) == len(compare(*split)):
        lacking = f"The run was started without {', '.join(new)}, or by an older version that lacks this setting"
        raise UserError(f"{lacking}: resume it with its first settings, or start a new run.")
    if changed := compare(*split):
        ways = f"put them back, or start a new run. What may change: {', '.join(sorted(ADJUSTABLE))}"
        raise UserError(f"A resumed run keeps its settings, and these differ: {', '.join(changed)}; {ways}.")
    return compare(before, now["settings"])


def describe_settings(settings: Settings, options: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """Return the settings, options and data that determine a run's result, as JSON."""
    return {"settings": flat(asdict(settings)), "options": flat(options), "data": fingerprint}
