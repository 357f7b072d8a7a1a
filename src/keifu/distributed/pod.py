"""The processes of a pod, which a model is split over: their parts of every parameter, and what they add up.

FSDP2, activation checkpointing and compilation act on the blocks that the model lists. Each block is gathered when it
is computed; the other parameters are gathered as long as the whole model is computed.
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
    """A model that is split over the axes `shard` and `tensor` of a device mesh, whose processes are `group`.

    layouts: of the parameters that are split along `tensor`. partial: the names of those whose gradients each process
    there has computed a part of.
    """

    def __init__(self, model: nn.Module, devices: Any, group: Any, layouts: Mapping[str, Layout], partial: set[str]):
        self.group, self.partial = group, partial
        shard, tensor = devices["shard"], devices["tensor"]
        self.place = shard.get_local_rank(), tensor.get_local_rank()
        self.places = [*product(range(shard.size()), range(tensor.size()))]
        self.tensor_group, self.size = tensor.get_group(), tensor.size()
        joined = joined_rows(model)
        self.layouts = {
            name: replace(
                layouts.get(name) or Layout.whole(p, self.size, joined.get(p, ())),
                shards=shard.size() if isinstance(p, DTensor) else 1,
            )
            for name, p in model.named_parameters()
        }

    def full_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Gather a tensor that belongs to a parameter. Other tensors, and scalars, are returned as they are."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        known = name in self.layouts and tensor.dim()
        return self.layouts[name].join(local, self.places, self.group) if known else local

    def take(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's part of the whole tensor of this name."""
        return self.layouts[name].take(whole, *self.place)

    def complete(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum over the axis `tensor` what its processes have computed parts of: gradients of what is in the blocks and
        not split, and of heads of keys and values that several processes have."""
        sum_in_order([gradient for name, gradient in gradients.items() if name in self.partial],
                     self.size, self.tensor_group)  # fmt: skip
        for name, gradient in gradients.items():
            layout = self.layouts[name]
            pieces = [{*layout.pieces(self.place[0], tensor)} for tensor in range(self.size if layout.is_split else 0)]
            if name not in self.partial and len(set().union(*pieces)) < sum(map(len, pieces)):
                gathered = of_all(gradient, self.size, self.tensor_group)
                for piece in pieces[self.place[1]]:
                    parts = [part[piece.start : piece.stop] for part, listed in zip(gathered, pieces, strict=True)
                             if piece in listed]  # fmt: skip
                    gradient[piece.start : piece.stop] = sum(parts[1:], start=parts[0])

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of the whole gradient."""
        parts, copies = list[Tensor](), list[int]()  # of how many processes of the pod have the same
        for name, gradient in gradients.items():
            everywhere = [piece for rank in self.places for piece in self.layouts[name].pieces(*rank)]
            for piece in self.layouts[name].pieces(*self.place):
                parts.append(torch.atleast_1d(gradient)[piece.start : piece.stop])
                copies.append(everywhere.count(piece))
        norms = torch.stack(torch._foreach_norm(parts)).double()  # pyright: ignore
        total = (norms.square() / torch.tensor(copies, device=norms.device)).sum()
        distributed.all_reduce(total, group=self.group)
        return total.sqrt().float()


def parallelize(module: nn.Module, mesh: Mesh, devices: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Split a module over the axis `shard` of a device mesh as `mesh` says.

    The units are the blocks that the model lists. Gradients are summed over all axes of `devices`, in float32: with the
    axis `pods` before `shard` it is HSDP. With a `dtype` of 16 bits the weights are gathered in it, so that autocast
    keeps no copies of them.
    """
    blocks = blocks_of(module)
    if not blocks and mesh.compile_blocks:
        raise UserError("--mesh.compile-blocks acts on blocks, and this model lists none: leave it out.")
    for block in blocks:
        if mesh.compile_blocks:
            require_compiler(next(module.parameters()).device)
            # inductor cannot order the axes of pictures whose sizes are symbols
            dynamic = False if any(isinstance(part, nn.Conv2d) for part in block.modules()) else None
            block.forward = torch.compile(block.forward, dynamic=dynamic)
    if mesh.activation_checkpointing:
        recompute_blocks(module, "blocks", "--mesh.activation-checkpointing")
    if devices["shard"].size() == 1:
        return module
    scalars = {parameter for parameter in module.parameters() if not parameter.dim()}  # FSDP shards none of them
    offload = CPUOffloadPolicy() if mesh.offload else OffloadPolicy()
    apart = [part.kv for part in module.modules() if isinstance(part, CROSS)]
    units = [part for part in (*apart, *blocks) if any(p.dim() for p in part.parameters())]
    half = None if dtype in (None, torch.float32) else dtype
    total = torch.float32 if half else None
    for part in (*units, module):  # the inner ones first
        policy = MixedPrecisionPolicy(half, total, cast_forward_inputs=part is not module)  # a batch stays as it is
        made = fully_shard(part, mesh=devices, ignored_params=scalars, offload_policy=offload, mp_policy=policy)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
    return module
