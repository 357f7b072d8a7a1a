"""Attention (Bahdanau, Cho and Bengio, 2014) in one file: a recurrent encoder-decoder that looks at its source.

Run `python attention.py`. It learns to rewrite dates, "29 november 2026" -> "2026-11-29", letter by letter. It then
prints for each written letter the source letter that it looked at most. It needs torch alone and takes under two
minutes on two cores.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    """Sizes. The defaults are the paper's RNNsearch-50."""

    vocab_size: int = 30_000
    dim: int = 1000  # of a state
    embedding_dim: int = 620
    attention_dim: int = 1000
    maxout_dim: int = 500
    start_id: int = 0
    end_id: int = 1
    pad_id: int = 2


class GRU(nn.Module):
    """Gated recurrent unit: a step keeps a share of the old state and takes the rest from a new one."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.input, self.recurrent = nn.Linear(in_dim, 3 * dim), nn.Linear(dim, 3 * dim)

    def step(self, x, state):
        """Return the next state. `x` is the product of the input, `self.input(...)`."""
        reset_x, update_x, new_x = x.chunk(3, -1)
        reset_h, update_h, new_h = self.recurrent(state).chunk(3, -1)
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + reset * new_h)
        return (1 - update) * new + update * state


class Encoder(nn.Module):
    """Two GRUs that read the source in both directions. A token's state joins theirs, so it knows both sides."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.dim = dim
        self.forwards, self.backwards = GRU(in_dim, dim), GRU(in_dim, dim)

    def read(self, gru, x, mask, order):
        state, states = x.new_zeros(len(x), self.dim), [None] * x.shape[1]
        products = gru.input(x)
        for i in order:
            # Padding leaves the state as it was.
            state = torch.where(mask[:, i, None], gru.step(products[:, i], state), state)
            states[i] = state
        return torch.stack(states, 1)

    def forward(self, x, mask):
        forwards = self.read(self.forwards, x, mask, range(x.shape[1]))
        backwards = self.read(self.backwards, x, mask, reversed(range(x.shape[1])))
        return torch.cat([forwards, backwards], -1)


class AdditiveAttention(nn.Module):
    """Weights of the source tokens for a decoder state s: the softmax of v · tanh(W s + U h_j)."""

    def __init__(self, dim, width, attention_dim):
        super().__init__()
        self.query, self.key = nn.Linear(dim, attention_dim, bias=False), nn.Linear(width, attention_dim, bias=False)
        self.v = nn.Parameter(torch.randn(attention_dim) * 0.1)

    def forward(self, state, keys, mask):
        scores = torch.tanh(self.query(state)[:, None] + keys) @ self.v
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)


class Decoder(nn.Module):
    """GRU that reads the previous token and the context, the weighted mean of the source states."""

    def __init__(self, config):
        super().__init__()
        self.first = nn.Linear(config.dim, config.dim)
        self.gru = GRU(config.embedding_dim + 2 * config.dim, config.dim)
        self.attention = AdditiveAttention(config.dim, 2 * config.dim, config.attention_dim)


class Maxout(nn.Module):
    """The larger of each pair of sums of the state, the previous token and the context."""

    def __init__(self, config):
        super().__init__()
        self.pairs = nn.Linear(3 * config.dim + config.embedding_dim, 2 * config.maxout_dim)

    def forward(self, *parts):
        return self.pairs(torch.cat(parts, -1)).unflatten(-1, (-1, 2)).amax(-1)


class Seq2Seq(nn.Module):
    """Encoder, decoder with attention, output, head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source_embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.target_embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.encoder, self.decoder = Encoder(config.embedding_dim, config.dim), Decoder(config)
        self.output, self.head = Maxout(config), nn.Linear(config.maxout_dim, config.vocab_size, bias=False)

    def start(self, source):
        """Return what a decoder needs of a source [batch, length], and its first state."""
        mask = source != self.config.pad_id
        states = self.encoder(self.source_embedding(source), mask)
        # The first decoder state comes from the backward state at the first token: it has read everything.
        first = torch.tanh(self.decoder.first(states[:, 0, self.config.dim :]))
        return (states, self.decoder.attention.key(states), mask), first

    def step(self, token, state, memory):
        """Return the logits of the next token, the next state, and the weights of the source tokens."""
        states, keys, mask = memory
        embedded = self.target_embedding(token)
        weights = self.decoder.attention(state, keys, mask)
        context = (weights[:, None] @ states)[:, 0]
        logits = self.head(self.output(state, embedded, context))
        gru = self.decoder.gru
        return logits, gru.step(gru.input(torch.cat([embedded, context], -1)), state), weights

    def forward(self, source, target):
        """Return logits of the token after each target token: [batch, length, vocab]."""
        memory, state = self.start(source)
        logits = []
        for i in range(target.shape[1]):
            new, state, _ = self.step(target[:, i], state, memory)
            logits.append(new)
        return torch.stack(logits, 1)


@torch.inference_mode()
def translate(model, source, longest=12):
    """Return the likeliest tokens, and the weights of the source tokens for each of them."""
    memory, state = model.start(source)
    token, tokens, weights = torch.full((len(source),), model.config.start_id), [], []
    for _ in range(longest):
        logits, state, seen = model.step(token, state, memory)
        token = logits.argmax(-1)
        tokens.append(token)
        weights.append(seen)
    return torch.stack(tokens, 1), torch.stack(weights, 1)


MONTHS = "january february march april may june july august september october november december".split()
LETTERS = "^$_" + "0123456789-/ .," + "abcdefghijklmnopqrstuvwxyz"  # start, end and padding come first


def random_date(years):
    """Return a date in one of five spellings, and as year-month-day."""
    year, month, day = (int(torch.randint(*bounds, (1,))) for bounds in (years, (1, 13), (1, 29)))
    name = MONTHS[month - 1]
    spellings = [f"{day} {name} {year}", f"{name} {day}, {year}", f"{day}/{month}/{year}", f"{day}. {name[:3]} {year}"]
    return [*spellings, f"{year} {name} {day}"][int(torch.randint(5, (1,)))], f"{year}-{month:02}-{day:02}"


def ids(texts, start=""):
    """Return texts as ids, padded to one length. Each ends with the end token."""
    longest = max(map(len, texts))
    return torch.tensor([[LETTERS.index(c) for c in (start + text + "$").ljust(longest + 2, "_")] for text in texts])


def main(steps=300, batch_size=64):
    """Train on the years 1900 to 1999 and, for other digits, 2100 to 9999; test on the years 2000 to 2099."""
    torch.manual_seed(0)
    model = Seq2Seq(Config(len(LETTERS), dim=64, embedding_dim=32, attention_dim=64, maxout_dim=64))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(1, steps + 1):
        dates = [random_date((1900, 2000) if torch.rand(()) < 0.9 else (2100, 10_000)) for _ in range(batch_size)]
        source, target = ids([spelling for spelling, _ in dates]), ids([date for _, date in dates], start="^")
        loss = F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten(), ignore_index=2)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    dates = [random_date((2000, 2100)) for _ in range(200)]
    tokens, weights = translate(model, ids([spelling for spelling, _ in dates]))
    written = ["".join(LETTERS[i] for i in row).split("$")[0] for row in tokens.tolist()]
    right = sum(text == date for text, (_, date) in zip(written, dates))
    print(f"{right} of {len(dates)} dates of a century that it has not seen are right")
    print(f"{(spelling := dates[0][0])} -> {written[0]}; each letter looked most at:")
    for letter, seen in zip(written[0], weights[0]):
        print(" ", letter, "", "".join("#" if w > 0.3 else "+" if w > 0.1 else "." for w in seen[: len(spelling)]))
    print(f"     {spelling}")


if __name__ == "__main__":
    print(__doc__.strip()) if "--help" in sys.argv else main()
