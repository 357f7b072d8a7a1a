"""The runner of a causal model: tokens of several sequences go through it in one step, keys and values lie in blocks.

Keys and values are in a pool of `n_blocks` blocks, each of `block_size` tokens. The token at position p of a sequence
has its own in block `blocks[p // block_size]` of the sequence's block table, at place p % block_size. Which sequence
has which blocks is decided by the scheduler. Axes: wanted = tokens whose logits are asked for, vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """The new tokens of one sequence in a step: one that was just sampled, or a chunk of a prompt.

    sequence: the sequence's number, the same in all its steps. No two spans of a step have the same.
    tokens: at least one, at positions `start`, `start` + 1, ...
    start: how many tokens of the sequence came before; their keys and values are in its blocks.
    blocks: the block table, long enough for the last of the new tokens. A block before the one that holds `start` may
        be shared with other sequences; those from there on are this sequence's alone.
    wanted: for how many of the last tokens logits are wanted: 0 for a prompt that goes on, 1 to sample the next token,
        more to verify guesses or to score a text.
    """

    sequence: int
    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wanted: int = 1


class Runner(Protocol):
    """Interface of what computes a step, in PyTorch (`TorchRunner`) or natively (`keifu.native`).

    block_size, n_blocks: tokens of a block, and blocks of the pool. vocab_size, context_length: of the model.
    token_bytes: what the keys and values of a token take.
    """

    block_size: int
    n_blocks: int
    vocab_size: int
    context_length: int
    token_bytes: int

    def run(self, batch: Sequence[Span]) -> Float[Tensor, "wanted vocab"]:
        """Logits in float32 after each wanted token: span by span, within a span in the order of its tokens.

        Writes the keys and values of the new tokens into the blocks. A shared block that one span of the batch writes
        is not read by another: the scheduler shares a block only from the step after the one that filled it. A step
        that was interrupted is run again: what it wrote is written over.
        """
        ...

    def forget(self, sequence: int) -> None:
        """The sequence has ended or was preempted: what the runner keeps of it beside the blocks may go."""
        ...
