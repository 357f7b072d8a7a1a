"""One rank of several that train a model: its position in the mesh, and its communication with the other ranks.

Tensors are exchanged through torch.distributed, and short strings through its store.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous

from keifu.devices import choose, device_choice
from keifu.distributed import checkpoint
from keifu.distributed.failures import exchange_failed
from keifu.distributed.mesh import Mesh
from keifu.distributed.pod import Pod, parallelize
from keifu.distributed.tensor import tensor_parallel
from keifu.errors import UserError
from keifu.layers.lazy import settle
from keifu.processes import Processes, buckets, use

KEPT = 100  # the most values that stay in the store
BUCKET = 2**22  # gradient elements per exchange during a backward pass


class OverlappedSum:
    """Context manager that sums gradients over a group in buckets, overlapped with the backward pass in its block.

    All ranks exchange the buckets in the same order, the last parameters first. A parameter without a gradient gets
    zeros; the block's value is the set of `id`s of these parameters.
    """

    def __init__(self, parameters: Sequence[Any], group: Any):
        self.buckets = [*buckets(parameters[::-1], BUCKET)]
        self.remaining = [*map(len, self.buckets)]
        self.group: Any = group or distributed.group.WORLD
        self.works, self.hooks, self.filled = list[Any](), list[Any](), set[int]()

    def __enter__(self) -> set[int]:
        for number, bucket in enumerate(self.buckets):
            self.hooks += [p.register_post_accumulate_grad_hook(partial(self._count, number)) for p in bucket]
        return self.filled

    def _count(self, number: int, _: Tensor) -> None:
        self.remaining[number] -= 1
        while len(self.works) < len(self.buckets) and not self.remaining[len(self.works)]:
            self._start()

    def _start(self) -> None:
        gradients = [p.grad for p in self.buckets[len(self.works)]]
        self.works.append(self.group.allreduce_coalesced(gradients))

    def __exit__(self, error: object, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        if error:
            return
        for p in chain(*self.buckets):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
                self.filled.add(id(p))
        while len(self.works) < len(self.buckets):
            self._start()
        for work in self.works:
            work.wait()


class Group(Processes):
    """One rank of `world_size` ranks on a mesh. fewer: whether the number of pods may be smaller than `mesh.pods`."""

    def __init__(self, mesh: Mesh, store: Any, rank: int, world_size: int, device: torch.device, fewer: bool = False):
        pods, shard, tensor = shape = mesh.fit(world_size, fewer)
        super().__init__(rank // tensor, pods * shard)
        self.mesh, self.shape = mesh, shape
        self.store = store
        self.rank = rank
        self.world_size = world_size
        if mesh.offload and device.type == "cpu":
            raise UserError("--mesh.offload moves weights of GPUs to the host's memory, where they are: leave it out.")
        self.is_replicated = shard == tensor == 1
        self.devices = init_device_mesh(device.type, (pods, shard, tensor), mesh_dim_names=self.shape._fields)
        self.data_group = None if tensor == 1 else self.devices["pods", "shard"]._flatten("data").get_group()
        self.pods, self.pods_group = pods, None if self.is_replicated else self.devices.get_group("pods")
        sums = mesh.gradient_sum or (
            "ordered" if device.type != "cuda" or device_choice().deterministic else "overlapped"
        )
        self.overlaps = pods > 1 and sums == "overlapped"
        self.pod_group = None if pods == 1 else self.devices["shard", "tensor"]._flatten("pod").get_group()
        self.states = checkpoint.States(self.is_main)
        self.values = 0
        self.modules: dict[int, Any] = {}

    def barrier(self) -> None:
        distributed.all_reduce(torch.zeros(1))

    def broadcast(self, value: Any) -> Any:
        self.values += 1
        if self.is_main:
            self.store.set(f"value/{self.values}", json.dumps(value))
            self.store.delete_key(f"value/{self.values - KEPT}")
            return value
        return json.loads(self.store.get(f"value/{self.values}"))

    def gather(self, text: str) -> list[str]:
        self.values += 1
        self.store.set(f"text/{self.values}/{self.rank}", text)
        numbers = range(self.world_size) if self.is_main else ()
        return [self.store.get(f"text/{self.values}/{number}").decode() for number in numbers] or [text]

    def begin_step(self, step: int) -> None:
        self.store.set(f"step/{self.rank}", str(step))

    def split(self, module: Any, dtype: torch.dtype | None = None) -> nn.Module:
        if self.is_replicated and not self.mesh.activation_checkpointing and not self.mesh.compile_blocks:
            return module
        if id(module.model) not in self.modules:
            layouts, partial = {}, set()
            if self.shape.tensor > 1:
                layouts, partial = tensor_parallel(module.model, self.devices["tensor"])
            axes = self.devices["pods", "shard"] if self.overlaps else self.devices["shard"]
            self.modules[id(module.model)] = parallelize(module, self.mesh, axes, dtype)
            settle(module)
            if not self.is_replicated:
                self.pod = Pod(module.model, self.devices, self.pod_group, layouts, partial)
        return self.modules[id(module.model)]

    @contextmanager
    def backward(self, module: Any, last: bool) -> Iterator[None]:
        summed = module.parameters() if last and self.overlaps else ()
        unsharded = [p for p in summed if p.requires_grad and not (self.shape.shard > 1 and p.dim())]
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last or self.mesh.sync_each)
            module.set_is_last_backward(last)
        with OverlappedSum(unsharded, self.data_group) as self.filled:
            yield

    def discard_gradients(self, module: Any) -> None:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.unshard()  # unsharded parameters hold the gradients
                for parameter in part.parameters():  # pyright: ignore[reportAttributeAccessIssue]
                    parameter.grad = None
                part.reshard()

    def save(self, *state: Any) -> None:
        assert self.pod
        self.states.save(self.pod, *state)

    def flush(self) -> None:
        self.states.flush()

    def load(self, path: Any, tensors: Any) -> dict[str, Any]:
        assert self.pod
        return checkpoint.load(self.pod, path, tensors)


def _fresh_store(store: Any, number: int, count: int, seconds: float) -> Any:
    """Return a store without the entries of dead processes, which torchrun's store keeps when it restarts processes.

    Each process draws a random number and stores it. Rank 0 answers each number it reads with its own number, which
    becomes the prefix of all keys of this start. It also answers dead processes' numbers; nobody reads those answers.
    """
    random_name, end = uuid4().hex, time.monotonic() + seconds
    store.set(f"drawn/{number}", random_name)
    name = random_name if number == 0 else store.get(f"start/{random_name}").decode()
    store.set(f"{name}/{number}", "")
    absent_ranks = [*range(1, count)] if number == 0 else []
    while absent_ranks := [other for other in absent_ranks if not store.check([f"{name}/{other}"])]:
        if time.monotonic() > end:
            raise UserError(
                f"Process {absent_ranks[0]} of {count} (counted from 0) has not come in {seconds:g} seconds."
            )
        for other in absent_ranks:
            if store.check([f"drawn/{other}"]):
                store.set(f"start/{store.get(f'drawn/{other}').decode()}", name)
        time.sleep(0.02)
    return PrefixStore(name, store)


@contextmanager
def join(mesh: Mesh, fewer: bool = False) -> Iterator[Group]:
    """Join the processes that torchrun has started, for this block. fewer: whether pods may be missing after a
    restart."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose()
    if device.type == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(f"Each process takes a GPU of its own, and there are {gpus} here: start {gpus} processes.")
        torch.cuda.set_device(local_rank)
    limit = timedelta(seconds=mesh.time_limit)
    store, rank, world_size = next(rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    store = _fresh_store(store, rank, world_size, mesh.time_limit)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        group = Group(mesh, store, rank, world_size, device, fewer)
    except RuntimeError as error:
        if not exchange_failed(error):
            raise
        raise UserError("Another process ended before all had joined: start again, or with --resume.") from error
    with use(group):
        yield group
        group.barrier()
    distributed.destroy_process_group()  # not after an error: other ranks may not answer
