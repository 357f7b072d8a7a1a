"""Splits a built model over the processes from outside: FSDP2, activation checkpointing, compilation of blocks.

The blocks are the modules in the model's lists. Each is gathered when it is computed; what is in none of them, while
the whole model is.
"""

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from keifu.distributed.mesh import Mesh
from keifu.layers.attention.attention import CrossAttention


def parallelize(module: nn.Module, mesh: Mesh, devices: Any) -> nn.Module:
    """The module, split over the axis `shard` of a device mesh as `mesh` says. Gradients are summed over that axis."""
    blocks = [block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part]
    if mesh.activation_checkpointing:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if mesh.compile_blocks:
        for block in blocks:
            block.compile()
    if devices["shard"].size() == 1:
        return module
    scalars = {parameter for parameter in module.parameters() if not parameter.dim()}  # FSDP shards none of them
    offload = CPUOffloadPolicy() if mesh.offload and devices.device_type != "cpu" else OffloadPolicy()
    apart = [part.kv for part in module.modules() if isinstance(part, CrossAttention)]  # called outside of its block
    chosen = {id(part) for part in (*blocks, *apart) if any(p.dim() for p in part.parameters())}
    for part in reversed([*module.modules()]):  # the innermost first
        if id(part) in chosen or part is module:
            fully_shard(part, mesh=devices["shard"], ignored_params=scalars, offload_policy=offload)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return module
