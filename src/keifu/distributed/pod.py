"""The ranks of a pod, over which a model is split: their shards of each parameter, and sums over the pod.

FSDP2, activation checkpointing and compilation act on the blocks that the model lists. FSDP gathers a block while it is
computed, and the other parameters while the model is computed.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from keifu.devices import require_compiler
from keifu.distributed.layout import Layout
from keifu.distributed.mesh import Mesh
from keifu.errors import UserError
from keifu.layers.unet.spatial_transformer import CROSS
from keifu.processes import of_all, sum_in_order
from keifu.training.hardware.recompute import blocks_of, recompute_blocks
from keifu.training.optim.optimizers import joined_rows


class Pod:
    """A model that is split over the axes `shard` and `tensor` of a device mesh. `group`: the process group of these
    ranks.

    layouts: layout of each parameter that is split along `tensor`. partial: names of parameters whose gradient is a
    partial sum on each rank of `tensor`, and has to be summed over this axis.
    """

    def __init__(self, model: nn.Module, devices: Any, group: Any, layouts: Mapping[str, Layout], partial: set[str]):
        self.group, self.partial = group, partial
        shard, tensor = devices["shard"], devices["tensor"]
        self.coordinate = shard.get_local_rank(), tensor.get_local_rank()
        self.coordinates = [*product(range(shard.size()), range(tensor.size()))]
        self.tensor_group, self.size = tensor.get_group(), tensor.size()
        joined = joined_rows(model)
        self.layouts: dict[str, Layout] = {}
        for name, p in model.named_parameters():
            layout = layouts.get(name) or Layout.unsplit(p, self.size, joined.get(p, ()))
            self.layouts[name] = replace(layout, shards=shard.size() if isinstance(p, DTensor) else 1)

    def full_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Gather a parameter, or a tensor of its shape. Return scalars and other tensors unchanged."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        is_sharded = name in self.layouts and tensor.dim()
        return self.layouts[name].join(local, self.coordinates, self.group) if is_sharded else local

    def take(self, name: str, full_tensor: Tensor) -> Tensor:
        """Return this rank's shard of the whole tensor `name`."""
        return self.layouts[name].take(full_tensor, *self.coordinate)

    def sum_partial(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum gradients over the mesh axis `tensor`, in place.

        Two cases need it: parameters in `partial`, and rows that several ranks store (heads of keys and values, if
        there are fewer heads than ranks).
        """
        sum_in_order([gradient for name, gradient in gradients.items() if name in self.partial],
                     self.size, self.tensor_group)  # fmt: skip
        for name, gradient in gradients.items():
            layout = self.layouts[name]
            pieces = [{*layout.pieces(self.coordinate[0], rank)} for rank in range(self.size if layout.is_split else 0)]
            if name not in self.partial and len(set().union(*pieces)) < sum(map(len, pieces)):
                gathered = of_all(gradient, self.size, self.tensor_group)
                for piece in pieces[self.coordinate[1]]:
                    parts = [part[piece.start : piece.stop] for part, listed in zip(gathered, pieces, strict=True)
                             if piece in listed]  # fmt: skip
                    gradient[piece.start : piece.stop] = sum(parts[1:], start=parts[0])

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the L2 norm of the whole gradient, a scalar."""
        parts, copies = list[Tensor](), list[int]()  # copies: number of ranks with the same piece
        for name, gradient in gradients.items():
            everywhere = [piece for rank in self.coordinates for piece in self.layouts[name].pieces(*rank)]
            for piece in self.layouts[name].pieces(*self.coordinate):
                parts.append(torch.atleast_1d(gradient)[piece.start : piece.stop])
                copies.append(everywhere.count(piece))
        norms = torch.stack(torch._foreach_norm(parts)).double()  # pyright: ignore
        total = (norms.square() / torch.tensor(copies, device=norms.device)).sum()
        distributed.all_reduce(total, group=self.group)
        return total.sqrt().float()


def parallelize(module: nn.Module, mesh: Mesh, devices: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Split a module over the mesh axis `shard` by FSDP2, and apply the mesh's compilation and activation
    checkpointing.

    The FSDP units are the blocks that the model lists. Gradients are summed in float32 over all axes of `devices`: the
    axes `pods` and `shard` give HSDP. A 16-bit `dtype` makes FSDP gather weights in it, so that autocast stores no
    copies.
    """
    blocks = blocks_of(module)
    if not blocks and mesh.compile_blocks:
        raise UserError("--mesh.compile-blocks acts on blocks, and this model lists none: leave it out.")
    for block in blocks:
        if mesh.compile_blocks:
            require_compiler(next(module.parameters()).device)
            # inductor cannot order the axes of images with symbolic sizes
            dynamic = False if any(isinstance(part, nn.Conv2d) for part in block.modules()) else None
            block.forward = torch.compile(block.forward, dynamic=dynamic)
    if mesh.activation_checkpointing:
        recompute_blocks(module, "blocks", "--mesh.activation-checkpointing")
    if devices["shard"].size() == 1:
        return module
    scalars = {parameter for parameter in module.parameters() if not parameter.dim()}  # FSDP cannot shard scalars
    offload = CPUOffloadPolicy() if mesh.offload else OffloadPolicy()
    cross_projections = [part.kv for part in module.modules() if isinstance(part, CROSS)]
    units = [part for part in (*cross_projections, *blocks) if any(p.dim() for p in part.parameters())]
    half = None if dtype in (None, torch.float32) else dtype
    total = torch.float32 if half else None
    for part in (*units, module):  # inner modules first
        # FSDP must not cast the batch
        policy = MixedPrecisionPolicy(half, total, cast_forward_inputs=part is not module)
        unit = fully_shard(part, mesh=devices, ignored_params=scalars, offload_policy=offload, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return module
