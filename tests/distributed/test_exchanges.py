"""Exchanges of one training step, counted: this process is one of 8 or 512, and the others are torch's fake ones."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from unittest.mock import Mock

import jaxtyping
import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from keifu.devices import Choice, choosing
from keifu.distributed import group as groups
from keifu.distributed.group import Group
from keifu.distributed.mesh import Mesh
from keifu.errors import UserError
from keifu.models import llama
from keifu.processes import local, use
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.protocols import Run
from keifu.training.settings import Settings
from keifu.training.setup import set_up
from keifu.training.trainer import Trainer

CONFIG = llama.Config(64, 32, 32, 96, 4, 4)
PARAMETERS = 57_632  # 4 blocks of 13,376, and 4,128 of embedding, norm and head
KINDS = {  # what is exchanged, by torch's name of the operation, and its letter in an order
    "_allgather_base_": "gather", "_reduce_scatter_base_": "scatter", "allreduce_": "reduce",
    "allreduce_coalesced_": "reduce", "alltoall_base_": "alltoall",
}  # fmt: skip
SMALL = 1024  # bytes: the norm, and which parameters have a gradient


@dataclass(frozen=True)
class Budget:
    """Exchanges of a step of two micro-batches: number and bytes of each kind, and their order in the last backward
    pass: products (.), and the first letters of scatters, reductions, and all-to-alls with their allgathers.

    weights: bytes of a process.
    """

    world: int
    mesh: dict[str, Any]
    exchanges: dict[str, tuple[int, int]]
    order: str
    weights: int = 4 * PARAMETERS
    precision: Any = "float32"


OVERLAPPED: dict[str, Any] = {"gradient_sum": "overlapped"}
BUDGETS = {
    "8 as 2 x 4": Budget(
        8, {"pods": 2, "shard": 4, **OVERLAPPED},
        {"gather": (18, 889_088), "scatter": (5, 230_528), "reduce": (5, 57_632)}, ".sr.sr.sr.srsr", 57_632,
    ),
    "8 as 2 x 4, each micro-batch": Budget(
        8, {"pods": 2, "shard": 4, "sync_each": True, **OVERLAPPED},
        {"gather": (18, 889_088), "scatter": (10, 461_056), "reduce": (10, 115_264)}, ".sr.sr.sr.srsr", 57_632,
    ),  # also between pods each time: a block that the last micro-batch does not use has a whole sum
    "8 as 2 x 4, in order": Budget(
        8, {"pods": 2, "shard": 4, "gradient_sum": "ordered"},
        {"gather": (18, 889_088), "scatter": (5, 230_528), "alltoall": (1, 57_632)}, ".s.s.s.ssaa", 57_632,
    ),
    "8 as 2 x 2 x 2": Budget(
        8, {"pods": 2, "shard": 2, "tensor": 2, **OVERLAPPED},
        {"gather": (18, 454_912), "scatter": (5, 119_936), "reduce": (5, 59_968)}, ".sr.sr.sr.srsr", 59_968,
    ),
    "8 whole": Budget(8, OVERLAPPED, {"reduce": (4, 230_528)}, ".r.r.rr"),
    "8 whole, in order": Budget(8, {}, {"alltoall": (1, 230_528)}, ".aa"),
    "512 as 64 x 8": Budget(
        512, {"pods": 64, "shard": 8, **OVERLAPPED},
        {"gather": (18, 889_088), "scatter": (5, 230_528), "reduce": (5, 28_816)}, ".sr.sr.sr.srsr", 28_816,
    ),
    "512 as 64 x 8 in 16 bits": Budget(
        512, {"pods": 64, "shard": 8, **OVERLAPPED},
        {"gather": (18, 444_544), "scatter": (5, 230_528), "reduce": (5, 28_816)}, ".sr.sr.sr.srsr", 28_816, "bfloat16",
    ),
    "512 whole": Budget(512, OVERLAPPED, {"reduce": (4, 230_528)}, ".r.r.rr"),
}  # fmt: skip


@dataclass
class Trace(TorchDispatchMode):
    """Exchanges in its block, with their bytes, and matrix products between them."""

    seen: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func._schema.name).partition("::")[2]
        if func.namespace == "c10d":
            tensors = [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            whole = sum if "coalesced" in name else max
            self.seen.append((KINDS.get(name) or name, whole(tensor.nbytes for tensor in tensors)))
        elif name in ("mm", "addmm", "bmm"):
            self.seen.append((".", 0))
        return func(*args, **(kwargs or {}))

    @property
    def gradients(self) -> list[tuple[str, int]]:
        """Return the exchanges without those of a few numbers."""
        return [(kind, size) for kind, size in self.seen if kind in KINDS.values() and size > SMALL]

    def order(self) -> str:
        """Return letters of the exchanges of gradients, and one dot for the products between two of them."""
        letters = [kind[0] for kind, size in self.seen if kind == "." or (kind[0] in "sra" and size > SMALL)]
        return "".join("." if letter == "." else "".join(same) for letter, same in groupby(letters))


@contextmanager
def joined(world: int, mesh: Mesh, device: str = "cpu") -> Iterator[Group]:
    """Make this process the first one of so many, of which the others do nothing."""
    store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        group = Group(mesh, store, 0, world, torch.device(device))
        with use(group):
            yield group
    finally:
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small model have several buckets, and no state be written; tensor parallelism changes shapes in hooks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(groups, "BUCKET", 2**14)
    monkeypatch.setattr(groups.checkpoint, "States", Mock())


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_keeps_its_budget_of_exchanges(name: str) -> None:
    """No exchange has the gradient of all weights in 32 bits, except in order, and each begins once it is computed."""
    budget = BUDGETS[name]
    with joined(budget.world, Mesh(**budget.mesh)) as group:
        torch.manual_seed(0)
        rows = 2 * group.data_size
        settings = Settings(batch_size=rows, micro_batch=1, precision=budget.precision)
        model = llama.build(CONFIG).train()
        trainer = Trainer(model, causal_language_modeling, settings)
        with Trace() as trace:
            assert trainer.gradient(0, {"tokens": torch.randint(64, (rows, 9))})
        held = sum(local(p).nbytes for p in model.parameters())
    counts = Counter(kind for kind, _ in trace.gradients)
    sizes = {kind: sum(size for other, size in trace.gradients if other == kind) for kind in counts}
    assert {kind: (count, sizes[kind]) for kind, count in counts.items()} == budget.exchanges
    assert trace.order().endswith(budget.order)
    assert held == budget.weights
    largest = max(size for _, size in trace.gradients)
    assert largest < 4 * PARAMETERS or "a" in budget.order


@pytest.mark.parametrize(
    ("device", "given", "deterministic", "overlaps"),
    [("cpu", None, False, False), ("cuda", None, False, True), ("cuda", None, True, False),
     ("cpu", "overlapped", False, True), ("cuda", "ordered", False, False)],
)  # fmt: skip
def test_gradients_are_summed_in_order_where_bits_are_promised(
    device: str, given: Any, deterministic: bool, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = groups.init_device_mesh
    monkeypatch.setattr(groups, "init_device_mesh", lambda _, *shape, **names: made("cpu", *shape, **names))
    with choosing(Choice(deterministic=deterministic)), joined(8, Mesh(gradient_sum=given), device) as group:
        assert group.overlaps == overlaps
    with joined(8, Mesh(shard=8, gradient_sum=given), device) as group:
        assert not group.overlaps  # one pod has nothing to sum


def test_deterministic_and_overlapped_are_refused(tmp_path: Any) -> None:
    settings, run = Settings(deterministic=True), Run(tmp_path, resume=False)
    model = llama.build(CONFIG)
    with joined(8, Mesh(**OVERLAPPED)), pytest.raises(UserError, match="give --mesh.gradient-sum ordered"):
        set_up(model, causal_language_modeling, Mock(fingerprint="toys"), settings, run, print)


def test_a_step_that_exchanges_in_its_pass_is_not_tried_again_with_fewer_rows() -> None:
    """The other processes would be at another exchange."""
    with joined(8, Mesh()) as group:
        trainer = Trainer(llama.build(CONFIG), causal_language_modeling, Settings(batch_size=32, micro_batch=4))
        batch = {"tokens": torch.zeros(32, 9, dtype=torch.int64)}
        assert trainer.halve(batch) and trainer.micro_batch == 2
        group.overlaps = True
        assert not trainer.halve(batch)
