"""Small models of every kind, trained by several processes at once.

`start` has them train each case of a list, and returns the losses and a hash of the weights.
"""

import gc
import hashlib
import json
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from language_models import every_model  # noqa: F401 (a case names it)
from state_toys import states  # noqa: F401 (the same)
from torch import nn
from torch.distributed import PrefixStore, destroy_process_group, distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from untimed import forward_only

from keifu.checkpoints.hf import read as hf_read
from keifu.checkpoints.hf.write import save
from keifu.checkpoints.loading import load_model
from keifu.checkpoints.lora.peft import save_adapter
from keifu.data.chat.packing import TurnMasks
from keifu.data.chat.preferences import Pair
from keifu.distributed import group as groups
from keifu.distributed.group import Group, join
from keifu.distributed.mesh import Mesh
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.lazy import build_lazily
from keifu.layers.lora import adapters
from keifu.layers.losses.log_probabilities import token_log_probabilities
from keifu.models import gpt2, llama, palm, transformer
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.diffusion import ddpm, dit
from keifu.processes import Processes, current, local, use
from keifu.recipes.assistant import dpo
from keifu.recipes.assistant.finetuning import Lora, to_train
from keifu.recipes.classification import classifier
from keifu.recipes.language import bert as bert_recipe, gpt as gpt_recipe
from keifu.recipes.translation import translator_runs as translations
from keifu.training.hardware import cost
from keifu.training.loop import train
from keifu.training.objectives.contrastive import contrastive_loss
from keifu.training.objectives.diffusion import DiffusionLoss, draw_noise
from keifu.training.objectives.language_modeling import causal_language_modeling, translation
from keifu.training.protocols import Batch, LossOutput, Run
from keifu.training.run import checkpoint, report
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

WORDS = {"vocab_size": 31, "context_length": 16, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
TEXT = clip_text.Config(31, 8, 32, 48, 1, 4, end_id=30, embedding_dim=16)
TRANSFORMER = dit.Config(
    dit.TransformerConfig(8, 2, 1, None, n_heads=2, head_dim=8, n_layers=2, n_classes=0, dropout=0.1), None,
    noise=Noise("flow", target="flow"),
)  # fmt: skip
UNET = ddpm.Config(size=8, channels=1, dim=16, n_residual_blocks=1, multipliers=(1, 2), norm_groups=4, dropout=0.1)


def tokens(step: int, rows: int) -> Batch:
    return {"tokens": _counting(step, rows, 14)}


def pairs(step: int, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ends = torch.full((rows, 1), 30)
    pictures = torch.randint(0, 256, (rows, 3, 12, 12), generator=generator).byte()
    return {"pictures": pictures, "tokens": torch.cat([_counting(step, rows, 6), ends], 1)}


def pictures(step: int, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return {"pictures": torch.randint(0, 256, (rows, 1, 8, 8), generator=generator).byte(),
            "draws": draw_noise(0, step, rows)}  # fmt: skip


def sentences(step: int, rows: int) -> Batch:
    source, target = _counting(step, rows, 9), _counting(step + 1, rows, 11)
    return {"source": source, "target": target, "source_mask": torch.arange(9) < 7 + torch.arange(rows)[:, None] % 3,
            "target_mask": torch.arange(11) < 8 + torch.arange(rows)[:, None] % 4}  # fmt: skip


def _counting(step: int, rows: int, length: int) -> torch.Tensor:
    """Return numbers that count up by 1 to 3 from a random start, below 30."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(n, (rows, 1), generator=generator) for n in (30, 3))
    return (start + (1 + stride) * torch.arange(length)) % 30


def scores(model: Any, batch: Batch) -> LossOutput:
    """Return the log-probabilities of alignment, whose function reads the whole weight matrix of a head."""
    hidden, targets = model.hidden(batch["tokens"][:, :-1]), batch["tokens"][:, 1:].flatten()
    found, entropy = token_log_probabilities(hidden.flatten(0, 1), model.head_weight, targets)
    logits = model.logits(hidden.detach()).mean()
    return LossOutput(-found.sum(), len(targets), {"entropy": entropy.sum(), "logit": logits.detach() * len(targets)})


def adapted(name: str, dropout: float) -> nn.Module:
    """Return a model with adapters on every linear layer. Only they are trained, and none of them starts at zero."""
    module: Any = {"gpt2": gpt2, "llama": llama, "palm": palm}[name]
    more = {"llama": {"n_kv_heads": 2}, "palm": {"n_heads": 6, "head_dim": 6}, "gpt2": {}}[name]
    model = to_train(module.build(module.Config(**WORDS | more)), Lora(3, dropout=dropout), 0)
    for adapter in adapters(model):
        nn.init.normal_(adapter.b, std=0.1)
    return model


KINDS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[int, int], Batch]]] = {
    "gpt2": (lambda: gpt2.build(gpt2.Config(**WORDS)), causal_language_modeling, tokens),
    "llama": (lambda: llama.build(llama.Config(**WORDS, n_kv_heads=2)), causal_language_modeling, tokens),
    "palm": (
        lambda: palm.build(palm.Config(**WORDS, head_dim=6, dropout=0.1)),
        partial(causal_language_modeling, z_loss=0.1), tokens,
    ),
    "scores": (lambda: llama.build(llama.Config(**WORDS, n_kv_heads=2)), scores, tokens),
    **{f"{name}-lora": (partial(adapted, name, dropout), causal_language_modeling, tokens)
       for name, dropout in (("gpt2", 0.0), ("llama", 0.2), ("palm", 0.2))},  # palm's heads by 2 and 3, keys on all
    "translation": (
        lambda: transformer.build(transformer.Config(**WORDS)), partial(translation, label_smoothing=0.1), sentences,
    ),
    "ddpm": (lambda: ddpm.build(UNET), DiffusionLoss(Noise()), pictures),
    "dit": (lambda: dit.build(TRANSFORMER), DiffusionLoss(TRANSFORMER.noise, sampling="logit_normal"), pictures),
    "clip": (
        lambda: clip.build(clip.Config(TEXT, clip_image.Config(12, 4, 3, 32, 48, 1, 4, embedding_dim=16))),
        contrastive_loss(lambda pixels: pixels / 127.5 - 1), pairs,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ToyData:
    """Batches of a kind, and for validation one more, and one of a single row."""

    kind: str
    rows: int
    fingerprint: str = "toys"

    def batch(self, step: int) -> Batch:
        return KINDS[self.kind][2](step, self.rows)

    def validation(self) -> Iterable[Batch]:
        return [self.batch(10**6), KINDS[self.kind][2](10**6 + 1, 1)]


def learn(
    kind: str, folder: Path, steps: int = 50, rows: int = 6, stop: int = 0, shard_bytes: int = 0, **changed: Any
) -> dict[str, Any]:
    """Train a run, or resume the one in the folder. Return its losses and figures, and the hash of its final weights.

    stop: the step after which the run is cut off and resumed. shard_bytes: of the files that the model is written in.
    """
    torch.set_num_threads(1)
    for end in [stop, steps] if stop else [steps]:
        torch.manual_seed(0)
        build, objective, _ = KINDS[kind]
        model = build().train()
        standard = {"learning_rate": 1e-3, "batch_size": rows, "micro_batch": rows, "precision": "float32"}
        often = {"log_every": 1, "evaluate_every": 25, "save_every": 10, "warmup": 2 if steps < 8 else 5}
        settings = Settings(**{**standard, **often, "steps": end, "schedule": "constant", **changed})
        write = partial(save, model, None, max_shard_bytes=shard_bytes) if shard_bytes else None
        if kind.endswith("-lora"):
            write = partial(save_adapter, model, base="toy")
        run = Run(folder, resume=bool(checkpoint.steps(folder)))
        train(model, objective, ToyData(kind, rows), settings, run, save=write)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in _whole(model)))
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "validation": [line["validation_loss"] for line in lines if "validation_loss" in line],
        "norms": [line["gradient_norm"] for line in lines if "gradient_norm" in line],
        "figures": lines[-1],
        "rows": {name: len(p) for (name, _), p in zip(model.named_parameters(), _whole(model), strict=True) if p.dim()},
        "weights": digest.hexdigest(),
    }


def _whole(model: nn.Module) -> list[Any]:
    """Return the parameters, or this process's part of each if the model is split."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]


class Exchanges(TorchDispatchMode):
    """Counts the exchanges between processes in its block, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("c10d::")] += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def exchanges(kind: str, folder: Path, rows: int = 8, micro_batch: int = 8) -> dict[str, Any]:
    """Count how many exchanges of each kind the gradient of a batch takes; its norm and loss; the same after a gradient
    that was given up behind its first micro-batch."""
    torch.manual_seed(0)
    build, objective, make = KINDS[kind]
    trainer = Trainer(
        build().train(), objective, Settings(batch_size=rows, micro_batch=micro_batch, precision="float32")
    )
    found = {}
    for name in ("warm", "counted", "again"):
        with Exchanges() as exchanged:
            gradient = trainer.gradient(0, make(0, rows))
        assert gradient
        found[name] = {"loss": gradient.sums.means()["loss"], "norm": float(gradient.norm)}
        found[name] |= {key: count for key, count in exchanged.counts.items() if count}
        trainer.drop_gradients()
        if name == "counted" and micro_batch < rows:
            parts = trainer._micro_batches(make(1, rows))
            with trainer.processes.backward(trainer.module, last=False):
                next(trainer._losses(parts, trainer.processes, 0)).total.backward()
            trainer.drop_gradients()
    return found


class CountedFile:
    """A file of weights that counts the bytes that are read of it."""

    read = 0

    def __init__(self, file: Any):
        self.file, self.keys = file, file.keys

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.count(self.file.get_tensor(name))

    def get_slice(self, name: str) -> "CountedSlice":
        return CountedSlice(self, self.file.get_slice(name))

    @staticmethod
    def count(tensor: torch.Tensor) -> torch.Tensor:
        CountedFile.read += tensor.nbytes
        return tensor


class CountedSlice:
    """A tensor of such a file."""

    def __init__(self, file: CountedFile, piece: Any):
        self.file, self.piece, self.get_shape, self.get_dtype = file, piece, piece.get_shape, piece.get_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.file.count(self.piece[index])


class HighWater:
    """The most bytes that this process has had in the block, beyond those before, as the kernel counts them."""

    def __enter__(self) -> "HighWater":
        Path("/proc/self/clear_refs").write_text("5")  # counts from here on
        self.before = status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.grown = status("VmHWM") - self.before


def status(name: str) -> int:
    """Return a size of this process in bytes, by the kernel's name for it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class PeakMemory:
    """The most bytes of its own that this process was seen with in the block, beyond those before: a lower bound."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.most = status("RssAnon")
        self.ends, self.thread = threading.Event(), threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.thread.join()

    @property
    def grown(self) -> int:
        return self.most - self.before

    def _watch(self) -> None:
        while not self.ends.wait(0.001):
            self.most = max(self.most, status("RssAnon"))


def peak(folder: Path) -> dict[str, Any]:
    """Return loss, gradient norm and memory of a step of a model whose activations are larger than its weights."""
    torch.manual_seed(0)
    model = llama.build(llama.Config(64, 128, 128, 512, 8, 4)).train()
    trainer = Trainer(model, causal_language_modeling, Settings(batch_size=8, micro_batch=8, precision="float32"))
    batch = {"tokens": torch.randint(64, (8, 129))}
    with HighWater() as memory:
        gradient = trainer.gradient(0, batch)
    assert gradient
    return {"grown": memory.grown, "loss": gradient.sums.means()["loss"], "norm": float(gradient.norm)}


def saved(folder: Path) -> dict[str, int]:
    """Return the bytes that autograd keeps of whole weights after a forward pass in bfloat16, and those of a shard."""
    model = llama.build(llama.Config(64, 32, 128, 512, 4, 4)).train()
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    total = sum(p.numel() for p in model.parameters())
    settings = Settings(batch_size=2, micro_batch=2, precision="bfloat16")
    trainer = Trainer(model, causal_language_modeling, settings)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = trainer.forward({"tokens": torch.randint(64, (2, 9))}).total
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept if tuple(x.shape) in shapes}
    loss.backward()
    return {"kept": sum(storages.values()), "shard": 2 * total // 2}


ANSWERS = [TurnMasks([*range(1, length)], [False, *[True] * (length - 2)]) for length in (5, 9, 7, 6, 12, 8)]
PAIRS = [Pair(*ANSWERS[place : place + 2]) for place in range(5)]


def _begin(model: str, recipe: str) -> Any:
    """Return the model with which a recipe begins its training."""
    if recipe == "bert":
        return bert_recipe.first_model(bert_recipe.Recipe(start_from=model))[0]
    if recipe == "gpt":
        return gpt_recipe.start_model(model)[0]
    if recipe == "dpo":
        return to_train(load_model(model), Lora(), 0)
    if recipe == "classifier":
        return classifier.start_model(classifier.Recipe(model=model), ("no", "yes"), ())[0]
    return translations.start_model(model, transformer.build, transformer.Config(**WORDS))


def published(model: str, folder: Path, lora: int = 0, recipe: str = "") -> dict[str, Any]:
    """Load a published model as a recipe does, and split it. Return the largest number of bytes that a process read and
    needed, as a share of the model's bytes, and whether each process has the right weights."""
    hf_read.open_weights, opened = (lambda path: CountedFile(opened(path))), hf_read.open_weights
    CountedFile.read = 0
    with PeakMemory() as memory:
        found: Any = _begin(model, recipe) if recipe else to_train(load_model(model), Lora(lora), 0)
        first = dpo.with_reference(found, PAIRS, 2, 0) if recipe == "dpo" else torch.zeros(0)
        Trainer(found, causal_language_modeling, Settings(precision="float32"))
    hf_read.open_weights = opened
    read, group = CountedFile.read, current()
    with use(Processes()):
        alone = load_model(model)
        whole = dict(alone.named_parameters())
        expected = dpo.with_reference(alone, PAIRS, 2, 0) if recipe == "dpo" else torch.zeros(0)
    torch.testing.assert_close(first, expected)
    names = {name: name.replace(".base.", ".") for name, _ in found.named_parameters() if ".adapters." not in name}
    same = [torch.equal(local(p), group.pod.take(name, whole[names[name]].to(p.dtype)))
            for name, p in found.named_parameters() if name in names]  # fmt: skip
    total = sum(p.nbytes for p in whole.values())
    each = group.gather(json.dumps([read, memory.grown, all(same) and len(same) == len(whole)]))
    reads, grown, right = zip(*map(json.loads, each), strict=True)
    return {"read": max(reads) / total, "grown": max(grown) / total, "right": all(right)}


def drawn(folder: Path) -> dict[str, Any]:
    """Build a model from nothing, split. Return the most memory that a process needed, as a share of the model's bytes,
    and whether each process has its part of the weights that one process would draw."""
    build = partial(llama.build, llama.Config(2000, 64, 512, 1024, 4, 8, n_kv_heads=4))  # 46 MB
    torch.manual_seed(0)
    with PeakMemory() as memory:
        model = build_lazily(build, torch.device("cpu"))
        Trainer(model, causal_language_modeling, Settings(precision="float32"))
    after, group = torch.rand(1), current()
    torch.manual_seed(0)
    whole = dict(build().named_parameters())
    same = [torch.equal(local(p), group.pod.take(name, whole[name])) for name, p in model.named_parameters()]
    right = all(same) and len(same) == len(whole) and torch.equal(after, torch.rand(1))
    grown, rights = zip(*map(json.loads, group.gather(json.dumps([memory.grown, right]))), strict=True)
    return {"grown": max(grown) / sum(p.nbytes for p in whole.values()), "right": all(rights)}


@cache
def forks() -> BaseContext:
    """Return a context whose processes begin as copies of one that has imported this file, which takes 3 seconds."""
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload([__name__])
    return context


def start(folder: Path, cases: list[dict[str, Any]], world: int) -> dict[str, Any]:
    """Run the cases on this number of processes, and return the results of the first process by name."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "KEIFU_DEVICE": "cpu"}
    ranks = [forks().Process(target=work, args=(folder, cases, {**group, "RANK": str(rank)})) for rank in range(world)]
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}):
        for rank in ranks:
            rank.start()
    for rank in ranks:
        rank.join(1800)
    assert [rank.exitcode for rank in ranks] == [0] * world
    return json.loads((folder / "found.json").read_text())


def leave(groups: set[Any]) -> None:
    """End the groups of a case, each of which has threads that wake a hundred times a second."""
    for group in groups:
        destroy_process_group(group)
    gc.collect()


def work(folder: Path, cases: list[dict[str, Any]], environment: dict[str, str]) -> None:
    """Train every case as one of several processes, which the environment describes."""
    os.environ.update(environment)
    gc.freeze()  # what was imported is no garbage, and takes long to look at
    found, groups.BUCKET = {}, 2**12  # several buckets of a small model
    report.draw_curves = lambda *_: "></svg>"  # which takes longer than the steps of a run
    cost._timed = forward_only
    with join(Mesh()) as first:
        joined = {*distributed_c10d._world.pg_map}
        for case in cases:
            name, mesh = case.pop("name"), Mesh(**case.pop("mesh", {}))
            store = PrefixStore(name, first.store)
            with use(Group(mesh, store, first.rank, first.world_size, torch.device("cpu"))):
                found[name] = globals()[case.pop("work", "learn")](folder=folder / name, **case)
            leave({*distributed_c10d._world.pg_map} - joined)
        if first.is_main:
            (folder / "found.json").write_text(json.dumps(found))
