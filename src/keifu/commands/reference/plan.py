"""`keifu plan`: estimates the cost of training or running a published model on given devices."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from keifu.commands.shared import tables
from keifu.errors import UserError, unknown
from keifu.models.sizes import Size, published_sizes
from keifu.ranges import Count, Natural

if TYPE_CHECKING:
    from torch import nn

    from keifu.models.diffusion.dit import TransformerConfig
    from keifu.training.hardware.plan import Architecture, Plan

DIT_PICTURES, DIT_STEPS = 256, 400_000  # batch and steps of most runs of Peebles and Xie (section 4)


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters on all linear layers."""

    rank: Natural = 0
    """Rank of each adapter; 0 trains the whole model."""
    base: Literal["float", "int4"] = "float"
    """Type of the frozen matrices. int4: 4.5 bits a number (QLoRA)."""


@dataclass(frozen=True)
class Options:
    """Estimate the mesh, memory, time, energy and days of a training before it is started, or the speed of inference on
    the devices."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help="A published size (keifu models).")]
    devices: str = "8xH100-80G"
    """How many of which kind, such as 2048xA100-80G; 1xthis-CPU: this computer's processor, which is measured."""
    amount: Annotated[str | None, tyro.conf.arg(name="tokens", metavar="300B")] = None
    """Tokens, or patches of pictures, to train on; unset: 20 a parameter (Hoffmann et al., 2022), of DiT 26.2B."""
    step: Annotated[str | None, tyro.conf.arg(name="batch", metavar="4M")] = None
    """Tokens, or patches of pictures, in a step; unset: 4M, of DiT the patches of 256 pictures."""
    context_length: Count | None = None
    """Tokens in a row; unset: the model's, at most 8,192."""
    optimizer_state: Literal["float32", "int8"] = "float32"
    """Format of AdamW's averages, as in keifu train."""
    lora: Adapters = Adapters()
    """Low-rank adapters that are trained instead of the whole model, as in keifu train."""
    inference: bool = False
    """Plan how the devices write with the model, instead of its training."""


def run(options: Options) -> None:
    """Print the plan."""
    from keifu.training.hardware import plan

    sizes = {size.name: size for size in published_sizes()}
    if (name := options.model.lower()) not in sizes:
        raise unknown("published size", options.model, sizes)
    size = sizes[name]
    model = architecture(size, options.context_length)
    pictures = not model.vocab
    if pictures and (options.inference or options.lora != Adapters()):
        raise UserError(f"{size.name} draws pictures: a plan is of its whole training, without --inference and --lora.")
    if options.inference and size.model == "diffusion.llada":
        raise UserError(f"{size.name} writes by passes over the whole text, without a cache: leave out --inference.")
    if options.inference and size.model.startswith("speech."):
        raise UserError(
            f"{size.name} transcribes recordings, which no plan of inference counts: leave out --inference."
        )
    devices, kind = plan.parse_devices(options.devices)
    if options.inference:
        if options.amount or options.step or options.lora != Adapters() or options.optimizer_state != "float32":
            raise UserError("--inference trains nothing: leave out --tokens, --batch, --lora and --optimizer-state.")
        figures = plan.inference(model, devices, kind, model.context)
        rows = [
            ("sequences at a time", f"{figures['sequences']:,} of {model.context:,} tokens"),
            ("cache of each", f"{figures['cache_bytes'] / 1e9:,.2f} GB"),
            ("one sequence alone", f"{figures['alone']:,.0f} tokens/s"),
            ("all together", f"{figures['rate']:,.0f} tokens/s on each device"),
        ]
        tables.show((f"{size.name} writing on {options.devices}", ""), rows)
        return
    default_amount = DIT_STEPS * DIT_PICTURES * model.context if pictures else 20 * size.parameters
    tokens = plan.parse_amount(options.amount, "--tokens") if options.amount else default_amount
    default_batch = DIT_PICTURES * model.context if pictures else 4e6
    batch = plan.parse_amount(options.step, "--batch") if options.step else float(default_batch)
    if options.lora.base != "float" and not options.lora.rank:
        raise UserError("--lora.base needs adapters: set --lora.rank too, such as 16.")
    trained = plan.Trained(options.lora.rank, options.lora.base, options.optimizer_state)
    training_plan = plan.plan(model, devices, kind, batch, trained)
    rows = [("trained", f"{trained.parameters(model):,} parameters of adapters")] if trained.rank else []
    rows += _training(training_plan, tokens, "patches" if pictures else "tokens")
    tables.show((f"{size.name} on {options.devices}", ""), rows)


def _training(training_plan: "Plan", tokens: float | int, unit: str) -> list[tuple[str, str]]:
    layout, days = training_plan.layout, training_plan.hours(tokens) / 24 / training_plan.devices
    mesh = f"--mesh.pods {layout.pods} --mesh.shard {layout.shard} --mesh.tensor {layout.tensor}"
    mesh += " --mesh.sync-each" * (layout.shard > 1) + " --mesh.gradient-sum overlapped" * (layout.pods > 1)
    mesh += f" --activation-checkpointing {layout.checkpointing}" * (layout.checkpointing != "none")
    memory = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in training_plan.memory.items())
    seconds = ", ".join(f"{name} {value:,.2f}" for name, value in training_plan.seconds.items() if value >= 0.005)
    from keifu.training.hardware.plan import POWER

    energy = training_plan.hours(tokens) * training_plan.kind.watts * POWER / 1e6
    return [
        ("mesh", mesh),
        (
            "a device's memory",
            f"{sum(training_plan.memory.values()) / 1e9:,.1f} GB of {training_plan.kind.memory / 1e9:,.0f} ({memory})",
        ),
        ("a step", f"{training_plan.tokens:,.0f} {unit} in {training_plan.step:,.2f} s ({seconds})"),
        (
            "speed",
            f"{training_plan.rate:,.0f} {unit}/s on each device, {training_plan.utilisation:.1%} of its peak (MFU)",
        ),
        (
            "all",
            f"{tokens:.3g} {unit}: {days:,.1f} days, {training_plan.hours(tokens):,.0f} device hours"
            + f", {energy:,.3g} MWh" * (energy > 0),
        ),
        ("computation", f"{tokens * training_plan.flops / 8.64e19:,.4g} PF-days"),
    ]


def architecture(size: Size, context_length: int | None = None) -> "Architecture":
    """Return the sizes that a plan needs. Raises `UserError` for a model that is not a Transformer of tokens or
    patches."""
    from keifu.training.hardware.plan import Architecture

    published = import_module(f"keifu.models.{size.model}").SIZES[size.name]
    if size.model == "diffusion.dit":
        return _of_patches(published.transformer, context_length)
    config = vars(published)
    size_names = ("vocab_size", "context_length", "dim", "n_layers", "n_heads")
    if any(not isinstance(config.get(name), int) for name in size_names):
        raise UserError(f"{size.name} is no Transformer of tokens alone: plans are of such models and of DiT.")
    head_dim = config.get("head_dim") or config["dim"] // config["n_heads"]
    heads, kv_heads = config["n_heads"], config.get("n_kv_heads") or config["n_heads"]
    context = context_length or min(config["context_length"], 8192)
    sizes = config["n_layers"], config["dim"], head_dim * heads, head_dim * kv_heads, heads, config["vocab_size"]
    splits = size.active is None, kv_heads, config.get("hidden_dim")
    return Architecture(size.parameters, *sizes, context, size.active, *splits)


def _of_patches(config: "TransformerConfig", context_length: int | None) -> "Architecture":
    """Return the sizes of a diffusion Transformer, whose tokens are patches. Its autoencoder is not counted, because
    latents are made once before training. The condition's matrices compute once for each picture."""
    from keifu.layers.meta import on_meta
    from keifu.models.diffusion.dit import DiffusionTransformer
    from keifu.training.hardware.plan import ADAPTIVE, Architecture

    if context_length:
        raise UserError("The patches of a diffusion Transformer follow from its size: leave out --context-length.")
    with on_meta():
        model = DiffusionTransformer(config)
    patches = (config.size // config.patch_size) ** 2
    conditions = _count(*model.conditions)
    labels = _count(*(condition.get_submodule("label") for condition in model.conditions))  # embeddings, no matrices
    blocks = [block.get_submodule("modulation") for block in model.blocks]
    once = conditions - labels + _count(model.modulation, *blocks)
    active = _count(model) - labels - once + once // patches
    heads, width = config.n_heads, config.n_heads * config.head_dim
    sizes = config.n_layers, config.dim, width, width, heads, 0, patches
    return Architecture(_count(model), *sizes, active, False, activations=ADAPTIVE)


def _count(*parts: "nn.Module") -> int:
    return sum(parameter.numel() for part in parts for parameter in part.parameters())
