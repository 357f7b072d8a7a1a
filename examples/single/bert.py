"""BERT (Devlin et al., 2018) in one file: a bidirectional encoder that fills in hidden words.

Run `python bert.py`. It pretrains a small BERT on sums in words, "two plus three is five": it hides words and predicts
them from both sides, and it tells whether one sentence follows another. It then fills in blanks. It needs torch alone
and takes under two minutes on two cores.
"""

import sys
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    """Sizes. The defaults are BERT-base."""

    vocab_size: int = 30_522
    context_length: int = 512
    dim: int = 768
    hidden_dim: int = 3072
    n_layers: int = 12
    n_heads: int = 12
    norm_eps: float = 1e-12
    dropout: float = 0.1


class Attention(nn.Module):
    """Self-attention without a causal mask: each token sees the tokens on both sides. Padding is not seen."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv, self.out = nn.Linear(config.dim, 3 * config.dim), nn.Linear(config.dim, config.dim)

    def forward(self, x, mask):
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, config):
        super().__init__()
        self.up, self.down = nn.Linear(config.dim, config.hidden_dim), nn.Linear(config.hidden_dim, config.dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + feedforward(x))."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.feedforward = Attention(config), FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.feedforward_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask):
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))


class WordHead(nn.Module):
    """A layer before the logits of hidden words. The last matrix is the embedding."""

    def __init__(self, config):
        super().__init__()
        self.dense, self.norm = nn.Linear(config.dim, config.dim), nn.LayerNorm(config.dim, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden):
        return self.norm(F.gelu(self.dense(hidden)))


class Bert(nn.Module):
    """The encoder with its two pretraining heads."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.context_length, config.dim)
        self.segments = nn.Embedding(2, config.dim)  # sentence A or sentence B
        self.norm, self.dropout = nn.LayerNorm(config.dim, config.norm_eps), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.pooler = nn.Linear(config.dim, config.dim)
        self.word_head, self.next_head = WordHead(config), nn.Linear(config.dim, 2)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def encode(self, tokens, segments, mask):
        """Return hidden states [batch, length, dim]. `mask` is True on real tokens."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]] + self.segments(segments)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask)
        return x

    def words(self, hidden):
        """Return logits of the word at each position."""
        return F.linear(self.word_head(hidden), self.embedding.weight, self.word_head.bias)

    def next_sentence(self, hidden):
        """Return logits of "the second sentence follows" and "it is a random one", from the [CLS] token's state."""
        return self.next_head(torch.tanh(self.pooler(hidden[:, 0])))


PAD, CLS, SEP, MASK, UNKNOWN = range(5)


def hide(tokens, vocab_size, share=0.15):
    """Choose 15% of the words. Replace 80% of them by [MASK] and 10% by a random word; keep 10%.

    Return the changed tokens, and the original words at the chosen positions with -100 elsewhere.
    """
    chosen = (torch.rand(tokens.shape) < share) & (tokens > UNKNOWN)
    dice = torch.rand(tokens.shape)
    changed = torch.where(chosen & (dice < 0.8), MASK, tokens)
    changed = torch.where(chosen & (dice >= 0.9), torch.randint(5, vocab_size, tokens.shape), changed)
    return changed, torch.where(chosen, tokens, -100)


NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *NUMBERS, "plus", "minus", "is"]
SUMS = [(a, "plus", b, a + b) for a in range(13) for b in range(13 - a)]
SUMS += [(a, "minus", b, a - b) for a in range(13) for b in range(a + 1)]


def ids_of(words):
    return [VOCABULARY.index(word) for word in words]


def pairs_of(sums, others, count):
    """Return [CLS] A [SEP] B [SEP] as ids and segments, and 0 where B follows A, 1 where it is a random sentence.

    A is one of `sums`, such as "two plus three is five". B, one of `others`, follows it if it begins with "five".
    """
    rows, labels = [], []
    for i in torch.randint(len(sums), (count,)).tolist():
        label = int(torch.rand(()) < 0.5)
        fitting = [b for b in others if (b[0] == sums[i][3]) != bool(label)]
        second = fitting[int(torch.randint(len(fitting), (1,)))]
        words = [[NUMBERS[a], sign, NUMBERS[b], "is", NUMBERS[c]] for a, sign, b, c in (sums[i], second)]
        rows.append([CLS, *ids_of(words[0]), SEP, *ids_of(words[1]), SEP])
        labels.append(label)
    return torch.tensor(rows), torch.tensor([[0] * 7 + [1] * 6] * count), torch.tensor(labels)


def main(steps=2500):
    """Pretrain on pairs of sums, and fill in words of sums that were never shown."""
    torch.manual_seed(0)
    order = torch.randperm(len(SUMS)).tolist()
    held_out, shown = [SUMS[i] for i in order[:18]], [SUMS[i] for i in order[18:]]
    model = Bert(Config(len(VOCABULARY), 13, dim=64, hidden_dim=256, n_layers=2, n_heads=4, dropout=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)

    def forward(sums, count):
        tokens, segments, label = pairs_of(sums, shown, count)
        changed, words = hide(tokens, len(VOCABULARY))
        hidden = model.encode(changed, segments, tokens != PAD)
        return model.words(hidden), words, model.next_sentence(hidden), label

    for step in range(1, steps + 1):
        logits, words, next_logits, label = forward(shown, 64)
        loss = F.cross_entropy(logits.flatten(0, 1), words.flatten()) + F.cross_entropy(next_logits, label)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(step / 40, 1.02 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        for name, sums in (("shown", shown), ("held-out", held_out)):
            logits, words, next_logits, label = forward(sums, 500)
            logits, words = logits[:, :7], words[:, :7]  # of the first sentence: the second is a shown one
            chosen = words >= 0
            right = (logits.argmax(-1) == words)[chosen].float().mean().item()
            commonest = Counter(words[chosen].tolist()).most_common(1)[0][1] / int(chosen.sum())
            follows = (next_logits.argmax(-1) == label).float().mean().item()
            print(f"{name} sums: {right:.1%} of hidden words right (the commonest: {commonest:.1%})")
            print(f"  next sentence: {follows:.1%} right (chance 50%)")
        blank = "[CLS] two plus three is [MASK] [SEP] [MASK] minus four is one [SEP]".split()
        tokens = torch.tensor([ids_of(blank)])
        hidden = model.encode(tokens, torch.tensor([[0] * 7 + [1] * 6]), tokens != PAD)
        filled = [VOCABULARY[i] for i in model.words(hidden)[0].argmax(-1)]
        print(" ".join(f if word == "[MASK]" else word for word, f in zip(blank, filled)))


if __name__ == "__main__":
    print(__doc__.strip()) if "--help" in sys.argv else main()
