"""Activation checkpointing (Chen et al., 2016): the backward pass computes the activations of blocks again.

Blocks are also the units of FSDP and of compilation.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from keifu.errors import UserError
from keifu.layers.dropout import Dropout
from keifu.training.settings import Recompute

PRODUCTS = frozenset(  # `selective` stores the results of these: matrix multiplications, convolutions, attention
    ["mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "_linear_pointwise", "_flash_attention_forward"]
    + [f"_scaled_dot_product_{kernel}" for kernel in ("flash_attention", "efficient_attention", "cudnn_attention")]
    + ["_scaled_dot_product_flash_attention_for_cpu", "_varlen_attn"]
)


@runtime_checkable
class HasBlocks(Protocol):
    """A module that lists its blocks."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks; none of them is inside another one."""
        ...


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model lists, or the blocks of its submodules if it lists none itself."""
    if isinstance(model, HasBlocks):
        return [*model.blocks]
    return [block for child in model.children() for block in blocks_of(child)]


class Recomputed:
    """Forward pass of a block whose activations are recomputed: all of them, or all but the results of `PRODUCTS`.

    Losses and gradients have the same bits as without recomputation. measured: if it is a list, each call appends the
    bytes that its backward pass needs, and the bytes that `selective` stores.
    """

    measured: list[tuple[int, int]] | None = None

    def __init__(self, forward: Callable[..., Any], how: Recompute):
        self.forward, self.how = forward, how

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*inputs, **keywords)
        if self.measured is not None:
            self.measured.append(_bytes_of(partial(self.forward, *inputs, **keywords)))
        selective: Any = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
        keep = selective if self.how == "selective" else {}
        run: Any = partial(self.forward, **keywords)
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **keep)


def recompute_blocks(model: nn.Module, how: Recompute, option: str = "--activation-checkpointing") -> None:
    """Make the blocks of a model recompute their activations.

    Raises UserError for a model without blocks, or with dropout whose mask cannot be drawn again.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(f"{option} acts on blocks, and this model lists none: leave it out, or add `blocks`.")
    for block in blocks:
        if name := next(_other_dropouts(block), None):
            raise UserError(f"{option} needs the same dropout twice: use keifu.layers.dropout.Dropout for {name}.")
        plain = block.forward.forward if isinstance(block.forward, Recomputed) else block.forward
        block.forward = Recomputed(plain, how)


def _other_dropouts(block: nn.Module) -> Iterator[str]:
    """Yield the names of a block's torch dropouts, which draw from the global random generator."""
    kinds = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout
    return (n for n, part in block.named_modules() if isinstance(part, kinds) and not isinstance(part, Dropout))


def _policy(context: Any, operation: Any, *inputs: Any, **keywords: Any) -> CheckpointPolicy:
    is_saved = operation._schema.name.partition("::")[2] in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def _bytes_of(work: Callable[[], Any]) -> tuple[int, int]:
    """Return the bytes that a backward pass of `work` would need, and the bytes of the results of `PRODUCTS`."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a reference prevents the reuse of an address

    def pack(tensor: Tensor) -> None:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)

    with _Products() as products, saved_tensors_hooks(pack, lambda dropped: dropped):
        work()
    return sum(sizes.values()), products.bytes


class _Products(TorchDispatchMode):
    """Dispatch mode that counts the bytes of the results of `PRODUCTS`."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.partition("::")[2] in PRODUCTS:
            self.bytes += sum(x.nbytes for x in (result if isinstance(result, tuple) else [result]))
        return result
