"""Tokens per second of training the Transformer (2017), compared with transformers' Marian and PyTorch's
nn.Transformer.

python benchmarks/train_translation.py [--dtype float32|bfloat16] [--dim 256] [--layers 3] [--rounds 5]
    [--json FILE]

All make the same AdamW steps (clipping at 1.0) on the same padded sentences: sources of 8 to 32 tokens, targets of as
many, and an end token on each side. keifu and Marian begin with the same weights; nn.Transformer has the same sizes and
other weights. Dropout is 0.1 for all (Marian and keifu have it on embeddings and sublayers, nn.Transformer by default
also inside feed-forward and attention); label smoothing is 0.1 for all. Padding is not counted as tokens.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from _results import typed, usual, write_timing
from _rounds import interleaved, machine
from _training import CPU, ours, peer
from torch import Tensor, nn

from keifu import checkpoints
from keifu.training.hardware.flops import count_flops, matmul_peak
from keifu.training.objectives.language_modeling import translation
from keifu.training.protocols import Batch

SECTION, BASE = "Training speed of the Transformer", "transformers' Marian"
ROWS, VOCABULARY, START, END, PAD = 128, 8000, 1, 2, 0


def batch(step: int) -> Batch:
    """Return the sentences of a step, the same for every contender."""
    random = torch.Generator().manual_seed(step)

    def side(begins: int) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(8, 33, (ROWS,), generator=random) + 1 + begins
        ids = torch.randint(3, VOCABULARY, (ROWS, int(lengths.max())), generator=random)
        places = torch.arange(ids.shape[1])
        ids = ids.masked_fill(places == lengths[:, None] - 1, END).masked_fill(places >= lengths[:, None], PAD)
        return (torch.cat([torch.full((ROWS, 1), START), ids[:, 1:]], 1) if begins else ids), places < lengths[:, None]

    (source, source_mask), (target, target_mask) = side(0), side(1)
    return {"source": source, "source_mask": source_mask, "target": target, "target_mask": target_mask}


def counted(rows: Batch) -> int:
    """Return the number of tokens that are read and of those that are predicted."""
    return int(rows["source_mask"].sum() + rows["target_mask"][:, 1:].sum())


def loss_of(logits: Tensor, rows: Batch) -> Tensor:
    """Return the cross-entropy, computed by PyTorch."""
    targets = rows["target"][:, 1:].masked_fill(~rows["target_mask"][:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)


def marian_model(dim: int, layers: int) -> transformers.MarianMTModel:
    """Return transformers' Marian model, with the initial weights of Marian and keifu."""
    torch.manual_seed(0)
    heads, hidden = dim // 64, 4 * dim
    config = transformers.MarianConfig(
        vocab_size=VOCABULARY, d_model=dim, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=hidden, decoder_ffn_dim=hidden, max_position_embeddings=64,
        scale_embedding=True, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=START, dropout=0.1,
        activation_function="relu", attention_dropout=0.0, activation_dropout=0.0, forced_eos_token_id=END,
    )  # fmt: skip
    return transformers.MarianMTModel(config).train()


def keifu(dim: int, layers: int, dtype: torch.dtype, losses: list[float]) -> Callable[[], None]:
    with tempfile.TemporaryDirectory() as directory:
        marian_model(dim, layers).save_pretrained(directory)
        model = checkpoints.load_model(directory).train()
    return ours(model, partial(translation, label_smoothing=0.1), batch, dtype, False, losses)


def marian(dim: int, layers: int, dtype: torch.dtype, losses: list[float]) -> Callable[[], None]:
    def loss(model: nn.Module, rows: Batch) -> Tensor:
        found = model(rows["source"], rows["source_mask"].long(), decoder_input_ids=rows["target"][:, :-1])
        return loss_of(found.logits, rows)

    return peer(marian_model(dim, layers), loss, batch, dtype, True, losses)


class Plain(nn.Module):
    """nn.Transformer with a tied embedding and sinusoidal positions."""

    def __init__(self, dim: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.inner = nn.Transformer(dim, dim // 64, layers, layers, 4 * dim, dropout=0.1, batch_first=True)
        places, each = torch.arange(64)[:, None], torch.arange(0, dim, 2)
        angles = places / 10_000 ** (each / dim)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], -1))

    def forward(self, rows: Batch) -> Tensor:
        source, target = (self._embedded(tokens) for tokens in (rows["source"], rows["target"][:, :-1]))
        triangle = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.inner(
            source, target, tgt_mask=triangle, tgt_is_causal=True, src_key_padding_mask=~rows["source_mask"],
            memory_key_padding_mask=~rows["source_mask"],
        )  # fmt: skip
        return F.linear(hidden, self.embedding.weight)

    def _embedded(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.embedding.weight.shape[1] ** 0.5
        return F.dropout(x + self.positions[: tokens.shape[1]], 0.1)


def plain(dim: int, layers: int, dtype: torch.dtype, losses: list[float]) -> Callable[[], None]:
    torch.manual_seed(0)
    return peer(Plain(dim, layers).train(), lambda m, rows: loss_of(m(rows), rows), batch, dtype, True, losses)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    dtype, size = getattr(torch, options.dtype), (options.dim, options.layers)
    makers = {BASE: marian, "nn.Transformer": plain, "keifu": keifu}
    losses: dict[str, list[float]] = {name: [] for name in makers}
    contenders = {name: make(*size, dtype, losses[name]) for name, make in makers.items()}
    seconds = interleaved(contenders, options.rounds)
    model, rows = marian_model(*size), batch(0)
    flops = count_flops(lambda: model(rows["source"], decoder_input_ids=rows["target"][:, :-1]).logits.sum().backward())
    amount = statistics.mean(counted(batch(step)) for step in range(1, options.rounds + 1))
    task = {
        "amount": amount, "seconds": seconds, "work": flops, "peak": round(matmul_peak(CPU, dtype)),
        "more": {name: [f"{own[-1]:.3f}"] for name, own in losses.items()},
    }  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    shape = f"dim {size[0]}, {size[1]} + {size[1]} layers, {parameters:.1f} M, {ROWS} pairs"
    print(f"{machine()}; {shape}, {options.dtype}, {options.rounds} rounds")
    print(f"The matmul peak measured here is {task['peak'] / 1e9:.0f} GFLOP/s; padding counts as work, not as tokens.")
    values = {"tasks": {options.dtype: task}, "against": dict.fromkeys(makers, [BASE])}
    columns = ["", "tokens/s", f"ratio to {BASE}", "share of the matmul peak", "last loss"]
    write_timing(options.json, SECTION, typed("train_translation.py", vars(options), usual(parser)), columns, values)


if __name__ == "__main__":
    main()
