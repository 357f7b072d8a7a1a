"""The mesh: the number of processes along each axis. Options of `keifu train`, and their check against the
world size."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from keifu.errors import UserError
from keifu.ranges import Count


class Shape(NamedTuple):
    """Number of processes along each axis of the mesh. Consecutive ranks are neighbours along `tensor`."""

    pods: int
    shard: int
    tensor: int

    def __str__(self) -> str:
        return " × ".join(f"{name} {size}" for name, size in self._asdict().items())


@dataclass(frozen=True)
class Mesh:
    """Options for training one model with several processes. By default each process has the whole model and computes a
    part of each batch.
    """

    pods: Count | None = None
    """Copies of the model: pods exchange gradients once a step. Unset: as many as the processes allow."""
    shard: Count | None = None
    """Processes that share the weights, gradients and optimizer states of a copy (FSDP). Unset: 1; with pods, all
    processes of a pod."""
    tensor: Count = 1
    """Processes that share each matrix product of a Transformer (tensor, sequence and loss parallelism)."""
    activation_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass: less memory, a third more computation."""
    offload: bool = False
    """Keep sharded weights and optimizer states in the host's memory (with shard, on GPUs)."""
    sync_each: bool = False
    """Exchange gradients within a pod after each micro-batch (with shard): no process keeps those of all weights, but
    there are more exchanges."""
    gradient_sum: Literal["ordered", "overlapped"] | None = None
    """Sum of gradients over pods. ordered: after the backward pass, with the same bits each time. overlapped: in parts
    during the last backward pass of a step (HSDP). Unset: overlapped on GPUs without --deterministic, else ordered."""
    compile_blocks: bool = False
    """Compile each block with torch.compile."""
    time_limit: Count = 600
    """Seconds that a process waits for another one before the run stops."""

    @property
    def asks(self) -> int:
        """The smallest number of processes that fits these options."""
        return (self.pods or 1) * (self.shard or 1) * self.tensor

    def fit(self, count: int, fewer: bool = False) -> Shape:
        """Return the shape for `count` processes. Raises UserError if they do not fit. fewer: allow fewer pods, as
        after a restart.
        """
        shard = self.shard or (max(1, count // (self.pods * self.tensor)) if self.pods else 1)
        pods = self.pods or count // (shard * self.tensor)
        if shard == 1 and (self.offload or self.sync_each):
            name = "--mesh.offload" if self.offload else "--mesh.sync-each"
            raise UserError(f"{name} is for shared weights: give --mesh.shard too, or leave it out.")
        if fewer and count % (shard * self.tensor) == 0:
            pods = min(pods, count // (shard * self.tensor))
        shape = Shape(pods, shard, self.tensor)
        if pods * shard * self.tensor != count:
            raise UserError(
                f"The mesh does not fit: {shape} are {max(pods, 1) * shard * self.tensor} processes or a multiple of "
                f"{shard * self.tensor}, and there are {count}; change --processes or the mesh."
            )
        return shape
