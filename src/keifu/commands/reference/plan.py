"""`keifu plan`: what training or running a published model would take on given devices, on paper."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from keifu.commands.shared import flags, tables
from keifu.errors import UserError, unknown
from keifu.models.sizes import Size, published_sizes
from keifu.ranges import Count, Natural

if TYPE_CHECKING:
    from keifu.training.hardware.plan import Architecture, Plan


@dataclass(frozen=True)
class Adapters:
    """Adapters on all linear layers."""

    rank: Natural = 0
    """Rank of each adapter; 0 trains the whole model."""
    base: Literal["float", "int4"] = "float"
    """Type of the frozen matrices. int4: 4.5 bits a number (QLoRA)."""


@dataclass(frozen=True)
class Options:
    """The mesh, memory by part, time, energy and days of a training, before money is spent; and what the devices
    would do when the model writes."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help="A published size (keifu models).")]
    devices: str = "8xH100-80G"
    """How many of which kind, such as 2048xA100-80G; 1xthis-CPU: this computer's processor, which is measured."""
    amount: Annotated[str | None, tyro.conf.arg(name="tokens", metavar="300B")] = None
    """Tokens to train on; unset: 20 a parameter (Hoffmann et al., 2022)."""
    step: Annotated[str, tyro.conf.arg(name="batch", metavar="4M")] = "4M"
    """Tokens in a step."""
    context_length: Count | None = None
    """Tokens in a row; unset: the model's, at most 8,192."""
    optimizer_state: Literal["float32", "int8"] = "float32"
    """Averages of AdamW, as in keifu train."""
    lora: Adapters = Adapters()
    """Low-rank adapters that are trained instead of the whole model, as in keifu train."""
    inference: bool = False
    """Plan how the devices write with the model, in place of its training."""


def run(options: Options) -> None:
    """Print the plan."""
    from keifu.training.hardware import plan

    sizes = {size.name: size for size in published_sizes()}
    if (name := options.model.lower()) not in sizes:
        raise unknown("published size", options.model, sizes)
    size = sizes[name]
    model = architecture(size, options.context_length)
    devices, kind = plan.parse_devices(options.devices)
    if options.inference:
        if options.lora != Adapters() or options.optimizer_state != "float32":
            raise UserError("--inference trains nothing: leave out --lora and --optimizer-state.")
        figures = plan.inference(model, devices, kind, model.context)
        rows = [
            ("sequences at a time", f"{figures['sequences']:,} of {model.context:,} tokens"),
            ("cache of each", f"{figures['cache_bytes'] / 1e9:,.2f} GB"),
            ("one sequence alone", f"{figures['alone']:,.0f} tokens/s"),
            ("all together", f"{figures['rate']:,.0f} tokens/s on each device"),
        ]
        tables.show((f"{size.name} writing on {options.devices}", ""), rows)
        return
    tokens = plan.parse_amount(options.amount, "--tokens") if options.amount else 20 * size.parameters
    if options.lora.base != "float" and not options.lora.rank:
        raise UserError("--lora.base is of adapters: set --lora.rank too, such as 16.")
    trained = plan.Trained(options.lora.rank, options.lora.base, options.optimizer_state)
    made = plan.plan(model, devices, kind, plan.parse_amount(options.step, "--batch"), trained)
    rows = _training(made, tokens)
    if trained.rank:
        rows.insert(0, ("trained", f"{trained.parameters(model):,} parameters of adapters"))
    tables.show((f"{size.name} on {options.devices}", ""), rows)


def _training(made: "Plan", tokens: float | int) -> list[tuple[str, str]]:
    layout, days = made.layout, made.hours(tokens) / 24 / made.devices
    mesh = f"--mesh.pods {layout.pods} --mesh.shard {layout.shard} --mesh.tensor {layout.tensor}"
    mesh += " --mesh.sync-each" * (layout.shard > 1)
    mesh += f" --activation-checkpointing {layout.checkpointing}" * (layout.checkpointing != "none")
    memory = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in made.memory.items())
    seconds = ", ".join(f"{name} {value:,.2f}" for name, value in made.seconds.items() if value >= 0.005)
    from keifu.training.hardware.plan import POWER

    energy = made.hours(tokens) * made.kind.watts * POWER / 1e6
    return [
        ("mesh", mesh),
        ("a device's memory", f"{sum(made.memory.values()) / 1e9:,.1f} GB of {made.kind.memory / 1e9:,.0f} ({memory})"),
        ("a step", f"{made.tokens:,.0f} tokens in {made.step:,.2f} s ({seconds})"),
        ("speed", f"{made.rate:,.0f} tokens/s on each device, {made.utilisation:.1%} of its peak (MFU)"),
        (
            "all",
            f"{tokens:.3g} tokens: {days:,.1f} days, {made.hours(tokens):,.0f} device hours"
            + f", {energy:,.3g} MWh" * (energy > 0),
        ),
        ("computation", f"{tokens * made.flops / 8.64e19:,.4g} PF-days"),
    ]


def architecture(size: Size, context_length: int | None = None) -> "Architecture":
    """Return the sizes that a plan needs of a published size; a model that is no decoder of tokens is a `UserError`."""
    from keifu.training.hardware.plan import Architecture

    config = vars(import_module(f"keifu.models.{size.model}").SIZES[size.name])
    needed = ("vocab_size", "context_length", "dim", "n_layers", "n_heads")
    if any(not isinstance(config.get(name), int) for name in needed):
        raise UserError(f"{size.name} is no Transformer of tokens alone, so no plan can be made: choose another.")
    head_dim = config.get("head_dim") or config["dim"] // config["n_heads"]
    heads, kv_heads = config["n_heads"], config.get("n_kv_heads") or config["n_heads"]
    context = context_length or min(config["context_length"], 8192)
    sizes = config["n_layers"], config["dim"], head_dim * heads, head_dim * kv_heads, heads, config["vocab_size"]
    splits = size.active is None, kv_heads, config.get("hidden_dim")
    return Architecture(size.parameters, *sizes, context, size.active, *splits)


parse = flags.parser(Options, run, "keifu plan")
