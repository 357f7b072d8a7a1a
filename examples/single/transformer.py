"""The Transformer (Vaswani et al., 2017) in one file: an encoder-decoder that translates.

Run `python transformer.py`. It learns to write numbers in English words: 431207 -> "four hundred thirty one thousand
two hundred seven", and is tested on numbers that it has not seen. Torch alone, under two minutes on two cores.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    """Sizes. The defaults are the paper's base model. Source and target share a vocabulary and an embedding."""

    vocab_size: int = 37_000
    dim: int = 512
    hidden_dim: int = 2048
    n_layers: int = 6
    n_heads: int = 8
    dropout: float = 0.1
    start_id: int = 1
    end_id: int = 2
    pad_id: int = 3


def sinusoids(length, dim):
    """Return sines, then cosines, of position / 10000^(2i/dim): [length, dim]. Each position has its own pattern."""
    rates = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1).float()


def attend(q, k, v, n_heads, mask=None, causal=False):
    """softmax(q kᵀ / √head_dim) v in each head. `mask` [batch, keys] is True on tokens that may be seen."""
    q, k, v = (part.unflatten(-1, (n_heads, -1)).transpose(1, 2) for part in (q, k, v))
    mask = None if mask is None else mask[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of each token to the tokens of its own sequence."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, mask=None, causal=False):
        return self.out(attend(*self.qkv(x).chunk(3, -1), self.n_heads, mask, causal))


class CrossAttention(nn.Module):
    """Attention of each target token to the source: queries from the target, keys and values from the source."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.q, self.kv = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, 2 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, source, mask=None):
        return self.out(attend(self.q(x), *self.kv(source).chunk(2, -1), self.n_heads, mask))


class FeedForward(nn.Module):
    """Two linear layers with a ramp between them. They act on each token alone."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.dim, config.hidden_dim)
        self.down = nn.Linear(config.hidden_dim, config.dim)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Block(nn.Module):
    """Sublayers of the encoder or decoder. Each computes norm(x + sublayer(x)). The decoder has one for the source."""

    def __init__(self, config, decoder):
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(config), nn.LayerNorm(config.dim)
        self.cross_attention = CrossAttention(config) if decoder else None
        self.cross_attention_norm = nn.LayerNorm(config.dim) if decoder else None
        self.feedforward, self.feedforward_norm = FeedForward(config), nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, source=None):
        seen = self.attention(x, None, causal=True) if self.cross_attention else self.attention(x, mask)
        x = self.attention_norm(x + self.dropout(seen))
        if self.cross_attention:
            x = self.cross_attention_norm(x + self.dropout(self.cross_attention(x, source, mask)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))


class Transformer(nn.Module):
    """Encoder of the source and decoder of the target. The shared embedding's matrix is also the head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = nn.ModuleList(Block(config, decoder=False) for _ in range(config.n_layers))
        self.decoder = nn.ModuleList(Block(config, decoder=True) for _ in range(config.n_layers))
        self.dropout = nn.Dropout(config.dropout)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)

    def embed(self, tokens):
        x = self.embedding(tokens) * self.config.dim**0.5
        return self.dropout(x + sinusoids(tokens.shape[1], self.config.dim))

    def encode(self, source):
        """Return the states of a source [batch, length], and the mask of its real tokens."""
        mask = source != self.config.pad_id
        x = self.embed(source)
        for block in self.encoder:
            x = block(x, mask)
        return x, mask

    def forward(self, source, target):
        """Return logits of the token after each target token: [batch, length, vocab]."""
        return self.decode(target, *self.encode(source))

    def decode(self, target, states, mask):
        x = self.embed(target)
        for block in self.decoder:
            x = block(x, mask, states)
        return F.linear(x, self.embedding.weight)


@torch.inference_mode()
def translate(model, source, longest=20):
    """Return the likeliest next token again and again, from the start token to the longest allowed length."""
    model.eval()
    states, mask = model.encode(source)
    target = torch.full((len(source), 1), model.config.start_id)
    for _ in range(longest):
        target = torch.cat([target, model.decode(target, states, mask)[:, -1:].argmax(-1)], 1)
    return target[:, 1:]


UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VOCABULARY = ["<unused>", "<start>", "<end>", "<pad>", *"0123456789", *UNITS, *TENS, "hundred", "thousand"]
IDS = {word: index for index, word in enumerate(VOCABULARY)}


def words(number):
    """Return the English words of a number below a million."""
    if number >= 1000:
        return [*words(number // 1000), "thousand", *(words(number % 1000) if number % 1000 else [])]
    if number >= 100:
        return [UNITS[number // 100], "hundred", *(words(number % 100) if number % 100 else [])]
    return [UNITS[number]] if number < 20 else [TENS[number // 10 - 2], *([UNITS[number % 10]] if number % 10 else [])]


def batch_of(numbers):
    """Return sources and targets as padded token ids. Both end with <end>, and a target starts with <start>."""
    sources = [[IDS[digit] for digit in str(number)] + [IDS["<end>"]] for number in numbers]
    targets = [[IDS["<start>"], *(IDS[word] for word in words(number)), IDS["<end>"]] for number in numbers]
    padded = [[row + [IDS["<pad>"]] * (max(map(len, side)) - len(row)) for row in side] for side in (sources, targets)]
    return torch.tensor(padded[0]), torch.tensor(padded[1])


def main(steps=600):
    """Train on random numbers, and test on numbers that end in 7 and were never shown."""
    torch.manual_seed(0)
    model = Transformer(Config(len(VOCABULARY), dim=128, hidden_dim=256, n_layers=2, n_heads=4, dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    for step in range(1, steps + 1):
        numbers = [int(torch.randint(10**digits, (1,))) for digits in torch.randint(1, 7, (128,)).tolist()]
        source, target = batch_of([number + (number % 10 == 7) for number in numbers])  # 7 is held out as a last digit
        logits = model.train()(source, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=IDS["<pad>"])
        optimizer.param_groups[0]["lr"] = 1e-3 * min(step / 50, 1, 2 * (50 / step) ** 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    numbers = [10 * number + 7 for number in torch.randint(100_000, (200,)).tolist()]
    written = [[VOCABULARY[i] for i in row] for row in translate(model, batch_of(numbers)[0]).tolist()]
    written = [row[: row.index("<end>")] if "<end>" in row else row for row in written]
    right = sum(row == words(number) for row, number in zip(written, numbers))
    print(f"{numbers[0]}: {' '.join(written[0])}")
    print(f"{right} of {len(numbers)} numbers right; none of them ends as a number of the training did")


if __name__ == "__main__":
    print(__doc__.strip()) if "--help" in sys.argv else main()
