"""GPT-2 (Radford et al., 2019) in one file: model, training and sampling.

Run `python gpt2.py`. It trains a small GPT-2 on the bytes of Python's own help texts, prints the validation loss, and
writes a continuation. It needs torch alone and takes under two minutes on two cores.
`load` reads the weights of a published GPT-2: a folder with config.json and model.safetensors.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    """Sizes. The defaults are the smallest published model."""

    vocab_size: int = 50_257
    context_length: int = 1024
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    dropout: float = 0.1


class Attention(nn.Module):
    """Causal self-attention: each token takes a weighted mean of the values of earlier tokens and itself."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.n_heads, dim // self.n_heads).permute(2, 0, 3, 1, 4)
        # softmax(q kᵀ / √head_dim) v, where a token sees no later token
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class FeedForward(nn.Module):
    """Two linear layers with GELU (tanh form) between them. They act on each token alone."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream, each with its norm before it."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.feedforward_norm = nn.LayerNorm(config.dim)
        self.feedforward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


class GPT2(nn.Module):
    """Token and position embeddings, blocks, a final norm, and a head that shares the token embedding's matrix."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.context_length, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            # Residual projections start smaller, so that the sum over 2 n_layers of them keeps its variance.
            residual = name.endswith(("out.weight", "down.weight"))
            std = 0.01 if name == "positions.weight" else 0.02
            std = std / math.sqrt(2 * config.n_layers) if residual else std
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)

    def forward(self, tokens):
        """Return logits of the next token at each position: [batch, length] -> [batch, length, vocab]."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


@torch.inference_mode()
def generate(model, tokens, count, temperature=0.8, top_k=40):
    """Append `count` sampled tokens to `tokens` [batch, length]."""
    model.eval()
    for _ in range(count):
        logits = model(tokens[:, -model.config.context_length :])[:, -1] / temperature
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        probabilities = logits.masked_fill(logits < smallest, -math.inf).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
    return tokens


def load(folder):
    """Return the model in a folder as Hugging Face publishes GPT-2 (config.json, model.safetensors)."""
    settings = json.loads(Path(folder, "config.json").read_text())
    sizes = {"dim": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "context_length": "n_positions"}
    model = GPT2(Config(settings["vocab_size"], **{ours: settings[theirs] for ours, theirs in sizes.items()}))
    renamed = {}
    for name, tensor in read_safetensors(Path(folder, "model.safetensors")).items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            continue  # the causal mask, and the head, which is the embedding
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T  # the released code stores these matrices as [in, out]
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor.float()
    model.load_state_dict(renamed)
    return model.eval()


NAMES = {
    "wte": "embedding", "wpe": "positions", "ln_f": "norm", "h.": "blocks.", "ln_1": "attention_norm",
    "ln_2": "feedforward_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out",
    "mlp.c_fc": "feedforward.up", "mlp.c_proj": "feedforward.down",
}  # fmt: skip


def read_safetensors(path):
    """Return the tensors of a .safetensors file: 8 bytes of header length, a JSON header, then the numbers."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in types:
            continue
        start, stop = entry["data_offsets"]
        raw = torch.frombuffer(data, dtype=torch.uint8)[8 + size + start : 8 + size + stop].clone()
        tensors[name] = raw.view(types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def main(steps=650, batch_size=16):
    """Train on the help texts of the installed Python, and continue one."""
    torch.manual_seed(0)
    data = torch.tensor(list("\n\n".join(topics.values()).encode()))
    split = int(0.95 * len(data))
    config = Config(vocab_size=256, context_length=128, dim=128, n_layers=4, n_heads=4, dropout=0.0)
    model = GPT2(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def loss_of(part):
        starts = torch.randint(len(part) - config.context_length - 1, (batch_size,))
        windows = torch.stack([part[i : i + config.context_length + 1] for i in starts])
        logits = model(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    for step in range(steps + 1):
        if step % 50 == 0:
            model.eval()
            with torch.no_grad():
                validation = sum(loss_of(data[split:]).item() for _ in range(8)) / 8
            print(f"step {step:4}  validation {validation / math.log(2):.3f} bits per byte")
            model.train()
        for group in optimizer.param_groups:  # warm up, then fall along a cosine
            group["lr"] = 2e-3 * min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        loss = loss_of(data[:split])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    prompt = torch.tensor([list(b"The for statement ")])
    print(bytes(generate(model, prompt, 300)[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    print(__doc__.strip()) if "--help" in sys.argv else main()
