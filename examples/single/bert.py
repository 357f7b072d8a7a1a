"""BERT (Devlin et al., 2018) in one file: a bidirectional encoder that fills in hidden words.

Run `python bert.py`. It pretrains a small BERT on Python's own help texts: it hides words and predicts them from both
sides, and it tells whether one sentence follows another. It then fills in a blank. It needs torch alone and takes
under two minutes on two cores.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pydoc_data.topics import topics

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


def pairs_of(sentences, count, length):
    """Return [CLS] A [SEP] B [SEP] as ids and segments, and 0 where B follows A, 1 where it is a random sentence."""
    starts, random = torch.randint(len(sentences) - 1, (2, count)).tolist()
    follows = torch.rand(count) < 0.5
    tokens, segments = torch.full((count, length), PAD), torch.zeros(count, length, dtype=torch.long)
    for i, (start, other) in enumerate(zip(starts, random)):
        first, second = sentences[start], sentences[start + 1 if follows[i] else other]
        first, second = first[: length // 2 - 2], second[: length // 2 - 1]
        row = [CLS, *first, SEP, *second, SEP]
        tokens[i, : len(row)] = torch.tensor(row)
        segments[i, len(first) + 2 : len(row)] = 1
    return tokens, segments, (~follows).long()


def main(steps=800, vocab_size=2000, length=48):
    """Pretrain on the help texts of the installed Python, and fill in blanks of held-out sentences."""
    torch.manual_seed(0)
    texts = [re.findall(r"[a-z]+|[.,]", s.lower()) for t in topics.values() for s in re.split(r"(?<=[.])\s+", t)]
    texts = [words for words in texts if len(words) > 4]
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    vocabulary += [word for word, _ in Counter(word for words in texts for word in words).most_common(vocab_size - 5)]
    ids = {word: index for index, word in enumerate(vocabulary)}
    sentences = [[ids.get(word, UNKNOWN) for word in words] for words in texts]
    split = int(0.95 * len(sentences))
    model = Bert(Config(len(vocabulary), length, dim=128, hidden_dim=512, n_layers=2, n_heads=4, dropout=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

    def forward(part, count):
        tokens, segments, label = pairs_of(part, count, length)
        changed, hidden_words = hide(tokens, len(vocabulary))
        hidden = model.encode(changed, segments, tokens != PAD)
        return model.words(hidden), hidden_words, model.next_sentence(hidden), label

    for step in range(1, steps + 1):
        logits, hidden_words, next_logits, label = forward(sentences[:split], 32)
        loss = F.cross_entropy(logits.flatten(0, 1), hidden_words.flatten()) + F.cross_entropy(next_logits, label)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(step / 40, 1.02 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        logits, words, next_logits, label = forward(sentences[split:], 256)
        chosen = words >= 0
        right = (logits.argmax(-1) == words)[chosen].float().mean().item()
        commonest = Counter(words[chosen].tolist()).most_common(1)[0][1] / int(chosen.sum())
        print(f"hidden words of unseen sentences: {right:.1%} right; always the commonest word: {commonest:.1%}")
        print(f"next sentence: {(next_logits.argmax(-1) == label).float().mean().item():.1%} right; chance 50%")
        blank = "the value of the [MASK] is a string .".split()
        tokens = torch.tensor([[CLS, *(ids.get(word, UNKNOWN) for word in blank), SEP]])
        logits = model.words(model.encode(tokens, torch.zeros_like(tokens), tokens != PAD))
        likeliest = logits[0, 1 + blank.index("[MASK]")].topk(5).indices.tolist()
        print(" ".join(blank), "->", ", ".join(vocabulary[i] for i in likeliest))


if __name__ == "__main__":
    main()
