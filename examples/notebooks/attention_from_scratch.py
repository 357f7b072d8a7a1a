# %% [markdown]
# # Attention from scratch, in keifu's layers
#
# Scaled dot-product attention in five lines, then several heads, a mask, positions, and a cache; each step is compared
# with the layer that the library uses. Open this file as a notebook (VS Code, Jupytext), or run it.

# %%
import matplotlib.pyplot as plt
import torch

from keifu.layers.attention.attention import Attention
from keifu.layers.attention.kv_cache import KVState
from keifu.layers.attention.masks import CausalMask
from keifu.layers.attention.positions import Positions, Rotary

torch.manual_seed(0)
words = ["the", "cat", "sat", "on", "the", "mat", "because", "it", "was", "tired"]
vocabulary = sorted(set(words))
tokens = torch.tensor([vocabulary.index(word) for word in words])
embedding = torch.nn.Embedding(len(vocabulary), 32)
x = embedding(tokens)[None]  # [batch, length, dim]

# %% [markdown]
# A query meets every key; the softmax of their products weighs the values.

# %%
layer = Attention(dim=32, n_heads=4)
q, k, v = layer.qkv(x).unflatten(-1, (3, 4, 8)).transpose(1, 3).unbind(2)  # [batch, heads, length, head_dim] each
causal = torch.ones(len(words), len(words), dtype=torch.bool).tril()
scores = (q @ k.mT / 8**0.5).masked_fill(~causal, -torch.inf)
weights = scores.softmax(-1)
mixed = (weights @ v).transpose(1, 2).flatten(2)
torch.testing.assert_close(layer.out(mixed), layer(x, mask=CausalMask(0, len(words))))

# %% [markdown]
# Where each head looks. The layer is not trained: what is seen is chance, and the triangle of the mask.

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
for head, each in enumerate(axes):
    each.imshow(weights[0, head].detach(), cmap="viridis")
    each.set(xticks=range(len(words)), yticks=range(len(words)), yticklabels=words, title=f"head {head}")
    each.set_xticklabels(words, rotation=90)

# %% [markdown]
# "the" stands twice, and without positions both are the same to whoever looks at them. Rotary positions turn queries
# and keys, so that products depend on the distance.

# %%
places = torch.arange(len(words))
assert torch.equal(k[:, :, 0], k[:, :, 4])  # the keys of both "the"
turned = Rotary(8)(places).apply(k.transpose(1, 2)).transpose(1, 2)
assert not torch.allclose(turned[:, :, 0], turned[:, :, 4])

# %% [markdown]
# With a cache of keys and values a new token costs one row of scores; what comes out is the same.

# %%
layer = Attention(dim=32, n_heads=4, n_kv_heads=2, rotary=Rotary(8)).eval()
whole = layer(x, mask=CausalMask(0, len(words)), positions=Positions(places))
cache = KVState([(2, 8)], rows=1, capacity=len(words), like=x)
with torch.no_grad():
    for place in range(len(words)):
        at = Positions(cache.positions(1))
        new = layer(x[:, place : place + 1], positions=at, cache=cache.layer(0))
        cache.advance()
        torch.testing.assert_close(new, whole[:, place : place + 1])
print("Attention by hand, by the layer and with a cache: the same numbers.")
