"""Estimate of a run on given devices, without running it: the mesh, memory by part, seconds per step, days and energy.

Seconds per step = matrix multiplications at a share of the peak + elementwise operations at the memory's bandwidth +
communication within a machine + the communication between machines that computation does not hide. One set of constants
is used for all GPUs, and another one for CPUs. `benchmarks/plan.py` compares the estimates with published runs and with
this machine.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from keifu.errors import UserError, unknown
from keifu.training.hardware.flops import TFLOPS


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device: FLOP/s in 16 bits, bytes of memory, bytes/s of its memory (bandwidth), within a machine (link)
    and between machines (network), watts, and devices per machine (connected by the fast links).

    products: the share of `flops` that large matrix multiplications reach. attention: extra time of an attention
    operation, relative to one of a matrix multiplication. Bytes moved: elementwise: per token, layer and unit of width;
    logits: per token and vocabulary entry; update: per parameter and step.
    """

    flops: float | int
    memory: float | int
    bandwidth: float | int
    link: float | int
    network: float | int
    watts: float | int
    machine: int = 8
    products: float | int = 0.58
    attention: float | int = 0
    elementwise: float | int = 150
    logits: float | int = 0
    update: float | int = 0


def _kind(
    name: str, gigabytes: int, terabytes_a_second: float, link: int, network: float | int, watts: int
) -> DeviceKind:
    tflops = next(max(row[:2]) for pattern, row in TFLOPS.items() if re.search(pattern, name))
    return DeviceKind(tflops * 1e12, gigabytes * 1e9, terabytes_a_second * 1e12, link * 1e9, network * 1e9, watts)


# From data sheets: memory, its bandwidth, bandwidth of NVLink (or similar) in one direction, a device's share of the
# network of a usual machine with 8 devices, and power. An H100 reaches a smaller share of its peak than others, since
# its power is limited. TPUs: Jouppi et al., 2023 (v4) and Google's documentation (v5p).
HOPPER = 0.41  # fitted to torchtitan's runs of Llama 3.1
DEVICES = {
    "A100-40G": _kind("A100", 40, 1.555, 300, 25, 400),
    "A100-80G": _kind("A100", 80, 2.039, 300, 25, 400),
    "H100-80G": replace(_kind("H100", 80, 3.35, 450, 50, 700), products=HOPPER),
    "H200-141G": replace(_kind("H200", 141, 4.8, 450, 50, 700), products=HOPPER),
    "B200-180G": _kind("B200", 180, 8.0, 900, 50, 1000),
    "V100-32G": _kind("V100", 32, 0.9, 150, 12.5, 300),
    "RTX4090-24G": _kind("RTX 4090", 24, 1.008, 32, 3, 450),  # the link is PCIe 4
    "MI300X-192G": _kind("MI300X", 192, 5.3, 448, 50, 750),
    "TPU-v4": DeviceKind(275e12, 32e9, 1.2e12, 270e9, 100e9, 192, 64),
    "TPU-v5p": DeviceKind(459e12, 95e9, 2.765e12, 540e9, 150e9, 350, 64),
}
HERE = "this-CPU"
# Bytes per token, layer and unit of width stored for the backward pass (Korthikanti et al., 2022), by
# --activation-checkpointing. `selective` stores the results of matrix multiplications and the block's input.
ACTIVATIONS = {"none": 34, "selective": 22, "blocks": 2}
ADAPTIVE = {"none": 56, "selective": 38, "blocks": 2}  # blocks with adaptive norms, as measured on DiT
WITH_ADAPTERS = {"none": 57, "selective": 48, "blocks": 2}  # adapters on all linear layers, as measured
# computations of matrix multiplications and of elementwise operations, relative to a run without checkpointing
AGAIN = {"none": (1.0, 1.0), "selective": (1.0, 4 / 3), "blocks": (4 / 3, 4 / 3)}
LOGITS = 2**26, 2  # the most logits that the loss computes at a time, and bytes of each; gradients reuse their memory
LINKS = 0.7  # the share of a link's bandwidth that communication reaches
USED = 0.92  # the share of memory that a run may use; libraries and fragmentation take the rest
MOMENTS = {"float32": 8, "int8": 2}  # bytes per parameter of AdamW's two averages, by --optimizer-state
BITS_OF_INT4 = 4.5  # bits per number of a frozen matrix, with its share of the block's scale
POWER = 1.1  # power of a data centre relative to its devices'


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Transformer. width: all query heads together. kv_width: all heads of keys (or of values) together."""

    parameters: int
    layers: int
    dim: int
    width: int
    kv_width: int
    heads: int
    vocab: int
    context: int
    active: int | None = None  # parameters used per token; None: all
    splits: bool = True  # whether --mesh.tensor can split it
    kv_heads: int | None = None  # None: as many as heads
    hidden: int | None = None  # units of a feed-forward network
    activations: Mapping[str, int] = field(default_factory=ACTIVATIONS.copy)

    @property
    def attention(self) -> int:
        """FLOPs of attention per token, forward and backward (PaLM's appendix B)."""
        return 12 * self.layers * self.width * self.context

    def can_split(self, tensor: int) -> bool:
        """Return whether `keifu train` can split the model over `tensor` processes along --mesh.tensor."""
        kv_heads = self.kv_heads or self.heads
        heads = self.heads % tensor == 0 and (kv_heads % tensor == 0 or tensor % kv_heads == 0)
        return tensor == 1 or (self.splits and heads and (self.hidden or 0) % tensor == 0)

    @property
    def flops(self) -> int:
        """FLOPs per token, forward and backward, with attention."""
        return 6 * (self.active or self.parameters) + self.attention


class Trained(NamedTuple):
    """The trained parameters, by options of `keifu train`: all (rank 0), or LoRA adapters on all linear layers.

    base: number format of the frozen matrices. optimizer_state: number format of AdamW's averages.
    """

    rank: int = 0
    base: str = "float"
    optimizer_state: str = "float32"

    @property
    def splits(self) -> bool:
        """Whether `keifu train` can shard the optimizer state."""
        return self.optimizer_state == "float32"

    def parameters(self, model: Architecture) -> int:
        """Return the number of trained parameters."""
        if not self.rank:
            return model.parameters
        attention = 3 * model.dim + 2 * model.width + 2 * model.kv_width + model.dim
        feedforward = 3 * (model.dim + (model.hidden or 4 * model.dim))
        return self.rank * model.layers * (attention + feedforward)

    def flops(self, model: Architecture) -> int:
        """Return FLOPs per token, forward and backward. Frozen matrices need no weight gradients."""
        return model.flops - 2 * bool(self.rank) * (model.active or model.parameters)

    def weights(self, model: Architecture) -> float:
        """Return the bytes of the weights in the forward pass."""
        if self.base == "float":
            return 2.0 * model.parameters
        embeddings = min(2 * model.vocab * model.dim, model.parameters)
        return 2 * embeddings + BITS_OF_INT4 / 8 * (model.parameters - embeddings)


WHOLE = Trained()


class PodLayout(NamedTuple):
    """Distribution of a model over devices. checkpointing: which activations are recomputed. rows: micro-batch of each
    group of `tensor` devices.
    """

    pods: int
    shard: int
    tensor: int
    rows: int
    checkpointing: str


class Plan(NamedTuple):
    """A layout with its bytes per device and its seconds per step, both by part."""

    layout: PodLayout
    memory: dict[str, float]
    seconds: dict[str, float]
    tokens: float | int
    flops: float | int
    devices: int
    kind: DeviceKind

    @property
    def step(self) -> float:
        """Seconds per step."""
        return sum(self.seconds.values())

    @property
    def rate(self) -> float:
        """Tokens per second and device."""
        return self.tokens / self.step / self.devices

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation."""
        return self.rate * self.flops / self.kind.flops

    def hours(self, tokens: float | int) -> float:
        """Return the device hours of a number of tokens."""
        return tokens / self.rate / 3600


def parse_devices(text: str) -> tuple[int, DeviceKind]:
    """Parse `2048xA100-80G` as a number and a kind of device. Raises UserError for anything else."""
    number, _, name = text.partition("x")
    if text == f"1x{HERE}":
        return 1, this_machine()
    if not name or not re.fullmatch(r"0*[1-9][0-9]{0,5}", number):
        raise UserError(f"--devices is a number up to 999,999, x and a kind (2048xA100-80G), not {text[:60]!r}.")
    if name not in DEVICES:
        raise unknown("device", name, [*DEVICES, f"1x{HERE}"])
    return int(number), DEVICES[name]


@cache
def this_machine() -> DeviceKind:
    """Return this computer's CPU as a device. FLOP/s (in `keifu train`'s number format) and bytes/s are measured.

    The other figures were fitted to three models on an AMD EPYC (Zen 5) and on an Intel Xeon with AMX. They are larger
    than a GPU's, since PyTorch on a CPU does not fuse elementwise operations and computes them in 32 bits.
    """
    import torch

    from keifu.memory import available_memory
    from keifu.training.hardware import flops
    from keifu.training.hardware.precision import resolve_dtype

    cpu, numbers = torch.device("cpu"), torch.ones(2**26)
    copy = torch.empty_like(numbers)
    bandwidth = 2 * numbers.nbytes / min(flops.time_call(lambda: copy.copy_(numbers), cpu) for _ in range(100))
    # long enough to outlast a burst of other work
    peak = flops.matmul_peak(cpu, resolve_dtype("auto", cpu), seconds=2.0)
    return DeviceKind(peak, available_memory(cpu), bandwidth, bandwidth, bandwidth, 0, 1,
                      products=0.82, attention=2, elementwise=1000, logits=134, update=62)  # fmt: skip


def parse_amount(text: str, option: str) -> float:
    """Parse a number such as `1.4T`. Raises UserError, with the option's name, for anything else."""
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)([kMBT]?)", text)
    if not match or not float(match[1]):
        raise UserError(f"{option} is a number such as 300B or 1.4T, and not {text[:60]!r}.")
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]]


def plan(model: Architecture, devices: int, kind: DeviceKind, batch: float | int, trained: Trained = WHOLE) -> Plan:
    """Return the fastest layout that fits into memory, for steps of about `batch` tokens. Raises UserError if none
    fits.
    """
    layouts = _layouts(model, devices, kind, batch, trained)
    plans = [_planned(model, layout, devices, kind, batch, trained) for layout in layouts]
    fitting = [plan for plan in plans if sum(plan.memory.values()) <= USED * kind.memory]
    if not fitting:
        least = min((sum(plan.memory.values()) for plan in plans), default=math.inf)
        need = f"The training does not fit: it takes at least {least / 1e9:,.0f} GB on each device"
        raise UserError(f"{need}, which has {kind.memory / 1e9:.0f} GB; take more devices.")
    return min(fitting, key=lambda plan: (plan.step, -plan.layout.rows))


def _layouts(
    model: Architecture, devices: int, kind: DeviceKind, batch: float | int, trained: Trained
) -> Iterator[PodLayout]:
    """Yield every layout that `keifu train` can run, whose axes divide the number of devices, with at least one row per
    group of `tensor` devices."""
    for tensor, checkpointing in product((1, 2, 4, 8, 16), AGAIN):
        if tensor > kind.machine or devices % tensor or not model.can_split(tensor) or (tensor > 1 and trained.rank):
            continue
        groups = devices // tensor
        rows = max(1, round(batch / model.context / groups))
        for shard in (n for n in range(1, groups + 1) if groups % n == 0 and (tensor * n == 1 or trained.splits)):
            for part in {1, 2, 4, 8, rows} if rows > 1 else {1}:
                if part <= rows:
                    yield PodLayout(groups // shard, shard, tensor, part, checkpointing)


def _planned(
    model: Architecture, layout: PodLayout, devices: int, kind: DeviceKind, batch: float | int, trained: Trained = WHOLE
) -> Plan:
    """Return the plan of one layout: memory and seconds by part. Each communication uses the bandwidth of its own
    links.
    """
    rows = max(1, round(batch / model.context / (devices // layout.tensor)))  # rows of a group in a step
    tokens = rows * model.context / layout.tensor  # per device
    again, around = AGAIN[layout.checkpointing]
    width = model.layers * model.dim
    weights = 2 * model.parameters / layout.tensor  # bytes per device before sharding
    flops = trained.flops(model) + (again - 1) * model.flops + again * kind.attention * model.attention
    seconds = {
        "products": tokens * flops / (kind.flops * kind.products),
        "elementwise": around * tokens * (width * kind.elementwise + model.vocab * kind.logits) / kind.bandwidth,
        "update": trained.parameters(model) / layout.tensor / layout.shard * kind.update / kind.bandwidth,
    }
    passes = math.ceil(rows / layout.rows)
    moved = tokens * layout.tensor * width * 2 * (layout.tensor - 1) / layout.tensor
    seconds["tensor exchanges"] = (8 * again) * moved / (kind.link * LINKS)
    hidden = seconds["products"] + seconds["elementwise"]
    gathers = (3 if layout.shard > 1 else 0) * passes * weights * (1 - 1 / layout.shard)
    fast = layout.shard * layout.tensor <= kind.machine
    exchange = gathers / (LINKS * (kind.link if fast else kind.network))
    gradients = 2 * trained.parameters(model) / layout.tensor
    pods = 2 * gradients / layout.shard * (1 - 1 / layout.pods) * 2 / (LINKS * kind.network) if layout.pods > 1 else 0.0
    seconds["other exchanges"] = max(0.0, exchange - 0.8 * hidden) + 0.5 * pods
    return Plan(layout, _memory(model, layout, trained), seconds, rows * model.context * (devices // layout.tensor),
                trained.flops(model), devices, kind)  # fmt: skip


def _memory(model: Architecture, layout: PodLayout, trained: Trained = WHOLE) -> dict[str, float]:
    """Return the bytes on a device, by part. Adapters and their gradients are in 32 bits, other gradients in 16."""
    split = layout.tensor * layout.shard
    parameters = trained.parameters(model) / split
    tokens = layout.rows * model.context / layout.tensor
    bytes_of = WITH_ADAPTERS if trained.rank else model.activations
    bytes_per_value = bytes_of[layout.checkpointing] * model.layers
    layer = tokens * model.dim * bytes_of["none"] * (layout.checkpointing != "none")
    logits = min(tokens * model.vocab, LOGITS[0]) * LOGITS[1]
    gathered = 2 * 2 * model.parameters / layout.tensor / model.layers if layout.shard > 1 else 0.0
    return {
        "weights": trained.weights(model) / split,
        "gradients": (4 if trained.rank else 2) * parameters,
        "optimizer": (4 + MOMENTS[trained.optimizer_state]) * parameters,
        "activations": tokens * model.dim * bytes_per_value + layer + logits,
        "gathered layers": gathered,
    }


def inference(model: Architecture, devices: int, kind: DeviceKind, context: int) -> dict[str, Any]:
    """Return figures of 16-bit decoding with each matrix split over all devices: sequences that fit, cache bytes per
    sequence, tokens per second and device (`rate`), and tokens per second of one sequence (`alone`).
    """
    cache = 2 * 2 * model.layers * model.kv_width * context
    free = USED * devices * kind.memory - 2 * model.parameters
    batch = int(free // cache)
    if batch < 1:
        need = f"{2 * model.parameters / 1e9:,.0f} GB of weights and a cache of {cache / 1e9:.2f} GB"
        raise UserError(f"{need} do not fit into {devices} x {kind.memory / 1e9:.0f} GB; take more devices.")
    # caches are half full on average
    read_seconds = (2 * model.parameters + batch * cache / 2) / (devices * kind.bandwidth * 0.8)
    products = 2 * (model.active or model.parameters) * batch / (devices * kind.flops * kind.products)
    exchange = 2 * 2 * model.layers * batch * model.dim * 2 / (kind.link * LINKS) if devices > 1 else 0.0
    step = max(read_seconds, products) + exchange
    alone = 2 * model.parameters / (devices * kind.bandwidth * 0.8) + (4 * model.layers * 10e-6 if devices > 1 else 0)
    return {"sequences": batch, "cache_bytes": cache, "rate": batch / step / devices, "alone": 1 / alone}
