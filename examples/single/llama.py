"""LLaMA (Touvron et al., 2023) in one file: model, key-value cache, published weights, training and sampling.

Run `python llama.py` to train a small LLaMA on Python's own help texts (torch alone, under two minutes on two cores).
Run `python llama.py FOLDER 1 2 3` to continue the token ids 1 2 3 with a published model (LLaMA, SmolLM2, TinyLlama).
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
    """Sizes. The defaults are LLaMA-7B."""

    vocab_size: int = 32_000
    dim: int = 4096
    hidden_dim: int = 11_008
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32  # fewer than n_heads: several heads share keys and values (LLaMA 2 70B, LLaMA 3)
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tied: bool = False  # whether the head is the embedding's matrix


def rotate(x, positions, theta):
    """Turn pair i of each head, (x_i, x_{i + head_dim/2}), by position · theta^(-2i/head_dim).

    The product of a turned query and a turned key then depends on their distance alone.
    """
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = positions[:, None].float() * frequencies
    (first, second), cos, sin = x.split(half, -1), angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, grouped key-value heads, and a cache."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.dim // config.n_heads
        self.qkv = nn.Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, positions, cache):
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.config.n_heads, self.config.n_kv_heads, self.config.n_kv_heads], 1)
        q, k = (rotate(part, positions, self.config.rope_theta) for part in (q, k))
        if cache is not None:  # keys and values of earlier tokens, as [batch, heads, length, head_dim]
            k, v = (torch.cat([old, new], 2) for old, new in zip(cache, (k, v))) if cache else (k, v)
            cache[:] = k, v
        # Query i is at position (keys - length + i) and sees the keys up to there.
        mask = torch.ones(length, k.shape[2], dtype=torch.bool).tril(k.shape[2] - length)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)): the gate decides how much of each hidden unit passes."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream, each with its norm before it."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feedforward_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feedforward = SwiGLU(config)

    def forward(self, x, positions, cache):
        x = x + self.attention(self.attention_norm(x), positions, cache)
        return x + self.feedforward(self.feedforward_norm(x))


class Llama(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residuals = 2 * config.n_layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(residuals))

    def forward(self, tokens, caches=None):
        """Return logits [batch, length, vocab]. `caches` (one list per block) holds the tokens before these."""
        before = caches[0][0].shape[2] if caches and caches[0] else 0
        positions = torch.arange(before, before + tokens.shape[1])
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, positions, None if caches is None else caches[i])
        return F.linear(self.norm(x), self.embedding.weight if self.head is None else self.head.weight)


@torch.inference_mode()
def generate(model, tokens, count, temperature=0.0):
    """Append `count` tokens to `tokens` [batch, length]. A step reads the newest token; the cache has the others."""
    caches, new = [[] for _ in model.blocks], tokens
    for _ in range(count):
        logits = model(new, caches)[:, -1]
        new = logits.argmax(-1, keepdim=True)
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1)
        tokens = torch.cat([tokens, new], 1)
    return tokens


def load(folder):
    """Return the model in a folder as Hugging Face publishes LLaMA (config.json, model.safetensors)."""
    config = json.loads(Path(folder, "config.json").read_text())
    assert not config.get("rope_scaling"), "this file leaves out stretched rotary frequencies"
    theirs = read_safetensors(Path(folder, "model.safetensors"))
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    sizes = [config[key] for key in keys]
    n_kv_heads, tied = config.get("num_key_value_heads", sizes[-1]), config.get("tie_word_embeddings", False)
    model = Llama(Config(*sizes, n_kv_heads, config["rms_norm_eps"], theta, tied))
    for name, parameter in model.named_parameters():
        block, _, part = name.removesuffix(".weight").removeprefix("blocks.").partition(".")
        names = [f"layers.{block}.{n}" for n in NAMES[part]] if part else NAMES[block]
        parameter.data.copy_(torch.cat([theirs[n] for n in names]))
    return model.eval()


NAMES = {
    "embedding": ["embed_tokens"], "norm": ["norm"], "head": ["lm_head"], "attention.out": ["self_attn.o_proj"],
    "attention_norm": ["input_layernorm"], "feedforward_norm": ["post_attention_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "feedforward.gate_up": ["mlp.gate_proj", "mlp.up_proj"], "feedforward.down": ["mlp.down_proj"],
}  # fmt: skip


def read_safetensors(path):
    """Return the weights of a .safetensors file: 8 bytes of header length, a JSON header, then the numbers."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, entry in header.items():
        span = {"count": math.prod(entry["shape"]), "offset": start + entry["data_offsets"][0]}
        header[name] = torch.frombuffer(data, dtype=types[entry["dtype"]], **span).reshape(entry["shape"]).float()
    return {name.removeprefix("model.").removesuffix(".weight"): tensor for name, tensor in header.items()}


def main(steps=300, batch_size=16, length=128):
    """Train on the help texts of the installed Python, and continue one."""
    torch.manual_seed(0)
    data = torch.tensor(list("\n\n".join(topics.values()).encode()))
    model = Llama(Config(256, dim=128, hidden_dim=352, n_layers=4, n_heads=4, n_kv_heads=2, tied=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def loss_of(part):
        windows = torch.stack([part[i : i + length + 1] for i in torch.randint(len(part) - length, (batch_size,))])
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    for step in range(steps + 1):
        if step % 50 == 0:
            bits = sum(loss_of(data[-20_000:]).item() for _ in range(8)) / 8 / math.log(2)
            print(f"step {step:4}  validation {bits:.3f} bits per byte")
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss_of(data[:-20_000]).backward()
        optimizer.step()
    written = generate(model, torch.tensor([list(b"The for statement ")]), 300, temperature=0.8)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    if len(sys.argv) > 1 and "--help" not in sys.argv:
        print(generate(load(sys.argv[1]), torch.tensor([[int(token) for token in sys.argv[2:]]]), 20)[0].tolist())
    else:
        print(__doc__.strip()) if "--help" in sys.argv else main()
